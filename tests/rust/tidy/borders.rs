//! Borders: what a module mentions is a room or a crate that the picture allows it.

use std::collections::BTreeSet;

use proc_macro2::{TokenStream, TokenTree};

use super::picture::{Crate, Room};
use super::tree::{Mention, Sources, Tree};

/// The room that an absolute path leads to; `None` for a name at the root of a crate.
pub(super) fn room<'a>(tree: &Tree, path: &'a [String]) -> Option<&'a str> {
    let inside = path.get(..2).filter(|start| tree.modules.contains_key(*start))?;
    Some(inside[1].as_str())
}

/// Rooms that are missing in the picture, named against its direction, or mentioned without leave.
pub(super) fn breaches(tree: &Tree, rooms: &[Room], crates: &[Crate]) -> Vec<String> {
    let mut wrong = tree.faults.clone();
    wrong.extend(unknown(tree, rooms));
    wrong.extend(rising(rooms));
    for mention in &tree.mentions {
        let Some(path) = tree.absolute(&mention.module, &mention.path) else { continue };
        let fault = match path[0].as_str() {
            "mlxd" | "main" => between_rooms(tree, rooms, mention, &path),
            "std" | "core" | "alloc" => clock(mention, &path),
            _ => crate_outside(crates, mention, &path),
        };
        if let Some(fault) = fault {
            let file = &tree.modules[&mention.module].file;
            wrong.push(format!("{file}:{}: {}: {fault}", mention.line, mention.path.join("::")));
        }
    }
    wrong.sort();
    wrong.dedup();
    wrong
}

fn unknown(tree: &Tree, rooms: &[Room]) -> Vec<String> {
    let drawn = |name: &str| rooms.iter().any(|room| room.name == name);
    let missing = tree.modules.keys().filter(|path| path.len() == 2 && !drawn(&path[1]));
    let modules: BTreeSet<&String> = tree.modules.keys().filter_map(|path| path.get(1)).collect();
    let empty = rooms.iter().filter(|room| !room.later && !modules.contains(&room.name.to_owned()));
    missing
        .map(|path| format!("{}: not a room of the picture", path[1]))
        .chain(empty.map(|room| format!("{}: a room of the picture, but not a module", room.name)))
        .collect()
}

/// The picture's order is the house's: a room names only rooms below it.
fn rising(rooms: &[Room]) -> Vec<String> {
    let place = |name: &str| rooms.iter().position(|room| room.name == name);
    let mut wrong = Vec::new();
    for (at, room) in rooms.iter().enumerate() {
        for below in room.names {
            if place(below).is_none_or(|place| place <= at) {
                wrong.push(format!("{}: {below} does not stand below it in the picture", room.name));
            }
        }
    }
    wrong
}

fn between_rooms(tree: &Tree, rooms: &[Room], mention: &Mention, path: &[String]) -> Option<String> {
    let from = mention.module.get(1)?;
    let Some(to) = room(tree, path) else {
        return Some("a name at the root of a crate belongs to no room".to_owned());
    };
    let allowed = rooms.iter().find(|room| room.name == from)?;
    let fits = from == to || allowed.names.contains(&to) || mention.test && allowed.tests.contains(&to);
    (!fits).then(|| format!("{from} may not name {to}"))
}

fn crate_outside(crates: &[Crate], mention: &Mention, path: &[String]) -> Option<String> {
    let Some(known) = crates.iter().find(|known| known.name == path[0]) else {
        return Some(format!("{} has no home in the picture", path[0]));
    };
    let place = mention.module[1..].join("::");
    let inside = |home: &&str| place == **home || place.starts_with(&format!("{home}::"));
    let fits = known.homes.contains(&"*")
        || known.homes.iter().any(&inside)
        || mention.test && known.tests.iter().any(|home| *home == "*" || inside(home));
    (!fits).then(|| format!("{} belongs in {}", known.name, known.homes.join(", ")))
}

/// The system's clocks are read in one file.
fn clock(mention: &Mention, path: &[String]) -> Option<String> {
    let reads = matches!(
        path.iter().map(String::as_str).collect::<Vec<_>>().as_slice(),
        ["std", "time", "Instant" | "SystemTime", "now"]
    );
    (reads && mention.module[1..] != ["clock"]).then(|| "time comes in through clock.rs".to_owned())
}

/// Leave that the picture gives and the code does not take.
pub(super) fn idle(tree: &Tree, rooms: &[Room], crates: &[Crate]) -> Vec<String> {
    let mut rooms_named = BTreeSet::new();
    let mut crates_named = BTreeSet::new();
    for mention in &tree.mentions {
        let Some(path) = tree.absolute(&mention.module, &mention.path) else { continue };
        let from = mention.module[1..].join("::");
        match room(tree, &path) {
            Some(to) => {
                rooms_named.insert((mention.module.get(1).cloned().unwrap_or_default(), to.to_owned()));
            }
            None => {
                crates_named.insert((from, path[0].clone()));
            }
        }
    }
    let mut wrong = Vec::new();
    for room in rooms.iter().filter(|room| !room.later) {
        let later = |name: &str| rooms.iter().any(|room| room.later && room.name == name);
        for to in room.names.iter().chain(room.tests).filter(|to| !later(to)) {
            if !rooms_named.contains(&(room.name.to_owned(), (*to).to_owned())) {
                wrong.push(format!("{}: may name {to} and does not", room.name));
            }
        }
    }
    for known in crates {
        for home in known.homes.iter().chain(known.tests).filter(|home| **home != "*") {
            let named = crates_named.iter().any(|(from, name)| {
                name == known.name && (from == home || from.starts_with(&format!("{home}::")))
            });
            if !named {
                wrong.push(format!("{}: at home in {home}, which does not name it", known.name));
            }
        }
    }
    wrong
}

/// Crates that no path in the code leads to.
pub(super) fn unused<'a>(tree: &Tree, crates: impl Iterator<Item = &'a str>) -> Vec<String> {
    let paths = tree.mentions.iter().filter(|mention| !mention.test);
    let used: BTreeSet<String> = paths
        .filter_map(|mention| tree.absolute(&mention.module, &mention.path)?.into_iter().next())
        .collect();
    let idle = crates.filter(|name| !used.contains(*name));
    idle.map(|name| format!("{name}: a dependency that nothing outside tests names")).collect()
}

/// Words of the language that only some files may have, tokens of macros included.
pub(super) fn reserved_words(sources: &Sources, words: &[(&str, &str)]) -> Vec<String> {
    let mut wrong = Vec::new();
    for (file, text) in sources.iter().filter(|(file, _)| file.starts_with("src/")) {
        let Ok(tokens) = text.parse::<TokenStream>() else { continue };
        let mut found = Vec::new();
        idents(tokens, &mut found);
        for (word, home) in words.iter().filter(|(_, home)| !file.starts_with(home)) {
            let lines = found.iter().filter(|(ident, _)| ident == word);
            wrong.extend(lines.map(|(_, line)| format!("{file}:{line}: {word} belongs in {home}")));
        }
    }
    wrong
}

fn idents(tokens: TokenStream, found: &mut Vec<(String, usize)>) {
    for token in tokens {
        match token {
            TokenTree::Group(group) => idents(group.stream(), found),
            TokenTree::Ident(ident) => {
                found.push((ident.to_string(), ident.span().start().line));
            }
            TokenTree::Punct(_) | TokenTree::Literal(_) => {}
        }
    }
}
