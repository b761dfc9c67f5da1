//! etcd's v3 API.
//!
//! Facts about etcd that this relies on (seen with 3.4.23; the contract and fault tests hold them fast):
//!
//! * A client over several endpoints keeps sending requests to a member that hangs. So there is one client per
//!   endpoint, every call has a deadline per endpoint, and rotation is ours ([`endpoints`]).
//! * A lease lasts at least its granted TTL from when the request for it was sent, at most half a second longer. The
//!   granted TTL may be more than was asked for (at least 2 s with default timers). When etcd's leader changes, every
//!   lease starts again with its full TTL plus one election timeout.
//! * A keep-alive is answered by etcd's leader alone, out of its memory. Before etcd 3.4.31 and 3.5.13 one that was frozen,
//!   thaws and has not heard of its successor yet answers for a lease that is not its to keep any more. So a renewal counts
//!   only between two linearizable reads through the same member that show the same term: a member never goes back to
//!   an earlier one, and a quorum was in this one after the keep-alive.
//! * A keep-alive proves the lease, not the keys attached to it: somebody may have deleted those.
//! * Transactions run through consensus. One that got no answer may yet be carried out, at any later time: a member that
//!   was frozen with the request in its socket does it when it thaws. Hence every write that could do harm late has a
//!   condition that will not hold any more by then.
//! * During an election nothing is answered; without a quorum only requests that demand a leader are refused.

mod endpoints;
mod members;
mod watch;
mod wire;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use etcd_client::{GetOptions, LeaseTimeToLiveOptions, WatchOptions};
use parking_lot::Mutex;
use tokio::sync::Notify;
use trunkline_config::local::Etcd;

use self::endpoints::{Endpoints, Resend};
use self::members::{Found, Listed};
use super::latency::Latency;
use super::{Dcs, DcsError, Events, KeyValue, Lease, Op, Snapshot, Txn, TxnResult};
use crate::{Clock, Instant, LeaseId, Revision};

/// How often etcd is asked for its members, and how soon again where it has not answered.
const DISCOVER: Duration = Duration::from_secs(60);
const DISCOVER_AGAIN: Duration = Duration::from_secs(5);

/// How many leases' TTLs are remembered; a process holds one or two.
const KNOWN_LEASES: usize = 64;

/// etcd behind the [`Dcs`] contract. Clones share connections.
#[derive(Clone)]
pub struct EtcdDcs<C> {
    shared: Arc<Shared<C>>,
}

struct Shared<C> {
    endpoints: Endpoints<C>,
    clock: C,
    /// Granted TTLs: the answer to a keep-alive does not reach us with its TTL.
    ttls: Mutex<BTreeMap<LeaseId, Duration>>,
    /// The term of etcd's Raft that each member, by its number, was last seen in, with a quorum.
    terms: Mutex<BTreeMap<u64, u64>>,
    latency: Mutex<Latency>,
    /// The configuration has changed: members are looked for anew.
    reloaded: Notify,
}

impl<C: Clock> EtcdDcs<C> {
    /// Prepares clients for every endpoint. Does not talk to etcd yet, so it works while etcd is down.
    ///
    /// `retry_timeout` bounds each call, over all endpoints; a single endpoint is given an equal share of it.
    ///
    /// # Errors
    /// [`DcsError::Refused`] where the configuration cannot work: no endpoint, unreadable certificate files.
    pub async fn connect(config: &Etcd, clock: C, retry_timeout: Duration) -> Result<Self, DcsError> {
        let endpoints = Endpoints::new(config, clock.clone(), retry_timeout)?;
        Ok(Self {
            shared: Arc::new(Shared {
                endpoints,
                clock,
                ttls: Mutex::default(),
                terms: Mutex::default(),
                latency: Mutex::default(),
                reloaded: Notify::new(),
            }),
        })
    }

    /// Changes the bound of calls, which is a dynamic setting. Applies to calls that begin after this.
    pub fn set_retry_timeout(&self, retry_timeout: Duration) {
        self.shared.endpoints.set_bound(retry_timeout);
    }

    /// Other endpoints, another user or password, or other certificates, read from their files now. Applies to calls that begin
    /// after this; a watch goes on over the connection that it has. True if anything has changed.
    ///
    /// # Errors
    /// As of [`EtcdDcs::connect`]; everything stays as it is then.
    pub fn reload(&self, config: &Etcd) -> Result<bool, DcsError> {
        let changed = self.shared.endpoints.reload(config)?;
        if changed {
            self.shared.reloaded.notify_one();
        }
        Ok(changed)
    }

    /// Looks for the members of etcd that the configuration does not name, again and again, and uses them when those do not
    /// answer that it names. Not where these stand for the cluster (`use_proxies`). Never returns.
    pub async fn discover(self) {
        let mut told = false;
        loop {
            let pause = match self.look_for_members().await {
                Ok(_) => DISCOVER,
                Err(DcsError::Refused(why)) => {
                    if !std::mem::replace(&mut told, true) {
                        tracing::info!(
                            "etcd does not tell of its members, so those that are configured have to do: {why}"
                        );
                    }
                    DISCOVER
                }
                Err(_) => DISCOVER_AGAIN,
            };
            tokio::select! {
                () = self.shared.clock.sleep(pause) => {}
                () = self.shared.reloaded.notified() => {}
            }
        }
    }

    /// Asks once for the members that the configuration does not name, uses them from now on, and says where they are.
    ///
    /// # Errors
    /// No answer, or not for this user.
    pub async fn look_for_members(&self) -> Result<Vec<String>, DcsError> {
        let endpoints = &self.shared.endpoints;
        let Some(configured) = endpoints.configured() else { return Ok(Vec::new()) };
        let list = |mut client: etcd_client::Client| async move { client.member_list().await };
        let answer = endpoints.call(Resend::Always, list).await?;
        let Some(header) = answer.header() else { return Ok(Vec::new()) };
        let listed = |member: &etcd_client::Member| Listed {
            id: member.id(),
            urls: member.client_urls().to_vec(),
            is_learner: member.is_learner(),
        };
        let listed: Vec<Listed> = answer.members().iter().map(listed).collect();
        let (cluster, told_by) = (header.cluster_id(), header.member_id());
        let found = Found::new(cluster, told_by, &listed, &configured, &endpoints.found(cluster));
        let urls = found.urls.clone();
        if endpoints.set_found(&configured, found) {
            let more = if urls.is_empty() { "none".to_owned() } else { urls.join(", ") };
            tracing::info!("etcd has {} members; beside those that are configured: {more}", listed.len());
        }
        Ok(urls)
    }

    /// How long etcd took to answer lately. What it did not answer is not in it.
    pub fn latency(&self) -> Latency {
        self.shared.latency.lock().clone()
    }

    /// The TTL the lease was granted with; asked for where another process obtained it.
    async fn ttl(&self, lease: LeaseId) -> Result<Duration, DcsError> {
        if let Some(ttl) = self.shared.ttls.lock().get(&lease) {
            return Ok(*ttl);
        }
        let answer = self
            .shared
            .endpoints
            .call(Resend::Always, |mut client| async move {
                client.lease_time_to_live(lease.0, None::<LeaseTimeToLiveOptions>).await
            })
            .await?;
        // -1: unknown or over.
        if answer.ttl() < 0 {
            return Err(DcsError::LeaseLost);
        }
        let ttl = Duration::from_secs(answer.granted_ttl().unsigned_abs());
        self.remember(lease, ttl);
        Ok(ttl)
    }

    fn remember(&self, lease: LeaseId, ttl: Duration) {
        let mut ttls = self.shared.ttls.lock();
        ttls.insert(lease, ttl);
        while ttls.len() > KNOWN_LEASES {
            ttls.pop_first();
        }
    }

    fn forget_if_lost<T>(&self, lease: LeaseId, result: Result<T, DcsError>) -> Result<T, DcsError> {
        if matches!(result, Err(DcsError::LeaseLost)) {
            self.shared.ttls.lock().remove(&lease);
        }
        result
    }
}

impl<C: Clock> Dcs for EtcdDcs<C> {
    type Watch = Events;

    async fn read(&self, prefix: &str) -> Result<Snapshot, DcsError> {
        let get = |mut client: etcd_client::Client| async move {
            client.get(prefix, Some(GetOptions::new().with_prefix())).await
        };
        Ok(wire::snapshot(&self.shared.endpoints.call(Resend::Always, get).await?))
    }

    async fn watch(&self, prefix: &str, from: Revision) -> Result<Self::Watch, DcsError> {
        let open = |mut client: etcd_client::Client| async move {
            let options = WatchOptions::new().with_prefix().with_start_revision(from.0);
            let mut stream = client.watch(prefix, Some(options)).await?;
            // The first answer says whether the watch was created, so that a refusal shows here and not later.
            let created = stream.message().await?;
            Ok((stream, created))
        };
        let (stream, created) = self.shared.endpoints.call(Resend::Always, open).await?;
        let patience = self.shared.endpoints.share();
        watch::events(stream, created, self.shared.clock.clone(), patience)
    }

    async fn txn(&self, txn: Txn) -> Result<TxnResult, DcsError> {
        let request = wire::txn(&txn);
        let run = |client: etcd_client::Client| {
            let request = request.clone();
            async move { client.kv_client().txn(request).await }
        };
        let sent = self.shared.clock.now();
        let answer = self.shared.endpoints.call(Resend::IfNotSent, run).await?;
        if txn.then.iter().any(|op| !matches!(op, Op::Get(_))) {
            self.shared.latency.lock().writes.add(self.shared.clock.now().since(sent));
        }
        Ok(wire::txn_result(&answer))
    }

    async fn grant(&self, ttl: Duration) -> Result<Lease, DcsError> {
        let seconds = ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0);
        let seconds = i64::try_from(seconds.max(1)).unwrap_or(i64::MAX);
        let clock = &self.shared.clock;
        // Sent twice, the first lease may exist without anybody knowing: it ends by itself.
        let grant = |mut client: etcd_client::Client| async move {
            let sent = clock.now();
            client.lease_grant(seconds, None).await.map(|answer| (sent, answer))
        };
        let (sent, answer) = self.shared.endpoints.call(Resend::Always, grant).await?;
        let (id, ttl) = (LeaseId(answer.id()), Duration::from_secs(answer.ttl().unsigned_abs()));
        self.remember(id, ttl);
        Ok(Lease::counted(id, ttl, sent))
    }

    async fn renew(&self, lease: LeaseId, key: &str) -> Result<(Lease, Option<KeyValue>), DcsError> {
        let ttl = self.ttl(lease).await?;
        let clock = &self.shared.clock;
        let terms = &self.shared.terms;
        // A stream of its own for every renewal: one that is kept open can be silent for seconds on a member that
        // hangs, and never reconnects. Again where the member is new to us or has come to another term; the endpoint's
        // deadline ends it.
        let renew = |mut client: etcd_client::Client| async move {
            loop {
                let before = terms.lock().clone();
                let sent: Instant = clock.now();
                client.lease_keep_alive(lease.0).await?;
                let found = client.get(key, None).await?;
                let (member, term) = found.header().map_or((0, 0), |header| (header.member_id(), header.raft_term()));
                terms.lock().insert(member, term);
                if before.get(&member) == Some(&term) {
                    return Ok((sent, found.kvs().first().map(wire::key_value)));
                }
            }
        };
        let renewed = self.shared.endpoints.call(Resend::Always, renew).await;
        let (sent, found) = self.forget_if_lost(lease, renewed)?;
        self.shared.latency.lock().renewals.add(clock.now().since(sent));
        Ok((Lease::counted(lease, ttl, sent), found))
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), DcsError> {
        self.shared.ttls.lock().remove(&lease);
        let revoke = |mut client: etcd_client::Client| async move { client.lease_revoke(lease.0).await };
        match self.shared.endpoints.call(Resend::Always, revoke).await {
            Ok(_) | Err(DcsError::LeaseLost) => Ok(()),
            Err(error) => Err(error),
        }
    }
}
