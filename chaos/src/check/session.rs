//! Reads on the read-only port: they never go back within a session, and see only what somebody wrote.

use std::collections::BTreeMap;

use super::{Findings, Kind, seconds};
use crate::history::{Call, Op, Outcome, Port};

pub(super) fn check(calls: &[Call], findings: &mut Findings) {
    let mut reads: Vec<(&Call, u32, Option<u64>)> = calls.iter().filter_map(observation).collect();
    reads.sort_by_key(|(call, _, _)| call.start);

    let mut sessions: BTreeMap<(u32, u32, u32), (u64, usize)> = BTreeMap::new();
    let mut went_back = Vec::new();
    for (call, of, seen) in &reads {
        let Some(served) = call.served else { continue };
        let (most, node) = *sessions.entry((call.client, call.session, *of)).or_insert((0, served.node));
        if seen.unwrap_or(0) < most {
            let Call { client, op, start, .. } = call;
            let text = format!("client {client} at {}: {op:?} after {most} on node {}", seconds(*start), node + 1);
            went_back.push((*start, text));
        }
        sessions.insert((call.client, call.session, *of), (seen.unwrap_or(0).max(most), served.node));
    }
    findings.violations(Kind::SessionWentBack, "reads saw less than one before in their session", went_back);

    let written = attempts(calls);
    let possible = |of, row, end| {
        written.get(&(of, row)).is_some_and(|(start, outcome)| *start <= end && *outcome != Outcome::Failed)
    };
    let phantoms = reads.iter().filter(|(call, of, seen)| seen.is_some_and(|row| !possible(*of, row, call.end)));
    let phantoms = phantoms.map(|(call, _, _)| (call.end, format!("{:?} at {}", call.op, seconds(call.end))));
    findings.violations(Kind::PhantomRow, "reads saw a row that nobody can have written", phantoms.collect());
}

fn observation(call: &Call) -> Option<(&Call, u32, Option<u64>)> {
    match call.op {
        Op::Observe { of, seen } if call.outcome == Outcome::Ok => Some((call, of, seen)),
        _ => None,
    }
}

/// Rows by client and number: since when they can be there, and what became of them.
fn attempts(calls: &[Call]) -> BTreeMap<(u32, u64), (u64, Outcome)> {
    let row = |call: &Call| match (call.port, &call.op) {
        (Port::ReadWrite(_), Op::Insert(row)) => Some(((call.client, *row), (call.start, call.outcome))),
        _ => None,
    };
    calls.iter().filter_map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::super::sample::{call, failed, kinds};
    use super::*;

    fn found(calls: &[Call]) -> Vec<Kind> {
        let mut findings = Findings::default();
        check(calls, &mut findings);
        kinds(&findings)
    }

    fn rows(count: u64) -> Vec<Call> {
        (1..=count).map(|row| call(1, Port::ReadWrite(0), Op::Insert(row), row, row, (0, 1))).collect()
    }

    fn read(session: u32, at: u64, seen: Option<u64>) -> Call {
        let op = Op::Observe { of: 1, seen };
        Call { session, ..call(9, Port::ReadOnly(0), op, at, at + 1, (1, 0)) }
    }

    #[test]
    fn a_session_never_goes_back_and_the_next_may() {
        let mut calls = rows(5);
        calls.extend([read(1, 10, None), read(1, 12, Some(2)), read(1, 14, Some(2)), read(2, 16, Some(1))]);
        assert_eq!(found(&calls), []);
        calls.push(read(1, 20, Some(1)));
        assert_eq!(found(&calls), [Kind::SessionWentBack]);
        calls.pop();
        calls.push(read(1, 20, None));
        assert_eq!(found(&calls), [Kind::SessionWentBack], "not even the first row any more");
    }

    #[test]
    fn a_row_that_nobody_wrote_or_that_failed_is_not_seen() {
        let mut calls = rows(2);
        calls.push(read(1, 10, Some(3)));
        assert_eq!(found(&calls), [Kind::PhantomRow], "nobody wrote it");
        let third = call(1, Port::ReadWrite(0), Op::Insert(3), 5, 6, (0, 1));
        calls.push(failed(third.clone(), Outcome::Failed));
        assert_eq!(found(&calls), [Kind::PhantomRow], "it was rolled back");
        calls.pop();
        calls.push(failed(third.clone(), Outcome::Unknown));
        assert_eq!(found(&calls), [], "it may have been committed");
        calls.pop();
        calls.push(Call { start: 50, end: 51, ..third });
        assert_eq!(found(&calls), [Kind::PhantomRow], "it was written only later");
    }
}
