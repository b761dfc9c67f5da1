//! Replication slots (ha-loop §16.2). Which ones there shall be is decided elsewhere.
//!
//! Physical slots are a query each. A logical slot is made by waiting for running transactions and moved by decoding, so
//! that goes on beside; a standby gets it as a copy (`copy`), with the WAL that it needs (`wal`).

mod copy;
mod wal;

pub use copy::may_be_copied;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde_json::{Map, Value};
use tokio::task::JoinHandle;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use trunkline_common::Lsn;
use trunkline_config::tags;

use super::instance::Instance;
use super::{PgError, SlotKind, SlotPlan, SlotsDone, query};

/// The bound on all of it.
const LIMIT: Duration = Duration::from_secs(10);

/// The bound on one logical slot's way: a standby that was away for long has much to decode.
const DECODE_LIMIT: Duration = Duration::from_secs(3600);

/// A slot as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// What it is.
    pub kind: SlotKind,
    /// Somebody streams from it.
    pub active: bool,
    /// From where on it keeps WAL; `None`: it has never been used.
    pub restart: Option<Lsn>,
    /// Logical: what its reader has confirmed.
    pub confirmed: Option<Lsn>,
    /// Holds back vacuum: left over from a standby with hot_standby_feedback.
    pub has_xmin: bool,
    /// `wal_status = lost`: useless for ever.
    pub lost: bool,
    /// PostgreSQL 17 copies it to standbys itself; not such a copy, those are not listed.
    pub failover: bool,
}

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Not wanted, or of no use any more.
    Drop(String),
    /// A physical one; it keeps WAL at once.
    Create(String),
    /// It keeps WAL from there on only, or from the end of what this server has.
    Advance(String, Lsn),
    /// Work on a logical one.
    Decode(Job),
    /// Only the primary has it.
    Missing(String),
    /// Not wanted, but in use: it can't be dropped yet.
    InUse(String),
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Step::Drop(name) => write!(f, "dropping replication slot {name}"),
            Step::Create(name) => write!(f, "creating replication slot {name}"),
            Step::Advance(name, to) => write!(f, "moving replication slot {name} to {to}"),
            Step::Decode(job) => write!(f, "working on logical replication slot {} in {}", job.slot, job.database),
            Step::Missing(name) => write!(f, "replication slot {name} is on the primary only"),
            Step::InUse(name) => write!(f, "replication slot {name} is not wanted, but in use"),
        }
    }
}

/// What takes long, in a database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    /// The slot's name.
    pub slot: String,
    /// Where it is.
    pub database: String,
    /// What is done with it.
    pub work: Work,
}

/// What is done with a logical slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Work {
    /// It is made, on a primary.
    Create {
        /// Its output plugin.
        plugin: String,
    },
    /// It is moved up to there, on a standby.
    Advance(Lsn),
}

/// Logical slots that are being worked on.
#[derive(Debug, Default)]
pub struct Decoding {
    running: Option<JoinHandle<()>>,
    /// Those that can't be moved any more: the WAL is gone, or they were invalidated.
    broken: BTreeSet<String>,
    /// WAL is being fetched for slots that are to be copied.
    fetching: Option<JoinHandle<()>>,
}

/// What leads from the slots there are to those wanted. `standby` has the position that it has replayed.
pub fn steps(present: &BTreeMap<String, Slot>, plan: &SlotPlan, standby: Option<Lsn>) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut there = BTreeSet::new();
    for (name, slot) in present {
        if slot.failover && standby.is_some() && plan.may_clean {
            // From the time as primary: PostgreSQL copies the new primary's only where none of that name is in the way.
            steps.push(if slot.active { Step::InUse(name.clone()) } else { Step::Drop(name.clone()) });
            continue;
        }
        let Some(wanted) = plan.wanted.get(name) else {
            let ours = plan.known.as_ref().is_none_or(|known| known.contains(name));
            let spared = plan.spares && slot.kind == SlotKind::Physical;
            if ours && !spared && plan.may_drop && !slot.failover && !is_ignored(&plan.ignored, name, slot) {
                steps.push(if slot.active { Step::InUse(name.clone()) } else { Step::Drop(name.clone()) });
            }
            continue;
        };
        if slot.active {
            // It moves by itself.
            there.insert(name);
            continue;
        }
        let lost = slot.lost && plan.may_drop && !is_ignored(&plan.ignored, name, slot);
        let physical = slot.kind == SlotKind::Physical;
        // Nobody streams from it here, so an xmin is left over and holds back vacuum for ever.
        let holds_back = physical && slot.has_xmin && wanted.in_use == Some(false) && plan.may_clean;
        let moves = physical && wanted.in_use != Some(true) && !slot.has_xmin;
        if slot.kind != wanted.kind || lost || holds_back || moves && slot.restart.is_none() {
            steps.push(Step::Drop(name.clone()));
            continue;
        }
        there.insert(name);
        match (wanted.position, &wanted.kind, standby) {
            (Some(to), SlotKind::Physical, _) if moves && slot.restart.is_some_and(|at| at < to) => {
                steps.push(Step::Advance(name.clone(), to));
            }
            (Some(to), SlotKind::Logical { database, .. }, Some(replayed)) => {
                let to = to.min(replayed);
                if slot.confirmed.is_some_and(|at| at < to) {
                    let (slot, database) = (name.clone(), database.clone());
                    steps.push(Step::Decode(Job { slot, database, work: Work::Advance(to) }));
                }
            }
            _ => {}
        }
    }
    for (name, wanted) in plan.wanted.iter().filter(|(name, _)| !there.contains(name)) {
        match (&wanted.kind, standby) {
            (SlotKind::Physical, _) => steps.push(Step::Create(name.clone())),
            (SlotKind::Logical { database, plugin }, None) => {
                let work = Work::Create { plugin: plugin.clone() };
                steps.push(Step::Decode(Job { slot: name.clone(), database: database.clone(), work }));
            }
            // Without a position the primary does not have it either.
            (SlotKind::Logical { .. }, Some(_)) if wanted.position.is_some() => {
                steps.push(Step::Missing(name.clone()));
            }
            (SlotKind::Logical { .. }, Some(_)) => {}
        }
    }
    steps
}

/// Whether a matcher of `ignore_slots` is about this slot: of its four fields those that say something must fit. One that is
/// null or empty says nothing, and neither does any other field, as with Patroni.
fn is_ignored(matchers: &[Map<String, Value>], name: &str, slot: &Slot) -> bool {
    let (kind, database, plugin) = match &slot.kind {
        SlotKind::Physical => ("physical", None, None),
        SlotKind::Logical { database, plugin } => ("logical", Some(database.as_str()), Some(plugin.as_str())),
    };
    let fields = [("name", Some(name)), ("type", Some(kind)), ("database", database), ("plugin", plugin)];
    let fits = |matcher: &Map<String, Value>| {
        fields.iter().all(|(field, actual)| {
            let wanted = matcher.get(*field).filter(|wanted| tags::truthy(wanted));
            wanted.is_none_or(|wanted| actual.is_some_and(|actual| wanted == actual))
        })
    };
    matchers.iter().any(fits)
}

impl Instance {
    pub(super) async fn apply_slots(&self, plan: SlotPlan) -> Result<SlotsDone, PgError> {
        if self.rewrite(|managed| managed.feedback = plan.feedback)?
            && let Some(postmaster) = self.process().find()
        {
            tracing::info!(
                "hot_standby_feedback is {} for logical slots",
                if plan.feedback { "on" } else { "not forced" }
            );
            self.reload(&postmaster);
        }
        let work = async {
            let session = self.session(LIMIT).await?;
            let client = session.client();
            let standby = replayed(client).await?;
            let present = present(client, self.version()).await?;
            let mut done = SlotsDone::default();
            let mut jobs = Vec::new();
            let mut failure = None;
            // Each by itself: one that is in use must not keep the others from being made.
            for step in steps(&present, &plan, standby) {
                let carried_out = match &step {
                    Step::Missing(name) => {
                        done.missing.insert(name.clone());
                        continue;
                    }
                    Step::Decode(job) => {
                        jobs.push(job.clone());
                        continue;
                    }
                    Step::InUse(_) => {
                        tracing::debug!("{step}");
                        done.again = true;
                        continue;
                    }
                    step => carry_out(client, step).await,
                };
                // Made where the last checkpoint began, which may be behind where it is wanted.
                if let Step::Create(name) = &step {
                    done.again |= plan.wanted.get(name).is_some_and(|slot| slot.position.is_some());
                }
                match carried_out {
                    // As often as once a turn.
                    Ok(()) if matches!(step, Step::Advance(..)) => tracing::debug!("{step}"),
                    Ok(()) => tracing::info!("{step}"),
                    Err(error) => {
                        tracing::warn!("{step}: {error}");
                        failure = Some(error);
                    }
                }
            }
            done.missing.extend(self.without_wal(&present, &plan, standby).await?);
            done.again |= !jobs.is_empty() || !done.missing.is_empty();
            let broken = self.decode(jobs);
            if standby.is_some() {
                done.missing.extend(broken.into_iter().filter(|name| plan.wanted.contains_key(name)));
            }
            failure.map_or(Ok(done), Err)
        };
        let timeout = PgError::Timeout { what: "changing slots".to_owned(), limit: LIMIT };
        tokio::time::timeout(LIMIT, work).await.unwrap_or(Err(timeout))
    }

    /// Those of a standby's logical slots that are of no use here: copies from before the agent looked at their WAL.
    async fn without_wal(
        &self,
        present: &BTreeMap<String, Slot>,
        plan: &SlotPlan,
        standby: Option<Lsn>,
    ) -> Result<Vec<String>, PgError> {
        let Some(replayed) = standby else {
            self.stop_fetching_wal();
            return self.in_pool(|instance| instance.forget_fetched_wal().map(|()| Vec::new())).await;
        };
        let logical = |name: &String, slot: &Slot| slot.kind != SlotKind::Physical && plan.wanted.contains_key(name);
        let slots = present.iter().filter(|(name, slot)| logical(name, slot) && !slot.active);
        let slots: Vec<_> = slots.filter_map(|(name, slot)| Some((name.clone(), slot.restart?))).collect();
        if slots.is_empty() {
            return Ok(Vec::new());
        }
        self.in_pool(move |instance| {
            let mut without = Vec::new();
            for (name, restart) in slots {
                if !instance.lacking_wal(restart, replayed, false)?.is_empty() {
                    without.push(name);
                }
            }
            Ok(without)
        })
        .await
    }

    /// Begins with these, unless others are under way; the names of those that have turned out to be broken.
    fn decode(&self, jobs: Vec<Job>) -> BTreeSet<String> {
        let mut decoding = self.inner.decoding.lock();
        let busy = decoding.running.as_ref().is_some_and(|running| !running.is_finished());
        if !busy && !jobs.is_empty() {
            let instance = self.clone();
            decoding.running = Some(tokio::spawn(async move {
                for job in jobs {
                    instance.decode_one(&job).await;
                }
            }));
        }
        std::mem::take(&mut decoding.broken)
    }

    async fn decode_one(&self, job: &Job) {
        let (config, pid_file) = (self.config_now(), self.pid_file());
        let work = async {
            let connection = query::connect_to(&job.database, &config, pid_file.as_ref(), DECODE_LIMIT).await?;
            let client = &connection.client;
            let done = match &job.work {
                Work::Create { plugin } => {
                    let create = "SELECT pg_create_logical_replication_slot($1, $2)
                        WHERE NOT EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = $1)";
                    client.execute(create, &[&job.slot, plugin]).await
                }
                Work::Advance(to) => {
                    let advance = "SELECT pg_replication_slot_advance($1, $2::text::pg_lsn)";
                    client.execute(advance, &[&job.slot, &to.to_string()]).await
                }
            };
            Ok::<_, query::ConnectError>(done.map(drop)?)
        };
        let error = match tokio::time::timeout(DECODE_LIMIT, work).await {
            Ok(Ok(())) => {
                tracing::debug!("slot: {job:?}");
                return;
            }
            Ok(Err(error)) => error,
            Err(_) => {
                tracing::warn!("slot: {job:?}: not done within {DECODE_LIMIT:?}");
                return;
            }
        };
        let gone = [SqlState::UNDEFINED_FILE, SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE];
        if let (query::ConnectError::Server(error), Work::Advance(_)) = (&error, &job.work)
            && error.code().is_some_and(|code| gone.contains(code))
        {
            self.inner.decoding.lock().broken.insert(job.slot.clone());
        }
        tracing::warn!("slot: {job:?}: {error}");
    }
}

/// What a standby has replayed; `None` for a primary.
async fn replayed(client: &Client) -> Result<Option<Lsn>, PgError> {
    let text = "SELECT CASE WHEN pg_is_in_recovery() THEN coalesce(pg_last_wal_replay_lsn(), '0/0') END::text";
    let row = client.query_one(text, &[]).await.map_err(query::failed)?;
    let text: Option<String> = row.try_get(0).map_err(query::failed)?;
    Ok(text.and_then(|lsn| lsn.parse().ok()))
}

async fn present(client: &Client, version: u32) -> Result<BTreeMap<String, Slot>, PgError> {
    let lost = if version >= 13 { "coalesce(wal_status = 'lost', false)" } else { "false" };
    let (failover, synced) = if version >= 17 { ("failover", "NOT (failover AND synced)") } else { ("false", "true") };
    let text = format!(
        "SELECT slot_name::text, active, restart_lsn::text, xmin IS NOT NULL, {lost},
                database::text, plugin::text, confirmed_flush_lsn::text, {failover}
           FROM pg_replication_slots WHERE NOT temporary AND {synced}"
    );
    let rows = client.query(&text, &[]).await.map_err(query::failed)?;
    let slot = |row: &tokio_postgres::Row| {
        let lsn = |at: usize| Ok(row.try_get::<_, Option<String>>(at)?.and_then(|lsn| lsn.parse().ok()));
        let kind = match (row.try_get(5)?, row.try_get(6)?) {
            (Some(database), Some(plugin)) => SlotKind::Logical { database, plugin },
            _ => SlotKind::Physical,
        };
        let slot = Slot {
            kind,
            active: row.try_get(1)?,
            restart: lsn(2)?,
            confirmed: lsn(7)?,
            has_xmin: row.try_get(3)?,
            lost: row.try_get(4)?,
            failover: row.try_get(8)?,
        };
        Ok((row.try_get(0)?, slot))
    };
    rows.iter().map(slot).collect::<Result<_, _>>().map_err(query::failed)
}

async fn carry_out(client: &Client, step: &Step) -> Result<(), PgError> {
    match step {
        // Only where it isn't there: the list may be older than a create beside us. WAL is kept from now on.
        Step::Create(name) => client.execute("SELECT pg_create_physical_replication_slot($1, true)", &[name]).await,
        // Somebody may have connected since the list was read; then it goes once its user does.
        Step::Drop(name) => {
            let drop = "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots
                WHERE slot_name = $1 AND NOT active";
            client.execute(drop, &[name]).await
        }
        Step::Advance(name, to) => {
            // Never past what this server has; on a standby that is what it has replayed.
            let advance = "SELECT pg_replication_slot_advance($1, least($2::text::pg_lsn,
                CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_flush_lsn() END))";
            client.execute(advance, &[name, &to.to_string()]).await
        }
        Step::Decode(_) | Step::Missing(_) | Step::InUse(_) => return Ok(()),
    }
    .map(drop)
    .map_err(query::failed)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::postgres::WantedSlot;

    fn logical() -> SlotKind {
        SlotKind::Logical { database: "d".into(), plugin: "p".into() }
    }

    fn slot(kind: SlotKind) -> Slot {
        let confirmed = (kind != SlotKind::Physical).then_some(Lsn(10));
        Slot { kind, active: false, restart: Some(Lsn(10)), confirmed, has_xmin: false, lost: false, failover: false }
    }

    fn planned(present: Option<Slot>, wanted: Option<WantedSlot>, standby: Option<u64>, plan: &SlotPlan) -> Vec<Step> {
        let present = present.map(|slot| ("a".to_owned(), slot)).into_iter().collect();
        let wanted = wanted.map(|wanted| ("a".to_owned(), wanted)).into_iter().collect();
        steps(&present, &SlotPlan { wanted, ..plan.clone() }, standby.map(Lsn))
    }

    #[test]
    fn physical_slots() {
        let free = slot(SlotKind::Physical);
        let busy = Slot { active: true, ..free.clone() };
        let left = Slot { has_xmin: true, ..free.clone() };
        let want = |position: Option<u64>, in_use| {
            Some(WantedSlot { kind: SlotKind::Physical, position: position.map(Lsn), in_use })
        };
        let (create, drop) = (Step::Create("a".into()), Step::Drop("a".into()));
        let plan = SlotPlan { may_drop: true, may_clean: true, ..SlotPlan::default() };
        for (what, present, wanted, expected) in [
            ("missing", None, want(None, None), vec![create.clone()]),
            ("not wanted", Some(free.clone()), None, vec![drop.clone()]),
            ("there", Some(free.clone()), want(None, None), vec![]),
            ("behind", Some(free.clone()), want(Some(20), None), vec![Step::Advance("a".into(), Lsn(20))]),
            ("ahead", Some(free.clone()), want(Some(5), None), vec![]),
            ("its user is away", Some(free.clone()), want(Some(20), Some(true)), vec![]),
            ("in use", Some(busy.clone()), want(Some(20), None), vec![]),
            ("in use, not wanted", Some(busy), None, vec![Step::InUse("a".into())]),
            ("lost", Some(Slot { lost: true, ..free.clone() }), want(None, None), vec![drop.clone(), create.clone()]),
            ("left over xmin", Some(left.clone()), want(Some(5), Some(false)), vec![drop.clone(), create.clone()]),
            ("xmin of who knows whom", Some(left.clone()), want(Some(20), None), vec![]),
            ("xmin of a standby", Some(left), want(None, Some(true)), vec![]),
            ("keeps nothing", Some(Slot { restart: None, ..free }), want(None, None), vec![drop, create]),
        ] {
            assert_eq!(planned(present, wanted, None, &plan), expected, "{what}");
        }
    }

    #[test]
    fn logical_slots() {
        let want =
            |position: Option<u64>| Some(WantedSlot { kind: logical(), position: position.map(Lsn), in_use: None });
        let job = |work| Step::Decode(Job { slot: "a".into(), database: "d".into(), work });
        let (drop, missing) = (Step::Drop("a".into()), Step::Missing("a".into()));
        let create = job(Work::Create { plugin: "p".into() });
        let plan = SlotPlan { may_drop: true, may_clean: true, ..SlotPlan::default() };
        let there = slot(logical());
        let busy = Slot { active: true, ..there.clone() };
        for (what, present, wanted, standby, expected) in [
            ("missing on the primary", None, want(None), None, vec![create.clone()]),
            ("missing on a standby", None, want(Some(9)), Some(99), vec![missing.clone()]),
            ("nowhere yet", None, want(None), Some(99), vec![]),
            ("on the primary its reader moves it", Some(there.clone()), want(Some(20)), None, vec![]),
            ("behind", Some(there.clone()), want(Some(20)), Some(99), vec![job(Work::Advance(Lsn(20)))]),
            ("not past replay", Some(there.clone()), want(Some(20)), Some(15), vec![job(Work::Advance(Lsn(15)))]),
            ("up to date", Some(there.clone()), want(Some(20)), Some(10), vec![]),
            ("being moved", Some(busy), want(Some(20)), Some(99), vec![]),
            ("another kind", Some(slot(SlotKind::Physical)), want(Some(9)), Some(99), vec![drop.clone(), missing]),
            (
                "another kind on the primary",
                Some(slot(SlotKind::Physical)),
                want(None),
                None,
                vec![drop.clone(), create],
            ),
            ("not wanted", Some(there.clone()), None, Some(99), vec![drop.clone()]),
            ("PostgreSQL's own on the primary", Some(Slot { failover: true, ..there.clone() }), None, None, vec![]),
            ("left over from a primary", Some(Slot { failover: true, ..there }), None, Some(99), vec![drop]),
        ] {
            assert_eq!(planned(present, wanted, standby, &plan), expected, "{what}");
        }
        // Before somebody else leads this node may yet lead again.
        let own = Slot { failover: true, ..slot(logical()) };
        let nobody_leads = SlotPlan { may_clean: false, ..plan };
        assert_eq!(planned(Some(own), None, Some(99), &nobody_leads), vec![]);
    }

    #[test]
    fn slots_of_members_that_may_come_back_stay() {
        let spares = SlotPlan { may_drop: true, spares: true, ..SlotPlan::default() };
        assert_eq!(planned(Some(slot(SlotKind::Physical)), None, None, &spares), vec![]);
        assert_eq!(planned(Some(slot(logical())), None, None, &spares), vec![Step::Drop("a".into())]);
    }

    #[test]
    fn what_may_be_dropped() {
        let drop = vec![Step::Drop("a".into())];
        let may = SlotPlan { may_drop: true, ..SlotPlan::default() };
        let known = |names: &[&str]| Some(names.iter().map(|name| (*name).to_owned()).collect());
        let ignored = |matcher: Value| matcher.as_object().cloned().into_iter().collect();
        for (what, plan, expected) in [
            ("paused", SlotPlan::default(), vec![]),
            ("everything", may.clone(), drop.clone()),
            ("what was wanted before", SlotPlan { known: known(&["a"]), ..may.clone() }, drop.clone()),
            ("what somebody made meanwhile", SlotPlan { known: known(&["b"]), ..may.clone() }, vec![]),
            ("by name", SlotPlan { ignored: ignored(json!({ "name": "a" })), ..may.clone() }, vec![]),
            (
                "by all of it",
                SlotPlan {
                    ignored: ignored(json!({ "type": "logical", "plugin": "p", "database": "d" })),
                    ..may.clone()
                },
                vec![],
            ),
            (
                "fields that say nothing",
                SlotPlan {
                    ignored: ignored(json!({ "name": "a", "database": null, "plugin": "", "owner": "x" })),
                    ..may.clone()
                },
                vec![],
            ),
            (
                "no number is a name",
                SlotPlan { ignored: ignored(json!({ "name": "a", "plugin": 5 })), ..may.clone() },
                drop.clone(),
            ),
            (
                "another one's matcher",
                SlotPlan { ignored: ignored(json!({ "name": "a", "plugin": "q" })), ..may },
                drop,
            ),
        ] {
            assert_eq!(planned(Some(slot(logical())), None, Some(9), &plan), expected, "{what}");
        }
    }

    #[test]
    fn a_physical_slot_is_of_no_database() {
        let matcher = |value: Value| value.as_object().cloned().into_iter().collect::<Vec<_>>();
        for (value, ignored) in [
            (json!({ "type": "physical" }), true),
            (json!({ "database": "d" }), false),
            (json!({ "database": 5 }), false),
            (json!({}), true),
        ] {
            assert_eq!(is_ignored(&matcher(value.clone()), "a", &slot(SlotKind::Physical)), ignored, "{value}");
        }
    }
}
