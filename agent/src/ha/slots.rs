//! Which replication slots this node should have (ha-loop §16.1). Pure; `postgres/slots` makes them.
//!
//! The rules are Patroni's: a slot is kept on every node that may be promoted, and moved along with the one that is in use,
//! so that after a failover nobody finds the WAL gone that it still needs.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde_json::Value;
use trunkline_common::{ClusterView, Instant, Lsn, Member, MemberName, TimelineId};
use trunkline_config::{dynamic, tags};

use super::situation::{Me, replicates_from};
use crate::postgres::{SlotKind, WantedSlot};

/// What this node is to those that stream from the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The primary, or the leader of a standby cluster: members stream from it unless they are told otherwise.
    Leader,
    /// Any other node: only those that name it stream from it.
    Replica,
}

/// How far a server has got, by one look at it. What it gets later may be of another timeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Reached {
    /// Its timeline.
    pub timeline: Option<TimelineId>,
    /// What it has replayed; `None` for a primary.
    pub replayed: Option<Lsn>,
}

/// When each slot's member was last there: the slot outlives it by `member_slots_ttl`.
pub type Seen = BTreeMap<String, Instant>;

/// The slots that there shall be on a server that has got so far. `heard` has positions that members told this node directly,
/// newer than their keys.
pub fn wanted(
    view: &ClusterView,
    me: &Me,
    part: Part,
    reached: Reached,
    seen: &Seen,
    heard: &BTreeMap<MemberName, Lsn>,
) -> BTreeMap<String, WantedSlot> {
    let own = me.name.slot_name();
    // The status goes with the history: until a new leader has written them, the position of a reader is that of another
    // timeline, and what is there on this one the reader may never have got.
    let comparable = reached.timeline == Some(view.timeline().unwrap_or(TimelineId(1)));
    let moved_to = |lsn: Lsn| reached.replayed.map_or(lsn, |replayed| lsn.min(replayed));
    let known = |slot: &str| known(view, slot);
    let mut wanted = of_members(view, me, part, heard);
    if !view.settings.member_slots_ttl.is_zero() {
        for slot in seen.keys().filter(|slot| **slot != own) {
            let kept = WantedSlot { kind: SlotKind::Physical, position: known(slot), in_use: None };
            wanted.entry(slot.clone()).or_insert(kept);
        }
    }
    if me.failover_priority() <= 0 {
        // Never promoted: nobody will look for a permanent slot here.
        return wanted;
    }
    let by_archive = view.settings.standby_cluster.is_some() || !streams_from_leader(view, &me.name, Some(me));
    for (slot, definition) in permanent(view) {
        let kind = kind(definition);
        let physical = kind == SlotKind::Physical;
        if by_archive && !physical || physical && *slot == own {
            continue;
        }
        let member = view.members.iter().find(|(name, _)| name.slot_name() == *slot);
        let cascading = member.filter(|(name, member)| replicates_from(view, name, &member.tags).is_some());
        let told = cascading.and_then(|(name, member)| heard.get(name).copied().max(member.xlog_location));
        let new = WantedSlot {
            position: if physical { known(slot).max(told) } else { known(slot).filter(|_| comparable).map(moved_to) },
            in_use: physical.then_some(part == Part::Leader && cascading.is_none()),
            kind,
        };
        match wanted.get(slot).map(|there| there.in_use) {
            None => drop(wanted.insert(slot.clone(), new)),
            // Only remembered so far: that it is permanent says more.
            Some(None) => drop(wanted.insert(slot.clone(), new)),
            Some(_) => {}
        }
    }
    wanted
}

/// The slots of other members.
fn of_members(
    view: &ClusterView,
    me: &Me,
    part: Part,
    heard: &BTreeMap<MemberName, Lsn>,
) -> BTreeMap<String, WantedSlot> {
    let keep_all = !view.settings.member_slots_ttl.is_zero();
    let never_leads = me.failover_priority() <= 0;
    let slot = |(name, member): (&MemberName, &Member)| {
        if *name == me.name || member.tag_is_true("nostream") {
            return None;
        }
        let from = replicates_from(view, name, &member.tags);
        let named = from.as_ref() == Some(&me.name);
        let in_use = match part {
            Part::Leader => named || from.as_ref().is_none_or(|from| !view.members.contains_key(from)),
            Part::Replica => named && !view.is_leader(name),
        };
        if !(in_use || keep_all && (!never_leads || named)) {
            return None;
        }
        let slot = name.slot_name();
        let known = known(view, &slot);
        let told = from.and_then(|_| heard.get(name).copied().max(member.xlog_location));
        Some((slot, WantedSlot { kind: SlotKind::Physical, position: known.max(told), in_use: Some(in_use) }))
    };
    view.members.iter().filter_map(slot).collect()
}

/// What the leader has published of a slot.
fn known(view: &ClusterView, slot: &str) -> Option<Lsn> {
    view.status.slots.as_ref().and_then(|slots| slots.get(slot)).copied()
}

/// Permanent logical slots that there can't be here: they are called like the physical one of a member.
pub fn clashes(view: &ClusterView, wanted: &BTreeMap<String, WantedSlot>) -> BTreeSet<String> {
    let physical = |slot: &String| wanted.get(slot).is_some_and(|wanted| wanted.kind == SlotKind::Physical);
    let clashes = permanent(view).filter(|(slot, definition)| kind(definition) != SlotKind::Physical && physical(slot));
    clashes.map(|(slot, _)| slot.clone()).collect()
}

/// What a leader publishes of a member's slot that is at `at` here, if it is there yet: other nodes remove WAL by it. A slot
/// that was made here while its member was away begins where this node was then, perhaps past what the member still needs, so
/// no more is published than what it is known to have: `told`, or what was published before.
pub fn published(view: &ClusterView, slot: &str, at: Option<Lsn>, told: Option<Lsn>) -> Option<Lsn> {
    let known = known(view, slot);
    match (known.max(told), at) {
        (Some(has), Some(at)) => Some(has.min(at)),
        (None, at) => at,
        (Some(_), None) => known,
    }
}

/// Slots whose primary needs to keep old catalog rows for them are no use on a standby that does not say so
/// (`hot_standby_feedback`): whether this one has such slots, or passes on the word of one that has.
pub fn needs_feedback(view: &ClusterView, me: &Me) -> bool {
    let holds_logical = |name: &MemberName, node: Option<&Me>| {
        let member = view.members.get(name);
        let never_leads = match node {
            Some(me) => me.failover_priority() <= 0,
            None => member.is_none_or(Member::nofailover),
        };
        !never_leads && streams_from_leader(view, name, node)
    };
    let below = || {
        let is_below = |(name, member): &(&MemberName, &Member)| {
            replicates_from(view, name, &member.tags).as_ref() == Some(&me.name)
        };
        view.members.iter().filter(is_below)
    };
    view.settings.standby_cluster.is_none()
        && permanent(view).any(|(_, definition)| kind(definition) != SlotKind::Physical)
        && (holds_logical(&me.name, Some(me)) || below().any(|(name, _)| holds_logical(name, None)))
}

/// Notes which members' slots are in use now. What the leader retains is kept by whoever may be promoted, and by a node that
/// has just begun to look. Who is never promoted keeps what those need that stream from it: they come back to it.
pub fn note(seen: &mut Seen, view: &ClusterView, me: &Me, leads: bool, now: Instant) {
    let own_only = !leads && me.failover_priority() <= 0;
    if seen.is_empty() || !leads && !own_only {
        // Of those that are here it is known where they stream from.
        let here = |slot: &String| own_only && view.members.keys().any(|name| name.slot_name() == *slot);
        let retained = view.status.retain_slots.iter().flatten().filter(|slot| !here(slot));
        seen.extend(retained.map(|slot| (slot.clone(), now)));
    }
    let in_use = |(name, member): &(&MemberName, &Member)| {
        let from_here = || replicates_from(view, name, &member.tags).as_ref() == Some(&me.name);
        !member.tag_is_true("nostream") && (!own_only || from_here())
    };
    seen.extend(view.members.iter().filter(in_use).map(|(name, _)| (name.slot_name(), now)));
    let keep = view.settings.member_slots_ttl.max(Duration::from_secs(1));
    seen.retain(|_, at| now.since(*at) < keep);
}

/// Slots of members that are only kept for a time, for the `status` key.
pub fn retained(view: &ClusterView, seen: &Seen, me: &Me) -> Vec<String> {
    let permanent: BTreeSet<&String> = permanent(view).map(|(slot, _)| slot).collect();
    let mut slots: BTreeSet<String> = seen.keys().cloned().collect();
    slots.insert(me.name.slot_name());
    slots.into_iter().filter(|slot| !permanent.contains(slot)).collect()
}

/// The permanent slots that are for a cluster of this kind (`cluster_type`).
pub fn permanent(view: &ClusterView) -> impl Iterator<Item = (&String, &Value)> {
    let other = if view.settings.standby_cluster.is_some() { "primary" } else { "standby" };
    let fits = move |definition: &Value| definition.get("cluster_type").and_then(Value::as_str) != Some(other);
    view.settings.slots.iter().filter(move |(_, definition)| fits(definition))
}

/// What an entry of `slots` is.
fn kind(definition: &Value) -> SlotKind {
    match dynamic::logical_slot(definition) {
        Some((database, plugin)) => SlotKind::Logical { database: database.to_owned(), plugin: plugin.to_owned() },
        None => SlotKind::Physical,
    }
}

/// Whether the way from the leader to this node is by streaming all along: a node that replays from the archive can't tell
/// the primary what its slots need, nor can those behind it.
fn streams_from_leader(view: &ClusterView, name: &MemberName, node: Option<&Me>) -> bool {
    let mut at = name.clone();
    for _ in 0..=view.members.len() {
        let own_tags = node.filter(|me| me.name == at).map(|me| &me.tags);
        let Some(tags) = own_tags.or_else(|| view.members.get(&at).map(|member| &member.tags)) else { return true };
        if tags.get("nostream").is_some_and(tags::truthy) {
            return false;
        }
        match replicates_from(view, &at, tags).filter(|_| !view.is_leader(&at)) {
            Some(next) if view.members.contains_key(&next) => at = next,
            _ => return true,
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use serde_json::{Map, json};
    use trunkline_common::cluster::{HistoryLine, LeaderKey, Status};
    use trunkline_common::{LeaseId, Revision};
    use trunkline_config::Settings;

    use super::*;

    fn me(name: &str, tags: &Value) -> Me {
        Me {
            name: name.into(),
            tags: tags.as_object().cloned().unwrap_or_default(),
            may_bootstrap: true,
            use_pg_rewind: true,
            use_slots: true,
            restores_alone: false,
            reclone_diverged: false,
            reclone_unrewindable: false,
        }
    }

    /// Leader `a`; `b`; `c` that never leads; `d` behind `c`; `e` that replays from the archive; `f` behind `e`.
    fn view(settings: &Value) -> ClusterView {
        let member = |tags: Value| Member {
            tags: tags.as_object().cloned().unwrap_or_else(Map::new),
            xlog_location: Some(Lsn(50)),
            ..Member::default()
        };
        let key = LeaderKey { name: "a".into(), lease: LeaseId(1), created: Revision(1), modified: Revision(1) };
        ClusterView {
            leader: Some(key),
            settings: Settings::from_value(settings).0,
            members: [
                ("a", json!({})),
                ("b", json!({})),
                ("c", json!({ "nofailover": true })),
                ("d", json!({ "replicatefrom": "c" })),
                ("e", json!({ "nostream": true })),
                ("f", json!({ "replicatefrom": "e" })),
            ]
            .map(|(name, tags)| (name.into(), member(tags)))
            .into(),
            status: Status {
                optime: Lsn(100),
                slots: Some([("b", 10), ("d", 40), ("log", 7)].map(|(slot, lsn)| (slot.to_owned(), Lsn(lsn))).into()),
                retain_slots: Some(vec!["gone".to_owned()]),
            },
            ..ClusterView::default()
        }
    }

    fn on(timeline: Option<u32>) -> Reached {
        Reached { timeline: timeline.map(TimelineId), replayed: None }
    }

    fn at() -> Instant {
        Instant::from_boot(Duration::from_secs(10_000))
    }

    /// The wanted slots as text: `name@position`, with `+` where somebody streams and `?` where that is not known.
    fn text(view: &ClusterView, name: &str, part: Part) -> String {
        let me = me(name, &Value::Object(view.members[&MemberName::from(name)].tags.clone()));
        let mut seen = Seen::new();
        note(&mut seen, view, &me, part == Part::Leader, at());
        let slot = |(name, slot): (String, WantedSlot)| {
            let position = slot.position.map_or(String::new(), |lsn| format!("@{}", lsn.0));
            let used = match (&slot.kind, slot.in_use) {
                (SlotKind::Logical { database, plugin }, _) => format!("({database},{plugin})"),
                (_, Some(true)) => "+".to_owned(),
                (_, Some(false)) => String::new(),
                (_, None) => "?".to_owned(),
            };
            format!("{name}{position}{used}")
        };
        wanted(view, &me, part, on(Some(1)), &seen, &BTreeMap::new())
            .into_iter()
            .map(slot)
            .collect::<Vec<_>>()
            .join(" ")
    }

    #[test]
    fn each_node_keeps_the_slots_that_it_may_be_asked_for() {
        let plain = view(&json!({}));
        for (node, part, slots) in [
            ("a", Part::Leader, "b@10+ c+ d@50 f@50 gone?"),
            ("b", Part::Replica, "a c d@50 f@50 gone?"),
            ("c", Part::Replica, "d@50+ gone?"),
            ("d", Part::Replica, "a b@10 c f@50 gone?"),
            ("e", Part::Replica, "a b@10 c d@50 f@50+ gone?"),
        ] {
            assert_eq!(text(&plain, node, part), slots, "{node}");
        }
        let none_kept = view(&json!({ "member_slots_ttl": 0 }));
        assert_eq!(text(&none_kept, "a", Part::Leader), "b@10+ c+");
        assert_eq!(text(&none_kept, "b", Part::Replica), "");
    }

    #[test]
    fn permanent_slots_are_everywhere_except_where_they_are_of_no_use() {
        let settings = json!({
            "member_slots_ttl": 0,
            "slots": { "p": 0, "d": null, "log": { "database": "x", "plugin": "y" }, "std": { "cluster_type": "standby" } },
        });
        let view = view(&settings);
        for (node, part, slots) in [
            ("a", Part::Leader, "b@10+ c+ d@50 log@7(x,y) p+"),
            ("b", Part::Replica, "d@50 log@7(x,y) p"),
            ("c", Part::Replica, "d@50+"),
            ("d", Part::Replica, "log@7(x,y) p"),
            ("e", Part::Replica, "d@50 f@50+ p"),
            ("f", Part::Replica, "d@50 p"),
        ] {
            assert_eq!(text(&view, node, part), slots, "{node}");
        }
        let feedback = |name: &str| {
            let tags = Value::Object(view.members[&MemberName::from(name)].tags.clone());
            needs_feedback(&view, &me(name, &tags))
        };
        assert_eq!(["b", "c", "d", "e", "f"].map(feedback), [true, true, true, false, false]);
    }

    #[test]
    fn a_position_of_another_timeline_moves_no_logical_slot() {
        let mut view = view(&json!({ "slots": { "log": { "database": "x", "plugin": "y" } } }));
        let position = |view: &ClusterView, timeline: Option<u32>| {
            let reached = on(timeline);
            wanted(view, &me("b", &json!({})), Part::Replica, reached, &Seen::new(), &BTreeMap::new())["log"].position
        };
        let positions = [Some(1), Some(2), None].map(|timeline| position(&view, timeline));
        assert_eq!(positions, [Some(Lsn(7)), None, None], "a status of the first timeline");
        // A standby that gets to the second one after it was looked at goes no further by a position of the first.
        let behind = Reached { replayed: Some(Lsn(5)), ..on(Some(1)) };
        let slots = wanted(&view, &me("b", &json!({})), Part::Replica, behind, &Seen::new(), &BTreeMap::new());
        assert_eq!(slots["log"].position, Some(Lsn(5)));
        view.history = vec![HistoryLine {
            timeline: TimelineId(1),
            switchpoint: Lsn(90),
            reason: String::new(),
            promoted_at: None,
            new_leader: None,
        }];
        assert_eq!([1, 2].map(|timeline| position(&view, Some(timeline))), [None, Some(Lsn(7))], "of the second");
    }

    #[test]
    fn a_logical_slot_called_like_a_member_is_told() {
        let logical = json!({ "database": "x", "plugin": "y" });
        let view = view(&json!({ "slots": { "b": logical.clone(), "log": logical, "d": 0 } }));
        let me = me("a", &json!({}));
        let wanted = wanted(&view, &me, Part::Leader, on(None), &Seen::new(), &BTreeMap::new());
        assert_eq!(wanted["b"].kind, SlotKind::Physical);
        assert_eq!(clashes(&view, &wanted), ["b".to_owned()].into());
    }

    #[test]
    fn no_more_is_published_than_a_member_is_known_to_have() {
        let view = view(&json!({}));
        for (slot, at, told, expected) in [
            ("b", Some(50), None, Some(10)), // away, and made here too late for it
            ("b", None, Some(40), Some(10)), // not made yet
            ("b", Some(50), Some(40), Some(40)),
            ("b", Some(5), Some(40), Some(5)),
            ("b", Some(50), Some(7), Some(10)), // came back with less, but others may have removed that already
            ("new", Some(50), None, Some(50)),
            ("new", None, Some(40), None),
        ] {
            let position = published(&view, slot, at.map(Lsn), told.map(Lsn));
            assert_eq!(position, expected.map(Lsn), "{slot} {at:?} {told:?}");
        }
    }

    #[test]
    fn what_is_retained_is_remembered_by_a_leader_that_has_just_begun() {
        let view = view(&json!({ "slots": { "d": 0 } }));
        let (mut seen, me) = (Seen::new(), me("a", &json!({})));
        note(&mut seen, &view, &me, true, at());
        assert_eq!(retained(&view, &seen, &me), ["a", "b", "c", "f", "gone"]);
        note(&mut seen, &view, &me, true, at() + Duration::from_secs(1801));
        assert_eq!(retained(&view, &seen, &me), ["a", "b", "c", "f"], "gone for good");
    }

    #[test]
    fn who_never_leads_keeps_the_slots_of_those_that_come_back_to_it() {
        let mut view = view(&json!({}));
        let (mut seen, me) = (Seen::new(), me("c", &json!({ "nofailover": true })));
        note(&mut seen, &view, &me, false, at());
        view.members.remove(&MemberName::from("d"));
        view.members.remove(&MemberName::from("b"));
        note(&mut seen, &view, &me, false, at() + Duration::from_secs(60));
        let slots = wanted(&view, &me, Part::Replica, on(None), &seen, &BTreeMap::new());
        let gone = "whoever was away when this agent began may have streamed from here";
        assert_eq!(slots.keys().collect::<Vec<_>>(), ["d", "gone"], "not of others; {gone}");
        note(&mut seen, &view, &me, false, at() + Duration::from_secs(1801));
        assert!(wanted(&view, &me, Part::Replica, on(None), &seen, &BTreeMap::new()).is_empty());
    }

    #[test]
    fn what_a_member_told_directly_is_newer_than_its_key() {
        let view = view(&json!({}));
        let heard = [(MemberName::from("d"), Lsn(90))].into();
        let slots = wanted(&view, &me("a", &json!({})), Part::Leader, on(None), &Seen::new(), &heard);
        assert_eq!((slots["d"].position, slots["f"].position), (Some(Lsn(90)), Some(Lsn(50))));
    }
}
