//! Medians and ratios.

use std::collections::BTreeMap;

use comfy_table::Table;
use serde::Serialize;

use super::site::Way;
use crate::table::{markdown, median, numbers};

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[allow(missing_docs)]
pub enum Figure {
    Tps8,
    Tps1,
    Cpu8,
    Cpu1,
    Connects,
    CpuConnect,
    CopyRate,
    CopyCpu,
    Beside,
    Idle,
    Stalled,
    LostEnds,
    HalfCloses,
}

impl Figure {
    fn name(self) -> &'static str {
        match self {
            Self::Tps8 => "pgbench -S prepared, 8 clients, pinned: transactions/s",
            Self::Tps1 => "the same, 1 client",
            Self::Cpu8 => "proxy CPU per transaction, 8 clients, pinned: µs",
            Self::Cpu1 => "the same, 1 client",
            Self::Connects => "connect, select, close, 4 clients, pinned: per second",
            Self::CpuConnect => "proxy CPU per connect: µs",
            Self::CopyRate => "COPY TO: MB/s",
            Self::CopyCpu => "COPY TO: proxy CPU per GB: ms",
            Self::Beside => "selects beside a COPY: p99 µs",
            Self::Idle => "resident memory per idle session: KiB",
            Self::Stalled => "stalled reader: MB taken from the sender",
            Self::LostEnds => "last bytes lost, sessions",
            Self::HalfCloses => "half-closes failed, sessions",
        }
    }
}

/// Samples by figure and way.
#[derive(Debug, Default, Serialize)]
pub struct Figures(BTreeMap<Figure, BTreeMap<Way, Vec<f64>>>);

impl Figures {
    /// One more sample.
    pub fn note(&mut self, figure: Figure, way: Way, value: f64) {
        self.0.entry(figure).or_default().entry(way).or_default().push(value);
    }

    fn median(&self, figure: Figure, way: Way) -> Option<f64> {
        let mut samples = self.0.get(&figure)?.get(&way)?.clone();
        samples.sort_by(f64::total_cmp);
        median(&samples)
    }

    /// Medians of every way, and ours against a direct connection and against HAProxy.
    pub fn table(&self) -> Table {
        let mut header = vec!["medians"];
        header.extend(Way::ALL.map(Way::name));
        header.extend(["ours ÷ direct", "ours ÷ HAProxy"]);
        let mut table = markdown(&header);
        for figure in self.0.keys() {
            let value = |way| self.median(*figure, way);
            let shown = |value: Option<f64>| value.map_or(String::new(), rounded);
            let ratio = |other| match (value(Way::Trunkline), value(other)) {
                (Some(ours), Some(other)) if other > 0.0 => format!("{:.2}", ours / other),
                _ => String::new(),
            };
            let mut row = vec![figure.name().to_owned()];
            row.extend(Way::ALL.map(|way| shown(value(way))));
            row.extend([ratio(Way::Direct), ratio(Way::HAProxy)]);
            table.add_row(row);
        }
        numbers(&mut table, 1..Way::ALL.len() + 3);
        table
    }
}

/// Three digits that say something.
fn rounded(value: f64) -> String {
    match value.abs() {
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_medians_and_ratios() {
        let mut figures = Figures::default();
        for (way, samples) in [(Way::Direct, [90.0, 110.0, 100.0]), (Way::Trunkline, [80.0, 10.0, 75.0])] {
            samples.iter().for_each(|sample| figures.note(Figure::Tps8, way, *sample));
        }
        figures.note(Figure::Tps8, Way::HAProxy, 50.0);
        let text = figures.table().to_string();
        let row: Vec<&str> = text.lines().last().unwrap().split('|').map(str::trim).collect();
        assert_eq!(row[2..7], ["100", "75.0", "50.0", "", ""]);
        assert_eq!(row[7..9], ["0.75", "1.50"]);
    }
}
