//! The store on a real folder, with its thread.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;

use super::world::{book, key};
use crate::ids::SessionKey;
use crate::session::{History, InputKind, NewSession, SessionBook, Terms, TurnContent, TurnRequest};
use crate::store::{Durability, OpenStore, Store, StoreError, Stored, disk, file, open};

fn start(folder: &Path, durability: Durability) -> (Store, Arc<SessionBook<()>>) {
    let (opened, stored) = open(folder).unwrap();
    begin(opened, stored, durability)
}

fn begin(opened: OpenStore, stored: Vec<Stored>, durability: Durability) -> (Store, Arc<SessionBook<()>>) {
    let book = book();
    book.number_from(opened.first_number());
    book.restore(stored);
    let source = Arc::clone(&book);
    let now = move |key: &SessionKey| source.snapshot(key);
    (opened.start(durability, Arc::clone(book.changes()), now, |_| false).unwrap(), book)
}

fn create(book: &SessionBook<()>, name: &str) {
    let ttl = std::time::Duration::from_secs(60);
    book.create(NewSession {
        key: key(name),
        model: "m".into(),
        terms: Terms::after_use(ttl),
        history: History::Auto,
        cache_salt: "".into(),
    })
    .unwrap();
}

fn turn(book: &Arc<SessionBook<()>>, name: &str, tokens: &[u32]) {
    let request = TurnRequest {
        model: None,
        input: InputKind::Raw,
        expected_token_count: None,
        input_bytes: 0,
        history: None,
    };
    let (guard, start) = book.begin(&key(name), &request, ()).unwrap();
    guard.commit([&*start.tokens, tokens].concat(), TurnContent::Raw).unwrap();
}

/// Reads a session as a first use does.
fn tokens(store: &Store, book: &SessionBook<()>, name: &str) -> Vec<u32> {
    if let Some(id) = book.cold(&key(name)) {
        book.fill(&key(name), id, Ok(store.load(&key(name), id).unwrap()));
    }
    book.read(&key(name), |session| Ok(session.tokens().to_vec())).unwrap()
}

async fn saved(store: &Store) {
    for name in ["a", "b"] {
        store.saved(&key(name)).await;
    }
}

#[tokio::test]
async fn what_is_saved_is_there_for_the_next_daemon_whether_the_last_one_left_in_order_or_not() {
    for durability in [Durability::Turn, Durability::Second] {
        let folder = tempfile::tempdir().unwrap();
        let (store, sessions) = start(folder.path(), durability);
        ["a", "b"].into_iter().for_each(|name| create(&sessions, name));
        turn(&sessions, "a", &[1, 2]);
        saved(&store).await;
        sessions.delete(&key("b")).unwrap();
        turn(&sessions, "a", &[3]);
        saved(&store).await;
        assert_eq!(store.written().behind, 0);
        if durability == Durability::Turn {
            // A copy of the folder is what a killed daemon leaves.
            let copy = tempfile::tempdir().unwrap();
            std::fs::create_dir(copy.path().join("sessions")).unwrap();
            for file in std::fs::read_dir(folder.path().join("sessions")).unwrap() {
                let file = file.unwrap();
                std::fs::copy(file.path(), copy.path().join("sessions").join(file.file_name())).unwrap();
            }
            let (killed, after) = start(copy.path(), durability);
            assert_eq!((tokens(&killed, &after, "a"), after.totals(None).sessions), (vec![1, 2, 3], 1));
        }
        store.close();
        let (store, sessions) = start(folder.path(), durability);
        assert_eq!((tokens(&store, &sessions, "a"), sessions.totals(None).sessions), (vec![1, 2, 3], 1));
        turn(&sessions, "a", &[4]);
        create(&sessions, "c");
        drop(store);
        let (store, sessions) = start(folder.path(), durability);
        assert_eq!((tokens(&store, &sessions, "a"), sessions.totals(None).sessions), (vec![1, 2, 3, 4], 2));
    }
}

#[test]
fn the_folder_is_for_one_daemon_and_one_user() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("new/state");
    let (store, sessions) = start(&path, Durability::Turn);
    create(&sessions, "a");
    let Err(StoreError::Held { pid, .. }) = open(&path) else { panic!("opened twice") };
    assert_eq!(pid, std::process::id().to_string());
    store.close();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&path), mode(&path.join("sessions"))), (0o700, 0o700));
    for folder in [path.clone(), path.join("sessions")] {
        for file in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            assert!(file.is_dir() || mode(&file) == 0o600, "{}", file.display());
        }
    }
    drop(store);
    assert!(open(&path).is_ok());
}

#[test]
fn a_folder_of_another_format_is_left_alone_and_named() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("version"), "3\n").unwrap();
    let Err(error) = open(folder.path()) else { panic!("opened") };
    let said = format!("{} has format \"3\"; this mlxd reads formats up to 2", folder.path().display());
    assert_eq!(error.to_string(), said);
    assert!(!folder.path().join("sessions").exists());
}

#[tokio::test]
async fn a_folder_of_the_older_format_is_read_and_becomes_one_of_ours() {
    let folder = tempfile::tempdir().unwrap();
    let version = folder.path().join("version");
    let (store, book) = start(folder.path(), Durability::Turn);
    create(&book, "a");
    turn(&book, "a", &[1, 2]);
    saved(&store).await;
    store.close();
    std::fs::write(&version, "1\n").unwrap();
    let (store, book) = start(folder.path(), Durability::Turn);
    assert_eq!(tokens(&store, &book, "a"), [1, 2]);
    assert_eq!(std::fs::read_to_string(&version).unwrap(), "2\n");
}

#[test]
fn a_folder_that_is_made_has_its_name_made_durable_and_so_have_those_above_it() {
    let folder = tempfile::tempdir().unwrap();
    let at = |path: &str| folder.path().join(path);
    assert_eq!(disk::make(&at("a/b/c")).unwrap(), [at("a/b"), at("a"), folder.path().to_owned()]);
    assert!(at("a/b/c").is_dir());
    assert!(disk::make(&at("a/b/c")).unwrap().is_empty());
}

#[tokio::test]
async fn what_is_not_a_file_is_the_damage_of_its_session_alone() {
    let folder = tempfile::tempdir().unwrap();
    let names = ["folder", "link", "pipe", "sound"];
    let (store, sessions) = start(folder.path(), Durability::Turn);
    names.into_iter().for_each(|name| create(&sessions, name));
    turn(&sessions, "sound", &[1, 2]);
    let files = names.map(|name| {
        let id = sessions.snapshot(&key(name)).unwrap().outline.id;
        folder.path().join("sessions").join(file::name(id))
    });
    store.close();
    files[..3].iter().for_each(|file| std::fs::remove_file(file).unwrap());
    std::fs::create_dir(&files[0]).unwrap();
    std::os::unix::fs::symlink("nowhere", &files[1]).unwrap();
    let pipe = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &files[2], rustix::fs::FileType::Fifo, pipe, 0).unwrap();

    let (opened, stored) = open(folder.path()).unwrap();
    let damaged = stored.iter().filter_map(|(outline, why)| Some((outline.key.name.as_str(), why.clone()?)));
    let damaged: Vec<_> = damaged.collect();
    let why = "its file could not be read: it is not a file".to_owned();
    assert_eq!(damaged, names[..3].iter().map(|name| (*name, why.clone())).collect::<Vec<_>>());
    // They can be deleted, and nothing is left to be written.
    let (store, sessions) = begin(opened, stored, Durability::Turn);
    assert_eq!(tokens(&store, &sessions, "sound"), [1, 2]);
    for name in &names[..3] {
        sessions.delete(&key(name)).unwrap();
        store.saved(&key(name)).await;
    }
    assert_eq!(store.written().behind, 0);
}
