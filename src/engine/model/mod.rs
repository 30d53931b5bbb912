//! A model in memory: its queue, its running sequences and their slots, its parked caches, and the step that
//! runs. A tick of it: collect the step and commit its results (`step`), end what is gone (`queue`), admit
//! what waits (`admit`), launch the next step, and only then talk to the readers. `slots` moves KV caches.

mod admit;
mod context;
mod masks;
mod queue;
mod resident;
mod slots;
mod snapshots;
mod step;

use context::Reclaim;
pub(super) use context::{Context, Room};
pub(super) use resident::Resident;
pub(super) use snapshots::Adoption;
