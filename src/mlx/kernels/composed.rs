//! Compositions of MLX's small operations, for the CPU, and for what MLX has no fused operation for. Rotation
//! is `x * cos + flip(x) * sin`, three operations a layer where MLX's own rope takes a chain of some twenty
//! there.

use mlx_rs::error::{Exception, Result};
use mlx_rs::{Array, Axes, Dtype, ops};

use super::Attended;
use crate::mlx::ffi::Gate;
use crate::mlx::kv::TokenState;
use crate::mlx::rope::{Angles, Rope};

/// Returns `gelu(x)` by its approximation with tanh (<https://arxiv.org/abs/1606.08415>).
pub(crate) fn gelu(x: &Array) -> Result<Array> {
    let number = |number: f32| Array::from_f32(number).as_dtype(x.dtype());
    let cubic = x.multiply(x)?.multiply(x)?.multiply(number(0.044_715)?)?;
    // 0.5 * (1 + tanh(z)) is the sigmoid of 2 z; 2 * sqrt(2 / pi) is 2 / sqrt(pi) * sqrt(2).
    x.multiply(ops::sigmoid(
        x.add(cubic)?.multiply(number(std::f32::consts::FRAC_2_SQRT_PI * std::f32::consts::SQRT_2)?)?,
    )?)
}

/// Returns the output of a gate, with gate and up side by side on the last axis.
pub(super) fn gated(gate_up: &Array, gate: Gate) -> Result<Array> {
    let parts = gate_up.split_equal(2, -1)?;
    let (opens, up) = (&parts[0], &parts[1]);
    let number = |number: f32| Array::from_f32(number).as_dtype(gate_up.dtype());
    match gate {
        Gate::Silu => opens.multiply(ops::sigmoid(opens)?)?.multiply(up),
        Gate::Gelu => gelu(opens)?.multiply(up),
        Gate::Oss => {
            let opens = ops::minimum(opens, number(7.0)?)?;
            let up = ops::maximum(ops::minimum(up, number(7.0)?)?, number(-7.0)?)?.add(number(1.0)?)?;
            let open = ops::sigmoid(opens.multiply(number(1.702)?)?)?;
            opens.multiply(open)?.multiply(up)
        }
    }
}

/// Rotates whole heads of `x` `[tokens, heads, head_dim]`.
pub(super) fn rotate(rope: &Rope, Angles { cos, sin }: &Angles, x: &Array) -> Result<Array> {
    let (tokens, heads, head_dim) = (x.dim(0), x.dim(1), x.dim(2));
    let (pairs, axis) = if rope.traditional {
        (x.reshape(&[tokens, heads, head_dim / 2, 2])?, -1)
    } else {
        (x.reshape(&[tokens, heads, 2, head_dim / 2])?, -2)
    };
    let flipped = pairs.flip(Axes::Axis(axis))?.multiply(sin)?;
    pairs.multiply(cos)?.add(flipped)?.reshape(&[tokens, heads, head_dim])
}

/// Lays the heads of decoding rows `[slots, heads, head_dim]` that share a key head on the query axis,
/// `[slots, kv_heads, group, head_dim]`, so that no key is repeated.
pub(super) fn by_key_head(state: &TokenState, rows: &Array) -> Result<Array> {
    let TokenState { heads, kv_heads, head_dim, .. } = *state;
    rows.reshape(&[rows.dim(0), kv_heads, heads / kv_heads, head_dim])
}

/// Attention whose scores are capped, which MLX's operation does not do.
pub(super) fn attend_capped(
    queries: &Array,
    Attended { keys, values, mask, causal }: Attended<'_>,
    scale: f32,
    softcap: f32,
) -> Result<Array> {
    let &[slots, heads, rows, head_dim] = queries.shape() else {
        return Err(Exception::custom("queries have four dimensions"));
    };
    let (kv_heads, positions) = (keys.dim(1), keys.dim(2));
    let cap = Array::from_f32(softcap);
    let scale = Array::from_f32(scale).as_dtype(queries.dtype())?;
    let queries = queries.multiply(scale)?.reshape(&[slots, kv_heads, heads / kv_heads, rows, head_dim])?;
    let scores = queries.matmul(keys.expand_dims(2)?.swap_axes(-1, -2)?)?.as_dtype(Dtype::Float32)?;
    let mut scores = ops::tanh(scores.divide(&cap)?)?.multiply(&cap)?;
    let attended = match mask {
        // A group's is `[slots, 1, 1, positions]`, a chunk's `[rows, positions]`.
        Some(mask) if mask.ndim() == 4 => Some(mask.expand_dims(1)?),
        Some(mask) => Some(mask.clone()),
        None if causal => {
            let ones = ops::ones_dtype(&[rows, positions], Dtype::Bool)?;
            Some(ops::tril(&ones, positions - rows)?)
        }
        None => None,
    };
    if let Some(attended) = attended {
        scores = ops::select(&attended, &scores, Array::from_f32(f32::MIN))?;
    }
    let shares = ops::softmax_axis(&scores, -1, true)?.as_dtype(values.dtype())?;
    let out = shares.matmul(values.expand_dims(2)?)?;
    out.reshape(&[slots, heads, rows, values.dim(3)])
}
