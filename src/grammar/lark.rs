//! Lark grammars, gone through as llguidance's lexer goes (lark/lexer.rs): the schemas that they embed are
//! checked and rewritten like any other, and what its parser and compiler would go down along is counted.

use serde_json::Value;

use super::brackets::deepest;
use super::cost::LEVELS_PER_DEPTH;
use super::schema::prepare;
use super::{GrammarLimits, Refusal};

/// Keywords that a JSON value follows.
const SCHEMA: &str = "%json";
const OTHERS: [&str; 2] = ["%regex", "%llguidance"];

/// Reads a grammar, and returns it as llguidance takes it.
///
/// # Errors
/// It is malformed, an embedded schema is refused, or it exceeds a limit.
pub(super) fn read(text: &str, limits: &GrammarLimits) -> Result<String, Refusal> {
    let (mut rest, mut out) = (text, String::with_capacity(text.len()));
    let (mut brackets, mut depth_within, mut levels) = (String::new(), 0, 0);
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(piece_end(rest)?);
        out.push_str(piece);
        rest = after;
        if piece == SCHEMA || OTHERS.contains(&piece) {
            let (value, after) = value(rest, piece)?;
            let value = if piece == SCHEMA { prepare(value, SCHEMA, limits)? } else { value };
            out.push(' ');
            out.push_str(&value.to_string());
            rest = after;
            continue;
        }
        match piece.chars().next() {
            Some('/') if !piece.starts_with("//") => depth_within = deepest(piece.chars()).max(depth_within),
            Some(c @ (':' | '(' | '[' | '{' | ')' | ']' | '}')) => {
                brackets.push(c);
                levels += usize::from(!matches!(c, ')' | ']' | '}'));
            }
            _ => {}
        }
    }
    let depth = depth_within + deepest(brackets.chars());
    // Rules name rules, and what stands in brackets does.
    if depth > limits.depth_max || levels > LEVELS_PER_DEPTH * limits.depth_max {
        return Err(Refusal::TooLarge { limit: "grammar_depth_max", value: limits.depth_max as u64 });
    }
    Ok(out)
}

/// Returns where the first piece of a text ends: a text in quotes, an expression, a comment, the name of a
/// token, a keyword with a value, or a character.
fn piece_end(rest: &str) -> Result<usize, Refusal> {
    let first = rest.chars().next().map_or(0, char::len_utf8);
    match &rest[..first] {
        "\"" => ends_at(rest, '"', |c| c.is_ascii_control()),
        "/" if !rest.starts_with("//") => ends_at(rest, '/', |_| false),
        "#" | "/" => Ok(rest.find('\n').unwrap_or(rest.len())),
        "<" => {
            let name = rest[1..].find(|c: char| c == '<' || c == '>' || c.is_whitespace());
            let closed = name.filter(|end| *end > 0 && rest[1 + end..].starts_with('>'));
            Ok(closed.map_or(first, |end| end + 2))
        }
        "%" => {
            let keyword = std::iter::once(SCHEMA).chain(OTHERS).find(|keyword| rest.starts_with(keyword));
            Ok(keyword.map_or(first, str::len))
        }
        _ => Ok(first),
    }
}

/// Returns where a text ends that begins with a mark and ends with the next one that is not escaped.
fn ends_at(rest: &str, mark: char, is_barred: impl Fn(char) -> bool) -> Result<usize, Refusal> {
    let mut chars = rest.char_indices().skip(1);
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' if chars.next().is_none_or(|(_, escaped)| escaped == '\n') => break,
            '\\' => {}
            c if c == mark => return Ok(at + 1),
            c if is_barred(c) => break,
            _ => {}
        }
    }
    let shown: String = rest.chars().take(20).collect();
    Err(Refusal::Invalid(format!("what begins with {shown:?} does not end")))
}

/// Returns the JSON value that a text begins with, and the rest.
fn value<'a>(rest: &'a str, keyword: &str) -> Result<(Value, &'a str), Refusal> {
    let mut values = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
    match values.next() {
        Some(Ok(value)) => Ok((value, &rest[values.byte_offset()..])),
        Some(Err(error)) => Err(Refusal::Invalid(format!("{keyword}: {error}"))),
        None => Err(Refusal::Invalid(format!("{keyword}: a JSON value has to follow"))),
    }
}
