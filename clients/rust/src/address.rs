//! Addresses of a daemon: a unix socket, or a TCP port of this machine.

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::error::{Error, Result};

/// The address of a daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A unix socket: `unix:///run/mlxd.sock`, `unix:/run/mlxd.sock` or `/run/mlxd.sock`.
    Unix(PathBuf),
    /// A TCP port: `http://127.0.0.1:7070`, as written.
    Http(String),
}

impl FromStr for Address {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let refuse = |why: &str| Error::InvalidOption { option: "address", why: format!("{text:?} {why}") };
        if let Some(rest) = text.strip_prefix("unix:") {
            let path = rest.strip_prefix("//").unwrap_or(rest);
            if !Path::new(path).is_absolute() {
                return Err(refuse("has no absolute path"));
            }
            return Ok(Self::Unix(path.into()));
        }
        if Path::new(text).is_absolute() {
            return Ok(Self::Unix(text.into()));
        }
        if text.starts_with("https:") {
            return Err(refuse("asks for TLS, which mlxd does not speak yet"));
        }
        match text.strip_prefix("http://") {
            Some(host) if !host.is_empty() => Ok(Self::Http(text.to_owned())),
            _ => Err(refuse("is neither unix:///path, an absolute path nor http://host:port")),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Http(url) => f.write_str(url),
        }
    }
}

/// Returns the address to use when none is given: `MLXD_ADDRESS`, else [`default_socket_path`].
///
/// # Errors
/// `MLXD_ADDRESS` is malformed, or no folder for the socket is known.
pub fn default_address() -> Result<Address> {
    address_from(|name| std::env::var_os(name))
}

/// Returns the path of the daemon's default socket: `$XDG_RUNTIME_DIR/mlxd/mlxd.sock`, else
/// `$HOME/.mlxd/mlxd.sock`; `None` if neither is an absolute path.
#[must_use]
pub fn default_socket_path() -> Option<PathBuf> {
    socket_path_from(|name| std::env::var_os(name))
}

fn address_from(variable: impl Fn(&str) -> Option<OsString>) -> Result<Address> {
    if let Some(address) = variable("MLXD_ADDRESS").filter(|value| !value.is_empty()) {
        return address.to_string_lossy().parse();
    }
    socket_path_from(variable).map(Address::Unix).ok_or_else(|| Error::InvalidOption {
        option: "address",
        why: "none is given, MLXD_ADDRESS is unset, and neither XDG_RUNTIME_DIR nor HOME is an absolute path"
            .to_owned(),
    })
}

fn socket_path_from(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let folder = |name| variable(name).map(PathBuf::from).filter(|folder| folder.is_absolute());
    folder("XDG_RUNTIME_DIR")
        .map(|runtime| runtime.join("mlxd/mlxd.sock"))
        .or_else(|| folder("HOME").map(|home| home.join(".mlxd/mlxd.sock")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(pairs: &[(&str, &str)]) -> impl Fn(&str) -> Option<OsString> {
        move |name| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into())
    }

    #[test]
    fn every_written_form_of_a_socket_is_the_same_address() {
        let socket = Address::Unix("/run/m.sock".into());
        for text in ["unix:///run/m.sock", "unix:/run/m.sock", "/run/m.sock"] {
            assert_eq!(text.parse::<Address>().unwrap(), socket);
        }
        assert_eq!(socket.to_string(), "unix:///run/m.sock");
    }

    #[test]
    fn tcp_addresses_need_their_scheme() {
        assert_eq!(
            "http://127.0.0.1:7070".parse::<Address>().unwrap(),
            Address::Http("http://127.0.0.1:7070".into())
        );
        for text in ["127.0.0.1:7070", "https://localhost:7070", "unix:m.sock", "m.sock", "http://", ""] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_default_socket_is_the_daemons() {
        let table = include_str!("../../../tests/default_socket.json");
        let rows: Vec<serde_json::Value> = serde_json::from_str(table).unwrap();
        for row in rows {
            let found = socket_path_from(|name| row["environment"][name].as_str().map(OsString::from));
            assert_eq!(found.as_deref().and_then(Path::to_str), row["socket"].as_str(), "{row}");
        }
    }

    #[test]
    fn the_environment_outranks_the_runtime_folder_and_that_the_home() {
        let all =
            [("MLXD_ADDRESS", "http://127.0.0.1:1"), ("XDG_RUNTIME_DIR", "/run/user/1"), ("HOME", "/h")];
        let socket = |text: &str| Address::Unix(text.into());
        assert_eq!(address_from(environment(&all)).unwrap(), Address::Http("http://127.0.0.1:1".into()));
        assert_eq!(address_from(environment(&all[1..])).unwrap(), socket("/run/user/1/mlxd/mlxd.sock"));
        assert_eq!(address_from(environment(&all[2..])).unwrap(), socket("/h/.mlxd/mlxd.sock"));
        assert!(address_from(environment(&[("HOME", "")])).is_err());
    }
}
