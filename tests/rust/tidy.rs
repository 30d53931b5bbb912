//! Keeps the house in order: which module may name which, where unsafe, clocks and generated types live,
//! and how long a file may be. It reads the sources as text; no build is needed to break it.

#![allow(clippy::unwrap_used, reason = "a test that cannot read its subject fails")]

use std::fs;
use std::path::{Path, PathBuf};

/// Longer than this is a design not finished.
const LINES_MAX: usize = 500;

/// A folder or file under `src`, what must not appear there, and why.
const BORDERS: &[(&str, &[&str], &str)] = &[
    ("text", PURE, "text is pure"),
    ("session", SESSION, "sessions are pure, but for the dashmap of the book"),
    ("sched", PURE, "scheduling is pure"),
    ("cache", PURE, "cache decisions are pure"),
    ("hub", HUB, "model files know neither the edge nor MLX"),
    ("engine", ENGINE, "the engine reaches a device only through its backend"),
    ("mlx", DEVICE, "MLX knows nothing of the edge or of the engine"),
    ("device", DEVICE, "a device knows nothing of the edge or of the engine"),
    ("models", DEVICE, "an architecture knows nothing of the edge or of the engine"),
    ("cli", CLI, "the CLI is a client: it reaches the daemon over the wire"),
    ("rpc", RPC, "the edge hands work to the engine and never touches a device"),
];

const PURE: &[&str] = &[
    "tokio::",
    "tonic::",
    "mlx_rs::",
    "mlx_sys::",
    "dashmap::",
    "crate::rpc",
    "crate::engine",
    "crate::device",
    "crate::models",
    "crate::daemon",
    "crate::cli",
];
const SESSION: &[&str] =
    &["tonic::", "mlx_rs::", "mlx_sys::", "crate::rpc", "crate::device", "crate::models", "crate::daemon"];
const HUB: &[&str] = &[
    "tokio::",
    "tonic::",
    "mlx_rs::",
    "mlx_sys::",
    "crate::rpc",
    "crate::engine",
    "crate::device",
    "crate::models",
];
const ENGINE: &[&str] =
    &["tonic::", "mlx_rs::", "mlx_sys::", "crate::rpc", "crate::device", "crate::models", "crate::session"];
const DEVICE: &[&str] =
    &["tokio::", "tonic::", "crate::rpc", "crate::engine", "crate::session", "crate::daemon"];
const CLI: &[&str] =
    &["mlx_rs::", "mlx_sys::", "crate::engine", "crate::device", "crate::rpc", "crate::session"];
const RPC: &[&str] = &["mlx_rs::", "mlx_sys::", "crate::device", "crate::models", "crate::cli"];

/// What only some files may name.
const RESERVED: &[(&str, &[&str])] = &[
    ("mlx_rs::", &["src/device/", "src/mlx/", "src/models/"]),
    ("mlx_sys::", &["src/mlx/ffi/"]),
    ("unsafe {", &["src/mlx/ffi/"]),
    ("tonic::", &["src/rpc/", "src/daemon", "src/cli/"]),
    ("Instant::now(", &["src/clock.rs"]),
    ("SystemTime::now(", &["src/clock.rs"]),
    ("include_proto!", &["src/rpc/"]),
];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn files(folder: &Path, ending: &str, found: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        let skip = ["target", ".git", "v1", "gen", "__pycache__"].iter().any(|name| path.ends_with(name));
        if path.is_dir() && !skip {
            files(&path, ending, found);
        } else if path.extension().is_some_and(|extension| extension == ending) {
            found.push(path);
        }
    }
}

fn sources(folder: &str, ending: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    files(&root().join(folder), ending, &mut found);
    found.sort();
    let read = |path: PathBuf| {
        let name = path.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
        (name, fs::read_to_string(&path).unwrap())
    };
    found.into_iter().map(read).collect()
}

/// A file's lines but for comments, and for its test module, which may use what it needs.
fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let end = text.find("#[cfg(test)]").unwrap_or(text.len());
    text[..end].lines().enumerate().filter(|(_, line)| !line.trim_start().starts_with("//"))
}

fn is_test(name: &str) -> bool {
    name.ends_with("_tests.rs") || name.contains("/tests/") || name.ends_with("/tests.rs")
}

#[test]
fn modules_name_only_what_lies_below_them() {
    let mut wrong = Vec::new();
    let all = sources("src", "rs");
    assert!(all.len() > 40, "only {} sources were found", all.len());
    for (name, text) in all.iter().filter(|(name, _)| !is_test(name)) {
        for (module, banned, why) in
            BORDERS.iter().filter(|(module, ..)| name.starts_with(&format!("src/{module}/")))
        {
            for (line, content) in code(text) {
                for word in banned.iter().filter(|word| content.contains(**word)) {
                    wrong.push(format!("{name}:{}: {word} in {module}: {why}", line + 1));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn reserved_names_stay_where_they_belong() {
    let mut wrong = Vec::new();
    for (name, text) in sources("src", "rs").iter().filter(|(name, _)| !is_test(name)) {
        for (word, homes) in
            RESERVED.iter().filter(|(_, homes)| !homes.iter().any(|home| name.starts_with(home)))
        {
            let lines = code(text).filter(|(_, content)| content.contains(word));
            wrong.extend(lines.map(|(line, _)| format!("{name}:{}: {word} belongs in {homes:?}", line + 1)));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn no_file_is_longer_than_a_design_that_is_finished() {
    let rust = sources("src", "rs").into_iter().chain(sources("clients", "rs")).chain(sources("tests", "rs"));
    let all = rust.chain(sources("clients/python", "py")).chain(sources("tests", "py"));
    let long: Vec<String> = all
        .filter(|(_, text)| text.lines().count() > LINES_MAX)
        .map(|(name, text)| format!("{name}: {} lines", text.lines().count()))
        .collect();
    assert!(long.is_empty(), "{}", long.join("\n"));
}

#[test]
fn every_file_says_what_it_is() {
    let silent: Vec<String> = sources("src", "rs")
        .into_iter()
        .filter(|(_, text)| !text.starts_with("//!"))
        .map(|(name, _)| name)
        .collect();
    assert!(silent.is_empty(), "{}", silent.join("\n"));
}
