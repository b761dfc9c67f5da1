//! Strongly connected components, without recursion: histories are longer than stacks.

/// The components with more than one node, of a graph given by the successors of each node (Tarjan).
pub(super) fn cycles(successors: &[Vec<usize>]) -> Vec<Vec<usize>> {
    const UNSEEN: usize = usize::MAX;
    let count = successors.len();
    let (mut index, mut low, mut on_stack) = (vec![UNSEEN; count], vec![0; count], vec![false; count]);
    let (mut stack, mut path, mut next, mut found) = (Vec::new(), Vec::new(), 0, Vec::new());
    for root in 0..count {
        if index[root] != UNSEEN {
            continue;
        }
        path.push((root, 0));
        while let Some((node, edge)) = path.pop() {
            if edge == 0 {
                (index[node], low[node], on_stack[node]) = (next, next, true);
                next += 1;
                stack.push(node);
            } else {
                low[node] = low[node].min(low[successors[node][edge - 1]]);
            }
            // Goes on where it was interrupted to look at a successor.
            let mut at = edge;
            let mut descended = false;
            while let Some(&to) = successors[node].get(at) {
                at += 1;
                if index[to] == UNSEEN {
                    path.push((node, at));
                    path.push((to, 0));
                    descended = true;
                    break;
                }
                if on_stack[to] {
                    low[node] = low[node].min(index[to]);
                }
            }
            if descended || low[node] != index[node] {
                continue;
            }
            let mut component = Vec::new();
            while let Some(member) = stack.pop() {
                on_stack[member] = false;
                component.push(member);
                if member == node {
                    break;
                }
            }
            if component.len() > 1 {
                found.push(component);
            }
        }
    }
    found
}

/// A shortest way from `from` back to it, without leaving `within`.
pub(super) fn shortest_cycle(successors: &[Vec<usize>], within: &[usize], from: usize) -> Vec<usize> {
    use std::collections::{BTreeMap, BTreeSet, VecDeque};
    let within: BTreeSet<usize> = within.iter().copied().collect();
    let mut came_from: BTreeMap<usize, usize> = BTreeMap::new();
    let mut queue = VecDeque::from([from]);
    while let Some(node) = queue.pop_front() {
        for to in successors[node].iter().copied().filter(|to| within.contains(to)) {
            if to == from {
                let mut way = vec![node];
                while let Some(before) = way.last().and_then(|last| came_from.get(last)) {
                    way.push(*before);
                }
                way.reverse();
                return way;
            }
            if let std::collections::btree_map::Entry::Vacant(entry) = came_from.entry(to) {
                entry.insert(node);
                queue.push_back(to);
            }
        }
    }
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_cycles_and_only_those() {
        assert!(cycles(&[vec![1, 2], vec![2], vec![], vec![0]]).is_empty());
        let two = [vec![1], vec![2], vec![0, 3], vec![4], vec![3], vec![0]];
        let mut found = cycles(&two);
        found.iter_mut().for_each(|component| component.sort_unstable());
        found.sort();
        assert_eq!(found, [vec![0, 1, 2], vec![3, 4]]);
        assert_eq!(shortest_cycle(&two, &[0, 1, 2], 1), [1, 2, 0]);
    }

    #[test]
    fn a_long_chain_needs_no_stack() {
        let mut chain: Vec<Vec<usize>> = (1..200_000).map(|next| vec![next]).collect();
        chain.push(vec![]);
        assert!(cycles(&chain).is_empty());
        chain[199_999].push(0);
        assert_eq!(cycles(&chain)[0].len(), 200_000);
    }
}
