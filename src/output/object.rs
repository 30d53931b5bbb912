//! Reads a call that is one JSON object: `{"name": …, "arguments": {…}}`.
//!
//! `parameters` is another word for `arguments`; they may be an object, its text as a string, or null. Other
//! members are skipped. The call begins as soon as its name is known.

use serde_json::{Map, Value};

use super::calls::Calls;
use super::json::{Json, Mark, append};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Member {
    Name,
    Id,
    Arguments,
    Other,
}

/// The state of one object.
#[derive(Clone, Debug)]
pub(super) struct Object {
    json: Json,
    /// The key being read, with its quotes.
    key: String,
    member: Member,
    /// The value being read.
    value: String,
    id: Option<String>,
    begun: bool,
    /// Arguments that came before the name.
    early: Option<String>,
    /// Whether the arguments were seen.
    given: bool,
    /// Whether they go out as they are read.
    streams: bool,
    /// Whether only functions that may be called are.
    known_only: bool,
}

impl Object {
    /// Starts before the opening brace.
    pub(super) fn new(known_only: bool) -> Self {
        Self {
            json: Json::new(),
            key: String::new(),
            member: Member::Other,
            value: String::new(),
            id: None,
            begun: false,
            early: None,
            given: false,
            streams: false,
            known_only,
        }
    }

    /// Takes a character. Returns whether the object ends here, `None` if it is not a call.
    pub(super) fn read(&mut self, c: char, calls: &mut Calls) -> Option<bool> {
        let before = self.json.depth();
        let mark = self.json.step(c)?;
        match (before, mark) {
            (0, _) if c != '{' => return None,
            (0, _) | (1, Mark::Space | Mark::Colon) => {}
            (1, Mark::Key) => append(&mut self.key, c, mark),
            (1, Mark::KeyEnd) => {
                self.key.push(c);
                self.begin_member()?;
            }
            (1, Mark::Comma) => self.end_member(calls)?,
            (1, Mark::Close) => {
                self.end_member(calls)?;
                return self.close(calls).map(|()| true);
            }
            _ => self.in_value(c, mark, calls),
        }
        Some(false)
    }

    fn begin_member(&mut self) -> Option<()> {
        let key: String = serde_json::from_str(&std::mem::take(&mut self.key)).ok()?;
        self.member = match key.as_str() {
            "name" => Member::Name,
            "id" => Member::Id,
            "arguments" | "parameters" => Member::Arguments,
            // Without a marker, an object with other members is an answer in JSON.
            _ if self.known_only && key != "type" => return None,
            _ => Member::Other,
        };
        if self.member == Member::Arguments && std::mem::replace(&mut self.given, true) {
            return None;
        }
        Some(())
    }

    fn in_value(&mut self, c: char, mark: Mark, calls: &mut Calls) {
        if self.member == Member::Other {
            return;
        }
        if self.member == Member::Arguments && self.value.is_empty() && c == '{' && self.begun {
            self.streams = true;
        }
        append(&mut self.value, c, mark);
        if self.streams {
            calls.arguments(&self.value);
            self.value.clear();
        }
    }

    fn end_member(&mut self, calls: &mut Calls) -> Option<()> {
        let value = std::mem::take(&mut self.value);
        match self.member {
            Member::Name => {
                let name: String = serde_json::from_str(&value).ok()?;
                if self.known_only && !calls.knows(&name) {
                    return None;
                }
                calls.begin(self.id.take(), &name)?;
                self.begun = true;
                if let Some(early) = self.early.take() {
                    calls.arguments(&early);
                }
            }
            // An id of another type says nothing.
            Member::Id => self.id = serde_json::from_str(&value).ok(),
            Member::Arguments if self.streams => self.streams = false,
            Member::Arguments => {
                let arguments = object_text(&value)?;
                if self.begun {
                    calls.arguments(&arguments);
                } else {
                    self.early = Some(arguments);
                }
            }
            Member::Other => {}
        }
        self.member = Member::Other;
        Some(())
    }

    fn close(&mut self, calls: &mut Calls) -> Option<()> {
        if !self.given {
            calls.arguments("{}");
        }
        self.begun.then_some(())
    }
}

/// Returns the text of an object that is written as such, as a string, or as null.
pub(super) fn object_text(value: &str) -> Option<String> {
    let text = if value.starts_with('"') { serde_json::from_str(value).ok()? } else { value.to_owned() };
    if matches!(text.trim(), "null" | "") {
        return Some("{}".to_owned());
    }
    serde_json::from_str::<Map<String, Value>>(&text).ok()?;
    Some(text)
}
