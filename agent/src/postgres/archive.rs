//! Archiving what PostgreSQL can't any more: the server is stopped, and its WAL may be about to go.

use std::path::Path;
use std::time::Duration;

use super::instance::Instance;
use super::{ControlState, PgError, program, wal};

/// The bound on one run of `archive_command`.
const ARCHIVE_LIMIT: Duration = Duration::from_secs(300);

/// The names of WAL files that wait to be archived, oldest first.
fn waiting(data_dir: &Path) -> Vec<String> {
    let wal = data_dir.join("pg_wal");
    let entries = std::fs::read_dir(wal.join("archive_status")).into_iter().flatten().flatten();
    let marks = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let names = marks.filter_map(|mark| mark.strip_suffix(".ready").map(str::to_owned));
    let mut names: Vec<String> = names.filter(|name| is_segment(name) && wal.join(name).is_file()).collect();
    names.sort();
    names
}

/// Whether a file in pg_wal has WAL, be it the part of a segment that a timeline ended in.
fn is_segment(name: &str) -> bool {
    let digits = name.strip_suffix(".partial").unwrap_or(name);
    digits.len() == 24 && digits.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'A'..=b'F'))
}

/// PostgreSQL's placeholders filled in: `%p` path, `%f` name, `%%` a percent sign.
fn filled_in(command: &str, name: &str) -> String {
    let mut text = String::new();
    let mut rest = command;
    while let Some((before, after)) = rest.split_once('%') {
        text.push_str(before);
        let (filled, length) = match after.chars().next() {
            Some('p') => (format!("pg_wal/{name}"), 1),
            Some('f') => (name.to_owned(), 1),
            Some('%') => ("%".to_owned(), 1),
            _ => ("%".to_owned(), 0),
        };
        text.push_str(&filled);
        rest = &after[length..];
    }
    text + rest
}

impl Instance {
    pub(super) async fn run_archive_last_wal(&self) -> Result<(), PgError> {
        let control = self.control()?;
        if control.state != ControlState::ShutDown {
            return Ok(());
        }
        let Some(command) = self.archive_command().await else { return Ok(()) };
        let name = wal::file_name(control.timeline, control.checkpoint, control.wal_segment_size.into());
        tracing::info!("archiving {name}, which has the shutdown checkpoint");
        self.archive(&command, &name).await
    }

    /// Before pg_rewind, which removes what its source does not have: files from before the fork among them that only this
    /// server, as the primary of then, could archive. Without them nobody gets past that place by the archive. The first
    /// that fails ends it, as they are of use in order only; the rewind goes on.
    pub(super) async fn archive_waiting_wal(&self) {
        let Some(command) = self.archive_command().await else { return };
        let data_dir = self.config_now().data_dir.clone();
        for name in waiting(&data_dir) {
            tracing::info!("archiving {name}, which this server has not done before it stopped");
            let status = data_dir.join("pg_wal/archive_status");
            let done = match self.archive(&command, &name).await {
                Ok(()) => {
                    let renamed =
                        std::fs::rename(status.join(format!("{name}.ready")), status.join(format!("{name}.done")));
                    renamed.map_err(|error| error.to_string())
                }
                Err(error) => Err(error.to_string()),
            };
            if let Err(why) = done {
                tracing::warn!("{name} and what follows it is not archived before the rewind: {why}");
                return;
            }
        }
    }

    /// The command, where WAL is archived at all.
    async fn archive_command(&self) -> Option<String> {
        let ask = async {
            let mode = self.configured("archive_mode").await?;
            let command = self.configured("archive_command").await?;
            Ok::<_, PgError>(Some(command).filter(|command| mode != "off" && !command.is_empty()))
        };
        ask.await.unwrap_or_else(|error| {
            tracing::warn!("WAL is not archived by the agent, as PostgreSQL does not say how: {error}");
            None
        })
    }

    async fn archive(&self, command: &str, name: &str) -> Result<(), PgError> {
        let mut shell = tokio::process::Command::new("sh");
        shell.arg("-c").arg(filled_in(command, name)).current_dir(&self.config_now().data_dir);
        program::run_within(ARCHIVE_LIMIT, &mut shell).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placeholders_are_postgresqls() {
        let filled = filled_in("cp %p /a/%f 100%% %x%", "0001");
        assert_eq!(filled, "cp pg_wal/0001 /a/0001 100% %x%");
    }

    #[test]
    fn what_waits_is_told_in_order() {
        let data = tempfile::tempdir().unwrap();
        let wal = data.path().join("pg_wal");
        std::fs::create_dir_all(wal.join("archive_status")).unwrap();
        assert!(waiting(data.path()).is_empty());
        let (first, second) = ("00000001000000000000000A", "00000001000000000000000B.partial");
        for name in [second, first, "00000002.history", "000000010000000000000009"] {
            std::fs::write(wal.join(name), "").unwrap();
            std::fs::write(wal.join(format!("archive_status/{name}.ready")), "").unwrap();
        }
        std::fs::remove_file(wal.join("000000010000000000000009")).unwrap();
        std::fs::write(wal.join("archive_status/00000001000000000000000C.done"), "").unwrap();
        assert_eq!(waiting(data.path()), [first, second]);
    }
}
