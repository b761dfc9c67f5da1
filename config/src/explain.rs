//! Why a setting is what it is: which layer wins, what the others say, and why an edit of one of them has no effect. Pure.
//!
//! The layers of a node are its files, the environment and the dynamic configuration; over them stands what Trunkline sets
//! itself, under them the defaults of Patroni and of PostgreSQL.

use std::path::PathBuf;

use serde_json::{Map, Value, json};

use crate::dynamic::{self, Settings, SynchronousMode};
use crate::local::{self, Local, is_read_at_start};
use crate::postgres::{self, PostgresConfig};
use crate::report::Notice;
use crate::{Env, document, guc, protected, section};

/// Where a node's own configuration is read from.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// The file or directory.
    pub path: Option<PathBuf>,
    /// The environment.
    pub env: Env,
}

impl Sources {
    /// Reads it as it is now, layer by layer, the lowest first.
    pub fn layers(&self) -> Vec<Layer> {
        document::layers(self.path.as_deref(), &self.env)
    }
}

/// A file, or the environment.
#[derive(Debug, Clone, PartialEq)]
pub struct Layer {
    /// `file /etc/patroni.yml`, `environment`.
    pub name: String,
    /// What it says.
    pub map: Map<String, Value>,
}

/// What an answer depends on.
#[derive(Debug, Clone, Copy)]
pub struct Node<'a> {
    /// The node's own configuration as it can be read now; `None`: not known.
    pub layers: Option<&'a [Layer]>,
    /// The same as the agent goes by.
    pub loaded: Option<&'a Local>,
    /// The dynamic configuration; `None`: there is none.
    pub dynamic: Option<&'a Value>,
    /// What the node goes by, also where a value there can't be used; `None`: not known.
    pub in_force: Option<&'a Settings>,
    /// `primary`, `replica` or `standby_leader`.
    pub role: &'a str,
}

/// The answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Explanation {
    /// The full path of the setting.
    pub key: String,
    /// The value in force, as far as Trunkline knows; passwords are masked.
    pub value: Option<String>,
    /// What has set it.
    pub from: String,
    /// What each layer says and what becomes of it, the one that wins first.
    pub layers: Vec<Line>,
    /// What else there is to know.
    pub notes: Vec<String>,
}

/// One layer of an [`Explanation`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// Which one.
    pub layer: String,
    /// What it says.
    pub value: String,
    /// What becomes of it.
    pub verdict: String,
}

impl Explanation {
    /// As REST answers it.
    pub fn document(&self) -> Value {
        let line = |line: &Line| json!({"layer": line.layer, "value": line.value, "verdict": line.verdict});
        json!({
            "key": self.key,
            "value": self.value,
            "from": self.from,
            "layers": self.layers.iter().map(line).collect::<Vec<_>>(),
            "notes": self.notes,
        })
    }
}

/// The parameter of PostgreSQL that `key` names, if it does.
pub fn parameter(key: &str) -> Option<String> {
    match place(key) {
        Place::Parameter(name) => Some(name),
        _ => None,
    }
}

/// Explains `key`: a dotted path (`ttl`, `restapi.listen`, `postgresql.parameters.work_mem`), or the bare name of a parameter of
/// PostgreSQL.
pub fn explain(key: &str, node: &Node<'_>) -> Explanation {
    let (dynamic, default) = (node.dynamic.unwrap_or(&Value::Null), Settings::default());
    let (settings, notices) = Settings::after(dynamic, node.in_force.unwrap_or(&default));
    let look = Look { node, settings: &settings };
    let mut told = match place(key) {
        Place::Dynamic(path) => look.dynamic(&path),
        Place::Parameter(name) if name == key.to_lowercase() && look.is_said(key) => look.unknown(key),
        Place::Parameter(name) => look.parameter(&name),
        Place::Postgresql(path) => look.postgresql(&path),
        Place::Local(path) => look.local(&path),
    };
    if key.starts_with("bootstrap.dcs.") {
        told.notes
            .insert(0, "bootstrap.dcs is read once, when a new cluster is made; from then on edit-config".to_owned());
    }
    let below = format!("{}.", told.key);
    let concerns = |notice: &Notice| notice.path == told.key || notice.path.starts_with(&below);
    let mut notices: Vec<_> = notices.into_iter().filter(concerns).collect();
    if let Some(loaded) = node.loaded {
        notices.extend(PostgresConfig::effective(loaded, &settings).1.into_iter().filter(|n| n.path == told.key));
    }
    for notice in notices {
        let inner = notice.path.strip_prefix(&below).map(|inner| format!("{inner}: ")).unwrap_or_default();
        let text = format!("{}: {inner}{}", notice.source, notice.message);
        if !told.notes.contains(&text) {
            told.notes.push(text);
        }
    }
    told
}

/// Where a setting belongs.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    /// To the cluster.
    Dynamic(String),
    /// To PostgreSQL: the parameter of this name.
    Parameter(String),
    /// To the section `postgresql`, in both.
    Postgresql(String),
    /// To the node.
    Local(String),
}

fn place(key: &str) -> Place {
    let key = key.trim().trim_matches('.');
    let key = key.strip_prefix("bootstrap.dcs.").unwrap_or(key);
    if let Some(rest) = key.strip_prefix("postgresql.") {
        let in_parameters = rest.strip_prefix("parameters").and_then(|rest| rest.split_once('.'));
        return match in_parameters {
            Some((role, name)) if role.is_empty() || role.starts_with('_') => Place::Parameter(name.to_lowercase()),
            _ => Place::Postgresql(rest.to_owned()),
        };
    }
    if let Some(name) = key.strip_prefix("parameters.") {
        return Place::Parameter(name.to_lowercase());
    }
    let first = key.split('.').next().unwrap_or_default();
    if dynamic::KNOWN.contains(&first) && first != "postgresql" {
        return Place::Dynamic(key.to_owned());
    }
    if local::KNOWN.contains(&first) {
        return Place::Local(key.to_owned());
    }
    if postgres::KNOWN.contains(&first) && first != "name" {
        return Place::Postgresql(key.to_owned());
    }
    Place::Parameter(key.to_lowercase())
}

const DYNAMIC: &str = "dynamic configuration";
/// The verdict on the layer that wins.
pub const IN_FORCE: &str = "in force";
const DYNAMIC_ONLY: &str =
    "no effect: only the dynamic configuration sets it, so that all members agree (trunklinectl edit-config)";

struct Look<'a> {
    node: &'a Node<'a>,
    settings: &'a Settings,
}

impl Look<'_> {
    /// What the node's own layers say, the highest first.
    fn locally(&self, path: &str) -> Vec<(String, Value)> {
        let layers = self.node.layers.unwrap_or_default().iter().rev();
        layers.filter_map(|layer| Some((layer.name.clone(), get(&layer.map, path)?.clone()))).collect()
    }

    fn in_dcs(&self, path: &str) -> Option<&Value> {
        get(self.node.dynamic?.as_object()?, path)
    }

    /// Adds what has come to nothing for the same reason.
    fn ignored(&self, told: &mut Explanation, path: &str, verdict: &str) {
        for (name, value) in self.locally(path) {
            told.line(&name, path, &value, verdict);
        }
    }

    /// Whether a layer has it at the top, where no parameter of PostgreSQL stands.
    fn is_said(&self, key: &str) -> bool {
        self.in_dcs(key).is_some() || !self.locally(key).is_empty()
    }

    /// No setting has this name, and it is given.
    fn unknown(&self, key: &str) -> Explanation {
        const VERDICT: &str = "no effect: there is no such setting";
        let mut told = Explanation::new(key);
        told.from = "anything: no setting has this name".to_owned();
        self.ignored(&mut told, key, VERDICT);
        if let Some(value) = self.in_dcs(key) {
            told.line(DYNAMIC, key, value, VERDICT);
        }
        told
    }

    fn effective(&self) -> Option<PostgresConfig> {
        Some(PostgresConfig::effective(self.node.loaded?, self.settings).0)
    }

    fn dynamic(&self, path: &str) -> Explanation {
        let mut told = Explanation::new(path);
        let first = path.split('.').next().unwrap_or_default();
        let nested = first != path;
        let default = if nested { None } else { self.typed(&Settings::default(), first) };
        told.value = if nested { self.in_dcs(path).map(|v| shown(path, v)) } else { self.typed(self.settings, first) };
        match self.in_dcs(path) {
            Some(value) => {
                let given = shown(path, value);
                told.from = DYNAMIC.to_owned();
                let unusable = nested && self.refused(path);
                told.value = told.value.filter(|_| !unusable);
                let verdict = match &told.value {
                    Some(used) if nested || same(&given, used) => IN_FORCE.to_owned(),
                    Some(used) if self.refused(first) => format!("can't be used; {used} is in force"),
                    Some(used) => format!("adjusted to {used}"),
                    None => "can't be used".to_owned(),
                };
                told.layers.push(Line { layer: DYNAMIC.to_owned(), value: given, verdict });
            }
            None => {
                told.from = "Patroni's default".to_owned();
                if told.value != default {
                    told.notes.push(format!(
                        "adjusted to {}, which fits the others",
                        told.value.as_deref().unwrap_or("nothing")
                    ));
                }
            }
        }
        if let Some(default) = default {
            let wins = self.in_dcs(path).is_none();
            let verdict = if wins { IN_FORCE } else { "the dynamic configuration says otherwise" };
            told.layers.push(Line {
                layer: "Patroni's default".to_owned(),
                value: default,
                verdict: verdict.to_owned(),
            });
        }
        self.ignored(&mut told, path, "no effect: it belongs to the dynamic configuration (trunklinectl edit-config)");
        for (name, value) in self.locally(&format!("bootstrap.dcs.{path}")) {
            let verdict = "no effect: it is the first value of a new cluster, which this one is not any more";
            told.line(&format!("{name}, bootstrap.dcs"), path, &value, verdict);
        }
        if let Some(new) = path.strip_prefix("master_").map(|rest| format!("primary_{rest}"))
            && self.in_dcs(&new).is_some()
        {
            told.notes.push(format!("{new}, its present name, is given as well and wins"));
        }
        told
    }

    /// Whether the value of the dynamic configuration is none that the setting can have.
    fn refused(&self, key: &str) -> bool {
        let notices = Settings::from_value(self.node.dynamic.unwrap_or(&Value::Null)).1;
        notices.iter().any(|notice| notice.path == key && notice.message.contains("is ignored"))
    }

    /// A setting as text, in the unit of the configuration.
    fn typed(&self, settings: &Settings, key: &str) -> Option<String> {
        let seconds = |time: std::time::Duration| Some(time.as_secs_f64().to_string());
        let object =
            |map: &Map<String, Value>| Some(Value::Object(map.clone()).to_string()).filter(|_| !map.is_empty());
        let on = |on: bool| Some(if on { "on" } else { "off" }.to_owned());
        match key {
            "ttl" => seconds(settings.ttl),
            "loop_wait" => seconds(settings.loop_wait),
            "retry_timeout" => seconds(settings.retry_timeout),
            "maximum_lag_on_failover" => Some(settings.maximum_lag_on_failover.to_string()),
            "maximum_lag_on_syncnode" => {
                Some(settings.maximum_lag_on_syncnode.map_or(-1, u64::cast_signed).to_string())
            }
            "max_timelines_history" => Some(settings.max_timelines_history.to_string()),
            "primary_start_timeout" | "master_start_timeout" => seconds(settings.primary_start_timeout),
            "primary_stop_timeout" | "master_stop_timeout" => {
                seconds(settings.primary_stop_timeout.unwrap_or_default())
            }
            "switchover_grace" => seconds(settings.switchover_grace),
            "primary_race_backoff" => seconds(settings.primary_race_backoff),
            "router_lease" => seconds(settings.router_lease),
            "synchronous_mode" => Some(
                match settings.synchronous_mode {
                    SynchronousMode::Off => "off",
                    SynchronousMode::On => "on",
                    SynchronousMode::Quorum => "quorum",
                }
                .to_owned(),
            ),
            "synchronous_mode_strict" => on(settings.synchronous_mode_strict),
            "synchronous_node_count" => Some(settings.synchronous_node_count.to_string()),
            "failsafe_mode" => on(settings.failsafe_mode),
            "check_timeline" => on(settings.check_timeline),
            "pause" => on(settings.pause),
            "member_slots_ttl" => seconds(settings.member_slots_ttl),
            "slots" | "permanent_slots" | "permanent_replication_slots" => object(&settings.slots),
            "ignore_slots" => {
                Some(json!(settings.ignore_slots).to_string()).filter(|_| !settings.ignore_slots.is_empty())
            }
            "standby_cluster" => object(settings.standby_cluster.as_ref()?),
            _ => None,
        }
    }

    fn parameter(&self, name: &str) -> Explanation {
        let path = format!("postgresql.parameters.{name}");
        let mut told = Explanation::new(&path);
        let config = self.effective();
        if let Some((value, why)) = self.controlled(name, config.as_ref()) {
            told.value = value;
            told.from = "Trunkline".to_owned();
            told.notes.push(why);
            let verdict = "no effect: Trunkline sets it";
            self.ignored(&mut told, &path, verdict);
            if let Some(value) = self.in_dcs(&path) {
                told.line(DYNAMIC, &path, value, verdict);
            }
            return told;
        }
        if protected::is_protected(name) {
            return self.cluster_wide(told, name, config.as_ref());
        }
        if postgres::RECOVERY.contains(&name) {
            return self.recovery(told, name, config.as_ref());
        }
        // The highest first. The overlay for a role is taken whole from the node's own layers where they have one.
        let overlay = format!("postgresql.parameters_{}", self.node.role);
        let by_role = format!("{overlay}.{name}");
        let own_overlay = !self.locally(&overlay).is_empty();
        let mut said: Vec<(String, Value)> =
            self.locally(&by_role).into_iter().map(|(layer, value)| (format!("{layer}, {overlay}"), value)).collect();
        let mut hidden = Vec::new();
        if let Some(value) = self.in_dcs(&by_role) {
            let line = (format!("{DYNAMIC}, {overlay}"), value.clone());
            if own_overlay { hidden.push(line) } else { said.push(line) }
        }
        said.extend(self.locally(&path));
        said.extend(self.in_dcs(&path).map(|value| (DYNAMIC.to_owned(), value.clone())));
        told.settle(&path, said, "PostgreSQL's own default, or the original configuration file (postgresql.base.conf)");
        for (layer, value) in hidden {
            told.line(&layer, &path, &value, &format!("no effect: the node has a section {overlay} of its own"));
        }
        if name == "hot_standby_feedback" {
            told.notes.push("on, whatever is configured, where a logical permanent slot is kept".to_owned());
        }
        if let Some(config) = &config {
            told.value = config.parameters_for(self.node.role).get(name).cloned().or(told.value);
        }
        self.changed(&mut told, &path);
        told
    }

    /// What nobody but Trunkline sets, with the reason.
    fn controlled(&self, name: &str, config: Option<&PostgresConfig>) -> Option<(Option<String>, String)> {
        let from = |what: &str| format!("given on PostgreSQL's command line, from {what}");
        Some(match name {
            "listen_addresses" => (config.map(|c| c.listen_addresses.clone()), from("postgresql.listen")),
            "port" => (config.map(|c| c.port.to_string()), from("postgresql.listen")),
            "cluster_name" => (self.node.loaded.map(|local| local.scope.clone()), from("scope")),
            "synchronous_standby_names" if self.settings.synchronous_mode != SynchronousMode::Off => {
                (None, "set from turn to turn, as synchronous_mode is on: by what standbys there are".to_owned())
            }
            "primary_conninfo" | "primary_slot_name" | "standby_mode" | "promote_trigger_file" | "trigger_file" => {
                (None, "set by whom this member follows; for credentials see postgresql.authentication.replication".to_owned())
            }
            _ if name.starts_with("recovery_target") => {
                (None, "a standby follows the latest timeline without a target; a restore has its own in bootstrap.<method>.recovery_conf".to_owned())
            }
            _ => return None,
        })
    }

    /// Settings that standbys must have like the primary.
    fn cluster_wide(&self, mut told: Explanation, name: &str, config: Option<&PostgresConfig>) -> Explanation {
        let path = told.key.clone();
        let default = protected::default(name).unwrap_or_default().to_owned();
        let in_dcs = self.in_dcs(&path).cloned();
        let usable = in_dcs.as_ref().map(|value| protected::check(name, value));
        let used = match &usable {
            Some(Ok(text)) => text.clone(),
            _ => default.clone(),
        };
        let in_config = config.and_then(|c| c.protected.get(name).or_else(|| c.parameters.get(name)).cloned());
        told.value = Some(in_config.unwrap_or(used));
        told.from = if matches!(usable, Some(Ok(_))) { DYNAMIC } else { "Patroni's default" }.to_owned();
        if let (Some(value), Some(verdict)) = (&in_dcs, &usable) {
            let verdict = verdict.as_ref().map_or_else(|why| format!("no effect: {why}"), |_| IN_FORCE.to_owned());
            told.line(DYNAMIC, &path, value, &verdict);
        }
        let wins = !matches!(usable, Some(Ok(_)));
        let verdict = if wins { IN_FORCE } else { "the dynamic configuration says otherwise" };
        told.layers.push(Line { layer: "Patroni's default".to_owned(), value: default, verdict: verdict.to_owned() });
        self.ignored(&mut told, &path, DYNAMIC_ONLY);
        if name != "wal_keep_size" && name != "wal_keep_segments" {
            told.notes.push(
                "given on PostgreSQL's command line: a change waits for a restart, and ALTER SYSTEM has no effect"
                    .to_owned(),
            );
        }
        told
    }

    /// What PostgreSQL reads only in recovery.
    fn recovery(&self, mut told: Explanation, name: &str, config: Option<&PostgresConfig>) -> Explanation {
        let (path, section) = (told.key.clone(), format!("postgresql.recovery_conf.{name}"));
        let outside = format!("standby_cluster.{name}");
        let mut said = Vec::new();
        if let Some(value) = self.in_dcs(&outside).filter(|_| self.settings.standby_cluster.is_some()) {
            said.push((format!("{DYNAMIC}, standby_cluster"), value.clone()));
        }
        said.extend(self.locally(&path));
        said.extend(self.in_dcs(&path).map(|value| (DYNAMIC.to_owned(), value.clone())));
        let as_parameter = !said.is_empty();
        let mut sections: Vec<_> =
            self.locally(&section).into_iter().map(|(layer, v)| (format!("{layer}, recovery_conf"), v)).collect();
        sections.extend(self.in_dcs(&section).map(|v| (format!("{DYNAMIC}, recovery_conf"), v.clone())));
        if !as_parameter {
            said.append(&mut sections);
        }
        told.settle(&path, said, "PostgreSQL's own default");
        for (layer, value) in sections {
            told.line(&layer, &path, &value, "no effect: recovery settings among the parameters replace this section");
        }
        if let Some(value) = config.and_then(|config| config.recovery_conf.get(name)) {
            told.value = told.value.or_else(|| Some(value.clone()));
        }
        told.notes.push("written for standbys only".to_owned());
        self.changed(&mut told, &path);
        told
    }

    fn postgresql(&self, path: &str) -> Explanation {
        let full = format!("postgresql.{path}");
        let mut told = Explanation::new(&full);
        let first = path.split('.').next().unwrap_or_default();
        let section = format!("postgresql.{first}");
        let in_dcs = self.in_dcs(&full).map(|value| (DYNAMIC.to_owned(), value.clone()));
        if first == "use_slots" {
            told.settle(&full, in_dcs.into_iter().collect(), "Patroni's default: on");
            self.ignored(&mut told, &full, DYNAMIC_ONLY);
            return told;
        }
        let local_only = postgres::LOCAL_ONLY.contains(&first);
        let own = !self.locally(&section).is_empty();
        let mut said = self.locally(&full);
        let mut hidden = None;
        match in_dcs {
            Some(line) if local_only => {
                hidden = Some((line, "no effect: it belongs to the node's own file".to_owned()))
            }
            Some(line) if own && first != path => {
                hidden = Some((
                    line,
                    format!("no effect: the node has a section {section} of its own, which replaces this one"),
                ));
            }
            Some(line) => said.push(line),
            None => {}
        }
        told.settle(&full, said, "the default (docs/configuration.md)");
        if let Some(((layer, value), verdict)) = hidden {
            told.line(&layer, &full, &value, &verdict);
        }
        if is_read_at_start(&full) {
            told.notes.push("read at the start of the agent only".to_owned());
        }
        self.changed(&mut told, &full);
        told
    }

    fn local(&self, path: &str) -> Explanation {
        let mut told = Explanation::new(path);
        told.settle(path, self.locally(path), "the default (docs/configuration.md)");
        if let Some(value) = self.in_dcs(path) {
            told.line(DYNAMIC, path, value, "no effect: it belongs to the node's own file");
        }
        let first = path.split('.').next().unwrap_or_default();
        if is_read_at_start(path) || first == "log" && path != "log.level" {
            told.notes.push("read at the start of the agent only".to_owned());
        }
        if first == "bootstrap" {
            told.notes.push("used once, when a new cluster is made".to_owned());
        }
        self.changed(&mut told, path);
        told
    }

    /// Tells an edit that the agent has not read yet.
    fn changed(&self, told: &mut Explanation, path: &str) {
        let Some(loaded) = self.node.loaded.and_then(|local| local.raw.as_object()) else { return };
        let now = self.locally(path).into_iter().next().map(|(_, value)| value);
        let then = get(loaded, path);
        if self.node.layers.is_some() && now.as_ref() != then {
            let then = then.map_or_else(|| "nothing".to_owned(), |value| shown(path, value));
            let remedy = if is_read_at_start(path) { "restart the agent" } else { "trunklinectl reload, or SIGHUP" };
            told.notes.push(format!(
                "the node's own configuration has changed since the agent read it, which goes by {then}: {remedy}"
            ));
        }
    }
}

impl Explanation {
    fn new(path: &str) -> Self {
        Self { key: path.to_owned(), value: None, from: String::new(), layers: Vec::new(), notes: Vec::new() }
    }

    fn line(&mut self, layer: &str, path: &str, value: &Value, verdict: &str) {
        let (layer, value, verdict) = (layer.to_owned(), shown(path, value), verdict.to_owned());
        self.layers.push(Line { layer, value, verdict });
    }

    /// The first of `said` wins; without any, `otherwise` it is.
    fn settle(&mut self, path: &str, said: Vec<(String, Value)>, otherwise: &str) {
        self.from = otherwise.to_owned();
        let mut said = said.into_iter();
        if let Some((layer, value)) = said.next() {
            self.value = Some(shown(path, &value));
            self.line(&layer, path, &value, IN_FORCE);
            self.from = layer;
        }
        for (layer, value) in said {
            let verdict = format!("no effect: {} goes over it", self.from);
            self.line(&layer, path, &value, &verdict);
        }
    }
}

/// Whether what was given means what is used: units and spellings apart.
fn same(given: &str, used: &str) -> bool {
    let number = |text: &str| ["s", "B"].iter().find_map(|unit| guc::parse_int(text, Some(unit)));
    given == used
        || guc::parse_bool(given).is_some_and(|on| guc::parse_bool(used) == Some(on))
        || number(given).is_some_and(|n| number(used) == Some(n))
}

/// The value at a dotted path. Names of parameters have dots of their own, and any case.
fn get<'v>(map: &'v Map<String, Value>, path: &str) -> Option<&'v Value> {
    let Some((first, rest)) = path.split_once('.') else { return find(map, path) };
    if let Some(value) = find(map, path) {
        return Some(value);
    }
    get(map.get(first)?.as_object()?, rest)
}

fn find<'v>(map: &'v Map<String, Value>, name: &str) -> Option<&'v Value> {
    let value = map.get(name).or_else(|| map.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, v)| v));
    value.filter(|value| !value.is_null())
}

/// A value as people read it, without passwords.
fn shown(path: &str, value: &Value) -> String {
    let secret = ["password", "secret", "token"];
    let name = path.rsplit('.').next().unwrap_or_default().to_ascii_lowercase();
    match value {
        Value::Object(map) => {
            let inner = map.iter().map(|(key, value)| format!("{key}: {}", shown(key, value)));
            format!("{{{}}}", inner.collect::<Vec<_>>().join(", "))
        }
        _ if secret.iter().any(|word| name.contains(word)) => "***".to_owned(),
        Value::String(text) => section::masked_url(text),
        Value::Bool(on) => if *on { "on" } else { "off" }.to_owned(),
        other => section::masked_url(&other.to_string()),
    }
}

#[cfg(test)]
mod tests;
