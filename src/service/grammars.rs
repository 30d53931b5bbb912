//! Compiles the grammars of requests. A grammar is compiled once, whoever
//! asks for it meanwhile, on a thread with a deep stack and with few others at a time; what came of it is
//! kept by its content, whether or not its callers are still there. Tokenizers' vocabularies are made at
//! their first use, and live as long as a grammar of theirs.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use sha2::{Digest, Sha256};
use tokio::sync::watch;

use super::Service;
use super::caller::Caller;
use super::desk::{Desk, Place};
use crate::error::Error;
use crate::grammar::{COMPILING_STACK_BYTES, Grammar, GrammarLimits, Refusal, Source, Vocabulary};
use crate::hub::ModelAssets;
use crate::limits::Limits;
use crate::priority;

/// Grammars that are compiled at once: each may have a core for a second.
const COMPILES_MAX: u64 = 2;

/// Refusals that are kept.
const REFUSALS_MAX: usize = 1024;

/// When to try again where too many grammars are being compiled.
const RETRY: Duration = Duration::from_secs(1);

/// Grammars that were compiled, and the tokenizers' vocabularies.
#[derive(Debug)]
pub(super) struct Grammars {
    desk: Arc<Desk>,
    state: Mutex<State>,
    limits: GrammarLimits,
    bytes_max: usize,
}

#[derive(Debug, Default)]
struct State {
    compiled: HashMap<Key, Kept>,
    bytes: usize,
    /// Number of the last use.
    used: u64,
    refused: HashMap<Key, Refusal>,
    under_way: HashMap<Key, UnderWay>,
    vocabularies: HashMap<Key, Weak<Cell>>,
}

/// Identifies content.
type Key = [u8; 32];

/// A vocabulary that is made by whoever needs it first; others wait for it.
type Cell = OnceLock<Result<Vocabulary, Refusal>>;

/// What came of a grammar.
type Compiled = Result<Arc<Grammar>, Refusal>;

/// A compiled grammar that is kept, with its vocabulary.
#[derive(Clone, Debug)]
struct Kept {
    grammar: Arc<Grammar>,
    _vocabulary: Arc<Cell>,
    used: u64,
}

/// A grammar that somebody has compiled.
#[derive(Debug)]
struct UnderWay {
    outcome: watch::Receiver<Option<Compiled>>,
    stage: Stage,
}

/// How far a grammar is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// It is not its turn yet.
    Waits,
    /// It is its turn, and the vocabulary is made first, which is none of its work.
    Prepares,
    Compiles,
}

/// What is known of a grammar.
enum Known {
    Compiled(Compiled),
    /// It will be known.
    Soon(watch::Receiver<Option<Compiled>>),
    /// Nothing; the caller is to compile it.
    Nothing(Compiling),
}

/// A grammar that one caller has compiled; the others are told by its end.
struct Compiling {
    grammars: Arc<Grammars>,
    key: Key,
    outcome: watch::Sender<Option<Compiled>>,
}

impl Drop for Compiling {
    fn drop(&mut self) {
        self.grammars.state().under_way.remove(&self.key);
    }
}

impl Compiling {
    /// Notes how far it is.
    fn reach(&self, stage: Stage) {
        if let Some(under_way) = self.grammars.state().under_way.get_mut(&self.key) {
            under_way.stage = stage;
        }
    }

    /// Keeps what came of it, and tells those who wait.
    fn end(self, compiled: Compiled, vocabulary: Arc<Cell>) {
        self.grammars.keep(self.key, &compiled, vocabulary);
        self.outcome.send_replace(Some(compiled));
    }
}

impl Grammars {
    pub(super) fn new(limits: &Limits) -> Self {
        let &Limits { grammar_bytes_max, grammar_depth_max, grammar_work_max, .. } = limits;
        Self {
            desk: Arc::new(Desk::new(Some(COMPILES_MAX))),
            state: Mutex::default(),
            limits: GrammarLimits {
                bytes_max: grammar_bytes_max,
                depth_max: grammar_depth_max,
                work_max: grammar_work_max,
            },
            bytes_max: limits.grammar_cache_bytes_max,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns what is known of a grammar.
    fn look(self: &Arc<Self>, key: Key) -> Known {
        let mut state = self.state();
        state.used += 1;
        let used = state.used;
        if let Some(kept) = state.compiled.get_mut(&key) {
            kept.used = used;
            return Known::Compiled(Ok(Arc::clone(&kept.grammar)));
        }
        if let Some(refusal) = state.refused.get(&key) {
            return Known::Compiled(Err(refusal.clone()));
        }
        if let Some(under_way) = state.under_way.get(&key) {
            return Known::Soon(under_way.outcome.clone());
        }
        let (sender, outcome) = watch::channel(None);
        state.under_way.insert(key, UnderWay { outcome, stage: Stage::Waits });
        Known::Nothing(Compiling { grammars: Arc::clone(self), key, outcome: sender })
    }

    /// Returns how far a grammar is that is under way.
    fn stage(&self, key: &Key) -> Option<Stage> {
        self.state().under_way.get(key).map(|under_way| under_way.stage)
    }

    /// Keeps what came of a grammar; those that were not used for the longest time go.
    fn keep(&self, key: Key, compiled: &Compiled, vocabulary: Arc<Cell>) {
        let mut state = self.state();
        let grammar = match compiled {
            Ok(grammar) => Arc::clone(grammar),
            Err(refusal) => {
                if state.refused.len() >= REFUSALS_MAX {
                    state.refused.clear();
                }
                state.refused.insert(key, refusal.clone());
                return;
            }
        };
        state.used += 1;
        state.bytes += grammar.bytes();
        let kept = Kept { grammar, _vocabulary: vocabulary, used: state.used };
        if let Some(replaced) = state.compiled.insert(key, kept) {
            state.bytes -= replaced.grammar.bytes();
        }
        while state.bytes > self.bytes_max {
            let oldest = state.compiled.iter().min_by_key(|(_, kept)| kept.used).map(|(key, _)| *key);
            let Some(gone) = oldest.and_then(|key| state.compiled.remove(&key)) else { break };
            state.bytes -= gone.grammar.bytes();
        }
        state.vocabularies.retain(|_, cell| cell.strong_count() > 0);
    }

    /// Returns the vocabulary of a model, made or not.
    fn cell(&self, key: Key) -> Arc<Cell> {
        let mut state = self.state();
        if let Some(cell) = state.vocabularies.get(&key).and_then(Weak::upgrade) {
            return cell;
        }
        let cell = Arc::new(Cell::new());
        state.vocabularies.insert(key, Arc::downgrade(&cell));
        cell
    }

    /// Begins to compile a grammar.
    fn compile(
        &self,
        compiling: Compiling,
        place: Place,
        assets: Arc<ModelAssets>,
        source: Source,
    ) -> Result<(), Error> {
        compiling.reach(Stage::Prepares);
        let (cell, limits) = (self.cell(vocabulary_key(&assets)), self.limits);
        let job = move || {
            let _place = place;
            priority::stand_behind();
            let compile = || {
                let made = cell.get_or_init(|| {
                    Vocabulary::new(&assets.tokenizer, assets.vocabulary_size, &assets.eos_token_ids)
                });
                compiling.reach(Stage::Compiles);
                let vocabulary = made.as_ref().map_err(Clone::clone)?;
                Grammar::compile(vocabulary, &source, &limits).map(Arc::new)
            };
            let compiled = catch_unwind(AssertUnwindSafe(compile)).unwrap_or_else(|_| {
                tracing::error!("compiling a grammar failed");
                Err(Refusal::Invalid("it could not be compiled".into()))
            });
            compiling.end(compiled, cell);
        };
        let thread = std::thread::Builder::new().name("grammar".into()).stack_size(COMPILING_STACK_BYTES);
        let begun = thread.spawn(job).map(drop);
        begun.map_err(|error| Error::Internal(format!("a thread to compile a grammar: {error}")))
    }
}

impl Service {
    /// Returns the grammar that outputs of a model have to obey. `field` is its path in the request.
    ///
    /// # Errors
    /// The grammar is refused, or it is not its turn to be compiled in time.
    pub(super) async fn grammar(
        &self,
        caller: &Caller,
        assets: &Arc<ModelAssets>,
        (field, source): (&str, Source),
    ) -> Result<Arc<Grammar>, Error> {
        let key = content_key(&vocabulary_key(assets), &source);
        let limit = self.limits.grammar_compile;
        let mut compiled = pin!(self.compiled(caller, assets, &source, key));
        let compiled = loop {
            if let Ok(compiled) = tokio::time::timeout(limit, &mut compiled).await {
                break compiled?;
            }
            let (stage, value) = (self.grammars.stage(&key), u64::try_from(limit.as_millis()));
            let (limit, value) = ("grammar_compile_ms_max", value.unwrap_or(u64::MAX));
            if stage == Some(Stage::Waits) {
                return Err(Error::GrammarsBusy { limit, value, retry_after: RETRY });
            }
            if stage != Some(Stage::Prepares) {
                break Err(Refusal::TooLarge { limit, value });
            }
        };
        compiled.map_err(|refusal| refused(field, refusal))
    }

    /// Returns what comes of a grammar, which is compiled if nobody has.
    async fn compiled(
        &self,
        caller: &Caller,
        assets: &Arc<ModelAssets>,
        source: &Source,
        key: Key,
    ) -> Result<Compiled, Error> {
        loop {
            match self.grammars.look(key) {
                Known::Compiled(compiled) => return Ok(compiled),
                Known::Soon(mut outcome) => {
                    // Who was to compile it may have left before.
                    if let Ok(compiled) = outcome.wait_for(Option::is_some).await
                        && let Some(compiled) = compiled.clone()
                    {
                        return Ok(compiled);
                    }
                }
                Known::Nothing(compiling) => {
                    let mut outcome = compiling.outcome.subscribe();
                    let place = self.grammars.desk.place(caller.connection, source.bytes()).await;
                    self.grammars.compile(compiling, place, Arc::clone(assets), source.clone())?;
                    let compiled = outcome.wait_for(Option::is_some).await.map(|compiled| compiled.clone());
                    let lost = || Error::Internal("a grammar's compiler failed".into());
                    return compiled.ok().flatten().ok_or_else(lost);
                }
            }
        }
    }
}

/// Returns what tells vocabularies apart.
fn vocabulary_key(assets: &ModelAssets) -> Key {
    let mut hasher = Sha256::new();
    hasher.update(assets.tokenizer_hash.0);
    hasher.update(assets.vocabulary_size.to_le_bytes());
    assets.eos_token_ids.iter().for_each(|id| hasher.update(id.to_le_bytes()));
    hasher.finalize().into()
}

/// Returns what tells compiled grammars apart.
fn content_key(vocabulary: &Key, source: &Source) -> Key {
    let mut hasher = Sha256::new();
    hasher.update(vocabulary);
    let mut add = |kind: u8, text: &str| {
        hasher.update([kind]);
        hasher.update((text.len() as u64).to_le_bytes());
        hasher.update(text);
    };
    match source {
        Source::JsonObject => add(0, ""),
        Source::JsonSchema(text) => add(1, text),
        Source::Regex(text) => add(2, text),
        Source::Lark(text) => add(3, text),
        Source::Choice(texts) => texts.iter().for_each(|text| add(4, text)),
    }
    hasher.finalize().into()
}

/// Returns the error of a grammar that is refused.
fn refused(field: &str, refusal: Refusal) -> Error {
    match refusal {
        Refusal::Invalid(why) => Error::field(field, why),
        Refusal::Unsupported { path, keyword, why } => {
            let why = if why.is_empty() { why } else { format!(": {why}") };
            Error::SchemaUnsupported { field: field.to_owned(), path, keyword, why }
        }
        Refusal::TooLarge { limit, value } => Error::SchemaTooLarge { field: field.to_owned(), limit, value },
    }
}
