//! Where sessions may go, and whose must end: a pure function of one view of the cluster.
//!
//! Two questions are kept apart, because their answers differ for a while in every failover:
//!
//! * **Where does a new session go?** ([`RouteTable::leader`], [`RouteTable::standbys`]) To the leader only while the
//!   leader key names it *and* its own record says `running` and `primary`: a holder of the key that still replays is not
//!   writable yet, and a record that says `primary` without the key is left over (dcs-layout §6).
//! * **Whose sessions may go on?** ([`RouteTable::reign`]) Those of the leader under whose [`Epoch`] they were opened.
//!   - The key is absent, names another member or was created anew: the epoch is over. Who has lost the key may be
//!     replaced at any moment, and a frozen host or a partitioned one would go on to answer old sessions.
//!   - The holder's record denies being primary (`demoted`, `replica` …): over.
//!   - The holder's record is missing, or says `promoted` (Patroni, before it has looked; one that has proved itself by then
//!     has sessions already), or `primary` and another state (`stopping`, `restarting`): the epoch goes on,
//!     there is just no place for new sessions. Nobody else can have been elected, so what becomes of the old sessions
//!     is between the client and PostgreSQL. `stopping` is the notice of a planned stop ([`RouteTable::resigns`]): sessions
//!     that are seen to be idle are ended before the server does it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use trunkline_common::{ClusterView, Instant, Lsn, Member, MemberName, Revision, TimelineId};
use trunkline_config::tags;

/// One uninterrupted time of leadership: a leader key as it was created. A key that its holder attaches to a new lease
/// (a restarted agent) is the same one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Epoch {
    /// Who leads.
    pub member: MemberName,
    /// When the leader key was created.
    pub created: Revision,
}

/// A server that a session can be opened to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backend {
    /// Whose server.
    pub member: MemberName,
    /// Host name or address.
    pub host: String,
    /// Port.
    pub port: u16,
    /// The leader's epoch; `None` for a standby.
    pub epoch: Option<Epoch>,
    /// Whether the leader waits for it at commit.
    pub sync: bool,
    /// Bytes of WAL behind the leader's last known position; `None` where either is unknown.
    pub lag: Option<u64>,
    /// Since when the leader has been known to have what it lacks; see [`lag`](crate::lag).
    pub behind_since: Option<Instant>,
    /// Its tags, as far as they are single values.
    pub tags: BTreeMap<String, String>,
    /// Its timeline, where known.
    pub timeline: Option<TimelineId>,
}

impl Backend {
    /// A server of which nothing more is known.
    pub fn at(member: MemberName, host: String, port: u16) -> Self {
        Self {
            member,
            host,
            port,
            epoch: None,
            sync: false,
            lag: None,
            behind_since: None,
            tags: BTreeMap::new(),
            timeline: None,
        }
    }

    /// Host and port.
    pub fn address(&self) -> String {
        trunkline_config::join_host_port(&self.host, self.port)
    }

    /// Whether a connection to one is a connection to the other.
    pub fn same_server(&self, other: &Backend) -> bool {
        (&self.member, &self.host, self.port, &self.epoch) == (&other.member, &other.host, other.port, &other.epoch)
    }
}

/// How good the knowledge is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Certainty {
    /// The DCS has not been read yet.
    Nothing,
    /// The DCS confirms it.
    Confirmed,
    /// The DCS has been silent for too long. Sessions go on; new ones go to the leader only while it proves itself.
    Unconfirmed {
        /// The leader says over its REST API that it is the primary.
        proven: bool,
    },
}

impl Certainty {
    /// For logs, metrics and `/routes`.
    pub fn as_str(self) -> &'static str {
        match self {
            Certainty::Nothing => "nothing",
            Certainty::Confirmed => "confirmed",
            Certainty::Unconfirmed { proven: true } => "unconfirmed, leader proven",
            Certainty::Unconfirmed { proven: false } => "unconfirmed",
        }
    }
}

/// Where sessions may go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteTable {
    /// The store's revision it was made of.
    pub revision: Revision,
    /// How good the knowledge is.
    pub certainty: Certainty,
    /// Whose sessions may go on; see the module's documentation.
    pub reign: Option<Epoch>,
    /// When the leader key that the reign goes with was created, as the DCS says it: of an epoch that was begun without the DCS,
    /// or that has outlasted its key, another one than the epoch's. `None` where the DCS has not shown it.
    pub key: Option<Revision>,
    /// The leader has announced that it is about to stop: its sessions end as soon as they can.
    pub resigns: bool,
    /// Who has the leader key and is about to take writes.
    pub elected: Option<Arc<Backend>>,
    /// Where new read-write sessions go.
    pub leader: Option<Arc<Backend>>,
    /// Standbys that may be read from, whatever their lag, by name.
    pub standbys: Vec<Arc<Backend>>,
    /// Servers that get no new sessions, and may have old ones.
    pub others: Vec<Arc<Backend>>,
    /// Members whose servers answer their agents; of another one with sessions nothing good is known.
    pub up: BTreeSet<MemberName>,
    /// Every member, and why it is a candidate or not, in words.
    pub verdicts: Vec<(MemberName, &'static str)>,
}

impl RouteTable {
    /// The table before anything is known: everybody waits.
    pub fn unknown() -> Self {
        Self {
            revision: Revision(0),
            certainty: Certainty::Nothing,
            reign: None,
            key: None,
            resigns: false,
            elected: None,
            leader: None,
            standbys: Vec::new(),
            others: Vec::new(),
            up: BTreeSet::new(),
            verdicts: Vec::new(),
        }
    }

    /// The table of a confirmed view.
    pub fn from_view(view: &ClusterView) -> Self {
        let reign = reign(view);
        let mut table = Self {
            revision: view.revision,
            certainty: Certainty::Confirmed,
            reign: reign.clone(),
            key: reign.as_ref().map(|epoch| epoch.created),
            resigns: reign.is_some() && resigns(view),
            elected: None,
            leader: None,
            standbys: Vec::new(),
            others: Vec::new(),
            up: view.members.iter().filter(|(_, member)| is_up(member)).map(|(name, _)| name.clone()).collect(),
            verdicts: Vec::new(),
        };
        for (name, member) in &view.members {
            let verdict = if view.is_leader(name) { leader_verdict(member) } else { standby_verdict(member) };
            let elected = verdict == Err(NOT_PROMOTED) && member.is_running();
            let (verdict, address) = match (verdict, member.host_port()) {
                (Ok(_), None) => ("no usable conn_url", None),
                (Ok(good), address) => (good, address),
                (Err(bad), address) => (bad, address.filter(|_| elected)),
            };
            table.verdicts.push((name.clone(), verdict));
            let Some((host, port)) = address else { continue };
            let backend = Arc::new(Backend {
                member: name.clone(),
                host,
                port,
                epoch: reign.clone().filter(|epoch| epoch.member == *name),
                sync: is_sync(view, name),
                lag: lag(view.status.optime, member),
                behind_since: None,
                tags: member.tags.iter().filter_map(|(tag, value)| Some((tag.clone(), tags::text(value)?))).collect(),
                timeline: member.timeline,
            });
            match view.is_leader(name) {
                true if elected => table.elected = Some(backend),
                true => table.leader = Some(backend),
                false => table.standbys.push(backend),
            }
        }
        table.others = table.rest_of(view);
        table
    }

    /// The servers that are nothing else.
    fn rest_of(&self, view: &ClusterView) -> Vec<Arc<Backend>> {
        let known = || self.standbys.iter().chain(&self.leader).chain(&self.elected);
        let rest = view.members.iter().filter(|(name, _)| known().all(|backend| backend.member != **name));
        let server = |(name, member): (&MemberName, &Member)| {
            let (host, port) = member.host_port()?;
            let epoch = self.reign.clone().filter(|epoch| epoch.member == *name);
            let tags = member.tags.iter().filter_map(|(tag, value)| Some((tag.clone(), tags::text(value)?))).collect();
            Some(Arc::new(Backend { epoch, sync: is_sync(view, name), tags, ..Backend::at(name.clone(), host, port) }))
        };
        rest.filter_map(server).collect()
    }

    /// Nothing new is read from this one, whatever its record says.
    pub fn exclude(&mut self, name: &MemberName, why: &'static str) {
        let Some(at) = self.standbys.iter().position(|standby| standby.member == *name) else { return };
        self.others.push(self.standbys.remove(at));
        if let Some((_, verdict)) = self.verdicts.iter_mut().find(|(member, _)| member == name) {
            *verdict = why;
        }
    }

    /// The same table once the DCS has been silent for too long.
    pub fn unconfirmed(mut self, proven: bool) -> Self {
        self.certainty = Certainty::Unconfirmed { proven };
        self.elected = None;
        if !proven {
            self.others.extend(self.leader.take());
        }
        self
    }
}

/// Whether the leader waits for it at commit.
fn is_sync(view: &ClusterView, name: &MemberName) -> bool {
    view.leader.as_ref().is_some_and(|leader| view.sync.leader.as_ref() == Some(&leader.name)) && view.sync.lists(name)
}

/// Whether the holder of the leader key has announced that it is about to stop.
pub(crate) fn resigns(view: &ClusterView) -> bool {
    view.leader_member().is_some_and(|member| member.state == "stopping")
}

fn reign(view: &ClusterView) -> Option<Epoch> {
    let key = view.leader.as_ref()?;
    let denies = |member: &Member| !matches!(member.role.as_str(), "primary" | "master" | "promoted");
    if view.members.get(&key.name).is_some_and(denies) {
        return None;
    }
    Some(Epoch { member: key.name.clone(), created: key.created })
}

/// The verdict on a leader that takes sessions.
pub(crate) const LEADER: &str = "leader";

/// The verdict on a leader that will take sessions soon.
const NOT_PROMOTED: &str = "leader, but not promoted yet";

fn leader_verdict(member: &Member) -> Result<&'static str, &'static str> {
    match member.role.as_str() {
        _ if member.claims_primary() => Ok(LEADER),
        "primary" | "master" => Err("leader, but its server is not running"),
        "standby_leader" => Err("leader of a standby cluster: never writable"),
        _ => Err(NOT_PROMOTED),
    }
}

fn standby_verdict(member: &Member) -> Result<&'static str, &'static str> {
    if !member.is_running() {
        return Err("not running");
    }
    if member.role != "replica" {
        return Err("neither leader nor replica");
    }
    if member.tag_is_true("noloadbalance") {
        return Err("tagged noloadbalance");
    }
    match member.replication_state.as_deref() {
        Some("streaming") => Ok("streaming standby"),
        _ => Err("not streaming"),
    }
}

/// An agent that can't ask its server goes on to call it running, but knows no position.
fn is_up(member: &Member) -> bool {
    member.is_running() && member.xlog_location.or(member.replay_lsn).or(member.receive_lsn).is_some()
}

/// Both positions are published at most once per `loop_wait`, so a standby may look ahead of its leader: no lag then.
fn lag(optime: Lsn, member: &Member) -> Option<u64> {
    let at = member.replay_lsn.or(member.xlog_location).or(member.receive_lsn)?;
    optime.is_valid().then(|| at.lag_behind(optime))
}

#[cfg(test)]
pub(crate) mod tests {
    use trunkline_common::LeaseId;
    use trunkline_common::cluster::{LeaderKey, Status, SyncState};

    use super::*;

    pub(crate) fn member(role: &str, state: &str) -> Member {
        Member {
            conn_url: Some("postgres://10.0.0.1:5433/postgres".into()),
            role: role.into(),
            state: state.into(),
            replication_state: (role == "replica").then(|| "streaming".into()),
            xlog_location: Some(Lsn(900)),
            ..Member::default()
        }
    }

    pub(crate) fn view(leader: Option<(&str, i64)>, members: &[(&str, Member)]) -> ClusterView {
        ClusterView {
            revision: Revision(50),
            leader: leader.map(|(name, created)| LeaderKey {
                name: name.into(),
                lease: LeaseId(1),
                created: Revision(created),
                modified: Revision(created),
            }),
            members: members.iter().map(|(name, member)| ((*name).into(), member.clone())).collect(),
            status: Status { optime: Lsn(1_000), ..Status::default() },
            ..ClusterView::default()
        }
    }

    fn epoch(member: &str, created: i64) -> Epoch {
        Epoch { member: member.into(), created: Revision(created) }
    }

    fn names(backends: &[Arc<Backend>]) -> Vec<&str> {
        backends.iter().map(|backend| backend.member.as_str()).collect()
    }

    #[test]
    fn the_leader_is_key_and_running_and_primary() {
        let url_less = Member { conn_url: None, ..member("primary", "running") };
        for (what, holder, record, routed, reigns) in [
            ("a healthy leader", Some("a"), Some(member("primary", "running")), true, true),
            ("an old agent's word for it", Some("a"), Some(member("master", "running")), true, true),
            ("no key", None, Some(member("primary", "running")), false, false),
            ("left over after a clean stop (§6.2)", None, Some(member("primary", "stopped")), false, false),
            ("another one's key", Some("b"), Some(member("primary", "running")), false, true),
            ("elected, still replaying", Some("a"), Some(member("replica", "running")), false, false),
            ("promotion not confirmed", Some("a"), Some(member("promoted", "running")), false, true),
            ("demoted", Some("a"), Some(member("demoted", "stopping")), false, false),
            ("a standby cluster", Some("a"), Some(member("standby_leader", "running")), false, false),
            ("restarting in place", Some("a"), Some(member("primary", "restarting")), false, true),
            ("stopping", Some("a"), Some(member("primary", "stopping")), false, true),
            ("record missing", Some("a"), None, false, true),
            ("no address", Some("a"), Some(url_less), false, true),
        ] {
            let members: Vec<_> = record.into_iter().map(|record| ("a", record)).collect();
            let table = RouteTable::from_view(&view(holder.map(|name| (name, 7)), &members));
            assert_eq!(table.leader.is_some(), routed, "{what}: where new sessions go");
            let expected = holder.filter(|_| reigns).map(|name| epoch(name, 7));
            assert_eq!(table.reign, expected, "{what}: whose sessions go on");
            if let Some(leader) = table.leader {
                assert_eq!(leader.epoch, table.reign, "{what}");
            }
        }
    }

    #[test]
    fn a_key_created_anew_is_another_epoch_and_a_rewritten_one_is_not() {
        let members = [("a", member("primary", "running"))];
        let mut before = view(Some(("a", 7)), &members);
        let first = RouteTable::from_view(&before);
        if let Some(key) = before.leader.as_mut() {
            key.lease = LeaseId(2);
            key.modified = Revision(60);
        }
        assert_eq!(RouteTable::from_view(&before).reign, first.reign, "attached to a new lease");
        assert_ne!(RouteTable::from_view(&view(Some(("a", 61)), &members)).reign, first.reign);
    }

    #[test]
    fn standbys_stream_and_are_not_excluded() {
        let archive = Member { replication_state: Some("in archive recovery".into()), ..member("replica", "running") };
        let mut tagged = member("replica", "running");
        tagged.tags.insert("noloadbalance".into(), true.into());
        let table = RouteTable::from_view(&view(
            Some(("a", 7)),
            &[
                ("a", member("primary", "running")),
                ("b", member("replica", "running")),
                ("c", archive),
                ("d", tagged),
                ("e", member("replica", "starting")),
                ("f", member("primary", "running")),
            ],
        ));
        assert_eq!(names(&table.standbys), ["b"]);
        assert_eq!(table.standbys[0].lag, Some(100));
        assert_eq!(table.standbys[0].epoch, None);
        let why = |name: &str| table.verdicts.iter().find(|(n, _)| n.as_str() == name).map(|(_, why)| *why);
        assert_eq!(why("c"), Some("not streaming"));
        assert_eq!(why("d"), Some("tagged noloadbalance"));
        assert_eq!(why("f"), Some("neither leader nor replica"));
    }

    #[test]
    fn a_sync_list_of_another_leader_says_nothing() {
        let members = [("a", member("primary", "running")), ("b", member("replica", "running"))];
        let mut cluster = view(Some(("a", 7)), &members);
        for (owner, listed) in [("a", true), ("z", false)] {
            cluster.sync = SyncState { leader: Some(owner.into()), standbys: vec!["B".into()], ..SyncState::default() };
            assert_eq!(RouteTable::from_view(&cluster).standbys[0].sync, listed, "{owner}");
        }
    }

    #[test]
    fn unconfirmed_keeps_the_reign_and_asks_for_proof() {
        let table = RouteTable::from_view(&view(
            Some(("a", 7)),
            &[("a", member("primary", "running")), ("b", member("replica", "running"))],
        ));
        let doubted = table.clone().unconfirmed(false);
        assert_eq!((doubted.leader.is_some(), &doubted.reign), (false, &table.reign));
        assert_eq!(names(&doubted.standbys), ["b"]);
        assert_eq!(table.clone().unconfirmed(true).leader, table.leader);
    }
}
