//! `--validate`: everything that can be said about a configuration without starting anything. Stricter than a start, which
//! only refuses what it cannot run with.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::env::Env;
use crate::report::{Notice, Problem};
use crate::section::Section;
use crate::{address, document, dynamic, local, options, postgres, protected};

/// Checks a file (or a directory, or the environment alone) and what it names on this machine. Ports are only looked at, not
/// tried. Returns every problem; with none the configuration is valid.
pub fn validate(path: Option<&Path>, env: &Env) -> (Vec<Problem>, Vec<Notice>) {
    let (map, report) = document::load(path, env);
    if !map.is_empty() {
        local::read_root(&map, &report, env);
        let root = Section::root(&map, &report);
        check_restapi(&root);
        check_tags(&root);
        check_certificates(&root);
        if let Some(postgresql) = root.section("postgresql") {
            check_postgresql(&postgresql, env);
        }
        if let Some(dcs) = root.section("bootstrap").and_then(|bootstrap| bootstrap.section("dcs")) {
            check_dynamic(&dcs);
        }
        check_ports_differ(&root);
    }
    report.into_parts()
}

fn check_restapi(root: &Section<'_>) {
    let Some(restapi) = root.section("restapi") else { return };
    check_reachable(&restapi, "connect_address", "listen", "http");
}

/// Others must be able to use the address that they are told.
fn check_reachable(section: &Section<'_>, told: &str, otherwise: &str, what: &str) {
    let key = if section.has(told) { told } else { otherwise };
    let Some(text) = section.get(key).and_then(Value::as_str) else { return };
    let Ok((hosts, _)) = address::split(text, Some(1)) else { return };
    let unusable = |host: &str| matches!(host, "0.0.0.0" | "*" | "::");
    if hosts.split(',').any(unusable) {
        let remedy = format!("give {told} with an address of this machine");
        section.wrong_with::<()>(key, "other members cannot connect to a wildcard address", Some(&remedy));
    } else if hosts.split(',').any(address::is_local_only) {
        section.notice(key, format!("only members on this machine can reach this {what} address"));
    }
}

fn check_tags(root: &Section<'_>) {
    let Some(tags) = root.section("tags") else { return };
    for (never, priority) in [("nofailover", "failover_priority"), ("nosync", "sync_priority")] {
        if tags.has(never) && tags.has(priority) {
            tags.wrong::<()>(priority, format!("at most one of {never} and {priority} may be given"));
        }
        tags.integer(priority, 0..=i64::from(i32::MAX), None);
    }
    for flag in ["nofailover", "nosync", "clonefrom", "noloadbalance", "nostream"] {
        tags.boolean(flag);
    }
    tags.name("replicatefrom");
}

fn check_certificates(root: &Section<'_>) {
    let mut sections = vec![
        (root.section("restapi"), ["certfile", "keyfile", "cafile"].as_slice()),
        (root.section("ctl"), &["certfile", "keyfile", "cacert"]),
        (root.section("etcd3").or_else(|| root.section("etcd")), &["cert", "key", "cacert"]),
    ];
    let users = root.section("postgresql").and_then(|postgresql| postgresql.section("authentication"));
    for user in ["superuser", "replication", "rewind"] {
        let user = users.as_ref().and_then(|users| users.section(user));
        sections.push((user, &["sslcert", "sslkey", "sslrootcert", "sslcrl"]));
    }
    for (section, keys) in sections.iter().filter_map(|(section, keys)| Some((section.as_ref()?, keys))) {
        for key in *keys {
            check_readable(section, key);
        }
    }
}

fn check_readable(section: &Section<'_>, key: &str) {
    let Some(file) = section.get(key).and_then(Value::as_str).filter(|file| !file.is_empty()) else { return };
    // libpq's word for the certificates of the system.
    if key == "sslrootcert" && file == "system" {
        return;
    }
    if let Err(error) = fs::File::open(file).and_then(|file| file.metadata()).and_then(|meta| match meta.is_file() {
        true => Ok(()),
        false => Err(std::io::Error::other("is no file")),
    }) {
        section.wrong::<()>(key, format!("cannot be read: {error}"));
    }
}

fn check_postgresql(section: &Section<'_>, env: &Env) {
    let nothing = Map::new();
    let dynamic = Section::at(&nothing, "postgresql", section.report());
    postgres::read(section, &dynamic, "");
    check_reachable(section, "connect_address", "listen", "PostgreSQL");
    let superuser = section.section("authentication").and_then(|users| users.section("superuser"));
    if superuser.is_none_or(|user| !user.has("username")) && !section.has("superuser") && !section.has("pg_rewind") {
        section.missing::<()>("authentication.superuser.username", "the administrative user", None);
    }
    check_data_dir(section);
    check_pgpass(section);
    check_programs(section, env);
    if let Some(custom_conf) = section.file("custom_conf").filter(|file| !file.is_file()) {
        section.wrong::<()>("custom_conf", format!("no such file: {}", custom_conf.display()));
    }
}

/// Absent, empty, or a data directory of PostgreSQL.
fn check_data_dir(section: &Section<'_>) {
    let Some(dir) = section.file("data_dir") else { return };
    let entries = match fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return,
        Err(error) => {
            section.wrong::<()>("data_dir", format!("cannot be read as a directory: {error}"));
            return;
        }
    };
    let names: Vec<_> = entries.flatten().map(|entry| entry.file_name()).collect();
    if names.is_empty() || names.iter().all(|name| name == "lost+found") {
        return;
    }
    let lacking = ["PG_VERSION", "global/pg_control", "pg_wal"].into_iter().find(|name| !dir.join(name).exists());
    if let Some(lacking) = lacking {
        let expected = format!("neither empty nor a data directory of PostgreSQL: {lacking} is missing");
        section.wrong_with::<()>("data_dir", expected, Some("remove what is there, or name another directory"));
    }
}

fn check_pgpass(section: &Section<'_>) {
    if section.file("pgpass").is_some_and(|file| file.exists() && !file.is_file()) {
        section.wrong::<()>("pgpass", "exists and is no file");
    }
}

/// The programs that the agent runs.
fn check_programs(section: &Section<'_>, env: &Env) {
    let mut programs = vec!["postgres", "initdb", "pg_controldata", "pg_basebackup"];
    if section.boolean("use_pg_rewind").unwrap_or(false) {
        programs.push("pg_rewind");
    }
    let names = section.section("bin_name");
    let bin_dir = section.file("bin_dir");
    let path = env.get("PATH").unwrap_or_default();
    let dirs: Vec<PathBuf> = match &bin_dir {
        Some(dir) => vec![dir.clone()],
        None => std::env::split_paths(path).collect(),
    };
    for program in programs {
        let name = names.as_ref().and_then(|names| names.text(program)).unwrap_or_else(|| program.to_owned());
        if dirs.iter().any(|dir| is_program(&dir.join(&name))) {
            continue;
        }
        match &bin_dir {
            Some(_) => section.wrong::<()>("bin_dir", format!("has no program {name}")),
            None => section.missing("bin_dir", &format!("{name} is not found in PATH"), Some("give bin_dir")),
        };
    }
}

fn is_program(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    fs::metadata(file).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

fn check_dynamic(dcs: &Section<'_>) {
    dynamic::check(dcs);
    if let Some(standby) = dcs.section("standby_cluster") {
        standby.integer("port", 1..=65_535, None);
    }
    let Some(postgresql) = dcs.section("postgresql") else { return };
    postgres::told_local_only(&postgresql);
    protected::read(postgresql.section("parameters").as_ref());
    for flag in ["use_slots", "use_pg_rewind"] {
        postgresql.boolean(flag);
    }
    for lines in ["pg_hba", "pg_ident"] {
        postgresql.lines(lines);
    }
    postgresql.seconds("pg_ctl_timeout", 0..=86_400, Some("s"));
    options::basebackup(&postgresql);
    options::rewind(&postgresql);
}

/// The REST API and PostgreSQL cannot both have one port.
fn check_ports_differ(root: &Section<'_>) {
    let listen = |section: &str, default| {
        let text = root.map().get(section)?.get("listen")?.as_str()?;
        address::split(text, default).ok()
    };
    let (Some((rest, rest_port)), Some((postgres, postgres_port))) =
        (listen("restapi", None), listen("postgresql", Some(5432)))
    else {
        return;
    };
    let everywhere = |hosts: &str| hosts.split(',').any(|host| matches!(host, "0.0.0.0" | "*" | "::"));
    let share =
        everywhere(&rest) || everywhere(&postgres) || rest.split(',').any(|a| postgres.split(',').any(|b| a == b));
    if rest_port == postgres_port && share {
        root.report().problem(
            "restapi.listen",
            Some(format!("{rest_port}")),
            "postgresql.listen has the same port",
            Some("give the REST API another one, such as 8008".to_owned()),
        );
    }
}
