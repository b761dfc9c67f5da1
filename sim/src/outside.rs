//! The server outside that a standby cluster follows: always there, always a primary, and nobody here has a say in it.

use std::time::Duration;

use trunkline_common::{SystemId, TimelineId};

use crate::executor::ProcessId;
use crate::server::Phase;
use crate::stage::Stage;
use crate::wal::{Kind, Record, Wal};

/// Its address.
pub const HOST: &str = "outside";

/// What it has.
#[derive(Debug, Clone)]
pub struct Outside {
    /// Of which cluster.
    pub system: SystemId,
    /// Everything that it has written.
    pub wal: Wal,
}

/// Starts it: somebody writes there, again and again.
pub fn start(stage: &Stage, process: ProcessId) {
    let first = Record { timeline: TimelineId(1), kind: Kind::Shutdown, number: stage.number() };
    let mut wal = Wal::default();
    wal.push(first);
    stage.set_outside(Outside { system: SystemId(6_000_000_000_000_000_000), wal });
    let writing = stage.clone();
    stage.executor().spawn(process, async move {
        loop {
            writing.micros(20_000..200_000).await;
            let number = writing.number();
            let record = Record { timeline: TimelineId(1), kind: Kind::Write(number), number };
            writing.outside(|outside| outside.wal.push(record));
        }
    });
}

/// A standby's connection to it, until it is to follow somebody else, or can't follow.
pub async fn stream(stage: &Stage, host: usize, number: u64) {
    let mut changed = stage.server(host, |server| server.changed.subscribe());
    let mut streaming = false;
    loop {
        changed.mark_unchanged();
        let Some(wal) = stage.outside(|outside| outside.wal.clone()) else { break };
        let goes_on = stage.server(host, |server| {
            let full = server.disk_full;
            let data = server.data.as_mut()?;
            let same = data.upstream.as_ref().is_some_and(|upstream| upstream.host == HOST);
            let postmaster = server.postmaster.as_mut().filter(|p| p.number == number && p.phase == Phase::Running)?;
            if !same || full || data.standby != (postmaster.role == trunkline_agent::postgres::PgRole::Standby) {
                return None;
            }
            if !data.standby || !data.wal.is_prefix_of(&wal) {
                return None;
            }
            if !std::mem::replace(&mut postmaster.streaming, true) {
                postmaster.since.streaming = stage.executor().now();
            }
            if data.wal.len() < wal.len() {
                data.wal.extend_from(&wal);
                data.remove_old_wal();
                postmaster.since.grown = stage.executor().now();
                server.touch();
            }
            Some(())
        });
        if goes_on.is_none() {
            break;
        }
        streaming = true;
        changed.mark_unchanged();
        tokio::select! {
            biased;
            _ = changed.changed() => stage.micros(500..2_000).await,
            () = stage.executor().sleep(Duration::from_millis(50)) => {}
        }
    }
    if streaming {
        stage.server(host, |server| {
            if let Some(postmaster) = server.postmaster(number) {
                postmaster.streaming = false;
            }
        });
    }
}
