//! What clients did, when, and what they were told.

use std::collections::{BTreeMap, HashSet};

use serde::{Deserialize, Serialize};

/// Microseconds since the run began, on the clock that counts suspend.
pub type Micros = u64;

/// One call of a client: a row, a transaction, a read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// Who called. Every client has its own port and its own numbers.
    pub client: u32,
    /// Which connection of this client, counted from 1.
    pub session: u32,
    /// Where it was connected to.
    pub port: Port,
    /// What it asked for.
    pub op: Op,
    /// When it began, connecting included.
    pub start: Micros,
    /// When it had the answer, or gave up.
    pub end: Micros,
    /// What it knows.
    pub outcome: Outcome,
    /// Who answered, if that is known.
    pub served: Option<Served>,
    /// What went wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// What a client is connected to. Routers and nodes are numbered from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Port {
    /// The read-write port of a router.
    ReadWrite(usize),
    /// The read-only port of a router.
    ReadOnly(usize),
    /// PostgreSQL of a node, past the routers.
    Direct(usize),
}

/// What was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Op {
    /// Insert a row with this number, which no other row of the client has.
    Insert(u64),
    /// The same, waiting for no standby: it shows that the server takes writes, and may be lost.
    InsertLocal(u64),
    /// A serializable transaction on lists.
    Transaction(Vec<Step>),
    /// The highest row number of another client.
    Observe {
        /// Whose rows.
        of: u32,
        /// What was seen; `None`: no row, or no answer.
        seen: Option<u64>,
    },
}

/// One statement of a [`Op::Transaction`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Append a value to the list of a key. No other transaction appends this value.
    Append {
        /// The list.
        key: u64,
        /// The value.
        value: u64,
    },
    /// Read a whole list.
    Read {
        /// The list.
        key: u64,
        /// What was read; `None`: no answer.
        list: Option<Vec<u64>>,
    },
}

/// What a client knows after a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Acknowledged.
    Ok,
    /// It did not happen, for certain.
    Failed,
    /// It may have happened, or may happen yet.
    Unknown,
}

/// The server that executed a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Served {
    /// The node, from 0.
    pub node: usize,
    /// The timeline it was on; 0 for a standby, which is not asked.
    pub timeline: u32,
    /// Its WAL insert position in bytes; 0 for a standby.
    pub lsn: u64,
}

impl Call {
    /// Whether this is an acknowledged write, and who took it.
    pub fn taken_by(&self) -> Option<Served> {
        let writes = match &self.op {
            Op::Insert(_) | Op::InsertLocal(_) => true,
            Op::Transaction(steps) => steps.iter().any(|step| matches!(step, Step::Append { .. })),
            Op::Observe { .. } => false,
        };
        if writes && self.outcome == Outcome::Ok { self.served } else { None }
    }
}

/// What the database holds after the run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finals {
    /// Rows: client and number.
    pub rows: HashSet<(u32, u64)>,
    /// Lists by key.
    pub lists: BTreeMap<u64, Vec<u64>>,
}
