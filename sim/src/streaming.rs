//! Streaming replication: a standby's WAL receiver, the connection to its upstream, and what it confirms.

use std::time::Duration;

use trunkline_agent::postgres::{PgRole, Upstream};

use crate::outside;
use crate::scenario::End;
use crate::server::{self, Sender, forget_sender};
use crate::stage::{Stage, host_of};
use crate::world::promises;

/// How long either side waits for a silent other one.
pub const REPLICATION_TIMEOUT: Duration = Duration::from_secs(5);

/// The WAL receiver of a standby: connects, streams, and tries again.
pub async fn receive(stage: Stage, host: usize, number: u64) {
    let mut changed = stage.server(host, |server| server.changed.subscribe());
    loop {
        changed.mark_unchanged();
        let target = stage.server(host, |server| {
            let standby = server.postmaster(number)?.role == PgRole::Standby;
            Some((standby, server.data.as_ref()?.upstream.clone()))
        });
        let Some((standby, upstream)) = target else { return };
        if !standby {
            return;
        }
        // It is the postmaster that starts a receiver.
        server::signalled(&stage, host, number).await;
        if upstream.as_ref().is_some_and(|upstream| upstream.host == outside::HOST) {
            outside::stream(&stage, host, number).await;
        }
        if let Some(from) = upstream.as_ref().and_then(|upstream| host_of(&upstream.host)) {
            stream(&stage, host, number, from, upstream.clone()).await;
        }
        // wal_retrieve_retry_interval, which a reload cuts short.
        let nap = stage.executor().sleep(Duration::from_secs(1));
        tokio::select! {
            biased;
            _ = changed.changed() => stage.micros(1_000..20_000).await,
            () = nap => {}
        }
    }
}

/// One replication connection, until it breaks.
async fn stream(stage: &Stage, host: usize, number: u64, from: usize, upstream: Option<Upstream>) {
    stage.micros(500..5_000).await;
    if !stage.talks(End::Postgres(host), End::Postgres(from)) {
        return;
    }
    let connection = stage.number();
    let slot = upstream.as_ref().and_then(|upstream| upstream.slot.clone());
    let Some(serving) = connect(stage, host, number, from, connection, slot) else { return };
    set_streaming(stage, host, number, true);
    pump(stage, host, number, from, serving, connection, upstream).await;
    set_streaming(stage, host, number, false);
    stage.server(from, |server| forget_sender(server, host, number));
}

/// Registers with the upstream, if what is here is a beginning of what is there, the rest of it is still there, and so is the
/// slot to stream by.
fn connect(stage: &Stage, host: usize, number: u64, from: usize, connection: u64, slot: Option<String>) -> Option<u64> {
    promises::check_receiver(stage, host);
    stage.servers(|servers| {
        servers[from].open(stage)?;
        let own = servers[host].data.as_ref()?.wal.clone();
        let standby = servers[host].name.clone();
        let server = &mut servers[from];
        let data = server.data.as_mut()?;
        if !own.is_prefix_of(&data.wal) {
            return None;
        }
        if own.len() < data.oldest {
            tracing::debug!("{standby} wants WAL from {} that has been removed at {}", own.end(), server.name);
            return None;
        }
        let caught_up = data.wal.len() == own.len();
        let postmaster = server.postmaster.as_mut()?;
        if let Some(slot) = &slot {
            *data.slots.get_mut(slot)? = own.len();
        }
        postmaster.senders.insert(standby, Sender { connection, owner: number, slot, flushed: own.len(), caught_up });
        let serving = postmaster.number;
        server.touch();
        Some(serving)
    })
}

fn set_streaming(stage: &Stage, host: usize, number: u64, streaming: bool) {
    stage.server(host, |server| {
        if let Some(postmaster) = server.postmaster(number) {
            postmaster.streaming = streaming;
            postmaster.since.streaming = stage.executor().now();
        }
    });
}

/// Moves records to the standby and confirmations back.
async fn pump(
    stage: &Stage,
    host: usize,
    number: u64,
    from: usize,
    serving: u64,
    connection: u64,
    upstream: Option<Upstream>,
) {
    let (here, there) = (End::Postgres(host), End::Postgres(from));
    let (mut own_changed, mut changed) =
        stage.servers(|servers| (servers[host].changed.subscribe(), servers[from].changed.subscribe()));
    let mut silent_since = None;
    loop {
        own_changed.mark_unchanged();
        changed.mark_unchanged();
        let goes_on = stage.server(host, |server| {
            let same = server.data.as_ref().is_some_and(|data| data.upstream == upstream && !server.disk_full);
            server.postmaster(number).is_some_and(|p| p.role == PgRole::Standby) && same
        });
        if !goes_on {
            return;
        }
        let Some(process) = stage.server(from, |server| server.postmaster(serving).map(|p| p.process)) else { return };
        if !stage.network(|network| network.open(there, here)) || stage.executor().is_frozen(process) {
            let now = stage.executor().now();
            let since = *silent_since.get_or_insert(now);
            if now - since > REPLICATION_TIMEOUT {
                return;
            }
            stage.executor().sleep(Duration::from_millis(200)).await;
            continue;
        }
        silent_since = None;
        let length = stage.server(host, |server| server.data.as_ref().map_or(0, |data| data.wal.len()));
        let sent = stage.server(from, |server| server.data.as_ref().map(|data| data.wal.records()[length..].to_vec()));
        let Some(sent) = sent else { return };
        if !sent.is_empty() {
            stage.micros(100..1_500).await;
            let flushed = stage.server(host, |server| {
                let postmaster = server.postmaster(number).filter(|p| p.role == PgRole::Standby)?;
                postmaster.since.grown = stage.executor().now();
                let data = server.data.as_mut()?;
                sent.into_iter().for_each(|record| data.wal.push(record));
                let flushed = data.wal.len();
                data.remove_old_wal();
                server.touch();
                Some(flushed)
            });
            let Some(flushed) = flushed else { return };
            stage.micros(50..500).await;
            confirm(stage, (here, there), from, connection, flushed);
            continue;
        }
        confirm(stage, (here, there), from, connection, length);
        tokio::select! {
            biased;
            _ = changed.changed() => {}
            _ = own_changed.changed() => {}
            // wal_receiver_status_interval, and the moment at which a cut link may have healed.
            () = stage.executor().sleep(Duration::from_secs(1)) => {}
        }
    }
}

/// The standby's word that it has flushed so much; it may get lost.
fn confirm(stage: &Stage, (here, there): (End, End), from: usize, connection: u64, flushed: usize) {
    if !stage.network(|network| network.open(here, there)) {
        return;
    }
    stage.server(from, |server| {
        let end = server.data.as_ref().map_or(0, |data| data.wal.len());
        let Some(postmaster) = &mut server.postmaster else { return };
        let Some(sender) = postmaster.senders.values_mut().find(|sender| sender.connection == connection) else {
            return;
        };
        let caught_up = sender.caught_up || flushed >= end;
        if flushed <= sender.flushed && caught_up == sender.caught_up {
            return;
        }
        sender.flushed = sender.flushed.max(flushed);
        sender.caught_up = caught_up;
        let kept = sender.slot.as_ref().zip(server.data.as_mut()).and_then(|(slot, data)| data.slots.get_mut(slot));
        if let Some(kept) = kept {
            *kept = flushed.max(*kept);
        }
        server.touch();
    });
}
