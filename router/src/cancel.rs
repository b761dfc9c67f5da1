//! CancelRequests: a connection of its own that names a session by process id and a secret, and wants no answer.
//!
//! Where the session started in plain text through this router, its key has been seen, and with it its server. Otherwise (TLS
//! between client and server, a session of another router) the request is given to every server that may have the
//! session: one that doesn't know the pair ignores it, which is why trying costs nothing but connects — and those are
//! limited.

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tracing::debug;
use trunkline_common::{Clock, Instant};
use trunkline_config::router::Port;

use crate::crypto::Crypto;
use crate::port::Listening;
use crate::router::Router;
use crate::socket::FirstBytes;
use crate::table::Backend;
use crate::wire::{Leg, Wire};
use crate::{rule, socket, startup};

/// How many servers one request is tried on.
const SERVERS: usize = 64;

/// How long the server of a session may take to act on a request, which it does before it closes. Where all are asked that may have
/// the session, each has `connect_timeout`: those that don't have it need no longer, and one of them may be frozen.
const ANSWER: Duration = Duration::from_secs(5);

/// Passes `packet` on, and returns when the servers have acted on it: libpq takes the end of its connection for that.
pub async fn forward(
    router: &Router,
    listening: &Listening,
    port: &Port,
    crypto: &Crypto,
    greeting: &[u8],
    packet: &[u8],
) -> &'static str {
    if let Some(server) = startup::cancel_key(packet).and_then(|key| router.sessions.holder(key)) {
        send(router, port, crypto, &server, greeting, packet, ANSWER).await;
        return count(router, listening, "known");
    }
    let mut servers = rule::possible(&router.table(), port);
    for known in router.sessions.backends_of(&listening.name) {
        if !servers.iter().any(|server| server.host == known.host && server.port == known.port) {
            servers.push(known);
        }
    }
    servers.truncate(SERVERS);
    let result = match servers.len() {
        0 => "no_server",
        count if !router.cancels.allow(count, router.limits().cancel_rate, router.clock.now()) => "limited",
        _ => {
            let limit = port.connect_timeout.min(ANSWER);
            join_all(servers.iter().map(|server| send(router, port, crypto, server, greeting, packet, limit))).await;
            "forwarded"
        }
    };
    count(router, listening, result)
}

fn count(router: &Router, listening: &Listening, result: &'static str) -> &'static str {
    router.metrics.cancels.with_label_values(&[&*listening.name, result]).inc();
    result
}

async fn send(
    router: &Router,
    port: &Port,
    crypto: &Crypto,
    server: &Arc<Backend>,
    greeting: &[u8],
    packet: &[u8],
    limit: Duration,
) {
    let exchange = async {
        let (connect, silence) = (port.connect_timeout, port.server_silence);
        let stream =
            socket::dial(&router.names, &server.host, server.port, connect, silence, FirstBytes::AtOnce).await?;
        let stream = Arc::new(stream);
        socket::write_all(&stream, greeting).await?;
        let plain = || Leg::Plain(Wire::new(stream.clone(), Vec::new()));
        let mut stream = crypto.connect(port, &stream, &server.host).await?.map_or_else(plain, Leg::Tls);
        stream.write_all(packet).await?;
        stream.flush().await?;
        // Nothing is expected but the end; one byte is enough to see it.
        stream.read(&mut [0]).await
    };
    match tokio::time::timeout(limit, exchange).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => debug!(member = %server.member, %error, "cancel request not delivered"),
        Err(_) => debug!(member = %server.member, "cancel request not answered"),
    }
}

/// A token bucket over all ports, two seconds deep.
#[derive(Debug, Default)]
pub struct CancelLimit {
    spent: Mutex<(f64, Instant)>,
}

impl CancelLimit {
    /// Whether `count` requests may be sent now, at `rate` per second.
    pub fn allow(&self, count: usize, rate: u32, now: Instant) -> bool {
        let mut spent = self.spent.lock();
        let rate = f64::from(rate);
        let refilled = now.since(spent.1).as_secs_f64() * rate;
        let left = (spent.0 - refilled).max(0.0);
        let after = left + count as f64;
        // One that goes to more servers than that is sent when nothing else has been.
        let allowed = after <= 2.0 * rate || left == 0.0;
        *spent = (if allowed { after } else { left }, now);
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_allowed_and_then_a_rate() {
        let limit = CancelLimit::default();
        let at = |millis: u64| Instant::from_boot(Duration::from_millis(1_000_000 + millis));
        let allowed = (0..300).filter(|_| limit.allow(1, 100, at(0))).count();
        assert_eq!(allowed, 200);
        let allowed = (0..300).filter(|_| limit.allow(1, 100, at(500))).count();
        assert_eq!(allowed, 50);
        assert!(!limit.allow(3, 100, at(510)));
        assert!(limit.allow(1, 100, at(510)), "a refusal costs nothing");
        assert!(limit.allow(500, 100, at(60_000)), "more servers than a burst");
    }
}
