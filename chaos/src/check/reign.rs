//! Two nodes that took writes at the same time.
//!
//! A reign is a node on a timeline. A promotion makes a new timeline, so a later reign has a higher one; two nodes on one
//! timeline are never both right.

use std::collections::BTreeMap;

use super::{Findings, Kind, seconds};
use crate::history::{Call, Micros, Port, Served};

/// Two acknowledgements that lie in two sockets of this program at the same time are read in any order, and a busy
/// machine takes a while to get there.
const READING_ORDER: Micros = 20_000;

pub(super) fn check(calls: &[Call], findings: &mut Findings) {
    let writes: Vec<Write<'_>> = calls.iter().filter_map(|call| Some(Write { call, by: call.taken_by()? })).collect();
    let through = |call: &Call| matches!(call.port, Port::ReadWrite(_));

    let second = contradictions(&writes, |write| write.call.start);
    report(Kind::TwoPrimaries, second, findings);

    // What was sent to a deposed node is told above already.
    let late = contradictions(&writes, |write| write.call.end.saturating_sub(READING_ORDER));
    let late = late.into_iter().filter(|case| case.older.call.start <= case.newer.call.end);
    let (routed, direct) = late.partition(|case| through(case.older.call));
    report(Kind::LateAcknowledgement, routed, findings);
    report(Kind::LateDirectAcknowledgement, direct, findings);
}

/// One violation for each reign that was over.
fn report(kind: Kind, cases: Vec<Contradiction<'_>>, findings: &mut Findings) {
    let mut reigns: BTreeMap<(u32, usize), Vec<Contradiction<'_>>> = BTreeMap::new();
    for case in cases {
        reigns.entry((case.older.by.timeline, case.older.by.node)).or_default().push(case);
    }
    for ((timeline, node), cases) in reigns {
        let Some(first) = cases.iter().min_by_key(|case| case.older.call.end) else { continue };
        let (newer, older) = (first.newer, first.older);
        let last = cases.iter().map(|case| case.older.call.end).max().unwrap_or_default();
        let text = format!(
            "{} writes of node {} on timeline {timeline}, acknowledged from {} to {}, though node {} on timeline {} had \
             acknowledged one at {}; the first was sent at {} by client {} on {:?}",
            cases.len(),
            node + 1,
            seconds(older.call.end),
            seconds(last),
            newer.by.node + 1,
            newer.by.timeline,
            seconds(newer.call.end),
            seconds(older.call.start),
            older.call.client,
            older.call.port,
        );
        findings.violation(kind, Some(older.call.end), text);
    }
}

#[derive(Clone, Copy)]
struct Write<'a> {
    call: &'a Call,
    by: Served,
}

/// An older reign's write that came after a newer reign's was acknowledged.
struct Contradiction<'a> {
    newer: Write<'a>,
    older: Write<'a>,
}

/// Writes of an older reign whose `moment` is later than the acknowledgement of a newer reign's.
fn contradictions<'a>(writes: &[Write<'a>], moment: impl Fn(&Write<'a>) -> Micros) -> Vec<Contradiction<'a>> {
    let mut by_end = writes.to_vec();
    by_end.sort_by_key(|write| write.call.end);
    let mut by_moment = writes.to_vec();
    by_moment.sort_by_key(&moment);

    let mut acknowledged = by_end.into_iter().peekable();
    let mut newest: Option<Write<'a>> = None;
    let mut found = Vec::new();
    for write in by_moment {
        while let Some(before) = acknowledged.next_if(|before| before.call.end < moment(&write)) {
            // Of two nodes on one timeline the first counts; the other's writes then contradict it.
            if newest.is_none_or(|newest| before.by.timeline > newest.by.timeline) {
                newest = Some(before);
            }
        }
        let Some(newest) = newest else { continue };
        let same_reign = newest.by.timeline == write.by.timeline && newest.by.node == write.by.node;
        if newest.by.timeline >= write.by.timeline && !same_reign {
            found.push(Contradiction { newer: newest, older: write });
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::super::sample::{call, kinds};
    use super::*;
    use crate::history::Op;

    const MS: u64 = 1000;

    fn found(writes: &[(Port, u64, u64, usize, u32)]) -> Vec<Kind> {
        let calls: Vec<Call> = writes
            .iter()
            .map(|(port, start, end, node, timeline)| {
                call(1, *port, Op::Insert(*start), start * MS, end * MS, (*node, *timeline))
            })
            .collect();
        let mut findings = Findings::default();
        check(&calls, &mut findings);
        kinds(&findings)
    }

    const ROUTER: Port = Port::ReadWrite(0);
    const PAST: Port = Port::Direct(0);

    #[test]
    fn a_clean_handover_and_back_is_fine() {
        assert_eq!(
            found(&[(ROUTER, 0, 1, 0, 1), (ROUTER, 2, 9, 1, 2), (PAST, 10, 11, 1, 2), (ROUTER, 12, 13, 0, 3)]),
            []
        );
    }

    #[test]
    fn an_old_primary_that_goes_on_is_seen_on_any_port() {
        for port in [ROUTER, PAST] {
            let writes = [(ROUTER, 0, 1, 0, 1), (ROUTER, 2, 5, 1, 2), (port, 6, 7, 0, 1)];
            assert_eq!(found(&writes), [Kind::TwoPrimaries]);
        }
        assert_eq!(found(&[(PAST, 0, 1, 0, 4), (PAST, 2, 3, 1, 4)]), [Kind::TwoPrimaries], "on one timeline");
    }

    #[test]
    fn an_old_acknowledgement_that_comes_late_is_seen() {
        assert_eq!(found(&[(ROUTER, 0, 100, 0, 1), (ROUTER, 3, 50, 1, 2)]), [Kind::LateAcknowledgement]);
        assert_eq!(found(&[(PAST, 0, 100, 0, 1), (ROUTER, 3, 50, 1, 2)]), [Kind::LateDirectAcknowledgement]);
        assert_eq!(found(&[(ROUTER, 0, 60, 0, 1), (ROUTER, 3, 50, 1, 2)]), [], "read in the other order, perhaps");
    }
}
