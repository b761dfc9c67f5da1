//! The end of a run: one summary, and the files of one that failed.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::Path;

use anyhow::{Context, Result};

use crate::check::{Findings, Gap};
use crate::history::{Call, Finals, Micros, Outcome, Port};
use crate::schedule::{self, Episode};

/// An episode and what came of it.
#[derive(Debug)]
pub struct Played {
    /// The faults.
    pub episode: Episode,
    /// When the first began.
    pub began: Micros,
    /// When the last was healed.
    pub healed: Micros,
    /// When the cluster was whole again, if it was.
    pub whole: Option<Micros>,
    /// The longest time without an acknowledged write on any read-write port.
    pub outage: Gap,
    /// Why the cluster did not get whole.
    pub stuck: Option<String>,
}

/// Everything about a run.
#[derive(Debug)]
pub struct Report {
    /// What the schedule was drawn from.
    pub seed: u64,
    /// All episodes.
    pub played: Vec<Played>,
    /// All calls.
    pub calls: Vec<Call>,
    /// What the database held in the end.
    pub finals: Finals,
    /// What the checkers said.
    pub findings: Findings,
    /// How long it took.
    pub elapsed: Micros,
}

impl Report {
    /// The summary, for people.
    pub fn summary(&self) -> String {
        let mut text = String::new();
        let _ = self.write_summary(&mut text);
        text
    }

    fn write_summary(&self, text: &mut String) -> std::fmt::Result {
        let faults: usize = self.played.iter().map(|one| one.episode.faults.len()).sum();
        writeln!(text, "\nchaos: {faults} faults in {} episodes, {:.0} s", self.played.len(), seconds(self.elapsed))?;
        for (name, is) in [
            ("read-write ports", (|port| matches!(port, Port::ReadWrite(_))) as fn(Port) -> bool),
            ("read-only ports", |port| matches!(port, Port::ReadOnly(_))),
            ("past the routers", |port| matches!(port, Port::Direct(_))),
        ] {
            let calls: Vec<&Call> = self.calls.iter().filter(|call| is(call.port)).collect();
            let count = |outcome| calls.iter().filter(|call| call.outcome == outcome).count();
            let longest = calls.iter().map(|call| call.end - call.start).max().unwrap_or(0);
            writeln!(
                text,
                "  {name:17} {:7} acknowledged, {:6} failed, {:4} unknown; longest call {:.1} s",
                count(Outcome::Ok),
                count(Outcome::Failed),
                count(Outcome::Unknown),
                seconds(longest)
            )?;
        }
        self.write_outages(text)?;
        for note in &self.findings.notes {
            writeln!(text, "  note: {note}")?;
        }
        for violation in &self.findings.violations {
            let episode = violation.at.and_then(|at| self.played.iter().rposition(|one| one.began <= at));
            let episode = episode.map_or(String::new(), |i| format!(" in #{} ({})", i + 1, self.played[i].episode));
            writeln!(text, "  VIOLATION {:?}{episode}: {}", violation.kind, violation.text)?;
        }
        match self.findings.violations.len() {
            0 => writeln!(text, "chaos: no violation"),
            count => writeln!(text, "chaos: {count} VIOLATIONS"),
        }
    }

    fn write_outages(&self, text: &mut String) -> std::fmt::Result {
        let heal = |one: &Played| one.whole.map(|whole| whole - one.healed);
        if let Some(worst) = self.played.iter().max_by_key(|one| one.outage.length()) {
            writeln!(text, "  longest outage of writes {:.1} s: {}", seconds(worst.outage.length()), worst.episode)?;
        }
        if let Some(worst) = self.played.iter().max_by_key(|one| heal(one)) {
            let took = heal(worst).map_or("never".to_owned(), |took| format!("{:.1} s", seconds(took)));
            writeln!(text, "  longest time until whole {took}: {}", worst.episode)?;
        }
        // Only episodes of a single fault tell what that fault costs.
        let mut kinds: BTreeMap<String, Vec<(Micros, Micros)>> = BTreeMap::new();
        for one in self.played.iter().filter(|one| one.episode.faults.len() == 1) {
            let times = (one.outage.length(), heal(one).unwrap_or(0));
            kinds.entry(one.episode.faults[0].fault.to_string()).or_default().push(times);
        }
        for (kind, times) in kinds {
            let worst = |of: fn(&(Micros, Micros)) -> Micros| seconds(times.iter().map(of).max().unwrap_or(0));
            let (outage, heal, count) = (worst(|time| time.0), worst(|time| time.1), times.len());
            writeln!(text, "    {kind:45} {count:3}×  outage ≤ {outage:5.1} s, whole after ≤ {heal:5.1} s")?;
        }
        Ok(())
    }

    /// Writes schedule, history, final state, findings and summary below `dir`.
    ///
    /// # Errors
    /// A file can't be written.
    pub fn save(&self, dir: &Path) -> Result<()> {
        let create = |name: &str| {
            let path = dir.join(name);
            File::create(&path).map(BufWriter::new).with_context(|| format!("{}", path.display()))
        };
        let mut file = create("schedule.jsonl")?;
        writeln!(file, "# seed {}; replay: chaos --schedule FILE", self.seed)?;
        for one in &self.played {
            writeln!(file, "{}", schedule::line(&one.episode))?;
        }
        let mut file = create("history.jsonl")?;
        for call in &self.calls {
            serde_json::to_writer(&mut file, call)?;
            writeln!(file)?;
        }
        serde_json::to_writer(create("finals.json")?, &self.finals)?;
        serde_json::to_writer_pretty(create("findings.json")?, &self.findings)?;
        create("summary.txt")?.write_all(self.summary().as_bytes())?;
        Ok(())
    }
}

fn seconds(micros: Micros) -> f64 {
    micros as f64 / 1e6
}
