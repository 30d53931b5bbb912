//! Linear attention with decay, and with the delta rule: a state `[heads, key_dim, value_dim]` that each
//! token fades, changes and reads. Many tokens go chunk by chunk, each of which is a few products (Mamba-2,
//! <https://arxiv.org/abs/2405.21060>; gated delta rule, <https://arxiv.org/abs/2412.06464>, in the form of
//! <https://arxiv.org/abs/2406.06484>); there is no loop over tokens.

use mlx_rs::error::Result;
use mlx_rs::ops::indexing::TryIndexOp;
use mlx_rs::{Array, Dtype, ops};

use crate::mlx::dim;

/// Tokens of a chunk: a power of two at which the products within chunks cost about as much as the work
/// between them.
const CHUNK: i32 = 64;

/// Tokens of sequences, in float32.
pub(crate) struct Scan {
    /// Queries `[sequences, tokens, heads, key_dim]`: the state is read by them.
    pub(crate) queries: Array,
    /// Keys `[sequences, tokens, heads, key_dim]`: the state is written by them.
    pub(crate) keys: Array,
    /// Values `[sequences, tokens, heads, value_dim]`.
    pub(crate) values: Array,
    /// Logarithm of the state's decay, `[sequences, tokens, heads]`.
    pub(crate) decay: Array,
    /// Share of a key's old value that the delta rule replaces, `[sequences, tokens, heads]`. None: values
    /// are added.
    pub(crate) beta: Option<Array>,
}

impl Scan {
    /// Runs the tokens on from `state` `[sequences, heads, key_dim, value_dim]`; returns the outputs
    /// `[sequences, tokens, heads, value_dim]`, and the state after them.
    pub(crate) fn run(self, state: &Array) -> Result<(Array, Array)> {
        if self.queries.dim(1) == 1 { self.step(state) } else { self.chunks(state) }
    }

    /// Runs one token of each sequence.
    fn step(self, state: &Array) -> Result<(Array, Array)> {
        // `[sequences, heads, 1, _]`.
        let by_head = |x: &Array| x.swap_axes(1, 2);
        let (queries, keys, mut values) =
            (by_head(&self.queries)?, by_head(&self.keys)?, by_head(&self.values)?);
        let fade = ops::exp(by_head(&self.decay)?.expand_dims(-1)?)?;
        let faded = state.multiply(fade)?;
        if let Some(beta) = &self.beta {
            values = values.subtract(keys.matmul(&faded)?)?.multiply(by_head(beta)?.expand_dims(-1)?)?;
        }
        let state = faded.add(keys.swap_axes(-1, -2)?.multiply(&values)?)?;
        Ok((queries.matmul(&state)?.swap_axes(1, 2)?, state))
    }

    fn chunks(self, state: &Array) -> Result<(Array, Array)> {
        let tokens = self.queries.dim(1);
        let chunk = dim(usize::try_from(tokens).unwrap_or(1).next_power_of_two()).min(CHUNK);
        let count = (tokens + chunk - 1) / chunk;
        // The padding changes nothing: its keys and values are zeros, and its decay is one.
        let cut = |x: &Array| in_chunks(x, chunk, count);
        let (queries, keys, mut values) = (cut(&self.queries)?, cut(&self.keys)?, cut(&self.values)?);
        let decay = cut(&self.decay.expand_dims(-1)?)?;
        // The decay from a chunk's beginning to after each token, and from after one token to after another.
        let total = ops::cumsum(&decay, -2, None, None)?;
        let between = total.subtract(total.swap_axes(-1, -2)?)?;
        let seen = ops::tri::<bool>(chunk, None, None)?;
        let never = Array::from_f32(f32::NEG_INFINITY);
        let between = ops::exp(ops::select(&seen, &between, &never)?)?;
        let from_start = ops::exp(&total)?;
        let mut corrections = None;
        if let Some(beta) = &self.beta {
            let beta = cut(&beta.expand_dims(-1)?)?;
            let scaled = keys.multiply(&beta)?;
            let before = ops::tril(scaled.matmul(keys.swap_axes(-1, -2)?)?.multiply(&between)?, -1)?;
            let inverse = inverse(&before, chunk)?;
            values = inverse.matmul(values.multiply(&beta)?)?;
            corrections = Some(inverse.matmul(scaled.multiply(&from_start)?)?);
        }
        let attention = queries.matmul(keys.swap_axes(-1, -2)?)?.multiply(&between)?;
        let queries = queries.multiply(&from_start)?;
        let end = total.try_index((.., .., .., chunk - 1..chunk))?;
        let keys = keys.multiply(ops::exp(end.subtract(&total)?)?)?.swap_axes(-1, -2)?;
        let fade = ops::exp(&end)?;
        let (mut state, mut outputs) = (state.clone(), Vec::new());
        for at in 0..count {
            let of = |x: &Array| x.try_index((.., .., at));
            let mut new = of(&values)?;
            if let Some(corrections) = &corrections {
                new = new.subtract(of(corrections)?.matmul(&state)?)?;
            }
            outputs.push(of(&queries)?.matmul(&state)?.add(of(&attention)?.matmul(&new)?)?);
            state = state.multiply(of(&fade)?)?.add(of(&keys)?.matmul(&new)?)?;
        }
        let outputs = ops::concatenate(&outputs, 2)?.swap_axes(1, 2)?;
        Ok((outputs.try_index((.., ..tokens))?, state))
    }
}

/// Returns `[sequences, tokens, heads, elements]` as `[sequences, heads, chunks, chunk, elements]`, padded
/// with zeros.
fn in_chunks(x: &Array, chunk: i32, count: i32) -> Result<Array> {
    let &[sequences, tokens, heads, elements] = x.shape() else {
        return Err(mlx_rs::error::Exception::custom("a scan takes four dimensions"));
    };
    let missing = chunk * count - tokens;
    let x = if missing > 0 {
        let zeros = ops::zeros_dtype(&[sequences, missing, heads, elements], Dtype::Float32)?;
        ops::concatenate(&[x.clone(), zeros], 1)?
    } else {
        x.clone()
    };
    x.swap_axes(1, 2)?.reshape(&[sequences, heads, count, chunk, elements])
}

/// Returns the inverse of 1 + `below`, whose entries on and above the diagonal are zero: from blocks of one
/// element on the diagonal to larger ones, the inverse of `[[a, 0], [c, b]]` being `[[1/a, 0], [-1/b c 1/a,
/// 1/b]]`. `size` is a power of two.
fn inverse(below: &Array, size: i32) -> Result<Array> {
    let rest: Vec<i32> = below.shape().iter().rev().skip(2).rev().copied().collect();
    let shaped = |tail: &[i32]| rest.iter().chain(tail).copied().collect::<Vec<i32>>();
    let mut blocks = ops::ones_dtype(&shaped(&[size, 1, 1]), below.dtype())?;
    let mut block = 1;
    while block < size {
        let count = size / (2 * block);
        let pairs = below.reshape(&shaped(&[count, 2 * block, count, 2 * block]))?;
        // The pairs on the diagonal, and the lower left block of each.
        let axes = dim(rest.len());
        let pairs = ops::diagonal(&pairs, 0, axes, axes + 2)?.move_axis(-1, axes)?;
        let corner = pairs.try_index((mlx_rs::ops::indexing::Ellipsis, block.., ..block))?;
        let parts = blocks.reshape(&shaped(&[count, 2, block, block]))?.split_equal(2, axes + 1)?;
        let (a, b) = (parts[0].squeeze_axes(&[axes + 1])?, parts[1].squeeze_axes(&[axes + 1])?);
        let corner = b.matmul(&corner)?.matmul(&a)?.negative()?;
        let zeros = ops::zeros_like(&a)?;
        let above = ops::concatenate(&[a, zeros], -1)?;
        let under = ops::concatenate(&[corner, b], -1)?;
        blocks = ops::concatenate(&[above, under], -2)?;
        block *= 2;
    }
    blocks.reshape(below.shape())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Relative to the largest element: a chunk's sums have up to 64 terms, three deep.
    const BOUND: f32 = 3.0 * 64.0 * f32::EPSILON;

    /// Returns the same elements for the same key; MLX's default random state is seeded by the clock.
    fn random(shape: &[i32], scale: f32, key: u64) -> Array {
        let key = mlx_rs::random::key(key).unwrap();
        let elements = mlx_rs::random::normal::<f32>(shape, None, None, Some(&key)).unwrap();
        elements.multiply(Array::from_f32(scale)).unwrap()
    }

    /// Returns a scan of random tokens, `[2, tokens, 3, _]`.
    fn scan(tokens: i32, delta: bool) -> Scan {
        let unit = |x: Array| {
            let length = x.multiply(&x).unwrap().sum_axis(-1, true).unwrap().sqrt().unwrap();
            x.divide(length).unwrap()
        };
        Scan {
            queries: unit(random(&[2, tokens, 3, 16], 1.0, 1)),
            keys: unit(random(&[2, tokens, 3, 16], 1.0, 2)),
            values: random(&[2, tokens, 3, 8], 1.0, 3),
            decay: random(&[2, tokens, 3], 1.0, 4).abs().unwrap().negative().unwrap(),
            beta: delta.then(|| ops::sigmoid(random(&[2, tokens, 3], 2.0, 5)).unwrap()),
        }
    }

    fn part(scan: &Scan, from: i32, to: i32) -> Scan {
        let of = |x: &Array| x.try_index((.., from..to)).unwrap();
        Scan {
            queries: of(&scan.queries),
            keys: of(&scan.keys),
            values: of(&scan.values),
            decay: of(&scan.decay),
            beta: scan.beta.as_ref().map(of),
        }
    }

    #[test]
    fn chunks_give_what_one_token_after_another_gives() {
        for (tokens, delta) in [(2, true), (7, true), (64, false), (100, true), (200, true), (130, false)] {
            let whole = scan(tokens, delta);
            let start = random(&[2, 3, 16, 8], 1.0, 6);
            let (mut state, mut expected) = (start.clone(), Vec::new());
            for token in 0..tokens {
                let (out, next) = part(&whole, token, token + 1).run(&state).unwrap();
                expected.push(out);
                state = next;
            }
            let (out, end) = part(&whole, 0, tokens).run(&start).unwrap();
            let expected = ops::concatenate(&expected, 1).unwrap();
            for (got, wanted) in [(out, expected), (end, state)] {
                assert_eq!(got.shape(), wanted.shape());
                let largest = |x: &Array| x.abs().unwrap().max(None).unwrap().item_exact::<f32>();
                let (apart, bound) =
                    (largest(&got.subtract(&wanted).unwrap()), BOUND * largest(&wanted).max(1.0));
                assert!(apart < bound, "{tokens} tokens, delta {delta}: {apart} of {bound}");
            }
        }
    }

    #[test]
    fn equal_keys_do_not_blow_up() {
        let ones = |shape: &[i32], of: f32| ops::full::<f32>(shape, Array::from_f32(of)).unwrap();
        let (tokens, quarter) = (128, ones(&[1, 128, 1, 16], 0.25));
        let scan = Scan {
            queries: quarter.clone(),
            keys: quarter,
            values: ones(&[1, tokens, 1, 8], 1.0),
            decay: ones(&[1, tokens, 1], 0.0),
            beta: Some(ones(&[1, tokens, 1], 1.0)),
        };
        let (out, _) = scan.run(&ones(&[1, 1, 16, 8], 0.0)).unwrap();
        let apart = out.subtract(Array::from_f32(1.0)).unwrap().abs().unwrap().max(None).unwrap();
        assert!(apart.item_exact::<f32>() < 1e-5, "{apart:?}");
    }
}
