//! The `postgresql` section of a node's own file: what it must have, and the places of older files.

use std::path::PathBuf;

use serde_json::{Map, Value};

use super::DEFAULT_PORT;
use crate::address;
use crate::env::{CREDENTIALS, Env};
use crate::section::Section;

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
            told_for_libpq_only(credentials);
        }
        let named = credentials.is_some_and(|credentials| credentials.has("username"));
        if user == "replication" && !named {
            section.missing::<()>("authentication.replication.username", "the user that standbys connect as", None);
        }
    }
}

/// What only libpq does for a user, and the values that ask it for nothing.
const LIBPQ_ONLY: &[(&str, &[&str])] = &[
    ("sslpassword", &[]),
    ("sslcrl", &[]),
    ("sslcrldir", &[]),
    ("gssencmode", &["disable", "prefer"]),
    ("channel_binding", &["disable", "prefer"]),
    ("sslnegotiation", &["postgres"]),
];

/// The agent connects to PostgreSQL without libpq, which the WAL receiver and PostgreSQL's programs use.
fn told_for_libpq_only(credentials: &Section<'_>) {
    for (key, nothing) in LIBPQ_ONLY {
        let asks = |value: &Value| value.as_str().is_none_or(|text| !text.is_empty() && !nothing.contains(&text));
        if credentials.get(key).is_some_and(asks) {
            let message = "is for replication and PostgreSQL's programs; the agent's own connections do without it";
            credentials.notice(key, message);
        }
    }
}

pub(crate) const KNOWN: &[&str] = &[
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

/// What a way to make a replica has beside its own arguments.
const METHOD: &[&str] = &["command", "keep_data", "no_params", "no_leader"];

/// Maps whose names are given.
const NAMED: &[(&str, &[&str])] = &[
    ("authentication", &["superuser", "replication", "rewind"]),
    ("callbacks", &["on_start", "on_stop", "on_restart", "on_reload", "on_role_change"]),
    ("bin_name", &["postgres", "initdb", "pg_basebackup", "pg_controldata", "pg_ctl", "pg_isready", "pg_rewind"]),
];

/// Tells what nobody reads. A map of any name may be a way to make a replica: one that is listed, or looks like one, as it
/// may be listed in the other configuration, the local or the dynamic one.
pub(crate) fn unknown_keys(section: &Section<'_>) {
    let lists = ["create_replica_methods", "create_replica_method"].into_iter().filter_map(|key| section.get(key));
    let listed: Vec<&str> = lists.filter_map(Value::as_array).flatten().filter_map(Value::as_str).collect();
    let is_method = |(key, value): &(&String, &Value)| {
        let looks_like_one = |map: &Map<String, Value>| METHOD.iter().any(|key| map.contains_key(*key));
        value.as_object().is_some_and(|map| listed.contains(&key.as_str()) || looks_like_one(map))
    };
    let methods = section.map().iter().filter(is_method).map(|(key, _)| key.as_str());
    let known: Vec<&str> = KNOWN.iter().copied().chain(methods).collect();
    section.unknown(&known);
    for (key, names) in NAMED {
        if let Some(map) = section.get(key).and_then(Value::as_object) {
            Section::at(map, section.path(key), section.report()).unknown(names);
        }
    }
}

/// Files of Patroni before 1.0 had the users beside `authentication`, and `pg_rewind` for the superuser.
fn upgrade_users(map: &mut Map<String, Value>) {
    if map.get("authentication").is_none_or(Value::is_null) {
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
