//! The operators of a tag that minijinja takes differently from Jinja2, written as calls of functions.
//!
//! `%` formats texts in Jinja2 (`"%s: %s" % (a, b)`), where minijinja only divides; `~` joins what Python
//! prints of its operands. A `+` before an operand and Python's escapes are unknown to minijinja.

use std::ops::Range;

use super::formats::{JOIN, PERCENT};
use super::statements::REFUSE;
use super::tokens::{Kind, Token, borders, character_length, is_between, parted, tokens};

/// Limit of rewritten operators in one tag: real ones have few, and each costs a pass over it.
const OPERATORS_MAX: usize = 100;

/// Returns a tag without these operators.
pub(super) fn rewrite(tag: &str) -> String {
    let (open, inner, close) = parted(tag);
    let mut inner = plain_operands(inner);
    for count in 0.. {
        let tokens = tokens(&inner);
        let first = |kind| tokens.iter().position(|token| token.kind == kind);
        // The leftmost first: `a % b % c` formats or divides from the left.
        let call = match (first(Kind::Percent), first(Kind::Tilde)) {
            (Some(operator), _) => percent(&tokens, operator, &inner),
            (None, Some(operator)) => joined(&tokens, operator, &inner),
            (None, None) => break,
        };
        let Some((range, call)) = call else { break };
        if count == OPERATORS_MAX {
            // The rest would be minijinja's own.
            inner = format!(" {REFUSE}('more than {OPERATORS_MAX} operators in a tag') ");
            break;
        }
        inner.replace_range(range, &call);
    }
    if open.starts_with("{{") && has_comma(&inner) {
        inner = format!(" ({}) ", inner.trim());
    }
    [open, &inner, close].concat()
}

/// Returns the call that stands for a `%`, and for what.
fn percent(tokens: &[Token], operator: usize, inner: &str) -> Option<(Range<usize>, String)> {
    let (from, to) = (left_operand(tokens, operator)?, right_operand(tokens, operator)?);
    let at = &tokens[operator].at;
    let (left, right) = (inner[from..at.start].trim(), inner[at.end..to].trim());
    Some((from..to, format!("{PERCENT}({left}, {right})")))
}

/// The same for a row of `~`.
fn joined(tokens: &[Token], operator: usize, inner: &str) -> Option<(Range<usize>, String)> {
    let from = left_operand(tokens, operator)?;
    let mut call = format!("{JOIN}({}", inner[from..tokens[operator].at.start].trim());
    let mut operator = operator;
    loop {
        let to = right_operand(tokens, operator)?;
        call.extend([", ", inner[tokens[operator].at.end..to].trim()]);
        match tokens[operator..].iter().position(|token| token.at.start >= to) {
            Some(next) if tokens[operator + next].kind == Kind::Tilde => operator += next,
            _ => return Some((from..to, call + ")")),
        }
    }
}

/// Returns whether an expression is a tuple without brackets.
fn has_comma(inner: &str) -> bool {
    borders(inner).into_iter().any(|at| inner[at] == *",")
}

/// Replaces the escapes in strings that only Python knows, and `+` before an operand.
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
        let is_idle = text == "+" && !is_between(&tokens, index);
        match text.as_bytes()[0] {
            b'"' | b'\'' => out.push_str(&unescape(text)),
            // One of a row is enough: the parser recurses over each sign.
            _ if is_idle && tokens.get(index + 1).is_some_and(|next| next.kind == Kind::Sign) => {}
            _ if is_idle => out.push_str("- -"),
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
        // `from_str_radix` would take a sign, too.
        let long = long.filter(|hex| hex.bytes().all(|digit| digit.is_ascii_hexdigit()));
        let long = long.and_then(|hex| char::from_u32(u32::from_str_radix(hex, 16).ok()?));
        let (replaced, length) = match (escape.as_bytes().first(), long) {
            (Some(b'U'), Some(c @ ('\\' | '\'' | '"'))) => (format!("\\{c}"), 9),
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

/// Returns where the left operand begins: that of the product that ends it.
fn left_operand(tokens: &[Token], operator: usize) -> Option<usize> {
    let mut depth = 0_usize;
    let mut start = None;
    for index in (0..operator).rev() {
        let token = &tokens[index];
        match token.kind {
            Kind::Close => depth += 1,
            Kind::Open if depth == 0 => break,
            Kind::Open => depth -= 1,
            Kind::Border | Kind::Tilde if depth == 0 => break,
            Kind::Sign if depth == 0 && is_between(tokens, index) => break,
            _ => {}
        }
        start = Some(token.at.start);
    }
    start
}

/// Returns where the right operand ends; that of a `~` may be a product.
fn right_operand(tokens: &[Token], operator: usize) -> Option<usize> {
    let joins = tokens[operator].kind == Kind::Tilde;
    let mut depth = 0_usize;
    let mut end = None;
    for index in operator + 1..tokens.len() {
        let token = &tokens[index];
        match token.kind {
            Kind::Open => depth += 1,
            Kind::Close if depth == 0 => break,
            Kind::Close => depth -= 1,
            Kind::Border | Kind::Tilde if depth == 0 => break,
            Kind::Factor | Kind::Percent if depth == 0 && !joins => break,
            Kind::Sign if depth == 0 && is_between(tokens, index) => break,
            _ => {}
        }
        end = Some(token.at.end);
    }
    end
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rewritten(source: &str) -> String {
        rewrite(source).replace(PERCENT, "f").replace(JOIN, "j")
    }

    #[test]
    fn an_operator_becomes_a_call_of_its_operands() {
        for (source, expected) in [
            ("{{ '%s' % x }}", "{{ f('%s', x) }}"),
            ("{{ a + '%s' % x.y[0] | upper + b }}", "{{ a + f('%s', x.y[0] | upper) + b }}"),
            ("{{ '%s%s' % (a, b) * 2 }}", "{{ f('%s%s', (a, b)) * 2 }}"),
            ("{{ a * b % -c ** 2 == 1 }}", "{{ f(a * b, -c ** 2) == 1 }}"),
            ("{{- '%s' % x -}}", "{{- f('%s', x) -}}"),
            ("{{ 1e-3 % 2.5E+1 - 0xe-1 % 2 }}", "{{ f(1e-3, 2.5E+1) - 0xe-f(1, 2) }}"),
            ("{{ +n + +1 % 2 }}", "{{ - -n + f(- -1, 2) }}"),
            ("{{ +++n + -+-m }}", "{{ - -n + --m }}"),
            ("{{ a.if ~ b.in % c.is }}", "{{ j(a.if, f(b.in, c.is)) }}"),
            (r"{{ '\a\/\n\U0001F600\\a' % b }}", "{{ f('\\x07\\\\/\\n😀\\\\a', b) }}"),
            (r"{{ '\U0000005cn\U00000027\U00000022' ~ b }}", r#"{{ j('\\n\'\"', b) }}"#),
            (r"{{ '\U+0000041\U0000004g' ~ b }}", r"{{ j('\U+0000041\U0000004g', b) }}"),
            ("{{ a % b % c }}", "{{ f(f(a, b), c) }}"),
            ("{{ ('%s' % (a % 2)) }}", "{{ (f('%s', (f(a, 2)))) }}"),
            ("{%- if loop.index0 % 2 == 0 -%}", "{%- if f(loop.index0, 2) == 0 -%}"),
            ("{{ 'x' if a % 2 else -1 % 2 }}", "{{ 'x' if f(a, 2) else f(-1, 2) }}"),
            ("{% set x = {'a': 1 % 2} %}", "{% set x = {'a': f(1, 2)} %}"),
            ("{{ a ~ b * 2 ~ c % 3 + d ~ e }}", "{{ j(a, b * 2, f(c, 3)) + j(d, e) }}"),
            ("{{ f(x=a ~ b) ~ (c ~ d) == e }}", "{{ j(f(x=j(a, b)), (j(c, d))) == e }}"),
            ("{{ a ~ b is not in c and d ~ e }}", "{{ j(a, b is not in c) and j(d, e) }}"),
            ("{{ a, b ~ c }}", "{{ (a, j(b, c)) }}"),
        ] {
            assert_eq!(rewritten(source), expected);
        }
    }

    #[test]
    fn a_row_of_any_length_is_rewritten_in_one_pass() {
        let count = 100_000;
        assert_eq!(
            rewritten(&format!("{{{{ a{} }}}}", " ~ b".repeat(count))),
            format!("{{{{ j(a{}) }}}}", ", b".repeat(count))
        );
        assert_eq!(rewritten(&format!("{{{{ {}a }}}}", "+".repeat(count))), "{{ - -a }}");
    }

    #[test]
    fn more_operators_than_the_limit_are_refused() {
        let tag = |count| format!("{{{{ [{}a] }}}}", "a % b, ".repeat(count));
        assert!(!rewrite(&tag(OPERATORS_MAX)).contains(REFUSE));
        assert!(rewrite(&tag(OPERATORS_MAX + 1)).contains(REFUSE));
    }

    #[test]
    fn what_is_not_an_operator_stays() {
        for source in [
            "{{ '%' }}",
            "{% if a %}",
            "{{ 'a % b ~' }}",
            "{{ \"it's % \\\" %\" }}",
            "{{ a %",
            "{{ 'open",
            "{%",
            "{{ % }}",
            "{{ ~ }}",
            "{{ {'b': {}} }}",
            "{% else +%}",
        ] {
            assert_eq!(rewritten(source), source);
        }
    }
}
