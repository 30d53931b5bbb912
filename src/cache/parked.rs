//! Parked KV caches: what sequences left behind, found again by key and transcript. A cache may serve any
//! request of the same key that begins with the same tokens and media: a session's next turn, a fork of it,
//! or a client that sends the whole conversation each time. The least recently used are evicted first.

use std::cmp::Reverse;

use super::Transcript;
use crate::backend::ParkedId;
use crate::clock::Moment;
use crate::ids::{Principal, SessionKey};

/// Hash of whatever shapes a KV cache besides tokens and media, such as an adapter; 0 is the plain model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Salt(pub u64);

/// Which caches a request may use, besides those of other tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    /// The sequence that left it.
    pub transcript: Transcript,
    /// Number of the transcript's tokens that it holds.
    pub tokens: u32,
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
    entries: Vec<CacheEntry>,
}

fn count(tokens: usize) -> u32 {
    u32::try_from(tokens).unwrap_or(u32::MAX)
}

impl CacheEntry {
    /// Returns the number of its tokens that `transcript` begins with.
    fn common(&self, transcript: &Transcript) -> u32 {
        count(self.transcript.common_prefix(transcript)).min(self.tokens)
    }

    /// Returns the number of `transcript`'s tokens that it can restore, at most `most`. They never end within
    /// a media span.
    fn usable(&self, transcript: &Transcript, most: u32) -> u32 {
        let common = self.common(transcript).min(most);
        let whole = |&tokens: &u32| transcript.whole(tokens as usize) == tokens as usize;
        match &self.checkpoints {
            None => count(transcript.whole(common as usize)),
            Some(checkpoints) => {
                let possible = checkpoints.iter().copied().filter(|&length| length <= common);
                possible.filter(whole).max().unwrap_or(0)
            }
        }
    }

    /// Returns whether it restores all that a cache of `tokens` with `checkpoints` would.
    fn covers(&self, transcript: &Transcript, tokens: u32, checkpoints: Option<&[u32]>) -> bool {
        let saved = |length: &u32| self.checkpoints.as_ref().is_none_or(|own| own.contains(length));
        self.common(transcript) >= tokens && checkpoints.and_then(<[u32]>::last).is_none_or(saved)
    }
}

impl Parked {
    /// Returns a model's caches: none yet.
    #[must_use]
    pub fn new(bytes_per_token: u64, state_bytes: u64) -> Self {
        Self { bytes_per_token, state_bytes, entries: Vec::new() }
    }

    /// Returns the bytes of them all.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.entries.iter().map(|entry| self.entry_bytes(entry)).sum()
    }

    fn entry_bytes(&self, entry: &CacheEntry) -> u64 {
        let checkpoints = entry.checkpoints.as_ref().map_or(0, |checkpoints| checkpoints.len() as u64);
        u64::from(entry.tokens) * self.bytes_per_token + checkpoints * self.state_bytes
    }

    /// Returns the cache of `key` that restores most of the first `most` tokens, and notes that it was used.
    pub fn find(&mut self, key: &CacheKey, transcript: &Transcript, most: u32, now: Moment) -> Option<Hit> {
        let own = self.entries.iter_mut().filter(|entry| entry.key == *key);
        let (usable, entry) = own
            .map(|entry| (entry.usable(transcript, most), entry))
            .max_by_key(|(usable, entry)| (*usable, Reverse(entry.tokens)))?;
        if usable == 0 {
            return None;
        }
        entry.used = now;
        Some(Hit { id: entry.id, tokens: usable })
    }

    /// Returns the number of the first `most` tokens that the best cache of `key` restores.
    #[must_use]
    pub fn longest(&self, key: &CacheKey, transcript: &Transcript, most: u32) -> u32 {
        let own = self.entries.iter().filter(|entry| entry.key == *key);
        own.map(|entry| entry.usable(transcript, most)).max().unwrap_or(0)
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
        self.entries.iter().any(|entry| entry.key == *key && entry.covers(transcript, tokens, checkpoints))
    }

    /// Adds a cache; returns those that it makes redundant because it restores all that they do.
    pub fn insert(&mut self, cache: CacheEntry) -> Vec<ParkedId> {
        let redundant = self.remove_if(|entry| {
            let checkpoints = entry.checkpoints.as_deref();
            entry.key == cache.key && cache.covers(&entry.transcript, entry.tokens, checkpoints)
        });
        self.entries.push(cache);
        redundant
    }

    /// Removes the least recently used caches until `bytes` are freed or none is left, sparing `spared`.
    pub fn evict(&mut self, bytes: u64, spared: Option<ParkedId>) -> Vec<ParkedId> {
        let mut by_age: Vec<(Moment, ParkedId, u64)> = self
            .entries
            .iter()
            .filter(|entry| Some(entry.id) != spared)
            .map(|entry| (entry.used, entry.id, self.entry_bytes(entry)))
            .collect();
        by_age.sort_unstable();
        let mut freed = 0;
        let oldest = by_age.into_iter().take_while(|(_, _, size)| {
            let more = freed < bytes;
            freed += size;
            more
        });
        let victims: Vec<ParkedId> = oldest.map(|(_, id, _)| id).collect();
        self.remove_if(|entry| victims.contains(&entry.id))
    }

    /// Removes the caches of a session that is gone.
    pub fn forget(&mut self, session: &SessionKey) -> Vec<ParkedId> {
        self.remove_if(|entry| entry.session.as_ref() == Some(session))
    }

    fn remove_if(&mut self, gone: impl Fn(&CacheEntry) -> bool) -> Vec<ParkedId> {
        let mut removed = Vec::new();
        self.entries.retain(|entry| {
            let gone = gone(entry);
            if gone {
                removed.push(entry.id);
            }
            !gone
        });
        removed
    }
}

#[cfg(test)]
#[path = "parked_tests.rs"]
mod tests;
