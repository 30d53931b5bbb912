//! Reads calls whose name stands before their arguments, which are a JSON object: `name<mark>{…}<mark>`.

use super::calls::{Calls, Next};
use super::json::{Json, append};
use super::scan::Scan;

/// Longest text between a call's beginning and its arguments, in bytes.
const HEAD_BYTES_MAX: usize = 1024;

/// What a head says: the model's id and the function's name.
type Named<'a> = (Option<&'a str>, &'a str);

/// How a format writes such calls.
#[derive(Debug)]
pub(super) struct Heads {
    /// Before each call, and behind the last one; empty if the block is one call.
    pub(super) between: &'static [&'static str],
    /// Behind the arguments, in order.
    pub(super) tail: &'static [&'static str],
    /// Reads what stands before the arguments.
    pub(super) named: fn(&str) -> Option<Named<'_>>,
}

/// `function<sep>name`, then the arguments as a block of code.
pub(super) const DEEPSEEK_V3: Heads = Heads {
    between: &["<｜tool▁call▁begin｜>", "<｜tool▁calls▁end｜>"],
    tail: &["```", "<｜tool▁call▁end｜>"],
    named: |head| {
        let (_, name) = head.split_once("<｜tool▁sep｜>")?;
        Some((None, name.trim_end().strip_suffix("```json")?.trim()))
    },
};

/// `name<sep>{…}`.
pub(super) const DEEPSEEK_V3_1: Heads = Heads {
    between: &["<｜tool▁call▁begin｜>", "<｜tool▁calls▁end｜>"],
    tail: &["<｜tool▁call▁end｜>"],
    named: |head| Some((None, head.trim().strip_suffix("<｜tool▁sep｜>")?.trim())),
};

/// `functions.name:0<mark>{…}`, where all before the mark is the call's id.
pub(super) const KIMI_K2: Heads = Heads {
    between: &["<|tool_call_begin|>", "<|tool_calls_section_end|>"],
    tail: &["<|tool_call_end|>"],
    named: |head| {
        let id = head.trim().strip_suffix("<|tool_call_argument_begin|>")?.trim();
        let (name, number) = id.strip_prefix("functions.").unwrap_or(id).rsplit_once(':')?;
        number.parse::<u64>().ok()?;
        Some((Some(id), name))
    },
};

/// `name[ARGS]{…}`, `name[CALL_ID]id[ARGS]{…}` or `name{…}`, each behind its own `[TOOL_CALLS]`.
pub(super) const MISTRAL: Heads = Heads {
    between: &[],
    tail: &[],
    named: |head| {
        let head = head.trim();
        let head = head.strip_suffix("[ARGS]").unwrap_or(head);
        Some(match head.split_once("[CALL_ID]") {
            Some((name, id)) => (Some(id.trim()), name.trim()),
            None => (None, head.trim()),
        })
    },
};

#[derive(Clone, Debug)]
enum State {
    Between,
    Head(String),
    Arguments(Json),
    /// Behind the arguments; how much of the tail was read.
    Tail(usize),
}

/// The state of one block.
#[derive(Clone, Debug)]
pub(super) struct Headed {
    heads: &'static Heads,
    state: State,
    scan: Scan,
    /// The characters of arguments that go out next.
    fragment: String,
}

impl Headed {
    /// Starts behind the marker that opens the block or, `in_call`, a call.
    pub(super) fn new(heads: &'static Heads, in_call: bool) -> Self {
        let state = if in_call { State::Head(String::new()) } else { State::Between };
        Self { heads, state, scan: Scan::default(), fragment: String::new() }
    }

    pub(super) fn read(&mut self, c: char, calls: &mut Calls) -> Next {
        match &mut self.state {
            State::Between => match self.scan.anchored(c, self.heads.between) {
                Err(other) => Next::Not(other),
                Ok(Some(0)) => {
                    self.state = State::Head(String::new());
                    Next::More
                }
                Ok(Some(_)) => Next::Closed,
                Ok(None) => Next::More,
            },
            State::Head(head) if c == '{' => {
                let named = (self.heads.named)(head);
                let begun = named.and_then(|(id, name)| calls.begin(id.map(str::to_owned), name));
                if begun.is_none() {
                    return Next::Not(c.len_utf8());
                }
                self.state = State::Arguments(Json::new());
                self.read(c, calls)
            }
            State::Head(head) => {
                head.push(c);
                if head.len() > HEAD_BYTES_MAX { Next::Not(0) } else { Next::More }
            }
            State::Arguments(json) => {
                let Some(mark) = json.step(c) else { return Next::Not(c.len_utf8()) };
                append(&mut self.fragment, c, mark);
                calls.arguments(&self.fragment);
                self.fragment.clear();
                if json.done() { self.behind(0, calls) } else { Next::More }
            }
            State::Tail(read) => {
                let read = *read;
                match self.scan.anchored(c, &self.heads.tail[read..=read]) {
                    Err(other) => Next::Not(other),
                    Ok(None) => Next::More,
                    Ok(Some(_)) => self.behind(read + 1, calls),
                }
            }
        }
    }

    /// Ends the output; returns whether all that was read is whole.
    pub(super) fn finish(&mut self, calls: &mut Calls) -> bool {
        match self.state {
            State::Between | State::Head(_) | State::Arguments(_) => false,
            State::Tail(_) => calls.end().is_some(),
        }
    }

    /// Moves on behind the arguments.
    fn behind(&mut self, read: usize, calls: &mut Calls) -> Next {
        self.state = State::Tail(read);
        if read < self.heads.tail.len() {
            return Next::More;
        }
        self.state = State::Between;
        match calls.end() {
            None => Next::Not(0),
            Some(()) if self.heads.between.is_empty() => Next::Closed,
            Some(()) => Next::More,
        }
    }
}
