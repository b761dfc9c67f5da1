//! A cluster that follows another one.

use super::*;

/// A standby cluster that follows `outside:5433`.
fn standby_cluster() -> World {
    let mut world = world();
    let section = serde_json::json!({ "host": "outside", "port": 5433, "primary_slot_name": "us" });
    world.view().settings.standby_cluster = section.as_object().cloned();
    world
}

fn standby_leader() -> World {
    World { pg: standby(1000), ..standby_cluster().leading() }
}

fn follows(world: &mut World, upstream: &str) {
    if let PgStatus::Running(running) = &mut world.pg {
        running.upstream = Some(upstream.to_owned());
        running.upstream_slot = Some(if upstream.starts_with("outside") { "us" } else { "b" }.to_owned());
    }
}

#[test]
fn the_leader_of_a_standby_cluster_follows_the_server_outside_and_is_never_promoted() {
    let mut leader = standby_leader();
    let Action::Follow(Some(remote)) = leader.decide().action else { panic!("{:?}", leader.decide()) };
    assert_eq!((remote.host.as_str(), remote.port, remote.slot.as_deref()), ("outside", 5433, Some("us")));
    follows(&mut leader, "outside:5433");
    assert_eq!(leader.decide().action, Action::Lead);
    let mut archive = leader.clone();
    archive.view().settings.standby_cluster = serde_json::json!({ "restore_command": "cp" }).as_object().cloned();
    assert_eq!(archive.decide().action, Action::Follow(None), "only the archive is left");
    let mut down = leader.clone();
    down.pg = stopped(ControlState::ShutDownInRecovery, true);
    assert!(matches!(down.decide().action, Action::Start(StartAs::Standby(Some(remote))) if remote.host == "outside"));
    down.pg = stopped(ControlState::ShutDown, false);
    down.memory.divergence = DivergenceState::Check;
    assert!(matches!(down.decide().action, Action::CheckDivergence(remote) if remote.host == "outside"));
    let mut late = leader.clone().left(300);
    late.dcs_away = true;
    assert_eq!(late.decide().action, Action::Resign, "and is not killed for it");
    leader.view().settings.standby_cluster = None;
    assert!(!matches!(leader.decide().action, Action::Lead | Action::Follow(_)), "an ordinary cluster again");
}

#[test]
fn a_cluster_becomes_a_standby_cluster() {
    let mut primary_leads = standby_cluster().leading();
    assert_eq!(primary_leads.decide().action, Action::DemoteCluster);
    primary_leads.view().settings.pause = true;
    assert_eq!(primary_leads.decide().action, Action::Lead);
}

#[test]
fn a_switchover_in_a_standby_cluster_stops_nothing() {
    let mut asked = standby_leader().requested(Some("b"), Some("c"));
    follows(&mut asked, "outside:5433");
    assert!(matches!(asked.decide().action, Action::Ask(_)));
    assert_eq!(asked.answers(&[("c", peer(1000))]).decide().action, Action::Release);
}

#[test]
fn members_of_a_standby_cluster_race_and_follow_its_leader() {
    let mut world = standby_cluster();
    assert_eq!(world.decide().action, Action::Wait, "a replica of the leader");
    world.view().leader = None;
    assert!(matches!(world.clone().answers(&[("a", None), ("c", peer(1000))]).decide().action, Action::Acquire(_)));
    world.pg = PgStatus::NoData;
    world.view().initialize = Initialize::Absent;
    world.view().members.clear();
    assert!(matches!(world.decide().action, Action::CloneRemote(Some(remote)) if remote.host == "outside"));
    let mut copy = standby_cluster();
    copy.pg = PgStatus::NoData;
    copy.view().members.get_mut(&"a".into()).unwrap().role = "standby_leader".to_owned();
    assert!(matches!(copy.decide().action, Action::Clone(source) if source.name.as_str() == "a"));
}
