//! The `PATRONI_*` environment as a layer of configuration over the file.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::report::Problem;
use crate::{guc, yaml};

/// Environment variables, handed over by the caller so that tests need no real ones.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Env(BTreeMap<String, String>);

impl Env {
    /// The variables of this process that are valid UTF-8.
    pub fn of_process() -> Self {
        let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        };
        Self(std::env::vars_os().filter_map(text).collect())
    }

    /// A variable; an empty one counts as absent.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// The variables whose names begin with one of `prefixes`.
    pub(crate) fn only(&self, prefixes: &[&str]) -> Self {
        let wanted = |name: &str| prefixes.iter().any(|prefix| name.starts_with(prefix));
        self.0.iter().filter(|(name, _)| wanted(name)).map(|(name, value)| (name.clone(), value.clone())).collect()
    }

    /// Whether there is any `PATRONI_*` variable.
    pub(crate) fn sets_anything(&self) -> bool {
        self.0.iter().any(|(name, value)| name.starts_with(PREFIX) && !value.is_empty())
    }
}

impl<K: Into<String>, V: Into<String>> FromIterator<(K, V)> for Env {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(variables: I) -> Self {
        Self(variables.into_iter().map(|(name, value)| (name.into(), value.into())).collect())
    }
}

const PREFIX: &str = "PATRONI_";

/// What the environment sets.
#[derive(Debug, Default)]
pub(crate) struct Layer {
    pub map: Map<String, Value>,
    /// Path → variable.
    pub origins: Vec<(String, String)>,
    pub problems: Vec<Problem>,
    /// Variables that mean nothing.
    pub unknown: Vec<String>,
}

/// How a variable's text becomes a value. What does not fit stays text, so that its reader complains with the path.
#[derive(Clone, Copy)]
enum Kind {
    Text,
    Bool,
    Int,
    List,
    Map,
    /// A list of names, unless it is a Python format string.
    Format,
}

const TOP: &[&str] = &["NAME", "NAMESPACE", "SCOPE", "THREAD_POOL_SIZE", "THREAD_STACK_SIZE"];

const OLD_LOG_NAMES: &[(&str, &str)] = &[("LOGLEVEL", "LEVEL"), ("LOGFORMAT", "FORMAT"), ("LOG_DATEFMT", "DATEFORMAT")];

/// Section, and its keys in upper case.
const SECTIONS: &[(&str, &[(&str, Kind)])] = &[
    (
        "restapi",
        &[
            ("LISTEN", Kind::Text),
            ("CONNECT_ADDRESS", Kind::Text),
            ("CERTFILE", Kind::Text),
            ("KEYFILE", Kind::Text),
            ("KEYFILE_PASSWORD", Kind::Text),
            ("CAFILE", Kind::Text),
            ("CIPHERS", Kind::Text),
            ("VERIFY_CLIENT", Kind::Text),
            ("HTTP_EXTRA_HEADERS", Kind::Map),
            ("HTTPS_EXTRA_HEADERS", Kind::Map),
            ("ALLOWLIST", Kind::List),
            ("ALLOWLIST_INCLUDE_MEMBERS", Kind::Bool),
            ("REQUEST_QUEUE_SIZE", Kind::Int),
            ("SERVER_TOKENS", Kind::Text),
        ],
    ),
    (
        "ctl",
        &[
            ("INSECURE", Kind::Bool),
            ("CACERT", Kind::Text),
            ("CERTFILE", Kind::Text),
            ("KEYFILE", Kind::Text),
            ("KEYFILE_PASSWORD", Kind::Text),
        ],
    ),
    (
        "postgresql",
        &[
            ("LISTEN", Kind::Text),
            ("CONNECT_ADDRESS", Kind::Text),
            ("PROXY_ADDRESS", Kind::Text),
            ("CONFIG_DIR", Kind::Text),
            ("DATA_DIR", Kind::Text),
            ("PGPASS", Kind::Text),
            ("BIN_DIR", Kind::Text),
        ],
    ),
    (
        "log",
        &[
            ("TYPE", Kind::Text),
            ("LEVEL", Kind::Text),
            ("TRACEBACK_LEVEL", Kind::Text),
            ("FORMAT", Kind::Format),
            ("DATEFORMAT", Kind::Text),
            ("STATIC_FIELDS", Kind::Map),
            ("MAX_QUEUE_SIZE", Kind::Int),
            ("DIR", Kind::Text),
            ("MODE", Kind::Int),
            ("FILE_SIZE", Kind::Int),
            ("FILE_NUM", Kind::Int),
            ("LOGGERS", Kind::Map),
            ("DEDUPLICATE_HEARTBEAT_LOGS", Kind::Bool),
        ],
    ),
];

/// Suffixes that set a key of whatever section stands before the first underscore.
const GENERIC: &[(&str, Kind)] = &[
    ("HOST", Kind::Text),
    ("HOSTS", Kind::List),
    ("PORT", Kind::Int),
    ("USE_PROXIES", Kind::Bool),
    ("PROTOCOL", Kind::Text),
    ("SRV", Kind::Text),
    ("SRV_SUFFIX", Kind::Text),
    ("URL", Kind::Text),
    ("PROXY", Kind::Text),
    ("CACERT", Kind::Text),
    ("CERT", Kind::Text),
    ("KEY", Kind::Text),
    ("VERIFY", Kind::Bool),
    ("TOKEN", Kind::Text),
    ("CHECKS", Kind::List),
    ("DC", Kind::Text),
    ("CONSISTENCY", Kind::Text),
    ("REGISTER_SERVICE", Kind::Bool),
    ("SERVICE_CHECK_INTERVAL", Kind::Text),
    ("SERVICE_CHECK_TLS_SERVER_NAME", Kind::Text),
    ("SERVICE_TAGS", Kind::List),
    ("NAMESPACE", Kind::Text),
    ("CONTEXT", Kind::Text),
    ("USE_ENDPOINTS", Kind::Bool),
    ("SCOPE_LABEL", Kind::Text),
    ("ROLE_LABEL", Kind::Text),
    ("POD_IP", Kind::Text),
    ("PORTS", Kind::List),
    ("LABELS", Kind::Map),
    ("BYPASS_API_SERVICE", Kind::Bool),
    ("RETRIABLE_HTTP_CODES", Kind::List),
    ("KEY_PASSWORD", Kind::Text),
    ("USE_SSL", Kind::Text),
    ("SET_ACLS", Kind::Map),
    ("GROUP", Kind::Int),
    ("DATABASE", Kind::Text),
    ("LEADER_LABEL_VALUE", Kind::Text),
    ("FOLLOWER_LABEL_VALUE", Kind::Text),
    ("STANDBY_LEADER_LABEL_VALUE", Kind::Text),
    ("TMP_ROLE_LABEL", Kind::Text),
    ("AUTH_DATA", Kind::Map),
    ("BOOTSTRAP_LABELS", Kind::Map),
];

const PROGRAMS: &[&str] =
    &["PG_CTL", "INITDB", "PG_CONTROLDATA", "PG_BASEBACKUP", "POSTGRES", "PG_ISREADY", "PG_REWIND"];

/// Keys of a PostgreSQL user's credentials; others are dropped.
pub(crate) const CREDENTIALS: &[&str] = &[
    "username",
    "password",
    "sslmode",
    "sslcert",
    "sslkey",
    "sslpassword",
    "sslrootcert",
    "sslcrl",
    "sslcrldir",
    "gssencmode",
    "channel_binding",
    "sslnegotiation",
];

/// Reads every `PATRONI_*` variable except `PATRONI_CONFIGURATION`.
pub(crate) fn layer(env: &Env) -> Layer {
    let mut layer = Layer::default();
    for (variable, text) in &env.0 {
        let Some(name) = variable.strip_prefix(PREFIX) else { continue };
        if text.is_empty() || name == "CONFIGURATION" {
            continue;
        }
        match target(name) {
            // The new name of a variable wins over its old one.
            Some(Target { renamed: Some(new), .. }) if env.get(&format!("{PREFIX}{new}")).is_some() => {}
            Some(target) => layer.set(variable, &target, text),
            None => layer.unknown.push(variable.clone()),
        }
    }
    layer
}

/// Where a variable's value goes.
struct Target {
    path: Vec<String>,
    kind: Kind,
    renamed: Option<String>,
}

fn target(name: &str) -> Option<Target> {
    let to = |path: &[&str], kind| {
        Some(Target { path: path.iter().map(|part| part.to_lowercase()).collect(), kind, renamed: None })
    };
    if TOP.contains(&name) {
        return to(&[name], Kind::Text);
    }
    if let Some((_, new)) = OLD_LOG_NAMES.iter().find(|(old, _)| *old == name) {
        let kind = if *new == "FORMAT" { Kind::Format } else { Kind::Text };
        return to(&["log", new], kind).map(|target| Target { renamed: Some(format!("LOG_{new}")), ..target });
    }
    if let Some(program) = name.strip_prefix("POSTGRESQL_BIN_").filter(|program| PROGRAMS.contains(program)) {
        return to(&["postgresql", "bin_name", program], Kind::Text);
    }
    let (section, key) = name.split_once('_').filter(|(section, _)| !section.is_empty())?;
    let lower = key.to_lowercase();
    match section {
        "SUPERUSER" | "REPLICATION" | "REWIND" if CREDENTIALS.contains(&lower.as_str()) => {
            return to(&["postgresql", "authentication", section, key], Kind::Text);
        }
        "RESTAPI" | "CTL" if matches!(key, "USERNAME" | "PASSWORD") => {
            return to(&[section, "authentication", key], Kind::Text);
        }
        "ETCD" | "ETCD3" if matches!(key, "USERNAME" | "PASSWORD") => return to(&[section, key], Kind::Text),
        "CITUS" if !matches!(key, "GROUP" | "DATABASE") => return None,
        _ => {}
    }
    let special = SECTIONS.iter().find(|(name, _)| section.eq_ignore_ascii_case(name)).map(|(_, keys)| *keys);
    let known = special.unwrap_or_default().iter().chain(GENERIC).find(|(name, _)| *name == key);
    known.and_then(|(_, kind)| to(&[section, key], *kind))
}

impl Layer {
    fn set(&mut self, variable: &str, target: &Target, text: &str) {
        let value = match value(target.kind, text) {
            Ok(value) => value,
            Err(expected) => {
                return self.problems.push(Problem {
                    source: variable.to_owned(),
                    path: target.path.join("."),
                    value: Some(format!("{text:?}")),
                    expected,
                    remedy: None,
                });
            }
        };
        let Some((key, sections)) = target.path.split_last() else { return };
        let mut map = &mut self.map;
        for section in sections {
            let inner = map.entry(section.clone()).or_insert_with(|| Value::Object(Map::new()));
            let Value::Object(inner) = inner else { return };
            map = inner;
        }
        map.insert(key.clone(), value);
        self.origins.push((target.path.join("."), variable.to_owned()));
    }
}

fn value(kind: Kind, text: &str) -> Result<Value, String> {
    let stays_text = || Value::from(text);
    Ok(match kind {
        Kind::Text => stays_text(),
        Kind::Bool => guc::parse_bool(text).map_or_else(stays_text, Value::from),
        Kind::Int => guc::parse_int(text, None).map_or_else(stays_text, Value::from),
        Kind::Format if text.contains("%(") => stays_text(),
        Kind::List | Kind::Format => {
            let wrapped = text.contains('[') || text.trim_start().starts_with('-');
            parsed(text, wrapped, ('[', ']'), Value::is_array).ok_or("a YAML list is expected, such as 'a', 'b'")?
        }
        Kind::Map => {
            let wrapped = text.trim_start().starts_with('{');
            parsed(text, wrapped, ('{', '}'), Value::is_object).ok_or("a YAML map is expected, such as a: b, c: d")?
        }
    })
}

fn parsed(text: &str, wrapped: bool, (open, close): (char, char), fits: fn(&Value) -> bool) -> Option<Value> {
    let text = if wrapped { text.to_owned() } else { format!("{open}{text}{close}") };
    yaml::from_str(&text).ok().filter(fits)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn map_of(variables: &[(&str, &str)]) -> Value {
        let layer = layer(&variables.iter().copied().collect());
        assert_eq!(layer.problems, [], "{variables:?}");
        Value::Object(layer.map)
    }

    #[test]
    fn table() {
        let cases = [
            (("PATRONI_SCOPE", "demo"), json!({"scope": "demo"})),
            (("PATRONI_NAME", "1"), json!({"name": "1"})),
            (("PATRONI_RESTAPI_LISTEN", "0.0.0.0:8008"), json!({"restapi": {"listen": "0.0.0.0:8008"}})),
            (("PATRONI_RESTAPI_USERNAME", "u"), json!({"restapi": {"authentication": {"username": "u"}}})),
            (("PATRONI_RESTAPI_ALLOWLIST", "10.0.0.0/8, h"), json!({"restapi": {"allowlist": ["10.0.0.0/8", "h"]}})),
            (
                ("PATRONI_RESTAPI_ALLOWLIST_INCLUDE_MEMBERS", "On"),
                json!({"restapi": {"allowlist_include_members": true}}),
            ),
            (("PATRONI_RESTAPI_HTTP_EXTRA_HEADERS", "X: y"), json!({"restapi": {"http_extra_headers": {"X": "y"}}})),
            (("PATRONI_CTL_INSECURE", "1"), json!({"ctl": {"insecure": true}})),
            (("PATRONI_ETCD3_HOSTS", "'a:1','b:2'"), json!({"etcd3": {"hosts": ["a:1", "b:2"]}})),
            (("PATRONI_ETCD3_HOSTS", "- a:1\n- b:2"), json!({"etcd3": {"hosts": ["a:1", "b:2"]}})),
            (("PATRONI_ETCD3_PASSWORD", "p"), json!({"etcd3": {"password": "p"}})),
            (("PATRONI_ETCD_PORT", "2379"), json!({"etcd": {"port": 2379}})),
            (("PATRONI_ETCD_PORT", "many"), json!({"etcd": {"port": "many"}})),
            (("PATRONI_ETCD_USE_PROXIES", "yes"), json!({"etcd": {"use_proxies": true}})),
            (("PATRONI_KUBERNETES_LABELS", "{a: b}"), json!({"kubernetes": {"labels": {"a": "b"}}})),
            (("PATRONI_ANYTHING_CACERT", "f"), json!({"anything": {"cacert": "f"}})),
            (("PATRONI_POSTGRESQL_DATA_DIR", "/d"), json!({"postgresql": {"data_dir": "/d"}})),
            (("PATRONI_POSTGRESQL_BIN_PG_REWIND", "r"), json!({"postgresql": {"bin_name": {"pg_rewind": "r"}}})),
            (
                ("PATRONI_REPLICATION_SSLMODE", "require"),
                json!({"postgresql": {"authentication": {"replication": {"sslmode": "require"}}}}),
            ),
            (("PATRONI_LOG_LEVEL", "DEBUG"), json!({"log": {"level": "DEBUG"}})),
            (("PATRONI_LOGLEVEL", "DEBUG"), json!({"log": {"level": "DEBUG"}})),
            (("PATRONI_LOG_FORMAT", "a, b"), json!({"log": {"format": ["a", "b"]}})),
            (("PATRONI_LOG_FORMAT", "%(message)s"), json!({"log": {"format": "%(message)s"}})),
            (("PATRONI_CITUS_GROUP", "0"), json!({"citus": {"group": 0}})),
            (("PATRONI_SCOPE", ""), json!({})),
            (("PATRONI_CONFIGURATION", "scope: x"), json!({})),
            (("OTHER", "x"), json!({})),
        ];
        for (variable, expected) in cases {
            assert_eq!(map_of(&[variable]), expected, "{variable:?}");
        }
    }

    #[test]
    fn the_new_name_of_a_variable_wins() {
        let both = [("PATRONI_LOGLEVEL", "DEBUG"), ("PATRONI_LOG_LEVEL", "INFO")];
        assert_eq!(map_of(&both), json!({"log": {"level": "INFO"}}));
    }

    #[test]
    fn what_is_wrong_or_unknown_is_named() {
        let env = [("PATRONI_ETCD3_HOSTS", "a: ["), ("PATRONI_POSTGRESQL_BIN_IS_READY", "x"), ("PATRONI_", "x")];
        let layer = layer(&env.into_iter().collect());
        assert_eq!(
            layer.problems[0].to_string(),
            "PATRONI_ETCD3_HOSTS: etcd3.hosts = \"a: [\": a YAML list is expected, such as 'a', 'b'"
        );
        assert_eq!(layer.unknown, ["PATRONI_", "PATRONI_POSTGRESQL_BIN_IS_READY"]);
    }
}
