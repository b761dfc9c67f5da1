//! Transactions on lists: strict serializability, as far as appends and whole reads show it.
//!
//! Every value is appended once, and a list is only appended to, so a read shows the order of all appends before it.
//! Checked are, after Jepsen's elle:
//! * *values*: a read sees no value twice, none that nobody appended, none of a transaction that failed (G1a), no part of
//!   another transaction's appends to a list (G1b), and its own transaction's earlier appends at its end;
//! * *orders*: all reads of a list, and the list at the end, are beginnings of one another. With acknowledged appends that must
//!   be there at the end (checked as lost writes) nothing is lost, doubled or reordered;
//! * *cycles*: a graph of transactions with an edge where one must be before the other – it appended the value before (ww),
//!   appended what the other read last (wr), did not see yet what the other appended next (rw), or was acknowledged before
//!   the other was begun (rt). A cycle means that no serial order explains what was seen (G0, G1c, G-single, G2, and
//!   their real-time variants).
//!
//! A transaction of unknown outcome takes part if somebody saw one of its values. Without synchronous mode a failover
//! may take acknowledged appends back, so only the values are checked then.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::{Findings, Kind, Promises, graph, seconds};
use crate::history::{Call, Finals, Micros, Op, Outcome, Step};

pub(super) fn check(calls: &[Call], finals: &Finals, promises: Promises, findings: &mut Findings) {
    let transactions: Vec<Transaction<'_>> = calls.iter().filter_map(Transaction::of).collect();
    let writers = writers(&transactions);
    values(&transactions, &writers, finals, findings);
    if promises.synchronous {
        let orders = orders(&transactions, finals, findings);
        cycles(&transactions, &writers, &orders, findings);
    }
}

#[derive(Clone, Copy)]
struct Transaction<'a> {
    call: &'a Call,
    steps: &'a [Step],
}

impl<'a> Transaction<'a> {
    fn of(call: &'a Call) -> Option<Self> {
        match &call.op {
            Op::Transaction(steps) => Some(Self { call, steps }),
            _ => None,
        }
    }

    fn appends(self) -> impl Iterator<Item = (u64, u64)> + 'a {
        self.steps.iter().filter_map(|step| match step {
            Step::Append { key, value } => Some((*key, *value)),
            Step::Read { .. } => None,
        })
    }

    /// What an acknowledged transaction read.
    fn reads(self) -> impl Iterator<Item = (usize, u64, &'a [u64])> + 'a {
        let acknowledged = self.call.outcome == Outcome::Ok;
        self.steps.iter().enumerate().filter_map(move |(at, step)| match step {
            Step::Read { key, list: Some(list) } if acknowledged => Some((at, *key, list.as_slice())),
            _ => None,
        })
    }

    fn own_before(self, at: usize, of: u64) -> Vec<u64> {
        let before = Transaction { call: self.call, steps: &self.steps[..at] };
        before.appends().filter(|(key, _)| *key == of).map(|(_, value)| value).collect()
    }

    fn show(self) -> String {
        let Call { client, start, end, .. } = self.call;
        format!("client {client} {}–{}", seconds(*start), seconds(*end))
    }
}

/// Who appended a value to a list.
type Writers = HashMap<(u64, u64), usize>;

fn writers(transactions: &[Transaction<'_>]) -> Writers {
    let all = transactions.iter().enumerate();
    all.flat_map(|(i, transaction)| transaction.appends().map(move |append| (append, i))).collect()
}

fn values(transactions: &[Transaction<'_>], writers: &Writers, finals: &Finals, findings: &mut Findings) {
    let mut wrong = Vec::new();
    let mut look = |who: Option<usize>, key: u64, list: &[u64], at: Micros, reader: String| {
        let mut seen = HashSet::new();
        for value in list {
            let problem = match writers.get(&(key, *value)) {
                _ if !seen.insert(value) => "is there twice",
                None => "was never appended",
                Some(writer) if transactions[*writer].call.outcome == Outcome::Failed => "was rolled back (G1a)",
                Some(_) => continue,
            };
            wrong.push((at, format!("list {key}, read by {reader}: {value} {problem}")));
        }
        // Of another transaction's appends to this list, all or none.
        if let Some(writer) = list.last().and_then(|last| writers.get(&(key, *last))).filter(|w| Some(**w) != who) {
            let all = transactions[*writer].appends().filter(|append| append.0 == key);
            if let Some((_, absent)) = all.into_iter().find(|(_, value)| !list.contains(value)) {
                let text = format!("list {key}, read by {reader}: ends within a transaction, without {absent} (G1b)");
                wrong.push((at, text));
            }
        }
    };
    for (i, transaction) in transactions.iter().enumerate() {
        for (_, key, list) in transaction.reads() {
            look(Some(i), key, list, transaction.call.end, transaction.show());
        }
    }
    for (key, list) in &finals.lists {
        look(None, *key, list, Micros::MAX, "the last read".to_owned());
    }
    for transaction in transactions {
        for (at, key, list) in transaction.reads() {
            if !list.ends_with(&transaction.own_before(at, key)) {
                let text = format!("list {key}: {} does not see its own appends", transaction.show());
                wrong.push((transaction.call.end, text));
            }
        }
    }
    findings.violations(Kind::ListRead, "wrong reads of lists", wrong);
}

/// The order of all appends to each list: its longest read. Others must be beginnings of it.
fn orders(transactions: &[Transaction<'_>], finals: &Finals, findings: &mut Findings) -> BTreeMap<u64, Vec<u64>> {
    let mut orders: BTreeMap<u64, &[u64]> = finals.lists.iter().map(|(key, list)| (*key, list.as_slice())).collect();
    let reads = || transactions.iter().flat_map(|one| one.reads().map(move |(_, key, list)| (*one, key, list)));
    for (_, key, list) in reads() {
        let longest = orders.entry(key).or_default();
        if list.len() > longest.len() {
            *longest = list;
        }
    }
    let contradicts = |key: &u64, list: &[u64]| !orders.get(key).is_some_and(|order| order.starts_with(list));
    let mut wrong = Vec::new();
    for (reader, key, list) in reads().filter(|(_, key, list)| contradicts(key, list)) {
        let text = format!("list {key}, read by {}: {}", reader.show(), differs(orders[&key], list));
        wrong.push((reader.call.end, text));
    }
    for (key, order) in &orders {
        let last = finals.lists.get(key).map_or(&[][..], Vec::as_slice);
        if last != *order {
            wrong.push((Micros::MAX, format!("list {key} in the end: {}", differs(order, last))));
        }
    }
    findings.violations(Kind::ListRead, "reads of lists contradict each other", wrong);
    orders.into_iter().map(|(key, order)| (key, order.to_vec())).collect()
}

fn differs(order: &[u64], list: &[u64]) -> String {
    let at = order.iter().zip(list).position(|(one, other)| one != other).unwrap_or(order.len().min(list.len()));
    format!("value {} is {:?}, elsewhere {:?}", at + 1, list.get(at), order.get(at))
}

fn cycles(
    transactions: &[Transaction<'_>],
    writers: &Writers,
    orders: &BTreeMap<u64, Vec<u64>>,
    findings: &mut Findings,
) {
    let seen: HashSet<usize> = orders
        .iter()
        .flat_map(|(key, order)| order.iter().filter_map(|value| writers.get(&(*key, *value)).copied()))
        .collect();
    let takes_part = |i: usize| match transactions[i].call.outcome {
        Outcome::Ok => true,
        Outcome::Unknown => seen.contains(&i),
        Outcome::Failed => false,
    };
    let mut edges: HashMap<(usize, usize), &'static str> = HashMap::new();
    let mut edge = |from: usize, to: usize, kind| {
        if from != to && takes_part(from) && takes_part(to) {
            edges.entry((from, to)).or_insert(kind);
        }
    };
    let writer = |key: u64, value: &u64| writers.get(&(key, *value)).copied();
    for (key, order) in orders {
        for pair in order.windows(2) {
            if let (Some(one), Some(next)) = (writer(*key, &pair[0]), writer(*key, &pair[1])) {
                edge(one, next, "ww");
            }
        }
    }
    for (i, transaction) in transactions.iter().enumerate() {
        for (_, key, list) in transaction.reads() {
            // Own appends are at the end; what others wrote is before them.
            let others = list.iter().rev().find_map(|value| writer(key, value).filter(|writer| *writer != i));
            if let Some(other) = others {
                edge(other, i, "wr");
            }
            let order = orders.get(&key).map_or(&[][..], Vec::as_slice);
            let later =
                order.iter().skip(list.len()).find_map(|value| writer(key, value).filter(|writer| *writer != i));
            if let Some(later) = later {
                edge(i, later, "rw");
            }
        }
    }

    let count = transactions.len();
    let mut successors: Vec<Vec<usize>> = vec![Vec::new(); count];
    for (from, to) in edges.keys() {
        successors[*from].push(*to);
    }
    // Real time: one node for each acknowledgement, in their order, instead of an edge for each pair.
    let part: Vec<usize> = (0..count).filter(|i| takes_part(*i)).collect();
    let acknowledged = part.iter().filter(|i| transactions[**i].call.outcome == Outcome::Ok);
    let mut ends: Vec<(u64, usize)> = acknowledged.map(|i| (transactions[*i].call.end, *i)).collect();
    ends.sort_unstable();
    for (at, (_, i)) in ends.iter().enumerate() {
        successors.push(if at + 1 < ends.len() { vec![count + at + 1] } else { Vec::new() });
        successors[*i].push(count + at);
    }
    for i in part {
        let before = ends.partition_point(|(end, _)| *end < transactions[i].call.start);
        if before > 0 {
            successors[count + before - 1].push(i);
        }
    }

    let components = graph::cycles(&successors);
    let show = |component: &Vec<usize>| {
        let members = component.iter().filter(|node| **node < count).take(100);
        let ways = members.map(|node| graph::shortest_cycle(&successors, component, *node));
        let way = ways.min_by_key(Vec::len).unwrap_or_default();
        let way: Vec<usize> = way.into_iter().filter(|node| *node < count).collect();
        let step = |(at, node): (usize, &usize)| {
            let next = way[(at + 1) % way.len()];
            format!("{} {} ", transactions[*node].show(), edges.get(&(*node, next)).unwrap_or(&"rt"))
        };
        let at = way.iter().map(|node| transactions[*node].call.end).max().unwrap_or_default();
        (at, way.iter().enumerate().map(step).collect::<String>())
    };
    findings.violations(Kind::NotSerializable, "cycles", components.iter().map(show).collect());
}

#[cfg(test)]
mod tests {
    use super::super::sample::{append, failed, kinds, read, transaction};
    use super::*;

    fn found(calls: &[Call], lists: &[(u64, &[u64])]) -> Findings {
        let lists = lists.iter().map(|(key, list)| (*key, list.to_vec())).collect();
        let finals = Finals { lists, ..Finals::default() };
        let mut findings = Findings::default();
        check(calls, &finals, Promises { synchronous: true, lag_limit: 0 }, &mut findings);
        findings
    }

    #[test]
    fn an_ordinary_history_is_fine() {
        let calls = [
            transaction(0, 10, &[append(1, 1), read(1, &[1])]),
            transaction(20, 30, &[read(1, &[1]), append(1, 2), append(2, 3)]),
            transaction(25, 35, &[read(2, &[]), read(1, &[1])]),
            transaction(40, 50, &[read(1, &[1, 2]), read(2, &[3])]),
        ];
        assert_eq!(found(&calls, &[(1, &[1, 2]), (2, &[3])]), Findings::default());
    }

    #[test]
    fn values_twice_unknown_or_rolled_back() {
        let base = transaction(0, 10, &[append(1, 1)]);
        let twice = [base.clone(), transaction(20, 30, &[read(1, &[1, 1])])];
        assert!(kinds(&found(&twice, &[(1, &[1])])).contains(&Kind::ListRead));
        let unknown = [base.clone(), transaction(20, 30, &[read(1, &[1, 7])])];
        assert!(found(&unknown, &[(1, &[1, 7])]).violations[0].text.contains("never appended"));
        let aborted = failed(transaction(12, 15, &[append(1, 2)]), Outcome::Failed);
        let findings = found(&[base.clone(), aborted.clone()], &[(1, &[1, 2])]);
        assert!(findings.violations[0].text.contains("G1a"));
        let open = Call { outcome: Outcome::Unknown, ..aborted };
        assert_eq!(found(&[base, open], &[(1, &[1, 2])]), Findings::default());
    }

    #[test]
    fn a_part_of_another_transaction() {
        let calls = [transaction(0, 10, &[append(1, 1), append(1, 2)]), transaction(5, 15, &[read(1, &[1])])];
        assert!(found(&calls, &[(1, &[1, 2])]).violations[0].text.contains("G1b"));
    }

    #[test]
    fn a_transaction_sees_its_own_appends() {
        let calls = [transaction(0, 10, &[append(1, 1)]), transaction(20, 30, &[append(1, 2), read(1, &[1])])];
        assert!(found(&calls, &[(1, &[1, 2])]).violations[0].text.contains("own appends"));
    }

    #[test]
    fn orders_that_contradict_each_other_and_values_that_vanish() {
        let calls = [
            transaction(0, 50, &[append(1, 1)]),
            transaction(0, 50, &[append(1, 2)]),
            transaction(10, 60, &[read(1, &[2])]),
        ];
        assert_eq!(kinds(&found(&calls, &[(1, &[1, 2])]))[0], Kind::ListRead);
        let findings = found(&calls, &[(1, &[])]);
        assert!(findings.violations[0].text.contains("in the end: value 1 is None, elsewhere Some(2)"), "{findings:?}");
    }

    #[test]
    fn a_stale_read_breaks_real_time() {
        let calls = [transaction(0, 10, &[append(1, 1)]), transaction(20, 30, &[read(1, &[])])];
        let findings = found(&calls, &[(1, &[1])]);
        assert_eq!(kinds(&findings), [Kind::NotSerializable]);
        assert!(findings.violations[0].text.contains("rw") && findings.violations[0].text.contains("rt"));
        let meanwhile = [transaction(0, 10, &[append(1, 1)]), transaction(5, 30, &[read(1, &[])])];
        assert_eq!(found(&meanwhile, &[(1, &[1])]), Findings::default());
    }

    #[test]
    fn write_skew_and_circular_information() {
        let skew =
            [transaction(0, 10, &[read(1, &[]), append(2, 2)]), transaction(0, 10, &[read(2, &[]), append(1, 1)])];
        assert_eq!(kinds(&found(&skew, &[(1, &[1]), (2, &[2])])), [Kind::NotSerializable]);
        let circular =
            [transaction(0, 10, &[append(1, 1), read(2, &[2])]), transaction(0, 10, &[append(2, 2), read(1, &[1])])];
        assert_eq!(kinds(&found(&circular, &[(1, &[1]), (2, &[2])])), [Kind::NotSerializable]);
        let interleaved =
            [transaction(0, 10, &[append(1, 1), append(2, 1)]), transaction(0, 10, &[append(1, 2), append(2, 2)])];
        assert_eq!(kinds(&found(&interleaved, &[(1, &[1, 2]), (2, &[2, 1])])), [Kind::NotSerializable]);
    }

    #[test]
    fn without_synchronous_mode_only_values_are_checked() {
        let calls = [transaction(0, 10, &[append(1, 1)]), transaction(20, 30, &[read(1, &[])])];
        let mut findings = Findings::default();
        check(&calls, &Finals::default(), Promises { synchronous: false, lag_limit: 0 }, &mut findings);
        assert_eq!(findings, Findings::default());
    }
}
