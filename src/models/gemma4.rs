//! Gemma 4 (Google, 2026), its text part: layers that attend to a window and layers that attend to all
//! positions, with heads of different sizes; last layers that read the cache of an earlier one; in the small
//! models an input of each token for every layer, in one a mixture of experts beside the MLP.

use mlx_rs::ops;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::config::{self, Common, Key, Keys};
use super::decoder::{Architecture, EmbeddingAndHead, Prelude, loader};
use super::gemma4_parts::{LayerInput, LayerInputs, Parallel};
use super::given::Given;
use super::parts::{ExpertSizes, Layer};
use super::rotation::Rotation;
use super::{Loading, OpenError, Setup};
use crate::error::Error;
use crate::mlx::dim;
use crate::mlx::kv::{LayerState, TokenState};
use crate::mlx::layers::{Attention, Fused, Gate, HeadNorms, Residual, RmsNorm, Rope, Router, Scoring};
use crate::mlx::tensors::TensorCursor;

const KEYS: Keys = Keys {
    head_dim: Key::Or(Some(256)),
    rms_norm_eps: Key::Or(1e-6),
    // Each kind of layer has its own in `rope_parameters`.
    rope_theta: Key::Always(1e4),
    rope_traditional: Key::Or(false),
    activation: "gelu_pytorch_tanh",
    activation_keys: &["hidden_activation"],
    ..Keys::USUAL
};

#[derive(Clone, Debug, Deserialize)]
struct Config {
    model_type: String,
    #[serde(default = "global_head_dim")]
    global_head_dim: Option<i32>,
    #[serde(default = "vocabulary")]
    vocab_size_per_layer_input: i32,
    num_global_key_value_heads: Option<i32>,
    /// What sets single layers apart, by their index: as transformers writes the two keys above.
    per_layer_config: Option<Map<String, Value>>,
    num_kv_shared_layers: usize,
    hidden_size_per_layer_input: Option<i32>,
    sliding_window: i32,
    #[serde(default)]
    attention_k_eq_v: bool,
    #[serde(deserialize_with = "config::nullable")]
    final_logit_softcapping: Option<f32>,
    use_double_wide_mlp: bool,
    #[serde(default)]
    enable_moe_block: bool,
    num_experts: Option<i32>,
    top_k_experts: Option<i32>,
    moe_intermediate_size: Option<i32>,
    layer_types: Vec<String>,
}

#[allow(clippy::unnecessary_wraps, reason = "null: all layers have heads of one size")]
fn global_head_dim() -> Option<i32> {
    Some(512)
}

fn vocabulary() -> i32 {
    262_144
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
pub(super) fn open(given: &Given<'_>, setup: Setup) -> Result<Box<dyn Loading>, OpenError> {
    let mut keys = KEYS;
    if given.get("model_type").is_some_and(|kind| kind == "gemma4") {
        keys.vocab_size = config::vocabulary_of_release("gemma4");
        keys.num_attention_heads = Key::Or(8);
    }
    let (mut common, _) = Common::read(given, &keys)?;
    let mut config: Config = given.parse()?;
    let inputs = config.layer_inputs().max(1).saturating_mul(dim(common.layers));
    config::sizes(&[
        ("vocab_size_per_layer_input", config.vocab_size_per_layer_input),
        ("hidden_size_per_layer_input * num_hidden_layers", inputs),
    ])?;
    if Key::Or(false).read(given, "attention_bias")? {
        return config::unsupported("attention_bias");
    }
    if given.get("use_bidirectional_attention").is_some_and(|kind| kind == "all") {
        return config::unsupported("use_bidirectional_attention \"all\"");
    }
    let kinds = config.layer_types.clone();
    config::layer_kinds(&kinds, common.layers, &[config::FULL, config::SLIDING])?;
    if kinds.last().is_some_and(|last| last != config::FULL) {
        return config::unsupported("layer_types that do not end with full_attention");
    }
    config.join_layers(&common)?;
    let states = kinds.iter().map(|kind| config.state(&common, kind)).collect::<Result<Vec<_>, _>>()?;
    let caches = config.caches(&kinds)?;
    // By index: 0 for layers with a window, 1 for the others.
    common.ropes = vec![
        config.rope(&common, config::SLIDING, common.attention.head_dim, given)?,
        config.rope(&common, config::FULL, config.full_head_dim(&common), given)?,
    ];
    let experts = if config.enable_moe_block { Some(config.experts()?) } else { None };
    Ok(loader(Gemma4 { common, config, states, caches, experts }, setup))
}

impl Config {
    /// Returns the elements of a token's input to a layer; 0 without such inputs.
    fn layer_inputs(&self) -> i32 {
        let default = if self.model_type == "gemma4_unified" { 0 } else { 256 };
        self.hidden_size_per_layer_input.unwrap_or(default)
    }

    /// Brings `per_layer_config` back to the keys for all layers without a window.
    fn join_layers(&mut self, common: &Common) -> Result<(), OpenError> {
        let Some(layers) = &self.per_layer_config else { return Ok(()) };
        let of = |layer: usize| {
            let named = layers.iter().find(|(name, _)| name.parse() == Ok(layer));
            named.and_then(|(_, own)| own.as_object()).cloned().unwrap_or_default()
        };
        let kinds = || self.layer_types.iter().enumerate();
        let full =
            kinds().rfind(|(_, kind)| *kind == config::FULL).map_or_else(Map::new, |(last, _)| of(last));
        let alike = kinds()
            .all(|(layer, kind)| of(layer) == if kind == config::FULL { full.clone() } else { Map::new() });
        let known = full.keys().all(|key| ["head_dim", "num_key_value_heads"].contains(&key.as_str()));
        if !alike || !known || layers.values().any(|own| !own.is_object()) {
            return config::unsupported("per_layer_config other than of all layers with full_attention");
        }
        let size = |key: &str| -> Result<Option<i32>, OpenError> {
            let Some(value) = full.get(key) else { return Ok(None) };
            match value.as_i64().and_then(|size| i32::try_from(size).ok()) {
                Some(size) => Ok(Some(size)),
                None => config::invalid(format!("per_layer_config: {key} is {value}")),
            }
        };
        let (head_dim, kv_heads) = (size("head_dim")?, size("num_key_value_heads")?);
        self.global_head_dim = head_dim.or(Some(common.attention.head_dim));
        self.num_global_key_value_heads = kv_heads;
        if kv_heads.is_some() && !self.attention_k_eq_v {
            return config::unsupported("per_layer_config: num_key_value_heads without attention_k_eq_v");
        }
        Ok(())
    }

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
        let window = config::window(kind, Some(self.sliding_window))?;
        Ok(TokenState { window, scale: 1.0, ..TokenState::new(heads, kv_heads, head_dim) })
    }

    fn experts(&self) -> Result<ExpertSizes, OpenError> {
        let named = |name: &str, size: Option<i32>| match size {
            Some(size) => Ok(size),
            None => config::invalid(format!("{} is missing", Given::called(name))),
        };
        let experts = named("num_experts", self.num_experts)?;
        let chosen = named("top_k_experts", self.top_k_experts)?;
        let inner = named("moe_intermediate_size", self.moe_intermediate_size)?;
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

    fn rope(&self, common: &Common, kind: &str, dims: i32, given: &Given<'_>) -> Result<Rope, OpenError> {
        let traditional = common.rope_traditional;
        if given.get("rope_parameters").is_none_or(Value::is_null) {
            let (theta, scaling) = match kind {
                config::FULL => (1e6, json!({ "partial_rotary_factor": 0.25, "rope_type": "proportional" })),
                _ => (1e4, Value::Null),
            };
            return config::rope(dims, theta, traditional, &scaling, given);
        }
        let Some(Rotation { theta, scaling, .. }) = Rotation::of_kind(given, kind)? else {
            return config::invalid(format!("rope_parameters.{kind} is missing"));
        };
        let Some(theta) = theta else {
            return config::invalid(format!("rope_parameters.{kind}.rope_theta is missing"));
        };
        config::rope(dims, theta, traditional, &scaling, given)
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
        let Common { hidden, eps, .. } = self.common;
        let size = self.config.layer_inputs();
        if size <= 0 {
            return Ok(None);
        }
        let vocabulary = self.config.vocab_size_per_layer_input;
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
        let (hidden, size) = (self.common.hidden, self.config.layer_inputs());
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
