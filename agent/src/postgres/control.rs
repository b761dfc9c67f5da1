//! `global/pg_control`: what the data directory says about itself while no server answers.
//!
//! Read natively for the layouts of PostgreSQL 12 to 18 (`catalog/pg_control.h`, little endian, 8-byte alignment): it
//! costs microseconds, where starting `pg_controldata` costs milliseconds on a path that every failover takes. Other
//! layouts go through `pg_controldata`.

use std::collections::HashMap;
use std::path::Path;

use trunkline_common::{Lsn, SystemId, TimelineId};

use super::{ControlData, ControlState};

/// Everything read from `pg_control`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlFile {
    /// Identity of the cluster.
    pub system_id: SystemId,
    /// What the server was doing when it last wrote the file.
    pub state: ControlState,
    /// Start of the last checkpoint record.
    pub checkpoint: Lsn,
    /// Timeline of the last checkpoint.
    pub timeline: TimelineId,
    /// Up to where a standby has to replay before it is consistent; invalid on a primary.
    pub min_recovery_point: Lsn,
    /// Timeline of that position.
    pub min_recovery_timeline: TimelineId,
    /// `wal_log_hints` was on.
    pub wal_log_hints: bool,
    /// Data checksums are on.
    pub checksums: bool,
    /// Bytes of a WAL segment.
    pub wal_segment_size: u32,
    /// Bytes of a WAL page.
    pub wal_block_size: u32,
    /// Settings of the primary that a standby must not go below.
    pub minimums: Minimums,
}

/// The primary's settings that a hot standby must reach (PostgreSQL refuses to start otherwise).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Minimums {
    /// `max_connections`.
    pub max_connections: u32,
    /// `max_worker_processes`.
    pub max_worker_processes: u32,
    /// `max_wal_senders`.
    pub max_wal_senders: u32,
    /// `max_prepared_transactions`.
    pub max_prepared_transactions: u32,
    /// `max_locks_per_transaction`.
    pub max_locks_per_transaction: u32,
}

impl Minimums {
    /// Name and value of each.
    pub fn each(&self) -> [(&'static str, u32); 5] {
        [
            ("max_connections", self.max_connections),
            ("max_worker_processes", self.max_worker_processes),
            ("max_wal_senders", self.max_wal_senders),
            ("max_prepared_transactions", self.max_prepared_transactions),
            ("max_locks_per_transaction", self.max_locks_per_transaction),
        ]
    }
}

/// Why `pg_control` could not be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// It can't be read.
    #[error("global/pg_control can't be read: {0}")]
    Unreadable(String),
    /// Not a layout known here.
    #[error("global/pg_control has the unknown version {0}")]
    UnknownVersion(u32),
    /// The checksum does not fit: torn, damaged, or not a control file.
    #[error("global/pg_control is damaged")]
    Damaged,
}

impl ControlFile {
    /// Reads the file of a data directory.
    pub fn read(data_dir: &Path) -> Result<Self, ControlError> {
        let path = data_dir.join("global/pg_control");
        let mut last = ControlError::Damaged;
        // PostgreSQL overwrites the file in place; a read beside a write may see both. Three tries are plenty for a
        // write of one sector.
        for _ in 0..3 {
            let bytes = std::fs::read(&path).map_err(|error| ControlError::Unreadable(error.to_string()))?;
            match Self::parse(&bytes) {
                Err(ControlError::Damaged) => last = ControlError::Damaged,
                other => return other,
            }
        }
        Err(last)
    }

    /// Parses the bytes of the file.
    pub fn parse(bytes: &[u8]) -> Result<Self, ControlError> {
        let version = u32_at(bytes, 8).ok_or(ControlError::Damaged)?;
        let crc_at = match version {
            1201 | 1300 | 1700 => 288,
            // 18 has default_char_signedness before the nonce.
            1800 => 292,
            // Big endian, or a major version with another layout.
            other => return Err(ControlError::UnknownVersion(other)),
        };
        let covered = bytes.get(..crc_at).ok_or(ControlError::Damaged)?;
        if u32_at(bytes, crc_at) != Some(crc32c(covered)) {
            return Err(ControlError::Damaged);
        }
        let parsed = || {
            Some(Self {
                system_id: SystemId(u64_at(bytes, 0)?),
                state: state_of(u32_at(bytes, 16)?)?,
                checkpoint: Lsn(u64_at(bytes, 32)?),
                timeline: TimelineId(u32_at(bytes, 48)?),
                min_recovery_point: Lsn(u64_at(bytes, 136)?),
                min_recovery_timeline: TimelineId(u32_at(bytes, 144)?),
                wal_log_hints: *bytes.get(176)? != 0,
                minimums: Minimums {
                    max_connections: u32_at(bytes, 180)?,
                    max_worker_processes: u32_at(bytes, 184)?,
                    max_wal_senders: u32_at(bytes, 188)?,
                    max_prepared_transactions: u32_at(bytes, 192)?,
                    max_locks_per_transaction: u32_at(bytes, 196)?,
                },
                wal_block_size: u32_at(bytes, 224)?,
                wal_segment_size: u32_at(bytes, 228)?,
                checksums: u32_at(bytes, 252)? != 0,
            })
        };
        parsed().ok_or(ControlError::Damaged)
    }

    /// Parses what `pg_controldata` prints (with `LC_ALL=C`).
    pub fn from_controldata(text: &str) -> Option<Self> {
        let fields: HashMap<&str, &str> =
            text.lines().filter_map(|line| line.split_once(':')).map(|(k, v)| (k.trim(), v.trim())).collect();
        let number = |name: &str| fields.get(name).and_then(|value| value.parse::<u32>().ok());
        Some(Self {
            system_id: SystemId(fields.get("Database system identifier")?.parse().ok()?),
            state: match *fields.get("Database cluster state")? {
                "starting up" => ControlState::Startup,
                "shut down" => ControlState::ShutDown,
                "shut down in recovery" => ControlState::ShutDownInRecovery,
                "shutting down" => ControlState::ShuttingDown,
                "in crash recovery" => ControlState::InCrashRecovery,
                "in archive recovery" => ControlState::InArchiveRecovery,
                "in production" => ControlState::InProduction,
                _ => return None,
            },
            checkpoint: fields.get("Latest checkpoint location")?.parse().ok()?,
            timeline: TimelineId(number("Latest checkpoint's TimeLineID")?),
            min_recovery_point: fields.get("Minimum recovery ending location")?.parse().ok()?,
            min_recovery_timeline: TimelineId(number("Min recovery ending loc's timeline")?),
            wal_log_hints: fields.get("wal_log_hints setting") == Some(&"on"),
            checksums: number("Data page checksum version")? != 0,
            wal_segment_size: number("Bytes per WAL segment")?,
            wal_block_size: number("WAL block size")?,
            minimums: Minimums {
                max_connections: number("max_connections setting")?,
                max_worker_processes: number("max_worker_processes setting")?,
                max_wal_senders: number("max_wal_senders setting")?,
                max_prepared_transactions: number("max_prepared_xacts setting")?,
                max_locks_per_transaction: number("max_locks_per_xact setting")?,
            },
        })
    }

    /// The part that decisions need.
    pub fn data(&self, standby: bool) -> ControlData {
        ControlData {
            system_id: self.system_id,
            state: self.state,
            timeline: self.timeline,
            checkpoint: self.checkpoint,
            standby,
        }
    }

    /// The highest timeline that the data directory certainly has WAL of.
    pub fn known_timeline(&self) -> TimelineId {
        self.timeline.max(self.min_recovery_timeline)
    }
}

/// Whether the data directory would start as a standby.
pub fn has_standby_signal(data_dir: &Path) -> bool {
    ["standby.signal", "recovery.signal"].iter().any(|name| data_dir.join(name).exists())
}

/// `DBState`.
fn state_of(raw: u32) -> Option<ControlState> {
    Some(match raw {
        0 => ControlState::Startup,
        1 => ControlState::ShutDown,
        2 => ControlState::ShutDownInRecovery,
        3 => ControlState::ShuttingDown,
        4 => ControlState::InCrashRecovery,
        5 => ControlState::InArchiveRecovery,
        6 => ControlState::InProduction,
        _ => return None,
    })
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// CRC-32C (Castagnoli), bit by bit: 300 bytes once per look.
fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0x82F6_3B78 & (crc & 1).wrapping_neg());
        }
    }
    !crc
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A control file of PostgreSQL 15 with recognisable values.
    fn sample(version: u32, crc_at: usize) -> Vec<u8> {
        let mut bytes = vec![0u8; 8192];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &7_572_000_000_000_000_001u64.to_le_bytes());
        put(8, &version.to_le_bytes());
        put(16, &6u32.to_le_bytes());
        put(32, &0x3000_0060u64.to_le_bytes());
        put(48, &3u32.to_le_bytes());
        put(136, &0x3000_1000u64.to_le_bytes());
        put(144, &4u32.to_le_bytes());
        put(176, &[1]);
        put(180, &100u32.to_le_bytes());
        put(184, &8u32.to_le_bytes());
        put(188, &10u32.to_le_bytes());
        put(196, &64u32.to_le_bytes());
        put(224, &8192u32.to_le_bytes());
        put(228, &(16u32 << 20).to_le_bytes());
        put(252, &1u32.to_le_bytes());
        let crc = crc32c(&bytes[..crc_at]);
        bytes[crc_at..crc_at + 4].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    #[test]
    fn crc_is_castagnoli() {
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
    }

    #[test]
    fn reads_every_known_layout() {
        for (version, crc_at) in [(1201, 288), (1300, 288), (1700, 288), (1800, 292)] {
            let file = ControlFile::parse(&sample(version, crc_at)).expect("parses");
            assert_eq!(file.system_id, SystemId(7_572_000_000_000_000_001));
            assert_eq!(file.state, ControlState::InProduction);
            assert_eq!((file.checkpoint, file.timeline), (Lsn(0x3000_0060), TimelineId(3)));
            assert_eq!(file.known_timeline(), TimelineId(4));
            assert_eq!(file.minimums.max_locks_per_transaction, 64);
            assert!(file.checksums && file.wal_log_hints);
        }
    }

    #[test]
    fn refuses_damage_and_unknown_versions() {
        let mut torn = sample(1300, 288);
        torn[40] ^= 1;
        assert_eq!(ControlFile::parse(&torn), Err(ControlError::Damaged));
        assert_eq!(ControlFile::parse(&sample(1300, 288)[..200]), Err(ControlError::Damaged));
        assert_eq!(ControlFile::parse(&sample(9999, 288)), Err(ControlError::UnknownVersion(9999)));
    }

    proptest! {
        #[test]
        fn never_panics(bytes: Vec<u8>, version in prop::sample::select(vec![1201u32, 1300, 1800]), cut in 0usize..400) {
            let _ = ControlFile::parse(&bytes);
            let mut file = sample(version, if version == 1800 { 292 } else { 288 });
            file.truncate(cut);
            let _ = ControlFile::parse(&file);
        }

        #[test]
        fn any_text_of_controldata_is_survived(text: String) {
            let _ = ControlFile::from_controldata(&text);
        }
    }
}
