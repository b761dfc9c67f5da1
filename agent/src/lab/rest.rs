//! One HTTP request to a server of the lab, with a deadline.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

/// An answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The body: JSON, or a string if it is none.
    pub body: Value,
}

/// How long an ordinary request may take.
const LIMIT: Duration = Duration::from_secs(3);

/// Where a server of the lab listens: a port of `127.0.0.1`, or any address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address(SocketAddrV4);

impl From<u16> for Address {
    fn from(port: u16) -> Self {
        Self(SocketAddrV4::new(Ipv4Addr::LOCALHOST, port))
    }
}

impl From<SocketAddrV4> for Address {
    fn from(address: SocketAddrV4) -> Self {
        Self(address)
    }
}

/// `GET http://<address><path>`.
///
/// # Errors
/// No answer within three seconds.
pub async fn get(address: impl Into<Address>, path: &str) -> Result<Answer> {
    send(client()?.get(url(address.into(), path)).timeout(LIMIT)).await
}

/// `POST` with a JSON body. Switchovers and restarts are answered when they are done, so the caller says how long.
///
/// # Errors
/// No answer within `limit`.
pub async fn post(address: impl Into<Address>, path: &str, body: &Value, limit: Duration) -> Result<Answer> {
    send(client()?.post(url(address.into(), path)).json(body).timeout(limit)).await
}

/// `PATCH` with a JSON body.
///
/// # Errors
/// No answer within three seconds.
pub async fn patch(address: impl Into<Address>, path: &str, body: &Value) -> Result<Answer> {
    send(client()?.patch(url(address.into(), path)).json(body).timeout(LIMIT)).await
}

/// `DELETE`.
///
/// # Errors
/// No answer within three seconds.
pub async fn delete(address: impl Into<Address>, path: &str) -> Result<Answer> {
    send(client()?.delete(url(address.into(), path)).timeout(LIMIT)).await
}

fn url(Address(address): Address, path: &str) -> String {
    format!("http://{address}{path}")
}

async fn send(request: reqwest::RequestBuilder) -> Result<Answer> {
    let response = request.send().await?;
    let status = response.status().as_u16();
    let text = response.text().await?;
    Ok(Answer { status, body: serde_json::from_str(&text).unwrap_or(Value::String(text)) })
}

/// No kept connections: the server behind a port is killed and started again all the time here.
fn client() -> Result<&'static reqwest::Client> {
    static CLIENT: OnceLock<Option<reqwest::Client>> = OnceLock::new();
    let build = || {
        // Somebody else may have installed one already: either is fine for plain HTTP.
        let _ = rustls::crypto::ring::default_provider().install_default();
        reqwest::Client::builder().no_proxy().pool_max_idle_per_host(0).build().ok()
    };
    CLIENT.get_or_init(build).as_ref().context("no HTTP client")
}
