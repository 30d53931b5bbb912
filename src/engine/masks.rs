//! The workers that compute what constrained outputs may draw next, beside the steps: some threads, and one
//! more for grammars that were slow, so that these keep nobody up. They begin with the first job; without
//! threads a job is done where it is given, as in tests, which may also hold jobs back.
//!
//! The engine's thread gives a job for each token of a constrained output, and looks for its answer when the
//! step that draws the next one is done.

use std::collections::BTreeMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::clock::{Clock, Moment};
use crate::grammar::{Allowed, Canceller, Grammar, IN_TIME, Matcher, Stuck};

/// Bytes of a worker's stack.
const STACK_BYTES: usize = 16 << 20;

/// Fewest jobs that wait before those are looked for that are of no use.
const SWEEP_MIN: usize = 64;

/// What a job comes to: the matcher is given back.
pub(super) type Answer = (Box<Matcher>, Result<Allowed, Stuck>);

/// A job that was given. If its answer is closed without one, it was not done.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) answer: Receiver<Answer>,
    progress: Arc<Progress>,
}

/// How far a job is.
#[derive(Debug, Default)]
struct Progress {
    /// Whether nobody wants its answer any more.
    is_useless: AtomicBool,
    /// Ends the work, once a worker is at it.
    begun: OnceLock<Canceller>,
}

/// A token that an output takes.
struct Job {
    grammar: Arc<Grammar>,
    /// The output's way through it; None before its first token.
    matcher: Option<Box<Matcher>>,
    token: u32,
    progress: Arc<Progress>,
    reply: SyncSender<Answer>,
}

/// The workers.
pub(super) struct MaskWorkers {
    threads: u32,
    clock: Arc<dyn Clock>,
    /// Where jobs go, those of slow grammars apart; None until the first one.
    lanes: Option<[Arc<Lane>; 2]>,
    /// Jobs that a test holds back.
    #[cfg(test)]
    held: Option<Vec<Job>>,
}

/// The jobs of some threads.
struct Lane {
    clock: Arc<dyn Clock>,
    waiting: Mutex<Waiting>,
    more: Condvar,
    /// Where jobs go whose grammar has become slow while they waited.
    slow: Option<Arc<Lane>>,
}

/// Jobs in the order of the moments at which they would be done if each were begun when it came, by the time
/// that their grammars took last: what takes long keeps up only what comes later or takes as long.
#[derive(Default)]
struct Waiting {
    jobs: BTreeMap<(Moment, u64), Job>,
    given: u64,
    /// Number of jobs from which on those are looked for that are of no use.
    sweep_at: usize,
    is_closed: bool,
}

impl Asked {
    /// Returns whether a worker has taken the job.
    pub(super) fn has_begun(&self) -> bool {
        self.progress.begun.get().is_some()
    }

    /// Ends the work: its answer is of no use.
    pub(super) fn cancel(&self) {
        // A worker that begins looks at this after it has told how to end it: one of the two sees the other.
        self.progress.is_useless.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if let Some(canceller) = self.progress.begun.get() {
            canceller.cancel();
        }
    }
}

impl Progress {
    fn is_useless(&self) -> bool {
        self.is_useless.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for MaskWorkers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MaskWorkers").field("threads", &self.threads).finish_non_exhaustive()
    }
}

impl MaskWorkers {
    /// Returns workers of this number of threads.
    pub(super) fn new(threads: u32, clock: Arc<dyn Clock>) -> Self {
        Self {
            threads,
            clock,
            lanes: None,
            #[cfg(test)]
            held: None,
        }
    }

    /// Lets an output take a token, and finds out what may follow. It has no matcher before the first one.
    pub(super) fn advance(
        &mut self,
        grammar: &Arc<Grammar>,
        matcher: Option<Box<Matcher>>,
        token: u32,
    ) -> Asked {
        let (reply, answer) = sync_channel(1);
        let progress = Arc::default();
        let asked = Asked { answer, progress: Arc::clone(&progress) };
        self.give(Job { grammar: Arc::clone(grammar), matcher, token, progress, reply });
        asked
    }

    fn give(&mut self, job: Job) {
        #[cfg(test)]
        if let Some(held) = &mut self.held {
            return held.push(job);
        }
        if self.threads == 0 {
            return job.run(&*self.clock);
        }
        if self.lanes.is_none() {
            self.lanes = self.begin();
        }
        match &self.lanes {
            Some([fast, _]) => fast.give(job),
            None => tracing::error!("no thread for masks could be started"),
        }
    }

    /// Starts the threads; None if the system has none.
    fn begin(&self) -> Option<[Arc<Lane>; 2]> {
        let slow = begin(("mask-slow", 1), &self.clock, None)?;
        let Some(fast) = begin(("mask", self.threads), &self.clock, Some(Arc::clone(&slow))) else {
            slow.close();
            return None;
        };
        Some([fast, slow])
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
        self.held.iter().flatten().for_each(|job| job.progress.begun.get().unwrap().cancel());
    }

    /// Does the jobs that were held back, and later ones at once. Returns their number.
    pub(super) fn release(&mut self) -> usize {
        let held = self.held.take().unwrap_or_default();
        let jobs = held.len();
        held.into_iter().for_each(|job| job.run(&*self.clock));
        jobs
    }
}

impl Drop for MaskWorkers {
    fn drop(&mut self) {
        self.lanes.iter().flatten().for_each(|lane| lane.close());
    }
}

/// Starts a number of threads for a lane; None if the system has none.
fn begin((name, threads): (&str, u32), clock: &Arc<dyn Clock>, slow: Option<Arc<Lane>>) -> Option<Arc<Lane>> {
    let (clock, waiting, more) = (Arc::clone(clock), Mutex::default(), Condvar::new());
    let lane = Arc::new(Lane { clock, waiting, more, slow });
    let mut begun = 0;
    for number in 0..threads {
        let jobs = Arc::clone(&lane);
        let thread = std::thread::Builder::new().name(format!("{name}-{number}")).stack_size(STACK_BYTES);
        match thread.spawn(move || jobs.work()) {
            Ok(_) => begun += 1,
            Err(error) => tracing::error!(%error, "a thread for masks"),
        }
    }
    (begun > 0).then_some(lane)
}

impl Lane {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a job; one of a slow grammar goes where those are done.
    fn give(&self, job: Job) {
        if let Some(slow) = self.slow.as_ref().filter(|_| job.grammar.pace().is_slow()) {
            return slow.give(job);
        }
        let done = self.clock.now().after(job.grammar.pace().last());
        let useless = self.waiting().add(done, job);
        self.more.notify_one();
        drop(useless);
    }

    /// Ends the threads; what they are at is done, the rest is not.
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
            if self.slow.is_some() && job.grammar.pace().is_slow() {
                self.give(job);
                continue;
            }
            // Its caller hears of a panic by the reply that does not come.
            if catch_unwind(AssertUnwindSafe(|| job.run(&*self.clock))).is_err() {
                tracing::error!("a mask worker failed");
            }
        }
    }
}

impl Waiting {
    /// Takes a job; returns those of no use, if there are many.
    fn add(&mut self, done: Moment, job: Job) -> BTreeMap<(Moment, u64), Job> {
        let mut useless = BTreeMap::new();
        if !self.is_closed {
            self.given += 1;
            self.jobs.insert((done, self.given), job);
        }
        if self.jobs.len() > self.sweep_at.max(SWEEP_MIN) {
            let all = std::mem::take(&mut self.jobs);
            (useless, self.jobs) = all.into_iter().partition(|(_, job)| job.progress.is_useless());
            self.sweep_at = 2 * self.jobs.len();
        }
        useless
    }
}

impl Job {
    /// Returns its matcher, and lets others know that a worker is at it.
    fn begin(&mut self) -> &mut Matcher {
        let matcher = self.matcher.get_or_insert_with(|| Box::new(self.grammar.matcher()));
        self.progress.begun.get_or_init(|| matcher.canceller());
        matcher
    }

    fn run(mut self, clock: &dyn Clock) {
        if self.progress.is_useless() {
            return;
        }
        let (began, token, progress) = (clock.now(), self.token, Arc::clone(&self.progress));
        let matcher = self.begin();
        fence(Ordering::SeqCst);
        if progress.is_useless() {
            return;
        }
        let allowed = matcher.advance(token).and_then(|()| matcher.allowed());
        let took = clock.now() - began;
        tracing::trace!(mask_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
        // One that was cut short says nothing, unless it had taken long by then.
        if took >= IN_TIME || !progress.is_useless() {
            self.grammar.pace().note(took);
        }
        if let Some(matcher) = self.matcher {
            // The output may have ended meanwhile.
            let _ = self.reply.send((matcher, allowed));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::engine::tests::grammars::grammar;
    use crate::engine::tests::{HandClock, tokenizer};

    fn lane(slow: Option<Arc<Lane>>) -> Arc<Lane> {
        let clock = Arc::new(HandClock(Mutex::default()));
        Arc::new(Lane { clock, waiting: Mutex::default(), more: Condvar::new(), slow })
    }

    /// Returns a job for a token, and what keeps its answer wanted.
    fn job(grammar: &Arc<Grammar>, token: u32) -> (Job, Asked) {
        let (reply, answer) = sync_channel(1);
        let progress: Arc<Progress> = Arc::default();
        let asked = Asked { answer, progress: Arc::clone(&progress) };
        (Job { grammar: Arc::clone(grammar), matcher: None, token, progress, reply }, asked)
    }

    #[test]
    fn jobs_go_by_the_time_that_they_take_and_the_slow_ones_apart() {
        let [fast, slower, slow] = [0, 4, 1000].map(|ms| {
            let grammar = grammar(&tokenizer(), "( t500){9}", &[]);
            grammar.pace().note(Duration::from_millis(ms));
            grammar
        });
        let slow_lane = lane(None);
        let fast_lane = lane(Some(Arc::clone(&slow_lane)));
        let given = [&slow, &slower, &fast, &slower].map(|grammar| {
            let (job, asked) = job(grammar, 500);
            fast_lane.give(job);
            asked
        });
        let next = |lane: &Lane, grammar: &Arc<Grammar>| {
            assert!(Arc::ptr_eq(&lane.next().unwrap().grammar, grammar));
        };
        next(&slow_lane, &slow);
        next(&fast_lane, &fast);
        next(&fast_lane, &slower);
        fast_lane.close();
        assert!(fast_lane.next().is_none(), "what waits is not done any more");
        assert!(given.iter().all(|asked| !asked.has_begun()));
    }

    #[test]
    fn jobs_that_nobody_wants_any_more_do_not_pile_up() {
        let grammar = grammar(&tokenizer(), "( t500){9}", &[]);
        let lane = lane(None);
        for _ in 0..10 * SWEEP_MIN {
            let (job, asked) = job(&grammar, 500);
            lane.give(job);
            asked.cancel();
        }
        assert!(lane.waiting().jobs.len() <= SWEEP_MIN);
        let (job, asked) = job(&grammar, 500);
        asked.cancel();
        job.run(&HandClock(Mutex::default()));
        assert!(!asked.has_begun() && asked.answer.recv().is_err());
    }
}
