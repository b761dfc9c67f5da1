//! The effective `postgresql` section: dynamic settings with the local ones over them.

mod effective;
mod local;

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

pub(crate) use self::effective::{LOCAL_ONLY, RECOVERY, guc_text, read, told_local_only};
pub(crate) use self::local::{KNOWN, read_local, unknown_keys};

use crate::Secret;
use crate::dynamic::Settings;
use crate::local::Local;
use crate::report::{Notice, Origins, Report};
use crate::section::Section;

const DEFAULT_PORT: u16 = 5432;

/// What this node's PostgreSQL shall be, after merging (config reference §2.2).
#[derive(Clone, PartialEq)]
pub struct PostgresConfig {
    /// Addresses to listen on (`listen_addresses`), comma separated.
    pub listen_addresses: String,
    /// Port to listen on.
    pub port: u16,
    /// `host:port` that others are told.
    pub connect_address: String,
    /// `host:port` of a pooler in front of it.
    pub proxy_address: Option<String>,
    /// The data directory.
    pub data_dir: PathBuf,
    /// Where the configuration files are; default the data directory.
    pub config_dir: PathBuf,
    /// Where PostgreSQL's programs are; none = `$PATH`.
    pub bin_dir: Option<PathBuf>,
    /// Other names for programs (`bin_name`).
    pub bin_name: BTreeMap<String, String>,
    /// The password file for replication, clones and rewinds.
    pub pgpass: PathBuf,
    /// Database of local connections and of `conn_url`.
    pub database: String,
    /// Administrative user.
    pub superuser: Credentials,
    /// User of standbys.
    pub replication: Credentials,
    /// User of pg_rewind; the superuser where the file names none.
    pub rewind: Credentials,
    /// Parameters for postgresql.conf by name in lower case, protected ones left out; `wal_keep_size` always.
    pub parameters: BTreeMap<String, String>,
    /// Parameters that only the DCS may set; given on the command line, defaults included.
    pub protected: BTreeMap<String, String>,
    /// Extra parameters per role (`parameters_primary` …).
    pub parameters_by_role: BTreeMap<String, BTreeMap<String, String>>,
    /// Lines of pg_hba.conf; none = left as initdb made it (and `bootstrap.pg_hba` appended).
    pub pg_hba: Option<Vec<String>>,
    /// Lines of pg_ident.conf.
    pub pg_ident: Option<Vec<String>>,
    /// A file included in place of `postgresql.base.conf`.
    pub custom_conf: Option<PathBuf>,
    /// Recovery settings (`recovery_conf` and those found among `parameters`).
    pub recovery_conf: BTreeMap<String, String>,
    /// Replication slots for members.
    pub use_slots: bool,
    /// pg_rewind may be used.
    pub use_pg_rewind: bool,
    /// A data directory that could not be rewound may be removed.
    pub remove_data_directory_on_rewind_failure: bool,
    /// A diverged data directory may be removed instead of rewound.
    pub remove_data_directory_on_diverged_timelines: bool,
    /// Extra options of pg_basebackup, `--` and values included, forbidden ones left out.
    pub basebackup: Vec<String>,
    /// Extra options of pg_rewind.
    pub rewind_options: Vec<String>,
    /// How replicas are made, in order; default `basebackup`.
    pub create_replica_methods: Vec<String>,
    /// Commands by event (`on_start` …).
    pub callbacks: BTreeMap<String, String>,
    /// Run before a promotion; failure cancels it.
    pub pre_promote: Option<String>,
    /// Run before a stop.
    pub before_stop: Option<String>,
    /// How long pg_ctl-like operations may take.
    pub pg_ctl_timeout: Duration,
    /// Local connections use the unix socket.
    pub use_unix_socket: bool,
    /// Local replication connections use the unix socket.
    pub use_unix_socket_repl: bool,
    /// The section after merging, for custom methods.
    pub raw: serde_json::Map<String, serde_json::Value>,
}

/// A PostgreSQL user and how it connects.
#[derive(Clone, PartialEq, Default)]
pub struct Credentials {
    /// Role name; empty where none is configured (libpq then takes the operating system's user).
    pub username: String,
    /// Its password.
    pub password: Option<Secret>,
    /// Further libpq settings (`sslmode`, `sslrootcert` …).
    pub options: BTreeMap<String, String>,
}

/// Without what may hold passwords as plain JSON or in a command.
impl fmt::Debug for PostgresConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresConfig")
            .field("listen_addresses", &self.listen_addresses)
            .field("port", &self.port)
            .field("connect_address", &self.connect_address)
            .field("data_dir", &self.data_dir)
            .field("superuser", &self.superuser)
            .field("replication", &self.replication)
            .field("rewind", &self.rewind)
            .field("parameters", &self.parameters)
            .field("protected", &self.protected)
            .finish_non_exhaustive()
    }
}

/// The options by name only: `sslpassword` is one.
impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("username", &self.username)
            .field("password", &self.password)
            .field("options", &self.options.keys())
            .finish()
    }
}

impl PostgresConfig {
    /// Merges the dynamic `postgresql` section with the local one over it (config reference §2.2). A bad value keeps its
    /// default. The notices are the same as long as the configuration is: log them when they change.
    pub fn effective(local: &Local, settings: &Settings) -> (Self, Vec<Notice>) {
        let report = Report::new(Origins::new("local configuration"));
        let dynamic_report = Report::new(Origins::new("dynamic configuration"));
        let dynamic = Section::at(&settings.postgresql, "postgresql", &dynamic_report);
        let merged = effective::merged(&Section::at(&local.postgresql, "postgresql", &report), &dynamic);
        let config = read(&Section::at(&merged, "postgresql", &report), &dynamic, &local.scope);
        let mut notices = dynamic_report.into_notices();
        notices.extend(report.into_notices());
        (config, notices)
    }

    /// The parameters for a role (`primary`, `replica`, `standby_leader`): its own ones over those for all.
    pub fn parameters_for(&self, role: &str) -> BTreeMap<String, String> {
        let mut parameters = self.parameters.clone();
        parameters.extend(self.parameters_by_role.get(role).cloned().unwrap_or_default());
        parameters
    }

    /// Lines of pg_hba.conf for a role: `pg_hba_<role>` replaces the lines for all.
    pub fn pg_hba_for(&self, role: &str) -> Option<Vec<String>> {
        self.lines_for("pg_hba", role).or_else(|| self.pg_hba.clone())
    }

    /// Lines of pg_ident.conf for a role: `pg_ident_<role>` replaces the lines for all.
    pub fn pg_ident_for(&self, role: &str) -> Option<Vec<String>> {
        self.lines_for("pg_ident", role).or_else(|| self.pg_ident.clone())
    }

    /// `config_base_name`: the name of `postgresql.conf` without its ending.
    pub fn config_base_name(&self) -> &str {
        self.raw.get("config_base_name").and_then(Value::as_str).unwrap_or("postgresql")
    }

    /// `krbsrvname`, where one is configured.
    pub fn krbsrvname(&self) -> Option<&str> {
        self.raw.get("krbsrvname").and_then(Value::as_str)
    }

    fn lines_for(&self, key: &str, role: &str) -> Option<Vec<String>> {
        let lines = self.raw.get(&format!("{key}_{role}"))?.as_array()?;
        Some(lines.iter().filter_map(Value::as_str).map(str::to_owned).collect())
    }
}
