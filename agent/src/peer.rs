//! Other members, asked directly: what the DCS can't know fast enough (positions during a race).

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use parking_lot::RwLock;
use serde_json::Value;
use trunkline_common::tls::{self, TlsError, Verify};
use trunkline_common::{Lsn, MemberName, TimelineId};
use trunkline_config::local::Ctl;
use trunkline_config::{Local, Secret, tags};

/// What a member said of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerStatus {
    /// Whether its PostgreSQL is in recovery.
    pub in_recovery: bool,
    /// It has the leader key as far as it knows, and may be about to be promoted.
    pub holds_key: bool,
    /// max(received, replayed) of a standby; 0 of a primary.
    pub lsn: Lsn,
    /// Its timeline, where it knows.
    pub timeline: Option<TimelineId>,
    /// Effective failover priority; ≤ 0: never leader.
    pub failover_priority: i64,
    /// It may not lead because its watchdog doesn't work.
    pub watchdog_failed: bool,
    /// It may have more WAL on its disk than `lsn` says ([`READS_OWN_WAL`]).
    pub reads_own_wal: bool,
}

/// Among the positions of a `/patroni` document, where so: the standby has not replayed what was on its disk when it was
/// started, so that it may have more than it says. Patroni does not tell.
pub const READS_OWN_WAL: &str = "reads_own_wal";

/// In a `/patroni` document, where so: the member has the leader key by a lease that is not over, as far as it knows. Patroni does
/// not tell.
pub const HOLDS_LEADER_KEY: &str = "holds_leader_key";

/// `GET /patroni?within=50`: whoever asks waits for so many milliseconds, whether or not PostgreSQL has answered by then. A Patroni
/// takes no notice.
pub const WITHIN: &str = "within";

/// The members' REST APIs. `None` for a member that did not answer, or whose PostgreSQL doesn't.
pub trait Peers: Clone + Send + Sync + 'static {
    /// Asks all of them (name → `api_url`) at once, each under `deadline`.
    fn status(
        &self,
        members: BTreeMap<MemberName, String>,
        deadline: Duration,
    ) -> impl Future<Output = BTreeMap<MemberName, Option<PeerStatus>>> + Send;

    /// Tells all of them (name → `api_url`) at once that this leader lost the DCS and wants to go on (`POST /failsafe`), with
    /// `body`, which says who asks; each is told besides which member is meant (`member`). A failed request is sent once
    /// more within `deadline`.
    fn failsafe(
        &self,
        members: BTreeMap<MemberName, String>,
        body: Value,
        deadline: Duration,
    ) -> impl Future<Output = BTreeMap<MemberName, FailsafeAnswer>> + Send;
}

impl PeerStatus {
    /// Reads a `/patroni` document, ours or Patroni's. Without positions (`xlog`, or `wal` of future versions) its
    /// PostgreSQL does not answer, and the member counts as not reachable; unless it leads all the same.
    pub fn parse(document: &Value) -> Option<Self> {
        let present = |field: &str| document.get(field).filter(|value| tags::truthy(value));
        let holds_key = present(HOLDS_LEADER_KEY).is_some();
        let positions = present("wal").or_else(|| document.get("xlog")).and_then(Value::as_object);
        if positions.is_none() && !holds_key {
            return None;
        }
        let said = |field: &str| positions.and_then(|positions| positions.get(field));
        let position = |field: &str| said(field).and_then(lenient_u64).unwrap_or(0);
        let says_primary = matches!(document.get("role").and_then(Value::as_str), Some("primary" | "master"));
        let in_recovery = position("location") == 0 && !says_primary && positions.is_some();
        let lsn = if in_recovery { position("received_location").max(position("replayed_location")) } else { 0 };
        let timeline = document.get("timeline").and_then(lenient_u64).and_then(|n| u32::try_from(n).ok());
        let tags = document.get("tags").and_then(Value::as_object);
        Some(Self {
            in_recovery,
            holds_key,
            lsn: Lsn(lsn),
            timeline: timeline.filter(|timeline| *timeline > 0).map(TimelineId),
            failover_priority: tags.map_or(1, tags::failover_priority),
            watchdog_failed: present("watchdog_failed").is_some(),
            reads_own_wal: said(READS_OWN_WAL).is_some_and(tags::truthy),
        })
    }
}

fn lenient_u64(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| value.as_str()?.trim().parse().ok())
}

/// The real [`Peers`]: HTTP requests that reuse connections, so that asking costs one round trip. Clones share the client.
#[derive(Debug, Clone)]
pub struct HttpPeers {
    client: Arc<RwLock<RestClient>>,
}

/// What a member that holds the leader key says to a leader that lost the DCS (Patroni's words).
pub const LEADS: &str = "Running as a leader";

/// A member's answer to a leader that lost the DCS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FailsafeAnswer {
    /// The leader may go on, as far as this member is concerned.
    pub accepted: bool,
    /// It must not: this member holds the leader key.
    pub leads: bool,
    /// The member's received or replayed position.
    pub lsn: Option<Lsn>,
}

impl HttpPeers {
    /// Asks with `client`'s credentials.
    pub fn new(client: RestClient) -> Self {
        Self { client: Arc::new(RwLock::new(client)) }
    }

    /// Asks with another client's credentials from now on, in all clones.
    pub fn renew(&self, client: RestClient) {
        *self.client.write() = client;
    }

    fn client(&self) -> RestClient {
        self.client.read().clone()
    }

    /// Asks one member.
    pub async fn member_status(&self, api_url: &str, deadline: Duration) -> Option<PeerStatus> {
        let url = format!("{api_url}?{WITHIN}={}", deadline.as_millis());
        match self.client().request("GET", &url, None, deadline).await {
            Ok(response) => {
                let status = serde_json::from_str(&response.text).ok().and_then(|doc| PeerStatus::parse(&doc));
                tracing::debug!(api_url, ?status, "a member answered");
                status
            }
            Err(error) => {
                tracing::debug!(api_url, %error, "a member did not answer");
                None
            }
        }
    }
}

impl Peers for HttpPeers {
    async fn status(
        &self,
        members: BTreeMap<MemberName, String>,
        deadline: Duration,
    ) -> BTreeMap<MemberName, Option<PeerStatus>> {
        let ask = async |(name, url): (MemberName, String)| {
            let status = self.member_status(&url, deadline).await;
            (name, status)
        };
        join_all(members.into_iter().map(ask)).await.into_iter().collect()
    }

    async fn failsafe(
        &self,
        members: BTreeMap<MemberName, String>,
        body: Value,
        deadline: Duration,
    ) -> BTreeMap<MemberName, FailsafeAnswer> {
        let client = self.client();
        let ask = async |(name, api_url): (MemberName, String)| {
            let url = endpoint(&api_url, "failsafe");
            let mut body = body.clone();
            body["member"] = Value::from(name.as_str());
            let attempt = || client.request("POST", &url, Some(&body), deadline);
            let twice = async {
                match attempt().await {
                    Ok(response) => Ok(response),
                    Err(_) => attempt().await,
                }
            };
            let answer = match tokio::time::timeout(deadline, twice).await {
                Ok(Ok(response)) => FailsafeAnswer {
                    accepted: response.status == 200 && response.text == "Accepted",
                    leads: response.text == LEADS,
                    lsn: response.lsn,
                },
                Ok(Err(error)) => {
                    tracing::debug!(url, %error, "a member did not answer");
                    FailsafeAnswer::default()
                }
                Err(_) => FailsafeAnswer::default(),
            };
            (name, answer)
        };
        join_all(members.into_iter().map(ask)).await.into_iter().collect()
    }
}

/// The URL of another endpoint of the API that `api_url` (`http://host:port/patroni`) belongs to.
pub fn endpoint(api_url: &str, path: &str) -> String {
    let (scheme, rest) = api_url.split_once("://").unwrap_or(("http", api_url));
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    format!("{scheme}://{authority}/{}", path.trim_start_matches('/'))
}

/// A client of REST APIs of members, with the credentials of the `ctl` and `restapi` sections.
#[derive(Debug, Clone)]
pub struct RestClient {
    http: reqwest::Client,
    authentication: Option<(String, Secret)>,
}

/// An API's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RestResponse {
    /// HTTP status.
    pub status: u16,
    /// The body.
    pub text: String,
    /// The `lsn` header of `POST /failsafe`.
    pub lsn: Option<Lsn>,
}

/// The client can't be made.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Certificate, key or CA can't be used.
    #[error("ctl: {0}")]
    Tls(#[from] TlsError),
    /// The HTTP library refused.
    #[error("the HTTP client can't be set up: {0}")]
    Http(#[from] reqwest::Error),
}

/// The API did not answer.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// Not a URL, or not a method.
    #[error("{0}")]
    Invalid(String),
    /// No connection, a broken one, or a deadline.
    #[error("{}", with_causes(.0))]
    Failed(#[from] reqwest::Error),
    /// More than any endpoint answers with.
    #[error("the answer is larger than {LARGEST_ANSWER} bytes")]
    TooLarge,
}

/// The largest answer that is read.
const LARGEST_ANSWER: usize = 4 << 20;

/// How long an idle connection is kept: a little less than the server keeps it.
const IDLE: Duration = Duration::from_secs(50);

/// How long a connection may take to come about: a host that is gone does not refuse it.
const CONNECT: Duration = Duration::from_secs(5);

impl RestClient {
    /// As agents call each other. Patroni's rule: servers are verified (without their host name) only where this node has
    /// a client certificate.
    pub fn for_agent(local: &Local) -> Result<Self, ClientError> {
        let mut ctl = local.ctl.clone();
        ctl.cacert = ctl.cacert.or_else(|| local.restapi.cafile.clone());
        ctl.authentication = ctl.authentication.or_else(|| local.restapi.authentication.clone());
        Self::new(&ctl, if ctl.certfile.is_some() { Verify::Chain } else { Verify::Nothing })
    }

    /// As operators call agents: servers are verified, unless `insecure` (the flag `-k`) or `ctl.insecure` says not to.
    pub fn for_operator(ctl: &Ctl, insecure: bool) -> Result<Self, ClientError> {
        let verify = match (insecure || ctl.insecure, &ctl.certfile) {
            (false, _) => Verify::Full,
            (true, Some(_)) => Verify::Chain,
            (true, None) => Verify::Nothing,
        };
        Self::new(ctl, verify)
    }

    fn new(ctl: &Ctl, verify: Verify) -> Result<Self, ClientError> {
        let (ca, certificate) = (ctl.cacert.as_deref(), ctl.certfile.as_deref());
        let tls = tls::client_config(ca, certificate, ctl.keyfile.as_deref(), verify)?;
        let http = reqwest::Client::builder()
            .use_preconfigured_tls(Arc::unwrap_or_clone(tls))
            .user_agent(concat!("Trunkline/", env!("CARGO_PKG_VERSION")))
            .no_proxy()
            .http1_only()
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT)
            .tcp_nodelay(true)
            .tcp_keepalive(Duration::from_secs(10))
            .pool_idle_timeout(IDLE)
            .build()?;
        Ok(Self { http, authentication: ctl.authentication.clone() })
    }

    /// Sends one request and reads the whole answer, all within `deadline`. A status that says "no" is an answer, too.
    pub async fn request(
        &self,
        method: &str,
        url: &str,
        body: Option<&Value>,
        deadline: Duration,
    ) -> Result<RestResponse, RequestError> {
        let bad_method = |_| RequestError::Invalid(format!("'{method}' is not an HTTP method"));
        let method = reqwest::Method::from_bytes(method.to_ascii_uppercase().as_bytes()).map_err(bad_method)?;
        let mut request = self.http.request(method, url).timeout(deadline);
        if let Some((user, password)) = &self.authentication {
            request = request.basic_auth(user, Some(password.reveal()));
        }
        if let Some(body) = body {
            request = request.json(body);
        }
        let mut response = request.send().await?;
        let lsn = response.headers().get("lsn").and_then(|lsn| lsn.to_str().ok()?.trim().parse().ok()).map(Lsn);
        let status = response.status().as_u16();
        let mut bytes = Vec::new();
        while let Some(chunk) = response.chunk().await? {
            if bytes.len() + chunk.len() > LARGEST_ANSWER {
                return Err(RequestError::TooLarge);
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(RestResponse { status, text: String::from_utf8_lossy(&bytes).into_owned(), lsn })
    }
}

/// An error with what is behind it: reqwest's own text names only the URL.
fn with_causes(error: &reqwest::Error) -> String {
    let causes = std::iter::successors(std::error::Error::source(error), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn reads_documents_of_both_kinds() {
        let standby = json!({"state": "running", "role": "replica", "timeline": 2,
            "xlog": {"received_location": 50, "replayed_location": 40}, "tags": {"az": "b", "failover_priority": "3"}});
        let expected = PeerStatus {
            in_recovery: true,
            holds_key: false,
            lsn: Lsn(50),
            timeline: Some(TimelineId(2)),
            failover_priority: 3,
            watchdog_failed: false,
            reads_own_wal: false,
        };
        assert_eq!(PeerStatus::parse(&standby), Some(expected.clone()));

        let mut started = standby.clone();
        started["xlog"]["reads_own_wal"] = true.into();
        assert_eq!(PeerStatus::parse(&started), Some(PeerStatus { reads_own_wal: true, ..expected.clone() }));

        let mut legacy = standby.clone();
        legacy["wal"] = json!({"received_location": 60, "replayed_location": "70"});
        assert_eq!(PeerStatus::parse(&legacy), Some(PeerStatus { lsn: Lsn(70), ..expected.clone() }));

        let mut unusable = standby.clone();
        unusable["watchdog_failed"] = true.into();
        unusable["tags"] = json!({"nofailover": true});
        unusable["timeline"] = Value::Null;
        let unusable_expected =
            PeerStatus { watchdog_failed: true, failover_priority: 0, timeline: None, ..expected.clone() };
        assert_eq!(PeerStatus::parse(&unusable), Some(unusable_expected));
    }

    #[test]
    fn a_primary_has_no_position_to_race_with() {
        for document in [
            json!({"role": "primary", "xlog": {"location": 90}}),
            json!({"role": "master", "xlog": {"location": 0}}),
            json!({"role": "replica", "xlog": {"location": 90}}),
            json!({"role": "primary", "state": "unknown", HOLDS_LEADER_KEY: true}),
        ] {
            let status = PeerStatus::parse(&document).unwrap();
            assert!(!status.in_recovery && status.lsn == Lsn(0), "{document}");
        }
    }

    #[test]
    fn a_member_without_positions_is_not_reachable() {
        for document in [
            json!({"state": "unknown", "role": "primary"}),
            json!({"state": "stopped", "role": "replica"}),
            json!({"xlog": 5}),
            json!([]),
            json!(null),
        ] {
            assert_eq!(PeerStatus::parse(&document), None, "{document}");
        }
    }

    #[test]
    fn endpoints() {
        for (api_url, expected) in [
            ("http://a:8008/patroni", "http://a:8008/failsafe"),
            ("https://[::1]:8008", "https://[::1]:8008/failsafe"),
            ("http://a:8008/x?y#z", "http://a:8008/failsafe"),
        ] {
            assert_eq!(endpoint(api_url, "failsafe"), expected);
        }
    }

    proptest::proptest! {
        #[test]
        fn no_document_panics(text: String, location: u64) {
            let _ = PeerStatus::parse(&json!({"xlog": {"location": text}, "timeline": location}));
            let _ = endpoint(&text, &text);
        }
    }
}
