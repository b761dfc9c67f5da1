//! Between the contract's types and etcd's.

use etcd_client as etcd;
use etcd_client::{CompareOp, DeleteOptions, PutOptions, TxnOp, TxnOpResponse, WatchResponse};

use super::super::{Change, Compare, KeyValue, Op, Snapshot, Txn, TxnResult, WatchEvent};
use crate::{LeaseId, Revision};

pub(super) fn snapshot(answer: &etcd::GetResponse) -> Snapshot {
    let mut entries: Vec<KeyValue> = answer.kvs().iter().map(key_value).collect();
    entries.sort_by(|a, b| a.key.cmp(&b.key));
    Snapshot { revision: revision(answer.header()), entries }
}

pub(super) fn txn(txn: &Txn) -> etcd::Txn {
    let ops = |ops: &[Op]| ops.iter().map(op).collect::<Vec<_>>();
    etcd::Txn::new()
        .when(txn.when.iter().map(compare).collect::<Vec<_>>())
        .and_then(ops(&txn.then))
        .or_else(ops(&txn.otherwise))
}

pub(super) fn txn_result(answer: &etcd::TxnResponse) -> TxnResult {
    let read = |response: TxnOpResponse| match response {
        TxnOpResponse::Get(found) => Some(found.kvs().first().map(key_value)),
        _ => None,
    };
    let read = answer.op_responses().into_iter().filter_map(read).collect();
    TxnResult { succeeded: answer.succeeded(), revision: revision(answer.header()), read }
}

/// One item per revision: a message may hold several, but never a part of one (fragments are not asked for).
pub(super) fn events(response: &WatchResponse) -> Vec<WatchEvent> {
    let mut grouped: Vec<(Revision, Vec<Change>)> = Vec::new();
    for kv in response.events().iter().filter_map(etcd::Event::kv) {
        // Deleting a key sets its version to 0; every write raises it.
        let change = if kv.version() == 0 { Change::Delete(text(kv.key())) } else { Change::Put(key_value(kv)) };
        let at = Revision(kv.mod_revision());
        match grouped.last_mut() {
            Some((revision, changes)) if *revision == at => changes.push(change),
            _ => grouped.push((at, vec![change])),
        }
    }
    grouped.into_iter().map(|(revision, changes)| WatchEvent::Changes { revision, changes }).collect()
}

fn compare(compare: &Compare) -> etcd::Compare {
    match compare {
        Compare::Absent(key) => etcd::Compare::create_revision(key.as_str(), CompareOp::Equal, 0),
        Compare::Modified(key, revision) => etcd::Compare::mod_revision(key.as_str(), CompareOp::Equal, revision.0),
        Compare::Value(key, value) => etcd::Compare::value(key.as_str(), CompareOp::Equal, value.as_slice()),
        Compare::Lease(key, lease) => etcd::Compare::lease(key.as_str(), CompareOp::Equal, lease.0),
    }
}

fn op(op: &Op) -> TxnOp {
    match op {
        Op::Put(key, value, lease) => {
            TxnOp::put(key.as_str(), value.as_slice(), Some(PutOptions::new().with_lease(lease.0)))
        }
        Op::Delete(key) => TxnOp::delete(key.as_str(), None),
        Op::DeletePrefix(prefix) => TxnOp::delete(prefix.as_str(), Some(DeleteOptions::new().with_prefix())),
        Op::Get(key) => TxnOp::get(key.as_str(), None),
    }
}

pub(super) fn key_value(kv: &etcd::KeyValue) -> KeyValue {
    KeyValue {
        key: text(kv.key()),
        value: kv.value().to_vec(),
        created: Revision(kv.create_revision()),
        modified: Revision(kv.mod_revision()),
        lease: LeaseId(kv.lease()),
    }
}

fn revision(header: Option<&etcd::ResponseHeader>) -> Revision {
    Revision(header.map_or(0, etcd::ResponseHeader::revision))
}

/// Our keys are text; another's may not be, and is then nobody's we know.
fn text(key: &[u8]) -> String {
    String::from_utf8_lossy(key).into_owned()
}
