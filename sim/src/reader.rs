//! A program that reads a logical slot through a router, and what it must never miss.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rand::Rng;
use tokio::sync::watch;
use trunkline_agent::postgres::PgRole;
use trunkline_router::table::RouteTable;

use crate::clients::PATIENCE;
use crate::executor::ProcessId;
use crate::scenario::End;
use crate::server::Data;
use crate::slots::Logical;
use crate::stage::{Stage, host_of};
use crate::wal::{Kind, Record, Wal};

/// What it has read so far, and of which slot. It asks for what the slot has, and keeps no position of its own.
#[derive(Debug, Default)]
pub struct Reader {
    /// The slot's name.
    pub slot: String,
    /// The newest slot of that name: one that was made anew is another.
    pub made: Option<u64>,
    /// Changes, by their numbers; and those from before the slot.
    read: BTreeSet<u64>,
}

fn changes(records: &[Record]) -> impl Iterator<Item = u64> {
    records.iter().filter(|record| matches!(record.kind, Kind::Write(_))).map(|record| record.number)
}

impl Reader {
    /// Who has read nothing yet.
    pub fn new(slot: String) -> Self {
        Self { slot, ..Self::default() }
    }

    /// The first change in `records` that it has not read.
    fn missing(&self, records: &[Record]) -> Option<u64> {
        changes(records).find(|change| !self.read.contains(change))
    }

    /// Whether it has read every change in `wal` but those that are older than its slot.
    pub fn is_level_with(&self, wal: &Wal) -> bool {
        self.missing(wal.records()).is_none()
    }

    /// It begins to read from `slot` of the server `name`: what the slot does not have any more it must have read.
    fn begin(&mut self, stage: &Stage, name: &str, slot: &Logical, data: &Data) {
        let confirmed = &data.wal.records()[..slot.confirmed.min(data.wal.len())];
        tracing::debug!("reading {} of {name} from {} on", self.slot, slot.confirmed);
        // A copy of one from before that moves along with it is as good, also where nobody has read from the new one.
        let newest =
            stage.judge(|judge, _| judge.slots_made.get(&self.slot).copied()).unwrap_or_default().max(slot.made);
        if self.made.is_none_or(|made| made < newest) {
            self.made = Some(newest);
            self.read.extend(changes(confirmed));
            return;
        }
        let ahead = slot.confirmed > data.wal.len();
        if let Some(missing) = self.missing(confirmed).or(ahead.then_some(0)) {
            let what =
                format!("the slot {} of {name} is past change {missing}, which its reader has never got", self.slot);
            stage.judge(|judge, now| judge.violation(now, what));
        }
    }
}

/// Reads the slot of whoever leads by `tables`, for ever.
pub fn start(
    stage: &Stage,
    router: (usize, ProcessId),
    mut tables: watch::Receiver<Arc<RouteTable>>,
    reader: Arc<Mutex<Reader>>,
) {
    let (stage, (router, process)) = (stage.clone(), router);
    stage.executor().clone().spawn(process, async move {
        loop {
            let Ok(table) = tables.wait_for(|table| table.leader.is_some()).await.map(|table| table.clone()) else {
                return;
            };
            if let Some(host) = table.leader.as_ref().and_then(|leader| host_of(&leader.host)) {
                let (reign, mut ends) = (table.reign.clone(), tables.clone());
                tokio::select! {
                    biased;
                    _ = ends.wait_for(|table| table.reign != reign) => {}
                    () = session(&stage, End::Router(router), host, &reader) => {}
                }
            }
            // Programs take their time to connect anew.
            stage.micros(100_000..3_000_000).await;
        }
    });
}

/// It is read from, until this is dropped.
struct Active<'s> {
    stage: &'s Stage,
    host: usize,
    number: u64,
    slot: String,
}

impl Drop for Active<'_> {
    fn drop(&mut self) {
        self.stage.server(self.host, |server| {
            if let Some(postmaster) = server.postmaster(self.number) {
                postmaster.reading.remove(&self.slot);
            }
        });
    }
}

/// One connection: reads what comes, and confirms it now and then.
async fn session(stage: &Stage, from: End, host: usize, reader: &Mutex<Reader>) {
    let to = End::Postgres(host);
    stage.micros(500..5_000).await;
    if !stage.talks(from, to) {
        return;
    }
    let slot = reader.lock().slot.clone();
    let begun = stage.server(host, |server| {
        let name = server.name.0.clone();
        let data = server.data.as_ref()?;
        let logical = data.logical.get(&slot).filter(|slot| slot.restart >= data.oldest)?;
        let postmaster = server.open(stage).filter(|postmaster| postmaster.role == PgRole::Primary)?;
        if postmaster.reading.contains(&slot) {
            return None;
        }
        reader.lock().begin(stage, &name, logical, data);
        let (number, process, confirmed) = (postmaster.number, postmaster.process, logical.confirmed);
        server.postmaster(number)?.reading.insert(slot.clone());
        Some((number, process, confirmed))
    });
    let Some((number, process, mut sent)) = begun else { return };
    let _active = Active { stage, host, number, slot: slot.clone() };
    loop {
        stage.micros(20_000..300_000).await;
        let silent = !stage.talks(from, to) || stage.executor().is_frozen(process);
        if silent || stage.guard(host).is_some_and(|guard| !guard.lets_out()) {
            stage.executor().sleep(PATIENCE).await;
            return;
        }
        let confirms = stage.executor().random(|rng| rng.random_ratio(3, 4));
        let goes_on = stage.server(host, |server| {
            server.postmaster(number)?;
            let data = server.data.as_mut()?;
            let logical = data.logical.get_mut(&slot)?;
            if confirms {
                logical.confirm(sent);
            }
            reader.lock().read.extend(changes(&data.wal.records()[sent.min(data.wal.len())..]));
            sent = data.wal.len();
            Some(())
        });
        if goes_on.is_none() {
            return;
        }
    }
}

/// As long may it take until a reader has what there is.
pub const LIMIT: Duration = Duration::from_secs(20);
