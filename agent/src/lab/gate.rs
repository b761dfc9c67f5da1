//! A link that can go silent: a TCP port that leads to another one, or to nowhere.

use std::sync::Arc;

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
        let task = tokio::spawn(accept(listener, target.to_owned(), open.subscribe()));
        Ok(Self { address, open, task })
    }

    /// Where it listens.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Lets bytes pass or holds them back.
    pub fn open(&self, open: bool) {
        self.open.send_replace(open);
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept(listener: TcpListener, target: String, open: watch::Receiver<bool>) {
    // Connections end with the listener's task.
    let mut relays = tokio::task::JoinSet::new();
    while let Ok((client, _)) = listener.accept().await {
        let (target, mut open) = (target.clone(), open.clone());
        relays.spawn(async move {
            open.wait_for(|open| *open).await.ok()?;
            let server = TcpStream::connect(target).await.ok()?;
            let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
            tokio::join!(pass(from_client, to_server, open.clone()), pass(from_server, to_client, open));
            Some(())
        });
        while relays.try_join_next().is_some() {}
    }
}

async fn pass(mut from: tcp::OwnedReadHalf, mut to: tcp::OwnedWriteHalf, mut open: watch::Receiver<bool>) {
    let mut bytes = vec![0; 16 << 10];
    while let Ok(read @ 1..) = from.read(&mut bytes).await {
        if open.wait_for(|open| *open).await.is_err() || to.write_all(&bytes[..read]).await.is_err() {
            return;
        }
    }
}
