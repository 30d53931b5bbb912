//! Rotary position embedding (Su et al., <https://arxiv.org/abs/2104.09864>) for packed tokens, each at its
//! own position. Variants and their formulas are in `frequencies`; the kernel sets rotate by the tables that
//! are made here.

mod frequencies;

use mlx_rs::Array;
use serde_json::Value;

use crate::mlx::dim;
use frequencies::{Scaled, scaled};

pub(crate) use frequencies::yarn_magnitude;

/// The rotation of a model, or of some of its layers.
#[derive(Clone, Debug)]
pub(crate) struct Rope {
    /// Rotated elements of a head, from its front.
    pub(crate) dims: i32,
    /// Whether a pair is two neighbours (true) or an element of each half (false).
    pub(crate) traditional: bool,
    /// Factor of the rotated elements.
    pub(crate) magnitude: f32,
    /// Radians per position of each pair.
    frequencies: Vec<f32>,
    /// The same before they are scaled.
    plain: Vec<f32>,
    /// Their reciprocals `[dims / 2]`, as MLX's kernel takes them.
    pub(crate) wavelengths: Array,
}

/// Cosines and sines of a step's tokens, times the magnitude.
#[derive(Clone, Debug)]
pub(crate) struct Angles {
    pub(crate) cos: Array,
    pub(crate) sin: Array,
}

#[allow(clippy::cast_possible_truncation, reason = "tables are f32, as MLX has them")]
fn to_f32(x: f64) -> f32 {
    x as f32
}

impl Rope {
    /// Returns the rotation of the first `dims` elements of a head. Errors name what is not implemented.
    pub(crate) fn new(
        dims: i32,
        theta: f64,
        traditional: bool,
        scaling: Option<&Value>,
        context: Option<u32>,
    ) -> Result<Self, String> {
        if dims < 2 || dims % 2 != 0 {
            return Err(format!("rotary embedding of {dims} dimensions"));
        }
        let Scaled { frequencies, magnitude } = scaled(dims, theta, scaling, context)?;
        let plain = scaled(dims, theta, None, context)?.frequencies;
        let wavelengths: Vec<f32> = frequencies.iter().map(|frequency| frequency.recip()).collect();
        let wavelengths = Array::from_slice(&wavelengths, &[dim(wavelengths.len())]);
        Ok(Self { dims, traditional, magnitude, frequencies, plain, wavelengths })
    }

    /// Whether these are the frequencies, scaled or not, but for the rounding of short floats.
    pub(crate) fn has_frequencies(&self, stored: &[f32]) -> bool {
        let near = |known: &[f32]| {
            known.len() == stored.len()
                && known
                    .iter()
                    .zip(stored)
                    .all(|(known, stored)| (known - stored).abs() <= 0.01 * known + 1e-7)
        };
        near(&self.frequencies) || near(&self.plain)
    }

    /// Whether whole heads are rotated by halves and not scaled: the only rotation of our CUDA kernels.
    pub(crate) fn is_plain(&self, head_dim: i32) -> bool {
        self.dims == head_dim && !self.traditional && self.magnitude == 1.0
    }

    /// Returns sine and cosine of a token's pair, times the magnitude.
    fn sin_cos(&self, position: i32, frequency: f32) -> (f32, f32) {
        let (sin, cos) = (f64::from(position) * f64::from(frequency)).sin_cos();
        (to_f32(sin * f64::from(self.magnitude)), to_f32(cos * f64::from(self.magnitude)))
    }

    /// Returns tables that broadcast over heads, `[tokens, 1, 2, dims / 2]` (or the last two axes swapped, if
    /// traditional): sines have the sign with which they multiply the pair's other element.
    pub(crate) fn tables(&self, positions: &[i32]) -> Angles {
        let (tokens, half) = (dim(positions.len()), self.frequencies.len());
        let mut cos = vec![0.0f32; positions.len() * 2 * half];
        let mut sin = cos.clone();
        for (row, &position) in positions.iter().enumerate() {
            for (pair, &frequency) in self.frequencies.iter().enumerate() {
                let (s, c) = self.sin_cos(position, frequency);
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
        Angles { cos: Array::from_slice(&cos, &shape), sin: Array::from_slice(&sin, &shape) }
    }

    /// Returns cosines and sines of each pair, `[tokens, dims / 2]`.
    pub(crate) fn angles(&self, positions: &[i32]) -> Angles {
        let all = positions.iter().flat_map(|&position| {
            self.frequencies.iter().map(move |&frequency| self.sin_cos(position, frequency))
        });
        let (sin, cos): (Vec<f32>, Vec<f32>) = all.unzip();
        let shape = [dim(positions.len()), dim(self.frequencies.len())];
        Angles { cos: Array::from_slice(&cos, &shape), sin: Array::from_slice(&sin, &shape) }
    }
}
