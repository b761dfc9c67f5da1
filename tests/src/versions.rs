//! Other versions than the machine's own: PostgreSQL 16 and 18, etcd 3.5 and libpq 18, as `tools/versions` fetches them.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

use crate::Tools;

/// The servers of this machine, but PostgreSQL of that major version. `None`, with a line of why, where it can't be had.
///
/// # Errors
/// `tools/versions` was not run.
pub fn postgres(major: u32) -> Result<Option<Tools>> {
    let Some(bin) = fetched(&format!("postgres{major}/bin"))? else { return Ok(None) };
    let tools = Tools::find()?.with_postgres(&bin)?;
    ensure!(tools.postgres_major == major, "{} is version {}", bin.display(), tools.postgres_major);
    Ok(Some(tools))
}

/// The servers of this machine, but PostgreSQL 18 with TLS, in the same way.
///
/// # Errors
/// `tools/versions` was not run.
pub fn postgres_18_with_tls() -> Result<Option<Tools>> {
    let Some(bin) = fetched("postgres18tls/bin")? else { return Ok(None) };
    Tools::find()?.with_postgres(&bin).map(Some)
}

/// A Python whose psycopg has libpq 18, in the same way.
///
/// # Errors
/// `tools/versions` was not run.
pub fn python_with_libpq_18() -> Result<Option<PathBuf>> {
    fetched("venv/bin/python")
}

/// etcd 3.5, in the same way.
///
/// # Errors
/// `tools/versions` was not run.
pub fn etcd_35() -> Result<Option<PathBuf>> {
    fetched("etcd35")
}

fn fetched(name: &str) -> Result<Option<PathBuf>> {
    let (path, why) = (place().join(name), std::fs::read_to_string(place().join("unavailable")));
    if let (false, Ok(why)) = (path.exists(), why) {
        println!("SKIPPED: {name} can't be had here: {why}");
        return Ok(None);
    }
    ensure!(path.exists(), "{} is missing; run tools/versions", path.display());
    Ok(Some(path))
}

/// For root a place that the unprivileged user of the tests can reach.
fn place() -> PathBuf {
    if rustix::process::geteuid().is_root() {
        return "/var/tmp/trunkline-versions".into();
    }
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/versions")
}
