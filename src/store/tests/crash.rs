//! The end at every write: kill and power failure, and disks that fail for a while.

use std::collections::BTreeMap;

use super::world::{Told, World, key, keys};
use crate::store::failing::{Chance, FailingDisk};
use crate::store::file;

/// Batches of changes in a life.
const BATCHES: usize = 24;

/// Lives a life from its seed until the disk ends. Returns what sessions were when the last batch that was
/// acknowledged was written, and what they were to become.
fn live(disk: &FailingDisk, seed: u64) -> (Told, Told) {
    let mut world = World::start(disk.clone());
    let mut chance = Chance(seed);
    let mut acknowledged = Told::new();
    for _ in 0..BATCHES {
        for _ in 0..=chance.below(3) {
            world.happen(&mut chance);
        }
        world.write();
        if disk.has_ended() {
            return (acknowledged, world.told());
        }
        acknowledged = world.told();
    }
    (acknowledged.clone(), acknowledged)
}

#[test]
fn after_a_crash_at_any_write_every_session_has_exactly_its_acknowledged_turns() {
    for seed in 0..4 {
        let whole = FailingDisk::new();
        live(&whole, seed);
        for writes in 0..whole.writes() {
            let disk = FailingDisk::new();
            disk.end_after(writes);
            let (acknowledged, attempted) = live(&disk, seed);
            let ends = [disk.after_kill()].into_iter();
            let ends = ends.chain((0..3).map(|other| disk.after_power_failure(seed * 100 + other)));
            for (way, end) in ends.enumerate() {
                let place = format!("seed {seed}, write {writes}, end {way}");
                let mut world = World::start(end);
                assert_eq!(world.damaged, BTreeMap::new(), "{place}");
                let found = world.told();
                for key in keys([&found, &acknowledged, &attempted]) {
                    let is = found.get(&key);
                    let may_be = [acknowledged.get(&key), attempted.get(&key)];
                    assert!(may_be.contains(&is), "{place}: {key} is {is:#?}, not {may_be:#?}");
                }
                // And it goes on from there.
                let mut chance = Chance(seed + 1000);
                for _ in 0..4 {
                    world.happen(&mut chance);
                    world.write();
                }
                let last = world.told();
                assert_eq!(World::start(world.leave()).told(), last, "{place}");
            }
        }
    }
}

#[test]
fn a_session_that_is_replaced_is_the_old_or_the_new_one_at_every_moment_and_the_old_one_never_comes_back() {
    let begin = || {
        let disk = FailingDisk::new();
        let mut world = World::start(disk.clone());
        for name in ["a", "b"] {
            world.create(name);
        }
        world.raw("a", &[1, 2, 3]);
        world.chat("b", "what takes its place", 0);
        world.write();
        (disk, world)
    };
    let contents = |told: &Told| told.get(&key("a")).map(|is| is.contents.clone().unwrap().tokens);
    let (disk, mut whole) = begin();
    let (first, before) = (disk.writes(), contents(&whole.told()));
    whole.replace("b", "a");
    whole.write();
    let after = contents(&whole.told());
    for writes in 0..disk.writes() - first {
        let (disk, mut world) = begin();
        disk.end_after(writes);
        world.replace("b", "a");
        world.write();
        let ends = [disk.after_kill()].into_iter();
        for (way, end) in ends.chain((0..8).map(|seed| disk.after_power_failure(seed))).enumerate() {
            let place = format!("write {writes}, end {way}");
            let mut next = World::start(end);
            let found = contents(&next.told());
            assert!(found == before || found == after, "{place}: {found:?}");
            // Nor does it where the new one is damaged.
            let both = next.disk.after_kill();
            let files = both.sizes().into_iter().filter(|(name, _)| file::id(name).is_some());
            if let Some((newest, _)) = files.max().filter(|_| found == after) {
                both.damage(&newest, |bytes| bytes[300] ^= 1);
                assert!(contents(&World::start(both).told()) != before, "{place}");
            }
            next.book.delete(&key("a")).unwrap();
            next.write();
            let last = World::start(next.disk.after_power_failure(1));
            assert_eq!(last.told().keys().collect::<Vec<_>>(), [&key("b")], "{place}");
            assert!(last.damaged.is_empty(), "{place}");
        }
    }
}

#[test]
fn a_disk_that_fails_for_a_while_loses_nothing_once_it_works_again() {
    for seed in 0..40 {
        let disk = FailingDisk::new();
        let mut world = World::start(disk.clone());
        let mut chance = Chance(seed);
        let mut states = vec![Told::new()];
        disk.fail(30, seed);
        for _ in 0..BATCHES {
            world.happen(&mut chance);
            world.write();
            states.push(world.told());
            // Whenever it ends, each session is one that it was.
            for end in [disk.after_kill(), disk.after_power_failure(seed)] {
                let after = World::start(end);
                assert_eq!(after.damaged, BTreeMap::new(), "seed {seed}");
                for (key, is) in after.told() {
                    assert!(states.iter().any(|told| told.get(&key) == Some(&is)), "seed {seed}: {key}");
                }
            }
        }
        disk.fail(0, seed);
        world.write();
        let last = world.told();
        assert_eq!(World::start(disk.after_power_failure(seed)).told(), last, "seed {seed}");
        assert_eq!(World::start(world.leave()).told(), last, "seed {seed}");
    }
}

#[test]
fn changes_that_come_together_are_synced_together_and_those_that_change_nothing_not_at_all() {
    let disk = FailingDisk::new();
    let mut world = World::start(disk.clone());
    ["a", "b", "c"].into_iter().for_each(|name| world.create(name));
    world.write();
    let before = disk.writes();
    (0..5).for_each(|at| world.raw("a", &[at]));
    world.raw("b", &[1]);
    world.write();
    // A write and a sync for each of the two files.
    assert_eq!(disk.writes() - before, 4);
    world.write();
    assert_eq!(disk.writes() - before, 4);
}

#[test]
fn a_file_that_says_mostly_what_no_longer_holds_is_written_anew() {
    let disk = FailingDisk::new();
    let mut world = World::start(disk.clone());
    world.create("a");
    for at in 0..60 {
        world.chat("a", &"x".repeat(4000), 0);
        world.book.with(&super::world::key("a"), |session, now| session.truncate_turns(0, now)).unwrap();
        world.chat("a", &format!("turn {at}"), 0);
        world.write();
        world.book.with(&super::world::key("a"), |session, now| session.truncate_turns(0, now)).unwrap();
        world.chat("a", &"y".repeat(4000), 0);
        world.write();
    }
    let sizes = disk.sizes();
    // Besides the number of starts.
    assert!(sizes.len() == 2 && sizes.iter().all(|(_, size)| *size < 200_000), "{sizes:?}");
    let last = world.told();
    assert_eq!(World::start(disk.after_power_failure(1)).told(), last);
}
