//! Acknowledged rows that are gone.

use std::collections::BTreeMap;

use super::{Findings, Kind, Promises, seconds};
use crate::history::{Call, Finals, Op, Outcome, Step};

pub(super) fn check(calls: &[Call], finals: &Finals, promises: Promises, findings: &mut Findings) {
    let acknowledged = calls.iter().filter(|call| call.outcome == Outcome::Ok);
    let lost: Vec<&Call> = acknowledged.filter(|call| is_lost(call, finals)).collect();
    let show = |call: &Call| {
        format!("{:?} of client {} acknowledged at {} by {:?}", call.op, call.client, seconds(call.end), call.served)
    };
    if promises.synchronous {
        let cases = lost.iter().map(|call| (call.end, show(call))).collect();
        findings.violations(Kind::LostWrite, "acknowledged writes are lost", cases);
        return;
    }
    for (timeline, bytes, count) in lost_bytes(calls, &lost) {
        let text = format!("{count} acknowledged writes in {bytes} bytes of WAL are lost from timeline {timeline}");
        if bytes > promises.lag_limit {
            findings.violation(Kind::LostWrite, None, format!("{text}; the limit is {} bytes", promises.lag_limit));
        } else {
            findings.notes.push(text);
        }
    }
}

fn is_lost(call: &Call, finals: &Finals) -> bool {
    match &call.op {
        Op::Insert(row) => !finals.rows.contains(&(call.client, *row)),
        Op::Transaction(steps) => steps.iter().any(|step| match step {
            Step::Append { key, value } => !finals.lists.get(key).is_some_and(|list| list.contains(value)),
            Step::Read { .. } => false,
        }),
        Op::InsertLocal(_) | Op::Observe { .. } => false,
    }
}

/// For each timeline that lost something: from the first lost position to the last that was acknowledged on it.
fn lost_bytes(calls: &[Call], lost: &[&Call]) -> Vec<(u32, u64, usize)> {
    let mut last: BTreeMap<u32, u64> = BTreeMap::new();
    for served in calls.iter().filter_map(Call::taken_by) {
        let end = last.entry(served.timeline).or_default();
        *end = served.lsn.max(*end);
    }
    let mut first: BTreeMap<u32, (u64, usize)> = BTreeMap::new();
    for served in lost.iter().filter_map(|call| call.served) {
        let (start, count) = first.entry(served.timeline).or_insert((served.lsn, 0));
        *start = served.lsn.min(*start);
        *count += 1;
    }
    let bytes = |(timeline, (start, count))| (timeline, last.get(&timeline).map_or(0, |end| end - start), count);
    first.into_iter().map(bytes).collect()
}

#[cfg(test)]
mod tests {
    use super::super::sample::{append, call, failed, kinds, transaction};
    use super::*;
    use crate::history::Port;

    fn found(calls: &[Call], finals: &Finals, promises: Promises) -> Findings {
        let mut findings = Findings::default();
        check(calls, finals, promises, &mut findings);
        findings
    }

    const SYNCHRONOUS: Promises = Promises { synchronous: true, lag_limit: 0 };

    #[test]
    fn an_acknowledged_row_must_be_there_and_an_unknown_one_need_not() {
        let row = |row, end| call(1, Port::ReadWrite(0), Op::Insert(row), end - 1, end, (0, 1));
        let finals = Finals { rows: [(1, 1)].into(), ..Finals::default() };
        assert_eq!(found(&[row(1, 2)], &finals, SYNCHRONOUS), Findings::default());
        let unknown = failed(row(2, 3), Outcome::Unknown);
        let local = call(1, Port::Direct(0), Op::InsertLocal(9), 1, 2, (0, 1));
        assert_eq!(found(&[row(1, 2), unknown, local], &finals, SYNCHRONOUS), Findings::default());
        let findings = found(&[row(1, 2), row(2, 3), row(3, 4)], &finals, SYNCHRONOUS);
        assert_eq!(kinds(&findings), [Kind::LostWrite]);
        assert!(findings.violations[0].text.starts_with("2 acknowledged writes are lost; the first: Insert(2)"));
    }

    #[test]
    fn an_acknowledged_append_must_be_there() {
        let finals = Finals { lists: [(5, vec![1])].into(), ..Finals::default() };
        let calls = [transaction(1, 2, &[append(5, 1)]), transaction(3, 4, &[append(5, 2)])];
        assert_eq!(kinds(&found(&calls, &finals, SYNCHRONOUS)), [Kind::LostWrite]);
    }

    #[test]
    fn without_synchronous_mode_the_limit_counts() {
        let row = |row, end| call(1, Port::ReadWrite(0), Op::Insert(row), end - 1, end, (0, 1));
        let finals = Finals { rows: [(1, 1)].into(), ..Finals::default() };
        let calls = [row(1, 100), row(2, 200), row(3, 300)];
        let within = found(&calls, &finals, Promises { synchronous: false, lag_limit: 100 });
        assert_eq!(kinds(&within), []);
        assert_eq!(within.notes, ["2 acknowledged writes in 100 bytes of WAL are lost from timeline 1"]);
        let beyond = found(&calls, &finals, Promises { synchronous: false, lag_limit: 99 });
        assert_eq!(kinds(&beyond), [Kind::LostWrite]);
    }
}
