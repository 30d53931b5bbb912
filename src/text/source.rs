//! A template's source: the tags in it, the names they read, and what minijinja's parser takes differently
//! from Jinja2's. Most of all that is the operator `%`, with which Jinja2 formats texts (`"%s: %s" % (a, b)`)
//! and minijinja only divides: it is rewritten as a call of [`FUNCTION`], which does both.

use std::collections::BTreeSet;
use std::ops::Range;

use minijinja::value::{Tuple, Value as Jinja};
use minijinja::{Error, State, context};

use super::python;
use super::statements::Statements;

/// The function that stands for the operator.
pub(super) const FUNCTION: &str = "percent_operator__";

/// Limit of rewritten operators in one expression: real ones have few, and each costs a pass over it.
const OPERATORS_MAX: usize = 100;

/// Words that separate operands.
const WORDS: [&str; 17] = [
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
    "is",
    "not",
    "or",
    "recursive",
    "with",
];

/// A piece of an expression.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A name, number or string: part of an operand.
    Operand,
    /// `(`, `[` or `{`.
    Open,
    /// `)`, `]` or `}`.
    Close,
    /// `.` and `|`, and `**`, which bind more tightly than `%`.
    Inner,
    /// `*`, `/`, `//`.
    Factor,
    /// `%`.
    Percent,
    /// `+` or `-`, between operands or before one.
    Sign,
    /// Anything else that separates operands.
    Border,
}

struct Token {
    kind: Kind,
    at: Range<usize>,
}

/// A piece of a source.
enum Piece<'a> {
    /// Text or a comment.
    Text(&'a str),
    /// `{% raw %} … {% endraw %}`.
    Raw(&'a str),
    /// `{{ … }}` or `{% … %}`.
    Tag(&'a str),
}

/// Returns the source in minijinja's language.
pub(super) fn rewrite(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut statements = Statements::default();
    for piece in pieces(source) {
        match piece {
            Piece::Text(text) => out.push_str(text),
            // Jinja2 keeps a line's end after the tag that begins a raw block.
            Piece::Raw(block) => out.push_str(&block.replacen(" %}\n", " %}\n\n", 1)),
            Piece::Tag(tag) => out.push_str(&statements.rewrite(&expression(tag))),
        }
    }
    out
}

/// Returns the names that the source's tags read as variables, and others like keywords; not those of
/// attributes and filters.
pub(super) fn names(source: &str) -> BTreeSet<&str> {
    let mut names = BTreeSet::new();
    for piece in pieces(source) {
        let Piece::Tag(tag) = piece else { continue };
        let tag = &tag[2..];
        let mut inner = false;
        for Token { kind, at } in tokens(tag) {
            if kind == Kind::Operand && !inner {
                names.insert(&tag[at]);
            }
            inner = kind == Kind::Inner;
        }
    }
    names
}

fn pieces(source: &str) -> Vec<Piece<'_>> {
    let mut pieces = Vec::new();
    let mut rest = source;
    while let Some(start) = next_tag(rest) {
        let (text, tag) = rest.split_at(start);
        pieces.push(Piece::Text(text));
        let (kind, end): (fn(_) -> _, _) = match tag.as_bytes()[1] {
            b'#' => (Piece::Text, tag.find("#}").map_or(tag.len(), |end| end + 2)),
            b'%' if is_raw(tag) => (Piece::Raw, raw_length(tag)),
            mark => (Piece::Tag, expression_end(tag, mark)),
        };
        pieces.push(kind(&tag[..end]));
        rest = &tag[end..];
    }
    pieces.push(Piece::Text(rest));
    pieces
}

/// Formats a text or divides a number, as Python's `%` does.
pub(super) fn percent(state: &mut State, left: &Jinja, right: &Jinja) -> Result<Jinja, Error> {
    if left.as_str().is_none() {
        return state.env().compile_expression("a % b")?.eval(context! { a => left, b => right });
    }
    let mut arguments = match right.downcast_object_ref::<Tuple>() {
        Some(tuple) => tuple.iter().cloned().collect(),
        None => vec![right.clone()],
    };
    let format = represented(left.as_str().unwrap_or_default(), &mut arguments)?;
    arguments.insert(0, format.into());
    state.apply_filter("format", &arguments)
}

/// Replaces `%r` in a format by `%s`, and its arguments by what Python's `repr` gives.
fn represented(format: &str, arguments: &mut [Jinja]) -> Result<String, Error> {
    let mut out = String::with_capacity(format.len());
    let mut rest = format;
    let mut index = 0;
    while let Some((before, spec)) = rest.split_once('%') {
        let length = spec.find(|c: char| c.is_ascii_alphabetic() || c == '%').unwrap_or(spec.len());
        let (flags, conversion) = spec.split_at(length);
        out.push_str(before);
        out.push('%');
        out.push_str(flags);
        rest = conversion;
        if let Some(after) = conversion.strip_prefix('%') {
            out.push('%');
            rest = after;
            continue;
        }
        if let (Some(after), Some(argument)) = (conversion.strip_prefix('r'), arguments.get_mut(index)) {
            *argument = python::repr_of(argument)?.into();
            out.push('s');
            rest = after;
        }
        index += 1;
    }
    Ok(out + rest)
}

fn next_tag(source: &str) -> Option<usize> {
    let bytes = source.as_bytes();
    bytes.windows(2).position(|pair| pair[0] == b'{' && matches!(pair[1], b'{' | b'%' | b'#'))
}

fn is_raw(tag: &str) -> bool {
    let name = tag[2..].trim_start_matches(['-', '+']).trim_start();
    name.strip_prefix("raw")
        .is_some_and(|rest| rest.trim_start().trim_start_matches(['-', '+']).starts_with("%}"))
}

fn raw_length(tag: &str) -> usize {
    let mut from = 0;
    while let Some(at) = tag[from..].find("{%") {
        let name = tag[from + at + 2..].trim_start_matches(['-', '+']).trim_start();
        from += at + 2;
        if name.starts_with("endraw") {
            return tag[from..].find("%}").map_or(tag.len(), |end| from + end + 2);
        }
    }
    tag.len()
}

/// Returns the length of a tag with an expression, its end included.
fn expression_end(tag: &str, mark: u8) -> usize {
    let close = if mark == b'%' { "%}" } else { "}}" };
    let mut depth = 0_usize;
    let mut at = 2;
    while let Some(&byte) = tag.as_bytes().get(at) {
        match byte {
            b'"' | b'\'' => at += string_length(&tag[at..]),
            _ if depth == 0 && tag[at..].starts_with(close) => return at + 2,
            b'{' | b'(' | b'[' => (depth, at) = (depth + 1, at + 1),
            b'}' | b')' | b']' => (depth, at) = (depth.saturating_sub(1), at + 1),
            _ => at += character_length(&tag[at..]),
        }
    }
    tag.len()
}

fn string_length(text: &str) -> usize {
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

fn character_length(text: &str) -> usize {
    text.chars().next().map_or(1, char::len_utf8)
}

/// Rewrites the operators of one tag, the leftmost first: `a % b % c` formats or divides from the left.
fn expression(tag: &str) -> String {
    let modifier = matches!(tag.as_bytes().get(2), Some(b'-' | b'+'));
    let (open, inner) = tag.split_at(if modifier { 3 } else { 2 });
    let end = inner.len() - if inner.ends_with("%}") || inner.ends_with("}}") { 2 } else { 0 };
    let (inner, close) = inner.split_at(end);
    let mut inner = plain_operands(inner);
    for _ in 0..OPERATORS_MAX {
        let tokens = tokens(&inner);
        let Some(operator) = tokens.iter().position(|token| token.kind == Kind::Percent) else { break };
        let (left, right) = (left_operand(&tokens, operator), right_operand(&tokens, operator));
        let (Some(left), Some(right)) = (left, right) else { break };
        let operand = |range: Range<usize>| inner[range].trim().to_owned();
        let (from, to) = (left, right);
        let at = tokens[operator].at.clone();
        let call = format!("{FUNCTION}({}, {})", operand(from..at.start), operand(at.end..to));
        inner.replace_range(from..to, &call);
    }
    [open, &inner, close].concat()
}

/// Replaces the escapes in strings that only Python knows, and drops signs that change nothing.
fn plain_operands(inner: &str) -> String {
    if !inner.contains(['\\', '+']) {
        return inner.to_owned();
    }
    let tokens = tokens(inner);
    let mut out = String::with_capacity(inner.len());
    let mut done = 0;
    for (index, token) in tokens.iter().enumerate() {
        out.push_str(&inner[done..token.at.start]);
        done = token.at.end;
        let text = &inner[token.at.clone()];
        // A sign at the end belongs to the tag.
        let is_idle = text == "+" && index + 1 < tokens.len() && !is_between(&tokens, index);
        match text.as_bytes()[0] {
            b'"' | b'\'' => out.push_str(&unescape(text)),
            _ if is_idle => {}
            _ => out.push_str(text),
        }
    }
    out + &inner[done..]
}

/// Replaces the escapes of a string that only Python knows.
fn unescape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, escape)) = rest.split_once('\\') {
        out.push_str(before);
        let long = escape.strip_prefix('U').and_then(|hex| hex.get(..8));
        let long = long.and_then(|hex| char::from_u32(u32::from_str_radix(hex, 16).ok()?));
        let (replaced, length) = match (escape.as_bytes().first(), long) {
            (Some(b'U'), Some(c)) => (c.to_string(), 9),
            (Some(b'a'), _) => ("\\x07".to_owned(), 1),
            (Some(b'v'), _) => ("\\x0b".to_owned(), 1),
            (Some(b'/'), _) => ("\\\\/".to_owned(), 1),
            (Some(b'\n'), _) => (String::new(), 1),
            _ => {
                let length = character_length(escape).min(escape.len());
                (format!("\\{}", &escape[..length]), length)
            }
        };
        out.push_str(&replaced);
        rest = &escape[length..];
    }
    out + rest
}

/// Returns where the left operand begins: the product that it ends.
fn left_operand(tokens: &[Token], operator: usize) -> Option<usize> {
    let mut depth = 0_usize;
    let mut start = None;
    for index in (0..operator).rev() {
        let token = &tokens[index];
        match token.kind {
            Kind::Close => depth += 1,
            Kind::Open if depth == 0 => break,
            Kind::Open => depth -= 1,
            Kind::Border if depth == 0 => break,
            Kind::Sign if depth == 0 && is_between(tokens, index) => break,
            _ => {}
        }
        start = Some(token.at.start);
    }
    start
}

/// Returns where the right operand ends.
fn right_operand(tokens: &[Token], operator: usize) -> Option<usize> {
    let mut depth = 0_usize;
    let mut end = None;
    for index in operator + 1..tokens.len() {
        let token = &tokens[index];
        match token.kind {
            Kind::Open => depth += 1,
            Kind::Close if depth == 0 => break,
            Kind::Close => depth -= 1,
            Kind::Border | Kind::Factor | Kind::Percent if depth == 0 => break,
            Kind::Sign if depth == 0 && is_between(tokens, index) => break,
            _ => {}
        }
        end = Some(token.at.end);
    }
    end
}

/// Returns whether a sign stands between two operands, not before one.
fn is_between(tokens: &[Token], index: usize) -> bool {
    let before = index.checked_sub(1).map(|before| tokens[before].kind);
    matches!(before, Some(Kind::Operand | Kind::Close))
}

fn tokens(text: &str) -> Vec<Token> {
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
            '+' | '-' => (Kind::Sign, 1),
            c if c.is_ascii_digit() => (Kind::Operand, number_length(rest)),
            c if c.is_alphanumeric() || c == '_' => {
                let length = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
                let word = WORDS.contains(&&rest[..length]);
                (if word { Kind::Border } else { Kind::Operand }, length)
            }
            c => (Kind::Border, c.len_utf8()),
        };
        tokens.push(Token { kind, at: at..at + length });
        at += length;
    }
    tokens
}

/// Returns the length of a number, the sign of its exponent included.
fn number_length(text: &str) -> usize {
    let is_exponent = |at: usize| !text.starts_with("0x") && matches!(text.as_bytes()[at - 1], b'e' | b'E');
    let ends = |(at, c): &(usize, char)| {
        !c.is_ascii_alphanumeric() && *c != '_' && !(matches!(c, '+' | '-') && is_exponent(*at))
    };
    text.char_indices().find(ends).map_or(text.len(), |(at, _)| at)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rewritten(source: &str) -> String {
        rewrite(source).replace(FUNCTION, "f")
    }

    #[test]
    fn the_operator_becomes_a_call_of_its_operands() {
        for (source, expected) in [
            ("{{ '%s' % x }}", "{{ f('%s', x) }}"),
            ("{{ a + '%s' % x.y[0] | upper + b }}", "{{ a + f('%s', x.y[0] | upper) + b }}"),
            ("{{ '%s%s' % (a, b) * 2 }}", "{{ f('%s%s', (a, b)) * 2 }}"),
            ("{{ a * b % -c ** 2 == 1 }}", "{{ f(a * b, -c ** 2) == 1 }}"),
            ("{{- '%s' % x -}}", "{{- f('%s', x) -}}"),
            ("{{ 1e-3 % 2.5E+1 - 0xe-1 % 2 }}", "{{ f(1e-3, 2.5E+1) - 0xe-f(1, 2) }}"),
            ("{{ +n + +1 % 2 }}{% else +%}", "{{ n + f(1, 2) }}{% else +%}"),
            (r"{{ '\a\/\n\U0001F600\\a' % b }}", "{{ f('\\x07\\\\/\\n😀\\\\a', b) }}"),
            ("{{ a % b % c }}", "{{ f(f(a, b), c) }}"),
            ("{{ ('%s' % (a % 2)) }}", "{{ (f('%s', (f(a, 2)))) }}"),
            ("{%- if loop.index0 % 2 == 0 -%}", "{%- if f(loop.index0, 2) == 0 -%}"),
            ("{{ 'x' if a % 2 else -1 % 2 }}", "{{ 'x' if f(a, 2) else f(-1, 2) }}"),
            ("{% set x = {'a': 1 % 2} %}{{ {'b': {}} }}", "{% set x = {'a': f(1, 2)} %}{{ {'b': {}} }}"),
        ] {
            assert_eq!(rewritten(source), expected);
        }
    }

    #[test]
    fn the_names_of_variables_are_those_that_tags_read() {
        let source = "a {{ b.c | d(e) ~ 'f' }}{# g #}{% set h = h | i %}{% raw %}{{ j }}{% endraw %}";
        assert_eq!(names(source).into_iter().collect::<Vec<_>>(), ["'f'", "b", "e", "h", "set"]);
    }

    #[test]
    fn what_is_not_an_operator_stays() {
        for source in [
            "100% {{ '%' }} {% if a %}%{% endif %}",
            "{# a % b #}{% raw %}{{ a % b }}{% endraw %}{%- raw -%} % {%- endraw -%}",
            "{{ 'a % b' }}{{ \"it's % \\\" %\" }}",
            "{{ a %",
            "{{ 'open",
            "{%",
            "{{ % }}",
            "日本 {{ 日 }} {",
        ] {
            assert_eq!(rewritten(source), source);
        }
    }
}
