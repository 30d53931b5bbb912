//! The feed-forward sublayer: a gated MLP.

use mlx_rs::Array;
use mlx_rs::error::Result;

use super::{ForwardContext, Fused, Linear, Sublayer};
use crate::mlx::ffi::Gate;
use crate::mlx::kernels::KernelSet;

/// The gated MLP `down(gate(x) * up(x))`.
#[derive(Clone, Debug)]
pub(crate) struct Mlp {
    pub(crate) gate_up: Fused,
    pub(crate) down: Linear,
    pub(crate) gate: Gate,
    pub(crate) kernels: KernelSet,
}

impl Mlp {
    /// Returns the input of `down` for `x` `[tokens, hidden]`.
    pub(crate) fn activate(&self, x: &Array) -> Result<Array> {
        match self.gate_up.gated(x) {
            Some(activated) if self.gate == Gate::Silu => activated,
            _ => self.kernels.gated(&self.gate_up.forward(x)?, self.gate),
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
