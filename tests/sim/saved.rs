//! What the disk may say of each session: all that the writer was told since it last reached it. Knows
//! nothing of files.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::ids::{SessionId, SessionKey};
use crate::session::{Lease, Outline, Snapshot, Terms};
use crate::store::stepped::Told;

/// Time of use that a crash may lose, and the part of a lease that it may be.
const USE_LOST: Duration = Duration::from_secs(60);
const USE_LOST_PARTS: u32 = 10;

/// How a daemon ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum End {
    /// It is told to.
    InOrder,
    /// It is killed.
    Kill,
    /// The machine loses power.
    PowerFailure,
}

/// The sessions as they may be found. One that is missing is not on the disk.
#[derive(Default)]
pub(super) struct Saved {
    may_be: BTreeMap<SessionKey, Vec<Option<Snapshot>>>,
    /// Sessions that were found at the start, and neither read nor changed since.
    unshown: BTreeSet<SessionKey>,
}

impl Saved {
    /// Notes what the writer was told. If it has come to an end, what is not `behind` is on the disk, up to
    /// the last use; of `all` that too.
    pub(super) fn note(&mut self, told: Vec<Told>, reached: Option<(&BTreeSet<SessionKey>, bool)>) {
        for (key, mut now) in told {
            self.unshown.remove(&key);
            let may_be = self.may_be.entry(key.clone()).or_insert_with(|| vec![None]);
            // A session that was not read since the start has the content that it had.
            if let (Some(Snapshot { contents: contents @ None, .. }), Some(Some(last))) =
                (&mut now, may_be.last())
            {
                contents.clone_from(&last.contents);
            }
            // In between there is none where another session took the name.
            if may_be.last().is_some_and(|last| number(last) != number(&now)) {
                may_be.push(None);
            }
            may_be.push(now.clone());
            if let Some((_, all)) = reached.filter(|(behind, _)| !behind.contains(&key)) {
                may_be.retain(|old| is_reached(old.as_ref(), now.as_ref(), all));
            }
        }
        self.may_be.retain(|_, may_be| may_be.iter().any(Option::is_some));
    }

    /// Checks the sessions that a daemon found. After a power failure they are what the disk says; else names
    /// are, if the disk works, and what a file says once it is shown.
    pub(super) fn check(&mut self, found: &BTreeMap<SessionKey, Snapshot>, end: End, works: bool) {
        let keys: BTreeSet<SessionKey> = self.may_be.keys().chain(found.keys()).cloned().collect();
        for key in &keys {
            let is = found.get(key);
            let may_be = self.may_be.entry(key.clone()).or_insert_with(|| vec![None]);
            let is_one = may_be.iter().any(|one| one.as_ref() == is);
            let may_be = || may_be.iter().map(|one| brief(one.as_ref())).collect::<Vec<_>>();
            assert!(is_one, "{key} was found as {}, not one of {:#?}", brief(is), may_be());
        }
        for (key, may_be) in &mut self.may_be {
            let is = found.get(key).cloned();
            if end == End::PowerFailure {
                may_be.clear();
            } else if works {
                may_be.retain(|old| number(old) == number(&is));
            }
            may_be.push(is);
        }
        self.unshown = found.keys().cloned().collect();
        self.may_be.retain(|_, may_be| may_be.iter().any(Option::is_some));
    }

    /// Notes that a session was shown as it was found: a disk that works keeps it.
    pub(super) fn show(&mut self, key: &SessionKey) {
        if self.unshown.remove(key)
            && let Some(may_be) = self.may_be.get_mut(key)
        {
            may_be.drain(..may_be.len() - 1);
        }
    }

    /// Notes that a daemon left in order, which shows everything.
    pub(super) fn show_all(&mut self) {
        self.unshown.clone().iter().for_each(|key| self.show(key));
    }
}

fn number(is: &Option<Snapshot>) -> Option<SessionId> {
    is.as_ref().map(|is| is.outline.id)
}

/// Returns what differs between states of a session, mostly.
fn brief(is: Option<&Snapshot>) -> String {
    let brief = |Snapshot { outline, contents }: &Snapshot| {
        let Outline { id, terms, used, turns, sizes, .. } = outline;
        let read = contents.as_ref().map(|contents| contents.tokens.len());
        format!("{id:?}, {} turns, {sizes:?}, {read:?} read, used {used:?}, {terms:?}", turns.len())
    };
    is.map_or("missing".into(), brief)
}

/// Returns whether the disk may still say `old` once a session that is `now` was written.
fn is_reached(old: Option<&Snapshot>, now: Option<&Snapshot>, all: bool) -> bool {
    let (Some(old), Some(now)) = (old, now) else { return old.is_none() && now.is_none() };
    let used = now.outline.used;
    let lost = used.duration_since(old.outline.used).unwrap_or(Duration::MAX);
    let outline = Outline { used, ..old.outline.clone() };
    let may_be_lost = lost.is_zero() || !all && lost < use_lost(&now.outline.terms);
    may_be_lost && outline == now.outline && old.contents == now.contents
}

/// Returns the time of use that a crash may lose.
fn use_lost(terms: &Terms) -> Duration {
    match terms.lease {
        Lease::AfterUse(ttl) => USE_LOST.min(ttl / USE_LOST_PARTS),
        Lease::Until(_) => USE_LOST,
    }
}
