//! Parked caches in the order of a dictionary: those that begin alike stand together, and farther ones have
//! less in common with a transcript. Beside each is how much it has in common with the one before it, so that
//! a search compares tokens only on the way to a place, and reads numbers from there.

use std::cmp::Ordering;
use std::ops::Index as At;

use super::Transcript;
use super::entry::{CacheEntry, CacheKey};
use crate::count::count;

/// The caches of one model.
#[derive(Clone, Debug, Default)]
pub(super) struct Index {
    /// Ordered by key, then by transcript.
    entries: Vec<CacheEntry>,
    /// The number of tokens that each begins with in common with the one before it; 0 if that is of another
    /// key.
    common: Vec<u32>,
}

impl At<usize> for Index {
    type Output = CacheEntry;

    fn index(&self, place: usize) -> &CacheEntry {
        &self.entries[place]
    }
}

impl Index {
    /// Returns them all, in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &CacheEntry> {
        self.entries.iter()
    }

    /// Returns a cache to note its use; what its place depends on stays.
    pub(super) fn get_mut(&mut self, place: usize) -> &mut CacheEntry {
        &mut self.entries[place]
    }

    /// Changes some caches; what their places depend on stays.
    pub(super) fn change(&mut self, which: impl Fn(&CacheEntry) -> bool, change: impl Fn(&mut CacheEntry)) {
        self.entries.iter_mut().filter(|entry| which(entry)).for_each(change);
    }

    /// Returns the number of caches from the front for which `is_before` holds of their order to the first
    /// `count` tokens of a transcript.
    pub(super) fn rank(
        &self,
        key: &CacheKey,
        (transcript, count): (&Transcript, usize),
        is_before: fn(Ordering) -> bool,
    ) -> usize {
        self.entries.partition_point(|entry| {
            is_before(entry.key.cmp(key).then_with(|| entry.transcript.compare(transcript, count)))
        })
    }

    /// Returns the caches before the place of a transcript, nearest first, and how many tokens each has in
    /// common with it; as long as that is any.
    pub(super) fn before(
        &self,
        key: &CacheKey,
        transcript: &Transcript,
        place: usize,
    ) -> impl Iterator<Item = (usize, u32)> {
        let mut nearer = None;
        (0..place).rev().map_while(move |place| {
            let common = match nearer {
                None => self.common_with(place, key, transcript),
                Some(nearer) => self.common[place + 1].min(nearer),
            };
            nearer = Some(common);
            (common > 0).then_some((place, common))
        })
    }

    /// Returns those from the place of a transcript on, in the same way.
    pub(super) fn after(
        &self,
        key: &CacheKey,
        transcript: &Transcript,
        place: usize,
    ) -> impl Iterator<Item = (usize, u32)> {
        let mut nearer = None;
        (place..self.entries.len()).map_while(move |place| {
            let common = match nearer {
                None => self.common_with(place, key, transcript),
                Some(nearer) => self.common[place].min(nearer),
            };
            nearer = Some(common);
            (common > 0).then_some((place, common))
        })
    }

    fn common_with(&self, place: usize, key: &CacheKey, transcript: &Transcript) -> u32 {
        let entry = &self.entries[place];
        if entry.key == *key { count(entry.transcript.common_prefix(transcript)) } else { 0 }
    }

    /// Adds a cache in its place.
    pub(super) fn insert(&mut self, place: usize, cache: CacheEntry) {
        let CacheEntry { key, transcript, .. } = &cache;
        let before = place.checked_sub(1).map_or(0, |before| self.common_with(before, key, transcript));
        if place < self.entries.len() {
            self.common[place] = self.common_with(place, key, transcript);
        }
        self.common.insert(place, before);
        self.entries.insert(place, cache);
    }

    /// Removes a cache.
    pub(super) fn remove(&mut self, place: usize) -> CacheEntry {
        let common = self.common.remove(place);
        if let Some(next) = self.common.get_mut(place) {
            *next = common.min(*next);
        }
        self.entries.remove(place)
    }

    /// Removes the caches that are `gone`, and returns them.
    pub(super) fn remove_if(&mut self, gone: impl Fn(&CacheEntry) -> bool) -> Vec<CacheEntry> {
        let all = std::mem::take(self);
        let (mut removed, mut across) = (Vec::new(), u32::MAX);
        for (entry, common) in all.entries.into_iter().zip(all.common) {
            across = common.min(across);
            if gone(&entry) {
                removed.push(entry);
                continue;
            }
            self.entries.push(entry);
            self.common.push(across);
            across = u32::MAX;
        }
        removed
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::backend::ParkedId;
    use crate::cache::entry::{Rank, Salt};
    use crate::clock::Moment;

    fn entry(id: u64, salt: u8, tokens: Vec<u32>) -> CacheEntry {
        CacheEntry {
            id: ParkedId(id),
            key: CacheKey { owner: "a".into(), salt: Salt([salt; 32]) },
            session: None,
            transcript: Transcript::new(tokens.into()),
            checkpoints: None,
            used: Moment::at(Duration::ZERO),
            rank: Rank::Anonymous,
        }
    }

    fn add(index: &mut Index, cache: CacheEntry) {
        let place = index.rank(&cache.key, (&cache.transcript, usize::MAX), Ordering::is_le);
        index.insert(place, cache);
    }

    #[derive(Clone, Debug)]
    enum Act {
        Add(u8, Vec<u32>),
        Remove(usize),
        RemoveOdd(u64),
    }

    fn act() -> impl Strategy<Value = Act> {
        prop_oneof![
            6 => (0..2u8, prop::collection::vec(0..2u32, 1..10)).prop_map(|(salt, tokens)| Act::Add(salt, tokens)),
            2 => any::<usize>().prop_map(Act::Remove),
            1 => (2..4u64).prop_map(Act::RemoveOdd),
        ]
    }

    proptest! {
        #[test]
        fn neighbours_have_in_common_what_their_tokens_say(
            acts in prop::collection::vec(act(), 1..60),
            wanted in prop::collection::vec(0..2u32, 1..12),
        ) {
            let mut index = Index::default();
            for (id, act) in (0..).zip(acts) {
                match act {
                    Act::Add(salt, tokens) => add(&mut index, entry(id, salt, tokens)),
                    Act::Remove(which) if !index.entries.is_empty() => {
                        index.remove(which % index.entries.len());
                    }
                    Act::Remove(_) => {}
                    Act::RemoveOdd(of) => {
                        let removed = index.remove_if(|entry| entry.id.0 % of == 1);
                        prop_assert!(removed.iter().all(|entry| entry.id.0 % of == 1));
                    }
                }
            }
            let CacheEntry { key, transcript, .. } = entry(0, 1, wanted);
            let place = index.rank(&key, (&transcript, usize::MAX), Ordering::is_le);
            let naive = |places: &mut dyn Iterator<Item = usize>| -> Vec<(usize, u32)> {
                places
                    .map(|place| (place, index.common_with(place, &key, &transcript)))
                    .take_while(|(_, common)| *common > 0)
                    .collect()
            };
            let before: Vec<_> = index.before(&key, &transcript, place).collect();
            prop_assert_eq!(before, naive(&mut (0..place).rev()));
            let after: Vec<_> = index.after(&key, &transcript, place).collect();
            prop_assert_eq!(after, naive(&mut (place..index.entries.len())));
        }
    }
}
