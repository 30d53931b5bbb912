//! Layers that architectures share. Thin functions over MLX's operations: a layer holds its weights and
//! has a `forward` over packed tokens.

mod linear;
mod rope;

use mlx_rs::error::Result;
use mlx_rs::{Array, fast, ops};

pub(crate) use linear::{Fused, Linear, Matrix, Quantized};
pub(crate) use rope::{Rope, Rotation};

/// Root mean square norm (<https://arxiv.org/abs/1910.07467>) over the last axis.
#[derive(Clone, Debug)]
pub(crate) struct RmsNorm {
    pub(crate) weight: Array,
    pub(crate) eps: f32,
}

impl RmsNorm {
    /// `x / sqrt(mean(x^2) + eps) * weight`.
    pub(crate) fn forward(&self, x: &Array) -> Result<Array> {
        fast::rms_norm(x, Some(&self.weight), self.eps)
    }
}

/// The gated MLP `down(silu(gate(x)) * up(x))` (SwiGLU, <https://arxiv.org/abs/2002.05202>).
#[derive(Clone, Debug)]
pub(crate) struct GatedMlp {
    pub(crate) gate_up: Fused,
    pub(crate) down: Linear,
}

impl GatedMlp {
    /// `[tokens, hidden]` to the same.
    pub(crate) fn forward(&self, x: &Array) -> Result<Array> {
        let both = self.gate_up.forward(x)?.split_equal(2, -1)?;
        let activated = both[0].multiply(ops::sigmoid(&both[0])?)?;
        self.down.forward(&activated.multiply(&both[1])?)
    }

    /// Every array it holds.
    pub(crate) fn arrays(&self) -> Vec<&Array> {
        self.gate_up.arrays().into_iter().chain(self.down.arrays()).collect()
    }
}
