//! KV caches of one model: slabs of keys and of values `[slots, kv_heads, capacity, head_dim]` per layer;
//! states of fixed size `[slots, ..]` for recurrent layers; and parked caches, which are copies of one slot
//! at its exact length and share what they begin with (`parked`). Storage only: kernel sets attend over it.
//!
//! Keys and values are arrays of their own, because MLX's attention for Metal copies those of several slots
//! unless the heads of a slot lie right before those of the next. Stored in 8 bits, each has a second array:
//! a scale for each token and head.
//!
//! Recurrent states cannot be cut back to fewer tokens. So a slot can have checkpoints, copies of its states,
//! and a cache that is parked from it can be restored at their lengths.
//!
//! Slabs are updated in place, which MLX does only while nobody else holds a handle of the array: between
//! steps nothing does, and within a layer all writes come before all reads. (Our CUDA kernel for decoding
//! writes into them whoever holds them; it needs them contiguous, which they are.)

mod parked;
mod plain;
mod recurrent;
mod shape;
mod tokens;

use std::collections::BTreeMap;
use std::ops::Range;

use mlx_rs::error::{Exception, Result};
use mlx_rs::ops::indexing::{TryIndexMutOp, TryIndexOp};
use mlx_rs::transforms::eval;
use mlx_rs::{Array, ops};

pub(crate) use plain::ArrayBuilder;
pub(crate) use shape::{KvShape, LayerState, StateShape, TokenState, inverse_root};

use shape::ArrayShape;

use crate::backend::{Chains, SlotId, add_checkpoint};
use crate::mlx::{dim, ffi};

/// The recurrent states of a sequence after its first `tokens`.
#[derive(Clone, Debug)]
struct Checkpoint {
    tokens: u32,
    states: Vec<Array>,
}

/// All KV caches of one model.
#[derive(Debug)]
pub(crate) struct Kv {
    shape: KvShape,
    /// Arrays of a slab, layer by layer.
    arrays: Vec<ArrayShape>,
    /// Index of each layer's first array.
    first: Vec<usize>,
    slabs: BTreeMap<u32, Vec<Array>>,
    checkpoints: BTreeMap<SlotId, Vec<Checkpoint>>,
    /// Segments of keys and values `[1, kv_heads, tokens, _]`, array by array; and states.
    parked: Chains<Vec<Array>, Vec<Array>>,
}

impl Kv {
    /// Returns caches without a slab.
    pub(crate) fn new(shape: KvShape) -> Self {
        let arrays = shape.arrays();
        let first = arrays.iter().scan(0, |next, of_layer| {
            let first = *next;
            *next += of_layer.len();
            Some(first)
        });
        Self {
            first: first.collect(),
            arrays: arrays.iter().flatten().cloned().collect(),
            shape,
            slabs: BTreeMap::new(),
            checkpoints: BTreeMap::new(),
            parked: Chains::default(),
        }
    }

    pub(crate) fn shape(&self) -> &KvShape {
        &self.shape
    }

    /// Returns the arrays of slabs that a step changes; they are outputs of the step.
    pub(crate) fn touched<'a>(&'a self, slabs: &'a [u32]) -> impl Iterator<Item = &'a Array> {
        slabs.iter().filter_map(|slab| self.slabs.get(slab)).flatten()
    }

    /// Allocates a slab of `slots`, each of `capacity` tokens, full of zeros.
    pub(crate) fn open(&mut self, slab: u32, capacity: u32, slots: u32) -> Result<()> {
        let zeros = |array: &ArrayShape| match array {
            ArrayShape::PerToken { heads, elements, dtype } => {
                ffi::zeros(&[dim(slots), *heads, dim(capacity), *elements], *dtype)
            }
            ArrayShape::PerSequence(state) => {
                let shape: Vec<i32> =
                    std::iter::once(dim(slots)).chain(state.shape.iter().copied()).collect();
                ffi::zeros(&shape, state.dtype)
            }
        };
        let arrays = self.arrays.iter().map(zeros).collect::<Result<Vec<_>>>()?;
        eval(&arrays)?;
        self.slabs.insert(slab, arrays);
        Ok(())
    }

    /// Removes a slab and returns what it held.
    pub(crate) fn close(&mut self, slab: u32) -> Vec<Array> {
        self.slabs.remove(&slab).unwrap_or_default()
    }

    /// Writes zeros over the first `tokens` of a slot, and over its states.
    pub(crate) fn clear(&mut self, slot: SlotId, tokens: u32) -> Result<()> {
        self.checkpoints.remove(&slot);
        self.reset(slot, 0..tokens, &[])
    }

    /// Cuts a slot of `held` tokens back to `tokens`, and writes zeros over the others. Returns false, and
    /// changes nothing, if recurrent states have no checkpoint at this length.
    pub(crate) fn truncate(&mut self, slot: SlotId, held: u32, tokens: u32) -> Result<bool> {
        if tokens >= held {
            return Ok(true);
        }
        let checkpoints = self.checkpoints.entry(slot).or_default();
        let saved = checkpoints.iter().find(|saved| saved.tokens == tokens).cloned();
        if self.shape.is_recurrent() && saved.is_none() && tokens > 0 {
            return Ok(false);
        }
        checkpoints.retain(|saved| saved.tokens <= tokens);
        let states = saved.map_or_else(Vec::new, |saved| saved.states);
        self.reset(slot, tokens..held, &states)?;
        Ok(true)
    }

    /// Copies the first `tokens` of a slot, which are all of them, into another one. Array by array, so that
    /// no second copy is ever whole.
    pub(crate) fn copy(&mut self, from: SlotId, to: SlotId, tokens: u32) -> Result<()> {
        for (index, array) in self.arrays.clone().iter().enumerate() {
            let part = copied(self.slab_mut(from.slab, index)?, array, from, 0..tokens)?;
            eval([&part])?;
            let slab = self.slab_mut(to.slab, index)?;
            write_part(slab, array, to, 0..tokens, &part)?;
            eval([&*slab])?;
        }
        if let Some(checkpoints) = self.checkpoints.get(&from).cloned() {
            self.checkpoints.insert(to, checkpoints);
        }
        Ok(())
    }

    /// Copies the states of a slot that has `tokens`, so that a cache parked from it can be restored at this
    /// length.
    pub(crate) fn checkpoint(&mut self, slot: SlotId, tokens: u32) -> Result<()> {
        let states = self.read(slot, 0..0, |array| matches!(array, ArrayShape::PerSequence(_)))?;
        add_checkpoint(self.checkpoints.entry(slot).or_default(), Checkpoint { tokens, states });
        Ok(())
    }

    /// Copies some positions of a slot, or its states, out of the arrays that are wanted.
    fn read(
        &self,
        slot: SlotId,
        positions: Range<u32>,
        wanted: fn(&ArrayShape) -> bool,
    ) -> Result<Vec<Array>> {
        let slabs = self.slabs.get(&slot.slab).map_or(&[][..], Vec::as_slice);
        let wanted = slabs.iter().zip(&self.arrays).filter(|(_, array)| wanted(array));
        let copy = |(slab, array)| copied(slab, array, slot, positions.clone());
        let copies = wanted.map(copy).collect::<Result<Vec<_>>>()?;
        eval(&copies)?;
        Ok(copies)
    }

    /// Writes zeros over some positions of a slot, and its states, which begin as zeros.
    fn reset(&mut self, slot: SlotId, positions: Range<u32>, states: &[Array]) -> Result<()> {
        let Some(slab) = self.slabs.get_mut(&slot.slab) else { return Ok(()) };
        let mut states = states.iter();
        for (slab, array) in slab.iter_mut().zip(&self.arrays) {
            match array {
                ArrayShape::PerToken { .. } if positions.is_empty() => {}
                ArrayShape::PerToken { .. } => {
                    let zero = zero(slab)?;
                    write_part(slab, array, slot, positions.clone(), &zero)?;
                }
                ArrayShape::PerSequence(_) => {
                    let state = states.next().map_or_else(|| zero(slab), |state| Ok(state.clone()))?;
                    write_part(slab, array, slot, 0..0, &state)?;
                }
            }
        }
        eval(&*slab)
    }

    /// Returns a layer that stores tokens.
    pub(crate) fn token_state(&self, layer: usize) -> Result<TokenState> {
        match self.shape.layers.get(layer) {
            Some(LayerState::Tokens(state)) => Ok(*state),
            Some(LayerState::Recurrent(_)) | None => Err(Exception::custom("a layer without keys attends")),
        }
    }

    /// Returns a layer's keys and values `[slots, kv_heads, capacity, head_dim]`, for kernels of our own:
    /// those take no 8-bit caches. One array where values are parts of the keys.
    pub(crate) fn token_slab(&self, layer: usize, slab: u32) -> Result<&[Array]> {
        self.arrays_of(layer, slab)
    }

    /// Replaces them. An update is in place only if all other handles of the old arrays are gone when it is
    /// evaluated.
    pub(crate) fn replace_token_slab(
        &mut self,
        layer: usize,
        slab: u32,
        changed: impl Iterator<Item = Array>,
    ) -> Result<()> {
        for (index, changed) in (self.first[layer]..).zip(changed) {
            *self.slab_mut(slab, index)? = changed;
        }
        Ok(())
    }

    /// Returns the arrays of a layer in a slab.
    fn arrays_of(&self, layer: usize, slab: u32) -> Result<&[Array]> {
        let end = self.first.get(layer + 1).copied().unwrap_or(self.arrays.len());
        let arrays = self.slabs.get(&slab).and_then(|arrays| arrays.get(self.first[layer]..end));
        arrays.ok_or_else(|| Exception::custom("a step names a slab that is not open"))
    }

    fn slab_mut(&mut self, slab: u32, index: usize) -> Result<&mut Array> {
        let array = self.slabs.get_mut(&slab).and_then(|arrays| arrays.get_mut(index));
        array.ok_or_else(|| Exception::custom("a step names a slab that is not open"))
    }
}

/// Returns a copy of some positions of a slot, or of its state, in a slab's array.
fn copied(slab: &Array, array: &ArrayShape, slot: SlotId, positions: Range<u32>) -> Result<Array> {
    let place = dim(slot.slot);
    own(&match array {
        ArrayShape::PerToken { .. } => {
            slab.try_index((place..place + 1, .., dim(positions.start)..dim(positions.end), ..))?
        }
        ArrayShape::PerSequence(_) => slab.try_index(place..place + 1)?,
    })
}

/// Returns a zero of an array's type.
fn zero(array: &Array) -> Result<Array> {
    ops::zeros_dtype(&[1], array.dtype())
}

/// Returns a copy of a lazy view, which would keep the array's handle and make its next update a copy of the
/// whole.
fn own(view: &Array) -> Result<Array> {
    // Adding zero makes an array of its own, where `contiguous` may return a view.
    view.add(zero(view)?)
}

/// Writes some positions of a slot, or its state, in a slab's array.
fn write_part(
    slab: &mut Array,
    array: &ArrayShape,
    slot: SlotId,
    positions: Range<u32>,
    content: &Array,
) -> Result<()> {
    let place = dim(slot.slot);
    match array {
        ArrayShape::PerToken { .. } => {
            let positions = dim(positions.start)..dim(positions.end);
            slab.try_index_mut((place..place + 1, .., positions, ..), content)
        }
        ArrayShape::PerSequence(_) => slab.try_index_mut(place..place + 1, content),
    }
}
