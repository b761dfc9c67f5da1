//! The member table: what `list`, `topology` and the tables of other commands show of a [`ClusterView`]. Pure.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value};
use trunkline_common::cluster::Initialize;
use trunkline_common::{ClusterView, Lsn, Member, MemberName};
use trunkline_config::dynamic::SynchronousMode;

use super::output::{Format, Sheet};
use super::text::{isoformat, python_str, title_case};

/// Longest `setting: old->new` that a table shows.
const MAX_REASON: usize = 50;

/// What is listed: one cluster, or all groups of a Citus cluster.
#[derive(Debug, Clone)]
pub(super) struct Listing<'a> {
    /// The scope.
    pub name: &'a str,
    /// The clusters by group; a plain cluster is group 0.
    pub clusters: BTreeMap<u32, &'a ClusterView>,
    /// Set: a Citus cluster. `Some(group)`: that group of it; `None` inside: all groups.
    pub citus: Option<Option<u32>>,
    /// Show the optional columns even where they are empty.
    pub extended: bool,
}

/// The member table.
pub(super) fn sheet(listing: &Listing<'_>, format: Format) -> Sheet {
    let shown: Vec<(u32, Vec<Shown>)> =
        listing.clusters.iter().map(|(group, view)| (*group, shown_members(view, format))).collect();
    let all: Vec<&Shown> = shown.iter().flat_map(|(_, members)| members).collect();
    let columns = columns(listing, &all);
    let with_port = needs_ports(&all);
    let row = |group: u32, member: &Shown| {
        columns.iter().map(|column| member.cell(*column, listing.name, group, with_port)).collect()
    };
    let rows = shown.iter().flat_map(|(group, members)| members.iter().map(move |member| row(*group, member)));
    Sheet {
        title: title(listing),
        rows: rows.collect(),
        columns: Some(columns.iter().map(|column| column.title(format).to_owned()).collect()),
        skip_in_tables: if matches!(listing.citus, Some(Some(_))) { 2 } else { 1 },
        right: &["Group", "TL", "Receive LSN", "Replay LSN", "Lag"],
    }
}

/// What stands below the table: maintenance mode, a planned switchover. Lines, without the space before them.
pub(super) fn service_info(view: &ClusterView) -> Vec<String> {
    let mut lines = Vec::new();
    if view.settings.pause {
        lines.push("Maintenance mode: on".to_owned());
    }
    let Some((request, at)) = view.failover.as_ref().and_then(|request| Some((request, request.scheduled_at?))) else {
        return lines;
    };
    if request.leader.is_none() && request.candidate.is_none() {
        return lines;
    }
    let mut info = format!("Switchover scheduled at: {}", isoformat(at, 'T'));
    for (label, name) in [("from", &request.leader), ("to", &request.candidate)] {
        if let Some(name) = name {
            info.push_str(&format!("\n{label:>24}: {name}"));
        }
    }
    lines.push(info);
    lines
}

fn title(listing: &Listing<'_>) -> String {
    let initialize = listing.clusters.values().next().map_or(&Initialize::Absent, |view| &view.initialize);
    let state = match initialize {
        Initialize::Absent => "uninitialized".to_owned(),
        Initialize::Running => "initializing".to_owned(),
        Initialize::Done(system) => system.to_string(),
        Initialize::Invalid(text) => text.clone(),
    };
    match listing.citus {
        None => format!(" Cluster: {} ({state}) ", listing.name),
        Some(Some(group)) => format!(" Citus cluster: {} (group: {group}, {state}) ", listing.name),
        Some(None) => format!(" Citus cluster: {} ", listing.name),
    }
}

/// A column of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Column {
    Cluster,
    Group,
    Member,
    Host,
    Role,
    State,
    Timeline,
    ReceiveLsn,
    ReceiveLag,
    ReplayLsn,
    ReplayLag,
    PendingRestart,
    PendingRestartReason,
    ScheduledRestart,
    Tags,
}

impl Column {
    /// In tables the LSN before it tells which lag it is.
    fn title(self, format: Format) -> &'static str {
        match self {
            Self::Cluster => "Cluster",
            Self::Group => "Group",
            Self::Member => "Member",
            Self::Host => "Host",
            Self::Role => "Role",
            Self::State => "State",
            Self::Timeline => "TL",
            Self::ReceiveLsn => "Receive LSN",
            Self::ReceiveLag | Self::ReplayLag if format.is_table() => "Lag",
            Self::ReceiveLag => "Receive Lag",
            Self::ReplayLsn => "Replay LSN",
            Self::ReplayLag => "Replay Lag",
            Self::PendingRestart => "Pending restart",
            Self::PendingRestartReason => "Pending restart reason",
            Self::ScheduledRestart => "Scheduled restart",
            Self::Tags => "Tags",
        }
    }
}

fn columns(listing: &Listing<'_>, members: &[&Shown]) -> Vec<Column> {
    use Column::*;
    let always = [Member, Host, Role, State, Timeline, ReceiveLsn, ReceiveLag, ReplayLsn, ReplayLag];
    let optional = [PendingRestart, PendingRestartReason, ScheduledRestart, Tags];
    let has_value =
        |column: &Column| members.iter().any(|member| member.host.is_some() && member.optional(*column) != *"");
    std::iter::once(Cluster)
        .chain(listing.citus.map(|_| Group))
        .chain(always)
        .chain(optional.into_iter().filter(|column| listing.extended || has_value(column)))
        .collect()
}

/// A host alone does not tell members apart where ports differ from the usual one or a host is shared.
fn needs_ports(members: &[&Shown]) -> bool {
    let addresses: Vec<&(String, u16)> = members.iter().filter_map(|member| member.host.as_ref()).collect();
    let hosts: BTreeSet<&str> = addresses.iter().map(|(host, _)| host.as_str()).collect();
    hosts.len() < addresses.len() || addresses.iter().any(|(_, port)| *port != 5432)
}

/// A member as its row shows it.
#[derive(Debug, Clone)]
struct Shown {
    name: String,
    host: Option<(String, u16)>,
    role: &'static str,
    state: String,
    timeline: Value,
    receive: (Value, Value),
    replay: (Value, Value),
    pending_restart: bool,
    reason: String,
    scheduled_restart: String,
    tags: Map<String, Value>,
}

impl Shown {
    fn new(name: &MemberName, member: &Member, view: &ClusterView, format: Format) -> Self {
        let role = role(name, view);
        let replication = member.replication_state.clone().filter(|state| role != "leader" && !state.is_empty());
        // A view says "unknown" where the key says nothing; patronictl leaves the cell empty.
        let own = Some(&member.state).filter(|state| *state != "unknown").cloned();
        let state = replication.or(own).unwrap_or_default();
        let (receive, replay) = positions(name, member, view, &state);
        Self {
            name: name.to_string(),
            host: member.host_port(),
            role,
            timeline: member.timeline.map_or_else(|| Value::from(""), |timeline| Value::from(timeline.0)),
            state,
            receive,
            replay,
            pending_restart: member.pending_restart,
            reason: restart_reason(member, format.is_table()),
            scheduled_restart: member.scheduled_restart.as_ref().map(scheduled_restart).unwrap_or_default(),
            tags: member.tags.clone(),
        }
    }

    fn cell(&self, column: Column, cluster: &str, group: u32, with_port: bool) -> Value {
        match column {
            Column::Cluster => cluster.into(),
            Column::Group => group.into(),
            Column::Member => self.name.as_str().into(),
            Column::Host => match &self.host {
                Some((host, port)) if with_port => format!("{host}:{port}").into(),
                Some((host, _)) => host.as_str().into(),
                None => "".into(),
            },
            Column::Role => title_case(self.role).into(),
            Column::State => self.state.as_str().into(),
            Column::Timeline => self.timeline.clone(),
            Column::ReceiveLsn => self.receive.0.clone(),
            Column::ReceiveLag => self.receive.1.clone(),
            Column::ReplayLsn => self.replay.0.clone(),
            Column::ReplayLag => self.replay.1.clone(),
            optional => self.optional(optional),
        }
    }

    /// The cell of an optional column; an empty text where there is nothing to show.
    fn optional(&self, column: Column) -> Value {
        match column {
            Column::PendingRestart => if self.pending_restart { "*" } else { "" }.into(),
            Column::PendingRestartReason => self.reason.as_str().into(),
            Column::ScheduledRestart => self.scheduled_restart.as_str().into(),
            Column::Tags if !self.tags.is_empty() => Value::Object(self.tags.clone()),
            _ => "".into(),
        }
    }
}

fn shown_members(view: &ClusterView, format: Format) -> Vec<Shown> {
    let members = view.members.iter().map(|(name, member)| Shown::new(name, member, view, format));
    match format {
        Format::Topology => as_tree(members.collect()),
        _ => members.collect(),
    }
}

fn role(name: &MemberName, view: &ClusterView) -> &'static str {
    let settings = &view.settings;
    let standby_cluster = settings.standby_cluster.is_some();
    match settings.synchronous_mode {
        _ if view.is_leader(name) && standby_cluster => "standby_leader",
        _ if view.is_leader(name) => "leader",
        SynchronousMode::On if !standby_cluster && view.sync.lists(name) => "sync_standby",
        SynchronousMode::Quorum if !standby_cluster && view.sync.lists(name) => "quorum_standby",
        _ => "replica",
    }
}

/// (receive LSN, lag), (replay LSN, lag); empty for the leader.
fn positions(name: &MemberName, member: &Member, view: &ClusterView, state: &str) -> ((Value, Value), (Value, Value)) {
    let empty = || Value::from("");
    if view.is_leader(name) {
        return ((empty(), empty()), (empty(), empty()));
    }
    let known = |lsn: Option<Lsn>| lsn.filter(|lsn| lsn.is_valid());
    let (mut receive, mut replay) = (known(member.receive_lsn), known(member.replay_lsn));
    // Members of old versions tell one position; what it means follows from the state.
    if receive.is_none() && replay.is_none() {
        let single = known(member.xlog_location);
        if state == "streaming" { receive = single } else { replay = single }
    }
    let shown = |lsn: Option<Lsn>| match lsn {
        Some(lsn) => (lsn.to_string().into(), megabytes(lsn.lag_behind(view.status.optime)).into()),
        None => ("unknown".into(), empty()),
    };
    (shown(receive), shown(replay))
}

/// Rounded as Python does: a half goes to the even neighbour.
fn megabytes(bytes: u64) -> u64 {
    const HALF: u64 = 1 << 19;
    let (whole, rest) = (bytes >> 20, bytes & ((1 << 20) - 1));
    whole + u64::from(rest > HALF || (rest == HALF && whole % 2 == 1))
}

fn restart_reason(member: &Member, hide_long: bool) -> String {
    let Some(Value::Object(reasons)) = &member.pending_restart_reason else { return String::new() };
    let line = |(setting, values): (&String, &Value)| {
        let value = |key: &str| values.get(key).map(python_str).unwrap_or_default();
        let line = format!("{setting}: {}->{}", value("old_value"), value("new_value"));
        if hide_long && line.chars().count() > MAX_REASON { format!("{setting}: [hidden - too long]") } else { line }
    };
    reasons.iter().map(line).collect::<Vec<_>>().join("\n")
}

fn scheduled_restart(value: &Value) -> String {
    let at = value.get("schedule").map(python_str).unwrap_or_default();
    match value.get("postgres_version") {
        Some(version) => format!("{at} if version < {}", python_str(version)),
        None => at,
    }
}

/// Below the leader, by `replicatefrom` where that names another replica; names are indented by their level. Members
/// that replicate from each other in a circle have no place in the tree and are not shown.
fn as_tree(members: Vec<Shown>) -> Vec<Shown> {
    let is_leader = |member: &Shown| member.role.ends_with("leader");
    let root = members.iter().find(|member| is_leader(member)).map(|member| member.name.clone());
    let replicas: BTreeSet<String> =
        members.iter().filter(|member| !is_leader(member)).map(|member| member.name.clone()).collect();
    let mut below: BTreeMap<Option<String>, Vec<Shown>> = BTreeMap::new();
    let mut rows = Vec::with_capacity(members.len());
    for member in members {
        if is_leader(&member) {
            rows.push(member);
            continue;
        }
        let upstream = member.tags.get("replicatefrom").and_then(Value::as_str);
        let upstream = upstream.filter(|name| *name != member.name && replicas.contains(*name)).map(str::to_owned);
        below.entry(upstream.or_else(|| root.clone())).or_default().push(member);
    }
    push_level(&mut rows, &mut below, root, 1);
    rows
}

fn push_level(
    rows: &mut Vec<Shown>,
    below: &mut BTreeMap<Option<String>, Vec<Shown>>,
    of: Option<String>,
    level: usize,
) {
    // Taken out of the map: a name comes up once only, so this ends.
    for mut member in below.remove(&of).unwrap_or_default() {
        let name = std::mem::take(&mut member.name);
        member.name = format!("{}+ {name}", " ".repeat((level - 1) * 2));
        rows.push(member);
        push_level(rows, below, Some(name), level + 1);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use trunkline_common::dcs::codec;
    use trunkline_common::dcs::paths::Paths;
    use trunkline_common::dcs::{KeyValue, Snapshot};
    use trunkline_common::{LeaseId, Revision};

    use super::super::output::render;
    use super::*;

    fn view(keys: &[(&str, Value)]) -> ClusterView {
        let paths = Paths::new("service", "demo");
        let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let mut entries: Vec<KeyValue> = keys
            .iter()
            .map(|(key, value)| KeyValue {
                key: paths.key(key),
                value: text(value).into_bytes(),
                created: Revision(1),
                modified: Revision(2),
                lease: LeaseId(3),
            })
            .collect();
        entries.sort_by(|a, b| a.key.cmp(&b.key));
        codec::view(&paths, &Snapshot { revision: Revision(9), entries }, None)
    }

    fn standby(host: &str, extra: Value) -> Value {
        let mut member = json!({
            "conn_url": format!("postgres://{host}:5432/postgres"), "state": "running", "role": "replica", "version": "4.1.4",
            "xlog_location": 50_819_480, "replay_lsn": 50_819_480, "receive_lsn": 50_819_480,
            "replication_state": "streaming", "timeline": 5,
        });
        member.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        member
    }

    fn demo(extra: &[(&str, Value)]) -> ClusterView {
        let leader = json!({
            "conn_url": "postgres://10.1.0.5:5432/postgres", "state": "running", "role": "primary", "timeline": 5,
            "xlog_location": 50_819_480,
        });
        let mut keys = vec![
            ("initialize", json!("7100000000000000001")),
            ("leader", json!("pg-a")),
            ("members/pg-a", leader),
            ("members/pg-b", standby("10.1.0.6", json!({}))),
            ("status", json!({"optime": 50_819_480})),
            ("sync", json!({"leader": "pg-a", "sync_standby": "pg-b", "quorum": 0})),
            ("config", json!({"ttl": 20, "synchronous_mode": true})),
        ];
        keys.retain(|(key, _)| !extra.iter().any(|(other, _)| other == key));
        keys.extend(extra.iter().cloned());
        view(&keys)
    }

    fn list(view: &ClusterView, format: Format) -> String {
        let clusters = BTreeMap::from([(0, view)]);
        let listing = Listing { name: "demo", clusters, citus: None, extended: false };
        render(&sheet(&listing, format), format, "\t")
    }

    #[test]
    fn the_table_of_the_manual() {
        let expected = "\
+ Cluster: demo (7100000000000000001) --+-----------+----+-------------+-----+------------+-----+
| Member | Host     | Role         | State     | TL | Receive LSN | Lag | Replay LSN | Lag |
+--------+----------+--------------+-----------+----+-------------+-----+------------+-----+
| pg-a   | 10.1.0.5 | Leader       | running   |  5 |             |     |            |     |
| pg-b   | 10.1.0.6 | Sync Standby | streaming |  5 |   0/3077198 |   0 |  0/3077198 |   0 |
+--------+----------+--------------+-----------+----+-------------+-----+------------+-----+";
        let table = list(&demo(&[]), Format::Pretty);
        assert_eq!(table.lines().skip(1).collect::<Vec<_>>(), expected.lines().skip(1).collect::<Vec<_>>());
        assert!(table.starts_with("+ Cluster: demo (7100000000000000001) ----"), "{table}");
    }

    #[test]
    fn json_has_no_empty_cells() {
        let expected = r#"[{"Cluster": "demo", "Member": "pg-a", "Host": "10.1.0.5", "Role": "Leader", "State": "running", "TL": 5}, {"Cluster": "demo", "Member": "pg-b", "Host": "10.1.0.6", "Role": "Sync Standby", "State": "streaming", "TL": 5, "Receive LSN": "0/3077198", "Receive Lag": 0, "Replay LSN": "0/3077198", "Replay Lag": 0}]"#;
        assert_eq!(list(&demo(&[]), Format::Json), expected);
    }

    #[test]
    fn roles_follow_the_settings() {
        let role_of_b = |config: Value| {
            let view = demo(&[("config", config)]);
            ["pg-a", "pg-b"].map(|name| role(&name.into(), &view))
        };
        assert_eq!(role_of_b(json!({"a": 1})), ["leader", "replica"]);
        assert_eq!(role_of_b(json!({"synchronous_mode": "on"})), ["leader", "sync_standby"]);
        assert_eq!(role_of_b(json!({"synchronous_mode": "quorum"})), ["leader", "quorum_standby"]);
        let standby = json!({"synchronous_mode": true, "standby_cluster": {"host": "x"}});
        assert_eq!(role_of_b(standby), ["standby_leader", "replica"]);
    }

    #[test]
    fn ports_are_shown_where_a_host_is_not_enough() {
        let shared = demo(&[("members/pg-b", standby("10.1.0.5", json!({})))]);
        assert!(list(&shared, Format::Tsv).contains("\t10.1.0.5:5432\tLeader\t"));
        let other = standby("x", json!({"conn_url": "postgres://10.1.0.6:5433/postgres"}));
        assert!(list(&demo(&[("members/pg-b", other)]), Format::Tsv).contains("\t10.1.0.6:5433\tSync Standby\t"));
    }

    #[test]
    fn optional_columns_come_with_the_first_value() {
        let long = "x".repeat(60);
        let reason = json!({
            "max_connections": {"old_value": "60", "new_value": "70"}, "log": {"old_value": long, "new_value": ""},
        });
        let member = json!({
            "pending_restart": true, "pending_restart_reason": reason, "tags": {"zone": "a0", "rank": 0},
            "scheduled_restart": {"schedule": "2031-01-01T00:00:00+00:00", "postgres_version": "15.5"},
        });
        let view = demo(&[("members/pg-b", standby("10.1.0.6", member))]);
        let tsv = list(&view, Format::Tsv);
        assert!(tsv.starts_with(
            "Cluster\tMember\tHost\tRole\tState\tTL\tReceive LSN\tReceive Lag\tReplay LSN\tReplay Lag\t\
             Pending restart\tPending restart reason\tScheduled restart\tTags\n"
        ));
        assert!(tsv.contains(&format!("\tmax_connections: 60->70\nlog: {long}->\t")), "{tsv}");
        assert!(tsv.ends_with("\t2031-01-01T00:00:00+00:00 if version < 15.5\t{rank: 0, zone: a0}"), "{tsv}");
        assert!(list(&view, Format::Pretty).contains("| log: [hidden - too long]"));
    }

    #[test]
    fn lag_is_in_megabytes_rounded_to_even() {
        let table =
            [(0, 0), (1 << 19, 0), ((1 << 19) + 1, 1), (3 << 19, 2), (5 << 19, 2), (1 << 20, 1), (u64::MAX, 1 << 44)];
        for (bytes, expected) in table {
            assert_eq!(megabytes(bytes), expected, "{bytes}");
        }
    }

    #[test]
    fn old_members_tell_one_position() {
        let old = |state: &str| {
            let member = json!({
                "conn_url": "postgres://10.1.0.6/postgres", "state": "running", "replication_state": state,
                "xlog_location": 50_819_480 - (3 << 20),
            });
            list(&demo(&[("members/pg-b", member)]), Format::Tsv)
        };
        assert!(old("streaming").ends_with("streaming\t\t0/2D77198\t3\tunknown\t"), "{}", old("streaming"));
        assert!(old("in archive recovery").ends_with("recovery\t\tunknown\t\t0/2D77198\t3"));
    }

    #[test]
    fn the_tree_follows_replicatefrom() {
        let from = |name: &str| standby("10.1.0.9", json!({"tags": {"replicatefrom": name}}));
        let view = demo(&[
            ("members/pg-c", from("pg-d")),
            ("members/pg-d", from("pg-a")),
            ("members/pg-e", from("pg-e")),
            ("members/pg-x", from("pg-y")),
            ("members/pg-y", from("pg-x")),
        ]);
        let names: Vec<String> = shown_members(&view, Format::Topology).into_iter().map(|member| member.name).collect();
        assert_eq!(names, ["pg-a", "+ pg-b", "+ pg-d", "  + pg-c", "+ pg-e"]);
    }

    #[test]
    fn a_tree_without_leader_has_replicas_only() {
        let mut view = demo(&[]);
        view.leader = None;
        let names: Vec<String> = shown_members(&view, Format::Topology).into_iter().map(|member| member.name).collect();
        assert_eq!(names, ["+ pg-a", "+ pg-b"]);
    }

    #[test]
    fn below_the_table() {
        let failover = json!({"leader": "pg-a", "member": "pg-b", "scheduled_at": "2031-01-01T00:00:00+00:00"});
        let view = demo(&[("config", json!({"pause": true})), ("failover", failover)]);
        let expected = "Switchover scheduled at: 2031-01-01T00:00:00+00:00\n                    from: pg-a\n                      to: pg-b";
        assert_eq!(service_info(&view), ["Maintenance mode: on", expected]);
        assert_eq!(service_info(&demo(&[])), Vec::<String>::new());
    }

    #[test]
    fn titles() {
        let titles = |keys: &[(&str, Value)]| {
            let view = view(keys);
            [None, Some(None), Some(Some(1))].map(|citus| {
                title(&Listing { name: "demo", clusters: BTreeMap::from([(0, &view)]), citus, extended: false })
            })
        };
        assert_eq!(
            titles(&[]),
            [
                " Cluster: demo (uninitialized) ",
                " Citus cluster: demo ",
                " Citus cluster: demo (group: 1, uninitialized) "
            ]
        );
        assert_eq!(titles(&[("initialize", json!(""))])[0], " Cluster: demo (initializing) ");
    }
}
