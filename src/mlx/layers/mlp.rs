//! Feed-forward bodies: gated MLPs.

use mlx_rs::error::Result;
use mlx_rs::{Array, ops};

use super::{ForwardContext, Fused, Linear, Sublayer};
use crate::mlx::ffi::Gate;
use crate::mlx::kernels::KernelSet;

/// `gelu(x)` by its approximation with tanh (<https://arxiv.org/abs/1606.08415>).
pub(crate) fn gelu(x: &Array) -> Result<Array> {
    let number = |number: f32| Array::from_f32(number).as_dtype(x.dtype());
    let cubic = x.multiply(x)?.multiply(x)?.multiply(number(0.044_715)?)?;
    // 0.5 * (1 + tanh(z)) is the sigmoid of 2 z; 2 * sqrt(2 / pi) is 2 / sqrt(pi) * sqrt(2).
    x.multiply(ops::sigmoid(
        x.add(cubic)?.multiply(number(std::f32::consts::FRAC_2_SQRT_PI * std::f32::consts::SQRT_2)?)?,
    )?)
}

/// What the gate lets through, with gate and up side by side on the last axis.
pub(super) fn open_gate(both: &Array, gate: Gate, ops: KernelSet) -> Result<Array> {
    if let KernelSet::Kernels(kernels) = ops {
        return kernels.gated(both, gate);
    }
    let parts = both.split_equal(2, -1)?;
    let (opens, up) = (&parts[0], &parts[1]);
    let number = |number: f32| Array::from_f32(number).as_dtype(both.dtype());
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

/// The gated MLP `down(gate(x) * up(x))`.
#[derive(Clone, Debug)]
pub(crate) struct Mlp {
    pub(crate) gate_up: Fused,
    pub(crate) down: Linear,
    pub(crate) gate: Gate,
    pub(crate) ops: KernelSet,
}

impl Mlp {
    /// What `down` takes, of `[tokens, hidden]`.
    pub(crate) fn activate(&self, x: &Array) -> Result<Array> {
        match self.gate_up.gated(x) {
            Some(activated) if self.gate == Gate::Silu => activated,
            _ => open_gate(&self.gate_up.forward(x)?, self.gate, self.ops),
        }
    }
}

impl Sublayer for Mlp {
    fn forward(&self, x: &Array, _: &mut ForwardContext<'_>) -> Result<Array> {
        self.activate(x)
    }

    fn last(&self) -> Option<&Linear> {
        Some(&self.down)
    }

    fn arrays(&self) -> Vec<&Array> {
        self.gate_up.arrays().into_iter().chain(self.down.arrays()).collect()
    }
}
