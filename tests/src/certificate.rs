//! Certificates of a lab.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, ensure};

use crate::Lab;

/// A certificate that has signed itself, for 127.0.0.1, and its key, as files of the lab's user.
///
/// # Errors
/// openssl is missing or fails.
pub fn own(lab: &Lab) -> Result<(PathBuf, PathBuf)> {
    let dir = lab.make_dir("certificate")?;
    let line = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 30 -subj /CN=test -addext \
                subjectAltName=IP:127.0.0.1 -keyout key -out certificate";
    let made = Command::new("openssl").args(line.split_whitespace()).current_dir(&dir).output()?;
    ensure!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    // For the unprivileged user that everything runs as.
    let own = |name: &str| lab.write_config(&format!("{name}.pem"), &std::fs::read_to_string(dir.join(name))?);
    Ok((own("certificate")?, own("key")?))
}
