//! How long writes will be out: from the settings, and from what has been measured. Pure.
//!
//! Each figure is the sum of the steps that are on the way (docs/benchmarks.md measures the same from outside). Where nothing
//! has been measured yet, what a small machine needs stands in for it, and is named.

use std::fmt;
use std::time::Duration;

use trunkline_common::dcs::latency::{Latency, Times};
use trunkline_config::Settings;

use crate::postgres::Took;

/// What a promotion and a stop in order take on an idle server with two cores and a local disk.
const PROMOTION: Duration = Duration::from_millis(20);
const STOP: Duration = Duration::from_millis(30);

/// The same of a write to etcd, and of a renewal.
const WRITE: Duration = Duration::from_millis(5);
const RENEWAL: Duration = Duration::from_millis(2);

/// From the end of a postmaster until its agent acts.
const NOTICE: Duration = Duration::from_millis(10);

/// etcd looks for leases that are over twice a second.
const EXPIRY: Duration = Duration::from_millis(500);

/// For so long nobody can renew while etcd elects a leader of its own.
const ELECTION: Duration = Duration::from_secs(3);

/// A write that takes longer points to a slow disk or network of etcd.
const SLOW_WRITE: Duration = Duration::from_millis(50);

/// How long writes are out, and what speaks against believing it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Estimate {
    /// The primary's host dies: at most this.
    pub host_death: Duration,
    /// PostgreSQL dies and its agent lives: about this; `None`: it is started again in place, which takes as long as its
    /// recovery.
    pub postmaster_death: Option<Duration>,
    /// A planned switchover: about this.
    pub switchover: Duration,
    /// What stands in for a measurement.
    pub assumed: Vec<&'static str>,
    /// What an operator should do something about.
    pub warnings: Vec<String>,
}

/// Estimates.
pub fn estimate(settings: &Settings, latency: &Latency, took: Took) -> Estimate {
    let mut assumed = Vec::new();
    let mut or = |measured: Option<Duration>, otherwise: Duration, what: &'static str| {
        measured.unwrap_or_else(|| {
            assumed.push(what);
            otherwise
        })
    };
    let renewal = or(latency.renewals.median(), RENEWAL, "renewal");
    let write = or(latency.writes.median(), WRITE, "write");
    let stop = or(took.stop, STOP, "stop");
    let promotion = or(took.promotion, PROMOTION, "promotion");
    // Ask the others, take the key, promote, tell the routers.
    let takeover = renewal + write + promotion + write;
    Estimate {
        host_death: settings.ttl + EXPIRY + takeover,
        postmaster_death: settings.primary_start_timeout.is_zero().then_some(NOTICE + write + takeover),
        switchover: stop + write + takeover,
        assumed,
        warnings: warnings(settings, latency),
    }
}

fn warnings(settings: &Settings, latency: &Latency) -> Vec<String> {
    let mut warnings = Vec::new();
    let ttl = settings.ttl;
    let worst = latency.renewals.worst().unwrap_or_default();
    if worst > ttl / 10 {
        warnings.push(format!(
            "the DCS is too slow for ttl {ttl:?}: a renewal took {worst:.0?}, more than a tenth of it; make ttl longer than {:?}, \
             or the DCS faster",
            worst * 10
        ));
    }
    if worst * 2 > settings.retry_timeout {
        warnings.push(format!(
            "a renewal took {worst:.0?}: retry_timeout {:?} leaves no second try",
            settings.retry_timeout
        ));
    }
    if let Some(write) = latency.writes.median().filter(|write| *write > SLOW_WRITE) {
        warnings.push(format!("writes to the DCS take {write:.0?}: its disks (fsync) or its network are slow"));
    }
    if ttl < ELECTION + Duration::from_secs(2) {
        warnings.push(format!(
            "ttl {ttl:?} does not outlive an election of etcd's own leader, which may take {ELECTION:?}"
        ));
    }
    warnings
}

/// The line of the log and of `trunklinectl rto`.
impl fmt::Display for Estimate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "host death ≤ {}, postmaster death ", Up(self.host_death))?;
        match self.postmaster_death {
            Some(time) => write!(f, "about {}", Up(time))?,
            None => f.write_str("as long as its restart (primary_start_timeout is not 0)")?,
        }
        write!(f, ", switchover about {}", Up(self.switchover))?;
        match self.assumed.is_empty() {
            true => Ok(()),
            false => write!(f, " (not measured yet: {})", self.assumed.join(", ")),
        }
    }
}

/// Rounded up: to tenths of a second, below one to tens of milliseconds.
struct Up(Duration);

impl fmt::Display for Up {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = self.0.as_micros().div_ceil(1000);
        match ms {
            0..1000 => write!(f, "{} ms", ms.div_ceil(10) * 10),
            _ => write!(f, "{:.1} s", ms.div_ceil(100) as f64 / 10.0),
        }
    }
}

/// Median and worst in words: `2 ms (worst 9 ms of 120)`.
pub fn words(times: &Times) -> String {
    match (times.median(), times.worst()) {
        (Some(median), Some(worst)) => {
            format!("{} (worst {} of {})", millis(median), millis(worst), times.count())
        }
        _ => "not measured yet".to_owned(),
    }
}

/// `2.3 ms`.
pub fn millis(time: Duration) -> String {
    let ms = time.as_secs_f64() * 1e3;
    if ms < 10.0 { format!("{ms:.1} ms") } else { format!("{ms:.0} ms") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn settings(ttl: u64, start: u64) -> Settings {
        Settings {
            ttl: Duration::from_secs(ttl),
            retry_timeout: Duration::from_secs(1),
            primary_start_timeout: Duration::from_secs(start),
            ..Settings::default()
        }
    }

    fn latency(renewal: u64, write: u64) -> Latency {
        let mut latency = Latency::default();
        latency.renewals.add(ms(renewal));
        latency.writes.add(ms(write));
        latency
    }

    const TOOK: Took =
        Took { start: None, stop: Some(Duration::from_millis(28)), promotion: Some(Duration::from_millis(18)) };

    #[test]
    fn figures_are_sums_of_what_was_measured() {
        let told = estimate(&settings(5, 0), &latency(2, 7), TOOK);
        assert_eq!(told.to_string(), "host death ≤ 5.6 s, postmaster death about 60 ms, switchover about 70 ms");
        assert_eq!(told.warnings, Vec::<String>::new());
        let told = estimate(&settings(30, 300), &Latency::default(), Took::default());
        assert_eq!(
            told.to_string(),
            "host death ≤ 30.6 s, postmaster death as long as its restart (primary_start_timeout is not 0), switchover about 70 ms \
             (not measured yet: renewal, write, stop, promotion)"
        );
    }

    #[test]
    fn a_slow_store_is_told() {
        let warned =
            |ttl, renewal, write| estimate(&settings(ttl, 0), &latency(renewal, write), TOOK).warnings.join("\n");
        assert!(warned(5, 600, 7).contains("too slow for ttl 5s: a renewal took 600ms"));
        assert!(warned(30, 600, 7).starts_with("a renewal took 600ms: retry_timeout 1s leaves no second try"));
        assert!(warned(5, 2, 80).contains("writes to the DCS take 80ms"));
        assert!(warned(2, 2, 2).contains("does not outlive an election"));
        assert_eq!(warned(5, 499, 49), "");
    }

    #[test]
    fn times_in_words() {
        for (time, text) in [(ms(1), "10 ms"), (ms(61), "70 ms"), (ms(5501), "5.6 s"), (ms(999), "1000 ms")] {
            assert_eq!(Up(time).to_string(), text);
        }
        assert_eq!(words(&latency(2, 700).writes), "700 ms (worst 700 ms of 1)");
        assert_eq!(words(&Times::default()), "not measured yet");
        assert_eq!(millis(Duration::from_micros(2340)), "2.3 ms");
    }
}
