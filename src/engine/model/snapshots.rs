//! What of a model's parked caches goes to disk and comes back: caches of sessions are handed over when they
//! are evicted, if that is worth it and the ledger has room for them until they are written; and those that
//! were read are parked.

use std::sync::Arc;

use super::{Context, Resident};
use crate::backend::{Backend, Base, Importing, KvSegment, ParkedId};
use crate::cache::{CacheEntry, CacheKey, Cut, Rank, Transcript};
use crate::clock::Moment;
use crate::count::count;
use crate::engine::api::{AdoptWork, CachedAsk, ExportAsk, KvCopy, KvFacts};
use crate::error::Error;
use crate::sched::is_worth_saving;

/// How a cache that was read is parked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Adoption {
    /// What it shares.
    cut: Option<Cut>,
    /// Bytes that it adds.
    pub(crate) bytes: u64,
    /// Bytes that it copies besides, for a moment.
    pub(crate) copied_bytes: u64,
}

impl Resident {
    /// Returns what its caches are.
    pub(crate) fn kv_facts<B: Backend>(&self, backend: &B) -> KvFacts {
        KvFacts {
            model: self.spec.model().clone(),
            revision: self.spec.files().revision.clone(),
            // With what was loaded: the revision of a folder tells its files by sizes and times only.
            computes: format!(
                "{} {} {:?} {}",
                self.spec.model(),
                self.shape.computes_in,
                self.spec.formats,
                self.shape.content
            ),
            layout: Arc::clone(&self.shape.kv_layout),
            builder: backend.kv_builder(),
        }
    }

    /// Drops evicted caches. Those of sessions are handed over first, as far as the budget has room for them.
    pub(super) fn drop_evicted<B: Backend>(
        &mut self,
        cx: &mut Context<'_, B>,
        evicted: &[CacheEntry],
    ) -> Result<(), Error> {
        for cache in evicted {
            let spare_bytes = cx.bytes_max.saturating_sub(self.bytes() + self.promised_bytes());
            // A request that waits for memory gets what is freed.
            if cx.blocked.is_none() {
                let charged = self.hand_over(cx, cache, spare_bytes);
                cx.bytes_max -= charged;
            }
        }
        self.drop_parked(cx, evicted.iter().map(|cache| cache.id))
    }

    /// Evicts parked caches of at least `bytes`; those of sessions are saved as far as the budget has room.
    pub(crate) fn evict_saved<B: Backend>(
        &mut self,
        cx: &mut Context<'_, B>,
        bytes: u64,
        saved_bytes_max: u64,
    ) -> Result<(), Error> {
        let evicted = self.parked.keep_bytes(self.parked.bytes().saturating_sub(bytes));
        cx.bytes_max = cx.bytes_max.min(self.bytes() + self.promised_bytes() + saved_bytes_max);
        self.drop_evicted(cx, &evicted)
    }

    /// Hands over the caches of its sessions before it is unloaded, the last used first, as far as they are
    /// worth it and fit in `spare_bytes`.
    pub(crate) fn hand_over_all<B: Backend>(&self, cx: &mut Context<'_, B>, mut spare_bytes: u64) {
        for cache in self.parked.of_sessions() {
            spare_bytes -= self.hand_over(cx, cache, spare_bytes);
        }
    }

    /// Hands over a cache that is about to be dropped, if it is worth it and fits; returns the bytes charged.
    fn hand_over<B: Backend>(&self, cx: &mut Context<'_, B>, cache: &CacheEntry, spare_bytes: u64) -> u64 {
        let bytes = self.parked.bytes_of(cache);
        // One that is larger than all that may be parked would not come back.
        let fits = bytes <= spare_bytes && bytes <= cx.idle_bytes_max;
        let has_media = !cache.transcript.prompt().media.is_empty();
        if cache.session.is_none() || has_media || !fits || !self.is_worth_saving(cache) {
            return 0;
        }
        let Some(place) = cx.saving.place() else {
            cx.counters.snapshots_dropped_total += 1;
            return 0;
        };
        match self.copy(cx, cache) {
            Ok(copy) => {
                drop(place.send(copy));
                bytes
            }
            Err(error) => {
                tracing::warn!(%error, bytes, "an evicted KV cache is not saved");
                0
            }
        }
    }

    fn is_worth_saving(&self, cache: &CacheEntry) -> bool {
        let tokens = count(cache.transcript.len());
        is_worth_saving(self.parked.bytes_of(cache), self.pace.prefill(tokens, false))
    }

    /// Returns a parked cache as plain data, and charges it.
    fn copy<B: Backend>(&self, cx: &mut Context<'_, B>, cache: &CacheEntry) -> Result<KvCopy, Error> {
        let segments = cx.backend.export(self.id, cache.id)?;
        Ok(KvCopy {
            session: cache.session.clone(),
            owner: cache.key.owner.clone(),
            salt: cache.key.salt,
            facts: self.kv_facts(&*cx.backend),
            segments,
            transcript: cache.transcript.clone(),
            charge: cx.saving.charge(self.parked.bytes_of(cache)),
        })
    }

    /// Returns what is cached of some tokens as plain data; none if there is nothing to save.
    ///
    /// # Errors
    /// The budget has no room for it until it is written, or the device failed.
    pub(crate) fn export<B: Backend>(
        &mut self,
        cx: &mut Context<'_, B>,
        ask: &ExportAsk,
    ) -> Result<Option<KvCopy>, Error> {
        let ExportAsk { of: CachedAsk { model: _, owner, salt, tokens }, if_worth } = ask;
        let key = CacheKey { owner: owner.clone(), salt: *salt };
        let transcript = Transcript::new(Arc::clone(tokens).into());
        let Some(cache) = self.parked.best_of(&key, &transcript) else { return Ok(None) };
        if !cache.transcript.prompt().media.is_empty() {
            return Ok(None);
        }
        if *if_worth && !self.is_worth_saving(cache) {
            return Ok(None);
        }
        let (needed_bytes, held) = (self.parked.bytes_of(cache), self.bytes() + self.promised_bytes());
        let available_bytes = cx.bytes_max.saturating_sub(held);
        if needed_bytes > available_bytes {
            return Err(Error::KvShortage { needed_bytes, available_bytes });
        }
        // What is beyond the wanted tokens is cut off, so that it can be left out.
        let (cache, wanted) = (cache.clone(), self.parked.longest(&key, &transcript, u32::MAX));
        let copied_bytes = u64::from(count(cache.transcript.len())) * self.shape.kv_bytes_per_token;
        let at = Base { id: cache.id, tokens: wanted };
        if wanted < count(cache.transcript.len())
            && needed_bytes + copied_bytes <= available_bytes
            && self.parked.may_split(at)
        {
            self.split(cx, at);
        }
        self.copy(cx, &cache).map(Some)
    }

    /// Returns how a cache that was read would be parked, and what that takes.
    ///
    /// # Errors
    /// What it builds on is not there any more.
    pub(crate) fn adoption(&self, work: &AdoptWork) -> Result<Adoption, Error> {
        let starts: Vec<u32> = work.segments.iter().map(|segment| segment.tokens.start).collect();
        let cut = self.parked.cut_at(&self.adopted(work, None), &starts);
        let base = cut.map(|cut| cut.base);
        if base.map_or(0, |base| base.tokens) < work.read.start {
            return Err(Error::Internal("the cache that a snapshot continues is gone".into()));
        }
        let copied = cut.map_or(0, |cut| u64::from(cut.copied_tokens));
        Ok(Adoption {
            cut,
            bytes: self.parked.bytes_added(&self.adopted(work, base), base),
            copied_bytes: copied * self.shape.kv_bytes_per_token,
        })
    }

    /// Parks a cache that was read.
    ///
    /// # Errors
    /// The outer one means that the model is lost, the inner one that nothing was parked.
    pub(crate) fn adopt<B: Backend>(
        &mut self,
        cx: &mut Context<'_, B>,
        work: AdoptWork,
        adoption: Adoption,
    ) -> Result<Result<(), Error>, Error> {
        if let Some(Cut { base, copied_tokens: 1.. }) = adoption.cut
            && !self.split(cx, base)
        {
            return Ok(Err(Error::Internal("what a snapshot shares was not cut".into())));
        }
        let base = adoption.cut.map(|cut| cut.base);
        let mut cache = self.adopted(&work, base);
        (cache.id, cache.used) = (self.parked.number(), cx.now);
        let segments = after(work.segments, base);
        let ends: Vec<u32> = segments.iter().map(|segment| segment.tokens.end).collect();
        let importing = Importing { id: cache.id, base, segments };
        if let Err(error) = cx.backend.import(self.id, importing) {
            return Ok(Err(Error::Internal(error.to_string())));
        }
        let redundant = self.parked.insert_parts(cache, base, &ends);
        self.drop_parked(cx, redundant.into_iter())?;
        let extra = self.parked.keep(cx.settings.kv_idle_caches_max);
        self.drop_evicted(cx, &extra).map(Ok)
    }

    /// Returns the cache that a read one becomes: with the checkpoints of its base, and those that were read.
    fn adopted(&self, work: &AdoptWork, base: Option<Base>) -> CacheEntry {
        let shared = base.map_or(0, |base| base.tokens);
        let of_base = base.map(|base| self.parked.checkpoints_up_to(base.id, shared));
        let read = work.segments.iter().flat_map(|segment| &segment.states);
        let read = read.map(|(length, _)| *length).filter(|length| *length > shared);
        let lengths = of_base.into_iter().flatten().chain(read);
        CacheEntry {
            id: ParkedId(u64::MAX),
            key: CacheKey { owner: work.owner.clone(), salt: work.salt },
            session: Some(work.session.clone()),
            rank: if work.pinned { Rank::Pinned } else { Rank::Session },
            transcript: Transcript::new(Arc::clone(&work.tokens).into()),
            checkpoints: (self.shape.state_bytes > 0).then(|| lengths.collect()),
            used: Moment::default(),
        }
    }
}

/// Returns the segments after a base.
fn after(mut segments: Vec<KvSegment>, base: Option<Base>) -> Vec<KvSegment> {
    let start = base.map_or(0, |base| base.tokens);
    segments.retain(|segment| segment.tokens.start >= start);
    segments
}
