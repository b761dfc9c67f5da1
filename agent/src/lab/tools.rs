//! Which programs a lab runs, and where they are. What is missing is named with the Debian package that has it.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// The oldest PostgreSQL that works: 12 is the first with `standby.signal`.
const OLDEST_POSTGRES: u32 = 12;

/// What of PostgreSQL is run, beside `postgres` itself.
const POSTGRES_PROGRAMS: [&str; 5] = ["postgres", "initdb", "pg_basebackup", "pg_rewind", "pg_controldata"];

/// The servers of others, found on this machine.
#[derive(Debug, Clone)]
pub struct Tools {
    /// The directory with `postgres`, `initdb` …
    pub postgres_bin: PathBuf,
    /// PostgreSQL's major version.
    pub postgres_major: u32,
    /// The etcd server.
    pub etcd: PathBuf,
}

impl Tools {
    /// Finds PostgreSQL and etcd.
    ///
    /// # Errors
    /// Everything that is missing or too old, at once, with the packages to install.
    pub fn find() -> Result<Self> {
        let mut missing = String::new();
        let postgres = find_postgres().map_err(|error| writeln!(missing, "  {error:#}"));
        let etcd = find_program("etcd", "etcd-server").map_err(|error| writeln!(missing, "  {error:#}"));
        match (postgres, etcd) {
            (Ok((postgres_bin, postgres_major)), Ok(etcd)) => Ok(Self { postgres_bin, postgres_major, etcd }),
            _ => bail!("this needs programs that are not here:\n{}", missing.trim_end()),
        }
    }

    /// The same with the PostgreSQL of the directory `bin`.
    ///
    /// # Errors
    /// It is incomplete, too old, or does not run.
    pub fn with_postgres(self, bin: &Path) -> Result<Self> {
        let (postgres_bin, postgres_major) = choose_postgres(&[bin.to_owned()])?;
        Ok(Self { postgres_bin, postgres_major, ..self })
    }

    /// The same with another etcd.
    pub fn with_etcd(self, etcd: impl Into<PathBuf>) -> Self {
        Self { etcd: etcd.into(), ..self }
    }
}

/// A program with the arguments that come before its configuration file.
#[derive(Debug, Clone)]
pub struct Program {
    /// The executable.
    pub path: PathBuf,
    /// Leading arguments.
    pub args: Vec<OsString>,
    /// Environment added to the lab's.
    pub env: Vec<(OsString, OsString)>,
}

impl Program {
    /// The executable without arguments.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), args: Vec::new(), env: Vec::new() }
    }

    /// `trunkline-agent`, see [`own_program`].
    ///
    /// # Errors
    /// It is not there.
    pub fn agent() -> Result<Self> {
        own_program("trunkline-agent").map(Self::new)
    }

    /// `trunkline-router`, see [`own_program`].
    ///
    /// # Errors
    /// It is not there.
    pub fn router() -> Result<Self> {
        own_program("trunkline-router").map(Self::new)
    }
}

/// A program of this project: from `TRUNKLINE_BIN_DIR` if set, else beside the running program (a test of Cargo's lies
/// one directory deeper), else from `PATH`.
///
/// # Errors
/// It is nowhere.
pub fn own_program(name: &str) -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os("TRUNKLINE_BIN_DIR") {
        let path = Path::new(&dir).join(name);
        return path.is_file().then_some(path).with_context(|| format!("{name} is not in TRUNKLINE_BIN_DIR ({dir:?})"));
    }
    let exe = std::env::current_exe().context("where is the running program?")?;
    let beside = exe.ancestors().skip(1).take(2).map(|dir| dir.join(name)).find(|path| path.is_file());
    match beside.or_else(|| in_path(name)) {
        Some(path) => Ok(path),
        None => bail!("{name} is neither beside {} nor in PATH; build it: cargo build --workspace", exe.display()),
    }
}

/// A program in `PATH` or where Debian puts servers.
///
/// # Errors
/// It is not installed; the message names `package`.
pub fn find_program(name: &str, package: &str) -> Result<PathBuf> {
    in_path(name).with_context(|| format!("{name} is missing; install it: apt-get install -y {package}"))
}

fn in_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let servers = ["/usr/local/sbin", "/usr/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(servers).map(|dir| dir.join(name)).find(|path| path.is_file())
}

/// Debian keeps several versions beside each other and out of `PATH`: the newest complete one is taken, after the
/// directory that `TRUNKLINE_PG_BIN` names.
fn find_postgres() -> Result<(PathBuf, u32)> {
    let named = std::env::var_os("TRUNKLINE_PG_BIN").map(PathBuf::from);
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let mut installed: Vec<PathBuf> = versions.map(|entry| entry.path().join("bin")).collect();
    installed.sort_by_key(|dir| {
        let major = dir.parent().and_then(Path::file_name).and_then(|name| name.to_str()?.parse::<u32>().ok());
        std::cmp::Reverse(major)
    });
    let in_path = in_path("postgres").and_then(|path| Some(path.canonicalize().ok()?.parent()?.to_path_buf()));
    let candidates: Vec<PathBuf> = match named {
        Some(dir) => vec![dir],
        None => installed.into_iter().chain(in_path).collect(),
    };
    choose_postgres(&candidates)
}

/// The first complete one, and its major version.
fn choose_postgres(candidates: &[PathBuf]) -> Result<(PathBuf, u32)> {
    let complete = |dir: &&PathBuf| POSTGRES_PROGRAMS.iter().all(|name| dir.join(name).is_file());
    let Some(bin) = candidates.iter().find(complete) else {
        bail!("PostgreSQL's server programs are missing; install them: apt-get install -y postgresql");
    };
    let output = Command::new(bin.join("postgres")).arg("--version").output();
    let output = output.with_context(|| format!("{} does not run", bin.join("postgres").display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let major = major_version(&text).with_context(|| format!("what version is {:?}?", text.trim()))?;
    if major < OLDEST_POSTGRES {
        bail!(
            "PostgreSQL {major} in {} is too old: {OLDEST_POSTGRES} or newer is needed; install it: \
             apt-get install -y postgresql",
            bin.display()
        );
    }
    Ok((bin.clone(), major))
}

/// The major version in `postgres (PostgreSQL) 15.18 (Debian …)`, `… 19devel`, `… 18beta1`.
fn major_version(text: &str) -> Option<u32> {
    let version = text.split_once("(PostgreSQL)")?.1.trim_start();
    let digits = version.find(|c: char| !c.is_ascii_digit()).unwrap_or(version.len());
    version[..digits].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn major_versions_of_releases_and_betas() {
        for (text, major) in [
            ("postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)\n", Some(15)),
            ("postgres (PostgreSQL) 9.6.24", Some(9)),
            ("postgres (PostgreSQL) 19devel", Some(19)),
            ("postgres (PostgreSQL) 18beta1", Some(18)),
            ("postgres (PostgreSQL) ", None),
            ("EnterpriseDB", None),
        ] {
            assert_eq!(major_version(text), major, "{text}");
        }
    }

    #[test]
    fn a_missing_program_is_named_with_its_package() {
        let error = find_program("no-such-server", "no-such-package").unwrap_err();
        assert_eq!(error.to_string(), "no-such-server is missing; install it: apt-get install -y no-such-package");
    }
}
