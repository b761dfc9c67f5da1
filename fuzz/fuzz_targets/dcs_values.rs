//! What stands in the DCS: whatever it is, it becomes a view and a table of routes, also after something else.

#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::fuzz_target;
use trunkline_common::dcs::codec;
use trunkline_common::dcs::paths::Paths;
use trunkline_common::dcs::{KeyValue, Snapshot};
use trunkline_common::{LeaseId, Revision};
use trunkline_router::table::RouteTable;

const KEYS: &[&str] = &[
    "initialize",
    "config",
    "leader",
    "members/a",
    "failover",
    "sync",
    "status",
    "history",
    "failsafe",
    "timeline",
    "restored",
    "routers/r",
];

fuzz_target!(|writes: Vec<(u8, Vec<u8>)>| {
    let paths = Paths::new("service", "demo");
    let mut entries = BTreeMap::new();
    let mut before = None;
    for (revision, (key, value)) in (1..).map(Revision).zip(writes) {
        let key = format!("{}{}", paths.prefix(), KEYS[usize::from(key) % KEYS.len()]);
        let entry = KeyValue { key: key.clone(), value, created: revision, modified: revision, lease: LeaseId(1) };
        entries.insert(key, entry);
        let snapshot = Snapshot { revision, entries: entries.values().cloned().collect() };
        let view = codec::view(&paths, &snapshot, before.as_ref());
        let _ = RouteTable::from_view(&view);
        before = Some(view);
    }
});
