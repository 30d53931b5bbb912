//! Values as Python prints them (`str`, `repr`), which templates written for Jinja2 rely on: a prompt that
//! differs in one space is another prompt.

use std::fmt::Write as _;
use std::sync::LazyLock;

use minijinja::Error;
use minijinja::value::{Tuple, Value as Jinja, ValueKind};
use regex::Regex;
use serde_json::Value;

use super::marks::is_mark;
use super::namespace::Namespace;
use super::objects;
use super::refusal::refuse;

/// Limit of nesting: printing recurses. Python stops near 1,000.
pub(super) const DEPTH_MAX: usize = 128;

/// Limit of what is printed of one value, in bytes: one that shares its items, or an indent, can make
/// any number of them.
pub(super) const PRINTED_BYTES_MAX: usize = 32 << 20;

/// Limit of a text that a method makes, in bytes; minijinja's own for repeated texts.
pub(super) const TEXT_BYTES_MAX: usize = 100_000_000;

/// What Python shows as an escape, besides ASCII's control characters.
static HIDDEN: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"^[\p{C}\p{Z}]$").ok());

/// Returns a JSON value as a template sees it.
pub(super) fn from_json(value: &Value) -> Jinja {
    match value {
        Value::Null => Jinja::from(()),
        Value::Bool(value) => Jinja::from(*value),
        Value::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
            (Some(number), _, _) => Jinja::from(number),
            (_, Some(number), _) => Jinja::from(number),
            (_, _, number) => Jinja::from(number.unwrap_or(f64::NAN)),
        },
        Value::String(text) => Jinja::from(text.as_str()),
        Value::Array(values) => values.iter().map(from_json).collect(),
        Value::Object(map) => {
            Jinja::from_pairs(map.iter().map(|(key, value)| (key.as_str(), from_json(value))))
        }
    }
}

/// Returns Python's `str(value)`; an undefined value is an empty string.
pub(super) fn str(value: &Jinja) -> Result<String, Error> {
    let mut out = String::new();
    match value.kind() {
        ValueKind::Number | ValueKind::Seq | ValueKind::Map | ValueKind::Iterable | ValueKind::Plain => {
            repr(value, 0, &mut out)?;
        }
        _ => out = value.to_string(),
    }
    Ok(out)
}

/// Returns Python's `repr(value)`.
pub(super) fn repr_of(value: &Jinja) -> Result<String, Error> {
    let mut out = String::new();
    repr(value, 0, &mut out)?;
    Ok(out)
}

/// Appends Python's `repr(value)`.
fn repr(value: &Jinja, depth: usize, out: &mut String) -> Result<(), Error> {
    check_depth(depth)?;
    if out.len() > PRINTED_BYTES_MAX {
        return Err(refuse(&format!("a value's text has more than {PRINTED_BYTES_MAX} bytes")));
    }
    match value.kind() {
        ValueKind::Undefined => out.push_str("Undefined"),
        ValueKind::String if value.is_safe() => {
            out.push_str("Markup(");
            quote(value.as_str().unwrap_or_default(), out);
            out.push(')');
        }
        ValueKind::String => quote(value.as_str().unwrap_or_default(), out),
        ValueKind::Number => out.push_str(&number(value, ["inf", "-inf", "nan"])),
        ValueKind::Seq | ValueKind::Iterable => {
            if let Some(range) = value.downcast_object_ref::<objects::Range>() {
                return write!(out, "{range}").map_err(Error::from);
            }
            if objects::is_generator(value) {
                return Err(refuse("a generator has no text: make a list of it with the filter list"));
            }
            let view = value.downcast_object_ref::<objects::View>();
            if let Some(view) = view {
                out.extend([view.name, "("]);
            }
            let tuple = value.downcast_object_ref::<Tuple>().is_some() || is_group(value);
            out.push(if tuple { '(' } else { '[' });
            let mut count = 0;
            for item in value.try_iter()? {
                if count > 0 {
                    out.push_str(", ");
                }
                repr(&item, depth + 1, out)?;
                count += 1;
            }
            out.push_str(if !tuple {
                "]"
            } else if count == 1 {
                ",)"
            } else {
                ")"
            });
            out.push_str(if view.is_some() { ")" } else { "" });
        }
        ValueKind::Map => {
            out.push('{');
            for (index, key) in value.try_iter()?.enumerate() {
                if index > 0 {
                    out.push_str(", ");
                }
                repr(&key, depth + 1, out)?;
                out.push_str(": ");
                repr(&value.get_item(&key)?, depth + 1, out)?;
            }
            out.push('}');
        }
        _ => match value.downcast_object_ref::<Namespace>() {
            Some(namespace) => {
                out.push_str("<Namespace ");
                repr(&Jinja::from_pairs(namespace.pairs()), depth + 1, out)?;
                out.push('>');
            }
            None => write!(out, "{value}").map_err(Error::from)?,
        },
    }
    Ok(())
}

/// Returns whether a value is a group of the filter `groupby`, which is a tuple in Python.
fn is_group(value: &Jinja) -> bool {
    value.kind() == ValueKind::Seq && value.get_attr("list").is_ok_and(|list| !list.is_undefined())
}

/// Appends a string as a Python literal: in single quotes unless it contains those and no double quotes.
fn quote(text: &str, out: &mut String) {
    let mark = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(mark);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == mark => out.extend(['\\', c]),
            c if is_printable(c) || is_mark(c) => out.push(c),
            c => out.push_str(&escape(c)),
        }
    }
    out.push(mark);
}

fn escape(c: char) -> String {
    match u32::from(c) {
        code @ 0..=0xff => format!("\\x{code:02x}"),
        code @ 0x100..=0xffff => format!("\\u{code:04x}"),
        code => format!("\\U{code:08x}"),
    }
}

/// Returns whether Python shows a character as it is.
pub(super) fn is_printable(c: char) -> bool {
    if c.is_ascii() {
        return !c.is_ascii_control();
    }
    HIDDEN.as_ref().is_none_or(|hidden| !hidden.is_match(c.encode_utf8(&mut [0; 4])))
}

/// Returns a number as Python prints it; `special` holds the words for infinity, negative infinity and NaN.
pub(super) fn number(value: &Jinja, special: [&str; 3]) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    let Ok(float) = f64::try_from(value.clone()) else { return value.to_string() };
    if float.is_nan() {
        return special[2].to_owned();
    }
    if float.is_infinite() {
        return special[usize::from(float < 0.0)].to_owned();
    }
    // Python uses exponents below 1e-4 and from 1e16 on; both print the shortest digits that parse to the
    // same number.
    let scientific = format!("{float:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) || float == 0.0 {
        let plain = float.to_string();
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

/// Returns what a number or a bool counts.
pub(super) fn number_of(value: &Jinja) -> Option<f64> {
    match value.kind() {
        ValueKind::Bool => Some(if value.is_true() { 1.0 } else { 0.0 }),
        ValueKind::Number => f64::try_from(value.clone()).ok(),
        _ => None,
    }
}

/// Returns the whole part of a number.
pub(super) fn whole(number: f64) -> Option<Jinja> {
    // The limits of i128 as a double.
    let within = number.is_finite() && number.abs() < 1.7e38;
    #[expect(clippy::cast_possible_truncation, reason = "checked above")]
    within.then(|| (number.trunc() as i128).into())
}

/// Refuses a value that is nested too deeply.
pub(super) fn check_depth(depth: usize) -> Result<(), Error> {
    if depth > DEPTH_MAX {
        Err(refuse(&format!("a value is nested deeper than {DEPTH_MAX}")))
    } else {
        Ok(())
    }
}

/// Refuses a text of more bytes than the limit.
pub(super) fn check_length(bytes: usize) -> Result<(), Error> {
    if bytes > TEXT_BYTES_MAX { Err(refuse("the text becomes too long")) } else { Ok(()) }
}
