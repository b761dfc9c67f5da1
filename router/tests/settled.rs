//! Sessions that just talk move to a thread of their own, and come back for everything else: nothing of that can be noticed.

#![allow(clippy::unwrap_used)]

mod common;

use std::num::NonZeroU32;
use std::time::Duration;

use common::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use trunkline_config::router::{Limits, Target};
use trunkline_router::handover::{Giver, Taker};
use trunkline_router::{session, survey};

struct Scene {
    world: World,
    rw: std::net::SocketAddr,
    server: Fake,
}

impl Scene {
    async fn new(limits: Limits) -> Self {
        let mut world = World::new(limits);
        if world.router.lean.after().is_none() {
            world.router.lean.start(1, NonZeroU32::MIN).unwrap();
            tokio::spawn(survey::settling(world.router.clone()));
        }
        let rw = world.open(port(Target::Leader)).await;
        let server = Fake::start().await;
        world.lead("a", server.at).await;
        Self { world, rw, server }
    }

    /// A session that has settled: one of `count`.
    async fn settled(&self, count: usize) -> (TcpStream, TcpStream) {
        let (mut client, mut server) = started(self.rw, &self.server).await;
        talks(&mut client, &mut server).await;
        eventually(|| self.there() == count).await;
        (client, server)
    }

    fn there(&self) -> usize {
        self.world.router.lean.sessions()
    }

    async fn none_left(&self) {
        eventually(|| self.world.router.connections() == 0 && self.there() == 0).await;
    }

    fn counted(&self, line: &str) {
        let text = self.world.router.metrics.render().unwrap();
        assert!(text.contains(line), "{line}: {text}");
    }
}

/// One question and its answer.
async fn talks(client: &mut TcpStream, server: &mut TcpStream) {
    passes(client, server, &message(b'Q', b"select\0")).await;
    passes(server, client, &[message(b'C', b"SELECT 1\0"), message(b'Z', b"I")].concat()).await;
}

/// Bytes that show any loss, repetition or exchange.
fn pattern(length: usize) -> Vec<u8> {
    (0..length as u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

#[tokio::test]
async fn messages_of_all_sizes_pass_and_are_counted() {
    let scene = Scene::new(limits()).await;
    let (mut client, mut server) = scene.settled(1).await;
    let sizes = [1, 5, 100, 8_192, 32_767, 32_768, 32_769, 65_536, 300_000];
    for size in sizes {
        passes(&mut client, &mut server, &pattern(size)).await;
        passes(&mut server, &mut client, &pattern(size)).await;
    }
    let bytes: usize = sizes.iter().sum();
    let start = 9 + 13 + 6;
    scene.counted(&format!("bytes_total{{direction=\"to_server\",member=\"a\",port=\"leader\"}} {}\n", bytes + 12));
    scene.counted(&format!(
        "bytes_total{{direction=\"to_client\",member=\"a\",port=\"leader\"}} {}\n",
        bytes + 20 + start
    ));
    drop(client);
    assert_eq!(rest(&mut server).await, b"");
    drop(server);
    scene.none_left().await;
}

#[tokio::test]
async fn who_says_little_settles_too() {
    let scene = Scene::new(limits()).await;
    let (mut client, mut server) = started(scene.rw, &scene.server).await;
    eventually(|| scene.there() == 1).await;
    talks(&mut client, &mut server).await;
    assert_eq!(scene.there(), 1);
    drop(server);
    assert_eq!(rest(&mut client).await, b"");
    drop(client);
    scene.none_left().await;
}

#[tokio::test]
async fn a_stream_is_spliced_and_settles_again_behind() {
    let scene = Scene::new(limits()).await;
    let (mut client, mut server) = scene.settled(1).await;
    let bytes = pattern(24 << 20);
    for _ in 0..3 {
        let mut got = vec![0; bytes.len()];
        let moved = async { tokio::try_join!(server.write_all(&bytes), client.read_exact(&mut got)) };
        within(moved).await.unwrap();
        assert!(got == bytes);
        assert_eq!(scene.there(), 0, "a stream");
        for _ in 0..10 {
            talks(&mut client, &mut server).await;
        }
        eventually(|| scene.there() == 1).await;
    }
}

#[tokio::test]
async fn both_ways_at_once() {
    let scene = Scene::new(limits()).await;
    let (client, server) = scene.settled(1).await;
    let bytes = pattern(16 << 20);
    let ((mut client_read, mut client_write), (mut server_read, mut server_write)) =
        (client.into_split(), server.into_split());
    let (mut up, mut down) = (vec![0; bytes.len()], vec![0; bytes.len()]);
    let all = async {
        tokio::try_join!(
            client_write.write_all(&bytes),
            server_write.write_all(&bytes),
            server_read.read_exact(&mut up),
            client_read.read_exact(&mut down)
        )
    };
    within(all).await.unwrap();
    assert!(up == bytes && down == bytes);
}

#[tokio::test]
async fn a_reader_that_stalls_stops_the_sender() {
    let scene = Scene::new(limits()).await;
    let (mut client, mut server) = scene.settled(1).await;
    let chunk = pattern(64 << 10);
    let mut sent = 0usize;
    while let Ok(written) = tokio::time::timeout(Duration::from_millis(300), server.write(&chunk)).await {
        sent += written.unwrap();
        assert!(sent < 16 << 20, "no backpressure");
    }
    passes(&mut client, &mut server, b"cancel that").await;
    let mut got = vec![0; sent];
    within(client.read_exact(&mut got)).await.unwrap();
    passes(&mut server, &mut client, b"done").await;
}

#[tokio::test]
async fn last_words_and_half_closes_arrive() {
    let scene = Scene::new(limits()).await;
    for round in 0..200usize {
        let (client, server) = scene.settled(1).await;
        let bytes = pattern(1 + round * 997);
        let (mut first, mut second) = if round % 2 == 0 { (client, server) } else { (server, client) };
        let closes_first = async {
            first.write_all(&bytes).await.unwrap();
            first.shutdown().await.unwrap();
            rest(&mut first).await
        };
        let answers = async {
            let got = rest(&mut second).await;
            second.write_all(&got).await.unwrap();
            second.shutdown().await.unwrap();
        };
        let (echo, ()) = tokio::join!(closes_first, answers);
        assert!(echo == bytes, "round {round}: {} of {} bytes came back", echo.len(), bytes.len());
        scene.none_left().await;
    }
}

#[tokio::test]
async fn last_words_of_a_server_arrive_though_the_client_still_talks() {
    let scene = Scene::new(limits()).await;
    for round in 0..200usize {
        let (mut client, mut server) = scene.settled(1).await;
        let words = pattern(1 + (round * 1_013) % 60_000);
        // Unread bytes make the server's close a reset, and the router's write to it an error.
        client.write_all(&pattern(20_000)).await.unwrap();
        server.write_all(&words).await.unwrap();
        server.readable().await.unwrap();
        drop(server);
        let _ = client.write_all(b"and more").await;
        let got = rest(&mut client).await;
        assert!(got == words, "round {round}: {} of {} bytes", got.len(), words.len());
        drop(client);
        scene.none_left().await;
    }
}

#[tokio::test]
async fn one_side_that_breaks_ends_the_session() {
    let scene = Scene::new(limits()).await;
    let (client, mut server) = scene.settled(1).await;
    client.set_zero_linger().unwrap();
    drop(client);
    assert_eq!(rest(&mut server).await, b"");
    drop(server);
    scene.none_left().await;
    let (mut client, server) = scene.settled(1).await;
    server.set_zero_linger().unwrap();
    drop(server);
    assert_eq!(rest(&mut client).await, b"");
    drop(client);
    scene.none_left().await;
    scene.counted("ended_total{member=\"a\",port=\"leader\",reason=\"client_lost\"} 1");
    scene.counted("ended_total{member=\"a\",port=\"leader\",reason=\"server_lost\"} 1");
}

#[tokio::test]
async fn sessions_of_a_deposed_leader_end_at_once() {
    let mut scene = Scene::new(limits()).await;
    let mut sessions = Vec::new();
    for count in 1..=50 {
        sessions.push(scene.settled(count).await);
    }
    let other = Fake::start().await;
    scene.world.lead("b", other.at).await;
    for (client, server) in &mut sessions {
        // What is said from now on reaches nobody.
        let _ = client.write_all(&message(b'Q', b"insert\0")).await;
        assert_eq!(rest(server).await, b"");
        assert_eq!(rest(client).await, b"");
    }
    drop(sessions);
    scene.none_left().await;
    scene.counted("reason=\"leader_changed\"} 50");
}

#[tokio::test]
async fn a_planned_switchover_ends_them_between_transactions() {
    let mut scene = Scene::new(Limits { switchover_budget: Duration::from_millis(500), ..limits() }).await;
    let (mut idle, _idle_end) = scene.settled(1).await;
    let (mut writer, mut writer_end) = scene.settled(2).await;
    let (mut waits, mut waits_end) = scene.settled(3).await;
    for (client, server) in [(&mut writer, &mut writer_end), (&mut waits, &mut waits_end)] {
        passes(client, server, &message(b'Q', b"begin\0")).await;
        passes(server, client, &message(b'Z', b"T")).await;
    }
    assert_eq!(scene.there(), 3);
    scene.world.stops("a").await;
    assert_eq!(refused(&mut idle).await, "57P01");
    passes(&mut writer, &mut writer_end, &message(b'Q', b"commit\0")).await;
    writer_end.write_all(&message(b'Z', b"I")).await.unwrap();
    within(writer.read_exact(&mut [0; 6])).await.unwrap();
    assert_eq!(refused(&mut writer).await, "57P01");
    assert_eq!(refused(&mut waits).await, "57P01", "its time is over");
    drop((idle, writer, waits));
    scene.none_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn they_go_on_in_the_next_process_while_they_talk() {
    let (before, mut after) = (Scene::new(limits()).await, World::new(limits()));
    after.open(port(Target::Leader)).await;
    after.lead("a", before.server.at).await;
    let mut talking = Vec::new();
    for count in 1..=20 {
        let (mut client, mut server) = before.settled(count).await;
        talking.push(tokio::spawn(async move {
            for _ in 0..500 {
                talks(&mut client, &mut server).await;
            }
            (client, server)
        }));
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("upgrade");
    let (router, giver) = (before.world.router.clone(), Giver::at(&path).unwrap());
    std::thread::spawn(move || {
        let given = giver.give(|| Ok(Default::default())).unwrap();
        given.sessions(&router.sessions, &mut 0)
    });
    let (router, runtime) = (after.router.clone(), tokio::runtime::Handle::current());
    std::thread::spawn(move || {
        let (taker, _) = Taker::take(&path).unwrap();
        taker.taken().unwrap();
        taker.sessions(|adopted| drop(runtime.spawn(session::resume(router.clone(), adopted)))).unwrap();
    });
    eventually(|| after.router.sessions.len() == 20 && before.world.router.connections() == 0).await;
    let mut sessions = Vec::new();
    for task in talking {
        sessions.push(within(task).await.unwrap());
    }
    assert_eq!(before.there(), 0);
    for (client, server) in &mut sessions {
        talks(client, server).await;
    }
    drop(sessions);
    eventually(|| after.router.connections() == 0).await;
}
