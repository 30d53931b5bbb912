//! Threads that stand behind those of the steps, which somebody waits for: where there are few cores, loads
//! and the preparation of prompts are to take what the steps leave. Linux has a priority for each thread;
//! elsewhere nothing is changed.

#[cfg(target_os = "linux")]
use std::{cell::Cell, collections::HashSet, fs, io};

#[cfg(target_os = "linux")]
use rustix::process::{Pid, getpriority_process, setpriority_process};

/// Steps of niceness by which such a thread stands behind the others: beside a step's threads it gets about a
/// third of what each of those gets, so that its work still moves on where no core is ever idle.
#[cfg(target_os = "linux")]
const NICER: i32 = 5;

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
    use std::sync::mpsc::sync_channel;
    use std::thread::Builder;

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
}
