//! Caches values read from a model's files. An entry is valid for one revision of the files; beyond a fixed
//! number of entries the least recently used is evicted, so that models that come and go do not accumulate.

use std::sync::atomic::{AtomicU64, Ordering};

use dashmap::DashMap;

use crate::ids::ModelName;

/// One value per model and revision.
#[derive(Debug)]
pub(super) struct RevisionCache<T> {
    entries: DashMap<ModelName, Entry<T>>,
    entries_max: usize,
    /// Number of uses so far; orders them.
    uses: AtomicU64,
}

#[derive(Debug)]
struct Entry<T> {
    revision: String,
    last_use: AtomicU64,
    value: T,
}

impl<T: Clone> RevisionCache<T> {
    /// Creates a cache of at most `entries_max` entries.
    pub(super) fn new(entries_max: usize) -> Self {
        Self { entries: DashMap::new(), entries_max, uses: AtomicU64::new(0) }
    }

    /// Returns the value of this revision, if it is cached.
    pub(super) fn get(&self, name: &ModelName, revision: &str) -> Option<T> {
        let entry = self.entries.get(name).filter(|entry| entry.revision == revision)?;
        entry.last_use.store(self.next_use(), Ordering::Relaxed);
        Some(entry.value.clone())
    }

    /// Caches a value, replacing an older revision's; evicts the least recently used entry beyond the limit.
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

    /// Removes the entry of a model that is gone.
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
    fn an_entry_is_valid_for_its_revision_only() {
        let cache = RevisionCache::new(2);
        cache.put("a".into(), "1".into(), 10);
        assert_eq!(cache.get(&"a".into(), "1"), Some(10));
        assert_eq!(cache.get(&"a".into(), "2"), None);
        cache.put("a".into(), "2".into(), 20);
        assert_eq!((cache.get(&"a".into(), "1"), cache.get(&"a".into(), "2")), (None, Some(20)));
        cache.forget(&"a".into());
        assert_eq!(cache.get(&"a".into(), "2"), None);
    }

    #[test]
    fn the_least_recently_used_entry_is_evicted_first() {
        let cache = RevisionCache::new(2);
        cache.put("a".into(), "1".into(), 1);
        cache.put("b".into(), "1".into(), 2);
        cache.get(&"a".into(), "1");
        cache.put("c".into(), "1".into(), 3);
        let found = ["a", "b", "c"].map(|name| cache.get(&name.into(), "1"));
        assert_eq!(found, [Some(1), None, Some(3)]);
    }
}
