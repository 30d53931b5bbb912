//! Reads Gemma's calls: `call:name{key:<q>text<q>,n:1,list:[…],object:{…}}`, where `<q>` is the model's own
//! quote and keys are bare. One pass; nesting is bounded.

use serde_json::{Map, Value};

use super::json::DEPTH_MAX;
use super::python::Read;

/// Returns the calls of a text, if it holds those and nothing else.
pub(super) fn calls(text: &str, quote: &'static str) -> Option<Vec<Read>> {
    let mut reader = Reader { rest: text.trim_end(), quote };
    let mut calls = Vec::new();
    while !reader.rest.trim_start().is_empty() {
        reader.eat("call:").then_some(())?;
        let name = reader.until("{")?.trim().to_owned();
        calls.push((name, reader.members(0)?));
    }
    (!calls.is_empty()).then_some(calls)
}

struct Reader<'a> {
    rest: &'a str,
    quote: &'static str,
}

impl<'a> Reader<'a> {
    /// Skips white space, and the token if it comes next.
    fn eat(&mut self, token: &str) -> bool {
        self.rest = self.rest.trim_start();
        let rest = self.rest.strip_prefix(token);
        self.rest = rest.unwrap_or(self.rest);
        rest.is_some()
    }

    /// Takes the text before a token, and the token.
    fn until(&mut self, token: &str) -> Option<&'a str> {
        let (text, rest) = self.rest.split_once(token)?;
        self.rest = rest;
        Some(text)
    }

    /// Reads members behind the opening brace, to the closing one.
    fn members(&mut self, depth: usize) -> Option<Map<String, Value>> {
        let mut members = Map::new();
        while !self.eat("}") {
            let key = if self.eat(self.quote) {
                let key = self.until(self.quote)?;
                self.eat(":").then_some(key)?
            } else {
                self.until(":")?.trim()
            };
            let quoted = key.strip_prefix('"').and_then(|key| key.strip_suffix('"'));
            members.insert(quoted.unwrap_or(key).to_owned(), self.value(depth)?);
            if !self.eat(",") {
                self.eat("}").then_some(())?;
                break;
            }
        }
        Some(members)
    }

    /// Reads a string in the quotes of JSON, which some models write.
    fn json_string(&mut self) -> Option<Value> {
        let mut escaped = false;
        let mut ends = self.rest.char_indices().skip(1).filter_map(|(at, c)| {
            let ends = c == '"' && !escaped;
            escaped = c == '\\' && !escaped;
            ends.then_some(at + 1)
        });
        let (text, rest) = self.rest.split_at(ends.next()?);
        self.rest = rest;
        let inner = text.trim_matches('"');
        Some(serde_json::from_str(text).unwrap_or_else(|_| inner.into()))
    }

    fn value(&mut self, depth: usize) -> Option<Value> {
        if self.eat(self.quote) {
            return self.until(self.quote).map(Value::from);
        }
        if self.rest.starts_with('"') {
            return self.json_string();
        }
        // The arguments are one level, and this would be another one.
        if depth + 2 > DEPTH_MAX && self.rest.starts_with(['{', '[']) {
            return None;
        }
        if self.eat("{") {
            return self.members(depth + 1).map(Value::Object);
        }
        if self.eat("[") {
            let mut values = Vec::new();
            while !self.eat("]") {
                values.push(self.value(depth + 1)?);
                if !self.eat(",") {
                    self.eat("]").then_some(())?;
                    break;
                }
            }
            return Some(Value::Array(values));
        }
        let end = self.rest.find([',', '}', ']'])?;
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest;
        let word = word.trim();
        // A bare word that is not JSON is a string without its quotes.
        Some(serde_json::from_str(word).unwrap_or_else(|_| word.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn members_are_read_with_their_types() {
        let text = "call:f{a:|x,}:{|,b:-1.5,c:[true,|,|,{d:null}],e:{},g:word}call:h{}";
        let read = calls(text, "|").unwrap();
        let wanted =
            json!({ "a": "x,}:{", "b": -1.5, "c": [true, ",", { "d": null }], "e": {}, "g": "word" });
        assert_eq!((read[0].0.as_str(), Value::Object(read[0].1.clone())), ("f", wanted));
        assert_eq!((read[1].0.as_str(), read[1].1.len()), ("h", 0));
        let read = calls(r#"call:f{a:"x, }y",b:["\"",1]}"#, "|").unwrap();
        assert_eq!(Value::Object(read[0].1.clone()), json!({ "a": "x, }y", "b": ["\"", 1] }));
        for text in ["", "f{}", "call:f", "call:f{a}", "call:f{a:|x}", "call:f{a:[1}", "call:f{} x"] {
            assert_eq!(calls(text, "|"), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "(call:|[{}\\[\\]|,:a1 ]){0,30}") {
            calls(&text, "|");
        }
    }
}
