//! The effective `postgresql` section: dynamic settings with the local ones over them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Map, Value};

use crate::dynamic::Settings;
use crate::env::{CREDENTIALS, Env};
use crate::local::Local;
use crate::report::{Notice, Origins, Report};
use crate::section::Section;
use crate::{Secret, address, options, protected};

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
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Credentials {
    /// Role name; empty where none is configured (libpq then takes the operating system's user).
    pub username: String,
    /// Its password.
    pub password: Option<Secret>,
    /// Further libpq settings (`sslmode`, `sslrootcert` …).
    pub options: BTreeMap<String, String>,
}

/// Roles that may have settings of their own (`parameters_primary`, `pg_hba_replica` …).
const ROLES: &[&str] = &["primary", "replica", "standby_leader"];

/// Keys of the section that the dynamic configuration cannot set.
const LOCAL_ONLY: &[&str] =
    &["connect_address", "proxy_address", "listen", "config_dir", "data_dir", "pgpass", "authentication"];

/// Settings that PostgreSQL reads only in recovery; found among the parameters they are moved there.
const RECOVERY: &[&str] = &[
    "archive_cleanup_command",
    "pause_at_recovery_target",
    "primary_conninfo",
    "primary_slot_name",
    "promote_trigger_file",
    "recovery_end_command",
    "recovery_min_apply_delay",
    "recovery_target",
    "recovery_target_action",
    "recovery_target_inclusive",
    "recovery_target_lsn",
    "recovery_target_name",
    "recovery_target_time",
    "recovery_target_timeline",
    "recovery_target_xid",
    "restore_command",
    "standby_mode",
    "trigger_file",
];

const DEFAULT_PORT: u16 = 5432;

impl PostgresConfig {
    /// Merges the dynamic `postgresql` section with the local one over it (config reference §2.2). A bad value keeps its
    /// default. The notices are the same as long as the configuration is: log them when they change.
    pub fn effective(local: &Local, settings: &Settings) -> (Self, Vec<Notice>) {
        let report = Report::new(Origins::new("local configuration"));
        let dynamic_report = Report::new(Origins::new("dynamic configuration"));
        let dynamic = Section::at(&settings.postgresql, "postgresql", &dynamic_report);
        let merged = merged(&Section::at(&local.postgresql, "postgresql", &report), &dynamic);
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

/// The local section, complete enough to run PostgreSQL: legacy places of users put right, `pgpass` filled in.
pub(crate) fn read_local(root: &Section<'_>, env: &Env) -> Option<Map<String, Value>> {
    let Some(section) = root.section("postgresql") else {
        if !root.has("postgresql") {
            root.missing::<()>("postgresql", "what belongs to this node's PostgreSQL", Some(EXAMPLE));
        }
        return None;
    };
    let mut map = section.map().clone();
    upgrade_users(&mut map);
    check_local(&Section::at(&map, "postgresql", root.report()));
    if !section.has("pgpass") {
        let home = env.get("HOME").map(PathBuf::from);
        let beside_data = || section.file("data_dir").and_then(|dir| dir.parent().map(PathBuf::from));
        let pgpass = home.or_else(beside_data).unwrap_or_default().join("pgpass");
        map.insert("pgpass".to_owned(), Value::from(pgpass.to_string_lossy()));
    }
    Some(map)
}

const EXAMPLE: &str =
    "give postgresql: {listen: '0.0.0.0:5432', data_dir: /var/lib/postgresql/data, authentication: …}";

fn check_local(section: &Section<'_>) {
    unknown_keys(section);
    match section.text("listen") {
        None if section.has("listen") => {}
        None => section.missing::<()>("listen", "where PostgreSQL listens", Some(EXAMPLE)).unwrap_or_default(),
        Some(listen) => {
            if let Err(expected) = address::split(&listen, Some(DEFAULT_PORT)) {
                section.wrong::<()>("listen", expected);
            }
        }
    }
    for key in ["connect_address", "proxy_address"] {
        if let Some(Err(expected)) = section.text(key).map(|text| address::split(&text, Some(DEFAULT_PORT))) {
            section.wrong::<()>(key, expected);
        }
    }
    if section.has("data_dir") {
        section.name("data_dir");
    } else {
        section.missing::<()>("data_dir", "the data directory", Some(EXAMPLE));
    }
    for key in ["parameters", "parameters_primary", "parameters_replica", "parameters_standby_leader", "recovery_conf"]
    {
        section.section(key);
    }
    let users = section.section("authentication");
    for user in ["superuser", "replication", "rewind"] {
        let credentials = users.as_ref().and_then(|users| users.section(user));
        if let Some(credentials) = &credentials {
            credentials.unknown(CREDENTIALS);
            CREDENTIALS.iter().for_each(|key| drop(credentials.text(key)));
        }
        let named = credentials.is_some_and(|credentials| credentials.has("username"));
        if user == "replication" && !named {
            section.missing::<()>("authentication.replication.username", "the user that standbys connect as", None);
        }
    }
}

const KNOWN: &[&str] = &[
    "name",
    "connect_address",
    "proxy_address",
    "listen",
    "config_dir",
    "data_dir",
    "pgpass",
    "authentication",
    "bin_dir",
    "bin_name",
    "database",
    "parameters",
    "parameters_primary",
    "parameters_replica",
    "parameters_standby_leader",
    "pg_hba",
    "pg_hba_primary",
    "pg_hba_replica",
    "pg_hba_standby_leader",
    "pg_ident",
    "pg_ident_primary",
    "pg_ident_replica",
    "pg_ident_standby_leader",
    "custom_conf",
    "config_base_name",
    "recovery_conf",
    "use_slots",
    "use_pg_rewind",
    "remove_data_directory_on_rewind_failure",
    "remove_data_directory_on_diverged_timelines",
    "rewind",
    "basebackup",
    "create_replica_methods",
    "create_replica_method",
    "callbacks",
    "pre_promote",
    "before_stop",
    "pg_ctl_timeout",
    "use_unix_socket",
    "use_unix_socket_repl",
    "krbsrvname",
    "replication",
    "superuser",
    "pg_rewind",
];

/// Maps are custom ways to make a replica, so only other unknown values are told.
pub(crate) fn unknown_keys(section: &Section<'_>) {
    let maps = section.map().iter().filter(|(_, value)| value.is_object()).map(|(key, _)| key.as_str());
    let known: Vec<&str> = KNOWN.iter().copied().chain(maps).collect();
    section.unknown(&known);
}

/// Files of Patroni before 1.0 had the users beside `authentication`, and `pg_rewind` for the superuser.
fn upgrade_users(map: &mut Map<String, Value>) {
    if !map.get("authentication").is_some_and(|value| !value.is_null()) {
        let users = ["replication", "superuser"].into_iter();
        let users = users.filter_map(|user| Some((user.to_owned(), map.get(user)?.clone())));
        let users: Map<String, Value> = users.collect();
        if users.is_empty() {
            return;
        }
        map.insert("use_pg_rewind".to_owned(), Value::from(map.contains_key("pg_rewind")));
        map.insert("authentication".to_owned(), Value::Object(users));
    }
    let pg_rewind = map.get("pg_rewind").filter(|value| value.is_object()).cloned();
    if let (Some(pg_rewind), Some(Value::Object(users))) = (pg_rewind, map.get_mut("authentication"))
        && !users.contains_key("superuser")
    {
        users.insert("superuser".to_owned(), pg_rewind);
    }
}

/// Local keys replace dynamic ones, except that `use_slots` is dynamic and `parameters` merge name by name.
fn merged(local: &Section<'_>, dynamic: &Section<'_>) -> Map<String, Value> {
    let mut merged = Map::new();
    for (key, value) in dynamic.map() {
        if LOCAL_ONLY.contains(&key.as_str()) {
            dynamic.notice(key, "has no effect in the dynamic configuration; it belongs to the local file");
        } else if key != "parameters" {
            merged.insert(key.clone(), value.clone());
        }
    }
    for (key, value) in local.map() {
        match key.as_str() {
            "parameters" => {}
            "use_slots" => local.notice(key, "has no effect in a local file; it belongs to the dynamic configuration"),
            _ => {
                merged.insert(key.clone(), value.clone());
            }
        }
    }
    let mut parameters = Map::new();
    for section in [dynamic.section("parameters"), local.section("parameters")].into_iter().flatten() {
        for (name, value) in section.map() {
            parameters.insert(name.to_lowercase(), value.clone());
        }
    }
    if let Some(section) = local.section("parameters") {
        for name in section.map().keys().filter(|name| protected::is_protected(&name.to_lowercase())) {
            section.notice(name, "has no effect in a local file; only the dynamic configuration can set it");
        }
    }
    merged.insert("parameters".to_owned(), Value::Object(parameters));
    merged
}

fn read(section: &Section<'_>, dynamic: &Section<'_>, scope: &str) -> PostgresConfig {
    let listen = section.text("listen").unwrap_or_else(|| "localhost".to_owned());
    let (listen_addresses, port) =
        address::split(&listen, Some(DEFAULT_PORT)).unwrap_or(("localhost".to_owned(), DEFAULT_PORT));
    let with_port =
        |text: String| address::split(&text, Some(port)).map_or(text, |(host, port)| address::join(&host, port));
    let connect_address = section.text("connect_address").map(with_port);
    let data_dir = absolute(section.file("data_dir").unwrap_or_else(|| PathBuf::from("data")));

    let mut parameters = section.section("parameters").map(|section| gucs(&section)).unwrap_or_default();
    parameters.retain(|name, _| !protected::is_protected(name));
    let mut protected = protected::read(dynamic.section("parameters").as_ref());
    // It is no option of the command line, but a setting of the file.
    parameters.extend(protected.remove_entry(protected::WAL_KEEP_SIZE));
    protected.insert("listen_addresses".to_owned(), listen_addresses.clone());
    protected.insert("port".to_owned(), port.to_string());
    protected.insert("cluster_name".to_owned(), scope.to_owned());
    let recovery_conf = recovery(section, &mut parameters);

    let users = section.section("authentication");
    let user = |name| users.as_ref().and_then(|users| users.section(name)).map(|user| credentials(&user));
    let superuser = user("superuser").unwrap_or_default();

    PostgresConfig {
        connect_address: connect_address.unwrap_or_else(|| address::join(&local_host(&listen_addresses), port)),
        listen_addresses,
        port,
        proxy_address: section.text("proxy_address").map(with_port),
        config_dir: section.file("config_dir").map_or_else(|| data_dir.clone(), absolute),
        data_dir,
        bin_dir: section.file("bin_dir"),
        bin_name: texts(section, "bin_name"),
        pgpass: absolute(section.file("pgpass").unwrap_or_else(|| PathBuf::from("pgpass"))),
        database: section.text("database").unwrap_or_else(|| "postgres".to_owned()),
        rewind: user("rewind").unwrap_or_else(|| superuser.clone()),
        superuser,
        replication: user("replication").unwrap_or_default(),
        parameters,
        protected,
        parameters_by_role: ROLES.iter().filter_map(|role| role_parameters(section, role)).collect(),
        pg_hba: section.lines("pg_hba"),
        pg_ident: section.lines("pg_ident"),
        custom_conf: section.file("custom_conf"),
        recovery_conf,
        use_slots: dynamic.boolean("use_slots").unwrap_or(true),
        use_pg_rewind: section.boolean("use_pg_rewind").unwrap_or(false),
        remove_data_directory_on_rewind_failure: flag(section, "remove_data_directory_on_rewind_failure"),
        remove_data_directory_on_diverged_timelines: flag(section, "remove_data_directory_on_diverged_timelines"),
        basebackup: options::basebackup(section),
        rewind_options: options::rewind(section),
        create_replica_methods: replica_methods(section),
        callbacks: texts(section, "callbacks"),
        pre_promote: section.text("pre_promote"),
        before_stop: section.text("before_stop"),
        pg_ctl_timeout: section.seconds("pg_ctl_timeout", 0..=86_400, Some("s")).unwrap_or(Duration::from_secs(60)),
        use_unix_socket: flag(section, "use_unix_socket"),
        use_unix_socket_repl: flag(section, "use_unix_socket_repl"),
        raw: section.map().clone(),
    }
}

fn flag(section: &Section<'_>, key: &str) -> bool {
    section.boolean(key).unwrap_or(false)
}

/// Only without a working directory does a path stay relative.
fn absolute(path: PathBuf) -> PathBuf {
    std::path::absolute(&path).unwrap_or(path)
}

/// Where this node itself reaches its PostgreSQL.
fn local_host(listen_addresses: &str) -> String {
    let mut hosts = listen_addresses.split(',').map(str::trim);
    let first = hosts.clone().next().unwrap_or("localhost");
    let local =
        hosts.any(|host| matches!(host.to_ascii_lowercase().as_str(), "*" | "localhost" | "0.0.0.0" | "127.0.0.1"));
    if local { "localhost".to_owned() } else { first.to_owned() }
}

fn credentials(section: &Section<'_>) -> Credentials {
    let options = CREDENTIALS.iter().filter(|key| !matches!(**key, "username" | "password"));
    Credentials {
        username: section.text("username").unwrap_or_default(),
        password: section.text("password").map(Secret::new),
        options: options.filter_map(|key| Some(((*key).to_owned(), section.text(key)?))).collect(),
    }
}

fn texts(section: &Section<'_>, key: &str) -> BTreeMap<String, String> {
    let Some(section) = section.section(key) else { return BTreeMap::new() };
    section.map().keys().filter_map(|key| Some((key.clone(), section.text(key)?))).collect()
}

fn replica_methods(section: &Section<'_>) -> Vec<String> {
    let methods = section.lines("create_replica_methods").or_else(|| section.lines("create_replica_method"));
    methods.filter(|methods| !methods.is_empty()).unwrap_or_else(|| vec!["basebackup".to_owned()])
}

fn role_parameters(section: &Section<'_>, role: &str) -> Option<(String, BTreeMap<String, String>)> {
    let own = section.section(&format!("parameters_{role}"))?;
    let mut parameters = gucs(&own);
    for name in own.map().keys().filter(|name| protected::is_protected(&name.to_lowercase())) {
        own.notice(name, "has no effect for one role; only the dynamic configuration can set it, for all");
        parameters.remove(&name.to_lowercase());
    }
    Some((role.to_owned(), parameters))
}

/// `recovery_conf`, or what `parameters` have of it, which then replaces it.
fn recovery(section: &Section<'_>, parameters: &mut BTreeMap<String, String>) -> BTreeMap<String, String> {
    let moved: BTreeMap<_, _> = RECOVERY.iter().filter_map(|name| parameters.remove_entry(*name)).collect();
    if !moved.is_empty() {
        return moved;
    }
    section.section("recovery_conf").map(|section| gucs(&section)).unwrap_or_default()
}

/// Settings with names in lower case, as PostgreSQL's are case-insensitive. Null means not set.
fn gucs(section: &Section<'_>) -> BTreeMap<String, String> {
    let mut gucs = BTreeMap::new();
    for (name, value) in section.map().iter().filter(|(_, value)| !value.is_null()) {
        match guc_text(value) {
            Some(text) => {
                gucs.insert(name.to_lowercase(), text);
            }
            None => {
                section.wrong::<()>(name, "a text, a number, on or off is expected");
            }
        }
    }
    gucs
}

/// A value as postgresql.conf takes it.
pub(crate) fn guc_text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(value) => Some(if *value { "on" } else { "off" }.to_owned()),
        _ => None,
    }
}
