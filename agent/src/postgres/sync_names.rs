//! `synchronous_standby_names`: set, and known to be in force.
//!
//! Writing the file and reloading is not enough. A commit waits only if the *checkpointer* has published the new value in
//! shared memory (`sync_standbys_defined`), and it is released by WAL senders, each with its own copy. A leader that
//! reported its synchronous standby to the DCS before both have taken it up could lose an acknowledged commit.

use std::fs;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal};
use tokio_postgres::Client;
use trunkline_common::{Clock, SystemClock};

use super::instance::Instance;
use super::pidfile::PidFileStatus;
use super::process::Postmaster;
use super::{PgError, query};

/// The bound on taking effect. A checkpointer in the middle of an immediate checkpoint reloads only after it.
const LIMIT: Duration = Duration::from_secs(5);

/// The checkpointer and the WAL senders have no event for "configuration read": look again that often.
const RECHECK: Duration = Duration::from_millis(1);

impl Instance {
    pub(super) async fn apply_sync_names(&self, names: String) -> Result<(), PgError> {
        let changed = self.rewrite(|managed| managed.synchronous_standby_names = Some(names.clone()))?;
        let Some(postmaster) = self.process().find() else { return Ok(()) };
        if !changed && self.sync_names_in_force() == Some((postmaster.pid(), names.clone())) {
            return Ok(());
        }
        // Before it accepts connections, its processes have yet to read the file for the first time or are just reading
        // it; whatever they saw, the signal makes them look again.
        if self.pid_file().is_none_or(|file| file.status == PidFileStatus::Starting) {
            self.reload(&postmaster);
            return Ok(());
        }
        let timeout = PgError::Timeout { what: "synchronous_standby_names".to_owned(), limit: LIMIT };
        tokio::time::timeout(LIMIT, self.wait_in_force(&postmaster, &names)).await.unwrap_or(Err(timeout))?;
        self.set_sync_names_in_force(postmaster.pid(), names);
        self.tell("on_reload");
        Ok(())
    }

    /// The last value set, taken up by the running server: for a server just promoted, whose names were set before it was
    /// known to be up.
    pub(super) async fn confirm_sync_names(&self, postmaster: &Postmaster) -> Result<(), PgError> {
        let Some(names) = self.sync_names_set() else { return Ok(()) };
        if self.sync_names_in_force() == Some((postmaster.pid(), names.clone())) {
            return Ok(());
        }
        let timeout = PgError::Timeout { what: "synchronous_standby_names".to_owned(), limit: LIMIT };
        tokio::time::timeout(LIMIT, self.wait_in_force(postmaster, &names)).await.unwrap_or(Err(timeout))?;
        self.set_sync_names_in_force(postmaster.pid(), names);
        Ok(())
    }

    async fn wait_in_force(&self, postmaster: &Postmaster, names: &str) -> Result<(), PgError> {
        let session = self.session(LIMIT).await?;
        let client = session.client();
        let checkpointer = checkpointer(client).await?;
        let naps_before = checkpointer.as_ref().and_then(Process::naps);
        postmaster.signal(Signal::HUP);
        // Directly as well: the postmaster passes it on, but there is no telling when it has.
        if let Some(process) = &checkpointer {
            process.signal(Signal::HUP);
        }
        loop {
            let taken_up = match &checkpointer {
                Some(process) => process.has_napped_since(naps_before) && is_idle(client).await?,
                None => true,
            };
            if taken_up && senders_agree(client, names).await? {
                return if names.is_empty() { Ok(()) } else { move_wal(client).await };
            }
            SystemClock.sleep(RECHECK).await;
        }
    }
}

/// Writes a little WAL. A commit may have begun to wait just before the WAL senders took up the names: the standby's answer
/// for it came too early to release it, and without more WAL there is no other answer for `wal_receiver_status_interval`.
async fn move_wal(client: &Client) -> Result<(), PgError> {
    let recovering = client.query_one("SELECT pg_catalog.pg_is_in_recovery()", &[]).await.map_err(query::failed)?;
    if recovering.try_get(0).map_err(query::failed)? {
        return Ok(());
    }
    let text = "BEGIN; SET LOCAL synchronous_commit TO local; SELECT pg_catalog.txid_current(); COMMIT";
    client.batch_execute(text).await.map_err(query::failed)
}

/// A process whose number is held by a pidfd.
struct Process {
    pid: i32,
    fd: std::os::fd::OwnedFd,
}

impl Process {
    fn signal(&self, signal: Signal) {
        // It has ended: so has the server, and the queries will say so.
        let _ = rustix::process::pidfd_send_signal(&self.fd, signal);
    }

    /// How often it went to sleep by itself.
    fn naps(&self) -> Option<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).ok()?;
        status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")?.trim().parse().ok())
    }

    /// It was woken by the signal (a signal makes a sleeper runnable at once) and sleeps again. Whether in its main loop or
    /// waiting for a lock on the way there, [`is_idle`] tells.
    fn has_napped_since(&self, before: Option<u64>) -> bool {
        let Some(stat) = fs::read_to_string(format!("/proc/{}/stat", self.pid)).ok() else { return true };
        let sleeping = stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('S'));
        sleeping && self.naps() > before
    }
}

async fn checkpointer(client: &Client) -> Result<Option<Process>, PgError> {
    let text = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'checkpointer'";
    let Some(row) = client.query_opt(text, &[]).await.map_err(query::failed)? else { return Ok(None) };
    let pid: i32 = row.try_get(0).map_err(query::failed)?;
    let fd = Pid::from_raw(pid).and_then(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok());
    Ok(fd.map(|fd| Process { pid, fd }))
}

/// The checkpointer waits in its main loop, or between the writes of a spread checkpoint: both come after a look at the
/// configuration.
async fn is_idle(client: &Client) -> Result<bool, PgError> {
    let text =
        "SELECT coalesce(bool_and(coalesce(wait_event IN ('CheckpointerMain', 'CheckpointWriteDelay'), false)), true)
        FROM pg_stat_activity WHERE backend_type = 'checkpointer'";
    let row = client.query_one(text, &[]).await.map_err(query::failed)?;
    row.try_get(0).map_err(query::failed)
}

/// Every streaming WAL sender has the priority that the names give it: it has read the new value. On a standby, WAL
/// senders have none.
async fn senders_agree(client: &Client, names: &str) -> Result<bool, PgError> {
    let listed = members(names);
    let text = "SELECT application_name, sync_priority FROM pg_stat_replication
        WHERE state = 'streaming' AND NOT pg_is_in_recovery()";
    for row in client.query(text, &[]).await.map_err(query::failed)? {
        let name: String = row.try_get(0).map_err(query::failed)?;
        let priority: i32 = row.try_get(1).map_err(query::failed)?;
        let expected = listed.iter().any(|member| member == "*" || member.eq_ignore_ascii_case(&name));
        if expected != (priority > 0) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The names in a value of `synchronous_standby_names`: `a`, `2 (a,"b c")`, `FIRST 1 (a)`, `ANY 1 (*)`.
pub fn members(names: &str) -> Vec<String> {
    let list = match (names.find('('), names.rfind(')')) {
        (Some(open), Some(close)) if open < close && !names[..open].contains('"') => &names[open + 1..close],
        _ => names,
    };
    let (mut members, mut member, mut quoted) = (Vec::new(), String::new(), false);
    let mut chars = list.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '"' if quoted && chars.peek() == Some(&'"') => {
                member.push('"');
                chars.next();
            }
            '"' => quoted = !quoted,
            ',' if !quoted => members.push(std::mem::take(&mut member)),
            c if c.is_whitespace() && !quoted => {}
            c => member.push(c),
        }
    }
    members.push(member);
    members.retain(|member| !member.is_empty());
    members
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_are_read() {
        for (text, names) in [
            ("", &[][..]),
            ("a", &["a"]),
            ("a, b", &["a", "b"]),
            ("2 (a,\"b c\")", &["a", "b c"]),
            ("ANY 1 (*)", &["*"]),
            ("\"x(1),y\"", &["x(1),y"]),
            ("FIRST 1 (\"q\"\"q\")", &["q\"q"]),
        ] {
            assert_eq!(members(text), names, "{text}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(text: String) {
            let _ = members(&text);
        }
    }
}
