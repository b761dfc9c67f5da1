//! Whatever happens.

use proptest::prelude::*;

use super::*;

fn any_pg() -> impl Strategy<Value = PgStatus> {
    let control = prop_oneof![
        Just(ControlState::ShutDown),
        Just(ControlState::InProduction),
        Just(ControlState::InArchiveRecovery),
        Just(ControlState::ShutDownInRecovery),
    ];
    prop_oneof![
        Just(PgStatus::NoData),
        Just(PgStatus::Broken("x".to_owned())),
        Just(PgStatus::Starting),
        Just(PgStatus::Stopping),
        Just(PgStatus::Unresponsive),
        Just(PgStatus::Refusing("x".to_owned())),
        (control, any::<bool>()).prop_map(|(state, standby)| stopped(state, standby)),
        (900u64..1100).prop_map(standby),
        (900u64..1100).prop_map(primary),
    ]
}

fn any_name() -> impl Strategy<Value = Option<&'static str>> {
    prop_oneof![Just(None), Just(Some("a")), Just(Some("b")), Just(Some("c")), Just(Some("stranger"))]
}

prop_compose! {
    fn any_world()(
        pg in any_pg(),
        leader in any_name(),
        lease_ms in prop_oneof![Just(None), (0u64..6000).prop_map(Some)],
        sync in (any_name(), any_name(), any::<bool>(), any::<bool>()),
        request in (any::<bool>(), any_name(), any_name()),
        (pause, has_lease, dcs_away, known) in (any::<bool>(), any::<bool>(), any::<bool>(), prop::bool::weighted(0.95)),
        divergence in prop_oneof![
            Just(DivergenceState::NotAsked), Just(DivergenceState::Check),
            Just(DivergenceState::Rewind("w".into())), Just(DivergenceState::RewindFailed("w".into())),
        ],
        (rewind, reclone, demoted) in (any::<bool>(), any::<bool>(), any::<bool>()),
        start_timeout in prop_oneof![Just(0u64), Just(300)],
        (by_word, promise, failsafe) in
            (any::<bool>(), prop::option::of(0u64..3000), prop::option::of(prop_oneof![Just(&["a", "b", "c"][..]), Just(&["a"][..]), Just(&[][..])])),
        (won, young) in (any::<bool>(), any::<bool>()),
        peers in prop::option::of((prop::option::of(900u64..1100), prop::option::of(900u64..1100), any::<bool>())),
    ) -> World {
        let mut world = world();
        world.pg = pg;
        world.has_lease = has_lease;
        world.dcs_away = dcs_away;
        world.memory.divergence = divergence;
        world.memory.demoted = demoted;
        world.me.use_pg_rewind = rewind;
        world.me.reclone_diverged = reclone;
        let view = world.view();
        view.leader = leader.map(key);
        view.settings.pause = pause;
        view.settings.primary_start_timeout = Duration::from_secs(start_timeout);
        if let (Some(owner), standby, on, _) = sync {
            view.settings.synchronous_mode = if on { SynchronousMode::On } else { SynchronousMode::Off };
            view.sync = SyncState {
                leader: Some(owner.into()),
                standbys: standby.iter().map(|name| (*name).to_owned()).collect(),
                quorum: 0,
                revision: Revision(60),
            };
        }
        if let (true, from, to) = request {
            world = world.requested(from, to);
        }
        // The key can only be held where it bears our name, and led without it only by the members' word.
        world.by_word = by_word;
        let may_lead = leader == Some("b") || (by_word && leader.is_none());
        world.leader_until = lease_ms.filter(|_| may_lead).map(|ms| NOW + Duration::from_millis(ms));
        if let Some(members) = failsafe {
            world = world.failsafe(members);
        }
        if let Some(ms) = promise {
            world = world.promised(ms);
        }
        world.memory.elected = won.then_some(Revision(50));
        if young {
            world.memory.started_at = NOW;
        }
        world.peers = peers.map(|(a, c, a_leads)| {
            let mut old = a.and_then(peer);
            if let Some(old) = old.as_mut() {
                old.in_recovery = !a_leads;
            }
            PeerAnswers::from([("a".into(), old), ("c".into(), c.and_then(peer)), ("stranger".into(), None)])
        });
        if !known {
            world.view = None;
            world.leader_until = None;
        }
        world
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens(world in any_world()) {
        let decision = world.decide();
        let leads = world.leader_until.is_some_and(|until| NOW < until);
        let view = world.view.as_ref();
        let paused = view.is_some_and(|view| view.settings.pause);
        prop_assert!(!decision.reason.is_empty());

        match &decision.action {
            // Writing is for the holder of the key, in the same view.
            Action::Start(StartAs::Primary) | Action::Lead | Action::HandOver => prop_assert!(leads),
            Action::Promote(_) => prop_assert!(leads && view.unwrap().is_leader(&world.me.name)),
            // Only a primary that leads and is on the list asks for the members' word.
            Action::Failsafe(members) => {
                let list = view.unwrap().failsafe.as_ref().unwrap();
                prop_assert!(leads && matches!(&world.pg, PgStatus::Running(r) if r.role == PgRole::Primary));
                prop_assert!(list.contains_key(&world.me.name) && !members.contains_key(&world.me.name));
                prop_assert_eq!(members.len(), list.len() - 1);
            }
            // The key is only taken where there is none, by a node with a lease and a server that runs.
            Action::Acquire(_) => {
                let view = view.unwrap();
                prop_assert!(view.leader.is_none() && world.has_lease && matches!(world.pg, PgStatus::Running(_)));
                let manual = view.failover.as_ref()
                    .is_some_and(|r| r.leader.is_none() && r.candidate.as_ref() == Some(&world.me.name));
                let restricted = view.settings.synchronous_mode == SynchronousMode::On && view.sync.is_active();
                let already = matches!(&world.pg, PgStatus::Running(r) if r.role == PgRole::Primary);
                prop_assert!(!restricted || view.sync.includes(&world.me.name) || manual || (paused && already));
            }
            // Giving up the key needs a server that can't write.
            Action::Release => prop_assert!(!matches!(&world.pg, PgStatus::Running(r) if r.role == PgRole::Primary)
                && !matches!(world.pg, PgStatus::Starting | PgStatus::Refusing(_) | PgStatus::Unresponsive | PgStatus::Stopping)),
            // Data is only replaced where a setting allows it and somebody else leads.
            Action::Reclone(_) => prop_assert!(world.me.reclone_diverged || world.me.reclone_unrewindable),
            Action::Clone(_) => prop_assert_eq!(&world.pg, &PgStatus::NoData),
            Action::Rewind(source) => prop_assert!(world.me.use_pg_rewind && source.name != world.me.name),
            Action::Bootstrap => prop_assert!(world.pg == PgStatus::NoData && view.unwrap().initialize == Initialize::Absent),
            // Members are asked once.
            Action::Ask(members) => prop_assert!(world.peers.is_none() && !members.is_empty()),
            _ => {}
        }

        // Whoever has given its word to a leader without DCS does nothing that could make it a leader.
        let word = world.memory.promise.as_ref().is_some_and(|promise| NOW < promise.until);
        let takes_writes = matches!(&world.pg, PgStatus::Running(r) if r.role == PgRole::Primary);
        if word && !leads && !takes_writes {
            let towards_leading = matches!(
                decision.action,
                Action::Acquire(_) | Action::Confirm | Action::Promote(_) | Action::Bootstrap | Action::Start(StartAs::Primary)
            );
            prop_assert!(!towards_leading, "{:?}", decision);
        }

        // A primary without the key never just goes on, unless an operator paused, it may win the key, or it waits
        // for the first proof.
        let is_primary = matches!(&world.pg, PgStatus::Running(r) if r.role == PgRole::Primary);
        if is_primary && !leads && !paused && view.is_some_and(|view| view.leader.as_ref().is_some_and(|l| l.name != world.me.name)) {
            prop_assert_eq!(decision.action, Action::Demote(DemoteMode::LostKey));
        }
    }
}
