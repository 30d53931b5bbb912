//! Keeps the house in order: which room may name which (`picture`), where crates, unsafe, clocks and
//! generated types live (`borders`), that files and folders name each other in one direction (`circles`), the
//! mechanical part of the English (`prose`), and how long a file may be. The sources are parsed whole
//! (`tree`), the binary and the test modules included; `breaches` shows that each rule can fail.

#![allow(clippy::unwrap_used, reason = "a test that cannot read its subject fails")]

mod borders;
mod breaches;
mod circles;
mod picture;
mod prose;
mod tree;

use std::fs;
use std::path::PathBuf;

use picture::{CRATES, GENERATED, ROOMS, WORDS};
use tree::{Sources, Tree};

/// Longer than this is a design not finished.
const LINES_MAX: usize = 500;

/// Where prose is read, and in which files.
const PROSE: &[(&str, &[&str])] = &[
    (".", &["md"]),
    ("clients", &["md", "py", "rs", "toml"]),
    ("deploy", &["md", "toml"]),
    ("docs", &["md"]),
    ("native", &["md", "py", "rs"]),
    ("proto", &["proto"]),
    ("src", &["md", "rs"]),
    ("tests", &["md", "py", "rs", "toml"]),
];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Whether a folder's files are ours: neither built nor generated.
fn is_ours(folder: &str) -> bool {
    let name = folder.rsplit('/').next().unwrap_or_default();
    let generated = folder.starts_with("clients/") && ["v1", "gen"].contains(&name);
    !generated && !name.starts_with('.') && !["target", "__pycache__", "snapshots"].contains(&name)
}

fn collect(folder: &str, endings: &[&str], found: &mut Sources) {
    let Ok(entries) = fs::read_dir(root().join(folder)) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        let name = path.strip_prefix(root()).unwrap().to_string_lossy().trim_start_matches("./").to_owned();
        if path.is_dir() {
            if folder != "." && is_ours(&name) {
                collect(&name, endings, found);
            }
        } else if path.extension().is_some_and(|ending| endings.iter().any(|one| ending == *one)) {
            found.insert(name, fs::read_to_string(&path).unwrap());
        }
    }
}

/// The files below `folder` with one of these endings; of the root only its own files.
fn sources(folder: &str, endings: &[&str]) -> Sources {
    let mut found = Sources::new();
    collect(folder, endings, &mut found);
    found
}

fn rust() -> Sources {
    let mut found = sources("src", &["rs"]);
    assert!(found.len() > 40, "only {} sources were found", found.len());
    // A module of the engine's tests.
    found.extend(sources("tests/sim", &["rs"]));
    found
}

/// Names of the crates in these tables of `Cargo.toml`, for every system or some, as paths write them.
fn crates(tables: &[&str]) -> Vec<String> {
    let manifest: toml::Table = fs::read_to_string(root().join("Cargo.toml")).unwrap().parse().unwrap();
    let targets = manifest.get("target").and_then(toml::Value::as_table);
    let targets = targets.into_iter().flat_map(|targets| targets.values()).filter_map(toml::Value::as_table);
    let manifests = targets.chain([&manifest]);
    let found = manifests.flat_map(|one| tables.iter().filter_map(|table| one.get(*table)?.as_table()));
    found.flat_map(|table| table.keys()).map(|name| name.replace('-', "_")).collect()
}

fn tree() -> Tree {
    let externs = crates(&["dependencies", "dev-dependencies"]);
    let externs: Vec<&str> = externs.iter().map(String::as_str).filter(|name| *name != "mlxd").collect();
    Tree::read(&rust(), &externs)
}

fn assert_none(wrong: &[String]) {
    assert!(wrong.is_empty(), "{} breaches:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn rooms_and_crates_stay_within_the_picture() {
    let tree = tree();
    assert!(tree.mentions.len() > 3000, "only {} paths were found", tree.mentions.len());
    assert_none(&borders::breaches(&tree, ROOMS, CRATES));
}

#[test]
fn the_picture_allows_nothing_that_is_not_used() {
    assert_none(&borders::idle(&tree(), ROOMS, CRATES));
}

#[test]
fn reserved_words_stay_where_they_belong() {
    assert_none(&borders::reserved_words(&rust(), WORDS));
}

#[test]
fn every_dependency_is_used() {
    let dependencies = crates(&["dependencies"]);
    let dependencies = dependencies.iter().map(String::as_str).filter(|name| !GENERATED.contains(name));
    assert_none(&borders::unused(&tree(), dependencies));
}

#[test]
fn files_and_folders_name_each_other_in_one_direction() {
    assert_none(&circles::circles(&tree()));
}

#[test]
fn no_file_is_longer_than_a_design_that_is_finished() {
    let mut all = sources("src", &["rs"]);
    all.extend(sources("clients", &["rs", "py"]));
    all.extend(sources("tests", &["rs", "py"]));
    let long = all.iter().filter(|(_, text)| text.lines().count() > LINES_MAX);
    assert_none(
        &long.map(|(name, text)| format!("{name}: {} lines", text.lines().count())).collect::<Vec<_>>(),
    );
}

#[test]
fn every_file_says_what_it_is() {
    let mut all = sources("src", &["rs"]);
    all.extend(sources("tests", &["rs"]));
    let silent = all.into_iter().filter(|(_, text)| !text.starts_with("//!"));
    assert_none(&silent.map(|(name, _)| name).collect::<Vec<_>>());
}

#[test]
fn prose_is_plain() {
    let files = PROSE.iter().flat_map(|(folder, endings)| sources(folder, endings));
    // The lists of phrases themselves.
    let files =
        files.filter(|(name, _)| !["prose.rs", "breaches.rs"].iter().any(|file| name.ends_with(file)));
    assert_none(&files.flat_map(|(name, text)| prose::faults(&name, &text)).collect::<Vec<_>>());
}

/// Decisions whose number is not their own, or not that of their title.
fn misnumbered(decisions: &Sources) -> Vec<String> {
    let number = |name: &str| name.rsplit('/').next().and_then(|file| file.get(..4)).map(str::to_owned);
    let mut wrong = Vec::new();
    for (name, text) in decisions {
        let own = number(name).unwrap_or_default();
        let holders = decisions.keys().filter(|other| number(other).as_ref() == Some(&own)).count();
        if holders > 1 || !text.starts_with(&format!("# {own} ")) {
            wrong.push(name.clone());
        }
    }
    wrong
}

#[test]
fn each_decision_has_a_number_of_its_own() {
    let mut decisions = sources("docs/decisions", &["md"]);
    decisions.remove("docs/decisions/README.md").unwrap();
    assert_none(&misnumbered(&decisions));
    let twice = |name: &str| (name.to_owned(), "# 0001 A title\n".to_owned());
    let breaches: Sources = ["0001-a.md", "0001-b.md", "0002-c.md"].into_iter().map(twice).collect();
    assert_eq!(misnumbered(&breaches).len(), 3);
}
