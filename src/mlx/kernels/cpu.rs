//! Our operations for the CPU (`native/cpu_ops.h`): attention does all of a step at once, with its spans as
//! they are.

use mlx_rs::Array;
use mlx_rs::error::{Exception, Result};

use super::{AttentionCall, Rotation};
use crate::mlx::ffi::{AttentionShape, AttentionSpan, HEAD_DIM_MAX, HEAD_DIM_MULTIPLE, Kernels};
use crate::mlx::kv::{Kv, KvShape};

/// Whether our attention takes this cache: it works in single precision, by whole vectors.
pub(super) fn serves_cache(shape: &KvShape) -> bool {
    let whole = |size: i32| size % HEAD_DIM_MULTIPLE == 0;
    !shape.int8
        && shape
            .token_states()
            .all(|state| state.head_dim <= HEAD_DIM_MAX && whole(state.head_dim) && whole(state.width()))
}

/// Attention in one operation.
pub(super) fn attend(
    kernels: Kernels,
    call: &AttentionCall<'_>,
    (slabs, spans): (&[u32], &[AttentionSpan]),
    kv: &mut Kv,
    qkv: &Array,
) -> Result<Array> {
    let state = kv.token_state(call.layer)?;
    let unrotated = Array::from_slice::<f32>(&[], &[qkv.dim(0), 0]);
    let (cos, sin) = match call.rope {
        Some((_, Rotation::Angles(angles))) => (&angles.cos, &angles.sin),
        Some((_, Rotation::Tables(_) | Rotation::Positions(_))) => {
            return Err(Exception::custom("our attention rotates by angles"));
        }
        None => (&unrotated, &unrotated),
    };
    let shape = AttentionShape {
        heads: state.heads,
        kv_heads: state.kv_heads,
        head_dim: state.head_dim,
        rotated: call.rope.map_or(0, |(rope, _)| rope.dims),
        traditional: call.rope.map_or(0, |(rope, _)| i32::from(rope.traditional)),
        window: state.window,
        values_from: state.values_from,
        stores: i32::from(call.stores),
        scale: state.scale,
        softcap: state.softcap,
        eps: call.eps,
    };
    let of_slab = if state.values_from > 0 { 1 } else { 2 };
    let mut arrays = Vec::with_capacity(slabs.len() * of_slab);
    for &slab in slabs {
        arrays.extend_from_slice(kv.token_slab(call.layer, slab)?);
    }
    let (out, changed) = kernels.attend((qkv, cos, sin), &arrays, (&shape, call.weights), spans)?;
    let mut changed = changed.into_iter();
    for &slab in slabs {
        // The old handles go here and with `arrays`: then the update is in place.
        kv.replace_token_slab(call.layer, slab, changed.by_ref().take(of_slab))?;
    }
    Ok(out)
}
