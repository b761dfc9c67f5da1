//! Cancel requests reach every server that may have the session.

#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use trunkline_config::router::Target;

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
