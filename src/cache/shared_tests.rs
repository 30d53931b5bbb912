//! What parked caches share: as a device would hold it, with the tokens themselves as content, and against a
//! list of what each cache holds.

#![allow(clippy::cast_possible_truncation, reason = "the numbers here are small")]

use std::collections::BTreeSet;
use std::time::Duration;

use proptest::prelude::*;

use super::{CacheEntry, CacheKey, Cut, Parked, Rank, SEGMENTS_MAX, Salt, Transcript};
use crate::backend::{Chains, NewChain, ParkedId};
use crate::clock::Moment;
use crate::ids::Principal;

const TOKEN_BYTES: u64 = 10;
const STATE_BYTES: u64 = 7;

/// The parked caches of an engine, and its device's.
struct World {
    parked: Parked,
    device: Chains<Vec<u32>, ()>,
    now: u64,
    recurrent: bool,
    /// Number of cuts within a segment; every third fails.
    splits: u32,
}

/// A cache that was parked: its number, tokens and checkpoints.
type Left = (ParkedId, Vec<u32>, Vec<u32>);

impl World {
    fn new(recurrent: bool) -> Self {
        let parked = Parked::new(TOKEN_BYTES, STATE_BYTES);
        Self { parked, device: Chains::default(), now: 0, recurrent, splits: 0 }
    }

    fn entry(&mut self, tokens: &[u32], checkpoints: &[u32]) -> CacheEntry {
        self.now += 1;
        CacheEntry {
            id: self.parked.number(),
            key: CacheKey { owner: Principal::from("a"), salt: Salt::default() },
            session: None,
            rank: Rank::Anonymous,
            transcript: Transcript::new(tokens.to_vec().into()),
            checkpoints: self.recurrent.then(|| checkpoints.to_vec()),
            used: Moment::at(Duration::from_secs(self.now)),
        }
    }

    /// Parks as the engine does; returns what was dropped for it, and whether it was parked.
    fn park(&mut self, tokens: &[u32], checkpoints: &[u32]) -> (Vec<ParkedId>, Option<ParkedId>) {
        let entry = self.entry(tokens, checkpoints);
        let (id, length) = (entry.id, tokens.len() as u32);
        if self.parked.covers(&entry.key, &entry.transcript, length, entry.checkpoints.as_deref()) {
            return (vec![], None);
        }
        let mut cut = self.parked.cut(&entry, true);
        if let Some(Cut { base, copied_tokens: 1.. }) = cut {
            self.splits += 1;
            if self.splits.is_multiple_of(3) {
                // The device has no memory for it: whole segments are shared.
                let held = (self.device.held(), self.device.segments());
                assert_eq!(self.device.split(base, |_, _| Err("no memory")), Err("no memory"));
                assert_eq!((self.device.held(), self.device.segments()), held);
                cut = self.parked.cut(&entry, false);
            } else {
                let halves = |content: &Vec<u32>, at| {
                    let (front, back) = content.split_at(at as usize);
                    Ok::<_, ()>((front.to_vec(), back.to_vec()))
                };
                self.device.split(base, halves).unwrap();
                self.parked.split(base);
            }
        }
        let base = cut.map(|cut| cut.base);
        let before = self.parked.bytes();
        let added = self.parked.bytes_added(&entry, base);
        let tail = tokens[base.map_or(0, |base| base.tokens) as usize..].to_vec();
        let lengths = entry.checkpoints.iter().flatten().map(|&length| (length, ()));
        self.device.add(id, NewChain { base, tokens: length, tail, states: lengths.collect() });
        let held = self.device.held();
        assert_eq!(before + added, held.tokens * TOKEN_BYTES + held.states * STATE_BYTES);
        let gone = self.parked.insert(entry, base);
        self.drop(&gone);
        (gone, Some(id))
    }

    fn drop(&mut self, gone: &[ParkedId]) {
        gone.iter().for_each(|id| self.device.remove(*id));
    }

    /// Checks what is held against a list of what each cache has.
    fn check(&self, left: &[Left]) {
        let held = self.device.held();
        assert_eq!(self.parked.bytes(), held.tokens * TOKEN_BYTES + held.states * STATE_BYTES);
        let mut segments = BTreeSet::new();
        for (id, tokens, checkpoints) in left {
            let parts: Vec<_> = self.device.content(*id, tokens.len() as u32).collect();
            assert!(parts.len() <= SEGMENTS_MAX, "a chain is short");
            let content: Vec<u32> = parts.iter().flat_map(|(_, content)| (*content).clone()).collect();
            assert_eq!(content, *tokens, "a cache has its tokens");
            let saved: Vec<u32> = self.device.states(*id).map(|(length, ())| length).collect();
            assert_eq!(saved, if self.recurrent { checkpoints.clone() } else { vec![] });
            segments.extend(parts.iter().map(|(range, content)| (content.as_ptr(), range.end - range.start)));
        }
        assert_eq!(segments.len(), self.device.segments(), "nothing is held that nobody has");
        let tokens: u64 = segments.iter().map(|(_, tokens)| u64::from(*tokens)).sum();
        assert_eq!(held.tokens, tokens, "each segment is charged once");
        // The states of one prefix are one, whoever saved them.
        let states: BTreeSet<&[u32]> = left
            .iter()
            .flat_map(|(_, tokens, saved)| saved.iter().map(|&length| &tokens[..length as usize]))
            .collect();
        assert!(!self.recurrent || held.states >= states.len() as u64);
    }
}

#[derive(Clone, Debug)]
enum Act {
    /// Parks the first tokens of a cache, and new ones.
    Park {
        from: usize,
        keeps: usize,
        new: Vec<u32>,
        saved: usize,
    },
    Evict(u64),
    Keep(u32),
}

fn act() -> impl Strategy<Value = Act> {
    let park = (any::<usize>(), prop_oneof![2 => Just(usize::MAX), 1 => any::<usize>()]);
    let park = (park, prop::collection::vec(0..2u32, 0..120), any::<usize>());
    prop_oneof![
        12 => park.prop_map(|((from, keeps), new, saved)| Act::Park { from, keeps, new, saved }),
        1 => (0..3000u64).prop_map(Act::Evict),
        1 => (1..9u32).prop_map(Act::Keep),
    ]
}

proptest! {
    #[test]
    fn what_caches_share_is_held_once_and_freed_with_the_last_of_them(
        recurrent in any::<bool>(),
        acts in prop::collection::vec(act(), 1..60),
    ) {
        let mut world = World::new(recurrent);
        let mut left: Vec<Left> = vec![];
        for act in acts {
            match act {
                Act::Park { from, keeps, new, saved } => {
                    let old = if left.is_empty() { &[][..] } else { &left[from % left.len()].1 };
                    let kept = if keeps == usize::MAX { old.len() } else { keeps % (old.len() + 1) };
                    let tokens = [&old[..kept], &new].concat();
                    if tokens.is_empty() {
                        continue;
                    }
                    let end = tokens.len() as u32;
                    let middle = (saved % tokens.len()) as u32;
                    let checkpoints: Vec<u32> = [middle, end].into_iter().filter(|&at| at > 0).collect();
                    let (gone, parked) = world.park(&tokens, &checkpoints);
                    left.retain(|(id, ..)| !gone.contains(id));
                    left.extend(parked.map(|id| (id, tokens, checkpoints)));
                }
                Act::Evict(bytes) => {
                    let before = world.parked.bytes();
                    let gone = world.parked.evict(bytes, None);
                    world.drop(&gone);
                    prop_assert!(before - world.parked.bytes() >= bytes.min(before));
                    left.retain(|(id, ..)| !gone.contains(id));
                }
                Act::Keep(most) => {
                    let was = left.len();
                    let gone: Vec<ParkedId> = world.parked.keep(most).iter().map(|entry| entry.id).collect();
                    world.drop(&gone);
                    left.retain(|(id, ..)| !gone.contains(id));
                    prop_assert!(left.len() <= most as usize);
                    prop_assert!(world.device.segments() <= SEGMENTS_MAX.max(2 * most as usize));
                    prop_assert!(most == 0 || was == 0 || !left.is_empty(), "one always may stay");
                }
            }
            prop_assert_eq!(world.device.len(), left.len());
            world.check(&left);
        }
    }
}

/// Returns the tokens of a sequence of its own.
fn tokens(seed: u32, count: u32) -> Vec<u32> {
    (0..count).map(|place| (seed * 7919 + place * 31 + 1) % 50_000).collect()
}

#[test]
fn eight_forks_of_a_thousand_tokens_share_them() {
    let mut world = World::new(false);
    // Those that part at the end of what is parked, and those that part within it.
    for length in [1000, 1200] {
        let first = tokens(0, length);
        world.park(&first, &[]);
        for seed in 1..9 {
            world.park(&[&first[..1000], &tokens(seed, 50)].concat(), &[]);
        }
    }
    assert_eq!(world.parked.bytes(), (1000 + 200 + 8 * 50) * TOKEN_BYTES);
}

#[test]
fn a_conversation_of_many_turns_has_few_segments_and_copies_each_token_few_times() {
    let mut world = World::new(false);
    let (mut conversation, mut copied) = (tokens(0, 1000), 0);
    world.park(&conversation, &[]);
    for turn in 1..=300 {
        conversation.extend(tokens(turn, 40));
        let entry = world.entry(&conversation, &[]);
        let shared = world.parked.cut(&entry, true).map_or(0, |cut| cut.base.tokens);
        copied += conversation.len() as u32 - shared;
        world.park(&conversation, &[]);
        assert!(world.device.segments() <= 10, "{} segments", world.device.segments());
    }
    assert!(copied < 10 * 300 * 40, "{copied} tokens were copied");
}

#[test]
fn a_cache_that_all_others_begin_with_frees_little_and_they_stay() {
    let mut world = World::new(true);
    let first = tokens(0, 100);
    world.park(&first, &[100]);
    let forks: Vec<_> = (1..4)
        .map(|seed| {
            let tokens = [&first[..], &tokens(seed, 10)].concat();
            world.park(&tokens, &[110]).1.unwrap()
        })
        .collect();
    let bytes = world.parked.bytes();
    assert_eq!(bytes, 130 * TOKEN_BYTES + 4 * STATE_BYTES);
    assert_eq!(world.parked.evict(1, None), [ParkedId(0)]);
    assert_eq!(bytes - world.parked.bytes(), STATE_BYTES, "its tokens are theirs too");
    assert_eq!(world.parked.evict(10 * TOKEN_BYTES, None), forks[..1], "and then the end of one of them");
}

#[test]
fn a_segment_is_cut_for_at_least_an_eighth_of_it() {
    for (shared, is_cut) in [(32, false), (999, false), (1000, true)] {
        let mut world = World::new(false);
        let first = tokens(0, 8000);
        world.park(&first, &[]);
        world.park(&[&first[..shared], &tokens(1, 50)].concat(), &[]);
        let held = if is_cut { 8050 } else { 8050 + shared as u64 };
        assert_eq!(world.parked.bytes(), held * TOKEN_BYTES, "{shared}");
    }
}
