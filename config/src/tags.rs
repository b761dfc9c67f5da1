//! The meaning of a member's tags (Patroni's `tags.py`).

use serde_json::{Map, Value};

/// Python's truthiness: what Patroni makes of a boolean tag. The string `"false"` is true.
pub fn truthy(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(b) => *b,
        Value::Number(n) => n.as_f64() != Some(0.0),
        Value::String(s) => !s.is_empty(),
        Value::Array(a) => !a.is_empty(),
        Value::Object(o) => !o.is_empty(),
    }
}

/// A tag's value as text, for comparing: `true`, `1`, `a`. `None` for lists, sections and null.
pub fn text(value: &Value) -> Option<String> {
    match value {
        Value::Null | Value::Array(_) | Value::Object(_) => None,
        Value::String(text) => Some(text.clone()),
        Value::Bool(_) | Value::Number(_) => Some(value.to_string()),
    }
}

/// The effective failover priority: 0 = never leader. `nofailover`, where present, wins over `failover_priority`.
pub fn failover_priority(tags: &Map<String, Value>) -> i64 {
    priority(tags, "nofailover", "failover_priority")
}

/// The effective synchronous priority: 0 = never synchronous.
pub fn sync_priority(tags: &Map<String, Value>) -> i64 {
    priority(tags, "nosync", "sync_priority")
}

fn priority(tags: &Map<String, Value>, never: &str, priority: &str) -> i64 {
    let number = |value: &Value| match value {
        Value::Number(n) => n.as_i64(),
        Value::String(s) => s.trim().parse().ok(),
        Value::Bool(b) => Some(i64::from(*b)),
        _ => None,
    };
    match tags.get(never) {
        Some(never) if truthy(never) => 0,
        Some(Value::Null) | None => tags.get(priority).and_then(number).unwrap_or(1),
        // An explicit "no" beats a priority of 0 (Patroni warns about the conflict and keeps the boolean).
        Some(_) => tags.get(priority).and_then(number).filter(|p| *p > 0).unwrap_or(1),
    }
}

/// The tags a member publishes: Patroni drops falsy standard tags, but keeps a falsy `nofailover` beside
/// `failover_priority` and a falsy `nosync` beside `sync_priority`.
pub fn published(tags: &Map<String, Value>) -> Map<String, Value> {
    let kept = |(tag, value): (&String, &Value)| {
        let keep = match tag.as_str() {
            "clonefrom" | "noloadbalance" | "nostream" => truthy(value),
            "nofailover" => truthy(value) || tags.contains_key("failover_priority"),
            "nosync" => truthy(value) || tags.contains_key("sync_priority"),
            _ => true,
        };
        keep.then(|| (tag.clone(), value.clone()))
    };
    tags.iter().filter_map(kept).collect()
}
