//! A client's write on a modelled server, and what its commit waits for.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::sync::oneshot;
use trunkline_agent::postgres::PgRole;
use trunkline_common::MemberName;

use crate::executor::ProcessId;
use crate::server::{self, Phase, Sender, Server, is_forgotten, is_initialised, kill};
use crate::stage::Stage;
use crate::wal::{Kind, Record};

/// What becomes of a client's write at a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Written {
    /// Acknowledged.
    Done,
    /// Certainly not written.
    Refused,
    /// The connection broke: nobody knows.
    Unknown,
}

/// One client's write. The backend belongs to the server: it freezes and dies with it.
pub async fn write(stage: &Stage, host: usize, number: u64, id: u64) -> Written {
    let process = stage.server(host, |server| {
        server.postmaster(number).filter(|p| p.phase == Phase::Running && p.role == PgRole::Primary).map(|p| p.process)
    });
    let Some(process) = process else { return Written::Refused };
    let (answer, answered) = oneshot::channel();
    let backend = stage.clone();
    stage.executor().spawn(process, async move {
        if let Some(written) = commit(&backend, host, number, id).await {
            let _ = answer.send(written);
        }
    });
    answered.await.unwrap_or(Written::Unknown)
}

async fn commit(stage: &Stage, host: usize, number: u64, id: u64) -> Option<Written> {
    stage.micros(50..400).await;
    let full = stage.server(host, |server| server.disk_full);
    if full {
        tracing::debug!("n{host} can't write WAL: PANIC");
        kill(stage, host);
        return None;
    }
    let mut changed = stage.server(host, |server| server.changed.subscribe());
    let begun = stage.server(host, |server| {
        let postmaster = server.postmaster(number).filter(|p| p.phase == Phase::Running)?;
        let (reign, private) = (postmaster.reign?, postmaster.private);
        let data = server.data.as_mut()?;
        let timeline = data.wal.timeline();
        data.wal.push(Record { timeline, kind: Kind::Write(id), number: stage.number() });
        let end = data.wal.len();
        data.remove_old_wal();
        server.touch();
        Some((reign, private, end))
    });
    let Some((reign, private, end)) = begun else { return Some(Written::Refused) };
    loop {
        changed.mark_unchanged();
        let confirmed = stage.server(host, |server| {
            server.postmaster(number).filter(|p| p.phase == Phase::Running)?;
            Some(server.confirmed(end))
        })?;
        if confirmed {
            break;
        }
        changed.changed().await.ok()?;
    }
    if stage.guard(host).is_some_and(|guard| !guard.lets_out()) {
        // The egress fence: no answer leaves a deposed host, whatever still runs there.
        return None;
    }
    if (!private || is_initialised(stage)) && !is_forgotten(stage, host) {
        let has = |sender: &&Sender| sender.flushed >= end;
        let (by, unwatched) = stage.server(host, |server| {
            let by = server.postmaster(number).map_or(0, |postmaster| postmaster.senders.values().filter(has).count());
            (by, server.must_not_lead())
        });
        let long =
            |since: Duration| stage.quiet_for(host).min(stage.executor().now() - since) > Duration::from_secs(10);
        stage.judge(|judge, now| {
            judge.confirmed(now, host, by);
            judge.watched(now, host, unwatched.is_none_or(|since| !long(since)));
            judge.acknowledged(now, id, host, reign);
        });
    }
    Some(Written::Done)
}

impl Server {
    /// Whether the commit of the record before `end` has all confirmations that it needs.
    fn confirmed(&self, end: usize) -> bool {
        let Some(postmaster) = &self.postmaster else { return false };
        let names = Names::parse(&postmaster.names);
        let has = |standby: &&&MemberName| postmaster.senders.get(**standby).is_some_and(|s| s.flushed >= end);
        names.chosen(&postmaster.senders).iter().filter(has).count() >= names.count
    }
}

/// `synchronous_standby_names`: the first so many of a list, or any so many.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Names {
    /// Any of them will do.
    pub any: bool,
    /// How many must confirm.
    pub count: usize,
    /// In order of preference.
    pub listed: Vec<MemberName>,
}

impl Names {
    /// Reads the text.
    pub fn parse(text: &str) -> Self {
        let (method, list) = text.split_once('(').unwrap_or(("1", text));
        let count = method.split_whitespace().find_map(|word| word.parse().ok()).unwrap_or(1);
        let list = list.trim_end_matches(')');
        let listed: Vec<MemberName> = list
            .split(',')
            .map(|name| name.trim().trim_matches('"'))
            .filter(|name| !name.is_empty())
            .map(MemberName::from)
            .collect();
        Self { any: method.starts_with("ANY"), count: if listed.is_empty() { 0 } else { count }, listed }
    }

    /// Those whose confirmation counts now: the first of the list that stream, or all that do.
    pub fn chosen<'n>(&'n self, senders: &BTreeMap<MemberName, Sender>) -> Vec<&'n MemberName> {
        let streaming = |name: &&MemberName| senders.get(*name).is_some_and(|sender| sender.caught_up);
        self.listed.iter().filter(streaming).take(if self.any { usize::MAX } else { self.count }).collect()
    }
}

/// Takes up a new `synchronous_standby_names`: sessions show it first, commits wait by it a little later.
pub fn reload_names(stage: &Stage, host: usize, number: u64, process: ProcessId, done: oneshot::Sender<()>) {
    let stage = stage.clone();
    stage.executor().clone().spawn(process, async move {
        server::signalled(&stage, host, number).await;
        stage.micros(100..2_000).await;
        let loaded = stage.server(host, |server| {
            let names = server.data.as_ref()?.names.clone();
            server.postmaster(number)?.names_shown = names;
            Some(())
        });
        if loaded.is_none() {
            return;
        }
        let slow = stage.server(host, |server| server.disk_slow);
        stage.micros(if slow { 10_000..3_000_000 } else { 200..20_000 }).await;
        stage.server(host, |server| {
            if let Some(postmaster) = server.postmaster(number) {
                // What was loaded last: an older reload that was slow does not bring its own back.
                postmaster.names = postmaster.names_shown.clone();
            }
            server.touch();
        });
        let _ = done.send(());
    });
}
