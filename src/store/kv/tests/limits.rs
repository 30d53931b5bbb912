//! Limits: of the disk, of what waits, and what happens where they are reached.

use std::sync::Arc;
use std::time::Duration;

use super::world::{Arrays, SETTINGS, World, tokens};
use crate::ids::SessionId;
use crate::store::failing::FailingDisk;
use crate::store::kv::shelf::Answer;
use crate::store::kv::{GivenUp, SnapshotError, SnapshotSettings};

fn of(disk_bytes_max: u64, queue_bytes_max: u64) -> World {
    World::start(FailingDisk::new(), true, SnapshotSettings { disk_bytes_max, queue_bytes_max })
}

/// Returns the bytes of a snapshot's files, its list included.
fn bytes_of(session: u64) -> u64 {
    let world = of(1 << 20, 1 << 20);
    save(&world, session).unwrap();
    world.bytes()
}

/// Tokens that no other session has.
fn own(session: u64) -> Vec<u32> {
    vec![u32::try_from(session).unwrap(); 12]
}

fn save(world: &World, session: u64) -> Result<u32, SnapshotError> {
    world.save(session, &own(session), &[8, 12], &[8, 12]).map(|saved| saved.tokens)
}

fn given_up(why: GivenUp) -> Answer {
    Err(SnapshotError::GivenUp(why))
}

#[test]
fn the_least_recently_used_snapshot_makes_room() {
    let world = of(3 * bytes_of(1) + 40, 1 << 20);
    (1..=3).for_each(|session| assert_eq!(save(&world, session), Ok(12)));
    assert_eq!(world.load(1, &own(1)), (12, None));
    assert_eq!(save(&world, 4), Ok(12));
    let has = |world: &World, session| world.load(session, &own(session)).0 == 12;
    assert_eq!([1, 2, 3, 4].map(|session| has(&world, session)), [true, false, true, true]);
    assert_eq!(world.bytes(), world.snapshots.stats().bytes);
    // After a restart by the time of their last use, which each one's list has.
    let settings = SnapshotSettings { disk_bytes_max: 2 * bytes_of(1) + 40, ..SETTINGS };
    let next = World::start(world.disk.after_kill(), true, settings);
    next.writer.work();
    assert_eq!([1, 3, 4].map(|session| has(&next, session)), [false, true, true]);
}

#[test]
fn an_owner_pushes_out_its_own_snapshots_and_of_anothers_only_what_exceeds_an_equal_share() {
    let mut world = of(4 * bytes_of(1) + 60, 1 << 20);
    let has = |world: &World, session| world.load(session, &own(session)).0 == 12;
    (1..=4).for_each(|session| assert_eq!(save(&world, session), Ok(12)));
    // The first alone had everything.
    world.owner = "uid:2";
    (101..=110).for_each(|session| assert_eq!(save(&world, session), Ok(12)));
    assert_eq!([109, 110].map(|session| has(&world, session)), [true; 2]);
    world.owner = "uid:1";
    assert_eq!([1, 2, 3, 4].map(|session| has(&world, session)), [false, false, true, true]);
    // Nor does it by one that is larger than its share.
    world.owner = "uid:2";
    let (long, ends) = (vec![500; 60], [12, 24, 36, 48, 60]);
    let refused = world.save(111, &long, &ends, &ends);
    assert!(matches!(refused, Err(SnapshotError::Share { .. })), "{refused:?}");
    assert_eq!([109, 110].map(|session| has(&world, session)), [true; 2], "nothing went for it");
    world.owner = "uid:1";
    assert_eq!([3, 4].map(|session| has(&world, session)), [true; 2]);
    assert_eq!(world.bytes(), world.snapshots.stats().bytes);
    // Whose snapshots they are is known after a restart too.
    let mut next = World::start(world.disk.after_kill(), true, world.snapshots.shelf.settings);
    next.writer.work();
    next.owner = "uid:2";
    (121..=130).for_each(|session| assert_eq!(save(&next, session), Ok(12)));
    next.owner = "uid:1";
    assert_eq!([3, 4].map(|session| has(&next, session)), [true; 2]);
}

#[test]
fn at_no_moment_do_files_take_more_than_they_may() {
    let most = 2 * bytes_of(1) + bytes_of(1) / 2;
    let live = |world: &World| {
        for session in [1, 2, 1, 3, 2, 4, 1] {
            drop(save(world, session));
            let all = [own(session), vec![9; 3]].concat();
            drop(world.save(session, &all, &[8, 15], &[8, 15]));
        }
    };
    let whole = of(most, 1 << 20);
    live(&whole);
    for writes in 0..whole.disk.writes() {
        let world = of(most, 1 << 20);
        world.disk.end_after(writes);
        live(&world);
        assert!(world.bytes() <= most, "{} bytes of {most} after {writes} writes", world.bytes());
    }
}

#[test]
fn a_snapshot_larger_than_all_may_be_is_refused_and_removes_nothing() {
    let world = of(bytes_of(1) + 40, 1 << 20);
    assert_eq!(save(&world, 1), Ok(12));
    let long = tokens(&[5; 200]);
    let refused = world.save(2, &long, &[210], &[210]);
    assert!(matches!(refused, Err(SnapshotError::TooLarge { .. })), "{refused:?}");
    assert_eq!(world.load(1, &own(1)), (12, None));
    assert!(world.snapshots.stats().enabled);
}

#[test]
fn what_waits_can_be_loaded_and_counts_until_it_is_on_disk() {
    let world = of(1 << 20, 1 << 20);
    let snapshot = world.snapshot(1, &own(1), &[8, 12], &[8, 12]);
    let bytes = snapshot.bytes();
    let mut answer = world.snapshots.save(snapshot).unwrap();
    assert_eq!(world.snapshots.stats().queued_bytes, bytes);
    assert_eq!(world.bytes(), 0);
    assert_eq!(world.load(1, &own(1)), (12, None));
    assert_eq!(world.load(1, &own(1)[..9]).0, 8);
    assert_eq!(world.snapshots.held(SessionId(1)).unwrap().tokens, 12);
    assert!(answer.try_recv().is_err());
    world.writer.work();
    assert_eq!(answer.try_recv().unwrap().unwrap().tokens, 12);
    assert_eq!(world.snapshots.stats().queued_bytes, 0);
    let on_disk: u64 = world.parts().iter().map(|part| world.size(part)).sum();
    assert_eq!(world.snapshots.held(SessionId(1)).unwrap().bytes, on_disk);
}

#[test]
fn no_more_waits_than_may_but_for_one_that_is_larger() {
    let world = of(1 << 20, 100);
    let put = |session| world.snapshots.save(world.snapshot(session, &own(session), &[12], &[12]));
    let bytes = world.snapshot(1, &own(1), &[12], &[12]).bytes();
    assert!(bytes > 100);
    let mut first = put(1).unwrap();
    assert_eq!(put(2).unwrap_err(), SnapshotError::Busy { queued_bytes: bytes, queue_bytes_max: 100 });
    // A newer one of the same session takes its place.
    let mut second = put(1).unwrap();
    assert_eq!(first.try_recv().unwrap(), given_up(GivenUp::Replaced));
    world.writer.work();
    assert!(second.try_recv().unwrap().is_ok());
    assert!(put(2).is_ok());
}

#[test]
fn what_waits_of_a_session_that_is_deleted_is_given_up() {
    let world = of(1 << 20, 1 << 20);
    let mut answer = world.snapshots.save(world.snapshot(1, &own(1), &[12], &[12])).unwrap();
    world.snapshots.forget(SessionId(1));
    assert_eq!(answer.try_recv().unwrap(), given_up(GivenUp::Deleted));
    assert_eq!(world.load(1, &own(1)), (0, Some(SnapshotError::Missing)));
    world.writer.work();
    assert_eq!((world.bytes(), world.snapshots.stats().queued_bytes), (0, 0));
}

#[test]
fn a_disk_that_fails_is_told_and_left_alone_until_it_is_tried_again() {
    let world = of(1 << 20, 1 << 20);
    assert_eq!(save(&world, 1), Ok(12));
    world.disk.fail(100, 1);
    assert!(matches!(save(&world, 2), Err(SnapshotError::Disk(_))));
    let stats = world.snapshots.stats();
    assert!(!stats.enabled && stats.last_error.is_some(), "{stats:?}");
    let refused = world.snapshots.save(world.snapshot(2, &own(2), &[12], &[12])).unwrap_err();
    assert!(matches!(refused, SnapshotError::Disk(_)), "{refused:?}");
    // What was there still is.
    assert_eq!(world.load(1, &own(1)), (12, None));
    world.disk.fail(0, 1);
    world.writer.work();
    assert_eq!(save(&world, 2), Ok(12));
    assert!(world.snapshots.stats().enabled);
    assert_eq!(world.bytes(), world.snapshots.stats().bytes);
}

#[test]
fn on_a_full_disk_snapshots_make_way_for_sessions() {
    let world = of(1 << 20, 1 << 20);
    assert!(world.snapshots.make_way(1), "nobody has looked at the folder yet");
    (1..=3).for_each(|session| assert_eq!(save(&world, session), Ok(12)));
    let has = |session| world.load(session, &own(session)).0 == 12;
    let waiting = world.snapshots.save(world.snapshot(4, &own(4), &[8, 12], &[8, 12])).unwrap();
    assert!(world.snapshots.make_way(bytes_of(1)));
    world.writer.work();
    assert_eq!([1, 2, 3].map(has), [false, true, true]);
    assert_eq!(waiting.blocking_recv().unwrap().unwrap().tokens, 12, "written when there was room");
    assert!(world.snapshots.make_way(u64::MAX));
    world.writer.work();
    assert_eq!((world.bytes(), world.snapshots.stats().count), (0, 0));
    assert!(!world.snapshots.make_way(1), "there is nothing left to remove");
}

#[test]
fn arrays_that_the_device_does_not_show_leave_nothing_and_are_not_the_disks_fault() {
    let world = of(1 << 20, 1 << 20);
    for content in [Arrays(Err(())), Arrays(Ok(vec![vec![0; 3]; 2]))] {
        let mut snapshot = world.snapshot(1, &own(1), &[8, 12], &[8, 12]);
        snapshot.segments[1].content = Arc::new(content);
        let mut answer = world.snapshots.save(snapshot).unwrap();
        world.writer.work();
        assert!(matches!(answer.try_recv().unwrap(), Err(SnapshotError::Device(_))));
        assert_eq!(world.bytes(), 0);
        assert!(world.snapshots.stats().enabled);
    }
}

#[test]
fn segments_that_are_not_a_whole_cache_are_refused() {
    let world = of(1 << 20, 1 << 20);
    let mut snapshot = world.snapshot(1, &own(1), &[8, 12], &[8, 12]);
    snapshot.segments.remove(0);
    assert!(matches!(world.snapshots.save(snapshot), Err(SnapshotError::Device(_))));
    let snapshot = world.snapshot(1, &own(1), &[8], &[8]);
    assert!(matches!(world.snapshots.save(snapshot), Err(SnapshotError::Device(_))));
}

#[test]
fn its_thread_writes_and_leaves_when_it_is_told_to() {
    let folder = tempfile::tempdir().unwrap();
    let world = of(1 << 20, 1 << 20);
    let start = || {
        super::super::Snapshots::start(&folder.path().join("kv"), SETTINGS, |_| Some("uid:1".into())).unwrap()
    };
    let snapshots = start();
    let answer = snapshots.save(world.snapshot(1, &own(1), &[8, 12], &[8, 12])).unwrap();
    assert_eq!(answer.blocking_recv().unwrap().unwrap().tokens, 12);
    let last = snapshots.save(world.snapshot(2, &own(2), &[8, 12], &[8, 12])).unwrap();
    snapshots.close(Duration::from_secs(20));
    assert!(last.blocking_recv().unwrap().is_ok());
    assert!(snapshots.save(world.snapshot(1, &own(1), &[12], &[12])).is_err());
    assert_eq!(start().held(SessionId(2)).unwrap().tokens, 12);
    use std::os::unix::fs::PermissionsExt;
    let mode = folder.path().join("kv").metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
    for entry in std::fs::read_dir(folder.path().join("kv")).unwrap() {
        assert_eq!(entry.unwrap().metadata().unwrap().permissions().mode() & 0o777, 0o600);
    }
}

#[test]
fn a_test_drives_snapshots_by_hand() {
    let (snapshots, by_hand) = crate::store::ByHand::new(SETTINGS, |_| Some("uid:1".into()));
    let world = of(1 << 20, 1 << 20);
    let mut answer = snapshots.save(world.snapshot(1, &own(1), &[8, 12], &[8, 12])).unwrap();
    by_hand.work();
    assert!(answer.try_recv().unwrap().is_ok());
    assert_eq!(by_hand.bytes(), snapshots.stats().bytes);
    let (next, by_hand) = by_hand.restarted(Some(1), SETTINGS, |_| Some("uid:1".into()));
    assert_eq!(next.held(SessionId(1)).unwrap().tokens, 12);
    by_hand.damage(0);
    assert_eq!(next.held(SessionId(1)), None);
    by_hand.fail(100, 1);
    by_hand.work();
    assert!(!next.stats().enabled);
}

#[test]
fn a_save_that_is_refused_gives_nothing_up() {
    let bytes = of(1 << 20, 1 << 20).snapshot(1, &own(1), &[12], &[12]).bytes();
    let world = of(1 << 20, 2 * bytes);
    let mut first = world.snapshots.save(world.snapshot(1, &own(1), &[12], &[12])).unwrap();
    let _second = world.snapshots.save(world.snapshot(2, &own(2), &[12], &[12])).unwrap();
    let long = [own(1), vec![5; 10]].concat();
    let refused = world.snapshots.save(world.snapshot(1, &long, &[22], &[22]));
    assert!(matches!(refused, Err(SnapshotError::Busy { .. })));
    assert_eq!(world.load(1, &own(1)), (12, None));
    world.writer.work();
    assert!(first.try_recv().unwrap().is_ok());
}

#[test]
fn all_that_waits_can_be_given_up_and_its_arrays_are_freed_before_that_is_told() {
    let world = of(1 << 20, 1 << 20);
    let snapshot = world.snapshot(1, &own(1), &[12], &[12]);
    let arrays = Arc::downgrade(&snapshot.segments[0].content);
    let mut answer = world.snapshots.save(snapshot).unwrap();
    world.snapshots.give_up_waiting();
    assert_eq!(answer.try_recv().unwrap(), given_up(GivenUp::Hurried));
    assert_eq!((arrays.strong_count(), world.snapshots.stats().queued_bytes), (0, 0));
    world.writer.work();
    assert_eq!(world.bytes(), 0);
    // So are those of one that is on disk.
    let snapshot = world.snapshot(1, &own(1), &[12], &[12]);
    let arrays = Arc::downgrade(&snapshot.segments[0].content);
    let mut answer = world.snapshots.save(snapshot).unwrap();
    world.writer.work();
    assert!(answer.try_recv().unwrap().is_ok());
    assert_eq!(arrays.strong_count(), 0);
}

#[test]
fn the_disk_is_left_some_room_and_others_are_evicted_for_it() {
    let world = of(1 << 20, 1 << 20);
    world.disk.set_total_bytes((1 << 30) + 2 * bytes_of(1) + 40);
    (1..=3).for_each(|session| assert_eq!(save(&world, session), Ok(12)));
    assert_eq!(world.load(1, &own(1)).0, 0);
    assert!([2, 3].iter().all(|&session| world.load(session, &own(session)) == (12, None)));
    world.disk.set_total_bytes(1 << 30);
    let refused = save(&world, 4);
    assert!(matches!(refused, Err(SnapshotError::Full { .. })), "{refused:?}");
    assert!(!world.snapshots.stats().enabled, "whoever looks is told");
    assert!([2, 3].iter().all(|&session| world.load(session, &own(session)) == (12, None)), "in vain");
}
