//! Reads calls whose arguments stand between tags, each as bare text that the tool's schema gives a type.

use serde_json::{Map, Value};

use super::calls::{Calls, Next};
use super::scan::Scan;
use super::typed;

/// Longest name of a function or an argument with its quotes, in bytes.
const NAME_BYTES_MAX: usize = 1024;

/// How a format writes such calls.
#[derive(Debug)]
pub(super) struct Tags {
    /// Before a call, and behind the last one; empty if the block is one call.
    between: &'static [&'static str],
    /// Behind the function's name: what leads to the arguments, then what else may stand there.
    name_ends: &'static [&'static str],
    /// Before an argument's name, and behind the last argument.
    within: [&'static str; 2],
    /// Behind an argument's name.
    key_end: &'static str,
    /// Before a value; empty if nothing is.
    value: &'static str,
    /// Behind a value.
    pub(super) value_end: &'static str,
    /// What is not part of a value at its ends.
    trimmed: fn(&str) -> &str,
    /// Whether a text of unknown type is JSON if it can be.
    guess: bool,
}

/// Qwen3-Coder's tags, also those of Nemotron 3.
pub(super) const QWEN3_CODER: Tags = Tags {
    between: &["<function=", "</tool_call>"],
    name_ends: &[">"],
    within: ["<parameter=", "</function>"],
    key_end: ">",
    value: "",
    value_end: "</parameter>",
    trimmed: |text| {
        let text = text.strip_prefix('\n').unwrap_or(text);
        text.strip_suffix('\n').unwrap_or(text)
    },
    guess: false,
};

/// The tags of MiniMax M2.
pub(super) const MINIMAX_M2: Tags = Tags {
    between: &["<invoke name=", "</minimax:tool_call>"],
    name_ends: &[">"],
    within: ["<parameter name=", "</invoke>"],
    key_end: ">",
    value: "",
    value_end: "</parameter>",
    trimmed: str::trim,
    guess: false,
};

/// The tags of GLM 4.5 to 4.7.
pub(super) const GLM4: Tags = Tags {
    between: &[],
    name_ends: &["<arg_key>", "</tool_call>"],
    within: ["<arg_key>", "</tool_call>"],
    key_end: "</arg_key>",
    value: "<arg_value>",
    value_end: "</arg_value>",
    trimmed: str::trim,
    guess: true,
};

impl Tags {
    /// Returns the value that a text between tags is.
    pub(super) fn value_of(&self, text: &str, schema: Option<&Value>, root: &Value) -> Value {
        typed::value((self.trimmed)(text), schema, root, self.guess)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Between,
    Name,
    Within,
    Key,
    BeforeValue,
    Value,
}

/// The state of one block.
#[derive(Clone, Debug)]
pub(super) struct Tagged {
    tags: &'static Tags,
    state: State,
    scan: Scan,
    /// The name or value being read.
    text: String,
    function: String,
    key: String,
    arguments: Map<String, Value>,
}

impl Tagged {
    /// Starts behind the marker that opens the block or, `in_call`, a call.
    pub(super) fn new(tags: &'static Tags, in_call: bool) -> Self {
        Self {
            tags,
            state: if in_call { State::Name } else { State::Between },
            scan: Scan::default(),
            text: String::new(),
            function: String::new(),
            key: String::new(),
            arguments: Map::new(),
        }
    }

    pub(super) fn read(&mut self, c: char, calls: &mut Calls) -> Next {
        let tags = self.tags;
        let value = [tags.value];
        match self.state {
            State::Between => self.expect(c, tags.between, calls),
            State::Within => self.expect(c, &tags.within, calls),
            State::BeforeValue => self.expect(c, &value, calls),
            State::Name => self.until(c, tags.name_ends, calls),
            State::Key => self.until(c, &[tags.key_end], calls),
            State::Value => self.until(c, &[tags.value_end], calls),
        }
    }

    /// Ends the output; returns whether all that was read is whole.
    pub(super) fn finish(&mut self, by_length: bool, calls: &mut Calls) -> bool {
        // At a limit, more arguments may have been to come.
        self.state == State::Within && !by_length && self.end_call(calls).is_some()
    }

    /// Reads where only white space and some tags may stand.
    fn expect(&mut self, c: char, tags: &[&'static str], calls: &mut Calls) -> Next {
        match self.scan.anchored(c, tags) {
            Err(other) => Next::Not(other),
            Ok(None) => Next::More,
            Ok(Some(tag)) => self.found(tag, calls),
        }
    }

    /// Reads a name or a value to its end.
    fn until(&mut self, c: char, ends: &[&'static str], calls: &mut Calls) -> Next {
        match self.scan.step(c, ends, &mut self.text) {
            Some(tag) => self.found(tag, calls),
            None if self.state != State::Value && self.text.len() > NAME_BYTES_MAX => Next::Not(0),
            None => Next::More,
        }
    }

    fn found(&mut self, tag: usize, calls: &mut Calls) -> Next {
        match (self.state, tag) {
            (State::Between, 0) => self.go(State::Name),
            (State::Between, _) => Next::Closed,
            (State::Name, _) => self.named(tag, calls),
            (State::Within, 0) => self.go(State::Key),
            (State::Within, _) => self.ended(calls),
            (State::Key, _) => {
                self.key = bare(&std::mem::take(&mut self.text)).to_owned();
                self.go(if self.tags.value.is_empty() { State::Value } else { State::BeforeValue })
            }
            (State::BeforeValue, _) => self.go(State::Value),
            (State::Value, _) => {
                self.add_argument(calls);
                self.go(State::Within)
            }
        }
    }

    fn go(&mut self, state: State) -> Next {
        self.state = state;
        Next::More
    }

    fn named(&mut self, tag: usize, calls: &mut Calls) -> Next {
        self.function = bare(&std::mem::take(&mut self.text)).to_owned();
        if calls.begin(None, &self.function).is_none() {
            return Next::Not(0);
        }
        let block_is_call = self.tags.between.is_empty();
        match (block_is_call, tag) {
            (true, 0) => self.go(State::Key),
            (true, _) => self.ended(calls),
            (false, _) => self.go(State::Within),
        }
    }

    fn add_argument(&mut self, calls: &Calls) {
        let text = std::mem::take(&mut self.text);
        let key = std::mem::take(&mut self.key);
        let tool = calls.tool(&self.function);
        let root = tool.map_or(&Value::Null, |tool| &tool.parameters);
        let schema = root["properties"].get(&key);
        let value = self.tags.value_of(&text, schema, root);
        self.arguments.insert(key, value);
    }

    fn ended(&mut self, calls: &mut Calls) -> Next {
        match self.end_call(calls) {
            None => Next::Not(0),
            Some(()) if self.tags.between.is_empty() => Next::Closed,
            Some(()) => self.go(State::Between),
        }
    }

    fn end_call(&mut self, calls: &mut Calls) -> Option<()> {
        let arguments = serde_json::to_string(&std::mem::take(&mut self.arguments)).ok()?;
        calls.arguments(&arguments);
        calls.end()
    }
}

/// Returns a name without white space and quotes around it.
fn bare(name: &str) -> &str {
    let name = name.trim();
    let inner = |quote: char| name.strip_prefix(quote).and_then(|name| name.strip_suffix(quote));
    inner('"').or_else(|| inner('\'')).unwrap_or(name)
}
