//! The backend on MLX: models by their id, each with its KV caches and the step that runs.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use mlx_rs::transforms::async_eval;
use mlx_rs::{Array, Device, DeviceType, Dtype, Stream, memory, ops, with_stream};

use crate::backend::{
    Backend, Base, BuildKv, DeviceInfo, DeviceMemory, ImportError, Importing, KernelChoice, KvSegment,
    LoadPlan, LoadSpec, LoadStep, ModelId, ModelShape, ParkedId, Parking, Restoring, RowResult, SlotId, Step,
    TokenSet, TruncateError, WiredLimit,
};
use crate::device::leaving::Leaving;
use crate::device::machine::{self, Share};
use crate::device::opening::Opening;
use crate::device::plan;
use crate::device::running::Running;
use crate::error::Error;
use crate::mlx::batch::{Batch, StepShape};
use crate::mlx::dim;
use crate::mlx::ffi::{self, DeviceFact};
use crate::mlx::kernels::{self, KernelSet, Selection};
use crate::mlx::kv::{ArrayBuilder, Kv};
use crate::mlx::tensors::{Policy, TensorCursor, bytes_of};
use crate::models::{self, Loading, Model};
use crate::priority;

/// Limit of freed buffers that MLX caches for reuse; more would look like a leak beside the budget.
const CACHE_LIMIT_BYTES: usize = 128 << 20;

/// The same on GPUs, where one layer's matrix that is dequantized for a prefill takes hundreds of megabytes.
const GPU_CACHE_LIMIT_BYTES: usize = 1 << 30;

/// MLX on this thread.
pub struct MlxBackend {
    kernels: Selection,
    /// Bytes of freed buffers that MLX keeps.
    cache_limit: u64,
    wired_limit: WiredLimit,
    /// What is wired now.
    wired_bytes: u64,
    models: BTreeMap<ModelId, Entry>,
    model_next: u32,
    streams: LoadStreams,
    /// What the load streams compute last of loads that were given up.
    fences: Vec<Array>,
    leaving: Leaving,
}

/// Where models are read, apart from the stream of their steps: MLX has a thread for each. Made once, since
/// MLX never ends one; where a core is wanted by both, the steps come first.
struct LoadStreams {
    /// Reads files, which only a CPU does.
    files: Stream,
    /// Makes weights of what was read.
    weights: Stream,
}

enum Entry {
    Loading(Box<LoadingModel>),
    Ready(Box<ReadyModel>),
}

struct LoadingModel {
    plan: LoadPlan,
    policy: Policy,
    loader: Box<dyn Loading>,
    weights: TensorCursor,
    opening: Opening,
    /// Whether the system would give the memory.
    is_paid: bool,
    /// Number of pieces taken.
    done: u64,
}

struct ReadyModel {
    model: Box<dyn Model>,
    kv: Kv,
    /// The set that attends over `kv`, and the layout that it takes.
    attention: KernelSet,
    step_shape: StepShape,
    /// Number of tokens; logits beyond are those of rows that only pad the embedding.
    vocabulary: i32,
    running: Option<Running>,
}

impl MlxBackend {
    /// Takes MLX into use on this thread.
    ///
    /// # Errors
    /// MLX does not work here, or the machine does not have the `kernels`.
    pub fn new(kernels: KernelChoice, wired_limit: WiredLimit) -> Result<(Self, DeviceInfo), Error> {
        // mlx-c's own error handler ends the process; mlx-rs puts its own in place at the first checked op.
        ops::zeros_dtype(&[1], Dtype::Float32)?.eval()?;
        let on_cpu = matches!(Device::try_default()?.get_type()?, DeviceType::Cpu);
        let selection = kernels::select(kernels, on_cpu)?;
        let cache_limit = if on_cpu { CACHE_LIMIT_BYTES } else { GPU_CACHE_LIMIT_BYTES };
        memory::set_cache_limit(cache_limit)?;
        if on_cpu {
            // The cores, or as many as a control group's quota is worth.
            ffi::limit_threads(std::thread::available_parallelism().map_or(1, std::num::NonZero::get));
        }
        let name = match ffi::device_fact("device_name") {
            Some(DeviceFact::Text(name)) if !on_cpu => name,
            _ => if on_cpu { "cpu" } else { "gpu" }.to_owned(),
        };
        let info = DeviceInfo {
            device: name,
            mlx_version: ffi::mlx_version(),
            memory_bytes: device_memory(on_cpu),
            architectures: models::model_types(),
        };
        let available = selection.available().join(" ");
        tracing::info!(device = %info.device, mlx = %info.mlx_version, kernels = kernels.as_str(), available);
        let files = priority::in_background(|| {
            let files = Stream::new_with_device(&Device::cpu());
            // Its thread begins with its first operation.
            with_stream(&files, || ops::zeros_dtype(&[1], Dtype::Float32)?.eval())?;
            Ok::<_, Error>(files)
        })?;
        let weights = if on_cpu { files.clone() } else { Stream::new_with_device(&Device::try_default()?) };
        let streams = LoadStreams { files, weights };
        let backend = Self {
            kernels: selection,
            cache_limit: cache_limit as u64,
            wired_limit,
            wired_bytes: 0,
            models: BTreeMap::new(),
            model_next: 0,
            streams,
            fences: Vec::new(),
            leaving: Leaving::default(),
        };
        Ok((backend, info))
    }

    /// Wires the weights of all models where that is configured and safe, and nothing else: when one has been
    /// loaded or unloaded.
    fn wire(&mut self) {
        let (Some(working_set), Some(memory)) = (working_set(), device_memory(self.kernels.on_cpu)) else {
            return;
        };
        let weights = self.models.values().map(|entry| match entry {
            Entry::Ready(ready) => bytes_of(ready.model.arrays()),
            Entry::Loading(_) => 0,
        });
        let limit = machine::wired_bytes(self.wired_limit, weights.sum(), working_set, memory).unwrap_or(0);
        if limit == self.wired_bytes {
            return;
        }
        match usize::try_from(limit).map(memory::set_wired_limit) {
            Ok(Ok(_)) => {
                tracing::info!(limit, "the weights are wired");
                self.wired_bytes = limit;
            }
            failed => tracing::warn!(?failed, limit, "the weights are not wired"),
        }
    }

    /// Returns whether something of an unloaded model is still being freed, or read where it was loading.
    pub(super) fn is_leaving(&mut self) -> Result<bool, Error> {
        for fence in &self.fences {
            if !ffi::is_available(fence)? {
                return Ok(true);
            }
        }
        self.fences.clear();
        Ok(self.leaving.is_busy())
    }

    /// Frees something on a thread of its own where that takes long: on a CPU.
    pub(super) fn free(&mut self, held: impl Send + 'static) {
        if self.kernels.on_cpu {
            self.leaving.free(held);
        }
    }

    /// Returns freed buffers that MLX caches to the system: at once on a GPU.
    fn empty_cache(&self) -> Result<(), Error> {
        if self.kernels.on_cpu {
            self.leaving.empty_cache();
            return Ok(());
        }
        Ok(memory::clear_cache()?)
    }

    /// Notes what the load streams have to do before another load may use them: a piece that was begun is
    /// read to its end.
    fn fence(&mut self) -> Result<(), Error> {
        let zero = |on: &Stream| with_stream(on, || ops::zeros_dtype(&[1], Dtype::Float32));
        self.fences = vec![zero(&self.streams.files)?, zero(&self.streams.weights)?];
        Ok(async_eval(&self.fences)?)
    }

    /// Returns the bytes of `wanted` that the device has, as far as it tells.
    fn free_bytes(&self, wanted: u64) -> u64 {
        if self.kernels.on_cpu {
            return ffi::available(wanted);
        }
        let size = device_size("total_memory").or(device_size("memory_size")).unwrap_or(0);
        size.saturating_sub(self.memory().active).min(wanted)
    }

    fn ready(&mut self, model: ModelId) -> Result<&mut ReadyModel, Error> {
        match self.models.get_mut(&model) {
            Some(Entry::Ready(ready)) => Ok(ready),
            Some(Entry::Loading(_)) | None => Err(Error::Internal(format!("model {model:?} is not ready"))),
        }
    }
}

fn no_step() -> Error {
    Error::Internal("no step runs".into())
}

/// Returns what the system would give of `bytes`, where it is less: on the CPU, MLX does not ask.
fn shortage(kernels: Selection, bytes: u64) -> Option<u64> {
    let available = if kernels.on_cpu { ffi::available(bytes) } else { bytes };
    Some(available).filter(|available| *available < bytes)
}

/// Returns a size that the device reports, in bytes.
fn device_size(key: &str) -> Option<u64> {
    match ffi::device_fact(key) {
        Some(DeviceFact::Size(size)) if size > 0 => Some(size),
        _ => None,
    }
}

/// Returns the working set that Metal recommends, or that the owner allows it with `iogpu.wired_limit_mb`.
/// That may change at any time; MLX reads its own number once.
fn working_set() -> Option<u64> {
    let recommended = device_size("max_recommended_working_set_size")?;
    Some(ffi::wired_limit_bytes().unwrap_or(recommended))
}

/// Returns the bytes of memory that models may be in.
fn device_memory(on_cpu: bool) -> Option<u64> {
    if on_cpu { cpu_memory() } else { device_size("total_memory").or(device_size("memory_size")) }
}

/// Returns the bytes that a process on the CPU may use.
fn cpu_memory() -> Option<u64> {
    machine::memory_bytes(Path::new("/")).into_iter().chain(ffi::address_limit()).min()
}

impl Backend for MlxBackend {
    fn budget_bytes(&self) -> u64 {
        let DeviceMemory { active, cache, .. } = self.memory();
        // What is free on a GPU of its own, and what this process has of it.
        let free = device_size("free_memory").map(|free| free + active + cache);
        let share = Share { recommended: working_set(), free, memory: device_memory(self.kernels.on_cpu) };
        machine::budget(share, self.cache_limit)
    }

    fn plan(&self, spec: &LoadSpec, free_bytes: u64) -> Result<LoadPlan, Error> {
        plan::plan(spec, self.kernels, free_bytes)
    }

    fn load(&mut self, plan: LoadPlan) -> Result<ModelId, Error> {
        let files = plan.spec.files();
        let policy = plan::policy(&plan, self.kernels);
        let loader = plan::open(&plan.spec, policy)?;
        if let Some(warning) = &files.weights.warning {
            tracing::warn!(model = %files.name, "{warning}");
        }
        let opening = Opening::new(&plan.spec.assets)?;
        let mut weights = TensorCursor::new(&files.name, policy);
        if let Some(quantizing) = plan::quantizing(&plan, loader.layers(), &self.streams.files) {
            weights.quantize(quantizing);
        }
        let id = ModelId(self.model_next);
        self.model_next += 1;
        let loading = LoadingModel { plan, policy, loader, weights, opening, is_paid: false, done: 0 };
        self.models.insert(id, Entry::Loading(Box::new(loading)));
        Ok(id)
    }

    fn load_more(&mut self, model: ModelId) -> Result<LoadStep, Error> {
        let is_leaving = self.is_leaving()?;
        let Some(Entry::Loading(loading)) = self.models.get_mut(&model) else {
            return Err(Error::Internal(format!("model {model:?} is not loading")));
        };
        let LoadingModel { plan, policy, loader, weights, opening, is_paid, done } = &mut **loading;
        if !opening.is_done() {
            if let Some((file, is_spare)) = opening.take()? {
                weights.add(file, is_spare, &self.streams.files)?;
            }
            return Ok(LoadStep::Opening);
        }
        if is_leaving {
            return Ok(LoadStep::Pending);
        }
        if !*is_paid && let Some(available_bytes) = shortage(self.kernels, plan.reserved_bytes()) {
            return Ok(LoadStep::Short { available_bytes });
        }
        *is_paid = true;
        if weights.is_reading()? {
            return Ok(LoadStep::Pending);
        }
        // Both have come to rest; a failed read is told only here.
        ffi::synchronize(&self.streams.files)?;
        ffi::synchronize(&self.streams.weights)?;
        let facts = &plan.spec.files().facts;
        let Some(ready) = with_stream(&self.streams.weights, || loader.next(weights))? else {
            *done += 1;
            let pieces = loader.pieces() as u64;
            let done_bytes = facts.file_bytes / pieces * *done;
            return Ok(LoadStep::Reading { done_bytes, total_bytes: facts.file_bytes });
        };
        let kv = Kv::new(loader.kv_shape());
        let attention = policy.kernels.for_cache(kv.shape());
        let step_shape = attention.step_shape(kv.shape());
        let shape = ModelShape {
            context_length: facts.context_length,
            vocabulary_size: plan.spec.assets.vocabulary_size,
            kv_bytes_per_token: kv.shape().bytes_per_token(),
            state_bytes: kv.shape().bytes_per_sequence(),
            kv_layout: Arc::new(kv.shape().layout()?),
            weight_bytes: bytes_of(ready.arrays()),
            parameter_count: weights.parameters(),
            prefill_tokens_min: policy.kernels.prefill_tokens_min(),
            prepares_steps: !self.kernels.on_cpu,
            computes_in: plan::computes_in(plan),
            content: opening.content(),
        };
        let (of, kernels, attends) = (plan.spec.model(), policy.kernels.name(), attention.name());
        tracing::info!(model = %of, kernels, attention = attends, computes_in = shape.computes_in, "kernels");
        let vocabulary = dim(shape.vocabulary_size);
        let ready = ReadyModel { model: ready, kv, attention, step_shape, vocabulary, running: None };
        self.models.insert(model, Entry::Ready(Box::new(ready)));
        self.empty_cache()?;
        self.wire();
        Ok(LoadStep::Ready(shape))
    }

    fn unload(&mut self, model: ModelId) -> Result<(), Error> {
        match self.models.remove(&model) {
            Some(Entry::Ready(ready)) => {
                let ReadyModel { model, kv, .. } = *ready;
                self.free((model, kv));
                self.wire();
            }
            Some(Entry::Loading(loading)) => {
                let LoadingModel { loader, weights, .. } = *loading;
                self.fence()?;
                self.free((loader, weights.into_arrays()));
            }
            None => {}
        }
        self.empty_cache()
    }

    fn open_slab(&mut self, model: ModelId, slab: u32, capacity: u32, slots: u32) -> Result<(), Error> {
        let shape = self.ready(model)?.kv.shape();
        let slot_bytes = u64::from(capacity) * shape.bytes_per_token() + shape.bytes_per_sequence();
        let needed_bytes = slot_bytes.saturating_mul(slots.into());
        let refusal = |available_bytes| Error::KvShortage { needed_bytes, available_bytes };
        if shortage(self.kernels, needed_bytes).is_some() {
            // The request would end, though what it needs is about to be free.
            self.leaving.wait();
            if let Some(available_bytes) = shortage(self.kernels, needed_bytes) {
                return Err(refusal(available_bytes));
            }
        }
        let opened = self.ready(model)?.kv.open(slab, capacity, slots);
        opened.map_err(|error| {
            tracing::warn!(%error, "MLX did not allocate a KV slab");
            refusal(self.free_bytes(needed_bytes))
        })
    }

    fn close_slab(&mut self, model: ModelId, slab: u32) -> Result<(), Error> {
        // To unmap a large slab takes as long as a step or two.
        let closed = self.ready(model)?.kv.close(slab);
        self.free(closed);
        self.empty_cache()
    }

    fn clear_slot(&mut self, model: ModelId, slot: SlotId, tokens: u32) -> Result<(), Error> {
        Ok(self.ready(model)?.kv.clear(slot, tokens)?)
    }

    fn copy_slot(&mut self, model: ModelId, from: SlotId, to: SlotId, tokens: u32) -> Result<(), Error> {
        Ok(self.ready(model)?.kv.copy(from, to, tokens)?)
    }

    fn truncate(
        &mut self,
        model: ModelId,
        slot: SlotId,
        held: u32,
        tokens: u32,
    ) -> Result<(), TruncateError> {
        let cut = self.ready(model)?.kv.truncate(slot, held, tokens).map_err(Error::from)?;
        if cut { Ok(()) } else { Err(TruncateError::NoCheckpoint { tokens }) }
    }

    fn checkpoint(&mut self, model: ModelId, slot: SlotId, tokens: u32) -> Result<(), Error> {
        Ok(self.ready(model)?.kv.checkpoint(slot, tokens)?)
    }

    fn split_parked(&mut self, model: ModelId, at: Base) -> Result<(), Error> {
        Ok(self.ready(model)?.kv.split_parked(at)?)
    }

    fn park(&mut self, model: ModelId, parking: Parking) -> Result<(), Error> {
        Ok(self.ready(model)?.kv.park(parking)?)
    }

    fn park_slab(&mut self, model: ModelId, parking: Parking) -> Result<(), Error> {
        self.ready(model)?.kv.park_slab(parking)?;
        if let Err(error) = self.empty_cache() {
            self.ready(model)?.kv.drop_parked(parking.id);
            return Err(error);
        }
        Ok(())
    }

    fn restore(&mut self, model: ModelId, restoring: Restoring) -> Result<(), Error> {
        Ok(self.ready(model)?.kv.restore(restoring)?)
    }

    fn drop_parked(&mut self, model: ModelId, parked: ParkedId) -> Result<(), Error> {
        self.ready(model)?.kv.drop_parked(parked);
        Ok(())
    }

    fn export(&self, model: ModelId, parked: ParkedId) -> Result<Vec<KvSegment>, Error> {
        match self.models.get(&model) {
            Some(Entry::Ready(ready)) => Ok(ready.kv.export(parked)?),
            Some(Entry::Loading(_)) | None => Err(Error::Internal(format!("model {model:?} is not ready"))),
        }
    }

    fn import(&mut self, model: ModelId, importing: Importing) -> Result<(), ImportError> {
        self.ready(model)?.kv.import(importing)
    }

    fn kv_builder(&self) -> Arc<dyn BuildKv> {
        Arc::new(ArrayBuilder)
    }

    fn launch(&mut self, model: ModelId, step: Step) -> Result<(), Error> {
        let ready = self.ready(model)?;
        assert!(ready.running.is_none(), "a step is launched before the last one was collected");
        let batch = Batch::new(&step, &ready.step_shape);
        let logits = ready.model.forward(&batch, &mut ready.kv, ready.attention)?;
        let changed = (ready.vocabulary, batch.slabs);
        ready.running = Some(Running::launch(step, logits, changed, &ready.kv)?);
        Ok(())
    }

    fn draw(&mut self, model: ModelId, masks: Vec<Option<TokenSet>>) -> Result<(), Error> {
        let running = self.ready(model)?.running.as_mut();
        Ok(running.ok_or_else(no_step)?.draw(masks)?)
    }

    fn collect(&mut self, model: ModelId) -> Result<Vec<RowResult>, Error> {
        let ready = self.ready(model)?;
        ready.running.take().ok_or_else(no_step)?.collect(&ready.kv)
    }

    fn trim(&mut self) -> Result<(), Error> {
        // Forgets what has gone.
        self.is_leaving()?;
        self.empty_cache()?;
        // On a CPU the thread that empties the cache does it.
        if !self.kernels.on_cpu {
            ffi::trim_heap();
        }
        Ok(())
    }

    fn memory(&self) -> DeviceMemory {
        let count = |bytes: Result<usize, _>| bytes.map_or(0, |bytes: usize| bytes as u64);
        DeviceMemory {
            active: count(memory::active_memory().map_err(drop)),
            peak: count(memory::peak_memory().map_err(drop)),
            cache: count(memory::cache_memory().map_err(drop)),
        }
    }
}
