//! How one layer of configuration lies over another (Patroni's `patch_config`), used for files of a directory, the
//! environment, `PATCH /config` and `edit-config`.

use serde_json::{Map, Value};

/// Lays `patch` over `target` and says whether anything changed: null deletes, maps merge, anything else replaces what
/// differs in its string form (`30` and `"30"` do not). A map that is new to `target` is copied as it is, so nulls inside
/// of it stay.
pub fn patch(target: &mut Map<String, Value>, patch: &Map<String, Value>) -> bool {
    let mut changed = false;
    for (name, new) in patch {
        changed |= patch_entry(target, name, new);
    }
    changed
}

fn patch_entry(target: &mut Map<String, Value>, name: &str, new: &Value) -> bool {
    if new.is_null() {
        // `shift_remove` keeps the order of what stays.
        return target.shift_remove(name).is_some_and(|old| !old.is_null());
    }
    match (target.get_mut(name), new) {
        (Some(Value::Object(old)), Value::Object(new)) => patch(old, new),
        (Some(old), new) if !new.is_object() && as_text(old) == as_text(new) => false,
        _ => {
            target.insert(name.to_owned(), new.clone());
            true
        }
    }
}

/// Whether both are the same configuration: equal keys, and values equal in their string form.
pub fn deep_compare(a: &Map<String, Value>, b: &Map<String, Value>) -> bool {
    a.len() == b.len() && a.iter().all(|(key, value)| b.get(key).is_some_and(|other| same(value, other)))
}

fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Object(a), Value::Object(b)) => deep_compare(a, b),
        (Value::Object(_), _) => false,
        _ => as_text(a) == as_text(b),
    }
}

/// Python's `str()`, as far as comparing needs it.
fn as_text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Bool(true) => "True".to_owned(),
        Value::Bool(false) => "False".to_owned(),
        Value::Null => "None".to_owned(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn map(value: Value) -> Map<String, Value> {
        match value {
            Value::Object(map) => map,
            _ => Map::new(),
        }
    }

    #[test]
    fn table() {
        let cases = [
            (json!({"a": 1}), json!({"a": null}), json!({}), true),
            (json!({"a": 1}), json!({"b": null}), json!({"a": 1}), false),
            (json!({"a": null}), json!({"a": null}), json!({}), false),
            (json!({"a": 30}), json!({"a": "30"}), json!({"a": 30}), false),
            (json!({"a": true}), json!({"a": "True"}), json!({"a": true}), false),
            (json!({"a": true}), json!({"a": "true"}), json!({"a": "true"}), true),
            (json!({"a": {"b": 1}}), json!({"a": {"c": 2}}), json!({"a": {"b": 1, "c": 2}}), true),
            (json!({"a": {"b": 1}}), json!({"a": 2}), json!({"a": 2}), true),
            (json!({"a": 2}), json!({"a": {"b": null}}), json!({"a": {"b": null}}), true),
            (json!({}), json!({"a": {"b": null}}), json!({"a": {"b": null}}), true),
            (json!({"a": [1, 2]}), json!({"a": [3]}), json!({"a": [3]}), true),
            (json!({"a": [1, 2]}), json!({"a": [1, 2]}), json!({"a": [1, 2]}), false),
            (json!({"a": {}}), json!({"a": {}}), json!({"a": {}}), false),
            (json!({"x": 1, "a": 1, "z": 1}), json!({"a": null}), json!({"x": 1, "z": 1}), true),
        ];
        for (target, change, expected, changed) in cases {
            let (mut result, change) = (map(target.clone()), map(change));
            assert_eq!(patch(&mut result, &change), changed, "{target} {change:?}");
            assert_eq!(result, map(expected), "{target} {change:?}");
        }
    }

    #[test]
    fn comparing_looks_at_the_string_form() {
        let same = |a, b| deep_compare(&map(a), &map(b));
        assert!(same(json!({"1": 2}), json!({"1": "2"})));
        assert!(same(json!({"1": {"2": [3, 4]}}), json!({"1": {"2": [3, 4]}})));
        assert!(!same(json!({"1": null}), json!({})));
        assert!(!same(json!({"1": {}}), json!({"1": null})));
        assert!(!same(json!({"1": [1]}), json!({"1": [2]})));
    }

    fn maps() -> impl Strategy<Value = Map<String, Value>> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            (0..5i64).prop_map(Value::from),
            "[a-c]{0,2}".prop_map(Value::from),
        ];
        let value = leaf.prop_recursive(3, 20, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
                prop::collection::btree_map("[a-d]", inner, 0..4).prop_map(|m| Value::Object(m.into_iter().collect())),
            ]
        });
        prop::collection::btree_map("[a-d]", value, 0..4).prop_map(|m| m.into_iter().collect())
    }

    proptest! {
        #[test]
        fn a_patch_laid_twice_settles(mut target in maps(), change in maps()) {
            // Nulls in a new map are copied first and delete themselves next time, so it may take several turns.
            for _ in 0..8 {
                if !patch(&mut target, &change) {
                    break;
                }
            }
            prop_assert!(!patch(&mut target, &change));
        }

        #[test]
        fn unchanged_means_untouched(target in maps(), change in maps()) {
            let mut result = target.clone();
            if !patch(&mut result, &change) {
                let was: Map<_, _> = target.into_iter().filter(|(_, value)| !value.is_null()).collect();
                let is: Map<_, _> = result.into_iter().filter(|(_, value)| !value.is_null()).collect();
                prop_assert_eq!(was.len(), is.len());
                prop_assert!(was.keys().all(|key| is.contains_key(key)));
            }
        }

        #[test]
        fn what_is_its_own_patch_changes_nothing(target in maps()) {
            let mut result = target.clone();
            prop_assume!(target.values().all(|v| !v.to_string().contains("null")));
            prop_assert!(!patch(&mut result, &target));
            prop_assert_eq!(&result, &target);
            prop_assert!(deep_compare(&result, &target));
        }
    }
}
