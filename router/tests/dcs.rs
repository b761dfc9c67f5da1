//! From keys in the DCS, in Patroni's format, to a routed connection: the whole way, with a store in memory.

#![allow(clippy::unwrap_used)]

mod common;

use std::net::SocketAddr;

use common::*;
use tokio::io::AsyncReadExt;
use tokio::net::TcpListener;
use trunkline_common::dcs::follow::Follower;
use trunkline_common::dcs::memory::MemoryDcs;
use trunkline_common::dcs::paths::Paths;
use trunkline_common::dcs::store::ClusterStore;
use trunkline_common::dcs::{Dcs, Op, Txn};
use trunkline_common::{LeaseId, SystemClock};
use trunkline_config::router::Target;
use trunkline_router::crypto::Crypto;
use trunkline_router::socket::Listener;
use trunkline_router::{Router, accept, follow};

async fn put(dcs: &MemoryDcs<SystemClock>, key: &str, value: &str) {
    let put = Op::Put(format!("/service/demo/{key}"), value.into(), LeaseId(0));
    dcs.txn(Txn { then: vec![put], ..Txn::default() }).await.unwrap();
}

fn record(role: &str, at: SocketAddr) -> String {
    format!(
        "{{\"conn_url\":\"postgres://{at}/postgres\",\"api_url\":\"http://127.0.0.1:1/patroni\",\"state\":\"running\",\
         \"role\":\"{role}\",\"version\":\"4.1.4\",\"xlog_location\":83886320,\"replication_state\":\"streaming\",\
         \"timeline\":7}}"
    )
}

#[tokio::test]
async fn keys_become_routes_and_their_changes_end_sessions() {
    let dcs = MemoryDcs::new(SystemClock);
    let router = Router::new(limits()).unwrap();
    let store = ClusterStore::new(dcs.client(), Paths::new("service", "demo"));
    tokio::spawn(follow::run(
        router.clone(),
        trunkline_router::probe::Prober::default(),
        Follower::spawn(store, SystemClock),
        None,
    ));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let rw = listener.local_addr().unwrap();
    let (_open, closed) = tokio::sync::watch::channel(false);
    let slot =
        std::sync::Arc::new(parking_lot::RwLock::new(router.listening(&port(Target::Leader), Crypto::default())));
    tokio::spawn(accept::serve(router.clone(), slot, Listener::Tcp(listener), closed));

    let (a, b) = (Fake::start().await, Fake::start().await);
    put(&dcs, "members/a", &record("primary", a.at)).await;
    put(&dcs, "members/b", &record("replica", b.at)).await;
    put(&dcs, "leader", "a").await;
    let (mut client, mut server) = session(rw, &a).await;
    passes(&mut client, &mut server, b"Q").await;

    // A broken watch and a malformed value change nothing.
    dcs.break_watches();
    put(&dcs, "members/a", "{not json").await;
    put(&dcs, "status", "{\"optime\":83886400}").await;
    let seen = || router.table().standbys.first().and_then(|standby| standby.lag) == Some(80);
    eventually(seen).await;
    passes(&mut client, &mut server, b"Q").await;

    // The switchover of §6.1: deleted, taken, promoted.
    let delete = Op::Delete("/service/demo/leader".into());
    dcs.txn(Txn { then: vec![delete], ..Txn::default() }).await.unwrap();
    assert_eq!(rest(&mut client).await, b"");
    let _held = connect(rw, STARTUP).await;
    eventually(|| router.hold.held() == 1).await;
    put(&dcs, "leader", "b").await;
    // Connected to while it is promoted, and told nothing before.
    let mut ahead = b.connection().await;
    assert!(tokio::time::timeout(std::time::Duration::from_millis(100), ahead.read_u8()).await.is_err());
    put(&dcs, "members/b", &record("primary", b.at)).await;
    let mut startup = vec![0; STARTUP.len()];
    within(ahead.read_exact(&mut startup)).await.unwrap();
    assert_eq!(startup, STARTUP);
}
