//! `edit-config`: changes the dynamic configuration in the DCS, if it still is what the change was made on.

use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Map, Value};
use similar::TextDiff;
use trunkline_common::dcs::store::Outcome;
use trunkline_config::merge;
use trunkline_config::yaml;

use super::args::EditArgs;
use super::context::Context;
use super::error::{CtlError, Result};
use super::prompt::{confirm, echo};
use super::yaml::document;

/// `edit-config`.
pub(super) async fn edit_config(context: &Context, args: &EditArgs) -> Result<()> {
    let target = context.target_in_own_group(&args.target)?;
    let cluster = target.read().await?;
    let Some(config) = &cluster.view.config else {
        return Err(CtlError::new(format!("The config key does not exist in the cluster {}", cluster.name)));
    };
    let before = document(&config.value);
    let (after, changed) = match changed_by_options(args, &config.value)? {
        Some(changed) => (document(&changed), changed),
        None => changed_by_editor(&before, &cluster.name)?,
    };
    if changed == config.value {
        return if args.quiet { Ok(()) } else { echo("Not changed") };
    }
    if !args.quiet {
        show_diff(&before, &after)?;
    }
    let from_stdin = [&args.apply, &args.replace].into_iter().any(|file| file.as_deref() == Some("-"));
    if from_stdin && !args.force {
        return echo("Use --force option to apply changes");
    }
    if !args.force && !confirm("Apply these changes?")? {
        return Ok(());
    }
    match target.store.put_config(&changed, Some(config.revision)).await {
        Ok(Outcome::Done(_)) => echo("Configuration changed"),
        Ok(Outcome::Conflict) => Err(CtlError::new("Config modification aborted due to concurrent changes")),
        Err(error) => Err(target.error(&error)),
    }
}

/// `None`: no option asks for a change.
fn changed_by_options(args: &EditArgs, config: &Value) -> Result<Option<Value>> {
    let has_pairs = !args.set.is_empty() || !args.pg.is_empty();
    if args.replace.is_none() && args.apply.is_none() && !has_pairs {
        return Ok(None);
    }
    let mut changed = config.as_object().cloned().unwrap_or_default();
    if let Some(file) = &args.replace {
        changed = Map::new();
        merge::patch(&mut changed, &read_yaml_file(file)?);
    }
    if let Some(file) = &args.apply {
        merge::patch(&mut changed, &read_yaml_file(file)?);
    }
    let short = args.pg.iter().map(|pair| format!("postgresql.parameters.{}", pair.trim_start()));
    for pair in args.set.iter().cloned().chain(short) {
        set_pair(&mut changed, &pair)?;
    }
    Ok(Some(Value::Object(changed)))
}

fn read_yaml_file(file: &str) -> Result<Map<String, Value>> {
    let text = if file == "-" {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).map(|_| text)
    } else {
        std::fs::read_to_string(file)
    };
    let text = text.map_err(|error| CtlError::new(format!("Can not read {file}: {error}")))?;
    match yaml::from_str_as_pyyaml(&text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(CtlError::new(format!("{file} is not a configuration: key: value lines are expected"))),
        Err(error) => Err(CtlError::new(format!("{file} is not YAML: {error}"))),
    }
}

/// Carries out `a.b.c=VALUE`. Null deletes; a map that becomes empty goes, too.
fn set_pair(config: &mut Map<String, Value>, pair: &str) -> Result<()> {
    let invalid = || CtlError::new(format!("Invalid parameter setting {pair}"));
    let (path, value) = pair.split_once('=').ok_or_else(invalid)?;
    let value = yaml::from_str_as_pyyaml(value)
        .map_err(|error| CtlError::new(format!("{pair}: the value is not YAML: {error}")))?;
    set_path(config, &split_path(path.trim()), value);
    Ok(())
}

/// Dots separate, except in names of PostgreSQL's settings, which may contain some.
fn split_path(path: &str) -> Vec<&str> {
    const SETTINGS: &str = "postgresql.parameters.";
    match path.strip_prefix(SETTINGS) {
        Some(setting) => vec!["postgresql", "parameters", setting],
        None => path.split('.').collect(),
    }
}

fn set_path(config: &mut Map<String, Value>, path: &[&str], value: Value) {
    match path {
        [] => {}
        [key] if value.is_null() => {
            config.shift_remove(*key);
        }
        [key] => {
            config.insert((*key).to_owned(), value);
        }
        [key, rest @ ..] => {
            let below = config.entry(*key).or_insert_with(|| Value::Object(Map::new()));
            if !below.is_object() {
                *below = Value::Object(Map::new());
            }
            let Value::Object(map) = below else { return };
            set_path(map, rest, value);
            if map.is_empty() {
                config.shift_remove(*key);
            }
        }
    }
}

/// Lets the operator edit the text; returns it with its meaning.
fn changed_by_editor(before: &str, cluster: &str) -> Result<(String, Value)> {
    let editor = std::env::var_os("EDITOR").filter(|editor| !editor.is_empty()).map(PathBuf::from);
    let editor = editor
        .or_else(|| ["editor", "vi"].iter().find_map(|name| find_program(name)))
        .ok_or_else(|| CtlError::new("EDITOR environment variable is not set. editor or vi are not available"))?;
    let cannot = |error: std::io::Error| CtlError::new(format!("Can not edit the configuration in a file: {error}"));
    let mut file = tempfile::Builder::new()
        .prefix(&format!("{}-config-", cluster.replace('/', "_")))
        .suffix(".yaml")
        .tempfile()
        .map_err(cannot)?;
    file.write_all(before.as_bytes()).and_then(|()| file.flush()).map_err(cannot)?;
    let status = Command::new(&editor).arg(file.path()).status();
    let status =
        status.map_err(|error| CtlError::new(format!("Can not start the editor {}: {error}", editor.display())))?;
    if !status.success() {
        let code = status.code().map_or_else(|| status.to_string(), |code| code.to_string());
        return Err(CtlError::new(format!("Editor exited with return code {code}")));
    }
    // Read by its name: editors replace files.
    let after = std::fs::read_to_string(file.path()).map_err(cannot)?;
    let value =
        yaml::from_str_as_pyyaml(&after).map_err(|error| CtlError::new(format!("That is not YAML: {error}")))?;
    if !value.is_object() {
        return Err(CtlError::new("That is not a configuration: key: value lines are expected"));
    }
    Ok((after, value))
}

/// On a terminal, in colours and through a pager.
fn show_diff(before: &str, after: &str) -> Result<()> {
    let diff = unified_diff(before, after);
    if !std::io::stdout().is_terminal() {
        return diff.iter().try_for_each(echo);
    }
    let named = std::env::var("PAGER").ok();
    let pagers = named.as_deref().into_iter().chain(["less", "more"]);
    let pager = pagers.filter(|name| !name.is_empty()).find_map(find_program).ok_or_else(|| {
        CtlError::new(
            "No pager could be found. Either set PAGER environment variable with your pager or install either \"less\" or \
             \"more\" in the host.",
        )
    })?;
    let is_less = pager.file_name().is_some_and(|name| name == "less");
    let options: &[&str] = if is_less { &["-FRSX"] } else { &[] };
    let cannot = |error| CtlError::new(format!("Can not start the pager {}: {error}", pager.display()));
    let mut child = Command::new(&pager).args(options).stdin(Stdio::piped()).spawn().map_err(cannot)?;
    if let Some(mut input) = child.stdin.take() {
        // A pager that was left early has seen enough.
        let _ = diff.iter().try_for_each(|line| writeln!(input, "{}", coloured(line)));
    }
    child.wait().map(|_| ()).map_err(cannot)
}

fn unified_diff(before: &str, after: &str) -> Vec<String> {
    let lines = |text: &str| format!("{}\n", text.trim_end_matches('\n'));
    let (before, after) = (lines(before), lines(after));
    let diff = TextDiff::from_lines(&before, &after);
    let text = diff.unified_diff().context_radius(3).header("", "").to_string();
    text.lines().map(str::to_owned).collect()
}

fn coloured(line: &str) -> String {
    let colour = match line.as_bytes().first() {
        _ if line.starts_with("+++") || line.starts_with("---") => "1",
        Some(b'+') => "32",
        Some(b'-') => "31",
        Some(b'@') => "36",
        _ => return line.to_owned(),
    };
    format!("\x1b[{colour}m{line}\x1b[0m")
}

/// A program by path or by name in `PATH`.
fn find_program(name: &str) -> Option<PathBuf> {
    use std::os::unix::fs::PermissionsExt;
    let executable =
        |path: &Path| path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0);
    if name.contains('/') {
        return Some(PathBuf::from(name)).filter(|path| executable(path));
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(name)).find(|path| executable(path))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn after(config: Value, pairs: &[&str]) -> Value {
        let mut map = config.as_object().cloned().unwrap();
        for pair in pairs {
            set_pair(&mut map, pair).unwrap();
        }
        Value::Object(map)
    }

    #[test]
    fn pairs_set_and_delete() {
        let table = [
            (json!({}), "ttl=20", json!({"ttl": 20})),
            (json!({"ttl": 20}), "ttl=null", json!({})),
            (json!({}), "ttl=null", json!({})),
            (json!({}), "a.b.c=on", json!({"a": {"b": {"c": true}}})),
            (json!({"a": {"b": {"c": 1}}, "z": 1}), "a.b.c=null", json!({"z": 1})),
            (json!({"a": 5}), "a.b=1", json!({"a": {"b": 1}})),
            (json!({}), " a.b =x=y", json!({"a": {"b": "x=y"}})),
            (json!({}), "slots={x: {type: physical}}", json!({"slots": {"x": {"type": "physical"}}})),
            (
                json!({"postgresql": {"parameters": {"a": 1}}}),
                "postgresql.parameters.pg_stat.max=10kB",
                json!({"postgresql": {"parameters": {"a": 1, "pg_stat.max": "10kB"}}}),
            ),
            (json!({"postgresql": {"parameters": {"a.b": 1}}}), "postgresql.parameters.a.b=null", json!({})),
        ];
        for (config, pair, expected) in table {
            assert_eq!(after(config, &[pair]), expected, "{pair}");
        }
        for pair in ["", "ttl", "a.b"] {
            let error = set_pair(&mut Map::new(), pair).unwrap_err();
            assert!(matches!(error, CtlError::Message(text) if text == format!("Invalid parameter setting {pair}")));
        }
        assert!(set_pair(&mut Map::new(), "a=[").is_err());
    }

    #[test]
    fn the_diff_is_pythons() {
        let before = document(&json!({"loop_wait": 2, "postgresql": {"use_pg_rewind": true}, "ttl": 30}));
        let after = document(&json!({"loop_wait": 2, "postgresql": {"use_pg_rewind": true}, "ttl": 20}));
        let expected = [
            "--- ",
            "+++ ",
            "@@ -1,4 +1,4 @@",
            " loop_wait: 2",
            " postgresql:",
            "   use_pg_rewind: true",
            "-ttl: 30",
            "+ttl: 20",
        ];
        assert_eq!(unified_diff(&before, &after), expected);
        assert_eq!(unified_diff("a: 1\n", "a: 1\nb: 2\n"), ["--- ", "+++ ", "@@ -1 +1,2 @@", " a: 1", "+b: 2"]);
        assert_eq!(unified_diff("{}\n", "a: 1\n"), ["--- ", "+++ ", "@@ -1 +1 @@", "-{}", "+a: 1"]);
    }
}
