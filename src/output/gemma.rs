//! Reads Gemma's calls: `call:name{key:<q>text<q>,n:1,list:[…],object:{…}}`, where `<q>` is the model's own
//! quote and keys are bare. One pass; nesting is bounded.

use serde_json::{Map, Value};

use super::cursor::Cursor;
use super::json::DEPTH_MAX;
use super::python::Read;

/// Returns the calls of a text, if it holds those and nothing else.
pub(super) fn calls(text: &str, quote: &'static str) -> Option<Vec<Read>> {
    let mut cursor = Cursor { rest: text.trim_end() };
    let mut calls = Vec::new();
    while !cursor.rest.trim_start().is_empty() {
        cursor.eat("call:").then_some(())?;
        let name = cursor.until("{")?.trim().to_owned();
        calls.push((name, members(&mut cursor, quote, 0)?));
    }
    (!calls.is_empty()).then_some(calls)
}

/// Reads members behind the opening brace, to the closing one.
fn members(cursor: &mut Cursor<'_>, quote: &str, depth: usize) -> Option<Map<String, Value>> {
    let mut members = Map::new();
    cursor.items("}", |cursor| {
        let key = if cursor.eat(quote) {
            let key = cursor.until(quote)?;
            cursor.eat(":").then_some(key)?
        } else {
            cursor.until(":")?.trim()
        };
        let quoted = key.strip_prefix('"').and_then(|key| key.strip_suffix('"'));
        members.insert(quoted.unwrap_or(key).to_owned(), value(cursor, quote, depth)?);
        Some(())
    })?;
    Some(members)
}

/// Reads a string in the quotes of JSON, which some models write.
fn json_string(cursor: &mut Cursor<'_>) -> Option<Value> {
    let mut escaped = false;
    let mut ends = cursor.rest.char_indices().skip(1).filter_map(|(at, c)| {
        let ends = c == '"' && !escaped;
        escaped = c == '\\' && !escaped;
        ends.then_some(at + 1)
    });
    let (text, rest) = cursor.rest.split_at(ends.next()?);
    cursor.rest = rest;
    let inner = text.trim_matches('"');
    Some(serde_json::from_str(text).unwrap_or_else(|_| inner.into()))
}

fn value(cursor: &mut Cursor<'_>, quote: &str, depth: usize) -> Option<Value> {
    if cursor.eat(quote) {
        return cursor.until(quote).map(Value::from);
    }
    if cursor.rest.starts_with('"') {
        return json_string(cursor);
    }
    // The arguments are one level, and this would be another one.
    if depth + 2 > DEPTH_MAX && cursor.rest.starts_with(['{', '[']) {
        return None;
    }
    if cursor.eat("{") {
        return members(cursor, quote, depth + 1).map(Value::Object);
    }
    if cursor.eat("[") {
        let mut values = Vec::new();
        cursor.items("]", |cursor| {
            values.push(value(cursor, quote, depth + 1)?);
            Some(())
        })?;
        return Some(Value::Array(values));
    }
    let end = cursor.rest.find([',', '}', ']'])?;
    let (word, rest) = cursor.rest.split_at(end);
    cursor.rest = rest;
    let word = word.trim();
    // A bare word that is not JSON is a string without its quotes.
    Some(serde_json::from_str(word).unwrap_or_else(|_| word.into()))
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
