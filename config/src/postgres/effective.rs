//! Dynamic and local `postgresql` section to one typed configuration.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Map, Value};

use super::{Credentials, DEFAULT_PORT, PostgresConfig};
use crate::env::CREDENTIALS;
use crate::section::Section;
use crate::{Secret, address, options, protected};

/// Roles that may have settings of their own (`parameters_primary`, `pg_hba_replica` …).
const ROLES: &[&str] = &["primary", "replica", "standby_leader"];

/// Keys of the section that the dynamic configuration cannot set.
pub(crate) const LOCAL_ONLY: &[&str] =
    &["connect_address", "proxy_address", "listen", "config_dir", "data_dir", "pgpass", "authentication"];

/// Settings that PostgreSQL reads only in recovery; found among the parameters they are moved there.
pub(crate) const RECOVERY: &[&str] = &[
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

/// Local keys replace dynamic ones, except that `use_slots` is dynamic and `parameters` merge name by name.
pub(super) fn merged(local: &Section<'_>, dynamic: &Section<'_>) -> Map<String, Value> {
    let mut merged = Map::new();
    told_local_only(dynamic);
    for (key, value) in dynamic.map().iter().filter(|(key, _)| !LOCAL_ONLY.contains(&key.as_str())) {
        merged.insert(key.clone(), value.clone());
    }
    for (key, value) in local.map() {
        match key.as_str() {
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

/// Tells the keys of a dynamic section that only a local file may have.
pub(crate) fn told_local_only(dynamic: &Section<'_>) {
    for key in LOCAL_ONLY.iter().filter(|key| dynamic.has(key)) {
        dynamic.notice(key, "has no effect in the dynamic configuration; it belongs to the local file");
    }
}

/// Reads a merged section; `dynamic` alone has what only it may set.
pub(crate) fn read(section: &Section<'_>, dynamic: &Section<'_>, scope: &str) -> PostgresConfig {
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
