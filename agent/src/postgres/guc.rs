//! Which settings wait for a restart (config reference §10), and when two spellings are the same value.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};

use super::instance::Instance;
use super::{PgError, Setting as Told, query, settings};

/// The bound on asking.
const LIMIT: Duration = Duration::from_secs(5);

/// A row of `pg_settings` with context `postmaster`.
struct Setting {
    name: String,
    /// In units of `unit`.
    setting: String,
    unit: Option<String>,
    vartype: String,
    /// As people write it.
    shown: String,
    /// PostgreSQL has seen another value in a file.
    pending: bool,
}

impl Instance {
    /// What PostgreSQL says is pending, and what is given on the command line, of which it can't know.
    pub(super) async fn pending_restart(&self) -> Result<BTreeMap<String, Value>, PgError> {
        // A new session: its process was forked by a postmaster that has read the files. Signals are handled before
        // connections are accepted.
        let connection = self.connect(LIMIT).await?;
        let text = "SELECT name, setting, unit, vartype, current_setting(name), pending_restart FROM pg_settings
            WHERE context = 'postmaster'";
        let rows = tokio::time::timeout(LIMIT, connection.client.query(text, &[])).await;
        let rows = rows.map_err(|_| PgError::Timeout { what: "reading settings".to_owned(), limit: LIMIT })?;
        let config = self.config_now();
        let wanted = settings::wanted(&config, self.role(), self.version());
        let (command_line, _) = settings::command_line(&config, self.scope(), None);
        let mut pending = BTreeMap::new();
        for row in rows.map_err(query::failed)? {
            let read = || {
                Ok::<_, tokio_postgres::Error>(Setting {
                    name: row.try_get(0)?,
                    setting: row.try_get(1)?,
                    unit: row.try_get(2)?,
                    vartype: row.try_get(3)?,
                    shown: row.try_get(4)?,
                    pending: row.try_get(5)?,
                })
            };
            let setting = read().map_err(query::failed)?;
            let given = command_line.get(&setting.name);
            let changed = given.map_or(setting.pending, |value| !same(&setting, value));
            if changed {
                let new = given.or_else(|| wanted.get(&setting.name)).map_or("?", String::as_str);
                pending.insert(setting.name, json!({ "old_value": setting.shown, "new_value": new }));
            }
        }
        Ok(pending)
    }

    /// What `pg_settings` says of one of them, and who has another value.
    pub(super) async fn ask_setting(&self, name: &str) -> Result<Option<Told>, PgError> {
        let text = "SELECT s.name, current_setting(s.name), s.context, s.source, s.sourcefile, s.sourceline, s.pending_restart,
                   array(SELECT concat_ws(' in ', 'role ' || r.rolname, 'database ' || d.datname) || ': '
                                || substr(c, strpos(c, '=') + 1)
                           FROM pg_db_role_setting o CROSS JOIN unnest(o.setconfig) c
                           LEFT JOIN pg_roles r ON r.oid = o.setrole LEFT JOIN pg_database d ON d.oid = o.setdatabase
                          WHERE lower(split_part(c, '=', 1)) = lower(s.name) ORDER BY 1)
              FROM pg_settings s WHERE lower(s.name) = lower($1)";
        let ask = async {
            let connection = self.connect(LIMIT).await?;
            connection.client.query_opt(text, &[&name]).await.map_err(query::failed)
        };
        let timeout = PgError::Timeout { what: "reading a setting".to_owned(), limit: LIMIT };
        let Some(row) = tokio::time::timeout(LIMIT, ask).await.map_err(|_| timeout)?? else { return Ok(None) };
        let read = || {
            let file: Option<String> = row.try_get(4)?;
            let line: Option<i32> = row.try_get(5)?;
            Ok::<_, tokio_postgres::Error>(Told {
                value: row.try_get(1)?,
                context: row.try_get(2)?,
                source: row.try_get(3)?,
                file: file.zip(line),
                pending: row.try_get(6)?,
                rejected: self.rejects(name),
                overrides: row.try_get(7)?,
            })
        };
        read().map(Some).map_err(query::failed)
    }
}

/// Whether a configured value is the one in force.
fn same(setting: &Setting, configured: &str) -> bool {
    let configured = configured.trim();
    match setting.vartype.as_str() {
        "bool" => boolean(&setting.setting).is_some() && boolean(&setting.setting) == boolean(configured),
        "integer" | "real" => {
            let unit = setting.unit.as_deref().unwrap_or("");
            let current = setting.setting.parse::<f64>().ok();
            current.is_some() && current == number(configured, unit)
        }
        "enum" => setting.setting.eq_ignore_ascii_case(configured),
        _ => setting.setting == configured,
    }
}

/// PostgreSQL's booleans: any unambiguous prefix of the words.
fn boolean(text: &str) -> Option<bool> {
    let text = text.to_ascii_lowercase();
    let prefix = |word: &str, least: usize| text.len() >= least && word.starts_with(&text);
    if prefix("true", 1) || prefix("yes", 1) || prefix("on", 2) || text == "1" {
        return Some(true);
    }
    (prefix("false", 1) || prefix("no", 1) || prefix("off", 2) || text == "0").then_some(false)
}

/// A number with or without a unit, in multiples of `base` (`8kB`, `ms`, ``).
fn number(text: &str, base: &str) -> Option<f64> {
    let split = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let value = text[..split].trim().parse::<f64>().ok()?;
    let unit = text[split..].trim();
    if unit.is_empty() {
        return Some(value);
    }
    let digits = base.find(|c: char| !c.is_ascii_digit()).unwrap_or(base.len());
    let factor = if digits == 0 { 1.0 } else { base[..digits].parse::<f64>().ok()? };
    let (unit, unit_kind) = size(unit)?;
    let (base, base_kind) = size(&base[digits..])?;
    (unit_kind == base_kind).then(|| (value * unit / (base * factor)).round())
}

/// A unit's size in bytes or microseconds.
fn size(unit: &str) -> Option<(f64, char)> {
    Some(match unit {
        "B" => (1.0, 'b'),
        "kB" => (1024.0, 'b'),
        "MB" => (1_048_576.0, 'b'),
        "GB" => (1_073_741_824.0, 'b'),
        "TB" => (1_099_511_627_776.0, 'b'),
        "us" => (1.0, 't'),
        "ms" => (1e3, 't'),
        "s" => (1e6, 't'),
        "min" => (6e7, 't'),
        "h" => (3.6e9, 't'),
        "d" => (8.64e10, 't'),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn spellings_of_one_value() {
        let setting = |vartype: &str, setting: &str, unit: Option<&str>| Setting {
            name: "x".into(),
            setting: setting.into(),
            unit: unit.map(str::to_owned),
            vartype: vartype.into(),
            shown: String::new(),
            pending: false,
        };
        for (current, configured, expected) in [
            (setting("integer", "16384", Some("8kB")), "128MB", true),
            (setting("integer", "16384", Some("8kB")), "129MB", false),
            (setting("integer", "100", None), "100", true),
            (setting("integer", "300000", Some("ms")), "5min", true),
            (setting("bool", "on", None), "true", true),
            (setting("bool", "off", None), "1", false),
            (setting("enum", "replica", None), "Replica", true),
            (setting("string", "a,b", None), "a, b", false),
        ] {
            assert_eq!(same(&current, configured), expected, "{} {configured}", current.setting);
        }
    }

    proptest! {
        #[test]
        fn never_panics(text: String, base in prop::sample::select(vec!["", "8kB", "ms", "B"])) {
            let _ = number(&text, base);
            let _ = boolean(&text);
        }
    }
}
