//! Turns a model's output into text, reasoning and calls, as it comes.
//!
//! The parts depend on the text alone, never on how it is split. Each character is read once; only what
//! cannot be a marker after all, at most a marker's length, is read again. What is held back is bounded: a
//! marker's length, and the text of one call. Who calls it: the edge of the engine, a parser for each output.

use std::sync::Arc;

use super::calls::{Calls, Next};
use super::format::Format;
use super::harmony::Harmony;
use super::piece::{Dropped, Piece};
use super::reader::Reader;
use super::reasoning::{Reasoning, Start};
use super::said::{After, Speech, Thought};
use super::scan::Scan;
use super::{CALL_BYTES_MAX, Tool};

/// What a model's output is written in; without a format, calls are text, and reasoning likewise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Syntax {
    /// How it writes calls.
    pub format: Option<Format>,
    /// How it marks reasoning.
    pub reasoning: Option<Reasoning>,
}

#[derive(Clone, Debug)]
enum Mode {
    Text,
    Reasoning,
    Block(Box<Block>),
    Harmony(Box<Harmony>),
}

/// A block of calls.
#[derive(Clone, Debug)]
struct Block {
    reader: Reader,
    /// Whether it stands in reasoning that was not closed.
    in_reasoning: bool,
    /// The calls before it.
    before: u32,
}

/// The parser of one output.
#[derive(Clone, Debug)]
pub struct Parser {
    syntax: Syntax,
    mode: Mode,
    /// What opens calls, then what opens reasoning and what closes it, as far as the syntax has them.
    markers: Vec<&'static str>,
    scan: Scan,
    speech: Speech,
    thought: Thought,
    /// Whether a call has ended reasoning that its marker may still close.
    interrupted: bool,
    calls: Calls,
    call_bytes_max: usize,
    /// Whether a call may end reasoning.
    calls_in_reasoning: bool,
    /// Characters that go out next.
    plain: String,
}

impl Parser {
    /// Starts an output that begins in `start`. The tools give arguments between tags their types.
    #[must_use]
    pub fn new(syntax: Syntax, tools: Arc<[Tool]>, start: Start) -> Self {
        let Syntax { format, reasoning } = syntax;
        let in_reasoning = start == Start::Reasoning && reasoning.is_some();
        let harmony = format == Some(Format::Harmony) || reasoning == Some(Reasoning::Harmony);
        let mut markers = format.map_or(&[][..], Format::openers).to_vec();
        markers.extend(reasoning.into_iter().flat_map(|way| [way.open(), way.close()]));
        Self {
            syntax,
            mode: match (harmony, in_reasoning) {
                (true, _) => Mode::Harmony(Box::new(Harmony::new(in_reasoning, format.is_some()))),
                (false, true) => Mode::Reasoning,
                (false, false) => Mode::Text,
            },
            markers,
            scan: Scan::default(),
            speech: Speech::default(),
            thought: Thought::default(),
            interrupted: false,
            calls: Calls::new(tools),
            call_bytes_max: CALL_BYTES_MAX,
            calls_in_reasoning: true,
            plain: String::new(),
        }
    }

    /// Starts an output that continues the model's own words, which are none of it: what they leave open goes
    /// on, and they have begun the text or the reasoning. Calls in them are text.
    #[must_use]
    pub fn continuing(syntax: Syntax, tools: Arc<[Tool]>, words: &str) -> Self {
        let mut read = Self::new(Syntax { format: None, ..syntax }, [].into(), Start::Text);
        read.push(words);
        let in_reasoning = read.in_reasoning();
        if let Mode::Text | Mode::Reasoning = read.mode {
            let held = read.scan.take();
            read.say(&held);
        }
        read.speech.spoken();
        read.thought.thought();
        let start = if in_reasoning { Start::Reasoning } else { Start::Text };
        let mut parser = Self::new(syntax, tools, start);
        if let Mode::Harmony(harmony) = &mut parser.mode
            && !in_reasoning
            && !words.trim().is_empty()
        {
            harmony.within_text();
        }
        Self { speech: read.speech, thought: read.thought, ..parser }
    }

    /// Sets how long the text of one call may be.
    #[must_use]
    pub fn with_call_bytes_max(self, call_bytes_max: usize) -> Self {
        Self { call_bytes_max, ..self }
    }

    /// Leaves in reasoning what looks like a call: only its own marker ends it.
    pub fn end_reasoning_by_its_marker(&mut self) {
        self.calls_in_reasoning = false;
    }

    /// Takes the next characters and returns the parts that are certain.
    pub fn push(&mut self, text: &str) -> Vec<Piece> {
        for c in text.chars() {
            self.read(c);
        }
        std::mem::take(&mut self.calls.pieces)
    }

    /// Ends the output and returns the rest. `by_length`: at a limit or by cancellation, where an unfinished
    /// call is neither text nor a call. Otherwise a call that lacks only its closing marker is one, and any
    /// other unfinished one is text.
    pub fn finish(&mut self, by_length: bool) -> Vec<Piece> {
        match &mut self.mode {
            Mode::Harmony(harmony) => harmony.finish(by_length, &mut self.calls),
            Mode::Block(block) => {
                let whole = block.reader.finish(by_length, &mut self.calls);
                // What was perhaps an answer, or goes on behind a call, is not dropped.
                let prose = self.syntax.format.is_some_and(|format| format.may_be_prose(&self.calls.raw));
                let text = prose && !self.calls.is_open() || block.reader.closed_within();
                if whole || by_length && !text {
                    self.calls.drop_open(Dropped::Cut);
                    self.close_block();
                } else {
                    self.give_up(Dropped::Broken, 0);
                }
            }
            Mode::Text | Mode::Reasoning => {}
        }
        let held = self.scan.take();
        match &self.mode {
            Mode::Reasoning => {
                self.thought.think(&held, &mut self.calls.pieces);
                self.thought.release(&mut self.calls.pieces);
            }
            Mode::Text | Mode::Block(_) | Mode::Harmony(_) => self.speech.say(&held, &mut self.calls.pieces),
        }
        self.speech.finish(&mut self.calls.pieces);
        std::mem::take(&mut self.calls.pieces)
    }

    /// Whether the next character is reasoning, as far as is known.
    #[must_use]
    pub fn in_reasoning(&self) -> bool {
        match &self.mode {
            Mode::Reasoning => true,
            Mode::Harmony(harmony) => harmony.in_reasoning(),
            Mode::Text | Mode::Block(_) => false,
        }
    }

    /// Whether the next character is the answer's, text or the beginning of a call, as far as is known.
    #[must_use]
    pub fn speaks(&self) -> bool {
        match &self.mode {
            Mode::Text => true,
            Mode::Harmony(harmony) => harmony.speaks(),
            Mode::Reasoning | Mode::Block(_) => false,
        }
    }

    /// Returns how many bytes have come of the marker that closes the reasoning.
    #[must_use]
    pub fn closing_came(&self) -> usize {
        let close = match (&self.mode, self.syntax.reasoning) {
            (Mode::Reasoning, Some(way)) => way.close(),
            _ => return 0,
        };
        let held = self.scan.held().as_bytes();
        (1..close.len()).rev().find(|came| held.ends_with(&close.as_bytes()[..*came])).unwrap_or(0)
    }

    /// Whether the next character belongs to a call, as far as is known.
    #[must_use]
    pub fn in_call(&self) -> bool {
        match &self.mode {
            Mode::Block(_) => true,
            Mode::Harmony(harmony) => harmony.in_call(),
            Mode::Text | Mode::Reasoning => false,
        }
    }

    fn read(&mut self, c: char) {
        if let Mode::Harmony(harmony) = &mut self.mode {
            return harmony.read(c, self.call_bytes_max, &mut self.calls);
        }
        if matches!(self.mode, Mode::Block(_)) {
            return self.in_block(c);
        }
        if self.is_bare_call(c) {
            return self.open_block(0, "", Some(c));
        }
        let found = self.scan.step(c, &self.markers, &mut self.plain);
        if !self.plain.is_empty() {
            let mut plain = std::mem::take(&mut self.plain);
            self.say(&plain);
            plain.clear();
            self.plain = plain;
        }
        if let Some(marker) = found {
            self.marker(marker);
        }
    }

    /// Llama's calls need no marker where the answer begins with one.
    fn is_bare_call(&self, c: char) -> bool {
        let speaks = matches!(self.mode, Mode::Text) && self.speech.opens_answer();
        c == '{' && speaks && self.syntax.format == Some(Format::Llama3Json) && self.scan.held().is_empty()
    }

    /// Says or thinks a text.
    fn say(&mut self, text: &str) {
        if matches!(self.mode, Mode::Reasoning) {
            self.thought.think(text, &mut self.calls.pieces);
        } else {
            self.speech.say(text, &mut self.calls.pieces);
        }
    }

    fn marker(&mut self, marker: usize) {
        let text = self.markers[marker];
        let openers = self.syntax.format.map_or(0, |format| format.openers().len());
        let thinks = matches!(self.mode, Mode::Reasoning);
        let anywhere = self.syntax.reasoning.is_some_and(Reasoning::anywhere);
        match marker.checked_sub(openers) {
            // In reasoning a call begins a line: elsewhere the model speaks of one.
            None if !thinks || self.calls_in_reasoning && self.thought.line_ended() => {
                match text.strip_suffix('[') {
                    Some(opener) => self.open_block(marker, opener, Some('[')),
                    None => self.open_block(marker, text, None),
                }
            }
            // The prompt has opened the reasoning, and the model opens it again.
            Some(0) if thinks && !self.thought.begun() => {}
            Some(0) if !thinks && (anywhere || !self.speech.begun()) => {
                self.thought = Thought::default();
                self.mode = Mode::Reasoning;
            }
            Some(1) if thinks || self.interrupted || !self.speech.begun() => {
                self.interrupted = false;
                self.speech = Speech::new(After::Reasoning);
                self.mode = Mode::Text;
            }
            _ => self.say(text),
        }
    }
}

/// Blocks of calls.
impl Parser {
    /// Opens a block; `first` is its first character, if it is known.
    fn open_block(&mut self, opener: usize, text: &str, first: Option<char>) {
        let Some(format) = self.syntax.format else { return };
        let Some(reader) = format.reader(opener) else { return };
        let in_reasoning = matches!(self.mode, Mode::Reasoning);
        self.calls.raw.clear();
        self.calls.raw.push_str(text);
        let block = Block { reader, in_reasoning, before: self.calls.count };
        self.mode = Mode::Block(Box::new(block));
        if let Some(first) = first {
            self.in_block(first);
        }
    }

    fn in_block(&mut self, c: char) {
        let Mode::Block(block) = &mut self.mode else { return };
        self.calls.raw.push(c);
        let next = block.reader.read(c, &mut self.calls);
        let called = self.calls.count > block.before;
        match next {
            Next::More if self.calls.raw.len() > self.call_bytes_max => self.give_up(Dropped::TooLong, 0),
            Next::More => {}
            // A block without calls is text.
            Next::Closed if !called => self.give_up(Dropped::Broken, 0),
            Next::Closed => self.close_block(),
            Next::Not(other) => self.give_up(Dropped::Broken, other),
        }
    }

    /// Ends a block of whole calls.
    fn close_block(&mut self) {
        let Mode::Block(block) = &self.mode else { return };
        self.interrupted |= block.in_reasoning;
        self.speech = Speech::new(After::Call);
        self.mode = Mode::Text;
        self.calls.raw.clear();
    }

    /// What was read since the block began, or since its last call, is not a call. Its last bytes are read
    /// anew.
    fn give_up(&mut self, why: Dropped, again: usize) {
        let Mode::Block(block) = &self.mode else { return };
        let (in_reasoning, called) = (block.in_reasoning, self.calls.count > block.before);
        self.calls.drop_open(why);
        let raw = std::mem::take(&mut self.calls.raw);
        if called {
            self.interrupted |= in_reasoning;
            self.speech = Speech::new(After::Call);
        }
        self.mode = if in_reasoning && !called { Mode::Reasoning } else { Mode::Text };
        let (text, rest) =
            raw.split_at_checked(raw.len().saturating_sub(again)).unwrap_or((raw.as_str(), ""));
        self.say(text);
        for c in rest.chars() {
            self.read(c);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::super::Collected;
    use super::*;

    /// Returns the reasoning, the text and the number of calls of an output behind a model's own words.
    fn continued(
        format: Option<Format>,
        way: Reasoning,
        words: &str,
        output: &str,
    ) -> (String, String, usize) {
        let syntax = Syntax { format, reasoning: Some(way) };
        let tool = Tool { name: "f".into(), description: String::new(), parameters: Value::Null };
        let mut parser = Parser::continuing(syntax, Arc::new([tool]), words);
        let mut pieces: Vec<Piece> =
            output.chars().flat_map(|c| parser.push(c.encode_utf8(&mut [0; 4]))).collect();
        pieces.extend(parser.finish(false));
        let Collected { reasoning, text, calls, .. } = Collected::of(&pieces);
        (reasoning, text, calls.len())
    }

    #[test]
    fn words_that_are_continued_have_begun_their_part() {
        let is = |words: &str, output: &str, reasoning: &str, text: &str| {
            let expected = (reasoning.to_owned(), text.to_owned(), 0);
            assert_eq!(continued(None, Reasoning::Think, words, output), expected, "{words:?} {output:?}");
        };
        is("<think>\nOne.", "\n\nTwo.\n</think>\n\nSo", "\n\nTwo.", "So");
        is("<think>\nOne.\n", "Two.", "Two.", "");
        is("<think>Hm</think>So", " it is.", "", " it is.");
        is("It ends with ", "</think>, then", "", "</think>, then");
        is("It begins with ", "<think> and", "", "<think> and");
        // What is perhaps a mark is none of the output.
        is("a <thi", "nk>", "", "nk>");
        // White space begins nothing.
        is(" \n", "<think>a</think>b", "a", "b");
        is(" \n", "  b", "", "  b");
    }

    #[test]
    fn reasoning_may_be_ended_by_its_marker_alone() {
        let syntax = Syntax { format: Some(Format::Hermes), reasoning: Some(Reasoning::Think) };
        let call = r#"<tool_call>{"name": "f", "arguments": {}}</tool_call>"#;
        let output = format!("Hm\n{call}\n</think>{call}");
        let read = |by_marker| {
            let mut parser = Parser::new(syntax, [].into(), Start::Reasoning);
            if by_marker {
                parser.end_reasoning_by_its_marker();
            }
            let mut pieces = parser.push(&output);
            pieces.extend(parser.finish(false));
            let Collected { reasoning, text, calls, .. } = Collected::of(&pieces);
            (reasoning, text, calls.len())
        };
        assert_eq!(read(true), (format!("Hm\n{call}"), String::new(), 1));
        assert_eq!(read(false), ("Hm".into(), String::new(), 2));
    }

    #[test]
    fn what_has_come_of_the_closing_marker_is_known() {
        let syntax = Syntax { format: Some(Format::Hermes), reasoning: Some(Reasoning::Think) };
        let mut parser = Parser::new(syntax, [].into(), Start::Reasoning);
        for (text, came) in
            [("a", 0), ("<", 1), ("/thi", 5), ("n ", 0), ("<</", 2), ("think", 7), (">", 0), ("</", 0)]
        {
            parser.push(text);
            assert_eq!(parser.closing_came(), came, "{text}");
        }
    }

    #[test]
    fn calls_are_not_read_from_words_that_are_continued() {
        let call = r#"{"name": "f", "parameters": {}}"#;
        let llama = |words: &str| continued(Some(Format::Llama3Json), Reasoning::Think, words, call);
        assert_eq!(llama("The JSON is "), (String::new(), call.to_owned(), 0));
        assert_eq!(llama(" "), (String::new(), String::new(), 1));
        let words = r#"<tool_call>{"name": "f", "#;
        let rest = r#""arguments": {}}</tool_call>"#;
        let hermes =
            |words: &str, output: &str| continued(Some(Format::Hermes), Reasoning::Think, words, output);
        assert_eq!(hermes(words, rest), (String::new(), rest.to_owned(), 0));
        assert_eq!(hermes("So: ", &[words, rest].concat()), (String::new(), String::new(), 1));
        // In reasoning a call begins a line.
        assert_eq!(hermes("<think>So\n", &[words, rest].concat()).2, 1);
        assert_eq!(hermes("<think>So ", &[words, rest].concat()).2, 0);
    }

    #[test]
    fn words_of_harmony_are_text_unless_they_open_reasoning() {
        let read =
            |words: &str, output: &str| continued(Some(Format::Harmony), Reasoning::Harmony, words, output);
        let next = "<|end|><|start|>assistant<|channel|>final<|message|>b";
        assert_eq!(read("a", &["to=me", next].concat()), (String::new(), "to=meb".to_owned(), 0));
        let words = "<|channel|>analysis<|message|>a";
        assert_eq!(read(words, &["\nc", next].concat()), ("\nc".to_owned(), "b".to_owned(), 0));
    }
}
