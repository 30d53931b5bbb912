//! Which models are in memory: who may be loaded (`decide`), how the byte budget is shared (`memory`), and
//! who uses a model (`lease`, `table`). Pure: it decides and counts; the engine loads and frees, the service
//! holds leases.
//!
//! A model is loaded when somebody asks for it and unloaded on request or after a device failure; no model is
//! evicted for another. A caller holds a [`ModelLease`] from before it tokenizes until its call ends, so a
//! model is never freed under a call; the engine owns the [`Tenancy`], and can end it only when no lease is
//! left.

mod decide;
mod lease;
mod memory;
mod table;

pub use decide::{Decision, Demand, Standing, decide};
pub use lease::{ModelLease, Tenancy};
pub use memory::{Fit, Memory};
pub use table::{ModelState, ModelTable};
