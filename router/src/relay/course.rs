//! When a session is over, or may be ended because its server is about to stop: the same for both ways of relaying.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use super::{End, Outcome, Stop};
use crate::boundary::{self, Trace};
use crate::sessions::Call;

/// How long a client may go on without saying anything once its server has closed. PostgreSQL never closes one direction
/// only, so this just waits for the client to notice.
const LINGER: Duration = Duration::from_secs(10);

/// A direction as it is between two steps.
#[derive(Clone, Copy)]
pub(super) struct Side<'h> {
    /// Why it moves nothing any more, if so.
    pub stop: Option<Stop>,
    /// Nothing will be read from its source any more, and whoever there is to hear of that has heard.
    pub ended: bool,
    /// All that was read has been written.
    pub written: bool,
    /// What has passed, if all of it was seen.
    pub trace: Option<&'h Trace>,
}

/// A session on its way to its end.
pub(super) struct Course {
    /// How long it may go on once its server is about to stop.
    budget: Duration,
    /// When waiting ends: for a client whose server has closed, or for the end of a transaction.
    alarm: Option<Pin<Box<tokio::time::Sleep>>>,
    end: Option<End>,
}

impl Course {
    /// One that has just begun.
    pub fn new(budget: Option<Duration>) -> Self {
        Self { budget: budget.unwrap_or_default(), alarm: None, end: None }
    }

    /// What is left of the time that it may go on, if its server is about to stop.
    pub fn left(&self) -> Option<Duration> {
        let end = self.alarm.as_ref()?.deadline();
        Some(end.saturating_duration_since(tokio::time::Instant::now()))
    }

    /// The client has said something.
    pub fn heard_client(&mut self, server_ended: bool) {
        if server_ended {
            self.alarm = None;
        }
    }

    /// Who ended the session, if it is over: the client has nothing more to say and there is nothing more, or no way, to say
    /// to it.
    pub fn finished(&mut self, up: Side<'_>, down: Side<'_>) -> Option<End> {
        self.end = self.end.or(match (up.stop, down.stop) {
            (Some(Stop::Read), _) => Some(End::ClientLost),
            (_, Some(Stop::Read)) => Some(End::ServerLost),
            (Some(Stop::Eof), _) => Some(End::Client),
            (_, Some(Stop::Eof)) => Some(End::Server),
            (Some(Stop::Write), _) => Some(End::ServerLost),
            (_, Some(Stop::Write)) => Some(End::ClientLost),
            (None, None) => None,
        });
        let deaf = up.stop == Some(Stop::Read) || down.stop == Some(Stop::Write);
        self.end.filter(|_| up.ended && (down.ended || deaf))
    }

    /// What waiting has come to, to be asked when nothing moves or others have a turn.
    pub fn poll(&mut self, cx: &mut Context<'_>, call: Call, up: Side<'_>, down: Side<'_>) -> Poll<Outcome> {
        if down.ended {
            // The client's silence is limited.
            return self.poll_alarm(cx, LINGER).map(|()| Outcome::Ended(self.end.unwrap_or(End::Server)));
        }
        if !is_open(up, down) {
            return Poll::Pending;
        }
        let (true, Some(_), Some(server)) = (call.resign, up.trace, down.trace) else {
            // It may have been taken back.
            self.alarm = None;
            return Poll::Pending;
        };
        let between = server.between_messages() && down.written;
        let outcome = if between { Outcome::Resigned { idle: false } } else { Outcome::Overdue };
        self.poll_alarm(cx, self.budget).map(|()| outcome)
    }

    fn poll_alarm(&mut self, cx: &mut Context<'_>, after: Duration) -> Poll<()> {
        self.alarm.get_or_insert_with(|| Box::pin(tokio::time::sleep(after))).as_mut().poll(cx)
    }
}

/// Whether the session is to end at once: its server is about to stop, and the client has been answered everything, outside of
/// a transaction, as far as that can be known.
pub(super) fn resigns(call: Call, up: Side<'_>, down: Side<'_>) -> bool {
    let (true, Some(client), Some(server)) = (call.resign, up.trace, down.trace) else { return false };
    is_open(up, down) && up.written && down.written && boundary::is_idle(client, server)
}

/// Whether both directions move.
pub(super) fn is_open(up: Side<'_>, down: Side<'_>) -> bool {
    up.stop.is_none() && down.stop.is_none()
}
