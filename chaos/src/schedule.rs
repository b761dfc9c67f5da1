//! What goes wrong, when, and for how long: drawn from a seed, or read from a file.
//!
//! A schedule is a sequence of [`Episode`]s. Within one, faults overlap; after the last is healed the cluster has to get
//! whole before the next begins. Faults name roles, not hosts: who leads is found out when the fault is injected, and
//! written to the log.

use std::fmt;

use anyhow::{Context, Result};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

/// How many nodes, etcd members and routers there are.
pub const NODES: usize = 3;
/// etcd members.
pub const ETCDS: usize = 3;
/// Routers.
pub const ROUTERS: usize = 2;

/// Faults that overlap.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Episode {
    /// In the order of their beginning.
    pub faults: Vec<Planned>,
}

/// A fault with its times.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Planned {
    /// When it begins, in milliseconds after the episode began.
    pub at_ms: u64,
    /// How long it lasts, in milliseconds.
    pub for_ms: u64,
    /// What happens.
    pub fault: Fault,
}

/// What goes wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// SIGKILL; what was killed is started again when the fault ends.
    Kill {
        /// On which hosts.
        on: Who,
        /// Which processes.
        part: Part,
    },
    /// SIGSTOP, and SIGCONT at the end.
    Freeze {
        /// On which hosts.
        on: Who,
        /// Which processes.
        part: Part,
    },
    /// No packets from one to the other.
    Cut {
        /// Who sends.
        from: Who,
        /// Who should receive.
        to: Who,
        /// In the other direction, too.
        both: bool,
        /// TCP is answered with a reset; otherwise packets disappear.
        refuse: bool,
    },
    /// The file system has no room left.
    FillDisk {
        /// On which hosts.
        on: Who,
    },
    /// The wall clock jumps, and jumps back at the end.
    Clock {
        /// On which hosts.
        on: Who,
        /// By how much.
        seconds: i64,
    },
    /// An operator asks for a switchover; there is nothing to heal.
    Switchover {
        /// The n-th of those that don't lead; `None`: the cluster chooses.
        to: Option<usize>,
    },
    /// An operator changes a dynamic setting, and changes it back at the end.
    Setting {
        /// Its name.
        key: String,
        /// Its other value.
        value: u64,
        /// What it is otherwise.
        back: u64,
    },
}

/// A host or some hosts, by their role at the time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Who {
    /// The node that took the last acknowledged write.
    Leader,
    /// The n-th of the other nodes, from 0.
    Replica(usize),
    /// All of the other nodes.
    Replicas,
    /// etcd's leader.
    EtcdLeader,
    /// An etcd member, from 0.
    Etcd(usize),
    /// All of them.
    Etcds,
    /// A router, from 0.
    Router(usize),
    /// Both.
    Routers,
    /// Every host.
    Everybody,
}

/// Which processes of a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// All.
    Host,
    /// The one that the supervisor starts, alone: of a node, its agent.
    Main,
    /// The postmaster alone.
    Postmaster,
    /// All of PostgreSQL.
    Postgres,
}

/// Which faults may be drawn.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Allowed {
    /// Jumps of the wall clock: they need libfaketime.
    pub clock: bool,
    /// Synchronous mode on and off again: only where acknowledged writes may be lost anyway.
    pub synchronous_mode: bool,
    /// A node that is frozen as a whole: without the egress fence nobody promises that nothing leaves it in the moment
    /// of its thaw.
    pub frozen_nodes: bool,
}

/// An endless schedule from a seed.
#[derive(Debug)]
pub struct Draw {
    rng: StdRng,
    allowed: Allowed,
}

impl Draw {
    /// The schedule of this seed; another `allowed` makes another schedule of it.
    pub fn new(seed: u64, allowed: Allowed) -> Self {
        Self { rng: StdRng::seed_from_u64(seed), allowed }
    }

    fn fault(&mut self) -> (Fault, u64) {
        let fault = match self.rng.random_range(0..100) {
            0..30 => self.kill(),
            30..50 => self.freeze(),
            50..75 => self.cut(),
            75..82 => Fault::FillDisk { on: self.host() },
            82..87 if self.allowed.clock => {
                Fault::Clock { on: self.node(), seconds: *pick(&mut self.rng, &[-3600, -30, -2, 2, 30, 3600]) }
            }
            82..93 => Fault::Switchover { to: *pick(&mut self.rng, &[None, Some(0), Some(1)]) },
            _ => self.setting(),
        };
        // Nothing to heal: the agent looks after its PostgreSQL.
        let instant =
            matches!(fault, Fault::Switchover { .. } | Fault::Kill { part: Part::Postmaster | Part::Postgres, .. });
        if instant {
            return (fault, 0);
        }
        // A host does not boot in no time.
        if matches!(fault, Fault::Kill { part: Part::Host, .. }) {
            return (fault, self.rng.random_range(1000..12_000));
        }
        // Short ones at least as often as long ones: much goes wrong only just before or after a lease ends.
        // Few last longer than it takes to call a postmaster hung.
        let for_ms = match self.rng.random_range(0..10) {
            0..3 => self.rng.random_range(50..1500),
            3..9 => self.rng.random_range(1500..12_000),
            _ => self.rng.random_range(12_000..30_000),
        };
        (fault, for_ms)
    }

    fn kill(&mut self) -> Fault {
        match self.rng.random_range(0..10) {
            0..2 => Fault::Kill { on: self.node(), part: Part::Postmaster },
            2..4 => Fault::Kill { on: self.node(), part: Part::Postgres },
            4..6 => Fault::Kill { on: self.node(), part: Part::Main },
            6..8 => Fault::Kill { on: self.node(), part: Part::Host },
            _ => Fault::Kill { on: self.infrastructure(), part: Part::Host },
        }
    }

    fn freeze(&mut self) -> Fault {
        match self.rng.random_range(0..10) {
            0..2 => Fault::Freeze { on: self.node(), part: Part::Postmaster },
            2..4 => Fault::Freeze { on: self.node(), part: Part::Postgres },
            4..6 => Fault::Freeze { on: self.node(), part: Part::Main },
            6..8 if self.allowed.frozen_nodes => Fault::Freeze { on: self.node(), part: Part::Host },
            _ => Fault::Freeze { on: self.infrastructure(), part: Part::Host },
        }
    }

    fn cut(&mut self) -> Fault {
        let from = match self.rng.random_bool(0.5) {
            true => Who::Leader,
            false => self.host(),
        };
        let to = match self.rng.random_range(0..10) {
            0..3 => Who::Etcds,
            3 => Who::Everybody,
            4 => Who::Replicas,
            5 => Who::Routers,
            _ => self.host(),
        };
        // A host is not cut from itself.
        let to = if to == from { Who::Everybody } else { to };
        Fault::Cut { from, to, both: self.rng.random_bool(0.5), refuse: self.rng.random_bool(0.3) }
    }

    fn setting(&mut self) -> Fault {
        let setting = |key: &str, value, back| Fault::Setting { key: key.to_owned(), value, back };
        match self.rng.random_range(0..4) {
            0 => setting("loop_wait", 2, 1),
            1 => setting("maximum_lag_on_failover", 4096, 1_048_576),
            2 => setting("failsafe_mode", 1, 0),
            _ if self.allowed.synchronous_mode => setting("synchronous_mode", 1, 0),
            _ => setting("ttl", 8, 5),
        }
    }

    fn node(&mut self) -> Who {
        *pick(&mut self.rng, &[Who::Leader, Who::Leader, Who::Leader, Who::Replica(0), Who::Replica(1), Who::Replicas])
    }

    fn infrastructure(&mut self) -> Who {
        let some =
            [Who::EtcdLeader, Who::EtcdLeader, Who::Etcd(0), Who::Etcd(1), Who::Etcds, Who::Router(0), Who::Router(1)];
        *pick(&mut self.rng, &some)
    }

    fn host(&mut self) -> Who {
        match self.rng.random_bool(0.5) {
            true => self.node(),
            false => self.infrastructure(),
        }
    }
}

impl Iterator for Draw {
    type Item = Episode;

    fn next(&mut self) -> Option<Episode> {
        let count = *pick(&mut self.rng, &[1, 1, 1, 2, 2, 3]);
        let mut at_ms = 0;
        let mut faults = Vec::new();
        for _ in 0..count {
            let (fault, for_ms) = self.fault();
            faults.push(Planned { at_ms, for_ms, fault });
            at_ms += self.rng.random_range(0..4000);
        }
        Some(Episode { faults })
    }
}

fn pick<'a, T>(rng: &mut StdRng, from: &'a [T]) -> &'a T {
    from.choose(rng).expect("a list that is not empty")
}

/// Reads a schedule: one episode a line, as JSON. Empty lines and lines that begin with `#` are skipped.
///
/// # Errors
/// A line is no episode; the message has its number.
pub fn parse(text: &str) -> Result<Vec<Episode>> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty() && !line.starts_with('#'));
    let episode = |(number, line): (usize, &str)| {
        serde_json::from_str(line).with_context(|| format!("line {} of the schedule", number + 1))
    };
    lines.map(episode).collect()
}

/// One line of a schedule file.
pub fn line(episode: &Episode) -> String {
    serde_json::to_string(episode).unwrap_or_default()
}

impl fmt::Display for Episode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, planned) in self.faults.iter().enumerate() {
            let between = if i == 0 { "" } else { "; " };
            write!(f, "{between}{planned}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Planned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = |ms: u64| ms as f64 / 1000.0;
        if self.at_ms > 0 {
            write!(f, "+{:.1}s ", seconds(self.at_ms))?;
        }
        write!(f, "{}", self.fault)?;
        if self.for_ms > 0 {
            write!(f, " {:.1}s", seconds(self.for_ms))?;
        }
        Ok(())
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kill { on, part } => write!(f, "kill {}", Of(*on, *part)),
            Self::Freeze { on, part } => write!(f, "freeze {}", Of(*on, *part)),
            Self::Cut { from, to, both, refuse } => {
                let arrow = if *both { "↔" } else { "→" };
                let how = if *refuse { "refused" } else { "dropped" };
                write!(f, "cut {from}{arrow}{to} {how}")
            }
            Self::FillDisk { on } => write!(f, "disk of {on} full"),
            Self::Clock { on, seconds } => write!(f, "clock of {on} {seconds:+}s"),
            Self::Switchover { to: None } => write!(f, "switchover"),
            Self::Switchover { to: Some(to) } => write!(f, "switchover to {}", Who::Replica(*to)),
            Self::Setting { key, value, .. } => write!(f, "{key}={value}"),
        }
    }
}

struct Of(Who, Part);

impl fmt::Display for Of {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(who, part) = self;
        match part {
            Part::Host => write!(f, "{who}"),
            Part::Main => write!(f, "agent of {who}"),
            Part::Postmaster => write!(f, "postmaster of {who}"),
            Part::Postgres => write!(f, "PostgreSQL of {who}"),
        }
    }
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Leader => write!(f, "leader"),
            Self::Replica(i) => write!(f, "replica{}", i + 1),
            Self::Replicas => write!(f, "replicas"),
            Self::EtcdLeader => write!(f, "etcd-leader"),
            Self::Etcd(i) => write!(f, "etcd{}", i + 1),
            Self::Etcds => write!(f, "etcd"),
            Self::Router(i) => write!(f, "router{}", i + 1),
            Self::Routers => write!(f, "routers"),
            Self::Everybody => write!(f, "everybody"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Allowed = Allowed { clock: true, synchronous_mode: true, frozen_nodes: true };

    #[test]
    fn one_seed_is_one_schedule_and_survives_its_file() {
        let episodes: Vec<Episode> = Draw::new(7, ALL).take(200).collect();
        assert_eq!(episodes, Draw::new(7, ALL).take(200).collect::<Vec<_>>());
        assert_ne!(episodes, Draw::new(8, ALL).take(200).collect::<Vec<_>>());

        let file: String = episodes.iter().map(|episode| format!("{}\n", line(episode))).collect();
        assert_eq!(parse(&format!("# seed 7\n\n{file}")).unwrap(), episodes);
        assert!(parse("{}").unwrap_err().to_string().contains("line 1"));
    }

    #[test]
    fn kept_schedules_can_be_read() {
        let kept = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/schedules")).unwrap();
        for file in kept.map(|entry| entry.unwrap().path()) {
            assert!(!parse(&std::fs::read_to_string(&file).unwrap()).unwrap().is_empty(), "{}", file.display());
        }
    }

    #[test]
    fn every_fault_ends_and_every_kind_is_drawn() {
        let planned: Vec<Planned> = Draw::new(1, ALL).take(500).flat_map(|episode| episode.faults).collect();
        assert!(planned.iter().all(|planned| planned.for_ms <= 30_000 && planned.at_ms <= 8_000));
        for kind in
            ["kill agent", "kill leader", "freeze leader", "cut", "disk", "clock", "switchover to", "synchronous_mode"]
        {
            assert!(planned.iter().any(|planned| planned.fault.to_string().starts_with(kind)), "{kind}");
        }
    }

    #[test]
    fn what_is_not_allowed_is_not_drawn() {
        for planned in Draw::new(1, Allowed::default()).take(2000).flat_map(|episode| episode.faults) {
            let text = planned.to_string();
            assert!(!text.contains("clock") && !text.contains("synchronous"), "{text}");
            assert!(!text.starts_with("freeze leader") && !text.starts_with("freeze replica"), "{text}");
        }
    }

    #[test]
    fn reads_like_a_sentence() {
        let fault = Fault::Cut { from: Who::Leader, to: Who::Etcds, both: false, refuse: true };
        let first = Planned { at_ms: 0, for_ms: 5200, fault };
        let second =
            Planned { at_ms: 1300, for_ms: 900, fault: Fault::Kill { on: Who::Replica(0), part: Part::Postmaster } };
        let episode = Episode { faults: vec![first, second] };
        assert_eq!(episode.to_string(), "cut leader→etcd refused 5.2s; +1.3s kill postmaster of replica1 0.9s");
    }
}
