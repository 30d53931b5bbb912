//! Which models are in memory: who may be loaded (`decide`), how the byte budget is shared (`memory`), and
//! who uses a model (`lease`, `table`). Pure: it decides and counts; the engine loads and frees, the service
//! takes leases.
//!
//! A model is loaded when somebody asks for it and unloaded on request or after a device failure; no model is
//! evicted for another. A caller takes a [`ModelLease`] before it tokenizes and hands it to the engine with
//! its work, so a model is never freed under a call; the engine owns the [`Tenancy`], and can end it only
//! when no lease is left. What a model was loaded from is read through a [`Door`], without a lease.

mod decide;
mod lease;
mod memory;
mod table;

pub use decide::{Decision, Demand, Standing, decide};
pub use lease::{Door, ModelLease, Tenancy};
pub use memory::{Fit, Memory};
pub use table::{ModelState, ModelTable};
