//! Parked KV caches: what sequences left behind, found again by key and transcript. A cache may serve any
//! request of the same key that begins with the same tokens and media: a session's next turn, a fork of it,
//! or a client that sends the whole conversation each time. The least recently used are evicted first.
//!
//! They are kept in the order of a dictionary, in which the longest common beginnings with a transcript stand
//! beside its own place: a search compares it with some ten caches of a thousand.

use std::cmp::Ordering;

use super::Transcript;
use crate::backend::ParkedId;
use crate::clock::Moment;
use crate::count::count;
use crate::ids::{Principal, SessionKey};

/// Hash of whatever shapes a KV cache besides tokens and media, such as an adapter; 0 is the plain model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Salt(pub u64);

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
    /// Its number.
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
    bytes_per_token: u64,
    state_bytes: u64,
    /// Ordered by key, then by transcript.
    entries: Vec<CacheEntry>,
    bytes: u64,
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
        Self { bytes_per_token, state_bytes, entries: Vec::new(), bytes: 0 }
    }

    /// Returns the bytes of them all.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Returns the bytes of a cache of `tokens` with this number of checkpoints.
    #[must_use]
    pub fn bytes_of(&self, tokens: u32, checkpoints: usize) -> u64 {
        u64::from(tokens) * self.bytes_per_token + checkpoints as u64 * self.state_bytes
    }

    /// Returns the time when the one that is evicted first was last used.
    #[must_use]
    pub fn oldest(&self) -> Option<Moment> {
        self.entries.iter().map(|entry| entry.used).min()
    }

    fn entry_bytes(&self, entry: &CacheEntry) -> u64 {
        self.bytes_of(entry.tokens(), entry.checkpoints.as_ref().map_or(0, Vec::len))
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
    pub fn supersede(&mut self, cache: &CacheEntry) -> Vec<ParkedId> {
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

    /// Adds a cache; returns those that it makes redundant because it restores all that they do.
    pub fn insert(&mut self, cache: CacheEntry) -> Vec<ParkedId> {
        let redundant = self.supersede(&cache);
        let place = self.rank(&cache.key, (&cache.transcript, usize::MAX), Ordering::is_le);
        self.bytes += self.entry_bytes(&cache);
        self.entries.insert(place, cache);
        redundant
    }

    /// Removes the least recently used caches until `bytes` are freed or none is left, sparing `spared`.
    pub fn evict(&mut self, bytes: u64, spared: Option<ParkedId>) -> Vec<ParkedId> {
        if bytes == 0 {
            return Vec::new();
        }
        let mut freed = 0;
        self.evict_while(spared, |size| {
            let more = freed < bytes;
            freed += size;
            more
        })
    }

    /// Removes the least recently used caches until at most `most` are left.
    pub fn keep(&mut self, most: u32) -> Vec<ParkedId> {
        let mut extra = self.entries.len().saturating_sub(most as usize);
        if extra == 0 {
            return Vec::new();
        }
        self.evict_while(None, |_| {
            let more = extra > 0;
            extra = extra.saturating_sub(1);
            more
        })
    }

    /// Removes caches, the least recently used first, as long as `more` wants one of these bytes.
    fn evict_while(&mut self, spared: Option<ParkedId>, mut more: impl FnMut(u64) -> bool) -> Vec<ParkedId> {
        let others = self.entries.iter().filter(|entry| Some(entry.id) != spared);
        let mut by_age: Vec<(Moment, ParkedId, u64)> =
            others.map(|entry| (entry.used, entry.id, self.entry_bytes(entry))).collect();
        by_age.sort_unstable();
        let Some((used, id, _)) = by_age.into_iter().take_while(|&(_, _, size)| more(size)).last() else {
            return Vec::new();
        };
        self.remove_if(|entry| Some(entry.id) != spared && (entry.used, entry.id) <= (used, id))
    }

    /// Removes the caches of a session that is gone.
    pub fn forget(&mut self, session: &SessionKey) -> Vec<ParkedId> {
        self.remove_if(|entry| entry.session.as_ref() == Some(session))
    }

    fn remove_if(&mut self, gone: impl Fn(&CacheEntry) -> bool) -> Vec<ParkedId> {
        let (removed, kept): (Vec<_>, Vec<_>) = std::mem::take(&mut self.entries).into_iter().partition(gone);
        self.entries = kept;
        self.bytes -= removed.iter().map(|entry| self.entry_bytes(entry)).sum::<u64>();
        removed.into_iter().map(|entry| entry.id).collect()
    }

    fn take(&mut self, place: usize) -> ParkedId {
        let entry = self.entries.remove(place);
        self.bytes -= self.entry_bytes(&entry);
        entry.id
    }
}

#[cfg(test)]
#[path = "parked_tests.rs"]
mod tests;
