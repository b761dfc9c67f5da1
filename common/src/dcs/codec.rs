//! Patroni's values: what the keys say (dcs-layout §3), read leniently and written exactly.
//!
//! Reading never fails: a value that makes no sense is logged once, with its key, and what the previous view had for it
//! stays in force. Numbers may come as strings, old clusters may hold the text forms that Patroni once wrote.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde_json::{Map, Value, json};
use trunkline_config::dynamic::{MAX_ROUTER_LEASE, Settings};

use super::paths::Paths;
use super::{KeyValue, Snapshot};
use crate::cluster::{
    ConfigRecord, FailoverRequest, HistoryLine, Initialize, LeaderKey, RestoreRecord, RouterRecord, Status, SyncState,
};
use crate::{ClusterView, LeaseId, Lsn, Member, MemberName, Revision, SystemId, TimelineId};

pub use super::json::{compact, deep_compare, python_json};

/// Reads a snapshot as a cluster. A malformed value is logged once with its key, and what `previous` had for it stays.
pub fn view(paths: &Paths, snapshot: &Snapshot, previous: Option<&ClusterView>) -> ClusterView {
    view_after(paths, snapshot, previous, Revision(0))
}

/// The same where the snapshot has grown out of the one that `previous` shows by events alone: what was not written after
/// the revision `since` is taken from there, unread.
pub fn view_after(paths: &Paths, snapshot: &Snapshot, previous: Option<&ClusterView>, since: Revision) -> ClusterView {
    let nothing = ClusterView::default();
    let before = previous.unwrap_or(&nothing);
    let since = previous.map_or(Revision(0), |_| since);
    let mut reader = Reader {
        before,
        since,
        prefix: paths.prefix(),
        first: previous.is_none(),
        malformed: BTreeMap::new(),
        unknown: BTreeSet::new(),
    };
    let mut view = ClusterView { revision: snapshot.revision, ..ClusterView::default() };
    let mut legacy_optime = None;
    let mut has_status = false;
    for entry in &snapshot.entries {
        let Some(key) = entry.key.strip_prefix(paths.prefix()) else { continue };
        match key {
            "initialize" => {
                view.initialize = initialize(&entry.value);
                view.initialize_revision = entry.modified;
            }
            "leader" => view.leader = Some(leader(entry)),
            "config" => reader.config(entry, &mut view),
            "history" => {
                let read = |value: &[u8]| history(value).map(|lines| (true, lines));
                let kept = || (before.has_history, before.history.clone());
                (view.has_history, view.history) = reader.read(entry, read, kept);
                view.history_revision = entry.modified;
            }
            "timeline" => {
                view.claimed = reader.read(entry, claimed, || before.claimed);
                view.claimed_revision = entry.modified;
            }
            "restored" => {
                view.restored = reader.read(entry, restored, || before.restored.clone());
                view.restored_revision = entry.modified;
            }
            "status" => {
                view.status = reader.read(entry, status, || before.status.clone());
                view.status_revision = entry.modified;
                has_status = true;
            }
            "optime/leader" => legacy_optime = Some(entry),
            "failover" => {
                view.failover = reader.read(entry, failover, || before.failover.clone());
                view.failover_revision = entry.modified;
            }
            "sync" => {
                view.sync = reader.read(entry, sync, || before.sync.clone());
                view.sync.revision = entry.modified;
            }
            "failsafe" => {
                view.failsafe = reader.read(entry, |value| failsafe(value).map(Some), || before.failsafe.clone());
                view.failsafe_revision = entry.modified;
            }
            _ if key.starts_with("routers/") => {
                let id = &key["routers/".len()..];
                let kept = || before.routers.get(id).cloned();
                if let Some(router) = reader.read(entry, |value| router(value).map(Some), kept) {
                    view.routers.insert(id.to_owned(), router);
                }
            }
            _ => {
                let Some(name) = key.strip_prefix("members/").filter(|name| is_member_name(name)) else { continue };
                let name = MemberName::from(name);
                let kept = || before.members.get(&name).cloned().unwrap_or_else(unknown_member);
                let member = Member { lease: entry.lease, ..reader.read(entry, member, kept) };
                view.members.insert(name, member);
            }
        }
    }
    if let Some(entry) = legacy_optime.filter(|_| !has_status) {
        // What `previous` has may be of the newer key, which has just gone.
        reader.since = Revision(0);
        view.status = reader.read(entry, status, || before.status.clone());
    }
    (view.malformed, view.unknown) = (reader.malformed, reader.unknown);
    view
}

/// The value of a `members/<name>` key, fields in Patroni's order, absent ones left out.
pub fn encode_member(member: &Member) -> Value {
    let mut map = Map::new();
    let mut put = |field: &str, value: Option<Value>| {
        if let Some(value) = value {
            map.insert(field.to_owned(), value);
        }
    };
    let lsn = |lsn: Option<Lsn>| lsn.map(|lsn| json!(lsn.0));
    let flag = |set: bool| set.then_some(Value::Bool(true));
    put("conn_url", member.conn_url.clone().map(Value::from));
    put("api_url", member.api_url.clone().map(Value::from));
    put("state", Some(Value::from(member.state.clone())));
    put("role", Some(Value::from(member.role.clone())));
    put("version", member.version.clone().map(Value::from));
    put("proxy_url", member.proxy_url.clone().map(Value::from));
    // Patroni only ever writes `false`: absence on a primary means that the checkpoint is done.
    put("checkpoint_after_promote", member.checkpoint_after_promote.filter(|done| !done).map(Value::from));
    put("tags", (!member.tags.is_empty()).then(|| Value::Object(member.tags.clone())));
    put("pending_restart", flag(member.pending_restart));
    put("pending_restart_reason", member.pending_restart_reason.clone());
    put("xlog_location", lsn(member.xlog_location));
    put("replay_lsn", lsn(member.replay_lsn));
    put("receive_lsn", lsn(member.receive_lsn));
    put("replication_state", member.replication_state.clone().map(Value::from));
    put("timeline", member.timeline.map(|timeline| json!(timeline.0)));
    put("scheduled_restart", member.scheduled_restart.clone());
    put("pause", flag(member.pause));
    Value::Object(map)
}

/// The value of the `restored` key.
pub fn encode_restored(record: &RestoreRecord) -> Value {
    let mut value = json!({ "count": record.count, "since": record.since.0 });
    if let Some(before) = &record.sync {
        value["sync"] = encode_sync(before.leader.as_ref(), before.quorum, &before.standbys);
        value["sync"]["revision"] = before.revision.0.into();
    }
    value
}

/// The value of the `status` key.
pub fn encode_status(status: &Status) -> Value {
    let mut value = json!({ "optime": status.optime.0 });
    if let Some(slots) = &status.slots {
        value["slots"] = slots.iter().map(|(name, lsn)| (name.clone(), json!(lsn.0))).collect::<Map<_, _>>().into();
    }
    if let Some(retain) = &status.retain_slots {
        value["retain_slots"] = json!(retain);
    }
    value
}

/// The value of the `sync` key: names sorted, none written as `null`.
pub fn encode_sync(leader: Option<&MemberName>, quorum: u32, standbys: &[String]) -> Value {
    let mut names: Vec<&str> = standbys.iter().map(String::as_str).collect();
    names.sort_unstable();
    let listed = (!names.is_empty()).then(|| names.join(","));
    json!({ "leader": leader.map(MemberName::as_str), "quorum": quorum, "sync_standby": listed })
}

/// The value of the `failover` key; `{}` without a request.
pub fn encode_failover(request: Option<&FailoverRequest>) -> Value {
    let mut map = Map::new();
    let Some(request) = request else { return Value::Object(map) };
    if let Some(leader) = &request.leader {
        map.insert("leader".to_owned(), leader.as_str().into());
    }
    if let Some(candidate) = &request.candidate {
        map.insert("member".to_owned(), candidate.as_str().into());
    }
    let text = || request.scheduled_at.map(|at| at.format("%Y-%m-%dT%H:%M:%S%.f%:z").to_string());
    if let Some(at) = request.scheduled_at_text.clone().or_else(text) {
        map.insert("scheduled_at".to_owned(), at.into());
    }
    Value::Object(map)
}

/// The value of a `routers/` key.
pub fn encode_router(router: &RouterRecord) -> Value {
    json!({ "name": router.name, "lease": router.lease.as_secs(), "epoch": router.epoch.0 })
}

/// The value of the `history` key: `[timeline, switchpoint, reason, promoted_at, new_leader]` per finished timeline.
pub fn encode_history(lines: &[HistoryLine]) -> Value {
    let line = |line: &HistoryLine| {
        let mut fields = vec![json!(line.timeline.0), json!(line.switchpoint.0), json!(line.reason)];
        // Lines of old clusters end early; a name without a time cannot be written.
        if let Some(at) = &line.promoted_at {
            fields.push(json!(at));
            fields.extend(line.new_leader.as_ref().map(|name| json!(name)));
        }
        Value::Array(fields)
    };
    Value::Array(lines.iter().map(line).collect())
}

/// Why a value was not understood.
type Malformed = String;

/// Keeps count of what could not be read, so that it is said once.
struct Reader<'a> {
    before: &'a ClusterView,
    /// What was written up to here is in `before`.
    since: Revision,
    prefix: &'a str,
    /// Nothing is before.
    first: bool,
    malformed: BTreeMap<String, Revision>,
    unknown: BTreeSet<String>,
}

impl Reader<'_> {
    fn read<T>(
        &mut self,
        entry: &KeyValue,
        read: impl FnOnce(&[u8]) -> Result<T, Malformed>,
        kept: impl FnOnce() -> T,
    ) -> T {
        if entry.modified <= self.since {
            if let Some(revision) = self.before.malformed.get(&entry.key) {
                self.is_malformed(entry, *revision);
            }
            return kept();
        }
        read(&entry.value).unwrap_or_else(|why| {
            self.report(entry, &why);
            kept()
        })
    }

    fn report(&mut self, entry: &KeyValue, why: &str) {
        if self.before.malformed.get(&entry.key) != Some(&entry.modified) {
            tracing::warn!(key = %entry.key, "malformed value in the DCS, the last good one stays in force: {why}");
        }
        self.is_malformed(entry, entry.modified);
    }

    fn is_malformed(&mut self, entry: &KeyValue, revision: Revision) {
        self.malformed.insert(entry.key.clone(), revision);
        let key = entry.key.strip_prefix(self.prefix).unwrap_or(&entry.key);
        if self.first || self.before.unknown.contains(key) {
            self.unknown.insert(key.to_owned());
        }
    }

    fn config(&mut self, entry: &KeyValue, view: &mut ClusterView) {
        let revision = entry.modified;
        match &self.before.config {
            // Unchanged: not parsed again, and what stayed in force stays.
            Some(before) if before.revision == revision => {
                view.config = Some(before.clone());
                view.settings = self.before.settings.clone();
                if self.before.malformed.get(&entry.key) == Some(&revision) {
                    self.is_malformed(entry, revision);
                }
            }
            before => {
                let parsed = |value: &[u8]| json_object(value).map(Value::Object);
                let kept = || before.as_ref().map_or_else(|| json!({}), |config| config.value.clone());
                let value = self.read(entry, parsed, kept);
                view.settings = settings(&entry.key, &value, &self.before.settings);
                view.config = Some(ConfigRecord { value, revision });
            }
        }
    }
}

fn settings(key: &str, value: &Value, before: &Settings) -> Settings {
    let (settings, notices) = Settings::after(value, before);
    for notice in notices {
        tracing::warn!(%key, "{notice}");
    }
    settings
}

fn is_member_name(name: &str) -> bool {
    !name.is_empty() && !name.contains('/')
}

fn leader(entry: &KeyValue) -> LeaderKey {
    let name = MemberName(String::from_utf8_lossy(&entry.value).into_owned());
    LeaderKey { name, lease: entry.lease, created: entry.created, modified: entry.modified }
}

fn initialize(value: &[u8]) -> Initialize {
    let text = String::from_utf8_lossy(value);
    let is_id = text.len() >= 10 && text.bytes().all(|b| b.is_ascii_digit());
    match text.parse() {
        Ok(id) if is_id => Initialize::Done(SystemId(id)),
        _ if text.is_empty() => Initialize::Running,
        _ => Initialize::Invalid(text.into_owned()),
    }
}

fn unknown_member() -> Member {
    Member { state: "unknown".to_owned(), ..Member::default() }
}

fn member(value: &[u8]) -> Result<Member, Malformed> {
    if value.starts_with(b"postgres") {
        return Ok(legacy_member(&String::from_utf8_lossy(value)));
    }
    let map = json_object(value)?;
    let text = |field: &str| map.get(field).and_then(Value::as_str).filter(|text| !text.is_empty()).map(str::to_owned);
    let lsn = |field: &str| map.get(field).and_then(lenient_u64).map(Lsn);
    let flag = |field: &str| map.get(field).is_some_and(trunkline_config::tags::truthy);
    Ok(Member {
        lease: LeaseId::default(),
        conn_url: text("conn_url").or_else(|| url_from_kwargs(map.get("conn_kwargs")?)),
        api_url: text("api_url"),
        proxy_url: text("proxy_url"),
        state: text("state").unwrap_or_else(|| "unknown".to_owned()),
        role: text("role").unwrap_or_default(),
        version: text("version"),
        tags: map.get("tags").and_then(Value::as_object).cloned().unwrap_or_default(),
        xlog_location: lsn("xlog_location"),
        receive_lsn: lsn("receive_lsn"),
        replay_lsn: lsn("replay_lsn"),
        replication_state: text("replication_state"),
        timeline: map.get("timeline").and_then(lenient_timeline).filter(|timeline| timeline.0 > 0),
        checkpoint_after_promote: map.get("checkpoint_after_promote").and_then(Value::as_bool),
        pending_restart: flag("pending_restart"),
        pending_restart_reason: map.get("pending_restart_reason").cloned(),
        scheduled_restart: map.get("scheduled_restart").cloned(),
        pause: flag("pause"),
    })
}

/// Before members had JSON values: the connection URL, the API's URL as its `application_name`.
fn legacy_member(text: &str) -> Member {
    let (url, query) = text.split_once('?').unwrap_or((text, ""));
    let api_url = query.split('&').find_map(|pair| pair.strip_prefix("application_name=")).map(percent_decoded);
    Member { conn_url: Some(url.to_owned()), api_url, ..unknown_member() }
}

fn percent_decoded(text: &str) -> String {
    let hex = |digits: Option<&[u8]>| u8::from_str_radix(std::str::from_utf8(digits?).ok()?, 16).ok();
    let mut rest = text.as_bytes();
    let mut out = Vec::with_capacity(rest.len());
    while let [first, tail @ ..] = rest {
        rest = tail;
        match (first, hex(tail.get(..2))) {
            (b'%', Some(byte)) => {
                out.push(byte);
                rest = &tail[2..];
            }
            (b'+', _) => out.push(b' '),
            (other, _) => out.push(*other),
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn url_from_kwargs(kwargs: &Value) -> Option<String> {
    let host = kwargs.get("host")?.as_str()?;
    let port = kwargs.get("port").and_then(lenient_u64).unwrap_or(5432);
    let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
    Some(format!("postgresql://{host}:{port}"))
}

fn failover(value: &[u8]) -> Result<Option<FailoverRequest>, Malformed> {
    let text = std::str::from_utf8(value).map_err(|e| e.to_string())?.trim();
    let looks_like_json = text.starts_with(['{', '[', '"']) || text == "null";
    if !text.is_empty() && !looks_like_json {
        let (leader, candidate) = text.split_once(':').unwrap_or((text, ""));
        return Ok(request(named(leader), named(candidate.split(':').next().unwrap_or("")), None, None));
    }
    if text.is_empty() || text == "null" {
        return Ok(None);
    }
    let map = json_object(value)?;
    let name = |field: &str| map.get(field).and_then(Value::as_str).and_then(named);
    let at = map.get("scheduled_at").and_then(Value::as_str).filter(|text| !text.is_empty());
    let parsed = at.map(|text| timestamp(text).ok_or_else(|| format!("'{text}' is not a time with an offset")));
    Ok(request(name("leader"), name("member"), parsed.transpose()?, at.map(str::to_owned)))
}

fn request(
    leader: Option<MemberName>,
    candidate: Option<MemberName>,
    scheduled_at: Option<chrono::DateTime<chrono::FixedOffset>>,
    scheduled_at_text: Option<String>,
) -> Option<FailoverRequest> {
    let asks = leader.is_some() || candidate.is_some();
    asks.then_some(FailoverRequest { leader, candidate, scheduled_at, scheduled_at_text })
}

fn named(name: &str) -> Option<MemberName> {
    let name = name.trim();
    (!name.is_empty()).then(|| name.into())
}

/// ISO 8601 with an offset, as Python prints it and as people write it. Without an offset there is no telling when
/// it is: refused, as Patroni does when the time comes.
pub fn timestamp(text: &str) -> Option<chrono::DateTime<chrono::FixedOffset>> {
    const FORMS: [&str; 4] =
        ["%Y-%m-%d %H:%M:%S%.f%#z", "%Y-%m-%dT%H:%M:%S%.f%#z", "%Y-%m-%d %H:%M%#z", "%Y-%m-%dT%H:%M%#z"];
    let text = text.trim();
    let utc = text.strip_suffix(['Z', 'z']).map(|bare| format!("{}+00:00", bare.trim_end()));
    let text = utc.as_deref().unwrap_or(text);
    FORMS.iter().find_map(|form| chrono::DateTime::parse_from_str(text, form).ok())
}

fn sync(value: &[u8]) -> Result<SyncState, Malformed> {
    if value.is_empty() {
        return Ok(SyncState::default());
    }
    sync_of(&json_object(value)?)
}

fn sync_of(map: &Map<String, Value>) -> Result<SyncState, Malformed> {
    let Some(leader) = map.get("leader").and_then(Value::as_str).and_then(named) else {
        return Ok(SyncState::default());
    };
    let listed = map.get("sync_standby").and_then(Value::as_str).unwrap_or("");
    let mut standbys: Vec<String> =
        listed.split(',').map(str::trim).filter(|name| !name.is_empty()).map(str::to_owned).collect();
    standbys.sort_unstable();
    let quorum = match map.get("quorum") {
        None | Some(Value::Null) => 0,
        Some(value) => lenient_u64(value).and_then(|n| u32::try_from(n).ok()).ok_or("quorum is not a number")?,
    };
    Ok(SyncState { leader: Some(leader), standbys, quorum, revision: Revision::default() })
}

/// The object of today; a bare integer before slots were kept there; parts that are strings with JSON in them.
fn status(value: &[u8]) -> Result<Status, Malformed> {
    let parsed = json(value)?;
    if let Some(optime) = lenient_u64(&parsed) {
        return Ok(Status { optime: Lsn(optime), ..Status::default() });
    }
    let Value::Object(map) = parsed else { return Err("not an object".to_owned()) };
    let part = |field: &str| match map.get(field)? {
        Value::String(text) => serde_json::from_str(text).ok(),
        other => Some(other.clone()),
    };
    let slots = match part("slots") {
        Some(Value::Object(slots)) => {
            Some(slots.iter().filter_map(|(name, lsn)| Some((name.clone(), Lsn(lenient_u64(lsn)?)))).collect())
        }
        _ => None,
    };
    let retain_slots = match part("retain_slots") {
        Some(Value::Array(names)) => Some(names.iter().filter_map(|name| name.as_str().map(str::to_owned)).collect()),
        _ => None,
    };
    Ok(Status { optime: Lsn(map.get("optime").and_then(lenient_u64).unwrap_or(0)), slots, retain_slots })
}

fn history(value: &[u8]) -> Result<Vec<HistoryLine>, Malformed> {
    let Value::Array(lines) = json(value)? else { return Err("not an array".to_owned()) };
    let line = |line: &Value| {
        let fields = line.as_array()?;
        let text = |at: usize| fields.get(at).and_then(Value::as_str).map(str::to_owned);
        Some(HistoryLine {
            timeline: lenient_timeline(fields.first()?)?,
            switchpoint: Lsn(lenient_u64(fields.get(1)?)?),
            reason: text(2).unwrap_or_default(),
            promoted_at: text(3),
            new_leader: text(4),
        })
    };
    lines.iter().map(|l| line(l).ok_or_else(|| format!("'{}' is not a line of history", python_json(l)))).collect()
}

fn claimed(value: &[u8]) -> Result<TimelineId, Malformed> {
    let number = std::str::from_utf8(value).ok().and_then(|text| text.trim().parse().ok());
    number.map(TimelineId).ok_or_else(|| "it is not the number of a timeline".into())
}

fn restored(value: &[u8]) -> Result<RestoreRecord, Malformed> {
    let map = json_object(value)?;
    let number = |map: &Map<String, Value>, field: &str| {
        map.get(field).and_then(lenient_u64).ok_or(format!("{field} is not a number"))
    };
    let revision = |map: &Map<String, Value>, field: &str| {
        i64::try_from(number(map, field)?).map(Revision).map_err(|error| error.to_string())
    };
    let before = match map.get("sync") {
        None | Some(Value::Null) => None,
        Some(Value::Object(before)) => Some(SyncState { revision: revision(before, "revision")?, ..sync_of(before)? }),
        Some(_) => return Err("sync is not an object".to_owned()),
    };
    Ok(RestoreRecord { count: number(&map, "count")?, since: revision(&map, "since")?, sync: before })
}

fn failsafe(value: &[u8]) -> Result<BTreeMap<MemberName, String>, Malformed> {
    let entry = |(name, url): (String, Value)| match url {
        Value::String(url) => Ok((MemberName(name), url)),
        _ => Err(format!("the URL of '{name}' is not a string")),
    };
    json_object(value)?.into_iter().map(entry).collect()
}

/// A lease that no setting allows would hold a promotion up.
fn router(value: &[u8]) -> Result<RouterRecord, Malformed> {
    let map = json_object(value)?;
    let number = |field: &str| map.get(field).and_then(lenient_u64).ok_or(format!("{field} is not a number"));
    Ok(RouterRecord {
        name: map.get("name").and_then(Value::as_str).unwrap_or("unknown").to_owned(),
        lease: Duration::from_secs(number("lease")?.min(MAX_ROUTER_LEASE.unsigned_abs())),
        epoch: Revision(i64::try_from(number("epoch")?).map_err(|e| e.to_string())?),
    })
}

fn json(value: &[u8]) -> Result<Value, Malformed> {
    serde_json::from_slice(value).map_err(|e| format!("not JSON: {e}"))
}

fn json_object(value: &[u8]) -> Result<Map<String, Value>, Malformed> {
    match json(value)? {
        Value::Object(map) => Ok(map),
        _ => Err("not a JSON object".to_owned()),
    }
}

/// A non-negative integer, as number or as text.
fn lenient_u64(value: &Value) -> Option<u64> {
    match value {
        Value::Number(number) => {
            number.as_u64().or_else(|| number.as_f64().filter(|f| (0.0..9e15).contains(f)).map(|f| f.round() as u64))
        }
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    }
}

fn lenient_timeline(value: &Value) -> Option<TimelineId> {
    lenient_u64(value).and_then(|n| u32::try_from(n).ok()).map(TimelineId)
}

#[cfg(test)]
mod tests;
