//! Sublayers that only Gemma 4 has (formulas: mlx-lm, models/gemma4_text.py).

use mlx_rs::error::{Exception, Result};
use mlx_rs::ops::indexing::TryIndexOp;
use mlx_rs::{Array, ops};

use super::decoder::Prelude;
use crate::mlx::layers::{Experts, ForwardContext, Linear, Matrix, Mlp, RmsNorm, Router, Sublayer, gelu};

/// Inputs of each token to every layer: an embedding of its id and a projection of its hidden state.
pub(super) struct LayerInputs {
    pub(super) embedding: Matrix,
    pub(super) projection: Linear,
    pub(super) norm: RmsNorm,
    pub(super) layers: i32,
    /// Elements of the input to one layer.
    pub(super) size: i32,
    pub(super) hidden: i32,
}

fn root(size: i32, x: &Array) -> Result<Array> {
    let size = Array::from_int(size).as_dtype(mlx_rs::Dtype::Float32)?;
    ops::sqrt(&size)?.as_dtype(x.dtype())
}

impl Prelude for LayerInputs {
    /// Returns `[tokens, layers, size]`.
    fn forward(&self, tokens: &Array, x: &Array) -> Result<Array> {
        let shape = [x.dim(0), self.layers, self.size];
        let known = self.embedding.rows(tokens)?;
        let known = known.multiply(root(self.size, &known)?)?.reshape(&shape)?;
        let made = self.projection.forward(x)?;
        let made = self.norm.forward(&made.divide(root(self.hidden, &made)?)?.reshape(&shape)?)?;
        made.add(&known)?.divide(root(2, &made)?)
    }

    fn arrays(&self) -> Vec<&Array> {
        let products = self.embedding.arrays().into_iter().chain(self.projection.arrays());
        products.chain([&self.norm.weight]).collect()
    }
}

/// A layer's input, gated by the hidden state.
pub(super) struct LayerInput {
    pub(super) layer: i32,
    pub(super) gate: Linear,
    pub(super) projection: Linear,
}

impl Sublayer for LayerInput {
    fn forward(&self, x: &Array, context: &mut ForwardContext<'_>) -> Result<Array> {
        let Some(inputs) = &context.prelude else {
            return Err(Exception::custom("a layer input without a prelude"));
        };
        gelu(&self.gate.forward(x)?)?.multiply(inputs.try_index((.., self.layer))?)
    }

    fn last(&self) -> Option<&Linear> {
        Some(&self.projection)
    }

    fn arrays(&self) -> Vec<&Array> {
        self.gate.arrays().into_iter().chain(self.projection.arrays()).collect()
    }
}

/// An MLP and experts side by side, each with norms of its own.
pub(super) struct Parallel {
    pub(super) before: RmsNorm,
    pub(super) mlp: Mlp,
    pub(super) after: RmsNorm,
    pub(super) router_norm: RmsNorm,
    pub(super) router: Router,
    pub(super) experts_before: RmsNorm,
    pub(super) experts: Experts,
    pub(super) experts_after: RmsNorm,
}

impl Sublayer for Parallel {
    fn forward(&self, x: &Array, _: &mut ForwardContext<'_>) -> Result<Array> {
        let always = self.mlp.down.forward(&self.mlp.activate(&self.before.forward(x)?)?)?;
        let (experts, shares) = self.router.forward(&self.router_norm.forward(x)?)?;
        let routed = self.experts.forward(&self.experts_before.forward(x)?, &experts, &shares)?;
        self.after.forward(&always)?.add(self.experts_after.forward(&routed)?)
    }

    fn last(&self) -> Option<&Linear> {
        None
    }

    fn arrays(&self) -> Vec<&Array> {
        let norms = [&self.before, &self.after, &self.router_norm, &self.experts_before, &self.experts_after];
        let products = self.mlp.arrays().into_iter().chain(self.router.arrays()).chain(self.experts.arrays());
        products.chain(norms.map(|norm| &norm.weight)).collect()
    }
}
