//! Connections: accepting them, closing them gently, and who is at the other end. Knows HTTP but neither gRPC
//! nor any use case; an edge gives [`accept`] the HTTP service that answers a connection's requests.

mod accept;
mod authority;
mod identity;
mod linger;
mod standing;

pub use accept::{Listener, Phase, accept};
pub(crate) use identity::is_plain;
pub use identity::{Authenticator, Connection, Peer};
