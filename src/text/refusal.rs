//! Why a template is refused, as an error of its engine.

use minijinja::{Error, ErrorKind};

/// Refuses what a template does, with the reason.
pub(super) fn refuse(why: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, why.to_owned())
}
