//! Parked caches as plain data, so that they can be written to disk and read again off the engine's thread: a
//! cache is its segments, each the arrays of some consecutive tokens and the states saved in them. The layout
//! says what the arrays are; nothing is believed of data that does not fit it.

use std::any::Any;
use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use super::{Base, ParkedId};
use crate::error::Error;

/// The type of an array's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvElement {
    /// 32-bit floats.
    Float32,
    /// IEEE half precision.
    Float16,
    /// bfloat16.
    Bfloat16,
    /// 8-bit integers.
    Int8,
}

impl KvElement {
    /// Returns the bytes of one element.
    #[must_use]
    pub fn bytes(self) -> u64 {
        match self {
            Self::Float32 => 4,
            Self::Float16 | Self::Bfloat16 => 2,
            Self::Int8 => 1,
        }
    }
}

/// One array of a KV cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KvArray {
    /// Keys or values of a segment of `tokens`: `[1, heads, tokens, elements]`.
    PerToken {
        /// Number of heads.
        heads: u32,
        /// Elements of a head and token.
        elements: u32,
        /// Their type.
        element: KvElement,
    },
    /// A state of a checkpoint: `[1, ..]`.
    PerSequence {
        /// The shape after the first 1.
        shape: Vec<u32>,
        /// Type of the elements.
        element: KvElement,
    },
}

impl KvArray {
    /// Returns the type of its elements.
    #[must_use]
    pub fn element(&self) -> KvElement {
        match self {
            Self::PerToken { element, .. } | Self::PerSequence { element, .. } => *element,
        }
    }

    /// Returns its shape in a segment of `tokens`; a state's does not depend on them.
    #[must_use]
    pub fn shape(&self, tokens: u32) -> Vec<u32> {
        match self {
            Self::PerToken { heads, elements, .. } => vec![1, *heads, tokens, *elements],
            Self::PerSequence { shape, .. } => std::iter::once(1).chain(shape.iter().copied()).collect(),
        }
    }

    /// Returns its bytes in a segment of `tokens`; saturates.
    #[must_use]
    pub fn bytes(&self, tokens: u32) -> u64 {
        let sizes = self.shape(tokens).into_iter().map(u64::from);
        sizes.fold(self.element().bytes(), u64::saturating_mul)
    }
}

/// The arrays of a model's KV cache, in a fixed order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KvLayout {
    /// All of them, layer by layer.
    pub arrays: Vec<KvArray>,
}

impl KvLayout {
    /// Returns the arrays of a segment, or those of a checkpoint.
    pub fn of(&self, part: KvPart) -> impl Iterator<Item = &KvArray> {
        self.arrays.iter().filter(move |array| match array {
            KvArray::PerToken { .. } => part == KvPart::Tokens,
            KvArray::PerSequence { .. } => part == KvPart::States,
        })
    }

    /// Returns whether a cache can be cut back to its checkpoints only.
    #[must_use]
    pub fn is_recurrent(&self) -> bool {
        self.of(KvPart::States).next().is_some()
    }

    /// Returns the bytes of a part of `tokens`; saturates.
    #[must_use]
    pub fn bytes(&self, part: KvPart, tokens: u32) -> u64 {
        self.of(part).fold(0, |sum: u64, array| sum.saturating_add(array.bytes(tokens)))
    }
}

/// What arrays are of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvPart {
    /// The keys and values of tokens.
    Tokens,
    /// The states of a checkpoint.
    States,
}

/// Arrays that a device made, or that [`BuildKv`] made for it.
pub trait KvArrays: Any + Debug + Send + Sync {
    /// Returns the bytes of each array, row by row, in the order of the layout. Reads memory that is there;
    /// on a GPU of its own memory the first call copies it, so call it off the engine's thread.
    ///
    /// # Errors
    /// The device does not show them.
    fn bytes(&self) -> Result<Vec<&[u8]>, Error>;
}

/// Arrays as they are handed around; cheap to clone.
pub type KvContent = Arc<dyn KvArrays>;

/// A segment of a parked cache.
#[derive(Clone, Debug)]
pub struct KvSegment {
    /// Its tokens.
    pub tokens: Range<u32>,
    /// Their keys and values: the arrays of [`KvPart::Tokens`].
    pub content: KvContent,
    /// Checkpoints in it by their lengths, ascending: the arrays of [`KvPart::States`]. None where the layout
    /// has no states.
    pub states: Vec<(u32, KvContent)>,
}

/// A parked cache to make of plain data. It has the checkpoints of its base up to there, and those of its
/// segments.
#[derive(Clone, Debug)]
pub struct Importing {
    /// Its number, given by the engine.
    pub id: ParkedId,
    /// What it shares with a parked cache; a segment of that ends there.
    pub base: Option<Base>,
    /// The rest, each segment from where the one before ends.
    pub segments: Vec<KvSegment>,
}

/// Why a cache was not imported. Nothing of it was.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ImportError {
    /// The data is not a cache of this model.
    #[error("not a cache of this model: {0}")]
    Unfit(String),
    /// The device failed.
    #[error(transparent)]
    Device(#[from] Error),
}

/// Makes a device's arrays of bytes, on any thread: a copy of them, which the engine only links in.
pub trait BuildKv: Debug + Send + Sync {
    /// Begins a part of a cache.
    fn begin(&self) -> Box<dyn KvBuilding>;
}

/// A part of a cache that is being built.
pub trait KvBuilding {
    /// Adds an array of `tokens`, with bytes row by row.
    ///
    /// # Errors
    /// They are not as many as its shape says, or the device has no memory for them.
    fn add(&mut self, array: &KvArray, tokens: u32, bytes: &[u8]) -> Result<(), Error>;

    /// Returns the arrays.
    ///
    /// # Errors
    /// The device failed.
    fn finish(self: Box<Self>) -> Result<KvContent, Error>;
}

/// Checks that segments follow one another from `start` on, and that their states stand in them. Returns
/// where the last one ends.
///
/// # Errors
/// What of it is not so.
pub fn check_segments(start: u32, segments: &[KvSegment]) -> Result<u32, ImportError> {
    segments.iter().try_fold(start, |at, KvSegment { tokens, states, .. }| {
        if tokens.start != at || tokens.end <= at {
            return Err(ImportError::Unfit(format!("a segment of {tokens:?} where {at} begins")));
        }
        let lengths: Vec<u32> = states.iter().map(|(length, _)| *length).collect();
        let inside = lengths.iter().all(|length| (tokens.start + 1..=tokens.end).contains(length));
        if !inside || !lengths.windows(2).all(|pair| pair[0] < pair[1]) {
            return Err(ImportError::Unfit(format!("checkpoints {lengths:?} in a segment of {tokens:?}")));
        }
        Ok(tokens.end)
    })
}
