//! The thread that writes snapshots, one after the other, and removes what goes with none. A snapshot is
//! first its parts, which nobody names yet, then its manifest: so whenever the daemon ends, a manifest lists
//! what is there, and what no manifest lists is removed by a look at the folder, soon after the next start.
//! While the disk fails nothing is tried for a while; what waited is given up, and recomputed if need be.
//!
//! Parts are hashed and written while processors are idle, where the system has a class of threads for that.
//! As such a thread may get next to nothing, it is not relied on: once a go through the queue has waited for
//! [`PATIENCE`], this thread goes on from the next piece, as soon as the other has ended its own.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::index::{Coming, Index};
use super::manifest::{self, Listed, Manifest, Read, seconds};
use super::name::{Name, Naming, Piece, key_name};
use super::part::{Means, Part, WriteError};
use super::shelf::{Answer, Job, Shelf, Waiting};
use super::{GivenUp, NewSnapshot, SnapshotError};
use crate::backend::KvContent;
use crate::ids::{Principal, SessionId};
use crate::store::disk::{NEW, Room};

/// Time after the start, and after a failure, in which nothing is done that nobody waits for.
const PAUSE: Duration = Duration::from_secs(10);

/// Hundredths of a second, of one go through the queue, in which parts are written while processors are idle;
/// each part costs one more. A load waits for three seconds for the snapshots of the models that go: as a
/// rule, some of that is left.
pub(super) const PATIENCE: u32 = 200;

/// Bytes of the disk that are left to others, and the part of it in a hundred: sessions themselves are on it.
const SPARED_BYTES: u64 = 1 << 30;
const SPARED_PERCENT: u64 = 5;

/// Tells whose a session is, if there is one now. It is asked whenever a list is written and when the folder
/// is looked at, also long after the start.
pub(super) type Known = Box<dyn Fn(SessionId) -> Option<Principal> + Send>;

pub(super) struct Writer {
    shelf: Arc<Shelf>,
    known: Known,
}

impl Writer {
    pub(super) fn new(shelf: Arc<Shelf>, known: Known) -> Self {
        Self { shelf, known }
    }

    /// Writes until the end.
    pub(super) fn run(self) {
        let _end = End(Arc::clone(&self.shelf));
        loop {
            let (is_new, is_paused) = {
                let state = self.shelf.state();
                (state.index.is_none(), state.paused)
            };
            if is_paused {
                self.shelf.pause(PAUSE);
            }
            let limit = if is_paused { Some(Duration::ZERO) } else { is_new.then_some(PAUSE) };
            if self.shelf.wait(limit) {
                return;
            }
            self.work();
        }
    }

    /// Does all jobs that wait, and looks at the folder if that is yet to be done.
    pub(super) fn work(&self) {
        let is_unsure = {
            let mut state = self.shelf.state();
            (state.paused, state.working) = (false, true);
            self.shelf.be_patient(&state);
            state.index.is_none() || state.unsure
        };
        if is_unsure && let Err(error) = self.look() {
            self.shelf.fail(&error);
        }
        while let Some(job) = self.shelf.next() {
            let done = match job {
                Job::Save(waiting) => {
                    let written = self.save(&waiting);
                    // Whoever is told finds it on disk, and no longer waiting.
                    self.shelf.done();
                    waiting.finish(written);
                    Ok(())
                }
                Job::Fork { from, to, tokens } => self.fork(from, to, &tokens),
                Job::Forget(session) => self.forget(session),
                Job::Discard(name) => self.discard(name),
                Job::MakeWay(bytes) => self.make_way(bytes),
            };
            if let Err(error) = done {
                self.shelf.fail(&error);
            }
        }
    }

    /// Finds what the folder holds, and removes what nobody needs.
    fn look(&self) -> io::Result<()> {
        let disk = &*self.shelf.disk;
        let mut index = Index::default();
        let mut manifests = Vec::new();
        for file in disk.names()? {
            self.shelf.advance();
            if let Some(name) = Name::of_file(&file) {
                // What has no size is not a file of ours.
                disk.size(&file).into_iter().for_each(|bytes| index.put(name, bytes));
            } else if let Some(session) = manifest::session(&file) {
                manifests.push(session);
            } else if file.ends_with(NEW) {
                // The daemon ended before this file got its name.
                disk.remove(&file)?;
            }
        }
        for session in manifests {
            self.shelf.advance();
            let read = manifest::read(disk, session).unwrap_or_else(|error| {
                tracing::warn!(file = manifest::file(session), %error, "a snapshot cannot be read");
                Read::Damaged
            });
            match (read, (self.known)(session)) {
                (Read::Whole(manifest), Some(owner)) => index.add(session, owner, manifest),
                (Read::Whole(_) | Read::Missing, _) => disk.remove(&manifest::file(session))?,
                (Read::Damaged, _) => {
                    tracing::warn!(file = manifest::file(session), "a snapshot is damaged, and removed");
                    disk.remove(&manifest::file(session))?;
                }
            }
        }
        {
            let mut state = self.shelf.state();
            if let Some(before) = &state.index {
                index.remember(before);
            }
            (state.index, state.unsure) = (Some(index), false);
        }
        self.sweep()?;
        self.make_room(None)
    }

    /// Asks and changes what is known of the folder; none before it was looked at.
    fn index<T>(&self, act: impl FnOnce(&mut Index) -> T) -> Option<T> {
        self.shelf.state().index.as_mut().map(act)
    }

    /// Removes the files that no snapshot names.
    fn sweep(&self) -> io::Result<()> {
        for name in self.index(|index| index.unused()).unwrap_or_default() {
            self.shelf.advance();
            self.shelf.disk.remove(&name.file())?;
            self.index(|index| index.lose(name));
        }
        Ok(())
    }

    /// Removes snapshots until there is room, as far as some may go.
    fn make_room(&self, coming: Option<&Coming<'_>>) -> io::Result<()> {
        self.evict(coming, self.shelf.settings.disk_bytes_max).map(drop)
    }

    /// Removes snapshots until as many bytes are free as others need.
    fn make_way(&self, bytes: u64) -> io::Result<()> {
        let held_bytes = self.index(|index| index.bytes()).unwrap_or(0);
        let removed = self.evict(None, held_bytes.saturating_sub(bytes))?;
        if removed > 0 {
            tracing::info!(
                removed,
                "KV snapshots were removed: the disk is full, and sessions are written first"
            );
        }
        Ok(())
    }

    /// Removes snapshots, the first to go first, until they have at most `most` bytes, with the one that is
    /// to come; returns the number of those that are gone.
    fn evict(&self, coming: Option<&Coming<'_>>, most: u64) -> io::Result<u32> {
        let bytes = |index: &mut Index| match coming {
            Some(coming) => index.bytes_with(coming.session, coming.manifest),
            None => index.bytes(),
        };
        let mut removed = 0;
        while self.index(bytes).is_some_and(|bytes| bytes > most) {
            let Some(session) = self.index(|index| index.first_to_go(coming)).flatten() else { break };
            self.forget(session)?;
            removed += 1;
        }
        Ok(removed)
    }

    fn forget(&self, session: SessionId) -> io::Result<()> {
        if self.index(|index| index.get(session).is_none()) == Some(true) {
            return Ok(());
        }
        self.shelf.disk.remove(&manifest::file(session))?;
        // Its parts are not removed while a manifest may come back that lists them.
        self.shelf.disk.sync_names()?;
        self.index(|index| index.remove(session));
        self.sweep()
    }

    fn discard(&self, name: Name) -> io::Result<()> {
        self.index(|index| index.lose(name));
        self.shelf.disk.remove(&name.file())
    }

    fn fork(&self, from: SessionId, to: SessionId, tokens: &[u32]) -> io::Result<()> {
        // What the original's snapshot has may be more than either still says, or something else.
        let own = self.index(|index| index.get(from).cloned()).flatten();
        // Its tokens are hashed while nobody waits for the index.
        let own = own.map(|manifest| manifest.of(tokens)).filter(|own| own.tokens() > 0);
        let Some(manifest) = own else { return Ok(()) };
        let bytes = |index: &mut Index| index.bytes_until(to, &manifest);
        let fits = self.index(bytes).is_some_and(|bytes| bytes <= self.shelf.settings.disk_bytes_max);
        let Some(owner) = (self.known)(to).filter(|_| fits) else { return Ok(()) };
        manifest.write(&*self.shelf.disk, to)?;
        self.replace(to, owner, manifest)
    }

    /// Notes that a session has this snapshot, and removes what went with the one before.
    fn replace(&self, session: SessionId, owner: Principal, manifest: Manifest) -> io::Result<()> {
        self.index(|index| {
            index.remove(session);
            index.add(session, owner, manifest);
            index.touch(session);
        });
        self.sweep()
    }

    fn save(&self, waiting: &Waiting) -> Answer {
        let written = self.write(waiting);
        match &written {
            Ok(saved) => {
                self.mend();
                tracing::debug!(session = waiting.snapshot.session.0, ?saved, "a snapshot is on disk");
            }
            Err(SnapshotError::Disk(why)) => self.shelf.fail(why),
            Err(error @ SnapshotError::Full { .. }) => self.shelf.fail(error),
            Err(error) => tracing::debug!(%error, "a snapshot was not written"),
        }
        written
    }

    /// Writes a snapshot; leaves nothing of it where that fails.
    fn write(&self, waiting: &Waiting) -> Answer {
        if let (true, Some(why)) = {
            let state = self.shelf.state();
            (state.paused, state.failing.clone())
        } {
            return Err(SnapshotError::Disk(why));
        }
        let NewSnapshot { session, key, .. } = &waiting.snapshot;
        let (manifest, parts) = listed(&waiting.snapshot);
        self.room_for(&Coming { session: *session, owner: &key.owner, manifest: &manifest })?;
        let written = self.write_parts(waiting, &manifest, &parts);
        if written.is_err() {
            // What cannot be removed now is found by a later look.
            if let Err(error) = self.sweep() {
                tracing::debug!(%error, "parts of a snapshot that failed are left");
            }
        }
        written?;
        let owner = (self.known)(*session).filter(|_| !waiting.is_given_up());
        let Some(owner) = owner else {
            self.sweep()?;
            let gone = SnapshotError::GivenUp(GivenUp::Deleted);
            return Err(if waiting.is_given_up() { waiting.why() } else { gone });
        };
        let saved = manifest.saved();
        manifest.write(&*self.shelf.disk, *session)?;
        self.replace(*session, owner, manifest)?;
        Ok(saved)
    }

    /// Makes room for a snapshot.
    fn room_for(&self, coming: &Coming<'_>) -> Result<(), SnapshotError> {
        let Coming { session, owner, manifest } = *coming;
        let disk_bytes_max = self.shelf.settings.disk_bytes_max;
        let bytes = manifest.saved().bytes.saturating_add(manifest.size(session));
        if bytes > disk_bytes_max {
            return Err(SnapshotError::TooLarge { bytes, disk_bytes_max });
        }
        // What others have within an equal share does not go for it.
        let left_bytes = self.index(|index| index.left_to(owner, disk_bytes_max)).unwrap_or(disk_bytes_max);
        if bytes > left_bytes {
            return Err(SnapshotError::Share { bytes, left_bytes, disk_bytes_max });
        }
        self.make_room(Some(coming))?;
        // Not even the old one may stay until the new one is there.
        if self.index(|index| index.bytes_until(session, manifest)).is_none_or(|bytes| bytes > disk_bytes_max)
        {
            self.forget(session)?;
        }
        self.spare(coming)
    }

    /// Leaves room on the disk to others, the sessions first of all; evicts for it, if that is enough.
    fn spare(&self, coming: &Coming<'_>) -> Result<(), SnapshotError> {
        let Coming { session, manifest, .. } = *coming;
        loop {
            let Room { free_bytes, total_bytes } = self.shelf.disk.room()?;
            let spared_bytes = SPARED_BYTES.max(total_bytes / 100 * SPARED_PERCENT);
            let sizes = self.index(|index| (index.bytes(), index.bytes_until(session, manifest)));
            let (all, until) = sizes.unwrap_or_default();
            let needed = spared_bytes.saturating_add(until - all);
            if free_bytes >= needed {
                return Ok(());
            }
            let other = self.index(|index| index.first_to_go(Some(coming))).flatten();
            match other.filter(|_| free_bytes.saturating_add(all) >= needed) {
                Some(other) => self.forget(other)?,
                None => return Err(SnapshotError::Full { free_bytes, spared_bytes }),
            }
        }
    }

    fn write_parts(
        &self,
        waiting: &Waiting,
        manifest: &Manifest,
        parts: &[(Part, &KvContent)],
    ) -> Result<(), SnapshotError> {
        let (shelf, tokens) = (&*self.shelf, &waiting.snapshot.tokens);
        let disk = &*shelf.disk;
        let mut changed = false;
        for ((part, content), listed) in parts.iter().zip(&manifest.parts) {
            if self.index(|index| index.has(listed)) == Some(true) {
                continue;
            }
            let stop = || {
                shelf.advance();
                waiting.is_given_up()
            };
            let means = Means { disk, stop: &stop, patience: &shelf.patience };
            if let Err(error) = part.write(&means, tokens, &***content) {
                // It may be there under either name.
                drop(disk.remove(&format!("{}{NEW}", part.name.file())));
                return Err(match error {
                    WriteError::Io(error) => error.into(),
                    WriteError::Device(why) => SnapshotError::Device(why),
                    WriteError::GivenUp => waiting.why(),
                });
            }
            changed = true;
            self.index(|index| index.put(part.name, listed.bytes));
        }
        let named = if changed { disk.sync_names() } else { Ok(()) };
        let missing = manifest.parts.iter().any(|part| self.index(|index| index.has(part)) != Some(true));
        match named {
            Ok(()) if missing => Err(SnapshotError::Disk("the folder was not looked at".into())),
            named => Ok(named?),
        }
    }

    /// Notes that the disk works, and says so if it did not.
    fn mend(&self) {
        if self.shelf.state().failing.take().is_some() {
            tracing::info!("KV snapshots are written again");
        }
    }
}

/// Returns the manifest of a new snapshot, and its parts with what they hold.
pub(super) fn listed(snapshot: &NewSnapshot) -> (Manifest, Vec<(Part, &KvContent)>) {
    let NewSnapshot { session: _, key, layout, tokens, segments, used } = snapshot;
    let key = key_name(key);
    let mut naming = Naming::new(key, tokens);
    let mut parts = Vec::new();
    let mut add = |piece: Piece, content| {
        if let Some(name) = naming.name(&piece) {
            parts.push((Part::new(name, piece, layout), content));
        }
    };
    for segment in segments {
        segment.states.iter().for_each(|(length, content)| add(Piece::States(*length), content));
        add(Piece::Tokens(segment.tokens.clone()), &segment.content);
    }
    let list = |(part, _): &(Part, &KvContent)| Listed {
        piece: part.piece.clone(),
        name: part.name,
        bytes: part.size(),
    };
    (Manifest { key, used: seconds(*used), parts: parts.iter().map(list).collect() }, parts)
}

/// Gives up what waits, also where the thread panics: nobody writes it then.
struct End(Arc<Shelf>);

impl Drop for End {
    fn drop(&mut self) {
        self.0.abandon(std::thread::panicking());
    }
}
