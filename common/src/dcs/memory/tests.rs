//! The contract, and what the faults do.

use super::*;
use crate::TokioClock;
use crate::dcs::contract::Subject;
use futures::StreamExt;

fn store() -> MemoryDcs<TokioClock> {
    MemoryDcs::new(TokioClock::default())
}

fn put(key: &str) -> Txn {
    Txn { then: vec![Op::Put(key.to_owned(), b"x".to_vec(), LeaseId(0))], ..Txn::default() }
}

#[tokio::test(start_paused = true)]
async fn passes_the_contract() {
    let dcs = store();
    let clock = dcs.store.clock;
    let subject = Subject { other: dcs.client(), dcs: dcs.clone(), clock, prefix: "/test/".to_owned() };
    subject.check(async |revision| dcs.compact(revision)).await;
}

#[tokio::test(start_paused = true)]
async fn lost_answers_have_taken_effect() {
    let dcs = store();
    dcs.set_faults(|faults| faults.lost_answers = 1);
    assert!(matches!(dcs.txn(put("a")).await, Err(DcsError::Timeout(_))));
    assert_eq!(dcs.peek("a").entries.len(), 1);
    assert!(dcs.txn(put("b")).await.is_ok(), "only that one");
}

#[tokio::test(start_paused = true)]
async fn cut_off_requests_have_not() {
    let dcs = store();
    dcs.set_faults(|faults| faults.cut = true);
    let asked = dcs.store.clock.now();
    assert!(matches!(dcs.txn(put("a")).await, Err(DcsError::Timeout(_))));
    assert_eq!(dcs.store.clock.now().since(asked), Faults::default().deadline);
    dcs.set_faults(|faults| *faults = Faults { refused: true, ..Faults::default() });
    assert!(matches!(dcs.txn(put("a")).await, Err(DcsError::Unavailable(_))));
    assert_eq!(dcs.peek("").entries, []);
    assert!(dcs.client().txn(put("a")).await.is_ok(), "the other client's connection is in order");
}

#[tokio::test(start_paused = true)]
async fn watches_break_fall_silent_and_lag() {
    let dcs = store();
    let mut watch = dcs.watch("", Revision(0)).await.unwrap();
    let other = dcs.client();
    dcs.set_faults(|faults| faults.watch_delay = Duration::from_millis(700));
    let written = dcs.store.clock.now();
    for key in ["a", "b"] {
        other.txn(put(key)).await.unwrap();
        let event = watch.next().await.unwrap().unwrap();
        assert!(matches!(event, WatchEvent::Changes { .. }), "{event:?}");
    }
    assert_eq!(dcs.store.clock.now().since(written), Duration::from_millis(1400));

    dcs.break_watches();
    assert!(matches!(watch.next().await, Some(Err(DcsError::WatchLost(_)))));
    assert!(watch.next().await.is_none());

    let mut watch = dcs.watch("", Revision(0)).await.unwrap();
    dcs.set_faults(|faults| faults.cut = true);
    other.txn(put("c")).await.unwrap();
    assert!(matches!(watch.next().await, Some(Err(DcsError::WatchLost(_)))), "silence, not the event");
}

#[tokio::test(start_paused = true)]
async fn a_new_leader_of_the_store_restarts_leases() {
    let dcs = store();
    let lease = dcs.grant(Duration::from_secs(2)).await.unwrap();
    let clock = dcs.store.clock;
    clock.sleep(Duration::from_millis(1500)).await;
    dcs.restart_leases();
    clock.sleep(Duration::from_millis(1900)).await;
    assert!(dcs.renew(lease.id, "/x").await.is_ok());
}
