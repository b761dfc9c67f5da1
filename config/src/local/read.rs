//! `patroni.yml` from JSON to types.

use std::collections::BTreeMap;

use ipnet::IpNet;
use serde_json::{Map, Value};

use super::{Bootstrap, Ctl, Guard, Local, Log, RestApi, VerifyClient, Vip, Watchdog, WatchdogDriver, WatchdogMode};
use crate::env::Env;
use crate::report::Report;
use crate::section::Section;
use crate::{Secret, etcd, options, postgres};

/// The placeholder that Patroni puts into `synchronous_standby_names`; no member may be named so.
const RESERVED_NAME: &str = "__patroni_strict_sync_replica_placeholder__";

pub(crate) const KNOWN: &[&str] = &[
    "scope",
    "name",
    "namespace",
    "thread_pool_size",
    "thread_stack_size",
    "log",
    "restapi",
    "ctl",
    "etcd",
    "etcd3",
    "bootstrap",
    "postgresql",
    "watchdog",
    "guard",
    "vip",
    "tags",
    "citus",
    "consul",
    "zookeeper",
    "exhibitor",
    "kubernetes",
    "raft",
    "ttl",
    "loop_wait",
    "retry_timeout",
    "standby_cluster",
];

/// Reads the whole document; `None` where something without which a node cannot be is missing or wrong, all of which the
/// report then has.
pub(crate) fn read_root(map: &Map<String, Value>, report: &Report, env: &Env) -> Option<Local> {
    let root = Section::root(map, report);
    root.unknown(KNOWN);
    for key in ["ttl", "loop_wait", "retry_timeout", "standby_cluster"] {
        if root.has(key) {
            root.notice(key, "has no effect in a local file; it belongs to the dynamic configuration (bootstrap.dcs)");
        }
    }
    if root.has("citus") {
        root.notice("citus", "Citus is not supported; ignored");
    }
    if !root.has("bootstrap") {
        root.notice("bootstrap", "without this section the node never initialises a new cluster");
    }
    let scope = required_name(&root, "scope", "the cluster's name", "PATRONI_SCOPE");
    let name = read_name(&root);
    let namespace = read_namespace(&root);
    let restapi = read_restapi(&root);
    let ctl = read_ctl(&root);
    let etcd = etcd::read(&root, true);
    let bootstrap = root.section("bootstrap").map(|section| read_bootstrap(&section));
    let postgresql = postgres::read_local(&root, env);
    let tags = root.copy("tags");
    check_tags(&root);
    let log = read_log(&root);
    let vip = read_vip(&root);
    Some(Local {
        scope: scope?,
        name: name?,
        namespace,
        restapi: restapi?,
        ctl,
        etcd: etcd?,
        postgresql: postgresql?,
        bootstrap,
        tags,
        watchdog: read_watchdog(&root),
        guard: read_guard(&root),
        vip,
        log,
        raw: Value::Object(map.clone()),
    })
}

fn read_guard(root: &Section<'_>) -> Guard {
    let Some(section) = root.section("guard") else { return Guard::default() };
    section.unknown(&["egress"]);
    let egress = section.choice("egress", &[("automatic", true), ("auto", true), ("off", false)]);
    Guard { egress: egress.unwrap_or(true) }
}

/// An address that can't be held is an error: clients would be led to nobody.
fn read_vip(root: &Section<'_>) -> Option<Vip> {
    let section = root.section("vip")?;
    section.unknown(&["address", "interface"]);
    let addresses = match section.has("address") {
        true => section.lines("address").and_then(|lines| {
            let addresses = lines.iter().map(|line| line.trim().parse().ok().filter(can_be_held));
            let addresses = addresses.collect::<Option<Vec<IpNet>>>().filter(|addresses| !addresses.is_empty());
            addresses.or_else(|| section.wrong("address", ADDRESS))
        }),
        false => section.missing("address", "the leader's address", Some(VIP_EXAMPLE)),
    };
    let interface = match section.has("interface") {
        true => {
            let name = section.name("interface").filter(|name| name.len() <= 15 && !name.contains(['/', ' ']));
            name.or_else(|| section.wrong("interface", "the name of a network interface is expected, such as eth0"))
        }
        false => section.missing("interface", "the network interface", Some(VIP_EXAMPLE)),
    };
    Some(Vip { addresses: addresses?, interface: interface? })
}

const VIP_EXAMPLE: &str = "give vip: {address: 10.0.0.100/24, interface: eth0}";

const ADDRESS: &str = "an address with the length of its prefix is expected, such as 10.0.0.100/24, or a list of them";

fn can_be_held(address: &IpNet) -> bool {
    let address = address.addr();
    !address.is_unspecified() && !address.is_multicast() && !address.is_loopback()
}

fn read_watchdog(root: &Section<'_>) -> Watchdog {
    let default = Watchdog::default();
    let Some(section) = root.section("watchdog") else { return default };
    section.unknown(&["mode", "device", "safety_margin", "driver"]);
    let words = [
        ("off", WatchdogMode::Off),
        ("disable", WatchdogMode::Off),
        ("disabled", WatchdogMode::Off),
        ("false", WatchdogMode::Off),
        ("automatic", WatchdogMode::Automatic),
        ("auto", WatchdogMode::Automatic),
        ("required", WatchdogMode::Required),
        ("require", WatchdogMode::Required),
    ];
    Watchdog {
        mode: section.choice("mode", &words).unwrap_or(default.mode),
        device: section.name("device").map_or(default.device, Into::into),
        safety_margin: section.integer("safety_margin", -1..=86_400, None).unwrap_or(default.safety_margin),
        driver: section
            .choice("driver", &[("default", WatchdogDriver::Kernel), ("testing", WatchdogDriver::Testing)])
            .unwrap_or(default.driver),
    }
}

fn required_name(root: &Section<'_>, key: &str, what: &str, variable: &str) -> Option<String> {
    if !root.has(key) {
        return root.missing(key, what, Some(&format!("give {key}: … or {variable}")));
    }
    root.name(key)
}

fn read_name(root: &Section<'_>) -> Option<String> {
    let name = match root.section("postgresql").filter(|postgresql| !root.has("name") && postgresql.has("name")) {
        // Where files of Patroni 0.x had it.
        Some(postgresql) => postgresql.name("name"),
        None => required_name(root, "name", "this member's name", "PATRONI_NAME"),
    }?;
    if name == RESERVED_NAME {
        return root.wrong("name", "this name is reserved");
    }
    if name.contains('/') {
        return root.wrong("name", "must not contain a slash, as it is part of a key in etcd");
    }
    Some(name)
}

/// Slashes at its ends mean nothing; an empty one is Patroni's, too.
pub(crate) fn read_namespace(root: &Section<'_>) -> String {
    root.text("namespace").map_or_else(|| "service".to_owned(), |namespace| namespace.trim_matches('/').to_owned())
}

const KNOWN_RESTAPI: &[&str] = &[
    "listen",
    "connect_address",
    "authentication",
    "certfile",
    "keyfile",
    "keyfile_password",
    "cafile",
    "ciphers",
    "verify_client",
    "allowlist",
    "allowlist_include_members",
    "http_extra_headers",
    "https_extra_headers",
    "request_queue_size",
    "server_tokens",
    "thread_pool_size",
];

fn read_restapi(root: &Section<'_>) -> Option<RestApi> {
    let Some(section) = root.section("restapi") else {
        if root.has("restapi") {
            return None;
        }
        return root.missing("restapi.listen", "where the REST API listens", Some(LISTEN_EXAMPLE));
    };
    section.unknown(KNOWN_RESTAPI);
    let listen = match section.has("listen") {
        true => section.address("listen"),
        false => section.missing("listen", "where the REST API listens", Some(LISTEN_EXAMPLE)),
    };
    let connect_address = match section.has("connect_address") {
        true => section.address("connect_address"),
        false => listen.clone(),
    };
    let words =
        [("none", VerifyClient::None), ("optional", VerifyClient::Optional), ("required", VerifyClient::Required)];
    let verify_client = section.choice("verify_client", &words).unwrap_or_default();
    let (certfile, cafile) = (section.file("certfile"), section.file("cafile"));
    if verify_client != VerifyClient::None && certfile.is_some() && cafile.is_none() {
        section.missing::<()>("cafile", "verify_client needs to know who may have signed client certificates", None);
    }
    let api = RestApi {
        listen: String::new(),
        connect_address: String::new(),
        authentication: section.user_and_password("authentication"),
        certfile,
        keyfile: section.file("keyfile"),
        cafile,
        verify_client,
        allowlist: section.lines("allowlist").unwrap_or_default(),
        allowlist_include_members: section.boolean("allowlist_include_members").unwrap_or(false),
        http_extra_headers: section.headers("http_extra_headers"),
        https_extra_headers: section.headers("https_extra_headers"),
    };
    for ignored in ["ciphers", "request_queue_size", "keyfile_password"] {
        if section.has(ignored) {
            section.notice(ignored, "not supported; ignored");
        }
    }
    Some(RestApi { listen: listen?, connect_address: connect_address?, ..api })
}

const LISTEN_EXAMPLE: &str = "give restapi: {listen: '0.0.0.0:8008'} or PATRONI_RESTAPI_LISTEN";

/// `ctl`, with what it takes over from `restapi`.
pub(crate) fn read_ctl(root: &Section<'_>) -> Ctl {
    let restapi = root.section("restapi").filter(|restapi| !restapi.map().is_empty());
    let own = root.section("ctl");
    if let Some(own) = &own {
        own.unknown(&["insecure", "cacert", "certfile", "keyfile", "keyfile_password", "authentication"]);
        if own.has("keyfile_password") {
            own.notice("keyfile_password", "not supported; ignored");
        }
    }
    let own = own.as_ref();
    let authentication = own.filter(|own| own.has("authentication")).or(restapi.as_ref());
    Ctl {
        insecure: own.and_then(|own| own.boolean("insecure")).unwrap_or(false),
        cacert: own.and_then(|own| own.file("cacert")).or_else(|| restapi.as_ref().and_then(|api| api.file("cafile"))),
        certfile: own.and_then(|own| own.file("certfile")),
        keyfile: own.and_then(|own| own.file("keyfile")),
        authentication: authentication.and_then(|section| quiet_user(section, "authentication")),
    }
}

/// Like [`Section::user_and_password`] for what is reported elsewhere.
fn quiet_user(section: &Section<'_>, key: &str) -> Option<(String, Secret)> {
    let map = section.get(key)?.as_object()?;
    let text = |key| match map.get(key) {
        Some(Value::String(text)) => Some(text.clone()),
        Some(Value::Number(number)) => Some(number.to_string()),
        _ => None,
    };
    Some((text("username")?, Secret::new(text("password")?)))
}

const KNOWN_BOOTSTRAP: &[&str] = &["dcs", "method", "initdb", "pg_hba", "users", "post_bootstrap", "post_init"];

fn read_bootstrap(section: &Section<'_>) -> Bootstrap {
    if !section.has("dcs") {
        section.notice("dcs", "missing; a new cluster starts with the defaults");
    }
    if section.has("users") {
        section.notice("users", "ignored, as in Patroni since 4.0; use post_bootstrap");
    }
    let method = section.text("method").unwrap_or_else(|| "initdb".to_owned());
    // Of several ways to make a cluster `method` names one; the environment may name another.
    let is_method = |(key, value): &(&String, &Value)| **key == method || value.get("command").is_some();
    let methods = section.map().iter().filter(is_method).map(|(key, _)| key.as_str());
    let known: Vec<&str> = KNOWN_BOOTSTRAP.iter().copied().chain(methods).collect();
    section.unknown(&known);
    let custom = section.map().get(&method).and_then(|custom| custom.get("command")).is_some();
    if method != "initdb" && !custom {
        section.notice("method", format!("{method} has no section with a command here; initdb is used"));
    }
    Bootstrap {
        dcs: section.copy("dcs"),
        method: if custom { method } else { "initdb".to_owned() },
        initdb: options::initdb(section),
        pg_hba: section.lines("pg_hba").unwrap_or_default(),
        post_bootstrap: section.text("post_bootstrap").or_else(|| section.text("post_init")),
        raw: section.map().clone(),
    }
}

fn check_tags(root: &Section<'_>) {
    let Some(tags) = root.section("tags") else { return };
    for (never, priority) in [("nofailover", "failover_priority"), ("nosync", "sync_priority")] {
        let Some(number) = tags.integer(priority, i64::MIN..=i64::MAX, None) else { continue };
        let Some(flag) = tags.get(never) else { continue };
        let set = crate::tags::truthy(flag);
        if set == (number > 0) {
            let word = if set { "True" } else { "False" };
            // The words are Patroni's: its acceptance suite looks for them.
            let message = format!(
                "Conflicting configuration between {never}: {word} and {priority}: {number}. Defaulting to {never}: {word}"
            );
            tags.notice(never, message);
        }
    }
}

const LEVELS: &[(&str, &str)] = &[
    ("debug", "DEBUG"),
    ("info", "INFO"),
    ("warning", "WARNING"),
    ("warn", "WARNING"),
    ("error", "ERROR"),
    ("critical", "CRITICAL"),
    ("fatal", "CRITICAL"),
];

/// `log`, of a node or of the router.
pub(crate) fn read_log(root: &Section<'_>) -> Log {
    let default = Log::default();
    let Some(section) = root.section("log") else { return default };
    section.unknown(&[
        "type",
        "level",
        "traceback_level",
        "format",
        "dateformat",
        "static_fields",
        "max_queue_size",
        "dir",
        "mode",
        "file_num",
        "file_size",
        "loggers",
        "deduplicate_heartbeat_logs",
    ]);
    for key in ["traceback_level", "loggers"] {
        if section.has(key) {
            section.notice(key, "is about Python; ignored");
        }
    }
    let json = section.choice("type", &[("plain", false), ("json", true)]).unwrap_or(default.json);
    let (format, renamed) = read_log_format(&section, json);
    let count = |key| section.integer(key, 0..=1_000_000_000_000, None).and_then(|n| usize::try_from(n).ok());
    Log {
        json,
        level: section.choice("level", LEVELS).map_or(default.level, str::to_owned),
        format: format.unwrap_or(default.format),
        dateformat: section.text("dateformat"),
        renamed,
        static_fields: section.copy("static_fields"),
        max_queue_size: count("max_queue_size").unwrap_or(default.max_queue_size).clamp(1, 1_000_000),
        dir: section.file("dir"),
        mode: section.integer("mode", 0..=0o777, None).and_then(|mode| u32::try_from(mode).ok()),
        file_num: count("file_num").unwrap_or(default.file_num).min(1000),
        file_size: count("file_size").map_or(default.file_size, |size| size as u64),
    }
}

/// A text; for JSON also a list of fields, each a name or `name: other name`.
fn read_log_format(section: &Section<'_>, json: bool) -> (Option<String>, BTreeMap<String, String>) {
    let Some(Value::Array(items)) = section.get("format") else { return (section.text("format"), BTreeMap::new()) };
    if !json {
        return (section.wrong("format", "a list of fields is for type json; a text is expected"), BTreeMap::new());
    }
    let (mut fields, mut renamed) = (Vec::new(), BTreeMap::new());
    for item in items {
        match item {
            Value::String(field) => fields.push(field.clone()),
            Value::Object(map) => {
                for (field, name) in map {
                    let Value::String(name) = name else {
                        return (section.wrong("format", FIELDS), BTreeMap::new());
                    };
                    fields.push(field.clone());
                    renamed.insert(field.clone(), name.clone());
                }
            }
            _ => return (section.wrong("format", FIELDS), BTreeMap::new()),
        }
    }
    let format = fields.iter().map(|field| format!("%({field})s")).collect::<Vec<_>>().join(" ");
    (Some(format).filter(|format| !format.is_empty()), renamed)
}

const FIELDS: &str = "a list of fields is expected, each a name or name: other name";
