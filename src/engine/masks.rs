//! The workers that compute what constrained outputs may draw next, beside the steps: some threads, and one
//! more for outputs that were slow, so that these keep nobody up. They begin with the first job; without
//! threads a job is done where it is given, as in tests, which may also hold jobs back.
//!
//! The engine's thread gives a job for each token of a constrained output, and looks for its answer when the
//! step that draws the next one is done.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use crate::grammar::{Allowed, Matcher, Stuck};

/// Most jobs that wait: each sequence has one at most, and no engine runs as many.
const JOBS_MAX: usize = 1 << 14;

/// Bytes of a worker's stack.
const STACK_BYTES: usize = 16 << 20;

/// What a job comes to: the matcher is given back.
pub(super) type Answer = (Box<Matcher>, Result<Allowed, Stuck>);

/// A job that was given. If its answer is closed without one, it was not done.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) answer: Receiver<Answer>,
    begun: Arc<AtomicBool>,
}

/// A token that a matcher is to take.
#[derive(Debug)]
struct Job {
    matcher: Box<Matcher>,
    token: u32,
    begun: Arc<AtomicBool>,
    reply: SyncSender<Answer>,
}

/// The workers.
#[derive(Debug)]
pub(super) struct MaskWorkers {
    threads: u32,
    /// Where jobs go, those of slow outputs apart; None until the first one.
    queues: Option<[SyncSender<Job>; 2]>,
    /// Jobs that a test holds back.
    #[cfg(test)]
    held: Option<Vec<Job>>,
}

impl Asked {
    /// Returns whether a worker has taken the job.
    pub(super) fn has_begun(&self) -> bool {
        self.begun.load(Ordering::Relaxed)
    }
}

impl MaskWorkers {
    /// Returns workers of this number of threads.
    pub(super) fn new(threads: u32) -> Self {
        Self {
            threads,
            queues: None,
            #[cfg(test)]
            held: None,
        }
    }

    /// Lets a matcher take a token, and find out what may follow.
    pub(super) fn advance(&mut self, matcher: Box<Matcher>, token: u32, is_slow: bool) -> Asked {
        let (reply, answer) = sync_channel(1);
        let begun = Arc::new(AtomicBool::new(false));
        let job = Job { matcher, token, begun: Arc::clone(&begun), reply };
        self.give(job, is_slow);
        Asked { answer, begun }
    }

    fn give(&mut self, job: Job, is_slow: bool) {
        #[cfg(test)]
        if let Some(held) = &mut self.held {
            return held.push(job);
        }
        if self.threads == 0 {
            return job.run();
        }
        let queues = self.queues.get_or_insert_with(|| [begin("mask", self.threads), begin("mask-slow", 1)]);
        if queues[usize::from(is_slow)].try_send(job).is_err() {
            tracing::error!("a mask is not computed: no worker takes it");
        }
    }

    /// Holds jobs back from now on.
    #[cfg(test)]
    pub(super) fn hold(&mut self) {
        self.held.get_or_insert_default();
    }

    /// Lets workers be at the jobs that are held back.
    #[cfg(test)]
    pub(super) fn begin_held(&self) {
        self.held.iter().flatten().for_each(|job| job.begun.store(true, Ordering::Relaxed));
    }

    /// Does the jobs that were held back, and later ones at once. Returns their number.
    #[cfg(test)]
    pub(super) fn release(&mut self) -> usize {
        let held = self.held.take().unwrap_or_default();
        let jobs = held.len();
        held.into_iter().for_each(Job::run);
        jobs
    }
}

/// Starts threads of one queue, which end with the engine. If the system has none, nobody takes its jobs.
fn begin(name: &str, threads: u32) -> SyncSender<Job> {
    let (sender, receiver) = sync_channel(JOBS_MAX);
    let receiver = Arc::new(Mutex::new(receiver));
    for number in 0..threads {
        let jobs = Arc::clone(&receiver);
        let thread = std::thread::Builder::new().name(format!("{name}-{number}")).stack_size(STACK_BYTES);
        if let Err(error) = thread.spawn(move || work(&jobs)) {
            tracing::error!(%error, "a thread for masks");
        }
    }
    sender
}

fn work(jobs: &Mutex<Receiver<Job>>) {
    loop {
        // Held while waiting: who gets the lock gets the next job.
        let next = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(job) = next else { return };
        // Its caller hears of a panic by the reply that does not come.
        if catch_unwind(AssertUnwindSafe(|| job.run())).is_err() {
            tracing::error!("a mask worker failed");
        }
    }
}

impl Job {
    fn run(self) {
        let Self { mut matcher, token, begun, reply } = self;
        begun.store(true, Ordering::Relaxed);
        let allowed = matcher.advance(token).and_then(|()| matcher.allowed());
        tracing::trace!(mask_us = matcher.mask_us());
        // The sequence may have ended meanwhile.
        let _ = reply.send((matcher, allowed));
    }
}
