//! Residuals: a model adds the output of one sublayer after another to its stream of hidden states, `[tokens,
//! hidden]`. Most models norm the input of a sublayer; some norm its output, some do both.

use mlx_rs::Array;
use mlx_rs::error::Result;

use super::{Linear, RmsNorm};
use crate::mlx::batch::Batch;
use crate::mlx::kernels::{KernelSet, Rotation};
use crate::mlx::kv::Kv;
use crate::mlx::rope::Rope;

/// The parts of a step beside the stream.
pub(crate) struct ForwardContext<'a> {
    pub(crate) batch: &'a Batch,
    pub(crate) kv: &'a mut Kv,
    /// The set that attends over `kv`.
    pub(crate) kernels: KernelSet,
    /// The model's kinds of rotation, with the angles of this step.
    pub(crate) ropes: &'a [(Rope, Rotation)],
    /// Output of the model's prelude, if it has one.
    pub(crate) prelude: Option<Array>,
}

/// The computation of a residual.
pub(crate) trait Sublayer: Send {
    /// Returns the input of the last matrix for `x` `[tokens, hidden]`, or the output if there is no last
    /// matrix.
    fn forward(&self, x: &Array, context: &mut ForwardContext<'_>) -> Result<Array>;

    /// Returns the matrix at its end, if there is one.
    fn last(&self) -> Option<&Linear>;

    /// Returns every array of its weights.
    fn arrays(&self) -> Vec<&Array>;
}

/// A sublayer with its norms.
pub(crate) struct Residual {
    /// Norm of the sublayer's input.
    pub(crate) before: Option<RmsNorm>,
    pub(crate) body: Box<dyn Sublayer>,
    /// Norm of the sublayer's output.
    pub(crate) after: Option<RmsNorm>,
    /// Factor of the sublayer's output.
    pub(crate) scale: Option<f32>,
    /// Factor `[1]` of the sum.
    pub(crate) sum_scale: Option<Array>,
}

impl Residual {
    /// Returns a residual that norms its sublayer's input.
    pub(crate) fn new(before: RmsNorm, body: Box<dyn Sublayer>) -> Self {
        Self { before: Some(before), ..Self::bare(body) }
    }

    /// Returns a residual without norms.
    pub(crate) fn bare(body: Box<dyn Sublayer>) -> Self {
        Self { before: None, body, after: None, scale: None, sum_scale: None }
    }

    /// Returns the stream after this residual of the stream `x`, and the norm `next` of that, if it came
    /// cheaply. `normed` is the norm that the residual before has returned for this one.
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

    /// Returns every array of its weights.
    pub(crate) fn arrays(&self) -> Vec<&Array> {
        let norms = self.before.iter().chain(&self.after).map(|norm| &norm.weight);
        self.body.arrays().into_iter().chain(norms).chain(&self.sum_scale).collect()
    }
}
