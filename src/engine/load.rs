//! One load: a model is read piece by piece beside other models' steps, which never wait for it, then warmed
//! up. It knows the backend only; whether it may begin is decided by `residency`.

use tokio::sync::mpsc;

use super::api::{LoadEvent, LoadWork};
use crate::backend::{
    Backend, LoadPlan, LoadSpec, LoadStep, ModelId, ModelShape, RowOutput, Sample, SlotId, Span, SpanKind,
    Step, Want,
};
use crate::error::{Error, MemoryRule, Shortage};
use crate::residency::{ModelLease, Stay};

/// The steps that warm a model up, by sequences and tokens of each: what a GPU compiles differs with the
/// rows.
const WARM_STEPS: [(u32, u32); 4] = [(1, 13), (1, 1), (12, 1), (32, 1)];

/// Number of those that show that the model runs, where the device prepares nothing for others.
const WARM_STEPS_MIN: usize = 2;

/// Tokens of their slots.
const WARM_TOKENS: u32 = 16;

/// How far a load came.
pub(super) enum Advance {
    /// Its files are being opened.
    Opening,
    /// It waits for a piece.
    Waited,
    /// A piece was begun.
    Read,
    /// Steps of it ran on the device.
    Warmed,
    /// The model is ready.
    Ready(ModelId, ModelShape),
}

/// A load that waits or runs.
pub(super) struct Load {
    /// The model; its number formats are decided.
    pub(super) spec: LoadSpec,
    listeners: Vec<Listener>,
    /// The model and its plan, whose bytes are reserved, once it has begun.
    begun: Option<(ModelId, LoadPlan)>,
    /// The model's shape and the warm-up steps taken, once it is read.
    warming: Option<(ModelShape, usize)>,
}

/// Somebody who waits for a load.
struct Listener {
    events: mpsc::Sender<LoadEvent>,
    wants_lease: bool,
    /// What it says about the model's stay.
    stay: Stay,
}

impl Load {
    /// Returns a load that waits.
    pub(super) fn new(spec: LoadSpec, work: LoadWork) -> Self {
        let mut load = Self { spec, listeners: Vec::new(), begun: None, warming: None };
        load.join(work);
        load
    }

    /// Adds one who is told, and who takes the model as it is loaded; those who left are forgotten.
    pub(super) fn join(&mut self, work: LoadWork) {
        let LoadWork { spec: _, stay, wants_lease, events } = work;
        self.listeners.retain(|listener| !listener.events.is_closed());
        self.listeners.push(Listener { events, wants_lease, stay });
    }

    /// Returns the number of those who are told.
    #[cfg(test)]
    pub(super) fn listeners(&self) -> usize {
        self.listeners.len()
    }

    /// Returns whether anybody still waits for it.
    pub(super) fn is_wanted(&self) -> bool {
        self.listeners.iter().any(|listener| !listener.events.is_closed())
    }

    /// Returns whether the backend has opened the model.
    pub(super) fn has_begun(&self) -> bool {
        self.begun.is_some()
    }

    /// Returns what those who still wait say about the model's stay.
    pub(super) fn stay(&self) -> Stay {
        let mut stay = Stay::default();
        let waiting = self.listeners.iter().filter(|listener| !listener.events.is_closed());
        waiting.for_each(|listener| stay.renew(listener.stay));
        stay
    }

    /// Returns the bytes reserved for it.
    pub(super) fn reserved_bytes(&self) -> u64 {
        self.begun.as_ref().map_or(0, |(_, plan)| plan.reserved_bytes())
    }

    /// Opens the model and reserves the bytes that it needs.
    pub(super) fn begin<B: Backend>(&mut self, backend: &mut B, plan: LoadPlan) -> Result<(), Error> {
        self.begun = Some((backend.load(plan.clone())?, plan));
        Ok(())
    }

    /// Begins one more piece, or takes one more warm-up step. `budget_bytes` is for the refusal where the
    /// system has less memory than was planned.
    pub(super) fn advance<B: Backend>(
        &mut self,
        backend: &mut B,
        budget_bytes: u64,
    ) -> Result<Advance, Error> {
        let Some((id, LoadPlan { kv_bytes, .. })) = self.begun else { return Ok(Advance::Waited) };
        if let Some((shape, done)) = self.warming.take() {
            return match warm_up(backend, id, (&shape, kv_bytes), done) {
                Ok(true) => {
                    self.warming = Some((shape, done + 1));
                    Ok(Advance::Warmed)
                }
                Ok(false) => Ok(Advance::Ready(id, shape)),
                Err(Error::KvShortage { available_bytes, .. }) => {
                    Err(self.short(available_bytes, budget_bytes))
                }
                Err(error) => Err(error),
            };
        }
        match backend.load_more(id)? {
            LoadStep::Opening => return Ok(Advance::Opening),
            LoadStep::Pending => return Ok(Advance::Waited),
            LoadStep::Short { available_bytes } => return Err(self.short(available_bytes, budget_bytes)),
            LoadStep::Reading { done_bytes, total_bytes } => {
                self.progress(|| LoadEvent::Progress { done_bytes, total_bytes });
            }
            LoadStep::Ready(shape) => {
                self.progress(|| LoadEvent::Warming);
                self.warming = Some((shape, 0));
            }
        }
        Ok(Advance::Read)
    }

    /// Returns the refusal of a load for which the system has less memory than was planned.
    fn short(&self, available_bytes: u64, budget_bytes: u64) -> Error {
        Error::MemoryBudget(Box::new(Shortage {
            model: self.spec.model().clone(),
            needed_bytes: self.reserved_bytes(),
            available_bytes,
            budget_bytes,
            rule: MemoryRule::System,
            in_the_way: Vec::new(),
        }))
    }

    /// Frees what was read.
    pub(super) fn abandon<B: Backend>(&self, backend: &mut B) {
        if let Some((id, _)) = &self.begun
            && let Err(error) = backend.unload(*id)
        {
            tracing::error!(model = %self.spec.model(), ?error, "the model could not be unloaded");
        }
    }

    /// Tells every listener; a slow one misses progress.
    fn progress(&self, event: impl Fn() -> LoadEvent) {
        for Listener { events, .. } in &self.listeners {
            // The last place in the channel is for the end.
            if events.capacity() > 1 && !events.is_closed() {
                let _ = events.try_send(event());
            }
        }
    }

    /// Tells the end to every listener that has not left; those who asked for a lease get one.
    pub(super) fn end(self, event: impl Fn(Option<ModelLease>) -> LoadEvent, lease: &ModelLease) {
        for Listener { events, wants_lease, .. } in self.listeners {
            if !events.is_closed() {
                let _ = events.try_send(event(wants_lease.then(|| lease.clone())));
            }
        }
    }

    /// Tells every listener that has not left why it failed.
    pub(super) fn fail(self, error: &Error) {
        for Listener { events, .. } in self.listeners {
            let _ = events.try_send(LoadEvent::Failed(error.clone()));
        }
    }
}

/// Takes the warm-up step of this number, with no more sequences than `kv_bytes` hold, but one. Returns
/// whether there was one.
fn warm_up<B: Backend>(
    backend: &mut B,
    id: ModelId,
    (shape, kv_bytes): (&ModelShape, u64),
    number: usize,
) -> Result<bool, Error> {
    let steps = if shape.prepares_steps { WARM_STEPS.len() } else { WARM_STEPS_MIN };
    if let Some(&(sequences, tokens)) = WARM_STEPS[..steps].get(number) {
        let slot_bytes = u64::from(WARM_TOKENS) * shape.kv_bytes_per_token + shape.state_bytes;
        let paid = u32::try_from(kv_bytes / slot_bytes.max(1)).unwrap_or(u32::MAX);
        warm(backend, id, sequences.min(paid.max(1)), &[tokens])?;
        return Ok(true);
    }
    // Where a prompt runs in large pieces, what follows a long one is different too.
    let has_long = number == steps && shape.prefill_tokens_min > WARM_TOKENS;
    if has_long {
        warm(backend, id, 1, &[shape.prefill_tokens_min, 1])?;
    }
    Ok(has_long)
}

/// Runs steps of `sequences` sequences with `steps` tokens each, so that requests do not wait for what the
/// device prepares on first use, as GPUs their kernels.
fn warm<B: Backend>(backend: &mut B, id: ModelId, sequences: u32, steps: &[u32]) -> Result<(), Error> {
    let slab = u32::MAX;
    let capacity = steps.iter().sum::<u32>().max(WARM_TOKENS);
    backend.open_slab(id, slab, capacity, sequences)?;
    let mut start = 0;
    for &tokens in steps {
        let span = |slot| Span {
            slot: SlotId { slab, slot },
            start,
            kind: SpanKind::Prefill,
            tokens: vec![0; tokens as usize],
            outputs: vec![RowOutput { row: tokens - 1, want: Want::Sample(Sample::default()) }],
        };
        backend.launch(id, Step { spans: (0..sequences).map(span).collect() })?;
        backend.collect(id)?;
        start += tokens;
    }
    backend.close_slab(id, slab)
}
