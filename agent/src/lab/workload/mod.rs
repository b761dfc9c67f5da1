//! Applications of a lab: writers and readers that remember what the server promised them and when.
//!
//! [`Writers`] insert rows through a port and record every acknowledged one; [`Record`] then says how long writes stood
//! still around a fault, which acknowledged rows are gone, and whether two nodes took writes at the same time.

mod load;
mod record;

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_postgres::{Client, Config, NoTls, SimpleQueryMessage};
use trunkline_common::{Clock, SystemClock};

pub use load::{Load, Seen};
pub use record::{Read, Record, TwoPrimaries, Write};

use super::cluster::SUPERUSER;

/// How long one connect or statement may take before the client gives it up. Far longer than any failover: a client
/// that a proxy leaves hanging must show in the figures.
const PATIENCE: Duration = Duration::from_secs(120);

/// Pause after an error. Connections are opened again at once; this only keeps a refused port from being a busy loop.
const AFTER_ERROR: Duration = Duration::from_millis(1);

/// The most writes one [`Writers`] remembers.
const MOST_RECORDED: usize = 2_000_000;

/// Where to connect.
#[derive(Debug, Clone)]
pub struct Target {
    port: u16,
    password: String,
}

impl Target {
    /// The superuser at `127.0.0.1:port`.
    pub fn new(port: u16, password: &str) -> Self {
        Self { port, password: password.to_owned() }
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Connects.
    ///
    /// # Errors
    /// Refused, or not possible within `limit`.
    pub async fn connect(&self, limit: Duration) -> Result<Client> {
        let mut config = Config::new();
        config.host("127.0.0.1").port(self.port).user(SUPERUSER).dbname("postgres").password(&self.password);
        config.application_name("trunkline-lab");
        let connect = tokio::time::timeout(limit, config.connect(NoTls)).await;
        let (client, connection) = connect.with_context(|| format!("no connection within {limit:?}"))??;
        // Ends with the client. What it has to say, the client's next call says too.
        tokio::spawn(connection);
        Ok(client)
    }

    /// Connects, runs one statement and returns the first column of its first row.
    ///
    /// # Errors
    /// It fails, has no row, or takes longer than `limit`.
    pub async fn query_one(&self, sql: &str, limit: Duration) -> Result<String> {
        let client = self.connect(limit).await?;
        let messages = tokio::time::timeout(limit, client.simple_query(sql)).await.context("no answer in time")??;
        first_row(&messages).and_then(|row| row.into_iter().next()).with_context(|| format!("no row from {sql}"))
    }

    /// Connects and runs statements that return nothing of interest.
    ///
    /// # Errors
    /// One fails, or it takes longer than `limit`.
    pub async fn execute(&self, sql: &str, limit: Duration) -> Result<()> {
        let client = self.connect(limit).await?;
        tokio::time::timeout(limit, client.batch_execute(sql)).await.context("no answer in time")?.context("statement")
    }
}

/// Makes the table that writers write to.
///
/// # Errors
/// The server behind `target` takes no writes.
pub async fn create_table(target: &Target) -> Result<()> {
    let sql = "CREATE TABLE IF NOT EXISTS lab (writer int, seq bigint, direct bool, PRIMARY KEY (writer, seq))";
    target.execute(sql, Duration::from_secs(10)).await
}

/// Clients that write one row after the other, each its own connection.
#[derive(Debug)]
pub struct Writers {
    running: Running,
    record: Arc<Mutex<Record>>,
}

impl Writers {
    /// Starts `count` writers to `target`, numbered from `first` on, each pausing for `pace` between rows.
    pub fn start(target: &Target, first: u32, count: u32, pace: Duration) -> Self {
        let record = Arc::new(Mutex::new(Record::default()));
        let running = Running::start((first..first + count).map(|writer| {
            let (target, record) = (target.clone(), record.clone());
            move |stop| write(target, writer, false, pace, record, stop)
        }));
        Self { running, record }
    }

    /// Starts one writer to each of `targets`, past any proxy, to see which nodes take writes. A node that refuses to
    /// write is asked again on the same connection.
    pub fn direct(targets: &[Target], first: u32, pace: Duration) -> Self {
        let record = Arc::new(Mutex::new(Record::default()));
        let running = Running::start((first..).zip(targets.to_vec()).map(|(writer, target)| {
            let record = record.clone();
            move |stop| write(target, writer, true, pace, record, stop)
        }));
        Self { running, record }
    }

    /// Waits until `count` more rows are acknowledged.
    ///
    /// # Errors
    /// They are not within `limit`.
    pub async fn progress(&self, count: usize, limit: Duration) -> Result<()> {
        let before = self.record.lock().writes.len();
        super::wait::until(format!("{count} more acknowledged writes"), limit, async || {
            let record = self.record.lock();
            let more = record.writes.len() - before;
            if more >= count {
                return Ok(());
            }
            bail!("{more} so far, last error: {}", record.last_error.as_deref().unwrap_or("none"))
        })
        .await
    }

    /// What is recorded so far.
    pub fn record(&self) -> Record {
        self.record.lock().clone()
    }

    /// Ends them. A statement that is under way is waited for, a hanging one given up after two seconds.
    pub async fn stop(self) -> Record {
        self.running.stop().await;
        self.record.lock().clone()
    }
}

/// Clients that connect, ask who they reached, and disconnect.
#[derive(Debug)]
pub struct Readers {
    running: Running,
    reads: Arc<Mutex<Vec<Read>>>,
}

impl Readers {
    /// Starts `count` readers of `target`.
    pub fn start(target: &Target, count: usize, pace: Duration) -> Self {
        let reads = Arc::new(Mutex::new(Vec::new()));
        let running = Running::start((0..count).map(|_| {
            let (target, reads) = (target.clone(), reads.clone());
            move |stop| read(target, pace, reads, stop)
        }));
        Self { running, reads }
    }

    /// Ends them.
    pub async fn stop(self) -> Vec<Read> {
        self.running.stop().await;
        std::mem::take(&mut *self.reads.lock())
    }
}

/// Tasks with a common end.
#[derive(Debug)]
struct Running {
    stop: watch::Sender<bool>,
    tasks: Vec<JoinHandle<()>>,
}

impl Running {
    fn start<F>(tasks: impl IntoIterator<Item = impl FnOnce(watch::Receiver<bool>) -> F>) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (stop, stopped) = watch::channel(false);
        let tasks = tasks.into_iter().map(|task| tokio::spawn(task(stopped.clone()))).collect();
        Self { stop, tasks }
    }

    async fn stop(self) {
        let _ = self.stop.send(true);
        for mut task in self.tasks {
            if tokio::time::timeout(Duration::from_secs(2), &mut task).await.is_err() {
                task.abort();
            }
        }
    }
}

async fn write(
    target: Target,
    writer: u32,
    direct: bool,
    pace: Duration,
    record: Arc<Mutex<Record>>,
    stop: watch::Receiver<bool>,
) {
    let clock = SystemClock;
    let mut client = None;
    let mut seq = 0_u64;
    while !*stop.borrow() {
        seq += 1;
        let sent = clock.now();
        match insert(&mut client, &target, writer, seq, direct).await {
            Ok((port, timeline)) => {
                let write = Write { writer, seq, sent, acked: clock.now(), port, timeline };
                let mut record = record.lock();
                if record.writes.len() < MOST_RECORDED {
                    record.writes.push(write);
                }
            }
            Err(error) => {
                let closed = client.as_ref().is_none_or(Client::is_closed);
                record.lock().failed(format!("{error:#}"));
                // A standby says "read-only" and is still worth asking; anything else needs a new connection.
                if closed || !direct {
                    client = None;
                }
                tokio::time::sleep(AFTER_ERROR).await;
            }
        }
        tokio::time::sleep(pace).await;
    }
}

/// Writes one row; the server says which port and timeline it was written on.
async fn insert(
    client: &mut Option<Client>,
    target: &Target,
    writer: u32,
    seq: u64,
    direct: bool,
) -> Result<(u16, u32)> {
    let connected = match client.take() {
        Some(connected) => connected,
        None => target.connect(PATIENCE).await?,
    };
    let connected = client.insert(connected);
    // A standby is asked this again and again; an INSERT each time would fill its log with errors.
    if direct {
        let answer = tokio::time::timeout(PATIENCE, connected.simple_query("SELECT pg_is_in_recovery()")).await;
        let row = first_row(&answer.context("no answer")??).context("no row")?;
        ensure!(row == ["f"], "it is a standby");
    }
    let sql = format!(
        "INSERT INTO lab VALUES ({writer}, {seq}, {direct}) \
         RETURNING inet_server_port(), left(pg_walfile_name(pg_current_wal_insert_lsn()), 8)"
    );
    let messages = tokio::time::timeout(PATIENCE, connected.simple_query(&sql)).await.context("no answer")??;
    let row = first_row(&messages).context("no row")?;
    let [port, timeline] = &row[..] else { bail!("{} columns", row.len()) };
    Ok((port.parse()?, u32::from_str_radix(timeline, 16)?))
}

async fn read(target: Target, pace: Duration, reads: Arc<Mutex<Vec<Read>>>, stop: watch::Receiver<bool>) {
    let clock = SystemClock;
    while !*stop.borrow() {
        let sent = clock.now();
        let sql = "SELECT inet_server_port() || ' ' || pg_is_in_recovery()";
        if let Ok(answer) = target.query_one(sql, PATIENCE).await {
            let (port, recovery) = answer.split_once(' ').unwrap_or((&answer, ""));
            let read =
                Read { sent, answered: clock.now(), port: port.parse().unwrap_or(0), standby: recovery == "true" };
            let mut reads = reads.lock();
            if reads.len() < MOST_RECORDED {
                reads.push(read);
            }
        }
        tokio::time::sleep(pace).await;
    }
}

fn first_row(messages: &[SimpleQueryMessage]) -> Option<Vec<String>> {
    messages.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => {
            Some((0..row.len()).map(|column| row.get(column).unwrap_or_default().to_owned()).collect())
        }
        _ => None,
    })
}
