//! Mixtures of experts: every token goes through a few of many MLPs.

use mlx_rs::error::Result;
use mlx_rs::{Array, ops};

use super::{ForwardContext, Linear, Matrix, Mlp, Router, Sublayer};
use crate::mlx::dim;
use crate::mlx::ffi::Gate;
use crate::mlx::kernels::KernelSet;

/// Rows from which on they are sorted by expert, so that an expert's weights are read once.
const SORTED_ROWS_MIN: i32 = 64;

/// The matrices of all experts, `[experts, out, in]`, with optional biases `[experts, out]`.
#[derive(Clone, Debug)]
pub(crate) struct ExpertMatrix {
    pub(crate) weight: Matrix,
    pub(crate) bias: Option<Array>,
}

/// The activation between an expert's two matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Activation {
    /// Gate and up side by side.
    Gated(Gate),
    /// `relu(x)^2`.
    SquaredRelu,
}

/// All experts of a layer.
#[derive(Clone, Debug)]
pub(crate) struct Experts {
    /// Gate and up, one below the other, or as parts where their formats differ.
    pub(crate) first: Vec<ExpertMatrix>,
    pub(crate) last: ExpertMatrix,
    pub(crate) activation: Activation,
    pub(crate) kernels: KernelSet,
}

impl ExpertMatrix {
    /// Returns row `i` of `x` `[rows, 1, in]` times the matrix of expert `experts[i]`: `[rows, 1, out]`.
    fn project(&self, x: &Array, experts: &Array, sorted: bool) -> Result<Array> {
        let out = match &self.weight {
            Matrix::Dense(weight) => {
                ops::gather_mm(x, weight.swap_axes(-1, -2)?, None::<&Array>, Some(experts), sorted)?
            }
            Matrix::Quantized(q) => q.gather_product(x, experts, sorted)?,
        };
        match &self.bias {
            Some(bias) => out.add(bias.take_axis(experts, 0)?.expand_dims(-2)?),
            None => Ok(out),
        }
    }

    fn arrays(&self) -> Vec<&Array> {
        self.weight.arrays().into_iter().chain(&self.bias).collect()
    }

    /// Stacks the parts, one below the other, if their formats allow it.
    pub(crate) fn fused(parts: Vec<Self>) -> Result<Vec<Self>> {
        let weights: Vec<Matrix> = parts.iter().map(|part| part.weight.clone()).collect();
        let biases: Vec<&Array> = parts.iter().filter_map(|part| part.bias.as_ref()).collect();
        let bias = if biases.is_empty() { None } else { Some(ops::concatenate(&biases, -1)?) };
        Ok(match Matrix::stack(&weights)? {
            Some(weight) => vec![Self { weight, bias }],
            None => parts,
        })
    }
}

impl Experts {
    /// Returns the sum over each token's experts, weighted by their shares; `x` is `[tokens, hidden]`,
    /// `experts` and `shares` `[tokens, chosen]`.
    pub(crate) fn forward(&self, x: &Array, experts: &Array, shares: &Array) -> Result<Array> {
        let (tokens, chosen) = (experts.dim(0), experts.dim(1));
        let rows = tokens * chosen;
        let experts = experts.reshape(&[rows])?;
        let of_token: Vec<i32> = (0..rows).map(|row| row / chosen).collect();
        let of_token = Array::from_slice(&of_token, &[dim(of_token.len())]);
        let sorted = rows >= SORTED_ROWS_MIN;
        let order = if sorted { Some(ops::argsort_axis(&experts, 0)?) } else { None };
        let (experts, of_token) = match &order {
            Some(order) => (experts.take_axis(order, 0)?, of_token.take_axis(order, 0)?),
            None => (experts, of_token),
        };
        let x = x.take_axis(&of_token, 0)?.expand_dims(1)?;
        let sorted = sorted && self.kernels.takes_sorted_rows();
        let inner = self.first.iter().map(|part| part.project(&x, &experts, sorted));
        let inner = inner.collect::<Result<Vec<_>>>()?;
        let inner = if let [one] = inner.as_slice() { one.clone() } else { ops::concatenate(&inner, -1)? };
        let activated = match self.activation {
            Activation::Gated(gate) => self.kernels.gated(&inner, gate)?,
            Activation::SquaredRelu => squared_relu(&inner)?,
        };
        let mut out = self.last.project(&activated, &experts, sorted)?;
        if let Some(order) = order {
            out = out.take_axis(ops::argsort_axis(&order, 0)?, 0)?;
        }
        let out = out.reshape(&[tokens, chosen, -1])?;
        let shares = shares.as_dtype(out.dtype())?.expand_dims(-1)?;
        out.multiply(shares)?.sum_axis(1, false)
    }

    pub(crate) fn arrays(&self) -> Vec<&Array> {
        self.first.iter().chain([&self.last]).flat_map(ExpertMatrix::arrays).collect()
    }
}

/// Returns `relu(x)^2`.
pub(crate) fn squared_relu(x: &Array) -> Result<Array> {
    let positive = ops::maximum(x, Array::from_f32(0.0).as_dtype(x.dtype())?)?;
    positive.multiply(&positive)
}

/// A mixture of experts, and an optional MLP that every token goes through.
pub(crate) struct Mixture {
    pub(crate) router: Router,
    pub(crate) experts: Experts,
    pub(crate) shared: Option<Mlp>,
    /// Layer whose output, after a sigmoid, is the factor of the shared MLP.
    pub(crate) shared_gate: Option<Linear>,
}

impl Sublayer for Mixture {
    fn forward(&self, x: &Array, _: &mut ForwardContext<'_>) -> Result<Array> {
        let (experts, shares) = self.router.forward(x)?;
        let routed = self.experts.forward(x, &experts, &shares)?;
        let Some(shared) = &self.shared else { return Ok(routed) };
        let mut always = shared.down.forward(&shared.activate(x)?)?;
        if let Some(gate) = &self.shared_gate {
            always = always.multiply(ops::sigmoid(gate.forward(x)?)?)?;
        }
        routed.add(always)
    }

    fn last(&self) -> Option<&Linear> {
        None
    }

    fn arrays(&self) -> Vec<&Array> {
        let shared = self.shared.iter().flat_map(Sublayer::arrays);
        let gate = self.shared_gate.iter().flat_map(Linear::arrays);
        self.router.arrays().into_iter().chain(self.experts.arrays()).chain(shared).chain(gate).collect()
    }
}
