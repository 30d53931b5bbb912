//! Sessions that are deleted while their snapshot waits or is written, and a thread that a disk holds.

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::world::{SETTINGS, World, owner_of, tokens};
use crate::ids::SessionId;
use crate::store::disk::{Disk, Room};
use crate::store::failing::FailingDisk;
use crate::store::kv::shelf::Shelf;
use crate::store::kv::writer::Writer;
use crate::store::kv::{GivenUp, SnapshotError, Snapshots};

/// Time after which what a test waits for does not come.
const DEADLINE: Duration = Duration::from_secs(20);

/// A world whose sessions come and go.
fn changing() -> (World, Arc<Mutex<BTreeSet<SessionId>>>) {
    let known: Arc<Mutex<BTreeSet<SessionId>>> = Arc::default();
    let asked = Arc::clone(&known);
    let world = World::start(FailingDisk::new(), true, SETTINGS);
    let is_known =
        Box::new(move |session| asked.lock().unwrap().contains(&session).then(|| owner_of(session)));
    let (snapshots, writer) = Snapshots::on(Box::new(world.disk.clone()), SETTINGS, is_known);
    (World { snapshots, writer, ..world }, known)
}

#[test]
fn a_session_that_is_gone_when_its_list_is_to_be_written_leaves_nothing() {
    let (world, known) = changing();
    let all = tokens(&[1]);
    assert_eq!(world.save(1, &all, &[11], &[11]), Err(SnapshotError::GivenUp(GivenUp::Deleted)));
    assert_eq!(world.bytes(), 0);
    known.lock().unwrap().insert(SessionId(1));
    world.save(1, &all, &[11], &[11]).unwrap();
    // A fork that is gone has none either.
    let before = world.bytes();
    world.snapshots.fork(SessionId(1), SessionId(2), all.into());
    world.writer.work();
    assert_eq!(world.bytes(), before);
}

#[test]
fn sessions_since_the_start_keep_their_snapshots_when_the_folder_is_looked_at_again() {
    let (world, known) = changing();
    world.writer.work();
    known.lock().unwrap().insert(SessionId(1));
    let all = tokens(&[1]);
    world.save(1, &all, &[11], &[11]).unwrap();
    world.disk.fail(100, 1);
    known.lock().unwrap().insert(SessionId(2));
    assert!(matches!(world.save(2, &all, &[10, 11], &[10, 11]), Err(SnapshotError::Disk(_))));
    world.disk.fail(0, 1);
    world.writer.work();
    assert_eq!(world.load(1, &all), (11, None));
}

#[test]
fn a_fork_has_no_more_than_its_own_tokens() {
    for recurrent in [false, true] {
        let world = World::start(FailingDisk::new(), recurrent, SETTINGS);
        let all = tokens(&[1, 2, 3, 4, 5]);
        world.save(1, &all, &[4, 10, 15], &[8, 15]).unwrap();
        // In whole segments; with recurrent states up to the last that has some.
        for (tokens, expected) in [(3, 0), (9, if recurrent { 0 } else { 4 }), (14, 10), (15, 15)] {
            let fork = SessionId(tokens as u64);
            world.snapshots.fork(SessionId(1), fork, all[..tokens].into());
            world.writer.work();
            let held = world.snapshots.held(fork);
            assert_eq!(held.map_or(0, |held| held.tokens), expected, "{tokens}");
        }
        world.snapshots.forget(SessionId(1));
        world.snapshots.forget(SessionId(15));
        world.writer.work();
        let usable = if recurrent { 8 } else { 10 };
        assert_eq!(world.load(14, &all), (usable, None));
        // The end of the one that is gone is gone with it.
        assert_eq!(world.parts().len(), if recurrent { 3 } else { 2 });
    }
}

#[test]
fn a_fork_of_a_session_that_says_something_else_by_now_has_nothing_of_what_it_said() {
    for recurrent in [false, true] {
        let world = World::start(FailingDisk::new(), recurrent, SETTINGS);
        world.save(1, &tokens(&[1, 2, 3, 4, 5]), &[10, 13, 15], &[10, 13, 15]).unwrap();
        // It was cut back and went on, and nothing was saved since.
        let now = tokens(&[6, 7, 8, 9, 9]);
        world.snapshots.fork(SessionId(1), SessionId(2), now.clone().into());
        world.snapshots.forget(SessionId(1));
        world.writer.work();
        assert_eq!(world.snapshots.held(SessionId(2)).unwrap().tokens, 10);
        assert_eq!(world.load(2, &now), (10, None));
        assert_eq!(world.parts().len(), if recurrent { 2 } else { 1 });
    }
}

/// A disk that waits before each act of a kind until it is let go.
struct Gate {
    disk: FailingDisk,
    act: Act,
    comes: SyncSender<()>,
    goes: Mutex<Receiver<()>>,
    /// The names of the threads that wrote.
    writers: Arc<Mutex<Vec<String>>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Act {
    Write,
    Sync,
}

impl Gate {
    /// Returns one, what tells that something waits, and what lets it go.
    fn new(disk: &FailingDisk, act: Act) -> (Self, Receiver<()>, SyncSender<()>) {
        let ((comes, came), (go, goes)) = (sync_channel(1), sync_channel(1));
        let writers = Arc::default();
        (Self { disk: disk.clone(), act, comes, goes: Mutex::new(goes), writers }, came, go)
    }

    fn wait(&self, act: Act) {
        if self.act == act {
            // Both are gone once the test is over.
            let _ = self.comes.send(());
            let _ = self.goes.lock().unwrap().recv_timeout(DEADLINE);
        }
    }
}

impl Disk for Gate {
    fn names(&self) -> io::Result<Vec<String>> {
        self.disk.names()
    }

    fn size(&self, name: &str) -> io::Result<u64> {
        self.disk.size(name)
    }

    fn read(&self, name: &str, at: u64, bytes: usize) -> io::Result<Vec<u8>> {
        self.disk.read(name, at, bytes)
    }

    fn write(&self, name: &str, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.writers.lock().unwrap().push(std::thread::current().name().unwrap_or_default().to_owned());
        self.wait(Act::Write);
        self.disk.write(name, at, bytes)
    }

    fn sync(&self, name: &str) -> io::Result<()> {
        self.wait(Act::Sync);
        self.disk.sync(name)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.disk.rename(from, to)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.disk.remove(name)
    }

    fn sync_names(&self) -> io::Result<()> {
        self.disk.sync_names()
    }

    fn room(&self) -> io::Result<Room> {
        self.disk.room()
    }
}

#[test]
fn a_disk_that_hangs_holds_the_end_no_longer_than_it_may_and_its_arrays_until_it_goes_on() {
    let disk = FailingDisk::new();
    let (gate, came, go) = Gate::new(&disk, Act::Sync);
    let snapshots =
        Snapshots::start_on(Box::new(gate), SETTINGS, Box::new(|_| Some("uid:1".into()))).unwrap();
    let world = World::start(FailingDisk::new(), false, SETTINGS);
    let all = tokens(&[1, 2, 3]);
    let snapshot = world.snapshot(1, &all, &[10, 13], &[]);
    let arrays = Arc::downgrade(&snapshot.segments[1].content);
    let mut answer = snapshots.save(snapshot).unwrap();
    let waits = snapshots.save(world.snapshot(2, &all, &[13], &[])).unwrap();
    came.recv_timeout(DEADLINE).unwrap();
    // A newer one of the same session waits behind it.
    let newer = snapshots.save(world.snapshot(1, &all, &[13], &[])).unwrap();
    assert!(answer.try_recv().is_err());
    snapshots.close(Duration::ZERO);
    let ended = Err(SnapshotError::GivenUp(GivenUp::Ended));
    assert_eq!(waits.blocking_recv().unwrap(), ended);
    assert_eq!(newer.blocking_recv().unwrap(), ended);
    assert!(answer.try_recv().is_err() && arrays.strong_count() > 0, "its arrays are still read");
    go.send(()).unwrap();
    assert_eq!(answer.blocking_recv().unwrap(), ended);
    assert_eq!(arrays.strong_count(), 0);
    assert!(disk.sizes().is_empty(), "{:?}", disk.sizes());
}

#[test]
fn a_disk_that_hangs_holds_the_memory_of_what_it_writes_and_of_nothing_that_waits() {
    let (gate, came, go) = Gate::new(&FailingDisk::new(), Act::Sync);
    let known = Box::new(|session| Some(owner_of(session)));
    let snapshots = Snapshots::start_on(Box::new(gate), SETTINGS, known).unwrap();
    let world = World::start(FailingDisk::new(), false, SETTINGS);
    let all = tokens(&[1, 2, 3]);
    let put = |session| snapshots.save(world.snapshot(session, &all, &[10, 13], &[]));
    let (answer, mut waits) = (put(1).unwrap(), put(2).unwrap());
    came.recv_timeout(DEADLINE).unwrap();
    let one = snapshots.stats().queued_bytes / 2;
    snapshots.look_after();
    assert!(waits.try_recv().is_err(), "it may have come this far just now");
    snapshots.look_after();
    let held = Err(SnapshotError::GivenUp(GivenUp::Held));
    assert_eq!(waits.blocking_recv().unwrap(), held);
    let stats = snapshots.stats();
    assert_eq!((stats.queued_bytes, stats.enabled), (one, false));
    let refused = put(3).unwrap_err();
    assert_eq!(refused, SnapshotError::Disk("the disk does not answer".into()));
    // It goes on in the end, and is found there.
    drop(go);
    assert_eq!(answer.blocking_recv().unwrap(), held);
    snapshots.look_after();
    assert_eq!(snapshots.stats().queued_bytes, 0);
}

/// Returns snapshots whose writer waits for idle processors longer than any test.
fn patient(disk: Box<dyn Disk>) -> (Snapshots, Writer) {
    let mut shelf = Shelf::new(disk, SETTINGS);
    shelf.patience_max = u32::MAX;
    let shelf = Arc::new(shelf);
    let writer = Writer::new(Arc::clone(&shelf), Box::new(|session| Some(owner_of(session))));
    (Snapshots { shelf, thread: Mutex::new(None) }, writer)
}

/// Returns such a world.
fn patient_world() -> World {
    let world = World::start(FailingDisk::new(), false, SETTINGS);
    let (snapshots, writer) = patient(Box::new(world.disk.clone()));
    World { snapshots, writer, ..world }
}

/// Returns such snapshots, which a thread writes.
fn patient_thread(disk: Box<dyn Disk>) -> Snapshots {
    let (snapshots, writer) = patient(disk);
    let thread = std::thread::Builder::new().name("kv-writer".into()).spawn(move || writer.run());
    *snapshots.thread() = Some(thread.unwrap());
    snapshots
}

#[test]
fn what_is_written_in_idle_times_is_gone_on_with_when_the_daemon_ends_and_is_whole() {
    for recurrent in [false, true] {
        let disk = FailingDisk::new();
        let (gate, came, go) = Gate::new(&disk, Act::Write);
        let writers = Arc::clone(&gate.writers);
        let snapshots = patient_thread(Box::new(gate));
        let world = World::start(FailingDisk::new(), recurrent, SETTINGS);
        let all = tokens(&[1, 2, 3]);
        let answer = snapshots.save(world.snapshot(1, &all, &[10, 13], &[10, 13])).unwrap();
        // The first piece of the first part.
        came.recv_timeout(DEADLINE).unwrap();
        snapshots.shelf.end();
        drop((came, go));
        assert_eq!(answer.blocking_recv().unwrap().unwrap().tokens, 13);
        let writers = writers.lock().unwrap();
        let first = if cfg!(target_os = "linux") { "kv-idle" } else { "kv-writer" };
        assert_eq!(writers[0], first);
        assert!(writers.len() > 4 && writers[1..].iter().all(|name| name == "kv-writer"), "{writers:?}");
        let next = World::start(disk.after_kill(), recurrent, SETTINGS);
        assert_eq!(next.load(1, &all), (13, None));
    }
}

fn patience(world: &World) -> u32 {
    world.snapshots.shelf.patience.load(Ordering::Relaxed)
}

#[test]
#[cfg(target_os = "linux")]
fn every_part_costs_patience_which_comes_back_in_the_next_go_through_the_queue() {
    let world = patient_world();
    for session in 1..=3 {
        let snapshot = world.snapshot(session, &tokens(&[u32::try_from(session).unwrap()]), &[10, 11], &[]);
        drop(world.snapshots.save(snapshot).unwrap());
    }
    world.writer.work();
    // What they begin with is one part.
    assert_eq!(world.parts().len(), 4);
    assert!((1..=u32::MAX - 4).contains(&patience(&world)), "{}", patience(&world));
    world.writer.work();
    assert_eq!(patience(&world), u32::MAX);
}

#[test]
fn nobody_waits_for_idle_processors_when_sessions_find_the_disk_full_or_the_daemon_ends() {
    let world = patient_world();
    world.save(1, &tokens(&[1]), &[11], &[]).unwrap();
    assert!(patience(&world) > 0);
    assert!(world.snapshots.make_way(1));
    assert_eq!(patience(&world), 0);
    world.writer.work();
    assert!(patience(&world) > 0);
    world.snapshots.shelf.end();
    assert_eq!(patience(&world), 0);
    world.save(2, &tokens(&[2]), &[11], &[]).unwrap_err();
    world.writer.work();
    assert_eq!(patience(&world), 0, "it does not come back");
}

#[test]
#[cfg(target_os = "linux")]
fn what_is_written_after_way_was_made_on_a_full_disk_does_not_wait_for_idle_processors() {
    let (gate, came, go) = Gate::new(&FailingDisk::new(), Act::Write);
    let writers = Arc::clone(&gate.writers);
    let snapshots = patient_thread(Box::new(gate));
    let world = World::start(FailingDisk::new(), false, SETTINGS);
    let all = tokens(&[1, 2, 3]);
    let first = snapshots.save(world.snapshot(1, &all, &[10, 13], &[])).unwrap();
    came.recv_timeout(DEADLINE).unwrap();
    let second = snapshots.save(world.snapshot(2, &all, &[10, 13], &[])).unwrap();
    snapshots.make_way(1);
    drop((came, go));
    assert_eq!(first.blocking_recv().unwrap(), Err(SnapshotError::GivenUp(GivenUp::Full)));
    assert_eq!(second.blocking_recv().unwrap().unwrap().tokens, 13);
    let writers = writers.lock().unwrap();
    assert_eq!(writers[0], "kv-idle");
    assert!(writers[1..].iter().all(|name| name == "kv-writer"), "{writers:?}");
}
