//! The identity of a caller. Over the unix socket the kernel tells the peer's user, and only this daemon's
//! user and root are admitted; over TCP a bearer token identifies the caller. The principal owns sessions and
//! KV caches; fairness counts by client. Every edge calls [`Authenticator::admit`] for each request.

use std::sync::Arc;

use http::HeaderMap;
use sha2::{Digest, Sha256};

use super::standing::Standing;
use crate::error::Error;
use crate::ids::{ClientId, ConnectionId, Principal};

const ROOT: u32 = 0;

/// Characters of the name that a client may give itself.
const CLIENT_NAME_CHARS_MAX: usize = 64;

/// The other end of a connection.
#[derive(Clone, Copy, Debug)]
pub enum Peer {
    /// A process of this user id; none if the system does not tell.
    Unix(Option<u32>),
    /// A process that is connected over TCP.
    Tcp,
}

/// One connection.
#[derive(Clone, Debug)]
pub struct Connection {
    /// The other end.
    pub peer: Peer,
    /// Its number.
    pub id: ConnectionId,
    /// Whether one of its calls was admitted.
    pub standing: Arc<Standing>,
}

/// Decides who may call, and under which principal and client.
#[derive(Clone, Debug)]
pub struct Authenticator {
    own_uid: u32,
    /// SHA-256 of the token; none admits nobody over TCP.
    token: Option<[u8; 32]>,
}

impl Authenticator {
    /// Returns one for a daemon of user `own_uid`, whose TCP callers know `token`; without a token TCP
    /// callers are refused.
    #[must_use]
    pub fn new(own_uid: u32, token: Option<&str>) -> Self {
        Self { own_uid, token: token.map(digest) }
    }

    /// Returns the user of a peer that the kernel vouches for and that may call.
    pub(super) fn known_uid(&self, peer: Peer) -> Option<u32> {
        match peer {
            Peer::Unix(uid) => uid.filter(|uid| *uid == self.own_uid || *uid == ROOT),
            Peer::Tcp => None,
        }
    }

    /// Returns the principal and the client of a request with these headers. The first request that is
    /// admitted establishes its connection.
    pub(crate) fn admit(
        &self,
        connection: &Connection,
        headers: &HeaderMap,
    ) -> Result<(Principal, ClientId), Error> {
        let principal = match (connection.peer, self.known_uid(connection.peer)) {
            (_, Some(uid)) => format!("uid:{uid}"),
            (Peer::Unix(_), None) => return Err(Error::PermissionDenied),
            (Peer::Tcp, None) => self.bearer(headers)?,
        };
        let client = match headers.get("x-mlxd-client") {
            Some(name) => format!("{principal}/{}", client_name(name)?),
            None => format!("{principal}#{}", connection.id.0),
        };
        connection.standing.establish()?;
        Ok((principal.into(), client.into()))
    }

    fn bearer(&self, headers: &HeaderMap) -> Result<String, Error> {
        let given = headers.get("authorization").and_then(|value| value.to_str().ok());
        let given = given.and_then(|value| value.strip_prefix("Bearer ")).ok_or(Error::Unauthenticated)?;
        let given = digest(given.trim());
        let expected = self.token.ok_or(Error::Unauthenticated)?;
        // Compares every byte, so that the time taken tells nothing about the token.
        let difference = expected.iter().zip(&given).fold(0, |sum, (a, b)| sum | (a ^ b));
        if difference != 0 {
            return Err(Error::Unauthenticated);
        }
        let name: String = expected.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        Ok(format!("token:{name}"))
    }
}

fn client_name(value: &http::HeaderValue) -> Result<&str, Error> {
    let name = value.to_str().ok().filter(|name| is_plain(name, CLIENT_NAME_CHARS_MAX));
    name.ok_or_else(|| {
        Error::field("x-mlxd-client", "must be 1 to 64 characters out of A-Z a-z 0-9 . _ : / -")
    })
}

/// Returns whether a name from a header may stand in a log line.
pub(crate) fn is_plain(name: &str, chars_max: usize) -> bool {
    (1..=chars_max).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._:/-".contains(&byte))
}

fn digest(token: &str) -> [u8; 32] {
    Sha256::digest(token.as_bytes()).into()
}

#[cfg(test)]
mod tests {
    use super::super::standing::Places;
    use super::*;

    fn admit(
        authenticator: &Authenticator,
        peer: Peer,
        headers: &[(&'static str, &str)],
    ) -> Result<String, Error> {
        let headers = headers.iter().map(|(name, value)| {
            (http::HeaderName::from_static(name), http::HeaderValue::from_str(value).unwrap())
        });
        let connection = Connection { peer, id: ConnectionId(7), standing: Places::new(1).newcomer() };
        let admitted = authenticator.admit(&connection, &headers.collect());
        assert_eq!(connection.standing.is_established(), admitted.is_ok(), "those refused get no place");
        admitted.map(|(principal, client)| format!("{principal} {client}"))
    }

    #[test]
    fn only_the_daemons_user_and_root_may_use_the_socket() {
        let authenticator = Authenticator::new(1000, None);
        assert_eq!(admit(&authenticator, Peer::Unix(Some(1000)), &[]).unwrap(), "uid:1000 uid:1000#7");
        assert_eq!(admit(&authenticator, Peer::Unix(Some(0)), &[]).unwrap(), "uid:0 uid:0#7");
        for other in [Some(1001), None] {
            assert_eq!(admit(&authenticator, Peer::Unix(other), &[]), Err(Error::PermissionDenied));
        }
    }

    #[test]
    fn tcp_needs_the_token() {
        let authenticator = Authenticator::new(1000, Some("secret"));
        let with = |value: &str| admit(&authenticator, Peer::Tcp, &[("authorization", value)]);
        assert!(with("Bearer secret").unwrap().starts_with("token:2bb80d537b1da3e3 "));
        for wrong in ["Bearer wrong", "secret", "Bearer ", "Basic secret"] {
            assert_eq!(with(wrong), Err(Error::Unauthenticated));
        }
        assert_eq!(admit(&authenticator, Peer::Tcp, &[]), Err(Error::Unauthenticated));
        let closed = Authenticator::new(1000, None);
        assert_eq!(admit(&closed, Peer::Tcp, &[("authorization", "Bearer ")]), Err(Error::Unauthenticated));
    }

    #[test]
    fn a_client_may_name_itself_within_its_principal() {
        let authenticator = Authenticator::new(1000, None);
        let named = admit(&authenticator, Peer::Unix(Some(1000)), &[("x-mlxd-client", "editor")]);
        assert_eq!(named.unwrap(), "uid:1000 uid:1000/editor");
        assert!(admit(&authenticator, Peer::Unix(Some(1000)), &[("x-mlxd-client", "a b")]).is_err());
    }
}
