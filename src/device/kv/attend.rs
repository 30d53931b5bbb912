//! Attention over the slabs: new keys and values are written, then queries look at what they may see. Our own
//! operation does all of a step at once; MLX's do it with one write and one launch for each group of
//! decoding slots, and for each chunk.

use mlx_rs::error::{Exception, Result};
use mlx_rs::ops::indexing::{TryIndexMutOp, TryIndexOp};
use mlx_rs::{Array, Dtype, fast, ops};

use super::{Kv, KvShape};
use crate::device::batch::{Batch, Chunk, Group, GroupWrite};
use crate::device::cuda;
use crate::device::ffi::{AttentionShape, Kernels};
use crate::device::layers::{Ops, Rope, Rotation};

/// The largest 8-bit number that is used, so that both signs have the same.
const INT8_MAX: f32 = 127.0;

impl Kv {
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
        let &KvShape { kv_heads, head_dim, .. } = &self.shape;
        let heads = qkv.dim(1) / head_dim - 2 * kv_heads;
        if let (Some(kernels), Rotation::Angles { cos, sin }) = (self.shape.kernels(), rotation) {
            let shape = AttentionShape {
                heads,
                kv_heads,
                head_dim,
                rotated: head_dim,
                traditional: i32::from(rope.traditional),
                scale: self.scale(),
                window: self.shape.windows[layer],
            };
            return self.attend_at_once(layer, batch, (kernels, &shape), (qkv, cos, sin));
        }
        if batch.chunks.is_empty()
            && !rope.traditional
            && let Some(out) = self.decode_on_cuda(layer, batch, qkv, rope)?
        {
            return Ok(out);
        }
        let all = qkv.reshape(&[qkv.dim(0), heads + 2 * kv_heads, head_dim])?;
        let rotated = heads + kv_heads;
        let turned = rope.apply(&all.try_index((.., ..rotated))?, rotation)?;
        let (queries, keys) = (turned.try_index((.., ..heads))?, turned.try_index((.., heads..))?);
        let new = ops::concatenate(&[keys, all.try_index((.., rotated..))?], 1)?;
        self.attend_by_groups(layer, batch, &queries, &new)
    }

    /// Attention of a step that only decodes, in our own kernels: one that turns and writes, in place, and one
    /// that attends, for each group. None where they are not.
    fn decode_on_cuda(&self, layer: usize, batch: &Batch, qkv: &Array, rope: &Rope) -> Result<Option<Array>> {
        let mut outputs = Vec::new();
        for group in &batch.groups {
            let (Some(places), Some(slabs)) = (&group.places, self.slabs.get(&group.slab)) else {
                return Ok(None);
            };
            let slab = &slabs[layer];
            let part = qkv.try_index(group.row..group.row + group.rows)?;
            let qkv = if group.rows == qkv.dim(0) { qkv } else { &part };
            let queries = cuda::rotate_write(qkv, slab, places, &rope.wavelengths, self.shape.heads)?;
            outputs.push(cuda::attend(&queries, slab, places)?);
        }
        match outputs.as_slice() {
            [] => Ok(None),
            [one] => Ok(Some(one.clone())),
            many => ops::concatenate(many, 0).map(Some),
        }
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
        let planes = self.encode(new)?;
        for (plane, new) in planes.iter().enumerate() {
            let index = layer + plane * self.shape.windows.len();
            for group in &batch.groups {
                self.write_group(index, group, new)?;
            }
            for chunk in &batch.chunks {
                self.write_chunk(index, chunk, new)?;
            }
        }
        let window = self.shape.windows[layer];
        let view = batch.windows.iter().position(|&known| known == window).unwrap_or(0);
        let groups = batch.groups.iter().map(|group| self.attend_group(layer, view, group, queries));
        let chunks = batch.chunks.iter().map(|chunk| self.attend_chunk(layer, view, chunk, queries));
        let outputs = groups.chain(chunks).collect::<Result<Vec<_>>>()?;
        match outputs.as_slice() {
            [one] => Ok(one.clone()),
            many => ops::concatenate(many, 0),
        }
    }

    fn slab_mut(&mut self, slab: u32, index: usize) -> Option<&mut Array> {
        self.slabs.get_mut(&slab).and_then(|arrays| arrays.get_mut(index))
    }

    /// What is kept of new keys and values, an array for each plane.
    fn encode(&self, new: &Array) -> Result<Vec<Array>> {
        if !self.shape.int8 {
            return Ok(vec![new.clone()]);
        }
        let most = new.abs()?.max_axis(-1, true)?.as_dtype(Dtype::Float32)?;
        let scales =
            ops::maximum(most.divide(Array::from_f32(INT8_MAX))?, Array::from_f32(f32::MIN_POSITIVE))?;
        // In the dtype that they are kept in, so that rounding errors do not add up.
        let scales = scales.as_dtype(self.shape.dtype)?;
        let limit = |x: Array| ops::clip(&x, (Array::from_f32(-INT8_MAX), Array::from_f32(INT8_MAX)));
        let numbers = new.as_dtype(Dtype::Float32)?.divide(scales.as_dtype(Dtype::Float32)?)?.round(None)?;
        Ok(vec![limit(numbers)?.as_dtype(Dtype::Int8)?, scales])
    }

    /// Keys (or values) of some slots and positions, as the model computes: `[slots, kv_heads, positions, head_dim]`.
    fn decode(
        &self,
        (slab, layer): (u32, usize),
        slots: std::ops::Range<i32>,
        values: bool,
        positions: std::ops::Range<i32>,
    ) -> Result<Array> {
        let kv_heads = self.shape.kv_heads;
        let heads = if values { kv_heads..2 * kv_heads } else { 0..kv_heads };
        let part = |index: usize| {
            self.slabs[&slab][index].try_index((slots.clone(), heads.clone(), positions.clone(), ..))
        };
        let numbers = part(layer)?;
        if !self.shape.int8 {
            return Ok(numbers);
        }
        numbers.as_dtype(self.shape.dtype)?.multiply(part(layer + self.shape.windows.len())?)
    }

    fn write_group(&mut self, index: usize, group: &Group, new: &Array) -> Result<()> {
        let rows = new.try_index(group.row..group.row + group.rows)?;
        let Some(slab) = self.slab_mut(group.slab, index) else { return Ok(()) };
        match &group.write {
            GroupWrite::One(slot, position) => {
                let rows = rows.reshape(&[1, rows.dim(1), 1, rows.dim(2)])?;
                slab.try_index_mut((*slot..slot + 1, .., *position..position + 1, ..), &rows)
            }
            GroupWrite::Many(slots, positions) => slab.try_index_mut((slots, .., positions, ..), &rows),
        }
    }

    fn write_chunk(&mut self, index: usize, chunk: &Chunk, new: &Array) -> Result<()> {
        let rows = new.try_index(chunk.row..chunk.row + chunk.rows)?.swap_axes(0, 1)?.expand_dims(0)?;
        let Some(slab) = self.slab_mut(chunk.slab, index) else { return Ok(()) };
        let positions = chunk.start..chunk.start + chunk.rows;
        slab.try_index_mut((chunk.slot..chunk.slot + 1, .., positions, ..), &rows)
    }

    /// One launch for all decoding slots of a slab. On the CPU the heads that share a key head are laid on the
    /// query axis, `[slots, kv_heads, group, head_dim]`, so that no key is repeated. GPUs have kernels for one query
    /// a head; with more, CUDA would have cuDNN plan anew for every length, 20 ms each time.
    fn attend_group(&self, layer: usize, view: usize, group: &Group, queries: &Array) -> Result<Array> {
        let &KvShape { kv_heads, head_dim, .. } = &self.shape;
        let heads = queries.dim(1);
        if let Some(places) = &group.places {
            let rows = queries.try_index(group.row..group.row + group.rows)?;
            return cuda::attend(&rows, &self.slabs[&group.slab][layer], places);
        }
        let view = &group.views[view];
        let (place, positions) = ((group.slab, layer), view.from..group.length);
        let keys = self.decode(place, 0..group.slots, false, positions.clone())?;
        let values = self.decode(place, 0..group.slots, true, positions)?;
        let mut rows = queries.try_index(group.row..group.row + group.rows)?;
        if let Some((stand_in, _)) = &group.spread {
            rows = rows.take_axis(stand_in, 0)?;
        }
        let rows = match self.shape.ops {
            Ops::Fused => rows.reshape(&[group.slots, heads, 1, head_dim]),
            Ops::Kernels(_) | Ops::Composed => {
                rows.reshape(&[group.slots, kv_heads, heads / kv_heads, head_dim])
            }
        }?;
        let out = match &view.mask {
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
    fn attend_chunk(&self, layer: usize, view: usize, chunk: &Chunk, queries: &Array) -> Result<Array> {
        let heads = queries.dim(1);
        let view = &chunk.views[view];
        let (place, positions) = ((chunk.slab, layer), view.from..chunk.start + chunk.rows);
        let slot = chunk.slot..chunk.slot + 1;
        let keys = self.decode(place, slot.clone(), false, positions.clone())?;
        let values = self.decode(place, slot, true, positions)?;
        let rows = queries.try_index(chunk.row..chunk.row + chunk.rows)?.swap_axes(0, 1)?.expand_dims(0)?;
        let causal = fast::ScaledDotProductAttentionMask::Causal;
        let out = match &view.mask {
            Some(mask) => fast::scaled_dot_product_attention(rows, keys, values, self.scale(), mask, None),
            None => fast::scaled_dot_product_attention(rows, keys, values, self.scale(), Some(causal), None),
        }?;
        out.swap_axes(1, 2)?.reshape(&[chunk.rows, heads * self.shape.head_dim])
    }

    #[allow(clippy::cast_precision_loss, reason = "head_dim is a few hundred at most")]
    fn scale(&self) -> f32 {
        (self.shape.head_dim as f32).sqrt().recip()
    }
}

#[cfg(test)]
mod tests {
    use mlx_rs::memory;
    use mlx_rs::transforms::eval;

    use super::*;
    use crate::backend::{SlotId, Span, SpanOutput, Step};
    use crate::device::layers::Ops;

    /// What one step of one token adds to the memory in use, in a slab of 64 MiB.
    fn step_bytes(ops: Ops) -> usize {
        let shape = KvShape {
            windows: vec![0, 0],
            heads: 4,
            kv_heads: 2,
            head_dim: 64,
            dtype: Dtype::Float32,
            int8: false,
            ops: ops.for_attention(64, false),
        };
        let rope = Rope::new(64, 10_000.0, false, None, shape.ops).unwrap();
        let mut kv = Kv::new(shape);
        kv.open(0, 1 << 14, 4).unwrap();
        let mut most = 0;
        for start in 0..3 {
            let slot = SlotId { slab: 0, slot: 2 };
            let span = Span { slot, start, tokens: vec![1], output: SpanOutput::None };
            let batch = Batch::new(&Step { spans: vec![span] }, kv.shape());
            let rotation = rope.rotation(&batch.positions);
            let before = memory::active_memory().unwrap();
            memory::reset_peak_memory().unwrap();
            let qkv = ops::ones::<f32>(&[1, 8 * 64]).unwrap();
            let layers = (0..2).map(|layer| kv.attend(layer, &batch, &qkv, (&rope, &rotation)).unwrap());
            let outputs: Vec<Array> = layers.collect();
            eval(outputs.iter().chain(kv.touched(&batch))).unwrap();
            most = most.max(memory::peak_memory().unwrap().saturating_sub(before));
        }
        most
    }

    #[test]
    fn a_slab_is_changed_in_place() {
        let slab = 4 * 4 * (1 << 14) * 64 * 4;
        for ops in [Ops::choose(true, Dtype::Float32), Ops::Composed] {
            let added = step_bytes(ops);
            assert!(added < slab / 4, "{ops:?}: a step takes {added} bytes beside slabs of {slab}");
        }
    }
}
