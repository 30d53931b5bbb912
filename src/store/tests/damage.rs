//! Bytes that change, files that are cut, swapped or gone: a session is what it was, or damaged.

use super::world::{Told, World, key, whole};
use crate::session::{ListPage, SessionFilter};
use crate::store::disk::Disk;
use crate::store::failing::FailingDisk;
use crate::store::file;

/// A disk with sessions of every kind, left in order or not, and what they are.
fn disk(in_order: bool) -> (FailingDisk, Told, Vec<Told>) {
    let disk = FailingDisk::new();
    let mut world = World::start(disk.clone());
    let mut states = Vec::new();
    ["chat", "raw", "empty"].into_iter().for_each(|name| world.create(name));
    world.write();
    states.push(world.told());
    for at in 0..3 {
        world.chat("chat", &format!("turn {at}"), 100);
        world.raw("raw", &[at, 1, 2]);
        world.write();
        states.push(world.told());
    }
    world.book.fork(&key("chat"), whole("fork")).unwrap();
    world.write();
    let told = world.told();
    states.push(told.clone());
    if in_order {
        world.leave();
    }
    (disk, told, states)
}

/// Returns the names of the sessions' files.
fn files(disk: &FailingDisk) -> Vec<String> {
    disk.sizes().into_iter().map(|(name, _)| name).filter(|name| file::id(name).is_some()).collect()
}

#[test]
fn any_bit_that_flips_is_found_and_hurts_one_session() {
    let (disk, told, _) = disk(true);
    let sessions = told.len();
    // And the note, and the number of starts.
    assert_eq!(disk.sizes().len(), sessions + 2);
    for (name, size) in disk.sizes() {
        for at in 0..size {
            let flipped = disk.after_kill();
            flipped.damage(&name, |bytes| bytes[at] ^= 1 << (at % 8));
            let after = World::start(flipped);
            let right = after.told();
            let place = format!("{name}, byte {at}");
            assert!(right.iter().all(|(key, is)| told.get(key) == Some(is)), "{place}: another text");
            assert!(after.damaged.len() <= 1, "{place}: {:?}", after.damaged);
            assert_eq!(right.len() + after.damaged.len(), sessions, "{place}: a session is missing");
        }
    }
}

#[test]
fn without_the_note_a_flipped_bit_leaves_what_the_session_was_at_some_time() {
    let (disk, told, states) = disk(false);
    for (name, size) in disk.sizes() {
        for at in (0..size).step_by(3) {
            let flipped = disk.after_kill();
            flipped.damage(&name, |bytes| bytes[at] ^= 1 << (at % 8));
            let after = World::start(flipped);
            let place = format!("{name}, byte {at}");
            for (key, is) in after.told() {
                assert!(states.iter().any(|told| told.get(&key) == Some(&is)), "{place}: {key}");
            }
            assert_eq!(after.told().len() + after.damaged.len(), told.len(), "{place}");
        }
    }
}

#[test]
fn a_file_that_is_cut_anywhere_is_damaged_or_what_the_session_was() {
    for in_order in [true, false] {
        let (disk, told, states) = disk(in_order);
        for (name, size) in disk.sizes() {
            for at in 0..size {
                let cut = disk.after_kill();
                cut.damage(&name, |bytes| bytes.truncate(at));
                let after = World::start(cut);
                let place = format!("{name}, cut at {at}");
                for (key, is) in after.told() {
                    assert!(states.iter().any(|told| told.get(&key) == Some(&is)), "{place}: {key}");
                    assert!(!in_order || told.get(&key) == Some(&is), "{place}: {key} went back");
                }
                let missing = told.len() - after.told().len() - after.damaged.len();
                assert!(missing == 0 || !in_order && missing == 1, "{place}");
            }
        }
    }
}

#[test]
fn files_that_are_swapped_or_gone_are_damage_of_their_sessions() {
    let (disk, told, _) = disk(true);
    let names = files(&disk);
    for one in &names {
        for other in names.iter().filter(|other| *other > one) {
            let swapped = disk.after_kill();
            swapped.swap(one, other);
            let after = World::start(swapped);
            assert_eq!(after.damaged.len(), 2, "{one} {other}");
            assert!(after.told().iter().all(|(key, is)| told.get(key) == Some(is)));
        }
        let gone = disk.after_kill();
        gone.remove(one).unwrap();
        let after = World::start(gone);
        assert_eq!((after.damaged.len(), after.told().len()), (1, told.len() - 1));
    }
}

#[test]
fn a_copy_over_another_file_is_damage_of_the_session_whose_file_it_was() {
    for in_order in [true, false] {
        let (disk, told, _) = disk(in_order);
        let names = files(&disk);
        for (from, to) in names.iter().flat_map(|from| names.iter().map(move |to| (from, to))) {
            if from == to {
                continue;
            }
            let copied = disk.after_kill();
            let copy = copied.read(from, 0, usize::MAX / 2).unwrap();
            copied.damage(to, |bytes| *bytes = copy);
            let after = World::start(copied);
            let right = after.told();
            assert!(right.iter().all(|(key, is)| told.get(key) == Some(is)), "{from} {to}");
            assert_eq!(right.len(), told.len() - 1, "{from} {to}: others are what they were");
            // Without the note nobody knows any more whose file it was.
            assert_eq!(after.damaged.len(), usize::from(in_order), "{from} {to}");
            assert!(after.damaged.keys().all(|key| told.contains_key(key) && !right.contains_key(key)));
        }
    }
}

#[test]
fn a_file_of_an_earlier_time_is_damage_where_the_end_is_known_and_else_what_the_session_was_then() {
    let mut world = World::start(FailingDisk::new());
    ["chat", "raw"].into_iter().for_each(|name| world.create(name));
    world.write();
    let mut states = vec![(world.disk.after_kill(), world.told())];
    for at in 0..3 {
        world.chat("chat", &format!("turn {at}"), 100);
        world.raw("raw", &[at, 1, 2]);
        world.write();
        states.push((world.disk.after_kill(), world.told()));
    }
    let (told, killed) = (world.told(), world.disk.after_kill());
    let left = world.leave();
    for (then, was) in &states[..3] {
        for file in files(then) {
            let bytes = then.read(&file, 0, usize::MAX / 2).unwrap();
            for (disk, in_order) in [(&left, true), (&killed, false)] {
                let back = disk.after_kill();
                back.damage(&file, |now| now.clone_from(&bytes));
                let after = World::start(back);
                assert_eq!(after.damaged.len(), usize::from(in_order), "{file}");
                for (key, is) in after.told() {
                    assert!(told[&key] == is || !in_order && was[&key] == is, "{file}: {key}");
                }
                assert_eq!(after.told().len() + after.damaged.len(), told.len(), "{file}");
            }
        }
    }
}

#[test]
fn a_damaged_session_is_refused_until_it_is_deleted_and_its_name_is_free_then() {
    let (disk, told, _) = disk(true);
    disk.damage(&files(&disk)[0], |bytes| bytes[300] ^= 1);
    let mut world = World::start(disk);
    let (damaged, why) = world.damaged.first_key_value().unwrap();
    assert_eq!(why, "a part of its file was changed");
    let damaged = damaged.clone();
    let refused = world.book.read(&damaged, |session| Ok(session.tokens().len()));
    assert_eq!(
        refused.unwrap_err().to_string(),
        format!("the session {} is damaged: {why}; it can only be deleted", damaged.name)
    );
    let page = ListPage { after: None, size: 9, filter: SessionFilter::default() };
    assert_eq!(world.book.list(&"uid:1".into(), &page).0.len(), told.len());
    world.book.delete(&damaged).unwrap();
    world.create(damaged.name.as_str());
    world.raw(damaged.name.as_str(), &[5]);
    world.damaged.clear();
    world.write();
    let last = world.told();
    let after = World::start(world.leave());
    assert!(after.damaged.is_empty());
    assert_eq!(after.told(), last);
}
