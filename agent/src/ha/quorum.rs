//! Quorum commit: in which order the `sync` key and PostgreSQL learn of changes (ha-loop §15.3). Pure.
//!
//! A commit waits for any `count` of the `names`; whoever wants to lead after the leader's death needs the word of `quorum`
//! of the other `voters`. Of everybody who may vote or confirm, whoever confirmed a commit and whoever votes must have one in
//! common: `|voters ∪ names ∪ {leader}| ≤ quorum + count + 1`. No step may break that, in whichever order nodes come, go and
//! change their minds. The steps are Patroni's, so that a cluster may change hands in the middle of them, but for one thing: who has
//! confirmed is never taken for granted.

use std::collections::BTreeSet;

/// Members by name.
pub type Names = BTreeSet<String>;

/// What there is, and what is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quorum {
    /// Owner of the key.
    pub leader: String,
    /// Votes needed besides one's own.
    pub quorum: usize,
    /// Those on the key.
    pub voters: Names,
    /// How many confirm a commit.
    pub count: usize,
    /// Those in `synchronous_standby_names`.
    pub names: Names,
    /// How many of those that are asked to confirm have everything that was committed before they were.
    pub confirmed: usize,
    /// Those that could confirm now.
    pub active: Names,
    /// How many should confirm.
    pub wanted: usize,
    /// This node.
    pub me: String,
}

/// One change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Write the key.
    Key {
        /// Its owner.
        leader: String,
        /// Votes needed.
        quorum: usize,
        /// Voters.
        voters: Names,
    },
    /// Set `synchronous_standby_names`.
    Names {
        /// How many confirm.
        count: usize,
        /// Whom to ask.
        names: Names,
    },
    /// Nobody has confirmed yet: look again soon.
    Wait,
}

/// Why the list of steps ends early.
enum End {
    /// The step would break what has to hold, or makes no sense.
    Illegal,
    /// What follows depends on what nobody can know yet.
    Enough,
}

/// The steps to what is wanted. Consecutive ones of a kind are one: nobody sees what is in between.
pub fn steps(state: &Quorum) -> Vec<Step> {
    let mut plan = Plan { state: state.clone(), steps: Vec::new() };
    plan.state.count = plan.state.count.min(plan.state.names.len());
    if let Err(End::Illegal) = plan.make()
        && plan.steps.is_empty()
        && !state.voters.is_empty()
    {
        // There is no way on from here: this node vouches for itself alone, and begins anew.
        return vec![Step::Key { leader: state.me.clone(), quorum: 0, voters: Names::new() }];
    }
    let mut merged: Vec<Step> = Vec::new();
    for step in plan.steps {
        let same = merged.last().is_some_and(|last| std::mem::discriminant(last) == std::mem::discriminant(&step));
        if same {
            merged.pop();
        }
        merged.push(step);
    }
    merged
}

struct Plan {
    state: Quorum,
    steps: Vec<Step>,
}

impl Plan {
    fn make(&mut self) -> Result<(), End> {
        match self.take_over() {
            Err(End::Illegal) => self.mend()?,
            other => other?,
        }
        self.finish_what_was_begun()?;
        self.remove_gone()?;
        self.add_new()?;
        self.change_count()
    }

    /// A new leader writes its name, and counts on the old one.
    fn take_over(&mut self) -> Result<(), End> {
        if self.state.leader == self.state.me {
            return self.check();
        }
        let mut voters = self.state.voters.clone();
        voters.remove(&self.state.me);
        voters.insert(self.state.leader.clone());
        if self.state.names.is_empty() {
            self.set_names(signed(voters.len()) - signed(self.state.quorum), voters.clone())?;
        }
        let me = self.state.me.clone();
        self.set_key(signed(self.state.quorum), voters, Some(me), false)?;
        if both(&self.state.names, &self.state.active).is_empty() {
            // The standbys have yet to come over.
            return Err(End::Enough);
        }
        Ok(())
    }

    /// What is found makes no sense. What PostgreSQL does counts for the node that has led so far; a new leader trusts nobody
    /// until they have caught up.
    fn mend(&mut self) -> Result<(), End> {
        if self.state.leader != self.state.me {
            let me = self.state.me.clone();
            return self.set_key(0, Names::new(), Some(me), false);
        }
        let names = self.state.names.clone();
        self.set_key(signed(names.len()) - signed(self.state.count), names, None, true)
    }

    fn finish_what_was_begun(&mut self) -> Result<(), End> {
        let (voters, names, active) = (&self.state.voters, &self.state.names, self.state.active.clone());
        if names.len() < voters.len() && names.is_subset(voters) {
            let gone: Names = voters.iter().filter(|v| !names.contains(*v) && !active.contains(*v)).cloned().collect();
            if !gone.is_empty() {
                let quorum = signed(voters.len()) - signed(gone.len()) - signed(self.state.count);
                let adjust = names.is_subset(&active);
                self.set_key(quorum, without(voters, &gone), None, adjust)?;
            }
            let new = without(&both(&self.state.voters, &active), &self.state.names);
            if !new.is_empty() {
                // A leader that every vote needs may have waited for nobody so far.
                self.set_names(signed(self.state.count.max(1)), with(&self.state.names, &new))?;
            }
        } else if voters.len() < names.len() && voters.is_subset(names) {
            let gone = without(names, &active);
            let left = without(names, &gone);
            let overlaps = voters.is_empty() || !both(&left, voters).is_empty();
            if !gone.is_empty() && !left.is_empty() && overlaps {
                self.set_names(signed(self.state.count.min(left.len())), left)?;
            }
            let new = both(&without(&self.state.names, &self.state.voters), &active);
            if !new.is_empty() {
                let voters = with(&self.state.voters, &new);
                self.set_key(signed(voters.len()) - signed(self.state.count), voters, None, true)?;
            }
            let gone = without(&self.state.names, &self.state.voters);
            if !gone.is_empty() {
                let left = without(&self.state.names, &gone);
                self.set_names(signed(self.state.count.min(left.len())), left)?;
            }
        }
        self.lower_what_is_too_high()
    }

    fn lower_what_is_too_high(&mut self) -> Result<(), End> {
        let s = &self.state;
        let (size, names, voters) = (s.names.len(), s.names.clone(), s.voters.clone());
        if names != voters {
            return Err(End::Enough);
        }
        if s.quorum + s.count.min(s.confirmed) > size {
            if s.count > s.wanted {
                let count = s.wanted.max(s.voters.len().saturating_sub(s.quorum));
                self.set_names(signed(count), names)
            } else {
                self.set_key(signed(size) - signed(s.count), voters, None, true)
            }
        } else if s.count == s.wanted && s.count > s.confirmed && s.quorum + s.count > size {
            self.set_key(signed(size) - signed(s.count), voters, None, true)
        } else {
            Ok(())
        }
    }

    fn remove_gone(&mut self) -> Result<(), End> {
        let mut gone = without(&self.state.names, &self.state.active);
        if gone.is_empty() {
            return Ok(());
        }
        if gone == self.state.names {
            self.set_key(0, Names::new(), None, false)?;
            return self.set_names(0, Names::new());
        }
        if self.state.quorum > 0 {
            // As many as the quorum has room for.
            let take: Names = gone.iter().rev().take(self.state.quorum).cloned().collect();
            let left = without(&self.state.names, &take);
            let count = self.state.wanted.max(self.state.count).min(left.len());
            self.set_names(signed(count), left)?;
            gone = both(&gone, &self.state.names);
            let voters = without(&self.state.voters, &take);
            let quorum = signed(voters.len()) - signed(self.state.count);
            self.set_key(quorum, voters, None, gone.is_empty())?;
        }
        if !gone.is_empty() {
            let left = without(&self.state.names, &gone);
            let voters = without(&self.state.voters, &gone);
            let count = signed(self.state.count) - signed(gone.len());
            let lower = count - signed(self.state.wanted.min(left.len()));
            let quorum = if lower == 0 { 0 } else { lower.min(signed(voters.len()) - 1) };
            self.set_key(quorum, voters, None, false)?;
            self.set_names(count, left)?;
        }
        Ok(())
    }

    fn add_new(&mut self) -> Result<(), End> {
        let mut new = without(&self.state.active, &self.state.names);
        if new.is_empty() {
            return Ok(());
        }
        let wanted = self.state.wanted.min(with(&self.state.names, &new).len());
        if wanted > self.state.count {
            let missing = wanted - self.state.count;
            let add: Names = match self.state.names.is_empty() {
                true => new.clone(),
                false => new.iter().take(missing).cloned().collect(),
            };
            // Each new name can confirm one more.
            let more = if self.state.names.is_empty() { missing } else { add.len() };
            self.set_names(signed(self.state.count + more), with(&self.state.names, &add))?;
            let voters = with(&self.state.voters, &add);
            self.set_key(signed(voters.len()) - signed(wanted), voters, None, true)?;
            new = without(&new, &self.state.names);
        }
        if !new.is_empty() {
            let voters = with(&self.state.voters, &new);
            let adjust = wanted > self.state.confirmed;
            self.set_key(signed(voters.len()) - signed(wanted), voters, None, adjust)?;
            self.set_names(signed(wanted), with(&self.state.names, &new))?;
        }
        Ok(())
    }

    fn change_count(&mut self) -> Result<(), End> {
        let s = &self.state;
        let (names, voters, count) = (s.names.clone(), s.voters.clone(), signed(s.count));
        let wanted = signed(s.wanted.min(names.len()));
        let size = signed(voters.len());
        if wanted > count {
            self.set_names(wanted, names)?;
            self.set_key(size - wanted, voters, None, true)
        } else if wanted < count {
            let adjust = s.wanted > s.confirmed;
            if signed(s.quorum) + count - wanted < size {
                self.set_key(size - wanted, voters, None, adjust)?;
            }
            self.set_names(wanted, names)
        } else {
            Ok(())
        }
    }

    /// `adjust`: ask for more votes while fewer have confirmed than should.
    fn set_key(&mut self, quorum: isize, voters: Names, leader: Option<String>, adjust: bool) -> Result<(), End> {
        let s = &mut self.state;
        let Ok(mut quorum) = usize::try_from(quorum) else { return Err(End::Illegal) };
        if quorum > 0 && quorum >= voters.len() {
            return Err(End::Illegal);
        }
        let before = (s.leader.clone(), s.quorum, s.voters.clone());
        let mut voters = voters;
        match leader {
            Some(leader) => s.leader = leader,
            None if s.confirmed == 0 && s.voters.is_empty() => (quorum, voters) = (0, Names::new()),
            None if adjust => quorum += s.count.saturating_sub(s.confirmed),
            None => {}
        }
        let after = (s.leader.clone(), quorum, voters);
        if after == before {
            if s.voters.is_empty() {
                self.steps.push(Step::Wait);
                return Err(End::Enough);
            }
            return Ok(());
        }
        (s.leader, s.quorum, s.voters) = after;
        self.check()?;
        let s = &self.state;
        self.steps.push(Step::Key { leader: s.leader.clone(), quorum: s.quorum, voters: s.voters.clone() });
        Ok(())
    }

    fn set_names(&mut self, count: isize, names: Names) -> Result<(), End> {
        let Ok(count) = usize::try_from(count) else { return Err(End::Illegal) };
        if count > names.len() {
            return Err(End::Illegal);
        }
        // Where none has to confirm nobody is named.
        let names = if count == 0 { Names::new() } else { names };
        (self.state.count, self.state.names) = (count, names);
        self.check()?;
        self.steps.push(Step::Names { count, names: self.state.names.clone() });
        Ok(())
    }

    /// What has to hold before and after every step.
    fn check(&self) -> Result<(), End> {
        if holds(&self.state) { Ok(()) } else { Err(End::Illegal) }
    }
}

/// Whether every vote that succeeds has somebody in it who confirmed.
pub fn holds(s: &Quorum) -> bool {
    let mut voters = s.voters.clone();
    voters.insert(s.leader.clone());
    let mut names = s.names.clone();
    names.insert(s.me.clone());
    let covered = s.voters.is_empty() || with(&voters, &names).len() <= s.quorum + s.count + 1;
    covered && (voters.is_subset(&names) || names.is_subset(&voters))
}

fn signed(size: usize) -> isize {
    isize::try_from(size).unwrap_or(isize::MAX)
}

fn with(a: &Names, b: &Names) -> Names {
    a.union(b).cloned().collect()
}

fn without(a: &Names, b: &Names) -> Names {
    a.difference(b).cloned().collect()
}

fn both(a: &Names, b: &Names) -> Names {
    a.intersection(b).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str) -> Names {
        text.chars().map(String::from).collect()
    }

    fn state(leader: &str, (quorum, voters): (usize, &str), (count, named): (usize, &str), confirmed: usize) -> Quorum {
        let leader = leader.to_owned();
        let (voters, names, me) = (names(voters), names(named), "a".to_owned());
        Quorum { leader, quorum, voters, count, names, confirmed, active: Names::new(), wanted: 1, me }
    }

    fn text(steps: &[Step]) -> Vec<String> {
        let list = |names: &Names| names.iter().cloned().collect::<String>();
        let step = |step: &Step| match step {
            Step::Key { leader, quorum, voters } => format!("{leader}: {quorum} of {}", list(voters)),
            Step::Names { count, names } => format!("any {count} of {}", list(names)),
            Step::Wait => "wait".to_owned(),
        };
        steps.iter().map(step).collect()
    }

    fn apply(state: &mut Quorum, step: &Step) {
        match step.clone() {
            Step::Key { leader, quorum, voters } => {
                (state.leader, state.quorum, state.voters) = (leader, quorum, voters)
            }
            Step::Names { count, names } => (state.count, state.names) = (count, names),
            Step::Wait => {}
        }
    }

    #[test]
    fn patronis_steps() {
        let ab = |state: Quorum, active: &str, wanted| Quorum { active: names(active), wanted, ..state };
        for (what, state, expected) in [
            ("first standbys", ab(state("a", (0, ""), (0, ""), 0), "bc", 1), &["any 1 of bc", "wait"][..]),
            ("they have caught up", ab(state("a", (0, ""), (1, "bc"), 1), "bc", 1), &["a: 1 of bc"]),
            ("all is well", ab(state("a", (1, "bc"), (1, "bc"), 1), "bc", 1), &[]),
            ("a third", ab(state("a", (1, "bc"), (1, "bc"), 1), "bcd", 1), &["a: 2 of bcd", "any 1 of bcd"]),
            ("one is gone", ab(state("a", (1, "bc"), (1, "bc"), 1), "b", 1), &["any 1 of b", "a: 0 of b"]),
            ("all are gone", ab(state("a", (1, "bc"), (1, "bc"), 0), "", 1), &["a: 0 of ", "any 0 of "]),
            ("two shall confirm", ab(state("a", (1, "bc"), (1, "bc"), 2), "bc", 2), &["any 2 of bc", "a: 0 of bc"]),
            ("one is enough", ab(state("a", (0, "bc"), (2, "bc"), 2), "bc", 1), &["a: 1 of bc", "any 1 of bc"]),
            // Patroni takes it for granted that c has confirmed, and writes "a: 0 of c": c could lead by its own word, and
            // without what only b has confirmed.
            (
                "a new leader",
                ab(state("b", (1, "ac"), (1, "bc"), 0), "c", 1),
                &["a: 1 of bc", "any 1 of c", "a: 1 of c"],
            ),
            ("every vote needs it", ab(state("a", (1, "b"), (0, ""), 0), "b", 1), &["any 1 of b"]),
            ("the same, and nobody is left", ab(state("a", (1, "b"), (0, ""), 0), "", 1), &["a: 0 of "]),
            ("a new leader alone", ab(state("b", (0, "a"), (1, "b"), 0), "", 1), &["a: 0 of b"]),
        ] {
            assert_eq!(text(&steps(&state)), expected, "{what}");
        }
    }

    fn subsets() -> impl Iterator<Item = Names> + Clone {
        (0..8)
            .map(|bits| "bcd".chars().enumerate().filter(|(i, _)| bits >> i & 1 == 1).map(|(_, c)| c.into()).collect())
    }

    /// Every state of four nodes, sound or not.
    fn every_state(mut check: impl FnMut(Quorum)) {
        for (voters, named, active) in subsets().flat_map(|v| {
            subsets().flat_map(move |s| {
                subsets().map({
                    let v = v.clone();
                    move |a| (v.clone(), s.clone(), a)
                })
            })
        }) {
            for (quorum, count, wanted) in (0..3).flat_map(|q| (0..4).flat_map(move |n| (1..3).map(move |w| (q, n, w))))
            {
                for (confirmed, leader) in (0..3).flat_map(|c| ["a", "b"].map(|leader| (c, leader))) {
                    let possible = count <= named.len()
                        && (count == 0) == named.is_empty()
                        && (quorum == 0 || quorum < voters.len());
                    if !possible || confirmed > both(&named, &active).len() || voters.contains(leader) {
                        continue;
                    }
                    check(Quorum {
                        leader: leader.to_owned(),
                        quorum,
                        voters: voters.clone(),
                        count,
                        names: named.clone(),
                        confirmed,
                        active: active.clone(),
                        wanted,
                        me: "a".to_owned(),
                    });
                }
            }
        }
    }

    #[test]
    fn no_step_from_any_state_breaks_what_has_to_hold() {
        every_state(|state| {
            let mut now = state.clone();
            for step in steps(&state) {
                apply(&mut now, &step);
                assert!(step == Step::Wait || holds(&now), "{step:?} of {state:?}");
            }
        });
    }

    #[test]
    fn from_every_state_it_gets_where_it_should_however_often_it_is_interrupted() {
        every_state(|start| {
            let mut state = start.clone();
            for _ in 0..14 {
                // One step a turn; whoever is asked and there confirms in time.
                if let Some(step) = steps(&state).first() {
                    apply(&mut state, step);
                }
                state.confirmed = both(&state.names, &state.active).len().min(state.count);
            }
            let count = start.wanted.min(start.active.len());
            let settled = (state.leader.as_str(), state.quorum, &state.voters, &state.names, state.count);
            if start.active.is_empty() {
                assert!(state.voters.is_empty(), "{start:?} ends as {state:?}");
                return;
            }
            let expected = ("a", start.active.len() - count, &start.active, &start.active, count);
            assert_eq!(settled, expected, "{start:?}");
        });
    }
}
