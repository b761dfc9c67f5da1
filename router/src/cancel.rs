//! CancelRequests: a connection of its own that names a session by process id and a secret, and wants no answer.
//!
//! Where the session started in plain text through this router, its key has been seen, and with it its server. Otherwise (TLS
//! between client and server, a session of another router) the request is given to every server that may have the
//! session: one that doesn't know the pair ignores it, which is why trying costs nothing but connects — and those are
//! limited.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tracing::debug;
use trunkline_common::{Clock, Instant};
use trunkline_config::router::Port;

use crate::crypto::Crypto;
use crate::port::{Listening, Peer};
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

/// Passes `packet` of `client` on, and returns when the servers have acted on it: libpq takes the end of its connection for that.
pub async fn forward(
    router: &Router,
    listening: &Listening,
    port: &Port,
    crypto: &Crypto,
    client: Peer,
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
        count if !router.cancels.allow(client.ip(), count, router.limits().cancel_rate, router.clock.now()) => {
            "limited"
        }
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

/// How long ago a client's last request may be for it to be one that has been served lately, and how deep the bucket is.
const LATELY: Duration = Duration::from_secs(2);

/// A token bucket over all ports, [`LATELY`] deep. What is last in it, a quarter, is for clients that have not been served lately: one that sends
/// wrong keys does not use it up for the others.
#[derive(Debug, Default)]
pub struct CancelLimit {
    spent: Mutex<Spent>,
}

#[derive(Debug, Default)]
struct Spent {
    tokens: f64,
    at: Instant,
    /// Whom requests were passed on for, and when. No more than the bucket had tokens for.
    served: HashMap<Option<IpAddr>, Instant>,
}

impl CancelLimit {
    /// Whether `count` requests may be sent for `client` now, at `rate` per second.
    pub fn allow(&self, client: Option<IpAddr>, count: usize, rate: u32, now: Instant) -> bool {
        let mut spent = self.spent.lock();
        let rate = f64::from(rate);
        let depth = LATELY.as_secs_f64() * rate;
        let left = (spent.tokens - now.since(spent.at).as_secs_f64() * rate).max(0.0);
        spent.served.retain(|_, at| now.since(*at) < LATELY);
        let kept = if spent.served.contains_key(&client) { (depth / 4.0).floor() } else { 0.0 };
        let after = left + count as f64;
        // One that goes to more servers than that is sent when nothing else has been.
        let allowed = after <= depth - kept || left == 0.0;
        (spent.tokens, spent.at) = (if allowed { after } else { left }, now);
        if allowed {
            spent.served.insert(client, now);
        }
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> Instant {
        Instant::from_boot(Duration::from_millis(1_000_000 + millis))
    }

    fn client(number: u8) -> Option<IpAddr> {
        Some([10, 0, 0, number].into())
    }

    #[test]
    fn a_burst_is_allowed_and_then_a_rate() {
        let limit = CancelLimit::default();
        let allowed = (0..=255).filter(|n| limit.allow(client(*n), 1, 100, at(0))).count();
        assert_eq!(allowed, 200);
        let allowed = (0..=255).filter(|n| limit.allow(client(255 - *n), 1, 100, at(500))).count();
        assert_eq!(allowed, 50);
        assert!(!limit.allow(client(0), 3, 100, at(510)));
        assert!(limit.allow(None, 1, 100, at(510)), "a refusal costs nothing");
        assert!(limit.allow(None, 500, 100, at(60_000)), "more servers than a burst");
    }

    #[test]
    fn one_client_does_not_use_it_up_for_the_others() {
        let limit = CancelLimit::default();
        let flood = |now| (0..300).filter(|_| limit.allow(client(1), 1, 100, now)).count();
        assert_eq!(flood(at(0)), 150);
        assert!((2..=51).all(|n| limit.allow(client(n), 1, 100, at(0))));
        assert!(!limit.allow(client(52), 1, 100, at(0)) && !limit.allow(client(2), 1, 100, at(400)));
        assert_eq!(flood(at(1_000)), 50, "what has come in since, but for what is kept");
        assert!(limit.allow(client(52), 50, 100, at(1_000)));
        assert_eq!(flood(at(3_500)), 150);
        let few = CancelLimit::default();
        assert_eq!((0..5).filter(|_| few.allow(client(1), 1, 1, at(0))).count(), 2, "nothing is kept of so few");
    }
}
