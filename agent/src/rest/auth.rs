//! Who may send unsafe requests (rest-api §1.2): address, then certificate, then password.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use axum::http::{HeaderMap, HeaderValue, header};
use trunkline_common::ClusterView;

use super::answer::Answer;
use super::policy::{Allowed, Policy, in_network};

/// Where a request came from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Caller {
    /// The other end of the connection.
    pub address: SocketAddr,
    /// It showed a certificate, and TLS found it good.
    pub certificate: bool,
}

/// How long looking up one host name of the allowlist may take.
const LOOKUP_LIMIT: Duration = Duration::from_secs(2);

/// Lets an unsafe request pass, or answers it. `members`: the cluster whose members count as allowed, where it is known
/// and the endpoint lets them (`POST /failsafe` doesn't: it comes when the DCS is lost).
pub(crate) async fn check(
    policy: &Policy,
    caller: Caller,
    headers: &HeaderMap,
    members: Option<&ClusterView>,
    members_count: bool,
) -> Result<(), Answer> {
    let members_count = members_count && policy.members_allowed;
    if !policy.allowlist.is_empty() || members_count {
        let members = members.filter(|_| members_count);
        if !address_allowed(policy, caller.address.ip(), members).await {
            return Err(Answer::text(403, "this address may not do that"));
        }
    }
    if policy.needs_certificate && !caller.certificate {
        return Err(Answer::text(403, "a client certificate is required for that"));
    }
    let Some(expected) = &policy.credentials else { return Ok(()) };
    let challenge = |sentence: &str| {
        let realm = HeaderValue::from_static("Basic realm=\"Patroni\"");
        Answer::text(401, sentence).with_header(header::WWW_AUTHENTICATE, realm)
    };
    let Some(given) = headers.get(header::AUTHORIZATION) else {
        return Err(challenge("user name and password are required for that"));
    };
    match given.as_bytes().strip_prefix(b"Basic ") {
        Some(given) if equal(given, expected) => Ok(()),
        _ => Err(challenge("wrong user name or password")),
    }
}

async fn address_allowed(policy: &Policy, address: IpAddr, members: Option<&ClusterView>) -> bool {
    let mut hosts: Vec<String> = Vec::new();
    for entry in &policy.allowlist {
        match entry {
            Allowed::Network(network, length) if in_network(address, *network, *length) => return true,
            Allowed::Network(..) => {}
            Allowed::Host(host) => hosts.push(host.clone()),
        }
    }
    let urls = members.into_iter().flat_map(|view| view.members.values()).filter_map(|m| m.api_url.as_deref());
    hosts.extend(urls.filter_map(host_of).map(|(host, _)| host));
    hosts.dedup();
    let lookups = hosts.iter().map(|host| resolves_to(host, address));
    futures::future::join_all(lookups).await.contains(&true)
}

async fn resolves_to(host: &str, address: IpAddr) -> bool {
    if let Ok(literal) = host.parse::<IpAddr>() {
        return literal.to_canonical() == address.to_canonical();
    }
    match tokio::time::timeout(LOOKUP_LIMIT, tokio::net::lookup_host((host, 0))).await {
        Ok(Ok(mut found)) => found.any(|found| found.ip().to_canonical() == address.to_canonical()),
        Ok(Err(error)) => {
            tracing::warn!(host, %error, "allowlist: the name can't be looked up");
            false
        }
        Err(_) => {
            tracing::warn!(host, "allowlist: looking up the name took too long");
            false
        }
    }
}

/// Host and port of an `http(s)://` URL.
pub(crate) fn host_of(url: &str) -> Option<(String, u16)> {
    let uri: axum::http::Uri = url.parse().ok()?;
    uri.scheme()?;
    let host = uri.host()?.trim_start_matches('[').trim_end_matches(']');
    let port = uri.port_u16().unwrap_or(if uri.scheme_str() == Some("https") { 443 } else { 80 });
    Some((host.to_owned(), port))
}

/// Compares in a time that depends on the lengths only.
fn equal(given: &[u8], expected: &[u8]) -> bool {
    let differences = given.iter().zip(expected).fold(0u8, |all, (a, b)| std::hint::black_box(all | (a ^ b)));
    given.len() == expected.len() && differences == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equality() {
        for (a, b) in [("", ""), ("abc", "abc"), ("abc", "abd"), ("abc", "ab"), ("", "a")] {
            assert_eq!(equal(a.as_bytes(), b.as_bytes()), a == b);
        }
    }

    #[test]
    fn hosts_of_urls() {
        for (url, expected) in [
            ("http://10.0.0.1:8008/patroni", Some(("10.0.0.1", 8008))),
            ("https://[::1]/patroni", Some(("::1", 443))),
            ("nonsense", None),
            ("", None),
        ] {
            assert_eq!(host_of(url), expected.map(|(host, port)| (host.to_owned(), port)), "{url}");
        }
    }
}
