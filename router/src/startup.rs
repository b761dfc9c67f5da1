//! The first packet of a client, from its bytes alone.
//!
//! Sans I/O: [`read`] is given what has been collected so far and says how much more is needed. Whatever follows the first
//! packet is not looked at.
//!
//! Rules are PostgreSQL's own (`ProcessStartupPacket` in backend_startup.c, and "Message Formats" in the protocol
//! chapter): length and code are big-endian, the length counts itself.

/// The longest packet: PostgreSQL's `MAX_STARTUP_PACKET_LENGTH` of 10 000 bytes after the length word.
pub const MAX_PACKET: usize = 10_004;

/// The shortest packet: length and code. Nothing can be said before these are here.
pub const MIN_PACKET: usize = 8;

const SSL_REQUEST: u32 = 80_877_103;
const GSSENC_REQUEST: u32 = 80_877_104;
const CANCEL_REQUEST: u32 = 80_877_102;

/// An SSLRequest, whole.
pub const SSL_REQUEST_PACKET: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];

/// A record type of TLS, the kind of handshake message that is a ClientHello, and the lengths of what they begin with (RFC 8446, 4 and 5.1).
const TLS_HANDSHAKE: u8 = 0x16;
const CLIENT_HELLO: u8 = 1;
const RECORD_HEAD: usize = 5;
const MESSAGE_HEAD: usize = 4;

/// What is known after the bytes so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// So many bytes more belong to it, at least.
    Need(usize),
    /// The packet is whole.
    Packet(Packet),
}

/// What a client wants first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packet {
    /// TLS, please: the server answers with one byte, before which the client must send nothing.
    SslRequest,
    /// GSSAPI encryption, please: as above.
    GssEncRequest,
    /// TLS without asking (PostgreSQL 17, `sslnegotiation=direct`): what was read is a ClientHello, which a server answers.
    DirectTls,
    /// A session, in plain text.
    Startup {
        /// The minor version of protocol 3 that the client asks for. Which ones it knows is the server's business.
        minor: u16,
    },
    /// Stop what another session does. The key (4 to 256 bytes) is the server's business.
    Cancel,
}

impl Packet {
    /// Whether it asks for encryption, or begins it.
    pub fn asks_for_encryption(self) -> bool {
        self.awaits_answer() || self == Packet::DirectTls
    }

    /// Whether the client must be silent until it is answered. Bytes that are there already were sent by somebody who
    /// wants them taken for encrypted ones (CVE-2021-23214).
    pub fn awaits_answer(self) -> bool {
        matches!(self, Packet::SslRequest | Packet::GssEncRequest)
    }
}

/// Why this is no first packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// The length is out of bounds: not PostgreSQL's protocol at all.
    #[error("invalid length of startup packet")]
    Length,
    /// A request of fixed length has another one.
    #[error("invalid length of negotiation or cancel request")]
    RequestLength,
    /// The list of parameters has no end.
    #[error("invalid startup packet layout: expected terminator as last byte")]
    Layout,
    /// The same encryption is asked for again.
    #[error("encryption has been requested and denied before")]
    Repeated,
    /// A protocol other than 3, such as 2.0.
    #[error("unsupported frontend protocol {0}.{1}: this server supports 3.0 and later minor versions")]
    Version(u16, u16),
}

/// Looks at the bytes collected so far.
pub fn read(bytes: &[u8]) -> Result<Progress, Malformed> {
    let Some((head, _)) = bytes.split_first_chunk::<MIN_PACKET>() else {
        return Ok(Progress::Need(MIN_PACKET - bytes.len()));
    };
    let [l0, l1, l2, l3, c0, c1, c2, c3] = *head;
    // A startup packet of more than 369 MB begins like this, and no such packet is legal.
    if l0 == TLS_HANDSHAKE && l1 == 3 {
        return client_hello(bytes);
    }
    let length = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
    if !(MIN_PACKET..=MAX_PACKET).contains(&length) {
        return Err(Malformed::Length);
    }
    let code = u32::from_be_bytes([c0, c1, c2, c3]);
    check_length(code, length)?;
    if bytes.len() < length {
        return Ok(Progress::Need(length - bytes.len()));
    }
    packet(code, &bytes[MIN_PACKET..length]).map(Progress::Packet)
}

/// The handshake message that TLS begins with, in one record or in several; no longer than other packets.
fn client_hello(bytes: &[u8]) -> Result<Progress, Malformed> {
    // Of the message, without what the records add.
    let (mut have, mut whole) = (0, MESSAGE_HEAD);
    let mut end = 0;
    while have < whole {
        let Some(([kind, major, _, l0, l1], body)) = bytes.get(end..).and_then(<[u8]>::split_first_chunk) else {
            return need(end + RECORD_HEAD, bytes);
        };
        let length = usize::from(u16::from_be_bytes([*l0, *l1]));
        if (*kind, *major) != (TLS_HANDSHAKE, 3) || length < MESSAGE_HEAD {
            return Err(Malformed::Length);
        }
        if end == 0 {
            match body {
                [CLIENT_HELLO, m0, m1, m2, ..] => whole += u32::from_be_bytes([0, *m0, *m1, *m2]) as usize,
                [CLIENT_HELLO, ..] | [] => return need(RECORD_HEAD + length, bytes),
                _ => return Err(Malformed::Length),
            }
        }
        have += length;
        end += RECORD_HEAD + length;
    }
    if bytes.len() < end { need(end, bytes) } else { Ok(Progress::Packet(Packet::DirectTls)) }
}

fn need(whole: usize, bytes: &[u8]) -> Result<Progress, Malformed> {
    if whole > MAX_PACKET { Err(Malformed::Length) } else { Ok(Progress::Need(whole - bytes.len())) }
}

/// How much of `bytes`, which begin with a packet, belongs to it: of a ClientHello all that is there.
pub fn length(bytes: &[u8]) -> usize {
    let declared = bytes.first_chunk().map_or(0, |length| u32::from_be_bytes(*length) as usize);
    declared.min(bytes.len())
}

/// What can be refused before the rest is read.
fn check_length(code: u32, length: usize) -> Result<(), Malformed> {
    let legal = match code {
        SSL_REQUEST | GSSENC_REQUEST => length == MIN_PACKET,
        // Process id and a key of 4 to 256 bytes (protocol 3.2).
        CANCEL_REQUEST => (MIN_PACKET + 4 + 4..=MIN_PACKET + 4 + 256).contains(&length),
        _ => return version(code).map(|_| ()),
    };
    if legal { Ok(()) } else { Err(Malformed::RequestLength) }
}

fn packet(code: u32, body: &[u8]) -> Result<Packet, Malformed> {
    match code {
        SSL_REQUEST => Ok(Packet::SslRequest),
        GSSENC_REQUEST => Ok(Packet::GssEncRequest),
        CANCEL_REQUEST => Ok(Packet::Cancel),
        _ if body.last() != Some(&0) => Err(Malformed::Layout),
        _ => Ok(Packet::Startup { minor: version(code)? }),
    }
}

fn version(code: u32) -> Result<u16, Malformed> {
    match ((code >> 16) as u16, code as u16) {
        (3, minor) => Ok(minor),
        (major, minor) => Err(Malformed::Version(major, minor)),
    }
}

/// The process id and the secret of a CancelRequest, as BackendKeyData has them.
pub fn cancel_key(packet: &[u8]) -> Option<&[u8]> {
    packet.get(MIN_PACKET..)
}

/// The parameters of a start-up packet, without what follows a pair that has no end.
pub fn parameters(packet: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    let mut texts = packet.get(MIN_PACKET..).unwrap_or_default().split(|byte| *byte == 0);
    std::iter::from_fn(move || {
        let name = texts.next().filter(|name| !name.is_empty())?;
        Some((name, texts.next()?))
    })
}

/// The last value that a start-up packet gives to a setting, by a parameter of that name or in `options` (`-c name=value`,
/// `--name=value`), which PostgreSQL splits at white space unless a backslash stands before it.
pub fn setting(packet: &[u8], wanted: &str) -> Option<String> {
    let mut found = None;
    for (name, value) in parameters(packet) {
        if name.eq_ignore_ascii_case(wanted.as_bytes()) {
            found = Some(String::from_utf8_lossy(value).into_owned());
        } else if name == b"options" {
            found = option(&String::from_utf8_lossy(value), wanted).or(found);
        }
    }
    found
}

fn option(options: &str, wanted: &str) -> Option<String> {
    let words = words(options);
    let mut words = words.iter().map(String::as_str);
    let mut found = None;
    while let Some(word) = words.next() {
        let assignment = match word.strip_prefix("--") {
            Some(assignment) => Some(assignment),
            None if word == "-c" => words.next(),
            None => word.strip_prefix("-c"),
        };
        let Some((name, value)) = assignment.and_then(|assignment| assignment.split_once('=')) else { continue };
        if name.eq_ignore_ascii_case(wanted) {
            found = Some(value.to_owned());
        }
    }
    found
}

fn words(options: &str) -> Vec<String> {
    let (mut words, mut word, mut escaped) = (Vec::new(), String::new(), false);
    for c in options.chars() {
        match c {
            '\\' if !escaped => escaped = true,
            c if c.is_ascii_whitespace() && !escaped => words.push(std::mem::take(&mut word)),
            c => {
                word.push(c);
                escaped = false;
            }
        }
    }
    words.push(word);
    words.retain(|word| !word.is_empty());
    words
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;
    use pgwire::messages::cancel::CancelRequest;
    use pgwire::messages::startup::{SecretKey, Startup};
    use pgwire::messages::{DecodeContext, Message};
    use proptest::prelude::*;

    use super::*;

    fn request(length: u32, code: u32, body: &[u8]) -> Vec<u8> {
        [&length.to_be_bytes()[..], &code.to_be_bytes(), body].concat()
    }

    fn parameters_of(packet: &[u8], wanted: &str) -> Option<Vec<u8>> {
        parameters(packet).find(|(name, _)| *name == wanted.as_bytes()).map(|(_, value)| value.to_vec())
    }

    #[test]
    fn the_packet_that_is_sent_is_the_one_that_is_read() {
        assert_eq!(read(&SSL_REQUEST_PACKET), Ok(Progress::Packet(Packet::SslRequest)));
    }

    #[test]
    fn each_kind_is_told_apart() {
        let startup = request(15, 0x3_0000, b"user\0\0\0");
        for (bytes, expected) in [
            (request(8, SSL_REQUEST, b""), Ok(Progress::Packet(Packet::SslRequest))),
            (request(8, GSSENC_REQUEST, b""), Ok(Progress::Packet(Packet::GssEncRequest))),
            (request(16, CANCEL_REQUEST, b"pidkkeyk"), Ok(Progress::Packet(Packet::Cancel))),
            (request(268, CANCEL_REQUEST, &[7; 260]), Ok(Progress::Packet(Packet::Cancel))),
            (startup, Ok(Progress::Packet(Packet::Startup { minor: 0 }))),
            (request(9, 0x3_0002, b"\0"), Ok(Progress::Packet(Packet::Startup { minor: 2 }))),
            (b"\x16\x03\x01\x02\x00\x01\x00\x01".to_vec(), Ok(Progress::Need(5 + 512 - 8))),
            (b"\x16\x03\x01\0\x06\x01\0\0\x02ab".to_vec(), Ok(Progress::Packet(Packet::DirectTls))),
            (b"\x16\x03\x01\0\x05\x01\0\0\x05a".to_vec(), Ok(Progress::Need(5))),
            (b"\x16\x03\x01\0\x05\x01\0\0\x05a\x16\x03\x01\0\x04bcd".to_vec(), Ok(Progress::Need(1))),
            (
                b"\x16\x03\x01\0\x05\x01\0\0\x05a\x16\x03\x01\0\x04bcde".to_vec(),
                Ok(Progress::Packet(Packet::DirectTls)),
            ),
            (b"\x16\x03\x01\0\x05\x01\0\0\x05a\x17\x03\x01\0\x04bcde".to_vec(), Err(Malformed::Length)),
            (b"\x16\x03\x01\0\x05\x02\0\0\x01a".to_vec(), Err(Malformed::Length)),
            (b"\x16\x03\x01\x40\0\x01\0\x3f".to_vec(), Err(Malformed::Length)),
            (request(12, SSL_REQUEST, b"more"), Err(Malformed::RequestLength)),
            (request(12, CANCEL_REQUEST, b"pidk"), Err(Malformed::RequestLength)),
            (request(269, CANCEL_REQUEST, &[7; 261]), Err(Malformed::RequestLength)),
            (request(8, 0x3_0000, b""), Err(Malformed::Layout)),
            (request(9, 0x3_0000, b"x"), Err(Malformed::Layout)),
            (request(9, 0x2_0000, b"\0"), Err(Malformed::Version(2, 0))),
            (request(7, 0x3_0000, b""), Err(Malformed::Length)),
            (request(10_005, 0x3_0000, b""), Err(Malformed::Length)),
            (b"GET / HTTP/1.1\r\n".to_vec(), Err(Malformed::Length)),
        ] {
            assert_eq!(read(&bytes), expected, "{bytes:02x?}");
        }
    }

    #[test]
    fn never_asks_for_a_byte_beyond_the_packet() {
        let bytes = request(17, 0x3_0000, b"user\0me\0\0");
        for have in 0..bytes.len() {
            let whole = if have < MIN_PACKET { MIN_PACKET } else { bytes.len() };
            assert_eq!(read(&bytes[..have]), Ok(Progress::Need(whole - have)));
        }
    }

    #[test]
    fn a_packet_ends_where_it_says() {
        for (bytes, expected) in [
            (&SSL_REQUEST_PACKET[..], 8),
            (&[&SSL_REQUEST_PACKET[..], b"early"].concat(), 8),
            (&request(17, 0x3_0000, b"user\0me\0\0p\0\0\0\x05\0"), 17),
            (b"\x16\x03\x01\x40\x00\x01\x00\x01and all the rest", 24),
            (b"\0\0\0", 0),
        ] {
            assert_eq!(length(bytes), expected, "{bytes:02x?}");
        }
    }

    #[test]
    fn settings_are_found_where_postgresql_finds_them() {
        for (parameters, expected) in [
            (&[("options", "-c trunkline.target=replica")][..], Some("replica")),
            (&[("options", "-ctrunkline.target=any -c work_mem=1MB")], Some("any")),
            (&[("options", "--trunkline.target=sync")], Some("sync")),
            (&[("options", "-c TRUNKLINE.target=a -c trunkline.target=b")], Some("b")),
            (&[("trunkline.target", "leader")], Some("leader")),
            (&[("options", "-c search_path=a\\ -c\\ trunkline.target=b")], None),
            (&[("options", "-c trunkline.target=a\\ b\\\\")], Some("a b\\")),
            (&[("options", "-c trunkline.target")], None),
            (&[("options", "-c")], None),
            (&[("user", "trunkline.target"), ("database", "-c trunkline.target=x")], None),
        ] {
            let pairs: String = parameters.iter().map(|(name, value)| format!("{name}\0{value}\0")).collect();
            let body = format!("user\0me\0{pairs}\0");
            let packet = request(body.len() as u32 + 8, 0x3_0000, body.as_bytes());
            assert_eq!(setting(&packet, "trunkline.target").as_deref(), expected, "{parameters:?}");
        }
        assert_eq!(setting(b"\0\0\0\x0c\0\x03\0\0user", "user"), None);
        assert_eq!(setting(b"", "user"), None);
    }

    proptest! {
        #[test]
        fn any_bytes_have_settings_or_not(bytes in proptest::collection::vec(any::<u8>(), 0..200), options in ".{0,60}") {
            let _ = setting(&bytes, "trunkline.target");
            let _ = option(&options, "trunkline.target");
        }

        #[test]
        fn any_bytes_get_an_answer_and_needs_are_bounded(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            if let Ok(Progress::Need(more)) = read(&bytes) {
                prop_assert!(more > 0 && bytes.len() + more <= MAX_PACKET);
            }
        }

        #[test]
        fn agrees_with_pgwire_on_startups(
            minor in 0u16..4,
            parameters in proptest::collection::btree_map("[a-z]{1,12}", "[a-zA-Z0-9 =-]{0,40}", 0..12),
        ) {
            let mut message = Startup::new();
            message.protocol_number_minor = minor;
            message.parameters = parameters;
            let mut bytes = BytesMut::new();
            message.encode(&mut bytes).unwrap();
            prop_assert_eq!(read(&bytes), Ok(Progress::Packet(Packet::Startup { minor })));
            for (name, value) in &message.parameters {
                let found = parameters_of(&bytes, name);
                prop_assert_eq!(found.as_deref(), Some(value.as_bytes()));
            }
            let decoded = Startup::decode(&mut bytes, &DecodeContext::default()).unwrap().unwrap();
            prop_assert_eq!(decoded, message);
        }

        #[test]
        fn agrees_with_pgwire_on_cancels(pid: i32, key in proptest::collection::vec(any::<u8>(), 4..=256)) {
            let message = CancelRequest::new(pid, SecretKey::Bytes(key.into()));
            let mut bytes = BytesMut::new();
            message.encode(&mut bytes).unwrap();
            prop_assert_eq!(read(&bytes), Ok(Progress::Packet(Packet::Cancel)));
        }

        #[test]
        fn whatever_is_a_startup_here_is_one_for_pgwire(mut body in proptest::collection::vec(any::<u8>(), 1..200)) {
            body.push(0);
            let bytes = request(body.len() as u32 + 8, 0x3_0000, &body);
            prop_assert_eq!(read(&bytes), Ok(Progress::Packet(Packet::Startup { minor: 0 })));
            prop_assert!(Startup::decode(&mut BytesMut::from(&bytes[..]), &DecodeContext::default()).is_ok());
        }
    }
}
