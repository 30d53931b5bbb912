//! The tokens of a tag, as far as operators need them.

use std::ops::Range;

/// Words that separate operands.
const WORDS: [&str; 16] = [
    "and",
    "call",
    "elif",
    "else",
    "extends",
    "filter",
    "for",
    "from",
    "if",
    "import",
    "in",
    "include",
    "not",
    "or",
    "recursive",
    "with",
];

/// A piece of an expression.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A name, number or string: part of an operand.
    Operand,
    /// `(`, `[` or `{`.
    Open,
    /// `)`, `]` or `}`.
    Close,
    /// What binds more tightly than `%`: `.`, `|`, `**` and `is`.
    Inner,
    /// `*`, `/`, `//`.
    Factor,
    /// `%`.
    Percent,
    /// `~`, which binds more tightly than `+`.
    Tilde,
    /// `+` or `-`, between operands or before one.
    Sign,
    /// Anything else that separates operands.
    Border,
}

pub(super) struct Token {
    pub(super) kind: Kind,
    pub(super) at: Range<usize>,
}

/// Returns the beginning of a tag, what is in it, and its end.
pub(super) fn parted(tag: &str) -> (&str, &str, &str) {
    let modifier = matches!(tag.as_bytes().get(2), Some(b'-' | b'+'));
    let (open, inner) = tag.split_at(if modifier { 3 } else { 2 });
    let end = inner.len() - if inner.ends_with("%}") || inner.ends_with("}}") { 2 } else { 0 };
    let end = end - usize::from(inner[..end].ends_with(['-', '+']));
    let (inner, close) = inner.split_at(end);
    (open, inner, close)
}

pub(super) fn tokens(text: &str) -> Vec<Token> {
    let mut tokens = Vec::new();
    let mut at = 0;
    while let Some(c) = text[at..].chars().next() {
        let rest = &text[at..];
        let (kind, length) = match c {
            c if c.is_whitespace() => {
                at += c.len_utf8();
                continue;
            }
            '"' | '\'' => (Kind::Operand, string_length(rest)),
            '(' | '[' | '{' => (Kind::Open, 1),
            ')' | ']' | '}' => (Kind::Close, 1),
            '.' | '|' => (Kind::Inner, 1),
            '*' if rest.starts_with("**") => (Kind::Inner, 2),
            '/' if rest.starts_with("//") => (Kind::Factor, 2),
            '*' | '/' => (Kind::Factor, 1),
            '%' => (Kind::Percent, 1),
            '~' => (Kind::Tilde, 1),
            '+' | '-' => (Kind::Sign, 1),
            c if c.is_ascii_digit() => (Kind::Operand, number_length(rest)),
            c if c.is_alphanumeric() || c == '_' => {
                let length = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
                (word_kind(&rest[..length], text, tokens.last()), length)
            }
            c => (Kind::Border, c.len_utf8()),
        };
        tokens.push(Token { kind, at: at..at + length });
        at += length;
    }
    tokens
}

/// Returns the places of what separates operands and is in no brackets.
pub(super) fn borders(text: &str) -> Vec<Range<usize>> {
    let mut depth = 0_usize;
    let mut found = Vec::new();
    for Token { kind, at } in tokens(text) {
        match kind {
            Kind::Open => depth += 1,
            Kind::Close => depth = depth.saturating_sub(1),
            Kind::Border if depth == 0 => found.push(at),
            _ => {}
        }
    }
    found
}

/// Words of a test bind more tightly than operators: `is`, `not` and `in` after it.
fn word_kind(word: &str, text: &str, before: Option<&Token>) -> Kind {
    let test = before.filter(|before| before.kind == Kind::Inner).map(|before| &text[before.at.clone()]);
    match (word, test) {
        // The name of an attribute or a filter.
        (_, Some("." | "|")) => Kind::Operand,
        ("is", _) | ("not" | "in", Some("is")) | ("in", Some("not")) => Kind::Inner,
        _ if WORDS.contains(&word) => Kind::Border,
        _ => Kind::Operand,
    }
}

/// Returns the length of a number, the sign of its exponent included.
fn number_length(text: &str) -> usize {
    let is_exponent = |at: usize| !text.starts_with("0x") && matches!(text.as_bytes()[at - 1], b'e' | b'E');
    let ends = |(at, c): &(usize, char)| {
        !c.is_ascii_alphanumeric() && *c != '_' && !(matches!(c, '+' | '-') && is_exponent(*at))
    };
    text.char_indices().find(ends).map_or(text.len(), |(at, _)| at)
}

/// Returns whether a sign stands between two operands, not before one.
pub(super) fn is_between(tokens: &[Token], index: usize) -> bool {
    let before = index.checked_sub(1).map(|before| tokens[before].kind);
    matches!(before, Some(Kind::Operand | Kind::Close))
}

pub(super) fn string_length(text: &str) -> usize {
    let quote = text.as_bytes()[0];
    let mut escaped = false;
    for (index, byte) in text.bytes().enumerate().skip(1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            _ if byte == quote => return index + 1,
            _ => {}
        }
    }
    text.len()
}

pub(super) fn character_length(text: &str) -> usize {
    text.chars().next().map_or(1, char::len_utf8)
}
