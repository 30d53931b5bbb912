//! KV caches of one model: slabs `[slots, 2 * kv_heads, capacity, head_dim]` per layer, keys in the first
//! half of the heads and values in the second, so that one update writes both; and parked caches, which
//! are copies of one slot at its exact length.
//!
//! Slabs are updated in place, which MLX does only while nobody else holds a handle of the array: between
//! steps nothing does, and within a layer all writes come before all reads.

use std::collections::BTreeMap;

use mlx_rs::error::{Exception, Result};
use mlx_rs::ops::indexing::{TryIndexMutOp, TryIndexOp};
use mlx_rs::transforms::eval;
use mlx_rs::{Array, Dtype, fast, ops};

use crate::backend::{ParkedId, SlotId};
use crate::device::batch::{Batch, Chunk, Group, GroupWrite};
use crate::device::dim;
use crate::device::ffi::{AttentionShape, Kernels};
use crate::device::layers::{Ops, Rope, Rotation};

/// The shape of a model's KV cache.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KvShape {
    pub(crate) layers: usize,
    pub(crate) kv_heads: i32,
    pub(crate) head_dim: i32,
    pub(crate) dtype: Dtype,
    pub(crate) ops: Ops,
}

impl KvShape {
    /// The operation that does all of attention, where there is one for these sizes.
    pub(crate) fn kernels(&self) -> Option<Kernels> {
        match self.ops.for_heads(self.head_dim) {
            Ops::Kernels(kernels) => Some(kernels),
            Ops::Composed | Ops::Fused => None,
        }
    }

    /// Bytes one token takes in all layers.
    pub(crate) fn bytes_per_token(&self) -> u64 {
        let item: u64 = if self.dtype == Dtype::Float32 { 4 } else { 2 };
        2 * self.layers as u64
            * u64::from(self.kv_heads.unsigned_abs())
            * u64::from(self.head_dim.unsigned_abs())
            * item
    }
}

/// All KV caches of one model.
#[derive(Debug)]
pub(crate) struct Kv {
    shape: KvShape,
    slabs: BTreeMap<u32, Vec<Array>>,
    parked: BTreeMap<ParkedId, Vec<Array>>,
    parked_next: u64,
}

impl Kv {
    /// No slab yet.
    pub(crate) fn new(shape: KvShape) -> Self {
        Self { shape, slabs: BTreeMap::new(), parked: BTreeMap::new(), parked_next: 0 }
    }

    pub(crate) fn shape(&self) -> &KvShape {
        &self.shape
    }

    pub(crate) fn open(&mut self, slab: u32, capacity: u32, slots: u32) -> Result<()> {
        let KvShape { layers, kv_heads, head_dim, dtype, .. } = self.shape;
        let shape = [dim(slots), 2 * kv_heads, dim(capacity), head_dim];
        let arrays = (0..layers).map(|_| ops::zeros_dtype(&shape, dtype)).collect::<Result<Vec<_>>>()?;
        eval(&arrays)?;
        self.slabs.insert(slab, arrays);
        Ok(())
    }

    pub(crate) fn close(&mut self, slab: u32) {
        self.slabs.remove(&slab);
    }

    /// Writes zeros over the first `tokens` of a slot.
    pub(crate) fn clear(&mut self, slot: SlotId, tokens: u32) -> Result<()> {
        let zero = ops::zeros_dtype(&[1], self.shape.dtype)?;
        self.write_slot(slot, tokens, |_, _| Ok(zero.clone()))
    }

    /// Copies the first `tokens` of a slot into another one.
    pub(crate) fn copy(&mut self, from: SlotId, to: SlotId, tokens: u32) -> Result<()> {
        let content = self.read_slot(from, tokens)?;
        self.write_slot(to, tokens, |layer, _| Ok(content[layer].clone()))
    }

    /// Copies the first `tokens` of a slot out.
    pub(crate) fn park(&mut self, slot: SlotId, tokens: u32) -> Result<ParkedId> {
        let content = self.read_slot(slot, tokens)?;
        let id = ParkedId(self.parked_next);
        self.parked_next += 1;
        self.parked.insert(id, content);
        Ok(id)
    }

    /// Copies the first `tokens` of a parked cache into a slot.
    pub(crate) fn restore(&mut self, parked: ParkedId, tokens: u32, slot: SlotId) -> Result<()> {
        let Some(content) = self.parked.remove(&parked) else { return Ok(()) };
        let written =
            self.write_slot(slot, tokens, |layer, _| content[layer].try_index((.., .., ..dim(tokens), ..)));
        self.parked.insert(parked, content);
        written
    }

    pub(crate) fn drop_parked(&mut self, parked: ParkedId) {
        self.parked.remove(&parked);
    }

    /// `[1, 2 * kv_heads, tokens, head_dim]` of every layer, as copies: a lazy view would keep the slab's
    /// handle and turn its next update into a copy of the whole.
    fn read_slot(&self, slot: SlotId, tokens: u32) -> Result<Vec<Array>> {
        let (place, tokens) = (dim(slot.slot), dim(tokens));
        // Adding zero makes an array of its own, where `contiguous` may hand back a view.
        let zero = ops::zeros_dtype(&[1], self.shape.dtype)?;
        let copies = self.slabs[&slot.slab]
            .iter()
            .map(|slab| slab.try_index((place..place + 1, .., ..tokens, ..))?.add(&zero))
            .collect::<Result<Vec<_>>>()?;
        eval(&copies)?;
        Ok(copies)
    }

    fn write_slot(
        &mut self,
        slot: SlotId,
        tokens: u32,
        content: impl Fn(usize, &KvShape) -> Result<Array>,
    ) -> Result<()> {
        let (place, tokens) = (dim(slot.slot), dim(tokens));
        let Some(slabs) = self.slabs.get_mut(&slot.slab) else { return Ok(()) };
        for (layer, slab) in slabs.iter_mut().enumerate() {
            slab.try_index_mut((place..place + 1, .., ..tokens, ..), &content(layer, &self.shape)?)?;
        }
        eval(&*slabs)
    }

    /// The slabs that a step of this batch changes; they are outputs of the step.
    pub(crate) fn touched(&self, batch: &Batch) -> Vec<&Array> {
        batch.slabs.iter().flat_map(|slab| &self.slabs[slab]).collect()
    }

    /// Attention of a layer's new tokens: `qkv` is `[tokens, (heads + 2 * kv_heads) * head_dim]`. Turns queries
    /// and keys, writes keys and values to their slots, and returns `[tokens, heads * head_dim]`.
    pub(crate) fn attend(
        &mut self,
        layer: usize,
        batch: &Batch,
        qkv: &Array,
        (rope, rotation): (&Rope, &Rotation),
    ) -> Result<Array> {
        let KvShape { kv_heads, head_dim, .. } = self.shape;
        let heads = qkv.dim(1) / head_dim - 2 * kv_heads;
        if let (Some(kernels), Rotation::Angles { cos, sin }) = (self.shape.kernels(), rotation) {
            let shape = AttentionShape {
                heads,
                kv_heads,
                head_dim,
                rotated: head_dim,
                traditional: i32::from(rope.traditional),
                scale: self.scale(),
                window: 0,
            };
            return self.attend_at_once(layer, batch, (kernels, &shape), (qkv, cos, sin));
        }
        let all = qkv.reshape(&[qkv.dim(0), heads + 2 * kv_heads, head_dim])?;
        let rotated = heads + kv_heads;
        let turned = rope.apply(&all.try_index((.., ..rotated))?, rotation)?;
        let (queries, keys) = (turned.try_index((.., ..heads))?, turned.try_index((.., heads..))?);
        let new = ops::concatenate(&[keys, all.try_index((.., rotated..))?], 1)?;
        self.attend_by_groups(layer, batch, &queries, &new)
    }

    /// All of it in one operation of ours.
    fn attend_at_once(
        &mut self,
        layer: usize,
        batch: &Batch,
        (kernels, shape): (Kernels, &AttentionShape),
        inputs: (&Array, &Array, &Array),
    ) -> Result<Array> {
        let missing = || Exception::custom("a step names a slab that is not open");
        let slabs = batch.slabs.iter().map(|slab| self.slabs.get(slab)?.get(layer).cloned());
        let slabs = slabs.collect::<Option<Vec<Array>>>().ok_or_else(missing)?;
        let (out, changed) = kernels.attend(inputs, &slabs, shape, &batch.spans)?;
        for (&slab, changed) in batch.slabs.iter().zip(changed) {
            // The old handles go here and with `slabs`: then the update is in place.
            *self.slab_mut(slab, layer).ok_or_else(missing)? = changed;
        }
        Ok(out)
    }

    /// In MLX's operations: one write and one launch for each group, and for each chunk.
    fn attend_by_groups(
        &mut self,
        layer: usize,
        batch: &Batch,
        queries: &Array,
        new: &Array,
    ) -> Result<Array> {
        for group in &batch.groups {
            self.write_group(layer, group, new)?;
        }
        for chunk in &batch.chunks {
            self.write_chunk(layer, chunk, new)?;
        }
        let groups = batch.groups.iter().map(|group| self.attend_group(layer, group, queries));
        let chunks = batch.chunks.iter().map(|chunk| self.attend_chunk(layer, chunk, queries));
        let outputs = groups.chain(chunks).collect::<Result<Vec<_>>>()?;
        match outputs.as_slice() {
            [one] => Ok(one.clone()),
            many => ops::concatenate(many, 0),
        }
    }

    fn slab_mut(&mut self, slab: u32, layer: usize) -> Option<&mut Array> {
        self.slabs.get_mut(&slab).and_then(|layers| layers.get_mut(layer))
    }

    fn write_group(&mut self, layer: usize, group: &Group, new: &Array) -> Result<()> {
        let KvShape { kv_heads, head_dim, .. } = self.shape;
        let rows = new.try_index(group.row..group.row + group.rows)?;
        let Some(slab) = self.slab_mut(group.slab, layer) else { return Ok(()) };
        match &group.write {
            GroupWrite::One(slot, position) => {
                let rows = rows.reshape(&[1, 2 * kv_heads, 1, head_dim])?;
                slab.try_index_mut((*slot..slot + 1, .., *position..position + 1, ..), &rows)
            }
            GroupWrite::Many(slots, positions) => slab.try_index_mut((slots, .., positions, ..), &rows),
        }
    }

    fn write_chunk(&mut self, layer: usize, chunk: &Chunk, new: &Array) -> Result<()> {
        let rows = new.try_index(chunk.row..chunk.row + chunk.rows)?.swap_axes(0, 1)?.expand_dims(0)?;
        let Some(slab) = self.slab_mut(chunk.slab, layer) else { return Ok(()) };
        let positions = chunk.start..chunk.start + chunk.rows;
        slab.try_index_mut((chunk.slot..chunk.slot + 1, .., positions, ..), &rows)
    }

    /// One launch for all decoding slots of a slab. The heads that share a key head are laid on the query
    /// axis: `[slots, kv_heads, group, head_dim]`, so that no key is repeated.
    fn attend_group(&self, layer: usize, group: &Group, queries: &Array) -> Result<Array> {
        let KvShape { kv_heads, head_dim, .. } = self.shape;
        let heads = queries.dim(1);
        let slab = &self.slabs[&group.slab][layer];
        let keys = slab.try_index((..group.slots, ..kv_heads, ..group.length, ..))?;
        let values = slab.try_index((..group.slots, kv_heads.., ..group.length, ..))?;
        let mut rows = queries.try_index(group.row..group.row + group.rows)?;
        if let Some((stand_in, _)) = &group.spread {
            rows = rows.take_axis(stand_in, 0)?;
        }
        let rows = rows.reshape(&[group.slots, kv_heads, heads / kv_heads, head_dim])?;
        let out = match &group.mask {
            Some(mask) => fast::scaled_dot_product_attention(rows, keys, values, self.scale(), mask, None),
            None => fast::scaled_dot_product_attention(rows, keys, values, self.scale(), None, None),
        }?;
        let out = out.reshape(&[group.slots, heads * head_dim])?;
        match &group.spread {
            Some((_, slots)) => out.take_axis(slots, 0),
            None => Ok(out),
        }
    }

    /// One sequence's chunk against its own slot.
    fn attend_chunk(&self, layer: usize, chunk: &Chunk, queries: &Array) -> Result<Array> {
        let KvShape { kv_heads, head_dim, .. } = self.shape;
        let heads = queries.dim(1);
        let slab = &self.slabs[&chunk.slab][layer];
        let (slots, length) = (chunk.slot..chunk.slot + 1, chunk.start + chunk.rows);
        let keys = slab.try_index((slots.clone(), ..kv_heads, ..length, ..))?;
        let values = slab.try_index((slots, kv_heads.., ..length, ..))?;
        let rows = queries.try_index(chunk.row..chunk.row + chunk.rows)?.swap_axes(0, 1)?.expand_dims(0)?;
        let causal = fast::ScaledDotProductAttentionMask::Causal;
        fast::scaled_dot_product_attention(rows, keys, values, self.scale(), Some(causal), None)?
            .swap_axes(1, 2)?
            .reshape(&[chunk.rows, heads * head_dim])
    }

    #[allow(clippy::cast_precision_loss, reason = "head_dim is a few hundred at most")]
    fn scale(&self) -> f32 {
        (self.shape.head_dim as f32).sqrt().recip()
    }
}
