//! YAML as patronictl prints it: PyYAML's block style folded at 200 columns, and its flow style.

use serde_json::Value;
use trunkline_config::yaml::to_yaml;

/// Where PyYAML begins to look for a space to break a line at.
const WIDTH: usize = 200;

/// A document in block style, with a line feed at its end.
pub(super) fn document(value: &Value) -> String {
    let text = to_yaml(value);
    if text.lines().all(|line| line.len() <= WIDTH) {
        return text;
    }
    text.lines().map(|line| fold(line) + "\n").collect()
}

/// Breaks a long line at the first single space beyond [`WIDTH`], and what follows again. Texts in double quotes stay
/// whole: there a break would need an escape.
fn fold(line: &str) -> String {
    let (indent, text) = scalar_of(line);
    if text.starts_with('"') {
        return line.to_owned();
    }
    let chars: Vec<char> = line.chars().collect();
    let is_space = |at: usize| chars.get(at) == Some(&' ');
    let (mut out, mut column) = (String::new(), 0);
    for (at, c) in chars.iter().enumerate() {
        // Not the last space of a quoted text: it would be lost.
        let breaks = at > 0 && is_space(at) && !is_space(at - 1) && !is_space(at + 1) && at + 2 < chars.len();
        if breaks && column > WIDTH {
            out.push('\n');
            out.push_str(&" ".repeat(indent));
            column = indent;
        } else {
            out.push(*c);
            column += 1;
        }
    }
    out
}

/// How far continued lines are indented, and the scalar that a line ends with.
fn scalar_of(line: &str) -> (usize, &str) {
    let mut rest = line.trim_start_matches(' ');
    while let Some(item) = rest.strip_prefix("- ") {
        rest = item;
    }
    let indent = line.len() - rest.len();
    let value = match rest.chars().next() {
        Some(quote @ ('\'' | '"')) => rest[1..].split_once(&format!("{quote}: ")).map(|(_, value)| value),
        _ => rest.split_once(": ").map(|(_, value)| value),
    };
    match value {
        Some(value) => (indent + 2, value),
        None => (indent.max(2), rest),
    }
}

/// YAML on one line, keys sorted: `{a: 1, b: [x, y]}`.
pub(super) fn flow(value: &Value) -> String {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<_> = map.iter().collect();
            entries.sort_by_key(|(key, _)| *key);
            let pair = |(key, value): (&String, &Value)| format!("{}: {}", flow_scalar(key), flow(value));
            format!("{{{}}}", entries.into_iter().map(pair).collect::<Vec<_>>().join(", "))
        }
        Value::Array(items) => format!("[{}]", items.iter().map(flow).collect::<Vec<_>>().join(", ")),
        Value::String(text) => flow_scalar(text),
        scalar => block_scalar(scalar),
    }
}

/// Between brackets, more characters have a meaning than in block style.
fn flow_scalar(text: &str) -> String {
    let block = block_scalar(&Value::from(text));
    let is_plain = block == text;
    if is_plain && text.contains(['[', ']', '{', '}', ',', ':', '?']) { format!("'{text}'") } else { block }
}

fn block_scalar(value: &Value) -> String {
    let text = to_yaml(value);
    text.strip_suffix("\n...\n").unwrap_or(&text).trim_end_matches('\n').to_owned()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// The expected breaks are PyYAML 6.0.3's.
    #[test]
    fn long_texts_are_folded() {
        let word = "x".repeat(99);
        let long = format!("{word} {word} {word}  {word} {word}");
        let quoted = format!("a: {word} {word} it's {word} {word}");
        let value = json!({"m": {"plain": long, "quoted": quoted}, "l": [long]});
        let expected = format!(
            "l:\n- {word} {word}\n  {word}  {word}\n  {word}\nm:\n  plain: {word} {word}\n    {word}  {word}\n    {word}\n  \
             quoted: 'a: {word} {word}\n    it''s {word} {word}'\n"
        );
        assert_eq!(document(&value), expected);
    }

    #[test]
    fn flow_style_quotes_what_has_a_meaning_there() {
        let table = [
            (json!({"note": "a: b", "x": [1, 2]}), "{note: 'a: b', x: [1, 2]}"),
            (json!({"a": "b,c", "d": "e[f]"}), "{a: 'b,c', d: 'e[f]'}"),
            (json!({"a": "on", "b": true, "c": null}), "{a: 'on', b: true, c: null}"),
            (json!({}), "{}"),
        ];
        for (value, expected) in table {
            assert_eq!(flow(&value), expected);
        }
    }
}
