//! Mode `on`, every state that can be reached with three nodes, in whatever order things happen: the promise holds in each of
//! them, and from each of them the key gets where it should as soon as nothing happens any more.

use std::collections::HashSet;

use super::tests::{primary, sender, view};
use super::*;

/// How much is written in all, in commits.
const WRITES: u8 = 1;

/// Beside the leader, which is `a`.
const OTHERS: [&str; 2] = ["b", "c-1"];

/// One standby. Positions count commits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
struct Standby {
    /// It streams.
    up: bool,
    /// What it has.
    flushed: u8,
    /// The leader's position when PostgreSQL began to wait for it, if it does.
    since: Option<u8>,
    /// On the key.
    listed: bool,
    /// Tagged `nosync`.
    nosync: bool,
}

/// A moment: the leader, its key, and the step that it has decided on and not carried out yet.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct State {
    written: u8,
    acknowledged: u8,
    others: [Standby; 2],
    names: String,
    strict: bool,
    count: usize,
    decided: Option<Decided>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Decided {
    Key([bool; 2]),
    Names(String),
}

impl State {
    fn view(&self) -> ClusterView {
        let listed: Vec<&str> = self.of(|standby| standby.listed).collect();
        let mut view = view(&listed);
        view.settings.synchronous_mode_strict = self.strict;
        view.settings.synchronous_node_count = self.count;
        for name in self.of(|standby| standby.nosync) {
            view.members.entry(name.into()).and_modify(|m| drop(m.tags.insert("nosync".to_owned(), true.into())));
        }
        view
    }

    fn of(&self, which: impl Fn(&Standby) -> bool) -> impl Iterator<Item = &'static str> {
        OTHERS.into_iter().zip(self.others).filter(move |(_, standby)| which(standby)).map(|(name, _)| name)
    }

    /// What the leader does next.
    fn decide(&self) -> Option<Decided> {
        let up = OTHERS.iter().zip(&self.others).filter(|(_, standby)| standby.up);
        let senders = up.map(|(name, standby)| {
            sender(name, if standby.since.is_some() { "sync" } else { "async" }, standby.flushed.into())
        });
        let mut running = primary(&self.names, senders.collect());
        running.lsn = Lsn(self.written.into());
        let since =
            OTHERS.iter().zip(&self.others).filter_map(|(name, s)| Some(((*name).to_owned(), Lsn(s.since?.into()))));
        match step(&self.view(), &running, &since.collect(), &"a".into(), "")? {
            SyncStep::Names(names, _) => Some(Decided::Names(names)),
            SyncStep::Key(write, _) => Some(Decided::Key(OTHERS.map(|name| lists(&write, name)))),
        }
    }

    /// The step is carried out, however long ago it was decided on.
    fn carry_out(&mut self) {
        match self.decided.take() {
            Some(Decided::Key(listed)) => self.list(listed),
            Some(Decided::Names(names)) => self.wait_for(names),
            None => {}
        }
    }

    fn list(&mut self, listed: [bool; 2]) {
        self.others.iter_mut().zip(listed).for_each(|(standby, listed)| standby.listed = listed);
    }

    fn wait_for(&mut self, names: String) {
        for (standby, name) in self.others.iter_mut().zip(OTHERS) {
            standby.since = mentions(&names, name).then(|| standby.since.unwrap_or(self.written));
        }
        self.names = names;
    }

    /// What PostgreSQL can tell its clients to be committed: each that it waits for streams, and has it.
    fn confirmed(&self) -> u8 {
        let waited: Vec<&Standby> = self.others.iter().filter(|standby| standby.since.is_some()).collect();
        if self.names.contains(STRICT_PLACEHOLDER) || waited.iter().any(|standby| !standby.up) {
            return self.acknowledged;
        }
        waited.iter().map(|standby| standby.flushed).min().unwrap_or(self.written).max(self.acknowledged)
    }

    /// `a` is gone, and one that the key names leads: it is called `a` from here on, and `a` as that one was.
    fn fail_over(&self, to: usize) -> Self {
        let view = self.view();
        let new: MemberName = OTHERS[to].into();
        let renamed = |name: &'static str| match name {
            _ if name == OTHERS[to] => "a",
            name => name,
        };
        let names = names_on_promotion(&view, &new, "");
        let listed =
            on_promotion(&view, &new).map_or([false; 2], |write| OTHERS.map(|name| lists(&write, renamed(name))));
        let written = self.others[to].flushed;
        let mut next = Self { written, decided: None, names: String::new(), ..self.clone() };
        next.others[to] = Standby { up: false, flushed: written, nosync: false, ..Standby::default() };
        for standby in &mut next.others {
            // What it has besides is rewound.
            (standby.flushed, standby.since) = (standby.flushed.min(written), None);
        }
        let waited: Vec<String> =
            OTHERS.iter().filter(|name| mentions(&names, renamed(name))).map(|name| (*name).to_owned()).collect();
        let text = if names.contains(STRICT_PLACEHOLDER) { names } else { names_text(&waited) };
        next.wait_for(text);
        next.list(listed);
        next
    }

    /// Everything that can happen next.
    fn next(&self) -> Vec<Self> {
        let mut next = Vec::new();
        let mut add = |change: &dyn Fn(&mut Self)| {
            let mut state = self.clone();
            change(&mut state);
            next.push(state);
        };
        add(&|state| state.decided = state.decide());
        add(&|state| state.carry_out());
        add(&|state| state.written = (state.written + 1).min(WRITES));
        add(&|state| state.acknowledged = state.confirmed());
        add(&|state| state.strict = !state.strict);
        add(&|state| state.count = 3 - state.count);
        for at in 0..OTHERS.len() {
            add(&|state| state.others[at].up = !state.others[at].up);
            add(&|state| state.others[at].nosync = !state.others[at].nosync);
            if self.others[at].up {
                add(&|state| state.others[at].flushed = (state.others[at].flushed + 1).min(state.written));
            }
        }
        next.extend((0..OTHERS.len()).filter(|at| self.others[*at].listed).map(|at| self.fail_over(at)));
        next
    }

    /// Nothing happens any more but what is decided; who is up gets what there is. `None`: it does not come to an end.
    fn settle(&self) -> Option<Self> {
        let mut state = self.clone();
        for _ in 0..8 {
            let written = state.written;
            state.others.iter_mut().filter(|standby| standby.up).for_each(|standby| standby.flushed = written);
            state.acknowledged = state.confirmed();
            state.decided = state.decide();
            if state.decided.is_none() {
                return Some(state);
            }
            state.carry_out();
        }
        None
    }
}

fn lists(write: &SyncWrite, name: &str) -> bool {
    let listed = write.value.as_ref().and_then(|value| value["sync_standby"].as_str());
    listed.is_some_and(|listed| mentions(listed, name))
}

#[test]
fn in_every_state_who_is_on_the_key_has_every_commit_and_the_key_gets_where_it_should() {
    let first = State {
        written: 0,
        acknowledged: 0,
        others: [Standby::default(); 2],
        names: String::new(),
        strict: false,
        count: 1,
        decided: None,
    };
    let (mut known, mut open) = (HashSet::from([first.clone()]), vec![first]);
    while let Some(state) = open.pop() {
        for (name, standby) in OTHERS.iter().zip(&state.others).filter(|(_, standby)| standby.listed) {
            assert!(standby.flushed >= state.acknowledged, "{name} lacks what was acknowledged: {state:?}");
        }
        open.extend(state.next().into_iter().filter(|next| known.insert(next.clone())));
        if state.decided.is_some() {
            continue;
        }
        let Some(end) = state.settle() else { panic!("{state:?} does not come to an end") };
        let may = end.others.map(|standby| standby.up && !standby.nosync);
        let able = may.iter().filter(|may| **may).count();
        if able == 0 && end.strict {
            assert!(!end.names.is_empty(), "strict, and commits wait for nobody: {end:?}");
            continue;
        }
        let listed = end.others.map(|standby| standby.listed);
        assert_eq!(listed, end.others.map(|standby| standby.since.is_some()), "{state:?} ends as {end:?}");
        assert!(listed.iter().zip(may).all(|(listed, may)| !listed || may), "{state:?} ends as {end:?}");
        assert_eq!(listed.iter().filter(|listed| **listed).count(), able.min(end.count), "{state:?} ends as {end:?}");
    }
    assert!(known.len() > 10_000, "{} states", known.len());
    println!("{} states", known.len());
}
