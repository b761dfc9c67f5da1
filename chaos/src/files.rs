//! The configuration of agents and routers. JSON is YAML, so it is written as such.

use std::net::Ipv4Addr;
use std::path::Path;

use serde_json::{Value, json};

use crate::world::{POSTGRES_PORT, READ_ONLY_PORT, READ_WRITE_PORT, REST_PORT, ROUTER_ADMIN_PORT, SCOPE};

/// What a run is started with; the schedule may change some of it meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// How commits are confirmed.
    pub mode: Mode,
    /// `failsafe_mode`.
    pub failsafe: bool,
}

/// How commits are confirmed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// By nobody but the primary.
    Asynchronous,
    /// By the standby that the `sync` key names, while there is one.
    Synchronous,
    /// By a standby in any case.
    Strict,
    /// By any standbys, as many as leave no majority without one.
    Quorum,
}

impl Mode {
    /// Whether no acknowledged commit may be lost.
    pub fn is_synchronous(self) -> bool {
        self != Mode::Asynchronous
    }

    /// What the summary calls it.
    pub fn label(self) -> &'static str {
        match self {
            Mode::Asynchronous => "asynchronous",
            Mode::Synchronous => "synchronous",
            Mode::Strict => "strictly synchronous",
            Mode::Quorum => "quorum",
        }
    }

    fn setting(self) -> Value {
        match self {
            Mode::Quorum => "quorum".into(),
            mode => mode.is_synchronous().into(),
        }
    }
}

/// `patroni.yml` of one node.
pub(crate) fn agent(
    name: &str,
    ip: Ipv4Addr,
    dir: &Path,
    postgres_bin: &Path,
    etcd: &[String],
    settings: Settings,
) -> String {
    let user = |name: &str| json!({ "username": name, "password": "chaos" });
    let rest = format!("{ip}:{REST_PORT}");
    let postgres = format!("{ip}:{POSTGRES_PORT}");
    let config = json!({
        "scope": SCOPE,
        "name": name,
        "etcd3": { "hosts": etcd },
        "restapi": { "listen": rest, "connect_address": rest },
        "bootstrap": {
            "dcs": {
                "ttl": 5,
                "loop_wait": 1,
                "retry_timeout": 1,
                "maximum_lag_on_failover": 1_048_576,
                "primary_start_timeout": 0,
                "synchronous_mode": settings.mode.setting(),
                "synchronous_mode_strict": settings.mode == Mode::Strict,
                "failsafe_mode": settings.failsafe,
                "postgresql": {
                    "use_pg_rewind": true,
                    "use_slots": true,
                    "remove_data_directory_on_rewind_failure": true,
                    "remove_data_directory_on_diverged_timelines": true,
                    "parameters": { "wal_keep_size": "32MB" },
                },
            },
            "initdb": [{ "encoding": "UTF8" }, { "locale": "C" }, "data-checksums", "no-sync"],
        },
        "postgresql": {
            "listen": postgres,
            "connect_address": postgres,
            "data_dir": dir.join("data"),
            "bin_dir": postgres_bin,
            "pgpass": dir.join("pgpass"),
            "authentication": {
                "superuser": user("postgres"),
                "replication": user("replicator"),
                "rewind": user("rewind_user"),
            },
            "pg_hba": [
                "local all all trust",
                "host all all 10.77.0.0/24 trust",
                "host replication replicator 10.77.0.0/24 trust",
            ],
            "basebackup": [{ "checkpoint": "fast" }, "no-sync"],
            "parameters": {
                "unix_socket_directories": dir,
                "shared_buffers": "32MB",
                // With the data, so that a server that is killed leaves nothing in /dev/shm.
                "dynamic_shared_memory_type": "mmap",
                "min_wal_size": "32MB",
                "max_wal_size": "96MB",
                "log_line_prefix": "%m [%p] ",
                "log_min_error_statement": "panic",
            },
        },
    });
    format!("{config:#}\n")
}

/// How routers write the time, in the words of strftime.
pub(crate) const LOG_TIME: &str = "%Y-%m-%dT%H:%M:%S%.6f%:z";

/// `router.yml`.
pub(crate) fn router(ip: Ipv4Addr, etcd: &[String]) -> String {
    let listen = |port: u16| format!("{ip}:{port}");
    let config = json!({
        "scope": SCOPE,
        "etcd3": { "hosts": etcd },
        "ports": [
            { "name": "read-write", "listen": listen(READ_WRITE_PORT), "target": "leader" },
            { "name": "read-only", "listen": listen(READ_ONLY_PORT), "target": "replica", "no_candidate": "hold" },
        ],
        "admin": listen(ROUTER_ADMIN_PORT),
        // Both for [`crate::wire`]: which connection is whose, and when exactly the leader changed.
        "log_sessions": true,
        "log": { "dateformat": LOG_TIME },
    });
    format!("{config:#}\n")
}
