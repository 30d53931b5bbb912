//! Bytes that change, files that are cut, swapped or gone: what is loaded is right, or nothing is.

use super::world::{SETTINGS, World, tokens};
use crate::store::failing::FailingDisk;
use crate::store::kv::SnapshotError;

const SAVED: [&[u32]; 2] = [&[1, 2, 3], &[4, 5, 6]];

/// Two sessions that share their beginning.
fn disk(recurrent: bool) -> FailingDisk {
    let world = World::start(FailingDisk::new(), recurrent, SETTINGS);
    world.save(1, &tokens(SAVED[0]), &[10, 13], &[10, 13]).unwrap();
    world.save(2, &tokens(SAVED[1]), &[10, 13], &[10, 13]).unwrap();
    world.disk
}

/// What each session loads; that it is right is checked where it is loaded. Every other time the folder was
/// looked at before, and sometimes what was found is mended.
fn loads(disk: &FailingDisk, recurrent: bool, at: usize) -> [(u32, Option<SnapshotError>); 2] {
    [1, 2].map(|session| {
        let world = World::start(disk.after_kill(), recurrent, SETTINGS);
        if at.is_multiple_of(2) {
            world.writer.work();
        }
        let all = tokens(SAVED[session - 1]);
        let loaded = world.load(session as u64, &all);
        if at % 16 < 2 {
            // What was found damaged is removed, and written anew with the next save.
            world.writer.work();
            world.save(session as u64, &all, &[10, 13], &[10, 13]).unwrap();
            let next = World::start(world.disk.after_kill(), recurrent, SETTINGS);
            let again = next.load(session as u64, &all);
            assert!(again == (13, None), "{loaded:?}, then {again:?}");
        }
        loaded
    })
}

fn is_typed(loaded: &(u32, Option<SnapshotError>)) -> bool {
    let (tokens, fault) = loaded;
    match fault {
        None => *tokens == 13,
        // Where states are lost that are not its last ones, no token is.
        Some(SnapshotError::Damaged(_) | SnapshotError::Missing) => *tokens <= 13,
        Some(_) => false,
    }
}

#[test]
fn any_bit_that_flips_costs_tokens_and_never_yields_others() {
    for recurrent in [false, true] {
        let disk = disk(recurrent);
        for (name, size) in disk.sizes() {
            for at in 0..size {
                let flipped = disk.after_kill();
                flipped.damage(&name, |bytes| bytes[at] ^= 1 << (at % 8));
                let loaded = loads(&flipped, recurrent, at);
                assert!(loaded.iter().all(is_typed), "{name}, byte {at}: {loaded:?}");
                assert!(
                    loaded.iter().any(|(_, fault)| fault.is_some()),
                    "{name}, byte {at} is not looked at"
                );
            }
        }
    }
}

#[test]
fn a_file_that_is_cut_or_longer_is_not_used() {
    for recurrent in [false, true] {
        let disk = disk(recurrent);
        for (name, size) in disk.sizes() {
            for at in (0..size).chain([size + 1, size + 32]) {
                let cut = disk.after_kill();
                cut.damage(&name, |bytes| bytes.resize(at, b' '));
                let loaded = loads(&cut, recurrent, at);
                assert!(loaded.iter().all(is_typed), "{name}, cut at {at}: {loaded:?}");
                assert!(loaded.iter().any(|(_, fault)| fault.is_some()), "{name}, cut at {at}");
            }
        }
    }
}

#[test]
fn files_that_are_swapped_or_gone_are_not_used() {
    for recurrent in [false, true] {
        let disk = disk(recurrent);
        let names: Vec<String> = disk.sizes().into_iter().map(|(name, _)| name).collect();
        for one in &names {
            for other in names.iter().filter(|other| *other > one) {
                let swapped = disk.after_kill();
                swapped.swap(one, other);
                let loaded = [0, 1].map(|at| loads(&swapped, recurrent, at)).concat();
                assert!(loaded.iter().all(is_typed), "{one} {other}: {loaded:?}");
            }
            let gone = disk.after_kill();
            crate::store::disk::Disk::remove(&gone, one).unwrap();
            let loaded = [0, 1].map(|at| loads(&gone, recurrent, at)).concat();
            assert!(loaded.iter().all(is_typed), "without {one}: {loaded:?}");
            assert!(loaded.iter().any(|(_, fault)| fault.is_some()), "without {one}");
        }
    }
}

#[test]
fn a_snapshot_that_goes_back_a_version_is_what_it_was_then() {
    for recurrent in [false, true] {
        let world = World::start(FailingDisk::new(), recurrent, SETTINGS);
        let all = tokens(&[1, 2, 3, 4, 5]);
        world.save(1, &all[..12], &[10, 12], &[10, 12]).unwrap();
        let list = world.disk.sizes().into_iter().find(|(name, _)| name.ends_with(".json")).unwrap().0;
        let old = crate::store::disk::Disk::read(&world.disk, &list, 0, 1 << 20).unwrap();
        world.save(1, &all, &[10, 12, 15], &[10, 12, 15]).unwrap();
        world.disk.damage(&list, |bytes| *bytes = old);
        let next = World::start(world.disk.after_kill(), recurrent, SETTINGS);
        assert_eq!(next.load(1, &all), (12, None));
        // Of another session it is nobody's.
        let other = tokens(&[7, 7, 7]);
        assert_eq!(next.load(1, &other[1..]), (0, Some(SnapshotError::Missing)));
    }
}
