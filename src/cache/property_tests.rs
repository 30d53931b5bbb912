//! Slots and parked caches against models that are too simple to be wrong.

#![allow(clippy::cast_possible_truncation, reason = "the numbers here are small")]

use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;

use super::{CacheEntry, Parked, Slots};
use crate::backend::{ParkedId, SlotId};
use crate::clock::Moment;
use crate::ids::Principal;

const BYTES: u64 = 10;
const CONTEXT: u32 = 3000;

#[derive(Clone, Debug)]
enum Act {
    Acquire { tokens: u32, waiting: u32, slots: u64 },
    Release(usize),
    Close,
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        4 => (1..=CONTEXT, 1..40u32, 1..50u64)
            .prop_map(|(tokens, waiting, slots)| Act::Acquire { tokens, waiting, slots }),
        3 => any::<usize>().prop_map(Act::Release),
        1 => Just(Act::Close),
    ]
}

proptest! {
    #[test]
    fn every_owner_has_one_slot_of_its_size_and_slots_in_use_are_in_front(
        acts in prop::collection::vec(act(), 1..80)
    ) {
        let mut slots = Slots::new(CONTEXT, BYTES, 0);
        let mut held: BTreeMap<u64, (SlotId, u32)> = BTreeMap::new();
        let mut open: BTreeMap<u32, u64> = BTreeMap::new();
        for (owner, act) in acts.into_iter().enumerate() {
            match act {
                Act::Acquire { tokens, waiting, slots: affordable } => {
                    let free_bytes = affordable * slots.slot_bytes(tokens);
                    let was_free = slots.has_free(tokens);
                    let grant = slots.acquire(owner as u64, tokens, waiting, free_bytes);
                    prop_assert_eq!(grant.open.is_none(), was_free);
                    if let Some((capacity, count)) = grant.open {
                        let bytes = u64::from(capacity) * u64::from(count) * BYTES;
                        prop_assert!(bytes <= free_bytes);
                        prop_assert!(open.insert(grant.slot.slab, bytes).is_none());
                    }
                    prop_assert!(slots.capacity_of(grant.slot) >= tokens);
                    held.insert(owner as u64, (grant.slot, tokens));
                }
                Act::Release(which) if !held.is_empty() => {
                    let owner = *held.keys().nth(which % held.len()).unwrap();
                    let (slot, _) = held.remove(&owner).unwrap();
                    if let Some((moved, from)) = slots.release(slot) {
                        let place = held.get_mut(&moved).unwrap();
                        prop_assert_eq!(place.0, from);
                        place.0 = slot;
                    }
                }
                Act::Release(_) => {}
                Act::Close => {
                    for slab in slots.close_empty() {
                        prop_assert!(held.values().all(|(slot, _)| slot.slab != slab));
                        prop_assert!(open.remove(&slab).is_some());
                    }
                }
            }
            prop_assert_eq!(slots.bytes(), open.values().sum::<u64>());
            let mut by_slab: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
            for (slot, _) in held.values() {
                by_slab.entry(slot.slab).or_default().push(slot.slot);
            }
            for places in by_slab.values_mut() {
                places.sort_unstable();
                prop_assert_eq!(&*places, &(0..places.len() as u32).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn the_longest_prefix_is_found_and_nothing_useful_is_dropped(
        caches in prop::collection::vec((0..2u8, prop::collection::vec(0..2u32, 1..12)), 1..20),
        wanted in prop::collection::vec(0..2u32, 1..12),
        evicted in 0..200u64,
    ) {
        let owner = |number: u8| Principal::from(if number == 0 { "a" } else { "b" });
        let common = |a: &[u32]| a.iter().zip(&wanted).take_while(|(a, b)| a == b).count() as u32;
        let best = |kept: &[(u8, Vec<u32>)]| {
            kept.iter().filter(|(owner, _)| *owner == 0).map(|(_, tokens)| common(tokens)).max().filter(|&n| n > 0)
        };
        let mut parked = Parked::new(BYTES, 0);
        for (id, (number, tokens)) in caches.iter().enumerate() {
            let used = Moment::at(Duration::from_secs(id as u64));
            let cache =
                CacheEntry { id: ParkedId(id as u64), owner: owner(*number), session: None, tokens: tokens.clone(), checkpoints: None, used };
            parked.insert(cache);
        }
        let now = Moment::at(Duration::from_secs(1000));
        prop_assert_eq!(parked.find(&owner(0), &wanted, 99, now).map(|hit| hit.tokens), best(&caches));
        let before = parked.bytes();
        parked.evict(evicted, None);
        prop_assert!(before - parked.bytes() >= evicted.min(before));
    }
}
