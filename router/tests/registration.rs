//! `router_lease`: a router that can't renew its registration lets go of a leader that does not prove itself.

#![allow(clippy::unwrap_used)]

mod common;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use common::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use trunkline_common::dcs::memory::MemoryDcs;
use trunkline_common::dcs::paths::Paths;
use trunkline_common::dcs::store::{Alongside, ClusterStore, Outcome, Seen};
use trunkline_common::{Clock, Revision, SystemClock};
use trunkline_config::router::Target;
use trunkline_router::Router;
use trunkline_router::registration::Registrar;

const LEASE: Duration = Duration::from_secs(2);

/// A REST API that says yes to everything.
async fn proves_itself() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            if matches!(stream.read(&mut [0; 4096]).await, Ok(1..)) {
                let _ = stream.write_all(b"HTTP/1.0 200 OK\r\n\r\n{\"role\": \"primary\"}").await;
            }
        }
    });
    at
}

/// A store with a leader key, and a router that registers there. What the router is told of the cluster, it is told by hand.
async fn registered(router: &Arc<Router>) -> (MemoryDcs<SystemClock>, Revision) {
    let hub = MemoryDcs::new(SystemClock);
    let (dcs, paths) = (hub.client(), Paths::new("service", "demo"));
    let store = ClusterStore::new(hub, paths.clone());
    let lease = store.grant(Duration::from_secs(3_600)).await.unwrap().id;
    let won = store.acquire_leader(&"a".into(), lease, Seen::default(), Alongside::default()).await;
    let Ok(Outcome::Done(created)) = won else { panic!("{won:?}") };
    let registrar =
        Registrar::new(ClusterStore::new(dcs.clone(), paths), SystemClock, "web1/7".into(), &router.registration);
    tokio::spawn(registrar.run());
    (dcs, created)
}

fn holds(router: &Router) -> bool {
    router.registration.registered.borrow().holds(router.clock.now())
}

#[tokio::test]
async fn cut_off_from_the_dcs_it_ends_sessions_to_a_silent_leader_and_no_others() {
    let mut world = World::new(limits());
    let (rw, ro) = (world.open(port(Target::Leader)).await, world.open(port(Target::Replica)).await);
    let (dcs, created) = registered(&world.router).await;
    let (a, b, silent) = (Fake::start().await, Fake::start().await, Fake::start().await);
    world.follow("b", b.at).await;
    world
        .change(|view| {
            view.settings.router_lease = LEASE;
            view.leader = Some(key("a", created));
            let api_url = Some(format!("http://{}/patroni", silent.at));
            view.members.insert("a".into(), trunkline_common::Member { api_url, ..member("primary", a.at) });
        })
        .await;
    let (mut writer, mut server) = session(rw, &a).await;
    let (mut reader, mut standby) = session(ro, &b).await;
    passes(&mut writer, &mut server, b"Q").await;

    dcs.set_faults(|faults| faults.cut = true);
    assert_eq!(rest(&mut writer).await, b"");
    assert!(!holds(&world.router));
    let _held = connect(rw, STARTUP).await;
    world.held(1).await;
    passes(&mut reader, &mut standby, b"Q").await;

    dcs.set_faults(|faults| faults.cut = false);
    let (_again, _) = a.session().await;
    assert!(holds(&world.router));
}

#[tokio::test]
async fn cut_off_from_the_dcs_it_keeps_the_sessions_of_a_leader_that_proves_itself() {
    let mut world = World::new(limits());
    let rw = world.open(port(Target::Leader)).await;
    let (dcs, created) = registered(&world.router).await;
    let (a, api) = (Fake::start().await, proves_itself().await);
    world
        .change(|view| {
            view.settings.router_lease = LEASE;
            view.leader = Some(key("a", created));
            let api_url = Some(format!("http://{api}/patroni"));
            view.members.insert("a".into(), trunkline_common::Member { api_url, ..member("primary", a.at) });
        })
        .await;
    let (mut writer, mut server) = session(rw, &a).await;
    eventually(|| holds(&world.router)).await;
    dcs.set_faults(|faults| faults.cut = true);
    eventually(|| !holds(&world.router)).await;
    SystemClock.sleep(LEASE).await;
    passes(&mut writer, &mut server, b"Q").await;
    let _another = session(rw, &a).await;
}

#[tokio::test]
async fn without_the_setting_it_does_not_register_and_the_dcs_may_be_away_for_as_long_as_it_likes() {
    let mut world = World::new(limits());
    let rw = world.open(port(Target::Leader)).await;
    let (dcs, _) = registered(&world.router).await;
    let a = Fake::start().await;
    world.lead("a", a.at).await;
    let (mut writer, mut server) = session(rw, &a).await;
    dcs.set_faults(|faults| faults.cut = true);
    SystemClock.sleep(Duration::from_millis(100)).await;
    passes(&mut writer, &mut server, b"Q").await;
    assert!(!holds(&world.router));
    assert_eq!(dcs.peek("/service/demo/routers/").entries, []);
}
