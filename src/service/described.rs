//! Sessions as callers are told of them: with what the engine has cached of their tokens.

use std::sync::Arc;

use super::cache::hash;
use super::{Service, blocking};
use crate::engine::{CachedAsk, CachedKv};
use crate::session::SessionView;
use crate::store::SavedSnapshot;

/// Questions that the engine answers at once: each searches the caches for a whole session, between two
/// steps.
const ASKED_AT_ONCE: usize = 8;

/// A session and what is cached of it.
#[derive(Clone, Debug)]
pub struct DescribedSession {
    /// Its facts.
    pub view: SessionView,
    /// What its next turn would find.
    pub cached: CachedKv,
    /// What its snapshot holds, if it has one.
    pub snapshot: Option<SavedSnapshot>,
}

impl Service {
    /// Adds to sessions what is cached of them, and in snapshots; nothing is cached where the engine does not
    /// answer.
    pub async fn describe_sessions(&self, views: Vec<SessionView>) -> Vec<DescribedSession> {
        let mut described = Vec::with_capacity(views.len());
        let mut views = views.into_iter();
        loop {
            let some: Vec<SessionView> = views.by_ref().take(ASKED_AT_ONCE).collect();
            if some.is_empty() {
                return described;
            }
            let mut cached = self.engine.cached(some.iter().map(ask).collect()).await.unwrap_or_default();
            cached.resize(some.len(), CachedKv::default());
            let held = self.held(&some).await;
            let some = some.into_iter().zip(cached).zip(held);
            described.extend(some.map(|((view, cached), snapshot)| DescribedSession {
                view,
                cached,
                snapshot,
            }));
        }
    }

    /// Adds to a session what is cached of it.
    pub async fn describe_session(&self, view: SessionView) -> DescribedSession {
        let asked = self.engine.cached(vec![ask(&view)]).await;
        let cached = asked.ok().and_then(|cached| cached.first().copied()).unwrap_or_default();
        let snapshot = self.held(std::slice::from_ref(&view)).await.first().copied().flatten();
        DescribedSession { view, cached, snapshot }
    }

    /// Returns what the snapshots of sessions hold, one after the other.
    async fn held(&self, views: &[SessionView]) -> Vec<Option<SavedSnapshot>> {
        let ids: Vec<_> = views.iter().map(|view| view.id).collect();
        let (snapshots, count) = (self.snapshots.clone(), ids.len());
        let held = blocking(move || Ok(ids.into_iter().map(|id| snapshots.held(id)).collect()));
        held.await.unwrap_or_else(|_| vec![None; count])
    }
}

fn ask(view: &SessionView) -> CachedAsk {
    let (model, owner) = (view.model.clone(), view.key.owner.clone());
    CachedAsk { model, owner, salt: hash(&view.cache_salt), tokens: Arc::clone(&view.tokens) }
}
