//! What an owner says about a session besides its content: how long it stays, whether it is pinned, and its
//! labels, by which it is found again. Forks take them over.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::bytes::PART_BYTES;

/// Labels by key.
pub type Labels = BTreeMap<String, String>;

/// How long a session stays that is not pinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lease {
    /// This long after its last use.
    AfterUse(Duration),
    /// Until this time, used or not.
    Until(SystemTime),
}

/// The terms of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Terms {
    /// How long it stays unless it is pinned.
    pub lease: Lease,
    /// Whether it stays until it is deleted, and its cached KV longer than that of others.
    pub pinned: bool,
    /// Its labels; shared with its forks.
    pub labels: Arc<Labels>,
}

/// A change of terms; what is unset stays.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TermsChange {
    /// Another lease.
    pub lease: Option<Lease>,
    /// Whether it is pinned from now on.
    pub pinned: Option<bool>,
    /// Labels to add or replace.
    pub set_labels: Labels,
    /// Keys of labels to remove, before others are set.
    pub remove_labels: Vec<String>,
}

impl Terms {
    /// Returns the terms of a session without labels that stays for `ttl` after its last use.
    #[must_use]
    pub fn after_use(ttl: Duration) -> Self {
        Self { lease: Lease::AfterUse(ttl), pinned: false, labels: Arc::default() }
    }

    /// Returns the terms after a change.
    #[must_use]
    pub fn changed(&self, change: &TermsChange) -> Self {
        let TermsChange { lease, pinned, set_labels, remove_labels } = change;
        let mut terms = Self {
            lease: lease.unwrap_or(self.lease),
            pinned: pinned.unwrap_or(self.pinned),
            ..self.clone()
        };
        if !(set_labels.is_empty() && remove_labels.is_empty()) {
            let labels = Arc::make_mut(&mut terms.labels);
            remove_labels.iter().for_each(|key| drop(labels.remove(key)));
            labels.extend(set_labels.clone());
        }
        terms
    }

    /// Returns when a session that was last used at `used` ends; None is never.
    #[must_use]
    pub fn end(&self, used: SystemTime) -> Option<SystemTime> {
        match self.lease {
            _ if self.pinned => None,
            Lease::AfterUse(ttl) => used.checked_add(ttl),
            Lease::Until(end) => Some(end),
        }
    }

    /// Returns the bytes of the labels.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.labels.iter().map(|(key, value)| key.len() + value.len() + PART_BYTES).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const USED: SystemTime = SystemTime::UNIX_EPOCH;

    #[test]
    fn a_pin_outlasts_every_lease() {
        let end = USED + Duration::from_secs(9);
        let mut terms = Terms::after_use(Duration::from_secs(5));
        assert_eq!(terms.end(USED), Some(USED + Duration::from_secs(5)));
        terms.lease = Lease::Until(end);
        assert_eq!(terms.end(USED + Duration::from_secs(8)), Some(end));
        terms.pinned = true;
        assert_eq!(terms.end(USED), None);
    }

    #[test]
    fn a_change_leaves_what_it_does_not_name() {
        let label = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        let before = Terms {
            labels: Arc::new(Labels::from([label("a", "1"), label("b", "2")])),
            ..Terms::after_use(Duration::from_secs(5))
        };
        assert_eq!(before.changed(&TermsChange::default()), before);
        let change = TermsChange {
            set_labels: Labels::from([label("b", "3"), label("c", "4")]),
            remove_labels: vec!["a".into(), "b".into(), "z".into()],
            ..TermsChange::default()
        };
        let after = before.changed(&change);
        assert_eq!(*after.labels, Labels::from([label("b", "3"), label("c", "4")]));
        assert_eq!((after.lease, after.pinned), (before.lease, before.pinned));
        assert_eq!(before.labels.len(), 2);
    }
}
