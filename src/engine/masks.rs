//! The workers that compute what constrained outputs may draw next, beside the steps: some threads, and one
//! more for grammars that were slow, so that these keep nobody up. They begin with the first job; without
//! threads a job is done where it is given, as in tests, which may also hold jobs back.
//!
//! The engine's thread gives a job for each token of a constrained output, and looks for its answer when the
//! step that draws the next one is done.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::grammar::{Allowed, Canceller, Grammar, Matcher, Pace, Stuck};

/// Bytes of a worker's stack.
const STACK_BYTES: usize = 16 << 20;

/// What a job comes to: the matcher is given back.
pub(super) type Answer = (Box<Matcher>, Result<Allowed, Stuck>);

/// An output's way through its grammar.
#[derive(Debug)]
pub(super) enum Way {
    /// It has not begun.
    Start(Arc<Grammar>),
    /// It goes on.
    On(Box<Matcher>),
}

/// A job that was given. If its answer is closed without one, it was not done. One that has not begun when
/// this is dropped is not done.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) answer: Receiver<Answer>,
    /// Ends the work, once a worker has begun it.
    begun: Arc<OnceLock<Canceller>>,
}

/// A token that a matcher is to take.
#[derive(Debug)]
struct Job {
    way: Way,
    token: u32,
    begun: Arc<OnceLock<Canceller>>,
    reply: SyncSender<Answer>,
}

/// The workers.
#[derive(Debug)]
pub(super) struct MaskWorkers {
    threads: u32,
    /// Where jobs go, those of slow grammars apart; None until the first one.
    lanes: Option<[Arc<Lane>; 2]>,
    /// Jobs that a test holds back.
    #[cfg(test)]
    held: Option<Vec<Job>>,
}

/// The jobs of some threads.
#[derive(Debug, Default)]
struct Lane {
    waiting: Mutex<Waiting>,
    more: Condvar,
}

/// Jobs in the order of the time that they will take, by what their grammars took last, and then in that in
/// which they came: what takes long keeps up only what takes as long. Each output has one at most.
#[derive(Debug, Default)]
struct Waiting {
    jobs: BTreeMap<(u32, u64), Job>,
    given: u64,
    is_closed: bool,
}

impl Asked {
    /// Returns whether a worker has taken the job.
    pub(super) fn has_begun(&self) -> bool {
        self.begun.get().is_some()
    }

    /// Ends the work: its answer is of no use.
    pub(super) fn cancel(&self) {
        if let Some(canceller) = self.begun.get() {
            canceller.cancel();
        }
    }
}

impl MaskWorkers {
    /// Returns workers of this number of threads.
    pub(super) fn new(threads: u32) -> Self {
        Self {
            threads,
            lanes: None,
            #[cfg(test)]
            held: None,
        }
    }

    /// Lets an output take a token, and finds out what may follow.
    pub(super) fn advance(&mut self, way: Way, token: u32, pace: &Pace) -> Asked {
        let (reply, answer) = sync_channel(1);
        let begun = Arc::new(OnceLock::new());
        self.give(Job { way, token, begun: Arc::clone(&begun), reply }, pace);
        Asked { answer, begun }
    }

    fn give(&mut self, job: Job, pace: &Pace) {
        #[cfg(test)]
        if let Some(held) = &mut self.held {
            return held.push(job);
        }
        if self.threads == 0 {
            return job.run();
        }
        let lanes = self.lanes.get_or_insert_with(|| [begin("mask", self.threads), begin("mask-slow", 1)]);
        lanes[usize::from(pace.is_slow())].give(job, pace.last_us());
    }
}

/// What tests do.
#[cfg(test)]
impl MaskWorkers {
    /// Holds jobs back from now on.
    pub(super) fn hold(&mut self) {
        self.held.get_or_insert_default();
    }

    /// Lets workers be at the jobs that are held back.
    pub(super) fn begin_held(&mut self) {
        self.held.iter_mut().flatten().for_each(|job| {
            job.begin();
        });
    }

    /// Lets the jobs fail that are held back.
    pub(super) fn fail_held(&mut self) {
        self.begin_held();
        self.held.iter().flatten().for_each(|job| job.begun.get().unwrap().cancel());
    }

    /// Does the jobs that were held back, and later ones at once. Returns their number.
    pub(super) fn release(&mut self) -> usize {
        let held = self.held.take().unwrap_or_default();
        let jobs = held.len();
        held.into_iter().for_each(Job::run);
        jobs
    }
}

impl Drop for MaskWorkers {
    fn drop(&mut self) {
        self.lanes.iter().flatten().for_each(|lane| lane.close());
    }
}

/// Starts threads for a lane. If the system has none, nobody takes its jobs.
fn begin(name: &str, threads: u32) -> Arc<Lane> {
    let lane = Arc::new(Lane::default());
    let mut begun = 0;
    for number in 0..threads {
        let jobs = Arc::clone(&lane);
        let thread = std::thread::Builder::new().name(format!("{name}-{number}")).stack_size(STACK_BYTES);
        match thread.spawn(move || jobs.work()) {
            Ok(_) => begun += 1,
            Err(error) => tracing::error!(%error, "a thread for masks"),
        }
    }
    if begun == 0 {
        lane.close();
    }
    lane
}

impl Lane {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a job that will take some microseconds.
    fn give(&self, job: Job, us: u32) {
        let mut waiting = self.waiting();
        if waiting.is_closed {
            return tracing::error!("a mask is not computed: there are no workers");
        }
        waiting.given += 1;
        let number = waiting.given;
        waiting.jobs.insert((us, number), job);
        drop(waiting);
        self.more.notify_one();
    }

    /// Ends the threads, once each has done its job.
    fn close(&self) {
        let mut waiting = self.waiting();
        waiting.is_closed = true;
        waiting.jobs.clear();
        drop(waiting);
        self.more.notify_all();
    }

    fn next(&self) -> Option<Job> {
        let none = |waiting: &mut Waiting| waiting.jobs.is_empty() && !waiting.is_closed;
        let waiting = self.more.wait_while(self.waiting(), none);
        waiting.unwrap_or_else(PoisonError::into_inner).jobs.pop_first().map(|(_, job)| job)
    }

    fn work(&self) {
        while let Some(job) = self.next() {
            // Its caller hears of a panic by the reply that does not come.
            if catch_unwind(AssertUnwindSafe(|| job.run())).is_err() {
                tracing::error!("a mask worker failed");
            }
        }
    }
}

impl Job {
    /// Returns its matcher, and lets others know that a worker is at it.
    fn begin(&mut self) -> &mut Matcher {
        if let Way::Start(grammar) = &self.way {
            self.way = Way::On(Box::new(grammar.matcher()));
        }
        let Way::On(matcher) = &mut self.way else { unreachable!("it has begun") };
        self.begun.get_or_init(|| matcher.canceller());
        matcher
    }

    fn run(mut self) {
        // Nobody waits for it any more: its output has ended.
        if Arc::strong_count(&self.begun) == 1 {
            return;
        }
        let token = self.token;
        let matcher = self.begin();
        let allowed = matcher.advance(token).and_then(|()| matcher.allowed());
        tracing::trace!(mask_us = matcher.mask_us());
        if let Way::On(matcher) = self.way {
            // The output may have ended meanwhile.
            let _ = self.reply.send((matcher, allowed));
        }
    }
}
