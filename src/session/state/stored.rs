//! A session as it is stored and comes back: without its content at first, which is read when somebody uses
//! it, or cannot be read.

use std::sync::Arc;

use super::Session;
use crate::error::Error;
use crate::ids::SessionId;
use crate::session::bytes::{Held, tokens_bytes};
use crate::session::snapshot::{Contents, Outline, Sizes, Snapshot};

/// Why a session has no content in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Absence {
    /// It was not read yet.
    Cold(Sizes),
    /// It cannot be read.
    Damaged(Sizes, String),
}

impl Session {
    /// Returns a session that was stored, without its content; damaged if there is a reason why.
    pub(in crate::session) fn stored(held: Held, outline: Outline, damage: Option<String>) -> Self {
        let Outline { id, key, model, terms, created, used, .. } = outline;
        let Outline { history, cache_salt, tokenizer, turns, turn_bytes, sizes, .. } = outline;
        let charged = turn_bytes.into_iter().map(|bytes| Arc::new(held.charge(bytes)));
        let turn_bytes = charged.collect();
        let content = sizes.text_bytes.saturating_add(tokens_bytes(sizes.tokens));
        let content_bytes = Arc::new(held.charge(content));
        let absence = Some(match damage {
            Some(why) => Absence::Damaged(sizes, why),
            None => Absence::Cold(sizes),
        });
        let empty = Self::held(held, key, model, terms, created);
        Self { id, turns, turn_bytes, content_bytes, absence, used, history, cache_salt, tokenizer, ..empty }
    }

    /// Gives it its number.
    pub(in crate::session) fn with_id(self, id: SessionId) -> Self {
        Self { id, ..self }
    }

    /// Returns its number.
    #[must_use]
    pub fn id(&self) -> SessionId {
        self.id
    }

    /// Returns what it is now.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let outline = Outline {
            id: self.id,
            key: self.key.clone(),
            model: self.model.clone(),
            terms: self.terms.clone(),
            created: self.created,
            used: self.used,
            history: self.history,
            cache_salt: Arc::clone(&self.cache_salt),
            tokenizer: self.tokenizer,
            turns: self.turns.clone(),
            turn_bytes: self.turn_bytes.iter().map(|turn| turn.charged()).collect(),
            sizes: self.sizes(),
        };
        let contents = || Contents {
            messages: self.messages.clone(),
            text: Arc::clone(&self.text),
            tokens: Arc::clone(&self.tokens),
        };
        Snapshot { outline, contents: self.absence.is_none().then(contents) }
    }

    /// Returns whether its content has still to be read.
    #[must_use]
    pub fn is_cold(&self) -> bool {
        matches!(self.absence, Some(Absence::Cold(_)))
    }

    /// Takes the content that was read, if it lacks it.
    pub(in crate::session) fn fill(&mut self, contents: Contents) {
        if self.is_cold() {
            let Contents { messages, text, tokens } = contents;
            (self.messages, self.text, self.tokens, self.absence) = (messages, text, tokens, None);
        }
    }

    /// Notes that its content cannot be read.
    pub(in crate::session) fn lose(&mut self, why: String) {
        if self.is_cold() {
            self.absence = Some(Absence::Damaged(self.sizes(), why));
        }
    }

    /// Refuses what needs the content while that is not in memory.
    pub(in crate::session) fn refuse_without_content(&self) -> Result<(), Error> {
        match &self.absence {
            None => Ok(()),
            Some(Absence::Damaged(_, why)) => {
                Err(Error::SessionDamaged { session: self.key.name.clone(), why: why.clone() })
            }
            // Whoever uses a session has it read first.
            Some(Absence::Cold(_)) => Err(Error::Internal(format!("{} was not read", self.key))),
        }
    }

    pub(super) fn sizes(&self) -> Sizes {
        match &self.absence {
            Some(Absence::Cold(sizes) | Absence::Damaged(sizes, _)) => *sizes,
            None => Sizes {
                messages: self.messages.len(),
                tokens: self.tokens.len(),
                text_bytes: self.text.len(),
            },
        }
    }
}
