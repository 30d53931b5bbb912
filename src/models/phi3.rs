//! Phi-3, Phi-3.5 and Phi-4 (<https://arxiv.org/abs/2404.14219>): Llama with fused projections in its files.
//! Defaults for missing config keys are mlx-lm's (models/phi3.py). As there, `sliding_window` is not read:
//! every layer attends to all positions.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::config::{self, Common, Key, Keys};
use super::decoder::{Architecture, loader};
use super::parts::Layer;
use super::{Loading, OpenError, Setup};
use crate::error::Error;
use crate::mlx::kv::TokenState;
use crate::mlx::layers::{Attention, Fused, Gate, Mlp, Rope, Sublayer};
use crate::mlx::tensors::TensorCursor;

const KEYS: Keys = Keys {
    num_key_value_heads: Key::Or(None),
    head_dim: Key::Always(None),
    rope_theta: Key::Or(1e4),
    rope_traditional: Key::Or(false),
    tie_word_embeddings: Key::Or(false),
    ..Keys::USUAL
};

fn context() -> u32 {
    131_072
}

#[derive(Clone, Debug, Deserialize)]
struct Config {
    rope_scaling: Option<Map<String, Value>>,
    #[serde(default = "config::or::<1, _>")]
    partial_rotary_factor: f64,
    #[serde(default = "context")]
    max_position_embeddings: u32,
    original_max_position_embeddings: Option<u32>,
}

struct Phi3(Common);

/// Reads the config.
pub(super) fn open(value: &Value, setup: Setup) -> Result<Box<dyn Loading>, OpenError> {
    let mut common = Common::read(value, &KEYS)?;
    common.ropes = vec![config::parse::<Config>(value)?.rope(&common)?];
    Ok(loader(Phi3(common), setup))
}

impl Config {
    fn rope(self, common: &Common) -> Result<Rope, OpenError> {
        let Common { rope_theta: theta, rope_traditional, .. } = *common;
        let dims = config::rotated_part(common.attention.head_dim, self.partial_rotary_factor)?;
        let context = json!({ "max_position_embeddings": self.max_position_embeddings });
        let Some(mut scaling) = self.rope_scaling.filter(|given| !given.is_empty()) else {
            return config::rope(dims, theta, rope_traditional, None, &context);
        };
        let traditional = match scaling.get("type").and_then(Value::as_str).unwrap_or_default() {
            "linear" => rope_traditional,
            "longrope" | "su" => false,
            // mlx-lm warns and goes on without a scaling, which is another model.
            other => return config::unsupported(format!("rope_scaling of type {other:?}")),
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
    fn common(&self) -> &Common {
        &self.0
    }

    fn mixer(&self, layer: &Layer, weights: &mut TensorCursor) -> Result<Box<dyn Sublayer>, Error> {
        let TokenState { heads, kv_heads, head_dim, .. } = self.0.attention;
        let (queries, all) = (heads * head_dim, (heads + 2 * kv_heads) * head_dim);
        let qkv = weights.linear(&layer.name("self_attn.qkv_proj"), all, self.0.hidden, false)?;
        let output = weights.linear(&layer.name("self_attn.o_proj"), self.0.hidden, queries, false)?;
        Ok(Box::new(Attention::new(layer.index, queries, Fused::new(vec![qkv])?, output)))
    }

    fn feed_forward(&self, layer: &Layer, weights: &mut TensorCursor) -> Result<Box<dyn Sublayer>, Error> {
        let Common { hidden, inner, .. } = self.0;
        let gate_up = weights.linear(&layer.name("mlp.gate_up_proj"), 2 * inner, hidden, false)?;
        Ok(Box::new(Mlp {
            gate_up: Fused::new(vec![gate_up])?,
            down: weights.linear(&layer.name("mlp.down_proj"), hidden, inner, false)?,
            gate: Gate::Silu,
            kernels: weights.kernels(),
        }))
    }
}
