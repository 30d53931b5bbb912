//! Attention over the slabs: new keys and values are written, then queries look at what they may see. Our own
//! operation does all of a step at once; MLX's do it with one write and one launch for each group of
//! decoding slots, and for each chunk.

use mlx_rs::error::{Exception, Result};
use mlx_rs::ops::indexing::{TryIndexMutOp, TryIndexOp};
use mlx_rs::{Array, Dtype, fast, ops};

use super::{Kv, LayerState, TokenState};
use crate::mlx::batch::{Batch, Chunk, Group, GroupWrite, View};
use crate::mlx::cuda;
use crate::mlx::ffi::{AttentionShape, AttentionWeights, Kernels};
use crate::mlx::kernels::KernelSet;
use crate::mlx::layers::{Rope, Rotation};

/// The largest 8-bit number that is used, so that both signs have the same.
const INT8_MAX: f32 = 127.0;

/// How a layer looks at its cache, or at another layer's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AttentionCall<'a> {
    /// The layer whose cache it is.
    pub(crate) layer: usize,
    /// Whether the tokens bring keys and values.
    pub(crate) stores: bool,
    pub(crate) weights: AttentionWeights<'a>,
    /// Of the norms.
    pub(crate) eps: f32,
    /// How queries and keys are turned; None: not at all.
    pub(crate) rope: Option<(&'a Rope, &'a Rotation)>,
}

/// What attention in MLX's operations knows of its layer.
struct Layer<'a> {
    state: TokenState,
    /// The first of its arrays in a slab.
    array: usize,
    /// Which of the batch's windows is its own.
    view: usize,
    sinks: Option<&'a Array>,
}

impl Kv {
    /// Attention of a layer's new tokens: `qkv` is `[tokens, (heads + kept) * head_dim]`, or `[tokens, heads *
    /// head_dim]` where they bring no keys. Norms and turns queries and keys, writes keys and values to their slots, and
    /// returns `[tokens, heads * width]`.
    pub(crate) fn attend(&mut self, look: &AttentionCall<'_>, batch: &Batch, qkv: &Array) -> Result<Array> {
        let Some(LayerState::Tokens(state)) = self.shape.layers.get(look.layer) else {
            return Err(Exception::custom("a layer without keys attends"));
        };
        let state = *state;
        if let Some(kernels) = self.shape.kernels() {
            return self.attend_at_once((look, &state), batch, kernels, qkv);
        }
        let heads = qkv.dim(1) / state.head_dim;
        let all = qkv.reshape(&[qkv.dim(0), heads, state.head_dim])?;
        let all = normed(look, &state, all)?;
        let layer = Layer {
            array: self.first[look.layer],
            view: batch.windows.iter().position(|&known| known == state.window).unwrap_or(0),
            sinks: look.weights.sinks,
            state,
        };
        if let (Some((rope, _)), true) = (look.rope, look.stores && batch.chunks.is_empty())
            && rope.is_plain(state.head_dim)
            && let Some(out) = self.decode_on_cuda(&layer, batch, &all, rope)?
        {
            return Ok(out);
        }
        let turning = if look.stores { state.heads + state.kv_heads } else { state.heads };
        let turned = match look.rope {
            Some((rope, rotation)) if turning == heads => rope.apply(&all, rotation)?,
            Some((rope, rotation)) => {
                let turned = rope.apply(&all.try_index((.., ..turning))?, rotation)?;
                ops::concatenate(&[turned, all.try_index((.., turning..))?], 1)?
            }
            None => all,
        };
        if look.stores {
            let new = turned.try_index((.., state.heads..))?;
            self.write_new(&layer, batch, &new)?;
        }
        let queries = turned.try_index((.., ..state.heads))?;
        let groups = batch.groups.iter().map(|group| self.attend_group(&layer, group, &queries));
        let chunks = batch.chunks.iter().map(|chunk| self.attend_chunk(&layer, chunk, &queries));
        joined(&groups.chain(chunks).collect::<Result<Vec<_>>>()?)
    }

    /// Attention of a step that only decodes, in our own kernels: one that turns and writes, in place, and one
    /// that attends, for each group. None where they are not.
    fn decode_on_cuda(
        &self,
        layer: &Layer<'_>,
        batch: &Batch,
        all: &Array,
        rope: &Rope,
    ) -> Result<Option<Array>> {
        let qkv = all.reshape(&[all.dim(0), -1])?;
        let mut outputs = Vec::new();
        for group in &batch.groups {
            let (Some(places), Some(slabs)) = (&group.places, self.slabs.get(&group.slab)) else {
                return Ok(None);
            };
            let slab = &slabs[layer.array];
            let part = qkv.try_index(group.row..group.row + group.rows)?;
            let qkv = if group.rows == qkv.dim(0) { &qkv } else { &part };
            let queries = cuda::rotate_write(qkv, slab, places, &rope.wavelengths, layer.state.heads)?;
            outputs.push(cuda::attend(&queries, slab, places)?);
        }
        if outputs.is_empty() { Ok(None) } else { joined(&outputs).map(Some) }
    }

    /// All of it in one operation of ours.
    fn attend_at_once(
        &mut self,
        (look, state): (&AttentionCall<'_>, &TokenState),
        batch: &Batch,
        kernels: Kernels,
        qkv: &Array,
    ) -> Result<Array> {
        let unturned = Array::from_slice::<f32>(&[], &[qkv.dim(0), 0]);
        let (cos, sin) = match look.rope {
            Some((_, Rotation::Angles { cos, sin })) => (cos, sin),
            Some(_) => return Err(Exception::custom("attention turns by angles")),
            None => (&unturned, &unturned),
        };
        let shape = AttentionShape {
            heads: state.heads,
            kv_heads: state.kv_heads,
            head_dim: state.head_dim,
            rotated: look.rope.map_or(0, |(rope, _)| rope.dims),
            traditional: look.rope.map_or(0, |(rope, _)| i32::from(rope.traditional)),
            window: state.window,
            values_from: state.values_from,
            stores: i32::from(look.stores),
            scale: state.scale,
            softcap: state.softcap,
            eps: look.eps,
        };
        let index = self.first[look.layer];
        let missing = || Exception::custom("a step names a slab that is not open");
        let slabs = batch.slabs.iter().map(|slab| self.slabs.get(slab)?.get(index).cloned());
        let slabs = slabs.collect::<Option<Vec<Array>>>().ok_or_else(missing)?;
        let (out, changed) = kernels.attend((qkv, cos, sin), &slabs, (&shape, look.weights), &batch.spans)?;
        for (&slab, changed) in batch.slabs.iter().zip(changed) {
            // The old handles go here and with `slabs`: then the update is in place.
            *self.slab_mut(slab, index)? = changed;
        }
        Ok(out)
    }

    /// Writes new keys and values `[tokens, kept, head_dim]` to their slots.
    fn write_new(&mut self, layer: &Layer<'_>, batch: &Batch, new: &Array) -> Result<()> {
        for (new, index) in self.encode(new)?.iter().zip(layer.array..) {
            for group in &batch.groups {
                self.write_group(index, group, new)?;
            }
            for chunk in &batch.chunks {
                self.write_chunk(index, chunk, new)?;
            }
        }
        Ok(())
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

    /// What some slots hold at some positions, as the model computes: `[slots, kept, positions, head_dim]`.
    fn kept(
        &self,
        layer: &Layer<'_>,
        slab: u32,
        slots: std::ops::Range<i32>,
        positions: std::ops::Range<i32>,
    ) -> Result<Array> {
        let part = |index: usize| {
            let array = self.slabs.get(&slab).and_then(|arrays| arrays.get(index));
            let array = array.ok_or_else(|| Exception::custom("a step names a slab that is not open"))?;
            array.try_index((slots.clone(), .., positions.clone(), ..))
        };
        let numbers = part(layer.array)?;
        if !self.shape.int8 {
            return Ok(numbers);
        }
        numbers.as_dtype(self.shape.dtype)?.multiply(part(layer.array + 1)?)
    }

    fn write_group(&mut self, index: usize, group: &Group, new: &Array) -> Result<()> {
        let rows = new.try_index(group.row..group.row + group.rows)?;
        let slab = self.slab_mut(group.slab, index)?;
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
        let slab = self.slab_mut(chunk.slab, index)?;
        let positions = chunk.start..chunk.start + chunk.rows;
        slab.try_index_mut((chunk.slot..chunk.slot + 1, .., positions, ..), &rows)
    }

    /// One launch for all decoding slots of a slab. On the CPU the heads that share a key head are laid on the
    /// query axis, `[slots, kv_heads, group, head_dim]`, so that no key is repeated. GPUs have kernels for one query
    /// a head; with more, CUDA would have cuDNN plan anew for every length, 20 ms each time.
    fn attend_group(&self, layer: &Layer<'_>, group: &Group, queries: &Array) -> Result<Array> {
        let TokenState { heads, kv_heads, head_dim, .. } = layer.state;
        let mut rows = queries.try_index(group.row..group.row + group.rows)?;
        if let (Some(places), Some(slabs)) = (&group.places, self.slabs.get(&group.slab)) {
            return cuda::attend(&rows, &slabs[layer.array], places);
        }
        let view = &group.views[layer.view];
        let kept = self.kept(layer, group.slab, 0..group.slots, view.from..group.length)?;
        if let Some((stand_in, _)) = &group.spread {
            rows = rows.take_axis(stand_in, 0)?;
        }
        let on_gpu = matches!(self.shape.ops, KernelSet::Fused);
        let rows = if on_gpu || layer.sinks.is_some() {
            rows.reshape(&[group.slots, heads, 1, head_dim])
        } else {
            rows.reshape(&[group.slots, kv_heads, heads / kv_heads, head_dim])
        }?;
        let out = layer.look_at(&rows, &kept, view, false)?.reshape(&[group.slots, -1])?;
        match &group.spread {
            Some((_, slots)) => out.take_axis(slots, 0),
            None => Ok(out),
        }
    }

    /// One sequence's chunk against its own slot.
    fn attend_chunk(&self, layer: &Layer<'_>, chunk: &Chunk, queries: &Array) -> Result<Array> {
        let view = &chunk.views[layer.view];
        let positions = view.from..chunk.start + chunk.rows;
        let kept = self.kept(layer, chunk.slab, chunk.slot..chunk.slot + 1, positions)?;
        let rows = queries.try_index(chunk.row..chunk.row + chunk.rows)?.swap_axes(0, 1)?.expand_dims(0)?;
        let out = layer.look_at(&rows, &kept, view, true)?;
        out.swap_axes(1, 2)?.reshape(&[chunk.rows, -1])
    }
}

/// Outputs of groups and chunks, one below the other.
fn joined(outputs: &[Array]) -> Result<Array> {
    match outputs {
        [one] => Ok(one.clone()),
        many => ops::concatenate(many, 0),
    }
}

/// The norms of each head, where there are some, on `[tokens, heads, head_dim]`.
fn normed(look: &AttentionCall<'_>, state: &TokenState, all: Array) -> Result<Array> {
    let AttentionWeights { q_norm, k_norm, v_norm, sinks: _ } = look.weights;
    let keys = state.heads + state.kv_heads;
    let parts = [(q_norm, 0..state.heads), (k_norm, state.heads..keys), (v_norm, keys..all.dim(1))];
    if parts.iter().all(|(norm, _)| norm.is_none()) {
        return Ok(all);
    }
    let there = parts.into_iter().filter(|(_, heads)| heads.start < heads.end.min(all.dim(1)));
    let parts = there.map(|(norm, heads)| {
        let part = all.try_index((.., heads))?;
        norm.map_or(Ok(part.clone()), |norm| fast::rms_norm(&part, Some(norm), look.eps))
    });
    ops::concatenate(&parts.collect::<Result<Vec<_>>>()?, 1)
}

impl Layer<'_> {
    /// Attention of `queries` `[slots, heads, rows, head_dim]` over `kept` `[slots, kept, positions, head_dim]`;
    /// `causal` rows see what comes before each where the view has no mask.
    fn look_at(&self, queries: &Array, kept: &Array, view: &View, causal: bool) -> Result<Array> {
        let TokenState { kv_heads, values_from, scale, softcap, .. } = self.state;
        let (keys, values) = if values_from > 0 {
            (kept.clone(), kept.try_index((.., .., .., values_from..))?)
        } else {
            (kept.try_index((.., ..kv_heads))?, kept.try_index((.., kv_heads..))?)
        };
        if softcap != 0.0 {
            return self.capped(queries, (&keys, &values), view, causal);
        }
        let sinks = self.sinks;
        match &view.mask {
            Some(mask) => fast::scaled_dot_product_attention(queries, keys, values, scale, mask, sinks),
            None => {
                let mask = causal.then_some(fast::ScaledDotProductAttentionMask::Causal);
                fast::scaled_dot_product_attention(queries, keys, values, scale, mask, sinks)
            }
        }
    }

    /// The same with scores that are capped, which MLX's operation does not do.
    fn capped(
        &self,
        queries: &Array,
        (keys, values): (&Array, &Array),
        view: &View,
        causal: bool,
    ) -> Result<Array> {
        let &[slots, heads, rows, head_dim] = queries.shape() else {
            return Err(Exception::custom("queries have four dimensions"));
        };
        let (kv_heads, positions) = (keys.dim(1), keys.dim(2));
        let cap = Array::from_f32(self.state.softcap);
        let scale = Array::from_f32(self.state.scale).as_dtype(queries.dtype())?;
        let queries =
            queries.multiply(scale)?.reshape(&[slots, kv_heads, heads / kv_heads, rows, head_dim])?;
        let scores = queries.matmul(keys.expand_dims(2)?.swap_axes(-1, -2)?)?.as_dtype(Dtype::Float32)?;
        let mut scores = ops::tanh(scores.divide(&cap)?)?.multiply(&cap)?;
        let seen = match &view.mask {
            // Of a group `[slots, 1, 1, positions]`, of a chunk `[rows, positions]`.
            Some(mask) if mask.ndim() == 4 => Some(mask.expand_dims(1)?),
            Some(mask) => Some(mask.clone()),
            None if causal => {
                let ones = ops::ones_dtype(&[rows, positions], Dtype::Bool)?;
                Some(ops::tril(&ones, positions - rows)?)
            }
            None => None,
        };
        if let Some(seen) = seen {
            scores = ops::select(&seen, &scores, Array::from_f32(f32::MIN))?;
        }
        let shares = ops::softmax_axis(&scores, -1, true)?.as_dtype(values.dtype())?;
        let out = shares.matmul(values.expand_dims(2)?)?;
        out.reshape(&[slots, heads, rows, values.dim(3)])
    }
}

#[cfg(test)]
mod tests {
    use mlx_rs::memory;
    use mlx_rs::transforms::eval;

    use super::*;
    use crate::backend::{KernelChoice, SlotId, Span, SpanOutput, Step};
    use crate::mlx::dim;
    use crate::mlx::kernels::KernelSet;
    use crate::mlx::kv::KvShape;

    /// What one step of one token adds to the memory in use, in a slab of 64 MiB.
    fn step_bytes(ops: KernelSet) -> usize {
        let layers = vec![LayerState::Tokens(TokenState::new(4, 2, 64)); 2];
        let shape = KvShape::new(layers, Dtype::Float32, false, ops);
        let rope = Rope::new(64, 10_000.0, false, None, None).unwrap();
        let mut kv = Kv::new(shape);
        kv.open(0, 1 << 14, 4).unwrap();
        let mut most = 0;
        for start in 0..3 {
            let slot = SlotId { slab: 0, slot: 2 };
            let span = Span { slot, start, tokens: vec![1], output: SpanOutput::None };
            let batch = Batch::new(&Step { spans: vec![span] }, kv.shape());
            let rotation = rope.rotation(&batch.positions, kv.shape().ops);
            let before = memory::active_memory().unwrap();
            memory::reset_peak_memory().unwrap();
            let qkv = ops::ones::<f32>(&[1, 8 * 64]).unwrap();
            let layers = (0..2).map(|layer| {
                let (weights, rope) = (AttentionWeights::default(), Some((&rope, &rotation)));
                kv.attend(&AttentionCall { layer, stores: true, weights, eps: 0.0, rope }, &batch, &qkv)
                    .unwrap()
            });
            let outputs: Vec<Array> = layers.collect();
            eval(outputs.iter().chain(kv.touched(&batch.slabs))).unwrap();
            most = most.max(memory::peak_memory().unwrap().saturating_sub(before));
        }
        most
    }

    #[test]
    fn a_slab_is_changed_in_place() {
        let slab = 4 * 4 * (1 << 14) * 64 * 4;
        for ops in [KernelSet::choose(KernelChoice::Auto, true, Dtype::Float32), KernelSet::Composed] {
            let added = step_bytes(ops);
            assert!(added < slab / 4, "{ops:?}: a step takes {added} bytes beside slabs of {slab}");
        }
    }

    /// Weights of a layer's attention, and how it turns.
    struct Setting {
        state: TokenState,
        norms: Option<(Array, Array)>,
        sinks: Option<Array>,
        rope: Option<Rope>,
    }

    fn random(shape: &[i32], key: u64) -> Array {
        let key = mlx_rs::random::key(key).unwrap();
        mlx_rs::random::normal::<f32>(shape, None, None, Some(&key)).unwrap()
    }

    /// Two steps of several sequences: chunks of two, then one token of each and another's chunk.
    fn outputs(ops: KernelSet, setting: &Setting) -> Vec<Array> {
        let state = setting.state;
        let mut kv = Kv::new(KvShape::new(vec![LayerState::Tokens(state)], Dtype::Float32, false, ops));
        kv.open(0, 64, 4).unwrap();
        let span = |slot, start, count: u32| Span {
            slot: SlotId { slab: 0, slot },
            start,
            tokens: vec![1; count as usize],
            output: SpanOutput::None,
        };
        let steps = [vec![span(0, 0, 9), span(2, 0, 5)], vec![span(0, 9, 1), span(2, 5, 1), span(1, 0, 7)]];
        let run = |(key, spans): (u64, Vec<Span>)| {
            let batch = Batch::new(&Step { spans }, kv.shape());
            let rotation = setting.rope.as_ref().map(|rope| rope.rotation(&batch.positions, kv.shape().ops));
            let columns = (state.heads + state.kept()) * state.head_dim;
            let qkv = random(&[dim(batch.positions.len()), columns], key);
            let (q_norm, k_norm) = setting.norms.as_ref().map(|(q, k)| (q, k)).unzip();
            let weights = AttentionWeights { q_norm, k_norm, v_norm: None, sinks: setting.sinks.as_ref() };
            let rope = setting.rope.as_ref().zip(rotation.as_ref());
            let look = AttentionCall { layer: 0, stores: true, weights, eps: 1e-5, rope };
            let out = kv.attend(&look, &batch, &qkv).unwrap();
            eval(std::iter::once(&out).chain(kv.touched(&batch.slabs))).unwrap();
            out
        };
        (0..).zip(steps).map(run).collect()
    }

    #[test]
    fn our_operation_and_mlx_s_attend_alike() {
        let plain = TokenState::new(4, 2, 32);
        let rope = |dims| Some(Rope::new(dims, 10_000.0, false, None, None).unwrap());
        let yarn =
            serde_json::json!({ "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16 });
        let yarn = Some(Rope::new(16, 10_000.0, true, Some(&yarn), None).unwrap());
        let norms = Some((random(&[32], 7), random(&[32], 8)));
        let bare = |state| Setting { state, norms: None, sinks: None, rope: rope(32) };
        let settings = [
            bare(plain),
            Setting { rope: None, ..bare(plain) },
            Setting { rope: rope(16), norms, ..bare(plain) },
            Setting { rope: yarn, ..bare(TokenState { values_from: 16, kv_heads: 1, ..plain }) },
            bare(TokenState { window: 4, ..plain }),
            bare(TokenState { softcap: 2.0, scale: 0.3, ..plain }),
            bare(TokenState { softcap: 2.0, window: 4, ..plain }),
            Setting { sinks: Some(random(&[4], 9)), ..bare(TokenState { sinks: true, ..plain }) },
        ];
        for (index, setting) in settings.iter().enumerate() {
            let expected = outputs(KernelSet::Composed, setting);
            for ops in [KernelSet::choose(KernelChoice::Auto, true, Dtype::Float32), KernelSet::Fused] {
                for (got, wanted) in outputs(ops, setting).iter().zip(&expected) {
                    assert_eq!(got.shape(), wanted.shape());
                    let apart = got.subtract(wanted).unwrap().abs().unwrap().max(None).unwrap();
                    assert!(apart.item_exact::<f32>() < 1e-5, "setting {index}, {ops:?}: {apart:?}");
                }
            }
        }
    }
}
