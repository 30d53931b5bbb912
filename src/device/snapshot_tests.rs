//! Snapshots of whole models' caches: what is written, read and imported goes on bit for bit as what was
//! parked.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::SystemTime;

use super::backend_tests::{A, DRAFT, Device, PROMPT};
use super::chain_tests::shapes;
use crate::backend::{Backend, Base, ImportError, Importing, KvSegment, ParkedId, SpanKind};
use crate::ids::SessionId;
use crate::store::{Fingerprint, KvKey, KvOrigin, NewSnapshot, SnapshotSettings, Snapshots, Wanted};

const FIRST: ParkedId = ParkedId(0);
const SECOND: ParkedId = ParkedId(1);
const THIRD: ParkedId = ParkedId(2);
const SESSION: SessionId = SessionId(1);

/// Segments as bytes: the tokens, each array, and the arrays of each state.
type Plain = Vec<(std::ops::Range<u32>, Vec<Vec<u8>>, Vec<(u32, Vec<Vec<u8>>)>)>;

fn plain(segments: &[KvSegment]) -> Plain {
    let bytes = |content: &crate::backend::KvContent| {
        content.bytes().unwrap().into_iter().map(<[u8]>::to_vec).collect::<Vec<_>>()
    };
    let states = |segment: &KvSegment| segment.states.iter().map(|(at, state)| (*at, bytes(state))).collect();
    segments
        .iter()
        .map(|segment| (segment.tokens.clone(), bytes(&segment.content), states(segment)))
        .collect()
}

fn all() -> Vec<u32> {
    [&PROMPT[..], &DRAFT].concat()
}

/// A cache of two segments, which shares the first with another one.
fn park_two(device: &mut Device) {
    device.park(FIRST, 9, None);
    device.resume(FIRST, 9, 9, 9);
    device.run(A, 9, &DRAFT, SpanKind::Verify);
    device.park(SECOND, 14, Some(Base { id: FIRST, tokens: 9 }));
}

fn key(device: &Device) -> KvKey {
    let origin = KvOrigin { revision: "1", computes: "f32", layout: &device.layout };
    KvKey { fingerprint: Fingerprint::of(&origin), owner: "uid:1".into(), salt: [0; 32] }
}

/// Writes a parked cache to a folder, and opens it again.
fn saved(device: &Device, folder: &std::path::Path) -> Snapshots {
    let settings = SnapshotSettings { disk_bytes_max: 1 << 30, queue_bytes_max: 1 << 30 };
    let snapshots = Snapshots::start(folder, settings, |_| Some("uid:1".into())).unwrap();
    let new = NewSnapshot {
        session: SESSION,
        key: key(device),
        layout: Arc::clone(&device.layout),
        tokens: all().into(),
        segments: device.backend.export(device.model, SECOND).unwrap(),
        used: SystemTime::UNIX_EPOCH,
    };
    let answer = snapshots.save(new).unwrap();
    assert_eq!(answer.blocking_recv().unwrap().unwrap().tokens, 14);
    drop(snapshots);
    Snapshots::start(folder, settings, |_| Some("uid:1".into())).unwrap()
}

fn load(device: &Device, snapshots: &Snapshots, tokens: &[u32], held: u32) -> Vec<KvSegment> {
    let key = key(device);
    let stop = AtomicBool::new(false);
    let wanted = Wanted { session: SESSION, key: &key, layout: &device.layout, tokens, held, stop: &stop };
    let builder = device.backend.kv_builder();
    // Read on another thread, as the engine has it.
    let loaded = std::thread::scope(|scope| {
        scope.spawn(|| snapshots.load(&wanted, &*builder).unwrap()).join().unwrap()
    });
    assert_eq!((loaded.tokens, loaded.fault), (held..u32::try_from(tokens.len()).unwrap(), None));
    loaded.segments
}

#[test]
fn a_cache_that_went_through_files_goes_on_bit_for_bit() {
    for (_, mut device) in shapes() {
        park_two(&mut device);
        let exported = plain(&device.backend.export(device.model, SECOND).unwrap());
        assert_eq!(exported.len(), 2);
        let (wanted, of_prompt) = (device.restored(SECOND, 14, 1), device.restored(SECOND, 9, 2));
        let folder = tempfile::tempdir().unwrap();
        let snapshots = saved(&device, folder.path());
        [FIRST, SECOND].into_iter().for_each(|id| device.backend.drop_parked(device.model, id).unwrap());
        let segments = load(&device, &snapshots, &all(), 0);
        assert_eq!(plain(&segments), exported);
        device.backend.import(device.model, Importing { id: THIRD, base: None, segments }).unwrap();
        assert_eq!(plain(&device.backend.export(device.model, THIRD).unwrap()), exported);
        assert_eq!(device.restored(THIRD, 14, 3), wanted);
        assert_eq!(device.restored(THIRD, 9, 4), of_prompt);
    }
}

#[test]
fn what_is_parked_still_is_shared_by_what_is_imported() {
    for (_, mut device) in shapes() {
        park_two(&mut device);
        let exported = plain(&device.backend.export(device.model, SECOND).unwrap());
        let (wanted, of_prompt) = (device.restored(SECOND, 14, 1), device.restored(SECOND, 9, 2));
        let folder = tempfile::tempdir().unwrap();
        let snapshots = saved(&device, folder.path());
        device.backend.drop_parked(device.model, SECOND).unwrap();
        let (base, segments) = (Some(Base { id: FIRST, tokens: 9 }), load(&device, &snapshots, &all(), 9));
        assert_eq!(plain(&segments), exported[1..]);
        device.backend.import(device.model, Importing { id: THIRD, base, segments }).unwrap();
        device.backend.drop_parked(device.model, FIRST).unwrap();
        assert_eq!(plain(&device.backend.export(device.model, THIRD).unwrap()), exported);
        assert_eq!(device.restored(THIRD, 14, 3), wanted);
        assert_eq!(device.restored(THIRD, 9, 4), of_prompt);
    }
}

#[test]
fn the_beginning_of_a_snapshot_is_the_cache_of_its_tokens() {
    for (recurrent, mut device) in shapes() {
        park_two(&mut device);
        let lengths: &[u32] = if recurrent { &[9] } else { &[4, 9, 11] };
        let folder = tempfile::tempdir().unwrap();
        let snapshots = saved(&device, folder.path());
        for (&length, id) in lengths.iter().zip(2..) {
            let slab = u32::try_from(id).unwrap() * 2;
            let wanted = device.restored(SECOND, length, slab);
            let segments = load(&device, &snapshots, &all()[..length as usize], 0);
            device
                .backend
                .import(device.model, Importing { id: ParkedId(id), base: None, segments })
                .unwrap();
            assert_eq!(device.restored(ParkedId(id), length, slab + 1), wanted, "{length} tokens");
        }
    }
}

#[test]
fn segments_that_are_not_the_models_are_refused_and_leave_nothing() {
    let exported: Vec<_> = shapes()
        .map(|(_, mut device)| {
            park_two(&mut device);
            device.backend.export(device.model, SECOND).unwrap()
        })
        .collect();
    for (own, (recurrent, mut device)) in shapes().enumerate() {
        park_two(&mut device);
        let mut refused = |base, segments| {
            let importing = Importing { id: THIRD, base, segments };
            let error = device.backend.import(device.model, importing).unwrap_err();
            assert!(matches!(error, ImportError::Unfit(_)), "{error:?}");
        };
        for (other, segments) in exported.iter().enumerate() {
            if other != own {
                refused(None, segments.clone());
            }
        }
        let segments = &exported[own];
        // One that does not follow, one that is shorter than it says, and nothing to stand on.
        refused(None, segments[1..].to_vec());
        let mut longer = segments.clone();
        longer[1].tokens.end += 1;
        refused(None, longer);
        refused(Some(Base { id: SECOND, tokens: 8 }), segments.clone());
        if recurrent {
            let mut beyond = segments.clone();
            beyond[0].states = segments[1].states.clone();
            refused(None, beyond);
        }
        let whole = Importing { id: THIRD, base: None, segments: segments.clone() };
        device.backend.import(device.model, whole).unwrap();
    }
}
