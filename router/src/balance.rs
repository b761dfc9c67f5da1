//! Which of several servers a new session goes to. Pure: the caller brings the candidates, their load and the dice.

use rand::Rng;

/// Two random choices: of two candidates drawn at random, the one with fewer sessions. Nearly as even as asking all of
/// them, without the herd that "fewest" sends to a server that has just come back.
///
/// `None` only for no candidates.
pub fn pick<'a, T>(candidates: &'a [T], load: impl Fn(&T) -> usize, dice: &mut impl Rng) -> Option<&'a T> {
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

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;

    #[test]
    fn nothing_to_pick_and_nothing_to_choose() {
        let mut dice = StdRng::seed_from_u64(1);
        assert_eq!(pick(&[] as &[u8], |_| 0, &mut dice), None);
        assert_eq!(pick(&[7], |_| 1_000, &mut dice), Some(&7));
    }

    #[test]
    fn of_two_the_less_loaded_one() {
        let mut dice = StdRng::seed_from_u64(2);
        for _ in 0..100 {
            assert_eq!(pick(&[5, 3], |sessions| *sessions, &mut dice), Some(&3));
        }
    }

    #[test]
    fn sessions_spread_evenly() {
        let mut dice = StdRng::seed_from_u64(3);
        let mut sessions = [0usize; 5];
        for _ in 0..5_000 {
            let servers = [0usize, 1, 2, 3, 4];
            let chosen = *pick(&servers, |server| sessions[*server], &mut dice).unwrap();
            sessions[chosen] += 1;
        }
        let (least, most) = (sessions.iter().min().unwrap(), sessions.iter().max().unwrap());
        assert!(most - least < 20, "{sessions:?}");
    }
}
