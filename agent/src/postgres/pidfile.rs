//! `postmaster.pid`: who runs in a data directory and how far it has come (PostgreSQL's `miscadmin.h`, LOCK_FILE_LINE_*).

use std::path::Path;

/// The lines of `postmaster.pid` that matter here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PidFile {
    /// Line 1: the postmaster. PostgreSQL writes a negative number for a single-user server; that is not one.
    pub pid: i32,
    /// Line 3: when it started, seconds since the epoch.
    pub started: i64,
    /// Line 4: the port.
    pub port: u16,
    /// Line 5: the first unix socket directory; `None` where there is no socket.
    pub socket_dir: Option<String>,
    /// Line 6: the first address it listens on, as configured; `None` where there is none.
    pub address: Option<String>,
    /// Line 8: how far it is.
    pub status: PidFileStatus,
}

/// The status line, written by the postmaster at each change of state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PidFileStatus {
    /// Not up yet, or no status written yet; also a standby that is not consistent yet.
    Starting,
    /// Shutting down.
    Stopping,
    /// Accepts connections, not in recovery.
    Ready,
    /// Accepts read-only connections.
    Standby,
}

impl PidFile {
    /// Reads the file of a data directory; `None` when it isn't there or isn't complete enough to name a process.
    pub fn read(data_dir: &Path) -> Option<Self> {
        Self::parse(&std::fs::read_to_string(data_dir.join("postmaster.pid")).ok()?)
    }

    /// Parses the file's text. Lines are written one by one during start-up, so later ones may be missing.
    pub fn parse(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        let pid = lines.next()?.trim().parse::<i32>().ok().filter(|pid| *pid > 0)?;
        lines.next();
        let started = lines.next().and_then(|line| line.trim().parse().ok()).unwrap_or(0);
        let port = lines.next().and_then(|line| line.trim().parse().ok()).unwrap_or(0);
        let mut text = || lines.next().map(str::trim).filter(|text| !text.is_empty()).map(str::to_owned);
        let (socket_dir, address) = (text(), text());
        let status = match lines.nth(1).map(str::trim) {
            Some("ready") => PidFileStatus::Ready,
            Some("standby") => PidFileStatus::Standby,
            Some("stopping") => PidFileStatus::Stopping,
            _ => PidFileStatus::Starting,
        };
        Some(Self { pid, started, port, socket_dir, address, status })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_what_postgresql_15_writes() {
        let text = "11803\n/tmp/d\n1763646226\n54321\n/tmp\n127.0.0.1\n  3178614     32769\nready   \n";
        let file = PidFile::parse(text).expect("parses");
        assert_eq!((file.pid, file.started, file.port), (11803, 1763646226, 54321));
        assert_eq!((file.socket_dir.as_deref(), file.address.as_deref()), (Some("/tmp"), Some("127.0.0.1")));
        assert_eq!(file.status, PidFileStatus::Ready);
        for (status, expected) in [("standby ", PidFileStatus::Standby), ("stopping", PidFileStatus::Stopping)] {
            assert_eq!(PidFile::parse(&text.replace("ready   ", status)).map(|f| f.status), Some(expected));
        }
    }

    #[test]
    fn a_file_being_written_is_starting_and_no_pid_is_nobody() {
        assert_eq!(PidFile::parse("7\n/tmp/d\n1\n5432\n").map(|f| f.status), Some(PidFileStatus::Starting));
        assert_eq!(PidFile::parse("7\n/d\n1\n5432\n\n\n").and_then(|f| f.socket_dir), None);
        for nobody in ["", "\n", "-12\n", "x\n", "0\n"] {
            assert_eq!(PidFile::parse(nobody), None, "{nobody:?}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(text: String) {
            let _ = PidFile::parse(&text);
        }
    }
}
