//! The PROXY protocol, versions 1 and 2: how a proxy tells the address of its client. Pure.
//!
//! As in `doc/proxy-protocol.txt` of HAProxy. [`read`] asks for bytes of the header and never for one behind it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use trunkline_config::router::ProxyVersion;

/// How version 2 begins.
const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
/// Signature, version and command, family, length.
const FIXED: usize = 16;
/// The longest body of version 2: addresses and all that proxies say beside them.
const MAX_BODY: usize = 4 << 10;

/// How version 1 begins.
const WORD: &[u8] = b"PROXY ";
/// The shortest line: `PROXY UNKNOWN\r\n`. Nothing can be said before so much is here.
const SHORTEST: usize = 15;
/// The longest line.
const LONGEST: usize = 107;

/// What a header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Header {
    /// Who has connected to whom; `None`: the proxy itself has, or it does not know.
    pub addresses: Option<(SocketAddr, SocketAddr)>,
}

/// What is known after the bytes so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Read exactly this many bytes more.
    Need(usize),
    /// The header is whole.
    Header(Header),
}

/// This is no header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a PROXY header is expected here")]
pub struct NoHeader;

/// Looks at the bytes collected so far.
///
/// # Errors
/// They can't be the beginning of a header.
pub fn read(bytes: &[u8]) -> Result<Progress, NoHeader> {
    if bytes.len() < SHORTEST {
        return Ok(Progress::Need(SHORTEST - bytes.len()));
    }
    match bytes.starts_with(WORD) {
        true => read_line(bytes),
        false if bytes.starts_with(SIGNATURE) => read_binary(bytes),
        false => Err(NoHeader),
    }
}

fn read_line(bytes: &[u8]) -> Result<Progress, NoHeader> {
    match bytes.iter().position(|byte| *byte == b'\n') {
        Some(end) if end + 1 == bytes.len() => {}
        Some(_) => return Err(NoHeader),
        None if bytes.len() >= LONGEST => return Err(NoHeader),
        // Behind a carriage return there is one byte more, otherwise there are at least two.
        None if bytes.last() == Some(&b'\r') => return Ok(Progress::Need(1)),
        None => return Ok(Progress::Need(2.min(LONGEST - bytes.len()))),
    }
    let line = bytes.strip_suffix(b"\r\n").and_then(|line| std::str::from_utf8(line).ok()).ok_or(NoHeader)?;
    let mut words = line.split(' ').skip(1);
    let addresses = match words.next() {
        Some("UNKNOWN") => None,
        Some("TCP4") => Some(line_addresses::<Ipv4Addr>(words)?),
        Some("TCP6") => Some(line_addresses::<Ipv6Addr>(words)?),
        _ => return Err(NoHeader),
    };
    Ok(Progress::Header(Header { addresses }))
}

fn line_addresses<'a, Ip: std::str::FromStr + Into<IpAddr>>(
    mut words: impl Iterator<Item = &'a str>,
) -> Result<(SocketAddr, SocketAddr), NoHeader> {
    let mut ip = || words.next()?.parse::<Ip>().ok().map(Into::into);
    let (from, to) = ip().zip(ip()).ok_or(NoHeader)?;
    let mut port = || words.next()?.parse::<u16>().ok();
    let (from_port, to_port) = port().zip(port()).ok_or(NoHeader)?;
    match words.next() {
        None => Ok((SocketAddr::new(from, from_port), SocketAddr::new(to, to_port))),
        Some(_) => Err(NoHeader),
    }
}

fn read_binary(bytes: &[u8]) -> Result<Progress, NoHeader> {
    let Some((head, body)) = bytes.split_first_chunk::<FIXED>() else {
        return Ok(Progress::Need(FIXED - bytes.len()));
    };
    let [.., command, family, high, low] = *head;
    let length = usize::from(u16::from_be_bytes([high, low]));
    if length > MAX_BODY || !matches!(command, 0x20 | 0x21) {
        return Err(NoHeader);
    }
    if body.len() < length {
        return Ok(Progress::Need(length - body.len()));
    }
    let addresses = match (command, family) {
        (0x20, _) => None,
        (_, 0x11) => Some(binary_addresses::<4>(body)?),
        (_, 0x21) => Some(binary_addresses::<16>(body)?),
        // Unix sockets and what is not known: there is no address to be had.
        _ => None,
    };
    Ok(Progress::Header(Header { addresses }))
}

fn binary_addresses<const N: usize>(body: &[u8]) -> Result<(SocketAddr, SocketAddr), NoHeader> {
    let (from, rest) = body.split_first_chunk::<N>().ok_or(NoHeader)?;
    let (to, rest) = rest.split_first_chunk::<N>().ok_or(NoHeader)?;
    let ([a, b, c, d], _) = rest.split_first_chunk::<4>().ok_or(NoHeader)?;
    let ip = |octets: &[u8; N]| match <[u8; 4]>::try_from(&octets[..]) {
        Ok(v4) => IpAddr::from(v4),
        Err(_) => IpAddr::from(<[u8; 16]>::try_from(&octets[..]).unwrap_or_default()),
    };
    Ok((SocketAddr::new(ip(from), u16::from_be_bytes([*a, *b])), SocketAddr::new(ip(to), u16::from_be_bytes([*c, *d]))))
}

/// A header that says who has connected to whom, or that this is not known.
pub fn write(version: ProxyVersion, addresses: Option<(SocketAddr, SocketAddr)>) -> Vec<u8> {
    let addresses = addresses.map(|(from, to)| one_family(from, to));
    match (version, addresses) {
        (ProxyVersion::V1, None) => b"PROXY UNKNOWN\r\n".to_vec(),
        (ProxyVersion::V1, Some((from, to))) => {
            let family = if from.is_ipv4() { "TCP4" } else { "TCP6" };
            format!("PROXY {family} {} {} {} {}\r\n", from.ip(), to.ip(), from.port(), to.port()).into_bytes()
        }
        (ProxyVersion::V2, None) => [&SIGNATURE[..], &[0x20, 0, 0, 0]].concat(),
        (ProxyVersion::V2, Some((from, to))) => {
            let octets = |ip: IpAddr| match ip {
                IpAddr::V4(v4) => v4.octets().to_vec(),
                IpAddr::V6(v6) => v6.octets().to_vec(),
            };
            let ports = [from.port().to_be_bytes(), to.port().to_be_bytes()].concat();
            let body = [octets(from.ip()), octets(to.ip()), ports].concat();
            let family = if from.is_ipv4() { 0x11 } else { 0x21 };
            [&SIGNATURE[..], &[0x21, family, 0, body.len() as u8], &body].concat()
        }
    }
}

/// Both as IPv4 where both can be, otherwise both as IPv6.
fn one_family(from: SocketAddr, to: SocketAddr) -> (SocketAddr, SocketAddr) {
    let plain = |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
    let (from, to) = (plain(from), plain(to));
    let v6 = |address: SocketAddr| match address.ip() {
        IpAddr::V4(v4) => SocketAddr::new(v4.to_ipv6_mapped().into(), address.port()),
        IpAddr::V6(_) => address,
    };
    if from.is_ipv4() == to.is_ipv4() { (from, to) } else { (v6(from), v6(to)) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn addresses(from: &str, to: &str) -> Option<(SocketAddr, SocketAddr)> {
        Some((from.parse().unwrap(), to.parse().unwrap()))
    }

    /// Gives exactly as much as is asked for; the header and how much of `bytes` it was.
    fn whole(bytes: &[u8]) -> Result<(Header, usize), NoHeader> {
        let mut have = 0;
        loop {
            match read(&bytes[..have])? {
                Progress::Header(header) => return Ok((header, have)),
                Progress::Need(more) if have + more <= bytes.len() => have += more,
                Progress::Need(_) => return Err(NoHeader),
            }
        }
    }

    #[test]
    fn headers() {
        let v2 = |command: u8, family: u8, body: &[u8]| {
            [&SIGNATURE[..], &[command, family], &(body.len() as u16).to_be_bytes(), body].concat()
        };
        let v4 = b"\x0a\0\0\x01\x0a\0\0\x02\x30\x39\x13\x88";
        for (bytes, expected) in [
            (b"PROXY UNKNOWN\r\n".to_vec(), Ok(None)),
            (b"PROXY UNKNOWN ffff::1 ::1 1 2\r\n".to_vec(), Ok(None)),
            (b"PROXY TCP4 10.0.0.1 10.0.0.2 12345 5000\r\n".to_vec(), Ok(addresses("10.0.0.1:12345", "10.0.0.2:5000"))),
            (b"PROXY TCP6 ::1 fe80::2 1 65535\r\n".to_vec(), Ok(addresses("[::1]:1", "[fe80::2]:65535"))),
            (v2(0x21, 0x11, v4), Ok(addresses("10.0.0.1:12345", "10.0.0.2:5000"))),
            (v2(0x21, 0x11, &[v4, &b"\x04\0\x01x"[..]].concat()), Ok(addresses("10.0.0.1:12345", "10.0.0.2:5000"))),
            (v2(0x20, 0, b""), Ok(None)),
            (v2(0x20, 0x11, v4), Ok(None)),
            (v2(0x21, 0x31, &[0; 216]), Ok(None)),
            (v2(0x21, 0x11, &v4[..11]), Err(NoHeader)),
            (v2(0x22, 0x11, v4), Err(NoHeader)),
            (v2(0x11, 0x11, v4), Err(NoHeader)),
            (v2(0x21, 0x11, &[0; 5_000]), Err(NoHeader)),
            (b"PROXY TCP4 ::1 ::1 1 2\r\n".to_vec(), Err(NoHeader)),
            (b"PROXY TCP4 10.0.0.1 10.0.0.2 12345 65536\r\n".to_vec(), Err(NoHeader)),
            (b"PROXY TCP4 10.0.0.1 10.0.0.2 12345 5000 6\r\n".to_vec(), Err(NoHeader)),
            (b"PROXY UDP4 10.0.0.1 10.0.0.2 12345 5000\r\n".to_vec(), Err(NoHeader)),
            (b"PROXY TCP4 10.0.0.1 10.0.0.2 1 2\n".to_vec(), Err(NoHeader)),
            ([&b"PROXY "[..], &[b'x'; 200]].concat(), Err(NoHeader)),
            (b"GET / HTTP/1.1\r\nHost: here\r\n\r\n".to_vec(), Err(NoHeader)),
        ] {
            let found = whole(&bytes).map(|(header, _)| header.addresses);
            assert_eq!(found, expected, "{}", String::from_utf8_lossy(&bytes));
        }
    }

    #[test]
    fn mixed_families_become_one() {
        let header = write(ProxyVersion::V1, addresses("10.0.0.1:1", "[::1]:2"));
        assert_eq!(header, b"PROXY TCP6 ::ffff:10.0.0.1 ::1 1 2\r\n");
        let header = write(ProxyVersion::V1, addresses("[::ffff:10.0.0.1]:1", "10.0.0.2:2"));
        assert_eq!(header, b"PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\n");
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_and_not_a_byte_more(
            from: SocketAddr, to: SocketAddr, known: bool, first: bool, behind in proptest::collection::vec(any::<u8>(), 0..50),
        ) {
            let strip = |address: SocketAddr| SocketAddr::new(address.ip(), address.port());
            let addresses = known.then(|| one_family(strip(from), strip(to)));
            let version = if first { ProxyVersion::V1 } else { ProxyVersion::V2 };
            let header = write(version, addresses);
            let stream = [header.clone(), behind].concat();
            prop_assert_eq!(whole(&stream), Ok((Header { addresses }, header.len())));
        }

        #[test]
        fn any_bytes_get_an_answer_and_needs_are_bounded(
            start in 0usize..3, bytes in proptest::collection::vec(any::<u8>(), 0..300),
        ) {
            let start = [&b""[..], b"PROXY TCP4 ", SIGNATURE][start];
            let bytes = [start, &bytes].concat();
            if let Ok(Progress::Need(more)) = read(&bytes) {
                prop_assert!(more > 0 && more <= MAX_BODY);
            }
        }
    }
}
