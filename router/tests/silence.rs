//! Peers that do not answer any more are given up, also in the middle of a stream; peers that are alive and do not read are not.

#![allow(clippy::unwrap_used)]

mod common;

use std::num::NonZeroU32;
use std::time::Duration;

use common::network::{cut_off, inside};
use common::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use trunkline_common::{Clock, SystemClock};
use trunkline_config::router::{Limits, Port, Target};
use trunkline_router::survey;

/// The shortest that a port may have.
const SILENCE: Duration = Duration::from_secs(4);

/// By when a peer has been given up.
const GIVEN_UP: Duration = Duration::from_secs(4 + 5);

struct Scene {
    world: World,
    rw: std::net::SocketAddr,
    server: Fake,
}

impl Scene {
    async fn new() -> Self {
        Self::within(limits()).await
    }

    async fn within(limits: Limits) -> Self {
        let mut world = World::new(limits);
        if world.router.lean.after().is_none() {
            world.router.lean.start(1, NonZeroU32::MIN).unwrap();
            tokio::spawn(survey::settling(world.router.clone()));
        }
        let silence = Some(SILENCE);
        let rw = world.open(Port { client_silence: silence, server_silence: silence, ..port(Target::Leader) }).await;
        let server = Fake::start().await;
        world.lead("a", server.at).await;
        Self { world, rw, server }
    }

    /// A session on a thread for sessions that just talk.
    async fn settled(&self) -> (TcpStream, TcpStream) {
        let (client, server) = started(self.rw, &self.server).await;
        eventually(|| self.world.router.lean.sessions() == 1).await;
        (client, server)
    }

    /// So many sessions have ended for this reason.
    async fn ended(&self, reason: &str, count: usize) {
        let line = format!("ended_total{{member=\"a\",port=\"leader\",reason=\"{reason}\"}} {count}\n");
        eventually(|| self.world.router.metrics.render().unwrap().contains(&line)).await;
        eventually(|| self.world.router.connections() == 0).await;
    }
}

/// Moves so much that it is a stream.
async fn streams(from: &mut TcpStream, to: &mut TcpStream) {
    let bytes = vec![7; 1 << 20];
    let mut got = vec![0; bytes.len()];
    for _ in 0..16 {
        let moved = async { tokio::try_join!(from.write_all(&bytes), to.read_exact(&mut got)) };
        within(moved).await.unwrap();
    }
}

/// Says `words` again and again, as far as they are taken, until the router closes, which it does in time.
async fn is_told(survivor: &mut TcpStream, words: &[u8]) {
    let began = SystemClock.now();
    let (mut reader, mut writer) = survivor.split();
    let talks = async {
        while !words.is_empty() && writer.write_all(words).await.is_ok() {}
        std::future::pending().await
    };
    let mut heard = Vec::new();
    tokio::select! {
        _ = within(reader.read_to_end(&mut heard)) => {}
        () = talks => {}
    }
    let took = SystemClock.now().since(began);
    // The silence may have begun before.
    assert!((SILENCE / 4..GIVEN_UP).contains(&took), "{took:?}");
}

#[tokio::test]
async fn a_server_that_dies_is_given_up() {
    if !inside("a_server_that_dies_is_given_up") {
        return;
    }
    let scene = Scene::new().await;
    // In a COPY, in a result, when it is asked something, and when its client is gone as well.
    let (mut copies, mut server) = session(scene.rw, &scene.server).await;
    streams(&mut copies, &mut server).await;
    let (mut reads, mut sends) = session(scene.rw, &scene.server).await;
    streams(&mut sends, &mut reads).await;
    let (mut asks, _asked) = scene.settled().await;
    let (leaves, _left) = session(scene.rw, &scene.server).await;
    cut_off(scene.server.at.port());
    drop(leaves);
    asks.write_all(&message(b'Q', b"select\0")).await.unwrap();
    let words = vec![7; 1 << 20];
    tokio::join!(is_told(&mut copies, &words), is_told(&mut reads, b""), is_told(&mut asks, b""));
    drop((copies, reads, asks));
    scene.ended("server_lost", 3).await;
    scene.ended("client", 1).await;
}

#[tokio::test]
async fn a_server_that_dies_is_given_up_also_when_the_port_is_gone() {
    if !inside("a_server_that_dies_is_given_up_also_when_the_port_is_gone") {
        return;
    }
    let silence = Some(SILENCE);
    let scene = Scene::within(Limits { client_silence: silence, server_silence: silence, ..limits() }).await;
    let (mut copies, mut server) = session(scene.rw, &scene.server).await;
    streams(&mut copies, &mut server).await;
    scene.world.router.forget("leader");
    cut_off(scene.server.at.port());
    is_told(&mut copies, &vec![7; 1 << 20]).await;
    drop(copies);
    scene.ended("server_lost", 1).await;
}

#[tokio::test]
async fn a_client_that_dies_is_given_up() {
    if !inside("a_client_that_dies_is_given_up") {
        return;
    }
    let scene = Scene::new().await;
    let (mut reads, mut sends) = session(scene.rw, &scene.server).await;
    streams(&mut sends, &mut reads).await;
    let (mut copies, mut receives) = session(scene.rw, &scene.server).await;
    streams(&mut copies, &mut receives).await;
    let (asks, mut answers) = scene.settled().await;
    // One that has not read for a while.
    let (stalls, mut waits) = session(scene.rw, &scene.server).await;
    fills(&mut waits).await;
    for client in [&reads, &copies, &asks, &stalls] {
        cut_off(client.local_addr().unwrap().port());
    }
    answers.write_all(&message(b'Z', b"I")).await.unwrap();
    let words = vec![7; 1 << 20];
    tokio::join!(
        is_told(&mut sends, &words),
        is_told(&mut receives, b""),
        is_told(&mut answers, b""),
        is_told(&mut waits, &words)
    );
    scene.ended("client_lost", 4).await;
}

#[tokio::test]
async fn who_is_alive_and_does_not_read_is_not_given_up() {
    let scene = Scene::new().await;
    let (mut client, mut sends) = session(scene.rw, &scene.server).await;
    let (mut copies, mut server) = session(scene.rw, &scene.server).await;
    let (to_client, to_server) = (fills(&mut sends).await, fills(&mut copies).await);
    tokio::time::sleep(3 * SILENCE).await;
    drains(&mut client, to_client).await;
    drains(&mut server, to_server).await;
    passes(&mut client, &mut sends, b"and on").await;
    passes(&mut server, &mut copies, b"and on").await;
}
