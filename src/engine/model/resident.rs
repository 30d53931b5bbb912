//! The state of a resident model, its byte account, and its description.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::SystemTime;

use crate::backend::{CHECKPOINTS_MAX, LoadSpec, ModelId, ModelShape, SpanKind};
use crate::cache::{Parked, Rank, Slots};
use crate::clock::{Clock, Moment};
use crate::engine::api::ResidentModel;
use crate::engine::task::Sequence;
use crate::residency::{Lifetime, ResidencySettings, Tenancy, Tenant};
use crate::sched::{Claims, Pace, Queue, Shares, Turns};

/// A model that runs.
pub(crate) struct Resident {
    pub(crate) id: ModelId,
    pub(crate) spec: LoadSpec,
    pub(crate) tenancy: Tenancy,
    pub(crate) shape: ModelShape,
    pub(crate) queue: Queue<Sequence>,
    pub(crate) running: BTreeMap<u64, Sequence>,
    pub(crate) shares: Shares,
    pub(super) turns: Turns,
    pub(crate) slots: Slots,
    pub(super) parked: Parked,
    pub(super) pace: Pace,
    /// Time until which no sequence that has begun is started again, since the device had no memory for one.
    pub(super) denied_until: Option<Moment>,
    /// The step that runs.
    pub(super) launched: Option<Launched>,
    pub(super) last_used: SystemTime,
    loaded: SystemTime,
    pub(crate) lifetime: Lifetime,
}

/// A step that runs.
pub(super) struct Launched {
    pub(super) spans: Vec<LaunchedSpan>,
    /// Time of the launch.
    pub(super) at: Moment,
    /// Its number on the device.
    pub(super) step: u64,
    /// Whether the device ran something besides, so that its time tells nothing.
    pub(super) disturbed: bool,
}

/// A span of the step that runs.
#[derive(Clone, Copy)]
pub(super) struct LaunchedSpan {
    pub(super) sequence: u64,
    pub(super) kind: SpanKind,
    /// Number of its tokens.
    pub(super) tokens: u32,
    /// Number of its rows with an output.
    pub(super) outputs: usize,
    /// Number of those that are drawn by a grammar, all by the same one.
    pub(super) masks: usize,
}

impl Resident {
    /// Returns the model without sequences or slabs.
    pub(crate) fn new(
        id: ModelId,
        spec: LoadSpec,
        shape: ModelShape,
        (loaded, lifetime): (SystemTime, Lifetime),
    ) -> Self {
        let slots = Slots::new(shape.context_length, shape.kv_bytes_per_token, shape.state_bytes);
        let parked = Parked::new(shape.kv_bytes_per_token, shape.state_bytes);
        Self {
            id,
            tenancy: Tenancy::new(Arc::clone(&spec.assets)),
            spec,
            shape,
            queue: Queue::default(),
            running: BTreeMap::new(),
            shares: Shares::default(),
            turns: Turns::default(),
            slots,
            parked,
            pace: Pace::default(),
            denied_until: None,
            launched: None,
            last_used: loaded,
            loaded,
            lifetime,
        }
    }

    /// Returns the number of waiting requests.
    pub(crate) fn queued(&self) -> u32 {
        u32::try_from(self.queue.len()).unwrap_or(u32::MAX)
    }

    /// Returns the number of running sequences.
    pub(crate) fn running(&self) -> u32 {
        u32::try_from(self.running.len()).unwrap_or(u32::MAX)
    }

    /// Returns whether nothing waits or runs.
    pub(crate) fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.running.is_empty() && self.launched.is_none()
    }

    /// Notes that the device runs something besides the step that runs.
    pub(crate) fn disturb(&mut self) {
        self.launched.iter_mut().for_each(|launched| launched.disturbed = true);
    }

    /// Returns the number of calls that use it, those that have not reached the engine included.
    pub(crate) fn users(&self) -> u32 {
        self.tenancy.leases()
    }

    /// Returns whether a call uses it, or a step of it runs.
    pub(crate) fn is_in_use(&self) -> bool {
        self.users() > 0 || !self.is_idle()
    }

    /// Returns whether it may be evicted.
    pub(crate) fn is_evictable(&self, settings: &ResidencySettings) -> bool {
        !self.is_in_use() && !self.is_pinned(settings)
    }

    /// Returns whether it stays whatever happens.
    pub(crate) fn is_pinned(&self, settings: &ResidencySettings) -> bool {
        self.lifetime.is_pinned(self.spec.model(), settings)
    }

    /// Returns whether calls that came after a time keep it in use, and none that came before.
    pub(crate) fn is_kept_by_later_than(&self, time: Moment) -> bool {
        let mut sequences = self.running.values().chain(self.queue.values());
        !self.running.is_empty() && sequences.all(|sequence| sequence.origin.arrived > time)
    }

    /// Returns it as the policy sees it.
    pub(crate) fn tenant(&self, settings: &ResidencySettings) -> Tenant {
        let model = self.spec.model();
        Tenant {
            model: model.clone(),
            formats: self.spec.formats,
            computes_in: self.shape.computes_in.clone(),
            bytes: self.bytes() + self.promised_bytes(),
            empty_bytes: self.slots.empty_bytes(),
            parked_bytes: self.parked.bytes(),
            users: self.users().max(u32::from(self.is_in_use())),
            pinned: self.is_pinned(settings),
            used: self.lifetime.used(),
            expires: self.lifetime.expires(model, settings),
        }
    }

    /// Ends the tenancy of an idle model; returns what the backend is to free.
    ///
    /// # Errors
    /// The model itself, while somebody uses it.
    pub(crate) fn retire(self) -> Result<ModelId, Box<Self>> {
        if !self.is_idle() {
            return Err(Box::new(self));
        }
        match self.tenancy.retire() {
            Ok(()) => Ok(self.id),
            Err(tenancy) => Err(Box::new(Self { tenancy, ..self })),
        }
    }

    /// Returns the bytes it holds: weights, slabs, parked caches.
    pub(crate) fn bytes(&self) -> u64 {
        self.shape.weight_bytes + self.slots.bytes() + self.parked.bytes()
    }

    /// Returns the bytes that its running sequences may still come to need.
    pub(crate) fn promised_bytes(&self) -> u64 {
        let growth = |sequence: &Sequence| {
            let capacity = sequence.slot.map_or(0, |slot| self.slots.capacity_of(slot));
            self.growth_bytes(sequence, capacity)
        };
        self.running.values().map(growth).sum()
    }

    /// Returns the reclaimable bytes: parked caches and empty slabs.
    pub(crate) fn reclaimable_bytes(&self) -> u64 {
        self.parked.bytes() + self.slots.empty_bytes()
    }

    /// Returns the bytes of the largest cache that a sequence of the running step may leave.
    pub(crate) fn parking_bytes(&self) -> u64 {
        let computed = self.running.values().map(|sequence| sequence.computed).max().unwrap_or(0);
        let state_bytes = self.shape.state_bytes * (CHECKPOINTS_MAX as u64 + 1);
        (u64::from(computed) + 1) * self.shape.kv_bytes_per_token + state_bytes
    }

    /// Returns the place in the order of eviction of the parked cache that goes first.
    pub(crate) fn first_to_go(&self) -> Option<(Rank, Moment)> {
        self.parked.first_to_go()
    }

    /// Returns the bytes of the slot that a sequence moves to when it outgrows one of `capacity`, and of its
    /// checkpoints. It moves once, to a slot for all that it may come to hold.
    pub(super) fn growth_bytes(&self, sequence: &Sequence, capacity: u32) -> u64 {
        let finally = sequence.tokens_max().min(self.shape.context_length);
        let slot = if finally > capacity { self.slots.slot_bytes(finally) } else { 0 };
        slot + self.checkpoint_bytes()
    }

    /// Returns the bytes of the checkpoints that a running sequence may have.
    pub(super) fn checkpoint_bytes(&self) -> u64 {
        self.shape.state_bytes * CHECKPOINTS_MAX as u64
    }

    /// Returns what a request waits for that only those may pass which started before the sequence
    /// `passed_from`. A slab is held until the last of its sequences ends.
    pub(crate) fn claims(&self, passed_from: u64) -> Claims {
        let mut claims = Claims::default();
        for (&id, sequence) in &self.running {
            if id < passed_from {
                claims.tokens_left = claims.tokens_left.max(sequence.draws_left());
            } else {
                let capacity = sequence.slot.map_or(0, |slot| self.slots.capacity_of(slot));
                claims.passed_bytes += self.growth_bytes(sequence, capacity);
            }
        }
        let slabs = self.passed_slabs(passed_from);
        claims.passed_bytes += slabs.into_iter().map(|slab| self.slots.bytes_of(slab)).sum::<u64>();
        claims
    }

    /// Returns the slabs with sequences from the number `passed_from` on.
    pub(super) fn passed_slabs(&self, passed_from: u64) -> BTreeSet<u32> {
        let passed = self.running.range(passed_from..);
        passed.filter_map(|(_, sequence)| sequence.slot).map(|slot| slot.slab).collect()
    }

    /// Returns its description for callers.
    pub(crate) fn describe(&self, settings: &ResidencySettings, clock: &dyn Clock) -> ResidentModel {
        let (model, now) = (self.spec.model(), clock.now());
        let mut lifetime = self.lifetime;
        if self.is_in_use() {
            lifetime.touch(now);
        }
        let left = lifetime.expires(model, settings).map(|expires| expires - now);
        let count = |condition: fn(&Sequence) -> bool| {
            let meeting = self.running.values().filter(|sequence| condition(sequence)).count();
            u32::try_from(meeting).unwrap_or(u32::MAX)
        };
        ResidentModel {
            model: model.clone(),
            revision: self.spec.files().revision.clone(),
            computes_in: self.shape.computes_in.clone(),
            parameter_count: self.shape.parameter_count,
            weight_bytes: self.shape.weight_bytes,
            kv_slab_bytes: self.slots.bytes(),
            kv_idle_bytes: self.parked.recounted_bytes(),
            kv_bytes_per_token: self.shape.kv_bytes_per_token,
            kv_reserved_bytes: self.promised_bytes(),
            running_sequences: self.running(),
            prefilling_sequences: count(Sequence::is_prefilling),
            stalled_sequences: count(Sequence::is_paused),
            queued_sequences: self.queued(),
            loaded: self.loaded,
            last_used: self.last_used,
            pinned: lifetime.is_pinned(model, settings),
            keep_alive: lifetime.keep_alive(model, settings),
            expires: left.and_then(|left| clock.wall().checked_add(left)),
            path: self.spec.files().folder.clone(),
            slabs: self.slots.classes(),
        }
    }
}
