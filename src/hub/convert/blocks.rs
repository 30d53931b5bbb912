//! The block formats of GGUF, and what becomes of each in an MLX folder.
//!
//! An affine format gives every group of 32 weights `w = scale * q + bias` with whole `q`. The scales of GGUF
//! have 11 significant bits, or 17 once multiplied with a 6-bit sub-scale, and `q` at most 8, so in f32 the
//! product is exact and the sum is rounded once, as in ggml's own formulas (ggml-quants.c,
//! `dequantize_row_*`): the weights are the same to the last bit.

use half::{bf16, f16};
use safetensors::Dtype;

/// Weights that share a scale and a bias.
pub(super) const GROUP: usize = 32;

/// A storage format of GGUF that can be converted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    F32,
    F16,
    Bf16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4K,
    Q5K,
    Q6K,
    Iq4Nl,
}

/// How MLX stores it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stored {
    /// One tensor, bytes unchanged.
    Same(Dtype),
    /// One f16 tensor, rounded.
    Rounded,
    /// Packed integers of that many bits, with f32 scales and biases.
    Affine(usize),
}

/// What blocks become. Dense formats fill only `weight`.
#[derive(Debug, Default)]
pub(super) struct Parts {
    pub(super) weight: Vec<u8>,
    pub(super) scales: Vec<u8>,
    pub(super) biases: Vec<u8>,
}

impl Kind {
    /// From ggml's type code; the error is the name of a type that cannot be converted.
    pub(super) fn from_code(code: u32) -> Result<Self, String> {
        let name = match code {
            0 => return Ok(Self::F32),
            1 => return Ok(Self::F16),
            2 => return Ok(Self::Q4_0),
            3 => return Ok(Self::Q4_1),
            6 => return Ok(Self::Q5_0),
            7 => return Ok(Self::Q5_1),
            8 => return Ok(Self::Q8_0),
            12 => return Ok(Self::Q4K),
            13 => return Ok(Self::Q5K),
            14 => return Ok(Self::Q6K),
            20 => return Ok(Self::Iq4Nl),
            30 => return Ok(Self::Bf16),
            9 => "Q8_1",
            10 => "Q2_K",
            11 => "Q3_K",
            15 => "Q8_K",
            16 => "IQ2_XXS",
            17 => "IQ2_XS",
            18 => "IQ3_XXS",
            19 => "IQ1_S",
            21 => "IQ3_S",
            22 => "IQ2_S",
            23 => "IQ4_XS",
            24 => "I8",
            25 => "I16",
            26 => "I32",
            27 => "I64",
            28 => "F64",
            29 => "IQ1_M",
            34 => "TQ1_0",
            35 => "TQ2_0",
            39 => "MXFP4",
            _ => return Err(format!("type {code}, which is unknown")),
        };
        Err(format!("{name}, which has no exact form in MLX"))
    }

    /// Elements and bytes of a block.
    pub(super) fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Q4_0 | Self::Iq4Nl => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q5_0 => (32, 22),
            Self::Q5_1 => (32, 24),
            Self::Q8_0 => (32, 34),
            Self::Q4K => (256, 144),
            Self::Q5K => (256, 176),
            Self::Q6K => (256, 210),
        }
    }

    pub(super) fn stored(self) -> Stored {
        match self {
            Self::F32 => Stored::Same(Dtype::F32),
            Self::F16 => Stored::Same(Dtype::F16),
            Self::Bf16 => Stored::Same(Dtype::BF16),
            Self::Q4_0 | Self::Q4_1 | Self::Q4K => Stored::Affine(4),
            Self::Q5_0 | Self::Q5_1 | Self::Q5K => Stored::Affine(5),
            Self::Q8_0 => Stored::Affine(8),
            // Groups of 16 weights, where MLX's smallest have 32; elements that are not evenly apart.
            Self::Q6K | Self::Iq4Nl => Stored::Rounded,
        }
    }

    /// Appends what whole blocks become.
    pub(super) fn convert(self, blocks: &[u8], parts: &mut Parts) {
        match self.stored() {
            Stored::Same(_) => parts.weight.extend_from_slice(blocks),
            Stored::Rounded => {
                let mut floats = Vec::new();
                self.dequantize(blocks, &mut floats);
                let rounded = floats.into_iter().flat_map(|float| f16::from_f32(float).to_le_bytes());
                parts.weight.extend(rounded);
            }
            Stored::Affine(bits) => {
                self.groups(blocks, |values, scale_and_bias| parts.push(bits, values, scale_and_bias));
            }
        }
    }

    /// Appends the elements of whole blocks, as gguf-py computes them (quants.py, `dequantize_blocks`).
    pub(super) fn dequantize(self, blocks: &[u8], floats: &mut Vec<f32>) {
        let pairs = blocks.chunks_exact(2).map(|two| [two[0], two[1]]);
        match self {
            Self::F32 => {
                let fours = blocks.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
                floats.extend(fours);
            }
            Self::F16 => floats.extend(pairs.map(|two| f16::from_le_bytes(two).to_f32())),
            Self::Bf16 => floats.extend(pairs.map(|two| bf16::from_le_bytes(two).to_f32())),
            Self::Q6K => blocks.chunks_exact(210).for_each(|block| six(block, floats)),
            Self::Iq4Nl => {
                for block in blocks.chunks_exact(18) {
                    let scale = half(block, 0);
                    let value = |q: u8| scale * f32::from(UNEVEN[usize::from(q)]);
                    floats.extend(nibbles(&block[2..18]).map(value));
                }
            }
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 | Self::Q4K | Self::Q5K => {
                self.groups(blocks, |values, (scale, bias)| {
                    floats.extend(values.map(|q| scale * f32::from(q) + bias));
                });
            }
        }
    }

    /// Calls `each` with the elements of every group of whole blocks, and with their scale and bias. Does
    /// nothing for formats that are not affine.
    fn groups(self, blocks: &[u8], mut each: impl FnMut([u8; GROUP], (f32, f32))) {
        for block in blocks.chunks_exact(self.block().1) {
            match self {
                Self::F32 | Self::F16 | Self::Bf16 | Self::Q6K | Self::Iq4Nl => {}
                Self::Q4_0 => each(nibbles(&block[2..18]), centred(block, 8.0)),
                Self::Q4_1 => each(nibbles(&block[4..20]), (half(block, 0), half(block, 2))),
                Self::Q5_0 => each(fives(&block[2..22]), centred(block, 16.0)),
                Self::Q5_1 => each(fives(&block[4..24]), (half(block, 0), half(block, 2))),
                Self::Q8_0 => {
                    // Two's complement plus 128 is the top bit turned.
                    each(std::array::from_fn(|i| block[2 + i] ^ 0x80), centred(block, 128.0));
                }
                Self::Q4K => {
                    for group in 0..8 {
                        each(k_nibbles(&block[16..], group), k_scale(block, group));
                    }
                }
                Self::Q5K => {
                    for group in 0..8 {
                        let mut values = k_nibbles(&block[48..], group);
                        for (value, high) in values.iter_mut().zip(&block[16..48]) {
                            *value |= (high >> group & 1) << 4;
                        }
                        each(values, k_scale(block, group));
                    }
                }
            }
        }
    }
}

/// Elements of IQ4_NL (ggml-common.h, `kvalues_iq4nl`).
const UNEVEN: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

impl Parts {
    /// Appends a group. MLX packs from the lowest bit of the first byte on (mlx/backend/cpu/quantized.cpp):
    /// 8 values fill `bits` bytes for every width.
    fn push(&mut self, bits: usize, values: [u8; GROUP], (scale, bias): (f32, f32)) {
        for eight in values.chunks_exact(8) {
            let packed = eight.iter().rev().fold(0u64, |packed, &value| packed << bits | u64::from(value));
            self.weight.extend_from_slice(&packed.to_le_bytes()[..bits]);
        }
        self.scales.extend_from_slice(&scale.to_le_bytes());
        self.biases.extend_from_slice(&bias.to_le_bytes());
    }
}

fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Scale and bias of formats whose values lie around a middle.
fn centred(block: &[u8], middle: f32) -> (f32, f32) {
    let scale = half(block, 0);
    (scale, -middle * scale)
}

/// 16 bytes: the low halves are the first 16 values, the high halves the others.
fn nibbles(bytes: &[u8]) -> [u8; GROUP] {
    std::array::from_fn(|i| if i < 16 { bytes[i] & 15 } else { bytes[i - 16] >> 4 })
}

/// 4 bytes of fifth bits, then 16 bytes as in [`nibbles`].
fn fives(bytes: &[u8]) -> [u8; GROUP] {
    let low = nibbles(&bytes[4..]);
    std::array::from_fn(|i| low[i] | (bytes[i / 8] >> (i % 8) & 1) << 4)
}

/// Two groups share 32 bytes: the even one has the low halves.
fn k_nibbles(bytes: &[u8], group: usize) -> [u8; GROUP] {
    std::array::from_fn(|i| bytes[group / 2 * 32 + i] >> (group % 2 * 4) & 15)
}

/// A group's scale and bias: two f16, each times six bits out of the 12 bytes after them.
fn k_scale(block: &[u8], group: usize) -> (f32, f32) {
    let packed = &block[4..16];
    let (scale, least) = if group < 4 {
        (packed[group] & 63, packed[group + 4] & 63)
    } else {
        let low = packed[group + 4];
        (low & 15 | packed[group - 4] >> 6 << 4, low >> 4 | packed[group] >> 6 << 4)
    };
    (half(block, 0) * f32::from(scale), -(half(block, 2) * f32::from(least)))
}

/// 128 bytes of low halves, 64 of high quarters, 16 scales of 16 values each, and an f16 for all.
fn six(block: &[u8], floats: &mut Vec<f32>) {
    let all = half(block, 208);
    for i in 0..256 {
        let (part, at) = (i / 128, i % 128);
        let low = block[part * 64 + at % 64] >> (at / 64 * 4) & 15;
        let high = block[128 + part * 32 + at % 32] >> (at / 32 * 2) & 3;
        let value = f32::from(low | high << 4) - 32.0;
        let scale = all * f32::from(i8::from_le_bytes([block[192 + i / 16]]));
        floats.push(scale * value);
    }
}

#[cfg(test)]
#[path = "blocks_tests.rs"]
mod tests;
