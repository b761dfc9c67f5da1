//! The PROXY protocol: believed where allowed, told where asked.

#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use trunkline_config::router::{Port, Proxied, ProxyVersion, Target};

const V1: &[u8] = b"PROXY TCP4 203.0.113.7 203.0.113.8 4711 5000\r\n";
const V2: &[u8] = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xcb\0\x71\x07\xcb\0\x71\x08\x12\x67\x13\x88";

fn from_here() -> Proxied {
    Proxied { networks: vec!["127.0.0.0/8".parse().unwrap()], unix: false }
}

#[tokio::test]
async fn the_address_that_a_proxy_tells_is_the_clients() {
    let mut world = World::new(limits());
    let leader = Fake::start().await;
    world.lead("a", leader.at).await;
    let one = Port { proxied: from_here(), max_per_client: Some(2), ..port(Target::Leader) };
    let rw = world.open(one).await;
    let mut sessions = Vec::new();
    for header in [V1, V2] {
        let mut client = connect(rw, &[header, STARTUP].concat()).await;
        let (mut server, packet) = leader.session().await;
        assert_eq!(packet, STARTUP, "the header is not passed on");
        assert_eq!(within(client.read_u8()).await.unwrap(), b'R');
        passes(&mut client, &mut server, b"Q").await;
        sessions.push((client, server));
    }
    let (lines, _) = world.router.sessions.list(10, |_| true);
    assert!(lines.iter().all(|line| line.client.to_string() == "203.0.113.7:4711"), "{lines:?}");
    let mut third = connect(rw, &[V2, STARTUP].concat()).await;
    assert_eq!(refused(&mut third).await, "53300", "and it is the address that is limited");
    // A health check of the proxy itself.
    let mut check = connect(rw, b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0").await;
    check.shutdown().await.unwrap();
    assert_eq!(rest(&mut check).await, b"");
}

#[tokio::test]
async fn who_has_to_tell_and_does_not_is_refused_and_so_is_who_must_not() {
    let mut world = World::new(limits());
    let leader = Fake::start().await;
    world.lead("a", leader.at).await;
    let behind = world.open(Port { proxied: from_here(), ..port(Target::Leader) }).await;
    let mut silent = connect(behind, STARTUP).await;
    assert_eq!(refused(&mut silent).await, "08P01");
    let direct = world.open(Port { name: "direct".into(), ..port(Target::Leader) }).await;
    for header in [V1, V2] {
        let mut liar = connect(direct, &[header, STARTUP].concat()).await;
        assert_eq!(refused(&mut liar).await, "08P01");
    }
    leader.stays_alone().await;
}

#[tokio::test]
async fn servers_are_told_who_the_client_is() {
    let mut world = World::new(limits());
    let pooler = Fake::start().await;
    world.lead("a", pooler.at).await;
    let v1 = Port { send_proxy: Some(ProxyVersion::V1), ..port(Target::Leader) };
    let rw = world.open(v1).await;
    for packet in [STARTUP, CANCEL] {
        let client = connect(rw, packet).await;
        let mut server = pooler.connection().await;
        let own = client.local_addr().unwrap();
        let expected = format!("PROXY TCP4 127.0.0.1 127.0.0.1 {} {}\r\n", own.port(), rw.port());
        let mut got = vec![0; expected.len() + packet.len()];
        within(server.read_exact(&mut got)).await.unwrap();
        assert_eq!(got, [expected.as_bytes(), packet].concat());
    }
    // What a proxy in front has told is told on.
    let both =
        Port { name: "both".into(), proxied: from_here(), send_proxy: Some(ProxyVersion::V2), ..port(Target::Leader) };
    let both = world.open(both).await;
    let _client = connect(both, &[V1, STARTUP].concat()).await;
    let mut server = pooler.connection().await;
    let mut got = vec![0; V2.len() + STARTUP.len()];
    within(server.read_exact(&mut got)).await.unwrap();
    assert_eq!(got, [V2, STARTUP].concat());
}
