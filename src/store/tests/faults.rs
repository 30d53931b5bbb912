//! Disks that fail in one place: what cannot be read or written is one session's matter, and what can goes
//! on.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::watched::{Fault, WatchedDisk};
use super::world::{World, key};
use crate::session::TermsChange;
use crate::store::disk::Disk;
use crate::store::failing::FailingDisk;
use crate::store::writer::BATCH_BYTES_MAX;
use crate::store::{LoadError, file, open};

/// A disk with sessions that was left in order.
fn left(names: &[&str]) -> FailingDisk {
    let mut world = World::start(FailingDisk::new());
    for name in names {
        world.create(name);
        world.raw(name, &[1, 2, 3]);
    }
    world.write();
    world.leave()
}

/// Returns the name of a session's file.
fn file_of(world: &World, name: &str) -> String {
    file::name(world.book.snapshot(&key(name)).unwrap().outline.id)
}

#[test]
fn a_file_that_cannot_be_read_at_the_start_is_that_sessions_damage_until_it_can() {
    let disk = left(&["a", "b", "c"]);
    let before = World::start(disk.after_kill());
    let (told, file) = (before.told(), file_of(&before, "b"));
    let watched = WatchedDisk::new(disk.clone());
    watched.fail([Fault::Read(file)]);
    let world = World::on(disk.clone(), &watched);
    assert_eq!(world.damaged.keys().collect::<Vec<_>>(), [&key("b")]);
    assert!(world.damaged[&key("b")].starts_with("its file could not be read: "), "{:?}", world.damaged);
    world.raw("a", &[4]);
    let mut later = world.told();
    assert_eq!(later.len(), 2);
    // Once it can be read it is what it was.
    watched.fail([]);
    let after = World::start(world.leave());
    later.insert(key("b"), told[&key("b")].clone());
    assert_eq!((after.told(), after.damaged.len()), (later, 0));
}

#[test]
fn a_start_that_fails_leaves_the_note_for_the_next_one() {
    let mut world = World::start(FailingDisk::new());
    world.create("a");
    world.write();
    let file = file_of(&world, "a");
    let before = usize::try_from(world.disk.size(&file).unwrap()).unwrap();
    world.raw("a", &[1]);
    world.write();
    let disk = world.leave();
    let watched = WatchedDisk::new(disk.clone());
    watched.fail([Fault::Names]);
    assert!(open::shelve(Box::new(watched)).is_err());
    disk.damage(&file, |bytes| bytes.truncate(before));
    assert_eq!(World::start(disk).damaged.len(), 1, "the file went back, and the note says so");
}

#[test]
fn a_note_that_cannot_be_read_does_not_stop_a_start() {
    let disk = left(&["a", "b"]);
    let told = World::start(disk.after_kill()).told();
    let watched = WatchedDisk::new(disk.clone());
    watched.fail([Fault::Read("clean".into())]);
    assert_eq!(World::on(disk, &watched).told(), told);
}

#[test]
fn a_file_that_cannot_be_read_later_is_not_damaged_and_one_that_is_gone_is() {
    let disk = left(&["a", "b"]);
    let watched = WatchedDisk::new(disk.clone());
    let (shelf, stored) = open::shelve(Box::new(watched.clone())).unwrap();
    let ids = [stored[0].0.id, stored[1].0.id];
    watched.fail([Fault::Read(file::name(ids[0]))]);
    for _ in 0..2 {
        assert!(matches!(shelf.load(&key("a"), ids[0]), Err(LoadError::Io(_))));
    }
    watched.fail([]);
    assert_eq!(*shelf.load(&key("a"), ids[0]).unwrap().tokens, [1, 2, 3]);
    disk.remove(&file::name(ids[1])).unwrap();
    let Err(LoadError::Damaged(why)) = shelf.load(&key("b"), ids[1]) else { panic!("it is there") };
    assert_eq!(why, "its file is gone");
}

#[test]
fn on_a_full_disk_others_make_way_and_what_could_not_be_written_is_tried_again_soon() {
    for is_room in [true, false] {
        let mut world = World::start(FailingDisk::new());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (log, disk) = (Arc::clone(&asked), world.disk.clone());
        world.writer = world.writer.with_way(Box::new(move |bytes| {
            log.lock().unwrap().push(bytes);
            if is_room {
                disk.fail(0, 0);
            }
            is_room
        }));
        world.create("a");
        world.raw("a", &[1]);
        world.disk.fail(100, 1);
        world.write();
        assert_eq!(*asked.lock().unwrap(), [64 << 20]);
        assert_eq!(world.writer.behind.len(), 1);
        assert_eq!(world.writer.patience(), Some(Duration::from_secs(if is_room { 1 } else { 10 })));
        world.writer.write(BTreeSet::new(), false);
        assert_eq!(world.writer.behind.is_empty(), is_room);
        let found = World::start(world.disk.after_kill()).told();
        assert_eq!(found.len(), usize::from(is_room));
        assert!(found.iter().all(|(key, is)| world.told()[key].contents == is.contents));
    }
}

#[test]
fn numbers_are_given_once_whatever_became_of_the_files() {
    let disk = left(&["a", "b"]);
    let first = World::start(disk.after_kill());
    let last = first.book.snapshot(&key("b")).unwrap().outline.id;
    // Deleted, gone, and there but not to be read.
    let mut deleted = World::start(disk.after_kill());
    deleted.book.delete(&key("b")).unwrap();
    deleted.write();
    let gone = disk.after_kill();
    gone.sizes().iter().filter(|(name, _)| file::id(name).is_some() || name == "clean").for_each(
        |(name, _)| {
            gone.remove(name).unwrap();
        },
    );
    for disk in [deleted.leave(), gone] {
        let mut world = World::start(disk);
        world.create("new");
        world.write();
        assert!(world.book.snapshot(&key("new")).unwrap().outline.id > last);
    }
    let disk = disk.after_kill();
    disk.remove("clean").unwrap();
    let watched = WatchedDisk::new(disk.clone());
    watched.fail([Fault::Read(file_of(&first, "b")), Fault::Read("starts".into())]);
    let mut world = World::on(disk.clone(), &watched);
    assert_eq!(world.told().len(), 1);
    world.create("new");
    world.write();
    let after = World::start(disk.after_kill());
    assert_eq!(after.told().len(), 3, "no file was written over");
}

/// A disk whose last frame, of a turn, is in the system's memory only, as a killed daemon leaves it.
fn unsynced() -> FailingDisk {
    let disk = FailingDisk::new();
    let watched = WatchedDisk::new(disk.clone());
    let mut world = World::on(disk.clone(), &watched);
    world.create("a");
    world.write();
    watched.fail([Fault::Sync(file_of(&world, "a"))]);
    world.raw("a", &[1, 2]);
    world.write();
    disk
}

#[test]
fn what_is_not_yet_durable_after_a_kill_is_made_durable_before_it_is_shown() {
    let disk = unsynced();
    let shown = World::start(disk.clone()).told();
    assert_eq!(*shown[&key("a")].contents.as_ref().unwrap().tokens, [1, 2]);
    for seed in 0..20 {
        assert_eq!(World::start(disk.after_power_failure(seed)).told(), shown);
    }
    // And before the note tells of it.
    let disk = World::cold(unsynced()).leave();
    for seed in 0..20 {
        let after = World::start(disk.after_power_failure(seed));
        assert_eq!((after.told(), after.damaged.len()), (shown.clone(), 0));
    }
}

#[test]
fn a_turn_whose_sync_failed_does_not_come_back_once_it_was_truncated() {
    let disk = FailingDisk::new();
    let watched = WatchedDisk::new(disk.clone());
    let mut world = World::on(disk.clone(), &watched);
    world.create("a");
    world.raw("a", &[1]);
    world.write();
    let told = world.told();
    let file = file_of(&world, "a");
    for fault in [Fault::Sync(file.clone()), Fault::Write(file)] {
        watched.fail([fault]);
        world.raw("a", &[2, 3]);
        world.write();
        watched.fail([]);
        world.book.with(&key("a"), |session, now| session.truncate_turns(1, now)).unwrap();
        world.write();
        let after = World::start(disk.after_kill()).told();
        assert_eq!(after[&key("a")].contents, told[&key("a")].contents);
    }
}

#[test]
fn a_label_whose_sync_failed_does_not_come_back_once_it_was_removed() {
    let disk = FailingDisk::new();
    let watched = WatchedDisk::new(disk.clone());
    let mut world = World::on(disk.clone(), &watched);
    world.create("a");
    world.write();
    let told = world.told();
    let change = |change: TermsChange| drop(world.book.update(&key("a"), change).unwrap());
    watched.fail([Fault::Sync(file_of(&world, "a"))]);
    change(TermsChange { set_labels: [("a".into(), "1".into())].into(), ..TermsChange::default() });
    let taken = world.book.changes().take(None);
    world.writer.step(taken);
    watched.fail([]);
    change(TermsChange { remove_labels: vec!["a".into()], ..TermsChange::default() });
    assert_eq!(world.told(), told, "it is what its file was to tell before");
    world.write();
    assert_eq!(World::start(disk.after_kill()).told(), told);
}

#[test]
fn changes_are_acknowledged_before_those_that_cannot_be_written_are_tried_again() {
    let disk = FailingDisk::new();
    let watched = WatchedDisk::new(disk.clone());
    let mut world = World::on(disk, &watched);
    ["a", "x", "y"].into_iter().for_each(|name| world.create(name));
    world.write();
    let [x, y] = ["x", "y"].map(|name| file_of(&world, name));
    watched.fail([Fault::Write(x.clone()), Fault::Write(y.clone())]);
    ["x", "y"].into_iter().for_each(|name| world.raw(name, &[1]));
    world.write();
    let tried = Arc::new(Mutex::new(Vec::new()));
    let (changes, book, log) =
        (Arc::clone(world.book.changes()), Arc::clone(&world.book), Arc::clone(&tried));
    let (of_x, of_y) = (x.clone(), y.clone());
    watched.on_write(move |name| {
        if name.starts_with(&of_x) || name.starts_with(&of_y) {
            log.lock().unwrap().push((name.to_owned(), changes.pending(&key("a"))));
            // Another change comes meanwhile.
            book.with(&key("a"), |_, _| Ok(())).unwrap();
        }
    });
    world.raw("a", &[1]);
    world.write();
    let (name, pending) = tried.lock().unwrap()[0].clone();
    assert_eq!((name.starts_with(&x), pending), (true, None), "a was acknowledged before x was tried");
    assert!(!tried.lock().unwrap().iter().any(|(name, _)| name.starts_with(&y)), "a waits, so y waits");
    // Not for good.
    world.write();
    assert!(tried.lock().unwrap().iter().any(|(name, _)| name.starts_with(&y)));
}

#[test]
fn what_is_written_before_it_is_synced_is_limited() {
    let disk = FailingDisk::new();
    let watched = WatchedDisk::new(disk.clone());
    let mut world = World::on(disk, &watched);
    let names: Vec<_> = (0..20).map(|at| format!("s{at}")).collect();
    names.iter().for_each(|name| world.create(name));
    world.write();
    let tokens = vec![u32::MAX; 200 << 10];
    names.iter().for_each(|name| world.raw(name, &tokens));
    world.write();
    // Each token is five bytes of a record.
    let of_one = tokens.len() * 5 + 1000;
    let limit = usize::try_from(BATCH_BYTES_MAX).unwrap();
    assert!(names.len() * of_one > limit + of_one);
    assert!(watched.seen().unsynced_bytes_max < limit + of_one, "{:?}", watched.seen());
}

#[test]
fn changes_are_appended_where_there_is_no_room_to_write_a_file_anew() {
    let disk = FailingDisk::new();
    let watched = WatchedDisk::new(disk.clone());
    let mut world = World::on(disk.clone(), &watched);
    world.create("a");
    world.write();
    let size = |disk: &FailingDisk| disk.sizes().iter().map(|(_, size)| size).max().copied().unwrap();
    let mut written = 0;
    let mut rewrite = |world: &mut World| {
        written += 1;
        world.book.with(&key("a"), |session, now| session.truncate_turns(0, now)).unwrap();
        world.chat("a", &format!("{written:02}").repeat(10_000), 0);
        world.write();
    };
    watched.fail([Fault::NewFiles]);
    for _ in 0..20 {
        rewrite(&mut world);
        assert!(disk.sizes().iter().all(|(name, _)| !name.ends_with(".new")), "{:?}", disk.sizes());
        assert_eq!(World::start(disk.after_power_failure(1)).told(), world.told());
    }
    assert!(size(&disk) > 20 * 20_000);
    // Also where a sync failed before.
    let file = file_of(&world, "a");
    watched.fail([Fault::NewFiles, Fault::Sync(file)]);
    rewrite(&mut world);
    watched.fail([Fault::NewFiles]);
    world.write();
    assert_eq!(World::start(disk.after_power_failure(1)).told(), world.told());
    watched.fail([]);
    (0..5).for_each(|_| rewrite(&mut world));
    assert!(size(&disk) < 350_000, "{:?}", disk.sizes());
    assert_eq!(World::start(world.leave()).damaged.len(), 0);
}

#[test]
fn a_session_that_nobody_reads_is_changed_often_and_its_file_does_not_grow() {
    let disk = left(&["a"]);
    let told = World::start(disk.after_kill()).told();
    let mut world = World::cold(disk.clone());
    for at in 0..300 {
        let label = ("label".to_owned(), format!("{at}").repeat(300));
        let change = TermsChange { set_labels: [label].into(), ..TermsChange::default() };
        world.book.update(&key("a"), change).unwrap();
        world.write();
    }
    assert!(disk.sizes().iter().all(|(_, size)| *size < 100_000), "{:?}", disk.sizes());
    let after = World::start(world.leave()).told();
    assert_eq!(after[&key("a")].contents, told[&key("a")].contents);
    assert_eq!(after[&key("a")].outline.terms.labels.len(), 1);
}

/// Returns what may be the start of a frame of this many bytes.
fn start_of_frame(bytes: u64) -> Vec<u8> {
    [&b"mlx1"[..], &bytes.to_le_bytes(), &0_u64.to_le_bytes()].concat()
}

#[test]
fn a_torn_end_that_looks_like_many_frames_is_read_a_few_times_at_most() {
    let whole = left(&["a"]);
    let world = World::start(whole.after_kill());
    let (told, file) = (world.told(), file_of(&world, "a"));
    whole.remove("clean").unwrap();
    let ends = [b"mlx1".repeat(100_000), start_of_frame(200_000).repeat(20_000)];
    for (end, is_torn) in ends.into_iter().zip([true, false]) {
        let disk = whole.after_kill();
        disk.damage(&file, |bytes| bytes.extend(&end));
        let watched = WatchedDisk::new(disk.clone());
        let (_, stored) = open::shelve(Box::new(watched.clone())).unwrap();
        assert!(watched.seen().bytes_read < 8 * end.len() + (1 << 20), "{:?}", watched.seen());
        // What cannot be told from damage is not dropped.
        assert_eq!(stored[0].1.is_none(), is_torn);
        assert_eq!(World::start(disk).told() == told, is_torn);
    }
}

#[test]
fn a_conversation_that_holds_a_frame_does_not_speak_for_another_owner() {
    let foreign = {
        let mut world = World::start(FailingDisk::new());
        ["other", "victim"].into_iter().for_each(|name| world.create(name));
        world.write();
        let name = file_of(&world, "victim");
        world.disk.read(&name, 0, 1 << 20).unwrap()
    };
    let disk = left(&["a"]);
    disk.remove("clean").unwrap();
    let file = file_of(&World::start(disk.after_kill()), "a");
    disk.damage(&file, |bytes| {
        let all = bytes.len();
        bytes[..all].fill(0);
        bytes.extend(&foreign);
    });
    let (_, stored) = open::shelve(Box::new(disk)).unwrap();
    assert!(stored.is_empty(), "{stored:?}");
}
