//! A failing scenario with fewer events that still fails.

use crate::scenario::Scenario;
use crate::world;

/// Leaves out halves, quarters … and in the end single events, as long as something still goes wrong.
pub fn shrink(scenario: &Scenario) -> Scenario {
    let fails = |scenario: &Scenario| !world::run(scenario).violations.is_empty();
    let mut smallest = scenario.clone();
    let mut chunk = smallest.events.len().div_ceil(2).max(1);
    loop {
        let mut start = 0;
        let mut shrunk = false;
        while start < smallest.events.len() {
            let end = (start + chunk).min(smallest.events.len());
            let candidate = smallest.with(|index| index < start || index >= end);
            if fails(&candidate) {
                smallest = candidate;
                shrunk = true;
            } else {
                start = end;
            }
        }
        if chunk == 1 && !shrunk {
            return smallest;
        }
        chunk = if chunk == 1 { 1 } else { chunk.div_ceil(2) };
    }
}
