//! What the file says about the API itself: where it listens, with which certificate, who may do what. Read at the start
//! and again on every reload; a request sees one of these from beginning to end.

use std::net::IpAddr;
use std::sync::Arc;

use axum::http::{HeaderName, HeaderValue};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use rustls::ServerConfig;
use trunkline_config::Local;
use trunkline_config::local::{RestApi, VerifyClient};

use super::RestError;

/// One reading of the `restapi` section.
#[derive(Debug, Clone)]
pub(crate) struct Policy {
    /// `host:port`.
    pub listen: String,
    /// Present: TLS.
    pub tls: Option<Arc<ServerConfig>>,
    /// Unsafe requests need a client certificate (TLS only).
    pub needs_certificate: bool,
    /// What `Authorization: Basic` must be followed by.
    pub credentials: Option<Vec<u8>>,
    /// Who may send unsafe requests; empty and without members: everybody.
    pub allowlist: Vec<Allowed>,
    /// The members' addresses may, too.
    pub members_allowed: bool,
    /// Headers of every normal response.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// The `Server` header.
    pub server: HeaderValue,
}

/// An entry of the allowlist.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Allowed {
    /// A network; an address is one of full length.
    Network(IpAddr, u8),
    /// A name, looked up when it matters: addresses change.
    Host(String),
}

impl Policy {
    /// Reads the section and the certificate files it names.
    pub fn read(local: &Local) -> Result<Self, RestError> {
        let section = &local.restapi;
        let tls = tls_config(local)?;
        Ok(Self {
            listen: section.listen.clone(),
            needs_certificate: tls.is_some() && section.verify_client != VerifyClient::None,
            credentials: section
                .authentication
                .as_ref()
                .map(|(user, password)| BASE64_STANDARD.encode(format!("{user}:{}", password.reveal())).into_bytes()),
            allowlist: section.allowlist.iter().map(|entry| Allowed::parse(entry)).collect(),
            members_allowed: section.allowlist_include_members,
            headers: extra_headers(section, tls.is_some())?,
            server: server_header(local),
            tls,
        })
    }
}

impl Allowed {
    /// An address, a network in CIDR notation, or else a host name.
    pub fn parse(entry: &str) -> Self {
        let entry = entry.trim();
        let (address, length) =
            entry.split_once('/').map_or((entry, None), |(address, length)| (address, Some(length)));
        let Ok(address) = address.parse::<IpAddr>() else { return Self::Host(entry.to_owned()) };
        let full = if address.is_ipv4() { 32 } else { 128 };
        match length.map(str::parse) {
            None => Self::Network(address, full),
            Some(Ok(length)) if length <= full => Self::Network(address, length),
            Some(_) => Self::Host(entry.to_owned()),
        }
    }
}

/// Whether `address` is in the network.
pub(crate) fn in_network(address: IpAddr, network: IpAddr, length: u8) -> bool {
    fn same_prefix<const N: usize>(a: [u8; N], b: [u8; N], length: u8) -> bool {
        let whole = usize::from(length / 8);
        let rest = length % 8;
        let mask = !(0xFFu16 >> rest) as u8;
        a[..whole] == b[..whole] && (rest == 0 || a[whole] & mask == b[whole] & mask)
    }
    match (address.to_canonical(), network.to_canonical()) {
        (IpAddr::V4(a), IpAddr::V4(b)) => same_prefix(a.octets(), b.octets(), length),
        (IpAddr::V6(a), IpAddr::V6(b)) => same_prefix(a.octets(), b.octets(), length),
        _ => false,
    }
}

fn tls_config(local: &Local) -> Result<Option<Arc<ServerConfig>>, RestError> {
    let section = &local.restapi;
    let Some(certfile) = &section.certfile else { return Ok(None) };
    let bad = |error: trunkline_common::tls::TlsError| RestError::Tls(error.to_string());
    let config = trunkline_common::tls::server_config(
        certfile,
        section.keyfile.as_deref(),
        section.cafile.as_deref(),
        section.verify_client,
    );
    config.map(Some).map_err(bad)
}

fn extra_headers(section: &RestApi, tls: bool) -> Result<Vec<(HeaderName, HeaderValue)>, RestError> {
    let https = section.https_extra_headers.iter().filter(|_| tls);
    let header = |(name, value): &(String, String)| {
        let parsed = HeaderName::try_from(name.as_str()).ok().zip(HeaderValue::try_from(value.as_str()).ok());
        parsed.ok_or_else(|| RestError::BadHeader(name.clone()))
    };
    section.http_extra_headers.iter().chain(https).map(header).collect()
}

/// `restapi.server_tokens` decides how much of itself the server tells.
fn server_header(local: &Local) -> HeaderValue {
    let tokens = local.raw.pointer("/restapi/server_tokens").and_then(|value| value.as_str()).unwrap_or("original");
    match tokens.to_ascii_lowercase().as_str() {
        "productonly" => HeaderValue::from_static("Trunkline"),
        _ => HeaderValue::from_static(concat!("Trunkline/", env!("CARGO_PKG_VERSION"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn allowlist_entries() {
        let table = [
            ("10.1.2.3", Allowed::Network("10.1.2.3".parse().unwrap(), 32)),
            ("10.0.0.0/8", Allowed::Network("10.0.0.0".parse().unwrap(), 8)),
            ("fe80::/10", Allowed::Network("fe80::".parse().unwrap(), 10)),
            ("db1.example", Allowed::Host("db1.example".to_owned())),
            ("10.0.0.0/99", Allowed::Host("10.0.0.0/99".to_owned())),
        ];
        for (entry, expected) in table {
            assert_eq!(Allowed::parse(entry), expected);
        }
    }

    #[test]
    fn networks_contain_addresses() {
        let table = [
            ("10.1.2.3", "10.0.0.0", 8, true),
            ("11.1.2.3", "10.0.0.0", 8, false),
            ("10.1.2.3", "10.1.2.0", 31, false),
            ("10.1.2.3", "10.1.2.2", 31, true),
            ("10.1.2.3", "0.0.0.0", 0, true),
            ("::ffff:10.1.2.3", "10.1.2.3", 32, true),
            ("10.1.2.3", "::", 0, false),
            ("fe80::1", "fe80::", 10, true),
        ];
        for (address, network, length, expected) in table {
            let inside = in_network(address.parse().unwrap(), network.parse().unwrap(), length);
            assert_eq!(inside, expected, "{address} in {network}/{length}");
        }
    }
}
