//! Caches of sessions on their way to disk and back: a write takes some ticks and may fail, and a turn may
//! find its session's snapshot.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, mpsc, oneshot};

use super::seen::Scope;
use super::world::World;
use crate::backend::fake::KV_BYTES;
use crate::clock::{Clock, Moment};
use crate::engine::{
    AdoptWork, CacheUse, CachedAsk, Command, ExportAsk, KvCharge, KvCopy, KvOutbox, KvRoom, KvSegment,
    RoomAsk, Salt,
};
use crate::error::Error;
use crate::ids::{ModelName, SessionKey};

/// Time in which a snapshot is read; after it nobody waits for it.
const READ_LIMIT: Duration = Duration::from_secs(30);

/// Caches that may wait to be written.
const QUEUE: usize = 4;

/// A snapshot: of which model and salt, its tokens and its content.
type Saved = (ModelName, Salt, Arc<[u32]>, Vec<KvSegment>);

/// What is on disk, and what waits to be.
#[derive(Default)]
pub(super) struct Snapshots {
    evicted: Option<mpsc::Receiver<KvCopy>>,
    writing: Vec<(SessionKey, KvCopy)>,
    /// Told when the memory of what is written is needed.
    hurry: Arc<Notify>,
    on_disk: BTreeMap<SessionKey, Saved>,
    /// Reads that do not end: bytes, and when nobody waits for them any more.
    hanging: Vec<(KvCharge, u64, Moment)>,
    /// Whether what is evicted is dropped: the day ends.
    stopped: bool,
    pub(super) counts: Counts,
}

/// What happened.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    evicted: u32,
    written: u32,
    exported: u32,
    adopted: u32,
    refused: u32,
    given_up: u32,
    hung: u32,
}

impl Counts {
    pub(super) fn add(&mut self, more: Self) {
        let Self { evicted, written, exported, adopted, refused, given_up, hung } = more;
        self.evicted += evicted;
        self.written += written;
        self.exported += exported;
        self.adopted += adopted;
        self.refused += refused;
        self.given_up += given_up;
        self.hung += hung;
    }

    /// Everything that can happen to a snapshot did.
    pub(super) fn assert_all(self) {
        let Self { evicted, written, exported, adopted, refused, given_up, hung } = self;
        let all = [evicted, written, exported, adopted, refused, given_up, hung];
        assert!(all.iter().all(|count| *count > 0), "{self:?}");
    }
}

impl Snapshots {
    /// The daemon ends: what waits is lost, what is written stays.
    pub(super) fn end_life(&mut self) {
        self.writing.clear();
        self.hanging.clear();
    }

    /// Returns the bytes of reads that do not end.
    pub(super) fn hanging_bytes(&self) -> u64 {
        self.hanging.iter().map(|(_, bytes, _)| bytes).sum()
    }

    /// Writes nothing more; what waits is given up.
    pub(super) fn stop(&mut self) {
        self.writing.clear();
        self.stopped = true;
    }
}

impl World {
    pub(super) fn keep_snapshots(&mut self) {
        let (copies, evicted) = mpsc::channel(QUEUE);
        let hurry = Arc::clone(&self.snapshots.hurry);
        self.engine.command(Command::SaveEvicted(KvOutbox { copies, hurry }));
        self.snapshots.evicted = Some(evicted);
    }

    /// Takes what was evicted; some of what waits is written then, or lost.
    pub(super) fn write_snapshots(&mut self) {
        let now = self.clock.now();
        self.snapshots.hanging.retain(|(.., end)| *end > now);
        let evicted = self.snapshots.evicted.iter_mut().flat_map(mpsc::Receiver::try_recv).next();
        if let Some(copy) = evicted.filter(|_| !self.snapshots.stopped) {
            self.snapshots.counts.evicted += 1;
            let key = copy.session.clone().unwrap();
            self.snapshots.writing.push((key, copy));
        }
        let mut hurry = std::pin::pin!(self.snapshots.hurry.notified());
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        if hurry.as_mut().poll(&mut context).is_ready() {
            self.snapshots.counts.given_up += 1;
            self.snapshots.writing.clear();
        }
        if self.snapshots.writing.is_empty() || !self.random.once_in(6) {
            return;
        }
        let (key, copy) = self.snapshots.writing.remove(0);
        if !self.random.once_in(5) {
            self.snapshots.counts.written += 1;
            let (model, salt, tokens) = (copy.facts.model.clone(), copy.salt, copy.tokens());
            self.snapshots.on_disk.insert(key, (model, salt, tokens, copy.into_parts().0));
        }
    }

    /// A session is saved, or its snapshot is removed.
    pub(super) fn snapshots_change(&mut self) {
        if self.random.once_in(3) {
            return self.restore_some();
        }
        let count = self.kept.len() as u64;
        let Some(place) = (count > 0).then(|| usize::try_from(self.random.below(count)).unwrap()) else {
            return;
        };
        let (key, tokens) =
            self.kept.iter().nth(place).map(|(key, known)| (key.clone(), known.tokens.clone())).unwrap();
        if self.random.once_in(4) {
            self.snapshots.on_disk.remove(&key);
            return;
        }
        let view = self.book.read(&key, |session| Ok(session.view()));
        let Ok(view) = view else { return };
        let (owner, salt) = (key.owner.clone(), Salt::default());
        let of = CachedAsk { model: view.model, owner, salt, tokens: tokens.into() };
        let (reply, mut answer) = oneshot::channel();
        let if_worth = self.random.once_in(2);
        self.engine.command(Command::Export(Box::new(ExportAsk { of, if_worth }), reply));
        match answer.try_recv().unwrap() {
            Ok(Some(copy)) => {
                self.snapshots.counts.exported += 1;
                self.snapshots.writing.push((key, copy));
            }
            Ok(None) | Err(Error::KvShortage { .. }) => {}
            Err(other) => panic!("{other:?}"),
        }
    }

    /// Reads a snapshot though no turn asks for it: the memory may be full, or its beginning gone.
    fn restore_some(&mut self) {
        let count = self.snapshots.on_disk.len() as u64;
        let Some(place) = (count > 0).then(|| usize::try_from(self.random.below(count)).unwrap()) else {
            return;
        };
        let of = self.snapshots.on_disk.iter().nth(place);
        let (key, model, tokens) =
            of.map(|(key, (model, _, tokens, _))| (key.clone(), model.clone(), tokens.clone())).unwrap();
        self.restore(&key, &model, &tokens);
    }

    /// Gives the engine what a session's snapshot has of its next turn's prompt.
    pub(super) fn restore(&mut self, key: &SessionKey, model: &ModelName, tokens: &[u32]) {
        let Some((of, salt, saved, segments)) = self.snapshots.on_disk.get(key) else { return };
        let common = saved.iter().zip(tokens).take_while(|(saved, own)| saved == own).count();
        let fits = |segment: &&KvSegment| segment.tokens.end as usize <= common;
        let segments: Vec<KvSegment> = segments.iter().take_while(fits).cloned().collect();
        let Some(last) = segments.last().filter(|_| of == model) else { return };
        let (end, salt) = (last.tokens.end, *salt);
        // At times only the end is read, as if the beginning were known to be cached.
        let skipped = if self.random.once_in(4) { segments.len() - 1 } else { 0 };
        let Some(lease) = self.engine.table().borrow().lease(model) else { return };
        let segments = segments[skipped..].to_vec();
        let of = CachedAsk { model: model.clone(), owner: key.owner.clone(), salt, tokens: tokens.into() };
        let bytes = u64::from(end) * KV_BYTES;
        let (reply, mut answer) = oneshot::channel();
        self.engine.command(Command::Room(Box::new(RoomAsk { of, saved: end, bytes }), reply));
        let Some(KvRoom { charge, .. }) = answer.try_recv().unwrap() else {
            self.snapshots.counts.refused += 1;
            return;
        };
        if self.random.once_in(8) {
            // The disk does not answer: the turn computes, and the memory comes back later.
            self.snapshots.counts.hung += 1;
            let end = self.clock.now().after(READ_LIMIT);
            self.snapshots.hanging.push((charge, bytes, end));
            return;
        }
        let work = AdoptWork {
            model: lease,
            owner: key.owner.clone(),
            salt,
            session: key.clone(),
            pinned: self.random.once_in(4),
            tokens: tokens[..end as usize].into(),
            read: segments[0].tokens.start..end,
            segments,
            charge,
        };
        let (reply, mut answer) = oneshot::channel();
        self.engine.command(Command::Adopt(Box::new(work), reply));
        match answer.try_recv().unwrap() {
            Ok(_) => {
                self.snapshots.counts.adopted += 1;
                let cache = CacheUse::Shared(salt);
                let scope = Scope { principal: key.owner.clone(), model: model.clone(), cache };
                self.seen.add(&scope, &tokens[..end as usize]);
            }
            // There is no room, or what it continues is not there.
            Err(Error::KvShortage { .. } | Error::Internal(_)) => self.snapshots.counts.refused += 1,
            Err(other) => panic!("{other:?}"),
        }
    }
}
