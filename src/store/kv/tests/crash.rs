//! The end at every write: kill and power failure. A snapshot that was acknowledged is there, or the one that
//! was to take its place.

use std::collections::BTreeMap;

use super::world::{SETTINGS, World, tokens};
use crate::ids::SessionId;
use crate::store::failing::{Chance, FailingDisk};

/// Things that happen in a life.
const EVENTS: usize = 14;
const SESSIONS: usize = 3;

type Told = BTreeMap<u64, Vec<u32>>;

/// Lives a life from its seed until the disk ends. Returns what was acknowledged last, and what was to become
/// of it.
fn live(world: &World, seed: u64) -> (Told, Told) {
    let mut chance = Chance(seed);
    let (mut acknowledged, mut attempted) = (Told::new(), Told::new());
    for _ in 0..EVENTS {
        let session = chance.below(SESSIONS) as u64 + 1;
        match chance.below(6) {
            0 => {
                attempted.remove(&session);
                world.snapshots.forget(SessionId(session));
                world.writer.work();
            }
            1 => {
                let fork = chance.below(SESSIONS) as u64 + 1;
                if let Some(of) = attempted.get(&session).cloned().filter(|_| fork != session) {
                    attempted.insert(fork, of.clone());
                    world.snapshots.fork(SessionId(session), SessionId(fork), of.into());
                    world.writer.work();
                }
            }
            _ => {
                let before = attempted.get(&session).cloned();
                let all = match before {
                    Some(before) if chance.below(3) > 0 => before,
                    Some(_) | None => tokens(&[u32::try_from(session).unwrap()]),
                };
                let more = (0..=chance.below(3)).map(|_| u32::try_from(chance.below(9)).unwrap());
                let all: Vec<u32> = all.into_iter().chain(more).collect();
                let end = u32::try_from(all.len()).unwrap();
                attempted.insert(session, all.clone());
                let ends = if chance.below(2) == 0 { vec![end] } else { vec![10, end] };
                drop(world.save(session, &all, &ends, &[10, end]));
            }
        }
        if world.disk.has_ended() {
            return (acknowledged, attempted);
        }
        acknowledged.clone_from(&attempted);
    }
    (acknowledged, attempted)
}

#[test]
fn after_a_crash_at_any_write_a_snapshot_is_the_acknowledged_one_or_the_next() {
    for (seed, recurrent) in (0..4).map(|seed| (seed, seed % 2 == 1)) {
        let whole = World::start(FailingDisk::new(), recurrent, SETTINGS);
        live(&whole, seed);
        for writes in 0..whole.disk.writes() {
            let world = World::start(FailingDisk::new(), recurrent, SETTINGS);
            world.disk.end_after(writes);
            let (acknowledged, attempted) = live(&world, seed);
            let ends = [world.disk.after_kill()].into_iter();
            let ends = ends.chain((0..3).map(|other| world.disk.after_power_failure(seed * 100 + other)));
            for (way, end) in ends.enumerate() {
                let place = format!("seed {seed}, write {writes}, end {way}");
                let next = World::start(end, recurrent, SETTINGS);
                for looks in [false, true] {
                    if looks {
                        next.writer.work();
                    }
                    for session in 1..=SESSIONS as u64 {
                        let (was, is) = (acknowledged.get(&session), attempted.get(&session));
                        let whole = |told: Option<&Vec<u32>>| {
                            told.is_none_or(|all| {
                                next.load(session, all) == (u32::try_from(all.len()).unwrap(), None)
                            })
                        };
                        assert!(whole(was) || whole(is), "{place}: {session} was {was:?}, to be {is:?}");
                    }
                }
                // Nothing is left that no snapshot names, and it goes on from there.
                assert_eq!(next.bytes(), next.snapshots.stats().bytes, "{place}");
                let (_, told) = live(&next, seed + 1000);
                let last = World::start(next.disk.after_power_failure(seed), recurrent, SETTINGS);
                for (session, all) in
                    told.into_iter().filter(|(session, _)| next.snapshots.held(SessionId(*session)).is_some())
                {
                    assert!(last.load(session, &all).0 > 0, "{place}: {session} afterwards");
                }
            }
        }
    }
}

#[test]
fn a_disk_that_fails_for_a_while_costs_snapshots_and_nothing_else() {
    for seed in 0..40 {
        let world = World::start(FailingDisk::new(), seed % 2 == 1, SETTINGS);
        world.disk.fail(20, seed);
        let mut chance = Chance(seed);
        for at in 0..20 {
            let session = chance.below(SESSIONS) as u64 + 1;
            let all = tokens(&vec![at; chance.below(5) + 1]);
            let end = u32::try_from(all.len()).unwrap();
            let saved = world.save(session, &all, &[10, end], &[10, end]);
            if saved.is_ok() {
                assert_eq!(world.load(session, &all), (end, None), "seed {seed}, {at}");
            }
            // What cannot be loaded is said to be so: whatever is loaded is checked.
            world.load(session, &all);
            World::start(world.disk.after_power_failure(seed), seed % 2 == 1, SETTINGS).load(session, &all);
        }
        world.disk.fail(0, seed);
        world.writer.work();
        let all = tokens(&[1, 2]);
        world.save(1, &all, &[12], &[12]).unwrap();
        assert!(world.snapshots.stats().enabled);
        assert_eq!(world.load(1, &all), (12, None));
        assert_eq!(world.bytes(), world.snapshots.stats().bytes, "seed {seed}");
    }
}
