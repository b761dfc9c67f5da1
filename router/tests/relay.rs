//! Bytes: all of them, in order, in both directions, to the last one.

#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use common::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use trunkline_config::router::Target;

/// Bytes that show any loss, repetition or exchange.
fn pattern(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

async fn pair(world: &mut World) -> (TcpStream, TcpStream) {
    let rw = world.open(port(Target::Leader)).await;
    let server = Fake::start().await;
    world.lead("a", server.at).await;
    session(rw, &server).await
}

#[tokio::test]
async fn messages_of_all_sizes_pass_both_ways() {
    let mut world = World::new(limits());
    let (mut client, mut server) = pair(&mut world).await;
    for size in [1, 5, 100, 8_191, 8_192, 16_384, 32_768, 32_769, 65_536, 100_000] {
        let bytes = pattern(size);
        passes(&mut client, &mut server, &bytes).await;
        passes(&mut server, &mut client, &bytes).await;
    }
}

#[tokio::test]
async fn what_is_said_with_the_first_packet_and_with_its_answer_arrives_behind_it() {
    let mut world = World::new(limits());
    let rw = world.open(port(Target::Leader)).await;
    let fake = Fake::start().await;
    world.lead("a", fake.at).await;
    for first in [CLIENT_HELLO, STARTUP] {
        for size in [1, 490, 512, 1_023, 1_024, 5_000, 70_000] {
            let bytes = pattern(size);
            let mut client = connect(rw, &[first, &bytes].concat()).await;
            let mut server = fake.connection().await;
            let mut got = vec![0; first.len() + size];
            within(server.read_exact(&mut got[..first.len()])).await.unwrap();
            server.write_all(&[b"R", &*bytes].concat()).await.unwrap();
            within(server.read_exact(&mut got[first.len()..])).await.unwrap();
            let mut answer = vec![0; 1 + size];
            within(client.read_exact(&mut answer)).await.unwrap();
            assert!(answer[0] == b'R' && answer[1..] == bytes, "{size} bytes of an answer");
            assert!(got.starts_with(first) && got[first.len()..] == bytes, "{size} bytes behind {first:?}");
            passes(&mut client, &mut server, &bytes).await;
            passes(&mut server, &mut client, &bytes).await;
        }
    }
}

#[tokio::test]
async fn big_transfers_arrive_whole_in_both_directions_at_once() {
    let mut world = World::new(limits());
    let (client, server) = pair(&mut world).await;
    let bytes = pattern(48 << 20);
    let (mut client_read, mut client_write) = client.into_split();
    let (mut server_read, mut server_write) = server.into_split();
    let send_up = async {
        client_write.write_all(&bytes).await.unwrap();
        client_write.shutdown().await.unwrap();
    };
    let send_down = async {
        server_write.write_all(&bytes).await.unwrap();
        server_write.shutdown().await.unwrap();
    };
    let (mut up, mut down) = (Vec::new(), Vec::new());
    let all = async {
        tokio::join!(send_up, send_down, server_read.read_to_end(&mut up), client_read.read_to_end(&mut down))
    };
    let (_, _, up_read, down_read) = tokio::time::timeout(Duration::from_secs(60), all).await.unwrap();
    assert_eq!((up_read.unwrap(), down_read.unwrap()), (bytes.len(), bytes.len()));
    assert!(up == bytes, "to the server");
    assert!(down == bytes, "to the client");
    let text = world.router.metrics.render().unwrap();
    let counted = format!("bytes_total{{direction=\"to_client\",member=\"a\",port=\"leader\"}} {}\n", bytes.len() + 1);
    assert!(text.contains(&counted), "{text}");
    eventually(|| world.router.connections() == 0).await;
}

#[tokio::test]
async fn streams_and_small_messages_alternate() {
    let mut world = World::new(limits());
    let (mut client, mut server) = pair(&mut world).await;
    let bytes = pattern(3 << 20);
    for round in 0..4 {
        let send = async { server.write_all(&bytes).await };
        let mut got = vec![0; bytes.len()];
        let (sent, read) = within(async { tokio::join!(send, client.read_exact(&mut got)) }).await;
        sent.unwrap();
        read.unwrap();
        assert!(got == bytes, "round {round}");
        for small in 0..20u8 {
            passes(&mut client, &mut server, &[small; 7]).await;
            passes(&mut server, &mut client, &[small; 300]).await;
        }
    }
}

#[tokio::test]
async fn half_closes_pass_in_either_direction() {
    let mut world = World::new(limits());
    let rw = world.open(port(Target::Leader)).await;
    let fake = Fake::start().await;
    world.lead("a", fake.at).await;
    for round in 0..200usize {
        let (client, server) = session(rw, &fake).await;
        let bytes = pattern(1 + round * 997);
        // The one that closes first is in turn the client and the server; the other one answers after that.
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
    }
    eventually(|| world.router.connections() == 0).await;
}

#[tokio::test]
async fn last_words_of_a_server_arrive_though_the_client_still_talks() {
    let mut world = World::new(limits());
    let rw = world.open(port(Target::Leader)).await;
    let fake = Fake::start().await;
    world.lead("a", fake.at).await;
    for round in 0..200usize {
        let (mut client, mut server) = session(rw, &fake).await;
        let words = pattern(1 + (round * 1_013) % 60_000);
        // Unread bytes make the server's close a reset, and the router's write to it an error.
        client.write_all(&pattern(20_000)).await.unwrap();
        server.write_all(&words).await.unwrap();
        server.readable().await.unwrap();
        drop(server);
        let _ = client.write_all(b"and more").await;
        let got = rest(&mut client).await;
        assert!(got == words, "round {round}: {} of {} bytes", got.len(), words.len());
    }
    eventually(|| world.router.connections() == 0).await;
}

#[tokio::test]
async fn last_words_of_a_client_arrive() {
    let mut world = World::new(limits());
    let rw = world.open(port(Target::Leader)).await;
    let fake = Fake::start().await;
    world.lead("a", fake.at).await;
    for round in 0..200usize {
        let (mut client, mut server) = session(rw, &fake).await;
        let words = pattern(1 + (round * 1_013) % 60_000);
        client.write_all(&words).await.unwrap();
        drop(client);
        let got = rest(&mut server).await;
        assert!(got == words, "round {round}: {} of {} bytes", got.len(), words.len());
    }
}

#[tokio::test]
async fn a_reader_that_stalls_stops_the_sender() {
    let mut world = World::new(limits());
    let (mut client, mut server) = pair(&mut world).await;
    let chunk = pattern(64 << 10);
    let mut sent = 0usize;
    // The client reads nothing: sooner or later nothing more can be sent.
    while let Ok(written) = tokio::time::timeout(Duration::from_millis(300), server.write(&chunk[sent % 997..])).await {
        sent += written.unwrap();
        assert!(sent < 64 << 20, "no backpressure");
    }
    // The other direction is not hindered, and all of it arrives once the client reads.
    passes(&mut client, &mut server, b"cancel that").await;
    let read = async {
        let mut scratch = vec![0; 1 << 20];
        let mut left = sent;
        while left > 0 {
            let most = left.min(scratch.len());
            left -= client.read(&mut scratch[..most]).await.unwrap();
        }
    };
    within(read).await;
    passes(&mut server, &mut client, b"done").await;
}

#[tokio::test]
async fn encryption_requests_pass_opaquely() {
    let mut world = World::new(limits());
    let rw = world.open(port(Target::Leader)).await;
    let fake = Fake::start().await;
    world.lead("a", fake.at).await;
    let mut client = connect(rw, SSL_REQUEST).await;
    let (mut server, packet) = fake.request().await;
    assert_eq!(packet, SSL_REQUEST);
    passes(&mut server, &mut client, b"S").await;
    passes(&mut client, &mut server, b"\x16\x03\x01 whatever follows").await;
}

#[tokio::test]
async fn one_side_that_breaks_ends_the_session() {
    let mut world = World::new(limits());
    let rw = world.open(port(Target::Leader)).await;
    let fake = Fake::start().await;
    world.lead("a", fake.at).await;
    let (client, mut server) = session(rw, &fake).await;
    client.set_zero_linger().unwrap();
    drop(client);
    assert_eq!(rest(&mut server).await, b"");
    let (mut client, server) = session(rw, &fake).await;
    server.set_zero_linger().unwrap();
    drop(server);
    assert_eq!(rest(&mut client).await, b"");
    drop(client);
    eventually(|| world.router.connections() == 0).await;
}

#[tokio::test]
async fn a_server_may_be_known_by_name() {
    let mut world = World::new(limits());
    let rw = world.open(port(Target::Leader)).await;
    let fake = Fake::start().await;
    let by_name = format!("localhost:{}", fake.at.port());
    world.lead("a", fake.at).await;
    world
        .change(|view| {
            let record = view.members.get_mut(&"a".into()).unwrap();
            record.conn_url = Some(format!("postgres://{by_name}/postgres"));
        })
        .await;
    session(rw, &fake).await;
}
