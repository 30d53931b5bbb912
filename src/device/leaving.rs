//! What unloaded models held, while it is freed by a thread of its own: to unmap half a gigabyte took a CPU
//! up to 0.6 s, for which every stream would wait. And MLX's cache of buffers, which it empties on a CPU only
//! after all streams have done what they have to (no_gpu/allocator.cpp), those that read files included.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};
use std::thread::Builder;

use mlx_rs::memory;

use crate::mlx::ffi;

/// The threads that free.
#[derive(Debug, Default)]
pub(super) struct Leaving {
    /// Each is closed when something has been freed.
    held: Vec<Receiver<()>>,
    /// Number of those who ask for an empty cache, until a thread has emptied it for all of them.
    asked: Arc<AtomicU32>,
}

impl Leaving {
    /// Frees something elsewhere, then empties the cache.
    pub(super) fn free(&mut self, held: impl Send + 'static) {
        let ((sender, freed), asked) = (sync_channel(1), Arc::clone(&self.asked));
        self.held.push(freed);
        // If there is no thread, it is freed here, with the closure.
        spawn(move || {
            drop(held);
            drop(sender);
            if is_first(&asked) {
                empty_cache(&asked);
            }
        });
    }

    /// Empties the cache elsewhere.
    pub(super) fn empty_cache(&self) {
        let asked = Arc::clone(&self.asked);
        if is_first(&asked) && !spawn(move || empty_cache(&asked)) {
            self.asked.store(0, Ordering::Release);
        }
    }

    /// Waits until everything that was held is free.
    pub(super) fn wait(&mut self) {
        for freed in self.held.drain(..) {
            // Nothing is sent: an error is what was waited for.
            let _ = freed.recv();
        }
    }

    /// Returns whether something that was held is not free yet.
    pub(super) fn is_busy(&mut self) -> bool {
        self.held.retain(|freed| freed.try_recv() == Err(TryRecvError::Empty));
        !self.held.is_empty()
    }
}

/// Starts a thread; returns false if there is none.
fn spawn(work: impl FnOnce() + Send + 'static) -> bool {
    let spawned = Builder::new().name("free".into()).spawn(work);
    spawned.inspect_err(|error| tracing::warn!(%error, "no thread frees memory")).is_ok()
}

/// Asks for an empty cache; returns whether nobody empties it yet.
fn is_first(asked: &AtomicU32) -> bool {
    asked.fetch_add(1, Ordering::AcqRel) == 0
}

/// Returns to the system what MLX and the heap have cached, until nobody asks for more.
fn empty_cache(asked: &AtomicU32) {
    let mut seen = 1;
    loop {
        if let Err(error) = memory::clear_cache() {
            tracing::warn!(%error, "MLX did not empty its cache");
        }
        ffi::trim_heap();
        match asked.compare_exchange(seen, 0, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => return,
            Err(more) => seen = more,
        }
    }
}
