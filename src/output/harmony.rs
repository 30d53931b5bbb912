//! Reads harmony, the form of gpt-oss: messages with a header that says who speaks to whom on which channel.
//!
//! `<|channel|>analysis` is reasoning; `<|channel|>final`, and `commentary` to nobody, is text; what is
//! addressed to `functions.name` is a call with JSON arguments; what is addressed to other tools is
//! reasoning, since nobody else may see it. The output begins behind `<|start|>assistant`, in a header, or in
//! a message if the prompt has opened one. Its form is public: OpenAI's harmony response format.

use super::calls::Calls;
use super::json::{Json, append};
use super::piece::{Dropped, push_reasoning, push_text};
use super::scan::Scan;

/// Longest header, in bytes.
const HEADER_BYTES_MAX: usize = 1024;
/// What a header begins with.
const HEADS: [&str; 4] = ["<|start|>", "<|channel|>", "<|constrain|>", "to="];
/// What ends a message.
const ENDS: [&str; 5] = ["<|end|>", "<|return|>", "<|call|>", "<|start|>", "<|channel|>"];
const MESSAGE: &str = "<|message|>";

#[derive(Clone, Debug)]
enum State {
    Header(String),
    Text,
    Reasoning,
    Call(Json),
}

/// The state of one output.
#[derive(Clone, Debug)]
pub(super) struct Harmony {
    state: State,
    /// Whether calls are calls, or text.
    with_calls: bool,
    scan: Scan,
    /// Characters that go out next.
    fragment: String,
}

impl Harmony {
    /// Starts where the prompt ends: in a message of reasoning, or before one.
    pub(super) fn new(in_reasoning: bool, with_calls: bool) -> Self {
        let state = if in_reasoning { State::Reasoning } else { State::Header(String::new()) };
        Self { state, with_calls, scan: Scan::default(), fragment: String::new() }
    }

    /// Starts in a message of text that the prompt has opened.
    pub(super) fn within_text(&mut self) {
        self.state = State::Text;
    }

    pub(super) fn in_reasoning(&self) -> bool {
        matches!(self.state, State::Reasoning)
    }

    pub(super) fn speaks(&self) -> bool {
        matches!(self.state, State::Text)
    }

    pub(super) fn in_call(&self) -> bool {
        matches!(self.state, State::Call(_))
    }

    pub(super) fn read(&mut self, c: char, bytes_max: usize, calls: &mut Calls) {
        match &mut self.state {
            State::Header(header) => {
                calls.raw.push(c);
                if self.scan.step(c, &[MESSAGE], header).is_some() {
                    let header = std::mem::take(header);
                    self.begin(&header, calls);
                } else if header.len() > HEADER_BYTES_MAX || !may_be_header(header) {
                    self.give_up(Dropped::Broken, calls);
                }
            }
            State::Text | State::Reasoning => {
                let end = self.scan.step(c, &ENDS, &mut self.fragment);
                self.say(calls);
                if let Some(end) = end {
                    self.end(end, calls);
                }
            }
            State::Call(json) => {
                calls.raw.push(c);
                if json.done() {
                    self.behind(c, calls);
                } else if let Some(mark) = json.step(c) {
                    append(&mut self.fragment, c, mark);
                    calls.arguments(&self.fragment);
                    self.fragment.clear();
                } else {
                    self.give_up(Dropped::Broken, calls);
                }
                if self.in_call() && calls.raw.len() > bytes_max {
                    self.give_up(Dropped::TooLong, calls);
                }
            }
        }
    }

    /// Ends the output.
    pub(super) fn finish(&mut self, by_length: bool, calls: &mut Calls) {
        match &mut self.state {
            // A header of which nothing follows is only markup.
            State::Header(header) if header.trim_start().starts_with("<|") => calls.raw.clear(),
            State::Header(header) if by_length && header.trim_start().starts_with("to=") => calls.raw.clear(),
            State::Header(_) => self.give_up(Dropped::Broken, calls),
            State::Text | State::Reasoning => {
                self.fragment += &self.scan.take();
                self.say(calls);
            }
            State::Call(json) if json.done() && calls.end().is_some() => {}
            State::Call(_) if by_length => {
                calls.drop_open(Dropped::Cut);
                calls.raw.clear();
            }
            State::Call(_) => self.give_up(Dropped::Broken, calls),
        }
        self.state = State::Text;
        self.scan = Scan::default();
    }

    /// Begins the message of a header.
    fn begin(&mut self, header: &str, calls: &mut Calls) {
        let channel = header.rsplit("<|channel|>").next().filter(|_| header.contains("<|channel|>"));
        let channel = channel.unwrap_or_default().split([' ', '<', '\n']).next().unwrap_or_default();
        let mut words = header.split([' ', '<', '>', '|', '\n']);
        let recipient = words.find_map(|word| word.strip_prefix("to="));
        let function = recipient.and_then(|recipient| {
            let name = recipient.strip_prefix("functions.");
            name.or_else(|| Some(recipient).filter(|name| calls.knows(name)))
        });
        if function.is_some() && !self.with_calls {
            return self.give_up(Dropped::Broken, calls);
        }
        let begun = function.and_then(|name| calls.begin(None, name));
        self.state = if begun.is_some() {
            State::Call(Json::new())
        } else if channel == "analysis" || recipient.is_some_and(|recipient| recipient != "user") {
            State::Reasoning
        } else {
            State::Text
        };
        if begun.is_none() {
            calls.raw.clear();
        }
    }

    /// Says what was read.
    fn say(&mut self, calls: &mut Calls) {
        if self.in_reasoning() {
            push_reasoning(&mut calls.pieces, &self.fragment);
        } else {
            push_text(&mut calls.pieces, &self.fragment);
        }
        self.fragment.clear();
    }

    /// A message has ended; the marker may begin the next header.
    fn end(&mut self, end: usize, calls: &mut Calls) {
        let begins = if end >= 3 { ENDS[end] } else { "" };
        calls.raw.clear();
        calls.raw.push_str(begins);
        self.state = State::Header(begins.to_owned());
    }

    /// Reads behind a call's arguments.
    fn behind(&mut self, c: char, calls: &mut Calls) {
        match self.scan.anchored(c, &ENDS) {
            Ok(None) => {}
            Ok(Some(end)) if calls.end().is_some() => self.end(end, calls),
            Ok(Some(_)) | Err(_) => self.give_up(Dropped::Broken, calls),
        }
    }

    /// What was read since the header began is text after all.
    fn give_up(&mut self, why: Dropped, calls: &mut Calls) {
        calls.drop_open(why);
        let raw = std::mem::take(&mut calls.raw);
        push_text(&mut calls.pieces, &raw);
        self.scan = Scan::default();
        self.state = State::Text;
    }
}

/// Whether what was read of a header can still become one.
fn may_be_header(header: &str) -> bool {
    let start = header.trim_start();
    HEADS.iter().any(|head| head.starts_with(start) || start.starts_with(head))
}
