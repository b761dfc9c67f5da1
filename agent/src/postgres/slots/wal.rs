//! The WAL that a copied logical slot needs. The slot begins where its reader is; the WAL of a standby may begin later, with its base
//! backup, and then what is read there after a failover would end at "requested WAL segment … has already been removed".
//!
//! The primary keeps it for the slot. It is fetched from there, beside PostgreSQL's own, and gets its place while the server is
//! stopped for the copy: a running one would remove it again.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write as _;
use std::ops::RangeInclusive;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use trunkline_common::{Lsn, MemberName};

use super::copy::bytes_of;
use crate::postgres::bootstrap::literal;
use crate::postgres::instance::Instance;
use crate::postgres::walsender::{Purpose, Wire, WireError};
use crate::postgres::{PgError, Upstream, files, wal};

/// Where it is until then, in `pg_wal`: nowhere else is certain to be the same file system. PostgreSQL minds no directories there.
const FETCHED: &str = "trunkline.fetched";

/// The bound on one answer of the primary.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// As much is asked for at a time; it comes as text, twice as long.
const PIECE: u64 = 256 << 10;

/// What may be filled of the space that is free: the WAL that streams in needs the rest.
const OF_FREE_SPACE: u64 = 4;

/// The files of WAL in a directory, by their numbers.
#[derive(Debug, Default, PartialEq, Eq)]
struct Files(BTreeMap<u64, String>);

impl Files {
    fn list(dir: &Path, segment: u64) -> Self {
        let names =
            fs::read_dir(dir).into_iter().flatten().flatten().filter_map(|entry| entry.file_name().into_string().ok());
        Self(names.filter_map(|name| Some((wal::number(&name, segment)?, name))).collect())
    }

    fn lacking(&self, range: RangeInclusive<u64>) -> BTreeSet<u64> {
        range.filter(|number| !self.0.contains_key(number)).collect()
    }
}

/// The numbers of the files that a slot needs which begins at `restart`, on a standby that has replayed so much.
fn needed(restart: Lsn, replayed: Lsn, segment: u64) -> RangeInclusive<u64> {
    restart.0 / segment..=replayed.0.saturating_sub(1) / segment
}

impl Instance {
    /// What is lacking here of the WAL from `restart` on, `fetched` or not.
    pub(super) fn lacking_wal(&self, restart: Lsn, replayed: Lsn, fetched: bool) -> Result<BTreeSet<u64>, PgError> {
        let (dir, segment) = self.wal_dir()?;
        let mut there = Files::list(&dir, segment);
        if fetched {
            there.0.extend(Files::list(&dir.join(FETCHED), segment).0);
        }
        Ok(there.lacking(needed(restart, replayed, segment)))
    }

    /// Fetches these files from `source`, each whole or not at all; what is there stays for the next attempt.
    pub(super) async fn fetch_wal(&self, numbers: BTreeSet<u64>, source: &Upstream) -> Result<(), PgError> {
        let (dir, segment) = self.wal_dir()?;
        let volume = rustix::fs::statvfs(&dir).map_err(|error| files::unwritable(&dir, &error.into()))?;
        let (size, free) = (segment * numbers.len() as u64, volume.f_bavail * volume.f_frsize);
        if size > free / OF_FREE_SPACE {
            let (name, dir) = (&source.name, dir.display());
            let why = format!("{size} bytes of WAL would have to be fetched from {name}, and {free} are free in {dir}");
            return Err(PgError::Failed(why));
        }
        let staged = dir.join(FETCHED);
        files::create_private_dir(&staged)?;
        let mut primary = Primary::connect(self, source).await?;
        let theirs = primary.files(segment).await?;
        for number in numbers {
            let gone = || PgError::Failed(format!("{} has no WAL file number {number} any more", source.name));
            let name = theirs.get(&number).ok_or_else(gone)?;
            Self::fetch_file(&mut primary, name, segment, &staged).await?;
        }
        Ok(())
    }

    async fn fetch_file(primary: &mut Primary, name: &str, segment: u64, staged: &Path) -> Result<(), PgError> {
        let (unfinished, target) = (staged.join("unfinished"), staged.join(name));
        let unwritable = |path: &Path, error: std::io::Error| files::unwritable(path, &error);
        let mut options = fs::OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600);
        let mut file = options.open(&unfinished).map_err(|error| unwritable(&unfinished, error))?;
        let mut at = 0;
        while at < segment {
            let bytes = primary.read(name, at, PIECE.min(segment - at)).await?;
            at += bytes.len() as u64;
            let path = unfinished.clone();
            let write = move || file.write_all(&bytes).map(|()| file).map_err(|error| unwritable(&path, error));
            file = beside(write).await?;
        }
        let finish = move || {
            let finished = file.sync_all().and_then(|()| fs::rename(&unfinished, &target));
            finished.map_err(|error| unwritable(&target, error))
        };
        beside(finish).await
    }

    /// Gives what has been fetched its place. The server is stopped.
    pub(super) fn place_wal(&self) -> Result<(), PgError> {
        let (dir, segment) = self.wal_dir()?;
        let staged = dir.join(FETCHED);
        let there = Files::list(&dir, segment);
        let place = || {
            for (number, name) in Files::list(&staged, segment).0 {
                if there.0.contains_key(&number) {
                    continue;
                }
                // It has been archived by whoever wrote it; once more some `archive_command` refuses.
                let archived = dir.join("archive_status").join(format!("{name}.done"));
                fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(archived)?;
                fs::rename(staged.join(&name), dir.join(&name))?;
            }
            fs::File::open(dir.join("archive_status"))?.sync_all()?;
            fs::File::open(&dir)?.sync_all()
        };
        if staged.exists() {
            place().map_err(|error| files::unwritable(&dir, &error))?;
            self.forget_fetched_wal()?;
        }
        Ok(())
    }

    /// Removes what was fetched and is of no use: the slots are there, or this is no standby any more.
    pub(super) fn forget_fetched_wal(&self) -> Result<(), PgError> {
        let staged = self.config_now().data_dir.join("pg_wal").join(FETCHED);
        match fs::remove_dir_all(&staged) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(files::unwritable(&staged, &error)),
            _ => Ok(()),
        }
    }

    /// Where WAL is, and how many bytes a file of it has.
    fn wal_dir(&self) -> Result<(PathBuf, u64), PgError> {
        let segment = u64::from(self.control()?.wal_segment_size);
        let dir = self.config_now().data_dir.join("pg_wal");
        (segment > 0)
            .then_some((dir, segment))
            .ok_or_else(|| PgError::Failed("pg_control says that WAL files are empty".to_owned()))
    }
}

/// What the disk takes its time for. Not in its turn with other work on the data directory: a promise to a leader without DCS
/// must not wait for it, and the files are in a directory of their own.
async fn beside<T: Send + 'static>(work: impl FnOnce() -> Result<T, PgError> + Send + 'static) -> Result<T, PgError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(PgError::Failed(error.to_string())))
}

/// Who has the WAL.
struct Primary {
    wire: Wire,
    name: MemberName,
}

impl Primary {
    async fn connect(standby: &Instance, source: &Upstream) -> Result<Self, PgError> {
        let config = standby.config_now();
        let connect = Wire::connect(source, &config.rewind, Purpose::Sql(&config.database));
        Ok(Self { wire: answer(&source.name, connect).await?, name: source.name.clone() })
    }

    /// The names of its files by their numbers. Where a timeline ended within a file, the next one has it as well, and that one is
    /// what PostgreSQL reads.
    async fn files(&mut self, segment: u64) -> Result<BTreeMap<u64, String>, PgError> {
        // Functions in the forms that pg_rewind's user is granted.
        let names =
            "SELECT string_agg(name, ' ' ORDER BY name) FROM pg_catalog.pg_ls_dir('pg_wal', false, false) AS name
                      WHERE length(name) = 24";
        let names = self.value(names).await?;
        Ok(names.split(' ').filter_map(|name| Some((wal::number(name, segment)?, name.to_owned()))).collect())
    }

    /// At least one byte of a file, and at most `length`.
    async fn read(&mut self, file: &str, from: u64, length: u64) -> Result<Vec<u8>, PgError> {
        let path = literal(&format!("pg_wal/{file}"));
        let piece = format!("SELECT pg_catalog.pg_read_binary_file({path}, {from}, {length}, false)");
        let bytes = bytes_of(&self.value(&piece).await?).filter(|bytes| !bytes.is_empty());
        bytes.ok_or_else(|| PgError::Failed(format!("{} has {from} bytes only of its WAL file {file}", self.name)))
    }

    async fn value(&mut self, query: &str) -> Result<String, PgError> {
        let rows = answer(&self.name, self.wire.query(query)).await?;
        Ok(rows.into_iter().next().and_then(|row| row.into_iter().next()).flatten().unwrap_or_default())
    }
}

/// What a primary answers in time.
async fn answer<T>(name: &MemberName, ask: impl Future<Output = Result<T, WireError>>) -> Result<T, PgError> {
    let what = || format!("fetching WAL from {name}");
    let late = |_| PgError::Timeout { what: what(), limit: ANSWER_LIMIT };
    let answered = tokio::time::timeout(ANSWER_LIMIT, ask).await.map_err(late)?;
    answered.map_err(|error| PgError::Failed(format!("{}: {error}", what())))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEGMENT: u64 = 16 << 20;

    #[test]
    fn a_slot_needs_the_files_from_its_beginning_up_to_what_is_replayed() {
        let [first, second] = [SEGMENT, 2 * SEGMENT];
        for (restart, replayed, expected) in [
            (first, first + 1, 1..=1),
            (first + 5, second, 1..=1), // the next file need not be there yet
            (first + 5, second + 1, 1..=2),
        ] {
            assert_eq!(needed(Lsn(restart), Lsn(replayed), SEGMENT), expected, "{restart} {replayed}");
        }
        assert!(needed(Lsn(second), Lsn(first), SEGMENT).is_empty(), "it begins after what is here");
    }

    #[test]
    fn files_are_known_by_their_numbers_on_whatever_timeline() {
        let dir = tempfile::tempdir().expect("temp dir");
        for name in [
            "000000010000000000000003",
            "000000020000000000000004",
            "000000010000000000000005.partial",
            "00000002.history",
        ] {
            fs::write(dir.path().join(name), "").expect("written");
        }
        let files = Files::list(dir.path(), SEGMENT);
        assert_eq!(files.lacking(2..=5), [2, 5].into());
        assert_eq!(Files::list(&dir.path().join("none"), SEGMENT), Files::default());
    }
}
