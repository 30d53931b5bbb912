//! Llama (<https://arxiv.org/abs/2302.13971>) and what shares its shape: Mistral, SmolLM2, and SmolLM3, which tells
//! positions in some layers only. Defaults for missing config keys are mlx-lm's (models/llama.py, smollm3.py): tied
//! embeddings, head_dim = hidden / heads.

use serde::Deserialize;
use serde_json::Value;

use super::decoder::{Architecture, EmbeddingAndHead, loader};
use super::{ConfigError, Loading, Setup, config};
use crate::error::Error;
use crate::mlx::kv::{LayerState, TokenState};
use crate::mlx::layers::{Attention, Gate, Residual, Rope};
use crate::mlx::tensors::TensorCursor;

#[derive(Clone, Debug, Deserialize)]
struct Config {
    model_type: String,
    hidden_size: i32,
    num_hidden_layers: usize,
    intermediate_size: i32,
    num_attention_heads: i32,
    rms_norm_eps: f32,
    vocab_size: i32,
    head_dim: Option<i32>,
    num_key_value_heads: Option<i32>,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    #[serde(default = "config::ten_thousand")]
    rope_theta: f64,
    #[serde(default)]
    rope_traditional: bool,
    rope_scaling: Option<Value>,
    #[serde(default = "config::yes")]
    tie_word_embeddings: bool,
    layer_types: Option<Vec<String>>,
    sliding_window: Option<i32>,
    hidden_act: Option<String>,
    no_rope_layers: Option<Vec<i32>>,
    no_rope_layer_interval: Option<usize>,
}

struct Llama {
    config: Config,
    state: TokenState,
    windows: Vec<i32>,
    rope: Rope,
    /// Whether each layer tells positions.
    turns: Vec<bool>,
}

/// Reads the config.
pub(super) fn open(value: &Value, setup: Setup) -> Result<Box<dyn Loading>, ConfigError> {
    let config: Config = config::parse(value)?;
    let (heads, layers) = (config.num_attention_heads, config.num_hidden_layers);
    let kv_heads = config.num_key_value_heads.unwrap_or(heads);
    let head_dim = config.head_dim.unwrap_or(config.hidden_size / heads.max(1));
    config::sizes(&[
        ("hidden_size", config.hidden_size),
        ("intermediate_size", config.intermediate_size),
        ("vocab_size", config.vocab_size),
    ])?;
    config::depth(layers)?;
    config::heads(heads, kv_heads, head_dim)?;
    config::epsilon(config.rms_norm_eps)?;
    config::activation(config.hidden_act.as_deref(), &["silu"])?;
    let kinds = config.layer_types.clone().unwrap_or_else(|| vec![config::FULL.to_owned(); layers]);
    config::layer_kinds(&kinds, layers, &[config::FULL, config::SLIDING])?;
    let windows = kinds.iter().map(|kind| config::window(kind, config.sliding_window));
    let windows = windows.collect::<Result<_, _>>()?;
    let (theta, traditional) = (config.rope_theta, config.rope_traditional);
    let rope = config::rope(head_dim, theta, traditional, config.rope_scaling.as_ref(), value)?;
    let turns = config.turns();
    if turns.len() != layers {
        return config::invalid("no_rope_layers does not name every layer");
    }
    let state = TokenState::new(heads, kv_heads, head_dim);
    Ok(loader(Llama { config, state, windows, rope, turns }, setup))
}

impl Config {
    fn turns(&self) -> Vec<bool> {
        let layers = self.num_hidden_layers;
        match (&self.no_rope_layers, self.model_type.as_str()) {
            (Some(listed), "smollm3") => listed.iter().map(|&turns| turns != 0).collect(),
            (None, "smollm3") => {
                let interval = self.no_rope_layer_interval.unwrap_or(4).max(1);
                (1..=layers).map(|layer| layer % interval != 0).collect()
            }
            _ => vec![true; layers],
        }
    }
}

impl Architecture for Llama {
    fn ends(&self) -> EmbeddingAndHead {
        let Config { hidden_size, vocab_size, rms_norm_eps, tie_word_embeddings, .. } = self.config;
        EmbeddingAndHead::new(hidden_size, vocab_size, rms_norm_eps, tie_word_embeddings)
    }

    fn states(&self) -> Vec<LayerState> {
        let state = |&window: &i32| LayerState::Tokens(config::windowed(self.state, window));
        self.windows.iter().map(state).collect()
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
        let Config { attention_bias, mlp_bias, .. } = self.config;
        let prefix = format!("model.layers.{index}");
        let (module, biases) = (format!("{prefix}.self_attn"), (attention_bias, attention_bias));
        let attention = Attention {
            rope: self.turns[index].then_some(0),
            ..Attention::load(weights, &module, (index, &self.state), hidden, biases)?
        };
        let mlp = weights.gated_mlp(&format!("{prefix}.mlp"), (hidden, inner), Gate::Silu, mlp_bias)?;
        let before = weights.rms_norm(&format!("{prefix}.input_layernorm"), hidden, eps)?;
        let after = weights.rms_norm(&format!("{prefix}.post_attention_layernorm"), hidden, eps)?;
        Ok(vec![Residual::new(before, attention), Residual::new(after, mlp)])
    }
}
