//! What is wrong in a file is said before anything is touched.

use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use trunkline_tests::{Program, Tools};

/// Runs a program that must end by itself within seconds.
fn run(program: &Program, args: &[&str], file: &Path) -> Result<Output> {
    let mut command = Command::new("timeout");
    command.arg("20").arg(&program.path).args(args).arg(file);
    for (key, _) in std::env::vars_os().filter(|(key, _)| key.to_string_lossy().starts_with("PATRONI_")) {
        command.env_remove(key);
    }
    command.output().context("timeout(1)")
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).into_owned()
}

const GOOD_AGENT: &str = "
scope: demo
name: a
etcd3: {host: 127.0.0.1:1}
restapi: {listen: 127.0.0.1:2}
postgresql:
  listen: 127.0.0.1:3
  data_dir: DIR/data
  bin_dir: BIN
  authentication:
    superuser: {username: postgres, password: x}
    replication: {username: replicator, password: x}
";

#[test]
fn every_error_of_an_agents_file_is_named_with_its_path() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let program = Program::agent()?;
    let good = GOOD_AGENT.replace("DIR", &dir.path().to_string_lossy());
    let good = good.replace("BIN", &Tools::find()?.postgres_bin.to_string_lossy());
    let file = dir.path().join("patroni.yml");
    let cases: [(&str, String, &[&str]); 4] = [
        ("no scope, no name", good.replace("scope: demo\nname: a\n", ""), &["scope", "name"]),
        ("no etcd", good.replace("etcd3: {host: 127.0.0.1:1}\n", ""), &["etcd3"]),
        ("a wrong address", good.replace("listen: 127.0.0.1:3", "listen: 127.0.0.1:nope"), &["postgresql.listen"]),
        ("no YAML", "scope: [demo\n".to_owned(), &["patroni.yml"]),
    ];
    for (what, text_of_file, wanted) in cases {
        std::fs::write(&file, text_of_file)?;
        for args in [&["--validate"][..], &[]] {
            let output = run(&program, args, &file)?;
            let said = text(&output);
            ensure!(output.status.code() == Some(1), "{what}, {args:?}: ended with {}: {said}", output.status);
            ensure!(said.contains("patroni.yml"), "{what}: the file is not named: {said}");
            for word in wanted {
                ensure!(said.contains(word), "{what}: {word} is not named: {said}");
            }
        }
        ensure!(!dir.path().join("data").exists(), "{what}: something was touched");
    }

    std::fs::write(&file, format!("{good}bootstrap: {{dcs: {{ttl: 5, loop_wait: 10, retry_timeout: 10}}}}\n"))?;
    let output = run(&program, &["--validate"], &file)?;
    let said = text(&output);
    ensure!(output.status.code() == Some(1) && said.contains("bootstrap.dcs") && said.contains("loop_wait"), "{said}");

    std::fs::write(&file, good)?;
    let output = run(&program, &["--validate"], &file)?;
    ensure!(output.status.success(), "a good file: {}", text(&output));
    Ok(())
}

#[test]
fn every_error_of_a_routers_file_is_named_with_its_path() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let program = Program::router()?;
    let file = dir.path().join("router.yml");
    std::fs::write(
        &file,
        "etcd3: {host: 127.0.0.1:1}\nports:\n- {name: a, listen: '127.0.0.1:0', target: everybody}\nlimits: {max_sessions: -1}\n",
    )?;
    let output = run(&program, &[], &file)?;
    let said = text(&output);
    ensure!(output.status.code() == Some(1), "ended with {}: {said}", output.status);
    for word in ["router.yml", "scope", "ports[0].target", "leader", "limits.max_sessions"] {
        ensure!(said.contains(word), "{word} is not named: {said}");
    }

    let output = run(&program, &[], &dir.path().join("absent.yml"))?;
    ensure!(output.status.code() == Some(1) && text(&output).contains("absent.yml"), "{}", text(&output));
    Ok(())
}
