//! The accept loop of one port on one thread.

use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tracing::warn;
use trunkline_common::Clock;

use crate::listeners::Slot;
use crate::places::Place;
use crate::port::{Listening, Peer};
use crate::router::Router;
use crate::session;
use crate::socket::Listener;

/// Pauses after a failed accept: out of file descriptors or memory, which trying again at once would not cure.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LAST_PAUSE: Duration = Duration::from_millis(500);

/// Connections that are taken over at the end, see [`serve`].
const LEFT_OVERS: usize = 1_024;

/// The right to serve one more connection.
#[derive(Debug)]
pub struct Permit {
    /// None where the port is gone.
    _of_port: Option<Place>,
    _of_router: Place,
}

/// Accepts until the router drains or the port is `closed`. At a limit nothing more is accepted until there is a place for
/// the one accepted last: clients wait in the kernel's queue. At the end, those that the kernel has accepted already are
/// served: closing the listener would reset them.
pub async fn serve(router: Arc<Router>, slot: Slot, listener: Listener, mut closed: watch::Receiver<bool>) {
    let over = async {
        tokio::select! {
            () = router.drain_begun() => {}
            // Whoever could close it may be gone: then it stays open.
            Ok(_) = closed.wait_for(|closed| *closed) => {}
        }
    };
    let mut waiting = None;
    tokio::select! {
        biased;
        () = over => {}
        () = accept(&router, &slot, &listener, &mut waiting) => {}
    }
    let listening = slot.read().clone();
    if let Some((client, peer)) = waiting {
        // There is no place for it, and never will be here: one too many is better than one that is reset.
        let permit = permit_anyway(&router, Some(&listening));
        tokio::spawn(session::serve(router.clone(), listening.clone(), client, peer, permit));
    }
    for _ in 0..LEFT_OVERS {
        let Some(permit) = permit_now(&router, &listening) else { break };
        let Some(Ok((client, peer))) = listener.accept().now_or_never() else { break };
        tokio::spawn(session::serve(router.clone(), listening.clone(), client, peer, permit));
    }
}

/// `waiting`: the client that was accepted last, as long as there is no place for it.
async fn accept(router: &Arc<Router>, slot: &Slot, listener: &Listener, waiting: &mut Option<(TcpStream, Peer)>) {
    let mut pause = FIRST_PAUSE;
    loop {
        let accepted = listener.accept().await;
        let listening = slot.read().clone();
        match accepted {
            Ok(accepted) => {
                pause = FIRST_PAUSE;
                *waiting = Some(accepted);
                let permit =
                    Permit { _of_port: Some(listening.places.take().await), _of_router: router.places.take().await };
                let Some((client, peer)) = waiting.take() else { continue };
                tokio::spawn(session::serve(router.clone(), listening.clone(), client, peer, permit));
                // The next one has to wait for its turn, not this one.
                if let Some(turn) = listening.accept_at(router.clock.now()) {
                    router.clock.sleep_until(turn).await;
                }
            }
            // The client was faster: nothing is wrong here.
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                router.metrics.accept_errors.inc();
                warn!(port = &*listening.name, %error, "accept failed");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LAST_PAUSE);
            }
        }
    }
}

fn permit_now(router: &Router, listening: &Listening) -> Option<Permit> {
    Some(Permit { _of_port: Some(listening.places.try_take()?), _of_router: router.places.try_take()? })
}

/// A session of another process has its right already, whatever the limits are here.
pub fn permit_for_adopted(router: &Router, port: &str) -> Permit {
    permit_anyway(router, router.port(port).as_deref())
}

fn permit_anyway(router: &Router, listening: Option<&Listening>) -> Permit {
    Permit {
        _of_port: listening.map(|listening| listening.places.take_anyway()),
        _of_router: router.places.take_anyway(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use trunkline_config::router::{Limits, Listen, Port, Target};

    use super::*;
    use crate::crypto::Crypto;

    #[tokio::test]
    async fn a_session_needs_little_memory() {
        let router = Router::new(Limits::default()).unwrap();
        let port = Port::new("rw", Listen::Tcp("127.0.0.1:0".into()), Target::Leader);
        let listening = router.listening(&port, Crypto::default());
        let (client, _) = std::os::unix::net::UnixStream::pair().unwrap();
        client.set_nonblocking(true).unwrap();
        let client = tokio::net::TcpStream::from_std(OwnedFd::from(client).into()).unwrap();
        let permit = permit_now(&router, &listening).unwrap();
        let size = size_of_val(&session::serve(router.clone(), listening, client, Peer::Unix, permit));
        // With what tokio keeps of a task, these are 512: it rounds up to a multiple of 128.
        assert!(size <= 408, "{size} bytes of a task");
    }
}
