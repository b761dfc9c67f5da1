//! Options of PostgreSQL's programs as the configuration lists them.

use serde_json::Value;

use crate::section::Section;

/// Options of initdb that the agent gives itself or that make no sense.
const INITDB: &[&str] = &["pgdata", "nosync", "pwfile", "sync-only", "version"];

const BASEBACKUP: &[&str] = &[
    "pgdata",
    "format",
    "wal-method",
    "xlog-method",
    "gzip",
    "version",
    "dbname",
    "host",
    "port",
    "username",
    "password",
];

const REWIND: &[&str] = &[
    "target-pgdata",
    "source-pgdata",
    "source-server",
    "write-recovery-conf",
    "dry-run",
    "restore-target-wal",
    "config-file",
    "no-ensure-shutdown",
    "version",
    "help",
];

/// `bootstrap.initdb`; a forbidden option is reported, as Patroni's bootstrap fails on it.
pub(crate) fn initdb(bootstrap: &Section<'_>) -> Vec<String> {
    read(bootstrap, "initdb", INITDB)
}

/// `postgresql.basebackup`.
pub(crate) fn basebackup(postgresql: &Section<'_>) -> Vec<String> {
    read(postgresql, "basebackup", BASEBACKUP)
}

/// `postgresql.rewind`.
pub(crate) fn rewind(postgresql: &Section<'_>) -> Vec<String> {
    read(postgresql, "rewind", REWIND)
}

/// A list of `option` and `option: value`, or a map of the latter. A value of false leaves the option out.
fn read(section: &Section<'_>, key: &str, forbidden: &[&str]) -> Vec<String> {
    let mut options = Vec::new();
    let mut add = |name: &str, value: &Value| match rendered(key, name, value, forbidden) {
        Ok(Some(option)) => options.push(option),
        Ok(None) => {}
        Err(expected) => {
            section.report().problem(&section.path(key), Some(format!("\"{name}\"")), expected, None);
        }
    };
    match section.get(key) {
        None => {}
        Some(Value::Object(map)) => map.iter().for_each(|(name, value)| add(name, value)),
        Some(Value::Array(items)) => {
            for item in items {
                match item {
                    Value::String(name) => add(name, &Value::Bool(true)),
                    Value::Object(map) => map.iter().for_each(|(name, value)| add(name, value)),
                    _ => return section.wrong(key, LIST).unwrap_or_default(),
                }
            }
        }
        Some(_) => return section.wrong(key, LIST).unwrap_or_default(),
    }
    options
}

const LIST: &str = "a list of options is expected, each a name or name: value";

fn rendered(tool: &str, name: &str, value: &Value, forbidden: &[&str]) -> Result<Option<String>, String> {
    let name = name.trim_start_matches('-');
    let bare = name.split('=').next().unwrap_or(name);
    if bare.is_empty() {
        return Err("an option needs a name".to_owned());
    }
    if forbidden.contains(&bare) {
        return Err(format!("the option {bare} is set by the agent; any but {} is allowed", forbidden.join(", ")));
    }
    let text = match value {
        Value::Bool(true) => return allowed_compression(tool, bare, name).map(|()| Some(format!("--{name}"))),
        Value::Bool(false) | Value::Null => return Ok(None),
        Value::String(text) => unquoted(text).to_owned(),
        Value::Number(number) => number.to_string(),
        _ => return Err(format!("the value of option {bare} must be a text or a number")),
    };
    allowed_compression(tool, bare, &text)?;
    Ok(Some(format!("--{name}={text}")))
}

/// A backup compressed by the client arrives as an archive, which a plain-format backup cannot be.
fn allowed_compression(tool: &str, option: &str, value: &str) -> Result<(), String> {
    let server_side = value.trim_start_matches("compress=").starts_with("server-");
    if tool == "basebackup" && option == "compress" && !server_side {
        return Err("compression by the client is not possible; server-gzip, server-lz4 or server-zstd is".to_owned());
    }
    Ok(())
}

fn unquoted(text: &str) -> &str {
    let inner = |quote| text.strip_prefix(quote).and_then(|rest| rest.strip_suffix(quote));
    inner('\'').or_else(|| inner('"')).unwrap_or(text)
}

#[cfg(test)]
mod tests {
    use serde_json::{Map, json};

    use super::*;
    use crate::report::{Origins, Report};

    fn read_options(key: &str, value: Value) -> (Vec<String>, Vec<String>) {
        let map = Map::from_iter([(key.to_owned(), value)]);
        let report = Report::new(Origins::new("f"));
        let section = Section::root(&map, &report);
        let options = match key {
            "initdb" => initdb(&section),
            "basebackup" => basebackup(&section),
            _ => rewind(&section),
        };
        let problems = report.into_parts().0.into_iter().map(|problem| problem.to_string()).collect();
        (options, problems)
    }

    #[test]
    fn table() {
        let cases = [
            ("initdb", json!([{"encoding": "UTF8"}, "data-checksums"]), vec!["--encoding=UTF8", "--data-checksums"]),
            ("initdb", json!({"locale": "'C'", "wal-segsize": 16}), vec!["--locale=C", "--wal-segsize=16"]),
            (
                "basebackup",
                json!([{"max-rate": "100M"}, "verbose", {"checkpoint": "fast"}]),
                vec!["--max-rate=100M", "--verbose", "--checkpoint=fast"],
            ),
            ("basebackup", json!([{"compress": "server-zstd"}]), vec!["--compress=server-zstd"]),
            ("rewind", json!(["debug", {"progress": true}, {"x": false}]), vec!["--debug", "--progress"]),
        ];
        for (key, value, expected) in cases {
            let (options, problems) = read_options(key, value.clone());
            assert_eq!(options, expected, "{value}");
            assert_eq!(problems, Vec::<String>::new(), "{value}");
        }
    }

    #[test]
    fn forbidden_options_are_left_out_and_told() {
        let cases = [
            ("initdb", json!(["data-checksums", {"pgdata": "/x"}]), vec!["--data-checksums"]),
            ("initdb", json!(["pwfile=x", "data-checksums"]), vec!["--data-checksums"]),
            ("basebackup", json!(["format=t", {"compress": "gzip"}, "fast"]), vec!["--fast"]),
            ("rewind", json!(["dry-run"]), vec![]),
            ("rewind", json!("debug"), vec![]),
            ("rewind", json!([1]), vec![]),
            ("rewind", json!([{"debug": [1]}]), vec![]),
        ];
        for (key, value, expected) in cases {
            let (options, problems) = read_options(key, value.clone());
            assert_eq!(options, expected, "{value}");
            assert!(!problems.is_empty(), "{value}");
        }
    }
}
