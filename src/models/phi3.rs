//! Phi-3, Phi-3.5 and Phi-4 (<https://arxiv.org/abs/2404.14219>): Llama with fused projections in its files.
//! All layers have the window `sliding_window`, if there is one.

use serde_json::{Map, Value};

use super::config::{self, Common, Key, Keys};
use super::decoder::{Architecture, loader};
use super::given::Given;
use super::parts::Layer;
use super::rotation::Rotation;
use super::{Loading, OpenError, Setup};
use crate::error::Error;
use crate::mlx::kv::TokenState;
use crate::mlx::layers::{Attention, Fused, Gate, Mlp, Rope, Sublayer};
use crate::mlx::tensors::TensorCursor;

const KEYS: Keys = Keys {
    num_key_value_heads: Key::Or(None),
    head_dim: Key::Or(None),
    rope_theta: Key::Or(1e4),
    rope_traditional: Key::Or(false),
    ..Keys::USUAL
};

struct Phi3 {
    common: Common,
    windows: Vec<i32>,
}

/// Reads the config.
pub(super) fn open(given: &Given<'_>, setup: Setup) -> Result<Box<dyn Loading>, OpenError> {
    let (mut common, rotation) = Common::read(given, &KEYS)?;
    common.ropes = vec![rope(&common, rotation, given)?];
    let window = Key::Or(None).read(given, "sliding_window")?;
    let windows = config::windows(given, common.layers, |_| window.is_some(), window)?;
    Ok(loader(Phi3 { common, windows }, setup))
}

fn rope(common: &Common, mut rotation: Rotation, given: &Given<'_>) -> Result<Rope, OpenError> {
    let part = rotation.part.unwrap_or(1.0);
    let dims = config::rotated_part(common.attention.head_dim, part)?;
    let mut traditional = common.rope_traditional;
    // The length that the factors of a scaling are for stands beside it.
    let key = "original_max_position_embeddings";
    let original: u32 = Key::Or(4096).read(given, key)?;
    if let Some(scaling) = rotation.scaling.as_object_mut() {
        match kind(scaling) {
            "default" | "linear" => {}
            "longrope" | "su" => {
                scaling.insert(key.into(), original.into());
                traditional = false;
            }
            other => return config::unsupported(format!("rope_scaling of type {other:?}")),
        }
    }
    config::rope(dims, common.rope_theta, traditional, &rotation.scaling, given)
}

/// Returns the kind of a scaling.
fn kind(scaling: &Map<String, Value>) -> &str {
    let named = scaling.get("rope_type").or_else(|| scaling.get("type"));
    named.and_then(Value::as_str).unwrap_or("default")
}

impl Architecture for Phi3 {
    fn common(&self) -> &Common {
        &self.common
    }

    fn window(&self, layer: usize) -> i32 {
        self.windows[layer]
    }

    fn mixer(&self, layer: &Layer, weights: &mut TensorCursor) -> Result<Box<dyn Sublayer>, Error> {
        let TokenState { heads, kv_heads, head_dim, .. } = self.common.attention;
        let (queries, all) = (heads * head_dim, (heads + 2 * kv_heads) * head_dim);
        let qkv = weights.linear(&layer.name("self_attn.qkv_proj"), all, self.common.hidden, false)?;
        let output = weights.linear(&layer.name("self_attn.o_proj"), self.common.hidden, queries, false)?;
        Ok(Box::new(Attention::new(layer.index, queries, Fused::new(vec![qkv])?, output)))
    }

    fn feed_forward(&self, layer: &Layer, weights: &mut TensorCursor) -> Result<Box<dyn Sublayer>, Error> {
        let Common { hidden, inner, .. } = self.common;
        let gate_up = weights.linear(&layer.name("mlp.gate_up_proj"), 2 * inner, hidden, false)?;
        Ok(Box::new(Mlp {
            gate_up: Fused::new(vec![gate_up])?,
            down: weights.linear(&layer.name("mlp.down_proj"), hidden, inner, false)?,
            gate: Gate::Silu,
            kernels: weights.kernels(),
        }))
    }
}
