//! Runs a template's engine on a thread of its own: a panic in it is a failure of the template, and its
//! stack suffices for what a template nests. The engine recurses over operators in a row, `elif`s and
//! nested values.

use std::thread::{Builder, scope};

use super::TextError;

/// Limit of a template's source. The largest known ones have some tens of kB.
pub(super) const SOURCE_BYTES_MAX: usize = 512 << 10;

/// Enough for a source of that many signs in a row (370 bytes each in a debug build), and for two million
/// nested values. Only what is used takes memory.
const STACK_BYTES: usize = 256 << 20;

/// Returns what `work` does.
///
/// # Errors
/// It panics, or the thread cannot be started.
pub(super) fn apart<T: Send>(work: impl FnOnce() -> Result<T, TextError> + Send) -> Result<T, TextError> {
    let builder = Builder::new().name("template".to_owned()).stack_size(STACK_BYTES);
    scope(|scope| {
        let thread = builder
            .spawn_scoped(scope, work)
            .map_err(|error| TextError::Render(format!("no thread for the chat template: {error}")))?;
        thread.join().unwrap_or_else(|_| Err(TextError::Render("the template engine panicked".to_owned())))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_a_failure() {
        assert_eq!(apart(|| Ok(1)).unwrap(), 1);
        let error = apart::<()>(|| panic!("a bug")).unwrap_err();
        assert_eq!(error.to_string(), "the template engine panicked");
    }
}
