//! What the writer, the engine and those who load share: what waits to be written, and what is known of the
//! folder.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

use super::index::Index;
use super::manifest::{self, Manifest, Read};
use super::name::Name;
use super::{GivenUp, NewSnapshot, SavedSnapshot, SnapshotError, SnapshotSettings, SnapshotStats};
use crate::count::count;
use crate::ids::SessionId;
use crate::store::disk::Disk;

/// Most forks that wait for their lists, each with its tokens; others compute what they lack.
const FORKS_MAX: usize = 256;

/// What a save came to.
pub(super) type Answer = Result<SavedSnapshot, SnapshotError>;

/// A snapshot that is to be written. Whoever is told that it was given up finds its arrays freed.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) snapshot: NewSnapshot,
    /// Bytes of its arrays.
    pub(super) bytes: u64,
    given_up: AtomicBool,
    answer: Mutex<Answering>,
}

impl Waiting {
    pub(super) fn is_given_up(&self) -> bool {
        self.given_up.load(Ordering::Acquire)
    }

    /// Notes that it need not be written.
    fn give_up(&self, why: GivenUp) {
        self.answering().why = why;
        self.given_up.store(true, Ordering::Release);
    }

    /// Returns why it was given up.
    pub(super) fn why(&self) -> SnapshotError {
        SnapshotError::GivenUp(self.answering().why)
    }

    /// Lets go of it, then says what became of it.
    pub(super) fn finish(self: Arc<Self>, answer: Answer) {
        let sender = self.answering().sender.take();
        drop(self);
        // Nobody need wait for it.
        sender.map(|sender| sender.send(answer).ok());
    }

    fn answering(&self) -> MutexGuard<'_, Answering> {
        self.answer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Who waits for an answer. If there is none, it was given up.
#[derive(Debug)]
struct Answering {
    sender: Option<oneshot::Sender<Answer>>,
    why: GivenUp,
}

impl Drop for Answering {
    fn drop(&mut self) {
        let why = SnapshotError::GivenUp(self.why);
        self.sender.take().map(|sender| sender.send(Err(why)).ok());
    }
}

/// Work of the writer.
#[derive(Debug)]
pub(super) enum Job {
    Save(Arc<Waiting>),
    Fork {
        from: SessionId,
        to: SessionId,
        tokens: Arc<[u32]>,
    },
    Forget(SessionId),
    /// Removes a file that is not what was written.
    Discard(Name),
    /// Removes snapshots of this number of bytes: the disk is full, and others have to write.
    MakeWay(u64),
}

impl Job {
    /// Returns the snapshot that it writes.
    fn saved(&self) -> Option<&Arc<Waiting>> {
        match self {
            Self::Save(waiting) => Some(waiting),
            Self::Fork { .. } | Self::Forget(_) | Self::Discard(_) | Self::MakeWay(_) => None,
        }
    }
}

pub(super) struct Shelf {
    pub(super) disk: Box<dyn Disk>,
    pub(super) settings: SnapshotSettings,
    /// Whether arrays are freed by a thread of their own, since that takes a while.
    pub(super) frees_apart: bool,
    /// The writer's patience when it begins with what waits; zero where it has no thread.
    pub(super) patience_max: u32,
    /// What is left of it, counted as [`crate::priority::while_idle`] does.
    pub(super) patience: AtomicU32,
    state: Mutex<State>,
    wake: Condvar,
    /// Number of pieces of work that the writer has come to.
    progress: AtomicU64,
}

#[derive(Default)]
pub(super) struct State {
    jobs: VecDeque<Job>,
    /// Whether the writer is at one, or looks at the folder.
    pub(super) working: bool,
    /// The progress at the last look at it.
    progress_seen: u64,
    /// What is being written.
    writing: Option<Arc<Waiting>>,
    /// The session whose list may be written now.
    busy: Option<SessionId>,
    queued_bytes: u64,
    ended: bool,
    /// Whether nobody writes any more.
    finished: bool,
    /// What the folder holds, once it was looked at.
    pub(super) index: Option<Index>,
    /// Whether the folder may hold something else.
    pub(super) unsure: bool,
    /// Why the last write failed; none once one worked.
    pub(super) failing: Option<String>,
    /// Whether the disk is left alone for a while.
    pub(super) paused: bool,
    pub(super) last_error: Option<String>,
}

impl State {
    /// Returns the snapshot of a session that waits or is being written: the newest.
    fn waiting(&self, session: SessionId) -> Option<&Arc<Waiting>> {
        let jobs = self.jobs.iter().rev().filter_map(Job::saved);
        jobs.chain(&self.writing)
            .find(|waiting| waiting.snapshot.session == session && !waiting.is_given_up())
    }

    /// Takes out of the queue what waits of a session, or of all, and says why.
    fn withdraw(&mut self, session: Option<SessionId>, why: GivenUp) -> Vec<Arc<Waiting>> {
        let is_wanted =
            |waiting: &&Arc<Waiting>| session.is_none_or(|session| session == waiting.snapshot.session);
        let saved = self.jobs.iter().filter_map(Job::saved);
        let withdrawn: Vec<_> = saved.filter(is_wanted).cloned().collect();
        self.jobs.retain(|job| !job.saved().is_some_and(|waiting| is_wanted(&waiting)));
        self.queued_bytes -= withdrawn.iter().map(|waiting| waiting.bytes).sum::<u64>();
        withdrawn.iter().for_each(|waiting| waiting.give_up(why));
        withdrawn
    }

    /// Returns the bytes that wait of a session, without those that are being written.
    fn bytes_of(&self, session: SessionId) -> u64 {
        let saved = self.jobs.iter().filter_map(Job::saved);
        saved.filter(|waiting| waiting.snapshot.session == session).map(|waiting| waiting.bytes).sum()
    }

    /// Has what is being written given up, before its next piece; of one session, or whose it may be.
    fn interrupt(&self, session: Option<SessionId>, why: GivenUp) {
        let is_wanted =
            |waiting: &&Arc<Waiting>| session.is_none_or(|session| session == waiting.snapshot.session);
        self.writing.iter().filter(is_wanted).for_each(|waiting| waiting.give_up(why));
    }

    /// Returns whether a job would do nothing, as far as is known.
    fn is_idle(&self, job: &Job) -> bool {
        let has = |session: SessionId| {
            self.index.as_ref().is_none_or(|index| index.get(session).is_some())
                || self.unsure
                || self.waiting(session).is_some()
                || self.busy == Some(session)
                || self.jobs.iter().any(|job| matches!(job, Job::Fork { to, .. } if *to == session))
        };
        match job {
            Job::Save(_) => false,
            Job::Fork { from, .. } => !has(*from),
            Job::Forget(session) => {
                let twice = self.jobs.iter().any(|job| matches!(job, Job::Forget(other) if other == session));
                twice || !has(*session)
            }
            Job::Discard(name) => {
                self.jobs.iter().any(|job| matches!(job, Job::Discard(other) if other == name))
            }
            Job::MakeWay(_) => self.jobs.iter().any(|job| matches!(job, Job::MakeWay(_))),
        }
    }
}

impl Shelf {
    pub(super) fn new(disk: Box<dyn Disk>, settings: SnapshotSettings) -> Self {
        let (state, wake, progress, patience) = Default::default();
        Self { disk, settings, frees_apart: false, patience_max: 0, patience, state, wake, progress }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a snapshot into the queue.
    pub(super) fn save(&self, snapshot: NewSnapshot) -> Result<oneshot::Receiver<Answer>, SnapshotError> {
        let SnapshotSettings { queue_bytes_max, .. } = self.settings;
        let bytes = snapshot.bytes();
        let mut state = self.state();
        if state.ended {
            return Err(SnapshotError::GivenUp(GivenUp::Ended));
        }
        if let (true, Some(why)) = (state.paused, &state.failing) {
            return Err(SnapshotError::Disk(why.clone()));
        }
        // The one before goes only if this one may wait; what is being written goes on, and is replaced.
        let queued_bytes = state.queued_bytes - state.bytes_of(snapshot.session);
        // One that is larger than the limit can only be written alone.
        if queued_bytes > 0 && queued_bytes.saturating_add(bytes) > queue_bytes_max {
            return Err(SnapshotError::Busy { queued_bytes, queue_bytes_max });
        }
        let (sender, receiver) = oneshot::channel();
        let withdrawn = state.withdraw(Some(snapshot.session), GivenUp::Replaced);
        // Whoever drops it without a word is the end.
        let answer = Mutex::new(Answering { sender: Some(sender), why: GivenUp::Ended });
        let given_up = AtomicBool::new(false);
        state.jobs.push_back(Job::Save(Arc::new(Waiting { snapshot, bytes, given_up, answer })));
        state.queued_bytes = queued_bytes.saturating_add(bytes);
        drop(state);
        self.wake.notify_all();
        self.free(withdrawn);
        Ok(receiver)
    }

    /// Returns whether there may be snapshots to remove.
    pub(super) fn has_some(&self) -> bool {
        let state = self.state();
        !state.ended && state.index.as_ref().is_none_or(|index| index.len() > 0)
    }

    /// Has a job done after those that wait, unless it would do nothing.
    pub(super) fn add(&self, job: Job) {
        let mut state = self.state();
        let mut withdrawn = Vec::new();
        if let Job::Forget(session) = &job {
            state.interrupt(Some(*session), GivenUp::Deleted);
            state.jobs.retain(|job| !matches!(job, Job::Fork { to, .. } if to == session));
            withdrawn = state.withdraw(Some(*session), GivenUp::Deleted);
        }
        let forks = |state: &State| state.jobs.iter().filter(|job| matches!(job, Job::Fork { .. })).count();
        let is_one_too_many = matches!(job, Job::Fork { .. }) && forks(&state) >= FORKS_MAX;
        if !state.ended && !is_one_too_many && !state.is_idle(&job) {
            if matches!(job, Job::MakeWay(_)) {
                // Those who wait for it write sessions, which nothing replaces.
                state.interrupt(None, GivenUp::Full);
                self.patience.store(0, Ordering::Relaxed);
                state.jobs.push_front(job);
            } else {
                state.jobs.push_back(job);
            }
        }
        drop(state);
        self.wake.notify_all();
        self.free(withdrawn);
    }

    /// Gives up all saves, the one that is being written before its next piece.
    pub(super) fn give_up(&self, why: GivenUp) {
        let mut state = self.state();
        state.interrupt(None, why);
        let withdrawn = state.withdraw(None, why);
        drop(state);
        self.free(withdrawn);
    }

    /// Frees arrays, after which those who wait are told.
    fn free(&self, withdrawn: Vec<Arc<Waiting>>) {
        if self.frees_apart && !withdrawn.is_empty() {
            // If there is no thread, they are freed here, with the closure.
            drop(std::thread::Builder::new().name("kv-free".into()).spawn(move || drop(withdrawn)));
        }
    }

    /// Takes the next job; what it saves is still found. None if there is none.
    pub(super) fn next(&self) -> Option<Job> {
        self.advance();
        let mut state = self.state();
        let job = state.jobs.pop_front();
        state.working = job.is_some();
        state.busy = match &job {
            Some(Job::Save(waiting)) => {
                state.writing = Some(Arc::clone(waiting));
                Some(waiting.snapshot.session)
            }
            Some(Job::Fork { to, .. }) => Some(*to),
            Some(Job::Forget(_) | Job::Discard(_) | Job::MakeWay(_)) | None => None,
        };
        job
    }

    /// Lets the writer wait for idle processors again, unless that is the end.
    pub(super) fn be_patient(&self, state: &State) {
        let patience = if state.ended { 0 } else { self.patience_max };
        self.patience.store(patience, Ordering::Relaxed);
    }

    /// Notes that the writer has come to another piece of its work.
    pub(super) fn advance(&self) {
        self.progress.fetch_add(1, Ordering::Relaxed);
    }

    /// Gives up all saves if the writer has come no further since the last call.
    pub(super) fn look_after(&self) {
        let progress = self.progress.load(Ordering::Relaxed);
        let mut state = self.state();
        let is_held = state.working && state.progress_seen == progress;
        state.progress_seen = progress;
        if !is_held {
            return;
        }
        state.interrupt(None, GivenUp::Held);
        let withdrawn = state.withdraw(None, GivenUp::Held);
        state.jobs.retain(|job| !matches!(job, Job::Fork { .. }));
        drop(state);
        self.fail(&GivenUp::Held);
        self.free(withdrawn);
    }

    /// Notes that the disk fails, and says so once.
    pub(super) fn fail(&self, error: &dyn std::fmt::Display) {
        let mut state = self.state();
        let why = error.to_string();
        let was_failing = state.failing.replace(why.clone()).is_some();
        // Of what was being done, something may have come about.
        (state.paused, state.unsure) = (true, true);
        state.last_error = Some(why);
        drop(state);
        if !was_failing {
            tracing::warn!(%error, "KV snapshots cannot be written; sessions are recomputed from their tokens");
        }
    }

    /// Notes that what was being written no longer waits.
    pub(super) fn done(&self) {
        let mut state = self.state();
        let done = state.writing.take();
        state.queued_bytes -= done.as_ref().map_or(0, |waiting| waiting.bytes);
    }

    /// Waits for the end, or for `limit`: the disk is left alone. To make way for others is not put off.
    pub(super) fn pause(&self, limit: Duration) {
        let goes_on =
            |state: &mut State| !state.ended && !matches!(state.jobs.front(), Some(Job::MakeWay(_)));
        drop(self.wake.wait_timeout_while(self.state(), limit, goes_on));
    }

    /// Waits until nobody writes any more, or for `limit`. Returns whether nobody does.
    pub(super) fn finished(&self, limit: Duration) -> bool {
        let goes_on = |state: &mut State| !state.finished;
        let waited = self.wake.wait_timeout_while(self.state(), limit, goes_on);
        waited.unwrap_or_else(PoisonError::into_inner).0.finished
    }

    /// Waits for a job or the end, or for `limit`. Returns whether it has ended and nothing waits.
    pub(super) fn wait(&self, limit: Option<Duration>) -> bool {
        let is_idle = |state: &mut State| state.jobs.is_empty() && !state.ended;
        let state = self.state();
        let state = match limit {
            Some(limit) => {
                self.wake.wait_timeout_while(state, limit, is_idle).unwrap_or_else(PoisonError::into_inner).0
            }
            None => self.wake.wait_while(state, is_idle).unwrap_or_else(PoisonError::into_inner),
        };
        state.ended && state.jobs.is_empty()
    }

    /// Takes no more jobs; those that wait are done, and at once.
    pub(super) fn end(&self) {
        let mut state = self.state();
        state.ended = true;
        self.be_patient(&state);
        drop(state);
        self.wake.notify_all();
    }

    /// Gives up all that waits: nobody writes it any more, because of a defect if `failed`.
    pub(super) fn abandon(&self, failed: bool) {
        let mut state = self.state();
        (state.ended, state.finished) = (true, true);
        if failed {
            let why = "the thread that writes has ended";
            (state.failing, state.last_error) = (Some(why.into()), Some(why.into()));
        }
        let (jobs, writing) = (std::mem::take(&mut state.jobs), state.writing.take());
        state.queued_bytes = 0;
        drop(state);
        self.wake.notify_all();
        drop((jobs, writing));
    }

    /// Returns a snapshot that waits.
    pub(super) fn waiting(&self, session: SessionId) -> Option<Arc<Waiting>> {
        self.state().waiting(session).map(Arc::clone)
    }

    /// Returns a session's manifest.
    pub(super) fn manifest(&self, session: SessionId) -> Result<Manifest, SnapshotError> {
        if let Some(index) = &self.state().index {
            return index.get(session).cloned().ok_or(SnapshotError::Missing);
        }
        match manifest::read(&*self.disk, session) {
            Ok(Read::Whole(manifest)) => Ok(manifest),
            Ok(Read::Missing) => Err(SnapshotError::Missing),
            Ok(Read::Damaged) => Err(SnapshotError::Damaged(manifest::file(session))),
            Err(error) => Err(error.into()),
        }
    }

    /// Notes that a session's snapshot is used.
    pub(super) fn touch(&self, session: SessionId) {
        if let Some(index) = &mut self.state().index {
            index.touch(session);
        }
    }

    pub(super) fn stats(&self) -> SnapshotStats {
        let state = self.state();
        let State { queued_bytes, index, failing, last_error, .. } = &*state;
        SnapshotStats {
            enabled: failing.is_none(),
            bytes: index.as_ref().map_or(0, Index::bytes),
            count: index.as_ref().map_or(0, |index| count(index.len())),
            queued_bytes: *queued_bytes,
            last_error: last_error.clone(),
        }
    }
}
