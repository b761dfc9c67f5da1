//! How the loop ends: in order, and with nobody left behind who could write.

use std::time::Duration;

use tracing::{error, info, warn};
use trunkline_common::Clock;
use trunkline_common::dcs::Dcs;
use trunkline_common::dcs::store::Outcome;

use super::decide::Action;
use super::lease::LeaseHandle;
use super::prepare::LONGEST_CHECKPOINT;
use super::task::{HandOverPlan, TaskEnd, TaskKind};
use super::{Ha, finished};
use crate::peer::Peers;
use crate::postgres::{PgRole, PgStatus, Postgres, StopMode};

impl<D: Dcs, P: Postgres, C: Clock, R: Peers> Ha<D, P, C, R> {
    /// A server that takes writes must not go on without an agent.
    pub(super) async fn leave_nobody_behind(&mut self) {
        if !matches!(
            self.pg,
            PgStatus::Running(_) | PgStatus::Starting | PgStatus::Refusing(_) | PgStatus::Unresponsive
        ) || matches!(&self.pg, PgStatus::Running(running) if running.role == PgRole::Standby)
        {
            return;
        }
        warn!("stopping PostgreSQL, which would take writes with nobody to watch it");
        let alive = keep_beating(self.lease.clone(), self.parts.clock.clone());
        let limit = self.settings().stop_limit();
        let stop = async {
            let postgres = &self.parts.postgres;
            match postgres.stop(StopMode::Fast, limit, None).await {
                Ok(()) => Ok(()),
                Err(_) => postgres.stop(StopMode::Immediate, Duration::from_secs(20), None).await,
            }
        };
        tokio::select! {
            biased;
            stopped = stop => match stopped {
                Ok(()) => self.lease.resign(),
                Err(error) => error!("PostgreSQL could not be stopped: {error}"),
            },
            () = alive => {}
        }
    }

    /// In order: a leader hands over to whoever has everything, then the member key says `stopped`.
    pub(super) async fn shut_down(&mut self) {
        info!("shutting down");
        // A promotion or a start that is cut off leaves a server behind that the stop below ends.
        let aborted = self.abort_task().await;
        if self.settings().pause {
            info!("paused: PostgreSQL is left running");
            return;
        }
        self.observe().await;
        let leads = self.lease.session().leading;
        let stopped = match (leads, self.hand_over_plan(None)) {
            (true, Some(plan)) => {
                self.note(Action::HandOver.label(), "this agent is to end");
                self.count(Action::HandOver.label(), "shutdown");
                // As a switchover: routers hear of it once the checkpoint is done.
                if matches!(self.pg, PgStatus::Running(_))
                    && let Err(error) = self.parts.postgres.checkpoint(LONGEST_CHECKPOINT).await
                {
                    warn!("handing over without a checkpoint first: {error}");
                }
                let plan = HandOverPlan { candidate_limit: Duration::from_secs(5), ..plan };
                let hands = self.hands();
                self.spawn(TaskKind::HandOver, hands.hand_over(plan));
                self.publish_member().await;
                match finished(&mut self.task).await {
                    (_, TaskEnd::Failed { why, .. }) => Err(why),
                    _ => Ok(()),
                }
            }
            _ if matches!(self.pg, PgStatus::NoData | PgStatus::Broken(_) | PgStatus::Stopped(_)) => Ok(()),
            _ => {
                let (let_go, hands, limit) = (self.let_go(), self.hands(), self.settings().stop_limit());
                self.spawn(TaskKind::Stop, async move {
                    let_go.await;
                    let stopped = hands.postgres.stop(StopMode::Fast, limit, None).await;
                    stopped.map_or_else(TaskEnd::from, |()| TaskEnd::Done)
                });
                self.publish_member().await;
                match finished(&mut self.task).await {
                    (_, TaskEnd::Failed { why, .. }) => Err(why),
                    _ => Ok(()),
                }
            }
        };
        if let Err(why) = stopped {
            warn!("PostgreSQL did not stop in order, stopping it at once: {why}");
            if let Err(error) = self.parts.postgres.stop(StopMode::Immediate, Duration::from_secs(20), None).await {
                error!("PostgreSQL could not be stopped: {error}");
                return;
            }
        }
        if matches!(aborted, Some(TaskKind::Bootstrap | TaskKind::CustomBootstrap)) {
            self.undo_bootstrap().await;
        }
        self.lease.resign();
        self.observe().await;
        self.publish_member().await;
        self.publish_board();
    }

    /// Half a cluster must not be taken for one by the next start. It is only half if the right to finish it was still
    /// ours to give back.
    async fn undo_bootstrap(&mut self) {
        let Some(lease) = self.lease.session().lease else { return };
        match self.parts.store.cancel_bootstrap(lease.id).await {
            Ok(Outcome::Done(_)) => {
                if let Err(error) = self.parts.postgres.move_data_aside().await {
                    warn!("the data directory of the bootstrap that was cut off stays: {error}");
                }
            }
            Ok(Outcome::Conflict) => {}
            Err(error) => warn!("the initialize key could not be given back: {error}"),
        }
    }
}

/// Shows the keeper that what takes so long is meant to; for ever.
pub(super) async fn keep_beating<C: Clock>(lease: LeaseHandle, clock: C) {
    loop {
        lease.beat(clock.now());
        clock.sleep(Duration::from_millis(200)).await;
    }
}
