//! The effective `postgresql` section: dynamic settings with the local ones over them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use crate::Secret;

/// What this node's PostgreSQL shall be, after merging (config reference §2.2).
#[derive(Debug, Clone, PartialEq)]
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
    /// Parameters for postgresql.conf, protected ones left out.
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
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Credentials {
    /// Role name.
    pub username: String,
    /// Its password.
    pub password: Option<Secret>,
    /// Further libpq settings (`sslmode`, `sslrootcert` …).
    pub options: BTreeMap<String, String>,
}
