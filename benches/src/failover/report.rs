//! Tables for people, JSON for machines.

use comfy_table::Table;
use serde_json::{Value, json};

use super::arrangement::Arrangement;
use super::rounds::{Fault, Measured};
use super::stages::Stages;
use crate::table::{markdown, median, numbers};

/// The outages of every arrangement and how they compare with the first one, as Markdown.
pub fn outages(all: &[Measured]) -> Table {
    let mut table = markdown(&[
        "fault",
        "arrangement",
        "rounds",
        "min ms",
        "median ms",
        "max ms",
        "ratio of medians",
        "rto had said",
    ]);
    for fault in Fault::ALL {
        let first = all.first().and_then(|first| median(&first.outages(fault)));
        for measured in all {
            let outages = measured.outages(fault);
            let (Some(min), Some(middle), Some(max)) = (outages.first(), median(&outages), outages.last()) else {
                continue;
            };
            let ratio =
                first.filter(|first| *first > 0.0).map_or(String::new(), |first| format!("{:.1}", middle / first));
            table.add_row([
                fault.name().to_owned(),
                measured.arrangement.name().to_owned(),
                outages.len().to_string(),
                format!("{min:.0}"),
                format!("{middle:.0}"),
                format!("{max:.0}"),
                ratio,
                told(measured, fault).map_or(String::new(), |told| format!("{told:.0}")),
            ]);
        }
    }
    numbers(&mut table, 2..8);
    table
}

/// The median of what `trunklinectl rto` would have said before each fault, in milliseconds.
fn told(measured: &Measured, fault: Fault) -> Option<f64> {
    let mut told: Vec<f64> =
        measured.rounds.iter().filter(|round| round.fault == fault).filter_map(|round| round.told_ms).collect();
    told.sort_by(f64::total_cmp);
    median(&told)
}

/// Medians of the moments of each stage, in milliseconds after the fault, as Markdown.
pub fn stages(measured: &Measured) -> Table {
    let mut header = vec!["ms after the fault (medians)"];
    header.extend(Stages::NAMES);
    let mut table = markdown(&header);
    for fault in Fault::ALL {
        let moments: Vec<[Option<f64>; 6]> = measured
            .rounds
            .iter()
            .filter(|round| round.fault == fault)
            .filter_map(|round| round.stages.map(|stages| stages.moments()))
            .collect();
        let middle = |stage: usize| {
            let mut of_stage: Vec<f64> = moments.iter().filter_map(|moments| moments[stage]).collect();
            of_stage.sort_by(f64::total_cmp);
            median(&of_stage).map_or(String::new(), |middle| format!("{middle:.0}"))
        };
        let mut row = vec![fault.name().to_owned()];
        row.extend((0..Stages::NAMES.len()).map(middle));
        table.add_row(row);
    }
    numbers(&mut table, 1..Stages::NAMES.len() + 1);
    table
}

/// Rows lost and two primaries, one sentence each.
pub fn verdicts(all: &[Measured]) -> Vec<String> {
    let verdict = |measured: &Measured| {
        let name = measured.arrangement.name();
        let two = measured.two_primaries.as_deref().unwrap_or("never two primaries at the same time");
        format!("{name}: {} of {} acknowledged rows lost; {two}", measured.lost, measured.acknowledged)
    };
    all.iter().map(verdict).collect()
}

/// Whether ours kept its promises: nothing lost where commits waited for a standby, one primary.
pub fn is_right(all: &[Measured]) -> bool {
    let ours = all.iter().filter(|measured| measured.arrangement == Arrangement::Trunkline);
    ours.into_iter().all(|measured| (measured.lost == 0 || !measured.synchronous) && measured.two_primaries.is_none())
}

/// Everything, for a file.
pub fn json(all: &[Measured], environment: &Value) -> Value {
    json!({ "environment": environment, "arrangements": all })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failover::Round;

    fn measured(arrangement: Arrangement, outages: &[f64]) -> Measured {
        let round =
            |outage_ms: &f64| Round { fault: Fault::Switchover, outage_ms: *outage_ms, stages: None, told_ms: None };
        Measured {
            arrangement,
            synchronous: true,
            settings: String::new(),
            rounds: outages.iter().map(round).collect(),
            acknowledged: 10,
            lost: 0,
            two_primaries: None,
        }
    }

    #[test]
    fn the_table_has_extremes_medians_and_ratios() {
        let all = [measured(Arrangement::Trunkline, &[80.0, 100.0, 90.0]), measured(Arrangement::Tuned, &[2700.0])];
        let text = outages(&all).to_string();
        let cells = |line: &str| -> Vec<String> {
            line.split('|').map(str::trim).filter(|cell| !cell.is_empty()).map(str::to_owned).collect()
        };
        let rows: Vec<Vec<String>> = text.lines().skip(2).map(cells).collect();
        assert_eq!(rows[0], ["planned switchover", "Trunkline", "3", "80", "90", "100", "1.0"]);
        assert_eq!(rows[1][2..], ["1", "2700", "2700", "2700", "30.0"]);
        assert_eq!(rows.len(), 2, "faults without rounds have no row: {text}");
    }

    #[test]
    fn a_lost_row_of_ours_is_wrong_and_one_of_theirs_is_not_our_failure() {
        let mut all = [measured(Arrangement::Trunkline, &[1.0]), measured(Arrangement::Stock, &[1.0])];
        all[1].lost = 1;
        assert!(is_right(&all));
        all[0].lost = 1;
        assert!(!is_right(&all));
    }
}
