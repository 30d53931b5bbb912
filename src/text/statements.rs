//! Statements that minijinja takes differently from Jinja2, one tag at a time.
//!
//! `set` of an attribute is a call (`namespace`); a loop's items have a known number; a macro's default may
//! name its other arguments; and its `varargs` and `kwargs`, which are not implemented, are refused.

use std::collections::BTreeSet;
use std::sync::LazyLock;

use minijinja::Error;
use minijinja::value::{Value as Jinja, ValueKind};
use regex::{Captures, Regex};

use super::namespace;
use super::objects::Characters;
use super::refusal::refuse;
use super::tokens::{Kind, Token, borders, tokens};

/// The function that a loop's items go through.
pub(super) const ITERATE: &str = "iterate__";
/// The function that stands for what is not implemented.
pub(super) const REFUSE: &str = "refuse__";
/// A variable that is never defined.
pub(super) const NOT_GIVEN: &str = "not_given__";
/// Further arguments of a macro.
const FURTHER: [&str; 2] = ["varargs", "kwargs"];

/// The beginning of a name for the text of a block that becomes an attribute.
const BLOCK: &str = "block__";

/// A tag: its beginning, the statement's name, the rest and the end.
static TAG: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r"^(\{%[-+]?\s*)(\w+)\b(?s:(.*?))([-+]?%\})$").ok());
/// What `set` assigns to an attribute: namespace, attribute, the rest.
static ATTRIBUTE: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r"^\s*(\w+)\s*\.\s*(\w+)\s*(?s:(.*))$").ok());
/// `set` with a value, not a block.
static VALUE: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"^[\w\s,.()]*=").ok());

/// Rewrites the statements of a template in their order.
#[derive(Default)]
pub(super) struct Statements {
    /// The open blocks of `set`, with the call that follows each.
    blocks: Vec<Option<String>>,
    /// The number of open macros.
    macros: usize,
}

/// Returns the items of a loop, as many as are known before: minijinja knows no length of texts, so that
/// `loop.last` would be false.
pub(super) fn iterate(value: &Jinja) -> Result<Jinja, Error> {
    match value.kind() {
        ValueKind::None => Err(refuse("none is not iterable")),
        ValueKind::String => Ok(Characters::of(value)),
        ValueKind::Iterable if value.len().is_none() => Ok(value.try_iter()?.collect()),
        _ => Ok(value.clone()),
    }
}

/// Refuses what is not implemented.
pub(super) fn not_supported(what: &str) -> Result<Jinja, Error> {
    Err(refuse(&format!("{what} is not supported")))
}

impl Statements {
    /// Returns a tag in minijinja's language.
    pub(super) fn rewrite(&mut self, tag: &str) -> String {
        let refused = (self.macros > 0).then(|| without_further(tag));
        let tag = refused.as_deref().unwrap_or(tag);
        let parts = TAG.as_ref().and_then(|regex| regex.captures(tag));
        let parts = parts.as_ref().map(|parts| parts.extract().1);
        match parts {
            Some([open, "set", rest, close]) => self.set(open, rest, close),
            Some([open, "endset", rest, close]) => match self.blocks.pop().flatten() {
                Some(call) => format!("{open}endset{rest}%}}{{% {call} {close}"),
                None => tag.to_owned(),
            },
            Some([open, "for", rest, close]) => format!("{open}for{}{close}", counted(rest)),
            Some([open, "macro", rest, close]) => {
                self.macros += 1;
                let (arguments, defaults) = without_references(rest);
                match defaults.as_str() {
                    "" => tag.to_owned(),
                    defaults => format!("{open}macro{arguments}%}}{{% set {defaults} {close}"),
                }
            }
            // Our output is never escaped: refused as unknown.
            Some([open, "autoescape", rest, close]) => format!("{open}autoescape__{rest}{close}"),
            Some([_, "endmacro", ..]) => {
                self.macros = self.macros.saturating_sub(1);
                tag.to_owned()
            }
            _ => tag.to_owned(),
        }
    }

    /// A namespace's attribute is set by a call.
    fn set(&mut self, open: &str, rest: &str, close: &str) -> String {
        let is_block = !VALUE.as_ref().is_some_and(|regex| regex.is_match(rest));
        let attribute = ATTRIBUTE.as_ref().and_then(|regex| regex.captures(rest));
        let call = |parts: &Captures<'_>, value: &str| {
            format!("do {}({}, '{}', ({value}))", namespace::SET, &parts[1], &parts[2])
        };
        match attribute {
            Some(parts) if is_block => {
                let block = format!("{BLOCK}{}", self.blocks.len());
                self.blocks.push(Some(call(&parts, &block)));
                format!("{open}set {block} {}{close}", &parts[3])
            }
            Some(parts) if parts[3].starts_with('=') => {
                format!("{open}{} {close}", call(&parts, &parts[3][1..]))
            }
            _ => {
                if is_block {
                    self.blocks.push(None);
                }
                format!("{open}set{rest}{close}")
            }
        }
    }
}

/// Replaces the arguments of a macro that are not implemented.
fn without_further(tag: &str) -> String {
    let mut out = String::with_capacity(tag.len());
    let mut done = 0;
    let mut inner = false;
    for Token { kind, at } in tokens(tag) {
        let name = &tag[at.clone()];
        if FURTHER.contains(&name) && !inner {
            out.push_str(&format!("{}{REFUSE}('{name}')", &tag[done..at.start]));
            done = at.end;
        }
        inner = kind == Kind::Inner;
    }
    out + &tag[done..]
}

/// Returns the targets and items of a loop, these in a call.
fn counted(rest: &str) -> String {
    let found = borders(rest);
    let word = |words: &[&str], from: usize| {
        found.iter().find(|at| at.start >= from && words.contains(&&rest[(*at).clone()])).cloned()
    };
    let Some(of) = word(&["in"], 0) else { return rest.to_owned() };
    let end = word(&["if", "recursive"], of.end).map_or(rest.len(), |word| word.start);
    let items = rest[of.end..end].trim();
    format!("{} {ITERATE}(({items})) {}", &rest[..of.end], &rest[end..])
}

/// Returns a macro's name and arguments, without the defaults that name one of them, and what sets these.
fn without_references(rest: &str) -> (String, String) {
    let unchanged = || (rest.to_owned(), String::new());
    let Some((name, list)) = rest.split_once('(') else { return unchanged() };
    let Some((list, after)) = list.rsplit_once(')') else { return unchanged() };
    let commas = borders(list).into_iter().filter(|at| list[at.clone()] == *",");
    let mut from = 0;
    let ends: Vec<usize> = commas.map(|at| at.start).chain([list.len()]).collect();
    let mut known = BTreeSet::new();
    let (mut arguments, mut defaults) = (Vec::new(), Vec::new());
    for end in ends {
        let argument = &list[from..end];
        from = (end + 1).min(list.len());
        let (name, default) = argument.split_once('=').unwrap_or((argument, ""));
        known.insert(name.trim());
        if tokens(default).iter().any(|token| known.contains(&default[token.at.clone()])) {
            let name = name.trim();
            arguments.push(format!("{name}={NOT_GIVEN}"));
            defaults.push((name, default.trim()));
        } else {
            arguments.push(argument.trim().to_owned());
        }
    }
    if defaults.is_empty() {
        return unchanged();
    }
    let sets: Vec<String> = defaults
        .iter()
        .map(|(name, default)| format!("{name} = ({default}) if {name} is undefined else {name}"))
        .collect();
    (format!("{name}({}){after}", arguments.join(", ")), sets.join(" %}{% set "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_set_by_calls() {
        let mut statements = Statements::default();
        for (tag, expected) in [
            ("{% set a = b.c %}", "{% set a = b.c %}"),
            ("{%- set a.b=c == 1 -%}", "{%- do set_attribute__(a, 'b', (c == 1 )) -%}"),
            ("{% set a.b = c, d %}", "{% do set_attribute__(a, 'b', ( c, d )) %}"),
            ("{% set a . b | f('=') -%}", "{% set block__0 | f('=') -%}"),
            ("{% set c %}", "{% set c %}"),
            ("{% endset %}", "{% endset %}"),
            ("{%+ endset -%}", "{%+ endset %}{% do set_attribute__(a, 'b', (block__0)) -%}"),
            ("{% settle %}", "{% settle %}"),
            ("{{ set }}", "{{ set }}"),
        ] {
            assert_eq!(statements.rewrite(tag), expected);
        }
    }

    #[test]
    fn loops_and_macros_are_rewritten() {
        let mut statements = Statements::default();
        for (tag, expected) in [
            ("{% for a, b in c.items() if a -%}", "{% for a, b in iterate__((c.items())) if a -%}"),
            ("{%- for a in [b if c] recursive%}", "{%- for a in iterate__(([b if c])) recursive%}"),
            ("{% for a in b, c %}", "{% for a in iterate__((b, c)) %}"),
            ("{% for a in b.if.in %}", "{% for a in iterate__((b.if.in)) %}"),
            ("{% for a in b.recursive if c %}", "{% for a in iterate__((b.recursive)) if c %}"),
            ("{% endfor %}", "{% endfor %}"),
            ("{{ varargs }}", "{{ varargs }}"),
            ("{% macro m(a, b=(1, 'a')) %}", "{% macro m(a, b=(1, 'a')) %}"),
            ("{{ varargs | length + a.kwargs }}", "{{ refuse__('varargs') | length + a.kwargs }}"),
            ("{% endmacro %}", "{% endmacro %}"),
            (
                "{% macro m(a, b=a[0], c=1) -%}",
                "{% macro m(a, b=not_given__, c=1) %}{% set b = (a[0]) if b is undefined else b -%}",
            ),
        ] {
            assert_eq!(statements.rewrite(tag), expected);
        }
    }
}
