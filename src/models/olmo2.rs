//! OLMo 2 (<https://arxiv.org/abs/2501.00656>): Llama that norms what comes out of a sublayer, not what goes
//! in, and queries and keys over all heads together.

use super::config::{Common, Keys};
use super::decoder::{Architecture, loader};
use super::given::Given;
use super::parts::Layer;
use super::{Loading, OpenError, Setup};
use crate::error::Error;
use crate::mlx::kv::TokenState;
use crate::mlx::layers::{Attention, Gate, HeadNorms, Residual};
use crate::mlx::tensors::TensorCursor;

struct Olmo2(Common);

/// Reads the config.
pub(super) fn open(given: &Given<'_>, setup: Setup) -> Result<Box<dyn Loading>, OpenError> {
    Ok(loader(Olmo2(Common::rotated(given, &Keys::LLAMA)?), setup))
}

impl Architecture for Olmo2 {
    fn common(&self) -> &Common {
        &self.0
    }

    fn layer(&self, layer: &Layer, weights: &mut TensorCursor) -> Result<Vec<Residual>, Error> {
        let common = &self.0;
        let TokenState { heads, kv_heads, head_dim, .. } = common.attention;
        let norms = HeadNorms::Whole {
            query: weights.rms_norm(&layer.name("self_attn.q_norm"), heads * head_dim, common.eps)?,
            key: weights.rms_norm(&layer.name("self_attn.k_norm"), kv_heads * head_dim, common.eps)?,
        };
        let attention = Attention { norms, ..common.attention(layer, weights)? };
        let mlp = common.mlp(layer, Gate::Silu, weights)?;
        let attended = common.norm(&layer.name("post_attention_layernorm"), weights)?;
        let fed = common.norm(&layer.name("post_feedforward_layernorm"), weights)?;
        Ok(vec![
            Residual { after: Some(attended), ..Residual::bare(Box::new(attention)) },
            Residual { after: Some(fed), ..Residual::bare(Box::new(mlp)) },
        ])
    }
}
