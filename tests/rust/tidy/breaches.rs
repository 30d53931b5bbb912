//! The test of the tests: small houses with one breach each, and what the rules say about it.

use super::borders::{breaches, idle, reserved_words, unused};
use super::circles::circles;
use super::picture::{Crate, Room};
use super::prose;
use super::tree::{Sources, Tree};

const ROOMS: &[Room] = &[
    Room { name: "cli", names: &["hall"], tests: &[], later: false },
    Room { name: "hall", names: &["cellar"], tests: &["attic"], later: false },
    Room { name: "attic", names: &["cellar"], tests: &[], later: false },
    Room { name: "cellar", names: &[], tests: &[], later: false },
];
const CRATES: &[Crate] = &[
    Crate { name: "tokio", homes: &["hall"], tests: &["attic"] },
    Crate { name: "libc", homes: &["cellar::deep"], tests: &[] },
    Crate { name: "thiserror", homes: &["*"], tests: &[] },
];
const WORDS: &[(&str, &str)] = &[("unsafe", "src/cellar/")];

/// A house without a breach, with some files changed.
fn house(changes: &[(&str, &str)]) -> Sources {
    let sound = [
        ("src/main.rs", "mod cli;"),
        ("src/cli/mod.rs", "use mlxd::hall::greet;"),
        ("src/lib.rs", "pub mod hall; mod attic; mod cellar;"),
        (
            "src/hall/mod.rs",
            "mod door; pub use door::open; pub fn greet() { tokio::spawn(crate::cellar::wine()); }",
        ),
        ("src/hall/door.rs", "pub fn open() {}"),
        ("src/attic.rs", "use crate::cellar::{self, wine};"),
        ("src/cellar/mod.rs", "mod deep; pub fn wine() { unsafe {} }"),
        ("src/cellar/deep.rs", "use libc::c_int;"),
    ];
    sound.iter().chain(changes).map(|(file, text)| ((*file).to_owned(), (*text).to_owned())).collect()
}

fn read(sources: &Sources) -> Tree {
    Tree::read(sources, &["tokio", "libc", "thiserror", "rand"])
}

/// The one breach of a house with these changes.
fn breach(changes: &[(&str, &str)]) -> String {
    let found = breaches(&read(&house(changes)), ROOMS, CRATES);
    assert_eq!(found.len(), 1, "{found:?}");
    found[0].clone()
}

#[test]
fn a_sound_house_has_no_breach() {
    let sources = house(&[]);
    let tree = read(&sources);
    assert_eq!(breaches(&tree, ROOMS, CRATES), Vec::<String>::new());
    assert_eq!(circles(&tree), Vec::<String>::new());
    assert_eq!(reserved_words(&sources, WORDS), Vec::<String>::new());
}

#[test]
fn a_room_that_is_not_allowed_is_found_however_it_is_written() {
    let wrong = "src/cellar/deep.rs:1: ";
    for (code, path) in [
        ("use crate::attic::Box;", "crate::attic::Box"),
        ("use crate::{attic::{Box, Hat}};", "crate::attic::Box"),
        ("use crate::attic as up;", "crate::attic"),
        ("use crate::attic::*;", "crate::attic"),
        ("use super::super::attic::Box;", "super::super::attic::Box"),
        ("fn f() -> crate::attic::Box { todo!() }", "crate::attic::Box"),
        ("fn f() { g::<u8>(crate::attic::make()) }", "crate::attic::make"),
        ("fn f() { println!(\"{}\", crate::attic::make()) }", "crate::attic::make"),
        ("macro_rules! m { () => { $crate::attic::make() } }", "crate::attic::make"),
        ("#[crate::attic::mark] fn f() {}", "crate::attic::mark"),
    ] {
        let found = breaches(&read(&house(&[("src/cellar/deep.rs", code)])), ROOMS, CRATES);
        assert_eq!(found.first(), Some(&format!("{wrong}{path}: cellar may not name attic")), "{code}");
    }
}

#[test]
fn what_follows_a_test_module_is_read_too() {
    let code = "#[cfg(test)]\nmod tests {}\nuse crate::attic::Box;";
    let found = breach(&[("src/hall/door.rs", code)]);
    assert_eq!(found, "src/hall/door.rs:3: crate::attic::Box: hall may not name attic");
}

#[test]
fn tests_have_their_own_extras_and_no_more() {
    let of =
        |room: &str| format!("#[cfg(test)]\nmod tests {{\n    use super::*;\n    use crate::{room}::f;\n}}");
    let allowed = house(&[("src/hall/door.rs", &of("attic"))]);
    assert_eq!(breaches(&read(&allowed), ROOMS, CRATES), Vec::<String>::new());
    let found = breach(&[("src/attic.rs", &of("hall"))]);
    assert_eq!(found, "src/attic.rs:4: crate::hall::f: attic may not name hall");
}

#[test]
fn a_test_file_beside_its_subject_counts_as_its_tests() {
    let code = "#[cfg(test)]\n#[path = \"door_tests.rs\"]\nmod tests;";
    let extra = house(&[("src/hall/door.rs", code), ("src/hall/door_tests.rs", "use crate::attic::f;")]);
    assert_eq!(breaches(&read(&extra), ROOMS, CRATES), Vec::<String>::new());
}

#[test]
fn the_binary_is_held_to_the_picture() {
    let found = breach(&[("src/cli/mod.rs", "fn f() { mlxd::cellar::wine() }")]);
    assert_eq!(found, "src/cli/mod.rs:1: mlxd::cellar::wine: cli may not name cellar");
}

#[test]
fn a_room_without_a_place_in_the_picture_is_found() {
    let found =
        breach(&[("src/lib.rs", "pub mod hall; mod attic; mod cellar; mod shed;"), ("src/shed.rs", "")]);
    assert_eq!(found, "shed: not a room of the picture");
}

#[test]
fn a_picture_that_points_up_is_found() {
    let rooms = [
        Room { name: "cellar", names: &["hall"], tests: &[], later: true },
        Room { name: "hall", names: &[], tests: &[], later: true },
        Room { name: "attic", names: &["cellar"], tests: &[], later: true },
    ];
    let found = breaches(&Tree::default(), &rooms, CRATES);
    assert_eq!(found, ["attic: cellar does not stand below it in the picture"]);
}

#[test]
fn a_crate_outside_its_rooms_is_found() {
    for (code, path) in [
        ("use tokio::sync::mpsc;", "tokio::sync::mpsc"),
        ("fn f() { tokio::spawn(g()) }", "tokio::spawn"),
        ("#[tokio::main] async fn f() {}", "tokio::main"),
    ] {
        let found = breach(&[("src/attic.rs", code)]);
        assert_eq!(found, format!("src/attic.rs:1: {path}: tokio belongs in hall"));
    }
    let tests = house(&[("src/attic.rs", "#[cfg(test)] mod tests { use tokio::sync::mpsc; }")]);
    assert_eq!(breaches(&read(&tests), ROOMS, CRATES), Vec::<String>::new());
    let found = breach(&[("src/cellar/mod.rs", "mod deep; pub fn wine() { libc::abort() }")]);
    assert_eq!(found, "src/cellar/mod.rs:1: libc::abort: libc belongs in cellar::deep");
    let found = breach(&[("src/attic.rs", "use rand::random;")]);
    assert_eq!(found, "src/attic.rs:1: rand::random: rand has no home in the picture");
}

#[test]
fn a_clock_that_is_read_anywhere_else_is_found() {
    let code = "use std::time::Instant as Watch; fn f() { Watch::now(); }";
    let found = breach(&[("src/attic.rs", code)]);
    assert_eq!(found, "src/attic.rs:1: Watch::now: time comes in through clock.rs");
}

#[test]
fn a_reserved_word_is_found_in_a_macro_too() {
    let sources = house(&[("src/attic.rs", "// unsafe\nfn f() { print(\"unsafe\", m!(unsafe { g() })) }")]);
    assert_eq!(reserved_words(&sources, WORDS), ["src/attic.rs:2: unsafe belongs in src/cellar/"]);
}

#[test]
fn a_file_that_no_module_declares_and_a_module_without_a_file_are_found() {
    assert_eq!(breach(&[("src/lost.rs", "")]), "src/lost.rs: no module declares it");
    let found = breach(&[("src/attic.rs", "mod trunk;")]);
    assert_eq!(found, "src/attic/trunk/mod.rs: declared as a module, but missing");
}

#[test]
fn leave_that_is_not_taken_is_found() {
    let rooms = [
        Room { name: "attic", names: &["cellar"], tests: &[], later: false },
        Room { name: "hall", names: &["cellar", "attic"], tests: &[], later: false },
    ];
    let crates = [Crate { name: "tokio", homes: &["hall", "attic"], tests: &[] }];
    let found = idle(&read(&house(&[])), &rooms, &crates);
    assert_eq!(
        found,
        ["hall: may name attic and does not", "tokio: at home in attic, which does not name it"]
    );
}

#[test]
fn an_unused_dependency_is_found() {
    // A function of the same name hides no crate.
    let hall = "use tokio::spawn; fn tokio() {}";
    let sources =
        house(&[("src/attic.rs", "#[derive(thiserror::Error)] enum E {}"), ("src/hall/mod.rs", hall)]);
    let found = unused(&read(&sources), ["tokio", "libc", "thiserror", "rand"].into_iter());
    assert_eq!(found, ["rand: a dependency that nothing outside tests names"]);
}

#[test]
fn circles_are_found_through_re_exports_and_between_folders() {
    let door = "use super::window::Pane; pub struct Frame;";
    let hall = "mod door; mod window; pub use door::Frame;";
    let pane = "pub struct Pane(super::Frame);";
    let tree =
        read(&house(&[("src/hall/mod.rs", hall), ("src/hall/door.rs", door), ("src/hall/window.rs", pane)]));
    let way = "a circle in mlxd::hall:\n    door -> window: src/hall/door.rs:1 super::window::Pane\n    \
               window -> door: src/hall/window.rs:1 super::Frame";
    assert_eq!(circles(&tree), [way]);

    let lib = "pub mod hall; mod attic; mod cellar;";
    let tree =
        read(&house(&[("src/lib.rs", lib), ("src/cellar/deep.rs", "fn f() { crate::hall::greet() }")]));
    let found = circles(&tree);
    assert_eq!(found.len(), 1);
    assert!(
        found[0].starts_with("a circle in mlxd:\n    cellar -> hall: src/cellar/deep.rs:1"),
        "{}",
        found[0]
    );
}

#[test]
fn a_name_from_a_glob_leads_to_where_it_is_defined() {
    let tree = read(&house(&[
        ("src/hall/mod.rs", "mod door; mod window; pub use door::*;"),
        ("src/hall/door.rs", "use super::window::Pane; pub struct Frame;"),
        ("src/hall/window.rs", "use super::Frame; pub struct Pane;"),
    ]));
    assert_eq!(circles(&tree).len(), 1);
}

#[test]
fn phrases_and_long_comments_are_found() {
    let long = format!("/// Returns {}", "a word ".repeat(15));
    for (file, line) in [
        ("a.rs", "/// Of the rows, the first."),
        ("a.rs", "//! Gives a slot of so many tokens."),
        ("a.rs", "fn a_file_that_is_no_socket_stays() {}"),
        ("a.rs", "#[error(\"{0} is no command\")]"),
        ("a.py", "# The likeliest token."),
        ("a.md", "It gives way to others."),
        ("a.proto", "// Had better be set."),
        ("a.rs", &long),
    ] {
        assert_eq!(prose::faults(file, line).len(), 1, "{line}");
    }
    for line in [
        "/// There is no limit.",
        "/// It is no longer there.",
        "let n = is_none(x);",
        "// One for every row, is none.",
    ] {
        assert_eq!(prose::faults("a.rs", line), Vec::<String>::new());
    }
}
