//! The settings of PostgreSQL that only the dynamic configuration may change, as standbys must have them like the primary.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::guc;
use crate::postgres::guc_text;
use crate::section::Section;

/// What a value must be.
enum Check {
    /// Set by the agent.
    Never,
    True,
    Bool,
    /// At least, in this unit.
    Int(i64, Option<&'static str>),
    WalLevel,
}

struct Guc {
    name: &'static str,
    default: &'static str,
    check: Check,
}

const fn guc(name: &'static str, default: &'static str, check: Check) -> Guc {
    Guc { name, default, check }
}

/// Patroni's `CMDLINE_OPTIONS` (config reference §7).
const PROTECTED: &[Guc] = &[
    guc("listen_addresses", "", Check::Never),
    guc("port", "", Check::Never),
    guc("cluster_name", "", Check::Never),
    guc("wal_level", "replica", Check::WalLevel),
    guc("hot_standby", "on", Check::True),
    guc("max_connections", "100", Check::Int(25, None)),
    guc("max_wal_senders", "10", Check::Int(3, None)),
    guc("max_prepared_transactions", "0", Check::Int(0, None)),
    guc("max_locks_per_transaction", "64", Check::Int(32, None)),
    guc("track_commit_timestamp", "off", Check::Bool),
    guc("max_replication_slots", "10", Check::Int(4, None)),
    guc("max_worker_processes", "8", Check::Int(2, None)),
    guc("wal_log_hints", "on", Check::Bool),
    guc(WAL_KEEP_SEGMENTS, "8", Check::Int(1, None)),
    guc(WAL_KEEP_SIZE, "128MB", Check::Int(16, Some("MB"))),
];

pub(crate) const WAL_KEEP_SIZE: &str = "wal_keep_size";
const WAL_KEEP_SEGMENTS: &str = "wal_keep_segments";

/// Whether only the dynamic configuration may set this (`name` in lower case).
pub(crate) fn is_protected(name: &str) -> bool {
    PROTECTED.iter().any(|guc| guc.name == name)
}

/// The protected settings of the dynamic `postgresql.parameters`, defaults included, without what the agent sets.
/// An invalid value means the default, not the previous value. `wal_keep_segments`, gone since PostgreSQL 13, becomes
/// `wal_keep_size`.
pub(crate) fn read(parameters: Option<&Section<'_>>) -> BTreeMap<String, String> {
    let mut values = BTreeMap::new();
    let mut chosen = BTreeMap::new();
    for (name, value) in parameters.into_iter().flat_map(|section| section.map()) {
        let Some(guc) = PROTECTED.iter().find(|guc| guc.name.eq_ignore_ascii_case(name)) else { continue };
        match accepted(guc, value) {
            Ok(text) => {
                chosen.insert(guc.name, text);
            }
            Err(expected) => {
                if let Some(section) = parameters {
                    section.wrong::<()>(name, expected);
                }
            }
        }
    }
    for guc in PROTECTED.iter().filter(|guc| !matches!(guc.check, Check::Never)) {
        values.insert(guc.name.to_owned(), chosen.get(guc.name).cloned().unwrap_or_else(|| guc.default.to_owned()));
    }
    if let Some(segments) = values.remove(WAL_KEEP_SEGMENTS)
        && !chosen.contains_key(WAL_KEEP_SIZE)
        && let Ok(segments) = segments.parse::<i64>()
    {
        values.insert(WAL_KEEP_SIZE.to_owned(), format!("{}MB", segments.saturating_mul(16)));
    }
    values
}

/// Patroni's default of one of these.
pub(crate) fn default(name: &str) -> Option<&'static str> {
    PROTECTED.iter().find(|guc| guc.name == name).map(|guc| guc.default)
}

/// The value as it is used, or why it can't be.
pub(crate) fn check(name: &str, value: &Value) -> Result<String, String> {
    PROTECTED
        .iter()
        .find(|guc| guc.name == name)
        .map_or_else(|| Err("is no such setting".to_owned()), |guc| accepted(guc, value))
}

fn accepted(guc: &Guc, value: &Value) -> Result<String, String> {
    let text = guc_text(value).unwrap_or_default();
    let default = guc.default;
    let fits = match guc.check {
        Check::Never => return Err("is set by the agent".to_owned()),
        Check::True => guc::parse_bool(&text) == Some(true),
        Check::Bool => guc::parse_bool(&text).is_some(),
        Check::WalLevel => match text.to_ascii_lowercase().as_str() {
            // Its name before PostgreSQL 9.6.
            "hot_standby" => return Ok("replica".to_owned()),
            level => matches!(level, "replica" | "logical"),
        },
        Check::Int(at_least, unit) => match guc::parse_int(&text, unit) {
            Some(number) if number >= at_least => {
                return Ok(if unit.is_some() { text } else { number.to_string() });
            }
            _ => return Err(format!("at least {at_least}{} is expected; {default} is used", unit.unwrap_or_default())),
        },
    };
    let allowed = match guc.check {
        Check::True => "must be on",
        Check::WalLevel => "replica or logical is expected",
        _ => "on or off is expected",
    };
    if fits { Ok(text) } else { Err(format!("{allowed}; {default} is used")) }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::report::{Origins, Report};

    fn read_value(value: Value) -> (BTreeMap<String, String>, Vec<String>) {
        let Value::Object(map) = value else { return Default::default() };
        let report = Report::new(Origins::new("DCS"));
        let values = read(Some(&Section::at(&map, "postgresql.parameters", &report)));
        (values, report.into_notices().iter().map(ToString::to_string).collect())
    }

    #[test]
    fn defaults() {
        let (values, notices) = read_value(json!({}));
        let shown: Vec<String> = values.iter().map(|(name, value)| format!("{name}={value}")).collect();
        assert_eq!(
            shown.join(" "),
            "hot_standby=on max_connections=100 max_locks_per_transaction=64 max_prepared_transactions=0 \
             max_replication_slots=10 max_wal_senders=10 max_worker_processes=8 track_commit_timestamp=off \
             wal_keep_size=128MB wal_level=replica wal_log_hints=on"
        );
        assert!(notices.is_empty());
    }

    #[test]
    fn table() {
        let cases = [
            ("max_connections", json!(200), "200", ""),
            ("max_connections", json!("200"), "200", ""),
            ("Max_Connections", json!(200), "200", ""),
            ("max_connections", json!(10), "100", "at least 25 is expected; 100 is used"),
            ("max_connections", json!("many"), "100", "at least 25 is expected; 100 is used"),
            ("max_connections", json!([1]), "100", "at least 25 is expected; 100 is used"),
            ("hot_standby", json!("off"), "on", "must be on; on is used"),
            ("wal_level", json!("hot_standby"), "replica", ""),
            ("wal_level", json!("minimal"), "replica", "replica or logical is expected; replica is used"),
            ("wal_level", json!("logical"), "logical", ""),
            ("wal_log_hints", json!(false), "off", ""),
            ("track_commit_timestamp", json!("maybe"), "off", "on or off is expected; off is used"),
            ("wal_keep_size", json!("1GB"), "1GB", ""),
            ("wal_keep_size", json!("8MB"), "128MB", "at least 16MB is expected; 128MB is used"),
        ];
        for (name, value, expected, notice) in cases {
            let (values, notices) = read_value(json!({name: value}));
            assert_eq!(values[&name.to_lowercase()], expected, "{name} {value}");
            assert!(notices.join(" ").ends_with(notice), "{notices:?}");
            assert_eq!(notices.is_empty(), notice.is_empty(), "{notices:?}");
        }
    }

    #[test]
    fn segments_become_a_size() {
        assert_eq!(read_value(json!({"wal_keep_segments": 10})).0["wal_keep_size"], "160MB");
        assert_eq!(read_value(json!({"wal_keep_segments": 10, "wal_keep_size": "1GB"})).0["wal_keep_size"], "1GB");
    }

    #[test]
    fn what_the_agent_sets_nobody_else_does() {
        let (values, notices) = read_value(json!({"port": 1, "cluster_name": "x"}));
        assert!(!values.contains_key("port") && !values.contains_key("cluster_name"));
        assert_eq!(notices[0], "DCS: postgresql.parameters.port: 1 is ignored: is set by the agent");
    }
}
