//! The lease: what this node holds in the DCS, until when that is certain, and what happens when it ends.
//!
//! One lease per process carries the member key and, on the leader, the leader key (dcs-layout §5.2). The [`Keeper`]
//! renews it beside the HA loop, so that no slow disk, peer or PostgreSQL can delay a renewal, but only while the loop
//! shows that it is alive: a stuck loop must lose the lease. And whatever the loop does, the keeper **fences** PostgreSQL
//! before the moment from which another node may take the key. For the case that this process can't, the [`Guard`] is
//! told the same deadline whenever it changes.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tracing::{error, info, warn};
use trunkline_common::dcs::follow::Knowledge;
use trunkline_common::dcs::store::{ClusterStore, Outcome};
use trunkline_common::dcs::{Dcs, DcsError, Lease};
use trunkline_common::{Clock, Instant, LeaseId, MemberName};

use crate::guard::{Deadline, Guard};
use crate::postgres::{PgError, Postgres};

/// What this process holds.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Session {
    /// The lease, `None` until one is granted or after one was lost.
    pub lease: Option<Lease>,
    /// The leader key is ours, by the last proof; good until the lease's end.
    pub leading: bool,
    /// Every member that may take the leader key has promised not to do so before (failsafe mode): good until then
    /// whatever has become of key and lease.
    pub failsafe: Option<Instant>,
    /// This node makes a new cluster, by the right that hangs on the lease; its server takes writes before there is a
    /// leader key.
    pub bootstrapping: bool,
    /// PostgreSQL will be fenced then unless the lease is renewed or the loop has resigned. An agent that has just started
    /// has the one that an earlier agent left behind.
    pub deadline: Option<Deadline>,
    /// How often PostgreSQL was fenced.
    pub fenced: u64,
    /// The server here takes writes for the cluster, so clients may be led here; `None`: not known yet.
    pub serving: Option<bool>,
    /// Why the DCS did not answer last time; `None` while it does.
    pub trouble: Option<String>,
}

impl Session {
    /// Until when nobody else can lead: the leader key is ours, or its possible takers have given their word.
    pub fn leader_until(&self) -> Option<Instant> {
        self.key_until().max(self.failsafe)
    }

    /// Until when the leader key is certainly ours.
    pub fn key_until(&self) -> Option<Instant> {
        self.lease.filter(|_| self.leading).map(|lease| lease.until)
    }

    /// Until when a server here may take writes: as leader, or in a cluster that is being made.
    fn writes_until(&self) -> Option<Instant> {
        let bootstrap = self.lease.filter(|_| self.bootstrapping).map(|lease| lease.until);
        self.leader_until().max(bootstrap)
    }

    /// A server here may take writes because of the lease.
    fn writes(&self) -> bool {
        self.leading || self.bootstrapping
    }

    /// The right to writes is gone: PostgreSQL is fenced then, unless the loop is faster. With the members' word it may
    /// go on, and the key may be won back.
    fn lose(&mut self, now: Instant, fence_by: Deadline, timing: Timing) {
        self.leading = false;
        self.bootstrapping = false;
        self.deadline = match self.failsafe.filter(|until| now < *until) {
            Some(until) => Some(timing.deadline(until)),
            None => Some(self.deadline.map_or(fence_by, |deadline| deadline.sooner(fence_by))),
        };
    }

    /// Nothing is left that could write.
    fn clear(&mut self) {
        self.leading = false;
        // An agent that has just started and leaves at once also leaves the leader's address.
        self.serving = Some(false);
        self.bootstrapping = false;
        self.failsafe = None;
        self.deadline = None;
    }
}

/// The settings that the keeper depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// Length of the lease to ask for.
    pub ttl: Duration,
    /// Longest pause between renewals.
    pub loop_wait: Duration,
    /// Nobody is fenced: an operator has taken over.
    pub pause: bool,
}

impl Timing {
    /// Time between renewals: several tries fit into a lease, and an idle cluster is left in peace. Who leads nothing has only
    /// its member key to lose, and half as many will do.
    fn pace(&self, writes: bool) -> Duration {
        let parts = if writes { 10 } else { 5 };
        (self.ttl / parts).clamp(Duration::from_millis(200), self.loop_wait.max(Duration::from_millis(200)))
    }

    /// How long before the lease's end PostgreSQL is fenced: long enough for SIGQUIT, SIGKILL and the reaping.
    fn fence_margin(&self) -> Duration {
        (self.ttl / 10).clamp(Duration::from_millis(300), Duration::from_secs(2))
    }

    /// The deadline of a lease that ends at `until`.
    fn deadline(&self, until: Instant) -> Deadline {
        let margin = self.fence_margin();
        Deadline { fence_at: until - margin, kill_at: until - margin / 2, until }
    }

    /// When the leader's address is given up: after the server was killed, whose clients see its end.
    fn address_until(&self, until: Instant) -> Instant {
        until - self.fence_margin() / 4
    }

    /// The deadline of a right that is lost, with time left until `fence_at` to stop in order.
    fn deadline_from(&self, fence_at: Instant) -> Deadline {
        self.deadline(fence_at + self.fence_margin())
    }
}

/// The loop's side of the keeper.
#[derive(Debug, Clone)]
pub struct LeaseHandle {
    session: watch::Sender<Session>,
    timing: watch::Sender<Timing>,
    beat: watch::Sender<Instant>,
    guard: Arc<dyn Guard>,
}

impl LeaseHandle {
    /// What is held now.
    pub fn session(&self) -> Session {
        self.session.borrow().clone()
    }

    /// Notified of every change.
    pub fn subscribe(&self) -> watch::Receiver<Session> {
        self.session.subscribe()
    }

    /// New settings.
    pub fn set_timing(&self, timing: Timing) {
        if self.timing.send_if_modified(|old| std::mem::replace(old, timing) != timing) {
            self.change(|_| false);
        }
    }

    /// Ends a pause as soon as the DCS says that it is over. The loop may be waiting for a server that does not answer, and
    /// until it looks again nothing would be fenced here while somebody else is elected.
    pub async fn hear_of_ends_of_pauses(self, mut knowledge: watch::Receiver<Knowledge>) {
        while knowledge.changed().await.is_ok() {
            let over =
                knowledge.borrow_and_update().view.as_ref().is_some_and(|view| {
                    view.config.is_some() && !view.unknown.contains("config") && !view.settings.pause
                });
            let timing = *self.timing.borrow();
            if over && timing.pause {
                self.set_timing(Timing { pause: false, ..timing });
            }
        }
    }

    /// Every change of what is held goes through here, so that the guard always has the newest deadline. `change` says
    /// whether others have to know.
    fn change(&self, change: impl FnOnce(&mut Session) -> bool) {
        self.session.send_if_modified(|session| {
            let tell = change(session);
            // An operator who has taken over is not interfered with.
            let deadline = session.deadline.filter(|_| !self.timing.borrow().pause);
            match deadline {
                Some(deadline) => self.guard.arm(deadline),
                None => self.guard.disarm(),
            }
            // In a pause as well: the key is what it hangs on.
            if let Some(serving) = session.serving {
                let until = session.leader_until().filter(|_| serving);
                self.guard.hold_address(until.map(|until| self.timing.borrow().address_until(until)));
            }
            tell
        });
    }

    /// Whether a server here may take writes now: the key or the right to make a cluster is ours with time left, or an
    /// operator has taken over.
    pub fn may_write(&self, now: Instant) -> bool {
        self.timing.borrow().pause || self.session().writes_until().is_some_and(|until| now < until)
    }

    /// Returns when a server here must not take writes (any more).
    pub async fn must_not_write<C: Clock>(&self, clock: &C) {
        let mut session = self.subscribe();
        loop {
            let until = session.borrow_and_update().writes_until();
            if !self.may_write(clock.now()) {
                return;
            }
            // Without an end the operator is in charge: looked at again now and then.
            let until = until.filter(|until| *until > clock.now()).unwrap_or(clock.now() + Duration::from_secs(1));
            tokio::select! {
                biased;
                _ = session.changed() => {}
                () = clock.sleep_until(until) => {}
            }
        }
    }

    /// The loop is alive.
    pub fn beat(&self, now: Instant) {
        self.beat.send_replace(now);
    }

    /// The server here takes writes for the cluster, or does not.
    pub fn serve(&self, serving: bool) {
        if self.session().serving != Some(serving) {
            self.change(|session| {
                session.serving = Some(serving);
                false
            });
        }
    }

    /// The leader key was created or found with our lease `id`, which `proven` (a request answered) or a renewal since
    /// then has shown to be alive. False if the lease was lost meanwhile: then nothing is held.
    pub fn lead(&self, lease: Lease) -> bool {
        self.hold(lease, |session| {
            session.leading = true;
            session.bootstrapping = false;
        })
    }

    /// The right to make a new cluster is ours with this lease: its server may take writes as long as the lease lives.
    /// False if the lease was lost meanwhile.
    pub fn bootstrap(&self, lease: Lease) -> bool {
        self.hold(lease, |session| session.bootstrapping = true)
    }

    fn hold(&self, lease: Lease, how: impl FnOnce(&mut Session)) -> bool {
        let timing = *self.timing.borrow();
        let mut held = false;
        self.change(|session| {
            let Some(current) = session.lease.filter(|current| current.id == lease.id) else { return false };
            let before = session.clone();
            how(session);
            session.deadline =
                Some(timing.deadline(session.failsafe.max(Some(current.until)).unwrap_or(current.until)));
            held = true;
            *session != before
        });
        held
    }

    /// Everybody who could take the leader key has promised not to before `until`. False if leadership is over already, or
    /// so nearly that PostgreSQL is being fenced: then the promises came too late.
    pub fn prolong(&self, now: Instant, until: Instant) -> bool {
        let timing = *self.timing.borrow();
        let mut prolonged = false;
        self.change(|session| {
            let leads = session.leader_until().is_some_and(|end| now < end);
            if !leads || session.deadline.is_none_or(|deadline| deadline.fence_at <= now) {
                return false;
            }
            session.failsafe = session.failsafe.max(Some(until));
            session.deadline = session.leader_until().map(|end| timing.deadline(end));
            prolonged = true;
            true
        });
        prolonged
    }

    /// The leader key has been shown not to be ours: PostgreSQL is fenced shortly, unless the loop is faster.
    pub fn disown(&self, now: Instant) {
        let timing = *self.timing.borrow();
        self.change(|session| {
            if !session.leading {
                return false;
            }
            error!("not the leader any more: the leader key is not ours");
            session.lose(now, timing.deadline_from(now + timing.fence_margin()), timing);
            true
        });
    }

    /// Somebody else certainly leads, whatever was promised: PostgreSQL is fenced shortly, unless the loop is faster.
    pub fn depose(&self, now: Instant) {
        let timing = *self.timing.borrow();
        self.change(|session| {
            session.failsafe = None;
            session.lose(now, timing.deadline_from(now + timing.fence_margin()), timing);
            true
        });
    }

    /// Forgets a lease under which a request may still be carried out that must not hit what is won later: the next one is
    /// another lease. This one runs out.
    pub fn abandon(&self, lease: LeaseId) {
        self.change(|session| session.lease.take_if(|current| current.id == lease).is_some());
    }

    /// PostgreSQL could not be stopped: leadership is given up with its lease, which runs out unless somebody else has use
    /// for it, and the keeper goes on fencing.
    pub fn forsake(&self, now: Instant) {
        let timing = *self.timing.borrow();
        self.change(|session| {
            if !session.leading {
                return false;
            }
            session.failsafe = None;
            session.lose(now, timing.deadline_from(now), timing);
            session.lease = None;
            true
        });
    }

    /// PostgreSQL can't write any more (or never could): the key is given up, and there is nothing left to fence.
    pub fn resign(&self) {
        self.change(|session| {
            let held = session.leading || session.deadline.is_some();
            session.clear();
            held
        });
    }
}

/// Pause after a renewal that got no answer.
const RETRY: Duration = Duration::from_millis(100);

/// A leader's keeper looks at the clock at least this often.
const LONGEST_NAP: Duration = Duration::from_millis(250);

/// What the keeper can do to PostgreSQL: only this.
pub trait Fence: Send + Sync + 'static {
    /// Returns once nothing is left that could write, within `limit`.
    fn fence(&self, limit: Duration) -> impl Future<Output = Result<(), PgError>> + Send;
}

impl<P: Postgres> Fence for P {
    fn fence(&self, limit: Duration) -> impl Future<Output = Result<(), PgError>> + Send {
        Postgres::fence(self, limit)
    }
}

/// Renews and fences. See the module.
pub struct Keeper<D, F, C> {
    store: ClusterStore<D>,
    postgres: F,
    clock: C,
    name: MemberName,
    handle: LeaseHandle,
}

impl<D: Dcs, F: Fence, C: Clock> Keeper<D, F, C> {
    /// Starts it; it ends when `stop` says so or its sender is gone.
    pub fn spawn(
        store: ClusterStore<D>,
        postgres: F,
        clock: C,
        name: MemberName,
        timing: Timing,
        guard: Arc<dyn Guard>,
        mut stop: watch::Receiver<bool>,
    ) -> LeaseHandle {
        let session = Session { deadline: guard.deadline(), ..Session::default() };
        let handle = LeaseHandle {
            session: watch::Sender::new(session),
            timing: watch::Sender::new(timing),
            beat: watch::Sender::new(clock.now()),
            guard,
        };
        let keeper = Self { store, postgres, clock: clock.clone(), name, handle: handle.clone() };
        clock.spawn(async move {
            tokio::select! {
                biased;
                () = keeper.run() => {}
                _ = stop.wait_for(|stop| *stop) => {}
            }
        });
        handle
    }

    async fn run(self) {
        let mut timing_changed = self.handle.timing.subscribe();
        let mut session_changed = self.handle.session.subscribe();
        // When the last renewal ended, and whether it was answered. `None`: the next is due.
        let mut renewed: Option<(Instant, bool)> = None;
        let mut stuck = false;
        let mut asked = Duration::ZERO;
        loop {
            let timing = *timing_changed.borrow_and_update();
            let session = session_changed.borrow_and_update().clone();
            let fence_at = session.deadline.map(|deadline| deadline.fence_at).filter(|_| !timing.pause);
            let now = self.clock.now();
            let renew_at = match renewed {
                None => now,
                Some((at, true)) if session.lease.is_some() => at + timing.pace(session.writes()),
                Some((at, _)) => at + RETRY,
            };
            if fence_at.is_some_and(|at| at <= now) {
                self.fence(timing).await;
                continue;
            }
            if now >= renew_at {
                let alive = now.since(*self.handle.beat.borrow()) < timing.ttl.max(timing.loop_wait * 2);
                if !alive && !stuck {
                    error!("the HA loop has not moved for {:?}; the lease is not renewed any more", timing.ttl);
                }
                stuck = !alive;
                // A renewal that hangs must not delay the fence, nor that of a leader which becomes one meanwhile.
                let would_fence = session.lease.map(|lease| lease.until - timing.fence_margin()).filter(|at| *at > now);
                let give_up = fence_at.or(would_fence).unwrap_or(now + timing.ttl);
                let answered = !stuck
                    && tokio::select! {
                        biased;
                        answered = self.renew(timing, &mut asked) => answered,
                        () = self.clock.sleep_until(give_up) => false,
                    };
                // Settings that came meanwhile are not in what was just asked for.
                let current = !timing_changed.has_changed().unwrap_or(false);
                renewed = current.then(|| (self.clock.now(), answered));
                continue;
            }
            let mut wake = fence_at.map_or(renew_at, |at| at.min(renew_at));
            if fence_at.is_some() {
                // Timers stand still while the host sleeps and the lease doesn't: look often enough after waking up.
                wake = wake.min(now + LONGEST_NAP);
            }
            tokio::select! {
                biased;
                () = self.clock.sleep_until(wake) => {}
                _ = timing_changed.changed() => renewed = None,
                _ = session_changed.changed() => {}
            }
        }
    }

    /// One proof: the lease lives, and while leading the key is ours and attached to it. True if the DCS answered.
    /// `asked` is the length that the lease was asked for with: the store may grant more, and asking again for the same
    /// would not change it.
    async fn renew(&self, timing: Timing, asked: &mut Duration) -> bool {
        let session = self.handle.session();
        // The right to bootstrap hangs on one lease, and can't be moved to another.
        let renewed = match session.lease.filter(|_| *asked == timing.ttl || session.bootstrapping) {
            Some(lease) => self.store.renew(lease.id).await,
            None => self.store.grant(timing.ttl).await.map(|lease| (lease, None)),
        };
        let (lease, leader) = match renewed {
            Ok(renewed) => renewed,
            Err(DcsError::LeaseLost) => {
                self.lost("the lease is gone", Duration::ZERO);
                self.handle.change(|session| session.lease.take().is_some());
                // Not answered in the sense of a proof: a new lease is asked for at once.
                return false;
            }
            Err(error) => return self.trouble(&error),
        };
        let other_lease = session.lease.map(|old| old.id) != Some(lease.id);
        if session.leading && other_lease {
            // From here on the key may hang on either of them, also when the answer that says so gets lost.
            self.handle.change(|session| {
                let Some(old) = session.lease.as_mut().filter(|_| session.leading) else { return false };
                old.until = old.until.min(lease.until);
                session.deadline = session.leader_until().map(|end| timing.deadline(end));
                true
            });
        }
        if session.leading && !leader.is_some_and(|key| key.is(self.name.as_str(), lease.id)) {
            match self.store.confirm_leader(&self.name, lease.id).await {
                Ok(Outcome::Done(_)) => {}
                Ok(Outcome::Conflict) => {
                    // Somebody removed or took the key though the lease lives. The loop may race for it again, but
                    // not for long: whoever has the key may promote now.
                    self.lost("the leader key is not ours any more", timing.fence_margin());
                }
                Err(error) => return self.trouble(&error),
            }
        }
        let (wrote_before, before) = (session.writes(), session.lease);
        self.handle.change(|session| {
            let told = other_lease || session.trouble.is_some();
            if session.trouble.take().is_some() {
                info!("the DCS answers again");
            }
            if session.lease.is_none() && before.is_some() {
                // Abandoned meanwhile: another one is asked for next time.
                return told;
            }
            if other_lease && session.writes() && !wrote_before {
                // The loop began to lead meanwhile, and the key hangs on the lease that there was: the next renewal
                // moves it.
                return told;
            }
            if other_lease {
                *asked = timing.ttl;
            }
            session.lease = Some(lease);
            if session.writes() {
                session.deadline = Some(timing.deadline(session.leader_until().unwrap_or(lease.until)));
            }
            told
        });
        true
    }

    fn trouble(&self, error: &DcsError) -> bool {
        self.handle.session.send_if_modified(|session| {
            let new = session.trouble.is_none();
            if new {
                warn!("the lease could not be renewed: {error}");
            }
            session.trouble = Some(error.to_string());
            new
        });
        false
    }

    /// Leadership has been lost from outside: PostgreSQL is fenced within `grace`, unless the loop is faster.
    fn lost(&self, why: &str, grace: Duration) {
        let timing = *self.handle.timing.borrow();
        let now = self.clock.now();
        self.handle.change(|session| {
            if !session.writes() {
                return false;
            }
            error!("not the leader any more: {why}");
            session.lose(now, timing.deadline_from(now + grace), timing);
            true
        });
    }

    async fn fence(&self, timing: Timing) {
        error!("fencing PostgreSQL: the leader key can't be proven to be ours, and its lease ends");
        if let Err(error) = self.postgres.fence(timing.fence_margin()).await {
            error!("PostgreSQL could not be fenced, trying again: {error}");
            return;
        }
        self.handle.change(|session| {
            session.clear();
            session.fenced += 1;
            true
        });
    }
}

#[cfg(test)]
mod tests;
