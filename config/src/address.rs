//! `host:port` as configuration files write it.

/// Splits at the last colon, as Patroni does; brackets of IPv6 addresses go away. The host may be a comma separated list.
/// Without a port `default_port` is taken, and where there is none either it is an error.
///
/// # Errors
/// What is expected, as a sentence.
pub fn split(text: &str, default_port: Option<u16>) -> Result<(String, u16), String> {
    let expected = || match default_port {
        Some(_) => "host or host:port is expected, with a port from 1 to 65535".to_owned(),
        None => "host:port is expected, with a port from 1 to 65535".to_owned(),
    };
    let text = text.trim();
    let (host, port) = match text.rsplit_once(':') {
        // An IPv6 address alone ends in its bracket, not in a port.
        Some(_) if text.ends_with(']') => (text, None),
        Some((host, port)) => (host, Some(port)),
        None => (text, None),
    };
    let port = match port {
        Some(port) => port.parse().ok().filter(|port| *port != 0).ok_or_else(expected)?,
        None => default_port.ok_or_else(expected)?,
    };
    let bare = |host: &str| host.trim().trim_start_matches('[').trim_end_matches(']').to_owned();
    let hosts: Vec<String> = host.split(',').map(bare).collect();
    let fits = |host: &String| !host.is_empty() && !host.contains(|c: char| c.is_whitespace() || c == '/' || c == '@');
    if !hosts.iter().all(fits) {
        return Err(expected());
    }
    Ok((hosts.join(","), port))
}

/// Joins them again, with brackets where the host has colons.
pub fn join(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

/// A host that others cannot use to come here.
pub(crate) fn is_local_only(host: &str) -> bool {
    matches!(host, "127.0.0.1" | "0.0.0.0" | "*" | "::1" | "::" | "localhost")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table() {
        let cases = [
            ("127.0.0.1:5400", Some(("127.0.0.1", 5400))),
            ("127.0.0.1", Some(("127.0.0.1", 5432))),
            ("*:5433", Some(("*", 5433))),
            ("127.0.0.1,192.168.0.101:5400", Some(("127.0.0.1,192.168.0.101", 5400))),
            ("[::1]:5400", Some(("::1", 5400))),
            ("[::1]", Some(("::1", 5432))),
            ("127.0.0.1,[fe80::1], 0:0::0:5400", Some(("127.0.0.1,fe80::1,0:0::0", 5400))),
            (":5432", None),
            ("host:", None),
            ("host:0", None),
            ("host:65536", None),
            ("host:x", None),
            ("", None),
            ("http://host:1", None),
        ];
        for (text, expected) in cases {
            let expected = expected.map(|(host, port)| (host.to_owned(), port));
            assert_eq!(split(text, Some(5432)).ok(), expected, "{text}");
        }
        assert!(split("host", None).is_err());
        assert_eq!(join("::1", 1), "[::1]:1");
        assert_eq!(join("h", 1), "h:1");
    }
}
