//! Snapshots on a disk in memory, with caches whose content is a hash of their tokens, so that a wrong one is
//! seen.

use std::any::Any;
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use crate::backend::{
    BuildKv, KvArray, KvArrays, KvBuilding, KvContent, KvElement, KvLayout, KvPart, KvSegment,
};
use crate::error::Error;
use crate::ids::{Principal, SessionId};
use crate::store::failing::FailingDisk;
use crate::store::kv::shelf::Answer;
use crate::store::kv::writer::Writer;
use crate::store::kv::{
    Fingerprint, KvKey, KvOrigin, Loaded, NewSnapshot, SnapshotError, SnapshotSettings, Snapshots, Wanted,
};

/// Tokens that all caches begin with.
pub(super) const PROMPT: Range<u32> = 100..110;

/// Two arrays for each token, of several heads; and two states, where there are any.
pub(super) fn layout(recurrent: bool) -> KvLayout {
    let mut arrays = vec![
        KvArray::PerToken { heads: 2, elements: 3, element: KvElement::Float16 },
        KvArray::PerToken { heads: 3, elements: 1, element: KvElement::Int8 },
    ];
    if recurrent {
        arrays.insert(1, KvArray::PerSequence { shape: vec![2, 2], element: KvElement::Float32 });
        arrays.push(KvArray::PerSequence { shape: vec![5], element: KvElement::Bfloat16 });
    }
    KvLayout { arrays }
}

/// Returns what an array has of a segment, or of the state after `tokens.end`.
fn filled(index: usize, array: &KvArray, all: &[u32], tokens: &Range<u32>) -> Vec<u8> {
    let mix = |numbers: &[u32], more: [usize; 3]| {
        let hash = numbers.iter().copied().fold(7_u32, |hash, next| hash.wrapping_mul(31).wrapping_add(next));
        more.into_iter()
            .fold(hash, |hash, next| hash.wrapping_mul(37).wrapping_add(u32::try_from(next).unwrap()))
    };
    match array {
        KvArray::PerToken { heads, elements, element } => {
            let row = usize::try_from(u64::from(*elements) * element.bytes()).unwrap();
            let of = |head: usize, at: u32| {
                let hash = mix(&all[..=at as usize], [index, head, 0]).to_le_bytes();
                hash.into_iter().cycle().take(row).collect::<Vec<_>>()
            };
            let heads = 0..*heads as usize;
            heads.flat_map(|head| tokens.clone().flat_map(move |at| of(head, at))).collect()
        }
        KvArray::PerSequence { .. } => {
            let hash = mix(&all[..tokens.end as usize], [index, 0, 1]).to_le_bytes();
            hash.into_iter().cycle().take(usize::try_from(array.bytes(0)).unwrap()).collect()
        }
    }
}

/// Arrays in memory, and whether they can be shown.
#[derive(Debug)]
pub(super) struct Arrays(pub(super) Result<Vec<Vec<u8>>, ()>);

impl KvArrays for Arrays {
    fn bytes(&self) -> Result<Vec<&[u8]>, Error> {
        let arrays = self.0.as_ref().map_err(|()| Error::Internal("a test shows nothing".into()))?;
        Ok(arrays.iter().map(Vec::as_slice).collect())
    }
}

fn content(layout: &KvLayout, part: KvPart, all: &[u32], tokens: &Range<u32>) -> KvContent {
    let arrays = layout.of(part).enumerate().map(|(index, array)| filled(index, array, all, tokens));
    Arc::new(Arrays(Ok(arrays.collect())))
}

/// Returns the segments of a cache of `tokens` with these ends and checkpoints.
pub(super) fn segments(layout: &KvLayout, tokens: &[u32], ends: &[u32], saved: &[u32]) -> Vec<KvSegment> {
    let starts = std::iter::once(0).chain(ends.iter().copied());
    let segment = |(start, &end): (u32, &u32)| {
        let own = start..end;
        let inside = saved.iter().filter(|length| start < **length && **length <= end);
        let state = |&length: &u32| (length, content(layout, KvPart::States, tokens, &(0..length)));
        let states = if layout.is_recurrent() { inside.map(state).collect() } else { vec![] };
        KvSegment { content: content(layout, KvPart::Tokens, tokens, &own), tokens: own, states }
    };
    starts.zip(ends).map(segment).collect()
}

/// Makes such arrays.
#[derive(Debug, Default)]
pub(super) struct Builder {
    /// Number of arrays that it made.
    pub(super) built: Mutex<usize>,
}

struct Building(Vec<Vec<u8>>);

impl BuildKv for Builder {
    fn begin(&self) -> Box<dyn KvBuilding> {
        *self.built.lock().unwrap() += 1;
        Box::new(Building(Vec::new()))
    }
}

impl KvBuilding for Building {
    fn add(&mut self, array: &KvArray, tokens: u32, bytes: &[u8]) -> Result<(), Error> {
        assert_eq!(bytes.len() as u64, array.bytes(tokens), "an array has its bytes");
        self.0.push(bytes.to_vec());
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<KvContent, Error> {
        Ok(Arc::new(Arrays(Ok(self.0))))
    }
}

/// Returns tokens that begin with the prompt.
pub(super) fn tokens(rest: &[u32]) -> Vec<u32> {
    PROMPT.chain(rest.iter().copied()).collect()
}

/// Returns whose a session is: from 100 on another one's.
pub(super) fn owner_of(session: SessionId) -> Principal {
    if session.0 < 100 { "uid:1".into() } else { "uid:2".into() }
}

pub(super) struct World {
    pub(super) disk: FailingDisk,
    pub(super) snapshots: Snapshots,
    pub(super) writer: Writer,
    pub(super) layout: Arc<KvLayout>,
    pub(super) revision: &'static str,
    pub(super) owner: &'static str,
    pub(super) salt: u8,
}

pub(super) const SETTINGS: SnapshotSettings =
    SnapshotSettings { disk_bytes_max: 1 << 20, queue_bytes_max: 1 << 20 };

impl World {
    pub(super) fn start(disk: FailingDisk, recurrent: bool, settings: SnapshotSettings) -> Self {
        Self::without(disk, recurrent, settings, &[])
    }

    /// Starts where some sessions are gone.
    pub(super) fn without(
        disk: FailingDisk,
        recurrent: bool,
        settings: SnapshotSettings,
        gone: &[u64],
    ) -> Self {
        let gone: BTreeSet<SessionId> = gone.iter().copied().map(SessionId).collect();
        let known = Box::new(move |session| (!gone.contains(&session)).then(|| owner_of(session)));
        let (snapshots, writer) = Snapshots::on(Box::new(disk.clone()), settings, known);
        let layout = Arc::new(layout(recurrent));
        Self { disk, snapshots, writer, layout, revision: "a", owner: "uid:1", salt: 0 }
    }

    pub(super) fn key(&self) -> KvKey {
        let origin = KvOrigin { revision: self.revision, computes: "f32", layout: &self.layout };
        KvKey { fingerprint: Fingerprint::of(&origin), owner: self.owner.into(), salt: [self.salt; 32] }
    }

    pub(super) fn snapshot(&self, session: u64, tokens: &[u32], ends: &[u32], saved: &[u32]) -> NewSnapshot {
        NewSnapshot {
            session: SessionId(session),
            key: self.key(),
            layout: Arc::clone(&self.layout),
            tokens: tokens.into(),
            segments: segments(&self.layout, tokens, ends, saved),
            used: SystemTime::UNIX_EPOCH + Duration::from_secs(session),
        }
    }

    /// Saves a snapshot, and waits for it.
    pub(super) fn save(&self, session: u64, tokens: &[u32], ends: &[u32], saved: &[u32]) -> Answer {
        let mut answer = self.snapshots.save(self.snapshot(session, tokens, ends, saved))?;
        self.writer.work();
        answer.try_recv().unwrap()
    }

    pub(super) fn load_from(&self, session: u64, tokens: &[u32], held: u32) -> Result<Loaded, SnapshotError> {
        let (key, session) = (self.key(), SessionId(session));
        let stop = AtomicBool::new(false);
        let wanted = Wanted { session, key: &key, layout: &self.layout, tokens, held, stop: &stop };
        let loaded = self.snapshots.load(&wanted, &Builder::default());
        if let Ok(loaded) = &loaded {
            self.check(loaded, tokens, held);
        }
        loaded
    }

    /// Returns the number of tokens that are loaded, and what kept it from being more.
    pub(super) fn load(&self, session: u64, tokens: &[u32]) -> (u32, Option<SnapshotError>) {
        match self.load_from(session, tokens, 0) {
            Ok(loaded) => (loaded.tokens.end, loaded.fault),
            Err(error) => (0, Some(error)),
        }
    }

    /// Checks that what was loaded is the cache of these tokens, bit for bit.
    fn check(&self, loaded: &Loaded, tokens: &[u32], held: u32) {
        let Loaded { tokens: range, segments: got, .. } = loaded;
        assert!(range.start == held && held < range.end && range.end as usize <= tokens.len(), "{range:?}");
        assert_eq!(crate::backend::check_segments(held, got).unwrap(), range.end);
        let last = got.last().and_then(|segment| segment.states.last()).map(|(length, _)| *length);
        assert!(!self.layout.is_recurrent() || last == Some(range.end), "{last:?} of {range:?}");
        for KvSegment { tokens: own, content: found, states } in got {
            self.compare(found, KvPart::Tokens, tokens, own);
            for (length, found) in states {
                self.compare(found, KvPart::States, tokens, &(0..*length));
            }
        }
    }

    fn compare(&self, found: &KvContent, part: KvPart, tokens: &[u32], own: &Range<u32>) {
        let wanted = content(&self.layout, part, tokens, own);
        let found: &dyn Any = &**found;
        assert!(found.is::<Arrays>());
        let found = found.downcast_ref::<Arrays>().unwrap();
        assert_eq!(found.bytes().unwrap(), wanted.bytes().unwrap(), "{part:?} {own:?}");
    }

    /// Returns the names of the files, without those of manifests.
    pub(super) fn parts(&self) -> Vec<String> {
        let names = self.disk.sizes().into_iter().map(|(name, _)| name);
        names.filter(|name| name.ends_with(".safetensors")).collect()
    }

    pub(super) fn size(&self, name: &str) -> u64 {
        crate::store::disk::Disk::size(&self.disk, name).unwrap()
    }

    /// Returns the bytes of all files.
    pub(super) fn bytes(&self) -> u64 {
        self.disk.sizes().iter().map(|(_, size)| *size as u64).sum()
    }
}
