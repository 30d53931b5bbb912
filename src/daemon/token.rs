//! The token that callers over TCP present. Its file belongs to this user alone.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::DaemonError;

/// Reads the token file.
///
/// # Errors
/// `Token` if the file is unreadable, accessible to other users, or holds anything but visible ASCII.
pub(super) fn read(path: &Path) -> Result<String, DaemonError> {
    let fault = |why: String| DaemonError::Token { path: path.to_owned(), why };
    let mode = std::fs::metadata(path).map_err(|error| fault(error.to_string()))?.permissions().mode();
    if mode & 0o077 != 0 {
        return Err(fault(format!("others may use it (mode {:03o}); make it 600", mode & 0o777)));
    }
    let token = std::fs::read_to_string(path).map_err(|error| fault(error.to_string()))?;
    let token = token.trim();
    if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(fault("must hold one token of visible ASCII characters".into()));
    }
    Ok(token.to_owned())
}
