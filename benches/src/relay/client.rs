//! A client that costs next to nothing: it speaks just enough of PostgreSQL's protocol, without passwords and TLS.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// The longest that a connection or an answer to a short question may take.
const LIMIT: Duration = Duration::from_secs(10);

/// ReadyForQuery, outside of a transaction: the last bytes of every answer.
const READY: [u8; 6] = [b'Z', 0, 0, 0, 5, b'I'];

/// A session.
pub struct Session {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Session {
    /// Connects as `user` and waits until the server is ready.
    pub async fn open(port: u16, user: &str) -> Result<Self> {
        let connect = async {
            let mut session = Self::begin(port, user).await?;
            session.answer().await?;
            Ok(session)
        };
        tokio::time::timeout(LIMIT, connect).await.with_context(|| format!("no session on port {port}"))?
    }

    /// Connects as `user` and reads `welcome` bytes: what follows is not for this.
    pub async fn open_exactly(port: u16, user: &str, welcome: usize) -> Result<Self> {
        let connect = async {
            let mut session = Self::begin(port, user).await?;
            session.stream.read_exact(&mut vec![0; welcome]).await?;
            Ok(session)
        };
        tokio::time::timeout(LIMIT, connect).await.with_context(|| format!("no session on port {port}"))?
    }

    async fn begin(port: u16, user: &str) -> Result<Self> {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
        stream.set_nodelay(true)?;
        stream.write_all(&startup(user)).await?;
        Ok(Self { stream, buffer: Vec::new() })
    }

    /// One simple query; its answer is read and thrown away. Returns the answer's bytes.
    pub async fn query(&mut self, sql: &str) -> Result<u64> {
        let mut message = vec![b'Q'];
        message.extend(length(sql.len() + 5));
        message.extend(sql.as_bytes());
        message.push(0);
        self.stream.write_all(&message).await?;
        self.answer().await
    }

    /// The connection itself.
    pub fn stream(&mut self) -> &mut TcpStream {
        &mut self.stream
    }

    /// Reads until the server waits for the next query. An error counts as a failure.
    async fn answer(&mut self) -> Result<u64> {
        let (mut total, mut tail) = (0, Vec::new());
        if self.buffer.is_empty() {
            self.buffer = vec![0; 256 << 10];
        }
        loop {
            let bytes = self.stream.read(&mut self.buffer).await?;
            ensure!(bytes > 0, "the server closed");
            let read = &self.buffer[..bytes];
            if total == 0 && read[0] == b'E' {
                bail!("{}", String::from_utf8_lossy(read));
            }
            total += bytes as u64;
            tail.extend_from_slice(&read[bytes.saturating_sub(READY.len())..]);
            tail.drain(..tail.len().saturating_sub(READY.len()));
            if tail == READY {
                return Ok(total);
            }
        }
    }
}

fn startup(user: &str) -> Vec<u8> {
    let mut body = 196_608_u32.to_be_bytes().to_vec();
    for word in ["user", user, "database", "postgres"] {
        body.extend(word.as_bytes());
        body.push(0);
    }
    body.push(0);
    let mut packet = length(body.len() + 4).to_vec();
    packet.extend(body);
    packet
}

fn length(bytes: usize) -> [u8; 4] {
    u32::try_from(bytes).unwrap_or(u32::MAX).to_be_bytes()
}
