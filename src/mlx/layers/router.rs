//! The router of a mixture: the experts of each token, and their shares.

use mlx_rs::error::Result;
use mlx_rs::ops::indexing::TryIndexOp;
use mlx_rs::{Array, Dtype, ops};

use super::Linear;

/// How a router's logits become shares of experts.
#[derive(Clone, Debug)]
pub(crate) enum Scoring {
    /// Softmax over all experts, of which the most likely stay; their shares add up to one if `normed`.
    Softmax { normed: bool },
    /// Softmax over the best experts only.
    SoftmaxOfBest,
    /// Sigmoids (DeepSeek-V3, <https://arxiv.org/abs/2412.19437>). Experts are chosen with a bias `[experts]`
    /// that does not count in their shares, from the best groups of them.
    Sigmoid { bias: Array, groups: i32, groups_kept: i32, normed: bool, scale: f32 },
}

/// Sends tokens to experts.
#[derive(Clone, Debug)]
pub(crate) struct Router {
    pub(crate) logits: Linear,
    pub(crate) experts: i32,
    /// Number of experts of each token.
    pub(crate) chosen: i32,
    pub(crate) scoring: Scoring,
    /// Factor of each expert's share, `[experts]`.
    pub(crate) expert_scale: Option<Array>,
}

/// Returns the indices of the `count` largest scores, in no order.
fn largest(scores: &Array, count: i32) -> Result<Array> {
    if count >= scores.dim(-1) {
        return ops::argsort_axis(scores, -1);
    }
    ops::argpartition_axis(scores, -count, -1)?.try_index((.., -count..))
}

impl Router {
    /// Returns the experts of each token and their shares, `[tokens, chosen]` both; shares are float32.
    pub(crate) fn forward(&self, x: &Array) -> Result<(Array, Array)> {
        let logits = self.logits.forward(x)?.as_dtype(Dtype::Float32)?;
        let (experts, shares) = match &self.scoring {
            Scoring::Softmax { normed } => {
                let all = ops::softmax_axis(&logits, -1, true)?;
                let experts = largest(&all, self.chosen)?;
                let shares = all.take_along_axis(&experts, -1)?;
                let shares = if *normed { shares.divide(shares.sum_axis(-1, true)?)? } else { shares };
                (experts, shares)
            }
            Scoring::SoftmaxOfBest => {
                let experts = largest(&logits, self.chosen)?;
                let best = logits.take_along_axis(&experts, -1)?;
                (experts, ops::softmax_axis(&best, -1, true)?)
            }
            Scoring::Sigmoid { bias, groups, groups_kept, normed, scale } => {
                let all = ops::sigmoid(&logits)?;
                let biased = self.within_groups(&all.add(bias)?, *groups, *groups_kept)?;
                let experts = largest(&biased, self.chosen)?;
                let mut shares = all.take_along_axis(&experts, -1)?;
                if *normed && self.chosen > 1 {
                    // Against a division by zero, as in mlx-lm (glm4_moe_lite.py).
                    shares = shares.divide(shares.sum_axis(-1, true)?.add(Array::from_f32(1e-20))?)?;
                }
                (experts, shares.multiply(Array::from_f32(*scale))?)
            }
        };
        match &self.expert_scale {
            Some(scale) => {
                let scale = scale.as_dtype(Dtype::Float32)?.take_axis(&experts, 0)?;
                Ok((experts, shares.multiply(scale)?))
            }
            None => Ok((experts, shares)),
        }
    }

    /// Returns scores with those outside the best groups set to 0. A group ranks by the sum of its two best
    /// experts.
    fn within_groups(&self, scores: &Array, groups: i32, kept: i32) -> Result<Array> {
        if groups <= 1 || kept >= groups {
            return Ok(scores.clone());
        }
        let tokens = scores.dim(0);
        let grouped = scores.reshape(&[tokens, groups, self.experts / groups])?;
        let best = ops::indexing::topk_axis(&grouped, 2, -1)?.sum_axis(-1, false)?;
        let worst = ops::argpartition_axis(&best, groups - kept - 1, -1)?.try_index((.., ..groups - kept))?;
        let zero = ops::zeros_dtype(&[tokens, groups - kept, self.experts / groups], scores.dtype())?;
        let places = ops::broadcast_to(worst.expand_dims(-1)?, zero.shape())?;
        grouped.put_along_axis(&places, &zero, 1)?.reshape(&[tokens, self.experts])
    }

    pub(crate) fn arrays(&self) -> Vec<&Array> {
        let bias = match &self.scoring {
            Scoring::Sigmoid { bias, .. } => Some(bias),
            Scoring::Softmax { .. } | Scoring::SoftmaxOfBest => None,
        };
        self.logits.arrays().into_iter().chain(bias).chain(&self.expert_scale).collect()
    }
}
