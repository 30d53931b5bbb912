//! A session as it is stored and comes back: without its content at first, which is read when somebody uses
//! it, or cannot be read.

use std::sync::Arc;

use super::Session;
use crate::error::Error;
use crate::ids::SessionId;
use crate::session::bytes::{Charged, Charges, Held, tokens_bytes};
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
    /// What it shares with those that `charges` are of counts once.
    pub(in crate::session) fn stored(
        held: Held,
        charges: &mut Charges,
        outline: Outline,
        damage: Option<String>,
    ) -> Self {
        let Outline { id, key, model, terms, created, used, .. } = outline;
        let Outline { history, cache_salt, tokenizer, turns, turn_charges, sizes, content_number, .. } =
            outline;
        let turn_bytes = turn_charges.into_iter().map(|turn| charges.again(&held, turn)).collect();
        let content = sizes.text_bytes.saturating_add(tokens_bytes(sizes.tokens));
        let content_bytes = charges.again(&held, Charged { bytes: content, number: content_number });
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

    /// Returns the bytes of all that it holds, as its file does; what forks share counts in each.
    pub(in crate::session) fn bytes(&self) -> u64 {
        self.lasting_bytes() + self.content_bytes.bytes()
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
            turn_charges: self.turn_bytes.iter().map(|turn| turn.charged()).collect(),
            sizes: self.sizes(),
            content_number: self.content_bytes.charged().number,
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

    /// Returns content that was read for it, with the parts that others in memory have already in their
    /// place: forks share what is charged to them once.
    pub(in crate::session) fn shared<'a>(
        &self,
        mut contents: Contents,
        others: impl Iterator<Item = &'a Self>,
    ) -> Contents {
        let mut shared = 0;
        for other in others.filter(|other| other.absence.is_none()) {
            if Arc::ptr_eq(&self.content_bytes, &other.content_bytes) {
                share(&mut contents.text, &other.text);
                share(&mut contents.tokens, &other.tokens);
            }
            let turns = self.turn_bytes.iter().zip(&other.turn_bytes);
            let turns = turns.take_while(|(own, other)| Arc::ptr_eq(own, other)).count();
            let messages = turns.checked_sub(1).map_or(0, |last| self.turns[last].message_count);
            let both = contents.messages.iter_mut().zip(&other.messages);
            both.take(messages).skip(shared).for_each(|(own, other)| share(own, other));
            shared = shared.max(messages);
        }
        contents
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

    /// Returns the numbers of its tokens and turns.
    pub(in crate::session) fn counts(&self) -> (usize, usize) {
        (self.sizes().tokens, self.turns.len())
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

/// Takes another's part for one's own if it is the same. Where only the number is, a file was not written
/// here.
fn share<T: PartialEq + ?Sized>(own: &mut Arc<T>, other: &Arc<T>) {
    if !Arc::ptr_eq(own, other) && **own == **other {
        *own = Arc::clone(other);
    }
}
