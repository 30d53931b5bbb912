//! Softmax attention with its projections.

use mlx_rs::error::Result;
use mlx_rs::ops::indexing::TryIndexOp;
use mlx_rs::{Array, ops};

use super::{ForwardContext, Fused, Linear, RmsNorm, Sublayer};
use crate::error::Error;
use crate::mlx::dim;
use crate::mlx::ffi::AttentionWeights;
use crate::mlx::kernels::AttentionCall;
use crate::mlx::kv::TokenState;
use crate::mlx::tensors::TensorCursor;

/// Norms between the projections and the rotation.
pub(crate) enum HeadNorms {
    None,
    /// Norms of each head: weights `[head_dim]` of queries, keys and values, where they have one.
    Each {
        query: Array,
        key: Option<Array>,
        value: Option<Array>,
        eps: f32,
    },
    /// Norms of all heads together: weights `[heads * head_dim]`.
    Whole {
        query: RmsNorm,
        key: RmsNorm,
    },
}

/// A factor of queries that grows with their position, `1 + beta * ln(1 + floor(position / original))`, where
/// `original` is the context that the model was first trained with (Llama 4).
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct QueryScale {
    pub(crate) beta: f32,
    pub(crate) original: i32,
}

/// Attention of one layer.
pub(crate) struct Attention {
    /// The layer whose cache it writes, or only reads if it has no keys of its own.
    pub(crate) layer: usize,
    pub(crate) stores: bool,
    /// Queries, keys and values side by side; or only queries.
    pub(crate) qkv: Fused,
    pub(crate) norms: HeadNorms,
    /// Index of its rotation among the model's; None: queries and keys are not rotated.
    pub(crate) rope: Option<usize>,
    /// Scores `[heads]` of a position without a value, float32.
    pub(crate) sinks: Option<Array>,
    /// Layer whose output, after a sigmoid, is a factor of the attention's output.
    pub(crate) gate: Option<Linear>,
    pub(crate) query_scale: Option<QueryScale>,
    /// Columns of the queries in `qkv`.
    pub(crate) query_columns: i32,
    pub(crate) output: Linear,
}

impl HeadNorms {
    /// Takes norms of each head's queries and keys.
    pub(crate) fn load(
        weights: &mut TensorCursor,
        prefix: &str,
        (query, key): (&str, &str),
        head_dim: i32,
        eps: f32,
    ) -> std::result::Result<Self, Error> {
        let query = weights.floats(&format!("{prefix}.{query}.weight"), &[head_dim])?;
        let key = Some(weights.floats(&format!("{prefix}.{key}.weight"), &[head_dim])?);
        Ok(Self::Each { query, key, value: None, eps })
    }

    /// Returns the norms with 1 added to their weights, which is how Gemma's are stored.
    pub(crate) fn plus_one(self) -> Result<Self> {
        let Self::Each { query, key, value, eps } = self else { return Ok(self) };
        let more = |weight: Array| weight.add(Array::from_f32(1.0).as_dtype(weight.dtype())?);
        Ok(Self::Each { query: more(query)?, key: key.map(more).transpose()?, value, eps })
    }
}

impl QueryScale {
    /// Returns the factors `[tokens, 1]` of tokens at these positions.
    #[allow(clippy::cast_precision_loss, reason = "a few thousand at most, after the division")]
    fn factors(self, positions: &[i32]) -> Array {
        let factor = |position: &i32| 1.0 + self.beta * ((1 + position / self.original.max(1)) as f32).ln();
        let factors: Vec<f32> = positions.iter().map(factor).collect();
        Array::from_slice(&factors, &[dim(factors.len()), 1])
    }
}

impl Attention {
    /// Takes the projections q_proj, k_proj and v_proj (with `bias`) and o_proj (with `output_bias`). It
    /// rotates by the model's first rotation.
    pub(crate) fn load(
        weights: &mut TensorCursor,
        prefix: &str,
        (layer, state): (usize, &TokenState),
        hidden: i32,
        (bias, output_bias): (bool, bool),
    ) -> std::result::Result<Self, Error> {
        let (queries, keys) = (state.heads * state.head_dim, state.kv_heads * state.head_dim);
        let projections = [("q_proj", queries), ("k_proj", keys), ("v_proj", keys)];
        let qkv = weights.fused(prefix, &projections, hidden, bias)?;
        let output = weights.linear(&format!("{prefix}.o_proj"), hidden, queries, output_bias)?;
        Ok(Self::new(layer, queries, qkv, output))
    }

    /// Returns attention with these products, which rotates by the model's first rotation.
    pub(crate) fn new(layer: usize, query_columns: i32, qkv: Fused, output: Linear) -> Self {
        Self {
            layer,
            stores: true,
            qkv,
            norms: HeadNorms::None,
            rope: Some(0),
            sinks: None,
            gate: None,
            query_scale: None,
            query_columns,
            output,
        }
    }

    /// Applies the norms of all heads together, and the query scale.
    fn prepared(&self, mut qkv: Array, positions: &[i32]) -> Result<Array> {
        let queries = self.query_columns;
        if let HeadNorms::Whole { query, key } = &self.norms {
            let keys = queries + key.weight.dim(0);
            let q = query.forward(&qkv.try_index((.., ..queries))?)?;
            let k = key.forward(&qkv.try_index((.., queries..keys))?)?;
            qkv = ops::concatenate(&[q, k, qkv.try_index((.., keys..))?], -1)?;
        }
        if let Some(scale) = self.query_scale {
            let factors = scale.factors(positions).as_dtype(qkv.dtype())?;
            let q = qkv.try_index((.., ..queries))?.multiply(factors)?;
            qkv = ops::concatenate(&[q, qkv.try_index((.., queries..))?], -1)?;
        }
        Ok(qkv)
    }
}

impl Sublayer for Attention {
    fn forward(&self, x: &Array, context: &mut ForwardContext<'_>) -> Result<Array> {
        let qkv = self.prepared(self.qkv.forward(x)?, &context.batch.positions)?;
        let (weights, eps) = match &self.norms {
            HeadNorms::Each { query, key, value, eps } => {
                let (k_norm, v_norm) = (key.as_ref(), value.as_ref());
                (AttentionWeights { q_norm: Some(query), k_norm, v_norm, sinks: None }, *eps)
            }
            HeadNorms::None | HeadNorms::Whole { .. } => (AttentionWeights::default(), 0.0),
        };
        let weights = AttentionWeights { sinks: self.sinks.as_ref(), ..weights };
        let rope = self.rope.map(|rope| (&context.ropes[rope].0, &context.ropes[rope].1));
        let call = AttentionCall { layer: self.layer, stores: self.stores, weights, eps, rope };
        let out = context.kernels.attend(&call, context.batch, context.kv, &qkv)?;
        match &self.gate {
            Some(gate) => out.multiply(ops::sigmoid(gate.forward(x)?)?),
            None => Ok(out),
        }
    }

    fn last(&self) -> Option<&Linear> {
        Some(&self.output)
    }

    fn arrays(&self) -> Vec<&Array> {
        let norms = match &self.norms {
            HeadNorms::None => Vec::new(),
            HeadNorms::Each { query, key, value, eps: _ } => {
                [Some(query), key.as_ref(), value.as_ref()].into_iter().flatten().collect()
            }
            HeadNorms::Whole { query, key } => vec![&query.weight, &key.weight],
        };
        let gate = self.gate.iter().flat_map(Linear::arrays);
        let products = self.qkv.arrays().into_iter().chain(self.output.arrays()).chain(gate);
        products.chain(norms).chain(&self.sinks).collect()
    }
}
