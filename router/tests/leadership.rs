//! What a change of leadership does to sessions, and what it must not do.

#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use common::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use trunkline_common::Revision;
use trunkline_config::router::{KnownMember, Limits, NoCandidate, Port, Target};
use trunkline_router::heard;

/// The session is over for the client at once, and its server gets nothing more.
async fn is_ended(client: &mut TcpStream, server: &mut TcpStream) {
    let _ = client.write_all(b"COMMIT").await;
    assert_eq!(rest(client).await, b"");
    assert_eq!(rest(server).await, b"", "not another byte");
}

#[tokio::test]
async fn sessions_of_a_deposed_leader_end_at_once() {
    for what in ["another leader", "key gone", "demoted", "key created anew"] {
        let mut world = World::new(limits());
        let rw = world.open(port(Target::Leader)).await;
        let (old, new) = (Fake::start().await, Fake::start().await);
        world.lead("a", old.at).await;
        // The old server does not read, answer or close: frozen, with a healthy connection.
        let (mut client, mut frozen) = session(rw, &old).await;
        world
            .change(|view| match what {
                "another leader" => {
                    view.leader = Some(key("b", view.revision));
                    view.members.insert("b".into(), member("primary", new.at));
                }
                "key gone" => view.leader = None,
                "demoted" => view.members.get_mut(&"a".into()).unwrap().role = "demoted".into(),
                _ => view.leader = Some(key("a", view.revision)),
            })
            .await;
        is_ended(&mut client, &mut frozen).await;
        eventually(|| world.router.sessions.is_empty() && world.router.connections() == 0).await;
        let text = world.router.metrics.render().unwrap();
        assert!(
            text.contains("ended_total{member=\"a\",port=\"leader\",reason=\"leader_changed\"} 1"),
            "{what}: {text}"
        );
    }
}

#[tokio::test]
async fn what_is_no_change_of_leadership_ends_nothing() {
    let mut world = World::new(limits());
    let rw = world.open(port(Target::Leader)).await;
    let server = Fake::start().await;
    world.lead("a", server.at).await;
    let (mut client, mut held) = session(rw, &server).await;
    let at = server.at;
    world.change(|view| view.members.get_mut(&"a".into()).unwrap().xlog_location = None).await;
    world.change(|view| view.members.clear()).await;
    world.change(|view| drop(view.members.insert("a".into(), member("primary", at)))).await;
    world.change(|view| view.members.get_mut(&"a".into()).unwrap().state = "restarting".into()).await;
    world.change(|view| view.leader.as_mut().unwrap().modified = Revision(99)).await;
    world.change(|view| drop(view.members.insert("b".into(), member("primary", at)))).await;
    passes(&mut client, &mut held, b"still here").await;
    passes(&mut held, &mut client, b"so am I").await;
}

#[tokio::test]
async fn a_leader_that_restarts_gets_no_new_sessions() {
    let mut world = World::new(limits());
    let rw = world.open(port(Target::Leader)).await;
    let server = Fake::start().await;
    world.lead("a", server.at).await;
    world.change(|view| view.members.get_mut(&"a".into()).unwrap().state = "restarting".into()).await;
    let _client = connect(rw, STARTUP).await;
    world.held(1).await;
    server.stays_alone().await;
    world.change(|view| view.members.get_mut(&"a".into()).unwrap().state = "running".into()).await;
    server.session().await;
}

#[tokio::test]
async fn a_session_on_a_standby_that_is_promoted_and_deposed_ends_too() {
    let mut world = World::new(limits());
    let ro = world.open(port(Target::Replica)).await;
    let (a, b) = (Fake::start().await, Fake::start().await);
    world.lead("a", a.at).await;
    world.follow("b", b.at).await;
    let (mut client, mut server) = session(ro, &b).await;
    world.lead("b", b.at).await;
    passes(&mut client, &mut server, b"readers survive a promotion").await;
    world.lead("a", a.at).await;
    is_ended(&mut client, &mut server).await;
}

#[tokio::test]
async fn readers_of_standbys_and_of_the_leader_are_told_apart() {
    let mut world = World::new(limits());
    let any = world.open(Port { no_candidate: NoCandidate::Hold, ..port(Target::Any) }).await;
    let (a, b) = (Fake::start().await, Fake::start().await);
    world.lead("a", a.at).await;
    let (mut on_leader, mut leader_end) = session(any, &a).await;
    world.follow("b", b.at).await;
    let (mut on_standby, mut standby_end) = session(any, &b).await;
    world.change(|view| view.leader = None).await;
    is_ended(&mut on_leader, &mut leader_end).await;
    passes(&mut on_standby, &mut standby_end, b"nothing has changed here").await;
}

#[tokio::test]
async fn a_dial_to_a_frozen_host_is_given_up_when_another_leads() {
    let mut world = World::new(limits());
    let rw = world.open(Port { connect_timeout: PATIENCE, ..port(Target::Leader) }).await;
    // A listener whose queue is full drops what comes: the connect hangs as to a frozen host.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let frozen = socket.listen(0).unwrap();
    let at = frozen.local_addr().unwrap();
    let mut fill = Vec::new();
    while let Ok(Ok(stream)) = tokio::time::timeout(Duration::from_millis(200), TcpStream::connect(at)).await {
        fill.push(stream);
    }
    world.lead("a", at).await;
    let _client = connect(rw, STARTUP).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    let other = Fake::start().await;
    world.lead("b", other.at).await;
    other.session().await;
}

#[tokio::test]
async fn a_silent_dcs_keeps_sessions_and_asks_the_leader_for_new_ones() {
    let mut world = World::new(Limits { stale_after: Duration::from_millis(200), ..limits() });
    let rw = world.open(port(Target::Leader)).await;
    let server = Fake::start().await;
    let api = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/patroni", api.local_addr().unwrap());
    world.lead("a", server.at).await;
    world.change(|view| view.members.get_mut(&"a".into()).unwrap().api_url = Some(url)).await;
    let (mut client, mut held) = session(rw, &server).await;
    // Silence. The leader is asked, and first says that it is none.
    let (mut question, _) = within(api.accept()).await.unwrap();
    assert!(world.router.table().leader.is_none(), "unproven");
    let _newcomer = connect(rw, STARTUP).await;
    world.held(1).await;
    let mut request = vec![0; 1024];
    let read = within(question.read(&mut request)).await.unwrap();
    assert!(request[..read].starts_with(b"GET /primary HTTP/1."));
    question.write_all(b"HTTP/1.0 503 Service Unavailable\r\n\r\n{\"role\":\"replica\"}").await.unwrap();
    drop(question);
    server.stays_alone().await;
    // Asked again, it proves itself.
    let (mut question, _) = within(api.accept()).await.unwrap();
    within(question.read(&mut request)).await.unwrap();
    question.write_all(b"HTTP/1.0 200 OK\r\n\r\n{\"role\":\"primary\"}").await.unwrap();
    question.shutdown().await.unwrap();
    let (_newcomer_end, packet) = server.session().await;
    assert_eq!(packet, STARTUP);
    passes(&mut client, &mut held, b"never noticed").await;
    // The DCS is back, and with it a new leader: now the old sessions end.
    let other = Fake::start().await;
    world.lead("b", other.at).await;
    is_ended(&mut client, &mut held).await;
}

#[tokio::test]
async fn with_a_silent_dcs_another_member_can_prove_that_it_leads_now() {
    let mut world = World::new(Limits { stale_after: Duration::from_millis(200), ..limits() });
    let rw = world.open(port(Target::Leader)).await;
    let (a, b) = (Fake::start().await, Fake::start().await);
    let (deposed, elected) = (api("503 Service Unavailable", "replica").await, api("200 OK", "primary").await);
    world.lead("a", a.at).await;
    world.follow("b", b.at).await;
    let (mut client, mut server) = session(rw, &a).await;
    world
        .change(|view| {
            view.members.get_mut(&"a".into()).unwrap().api_url = Some(deposed);
            view.members.get_mut(&"b".into()).unwrap().api_url = Some(elected);
        })
        .await;
    eventually(|| world.router.table().reign.as_ref().is_some_and(|epoch| epoch.member == "b".into())).await;
    is_ended(&mut client, &mut server).await;
    let (mut client, mut server) = session(rw, &b).await;
    passes(&mut client, &mut server, b"hello").await;
}

#[tokio::test]
async fn a_router_that_never_reached_the_dcs_asks_the_members_it_knows() {
    let (a, b) = (Fake::start().await, Fake::start().await);
    let known = |name: &str, api_url: String, at: &Fake| KnownMember {
        name: name.into(),
        api_url,
        connect_address: at.at.to_string(),
    };
    let seed = heard::seed(&[
        known("a", api("503 Service Unavailable", "replica").await, &a),
        known("b", api("200 OK", "primary").await, &b),
    ]);
    let limits = Limits { stale_after: Duration::from_millis(200), ..limits() };
    let mut world = World::seeded(limits, Some(seed));
    let rw = world.open(port(Target::Leader)).await;
    let (mut client, mut server) = session(rw, &b).await;
    // The DCS comes back and confirms it: the session goes on.
    let at = b.at;
    world
        .change(|view| {
            view.leader = Some(key("b", view.revision));
            view.members.insert("b".into(), member("primary", at));
        })
        .await;
    eventually(|| world.router.table().leader.is_some()).await;
    passes(&mut client, &mut server, b"never noticed").await;
    world.lead("a", a.at).await;
    is_ended(&mut client, &mut server).await;
}

#[tokio::test]
async fn a_planned_switchover_ends_sessions_between_transactions() {
    let mut world = World::new(limits());
    let rw = world.open(port(Target::Leader)).await;
    let (a, b) = (Fake::start().await, Fake::start().await);
    world.lead("a", a.at).await;
    let (mut idle, mut idle_end) = started(rw, &a).await;
    let (mut writer, mut writer_end) = started(rw, &a).await;
    passes(&mut writer, &mut writer_end, &message(b'Q', b"insert\0")).await;
    let (mut within_one, mut within_end) = started(rw, &a).await;
    passes(&mut within_one, &mut within_end, &message(b'Q', b"begin\0")).await;
    passes(&mut within_end, &mut within_one, &[message(b'C', b"BEGIN\0"), message(b'Z', b"T")].concat()).await;
    // What it is can't be told: it did not begin as PostgreSQL's do.
    let (mut unknown, mut unknown_end) = session(rw, &a).await;
    world.stops("a").await;
    assert_eq!(refused(&mut idle).await, "57P01");
    assert_eq!(rest(&mut idle_end).await, b"", "its server is told nothing but the end");
    // A newcomer is held, and those in the middle of something go on to its end.
    let _newcomer = connect(rw, STARTUP).await;
    world.held(1).await;
    passes(&mut writer_end, &mut writer, &message(b'C', b"INSERT 0 1\0")).await;
    passes(&mut within_one, &mut within_end, &message(b'Q', b"commit\0")).await;
    passes(&mut unknown, &mut unknown_end, b"whatever").await;
    let answer = message(b'Z', b"I");
    writer_end.write_all(&answer).await.unwrap();
    let mut got = vec![0; answer.len()];
    within(writer.read_exact(&mut got)).await.unwrap();
    assert_eq!(got, answer, "its answer comes first");
    assert_eq!(refused(&mut writer).await, "57P01");
    within_end.write_all(&[message(b'C', b"COMMIT\0"), answer].concat()).await.unwrap();
    within(within_one.read_exact(&mut [0; 18])).await.unwrap();
    assert_eq!(refused(&mut within_one).await, "57P01");
    a.stays_alone().await;
    world.lead("b", b.at).await;
    is_ended(&mut unknown, &mut unknown_end).await;
    assert_eq!(b.session().await.1, STARTUP);
    let text = world.router.metrics.render().unwrap();
    for line in ["ended_total{member=\"a\",port=\"leader\",reason=\"switchover\"} 3", "resignations_total 1"] {
        assert!(text.contains(line), "{line}: {text}");
    }
}

#[tokio::test]
async fn a_transaction_has_a_budget_where_its_end_would_be_seen() {
    let mut world = World::new(Limits { switchover_budget: Duration::from_millis(100), ..limits() });
    let rw = world.open(port(Target::Leader)).await;
    let a = Fake::start().await;
    world.lead("a", a.at).await;
    let (mut waits, mut waits_end) = started(rw, &a).await;
    passes(&mut waits, &mut waits_end, &message(b'Q', b"begin\0")).await;
    passes(&mut waits_end, &mut waits, &message(b'Z', b"T")).await;
    let (mut reads, mut reads_end) = started(rw, &a).await;
    passes(&mut reads, &mut reads_end, &message(b'Q', b"select\0")).await;
    passes(&mut reads_end, &mut reads, &message(b'D', b"half a row")[..9]).await;
    world.stops("a").await;
    // What it does meanwhile is no reason for more time.
    let (mut waits, mut waits_end) = (waits, waits_end);
    let mut turns = 0;
    while waits.write_all(&message(b'Q', b"more\0")).await.is_ok() {
        if waits_end.read_exact(&mut [0; 10]).await.is_err() {
            break;
        }
        let _ = waits_end.write_all(&message(b'Z', b"T")).await;
        let mut kind = [0; 1];
        if within(waits.read_exact(&mut kind)).await.is_err() || kind == *b"E" {
            break;
        }
        within(waits.read_exact(&mut [0; 5])).await.unwrap();
        turns += 1;
        assert!(turns < 1_000, "it goes on");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(turns > 0 && turns < 100, "{turns}");
    is_ended(&mut reads, &mut reads_end).await;
    eventually(|| world.router.sessions.is_empty()).await;
    let text = world.router.metrics.render().unwrap();
    assert!(text.contains("ended_total{member=\"a\",port=\"leader\",reason=\"switchover_overdue\"} 2"), "{text}");
}

#[tokio::test]
async fn without_a_budget_a_notice_ends_nothing_and_a_notice_can_be_taken_back() {
    for budget in [Duration::ZERO, Duration::from_secs(60)] {
        let mut world = World::new(Limits { switchover_budget: budget, ..limits() });
        let rw = world.open(port(Target::Leader)).await;
        let a = Fake::start().await;
        world.lead("a", a.at).await;
        let (mut client, mut server) = started(rw, &a).await;
        passes(&mut client, &mut server, &message(b'Q', b"begin\0")).await;
        passes(&mut server, &mut client, &message(b'Z', b"T")).await;
        world.stops("a").await;
        world.change(|view| view.members.get_mut(&"a".into()).unwrap().state = "running".into()).await;
        passes(&mut client, &mut server, &message(b'Q', b"commit\0")).await;
        passes(&mut server, &mut client, &message(b'Z', b"I")).await;
        passes(&mut client, &mut server, b"Q").await;
        session(rw, &a).await;
    }
}

#[tokio::test]
async fn held_clients_are_connected_before_their_server_leads() {
    let mut world = World::new(Limits { max_ahead: 1, ..limits() });
    let rw = world.open(port(Target::Leader)).await;
    let b = Fake::start().await;
    world.follow("b", b.at).await;
    let _clients = [connect(rw, STARTUP).await, connect(rw, STARTUP).await];
    world.held(2).await;
    world.change(|view| view.leader = Some(key("b", view.revision))).await;
    let mut ahead = b.connection().await;
    // No more than are allowed, and nothing is said on it.
    b.stays_alone().await;
    world.change(|view| view.members.get_mut(&"b".into()).unwrap().role = "primary".into()).await;
    let mut startup = vec![0; STARTUP.len()];
    within(ahead.read_exact(&mut startup)).await.unwrap();
    assert_eq!(startup, STARTUP);
    b.session().await;
    b.stays_alone().await;
}

#[tokio::test]
async fn a_server_that_accepts_and_says_nothing_is_left_for_another() {
    let mut world = World::new(limits());
    let ro = world.open(Port { connect_timeout: Duration::from_millis(100), ..port(Target::Replica) }).await;
    let (frozen, other) = (Fake::start().await, Fake::start().await);
    world.follow("b", frozen.at).await;
    let _client = connect(ro, STARTUP).await;
    let _silent = frozen.request().await;
    // As long as there is nothing better, it is waited for …
    frozen.stays_alone().await;
    world.follow("c", other.at).await;
    // … and left as soon as there is.
    assert_eq!(other.session().await.1, STARTUP);
    let text = world.router.metrics.render().unwrap();
    assert!(text.contains("connects_total{member=\"b\",result=\"silent\"} 1"), "{text}");
}

#[tokio::test]
async fn a_new_leader_is_asked_where_its_record_is_slow() {
    let mut world = World::new(limits());
    let rw = world.open(port(Target::Leader)).await;
    let (a, b) = (Fake::start().await, Fake::start().await);
    let promoted = api("200 OK", "primary").await;
    world.lead("a", a.at).await;
    world.follow("b", b.at).await;
    world
        .change(|view| {
            view.leader = Some(key("b", view.revision));
            view.members.get_mut(&"b".into()).unwrap().api_url = Some(promoted);
        })
        .await;
    let (mut client, mut server) = session(rw, &b).await;
    // Its record catches up: nothing has changed.
    world.change(|view| view.members.get_mut(&"b".into()).unwrap().role = "primary".into()).await;
    passes(&mut client, &mut server, b"hello").await;
    // A record that denies it counts at once, whatever it said before.
    world.change(|view| view.members.get_mut(&"b".into()).unwrap().role = "demoted".into()).await;
    is_ended(&mut client, &mut server).await;
}

/// A REST API that takes so long to say that it is the primary's.
async fn slow_api(delay: Duration) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/patroni", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let _ = stream.read(&mut [0; 1024]).await;
                tokio::time::sleep(delay).await;
                let _ = stream.write_all(b"HTTP/1.0 200 OK\r\n\r\n{\"role\":\"primary\"}").await;
            });
        }
    });
    url
}

#[tokio::test]
async fn a_slow_proof_counts_though_the_dcs_talks_of_something_else() {
    let mut world = World::new(limits());
    let rw = world.open(port(Target::Leader)).await;
    let server = Fake::start().await;
    let url = slow_api(Duration::from_millis(150)).await;
    // With the key, and a record that does not say so yet.
    world.lead("a", server.at).await;
    world
        .change(|view| {
            let record = view.members.get_mut(&"a".into()).unwrap();
            (record.role, record.api_url) = ("replica".into(), Some(url));
        })
        .await;
    let talks = async {
        loop {
            world.confirm();
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::select! {
        () = talks => {}
        _ = session(rw, &server) => {}
    }
}
