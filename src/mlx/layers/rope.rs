//! Rotary position embedding (Su et al., <https://arxiv.org/abs/2104.09864>) for packed tokens, each with
//! a position of its own. Variants and their formulas are in `frequencies`.
//!
//! On the CPU the rotation is by tables made once per step: our attention turns queries and keys itself; in MLX's
//! operations it is `x * cos + flip(x) * sin`, three a layer where MLX's own rope takes a chain of some twenty.
//! On GPUs it is MLX's fused kernel.

use mlx_rs::error::{Exception, Result};
use mlx_rs::ops::indexing::TryIndexOp;
use mlx_rs::{Array, Axes, fast, ops};
use serde_json::Value;

use super::frequencies::{Scaled, scaled};
use crate::mlx::dim;
use crate::mlx::kernels::KernelSet;

/// The frequencies of a model, or of some of its layers.
#[derive(Clone, Debug)]
pub(crate) struct Rope {
    /// Numbers of a head that are turned, from its front.
    pub(crate) dims: i32,
    /// Whether neighbours are turned together, not halves.
    pub(crate) traditional: bool,
    /// What the turned numbers are multiplied by.
    pub(crate) magnitude: f32,
    /// Radians per position of each pair.
    frequencies: Vec<f32>,
    /// Their reciprocals, as MLX's kernel wants them.
    pub(crate) wavelengths: Array,
}

/// The rotation of one step's tokens.
#[derive(Clone, Debug)]
pub(crate) enum Rotation {
    /// Tables that broadcast over heads: `[tokens, 1, 2, dims / 2]`, or the last two swapped.
    Tables { cos: Array, sin: Array },
    /// Positions, for MLX's kernel.
    Fused(Array),
    /// `[tokens, dims / 2]`, for our own.
    Angles { cos: Array, sin: Array },
}

#[allow(clippy::cast_possible_truncation, reason = "tables are f32, as MLX has them")]
pub(super) fn to_f32(x: f64) -> f32 {
    x as f32
}

impl Rope {
    /// Frequencies that turn the first `dims` numbers of a head. Errors name what is not implemented.
    pub(crate) fn new(
        dims: i32,
        theta: f64,
        traditional: bool,
        scaling: Option<&Value>,
        context: Option<u32>,
    ) -> std::result::Result<Self, String> {
        if dims < 2 || dims % 2 != 0 {
            return Err(format!("rotary embedding of {dims} numbers"));
        }
        let Scaled { frequencies, magnitude } = scaled(dims, theta, scaling, context)?;
        let wavelengths: Vec<f32> = frequencies.iter().map(|frequency| frequency.recip()).collect();
        let wavelengths = Array::from_slice(&wavelengths, &[dim(wavelengths.len())]);
        Ok(Self { dims, traditional, magnitude, frequencies, wavelengths })
    }

    /// Whether the kernels that turn heads on CUDA do what this one asks for.
    pub(crate) fn is_plain(&self, head_dim: i32) -> bool {
        self.dims == head_dim && !self.traditional && self.magnitude == 1.0
    }

    /// The rotation for tokens at these positions.
    pub(crate) fn rotation(&self, positions: &[i32], ops: KernelSet) -> Rotation {
        match ops {
            KernelSet::Fused => Rotation::Fused(Array::from_slice(positions, &[dim(positions.len())])),
            KernelSet::Kernels(_) => self.angles(positions),
            KernelSet::Composed => self.tables(positions),
        }
    }

    /// Sine and cosine of a token's pair, with the magnitude.
    fn turn(&self, position: i32, frequency: f32) -> (f32, f32) {
        let (sin, cos) = (f64::from(position) * f64::from(frequency)).sin_cos();
        (to_f32(sin * f64::from(self.magnitude)), to_f32(cos * f64::from(self.magnitude)))
    }

    fn tables(&self, positions: &[i32]) -> Rotation {
        let (tokens, half) = (dim(positions.len()), self.frequencies.len());
        let mut cos = vec![0.0f32; positions.len() * 2 * half];
        let mut sin = cos.clone();
        for (row, &position) in positions.iter().enumerate() {
            for (pair, &frequency) in self.frequencies.iter().enumerate() {
                let (s, c) = self.turn(position, frequency);
                let (first, second) =
                    if self.traditional { (2 * pair, 2 * pair + 1) } else { (pair, half + pair) };
                let base = row * 2 * half;
                cos[base + first] = c;
                cos[base + second] = c;
                sin[base + first] = -s;
                sin[base + second] = s;
            }
        }
        let shape = if self.traditional { [tokens, 1, dim(half), 2] } else { [tokens, 1, 2, dim(half)] };
        Rotation::Tables { cos: Array::from_slice(&cos, &shape), sin: Array::from_slice(&sin, &shape) }
    }

    fn angles(&self, positions: &[i32]) -> Rotation {
        let turns = positions.iter().flat_map(|&position| {
            self.frequencies.iter().map(move |&frequency| self.turn(position, frequency))
        });
        let (sin, cos): (Vec<f32>, Vec<f32>) = turns.unzip();
        let shape = [dim(positions.len()), dim(self.frequencies.len())];
        Rotation::Angles { cos: Array::from_slice(&cos, &shape), sin: Array::from_slice(&sin, &shape) }
    }

    /// Rotates `x` `[tokens, heads, head_dim]`.
    pub(crate) fn apply(&self, x: &Array, rotation: &Rotation) -> Result<Array> {
        let (tokens, heads, head_dim) = (x.dim(0), x.dim(1), x.dim(2));
        match rotation {
            Rotation::Angles { .. } => Err(Exception::custom("attention turns by angles itself")),
            Rotation::Tables { .. } | Rotation::Fused(_) if self.dims < head_dim => {
                let turned = self.apply(&x.try_index((.., .., ..self.dims))?, rotation)?;
                ops::concatenate(&[turned, x.try_index((.., .., self.dims..))?], -1)
            }
            Rotation::Tables { cos, sin } => {
                let (pairs, axis) = if self.traditional {
                    (x.reshape(&[tokens, heads, head_dim / 2, 2])?, -1)
                } else {
                    (x.reshape(&[tokens, heads, 2, head_dim / 2])?, -2)
                };
                let turned = pairs.flip(Axes::Axis(axis))?.multiply(sin)?;
                pairs.multiply(cos)?.add(turned)?.reshape(&[tokens, heads, head_dim])
            }
            Rotation::Fused(positions) => {
                // The kernel takes one offset for each row of a batch, so each token is a row of its own.
                let rows = x.reshape(&[tokens, heads, 1, head_dim])?;
                let wavelengths = &self.wavelengths;
                let turned =
                    fast::rope_dynamic(&rows, head_dim, self.traditional, None, 1.0, positions, wavelengths)?;
                let turned = turned.reshape(&[tokens, heads, head_dim])?;
                if self.magnitude == 1.0 {
                    return Ok(turned);
                }
                turned.multiply(Array::from_f32(self.magnitude).as_dtype(x.dtype())?)
            }
        }
    }
}
