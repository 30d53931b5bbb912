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

pub(crate) use crate::mlx::ffi::Gate;

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
