//! A server that says it is PostgreSQL and then does what the user name asks for: what can't be asked of the real one, or
//! would need thousands of its processes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Result;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Just stays there.
pub const IDLE: &str = "idle";
/// Sends as long as anybody takes it.
pub const FLOOD: &str = "flood";
/// Sends [`WORDS`] bytes and closes.
pub const FAREWELL: &str = "farewell";
/// Reads to the end of the client's half, and only then answers with [`WORDS`] bytes and closes.
pub const TALLY: &str = "tally";

/// What the last two send.
pub const WORDS: usize = 300_000;

/// AuthenticationOk, one ParameterStatus, BackendKeyData, ReadyForQuery.
pub const WELCOME: &[u8] =
    b"R\0\0\0\x08\0\0\0\0S\0\0\0\x18server_version\x0015.0\0\0K\0\0\0\x0c\0\0\0\x01\0\0\0\x02Z\0\0\0\x05I";

/// The running server; it ends with the runtime.
#[derive(Clone)]
pub struct Peer {
    /// Where it listens.
    pub port: u16,
    /// Bytes that floods have been rid of.
    pub flooded: Arc<AtomicU64>,
    /// Bytes that tallies have read.
    pub tallied: Arc<AtomicU64>,
}

impl Peer {
    /// Listens on a free port.
    pub async fn start() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let peer = Self { port: listener.local_addr()?.port(), flooded: Arc::default(), tallied: Arc::default() };
        let serving = peer.clone();
        tokio::spawn(async move {
            loop {
                match listener.accept().await {
                    Ok((stream, _)) => drop(tokio::spawn(serving.clone().serve(stream))),
                    Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                }
            }
        });
        Ok(peer)
    }

    async fn serve(self, mut stream: TcpStream) -> std::io::Result<()> {
        let length = stream.read_u32().await?.saturating_sub(4).min(10_000);
        let mut packet = vec![0; length as usize];
        stream.read_exact(&mut packet).await?;
        stream.write_all(WELCOME).await?;
        let asked = |word: &str| packet.windows(word.len()).any(|part| part == word.as_bytes());
        if asked(FLOOD) {
            let zeros = vec![0; 64 << 10];
            loop {
                let bytes = stream.write(&zeros).await?;
                self.flooded.fetch_add(bytes as u64, Ordering::Relaxed);
            }
        }
        if asked(FAREWELL) {
            return stream.write_all(&words()).await;
        }
        let mut scratch = vec![0; 16 << 10];
        loop {
            match stream.read(&mut scratch).await? {
                0 if asked(TALLY) => return stream.write_all(&words()).await,
                0 => return Ok(()),
                bytes => drop(self.tallied.fetch_add(bytes as u64, Ordering::Relaxed)),
            }
        }
    }
}

/// Bytes of which none can be missing unnoticed.
pub fn words() -> Vec<u8> {
    (0..WORDS as u32 / 4).flat_map(u32::to_be_bytes).collect()
}
