//! What the engine knows of memory: which slot of which slab is whose (`slots`), which parked caches there
//! are and whose tokens (`transcript`) they hold (`parked`, in the order of `index`), and what those share
//! (`shared`). Pure: it decides, a backend copies.

mod entry;
mod index;
mod parked;
#[cfg(test)]
mod property_tests;
mod shared;
#[cfg(test)]
mod shared_tests;
mod slots;
mod transcript;

pub use entry::{CacheEntry, CacheKey, Rank, Salt};
pub use parked::{Hit, Parked};
pub use shared::{Cut, SEGMENTS_MAX};
pub use slots::{Grant, Leftover, SlabClass, Slots};
pub use transcript::Transcript;
