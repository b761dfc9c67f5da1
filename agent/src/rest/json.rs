//! Values as Python prints them, where Patroni's API depends on it.

use serde_json::Value;

/// `str(value)` of the Python object that `json.loads` makes of `value`: what Patroni compares settings by.
pub(crate) fn python_str(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => python_repr(other),
    }
}

/// `repr(value)`, as it shows inside of lists and maps.
pub(crate) fn python_repr(value: &Value) -> String {
    match value {
        Value::Null => "None".to_owned(),
        Value::Bool(true) => "True".to_owned(),
        Value::Bool(false) => "False".to_owned(),
        Value::Number(number) => number.to_string(),
        Value::String(text) => quoted(text),
        Value::Array(items) => format!("[{}]", items.iter().map(python_repr).collect::<Vec<_>>().join(", ")),
        Value::Object(map) => {
            let pair = |(key, value): (&String, &Value)| format!("{}: {}", quoted(key), python_repr(value));
            format!("{{{}}}", map.iter().map(pair).collect::<Vec<_>>().join(", "))
        }
    }
}

/// `repr(text)`.
pub(crate) fn quoted(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => out.extend(['\\', c]),
            c => out.push(c),
        }
    }
    out.push(quote);
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn text_is_pythons() {
        let table = [
            (json!("a"), "a"),
            (json!(true), "True"),
            (json!(null), "None"),
            (json!(20), "20"),
            (json!(1.5), "1.5"),
            (json!(["a", 1, "it's"]), r#"['a', 1, "it's"]"#),
            (json!({"new_tag": "new_value"}), "{'new_tag': 'new_value'}"),
        ];
        for (value, text) in table {
            assert_eq!(python_str(&value), text);
        }
    }
}
