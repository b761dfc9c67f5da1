//! Whether a session is between two transactions, told by the messages that pass. Pure.
//!
//! Each direction of a session in plain text is followed by itself, from its first message on: the head of every message is
//! looked at as it passes, bodies are jumped over. What is asked for and what is answered is counted; a session is idle
//! when both counts agree, both directions are between two messages, and the last ReadyForQuery said `I`.
//!
//! Nothing is guessed. Bytes that were not seen (spliced, encrypted) can't be made up for, so a session whose stream was
//! moved past user space is never said to be idle again, and whatever is not certain counts as busy.

use serde::{Deserialize, Serialize};

/// The messages of one direction so far.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Trace {
    side: Side,
    head: [u8; 5],
    /// Bytes of the head that have come.
    have: u8,
    /// Bytes of the body that are still to come.
    left: u32,
    /// Requests that will be answered by a ReadyForQuery, or such answers.
    count: u32,
    /// Of a client: whether something was sent behind the last such request. Of a server: the last status.
    last: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Side {
    Client,
    Server,
}

/// No message is longer, for PostgreSQL either.
const LONGEST: u32 = 1 << 30;

impl Trace {
    /// What a client says behind its start-up packet.
    pub fn of_client() -> Self {
        // The start-up is answered by a ReadyForQuery, too.
        Self { side: Side::Client, head: [0; 5], have: 0, left: 0, count: 1, last: 0 }
    }

    /// What a server says from the start.
    pub fn of_server() -> Self {
        Self { side: Side::Server, count: 0, ..Self::of_client() }
    }

    /// Takes note of the next bytes. `false`: this is no PostgreSQL, and the trace is worth nothing any more.
    pub fn look(&mut self, mut bytes: &[u8]) -> bool {
        loop {
            let body = bytes.len().min(self.left as usize);
            if body > 0 {
                self.left -= body as u32;
                if self.left == 0 {
                    self.note(bytes[body - 1]);
                }
                bytes = &bytes[body..];
            }
            let missing = self.head.len() - usize::from(self.have);
            let head = bytes.len().min(missing);
            if head == 0 {
                return true;
            }
            self.head[usize::from(self.have)..][..head].copy_from_slice(&bytes[..head]);
            self.have += head as u8;
            bytes = &bytes[head..];
            if head == missing {
                let [_, length @ ..] = self.head;
                let Some(body) = u32::from_be_bytes(length).checked_sub(4).filter(|body| *body < LONGEST) else {
                    return false;
                };
                (self.have, self.left) = (0, body);
                if body == 0 {
                    self.note(0);
                }
            }
        }
    }

    /// A message is complete.
    fn note(&mut self, last_byte: u8) {
        match (self.side, self.head[0]) {
            (Side::Server, b'Z') => (self.count, self.last) = (self.count.wrapping_add(1), last_byte),
            // Query, Sync, FunctionCall.
            (Side::Client, b'Q' | b'S' | b'F') => (self.count, self.last) = (self.count.wrapping_add(1), 0),
            // CopyData, CopyDone, CopyFail and the answers to an authentication belong to what was counted before.
            (Side::Client, b'd' | b'c' | b'f' | b'p') | (Side::Server, _) => {}
            (Side::Client, _) => self.last = 1,
        }
    }

    /// Whether nothing has come of the next message.
    pub fn between_messages(&self) -> bool {
        self.have == 0 && self.left == 0
    }
}

/// Whether everything that the client has asked for has been answered, outside of a transaction.
pub fn is_idle(client: &Trace, server: &Trace) -> bool {
    let quiet = client.between_messages() && server.between_messages();
    quiet && client.count == server.count && client.last == 0 && server.last == b'I'
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(kind: u8, body: &[u8]) -> Vec<u8> {
        [&[kind][..], &(body.len() as u32 + 4).to_be_bytes(), body].concat()
    }

    /// A session whose messages come one after the other: `>` from the client, `<` from the server.
    #[derive(Clone)]
    struct Talk {
        client: Trace,
        server: Trace,
    }

    impl Talk {
        fn begun() -> Self {
            let mut talk = Self { client: Trace::of_client(), server: Trace::of_server() };
            assert!(!talk.is_idle(), "not started");
            talk.say("<R <S <K");
            assert!(!talk.is_idle(), "not started");
            talk.say("<ZI");
            assert!(talk.is_idle());
            talk
        }

        fn say(&mut self, words: &str) {
            for word in words.split(' ') {
                let (trace, rest) = match word.split_at(1) {
                    (">", rest) => (&mut self.client, rest),
                    (_, rest) => (&mut self.server, rest),
                };
                let (kind, body) = rest.split_at(1);
                assert!(trace.look(&message(kind.as_bytes()[0], body.as_bytes())));
            }
        }

        fn is_idle(&self) -> bool {
            is_idle(&self.client, &self.server)
        }
    }

    #[test]
    fn idle_is_only_what_is_certain() {
        for (what, talk, idle) in [
            ("a query", ">Qselect <T <D <C <ZI", true),
            ("without its end", ">Qselect <T <D <C", false),
            ("not answered", ">Qselect", false),
            ("a transaction", ">Qbegin <C <ZT", false),
            ("a failed one", ">Qbegin <C <ZT >Qx <E <ZE", false),
            ("and its end", ">Qbegin <C <ZT >Qcommit <C <ZI", true),
            ("extended", ">P >B >D >E >S <1 <2 <D <C <ZI", true),
            ("without Sync", ">P >B >E >H <1 <2 <D <C", false),
            ("two at once, the first answered", ">B >E >S >B >E >S <2 <C <ZI", false),
            ("two at once", ">B >E >S >B >E >S <2 <C <ZI <2 <C <ZI", true),
            ("the next is begun", ">B >E >S >B >E <2 <C <ZI", false),
            ("a COPY", ">Qcopy <G >d >d >c <C <ZI", true),
            ("a COPY that goes on", ">Qcopy <G >d >d", false),
            ("a COPY in the extended protocol: not certain", ">P >B >E >S <1 <2 <G >d >c >S <C <ZI", false),
            ("a notification", "<A", true),
            ("about to leave", ">X", false),
            ("a function call", ">F <V <ZI", true),
        ] {
            let mut session = Talk::begun();
            session.say(talk);
            assert_eq!(session.is_idle(), idle, "{what}");
        }
    }

    #[test]
    fn pieces_of_messages_are_no_boundary() {
        let mut session = Talk::begun();
        let query = message(b'Q', b"select");
        for piece in query.chunks(1) {
            assert!(session.client.look(piece));
            assert!(!session.is_idle());
        }
        session.say("<C <ZI");
        assert!(session.is_idle());
        let notice = message(b'N', b"hear");
        assert!(session.server.look(&notice[..notice.len() - 1]));
        assert!(!session.is_idle());
        assert!(session.server.look(&notice[notice.len() - 1..]));
        assert!(session.is_idle());
    }

    #[test]
    fn what_is_no_message_is_said_so() {
        assert!(!Trace::of_server().look(b"HTTP/1.1 200 OK"));
        assert!(!Trace::of_client().look(b"Q\0\0\0\x03"));
    }

    proptest! {
        #[test]
        fn any_pieces_are_the_same_as_the_whole(
            messages in proptest::collection::vec((any::<u8>(), proptest::collection::vec(any::<u8>(), 0..40)), 0..20),
            cuts in proptest::collection::vec(0usize..50, 0..40),
        ) {
            let stream: Vec<u8> = messages.iter().flat_map(|(kind, body)| message(*kind, body)).collect();
            for trace in [Trace::of_client(), Trace::of_server()] {
                let mut whole = trace.clone();
                prop_assert!(whole.look(&stream) && whole.between_messages());
                let (mut pieces, mut rest) = (trace, &stream[..]);
                for cut in &cuts {
                    let (piece, later) = rest.split_at((*cut).min(rest.len()));
                    prop_assert!(pieces.look(piece));
                    rest = later;
                }
                prop_assert!(pieces.look(rest));
                prop_assert_eq!(format!("{pieces:?}"), format!("{whole:?}"));
            }
        }

        #[test]
        fn any_bytes_at_all_are_survived(pieces in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..50), 0..10)) {
            let mut trace = Trace::of_client();
            let _ = pieces.iter().all(|piece| trace.look(piece));
        }
    }
}
