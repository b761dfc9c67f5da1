//! Which of several servers a new session goes to. Pure: the caller brings the candidates, their load and the dice.

use std::net::IpAddr;

use rand::Rng;

/// Two random choices: of two candidates drawn at random, the one with fewer sessions. Nearly as even as asking all of
/// them, without the herd that "fewest" sends to a server that has just come back.
///
/// `None` only for no candidates.
pub fn two_choices<'a, T>(candidates: &'a [T], load: impl Fn(&T) -> usize, dice: &mut impl Rng) -> Option<&'a T> {
    match candidates {
        [] => None,
        [only] => Some(only),
        _ => {
            let first = dice.random_range(0..candidates.len());
            // Another one: a draw from the rest, skipping the first.
            let second = (first + dice.random_range(1..candidates.len())) % candidates.len();
            let (first, second) = (&candidates[first], &candidates[second]);
            Some(if load(second) < load(first) { second } else { first })
        }
    }
}

/// One after the other: the `turn`-th.
pub fn round_robin<T>(candidates: &[T], turn: usize) -> Option<&T> {
    candidates.get(turn.checked_rem(candidates.len())?)
}

/// The one that goes with the client's address, by rendezvous hashing: every router chooses the same, and when a server
/// comes or goes only its own clients move.
pub fn by_address<T>(candidates: &[T], name: impl Fn(&T) -> &str, client: Option<IpAddr>) -> Option<&T> {
    candidates.iter().max_by_key(|candidate| weight(name(candidate), client))
}

/// FNV-1a, and a finish that spreads its bits: the same in every version of every router.
fn weight(name: &str, client: Option<IpAddr>) -> u64 {
    let address = match client {
        Some(IpAddr::V4(v4)) => v4.octets().to_vec(),
        Some(IpAddr::V6(v6)) => v6.octets().to_vec(),
        None => Vec::new(),
    };
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    let hash = address.iter().chain(name.as_bytes()).fold(0xcbf2_9ce4_8422_2325, step);
    let mixed = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    mixed ^ (mixed >> 33)
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;

    #[test]
    fn nothing_to_pick_and_nothing_to_choose() {
        let mut dice = StdRng::seed_from_u64(1);
        assert_eq!(two_choices(&[] as &[u8], |_| 0, &mut dice), None);
        assert_eq!(two_choices(&[7], |_| 1_000, &mut dice), Some(&7));
    }

    #[test]
    fn of_two_the_less_loaded_one() {
        let mut dice = StdRng::seed_from_u64(2);
        for _ in 0..100 {
            assert_eq!(two_choices(&[5, 3], |sessions| *sessions, &mut dice), Some(&3));
        }
    }

    #[test]
    fn sessions_spread_evenly() {
        let mut dice = StdRng::seed_from_u64(3);
        let mut sessions = [0usize; 5];
        for _ in 0..5_000 {
            let servers = [0usize, 1, 2, 3, 4];
            let chosen = *two_choices(&servers, |server| sessions[*server], &mut dice).unwrap();
            sessions[chosen] += 1;
        }
        let (least, most) = (sessions.iter().min().unwrap(), sessions.iter().max().unwrap());
        assert!(most - least < 20, "{sessions:?}");
    }

    #[test]
    fn one_after_the_other() {
        let chosen: Vec<_> = (0..5).map(|turn| round_robin(&["a", "b", "c"], turn).copied()).collect();
        assert_eq!(chosen, [Some("a"), Some("b"), Some("c"), Some("a"), Some("b")]);
        assert_eq!(round_robin(&[] as &[u8], 7), None);
    }

    #[test]
    fn a_client_stays_where_it_is_when_others_come_and_go() {
        let client = |n: u32| Some(IpAddr::from(n.to_be_bytes()));
        let choose = |servers: &[&'static str], n| by_address(servers, |name| name, client(n)).copied();
        let mut counts = std::collections::BTreeMap::new();
        for n in 0x0a00_0000..0x0a00_0bb8 {
            let before = choose(&["a", "b", "c"], n);
            *counts.entry(before).or_insert(0) += 1;
            assert_eq!(choose(&["c", "a", "b"], n), before, "whatever their order");
            let without_b = choose(&["a", "c"], n);
            assert!(before == Some("b") || without_b == before);
        }
        assert!(counts.values().all(|count| (900..1_100).contains(count)), "{counts:?}");
        assert_eq!(by_address(&[] as &[&str], |name| name, None), None);
        assert_eq!(by_address(&["a", "b", "c"], |name| name, client(0x0a00_0001)), Some(&"b"), "in every version");
    }
}
