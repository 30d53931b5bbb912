//! Attention in MLX's operations, which its sets share: one write and one launch for each group of decoding
//! slots, and for each chunk. The sets differ in how they rotate and how they attend with a group.

use mlx_rs::error::Result;
use mlx_rs::ops::indexing::TryIndexOp;
use mlx_rs::{Array, fast, ops};

use super::{Attended, AttentionCall, KernelSet, Rotation, composed, cuda, fused};
use crate::mlx::batch::{Chunk, Group, Grouped, View};
use crate::mlx::ffi::AttentionWeights;
use crate::mlx::kv::{Kv, TokenState};
use crate::mlx::rope::Rope;

/// Attention's facts of its layer.
struct Layer<'a> {
    state: TokenState,
    /// Index of the layer in the cache.
    index: usize,
    /// Index of its window among those of the step.
    view: usize,
    sinks: Option<&'a Array>,
}

/// Attention of a step's groups and chunks.
pub(super) fn attend(
    kernels: KernelSet,
    call: &AttentionCall<'_>,
    grouped: &Grouped,
    kv: &mut Kv,
    qkv: &Array,
) -> Result<Array> {
    let state = kv.token_state(call.layer)?;
    let heads = qkv.dim(1) / state.head_dim;
    let all = qkv.reshape(&[qkv.dim(0), heads, state.head_dim])?;
    let all = normed(call, &state, all)?;
    let layer = Layer {
        index: call.layer,
        view: grouped.windows.iter().position(|&known| known == state.window).unwrap_or(0),
        sinks: call.weights.sinks,
        state,
    };
    if let (KernelSet::Cuda, Some((rope, _)), true) =
        (kernels, call.rope, call.stores && grouped.chunks.is_empty())
        && rope.is_plain(state.head_dim)
    {
        let groups = decode_on_cuda(&layer, grouped, kv, &all, rope)?;
        if !groups.is_empty() {
            return joined(&groups);
        }
    }
    let rotated = if call.stores { state.heads + state.kv_heads } else { state.heads };
    let values = (rotated < heads).then(|| all.try_index((.., rotated..))).transpose()?;
    let front = if rotated < heads { all.try_index((.., ..rotated))? } else { all };
    let front = match call.rope {
        Some((rope, rotation)) => rotate(rope, rotation, &front)?,
        None => front,
    };
    if call.stores {
        let keys = front.try_index((.., state.heads..))?;
        kv.write_tokens(call.layer, grouped, &keys, values.as_ref())?;
    }
    let queries = front.try_index((.., ..state.heads))?;
    let groups = grouped.groups.iter().map(|group| attend_group(kernels, &layer, group, kv, &queries));
    let chunks = grouped.chunks.iter().map(|chunk| attend_chunk(&layer, chunk, kv, &queries));
    joined(&groups.chain(chunks).collect::<Result<Vec<_>>>()?)
}

/// Returns outputs of groups and chunks, one below the other.
fn joined(outputs: &[Array]) -> Result<Array> {
    match outputs {
        [one] => Ok(one.clone()),
        many => ops::concatenate(many, 0),
    }
}

/// Attention of a step that only decodes, with whole heads `all` `[rows, heads + planes, head_dim]`: one
/// kernel that rotates and writes, in place, and one that attends, for each group.
fn decode_on_cuda(
    layer: &Layer<'_>,
    grouped: &Grouped,
    kv: &Kv,
    all: &Array,
    rope: &Rope,
) -> Result<Vec<Array>> {
    let qkv = all.reshape(&[all.dim(0), -1])?;
    let mut outputs = Vec::new();
    for group in &grouped.groups {
        let Some(places) = &group.places else { return Ok(Vec::new()) };
        let [keys, values] = kv.token_slab(layer.index, group.slab)? else { return Ok(Vec::new()) };
        let part = qkv.try_index(group.row..group.row + group.rows)?;
        let qkv = if group.rows == qkv.dim(0) { &qkv } else { &part };
        let queries = cuda::rotate_write(qkv, (keys, values), places, &rope.wavelengths, layer.state.heads)?;
        outputs.push(cuda::attend(&queries, (keys, values), places)?);
    }
    Ok(outputs)
}

/// Norms each head of `[tokens, heads, head_dim]` whose part has a weight.
fn normed(call: &AttentionCall<'_>, state: &TokenState, all: Array) -> Result<Array> {
    let AttentionWeights { q_norm, k_norm, v_norm, sinks: _ } = call.weights;
    let keys = state.heads + state.kv_heads;
    let parts = [(q_norm, 0..state.heads), (k_norm, state.heads..keys), (v_norm, keys..all.dim(1))];
    if parts.iter().all(|(norm, _)| norm.is_none()) {
        return Ok(all);
    }
    let there = parts.into_iter().filter(|(_, heads)| heads.start < heads.end.min(all.dim(1)));
    let parts = there.map(|(norm, heads)| {
        let part = all.try_index((.., heads))?;
        norm.map_or(Ok(part.clone()), |norm| fast::rms_norm(&part, Some(norm), call.eps))
    });
    ops::concatenate(&parts.collect::<Result<Vec<_>>>()?, 1)
}

/// Rotates the front of each head of `x` `[tokens, heads, head_dim]`.
fn rotate(rope: &Rope, rotation: &Rotation, x: &Array) -> Result<Array> {
    if rope.dims < x.dim(2) {
        let front = rotate(rope, rotation, &x.try_index((.., .., ..rope.dims))?)?;
        return ops::concatenate(&[front, x.try_index((.., .., rope.dims..))?], -1);
    }
    match rotation {
        Rotation::Tables(tables) | Rotation::Angles(tables) => composed::rotate(rope, tables, x),
        Rotation::Positions(positions) => fused::rotate(rope, positions, x),
    }
}

/// One launch for all decoding slots of a slab.
fn attend_group(
    kernels: KernelSet,
    layer: &Layer<'_>,
    group: &Group,
    kv: &Kv,
    queries: &Array,
) -> Result<Array> {
    let TokenState { heads, head_dim, .. } = layer.state;
    let mut rows = queries.try_index(group.row..group.row + group.rows)?;
    if let (Some(places), [keys, values]) = (&group.places, kv.token_slab(layer.index, group.slab)?) {
        return cuda::attend(&rows, (keys, values), places);
    }
    let view = &group.views[layer.view];
    let tokens = kv.tokens(layer.index, group.slab, 0..group.slots, view.from..group.length)?;
    if let Some((stand_in, _)) = &group.spread {
        rows = rows.take_axis(stand_in, 0)?;
    }
    let rows = match kernels {
        KernelSet::Composed if layer.sinks.is_none() => composed::by_key_head(&layer.state, &rows)?,
        KernelSet::Composed | KernelSet::Fused | KernelSet::Cuda | KernelSet::Cpu(_) => {
            rows.reshape(&[group.slots, heads, 1, head_dim])?
        }
    };
    let out = attend_over(layer, &rows, tokens, (view, false))?.reshape(&[group.slots, -1])?;
    match &group.spread {
        Some((_, slots)) => out.take_axis(slots, 0),
        None => Ok(out),
    }
}

/// One sequence's chunk against its own slot.
fn attend_chunk(layer: &Layer<'_>, chunk: &Chunk, kv: &Kv, queries: &Array) -> Result<Array> {
    let view = &chunk.views[layer.view];
    let positions = view.from..chunk.start + chunk.rows;
    let tokens = kv.tokens(layer.index, chunk.slab, chunk.slot..chunk.slot + 1, positions)?;
    let rows = queries.try_index(chunk.row..chunk.row + chunk.rows)?.swap_axes(0, 1)?.expand_dims(0)?;
    let out = attend_over(layer, &rows, tokens, (view, true))?;
    out.swap_axes(1, 2)?.reshape(&[chunk.rows, -1])
}

/// Attention of `queries` `[slots, heads, rows, head_dim]` over keys and values `[slots, kv_heads, positions,
/// _]`; `causal` rows attend to what comes before each where the view has no mask.
fn attend_over(
    layer: &Layer<'_>,
    queries: &Array,
    (keys, values): (Array, Array),
    (view, causal): (&View, bool),
) -> Result<Array> {
    let TokenState { scale, softcap, .. } = layer.state;
    let attended = Attended { keys: &keys, values: &values, mask: view.mask.as_ref(), causal };
    if softcap == 0.0 {
        return fused::attend(queries, attended, scale, layer.sinks);
    }
    composed::attend_capped(queries, attended, scale, softcap)
}
