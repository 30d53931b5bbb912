//! What unloaded models held, while it is freed by a thread of its own: to unmap half a gigabyte took a CPU
//! up to 0.6 s, for which every stream would wait.

use std::cell::RefCell;
use std::mem;
use std::thread::{Builder, JoinHandle};

/// The threads that free.
#[derive(Debug, Default)]
pub(super) struct Leaving(RefCell<Vec<JoinHandle<()>>>);

impl Leaving {
    /// Frees something elsewhere.
    pub(super) fn free(&self, held: impl Send + 'static) {
        // If there is no thread, it is freed here, with the closure.
        let thread = Builder::new().name("free".into()).spawn(move || drop(held));
        self.0.borrow_mut().extend(thread.ok());
    }

    /// Returns whether something is being freed.
    #[cfg(test)]
    pub(super) fn is_busy(&self) -> bool {
        !self.0.borrow().is_empty()
    }

    /// Waits until everything is free.
    pub(super) fn wait(&self) {
        for thread in mem::take(&mut *self.0.borrow_mut()) {
            // A panic there has been reported.
            let _ = thread.join();
        }
    }
}
