//! `patroni.yml`: what belongs to one node.

mod read;
mod start;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use serde_json::{Map, Value};

pub(crate) use self::read::{KNOWN, read_ctl, read_log, read_namespace, read_root};
pub(crate) use self::start::is_read_at_start;
use crate::env::Env;
use crate::report::{Errors, Notice};
use crate::{Secret, document};

/// One node's configuration: the file with the environment over it.
#[derive(Clone, PartialEq)]
pub struct Local {
    /// The cluster's name.
    pub scope: String,
    /// This member's name.
    pub name: String,
    /// Prefix of the keys, default `service`; may contain slashes.
    pub namespace: String,
    /// The REST API.
    pub restapi: RestApi,
    /// Credentials for other members' REST API.
    pub ctl: Ctl,
    /// Where etcd is.
    pub etcd: Etcd,
    /// The `postgresql` section as it stands; [`crate::PostgresConfig::effective`] merges it with the dynamic one.
    pub postgresql: Map<String, Value>,
    /// Present: this node may initialise a new cluster.
    pub bootstrap: Option<Bootstrap>,
    /// The node's tags, JSON types and order kept.
    pub tags: Map<String, Value>,
    /// The kernel watchdog.
    pub watchdog: Watchdog,
    /// What ends writes where the agent can't.
    pub guard: Guard,
    /// Addresses that the leader holds.
    pub vip: Option<Vip>,
    /// Logging.
    pub log: Log,
    /// The whole merged document, for `--print` and for what has no typed field yet.
    pub raw: Value,
}

/// `restapi`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RestApi {
    /// Where to listen, `host:port`.
    pub listen: String,
    /// What other members are told; default `listen`.
    pub connect_address: String,
    /// User and password of unsafe requests.
    pub authentication: Option<(String, Secret)>,
    /// TLS: present makes the API https.
    pub certfile: Option<PathBuf>,
    /// TLS: private key; default the certificate's file.
    pub keyfile: Option<PathBuf>,
    /// TLS: who may have signed client certificates.
    pub cafile: Option<PathBuf>,
    /// TLS: ask for client certificates.
    pub verify_client: VerifyClient,
    /// Who may send unsafe requests: addresses, networks, host names; empty = everybody.
    pub allowlist: Vec<String>,
    /// The members may, too.
    pub allowlist_include_members: bool,
    /// Headers added to every response.
    pub http_extra_headers: Vec<(String, String)>,
    /// Headers added to every response over TLS.
    pub https_extra_headers: Vec<(String, String)>,
}

/// `watchdog`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Watchdog {
    /// Whether it is used.
    pub mode: WatchdogMode,
    /// The device.
    pub device: PathBuf,
    /// Seconds between the reset and the end of the lease; -1: half of the lease.
    pub safety_margin: i64,
    /// How the device is talked to.
    pub driver: WatchdogDriver,
}

impl Default for Watchdog {
    fn default() -> Self {
        Self {
            mode: WatchdogMode::Automatic,
            device: "/dev/watchdog".into(),
            safety_margin: 5,
            driver: WatchdogDriver::Kernel,
        }
    }
}

/// `watchdog.driver`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WatchdogDriver {
    /// The kernel's interface.
    Kernel,
    /// Plain text into a pipe, for tests.
    Testing,
}

/// `watchdog.mode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WatchdogMode {
    /// Not used.
    Off,
    /// Used where it works.
    Automatic,
    /// A node where it does not work may not lead.
    Required,
}

/// `guard`: Trunkline's own; Patroni ignores it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guard {
    /// Let the kernel hold PostgreSQL's packets back after the lease, where the system permits it.
    pub egress: bool,
}

impl Default for Guard {
    fn default() -> Self {
        Self { egress: true }
    }
}

/// `vip`: Trunkline's own; Patroni ignores it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vip {
    /// The addresses, with the length of their network's prefix.
    pub addresses: Vec<IpNet>,
    /// The interface that they are added to.
    pub interface: String,
}

/// `restapi.verify_client`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum VerifyClient {
    /// Certificates are not asked for.
    #[default]
    None,
    /// Unsafe requests need one.
    Optional,
    /// Every request needs one.
    Required,
}

/// `ctl`: how the command line and peers call a REST API.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Ctl {
    /// Don't verify the server's certificate.
    pub insecure: bool,
    /// Who may have signed the server's certificate; default `restapi.cafile`.
    pub cacert: Option<PathBuf>,
    /// Client certificate.
    pub certfile: Option<PathBuf>,
    /// Its key.
    pub keyfile: Option<PathBuf>,
    /// User and password; default `restapi.authentication`.
    pub authentication: Option<(String, Secret)>,
}

/// `etcd3` (or `etcd`, with a notice).
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Etcd {
    /// Endpoints as `http(s)://host:port`, in the order given; never empty.
    pub endpoints: Vec<String>,
    /// User and password.
    pub authentication: Option<(String, Secret)>,
    /// TLS: who may have signed the servers' certificates.
    pub cacert: Option<PathBuf>,
    /// TLS: client certificate.
    pub cert: Option<PathBuf>,
    /// TLS: its key.
    pub key: Option<PathBuf>,
    /// The endpoints stand for the cluster: no other members of it are looked for.
    pub use_proxies: bool,
}

/// `bootstrap`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Bootstrap {
    /// The first dynamic configuration, as it stands; the new cluster's `config` key.
    pub dcs: Map<String, Value>,
    /// `initdb`, or the name of a custom method.
    pub method: String,
    /// Options of initdb, `--` and values included (`--data-checksums`, `--encoding=UTF8`).
    pub initdb: Vec<String>,
    /// Lines appended to the generated pg_hba.conf.
    pub pg_hba: Vec<String>,
    /// Run once with a connection string as its last argument.
    pub post_bootstrap: Option<String>,
    /// The section as it stands, for custom methods.
    pub raw: Map<String, Value>,
}

/// `log`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Log {
    /// One JSON object a line instead of Patroni's text.
    pub json: bool,
    /// The least severe level shown: `DEBUG`, `INFO`, `WARNING`, `ERROR`, `CRITICAL`.
    pub level: String,
    /// Python-style format, default `%(asctime)s %(levelname)s: %(message)s`.
    pub format: String,
    /// strftime's format of `asctime`; none: `2031-05-01 10:00:00,123`.
    pub dateformat: Option<String>,
    /// JSON: other names of fields.
    pub renamed: BTreeMap<String, String>,
    /// JSON: what every line has.
    pub static_fields: Map<String, Value>,
    /// How many lines may wait to be written; further ones are dropped and counted.
    pub max_queue_size: usize,
    /// Directory of `patroni.log`; none = standard error.
    pub dir: Option<PathBuf>,
    /// Permissions of that file; none = as the umask says.
    pub mode: Option<u32>,
    /// How many full files are kept; 0: the file grows for ever.
    pub file_num: usize,
    /// Bytes after which a file is full; 0: never.
    pub file_size: u64,
}

impl Default for Log {
    fn default() -> Self {
        Self {
            json: false,
            level: "INFO".to_owned(),
            format: "%(asctime)s %(levelname)s: %(message)s".to_owned(),
            dateformat: None,
            renamed: BTreeMap::new(),
            static_fields: Map::new(),
            max_queue_size: 1000,
            dir: None,
            mode: None,
            file_num: 4,
            file_size: 25_000_000,
        }
    }
}

/// Without what may hold passwords as plain JSON.
impl fmt::Debug for Local {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Local")
            .field("scope", &self.scope)
            .field("name", &self.name)
            .field("namespace", &self.namespace)
            .field("restapi", &self.restapi)
            .field("etcd", &self.etcd)
            .field("tags", &self.tags)
            .finish_non_exhaustive()
    }
}

impl Local {
    /// Reads a file, or a directory of `*.yml`, with the environment over it; without one, `PATRONI_CONFIGURATION` or the
    /// environment alone. Unknown keys and other oddities become notices.
    ///
    /// # Errors
    /// Everything that is wrong, at once.
    pub fn load(path: Option<&Path>, env: &Env) -> Result<(Self, Vec<Notice>), Errors> {
        let (map, report) = document::load(path, env);
        let local = if map.is_empty() { None } else { read_root(&map, &report, env) };
        match (local, report.finish()) {
            (_, Err(errors)) => Err(errors),
            (Some(local), Ok(notices)) => Ok((local, notices)),
            // What could not be read has always left a problem behind.
            (None, Ok(_)) => Err(Errors(Vec::new())),
        }
    }

    /// The REST API's URL for other members, such as `http://10.0.0.1:8008`.
    pub fn api_url(&self) -> String {
        let scheme = if self.restapi.certfile.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.restapi.connect_address)
    }
}
