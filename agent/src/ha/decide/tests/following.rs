//! Somebody else leads: how a node follows, compares its history and comes back.

use super::*;

#[test]
fn a_comparison_that_is_tried_again_and_again_is_said_once() {
    let mut down = world();
    down.pg = stopped(ControlState::ShutDown, false);
    down.memory.divergence = DivergenceState::Check;
    let mut dry = world();
    let PgStatus::Running(running) = &mut dry.pg else { unreachable!() };
    running.replication_state = None;
    dry.view().members.get_mut(&"a".into()).unwrap().timeline = Some(TimelineId(2));
    for mut world in [down, dry] {
        assert!(matches!(world.decide().action, Action::CheckDivergence(_)));
        world.memory.last_failure = Some("a has no checkpoint on its timeline yet".to_owned());
        let again = world.decide();
        assert!(matches!(again.action, Action::CheckDivergence(_)));
        world.memory.retry_at = Some(NOW + Duration::from_millis(200));
        let waits = world.decide();
        assert_eq!((waits.action.label(), &waits.reason), ("wait", &again.reason));
        assert!(waits.reason.contains("no checkpoint"), "{}", waits.reason);
    }
}

#[test]
fn a_standby_that_gets_nothing_says_so() {
    let mut dry = world();
    let PgStatus::Running(running) = &mut dry.pg else { unreachable!() };
    running.replication_state = None;
    dry.memory.dry_since = Some(NOW - follower::DRY * 2);
    assert!(matches!(dry.decide().action, Action::CheckDivergence(_)), "{:?}", dry.decide());
    dry.me.use_pg_rewind = false;
    let waits = dry.decide();
    assert_eq!(waits.action, Action::Wait);
    let expected = "following a, but nothing is streamed from a: PostgreSQL's log says why, \
                    and neither pg_rewind nor a new copy is allowed here";
    assert_eq!(waits.reason, expected);
}

#[test]
fn steady_states_do_nothing() {
    assert_eq!(world().decide().action, Action::Wait);
    assert_eq!(world().decide().reason, "no action. I am (b), a secondary, and following a leader (a)");
    assert_eq!(world().leading().decide().action, Action::Lead);
    assert_eq!(world().leading().decide().reason, "no action. I am (b), the leader with the lock");
}

#[test]
fn paused_replay_is_resumed_unless_the_cluster_is_paused_too() {
    let pauses = |mut world: World, version| {
        let PgStatus::Running(running) = &mut world.pg else { unreachable!() };
        (running.replay_paused, running.server_version) = (true, version);
        world
    };
    let mut standby_leader = world().leading();
    standby_leader.view().settings.standby_cluster = json!({ "host": "127.0.0.1", "port": 1 }).as_object().cloned();
    let mut elected = world().leading();
    elected.memory.elected = Some(Revision(50));
    for mut world in [world(), standby_leader, elected] {
        world.pg = standby(1000);
        assert_ne!(world.decide().action, Action::ResumeReplay);
        assert_eq!(pauses(world.clone(), 150_000).decide().action, Action::ResumeReplay);
        assert_ne!(pauses(world.clone(), 130_000).decide().action, Action::ResumeReplay, "it would have stopped");
        world.view().settings.pause = true;
        assert_ne!(pauses(world, 150_000).decide().action, Action::ResumeReplay);
    }
}

#[test]
fn a_slot_that_is_not_to_be_used_any_more_is_not() {
    let mut world = world();
    world.me.use_slots = false;
    let Action::Follow(Some(leader)) = world.decide().action else { panic!("{:?}", world.decide()) };
    assert_eq!((leader.name.as_str(), leader.slot), ("a", None));
    let PgStatus::Running(running) = &mut world.pg else { unreachable!() };
    running.upstream_slot = None;
    assert_eq!(world.decide().action, Action::Wait);
    world.me.use_slots = true;
    assert!(matches!(world.decide().action, Action::Follow(Some(leader)) if leader.slot.as_deref() == Some("b")));
}

#[test]
fn a_leader_without_an_address_is_not_unfollowed() {
    let mut hidden = world();
    hidden.view().members.remove(&"a".into());
    assert_eq!(hidden.decide().action, Action::Wait);
}

#[test]
fn in_pause_only_what_this_node_demoted_comes_back() {
    let mut down = world();
    down.view().settings.pause = true;
    down.pg = stopped(ControlState::ShutDown, false);
    assert_eq!(down.decide().action, Action::Wait, "somebody stopped it");
    down.memory.demoted = true;
    down.memory.divergence = DivergenceState::Check;
    assert!(matches!(down.decide().action, Action::CheckDivergence(_)));
}

#[test]
fn what_was_copied_in_pause_is_started() {
    let mut copy = world();
    copy.view().settings.pause = true;
    copy.pg = stopped(ControlState::InArchiveRecovery, true);
    copy.memory.fresh_copy = true;
    assert!(matches!(copy.decide().action, Action::Start(StartAs::Standby(Some(_)))));
}

#[test]
fn a_standby_that_did_not_start_is_compared_where_somebody_can_tell() {
    let mut down = world();
    down.pg = stopped(ControlState::ShutDownInRecovery, true);
    down.memory.divergence = DivergenceState::DidNotStart;
    assert!(matches!(down.decide().action, Action::CheckDivergence(source) if source.name == "a".into()));
    down.view().members.get_mut(&"a".into()).unwrap().state = "starting".to_owned();
    assert!(matches!(down.decide().action, Action::Start(StartAs::Standby(_))), "it may have had another reason");
    down.memory.divergence = DivergenceState::Check;
    assert_eq!(down.decide().action, Action::Wait);
}

#[test]
fn a_half_rewound_directory_is_not_started() {
    let mut cut_off = world().leaderless();
    cut_off.pg = stopped(ControlState::InProduction, false);
    cut_off.memory.divergence = DivergenceState::RewindFailed("cut off".to_owned());
    assert_eq!(cut_off.decide().action, Action::Wait);
}

#[test]
fn a_deposed_primary_compares_rewinds_and_only_then_follows() {
    let mut deposed = world();
    deposed.pg = stopped(ControlState::InProduction, false);
    deposed.memory.divergence = DivergenceState::Check;
    assert!(matches!(deposed.decide().action, Action::CheckDivergence(source) if source.name == "a".into()));
    deposed.memory.divergence = DivergenceState::Rewind("past the fork".to_owned());
    assert!(matches!(deposed.decide().action, Action::Rewind(_)));
    deposed.memory.divergence = DivergenceState::RewindFailed("no WAL".to_owned());
    assert_eq!(deposed.decide().action, Action::Wait);
    deposed.me.reclone_unrewindable = true;
    assert!(matches!(deposed.decide().action, Action::Reclone(_)));
    deposed.memory.divergence = DivergenceState::NotAsked;
    assert!(matches!(deposed.decide().action, Action::Start(StartAs::Standby(Some(_)))));
    // The new leader is not promoted yet: nothing to compare with.
    deposed.memory.divergence = DivergenceState::Check;
    deposed.view().members.get_mut(&"a".into()).unwrap().role = "replica".to_owned();
    assert_eq!(deposed.decide().action, Action::Wait);
}

#[test]
fn a_former_primary_that_came_up_while_nobody_led_is_compared_before_it_follows() {
    let mut deposed = world();
    if let PgStatus::Running(running) = &mut deposed.pg {
        running.upstream = None;
    }
    assert!(matches!(deposed.decide().action, Action::Follow(Some(_))), "any other standby follows");
    deposed.memory.divergence = DivergenceState::Check;
    assert!(matches!(deposed.decide().action, Action::CheckDivergence(source) if source.name == "a".into()));
    deposed.memory.divergence = DivergenceState::RewindFailed("two nodes have begun its timeline".to_owned());
    assert_eq!(deposed.decide().action, Action::Wait);
    deposed.me.reclone_unrewindable = true;
    assert!(matches!(deposed.decide().action, Action::Reclone(_)));
    deposed.memory.divergence = DivergenceState::Check;
    deposed.view().members.get_mut(&"a".into()).unwrap().role = "replica".to_owned();
    assert_eq!(deposed.decide().action, Action::Wait, "the new leader is not promoted yet");
}

#[test]
fn data_of_another_cluster_ends_the_agent() {
    let mut foreign = world();
    foreign.view().initialize = Initialize::Done(SystemId(1_234_567_890));
    assert_eq!(foreign.decide().action, Action::Exit);
    foreign.view().settings.pause = true;
    assert_eq!(foreign.decide().action, Action::Wait);
    let mut leads = foreign.leading();
    assert_eq!(leads.decide().action, Action::Wait, "the key is kept by one that takes writes");
    for down in [standby(1000), stopped(ControlState::ShutDown, false)] {
        leads.pg = down;
        assert_eq!(leads.decide().action, Action::Release);
    }
}
