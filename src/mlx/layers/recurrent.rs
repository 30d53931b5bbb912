//! Sublayers with a state of fixed size: short convolutions, Mamba-2 and gated delta nets.

use mlx_rs::error::Result;
use mlx_rs::ops::indexing::TryIndexOp;
use mlx_rs::{Array, Dtype, fast, ops};

use super::scan::Scan;
use super::{ForwardContext, Fused, Linear, RmsNorm, Sublayer};
use crate::mlx::kv::{LayerState, StateShape};

/// A convolution over the last few tokens, of each channel by itself. Its state are the last inputs.
#[derive(Clone, Debug)]
pub(crate) struct Convolution {
    /// Weights `[kernel, channels]`.
    pub(crate) weight: Array,
    /// Bias `[channels]`.
    pub(crate) bias: Option<Array>,
}

impl Convolution {
    /// Returns the shape of one sequence's state.
    pub(crate) fn state(kernel: i32, channels: i32, dtype: Dtype) -> StateShape {
        StateShape { shape: vec![kernel - 1, channels], dtype }
    }

    /// Returns the outputs for `x` `[sequences, tokens, channels]`, and the state after them.
    fn forward(&self, x: &Array, state: &Array) -> Result<(Array, Array)> {
        let (tokens, kernel) = (x.dim(1), self.weight.dim(0));
        let all = ops::concatenate(&[state.clone(), x.clone()], 1)?;
        let mut out: Option<Array> = None;
        for tap in 0..kernel {
            let part = all.try_index((.., tap..tap + tokens))?.multiply(self.weight.try_index(tap)?)?;
            out = Some(match out {
                Some(sum) => sum.add(part)?,
                None => part,
            });
        }
        let mut out = out.unwrap_or_else(|| x.clone());
        if let Some(bias) = &self.bias {
            out = out.add(bias)?;
        }
        Ok((out, all.try_index((.., tokens..))?))
    }

    fn arrays(&self) -> Vec<&Array> {
        [&self.weight].into_iter().chain(&self.bias).collect()
    }
}

fn silu(x: &Array) -> Result<Array> {
    x.multiply(ops::sigmoid(x)?)
}

/// Returns `ln(1 + e^x)`.
fn softplus(x: &Array) -> Result<Array> {
    ops::logaddexp(x, Array::from_f32(0.0))
}

/// Returns `[.., heads, elements]` of heads that stand side by side.
fn heads(x: &Array, heads: i32) -> Result<Array> {
    x.reshape(&[x.dim(0), x.dim(1), heads, -1])
}

/// Repeats each head `times` times.
fn repeated(x: &Array, times: i32) -> Result<Array> {
    if times == 1 {
        return Ok(x.clone());
    }
    let &[sequences, tokens, heads, elements] = x.shape() else { return Ok(x.clone()) };
    let wide = ops::broadcast_to(x.expand_dims(3)?, &[sequences, tokens, heads, times, elements])?;
    wide.reshape(&[sequences, tokens, heads * times, elements])
}

/// A gated short convolution (LFM2, Liquid AI, 2025).
pub(crate) struct ShortConvolution {
    pub(crate) layer: usize,
    /// Three parts: the gate of the input, the gate of the output, the input.
    pub(crate) input: Linear,
    pub(crate) convolution: Convolution,
    pub(crate) output: Linear,
}

impl Sublayer for ShortConvolution {
    fn forward(&self, x: &Array, context: &mut ForwardContext<'_>) -> Result<Array> {
        let parts = self.input.forward(x)?.split_equal(3, -1)?;
        let gated = parts[0].multiply(&parts[2])?;
        let mixed = context.kv.recur(self.layer, &context.batch.runs, &gated, |input| {
            let (out, state) = self.convolution.forward(input.inputs, &input.states[0])?;
            Ok((out, vec![state]))
        })?;
        parts[1].multiply(mixed)
    }

    fn last(&self) -> Option<&Linear> {
        Some(&self.output)
    }

    fn arrays(&self) -> Vec<&Array> {
        let products = self.input.arrays().into_iter().chain(self.output.arrays());
        products.chain(self.convolution.arrays()).collect()
    }
}

/// A gated delta net (<https://arxiv.org/abs/2412.06464>) as Qwen3-Next has it.
pub(crate) struct DeltaNet {
    pub(crate) layer: usize,
    /// Queries, keys and values of all heads, then gates: `z` of the output, `b` of the delta rule and `a` of
    /// the decay.
    pub(crate) input: Fused,
    pub(crate) convolution: Convolution,
    pub(crate) key_heads: i32,
    pub(crate) value_heads: i32,
    pub(crate) key_dim: i32,
    pub(crate) value_dim: i32,
    /// Logarithm and bias of the decay, `[value_heads]` both, float32.
    pub(crate) decay_log: Array,
    pub(crate) decay_bias: Array,
    /// Norm of each head's output, `[value_dim]`.
    pub(crate) norm: RmsNorm,
    pub(crate) output: Linear,
}

/// Epsilon added to the squared length of a query or key that is scaled to length one (mlx-lm,
/// gated_delta.py).
const UNIT_EPS: f32 = 1e-6;

impl DeltaNet {
    /// Returns the state that such a layer stores of a sequence.
    pub(crate) fn state(
        (key_heads, value_heads): (i32, i32),
        (key_dim, value_dim): (i32, i32),
        kernel: i32,
        dtype: Dtype,
    ) -> LayerState {
        let channels = 2 * key_heads * key_dim + value_heads * value_dim;
        let memory = StateShape { shape: vec![value_heads, key_dim, value_dim], dtype: Dtype::Float32 };
        LayerState::Recurrent(vec![Convolution::state(kernel, channels, dtype), memory])
    }

    /// Returns heads of length one, in float32, times `scale`.
    fn unit(&self, x: &Array, scale: f32) -> Result<Array> {
        let x = heads(x, self.key_heads)?.as_dtype(Dtype::Float32)?;
        // A norm over the mean of squares is off by the root of the size, and so is its epsilon.
        let inverse = crate::mlx::kv::inverse_root(self.key_dim);
        let normed = fast::rms_norm(&x, None::<&Array>, UNIT_EPS * inverse * inverse)?
            .multiply(Array::from_f32(scale))?;
        repeated(&normed, self.value_heads / self.key_heads)
    }

    fn scan(&self, mixed: &Array, b: &Array, a: &Array) -> Result<Scan> {
        let keys = self.key_heads * self.key_dim;
        let inverse = crate::mlx::kv::inverse_root(self.key_dim);
        let single = |x: &Array| x.as_dtype(Dtype::Float32);
        let pace = softplus(&single(a)?.add(&self.decay_bias)?)?;
        Ok(Scan {
            queries: self.unit(&mixed.try_index((.., .., ..keys))?, inverse * inverse)?,
            keys: self.unit(&mixed.try_index((.., .., keys..2 * keys))?, inverse)?,
            values: single(&heads(&mixed.try_index((.., .., 2 * keys..))?, self.value_heads)?)?,
            decay: ops::exp(&self.decay_log)?.multiply(pace)?.negative()?,
            beta: Some(ops::sigmoid(single(b)?)?),
        })
    }
}

impl Sublayer for DeltaNet {
    fn forward(&self, x: &Array, context: &mut ForwardContext<'_>) -> Result<Array> {
        let channels = self.convolution.weight.dim(1);
        let values = self.value_heads * self.value_dim;
        let all = self.input.forward(x)?;
        let gates = channels + values;
        let z = all.try_index((.., channels..gates))?;
        let inputs =
            ops::concatenate(&[all.try_index((.., ..channels))?, all.try_index((.., gates..))?], -1)?;
        let out = context.kv.recur(self.layer, &context.batch.runs, &inputs, |input| {
            let part = |from: i32, to: i32| input.inputs.try_index((.., .., from..to));
            let (mixed, tail) = self.convolution.forward(&part(0, channels)?, &input.states[0])?;
            let b = part(channels, channels + self.value_heads)?;
            let a = part(channels + self.value_heads, channels + 2 * self.value_heads)?;
            let (out, memory) = self.scan(&silu(&mixed)?, &b, &a)?.run(&input.states[1])?;
            Ok((out.flatten(2, 3)?, vec![tail, memory]))
        })?;
        let of_heads = [x.dim(0), self.value_heads, self.value_dim];
        let normed = self.norm.forward(&out.as_dtype(x.dtype())?.reshape(&of_heads)?)?;
        normed.multiply(silu(&z.reshape(&of_heads)?)?)?.reshape(&[x.dim(0), values])
    }

    fn last(&self) -> Option<&Linear> {
        Some(&self.output)
    }

    fn arrays(&self) -> Vec<&Array> {
        let products = self.input.arrays().into_iter().chain(self.output.arrays());
        let plain = [&self.decay_log, &self.decay_bias, &self.norm.weight];
        products.chain(self.convolution.arrays()).chain(plain).collect()
    }
}

/// A Mamba-2 mixer (<https://arxiv.org/abs/2405.21060>) as Nemotron-H has it.
pub(crate) struct Mamba {
    pub(crate) layer: usize,
    /// The output's gate, then the convolved inputs, keys and queries, then steps.
    pub(crate) input: Linear,
    pub(crate) convolution: Convolution,
    pub(crate) heads: i32,
    pub(crate) head_dim: i32,
    /// Number of groups of heads that share keys and queries.
    pub(crate) groups: i32,
    pub(crate) state_dim: i32,
    /// Logarithm of the decay, bias of the steps, factor of the inputs: `[heads]` all, float32.
    pub(crate) decay_log: Array,
    pub(crate) step_bias: Array,
    pub(crate) skip: Array,
    pub(crate) step_limit: (f32, f32),
    /// Weights `[heads * head_dim]` of a norm over each group.
    pub(crate) norm: Array,
    pub(crate) norm_eps: f32,
    pub(crate) output: Linear,
}

impl Mamba {
    /// Returns the state that such a layer stores of a sequence.
    pub(crate) fn state(
        (count, head_dim): (i32, i32),
        (groups, state_dim): (i32, i32),
        kernel: i32,
        dtype: Dtype,
    ) -> LayerState {
        let channels = count * head_dim + 2 * groups * state_dim;
        let memory = StateShape { shape: vec![count, state_dim, head_dim], dtype: Dtype::Float32 };
        LayerState::Recurrent(vec![Convolution::state(kernel, channels, dtype), memory])
    }

    /// Returns the outputs for convolved inputs and steps, and the state after them.
    fn scan(&self, mixed: &Array, steps: &Array, state: &Array) -> Result<(Array, Array)> {
        let (inner, shared) = (self.heads * self.head_dim, self.groups * self.state_dim);
        let single = |from: i32, to: i32, count: i32| {
            heads(&mixed.try_index((.., .., from..to))?, count)?.as_dtype(Dtype::Float32)
        };
        let of_group = self.heads / self.groups;
        let values = single(0, inner, self.heads)?;
        let (low, high) = self.step_limit;
        let steps = softplus(&steps.as_dtype(Dtype::Float32)?.add(&self.step_bias)?)?;
        let steps = ops::minimum(ops::maximum(steps, Array::from_f32(low))?, Array::from_f32(high))?;
        let scan = Scan {
            queries: repeated(&single(inner + shared, inner + 2 * shared, self.groups)?, of_group)?,
            keys: repeated(&single(inner, inner + shared, self.groups)?, of_group)?,
            values: values.multiply(steps.expand_dims(-1)?)?,
            decay: ops::exp(&self.decay_log)?.multiply(&steps)?.negative()?,
            beta: None,
        };
        let (out, state) = scan.run(state)?;
        Ok((out.add(values.multiply(self.skip.expand_dims(-1)?)?)?.flatten(2, 3)?, state))
    }
}

impl Sublayer for Mamba {
    fn forward(&self, x: &Array, context: &mut ForwardContext<'_>) -> Result<Array> {
        let (inner, channels) = (self.heads * self.head_dim, self.convolution.weight.dim(1));
        let all = self.input.forward(x)?;
        let gate = all.try_index((.., ..inner))?;
        let out =
            context.kv.recur(self.layer, &context.batch.runs, &all.try_index((.., inner..))?, |input| {
                let mixed = input.inputs.try_index((.., .., ..channels))?;
                let steps = input.inputs.try_index((.., .., channels..))?;
                let (mixed, tail) = self.convolution.forward(&mixed, &input.states[0])?;
                let (out, memory) = self.scan(&silu(&mixed)?, &steps, &input.states[1])?;
                Ok((out, vec![tail, memory]))
            })?;
        let gated = silu(&gate)?.multiply(out.as_dtype(x.dtype())?)?;
        let grouped = gated.reshape(&[x.dim(0), self.groups, inner / self.groups])?;
        let normed = fast::rms_norm(&grouped, None::<&Array>, self.norm_eps)?;
        normed.reshape(&[x.dim(0), inner])?.multiply(&self.norm)
    }

    fn last(&self) -> Option<&Linear> {
        Some(&self.output)
    }

    fn arrays(&self) -> Vec<&Array> {
        let products = self.input.arrays().into_iter().chain(self.output.arrays());
        let plain = [&self.decay_log, &self.step_bias, &self.skip, &self.norm];
        products.chain(self.convolution.arrays()).chain(plain).collect()
    }
}

/// Returns a convolution's weights `[channels, kernel, 1]`, as MLX stores them, as `[kernel, channels]`.
pub(crate) fn by_kernel(weight: &Array) -> Result<Array> {
    Ok(weight.reshape(&[weight.dim(0), weight.dim(1)])?.t())
}
