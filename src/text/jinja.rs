//! The Jinja that chat templates are written for: that of transformers' `_compile_jinja_template`, with its
//! options, functions, filters and tests. Python's ways of printing are in `python` and `tojson`, its methods
//! in `methods`, its operators in `operators`, statements in `statements`.
//! `tests/rust/template_fragments.json` records what transformers renders.

use std::error::Error as _;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Value as Jinja, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind};
use regex::{Captures, Regex};

use super::refusal::refuse;
use super::{filters, formats, methods, namespace, objects, python, source, statements, tojson, work};

/// Returns the environment of templates, which may take this many instructions; 64 bytes of text count as one
/// (minijinja's fuel).
pub(super) fn environment(fuel: u64) -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_syntax(
        SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().unwrap_or_default(),
    );
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_fuel(Some(fuel));
    environment.set_unknown_method_callback(methods::call);
    environment.set_formatter(|out, _, value| match value.as_str() {
        Some(text) => Ok(out.write_str(text)?),
        None => Ok(out.write_str(&python::str(value)?)?),
    });
    environment.add_filter("tojson", tojson::tojson);
    environment.add_filter("string", python::str);
    filters::add(&mut environment);
    namespace::add(&mut environment);
    // It prints the whole context.
    environment.remove_global("debug");
    environment.add_test("iterable", is_iterable);
    environment.add_test("sequence", is_sequence);
    environment.add_function("range", objects::range);
    environment.add_function(statements::ITERATE, statements::iterate);
    environment.add_function(statements::REFUSE, statements::not_supported);
    environment.add_global(statements::NOT_GIVEN, Jinja::UNDEFINED);
    formats::add(&mut environment);
    work::add(&mut environment);
    environment.add_function("raise_exception", |message: &Jinja| -> Result<Jinja, Error> {
        Err(refuse(&python::str(message)?))
    });
    environment
}

/// A value with a length and items, as in Jinja2; a slice of a list is an iterable here.
fn is_sequence(value: &Jinja) -> bool {
    use ValueKind::{Iterable, Map, Seq, String, Undefined};
    !objects::is_unindexed(value) && matches!(value.kind(), Seq | Iterable | Map | String | Undefined)
}

fn is_iterable(value: &Jinja) -> bool {
    use ValueKind::{Iterable, Map, Seq, String, Undefined};
    matches!(value.kind(), Seq | Iterable | Map | String | Undefined)
}

/// Returns a template's source in minijinja's language.
pub(super) fn translate(source: &str) -> String {
    let lines = source.replace("\r\n", "\n").replace('\r', "\n");
    source::rewrite(&without_generation_tags(&lines))
}

/// Replaces `{% generation %}` blocks, which mark a model's own text for training, by conditions that always
/// hold: both print their contents.
fn without_generation_tags(source: &str) -> String {
    let Ok(tag) = Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}") else { return source.to_owned() };
    let condition = |tag: &Captures<'_>| {
        let statement = if tag.get(2).is_some() { "endif" } else { "if true" };
        format!("{{%{} {statement} {}%}}", &tag[1], &tag[3])
    };
    tag.replace_all(source, condition).into_owned()
}

/// Returns the words of an error's innermost cause, with its line if it has one.
pub(super) fn explain(error: &Error) -> String {
    let mut cause = error;
    while let Some(inner) = cause.source().and_then(|inner| inner.downcast_ref()) {
        cause = inner;
    }
    if cause.kind() == ErrorKind::OutOfFuel {
        return "it takes too much work".to_owned();
    }
    let words = cause.detail().map_or_else(|| cause.kind().to_string(), str::to_owned);
    match cause.line() {
        Some(line) => format!("{words} (line {line})"),
        None => words,
    }
}
