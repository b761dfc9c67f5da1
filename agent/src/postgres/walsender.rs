//! A small client for another member: replication commands (`IDENTIFY_SYSTEM`, `TIMELINE_HISTORY`) and single queries.
//!
//! tokio-postgres can't open replication connections. This one speaks the simple query protocol only; framing, MD5 and
//! SCRAM come from `postgres-protocol`. Callers put a deadline round every call.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::BytesMut;
use futures::future::Either;
use postgres_protocol::authentication::{md5_hash, sasl};
use postgres_protocol::message::backend::{ErrorFields, Message};
use postgres_protocol::message::frontend;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixStream};
use tokio::runtime::Handle;
use trunkline_common::{History, Lsn, SystemId, TimelineId};
use trunkline_config::postgres::Credentials;

use super::{Upstream, tls};

/// The longest message accepted: a history file of thousands of timelines is far below.
const LONGEST_MESSAGE: usize = 1 << 20;

/// Rows of one answer that are kept.
const MOST_ROWS: usize = 1000;

/// How long a connection that nobody needs any more has to end in order.
pub const PARTING: Duration = Duration::from_secs(1);

/// A column's text; `None` is NULL.
pub type Column = Option<String>;

/// What went wrong, in words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct WireError(pub String);

impl From<std::io::Error> for WireError {
    fn from(error: std::io::Error) -> Self {
        Self(error.to_string())
    }
}

/// The answer to `IDENTIFY_SYSTEM`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// The cluster.
    pub system_id: SystemId,
    /// The timeline it is on.
    pub timeline: TimelineId,
    /// Its flushed position.
    pub lsn: Lsn,
}

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose<'a> {
    /// Replication commands.
    Replication,
    /// SQL in a database.
    Sql(&'a str),
}

/// What can carry the protocol.
pub trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// A connection to another member. Dropped, it ends with a `Terminate`, as [`super::query::Connection`] does, and for its reason.
pub struct Wire {
    io: Box<dyn Io>,
    input: BytesMut,
    parameters: BTreeMap<String, String>,
    /// The server takes commands. Before, a `Terminate` is a wrong password to it, which it would log.
    ready: bool,
}

impl Drop for Wire {
    fn drop(&mut self) {
        if !self.ready {
            return;
        }
        let mut io = std::mem::replace(&mut self.io, Box::new(tokio::io::empty()));
        // Where nothing runs any more there is nobody to say it.
        let Ok(runtime) = Handle::try_current() else { return };
        runtime.spawn(tokio::time::timeout(PARTING, async move {
            let mut output = BytesMut::new();
            frontend::terminate(&mut output);
            // Whoever is gone need not hear it.
            let _ = io.write_all(&output).await;
            let _ = io.shutdown().await;
        }));
    }
}

impl Wire {
    /// Connects and authenticates; with several hosts, to the first that takes writes, as libpq does for what is copied and streamed.
    pub async fn connect(upstream: &Upstream, user: &Credentials, purpose: Purpose<'_>) -> Result<Self, WireError> {
        let mut last = WireError("no host".to_owned());
        let several = upstream.host.contains(',');
        for host in upstream.host.split(',') {
            let connected = async {
                let mut wire = Self::connect_host(host, upstream.port, user, purpose).await?;
                if several {
                    wire.takes_writes().await?;
                }
                Ok(wire)
            };
            match connected.await {
                Ok(wire) => return Ok(wire),
                Err(WireError(error)) => last = WireError(format!("{host}:{}: {error}", upstream.port)),
            }
        }
        Err(last)
    }

    async fn connect_host(host: &str, port: u16, user: &Credentials, to: Purpose<'_>) -> Result<Self, WireError> {
        let mut wire = Self::introduce(host, port, user, to).await?;
        wire.log_in(user).await?;
        Ok(wire)
    }

    /// Whether the server lets in a session of `user` in this database, as far as that shows before a password is worked out: that
    /// takes both sides thousands of hashes. PostgreSQL's log is silent about who goes without having given one.
    pub async fn knock(host: &str, port: u16, user: &Credentials, database: &str) -> Result<(), WireError> {
        let mut wire = Self::introduce(host, port, user, Purpose::Sql(database)).await?;
        match wire.receive().await? {
            Message::AuthenticationOk => wire.log_in(user).await,
            Message::ErrorResponse(body) => Err(error_text(body.fields())),
            _ => Ok(()),
        }
    }

    /// By what a replication connection can ask as well.
    async fn takes_writes(&mut self) -> Result<(), WireError> {
        let rows = self.query("SHOW transaction_read_only").await?;
        match rows.first().and_then(|row| row.first()).and_then(Option::as_deref) {
            Some("off") => Ok(()),
            _ => Err(WireError("it takes no writes".to_owned())),
        }
    }

    async fn introduce(host: &str, port: u16, user: &Credentials, purpose: Purpose<'_>) -> Result<Self, WireError> {
        let io = dial(host, port, user).await?;
        let mut wire = Self { io, input: BytesMut::new(), parameters: BTreeMap::new(), ready: false };
        let mut parameters = vec![
            ("user", user.username.as_str()),
            ("client_encoding", "UTF8"),
            ("application_name", "trunkline-agent"),
        ];
        match purpose {
            Purpose::Replication => parameters.push(("replication", "true")),
            Purpose::Sql(database) => parameters.push(("database", database)),
        }
        let mut output = BytesMut::new();
        frontend::startup_message(parameters, &mut output)?;
        wire.send(&output).await?;
        Ok(wire)
    }

    /// Who the server is and where. Replication connections only.
    pub async fn identify(&mut self) -> Result<Identity, WireError> {
        let rows = self.query("IDENTIFY_SYSTEM").await?;
        let column = |at: usize| rows.first().and_then(|row| row.get(at)).and_then(Option::as_deref);
        let parse = || {
            Some(Identity {
                system_id: SystemId(column(0)?.parse().ok()?),
                timeline: TimelineId(column(1)?.parse().ok()?),
                lsn: column(2)?.parse().ok()?,
            })
        };
        parse().ok_or_else(|| WireError("an unexpected answer to IDENTIFY_SYSTEM".to_owned()))
    }

    /// The ancestors of `timeline`; none for the first one. Replication connections only.
    pub async fn history(&mut self, timeline: TimelineId) -> Result<History, WireError> {
        if timeline.0 <= 1 {
            return Ok(History::default());
        }
        let rows = self.query(&format!("TIMELINE_HISTORY {timeline}")).await?;
        let content = rows.first().and_then(|row| row.get(1)).and_then(Option::as_deref);
        content.map(History::parse).ok_or_else(|| WireError("an unexpected answer to TIMELINE_HISTORY".to_owned()))
    }

    /// Whether the server is in recovery. `in_hot_standby` is reported at connect since PostgreSQL 14; before, a
    /// standby's transactions are read only (a primary with `default_transaction_read_only` looks the same).
    pub async fn in_recovery(&mut self) -> Result<bool, WireError> {
        if let Some(value) = self.parameters.get("in_hot_standby") {
            return Ok(value == "on");
        }
        let rows = self.query("SHOW transaction_read_only").await?;
        Ok(rows.first().and_then(|row| row.first()) == Some(&Some("on".to_owned())))
    }

    /// Runs one statement and returns its rows as text.
    pub async fn query(&mut self, text: &str) -> Result<Vec<Vec<Column>>, WireError> {
        let mut output = BytesMut::new();
        frontend::query(text, &mut output)?;
        self.send(&output).await?;
        let (mut rows, mut failure) = (Vec::new(), None);
        loop {
            match self.receive().await? {
                Message::DataRow(row) if rows.len() < MOST_ROWS => rows.push(columns(&row)?),
                Message::ErrorResponse(body) => failure = Some(error_text(body.fields())),
                Message::ReadyForQuery(_) => return failure.map_or(Ok(rows), Err),
                Message::CopyInResponse(_) | Message::CopyOutResponse(_) => {
                    return Err(WireError("an unexpected copy mode".to_owned()));
                }
                _ => {}
            }
        }
    }

    async fn log_in(&mut self, user: &Credentials) -> Result<(), WireError> {
        let password = user.password.as_ref().map(|password| password.reveal().as_bytes());
        let mut scram: Option<sasl::ScramSha256> = None;
        loop {
            let mut output = BytesMut::new();
            let needed = || password.ok_or_else(|| WireError(format!("a password is asked for {}", user.username)));
            match self.receive().await? {
                Message::AuthenticationOk => {}
                Message::AuthenticationCleartextPassword => frontend::password_message(needed()?, &mut output)?,
                Message::AuthenticationMd5Password(body) => {
                    let hash = md5_hash(user.username.as_bytes(), needed()?, body.salt());
                    frontend::password_message(hash.as_bytes(), &mut output)?;
                }
                Message::AuthenticationSasl(_) => {
                    let client = sasl::ScramSha256::new(needed()?, sasl::ChannelBinding::unsupported());
                    frontend::sasl_initial_response(sasl::SCRAM_SHA_256, client.message(), &mut output)?;
                    scram = Some(client);
                }
                Message::AuthenticationSaslContinue(body) => {
                    let client = scram.as_mut().ok_or_else(|| WireError("SCRAM out of order".to_owned()))?;
                    client.update(body.data())?;
                    frontend::sasl_response(client.message(), &mut output)?;
                }
                Message::AuthenticationSaslFinal(body) => {
                    let client = scram.as_mut().ok_or_else(|| WireError("SCRAM out of order".to_owned()))?;
                    client.finish(body.data())?;
                }
                Message::ParameterStatus(body) => {
                    self.parameters.insert(body.name()?.to_owned(), body.value()?.to_owned());
                }
                Message::BackendKeyData(_) | Message::NoticeResponse(_) => {}
                Message::ReadyForQuery(_) => {
                    self.ready = true;
                    return Ok(());
                }
                Message::ErrorResponse(body) => return Err(error_text(body.fields())),
                _ => return Err(WireError("an authentication method that is not supported here".to_owned())),
            }
            if !output.is_empty() {
                self.send(&output).await?;
            }
        }
    }

    async fn send(&mut self, output: &[u8]) -> Result<(), WireError> {
        self.io.write_all(output).await?;
        Ok(self.io.flush().await?)
    }

    async fn receive(&mut self) -> Result<Message, WireError> {
        loop {
            let header = self.input.get(1..5).and_then(|bytes| Some(u32::from_be_bytes(bytes.try_into().ok()?)));
            if let Some(length) = header.filter(|length| *length as usize > LONGEST_MESSAGE) {
                return Err(WireError(format!("a message of {length} bytes")));
            }
            if let Some(message) = Message::parse(&mut self.input)? {
                return Ok(message);
            }
            if self.io.read_buf(&mut self.input).await? == 0 {
                return Err(WireError("the connection was closed".to_owned()));
            }
        }
    }
}

/// Connects to a server by socket directory or address, with TLS where `user` asks for it.
pub async fn dial(host: &str, port: u16, user: &Credentials) -> Result<Box<dyn Io>, WireError> {
    if host.starts_with('/') {
        return Ok(Box::new(UnixStream::connect(format!("{host}/.s.PGSQL.{port}")).await?));
    }
    let stream = TcpStream::connect((host, port)).await?;
    stream.set_nodelay(true)?;
    end_when_vanished(&stream)?;
    match tls::negotiate(stream, host, user).await.map_err(WireError)? {
        Either::Left(plain) => Ok(Box::new(plain)),
        Either::Right(encrypted) => Ok(encrypted),
    }
}

/// A host that loses its power says nothing, and a checkpoint may be waited for long: let the kernel find out.
fn end_when_vanished(stream: &TcpStream) -> std::io::Result<()> {
    use rustix::net::sockopt;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, Duration::from_secs(3))?;
    sockopt::set_tcp_keepintvl(stream, Duration::from_secs(1))?;
    sockopt::set_tcp_keepcnt(stream, 3)?;
    sockopt::set_tcp_user_timeout(stream, 6000)?;
    Ok(())
}

fn columns(row: &postgres_protocol::message::backend::DataRowBody) -> Result<Vec<Column>, WireError> {
    use postgres_protocol::message::backend::DataRowRanges;
    let mut ranges: DataRowRanges<'_> = row.ranges();
    let mut columns = Vec::new();
    while let Some(range) = fallible_next(&mut ranges)? {
        let text = range.and_then(|range| row.buffer().get(range));
        columns.push(text.map(|bytes| String::from_utf8_lossy(bytes).into_owned()));
    }
    Ok(columns)
}

/// `postgres-protocol` iterates with a trait of another crate; this names it in one place.
fn fallible_next<I: tokio_postgres::fallible_iterator::FallibleIterator>(
    iterator: &mut I,
) -> Result<Option<I::Item>, I::Error> {
    iterator.next()
}

fn error_text(mut fields: ErrorFields<'_>) -> WireError {
    let (mut message, mut code) = (String::new(), String::new());
    while let Ok(Some(field)) = fallible_next(&mut fields) {
        let text = || String::from_utf8_lossy(field.value_bytes()).into_owned();
        match field.type_() {
            b'M' => message = text(),
            b'C' => code = text(),
            _ => {}
        }
    }
    WireError(format!("{message} ({code})"))
}
