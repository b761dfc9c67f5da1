//! A PROXY header, of either version: whatever comes, there is an answer, and not a byte beyond it is asked for.

#![no_main]

use libfuzzer_sys::fuzz_target;
use trunkline_router::proxy::{self, Progress};

fuzz_target!(|bytes: &[u8]| {
    let mut have = 0;
    while let Ok(Progress::Need(more)) = proxy::read(&bytes[..have]) {
        assert!(more > 0 && have + more <= 16 + (1 << 16), "{more} more");
        if have + more > bytes.len() {
            return;
        }
        have += more;
    }
});
