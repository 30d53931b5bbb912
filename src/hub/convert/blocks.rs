//! The block formats of GGUF, and what becomes of each in an MLX folder.
//!
//! An affine format gives every group of 32 weights `w = scale * q + bias` with whole `q`. The scales of GGUF
//! have 11 significant bits, or 17 once multiplied with a 6-bit sub-scale, and `q` at most 8, so in f32 the
//! product is exact and the sum is rounded once, as in ggml's own formulas (ggml-quants.c,
//! `dequantize_row_*`): the weights are the same to the last bit.

use half::f16;
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
            30 => return Ok(Self::Bf16),
            9 => "Q8_1",
            10 => "Q2_K",
            11 => "Q3_K",
            15 => "Q8_K",
            16 => "IQ2_XXS",
            17 => "IQ2_XS",
            18 => "IQ3_XXS",
            19 => "IQ1_S",
            20 => "IQ4_NL",
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
            Self::Q4_0 => (32, 18),
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
            // Its groups have 16 weights; MLX's smallest have 32.
            Self::Q6K => Stored::Rounded,
        }
    }

    /// Appends what whole blocks become.
    pub(super) fn convert(self, blocks: &[u8], parts: &mut Parts) {
        for block in blocks.chunks_exact(self.block().1) {
            match self {
                Self::F32 | Self::F16 | Self::Bf16 => parts.weight.extend_from_slice(block),
                Self::Q4_0 => parts.push(4, &nibbles(&block[2..18]), centred(block, 8.0)),
                Self::Q4_1 => parts.push(4, &nibbles(&block[4..20]), (half(block, 0), half(block, 2))),
                Self::Q5_0 => parts.push(5, &fives(&block[2..22]), centred(block, 16.0)),
                Self::Q5_1 => parts.push(5, &fives(&block[4..24]), (half(block, 0), half(block, 2))),
                Self::Q8_0 => {
                    // Two's complement plus 128 is the top bit turned.
                    let values = std::array::from_fn(|i| block[2 + i] ^ 0x80);
                    parts.push(8, &values, centred(block, 128.0));
                }
                Self::Q4K => {
                    for group in 0..8 {
                        parts.push(4, &k_nibbles(&block[16..], group), k_scale(block, group));
                    }
                }
                Self::Q5K => {
                    for group in 0..8 {
                        let mut values = k_nibbles(&block[48..], group);
                        for (value, high) in values.iter_mut().zip(&block[16..48]) {
                            *value |= (high >> group & 1) << 4;
                        }
                        parts.push(5, &values, k_scale(block, group));
                    }
                }
                Self::Q6K => six(block, &mut parts.weight),
            }
        }
    }
}

impl Parts {
    pub(super) fn clear(&mut self) {
        self.weight.clear();
        self.scales.clear();
        self.biases.clear();
    }

    /// Appends a group. MLX packs from the lowest bit of the first byte on (mlx/backend/cpu/quantized.cpp):
    /// 8 values fill `bits` bytes for every width.
    fn push(&mut self, bits: usize, values: &[u8; GROUP], (scale, bias): (f32, f32)) {
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
fn six(block: &[u8], out: &mut Vec<u8>) {
    let all = half(block, 208);
    for i in 0..256 {
        let (part, at) = (i / 128, i % 128);
        let low = block[part * 64 + at % 64] >> (at / 64 * 4) & 15;
        let high = block[128 + part * 32 + at % 32] >> (at / 32 * 2) & 3;
        let value = f32::from(low | high << 4) - 32.0;
        let scale = all * f32::from(i8::from_le_bytes([block[192 + i / 16]]));
        out.extend_from_slice(&f16::from_f32(scale * value).to_le_bytes());
    }
}

#[cfg(test)]
#[path = "blocks_tests.rs"]
mod tests;
