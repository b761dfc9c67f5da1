//! Sessions pass from one router to another, as from one process to the next.

#![allow(clippy::unwrap_used)]

mod common;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use common::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use trunkline_common::{Clock, SystemClock};
use trunkline_config::router::{KnownMember, Limits, Port, Target};
use trunkline_router::handover::{Giver, Taker};
use trunkline_router::{Router, heard, session};

/// The first router gives what it has to whoever comes to `path`. Ends with how many that has taken, and why no more.
fn give(router: &Arc<Router>, path: &Path) -> JoinHandle<(usize, io::Result<()>)> {
    let (router, giver) = (router.clone(), Giver::at(path).unwrap());
    std::thread::spawn(move || {
        let mut count = 0;
        let given = giver.give(|| Ok(Default::default())).unwrap();
        let ended = given.sessions(&router.sessions, &mut count);
        (count, ended)
    })
}

/// The second one takes it.
fn take(router: &Arc<Router>, path: PathBuf) {
    let (router, runtime) = (router.clone(), tokio::runtime::Handle::current());
    std::thread::spawn(move || {
        let (taker, _) = Taker::take(&path).unwrap();
        taker.taken().unwrap();
        taker.sessions(|adopted| drop(runtime.spawn(session::resume(router.clone(), adopted)))).unwrap();
    });
}

/// Streams both ways that nobody reads, so that buffers and pipes are full.
struct Streams {
    bytes: Vec<u8>,
    reading: (OwnedReadHalf, OwnedReadHalf),
    writing: tokio::task::JoinHandle<(OwnedWriteHalf, OwnedWriteHalf)>,
}

fn stream_both_ways(client: TcpStream, at_server: TcpStream) -> Streams {
    let bytes: Vec<u8> = (0..16 << 20).map(|n: u32| (n ^ (n >> 8)) as u8).collect();
    let ((client_read, mut client_write), (server_read, mut server_write)) =
        (client.into_split(), at_server.into_split());
    let (up, down) = (bytes.clone(), bytes.clone());
    let writing = tokio::spawn(async move {
        tokio::try_join!(client_write.write_all(&up), server_write.write_all(&down)).unwrap();
        (client_write, server_write)
    });
    Streams { bytes, reading: (server_read, client_read), writing }
}

impl Streams {
    async fn is_under_way(&self) {
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(!self.writing.is_finished());
    }

    /// Every byte, in order. The connections stay open for as long as what is returned.
    async fn arrive(mut self) -> impl Sized {
        let (mut up, mut down) = (vec![0; self.bytes.len()], vec![0; self.bytes.len()]);
        let reading =
            async { tokio::try_join!(self.reading.0.read_exact(&mut up), self.reading.1.read_exact(&mut down)) };
        within(reading).await.unwrap();
        assert!(up == self.bytes && down == self.bytes, "every byte, in order");
        (within(self.writing).await.unwrap(), self.reading)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_go_on_in_the_next_process_with_every_byte() {
    let (mut before, mut after) = (World::new(limits()), World::new(limits()));
    let rw = before.open(port(Target::Leader)).await;
    after.open(port(Target::Leader)).await;
    let server = Fake::start().await;
    before.lead("a", server.at).await;
    after.lead("a", server.at).await;
    let said = b"R\0\0\0\x08\0\0\0\0K\0\0\0\x0cpidkeyesZ\0\0\0\x05I";
    let mut sessions = Vec::new();
    for _ in 0..3 {
        let mut client = connect(rw, STARTUP).await;
        let (mut at_server, _) = server.request().await;
        passes(&mut at_server, &mut client, said).await;
        sessions.push((client, at_server));
    }
    let (client, at_server) = sessions.pop().unwrap();
    let streams = stream_both_ways(client, at_server);
    streams.is_under_way().await;
    // One has not finished its start.
    let mut starting = connect(rw, STARTUP).await;
    let (mut starting_at_server, _) = server.session().await;
    assert_eq!(within(starting.read_u8()).await.unwrap(), b'R');

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("upgrade");
    give(&before.router, &path);
    take(&after.router, path);
    eventually(|| after.router.sessions.len() == 3 && before.router.sessions.len() == 1).await;
    for (client, at_server) in &mut sessions {
        passes(client, at_server, b"to the server").await;
        passes(at_server, client, b"and back").await;
    }
    let _open = streams.arrive().await;
    // What has not started stays until it has.
    passes(&mut starting_at_server, &mut starting, b"\0\0\0\x08\0\0\0\0Z\0\0\0\x05I").await;
    eventually(|| after.router.sessions.len() == 4 && before.router.connections() == 0).await;
    passes(&mut starting, &mut starting_at_server, b"Q").await;
    // They are what they were: known by their keys, and ended with their leader.
    assert!(after.router.sessions.holder(b"pidkeyes").is_some());
    let (lines, _) = after.router.sessions.list(10, |_| true);
    assert!(lines.iter().any(|line| line.client.to_string() == sessions[0].0.local_addr().unwrap().to_string()));
    after.change(|view| view.leader = None).await;
    for (client, _) in &mut sessions {
        assert_eq!(rest(client).await, b"");
    }
    eventually(|| after.router.connections() == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_next_process_that_fails_has_not_taken_goes_on_where_it_was() {
    let (mut before, mut after) = (World::new(limits()), World::new(limits()));
    let rw = before.open(port(Target::Leader)).await;
    after.open(port(Target::Leader)).await;
    let server = Fake::start().await;
    before.lead("a", server.at).await;
    after.lead("a", server.at).await;
    let mut sessions = Vec::new();
    for _ in 0..20 {
        sessions.push(started(rw, &server).await);
    }
    let (client, at_server) = started(rw, &server).await;
    let streams = stream_both_ways(client, at_server);
    streams.is_under_way().await;

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("upgrade");
    let giving = give(&before.router, &path);
    let (router, runtime) = (after.router.clone(), tokio::runtime::Handle::current());
    let failing = std::thread::spawn(move || {
        let (taker, _) = Taker::take(&path).unwrap();
        taker.taken().unwrap();
        let mut count = 0;
        taker.sessions(|adopted| {
            count += 1;
            drop(runtime.spawn(session::resume(router.clone(), adopted)));
            assert!(count < 3, "the next process fails");
        })
    });
    assert!(tokio::task::spawn_blocking(|| failing.join()).await.unwrap().is_err());
    let (count, ended) = tokio::task::spawn_blocking(|| giving.join()).await.unwrap().unwrap();
    assert!(count == 3 && ended.is_err(), "{count} {ended:?}");
    eventually(|| after.router.sessions.len() == 3 && before.router.sessions.len() == 18).await;
    for (client, at_server) in &mut sessions {
        passes(client, at_server, b"to the server").await;
        passes(at_server, client, b"and back").await;
    }
    streams.arrive().await;
    // They end as they would have.
    before.change(|view| view.leader = None).await;
    after.change(|view| view.leader = None).await;
    for (client, _) in &mut sessions {
        assert_eq!(rest(client).await, b"");
    }
    eventually(|| after.router.connections() == 0 && before.router.connections() == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_of_another_epoch_is_not_taken_over() {
    let (mut before, mut after) = (World::new(limits()), World::new(limits()));
    let rw = before.open(port(Target::Leader)).await;
    let (old, new) = (Fake::start().await, Fake::start().await);
    before.lead("a", old.at).await;
    after.lead("b", new.at).await;
    let mut client = connect(rw, STARTUP).await;
    let (mut at_old, _) = old.request().await;
    passes(&mut at_old, &mut client, b"R\0\0\0\x08\0\0\0\0Z\0\0\0\x05I").await;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("upgrade");
    give(&before.router, &path);
    take(&after.router, path);
    assert_eq!(rest(&mut client).await, b"");
    assert_eq!(rest(&mut at_old).await, b"", "not another byte");
    eventually(|| before.router.connections() == 0 && after.router.connections() == 0).await;
}

/// Every session passes from one router to the other.
fn pass(before: &World, after: &World) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("upgrade");
    give(&before.router, &path);
    take(&after.router, path);
    dir
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_counts_as_its_clients_in_the_next_process() {
    let (mut before, mut after) = (World::new(limits()), World::new(limits()));
    let strict = || Port { max_per_client: Some(1), ..port(Target::Leader) };
    let (rw, rw_after) = (before.open(strict()).await, after.open(strict()).await);
    let server = Fake::start().await;
    before.lead("a", server.at).await;
    after.lead("a", server.at).await;
    let (client, at_server) = started(rw, &server).await;
    let _dir = pass(&before, &after);
    eventually(|| after.router.sessions.len() == 1).await;
    assert_eq!(refused(&mut connect(rw_after, STARTUP).await).await, "53300");
    drop((client, at_server));
    eventually(|| after.router.sessions.is_empty()).await;
    started(rw_after, &server).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_planned_switchover_goes_on_in_the_next_process() {
    let limits = Limits { switchover_budget: Duration::from_secs(3), ..limits() };
    let (mut before, mut after) = (World::new(limits), World::new(limits));
    let rw = before.open(port(Target::Leader)).await;
    after.open(port(Target::Leader)).await;
    let server = Fake::start().await;
    before.lead("a", server.at).await;
    after.lead("a", server.at).await;
    let (mut writer, mut writer_end) = started(rw, &server).await;
    let (mut waits, mut waits_end) = started(rw, &server).await;
    for (client, server) in [(&mut writer, &mut writer_end), (&mut waits, &mut waits_end)] {
        passes(client, server, &message(b'Q', b"begin\0")).await;
        passes(server, client, &message(b'Z', b"T")).await;
    }
    before.stops("a").await;
    after.stops("a").await;
    let announced = SystemClock.now();
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    let _dir = pass(&before, &after);
    eventually(|| after.router.sessions.len() == 2).await;
    // One comes to its end, which the next process sees: it knows all that has passed before.
    passes(&mut writer, &mut writer_end, &message(b'Q', b"commit\0")).await;
    writer_end.write_all(&message(b'Z', b"I")).await.unwrap();
    within(writer.read_exact(&mut [0; 6])).await.unwrap();
    assert_eq!(refused(&mut writer).await, "57P01");
    // The other one does not, and has no more time than it had.
    assert_eq!(refused(&mut waits).await, "57P01");
    let took = SystemClock.now().since(announced);
    assert!(took > Duration::from_millis(2_900) && took < Duration::from_millis(4_000), "{took:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_session_that_was_taken_over_is_still_told_of_a_planned_stop() {
    let (mut before, mut after) = (World::new(limits()), World::new(limits()));
    let rw = before.open(port(Target::Leader)).await;
    after.open(port(Target::Leader)).await;
    let server = Fake::start().await;
    before.lead("a", server.at).await;
    after.lead("a", server.at).await;
    let (mut client, mut at_server) = started(rw, &server).await;
    let _dir = pass(&before, &after);
    eventually(|| after.router.sessions.len() == 1).await;
    passes(&mut client, &mut at_server, &message(b'Q', b"select\0")).await;
    passes(&mut at_server, &mut client, &message(b'Z', b"I")).await;
    after.stops("a").await;
    assert_eq!(refused(&mut client).await, "57P01");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_the_next_process_knows_by_its_own_word_keeps_its_sessions() {
    let (api_url, server) = (api("200 OK", "primary").await, Fake::start().await);
    let known = KnownMember { name: "a".into(), api_url, connect_address: server.at.to_string() };
    let mut before = World::new(limits());
    let rw = before.open(port(Target::Leader)).await;
    before.lead("a", server.at).await;
    let (mut client, mut at_server) = started(rw, &server).await;
    // It has not reached the DCS.
    let limits = Limits { stale_after: Duration::from_millis(10), ..limits() };
    let mut after = World::seeded(limits, Some(heard::seed(&[known])));
    after.open(port(Target::Leader)).await;
    eventually(|| after.router.table().leader.is_some()).await;
    let _dir = pass(&before, &after);
    eventually(|| after.router.sessions.len() == 1 || before.router.sessions.is_empty()).await;
    passes(&mut client, &mut at_server, b"goes on").await;
    // And ends with its leader as any other.
    let other = Fake::start().await;
    after.lead("b", other.at).await;
    assert_eq!(rest(&mut client).await, b"");
}
