//! Statements that minijinja takes differently from Jinja2, one tag at a time.

use std::sync::LazyLock;

use regex::{Captures, Regex};

use super::namespace;

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
}

impl Statements {
    /// Returns a tag in minijinja's language.
    pub(super) fn rewrite(&mut self, tag: &str) -> String {
        let parts = TAG.as_ref().and_then(|regex| regex.captures(tag));
        let parts = parts.as_ref().map(|parts| parts.extract().1);
        match parts {
            Some([open, "set", rest, close]) => self.set(open, rest, close),
            Some([open, "endset", rest, close]) => match self.blocks.pop().flatten() {
                Some(call) => format!("{open}endset{rest}%}}{{% {call} {close}"),
                None => tag.to_owned(),
            },
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
}
