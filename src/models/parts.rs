//! Takes the parts of a layer by the names that most checkpoints give them, with the sizes of `Common`.

use super::config::Common;
use crate::error::Error;
use crate::mlx::kv::TokenState;
use crate::mlx::layers::{
    Attention, Convolution, Gate, HeadNorms, Mixture, Mlp, RmsNorm, Router, Scoring, by_kernel,
};
use crate::mlx::tensors::TensorCursor;

/// A layer by its index and its tensors' names.
pub(super) struct Layer {
    pub(super) index: usize,
    prefix: String,
}

impl Layer {
    /// Returns a layer of `model.layers`.
    pub(super) fn new(index: usize) -> Self {
        Self { index, prefix: format!("model.layers.{index}") }
    }

    /// Returns the full name of one of its modules.
    pub(super) fn name(&self, module: &str) -> String {
        format!("{}.{module}", self.prefix)
    }
}

/// Number of experts in a layer, number chosen for a token, and inner size of one.
#[derive(Clone, Copy, Debug)]
pub(super) struct ExpertSizes {
    pub(super) experts: i32,
    pub(super) chosen: i32,
    pub(super) inner: i32,
}

/// Experts that are routed as in DeepSeek-V3 (<https://arxiv.org/abs/2412.19437>): chosen by biased sigmoids
/// from the best groups, beside one MLP that stands for the shared experts.
#[derive(Clone, Copy, Debug)]
pub(super) struct GroupedExperts {
    pub(super) sizes: ExpertSizes,
    pub(super) groups: i32,
    pub(super) groups_kept: i32,
    /// Whether a token's shares add up to one before they are scaled.
    pub(super) normed: bool,
    pub(super) scale: f32,
    /// Inner size of the shared MLP; None without one.
    pub(super) shared: Option<i32>,
}

impl Common {
    /// Takes a norm of hidden states.
    pub(super) fn norm(&self, name: &str, weights: &mut TensorCursor) -> Result<RmsNorm, Error> {
        weights.rms_norm(name, self.hidden, self.eps)
    }

    /// Takes `self_attn`: q_proj, k_proj, v_proj and o_proj.
    pub(super) fn attention(&self, layer: &Layer, weights: &mut TensorCursor) -> Result<Attention, Error> {
        let (module, biases) = (layer.name("self_attn"), (self.qkv_bias, self.output_bias));
        Attention::load(weights, &module, (layer.index, &self.attention), self.hidden, biases)
    }

    /// Takes the norms of each head in `self_attn`: q_norm and k_norm.
    pub(super) fn head_norms(&self, layer: &Layer, weights: &mut TensorCursor) -> Result<HeadNorms, Error> {
        let TokenState { head_dim, .. } = self.attention;
        HeadNorms::load(weights, &layer.name("self_attn"), ("q_norm", "k_norm"), head_dim, self.eps)
    }

    /// Takes `mlp`: gate_proj, up_proj and down_proj.
    pub(super) fn mlp(&self, layer: &Layer, gate: Gate, weights: &mut TensorCursor) -> Result<Mlp, Error> {
        weights.gated_mlp(&layer.name("mlp"), (self.hidden, self.inner), gate, self.mlp_bias)
    }

    /// Takes a mixture of gated MLPs with nothing beside it: gate and switch_mlp of `module`.
    pub(super) fn mixture(
        &self,
        module: &str,
        ExpertSizes { experts, chosen, inner }: ExpertSizes,
        scoring: Scoring,
        weights: &mut TensorCursor,
    ) -> Result<Mixture, Error> {
        let logits = weights.linear(&format!("{module}.gate"), experts, self.hidden, false)?;
        let router = Router { logits, experts, chosen, scoring, expert_scale: None };
        let stack = format!("{module}.switch_mlp");
        let experts = weights.gated_experts(&stack, [experts, self.hidden, inner], Gate::Silu, false)?;
        Ok(Mixture { router, experts, shared: None, shared_gate: None })
    }

    /// Takes a gated MLP of `inner` elements that stands beside a mixture: shared_expert and its gate of
    /// `module`.
    pub(super) fn with_shared(
        &self,
        mixture: Mixture,
        module: &str,
        inner: i32,
        weights: &mut TensorCursor,
    ) -> Result<Mixture, Error> {
        let (name, sizes) = (format!("{module}.shared_expert"), (self.hidden, inner));
        Ok(Mixture {
            shared: Some(weights.gated_mlp(&name, sizes, Gate::Silu, false)?),
            shared_gate: Some(weights.linear(&format!("{name}_gate"), 1, self.hidden, false)?),
            ..mixture
        })
    }
}

impl GroupedExperts {
    /// Takes the scoring of the router, with the bias `gate.e_score_correction_bias` of `module`.
    pub(super) fn scoring(&self, module: &str, weights: &mut TensorCursor) -> Result<Scoring, Error> {
        let Self { sizes, groups, groups_kept, normed, scale, .. } = *self;
        // Its small differences decide; a shorter float would lose them.
        let bias = weights.single(&format!("{module}.gate.e_score_correction_bias"), &[sizes.experts])?;
        Ok(Scoring::Sigmoid { bias, groups, groups_kept, normed, scale })
    }

    /// Takes the experts of `mlp` and shared_experts.
    pub(super) fn load(
        &self,
        common: &Common,
        layer: &Layer,
        weights: &mut TensorCursor,
    ) -> Result<Mixture, Error> {
        let module = layer.name("mlp");
        let scoring = self.scoring(&module, weights)?;
        let name = format!("{module}.shared_experts");
        let shared =
            self.shared.map(|inner| weights.gated_mlp(&name, (common.hidden, inner), Gate::Silu, false));
        let shared = shared.transpose()?;
        Ok(Mixture { shared, ..common.mixture(&module, self.sizes, scoring, weights)? })
    }
}

/// Brings convolutions whose names end so from PyTorch's `[channels, 1, kernel]` to MLX's `[channels, kernel,
/// 1]`.
pub(super) fn mlx_kernels(weights: &mut TensorCursor, end: &str) -> Result<(), Error> {
    weights.change(
        |name| name.ends_with(end),
        |array| match array.shape() {
            &[_, _, last] if last != 1 => array.swap_axes(1, 2),
            _ => Ok(array.clone()),
        },
    )
}

/// Takes a convolution over tokens, of each channel by itself, with a bias if the architecture has one there.
pub(super) fn convolution(
    weights: &mut TensorCursor,
    module: &str,
    (channels, kernel): (i32, i32),
    bias: bool,
) -> Result<Convolution, Error> {
    let taps = weights.floats(&format!("{module}.weight"), &[channels, kernel, 1])?;
    let bias = if bias { Some(weights.floats(&format!("{module}.bias"), &[channels])?) } else { None };
    Ok(Convolution { weight: by_kernel(&taps)?, bias })
}
