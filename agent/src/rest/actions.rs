//! Requests that change something on this node: `/restart`, `/reinitialize`, `/reload`, `/failsafe`.
//!
//! None of them acts: each becomes a [`Command`] to the HA loop, whose reply is the answer.

use std::time::Duration;

use axum::http::{HeaderName, HeaderValue};
use serde_json::{Map, Value};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::oneshot;
use trunkline_common::dcs::Dcs;
use trunkline_common::{Clock, MemberName};
use trunkline_config::guc;

use super::answer::Answer;
use super::json::python_str;
use super::{Api, Observe, time};
use crate::node::{Command, RestartFilter, Word};
use crate::peer::LEADS;
use crate::postgres::PgStatus;

/// What a restart may take beyond the times that stop and start have: `sync` is left, a checkpoint made, `before_stop` run.
const BEFORE_RESTART: Duration = Duration::from_secs(400);

/// How long the HA loop may take to take or refuse a request that it doesn't have to carry out first.
const REPLY_LIMIT: Duration = Duration::from_secs(30);

/// Less than the 2 s after which the asking leader gives up.
const FAILSAFE_LIMIT: Duration = Duration::from_millis(1800);

impl<D: Dcs, P: Observe, C: Clock> Api<D, P, C> {
    /// `POST /reload`.
    pub(super) fn reload_configuration(&self) -> Answer {
        match self.send(Command::Reload) {
            Ok(()) => Answer::text(202, "reload scheduled"),
            Err(answer) => answer,
        }
    }

    /// `POST /restart`, now or at a time.
    pub(super) async fn restart(&self, body: Map<String, Value>) -> Answer {
        let settings = self.settings();
        if settings.pause && body.contains_key("schedule") {
            return Answer::text(500, "a restart can't be scheduled while the cluster is paused");
        }
        let request = match RestartRequest::parse(&body, self.clock.wall()) {
            Ok(request) => request,
            Err(answer) => return answer,
        };
        if let Some(at) = request.schedule {
            return self.schedule_restart(at, body, request.filter.timeout).await;
        }
        let start = request.filter.timeout.map_or(settings.primary_start_timeout, Duration::from_secs);
        let ask = |reply| Command::Restart(request.filter, reply);
        match self.ask(ask, BEFORE_RESTART + settings.stop_limit() + start).await {
            Ok(Ok(done)) => Answer::text(200, done),
            Ok(Err(refusal)) => Answer::text(refusal.status, refusal.text),
            Err(answer) => answer,
        }
    }

    async fn schedule_restart(&self, at: String, mut planned: Map<String, Value>, timeout: Option<u64>) -> Answer {
        planned.insert("schedule".to_owned(), at.into());
        // In seconds, whatever it was written in.
        if let Some(timeout) = timeout {
            planned.insert("timeout".to_owned(), timeout.into());
        }
        if let Some(started) = self.picture().await.running().map(|running| running.postmaster_start_time.clone()) {
            planned.insert("postmaster_start_time".to_owned(), started.into());
        }
        match self.ask(|reply| Command::ScheduleRestart(planned.into(), reply), REPLY_LIMIT).await {
            Ok(Ok(_)) => Answer::text(202, "Restart scheduled"),
            Ok(Err(refusal)) => Answer::text(refusal.status, refusal.text),
            Err(answer) => answer,
        }
    }

    /// `DELETE /restart`.
    pub(super) async fn cancel_restart(&self) -> Answer {
        match self.ask(Command::CancelRestart, REPLY_LIMIT).await {
            Ok(true) => Answer::text(200, "scheduled restart deleted"),
            Ok(false) => Answer::text(404, "no restart is scheduled"),
            Err(answer) => answer,
        }
    }

    /// `POST /reinitialize`.
    pub(super) async fn reinitialize(&self, body: Map<String, Value>) -> Answer {
        let flag = |name: &str| body.get(name).is_some_and(|value| guc::parse_bool(&python_str(value)) == Some(true));
        let (force, from_leader) = (flag("force"), flag("from_leader"));
        let view = match self.store.read().await {
            Ok(view) => view,
            Err(error) => return Answer::text(503, error.to_string()),
        };
        match &view.leader {
            None => return Answer::text(503, "the cluster has no leader, can not reinitialize"),
            Some(leader) if leader.name == self.identity.name => {
                return Answer::text(503, "I am the leader, can not reinitialize");
            }
            Some(_) => {}
        }
        match self.ask(|reply| Command::Reinitialize { force, from_leader, reply }, REPLY_LIMIT).await {
            Ok(Ok(_)) => Answer::text(200, "reinitialize started"),
            Ok(Err(refusal)) => Answer::text(refusal.status, refusal.text),
            Err(answer) => answer,
        }
    }

    /// `GET /failsafe`: the members whose word a leader without DCS needs.
    pub(super) fn failsafe_members(&self) -> Answer {
        let knowledge = self.knowledge.borrow();
        let Some(view) = &knowledge.view else { return Answer::json(200, Map::new().into()) };
        match &view.failsafe {
            Some(members) => {
                let members = members.iter().map(|(name, url)| (name.0.clone(), Value::from(url.as_str())));
                Answer::json(200, Value::Object(members.collect()))
            }
            None => Answer::page(502, "there is no failsafe key"),
        }
    }

    /// `POST /failsafe`: a leader that lost the DCS asks whether it may go on.
    pub(super) async fn failsafe(&self, body: Map<String, Value>) -> Answer {
        let Some(leader) = body.get("name").and_then(Value::as_str).map(MemberName::from) else {
            return Answer::page(400, "the body does not say who asks (name)");
        };
        // As last observed, not looked at anew: an answer that comes late costs the cluster its leader.
        let lsn = match &self.board.borrow().postgres {
            PgStatus::Running(running) => Some(running.lsn),
            _ => None,
        };
        let ask = |reply| Command::FailsafePoll { leader, body: body.into(), reply };
        match self.ask(ask, FAILSAFE_LIMIT).await {
            Ok(Word::Given) => {
                let accepted = Answer::text(200, "Accepted");
                match lsn {
                    Some(lsn) => accepted.with_header(HeaderName::from_static("lsn"), HeaderValue::from(lsn.0)),
                    None => accepted,
                }
            }
            Ok(Word::Leads) => Answer::text(500, LEADS),
            Ok(Word::Refused) => Answer::text(500, "No promise"),
            Err(answer) => answer,
        }
    }

    /// Wakes the HA loop. A full queue is as good: it is awake already.
    pub(super) fn wake(&self) {
        let _ = self.commands.try_send(Command::Wake);
    }

    fn send(&self, command: Command) -> Result<(), Answer> {
        self.commands.try_send(command).map_err(|error| match error {
            TrySendError::Full(_) => Answer::text(503, "too many requests wait for the HA loop; try again"),
            TrySendError::Closed(_) => Answer::text(503, "the agent is shutting down"),
        })
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command, limit: Duration) -> Result<T, Answer> {
        let (reply, answer) = oneshot::channel();
        self.send(command(reply))?;
        match tokio::time::timeout(limit, answer).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(_)) => Err(Answer::text(503, "the agent is shutting down")),
            Err(_) => Err(Answer::text(503, format!("not done within {} s; it may still happen", limit.as_secs()))),
        }
    }
}

/// A restart as asked for.
#[derive(Debug, PartialEq, Eq)]
struct RestartRequest {
    filter: RestartFilter,
    schedule: Option<String>,
}

impl RestartRequest {
    /// Checks the fields in their order; the first bad one is the answer.
    fn parse(body: &Map<String, Value>, now: chrono::DateTime<chrono::Utc>) -> Result<Self, Answer> {
        let mut request = Self { filter: RestartFilter::default(), schedule: None };
        let bad = |sentence: String| Answer::text(400, sentence);
        for (field, value) in body {
            match field.as_str() {
                "schedule" => {
                    let time = time::parse_schedule(&python_str(value), now);
                    let time = time.map_err(|why| Answer::text(why.status(), why.sentence("restart")))?;
                    request.schedule = Some(time::isoformat(time));
                }
                "role" => match value.as_str() {
                    Some(role @ ("primary" | "standby_leader" | "replica")) => {
                        request.filter.role = Some(role.to_owned())
                    }
                    _ => return Err(bad("role is one of primary, standby_leader, replica".to_owned())),
                },
                "postgres_version" => match version_number(&python_str(value)) {
                    Some(version) => request.filter.older_than = Some(version),
                    None => return Err(bad(format!("{} is not a version like 15.2", python_str(value)))),
                },
                "timeout" => match guc::parse_int(&python_str(value), Some("s")).map(u64::try_from) {
                    Some(Ok(seconds)) if seconds > 0 => request.filter.timeout = Some(seconds),
                    _ => {
                        return Err(bad("timeout is a positive number of seconds, or has a unit like 1min".to_owned()));
                    }
                },
                "restart_pending" => request.filter.pending = true,
                other => return Err(bad(format!("a restart has no filter named {other}"))),
            }
        }
        Ok(request)
    }
}

/// `X.Y` (10 and later) or `X.Y.Z` as PostgreSQL's `server_version_num`.
fn version_number(text: &str) -> Option<u32> {
    let parts: Option<Vec<u32>> = text.split('.').map(|part| part.trim().parse().ok().filter(|n| *n < 100)).collect();
    match parts?.as_slice() {
        [major, minor] if *major >= 10 => Some(major * 10_000 + minor),
        [major, middle, minor] => Some(major * 10_000 + middle * 100 + minor),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(body: Value) -> Result<RestartRequest, u16> {
        let now = chrono::DateTime::from_timestamp(1_800_000_000, 0).unwrap();
        RestartRequest::parse(body.as_object().unwrap(), now).map_err(|answer| answer.status)
    }

    #[test]
    fn restart_fields_are_checked_in_their_order() {
        let bad = [
            (json!({"role": "master"}), 400),
            (json!({"role": 1}), 400),
            (json!({"postgres_version": "9.6"}), 400),
            (json!({"postgres_version": "15"}), 400),
            (json!({"postgres_version": "x.y"}), 400),
            (json!({"timeout": 0}), 400),
            (json!({"timeout": "-1min"}), 400),
            (json!({"timeout": "1kB"}), 400),
            (json!({"nonsense": 1}), 400),
            (json!({"schedule": "2001-01-01T00:00:00Z"}), 422),
            (json!({"schedule": "2001-01-01T00:00:00"}), 400),
            (json!({"schedule": 5}), 422),
            (json!({"schedule": "2001-01-01T00:00:00Z", "role": "x"}), 422),
            (json!({"role": "x", "schedule": "2001-01-01T00:00:00Z"}), 400),
        ];
        for (body, status) in bad {
            assert_eq!(parse(body.clone()), Err(status), "{body}");
        }
    }

    #[test]
    fn restart_filters_are_understood() {
        let body = json!({"role": "replica", "postgres_version": "15.4", "timeout": "1min", "restart_pending": false});
        let filter =
            RestartFilter { role: Some("replica".into()), older_than: Some(150_004), pending: true, timeout: Some(60) };
        assert_eq!(parse(body), Ok(RestartRequest { filter, schedule: None }));
        assert_eq!(parse(json!({})), Ok(RestartRequest { filter: RestartFilter::default(), schedule: None }));
        let planned = parse(json!({"schedule": "2031-05-01T10:00Z"})).unwrap();
        assert_eq!(planned.schedule.as_deref(), Some("2031-05-01T10:00:00+00:00"));
    }

    #[test]
    fn versions() {
        let table = [("15.4", Some(150_004)), ("9.6.2", Some(90_602)), ("15", None), ("9.6", None), ("", None)];
        for (text, number) in table {
            assert_eq!(version_number(text), number, "{text}");
        }
    }
}
