//! The one thing that the router changes of what a server says. Pure.
//!
//! A server that is spoken to in TLS offers SCRAM with channel binding (`SCRAM-SHA-256-PLUS`). A client in plain text has no
//! channel that could be bound, and libpq takes the offer for an attack. So towards such a client the offer is left out;
//! what remains, SCRAM without binding, is as strong as in plain text without a router.

/// The kind of AuthenticationSASL.
const SASL: [u8; 4] = 10u32.to_be_bytes();

/// What is left out.
const WITH_BINDING: &[u8] = b"SCRAM-SHA-256-PLUS";

/// What the server has said, up to and with its first request for authentication, without the offer of channel binding.
/// `None`: it has not said that much yet.
pub fn without_binding(said: &[u8]) -> Option<Vec<u8>> {
    let mut at = 0;
    loop {
        let (kind, rest) = said.get(at..)?.split_first()?;
        let (length, rest) = rest.split_first_chunk::<4>()?;
        let length = u32::from_be_bytes(*length) as usize;
        match kind {
            b'v' | b'N' | b'S' => at = at.checked_add(1)?.checked_add(length)?,
            b'R' => {
                let body = rest.get(..length.checked_sub(4)?)?;
                let behind = rest.get(body.len()..)?;
                return Some([&said[..at], &authentication(body), behind].concat());
            }
            _ => return Some(said.to_vec()),
        }
    }
}

/// A request for authentication with this body, less the offer.
fn authentication(body: &[u8]) -> Vec<u8> {
    let body = match body.strip_prefix(&SASL) {
        Some(list) => {
            let offers = list.split_inclusive(|byte| *byte == 0);
            let kept = offers.filter(|offer| offer.strip_suffix(b"\0") != Some(WITH_BINDING));
            [SASL.to_vec(), kept.collect::<Vec<_>>().concat()].concat()
        }
        None => body.to_vec(),
    };
    let length = u32::try_from(body.len() + 4).unwrap_or(u32::MAX).to_be_bytes();
    [&b"R"[..], &length, &body].concat()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(kind: u8, body: &[u8]) -> Vec<u8> {
        [&[kind][..], &(body.len() as u32 + 4).to_be_bytes(), body].concat()
    }

    #[test]
    fn the_offer_is_left_out_and_nothing_else() {
        let both = message(b'R', b"\0\0\0\x0aSCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0");
        let one = message(b'R', b"\0\0\0\x0aSCRAM-SHA-256\0\0");
        let older = message(b'v', b"\0\0\0\0\0\0\0\0");
        let trusted = [message(b'R', b"\0\0\0\0"), message(b'S', b"a\0b\0")].concat();
        for (said, expected) in [
            (both.clone(), Some(one.clone())),
            (one.clone(), Some(one.clone())),
            ([older.clone(), both.clone()].concat(), Some([older, one.clone()].concat())),
            ([both.clone(), b"more".to_vec()].concat(), Some([one, b"more".to_vec()].concat())),
            (trusted.clone(), Some(trusted)),
            (b"E\0\0\0\x05\0".to_vec(), Some(b"E\0\0\0\x05\0".to_vec())),
            (both[..10].to_vec(), None),
            (b"R\0\0\0\x03".to_vec(), None),
            (b"v\xff\xff\xff\xff".to_vec(), None),
            (Vec::new(), None),
        ] {
            assert_eq!(without_binding(&said), expected, "{}", String::from_utf8_lossy(&said));
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(said in proptest::collection::vec(any::<u8>(), 0..100), r: bool) {
            let said = if r { [b"R\0\0\0\x20\0\0\0\x0a".to_vec(), said].concat() } else { said };
            let _ = without_binding(&said);
        }
    }
}
