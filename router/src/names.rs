//! Addresses of servers that are known by name.
//!
//! A name is asked for by a thread of its own, once at a time, however many sessions are led to it: a resolver that hangs keeps nobody
//! but those who need that very name, and no longer than they have for a connect. What it said last goes on to count where it is
//! slow, or fails. That is no more than a guess of where the server is; who leads is not decided here.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use trunkline_common::{Clock, Instant, SystemClock};

/// How long an answer is good. No longer than it takes to notice that a server has moved.
const FRESH: Duration = Duration::from_secs(1);

/// How long a resolver is waited for where its last answer may do.
const PATIENCE: Duration = Duration::from_millis(200);

/// Names that are remembered; servers come and go, and each may bring another one.
const NAMES: usize = 256;

type Resolve = dyn Fn(&str) -> io::Result<Vec<SocketAddr>> + Send + Sync;

/// What names have been resolved to.
pub struct Names {
    known: Mutex<HashMap<String, Name>>,
    /// Something has been answered.
    answered: Notify,
    resolve: Box<Resolve>,
    fresh: Duration,
}

#[derive(Default)]
struct Name {
    /// The last good answer; none yet.
    addresses: Vec<SocketAddr>,
    /// Why there is none newer.
    error: Option<String>,
    answered: Option<Instant>,
    /// Since when somebody asks.
    asked: Option<Instant>,
}

impl std::fmt::Debug for Names {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Names").finish_non_exhaustive()
    }
}

impl Default for Names {
    /// Asks the system.
    fn default() -> Self {
        Self::new(FRESH, |host| Ok((host, 0).to_socket_addrs()?.collect()))
    }
}

impl Names {
    /// Asks `resolve`, whose answers are good for so long.
    pub(crate) fn new(
        fresh: Duration,
        resolve: impl Fn(&str) -> io::Result<Vec<SocketAddr>> + Send + Sync + 'static,
    ) -> Self {
        Self { known: Mutex::default(), answered: Notify::new(), resolve: Box::new(resolve), fresh }
    }

    /// The addresses of `host`, with this port. An address is its own.
    ///
    /// # Errors
    /// It has none, and never had.
    pub async fn resolve(self: &Arc<Self>, host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
        if let Ok(ip) = host.parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(ip, port)]);
        }
        let began = SystemClock.now();
        loop {
            // Made before the look, so that no answer is missed.
            let answered = self.answered.notified();
            match self.look(host, began)? {
                Look::Known(mut addresses) => {
                    addresses.iter_mut().for_each(|address| address.set_port(port));
                    return Ok(addresses);
                }
                Look::Asked { until: None } => answered.await,
                Look::Asked { until: Some(until) } => tokio::select! {
                    () = answered => {}
                    () = SystemClock.sleep_until(until) => {}
                },
            }
        }
    }

    /// What is known now. Asks, where that is too old and nobody does so already.
    fn look(self: &Arc<Self>, host: &str, began: Instant) -> io::Result<Look> {
        let mut known = self.known.lock();
        if known.len() >= NAMES && !known.contains_key(host) {
            known.retain(|_, name| name.asked.is_some());
        }
        let name = known.entry(host.to_owned()).or_default();
        let now = SystemClock.now();
        if name.answered.is_some_and(|answered| answered >= began || now < answered + self.fresh) {
            return name.answer();
        }
        let asked = match name.asked {
            Some(asked) => asked,
            None => {
                let (names, host) = (self.clone(), host.to_owned());
                std::thread::Builder::new().name("resolver".into()).spawn(move || names.ask(&host))?;
                *name.asked.insert(now)
            }
        };
        let until = Some(asked + PATIENCE).filter(|_| !name.addresses.is_empty());
        if until.is_some_and(|until| until <= now) { name.answer() } else { Ok(Look::Asked { until }) }
    }

    fn ask(&self, host: &str) {
        let answer = (self.resolve)(host);
        let mut known = self.known.lock();
        let name = known.entry(host.to_owned()).or_default();
        (name.asked, name.answered) = (None, Some(SystemClock.now()));
        match answer {
            Ok(addresses) if !addresses.is_empty() => name.addresses = addresses,
            Ok(_) => name.error = Some("the name has no address".into()),
            Err(error) => name.error = Some(error.to_string()),
        }
        drop(known);
        self.answered.notify_waiters();
    }
}

enum Look {
    Known(Vec<SocketAddr>),
    /// Somebody asks. Who has waited until then looks again.
    Asked {
        until: Option<Instant>,
    },
}

impl Name {
    fn answer(&self) -> io::Result<Look> {
        match &self.error {
            Some(error) if self.addresses.is_empty() => Err(io::Error::other(error.clone())),
            _ => Ok(Look::Known(self.addresses.clone())),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;

    use super::*;

    type Answer = io::Result<Vec<SocketAddr>>;

    /// A resolver that says what it is told to, when it is told; and how often it was asked.
    fn names(fresh: Duration) -> (Arc<Names>, mpsc::Sender<Answer>, Arc<AtomicUsize>) {
        let (tell, told) = mpsc::channel();
        let (told, asked) = (Mutex::new(told), Arc::new(AtomicUsize::new(0)));
        let count = asked.clone();
        let resolve = move |_: &str| -> Answer {
            count.fetch_add(1, Ordering::Relaxed);
            told.lock().recv().unwrap_or(Ok(Vec::new()))
        };
        (Arc::new(Names::new(fresh, resolve)), tell, asked)
    }

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn failure() -> Answer {
        Err(io::Error::other("the resolver is down"))
    }

    #[tokio::test]
    async fn an_answer_is_good_for_a_while_and_then_asked_for_again() {
        let (names, tell, asked) = names(Duration::from_secs(3_600));
        tell.send(Ok(vec![at("10.0.0.1:0"), at("[fe80::1]:0")])).unwrap();
        for port in [1, 2] {
            let found = names.resolve("a", port).await.unwrap();
            assert_eq!(found.iter().map(SocketAddr::port).collect::<Vec<_>>(), [port, port]);
        }
        assert_eq!(asked.load(Ordering::Relaxed), 1);
        let (names, tell, _) = self::names(Duration::ZERO);
        for address in ["10.0.0.1:5", "10.0.0.2:5"] {
            tell.send(Ok(vec![at(address)])).unwrap();
            assert_eq!(names.resolve("a", 5).await.unwrap(), [at(address)]);
        }
    }

    #[tokio::test]
    async fn where_the_resolver_fails_the_last_good_answer_counts() {
        let (names, tell, _) = names(Duration::ZERO);
        tell.send(failure()).unwrap();
        assert_eq!(names.resolve("a", 5).await.unwrap_err().to_string(), "the resolver is down");
        for answer in [Ok(vec![at("10.0.0.1:0")]), failure(), Ok(Vec::new())] {
            tell.send(answer).unwrap();
            assert_eq!(names.resolve("a", 5).await.unwrap(), [at("10.0.0.1:5")]);
        }
    }

    #[tokio::test]
    async fn a_resolver_that_hangs_is_asked_once_and_keeps_nobody_who_can_do_without() {
        let (names, tell, asked) = names(Duration::ZERO);
        let soon = Duration::from_millis(50);
        for _ in 0..3 {
            assert!(tokio::time::timeout(soon, names.resolve("a", 5)).await.is_err(), "nothing is known");
        }
        assert_eq!(
            tokio::time::timeout(soon, names.resolve("10.0.0.9", 5)).await.unwrap().unwrap(),
            [at("10.0.0.9:5")]
        );
        assert_eq!(asked.load(Ordering::Relaxed), 1);
        // Whoever waits gets what comes in the end.
        let waiting: Vec<_> = (0..3)
            .map(|port| {
                tokio::spawn({
                    let names = names.clone();
                    async move { names.resolve("a", port).await }
                })
            })
            .collect();
        tokio::task::yield_now().await;
        tell.send(Ok(vec![at("10.0.0.1:0")])).unwrap();
        for waiting in waiting {
            assert_eq!(waiting.await.unwrap().unwrap()[0].ip(), at("10.0.0.1:0").ip());
        }
        // From now on nobody waits for it for long.
        for _ in 0..3 {
            let found = tokio::time::timeout(PATIENCE * 10, names.resolve("a", 5)).await.unwrap();
            assert_eq!(found.unwrap(), [at("10.0.0.1:5")]);
        }
        assert_eq!(asked.load(Ordering::Relaxed), 2);
    }

    #[tokio::test]
    async fn the_names_that_are_remembered_are_not_too_many() {
        let names = Arc::new(Names::new(FRESH, |_: &str| Ok(vec![at("10.0.0.1:0")])));
        for number in 0..3 * NAMES {
            names.resolve(&format!("n{number}"), 5).await.unwrap();
        }
        assert!(names.known.lock().len() <= NAMES);
    }
}
