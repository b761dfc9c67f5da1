//! A server that is to be stopped in order makes a checkpoint first, while it serves, so that the one of the stop is short. That
//! may take minutes, so it goes on beside the loop: whatever happens meanwhile is decided as ever.

use std::time::Duration;

use tracing::info;
use trunkline_common::dcs::Dcs;
use trunkline_common::{Clock, Revision, Task};

use super::Ha;
use super::task::TaskKind;
use crate::peer::Peers;
use crate::postgres::{PgStatus, Postgres};

/// The longest that a stop is put off for its checkpoint.
pub const LONGEST_CHECKPOINT: Duration = Duration::from_secs(300);

/// What the server is to be stopped for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// The failover request of this revision.
    HandOver(Revision),
    /// The cluster has become a standby cluster.
    DemoteCluster,
}

impl Stop {
    fn kind(self) -> TaskKind {
        match self {
            Stop::HandOver(_) => TaskKind::HandOver,
            Stop::DemoteCluster => TaskKind::DemoteCluster,
        }
    }
}

/// The checkpoint before a stop.
#[derive(Default)]
pub struct Preparation {
    /// What it is made for; once it is made, until somebody asks.
    stop: Option<Stop>,
    /// It is being made.
    pub checkpoint: Option<Task<()>>,
}

impl Preparation {
    /// What is being prepared.
    pub fn under_way(&self) -> Option<TaskKind> {
        self.stop.filter(|_| self.checkpoint.is_some()).map(Stop::kind)
    }
}

impl<D: Dcs, P: Postgres, C: Clock, R: Peers> Ha<D, P, C, R> {
    /// Whether the server may be stopped for that now. If not, its checkpoint is under way, or another one that comes first, and
    /// the loop is woken by its end.
    pub(super) fn is_prepared(&mut self, stop: Stop) -> bool {
        if self.preparation.checkpoint.is_some() {
            return false;
        }
        if self.preparation.stop.take() == Some(stop) || !matches!(self.pg, PgStatus::Running(_)) {
            return true;
        }
        let postgres = self.parts.postgres.clone();
        let checkpoint = Task::spawn(&self.parts.clock, async move {
            if let Err(error) = postgres.checkpoint(LONGEST_CHECKPOINT).await {
                info!("{} without a checkpoint first: {error}", stop.kind().label());
            }
        });
        self.preparation = Preparation { stop: Some(stop), checkpoint: Some(checkpoint) };
        false
    }
}
