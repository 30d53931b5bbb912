//! Whose a request is, in circles: a principal, a connection of it, a client on that. A client can invent
//! names, so whatever is shared is shared between principals first, then between a principal's connections,
//! and only then between the clients of a connection.

use crate::ids::{ClientId, ConnectionId, Principal};

/// Whose a request is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Owner {
    /// The user, or the token.
    pub principal: Principal,
    /// The connection it came on.
    pub connection: ConnectionId,
    /// The name that the client gave itself.
    pub client: ClientId,
}

/// Number of circles around a request.
pub(super) const CIRCLES: usize = 3;

/// All requests of a principal, of one of its connections, or of a client on that.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Circle {
    principal: Principal,
    connection: Option<ConnectionId>,
    client: Option<ClientId>,
}

impl Owner {
    /// Returns one of the circles, the widest first.
    pub(super) fn circle(&self, depth: usize) -> Circle {
        Circle {
            principal: self.principal.clone(),
            connection: (depth > 0).then_some(self.connection),
            client: (depth > 1).then(|| self.client.clone()),
        }
    }

    /// Returns all of them, the widest first.
    pub(super) fn circles(&self) -> [Circle; CIRCLES] {
        std::array::from_fn(|depth| self.circle(depth))
    }
}

impl Circle {
    /// Returns the next wider circle around it.
    pub(super) fn around(&self) -> Option<Self> {
        let connection = self.connection?;
        let (principal, client) = (self.principal.clone(), None);
        Some(Self { principal, connection: self.client.as_ref().map(|_| connection), client })
    }
}

/// Returns the owner with this name: `client`, on a connection of its own, or `connection/client`.
#[cfg(test)]
pub(super) fn owner(name: &str) -> Owner {
    let (connection, client) = name.split_once('/').unwrap_or((name, name));
    let number = connection.bytes().fold(0, |number, byte| number << 8 | u64::from(byte));
    Owner { principal: "p".into(), connection: ConnectionId(number), client: client.into() }
}
