//! A backend without a device, for tests: a slot is the list of the tokens in it, and the next token is a
//! hash of that list. So a wrong slot, a lost copy or a stale position shows as a wrong token.

use std::collections::BTreeMap;

use crate::backend::{
    Backend, DeviceInfo, DeviceMemory, LoadSpec, LoadStep, ModelId, ModelShape, ParkedId, SlotId, SpanOutput,
    SpanResult, Step, TokenLogprobs,
};
use crate::error::Error;

/// Bytes of one token in the fake's KV cache.
pub(super) const KV_BYTES: u64 = 10;
/// Bytes of the fake's weights.
pub(super) const WEIGHT_BYTES: u64 = 1000;
/// Tokens that a sequence may have.
pub(super) const CONTEXT: u32 = 4096;

/// The token after a context.
pub(super) fn next_token(context: &[u32]) -> u32 {
    let mix = |hash: u32, token: &u32| (hash ^ token).wrapping_mul(0x0100_0193);
    context.iter().fold(0x811c_9dc5, mix) % 1000
}

#[derive(Default)]
pub(super) struct Fake {
    models: u32,
    slabs: BTreeMap<u32, Vec<Vec<u32>>>,
    parked: BTreeMap<ParkedId, Vec<u32>>,
    parked_next: u64,
    results: Option<Vec<SpanResult>>,
    faults: Faults,
    steps: u64,
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
}

impl Fake {
    pub(super) fn with(faults: Faults) -> Self {
        Self { faults, ..Self::default() }
    }

    pub(super) fn info(budget_bytes: u64) -> DeviceInfo {
        DeviceInfo { device: "fake".into(), mlx_version: "0".into(), budget_bytes, architectures: vec![] }
    }

    fn slot(&mut self, slot: SlotId) -> &mut Vec<u32> {
        &mut self.slabs.get_mut(&slot.slab).unwrap()[slot.slot as usize]
    }

    fn span(&mut self, slot: SlotId, start: u32, tokens: &[u32], output: &SpanOutput) -> SpanResult {
        let poison = self.faults.poison;
        let content = self.slot(slot);
        assert_eq!(content.len(), start as usize, "a span starts where the cache ends");
        content.extend(tokens);
        if poison.is_some_and(|poison| content.contains(&poison)) {
            return SpanResult::NotFinite;
        }
        match output {
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
        Ok(LoadStep::Ready(ModelShape {
            context_length: CONTEXT,
            vocabulary_size: 1000,
            kv_bytes_per_token: KV_BYTES,
            weight_bytes: WEIGHT_BYTES,
            parameter_count: 250,
            computes_in: "fake".into(),
        }))
    }

    fn unload(&mut self, _: ModelId) -> Result<(), Error> {
        Ok(())
    }

    fn open_slab(&mut self, _: ModelId, slab: u32, _: u32, slots: u32) -> Result<(), Error> {
        assert!(self.slabs.insert(slab, vec![vec![]; slots as usize]).is_none(), "the slab is open");
        Ok(())
    }

    fn close_slab(&mut self, _: ModelId, slab: u32) -> Result<(), Error> {
        assert!(self.slabs.remove(&slab).is_some(), "no such slab");
        Ok(())
    }

    fn clear_slot(&mut self, _: ModelId, slot: SlotId, tokens: u32) -> Result<(), Error> {
        let content = self.slot(slot);
        assert_eq!(content.len(), tokens as usize, "all of a slot is cleared");
        content.clear();
        Ok(())
    }

    fn copy_slot(&mut self, _: ModelId, from: SlotId, to: SlotId, tokens: u32) -> Result<(), Error> {
        let content = self.slot(from)[..tokens as usize].to_vec();
        assert!(self.slot(to).is_empty(), "a copy goes into a clear slot");
        *self.slot(to) = content;
        Ok(())
    }

    fn park(&mut self, _: ModelId, slot: SlotId, tokens: u32) -> Result<ParkedId, Error> {
        let id = ParkedId(self.parked_next);
        self.parked_next += 1;
        let content = self.slot(slot)[..tokens as usize].to_vec();
        self.parked.insert(id, content);
        Ok(id)
    }

    fn restore(&mut self, _: ModelId, parked: ParkedId, tokens: u32, slot: SlotId) -> Result<(), Error> {
        let content = self.parked[&parked][..tokens as usize].to_vec();
        assert!(self.slot(slot).is_empty(), "a cache is restored into a clear slot");
        *self.slot(slot) = content;
        Ok(())
    }

    fn drop_parked(&mut self, _: ModelId, parked: ParkedId) -> Result<(), Error> {
        assert!(self.parked.remove(&parked).is_some(), "no such parked cache");
        Ok(())
    }

    fn launch(&mut self, _: ModelId, step: &Step) -> Result<(), Error> {
        assert!(self.results.is_none(), "the last step was not collected");
        self.steps += 1;
        assert_ne!(self.faults.panic_at, Some(self.steps), "the panic that a test asked for");
        if self.faults.error_at == Some(self.steps) {
            return Err(Error::Internal("the device error that a test asked for".into()));
        }
        let single = step.spans.partition_point(|span| span.tokens.len() == 1);
        assert!(step.spans[single..].iter().all(|span| span.tokens.len() > 1), "short spans come first");
        assert!(step.spans[..single].is_sorted_by_key(|span| span.slot), "short spans are in slot order");
        let spans =
            step.spans.iter().map(|span| self.span(span.slot, span.start, &span.tokens, &span.output));
        self.results = Some(spans.collect());
        Ok(())
    }

    fn collect(&mut self, _: ModelId) -> Result<Vec<SpanResult>, Error> {
        Ok(self.results.take().unwrap())
    }

    fn memory(&self) -> DeviceMemory {
        DeviceMemory::default()
    }
}
