//! Replication slots of a modelled server: physical ones that keep WAL, and logical ones that also say what their reader has
//! confirmed. Which there shall be is decided by the agent, step by step ([`steps`]).

use std::collections::{BTreeMap, BTreeSet};

use trunkline_agent::postgres::slots::{Job, Slot, Step, Work, may_be_copied, steps};
use trunkline_agent::postgres::{
    PgError, PgRole, Postgres, SlotKind, SlotPlan, SlotsDone, StopMode, Upstream, WantedSlot,
};
use trunkline_common::Lsn;

use crate::executor::ProcessId;
use crate::postgres::ModelPostgres;
use crate::scenario::End;
use crate::server::{Data, Server};
use crate::stage::host_of;
use crate::wal::{index, position};

/// The slot of some other program.
pub const FOREIGN_SLOT: &str = "theirs";

/// So many records stay in any case (`wal_keep_size`): some ten seconds of writes.
const WAL_KEPT: usize = 400;

/// Records that a logical slot keeps although its reader has them: transactions that were open then begin there.
const DECODED_ANEW: usize = 16;

/// A logical slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Logical {
    /// Unique in the world: a copy on another server is the same slot.
    pub made: u64,
    /// Its reader has confirmed the records before this one.
    pub confirmed: usize,
    /// The first record that it keeps.
    pub restart: usize,
}

impl Logical {
    /// Its reader has confirmed the records before this one.
    pub fn confirm(&mut self, end: usize) {
        self.confirmed = self.confirmed.max(end);
        self.restart = self.restart.max(self.confirmed.saturating_sub(DECODED_ANEW));
    }
}

impl Data {
    /// What a checkpoint now and then leaves: WAL that a slot holds back, and some more.
    pub fn remove_old_wal(&mut self) {
        if self.wal.len() > self.oldest + WAL_KEPT * 3 / 2 {
            let kept = self.slots.values().copied().chain(self.logical.values().map(|slot| slot.restart));
            let unneeded = kept.min().unwrap_or(usize::MAX);
            self.oldest = self.oldest.max(unneeded.min(self.wal.len() - WAL_KEPT));
        }
    }

    /// A new slot keeps WAL from the last checkpoint on.
    pub fn create_slot(&mut self, name: String) {
        let from = self.oldest.max(self.wal.len().saturating_sub(WAL_KEPT / 4));
        self.slots_since.entry(name.clone()).or_insert(from);
        self.slots.insert(name, from);
    }

    /// Whether what comes after the first `length` records could ever have been kept here for this slot.
    pub fn could_keep(&self, slot: &str, length: usize) -> bool {
        length >= self.copied_at.max(self.slots_since.get(slot).copied().unwrap_or_default())
    }

    /// Whether it has the logical slot, with the WAL that it needs.
    pub fn can_decode(&self, slot: &str) -> bool {
        self.logical.get(slot).is_some_and(|slot| slot.restart >= self.oldest)
    }

    /// pg_rewind and pg_basebackup leave no slot.
    pub fn forget_slots(&mut self) {
        self.slots.clear();
        self.slots_since.clear();
        self.logical.clear();
    }

    /// What `pg_replication_slots` has; `used`: those that somebody streams from.
    fn present(&self, used: &BTreeSet<String>, wanted: &BTreeMap<String, WantedSlot>) -> BTreeMap<String, Slot> {
        let slot = |name: &String, kind, restart: usize, confirmed: Option<usize>| Slot {
            kind,
            active: used.contains(name),
            restart: Some(position(restart)),
            confirmed: confirmed.map(position),
            has_xmin: false,
            lost: restart < self.oldest,
            failover: false,
        };
        // Every logical slot is of the one database, for the one plugin, that the settings name.
        let logical = |name: &String| match wanted.get(name).map(|wanted| &wanted.kind) {
            Some(kind @ SlotKind::Logical { .. }) => kind.clone(),
            _ => SlotKind::Logical { database: String::new(), plugin: String::new() },
        };
        let physical =
            self.slots.iter().map(|(name, from)| (name.clone(), slot(name, SlotKind::Physical, *from, None)));
        let read =
            |(name, at): (&String, &Logical)| (name.clone(), slot(name, logical(name), at.restart, Some(at.confirmed)));
        physical.chain(self.logical.iter().map(read)).collect()
    }

    /// Where its slots are, as a status has it.
    pub fn slot_positions(&self) -> BTreeMap<String, Lsn> {
        let logical = self.logical.iter().map(|(name, slot)| (name.clone(), position(slot.confirmed)));
        self.slots.iter().map(|(name, from)| (name.clone(), position(*from))).chain(logical).collect()
    }
}

/// A copy of a standby may be behind what an earlier copy here has had: the slots that know that don't keep what it needs.
pub fn outrun(servers: &mut [Server], host: usize) {
    let slot = servers[host].name.slot_name();
    let length = servers[host].data.as_ref().map_or(0, |data| data.wal.len());
    for data in servers.iter_mut().filter_map(|server| server.data.as_mut()) {
        if let Some(kept) = data.slots.get(&slot).copied().filter(|kept| *kept > length) {
            let since = data.slots_since.entry(slot.clone()).or_default();
            *since = kept.max(*since);
        }
    }
}

/// Logical slots that an agent has work done on.
#[derive(Debug, Default)]
pub struct Decoding {
    /// The postmaster that does it.
    busy: Option<u64>,
    /// Those that can't be moved any more: the WAL is gone.
    broken: BTreeSet<String>,
}

impl ModelPostgres {
    pub(crate) async fn apply_slots(&self, plan: SlotPlan) -> Result<SlotsDone, PgError> {
        let ignored = self.stage.key("config").is_some_and(|config| config.get("ignore_slots").is_some());
        let stay = self.stage.judge(|judge, _| judge.keeps_slots);
        let (mut done, standby, jobs, postmaster) = self.server(|server| {
            let gone = || PgError::Failed("the server is not running".to_owned());
            let postmaster = server.running().ok_or_else(gone)?;
            let standby = postmaster.role == PgRole::Standby;
            let senders = postmaster.senders.values().filter_map(|sender| sender.slot.clone());
            let used = senders.chain(postmaster.reading.iter().cloned()).collect();
            let postmaster = (postmaster.number, postmaster.process);
            let data = server.data.as_mut().ok_or_else(gone)?;
            let (mut done, mut jobs) = (SlotsDone::default(), Vec::new());
            for step in steps(&data.present(&used, &plan.wanted), &plan, standby.then(|| data.wal.end())) {
                tracing::debug!("{step}");
                match step {
                    Step::Create(name) => {
                        done.again |= plan.wanted.get(&name).is_some_and(|slot| slot.position.is_some());
                        data.create_slot(name);
                    }
                    Step::Drop(name) => {
                        let useful = data.logical.get(&name).is_some_and(|slot| slot.restart >= data.oldest);
                        if name == FOREIGN_SLOT && ignored || useful && stay {
                            let why = if useful { "is permanent" } else { "ignore_slots names" };
                            let what = format!("{} drops the slot {name}, which {why}", server.name);
                            self.stage.judge(|judge, now| judge.violation(now, what));
                        }
                        data.slots.remove(&name);
                        data.logical.remove(&name);
                    }
                    Step::Advance(name, to) => drop(data.slots.insert(name, index(to).min(data.wal.len()))),
                    Step::InUse(_) => done.again = true,
                    Step::Decode(job) => jobs.push(job),
                    Step::Missing(name) => drop(done.missing.insert(name)),
                }
            }
            let lacks = |(name, slot): (&String, &Logical)| {
                (standby && slot.restart < data.oldest && plan.wanted.contains_key(name)).then(|| name.clone())
            };
            done.missing.extend(data.logical.iter().filter_map(lacks));
            Ok::<_, PgError>((done, standby, jobs, postmaster))
        })?;
        done.again |= !jobs.is_empty() || !done.missing.is_empty();
        let broken = self.decode(postmaster, jobs);
        if standby {
            done.missing.extend(broken.into_iter().filter(|name| plan.wanted.contains_key(name)));
        }
        Ok(done)
    }

    /// Begins with these, unless others are under way; the names of those that have turned out to be broken.
    fn decode(&self, (number, process): (u64, ProcessId), jobs: Vec<Job>) -> BTreeSet<String> {
        let mut decoding = self.decoding.lock();
        if decoding.busy != Some(number) && !jobs.is_empty() {
            decoding.busy = Some(number);
            let postgres = self.clone();
            self.stage.executor().spawn(process, async move {
                for job in jobs {
                    postgres.decode_one(number, job).await;
                }
                postgres.decoding.lock().busy = None;
            });
        }
        std::mem::take(&mut decoding.broken)
    }

    async fn decode_one(&self, number: u64, job: Job) {
        self.work(5..200).await;
        let made = self.stage.number();
        let broken = self.server(|server| {
            let primary = server.postmaster(number)?.role == PgRole::Primary;
            let data = server.data.as_mut()?;
            let end = data.wal.len();
            match (job.work, data.logical.get_mut(&job.slot)) {
                (Work::Create { .. }, None) if primary => {
                    let new = Logical { made, confirmed: end, restart: end };
                    self.stage.judge(|judge, _| judge.slots_made.insert(job.slot.clone(), made));
                    data.logical.insert(job.slot, new);
                    None
                }
                (Work::Advance(_), Some(slot)) if slot.restart < data.oldest => Some(job.slot),
                (Work::Advance(to), Some(slot)) => {
                    slot.confirm(index(to).min(end));
                    None
                }
                _ => None,
            }
        });
        if let Some(slot) = broken {
            tracing::debug!("n{}: the WAL that {slot} needs is gone", self.host);
            self.decoding.lock().broken.insert(slot);
        }
    }

    pub(crate) async fn run_copy_slots(
        &self,
        wanted: BTreeMap<String, WantedSlot>,
        source: Upstream,
    ) -> Result<Vec<String>, PgError> {
        self.stage.micros(1_000..10_000).await;
        let unreachable = || PgError::Failed(format!("{} can't be reached", source.name));
        let from = host_of(&source.host).ok_or_else(unreachable)?;
        if !self.stage.talks(End::Postgres(self.host), End::Postgres(from)) {
            return Err(unreachable());
        }
        let read = self.stage.server(from, |server| {
            let postmaster = server.open(&self.stage)?;
            let primary = postmaster.role == PgRole::Primary;
            let slots = server.data.as_ref()?.logical.iter().filter(|(name, _)| primary && wanted.contains_key(*name));
            let kept = slots.filter(|(_, slot)| server.data.as_ref().is_some_and(|data| slot.restart >= data.oldest));
            Some(kept.map(|(name, slot)| (name.clone(), *slot)).collect::<Vec<_>>())
        });
        let mut copies = read.ok_or_else(unreachable)?;
        let here = self.server(|server| server.data.as_ref().map(|data| (data.wal.end(), data.oldest)));
        let (replayed, oldest) = here.unwrap_or_default();
        copies.retain(|(_, slot)| may_be_copied(position(slot.confirmed), replayed));
        let Some(from) = copies.iter().map(|(_, slot)| slot.restart).min() else { return Ok(Vec::new()) };
        if from < oldest {
            // What is lacking is fetched.
            self.stage.micros(50_000..500_000).await;
            self.check_disk()?;
        }
        self.stop(StopMode::Fast, self.config().pg_ctl_timeout, None).await?;
        self.check_disk()?;
        self.server(|server| {
            if let Some(data) = &mut server.data {
                data.oldest = data.oldest.min(from);
                data.logical.extend(copies.iter().cloned());
            }
        });
        Ok(copies.into_iter().map(|(name, _)| name).collect())
    }
}
