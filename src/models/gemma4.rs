//! Gemma 4 (Google, 2026), its text part: layers that attend to a window and layers that attend to all
//! positions, with heads of different sizes; last layers that read the cache of an earlier one; in the small
//! models an input of each token for every layer, in one a mixture of experts beside the MLP. Defaults are
//! mlx-lm's (models/gemma4_text.py).

use mlx_rs::ops;
use serde::Deserialize;
use serde_json::{Value, json};

use super::config::{self, Common, Key, Keys};
use super::decoder::{Architecture, EmbeddingAndHead, Prelude, loader};
use super::gemma4_parts::{LayerInput, LayerInputs, Parallel};
use super::parts::{ExpertSizes, Layer};
use super::{Loading, OpenError, Setup};
use crate::error::Error;
use crate::mlx::dim;
use crate::mlx::kv::{LayerState, TokenState};
use crate::mlx::layers::{Attention, Fused, Gate, HeadNorms, Residual, RmsNorm, Rope, Router, Scoring};
use crate::mlx::tensors::TensorCursor;

const KEYS: Keys = Keys {
    head_dim: Key::Or(Some(256)),
    rms_norm_eps: Key::Or(1e-6),
    num_key_value_heads: Key::Or(Some(1)),
    // Each kind of layer has its own in `rope_parameters`.
    rope_theta: Key::Always(1e4),
    rope_traditional: Key::Or(false),
    tie_word_embeddings: Key::Or(true),
    activation: "gelu_pytorch_tanh",
    activation_keys: &["hidden_activation"],
    ..Keys::USUAL
};

#[derive(Clone, Debug, Deserialize)]
struct Config {
    #[serde(default = "global_head_dim")]
    global_head_dim: Option<i32>,
    vocab_size_per_layer_input: Option<i32>,
    num_global_key_value_heads: Option<i32>,
    #[serde(default = "config::or::<20, _>")]
    num_kv_shared_layers: usize,
    #[serde(default = "config::or::<256, _>")]
    hidden_size_per_layer_input: i32,
    rope_parameters: Option<Value>,
    sliding_window: Option<i32>,
    #[serde(default = "config::or::<5, _>")]
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
}

#[allow(clippy::unnecessary_wraps, reason = "null: all layers have heads of one size")]
fn global_head_dim() -> Option<i32> {
    Some(512)
}

#[allow(clippy::unnecessary_wraps, reason = "null is off")]
fn softcap() -> Option<f32> {
    Some(30.0)
}

struct Gemma4 {
    common: Common,
    config: Config,
    /// Attention, by layer.
    states: Vec<TokenState>,
    /// The layer whose cache a layer reads, by layer.
    caches: Vec<usize>,
    /// None without a mixture.
    experts: Option<ExpertSizes>,
}

/// Reads the config.
pub(super) fn open(value: &Value, setup: Setup) -> Result<Box<dyn Loading>, OpenError> {
    let mut common = Common::read(value, &KEYS)?;
    let config: Config = config::parse(value)?;
    let inputs = config.hidden_size_per_layer_input.max(1).saturating_mul(dim(common.layers));
    config::sizes(&[
        ("vocab_size_per_layer_input", config.vocab_size_per_layer_input.unwrap_or(1)),
        ("hidden_size_per_layer_input * num_hidden_layers", inputs),
    ])?;
    let pattern = config.sliding_window_pattern.max(1);
    let by_pattern =
        |layer: usize| if layer.is_multiple_of(pattern) { config::FULL } else { config::SLIDING };
    let kinds: Vec<String> = match &config.layer_types {
        Some(kinds) => kinds.clone(),
        None => (1..=common.layers).map(|layer| by_pattern(layer).to_owned()).collect(),
    };
    config::layer_kinds(&kinds, common.layers, &[config::FULL, config::SLIDING])?;
    let states = kinds.iter().map(|kind| config.state(&common, kind)).collect::<Result<Vec<_>, _>>()?;
    let caches = config.caches(&kinds)?;
    // By index: 0 for layers with a window, 1 for the others.
    common.ropes = vec![
        config.rope(&common, config::SLIDING, common.attention.head_dim, value)?,
        config.rope(&common, config::FULL, config.full_head_dim(&common), value)?,
    ];
    let experts = if config.enable_moe_block { Some(config.experts()?) } else { None };
    Ok(loader(Gemma4 { common, config, states, caches, experts }, setup))
}

impl Config {
    fn full_head_dim(&self, common: &Common) -> i32 {
        self.global_head_dim.filter(|&size| size > 0).unwrap_or(common.attention.head_dim)
    }

    fn state(&self, common: &Common, kind: &str) -> Result<TokenState, OpenError> {
        let full = kind == config::FULL;
        let TokenState { heads, kv_heads, head_dim, .. } = common.attention;
        let head_dim = if full { self.full_head_dim(common) } else { head_dim };
        let global = self.num_global_key_value_heads.filter(|_| full && self.attention_k_eq_v);
        let kv_heads = global.unwrap_or(kv_heads);
        config::heads(heads, kv_heads, head_dim)?;
        let window = config::window(kind, self.sliding_window)?;
        Ok(TokenState { window, scale: 1.0, ..TokenState::new(heads, kv_heads, head_dim) })
    }

    fn experts(&self) -> Result<ExpertSizes, OpenError> {
        let (experts, chosen) = (self.num_experts.unwrap_or(0), self.top_k_experts.unwrap_or(0));
        let inner = self.moe_intermediate_size.unwrap_or(0);
        config::experts(experts, chosen, (1, 1))?;
        config::sizes(&[("moe_intermediate_size", inner)])?;
        Ok(ExpertSizes { experts, chosen, inner })
    }

    /// Returns the first of `layers` that reads the cache of another one.
    fn first_shared(&self, layers: usize) -> usize {
        layers.saturating_sub(self.num_kv_shared_layers)
    }

    fn caches(&self, kinds: &[String]) -> Result<Vec<usize>, OpenError> {
        let own = self.first_shared(kinds.len());
        let source = |(layer, kind): (usize, &String)| {
            if layer < own { Some(layer) } else { kinds[..own].iter().rposition(|known| known == kind) }
        };
        match kinds.iter().enumerate().map(source).collect() {
            Some(caches) => Ok(caches),
            None => config::invalid("num_kv_shared_layers leaves no layer whose cache is shared"),
        }
    }

    fn rope(&self, common: &Common, kind: &str, dims: i32, value: &Value) -> Result<Rope, OpenError> {
        let default = if kind == config::FULL {
            json!({ "partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional" })
        } else {
            json!({ "rope_theta": 1e4, "rope_type": "default" })
        };
        let given = self.rope_parameters.as_ref().map(|all| all.get(kind).cloned().unwrap_or(Value::Null));
        let parameters = given.unwrap_or(default);
        let theta = parameters.get("rope_theta").and_then(Value::as_f64).unwrap_or(common.rope_theta);
        config::rope(dims, theta, common.rope_traditional, Some(&parameters), value)
    }
}

impl Gemma4 {
    fn attention(&self, layer: &Layer, weights: &mut TensorCursor) -> Result<Attention, Error> {
        let Common { hidden, eps, .. } = self.common;
        let state = &self.states[layer.index];
        let (queries, keys) = (state.heads * state.head_dim, state.kv_heads * state.head_dim);
        let full = state.window == 0;
        let stores = self.caches[layer.index] == layer.index;
        let mut norms = HeadNorms::Each {
            query: weights.floats(&layer.name("self_attn.q_norm.weight"), &[state.head_dim])?,
            key: None,
            value: None,
            eps,
        };
        let mut parts = vec![weights.linear(&layer.name("self_attn.q_proj"), queries, hidden, false)?];
        if let HeadNorms::Each { query, key, value, .. } = &mut norms
            && stores
        {
            *key = Some(weights.floats(&layer.name("self_attn.k_norm.weight"), &[state.head_dim])?);
            *value = Some(ops::ones_like(&*query)?);
            let k = weights.linear(&layer.name("self_attn.k_proj"), keys, hidden, false)?;
            let v = if full && self.config.attention_k_eq_v {
                k.clone()
            } else {
                weights.linear(&layer.name("self_attn.v_proj"), keys, hidden, false)?
            };
            parts.extend([k, v]);
        }
        let output = weights.linear(&layer.name("self_attn.o_proj"), hidden, queries, false)?;
        let (cache, rope) = (self.caches[layer.index], Some(usize::from(full)));
        Ok(Attention { stores, norms, rope, ..Attention::new(cache, queries, Fused::new(parts)?, output) })
    }

    /// Takes the MLP of a layer, and the experts beside it.
    fn fed(&self, layer: &Layer, weights: &mut TensorCursor) -> Result<Residual, Error> {
        let Common { hidden, inner, .. } = self.common;
        let shared = self.config.first_shared(self.common.layers);
        let wide = self.config.use_double_wide_mlp && shared > 0 && layer.index >= shared;
        let sizes = (hidden, inner * if wide { 2 } else { 1 });
        let mlp = weights.gated_mlp(&layer.name("mlp"), sizes, Gate::Gelu, false)?;
        let norm = |name: &str, weights: &mut TensorCursor| self.norm(layer, name, weights);
        let before = norm("pre_feedforward_layernorm", weights)?;
        let after = Some(norm("post_feedforward_layernorm", weights)?);
        let Some(ExpertSizes { experts, chosen, inner }) = self.experts else {
            return Ok(Residual { after, ..Residual::new(before, Box::new(mlp)) });
        };
        let root = mlx_rs::Array::from_f32(config::root(hidden));
        let mut scale = weights.rms_norm_at(&layer.name("router.scale"), hidden, self.common.eps)?;
        scale.weight = scale.weight.divide(root.as_dtype(scale.weight.dtype())?)?;
        let per_expert = weights.floats(&layer.name("router.per_expert_scale"), &[experts])?;
        let stack = layer.name("experts.switch_glu");
        let body = Parallel {
            before,
            mlp,
            after: norm("post_feedforward_layernorm_1", weights)?,
            router_norm: scale,
            router: Router {
                logits: weights.linear(&layer.name("router.proj"), experts, hidden, false)?,
                experts,
                chosen,
                scoring: Scoring::SoftmaxOfBest,
                expert_scale: Some(per_expert),
            },
            experts_before: norm("pre_feedforward_layernorm_2", weights)?,
            experts: weights.gated_experts(&stack, [experts, hidden, inner], Gate::Gelu, false)?,
            experts_after: norm("post_feedforward_layernorm_2", weights)?,
        };
        Ok(Residual { after, ..Residual::bare(Box::new(body)) })
    }

    fn norm(&self, layer: &Layer, name: &str, weights: &mut TensorCursor) -> Result<RmsNorm, Error> {
        self.common.norm(&layer.name(name), weights)
    }
}

impl Architecture for Gemma4 {
    fn common(&self) -> &Common {
        &self.common
    }

    fn ends(&self) -> EmbeddingAndHead {
        EmbeddingAndHead {
            embedding_scale: config::root(self.common.hidden),
            softcap: self.config.final_logit_softcapping.unwrap_or(0.0),
            ..EmbeddingAndHead::new(&self.common)
        }
    }

    fn states(&self) -> Vec<LayerState> {
        let own = self.states.iter().take(self.config.first_shared(self.common.layers));
        own.copied().map(LayerState::Tokens).collect()
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
        let Common { hidden, eps, vocabulary, .. } = self.common;
        let size = self.config.hidden_size_per_layer_input;
        if size <= 0 {
            return Ok(None);
        }
        let vocabulary = self.config.vocab_size_per_layer_input.unwrap_or(vocabulary);
        let layers = dim(self.common.layers);
        let (embedding, projection) = ("model.embed_tokens_per_layer", "model.per_layer_model_projection");
        Ok(Some(Box::new(LayerInputs {
            embedding: weights.matrix(embedding, vocabulary, layers * size)?,
            projection: weights.linear(projection, layers * size, hidden, false)?,
            norm: weights.rms_norm("model.per_layer_projection_norm", size, eps)?,
            layers,
            size,
            hidden,
        })))
    }

    fn layer(&self, layer: &Layer, weights: &mut TensorCursor) -> Result<Vec<Residual>, Error> {
        let (hidden, size) = (self.common.hidden, self.config.hidden_size_per_layer_input);
        let before = self.norm(layer, "input_layernorm", weights)?;
        let after = Some(self.norm(layer, "post_attention_layernorm", weights)?);
        let attention = self.attention(layer, weights)?;
        let mut residuals =
            vec![Residual { after, ..Residual::new(before, Box::new(attention)) }, self.fed(layer, weights)?];
        if size > 0 {
            let input = LayerInput {
                layer: dim(layer.index),
                gate: weights.linear(&layer.name("per_layer_input_gate"), size, hidden, false)?,
                projection: weights.linear(&layer.name("per_layer_projection"), hidden, size, false)?,
            };
            let after = Some(self.norm(layer, "post_per_layer_input_norm", weights)?);
            residuals.push(Residual { after, ..Residual::bare(Box::new(input)) });
        }
        if let Some(last) = residuals.last_mut() {
            last.sum_scale = Some(weights.floats(&layer.name("layer_scalar"), &[1])?);
        }
        Ok(residuals)
    }
}
