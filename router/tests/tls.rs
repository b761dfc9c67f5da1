//! TLS that ends or begins at the router.

#![allow(clippy::unwrap_used)]

mod common;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use common::network::{cut_off, inside};
use common::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use trunkline_common::tls::{self, Verify};
use trunkline_config::router::{
    Limits, Listen, NoCandidate, Port, ServerCertificate, ServerTls, ServerTlsMode, Target, VerifyClient,
};
use trunkline_router::crypto::Crypto;

/// Certificates that have signed themselves, for 127.0.0.1.
struct Certificates(tempfile::TempDir);

impl Certificates {
    fn new(names: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in names {
            let line = format!(
                "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 30 -subj /CN={name} -addext \
                 subjectAltName=IP:127.0.0.1 -keyout {name}.key -out {name}.pem"
            );
            let made = Command::new("openssl").args(line.split_whitespace()).current_dir(dir.path()).output().unwrap();
            assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        }
        Self(dir)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A port that ends TLS with this certificate.
    fn port(&self, name: &str) -> Port {
        let (certfile, keyfile) = (self.file(&format!("{name}.pem")), Some(self.file(&format!("{name}.key"))));
        let tls = ServerCertificate { certfile, keyfile, cafile: None, verify_client: VerifyClient::None };
        Port { tls: Some(tls), ..port(Target::Leader) }
    }
}

/// A client that trusts this certificate only.
fn connector(trusted: &Path, alpn: &[&[u8]]) -> TlsConnector {
    let mut config = (*tls::client_config(Some(trusted), None, None, Verify::Full).unwrap()).clone();
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
    TlsConnector::from(Arc::new(config))
}

fn here() -> ServerName<'static> {
    ServerName::try_from("127.0.0.1").unwrap()
}

/// Asks for TLS and gets it.
async fn secure(to: SocketAddr, trusted: &Path) -> TlsStream<TcpStream> {
    let mut client = connect(to, SSL_REQUEST).await;
    assert_eq!(within(client.read_u8()).await.unwrap(), b'S');
    within(connector(trusted, &[]).connect(here(), client)).await.unwrap()
}

async fn say(stream: &mut (impl AsyncWriteExt + Unpin), bytes: &[u8]) {
    stream.write_all(bytes).await.unwrap();
    stream.flush().await.unwrap();
}

async fn hears(stream: &mut (impl AsyncReadExt + Unpin), bytes: &[u8]) {
    let mut got = vec![0; bytes.len()];
    within(stream.read_exact(&mut got)).await.unwrap();
    assert!(got == bytes);
}

#[tokio::test]
async fn tls_ends_here_and_everything_passes() {
    let files = Certificates::new(&["own"]);
    let mut world = World::new(limits());
    let rw = world.open(files.port("own")).await;
    let leader = Fake::start().await;
    world.lead("a", leader.at).await;
    let mut client = secure(rw, &files.file("own.pem")).await;
    say(&mut client, STARTUP).await;
    let (mut server, packet) = leader.request().await;
    assert_eq!(packet, STARTUP, "in plain text");
    let said = b"R\0\0\0\x08\0\0\0\0K\0\0\0\x0cpidkeyesZ\0\0\0\x05I";
    say(&mut server, said).await;
    hears(&mut client, said).await;
    // Much of it, both ways at once.
    let bytes: Vec<u8> = (0..8 << 20).map(|n: u32| (n ^ (n >> 8)) as u8).collect();
    {
        let (mut client_read, mut client_write) = tokio::io::split(&mut client);
        let (mut server_read, mut server_write) = server.split();
        tokio::join!(
            say(&mut client_write, &bytes),
            say(&mut server_write, &bytes),
            hears(&mut client_read, &bytes),
            hears(&mut server_read, &bytes)
        );
    }
    // The key has been seen, and a request to cancel may come in plain text or in TLS.
    let cancel = b"\0\0\0\x10\x04\xd2\x16\x2epidkeyes";
    let mut canceller = secure(rw, &files.file("own.pem")).await;
    say(&mut canceller, cancel).await;
    assert_eq!(leader.request().await.1, cancel);
    let mut answer = Vec::new();
    within(canceller.read_to_end(&mut answer)).await.expect("an end that TLS takes for one");
    assert_eq!(answer, b"");
    eventually(|| world.router.metrics.cancels.with_label_values(&["leader", "known"]).get() == 1).await;
    // Last words, an orderly end.
    say(&mut server, b"last words").await;
    drop(server);
    let mut rest = Vec::new();
    within(client.read_to_end(&mut rest)).await.unwrap();
    assert_eq!(rest, b"last words");
    drop(client);
    eventually(|| world.router.sessions.is_empty()).await;
}

#[tokio::test]
async fn a_change_of_leadership_ends_sessions_in_tls_too() {
    let files = Certificates::new(&["own"]);
    let mut world = World::new(limits());
    let rw = world.open(files.port("own")).await;
    let leader = Fake::start().await;
    world.lead("a", leader.at).await;
    let mut client = secure(rw, &files.file("own.pem")).await;
    say(&mut client, STARTUP).await;
    let (_frozen, _) = leader.session().await;
    hears(&mut client, b"R").await;
    world.change(|view| view.leader = None).await;
    let mut rest = Vec::new();
    let _ = within(client.read_to_end(&mut rest)).await;
    assert_eq!(rest, b"");
    // Held in TLS, and what it said meanwhile is not lost.
    let mut held = secure(rw, &files.file("own.pem")).await;
    say(&mut held, STARTUP).await;
    world.held(1).await;
    say(&mut held, b"said while held").await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    let other = Fake::start().await;
    world.lead("b", other.at).await;
    let (mut server, _) = other.session().await;
    hears(&mut server, b"said while held").await;
    hears(&mut held, b"R").await;
}

/// A session in TLS whose start-up is over.
async fn started_in_tls(to: SocketAddr, trusted: &Path, server: &Fake) -> (TlsStream<TcpStream>, TcpStream) {
    let mut client = secure(to, trusted).await;
    say(&mut client, STARTUP).await;
    let (mut stream, _) = server.request().await;
    let start = [message(b'R', &[0; 4]), message(b'K', b"pid_key_"), message(b'Z', b"I")].concat();
    say(&mut stream, &start).await;
    hears(&mut client, &start).await;
    (client, stream)
}

/// A query, and what its answer ends with.
async fn asks(client: &mut TlsStream<TcpStream>, server: &mut TcpStream, query: &[u8], status: &[u8]) {
    let query = message(b'Q', query);
    say(client, &query).await;
    hears(server, &query).await;
    let answer = [message(b'C', b"done\0"), message(b'Z', status)].concat();
    say(server, &answer).await;
    hears(client, &answer).await;
}

/// The last words, and the end in the order that TLS asks for.
async fn last_words(client: &mut TlsStream<TcpStream>) -> String {
    let mut told = Vec::new();
    within(client.read_to_end(&mut told)).await.unwrap();
    String::from_utf8_lossy(&told).into_owned()
}

#[tokio::test]
async fn a_planned_switchover_ends_sessions_in_tls_between_transactions() {
    let files = Certificates::new(&["own"]);
    let mut world = World::new(limits());
    let rw = world.open(files.port("own")).await;
    let (a, trusted) = (Fake::start().await, files.file("own.pem"));
    world.lead("a", a.at).await;
    let (mut idle, mut idle_end) = started_in_tls(rw, &trusted, &a).await;
    let (mut writer, mut writer_end) = started_in_tls(rw, &trusted, &a).await;
    asks(&mut writer, &mut writer_end, b"begin\0", b"T").await;
    world.stops("a").await;
    assert!(last_words(&mut idle).await.contains("C57P01"));
    assert_eq!(rest(&mut idle_end).await, b"", "its server is told nothing but the end");
    asks(&mut writer, &mut writer_end, b"insert\0", b"T").await;
    asks(&mut writer, &mut writer_end, b"commit\0", b"I").await;
    assert!(last_words(&mut writer).await.contains("C57P01"));
    drop((idle, writer));
    eventually(|| world.router.sessions.is_empty()).await;
    let text = world.router.metrics.render().unwrap();
    assert!(text.contains("ended_total{member=\"a\",port=\"leader\",reason=\"switchover\"} 2"), "{text}");
}

#[tokio::test]
async fn a_transaction_in_tls_has_a_budget() {
    let files = Certificates::new(&["own"]);
    let mut world = World::new(Limits { switchover_budget: Duration::from_millis(50), ..limits() });
    let rw = world.open(files.port("own")).await;
    let (a, trusted) = (Fake::start().await, files.file("own.pem"));
    world.lead("a", a.at).await;
    let (mut waits, mut waits_end) = started_in_tls(rw, &trusted, &a).await;
    asks(&mut waits, &mut waits_end, b"begin\0", b"T").await;
    let (mut reads, mut reads_end) = started_in_tls(rw, &trusted, &a).await;
    let half = &message(b'D', b"half a row")[..9];
    say(&mut reads_end, half).await;
    hears(&mut reads, half).await;
    world.stops("a").await;
    assert!(last_words(&mut waits).await.contains("C57P01"));
    let mut told = Vec::new();
    let _ = within(reads.read_to_end(&mut told)).await;
    assert_eq!(told, b"", "no words into half a message");
    assert_eq!((rest(&mut waits_end).await, rest(&mut reads_end).await), (Vec::new(), Vec::new()));
    drop((waits, reads));
    eventually(|| world.router.sessions.is_empty()).await;
    let text = world.router.metrics.render().unwrap();
    assert!(text.contains("ended_total{member=\"a\",port=\"leader\",reason=\"switchover_overdue\"} 2"), "{text}");
}

#[tokio::test]
async fn in_tls_too_a_client_that_dies_is_given_up_and_one_that_does_not_read_is_not() {
    if !inside("in_tls_too_a_client_that_dies_is_given_up_and_one_that_does_not_read_is_not") {
        return;
    }
    let files = Certificates::new(&["own"]);
    let mut world = World::new(limits());
    let rw = world.open(Port { client_silence: Some(Duration::from_secs(4)), ..files.port("own") }).await;
    let leader = Fake::start().await;
    world.lead("a", leader.at).await;
    let (mut lives, mut sends) = started_in_tls(rw, &files.file("own.pem"), &leader).await;
    let (dies, mut waits) = started_in_tls(rw, &files.file("own.pem"), &leader).await;
    let sent = fills(&mut sends).await;
    cut_off(dies.get_ref().0.local_addr().unwrap().port());
    waits.write_all(b"an answer").await.unwrap();
    assert_eq!(rest(&mut waits).await, b"");
    // By now it has been silent for longer than the other one was.
    tokio::time::sleep(Duration::from_secs(8)).await;
    drains(&mut lives, sent).await;
    say(&mut sends, b"and on").await;
    hears(&mut lives, b"and on").await;
    let text = world.router.metrics.render().unwrap();
    assert!(text.contains("ended_total{member=\"a\",port=\"leader\",reason=\"client_lost\"} 1\n"), "{text}");
}

#[tokio::test]
async fn refusals_are_told_in_tls() {
    let files = Certificates::new(&["own"]);
    let world = World::new(limits());
    let rw = world.open(Port { no_candidate: NoCandidate::Refuse, ..files.port("own") }).await;
    let mut client = secure(rw, &files.file("own.pem")).await;
    say(&mut client, STARTUP).await;
    let mut told = Vec::new();
    within(client.read_to_end(&mut told)).await.unwrap();
    assert!(String::from_utf8_lossy(&told).contains("C57P03"), "{told:?}");
}

#[tokio::test]
async fn direct_tls_needs_the_protocols_name() {
    let files = Certificates::new(&["own"]);
    let mut world = World::new(limits());
    let rw = world.open(files.port("own")).await;
    let leader = Fake::start().await;
    world.lead("a", leader.at).await;
    let trusted = files.file("own.pem");
    let direct = async |alpn: &[&[u8]]| {
        let stream = connect(rw, b"").await;
        within(connector(&trusted, alpn).connect(here(), stream)).await
    };
    let mut client = direct(&[b"postgresql"]).await.unwrap();
    say(&mut client, STARTUP).await;
    assert_eq!(leader.session().await.1, STARTUP);
    hears(&mut client, b"R").await;
    assert!(direct(&[b"http/1.1"]).await.is_err());
    // TLS 1.3 lets a client think that it is done; then it is over.
    if let Ok(mut nameless) = direct(&[]).await {
        let _ = nameless.write_all(STARTUP).await;
        let mut rest = Vec::new();
        let _ = within(nameless.read_to_end(&mut rest)).await;
        assert_eq!(rest, b"");
    }
    leader.stays_alone().await;
}

#[tokio::test]
async fn plain_text_is_refused_where_the_port_says_so() {
    let files = Certificates::new(&["own"]);
    let mut world = World::new(limits());
    let leader = Fake::start().await;
    world.lead("a", leader.at).await;
    let ends = world.open(Port { require_tls: true, ..files.port("own") }).await;
    let passes = world.open(Port { name: "passes".into(), require_tls: true, ..port(Target::Leader) }).await;
    for to in [ends, passes] {
        let mut plain = connect(to, STARTUP).await;
        assert_eq!(refused(&mut plain).await, "28000");
    }
    let mut gss = connect(ends, &[0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x30]).await;
    assert_eq!(within(gss.read_u8()).await.unwrap(), b'N');
    gss.write_all(STARTUP).await.unwrap();
    assert_eq!(refused(&mut gss).await, "28000");
    // A server that has no TLS.
    let mut denied = connect(passes, SSL_REQUEST).await;
    leader.request().await.0.write_all(b"N").await.unwrap();
    assert_eq!(within(denied.read_u8()).await.unwrap(), b'N');
    denied.write_all(STARTUP).await.unwrap();
    assert_eq!(refused(&mut denied).await, "28000");
    let optional = world.open(Port { name: "optional".into(), ..files.port("own") }).await;
    session(optional, &leader).await;
}

#[tokio::test]
async fn nothing_is_taken_for_encrypted_that_was_not() {
    let files = Certificates::new(&["own"]);
    let mut world = World::new(limits());
    let leader = Fake::start().await;
    world.lead("a", leader.at).await;
    let rw = world.open(Port { startup_timeout: Duration::from_millis(300), ..files.port("own") }).await;
    let mut early = connect(rw, &[SSL_REQUEST, STARTUP].concat()).await;
    assert_eq!(refused(&mut early).await, "08P01");
    let mut twice = secure(rw, &files.file("own.pem")).await;
    say(&mut twice, SSL_REQUEST).await;
    let mut told = Vec::new();
    within(twice.read_to_end(&mut told)).await.unwrap();
    assert!(String::from_utf8_lossy(&told).contains("C08P01"), "{told:?}");
    // A handshake that never comes to its end is bounded by the time for the start-up, one that is nonsense ends at once.
    for nonsense in [&b""[..], b"\x16\x03\x01\x02\0\x01\0", STARTUP] {
        let mut client = connect(rw, SSL_REQUEST).await;
        assert_eq!(within(client.read_u8()).await.unwrap(), b'S');
        client.write_all(nonsense).await.unwrap();
        let answer = rest(&mut client).await;
        assert!(!answer.starts_with(b"E"), "{answer:?}");
    }
    eventually(|| world.router.connections() == 0).await;
    leader.stays_alone().await;
}

#[tokio::test]
async fn a_new_certificate_is_shown_to_new_clients() {
    let files = Certificates::new(&["own", "new"]);
    let mut world = World::new(limits());
    let leader = Fake::start().await;
    world.lead("a", leader.at).await;
    let one = files.port("own");
    let rw = world.open(one.clone()).await;
    let mut before = secure(rw, &files.file("own.pem")).await;
    say(&mut before, STARTUP).await;
    let (mut server, _) = leader.session().await;
    hears(&mut before, b"R").await;
    for kind in ["pem", "key"] {
        std::fs::copy(files.file(&format!("new.{kind}")), files.file(&format!("own.{kind}"))).unwrap();
    }
    world.router.listening(&one, Crypto::of(&one).unwrap());
    secure(rw, &files.file("new.pem")).await;
    say(&mut before, b"still here").await;
    hears(&mut server, b"still here").await;
}

#[tokio::test]
async fn client_certificates_are_asked_for() {
    let files = Certificates::new(&["own", "client", "stranger"]);
    let mut world = World::new(limits());
    let leader = Fake::start().await;
    world.lead("a", leader.at).await;
    let own = files.file("own.pem");
    for (verify_client, shown, good) in [
        (VerifyClient::Required, Some("client"), true),
        (VerifyClient::Required, None, false),
        (VerifyClient::Required, Some("stranger"), false),
        (VerifyClient::Optional, Some("client"), true),
        (VerifyClient::Optional, None, true),
        (VerifyClient::Optional, Some("stranger"), false),
        (VerifyClient::None, Some("stranger"), true),
    ] {
        let mut one = files.port("own");
        one.name = format!("{verify_client:?} {shown:?}");
        if let Some(tls) = &mut one.tls {
            (tls.cafile, tls.verify_client) = (Some(files.file("client.pem")), verify_client);
        }
        let mut stream = connect(world.open(one).await, SSL_REQUEST).await;
        assert_eq!(within(stream.read_u8()).await.unwrap(), b'S');
        let (certificate, key) =
            shown.map(|name| (files.file(&format!("{name}.pem")), files.file(&format!("{name}.key")))).unzip();
        let config = tls::client_config(Some(&own), certificate.as_deref(), key.as_deref(), Verify::Full).unwrap();
        let what = format!("{verify_client:?}, {shown:?}");
        let Ok(mut client) = within(TlsConnector::from(config).connect(here(), stream)).await else {
            assert!(!good, "{what}");
            continue;
        };
        let _ = client.write_all(STARTUP).await;
        if good {
            leader.session().await;
            hears(&mut client, b"R").await;
        } else {
            assert!(within(client.read_u8()).await.is_err(), "{what}");
        }
    }
    leader.stays_alone().await;
}

/// What is checked of a server grows with the mode; and a server may ask for the router's own certificate.
#[tokio::test]
async fn servers_are_checked_as_far_as_the_port_says() {
    let files = Certificates::new(&["server", "other", "router"]);
    let elsewhere = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 30 -subj /CN=far -addext \
                     subjectAltName=IP:127.0.0.2 -keyout far.key -out far.pem";
    let made = Command::new("openssl").args(elsewhere.split_whitespace()).current_dir(files.0.path()).output().unwrap();
    assert!(made.status.success());
    let mut world = World::new(limits());
    let leader = Fake::start().await;
    world.lead("a", leader.at).await;
    for (mode, trusted, shown, good) in [
        (ServerTlsMode::Require, "server", "other", true),
        (ServerTlsMode::VerifyCa, "server", "server", true),
        (ServerTlsMode::VerifyCa, "server", "other", false),
        (ServerTlsMode::VerifyCa, "far", "far", true),
        (ServerTlsMode::VerifyFull, "far", "far", false),
        (ServerTlsMode::VerifyFull, "server", "server", true),
    ] {
        let server_tls = ServerTls {
            mode,
            cafile: Some(files.file(&format!("{trusted}.pem"))),
            certfile: Some(files.file("router.pem")),
            keyfile: Some(files.file("router.key")),
        };
        let what = format!("{mode:?}, {shown} where {trusted} is trusted");
        let one = Port { name: what.clone(), server_tls: Some(server_tls), ..port(Target::Leader) };
        let client = connect(world.open(one).await, STARTUP).await;
        let (mut raw, packet) = leader.request().await;
        assert_eq!(packet, SSL_REQUEST);
        raw.write_all(b"S").await.unwrap();
        let (certificate, key) = (files.file(&format!("{shown}.pem")), files.file(&format!("{shown}.key")));
        let asks =
            tls::server_config(&certificate, Some(&key), Some(&files.file("router.pem")), VerifyClient::Required);
        let accepted = within(TlsAcceptor::from(asks.unwrap()).accept(raw)).await;
        let mut got = Vec::new();
        if let Ok(mut server) = accepted {
            assert!(server.get_ref().1.peer_certificates().is_some(), "the router's own");
            let mut startup = vec![0; STARTUP.len()];
            if within(server.read_exact(&mut startup)).await.is_ok() {
                got = startup;
            }
        }
        assert_eq!(got == STARTUP, good, "{what}");
        // Otherwise it goes on to try.
        drop(client);
        eventually(|| world.router.connections() == 0).await;
        while tokio::time::timeout(Duration::from_millis(20), leader.connection()).await.is_ok() {}
    }
}

#[tokio::test]
async fn tls_begins_here_with_servers_that_are_who_they_should_be() {
    let files = Certificates::new(&["server", "other"]);
    let mut world = World::new(limits());
    let leader = Fake::start().await;
    world.lead("a", leader.at).await;
    let acceptor = |name: &str| {
        let (certificate, key) = (files.file(&format!("{name}.pem")), files.file(&format!("{name}.key")));
        TlsAcceptor::from(tls::server_config(&certificate, Some(&key), None, VerifyClient::None).unwrap())
    };
    let to_servers = |name: &str, cafile: &str| {
        let server_tls = ServerTls {
            mode: ServerTlsMode::VerifyFull,
            cafile: Some(files.file(cafile)),
            certfile: None,
            keyfile: None,
        };
        let listen = vec![Listen::Tcp("127.0.0.1:0".into())];
        Port { name: name.into(), listen, server_tls: Some(server_tls), ..port(Target::Leader) }
    };
    let rw = world.open(to_servers("rw", "server.pem")).await;
    // The client's own request is denied: this port has no certificate to show.
    let mut client = connect(rw, SSL_REQUEST).await;
    assert_eq!(within(client.read_u8()).await.unwrap(), b'N');
    client.write_all(STARTUP).await.unwrap();
    let (mut raw, packet) = leader.request().await;
    assert_eq!(packet, SSL_REQUEST);
    raw.write_all(b"S").await.unwrap();
    let mut server = within(acceptor("server").accept(raw)).await.unwrap();
    hears(&mut server, STARTUP).await;
    // A client in plain text is not offered to bind a channel, also if the offer comes in pieces.
    say(&mut server, b"R\0\0\0\x2a\0\0\0\x0aSCRAM-SHA-2").await;
    tokio::time::sleep(Duration::from_millis(20)).await;
    say(&mut server, b"56-PLUS\0SCRAM-SHA-256\0\0").await;
    hears(&mut client, b"R\0\0\0\x17\0\0\0\x0aSCRAM-SHA-256\0\0").await;
    client.write_all(b"Q").await.unwrap();
    hears(&mut server, b"Q").await;
    drop(client);
    let mut rest = Vec::new();
    let _ = within(server.read_to_end(&mut rest)).await;
    assert_eq!(rest, b"");
    // Another certificate, or none at all: nobody is sent there.
    let suspicious = world.open(to_servers("suspicious", "server.pem")).await;
    let _held = connect(suspicious, STARTUP).await;
    let (mut raw, _) = leader.request().await;
    raw.write_all(b"S").await.unwrap();
    if let Ok(mut impostor) = within(acceptor("other").accept(raw)).await {
        let mut rest = Vec::new();
        let _ = within(impostor.read_to_end(&mut rest)).await;
        assert_eq!(rest, b"");
    }
    leader.request().await.0.write_all(b"N").await.unwrap();
    world.held(1).await;
}
