//! A backend without a device, for tests: a slot is the list of the tokens in it, and the next token is a
//! hash of that list. So a wrong slot, a lost copy or a stale position shows as a wrong token.

use std::collections::BTreeMap;

use crate::backend::{
    Backend, DeviceInfo, DeviceMemory, LoadSpec, LoadStep, ModelId, ModelShape, ParkedId, SlotId, Span,
    SpanOutput, SpanResult, Step, TokenLogprobs, add_mark,
};
use crate::error::Error;

/// Bytes of one token in the fake's KV cache.
pub(super) const KV_BYTES: u64 = 10;
/// Bytes of the fake's weights.
pub(super) const WEIGHT_BYTES: u64 = 1000;
/// Tokens that a sequence may have.
pub(super) const CONTEXT: u32 = 4096;

/// The token after a context; the vocabulary's last one never is.
pub(super) fn next_token(context: &[u32]) -> u32 {
    let mix = |hash: u32, token: &u32| (hash ^ token).wrapping_mul(0x0100_0193);
    context.iter().fold(0x811c_9dc5, mix) % 999
}

#[derive(Default)]
pub(super) struct Fake {
    models: u32,
    slabs: BTreeMap<(ModelId, u32), Slab>,
    parked: BTreeMap<(ModelId, ParkedId), (Vec<u32>, Vec<u32>)>,
    marks: BTreeMap<(ModelId, SlotId), Vec<u32>>,
    /// Bytes of a sequence's state; 0 is none.
    pub(super) state_bytes: u64,
    parked_next: u64,
    results: BTreeMap<ModelId, Vec<SpanResult>>,
    pub(super) faults: Faults,
    steps: u64,
}

/// The tokens in each slot.
struct Slab {
    capacity: u32,
    slots: Vec<Vec<u32>>,
}

/// What goes wrong, and when.
#[derive(Clone, Copy, Default)]
pub(super) struct Faults {
    /// The step that fails, counting from 1.
    pub(super) error_at: Option<u64>,
    /// The step that panics.
    pub(super) panic_at: Option<u64>,
    /// A token whose context yields logits that are not finite.
    pub(super) poison: Option<u32>,
    /// The next step fails.
    pub(super) next_step_fails: bool,
    /// Loads fail half way.
    pub(super) loads_fail: bool,
    /// A defect: a restored cache has a wrong token at its end.
    pub(super) restores_wrongly: bool,
}

impl Fake {
    pub(super) fn with(faults: Faults) -> Self {
        Self { faults, ..Self::default() }
    }

    pub(super) fn info(budget_bytes: u64) -> DeviceInfo {
        DeviceInfo { device: "fake".into(), mlx_version: "0".into(), budget_bytes, architectures: vec![] }
    }

    /// Bytes of all that it holds of a model.
    pub(super) fn bytes(&self, model: ModelId) -> u64 {
        let state = self.state_bytes;
        let slab = |slab: &Slab| (u64::from(slab.capacity) * KV_BYTES + state) * slab.slots.len() as u64;
        let slabs = self.slabs.iter().filter(|((of, _), _)| *of == model).map(|(_, held)| slab(held));
        let parked = self.parked.iter().filter(|((of, _), _)| *of == model);
        let cache = |(tokens, marks): &(Vec<u32>, Vec<u32>)| {
            tokens.len() as u64 * KV_BYTES + if state > 0 { marks.len() as u64 * state } else { 0 }
        };
        WEIGHT_BYTES + slabs.chain(parked.map(|(_, held)| cache(held))).sum::<u64>()
    }

    fn slot(&mut self, model: ModelId, slot: SlotId) -> &mut Vec<u32> {
        &mut self.slabs.get_mut(&(model, slot.slab)).unwrap().slots[slot.slot as usize]
    }

    fn span(&mut self, model: ModelId, span: &Span) -> SpanResult {
        let poison = self.faults.poison;
        let capacity = self.slabs[&(model, span.slot.slab)].capacity as usize;
        let content = self.slot(model, span.slot);
        assert_eq!(content.len(), span.start as usize, "a span starts where the cache ends");
        content.extend(&span.tokens);
        assert!(content.len() <= capacity, "a span fits its slot");
        if poison.is_some_and(|poison| content.contains(&poison)) {
            return SpanResult::NotFinite;
        }
        match &span.output {
            SpanOutput::None => SpanResult::None,
            SpanOutput::Sample(_) => SpanResult::Token(next_token(content), None),
            SpanOutput::Score { next, .. } => SpanResult::Scores(
                next.iter().map(|&token| TokenLogprobs { chosen: (token, -1.0), top: vec![] }).collect(),
            ),
        }
    }
}

impl Backend for Fake {
    fn estimate(&mut self, _: &LoadSpec, _: u64) -> Result<u64, Error> {
        Ok(WEIGHT_BYTES)
    }

    fn load(&mut self, _: &LoadSpec, _: u64) -> Result<ModelId, Error> {
        self.models += 1;
        Ok(ModelId(self.models))
    }

    fn load_more(&mut self, _: ModelId) -> Result<LoadStep, Error> {
        if self.faults.loads_fail {
            return Err(Error::Internal("the failed load that a test asked for".into()));
        }
        Ok(LoadStep::Ready(ModelShape {
            context_length: CONTEXT,
            vocabulary_size: 1000,
            kv_bytes_per_token: KV_BYTES,
            state_bytes: self.state_bytes,
            weight_bytes: WEIGHT_BYTES,
            parameter_count: 250,
            prefill_tokens_min: 16,
            computes_in: "fake".into(),
        }))
    }

    fn unload(&mut self, model: ModelId) -> Result<(), Error> {
        self.slabs.retain(|(of, _), _| *of != model);
        self.parked.retain(|(of, _), _| *of != model);
        self.results.remove(&model);
        Ok(())
    }

    fn open_slab(&mut self, model: ModelId, slab: u32, capacity: u32, slots: u32) -> Result<(), Error> {
        let empty = Slab { capacity, slots: vec![vec![]; slots as usize] };
        assert!(self.slabs.insert((model, slab), empty).is_none(), "the slab is open");
        Ok(())
    }

    fn close_slab(&mut self, model: ModelId, slab: u32) -> Result<(), Error> {
        assert!(self.slabs.remove(&(model, slab)).is_some(), "no such slab");
        Ok(())
    }

    fn clear_slot(&mut self, model: ModelId, slot: SlotId, tokens: u32) -> Result<(), Error> {
        let content = self.slot(model, slot);
        assert_eq!(content.len(), tokens as usize, "all of a slot is cleared");
        content.clear();
        self.marks.remove(&(model, slot));
        Ok(())
    }

    fn copy_slot(&mut self, model: ModelId, from: SlotId, to: SlotId, tokens: u32) -> Result<(), Error> {
        let content = self.slot(model, from)[..tokens as usize].to_vec();
        assert!(self.slot(model, to).is_empty(), "a copy goes into a clear slot");
        *self.slot(model, to) = content;
        let marks = self.marks.get(&(model, from)).cloned().unwrap_or_default();
        self.marks.insert((model, to), marks);
        Ok(())
    }

    fn mark(&mut self, model: ModelId, slot: SlotId, tokens: u32) -> Result<(), Error> {
        assert_eq!(self.slot(model, slot).len(), tokens as usize, "a slot is marked at its end");
        add_mark(self.marks.entry((model, slot)).or_default(), tokens);
        Ok(())
    }

    fn park(&mut self, model: ModelId, slot: SlotId, tokens: u32) -> Result<ParkedId, Error> {
        let id = ParkedId(self.parked_next);
        self.parked_next += 1;
        let content = self.slot(model, slot).clone();
        assert_eq!(content.len(), tokens as usize, "all of a slot is parked");
        let mut marks = self.marks.get(&(model, slot)).cloned().unwrap_or_default();
        if marks.last() != Some(&tokens) {
            marks.push(tokens);
        }
        self.parked.insert((model, id), (content, marks));
        Ok(id)
    }

    fn restore(&mut self, model: ModelId, parked: ParkedId, tokens: u32, slot: SlotId) -> Result<(), Error> {
        let (content, marks) = &self.parked[&(model, parked)];
        assert!(self.state_bytes == 0 || marks.contains(&tokens), "a state is restored at a mark");
        let (mut content, mut kept) = (content[..tokens as usize].to_vec(), Vec::new());
        marks.iter().filter(|&&mark| mark <= tokens).for_each(|&mark| add_mark(&mut kept, mark));
        self.marks.insert((model, slot), kept);
        if self.faults.restores_wrongly {
            content[tokens as usize - 1] += 1;
        }
        assert!(self.slot(model, slot).is_empty(), "a cache is restored into a clear slot");
        *self.slot(model, slot) = content;
        Ok(())
    }

    fn drop_parked(&mut self, model: ModelId, parked: ParkedId) -> Result<(), Error> {
        assert!(self.parked.remove(&(model, parked)).is_some(), "no such parked cache");
        Ok(())
    }

    fn launch(&mut self, model: ModelId, step: &Step) -> Result<(), Error> {
        assert!(!self.results.contains_key(&model), "the last step was not collected");
        self.steps += 1;
        assert_ne!(self.faults.panic_at, Some(self.steps), "the panic that a test asked for");
        if self.faults.error_at == Some(self.steps) || std::mem::take(&mut self.faults.next_step_fails) {
            return Err(Error::Internal("the device error that a test asked for".into()));
        }
        let single = step.spans.partition_point(|span| span.tokens.len() == 1);
        assert!(step.spans[single..].iter().all(|span| span.tokens.len() > 1), "short spans come first");
        assert!(step.spans[..single].is_sorted_by_key(|span| span.slot), "short spans are in slot order");
        let results = step.spans.iter().map(|span| self.span(model, span)).collect();
        self.results.insert(model, results);
        Ok(())
    }

    fn collect(&mut self, model: ModelId) -> Result<Vec<SpanResult>, Error> {
        Ok(self.results.remove(&model).unwrap())
    }

    fn trim(&mut self) -> Result<(), Error> {
        Ok(())
    }

    fn memory(&self) -> DeviceMemory {
        DeviceMemory::default()
    }
}
