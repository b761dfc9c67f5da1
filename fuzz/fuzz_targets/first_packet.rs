//! A client's first packet: whatever comes, there is an answer, and no more is asked for than a packet may have.

#![no_main]

use libfuzzer_sys::fuzz_target;
use trunkline_router::startup::{self, Packet, Progress};

fuzz_target!(|bytes: &[u8]| {
    let mut have = 0;
    loop {
        match startup::read(&bytes[..have]) {
            Ok(Progress::Need(more)) => {
                assert!(more > 0 && have + more <= 10_004, "{more} more");
                if have + more > bytes.len() {
                    return;
                }
                have += more;
            }
            Ok(Progress::Packet(packet)) => {
                let _ = startup::setting(&bytes[..have], "trunkline.target");
                if packet == Packet::Cancel {
                    let _ = startup::cancel_key(&bytes[..have]);
                }
                return;
            }
            Err(_) => return,
        }
    }
});
