//! One client: read the first packet exactly → find a server, or wait for one ([`search`](crate::search)) → relay → say
//! why it ended.
//!
//! TLS is passed through: after an SSLRequest the server answers, and everything is opaque.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::OwnedSemaphorePermit;
use tracing::debug;

use crate::reply::Refusal;
use crate::router::{Listening, Router};
use crate::search::Search;
use crate::sessions::Cut;
use crate::startup::{self, Malformed, Packet, Progress};
use crate::{cancel, relay, socket};

/// How long a refused client may take to hear why.
const FAREWELL: Duration = Duration::from_secs(2);

/// Bytes of a refused client that are read and thrown away, so that closing does not reset what it was told.
const FAREWELL_BYTES: usize = 64 << 10;

/// Why there will be no session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum No {
    /// The client closed before it had a server.
    ClientGone,
    /// The client is told so.
    Refused(Refusal),
}

impl From<Malformed> for No {
    fn from(what: Malformed) -> Self {
        No::Refused(Refusal::Malformed(what))
    }
}

/// Serves one accepted connection from its first byte to its end. The permit is the right to be there.
pub async fn serve(
    router: Arc<Router>,
    listening: Listening,
    mut client: TcpStream,
    peer: SocketAddr,
    permit: OwnedSemaphorePermit,
) {
    let connection = router.connection();
    router.metrics.accepted.with_label_values(&[&*listening.name]).inc();
    if let Err(error) = socket::tune_client(&client) {
        debug!(port = &*listening.name, %peer, %error, "socket options refused");
    }
    let ended = match first_packet(&mut client, router.limits.startup_timeout).await {
        Ok((Packet::Cancel, bytes)) => Ended::Cancel(cancel::forward(&router, &listening, &bytes).await),
        Ok((packet, bytes)) => route(&router, &listening, client, packet, &bytes).await,
        Err(No::ClientGone) => Ended::ClientGone,
        Err(No::Refused(refusal)) => {
            refuse(&mut client, refusal).await;
            Ended::Refused(refusal)
        }
    };
    debug!(port = &*listening.name, %peer, reason = ended.label(), "connection ended");
    router.metrics.ended.with_label_values(&[&*listening.name, ended.label()]).inc();
    drop((connection, permit));
}

/// From a known first packet to the end of the session.
async fn route(router: &Router, listening: &Listening, client: TcpStream, packet: Packet, bytes: &[u8]) -> Ended {
    let client = Arc::new(client);
    match (Search { router, listening, client: &client, packet, bytes }).run().await {
        Ok(found) => {
            let end = relay::relay(&client, &found.server, &router.pipes, &listening.meter).await;
            found.session.cut().map_or(Ended::Relayed(end), Ended::Cut)
        }
        Err(No::ClientGone) => Ended::ClientGone,
        Err(No::Refused(refusal)) => {
            // No session was begun, so nobody else holds the socket.
            if let Some(mut client) = Arc::into_inner(client) {
                refuse_after(&mut client, packet, refusal, router.limits.startup_timeout).await;
            }
            Ended::Refused(refusal)
        }
    }
}

/// Reads the first packet and not one byte more.
async fn first_packet(client: &mut TcpStream, limit: Duration) -> Result<(Packet, Vec<u8>), No> {
    let read = async {
        let mut bytes = Vec::new();
        loop {
            match startup::read(&bytes)? {
                Progress::Packet(packet) => return Ok((packet, bytes)),
                Progress::Need(more) => {
                    let have = bytes.len();
                    bytes.resize(have + more, 0);
                    client.read_exact(&mut bytes[have..]).await.map_err(|_| No::ClientGone)?;
                }
            }
        }
    };
    tokio::time::timeout(limit, read).await.unwrap_or(Err(No::Refused(Refusal::TooSlow)))
}

/// Refuses in answer to `packet`. Who asked for encryption is told "no" first and refused at its start-up packet: an
/// ErrorResponse in place of that answer is something that clients must not show (CVE-2024-10977), and most of them would
/// just connect again, and wait again.
async fn refuse_after(client: &mut TcpStream, packet: Packet, refusal: Refusal, limit: Duration) {
    if packet.awaits_answer() && refusal != Refusal::EarlyData {
        let denied = client.write_all(b"N").await.is_ok();
        // At most SSLRequest after GSSENCRequest, then a start-up packet.
        match first_packet(client, limit).await {
            Ok((next, _)) if denied && next.awaits_answer() && next != packet => {
                let again = client.write_all(b"N").await.is_ok() && first_packet(client, limit).await.is_ok();
                if !again {
                    return;
                }
            }
            Ok(_) if denied => {}
            _ => return,
        }
    }
    refuse(client, refusal).await;
}

async fn refuse(client: &mut TcpStream, refusal: Refusal) {
    let farewell = async {
        client.write_all(&refusal.packet()).await?;
        client.shutdown().await?;
        let mut scratch = [0; 512];
        let mut read = 0;
        while read < FAREWELL_BYTES {
            match client.read(&mut scratch).await? {
                0 => break,
                bytes => read += bytes,
            }
        }
        std::io::Result::Ok(())
    };
    // Whether the client hears it is up to the client.
    let _ = tokio::time::timeout(FAREWELL, farewell).await;
}

/// Why a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ended {
    Relayed(relay::End),
    Cut(Cut),
    Refused(Refusal),
    ClientGone,
    Cancel(&'static str),
}

impl Ended {
    fn label(self) -> &'static str {
        match self {
            Ended::Relayed(relay::End::Client) => "client",
            Ended::Relayed(relay::End::Server) => "server",
            Ended::Relayed(relay::End::ClientLost) => "client_lost",
            Ended::Relayed(relay::End::ServerLost) => "server_lost",
            Ended::Cut(Cut::LeaderChanged) => "leader_changed",
            Ended::Cut(Cut::Drained) => "drained",
            Ended::Refused(Refusal::NoServer) => "no_server",
            Ended::Refused(Refusal::ShuttingDown) => "shutdown",
            Ended::Refused(Refusal::TooManyHeld) => "too_many_held",
            Ended::Refused(Refusal::Malformed(_)) => "malformed",
            Ended::Refused(Refusal::EarlyData) => "early_data",
            Ended::Refused(Refusal::TooSlow) => "too_slow",
            Ended::ClientGone => "client_gone",
            Ended::Cancel(_) => "cancel",
        }
    }
}
