//! The key by which a session can be cancelled, found in what its server says at the start. Pure.
//!
//! BackendKeyData comes behind the authentication and before the first ReadyForQuery, in plain text: a process id and a
//! secret, which CancelRequest repeats. The bytes are looked at as they pass; they are neither held back nor changed.

/// BackendKeyData's body: a process id of 4 bytes, a secret of 4 to 256 (protocol 3.2).
const KEY: std::ops::RangeInclusive<usize> = 8..=260;

/// Nothing is looked for behind so many bytes: no start-up says more.
const LOOK: usize = 1 << 20;

/// What has been seen so far.
#[derive(Debug, Default)]
pub struct KeyWatch {
    /// The message that the next byte belongs to: its type and length, as far as they are known.
    head: [u8; 5],
    have: usize,
    /// Bytes of its body that are still to come.
    left: usize,
    /// The key, as far as it has come.
    key: Option<Vec<u8>>,
    seen: usize,
}

/// What comes of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seen {
    /// Look on.
    More,
    /// The key.
    Key(Box<[u8]>),
    /// There will be none.
    Nothing,
}

impl KeyWatch {
    /// Looks at the next bytes. Must not be called again after anything but [`Seen::More`].
    pub fn look(&mut self, mut bytes: &[u8]) -> Seen {
        self.seen += bytes.len();
        loop {
            let body = self.left.min(bytes.len());
            let (now, later) = bytes.split_at(body);
            bytes = later;
            self.left -= body;
            if let Some(key) = &mut self.key {
                key.extend_from_slice(now);
                if self.left == 0 {
                    return self.key.take().map_or(Seen::Nothing, |key| Seen::Key(key.into_boxed_slice()));
                }
            }
            let Some((first, rest)) = bytes.split_first() else {
                return if self.seen < LOOK { Seen::More } else { Seen::Nothing };
            };
            // Of a head, byte by byte: a start-up has few of them.
            self.head[self.have] = *first;
            self.have += 1;
            bytes = rest;
            if self.have == self.head.len() && !self.begin() {
                return Seen::Nothing;
            }
        }
    }

    /// A head is complete: whether there may still be a key.
    fn begin(&mut self) -> bool {
        let [kind, length @ ..] = self.head;
        let Some(body) = (u32::from_be_bytes(length) as usize).checked_sub(4) else { return false };
        (self.have, self.left) = (0, body);
        match kind {
            b'K' if KEY.contains(&body) => self.key = Some(Vec::with_capacity(body)),
            // Authentication, ParameterStatus, notices, NegotiateProtocolVersion.
            b'R' | b'S' | b'N' | b'v' => {}
            _ => return false,
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(kind: u8, body: &[u8]) -> Vec<u8> {
        [&[kind][..], &(body.len() as u32 + 4).to_be_bytes(), body].concat()
    }

    fn watch(pieces: &[&[u8]]) -> Seen {
        let mut watch = KeyWatch::default();
        for piece in pieces {
            match watch.look(piece) {
                Seen::More => {}
                seen => return seen,
            }
        }
        Seen::More
    }

    #[test]
    fn the_key_is_found_behind_the_authentication() {
        let before =
            [message(b'R', b"\0\0\0\0"), message(b'S', b"a\0b\0"), message(b'N', b""), message(b'v', b"12345678")];
        let long = [7; 260];
        for (last, expected) in [
            (message(b'K', b"pid_secr"), Seen::Key(Box::from(*b"pid_secr"))),
            (message(b'K', &long), Seen::Key(Box::from(long))),
            (message(b'K', &[7; 261]), Seen::Nothing),
            (message(b'K', b"pid_"), Seen::Nothing),
            (message(b'Z', b"I"), Seen::Nothing),
            (message(b'E', b"SFATAL\0\0"), Seen::Nothing),
            (b"K\0\0\0\x03".to_vec(), Seen::Nothing),
            (Vec::new(), Seen::More),
        ] {
            let stream = [before.concat(), last].concat();
            assert_eq!(watch(&[&stream]), expected);
        }
        assert_eq!(watch(&[b"HTTP/1.1 200 OK"]), Seen::Nothing);
        let endless = message(b'N', &vec![0; 2 << 20]);
        assert_eq!(watch(&[&endless]), Seen::Nothing, "not looked at for ever");
    }

    proptest! {
        #[test]
        fn any_pieces_are_the_same_as_the_whole(
            cuts in proptest::collection::vec(0usize..200, 0..20),
            secret in proptest::collection::vec(any::<u8>(), 4..=256),
            more in proptest::collection::vec(any::<u8>(), 0..20),
        ) {
            let body = [b"pid_".to_vec(), secret].concat();
            let start = [message(b'R', b"\0\0\0\0"), message(b'S', b"x\0y\0"), message(b'K', &body), more].concat();
            let mut rest = &start[..];
            let mut pieces = Vec::new();
            for cut in cuts {
                let (piece, later) = rest.split_at(cut.min(rest.len()));
                pieces.push(piece);
                rest = later;
            }
            pieces.push(rest);
            prop_assert_eq!(watch(&pieces), Seen::Key(body.into_boxed_slice()));
        }

        #[test]
        fn any_bytes_at_all_are_survived(pieces in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..50), 0..10)) {
            let pieces: Vec<&[u8]> = pieces.iter().map(Vec::as_slice).collect();
            let _ = watch(&pieces);
        }
    }
}
