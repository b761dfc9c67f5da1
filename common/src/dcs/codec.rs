//! Patroni's values.

/// Host and port of a `postgres://` URL; the port defaults to 5432, brackets of IPv6 are removed.
pub fn host_port(url: &str) -> Option<(String, u16)> {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let authority = rest.split(['/', '?']).next()?;
    let authority = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, port.parse().ok()?),
        _ => (authority, 5432),
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    (!host.is_empty()).then(|| (host.to_owned(), port))
}

/// Compact JSON as Python's `json.dumps(…, separators=(',', ':'))` writes it: non-ASCII characters as `\uXXXX`.
pub fn compact(_value: &serde_json::Value) -> Vec<u8> {
    todo!()
}

/// Reads a snapshot as a cluster. A malformed value is logged once with its key, and what `previous` had for it stays.
pub fn view(
    _paths: &super::paths::Paths,
    _snapshot: &super::Snapshot,
    _previous: Option<&crate::ClusterView>,
) -> crate::ClusterView {
    todo!()
}
