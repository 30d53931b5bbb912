//! Phi-3, Phi-3.5 and Phi-4 (<https://arxiv.org/abs/2404.14219>): Llama with fused projections in its files. Defaults
//! for missing config keys are mlx-lm's (models/phi3.py). As there, `sliding_window` is not read: every layer sees all
//! positions.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::decoder::{Architecture, EmbeddingAndHead, loader};
use super::{ConfigError, Loading, Setup, config};
use crate::error::Error;
use crate::mlx::kv::{LayerState, TokenState};
use crate::mlx::layers::{Attention, Fused, Gate, Mlp, Residual, Rope};
use crate::mlx::tensors::TensorCursor;

fn one() -> f64 {
    1.0
}

fn context() -> u32 {
    131_072
}

#[derive(Clone, Debug, Deserialize)]
struct Config {
    hidden_size: i32,
    num_hidden_layers: usize,
    intermediate_size: i32,
    num_attention_heads: i32,
    rms_norm_eps: f32,
    vocab_size: i32,
    num_key_value_heads: Option<i32>,
    #[serde(default = "config::ten_thousand")]
    rope_theta: f64,
    #[serde(default)]
    rope_traditional: bool,
    rope_scaling: Option<Map<String, Value>>,
    #[serde(default = "one")]
    partial_rotary_factor: f64,
    #[serde(default = "context")]
    max_position_embeddings: u32,
    original_max_position_embeddings: Option<u32>,
    #[serde(default)]
    tie_word_embeddings: bool,
    hidden_act: Option<String>,
}

struct Phi3 {
    config: Config,
    state: TokenState,
    rope: Rope,
}

/// Reads the config.
pub(super) fn open(value: &Value, setup: Setup) -> Result<Box<dyn Loading>, ConfigError> {
    let config: Config = config::parse(value)?;
    let heads = config.num_attention_heads;
    let kv_heads = config.num_key_value_heads.unwrap_or(heads);
    let head_dim = config.hidden_size / heads.max(1);
    config::sizes(&[
        ("hidden_size", config.hidden_size),
        ("intermediate_size", config.intermediate_size),
        ("vocab_size", config.vocab_size),
    ])?;
    config::depth(config.num_hidden_layers)?;
    config::heads(heads, kv_heads, head_dim)?;
    config::epsilon(config.rms_norm_eps)?;
    config::activation(config.hidden_act.as_deref(), &["silu"])?;
    let rope = config.rope(head_dim)?;
    let state = TokenState::new(heads, kv_heads, head_dim);
    Ok(loader(Phi3 { config, state, rope }, setup))
}

impl Config {
    fn rope(&self, head_dim: i32) -> Result<Rope, ConfigError> {
        let (theta, part) = (self.rope_theta, self.partial_rotary_factor);
        if !(part > 0.0 && part <= 1.0) {
            return config::invalid(format!("partial_rotary_factor is {part}"));
        }
        let dims = config::part_of(head_dim, part);
        let context = json!({ "max_position_embeddings": self.max_position_embeddings });
        let Some(mut scaling) = self.rope_scaling.clone().filter(|given| !given.is_empty()) else {
            return config::rope(dims, theta, self.rope_traditional, None, &context);
        };
        let traditional = match scaling.get("type").and_then(Value::as_str).unwrap_or_default() {
            "linear" => self.rope_traditional,
            "longrope" | "su" => false,
            // mlx-lm warns and goes on without a scaling, which is another model.
            other => return Err(ConfigError::Unsupported(format!("rope_scaling of type {other:?}"))),
        };
        // The length that the factors are for stands beside the scaling, not in it.
        let key = "original_max_position_embeddings";
        if let Some(original) = self.original_max_position_embeddings {
            scaling.insert(key.into(), original.into());
        } else if !scaling.contains_key(key) {
            scaling.insert(key.into(), 4096.into());
        }
        config::rope(dims, theta, traditional, Some(&Value::Object(scaling)), &context)
    }
}

impl Architecture for Phi3 {
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

    fn adapt(&self, _: &mut TensorCursor) -> Result<(), Error> {
        Ok(())
    }

    fn layer(&self, index: usize, weights: &mut TensorCursor) -> Result<Vec<Residual>, Error> {
        let Config { hidden_size: hidden, intermediate_size: inner, rms_norm_eps: eps, .. } = self.config;
        let TokenState { heads, kv_heads, head_dim, .. } = self.state;
        let prefix = format!("model.layers.{index}");
        let (queries, numbers) = (heads * head_dim, (heads + 2 * kv_heads) * head_dim);
        let qkv = weights.linear(&format!("{prefix}.self_attn.qkv_proj"), numbers, hidden, false)?;
        let output = weights.linear(&format!("{prefix}.self_attn.o_proj"), hidden, queries, false)?;
        let attention = Attention::new(index, queries, Fused::new(vec![qkv])?, output);
        let gate_up = weights.linear(&format!("{prefix}.mlp.gate_up_proj"), 2 * inner, hidden, false)?;
        let mlp = Mlp {
            gate_up: Fused::new(vec![gate_up])?,
            down: weights.linear(&format!("{prefix}.mlp.down_proj"), hidden, inner, false)?,
            gate: Gate::Silu,
            ops: weights.ops(),
        };
        let before = weights.rms_norm(&format!("{prefix}.input_layernorm"), hidden, eps)?;
        let after = weights.rms_norm(&format!("{prefix}.post_attention_layernorm"), hidden, eps)?;
        Ok(vec![Residual::new(before, attention), Residual::new(after, mlp)])
    }
}
