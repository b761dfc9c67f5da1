//! Nobody leads: who races, who waits, and who makes a cluster.

use super::*;

#[test]
fn a_member_judges_itself_as_if_the_leader_were_gone() {
    let judged = |world: &World| {
        let decision = without_leader(&world.situation());
        format!("{}: {}", decision.action.label(), decision.reason)
    };
    let asked = world().answers(&[("c", peer(1000))]);
    assert_eq!(judged(&asked), "acquire: at 0/3E8 with priority 1; nobody is a better choice (c is at 0/3E8)");
    let behind = world().answers(&[("c", peer(1001))]);
    assert_eq!(judged(&behind), "abstain: Wal position of c is ahead of my wal position (0/3E9 > 0/3E8)");
    let mut never = world();
    never.me.tags.insert("nofailover".to_owned(), true.into());
    assert_eq!(judged(&never), "abstain: following a different leader because I am not allowed to promote");
    let outside = world().synchronous("a", &["c"]);
    assert!(judged(&outside).starts_with("abstain: not among the synchronous nodes (a, c)"));
    let mut down = world();
    down.pg = PgStatus::Starting;
    assert_eq!(judged(&down), "wait: PostgreSQL is starting; nobody leads");
    // Who leads, or where nobody does, decides as ever.
    assert_eq!(without_leader(&world().leading().situation()), world().leading().decide());
    assert_eq!(without_leader(&world().leaderless().situation()), world().leaderless().decide());
}

#[test]
fn the_most_advanced_standby_takes_the_key_when_the_leader_is_gone() {
    let alone = world().leaderless();
    assert!(matches!(alone.decide().action, Action::Ask(members) if members.keys().map(|n| n.as_str()).eq(["c"])));
    assert_eq!(alone.clone().answers(&[("c", peer(1000))]).decide().action, Action::Acquire(None));
    assert_eq!(alone.clone().answers(&[("c", None)]).decide().action, Action::Acquire(None));
    let behind = alone.answers(&[("c", peer(1001))]).decide();
    assert_eq!(behind.action, Action::Abstain);
    assert!(behind.reason.contains("Wal position of c is ahead of my wal position"), "{}", behind.reason);
}

#[test]
fn a_standby_too_far_behind_or_not_allowed_stays_out() {
    let mut far = world().leaderless().answers(&[("c", None)]);
    far.view().status.optime = Lsn(10_000_000);
    assert_eq!(far.decide().action, Action::Abstain);
    assert!(far.decide().reason.contains("maximum_lag_on_failover"));
    let mut barred = world().leaderless().answers(&[("c", None)]);
    barred.me.tags = json!({ "nofailover": true }).as_object().unwrap().clone();
    assert_eq!(barred.decide().reason, "following a different leader because I am not allowed to promote");
}

#[test]
fn another_running_primary_stops_the_race() {
    let mut old = peer(0).unwrap();
    old.in_recovery = false;
    assert_eq!(world().leaderless().answers(&[("c", Some(old))]).decide().action, Action::Abstain);
}

#[test]
fn nobody_races_beside_a_leader_whose_lease_was_revoked_and_that_does_not_know_yet() {
    let url = |name: &str| format!("http://{name}:8008/patroni");
    let mut world = world().leaderless();
    world.memory.former_leader = Some("a".into());
    world.memory.apis.insert("a".into(), url("a"));
    world.memory.leaderless_since = Some(NOW);
    let asks = |world: &World| match world.decide().action {
        Action::Ask(members) => members.keys().map(|name| name.as_str()).collect::<Vec<_>>().join(" "),
        other => other.label().to_owned(),
    };
    let primary = || peer(0).map(|peer| PeerStatus { in_recovery: false, ..peer });
    let answered = |world: &World, a| world.clone().answers(&[("a", a), ("c", peer(1000))]).decide();

    assert_eq!(asks(&world), "a c");
    let decision = answered(&world, primary());
    assert_eq!((decision.action, decision.reason.as_str()), (Action::Abstain, "a still runs as primary"));
    assert_eq!(answered(&world, peer(2000)).action, Action::Acquire(None), "it has no key to lead with");
    assert_eq!(answered(&world, None).action, Action::Acquire(None), "its host is gone");

    // One that led unseen: the sync key names it.
    let mut unseen = world.clone();
    unseen.memory.former_leader = None;
    unseen.view().sync.leader = Some("a".into());
    assert_eq!(asks(&unseen), "a c");
    unseen.memory.apis.clear();
    assert_eq!(asks(&unseen), "c", "nobody knows where it is");

    // Also where nobody else is in question: an operator has said who is to lead, or there is nobody else.
    for mut alone in [world.clone().requested(Some("a"), Some("b")), world.clone()] {
        alone.view().members.retain(|name, _| *name == "b".into());
        assert_eq!(asks(&alone), "a");
        assert_eq!(alone.clone().answers(&[("a", primary())]).decide().action, Action::Abstain);
        assert_eq!(alone.answers(&[("a", None)]).decide().action, Action::Acquire(None));
    }

    // Whoever is in the DCS again is a member like any other.
    let mut back = world.clone();
    let member = back.view().members[&MemberName::from("c")].clone();
    back.view().members.insert("a".into(), member);
    assert_eq!(asks(&back), "a c");
    assert_eq!(back.answers(&[("a", peer(2000)), ("c", peer(1000))]).decide().action, Action::Abstain);

    // An agent that has just started knows of it by the failsafe key. After a lease's time nobody is asked any more.
    let mut started = world.clone().failsafe(&["a", "b", "c"]);
    started.memory.former_leader = None;
    started.memory.started_at = NOW - Duration::from_secs(5);
    assert_eq!(asks(&started), "a c");
    world.memory.leaderless_since = Some(NOW - Duration::from_secs(5));
    assert_eq!(asks(&world), "c");
}

#[test]
fn nobody_waits_for_a_candidate_that_may_not_race() {
    let asked = |leader: Option<&str>, answer: Option<PeerStatus>| {
        let world = world().leaderless().synchronous("a", &["b"]).requested(leader, Some("c"));
        world.answers(&[("c", answer)]).decide()
    };
    let switchover = asked(Some("a"), peer(1000));
    assert!(matches!(switchover.action, Action::Acquire(_)), "{switchover:?}");
    let failover = asked(None, peer(1000));
    assert_eq!(failover.reason, "c is the requested candidate", "an operator's word counts outside of the set, too");
    let dead = asked(None, None);
    assert!(matches!(dead.action, Action::Acquire(_)), "{dead:?}");
}

#[test]
fn who_missed_a_promotion_neither_races_nor_counts() {
    let second = |mut world: World| {
        let line = HistoryLine {
            timeline: TimelineId(1),
            switchpoint: Lsn(900),
            reason: String::new(),
            promoted_at: None,
            new_leader: None,
        };
        (world.view().history, world.view().has_history) = (vec![line], true);
        world
    };
    let behind = second(world().leaderless()).decide();
    assert_eq!(behind.action, Action::Abstain);
    assert!(behind.reason.contains("timeline 1, the cluster is on 2"), "{}", behind.reason);

    // Its number is not taken again, so an operator may prefer that to waiting.
    let manual = second(world().leaderless()).requested(None, Some("b")).decide();
    assert!(matches!(manual.action, Action::Acquire(_)), "{manual:?}");

    // In a pause a primary is left running beside the one that was promoted: its key is not its own again.
    let mut paused = second(world().leaderless());
    paused.view().settings.pause = true;
    paused.pg = primary(1000);
    let decision = paused.decide();
    assert!(!matches!(decision.action, Action::Acquire(_)), "{decision:?}");
    assert!(decision.reason.contains("timeline 1, the cluster is on 2"), "{}", decision.reason);

    let mut ahead = second(world().leaderless());
    let PgStatus::Running(running) = &mut ahead.pg else { panic!() };
    (running.timeline, running.lsn) = (Some(TimelineId(2)), Lsn(1000));
    let decision = ahead.answers(&[("c", peer(5000))]).decide();
    assert!(matches!(decision.action, Action::Acquire(_)), "{decision:?}");
}

#[test]
fn a_later_timeline_counts_more_than_a_position() {
    let on =
        |timeline: u32, lsn: u64| peer(lsn).map(|peer| PeerStatus { timeline: Some(TimelineId(timeline)), ..peer });
    // Its leader was gone before it wrote the history key.
    let missed = world().leaderless().answers(&[("c", on(2, 900))]).decide();
    assert_eq!((missed.action, missed.reason.as_str()), (Action::Abstain, "c is on timeline 2, this node on 1"));

    let mut second = world().leaderless();
    let PgStatus::Running(running) = &mut second.pg else { panic!() };
    running.timeline = Some(TimelineId(2));
    let decision = second.clone().answers(&[("c", peer(5000))]).decide();
    assert_eq!(decision.action, Action::Acquire(None), "{decision:?}");

    // A vote is the word that nobody there has more.
    let vote = |mut world: World, answer| {
        world.view().settings.synchronous_mode = SynchronousMode::Quorum;
        world.view().sync.quorum = 1;
        let decision = world.answers(&[("c", answer)]).decide();
        matches!(decision.action, Action::Acquire(_))
    };
    let first = world().leaderless().synchronous("a", &["b", "c"]);
    let second = second.synchronous("a", &["b", "c"]);
    assert!(vote(first.clone(), on(1, 900)) && vote(second.clone(), on(1, 5000)));
    assert!(!vote(first, on(2, 900)) && !vote(second, on(2, 5000)));
}

#[test]
fn who_has_not_replayed_its_own_wal_has_no_vote() {
    let asked = |reads_own_wal| {
        let mut world = world().leaderless().synchronous("a", &["b", "c"]);
        world.view().settings.synchronous_mode = SynchronousMode::Quorum;
        world.view().sync.quorum = 1;
        world.answers(&[("c", peer(900).map(|peer| PeerStatus { reads_own_wal, ..peer }))]).decide()
    };
    assert!(matches!(asked(false).action, Action::Acquire(_)), "{:?}", asked(false));
    assert_eq!(asked(true).action, Action::Abstain);
    let why = "at 0/3E8; only 0 of 1 votes needed; none of c until it has replayed what is on its disk";
    assert_eq!(asked(true).reason, why);
}

#[test]
fn nobody_waits_for_a_preferred_node_that_would_not_get_the_votes() {
    let preferred = || peer(1000).map(|peer| PeerStatus { failover_priority: 2, ..peer });
    let former_leader = |quorum| {
        let mut world = world().leaderless().synchronous("b", &["c", "d"]);
        world.view().settings.synchronous_mode = SynchronousMode::Quorum;
        world.view().sync.quorum = quorum;
        world.answers(&[("c", preferred())]).decide()
    };
    // What c needs besides its own is this node's vote, or that of d as well, which does not answer.
    assert_eq!(former_leader(1).action, Action::Abstain);
    assert!(matches!(former_leader(2).action, Action::Acquire(_)), "{:?}", former_leader(2));
}

#[test]
fn only_synchronous_nodes_race_in_synchronous_mode() {
    let outside = world().leaderless().synchronous("a", &["c"]).decide();
    assert_eq!(outside.action, Action::Abstain);
    // With nobody else in the set alive, there is nobody to ask, and the key and the list change in one transaction.
    let inside = world().leaderless().synchronous("a", &["b"]).decide();
    let Action::Acquire(Some(write)) = inside.action else { panic!("{inside:?}") };
    assert_eq!(write.seen, Revision(60));
    assert_eq!(write.value, Some(json!({ "leader": "b", "quorum": 0, "sync_standby": null })));
}

#[test]
fn higher_priority_wins_at_equal_positions() {
    let mut better = peer(1000).unwrap();
    better.failover_priority = 2;
    let decision = world().leaderless().answers(&[("c", Some(better))]).decide();
    assert_eq!(decision.reason, "c has equally tolerable WAL position and priority 2, while this node has priority 1");
}

#[test]
fn the_holder_of_the_key_promotes_and_nobody_else() {
    let mut holder = world().leading();
    holder.pg = standby(1000);
    holder.memory.elected = Some(Revision(50));
    assert_eq!(holder.decide().action, Action::Promote(None));
    holder.leader_until = Some(NOW);
    assert_eq!(holder.answers(&[("a", None), ("c", peer(1000))]).decide().action, Action::Confirm);
}

#[test]
fn nobody_races_beside_a_member_that_has_the_key_as_far_as_it_knows() {
    let holder = |lsn| peer(lsn).map(|peer| PeerStatus { holds_key: true, ..peer });
    let behind = world().leaderless().answers(&[("a", None), ("c", holder(900))]).decide();
    assert_eq!((behind.action, &*behind.reason), (Action::Abstain, "c has the leader key, as far as it knows"));
    let ahead = world().leaderless().answers(&[("a", None), ("c", holder(2000))]).decide();
    assert!(ahead.reason.starts_with("Wal position of c is ahead of my wal position"), "{}", ahead.reason);
}

#[test]
fn a_silent_primary_without_the_key_is_stopped() {
    for pg in [PgStatus::Unresponsive, PgStatus::Refusing("no connection left".into())] {
        let mut silent = world().leaderless();
        (silent.pg, silent.memory.was_primary) = (pg, true);
        assert_eq!(silent.decide().action, Action::Demote(DemoteMode::LostKey));
        let mut paused = silent.clone();
        paused.view().settings.pause = true;
        assert_eq!(paused.decide().action, Action::Wait);
        silent.memory.was_primary = false;
        assert_eq!(silent.decide().action, Action::Wait, "a standby");
    }
}

#[test]
fn who_has_heard_of_a_later_timeline_leads_only_if_an_operator_says_so() {
    let mut overtaken = world().leaderless();
    overtaken.pg = standby(1000);
    overtaken.memory.overtaken_by = Some(TimelineId(2));
    let decision = overtaken.clone().answers(&[("a", None), ("c", peer(900))]).decide();
    assert_eq!(decision.action, Action::Abstain);
    assert_eq!(decision.reason, "this node is on timeline 1, and somebody was on 2");
    assert_eq!(overtaken.clone().requested(None, Some("b")).decide().action, Action::Acquire(None));
    overtaken.memory.overtaken_by = Some(TimelineId(1));
    assert_eq!(overtaken.answers(&[("a", None), ("c", peer(900))]).decide().action, Action::Acquire(None));
}

#[test]
fn a_key_that_was_not_won_just_now_is_only_used_by_the_best_node() {
    let mut late = world().leading();
    late.pg = standby(1000);
    late.memory.elected = Some(Revision(49));
    late.memory.up_since = Some(NOW);
    assert!(matches!(late.decide().action, Action::Ask(_)), "positions are compared again");
    assert_eq!(late.clone().answers(&[("c", peer(1000))]).decide().action, Action::Promote(None));
    let behind = late.clone().answers(&[("c", peer(1001))]);
    assert_eq!(behind.decide().action, Action::Release);
    late = behind;
    late.memory.up_since = None;
    late.memory.started_at = NOW;
    assert_eq!(late.decide().action, Action::Demote(DemoteMode::Sick), "an earlier agent may be promoting it");
}

#[test]
fn a_new_leader_is_promoted_when_routers_have_let_go_of_the_former_one_or_their_leases_are_over() {
    let mut world = world().leading();
    world.pg = standby(1000);
    world.memory.elected = Some(Revision(50));
    let action = |world: &World| world.decide().action;
    for (what, setting, epoch, held_for, expected) in [
        ("it has not seen the new leader", 5, 40, 0, Action::Wait),
        ("nor for nearly its lease", 5, 40, 4, Action::Wait),
        ("its lease is over", 5, 40, 5, Action::Promote(None)),
        ("it has let go", 5, 50, 0, Action::Promote(None)),
        ("nobody is to wait", 0, 40, 0, Action::Promote(None)),
    ] {
        world.view().settings.router_lease = Duration::from_secs(setting);
        let router = RouterRecord { name: "web1/7".into(), lease: Duration::from_secs(5), epoch: Revision(epoch) };
        world.view().routers = [("7b".to_owned(), router)].into();
        world.memory.key_held = Some((Revision(50), NOW - Duration::from_secs(held_for)));
        assert_eq!(action(&world), expected, "{what}");
    }
    world.view().settings.router_lease = Duration::from_secs(5);
    world.memory.key_held = None;
    let decision = world.decide();
    assert!(decision.action == Action::Wait && decision.reason.contains("web1/7"), "{}", decision.reason);
    world.pg = primary(1000);
    assert_eq!(action(&world), Action::Lead, "who leads already does not wait");
}

#[test]
fn while_wal_arrives_the_race_is_put_off_for_a_while() {
    let mut world = world();
    world.view().leader = None;
    world.view().settings.primary_race_backoff = Duration::from_secs(6);
    let at = |seconds: u64| NOW - Duration::from_secs(seconds);
    let races = |world: &World| !matches!(world.decide().action, Action::Abstain);
    for (what, since, moved, expected) in [
        ("too early to say", 0, 5, false),
        ("it moves", 4, 0, false),
        ("it does not", 4, 2, true),
        ("for long enough", 6, 0, true),
    ] {
        world.memory.leaderless_since = Some(at(since));
        world.memory.position_since = Some((Lsn(1000), at(moved)));
        assert_eq!(races(&world), expected, "{what}");
    }
    world.memory.leaderless_since = Some(at(4));
    assert!(!races(&world), "it moves");
    assert!(races(&world.clone().requested(Some("a"), Some("b"))), "an operator asks for it");
    if let PgStatus::Running(running) = &mut world.pg {
        running.replication_state = None;
    }
    assert!(races(&world), "nobody sends any more");
}

#[test]
fn a_replica_can_be_restored_without_a_leader() {
    let mut empty = world();
    empty.view().leader = None;
    empty.pg = PgStatus::NoData;
    assert_eq!(empty.decide().action, Action::Wait);
    empty.me.restores_alone = true;
    assert_eq!(empty.decide().action, Action::RestoreReplica);
    empty.view().initialize = Initialize::Running;
    assert_eq!(empty.decide().action, Action::Wait, "the cluster is only coming to be");
}

#[test]
fn after_a_switchover_the_candidate_leads_and_others_wait_for_it() {
    let mut candidate = world().requested(Some("a"), Some("b"));
    candidate.view().leader = None;
    assert!(matches!(candidate.decide().action, Action::Acquire(_)));
    let mut other = world().requested(Some("a"), Some("c"));
    other.view().leader = None;
    assert_eq!(other.answers(&[("c", peer(1000)), ("a", None)]).decide().action, Action::Abstain);
}

#[test]
fn a_switchover_that_is_asked_for_does_not_lead_to_a_node_that_is_far_behind() {
    let mut far = world().requested(Some("a"), Some("b")).leaderless();
    far.view().status.optime = Lsn(10_000_000);
    assert!(far.decide().reason.contains("maximum_lag_on_failover"), "{}", far.decide().reason);
    let mut near = world().requested(Some("a"), Some("c")).leaderless().answers(&[("c", peer(1000))]);
    (near.view().status.optime, near.pg) = (Lsn(10_000_000), standby(10_000_000));
    assert!(matches!(near.decide().action, Action::Acquire(_)), "nobody waits for a candidate that does not come");
    // An operator's failover is another thing.
    let mut forced = world().requested(None, Some("b")).leaderless();
    forced.view().status.optime = Lsn(10_000_000);
    assert!(matches!(forced.decide().action, Action::Acquire(_)));
}

#[test]
fn nobody_leads_by_a_key_that_nobody_here_has_seen_whole() {
    let mut unknown = world().leaderless().answers(&[("c", peer(1000))]);
    for key in ["failover", "members/a", "config"] {
        unknown.view().unknown = [key.to_owned()].into();
        assert!(matches!(unknown.decide().action, Action::Acquire(_)), "{key}");
    }
    for key in ["failsafe", "history", "status", "sync"] {
        unknown.view().unknown = [key.to_owned()].into();
        let decision = unknown.decide();
        assert_eq!(decision.action, Action::Abstain);
        assert!(decision.reason.starts_with(&format!("the {key} key is malformed")), "{}", decision.reason);
    }
}

#[test]
fn a_candidate_that_checks_out_but_does_not_come_is_not_waited_for_for_ever() {
    let mut yielding = world().requested(Some("b"), Some("c")).answers(&[("a", None), ("c", peer(1000))]);
    yielding.view().leader = None;
    yielding.memory.unfulfilled = Some((Revision(0), NOW - Duration::from_secs(5)));
    assert_eq!(yielding.decide().action, Action::Abstain);
    yielding.memory.unfulfilled = Some((Revision(0), NOW - Duration::from_millis(5001)));
    assert!(matches!(yielding.decide().action, Action::Acquire(_)));
    let anybody = yielding.requested(Some("b"), None);
    assert!(matches!(anybody.decide().action, Action::Acquire(_)));
    assert_eq!(anybody.answers(&[("c", peer(1001))]).decide().action, Action::Abstain, "the best one, still");
}

#[test]
fn an_empty_node_bootstraps_or_copies() {
    let mut empty = world().leaderless();
    empty.pg = PgStatus::NoData;
    empty.view().initialize = Initialize::Absent;
    assert_eq!(empty.decide().reason, "waiting for c, which has data, to lead", "the DCS has lost its keys");
    empty.view().members.get_mut(&"c".into()).unwrap().role = "uninitialized".to_owned();
    assert_eq!(empty.decide().action, Action::Bootstrap);
    empty.view().initialize = Initialize::Running;
    assert_eq!(empty.decide().action, Action::Wait);
    let mut replica = world();
    replica.pg = PgStatus::NoData;
    assert!(matches!(replica.decide().action, Action::Clone(source) if source.name == "a".into()));
}

#[test]
fn half_a_cluster_neither_leads_nor_is_in_the_way() {
    let at_rest = stopped(ControlState::InProduction, false);
    let aside = || Action::Discard(Some(SYSTEM));
    for (initialize, pg, action) in [
        (Initialize::Absent, at_rest.clone(), aside()),
        (Initialize::Done(SystemId(1_234_567_890)), at_rest.clone(), aside()),
        // The right to finish it may be the earlier agent's, whose last request is still on its way.
        (Initialize::Running, at_rest.clone(), Action::Wait),
        (Initialize::Absent, PgStatus::Broken("no pg_control".to_owned()), Action::Discard(None)),
        (Initialize::Absent, primary(1000), Action::Demote(DemoteMode::LostKey)),
        (Initialize::Running, primary(1000), Action::Demote(DemoteMode::LostKey)),
        (Initialize::Absent, PgStatus::NoData, Action::Wait),
    ] {
        let mut half = world().leaderless();
        half.memory.half_made = true;
        half.view().initialize = initialize.clone();
        half.pg = pg.clone();
        assert_eq!(half.decide().action, action, "{initialize:?} {pg:?}");
        half.view().settings.pause = true;
        assert_eq!(half.decide().action, Action::Wait, "paused, {initialize:?} {pg:?}");
        half.view().settings.pause = false;
        half.dcs_away = true;
        assert!(!matches!(half.decide().action, Action::Discard(_)), "what is known may be old");
    }
}

#[test]
fn nobody_leads_while_a_cluster_is_being_made() {
    let mut beside = world().leaderless().answers(&[("c", peer(1000))]);
    assert!(matches!(beside.decide().action, Action::Acquire(_)));
    beside.view().initialize = Initialize::Running;
    assert_eq!(beside.decide().reason, "another member is bootstrapping the cluster");
    assert_eq!(beside.decide().action, Action::Abstain);
}

#[test]
fn without_a_required_watchdog_nobody_leads() {
    let why =
        || Memory { must_not_lead: Some("/dev/watchdog: No such file or directory".to_owned()), ..Memory::default() };
    let mut racer = world().leaderless().answers(&[("c", peer(900))]);
    assert!(matches!(racer.decide().action, Action::Acquire(_)), "{:?}", racer.decide());
    racer.memory = why();
    assert_eq!(racer.decide().action, Action::Abstain);
    let mut leader = world().leading();
    leader.memory = why();
    assert_eq!(leader.decide().action, Action::Demote(DemoteMode::Sick));
    leader.pg = stopped(ControlState::InProduction, false);
    assert_eq!(leader.decide().action, Action::Release);
    leader.pg = standby(1000);
    assert_eq!(leader.decide().action, Action::Release);
    leader.view().settings.pause = true;
    leader.pg = primary(1000);
    assert_eq!(leader.decide().action, Action::Lead, "paused");
}

#[test]
fn where_the_dcs_has_forgotten_who_led_nobody_leads_before_that_is_over() {
    let forgotten = |until| {
        let mut world = world().leaderless().answers(&[("c", peer(1000))]);
        world.memory.start_over(until);
        world
    };
    let over = forgotten(NOW);
    assert!(matches!(over.decide().action, Action::Acquire(_)), "{:?}", over.decide());
    let mut world = forgotten(NOW + Duration::from_millis(1));
    assert_eq!(world.decide().reason, MAY_BE_LED);
    world.view().leader = Some(key("b"));
    assert_eq!(world.decide().reason, MAY_BE_LED, "the key of the backup is no better");
    world.view().leader = None;
    world.pg = primary(1000);
    assert!(matches!(world.decide().action, Action::Acquire(_)), "who takes writes is the one");
    world.pg = PgStatus::NoData;
    world.view().initialize = Initialize::Absent;
    assert_eq!(world.decide().reason, MAY_BE_LED);
}
