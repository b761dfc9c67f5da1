//! The REST API: health checks for load balancers, documents for peers and operators, requests to the HA loop.
//!
//! It never acts by itself: what it knows comes from the HA loop's [`Board`], the watched cluster and one fresh look at
//! PostgreSQL (the leader race needs positions of *now*); what it is asked to do becomes a [`Command`].
//!
//! * [`health`]: which path gets which code, as pure tables.
//! * `status`, `metrics`: the documents. `inquiry`: what operators ask. `actions`, `switchover`, `dynamic`: the requests that change something.
//! * `policy`, `auth`: who may. `listener`: sockets, TLS, bounds.

mod actions;
mod answer;
mod auth;
mod dynamic;
pub mod health;
mod inquiry;
pub(crate) mod json;
mod listener;
mod metrics;
mod policy;
mod status;
pub(crate) mod switchover;
#[cfg(test)]
mod tests;
mod time;

use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::Query as AxumQuery;
use axum::http::request::Parts;
use axum::http::{Method, Request, Response};
use parking_lot::{Mutex, RwLock};
use tokio::sync::{mpsc, watch};
use trunkline_common::dcs::follow::Knowledge;
use trunkline_common::dcs::store::ClusterStore;
use trunkline_common::dcs::{Dcs, DcsError, codec};
use trunkline_common::{Clock, ClusterView, MemberName};
use trunkline_config::{Local, Settings};

use self::answer::{Answer, read_object};
use self::auth::Caller;
use self::health::Query;
pub use self::inquiry::Edges;
pub use self::listener::Server;
use self::metrics::Instruments;
use self::policy::Policy;
use self::status::Picture;
pub use self::status::Sources;
use self::switchover::Action;
use crate::node::{Board, Command};
use crate::peer::{HttpPeers, RestClient, WITHIN};
use crate::postgres::{PgError, PgStatus, Postgres, Setting, Took};

/// Why the API can't be served or changed.
#[derive(Debug, thiserror::Error)]
pub enum RestError {
    /// The address is not free, or not ours.
    #[error("restapi.listen: can't listen on {address}: {cause}; {remedy}")]
    Listen {
        /// As configured.
        address: String,
        /// The system's words.
        cause: std::io::Error,
        /// What to do about it.
        remedy: &'static str,
    },
    /// Not `host:port`.
    #[error("restapi.listen: '{0}' is not an address; it looks like 10.0.0.1:8008, [::1]:8008 or *:8008")]
    BadAddress(String),
    /// Certificate or key can't be used.
    #[error("restapi: {0}")]
    Tls(String),
    /// Not a header.
    #[error("restapi: '{0}' among the extra headers is not an HTTP header, or its value is not allowed in one")]
    BadHeader(String),
    /// The client for other members can't be made.
    #[error(transparent)]
    Client(#[from] crate::peer::ClientError),
    /// Two metrics of one name, or the like.
    #[error("metrics can't be set up: {0}")]
    Metrics(#[from] prometheus::Error),
}

/// Who answers.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    /// The cluster's name.
    pub scope: String,
    /// The member's name.
    pub name: MemberName,
}

/// All that the API may do with PostgreSQL: look.
pub trait Observe: Clone + Send + Sync + 'static {
    /// See [`Postgres::observe`].
    fn observe(&self, deadline: Duration) -> impl Future<Output = PgStatus> + Send;

    /// See [`Postgres::setting`].
    fn setting(&self, name: &str) -> impl Future<Output = Result<Option<Setting>, PgError>> + Send;

    /// See [`Postgres::took`].
    fn took(&self) -> Took;
}

impl<P: Postgres> Observe for P {
    fn observe(&self, deadline: Duration) -> impl Future<Output = PgStatus> + Send {
        Postgres::observe(self, deadline)
    }

    fn setting(&self, name: &str) -> impl Future<Output = Result<Option<Setting>, PgError>> + Send {
        Postgres::setting(self, name)
    }

    fn took(&self) -> Took {
        Postgres::took(self)
    }
}

/// What the API is made of.
pub struct Api<D, P, C> {
    identity: Identity,
    store: ClusterStore<D>,
    knowledge: watch::Receiver<Knowledge>,
    board: watch::Receiver<Board>,
    commands: mpsc::Sender<Command>,
    postgres: P,
    clock: C,
    policy: watch::Sender<Arc<Policy>>,
    peers: HttpPeers,
    instruments: Instruments,
    local: RwLock<Arc<Local>>,
    edges: Edges,
    /// Of a reload that moves the API, until it is served from there.
    moved: Mutex<Option<TcpListener>>,
}

impl<D: Dcs, P: Observe, C: Clock> Api<D, P, C> {
    /// An API that answers from these. Reads the certificate files that `local` names.
    pub fn new(
        local: &Local,
        store: ClusterStore<D>,
        knowledge: watch::Receiver<Knowledge>,
        board: watch::Receiver<Board>,
        commands: mpsc::Sender<Command>,
        postgres: P,
        clock: C,
    ) -> Result<Self, RestError> {
        let identity = Identity { scope: local.scope.clone(), name: MemberName(local.name.clone()) };
        let policy = watch::Sender::new(Arc::new(Policy::read(local)?));
        let peers = HttpPeers::new(RestClient::for_agent(local)?);
        let instruments = Instruments::new()?;
        let (local, edges) = (RwLock::new(Arc::new(local.clone())), Edges::default());
        Ok(Self {
            identity,
            store,
            knowledge,
            board,
            commands,
            postgres,
            clock,
            policy,
            peers,
            instruments,
            local,
            edges,
            moved: Mutex::default(),
        })
    }

    /// With what only the process knows.
    #[must_use]
    pub fn with_edges(self, edges: Edges) -> Self {
        Self { edges, ..self }
    }

    /// Reads address, certificates, credentials and allowlist again. After an error the old ones stay in force.
    /// Connections that are open keep their certificate; a new address is listened on at once.
    pub fn reload(&self, local: &Local) -> Result<(), RestError> {
        let policy = Policy::read(local)?;
        let client = RestClient::for_agent(local)?;
        if policy.listen != self.policy.borrow().listen {
            *self.moved.lock() = Some(listener::bind(&policy.listen)?);
        }
        self.peers.renew(client);
        self.policy.send_replace(Arc::new(policy));
        self.goes_by(local);
        Ok(())
    }

    /// The other members, asked with the credentials of the last reload.
    pub fn peers(&self) -> HttpPeers {
        self.peers.clone()
    }

    /// Answers one request.
    pub(crate) async fn handle(&self, caller: Caller, request: Request<Body>) -> Response<Body> {
        let policy = self.policy.borrow().clone();
        let (parts, body) = request.into_parts();
        let answer = self.dispatch(&policy, caller, &parts, body).await;
        self.instruments.answered(answer.status);
        tracing::debug!(from = %caller.address, method = %parts.method, uri = %parts.uri, status = answer.status, "answered");
        answer.into_response(&policy)
    }

    /// By method and first segment of the path, as Patroni does: what has no handler is a health check of the whole path,
    /// so that `/replica/x`, `HEAD /patroni` or an unknown path get the answer they get there. That is why this is not a
    /// table of routes.
    async fn dispatch(&self, policy: &Policy, caller: Caller, parts: &Parts, body: Body) -> Answer {
        let path = parts.uri.path();
        let segment = path.trim_start_matches('/').split('/').next().unwrap_or_default();
        let query =
            || AxumQuery::<Vec<(String, String)>>::try_from_uri(&parts.uri).map(|q| Query(q.0)).unwrap_or_default();
        match (parts.method.as_str(), segment) {
            ("GET", "liveness") => Answer::code(self.liveness()),
            ("GET", "readiness") => Answer::code(self.readiness(&query()).await),
            ("GET", "patroni") => {
                let within = query().first(WITHIN).and_then(|text| text.parse().ok());
                let within = within.map_or(status::PATIENCE, Duration::from_millis);
                Answer::json(200, self.document(&self.sources().picture(within).await))
            }
            ("GET", "cluster") => self.cluster().await,
            ("GET", "history") => self.history().await,
            ("GET", "decisions") => Answer::json(200, status::decisions(self.board.borrow().decisions.iter())),
            ("GET", "why") => self.why().await,
            ("GET", "rto") => self.rto(),
            ("GET", "explain") => {
                let view = self.knowledge.borrow().view.clone();
                match auth::check(policy, caller, &parts.headers, view.as_deref(), true).await {
                    Ok(()) => self.explain(&query()).await,
                    Err(answer) => answer,
                }
            }
            ("GET", "config") => self.config().await,
            ("GET", "failsafe") => self.failsafe_members(),
            ("GET", "metrics") => {
                let picture = self.picture().await;
                let node = metrics::exposition(&picture, &self.knowledge.borrow(), &self.identity);
                Answer::metrics(node + &self.instruments.exposition())
            }
            ("GET", _) => {
                let picture = self.picture().await;
                let code = health::code(path, &query(), &picture.inputs(&self.identity.name));
                Answer::json(code, self.document(&picture))
            }
            ("HEAD" | "OPTIONS", _) => {
                let picture = self.picture().await;
                Answer::code(health::code(path, &query(), &picture.inputs(&self.identity.name)))
            }
            _ => match Unsafe::of(&parts.method, segment) {
                Some(endpoint) => match self.change(endpoint, policy, caller, parts, body).await {
                    Ok(answer) | Err(answer) => answer,
                },
                None => Answer::page(501, "there is nothing here for this method"),
            },
        }
    }

    async fn change(
        &self,
        endpoint: Unsafe,
        policy: &Policy,
        caller: Caller,
        parts: &Parts,
        body: Body,
    ) -> Result<Answer, Answer> {
        // Without the DCS nobody knows the members, so a leader that lost it must not be kept out by their list.
        let members_count = endpoint != Unsafe::Failsafe;
        if endpoint != Unsafe::Mpp {
            let view = self.knowledge.borrow().view.clone();
            auth::check(policy, caller, &parts.headers, view.as_deref(), members_count).await?;
        }
        if endpoint == Unsafe::Failsafe && !self.settings().failsafe_mode {
            return Err(Answer::page(502, "failsafe mode is off"));
        }
        let object = |optional| read_object(&parts.headers, body, optional);
        Ok(match endpoint {
            Unsafe::Reload => self.reload_configuration(),
            // Only ever acts where Patroni's own tests run on Windows.
            Unsafe::Sigterm => Answer::text(202, "nothing to do here"),
            Unsafe::CancelRestart => self.cancel_restart().await,
            Unsafe::CancelSwitchover => self.cancel_switchover().await,
            Unsafe::Restart => self.restart(object(true).await?).await,
            Unsafe::Reinitialize => self.reinitialize(object(true).await?).await,
            Unsafe::Failsafe => self.failsafe(object(false).await?).await,
            Unsafe::Failover => self.change_leader(Action::Failover, object(false).await?).await,
            Unsafe::Switchover => self.change_leader(Action::Switchover, object(false).await?).await,
            Unsafe::PatchConfig => self.patch_config(object(false).await?).await,
            Unsafe::PutConfig => self.put_config(object(false).await?).await,
            // Events of a Citus cluster, which this agent does not coordinate: accepted and left alone.
            Unsafe::Citus | Unsafe::Mpp => object(false).await.map(|_| Answer::text(200, "OK"))?,
        })
    }

    fn document(&self, picture: &Picture) -> serde_json::Value {
        picture.document(&self.identity.scope, &self.identity.name)
    }

    /// `/liveness`: whether the HA loop takes its turns.
    fn liveness(&self) -> u16 {
        let board = self.board.borrow();
        let alive = matches!(
            board.postgres,
            PgStatus::Running(_)
                | PgStatus::Refusing(_)
                | PgStatus::Starting
                | PgStatus::Stopping
                | PgStatus::Unresponsive
        );
        // A stuck primary loses its lease after one ttl; a replica can wait longer.
        let patience = self.settings().ttl * if board.role == "primary" && alive { 1 } else { 2 };
        if board.pause || board.next_run + patience > self.clock.now() { 200 } else { 503 }
    }

    async fn readiness(&self, query: &Query) -> u16 {
        match health::readiness(query, &self.picture().await.inputs(&self.identity.name)) {
            Ok(()) => 200,
            Err(why) => {
                tracing::debug!(why, "not ready");
                503
            }
        }
    }

    async fn cluster(&self) -> Answer {
        match self.view().await {
            Ok(view) => Answer::json(200, status::cluster(&view, &self.identity.scope)),
            Err(error) => Answer::page(503, error.to_string()),
        }
    }

    async fn history(&self) -> Answer {
        match self.view().await {
            Ok(view) => Answer::json(200, codec::encode_history(&view.history)),
            Err(error) => Answer::page(503, error.to_string()),
        }
    }

    /// The cluster as it is known, read anew where there is doubt.
    async fn view(&self) -> Result<Arc<ClusterView>, DcsError> {
        let known = {
            let knowledge = self.knowledge.borrow();
            knowledge.view.clone().filter(|_| knowledge.trouble.is_none())
        };
        match known.filter(|_| self.confirmed_view().is_some()) {
            Some(view) => Ok(view),
            None => self.store.read().await.map(Arc::new),
        }
    }

    /// The view, unless the DCS has not confirmed it for `ttl`.
    fn confirmed_view(&self) -> Option<Arc<ClusterView>> {
        self.sources().confirmed_view()
    }

    /// The settings last known, confirmed or not.
    fn settings(&self) -> Settings {
        self.sources().settings()
    }

    /// Looks at everything there is to know now.
    async fn picture(&self) -> Picture {
        self.sources().picture(status::PATIENCE).await
    }

    fn sources(&self) -> Sources<'_, P, C> {
        Sources { knowledge: &self.knowledge, board: &self.board, postgres: &self.postgres, clock: &self.clock }
    }
}

/// The endpoints that change something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unsafe {
    Reload,
    Sigterm,
    Restart,
    CancelRestart,
    Reinitialize,
    Failsafe,
    Failover,
    Switchover,
    CancelSwitchover,
    PatchConfig,
    PutConfig,
    Citus,
    Mpp,
}

impl Unsafe {
    fn of(method: &Method, segment: &str) -> Option<Self> {
        Some(match (method.as_str(), segment) {
            ("POST", "reload") => Self::Reload,
            ("POST", "sigterm") => Self::Sigterm,
            ("POST", "restart") => Self::Restart,
            ("DELETE", "restart") => Self::CancelRestart,
            ("POST", "reinitialize") => Self::Reinitialize,
            ("POST", "failsafe") => Self::Failsafe,
            ("POST", "failover") => Self::Failover,
            ("POST", "switchover") => Self::Switchover,
            ("DELETE", "switchover") => Self::CancelSwitchover,
            ("PATCH", "config") => Self::PatchConfig,
            ("PUT", "config") => Self::PutConfig,
            ("POST", "citus") => Self::Citus,
            ("POST", "mpp") => Self::Mpp,
            _ => return None,
        })
    }
}
