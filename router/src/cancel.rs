//! CancelRequests: a connection of its own that names a session by process id and a secret, and wants no answer.
//!
//! On a port with one server there is no question where it belongs. On any other it is given to every server that may
//! have the session: a server that doesn't know the pair ignores it, which is why trying costs nothing but connects —
//! and those are limited.

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tracing::debug;
use trunkline_common::{Clock, Instant};
use trunkline_config::router::Port;

use crate::port::Listening;
use crate::router::Router;
use crate::table::Backend;
use crate::{rule, socket};

/// Forwards per second, and how many may come at once.
const RATE: u32 = 100;
const BURST: f64 = 200.0;

/// How many servers one request is tried on.
const SERVERS: usize = 64;

/// How long a server may take to act on a request, which it does before it closes.
const ANSWER: Duration = Duration::from_secs(5);

/// Passes `packet` on, and returns when the servers have acted on it: libpq takes the end of its connection for that.
pub async fn forward(router: &Router, listening: &Listening, port: &Port, packet: &[u8]) -> &'static str {
    let mut servers = rule::candidates(&router.table(), port, router.clock.now());
    for known in router.sessions.backends_of(&listening.name) {
        if !servers.iter().any(|server| server.host == known.host && server.port == known.port) {
            servers.push(known);
        }
    }
    servers.truncate(SERVERS);
    let result = match servers.len() {
        0 => "no_server",
        count if !router.cancels.allow(count, router.clock.now()) => "limited",
        _ => {
            join_all(servers.iter().map(|server| send(port, server, packet))).await;
            "forwarded"
        }
    };
    router.metrics.cancels.with_label_values(&[&*listening.name, result]).inc();
    result
}

async fn send(port: &Port, server: &Arc<Backend>, packet: &[u8]) {
    let exchange = async {
        let mut stream = socket::dial(&server.host, server.port, port.connect_timeout, port.server_silence).await?;
        stream.write_all(packet).await?;
        // Nothing is expected but the end; one byte is enough to see it.
        stream.read(&mut [0]).await
    };
    match tokio::time::timeout(ANSWER, exchange).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => debug!(member = %server.member, %error, "cancel request not delivered"),
        Err(_) => debug!(member = %server.member, "cancel request not answered"),
    }
}

/// A token bucket over all ports.
#[derive(Debug, Default)]
pub struct CancelLimit {
    spent: Mutex<(f64, Instant)>,
}

impl CancelLimit {
    /// Whether `count` requests may be sent now.
    pub fn allow(&self, count: usize, now: Instant) -> bool {
        let mut spent = self.spent.lock();
        let refilled = now.since(spent.1).as_secs_f64() * f64::from(RATE);
        let left = (spent.0 - refilled).max(0.0);
        let after = left + count as f64;
        let allowed = after <= BURST;
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
        let allowed = (0..300).filter(|_| limit.allow(1, at(0))).count();
        assert_eq!(allowed, 200);
        let allowed = (0..300).filter(|_| limit.allow(1, at(500))).count();
        assert_eq!(allowed, 50);
        assert!(!limit.allow(3, at(510)));
        assert!(limit.allow(1, at(510)), "a refusal costs nothing");
    }
}
