//! Memory of the system, where MLX does not ask or does not check: its CPU allocator takes what `malloc`
//! returns, null as well, and then writes there.

use std::ffi::{c_int, c_void};
use std::sync::OnceLock;
use std::{mem, ptr};

/// Addresses below this are reached from a null pointer only.
const LOWEST_ADDRESS: usize = 1 << 32;

/// Bounds of the number of heaps.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const HEAPS_MIN: c_int = 2;
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const HEAPS_MAX: c_int = 8;

/// A block from this size on has pages of its own, which cost about as much as writing it once.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const OWN_PAGES_BYTES: c_int = 4 << 20;

/// Free bytes at the end of a heap from which on they go back. `malloc_trim` gives back those between blocks
/// in use, but of the ends only the first heap's: an unloaded model's weights would stay, up to this.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const TRIM_BYTES: c_int = 1 << 20;

const OUT_OF_MEMORY: &[u8] =
    b"mlxd: memory ran out: a null pointer was used, as when the system gives MLX no memory. \
Set a lower memory_budget_bytes, or allow this process more memory.\n";

/// What was done on a fault before [`report_faults`].
static FAULTS_BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// Bounds what glibc keeps of freed memory. By default it has up to eight heaps for each processor, and each
/// keeps what the largest requests of its threads took, below the next block in use: attackers made that
/// 660 MiB on two processors. So there are few heaps, and large blocks have pages of their own, which go
/// back when they are freed. What the owner sets with glibc's variables is left.
pub(super) fn bound_heaps() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        // SAFETY: changes numbers of the allocator only, under its lock.
        let set = |parameter, value| unsafe { libc::mallopt(parameter, value) };
        // Small freed blocks would join the end of a heap only when it is given back: then it stays.
        set(libc::M_MXFAST, 0);
        for (name, parameter, value) in [
            ("MALLOC_ARENA_MAX", libc::M_ARENA_MAX, heaps()),
            ("MALLOC_MMAP_THRESHOLD_", libc::M_MMAP_THRESHOLD, OWN_PAGES_BYTES),
            ("MALLOC_TRIM_THRESHOLD_", libc::M_TRIM_THRESHOLD, TRIM_BYTES),
        ] {
            if std::env::var_os(name).is_none() {
                set(parameter, value);
            }
        }
    }
}

/// Returns the number of heaps: as many as prompts are prepared at once, within bounds.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn heaps() -> c_int {
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    c_int::try_from(processors / 2).unwrap_or(HEAPS_MAX).clamp(HEAPS_MIN, HEAPS_MAX)
}

/// Returns freed memory to the system, where the allocator does not do so by itself.
pub(crate) fn trim_heap() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: has no preconditions.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Returns the most bytes of addresses that the process may have; None if there is no limit.
pub(crate) fn address_limit() -> Option<u64> {
    // SAFETY: a limit of zeros is valid, and the call fills it in.
    let limit = unsafe {
        let mut limit: libc::rlimit = mem::zeroed();
        (libc::getrlimit(libc::RLIMIT_AS, &raw mut limit) == 0).then_some(limit.rlim_cur)
    };
    limit.filter(|&limit| limit != libc::RLIM_INFINITY)
}

/// Returns the working set that the owner allows a Mac's GPU with `sysctl iogpu.wired_limit_mb`; None if it
/// was left alone, and on other systems.
pub(crate) fn wired_limit_bytes() -> Option<u64> {
    #[cfg(target_os = "macos")]
    {
        // A number of 4 bytes, or of 8: both processors that run macOS put the low ones first.
        let mut value = [0_u8; 8];
        let mut length = value.len();
        let to = value.as_mut_ptr().cast();
        // SAFETY: the name ends with a zero, and at most `length` bytes are written to `value`.
        let status = unsafe {
            libc::sysctlbyname(c"iogpu.wired_limit_mb".as_ptr(), to, &raw mut length, ptr::null_mut(), 0)
        };
        let megabytes = u64::from_le_bytes(value);
        (status == 0 && megabytes > 0).then(|| megabytes.saturating_mul(1 << 20))
    }
    #[cfg(not(target_os = "macos"))]
    None
}

/// Returns the bytes of `wanted` that the system would give, to a power of two below it; all if it gives all.
/// Nothing is kept, and no page is touched.
pub(crate) fn available(wanted: u64) -> u64 {
    let mut bytes = wanted;
    while bytes > 0 && !is_available(bytes) {
        bytes /= 2;
    }
    bytes
}

fn is_available(bytes: u64) -> bool {
    let Ok(length) = usize::try_from(bytes) else { return false };
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping that nobody else knows, and that is removed at once.
    unsafe {
        let at = libc::mmap(ptr::null_mut(), length, access, libc::MAP_PRIVATE | libc::MAP_ANON, -1, 0);
        at != libc::MAP_FAILED && libc::munmap(at, length) == 0
    }
}

/// Makes the use of a null pointer end the process with a message instead of a signal. Other faults go where
/// they went before.
pub(super) fn report_faults() {
    // SAFETY: the actions are valid (all zeros is one), and the handler does only what a signal handler may.
    unsafe {
        let mut before: libc::sigaction = mem::zeroed();
        if libc::sigaction(libc::SIGSEGV, ptr::null(), &raw mut before) != 0
            || FAULTS_BEFORE.set(before).is_err()
        {
            return;
        }
        let mut action: libc::sigaction = mem::zeroed();
        let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = on_fault;
        action.sa_sigaction = handler as *const () as libc::sighandler_t;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigaction(libc::SIGSEGV, &raw const action, ptr::null_mut());
    }
}

extern "C" fn on_fault(_: c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
    // SAFETY: the kernel passes a valid `info`; write, _exit and sigaction may be called in a handler.
    unsafe {
        if ((*info).si_addr() as usize) < LOWEST_ADDRESS {
            libc::write(libc::STDERR_FILENO, OUT_OF_MEMORY.as_ptr().cast(), OUT_OF_MEMORY.len());
            libc::_exit(1);
        }
        // On return the fault happens again.
        let before = FAULTS_BEFORE.get().map_or(ptr::null(), ptr::from_ref);
        libc::sigaction(libc::SIGSEGV, before, ptr::null_mut());
    }
}

#[cfg(test)]
mod tests {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    use std::sync::{Barrier, Mutex};

    use super::*;

    /// Set in the process that does what a test looks at.
    #[cfg(target_os = "linux")]
    const CHILD: &str = "MLXD_TEST_OUT_OF_MEMORY";

    /// Elsewhere arrays lie in the memory of a GPU, or the system does not hold to the limit.
    #[cfg(target_os = "linux")]
    #[test]
    fn memory_that_runs_out_ends_the_process_with_a_message() {
        let test = "mlx::ffi::memory::tests::an_array_larger_than_the_memory";
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        let output = child.args([test, "--exact", "--nocapture"]).env(CHILD, "1").output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("memory ran out"), "{said}");
        assert_eq!(output.status.code(), Some(1), "{said}");
    }

    /// Does so in a process of its own.
    #[cfg(target_os = "linux")]
    #[test]
    fn an_array_larger_than_the_memory() {
        if std::env::var_os(CHILD).is_none() {
            return;
        }
        report_faults();
        let limit = libc::rlimit { rlim_cur: 4 << 30, rlim_max: 4 << 30 };
        // SAFETY: the limit outlives the call.
        unsafe { libc::setrlimit(libc::RLIMIT_AS, &raw const limit) };
        assert_eq!(address_limit(), Some(4 << 30));
        assert!(available(8 << 30) < 4 << 30);
        let array = mlx_rs::ops::zeros::<f32>(&[2, 1 << 30]).unwrap();
        array.eval().unwrap();
    }

    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    #[test]
    fn what_many_threads_freed_is_used_again() {
        let test = "mlx::ffi::memory::tests::many_threads_take_and_free";
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        let output = child.args([test, "--exact", "--nocapture"]).env(CHILD, "1").output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    fn resident() -> usize {
        let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
        // SAFETY: asks for a number.
        let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap();
        pages.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * page
    }

    /// Does so in a process of its own: threads that live at the same time take memory in turn, and free all
    /// but the last block.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    #[test]
    fn many_threads_take_and_free() {
        if std::env::var_os(CHILD).is_none() {
            return;
        }
        let (threads, bytes, block) = (64, 4 << 20, 4 << 10);
        bound_heaps();
        let before = resident();
        let (living, in_turn) = (Barrier::new(threads), Mutex::new(Vec::new()));
        std::thread::scope(|scope| {
            let act = || {
                let first = vec![1_u8];
                living.wait();
                {
                    let mut kept = in_turn.lock().unwrap();
                    let mut taken: Vec<_> = (0..bytes / block).map(|_| vec![1_u8; block]).collect();
                    kept.extend(taken.pop());
                }
                living.wait();
                drop(first);
            };
            (0..threads).for_each(|_| drop(scope.spawn(act)));
        });
        let grown = resident() - before;
        assert!(grown < 12 * bytes, "{threads} threads left {grown} bytes of {bytes} each");
    }

    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    #[test]
    fn the_free_end_of_a_threads_heap_goes_back() {
        let test = "mlx::ffi::memory::tests::threads_take_and_free_weights";
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        let output = child.args([test, "--exact", "--nocapture"]).env(CHILD, "1").output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// Does so in a process of its own: threads take weights, and free all but what lies below them.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    #[test]
    fn threads_take_and_free_weights() {
        if std::env::var_os(CHILD).is_none() {
            return;
        }
        let (count, block) = (24, 512 << 10);
        bound_heaps();
        let act = move || {
            let below = vec![1_u8; block];
            let before = resident();
            let weights: Vec<_> = (0..count).map(|_| vec![1_u8; block]).collect();
            // To ask what is resident here would take a block above them.
            drop(weights);
            trim_heap();
            let left = resident().saturating_sub(before);
            drop(below);
            left
        };
        // Of the two heaps, this thread has one and the other thread may have the other.
        let other = std::thread::scope(|scope| scope.spawn(act).join().unwrap());
        for left in [act(), other] {
            assert!(left <= count * block / 4, "{left} bytes stay");
        }
    }

    #[test]
    fn what_the_system_would_give_is_not_kept() {
        assert_eq!(available(1 << 20), 1 << 20);
        assert!(available(1 << 60) < 1 << 60);
        assert_eq!(available(0), 0);
    }
}
