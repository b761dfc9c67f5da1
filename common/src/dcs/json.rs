//! JSON as Python's `json.dumps` writes it.
//!
//! Peers compare stored values with what they would write themselves, and scripts compare REST bodies as text: so the
//! separators, the escapes and the spelling of numbers are Python's, not serde's.

use serde_json::Value;

/// `json.dumps(value, separators=(',', ':'))`: what Patroni stores in the DCS. Non-ASCII characters become `\uXXXX`.
pub fn compact(value: &Value) -> Vec<u8> {
    let mut out = String::new();
    write(&mut out, value, ",", ":");
    out.into_bytes()
}

/// `json.dumps(value)` with Python's default separators (`", "` and `": "`): what Patroni's REST API answers with.
pub fn python_json(value: &Value) -> String {
    let mut out = String::new();
    write(&mut out, value, ", ", ": ");
    out
}

/// Whether Patroni would skip a write because nothing changed (its `deep_compare`): both are objects with the same
/// keys, nested objects compare the same way, and any other two values by their text, so `1` equals `"1"`.
pub fn deep_compare(a: &Value, b: &Value) -> bool {
    let (Value::Object(a), Value::Object(b)) = (a, b) else { return text(a) == text(b) };
    let same = |(key, a): (&String, &Value)| {
        b.get(key).is_some_and(|b| match (a, b) {
            (Value::Object(_), Value::Object(_)) => deep_compare(a, b),
            (Value::Object(_), _) | (_, Value::Object(_)) => false,
            _ => text(a) == text(b),
        })
    };
    a.len() == b.len() && a.iter().all(same)
}

/// Python's `str(value)` as far as comparing goes.
fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Bool(true) => "True".to_owned(),
        Value::Bool(false) => "False".to_owned(),
        Value::Null => "None".to_owned(),
        other => python_json(other),
    }
}

fn write(out: &mut String, value: &Value, comma: &str, colon: &str) {
    match value {
        Value::Null => out.push_str("null"),
        Value::Bool(true) => out.push_str("true"),
        Value::Bool(false) => out.push_str("false"),
        Value::Number(number) => write_number(out, number),
        Value::String(text) => write_string(out, text),
        Value::Array(items) => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                out.push_str(if i == 0 { "" } else { comma });
                write(out, item, comma, colon);
            }
            out.push(']');
        }
        Value::Object(map) => {
            out.push('{');
            for (i, (key, item)) in map.iter().enumerate() {
                out.push_str(if i == 0 { "" } else { comma });
                write_string(out, key);
                out.push_str(colon);
                write(out, item, comma, colon);
            }
            out.push('}');
        }
    }
}

fn write_string(out: &mut String, text: &str) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            ' '..='~' => out.push(c),
            _ => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    out.push_str(&format!("\\u{unit:04x}"));
                }
            }
        }
    }
    out.push('"');
}

fn write_number(out: &mut String, number: &serde_json::Number) {
    match number.as_f64() {
        Some(float) if number.is_f64() => out.push_str(&python_float(float)),
        _ => out.push_str(&number.to_string()),
    }
}

/// Python's `repr` of a float: the shortest digits that read back, positional for exponents -4 to 15.
fn python_float(float: f64) -> String {
    let scientific = format!("{float:e}");
    let Some((mantissa, exponent)) = scientific.split_once('e') else { return scientific };
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{mantissa}e{sign}{:02}", exponent.unsigned_abs());
    }
    let positional = float.to_string();
    if positional.contains('.') { positional } else { format!("{positional}.0") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn writes_what_python_writes() {
        // Each right side was printed by Python 3's json.dumps.
        let cases = [
            (json!({"a": 1, "b": [true, null]}), r#"{"a":1,"b":[true,null]}"#, r#"{"a": 1, "b": [true, null]}"#),
            (json!({}), "{}", "{}"),
            (json!([]), "[]", "[]"),
            (json!("é\u{1F600}\u{7f}\u{1}\"\\/\n\t\u{8}\u{c}"), "", r#""\u00e9\ud83d\ude00\u007f\u0001\"\\/\n\t\b\f""#),
            (json!(1.0), "", "1.0"),
            (json!(0.0001), "", "0.0001"),
            (json!(0.00001234), "", "1.234e-05"),
            (json!(1e15), "", "1000000000000000.0"),
            (json!(1e16), "", "1e+16"),
            (json!(1.5e300), "", "1.5e+300"),
            (json!(-0.5), "", "-0.5"),
            (json!(18446744073709551615u64), "", "18446744073709551615"),
        ];
        for (value, stored, spoken) in cases {
            assert_eq!(python_json(&value), spoken);
            let stored = if stored.is_empty() { spoken } else { stored };
            assert_eq!(String::from_utf8_lossy(&compact(&value)), stored);
        }
    }

    #[test]
    fn compares_by_text_like_patroni() {
        for (a, b, same) in [
            (json!({"a": 1}), json!({"a": "1"}), true),
            (json!({"a": {"b": true}}), json!({"a": {"b": "True"}}), true),
            (json!({"a": 1, "b": 2}), json!({"a": 1}), false),
            (json!({"a": {}}), json!({"a": "{}"}), false),
            (json!({"a": [1, 2]}), json!({"a": [1, 2]}), true),
            (json!({"a": [1, 2]}), json!({"a": [2, 1]}), false),
        ] {
            assert_eq!(deep_compare(&a, &b), same, "{a} {b}");
        }
    }

    proptest::proptest! {
        #[test]
        fn strings_read_back(text: String) {
            let value = json!({ &text: [text] });
            let read: Value = serde_json::from_slice(&compact(&value)).unwrap();
            proptest::prop_assert_eq!(read, value);
        }

        #[test]
        fn floats_read_back(float: f64) {
            proptest::prop_assume!(float.is_finite());
            proptest::prop_assert_eq!(python_float(float).parse::<f64>(), Ok(float));
        }
    }
}
