//! MLX's fused operations: rotary embedding and attention. They are what a Mac runs; on the CPU, MLX makes
//! chains of small operations of them.

use mlx_rs::error::Result;
use mlx_rs::{Array, fast};

use super::Attended;
use crate::mlx::kv::KvShape;
use crate::mlx::rope::Rope;

/// Rotates whole heads of `x` `[tokens, heads, head_dim]`.
pub(super) fn rotate(rope: &Rope, positions: &Array, x: &Array) -> Result<Array> {
    let (tokens, heads, head_dim) = (x.dim(0), x.dim(1), x.dim(2));
    // The kernel takes one offset for each row of a batch, so each token is a row of its own.
    let rows = x.reshape(&[tokens, heads, 1, head_dim])?;
    let rotated =
        fast::rope_dynamic(&rows, head_dim, rope.traditional, None, 1.0, positions, &rope.wavelengths)?;
    let rotated = rotated.reshape(&[tokens, heads, head_dim])?;
    if rope.magnitude == 1.0 {
        return Ok(rotated);
    }
    rotated.multiply(Array::from_f32(rope.magnitude).as_dtype(x.dtype())?)
}

/// Returns the heads that masks of groups have: those of queries, if they are the same in all layers that are
/// fused. MLX spreads a mask of one head over all, and Metal's kernel then copies it, in each layer.
pub(super) fn mask_heads(shape: &KvShape) -> i32 {
    let mut states = shape.token_states();
    let heads = states.next().map_or(1, |state| state.heads);
    let all_alike = shape.token_states().all(|state| state.heads == heads && state.softcap == 0.0);
    if all_alike { heads } else { 1 }
}

/// Attention of `queries` `[slots, heads, rows, head_dim]`. Decoding slots have one query a head: GPUs have
/// kernels for that; with more, cuDNN would plan anew for every length, 20 ms each time.
pub(super) fn attend(
    queries: &Array,
    Attended { keys, values, mask, causal }: Attended<'_>,
    scale: f32,
    sinks: Option<&Array>,
) -> Result<Array> {
    #[cfg(test)]
    super::metal_tests::record(queries, keys, values, mask);
    match mask {
        Some(mask) => fast::scaled_dot_product_attention(queries, keys, values, scale, mask, sinks),
        None => {
            let mask = causal.then_some(fast::ScaledDotProductAttentionMask::Causal);
            fast::scaled_dot_product_attention(queries, keys, values, scale, mask, sinks)
        }
    }
}
