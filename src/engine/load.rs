//! Loads: one at a time, piece by piece between other models' steps. A load that does not fit is refused
//! with numbers before anything is read.

use tokio::sync::mpsc;

use super::core::Engine;
use super::resident::Resident;
use super::work::LoadEvent;
use crate::backend::{Backend, LoadSpec, LoadStep, ModelId, ModelShape, SlotId, Span, SpanOutput, Step};
use crate::error::Error;

/// The steps that warm a model up, by sequences and tokens of each: what a GPU compiles differs with the rows.
const WARM_STEPS: [(u32, u32); 4] = [(1, 13), (1, 1), (12, 1), (32, 1)];

/// Tokens of their slots.
const WARM_TOKENS: u32 = 16;

/// A load that waits or runs.
pub(super) struct Load {
    pub(super) spec: LoadSpec,
    pub(super) listeners: Vec<mpsc::Sender<LoadEvent>>,
    /// The model and the bytes reserved for it, once it has begun.
    begun: Option<(ModelId, u64)>,
    /// The model's shape and the steps taken, once it is warmed up.
    warming: Option<(ModelShape, usize)>,
}

impl Load {
    pub(super) fn new(spec: LoadSpec, listener: mpsc::Sender<LoadEvent>) -> Self {
        Self { spec, listeners: vec![listener], begun: None, warming: None }
    }

    pub(super) fn reserved_bytes(&self) -> u64 {
        self.begun.map_or(0, |(_, bytes)| bytes)
    }

    /// Tells every listener; one that is slow misses progress.
    fn progress(&self, event: impl Fn() -> LoadEvent) {
        for listener in &self.listeners {
            // The last place in the channel is for the end.
            if listener.capacity() > 1 {
                let _ = listener.try_send(event());
            }
        }
    }

    fn end(self, event: impl Fn() -> LoadEvent) {
        for listener in self.listeners {
            let _ = listener.try_send(event());
        }
    }
}

impl<B: Backend> Engine<B> {
    /// Reads one more piece of the first load.
    pub(super) fn advance_load(&mut self) {
        let Some(mut load) = self.loads.pop_front() else { return };
        match self.load_piece(&mut load) {
            Ok(None) => self.loads.push_front(load),
            Ok(Some((id, shape))) => {
                tracing::info!(model = %load.spec.model, bytes = shape.weight_bytes, "loaded");
                let resident = Resident::new(id, load.spec.clone(), shape, self.clock.wall());
                let described = resident.describe();
                self.models.insert(load.spec.model.clone(), resident);
                load.end(|| LoadEvent::Loaded(Box::new(described.clone())));
            }
            Err(error) => {
                tracing::warn!(model = %load.spec.model, ?error, "the load failed");
                if let Some((id, _)) = load.begun
                    && let Err(error) = self.backend.unload(id)
                {
                    tracing::error!(model = %load.spec.model, ?error, "the model could not be unloaded");
                }
                load.end(|| LoadEvent::Failed(error.clone()));
            }
        }
    }

    fn load_piece(&mut self, load: &mut Load) -> Result<Option<(ModelId, ModelShape)>, Error> {
        let Some((id, _)) = load.begun else {
            load.begun = Some(self.begin_load(&load.spec)?);
            return Ok(None);
        };
        if let Some((shape, done)) = load.warming.take() {
            match WARM_STEPS.get(done) {
                Some(&(sequences, tokens)) => self.warm(id, sequences, &[tokens])?,
                // Where a prompt runs in large pieces, what follows a long one is different too.
                None if done == WARM_STEPS.len() && shape.prefill_tokens_min > WARM_TOKENS => {
                    self.warm(id, 1, &[shape.prefill_tokens_min, 1])?;
                }
                None => return Ok(Some((id, shape))),
            }
            load.warming = Some((shape, done + 1));
            return Ok(None);
        }
        match self.backend.load_more(id)? {
            LoadStep::Reading { done_bytes, total_bytes } => {
                load.progress(|| LoadEvent::Progress { done_bytes, total_bytes });
                Ok(None)
            }
            LoadStep::Ready(shape) => {
                load.progress(|| LoadEvent::Warming);
                load.warming = Some((shape, 0));
                Ok(None)
            }
        }
    }

    fn begin_load(&mut self, spec: &LoadSpec) -> Result<(ModelId, u64), Error> {
        let available_bytes = self.available_bytes();
        let needed_bytes = self.backend.estimate(spec, available_bytes)?;
        let model = spec.model.clone();
        if needed_bytes > self.budget_bytes {
            return Err(Error::ModelTooLarge { model, needed_bytes, available_bytes: self.budget_bytes });
        }
        if needed_bytes > available_bytes {
            return Err(Error::MemoryBudget { model, needed_bytes, available_bytes });
        }
        self.make_room(needed_bytes);
        tracing::info!(%model, needed_bytes, available_bytes, "loading");
        Ok((self.backend.load(spec, available_bytes)?, needed_bytes))
    }

    /// Runs steps of so many sequences, each with so many tokens, so that what the device prepares on first use, as GPUs
    /// their kernels, is not the first requests' to wait for.
    fn warm(&mut self, id: ModelId, sequences: u32, steps: &[u32]) -> Result<(), Error> {
        let slab = u32::MAX;
        let capacity = steps.iter().sum::<u32>().max(WARM_TOKENS);
        self.backend.open_slab(id, slab, capacity, sequences)?;
        let mut start = 0;
        for &tokens in steps {
            let span = |slot| Span {
                slot: SlotId { slab, slot },
                start,
                tokens: vec![0; tokens as usize],
                output: SpanOutput::Sample(Box::default()),
            };
            self.backend.launch(id, &Step { spans: (0..sequences).map(span).collect() })?;
            self.backend.collect(id)?;
            start += tokens;
        }
        self.backend.close_slab(id, slab)
    }
}
