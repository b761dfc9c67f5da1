//! Local SQL: one kept session for the status query, short-lived ones for everything else. Each call has a deadline.

use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;
use tokio::sync::oneshot;
use tokio_postgres::config::SslMode;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Config, NoTls, Row, Statement};
use trunkline_common::{Clock, Instant, Lsn, SystemClock, SystemId, TimelineId};
use trunkline_config::PostgresConfig;
use trunkline_config::postgres::Credentials;

use super::listening::Listening;
use super::pidfile::PidFile;
use super::walsender::{self, PARTING, Wire, WireError};
use super::{PgError, PgRole, Running, WalSender, conninfo};

/// How often it is seen whether the server lets anybody in: a session goes on answering while the postmaster takes no
/// connections, so this is part of the time after which a hung postmaster is found.
const KNOCK: Duration = Duration::from_secs(5);

/// A session is opened anew after this long.
const SESSION_AGE: Duration = Duration::from_secs(60);

/// How often it is looked whether transactions have ended.
const TRANSACTIONS_PAUSE: Duration = Duration::from_millis(10);

/// Patroni's name for it; monitoring filters by it.
const APPLICATION_NAME: &str = "Patroni heartbeat";

/// Everything that [`Running`] shows, in one row. `OFFSET 0` keeps the volatile function from being asked twice: a
/// promotion in the middle must not make a primary's function fail. The first eight digits of a WAL file's name are the
/// timeline, also between a promotion and its first checkpoint, when pg_control still has the old one.
///
/// A standby asks for WAL from elsewhere, or waits for it, only when it has replayed what is on its disk. That is looked at
/// before its position is: `OFFSET 0` settles the order, too.
const STATUS: &str = "
SELECT r.recovery,
       CASE WHEN r.recovery THEN NULL ELSE pg_current_wal_flush_lsn() END::text,
       CASE WHEN r.recovery THEN NULL ELSE substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8) END,
       pg_last_wal_receive_lsn()::text,
       pg_last_wal_replay_lsn()::text,
       pg_last_xact_replay_timestamp()::text,
       CASE WHEN r.recovery THEN pg_is_wal_replay_paused() ELSE false END,
       w.status,
       w.received_tli,
       w.latest_end_lsn::text,
       w.sender_host,
       w.sender_port,
       current_setting('primary_conninfo'),
       current_setting('restore_command'),
       current_setting('server_version_num')::int,
       to_char(pg_postmaster_start_time() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US') || '+00:00',
       current_setting('synchronous_standby_names'),
       (SELECT json_agg(s) FROM (SELECT usename, application_name, host(client_addr) AS client_addr, state, sync_state,
               sync_priority, write_lsn, flush_lsn, replay_lsn FROM pg_stat_replication ORDER BY pid) s)::text,
       (SELECT json_object_agg(slot_name, coalesce(confirmed_flush_lsn, restart_lsn)) FROM pg_replication_slots
         WHERE NOT temporary AND coalesce(confirmed_flush_lsn, restart_lsn) IS NOT NULL)::text,
       current_setting('synchronous_commit'),
       NOT r.recovery AND EXISTS (SELECT FROM pg_stat_get_activity(NULL) WHERE wait_event_type = 'IO'
         AND lower(wait_event) IN ('walsync', 'walwrite', 'walinitsync', 'walinitwrite')),
       current_setting('primary_slot_name'),
       r.recovery AND NOT r.read_all
  FROM (SELECT pg_is_in_recovery() AS recovery,
               pg_last_wal_receive_lsn() IS NOT NULL OR EXISTS (SELECT FROM pg_stat_get_activity(NULL)
                WHERE backend_type = 'startup' AND lower(wait_event) IN ('recoverywalstream', 'recoveryretrieveretryinterval'))
               AS read_all OFFSET 0) r,
       pg_stat_get_wal_receiver() w";

/// A connection. Dropped, it ends in order, with a `Terminate`: a session that sees the end of its socket instead says so in the
/// server's log at level `debug1`, and PostgreSQL handles a SIGTERM that comes in the middle of that in the signal handler, where it
/// may wait for itself for ever (seen with 15: `exit` in the handler, for a lock of the C library that its message holds). A fast
/// shutdown then waits for it.
pub struct Connection {
    /// For queries.
    pub client: Client,
    /// Goes after the client: there won't be another query.
    _needed: oneshot::Sender<Infallible>,
}

/// Why there is no session.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Not reached.
    #[error("{0}")]
    Dial(#[from] WireError),
    /// Refused by the server.
    #[error("{}", words(.0))]
    Server(#[from] tokio_postgres::Error),
}

/// A session that is kept; queries of several callers may be under way in it.
pub struct Session {
    connection: Connection,
    status: Statement,
    opened: Instant,
    postmaster: i32,
}

/// Holds the kept session, with when the server last let somebody in.
#[derive(Default)]
pub struct Sessions(tokio::sync::Mutex<Option<(Arc<Session>, Instant)>>);

/// Why a status query has no answer.
#[derive(Debug)]
pub enum NoAnswer {
    /// The server says it is starting up, in recovery, or shutting down (57P03).
    NotNow,
    /// The server answers with another error.
    Refused(String),
    /// No answer from a server.
    Error(String),
}

impl Sessions {
    /// The session with the server behind `pid_file`, opened if there is none that can be used.
    pub async fn open(&self, config: &PostgresConfig, pid_file: &PidFile) -> Result<Arc<Session>, ConnectError> {
        let mut kept = self.0.lock().await;
        let now = SystemClock.now();
        if let Some((session, let_in)) = kept.as_mut().filter(|(session, _)| session.usable(pid_file)) {
            if now.since(*let_in) < KNOCK {
                return Ok(session.clone());
            }
            if knock(config, pid_file).await.is_ok() {
                *let_in = now;
                return Ok(session.clone());
            }
        }
        *kept = None;
        let session = Arc::new(Session::open(config, pid_file).await?);
        *kept = Some((session.clone(), now));
        Ok(session)
    }

    /// Asks for the status. A session that broke is replaced once.
    pub async fn status(&self, config: &PostgresConfig, pid_file: &PidFile, id: SystemId) -> Result<Running, NoAnswer> {
        for attempt in 0..2 {
            let session = self.open(config, pid_file).await?;
            match session.client().query_one(&session.status, &[]).await {
                Ok(row) => return running(&row, id).ok_or_else(|| NoAnswer::Error("unexpected status row".to_owned())),
                Err(error) if attempt == 1 => return Err(error.into()),
                Err(error) => {
                    tracing::debug!("the session broke, opening another: {}", words(&error));
                    self.close().await;
                }
            }
        }
        Err(NoAnswer::Error("no session".to_owned()))
    }

    /// Forgets the session: it does not answer, or the server behind it ends.
    pub async fn close(&self) {
        *self.0.lock().await = None;
    }
}

impl Session {
    /// For queries.
    pub fn client(&self) -> &Client {
        &self.connection.client
    }

    async fn open(config: &PostgresConfig, pid_file: &PidFile) -> Result<Self, ConnectError> {
        let connection = connect(config, Some(pid_file), Duration::from_secs(2)).await?;
        let status = connection.client.prepare(STATUS).await?;
        Ok(Self { connection, status, opened: SystemClock.now(), postmaster: pid_file.pid })
    }

    fn usable(&self, pid_file: &PidFile) -> bool {
        let young = SystemClock.now().since(self.opened) < SESSION_AGE;
        young && self.postmaster == pid_file.pid && !self.connection.client.is_closed()
    }
}

impl From<tokio_postgres::Error> for NoAnswer {
    fn from(error: tokio_postgres::Error) -> Self {
        match error.code() {
            Some(code) if *code == SqlState::CANNOT_CONNECT_NOW => Self::NotNow,
            Some(_) => Self::Refused(words(&error)),
            None => Self::Error(words(&error)),
        }
    }
}

impl From<ConnectError> for NoAnswer {
    fn from(error: ConnectError) -> Self {
        match error {
            ConnectError::Dial(error) => Self::Error(error.to_string()),
            ConnectError::Server(error) => error.into(),
        }
    }
}

impl From<ConnectError> for PgError {
    fn from(error: ConnectError) -> Self {
        match error {
            ConnectError::Dial(error) => Self::Failed(error.to_string()),
            ConnectError::Server(error) => failed(error),
        }
    }
}

/// Opens a session as the superuser. `pid_file` says where the server really listens. The caller bounds it in time.
pub async fn connect(
    config: &PostgresConfig,
    pid_file: Option<&PidFile>,
    statement_timeout: Duration,
) -> Result<Connection, ConnectError> {
    connect_to(&config.database, config, pid_file, statement_timeout).await
}

/// The same to another database.
pub async fn connect_to(
    database: &str,
    config: &PostgresConfig,
    pid_file: Option<&PidFile>,
    statement_timeout: Duration,
) -> Result<Connection, ConnectError> {
    let mut settings = Config::new();
    settings
        .user(user(config))
        .dbname(database)
        .application_name(APPLICATION_NAME)
        .options(format!("-c statement_timeout={} -c search_path=pg_catalog", statement_timeout.as_millis()))
        // TLS is negotiated below; the protocol runs inside it.
        .ssl_mode(SslMode::Disable);
    if let Some(password) = &config.superuser.password {
        settings.password(password.reveal());
    }
    let listening = Listening::of(config, pid_file);
    let host = listening.local_host(config.use_unix_socket);
    let io = walsender::dial(&host, listening.port, &config.superuser).await?;
    let (client, connection) = settings.connect_raw(io, NoTls).await?;
    let (needed, not_needed) = oneshot::channel();
    tokio::spawn(async move {
        let mut connection = pin!(connection);
        let ended = tokio::select! {
            ended = &mut connection => Some(ended),
            // What the server has not answered by then is cut off.
            _ = not_needed => tokio::time::timeout(PARTING, connection).await.ok(),
        };
        if let Some(Err(error)) = ended {
            tracing::debug!("local session ended: {}", words(&error));
        }
    });
    Ok(Connection { client, _needed: needed })
}

/// Sees whether the server would let us in, at less than a login costs.
async fn knock(config: &PostgresConfig, pid_file: &PidFile) -> Result<(), WireError> {
    let listening = Listening::of(config, Some(pid_file));
    let host = listening.local_host(config.use_unix_socket);
    let superuser = Credentials { username: user(config).to_owned(), ..config.superuser.clone() };
    Wire::knock(&host, listening.port, &superuser, &config.database).await
}

/// The superuser's name.
pub fn user(config: &PostgresConfig) -> &str {
    if config.superuser.username.is_empty() { "postgres" } else { &config.superuser.username }
}

/// An error in PostgreSQL's own words.
pub fn words(error: &tokio_postgres::Error) -> String {
    if let Some(db) = error.as_db_error() {
        return format!("{} ({})", db.message(), db.code().code());
    }
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

/// Returns once no client's transaction is open any more that is now.
pub async fn end_of_transactions(client: &Client) -> Result<(), PgError> {
    const OPEN: &str = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' \
                        AND pid <> pg_backend_pid() AND xact_start <= $1::text::timestamptz";
    let now: String = client.query_one("SELECT clock_timestamp()::text", &[]).await.map_err(failed)?.get(0);
    loop {
        let open: i64 = client.query_one(OPEN, &[&now]).await.map_err(failed)?.get(0);
        if open == 0 {
            return Ok(());
        }
        tokio::time::sleep(TRANSACTIONS_PAUSE).await;
    }
}

/// An error of a query as one of ours.
pub fn failed(error: tokio_postgres::Error) -> PgError {
    PgError::Failed(words(&error))
}

fn running(row: &Row, system_id: SystemId) -> Option<Running> {
    let text = |at: usize| row.try_get::<_, Option<String>>(at).ok().flatten();
    let lsn = |at: usize| text(at).and_then(|text| text.parse::<Lsn>().ok());
    let standby: bool = row.try_get(0).ok()?;
    let (receive_lsn, replay_lsn) = if standby { (lsn(3), lsn(4)) } else { (None, None) };
    let received = row.try_get::<_, Option<i32>>(8).ok().flatten().map(|tli| TimelineId(tli.unsigned_abs()));
    let timeline = match standby {
        true => received.filter(|timeline| timeline.0 > 0),
        false => text(2).and_then(|digits| u32::from_str_radix(&digits, 16).ok()).map(TimelineId),
    };
    let receiver = text(7);
    let replication_state = match &receiver {
        Some(status) if status == "streaming" => Some("streaming".to_owned()),
        _ if standby && text(13).is_some_and(|command| !command.is_empty()) => Some("in archive recovery".to_owned()),
        _ => None,
    };
    // A receiver that waits at the end of a timeline keeps its connection, whatever primary_conninfo says by then.
    let connected = || {
        receiver.as_ref().filter(|status| *status == "streaming")?;
        let port = row.try_get::<_, Option<i32>>(11).ok().flatten()?;
        Some(format!("{}:{port}", text(10)?))
    };
    let upstream = match standby {
        true => connected().or_else(|| conninfo::address(&text(12)?)),
        false => None,
    };
    Some(Running {
        role: if standby { PgRole::Standby } else { PgRole::Primary },
        system_id,
        timeline,
        checkpoint_timeline: None,
        lsn: if standby { receive_lsn.max(replay_lsn).unwrap_or(Lsn::INVALID) } else { lsn(1)? },
        receive_lsn,
        replay_lsn,
        reads_own_wal: row.try_get(22).ok()?,
        replay_timestamp: if standby { text(5) } else { None },
        replay_paused: row.try_get(6).ok()?,
        latest_end_lsn: if standby { lsn(9) } else { None },
        replication_state: if standby { replication_state } else { None },
        upstream,
        upstream_slot: text(21).filter(|slot| standby && !slot.is_empty()),
        server_version: row.try_get::<_, i32>(14).ok()?.unsigned_abs(),
        postmaster_start_time: text(15)?,
        replication: text(17).map_or(Some(Vec::new()), |json| wal_senders(&json))?,
        synchronous_standby_names: text(16)?,
        synchronous_commit: text(19)?,
        waits_for_disk: row.try_get(20).ok()?,
        pending_restart: Default::default(),
        slots: text(18).map_or_else(Default::default, |json| slots(&json)),
    })
}

fn wal_senders(json: &str) -> Option<Vec<WalSender>> {
    /// What is null while a WAL sender starts, or for a user without the right to see it.
    #[derive(Deserialize)]
    struct Sender {
        usename: Option<String>,
        application_name: Option<String>,
        client_addr: Option<String>,
        state: Option<String>,
        sync_state: Option<String>,
        sync_priority: Option<i32>,
        write_lsn: Option<String>,
        flush_lsn: Option<String>,
        replay_lsn: Option<String>,
    }
    let senders: Vec<Sender> = serde_json::from_str(json).ok()?;
    let lsn = |text: Option<String>| text.and_then(|text| text.parse().ok());
    let sender = |s: Sender| WalSender {
        usename: s.usename.unwrap_or_default(),
        application_name: s.application_name.unwrap_or_default(),
        client_addr: s.client_addr,
        state: s.state.unwrap_or_default(),
        sync_state: s.sync_state.unwrap_or_default(),
        sync_priority: s.sync_priority.unwrap_or(0),
        write_lsn: lsn(s.write_lsn),
        flush_lsn: lsn(s.flush_lsn),
        replay_lsn: lsn(s.replay_lsn),
    };
    Some(senders.into_iter().map(sender).collect())
}

fn slots(json: &str) -> std::collections::BTreeMap<String, Lsn> {
    let Ok(Value::Object(slots)) = serde_json::from_str(json) else { return Default::default() };
    slots.into_iter().filter_map(|(name, lsn)| Some((name, lsn.as_str()?.parse().ok()?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_pg_stat_replication() {
        let json = r#"[{"usename":"r","application_name":"b","client_addr":null,"state":"streaming","sync_state":"sync",
            "sync_priority":1,"write_lsn":"0/3000060","flush_lsn":"0/3000000","replay_lsn":null}]"#;
        let senders = wal_senders(json).expect("parses");
        assert_eq!((senders[0].write_lsn, senders[0].replay_lsn), (Some(Lsn(0x300_0060)), None));
        assert_eq!(wal_senders("{}"), None);
        assert_eq!(slots(r#"{"a":"0/1"}"#).get("a"), Some(&Lsn(1)));
    }
}
