//! `mlxd sessions export`, `import` and `watch` against a fake daemon.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use mlxd_client::v1::Session;

use crate::cli::fake::FakeDaemon;
use crate::cli::{run, stderr, stdout};

fn with_session(name: &str) -> FakeDaemon {
    let fake = FakeDaemon::start();
    let session = Session { name: name.into(), token_count: 4, ..Session::default() };
    fake.state().sessions.insert(name.into(), session);
    fake
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_exported_to_a_private_file_and_imported_from_it() {
    let fake = with_session("trip");
    let file = fake.folder().join("trip.mlxd");
    fs::write(&file, "an older one").unwrap();
    let path = file.to_str().unwrap();
    let output = run(&fake, &["sessions", "export", "trip", path]);
    assert_eq!((stderr(&output).as_str(), output.status.code()), ("", Some(0)));
    assert_eq!(fs::read(&file).unwrap(), b"file of trip");
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    let output = run(&fake, &["sessions", "export", "trip", "-"]);
    assert_eq!(stdout(&output), "file of trip");

    let output = run(&fake, &["sessions", "import", path, "--as", "copy", "--model", "m"]);
    assert_eq!(stdout(&output), "copy: 0 turns, 3 tokens\n", "{}", stderr(&output));
    assert_eq!(fake.state().sessions["copy"].model, "m");
    let output = run(&fake, &["sessions", "import", path]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("SESSION_EXISTS"), "{}", stderr(&output));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_that_fails_leaves_what_was_there() {
    let fake = with_session("cut");
    let file = fake.folder().join("kept");
    fs::write(&file, "an older one").unwrap();
    for name in ["cut", "absent"] {
        let output = run(&fake, &["sessions", "export", name, file.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(1));
        assert_eq!(fs::read(&file).unwrap(), b"an older one");
    }
    let names: Vec<_> =
        fs::read_dir(fake.folder()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(names.iter().all(|name| !name.to_string_lossy().ends_with(".part")), "{names:?}");
    let output = run(&fake, &["sessions", "export", "cut", "/absent/folder/file"]);
    assert!(stderr(&output).contains("/absent/folder/file"), "{}", stderr(&output));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_none_says_so() {
    let fake = FakeDaemon::start();
    let file = fake.folder().join("other");
    fs::write(&file, "something else").unwrap();
    let output = run(&fake, &["sessions", "import", file.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("(SESSION_FILE_INVALID)"), "{}", stderr(&output));
    let output = run(&fake, &["sessions", "import", "/absent"]);
    assert!(stderr(&output).contains("/absent: "), "{}", stderr(&output));
    // A folder can be opened, and not read.
    let output = run(&fake, &["sessions", "import", fake.folder().to_str().unwrap()]);
    assert!(stderr(&output).contains("directory"), "{}", stderr(&output));
    assert!(fake.state().sessions.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_tells_what_there_is_and_ends_with_the_daemon() {
    let fake = with_session("trip");
    let output = run(&fake, &["sessions", "watch"]);
    assert_eq!(
        stdout(&output),
        "listed trip: 0 turns, 4 tokens, unspecified\n\
         changed trip: 0 turns, 4 tokens, unspecified (token_count, turns), after 2 more changes\n"
    );
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("DRAINING"), "{}", stderr(&output));
    let output = run(&fake, &["sessions", "watch", "--changes", "--json"]);
    let lines: Vec<serde_json::Value> =
        stdout(&output).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines[0]["kind"], "ready");
    assert_eq!((&lines[1]["kind"], &lines[1]["session"]["token_count"]), (&"changed".into(), &4.into()));
    assert_eq!(lines[1]["merged_changes"], 2);
}
