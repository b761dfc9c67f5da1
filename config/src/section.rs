//! Reading a section of a document: typed values, with every wrong one reported and then treated as absent.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Map, Value};

use crate::report::Report;
use crate::{Secret, address, guc, units};

/// One map of the document, its path, and where to complain. A null value counts as absent, as an empty YAML section is null.
#[derive(Clone)]
pub(crate) struct Section<'a> {
    map: &'a Map<String, Value>,
    path: String,
    report: &'a Report,
}

impl<'a> Section<'a> {
    pub fn root(map: &'a Map<String, Value>, report: &'a Report) -> Self {
        Self { map, path: String::new(), report }
    }

    pub fn at(map: &'a Map<String, Value>, path: impl Into<String>, report: &'a Report) -> Self {
        Self { map, path: path.into(), report }
    }

    pub fn map(&self) -> &'a Map<String, Value> {
        self.map
    }

    pub fn report(&self) -> &'a Report {
        self.report
    }

    /// The full path of a key of this section.
    pub fn path(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    pub fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    pub fn section(&self, key: &str) -> Option<Section<'a>> {
        match self.get(key)? {
            Value::Object(map) => Some(Section { map, path: self.path(key), report: self.report }),
            _ => self.wrong(key, "a section (key: value) is expected"),
        }
    }

    /// The map of a sub-section as it stands; empty where there is none.
    pub fn copy(&self, key: &str) -> Map<String, Value> {
        self.section(key).map(|section| section.map.clone()).unwrap_or_default()
    }

    pub fn text(&self, key: &str) -> Option<String> {
        match self.get(key)? {
            Value::String(text) => Some(text.clone()),
            Value::Number(number) => Some(number.to_string()),
            _ => self.wrong(key, "a text is expected"),
        }
    }

    /// A text that is not empty.
    pub fn name(&self, key: &str) -> Option<String> {
        let text = self.text(key)?;
        if text.trim().is_empty() {
            return self.wrong(key, "must not be empty");
        }
        Some(text)
    }

    pub fn file(&self, key: &str) -> Option<PathBuf> {
        self.text(key).filter(|text| !text.is_empty()).map(PathBuf::from)
    }

    pub fn boolean(&self, key: &str) -> Option<bool> {
        let value = self.get(key)?;
        let parsed = match value {
            Value::Bool(value) => Some(*value),
            Value::String(text) => guc::parse_bool(text),
            Value::Number(number) => guc::parse_bool(&number.to_string()),
            _ => None,
        };
        parsed.or_else(|| self.wrong(key, "on, off, true, false, yes or no is expected"))
    }

    /// A whole number, as number or text; `unit` allows that unit and its relatives (`s`, `B`).
    pub fn integer(&self, key: &str, allowed: RangeInclusive<i64>, unit: Option<&str>) -> Option<i64> {
        let number = match self.get(key)? {
            Value::Number(number) => guc::parse_int(&number.to_string(), unit),
            Value::String(text) => guc::parse_int(text, unit),
            _ => None,
        };
        match number {
            Some(number) if allowed.contains(&number) => Some(number),
            _ => self.wrong(key, range_text(&allowed)),
        }
    }

    pub fn seconds(&self, key: &str, allowed: RangeInclusive<i64>, unit: Option<&str>) -> Option<Duration> {
        self.integer(key, allowed, unit).map(|seconds| Duration::from_secs(seconds.unsigned_abs()))
    }

    /// `500ms`, `5s`, `1min`, `2h`, or a plain number of seconds.
    pub fn duration(&self, key: &str) -> Option<Duration> {
        let parsed = match self.get(key)? {
            Value::Number(number) => units::parse_duration(&number.to_string()),
            Value::String(text) => units::parse_duration(text),
            _ => None,
        };
        parsed.or_else(|| self.wrong(key, "a duration is expected: 500ms, 5s, 1min, 2h or a number of seconds"))
    }

    /// A duration that is not zero: where a zero would refuse everybody.
    pub fn some_time(&self, key: &str) -> Option<Duration> {
        match self.duration(key) {
            Some(Duration::ZERO) => self.wrong(key, "must be longer than 0"),
            time => time,
        }
    }

    /// Bytes: a plain number, or one with kB, MB, GB or TB.
    pub fn bytes(&self, key: &str) -> Option<u64> {
        let parsed = match self.get(key)? {
            Value::Number(number) => units::parse_bytes(&number.to_string()),
            Value::String(text) => units::parse_bytes(text),
            _ => None,
        };
        parsed.or_else(|| self.wrong(key, "a size is expected: bytes, or a number with kB, MB, GB or TB"))
    }

    /// One of some words, in any case.
    pub fn choice<T: Copy>(&self, key: &str, words: &[(&str, T)]) -> Option<T> {
        let text = match self.get(key)? {
            Value::String(text) => text.to_lowercase(),
            Value::Bool(value) => if *value { "on" } else { "off" }.to_owned(),
            Value::Number(number) => number.to_string(),
            _ => String::new(),
        };
        if let Some((_, value)) = words.iter().find(|(word, _)| *word == text) {
            return Some(*value);
        }
        let names: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
        self.wrong(key, format!("one of {} is expected", names.join(", ")))
    }

    /// Texts: a list, or one text.
    pub fn lines(&self, key: &str) -> Option<Vec<String>> {
        let items = match self.get(key)? {
            Value::Array(items) => items.as_slice(),
            single => std::slice::from_ref(single),
        };
        let mut lines = Vec::with_capacity(items.len());
        for item in items {
            match item {
                Value::String(text) => lines.push(text.clone()),
                Value::Number(number) => lines.push(number.to_string()),
                _ => return self.wrong(key, "a list of texts is expected"),
            }
        }
        Some(lines)
    }

    /// `host:port`; both are needed. Brackets around an IPv6 address.
    pub fn address(&self, key: &str) -> Option<String> {
        let text = self.text(key)?;
        match address::split(&text, None) {
            Ok(_) => Some(text),
            Err(expected) => self.wrong(key, expected),
        }
    }

    /// `authentication` of an HTTP API: both or nothing.
    pub fn user_and_password(&self, key: &str) -> Option<(String, Secret)> {
        let section = self.section(key)?;
        match (section.text("username"), section.text("password")) {
            (Some(user), Some(password)) => Some((user, Secret::new(password))),
            (None, None) => None,
            (Some(_), None) => section.missing("password", "a password belongs to the user name", None),
            (None, Some(_)) => section.missing("username", "a user name belongs to the password", None),
        }
    }

    pub fn headers(&self, key: &str) -> Vec<(String, String)> {
        let Some(section) = self.section(key) else { return Vec::new() };
        let header = |name: &String| section.text(name).map(|value| (name.clone(), value));
        section.map.keys().filter_map(header).collect()
    }

    /// Reports the value of `key`; always `None`, so that it can stand for the value.
    pub fn wrong<T>(&self, key: &str, expected: impl Into<String>) -> Option<T> {
        self.wrong_with(key, expected, None)
    }

    pub fn wrong_with<T>(&self, key: &str, expected: impl Into<String>, remedy: Option<&str>) -> Option<T> {
        let value = self.map.get(key).map(|value| shown(key, value));
        self.report.problem(&self.path(key), value, expected, remedy.map(str::to_owned));
        None
    }

    pub fn missing<T>(&self, key: &str, expected: &str, remedy: Option<&str>) -> Option<T> {
        let expected = format!("missing: {expected}");
        self.report.problem(&self.path(key), None, expected, remedy.map(str::to_owned));
        None
    }

    pub fn notice(&self, key: &str, message: impl Into<String>) {
        self.report.notice(&self.path(key), message);
    }

    /// A notice for every key that has no meaning, with the nearest that has one.
    pub fn unknown(&self, known: &[&str]) {
        for key in self.map.keys().filter(|key| !known.contains(&key.as_str())) {
            let message = match nearest(key, known) {
                Some(near) => format!("unknown key, ignored; {near} was meant?"),
                None => "unknown key, ignored".to_owned(),
            };
            self.notice(key, message);
        }
    }
}

/// A value for a message: JSON, cut short, and nothing of a secret.
pub(crate) fn shown(key: &str, value: &Value) -> String {
    if key.contains("password") {
        return "***".to_owned();
    }
    let text = match value {
        Value::Object(_) => "{…}".to_owned(),
        other => masked_url(&other.to_string()),
    };
    if text.chars().count() > 80 { text.chars().take(79).chain(['…']).collect() } else { text }
}

/// Hides what stands between `://` and `@`.
pub(crate) fn masked_url(text: &str) -> String {
    match (text.find("://"), text.rfind('@')) {
        (Some(from), Some(to)) if from + 3 < to => format!("{}***{}", &text[..from + 3], &text[to..]),
        _ => text.to_owned(),
    }
}

fn range_text(allowed: &RangeInclusive<i64>) -> String {
    match (*allowed.start(), *allowed.end()) {
        (i64::MIN, i64::MAX) => "a whole number is expected".to_owned(),
        (i64::MIN, to) => format!("a whole number of at most {to} is expected"),
        (from, i64::MAX) => format!("a whole number of at least {from} is expected"),
        (from, to) => format!("a whole number from {from} to {to} is expected"),
    }
}

/// The known key that is at most two typing mistakes away.
fn nearest<'k>(key: &str, known: &[&'k str]) -> Option<&'k str> {
    let key = key.to_lowercase();
    if key.len() > 64 {
        return None;
    }
    let within = if key.len() < 5 { 1 } else { 2 };
    known
        .iter()
        .map(|known| (distance(&key, known), *known))
        .filter(|(d, _)| *d <= within)
        .min()
        .map(|(_, known)| known)
}

/// Levenshtein distance over bytes.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let replace = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replace.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_keys_are_found() {
        let known = ["hold_timeout", "max_held", "ttl"];
        assert_eq!(nearest("hold_timout", &known), Some("hold_timeout"));
        assert_eq!(nearest("Max_Held", &known), Some("max_held"));
        assert_eq!(nearest("tags", &["ttl"]), None);
        assert_eq!(nearest("ttll", &["ttl"]), Some("ttl"));
        assert_eq!(nearest("something", &known), None);
        assert_eq!(nearest(&"é".repeat(500), &known), None);
    }

    #[test]
    fn secrets_are_not_shown() {
        assert_eq!(shown("keyfile_password", &Value::from("x")), "***");
        assert_eq!(shown("url", &Value::from("http://u:p@h:1")), "\"http://***@h:1\"");
        assert_eq!(shown("listen", &Value::from("x")), "\"x\"");
    }
}
