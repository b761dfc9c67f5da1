//! `trunklinectl demo`, as a person starts it.

use std::net::{Ipv4Addr, TcpListener};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use trunkline_tests::tools::own_program;

fn demo(args: &[&str]) -> Result<(Option<i32>, String)> {
    let program = own_program("trunklinectl")?;
    let output = Command::new(program).arg("demo").args(args).output().context("trunklinectl")?;
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    Ok((output.status.code(), text))
}

#[test]
fn its_check_passes_and_leaves_nothing_behind() -> Result<()> {
    // Freed again here and taken a moment later by the demo: outside of what outgoing connections get.
    let free = || (20_000..30_000).find(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok());
    let rw: u16 = free().context("no free port")?;
    let ro = (rw + 1..30_000).find(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok());
    let (rw, ro) = (rw.to_string(), ro.context("no free port")?.to_string());
    let (code, said) = demo(&["--check", "--rw-port", &rw, "--ro-port", &ro])?;
    ensure!(code == Some(0), "exit code {code:?}: {said}");
    let fault = |name: &str| said.lines().any(|line| line.contains(name) && line.contains(" ms"));
    ensure!(fault("postmaster") && fault("switchover") && fault("whole node"), "a figure is missing: {said}");

    let dir = said.split("below ").nth(1).and_then(|rest| rest.lines().next()).context("no directory named")?;
    ensure!(!std::path::Path::new(dir.trim()).exists(), "{dir} is left");
    Ok(())
}

#[test]
fn a_taken_port_is_named() -> Result<()> {
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let port = taken.local_addr()?.port().to_string();
    let (code, said) = demo(&["--check", "--rw-port", &port])?;
    ensure!(code == Some(1), "exit code {code:?}: {said}");
    ensure!(said.contains(&port) && said.contains("--rw-port"), "{said}");
    Ok(())
}
