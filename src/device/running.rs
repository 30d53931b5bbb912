//! A step that runs: its rows are drawn with it, or once it is known what they may draw.

use mlx_rs::Array;
use mlx_rs::error::Exception;
use mlx_rs::transforms::{async_eval, eval};

use crate::backend::{RowResult, Step, TokenSet};
use crate::error::Error;
use crate::mlx::kv::Kv;
use crate::mlx::sampler::{self, Drawn};

/// A step that was launched.
pub(super) struct Running {
    step: Step,
    /// The logits `[rows, vocabulary]` of rows that are not drawn yet.
    undrawn: Option<Array>,
    /// None if the step has no output, or is not drawn yet.
    drawn: Option<Drawn>,
    /// Number of tokens that rows are drawn from.
    vocabulary: i32,
    /// The slabs that it changes.
    slabs: Vec<u32>,
}

impl Running {
    /// Begins to compute a step of these logits, which changes these slabs.
    pub(super) fn launch(
        step: Step,
        logits: Option<Array>,
        (vocabulary, slabs): (i32, Vec<u32>),
        kv: &Kv,
    ) -> Result<Self, Exception> {
        let (undrawn, logits) = if step.awaits_masks() { (logits, None) } else { (None, logits) };
        let drawn = logits.map(|logits| sampler::draw(&step, &logits, vocabulary)).transpose()?;
        let outputs = drawn.iter().flat_map(Drawn::arrays).chain(&undrawn);
        async_eval(outputs.chain(kv.touched(&slabs)))?;
        Ok(Self { step, undrawn, drawn, vocabulary, slabs })
    }

    /// Begins to draw the rows that waited for what they may draw, behind the step.
    pub(super) fn draw(&mut self, masks: Vec<Option<TokenSet>>) -> Result<(), Exception> {
        let Some(logits) = self.undrawn.take() else { return Ok(()) };
        self.step.mask(masks);
        let drawn = sampler::draw(&self.step, &logits, self.vocabulary)?;
        async_eval(drawn.arrays())?;
        self.drawn = Some(drawn);
        Ok(())
    }

    /// Waits for the step, and returns what came of its rows.
    pub(super) fn collect(self, kv: &Kv) -> Result<Vec<RowResult>, Error> {
        let Self { step, undrawn, drawn, vocabulary: _, slabs } = self;
        assert!(undrawn.is_none(), "a step is drawn before it is collected");
        match drawn {
            Some(drawn) => drawn.read(&step).map_err(|why| Error::Internal(format!("MLX: {why}"))),
            None => {
                // The slabs of the last layer are ready when the step is done.
                eval(kv.touched(&slabs))?;
                Ok(Vec::new())
            }
        }
    }
}
