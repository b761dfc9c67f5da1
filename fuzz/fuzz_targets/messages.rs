//! What a session says: the key that cancels it, and where its messages end, are the same however the bytes arrive.

#![no_main]

use libfuzzer_sys::fuzz_target;
use trunkline_router::boundary::Trace;
use trunkline_router::key::{KeyWatch, Seen};

fuzz_target!(|input: (Vec<u8>, u8)| {
    let (bytes, piece) = (&input.0, usize::from(input.1).max(1));
    let mut key = KeyWatch::default();
    let _ = bytes.chunks(piece).find(|piece| key.look(piece) != Seen::More);
    let (mut whole, mut pieces) = (Trace::of_server(), Trace::of_server());
    let sensible = whole.look(bytes);
    assert_eq!(bytes.chunks(piece).all(|piece| pieces.look(piece)), sensible);
    assert!(!sensible || whole.between_messages() == pieces.between_messages());
});
