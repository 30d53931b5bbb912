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
    /// How many of the wanted tokens it has.
    pub tokens: u32,
}

/// A parked cache, and whose it is.
#[derive(Clone, Debug)]
pub struct ParkedCache {
    /// Its number.
    pub id: ParkedId,
    /// Who may use it.
    pub owner: Principal,
    /// The session it goes with.
    pub session: Option<SessionKey>,
    /// The tokens it holds.
    pub tokens: Vec<u32>,
    /// When it was last used.
    pub used: Moment,
}

/// The parked caches of one model.
#[derive(Clone, Debug)]
pub struct Parked {
    bytes_per_token: u64,
    entries: Vec<ParkedCache>,
}

/// How many tokens two sequences begin with in common.
fn common_prefix(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

impl Parked {
    /// None yet.
    #[must_use]
    pub fn new(bytes_per_token: u64) -> Self {
        Self { bytes_per_token, entries: Vec::new() }
    }

    /// Bytes of them all.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.entries.iter().map(|entry| entry.tokens.len() as u64 * self.bytes_per_token).sum()
    }

    /// The cache of `owner` that has most of `tokens`, and marks it used.
    pub fn find(&mut self, owner: &Principal, tokens: &[u32], now: Moment) -> Option<Hit> {
        let own = self.entries.iter_mut().filter(|entry| entry.owner == *owner);
        let (common, entry) = own
            .map(|entry| (common_prefix(&entry.tokens, tokens), entry))
            .max_by_key(|(common, entry)| (*common, Reverse(entry.tokens.len())))?;
        if common == 0 {
            return None;
        }
        entry.used = now;
        Some(Hit { id: entry.id, tokens: u32::try_from(common).unwrap_or(u32::MAX) })
    }

    /// How many of `tokens` the best cache of `owner` has.
    #[must_use]
    pub fn longest(&self, owner: &Principal, tokens: &[u32]) -> u32 {
        let own = self.entries.iter().filter(|entry| entry.owner == *owner);
        let longest = own.map(|entry| common_prefix(&entry.tokens, tokens)).max();
        u32::try_from(longest.unwrap_or(0)).unwrap_or(u32::MAX)
    }

    /// Whether parking these tokens would keep nothing that is not kept already.
    #[must_use]
    pub fn covers(&self, owner: &Principal, tokens: &[u32]) -> bool {
        self.entries.iter().any(|entry| entry.owner == *owner && entry.tokens.starts_with(tokens))
    }

    /// Adds a cache; returns those that it makes superfluous because it begins with all of their tokens.
    pub fn insert(&mut self, cache: ParkedCache) -> Vec<ParkedId> {
        let superfluous =
            self.remove_if(|entry| entry.owner == cache.owner && cache.tokens.starts_with(&entry.tokens));
        self.entries.push(cache);
        superfluous
    }

    /// Removes the least recently used caches until `bytes` are freed or none is left, sparing `keep`.
    pub fn evict(&mut self, bytes: u64, keep: Option<ParkedId>) -> Vec<ParkedId> {
        let mut by_age: Vec<(Moment, ParkedId, u64)> = self
            .entries
            .iter()
            .filter(|entry| Some(entry.id) != keep)
            .map(|entry| (entry.used, entry.id, entry.tokens.len() as u64 * self.bytes_per_token))
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

    fn remove_if(&mut self, gone: impl Fn(&ParkedCache) -> bool) -> Vec<ParkedId> {
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

    fn cache(id: u64, owner: &str, tokens: &[u32], used: u64) -> ParkedCache {
        ParkedCache {
            id: ParkedId(id),
            owner: Principal::from(owner),
            session: None,
            tokens: tokens.to_vec(),
            used: at(used),
        }
    }

    fn parked(caches: &[(u64, &str, &[u32], u64)]) -> Parked {
        let mut parked = Parked::new(10);
        for (id, owner, tokens, used) in caches {
            parked.insert(cache(*id, owner, tokens, *used));
        }
        parked
    }

    #[test]
    fn the_longest_common_prefix_of_the_owner_wins() {
        let mut parked =
            parked(&[(0, "a", &[1, 2, 3, 9], 0), (1, "a", &[1, 2, 4], 0), (2, "b", &[1, 2, 3, 4], 0)]);
        let hit = parked.find(&Principal::from("a"), &[1, 2, 3, 4, 5], at(1));
        assert_eq!(hit, Some(Hit { id: ParkedId(0), tokens: 3 }));
        assert_eq!(parked.find(&Principal::from("c"), &[1, 2, 3], at(1)), None);
        assert_eq!(parked.find(&Principal::from("a"), &[7], at(1)), None);
    }

    #[test]
    fn a_longer_cache_replaces_its_prefixes() {
        let mut parked = parked(&[(0, "a", &[1, 2], 0), (1, "b", &[1, 2], 0)]);
        let gone = parked.insert(cache(2, "a", &[1, 2, 3], 1));
        assert_eq!(gone, vec![ParkedId(0)]);
        assert_eq!(parked.bytes(), 50);
        assert!(parked.covers(&Principal::from("a"), &[1, 2]));
    }

    #[test]
    fn the_least_recently_used_gives_way_first() {
        let mut parked = parked(&[(0, "a", &[1], 3), (1, "a", &[2], 1), (2, "a", &[3], 2)]);
        assert_eq!(parked.evict(11, Some(ParkedId(1))), vec![ParkedId(0), ParkedId(2)]);
        assert_eq!(parked.evict(1, None), vec![ParkedId(1)]);
        assert_eq!(parked.evict(1, None), vec![]);
    }
}
