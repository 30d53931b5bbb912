//! Reads blocks of calls that are not JSON: kept until their closing marker, then read at once.

use serde_json::Value;

use super::calls::{Calls, Next, is_name};
use super::object::object_text;
use super::python::Read;
use super::scan::Scan;
use super::{gemma, python};

/// How a format writes such calls.
#[derive(Debug)]
pub(super) struct Form {
    /// Ends a block.
    close: &'static str,
    /// The model's own quote; empty for those of Python.
    pub(super) quote: &'static str,
}

/// LFM2's: a list of Python calls, or of JSON objects.
pub(super) const PYTHONIC: Form = Form { close: "<|tool_call_end|>", quote: "" };
/// Gemma 4's.
pub(super) const GEMMA4: Form = Form { close: "<tool_call|>", quote: "<|\"|>" };
/// FunctionGemma's.
pub(super) const FUNCTION_GEMMA: Form = Form { close: "<end_function_call>", quote: "<escape>" };

/// What the reader stands in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Quoted {
    No,
    /// A string with the model's own quotes.
    Own,
    /// A Python string.
    Python {
        quote: char,
        escaped: bool,
    },
}

/// The state of one block.
#[derive(Clone, Debug)]
pub(super) struct Literal {
    form: &'static Form,
    quoted: Quoted,
    scan: Scan,
    text: String,
    /// The last character outside of strings that is not white space.
    last: char,
    /// Looks for the closing marker within strings, where it may be one's content or a string was not closed.
    inner: Scan,
    closed_within: bool,
}

impl Literal {
    /// Starts behind the marker that opens the block.
    pub(super) fn new(form: &'static Form) -> Self {
        Self {
            form,
            quoted: Quoted::No,
            scan: Scan::default(),
            text: String::new(),
            last: ' ',
            inner: Scan::default(),
            closed_within: false,
        }
    }

    /// Whether the closing marker was read, be it within a string.
    pub(super) fn closed_within(&self) -> bool {
        self.closed_within
    }

    pub(super) fn read(&mut self, c: char, calls: &mut Calls) -> Next {
        let Form { close, quote } = *self.form;
        if self.quoted != Quoted::No {
            self.closed_within |= self.inner.step(c, &[close], &mut String::new()).is_some();
        }
        match self.quoted {
            Quoted::Python { quote, escaped } => {
                self.text.push(c);
                let ends = c == quote && !escaped;
                let escaped = c == '\\' && !escaped;
                self.quoted = if ends { Quoted::No } else { Quoted::Python { quote, escaped } };
            }
            Quoted::Own => {
                if self.scan.step(c, &[quote], &mut self.text).is_some() {
                    self.text.push_str(quote);
                    self.quoted = Quoted::No;
                }
            }
            Quoted::No if quote.is_empty() => {
                if self.scan.step(c, &[close], &mut self.text).is_some() {
                    return self.closed(calls);
                }
                if matches!(c, '"' | '\'') {
                    self.quoted = Quoted::Python { quote: c, escaped: false };
                }
            }
            // JSON's quotes open a string where a value or a key begins.
            Quoted::No if c == '"' && self.scan.held().is_empty() && ":[,{".contains(self.last) => {
                self.text.push(c);
                self.quoted = Quoted::Python { quote: c, escaped: false };
            }
            Quoted::No => match self.scan.step(c, &[close, quote], &mut self.text) {
                Some(0) => return self.closed(calls),
                Some(_) => {
                    self.text.push_str(quote);
                    self.quoted = Quoted::Own;
                }
                None => {}
            },
        }
        if !c.is_whitespace() {
            self.last = c;
        }
        Next::More
    }

    /// Ends the output; returns whether all that was read is whole.
    pub(super) fn finish(&mut self, calls: &mut Calls) -> bool {
        self.closed(calls) == Next::Closed
    }

    fn closed(&mut self, calls: &mut Calls) -> Next {
        let read = if self.form.quote.is_empty() {
            python::calls(&self.text).or_else(|| objects(&self.text))
        } else {
            gemma::calls(&self.text, self.form.quote)
        };
        // None of them is a call if one of them is broken.
        let named = read.filter(|read| read.iter().all(|(name, _)| is_name(name)));
        let done =
            named.and_then(|read| read.iter().try_for_each(|(name, arguments)| calls.whole(name, arguments)));
        if done.is_some() { Next::Closed } else { Next::Not(0) }
    }
}

/// Reads a list of calls as JSON, or one.
fn objects(text: &str) -> Option<Vec<Read>> {
    let values = match serde_json::from_str(text).ok()? {
        Value::Array(values) => values,
        value @ Value::Object(_) => vec![value],
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => return None,
    };
    let read = values.iter().map(|value| {
        let arguments = value.get("arguments").or_else(|| value.get("parameters")).unwrap_or(&Value::Null);
        let arguments = serde_json::from_str(&object_text(&arguments.to_string())?).ok()?;
        Some((value["name"].as_str()?.to_owned(), arguments))
    });
    read.collect::<Option<Vec<_>>>().filter(|read| !read.is_empty())
}
