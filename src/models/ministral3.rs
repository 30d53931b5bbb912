//! Ministral 3 (<https://arxiv.org/abs/2601.08584>): Mistral with YaRN and queries that grow with their position, as in
//! Llama 4. Defaults for missing config keys are mlx-lm's (models/ministral3.py).

use serde::Deserialize;
use serde_json::Value;

use super::decoder::{Architecture, EmbeddingAndHead, loader};
use super::{ConfigError, Loading, Setup, config};
use crate::error::Error;
use crate::mlx::kv::{LayerState, TokenState};
use crate::mlx::layers::{Attention, Gate, QueryScale, Residual, Rope};
use crate::mlx::tensors::TensorCursor;

#[derive(Clone, Debug, Deserialize)]
struct Config {
    hidden_size: i32,
    num_hidden_layers: usize,
    intermediate_size: i32,
    num_attention_heads: i32,
    rms_norm_eps: f32,
    vocab_size: i32,
    head_dim: Option<i32>,
    num_key_value_heads: Option<i32>,
    rope_parameters: Value,
    #[serde(default = "config::yes")]
    tie_word_embeddings: bool,
    layer_types: Option<Vec<String>>,
    sliding_window: Option<i32>,
    hidden_act: Option<String>,
}

/// What `rope_parameters` must say beside its kind of scaling.
#[derive(Clone, Debug, Deserialize)]
struct RopeParameters {
    rope_theta: f64,
    llama_4_scaling_beta: f32,
    original_max_position_embeddings: i32,
}

struct Ministral3 {
    config: Config,
    state: TokenState,
    windows: Vec<i32>,
    rope: Rope,
    query_scale: QueryScale,
}

/// Reads the config.
pub(super) fn open(value: &Value, setup: Setup) -> Result<Box<dyn Loading>, ConfigError> {
    let config: Config = config::parse(value)?;
    let parameters: RopeParameters = config::parse(&config.rope_parameters)?;
    let (heads, layers) = (config.num_attention_heads, config.num_hidden_layers);
    let kv_heads = config.num_key_value_heads.unwrap_or(heads);
    let head_dim = config.head_dim.unwrap_or(config.hidden_size / heads.max(1));
    let (beta, original) = (parameters.llama_4_scaling_beta, parameters.original_max_position_embeddings);
    config::sizes(&[
        ("hidden_size", config.hidden_size),
        ("intermediate_size", config.intermediate_size),
        ("vocab_size", config.vocab_size),
        ("original_max_position_embeddings", original),
    ])?;
    config::depth(layers)?;
    config::heads(heads, kv_heads, head_dim)?;
    config::epsilon(config.rms_norm_eps)?;
    config::activation(config.hidden_act.as_deref(), &["silu"])?;
    if !beta.is_finite() {
        return config::invalid(format!("llama_4_scaling_beta is {beta}"));
    }
    let kinds = config.layer_types.clone().unwrap_or_else(|| vec![config::FULL.to_owned(); layers]);
    config::layer_kinds(&kinds, layers, &[config::FULL, config::SLIDING])?;
    let windows = kinds.iter().map(|kind| config::window(kind, config.sliding_window));
    let windows = windows.collect::<Result<_, _>>()?;
    let rope = config::rope(head_dim, parameters.rope_theta, false, Some(&config.rope_parameters), value)?;
    let state = TokenState::new(heads, kv_heads, head_dim);
    let query_scale = QueryScale { beta, original };
    Ok(loader(Ministral3 { config, state, windows, rope, query_scale }, setup))
}

impl Architecture for Ministral3 {
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

    fn adapt(&self, weights: &mut TensorCursor) -> Result<(), Error> {
        for kind in ["weight_scale_inv", "activation_scale"] {
            let name = format!("model.layers.0.self_attn.q_proj.{kind}");
            if weights.has(&name) {
                return Err(
                    weights.invalid(format!("{name}: weights as fp8 with scales are not implemented"))
                );
            }
        }
        Ok(())
    }

    fn layer(&self, index: usize, weights: &mut TensorCursor) -> Result<Vec<Residual>, Error> {
        let Config { hidden_size: hidden, intermediate_size: inner, rms_norm_eps: eps, .. } = self.config;
        let prefix = format!("model.layers.{index}");
        let module = format!("{prefix}.self_attn");
        let attention = Attention {
            query_scale: Some(self.query_scale).filter(|scale| scale.beta != 0.0),
            ..Attention::load(weights, &module, (index, &self.state), hidden, (false, false))?
        };
        let mlp = weights.gated_mlp(&format!("{prefix}.mlp"), (hidden, inner), Gate::Silu, false)?;
        let before = weights.rms_norm(&format!("{prefix}.input_layernorm"), hidden, eps)?;
        let after = weights.rms_norm(&format!("{prefix}.post_attention_layernorm"), hidden, eps)?;
        Ok(vec![Residual::new(before, attention), Residual::new(after, mlp)])
    }
}
