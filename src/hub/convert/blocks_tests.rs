//! Every block format against ggml's formula, written out value by value.

use super::*;

/// Bytes that look random, the same in every run.
fn noise(len: usize, seed: u32) -> Vec<u8> {
    let mut state = seed.wrapping_mul(747_796_405).wrapping_add(1);
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state.to_be_bytes()[0]
        })
        .collect()
}

/// A block of noise whose f16 fields, at `halves`, are ordinary numbers.
fn block(kind: Kind, halves: &[usize], seed: u32) -> Vec<u8> {
    let mut block = noise(kind.block().1, seed);
    for (i, &at) in halves.iter().enumerate() {
        let value = f16::from_f32(0.0123 * (i + 1) as f32 * if seed.is_multiple_of(2) { 1.0 } else { -1.0 });
        block[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }
    block
}

/// What MLX computes: bits from the lowest up, then `scale * q + bias` in f32.
fn mlx(kind: Kind, block: &[u8]) -> Vec<f32> {
    let Stored::Affine(bits) = kind.stored() else { panic!("{kind:?} is dense") };
    let mut parts = Parts::default();
    kind.convert(block, &mut parts);
    let float = |bytes: &[u8], i: usize| f32::from_le_bytes(bytes[i * 4..i * 4 + 4].try_into().unwrap());
    let bit = |at: usize| u32::from(parts.weight[at / 8] >> (at % 8) & 1);
    (0..kind.block().0)
        .map(|i| {
            let q = (0..bits).fold(0, |q, b| q | bit(i * bits + b) << b);
            float(&parts.scales, i / GROUP) * q as f32 + float(&parts.biases, i / GROUP)
        })
        .collect()
}

fn at(block: &[u8], offset: usize) -> f32 {
    half(block, offset)
}

#[test]
fn blocks_of_32_are_exact() {
    for seed in 0..20 {
        let low = |qs: &[u8], i: usize| i32::from(if i < 16 { qs[i] & 15 } else { qs[i - 16] >> 4 });
        let fifth = |b: &[u8], i: usize| (i32::from_le_bytes(b[..4].try_into().unwrap()) >> i & 1) << 4;
        let b = block(Kind::Q4_0, &[0], seed);
        let expected: Vec<f32> = (0..32).map(|i| (low(&b[2..], i) - 8) as f32 * at(&b, 0)).collect();
        assert_eq!(mlx(Kind::Q4_0, &b), expected);
        let b = block(Kind::Q4_1, &[0, 2], seed);
        let expected: Vec<f32> = (0..32).map(|i| low(&b[4..], i) as f32 * at(&b, 0) + at(&b, 2)).collect();
        assert_eq!(mlx(Kind::Q4_1, &b), expected);
        let b = block(Kind::Q5_0, &[0], seed);
        let expected: Vec<f32> =
            (0..32).map(|i| ((low(&b[6..], i) | fifth(&b[2..], i)) - 16) as f32 * at(&b, 0)).collect();
        assert_eq!(mlx(Kind::Q5_0, &b), expected);
        let b = block(Kind::Q5_1, &[0, 2], seed);
        let expected: Vec<f32> =
            (0..32).map(|i| (low(&b[8..], i) | fifth(&b[4..], i)) as f32 * at(&b, 0) + at(&b, 2)).collect();
        assert_eq!(mlx(Kind::Q5_1, &b), expected);
        let b = block(Kind::Q8_0, &[0], seed);
        let expected: Vec<f32> =
            (0..32).map(|i| f32::from(i8::from_le_bytes([b[2 + i]])) * at(&b, 0)).collect();
        assert_eq!(mlx(Kind::Q8_0, &b), expected);
    }
}

/// The 6-bit pairs of K formats, as `get_scale_min_k4` of ggml-quants.c has them.
fn scale_min(j: usize, q: &[u8]) -> (f32, f32) {
    let (scale, least) = if j < 4 {
        (q[j] & 63, q[j + 4] & 63)
    } else {
        ((q[j + 4] & 0xF) | ((q[j - 4] >> 6) << 4), (q[j + 4] >> 4) | ((q[j] >> 6) << 4))
    };
    (f32::from(scale), f32::from(least))
}

#[test]
fn k_blocks_of_4_and_5_bits_are_exact() {
    for seed in 0..20 {
        for (kind, low_at) in [(Kind::Q4K, 16), (Kind::Q5K, 48)] {
            let b = block(kind, &[0, 2], seed);
            let expected: Vec<f32> = (0..256)
                .map(|i| {
                    let (group, within) = (i / 32, i % 32);
                    let byte = b[low_at + i / 64 * 32 + within];
                    let low = if group % 2 == 0 { byte & 15 } else { byte >> 4 };
                    let high = if kind == Kind::Q5K { b[16 + within] >> group & 1 } else { 0 };
                    let (scale, least) = scale_min(group, &b[4..16]);
                    at(&b, 0) * scale * f32::from(low + 16 * high) - at(&b, 2) * least
                })
                .collect();
            assert_eq!(mlx(kind, &b), expected, "{kind:?}");
        }
    }
}

#[test]
fn six_bits_are_rounded_to_f16() {
    for seed in 0..20 {
        let b = block(Kind::Q6K, &[208], seed);
        let mut parts = Parts::default();
        Kind::Q6K.convert(&b, &mut parts);
        // The loop of `dequantize_row_q6_K`: two halves of 128, four values at a time.
        for n in 0..2 {
            for l in 0..32 {
                let (low, high) = (|i: usize| b[n * 64 + i], b[128 + n * 32 + l]);
                let values = [
                    low(l) & 15 | (high & 3) << 4,
                    low(l + 32) & 15 | (high >> 2 & 3) << 4,
                    low(l) >> 4 | (high >> 4 & 3) << 4,
                    low(l + 32) >> 4 | (high >> 6 & 3) << 4,
                ];
                for (k, value) in values.into_iter().enumerate() {
                    let i = n * 128 + k * 32 + l;
                    let scale = f32::from(i8::from_le_bytes([b[192 + n * 8 + l / 16 + 2 * k]]));
                    let exact = at(&b, 208) * scale * (f32::from(value) - 32.0);
                    assert_eq!(at(&parts.weight, i * 2), f16::from_f32(exact).to_f32());
                }
            }
        }
    }
}

#[test]
fn dense_formats_keep_their_bytes() {
    for kind in [Kind::F32, Kind::F16, Kind::Bf16] {
        let bytes = noise(kind.block().1 * 7, 3);
        let mut parts = Parts::default();
        kind.convert(&bytes, &mut parts);
        assert_eq!(parts.weight, bytes);
        assert!(parts.scales.is_empty() && parts.biases.is_empty());
    }
}

#[test]
fn other_formats_are_refused_by_name() {
    assert!(Kind::from_code(10).unwrap_err().starts_with("Q2_K"));
    assert!(Kind::from_code(39).unwrap_err().starts_with("MXFP4"));
    assert!(Kind::from_code(4).unwrap_err().contains("type 4"));
}
