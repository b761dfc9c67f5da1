//! A router in this process, fed with knowledge by hand, in front of fake servers.

#![allow(dead_code, clippy::unwrap_used)]

pub mod network;

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use trunkline_common::cluster::{LeaderKey, Status};
use trunkline_common::dcs::follow::Knowledge;
use trunkline_common::{Clock, ClusterView, LeaseId, Lsn, Member, Revision, SystemClock};
use trunkline_config::router::{Limits, Listen, NoCandidate, Port, Target};
use trunkline_router::crypto::Crypto;
use trunkline_router::probe::Prober;
use trunkline_router::socket::{Address, Bound};
use trunkline_router::{Router, accept, follow, survey};

/// A start-up packet of protocol 3.0.
pub const STARTUP: &[u8] = b"\0\0\0\x11\0\x03\0\0user\0me\0\0";
/// An SSLRequest.
pub const SSL_REQUEST: &[u8] = &[0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];
/// A ClientHello of nothing: PostgreSQL's direct TLS.
pub const CLIENT_HELLO: &[u8] = b"\x16\x03\x01\0\x04\x01\0\0\0";
/// A CancelRequest.
pub const CANCEL: &[u8] = b"\0\0\0\x10\x04\xd2\x16\x2epidkkeyk";

/// Longer than anything here may take.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub fn limits() -> Limits {
    Limits {
        max_sessions: 1_000,
        max_held: 100,
        release_rate: 0,
        stale_after: Duration::from_secs(600),
        drain_timeout: Duration::from_secs(5),
        ..Limits::default()
    }
}

pub fn port(target: Target) -> Port {
    Port {
        no_candidate: NoCandidate::Hold,
        hold_timeout: Duration::from_secs(10),
        startup_timeout: Duration::from_secs(5),
        connect_timeout: Duration::from_secs(2),
        ..Port::new(target.as_str(), Listen::Tcp("127.0.0.1:0".into()), target)
    }
}

pub struct World {
    pub router: Arc<Router>,
    knowledge: watch::Sender<Knowledge>,
    view: ClusterView,
}

impl World {
    pub fn new(limits: Limits) -> Self {
        Self::seeded(limits, None)
    }

    /// With members that are known without the DCS.
    pub fn seeded(limits: Limits, seed: Option<ClusterView>) -> Self {
        let router = Router::new(limits).unwrap();
        // As early as possible, so that every test meets it, unless it shall not.
        if std::env::var("TRUNKLINE_TEST_SETTLE").as_deref() != Ok("0") {
            router.lean.start(1, NonZeroU32::MIN).unwrap();
            tokio::spawn(survey::settling(router.clone()));
        }
        let (sender, receiver) = watch::channel(Knowledge::default());
        tokio::spawn(survey::candidates(router.clone()));
        tokio::spawn(survey::silence(router.clone()));
        tokio::spawn(follow::run(router.clone(), Prober::default(), receiver, seed));
        let view = ClusterView { status: Status { optime: Lsn(1_000), ..Status::default() }, ..ClusterView::default() };
        Self { router, knowledge: sender, view }
    }

    /// Opens a port; clients connect to the address.
    pub async fn open(&self, port: Port) -> SocketAddr {
        let router = self.router.clone();
        let bound = Bound::new(&Address::of(&port.listen[0]).unwrap(), 1).unwrap().remove(0);
        bound.listen().unwrap();
        let address = bound.address().unwrap();
        bound.tune(port.client_silence).unwrap();
        let slot = Arc::new(parking_lot::RwLock::new(self.router.listening(&port, Crypto::of(&port).unwrap())));
        let listener = bound.into_listener().unwrap();
        let (open, closed) = tokio::sync::watch::channel(false);
        tokio::spawn(async move {
            accept::serve(router, slot, listener, closed).await;
            drop(open);
        });
        match address {
            Address::Tcp(address) => address,
            // Nobody connects to it by an address.
            Address::Unix(_) => SocketAddr::from(([0, 0, 0, 0], 0)),
        }
    }

    /// Changes the cluster in one step and returns once the router has taken note.
    pub async fn change(&mut self, change: impl FnOnce(&mut ClusterView)) {
        self.view.revision.0 += 1;
        change(&mut self.view);
        let (revision, mut tables) = (self.view.revision, self.router.tables());
        self.confirm();
        within(tables.wait_for(|table| table.revision >= revision)).await.unwrap();
    }

    pub fn confirm(&self) {
        let confirmed_at = Some(SystemClock.now());
        self.knowledge.send_replace(Knowledge {
            view: Some(Arc::new(self.view.clone())),
            confirmed_at,
            ..Knowledge::default()
        });
    }

    /// The key and its holder's record, in one step.
    pub async fn lead(&mut self, name: &str, at: SocketAddr) {
        self.change(|view| {
            view.leader = Some(key(name, view.revision));
            view.members.insert(name.into(), member("primary", at));
        })
        .await;
    }

    pub async fn follow(&mut self, name: &str, at: SocketAddr) {
        self.change(|view| {
            view.members.insert(name.into(), member("replica", at));
        })
        .await;
    }

    /// It says that it is about to stop, as an agent does in a planned switchover.
    pub async fn stops(&mut self, name: &str) {
        self.change(|view| view.members.get_mut(&name.into()).unwrap().state = "stopping".into()).await;
    }

    pub async fn held(&self, count: usize) {
        eventually(|| self.router.hold.held() == count).await;
    }
}

pub fn key(name: &str, created: Revision) -> LeaderKey {
    LeaderKey { name: name.into(), lease: LeaseId(1), created, modified: created }
}

pub fn member(role: &str, at: SocketAddr) -> Member {
    Member {
        conn_url: Some(format!("postgres://{at}/postgres")),
        state: "running".into(),
        role: role.into(),
        replication_state: (role == "replica").then(|| "streaming".into()),
        xlog_location: Some(Lsn(1_000)),
        ..Member::default()
    }
}

/// A server that accepts and does nothing by itself.
pub struct Fake {
    pub at: SocketAddr,
    listener: TcpListener,
}

impl Fake {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self { at: listener.local_addr().unwrap(), listener }
    }

    /// The next connection, with its first packet read and taken: the client sees an `R`.
    pub async fn session(&self) -> (TcpStream, Vec<u8>) {
        let (mut stream, packet) = self.request().await;
        stream.write_all(b"R").await.unwrap();
        (stream, packet)
    }

    /// The next connection, with its first packet read and not answered.
    pub async fn request(&self) -> (TcpStream, Vec<u8>) {
        let (mut stream, _) = within(self.listener.accept()).await.unwrap();
        let mut length = [0; 4];
        within(stream.read_exact(&mut length)).await.unwrap();
        let mut packet = length.to_vec();
        packet.resize(u32::from_be_bytes(length) as usize, 0);
        within(stream.read_exact(&mut packet[4..])).await.unwrap();
        (stream, packet)
    }

    /// The next connection, with nothing read of it.
    pub async fn connection(&self) -> TcpStream {
        within(self.listener.accept()).await.unwrap().0
    }

    /// Nobody connects for a while.
    pub async fn stays_alone(&self) {
        let accepted = tokio::time::timeout(Duration::from_millis(100), self.listener.accept()).await;
        assert!(accepted.is_err(), "somebody connected");
    }
}

/// Connects and sends `first`.
pub async fn connect(to: SocketAddr, first: &[u8]) -> TcpStream {
    let mut stream = within(TcpStream::connect(to)).await.unwrap();
    stream.set_nodelay(true).unwrap();
    stream.write_all(first).await.unwrap();
    stream
}

/// A start-up packet with these parameters.
pub fn startup(parameters: &[(&str, &str)]) -> Vec<u8> {
    let pairs: String = parameters.iter().map(|(name, value)| format!("{name}\0{value}\0")).collect();
    let body = [b"\0\x03\0\0user\0me\0", pairs.as_bytes(), b"\0"].concat();
    [&(body.len() as u32 + 4).to_be_bytes(), &body[..]].concat()
}

/// A session through the router: the client's end and the server's.
pub async fn session(to: SocketAddr, server: &Fake) -> (TcpStream, TcpStream) {
    let mut client = connect(to, STARTUP).await;
    let (server, packet) = server.session().await;
    assert_eq!(packet, STARTUP);
    assert_eq!(within(client.read_u8()).await.unwrap(), b'R');
    (client, server)
}

/// A message of PostgreSQL's.
pub fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    [&[kind][..], &(body.len() as u32 + 4).to_be_bytes(), body].concat()
}

/// A session through the router whose start-up is over.
pub async fn started(to: SocketAddr, server: &Fake) -> (TcpStream, TcpStream) {
    let mut client = connect(to, STARTUP).await;
    let (mut server, _) = server.request().await;
    let start = [message(b'R', &[0; 4]), message(b'K', b"pid_key_"), message(b'Z', b"I")].concat();
    passes(&mut server, &mut client, &start).await;
    (client, server)
}

/// Sends `bytes` at one end and expects them at the other.
pub async fn passes(from: &mut TcpStream, to: &mut TcpStream, bytes: &[u8]) {
    from.write_all(bytes).await.unwrap();
    let mut got = vec![0; bytes.len()];
    within(to.read_exact(&mut got)).await.unwrap();
    assert!(got == bytes);
}

/// Everything until the end; a reset counts as one.
pub async fn rest(stream: &mut TcpStream) -> Vec<u8> {
    let mut got = Vec::new();
    let _ = within(stream.read_to_end(&mut got)).await;
    got
}

/// Writes until nothing is taken any more: the other end does not read. Says how much that was.
pub async fn fills(stream: &mut (impl AsyncWrite + Unpin)) -> usize {
    let bytes = vec![7; 64 << 10];
    let mut sent = 0;
    while let Ok(written) = tokio::time::timeout(Duration::from_millis(500), stream.write(&bytes)).await {
        sent += written.unwrap();
        assert!(sent < 64 << 20, "no backpressure");
    }
    sent
}

/// Reads so much.
pub async fn drains(stream: &mut (impl AsyncRead + Unpin), mut left: usize) {
    let mut scratch = vec![0; 1 << 20];
    while left > 0 {
        let most = left.min(scratch.len());
        left -= within(stream.read(&mut scratch[..most])).await.unwrap();
    }
}

/// An ErrorResponse with this SQLSTATE.
pub fn error(sqlstate: &str) -> Vec<u8> {
    let fields = format!("SFATAL\0VFATAL\0C{sqlstate}\0Mthe database system is shutting down\0\0");
    [b"E".to_vec(), (fields.len() as u32 + 4).to_be_bytes().to_vec(), fields.into_bytes()].concat()
}

/// The SQLSTATE of the ErrorResponse that ends the connection.
pub async fn refused(stream: &mut TcpStream) -> String {
    let answer = String::from_utf8_lossy(&rest(stream).await).into_owned();
    assert!(answer.starts_with('E'), "{answer:?}");
    answer.split('\0').find_map(|field| field.strip_prefix('C')).unwrap_or_default().to_owned()
}

pub async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("took too long")
}

pub async fn eventually(mut condition: impl FnMut() -> bool) {
    within(async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
}

/// A REST API that answers every `GET /primary` with this status and role.
pub async fn api(status: &'static str, role: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/patroni", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = [0; 1024];
            let _ = stream.read(&mut request).await;
            let _ = stream.write_all(format!("HTTP/1.0 {status}\r\n\r\n{{\"role\":\"{role}\"}}").as_bytes()).await;
        }
    });
    url
}
