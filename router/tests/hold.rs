//! Connections that come while there is no server: held, released, refused, forgotten.

#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use common::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use trunkline_common::{Clock, SystemClock};
use trunkline_config::router::{Balance, Limits, NoCandidate, Port, Proxied, Target};

#[tokio::test]
async fn a_client_without_a_leader_is_held_and_then_served() {
    let mut world = World::new(limits());
    let rw = world.open(port(Target::Leader)).await;
    let server = Fake::start().await;
    let mut client = connect(rw, STARTUP).await;
    world.held(1).await;
    world.follow("a", server.at).await;
    server.stays_alone().await;
    let published = SystemClock.now();
    world.lead("a", server.at).await;
    let (mut session, packet) = server.session().await;
    let took = SystemClock.now().since(published);
    assert_eq!(packet, STARTUP, "the client's own bytes");
    assert!(took < Duration::from_millis(250), "released on the event, not by a timer: {took:?}");
    assert_eq!(within(client.read_u8()).await.unwrap(), b'R');
    passes(&mut client, &mut session, b"p").await;
    world.held(0).await;
}

#[tokio::test]
async fn an_elected_standby_is_told_nothing_before_it_says_primary() {
    let mut world = World::new(limits());
    let rw = world.open(port(Target::Leader)).await;
    let server = Fake::start().await;
    world
        .change(|view| {
            view.leader = Some(key("a", view.revision));
            view.members.insert("a".into(), member("replica", server.at));
        })
        .await;
    let _client = connect(rw, STARTUP).await;
    world.held(1).await;
    let mut ahead = server.connection().await;
    assert!(tokio::time::timeout(Duration::from_millis(100), ahead.read_u8()).await.is_err());
    world.lead("a", server.at).await;
    assert_eq!(within(ahead.read_u32()).await.unwrap() as usize, STARTUP.len());
}

#[tokio::test]
async fn expiry_is_told_with_an_sqlstate() {
    let world = World::new(limits());
    let rw = world.open(Port { hold_timeout: Duration::from_millis(150), ..port(Target::Leader) }).await;
    let mut plain = connect(rw, STARTUP).await;
    assert_eq!(refused(&mut plain).await, "57P03");
    // Who asked for TLS hears "no" and then the reason, in answer to its start-up packet.
    let mut tls = connect(rw, SSL_REQUEST).await;
    assert_eq!(within(tls.read_u8()).await.unwrap(), b'N');
    tls.write_all(STARTUP).await.unwrap();
    assert_eq!(refused(&mut tls).await, "57P03");
    world.held(0).await;
}

#[tokio::test]
async fn a_client_that_goes_away_gives_its_place_back_at_once() {
    let world = World::new(limits());
    let rw = world.open(port(Target::Leader)).await;
    let clients = [connect(rw, STARTUP).await, connect(rw, SSL_REQUEST).await];
    world.held(2).await;
    drop(clients);
    world.held(0).await;
    eventually(|| world.router.connections() == 0).await;
}

#[tokio::test]
async fn a_client_that_talks_and_then_goes_away_is_noticed_too() {
    let world = World::new(limits());
    let rw = world.open(port(Target::Leader)).await;
    let mut client = connect(rw, STARTUP).await;
    world.held(1).await;
    client.write_all(b"p\0\0\0\x05\0").await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(world.router.hold.held(), 1, "talking ahead is allowed after a start-up packet");
    drop(client);
    world.held(0).await;
}

#[tokio::test]
async fn early_data_is_refused() {
    let mut world = World::new(limits());
    let rw = world.open(port(Target::Leader)).await;
    // While it is held …
    let mut held = connect(rw, SSL_REQUEST).await;
    world.held(1).await;
    held.write_all(STARTUP).await.unwrap();
    assert_eq!(refused(&mut held).await, "08P01");
    // … and when there is a server.
    let server = Fake::start().await;
    world.lead("a", server.at).await;
    let mut early = connect(rw, &[SSL_REQUEST, STARTUP].concat()).await;
    assert_eq!(refused(&mut early).await, "08P01");
    server.stays_alone().await;
}

#[tokio::test]
async fn places_are_bounded() {
    let mut world = World::new(Limits { max_held: 2, ..limits() });
    let rw = world.open(port(Target::Leader)).await;
    let held = [connect(rw, STARTUP).await, connect(rw, STARTUP).await];
    world.held(2).await;
    let mut third = connect(rw, STARTUP).await;
    assert_eq!(refused(&mut third).await, "53300");
    let server = Fake::start().await;
    world.lead("a", server.at).await;
    for _ in held {
        server.session().await;
    }
}

#[tokio::test]
async fn held_clients_are_let_go_at_a_pace_and_the_first_at_once() {
    let mut world = World::new(Limits { release_rate: 20, ..limits() });
    let rw = world.open(port(Target::Leader)).await;
    let mut clients = Vec::new();
    for _ in 0..6 {
        clients.push(connect(rw, STARTUP).await);
    }
    world.held(6).await;
    let server = Fake::start().await;
    let published = SystemClock.now();
    world.lead("a", server.at).await;
    let mut sessions = vec![server.session().await];
    let first = SystemClock.now().since(published);
    assert!(first < Duration::from_millis(45), "{first:?}");
    for _ in 1..6 {
        sessions.push(server.session().await);
    }
    let last = SystemClock.now().since(published);
    assert!(last >= Duration::from_millis(245), "five gaps of 50 ms: {last:?}");
}

#[tokio::test]
async fn every_server_is_tried_before_a_client_is_refused_or_waits() {
    let mut world = World::new(limits());
    for (no_candidate, balance) in [
        (NoCandidate::Refuse, Balance::TwoChoices),
        (NoCandidate::Refuse, Balance::ClientAddress),
        (NoCandidate::Hold, Balance::RoundRobin),
    ] {
        let ro = world.open(Port { no_candidate, balance, ..port(Target::Replica) }).await;
        for down in ["a", "b", "c", "d", "e", "f", "g"] {
            let nobody = Fake::start().await;
            world.follow(down, nobody.at).await;
        }
        let up = Fake::start().await;
        world.follow("h", up.at).await;
        for _ in 0..5 {
            let client = connect(ro, STARTUP).await;
            up.session().await;
            drop(client);
        }
    }
    assert!(!world.router.metrics.render().unwrap().contains("hold_seconds_count"), "nobody had to wait");
}

#[tokio::test]
async fn a_port_that_refuses_gives_each_server_that_says_nothing_its_time_once() {
    let mut world = World::new(limits());
    let refusing = Port {
        no_candidate: NoCandidate::Refuse,
        connect_timeout: Duration::from_millis(200),
        ..port(Target::Replica)
    };
    let ro = world.open(refusing).await;
    let mut silent = Vec::new();
    for name in ["a", "b", "c", "d"] {
        let server = Fake::start().await;
        world.follow(name, server.at).await;
        silent.push(server);
    }
    let began = SystemClock.now();
    let mut client = connect(ro, STARTUP).await;
    assert_eq!(refused(&mut client).await, "57P03");
    let took = SystemClock.now().since(began);
    assert!((Duration::from_millis(800)..Duration::from_millis(2_500)).contains(&took), "{took:?} for four servers");
}

#[tokio::test]
async fn a_refused_connect_is_a_reason_to_wait_not_an_error() {
    let mut world = World::new(limits());
    let rw = world.open(port(Target::Leader)).await;
    let gone = Fake::start().await;
    let at = gone.at;
    drop(gone);
    world.lead("a", at).await;
    let _client = connect(rw, STARTUP).await;
    world.held(1).await;
    // It comes back where it was, without any news from the DCS …
    let listener = tokio::net::TcpListener::bind(at).await.unwrap();
    let accepted = within(listener.accept()).await.unwrap();
    drop(accepted);
    drop(listener);
    // … or another one is elected.
    let _second = connect(rw, STARTUP).await;
    world.held(1).await;
    let other = Fake::start().await;
    world.lead("b", other.at).await;
    other.session().await;
}

#[tokio::test]
async fn a_port_may_refuse_or_use_the_leader_instead() {
    let mut world = World::new(limits());
    let refusing = Port { no_candidate: NoCandidate::Refuse, ..port(Target::Replica) };
    let refusing = world.open(refusing).await;
    let mut client = connect(refusing, STARTUP).await;
    assert_eq!(refused(&mut client).await, "57P03");
    let leader = Fake::start().await;
    world.lead("a", leader.at).await;
    let falling_back = world.open(Port { no_candidate: NoCandidate::Leader, ..port(Target::Replica) }).await;
    session(falling_back, &leader).await;
    let standby = Fake::start().await;
    world.follow("b", standby.at).await;
    session(falling_back, &standby).await;
}

#[tokio::test]
async fn a_server_that_takes_no_sessions_now_is_waited_for() {
    let mut world = World::new(limits());
    let rw = world.open(port(Target::Leader)).await;
    let (stopping, other) = (Fake::start().await, Fake::start().await);
    world.lead("a", stopping.at).await;
    let mut client = connect(rw, STARTUP).await;
    let (mut session, _) = stopping.request().await;
    session.write_all(&error("57P03")).await.unwrap();
    world.held(1).await;
    // In a piece or two, or without a word: the same.
    let (mut session, _) = stopping.request().await;
    session.write_all(&error("57P03")[..9]).await.unwrap();
    session.write_all(&error("57P03")[9..]).await.unwrap();
    drop(stopping.request().await);
    world.lead("b", other.at).await;
    let (mut session, packet) = other.session().await;
    assert_eq!(packet, STARTUP);
    assert_eq!(within(client.read_u8()).await.unwrap(), b'R', "the first thing it hears");
    passes(&mut client, &mut session, b"p").await;
    // Any other error is the client's business.
    let mut client = connect(rw, STARTUP).await;
    other.request().await.0.write_all(&error("28000")).await.unwrap();
    assert_eq!(refused(&mut client).await, "28000");
}

#[tokio::test]
async fn a_client_that_was_denied_encryption_can_still_be_moved() {
    let mut world = World::new(limits());
    let rw = world.open(port(Target::Leader)).await;
    let (a, b) = (Fake::start().await, Fake::start().await);
    world.lead("a", a.at).await;
    let mut client = connect(rw, SSL_REQUEST).await;
    let (mut at_a, packet) = a.request().await;
    assert_eq!(packet, SSL_REQUEST);
    at_a.write_all(b"N").await.unwrap();
    assert_eq!(within(client.read_u8()).await.unwrap(), b'N');
    client.write_all(STARTUP).await.unwrap();
    let mut startup = vec![0; STARTUP.len()];
    within(at_a.read_exact(&mut startup)).await.unwrap();
    assert_eq!(startup, STARTUP, "on the same connection");
    at_a.write_all(&error("57P03")).await.unwrap();
    world.held(1).await;
    world.lead("b", b.at).await;
    let (mut at_b, packet) = b.request().await;
    assert_eq!(packet, SSL_REQUEST);
    at_b.write_all(b"N").await.unwrap();
    within(at_b.read_exact(&mut startup)).await.unwrap();
    assert_eq!(startup, STARTUP);
    at_b.write_all(b"R").await.unwrap();
    assert_eq!(within(client.read_u8()).await.unwrap(), b'R', "and no second N");
    passes(&mut client, &mut at_b, b"p").await;
    // Once is enough.
    let mut client = connect(rw, SSL_REQUEST).await;
    let (mut at_b, _) = b.request().await;
    at_b.write_all(b"N").await.unwrap();
    assert_eq!(within(client.read_u8()).await.unwrap(), b'N');
    client.write_all(SSL_REQUEST).await.unwrap();
    assert_eq!(refused(&mut client).await, "08P01");
}

#[tokio::test]
async fn what_a_held_client_has_said_already_is_not_lost() {
    let mut world = World::new(limits());
    let rw = world.open(port(Target::Leader)).await;
    let mut client = connect(rw, STARTUP).await;
    world.held(1).await;
    client.write_all(b"said while held").await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    let server = Fake::start().await;
    world.lead("a", server.at).await;
    let (mut session, _) = server.session().await;
    let mut got = [0; 15];
    within(session.read_exact(&mut got)).await.unwrap();
    assert_eq!(&got, b"said while held");
}

#[tokio::test]
async fn slow_and_senseless_clients_are_bounded() {
    let world = World::new(limits());
    let rw = world.open(Port { startup_timeout: Duration::from_millis(100), ..port(Target::Leader) }).await;
    let mut slow = connect(rw, &STARTUP[..9]).await;
    assert_eq!(refused(&mut slow).await, "08P01");
    let mut silent = connect(rw, b"").await;
    assert_eq!(refused(&mut silent).await, "08P01");
    for (garbage, sqlstate) in [
        (&b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"[..], "08P01"),
        (&b"\xff\xff\xff\xff\xff\xff\xff\xff"[..], "08P01"),
        (&b"\0\0\0\x09\0\x02\0\0\0"[..], "0A000"),
        (&b"\0\0\0\x09\0\x03\0\0x"[..], "08P01"),
    ] {
        let mut client = connect(rw, garbage).await;
        assert_eq!(refused(&mut client).await, sqlstate, "{garbage:?}");
    }
    eventually(|| world.router.connections() == 0).await;
}

/// Sends `bytes` one by one, and stops when nobody listens any more.
async fn dribble(stream: &mut TcpStream, bytes: &[u8], pause: Duration) {
    for byte in bytes {
        if stream.write_all(&[*byte]).await.is_err() {
            return;
        }
        tokio::time::sleep(pause).await;
    }
}

#[tokio::test]
async fn who_dribbles_has_no_more_time_than_others_for_all_of_the_beginning() {
    let mut world = World::new(limits());
    let proxied = Proxied { networks: vec!["127.0.0.1/32".parse().unwrap()], unix: false };
    let startup_timeout = Duration::from_millis(600);
    let rw = world.open(Port { startup_timeout, proxied, ..port(Target::Leader) }).await;
    let server = Fake::start().await;
    world.lead("a", server.at).await;
    let began = SystemClock.now();
    let mut client = connect(rw, b"").await;
    // Each of them would be in time by itself.
    dribble(&mut client, b"PROXY UNKNOWN\r\n", Duration::from_millis(15)).await;
    dribble(&mut client, SSL_REQUEST, Duration::from_millis(25)).await;
    let (mut at_server, _) = server.request().await;
    at_server.write_all(b"N").await.unwrap();
    assert_eq!(within(client.read_u8()).await.unwrap(), b'N');
    let (mut reading, mut writing) = client.into_split();
    let dribbling = tokio::spawn(async move {
        for byte in STARTUP.iter().cycle() {
            tokio::time::sleep(Duration::from_millis(25)).await;
            if writing.write_all(&[*byte]).await.is_err() {
                break;
            }
        }
    });
    let mut answer = [0; 9];
    within(reading.read_exact(&mut answer)).await.unwrap();
    let took = SystemClock.now().since(began);
    assert!(answer.starts_with(b"E") && took < Duration::from_millis(900), "{answer:?} {took:?}");
    assert!(took > Duration::from_millis(590), "{took:?}");
    dribbling.abort();

    // To wait for a server is not the client's part.
    world.change(|view| view.leader = None).await;
    let mut client = connect(rw, &[b"PROXY UNKNOWN\r\n", SSL_REQUEST].concat()).await;
    world.held(1).await;
    tokio::time::sleep(Duration::from_millis(700)).await;
    world.lead("a", server.at).await;
    let (mut at_server, _) = server.request().await;
    at_server.write_all(b"N").await.unwrap();
    assert_eq!(within(client.read_u8()).await.unwrap(), b'N');
    passes(&mut client, &mut at_server, STARTUP).await;
}

#[tokio::test]
async fn draining_refuses_the_held_and_waits_for_sessions() {
    let mut world = World::new(limits());
    let rw = world.open(port(Target::Leader)).await;
    let ro = world.open(port(Target::Replica)).await;
    let server = Fake::start().await;
    world.lead("a", server.at).await;
    let (client, server_end) = session(rw, &server).await;
    let mut held = connect(ro, STARTUP).await;
    world.held(1).await;
    let router = world.router.clone();
    let drained = tokio::spawn(async move { router.drain(Some(PATIENCE), false).await });
    assert_eq!(refused(&mut held).await, "57P03");
    assert!(!drained.is_finished(), "the session goes on");
    drop((client, server_end));
    assert_eq!(within(drained).await.unwrap(), 0, "over as soon as the last session is");
}

#[tokio::test]
async fn draining_ends_what_takes_too_long() {
    let mut world = World::new(limits());
    let rw = world.open(port(Target::Leader)).await;
    let server = Fake::start().await;
    world.lead("a", server.at).await;
    let (mut unknown, _unknown_end) = session(rw, &server).await;
    let (mut idle, mut idle_end) = started(rw, &server).await;
    let (mut writer, mut writer_end) = started(rw, &server).await;
    let (mut forever, mut forever_end) = started(rw, &server).await;
    for (client, server) in [(&mut writer, &mut writer_end), (&mut forever, &mut forever_end)] {
        passes(client, server, &message(b'Q', b"insert\0")).await;
    }
    let router = world.router.clone();
    let drained = tokio::spawn(async move { router.drain(Some(Duration::from_millis(50)), false).await });
    // Told why, where nothing is lost by it.
    assert_eq!(refused(&mut idle).await, "57P01");
    assert_eq!(rest(&mut idle_end).await, b"");
    let answer = message(b'Z', b"I");
    writer_end.write_all(&answer).await.unwrap();
    within(writer.read_exact(&mut vec![0; answer.len()])).await.unwrap();
    assert_eq!(refused(&mut writer).await, "57P01");
    // Neither what can't be followed nor what does not end is waited for.
    assert_eq!((rest(&mut unknown).await, rest(&mut forever).await), (vec![], vec![]));
    assert_eq!(within(drained).await.unwrap(), 4);
    let ended = &world.router.metrics.ended;
    eventually(|| ended.with_label_values(&["leader", "a", "drained"]).get() == 4).await;
}

#[tokio::test]
async fn those_who_are_held_outlast_a_hand_over() {
    let mut world = World::new(limits());
    let rw = world.open(port(Target::Leader)).await;
    let server = Fake::start().await;
    let mut held = connect(rw, STARTUP).await;
    world.held(1).await;
    let router = world.router.clone();
    let drained = tokio::spawn(async move { router.drain(Some(PATIENCE), true).await });
    eventually(|| world.router.is_draining()).await;
    world.lead("a", server.at).await;
    let (session, _) = server.session().await;
    assert_eq!(within(held.read_u8()).await.unwrap(), b'R');
    drop((session, held));
    assert_eq!(within(drained).await.unwrap(), 0);
}

/// Impatient enough for a test.
fn impatient(target: Target) -> Port {
    let (hold_timeout, connect_timeout) = (Duration::from_millis(800), Duration::from_millis(200));
    Port { hold_timeout, connect_timeout, ..port(target) }
}

/// How long it took until the client was refused, and with what.
async fn until_refused(client: &mut TcpStream) -> (String, Duration) {
    let began = SystemClock.now();
    let why = refused(client).await;
    (why, SystemClock.now().since(began))
}

#[tokio::test]
async fn who_waits_for_a_silent_server_is_held_after_connect_timeout() {
    let mut world = World::new(Limits { max_held: 1, ..limits() });
    let rw = world.open(impatient(Target::Leader)).await;
    let refusing = Port { name: "refusing".into(), no_candidate: NoCandidate::Refuse, ..impatient(Target::Leader) };
    let refusing = world.open(refusing).await;
    let frozen = Fake::start().await;
    world.lead("a", frozen.at).await;
    let mut client = connect(rw, STARTUP).await;
    let _silent = frozen.request().await;
    assert_eq!(world.router.hold.held(), 0, "it may just be slow");
    world.held(1).await;
    // Nobody else finds a place, or wants one.
    let (mut second, mut third) = (connect(rw, STARTUP).await, connect(refusing, STARTUP).await);
    let (full, no) = tokio::join!(until_refused(&mut second), until_refused(&mut third));
    assert_eq!((full.0.as_str(), no.0.as_str()), ("53300", "57P03"));
    assert!(full.1.max(no.1) < Duration::from_millis(500), "{full:?}, {no:?}");
    let (why, took) = until_refused(&mut client).await;
    assert_eq!(why, "57P03");
    assert!(took < Duration::from_millis(1_000), "{took:?}");
    world.held(0).await;
    let text = world.router.metrics.render().unwrap();
    for line in [
        "hold_seconds_count{outcome=\"expired\",port=\"leader\"} 1",
        "hold_seconds_count{outcome=\"full\",port=\"leader\"} 1",
        "connects_total{member=\"a\",result=\"silent\"} 3",
    ] {
        assert!(text.contains(line), "{line}: {text}");
    }
}

#[tokio::test]
async fn a_slow_server_is_waited_for_on_the_same_connection() {
    let mut world = World::new(limits());
    let rw = world.open(impatient(Target::Leader)).await;
    let slow = Fake::start().await;
    world.lead("a", slow.at).await;
    let mut client = connect(rw, STARTUP).await;
    let (mut session, _) = slow.request().await;
    world.held(1).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    session.write_all(b"R").await.unwrap();
    assert_eq!(within(client.read_u8()).await.unwrap(), b'R');
    passes(&mut client, &mut session, b"p").await;
    world.held(0).await;
    slow.stays_alone().await;
}

#[tokio::test]
async fn who_has_been_held_is_not_held_anew_by_a_silent_server() {
    let mut world = World::new(limits());
    let rw = world.open(impatient(Target::Leader)).await;
    let mut client = connect(rw, STARTUP).await;
    let began = SystemClock.now();
    world.held(1).await;
    tokio::time::sleep(Duration::from_millis(700)).await;
    let frozen = Fake::start().await;
    world.lead("a", frozen.at).await;
    let _silent = frozen.request().await;
    assert_eq!(refused(&mut client).await, "57P03");
    let took = SystemClock.now().since(began);
    assert!(took < Duration::from_millis(1_150), "hold_timeout and one connect_timeout: {took:?}");
    // Nor by one that denies it encryption first.
    let mut client = connect(rw, SSL_REQUEST).await;
    let began = SystemClock.now();
    let (mut session, _) = frozen.request().await;
    world.held(1).await;
    tokio::time::sleep(Duration::from_millis(400)).await;
    session.write_all(b"N").await.unwrap();
    assert_eq!(within(client.read_u8()).await.unwrap(), b'N');
    client.write_all(STARTUP).await.unwrap();
    assert_eq!(refused(&mut client).await, "57P03");
    let took = SystemClock.now().since(began);
    assert!(took < Duration::from_millis(1_400), "one hold_timeout, and a connect_timeout for each request: {took:?}");
}

#[tokio::test]
async fn among_silent_servers_the_one_that_answers_is_found() {
    let mut world = World::new(limits());
    let ro = world.open(Port { name: "ro".into(), ..impatient(Target::Replica) }).await;
    let servers = [Fake::start().await, Fake::start().await, Fake::start().await];
    for (name, server) in ["a", "b", "c"].iter().zip(&servers) {
        world.follow(name, server.at).await;
    }
    let [silent, mute, good] = servers;
    let mut clients = Vec::new();
    for _ in 0..8 {
        let mut client = connect(ro, STARTUP).await;
        let (mut session, _) = within(good.request()).await;
        session.write_all(b"R").await.unwrap();
        assert_eq!(within(client.read_u8()).await.unwrap(), b'R');
        clients.push((client, session));
    }
    drop((silent, mute));
}

#[tokio::test]
async fn direct_tls_is_no_session_before_the_server_has_said_something() {
    let mut world = World::new(limits());
    let rw = world.open(impatient(Target::Leader)).await;
    let (frozen, leader) = (Fake::start().await, Fake::start().await);
    world.lead("a", frozen.at).await;
    // It comes in pieces, as one with many keys does.
    let (head, tail) = CLIENT_HELLO.split_at(7);
    let mut client = connect(rw, head).await;
    client.write_all(tail).await.unwrap();
    let mut silent = frozen.connection().await;
    world.held(1).await;
    within(silent.read_exact(&mut [0; CLIENT_HELLO.len()])).await.unwrap();
    world.lead("b", leader.at).await;
    let mut server = leader.connection().await;
    let mut hello = [0; CLIENT_HELLO.len()];
    within(server.read_exact(&mut hello)).await.unwrap();
    assert_eq!(hello, CLIENT_HELLO);
    passes(&mut server, &mut client, b"\x16\x03\x03").await;
    passes(&mut client, &mut server, b"\x17\x03\x03").await;
    world.held(0).await;
    // One that does not know it closes, and the client hears of that at once.
    let mut client = connect(rw, CLIENT_HELLO).await;
    let mut old = leader.connection().await;
    within(old.read_exact(&mut hello)).await.unwrap();
    drop(old);
    assert_eq!(rest(&mut client).await, b"");
    leader.stays_alone().await;
}
