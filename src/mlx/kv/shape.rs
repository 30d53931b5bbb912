//! What the layers of a model keep of a sequence: keys and values of each token, or a state of fixed size.

use mlx_rs::Dtype;

use crate::mlx::cuda;
use crate::mlx::ffi::Kernels;
use crate::mlx::kernels::KernelSet;

/// What a layer keeps.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum LayerState {
    /// Keys and values of each token.
    Tokens(TokenState),
    /// Arrays that each token changes, by their shapes for one sequence: a convolution's last inputs, a linear
    /// attention's memory. They begin as zeros, and cannot be cut back.
    Recurrent(Vec<StateShape>),
}

/// A recurrent array of one sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StateShape {
    pub(crate) shape: Vec<i32>,
    pub(crate) dtype: Dtype,
}

/// Keys and values, and how they are attended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct TokenState {
    /// Heads of queries.
    pub(crate) heads: i32,
    /// Heads of keys, shared by as many queries each.
    pub(crate) kv_heads: i32,
    /// Numbers of a head.
    pub(crate) head_dim: i32,
    /// Positions that a token sees at most; 0 is all.
    pub(crate) window: i32,
    /// Where in a key its value begins, where that is a part of it (latent attention); 0: values are kept too.
    pub(crate) values_from: i32,
    /// What scores are multiplied by.
    pub(crate) scale: f32,
    /// Scores become `softcap * tanh(score / softcap)`; 0 is off.
    pub(crate) softcap: f32,
    /// Whether each head has a sink: a score of a position without a value.
    pub(crate) sinks: bool,
}

impl TokenState {
    /// Plain attention over all positions, scaled by the root of the head's size.
    pub(crate) fn new(heads: i32, kv_heads: i32, head_dim: i32) -> Self {
        let scale = inverse_root(head_dim);
        Self { heads, kv_heads, head_dim, window: 0, values_from: 0, scale, softcap: 0.0, sinks: false }
    }

    /// Whether it is scaled as usual, with nothing done to the scores.
    fn is_plain(&self) -> bool {
        let usual = Self::new(self.heads, self.kv_heads, self.head_dim);
        Self { window: self.window, ..usual } == *self
    }

    /// Heads of a token that are kept.
    pub(crate) fn kept(&self) -> i32 {
        if self.values_from > 0 { self.kv_heads } else { 2 * self.kv_heads }
    }

    /// Numbers of a head that come out.
    pub(crate) fn width(&self) -> i32 {
        self.head_dim - self.values_from
    }
}

/// One array of a slab.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ArrayShape {
    /// `[slots, heads, capacity, numbers]`.
    PerToken { heads: i32, numbers: i32, dtype: Dtype },
    /// `[slots, ..]`.
    PerSequence(StateShape),
}

/// `1 / sqrt(size)`.
#[allow(clippy::cast_precision_loss, reason = "a head has a few hundred numbers at most")]
pub(crate) fn inverse_root(size: i32) -> f32 {
    (size as f32).sqrt().recip()
}

fn item_bytes(dtype: Dtype) -> u64 {
    match dtype {
        Dtype::Int8 => 1,
        Dtype::Float32 => 4,
        _ => 2,
    }
}

impl ArrayShape {
    fn bytes(&self) -> u64 {
        let (numbers, dtype) = match self {
            Self::PerToken { heads, numbers, dtype } => (i64::from(*heads) * i64::from(*numbers), *dtype),
            Self::PerSequence(state) => {
                (state.shape.iter().map(|&size| i64::from(size)).product(), state.dtype)
            }
        };
        numbers.unsigned_abs() * item_bytes(dtype)
    }
}

/// The shape of a model's KV cache.
#[derive(Clone, Debug)]
pub(crate) struct KvShape {
    pub(crate) layers: Vec<LayerState>,
    /// What the model computes in.
    pub(crate) dtype: Dtype,
    /// Keys and values are kept as 8-bit integers.
    pub(crate) int8: bool,
    /// What computes attention.
    pub(crate) ops: KernelSet,
}

impl KvShape {
    /// The shape of a cache with these layers, and what computes attention on it.
    pub(crate) fn new(layers: Vec<LayerState>, dtype: Dtype, int8: bool, ops: KernelSet) -> Self {
        let of_tokens = layers.iter().filter_map(|layer| match layer {
            LayerState::Tokens(state) => Some(state),
            LayerState::Recurrent(_) => None,
        });
        let fits = |state: &TokenState| ops.takes_attention(state.head_dim, state.width());
        let ops = match ops {
            KernelSet::Kernels(_) if int8 || !of_tokens.clone().all(fits) => KernelSet::Composed,
            KernelSet::Kernels(_) | KernelSet::Composed | KernelSet::Fused => ops,
        };
        Self { layers, dtype, int8, ops }
    }

    /// The layers that keep tokens.
    pub(crate) fn token_states(&self) -> impl Iterator<Item = &TokenState> {
        self.layers.iter().filter_map(|layer| match layer {
            LayerState::Tokens(state) => Some(state),
            LayerState::Recurrent(_) => None,
        })
    }

    /// The operation that does all of attention, where there is one.
    pub(crate) fn kernels(&self) -> Option<Kernels> {
        match self.ops {
            KernelSet::Kernels(kernels) => Some(kernels),
            KernelSet::Composed | KernelSet::Fused => None,
        }
    }

    /// Whether some layer keeps a state that cannot be cut back.
    pub(crate) fn is_recurrent(&self) -> bool {
        self.layers.iter().any(|layer| matches!(layer, LayerState::Recurrent(_)))
    }

    /// Whether our own attention on CUDA takes this cache.
    pub(crate) fn on_cuda(&self) -> bool {
        let takes = |state: &TokenState| {
            state.window == 0
                && state.is_plain()
                && cuda::takes_attention(self.dtype, state.head_dim, state.heads, state.kv_heads)
        };
        matches!(self.ops, KernelSet::Fused) && !self.int8 && self.token_states().all(takes)
    }

    /// The arrays of each layer in a slab.
    pub(super) fn arrays(&self) -> Vec<Vec<ArrayShape>> {
        let of_tokens = |state: &TokenState| {
            let plane = |numbers, dtype| ArrayShape::PerToken { heads: state.kept(), numbers, dtype };
            if self.int8 {
                vec![plane(state.head_dim, Dtype::Int8), plane(1, self.dtype)]
            } else {
                vec![plane(state.head_dim, self.dtype)]
            }
        };
        let of_layer = |layer: &LayerState| match layer {
            LayerState::Tokens(state) => of_tokens(state),
            LayerState::Recurrent(states) => states.iter().cloned().map(ArrayShape::PerSequence).collect(),
        };
        self.layers.iter().map(of_layer).collect()
    }

    fn bytes(&self, counts: fn(&ArrayShape) -> bool) -> u64 {
        self.arrays().iter().flatten().filter(|array| counts(array)).map(ArrayShape::bytes).sum()
    }

    /// Bytes one token takes in all layers.
    pub(crate) fn bytes_per_token(&self) -> u64 {
        self.bytes(|array| matches!(array, ArrayShape::PerToken { .. }))
    }

    /// Bytes that a sequence takes whatever its length.
    pub(crate) fn bytes_per_sequence(&self) -> u64 {
        self.bytes(|array| matches!(array, ArrayShape::PerSequence(_)))
    }
}
