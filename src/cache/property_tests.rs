//! Slots and parked caches against models that are too simple to be wrong.

#![allow(clippy::cast_possible_truncation, reason = "the numbers here are small")]

use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;

use super::{CacheEntry, CacheKey, Parked, Rank, Salt, Slots, Transcript};
use crate::backend::{ParkedId, SlotId};
use crate::clock::Moment;
use crate::ids::Principal;
use crate::prompt::{MediaSpan, Prompt};

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
                    for slab in slots.close_empty(u64::MAX) {
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
        caches in prop::collection::vec((0..2u8, written()), 1..20),
        wanted in written(),
        evicted in 0..200u64,
    ) {
        let key = |number: u8| {
            let owner = Principal::from(if number == 0 { "a" } else { "b" });
            CacheKey { owner, salt: Salt::default() }
        };
        let best = caches.iter().filter(|(number, _)| *number == 0).map(|(_, cache)| restored(cache, &wanted));
        let best = best.max().filter(|&tokens| tokens > 0);
        let mut parked = Parked::new(BYTES, 0);
        for (id, (number, cache)) in (0..).zip(&caches) {
            parked.insert(CacheEntry {
                id: ParkedId(id),
                key: key(*number),
                session: None,
                rank: Rank::Anonymous,
                transcript: cache.transcript().first(cache.held() as usize),
                checkpoints: None,
                used: Moment::at(Duration::from_secs(id)),
            }, None);
        }
        let now = Moment::at(Duration::from_secs(1000));
        let found = parked.find(&key(0), &wanted.transcript(), 99, now).map(|hit| hit.tokens);
        prop_assert_eq!(found, best);
        let before = parked.bytes();
        parked.evict(evicted, None);
        prop_assert!(before - parked.bytes() >= evicted.min(before));
    }
}

/// A parked cache, as a list of them has it.
#[derive(Clone, Debug)]
struct Listed {
    id: u64,
    tokens: Vec<u32>,
    checkpoints: Option<Vec<u32>>,
}

impl Listed {
    fn begins(&self, tokens: &[u32]) -> usize {
        self.tokens.iter().zip(tokens).take_while(|(a, b)| a == b).count()
    }

    fn restores(&self, tokens: &[u32]) -> u32 {
        let common = self.begins(tokens) as u32;
        match &self.checkpoints {
            None => common,
            Some(saved) => saved.iter().copied().filter(|&saved| saved <= common).max().unwrap_or(0),
        }
    }

    fn covers(&self, other: &Self) -> bool {
        let last = other.checkpoints.iter().flatten().next_back();
        let saved = last.is_none_or(|last| self.checkpoints.iter().flatten().any(|saved| saved == last));
        self.tokens.starts_with(&other.tokens) && saved
    }
}

/// Tokens of an alphabet of two, so that many begin alike, and the lengths at which a cache is saved.
fn listed() -> impl Strategy<Value = (Vec<u32>, Vec<u32>)> {
    (prop::collection::vec(0..2u32, 1..9), prop::collection::btree_set(1..9u32, 0..3)).prop_map(
        |(tokens, saved)| {
            let end = tokens.len() as u32;
            let saved = saved.into_iter().filter(|&saved| saved < end).chain([end]).collect();
            (tokens, saved)
        },
    )
}

proptest! {
    #[test]
    fn the_ordered_caches_do_what_a_list_of_them_would(
        caches in prop::collection::vec(listed(), 1..40),
        wanted in prop::collection::vec(0..2u32, 1..12),
        recurrent in any::<bool>(),
    ) {
        let key = CacheKey { owner: Principal::from("a"), salt: Salt::default() };
        let of = |tokens: &[u32]| Transcript::new(tokens.to_vec().into());
        let (mut parked, mut list) = (Parked::new(BYTES, 1), Vec::<Listed>::new());
        for (id, (tokens, saved)) in (0..).zip(caches) {
            let new = Listed { id, tokens, checkpoints: recurrent.then_some(saved) };
            let (length, saved) = (new.tokens.len() as u32, new.checkpoints.as_deref());
            let covered = list.iter().any(|cache| cache.covers(&new));
            prop_assert_eq!(parked.covers(&key, &of(&new.tokens), length, saved), covered);
            let mut gone = parked.insert(CacheEntry {
                id: ParkedId(id),
                key: key.clone(),
                session: None,
                rank: Rank::Anonymous,
                transcript: of(&new.tokens),
                checkpoints: new.checkpoints.clone(),
                used: Moment::at(Duration::from_secs(id)),
            }, None);
            gone.sort_unstable();
            let redundant = list.iter().filter(|cache| new.covers(cache)).map(|cache| ParkedId(cache.id));
            prop_assert_eq!(gone, redundant.collect::<Vec<_>>());
            list.retain(|cache| !new.covers(cache));
            list.push(new);
            let bytes = |cache: &Listed| {
                cache.tokens.len() as u64 * BYTES + cache.checkpoints.as_ref().map_or(0, Vec::len) as u64
            };
            prop_assert_eq!(parked.bytes(), list.iter().map(bytes).sum::<u64>());
            let best = list.iter().map(|cache| cache.restores(&wanted)).max().unwrap_or(0);
            prop_assert_eq!(parked.longest(&key, &of(&wanted), 99), best);
        }
    }
}

/// A token, and its place in an image of some length and hash.
type Cell = (u32, Option<(u32, u32, u8)>);

/// A sequence of text and images, of which the last tokens may not be computed.
#[derive(Clone, Debug)]
struct Written {
    parts: Vec<Part>,
    generated: Vec<u32>,
    missing: u32,
}

#[derive(Clone, Debug)]
enum Part {
    Text(u32),
    Image { len: u32, hash: u8 },
}

fn written() -> impl Strategy<Value = Written> {
    let image = (1..4u32, 0..2u8).prop_map(|(len, hash)| Part::Image { len, hash });
    let parts = prop::collection::vec(prop_oneof![4 => (0..2u32).prop_map(Part::Text), 1 => image], 1..8);
    let generated = prop::collection::vec(0..2u32, 0..5);
    (parts, generated, 0..3u32).prop_map(|(parts, generated, missing)| Written { parts, generated, missing })
}

impl Written {
    /// Images are written as tokens 1, so that text may look like them.
    fn transcript(&self) -> Transcript {
        let (mut tokens, mut media) = (Vec::new(), Vec::new());
        for part in &self.parts {
            match *part {
                Part::Text(token) => tokens.push(token),
                Part::Image { len, hash } => {
                    media.push(MediaSpan { at: tokens.len() as u32, len, hash: [hash; 32] });
                    tokens.extend((0..len).map(|_| 1));
                }
            }
        }
        let mut transcript = Transcript::new(Prompt { tokens: tokens.into(), media: media.into() });
        self.generated.iter().for_each(|&token| transcript.push(token));
        transcript
    }

    fn held(&self) -> u32 {
        (self.cells().len() as u32).saturating_sub(self.missing).max(1)
    }

    /// What stands in each place: a token, or a place of an image.
    fn cells(&self) -> Vec<Cell> {
        let mut cells = Vec::new();
        for part in &self.parts {
            match *part {
                Part::Text(token) => cells.push((token, None)),
                Part::Image { len, hash } => {
                    cells.extend((0..len).map(|place| (1, Some((place, len, hash)))));
                }
            }
        }
        cells.extend(self.generated.iter().map(|&token| (token, None)));
        cells
    }
}

/// The longest prefix that a cache can restore, found by trying all.
fn restored(cache: &Written, wanted: &Written) -> u32 {
    let (held, wanted) = (cache.cells(), wanted.cells());
    let most = (cache.held() as usize).min(wanted.len());
    let ends_whole = |&end: &usize| match wanted[..end].last() {
        Some((_, Some((place, len, _)))) => place + 1 == *len,
        Some((_, None)) | None => true,
    };
    (0..=most).rev().filter(ends_whole).find(|&end| held[..end] == wanted[..end]).unwrap_or(0) as u32
}
