//! Tests that change what belongs to the whole machine do so in a namespace of their own. That takes root.

use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Whether this is the process inside of the namespace; else runs the very test there, as a process of its own. `kind` is an option of
/// unshare(1), `--net` or `--mount`.
///
/// # Errors
/// It failed there.
pub fn inside(kind: &str, test: &str) -> Result<bool> {
    if std::env::var_os("TRUNKLINE_TEST_INSIDE").is_some() {
        return Ok(true);
    }
    let mut command = Command::new("unshare");
    command.args([kind, "--"]).arg(std::env::current_exe()?).args([test, "--exact", "--nocapture"]);
    let status = command.env("TRUNKLINE_TEST_INSIDE", "1").status().context("unshare of util-linux")?;
    ensure!(status.success(), "see above");
    Ok(false)
}
