//! What must never happen, checked at the moment at which it would.
//!
//! The judge stands outside of the world: it sees every server's WAL and the store past all faults.

use std::collections::BTreeMap;
use std::time::Duration;

use trunkline_common::{Lsn, MemberName};

use crate::wal::{Kind, Wal};

/// One uninterrupted time in which a server takes writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reign(pub u64);

/// A write that a client was told is safe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Acked {
    /// When the answer left the server.
    pub at: Duration,
    /// Where.
    pub host: usize,
    /// Under which reign.
    pub reign: Reign,
}

/// The judge of one world.
#[derive(Debug, Default)]
pub struct Judge {
    /// What must not have happened.
    pub violations: Vec<String>,
    /// Every acknowledged write.
    pub acked: BTreeMap<u64, Acked>,
    /// How many times somebody began to take writes.
    pub reigns: u64,
    /// The newest reign of which clients could hear, and on which host.
    newest: Option<(Reign, usize)>,
    /// The host that began to take writes last.
    pub began_last: Option<usize>,
    /// The last reign of each host.
    reign_of: BTreeMap<usize, Reign>,
    /// The timeline of each reign.
    timeline_of: BTreeMap<Reign, u32>,
    /// The record with which each timeline was begun.
    begun: BTreeMap<u32, u64>,
    /// Acknowledged writes must survive every failover.
    pub keeps_all: bool,
    /// There are pauses in this world, and servers that nobody guards in them.
    pub pauses: bool,
    /// Commits wait for a standby from the first one on to the last, or stand still: strict synchronous mode.
    pub strict: bool,
    /// Whoever has a permanent logical slot goes on to have it: nobody is tagged `nostream`.
    pub keeps_slots: bool,
    /// How far behind a new leader may be: the largest `maximum_lag_on_failover` that this world will have.
    pub lag_allowed: u64,
    /// The logical slots that primaries have made, by the number of the newest: what was read from one before it says no more
    /// where the copies of the name are.
    pub slots_made: BTreeMap<String, u64>,
    /// The largest timeline that the store has shown.
    timeline: u32,
    /// The host whose key the store took away last, before its time, and when.
    revoked: Option<Revoked>,
}

/// A leader key that the store took away before its time.
#[derive(Debug, Clone, Copy)]
struct Revoked {
    host: usize,
    at: Duration,
    how: Loss,
}

/// How a leader key goes before its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// Its lease is revoked. The key is gone, for anybody to take.
    Lease,
    /// The store is restored to a state in which another one may have it, who waits for a lease that may be held by now.
    Restore,
}

/// The longest until an agent hears by a renewal that its key is gone, if its watch does not tell it. Until then its server goes on,
/// comes back in place, or is promoted: nobody else takes the key meanwhile, as all ask it before they do; and where the store was
/// restored, whoever has the key now waits for the leases of before.
pub const UNHEARD: Duration = Duration::from_millis(1500);

/// After that many the world is not looked at any further.
const ENOUGH: usize = 5;

impl Judge {
    /// Something that must never happen has happened.
    pub fn violation(&mut self, now: Duration, what: impl Into<String>) {
        let what = format!("{:.4}: {}", now.as_secs_f64(), what.into());
        tracing::error!("VIOLATION {what}");
        if self.violations.len() < ENOUGH {
            self.violations.push(what);
        }
    }

    /// A server begins to take writes. `holder` is what the leader key says at this moment, if it needs that; `heard`: its
    /// answers reach clients.
    pub fn begins(
        &mut self,
        now: Duration,
        host: usize,
        name: &str,
        wal: &Wal,
        holder: Option<&str>,
        heard: bool,
    ) -> Reign {
        if holder != Some(name) {
            let holder = holder.unwrap_or("nobody");
            self.violation(now, format!("{name} takes writes while the leader key is held by {holder}"));
        }
        if self.keeps_all && heard {
            self.check_kept(now, name, wal);
        }
        self.reigns += 1;
        self.began_last = Some(host);
        tracing::info!("JUDGE {name} (host {host}) takes writes, reign {}, WAL {}", self.reigns, wal.end());
        let reign = Reign(self.reigns);
        self.reign_of.insert(host, reign);
        self.timeline_of.insert(reign, wal.timeline().0);
        if heard {
            self.newest = self.newest.max(Some((reign, host)));
        }
        let first = wal.records().iter().find(|record| record.timeline == wal.timeline());
        if let Some(first) = first.filter(|first| first.timeline.0 > 1)
            && *self.begun.entry(first.timeline.0).or_insert(first.number) != first.number
        {
            self.violation(now, format!("{name} begins timeline {}, as somebody else did before", first.timeline));
        }
        reign
    }

    /// The store takes the leader key away that `host` has.
    pub fn revoked(&mut self, at: Duration, host: usize, how: Loss) {
        self.revoked = Some(Revoked { host, at, how });
    }

    /// How the key of `host` has been taken away lately, so that its agent may not have heard of it.
    pub fn just_revoked(&self, now: Duration, host: usize) -> Option<Loss> {
        let just = |revoked: &Revoked| revoked.host == host && now - revoked.at <= UNHEARD;
        self.revoked.filter(just).map(|revoked| revoked.how)
    }

    /// The reign in which a host took writes last.
    pub fn last_reign(&self, host: usize) -> Option<Reign> {
        self.reign_of.get(&host).copied()
    }

    /// A server begins to take writes at `own`, and `known` is the last position that the store has of a leader; nobody
    /// has asked for this one.
    pub fn elected(&mut self, now: Duration, name: &str, own: Lsn, known: Lsn) {
        let lag = own.lag_behind(known);
        if lag > self.lag_allowed {
            let allowed = self.lag_allowed;
            self.violation(now, format!("{name} leads {lag} bytes behind the last leader, {allowed} are allowed"));
        }
    }

    /// A server that was on timeline `from` begins to take writes on `timeline`, and nobody has asked for this one. It may have
    /// begun the newest one itself.
    pub fn promoted(&mut self, now: Duration, name: &str, from: u32, timeline: u32) {
        if from < self.timeline && timeline != self.timeline && !self.pauses {
            let known = self.timeline;
            self.violation(now, format!("{name} leads from timeline {from} on, and the cluster is on {known}"));
        }
    }

    /// A commit is acknowledged that so many standbys have confirmed.
    pub fn confirmed(&mut self, now: Duration, host: usize, by: usize) {
        if self.strict && by == 0 {
            self.violation(now, format!("host {host} acknowledges, in strict mode, what no standby has confirmed"));
        }
    }

    /// A commit is acknowledged by a server which, for a while, has not been `watched` by the kernel although it has to be.
    pub fn watched(&mut self, now: Duration, host: usize, watched: bool) {
        if !watched && !self.pauses {
            self.violation(now, format!("host {host} takes writes without the watchdog that is required"));
        }
    }

    /// A router has come to know who holds the leader key, and sends writes to `target`.
    pub fn routes(&mut self, now: Duration, holder: Option<&MemberName>, target: &MemberName) {
        if holder != Some(target) {
            let holder = holder.map_or("nobody", MemberName::as_str);
            self.violation(now, format!("a router sends writes to {target} and knows that {holder} leads"));
        }
    }

    /// The answer to a client's write leaves a server.
    pub fn acknowledged(&mut self, now: Duration, id: u64, host: usize, reign: Reign) {
        // A primary that a pause has left running leads again, where nobody has lived to tell of the one in between.
        let told = |reign: &Reign| self.timeline_of.get(reign).is_none_or(|timeline| *timeline <= self.timeline);
        if let Some((newest, other)) =
            self.newest.filter(|(newest, _)| *newest > reign && (!self.pauses || told(newest)))
        {
            self.violation(
                now,
                format!(
                    "host {host} (reign {}) acknowledges a write after host {other} (reign {}) has taken writes",
                    reign.0, newest.0
                ),
            );
        }
        self.newest = self.newest.max(Some((reign, host)));
        self.acked.insert(id, Acked { at: now, host, reign });
    }

    /// The timeline that the store shows.
    pub fn timeline(&mut self, now: Duration, timeline: u32) {
        if timeline < self.timeline {
            self.violation(now, format!("the timeline in the store went from {} to {timeline}", self.timeline));
        }
        self.timeline = self.timeline.max(timeline);
    }

    /// The store is as it was once, and knows no newer timelines than then. Nor does anybody know of those that nobody is on whose
    /// agent is awake (`there`): the documentation says to stop whoever stood still before a store is restored.
    pub fn restored(&mut self, there: &[Wal]) {
        self.timeline = 0;
        let known = there.iter().map(|wal| wal.timeline().0).max().unwrap_or_default();
        self.begun.retain(|timeline, _| *timeline <= known);
        self.acked.retain(|_, acked| self.timeline_of.get(&acked.reign).is_none_or(|timeline| *timeline <= known));
    }

    /// Every acknowledged write is in this WAL.
    pub fn check_kept(&mut self, now: Duration, name: &str, wal: &Wal) {
        let mut there: Vec<u64> = wal
            .records()
            .iter()
            .filter_map(|record| match record.kind {
                Kind::Write(id) => Some(id),
                _ => None,
            })
            .collect();
        there.sort_unstable();
        let lost: Vec<(u64, Acked)> = self
            .acked
            .iter()
            .filter(|(id, _)| there.binary_search(id).is_err())
            .map(|(id, acked)| (*id, *acked))
            .collect();
        if let Some((id, acked)) = lost.first() {
            self.violation(
                now,
                format!(
                    "{name} leads without {} acknowledged writes, the first of them {id}, acknowledged at {:.4} by host {}",
                    lost.len(),
                    acked.at.as_secs_f64(),
                    acked.host
                ),
            );
            // Said once.
            for (id, _) in lost {
                self.acked.remove(&id);
            }
        }
    }
}
