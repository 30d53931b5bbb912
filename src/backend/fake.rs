//! A backend without a device, for tests: a slot is the list of the tokens in it, and the next token is a
//! hash of that list. So a wrong slot, a lost copy or a stale position shows as a wrong token.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use super::fake_plain::{self, FakeBuilder};
pub(crate) use super::fake_plain::{among, drawn_token, next_token};
use super::{
    Backend, Base, BuildKv, Chains, ComputeDtype, DeviceInfo, DeviceMemory, Formats, Held, ImportError,
    Importing, KvDtype, KvSegment, LoadPlan, LoadSpec, LoadStep, ModelId, ModelShape, NewChain, ParkedId,
    Parking, Restoring, RowResult, Sample, SlotId, Span, SpanKind, Step, TokenLogprobs, TokenSet,
    TruncateError, Want, add_checkpoint,
};
use crate::error::Error;
use crate::hub::ContentHash;
use crate::ids::ModelName;

/// Bytes of one token in the fake's KV cache.
pub(crate) const KV_BYTES: u64 = 10;
/// Bytes of the fake's weights.
pub(crate) const WEIGHT_BYTES: u64 = 1000;
/// Tokens that a sequence may have.
pub(crate) const CONTEXT: u32 = 4096;

/// Returns what to load; the fake does not read it.
pub(crate) fn spec(model: &str) -> LoadSpec {
    let assets = std::sync::Arc::new(crate::hub::ModelAssets::fake(model));
    LoadSpec::new(assets, Formats::default()).unwrap()
}

#[derive(Default)]
pub(crate) struct Fake {
    /// Number of loads that it has begun.
    pub(crate) models: u32,
    /// Budget that it suggests.
    pub(crate) budget_bytes: u64,
    /// Bytes of weights by model; others have [`WEIGHT_BYTES`].
    pub(crate) weights: BTreeMap<ModelName, u64>,
    /// Models whose files are not opened for now.
    pub(crate) hanging: BTreeSet<ModelName>,
    /// Names of the models that it holds.
    names: BTreeMap<ModelId, ModelName>,
    /// Models that it cannot load.
    pub(crate) unsupported: BTreeSet<ModelName>,
    /// Bytes of KV cache that a load must have room for; of one in 8 bits, half.
    pub(crate) kv_reserve_bytes: u64,
    /// Most bytes of weights that it held, those of loads included.
    pub(crate) weight_bytes_peak: u64,
    /// Bytes of weights that it holds; of a load that runs, all.
    held: BTreeMap<ModelId, u64>,
    slabs: BTreeMap<(ModelId, u32), Slab>,
    parked: BTreeMap<ModelId, Chains<Vec<u32>, ()>>,
    checkpoints: BTreeMap<(ModelId, SlotId), Vec<u32>>,
    /// Tokens that it copied into parked caches, or within them.
    pub(crate) parked_tokens: u64,
    /// Tokens that it copied out of them.
    pub(crate) restored_tokens: u64,
    /// Tokens that it cleared in slots.
    pub(crate) cleared_tokens: u64,
    /// Tokens of caches that it imported.
    pub(crate) imported_tokens: u64,
    /// Bytes of a sequence's state; 0 is none.
    pub(crate) state_bytes: u64,
    /// Says which weights the loads to come have.
    pub(crate) content: u8,
    is_reading: bool,
    results: BTreeMap<ModelId, Vec<RowResult>>,
    /// Rows that wait for what they may draw: their places among the results.
    awaiting: BTreeMap<ModelId, Vec<usize>>,
    pub(crate) faults: Faults,
    steps: u64,
    /// Most bytes of slabs and parked caches that it held.
    pub(crate) kv_bytes_peak: u64,
    /// Lets the time of a step pass, given its numbers of prefilled tokens, without those of spans of one,
    /// and of spans of one; None takes no time.
    pub(crate) pass: Option<Box<dyn FnMut(u32, u32) + Send>>,
    /// Pieces that the loads to come read in all, one a call.
    pub(crate) pieces: u32,
    /// Lets the time of a piece pass; None takes no time.
    pub(crate) pass_piece: Option<Box<dyn Fn() + Send>>,
    /// Lets the time of a plan pass; None takes no time.
    pub(crate) pass_plan: Option<Box<dyn Fn() + Send>>,
    /// Steps that run, in the order of their launch, with the same two numbers.
    running: VecDeque<(ModelId, [u32; 2])>,
}

/// The tokens in each slot.
struct Slab {
    capacity: u32,
    slots: Vec<Vec<u32>>,
}

/// What goes wrong, and when.
#[derive(Clone, Copy, Default)]
pub(crate) struct Faults {
    /// The step that fails, counting from 1.
    pub(crate) error_at: Option<u64>,
    /// The step that panics.
    pub(crate) panic_at: Option<u64>,
    /// A token whose context yields logits that are not finite.
    pub(crate) poison: Option<u32>,
    /// The next step fails.
    pub(crate) next_step_fails: bool,
    /// Loads fail half way.
    pub(crate) loads_fail: bool,
    /// Bytes that the system gives to a load, if they are too few.
    pub(crate) short_of: Option<u64>,
    /// Slabs of more tokens than this, all slots together, are not opened.
    pub(crate) slab_tokens_max: Option<u32>,
    /// Slabs that would make it hold more bytes of KV cache than this are not opened.
    pub(crate) kv_bytes_max: Option<u64>,
    /// Nothing is parked.
    pub(crate) parking_fails: bool,
    /// No segment is cut in two.
    pub(crate) splitting_fails: bool,
    /// A defect: a restored cache has a wrong token at its end.
    pub(crate) restores_wrongly: bool,
}

impl Fake {
    pub(crate) fn with(faults: Faults) -> Self {
        Self { faults, ..Self::default() }
    }

    pub(crate) fn info() -> DeviceInfo {
        DeviceInfo {
            device: "fake".into(),
            mlx_version: "0".into(),
            memory_bytes: None,
            architectures: vec![],
        }
    }

    /// Bytes of all that it holds of a model.
    pub(crate) fn bytes(&self, model: ModelId) -> u64 {
        self.held[&model] + self.kv_bytes(|of| of == model)
    }

    /// Bytes of the slabs and parked caches of some models.
    pub(crate) fn kv_bytes(&self, wanted: impl Fn(ModelId) -> bool) -> u64 {
        let state = self.state_bytes;
        let slab = |slab: &Slab| (u64::from(slab.capacity) * KV_BYTES + state) * slab.slots.len() as u64;
        let slabs = self.slabs.iter().filter(|((of, _), _)| wanted(*of)).map(|(_, held)| slab(held));
        let parked = self.parked.iter().filter(|(of, _)| wanted(**of)).map(|(_, chains)| chains.held());
        slabs.chain(parked.map(|Held { tokens, states }| tokens * KV_BYTES + states * state)).sum()
    }

    /// Notes how much it holds now.
    fn note_peak(&mut self) {
        self.kv_bytes_peak = self.kv_bytes_peak.max(self.kv_bytes(|_| true));
        self.weight_bytes_peak = self.weight_bytes_peak.max(self.held.values().sum());
    }

    /// Number of models that it holds, loading ones included.
    pub(crate) fn held(&self) -> usize {
        self.held.len()
    }

    /// Number of parked caches.
    pub(crate) fn parked(&self) -> usize {
        self.parked.values().map(Chains::len).sum()
    }

    /// Returns the first `tokens` of a parked cache.
    fn content(&self, model: ModelId, parked: ParkedId, tokens: u32) -> Vec<u32> {
        let segments = self.parked[&model].content(parked, tokens);
        let content: Vec<u32> =
            segments.flat_map(|(range, content)| content[..range.len()].to_vec()).collect();
        assert_eq!(content.len(), tokens as usize, "a parked cache has these tokens");
        content
    }

    /// Copies what a slot does not share into a new parked cache.
    fn copy_out(&mut self, model: ModelId, parking: Parking) {
        let Parking { id, slot, tokens, base } = parking;
        let content = self.slot(model, slot).clone();
        assert_eq!(content.len(), tokens as usize, "all of a slot is parked");
        let (shared, tail) = content.split_at(parking.shared() as usize);
        self.parked_tokens += tail.len() as u64;
        let of_base = base.map_or(vec![], |base| self.content(model, base.id, base.tokens));
        assert_eq!(shared, of_base, "a cache is shared by those that begin like it");
        let mut checkpoints = self.checkpoints.remove(&(model, slot)).unwrap_or_default();
        if checkpoints.last() != Some(&tokens) {
            checkpoints.push(tokens);
        }
        let states = checkpoints.into_iter().map(|length| (length, ())).collect();
        let new = NewChain { base, tokens, tail: tail.to_vec(), states };
        self.parked.entry(model).or_default().add(id, new);
    }

    fn slot(&mut self, model: ModelId, slot: SlotId) -> &mut Vec<u32> {
        &mut self.slabs.get_mut(&(model, slot.slab)).unwrap().slots[slot.slot as usize]
    }

    /// Runs a span and adds the results of its rows.
    fn span(&mut self, model: ModelId, span: &Span, results: &mut Vec<RowResult>) {
        fake_plain::check(span);
        let mut awaiting = self.awaiting.remove(&model).unwrap_or_default();
        let poison = self.faults.poison;
        let capacity = self.slabs[&(model, span.slot.slab)].capacity as usize;
        let content = self.slot(model, span.slot);
        assert_eq!(content.len(), span.start as usize, "a span starts where the cache ends");
        content.extend(&span.tokens);
        assert!(content.len() <= capacity, "a span fits its slot");
        let poisoned = poison.is_some_and(|poison| content.contains(&poison));
        for output in &span.outputs {
            let seen = &content[..(span.start + output.row) as usize + 1];
            if output.want.awaits_mask() {
                awaiting.push(results.len());
            }
            results.push(match output.want {
                _ if poisoned => RowResult::NotFinite,
                Want::Sample(ref sample) => RowResult::Token(drawn(sample, seen), None),
                Want::Score { next, .. } => {
                    RowResult::Score(TokenLogprobs { chosen: (next, -1.0), top: vec![] })
                }
            });
        }
        self.awaiting.insert(model, awaiting);
    }
}

/// Returns the token after a context, or what a bias says that no other logit comes near.
fn drawn(sample: &Sample, context: &[u32]) -> u32 {
    let token = drawn_token(context, sample.temperature, sample.uniform);
    let edit = sample.edits.iter().find(|edit| edit.bias >= 1e4 || edit.token == token && edit.bias <= -1e4);
    edit.map_or(token, |edit| edit.token + u32::from(edit.bias < 0.0))
}

impl Backend for Fake {
    fn budget_bytes(&self) -> u64 {
        self.budget_bytes
    }

    fn plan(&self, spec: &LoadSpec, _: u64) -> Result<LoadPlan, Error> {
        self.pass_plan.iter().for_each(|pass| pass());
        let model = spec.model();
        if self.unsupported.contains(model) {
            return Err(Error::ModelUnsupported { model: model.clone(), why: "a test says so".into() });
        }
        let needed_bytes = self.weights.get(model).copied().unwrap_or(WEIGHT_BYTES);
        let kv_bytes = self.kv_reserve_bytes / if spec.formats.kv == KvDtype::Int8 { 2 } else { 1 };
        let mut spec = spec.clone();
        if spec.formats.dtype == ComputeDtype::Auto {
            spec.formats.dtype = ComputeDtype::Float32;
        }
        Ok(LoadPlan { spec, dequantize: false, needed_bytes, kv_bytes })
    }

    fn load(&mut self, plan: LoadPlan) -> Result<ModelId, Error> {
        self.models += 1;
        let id = ModelId(self.models);
        self.held.insert(id, plan.needed_bytes);
        self.names.insert(id, plan.spec.model().clone());
        self.note_peak();
        Ok(id)
    }

    fn load_more(&mut self, model: ModelId) -> Result<LoadStep, Error> {
        if self.hanging.contains(&self.names[&model]) {
            return Ok(LoadStep::Opening);
        }
        if let Some(available_bytes) = self.faults.short_of {
            return Ok(LoadStep::Short { available_bytes });
        }
        if self.pieces > 0 {
            self.pieces -= 1;
            self.pass_piece.iter().for_each(|pass| pass());
            let (done_bytes, total_bytes) = (0, self.held[&model]);
            return Ok(LoadStep::Reading { done_bytes, total_bytes });
        }
        self.is_reading = !self.is_reading;
        if self.is_reading {
            return Ok(LoadStep::Pending);
        }
        if self.faults.loads_fail {
            return Err(Error::Internal("the failed load that a test asked for".into()));
        }
        Ok(LoadStep::Ready(ModelShape {
            context_length: CONTEXT,
            vocabulary_size: 1000,
            kv_bytes_per_token: KV_BYTES,
            state_bytes: self.state_bytes,
            kv_layout: Arc::new(fake_plain::layout(self.state_bytes)),
            weight_bytes: self.held[&model],
            parameter_count: 250,
            prefill_tokens_min: 16,
            prepares_steps: true,
            computes_in: "fake".into(),
            content: ContentHash::fake(self.content),
        }))
    }

    fn unload(&mut self, model: ModelId) -> Result<(), Error> {
        assert!(self.held.remove(&model).is_some(), "the model is held");
        self.names.remove(&model);
        self.slabs.retain(|(of, _), _| *of != model);
        self.parked.remove(&model);
        self.results.remove(&model);
        self.awaiting.remove(&model);
        self.running.retain(|(of, _)| *of != model);
        Ok(())
    }

    fn open_slab(&mut self, model: ModelId, slab: u32, capacity: u32, slots: u32) -> Result<(), Error> {
        let bytes = |tokens: u32| u64::from(tokens) * KV_BYTES;
        if let Some(most) = self.faults.slab_tokens_max.filter(|&most| capacity * slots > most) {
            let (needed_bytes, available_bytes) = (bytes(capacity * slots), bytes(most));
            return Err(Error::KvShortage { needed_bytes, available_bytes });
        }
        let (needed_bytes, held) = (bytes(capacity * slots), self.kv_bytes(|_| true));
        if let Some(most) = self.faults.kv_bytes_max.filter(|&most| held + needed_bytes > most) {
            return Err(Error::KvShortage { needed_bytes, available_bytes: most.saturating_sub(held) });
        }
        let empty = Slab { capacity, slots: vec![vec![]; slots as usize] };
        assert!(self.slabs.insert((model, slab), empty).is_none(), "the slab is open");
        self.note_peak();
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
        self.cleared_tokens += u64::from(tokens);
        self.checkpoints.remove(&(model, slot));
        Ok(())
    }

    fn copy_slot(&mut self, model: ModelId, from: SlotId, to: SlotId, tokens: u32) -> Result<(), Error> {
        let content = self.slot(model, from)[..tokens as usize].to_vec();
        assert!(self.slot(model, to).is_empty(), "a copy goes into a clear slot");
        *self.slot(model, to) = content;
        let checkpoints = self.checkpoints.get(&(model, from)).cloned().unwrap_or_default();
        self.checkpoints.insert((model, to), checkpoints);
        Ok(())
    }

    fn truncate(
        &mut self,
        model: ModelId,
        slot: SlotId,
        held: u32,
        tokens: u32,
    ) -> Result<(), TruncateError> {
        let checkpoints = self.checkpoints.entry((model, slot)).or_default();
        let cut = tokens > 0 && tokens < held;
        if self.state_bytes > 0 && cut && !checkpoints.contains(&tokens) {
            return Err(TruncateError::NoCheckpoint { tokens });
        }
        checkpoints.retain(|&checkpoint| checkpoint <= tokens);
        let content = self.slot(model, slot);
        assert_eq!(content.len(), held as usize, "a slot is cut at its end");
        content.truncate(tokens as usize);
        Ok(())
    }

    fn checkpoint(&mut self, model: ModelId, slot: SlotId, tokens: u32) -> Result<(), Error> {
        assert_eq!(self.slot(model, slot).len(), tokens as usize, "a slot is checkpointed at its end");
        add_checkpoint(self.checkpoints.entry((model, slot)).or_default(), tokens);
        Ok(())
    }

    fn split_parked(&mut self, model: ModelId, at: Base) -> Result<(), Error> {
        if self.faults.splitting_fails {
            return Err(Error::Internal("the cut that a test does not make".into()));
        }
        let mut copied = 0;
        let cut = |content: &Vec<u32>, tokens| {
            copied = content.len();
            let (front, back) = content.split_at(tokens as usize);
            Ok::<_, Error>((front.to_vec(), back.to_vec()))
        };
        self.parked.get_mut(&model).unwrap().split(at, cut)?;
        self.parked_tokens += copied as u64;
        // The whole is freed after its parts were made.
        let held = self.kv_bytes(|_| true) + copied as u64 * KV_BYTES;
        self.kv_bytes_peak = self.kv_bytes_peak.max(held);
        Ok(())
    }

    fn park(&mut self, model: ModelId, parking: Parking) -> Result<(), Error> {
        if self.faults.parking_fails {
            return Err(Error::Internal("the cache that a test does not park".into()));
        }
        self.copy_out(model, parking);
        self.note_peak();
        Ok(())
    }

    fn park_slab(&mut self, model: ModelId, parking: Parking) -> Result<(), Error> {
        if self.faults.parking_fails {
            return Err(Error::Internal("the cache that a test does not park".into()));
        }
        self.copy_out(model, parking);
        self.close_slab(model, parking.slot.slab)
    }

    fn restore(&mut self, model: ModelId, restoring: Restoring) -> Result<(), Error> {
        let Restoring { id, tokens, slot, held, used } = restoring;
        let saved: Vec<u32> = self.parked[&model].states(id).map(|(length, ())| length).collect();
        assert!(self.state_bytes == 0 || saved.contains(&tokens), "a state is restored at a checkpoint");
        let there = self.content(model, id, held);
        let content = self.slot(model, slot);
        assert_eq!(content.len(), used as usize, "a slot has what is overwritten");
        assert_eq!(content[..held as usize], there, "a slot has what is not copied");
        let (mut content, mut kept) = (self.content(model, id, tokens), Vec::new());
        let reached = saved.into_iter().filter(|&length| length <= tokens);
        reached.for_each(|length| add_checkpoint(&mut kept, length));
        self.checkpoints.insert((model, slot), kept);
        if self.faults.restores_wrongly {
            content[tokens as usize - 1] += 1;
        }
        self.restored_tokens += u64::from(tokens.saturating_sub(held));
        *self.slot(model, slot) = content;
        Ok(())
    }

    fn drop_parked(&mut self, model: ModelId, parked: ParkedId) -> Result<(), Error> {
        let chains = self.parked.get_mut(&model).unwrap();
        let before = chains.len();
        chains.remove(parked);
        assert_eq!(chains.len() + 1, before, "there is such a parked cache");
        Ok(())
    }

    fn export(&self, model: ModelId, parked: ParkedId) -> Result<Vec<KvSegment>, Error> {
        let Some(chains) = self.parked.get(&model) else { return Ok(Vec::new()) };
        Ok(fake_plain::export(chains, parked, self.state_bytes))
    }

    fn import(&mut self, model: ModelId, importing: Importing) -> Result<(), ImportError> {
        let chains = self.parked.entry(model).or_default();
        self.imported_tokens += fake_plain::import(chains, importing, self.state_bytes)?;
        self.note_peak();
        Ok(())
    }

    fn kv_builder(&self) -> Arc<dyn BuildKv> {
        Arc::new(FakeBuilder)
    }

    fn launch(&mut self, model: ModelId, step: Step) -> Result<(), Error> {
        assert!(!self.results.contains_key(&model), "the last step was not collected");
        self.steps += 1;
        assert_ne!(self.faults.panic_at, Some(self.steps), "the panic that a test asked for");
        if self.faults.error_at == Some(self.steps) || std::mem::take(&mut self.faults.next_step_fails) {
            return Err(Error::Internal("the device error that a test asked for".into()));
        }
        assert!(step.spans.is_sorted_by_key(Span::order), "spans of one row come first, in slot order");
        let (rows, longer): (Vec<&Span>, Vec<&Span>) =
            step.spans.iter().partition(|span| span.tokens.len() == 1);
        let prefills = longer.iter().filter(|span| span.kind == SpanKind::Prefill);
        let prefilled: usize = prefills.map(|span| span.tokens.len()).sum();
        let counts = [prefilled, rows.len()].map(|count| u32::try_from(count).unwrap());
        self.running.push_back((model, counts));
        let mut results = Vec::new();
        step.spans.iter().for_each(|span| self.span(model, span, &mut results));
        self.results.insert(model, results);
        Ok(())
    }

    fn draw(&mut self, model: ModelId, masks: Vec<Option<TokenSet>>) -> Result<(), Error> {
        let awaiting = self.awaiting.remove(&model).unwrap_or_default();
        assert_eq!(awaiting.len(), masks.len(), "each row that waits is told what it may draw");
        let results = self.results.get_mut(&model).unwrap();
        for (place, mask) in awaiting.into_iter().zip(masks) {
            if let (RowResult::Token(token, _), Some(allowed)) = (&mut results[place], mask) {
                *token = among(*token, &allowed);
            }
        }
        Ok(())
    }

    fn collect(&mut self, model: ModelId) -> Result<Vec<RowResult>, Error> {
        assert!(self.awaiting.remove(&model).is_none_or(|rows| rows.is_empty()), "every row was drawn");
        // The device runs one step after another.
        while let Some((of, [prefilled, rows])) = self.running.pop_front() {
            self.pass.iter_mut().for_each(|pass| pass(prefilled, rows));
            if of == model {
                break;
            }
        }
        Ok(self.results.remove(&model).unwrap())
    }

    fn trim(&mut self) -> Result<(), Error> {
        Ok(())
    }

    fn memory(&self) -> DeviceMemory {
        DeviceMemory::default()
    }
}
