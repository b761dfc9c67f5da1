//! What the HA loop, the REST API and `main` share: one board that the loop writes, one queue that it reads.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::{Map, Value};
use tokio::sync::oneshot;
use trunkline_common::{Instant, MemberName};

use crate::guard;
use crate::ha::situation::Ground;
use crate::postgres::PgStatus;

/// The Patroni version that this node behaves like: members of a mixed cluster read it in the member key and in status
/// documents, and change what they do by it.
pub const PATRONI_VERSION: &str = "4.1.4";

/// What the HA loop last knew and did; published after every turn.
#[derive(Debug, Clone, PartialEq)]
pub struct Board {
    /// Patroni's state text (dcs-layout §4.1).
    pub state: String,
    /// Patroni's role text (§4.2).
    pub role: String,
    /// The server as last observed.
    pub postgres: PgStatus,
    /// Until when this node may act as leader; `None` without the key. Compared with the clock, never trusted past it.
    pub leader_until: Option<Instant>,
    /// Until when this node is to be taken for the leader if nobody is known to lead: it has the key as far as it knows, or has just lost
    /// it and its server may take writes yet.
    pub not_gone_until: Option<Instant>,
    /// The loop has seen `pause`.
    pub pause: bool,
    /// Which long action is going on.
    pub task: Option<String>,
    /// Effective tags.
    pub tags: Map<String, Value>,
    /// A planned restart, as in the member key.
    pub scheduled_restart: Option<Value>,
    /// The last decision's words, as in the log.
    pub reason: String,
    /// A name for the decision, as the metric's label.
    pub decision: &'static str,
    /// When the next turn is due at the latest: `/liveness`.
    pub next_run: Instant,
    /// When the DCS last answered: `dcs_last_seen` (seconds since the epoch).
    pub dcs_last_seen: i64,
    /// The watchdog is required but doesn't work: this node may not lead.
    pub watchdog_failed: bool,
    /// How often what happened since the start, and why: `("promote" | "demote" | "fence" …, reason)` → times. Metric
    /// labels, so both are from a fixed, small set.
    pub transitions: BTreeMap<(&'static str, &'static str), u64>,
    /// What was decided lately, oldest first; see [`Noted`].
    pub decisions: Arc<VecDeque<Noted>>,
    /// Failsafe mode is what keeps this leader up, or a leader in failsafe mode has told us so lately.
    pub failsafe_active: bool,
    /// What the last decision was made on; `None` before the first turn.
    pub ground: Option<Arc<Ground>>,
    /// What ends writes where this process can't.
    pub guard: guard::Status,
}

impl Board {
    /// Before the first turn of the loop.
    pub fn starting(now: Instant) -> Self {
        Self {
            state: "starting".to_owned(),
            role: "replica".to_owned(),
            postgres: PgStatus::NoData,
            leader_until: None,
            not_gone_until: None,
            pause: false,
            task: None,
            tags: Map::new(),
            scheduled_restart: None,
            reason: "starting".to_owned(),
            decision: "wait",
            next_run: now + Duration::from_secs(30),
            dcs_last_seen: 0,
            watchdog_failed: false,
            transitions: BTreeMap::new(),
            decisions: Arc::default(),
            failsafe_active: false,
            ground: None,
            guard: guard::Status::default(),
        }
    }
}

/// A decision that differs from the one before it, with its reason and the numbers compared: `GET /decisions`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Noted {
    /// When it was made first.
    pub at: DateTime<Utc>,
    /// What was decided, as in the metrics.
    pub action: &'static str,
    /// Why.
    pub reason: String,
}

/// How many decisions are kept.
const DECISIONS: usize = 200;

impl Noted {
    /// Adds it to `noted`, unless it says what the last one says, with other numbers at most. True if it was added.
    pub fn note_in(self, noted: &mut Arc<VecDeque<Noted>>) -> bool {
        if noted.back().is_some_and(|last| words(&last.reason).eq(words(&self.reason))) {
            return false;
        }
        let noted = Arc::make_mut(noted);
        if noted.len() == DECISIONS {
            noted.pop_front();
        }
        noted.push_back(self);
        true
    }
}

/// A sentence without its numbers. One in a name tells one member from another, and stays.
fn words(text: &str) -> impl Iterator<Item = &str> {
    let number = |word: &str| {
        let word = word.trim_matches(|c: char| !c.is_ascii_alphanumeric());
        let hex = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_hexdigit());
        word.starts_with(|c: char| c.is_ascii_digit()) || word.split_once('/').is_some_and(|(a, b)| hex(a) && hex(b))
    };
    text.split_whitespace().map(move |word| if number(word) { "#" } else { word })
}

/// What may be asked of the HA loop. Replies come when it is done or refused; a dropped receiver cancels nothing.
#[derive(Debug)]
pub enum Command {
    /// Something outside the watch changed; take a turn.
    Wake,
    /// Read the configuration file again.
    Reload,
    /// Restart PostgreSQL now, where the filters fit.
    Restart(RestartFilter, oneshot::Sender<Reply>),
    /// Restart at a time.
    ScheduleRestart(Value, oneshot::Sender<Reply>),
    /// Forget the planned restart; true if there was one.
    CancelRestart(oneshot::Sender<bool>),
    /// Make this replica anew from the leader.
    Reinitialize {
        /// Cancel whatever is going on first.
        force: bool,
        /// From the leader, not from another replica.
        from_leader: bool,
        /// Answered when started or refused.
        reply: oneshot::Sender<Reply>,
    },
    /// A leader without DCS asks whether it may go on (`POST /failsafe`).
    FailsafePoll {
        /// Who asks.
        leader: MemberName,
        /// Its URLs and slots as sent.
        body: Value,
        /// The answer.
        reply: oneshot::Sender<Word>,
    },
}

/// What a leader without DCS is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Word {
    /// This node does not lead before the time that was asked for is over.
    Given,
    /// No promise.
    Refused,
    /// No promise: the leader key is this node's.
    Leads,
}

/// Conditions of a restart (rest-api §4.4).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RestartFilter {
    /// Only in this role (`primary`, `replica`, `standby_leader`).
    pub role: Option<String>,
    /// Only if the server is older than this (`server_version_num`).
    pub older_than: Option<u32>,
    /// Only if a restart is pending.
    pub pending: bool,
    /// Start timeout in seconds.
    pub timeout: Option<u64>,
}

/// Done, or why not, as REST answers it.
pub type Reply = Result<String, Refusal>;

/// Why a command was not carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// HTTP status.
    pub status: u16,
    /// A sentence.
    pub text: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noted(reason: &str) -> Noted {
        Noted { at: DateTime::UNIX_EPOCH, action: "wait", reason: reason.to_owned() }
    }

    #[test]
    fn what_repeats_itself_is_kept_once_and_the_oldest_is_forgotten() {
        let mut all = Arc::default();
        assert!(noted("silent for 1.5s").note_in(&mut all));
        assert!(!noted("silent for 12s").note_in(&mut all));
        assert!(noted("silent no more").note_in(&mut all));
        assert!(noted("pg1 is ahead (AB/10 > 0/9)").note_in(&mut all));
        assert!(!noted("pg1 is ahead (AC/10 > 0/F9)").note_in(&mut all));
        assert!(noted("pg2 is ahead (AC/10 > 0/F9)").note_in(&mut all));
        assert_eq!(all.front().map(|first| first.reason.as_str()), Some("silent for 1.5s"));
        for _ in 0..DECISIONS {
            noted("x").note_in(&mut all);
            noted("y").note_in(&mut all);
        }
        assert_eq!((all.len(), all.front().map(|first| first.reason.as_str())), (DECISIONS, Some("x")));
    }
}
