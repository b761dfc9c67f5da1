//! YAML text to JSON values, as PyYAML would read it. The only file that names the YAML crate.
//!
//! The crate resolves anchors, aliases, merge keys and most scalars. Where it and PyYAML disagree about a plain scalar
//! (`y`, `1e3`, `0o17`), the spelling in the source decides: a second pass, led by the values of the first, reads it.

use std::fmt;

use serde::de::{Deserialize, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};
use serde_saphyr::options::{DuplicateKeyPolicy, NonFiniteFloatPolicy};

use crate::yaml_scalar::{Kind, kind};

pub use crate::yaml_text::to_yaml;

/// Longest text that is read: far above any configuration, far below what could hurt.
const MAX_BYTES: usize = 4 * 1024 * 1024;

/// Most parts of a document that aliases may repeat: an alias bomb ends here, soon.
const MAX_ALIASED: usize = 20_000;

/// Text that is no YAML, with the place where it stops being so.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct YamlError(String);

/// Reads one document. A repeated key is an error here, unlike in [`from_str_lenient`]. Values of
/// `postgresql.parameters` keep their spelling (`on`, `0700`) as text.
///
/// # Errors
/// With line and column, in one line.
pub fn from_str(text: &str) -> Result<Value, YamlError> {
    read(text, DuplicateKeyPolicy::Error, Place::Elsewhere)
}

/// Reads one document exactly as PyYAML does, PostgreSQL's settings included (`on` is true, `0700` is 448): what
/// `patronictl edit-config` stores.
///
/// # Errors
/// With line and column, in one line.
pub fn from_str_as_pyyaml(text: &str) -> Result<Value, YamlError> {
    read(text, DuplicateKeyPolicy::LastWins, Place::Nowhere)
}

/// Reads one document as PyYAML does: of a repeated key the last one counts. Then the complaint about it is returned, too.
///
/// # Errors
/// With line and column, in one line.
pub fn from_str_lenient(text: &str) -> Result<(Value, Option<String>), YamlError> {
    let strict = match from_str(text) {
        Ok(value) => return Ok((value, None)),
        Err(error) => error,
    };
    match read(text, DuplicateKeyPolicy::LastWins, Place::Elsewhere) {
        Ok(value) => Ok((value, Some(strict.to_string()))),
        Err(_) => Err(strict),
    }
}

fn read(text: &str, duplicates: DuplicateKeyPolicy, place: Place) -> Result<Value, YamlError> {
    if text.len() > MAX_BYTES {
        return Err(YamlError(format!("{} bytes are too many; at most {MAX_BYTES} are read", text.len())));
    }
    let options = || {
        let mut options = serde_saphyr::options! {
            legacy_octal_numbers: true,
            duplicate_keys: duplicates,
            non_finite_float_policy: NonFiniteFloatPolicy::AsString,
            with_snippet: false,
        };
        options.alias_limits.max_total_replayed_events = MAX_ALIASED;
        options
    };
    let first: Value = serde_saphyr::from_str_with_options(text, options()).map_err(|error| one_line(&error))?;
    let spelled = serde_saphyr::with_deserializer_from_str_with_options(text, options(), |deserializer| {
        Spelling { seen: &first, place }.deserialize(deserializer)
    });
    // Of a repeated key both values are seen, and the first one may not have the shape of the last.
    Ok(spelled.unwrap_or(first))
}

fn one_line(error: &impl fmt::Display) -> YamlError {
    let text = error.to_string();
    YamlError(text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" "))
}

/// Where a value is: PostgreSQL's settings keep their spelling.
#[derive(Clone, Copy, PartialEq)]
enum Place {
    /// In a document where it does not matter.
    Nowhere,
    Elsewhere,
    Postgresql,
    Parameters,
}

impl Place {
    fn below(self, key: &str) -> Self {
        match (self, key) {
            (Self::Nowhere, _) => Self::Nowhere,
            (Self::Postgresql, "recovery_conf") => Self::Parameters,
            (Self::Postgresql, key) if key == "parameters" || key.starts_with("parameters_") => Self::Parameters,
            (Self::Parameters, _) => Self::Parameters,
            (_, "postgresql") => Self::Postgresql,
            _ => Self::Elsewhere,
        }
    }
}

/// Reads a value of known shape again, to see how its scalars are spelled.
struct Spelling<'a> {
    seen: &'a Value,
    place: Place,
}

impl<'de> DeserializeSeed<'de> for Spelling<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        match self.seen {
            Value::Object(_) => deserializer.deserialize_map(self),
            Value::Array(_) => deserializer.deserialize_seq(self),
            Value::Bool(_) | Value::Number(_) => {
                let text = String::deserialize(deserializer)?;
                Ok(meaning(self.seen, text, self.place))
            }
            // Not only these, but any number too large for a float arrives as one of them.
            Value::String(text) if matches!(text.as_str(), ".inf" | "-.inf" | ".nan") => {
                String::deserialize(deserializer).map(Value::String)
            }
            Value::Null | Value::String(_) => IgnoredAny::deserialize(deserializer).map(|_| self.seen.clone()),
        }
    }
}

impl<'de> Visitor<'de> for Spelling<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the same shape as before")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = access.next_key::<String>()? {
            let seen = self.seen.get(&key).unwrap_or(&Value::Null);
            let value = access.next_value_seed(Spelling { seen, place: self.place.below(&key) })?;
            map.insert(key, value);
        }
        Ok(Value::Object(map))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        for seen in self.seen.as_array().into_iter().flatten() {
            match access.next_element_seed(Spelling { seen, place: Place::Elsewhere })? {
                Some(item) => items.push(item),
                None => break,
            }
        }
        Ok(Value::Array(items))
    }
}

fn meaning(seen: &Value, text: String, place: Place) -> Value {
    let typed = match (kind(&text), seen) {
        (Kind::Bool(value), _) => Value::Bool(value),
        (Kind::Int | Kind::Float, Value::Number(_)) => seen.clone(),
        _ => return Value::String(text),
    };
    let canonical = typed.to_string();
    if place == Place::Parameters && canonical != text { Value::String(text) } else { typed }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn scalars_are_read_as_pyyaml_reads_them() {
        let cases = [
            ("on", json!(true)),
            ("No", json!(false)),
            ("y", json!("y")),
            ("N", json!("N")),
            ("oN", json!("oN")),
            ("'on'", json!("on")),
            ("0700", json!(448)),
            ("\"0700\"", json!("0700")),
            ("08", json!("08")),
            ("1_000", json!(1000)),
            ("1e3", json!("1e3")),
            ("0.5", json!(0.5)),
            ("0x1F", json!(31)),
            ("~", Value::Null),
            ("", Value::Null),
            ("null", Value::Null),
            (".inf", json!(".inf")),
            ("7e999", json!("7e999")),
            ("-1e999", json!("-1e999")),
            ("host:5432", json!("host:5432")),
            ("-1", json!(-1)),
        ];
        for (text, expected) in cases {
            assert_eq!(from_str(&format!("k: {text}")), Ok(json!({ "k": expected })), "{text}");
            assert_eq!(from_str(&format!("- {text}")), Ok(json!([expected])), "{text}");
        }
    }

    #[test]
    fn anchors_and_merge_keys_are_resolved() {
        let text = "d: &d {a: on, b: 1}\ne:\n  <<: *d\n  b: y\nl: [*d, *d]\n";
        let expected = json!({
            "d": {"a": true, "b": 1}, "e": {"b": "y", "a": true}, "l": [{"a": true, "b": 1}, {"a": true, "b": 1}],
        });
        assert_eq!(from_str(text), Ok(expected));
    }

    #[test]
    fn settings_of_postgresql_keep_their_spelling() {
        let text = "bootstrap: {dcs: {postgresql: {parameters: {a: on, b: 0700, c: 1_000, d: 100, e: '5', f: 0.1}}}}\n\
                    postgresql: {parameters_replica: {hot_standby_feedback: off}, use_slots: on}\nparameters: {a: on}\n";
        let expected = json!({
            "bootstrap": {"dcs": {"postgresql": {"parameters":
                {"a": "on", "b": "0700", "c": "1_000", "d": 100, "e": "5", "f": 0.1}}}},
            "postgresql": {"parameters_replica": {"hot_standby_feedback": "off"}, "use_slots": true},
            "parameters": {"a": true},
        });
        assert_eq!(from_str(text), Ok(expected));
    }

    #[test]
    fn settings_can_be_read_as_pyyaml_reads_them() {
        let text = "postgresql: {parameters: {a: on, b: 0700, c: 'on', d: 5}}\nttl: 1\nttl: 2\n";
        let expected = json!({"postgresql": {"parameters": {"a": true, "b": 448, "c": "on", "d": 5}}, "ttl": 2});
        assert_eq!(from_str_as_pyyaml(text), Ok(expected));
    }

    #[test]
    fn a_repeated_key_is_told_and_the_last_one_counts() {
        assert!(from_str("a: 1\na: y\n").is_err());
        let (value, complaint) = from_str_lenient("a: 1\na: z\n").expect("readable");
        assert_eq!(value["a"], json!("z"));
        assert!(complaint.expect("a complaint").contains("duplicate"), "names the reason");
    }

    #[test]
    fn broken_text_names_the_line() {
        for text in ["a: [1\nb: 2", "a:\n\t- b", "a: *nowhere", "a: b: c"] {
            let message = from_str(text).expect_err(text).to_string();
            assert!(message.contains("line"), "{message}");
            assert!(!message.contains('\n'), "{message}");
        }
    }

    #[test]
    fn an_alias_bomb_is_refused() {
        let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x]\n");
        for level in 1..12 {
            let previous = format!("*a{}", level - 1);
            bomb.push_str(&format!("a{level}: &a{level} [{}]\n", vec![previous; 9].join(", ")));
        }
        assert!(from_str(&bomb).is_err());
    }

    fn values() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            (-1e9..1e9f64).prop_map(Value::from),
            "[ -~]{0,12}".prop_map(Value::from),
            "[a-z0-9:.#'\" \n\t-]{0,8}".prop_map(Value::from),
            any::<String>().prop_map(Value::from),
            prop::sample::select(vec!["on", "n", "0700", "1e3", "22:30", "2026-01-02", "<<", "=", "---", "? a"])
                .prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 40, 5, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                prop::collection::vec(("[a-z_:# \n-]{1,6}", inner), 0..5)
                    .prop_map(|pairs| Value::Object(pairs.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back_the_same(value in values()) {
            let text = to_yaml(&value);
            prop_assert_eq!(from_str(&text).map_err(|e| TestCaseError::fail(format!("{e}\n{text}")))?, value, "{}", text);
        }

        #[test]
        fn no_text_panics(text in "(?s).{0,60}") {
            let _ = from_str_lenient(&text);
        }

        #[test]
        fn no_yaml_like_text_panics(text in "[-a:&*!|>'\"%@#?{}\\[\\], \n0-9<~.]{0,60}") {
            let _ = from_str_lenient(&text);
        }
    }
}
