//! What is looked at again and again, beside the sessions: who is a candidate of which port, which one line in the log
//! tells whenever it changes; sessions on standbys that are down or too far behind, which end; and positions, where a port limits
//! lag in time; sessions that are there for a while, which settle; and clients and servers that do not answer any more.

use std::collections::BTreeMap;
use std::mem::Discriminant;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use tokio::sync::watch;
use tracing::{debug, info};
use trunkline_common::dcs::follow::Knowledge;
use trunkline_common::{Clock, Instant, MemberName};
use trunkline_config::router::{Lag, Port};

use crate::lag::Measured;
use crate::probe::Prober;
use crate::router::Router;
use crate::rule::{self, Reason, Verdict};
use crate::sessions::{Cut, Silence};

/// How often: lag in time grows by itself.
const PAUSE: Duration = Duration::from_secs(1);

/// How often sessions settle: those that end sooner are not worth it, and until then they need more memory.
const SETTLE_PAUSE: Duration = Duration::from_millis(100);

/// How often it is looked for silence, which is 4 s at least.
const SILENCE_PAUSE: Duration = Duration::from_secs(2);

/// Sessions after which others of the thread get their turn.
const TURN: usize = 64;

/// How long a member may take to tell its position.
const PROBE_LIMIT: Duration = Duration::from_secs(1);

/// Looks at every new table, and at the last one every second.
pub async fn candidates(router: Arc<Router>) {
    let mut tables = router.tables();
    let (mut seen, mut down) = (Seen::default(), BTreeMap::new());
    loop {
        let _ = tokio::time::timeout(PAUSE, tables.changed()).await;
        look(&router, &mut seen);
        end_sessions(&router, &mut down);
    }
}

/// Lets sessions settle that have been there for a while, if there is a place for them.
pub async fn settling(router: Arc<Router>) {
    if router.lean.after().is_none() {
        return;
    }
    // Also once that has failed: those that are fresh are remembered until they are asked for.
    loop {
        if !router.sessions.settle_fresh() {
            router.sessions.stirred().await;
        }
        router.clock.sleep(SETTLE_PAUSE).await;
    }
}

/// Gives up clients and servers that do not answer any more.
pub async fn silence(router: Arc<Router>) {
    loop {
        router.clock.sleep(SILENCE_PAUSE).await;
        let limits = |port: &Port| Silence { client: port.client_silence, server: port.server_silence };
        let ports = router.ports().into_iter().map(|port| (port.name.clone(), limits(&port.settings())));
        let ports: BTreeMap<_, _> = ports.collect();
        // Sessions outlive their port, also those of another process that had more ports.
        let all = router.limits();
        let other = Silence { client: all.client_silence, server: all.server_silence };
        let limits = |port: &str| ports.get(port).copied().unwrap_or(other);
        let mut given_up = 0;
        for (looked_at, silent) in router.sessions.give_up_silent(limits).enumerate() {
            given_up += silent;
            if looked_at % TURN == 0 {
                tokio::task::yield_now().await;
            }
        }
        if given_up > 0 {
            info!(given_up, "clients or servers do not answer any more");
        }
    }
}

/// What a port last made of a member, without the numbers.
type Seen = BTreeMap<(Arc<str>, MemberName), Kind>;

/// What a change of is told in the log.
type Kind = (Discriminant<Verdict>, Option<Discriminant<Reason>>);

fn look(router: &Router, seen: &mut Seen) {
    let (table, now) = (router.table(), router.clock.now());
    let mut last = std::mem::take(seen);
    for listening in router.ports() {
        let port = listening.settings();
        for (member, verdict) in rule::explain(&table, &port, now) {
            let key = (listening.name.clone(), member);
            let kind = kind(&verdict);
            if last.remove(&key) != Some(kind) {
                info!(port = &*key.0, member = key.1.as_str(), %verdict, "candidates changed");
            }
            seen.insert(key, kind);
        }
    }
    for (port, member) in last.into_keys() {
        info!(port = &*port, member = member.as_str(), verdict = "not a member", "candidates changed");
    }
}

fn kind(verdict: &Verdict) -> Kind {
    let reason = match verdict {
        Verdict::No(reason) => Some(std::mem::discriminant(reason)),
        Verdict::Candidate | Verdict::Substitute => None,
    };
    (std::mem::discriminant(verdict), reason)
}

/// `down`: see [`rule::down_since`].
fn end_sessions(router: &Router, down: &mut BTreeMap<MemberName, Instant>) {
    let (table, now) = (router.table(), router.clock.now());
    let ports: BTreeMap<_, _> = router.ports().into_iter().map(|port| (port.name.clone(), port.settings())).collect();
    if ports.values().any(|port| port.end_lag != Lag::default()) {
        let behind = |port: &Port, member: &MemberName| rule::must_end(&table, port, member, now);
        let is_over = |port: &str, member: &MemberName| ports.get(port).is_some_and(|port| behind(port, member));
        let ended = router.sessions.end_where(Cut::Lag, is_over);
        if ended > 0 {
            info!(sessions_ended = ended, "their servers are too far behind");
        }
    }
    if ports.values().all(|port| port.end_down_time.is_none()) {
        return down.clear();
    }
    let in_use = router.sessions.loads().into_iter().filter(|(_, load)| *load > 0).map(|(member, _)| member);
    *down = rule::down_since(down, &table, in_use, now);
    let for_too_long = |port: &Port, member: &MemberName| {
        port.end_down_time.zip(down.get(member)).is_some_and(|(limit, since)| now.since(*since) >= limit)
    };
    let is_over = |port: &str, member: &MemberName| ports.get(port).is_some_and(|port| for_too_long(port, member));
    let ended = router.sessions.end_where(Cut::Down, is_over);
    if ended > 0 {
        info!(sessions_ended = ended, "their servers are down");
    }
}

/// Asks the members for their positions every second, while a port has to know them.
pub async fn positions(router: Arc<Router>, prober: Prober, knowledge: watch::Receiver<Knowledge>) {
    loop {
        router.clock.sleep_until(router.clock.now() + PAUSE).await;
        let needed = router.ports().iter().any(|port| port.settings().needs_lag_time());
        let view = knowledge.borrow().view.clone().filter(|_| needed);
        let members = view.iter().flat_map(|view| &view.members);
        let ask = async |name: &MemberName, url: &str| match prober.position(url, PROBE_LIMIT).await {
            Ok(position) => Some((name.clone(), position)),
            Err(error) => {
                debug!(member = name.as_str(), error, "position not known");
                None
            }
        };
        let asked = members.filter_map(|(name, member)| Some(ask(name, member.api_url.as_deref()?)));
        let measured: Measured = join_all(asked).await.into_iter().flatten().collect();
        let changed = |before: &mut Arc<Measured>| {
            let changed = **before != measured;
            *before = Arc::new(measured);
            changed
        };
        router.measured.send_if_modified(changed);
    }
}
