//! transformers' `tojson`: Python's `json.dumps`, which by default leaves non-ASCII characters unescaped.
//! Spaces and floats are Python's, keys keep their order.

use minijinja::value::{Kwargs, Value as Jinja, ValueKind};
use minijinja::{Error, State};

use super::marks::is_mark;
use super::objects;
use super::python::{DEPTH_MAX, PRINTED_BYTES_MAX, check_depth, number};
use super::refusal::refuse;

/// Limit of an indent, in characters: wider ones are a mistake, and cost memory.
const INDENT_MAX: usize = 64;

/// Bytes that cost a render as much as an instruction, as everywhere else in it.
pub(super) const BYTES_PER_FUEL: usize = 64;

struct Writer {
    out: String,
    ascii: bool,
    sort_keys: bool,
    /// The indent of one level; `None` writes one line.
    indent: Option<String>,
    item: String,
    key: String,
}

/// Writes a value as JSON, with the arguments of the filter in transformers.
#[expect(clippy::needless_pass_by_value, reason = "minijinja passes arguments by value")]
pub(super) fn tojson(
    state: &State<'_, '_>,
    value: &Jinja,
    ensure_ascii: Option<bool>,
    indent: Option<Jinja>,
    kwargs: Kwargs,
) -> Result<String, Error> {
    let indent = indent.map_or_else(|| kwargs.get::<Option<Jinja>>("indent"), |indent| Ok(Some(indent)))?;
    let indent = indent.filter(|indent| !indent.is_none() && !indent.is_undefined());
    let indent = indent.map(|indent| match indent.as_str() {
        Some(text) => text.chars().take(INDENT_MAX).collect(),
        None => " ".repeat(indent.as_usize().unwrap_or(0).min(INDENT_MAX)),
    });
    let ascii =
        ensure_ascii.map_or_else(|| kwargs.get::<Option<bool>>("ensure_ascii"), |ascii| Ok(Some(ascii)))?;
    let separators = kwargs.get::<Option<Vec<String>>>("separators")?;
    let sort_keys = kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    kwargs.assert_all_used()?;
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(refuse("tojson: separators are two texts")),
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
    };
    let ascii = ascii.unwrap_or(false);
    let mut writer = Writer { out: String::new(), ascii, sort_keys, indent, item, key };
    writer.value(value, 0)?;
    state.consume_fuel((writer.out.len() / BYTES_PER_FUEL) as u64)?;
    Ok(writer.out)
}

/// Writes a value as JSON, as the filter does without arguments.
pub(super) fn json(value: &Jinja) -> Result<String, Error> {
    let (item, key) = (", ".to_owned(), ": ".to_owned());
    let mut writer = Writer { out: String::new(), ascii: false, sort_keys: false, indent: None, item, key };
    writer.value(value, 0)?;
    Ok(writer.out)
}

impl Writer {
    fn value(&mut self, value: &Jinja, depth: usize) -> Result<(), Error> {
        check_depth(depth)?;
        if self.out.len() > PRINTED_BYTES_MAX {
            return Err(refuse(&format!("tojson: more than {PRINTED_BYTES_MAX} bytes")));
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.out.push_str(&number(value, ["Infinity", "-Infinity", "NaN"])),
            ValueKind::String => self.text(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable if objects::is_one(value) => {
                return Err(refuse("tojson: ranges, views and generators are not JSON"));
            }
            // A slice of a list is an iterable.
            ValueKind::Seq | ValueKind::Iterable => self.list(value, depth)?,
            ValueKind::Map => self.map(value, depth)?,
            kind => return Err(refuse(&format!("tojson: {kind} is not JSON"))),
        }
        Ok(())
    }

    fn list(&mut self, list: &Jinja, depth: usize) -> Result<(), Error> {
        self.out.push('[');
        let mut empty = true;
        for item in list.try_iter()? {
            self.next(empty, depth + 1);
            empty = false;
            self.value(&item, depth + 1)?;
        }
        self.close(empty, depth, ']');
        Ok(())
    }

    fn map(&mut self, map: &Jinja, depth: usize) -> Result<(), Error> {
        self.out.push('{');
        let mut keys: Vec<Jinja> = map.try_iter()?.collect();
        if self.sort_keys {
            keys.sort();
        }
        for (index, key) in keys.iter().enumerate() {
            self.next(index == 0, depth + 1);
            self.name(key)?;
            self.out.push_str(&self.key);
            self.value(&map.get_item(key)?, depth + 1)?;
        }
        self.close(keys.is_empty(), depth, '}');
        Ok(())
    }

    fn next(&mut self, first: bool, depth: usize) {
        if !first {
            self.out.push_str(&self.item);
        }
        self.line(depth);
    }

    fn close(&mut self, empty: bool, depth: usize, bracket: char) {
        if !empty {
            self.line(depth);
        }
        self.out.push(bracket);
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(indent.as_str(), depth));
        }
    }

    /// Writes a key. A key that is not a string is written as JSON in quotes.
    fn name(&mut self, key: &Jinja) -> Result<(), Error> {
        if let Some(key) = key.as_str() {
            self.text(key);
            return Ok(());
        }
        self.out.push('"');
        self.value(key, DEPTH_MAX)?;
        self.out.push('"');
        Ok(())
    }

    fn text(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if u32::from(c) < 0x20 || (self.ascii && !c.is_ascii() && !is_mark(c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        self.out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}
