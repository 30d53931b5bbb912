//! Which of an owner's sessions a list shows, and in which part of the order of names they lie.

use std::ops::Bound;

use super::state::Session;
use super::terms::Labels;
use crate::ids::{ModelName, SessionName};

/// Sessions that a list shows; the default is all of them.
#[derive(Clone, Debug, Default)]
pub struct SessionFilter {
    /// Only sessions of this model.
    pub model: Option<ModelName>,
    /// Only sessions that have all of these labels, with these values.
    pub labels: Labels,
    /// Only sessions whose name begins with this.
    pub name_prefix: String,
    /// Only pinned sessions, or only others.
    pub pinned: Option<bool>,
}

/// A page of a list.
#[derive(Clone, Debug)]
pub struct ListPage {
    /// Only sessions after this name.
    pub after: Option<SessionName>,
    /// Number of entries.
    pub size: usize,
    /// What it shows.
    pub filter: SessionFilter,
}

impl SessionFilter {
    /// Returns whether a session is shown, whatever its name is.
    pub(super) fn takes(&self, session: &Session) -> bool {
        let Self { model, labels, name_prefix: _, pinned } = self;
        let terms = session.terms();
        model.as_ref().is_none_or(|model| session.model() == model)
            && pinned.is_none_or(|pinned| terms.pinned == pinned)
            && labels.iter().all(|(key, value)| terms.labels.get(key) == Some(value))
    }

    /// Returns whether a name is shown. In the order of names those that are lie together.
    pub(super) fn takes_name(&self, name: &SessionName) -> bool {
        name.as_str().starts_with(&self.name_prefix)
    }
}

impl ListPage {
    /// Returns where the page's names begin.
    pub(super) fn start(&self) -> Bound<SessionName> {
        let prefix = SessionName::from(self.filter.name_prefix.as_str());
        match &self.after {
            Some(after) if *after >= prefix => Bound::Excluded(after.clone()),
            Some(_) | None => Bound::Included(prefix),
        }
    }
}
