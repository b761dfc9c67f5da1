//! `/switchover` and `/failover`: write the `failover` key, then tell how it went (rest-api §4.6).

use std::collections::BTreeMap;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use serde_json::{Map, Value, json};
use trunkline_common::cluster::FailoverRequest;
use trunkline_common::dcs::store::Outcome;
use trunkline_common::dcs::{Dcs, codec};
use trunkline_common::{Clock, ClusterView, MemberName, Revision};
use trunkline_config::dynamic::SynchronousMode;

use super::answer::Answer;
use super::json::python_str;
use super::{Api, Observe, time};
use crate::node::Board;
use crate::peer::PeerStatus;

/// How long a candidate may take to answer before it does not count.
const CANDIDATE_LIMIT: Duration = Duration::from_secs(2);

/// The two ways to ask for another leader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    /// From this leader.
    Switchover,
    /// To this candidate, whoever leads.
    Failover,
}

impl Action {
    fn name(self) -> &'static str {
        match self {
            Self::Switchover => "switchover",
            Self::Failover => "failover",
        }
    }

    /// `Switchover`, `Failover`.
    fn title(self) -> &'static str {
        match self {
            Self::Switchover => "Switchover",
            Self::Failover => "Failover",
        }
    }

    /// `switched`, `failed`.
    fn past(self) -> &'static str {
        match self {
            Self::Switchover => "switched",
            Self::Failover => "failed",
        }
    }
}

impl<D: Dcs, P: Observe, C: Clock> Api<D, P, C> {
    /// `POST /switchover`, `POST /failover`, answered by any node.
    pub(super) async fn change_leader(&self, action: Action, body: Map<String, Value>) -> Answer {
        let view = match self.store.read().await {
            Ok(view) => view,
            Err(error) => return Answer::text(503, error.to_string()),
        };
        let (action, request) = match parse(action, &body, view.settings.pause, self.clock.wall()) {
            Ok(parsed) => parsed,
            Err((status, sentence)) => return Answer::text(status, sentence),
        };
        tracing::info!(
            action = action.name(),
            leader = request.leader.as_ref().map(MemberName::as_str),
            candidate = request.candidate.as_ref().map(MemberName::as_str),
            scheduled_at = request.scheduled_at_text,
            "asked for another leader"
        );
        let (scheduled, asked_at) = (request.scheduled_at.is_some(), self.clock.wall());
        if !scheduled && let Err(sentence) = self.check_candidates(action, &view, &request).await {
            return Answer::text(412, sentence);
        }
        let written = match self.store.put_failover(&codec::encode_failover(Some(&request)), None).await {
            Ok(Outcome::Done(revision)) => revision,
            Ok(Outcome::Conflict) => return Answer::text(503, "the failover key could not be written"),
            Err(error) => return Answer::text(503, format!("the failover key could not be written: {error}")),
        };
        self.wake();
        if scheduled {
            return Answer::text(202, format!("{} scheduled", action.title()));
        }
        let before = view.leader.as_ref().map(|leader| &leader.name);
        self.await_outcome(action, before, request.candidate.as_ref(), (written, asked_at)).await
    }

    /// `DELETE /switchover`: forgets a scheduled one.
    pub(super) async fn cancel_switchover(&self) -> Answer {
        let view = match self.store.read().await {
            Ok(view) => view,
            Err(error) => return Answer::page(409, error.to_string()),
        };
        if view.failover.as_ref().is_none_or(|request| request.scheduled_at.is_none()) {
            return Answer::text(404, "no switchover is scheduled");
        }
        match self.store.put_failover(&json!({}), Some(view.failover_revision)).await {
            Ok(Outcome::Done(_)) => Answer::text(200, "scheduled switchover deleted"),
            Ok(Outcome::Conflict) => Answer::page(409, "somebody else changed the request; try again"),
            Err(error) => Answer::page(409, error.to_string()),
        }
    }

    async fn check_candidates(
        &self,
        action: Action,
        view: &ClusterView,
        request: &FailoverRequest,
    ) -> Result<(), String> {
        let candidates = candidates(action, view, request)?;
        let client = self.peers();
        // The first good one decides: a hung member must not hold up a switchover to a healthy one.
        let mut answers: FuturesUnordered<_> =
            candidates.values().map(|url| client.member_status(url, CANDIDATE_LIMIT)).collect();
        while let Some(status) = answers.next().await {
            if status.as_ref().is_some_and(may_lead) {
                return Ok(());
            }
        }
        Err(format!("{} is not possible: no good candidates have been found", action.name()))
    }

    /// Watches until there is another leader, or the request is gone without one. What is going on is not given up: the old
    /// leader's stop may take as long as `primary_stop_timeout` allows.
    async fn await_outcome(
        &self,
        action: Action,
        before: Option<&MemberName>,
        candidate: Option<&MemberName>,
        (written, asked_at): (Revision, chrono::DateTime<chrono::Utc>),
    ) -> Answer {
        let settings = self.settings();
        let limit = 2 * settings.loop_wait.max(Duration::from_secs(10));
        let longest = limit + settings.stop_limit();
        let mut knowledge = self.knowledge.clone();
        let wait = async {
            loop {
                let view = knowledge.borrow_and_update().view.clone();
                let outcome = view.and_then(|view| outcome(action, &view, before, candidate, written));
                if let Some((status, sentence)) = outcome {
                    let why = if status == 503 { self.refusal(asked_at).await } else { None };
                    return Answer::text(status, sentence + &why.map(|why| format!(": {why}")).unwrap_or_default());
                }
                if knowledge.changed().await.is_err() {
                    return Answer::text(503, format!("{} status unknown: the agent is shutting down", action.title()));
                }
            }
        };
        let phase = || {
            let view = self.knowledge.borrow().view.clone();
            view.map_or(Phase::Asked, |view| Phase::of(&view, before))
        };
        let patience = async {
            tokio::time::sleep(limit).await;
            let mut waited = limit;
            while phase() != Phase::Asked && waited < longest {
                tokio::time::sleep(Duration::from_secs(1)).await;
                waited += Duration::from_secs(1);
            }
            waited
        };
        tokio::select! {
            answer = wait => answer,
            waited = patience => {
                let (title, seconds, phase) = (action.title(), waited.as_secs(), phase().words(before));
                Answer::text(503, format!("{title} status unknown after {seconds} seconds; it may still happen: {phase}"))
            }
        }
    }

    /// Why the HA loop of this node, if it is the leader's, has not carried the request out.
    async fn refusal(&self, asked_at: chrono::DateTime<chrono::Utc>) -> Option<String> {
        let mut board = self.board.clone();
        let reason = |board: &Board| {
            let mut noted = board.decisions.iter().rev().take_while(|noted| noted.at >= asked_at);
            noted.find(|noted| noted.action == "clear_failover").map(|noted| noted.reason.clone())
        };
        // It is told at the end of the turn that has removed the request.
        let told =
            tokio::time::timeout(Duration::from_millis(500), board.wait_for(|board| reason(board).is_some())).await;
        told.ok()?.ok().and_then(|board| reason(&board))
    }
}

/// How far a change of leaders has got, as the DCS tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The request is there, the leader takes writes: it asks the others, or makes its last checkpoint.
    Asked,
    /// The old leader's PostgreSQL is stopping, and a standby gets the rest of its WAL.
    Stopping,
    /// Nobody has the key.
    Free,
    /// This one has the key, and is being promoted.
    Promoting(MemberName),
    /// This one takes writes.
    Done(MemberName),
}

impl Phase {
    /// `before`: who led when it was asked for.
    pub fn of(view: &ClusterView, before: Option<&MemberName>) -> Self {
        let Some(leader) = view.leader.as_ref().map(|leader| &leader.name) else { return Self::Free };
        let member = view.members.get(leader);
        let standby_cluster = view.settings.standby_cluster.is_some();
        match member {
            Some(member) if Some(leader) == before && member.state == "stopping" => Self::Stopping,
            _ if Some(leader) == before => Self::Asked,
            Some(member) if member.claims_primary() || standby_cluster => Self::Done(leader.clone()),
            _ => Self::Promoting(leader.clone()),
        }
    }

    /// A sentence.
    pub fn words(&self, before: Option<&MemberName>) -> String {
        let old = before.map_or("the old leader", MemberName::as_str);
        match self {
            Self::Asked => format!("{old} still leads, and has yet to carry the request out"),
            Self::Stopping => format!("{old} stops PostgreSQL and hands its WAL over"),
            Self::Free => format!("{old} has given the leader key up, nobody has taken it yet"),
            Self::Promoting(new) => format!("{new} has the leader key and is being promoted"),
            Self::Done(new) => format!("{new} takes writes"),
        }
    }
}

/// Rows 2 to 8 of §4.6; the first one that matches is the answer.
fn parse(
    action: Action,
    body: &Map<String, Value>,
    pause: bool,
    now: chrono::DateTime<chrono::Utc>,
) -> Result<(Action, FailoverRequest), (u16, String)> {
    let field = |name: &str| body.get(name).filter(|value| trunkline_config::tags::truthy(value)).map(python_str);
    let bad = |sentence: &str| Err((400, sentence.to_owned()));
    let leader = field("leader").map(MemberName);
    let candidate = field("candidate").or_else(|| field("member")).map(MemberName);
    let schedule = field("scheduled_at");

    if action == Action::Failover && candidate.is_none() {
        return bad("Failover could be performed only to a specific candidate");
    }
    if action == Action::Switchover && leader.is_none() {
        return bad("a switchover needs the name of the current leader");
    }
    let mut scheduled_at = None;
    if let Some(text) = schedule {
        if action == Action::Failover {
            return bad("a failover can't be scheduled");
        }
        if pause {
            return bad("a switchover can't be scheduled while the cluster is paused");
        }
        let time = time::parse_schedule(&text, now);
        scheduled_at = Some(time.map_err(|why| (why.status(), why.sentence(action.name())))?);
    }
    if pause && candidate.is_none() {
        return bad("while the cluster is paused a switchover needs a candidate");
    }
    let action = if leader.is_some() { Action::Switchover } else { action };
    if leader == candidate {
        return bad("leader and candidate are the same");
    }
    let scheduled_at_text = scheduled_at.map(time::isoformat);
    Ok((action, FailoverRequest { leader, candidate, scheduled_at, scheduled_at_text }))
}

/// Whom to ask (name → API URL), or why there is nobody.
fn candidates(
    action: Action,
    view: &ClusterView,
    request: &FailoverRequest,
) -> Result<BTreeMap<MemberName, String>, String> {
    let leader = view.leader.as_ref().map(|leader| &leader.name);
    if let Some(expected) = &request.leader
        && leader != Some(expected)
    {
        return Err(match leader {
            Some(leader) => format!("the leader is {leader}, not {expected}"),
            None => format!("{expected} is not the leader: there is none"),
        });
    }
    let named_by_sync = view.settings.synchronous_mode == SynchronousMode::On;
    let chosen: Vec<&MemberName> = match &request.candidate {
        Some(candidate) => {
            if action == Action::Switchover && named_by_sync && !view.sync.lists(candidate) {
                return Err(format!("{candidate} is not a synchronous standby"));
            }
            if !view.members.contains_key(candidate) {
                return Err(format!("there is no member {candidate}"));
            }
            vec![candidate]
        }
        None if named_by_sync => {
            let listed: Vec<_> = view.members.keys().filter(|name| view.sync.lists(name)).collect();
            if listed.is_empty() {
                return Err(format!("{} is not possible: there is no synchronous standby", action.name()));
            }
            listed
        }
        None => {
            let others = view.members.iter().filter(|(name, member)| Some(*name) != leader && member.api_url.is_some());
            let others: Vec<_> = others.map(|(name, _)| name).collect();
            if others.is_empty() {
                let action = action.name();
                return Err(format!("{action} is not possible: cluster does not have members except leader"));
            }
            others
        }
    };
    let url = |name: &MemberName| view.members.get(name)?.api_url.clone();
    Ok(chosen.into_iter().filter_map(|name| Some((name.clone(), url(name)?))).collect())
}

fn may_lead(status: &PeerStatus) -> bool {
    status.failover_priority > 0 && !status.watchdog_failed
}

/// How it went, as far as `view` tells; `None`: not over yet.
fn outcome(
    action: Action,
    view: &ClusterView,
    before: Option<&MemberName>,
    candidate: Option<&MemberName>,
    written: Revision,
) -> Option<(u16, String)> {
    // An older view knows nothing of the request yet.
    if view.revision < written {
        return None;
    }
    let now = view.leader.as_ref().map(|leader| &leader.name);
    match now {
        Some(new) if now != before => Some(match candidate {
            Some(wanted) if wanted != new => {
                (200, format!("{} over to \"{new}\" instead of \"{wanted}\"", capitalized(action.past())))
            }
            _ => (200, format!("Successfully {} over to \"{new}\"", action.past())),
        }),
        // While nobody leads the request may be gone already: the new leader's key comes next.
        _ if now == before && view.failover.is_none() => Some((503, format!("{} failed", action.title()))),
        _ => None,
    }
}

fn capitalized(word: &str) -> String {
    let mut chars = word.chars();
    chars.next().map(|first| first.to_ascii_uppercase().to_string() + chars.as_str()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use trunkline_common::cluster::{LeaderKey, SyncState};
    use trunkline_common::{LeaseId, Member};

    use super::*;

    fn view(leader: Option<&str>, members: &[&str]) -> ClusterView {
        let member = |name: &&str| {
            let api_url = Some(format!("http://{name}:8008/patroni"));
            (MemberName::from(*name), Member { api_url, state: "running".into(), ..Member::default() })
        };
        let key = |name: &str| LeaderKey {
            name: name.into(),
            lease: LeaseId(1),
            created: Revision(1),
            modified: Revision(1),
        };
        ClusterView {
            revision: Revision(10),
            leader: leader.map(key),
            members: members.iter().map(member).collect(),
            ..ClusterView::default()
        }
    }

    fn request(leader: Option<&str>, candidate: Option<&str>) -> FailoverRequest {
        let name = |name: Option<&str>| name.map(MemberName::from);
        FailoverRequest {
            leader: name(leader),
            candidate: name(candidate),
            scheduled_at: None,
            scheduled_at_text: None,
        }
    }

    fn parsed(action: Action, body: Value, pause: bool) -> Result<(Action, FailoverRequest), (u16, String)> {
        let now = chrono::DateTime::from_timestamp(1_800_000_000, 0).unwrap();
        parse(action, body.as_object().unwrap(), pause, now)
    }

    #[test]
    fn requests_are_checked_in_their_order() {
        use Action::{Failover, Switchover};
        let table = [
            (Failover, json!({"leader": "a"}), false, 400),
            (Failover, json!({"nonsense": 1}), false, 400),
            (Switchover, json!({"candidate": "b"}), false, 400),
            (Failover, json!({"candidate": "b", "scheduled_at": "2031-05-01T10:00Z"}), false, 400),
            (Switchover, json!({"leader": "a", "scheduled_at": "2031-05-01T10:00Z"}), true, 400),
            (Switchover, json!({"leader": "a", "scheduled_at": "2031-05-01T10:00"}), false, 400),
            (Switchover, json!({"leader": "a", "scheduled_at": "2001-05-01T10:00Z"}), false, 422),
            (Switchover, json!({"leader": "a", "scheduled_at": "soon"}), false, 422),
            (Switchover, json!({"leader": "a"}), true, 400),
            (Switchover, json!({"leader": "a", "candidate": "a"}), false, 400),
        ];
        for (action, body, pause, status) in table {
            assert_eq!(parsed(action, body.clone(), pause).map_err(|(status, _)| status), Err(status), "{body}");
        }
        let (_, sentence) = parsed(Failover, json!({"x": 1}), false).unwrap_err();
        assert_eq!(sentence, "Failover could be performed only to a specific candidate");
        let (action, asked) = parsed(Failover, json!({"leader": "a", "member": "b"}), false).unwrap();
        assert_eq!((action, asked), (Switchover, request(Some("a"), Some("b"))));
    }

    #[test]
    fn candidates_follow_the_sync_key_in_synchronous_mode() {
        let mut synchronous = view(Some("a"), &["a", "b", "c"]);
        synchronous.settings.synchronous_mode = SynchronousMode::On;
        let mut alone = synchronous.clone();
        synchronous.sync =
            SyncState { leader: Some("a".into()), standbys: vec!["b".into()], quorum: 0, revision: Revision(2) };
        let asynchronous = view(Some("a"), &["a", "b", "c"]);
        let names = |action, view: &ClusterView, leader, candidate| {
            let found = candidates(action, view, &request(leader, candidate));
            found.map(|found| found.into_keys().map(|name| name.0).collect::<Vec<_>>().join(","))
        };
        use Action::{Failover, Switchover};
        assert_eq!(names(Switchover, &synchronous, Some("a"), None), Ok("b".into()));
        assert!(names(Switchover, &synchronous, Some("a"), Some("c")).is_err());
        assert_eq!(names(Failover, &synchronous, None, Some("c")), Ok("c".into()));
        assert_eq!(names(Switchover, &asynchronous, Some("a"), None), Ok("b,c".into()));
        assert!(names(Switchover, &asynchronous, Some("b"), None).unwrap_err().contains("the leader is a"));
        assert!(names(Switchover, &asynchronous, Some("a"), Some("z")).unwrap_err().contains("no member z"));
        alone.sync.leader = Some("a".into());
        assert!(names(Switchover, &alone, Some("a"), None).is_err());
        let single = view(Some("a"), &["a"]);
        assert_eq!(
            names(Switchover, &single, Some("a"), None),
            Err("switchover is not possible: cluster does not have members except leader".into())
        );
    }

    #[test]
    fn phases_are_read_off_the_view() {
        let a = MemberName::from("a");
        let mut view = view(Some("a"), &["a", "b"]);
        assert_eq!(Phase::of(&view, Some(&a)), Phase::Asked);
        view.members.get_mut(&a).unwrap().state = "stopping".into();
        assert!(Phase::of(&view, Some(&a)).words(Some(&a)).starts_with("a stops PostgreSQL"));
        let free = ClusterView { leader: None, ..view.clone() };
        assert_eq!(Phase::of(&free, Some(&a)), Phase::Free);
        view.leader.as_mut().unwrap().name = "b".into();
        assert_eq!(Phase::of(&view, Some(&a)).words(Some(&a)), "b has the leader key and is being promoted");
        view.members.get_mut(&"b".into()).unwrap().role = "primary".into();
        assert_eq!(Phase::of(&view, Some(&a)).words(Some(&a)), "b takes writes");
    }

    #[test]
    fn the_outcome_is_read_off_the_view() {
        let (a, b) = (MemberName::from("a"), MemberName::from("b"));
        let judge = |view: &ClusterView, candidate, written| {
            outcome(Action::Switchover, view, Some(&a), candidate, Revision(written))
        };
        let mut pending = view(Some("a"), &["a", "b", "c"]);
        assert_eq!(judge(&pending, Some(&b), 11), None, "a view from before the request says nothing");
        assert_eq!(judge(&pending, Some(&b), 10).map(|(status, _)| status), Some(503), "the request is gone");
        pending.failover = Some(request(Some("a"), Some("b")));
        assert_eq!(judge(&pending, Some(&b), 10), None);
        assert_eq!(judge(&view(None, &["a", "b"]), Some(&b), 10), None, "between two leaders");
        let done = (200, "Successfully switched over to \"b\"".to_owned());
        assert_eq!(judge(&view(Some("b"), &["a", "b"]), Some(&b), 10), Some(done.clone()));
        assert_eq!(judge(&view(Some("b"), &["a", "b"]), None, 10), Some(done));
        let other = judge(&view(Some("c"), &["a", "b", "c"]), Some(&b), 10).unwrap();
        assert_eq!(other, (200, "Switched over to \"c\" instead of \"b\"".to_owned()));
    }
}
