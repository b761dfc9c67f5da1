//! The accept loop of one port on one thread.

use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use tokio::net::TcpListener;
use tracing::warn;

use crate::router::{Listening, Router};
use crate::session;

/// Pauses after a failed accept: out of file descriptors or memory, which trying again at once would not cure.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LAST_PAUSE: Duration = Duration::from_millis(500);

/// Connections that are taken over at the end, see [`serve`].
const LEFT_OVERS: usize = 1_024;

/// Accepts until the router drains. A connection is accepted only with the right to serve it, so at the limit clients wait
/// in the kernel's queue. At the end, those that the kernel has accepted already are served: closing the listener would
/// reset them.
pub async fn serve(router: Arc<Router>, listening: Listening, listener: TcpListener) {
    let mut pause = FIRST_PAUSE;
    while let Some(permit) = router.permit().await {
        let accepted = tokio::select! {
            biased;
            () = router.drain_begun() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((client, peer)) => {
                pause = FIRST_PAUSE;
                tokio::spawn(session::serve(router.clone(), listening.clone(), client, peer, permit));
            }
            // The client was faster: nothing is wrong here.
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                router.metrics.accept_errors.inc();
                warn!(port = &*listening.name, %error, "accept failed");
                drop(permit);
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LAST_PAUSE);
            }
        }
    }
    for _ in 0..LEFT_OVERS {
        let Some(permit) = router.try_permit() else { break };
        let Some(Ok((client, peer))) = listener.accept().now_or_never() else { break };
        tokio::spawn(session::serve(router.clone(), listening.clone(), client, peer, permit));
    }
}
