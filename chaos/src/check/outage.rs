//! How long nobody could write.

use crate::history::{Call, Micros, Port};

/// A time without an acknowledged write.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Gap {
    /// The last acknowledgement before it.
    pub from: Micros,
    /// The first after it.
    pub to: Micros,
}

impl Gap {
    /// How long it was.
    pub fn length(self) -> Micros {
        self.to.saturating_sub(self.from)
    }
}

/// When writes were acknowledged on any read-write port, in order.
pub fn acknowledgements(calls: &[Call]) -> Vec<Micros> {
    let through = calls.iter().filter(|call| matches!(call.port, Port::ReadWrite(_)) && call.taken_by().is_some());
    let mut ends: Vec<Micros> = through.map(|call| call.end).collect();
    ends.sort_unstable();
    ends
}

/// The longest gap between two [`acknowledgements`] that reaches into `from..=to`.
pub fn longest_gap(acknowledgements: &[Micros], from: Micros, to: Micros) -> Gap {
    let first = acknowledgements.partition_point(|end| *end < from).saturating_sub(1);
    let gaps = acknowledgements[first..].windows(2).map(|pair| Gap { from: pair[0], to: pair[1] });
    gaps.take_while(|gap| gap.from <= to).max_by_key(|gap| gap.length()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::super::sample::call;
    use super::*;
    use crate::history::Op;

    #[test]
    fn the_longest_gap_that_touches_the_time_asked_for() {
        let at = |end, port| call(1, port, Op::Insert(end), end, end, (0, 1));
        let mut calls: Vec<Call> = [1, 10, 11, 14, 20].map(|end| at(end, Port::ReadWrite(0))).to_vec();
        calls.push(at(17, Port::Direct(0)));
        let acknowledged = acknowledgements(&calls);
        assert_eq!(longest_gap(&acknowledged, 0, 100), Gap { from: 1, to: 10 });
        assert_eq!(longest_gap(&acknowledged, 12, 100), Gap { from: 14, to: 20 });
        assert_eq!(longest_gap(&acknowledged, 10, 11), Gap { from: 1, to: 10 }, "it ended just then");
        assert_eq!(longest_gap(&acknowledged, 30, 40), Gap::default());
        assert_eq!(longest_gap(&[], 0, 40), Gap::default());
    }
}
