//! A parked cache as the search for one sees it: whose it is, what it holds, and what it can restore.

use super::Transcript;
use crate::backend::ParkedId;
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

/// How long a cache is worth keeping: those of a lesser rank are evicted first, of each rank the least
/// recently used before others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rank {
    /// What a request without a session left.
    #[default]
    Anonymous,
    /// A session's.
    Session,
    /// A pinned session's.
    Pinned,
}

/// Which caches a request may use, besides those of other tokens.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct CacheKey {
    /// Owner of the cache; caches are never shared between principals.
    pub owner: Principal,
    /// What the KV was computed with.
    pub salt: Salt,
}

/// A parked cache, and whose it is.
#[derive(Clone, Debug)]
pub struct CacheEntry {
    /// Its number, of `Parked::number`.
    pub id: ParkedId,
    /// Who may use it.
    pub key: CacheKey,
    /// The session it goes with.
    pub session: Option<SessionKey>,
    /// How long it is worth keeping.
    pub rank: Rank,
    /// The tokens that it holds.
    pub transcript: Transcript,
    /// The lengths to which it can be cut back, ascending; None is any.
    pub checkpoints: Option<Vec<u32>>,
    /// Time when it was last used.
    pub used: Moment,
}

impl CacheEntry {
    pub(super) fn tokens(&self) -> u32 {
        count(self.transcript.len())
    }

    /// Returns the number of `transcript`'s tokens that it can restore, of the `common` ones that it begins
    /// with. They never end within a media span.
    pub(super) fn usable(&self, transcript: &Transcript, common: u32) -> u32 {
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
    pub(super) fn lengths(&self) -> &[u32] {
        self.checkpoints.as_deref().unwrap_or_default()
    }

    /// Returns whether it can be cut back to the last of `checkpoints`.
    pub(super) fn saves(&self, checkpoints: Option<&[u32]>) -> bool {
        let saved = |length: &u32| self.checkpoints.as_ref().is_none_or(|own| own.contains(length));
        checkpoints.and_then(<[u32]>::last).is_none_or(saved)
    }
}
