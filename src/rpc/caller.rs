//! What the gate found out about a call; every handler takes it from the request's extensions.

use tonic::{Request, Status};

use super::status::status;
use crate::clock::Moment;
use crate::engine::{Priority, WorkOrigin};
use crate::error::Error;
use crate::ids::{ClientId, Principal, RequestId, SessionKey, SessionName};

/// A call and who makes it.
#[derive(Clone, Debug)]
pub(super) struct Caller {
    pub(super) request: RequestId,
    pub(super) principal: Principal,
    pub(super) client: ClientId,
    pub(super) arrived: Moment,
    pub(super) deadline: Option<Moment>,
}

impl Caller {
    /// A session of the caller's.
    pub(super) fn session(&self, name: SessionName) -> SessionKey {
        SessionKey { owner: self.principal.clone(), name }
    }

    /// Whose work it is, for the engine.
    pub(super) fn origin(&self, session: Option<SessionKey>, priority: Priority) -> WorkOrigin {
        let Self { request, principal, client, arrived, deadline } = self.clone();
        WorkOrigin { request, principal, client, priority, session, arrived, deadline }
    }
}

/// The caller and the message of a request.
pub(super) fn open<T>(request: Request<T>) -> Result<(Caller, T), Status> {
    let (_, mut extensions, message) = request.into_parts();
    let caller = extensions.remove::<Caller>();
    let caller = caller.ok_or_else(|| status(&Error::Internal("a call without a caller".into())))?;
    Ok((caller, message))
}
