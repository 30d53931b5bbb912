//! A template's source: the tags in it, and the names they read. What minijinja's parser takes differently
//! from Jinja2's is rewritten, tag by tag.

use std::collections::BTreeSet;

use super::statements::Statements;
use super::tokens::{Kind, Token, character_length, string_length, tokens};
use super::{comparisons, operators};

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
            Piece::Raw(block) => match block.split_once("%}") {
                // Jinja2 keeps a line's end after the tag that begins a raw block.
                Some((begin, rest)) if rest.starts_with('\n') && !begin.ends_with('-') => {
                    out.extend([begin, "%}\n", rest]);
                }
                _ => out.push_str(block),
            },
            Piece::Tag(tag) => {
                out.push_str(&statements.rewrite(&comparisons::rewrite(&operators::rewrite(tag))));
            }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_of_variables_are_those_that_tags_read() {
        let source = "a {{ b.c | d(e) ~ 'f' }}{# g #}{% set h = h | i is j k %}{% raw %}{{ l }}{% endraw %}";
        assert_eq!(names(source).into_iter().collect::<Vec<_>>(), ["'f'", "b", "e", "h", "k", "set"]);
    }

    #[test]
    fn what_is_not_a_tag_stays() {
        for source in [
            "100% {{ '%' }} {% if a %}%{% endif %}",
            "{# a % b #}{% raw %}{{ a % b }}{% endraw %}{%- raw -%} % {%- endraw -%}",
            "{{ a %",
            "{{ 'open",
            "{%",
            "日本 {{ 日 }} {",
        ] {
            assert_eq!(rewrite(source), source);
        }
    }
}
