//! What the constrained outputs of a model may draw: told to the device when a step is done, or waited for
//! outside of steps. All outputs together make a step wait for a bounded time; one whose answer is not there
//! then draws nothing, and its last token runs again once it is.

use std::collections::BTreeMap;
use std::time::Duration;

use super::resident::LaunchedSpan;
use super::{Context, Resident};
use crate::backend::{Backend, TokenSet, TruncateError};
use crate::engine::task::{Mask, Sequence};
use crate::error::Error;

/// Time that a step waits for masks, all of its rows together: a fraction of one that decodes.
const WAIT: Duration = Duration::from_millis(5);

/// Time that a step may have waited, and its own is still known.
const UNNOTICED: Duration = Duration::from_millis(1);

/// What becomes of a constrained output that draws nothing in a step.
pub(super) enum Verdict {
    /// It ends: it is whole.
    Whole,
    /// It ends: it cannot go on.
    Failed(Error),
    /// It runs its last token again.
    Again,
}

/// Outputs that draw nothing, by their sequences.
pub(super) type Verdicts = BTreeMap<u64, Verdict>;

impl Resident {
    /// Returns whether no step begins for an output before it is known what it draws from: states cannot be
    /// cut back by a token.
    pub(super) fn is_strict(&self) -> bool {
        self.shape.state_bytes > 0
    }

    /// Tells the device what the rows of constrained outputs may draw; those whose answers are not there in
    /// time draw nothing. Returns the outputs that draw nothing, and whether the device may have waited.
    pub(super) fn draw<B: Backend>(
        &mut self,
        cx: &mut Context<'_, B>,
        spans: &[LaunchedSpan],
    ) -> Result<(Verdicts, bool), Error> {
        let (mut verdicts, mut left) = (BTreeMap::new(), WAIT);
        let mut masks: Vec<Option<TokenSet>> = Vec::new();
        for span in spans.iter().filter(|span| span.masks > 0) {
            let mask = self.running.get_mut(&span.sequence).and_then(|sequence| {
                let verdict = match wait(cx, sequence, &mut left) {
                    Mask::Tokens(tokens) => return Some(tokens),
                    Mask::Whole => Verdict::Whole,
                    Mask::Failed(error) => Verdict::Failed(error),
                    Mask::Late => Verdict::Again,
                };
                verdicts.insert(span.sequence, verdict);
                None
            });
            masks.extend(std::iter::repeat_n(mask, span.masks));
        }
        if !masks.is_empty() {
            cx.backend.draw(self.id, masks)?;
        }
        Ok((verdicts, WAIT - left > UNNOTICED))
    }

    /// Cuts the last token off sequences that run it again.
    pub(super) fn cut_back<B: Backend>(
        &mut self,
        cx: &mut Context<'_, B>,
        again: &[u64],
    ) -> Result<(), Error> {
        for id in again {
            let Some(sequence) = self.running.get(id) else { continue };
            let (Some(slot), computed) = (sequence.slot, sequence.computed) else { continue };
            cx.backend.truncate(self.id, slot, computed + 1, computed).map_err(|error| match error {
                TruncateError::Device(error) => error,
                TruncateError::NoCheckpoint { .. } => Error::Internal(error.to_string()),
            })?;
        }
        Ok(())
    }

    /// Looks for the answers that are there, before a step is planned; ends outputs that cannot go on.
    pub(super) fn look_for_masks<B: Backend>(&mut self, cx: &mut Context<'_, B>) -> Result<(), Error> {
        let (is_strict, limit) = (self.is_strict(), cx.settings.mask_max);
        let (mut left, mut failed) = (WAIT, Vec::new());
        for (&id, sequence) in &mut self.running {
            sequence.look_for_mask(cx.now, limit);
            if is_strict && !sequence.waits_for_mask(false) {
                wait(cx, sequence, &mut left);
            }
            if let Mask::Failed(error) = sequence.mask() {
                failed.push((id, Err(error)));
            }
        }
        self.end(cx, failed)
    }
}

/// Waits for what an output may draw, for as long as is left.
fn wait<B: Backend>(cx: &Context<'_, B>, sequence: &mut Sequence, left: &mut Duration) -> Mask {
    let before = cx.clock.now();
    sequence.settle_mask(*left);
    *left = left.saturating_sub(cx.clock.now() - before);
    sequence.mask()
}
