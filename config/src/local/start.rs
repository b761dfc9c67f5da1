//! What an agent takes from its configuration when it starts, and not when it reads it again: who it is, where its data is, and what
//! was set up before it took part.

use serde_json::{Map, Value};

use super::Local;

/// Keys and sections.
const AT_START: &[&str] = &[
    "scope",
    "name",
    "namespace",
    "watchdog",
    "guard",
    "vip",
    "postgresql.data_dir",
    "postgresql.config_dir",
    "postgresql.bin_dir",
    "postgresql.pgpass",
];

/// Whether a key is one of these, or in one of these sections.
pub(crate) fn is_read_at_start(path: &str) -> bool {
    AT_START.iter().any(|key| path.strip_prefix(key).is_some_and(|rest| rest.is_empty() || rest.starts_with('.')))
}

impl Local {
    /// For an agent that runs and goes by `running`: what only a start takes stays as it is there. Returns the keys that say something
    /// else in the file.
    pub fn keep_until_restart(&mut self, running: &Self) -> Vec<&'static str> {
        let raw = |local: &Self, path: &str| local.raw.pointer(&format!("/{}", path.replace('.', "/"))).cloned();
        let changed: Vec<_> = AT_START.iter().copied().filter(|path| raw(self, path) != raw(running, path)).collect();
        for path in &changed {
            let value = raw(running, path);
            match (path.split_once('.'), &mut self.raw) {
                (Some((section, key)), Value::Object(root)) => {
                    put(&mut self.postgresql, key, running.postgresql.get(key).cloned());
                    if let Some(Value::Object(section)) = root.get_mut(section) {
                        put(section, key, value);
                    }
                }
                (None, Value::Object(root)) => put(root, path, value),
                _ => {}
            }
        }
        let Self { scope, name, namespace, watchdog, guard, vip, .. } = running.clone();
        *self = Self { scope, name, namespace, watchdog, guard, vip, ..self.clone() };
        changed
    }
}

fn put(map: &mut Map<String, Value>, key: &str, value: Option<Value>) {
    match value {
        Some(value) => drop(map.insert(key.to_owned(), value)),
        None => drop(map.remove(key)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Env, PostgresConfig, Settings};

    fn load(change: impl FnOnce(&mut Value)) -> Local {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("patroni.yml");
        let mut file = serde_json::json!({
            "scope": "demo",
            "name": "a",
            "etcd3": { "host": "127.0.0.1" },
            "restapi": { "listen": "127.0.0.1:8008" },
            "watchdog": { "mode": "off" },
            "postgresql": {
                "listen": "127.0.0.1:5432",
                "data_dir": "/data/a",
                "authentication": { "replication": { "username": "r", "password": "x" } },
            },
        });
        change(&mut file);
        std::fs::write(&path, file.to_string()).expect("written");
        Local::load(Some(&path), &Env::default()).expect("a good file").0
    }

    #[test]
    fn who_the_agent_is_and_where_its_data_is_stays() {
        let running = load(|_| ());
        let effective = |local: &Local| PostgresConfig::effective(local, &Settings::default()).0;
        for (path, value) in [
            ("scope", "other".into()),
            ("name", "b".into()),
            ("namespace", "elsewhere".into()),
            ("watchdog", serde_json::json!({ "mode": "required" })),
            ("guard", serde_json::json!({ "egress": "off" })),
            ("vip", serde_json::json!({ "address": "192.0.2.7/24", "interface": "lo" })),
            ("postgresql.data_dir", "/data/b".into()),
            ("postgresql.config_dir", "/etc/b".into()),
            ("postgresql.bin_dir", "/opt/bin".into()),
            ("postgresql.pgpass", "/tmp/pgpass.b".into()),
        ] {
            let mut edited = load(|file| match path.split_once('.') {
                Some((section, key)) => file[section][key] = value.clone(),
                None => file[path] = value.clone(),
            });
            assert_ne!(edited, running, "{path}");
            assert_eq!(edited.keep_until_restart(&running), [path]);
            assert_eq!(edited, running, "{path}");
            assert_eq!(effective(&edited), effective(&running), "{path}");
        }
        assert_eq!(AT_START.len(), 10, "a key without a case above");
    }

    #[test]
    fn everything_else_comes_with_a_reload() {
        let running = load(|_| ());
        let mut edited = load(|file| {
            file["name"] = "b".into();
            file["tags"] = serde_json::json!({ "nofailover": true });
            file["postgresql"]["listen"] = "127.0.0.1:5433".into();
        });
        assert_eq!(edited.keep_until_restart(&running), ["name"]);
        assert_eq!((edited.name.as_str(), edited.tags.len()), ("a", 1));
        assert_eq!(PostgresConfig::effective(&edited, &Settings::default()).0.port, 5433);
        assert_eq!(edited.keep_until_restart(&running), [""; 0]);
    }
}
