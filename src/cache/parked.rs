//! Parked KV caches: what sequences left behind, found again by key and transcript. A cache may serve any
//! request of the same key that begins with the same tokens and media: a session's next turn, a fork of it,
//! or a client that sends the whole conversation each time. Caches that begin alike share the bytes of it
//! (`shared`). Those of a lesser rank are evicted first, of each rank the least recently used.
//!
//! They are kept in the order of a dictionary (`index`), in which the longest common beginnings with a
//! transcript stand beside its own place: a search compares it with some fifteen caches of ten thousand.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

use super::Transcript;
use super::entry::{CacheEntry, CacheKey, Rank};
use super::index::Index;
use super::shared::{Cut, SEGMENTS_MAX, Shared};
use crate::backend::{Base, ParkedId};
use crate::clock::Moment;
use crate::ids::SessionKey;

/// A parked cache that begins with wanted tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hit {
    /// The cache.
    pub id: ParkedId,
    /// Number of the wanted tokens that it can restore.
    pub tokens: u32,
}

/// The parked caches of one model.
#[derive(Clone, Debug)]
pub struct Parked {
    entries: Index,
    shared: Shared,
    id_next: u64,
}

impl Parked {
    /// Returns a model's caches: none yet.
    #[must_use]
    pub fn new(bytes_per_token: u64, state_bytes: u64) -> Self {
        Self { entries: Index::default(), shared: Shared::new(bytes_per_token, state_bytes), id_next: 0 }
    }

    /// Returns the number of a new cache.
    pub fn number(&mut self) -> ParkedId {
        let id = ParkedId(self.id_next);
        self.id_next += 1;
        id
    }

    /// Returns the bytes of them all; what several share is counted once.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.shared.bytes()
    }

    /// Returns the same, counted part by part.
    #[must_use]
    pub fn recounted_bytes(&self) -> u64 {
        self.shared.recounted_bytes()
    }

    /// Returns the bytes that a cache adds, given what it shares.
    #[must_use]
    pub fn bytes_added(&self, cache: &CacheEntry, base: Option<Base>) -> u64 {
        self.shared.bytes_added(base, cache.tokens(), cache.lengths())
    }

    /// Returns what a cache is to share with the one that has most of its tokens; only whole segments unless
    /// one may be cut in two for it.
    #[must_use]
    pub fn cut(&self, cache: &CacheEntry, may_split: bool) -> Option<Cut> {
        let (nearest, common) = self.nearest(cache)?;
        let nearest = &self.entries[nearest];
        let replaces = nearest.tokens() <= common && cache.saves(nearest.checkpoints.as_deref());
        let within = may_split.then(|| self.shared.cut_within(nearest.id, common)).flatten();
        within.or_else(|| self.shared.cut(nearest.id, common, cache.tokens(), replaces))
    }

    /// Returns what a cache whose content comes in parts is to share, given where they start: it begins with
    /// one of them.
    #[must_use]
    pub fn cut_at(&self, cache: &CacheEntry, starts: &[u32]) -> Option<Cut> {
        let (nearest, common) = self.nearest(cache)?;
        self.shared.cut_at(self.entries[nearest].id, common, starts)
    }

    /// Returns the place of the cache that begins with most of another one's tokens, and how many.
    fn nearest(&self, cache: &CacheEntry) -> Option<(usize, u32)> {
        let CacheEntry { key, transcript, .. } = cache;
        // The longest common beginnings stand beside its place.
        let place = self.entries.rank(key, (transcript, usize::MAX), Ordering::is_le);
        let before = self.entries.before(key, transcript, place).next();
        let beside = before.into_iter().chain(self.entries.after(key, transcript, place).next());
        beside.max_by_key(|(_, common)| *common)
    }

    /// Returns whether a segment may be cut in two there: chains stay short.
    #[must_use]
    pub fn may_split(&self, at: Base) -> bool {
        self.shared.may_split(at)
    }

    /// Notes that a segment was cut in two.
    pub fn split(&mut self, at: Base) {
        self.shared.split(at);
    }

    /// Returns whether there is such a cache.
    #[must_use]
    pub fn holds(&self, id: ParkedId) -> bool {
        self.shared.holds(id)
    }

    /// Returns the place in the order of eviction of the one that goes first.
    #[must_use]
    pub fn first_to_go(&self) -> Option<(Rank, Moment)> {
        self.entries.iter().map(|entry| (entry.rank, entry.used)).min()
    }

    /// Gives the caches of a session another rank.
    pub fn set_rank(&mut self, session: &SessionKey, rank: Rank) {
        let is_own = |entry: &CacheEntry| entry.session.as_ref() == Some(session);
        self.entries.change(is_own, |entry| entry.rank = rank);
    }

    /// Returns the place of the cache that restores most of the first `most` tokens, and how many.
    fn best(&self, key: &CacheKey, transcript: &Transcript, most: u32) -> Option<(usize, u32)> {
        let place = self.entries.rank(key, (transcript, usize::MAX), Ordering::is_le);
        let mut best: Option<(usize, u32)> = None;
        // Farther caches have less in common.
        let mut may_be_followed = |&(place, common): &(usize, u32)| {
            let common = common.min(most);
            let usable = self.entries[place].usable(transcript, common);
            if usable > best.map_or(0, |(_, usable)| usable) {
                best = Some((place, usable));
            }
            common > best.map_or(0, |(_, usable)| usable)
        };
        self.entries.before(key, transcript, place).take_while(&mut may_be_followed).for_each(drop);
        self.entries.after(key, transcript, place).take_while(&mut may_be_followed).for_each(drop);
        best
    }

    /// Returns the cache of `key` that restores most of the first `most` tokens, and notes that it was used.
    pub fn find(&mut self, key: &CacheKey, transcript: &Transcript, most: u32, now: Moment) -> Option<Hit> {
        let (place, tokens) = self.best(key, transcript, most)?;
        let entry = self.entries.get_mut(place);
        entry.used = now;
        Some(Hit { id: entry.id, tokens })
    }

    /// Returns the number of the first `most` tokens that the best cache of `key` restores.
    #[must_use]
    pub fn longest(&self, key: &CacheKey, transcript: &Transcript, most: u32) -> u32 {
        self.best(key, transcript, most).map_or(0, |(_, tokens)| tokens)
    }

    /// Returns the cache of `key` that restores most of a transcript.
    #[must_use]
    pub fn best_of(&self, key: &CacheKey, transcript: &Transcript) -> Option<&CacheEntry> {
        self.best(key, transcript, u32::MAX).map(|(place, _)| &self.entries[place])
    }

    /// Returns the caches of sessions, those that are evicted last first.
    #[must_use]
    pub fn of_sessions(&self) -> Vec<&CacheEntry> {
        let mut entries: Vec<_> = self.entries.iter().filter(|entry| entry.session.is_some()).collect();
        entries.sort_by_key(|entry| Reverse((entry.rank, entry.used, entry.id)));
        entries
    }

    /// Returns the bytes of a cache, shared or not.
    #[must_use]
    pub fn bytes_of(&self, cache: &CacheEntry) -> u64 {
        self.shared.bytes_of_parts(cache.tokens(), cache.lengths())
    }

    /// Returns the lengths up to `tokens` to which a cache can be cut back.
    #[must_use]
    pub fn checkpoints_up_to(&self, id: ParkedId, tokens: u32) -> Vec<u32> {
        let entry = self.entries.iter().find(|entry| entry.id == id);
        let checkpoints = entry.and_then(|entry| entry.checkpoints.as_deref()).unwrap_or_default();
        checkpoints.iter().copied().filter(|&checkpoint| checkpoint <= tokens).collect()
    }

    /// Returns whether parking the first `tokens`, which can be cut back to `checkpoints`, would add nothing.
    #[must_use]
    pub fn covers(
        &self,
        key: &CacheKey,
        transcript: &Transcript,
        tokens: u32,
        checkpoints: Option<&[u32]>,
    ) -> bool {
        // Those that begin with these tokens stand together.
        let first = self.entries.rank(key, (transcript, tokens as usize), Ordering::is_lt);
        let mut longer =
            self.entries.after(key, transcript, first).take_while(|(_, common)| *common >= tokens);
        longer.any(|(place, _)| self.entries[place].saves(checkpoints))
    }

    /// Removes the caches that `cache` makes redundant because it restores all that they do; they stand
    /// before its `place`, and it takes over their rank.
    fn supersede(&mut self, cache: &mut CacheEntry, place: usize) -> Vec<ParkedId> {
        let CacheEntry { key, transcript, .. } = &*cache;
        let is_redundant = |&(place, common): &(usize, u32)| {
            let entry = &self.entries[place];
            entry.tokens() <= common && cache.saves(entry.checkpoints.as_deref())
        };
        let redundant: Vec<_> = self.entries.before(key, transcript, place).filter(is_redundant).collect();
        let ranks = redundant.iter().map(|(place, _)| self.entries[*place].rank);
        cache.rank = ranks.fold(cache.rank, Rank::max);
        // From the last one on, so that the others keep their places.
        redundant.into_iter().map(|(place, _)| self.take(place)).collect()
    }

    /// Adds a cache that shares a base; returns those that it makes redundant because it restores all that
    /// they do.
    pub fn insert(&mut self, cache: CacheEntry, base: Option<Base>) -> Vec<ParkedId> {
        self.shared.add(cache.id, base, cache.tokens(), cache.lengths());
        self.enter(cache)
    }

    /// Adds a cache that was read from a snapshot: of several segments after its base, with these ends.
    /// Returns the same as [`Self::insert`].
    pub fn insert_parts(&mut self, cache: CacheEntry, base: Option<Base>, ends: &[u32]) -> Vec<ParkedId> {
        self.shared.add_parts(cache.id, base, ends, cache.lengths());
        self.enter(cache)
    }

    /// Adds a cache to the order in which they are searched; returns those that it makes redundant.
    fn enter(&mut self, mut cache: CacheEntry) -> Vec<ParkedId> {
        let place = self.entries.rank(&cache.key, (&cache.transcript, usize::MAX), Ordering::is_le);
        let redundant = self.supersede(&mut cache, place);
        self.entries.insert(place - redundant.len(), cache);
        redundant
    }

    /// Removes caches in the order of eviction until `bytes` are freed or none is left, sparing `spared`.
    /// Each frees what no other has.
    pub fn evict(&mut self, bytes: u64, spared: Option<ParkedId>) -> Vec<ParkedId> {
        let most = self.bytes().saturating_sub(bytes);
        ids(&self.evict_while(spared, |left| left.bytes() > most))
    }

    /// Removes caches in the order of eviction until at most `bytes_max` are held, and returns them.
    pub fn keep_bytes(&mut self, bytes_max: u64) -> Vec<CacheEntry> {
        self.evict_while(None, |left| left.bytes() > bytes_max)
    }

    /// Removes caches in the order of eviction until at most `most` are left, of at most twice as many
    /// segments; one of all its segments may stay in any case. Returns them.
    pub fn keep(&mut self, most: u32) -> Vec<CacheEntry> {
        let most = most as usize;
        let segments_max = SEGMENTS_MAX.max(2 * most);
        self.evict_while(None, |left| left.caches() > most || left.segments() > segments_max)
    }

    /// Removes caches in the order of eviction as long as those that are left are too many.
    fn evict_while(
        &mut self,
        spared: Option<ParkedId>,
        are_too_many: impl Fn(&Shared) -> bool,
    ) -> Vec<CacheEntry> {
        if !are_too_many(&self.shared) {
            return Vec::new();
        }
        let order = |entry: &CacheEntry| (entry.rank, entry.used, entry.id);
        let others = self.entries.iter().filter(|entry| Some(entry.id) != spared);
        // A heap: mostly few are evicted of many.
        let mut in_order: BinaryHeap<_> = others.map(|entry| Reverse(order(entry))).collect();
        let in_order = std::iter::from_fn(|| in_order.pop().map(|Reverse(first)| first));
        let evicted = in_order.take_while(|(_, _, id)| {
            let more = are_too_many(&self.shared);
            if more {
                self.shared.remove(*id);
            }
            more
        });
        let Some(last) = evicted.last() else { return Vec::new() };
        self.remove_if(|entry| Some(entry.id) != spared && order(entry) <= last)
    }

    /// Removes the caches of a session that is gone.
    pub fn forget(&mut self, session: &SessionKey) -> Vec<ParkedId> {
        ids(&self.remove_if(|entry| entry.session.as_ref() == Some(session)))
    }

    /// Removes the caches of a key.
    pub fn forget_key(&mut self, key: &CacheKey) -> Vec<ParkedId> {
        ids(&self.remove_if(|entry| entry.key == *key))
    }

    fn remove_if(&mut self, gone: impl Fn(&CacheEntry) -> bool) -> Vec<CacheEntry> {
        let removed = self.entries.remove_if(gone);
        removed.iter().for_each(|entry| self.shared.remove(entry.id));
        removed
    }

    fn take(&mut self, place: usize) -> ParkedId {
        let id = self.entries.remove(place).id;
        self.shared.remove(id);
        id
    }
}

fn ids(entries: &[CacheEntry]) -> Vec<ParkedId> {
    entries.iter().map(|entry| entry.id).collect()
}

#[cfg(test)]
#[path = "parked_tests.rs"]
mod tests;
