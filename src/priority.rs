//! Threads that stand behind those of the steps, which somebody waits for: where there are few cores, loads
//! and the preparation of prompts are to take what the steps leave. Linux has a priority for each thread;
//! elsewhere nothing is changed.

use std::sync::atomic::AtomicU32;
#[cfg(target_os = "linux")]
use std::{
    cell::Cell,
    collections::HashSet,
    fs, io,
    sync::atomic::Ordering,
    sync::mpsc::{RecvTimeoutError, sync_channel},
    time::Duration,
};

#[cfg(target_os = "linux")]
use rustix::process::{Pid, getpriority_process, setpriority_process};
#[cfg(target_os = "linux")]
use thread_priority::{
    NormalThreadSchedulePolicy, ThreadPriority, ThreadSchedulePolicy, set_thread_priority_and_policy,
    thread_native_id,
};

/// Steps of niceness by which such a thread stands behind the others: beside a step's threads it gets about a
/// third of what each of those gets, so that its work still moves on where no core is ever idle.
#[cfg(target_os = "linux")]
const NICER: i32 = 5;

/// Time that costs whoever waits for idle processors one of its patience.
#[cfg(target_os = "linux")]
const TICK: Duration = Duration::from_millis(10);

/// Lowers the priority of the calling thread, unless that was done before.
pub(crate) fn stand_behind() {
    #[cfg(target_os = "linux")]
    {
        thread_local! { static STANDS_BEHIND: Cell<bool> = const { Cell::new(false) } }
        if !STANDS_BEHIND.replace(true) {
            lower(None);
        }
    }
}

/// Runs `start` and lowers the priority of the threads that it starts.
#[cfg(target_os = "linux")]
pub(crate) fn in_background<T>(start: impl FnOnce() -> T) -> T {
    let before = own_threads().unwrap_or_default();
    let started = start();
    for thread in own_threads().unwrap_or_default().difference(&before) {
        lower(Some(*thread));
    }
    started
}

/// Runs `start`.
#[cfg(not(target_os = "linux"))]
pub(crate) fn in_background<T>(start: impl FnOnce() -> T) -> T {
    start()
}

/// Runs `work` on a thread that has only what nobody else takes of the processors, and waits for it while it
/// counts `patience` down, by one each hundredth of a second and one at the end. `work` looks at it often and
/// leaves off once it is zero, since such a thread cannot be hurried: without privileges Linux lets none out
/// of the class. It may be put aside wherever it is, for seconds, and is waited for even then; so `work`
/// holds no lock that others want. Returns what it came to; None if it was not begun, because there was no
/// patience or the system has no such threads.
#[cfg(target_os = "linux")]
pub(crate) fn while_idle<T: Send>(
    name: &str,
    patience: &AtomicU32,
    work: impl FnOnce() -> T + Send,
) -> Option<T> {
    if patience.load(Ordering::Relaxed) == 0 {
        return None;
    }
    std::thread::scope(|scope| {
        let (goes_on, ended) = sync_channel::<()>(0);
        let body = move || {
            let _goes_on = goes_on;
            take_what_is_idle();
            work()
        };
        let thread = std::thread::Builder::new().name(name.into()).spawn_scoped(scope, body).ok()?;
        let mut goes_on = true;
        while goes_on {
            goes_on = ended.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout);
            let less = |patience: u32| Some(patience.saturating_sub(1));
            let _ = patience.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
        }
        Some(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

/// Returns None: the system has no such threads.
#[cfg(not(target_os = "linux"))]
pub(crate) fn while_idle<T: Send>(
    _name: &str,
    _patience: &AtomicU32,
    _work: impl FnOnce() -> T + Send,
) -> Option<T> {
    None
}

/// Gives the calling thread what nobody else takes of the processors, for good; where the system does not
/// allow that it stays as it is.
#[cfg(target_os = "linux")]
fn take_what_is_idle() {
    let idle = ThreadSchedulePolicy::Normal(NormalThreadSchedulePolicy::Idle);
    // The class is changed first, then its niceness, which has no meaning in it and may not be ours to lower.
    let _ = set_thread_priority_and_policy(thread_native_id(), ThreadPriority::Min, idle);
}

/// Returns the threads that this one has started, itself included: they have its name, until they have one of
/// their own.
#[cfg(target_os = "linux")]
fn own_threads() -> io::Result<HashSet<Pid>> {
    let name = fs::read("/proc/thread-self/comm")?;
    let mut found = HashSet::new();
    for entry in fs::read_dir("/proc/self/task")? {
        let entry = entry?;
        // A thread may have ended since.
        if fs::read(entry.path().join("comm")).is_ok_and(|other| other == name) {
            let id = entry.file_name().to_str().and_then(|id| id.parse().ok());
            found.extend(id.and_then(Pid::from_raw));
        }
    }
    Ok(found)
}

/// Lowers the priority of a thread; None is the calling one. One that has ended, or whose priority is not
/// ours to change, stays as it is.
#[cfg(target_os = "linux")]
fn lower(thread: Option<Pid>) {
    let _ = getpriority_process(thread).and_then(|now| setpriority_process(thread, now + NICER));
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::thread::Builder;

    use thread_priority::thread_schedule_policy;

    use super::*;

    fn niceness() -> io::Result<i32> {
        Ok(getpriority_process(None)?)
    }

    #[test]
    fn a_thread_is_lowered_once() {
        let body = || {
            let before = niceness().unwrap();
            stand_behind();
            stand_behind();
            assert_eq!(niceness().unwrap(), (before + NICER).min(19));
        };
        Builder::new().spawn(body).unwrap().join().unwrap();
    }

    #[test]
    fn a_thread_that_is_started_in_the_background_stands_behind_the_others() {
        let body = || {
            let own = niceness().unwrap();
            let (go, wait) = sync_channel::<()>(1);
            let (tell, told) = sync_channel(1);
            let asked = tell.clone();
            let background = in_background(|| {
                let body = move || {
                    let _ = wait.recv();
                    tell.send(niceness().unwrap()).unwrap();
                };
                Builder::new().spawn(body).unwrap()
            });
            drop(go);
            background.join().unwrap();
            assert_eq!(told.recv().unwrap(), (own + NICER).min(19));
            let other = Builder::new().spawn(move || asked.send(niceness().unwrap()));
            other.unwrap().join().unwrap().unwrap();
            assert_eq!((told.recv().unwrap(), niceness().unwrap()), (own, own), "the others keep theirs");
        };
        Builder::new().name("one-of-its-own".into()).spawn(body).unwrap().join().unwrap();
    }

    #[test]
    fn idle_work_is_of_the_idle_class_and_who_waits_for_it_keeps_its_own() {
        let body = || {
            let own = (thread_schedule_policy().unwrap(), niceness().unwrap());
            let found = while_idle("idle", &AtomicU32::new(u32::MAX), thread_schedule_policy);
            let idle = ThreadSchedulePolicy::Normal(NormalThreadSchedulePolicy::Idle);
            assert_eq!(found.unwrap().unwrap(), idle);
            assert_eq!((thread_schedule_policy().unwrap(), niceness().unwrap()), own);
        };
        Builder::new().spawn(body).unwrap().join().unwrap();
    }

    #[test]
    fn idle_work_leaves_off_when_who_waits_for_it_has_waited_long_enough() {
        let patience = AtomicU32::new(1);
        let work = || {
            while patience.load(Ordering::Relaxed) > 0 {
                std::thread::yield_now();
            }
            7
        };
        assert_eq!(while_idle("idle", &patience, work), Some(7));
        assert_eq!(while_idle("idle", &patience, || 8), None, "nobody waits any more");
    }

    #[test]
    fn idle_work_that_ends_at_once_costs_patience_too() {
        let patience = AtomicU32::new(3);
        let begun = (0..9).filter_map(|_| while_idle("idle", &patience, || ())).count();
        assert!((1..=3).contains(&begun), "{begun}");
    }
}
