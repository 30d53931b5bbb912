//! What sessions have in common is stored once, and whatever of a snapshot is still right is used.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::world::{Builder, PROMPT, SETTINGS, World, tokens};
use crate::backend::{KvArray, KvElement, KvLayout};
use crate::ids::SessionId;
use crate::store::failing::FailingDisk;
use crate::store::kv::{GivenUp, SnapshotError, Wanted};

const PROMPT_END: u32 = PROMPT.end - PROMPT.start;

fn worlds() -> impl Iterator<Item = World> {
    [false, true].into_iter().map(|recurrent| World::start(FailingDisk::new(), recurrent, SETTINGS))
}

/// The next daemon.
fn restarted(world: &World) -> World {
    World::start(world.disk.after_kill(), world.layout.is_recurrent(), SETTINGS)
}

#[test]
fn what_was_saved_is_loaded_bit_for_bit_by_the_next_daemon() {
    for world in worlds() {
        let all = tokens(&[1, 2, 3, 4, 5]);
        let saved = world.save(1, &all, &[10, 13, 15], &[10, 12, 15]).unwrap();
        assert_eq!(saved.tokens, 15);
        assert_eq!(world.load(1, &all), (15, None));
        let next = restarted(&world);
        assert_eq!(next.snapshots.held(SessionId(1)), Some(saved));
        assert_eq!(next.load(1, &all), (15, None));
        assert_eq!(next.load(2, &all), (0, Some(SnapshotError::Missing)));
        // Also when it has looked at its folder.
        next.writer.work();
        assert_eq!(next.snapshots.held(SessionId(1)), Some(saved));
        assert_eq!(next.load(1, &all), (15, None));
    }
}

#[test]
fn sessions_that_begin_alike_have_the_files_of_it_in_common() {
    for world in worlds() {
        for session in 1..=8 {
            world.save(session, &tokens(&[u32::try_from(session).unwrap()]), &[10, 11], &[10, 11]).unwrap();
        }
        // A file for the beginning and one for each end, and as many of states.
        let of_states = if world.layout.is_recurrent() { 9 } else { 0 };
        assert_eq!(world.parts().len(), 9 + of_states);
        (1..=8).for_each(|session| world.snapshots.forget(SessionId(session)));
        world.writer.work();
        assert_eq!((world.bytes(), world.snapshots.stats().bytes), (0, 0));
    }
}

#[test]
fn a_fork_takes_no_bytes_but_those_of_its_list() {
    for world in worlds() {
        let all = tokens(&[1]);
        world.save(1, &all, &[11], &[11]).unwrap();
        let before = world.parts();
        (2..=8).for_each(|fork| world.snapshots.fork(SessionId(1), SessionId(fork), all.clone().into()));
        world.snapshots.forget(SessionId(1));
        world.writer.work();
        assert_eq!(world.parts(), before);
        let next = restarted(&world);
        assert!((2..=8).all(|fork| next.load(fork, &all) == (11, None)));
        assert_eq!(next.load(1, &all).0, 0);
    }
}

#[test]
fn nothing_is_shared_between_owners_salts_and_revisions() {
    for mut world in worlds() {
        let all = tokens(&[1]);
        let mut parts = 0;
        for (session, owner, salt, revision) in
            [(1, "uid:1", 0, "a"), (2, "uid:2", 0, "a"), (3, "uid:1", 1, "a"), (4, "uid:1", 0, "b")]
        {
            (world.owner, world.salt, world.revision) = (owner, salt, revision);
            world.save(session, &all, &[11], &[11]).unwrap();
            let added = world.parts().len() - parts;
            assert_eq!(added, 1 + usize::from(world.layout.is_recurrent()));
            parts += added;
        }
        assert_eq!(world.load(4, &all), (11, None));
        assert_eq!(world.load(3, &all), (0, Some(SnapshotError::Foreign)));
        assert_eq!(world.load(1, &all), (0, Some(SnapshotError::Foreign)));
    }
}

#[test]
fn a_snapshot_of_another_number_format_or_shape_is_foreign() {
    for world in worlds() {
        let all = tokens(&[1]);
        world.save(1, &all, &[11], &[11]).unwrap();
        for at in 0..world.layout.arrays.len() {
            let mut arrays = world.layout.arrays.clone();
            match &mut arrays[at] {
                KvArray::PerToken { element, .. } => *element = KvElement::Bfloat16,
                KvArray::PerSequence { shape, .. } => shape.push(1),
            }
            let mut other = restarted(&world);
            other.layout = Arc::new(KvLayout { arrays });
            assert_eq!(other.load(1, &all), (0, Some(SnapshotError::Foreign)), "array {at}");
            // Nor does it stand in the way of one that fits.
            other.save(1, &all, &[11], &[11]).unwrap();
            assert_eq!(other.load(1, &all), (11, None), "array {at}");
        }
        assert_eq!(restarted(&world).load(1, &all), (11, None));
    }
}

#[test]
fn a_session_that_was_cut_back_or_rewritten_has_what_is_still_its_own() {
    for world in worlds() {
        let all = tokens(&[1, 2, 3, 4, 5]);
        world.save(1, &all, &[10, 15], &[10, 13, 15]).unwrap();
        // Without states any beginning can be used, with them one that ends where they were saved.
        let expected = |common: u32| match common {
            10..=12 if world.layout.is_recurrent() => 10,
            13..=14 if world.layout.is_recurrent() => 13,
            0..=9 if world.layout.is_recurrent() => 0,
            common => common,
        };
        let next = restarted(&world);
        for world in [&world, &next] {
            for length in 1..=15 {
                let cut = &all[..length as usize];
                assert_eq!(world.load(1, cut).0, expected(length), "cut to {length}");
                let mut other = all.clone();
                other[length as usize - 1] += 1;
                assert_eq!(world.load(1, &other).0, expected(length - 1), "another token {length}");
                let longer = [&all[..], &[6, 7]].concat();
                assert_eq!(world.load(1, &longer), (15, None));
            }
        }
    }
}

#[test]
fn a_snapshot_counts_for_what_its_session_still_says() {
    for mut world in worlds() {
        let all = tokens(&[1, 2, 3, 4, 5]);
        let held = |world: &World, tokens: &[u32]| {
            let held = world.snapshots.held_of(SessionId(1), tokens, Some(&world.key()));
            held.map_or(0, |held| held.tokens)
        };
        let check = |world: &World| {
            assert_eq!(held(world, &all), 15);
            assert_eq!(held(world, &[&all[..], &[6]].concat()), 15);
            // As long, and something else from the twelfth or the first token on.
            assert_eq!(held(world, &tokens(&[1, 9, 3, 4, 5])), 10);
            assert_eq!(held(world, &[&[9], &all[1..]].concat()), 0);
            assert_eq!(held(world, &all[..14]), 13);
        };
        let snapshot = world.snapshot(1, &all, &[10, 13, 15], &[10, 13, 15]);
        let waiting = world.snapshots.save(snapshot).unwrap();
        check(&world);
        world.writer.work();
        drop(waiting);
        check(&world);
        world.revision = "b";
        assert_eq!(held(&world, &all), 0, "of other weights");
        let of_any = world.snapshots.held_of(SessionId(1), &all, None);
        assert_eq!(of_any, world.snapshots.held(SessionId(1)));
    }
}

#[test]
fn what_a_parked_cache_has_is_not_read_again() {
    for world in worlds() {
        let all = tokens(&[1, 2, 3, 4, 5]);
        world.save(1, &all, &[PROMPT_END, 13, 15], &[10, 13, 15]).unwrap();
        for held in 0..15 {
            let loaded = world.load_from(1, &all, held).unwrap();
            assert_eq!(loaded.tokens, held..15);
        }
        assert_eq!(world.load_from(1, &all, 15).unwrap_err(), SnapshotError::Missing);
        // Its first part may even be gone.
        let first = world.parts();
        let next = restarted(&world);
        let fewer = first.iter().filter(|name| {
            let disk = next.disk.after_kill();
            crate::store::disk::Disk::remove(&disk, name).unwrap();
            let world = World::start(disk, next.layout.is_recurrent(), SETTINGS);
            world.load_from(1, &all, 13).is_ok_and(|loaded| loaded.tokens == (13..15))
        });
        let needed = if world.layout.is_recurrent() { 2 } else { 1 };
        assert_eq!(fewer.count(), first.len() - needed);
    }
}

#[test]
fn nothing_more_is_read_for_somebody_who_waits_no_longer() {
    let world = World::start(FailingDisk::new(), true, SETTINGS);
    let all = tokens(&[1, 2, 3]);
    world.save(1, &all, &[10, 13], &[10, 13]).unwrap();
    let (key, stop, builder) = (world.key(), AtomicBool::new(true), Builder::default());
    let wanted = Wanted {
        session: SessionId(1),
        key: &key,
        layout: &world.layout,
        tokens: &all,
        held: 0,
        stop: &stop,
    };
    let ended = world.snapshots.load(&wanted, &builder).unwrap_err();
    assert_eq!((ended, *builder.built.lock().unwrap()), (SnapshotError::GivenUp(GivenUp::Held), 0));
    assert_eq!(world.load(1, &all), (13, None));
}

#[test]
fn a_snapshot_that_grows_writes_its_end_and_loses_what_was_joined() {
    for world in worlds() {
        let all = tokens(&[1, 2, 3, 4, 5]);
        world.save(1, &all[..12], &[10, 12], &[10, 12]).unwrap();
        let before = world.parts();
        world.save(1, &all, &[10, 15], &[10, 15]).unwrap();
        let kept = world.parts().iter().filter(|part| before.contains(part)).count();
        let each = 1 + usize::from(world.layout.is_recurrent());
        assert_eq!((kept, world.parts().len()), (each, 2 * each));
        assert_eq!(restarted(&world).load(1, &all), (15, None));
    }
}

#[test]
fn snapshots_of_sessions_that_are_gone_are_removed_soon_after_the_start() {
    for world in worlds() {
        world.save(1, &tokens(&[1]), &[10, 11], &[10, 11]).unwrap();
        world.save(2, &tokens(&[2]), &[10, 11], &[10, 11]).unwrap();
        let parts = world.parts().len();
        let next = World::without(world.disk.after_kill(), world.layout.is_recurrent(), SETTINGS, &[2]);
        next.writer.work();
        assert_eq!(next.load(1, &tokens(&[1])), (11, None));
        assert_eq!(next.load(2, &tokens(&[2])).0, 0);
        assert_eq!(next.parts().len(), parts - 1 - usize::from(next.layout.is_recurrent()));
        assert_eq!(next.bytes(), next.snapshots.stats().bytes);
        assert_eq!(next.snapshots.stats().count, 1);
    }
}
