//! Decides, after a run, whether what clients saw may have happened.
//!
//! Everything here is a plain function of the history and of what the database holds at the end.

mod deposed;
mod graph;
mod lists;
mod loss;
mod outage;
mod reign;
mod session;

use serde::Serialize;

use crate::history::{Call, Finals, Micros};

pub(crate) use deposed::check as deposed;
pub use outage::{Gap, acknowledgements, longest_gap};

/// What a run promises.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Promises {
    /// Synchronous replication all the time: nothing acknowledged is ever lost.
    pub synchronous: bool,
    /// Without it: how many bytes of WAL may be lost at a failover.
    pub lag_limit: u64,
}

/// Something that must not have happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Violation {
    /// Which promise is broken.
    pub kind: Kind,
    /// What was seen.
    pub text: String,
    /// When, if it has a time: since the run began.
    pub at: Option<Micros>,
}

/// Promises that can be broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// An acknowledged write is gone; without synchronous mode: more than the limit allows.
    LostWrite,
    /// A write was sent to a node after another one had acknowledged a later reign's, and taken.
    TwoPrimaries,
    /// A write was acknowledged through a router by a node after another one had taken writes.
    LateAcknowledgement,
    /// The same, past the routers.
    LateDirectAcknowledgement,
    /// A router sent something on a session of a leader after it had said that this leader is deposed.
    SentToDeposed,
    /// A read saw a value that was never committed, or twice, or in an order that contradicts other reads.
    ListRead,
    /// No serial order that respects real time explains the transactions.
    NotSerializable,
    /// A later read of a session on the read-only port saw less than an earlier one.
    SessionWentBack,
    /// A read on the read-only port saw a row that nobody can have written.
    PhantomRow,
    /// The cluster did not get whole by itself.
    NotWhole,
    /// The nodes don't hold the same in the end.
    Diverged,
}

/// What the checkers have to say.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Findings {
    /// What must not be.
    pub violations: Vec<Violation>,
    /// What is worth knowing.
    pub notes: Vec<String>,
}

impl Findings {
    pub(crate) fn violation(&mut self, kind: Kind, at: Option<Micros>, text: String) {
        self.violations.push(Violation { kind, text, at });
    }

    /// One violation for all cases of a kind: how many, and the first, given with its time.
    fn violations(&mut self, kind: Kind, what: &str, cases: Vec<(Micros, String)>) {
        let count = cases.len();
        if let Some((at, first)) = cases.into_iter().min() {
            self.violation(kind, Some(at), format!("{count} {what}; the first: {first}"));
        }
    }
}

/// All checks.
pub fn check(calls: &[Call], finals: &Finals, promises: Promises) -> Findings {
    let mut findings = Findings::default();
    loss::check(calls, finals, promises, &mut findings);
    reign::check(calls, &mut findings);
    lists::check(calls, finals, promises, &mut findings);
    session::check(calls, &mut findings);
    findings
}

fn seconds(micros: u64) -> String {
    format!("{:.3} s", micros as f64 / 1e6)
}

/// Hand-made histories for the tests of all checkers.
#[cfg(test)]
pub(crate) mod sample {
    use crate::history::{Call, Op, Outcome, Port, Served, Step};

    pub fn call(client: u32, port: Port, op: Op, start: u64, end: u64, by: (usize, u32)) -> Call {
        let served = Some(Served { node: by.0, timeline: by.1, lsn: end });
        Call { client, session: 1, port, op, start, end, outcome: Outcome::Ok, served, error: None }
    }

    pub fn failed(call: Call, outcome: Outcome) -> Call {
        Call { outcome, served: None, ..call }
    }

    pub fn append(key: u64, value: u64) -> Step {
        Step::Append { key, value }
    }

    pub fn read(key: u64, list: &[u64]) -> Step {
        Step::Read { key, list: Some(list.to_vec()) }
    }

    pub fn transaction(start: u64, end: u64, steps: &[Step]) -> Call {
        call(start as u32, Port::ReadWrite(0), Op::Transaction(steps.to_vec()), start, end, (0, 1))
    }

    pub fn kinds(findings: &super::Findings) -> Vec<super::Kind> {
        findings.violations.iter().map(|violation| violation.kind).collect()
    }
}
