//! A link that can go silent or slow: a TCP port that leads to another one, or to nowhere.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, tcp};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// An open gate passes bytes on. A closed one holds them back, and new connections too, as a network that drops packets
/// does: nobody is told. Dropping it ends every connection.
#[derive(Debug)]
pub struct Gate {
    address: String,
    open: Arc<watch::Sender<bool>>,
    slow: Arc<watch::Sender<Duration>>,
    task: JoinHandle<()>,
}

impl Gate {
    /// A new port of this machine that leads to `target` (`host:port`).
    ///
    /// # Errors
    /// There is no free port.
    pub async fn before(target: &str) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?.to_string();
        let open = Arc::new(watch::Sender::new(true));
        let slow = Arc::new(watch::Sender::new(Duration::ZERO));
        let task = tokio::spawn(accept(listener, target.to_owned(), open.subscribe(), slow.subscribe()));
        Ok(Self { address, open, slow, task })
    }

    /// Where it listens.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Lets bytes pass or holds them back.
    pub fn open(&self, open: bool) {
        self.open.send_replace(open);
    }

    /// Answers take so long to come back from now on.
    pub fn slow(&self, by: Duration) {
        self.slow.send_replace(by);
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept(listener: TcpListener, target: String, open: watch::Receiver<bool>, slow: watch::Receiver<Duration>) {
    // Connections end with the listener's task.
    let mut relays = tokio::task::JoinSet::new();
    while let Ok((client, _)) = listener.accept().await {
        let (target, mut open, slow) = (target.clone(), open.clone(), slow.clone());
        relays.spawn(async move {
            open.wait_for(|open| *open).await.ok()?;
            let server = TcpStream::connect(target).await.ok()?;
            let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
            let answers = pass(from_server, to_client, open.clone(), Some(slow));
            tokio::join!(pass(from_client, to_server, open, None), answers);
            Some(())
        });
        while relays.try_join_next().is_some() {}
    }
}

async fn pass(
    mut from: tcp::OwnedReadHalf,
    mut to: tcp::OwnedWriteHalf,
    mut open: watch::Receiver<bool>,
    slow: Option<watch::Receiver<Duration>>,
) {
    let mut bytes = vec![0; 16 << 10];
    while let Ok(read @ 1..) = from.read(&mut bytes).await {
        let slow = slow.as_ref().map_or(Duration::ZERO, |slow| *slow.borrow());
        tokio::time::sleep(slow).await;
        if open.wait_for(|open| *open).await.is_err() || to.write_all(&bytes[..read]).await.is_err() {
            return;
        }
    }
}
