//! Restarts that an operator asks for.

use super::*;
use crate::ha::decide::restart::decide as decide_restart;
use crate::node::RestartFilter;

/// As what the server comes back without conditions: the server that it left, if it runs, is a primary's or a standby's.
fn comes_back(world: &World) -> Result<StartAs, &'static str> {
    let left = match &world.pg {
        PgStatus::Stopped(control) => control.clone(),
        PgStatus::Running(running) if running.role == PgRole::Standby => left(ControlState::ShutDownInRecovery, true),
        _ => left(ControlState::ShutDown, false),
    };
    decide_restart(&world.situation(), &RestartFilter::default()).map(|come_back| come_back.role(&left))
}

fn left(state: ControlState, standby: bool) -> ControlData {
    match stopped(state, standby) {
        PgStatus::Stopped(control) => control,
        _ => unreachable!("it is stopped"),
    }
}

fn follows_whom(role: Result<StartAs, &'static str>) -> Option<String> {
    match role {
        Ok(StartAs::Standby(upstream)) => Some(upstream.map_or("nobody".to_owned(), |upstream| upstream.host)),
        _ => None,
    }
}

/// A pause, in which our server, which took writes, was stopped in order.
fn stopped_in_a_pause() -> World {
    let mut world = world().leaderless();
    world.view().settings.pause = true;
    world.pg = stopped(ControlState::ShutDown, false);
    world.memory.was_primary = true;
    world
}

#[test]
fn a_primary_that_was_stopped_in_a_pause_comes_back_as_one() {
    assert_eq!(comes_back(&stopped_in_a_pause()), Ok(StartAs::Primary));
    let mut crashed = stopped_in_a_pause();
    crashed.pg = stopped(ControlState::InProduction, false);
    assert_eq!(comes_back(&crashed), Ok(StartAs::Primary));
    let mut standby = stopped_in_a_pause();
    standby.pg = stopped(ControlState::ShutDown, true);
    assert_eq!(follows_whom(comes_back(&standby)).as_deref(), Some("nobody"), "it never took writes");
}

#[test]
fn a_stopped_primary_does_not_come_back_as_one_beside_another_leader() {
    let unless = |change: &dyn Fn(&mut World)| {
        let mut world = stopped_in_a_pause();
        change(&mut world);
        follows_whom(comes_back(&world))
    };
    assert!(unless(&|world| world.view().settings.pause = false).is_some(), "positions are compared first");
    assert!(unless(&|world| *world = world.clone().requested(None, Some("c"))).is_some(), "c is to lead");
    assert!(unless(&|world| world.memory.demoted = true).is_some(), "it has handed over");
    let led = |name: &str| SyncState { leader: Some(name.into()), ..SyncState::default() };
    assert!(
        unless(&|world| world.view().sync = led("c")).is_some(),
        "c was elected since, and commits need not be here"
    );
    assert_eq!(unless(&|world| world.view().sync = led("b")), None, "it was the last");
    let led = |world: &mut World| world.view = super::world().view.map(|mut view| (view.settings.pause = true, view).1);
    assert_eq!(unless(&led).as_deref(), Some("127.0.0.1"), "a leads");
    let promoted = |world: &mut World| {
        let line = HistoryLine {
            timeline: TimelineId(1),
            switchpoint: Lsn(800),
            reason: String::new(),
            promoted_at: None,
            new_leader: Some("a".to_owned()),
        };
        world.view().history = vec![line];
    };
    assert!(unless(&promoted).is_some(), "a was promoted beside it");
    let section = json!({ "host": "outside" });
    let outside = |world: &mut World| world.view().settings.standby_cluster = section.as_object().cloned();
    assert!(unless(&outside).is_some(), "nobody takes writes in a standby cluster");
}

#[test]
fn a_leader_whose_server_is_down_comes_back_in_place() {
    let mut leader = world().leading();
    assert_eq!(comes_back(&leader), Ok(StartAs::Primary));
    leader.pg = stopped(ControlState::ShutDown, false);
    assert_eq!(comes_back(&leader), Ok(StartAs::Primary));
    leader.leader_until = None;
    assert!(follows_whom(comes_back(&leader)).is_some(), "the key has run out");
}

#[test]
fn a_server_that_does_not_answer_comes_back_as_what_it_was() {
    for pg in [PgStatus::Unresponsive, PgStatus::Refusing("no connection left".into()), PgStatus::Starting] {
        let world = World { pg, ..world() };
        let come_back = decide_restart(&world.situation(), &RestartFilter::default()).unwrap();
        let standby = come_back.clone().role(&left(ControlState::InArchiveRecovery, true));
        assert_eq!(follows_whom(Ok(standby)).as_deref(), Some("127.0.0.1"));
        assert_eq!(come_back.role(&left(ControlState::InProduction, false)), StartAs::Primary);
    }
    for pg in [PgStatus::NoData, PgStatus::Broken("no pg_control".into())] {
        assert!(comes_back(&World { pg, ..world() }).is_err());
    }
}

#[test]
fn the_leader_of_a_standby_cluster_comes_back_to_follow_the_server_outside() {
    let mut leader = world().leading();
    leader.view().settings.standby_cluster = json!({ "host": "outside" }).as_object().cloned();
    leader.pg = standby(1000);
    assert_eq!(follows_whom(comes_back(&leader)).as_deref(), Some("outside"));
    leader.leader_until = None;
    leader.view().leader = Some(key("a"));
    assert_eq!(follows_whom(comes_back(&leader)).as_deref(), Some("127.0.0.1"));
}

#[test]
fn conditions_hold_whatever_the_state_of_the_server() {
    let refused = |world: &World, filter: RestartFilter| decide_restart(&world.situation(), &filter).err();
    let role = |role: &str| RestartFilter { role: Some(role.to_owned()), ..RestartFilter::default() };
    let older = |version: u32| RestartFilter { older_than: Some(version), ..RestartFilter::default() };
    let pending = || RestartFilter { pending: true, ..RestartFilter::default() };

    let mut replica = world();
    assert_eq!(refused(&replica, role("replica")), None);
    assert_eq!(refused(&replica, older(150_019)), None);
    assert!(refused(&replica, role("primary")).is_some());
    assert!(refused(&replica, older(150_018)).is_some());
    assert!(refused(&replica, pending()).is_some());
    if let PgStatus::Running(running) = &mut replica.pg {
        running.pending_restart.insert("max_connections".to_owned(), json!({}));
    }
    assert_eq!(refused(&replica, pending()), None);

    let mut down = stopped_in_a_pause();
    for pg in [down.pg.clone(), PgStatus::Unresponsive] {
        down.pg = pg;
        assert_eq!(refused(&down, role("primary")), None);
        assert!(refused(&down, role("replica")).is_some());
        assert!(refused(&down, older(999_999)).is_some(), "nobody tells its version");
        assert!(refused(&down, pending()).is_some());
    }
}
