//! Residuals: a model adds to its stream of hidden states, `[tokens, hidden]`, what one body after another makes of it.
//! Most models norm the stream before a body; some norm what comes out of it, some do both.

use mlx_rs::Array;
use mlx_rs::error::Result;

use super::{Linear, RmsNorm};
use crate::mlx::batch::Batch;
use crate::mlx::kernels::{KernelSet, Rotation};
use crate::mlx::kv::Kv;
use crate::mlx::rope::Rope;

/// What a step has beside the stream.
pub(crate) struct ForwardContext<'a> {
    pub(crate) batch: &'a Batch,
    pub(crate) kv: &'a mut Kv,
    /// The set that attends over `kv`.
    pub(crate) kernels: KernelSet,
    /// The model's kinds of rotation, with the angles of this step.
    pub(crate) ropes: &'a [(Rope, Rotation)],
    /// What the model's prelude made of the tokens, if it has one.
    pub(crate) prelude: Option<Array>,
}

/// What a residual computes.
pub(crate) trait Sublayer {
    /// What the last matrix takes, or the residual's output if there is none; of `[tokens, hidden]`.
    fn forward(&self, x: &Array, context: &mut ForwardContext<'_>) -> Result<Array>;

    /// The matrix at its end.
    fn last(&self) -> Option<&Linear>;

    /// Every array of its weights.
    fn arrays(&self) -> Vec<&Array>;
}

/// A body with its norms.
pub(crate) struct Residual {
    /// The norm of what the body takes.
    pub(crate) before: Option<RmsNorm>,
    pub(crate) body: Box<dyn Sublayer>,
    /// The norm of what the body gives.
    pub(crate) after: Option<RmsNorm>,
    /// What is multiplied with the residual before it is added.
    pub(crate) scale: Option<f32>,
    /// What the sum is multiplied with, `[1]`.
    pub(crate) sum_scale: Option<Array>,
}

impl Residual {
    /// A residual that norms what its body takes.
    pub(crate) fn new(before: RmsNorm, body: Box<dyn Sublayer>) -> Self {
        Self { before: Some(before), ..Self::bare(body) }
    }

    /// A residual without norms.
    pub(crate) fn bare(body: Box<dyn Sublayer>) -> Self {
        Self { before: None, body, after: None, scale: None, sum_scale: None }
    }

    /// What the residual makes of the stream `x`: the stream after it, and `next` of that, if it came cheaply. `normed` is
    /// what the residual before has found for this one.
    pub(crate) fn forward(
        &self,
        x: &Array,
        normed: Option<Array>,
        next: Option<&RmsNorm>,
        context: &mut ForwardContext<'_>,
    ) -> Result<(Array, Option<Array>)> {
        let input = match (normed, &self.before) {
            (Some(normed), Some(_)) => normed,
            (None, Some(norm)) => norm.forward(x)?,
            (_, None) => x.clone(),
        };
        let inner = self.body.forward(&input, context)?;
        let changed = self.after.is_some() || self.scale.is_some() || self.sum_scale.is_some();
        if let (Some(last), Some(next), false) = (self.body.last(), next, changed) {
            let (sum, normed) = last.onto(x, &inner, next)?;
            return Ok((sum, Some(normed)));
        }
        let mut out = self.body.last().map_or(Ok(inner.clone()), |last| last.forward(&inner))?;
        if let Some(scale) = self.scale {
            out = out.multiply(Array::from_f32(scale).as_dtype(out.dtype())?)?;
        }
        if let Some(after) = &self.after {
            out = after.forward(&out)?;
        }
        match (&self.sum_scale, next) {
            (Some(scale), _) => Ok((x.add(out)?.multiply(scale)?, None)),
            (None, Some(next)) => {
                let (sum, normed) = next.add_forward(x, &out)?;
                Ok((sum, Some(normed)))
            }
            (None, None) => Ok((x.add(out)?, None)),
        }
    }

    /// Every array of its weights.
    pub(crate) fn arrays(&self) -> Vec<&Array> {
        let norms = self.before.iter().chain(&self.after).map(|norm| &norm.weight);
        self.body.arrays().into_iter().chain(norms).chain(&self.sum_scale).collect()
    }
}
