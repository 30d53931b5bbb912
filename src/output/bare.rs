//! Grammars of arguments that stand as bare text between tags or in the model's own quotes: what is written
//! by them is read as a value of the schema, or there is no grammar.

use serde_json::Value;

use super::format::Format;
use super::literal::{FUNCTION_GEMMA, GEMMA4};
use super::tagged::{GLM4, MINIMAX_M2, QWEN3_CODER, Tags};
use super::typed::{Types, listed, reached};

/// Any text: the special token behind it ends it.
pub(super) const TEXT_BEFORE_TOKEN: &str = r"/(.|\n)*/";

/// Keywords that a text between tags cannot be held to, and what is said of each.
const KEYWORDS: &[(&str, &str)] = &[
    ("pattern", "its texts cannot be held to a pattern"),
    ("minLength", "its texts cannot be held to minLength"),
    ("maxLength", "its texts cannot be held to maxLength"),
    ("format", "its texts cannot be held to a format"),
    ("not", "its texts cannot be held to not"),
];

/// An argument to write.
pub(super) struct Bare<'a> {
    pub(super) format: Format,
    /// The schema of all arguments.
    pub(super) root: &'a Value,
    /// Its own schema.
    pub(super) property: &'a Value,
}

/// What stands behind a value.
pub(super) struct Tail<'a> {
    pub(super) behind: &'a str,
    /// The same as Lark.
    pub(super) after: String,
    /// The model's own quote as Lark; empty if it has none.
    pub(super) own: String,
    /// Whether a special token ends a text.
    pub(super) ended_by_token: bool,
}

impl Format {
    /// Returns the model's own quote.
    pub(super) fn quote(self) -> Option<&'static str> {
        let form = if self == Self::Gemma4 { &GEMMA4 } else { &FUNCTION_GEMMA };
        matches!(self, Self::Gemma4 | Self::FunctionGemma).then_some(form.quote)
    }

    /// Returns how values are read between tags.
    fn tags(self) -> Option<&'static Tags> {
        match self {
            Self::Qwen3Coder => Some(&QWEN3_CODER),
            Self::MinimaxM2 => Some(&MINIMAX_M2),
            Self::Glm4 => Some(&GLM4),
            Self::Hermes
            | Self::Llama3Json
            | Self::Mistral
            | Self::Pythonic
            | Self::DeepseekV3
            | Self::DeepseekV31
            | Self::KimiK2
            | Self::Gemma4
            | Self::FunctionGemma
            | Self::Phi4
            | Self::Harmony
            | Self::Nemotron
            | Self::Prompted => None,
        }
    }
}

impl Bare<'_> {
    /// Says whether the format can write an argument's name.
    pub(super) fn name(&self, key: &str) -> Result<(), &'static str> {
        let word = key.chars().all(|c| c.is_alphanumeric() || c == '_');
        let odd = |c: char| c.is_whitespace() || c.is_control() || "<>\"'".contains(c);
        if self.format.tags().is_none() && !word || key.is_empty() || key.contains(odd) {
            return Err("the format cannot write its name");
        }
        Ok(())
    }

    /// Returns the value and what stands behind it.
    pub(super) fn value(&self, tail: &Tail<'_>) -> Result<String, &'static str> {
        let Tail { after, own, .. } = tail;
        let json = || format!("%json {} {after}", self.with_definitions());
        if self.format == Format::Pythonic {
            return Ok(json());
        }
        let types = Types::of(self.property, self.root);
        let choices = self.choices();
        if !choices.is_empty() {
            let words = choices.into_iter().map(|choice| self.word(choice, tail));
            let words = words.collect::<Result<Vec<_>, _>>()?;
            return Ok(format!("({}) {after}", words.join(" | ")));
        }
        if own.is_empty() {
            return if types.takes_text() { self.text(tail) } else { Ok(json()) };
        }
        if types.only_scalars() {
            return Ok(json());
        }
        if !types.string_or_null() {
            return Err("only texts, numbers and booleans have a grammar in this format");
        }
        let null = if types.nullable() { format!("| \"null\" {after}") } else { String::new() };
        Ok(format!("({} {null})", self.text(tail)?))
    }

    /// Returns the values of an argument that lists them.
    fn choices(&self) -> Vec<&Value> {
        let mut property = self.property;
        // As many references as schemas are looked into.
        for _ in 0..8 {
            let target = property["$ref"].as_str().and_then(|reference| reference.strip_prefix('#'));
            let Some(target) = target.and_then(|pointer| self.root.pointer(pointer)) else { break };
            property = target;
        }
        listed(property).collect()
    }

    /// Writes one of the values that an argument may have.
    fn word(&self, choice: &Value, tail: &Tail<'_>) -> Result<String, &'static str> {
        let word = choice.as_str().map_or_else(|| choice.to_string(), str::to_owned);
        let plain = Value::from(word.as_str()).to_string();
        let Some(tags) = self.format.tags() else {
            let quote = self.format.quote().unwrap_or_default();
            return match choice {
                Value::String(_) if word.contains(quote) => Err("one of its values contains the quote"),
                Value::String(_) => Ok(format!("{} {plain} {}", tail.own, tail.own)),
                Value::Null | Value::Bool(_) | Value::Number(_) => Ok(plain),
                Value::Array(_) | Value::Object(_) => Err("one of its values is not a word"),
            };
        };
        let read = tags.value_of(&word, Some(self.property), self.root);
        if read != *choice || word.contains(tags.value_end) {
            return Err("one of its values would be read as another");
        }
        Ok(plain)
    }

    /// Writes any text that what stands behind it ends.
    fn text(&self, tail: &Tail<'_>) -> Result<String, &'static str> {
        let Tail { behind, after, own, ended_by_token } = tail;
        let schemas = reached(self.property, self.root);
        for (keyword, reason) in KEYWORDS {
            if schemas.iter().any(|schema| schema.get(*keyword).is_some()) {
                return Err(reason);
            }
        }
        if schemas.iter().any(|schema| listed(schema).next().is_some()) {
            return Err("a list of values beside others");
        }
        if *ended_by_token {
            return Ok(format!("{own} {TEXT_BEFORE_TOKEN} {own} {after}"));
        }
        if let Some(quote) = self.format.quote() {
            return Ok(format!("{own} {} {after}", until(quote)));
        }
        let end = self.format.tags().map_or("", |tags| tags.value_end);
        let rest = behind.split_once(end).map_or("", |(_, rest)| rest);
        let rest = if rest.is_empty() { String::new() } else { Value::from(rest).to_string() };
        Ok(format!("{} {rest}", until(end)))
    }

    /// Returns the argument's schema with what it may refer to.
    fn with_definitions(&self) -> Value {
        let mut property = self.property.clone();
        let refers = property.to_string().contains("\"$ref\"");
        for key in ["$defs", "definitions"] {
            let definitions = self.root.get(key).filter(|_| refers);
            if let (Some(members), Some(definitions)) = (property.as_object_mut(), definitions) {
                members.entry(key).or_insert_with(|| definitions.clone());
            }
        }
        property
    }
}

/// Returns the expression of a text up to the first `end`, which begins with `<` and has no other one: one
/// lexeme, since lexemes take as much as they can.
fn until(end: &str) -> String {
    let escaped = |c: char| if "/|\\.[](){}*+?^$".contains(c) { format!("\\{c}") } else { c.to_string() };
    let (mut begun, mut again, mut away) = (String::new(), Vec::new(), Vec::new());
    for c in end.chars().skip(1) {
        // Behind `<` and what has begun of the rest, another `<` begins anew, and any other character leads
        // away.
        again.push(begun.clone());
        away.push(format!("{begun}[^{}<]", escaped(c)));
        begun += &escaped(c);
    }
    let again = format!("(({})<)*", again.join("|"));
    format!("/([^<]|<{again}({}))*<{again}{begun}/", away.join("|"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_goes_up_to_the_first_end() {
        let expression = until("</p>");
        assert_eq!(expression, r"/([^<]|<((|\/|\/p)<)*([^\/<]|\/[^p<]|\/p[^><]))*<((|\/|\/p)<)*\/p>/");
    }
}
