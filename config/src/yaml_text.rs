//! JSON values to YAML text in the style of PyYAML's `safe_dump(default_flow_style=False, allow_unicode=True)`, which
//! `patronictl show-config` prints: block style, sorted keys, lists not indented, quotes only where needed. Unlike it, long
//! lines are not folded.

use std::fmt::Write;

use serde_json::{Map, Number, Value};

use crate::yaml_scalar::{Kind, kind};

/// Writes one document, with a line feed at its end.
pub fn to_yaml(value: &Value) -> String {
    let mut out = String::new();
    match value {
        Value::Object(map) if !map.is_empty() => write_map(&mut out, map, 0),
        Value::Array(items) if !items.is_empty() => write_list(&mut out, items, 0),
        Value::Object(_) => out.push_str("{}\n"),
        Value::Array(_) => out.push_str("[]\n"),
        scalar => {
            let text = write_scalar(scalar, 2);
            out.push_str(&text);
            // PyYAML ends a plain scalar document explicitly.
            out.push_str(if text.starts_with(['\'', '"']) { "\n" } else { "\n...\n" });
        }
    }
    out
}

/// Each entry on a line of its own; the cursor is already at the column for the first one.
fn write_map(out: &mut String, map: &Map<String, Value>, indent: usize) {
    let mut entries: Vec<_> = map.iter().collect();
    entries.sort_by_key(|(key, _)| *key);
    for (position, (key, value)) in entries.into_iter().enumerate() {
        if position > 0 {
            push_spaces(out, indent);
        }
        out.push_str(&write_key(key));
        out.push(':');
        match value {
            Value::Object(inner) if !inner.is_empty() => {
                out.push('\n');
                push_spaces(out, indent + 2);
                write_map(out, inner, indent + 2);
            }
            Value::Array(items) if !items.is_empty() => {
                out.push('\n');
                push_spaces(out, indent);
                write_list(out, items, indent);
            }
            other => {
                out.push(' ');
                out.push_str(&write_leaf(other, indent + 2));
                out.push('\n');
            }
        }
    }
}

fn write_list(out: &mut String, items: &[Value], indent: usize) {
    for (position, item) in items.iter().enumerate() {
        if position > 0 {
            push_spaces(out, indent);
        }
        out.push_str("- ");
        match item {
            Value::Object(inner) if !inner.is_empty() => write_map(out, inner, indent + 2),
            Value::Array(inner) if !inner.is_empty() => write_list(out, inner, indent + 2),
            other => {
                out.push_str(&write_leaf(other, indent + 2));
                out.push('\n');
            }
        }
    }
}

fn write_leaf(value: &Value, indent: usize) -> String {
    match value {
        Value::Object(_) => "{}".to_owned(),
        Value::Array(_) => "[]".to_owned(),
        scalar => write_scalar(scalar, indent),
    }
}

fn write_scalar(value: &Value, indent: usize) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(value) => value.to_string(),
        Value::Number(number) => write_number(number),
        Value::String(text) => write_text(text, indent),
        Value::Array(_) | Value::Object(_) => String::new(),
    }
}

/// Python's spelling of a float has a point and a signed exponent, or else it reads back as text.
fn write_number(number: &Number) -> String {
    let text = number.to_string();
    let Some(at) = text.find(['e', 'E']) else { return text };
    let (digits, exponent) = (&text[..at], &text[at + 1..]);
    let point = if digits.contains('.') { "" } else { ".0" };
    let (sign, exponent) = match exponent.strip_prefix('-') {
        Some(rest) => ('-', rest),
        None => ('+', exponent.trim_start_matches('+')),
    };
    format!("{digits}{point}e{sign}{exponent:0>2}")
}

fn write_key(key: &str) -> String {
    // A key stays on one line.
    if key.contains(is_break) { double_quoted(key) } else { write_text(key, 0) }
}

fn write_text(text: &str, indent: usize) -> String {
    let style = style(text);
    match style {
        Style::Plain => text.to_owned(),
        Style::Single => single_quoted(text, indent),
        Style::Double => double_quoted(text),
    }
}

enum Style {
    Plain,
    Single,
    Double,
}

fn is_break(c: char) -> bool {
    matches!(c, '\n' | '\u{85}' | '\u{2028}' | '\u{2029}')
}

fn is_printable(c: char) -> bool {
    matches!(c, '\n' | ' '..='~' | '\u{a0}'..='\u{d7ff}' | '\u{e000}'..='\u{fffd}' | '\u{10000}'..='\u{10ffff}')
        && !matches!(c, '\u{feff}' | '\u{2028}' | '\u{2029}')
}

fn style(text: &str) -> Style {
    // Beside a line break a space would be lost in single quotes.
    let lossy = [" \n", "\n "].iter().any(|pair| text.contains(pair));
    if lossy || !text.chars().all(is_printable) {
        return Style::Double;
    }
    if text.contains('\n') || !plain_fits(text) || kind(text) != Kind::Text { Style::Single } else { Style::Plain }
}

fn plain_fits(text: &str) -> bool {
    if text.is_empty() || text.starts_with(' ') || text.ends_with(' ') {
        return false;
    }
    if text.starts_with("---") || text.starts_with("...") {
        return false;
    }
    let mut chars = text.chars();
    let first = chars.next();
    let second_is_space = chars.next().is_none_or(|c| c == ' ');
    match first {
        Some('#' | ',' | '[' | ']' | '{' | '}' | '&' | '*' | '!' | '|' | '>' | '\'' | '"' | '%' | '@' | '`') => false,
        Some('?' | ':' | '-') if second_is_space => false,
        _ => !text.contains(": ") && !text.contains(" #") && !text.ends_with(':'),
    }
}

/// A run of line feeds is written as one more of them, as YAML folds the first.
fn single_quoted(text: &str, indent: usize) -> String {
    let mut out = String::from("'");
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\'' => out.push_str("''"),
            '\n' => {
                out.push_str("\n\n");
                while chars.next_if_eq(&'\n').is_some() {
                    out.push('\n');
                }
                push_spaces(&mut out, indent);
            }
            c => out.push(c),
        }
    }
    out.push('\'');
    out
}

fn double_quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\0' => out.push_str("\\0"),
            '\u{7}' => out.push_str("\\a"),
            '\u{8}' => out.push_str("\\b"),
            '\t' => out.push_str("\\t"),
            '\n' => out.push_str("\\n"),
            '\u{b}' => out.push_str("\\v"),
            '\u{c}' => out.push_str("\\f"),
            '\r' => out.push_str("\\r"),
            '\u{1b}' => out.push_str("\\e"),
            '\u{85}' => out.push_str("\\N"),
            '\u{2028}' => out.push_str("\\L"),
            '\u{2029}' => out.push_str("\\P"),
            // PyYAML takes no character beyond 16 bits as it is here.
            c if is_printable(c) && c <= '\u{ffff}' => out.push(c),
            c => push_escape(&mut out, u32::from(c)),
        }
    }
    out.push('"');
    out
}

fn push_escape(out: &mut String, code: u32) {
    // Writing to a String cannot fail.
    let _ = match code {
        0..=0xff => write!(out, "\\x{code:02X}"),
        0x100..=0xffff => write!(out, "\\u{code:04X}"),
        _ => write!(out, "\\U{code:08X}"),
    };
}

fn push_spaces(out: &mut String, count: usize) {
    out.extend(std::iter::repeat_n(' ', count));
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// The expected texts are PyYAML 6.0.3's.
    #[test]
    fn style_is_pyyamls() {
        let value = json!({
            "ttl": 30, "loop_wait": 10, "synchronous_mode": true, "empty": {}, "none": null, "list": [],
            "postgresql": {"parameters": {"max_connections": 100, "wal_level": "logical", "on": "on", "mode": "0700"},
                           "pg_hba": ["host all all 0.0.0.0/0 md5", "local all all trust"]},
            "slots": [{"b": 1, "a": "x: y"}, ["p", ["q"]], "it's", "# no", "a\nb", " x", "tab\t", "1e3", "y", ""],
            "float": 0.000001,
        });
        let expected = "\
empty: {}
float: 1.0e-06
list: []
loop_wait: 10
none: null
postgresql:
  parameters:
    max_connections: 100
    mode: '0700'
    'on': 'on'
    wal_level: logical
  pg_hba:
  - host all all 0.0.0.0/0 md5
  - local all all trust
slots:
- a: 'x: y'
  b: 1
- - p
  - - q
- it's
- '# no'
- 'a

  b'
- ' x'
- \"tab\\t\"
- 1e3
- y
- ''
synchronous_mode: true
ttl: 30
";
        assert_eq!(to_yaml(&value), expected);
    }

    #[test]
    fn documents_that_are_no_map() {
        for (value, expected) in [
            (json!({}), "{}\n"),
            (json!([]), "[]\n"),
            (json!(1), "1\n...\n"),
            (json!("on"), "'on'\n"),
            (json!([1]), "- 1\n"),
        ] {
            assert_eq!(to_yaml(&value), expected);
        }
    }
}
