//! Multi-head latent attention (DeepSeek-V2, <https://arxiv.org/abs/2405.04434>): the cache holds one small
//! vector of a token, the latent, from which each head would make its key and value. Those products are moved
//! to the other side, to queries and outputs, so that the latent itself is the key and value of a single
//! head.

use mlx_rs::error::Result;
use mlx_rs::ops::indexing::TryIndexOp;
use mlx_rs::{Array, ops};

use super::{ForwardContext, Fused, Linear, Matrix, RmsNorm, Sublayer};
use crate::mlx::ffi::AttentionWeights;
use crate::mlx::kernels::AttentionCall;

/// The source of queries.
pub(crate) enum LatentQuery {
    /// The hidden state, by a matrix of their own.
    Direct(Linear),
    /// A small vector that is made beside the latent, normed.
    Low { norm: RmsNorm, up: Linear },
}

/// Latent attention of one layer.
pub(crate) struct Latent {
    pub(crate) layer: usize,
    /// Makes the query's small vector, if there is one, then the latent and the rotated elements of the key.
    pub(crate) down: Fused,
    pub(crate) query: LatentQuery,
    /// Norm of the latent.
    pub(crate) norm: RmsNorm,
    /// Matrix `[heads, rank, plain]` from a head's query to the latent's space.
    pub(crate) to_latent: Matrix,
    /// Matrix `[heads, value_dim, rank]` from the mean of latents to a head's output.
    pub(crate) from_latent: Matrix,
    pub(crate) heads: i32,
    /// Elements of a head's query that are not rotated, and that are.
    pub(crate) plain: i32,
    pub(crate) turned: i32,
    /// Elements of the latent.
    pub(crate) rank: i32,
    pub(crate) output: Linear,
}

/// Returns `[tokens, heads, _]` as `[heads, tokens, _]`, or back.
fn swapped(x: &Array) -> Result<Array> {
    x.swap_axes(0, 1)
}

impl Sublayer for Latent {
    fn forward(&self, x: &Array, context: &mut ForwardContext<'_>) -> Result<Array> {
        let tokens = x.dim(0);
        let down = self.down.forward(x)?;
        let kept_from = down.dim(1) - self.rank - self.turned;
        let query = match &self.query {
            LatentQuery::Direct(linear) => linear.forward(x)?,
            LatentQuery::Low { norm, up } => {
                up.forward(&norm.forward(&down.try_index((.., ..kept_from))?)?)?
            }
        };
        let query = query.reshape(&[tokens, self.heads, self.plain + self.turned])?;
        let plain = swapped(&query.try_index((.., .., ..self.plain))?)?;
        let compared = swapped(&self.to_latent.project_each(&plain)?)?;
        // The rotated elements come first.
        let query = ops::concatenate(&[query.try_index((.., .., self.plain..))?, compared], -1)?;
        let query = query.reshape(&[tokens, self.heads * (self.turned + self.rank)])?;
        let latent = self.norm.forward(&down.try_index((.., kept_from..kept_from + self.rank))?)?;
        let qkv = ops::concatenate(&[query, down.try_index((.., kept_from + self.rank..))?, latent], -1)?;
        let rope = context.ropes.first().map(|(rope, rotation)| (rope, rotation));
        let weights = AttentionWeights::default();
        let call = AttentionCall { layer: self.layer, stores: true, weights, eps: 0.0, rope };
        let out = context
            .kernels
            .attend(&call, context.batch, context.kv, &qkv)?
            .reshape(&[tokens, self.heads, self.rank])?;
        swapped(&self.from_latent.project_each(&swapped(&out)?)?)?.reshape(&[tokens, -1])
    }

    fn last(&self) -> Option<&Linear> {
        Some(&self.output)
    }

    fn arrays(&self) -> Vec<&Array> {
        let query = match &self.query {
            LatentQuery::Direct(linear) => linear.arrays(),
            LatentQuery::Low { norm, up } => {
                let mut arrays = up.arrays();
                arrays.push(&norm.weight);
                arrays
            }
        };
        let products = self.down.arrays().into_iter().chain(self.to_latent.arrays());
        let products = products.chain(self.from_latent.arrays()).chain(self.output.arrays());
        products.chain(query).chain([&self.norm.weight]).collect()
    }
}
