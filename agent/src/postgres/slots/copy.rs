//! A standby's logical slots: copies of the state files of the primary's, which PostgreSQL reads at its start.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::time::Duration;

use trunkline_common::{Clock as _, Lsn};

use super::{LIMIT, replayed};
use crate::postgres::bootstrap::literal;
use crate::postgres::instance::Instance;
use crate::postgres::walsender::{Purpose, Wire, WireError};
use crate::postgres::{PgError, SlotKind, StopMode, Upstream, WantedSlot, files};

/// The bound on asking the primary for its slots.
const ASK_LIMIT: Duration = Duration::from_secs(5);

/// How long a standby is waited for that has not replayed what readers have confirmed, or gets WAL; and how often it is looked.
const CATCH_UP_WITHIN: Duration = Duration::from_secs(2);
const CATCH_UP_PAUSE: Duration = Duration::from_millis(50);

/// A slot as it is on the primary.
struct Copy {
    name: String,
    /// Its state file.
    state: Vec<u8>,
    /// From where on it keeps WAL, by that file.
    restart: Lsn,
    /// What its reader has confirmed.
    confirmed: Lsn,
}

/// Whether a standby that has replayed so much may have a copy of a slot whose reader has `confirmed` so much. Should it be
/// promoted with less, what is written there then is not what the reader has got, and the slot would be past it.
pub fn may_be_copied(confirmed: Lsn, replayed: Lsn) -> bool {
    confirmed <= replayed
}

impl Instance {
    pub(in crate::postgres) async fn run_copy_slots(
        &self,
        wanted: BTreeMap<String, WantedSlot>,
        source: Upstream,
    ) -> Result<Vec<String>, PgError> {
        let config = self.config_now();
        let ask = async {
            let mut wire = Wire::connect(&source, &config.rewind, Purpose::Sql(&config.database)).await?;
            let rows = wire.query(&states(wanted.keys(), self.version())).await?;
            // After the files, which say nothing of what is confirmed from here on.
            Ok((rows, wire.query(&confirmed(wanted.keys())).await?))
        };
        let failed = |error: WireError| PgError::Failed(format!("reading the slots of {}: {error}", source.name));
        let timeout = PgError::Timeout { what: format!("reading the slots of {}", source.name), limit: ASK_LIMIT };
        let (rows, confirmed) = tokio::time::timeout(ASK_LIMIT, ask).await.map_err(|_| timeout)?.map_err(failed)?;
        let read_up_to = |name: &String| {
            let row = confirmed.iter().find(|row| row.first() == Some(&Some(name.clone())))?;
            row.get(1)?.as_ref()?.parse::<Lsn>().ok()
        };
        let copy = |(name, state): (String, Vec<u8>)| {
            let confirmed = read_up_to(&name).unwrap_or(Lsn(u64::MAX));
            Copy { restart: restart(&state), name, state, confirmed }
        };
        let mut copies: Vec<Copy> = rows.iter().filter_map(|row| state(row, &wanted)).map(copy).collect();
        let last = copies.iter().map(|copy| copy.confirmed).filter(|lsn| lsn.0 < u64::MAX).max().unwrap_or_default();
        let Some(replayed) = self.catch_up(last).await? else { return Ok(Vec::new()) };
        copies.retain(|Copy { name, confirmed, .. }| {
            let may = may_be_copied(*confirmed, replayed);
            if !may {
                tracing::info!(
                    "slot {name} is not copied yet: read up to {confirmed}, and here replayed up to {replayed}"
                );
            }
            may
        });
        let copies = self.with_wal(copies, replayed, &source).await?;
        if copies.is_empty() {
            return Ok(Vec::new());
        }
        let names: Vec<String> = copies.iter().map(|copy| copy.name.clone()).collect();
        tracing::info!("copying logical slots from {}: {names:?}", source.name);
        self.run_stop(StopMode::Fast, config.pg_ctl_timeout, None).await?;
        self.in_pool(move |instance| {
            instance.place_wal()?;
            let dir = instance.config_now().data_dir.join("pg_replslot");
            for Copy { name, state, .. } in &copies {
                place(&dir, name, state).map_err(|error| files::unwritable(&dir.join(name), &error))?;
            }
            Ok(())
        })
        .await?;
        Ok(names)
    }

    /// Those of `copies` whose WAL is here or has been fetched; that of the others is being fetched.
    async fn with_wal(&self, copies: Vec<Copy>, replayed: Lsn, source: &Upstream) -> Result<Vec<Copy>, PgError> {
        let look = |copies: Vec<Copy>| {
            self.in_pool(move |instance| {
                let lacks = |copy: &Copy| instance.lacking_wal(copy.restart, replayed, true);
                copies.into_iter().map(|copy| Ok((lacks(&copy)?, copy))).collect::<Result<Vec<_>, PgError>>()
            })
        };
        let mut seen = look(copies).await?;
        let lacking: BTreeSet<u64> = seen.iter().flat_map(|(lacks, _)| lacks).copied().collect();
        if !lacking.is_empty() {
            self.await_wal(lacking, source).await;
            seen = look(seen.into_iter().map(|(_, copy)| copy).collect()).await?;
        }
        let there = |(lacks, copy): (BTreeSet<u64>, Copy)| {
            if !lacks.is_empty() {
                let (name, from) = (&copy.name, copy.restart);
                tracing::info!(
                    "slot {name} is not copied yet: it begins at {from}, and WAL from there on is lacking here"
                );
            }
            lacks.is_empty().then_some(copy)
        };
        Ok(seen.into_iter().filter_map(there).collect())
    }

    /// Begins to fetch WAL, unless that goes on already, and waits for a while.
    async fn await_wal(&self, lacking: BTreeSet<u64>, source: &Upstream) {
        let running = self.inner.decoding.lock().fetching.take().filter(|running| !running.is_finished());
        let mut fetching = running.unwrap_or_else(|| {
            let (instance, source) = (self.clone(), source.clone());
            tokio::spawn(async move {
                tracing::info!("fetching WAL from {} for logical slots: files number {lacking:?}", source.name);
                if let Err(error) = instance.fetch_wal(lacking, &source).await {
                    tracing::warn!("{error}");
                }
            })
        });
        if tokio::time::timeout(CATCH_UP_WITHIN, &mut fetching).await.is_err() {
            self.inner.decoding.lock().fetching = Some(fetching);
        }
    }

    pub(in crate::postgres) fn stop_fetching_wal(&self) {
        if let Some(fetching) = self.inner.decoding.lock().fetching.take() {
            fetching.abort();
        }
    }

    /// What this standby has replayed, once that is up to `position`, or after a while: replication is always a moment behind.
    async fn catch_up(&self, position: Lsn) -> Result<Option<Lsn>, PgError> {
        let (session, begun) = (self.session(LIMIT).await?, self.inner.clock.now());
        loop {
            let replayed = replayed(session.client()).await?;
            let waited = self.inner.clock.now().since(begun);
            if replayed.is_none_or(|replayed| replayed >= position) || waited > CATCH_UP_WITHIN {
                return Ok(replayed);
            }
            self.inner.clock.sleep(CATCH_UP_PAUSE).await;
        }
    }
}

/// Puts a slot's state file in its place, in one step: PostgreSQL refuses to start with half of one.
fn place(dir: &Path, name: &str, state: &[u8]) -> std::io::Result<()> {
    let (target, temporary) = (dir.join(name), dir.join(format!("{name}.tmp")));
    let sync = |path: &Path| fs::File::open(path)?.sync_all();
    if temporary.exists() {
        fs::remove_dir_all(&temporary)?;
    }
    fs::DirBuilder::new().mode(0o700).create(&temporary)?;
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(temporary.join("state"))?;
    file.write_all(state)?;
    file.sync_all()?;
    sync(&temporary)?;
    if target.exists() {
        fs::remove_dir_all(&target)?;
    }
    fs::rename(&temporary, &target)?;
    sync(dir)
}

/// Asks a primary for the state files of slots.
fn states<'n>(names: impl Iterator<Item = &'n String>, version: u32) -> String {
    let names = names.map(|name| literal(name)).collect::<Vec<_>>().join(", ");
    let own = if version >= 17 { "NOT failover AND" } else { "" };
    format!(
        "SELECT slot_name, datname, plugin, pg_catalog.pg_read_binary_file('pg_replslot/' || slot_name || '/state')
           FROM pg_catalog.pg_get_replication_slots() JOIN pg_catalog.pg_database ON datoid = oid
          WHERE {own} NOT pg_catalog.pg_is_in_recovery() AND slot_type = 'logical' AND slot_name IN ({names})"
    )
}

/// Asks a primary what the readers of its logical slots have confirmed.
fn confirmed<'n>(names: impl Iterator<Item = &'n String>) -> String {
    let names = names.map(|name| literal(name)).collect::<Vec<_>>().join(", ");
    format!(
        "SELECT slot_name, confirmed_flush_lsn FROM pg_catalog.pg_get_replication_slots()
          WHERE slot_type = 'logical' AND slot_name IN ({names})"
    )
}

/// A slot's name and state file, if the primary's slot is what is wanted.
fn state(row: &[Option<String>], wanted: &BTreeMap<String, WantedSlot>) -> Option<(String, Vec<u8>)> {
    let [Some(name), Some(database), Some(plugin), Some(hex)] = row else { return None };
    let kind = SlotKind::Logical { database: database.clone(), plugin: plugin.clone() };
    if wanted.get(name)?.kind != kind {
        tracing::warn!("the primary's slot {name} is {kind:?} and not what is configured; not copied");
        return None;
    }
    Some((name.clone(), bytes_of(hex)?))
}

/// What PostgreSQL writes as hexadecimal digits.
pub(super) fn bytes_of(text: &str) -> Option<Vec<u8>> {
    hex::decode(text.strip_prefix("\\x")?).ok()
}

/// From where on a slot keeps WAL, by its state file: `restart_lsn` of `ReplicationSlotPersistentData`, behind a header of 16 bytes, the
/// name, and four numbers. Past everything where it keeps none.
fn restart(state: &[u8]) -> Lsn {
    const AT: usize = 16 + 64 + 4 * 4;
    let bytes = state.get(AT..AT + 8).and_then(|bytes| bytes.try_into().ok());
    Lsn(bytes.map(u64::from_le_bytes).filter(|lsn| *lsn > 0).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logical() -> SlotKind {
        SlotKind::Logical { database: "d".into(), plugin: "p".into() }
    }

    #[test]
    fn a_state_file_comes_as_hexadecimal() {
        let wanted = [("a".to_owned(), WantedSlot { kind: logical(), position: None, in_use: None })].into();
        let row = |plugin: &str, hex: &str| ["a", "d", plugin, hex].map(|text| Some(text.to_owned()));
        assert_eq!(state(&row("p", "\\x00ff10"), &wanted), Some(("a".to_owned(), vec![0, 255, 16])));
        assert_eq!(state(&row("q", "\\x00"), &wanted), None, "configured otherwise");
        assert_eq!(state(&row("p", "\\x0g"), &wanted), None);
    }

    #[test]
    fn a_state_file_says_where_its_slot_begins() {
        let mut state = vec![7; 200];
        state[96..104].copy_from_slice(&0x0174_AE88_u64.to_le_bytes());
        assert_eq!(restart(&state), Lsn(0x0174_AE88));
        state[96..104].fill(0);
        assert_eq!([restart(&state), restart(&state[..100])], [Lsn(u64::MAX); 2], "it keeps nothing");
    }

    #[test]
    fn a_state_file_is_replaced_in_one_step() {
        let dir = tempfile::tempdir().expect("temp dir");
        for state in [b"old".as_slice(), b"new"] {
            place(dir.path(), "a", state).expect("placed");
            assert_eq!(fs::read(dir.path().join("a/state")).expect("file"), state);
        }
        assert!(!dir.path().join("a.tmp").exists());
    }
}
