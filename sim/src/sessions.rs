//! What routers have open to servers, for a promise of `router_lease`: nobody is promoted while a router has sessions to a leader
//! before.

use std::collections::BTreeMap;

use crate::executor::ProcessId;
use crate::stage::Stage;

/// Every session of every router.
#[derive(Debug, Default)]
pub struct Sessions {
    next: u64,
    /// The router, and the host of the server.
    open: BTreeMap<u64, (ProcessId, usize)>,
    /// Routers that a new leader has to wait for: they are registered, and go by nothing else.
    registered: BTreeMap<ProcessId, bool>,
}

impl Sessions {
    /// Whether a new leader has to wait for `router` from now on.
    pub fn register(&mut self, router: ProcessId, registered: bool) {
        self.registered.insert(router, registered);
    }
}

/// One of them, until it is dropped.
pub struct Open {
    stage: Stage,
    number: u64,
}

impl Open {
    /// `router` has one with the server of `host`.
    pub fn new(stage: &Stage, router: ProcessId, host: usize) -> Self {
        let number = stage.sessions(|sessions| {
            sessions.next += 1;
            sessions.open.insert(sessions.next, (router, host));
            sessions.next
        });
        Self { stage: stage.clone(), number }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.stage.sessions(|sessions| sessions.open.remove(&self.number));
    }
}

/// `host` is promoted. A router that is frozen, or has just been, is none that anybody could wait for.
pub fn check_let_go(stage: &Stage, host: usize) {
    let kept = stage.sessions(|sessions| {
        let mut others = sessions.open.values().filter(|(_, server)| *server != host);
        let promised = |router| sessions.registered.get(router) == Some(&true) && stage.executor().is_awake(*router);
        others.find(|(router, _)| promised(router)).map(|(_, server)| *server)
    });
    if let Some(server) = kept {
        let what =
            format!("host {host} is promoted while a router that is registered has a session with host {server}");
        stage.judge(|judge, now| judge.violation(now, what));
    }
}
