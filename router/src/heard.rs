//! What members say of themselves, and what it adds to what the DCS says: the pure part of [`follow`](crate::follow).
//!
//! Two readings of the same facts meet here. The DCS names a leader, or none; a member proves over its REST API that it
//! leads. The DCS wins wherever it names somebody. Where it has been silent for too long, or has lost the key of a leader
//! that may go on by failsafe mode, a proof counts that was asked for after that was seen.

use std::time::Duration;

use trunkline_common::cluster::LeaderKey;
use trunkline_common::{ClusterView, Instant, LeaseId, Member, MemberName, Revision};
use trunkline_config::router::KnownMember;

use crate::table::{self, RouteTable};

/// So many questions in a row may go unanswered before a leader's word is over: a busy one must not lose its clients.
const PATIENCE: u32 = 2;

/// How long a leader's word is good for, from when it was asked; and how long the sessions of one whose key has vanished
/// go on while it has not answered.
const WORD: Duration = Duration::from_secs(2);

/// What a member says of itself: whether it is the primary, or why it says nothing.
pub type Answer = (MemberName, Result<bool, String>);

/// What the members said, and who led last.
#[derive(Debug, Default)]
pub struct Heard {
    claim: Claim,
    /// Who proved last that it leads, and when it was asked.
    word: Option<(MemberName, Instant)>,
    /// Who led when somebody did last.
    last: Option<Last>,
    /// The leader key has vanished, and `last` may lead on by failsafe mode: until then, unless it proves it.
    vacant: Option<Instant>,
    /// What the DCS said when it fell silent, while it is.
    silenced: Option<Subject>,
    /// What the DCS says next may be old: members are known from elsewhere so far, or it has gone back to an earlier state.
    unproven: bool,
    /// How often it had gone back.
    restores: u64,
    /// What the DCS says may be old: it is back and says the same, or is back from a backup.
    doubt: Option<Doubt>,
    /// Who led when the DCS went back, until it has written its record anew.
    outdated: Option<Outdated>,
}

/// A leader that a backup may show as the standby it was before, while its server takes writes still.
#[derive(Debug)]
struct Outdated {
    name: MemberName,
    /// Its record as it was read first, and until when it would have been written anew: a record that came back lives no
    /// longer without its agent.
    said: Option<(Member, Instant)>,
}

/// A leader by a record from before the DCS was silent, or that it has denied since. Its server may be a standby by now, and say
/// so in its record as soon as it gets there; until then it is asked.
#[derive(Debug)]
struct Doubt {
    about: Subject,
    /// It does not answer: then the DCS's word has to do.
    until: Option<Instant>,
}

/// Who says that it leads.
#[derive(Debug, Default)]
struct Claim {
    /// Who said so last. Kept while the DCS is silent: whoever led before has been deposed.
    leader: Option<MemberName>,
    /// The leader key and the holder's record that its word goes with: it is no answer to what was written later.
    about: Option<Subject>,
    /// Questions since then that were not answered.
    unanswered: u32,
}

/// A leader as it was routed to.
#[derive(Debug)]
struct Last {
    /// Its key; `created` is that of the epoch, which goes on where a leader takes its key anew without a break.
    key: LeaderKey,
    /// When the key that is or was in the DCS was created; `None` where it has not been seen there.
    created: Option<Revision>,
    /// Its record, which goes away with the same lease.
    record: Option<Member>,
}

/// What is known of the cluster, and the routes that follow.
#[derive(Debug)]
pub struct Reading {
    /// The DCS's view, with the leader in it that may lead without its key.
    pub view: ClusterView,
    /// The routes.
    pub table: RouteTable,
}

/// The members that are known without the DCS, none of whom leads until it proves it.
pub fn seed(members: &[KnownMember]) -> ClusterView {
    let member = |known: &KnownMember| {
        let member = Member {
            conn_url: Some(format!("postgres://{}/postgres", known.connect_address)),
            api_url: Some(known.api_url.clone()),
            ..Member::default()
        };
        (MemberName::from(known.name.as_str()), member)
    };
    ClusterView { members: members.iter().map(member).collect(), ..ClusterView::default() }
}

impl Heard {
    /// The same as [`read`](Self::read), of a [`seed`]: the DCS has not said anything yet.
    pub fn read_seed(&mut self, seed: &ClusterView, now: Instant) -> Reading {
        self.unproven = true;
        self.read(seed, now, false, false)
    }

    /// The DCS has gone back to an earlier state so many times: it may name somebody who led long ago.
    pub fn restored(&mut self, restores: u64) {
        if std::mem::replace(&mut self.restores, restores) == restores {
            return;
        }
        self.unproven = true;
        // By the state that it had gone back to before, another one led.
        let outdated = self.outdated.take().map(|outdated| outdated.name);
        let name = outdated.or_else(|| self.last.as_ref().map(|last| last.key.name.clone()));
        self.outdated = name.map(|name| Outdated { name, said: None });
    }

    /// What the DCS says at `now`, completed by what was heard. `confirmed`: it has not been silent for too long; `well`:
    /// nor is there any doubt.
    pub fn read(&mut self, view: &ClusterView, now: Instant, confirmed: bool, well: bool) -> Reading {
        let complete = self.complete(view, now);
        if well && self.claim.about.as_ref().is_some_and(|about| *about != subject(&complete)) {
            self.claim = Claim::default();
        }
        // Nor does it matter that it takes writes still, once it has announced that it is about to stop.
        let heard = |name: &&MemberName| !confirmed || (complete.is_leader(name) && !table::resigns(&complete));
        let shown = match self.claim.leader.as_ref().filter(heard) {
            Some(name) => led_by(complete.clone(), name),
            None => complete.clone(),
        };
        let mut table = RouteTable::from_view(&shown);
        self.remember(view, &shown, &table);
        table.key = self.last.as_ref().filter(|_| table.reign.is_some()).and_then(|last| last.created);
        self.weigh(&complete, now, confirmed);
        if !confirmed || self.waits_until(now).is_some() || self.doubt.is_some() {
            table = table.unconfirmed(self.proven().is_some_and(|name| shown.is_leader(name)));
        }
        if let Some(name) = self.outdated(view, now) {
            table.exclude(name, "led when the DCS went back, and has said nothing since");
        }
        Reading { view: complete, table }
    }

    /// Whose record is older than its leadership.
    fn outdated(&mut self, view: &ClusterView, now: Instant) -> Option<&MemberName> {
        let Outdated { name, said } = self.outdated.take()?;
        let record = view.members.get(&name)?;
        let (before, until) = said.unwrap_or_else(|| (record.clone(), now + view.settings.ttl));
        if before == *record && now < until {
            self.outdated = Some(Outdated { name, said: Some((before, until)) });
        }
        self.outdated.as_ref().map(|outdated| &outdated.name)
    }

    /// When a member may be a standby again that has led when the DCS went back.
    pub fn excludes_until(&self) -> Option<Instant> {
        self.outdated.as_ref().and_then(|outdated| outdated.said.as_ref()).map(|(_, until)| *until)
    }

    /// Whether what the DCS says may be from before it was silent.
    fn weigh(&mut self, complete: &ClusterView, now: Instant, confirmed: bool) {
        let about = subject(complete);
        if !confirmed {
            self.silenced = Some(about);
            self.doubt = None;
            return;
        }
        let can_be_asked = complete.leader_member().is_some_and(|member| member.api_url.is_some());
        let unproven = std::mem::take(&mut self.unproven);
        let same = self.silenced.take().is_some_and(|before| before == about);
        if (same || unproven) && can_be_asked {
            self.doubt = Some(Doubt { about, until: None });
        } else if self.doubt.as_ref().is_some_and(|doubt| doubt.about != about) {
            self.doubt = None;
        }
        let proven = self.proven().is_some_and(|name| complete.is_leader(name));
        let given_up = |doubt: &Doubt| doubt.until.is_some_and(|until| until <= now);
        self.doubt = self.doubt.take().filter(|doubt| !proven && !given_up(doubt));
    }

    /// The leader whose key has vanished and who may lead on by failsafe mode.
    pub fn suspect(&self) -> Option<&MemberName> {
        self.vacant.and(self.last.as_ref()).map(|last| &last.key.name)
    }

    /// Until when its sessions go on, if they do.
    pub fn waits_until(&self, now: Instant) -> Option<Instant> {
        self.vacant.filter(|until| now < *until)
    }

    /// Who has proved that it leads.
    pub fn proven(&self) -> Option<&MemberName> {
        self.claim.leader.as_ref().filter(|_| self.claim.unanswered < PATIENCE)
    }

    /// Who proved last that it leads, and until when that is good for.
    pub fn word(&self) -> Option<(MemberName, Instant)> {
        self.word.clone().map(|(name, asked)| (name, asked + WORD))
    }

    /// Takes note of the answers to questions that were sent at `asked`, when `view` was routed by.
    pub fn hear(&mut self, view: &ClusterView, answers: &[Answer], asked: Instant) {
        let leaders: Vec<&MemberName> =
            answers.iter().filter(|(_, answer)| *answer == Ok(true)).map(|(name, _)| name).collect();
        let takes_back = |(name, answer): &Answer| {
            *answer == Ok(false) && self.word.as_ref().is_some_and(|(word_of, _)| word_of == name)
        };
        if answers.iter().any(takes_back) {
            self.word = None;
        }
        match leaders[..] {
            [leader] => {
                let (leader, about) = (Some(leader.clone()), Some(subject(view)));
                self.word = leader.clone().map(|leader| (leader, asked));
                self.claim = Claim { leader, about, unanswered: 0 };
            }
            // Nobody, or more than one: whose word counted has not repeated it. A silent one gets another chance.
            _ => {
                let silent = |(name, answer): &Answer| Some(name) == self.claim.leader.as_ref() && answer.is_err();
                self.claim.unanswered = match leaders.is_empty() && answers.iter().any(silent) {
                    true => self.claim.unanswered.saturating_add(1),
                    false => PATIENCE,
                };
            }
        }
        // It takes no writes any more, and the DCS has not said so (yet).
        let denies = |(name, answer): &Answer| *answer == Ok(false) && view.is_leader(name);
        if self.doubt.is_none()
            && answers.iter().any(denies)
            && view.leader_member().is_some_and(Member::claims_primary)
        {
            self.doubt = Some(Doubt { about: subject(view), until: None });
        }
        if let Some(doubt) = &mut self.doubt {
            let leader = doubt.about.key.as_ref().map(|(name, _)| name);
            doubt.until = match answers.iter().find(|(name, _)| Some(name) == leader) {
                Some((_, Err(_))) => doubt.until.or(Some(asked + WORD)),
                _ => None,
            };
        }
        let of_suspect = |(name, _): &&Answer| Some(name) == self.suspect();
        match answers.iter().find(of_suspect).map(|(_, answer)| answer) {
            Some(Ok(true)) if leaders.len() == 1 => self.vacant = Some(asked + WORD),
            Some(Ok(_)) => self.vacant = Some(asked),
            Some(Err(_)) | None => {}
        }
    }

    /// The DCS's view, with the last leader in it while that may lead by failsafe mode although its key is gone.
    fn complete(&mut self, view: &ClusterView, now: Instant) -> ClusterView {
        let mut shown = view.clone();
        let Some(last) = &mut self.last else { return shown };
        match &mut shown.leader {
            Some(key) if key.name == last.key.name => {
                self.vacant = None;
                let unbroken = self.word.as_ref().is_some_and(|(name, asked)| *name == key.name && now < *asked + WORD);
                if Some(key.created) == last.created || unbroken {
                    last.created = Some(key.created);
                    key.created = last.key.created;
                }
            }
            Some(_) => self.vacant = None,
            None if may_lead_without_key(view, &last.key.name) => {
                if self.vacant.is_none() {
                    // What it said when it had the key says nothing now.
                    self.claim = Claim::default();
                }
                if now < *self.vacant.get_or_insert(now + WORD) {
                    shown.leader = Some(last.key.clone());
                    if let Some(record) = &last.record {
                        shown.members.entry(last.key.name.clone()).or_insert_with(|| record.clone());
                    }
                }
            }
            None => (self.vacant, self.last) = (None, None),
        }
        shown
    }

    /// Who leads, for when the key is gone. `view` is the DCS's.
    fn remember(&mut self, view: &ClusterView, shown: &ClusterView, table: &RouteTable) {
        let Some(key) = &shown.leader else { return };
        if table.reign.is_none() {
            (self.last, self.vacant) = (None, None);
            return;
        }
        let before = self.last.take().filter(|last| last.key.name == key.name);
        self.vacant = self.vacant.filter(|_| before.is_some());
        let created = match &view.leader {
            Some(real) if real.name == key.name => Some(real.created),
            _ => before.as_ref().and_then(|last| last.created),
        };
        let record = shown.leader_member().cloned().or(before.and_then(|last| last.record));
        self.last = Some(Last { key: key.clone(), created, record });
    }
}

/// Whether a leader that can't reach the DCS may go on by the promises of all members.
fn may_lead_without_key(view: &ClusterView, name: &MemberName) -> bool {
    view.settings.failsafe_mode && view.failsafe.as_ref().is_some_and(|members| members.contains_key(name))
}

/// What a member's word is about: the leader key as it was created, and role and state in its holder's record, where Patroni's
/// `promoted` takes nothing back that was true of a replica with the key.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Subject {
    key: Option<(MemberName, Revision)>,
    record: Option<(String, String)>,
}

/// What a word that is asked for now would be about.
pub(crate) fn subject(view: &ClusterView) -> Subject {
    let role = |member: &Member| if member.role == "promoted" { "replica".to_owned() } else { member.role.clone() };
    Subject {
        key: view.leader.as_ref().map(|key| (key.name.clone(), key.created)),
        record: view.leader_member().map(|member| (role(member), member.state.clone())),
    }
}

/// The view as `leader`, who has proven it, would show it.
fn led_by(mut view: ClusterView, leader: &MemberName) -> ClusterView {
    if !view.is_leader(leader) {
        // Its key has not been seen; what it was created at comes with the DCS.
        view.leader = Some(LeaderKey {
            name: leader.clone(),
            lease: LeaseId(0),
            created: view.revision,
            modified: view.revision,
        });
    }
    if let Some(member) = view.members.get_mut(leader) {
        (member.role, member.state) = ("primary".to_owned(), "running".to_owned());
    }
    view
}

#[cfg(test)]
mod tests;
