//! The border between the engine and a device: slots and slabs of KV cache, steps, and loads that go on a little
//! at a time. Decisions are the engine's; a backend only carries them out. Not `Send` on purpose: MLX
//! lives on one thread.

use std::path::PathBuf;
use std::sync::Arc;

use crate::error::Error;
use crate::ids::ModelName;

/// A resident or loading model, as its backend numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ModelId(pub u32);

/// A place in a KV slab.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotId {
    /// The slab, as the engine numbers it.
    pub slab: u32,
    /// The place in it.
    pub slot: u32,
}

/// Marks that a slot has at most, beside that of its end.
pub const MARKS_MAX: usize = 4;

/// Adds a mark at the end of those that a slot has.
pub fn add_mark<M>(marks: &mut Vec<M>, mark: M) {
    if marks.len() == MARKS_MAX {
        marks.remove(1);
    }
    marks.push(mark);
}

/// A parked KV cache: what a sequence that does not run left behind, at its exact length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ParkedId(pub u64);

/// Facts of a model that is ready to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelShape {
    /// Tokens a sequence may have.
    pub context_length: u32,
    /// Tokens in its vocabulary.
    pub vocabulary_size: u32,
    /// Bytes one token takes in the KV cache, all layers together.
    pub kv_bytes_per_token: u64,
    /// Bytes of what a sequence has whatever its length: the states of recurrent layers. Where there are some, a cache
    /// cannot be cut back to fewer tokens, but for the lengths at which it was marked.
    pub state_bytes: u64,
    /// Bytes of its weights.
    pub weight_bytes: u64,
    /// Weights, counted as numbers.
    pub parameter_count: u64,
    /// Tokens that a step's prefill had better have: fewer take about as long.
    pub prefill_tokens_min: u32,
    /// How it computes, in words.
    pub computes_in: String,
}

/// How far a load is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LoadStep {
    /// Weights are being read; bytes of the files.
    Reading {
        /// Bytes read.
        done_bytes: u64,
        /// Bytes to read.
        total_bytes: u64,
    },
    /// The model can run.
    Ready(ModelShape),
}

/// One forward of one model: spans of many sequences, packed on the token axis.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// Spans of one token first, in the order of their slots; then the longer ones.
    pub spans: Vec<Span>,
}

/// One sequence's tokens in a step.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// Where its KV cache is.
    pub slot: SlotId,
    /// Position of its first token, which is the length of its cache before the step.
    pub start: u32,
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// What is wanted of it.
    pub output: SpanOutput,
}

/// What a step gives back for a span.
#[derive(Clone, Debug, PartialEq)]
pub enum SpanOutput {
    /// Nothing: more of the prompt follows.
    None,
    /// A token after the span's last one.
    Sample(Box<Sample>),
    /// The log-probability of given tokens after the span's positions from `first` on.
    Score {
        /// The first position in the span with a next token to score.
        first: u32,
        /// The tokens that come next, one for each position from `first`; not empty.
        next: Vec<u32>,
        /// Alternatives to return.
        top: u32,
    },
}

/// How one token is drawn; see `Sampling` for the values.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// 0 is greedy.
    pub temperature: f32,
    /// 1 is off.
    pub top_p: f32,
    /// 0 is off.
    pub top_k: u32,
    /// 0 is off.
    pub min_p: f32,
    /// The uniform number in [0, 1) at which the distribution is inverted.
    pub uniform: f32,
    /// Changes to single logits: bias and penalties.
    pub edits: Vec<LogitEdit>,
    /// Remove the likeliest candidates this time.
    pub xtc: Option<Xtc>,
    /// Return raw logprobs with so many alternatives.
    pub top_logprobs: Option<u32>,
}

impl Default for Sample {
    /// The likeliest token.
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            uniform: 0.0,
            edits: Vec::new(),
            xtc: None,
            top_logprobs: None,
        }
    }
}

/// Of the candidates that are at least so likely, only the least likely stays (XTC).
#[derive(Clone, Debug, PartialEq)]
pub struct Xtc {
    /// The likelihood, in [0, 0.5].
    pub threshold: f32,
    /// Tokens that are never removed.
    pub spared: Arc<[u32]>,
}

/// One logit's change: `l += bias`, then `l = l < 0 ? l * repetition : l / repetition`, then `l -= subtract`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LogitEdit {
    /// The token.
    pub token: u32,
    /// Logit bias; 0 is none.
    pub bias: f32,
    /// Repetition penalty; 1 is none.
    pub repetition: f32,
    /// Presence and frequency penalties together; 0 is none.
    pub subtract: f32,
}

/// What came of a span.
#[derive(Clone, Debug, PartialEq)]
pub enum SpanResult {
    /// Nothing was asked for.
    None,
    /// The drawn token, with logprobs if asked for.
    Token(u32, Option<TokenLogprobs>),
    /// One entry for each next token.
    Scores(Vec<TokenLogprobs>),
    /// The logits were not finite; the sequence cannot go on.
    NotFinite,
}

/// What the device counts, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceMemory {
    /// In use.
    pub active: u64,
    /// The most there was.
    pub peak: u64,
    /// Kept for reuse.
    pub cache: u64,
}

/// The raw log-probability of a token and of the likeliest ones.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// The token that was chosen, or that came next.
    pub chosen: (u32, f32),
    /// Best first.
    pub top: Vec<(u32, f32)>,
}

/// The numbers a model computes with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ComputeDtype {
    /// float32 on the CPU, as stored on a GPU.
    #[default]
    Auto,
    /// 32-bit floats.
    Float32,
    /// bfloat16.
    Bfloat16,
    /// IEEE half precision.
    Float16,
}

/// How the numbers of a KV cache are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvDtype {
    /// As the configuration says.
    #[default]
    Auto,
    /// As the model computes.
    Compute,
    /// 8-bit integers, with a scale for each token and head.
    Int8,
}

/// A model to make resident.
#[derive(Clone, Debug)]
pub struct LoadSpec {
    /// Its name.
    pub model: ModelName,
    /// The folder with its config.json and safetensors files.
    pub folder: PathBuf,
    /// Identifies the weights.
    pub revision: String,
    /// The numbers to compute with.
    pub dtype: ComputeDtype,
    /// How its KV cache is kept.
    pub kv: KvDtype,
}

/// What the engine runs on; fixed for its life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Such as "cpu" or "Apple M3 Ultra".
    pub device: String,
    /// The version of MLX.
    pub mlx_version: String,
    /// Bytes for weights and KV caches that may be used.
    pub budget_bytes: u64,
    /// Values of model_type that can be loaded.
    pub architectures: Vec<&'static str>,
}

/// A device that runs models. An error of anything below `load` means that the model can no longer be
/// trusted; the engine ends its sequences and unloads it.
pub trait Backend {
    /// Bytes that a load of this model would take once it is done, where so many are free.
    fn estimate(&mut self, spec: &LoadSpec, free_bytes: u64) -> Result<u64, Error>;

    /// Opens a model; [`Backend::load_more`] reads it.
    fn load(&mut self, spec: &LoadSpec, free_bytes: u64) -> Result<ModelId, Error>;

    /// Reads one more piece.
    fn load_more(&mut self, model: ModelId) -> Result<LoadStep, Error>;

    /// Frees a model, loading or ready, and everything it holds.
    fn unload(&mut self, model: ModelId) -> Result<(), Error>;

    /// Makes a slab of empty slots.
    fn open_slab(&mut self, model: ModelId, slab: u32, capacity: u32, slots: u32) -> Result<(), Error>;

    /// Frees a slab.
    fn close_slab(&mut self, model: ModelId, slab: u32) -> Result<(), Error>;

    /// Overwrites the first `tokens` of a slot with zeros, so that nothing of them reaches another sequence.
    fn clear_slot(&mut self, model: ModelId, slot: SlotId, tokens: u32) -> Result<(), Error>;

    /// Copies the first `tokens` of one slot into another.
    fn copy_slot(&mut self, model: ModelId, from: SlotId, to: SlotId, tokens: u32) -> Result<(), Error>;

    /// Keeps the states of a slot that has so many tokens, so that a cache parked from it can be restored at this
    /// length. Of more than [`MARKS_MAX`] the second goes: the first stands after what all turns of a conversation
    /// begin with.
    fn mark(&mut self, model: ModelId, slot: SlotId, tokens: u32) -> Result<(), Error>;

    /// Copies all of a slot, which has so many tokens, out, at their exact length, with its marks and one for
    /// its end.
    fn park(&mut self, model: ModelId, slot: SlotId, tokens: u32) -> Result<ParkedId, Error>;

    /// Copies the first `tokens` of a parked cache into a slot, with the marks up to there. Where there are states, there
    /// must be a mark at this length.
    fn restore(&mut self, model: ModelId, parked: ParkedId, tokens: u32, slot: SlotId) -> Result<(), Error>;

    /// Frees a parked cache.
    fn drop_parked(&mut self, model: ModelId, parked: ParkedId) -> Result<(), Error>;

    /// Starts a step and returns while it runs. The last one has been collected.
    fn launch(&mut self, model: ModelId, step: &Step) -> Result<(), Error>;

    /// Waits for the step and returns one result for each span.
    fn collect(&mut self, model: ModelId) -> Result<Vec<SpanResult>, Error>;

    /// Gives the memory that it keeps for reuse back to the system.
    fn trim(&mut self) -> Result<(), Error>;

    /// What the device counts.
    fn memory(&self) -> DeviceMemory;
}
