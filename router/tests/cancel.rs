//! Cancel requests reach every server that may have the session.

#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use common::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use trunkline_common::{Clock, SystemClock};
use trunkline_config::router::{Port, Target};

#[tokio::test]
async fn on_the_read_write_port_the_leader_gets_it() {
    let mut world = World::new(limits());
    let rw = world.open(port(Target::Leader)).await;
    let (leader, standby) = (Fake::start().await, Fake::start().await);
    world.lead("a", leader.at).await;
    world.follow("b", standby.at).await;
    let mut client = connect(rw, CANCEL).await;
    let (server, packet) = leader.request().await;
    assert_eq!(packet, CANCEL);
    // libpq waits for the end of the connection, which must not come before the server has acted.
    drop(server);
    assert_eq!(rest(&mut client).await, b"");
    standby.stays_alone().await;
}

#[tokio::test]
async fn on_a_read_only_port_every_standby_gets_it() {
    let mut world = World::new(limits());
    let ro = world.open(port(Target::Replica)).await;
    let (b, c, d) = (Fake::start().await, Fake::start().await, Fake::start().await);
    world.follow("b", b.at).await;
    let (_client, _server) = session(ro, &b).await;
    // b is no candidate any more, but has a session of this port.
    world
        .change(|view| {
            view.members.get_mut(&"b".into()).unwrap().replication_state = None;
            view.members.insert("c".into(), member("replica", c.at));
            view.members.insert("d".into(), member("replica", d.at));
        })
        .await;
    let mut client = connect(ro, CANCEL).await;
    for server in [&b, &c, &d] {
        assert_eq!(server.request().await.1, CANCEL);
    }
    assert_eq!(rest(&mut client).await, b"");
}

#[tokio::test]
async fn after_a_denied_request_for_encryption_too() {
    let mut world = World::new(limits());
    let rw = world.open(port(Target::Leader)).await;
    let leader = Fake::start().await;
    world.lead("a", leader.at).await;
    // libpq 17 cancels as it connects: TLS first, if it can be had.
    let mut client = connect(rw, SSL_REQUEST).await;
    leader.request().await.0.write_all(b"N").await.unwrap();
    assert_eq!(within(client.read_u8()).await.unwrap(), b'N');
    client.write_all(CANCEL).await.unwrap();
    assert_eq!(leader.request().await.1, CANCEL);
    assert_eq!(rest(&mut client).await, b"");
}

#[tokio::test]
async fn without_a_server_it_is_dropped_and_not_held() {
    let world = World::new(limits());
    let rw = world.open(port(Target::Leader)).await;
    let mut client = connect(rw, CANCEL).await;
    assert_eq!(rest(&mut client).await, b"");
    assert_eq!(world.router.hold.held(), 0);
}

/// BackendKeyData.
fn key_data(secret: &[u8]) -> Vec<u8> {
    [b"K", &(8 + secret.len() as u32).to_be_bytes()[..], b"pidk", secret].concat()
}

fn cancel(secret: &[u8]) -> Vec<u8> {
    [&(12 + secret.len() as u32).to_be_bytes()[..], b"\x04\xd2\x16\x2epidk", secret].concat()
}

#[tokio::test]
async fn a_key_that_has_been_seen_leads_to_its_server_alone() {
    let mut world = World::new(limits());
    let ro = world.open(port(Target::Replica)).await;
    let (b, c) = (Fake::start().await, Fake::start().await);
    world.follow("b", b.at).await;
    for secret in [&b"eyes"[..], &[7; 32], &[9; 256]] {
        let mut client = connect(ro, STARTUP).await;
        let (mut at_b, _) = b.request().await;
        let said =
            [b"R\0\0\0\x08\0\0\0\0S\0\0\0\x08a\0b\0".to_vec(), key_data(secret), b"Z\0\0\0\x05I".to_vec()].concat();
        // In pieces, as it may come.
        for piece in said.chunks(7) {
            at_b.write_all(piece).await.unwrap();
            let mut got = vec![0; piece.len()];
            within(client.read_exact(&mut got)).await.unwrap();
            assert_eq!(got, piece, "unchanged");
        }
        world.follow("c", c.at).await;
        let mut canceller = connect(ro, &cancel(secret)).await;
        assert_eq!(b.request().await.1, cancel(secret));
        assert_eq!(rest(&mut canceller).await, b"");
        c.stays_alone().await;
        // A session that is over has no key.
        drop((client, at_b));
        eventually(|| world.router.sessions.is_empty()).await;
        let _late = connect(ro, &cancel(secret)).await;
        b.request().await;
        c.request().await;
        world.change(|view| drop(view.members.remove(&"c".into()))).await;
    }
    let text = world.router.metrics.render().unwrap();
    assert!(text.contains("cancels_total{port=\"replica\",result=\"known\"} 3"), "{text}");
}

#[tokio::test]
async fn guesses_are_limited_and_keys_that_are_known_are_not() {
    let mut world = World::new(trunkline_config::router::Limits { cancel_rate: 1, ..limits() });
    let rw = world.open(port(Target::Leader)).await;
    let leader = Fake::start().await;
    world.lead("a", leader.at).await;
    let mut client = connect(rw, STARTUP).await;
    let (mut at_leader, _) = leader.request().await;
    let said = [b"R\0\0\0\x08\0\0\0\0".to_vec(), key_data(b"eyes"), b"Z\0\0\0\x05I".to_vec()].concat();
    at_leader.write_all(&said).await.unwrap();
    let mut got = vec![0; said.len()];
    within(client.read_exact(&mut got)).await.unwrap();
    for _ in 0..10 {
        drop(connect(rw, &cancel(b"none")).await);
    }
    let limited = || {
        let cancels = &world.router.metrics.cancels;
        cancels.with_label_values(&["leader", "limited"]).get() >= 5
    };
    eventually(limited).await;
    for _ in 0..10 {
        let _canceller = connect(rw, &cancel(b"eyes")).await;
        while leader.request().await.1 != cancel(b"eyes") {}
    }
}

#[tokio::test]
async fn one_that_reaches_another_router_than_its_session_finds_it_too() {
    let (mut own, mut other) = (World::new(limits()), World::new(limits()));
    let (mut ports, servers) = (Vec::new(), [Fake::start().await, Fake::start().await, Fake::start().await]);
    for world in [&mut own, &mut other] {
        ports.push([world.open(port(Target::Leader)).await, world.open(port(Target::Replica)).await]);
        world.lead("a", servers[0].at).await;
        world.follow("b", servers[1].at).await;
        world.follow("c", servers[2].at).await;
    }
    let (writer, reader) = (connect(ports[0][0], STARTUP).await, connect(ports[0][1], STARTUP).await);
    let _at_leader = servers[0].session().await;
    let mut asked = connect(ports[1][0], CANCEL).await;
    assert_eq!(servers[0].request().await.1, CANCEL);
    assert_eq!(rest(&mut asked).await, b"");
    // Whoever it was that took the reader: both are asked, also where no new sessions would be sent.
    let which = tokio::select! { _ = servers[1].session() => 1, _ = servers[2].session() => 2 };
    let name = ["a", "b", "c"][which];
    other.change(|view| view.members.get_mut(&name.into()).unwrap().replication_state = None).await;
    let mut asked = connect(ports[1][1], CANCEL).await;
    for server in &servers[1..] {
        assert_eq!(server.request().await.1, CANCEL);
    }
    assert_eq!(rest(&mut asked).await, b"");
    // Nor does the leader get new ones while it is about to stop.
    other.stops("a").await;
    let mut asked = connect(ports[1][0], CANCEL).await;
    assert_eq!(servers[0].request().await.1, CANCEL);
    assert_eq!(rest(&mut asked).await, b"");
    drop((writer, reader));
}

#[tokio::test]
async fn one_that_nobody_knows_is_over_though_a_server_is_frozen() {
    let mut world = World::new(limits());
    let connect_timeout = Duration::from_millis(300);
    let ro = world.open(Port { connect_timeout, ..port(Target::Replica) }).await;
    let (b, frozen) = (Fake::start().await, Fake::start().await);
    world.follow("b", b.at).await;
    world.follow("c", frozen.at).await;
    let began = SystemClock.now();
    let mut client = connect(ro, CANCEL).await;
    assert_eq!(b.request().await.1, CANCEL);
    let (_silent, packet) = frozen.request().await;
    assert_eq!(packet, CANCEL);
    assert_eq!(rest(&mut client).await, b"");
    let took = SystemClock.now().since(began);
    assert!(took >= connect_timeout && took < Duration::from_secs(3), "{took:?}");
}
