//! Threads of MLX that compute beside steps, for loads: where there are few cores they are to take what the
//! steps leave. Linux has a priority for each thread; elsewhere nothing is changed.

#[cfg(target_os = "linux")]
use std::{collections::BTreeSet, fs, io};

/// Steps of niceness by which such a thread stands behind the others: beside a step's threads it gets about a
/// third of what each of those gets, so that a load still moves on where no core is ever idle.
#[cfg(target_os = "linux")]
const NICER: libc::c_int = 5;

/// Runs `start` and lowers the priority of the threads that it starts.
#[cfg(target_os = "linux")]
pub(crate) fn in_background<T>(start: impl FnOnce() -> T) -> T {
    let before = own_threads().unwrap_or_default();
    let started = start();
    for thread in own_threads().unwrap_or_default().difference(&before) {
        lower(*thread);
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
fn own_threads() -> io::Result<BTreeSet<libc::id_t>> {
    let name = fs::read("/proc/thread-self/comm")?;
    let mut found = BTreeSet::new();
    for entry in fs::read_dir("/proc/self/task")? {
        let entry = entry?;
        // A thread may have ended since.
        if fs::read(entry.path().join("comm")).is_ok_and(|other| other == name) {
            found.extend(entry.file_name().to_str().and_then(|id| id.parse::<libc::id_t>().ok()));
        }
    }
    Ok(found)
}

#[cfg(target_os = "linux")]
fn lower(thread: libc::id_t) {
    // SAFETY: both calls take numbers only; a thread that does not exist is an error that changes nothing.
    unsafe {
        let now = libc::getpriority(libc::PRIO_PROCESS, thread);
        libc::setpriority(libc::PRIO_PROCESS, thread, now + NICER);
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::sync::mpsc::sync_channel;
    use std::thread::Builder;

    use super::*;

    fn niceness() -> libc::c_int {
        // SAFETY: takes numbers only.
        unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) }
    }

    #[test]
    fn a_thread_that_is_started_in_the_background_stands_behind_the_others() {
        let body = || {
            let own = niceness();
            let (go, wait) = sync_channel::<()>(1);
            let (tell, told) = sync_channel(1);
            let asked = tell.clone();
            let background = in_background(|| {
                let body = move || {
                    let _ = wait.recv();
                    tell.send(niceness()).unwrap();
                };
                Builder::new().spawn(body).unwrap()
            });
            drop(go);
            background.join().unwrap();
            assert_eq!(told.recv().unwrap(), (own + NICER).min(19));
            let other = Builder::new().spawn(move || asked.send(niceness()).unwrap());
            other.unwrap().join().unwrap();
            assert_eq!((told.recv().unwrap(), niceness()), (own, own), "the others keep theirs");
        };
        Builder::new().name("one-of-its-own".into()).spawn(body).unwrap().join().unwrap();
    }
}
