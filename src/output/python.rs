//! Reads Python: literals, and lists of calls with named arguments, `[f(a=1, b="x"), g()]`.
//!
//! JSON's `true`, `false` and `null` are read as well, since templates write containers as JSON. Not read:
//! prefixes of strings, sets, expressions. One pass; nesting is bounded.

use serde_json::{Map, Number, Value};

use super::cursor::Cursor;
use super::json::DEPTH_MAX;

/// A function's name and its arguments.
pub(super) type Read = (String, Map<String, Value>);

/// Returns the value of a literal, if the text is one and nothing else.
pub(super) fn literal(text: &str) -> Option<Value> {
    let mut cursor = Cursor { rest: text.trim() };
    let value = cursor.value(0)?;
    cursor.rest.trim().is_empty().then_some(value)
}

/// Returns the calls of a list, if the text is one and nothing else.
pub(super) fn calls(text: &str) -> Option<Vec<Read>> {
    let mut cursor = Cursor { rest: text.trim() };
    cursor.eat("[").then_some(())?;
    let mut calls = Vec::new();
    cursor.items("]", |cursor| {
        calls.push(cursor.call()?);
        Some(())
    })?;
    (cursor.rest.trim().is_empty() && !calls.is_empty()).then_some(calls)
}

impl<'a> Cursor<'a> {
    /// Takes the characters that belong to a word.
    fn word(&mut self, belongs: fn(char) -> bool) -> &'a str {
        self.rest = self.rest.trim_start();
        let end = self.rest.find(|c: char| !belongs(c)).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest;
        word
    }

    fn call(&mut self) -> Option<Read> {
        let name = self.word(|c| c.is_alphanumeric() || "_.-".contains(c));
        (!name.is_empty() && self.eat("(")).then_some(())?;
        let mut arguments = Map::new();
        self.items(")", |cursor| {
            let key = cursor.word(|c| c.is_alphanumeric() || c == '_');
            (!key.is_empty() && cursor.eat("=")).then_some(())?;
            arguments.insert(key.to_owned(), cursor.value(0)?);
            Some(())
        })?;
        Some((name.to_owned(), arguments))
    }

    fn value(&mut self, depth: usize) -> Option<Value> {
        self.rest = self.rest.trim_start();
        let first = self.rest.chars().next()?;
        // The arguments are one level, and this would be another one.
        if depth + 2 > DEPTH_MAX && "[({".contains(first) {
            return None;
        }
        match first {
            '"' | '\'' => self.strings().map(Value::String),
            '[' => self.list("[", "]", depth),
            '(' => self.list("(", ")", depth),
            '{' => self.dict(depth),
            _ => scalar(self.word(|c| c.is_alphanumeric() || "_+-.".contains(c))),
        }
    }

    fn list(&mut self, open: &str, close: &str, depth: usize) -> Option<Value> {
        self.eat(open);
        let mut values = Vec::new();
        self.items(close, |cursor| {
            values.push(cursor.value(depth + 1)?);
            Some(())
        })?;
        Some(Value::Array(values))
    }

    fn dict(&mut self, depth: usize) -> Option<Value> {
        self.eat("{");
        let mut members = Map::new();
        self.items("}", |cursor| {
            let key = match cursor.value(depth + 1)? {
                Value::String(key) => key,
                Value::Number(key) => key.to_string(),
                Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => return None,
            };
            cursor.eat(":").then_some(())?;
            members.insert(key, cursor.value(depth + 1)?);
            Some(())
        })?;
        Some(Value::Object(members))
    }

    /// Reads a string and those that follow at once, which Python joins.
    fn strings(&mut self) -> Option<String> {
        let mut text = String::new();
        loop {
            let quote = if self.eat("\"") {
                '"'
            } else if self.eat("'") {
                '\''
            } else {
                return Some(text);
            };
            self.string(quote, &mut text)?;
        }
    }

    fn string(&mut self, quote: char, text: &mut String) -> Option<()> {
        let mut characters = self.rest.chars();
        loop {
            match characters.next()? {
                c if c == quote => break,
                '\\' => {
                    self.rest = characters.as_str();
                    self.escape(text)?;
                    characters = self.rest.chars();
                }
                c => text.push(c),
            }
        }
        self.rest = characters.as_str();
        Some(())
    }

    /// Reads what follows a backslash. An unknown escape stands for itself.
    fn escape(&mut self, text: &mut String) -> Option<()> {
        let mut characters = self.rest.chars();
        let c = characters.next()?;
        self.rest = characters.as_str();
        match c {
            '\n' => {}
            'n' => text.push('\n'),
            't' => text.push('\t'),
            'r' => text.push('\r'),
            'b' => text.push('\u{8}'),
            'f' => text.push('\u{c}'),
            '0' => text.push('\0'),
            '\\' | '\'' | '"' | '/' => text.push(c),
            'x' => self.code(2, text)?,
            'u' => self.unicode(text)?,
            'U' => self.code(8, text)?,
            _ => text.extend(['\\', c]),
        }
        Some(())
    }

    fn digits(&mut self, count: usize) -> Option<u32> {
        let (digits, rest) = self.rest.split_at_checked(count)?;
        digits.bytes().all(|byte| byte.is_ascii_hexdigit()).then_some(())?;
        self.rest = rest;
        u32::from_str_radix(digits, 16).ok()
    }

    fn code(&mut self, digits: usize, text: &mut String) -> Option<()> {
        text.push(char::from_u32(self.digits(digits)?)?);
        Some(())
    }

    /// Reads four digits, or two times four for a pair of surrogates.
    fn unicode(&mut self, text: &mut String) -> Option<()> {
        let high = self.digits(4)?;
        let code = if (0xd800..0xdc00).contains(&high) {
            self.rest = self.rest.strip_prefix("\\u")?;
            let low = self.digits(4)?.checked_sub(0xdc00).filter(|low| *low < 0x400)?;
            0x10000 + ((high - 0xd800) << 10) + low
        } else {
            high
        };
        text.push(char::from_u32(code)?);
        Some(())
    }
}

fn scalar(word: &str) -> Option<Value> {
    match word {
        "True" | "true" => return Some(Value::Bool(true)),
        "False" | "false" => return Some(Value::Bool(false)),
        "None" | "null" => return Some(Value::Null),
        _ => {}
    }
    let digits = word.strip_prefix('+').unwrap_or(word);
    digits.contains(|c: char| c.is_ascii_digit()).then_some(())?;
    if let Ok(number) = digits.parse::<i64>() {
        return Some(number.into());
    }
    if let Ok(number) = digits.parse::<u64>() {
        return Some(number.into());
    }
    Number::from_f64(digits.parse().ok()?).map(Value::Number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn literals_are_read_as_python_does() {
        let cases = [
            ("'it\\'s'", json!("it's")),
            ("\"a\" 'b'", json!("ab")),
            (r"'\x41\u00e9\U0001f600\ud83d\ude00\d'", json!("Aé😀😀\\d")),
            ("[1, -2.5, 1e3, +4, (None, True), ]", json!([1, -2.5, 1000.0, 4, [null, true]])),
            ("{'a': {'b': []}, \"c\": false,}", json!({ "a": { "b": [] }, "c": false })),
            (" null ", json!(null)),
        ];
        for (text, wanted) in cases {
            assert_eq!(literal(text), Some(wanted), "{text}");
        }
        for text in ["", "x", "1 2", "'open", "[1", "{1}", "nan", "1e999", "inf", "f()", "[,]"] {
            assert_eq!(literal(text), None, "{text}");
        }
        let deep = |levels: usize| literal(&("[".repeat(levels) + &"]".repeat(levels)));
        assert!(deep(DEPTH_MAX - 1).is_some());
        assert_eq!(deep(DEPTH_MAX), None);
    }

    #[test]
    fn calls_are_read_with_their_named_arguments() {
        let read = calls("[a.b(x=1, y='z)',), c()]").unwrap();
        assert_eq!(read.len(), 2);
        assert_eq!(
            (read[0].0.as_str(), Value::Object(read[0].1.clone())),
            ("a.b", json!({ "x": 1, "y": "z)" }))
        );
        assert_eq!((read[1].0.as_str(), read[1].1.len()), ("c", 0));
        for text in ["[]", "a()", "[a(1)]", "[a(x=1]", "[a(x=)]", "[a()] b"] {
            assert_eq!(calls(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn json_is_python(text in r#"[\[\]{}",:0-9a-c\\ ]{0,12}"#) {
            let json: Option<Value> = serde_json::from_str(&text).ok();
            if let Some(json @ (Value::Array(_) | Value::Object(_))) = json
                && !text.contains('\\')
            {
                prop_assert_eq!(literal(&text).map(|value| value.to_string()), Some(json.to_string()));
            }
        }

        #[test]
        fn any_text_is_read_or_refused(text in "\\PC{0,40}") {
            literal(&text);
            calls(&text);
        }
    }
}
