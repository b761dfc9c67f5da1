//! PostgreSQL's programs: where they are, which version, and running one under a bound with its last words kept.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Map, Value};
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::Command;
use trunkline_config::PostgresConfig;

use super::PgError;

/// The least major version: `standby.signal` and recovery settings in postgresql.conf came with 12.
pub const OLDEST: u32 = 12;

/// Lines of output kept of a program that failed.
const LAST_WORDS: usize = 8;

/// The path of a program, by `bin_dir` and `bin_name`.
pub fn path(config: &PostgresConfig, tool: &str) -> PathBuf {
    let name = config.bin_name.get(tool).map_or(tool, String::as_str);
    match &config.bin_dir {
        Some(dir) => dir.join(name),
        None => PathBuf::from(name),
    }
}

/// The server's major version by `postgres --version`, at least [`OLDEST`]. Blocks for some milliseconds: at start only.
///
/// # Errors
/// [`PgError::Unusable`]: not there, not executable, or too old.
pub fn version(config: &PostgresConfig) -> Result<u32, PgError> {
    let postgres = path(config, "postgres");
    let output = std::process::Command::new(&postgres)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| unusable(&postgres, &error))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let Some(major) = parse_version(&text) else {
        return Err(PgError::Unusable(format!("{} --version says {:?}", postgres.display(), text.trim())));
    };
    if major < OLDEST {
        return Err(PgError::Unusable(format!(
            "{} is PostgreSQL {major}; the oldest supported version is {OLDEST}",
            postgres.display()
        )));
    }
    Ok(major)
}

/// Whether a program is there: a path that exists, or a name in `$PATH`.
///
/// # Errors
/// [`PgError::Unusable`] with where it was looked for.
pub fn require(config: &PostgresConfig, tool: &str) -> Result<(), PgError> {
    if find(config, tool).is_some() {
        return Ok(());
    }
    let program = path(config, tool);
    Err(PgError::Unusable(match program.components().count() {
        1 => format!("{} is not in $PATH; set postgresql.bin_dir", program.display()),
        _ => format!("{} is not there; check postgresql.bin_dir", program.display()),
    }))
}

/// What the kernel calls the file of a running server's program, where that is not `postgres…`: by `bin_name`, with links
/// resolved. A script is not it, but what it runs.
pub fn unusual_name(config: &PostgresConfig) -> Option<OsString> {
    let program = find(config, "postgres")?.canonicalize().ok()?;
    let name = program.file_name()?;
    (!is_usual_name(name.as_bytes())).then(|| name.to_owned())
}

/// Whether a program of this file name is taken for PostgreSQL wherever it is.
pub fn is_usual_name(name: &[u8]) -> bool {
    name.starts_with(b"postgres")
}

/// The file of a program: a path that exists, or a name in `$PATH`.
fn find(config: &PostgresConfig, tool: &str) -> Option<PathBuf> {
    let program = path(config, tool);
    if program.components().count() > 1 {
        return program.is_file().then_some(program);
    }
    let paths = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&paths).map(|dir| dir.join(&program)).find(|file| file.is_file())
}

/// Runs a program to its end, its output to our log, and fails with its last lines. The program ends with the future.
///
/// # Errors
/// [`PgError::Unusable`] where it can't be executed, [`PgError::Failed`] for any exit but 0.
pub async fn run(command: &mut Command) -> Result<(), PgError> {
    let program = command.as_std().get_program().to_owned();
    clean_environment(command.as_std_mut());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn().map_err(|error| unusable(&program, &error))?;
    let name = short_name(&program);
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let (mut last, errors) = tokio::join!(last_lines(&name, stdout), last_lines(&name, stderr));
    let status = child.wait().await.map_err(|error| PgError::Failed(format!("{name}: {error}")))?;
    if status.success() {
        return Ok(());
    }
    last.extend(errors);
    Err(PgError::Failed(format!("{name} ended with {status}: {}", last.join("; "))))
}

/// [`run`] for at most `limit`.
///
/// # Errors
/// Those of [`run`], and [`PgError::Timeout`]: the program has been killed.
pub async fn run_within(limit: Duration, command: &mut Command) -> Result<(), PgError> {
    let what = short_name(command.as_std().get_program());
    let result = tokio::time::timeout(limit, run(command)).await;
    result.unwrap_or(Err(PgError::Timeout { what, limit }))
}

/// What a program prints, within `limit`, without the end of its last line.
///
/// # Errors
/// Those of [`run_within`].
pub async fn output_within(limit: Duration, command: &mut Command) -> Result<String, PgError> {
    let program = command.as_std().get_program().to_owned();
    let name = short_name(&program);
    clean_environment(command.as_std_mut());
    let output = command.stdin(Stdio::null()).kill_on_drop(true).output();
    let timeout = PgError::Timeout { what: name.clone(), limit };
    let output = tokio::time::timeout(limit, output).await.map_err(|_| timeout)?;
    let output = output.map_err(|error| unusable(&program, &error))?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        return Err(PgError::Failed(format!("{name} ended with {}: {}", output.status, words.trim())));
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim_end_matches('\n').to_owned())
}

/// What PostgreSQL's programs must not inherit: our own configuration (it holds passwords), and libpq settings that
/// would change who connects where.
pub fn clean_environment(command: &mut std::process::Command) {
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        let ours = ["PATRONI_", "TRUNKLINE_", "KUBERNETES_"].iter().any(|prefix| text.starts_with(prefix));
        let libpq = ["PGHOST", "PGHOSTADDR", "PGPORT", "PGDATABASE", "PGUSER", "PGPASSWORD", "PGSERVICE", "PGDATA"];
        if ours || libpq.contains(&text.as_ref()) || text == "NOTIFY_SOCKET" {
            command.env_remove(&name);
        }
    }
}

/// Splits a configured command into words as a POSIX shell would, without expansion. `None`: a quote isn't closed.
pub fn words(command: &str) -> Option<Vec<String>> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut chars = command.chars();
    while let Some(c) = chars.next() {
        match c {
            c if c.is_whitespace() => words.extend(word.take()),
            '\'' => {
                let word = word.get_or_insert_default();
                loop {
                    match chars.next()? {
                        '\'' => break,
                        c => word.push(c),
                    }
                }
            }
            '"' => {
                let word = word.get_or_insert_default();
                loop {
                    match chars.next()? {
                        '"' => break,
                        '\\' => match chars.next()? {
                            c @ ('"' | '\\' | '$' | '`') => word.push(c),
                            c => word.extend(['\\', c]),
                        },
                        c => word.push(c),
                    }
                }
            }
            '\\' => word.get_or_insert_default().push(chars.next()?),
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    Some(words)
}

/// A configured command as a process to be started.
///
/// # Errors
/// [`PgError::Unusable`]: empty, or with a quote that isn't closed.
pub fn shell_words(command: &str) -> Result<Command, PgError> {
    let words = words(command).filter(|words| !words.is_empty());
    let words = words.ok_or_else(|| PgError::Unusable(format!("{command:?} is not a command")))?;
    let mut process = Command::new(&words[0]);
    process.args(&words[1..]);
    Ok(process)
}

/// A method's own keys as arguments of its command, without those that are `ours`.
pub fn arguments(section: &Map<String, Value>, ours: &[&str]) -> Vec<String> {
    let own = section.iter().filter(|(key, _)| !ours.contains(&key.as_str()));
    own.map(|(key, value)| format!("--{key}={}", plain(value))).collect()
}

/// Whether a method's key says yes.
pub fn flag(section: &Map<String, Value>, key: &str) -> bool {
    match section.get(key) {
        Some(Value::Bool(flag)) => *flag,
        Some(Value::Number(number)) => number.as_f64() != Some(0.0),
        Some(Value::String(text)) => ["on", "true", "yes", "1"].contains(&text.to_ascii_lowercase().as_str()),
        _ => false,
    }
}

/// A value as text.
pub fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// The error of a program that can't be executed.
pub fn unusable(program: impl AsRef<OsStr>, error: &std::io::Error) -> PgError {
    PgError::Unusable(format!("{} can't be executed: {error}", program.as_ref().to_string_lossy()))
}

/// Reads `postgres (PostgreSQL) 15.18 (Debian …)`, `… 18beta1`.
fn parse_version(text: &str) -> Option<u32> {
    let rest = text.split_once("PostgreSQL) ")?.1;
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

fn short_name(program: &OsStr) -> String {
    std::path::Path::new(program).file_name().unwrap_or(program).to_string_lossy().into_owned()
}

/// Logs a program's output and keeps its last lines. A line is cut at 1 KiB: the rest of it follows as further lines.
async fn last_lines(name: &str, output: Option<impl AsyncRead + Unpin>) -> Vec<String> {
    let mut kept = std::collections::VecDeque::new();
    let Some(output) = output else { return Vec::new() };
    let mut lines = BufReader::new(output).split(b'\n');
    while let Ok(Some(line)) = lines.next_segment().await {
        let line: String = String::from_utf8_lossy(&line).trim().chars().take(1024).collect();
        if line.is_empty() {
            continue;
        }
        tracing::debug!(program = name, "{line}");
        if kept.len() == LAST_WORDS {
            kept.pop_front();
        }
        kept.push_back(line);
    }
    kept.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn versions_are_read() {
        for (text, major) in [
            ("postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)\n", Some(15)),
            ("postgres (PostgreSQL) 18beta1\n", Some(18)),
            ("postgres (PostgreSQL) 9.6.24\n", Some(9)),
            ("mysqld 8", None),
        ] {
            assert_eq!(parse_version(text), major, "{text:?}");
        }
    }

    #[test]
    fn commands_are_split_as_a_shell_does() {
        let split = |text: &str| words(text);
        let list = |words: &[&str]| Some(words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>());
        assert_eq!(split("/bin/a -x 'b c' d\\ e \"f \\\"g\\n\""), list(&["/bin/a", "-x", "b c", "d e", "f \"g\\n"]));
        assert_eq!(split("a '' b"), list(&["a", "", "b"]));
        assert_eq!(split("a 'b"), None);
        assert_eq!(split("  "), list(&[]));
    }

    #[tokio::test]
    async fn a_program_that_hangs_is_killed() {
        let mut command = Command::new("sleep");
        let result = run_within(Duration::from_millis(50), command.arg("60")).await;
        assert_eq!(result, Err(PgError::Timeout { what: "sleep".to_owned(), limit: Duration::from_millis(50) }));
    }

    proptest! {
        #[test]
        fn splitting_never_panics(text: String) {
            let _ = words(&text);
        }
    }
}
