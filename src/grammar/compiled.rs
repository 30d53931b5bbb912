//! A compiled grammar, and the state of one output in it.

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use llguidance::toktrie::TokEnv;
use llguidance::{CancellationHandle, Logger, Matcher as Inner};

use super::vocabulary::MARK;
use super::{GrammarLimits, Refusal, Source, Vocabulary};

/// Bytes that a compiled grammar takes at least, roughly: its parser and the first states of its lexer.
const BYTES_MIN: usize = 64 << 10;

/// Bytes of a compiled grammar for each byte of its source, roughly.
const BYTES_PER_BYTE: usize = 32;

/// Most states of an output's lexer, of one or two kilobytes each; those of real schemas are some hundreds.
const LEXER_STATES_MAX: usize = 10_000;

/// Most symbols of a grammar, of some hundred bytes each: llguidance numbers them in 16 bits.
const SYMBOLS_MAX: usize = 60_000;

/// A compiled grammar. Each output has a [`Matcher`] of its own, independent of all others.
pub struct Grammar {
    /// The state before the first token. Locked only to copy it.
    start: Mutex<Inner>,
    first: Allowed,
    has_end: bool,
    bytes: usize,
    tokens: TokEnv,
    pace: Pace,
}

/// Time that an answer may take: a step waits about as long.
pub const IN_TIME: Duration = Duration::from_millis(5);

/// Microseconds that an answer took too long for which one in time is wanted: slow ones are seen as often as
/// if each took that much.
const US_PER_ANSWER: u32 = 300;

/// Most answers in time that are wanted: a worker may only have been put aside.
const WANTED_MAX: u32 = 1000;

/// How long a grammar takes to say what may come next, as its outputs have seen it.
#[derive(Debug, Default)]
pub struct Pace {
    /// Number of answers in time until it is not slow any more.
    slow: AtomicU32,
    /// Microseconds that the last answer took.
    last_us: AtomicU32,
}

impl Pace {
    /// Returns whether it was slow.
    #[must_use]
    pub fn is_slow(&self) -> bool {
        self.slow.load(Ordering::Relaxed) > 0
    }

    /// Notes that an answer, or what was left of the attempt, took some time.
    pub fn note(&self, took: Duration) {
        let us = u32::try_from(took.as_micros()).unwrap_or(u32::MAX);
        self.last_us.store(us, Ordering::Relaxed);
        let left = |slow: u32| {
            let wanted = (us / US_PER_ANSWER).min(WANTED_MAX);
            Some(if took < IN_TIME { slow.saturating_sub(1) } else { slow.max(wanted) })
        };
        let _ = self.slow.fetch_update(Ordering::Relaxed, Ordering::Relaxed, left);
    }

    /// Returns the time that the last answer took.
    #[must_use]
    pub fn last(&self) -> Duration {
        Duration::from_micros(self.last_us.load(Ordering::Relaxed).into())
    }
}

/// What may come next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Allowed {
    /// One of these tokens: bit `id % 32` of word `id / 32`.
    Tokens(Arc<[u32]>),
    /// Nothing: the output is whole, and the tokenizer has no token to end it with.
    Nothing,
}

/// Why an output cannot go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stuck {
    /// Finding out what may come next takes more than the limits allow.
    Work(String),
    /// Finding it out has failed.
    Broken(String),
    /// No token can follow, and the output is not whole: none that begins like it obeys the grammar.
    DeadEnd,
}

/// The state of an output in its grammar.
pub struct Matcher {
    inner: Inner,
    has_end: bool,
}

/// Ends the work of a [`Matcher`] that another thread is doing.
#[derive(Clone, Debug)]
pub struct Canceller(CancellationHandle);

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammar").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

impl fmt::Debug for Matcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Matcher").finish_non_exhaustive()
    }
}

impl Grammar {
    /// Compiles a grammar for a vocabulary. Takes as long as the limits allow, up to a second, and a deep
    /// stack.
    ///
    /// # Errors
    /// It is malformed, not supported, beyond a limit, or no output obeys it.
    pub fn compile(
        vocabulary: &Vocabulary,
        source: &Source,
        limits: &GrammarLimits,
    ) -> Result<Self, Refusal> {
        let top = source.read(limits)?;
        let factory = &vocabulary.factory;
        let init = llguidance::api::GrammarInit::Serialized(top);
        let caps = llguidance::toktrie::InferenceCapabilities::default();
        let mut parser_limits = factory.limits().clone();
        parser_limits.initial_lexer_fuel = limits.work_max;
        parser_limits.max_lexer_states = LEXER_STATES_MAX;
        parser_limits.max_grammar_size = SYMBOLS_MAX;
        let parser = factory.create_parser_from_init_ext(init, Logger::new(0, 0), caps, parser_limits);
        let parser = parser.map_err(|error| source.refusal(&format!("{error:#}"), limits))?;
        let mut start = Inner::new(Ok(parser));
        let first = allowed(&mut start, vocabulary.has_end);
        let first = first.map_err(|stuck| match stuck {
            Stuck::Work(why) | Stuck::Broken(why) => source.refusal(&why, limits),
            Stuck::DeadEnd => Refusal::Invalid("no output obeys it".into()),
        })?;
        let none = matches!(&first, Allowed::Tokens(tokens) if tokens.iter().all(|word| *word == 0));
        if none || first == Allowed::Nothing {
            return Err(Refusal::Invalid("no output obeys it but perhaps an empty one".into()));
        }
        let bytes = BYTES_MIN + BYTES_PER_BYTE * source.bytes();
        Ok(Self {
            start: Mutex::new(start),
            first,
            has_end: vocabulary.has_end,
            bytes,
            tokens: Arc::clone(factory.tok_env()),
            pace: Pace::default(),
        })
    }

    /// Starts an output.
    #[must_use]
    pub fn matcher(&self) -> Matcher {
        // With a lexer of its own, its errors and its work are its own too.
        let inner = self.start.lock().unwrap_or_else(PoisonError::into_inner).deep_clone();
        Matcher { inner: inner.into_cancellable(), has_end: self.has_end }
    }

    /// Returns what an output may begin with.
    #[must_use]
    pub fn first(&self) -> &Allowed {
        &self.first
    }

    /// Returns how long its outputs wait for what may come next.
    #[must_use]
    pub fn pace(&self) -> &Pace {
        &self.pace
    }

    /// Returns for each number of bytes of a marker the tokens that end it behind them, or hold all of it,
    /// and go on with more than newlines: part of an output would then come unseen behind the marker.
    #[must_use]
    pub fn ending_within(&self, marker: &str) -> Vec<Vec<u32>> {
        let trie = self.tokens.tok_trie();
        let mut found = vec![Vec::new(); marker.len()];
        for id in 0..u32::try_from(trie.vocab_size()).unwrap_or(u32::MAX) {
            let token = trie.token(id);
            for (came, ids) in found.iter_mut().enumerate() {
                let marker = &marker.as_bytes()[came..];
                let is_text = token.first() != Some(&MARK);
                let begins = if came == 0 && is_text { token.len() } else { 1 };
                let mut rests = (0..begins).filter_map(|at| token[at..].strip_prefix(marker));
                if rests.any(|rest| rest.iter().any(|byte| *byte != b'\n')) {
                    ids.push(id);
                }
            }
        }
        found
    }

    /// Returns the bytes that it takes, roughly.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Matcher {
    /// Returns what ends its work from another thread.
    #[must_use]
    pub fn canceller(&self) -> Canceller {
        Canceller(self.inner.cancellation_handle().unwrap_or_default())
    }

    /// Takes the next token of the output. It is one that was allowed, and does not end the output.
    ///
    /// # Errors
    /// The output cannot go on.
    pub fn advance(&mut self, token: u32) -> Result<(), Stuck> {
        self.inner.consume_token(token).map_err(|error| stuck(&error.to_string()))
    }

    /// Returns what may come next: tokens that end an output exactly where the grammar accepts it.
    ///
    /// # Errors
    /// The output cannot go on.
    pub fn allowed(&mut self) -> Result<Allowed, Stuck> {
        allowed(&mut self.inner, self.has_end)
    }

    /// Returns whether the output is whole as it is.
    ///
    /// # Errors
    /// The output cannot go on.
    pub fn is_whole(&mut self) -> Result<bool, Stuck> {
        let accepts = |inner: &mut Inner| inner.is_accepting().map_err(|error| stuck(&error.to_string()));
        Ok(is_over(&self.inner) || accepts(&mut self.inner)?)
    }
}

impl Canceller {
    /// Ends the work; the matcher is of no use afterwards.
    pub fn cancel(&self) {
        self.0.cancel();
    }
}

fn allowed(inner: &mut Inner, has_end: bool) -> Result<Allowed, Stuck> {
    // Without a token for the end, a whole output may have none that could follow.
    let may_be_over = !has_end && (is_over(inner) || inner.is_accepting().unwrap_or(false));
    if may_be_over && is_over(inner) {
        return Ok(Allowed::Nothing);
    }
    match inner.compute_mask_or_eos() {
        Ok(set) => Ok(Allowed::Tokens(Vec::from(set).into())),
        Err(_) if may_be_over => Ok(Allowed::Nothing),
        Err(error) => Err(stuck(&error.to_string())),
    }
}

/// Returns whether an output is whole, and nothing but its end may follow.
fn is_over(inner: &Inner) -> bool {
    inner.is_stopped() && !inner.is_error()
}

/// Returns why llguidance does not go on. What follows the first line of an error is the state of its parser.
fn stuck(error: &str) -> Stuck {
    let first = error.lines().next().unwrap_or_default().trim();
    if first.contains("NoExtensionBias") {
        Stuck::DeadEnd
    } else if first.starts_with("panic") {
        Stuck::Broken(first.to_owned())
    } else {
        Stuck::Work(first.to_owned())
    }
}
