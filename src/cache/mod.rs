//! What the engine knows of memory: which slot of which slab is whose, which parked caches there are and
//! whose tokens they hold. Pure: it decides, a backend copies.

mod parked;
#[cfg(test)]
mod property_tests;
mod slots;

pub use parked::{CacheEntry, Hit, Parked};
pub use slots::{Grant, SlabClass, Slots};
