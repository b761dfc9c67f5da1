//! Clients: writers, list appenders and readers through the routers, and writers past them to every node.
//!
//! Every call is recorded, also one that is still under way when the clients end: an unrecorded write could be taken
//! for one that nobody made.

use std::net::SocketAddrV4;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::FutureExt as _;
use parking_lot::Mutex;
use rand::{Rng, SeedableRng, rngs::StdRng};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_postgres::{Config, NoTls, SimpleQueryMessage};

use crate::history::{Call, Finals, Micros, Op, Outcome, Port, Served, Step};
use crate::schedule::{NODES, ROUTERS};
use crate::world::{Kind, POSTGRES_PORT, READ_ONLY_PORT, READ_WRITE_PORT, World};

/// How long a client waits for an answer. Longer than any outage: a client that is left hanging must show.
const PATIENCE: Duration = Duration::from_secs(60);
/// Pause after an error, so that a refused port is not a busy loop.
const AFTER_ERROR: Duration = Duration::from_millis(5);
/// How often a client asks that waits for no answer.
const PUSH_EVERY: Duration = Duration::from_millis(20);
/// How likely a client connects anew after a call.
const RECONNECT: f64 = 0.01;
/// How many lists are appended to at a time.
const LIVE_LISTS: u64 = 6;
/// After so many appends to all of them, others are begun: reading a list must not get expensive.
const APPENDS_PER_GENERATION: u64 = 500;
/// The most calls of a run.
const MOST_CALLS: usize = 6_000_000;

/// Everything that is recorded.
#[derive(Debug)]
pub struct Recorder {
    world: Arc<World>,
    calls: Mutex<Vec<Call>>,
    leader: AtomicUsize,
    last_ack: AtomicU64,
    appends: AtomicU64,
}

impl Recorder {
    /// Nothing yet; `leader` leads.
    pub fn new(world: &Arc<World>, leader: usize) -> Arc<Self> {
        Arc::new(Self {
            world: world.clone(),
            calls: Mutex::default(),
            leader: AtomicUsize::new(leader),
            last_ack: AtomicU64::new(0),
            appends: AtomicU64::new(0),
        })
    }

    /// The node that took the last acknowledged write on a read-write port.
    pub fn leader(&self) -> usize {
        self.leader.load(Ordering::Relaxed)
    }

    /// When the last write on a read-write port was acknowledged.
    pub fn last_ack(&self) -> Micros {
        self.last_ack.load(Ordering::Relaxed)
    }

    /// How many calls there are so far.
    pub fn count(&self) -> usize {
        self.calls.lock().len()
    }

    /// Whether no more can be recorded.
    pub fn is_full(&self) -> bool {
        self.count() >= MOST_CALLS
    }

    /// All calls.
    pub fn take(&self) -> Vec<Call> {
        std::mem::take(&mut self.calls.lock())
    }

    fn add(&self, call: Call) {
        if let (Port::ReadWrite(_), Some(served)) = (call.port, call.taken_by()) {
            self.leader.store(served.node, Ordering::Relaxed);
            self.last_ack.fetch_max(call.end, Ordering::Relaxed);
        }
        let mut calls = self.calls.lock();
        if calls.len() < MOST_CALLS {
            calls.push(call);
        }
    }
}

/// Running clients.
#[derive(Debug)]
pub struct Workload {
    stop: watch::Sender<bool>,
    tasks: Vec<JoinHandle<()>>,
}

impl Workload {
    /// Makes the tables, through the first router, and starts the clients.
    ///
    /// # Errors
    /// Nothing can be written.
    pub async fn start(world: &Arc<World>, recorder: &Arc<Recorder>, seed: u64) -> Result<Self> {
        create_tables(world.address(Kind::Router(0), READ_WRITE_PORT)).await?;
        let (stop, stopped) = watch::channel(false);
        let client = |id: u32, port: Port| Client {
            id,
            port,
            address: match port {
                Port::ReadWrite(router) => world.address(Kind::Router(router), READ_WRITE_PORT),
                Port::ReadOnly(router) => world.address(Kind::Router(router), READ_ONLY_PORT),
                Port::Direct(node) => world.address(Kind::Node(node), POSTGRES_PORT),
            },
            local: false,
            session: 0,
            connection: None,
            recorder: recorder.clone(),
            rng: StdRng::seed_from_u64(seed ^ (u64::from(id) << 32)),
            stop: stopped.clone(),
        };
        let mut tasks = Vec::new();
        for router in 0..ROUTERS {
            let id = |kind: u32| kind * 100 + router as u32;
            tasks.push(tokio::spawn(client(id(1), Port::ReadWrite(router)).insert_rows()));
            tasks.push(tokio::spawn(push(world.address(Kind::Router(router), READ_WRITE_PORT), stopped.clone())));
            for half in 0..2 {
                tasks.push(tokio::spawn(client(id(2) + 10 * half, Port::ReadWrite(router)).append_to_lists()));
            }
            for of in 0..ROUTERS {
                let reader = client(id(3) + 10 * of as u32, Port::ReadOnly(router));
                tasks.push(tokio::spawn(reader.observe(100 + of as u32)));
            }
        }
        for node in 0..NODES {
            tasks.push(tokio::spawn(client(400 + node as u32, Port::Direct(node)).insert_rows()));
            let mut local = client(500 + node as u32, Port::Direct(node));
            local.local = true;
            tasks.push(tokio::spawn(local.insert_rows()));
        }
        Ok(Self { stop, tasks })
    }

    /// Ends the clients. What is not answered within five seconds is given up.
    pub async fn stop(self) {
        let _ = self.stop.send(true);
        let deadline = tokio::time::Instant::now() + Duration::from_secs(5);
        for mut task in self.tasks {
            if tokio::time::timeout_at(deadline, &mut task).await.is_err() {
                task.abort();
                let _ = task.await;
            }
        }
    }
}

/// One client with its connection.
struct Client {
    id: u32,
    port: Port,
    address: SocketAddrV4,
    /// Waits for no standby.
    local: bool,
    session: u32,
    connection: Option<tokio_postgres::Client>,
    recorder: Arc<Recorder>,
    rng: StdRng,
    stop: watch::Receiver<bool>,
}

/// Why a call has no answer.
#[derive(Debug)]
struct Failure {
    outcome: Outcome,
    error: String,
}

/// A call that is recorded as unknown if it is dropped before its end.
struct Pending {
    recorder: Arc<Recorder>,
    call: Option<Call>,
}

impl Pending {
    fn end(mut self, result: Result<(Op, Option<Served>), Failure>) {
        let Some(mut call) = self.call.take() else { return };
        call.end = self.recorder.world.journal().now();
        match result {
            Ok((op, served)) => (call.op, call.served, call.outcome) = (op, served, Outcome::Ok),
            Err(failure) => (call.outcome, call.error) = (failure.outcome, Some(failure.error)),
        }
        self.recorder.add(call);
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if let Some(mut call) = self.call.take() {
            call.end = self.recorder.world.journal().now();
            self.recorder.add(call);
        }
    }
}

impl Client {
    async fn insert_rows(mut self) {
        let mut row = 0;
        while !*self.stop.borrow() {
            if matches!(self.port, Port::Direct(_)) && !self.takes_writes().await {
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            }
            row += 1;
            let op = if self.local { Op::InsertLocal(row) } else { Op::Insert(row) };
            let table = match self.port {
                Port::Direct(node) => format!("direct_{}", node + 1),
                _ => "rows".to_owned(),
            };
            let sql = format!("INSERT INTO {table} VALUES ({}, {row}) RETURNING {SERVED}", self.id);
            self.call(op, async |connection, op| {
                let rows = rows(connection, &sql).await?;
                Ok((op, served(&rows)))
            })
            .await;
            self.pause(8).await;
        }
    }

    async fn append_to_lists(mut self) {
        let mut number = 0;
        while !*self.stop.borrow() {
            let mut steps = Vec::new();
            for _ in 0..self.rng.random_range(1..=4) {
                let generation = self.recorder.appends.load(Ordering::Relaxed) / APPENDS_PER_GENERATION;
                let key = generation * LIVE_LISTS + self.rng.random_range(0..LIVE_LISTS);
                if self.rng.random_bool(0.5) {
                    number += 1;
                    steps.push(Step::Append { key, value: u64::from(self.id) * 1_000_000_000 + number });
                } else {
                    steps.push(Step::Read { key, list: None });
                }
            }
            let appends = steps.iter().filter(|step| matches!(step, Step::Append { .. })).count();
            self.recorder.appends.fetch_add(appends as u64, Ordering::Relaxed);
            self.call(Op::Transaction(steps), transaction).await;
            self.pause(20).await;
        }
    }

    /// Reads what a writer has written so far.
    async fn observe(mut self, of: u32) {
        while !*self.stop.borrow() {
            let sql = format!("SELECT host(inet_server_addr()) || ' 0 0', max(seq) FROM rows WHERE client = {of}");
            self.call(Op::Observe { of, seen: None }, async |connection, _| {
                let rows = rows(connection, &sql).await?;
                let seen = rows.first().and_then(|row| row.get(1)?.parse().ok());
                Ok((Op::Observe { of, seen }, served(&rows)))
            })
            .await;
            self.pause(20).await;
        }
    }

    /// Whether this node is no standby. Not recorded: it is asked all the time.
    async fn takes_writes(&mut self) -> bool {
        let asked = async {
            let connection = self.connected().await?;
            let rows = rows(connection, "SELECT pg_is_in_recovery()").await?;
            Ok::<bool, Failure>(rows.first().and_then(|row| row.first()).is_some_and(|answer| answer == "f"))
        };
        match tokio::time::timeout(PATIENCE, asked).await {
            Ok(Ok(takes)) => takes,
            _ => {
                self.connection = None;
                false
            }
        }
    }

    /// Connects if needed, does `work`, and records it.
    async fn call(
        &mut self,
        op: Op,
        work: impl AsyncFnOnce(&tokio_postgres::Client, Op) -> Result<(Op, Option<Served>), Failure>,
    ) {
        let call = Call {
            client: self.id,
            session: self.session + u32::from(self.connection.is_none()),
            port: self.port,
            op: op.clone(),
            start: self.recorder.world.journal().now(),
            end: 0,
            outcome: Outcome::Unknown,
            served: None,
            error: None,
        };
        let pending = Pending { recorder: self.recorder.clone(), call: Some(call) };
        let result = tokio::time::timeout(PATIENCE, async {
            let connection = self.connected().await?;
            work(connection, op).await
        })
        .await
        .unwrap_or_else(|_| Err(Failure { outcome: Outcome::Unknown, error: "no answer within a minute".to_owned() }));
        let failure = result.as_ref().err().map(|failure| failure.outcome);
        pending.end(result);
        if let Some(outcome) = failure {
            if outcome == Outcome::Unknown || !self.rolled_back().await {
                self.connection = None;
            }
            tokio::time::sleep(AFTER_ERROR).await;
        }
        if self.rng.random_bool(RECONNECT) {
            self.connection = None;
        }
    }

    /// Whether the connection can be used again after an error.
    async fn rolled_back(&mut self) -> bool {
        let Some(connection) = &self.connection else { return false };
        matches!(tokio::time::timeout(PATIENCE, rows(connection, "ROLLBACK")).await, Ok(Ok(_)))
    }

    async fn connected(&mut self) -> Result<&tokio_postgres::Client, Failure> {
        let connection = match self.connection.take() {
            Some(connection) => connection,
            None => {
                self.session += 1;
                let failed = |error: anyhow::Error| Failure { outcome: Outcome::Failed, error: format!("{error:#}") };
                let watchful = matches!(self.port, Port::Direct(_));
                let connection = connect(self.address, watchful).await.map_err(failed)?;
                if self.local {
                    rows(&connection, "SET synchronous_commit = local").await?;
                }
                connection
            }
        };
        Ok(self.connection.insert(connection))
    }

    async fn pause(&mut self, most_ms: u64) {
        tokio::time::sleep(Duration::from_millis(self.rng.random_range(1..most_ms))).await;
    }
}

/// Asks without waiting for answers, so that a router always has something for the leader, also for one that is silent. Not
/// recorded: nobody learns anything by it.
async fn push(address: SocketAddrV4, mut stop: watch::Receiver<bool>) {
    let pushed = async {
        loop {
            if let Ok(Ok(client)) = tokio::time::timeout(PATIENCE, connect(address, false)).await {
                while !client.is_closed() {
                    // It is sent when it is polled first.
                    let _ = client.simple_query("SELECT 1").now_or_never();
                    tokio::time::sleep(PUSH_EVERY).await;
                }
            }
            tokio::time::sleep(AFTER_ERROR).await;
        }
    };
    tokio::select! {
        () = pushed => {}
        _ = stop.wait_for(|stop| *stop) => {}
    }
}

/// Node, timeline and WAL position, as [`served`] reads them.
const SERVED: &str = "host(inet_server_addr()) || ' ' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8) || ' ' \
                      || (pg_current_wal_insert_lsn() - '0/0')";

fn served(rows: &[Vec<String>]) -> Option<Served> {
    let mut fields = rows.first()?.first()?.split(' ');
    let node: usize = fields.next()?.rsplit('.').next()?.parse().ok()?;
    let timeline = u32::from_str_radix(fields.next()?, 16).ok()?;
    Some(Served { node: node.checked_sub(11)?, timeline, lsn: fields.next()?.parse().ok()? })
}

async fn transaction(connection: &tokio_postgres::Client, op: Op) -> Result<(Op, Option<Served>), Failure> {
    let Op::Transaction(mut steps) = op else { return Ok((op, None)) };
    let mut sql = format!("BEGIN ISOLATION LEVEL SERIALIZABLE; SELECT {SERVED}; ");
    for step in &steps {
        sql += &match step {
            Step::Append { key, value } => format!(
                "INSERT INTO lists VALUES ({key}, ARRAY[{value}]) \
                 ON CONFLICT (key) DO UPDATE SET items = lists.items || EXCLUDED.items; "
            ),
            Step::Read { key, .. } => {
                format!("SELECT coalesce((SELECT items::text FROM lists WHERE key = {key}), ''); ")
            }
        };
    }
    let failed = |failure: Failure| Failure { outcome: Outcome::Failed, ..failure };
    let answers = rows(connection, &sql).await.map_err(failed)?;
    rows(connection, "COMMIT").await?;
    let mut lists = answers.iter().skip(1).filter_map(|row| row.first());
    for step in &mut steps {
        if let Step::Read { list, .. } = step {
            *list = lists.next().map(|text| numbers(text));
        }
    }
    Ok((Op::Transaction(steps), served(&answers)))
}

fn numbers(text: &str) -> Vec<u64> {
    let inner = text.trim_matches(['{', '}']);
    inner.split(',').filter_map(|number| number.parse().ok()).collect()
}

/// All rows of all statements. An error of severity ERROR means that the statement was rolled back; anything else leaves open
/// what happened.
async fn rows(connection: &tokio_postgres::Client, sql: &str) -> Result<Vec<Vec<String>>, Failure> {
    match connection.simple_query(sql).await {
        Ok(messages) => Ok(texts(&messages)),
        Err(error) => {
            let rolled_back = error.as_db_error().is_some_and(|error| error.severity() == "ERROR");
            let outcome = if rolled_back { Outcome::Failed } else { Outcome::Unknown };
            let error = error.as_db_error().map_or_else(|| error.to_string(), ToString::to_string);
            Err(Failure { outcome, error })
        }
    }
}

fn texts(messages: &[SimpleQueryMessage]) -> Vec<Vec<String>> {
    let row = |message: &SimpleQueryMessage| match message {
        SimpleQueryMessage::Row(row) => {
            Some((0..row.len()).map(|column| row.get(column).unwrap_or_default().to_owned()).collect())
        }
        _ => None,
    };
    messages.iter().filter_map(row).collect()
}

/// Connects as the superuser. A `watchful` client notices in seconds that a host has lost its power, to see at once what
/// it does when it is back; a frozen one is waited for, its kernel answers.
async fn connect(address: SocketAddrV4, watchful: bool) -> Result<tokio_postgres::Client> {
    let mut config = Config::new();
    if watchful {
        let second = Duration::from_secs(1);
        config.connect_timeout(2 * second).tcp_user_timeout(4 * second);
        config.keepalives_idle(second).keepalives_interval(second).keepalives_retries(3);
    }
    config.host(address.ip().to_string()).port(address.port()).user("postgres").dbname("postgres");
    let (client, connection) = config.connect(NoTls).await?;
    // Ends with the client. What it has to say, the client's next call says too.
    tokio::spawn(connection);
    Ok(client)
}

/// Connects, runs statements, and returns all rows.
///
/// # Errors
/// They fail or take longer than `limit`.
pub async fn query(address: SocketAddrV4, sql: &str, limit: Duration) -> Result<Vec<Vec<String>>> {
    let asked = async { Ok::<_, anyhow::Error>(texts(&connect(address, false).await?.simple_query(sql).await?)) };
    tokio::time::timeout(limit, asked).await.with_context(|| format!("{address} does not answer within {limit:?}"))?
}

async fn create_tables(address: SocketAddrV4) -> Result<()> {
    let mut sql = "CREATE TABLE lists (key bigint PRIMARY KEY, items bigint[]);".to_owned();
    let direct = (1..=NODES).map(|node| format!("direct_{node}"));
    for table in std::iter::once("rows".to_owned()).chain(direct) {
        sql += &format!("CREATE TABLE {table} (client int, seq bigint, PRIMARY KEY (client, seq));");
    }
    query(address, &sql, Duration::from_secs(20)).await.map(|_| ()).context("creating tables")
}

/// What a server holds.
///
/// # Errors
/// It can't be read.
pub async fn finals(address: SocketAddrV4) -> Result<Finals> {
    let limit = Duration::from_secs(120);
    let tables = (1..=NODES).map(|node| format!("SELECT * FROM direct_{node};"));
    let sql: String = std::iter::once("SELECT * FROM rows;".to_owned()).chain(tables).collect();
    let mut finals = Finals::default();
    for row in query(address, &sql, limit).await? {
        ensure!(row.len() == 2, "a row of {} columns", row.len());
        finals.rows.insert((row[0].parse()?, row[1].parse()?));
    }
    for row in query(address, "SELECT key, items::text FROM lists", limit).await? {
        ensure!(row.len() == 2, "a list of {} columns", row.len());
        finals.lists.insert(row[0].parse()?, numbers(&row[1]));
    }
    Ok(finals)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_server_says_of_itself() {
        let said = |text: &str| served(&[vec![text.to_owned()]]);
        assert_eq!(said("10.77.0.12 0000000A 1234"), Some(Served { node: 1, timeline: 10, lsn: 1234 }));
        assert_eq!(said("10.77.0.1 0 0"), None);
        assert_eq!(served(&[]), None);
        assert_eq!(numbers("{1,2,30}"), [1, 2, 30]);
        assert!(numbers("").is_empty());
    }
}
