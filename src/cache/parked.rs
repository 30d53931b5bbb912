//! Parked KV caches: what sequences left behind, found again by their tokens. A cache may serve any
//! request of the same principal that begins with the same tokens: a session's next turn, a fork of it,
//! or a client that sends the whole conversation each time. The least recently used give way first.

use std::cmp::Reverse;

use crate::backend::ParkedId;
use crate::clock::Moment;
use crate::ids::{Principal, SessionKey};

/// A parked cache that begins with wanted tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hit {
    /// The cache.
    pub id: ParkedId,
    /// How many of the wanted tokens can be had from it.
    pub tokens: u32,
}

/// A parked cache, and whose it is.
#[derive(Clone, Debug)]
pub struct CacheEntry {
    /// Its number.
    pub id: ParkedId,
    /// Who may use it.
    pub owner: Principal,
    /// The session it goes with.
    pub session: Option<SessionKey>,
    /// The tokens it holds.
    pub tokens: Vec<u32>,
    /// The lengths to which it can be cut back, ascending; None is any.
    pub checkpoints: Option<Vec<u32>>,
    /// When it was last used.
    pub used: Moment,
}

/// The parked caches of one model.
#[derive(Clone, Debug)]
pub struct Parked {
    bytes_per_token: u64,
    state_bytes: u64,
    entries: Vec<CacheEntry>,
}

/// How many tokens two sequences begin with in common.
fn common_prefix(a: &[u32], b: &[u32]) -> u32 {
    let common = a.iter().zip(b).take_while(|(a, b)| a == b).count();
    u32::try_from(common).unwrap_or(u32::MAX)
}

impl CacheEntry {
    /// How many of `tokens` can be had from it, of which no more than `most` are wanted.
    fn usable(&self, tokens: &[u32], most: u32) -> u32 {
        let common = common_prefix(&self.tokens, tokens).min(most);
        match &self.checkpoints {
            None => common,
            Some(checkpoints) => {
                checkpoints.iter().copied().filter(|&checkpoint| checkpoint <= common).max().unwrap_or(0)
            }
        }
    }

    /// Whether it gives all that another one gives.
    fn covers(&self, tokens: &[u32], checkpoints: Option<&[u32]>) -> bool {
        let checkpointed =
            |checkpoint: &u32| self.checkpoints.as_ref().is_none_or(|own| own.contains(checkpoint));
        self.tokens.starts_with(tokens) && checkpoints.and_then(<[u32]>::last).is_none_or(checkpointed)
    }
}

impl Parked {
    /// None yet.
    #[must_use]
    pub fn new(bytes_per_token: u64, state_bytes: u64) -> Self {
        Self { bytes_per_token, state_bytes, entries: Vec::new() }
    }

    /// Bytes of them all.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.entries.iter().map(|entry| self.entry_bytes(entry)).sum()
    }

    fn entry_bytes(&self, entry: &CacheEntry) -> u64 {
        let checkpoints = entry.checkpoints.as_ref().map_or(0, |checkpoints| checkpoints.len() as u64);
        entry.tokens.len() as u64 * self.bytes_per_token + checkpoints * self.state_bytes
    }

    /// The cache of `owner` that most of `tokens` can be had from, of which no more than `most` are wanted, and marks it
    /// used.
    pub fn find(&mut self, owner: &Principal, tokens: &[u32], most: u32, now: Moment) -> Option<Hit> {
        let own = self.entries.iter_mut().filter(|entry| entry.owner == *owner);
        let (usable, entry) = own
            .map(|entry| (entry.usable(tokens, most), entry))
            .max_by_key(|(usable, entry)| (*usable, Reverse(entry.tokens.len())))?;
        if usable == 0 {
            return None;
        }
        entry.used = now;
        Some(Hit { id: entry.id, tokens: usable })
    }

    /// How many of `tokens`, of which no more than `most` are wanted, can be had from the best cache of `owner`.
    #[must_use]
    pub fn longest(&self, owner: &Principal, tokens: &[u32], most: u32) -> u32 {
        let own = self.entries.iter().filter(|entry| entry.owner == *owner);
        own.map(|entry| entry.usable(tokens, most)).max().unwrap_or(0)
    }

    /// The lengths up to `tokens` at which a cache can be cut back.
    #[must_use]
    pub fn checkpoints_up_to(&self, id: ParkedId, tokens: u32) -> Vec<u32> {
        let entry = self.entries.iter().find(|entry| entry.id == id);
        let checkpoints = entry.and_then(|entry| entry.checkpoints.as_deref()).unwrap_or_default();
        checkpoints.iter().copied().filter(|&checkpoint| checkpoint <= tokens).collect()
    }

    /// Whether parking these tokens, which can be cut back to `checkpoints`, would keep nothing that is not kept already.
    #[must_use]
    pub fn covers(&self, owner: &Principal, tokens: &[u32], checkpoints: Option<&[u32]>) -> bool {
        self.entries.iter().any(|entry| entry.owner == *owner && entry.covers(tokens, checkpoints))
    }

    /// Adds a cache; returns those that it makes superfluous because it gives all that they do.
    pub fn insert(&mut self, cache: CacheEntry) -> Vec<ParkedId> {
        let superfluous = self.remove_if(|entry| {
            entry.owner == cache.owner && cache.covers(&entry.tokens, entry.checkpoints.as_deref())
        });
        self.entries.push(cache);
        superfluous
    }

    /// Removes the least recently used caches until `bytes` are freed or none is left, sparing `keep`.
    pub fn evict(&mut self, bytes: u64, keep: Option<ParkedId>) -> Vec<ParkedId> {
        let mut by_age: Vec<(Moment, ParkedId, u64)> = self
            .entries
            .iter()
            .filter(|entry| Some(entry.id) != keep)
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
mod tests {
    use super::*;
    use std::time::Duration;

    fn at(seconds: u64) -> Moment {
        Moment::at(Duration::from_secs(seconds))
    }

    fn cache(id: u64, owner: &str, tokens: &[u32], used: u64) -> CacheEntry {
        CacheEntry {
            id: ParkedId(id),
            owner: Principal::from(owner),
            session: None,
            tokens: tokens.to_vec(),
            checkpoints: None,
            used: at(used),
        }
    }

    fn parked(caches: &[(u64, &str, &[u32], u64)]) -> Parked {
        let mut parked = Parked::new(10, 0);
        for (id, owner, tokens, used) in caches {
            parked.insert(cache(*id, owner, tokens, *used));
        }
        parked
    }

    #[test]
    fn the_longest_common_prefix_of_the_owner_wins() {
        let mut parked =
            parked(&[(0, "a", &[1, 2, 3, 9], 0), (1, "a", &[1, 2, 4], 0), (2, "b", &[1, 2, 3, 4], 0)]);
        let hit = parked.find(&Principal::from("a"), &[1, 2, 3, 4, 5], 9, at(1));
        assert_eq!(hit, Some(Hit { id: ParkedId(0), tokens: 3 }));
        assert_eq!(parked.find(&Principal::from("c"), &[1, 2, 3], 9, at(1)), None);
        assert_eq!(parked.find(&Principal::from("a"), &[7], 9, at(1)), None);
    }

    #[test]
    fn a_longer_cache_replaces_its_prefixes() {
        let mut parked = parked(&[(0, "a", &[1, 2], 0), (1, "b", &[1, 2], 0)]);
        let gone = parked.insert(cache(2, "a", &[1, 2, 3], 1));
        assert_eq!(gone, vec![ParkedId(0)]);
        assert_eq!(parked.bytes(), 50);
        assert!(parked.covers(&Principal::from("a"), &[1, 2], None));
    }

    #[test]
    fn what_cannot_be_cut_back_is_had_at_its_marks_only() {
        let checkpointed = |id, tokens: &[u32], checkpoints: &[u32]| CacheEntry {
            checkpoints: Some(checkpoints.to_vec()),
            ..cache(id, "a", tokens, 0)
        };
        let mut parked = Parked::new(10, 100);
        parked.insert(checkpointed(0, &[1, 2, 3, 4, 5], &[2, 5]));
        assert_eq!(parked.bytes(), 250);
        let a = Principal::from("a");
        let mut tokens = |tokens: &[u32], most| parked.find(&a, tokens, most, at(1)).map(|hit| hit.tokens);
        assert_eq!(tokens(&[1, 2, 3, 4, 5, 6], 9), Some(5));
        assert_eq!(tokens(&[1, 2, 3, 4, 5], 4), Some(2), "one token has to run");
        assert_eq!(tokens(&[1, 2, 3, 9], 9), Some(2));
        assert_eq!(tokens(&[1, 9], 9), None);
        assert_eq!(parked.checkpoints_up_to(ParkedId(0), 4), [2]);
        assert!(!parked.covers(&a, &[1, 2, 3], Some(&[2, 3])));
        assert_eq!(
            parked.insert(checkpointed(1, &[1, 2, 3, 4, 5, 6], &[2, 6])),
            [],
            "its last checkpoint is not there"
        );
        assert_eq!(
            parked.insert(checkpointed(2, &[1, 2, 3, 4, 5, 6, 7], &[5, 6, 7])),
            [ParkedId(0), ParkedId(1)]
        );
    }

    #[test]
    fn the_least_recently_used_gives_way_first() {
        let mut parked = parked(&[(0, "a", &[1], 3), (1, "a", &[2], 1), (2, "a", &[3], 2)]);
        assert_eq!(parked.evict(11, Some(ParkedId(1))), vec![ParkedId(0), ParkedId(2)]);
        assert_eq!(parked.evict(1, None), vec![ParkedId(1)]);
        assert_eq!(parked.evict(1, None), vec![]);
    }
}
