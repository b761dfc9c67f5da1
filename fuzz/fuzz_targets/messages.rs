//! What a session says: the key that cancels it, where its messages end, and the offer of channel binding that is left out, are
//! found or not, however the bytes arrive.

#![no_main]

use libfuzzer_sys::fuzz_target;
use trunkline_router::boundary::Trace;
use trunkline_router::key::{KeyWatch, Seen};
use trunkline_router::sasl;

fuzz_target!(|input: (Vec<u8>, u8)| {
    let (bytes, piece) = (&input.0, usize::from(input.1).max(1));
    let mut key = KeyWatch::default();
    let seen = bytes.chunks(piece).map(|piece| key.look(piece)).find(|seen| *seen != Seen::More);
    let at_once = Some(KeyWatch::default().look(bytes)).filter(|seen| *seen != Seen::More);
    assert_eq!(seen, at_once);
    for side in [Trace::of_server(), Trace::of_client()] {
        let (mut whole, mut pieces) = (side.clone(), side);
        let sensible = whole.look(bytes);
        assert_eq!(bytes.chunks(piece).all(|piece| pieces.look(piece)), sensible);
        assert!(!sensible || whole.between_messages() == pieces.between_messages());
    }
    if let Some(unbound) = sasl::without_binding(bytes) {
        assert!(unbound.len() <= bytes.len());
    }
});
