//! Sessions that come from outside, as a file that somebody sent. What has come of one is counted for its
//! owner as if it were a session already; it becomes one at once, when all of it is there.

use std::time::SystemTime;

use super::{Entry, Owned, SessionBook, SessionLimits, live};
use crate::error::Error;
use crate::ids::{ModelName, Principal, SessionKey};
use crate::session::bytes::{Charge, Charges, Held};
use crate::session::snapshot::{Contents, Outline};
use crate::session::state::{Session, SessionView};
use crate::session::terms::Terms;
use crate::session::watch::Happening;

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
    /// What it does to a session of its name; one is refused if none.
    pub replace: Option<Replace>,
}

/// That a session that comes takes the place of one of its name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Replace {
    /// Number of tokens that that has to have, 0 if there is none; unset for any.
    pub expected_token_count: Option<u32>,
}

impl<H> SessionBook<H> {
    /// Makes room for an owner's session on its way in.
    #[must_use]
    pub fn expect(&self, owner: &Principal) -> Incoming {
        let held = self.owners.entry(owner.clone()).or_default().held.clone();
        let charge = held.charge(0);
        Incoming { held, charge }
    }

    /// Refuses a session whose name is taken and not to be replaced, or for which its owner has no room.
    ///
    /// # Errors
    /// `SessionExists`, or a limit of sessions or bytes; of one to be replaced `SessionMoved`, `SessionBusy`.
    pub fn refuse_arrival(&self, key: &SessionKey, replace: Option<Replace>) -> Result<(), Error> {
        let now = self.now();
        let mut owned = self.owners.entry(key.owner.clone()).or_default();
        match replace {
            Some(replace) if replaceable(&mut owned, key, replace, now)? => Ok(()),
            Some(_) | None => self.refuse_another(&owned, &key.name, now),
        }
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

    /// Adds a session that has come, in place of the one that it replaces.
    ///
    /// # Errors
    /// Its name is taken, or a limit of its owner's would be exceeded; or what it would replace is not as
    /// expected. Then nothing has changed.
    pub fn take_in(&self, incoming: Incoming, arrived: Arrived) -> Result<SessionView, Error> {
        let now = self.now();
        let key = arrived.key.clone();
        let mut owned = self.owners.entry(key.owner.clone()).or_default();
        drop(incoming);
        let replaced = match arrived.replace {
            Some(replace) if replaceable(&mut owned, &key, replace, now)? => owned.entries.remove(&key.name),
            Some(_) | None => None,
        };
        match (self.arrived(&owned, arrived, now), replaced) {
            (Ok(session), replaced) => {
                if let Some(replaced) = replaced {
                    self.numbers().remove(replaced.session.id());
                    owned.tell(&key.name, Happening::Deleted);
                }
                Ok(self.insert(&mut owned, session))
            }
            (Err(error), None) => Err(error),
            (Err(error), Some(stays)) => {
                owned.entries.insert(key.name, stays);
                Err(error)
            }
        }
    }

    /// Returns a session that has come, if its owner may have it.
    fn arrived(&self, owned: &Owned<H>, arrived: Arrived, now: SystemTime) -> Result<Session, Error> {
        let Arrived { key, model, terms, outline, contents, replace: _ } = arrived;
        let terms = Terms { lease: self.own_lease(terms.lease), ..terms };
        self.refuse_another(owned, &key.name, now)?;
        self.refuse_terms(owned, &key.name, &terms, now)?;
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
        Ok(session)
    }
}

/// Returns whether there is a session that may be replaced.
fn replaceable<H>(
    owned: &mut Owned<H>,
    key: &SessionKey,
    replace: Replace,
    now: SystemTime,
) -> Result<bool, Error> {
    let Replace { expected_token_count } = replace;
    let Ok(Entry { session, .. }) = live(owned, key, now) else {
        return match expected_token_count {
            Some(expected @ 1..) => {
                Err(Error::SessionMoved { session: key.name.clone(), expected, actual: 0 })
            }
            Some(0) | None => Ok(false),
        };
    };
    session.expect_tokens(expected_token_count)?;
    session.refuse_if_busy()?;
    Ok(true)
}

#[cfg(test)]
#[path = "incoming_tests.rs"]
mod tests;
