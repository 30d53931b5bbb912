//! Sessions as callers are told of them: with what the engine has cached of their tokens.

use std::sync::Arc;

use super::Service;
use super::cache::hash;
use crate::engine::{CachedAsk, CachedKv};
use crate::session::SessionView;

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
}

impl Service {
    /// Adds to sessions what is cached of them; nothing is where the engine does not answer.
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
            let some = some.into_iter().zip(cached);
            described.extend(some.map(|(view, cached)| DescribedSession { view, cached }));
        }
    }

    /// Adds to a session what is cached of it.
    pub async fn describe_session(&self, view: SessionView) -> DescribedSession {
        let asked = self.engine.cached(vec![ask(&view)]).await;
        let cached = asked.ok().and_then(|cached| cached.first().copied()).unwrap_or_default();
        DescribedSession { view, cached }
    }
}

fn ask(view: &SessionView) -> CachedAsk {
    let (model, owner) = (view.model.clone(), view.key.owner.clone());
    CachedAsk { model, owner, salt: hash(&view.cache_salt), tokens: Arc::clone(&view.tokens) }
}
