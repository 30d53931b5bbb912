//! Layers that architectures share. Thin functions over MLX's operations: a layer holds its weights and
//! has a `forward` over packed tokens.

mod linear;
mod rope;

use mlx_rs::error::Result;
use mlx_rs::{Array, Dtype, fast, ops};

use crate::device::ffi::{HEAD_DIM_MAX, HEAD_DIM_MULTIPLE, Kernels};

pub(crate) use linear::{Fused, Linear, Matrix, Quantized};
pub(crate) use rope::{Rope, Rotation};

/// What computes beside matrix products.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Ops {
    /// Our own operations, in single precision on the CPU.
    Kernels(Kernels),
    /// MLX's operations, composed: on the CPU, where its fused ones are chains of small ones.
    Composed,
    /// MLX's fused operations, on GPUs.
    Fused,
}

impl Ops {
    /// What suits the device and the dtype.
    pub(crate) fn choose(on_cpu: bool, float: Dtype) -> Self {
        match Kernels::find().filter(|_| on_cpu && float == Dtype::Float32) {
            Some(kernels) => Self::Kernels(kernels),
            None if on_cpu => Self::Composed,
            None => Self::Fused,
        }
    }

    /// What computes attention with heads of this size: our own takes plain floats and whole vectors.
    pub(crate) fn for_attention(self, head_dim: i32, int8_kv: bool) -> Self {
        let fits = head_dim <= HEAD_DIM_MAX && head_dim % HEAD_DIM_MULTIPLE == 0 && !int8_kv;
        match self {
            Self::Kernels(_) if !fits => Self::Composed,
            Self::Kernels(_) | Self::Composed | Self::Fused => self,
        }
    }
}

/// Root mean square norm (<https://arxiv.org/abs/1910.07467>) over the last axis.
#[derive(Clone, Debug)]
pub(crate) struct RmsNorm {
    pub(crate) weight: Array,
    pub(crate) eps: f32,
    pub(crate) ops: Ops,
}

impl RmsNorm {
    /// `x / sqrt(mean(x^2) + eps) * weight`.
    pub(crate) fn forward(&self, x: &Array) -> Result<Array> {
        match self.ops {
            Ops::Kernels(kernels) => kernels.rms_norm(x, &self.weight, self.eps),
            Ops::Composed | Ops::Fused => fast::rms_norm(x, Some(&self.weight), self.eps),
        }
    }

    /// `x + y`, and the norm of that.
    pub(crate) fn add_forward(&self, x: &Array, y: &Array) -> Result<(Array, Array)> {
        match self.ops {
            Ops::Kernels(kernels) => kernels.add_rms_norm(x, y, &self.weight, self.eps),
            Ops::Composed | Ops::Fused => {
                let sum = x.add(y)?;
                let normed = self.forward(&sum)?;
                Ok((sum, normed))
            }
        }
    }
}

/// The gated MLP `down(silu(gate(x)) * up(x))` (SwiGLU, <https://arxiv.org/abs/2002.05202>).
#[derive(Clone, Debug)]
pub(crate) struct GatedMlp {
    pub(crate) gate_up: Fused,
    pub(crate) down: Linear,
    pub(crate) ops: Ops,
}

impl GatedMlp {
    /// What `down` takes, of `[tokens, hidden]`.
    pub(crate) fn activate(&self, x: &Array) -> Result<Array> {
        if let Some(activated) = self.gate_up.gated(x) {
            return activated;
        }
        let both = self.gate_up.forward(x)?;
        match self.ops {
            Ops::Kernels(kernels) => kernels.swiglu(&both),
            Ops::Composed | Ops::Fused => {
                let both = both.split_equal(2, -1)?;
                both[0].multiply(ops::sigmoid(&both[0])?)?.multiply(&both[1])
            }
        }
    }

    /// Every array it holds.
    pub(crate) fn arrays(&self) -> Vec<&Array> {
        self.gate_up.arrays().into_iter().chain(self.down.arrays()).collect()
    }
}
