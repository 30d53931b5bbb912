//! The contexts that each owner had computed in a life of the daemon: only of those may a request find cached
//! KV. Knows nothing of caches.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};

use crate::backend::fake::next_token;
use crate::engine::CacheUse;
use crate::ids::{ModelName, Principal};

/// Who may find what was computed.
#[derive(Clone, Debug)]
pub(super) struct Scope {
    pub(super) principal: Principal,
    pub(super) model: ModelName,
    pub(super) cache: CacheUse,
}

/// Hashes of all beginnings of the contexts.
#[derive(Default)]
pub(super) struct Seen(HashSet<u64>);

impl Scope {
    fn hash(&self) -> u64 {
        let salt = match self.cache {
            CacheUse::Shared(salt) => Some(salt.0),
            CacheUse::Off => None,
        };
        let mut hash = DefaultHasher::new();
        (self.principal.as_str(), self.model.as_str(), salt).hash(&mut hash);
        hash.finish()
    }
}

/// Returns the hash of a context that has one more token.
fn with(hash: u64, token: u32) -> u64 {
    let mixed = (hash ^ u64::from(token)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^ (mixed >> 29)
}

impl Seen {
    /// Adds a context, unless it leaves nothing to be found.
    pub(super) fn add(&mut self, scope: &Scope, context: &[u32]) {
        if scope.cache != CacheUse::Off {
            let mut hash = scope.hash();
            for &token in context {
                hash = with(hash, token);
                self.0.insert(hash);
            }
        }
    }

    /// Returns how many of a context's tokens may be cached.
    pub(super) fn longest(&self, scope: &Scope, context: &[u32]) -> usize {
        if scope.cache == CacheUse::Off {
            return 0;
        }
        let mut hash = scope.hash();
        let is_seen = |&&token: &&u32| {
            hash = with(hash, token);
            self.0.contains(&hash)
        };
        let seen = context.iter().take_while(is_seen).count();
        // What the model says after that was computed as well, whether somebody read it or not.
        let said = (seen..context.len()).take_while(|&at| context[at] == next_token(&context[..at]));
        seen + said.count()
    }
}
