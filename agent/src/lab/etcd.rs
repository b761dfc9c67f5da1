//! etcd of a lab: one member or three, each of which can be killed, frozen and started again.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

use super::place::Lab;
use super::process::{self, Proc};
use super::tools::Program;
use super::{rest, wait};

/// How long etcd may take to answer after its start.
const START_LIMIT: Duration = Duration::from_secs(20);

/// A running etcd cluster.
#[derive(Debug)]
pub struct Etcd {
    lab: Lab,
    members: Vec<Member>,
}

#[derive(Debug)]
struct Member {
    name: String,
    client: u16,
    peer: u16,
    dir: PathBuf,
    proc: Option<Proc>,
}

impl Etcd {
    /// Starts `count` members and waits until all answer.
    ///
    /// # Errors
    /// One of them does not come up; its last log lines are in the message.
    pub async fn start(lab: &Lab, count: usize) -> Result<Self> {
        let member = |i: usize| -> Result<Member> {
            let name = format!("etcd{}", i + 1);
            let dir = lab.make_dir(&name)?;
            Ok(Member { name, client: lab.port()?, peer: lab.port()?, dir, proc: None })
        };
        let members = (0..count).map(member).collect::<Result<_>>()?;
        let mut etcd = Self { lab: lab.clone(), members };
        for i in 0..count {
            etcd.spawn(i)?;
        }
        for i in 0..count {
            etcd.healthy(i).await?;
        }
        Ok(etcd)
    }

    /// `host:port` of every member.
    pub fn endpoints(&self) -> Vec<String> {
        self.members.iter().map(|member| format!("127.0.0.1:{}", member.client)).collect()
    }

    /// Kills a member (SIGKILL). Its data stays.
    pub fn kill(&mut self, member: usize) {
        self.members[member].proc = None;
    }

    /// Starts a killed member again and waits until it answers.
    ///
    /// # Errors
    /// It does not.
    pub async fn restart(&mut self, member: usize) -> Result<()> {
        self.spawn(member)?;
        self.healthy(member).await
    }

    /// Stops a member without ending it (SIGSTOP): its connections stay open and mute.
    pub fn freeze(&self, member: usize) {
        self.members[member].proc.iter().for_each(|proc| proc.signal(Signal::STOP));
    }

    /// Ends a freeze (SIGCONT).
    pub fn thaw(&self, member: usize) {
        self.members[member].proc.iter().for_each(|proc| proc.signal(Signal::CONT));
    }

    /// Copies a member's data, as it is at one moment: a backup.
    ///
    /// # Errors
    /// It can't be copied.
    pub fn copy_data(&self, member: usize) -> Result<PathBuf> {
        let data = self.members[member].dir.join("data");
        let copy = self.members[member].dir.join("copy");
        self.freeze(member);
        let copied = copy_tree(&data, &copy);
        self.thaw(member);
        copied.map(|()| copy)
    }

    /// Kills a member that has no others, and gives it the data of `copy` instead of its own; without one it begins anew.
    ///
    /// # Errors
    /// The data can't be replaced, or the member does not come up with it.
    pub async fn restore(&mut self, member: usize, copy: Option<&Path>) -> Result<()> {
        self.kill(member);
        let data = self.members[member].dir.join("data");
        fs::remove_dir_all(&data).with_context(|| format!("removing {}", data.display()))?;
        if let Some(copy) = copy {
            copy_tree(copy, &data)?;
        }
        self.restart(member).await
    }

    /// How many members there are.
    pub fn count(&self) -> usize {
        self.members.len()
    }

    fn spawn(&mut self, i: usize) -> Result<()> {
        let url = |port: u16| format!("http://127.0.0.1:{port}");
        let cluster: Vec<String> = self.members.iter().map(|m| format!("{}={}", m.name, url(m.peer))).collect();
        let member = &self.members[i];
        let mut command = self.lab.command(&Program::new(&self.lab.tools().etcd), &member.dir)?;
        command
            .args(["--name", &member.name, "--data-dir", "data", "--initial-cluster", &cluster.join(",")])
            .args(["--listen-client-urls", &url(member.client), "--advertise-client-urls", &url(member.client)])
            .args(["--listen-peer-urls", &url(member.peer), "--initial-advertise-peer-urls", &url(member.peer)])
            .env("ETCD_UNSUPPORTED_ARCH", std::env::consts::ARCH.replace("aarch64", "arm64"));
        let proc = self.lab.spawn(&member.name, command)?;
        self.members[i].proc = Some(proc);
        Ok(())
    }

    async fn healthy(&mut self, i: usize) -> Result<()> {
        let log = self.lab.log(&self.members[i].name);
        let member = &mut self.members[i];
        let what = format!("an answer of {}", member.name);
        let answered = wait::until(what, START_LIMIT, async || {
            ensure!(member.proc.as_mut().is_some_and(|proc| proc.ended().is_none()), "it has ended");
            let health = rest::get(member.client, "/health").await?;
            ensure!(health.body["health"] == "true" || health.body["health"] == true, "it says {}", health.body);
            Ok(())
        });
        answered.await.with_context(|| format!("last lines of {}:\n{}", log.display(), process::tail(&log, 15)))
    }
}

fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    // With owners and permissions: etcd may run as another user.
    let done = Command::new("cp").arg("--archive").arg("--no-target-directory").args([from, to]).status();
    ensure!(done.context("running cp")?.success(), "{} could not be copied to {}", from.display(), to.display());
    Ok(())
}
