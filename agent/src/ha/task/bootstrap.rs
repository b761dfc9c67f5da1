//! Making a new cluster, and taking back one that was not made.

use std::time::Duration;

use tracing::{info, warn};
use trunkline_common::cluster::Initialize;
use trunkline_common::dcs::store::Outcome;
use trunkline_common::dcs::{Dcs, DcsError, Lease};
use trunkline_common::{Clock, SystemId};
use trunkline_config::dynamic::{Settings, SynchronousMode};

use super::{Hands, START_LIMIT, TaskEnd};
use crate::ha::sync;
use crate::peer::Peers;
use crate::postgres::{CustomBootstrap, PgError, PgStatus, Postgres, StartAs, StopMode};

/// What a bootstrap needs to know.
#[derive(Debug, Clone, PartialEq)]
pub struct BootstrapPlan {
    /// Not by initdb, but by a method of the user's own.
    pub method: Option<CustomBootstrap>,
    /// Options of initdb.
    pub initdb: Vec<String>,
    /// Lines for its pg_hba.conf.
    pub hba: Vec<String>,
    /// Command to run once.
    pub post_bootstrap: Option<String>,
    /// The new cluster's dynamic configuration.
    pub config: serde_json::Value,
    /// Revision of the `config` key it replaces.
    pub config_seen: trunkline_common::Revision,
}

impl<D: Dcs, P: Postgres, C: Clock, R: Peers> Hands<D, P, C, R> {
    /// initdb, first start, users, then `initialize`, `config` and the leader key. A bootstrap that fails is taken back, and
    /// its data directory moved aside.
    pub async fn bootstrap(self, plan: BootstrapPlan, lease: Lease) -> TaskEnd {
        match self.try_bootstrap(&plan, lease).await {
            Ok(()) => TaskEnd::Done,
            Err(why) => {
                warn!("the bootstrap failed: {why}");
                let stopped = self.postgres.stop(StopMode::Immediate, Duration::from_secs(10), None).await;
                self.lease.resign();
                let aside = self.postgres.move_data_aside().await;
                for error in [stopped.err(), aside.err()].into_iter().flatten() {
                    warn!("cleaning up after the failed bootstrap: {error}");
                }
                if let Err(error) = self.store.cancel_bootstrap(lease.id).await {
                    warn!("the initialize key could not be given back, it ends with its lease: {error}");
                    self.lease.abandon(lease.id);
                }
                TaskEnd::Failed { why, damaged: false }
            }
        }
    }

    async fn try_bootstrap(&self, plan: &BootstrapPlan, lease: Lease) -> Result<(), String> {
        let pg = |error: PgError| error.to_string();
        let dcs = |error: DcsError| error.to_string();
        match &plan.method {
            None => {
                self.postgres.initdb(plan.initdb.clone(), plan.hba.clone()).await.map_err(pg)?;
                self.still_bootstraps(lease)?;
                self.start_server(StartAs::Primary, START_LIMIT).await.map_err(pg)?;
            }
            Some(method) => self.while_it_may(self.postgres.restore(method.clone())).await.map_err(pg)?,
        }
        self.still_bootstraps(lease)?;
        self.postgres.create_users(plan.post_bootstrap.clone()).await.map_err(pg)?;
        if plan.method.is_some() {
            self.while_it_may(self.postgres.end_restore()).await.map_err(pg)?;
        }
        let status = self.postgres.observe(Duration::from_secs(5)).await;
        let PgStatus::Running(running) = status else {
            return Err("the new server does not answer".to_owned());
        };
        self.store.put_config(&plan.config, Some(plan.config_seen)).await.map_err(dcs)?;
        // From here on this is a whole cluster, and may be the one that `initialize` names: never thrown away, unless
        // somebody else certainly has made another.
        let settings = Settings::from_value(&plan.config).0;
        let synchronous = settings.synchronous_mode != SynchronousMode::Off;
        if synchronous && settings.synchronous_mode_strict {
            // Not one commit before somebody can confirm it, from the moment on at which clients are sent here.
            self.postgres.set_synchronous_standby_names(sync::strict_placeholder()).await.map_err(pg)?;
        }
        match self.store.finish_bootstrap(&self.name, lease.id, running.system_id, synchronous).await {
            Ok(Outcome::Done(_)) => {
                info!("initialized a new cluster");
                if !self.lease.lead(lease) {
                    info!("the lease was replaced during the bootstrap; the loop looks for the key");
                }
                if let Err(error) = self.postgres.end_bootstrap() {
                    warn!("{error}");
                }
            }
            Ok(Outcome::Conflict) => return Err("the right to bootstrap was lost meanwhile".to_owned()),
            Err(error) => {
                warn!("it is not known whether the bootstrap was recorded: {error}");
                // Renewed, it would keep the right to a bootstrap that nobody goes on with. The leader key, if there is
                // one, bears our name, and moves to the next lease.
                self.lease.abandon(lease.id);
            }
        }
        self.postgres.callback("on_start", "primary");
        Ok(())
    }

    /// Moves the data directory of a bootstrap that was cut off aside, once it is certain that nobody has been told of it:
    /// the right to finish it is over, and with that every request that could.
    pub async fn discard(self, system: Option<SystemId>) -> TaskEnd {
        let initialize = match self.store.read().await {
            Ok(view) => view.initialize,
            Err(error) => return TaskEnd::Failed { why: error.to_string(), damaged: false },
        };
        match initialize {
            Initialize::Done(cluster) if Some(cluster) == system => TaskEnd::Done,
            Initialize::Running => {
                TaskEnd::Failed { why: "somebody is bootstrapping the cluster".to_owned(), damaged: false }
            }
            _ => match self.postgres.move_data_aside().await {
                Ok(()) => TaskEnd::Done,
                Err(error) => error.into(),
            },
        }
    }

    /// What takes its time may take too much of it: this host may have stood still meanwhile.
    fn still_bootstraps(&self, lease: Lease) -> Result<(), String> {
        let now = self.clock.now();
        match self.lease.session().lease {
            Some(held) if held.id == lease.id && held.until > now => Ok(()),
            _ => Err("the right to bootstrap ended with its lease".to_owned()),
        }
    }
}
