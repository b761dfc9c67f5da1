//! The second source of knowledge: the leader's own word, over its REST API.
//!
//! Asked only while the DCS is silent. `GET /primary` answers 200 to whoever holds the leader lock, which may be a little
//! before its promotion is complete; the body's `role` says when it is (rest-api §7).

use std::io;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// The longest answer that is read.
const ANSWER: u64 = 64 << 10;

/// Whether the member behind `api_url` says that it is the primary; otherwise why that is not known, in words.
pub async fn is_primary(api_url: &str, limit: Duration) -> Result<(), String> {
    let (host, port) = address(api_url)?;
    let exchange = async {
        let mut stream = TcpStream::connect((host, port)).await?;
        let request = format!("GET /primary HTTP/1.0\r\nHost: {host}\r\nAccept: application/json\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        stream.take(ANSWER).read_to_end(&mut answer).await?;
        io::Result::Ok(answer)
    };
    match tokio::time::timeout(limit, exchange).await {
        Ok(Ok(answer)) => judge(&answer),
        Ok(Err(error)) => Err(format!("no answer: {error}")),
        Err(_) => Err("no answer in time".into()),
    }
}

fn address(api_url: &str) -> Result<(&str, u16), String> {
    let Some((scheme, rest)) = api_url.split_once("://") else { return Err("api_url is no URL".into()) };
    if scheme != "http" {
        return Err(format!("{scheme} can't be asked"));
    }
    let authority = rest.split('/').next().unwrap_or(rest);
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, port.parse().map_err(|_| "api_url has no valid port")?),
        _ => (authority, 80),
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    if host.is_empty() { Err("api_url has no host".into()) } else { Ok((host, port)) }
}

fn judge(answer: &[u8]) -> Result<(), String> {
    let text = String::from_utf8_lossy(answer);
    let (head, body) = text.split_once("\r\n\r\n").ok_or("the answer is not HTTP")?;
    let status = head.split_ascii_whitespace().nth(1).unwrap_or("none");
    if !head.starts_with("HTTP/") || status != "200" {
        return Err(format!("it answers with status {status}"));
    }
    let body: Value = serde_json::from_str(body).map_err(|_| "the answer is not JSON")?;
    match body.get("role").and_then(Value::as_str) {
        Some("primary" | "master") => Ok(()),
        role => Err(format!("its role is {}", role.unwrap_or("unknown"))),
    }
}

#[cfg(test)]
mod tests {
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
            ("HTTP/1.0 503 Service Unavailable\r\n\r\n{\"role\":\"primary\"}", false),
            ("SSH-2.0 200\r\n\r\n{\"role\":\"primary\"}", false),
            ("", false),
        ] {
            assert_eq!(judge(answer.as_bytes()).is_ok(), proven, "{answer}");
        }
    }

    #[test]
    fn urls() {
        for (url, expected) in [
            ("http://10.0.0.1:8008/patroni", Ok(("10.0.0.1", 8008))),
            ("http://[::1]:8008/patroni", Ok(("::1", 8008))),
            ("http://node", Ok(("node", 80))),
            ("https://node:8008/patroni", Err("https can't be asked".to_owned())),
            ("node:8008", Err("api_url is no URL".to_owned())),
            ("http:///patroni", Err("api_url has no host".to_owned())),
        ] {
            assert_eq!(address(url), expected);
        }
    }

    #[tokio::test]
    async fn asks_a_server_and_does_not_wait_for_ever() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/patroni", listener.local_addr().unwrap());
        let silent = is_primary(&url, Duration::from_millis(50)).await;
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
        assert_eq!(is_primary(&url, Duration::from_secs(5)).await, Ok(()));
        assert!(served.await.unwrap().starts_with(b"GET /primary HTTP/1.0\r\n"));
    }
}
