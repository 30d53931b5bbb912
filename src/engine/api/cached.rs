//! What is cached of some tokens: the question and the answer.

use std::sync::Arc;

use crate::cache::Salt;
use crate::ids::{ModelName, Principal};

/// A question about cached KV.
#[derive(Clone, Debug)]
pub struct CachedAsk {
    /// The model.
    pub model: ModelName,
    /// Whose caches may be used.
    pub owner: Principal,
    /// The salt that they have.
    pub salt: Salt,
    /// The tokens that are looked for; at least one more follows.
    pub tokens: Arc<[u32]>,
}

/// What is cached of some tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CachedKv {
    /// Number of the first of them that need not be computed.
    pub tokens: u32,
    /// Bytes of their KV.
    pub bytes: u64,
}
