//! The egress fence: nothing leaves PostgreSQL's sockets for the network after the lease, whatever is running here.
//!
//! Killing is a race where a whole host was frozen: what thaws first may acknowledge a commit before it is killed. The
//! kernel asks the [`Gate`] about every packet, and there is nothing to win. Unix sockets have no packets and are not
//! held.
//!
//! A gate is one server's: it is made with the cgroup that a postmaster is started in. Once a deadline was met that gate
//! stays shut, and sockets that outlive their server with an answer in them stay mute; the next server has another one.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use rustix::process::Pid;
use tracing::{info, warn};
use trunkline_common::{Clock, Instant, SystemClock};

use super::bpf::Gate;
use super::cgroup::{self, Place};
use super::handle::stable_name;

/// The fence of one server.
#[derive(Debug)]
pub struct Egress {
    place: Result<Place, String>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Of the server that runs or is being started; or why it has none.
    gate: Result<Gate, String>,
    until: Option<Instant>,
}

impl Egress {
    /// The fence of the server in `data_dir`, if it is `wanted` and the system permits it. It is tried out, so that the answer
    /// is known from the start. `until` is the end that an earlier agent has left behind.
    pub fn new(data_dir: &Path, wanted: bool, until: Option<Instant>) -> Self {
        let place = match wanted {
            true => Place::find(&stable_name(data_dir)).map_err(|error| error.to_string()),
            false => Err("switched off by guard.egress".to_owned()),
        };
        let gate = place.as_ref().map_err(Clone::clone);
        let gate = gate.and_then(|place| new_gate(place).map(|(_, gate)| gate).map_err(|error| error.to_string()));
        match &gate {
            Ok(_) => info!("the egress fence is ready"),
            Err(why) => info!("there is no egress fence: {why}"),
        }
        Self { place, state: Mutex::new(State { gate, until }) }
    }

    /// Whether it works for the server that runs, or would for one that is started; else why not.
    pub fn works(&self) -> Result<(), String> {
        self.state.lock().gate.as_ref().map(drop).map_err(Clone::clone)
    }

    /// Whether it has an end.
    pub fn is_armed(&self) -> bool {
        self.state.lock().until.is_some()
    }

    /// Nothing leaves from `until` on.
    pub fn arm(&self, until: Instant) {
        let mut state = self.state.lock();
        state.until = Some(until);
        if let Ok(gate) = &state.gate {
            gate.set(Some(until));
        }
    }

    /// There is nothing to hold back.
    pub fn disarm(&self) {
        let mut state = self.state.lock();
        state.until = None;
        if let Ok(gate) = &state.gate
            && !gate.is_shut(SystemClock.now())
        {
            gate.set(None);
        }
    }

    /// A postmaster is about to be started: the descriptor that it writes `0` to before it becomes one. `None`: it is
    /// started without a fence.
    pub fn prepare(&self) -> Option<OwnedFd> {
        let place = self.place.as_ref().ok()?;
        let made = new_gate(place).and_then(|(dir, gate)| Ok((cgroup::door(&dir)?, gate)));
        let (door, gate) = match made {
            Ok((door, gate)) => (Some(door), Ok(gate)),
            Err(error) => (None, Err(error.to_string())),
        };
        self.replace(gate);
        door
    }

    /// A postmaster was started with what [`Egress::prepare`] gave, or was found running. One that an earlier agent has
    /// started gets a gate of ours in the place of that agent's. One that was started outside can't be held: its sockets
    /// belong to the cgroup that they were made in.
    pub fn adopt(&self, postmaster: Pid, started: bool) {
        let Ok(place) = &self.place else { return };
        match place.of(postmaster) {
            Some(_) if started => {}
            Some(dir) => {
                let until = self.state.lock().until;
                self.replace(Gate::attach(&dir, until).map_err(|error| error.to_string()));
            }
            None => self.replace(Err("PostgreSQL runs outside of a fenced cgroup, until its next start".to_owned())),
        }
    }

    fn replace(&self, gate: Result<Gate, String>) {
        let mut state = self.state.lock();
        match &gate {
            Ok(gate) => gate.set(state.until),
            Err(why) if state.gate.as_ref().err() != Some(why) => warn!("there is no egress fence: {why}"),
            Err(_) => {}
        }
        state.gate = gate;
    }
}

fn new_gate(place: &Place) -> io::Result<(PathBuf, Gate)> {
    let dir = place.create()?;
    let gate = Gate::attach(&dir, None)?;
    Ok((dir, gate))
}
