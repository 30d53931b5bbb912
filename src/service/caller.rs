//! Who makes a call, and until when the answer is of use. Every edge makes one for each call, before anything
//! is done for it.

use super::intake::Claim;
use crate::clock::Moment;
use crate::engine::{CacheUse, Owner, Priority, WorkOrigin};
use crate::ids::{ClientId, ConnectionId, Principal, RequestId, SessionKey, SessionName};

/// A call's identity.
#[derive(Clone, Debug)]
pub struct Caller {
    /// Identifies the call in logs and answers.
    pub request: RequestId,
    /// The owner of the sessions and KV caches it may use.
    pub principal: Principal,
    /// The connection it came on.
    pub connection: ConnectionId,
    /// The client that fairness counts it for.
    pub client: ClientId,
    /// Time of arrival.
    pub arrived: Moment,
    /// End of the time its caller waits.
    pub deadline: Option<Moment>,
    /// Its share of the bytes of requests that are not prepared yet.
    pub claim: Claim,
}

impl Caller {
    /// Returns whether it is the daemon's own user, or root, as the kernel says: not whoever has a token.
    pub(super) fn is_owner(&self) -> bool {
        self.principal.as_str().starts_with("uid:")
    }

    /// Returns whose sessions are counted for it; None is everybody's, which only the daemon's own user sees.
    pub(super) fn counted(&self) -> Option<&Principal> {
        if self.is_owner() { None } else { Some(&self.principal) }
    }

    /// Returns the key of a session that the caller owns.
    pub(super) fn session(&self, name: SessionName) -> SessionKey {
        SessionKey { owner: self.principal.clone(), name }
    }

    /// Returns the origin of the engine's work for this call.
    pub(super) fn origin(
        &self,
        session: Option<SessionKey>,
        priority: Priority,
        cache: CacheUse,
    ) -> WorkOrigin {
        let Self { request, principal, connection, client, arrived, deadline, claim: _ } = self.clone();
        let owner = Owner { principal, connection, client };
        WorkOrigin { request, owner, priority, session, pinned: false, turn: None, cache, arrived, deadline }
    }
}
