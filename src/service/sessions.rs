//! Sessions: the caller's own, by name. Their rules are in `session`; here names, lifetimes and pages are
//! checked, and the engine is told to drop the KV caches of sessions that are gone.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;

use super::Service;
use super::cache::check_salt;
use super::caller::Caller;
use super::fields::{
    fresh_session_name, model_name, optional_model, page_size, page_token, session_name, ttl,
};
use crate::engine::TurnTie;
use crate::error::Error;
use crate::ids::SessionKey;
use crate::session::{
    History, ListPage, Message, NewSession, SessionBook, SessionView, TurnContent, TurnGuard, TurnRequest,
    TurnStart,
};

/// The session book's hold on a running turn; told when the session is deleted.
pub(super) type TurnHold = watch::Sender<bool>;

/// A session's running turn. Dropping it rolls the turn back.
pub(super) struct Turn {
    key: SessionKey,
    /// None once the turn was rolled back because its stream was not read.
    guard: Arc<Mutex<Option<TurnGuard<TurnHold>>>>,
    deleted: watch::Receiver<bool>,
    /// Rolls the turn back when its work has ended and nobody reads the outcome.
    watchdog: Option<AbortHandle>,
}

impl Turn {
    /// Begins a turn, if it may; returns what it builds on.
    pub(super) fn begin(
        sessions: &Arc<SessionBook<TurnHold>>,
        key: &SessionKey,
        request: &TurnRequest,
    ) -> Result<(Self, TurnStart), Error> {
        let (hold, deleted) = watch::channel(false);
        let (guard, start) = sessions.begin(key, request, hold)?;
        let guard = Arc::new(Mutex::new(Some(guard)));
        Ok((Self { key: key.clone(), guard, deleted, watchdog: None }, start))
    }

    /// Returns the key of its session.
    pub(super) fn key(&self) -> &SessionKey {
        &self.key
    }

    /// Refuses bytes that are to be added beyond a limit.
    pub(super) fn reserve(&self, bytes: usize) -> Result<(), Error> {
        let mut guard = self.guard.lock().unwrap_or_else(PoisonError::into_inner);
        guard.as_mut().map_or(Ok(()), |guard| guard.reserve(bytes))
    }

    /// Returns what ties the engine's work to it. The turn is rolled back if that work has ended for `limit`
    /// and it is not committed.
    pub(super) fn tie(&mut self, limit: Duration) -> TurnTie {
        let (working, mut ended) = mpsc::channel::<Infallible>(1);
        let guard = Arc::clone(&self.guard);
        let watchdog = tokio::spawn(async move {
            // Nothing is ever sent: this waits for the end of the work.
            let _ = ended.recv().await;
            tokio::time::sleep(limit).await;
            drop(take(&guard));
        });
        self.watchdog = Some(watchdog.abort_handle());
        TurnTie { deleted: self.deleted.clone(), working }
    }

    /// Commits the turn; returns the session's token count.
    pub(super) fn commit(
        self,
        limit: Duration,
        tokens: Arc<[u32]>,
        content: TurnContent,
    ) -> Result<(), Error> {
        let guard = take(&self.guard).ok_or(Error::SlowReader { limit })?;
        guard.commit(tokens, content).map(drop)
    }

    async fn deleted(&mut self) {
        if self.deleted.wait_for(|deleted| *deleted).await.is_err() {
            // The turn has ended otherwise.
            std::future::pending::<()>().await;
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some(watchdog) = &self.watchdog {
            watchdog.abort();
        }
        drop(take(&self.guard));
    }
}

fn take(guard: &Mutex<Option<TurnGuard<TurnHold>>>) -> Option<TurnGuard<TurnHold>> {
    guard.lock().unwrap_or_else(PoisonError::into_inner).take()
}

/// Runs `work` unless the session of `turn` is deleted first.
pub(super) async fn or_session_deleted<T>(
    turn: Option<&mut Turn>,
    work: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    let Some(turn) = turn else { return work.await };
    tokio::select! {
        biased;
        outcome = work => outcome,
        () = turn.deleted() => Err(Error::Cancelled("the session was deleted".into())),
    }
}

/// A session to create.
#[derive(Clone, Debug)]
pub struct CreateSession {
    /// Name; empty for a random one.
    pub name: String,
    /// The model to bind it to.
    pub model: String,
    /// Lifetime after the last use.
    pub ttl: Option<Duration>,
    /// How its chat turns go on.
    pub history: History,
    /// Salt of its cached KV; empty for none.
    pub cache_salt: String,
}

/// A session to copy.
#[derive(Clone, Debug)]
pub struct ForkSession {
    /// The session to copy.
    pub name: String,
    /// Name of the copy; empty for a random one.
    pub new_name: String,
    /// Lifetime after the last use; unset takes the original's.
    pub ttl: Option<Duration>,
    /// The session's token count as the caller last saw it.
    pub expected_token_count: Option<u32>,
}

/// A session to shorten.
#[derive(Clone, Debug)]
pub struct TruncateSession {
    /// The session.
    pub name: String,
    /// The part that remains.
    pub to: TruncateTo,
    /// The session's token count as the caller last saw it.
    pub expected_token_count: Option<u32>,
}

/// The part of a shortened session that remains.
#[derive(Clone, Copy, Debug)]
pub enum TruncateTo {
    /// The first turns.
    Turns(u32),
    /// The first tokens.
    Tokens(u32),
}

/// A page of a caller's sessions.
#[derive(Clone, Debug)]
pub struct SessionPage {
    /// Entries; 0 is the default.
    pub size: u32,
    /// The token that came with the page before; empty for the first page.
    pub token: String,
    /// Model name; empty for the sessions of every model.
    pub model: String,
}

/// All of a session.
#[derive(Clone, Debug)]
pub struct SessionContent {
    /// Its facts.
    pub view: SessionView,
    /// Its messages; none once a turn was raw.
    pub messages: Vec<Arc<Message>>,
    /// Its tokens.
    pub tokens: Arc<[u32]>,
}

impl Service {
    /// Creates an empty session.
    ///
    /// # Errors
    /// A field is refused, the name is taken, the caller has too many, or the model is unknown.
    pub async fn create_session(&self, caller: &Caller, create: CreateSession) -> Result<SessionView, Error> {
        let CreateSession { name, model, ttl: lifetime, history, cache_salt } = create;
        let key = caller.session(fresh_session_name("name", &name)?);
        let model = model_name("model", &model)?;
        let lifetime = ttl(lifetime, self.limits.session_ttl_max)?.unwrap_or(self.limits.session_ttl);
        check_salt("cache_salt", &cache_salt)?;
        self.models.check_exists(&model).await?;
        let cache_salt = cache_salt.into();
        let created = self.sessions.create(NewSession { key, model, ttl: lifetime, history, cache_salt })?;
        self.saves.saved().await;
        Ok(created)
    }

    /// Returns all of a session.
    ///
    /// # Errors
    /// The caller has no such session, or what was stored of it is damaged.
    pub async fn get_session(&self, caller: &Caller, name: &str) -> Result<SessionContent, Error> {
        let key = caller.session(session_name("name", name)?);
        self.saves.warm(&self.sessions, &key).await?;
        self.sessions.read(&key, |session| {
            let (messages, tokens) = (session.messages().to_vec(), Arc::clone(session.tokens()));
            Ok(SessionContent { view: session.view(), messages, tokens })
        })
    }

    /// Returns a page of the caller's sessions by name, and the token of the next page; none after the last.
    ///
    /// # Errors
    /// A field is refused.
    pub fn list_sessions(
        &self,
        caller: &Caller,
        page: &SessionPage,
    ) -> Result<(Vec<SessionView>, Option<String>), Error> {
        let SessionPage { size, token, model } = page;
        let page = ListPage {
            size: page_size(*size)?,
            after: page_token(token, session_name)?,
            model: optional_model("model", model)?,
        };
        let (views, more) = self.sessions.list(&caller.principal, &page);
        let last = views.last().filter(|_| more).map(|view| view.key.name.to_string());
        Ok((views, last))
    }

    /// Copies a session.
    ///
    /// # Errors
    /// A field is refused, the name is taken, the caller has too many, the session moved, or what was stored
    /// of it is damaged.
    pub async fn fork_session(&self, caller: &Caller, fork: &ForkSession) -> Result<SessionView, Error> {
        let ForkSession { name, new_name, ttl: lifetime, expected_token_count } = fork;
        let from = caller.session(session_name("name", name)?);
        let to = fresh_session_name("new_name", new_name)?;
        let lifetime = ttl(*lifetime, self.limits.session_ttl_max)?;
        self.saves.warm(&self.sessions, &from).await?;
        let forked = self.sessions.fork(&from, to, lifetime, *expected_token_count)?;
        self.saves.saved().await;
        Ok(forked)
    }

    /// Shortens a session.
    ///
    /// # Errors
    /// A turn runs in it, it moved, it cannot end there, or what was stored of it is damaged.
    pub async fn truncate_session(
        &self,
        caller: &Caller,
        truncate: &TruncateSession,
    ) -> Result<SessionView, Error> {
        let TruncateSession { name, to, expected_token_count } = truncate;
        let key = caller.session(session_name("name", name)?);
        self.saves.warm(&self.sessions, &key).await?;
        let truncated = self.sessions.with(&key, |session, now| {
            session.expect_tokens(*expected_token_count)?;
            match *to {
                TruncateTo::Turns(turns) => session.truncate_turns(turns as usize, now)?,
                TruncateTo::Tokens(tokens) => session.truncate_tokens(tokens as usize, now)?,
            }
            Ok(session.view())
        })?;
        self.saves.saved().await;
        Ok(truncated)
    }

    /// Deletes a session, stops its running turn and drops its KV caches.
    ///
    /// # Errors
    /// The caller has no such session, or the engine is dead.
    pub async fn delete_session(&self, caller: &Caller, name: &str) -> Result<(), Error> {
        let key = caller.session(session_name("name", name)?);
        // First the turn, so that it leaves no cache behind after those that are dropped.
        if let Some(turn) = self.sessions.delete(&key)? {
            turn.send_replace(true);
        }
        self.engine.forget(key).await?;
        self.saves.saved().await;
        Ok(())
    }

    /// Removes expired sessions and drops their KV caches.
    ///
    /// # Errors
    /// The engine is dead.
    pub async fn sweep_sessions(&self) -> Result<(), Error> {
        for session in self.sessions.sweep() {
            tracing::debug!(%session, "the session expired");
            self.engine.forget(session).await?;
        }
        Ok(())
    }
}
