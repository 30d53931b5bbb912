//! Circles: at every level of the module tree, the files and folders that stand side by side name each other
//! in one direction only. A module and what lies inside it count as one; a name that a `mod.rs` only shows
//! (`pub use`) counts for the file that defines it.

use std::collections::{BTreeMap, BTreeSet};

use super::tree::{Path, Tree};

/// From a module to those it names, with one place in the code as the proof.
type Edges = BTreeMap<String, BTreeMap<String, String>>;

/// Every circle, as the way around it.
pub(super) fn circles(tree: &Tree) -> Vec<String> {
    let mut levels: BTreeMap<Path, Edges> = BTreeMap::new();
    for mention in tree.mentions.iter().filter(|mention| !mention.test && !mention.shown) {
        let Some(path) = tree.absolute(&mention.module, &mention.path) else { continue };
        let Some(to) = tree.home(&path) else { continue };
        let from = &mention.module;
        let shared = from.iter().zip(&to).take_while(|(from, to)| from == to).count();
        if let (Some(start), Some(end)) = (from.get(shared), to.get(shared)) {
            let proof = format!("{}:{} {}", tree.modules[from].file, mention.line, mention.path.join("::"));
            let edges = levels.entry(from[..shared].to_vec()).or_default();
            edges.entry(start.clone()).or_default().entry(end.clone()).or_insert(proof);
        }
    }
    levels.iter().flat_map(|(level, edges)| circles_of(level, edges)).collect()
}

/// The shortest circle through each node, every circle once.
fn circles_of(level: &[String], edges: &Edges) -> Vec<String> {
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    for start in edges.keys() {
        let Some(way) = shortest(edges, start) else { continue };
        let nodes: BTreeSet<&String> = way.iter().copied().collect();
        if !seen.insert(nodes) {
            continue;
        }
        let steps = way.iter().zip(way.iter().cycle().skip(1));
        let steps: Vec<String> =
            steps.map(|(from, to)| format!("\n    {from} -> {to}: {}", edges[*from][*to])).collect();
        found.push(format!("a circle in {}:{}", level.join("::"), steps.concat()));
    }
    found
}

/// The nodes of the shortest way from `start` back to itself.
fn shortest<'a>(edges: &'a Edges, start: &'a String) -> Option<Vec<&'a String>> {
    let mut ways = vec![vec![start]];
    let mut visited = BTreeSet::new();
    while !ways.is_empty() {
        let mut longer = Vec::new();
        for way in ways {
            for next in way.last().and_then(|last| edges.get(*last)).into_iter().flat_map(BTreeMap::keys) {
                if next == start {
                    return Some(way);
                }
                if visited.insert(next) {
                    longer.push(way.iter().copied().chain([next]).collect());
                }
            }
        }
        ways = longer;
    }
    None
}
