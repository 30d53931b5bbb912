//! Root mean square norm.

use mlx_rs::Array;
use mlx_rs::error::Result;

use crate::mlx::kernels::KernelSet;

/// Root mean square norm (<https://arxiv.org/abs/1910.07467>) over the last axis.
#[derive(Clone, Debug)]
pub(crate) struct RmsNorm {
    pub(crate) weight: Array,
    pub(crate) eps: f32,
    pub(crate) kernels: KernelSet,
}

impl RmsNorm {
    /// Returns `x / sqrt(mean(x^2) + eps) * weight`.
    pub(crate) fn forward(&self, x: &Array) -> Result<Array> {
        self.kernels.rms_norm(x, &self.weight, self.eps)
    }

    /// Returns `x + y`, and the norm of that.
    pub(crate) fn add_forward(&self, x: &Array, y: &Array) -> Result<(Array, Array)> {
        self.kernels.add_rms_norm(x, y, &self.weight, self.eps)
    }

    /// Returns the norm with 1 added to its weights, which is how Gemma's are stored.
    pub(crate) fn plus_one(self) -> Result<Self> {
        let weight = self.weight.add(Array::from_f32(1.0).as_dtype(self.weight.dtype())?)?;
        Ok(Self { weight, ..self })
    }
}
