//! The word given to a leader that has lost the DCS, as it outlives the agent: until when this node does not lead, in a file
//! beside the data directory. The clock that it goes by begins anew with each boot of the host, so the file says which one that
//! was; on another one the promise lasts for its whole length once more.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use trunkline_common::Instant;

use super::{PgError, files};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Kept {
    boot_id: String,
    /// Since boot.
    until: Duration,
    length: Duration,
}

/// Keeps the promise not to lead before `until`, durably; never for less time than one that is there.
pub fn keep(data_dir: &Path, until: Instant, now: Instant) -> Result<(), PgError> {
    keep_on(&boot_id(), data_dir, until, now)
}

/// Until when an earlier agent has promised not to lead; `None`: it has not, as far as is known.
pub fn kept(data_dir: &Path, now: Instant) -> Option<Instant> {
    kept_on(&boot_id(), data_dir, now)
}

fn keep_on(boot_id: &str, data_dir: &Path, until: Instant, now: Instant) -> Result<(), PgError> {
    let until = kept_on(boot_id, data_dir, now).map_or(until, |before| before.max(until));
    let kept = Kept { boot_id: boot_id.to_owned(), until: until.since_boot(), length: until.since(now) };
    let path = path(data_dir);
    write(&path, &kept).map_err(|error| files::unwritable(&path, &error))
}

fn write(path: &Path, kept: &Kept) -> io::Result<()> {
    let new = path.with_extension("promised.new");
    let mut file = fs::File::create(&new)?;
    file.write_all(serde_json::to_string(kept)?.as_bytes())?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    path.parent().map_or(Ok(()), |parent| fs::File::open(parent)?.sync_all())
}

fn kept_on(boot_id: &str, data_dir: &Path, now: Instant) -> Option<Instant> {
    let kept: Kept = serde_json::from_str(&fs::read_to_string(path(data_dir)).ok()?).ok()?;
    let same_boot = !boot_id.is_empty() && kept.boot_id == boot_id;
    Some(if same_boot { Instant::from_boot(kept.until) } else { now + kept.length })
}

/// Empty where the system does not say: then no boot is known to be the same.
fn boot_id() -> String {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    id.trim().to_owned()
}

fn path(data_dir: &Path) -> PathBuf {
    let mut name = data_dir.file_name().unwrap_or_default().to_owned();
    name.push(".promised");
    data_dir.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Instant {
        Instant::from_boot(Duration::from_secs(seconds))
    }

    #[test]
    fn a_promise_outlives_the_agent_and_the_boot() {
        let directory = tempfile::tempdir().expect("a directory");
        let data_dir = directory.path().join("data");
        assert_eq!(kept_on("one", &data_dir, at(100)), None);
        keep_on("one", &data_dir, at(120), at(100)).expect("kept");
        assert_eq!(kept_on("one", &data_dir, at(110)), Some(at(120)));
        keep_on("one", &data_dir, at(115), at(110)).expect("kept");
        assert_eq!(kept_on("one", &data_dir, at(110)), Some(at(120)), "a shorter one does not take its place");
        keep_on("one", &data_dir, at(130), at(110)).expect("kept");
        assert_eq!(kept_on("one", &data_dir, at(500)), Some(at(130)), "it is over");

        assert_eq!(kept_on("two", &data_dir, at(5)), Some(at(25)), "how much of it is left nobody knows");
        assert_eq!(kept_on("", &data_dir, at(200)), Some(at(220)), "nor where the boot is not known");
        keep_on("two", &data_dir, at(15), at(10)).expect("kept");
        assert_eq!(kept_on("two", &data_dir, at(25)), Some(at(30)), "a shorter one cuts neither short");
    }

    #[test]
    fn what_makes_no_sense_is_no_promise() {
        let directory = tempfile::tempdir().expect("a directory");
        let data_dir = directory.path().join("data");
        for text in ["", "{}", "{\"boot_id\": 5}"] {
            fs::write(path(&data_dir), text).expect("a file");
            assert_eq!(kept_on("one", &data_dir, at(1)), None, "{text}");
        }
    }
}
