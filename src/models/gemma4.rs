//! Gemma 4 (Google, 2026), its text part: layers that see a window and layers that see all, with heads of different
//! sizes; last layers that look at the cache of an earlier one; in the small models an input of each token for every
//! layer, in one a mixture of experts beside the MLP. Defaults are mlx-lm's (models/gemma4_text.py).

use mlx_rs::ops;
use serde::Deserialize;
use serde_json::{Value, json};

use super::decoder::{Architecture, EmbeddingAndHead, Prelude, loader};
use super::gemma4_parts::{LayerInput, LayerInputs, Parallel};
use super::{ConfigError, Loading, Setup, config};
use crate::error::Error;
use crate::mlx::kv::{LayerState, TokenState};
use crate::mlx::layers::{Attention, Fused, Gate, HeadNorms, Residual, Rope, Router, Scoring};
use crate::mlx::tensors::TensorCursor;

#[derive(Clone, Debug, Deserialize)]
struct Config {
    hidden_size: i32,
    num_hidden_layers: usize,
    intermediate_size: i32,
    num_attention_heads: i32,
    #[serde(default = "head_dim")]
    head_dim: i32,
    #[serde(default = "global_head_dim")]
    global_head_dim: Option<i32>,
    #[serde(default = "epsilon")]
    rms_norm_eps: f32,
    vocab_size: i32,
    vocab_size_per_layer_input: Option<i32>,
    #[serde(default = "one")]
    num_key_value_heads: i32,
    num_global_key_value_heads: Option<i32>,
    #[serde(default = "shared_layers")]
    num_kv_shared_layers: usize,
    #[serde(default = "layer_input")]
    hidden_size_per_layer_input: i32,
    #[serde(default)]
    rope_traditional: bool,
    rope_parameters: Option<Value>,
    sliding_window: Option<i32>,
    #[serde(default = "pattern")]
    sliding_window_pattern: usize,
    #[serde(default)]
    attention_k_eq_v: bool,
    #[serde(default = "softcap")]
    final_logit_softcapping: Option<f32>,
    #[serde(default = "config::yes")]
    use_double_wide_mlp: bool,
    #[serde(default)]
    enable_moe_block: bool,
    num_experts: Option<i32>,
    top_k_experts: Option<i32>,
    moe_intermediate_size: Option<i32>,
    layer_types: Option<Vec<String>>,
    #[serde(default = "config::yes")]
    tie_word_embeddings: bool,
    hidden_activation: Option<String>,
}

fn head_dim() -> i32 {
    256
}

fn global_head_dim() -> Option<i32> {
    Some(512)
}

fn shared_layers() -> usize {
    20
}

fn layer_input() -> i32 {
    256
}

#[allow(clippy::unnecessary_wraps, reason = "null turns it off")]
fn softcap() -> Option<f32> {
    Some(30.0)
}

fn epsilon() -> f32 {
    1e-6
}

fn one() -> i32 {
    1
}

fn pattern() -> usize {
    5
}

struct Gemma4 {
    config: Config,
    /// Attention of each layer.
    states: Vec<TokenState>,
    /// The layer whose cache each layer looks at.
    caches: Vec<usize>,
    /// Rotations of the layers with a window, and of the others.
    ropes: Vec<Rope>,
    /// Experts, those of a token, and their size; 0 is none.
    experts: (i32, i32, i32),
}

/// Reads the config.
pub(super) fn open(value: &Value, setup: Setup) -> Result<Box<dyn Loading>, ConfigError> {
    let config: Config = config::parse(value)?;
    let layers = config.num_hidden_layers;
    config::sizes(&[
        ("hidden_size", config.hidden_size),
        ("intermediate_size", config.intermediate_size),
        ("vocab_size", config.vocab_size),
        ("vocab_size_per_layer_input", config.vocab_size_per_layer_input.unwrap_or(1)),
        ("hidden_size_per_layer_input", config.hidden_size_per_layer_input.max(1)),
    ])?;
    config::depth(layers)?;
    config::epsilon(config.rms_norm_eps)?;
    config::activation(config.hidden_activation.as_deref(), &["gelu_pytorch_tanh"])?;
    let pattern = config.sliding_window_pattern.max(1);
    let by_pattern =
        |layer: usize| if layer.is_multiple_of(pattern) { config::FULL } else { config::SLIDING };
    let kinds: Vec<String> = match &config.layer_types {
        Some(kinds) => kinds.clone(),
        None => (1..=layers).map(|layer| by_pattern(layer).to_owned()).collect(),
    };
    config::layer_kinds(&kinds, layers, &[config::FULL, config::SLIDING])?;
    let states = kinds.iter().map(|kind| config.state(kind)).collect::<Result<Vec<_>, _>>()?;
    let caches = config.caches(&kinds)?;
    let ropes = [(config::SLIDING, config.head_dim), (config::FULL, config.full_head_dim())];
    let ropes = ropes.into_iter().map(|(kind, dims)| config.rope(kind, dims, value));
    let ropes = ropes.collect::<Result<Vec<_>, _>>()?;
    let mut experts = (0, 0, 0);
    if config.enable_moe_block {
        let all = config.num_experts.unwrap_or(0);
        experts = (all, config.top_k_experts.unwrap_or(0), config.moe_intermediate_size.unwrap_or(0));
        config::experts(experts.0, experts.1, (1, 1))?;
        config::sizes(&[("moe_intermediate_size", experts.2)])?;
    }
    Ok(loader(Gemma4 { config, states, caches, ropes, experts }, setup))
}

impl Config {
    fn full_head_dim(&self) -> i32 {
        self.global_head_dim.filter(|&size| size > 0).unwrap_or(self.head_dim)
    }

    fn state(&self, kind: &str) -> Result<TokenState, ConfigError> {
        let full = kind == config::FULL;
        let head_dim = if full { self.full_head_dim() } else { self.head_dim };
        let global = self.num_global_key_value_heads.filter(|_| full && self.attention_k_eq_v);
        let kv_heads = global.unwrap_or(self.num_key_value_heads);
        config::heads(self.num_attention_heads, kv_heads, head_dim)?;
        let window = config::window(kind, self.sliding_window)?;
        Ok(TokenState { window, scale: 1.0, ..TokenState::new(self.num_attention_heads, kv_heads, head_dim) })
    }

    /// The first layer that looks at the cache of another one.
    fn first_shared(&self) -> usize {
        self.num_hidden_layers.saturating_sub(self.num_kv_shared_layers)
    }

    fn caches(&self, kinds: &[String]) -> Result<Vec<usize>, ConfigError> {
        let own = self.first_shared();
        let source = |(layer, kind): (usize, &String)| {
            if layer < own { Some(layer) } else { kinds[..own].iter().rposition(|known| known == kind) }
        };
        let caches: Option<Vec<usize>> = kinds.iter().enumerate().map(source).collect();
        caches.map_or_else(|| config::invalid("num_kv_shared_layers leaves no layer to look at"), Ok)
    }

    fn rope(&self, kind: &str, dims: i32, value: &Value) -> Result<Rope, ConfigError> {
        let default = if kind == config::FULL {
            json!({ "partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional" })
        } else {
            json!({ "rope_theta": 1e4, "rope_type": "default" })
        };
        let given = self.rope_parameters.as_ref().map(|all| all.get(kind).cloned().unwrap_or(Value::Null));
        let parameters = given.unwrap_or(default);
        let theta = parameters.get("rope_theta").and_then(Value::as_f64).unwrap_or(10_000.0);
        config::rope(dims, theta, self.rope_traditional, Some(&parameters), value)
    }
}

impl Gemma4 {
    fn attention(&self, index: usize, prefix: &str, weights: &mut TensorCursor) -> Result<Attention, Error> {
        let (hidden, eps) = (self.config.hidden_size, self.config.rms_norm_eps);
        let state = &self.states[index];
        let (queries, keys) = (state.heads * state.head_dim, state.kv_heads * state.head_dim);
        let full = state.window == 0;
        let stores = self.caches[index] == index;
        let mut norms = HeadNorms::Each {
            query: weights.floats(&format!("{prefix}.q_norm.weight"), &[state.head_dim])?,
            key: None,
            value: None,
            eps,
        };
        let mut parts = vec![weights.linear(&format!("{prefix}.q_proj"), queries, hidden, false)?];
        if let HeadNorms::Each { query, key, value, .. } = &mut norms
            && stores
        {
            *key = Some(weights.floats(&format!("{prefix}.k_norm.weight"), &[state.head_dim])?);
            *value = Some(ops::ones_like(&*query)?);
            let k = weights.linear(&format!("{prefix}.k_proj"), keys, hidden, false)?;
            let v = if full && self.config.attention_k_eq_v {
                k.clone()
            } else {
                weights.linear(&format!("{prefix}.v_proj"), keys, hidden, false)?
            };
            parts.extend([k, v]);
        }
        let output = weights.linear(&format!("{prefix}.o_proj"), hidden, queries, false)?;
        let (cache, rope) = (self.caches[index], Some(usize::from(full)));
        Ok(Attention { stores, norms, rope, ..Attention::new(cache, queries, Fused::new(parts)?, output) })
    }

    fn feed_forward(
        &self,
        index: usize,
        prefix: &str,
        weights: &mut TensorCursor,
    ) -> Result<Residual, Error> {
        let Config { hidden_size: hidden, rms_norm_eps: eps, .. } = self.config;
        let shared = self.config.first_shared();
        let wide = self.config.use_double_wide_mlp && shared > 0 && index >= shared;
        let inner = self.config.intermediate_size * if wide { 2 } else { 1 };
        let mlp = weights.gated_mlp(&format!("{prefix}.mlp"), (hidden, inner), Gate::Gelu, false)?;
        let norm = |weights: &mut TensorCursor, name: &str| {
            weights.rms_norm(&format!("{prefix}.{name}_feedforward_layernorm"), hidden, eps)
        };
        let (before, after) = (norm(weights, "pre")?, norm(weights, "post")?);
        let (experts, chosen, inner) = self.experts;
        if experts == 0 {
            return Ok(Residual { after: Some(after), ..Residual::new(before, mlp) });
        }
        let root = ops::sqrt(mlx_rs::Array::from_f32(config::single(f64::from(hidden))))?;
        let mut scale = weights.rms_norm_at(&format!("{prefix}.router.scale"), hidden, eps)?;
        scale.weight = scale.weight.divide(root.as_dtype(scale.weight.dtype())?)?;
        let stack = format!("{prefix}.experts.switch_glu");
        let body = Parallel {
            before,
            mlp,
            after: weights.rms_norm(&format!("{prefix}.post_feedforward_layernorm_1"), hidden, eps)?,
            router_norm: scale,
            router: Router {
                logits: weights.linear(&format!("{prefix}.router.proj"), experts, hidden, false)?,
                experts,
                chosen,
                scoring: Scoring::SoftmaxOfBest,
                expert_scale: Some(weights.floats(&format!("{prefix}.router.per_expert_scale"), &[experts])?),
            },
            experts_before: weights.rms_norm(
                &format!("{prefix}.pre_feedforward_layernorm_2"),
                hidden,
                eps,
            )?,
            experts: weights.gated_experts(&stack, [experts, hidden, inner], Gate::Gelu, false)?,
            experts_after: weights.rms_norm(
                &format!("{prefix}.post_feedforward_layernorm_2"),
                hidden,
                eps,
            )?,
        };
        Ok(Residual { after: Some(after), ..Residual::bare(body) })
    }
}

impl Architecture for Gemma4 {
    fn ends(&self) -> EmbeddingAndHead {
        let Config { hidden_size, vocab_size, rms_norm_eps, tie_word_embeddings, .. } = self.config;
        EmbeddingAndHead {
            embedding_scale: config::single(f64::from(hidden_size).sqrt()),
            softcap: self.config.final_logit_softcapping.unwrap_or(0.0),
            ..EmbeddingAndHead::new(hidden_size, vocab_size, rms_norm_eps, tie_word_embeddings)
        }
    }

    fn states(&self) -> Vec<LayerState> {
        let own = self.states.iter().take(self.config.first_shared());
        own.copied().map(LayerState::Tokens).collect()
    }

    fn layers(&self) -> usize {
        self.config.num_hidden_layers
    }

    fn ropes(&self) -> Vec<Rope> {
        self.ropes.clone()
    }

    fn adapt(&self, weights: &mut TensorCursor) -> Result<(), Error> {
        const BOUNDS: [&str; 4] = ["input_max", "input_min", "output_max", "output_min"];
        weights.discard(|name| BOUNDS.iter().any(|bound| name.contains(bound)));
        for (layer, &cache) in self.caches.iter().enumerate() {
            let prefix = format!("model.layers.{layer}");
            if cache != layer {
                let unused = ["k_proj", "v_proj", "k_norm"].map(|part| format!("{prefix}.self_attn.{part}."));
                weights.discard(|name| unused.iter().any(|part| name.starts_with(part)));
            }
            let stack = |part: &str| format!("{prefix}.experts.switch_glu.{part}.weight");
            let both = [stack("gate_proj"), stack("up_proj")];
            weights.split(&format!("{prefix}.experts.gate_up_proj"), -2, &both)?;
            weights.split(&format!("{prefix}.experts.down_proj"), -2, &[stack("down_proj")])?;
        }
        Ok(())
    }

    fn prelude(&self, weights: &mut TensorCursor) -> Result<Option<Box<dyn Prelude>>, Error> {
        let Config { hidden_size, hidden_size_per_layer_input: size, rms_norm_eps, .. } = self.config;
        if size <= 0 {
            return Ok(None);
        }
        let vocabulary = self.config.vocab_size_per_layer_input.unwrap_or(self.config.vocab_size);
        let layers = crate::mlx::dim(self.config.num_hidden_layers);
        Ok(Some(Box::new(LayerInputs {
            embedding: weights.matrix("model.embed_tokens_per_layer", vocabulary, layers * size)?,
            projection: weights.linear(
                "model.per_layer_model_projection",
                layers * size,
                hidden_size,
                false,
            )?,
            norm: weights.rms_norm("model.per_layer_projection_norm", size, rms_norm_eps)?,
            layers,
            size,
            hidden: hidden_size,
        })))
    }

    fn layer(&self, index: usize, weights: &mut TensorCursor) -> Result<Vec<Residual>, Error> {
        let Config { hidden_size: hidden, rms_norm_eps: eps, .. } = self.config;
        let size = self.config.hidden_size_per_layer_input;
        let prefix = format!("model.layers.{index}");
        let before = weights.rms_norm(&format!("{prefix}.input_layernorm"), hidden, eps)?;
        let after = weights.rms_norm(&format!("{prefix}.post_attention_layernorm"), hidden, eps)?;
        let attention = self.attention(index, &format!("{prefix}.self_attn"), weights)?;
        let mut residuals = vec![
            Residual { after: Some(after), ..Residual::new(before, attention) },
            self.feed_forward(index, &prefix, weights)?,
        ];
        if size > 0 {
            let input = LayerInput {
                layer: crate::mlx::dim(index),
                gate: weights.linear(&format!("{prefix}.per_layer_input_gate"), size, hidden, false)?,
                projection: weights.linear(&format!("{prefix}.per_layer_projection"), hidden, size, false)?,
            };
            let after = weights.rms_norm(&format!("{prefix}.post_per_layer_input_norm"), hidden, eps)?;
            residuals.push(Residual { after: Some(after), ..Residual::bare(input) });
        }
        if let Some(last) = residuals.last_mut() {
            last.sum_scale = Some(weights.floats(&format!("{prefix}.layer_scalar"), &[1])?);
        }
        Ok(residuals)
    }
}
