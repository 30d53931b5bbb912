//! Caches that go to disk and come back, on request: the ledger makes room for them, as far as nobody waits
//! for memory.

use super::api::{AdoptWork, ExportAsk, KvCopy, KvRoom, RoomAsk};
use super::core::Engine;
use super::model::{Adoption, Resident};
use crate::backend::Backend;
use crate::error::Error;

impl<B: Backend> Engine<B> {
    /// Returns room for what a snapshot has and no cache. Older caches go for it, but there is none while a
    /// request or a load waits for memory.
    pub(super) fn room_to_restore(&mut self, ask: &RoomAsk) -> Option<KvRoom> {
        let RoomAsk { of, saved, bytes } = ask;
        // What is being read cannot be given up.
        if self.waits_for_memory() {
            return None;
        }
        let cached = |engine: &Self| Some(engine.models.get(&of.model)?.cached(of).tokens);
        if cached(self)? >= *saved || *bytes > self.room(&of.model).idle_bytes_max {
            return None;
        }
        self.free_for_cache(*bytes).ok()?;
        let facts = self.models.get(&of.model)?.kv_facts(&self.backend);
        Some(KvRoom { cached: cached(self)?, facts, charge: self.saving.charge(*bytes) })
    }

    /// Frees bytes for a cache that comes back.
    ///
    /// # Errors
    /// There are not enough, or a request waits for them.
    fn free_for_cache(&mut self, needed_bytes: u64) -> Result<(), Error> {
        let reclaimable: u64 = self.models.values().map(Resident::reclaimable_bytes).sum();
        let available_bytes = self.memory().free_bytes() + reclaimable;
        let missing = self.memory().missing_bytes(needed_bytes);
        let refusal = Error::KvShortage { needed_bytes, available_bytes };
        if needed_bytes > available_bytes || (missing > 0 && self.blocked.is_some()) {
            return Err(refusal);
        }
        self.give_back(missing, None);
        if self.memory().missing_bytes(needed_bytes) > 0 { Err(refusal) } else { Ok(()) }
    }

    /// Returns what is cached of a session as plain data; none if there is nothing to save.
    ///
    /// # Errors
    /// The budget has no room for it until it is written, or the device failed.
    pub(super) fn export(&mut self, ask: &ExportAsk) -> Result<Option<KvCopy>, Error> {
        let waits = self.waits_for_memory();
        let Some((resident, mut cx)) = self.parts_of(&ask.of.model) else { return Ok(None) };
        if waits {
            cx.bytes_max = 0;
        }
        resident.export(&mut cx, ask)
    }

    /// Returns whether a request or a load waits for memory: what is free is theirs.
    fn waits_for_memory(&self) -> bool {
        self.blocked.is_some() || self.load_waits.is_some()
    }

    /// Parks a cache that was read from disk. Returns the bytes that it took.
    ///
    /// # Errors
    /// There is no room for it, what it continues is gone, or it is not a cache of the model.
    pub(super) fn adopt(&mut self, mut work: AdoptWork) -> Result<u64, Error> {
        // The room that was held for it is its own now.
        work.charge.release();
        self.saving.settle();
        let model = work.model.model().clone();
        let needed_bytes = self.adoption(&work)?.1;
        let available_bytes = self.room(&model).idle_bytes_max;
        if needed_bytes > available_bytes {
            return Err(Error::KvShortage { needed_bytes, available_bytes });
        }
        self.free_for_cache(needed_bytes)?;
        // What it continues may have gone for it.
        let (adoption, needed_bytes) = self.adoption(&work)?;
        if self.memory().missing_bytes(needed_bytes) > 0 {
            return Err(Error::KvShortage { needed_bytes, available_bytes: 0 });
        }
        let Some((resident, mut cx)) = self.parts_of(&model) else { return Err(Error::ModelUnloaded(model)) };
        match resident.adopt(&mut cx, work, adoption) {
            Ok(adopted) => adopted.map(|()| adoption.bytes),
            Err(error) => {
                self.lose(&model, &error);
                Err(error)
            }
        }
    }

    /// Returns how a cache would be parked, and the bytes that have to be free for that.
    fn adoption(&self, work: &AdoptWork) -> Result<(Adoption, u64), Error> {
        let granted = |resident: &&Resident| resident.tenancy.granted(&work.model);
        let resident = self.models.get(work.model.model()).filter(granted);
        let resident = resident.ok_or_else(|| Error::ModelUnloaded(work.model.model().clone()))?;
        let adoption = resident.adoption(work)?;
        Ok((adoption, adoption.bytes + adoption.copied_bytes))
    }
}
