//! GLM-4.5 and GLM-4.6 (<https://arxiv.org/abs/2508.06471>): partial rotation, some dense layers, then mixtures of
//! experts with shared ones, routed as in DeepSeek-V3. What a config must say is mlx-lm's reading (models/glm4_moe.py),
//! but `rope_scaling` and `tie_word_embeddings` count, where mlx-lm passes over them.

use serde::Deserialize;
use serde_json::Value;

use super::decoder::{Architecture, EmbeddingAndHead, loader};
use super::{ConfigError, Loading, Setup, config};
use crate::error::Error;
use crate::mlx::kv::{LayerState, TokenState};
use crate::mlx::layers::{Attention, Gate, HeadNorms, Mixture, Residual, Rope, Router, Scoring};
use crate::mlx::tensors::TensorCursor;

#[derive(Clone, Debug, Deserialize)]
struct Config {
    vocab_size: i32,
    hidden_size: i32,
    intermediate_size: i32,
    moe_intermediate_size: i32,
    norm_topk_prob: bool,
    num_attention_heads: i32,
    n_group: i32,
    head_dim: i32,
    topk_group: i32,
    n_shared_experts: Option<i32>,
    /// None: all layers are dense.
    n_routed_experts: Option<i32>,
    routed_scaling_factor: f32,
    num_experts_per_tok: i32,
    first_k_dense_replace: usize,
    num_hidden_layers: usize,
    num_key_value_heads: i32,
    rms_norm_eps: f32,
    rope_theta: f64,
    rope_scaling: Option<Value>,
    use_qk_norm: bool,
    tie_word_embeddings: bool,
    attention_bias: bool,
    partial_rotary_factor: f64,
    scoring_func: Option<String>,
    topk_method: Option<String>,
    hidden_act: Option<String>,
}

struct Glm4Moe {
    config: Config,
    state: TokenState,
    rope: Rope,
    /// Numbers inside of the shared experts, which are one MLP.
    shared: Option<i32>,
}

/// Reads the config.
pub(super) fn open(value: &Value, setup: Setup) -> Result<Box<dyn Loading>, ConfigError> {
    let config: Config = config::parse(value)?;
    let Config { num_attention_heads: heads, num_key_value_heads: kv_heads, head_dim, .. } = config;
    config::sizes(&[
        ("hidden_size", config.hidden_size),
        ("intermediate_size", config.intermediate_size),
        ("vocab_size", config.vocab_size),
    ])?;
    config::depth(config.num_hidden_layers)?;
    config::heads(heads, kv_heads, head_dim)?;
    config::epsilon(config.rms_norm_eps)?;
    config::activation(config.hidden_act.as_deref(), &["silu"])?;
    let shared = config.check_experts()?;
    let part = config.partial_rotary_factor;
    if !(part > 0.0 && part <= 1.0) {
        return config::invalid(format!("partial_rotary_factor is {part}"));
    }
    let dims = config::part_of(head_dim, part);
    let rope = config::rope(dims, config.rope_theta, false, config.rope_scaling.as_ref(), value)?;
    let state = TokenState::new(heads, kv_heads, head_dim);
    Ok(loader(Glm4Moe { config, state, rope, shared }, setup))
}

impl Config {
    /// Checks what mixtures need; the size of their shared experts.
    fn check_experts(&self) -> Result<Option<i32>, ConfigError> {
        let Some(experts) = self.n_routed_experts else { return Ok(None) };
        let (inner, groups, chosen) = (self.moe_intermediate_size, self.n_group, self.num_experts_per_tok);
        config::experts(experts, chosen, (groups, self.topk_group))?;
        config::sizes(&[("moe_intermediate_size", inner)])?;
        config::positive(&[("routed_scaling_factor", self.routed_scaling_factor.into())])?;
        config::choice("scoring_func", self.scoring_func.as_deref(), &["sigmoid"])?;
        config::choice("topk_method", self.topk_method.as_deref(), &["noaux_tc"])?;
        let Some(count) = self.n_shared_experts else { return Ok(None) };
        let shared = inner.saturating_mul(count);
        config::sizes(&[("moe_intermediate_size * n_shared_experts", shared)])?;
        Ok(Some(shared))
    }
}

impl Glm4Moe {
    fn mixture(&self, prefix: &str, experts: i32, weights: &mut TensorCursor) -> Result<Mixture, Error> {
        let Config { hidden_size: hidden, moe_intermediate_size: inner, .. } = self.config;
        let Config { n_group: groups, topk_group: groups_kept, norm_topk_prob: normed, .. } = self.config;
        // Its small differences decide, which a shorter float would lose.
        let bias = weights.single(&format!("{prefix}.gate.e_score_correction_bias"), &[experts])?;
        let scale = self.config.routed_scaling_factor;
        let router = Router {
            logits: weights.linear(&format!("{prefix}.gate"), experts, hidden, false)?,
            experts,
            chosen: self.config.num_experts_per_tok,
            scoring: Scoring::Sigmoid { bias, groups, groups_kept, normed, scale },
            expert_scale: None,
        };
        let switch = format!("{prefix}.switch_mlp");
        let experts = weights.gated_experts(&switch, [experts, hidden, inner], Gate::Silu, false)?;
        let always = format!("{prefix}.shared_experts");
        let shared = self.shared.map(|inner| weights.gated_mlp(&always, (hidden, inner), Gate::Silu, false));
        Ok(Mixture { router, experts, shared: shared.transpose()?, shared_gate: None })
    }
}

impl Architecture for Glm4Moe {
    fn ends(&self) -> EmbeddingAndHead {
        let Config { hidden_size, vocab_size, rms_norm_eps, tie_word_embeddings, .. } = self.config;
        EmbeddingAndHead::new(hidden_size, vocab_size, rms_norm_eps, tie_word_embeddings)
    }

    fn states(&self) -> Vec<LayerState> {
        vec![LayerState::Tokens(self.state); self.layers()]
    }

    fn layers(&self) -> usize {
        self.config.num_hidden_layers
    }

    fn ropes(&self) -> Vec<Rope> {
        vec![self.rope.clone()]
    }

    fn adapt(&self, weights: &mut TensorCursor) -> Result<(), Error> {
        // The layer after the last one predicts a second token.
        weights.discard_layers("model.layers.", self.layers());
        let Some(experts) = self.config.n_routed_experts else { return Ok(()) };
        weights.stack_gated_experts(self.layers(), experts)
    }

    fn layer(&self, index: usize, weights: &mut TensorCursor) -> Result<Vec<Residual>, Error> {
        let Config { hidden_size: hidden, intermediate_size: inner, rms_norm_eps: eps, .. } = self.config;
        let Config { use_qk_norm, attention_bias, first_k_dense_replace: dense, .. } = self.config;
        let prefix = format!("model.layers.{index}");
        let (module, mlp) = (format!("{prefix}.self_attn"), format!("{prefix}.mlp"));
        let biases = (attention_bias, false);
        let mut attention = Attention::load(weights, &module, (index, &self.state), hidden, biases)?;
        if use_qk_norm {
            let head_dim = self.state.head_dim;
            attention.norms = HeadNorms::load(weights, &module, ("q_norm", "k_norm"), head_dim, eps)?;
        }
        let before = weights.rms_norm(&format!("{prefix}.input_layernorm"), hidden, eps)?;
        let after = weights.rms_norm(&format!("{prefix}.post_attention_layernorm"), hidden, eps)?;
        let feed = match self.config.n_routed_experts.filter(|_| index >= dense) {
            Some(experts) => Residual::new(after, self.mixture(&mlp, experts, weights)?),
            None => Residual::new(after, weights.gated_mlp(&mlp, (hidden, inner), Gate::Silu, false)?),
        };
        Ok(vec![Residual::new(before, attention), feed])
    }
}
