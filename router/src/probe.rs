//! The second source of knowledge: the members' own word, over their REST APIs.
//!
//! `GET /primary` answers 200 to whoever holds the leader lock, which may be a little before its promotion is complete; the
//! body's `role` says when it is (rest-api §7).

use std::io;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;
use trunkline_common::Lsn;
use trunkline_common::tls::{self, TlsError, Verify};
use trunkline_config::local::Ctl;

use crate::names::Names;
use crate::socket::{self, FirstBytes};

/// The longest answer that is read.
const ANSWER: u64 = 64 << 10;

/// Asks members whether they lead.
pub trait Probe {
    /// Whether the member behind `api_url` says that it is the primary.
    ///
    /// # Errors
    /// It says nothing; why, in words.
    fn is_primary(&self, api_url: &str, limit: Duration) -> impl Future<Output = Result<bool, String>> + Send;
}

/// Asks members over HTTP. Without TLS settings those with `https` URLs can't be asked.
#[derive(Clone, Default)]
pub struct Prober {
    tls: Option<TlsConnector>,
    names: Arc<Names>,
}

impl std::fmt::Debug for Prober {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Prober").field("tls", &self.tls.is_some()).finish()
    }
}

impl Prober {
    /// With the certificates of the `ctl` section: servers are verified, unless `insecure` says not to.
    ///
    /// # Errors
    /// A file can't be used.
    pub fn new(ctl: &Ctl) -> Result<Self, TlsError> {
        let verify = match (ctl.insecure, &ctl.certfile) {
            (false, _) => Verify::Full,
            (true, Some(_)) => Verify::Chain,
            (true, None) => Verify::Nothing,
        };
        let (ca, certificate) = (ctl.cacert.as_deref(), ctl.certfile.as_deref());
        let config = tls::client_config(ca, certificate, ctl.keyfile.as_deref(), verify)?;
        Ok(Self { tls: Some(TlsConnector::from(Arc::clone(&config))), names: Arc::default() })
    }

    /// The leader's last position, or the one up to which a standby has replayed.
    ///
    /// # Errors
    /// It says none; why, in words.
    pub async fn position(&self, api_url: &str, limit: Duration) -> Result<Lsn, String> {
        position(&self.get(api_url, "/patroni", limit).await?)
    }

    async fn get(&self, api_url: &str, path: &str, limit: Duration) -> Result<Vec<u8>, String> {
        let (secure, host, port) = address(api_url)?;
        let exchange = async {
            let stream = socket::dial(&self.names, host, port, limit, None, FirstBytes::AtOnce).await?;
            match (secure, &self.tls) {
                (false, _) => exchange(stream, host, path).await,
                (true, Some(tls)) => {
                    let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
                    exchange(tls.connect(name, stream).await?, host, path).await
                }
                (true, None) => Err(io::Error::other("no TLS is configured")),
            }
        };
        match tokio::time::timeout(limit, exchange).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(format!("no answer: {error}")),
            Err(_) => Err("no answer in time".into()),
        }
    }
}

impl Probe for Prober {
    async fn is_primary(&self, api_url: &str, limit: Duration) -> Result<bool, String> {
        judge(&self.get(api_url, "/primary", limit).await?)
    }
}

async fn exchange(mut stream: impl AsyncRead + AsyncWrite + Unpin, host: &str, path: &str) -> io::Result<Vec<u8>> {
    let request = format!("GET {path} HTTP/1.0\r\nHost: {host}\r\nAccept: application/json\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    stream.flush().await?;
    let mut answer = Vec::new();
    match stream.take(ANSWER).read_to_end(&mut answer).await {
        // Many servers end TLS without saying so; what they said before counts.
        Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => Err(error),
        _ => Ok(answer),
    }
}

/// Whether by TLS, host and port.
fn address(api_url: &str) -> Result<(bool, &str, u16), String> {
    let Some((scheme, rest)) = api_url.split_once("://") else { return Err("api_url is no URL".into()) };
    let secure = match scheme {
        "http" => false,
        "https" => true,
        _ => return Err(format!("{scheme} can't be asked")),
    };
    let authority = rest.split('/').next().unwrap_or(rest);
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, port.parse().map_err(|_| "api_url has no valid port")?),
        _ => (authority, if secure { 443 } else { 80 }),
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    if host.is_empty() { Err("api_url has no host".into()) } else { Ok((secure, host, port)) }
}

fn judge(answer: &[u8]) -> Result<bool, String> {
    let (status, body) = parts(answer)?;
    match status.as_str() {
        "200" => {}
        "503" => return Ok(false),
        // That is somebody else's answer.
        other => return Err(format!("it answers {other}")),
    }
    let role = body?.get("role").and_then(Value::as_str).map(str::to_owned);
    Ok(matches!(role.as_deref(), Some("primary" | "master")))
}

fn position(answer: &[u8]) -> Result<Lsn, String> {
    let (_, body) = parts(answer)?;
    let xlog = body?.get("xlog").cloned().ok_or("it knows no position")?;
    let known = |key: &str| xlog.get(key).and_then(Value::as_u64).map(Lsn).filter(|lsn| lsn.is_valid());
    known("location").or_else(|| known("replayed_location")).ok_or_else(|| "it knows no position".into())
}

/// Status and body.
fn parts(answer: &[u8]) -> Result<(String, Result<Value, String>), String> {
    let text = String::from_utf8_lossy(answer);
    let (head, body) = text.split_once("\r\n\r\n").ok_or("the answer is not HTTP")?;
    if !head.starts_with("HTTP/") {
        return Err("the answer is not HTTP".to_owned());
    }
    let status = head.split_ascii_whitespace().nth(1).unwrap_or("none").to_owned();
    Ok((status, serde_json::from_str(body).map_err(|_| "the answer is not JSON".to_owned())))
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::net::TcpListener;

    use super::*;

    #[test]
    fn only_200_with_the_role_of_a_primary_is_a_proof() {
        for (answer, proven) in [
            ("HTTP/1.0 200 OK\r\nServer: x\r\n\r\n{\"state\":\"running\",\"role\":\"primary\"}", true),
            ("HTTP/1.0 200 OK\r\n\r\n{\"role\": \"master\"}", true),
            ("HTTP/1.0 200 OK\r\n\r\n{\"role\":\"replica\"}", false),
            ("HTTP/1.0 200 OK\r\n\r\n{\"role\":\"promoted\"}", false),
            ("HTTP/1.0 200 OK\r\n\r\n", false),
            ("HTTP/1.1 502 Bad Gateway\r\n\r\n", false),
            ("HTTP/1.0 503 Service Unavailable\r\n\r\n{\"role\":\"primary\"}", false),
            ("SSH-2.0 200\r\n\r\n{\"role\":\"primary\"}", false),
            ("", false),
        ] {
            assert_eq!(judge(answer.as_bytes()) == Ok(true), proven, "{answer}");
        }
        assert_eq!(judge(b"HTTP/1.0 503 Service Unavailable\r\n\r\n"), Ok(false));
        assert!(judge(b"HTTP/1.1 502 Bad Gateway\r\n\r\n").is_err(), "something in between says nothing of the member");
    }

    #[test]
    fn positions() {
        for (answer, expected) in [
            (r#"{"xlog": {"location": 67108960}}"#, Some(67_108_960)),
            (r#"{"xlog": {"received_location": 90, "replayed_location": 80, "paused": false}}"#, Some(80)),
            (r#"{"xlog": {"received_location": 90, "replayed_location": 0}}"#, None),
            (r#"{"state": "starting"}"#, None),
            (r#"{"xlog": {"location": -1}}"#, None),
        ] {
            let answer = format!("HTTP/1.0 503 whatever its role\r\n\r\n{answer}");
            assert_eq!(position(answer.as_bytes()).ok(), expected.map(Lsn), "{answer}");
        }
    }

    #[test]
    fn urls() {
        for (url, expected) in [
            ("http://10.0.0.1:8008/patroni", Ok((false, "10.0.0.1", 8008))),
            ("http://[::1]:8008/patroni", Ok((false, "::1", 8008))),
            ("http://node", Ok((false, "node", 80))),
            ("https://node/patroni", Ok((true, "node", 443))),
            ("ftp://node/", Err("ftp can't be asked".to_owned())),
            ("node:8008", Err("api_url is no URL".to_owned())),
            ("http:///patroni", Err("api_url has no host".to_owned())),
        ] {
            assert_eq!(address(url), expected);
        }
    }

    #[tokio::test]
    async fn a_member_is_asked_also_where_its_name_is_not_resolved_any_more() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://member:{}/patroni", listener.local_addr().unwrap().port());
        let asked = AtomicUsize::new(0);
        let resolve = move |_: &str| match asked.fetch_add(1, Ordering::Relaxed) {
            0 => Ok(vec![SocketAddr::from(([127, 0, 0, 1], 0))]),
            _ => Err(io::Error::other("the resolver is down")),
        };
        let names = Arc::new(Names::new(Duration::ZERO, resolve));
        let prober = Prober { names, ..Prober::default() };
        for _ in 0..2 {
            let answers = async {
                let (mut stream, _) = listener.accept().await.unwrap();
                let _ = stream.read(&mut [0; 1024]).await.unwrap();
                stream.write_all(b"HTTP/1.0 200 OK\r\n\r\n{\"role\":\"primary\"}").await.unwrap();
            };
            let asks = prober.is_primary(&url, Duration::from_secs(5));
            assert_eq!(tokio::join!(asks, answers).0, Ok(true));
        }
    }

    #[tokio::test]
    async fn asks_a_server_and_does_not_wait_for_ever() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/patroni", listener.local_addr().unwrap());
        let silent = Prober::default().is_primary(&url, Duration::from_millis(50)).await;
        assert_eq!(silent, Err("no answer in time".into()));
        let served = tokio::spawn(async move {
            // The first connection is the one that was not answered.
            let _unanswered = listener.accept().await.unwrap();
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = vec![0; 1024];
            let read = stream.read(&mut request).await.unwrap();
            request.truncate(read);
            stream.write_all(b"HTTP/1.0 200 OK\r\n\r\n{\"role\":\"primary\"}").await.unwrap();
            request
        });
        assert_eq!(Prober::default().is_primary(&url, Duration::from_secs(5)).await, Ok(true));
        assert!(served.await.unwrap().starts_with(b"GET /primary HTTP/1.0\r\n"));
    }
}
