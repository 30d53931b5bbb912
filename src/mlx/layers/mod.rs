//! Layers that architectures share. Thin functions over MLX's operations: a layer holds its weights and
//! has a `forward` over packed tokens. A model is a row of *residuals* (`residual`): each adds what its body makes of
//! the stream of hidden states to that stream.

mod attention;
mod experts;
mod frequencies;
mod latent;
mod linear;
mod mlp;
mod norm;
mod recurrent;
mod residual;
mod rope;
mod router;
mod scan;

use mlx_rs::Dtype;

pub(crate) use crate::mlx::ffi::Gate;
use crate::mlx::ffi::{HEAD_DIM_MAX, HEAD_DIM_MULTIPLE, Kernels};

pub(crate) use attention::{Attention, HeadNorms, QueryScale};
pub(crate) use experts::{Activation, ExpertMatrix, Experts, Mixture, squared_relu};
pub(crate) use frequencies::yarn_magnitude;
pub(crate) use latent::{Latent, LatentQuery};
pub(crate) use linear::{Fused, Linear, Matrix, Quantized};
pub(crate) use mlp::{Mlp, gelu};
pub(crate) use norm::RmsNorm;
pub(crate) use recurrent::{Convolution, DeltaNet, Mamba, ShortConvolution, by_kernel};
pub(crate) use residual::{ForwardContext, Residual, Sublayer};
pub(crate) use rope::{Rope, Rotation};
pub(crate) use router::{Router, Scoring};

/// What computes beside matrix products.
#[derive(Clone, Copy, Debug)]
pub(crate) enum KernelSet {
    /// Our own operations, in single precision on the CPU.
    Kernels(Kernels),
    /// MLX's operations, composed: on the CPU, where its fused ones are chains of small ones.
    Composed,
    /// MLX's fused operations, on GPUs.
    Fused,
}

impl KernelSet {
    /// What suits the device and the dtype.
    pub(crate) fn choose(on_cpu: bool, float: Dtype) -> Self {
        match Kernels::find().filter(|_| on_cpu && float == Dtype::Float32) {
            Some(kernels) => Self::Kernels(kernels),
            None if on_cpu => Self::Composed,
            None => Self::Fused,
        }
    }

    /// Whether our own attention takes heads of this size that give so many numbers: it works by whole vectors.
    pub(crate) fn takes_attention(self, head_dim: i32, width: i32) -> bool {
        head_dim <= HEAD_DIM_MAX && head_dim % HEAD_DIM_MULTIPLE == 0 && width % HEAD_DIM_MULTIPLE == 0
    }
}
