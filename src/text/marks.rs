//! Keeps what people and tools write, and the template's arguments, apart from its markup: where such a text
//! looks like a control token, a mark is put into it, so that it is not found as one in the rendered text.
//! The encoder drops the marks. A text without such a place, which is nearly every one, is not touched.

use std::borrow::Cow;

use regex::{Regex, RegexBuilder};
use serde_json::{Map, Value};

use super::TextError;

/// Limit of the compiled search for control tokens, in bytes; some models have thousands.
const SEARCH_BYTES_MAX: usize = 256 << 20;

/// Marks to choose from: no characters (Unicode keeps them for internal use), the last but one of each plane.
const PLANES: std::ops::RangeInclusive<u32> = 1..=14;

/// A role whose text is the model's own; it may hold control tokens.
const ASSISTANT: &str = "assistant";

/// Finds a model's control tokens in texts.
#[derive(Debug)]
pub(super) struct Marks {
    /// None if the model has no control tokens.
    control: Option<Regex>,
}

/// What a template is given to write.
#[derive(Clone, Copy)]
pub(super) struct Texts<'a> {
    pub(super) messages: &'a [Value],
    pub(super) tools: &'a [Value],
    /// Further variables, such as `documents`.
    pub(super) arguments: &'a Map<String, Value>,
}

impl<'a> Texts<'a> {
    /// Returns them as they are.
    pub(super) fn unmarked(self) -> Marked<'a> {
        let Self { messages, tools, arguments } = self;
        let (messages, tools) = (messages.into(), tools.into());
        Marked { messages, tools, arguments: Cow::Borrowed(arguments), mark: None }
    }
}

/// The same with the mark in it; none where nothing needs one.
pub(super) struct Marked<'a> {
    pub(super) messages: Cow<'a, [Value]>,
    pub(super) tools: Cow<'a, [Value]>,
    pub(super) arguments: Cow<'a, Map<String, Value>>,
    pub(super) mark: Option<char>,
}

impl Marks {
    /// Prepares the search for these tokens.
    ///
    /// # Errors
    /// They are too many to be searched for.
    pub(super) fn new(tokens: impl Iterator<Item = String>) -> Result<Self, TextError> {
        // A mark goes between the first character and the rest, so a token of one character has no place.
        let tokens: Vec<String> =
            tokens.filter(|token| token.chars().count() > 1).map(|token| regex::escape(&token)).collect();
        if tokens.is_empty() {
            return Ok(Self { control: None });
        }
        let search = RegexBuilder::new(&tokens.join("|")).size_limit(SEARCH_BYTES_MAX).build();
        let control = search.map_err(|_| TextError::Unsupported {
            file: "tokenizer.json",
            what: format!("a vocabulary of {} control tokens", tokens.len()),
        })?;
        Ok(Self { control: Some(control) })
    }

    /// Puts marks into the texts of all messages but the assistant's, into the tools and into the arguments.
    ///
    /// # Errors
    /// The texts contain every mark.
    pub(super) fn apply<'a>(&self, texts: Texts<'a>) -> Result<Marked<'a>, TextError> {
        let Texts { messages, tools, arguments } = texts;
        let Some(control) = &self.control else { return Ok(texts.unmarked()) };
        let around = || tools.iter().chain(arguments.values());
        let mut outer = messages.iter().filter(|message| message["role"] != ASSISTANT).chain(around());
        if !outer.any(|value| any_text(value, &|text| control.is_match(text))) {
            return Ok(texts.unmarked());
        }
        let all = || messages.iter().chain(around());
        let free = |mark: &char| !all().any(|value| any_text(value, &|text| text.contains(*mark)));
        let mark = PLANES.filter_map(|plane| char::from_u32((plane << 16) | 0xfffe)).find(free);
        let Some(mark) = mark else {
            return Err(TextError::Render(
                "a text contains all of U+1FFFE to U+EFFFE, which are not characters".into(),
            ));
        };
        let marked = |value: &Value| map_texts(value, &|text| put(control, mark, text));
        let message = |message: &Value| {
            if message["role"] == ASSISTANT { message.clone() } else { marked(message) }
        };
        // The names of arguments are those of variables that the template reads.
        let arguments: Map<_, _> =
            arguments.iter().map(|(name, value)| (name.clone(), marked(value))).collect();
        Ok(Marked {
            messages: messages.iter().map(message).collect(),
            tools: tools.iter().map(marked).collect(),
            arguments: Cow::Owned(arguments),
            mark: Some(mark),
        })
    }
}

/// Returns whether a character may be a mark; a template prints it as it is.
pub(super) fn is_mark(c: char) -> bool {
    let code = u32::from(c);
    code & 0xffff == 0xfffe && PLANES.contains(&(code >> 16))
}

/// Puts the mark after the first character of every control token in a text, overlapping ones included.
fn put(control: &Regex, mark: char, text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 16);
    let mut done = 0;
    while let Some(found) = control.find_at(text, done) {
        let first = text[found.start()..].chars().next().map_or(1, char::len_utf8);
        let next = found.start() + first;
        out.push_str(&text[done..next]);
        out.push(mark);
        done = next;
    }
    out.push_str(&text[done..]);
    out
}

fn any_text(value: &Value, holds: &impl Fn(&str) -> bool) -> bool {
    match value {
        Value::String(text) => holds(text),
        Value::Array(values) => values.iter().any(|value| any_text(value, holds)),
        Value::Object(fields) => fields.iter().any(|(key, value)| holds(key) || any_text(value, holds)),
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}

fn map_texts(value: &Value, change: &impl Fn(&str) -> String) -> Value {
    match value {
        Value::String(text) => Value::String(change(text)),
        Value::Array(values) => values.iter().map(|value| map_texts(value, change)).collect(),
        Value::Object(fields) => {
            let fields = fields.iter().map(|(key, value)| (change(key), map_texts(value, change)));
            Value::Object(fields.collect::<Map<_, _>>())
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => value.clone(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use serde_json::json;

    use super::*;

    const MARK: char = '\u{1fffe}';

    fn marks(tokens: &[&str]) -> Marks {
        Marks::new(tokens.iter().map(|token| (*token).to_owned())).unwrap()
    }

    /// Marks the texts of messages.
    fn apply<'a>(tokens: &[&str], messages: &'a [Value]) -> Result<Marked<'a>, TextError> {
        static NO_ARGUMENTS: LazyLock<Map<String, Value>> = LazyLock::new(Map::new);
        marks(tokens).apply(Texts { messages, tools: &[], arguments: &NO_ARGUMENTS })
    }

    #[test]
    fn control_tokens_of_all_but_the_assistant_are_broken_up() {
        let messages = [
            json!({"role": "user", "content": "a<|end|>b<|e"}),
            json!({"role": "assistant", "content": "<|end|>"}),
            json!({"role": "tool", "content": {"k<|end|>": ["<|end|><|end|>"]}}),
        ];
        let tools = [json!({"name": "f", "description": "<|end|>"})];
        let arguments = Map::from_iter([("documents".to_owned(), json!([{"text": "<|end|>"}]))]);
        let texts = Texts { messages: &messages, tools: &tools, arguments: &arguments };
        let marked = marks(&["<|end|>", "x"]).apply(texts).unwrap();
        let broken = format!("<{MARK}|end|>");
        assert_eq!(marked.mark, Some(MARK));
        assert_eq!(marked.messages[0]["content"], format!("a{broken}b<|e"));
        assert_eq!(marked.messages[1], messages[1]);
        assert_eq!(marked.messages[2]["content"][format!("k{broken}")][0], format!("{broken}{broken}"));
        assert_eq!(marked.tools[0]["description"], broken);
        assert_eq!(marked.arguments["documents"][0]["text"], broken);
    }

    #[test]
    fn a_text_without_control_tokens_is_not_touched() {
        let messages = [json!({"role": "user", "content": format!("<|en d|> {MARK}")})];
        let marked = apply(&["<|end|>"], &messages).unwrap();
        assert!(matches!(marked.messages, Cow::Borrowed(_)) && marked.mark.is_none());
        assert!(apply(&[], &messages).unwrap().mark.is_none());
    }

    #[test]
    fn overlapping_tokens_are_all_broken_up() {
        let messages = [json!({"role": "user", "content": "[[a]]"})];
        let marked = apply(&["[[a", "[a]"], &messages).unwrap();
        assert_eq!(marked.messages[0]["content"], format!("[{MARK}[{MARK}a]]"));
    }

    #[test]
    fn the_mark_is_in_none_of_the_texts() {
        let messages = [
            json!({"role": "user", "content": "<|end|>"}),
            json!({"role": "assistant", "content": format!("{MARK}")}),
        ];
        assert_eq!(apply(&["<|end|>"], &messages).unwrap().mark, Some('\u{2fffe}'));
        let all: String = (1..=14).filter_map(|plane| char::from_u32((plane << 16) | 0xfffe)).collect();
        assert!(all.chars().all(is_mark) && !is_mark('\u{ffff}') && !is_mark('a'));
        let messages = [json!({"role": "user", "content": format!("<|end|>{all}")})];
        assert!(apply(&["<|end|>"], &messages).is_err());
    }
}
