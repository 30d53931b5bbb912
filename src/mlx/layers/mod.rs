//! Layers that architectures share. A layer holds its weights and has a `forward` over packed tokens; `build`
//! makes layers of a model's tensors. A model is a row of *residuals* (`residual`): each adds its sublayer's
//! output to the stream of hidden states.

mod attention;
mod build;
mod experts;
mod latent;
mod linear;
mod mlp;
mod norm;
mod recurrent;
mod residual;
mod router;
mod scan;

pub(crate) use crate::mlx::ffi::Gate;
pub(crate) use crate::mlx::kernels::gelu;
pub(crate) use crate::mlx::rope::{Rope, yarn_magnitude};

pub(crate) use attention::{Attention, HeadNorms, QueryScale};
pub(crate) use experts::{Activation, ExpertMatrix, Experts, Mixture, squared_relu};
pub(crate) use latent::{Latent, LatentQuery};
pub(crate) use linear::{Fused, Linear, Matrix, Quantized};
pub(crate) use mlp::Mlp;
pub(crate) use norm::RmsNorm;
pub(crate) use recurrent::{Convolution, DeltaNet, Mamba, ShortConvolution, by_kernel};
pub(crate) use residual::{ForwardContext, Residual, Sublayer};
pub(crate) use router::{Router, Scoring};
