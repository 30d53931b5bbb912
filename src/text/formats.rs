//! Functions that stand for Jinja2's operators: `%`, which formats a text or divides a number, and `~`, which
//! joins texts. Values are printed as Python does.

use minijinja::value::{Kwargs, Rest, Tuple, Value as Jinja, ValueKind};
use minijinja::{Environment, Error, State, context};

use super::arguments::WIDTH_MAX;
use super::python;
use super::refusal::refuse;
use super::tojson::BYTES_PER_FUEL;

/// The function that stands for `%`.
pub(super) const PERCENT: &str = "percent_operator__";
/// The function that stands for `~`.
pub(super) const JOIN: &str = "join_operator__";

/// minijinja's filter `format`.
const FILL: &str = "format_filter__";

/// Adds the functions, and the filter that is an operator too.
pub(super) fn add(environment: &mut Environment<'static>) {
    environment.add_function(PERCENT, percent);
    environment.add_function(JOIN, join);
    // minijinja's own, which refuses widths beyond its limits.
    environment.add_filter(FILL, minijinja::filters::format);
    environment.add_filter("format", format);
}

#[expect(clippy::needless_pass_by_value, reason = "minijinja passes arguments by value")]
fn join(parts: Rest<Jinja>) -> Result<String, Error> {
    let mut out = String::new();
    for part in &parts.0 {
        match part.as_str() {
            Some(text) => out.push_str(text),
            None => out.push_str(&python::str(part)?),
        }
        python::check_length(out.len())?;
    }
    Ok(out)
}

#[expect(clippy::needless_pass_by_value, reason = "minijinja passes arguments by value")]
fn format(state: &mut State, text: &Jinja, given: Rest<Jinja>, named: Kwargs) -> Result<Jinja, Error> {
    let pairs = named.args().map(|name| Ok((name, named.get::<Jinja>(name)?)));
    let pairs = pairs.collect::<Result<Vec<_>, Error>>()?;
    let arguments = match (given.0.is_empty(), pairs.is_empty()) {
        (_, true) => given.0,
        (true, false) => vec![Jinja::from_pairs(pairs)],
        (false, false) => return Err(refuse("format takes arguments in their order or by name")),
    };
    formatted(state, &python::str(text)?, arguments)
}

fn percent(state: &mut State, left: &Jinja, right: &Jinja) -> Result<Jinja, Error> {
    let Some(text) = left.as_str() else {
        return state.env().compile_expression("a % b")?.eval(context! { a => left, b => right });
    };
    let arguments = match right.downcast_object_ref::<Tuple>() {
        Some(tuple) => tuple.iter().cloned().collect(),
        None => vec![right.clone()],
    };
    formatted(state, text, arguments)
}

/// Fills in a format of Python's `%`.
fn formatted(state: &mut State, format: &str, arguments: Vec<Jinja>) -> Result<Jinja, Error> {
    let is_container =
        |value: &Jinja| matches!(value.kind(), ValueKind::Map | ValueKind::Seq | ValueKind::Iterable);
    let only = arguments.first().filter(|only| arguments.len() == 1 && is_container(only)).cloned();
    let mut arguments = arguments.into_iter();
    let mut next = || arguments.next().ok_or_else(|| refuse("not enough arguments for the format"));
    let mut out = String::with_capacity(format.len());
    let mut rest = format;
    while let Some((before, spec)) = rest.split_once('%') {
        out.push_str(before);
        let (name, spec) = match spec.strip_prefix('(').and_then(|spec| spec.split_once(')')) {
            Some((name, spec)) => (Some(name), spec),
            None => (None, spec),
        };
        let length = spec.find(|c: char| c.is_ascii_alphabetic() || c == '%');
        let (flags, conversion) = spec.split_at(length.ok_or_else(|| refuse("an incomplete format"))?);
        let (kind, after) = conversion.split_at(1);
        rest = after;
        if kind == "%" {
            out.push('%');
            continue;
        }
        let mut flags = flags.to_owned();
        while let Some(at) = flags.find('*') {
            flags.replace_range(at..=at, &i64::try_from(next()?)?.to_string());
        }
        let argument = match (name, &only) {
            (Some(name), Some(map)) => map.get_item(&name.into())?,
            (Some(_), None) => return Err(refuse("the format needs a mapping")),
            (None, _) => next()?,
        };
        out.push_str(&converted(state, &flags, kind, argument)?);
        python::check_length(out.len())?;
    }
    if only.is_none() && next().is_ok() {
        return Err(refuse("not all arguments are in the format"));
    }
    Ok((out + rest).into())
}

/// Returns an argument as a conversion prints it.
fn converted(state: &mut State, flags: &str, kind: &str, argument: Jinja) -> Result<String, Error> {
    let argument = match kind {
        "s" | "r" => {
            let text = if kind == "s" { python::str(&argument)? } else { python::repr_of(&argument)? };
            // It is made even where the format then cuts it to nothing.
            state.consume_fuel((text.len() / BYTES_PER_FUEL) as u64 + 1)?;
            return padded(text, flags);
        }
        "d" | "i" | "u" if !argument.is_integer() => {
            python::number_of(&argument).and_then(python::whole).unwrap_or(argument)
        }
        _ => argument,
    };
    Ok(state.apply_filter(FILL, &[format!("%{flags}{kind}").into(), argument])?.to_string())
}

/// Cuts a text and pads it to its width, both in characters.
fn padded(text: String, flags: &str) -> Result<String, Error> {
    let width = flags.trim_start_matches(['-', '+', ' ', '0', '#']);
    if width.is_empty() {
        return Ok(text);
    }
    let (width, most) = width.split_once('.').map_or((width, None), |(width, most)| (width, Some(most)));
    let count = |digits: &str| {
        let count = if digits.is_empty() { Some(0) } else { digits.parse().ok() };
        count.filter(|count| *count <= WIDTH_MAX).ok_or_else(|| refuse("a width beyond 10,000"))
    };
    let most = most.map(count).transpose()?;
    let text: String = text.chars().take(most.unwrap_or(usize::MAX)).collect();
    let space = " ".repeat(count(width)?.saturating_sub(text.chars().count()));
    Ok(if flags.contains('-') { text + &space } else { space + &text })
}
