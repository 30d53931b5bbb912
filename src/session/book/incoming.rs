//! Sessions that come from outside, as a file that somebody sent. What has come of one is counted for its
//! owner as if it were a session already; it becomes one at once, when all of it is there.

use super::{SessionBook, SessionLimits};
use crate::error::Error;
use crate::ids::{ModelName, Principal, SessionKey};
use crate::session::bytes::{Charge, Charges, Held};
use crate::session::snapshot::{Contents, Outline};
use crate::session::state::{Session, SessionView};
use crate::session::terms::Terms;

/// Bytes of a session on its way in, until this is dropped.
#[derive(Debug)]
pub struct Incoming {
    held: Held,
    charge: Charge,
}

/// A session that has come, as it is to be.
#[derive(Clone, Debug)]
pub struct Arrived {
    /// Owner and name.
    pub key: SessionKey,
    /// The model it is bound to.
    pub model: ModelName,
    /// How long it stays, and its labels.
    pub terms: Terms,
    /// What else is known of it.
    pub outline: Outline,
    /// Its content, of which the outline's turns and sizes tell.
    pub contents: Contents,
}

impl<H> SessionBook<H> {
    /// Makes room for an owner's session on its way in.
    #[must_use]
    pub fn expect(&self, owner: &Principal) -> Incoming {
        let held = self.owners.entry(owner.clone()).or_default().held.clone();
        let charge = held.charge(0);
        Incoming { held, charge }
    }

    /// Refuses a session whose name is taken, or for which its owner has no room.
    ///
    /// # Errors
    /// `SessionExists`, or a limit of sessions or bytes.
    pub fn refuse_arrival(&self, key: &SessionKey) -> Result<(), Error> {
        let now = self.now();
        self.owners.get(&key.owner).map_or(Ok(()), |owned| self.refuse_another(&owned, &key.name, now))
    }

    /// Counts the bytes that are there of a session on its way in: those that it has, and those of its file
    /// that are not read yet.
    ///
    /// # Errors
    /// Its owner would hold more than a limit.
    pub fn grow(&self, incoming: &mut Incoming, bytes: usize) -> Result<(), Error> {
        let SessionLimits { sessions_bytes_max, .. } = self.limits;
        // Charged first: another import may find the same room.
        incoming.charge = incoming.held.charge(bytes);
        if incoming.held.bytes() > sessions_bytes_max {
            return Err(Error::SessionLimit { limit: "sessions_bytes_max", value: sessions_bytes_max });
        }
        Ok(())
    }

    /// Adds a session that has come.
    ///
    /// # Errors
    /// Its name is taken, or a limit of its owner's would be exceeded.
    pub fn take_in(&self, incoming: Incoming, arrived: Arrived) -> Result<SessionView, Error> {
        let now = self.now();
        let Arrived { key, model, terms, outline, contents } = arrived;
        let terms = Terms { lease: self.own_lease(terms.lease), ..terms };
        let mut owned = self.owners.entry(key.owner.clone()).or_default();
        drop(incoming);
        self.refuse_another(&owned, &key.name, now)?;
        self.refuse_terms(&owned, &key.name, &terms, now)?;
        let created = outline.created.min(now);
        let outline = Outline { key, model, terms, created, used: now, ..outline };
        let mut session = Session::stored(owned.held.clone(), &mut Charges::default(), outline, None);
        session.fill(contents);
        let SessionLimits { session_bytes_max, sessions_bytes_max, .. } = self.limits;
        if session.bytes() > session_bytes_max {
            return Err(Error::SessionLimit { limit: "session_bytes_max", value: session_bytes_max });
        }
        // It is counted by now.
        if owned.held.bytes() > sessions_bytes_max {
            return Err(Error::SessionLimit { limit: "sessions_bytes_max", value: sessions_bytes_max });
        }
        self.refuse_on_disk(&owned.on_disk, session.bytes())?;
        Ok(self.insert(&mut owned, session))
    }
}

#[cfg(test)]
#[path = "incoming_tests.rs"]
mod tests;
