//! Parked KV caches: what sequences left behind, found again by key and transcript. A cache may serve any
//! request of the same key that begins with the same tokens and media: a session's next turn, a fork of it,
//! or a client that sends the whole conversation each time. Caches that begin alike share the bytes of it
//! (`shared`). The least recently used are evicted first.
//!
//! They are kept in the order of a dictionary, in which the longest common beginnings with a transcript stand
//! beside its own place: a search compares it with some ten caches of a thousand.

use std::cmp::Ordering;

use super::Transcript;
use super::shared::{Cut, Shared};
use crate::backend::{Base, ParkedId};
use crate::clock::Moment;
use crate::count::count;
use crate::ids::{Principal, SessionKey};

/// What shapes or separates KV caches besides owner, tokens and media, such as a tenant or an adapter: a hash
/// wide enough that nobody finds two inputs with the same. Zeros are none of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Salt(pub [u8; 32]);

impl Salt {
    /// Returns the salt of one sequence's own caches. Nobody finds an input that hashes to it.
    #[must_use]
    pub fn private(number: u64) -> Self {
        let mut bytes = [0xff; 32];
        bytes[24..].copy_from_slice(&number.to_be_bytes());
        Self(bytes)
    }
}

/// Which caches a request may use, besides those of other tokens.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct CacheKey {
    /// Owner of the cache; caches are never shared between principals.
    pub owner: Principal,
    /// What the KV was computed with.
    pub salt: Salt,
}

/// A parked cache that begins with wanted tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hit {
    /// The cache.
    pub id: ParkedId,
    /// Number of the wanted tokens that it can restore.
    pub tokens: u32,
}

/// A parked cache, and whose it is.
#[derive(Clone, Debug)]
pub struct CacheEntry {
    /// Its number, of [`Parked::number`].
    pub id: ParkedId,
    /// Who may use it.
    pub key: CacheKey,
    /// The session it goes with.
    pub session: Option<SessionKey>,
    /// The tokens that it holds.
    pub transcript: Transcript,
    /// The lengths to which it can be cut back, ascending; None is any.
    pub checkpoints: Option<Vec<u32>>,
    /// Time when it was last used.
    pub used: Moment,
}

/// The parked caches of one model.
#[derive(Clone, Debug)]
pub struct Parked {
    /// Ordered by key, then by transcript.
    entries: Vec<CacheEntry>,
    shared: Shared,
    id_next: u64,
}

impl CacheEntry {
    fn tokens(&self) -> u32 {
        count(self.transcript.len())
    }

    /// Returns the number of its tokens that `transcript` begins with.
    fn common(&self, transcript: &Transcript) -> u32 {
        count(self.transcript.common_prefix(transcript))
    }

    /// Returns the number of `transcript`'s tokens that it can restore, of the `common` ones that it begins
    /// with. They never end within a media span.
    fn usable(&self, transcript: &Transcript, common: u32) -> u32 {
        let whole = |&tokens: &u32| transcript.whole(tokens as usize) == tokens as usize;
        match &self.checkpoints {
            None => count(transcript.whole(common as usize)),
            Some(checkpoints) => {
                let possible = checkpoints.iter().copied().filter(|&length| length <= common);
                possible.filter(whole).max().unwrap_or(0)
            }
        }
    }

    /// Returns the lengths at which states are saved.
    fn lengths(&self) -> &[u32] {
        self.checkpoints.as_deref().unwrap_or_default()
    }

    /// Returns whether it can be cut back to the last of `checkpoints`.
    fn saves(&self, checkpoints: Option<&[u32]>) -> bool {
        let saved = |length: &u32| self.checkpoints.as_ref().is_none_or(|own| own.contains(length));
        checkpoints.and_then(<[u32]>::last).is_none_or(saved)
    }
}

impl Parked {
    /// Returns a model's caches: none yet.
    #[must_use]
    pub fn new(bytes_per_token: u64, state_bytes: u64) -> Self {
        Self { entries: Vec::new(), shared: Shared::new(bytes_per_token, state_bytes), id_next: 0 }
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

    /// Returns the bytes of those that are not needed to share this base.
    #[must_use]
    pub fn bytes_beside(&self, base: Option<Base>) -> u64 {
        self.bytes() - base.map_or(0, |base| self.shared.bytes_held_by(base.id))
    }

    /// Returns the bytes that a cache adds, given what it shares.
    #[must_use]
    pub fn bytes_added(&self, cache: &CacheEntry, base: Option<Base>) -> u64 {
        self.shared.bytes_added(base, cache.tokens(), cache.lengths())
    }

    /// Returns what a cache is to share with the one that has most of its tokens.
    #[must_use]
    pub fn cut(&self, cache: &CacheEntry) -> Option<Cut> {
        let CacheEntry { key, transcript, .. } = cache;
        // The longest common beginnings stand beside its place.
        let place = self.rank(key, (transcript, usize::MAX), Ordering::is_le);
        let beside = [place.checked_sub(1), Some(place)].into_iter().flatten();
        let of_key = beside.filter_map(|place| self.entries.get(place)).filter(|entry| entry.key == *key);
        let (common, nearest) =
            of_key.map(|entry| (entry.common(transcript), entry)).max_by_key(|(common, _)| *common)?;
        let replaces = nearest.tokens() <= common && cache.saves(nearest.checkpoints.as_deref());
        self.shared.cut(nearest.id, common, cache.tokens(), replaces)
    }

    /// Notes that a segment was cut in two.
    pub fn split(&mut self, at: Base) {
        self.shared.split(at);
    }

    /// Returns the time when the one that is evicted first was last used.
    #[must_use]
    pub fn oldest(&self) -> Option<Moment> {
        self.entries.iter().map(|entry| entry.used).min()
    }

    /// Returns the number of caches from the front for which `is_before` holds of their order to the first
    /// `count` tokens of a transcript.
    fn rank(
        &self,
        key: &CacheKey,
        (transcript, count): (&Transcript, usize),
        is_before: fn(Ordering) -> bool,
    ) -> usize {
        self.entries.partition_point(|entry| {
            is_before(entry.key.cmp(key).then_with(|| entry.transcript.compare(transcript, count)))
        })
    }

    /// Returns the place of the cache that restores most of the first `most` tokens, and how many.
    fn best(&self, key: &CacheKey, transcript: &Transcript, most: u32) -> Option<(usize, u32)> {
        let middle = self.rank(key, (transcript, usize::MAX), Ordering::is_le);
        let mut best: Option<(usize, u32)> = None;
        // Farther caches have less in common.
        let mut may_be_followed = |place: &usize| {
            let entry = &self.entries[*place];
            let common = if entry.key == *key { entry.common(transcript).min(most) } else { 0 };
            let usable = entry.usable(transcript, common);
            if usable > best.map_or(0, |(_, usable)| usable) {
                best = Some((*place, usable));
            }
            common > best.map_or(0, |(_, usable)| usable)
        };
        (0..middle).rev().take_while(&mut may_be_followed).for_each(drop);
        (middle..self.entries.len()).take_while(&mut may_be_followed).for_each(drop);
        best
    }

    /// Returns the cache of `key` that restores most of the first `most` tokens, and notes that it was used.
    pub fn find(&mut self, key: &CacheKey, transcript: &Transcript, most: u32, now: Moment) -> Option<Hit> {
        let (place, tokens) = self.best(key, transcript, most)?;
        let entry = &mut self.entries[place];
        entry.used = now;
        Some(Hit { id: entry.id, tokens })
    }

    /// Returns the number of the first `most` tokens that the best cache of `key` restores.
    #[must_use]
    pub fn longest(&self, key: &CacheKey, transcript: &Transcript, most: u32) -> u32 {
        self.best(key, transcript, most).map_or(0, |(_, tokens)| tokens)
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
        let first = self.rank(key, (transcript, tokens as usize), Ordering::is_lt);
        let begins = |entry: &&CacheEntry| entry.key == *key && entry.common(transcript) >= tokens;
        self.entries[first..].iter().take_while(begins).any(|entry| entry.saves(checkpoints))
    }

    /// Removes the caches that `cache` makes redundant because it restores all that they do.
    fn supersede(&mut self, cache: &CacheEntry) -> Vec<ParkedId> {
        let CacheEntry { key, transcript, .. } = cache;
        let mut redundant = Vec::new();
        let mut end = self.rank(key, (transcript, usize::MAX), Ordering::is_le);
        while let Some(entry) = self.entries[..end].last().filter(|entry| entry.key == *key) {
            let common = entry.common(transcript);
            if common < entry.tokens() {
                // Shorter beginnings of `cache` stand before all that part from it here.
                end = self.rank(key, (transcript, common as usize), Ordering::is_le);
                continue;
            }
            end -= 1;
            if cache.saves(entry.checkpoints.as_deref()) {
                redundant.push(self.take(end));
            }
        }
        redundant
    }

    /// Adds a cache that shares a base; returns those that it makes redundant because it restores all that
    /// they do.
    pub fn insert(&mut self, cache: CacheEntry, base: Option<Base>) -> Vec<ParkedId> {
        self.shared.add(cache.id, base, cache.tokens(), cache.lengths());
        let redundant = self.supersede(&cache);
        let place = self.rank(&cache.key, (&cache.transcript, usize::MAX), Ordering::is_le);
        self.entries.insert(place, cache);
        redundant
    }

    /// Removes the least recently used caches until `bytes` are freed or none is left, sparing `spared`. Each
    /// frees what no other has.
    pub fn evict(&mut self, bytes: u64, spared: Option<ParkedId>) -> Vec<ParkedId> {
        let most = self.bytes().saturating_sub(bytes);
        self.evict_while(spared, |left| left.bytes() > most)
    }

    /// Removes the least recently used caches until at most `most` are left, of at most twice as many
    /// segments.
    pub fn keep(&mut self, most: u32) -> Vec<ParkedId> {
        let most = most as usize;
        self.evict_while(None, |left| left.caches() > most || left.segments() > 2 * most)
    }

    /// Removes caches, the least recently used first, as long as those that are left are too many.
    fn evict_while(
        &mut self,
        spared: Option<ParkedId>,
        are_too_many: impl Fn(&Shared) -> bool,
    ) -> Vec<ParkedId> {
        if !are_too_many(&self.shared) {
            return Vec::new();
        }
        let others = self.entries.iter().filter(|entry| Some(entry.id) != spared);
        let mut by_age: Vec<(Moment, ParkedId)> = others.map(|entry| (entry.used, entry.id)).collect();
        by_age.sort_unstable();
        let evicted = by_age.into_iter().take_while(|(_, id)| {
            let more = are_too_many(&self.shared);
            if more {
                self.shared.remove(*id);
            }
            more
        });
        let Some(last) = evicted.last() else { return Vec::new() };
        self.remove_if(|entry| Some(entry.id) != spared && (entry.used, entry.id) <= last)
    }

    /// Removes the caches of a session that is gone.
    pub fn forget(&mut self, session: &SessionKey) -> Vec<ParkedId> {
        self.remove_if(|entry| entry.session.as_ref() == Some(session))
    }

    /// Removes the caches of a key.
    pub fn forget_key(&mut self, key: &CacheKey) -> Vec<ParkedId> {
        self.remove_if(|entry| entry.key == *key)
    }

    fn remove_if(&mut self, gone: impl Fn(&CacheEntry) -> bool) -> Vec<ParkedId> {
        let (removed, kept): (Vec<_>, Vec<_>) = std::mem::take(&mut self.entries).into_iter().partition(gone);
        self.entries = kept;
        let removed: Vec<ParkedId> = removed.into_iter().map(|entry| entry.id).collect();
        removed.iter().for_each(|id| self.shared.remove(*id));
        removed
    }

    fn take(&mut self, place: usize) -> ParkedId {
        let id = self.entries.remove(place).id;
        self.shared.remove(id);
        id
    }
}

#[cfg(test)]
#[path = "parked_tests.rs"]
mod tests;
