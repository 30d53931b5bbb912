//! What the folder holds: snapshots, and the files that they have in common. Pure: says which files go with a
//! snapshot, and which snapshot goes first: the least recently used of those owners who have their share or
//! more. So nobody pushes out what another has within an equal share.

use std::collections::{BTreeMap, BTreeSet};

use super::manifest::{Listed, Manifest};
use super::name::Name;
use crate::ids::{Principal, SessionId};

#[derive(Debug, Default)]
pub(super) struct Index {
    snapshots: BTreeMap<SessionId, Entry>,
    files: BTreeMap<Name, File>,
    bytes: u64,
    uses: u64,
}

#[derive(Debug)]
struct Entry {
    owner: Principal,
    manifest: Manifest,
    /// Bytes of the manifest's file.
    size: u64,
    /// Number of its last use since the start; 0 if there was none.
    use_number: u64,
}

/// A snapshot that is to be written.
#[derive(Clone, Copy, Debug)]
pub(super) struct Coming<'a> {
    pub(super) session: SessionId,
    pub(super) owner: &'a Principal,
    pub(super) manifest: &'a Manifest,
}

#[derive(Debug, Default)]
struct File {
    bytes: u64,
    /// Number of places in snapshots that name it.
    users: u32,
    /// Whether it is there, and not known to be damaged.
    is_there: bool,
}

impl Index {
    /// Returns the bytes of all files.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Returns the number of snapshots.
    pub(super) fn len(&self) -> usize {
        self.snapshots.len()
    }

    pub(super) fn get(&self, session: SessionId) -> Option<&Manifest> {
        self.snapshots.get(&session).map(|entry| &entry.manifest)
    }

    /// Returns whether a part's file is there, as far as its size tells.
    pub(super) fn has(&self, part: &Listed) -> bool {
        self.files.get(&part.name).is_some_and(|file| file.is_there && file.bytes == part.bytes)
    }

    /// Notes a file that is there.
    pub(super) fn put(&mut self, name: Name, bytes: u64) {
        let file = self.files.entry(name).or_default();
        if file.is_there {
            self.bytes -= file.bytes;
        }
        (file.bytes, file.is_there) = (bytes, true);
        self.bytes += bytes;
    }

    /// Notes that a file is gone, or useless.
    pub(super) fn lose(&mut self, name: Name) {
        let Some(file) = self.files.get_mut(&name) else { return };
        if std::mem::take(&mut file.is_there) {
            self.bytes -= file.bytes;
        }
        if file.users == 0 {
            self.files.remove(&name);
        }
    }

    /// Adds a session's snapshot. The one that it had is removed first.
    pub(super) fn add(&mut self, session: SessionId, owner: Principal, manifest: Manifest) {
        let size = manifest.size(session);
        for part in &manifest.parts {
            self.files.entry(part.name).or_default().users += 1;
        }
        self.bytes += size;
        let replaced = self.snapshots.insert(session, Entry { owner, manifest, size, use_number: 0 });
        assert!(replaced.is_none(), "a session has one snapshot");
    }

    /// Removes a session's snapshot.
    pub(super) fn remove(&mut self, session: SessionId) {
        let Some(Entry { manifest, size, .. }) = self.snapshots.remove(&session) else { return };
        self.bytes -= size;
        for Listed { name, .. } in manifest.parts {
            let Some(file) = self.files.get_mut(&name) else { continue };
            file.users -= 1;
            if file.users == 0 && !file.is_there {
                self.files.remove(&name);
            }
        }
    }

    /// Returns the files that no snapshot names.
    pub(super) fn unused(&self) -> Vec<Name> {
        self.files.iter().filter(|(_, file)| file.users == 0).map(|(name, _)| *name).collect()
    }

    /// Returns the bytes that would be left of a session's snapshot and its files if these parts took its
    /// place: those of others stay.
    pub(super) fn bytes_with(&self, session: SessionId, new: &Manifest) -> u64 {
        let is_new = |name: Name| new.parts.iter().any(|part| part.name == name);
        let mut bytes = self.bytes + new.size(session);
        let added = new.parts.iter().filter(|part| !self.has(part));
        bytes = added.fold(bytes, |sum, part| sum.saturating_add(part.bytes));
        let Some(Entry { manifest, size, .. }) = self.snapshots.get(&session) else { return bytes };
        let is_freed =
            |part: &&Listed| !is_new(part.name) && self.has(part) && self.files[&part.name].users == 1;
        manifest
            .parts
            .iter()
            .filter(is_freed)
            .fold(bytes - size, |sum, part| sum - self.files[&part.name].bytes)
    }

    /// Returns the bytes that there are until then: the old files and the new ones.
    pub(super) fn bytes_until(&self, session: SessionId, new: &Manifest) -> u64 {
        let added = new.parts.iter().filter(|part| !self.has(part));
        added.fold(self.bytes.saturating_add(new.size(session)), |sum, part| sum.saturating_add(part.bytes))
    }

    /// Notes that a snapshot is used.
    pub(super) fn touch(&mut self, session: SessionId) {
        self.uses += 1;
        if let Some(entry) = self.snapshots.get_mut(&session) {
            entry.use_number = self.uses;
        }
    }

    /// Takes over when snapshots were used.
    pub(super) fn remember(&mut self, before: &Self) {
        self.uses = before.uses;
        for (session, entry) in &mut self.snapshots {
            entry.use_number = before.snapshots.get(session).map_or(0, |before| before.use_number);
        }
    }

    /// Returns the snapshot that goes first, for one that comes if there is one: of those whose owner has no
    /// less than an equal share of all bytes, the least recently used one of another session.
    pub(super) fn first_to_go(&self, coming: Option<&Coming<'_>>) -> Option<SessionId> {
        let mut held = self.bytes_by_owner();
        let spared = coming.map(|coming| coming.session);
        if let Some(Coming { session, owner, manifest }) = coming {
            let (after, before) = (self.bytes_with(*session, manifest), self.bytes);
            let bytes = held.entry(*owner).or_default();
            *bytes = (*bytes + after).saturating_sub(before);
        }
        let share = held.values().sum::<u64>() / held.len().max(1) as u64;
        let others = self.snapshots.iter().filter(|(session, entry)| {
            Some(**session) != spared && held.get(&entry.owner).is_some_and(|bytes| *bytes >= share)
        });
        let order =
            |(session, entry): &(&SessionId, &Entry)| (entry.use_number, entry.manifest.used, **session);
        others.min_by_key(order).map(|(session, _)| *session)
    }

    /// Returns the bytes that an owner may have of `bytes_max`: what the others have does not go for it, each
    /// as far as an equal share. A snapshot of no more has room once some of those went that may.
    pub(super) fn left_to(&self, owner: &Principal, bytes_max: u64) -> u64 {
        let mut held = self.bytes_by_owner();
        held.remove(owner);
        let share = bytes_max / (held.len() as u64 + 1);
        held.into_values().fold(bytes_max, |left, bytes| left - bytes.min(share))
    }

    /// Returns the bytes of everybody's files. Owners share none.
    fn bytes_by_owner(&self) -> BTreeMap<&Principal, u64> {
        let (mut held, mut seen) = (BTreeMap::<_, u64>::new(), BTreeSet::new());
        for Entry { owner, manifest, size, .. } in self.snapshots.values() {
            let bytes = held.entry(owner).or_default();
            *bytes += size;
            for part in &manifest.parts {
                let file = self.files.get(&part.name).filter(|file| file.is_there && seen.insert(part.name));
                *bytes += file.map_or(0, |file| file.bytes);
            }
        }
        held
    }
}
