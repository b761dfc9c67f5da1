//! Which status code a health check gets: Patroni's tables (rest-api §2) as plain functions of what is known.

use serde_json::{Map, Value};
use trunkline_common::Lsn;
use trunkline_config::guc;
use trunkline_config::tags::truthy;

use super::json::python_str;

/// What the tables look at.
#[derive(Debug, Clone, PartialEq)]
pub struct Inputs<'a> {
    /// The DCS's content is known and fresh.
    pub cluster: bool,
    /// The cluster follows a primary outside of it.
    pub standby_cluster: bool,
    /// Hands off.
    pub pause: bool,
    /// This node holds the leader key and its lease is not over.
    pub lock: bool,
    /// `primary`, `replica`, `standby_leader` …
    pub role: &'a str,
    /// `running` or anything else.
    pub state: &'a str,
    /// `streaming` or `in archive recovery`.
    pub replication_state: Option<&'a str>,
    /// Listed in `sync`, mode `on`.
    pub sync_standby: bool,
    /// Listed in `sync`, mode `quorum`.
    pub quorum_standby: bool,
    /// The leader's last position from the DCS; 0 = unknown.
    pub optime: Lsn,
    /// The leader's end of WAL as the WAL receiver last heard of it; 0 = unknown.
    pub latest_end: Lsn,
    /// Last received position; 0 = none.
    pub received: Lsn,
    /// Last replayed position; 0 = none.
    pub replayed: Lsn,
    /// Effective tags.
    pub tags: &'a Map<String, Value>,
    /// Failsafe mode keeps the cluster going.
    pub failsafe_active: bool,
    /// Default of `/readiness?lag=`.
    pub maximum_lag_on_failover: u64,
}

impl Inputs<'_> {
    fn leader_position(&self) -> Lsn {
        self.optime.max(self.latest_end)
    }
}

/// A request's query parameters. Of a repeated one the first counts; those without a value don't count at all.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Query(pub Vec<(String, String)>);

impl Query {
    /// The first non-empty value of `key`.
    pub fn first(&self, key: &str) -> Option<&str> {
        self.0.iter().find(|(name, value)| name == key && !value.is_empty()).map(|(_, value)| value.as_str())
    }

    /// `tag_<key>=<value>` parameters, the first of each key.
    fn tags(&self) -> impl Iterator<Item = (&str, &str)> {
        let first = |name: &String| self.first(name);
        self.0.iter().filter_map(move |(name, _)| Some((name.strip_prefix("tag_")?, first(name)?)))
    }
}

const OK: u16 = 200;
const UNAVAILABLE: u16 = 503;

fn code_of(yes: bool) -> u16 {
    if yes { OK } else { UNAVAILABLE }
}

/// The code of any path that has no handler of its own (§2.2, §2.3); the first matching row wins.
///
/// From winning the lock until the end of the promotion both `/primary` and `/replica` are 200, as with Patroni: the
/// document's `role` is the only reliable sign in that window.
pub fn code(path: &str, query: &Query, inputs: &Inputs<'_>) -> u16 {
    let path = if path == "/" { "/primary" } else { path };
    let base = BaseCodes::of(query, inputs);
    let contains = |part: &str| path.contains(part);

    if contains("standby_leader") || contains("standby-leader") {
        return code_of(base.standby_leader);
    }
    if contains("leader") {
        return code_of(base.leader);
    }
    if contains("master") || contains("primary") || contains("read-write") {
        return code_of(base.primary);
    }
    let leads = base.primary || base.standby_leader;
    let yes = if contains("replica") {
        base.replica
    } else if contains("read-only") && !contains("sync") && !contains("quorum") {
        leads || base.replica
    } else if contains("health") {
        inputs.state == "running"
    } else if !inputs.cluster {
        false
    } else {
        match path {
            "/sync" | "/synchronous" => inputs.sync_standby && base.replica,
            "/quorum" => inputs.quorum_standby && base.replica,
            "/async" | "/asynchronous" => !inputs.sync_standby && !inputs.quorum_standby && base.replica,
            "/read-only-quorum" => leads || inputs.quorum_standby && base.replica,
            "/read-only-sync" | "/read-only-synchronous" => leads || inputs.sync_standby && base.replica,
            _ => false,
        }
    };
    code_of(yes && query.tags().all(|(tag, wanted)| tag_matches(inputs.tags.get(tag), wanted)))
}

/// §2.2: what the paths are made of.
struct BaseCodes {
    leader: bool,
    primary: bool,
    standby_leader: bool,
    replica: bool,
}

impl BaseCodes {
    fn of(query: &Query, inputs: &Inputs<'_>) -> Self {
        let replica = is_usable_replica(query, inputs);
        let role = inputs.role;
        if !inputs.cluster && inputs.pause {
            return Self {
                leader: matches!(role, "primary" | "standby_leader"),
                primary: role == "primary",
                standby_leader: role == "standby_leader",
                replica,
            };
        }
        match (inputs.lock, inputs.standby_cluster) {
            (true, true) => Self {
                leader: true,
                primary: false,
                standby_leader: matches!(role, "replica" | "standby_leader"),
                replica: false,
            },
            (true, false) => Self { leader: true, primary: true, standby_leader: false, replica },
            (false, _) => Self { leader: false, primary: false, standby_leader: false, replica },
        }
    }
}

/// Bytes, with or without a unit; anything else is no limit.
fn lag_limit(query: &Query) -> Option<i64> {
    guc::parse_int(query.first("lag")?, Some("B"))
}

fn is_usable_replica(query: &Query, inputs: &Inputs<'_>) -> bool {
    let limit = lag_limit(query);
    let ahead = inputs.leader_position();
    let lagging = limit.is_some_and(|limit| {
        ahead.is_valid() && i128::from(ahead.0) > i128::from(inputs.replayed.0) + i128::from(limit)
    });
    let wanted = query.first("replication_state");
    !inputs.tags.get("noloadbalance").is_some_and(truthy)
        && !lagging
        && inputs.role == "replica"
        && inputs.state == "running"
        && wanted.is_none_or(|wanted| inputs.replication_state == Some(wanted))
}

/// Strings exactly; anything else by its Python text in lower case (`true`, `1`).
fn tag_matches(tag: Option<&Value>, wanted: &str) -> bool {
    match tag {
        None | Some(Value::Null) => false,
        Some(Value::String(text)) => text == wanted,
        Some(other) => python_str(other).to_lowercase() == wanted,
    }
}

/// `/readiness` (§2.7), or why not.
pub fn readiness(query: &Query, inputs: &Inputs<'_>) -> Result<(), String> {
    if inputs.lock {
        return Ok(());
    }
    if inputs.state != "running" {
        return Err(format!("PostgreSQL is {}", inputs.state));
    }
    if inputs.replication_state != Some("streaming") {
        return Err("this standby is not streaming".to_owned());
    }
    if !inputs.cluster && !inputs.latest_end.is_valid() {
        return if inputs.failsafe_active { Ok(()) } else { Err("the DCS is not accessible".to_owned()) };
    }
    let position = if query.first("mode") == Some("write") { inputs.received } else { inputs.replayed };
    let lag = position.lag_behind(inputs.leader_position());
    let limit = lag_limit(query).map_or(i128::from(inputs.maximum_lag_on_failover), i128::from);
    if i128::from(lag) > limit {
        return Err(format!("this standby is {lag} bytes behind, more than {limit}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// The columns of §2.4, each with all of its aliases.
    const COLUMNS: [&[&str]; 10] = [
        &["/", "/primary", "/read-write", "/master"],
        &["/leader"],
        &["/standby-leader", "/standby_leader"],
        &["/replica", "/replica/x"],
        &["/read-only"],
        &["/health"],
        &["/sync", "/synchronous"],
        &["/quorum"],
        &["/async", "/asynchronous"],
        &["/read-only-sync", "/read-only-synchronous"],
    ];

    static NO_TAGS: std::sync::LazyLock<Map<String, Value>> = std::sync::LazyLock::new(Map::new);

    fn inputs() -> Inputs<'static> {
        Inputs {
            cluster: true,
            standby_cluster: false,
            pause: false,
            lock: false,
            role: "replica",
            state: "running",
            replication_state: Some("streaming"),
            sync_standby: false,
            quorum_standby: false,
            optime: Lsn(1000),
            latest_end: Lsn(1000),
            received: Lsn(1000),
            replayed: Lsn(1000),
            tags: &NO_TAGS,
            failsafe_active: false,
            maximum_lag_on_failover: 1_048_576,
        }
    }

    fn primary() -> Inputs<'static> {
        let zero = Lsn(0);
        Inputs {
            role: "primary",
            replication_state: None,
            latest_end: zero,
            received: zero,
            replayed: zero,
            ..inputs()
        }
    }

    fn query(text: &str) -> Query {
        let pair = |pair: &str| pair.split_once('=').map(|(key, value)| (key.to_owned(), value.to_owned()));
        Query(text.split('&').filter_map(pair).collect())
    }

    /// `expected`: one digit per column, and one for `/read-only-quorum`: 2 = 200, 5 = 503.
    fn check(node: &str, inputs: &Inputs<'_>, expected: &str) {
        let paths = COLUMNS.iter().copied().chain([["/read-only-quorum"].as_slice()]);
        for (aliases, digit) in paths.zip(expected.chars()) {
            for path in aliases {
                let expected = if digit == '2' { 200 } else { 503 };
                assert_eq!(code(path, &Query::default(), inputs), expected, "{node}: {path}");
            }
        }
        for path in ["/async/", "/sync/", "/quorum/x", "/nonsense", "/restart"] {
            assert_eq!(code(path, &Query::default(), inputs), 503, "{node}: {path}");
        }
    }

    #[test]
    fn matrix_of_a_normal_cluster() {
        //                                  primary leader standby-leader replica read-only health sync quorum async ro-sync ro-quorum
        check("primary with lock", &Inputs { lock: true, ..primary() }, "22552255522");
        check("lock just won", &Inputs { lock: true, ..inputs() }, "22522255222");
        check("primary without lock", &primary(), "55555255555");
        check("async standby", &inputs(), "55522255255");
        check("sync standby", &Inputs { sync_standby: true, ..inputs() }, "55522225525");
        check("quorum voter", &Inputs { quorum_standby: true, ..inputs() }, "55522252552");
        let tags = Map::from_iter([("noloadbalance".to_owned(), json!(true))]);
        check("noloadbalance", &Inputs { tags: &tags, ..inputs() }, "55555255555");
        check("not running", &Inputs { state: "starting", ..inputs() }, "55555555555");
        let standby_cluster = Inputs { standby_cluster: true, ..inputs() };
        check(
            "standby leader",
            &Inputs { lock: true, role: "standby_leader", ..standby_cluster.clone() },
            "52252255522",
        );
        check("standby of a standby cluster", &standby_cluster, "55522255255");
    }

    #[test]
    fn matrix_without_the_dcs() {
        let lost = Inputs { cluster: false, optime: Lsn(0), ..inputs() };
        let lost_primary = Inputs { cluster: false, ..primary() };
        check("leader in its lease or in failsafe", &Inputs { lock: true, ..lost_primary.clone() }, "22552255555");
        check("demoted leader, and any standby", &lost, "55522255555");
        check("paused primary", &Inputs { pause: true, ..lost_primary }, "22552255555");
    }

    #[test]
    fn lag_counts_from_the_best_known_leader_position() {
        let behind = Inputs { optime: Lsn(5000), latest_end: Lsn(6000), replayed: Lsn(1000), ..inputs() };
        for (lag, expected) in [("5000", 200), ("4999", 503), ("5kB", 200), ("4kB", 503), ("nonsense", 200), ("", 200)]
        {
            assert_eq!(code("/replica", &query(&format!("lag={lag}")), &behind), expected, "lag={lag}");
            assert_eq!(code("/async", &query(&format!("lag={lag}")), &behind), expected, "lag={lag}");
        }
        let unknown = Inputs { optime: Lsn(0), latest_end: Lsn(0), replayed: Lsn(0), ..inputs() };
        assert_eq!(code("/replica", &query("lag=0"), &unknown), 200, "without a leader position nobody lags");
    }

    #[test]
    fn replication_state_filters_replicas() {
        for (wanted, expected) in [("streaming", 200), ("in archive recovery", 503)] {
            assert_eq!(code("/replica", &query(&format!("replication_state={wanted}")), &inputs()), expected);
        }
    }

    #[test]
    fn tags_filter_all_but_leader_paths() {
        let tags = json!({"az": "b", "n": 1, "yes": true, "nothing": null});
        let node = Inputs { tags: tags.as_object().unwrap(), ..inputs() };
        let table = [
            ("tag_az=b", 200),
            ("tag_az=B", 503),
            ("tag_n=1", 200),
            ("tag_yes=true", 200),
            ("tag_yes=True", 503),
            ("tag_nothing=none", 503),
            ("tag_nofailover=false", 503),
            ("tag_az=b&tag_az=c", 200),
            ("tag_az=", 200),
            ("tag_az=b&tag_n=2", 503),
        ];
        for (filter, expected) in table {
            assert_eq!(code("/replica", &query(filter), &node), expected, "{filter}");
            assert_eq!(code("/health", &query(filter), &node), expected, "{filter}");
        }
        assert_eq!(code("/primary", &query("tag_az=zzz"), &Inputs { lock: true, ..primary() }), 200);
    }

    #[test]
    fn readiness_follows_its_table() {
        let lagging = Inputs { optime: Lsn(3_000_000), received: Lsn(2_900_000), replayed: Lsn(1000), ..inputs() };
        let lost = Inputs { cluster: false, optime: Lsn(0), latest_end: Lsn(0), ..inputs() };
        let table = [
            ("the lock is enough", Inputs { lock: true, state: "starting", ..inputs() }, "", true),
            ("streaming", inputs(), "", true),
            ("not running", Inputs { state: "starting", ..inputs() }, "", false),
            ("from the archive", Inputs { replication_state: Some("in archive recovery"), ..inputs() }, "", false),
            ("apply lag over the default", lagging.clone(), "", false),
            ("write lag is fine", lagging.clone(), "mode=write", true),
            ("a larger limit", lagging.clone(), "lag=3MB", true),
            ("not a limit: the default", lagging, "lag=x", false),
            ("no DCS, no leader position", lost.clone(), "", false),
            ("no DCS, in failsafe", Inputs { failsafe_active: true, ..lost.clone() }, "", true),
            ("no DCS, but streaming", Inputs { latest_end: Lsn(1000), ..lost }, "", true),
        ];
        for (name, node, params, expected) in table {
            assert_eq!(readiness(&query(params), &node).is_ok(), expected, "{name}");
        }
    }
}
