//! One client per endpoint, a deadline per attempt, and then the next endpoint.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use etcd_client::{Certificate, Client, ConnectOptions, Error, Identity, TlsOptions};
use parking_lot::{Mutex, RwLock};
use tonic::Code;
use trunkline_config::local::Etcd;

use super::super::DcsError;
use super::members::Found;
use crate::Clock;

/// Pause after every endpoint has failed quickly, so that a refused port is not asked without end.
const PAUSE: Duration = Duration::from_millis(50);

/// The least that one endpoint is given to answer.
const MIN_SHARE: Duration = Duration::from_millis(50);

/// etcd's servers hang up on clients that ping more often than every 5 s (`--grpc-keepalive-min-time`).
const KEEP_ALIVE: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(1));

/// Where distributions keep the certificate authorities they trust, for https without `cacert`.
const SYSTEM_ROOTS: [&str; 2] = ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt"];

/// Whether a request may be sent to the next endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Resend {
    /// Doing it twice does no harm.
    Always,
    /// Only where it has certainly not been carried out.
    IfNotSent,
}

/// The endpoints of one etcd cluster.
pub(super) struct Endpoints<C> {
    known: RwLock<Arc<Known>>,
    /// Index of the one that answered last, or the next after one that didn't.
    preferred: AtomicUsize,
    bound_ms: AtomicU64,
    clock: C,
}

impl<C: Clock> Endpoints<C> {
    pub(super) fn new(config: &Etcd, clock: C, bound: Duration) -> Result<Self, DcsError> {
        let known = RwLock::new(Arc::new(Known::new(Access::read(config)?)));
        let endpoints = Self { known, preferred: AtomicUsize::new(0), bound_ms: AtomicU64::new(0), clock };
        endpoints.set_bound(bound);
        Ok(endpoints)
    }

    /// The addresses that are configured; `None` where they stand for the cluster.
    pub(super) fn configured(&self) -> Option<Vec<String>> {
        let known = self.known();
        let config = &known.access.config;
        (!config.use_proxies).then(|| config.endpoints.clone())
    }

    /// The addresses that were found in this cluster.
    pub(super) fn found(&self, cluster: u64) -> Vec<String> {
        let known = self.known();
        if known.found.cluster == cluster { known.found.urls.clone() } else { Vec::new() }
    }

    /// Uses what was found beside what is configured, unless that is not `configured` any more. True if it was not known.
    pub(super) fn set_found(&self, configured: &[String], found: Found) -> bool {
        let mut known = self.known.write();
        let config = &known.access.config;
        if config.use_proxies || config.endpoints != configured || known.found == found {
            return false;
        }
        let news = known.found.urls != found.urls;
        *known = Arc::new(known.with(found));
        news
    }

    /// Reads the files anew, and forgets every client where anything has changed. True if so.
    pub(super) fn reload(&self, config: &Etcd) -> Result<bool, DcsError> {
        let access = Access::read(config)?;
        let mut known = self.known.write();
        let changed = known.access != access;
        if changed {
            *known = Arc::new(Known::new(access));
        }
        Ok(changed)
    }

    fn known(&self) -> Arc<Known> {
        self.known.read().clone()
    }

    pub(super) fn set_bound(&self, bound: Duration) {
        self.bound_ms.store(u64::try_from(bound.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// What one endpoint is given of the whole bound.
    pub(super) fn share(&self) -> Duration {
        let parts = u32::try_from(self.known().members()).unwrap_or(u32::MAX);
        (self.bound() / parts).max(MIN_SHARE)
    }

    /// Does `work` with one endpoint's client after the other's, until one of them answers or the bound is reached.
    pub(super) async fn call<T, W, F>(&self, resend: Resend, work: W) -> Result<T, DcsError>
    where
        W: Fn(Client) -> F + Send + Sync,
        F: Future<Output = Result<T, Error>> + Send,
        T: Send,
    {
        let (bound, share, known) = (self.bound(), self.share(), self.known());
        let all = &known.all;
        let deadline = self.clock.now() + bound;
        let first = self.preferred.load(Ordering::Relaxed);
        let mut maybe_done = false;
        let mut trouble = String::new();
        for turn in 0.. {
            let left = deadline.since(self.clock.now());
            if left.is_zero() {
                break;
            }
            let index = (first + turn) % all.len();
            let endpoint = &all[index];
            // On the heap: whoever asks the store would have to make room for a client that connects and logs in.
            let attempt = Box::pin(endpoint.attempt(&self.clock, left.min(share), &work));
            let failure = match attempt.await {
                Ok(answer) => {
                    self.preferred.store(index, Ordering::Relaxed);
                    return Ok(answer);
                }
                Err(failure) => failure,
            };
            self.preferred.store((index + 1) % all.len(), Ordering::Relaxed);
            match failure {
                Failure::Final(error) => {
                    self.preferred.store(index, Ordering::Relaxed);
                    return Err(error);
                }
                Failure::NotSent(why) => trouble = format!("{}: {why}", endpoint.url),
                Failure::MaybeDone(why) => {
                    tracing::debug!(endpoint = endpoint.url, "no answer from etcd: {why}");
                    maybe_done = true;
                }
            }
            if maybe_done && resend == Resend::IfNotSent {
                break;
            }
            if (turn + 1) % all.len() == 0 {
                self.clock.sleep(PAUSE.min(deadline.since(self.clock.now()))).await;
            }
        }
        Err(if maybe_done { DcsError::Timeout(bound) } else { DcsError::Unavailable(trouble) })
    }

    fn bound(&self) -> Duration {
        Duration::from_millis(self.bound_ms.load(Ordering::Relaxed)).max(MIN_SHARE)
    }
}

/// The endpoints as they were last configured, and what was found beside them.
struct Known {
    access: Access,
    found: Found,
    /// Those that are configured come first.
    all: Vec<Arc<Endpoint>>,
}

impl Known {
    fn new(access: Access) -> Self {
        let all = access.config.endpoints.iter().map(|url| Arc::new(access.endpoint(url, None))).collect();
        Self { access, found: Found::default(), all }
    }

    /// The same with what was found now; connections are kept.
    fn with(&self, found: Found) -> Self {
        let same = |url: &str| {
            let known = |endpoint: &&Arc<Endpoint>| endpoint.url == url && endpoint.cluster == Some(found.cluster);
            self.all.iter().find(known).cloned()
        };
        let more = found.urls.iter().map(|url| {
            let anew = || Arc::new(self.access.endpoint(url, Some(found.cluster)));
            same(url).unwrap_or_else(anew)
        });
        let configured = self.all.iter().take(self.access.config.endpoints.len()).cloned();
        let all = configured.chain(more).collect();
        Self { access: self.access.clone(), found, all }
    }

    /// How many members there are, as far as that is known. A member may have several addresses.
    fn members(&self) -> usize {
        self.found.members.max(self.access.config.endpoints.len())
    }
}

struct Endpoint {
    url: String,
    /// It was found in this cluster, by etcd's number, and counts as long as it belongs to that one: a member that was taken
    /// out may be part of another.
    cluster: Option<u64>,
    options: ConnectOptions,
    without_login: ConnectOptions,
    /// Made at first use, dropped when it stops answering: a connection to a host that went away without a word
    /// would otherwise be tried until TCP gives up.
    client: Mutex<Option<Client>>,
}

/// Why an attempt failed, split by what may be done next.
enum Failure {
    /// Certainly not carried out.
    NotSent(String),
    /// Nobody knows.
    MaybeDone(String),
    /// The store has spoken; another endpoint would say the same.
    Final(DcsError),
}

impl Endpoint {
    async fn attempt<T, W, F, C>(&self, clock: &C, limit: Duration, work: &W) -> Result<T, Failure>
    where
        C: Clock,
        W: Fn(Client) -> F + Send + Sync,
        F: Future<Output = Result<T, Error>> + Send,
        T: Send,
    {
        let deadline = clock.now() + limit;
        let client = match clock.within(limit, self.client(limit)).await {
            Some(Ok(client)) => client,
            Some(Err(failure)) => return Err(failure),
            None => return Err(Failure::NotSent(format!("no answer to the login within {limit:?}"))),
        };
        let Some(result) = clock.within(deadline.since(clock.now()), work(client)).await else {
            self.forget();
            return Err(Failure::MaybeDone(format!("{}: no answer within {limit:?}", self.url)));
        };
        result.map_err(|error| {
            if is_about_the_login(&error) {
                self.forget();
                return Failure::NotSent("the login was not valid any more".to_owned());
            }
            classify(error)
        })
    }

    async fn client(&self, limit: Duration) -> Result<Client, Failure> {
        let known = self.client.lock().clone();
        let mut client = match known {
            Some(client) => client,
            None => {
                let client = self.connect(limit).await.map_err(|error| self.not_connected(error))?;
                self.client.lock().insert(client).clone()
            }
        };
        // Each time: whoever is there when a connection breaks is connected to again, without a word.
        if let Some(cluster) = self.cluster {
            let status = client.status().await.map_err(|error| self.not_connected(error))?;
            if status.header().is_none_or(|header| header.cluster_id() != cluster) {
                return Err(Failure::NotSent("it belongs to another etcd cluster now".to_owned()));
            }
        }
        Ok(client)
    }

    async fn connect(&self, limit: Duration) -> Result<Client, Error> {
        let timeout = limit * 4 / 5;
        let options = self.options.clone().with_connect_timeout(timeout);
        match Client::connect([&self.url], Some(options)).await {
            // Users are configured here but not demanded there (yet: it will say so when they are).
            Err(error) if error.to_string().contains("authentication is not enabled") => {
                let options = self.without_login.clone().with_connect_timeout(timeout);
                Client::connect([&self.url], Some(options)).await
            }
            result => result,
        }
    }

    fn forget(&self) {
        *self.client.lock() = None;
    }

    /// Connecting is lazy, except for the login and for the question which cluster this is. A member that was found has the last
    /// word in nothing before that is answered.
    fn not_connected(&self, error: Error) -> Failure {
        match classify(error) {
            Failure::Final(error) if self.cluster.is_none() => Failure::Final(error),
            Failure::Final(error) => Failure::NotSent(error.to_string()),
            Failure::NotSent(why) | Failure::MaybeDone(why) => Failure::NotSent(why),
        }
    }
}

/// The token expired or was made before users or roles changed. Checked by etcd before anything is done.
fn is_about_the_login(error: &Error) -> bool {
    let Error::GRpcStatus(status) = error else { return false };
    let message = status.message();
    status.code() == Code::Unauthenticated
        || ["invalid auth token", "revision of auth store is old", "user name is empty"]
            .iter()
            .any(|text| message.contains(text))
}

fn classify(error: Error) -> Failure {
    let status = match error {
        Error::GRpcStatus(status) => status,
        // etcd answers a keep-alive of a lease it does not have with a TTL of 0; the client makes this of it.
        Error::LeaseKeepAliveError(text) if text.contains("not found") => return Failure::Final(DcsError::LeaseLost),
        Error::InvalidArgs(_) | Error::InvalidUri(_) | Error::InvalidMetadataValue(_) => {
            return Failure::Final(DcsError::Refused(error.to_string()));
        }
        other => return Failure::MaybeDone(other.to_string()),
    };
    let message = status.message();
    match status.code() {
        Code::NotFound if message.contains("lease not found") => Failure::Final(DcsError::LeaseLost),
        Code::Unavailable if has_not_connected(&status) => Failure::NotSent(root_cause(&status)),
        // Said before the request is proposed. Every other kind of unavailability may come after it.
        Code::Unavailable if message.ends_with("etcdserver: no leader") => Failure::NotSent(message.to_owned()),
        Code::ResourceExhausted if message.contains("too many requests") => Failure::NotSent(message.to_owned()),
        Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::FailedPrecondition
        | Code::Unauthenticated
        | Code::Unimplemented
        | Code::OutOfRange
        | Code::ResourceExhausted => Failure::Final(DcsError::Refused(message.to_owned())),
        _ => Failure::MaybeDone(format!("{:?}: {message}", status.code())),
    }
}

fn has_not_connected(status: &tonic::Status) -> bool {
    causes(status).any(|cause| cause.is::<tonic::ConnectError>())
}

fn root_cause(status: &tonic::Status) -> String {
    causes(status).last().map_or_else(|| status.message().to_owned(), ToString::to_string)
}

fn causes(status: &tonic::Status) -> impl Iterator<Item = &(dyn std::error::Error + 'static)> {
    std::iter::successors(std::error::Error::source(status), |error| error.source())
}

/// What the configuration says of etcd, and what is in the files that it names.
#[derive(Clone, PartialEq)]
struct Access {
    config: Etcd,
    roots: Option<Vec<u8>>,
    /// Certificate and key.
    identity: Option<(Vec<u8>, Vec<u8>)>,
}

impl Access {
    fn read(config: &Etcd) -> Result<Self, DcsError> {
        if config.endpoints.is_empty() {
            return Err(DcsError::Refused("no etcd endpoint is configured".to_owned()));
        }
        let mut access = Self { config: config.clone(), roots: None, identity: None };
        if !config.endpoints.iter().any(|url| url.starts_with("https://")) {
            return Ok(access);
        }
        let system_roots = || SYSTEM_ROOTS.iter().map(Path::new).find(|path| path.exists());
        if let Some(roots) = config.cacert.as_deref().or_else(system_roots) {
            access.roots = Some(pem("etcd3.cacert", roots)?);
        }
        if let Some(cert) = &config.cert {
            let key = config.key.as_ref().unwrap_or(cert);
            access.identity = Some((pem("etcd3.cert", cert)?, pem("etcd3.key", key)?));
        }
        Ok(access)
    }

    fn endpoint(&self, url: &str, cluster: Option<u64>) -> Endpoint {
        let tls = self.tls();
        Endpoint {
            url: url.to_owned(),
            cluster,
            options: self.with_login(connect_options(url, &tls)),
            without_login: connect_options(url, &tls),
            client: Mutex::new(None),
        }
    }

    fn with_login(&self, options: ConnectOptions) -> ConnectOptions {
        match &self.config.authentication {
            Some((user, password)) => options.with_user(user, password.reveal()),
            None => options,
        }
    }

    fn tls(&self) -> TlsOptions {
        let mut tls = TlsOptions::new();
        if let Some(roots) = &self.roots {
            tls = tls.ca_certificate(Certificate::from_pem(roots));
        }
        if let Some((cert, key)) = &self.identity {
            tls = tls.identity(Identity::from_pem(cert, key));
        }
        tls
    }
}

fn connect_options(url: &str, tls: &TlsOptions) -> ConnectOptions {
    let mut options = ConnectOptions::new()
        // Without it a member that lost the quorum leaves watches and keep-alives silent for ever.
        .with_require_leader(true)
        .with_keep_alive(KEEP_ALIVE.0, KEEP_ALIVE.1)
        .with_keep_alive_while_idle(false)
        .with_auto_token_refresh(true);
    if url.starts_with("https://") {
        options = options.with_tls(tls.clone());
    }
    options
}

fn pem(setting: &str, path: &Path) -> Result<Vec<u8>, DcsError> {
    std::fs::read(path).map_err(|error| DcsError::Refused(format!("{setting}: {}: {error}", path.display())))
}
