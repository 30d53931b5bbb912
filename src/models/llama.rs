//! Llama (<https://arxiv.org/abs/2302.13971>) and what shares its shape: Mistral, SmolLM2. Defaults for
//! missing config keys are mlx-lm's (models/llama.py): tied embeddings, head_dim = hidden / heads.

use mlx_rs::Array;
use mlx_rs::transforms::eval;
use serde::Deserialize;
use serde_json::Value;

use super::{ConfigError, Loading, Model, Setup};
use crate::device::batch::Batch;
use crate::device::kv::{Kv, KvShape};
use crate::device::layers::{Fused, GatedMlp, Linear, Matrix, RmsNorm, Rope};
use crate::device::weights::Weights;
use crate::error::Error;

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
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    #[serde(default = "default_theta")]
    rope_theta: f64,
    #[serde(default)]
    rope_traditional: bool,
    rope_scaling: Option<Value>,
    #[serde(default = "default_true")]
    tie_word_embeddings: bool,
    layer_types: Option<Vec<String>>,
    sliding_window: Option<i32>,
    hidden_act: Option<String>,
}

fn default_theta() -> f64 {
    10_000.0
}

fn default_true() -> bool {
    true
}

impl Config {
    fn parse(config: &Value) -> Result<Self, ConfigError> {
        let parsed = Self::deserialize(config)
            .map_err(|error| ConfigError::Invalid(format!("config.json: {error}")))?;
        parsed.check()?;
        Ok(parsed)
    }

    fn check(&self) -> Result<(), ConfigError> {
        let (heads, kv_heads) = (self.num_attention_heads, self.kv_heads());
        let sizes = [self.hidden_size, self.intermediate_size, heads, kv_heads, self.vocab_size];
        if sizes.iter().any(|&size| !(1..=1 << 24).contains(&size)) {
            return Err(ConfigError::Invalid("config.json: a size is not between 1 and 2^24".into()));
        }
        if !(1..=1024).contains(&self.num_hidden_layers) || !(1..=4096).contains(&self.head_dim()) {
            return Err(ConfigError::Invalid(
                "config.json: num_hidden_layers or head_dim is out of range".into(),
            ));
        }
        if heads % kv_heads != 0 {
            return Err(ConfigError::Invalid(format!(
                "config.json: {heads} heads do not share {kv_heads} key heads"
            )));
        }
        if self.rope_theta <= 0.0 || !self.rope_theta.is_finite() || self.rms_norm_eps < 0.0 {
            return Err(ConfigError::Invalid(
                "config.json: rope_theta or rms_norm_eps is out of range".into(),
            ));
        }
        if let Some(other) = self.hidden_act.as_deref().filter(|act| *act != "silu") {
            return Err(ConfigError::Unsupported(format!("hidden_act {other:?}")));
        }
        let known = ["full_attention", "sliding_attention"];
        let layer_types = self.layer_types.iter().flatten();
        if let Some(other) = layer_types.clone().find(|kind| !known.contains(&kind.as_str())) {
            return Err(ConfigError::Unsupported(format!("layer type {other:?}")));
        }
        if self.layer_types.is_some() && layer_types.clone().count() != self.num_hidden_layers {
            return Err(ConfigError::Invalid("config.json: layer_types does not name every layer".into()));
        }
        let slides = layer_types.into_iter().any(|kind| kind == "sliding_attention");
        if slides && self.sliding_window.is_none_or(|window| window <= 0) {
            return Err(ConfigError::Invalid(
                "config.json: sliding_attention without a sliding_window".into(),
            ));
        }
        Ok(())
    }

    /// The window of each layer; 0 is none.
    fn windows(&self) -> Vec<i32> {
        let window =
            |kind: &String| if kind == "sliding_attention" { self.sliding_window.unwrap_or(0) } else { 0 };
        let listed = self.layer_types.as_ref().map(|kinds| kinds.iter().map(window).collect());
        listed.unwrap_or_else(|| vec![0; self.num_hidden_layers])
    }

    fn head_dim(&self) -> i32 {
        self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads.max(1))
    }

    fn kv_heads(&self) -> i32 {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }
}

struct Layer {
    input_norm: RmsNorm,
    qkv: Fused,
    output: Linear,
    post_norm: RmsNorm,
    mlp: GatedMlp,
}

struct Llama {
    rope: Rope,
    embedding: Matrix,
    layers: Vec<Layer>,
    norm: RmsNorm,
    /// None if the embedding serves as head.
    head: Option<Matrix>,
}

/// Takes tensors: the embedding, then layer by layer, then norm and head.
struct Loader {
    config: Config,
    setup: Setup,
    rope: Rope,
    embedding: Option<Matrix>,
    layers: Vec<Layer>,
}

/// Reads the config.
pub(super) fn open(config: &Value, setup: Setup) -> Result<Box<dyn Loading>, ConfigError> {
    let config = Config::parse(config)?;
    let (head_dim, scaling) = (config.head_dim().unsigned_abs() as usize, config.rope_scaling.as_ref());
    let rope = Rope::new(
        head_dim,
        config.rope_theta,
        config.rope_traditional,
        scaling,
        setup.attention_ops(config.head_dim()),
    )
    .map_err(ConfigError::Unsupported)?;
    Ok(Box::new(Loader { config, setup, rope, embedding: None, layers: Vec::new() }))
}

impl Layer {
    fn load(config: &Config, index: usize, weights: &mut Weights) -> Result<Self, Error> {
        let prefix = format!("model.layers.{index}");
        let Config { hidden_size: hidden, intermediate_size: inner, rms_norm_eps: eps, .. } = *config;
        let (queries, keys) =
            (config.num_attention_heads * config.head_dim(), config.kv_heads() * config.head_dim());
        let attention = format!("{prefix}.self_attn");
        let layer = Self {
            input_norm: weights.rms_norm(&format!("{prefix}.input_layernorm"), hidden, eps)?,
            qkv: weights.fused(
                &attention,
                &[("q_proj", queries), ("k_proj", keys), ("v_proj", keys)],
                hidden,
                config.attention_bias,
            )?,
            output: weights.linear(&format!("{attention}.o_proj"), hidden, queries, config.attention_bias)?,
            post_norm: weights.rms_norm(&format!("{prefix}.post_attention_layernorm"), hidden, eps)?,
            mlp: weights.gated_mlp(&format!("{prefix}.mlp"), hidden, inner, config.mlp_bias)?,
        };
        eval(layer.arrays())?;
        Ok(layer)
    }

    fn arrays(&self) -> Vec<&Array> {
        let norms = [&self.input_norm.weight, &self.post_norm.weight];
        let matrices = self.qkv.arrays().into_iter().chain(self.output.arrays()).chain(self.mlp.arrays());
        matrices.chain(norms).collect()
    }
}

impl Loading for Loader {
    fn next(&mut self, weights: &mut Weights) -> Result<Option<Box<dyn Model>>, Error> {
        let Config { hidden_size, vocab_size, tie_word_embeddings: tied, rms_norm_eps, .. } = self.config;
        let Some(embedding) = &self.embedding else {
            weights.discard(|name| {
                name.contains("rotary_emb.inv_freq") || (tied && name.starts_with("lm_head."))
            });
            let embedding = weights.matrix("model.embed_tokens", vocab_size, hidden_size)?;
            eval(embedding.arrays())?;
            self.embedding = Some(embedding);
            return Ok(None);
        };
        if self.layers.len() < self.config.num_hidden_layers {
            self.layers.push(Layer::load(&self.config, self.layers.len(), weights)?);
            return Ok(None);
        }
        let norm = weights.rms_norm("model.norm", hidden_size, rms_norm_eps)?;
        let head = if tied { None } else { Some(weights.matrix("lm_head", vocab_size, hidden_size)?) };
        weights.finish()?;
        let model = Llama {
            rope: self.rope.clone(),
            embedding: embedding.clone(),
            layers: std::mem::take(&mut self.layers),
            norm,
            head,
        };
        eval(model.arrays())?;
        Ok(Some(Box::new(model)))
    }

    fn kv_shape(&self) -> KvShape {
        KvShape {
            windows: self.config.windows(),
            heads: self.config.num_attention_heads,
            kv_heads: self.config.kv_heads(),
            head_dim: self.config.head_dim(),
            dtype: self.setup.dtype,
            int8: self.setup.int8_kv,
            ops: self.setup.attention_ops(self.config.head_dim()),
        }
    }
}

impl Model for Llama {
    fn forward(&self, batch: &Batch, kv: &mut Kv) -> mlx_rs::error::Result<Option<Array>> {
        let rotation = self.rope.rotation(&batch.positions);
        let mut x = self.embedding.rows(&batch.tokens)?;
        let Some(first) = self.layers.first() else { return Ok(None) };
        let mut normed = first.input_norm.forward(&x)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let attended = kv.attend(index, batch, &layer.qkv.forward(&normed)?, (&self.rope, &rotation))?;
            (x, normed) = layer.output.onto(&x, &attended, &layer.post_norm)?;
            let activated = layer.mlp.activate(&normed)?;
            // The norm of what comes next; the last one is taken of the rows that are wanted only.
            let next = self.layers.get(index + 1).map_or(&self.norm, |next| &next.input_norm);
            (x, normed) = layer.mlp.down.onto(&x, &activated, next)?;
        }
        let Some(rows) = &batch.outputs else { return Ok(None) };
        let normed =
            if rows.dim(0) == x.dim(0) { normed } else { self.norm.forward(&x.take_axis(rows, 0)?)? };
        self.head.as_ref().unwrap_or(&self.embedding).project(&normed).map(Some)
    }

    fn arrays(&self) -> Vec<&Array> {
        let layers = self.layers.iter().flat_map(Layer::arrays);
        let ends = self.embedding.arrays().into_iter().chain(self.head.iter().flat_map(Matrix::arrays));
        layers.chain(ends).chain([&self.norm.weight]).collect()
    }
}
