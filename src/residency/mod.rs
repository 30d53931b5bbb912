//! Which models are in memory: what becomes of a wish (`plan`), how long a model stays (`keep`), the byte
//! budget (`memory`), and who uses a model (`lease`, `table`). Pure: it decides and counts; the engine loads
//! and frees, the service takes leases.
//!
//! A model is loaded when somebody asks for it. It stays until its time is over, until it must make room for
//! another, or until it is unloaded on request or after a device failure; while it is in use or pinned it is
//! not evicted. A caller takes a [`ModelLease`] before it tokenizes and hands it to the engine with its work,
//! so a model is never freed under a call; the engine owns the [`Tenancy`], and can end it only when no lease
//! is left. What a model was loaded from is read through a [`Door`], without a lease.

mod keep;
mod lease;
mod memory;
mod plan;
mod table;
mod tenant;

pub use keep::{KeepAlive, Lifetime, ModelSettings, NotAKeepAlive, ResidencySettings, Stay};
pub use lease::{Door, ModelLease, Tenancy};
pub use memory::{Fit, Memory};
pub use plan::{Demand, Evictions, Plan, State, available_bytes, evictions, evictions_towards, plan};
pub use table::{ModelState, ModelTable};
pub use tenant::Tenant;
