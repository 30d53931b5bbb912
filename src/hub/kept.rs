//! What was read of models, kept until it is no longer true or no longer wanted: an entry holds for one
//! revision of a model's files, and beyond a fixed number of entries the one that was not used for longest
//! goes. So models that come and go leave nothing behind for good.

use std::sync::atomic::{AtomicU64, Ordering};

use dashmap::DashMap;

use crate::ids::ModelName;

/// Something for each of a few models.
#[derive(Debug)]
pub(super) struct Kept<T> {
    entries: DashMap<ModelName, Entry<T>>,
    entries_max: usize,
    /// Counts uses, so that their order is known.
    uses: AtomicU64,
}

#[derive(Debug)]
struct Entry<T> {
    revision: String,
    last_use: AtomicU64,
    value: T,
}

impl<T: Clone> Kept<T> {
    /// Creates a cache of at most `entries_max` entries.
    pub(super) fn new(entries_max: usize) -> Self {
        Self { entries: DashMap::new(), entries_max, uses: AtomicU64::new(0) }
    }

    /// What is kept of this revision.
    pub(super) fn get(&self, name: &ModelName, revision: &str) -> Option<T> {
        let entry = self.entries.get(name).filter(|entry| entry.revision == revision)?;
        entry.last_use.store(self.next_use(), Ordering::Relaxed);
        Some(entry.value.clone())
    }

    /// Keeps a value in place of an older revision's, and of the least recently used entry beyond the most.
    pub(super) fn put(&self, name: ModelName, revision: String, value: T) {
        self.entries.insert(name, Entry { revision, last_use: AtomicU64::new(self.next_use()), value });
        while self.entries.len() > self.entries_max {
            let uses = self.entries.iter().map(|entry| {
                let last_use = entry.last_use.load(Ordering::Relaxed);
                (last_use, entry.key().clone())
            });
            let Some((_, oldest)) = uses.min() else { return };
            self.entries.remove(&oldest);
        }
    }

    /// Forgets a model that is gone.
    pub(super) fn forget(&self, name: &ModelName) {
        self.entries.remove(name);
    }

    fn next_use(&self) -> u64 {
        self.uses.fetch_add(1, Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_holds_for_its_revision_only() {
        let kept = Kept::new(2);
        kept.put("a".into(), "1".into(), 10);
        assert_eq!(kept.get(&"a".into(), "1"), Some(10));
        assert_eq!(kept.get(&"a".into(), "2"), None);
        kept.put("a".into(), "2".into(), 20);
        assert_eq!((kept.get(&"a".into(), "1"), kept.get(&"a".into(), "2")), (None, Some(20)));
        kept.forget(&"a".into());
        assert_eq!(kept.get(&"a".into(), "2"), None);
    }

    #[test]
    fn the_least_recently_used_goes_first() {
        let kept = Kept::new(2);
        kept.put("a".into(), "1".into(), 1);
        kept.put("b".into(), "1".into(), 2);
        kept.get(&"a".into(), "1");
        kept.put("c".into(), "1".into(), 3);
        let found = ["a", "b", "c"].map(|name| kept.get(&name.into(), "1"));
        assert_eq!(found, [Some(1), None, Some(3)]);
    }
}
