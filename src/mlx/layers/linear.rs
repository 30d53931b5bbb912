//! Matrix products with weights, dense or quantized. Inputs are `[tokens, in]`, outputs `[tokens, out]`:
//! always two dimensions, which MLX's quantized kernels need to be fast.

use mlx_rs::error::Result;
use mlx_rs::{Array, Dtype, ops};

use super::RmsNorm;
use crate::mlx::dim;
use crate::mlx::ffi::Packed;
use crate::mlx::kernels::KernelSet;
use crate::quantize::QuantMode;

/// A quantized matrix `[out, in]`, or a stack of them `[matrices, out, in]`: elements of few bits, and a
/// scale for each group of columns.
#[derive(Clone, Debug)]
pub(crate) struct Quantized {
    /// Packed elements `[.., out, in * bits / 32]`, uint32.
    pub(crate) packed: Array,
    /// Scales `[.., out, in / group_size]`.
    pub(crate) scales: Array,
    /// Biases `[.., out, in / group_size]` of the affine mode.
    pub(crate) biases: Option<Array>,
    /// Number of columns that share a scale.
    pub(crate) group_size: i32,
    /// Bits of an element.
    pub(crate) bits: i32,
    /// Format of the elements.
    pub(crate) mode: QuantMode,
    /// Dtype when it is dequantized.
    pub(crate) float: Dtype,
    pub(crate) kernels: KernelSet,
}

impl Quantized {
    fn view(&self) -> Packed<'_> {
        let Self { packed, scales, biases, group_size, bits, mode, float: _, kernels: _ } = self;
        let (group_size, bits, mode) = (*group_size, *bits, *mode);
        Packed { numbers: packed, scales, biases: biases.as_ref(), group_size, bits, mode }
    }

    /// Returns the matrix as floats.
    pub(crate) fn dequantize(&self) -> Result<Array> {
        self.view().dequantize(self.float)
    }

    /// Returns `x[i] @ w[experts[i]]^T`.
    pub(crate) fn gather_product(&self, x: &Array, experts: &Array, sorted: bool) -> Result<Array> {
        self.view().gather_product(x, experts, sorted)
    }

    /// Returns a matrix of the same format with changed arrays.
    fn map(&self, mut change: impl FnMut(&Array) -> Result<Array>) -> Result<Self> {
        Ok(Self {
            packed: change(&self.packed)?,
            scales: change(&self.scales)?,
            biases: self.biases.as_ref().map(&mut change).transpose()?,
            ..*self
        })
    }

    fn same_format(&self, other: &Self) -> bool {
        self.group_size == other.group_size
            && self.bits == other.bits
            && self.mode == other.mode
            && self.scales.dtype() == other.scales.dtype()
    }

    fn arrays(&self) -> Vec<&Array> {
        [&self.packed, &self.scales].into_iter().chain(&self.biases).collect()
    }
}

/// A weight matrix `[out, in]`.
#[derive(Clone, Debug)]
pub(crate) enum Matrix {
    /// Plain floats.
    Dense(Array),
    /// Packed integers.
    Quantized(Quantized),
}

impl Matrix {
    /// Returns `x @ w^T`, with `x` `[tokens, in]`.
    pub(crate) fn project(&self, x: &Array) -> Result<Array> {
        match self {
            Self::Dense(weight) => ops::matmul(x, weight.t()),
            Self::Quantized(q) => q.kernels.quantized_product(x, &q.view(), q.float),
        }
    }

    /// Returns a matrix of these rows.
    pub(crate) fn pick(&self, rows: &Array) -> Result<Self> {
        match self {
            Self::Dense(weight) => weight.take_axis(rows, -2).map(Self::Dense),
            Self::Quantized(q) => q.map(|array| array.take_axis(rows, -2)).map(Self::Quantized),
        }
    }

    /// Returns the matrix as floats.
    pub(crate) fn dense(&self) -> Result<Array> {
        match self {
            Self::Dense(weight) => Ok(weight.clone()),
            Self::Quantized(q) => q.dequantize(),
        }
    }

    /// Returns `x[i] @ w[i]^T` for a stack of matrices, with `x` `[matrices, tokens, in]`.
    pub(crate) fn project_each(&self, x: &Array) -> Result<Array> {
        match self {
            Self::Dense(weight) => ops::matmul(x, weight.swap_axes(-1, -2)?),
            Self::Quantized(q) => q.view().product(x),
        }
    }

    /// Returns the rows of the given ids as floats: an embedding.
    pub(crate) fn rows(&self, ids: &Array) -> Result<Array> {
        match self {
            Self::Dense(weight) => weight.take_axis(ids, 0),
            Self::Quantized(q) => q.map(|array| array.take_axis(ids, 0))?.dequantize(),
        }
    }

    /// Stacks the rows of `parts`; None if their formats differ.
    pub(super) fn stack(parts: &[Self]) -> Result<Option<Self>> {
        let dense: Option<Vec<&Array>> = parts
            .iter()
            .map(|part| if let Self::Dense(weight) = part { Some(weight) } else { None })
            .collect();
        if let Some(dense) = dense {
            return Ok(Some(Self::Dense(ops::concatenate(&dense, -2)?)));
        }
        let quantized: Option<Vec<&Quantized>> =
            parts.iter().map(|part| if let Self::Quantized(q) = part { Some(q) } else { None }).collect();
        let Some(quantized) = quantized.filter(|all| all.iter().all(|q| q.same_format(all[0]))) else {
            return Ok(None);
        };
        let stack = |arrays: Vec<&Array>| ops::concatenate(&arrays, -2);
        let biases: Option<Vec<&Array>> = quantized.iter().map(|q| q.biases.as_ref()).collect();
        Ok(Some(Self::Quantized(Quantized {
            packed: stack(quantized.iter().map(|q| &q.packed).collect())?,
            scales: stack(quantized.iter().map(|q| &q.scales).collect())?,
            biases: biases.map(stack).transpose()?,
            ..*quantized[0]
        })))
    }

    /// Returns every array it holds.
    pub(crate) fn arrays(&self) -> Vec<&Array> {
        match self {
            Self::Dense(weight) => vec![weight],
            Self::Quantized(q) => q.arrays(),
        }
    }
}

/// A matrix with an optional bias.
#[derive(Clone, Debug)]
pub(crate) struct Linear {
    weight: Matrix,
    bias: Option<Array>,
}

impl Linear {
    /// Returns a layer of `weight` `[out, in]` and `bias` `[out]`.
    pub(crate) fn new(weight: Matrix, bias: Option<Array>) -> Self {
        Self { weight, bias }
    }

    /// Returns `x @ w^T + b`.
    pub(crate) fn forward(&self, x: &Array) -> Result<Array> {
        let Some(bias) = &self.bias else { return self.weight.project(x) };
        match &self.weight {
            Matrix::Dense(weight) => ops::addmm(bias, x, weight.t(), 1.0, 1.0),
            Matrix::Quantized(_) => self.weight.project(x)?.add(bias),
        }
    }

    /// Returns a layer with these of its outputs.
    pub(crate) fn pick(&self, rows: &[i32]) -> Result<Self> {
        let rows = Array::from_slice(rows, &[dim(rows.len())]);
        let bias = self.bias.as_ref().map(|bias| bias.take_axis(&rows, 0)).transpose()?;
        Ok(Self { weight: self.weight.pick(&rows)?, bias })
    }

    /// Adds the layer's output for `input` to `x`; returns the sum, and its norm.
    pub(crate) fn onto(&self, x: &Array, input: &Array, norm: &RmsNorm) -> Result<(Array, Array)> {
        if let (Matrix::Quantized(q), None) = (&self.weight, &self.bias)
            && let Some(sum) = q.kernels.product_onto(x, input, &q.view())
        {
            let sum = sum?;
            let normed = norm.forward(&sum)?;
            return Ok((sum, normed));
        }
        norm.add_forward(x, &self.forward(input)?)
    }

    /// Returns every array it holds.
    pub(crate) fn arrays(&self) -> Vec<&Array> {
        self.weight.arrays().into_iter().chain(self.bias.as_ref()).collect()
    }
}

/// Layers that read the same input, run as one product where their formats allow it.
#[derive(Clone, Debug)]
pub(crate) struct Fused {
    layers: Vec<Linear>,
}

impl Fused {
    /// Fuses `parts`, if all have a bias or none has.
    pub(crate) fn new(parts: Vec<Linear>) -> Result<Self> {
        let matrices: Vec<Matrix> = parts.iter().map(|part| part.weight.clone()).collect();
        let biases: Vec<&Array> = parts.iter().filter_map(|part| part.bias.as_ref()).collect();
        if !biases.is_empty() && biases.len() != parts.len() {
            return Ok(Self { layers: parts });
        }
        let bias = if biases.is_empty() { None } else { Some(ops::concatenate(&biases, 0)?) };
        match Matrix::stack(&matrices)? {
            Some(weight) => Ok(Self { layers: vec![Linear::new(weight, bias)] }),
            None => Ok(Self { layers: parts }),
        }
    }

    /// Returns `silu(gate) * up` for two parts, where that is one kernel.
    pub(super) fn gated(&self, x: &Array) -> Option<Result<Array>> {
        match self.layers.as_slice() {
            [Linear { weight: Matrix::Quantized(q), bias: None }] => q.kernels.gated_product(x, &q.view()),
            _ => None,
        }
    }

    /// Returns the outputs of all parts, side by side: `[tokens, sum of outs]`.
    pub(crate) fn forward(&self, x: &Array) -> Result<Array> {
        match self.layers.as_slice() {
            [one] => one.forward(x),
            many => {
                let outputs = many.iter().map(|layer| layer.forward(x)).collect::<Result<Vec<_>>>()?;
                ops::concatenate(&outputs, -1)
            }
        }
    }

    /// Returns every array it holds.
    pub(crate) fn arrays(&self) -> Vec<&Array> {
        self.layers.iter().flat_map(Linear::arrays).collect()
    }
}
