//! What a port can be told: whom it leads to, how it chooses, how many it lets in.

#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use common::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream, UnixStream};
use trunkline_common::{Clock, Lsn, SystemClock};
use trunkline_config::router::{Balance, Lag, Limits, Listen, NoCandidate, Port, Target};
use trunkline_router::sessions::Line;

/// A session that some server of several has taken.
async fn served(to: std::net::SocketAddr, servers: &[&Fake]) -> (usize, TcpStream, TcpStream) {
    let mut client = connect(to, STARTUP).await;
    let sessions = servers.iter().map(|server| Box::pin(server.session()));
    let ((session, _), which, _) = within(futures::future::select_all(sessions)).await;
    assert_eq!(within(client.read_u8()).await.unwrap(), b'R');
    (which, client, session)
}

#[tokio::test]
async fn a_standby_too_far_behind_gets_no_new_sessions_and_then_loses_its_old_ones() {
    let mut world = World::new(limits());
    let lag = |bytes| Lag { bytes: Some(bytes), time: None };
    let ro = world.open(Port { max_lag: lag(100), end_lag: lag(500), ..port(Target::Replica) }).await;
    let any_lag = world.open(port(Target::Any)).await;
    let server = Fake::start().await;
    world.follow("b", server.at).await;
    let (mut client, mut at_server) = session(ro, &server).await;
    let (mut careless, mut careless_at_server) = session(any_lag, &server).await;
    let position = |lsn| {
        move |view: &mut trunkline_common::ClusterView| {
            view.members.get_mut(&"b".into()).unwrap().xlog_location = Some(Lsn(lsn));
        }
    };
    world.change(position(800)).await;
    let _held = connect(ro, STARTUP).await;
    world.held(1).await;
    passes(&mut client, &mut at_server, b"between the thresholds").await;
    world.change(position(400)).await;
    assert_eq!(rest(&mut client).await, b"");
    passes(&mut careless, &mut careless_at_server, b"a port without a limit").await;
    let text = world.router.metrics.render().unwrap();
    assert!(text.contains("ended_total{member=\"b\",port=\"replica\",reason=\"lag\"} 1"), "{text}");
    world.change(position(950)).await;
    server.session().await;
}

#[tokio::test]
async fn lag_in_time_is_that_of_the_leaders_positions() {
    let mut world = World::new(limits());
    let time = Some(Duration::from_millis(300));
    let ro = Port { max_lag: Lag { bytes: None, time }, ..port(Target::Replica) };
    let ro = world.open(Port { end_lag: Lag { bytes: None, time }, ..ro }).await;
    let (leader, server) = (Fake::start().await, Fake::start().await);
    world.lead("a", leader.at).await;
    world.follow("b", server.at).await;
    let (mut client, _at_server) = session(ro, &server).await;
    let ahead = SystemClock.now();
    world.change(|view| view.status.optime = Lsn(1_001)).await;
    assert_eq!(rest(&mut client).await, b"");
    let after = SystemClock.now().since(ahead);
    assert!(after > Duration::from_millis(300), "{after:?}");
    let _held = connect(ro, STARTUP).await;
    world.held(1).await;
    world.change(|view| view.members.get_mut(&"b".into()).unwrap().xlog_location = Some(Lsn(1_001))).await;
    server.session().await;
}

#[tokio::test]
async fn sessions_end_on_a_standby_that_is_down_where_the_port_says_so() {
    let mut world = World::new(limits());
    let impatient = Port { end_down_time: Some(Duration::from_millis(300)), ..port(Target::Replica) };
    let (ro, any) = (world.open(impatient).await, world.open(port(Target::Any)).await);
    let (leader, b) = (Fake::start().await, Fake::start().await);
    world.follow("b", b.at).await;
    let (mut client, _at_server) = session(ro, &b).await;
    let (mut patient, mut patient_at_server) = session(any, &b).await;
    world.lead("a", leader.at).await;
    // Back in time: nothing happens.
    world.change(|view| drop(view.members.remove(&"b".into()))).await;
    world.follow("b", b.at).await;
    let down = SystemClock.now();
    world.change(|view| drop(view.members.remove(&"b".into()))).await;
    assert_eq!(rest(&mut client).await, b"");
    let after = SystemClock.now().since(down);
    assert!(after > Duration::from_millis(300), "{after:?}");
    passes(&mut patient, &mut patient_at_server, b"Q").await;
    let text = world.router.metrics.render().unwrap();
    assert!(text.contains("ended_total{member=\"b\",port=\"replica\",reason=\"down\"} 1"), "{text}");
}

#[tokio::test]
async fn tags_narrow_the_choice() {
    let mut world = World::new(limits());
    let tags = [("zone".to_owned(), vec!["x".to_owned()])].into();
    let ro = world.open(Port { tags, ..port(Target::Replica) }).await;
    let (b, c) = (Fake::start().await, Fake::start().await);
    world.follow("b", b.at).await;
    let _held = connect(ro, STARTUP).await;
    world.held(1).await;
    b.stays_alone().await;
    world
        .change(|view| {
            let mut tagged = member("replica", c.at);
            tagged.tags.insert("zone".into(), "x".into());
            view.members.insert("c".into(), tagged);
        })
        .await;
    c.session().await;
}

#[tokio::test]
async fn servers_take_turns_or_keep_their_clients() {
    let mut world = World::new(limits());
    let (b, c, d) = (Fake::start().await, Fake::start().await, Fake::start().await);
    for (name, server) in [("b", &b), ("c", &c), ("d", &d)] {
        world.follow(name, server.at).await;
    }
    let turns = world.open(Port { balance: Balance::RoundRobin, ..port(Target::Replica) }).await;
    let mut chosen = Vec::new();
    for _ in 0..6 {
        chosen.push(served(turns, &[&b, &c, &d]).await.0);
    }
    assert_eq!(chosen, [0, 1, 2, 0, 1, 2]);
    let sticky = world.open(Port { balance: Balance::ClientAddress, ..port(Target::Any) }).await;
    let first = served(sticky, &[&b, &c, &d]).await.0;
    for _ in 0..5 {
        assert_eq!(served(sticky, &[&b, &c, &d]).await.0, first);
    }
    // Its server goes away: to another one, and always the same.
    let (name, _) = [("b", &b), ("c", &c), ("d", &d)][first];
    world.change(|view| drop(view.members.remove(&name.into()))).await;
    let second = served(sticky, &[&b, &c, &d]).await.0;
    assert_ne!(second, first);
    assert_eq!(served(sticky, &[&b, &c, &d]).await.0, second);
}

#[tokio::test]
async fn a_client_can_choose_by_a_start_up_parameter() {
    let mut world = World::new(limits());
    let one = world.open(Port { choice: true, ..port(Target::Leader) }).await;
    let (leader, standby) = (Fake::start().await, Fake::start().await);
    world.lead("a", leader.at).await;
    world.follow("b", standby.at).await;
    session(one, &leader).await;
    let reader = startup(&[("options", "-c trunkline.target=replica")]);
    let mut client = connect(one, &reader).await;
    let (mut at_standby, packet) = standby.session().await;
    assert_eq!(packet, reader, "to the server it is a setting like any other");
    assert_eq!(within(client.read_u8()).await.unwrap(), b'R');
    passes(&mut client, &mut at_standby, b"Q").await;
    let mut nonsense = connect(one, &startup(&[("trunkline.target", "elsewhere")])).await;
    assert_eq!(refused(&mut nonsense).await, "22023");
    // Who was denied TLS by the leader is not left there.
    let mut denied = connect(one, SSL_REQUEST).await;
    let (mut at_leader, _) = leader.request().await;
    at_leader.write_all(b"N").await.unwrap();
    assert_eq!(within(denied.read_u8()).await.unwrap(), b'N');
    denied.write_all(&reader).await.unwrap();
    assert_eq!(rest(&mut at_leader).await, b"");
    let (mut at_standby, packet) = standby.request().await;
    assert_eq!(packet, SSL_REQUEST);
    at_standby.write_all(b"N").await.unwrap();
    let mut got = vec![0; reader.len()];
    within(at_standby.read_exact(&mut got)).await.unwrap();
    assert_eq!(got, reader);
    // A port that does not offer it passes it on.
    let plain = world.open(Port { name: "plain".into(), ..port(Target::Leader) }).await;
    let _client = connect(plain, &reader).await;
    assert_eq!(leader.session().await.1, reader);
}

#[tokio::test]
async fn a_full_port_lets_clients_wait_and_others_pass() {
    let mut world = World::new(limits());
    let leader = Fake::start().await;
    world.lead("a", leader.at).await;
    let small = world.open(Port { max_sessions: Some(1), ..port(Target::Leader) }).await;
    let other = world.open(port(Target::Any)).await;
    let (first, at_leader) = session(small, &leader).await;
    let mut waiting = connect(small, STARTUP).await;
    leader.stays_alone().await;
    session(other, &leader).await;
    let own = first.local_addr().unwrap();
    // Clients of different ports may have the same address: only both together are one connection's.
    let is_first = |line: &Line| line.client.to_string() == own.to_string() && &*line.port == "leader";
    let (lines, more) = world.router.sessions.list(10, is_first);
    assert_eq!((lines.len(), more), (1, 0), "{lines:?}");
    assert_eq!(lines[0].from, Some(at_leader.peer_addr().unwrap()), "as the server sees it");
    drop((first, at_leader));
    leader.session().await;
    assert_eq!(within(waiting.read_u8()).await.unwrap(), b'R');
}

#[tokio::test]
async fn one_address_does_not_take_all_places() {
    let mut world = World::new(limits());
    let leader = Fake::start().await;
    world.lead("a", leader.at).await;
    let rw = world.open(Port { max_per_client: Some(2), ..port(Target::Leader) }).await;
    let (first, _) = session(rw, &leader).await;
    let _second = session(rw, &leader).await;
    let mut third = connect(rw, STARTUP).await;
    assert_eq!(refused(&mut third).await, "53300");
    let mut tls = connect(rw, SSL_REQUEST).await;
    assert_eq!(within(tls.read_u8()).await.unwrap(), b'N', "it is told why only after that");
    tls.write_all(STARTUP).await.unwrap();
    assert_eq!(refused(&mut tls).await, "53300");
    // Whoever has heard it leaves.
    drop((third, tls));
    eventually(|| world.router.connections() == 2).await;
    let mut cancel = connect(rw, CANCEL).await;
    drop(leader.request().await);
    assert_eq!(rest(&mut cancel).await, b"", "cancel requests are not sessions");
    drop(first);
    eventually(|| world.router.sessions.len() == 1).await;
    session(rw, &leader).await;
}

#[tokio::test]
async fn one_address_does_not_take_all_places_by_saying_nothing() {
    let mut world = World::new(Limits { max_sessions: 3, ..limits() });
    let leader = Fake::start().await;
    world.lead("a", leader.at).await;
    let rw = world.open(Port { max_per_client: Some(2), startup_timeout: 3 * PATIENCE, ..port(Target::Leader) }).await;
    let mut silent = Vec::new();
    for _ in 0..3 {
        silent.push(within(TcpStream::connect(rw)).await.unwrap());
    }
    eventually(|| world.router.connections() == 3).await;
    let other = TcpSocket::new_v4().unwrap();
    other.bind("127.0.0.2:0".parse().unwrap()).unwrap();
    let mut other = within(other.connect(rw)).await.unwrap();
    other.write_all(STARTUP).await.unwrap();
    let _served = leader.session().await;
    assert_eq!(rest(&mut silent[2]).await, b"", "the one that was too many");
}

#[tokio::test]
async fn who_is_too_many_is_heard_unless_there_are_as_many_of_those() {
    let mut world = World::new(limits());
    let leader = Fake::start().await;
    world.lead("a", leader.at).await;
    let rw = world.open(Port { max_per_client: Some(1), ..port(Target::Leader) }).await;
    let _first = session(rw, &leader).await;
    let mut second = within(TcpStream::connect(rw)).await.unwrap();
    eventually(|| world.router.connections() == 2).await;
    let mut third = connect(rw, STARTUP).await;
    assert_eq!(rest(&mut third).await, b"");
    second.write_all(STARTUP).await.unwrap();
    assert_eq!(refused(&mut second).await, "53300");
}

#[tokio::test]
async fn connections_are_accepted_at_a_rate() {
    let mut world = World::new(limits());
    let leader = Fake::start().await;
    world.lead("a", leader.at).await;
    let rw = world.open(Port { accept_rate: Some(20), ..port(Target::Leader) }).await;
    let began = SystemClock.now();
    let mut clients = Vec::new();
    for _ in 0..6 {
        clients.push(session(rw, &leader).await);
    }
    let took = SystemClock.now().since(began);
    assert!(took >= Duration::from_millis(195), "four gaps of 50 ms at least: {took:?}");
}

#[tokio::test]
async fn by_unix_socket_and_by_ipv6() {
    let mut world = World::new(limits());
    let leader = Fake::start().await;
    world.lead("a", leader.at).await;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(".s.PGSQL.5000");
    world.open(Port { listen: vec![Listen::Unix(path.clone())], ..port(Target::Leader) }).await;
    let mut client = within(UnixStream::connect(&path)).await.unwrap();
    client.write_all(STARTUP).await.unwrap();
    let (mut at_server, _) = leader.session().await;
    assert_eq!(within(client.read_u8()).await.unwrap(), b'R');
    // Enough of it to be spliced.
    let bytes = vec![7; 8 << 20];
    let (mut up, mut down) = (vec![0; bytes.len()], vec![0; bytes.len()]);
    {
        let (mut reading, mut writing) = client.split();
        let (mut server_reading, mut server_writing) = at_server.split();
        let all = async {
            tokio::try_join!(
                writing.write_all(&bytes),
                server_writing.write_all(&bytes),
                server_reading.read_exact(&mut up),
                reading.read_exact(&mut down),
            )
        };
        within(all).await.unwrap();
    }
    assert!(up == bytes && down == bytes);
    drop(client);
    assert_eq!(rest(&mut at_server).await, b"");
    let v6 = Port { name: "v6".into(), listen: vec![Listen::Tcp("[::1]:0".into())], ..port(Target::Leader) };
    let v6 = world.open(v6).await;
    session(v6, &leader).await;
}

#[tokio::test]
async fn without_a_candidate_the_ports_policy_counts() {
    let mut world = World::new(limits());
    let leader = Fake::start().await;
    world.lead("a", leader.at).await;
    let leader_instead = Port { no_candidate: NoCandidate::Leader, ..port(Target::Sync) };
    let leader_instead = world.open(leader_instead).await;
    let refusing = world.open(Port { no_candidate: NoCandidate::Refuse, ..port(Target::Async) }).await;
    session(leader_instead, &leader).await;
    let mut client = connect(refusing, STARTUP).await;
    assert_eq!(refused(&mut client).await, "57P03");
}
