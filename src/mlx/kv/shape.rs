//! The shape of KV caches: what each layer stores of a sequence, keys and values of each token or a state of
//! fixed size.

use mlx_rs::Dtype;

/// The state of a sequence that a layer stores.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum LayerState {
    /// Keys and values of each token.
    Tokens(TokenState),
    /// Arrays that each token changes, by their shapes for one sequence: a convolution's last inputs, a
    /// linear attention's memory. They begin as zeros, and cannot be cut back to fewer tokens.
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
    /// Heads of keys, each shared by `heads / kv_heads` queries.
    pub(crate) kv_heads: i32,
    /// Elements of a head.
    pub(crate) head_dim: i32,
    /// Last positions that a token attends to; 0 is all.
    pub(crate) window: i32,
    /// Element of a key at which its value begins (latent attention); 0: values are stored on their own.
    pub(crate) values_from: i32,
    /// Factor of the scores.
    pub(crate) scale: f32,
    /// Scores become `softcap * tanh(score / softcap)`; 0 is off.
    pub(crate) softcap: f32,
    /// Whether each head has a sink: the score of a position without a value.
    pub(crate) sinks: bool,
}

impl TokenState {
    /// Returns plain attention over all positions, scaled by the inverse root of the head's size.
    pub(crate) fn new(heads: i32, kv_heads: i32, head_dim: i32) -> Self {
        let scale = inverse_root(head_dim);
        Self { heads, kv_heads, head_dim, window: 0, values_from: 0, scale, softcap: 0.0, sinks: false }
    }

    /// Whether its scores are scaled as usual and not changed otherwise.
    pub(crate) fn is_plain(&self) -> bool {
        let usual = Self::new(self.heads, self.kv_heads, self.head_dim);
        Self { window: self.window, ..usual } == *self
    }

    /// Returns the elements of a head's output.
    pub(crate) fn width(&self) -> i32 {
        self.head_dim - self.values_from
    }
}

/// One array of a slab.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ArrayShape {
    /// `[slots, heads, capacity, elements]`.
    PerToken { heads: i32, elements: i32, dtype: Dtype },
    /// `[slots, ..]`.
    PerSequence(StateShape),
}

/// Returns `1 / sqrt(size)`.
#[allow(clippy::cast_precision_loss, reason = "a head has a few hundred elements at most")]
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
        let (elements, dtype) = match self {
            Self::PerToken { heads, elements, dtype } => (i64::from(*heads) * i64::from(*elements), *dtype),
            Self::PerSequence(state) => {
                (state.shape.iter().map(|&size| i64::from(size)).product(), state.dtype)
            }
        };
        elements.unsigned_abs() * item_bytes(dtype)
    }
}

/// The shape of a model's KV cache.
#[derive(Clone, Debug)]
pub(crate) struct KvShape {
    pub(crate) layers: Vec<LayerState>,
    /// Dtype that the model computes in.
    pub(crate) dtype: Dtype,
    /// Whether keys and values are stored as 8-bit integers.
    pub(crate) int8: bool,
}

impl KvShape {
    /// Returns the layers that store tokens.
    pub(crate) fn token_states(&self) -> impl Iterator<Item = &TokenState> {
        self.layers.iter().filter_map(|layer| match layer {
            LayerState::Tokens(state) => Some(state),
            LayerState::Recurrent(_) => None,
        })
    }

    /// Whether some layer has a state that cannot be cut back.
    pub(crate) fn is_recurrent(&self) -> bool {
        self.layers.iter().any(|layer| matches!(layer, LayerState::Recurrent(_)))
    }

    /// Returns the arrays of each layer in a slab.
    pub(super) fn arrays(&self) -> Vec<Vec<ArrayShape>> {
        let of_tokens = |state: &TokenState| {
            let plane = |elements, dtype| ArrayShape::PerToken { heads: state.kv_heads, elements, dtype };
            let stored = if self.int8 {
                vec![plane(state.head_dim, Dtype::Int8), plane(1, self.dtype)]
            } else {
                vec![plane(state.head_dim, self.dtype)]
            };
            // Keys, and values where they are stored on their own.
            let parts = if state.values_from > 0 { 1 } else { 2 };
            std::iter::repeat_n(stored, parts).flatten().collect()
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

    /// Returns the number of arrays that hold a layer's keys, or its values.
    pub(super) fn arrays_of_part(&self) -> usize {
        if self.int8 { 2 } else { 1 }
    }

    /// Returns the bytes of one token in all layers.
    pub(crate) fn bytes_per_token(&self) -> u64 {
        self.bytes(|array| matches!(array, ArrayShape::PerToken { .. }))
    }

    /// Returns the bytes of a sequence that do not depend on its length.
    pub(crate) fn bytes_per_sequence(&self) -> u64 {
        self.bytes(|array| matches!(array, ArrayShape::PerSequence(_)))
    }
}
