//! A watch that never falls silent: it reports changes, proves each second that it lives, or ends with an error.

use std::collections::VecDeque;
use std::time::Duration;

use etcd_client::{WatchRequestSender, WatchResponse, WatchResponseStream, WatchStream};
use futures::StreamExt;

use super::super::{DcsError, Events, WatchEvent};
use super::wire;
use crate::{Clock, Instant};

/// How long a watch may be quiet before it is asked whether it lives.
const PROBE: Duration = Duration::from_secs(1);

/// Bounds of how long it has for the answer.
const PATIENCE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(2));

/// The events of an opened watch; `created` is the first message that came on it.
pub(super) fn events<C: Clock>(
    stream: WatchStream,
    created: Option<WatchResponse>,
    clock: C,
    patience: Duration,
) -> Result<Events, DcsError> {
    let (requests, responses) = stream.split();
    let patience = patience.clamp(PATIENCE.0, PATIENCE.1);
    let probe_at = clock.now() + PROBE;
    let mut watcher =
        Watcher { requests, responses, clock, patience, ready: VecDeque::new(), probe_at, answer_by: None };
    watcher.take(created)?;
    Ok(Box::pin(futures::stream::unfold(Some(watcher), |watcher| async move {
        let mut watcher = watcher?;
        match watcher.next().await {
            Ok(event) => Some((Ok(event), Some(watcher))),
            Err(lost) => Some((Err(lost), None)),
        }
    })))
}

struct Watcher<C> {
    requests: WatchRequestSender,
    responses: WatchResponseStream,
    clock: C,
    patience: Duration,
    ready: VecDeque<WatchEvent>,
    probe_at: Instant,
    /// Set while a probe is unanswered.
    answer_by: Option<Instant>,
}

impl<C: Clock> Watcher<C> {
    async fn next(&mut self) -> Result<WatchEvent, DcsError> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(event);
            }
            let clock = self.clock.clone();
            let wake = self.answer_by.unwrap_or(self.probe_at);
            tokio::select! {
                biased;
                response = self.responses.next() => {
                    let response = response.transpose().map_err(|error| lost(&error.to_string()))?;
                    self.take(response)?;
                }
                () = clock.sleep_until(wake) => self.probe_or_give_up().await?,
            }
        }
    }

    async fn probe_or_give_up(&mut self) -> Result<(), DcsError> {
        if self.answer_by.is_some() {
            return Err(lost(&format!("no answer to a probe within {:?}", self.patience)));
        }
        self.answer_by = Some(self.clock.now() + self.patience);
        // The answer's revision can be ahead of events still to come (etcd 15220): it only says that the member lives.
        let clock = self.clock.clone();
        match clock.within(self.patience, self.requests.request_progress()).await {
            Some(Ok(())) => Ok(()),
            Some(Err(error)) => Err(lost(&error.to_string())),
            None => Err(lost("the connection takes no requests")),
        }
    }

    fn take(&mut self, response: Option<WatchResponse>) -> Result<(), DcsError> {
        let Some(response) = response else { return Err(lost("closed by etcd")) };
        // A compaction cancels without a reason, and the stream then stays open and mute.
        if response.canceled() || response.compact_revision() > 0 {
            let why = match response.compact_revision() {
                0 => response.cancel_reason().to_owned(),
                revision => format!("compacted at {revision}"),
            };
            return Err(lost(&format!("cancelled by etcd: {why}")));
        }
        self.answer_by = None;
        self.probe_at = self.clock.now() + PROBE;
        if response.events().is_empty() && !response.created() {
            self.ready.push_back(WatchEvent::Alive);
        }
        self.ready.extend(wire::events(&response));
        Ok(())
    }
}

fn lost(why: &str) -> DcsError {
    DcsError::WatchLost(why.to_owned())
}
