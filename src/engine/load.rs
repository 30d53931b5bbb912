//! Loads: one at a time, piece by piece between other models' steps. A load that does not fit is refused
//! with numbers before anything is read.

use tokio::sync::mpsc;

use super::core::Engine;
use super::resident::Resident;
use super::work::LoadEvent;
use crate::backend::{Backend, LoadSpec, LoadStep, ModelId, ModelShape, SlotId, Span, SpanOutput, Step};
use crate::error::Error;

/// Sequences of the steps that warm a model up, and tokens of a slot of theirs.
const WARM_SEQUENCES: [u32; 3] = [1, 12, 32];
const WARM_TOKENS: u32 = 16;

/// A load that waits or runs.
pub(super) struct Load {
    pub(super) spec: LoadSpec,
    pub(super) listeners: Vec<mpsc::Sender<LoadEvent>>,
    /// The model and the bytes reserved for it, once it has begun.
    begun: Option<(ModelId, u64)>,
}

impl Load {
    pub(super) fn new(spec: LoadSpec, listener: mpsc::Sender<LoadEvent>) -> Self {
        Self { spec, listeners: vec![listener], begun: None }
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
        match self.backend.load_more(id)? {
            LoadStep::Reading { done_bytes, total_bytes } => {
                load.progress(|| LoadEvent::Progress { done_bytes, total_bytes });
                Ok(None)
            }
            LoadStep::Ready(shape) => {
                load.progress(|| LoadEvent::Warming);
                self.warm(id)?;
                Ok(Some((id, shape)))
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

    /// Runs a prompt and steps of several sizes, so that what the device prepares on first use, as GPUs their
    /// kernels, is not the first requests' to wait for.
    fn warm(&mut self, id: ModelId) -> Result<(), Error> {
        let slab = u32::MAX;
        self.backend.open_slab(id, slab, WARM_TOKENS, WARM_SEQUENCES[2])?;
        let span = |slot, start, tokens: u32| Span {
            slot: SlotId { slab, slot },
            start,
            tokens: vec![0; tokens as usize],
            output: SpanOutput::Sample(Box::default()),
        };
        let mut held = [0; WARM_SEQUENCES[2] as usize];
        for (sequences, tokens) in [(1, WARM_TOKENS - 3)].into_iter().chain(WARM_SEQUENCES.map(|n| (n, 1))) {
            let spans = held.iter_mut().zip(0..sequences).map(|(held, slot)| {
                *held += tokens;
                span(slot, *held - tokens, tokens)
            });
            self.backend.launch(id, &Step { spans: spans.collect() })?;
            self.backend.collect(id)?;
        }
        self.backend.close_slab(id, slab)
    }
}
