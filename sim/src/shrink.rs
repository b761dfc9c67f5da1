//! A failing scenario with fewer events that still fails in the same way.

use crate::scenario::Scenario;
use crate::world;

/// How many courses of a smaller scenario are tried: without one event everything that is drawn after it is another.
const COURSES: u64 = 24;

/// Leaves out halves, quarters … and in the end single events, as long as the same goes wrong, be it in another course of
/// events, by another seed.
pub fn shrink(scenario: &Scenario) -> Scenario {
    let Some(wrong) = kind(scenario) else { return scenario.clone() };
    let still_fails = |candidate: Scenario| {
        let course = |number| Scenario { seed: candidate.seed.wrapping_add(number), ..candidate.clone() };
        (0..COURSES).map(course).find(|candidate| kind(candidate).as_ref() == Some(&wrong))
    };
    let mut smallest = scenario.clone();
    let mut chunk = smallest.events.len().div_ceil(2).max(1);
    loop {
        let mut start = 0;
        let mut shrunk = false;
        while start < smallest.events.len() {
            let end = (start + chunk).min(smallest.events.len());
            match still_fails(smallest.with(|index| index < start || index >= end)) {
                Some(smaller) => (smallest, shrunk) = (smaller, true),
                None => start = end,
            }
        }
        if chunk == 1 && !shrunk {
            return smallest;
        }
        chunk = if chunk == 1 { 1 } else { chunk.div_ceil(2) };
    }
}

/// What goes wrong first, without its numbers and names.
fn kind(scenario: &Scenario) -> Option<String> {
    let violations = world::run(scenario).violations;
    let words = violations.first()?.split_whitespace().filter(|word| !word.contains(|c: char| c.is_ascii_digit()));
    Some(words.collect::<Vec<_>>().join(" "))
}
