//! The border between the engine and a device, as plain data: models (`model`), the places of KV caches
//! (`kv`) and steps (`step`). The engine decides; a backend carries out. Not `Send` on purpose: MLX lives on
//! one thread.

mod chain;
#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
mod fake_plain;
mod kernels;
mod kv;
mod model;
#[cfg(test)]
mod property_tests;
mod snapshot;
mod step;

pub use chain::{Chains, Held, NewChain, Stretch};
pub use kernels::{KernelChoice, WiredLimit};
pub use kv::{Base, CHECKPOINTS_MAX, ParkedId, Parking, Restoring, SlotId, TruncateError, add_checkpoint};
pub use model::{ComputeDtype, Formats, KvDtype, LoadPlan, LoadSpec, LoadStep, ModelId, ModelShape};
pub use snapshot::{
    BuildKv, ImportError, Importing, KvArray, KvArrays, KvBuilding, KvContent, KvElement, KvLayout, KvPart,
    KvSegment, check_segments,
};
pub use step::{
    Allow, LogitEdit, RowOutput, RowResult, Sample, Span, SpanKind, Step, TokenLogprobs, TokenSet, Want, Xtc,
};

use std::sync::Arc;

use crate::error::Error;

/// Facts of the device; fixed for the life of the engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Name, such as "cpu" or "Apple M3 Ultra".
    pub device: String,
    /// Version of MLX.
    pub mlx_version: String,
    /// Bytes of memory that it has, or that this process may use of the machine's; None if unknown.
    pub memory_bytes: Option<u64>,
    /// Values of model_type that can be loaded.
    pub architectures: Vec<&'static str>,
}

/// What the device counts, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceMemory {
    /// Bytes in use.
    pub active: u64,
    /// Highest number of bytes in use since the start.
    pub peak: u64,
    /// Freed bytes that are cached for reuse.
    pub cache: u64,
}

/// A device that runs models. An error of any method from `load_more` on means that the model can no longer
/// be trusted; the engine ends its sequences and unloads it. The exceptions are [`Backend::open_slab`],
/// [`Backend::split_parked`] and [`Backend::park`], which have done nothing where they fail, and
/// [`Backend::park_slab`].
pub trait Backend {
    /// Returns the byte budget for weights and KV caches that the device suggests now.
    fn budget_bytes(&self) -> u64;

    /// Plans a load, given `free_bytes`. Reads no file. The KV cache's element type is not `Auto`.
    ///
    /// # Errors
    /// The model is one that cannot be loaded, as far as its config says.
    fn plan(&self, spec: &LoadSpec, free_bytes: u64) -> Result<LoadPlan, Error>;

    /// Begins to open a model's files; [`Backend::load_more`] reads it.
    fn load(&mut self, plan: LoadPlan) -> Result<ModelId, Error>;

    /// Begins to read one more piece, and returns while it is read, beside the steps of other models. One
    /// model is read at a time: another may be, once this one is ready or unloaded, or while it is `Opening`.
    fn load_more(&mut self, model: ModelId) -> Result<LoadStep, Error>;

    /// Frees a model, loading or ready, and everything it holds; returns while it is freed.
    fn unload(&mut self, model: ModelId) -> Result<(), Error>;

    /// Allocates a slab of empty slots, each of `capacity` tokens.
    ///
    /// # Errors
    /// `KvShortage`: the device has no memory for it now.
    fn open_slab(&mut self, model: ModelId, slab: u32, capacity: u32, slots: u32) -> Result<(), Error>;

    /// Frees a slab.
    fn close_slab(&mut self, model: ModelId, slab: u32) -> Result<(), Error>;

    /// Overwrites the first `tokens` of a slot with zeros, so that nothing of them reaches another sequence.
    fn clear_slot(&mut self, model: ModelId, slot: SlotId, tokens: u32) -> Result<(), Error>;

    /// Copies the first `tokens` of one slot, which are all it has, into a clear one, checkpoints included.
    fn copy_slot(&mut self, model: ModelId, from: SlotId, to: SlotId, tokens: u32) -> Result<(), Error>;

    /// Cuts a slot of `held` tokens back to its first `tokens`, overwrites the others with zeros, and drops
    /// checkpoints beyond. With recurrent states, one must be at this length.
    fn truncate(&mut self, model: ModelId, slot: SlotId, held: u32, tokens: u32)
    -> Result<(), TruncateError>;

    /// Saves the recurrent states of a slot that has `tokens`, so that a cache parked from it can be restored
    /// at this length; see [`add_checkpoint`] for those that are dropped.
    fn checkpoint(&mut self, model: ModelId, slot: SlotId, tokens: u32) -> Result<(), Error>;

    /// Cuts a segment of a parked cache in two, for all caches that have it, so that another one may have the
    /// first part as its base. It holds the segment twice for a moment.
    fn split_parked(&mut self, model: ModelId, at: Base) -> Result<(), Error>;

    /// Copies what a slot has after the base out: a parked cache of the slot's exact length, with one
    /// checkpoint more at its end. The slot keeps its tokens, but no checkpoint.
    fn park(&mut self, model: ModelId, parking: Parking) -> Result<(), Error>;

    /// Parks a slot and frees its slab, in which no other slot is in use: piece by piece, so that the device
    /// never holds both whole. Where it fails, nothing is parked, and the slab has yet to be closed.
    fn park_slab(&mut self, model: ModelId, parking: Parking) -> Result<(), Error>;

    /// Copies the first tokens of a parked cache over what a slot has, as far as it does not have them, with
    /// the checkpoints up to there. With recurrent states, one of them must be at this length.
    fn restore(&mut self, model: ModelId, restoring: Restoring) -> Result<(), Error>;

    /// Frees what no other parked cache has of one.
    fn drop_parked(&mut self, model: ModelId, parked: ParkedId) -> Result<(), Error>;

    /// Returns the segments of a parked cache, with the checkpoints that it has, to be read off this thread.
    /// They stay what they are, and take their memory until they are dropped, whatever becomes of the cache.
    /// An error leaves the model as it was.
    fn export(&self, model: ModelId, parked: ParkedId) -> Result<Vec<KvSegment>, Error>;

    /// Makes a parked cache of segments that were exported, or built by [`Backend::kv_builder`]: it links
    /// them in, and copies nothing.
    ///
    /// # Errors
    /// They are not of this model. Then nothing is imported, and the model is as it was.
    fn import(&mut self, model: ModelId, importing: Importing) -> Result<(), ImportError>;

    /// Returns what makes arrays for [`Backend::import`] on other threads.
    fn kv_builder(&self) -> Arc<dyn BuildKv>;

    /// Starts a step and returns while it runs. The last one must have been collected.
    fn launch(&mut self, model: ModelId, step: Step) -> Result<(), Error>;

    /// Says what the rows of the step may draw that wait for it, in their order, and returns while the step
    /// runs; None is everything. To be called once between launch and collect, if a row waits.
    fn draw(&mut self, model: ModelId, masks: Vec<Option<TokenSet>>) -> Result<(), Error>;

    /// Waits for the step and returns one result for each row with an output, in the order of the spans.
    fn collect(&mut self, model: ModelId) -> Result<Vec<RowResult>, Error>;

    /// Returns memory that is cached for reuse to the system.
    fn trim(&mut self) -> Result<(), Error>;

    /// Returns the device's memory counts.
    fn memory(&self) -> DeviceMemory;
}
