//! Follows JSON character by character: where it is, and whether it can still become a JSON object.
//!
//! Numbers and words are followed loosely: who keeps a value has it checked by serde_json in the end. Memory
//! is the depth, which is bounded.

/// Levels of nesting, as serde_json reads them, the object of the arguments included.
pub(super) const DEPTH_MAX: usize = 127;

/// What a character is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mark {
    /// White space between tokens.
    Space,
    /// Opens an object or an array.
    Open,
    /// Closes one.
    Close,
    /// Stands in a key, quotes included.
    Key,
    /// The quote that ends a key.
    KeyEnd,
    /// Between a key and its value.
    Colon,
    /// Between members or elements.
    Comma,
    /// Stands in a string, quotes included.
    Text,
    /// Stands in a number, `true`, `false` or `null`.
    Scalar,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expect {
    Value,
    ValueOrEnd,
    Key,
    KeyOrEnd,
    Colon,
    CommaOrEnd,
    Nothing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token {
    None,
    String { key: bool, escaped: bool },
    Scalar,
}

/// The state of one value.
#[derive(Clone, Debug)]
pub(super) struct Json {
    /// The open objects (true) and arrays (false).
    open: Vec<bool>,
    expect: Expect,
    token: Token,
}

impl Json {
    /// Starts before the first character of a value.
    pub(super) fn new() -> Self {
        Self { open: Vec::new(), expect: Expect::Value, token: Token::None }
    }

    /// Returns how many objects and arrays are open.
    pub(super) fn depth(&self) -> usize {
        self.open.len()
    }

    /// Whether an object or array was read to its end.
    pub(super) fn done(&self) -> bool {
        self.expect == Expect::Nothing && self.token == Token::None
    }

    /// Takes a character; `None` is not JSON.
    pub(super) fn step(&mut self, c: char) -> Option<Mark> {
        match self.token {
            Token::String { key, escaped } => return Some(self.in_string(c, key, escaped)),
            Token::Scalar if c.is_ascii_alphanumeric() || "+-.".contains(c) => return Some(Mark::Scalar),
            Token::Scalar => self.token = Token::None,
            Token::None => {}
        }
        match c {
            ' ' | '\t' | '\n' | '\r' => Some(Mark::Space),
            '{' | '[' => self.opened(c == '{'),
            '}' | ']' => self.closed(c == '}'),
            '"' => self.quoted(),
            ':' => self.after(Expect::Colon, Expect::Value, Mark::Colon),
            ',' => {
                let next = if *self.open.last()? { Expect::Key } else { Expect::Value };
                self.after(Expect::CommaOrEnd, next, Mark::Comma)
            }
            _ if c.is_ascii_alphanumeric() || c == '-' => {
                let mark = self.value(Mark::Scalar)?;
                self.token = Token::Scalar;
                Some(mark)
            }
            _ => None,
        }
    }

    fn in_string(&mut self, c: char, key: bool, escaped: bool) -> Mark {
        let ends = c == '"' && !escaped;
        self.token = if ends { Token::None } else { Token::String { key, escaped: c == '\\' && !escaped } };
        match (key, ends) {
            (true, true) => Mark::KeyEnd,
            (true, false) => Mark::Key,
            (false, _) => Mark::Text,
        }
    }

    /// Moves on if this is what may come.
    fn after(&mut self, wanted: Expect, next: Expect, mark: Mark) -> Option<Mark> {
        (self.expect == wanted).then(|| {
            self.expect = next;
            mark
        })
    }

    /// Begins a value that is neither object nor array.
    fn value(&mut self, mark: Mark) -> Option<Mark> {
        if self.open.is_empty() || !matches!(self.expect, Expect::Value | Expect::ValueOrEnd) {
            return None;
        }
        self.expect = Expect::CommaOrEnd;
        Some(mark)
    }

    fn quoted(&mut self) -> Option<Mark> {
        let key = matches!(self.expect, Expect::Key | Expect::KeyOrEnd);
        let mark = if key {
            self.expect = Expect::Colon;
            Mark::Key
        } else {
            self.value(Mark::Text)?
        };
        self.token = Token::String { key, escaped: false };
        Some(mark)
    }

    fn opened(&mut self, object: bool) -> Option<Mark> {
        if self.open.len() >= DEPTH_MAX || !matches!(self.expect, Expect::Value | Expect::ValueOrEnd) {
            return None;
        }
        self.open.push(object);
        self.expect = if object { Expect::KeyOrEnd } else { Expect::ValueOrEnd };
        Some(Mark::Open)
    }

    fn closed(&mut self, object: bool) -> Option<Mark> {
        let may = match self.expect {
            Expect::CommaOrEnd => *self.open.last()? == object,
            Expect::KeyOrEnd => object,
            Expect::ValueOrEnd => !object,
            Expect::Value | Expect::Key | Expect::Colon | Expect::Nothing => false,
        };
        if !may {
            return None;
        }
        self.open.pop();
        self.expect = if self.open.is_empty() { Expect::Nothing } else { Expect::CommaOrEnd };
        Some(Mark::Close)
    }
}

/// Appends a character of JSON; control characters, which models write into strings, are escaped.
pub(super) fn append(out: &mut String, c: char, mark: Mark) {
    match (mark, c) {
        (Mark::Text | Mark::Key, '\n') => out.push_str("\\n"),
        (Mark::Text | Mark::Key, '\t') => out.push_str("\\t"),
        (Mark::Text | Mark::Key, '\r') => out.push_str("\\r"),
        (Mark::Text | Mark::Key, c) if u32::from(c) < 0x20 => {
            out.push_str(&format!("\\u{:04x}", u32::from(c)));
        }
        _ => out.push(c),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::Value;

    /// Whether a text is an object or array and nothing after it, as far as `Json` looks.
    fn accepts(text: &str) -> bool {
        let mut json = Json::new();
        let all = text.chars().all(|c| json.step(c).is_some());
        all && json.done()
    }

    #[test]
    fn objects_and_arrays_are_followed_to_their_end() {
        for text in ["{}", "[]", "[[],{}]", r#"{"a":[1,-2.5e3,true,null,"x\"]}"]}"#, "{ \"a\" : { } }\n"] {
            assert!(accepts(text), "{text}");
        }
        for text in
            ["", "1", "\"a\"", "{", "{]", "[}", "{a:1}", "{\"a\"}", "{\"a\":}", "[1,]", "{,}", "[1 2]", "{}{"]
        {
            assert!(!accepts(text), "{text}");
        }
    }

    #[test]
    fn nesting_is_bounded() {
        let deep = |levels: usize| "[".repeat(levels) + &"]".repeat(levels);
        assert!(accepts(&deep(DEPTH_MAX)));
        assert!(!accepts(&deep(DEPTH_MAX + 1)));
        assert!(serde_json::from_str::<Value>(&deep(DEPTH_MAX)).is_ok());
    }

    proptest! {
        #[test]
        fn what_serde_reads_is_followed(text in r#"[\[\]{}",:0-9a\\ ]{0,12}"#) {
            let whole = serde_json::from_str::<Value>(&text);
            if matches!(whole, Ok(Value::Array(_) | Value::Object(_))) {
                prop_assert!(accepts(&text));
            }
        }
    }
}
