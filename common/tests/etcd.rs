//! Real etcd: the contract, and the faults that only a real cluster has.

#![allow(clippy::unwrap_used)] // Helpers outside of test functions.

mod support;

use std::time::Duration;

use support::{Cluster, RETRY_TIMEOUT, connect, eventually};
use tokio::sync::watch;
use trunkline_common::dcs::contract::{self, Subject};
use trunkline_common::dcs::etcd::EtcdDcs;
use trunkline_common::dcs::follow::{Follower, Knowledge};
use trunkline_common::dcs::paths::Paths;
use trunkline_common::dcs::store::ClusterStore;
use trunkline_common::dcs::{Dcs, DcsError, Lease, Op, Txn};
use trunkline_common::{Clock, LeaseId, Revision, SystemClock};
use trunkline_config::Secret;
use trunkline_config::local::Etcd;

type Store = ClusterStore<EtcdDcs<SystemClock>>;

fn put(key: &str, value: &str) -> Txn {
    Txn { then: vec![Op::Put(key.to_owned(), value.into(), LeaseId(0))], ..Txn::default() }
}

/// The contract says nothing of how long a call takes, and etcd is as slow as its disk.
const PATIENCE: Duration = Duration::from_secs(20);

async fn check_contract(cluster: &Cluster) {
    let client = async || EtcdDcs::connect(&cluster.config(), SystemClock, PATIENCE).await.unwrap();
    let (dcs, other) = (client().await, client().await);
    let subject = Subject { dcs, other, clock: SystemClock, prefix: "/contract/".to_owned() };
    let endpoint = cluster.members[0].url.clone();
    let compact = async |revision: Revision| {
        let mut client = etcd_client::Client::connect([&endpoint], None).await.unwrap();
        client.compact(revision.0, None).await.unwrap();
    };
    subject.check(compact).await;
    contract::routers(&ClusterStore::new(client().await, Paths::new("contract", "routers"))).await;
    contract::late_moves(client().await, Paths::new("contract", "moves")).await;
}

#[tokio::test]
async fn one_member_keeps_the_contract() {
    check_contract(&Cluster::start(1).await).await;
}

#[tokio::test]
async fn whoever_knows_one_member_finds_the_others() {
    let mut cluster = Cluster::start(3).await;
    let config = Etcd { endpoints: vec![cluster.members[0].url.clone()], ..Etcd::default() };
    let (dcs, fixed) = (connect(&config).await, connect(&Etcd { use_proxies: true, ..config.clone() }).await);
    let mut others: Vec<_> = cluster.members[1..].iter().map(|member| member.url.clone()).collect();
    others.sort();
    assert_eq!(dcs.look_for_members().await.unwrap(), others);
    assert_eq!(fixed.look_for_members().await.unwrap(), [""; 0]);
    let lease = dcs.grant(Duration::from_secs(5)).await.unwrap();
    cluster.kill(0);
    eventually("the others go on", Duration::from_secs(20), async || dcs.txn(put("/found", "x")).await.is_ok()).await;
    assert!(matches!(fixed.read("/found").await, Err(DcsError::Unavailable(_) | DcsError::Timeout(_))));
    assert_eq!(dcs.look_for_members().await.unwrap(), others, "told by one of them");
    dcs.renew(lease.id, "/x").await.unwrap();
    // What is configured anew is all that counts, until somebody looks.
    assert!(dcs.reload(&Etcd { endpoints: vec!["http://127.0.0.1:1".to_owned()], ..Etcd::default() }).unwrap());
    assert!(dcs.read("/found").await.is_err());
}

/// A member that was found is taken out, and becomes the whole of another etcd cluster at the same address.
#[tokio::test]
async fn a_member_of_another_cluster_by_now_is_not_asked() {
    let (mut cluster, mut other) = (Cluster::start(3).await, Cluster::start(1).await);
    let config = Etcd { endpoints: vec![cluster.members[0].url.clone()], ..Etcd::default() };
    let dcs = connect(&config).await;
    assert_eq!(dcs.look_for_members().await.unwrap().len(), 2);
    other.kill(0);
    cluster.kill(0);
    eventually("the others go on", Duration::from_secs(20), async || dcs.read("/whose").await.is_ok()).await;
    let taken = cluster.members[1].url.clone();
    (0..3).for_each(|index| cluster.kill(index));
    other.members[0].client_port = cluster.members[1].client_port;
    other.run(0);
    let there = connect(&Etcd { endpoints: vec![taken], ..Etcd::default() }).await;
    let written = async || there.txn(put("/whose", "another's")).await.is_ok();
    eventually("the other cluster is up", Duration::from_secs(20), written).await;
    for _ in 0..3 {
        assert!(matches!(dcs.read("/whose").await, Err(DcsError::Unavailable(_) | DcsError::Timeout(_))));
    }
}

#[tokio::test]
async fn three_members_keep_the_contract() {
    check_contract(&Cluster::start(3).await).await;
}

#[tokio::test]
async fn etcd_3_5_keeps_the_contract() {
    let Some(etcd) = support::etcd_35() else { return };
    check_contract(&Cluster::start_of(etcd.clone(), 1).await).await;
    check_contract(&Cluster::start_of(etcd, 3).await).await;
}

/// Renews every half second for `duration`; gives the longest time between two renewals as the lease sees it.
async fn longest_gap(dcs: &EtcdDcs<SystemClock>, lease: Lease, duration: Duration) -> Duration {
    let end = SystemClock.now() + duration;
    let mut sent = lease.until - lease.ttl;
    let mut longest = Duration::ZERO;
    while SystemClock.now() < end {
        match dcs.renew(lease.id, "/x").await {
            Ok((renewed, _)) => {
                longest = longest.max((renewed.until - renewed.ttl).since(sent));
                sent = renewed.until - renewed.ttl;
                SystemClock.sleep(Duration::from_millis(500)).await;
            }
            Err(DcsError::LeaseLost) => panic!("the lease was lost after a gap of {:?}", SystemClock.now().since(sent)),
            Err(_) => (),
        }
    }
    longest
}

async fn follow(cluster: &Cluster) -> (Store, watch::Receiver<Knowledge>) {
    let paths = Paths::new("service", "demo");
    let following = ClusterStore::new(cluster.client().await, paths.clone());
    let mut known = Follower::spawn(following, SystemClock);
    known.wait_for(|known| known.view.is_some()).await.unwrap();
    (ClusterStore::new(cluster.client().await, paths), known)
}

/// Writes a new leader through whatever still works until the follower shows it. Again and again, because an earlier
/// write that a frozen member never answered is carried out when it thaws, and may come in between.
async fn converges(store: &Store, known: &mut watch::Receiver<Knowledge>, name: &str) {
    let shows_it = |known: &Knowledge| {
        let leader = known.view.as_ref().and_then(|view| view.leader.as_ref());
        leader.is_some_and(|leader| leader.name.as_str() == name) && known.trouble.is_none()
    };
    eventually("the follower shows what was written", Duration::from_secs(20), async || {
        let written = store.take_leader(&name.into(), LeaseId(0)).await;
        written.is_ok() && tokio::time::timeout(Duration::from_secs(3), known.wait_for(shows_it)).await.is_ok()
    })
    .await;
}

#[tokio::test]
async fn a_hung_member_first_in_the_list_costs_one_deadline() {
    let mut cluster = Cluster::start(3).await;
    let follower = (cluster.leader().await + 1) % 3;
    cluster.put_first(follower);
    let dcs = cluster.client().await;
    let (store, mut known) = follow(&cluster).await;
    let lease = dcs.grant(Duration::from_secs(5)).await.unwrap();
    cluster.freeze(0);

    // A client that starts now meets the hung member first.
    let fresh = cluster.client().await;
    let read = async || {
        let before = SystemClock.now();
        fresh.read("/").await.expect("another member answers");
        SystemClock.now().since(before)
    };
    let (first, second) = (read().await, read().await);
    assert!(first < RETRY_TIMEOUT, "{first:?}");
    assert!(second < first, "the hung member is not asked again, but it took {second:?} after {first:?}");

    let gap = longest_gap(&dcs, lease, Duration::from_secs(6)).await;
    assert!(gap < Duration::from_millis(1500), "no renewal for {gap:?}");
    converges(&store, &mut known, "a").await;
    cluster.thaw(0);
    converges(&store, &mut known, "b").await;
}

#[tokio::test]
async fn a_transaction_without_an_answer_is_not_sent_again() {
    let mut cluster = Cluster::start(3).await;
    let follower = (cluster.leader().await + 1) % 3;
    cluster.put_first(follower);
    let dcs = cluster.client().await;
    dcs.txn(put("/counted", "0")).await.unwrap();
    cluster.freeze(0);
    let lost = dcs.txn(put("/counted", "1")).await;
    assert!(matches!(lost, Err(DcsError::Timeout(_))), "{lost:?}");
    let now = dcs.read("/counted").await.unwrap();
    assert_eq!(now.entries[0].value, b"0", "nobody else was asked to do it");
}

#[tokio::test]
async fn a_killed_etcd_leader_loses_no_lease() {
    let mut cluster = Cluster::start(3).await;
    let leader = cluster.leader().await;
    cluster.put_first(leader);
    let dcs = cluster.client().await;
    let (store, mut known) = follow(&cluster).await;
    let lease = dcs.grant(Duration::from_secs(5)).await.unwrap();
    cluster.kill(0);
    let gap = longest_gap(&dcs, lease, Duration::from_secs(6)).await;
    assert!(gap < Duration::from_millis(4500), "no renewal for {gap:?}");
    converges(&store, &mut known, "a").await;
    cluster.run(0);
    converges(&store, &mut known, "b").await;
}

#[tokio::test]
async fn a_hung_etcd_leader_loses_no_lease() {
    let mut cluster = Cluster::start(3).await;
    let leader = cluster.leader().await;
    cluster.put_first(leader);
    let dcs = cluster.client().await;
    let (store, mut known) = follow(&cluster).await;
    let lease = dcs.grant(Duration::from_secs(5)).await.unwrap();
    cluster.freeze(0);
    let gap = longest_gap(&dcs, lease, Duration::from_secs(6)).await;
    assert!(gap < Duration::from_millis(4500), "no renewal for {gap:?}");
    converges(&store, &mut known, "a").await;
    cluster.thaw(0);
    converges(&store, &mut known, "b").await;
}

/// What thaws with renewals in its sockets may answer them before it hears that it is deposed, if it is older than 3.4.31.
#[tokio::test]
async fn a_deposed_leader_of_etcd_prolongs_no_lease() {
    let ttl = Duration::from_secs(10);
    let mut cluster = Cluster::start(3).await;
    let leader = cluster.leader().await;
    cluster.put_first(leader);
    let deposed = Etcd { endpoints: vec![cluster.members[0].url.clone()], ..Etcd::default() };
    // Whether it does is a matter of which of its threads are first, so it is asked by many.
    let clients: Vec<_> = futures::future::join_all((0..32).map(|_| connect(&deposed))).await;
    let lease = clients[0].grant(ttl).await.unwrap();
    for client in &clients {
        client.renew(lease.id, "/x").await.expect("renewed by the leader");
    }
    let renewed_at = SystemClock.now();
    cluster.freeze(0);
    // Long enough that what the others keep the lease for, from their election on, is told from a lease begun anew.
    SystemClock.sleep(ttl / 2).await;
    let renewals: Vec<_> =
        clients.into_iter().map(|client| tokio::spawn(async move { client.renew(lease.id, "/x").await })).collect();
    SystemClock.sleep(Duration::from_millis(100)).await;
    cluster.thaw(0);
    let answers = futures::future::join_all(renewals).await.into_iter().flatten().flatten();
    let claimed = answers.map(|(renewed, _)| renewed.until).max().unwrap_or(renewed_at + ttl);
    let mut other = etcd_client::Client::connect([&cluster.members[1].url], None).await.unwrap();
    let kept = other.lease_time_to_live(lease.id.0, None).await.unwrap().ttl();
    // In whole seconds, rounded down.
    let kept_until = SystemClock.now() + Duration::from_secs(kept.unsigned_abs() + 1);
    assert!(claimed <= kept_until, "counted on for {:?} longer than it is kept", claimed.since(kept_until));
}

#[tokio::test]
async fn a_lost_quorum_is_reported() {
    let cluster = Cluster::start(3).await;
    let (store, mut known) = follow(&cluster).await;
    let lease = store.grant(Duration::from_secs(5)).await.unwrap();
    cluster.freeze(1);
    cluster.freeze(2);
    let lost = SystemClock.now();
    let answers = [store.read().await.err(), store.renew(lease.id).await.err()];
    for error in answers {
        assert!(matches!(error, Some(DcsError::Timeout(_) | DcsError::Unavailable(_))), "{error:?}");
    }
    let doubts = known.wait_for(|known| known.trouble.is_some());
    tokio::time::timeout(Duration::from_secs(10), doubts).await.expect("reported").unwrap();
    let asked = SystemClock.now();
    assert!(store.read().await.is_err() && store.take_leader(&"x".into(), LeaseId(0)).await.is_err());
    assert!(SystemClock.now().since(asked) < 2 * RETRY_TIMEOUT + Duration::from_millis(500), "calls are bounded");
    let confirmed = known.borrow().confirmed_at.unwrap();
    assert!(confirmed.since(lost) < Duration::from_secs(7), "what nobody confirmed is not called confirmed");
    cluster.thaw(1);
    cluster.thaw(2);
    converges(&store, &mut known, "a").await;
}

#[tokio::test]
async fn a_restarted_member_is_followed_again() {
    let mut cluster = Cluster::start(1).await;
    let (store, mut known) = follow(&cluster).await;
    for name in ["a", "b"] {
        cluster.kill(0);
        let doubts = known.wait_for(|known| known.trouble.is_some());
        // At once where the watch is open; after one call where it is only being opened.
        tokio::time::timeout(2 * RETRY_TIMEOUT, doubts).await.expect("noticed").unwrap();
        cluster.run(0);
        converges(&store, &mut known, name).await;
    }
}

#[tokio::test]
async fn nobody_there_is_not_the_same_as_no_answer() {
    let mut cluster = Cluster::start(1).await;
    cluster.kill(0);
    let dcs = cluster.client().await;
    let refused = dcs.txn(put("/x", "1")).await;
    assert!(matches!(refused, Err(DcsError::Unavailable(_))), "certainly not carried out: {refused:?}");
    assert!(matches!(dcs.read("/").await, Err(DcsError::Unavailable(_))));
    cluster.run(0);
    eventually("etcd is back", Duration::from_secs(10), async || dcs.txn(put("/x", "1")).await.is_ok()).await;
    cluster.freeze(0);
    let hung = dcs.txn(put("/x", "2")).await;
    assert!(matches!(hung, Err(DcsError::Timeout(_))), "may have been carried out: {hung:?}");
    let before = SystemClock.now();
    dcs.set_retry_timeout(Duration::from_millis(300));
    assert!(dcs.read("/").await.is_err());
    assert!(SystemClock.now().since(before) < Duration::from_millis(600), "the bound can be changed");
}

#[tokio::test]
async fn logs_in_again_when_its_token_is_gone() {
    let mut cluster = Cluster::start(1).await;
    let mut admin = etcd_client::Client::connect([&cluster.members[0].url], None).await.unwrap();
    let config = cluster.config();
    let user =
        |password: &str| Etcd { authentication: Some(("root".to_owned(), Secret::new(password))), ..config.clone() };
    let (right, wrong) = (user("secret"), user("guess"));
    connect(&right).await.read("/").await.expect("a login where none is needed does no harm");
    admin.user_add("root", "secret", None).await.unwrap();
    admin.user_grant_role("root", "root").await.unwrap();
    let early = connect(&right).await;
    early.read("/").await.unwrap();
    admin.auth_enable().await.unwrap();

    let refused = connect(&wrong).await.read("/").await;
    assert!(matches!(refused, Err(DcsError::Refused(_))), "{refused:?}");
    let nobody = cluster.client().await.read("/").await;
    assert!(nobody.is_err(), "{nobody:?}");
    early.read("/").await.expect("logs in once it must");
    let dcs = connect(&right).await;
    let lease = dcs.grant(Duration::from_secs(5)).await.unwrap();
    dcs.txn(put("/x", "1")).await.unwrap();

    // Tokens of the simple kind live in the member's memory.
    cluster.kill(0);
    cluster.run(0);
    eventually("etcd is back", Duration::from_secs(10), async || dcs.read("/x").await.is_ok()).await;
    dcs.renew(lease.id, "/x").await.expect("renewed with a new token");
    dcs.txn(put("/x", "2")).await.unwrap();

    let login = etcd_client::ConnectOptions::new().with_user("root", "secret");
    let mut admin = etcd_client::Client::connect([&cluster.members[0].url], Some(login)).await.unwrap();
    admin.user_change_password("root", "another").await.unwrap();
    eventually("the old password is refused", Duration::from_secs(10), async || dcs.read("/x").await.is_err()).await;
    assert_eq!(dcs.reload(&user("another")), Ok(true));
    dcs.renew(lease.id, "/x").await.expect("renewed with the new password");
    assert_eq!(dcs.reload(&user("another")), Ok(false), "what has not changed is not done again");
}

/// One that may do no more than read and write its keys.
async fn members_are_found_by_an_ordinary_user(mut cluster: Cluster) {
    let config = Etcd { endpoints: vec![cluster.members[0].url.clone()], ..Etcd::default() };
    cluster.ready(&config).await;
    let mut admin = etcd_client::Client::connect([&config.endpoints[0]], None).await.unwrap();
    for name in ["root", "agent"] {
        admin.user_add(name, "secret", None).await.unwrap();
        admin.role_add(name).await.unwrap();
        admin.user_grant_role(name, name).await.unwrap();
    }
    let keys = etcd_client::Permission::read_write("/found").with_prefix();
    admin.role_grant_permission("agent", keys).await.unwrap();
    admin.auth_enable().await.unwrap();
    let dcs = connect(&Etcd { authentication: Some(("agent".to_owned(), Secret::new("secret"))), ..config }).await;
    dcs.txn(put("/found", "1")).await.unwrap();
    assert_eq!(dcs.look_for_members().await.unwrap().len(), 2);
    cluster.kill(0);
    eventually("the others go on", Duration::from_secs(20), async || dcs.txn(put("/found", "2")).await.is_ok()).await;
}

#[tokio::test]
async fn an_ordinary_user_finds_the_members() {
    members_are_found_by_an_ordinary_user(Cluster::start(3).await).await;
    let Some(etcd) = support::etcd_35() else { return };
    members_are_found_by_an_ordinary_user(Cluster::start_of(etcd, 3).await).await;
}

#[tokio::test]
async fn speaks_tls_with_certificates_on_both_sides() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let openssl = |args: &str| {
        let done =
            std::process::Command::new("openssl").args(args.split(' ')).current_dir(dir.path()).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    };
    std::fs::write(path("ext"), "subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth").unwrap();
    openssl("req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -subj /CN=ca -days 2");
    openssl("req -newkey rsa:2048 -nodes -keyout node.key -out node.csr -subj /CN=node");
    openssl("x509 -req -in node.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out node.pem -days 2 -extfile ext");
    let copy = |from: &str, to: &str| {
        for kind in ["key", "pem"] {
            std::fs::copy(path(&format!("{from}.{kind}")), path(&format!("{to}.{kind}"))).unwrap();
        }
    };
    copy("node", "client");
    let options = [("cert-file", "node.pem"), ("key-file", "node.key"), ("trusted-ca-file", "ca.pem")];
    let mut extra: Vec<String> = options.iter().map(|(option, file)| format!("--{option}={}", path(file))).collect();
    extra.push("--client-cert-auth=true".to_owned());
    let cluster = Cluster::start_with("etcd".into(), 1, "https", &extra);
    let config = Etcd {
        cacert: Some(path("ca.pem").into()),
        cert: Some(path("client.pem").into()),
        key: Some(path("client.key").into()),
        ..cluster.config()
    };
    cluster.ready(&config).await;
    connect(&config).await.txn(put("/x", "1")).await.unwrap();
    let without = connect(&Etcd { cert: None, key: None, ..config.clone() }).await;
    assert!(without.read("/").await.is_err(), "a client without a certificate is refused");
    assert_eq!(without.reload(&config), Ok(true));
    without.read("/").await.expect("it has one now");
    openssl("req -x509 -newkey rsa:2048 -nodes -keyout other.key -out other.pem -subj /CN=other -days 2");
    copy("other", "client");
    assert_eq!(without.reload(&config), Ok(true), "another content of the same files");
    assert!(without.read("/").await.is_err(), "it is nobody's any more");
    std::fs::remove_file(path("client.pem")).unwrap();
    assert!(matches!(without.reload(&config), Err(DcsError::Refused(text)) if text.contains("etcd3.cert")));
    let stranger = connect(&cluster.config()).await.read("/").await;
    assert!(stranger.is_err(), "a server of an unknown authority is refused");
    let missing = Etcd { cacert: Some(path("none").into()), ..config };
    let missing = EtcdDcs::connect(&missing, SystemClock, RETRY_TIMEOUT).await.err();
    assert!(matches!(&missing, Some(DcsError::Refused(text)) if text.contains("etcd3.cacert")), "{missing:?}");
}
