//! The clients of `tests/drivers`: programs of the same manners, given steps and a server, that answer a line a step.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdout};

use crate::tools::{find_program, own_program};
use crate::{LIMIT, Lab, versions};

/// A client and what it can do.
#[derive(Debug)]
pub struct Driver {
    /// Its name.
    pub name: &'static str,
    program: fn(&Path) -> Result<Vec<OsString>>,
    /// Steps for any server, with the answers expected.
    pub anywhere: &'static [(&'static str, &'static str)],
    /// Steps that take a primary.
    pub on_primary: &'static [(&'static str, &'static str)],
    /// What it can be in the middle of when its server is lost, and by how many sessions; the first on a standby, too.
    pub holds: &'static [(&'static str, u64)],
}

const ANYWHERE: &[(&str, &str)] = &[("large", "16777216"), ("copy-out", "588895"), ("cancel", "57014")];
const ON_PRIMARY: &[(&str, &str)] = &[("copy-in", "5000050000"), ("listen", "hello")];
const HOLDS: &[(&str, u64)] = &[("hold-query", 1), ("hold-copy-in", 1), ("hold-copy-out", 1), ("hold-listen", 1)];

/// Those that can be had on this machine, with a line of why for those that can't.
pub fn here() -> Vec<&'static Driver> {
    let why_not = |driver: &Driver| match driver.name {
        "node-postgres" => std::fs::read_to_string(built("node-postgres/unavailable")).ok(),
        "pgx" => (!built("pgx/driver").exists()).then(|| "tools/pgx has not been run".to_owned()),
        _ => None,
    };
    let missing = |driver: &Driver| why_not(driver).map(|why| println!("SKIPPED: {}: {why}", driver.name));
    ALL.iter().filter(|driver| missing(driver).is_none()).collect()
}

/// All of them. Two are not drivers of applications: pgbench, and the programs that speak the replication protocol.
const ALL: &[Driver] = &[
    application("psql", |dir| Ok(vec!["bash".into(), dir.join("psql.sh").into()])),
    application("psycopg", |dir| Ok(vec!["/usr/bin/python3".into(), dir.join("driver_psycopg.py").into()])),
    application("asyncpg", |dir| Ok(vec!["/usr/bin/python3".into(), dir.join("driver_asyncpg.py").into()])),
    application("pgjdbc", |dir| {
        let java = find_program("java", "default-jdk-headless")?.into();
        let line = ["-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-cp", "/usr/share/java/postgresql.jar"];
        Ok([java].into_iter().chain(line.map(Into::into)).chain([dir.join("Jdbc.java").into()]).collect())
    }),
    application("node-postgres", |dir| {
        Ok(vec![find_program("node", "nodejs")?.into(), dir.join("node-postgres.js").into()])
    }),
    application("pgx", |_| Ok(vec![built("pgx/driver").into()])),
    application("tokio-postgres", |_| Ok(vec![own_program("tokio-postgres-driver")?.into()])),
    Driver {
        name: "pgbench",
        program: |dir| Ok(vec!["bash".into(), dir.join("pgbench.sh").into()]),
        anywhere: &[("load", "1000/1000")],
        on_primary: &[],
        holds: &[("hold-load", 4)],
    },
    Driver {
        name: "replication",
        program: |dir| Ok(vec!["bash".into(), dir.join("replication.sh").into()]),
        anywhere: &[("basebackup", "backup successfully verified")],
        on_primary: &[("receivewal", "received")],
        holds: &[("hold-basebackup", 2), ("hold-receivewal", 1)],
    },
];

/// psycopg with libpq 18, which can begin TLS without asking for it. `None`, with a line of why, where it can't be had.
///
/// # Errors
/// `tools/versions` was not run.
pub fn psycopg_with_libpq_18() -> Result<Option<Driver>> {
    let program: fn(&Path) -> Result<Vec<OsString>> = |dir| {
        let python = versions::python_with_libpq_18()?.context("there is no libpq 18")?;
        Ok(vec![python.into(), dir.join("driver_psycopg.py").into()])
    };
    Ok(versions::python_with_libpq_18()?.map(|_| application("psycopg with libpq 18", program)))
}

const fn application(name: &'static str, program: fn(&Path) -> Result<Vec<OsString>>) -> Driver {
    Driver { name, program, anywhere: ANYWHERE, on_primary: ON_PRIMARY, holds: HOLDS }
}

/// What a driver connects to, in libpq's environment variables.
#[derive(Debug, Clone)]
pub struct Place {
    /// What it is called in messages.
    pub name: String,
    /// `PGPORT` and the like.
    pub environment: Vec<(&'static str, OsString)>,
}

impl Driver {
    /// Starts it with these steps, in a directory of the lab.
    ///
    /// # Errors
    /// It is not installed.
    pub fn start(&self, lab: &Lab, place: &Place, steps: &[&str]) -> Result<Running> {
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("drivers");
        let line = (self.program)(&sources)?;
        let (program, arguments) = line.split_first().context("no program")?;
        let mut command = Command::new(program);
        command.args(arguments).args(steps).current_dir(lab.make_dir("drivers")?);
        command.envs(place.environment.iter().map(|(key, value)| (key, value)));
        let mut path = OsString::from(&lab.tools().postgres_bin);
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap_or_default());
        command.env("PATH", path).env("NODE_PATH", built("node-postgres/node_modules"));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let mut child = tokio::process::Command::from(command).kill_on_drop(true).spawn()?;
        let lines = BufReader::new(child.stdout.take().context("no output")?).lines();
        Ok(Running { what: format!("{} on {}", self.name, place.name), child, lines })
    }
}

/// A driver at work.
#[derive(Debug)]
pub struct Running {
    what: String,
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Running {
    /// Its next line must be `step: answer`.
    ///
    /// # Errors
    /// It is another one, or none within `limit`.
    pub async fn says(&mut self, step: &str, answer: &str, limit: Duration) -> Result<()> {
        let line = self.line(step, limit).await?;
        ensure!(line == format!("{step}: {answer}"), "{}: {line:?}, but {answer} was expected", self.what);
        Ok(())
    }

    /// Its next line, which should be about `step`.
    ///
    /// # Errors
    /// There is none within `limit`.
    pub async fn line(&mut self, step: &str, limit: Duration) -> Result<String> {
        let next = tokio::time::timeout(limit, self.lines.next_line()).await;
        let next = next.with_context(|| format!("{}: no answer to {step} within {limit:?}", self.what))??;
        next.with_context(|| format!("{} ended without an answer to {step}", self.what))
    }

    /// It ends without another word.
    ///
    /// # Errors
    /// It does not, or goes on.
    pub async fn ends(mut self) -> Result<()> {
        let left = tokio::time::timeout(LIMIT, self.lines.next_line()).await.context(self.what.clone())??;
        ensure!(left.is_none(), "{}: {left:?} was not asked for", self.what);
        let status = tokio::time::timeout(LIMIT, self.child.wait()).await??;
        ensure!(status.success(), "{} ended with {status}", self.what);
        Ok(())
    }
}

/// What `tools/node-postgres` and `tools/pgx` have left.
fn built(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target").join(path)
}
