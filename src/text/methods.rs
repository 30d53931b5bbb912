//! Python's methods on texts, lists, mappings and numbers, as templates call them. Methods that change a
//! value are refused, as in transformers.

use minijinja::value::{Kwargs, Tuple, Value as Jinja, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State};
use minijinja_contrib::pycompat;

use super::arguments::Arguments;
use super::objects::View;
use super::refusal::refuse;
use super::{python, words, work};

/// Calls a method that the value itself does not have.
pub(super) fn call(
    state: &mut State<'_, '_>,
    value: &Jinja,
    method: &str,
    arguments: &[Jinja],
) -> Result<Jinja, Error> {
    // What a text's method takes may be printed, a mapping's hashed, and a list's compared with each item.
    arguments.iter().try_for_each(|argument| work::pay(state, argument))?;
    if matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable) {
        work::pay(state, value)?;
    }
    let own = match value.kind() {
        ValueKind::String => text(value.as_str().unwrap_or_default(), method, arguments)?,
        ValueKind::Map => mapping(value, method, arguments)?,
        ValueKind::Seq | ValueKind::Iterable => list(value, method, arguments)?,
        ValueKind::Number => number(value, method, arguments)?,
        _ => None,
    };
    match own {
        Some(own) => Ok(own),
        None => pycompat::unknown_method_callback(state, value, method, arguments),
    }
}

/// The part of a text between two indices, as Python counts them: in characters, from the end if negative.
struct Part<'a> {
    text: &'a str,
    /// Number of characters before it.
    start: usize,
}

impl<'a> Part<'a> {
    /// Takes the indices from the second and third argument; `None` if nothing lies between them.
    fn new(text: &'a str, arguments: &Arguments<'_>) -> Result<Option<Self>, Error> {
        let (start, end) = (arguments.integer(1)?, arguments.integer(2)?);
        if start.is_none() && end.is_none() {
            return Ok(Some(Self { text, start: 0 }));
        }
        let count = text.chars().count();
        let index = |index: i64| {
            let distance = usize::try_from(index.unsigned_abs()).unwrap_or(usize::MAX);
            if index < 0 { count.saturating_sub(distance) } else { distance }
        };
        let (start, end) = (start.map_or(0, index), end.map_or(count, index).min(count));
        if start > end {
            return Ok(None);
        }
        let at = |index: usize| text.char_indices().nth(index).map_or(text.len(), |(at, _)| at);
        Ok(Some(Self { text: &text[at(start)..at(end)], start }))
    }

    fn index(&self, at: usize) -> usize {
        self.start + self.text[..at].chars().count()
    }
}

fn text(text: &str, method: &str, arguments: &[Jinja]) -> Result<Option<Jinja>, Error> {
    let named = |names| Arguments::new(arguments, names);
    Ok(Some(match method {
        "split" | "rsplit" => {
            return split(text, &named(&["sep", "maxsplit"])?, method == "rsplit").map(Some);
        }
        "partition" | "rpartition" => partition(text, &named(&["sep"])?.required(0)?, method == "rpartition"),
        "removeprefix" => {
            let prefix = named(&["prefix"])?.required(0)?;
            text.strip_prefix(prefix.as_str()).unwrap_or(text).into()
        }
        "removesuffix" => {
            let suffix = named(&["suffix"])?.required(0)?;
            text.strip_suffix(suffix.as_str()).unwrap_or(text).into()
        }
        "find" | "rfind" | "index" | "rindex" | "count" => {
            return search(text, method, &named(&["sub", "start", "end"])?).map(Some);
        }
        "startswith" | "endswith" if arguments.len() > 1 => {
            let arguments = named(&["fix", "start", "end"])?;
            let Some(part) = Part::new(text, &arguments)? else { return Ok(Some(false.into())) };
            let first = arguments.get(0).unwrap_or_default();
            return text_ends(part.text, &first, method == "startswith").map(Some);
        }
        "replace" => {
            let arguments = named(&["old", "new", "count"])?;
            let (old, new) = (arguments.required(0)?, arguments.required(1)?);
            return words::replace(text, &old, &new, arguments.integer(2)?).map(Some);
        }
        "splitlines" => {
            let lines = words::lines(text, named(&["keepends"])?.flag(0));
            lines.map(Jinja::from).collect()
        }
        "zfill" => zfill(text, named(&["width"])?.width()?).into(),
        "ljust" | "rjust" | "center" => {
            let arguments = named(&["width", "fillchar"])?;
            let (width, fill) = (arguments.width()?, arguments.text(1)?.and_then(|fill| fill.chars().next()));
            justify(text, method, width, fill.unwrap_or(' ')).into()
        }
        "expandtabs" => words::expand_tabs(text, named(&["tabsize"])?.integer(0)?.unwrap_or(8)).into(),
        "title" => words::title(text).into(),
        "capitalize" => words::capitalize(text).into(),
        "swapcase" => words::swap_case(text).into(),
        "casefold" => words::fold_case(text).into(),
        "istitle" => words::is_title(text).into(),
        "isdecimal" => (!text.is_empty() && text.chars().all(words::is_decimal)).into(),
        "isdigit" => (!text.is_empty() && text.chars().all(words::is_digit)).into(),
        "isidentifier" => words::is_identifier(text).into(),
        "isprintable" => text.chars().all(python::is_printable).into(),
        "format_map" => return format_map(text, arguments).map(Some),
        _ => return Ok(None),
    }))
}

fn split(text: &str, arguments: &Arguments<'_>, right: bool) -> Result<Jinja, Error> {
    let most = arguments.integer(1)?.and_then(|most| usize::try_from(most).ok());
    let pieces = most.map_or(usize::MAX, |most| most.saturating_add(1));
    let mut parts: Vec<&str> = match arguments.text(0)? {
        Some(separator) if separator.is_empty() => return Err(refuse("empty separator")),
        Some(separator) if right => text.rsplitn(pieces, separator.as_str()).collect(),
        Some(separator) => text.splitn(pieces, separator.as_str()).collect(),
        None => words::split(text, pieces, right),
    };
    if right {
        parts.reverse();
    }
    Ok(parts.into_iter().map(Jinja::from).collect())
}

fn partition(text: &str, separator: &str, right: bool) -> Jinja {
    let found = if right { text.rsplit_once(separator) } else { text.split_once(separator) };
    let parts = match found {
        Some((before, after)) => [before, separator, after],
        None if right => ["", "", text],
        None => [text, "", ""],
    };
    Jinja::from(Tuple::from(parts.map(Jinja::from)))
}

fn search(text: &str, method: &str, arguments: &Arguments<'_>) -> Result<Jinja, Error> {
    let sought = arguments.required(0)?;
    let part = Part::new(text, arguments)?;
    let within = part.as_ref().map_or("", |part| part.text);
    if method == "count" {
        return Ok(part.map_or(0, |_| within.matches(sought.as_str()).count()).into());
    }
    let right = method.starts_with('r');
    let at = if right { within.rfind(sought.as_str()) } else { within.find(sought.as_str()) };
    match part.zip(at) {
        Some((part, at)) => Ok(part.index(at).into()),
        None if method.ends_with("find") => Ok((-1).into()),
        None => Err(refuse("substring not found")),
    }
}

fn text_ends(text: &str, fixes: &Jinja, start: bool) -> Result<Jinja, Error> {
    let matches = |fix: &str| if start { text.starts_with(fix) } else { text.ends_with(fix) };
    if let Some(fix) = fixes.as_str() {
        return Ok(matches(fix).into());
    }
    Ok(fixes.try_iter()?.any(|fix| fix.as_str().is_some_and(matches)).into())
}

fn zfill(text: &str, width: usize) -> String {
    let sign = text.len() - text.trim_start_matches(['+', '-']).len();
    let (sign, digits) = text.split_at(sign.min(1));
    let zeros = width.saturating_sub(text.chars().count());
    [sign, &"0".repeat(zeros), digits].concat()
}

fn justify(text: &str, method: &str, width: usize, fill: char) -> String {
    let pad = std::iter::repeat_n(fill, width.saturating_sub(text.chars().count()));
    match method {
        "ljust" => text.chars().chain(pad).collect(),
        "rjust" => pad.chain(text.chars()).collect(),
        _ => words::center(text, width, fill),
    }
}

fn format_map(text: &str, arguments: &[Jinja]) -> Result<Jinja, Error> {
    let (map,): (&Jinja,) = from_args(arguments)?;
    let pairs = map.try_iter()?.map(|key| Ok((python::str(&key)?, map.get_item(&key)?)));
    let kwargs: Kwargs = pairs.collect::<Result<Vec<_>, Error>>()?.into_iter().collect();
    let style = minijinja::formatting::FormatStyle::StrFormat;
    minijinja::formatting::format(style, text, &[kwargs.into()]).map(Jinja::from)
}

fn mapping(value: &Jinja, method: &str, arguments: &[Jinja]) -> Result<Option<Jinja>, Error> {
    let name = match method {
        "copy" => {
            let () = from_args(arguments)?;
            return Ok(Some(value.clone()));
        }
        // A default that is undefined stays so.
        "get" if arguments.get(1).is_some_and(Jinja::is_undefined) => {
            return value.get_item(&arguments[0]).map(Some);
        }
        "items" => "dict_items",
        "keys" => "dict_keys",
        "values" => "dict_values",
        _ => return Ok(None),
    };
    let () = from_args(arguments)?;
    let items = value.try_iter()?.map(|key| {
        Ok(match method {
            "keys" => key,
            "values" => value.get_item(&key)?,
            _ => Jinja::from(Tuple::from([key.clone(), value.get_item(&key)?])),
        })
    });
    let items = items.collect::<Result<Vec<_>, Error>>()?;
    Ok(Some(Jinja::from_object(View { name, items })))
}

fn list(value: &Jinja, method: &str, arguments: &[Jinja]) -> Result<Option<Jinja>, Error> {
    match method {
        "copy" => {
            let () = from_args(arguments)?;
            Ok(Some(value.try_iter()?.collect()))
        }
        "index" => {
            let (sought,): (&Jinja,) = from_args(arguments)?;
            let at = value.try_iter()?.position(|item| item == *sought);
            at.map(|at| Some(at.into())).ok_or_else(|| refuse("the value is not in the list"))
        }
        "count" => {
            let (sought,): (&Jinja,) = from_args(arguments)?;
            Ok(Some(value.try_iter()?.filter(|item| item == sought).count().into()))
        }
        _ => Ok(None),
    }
}

fn number(value: &Jinja, method: &str, arguments: &[Jinja]) -> Result<Option<Jinja>, Error> {
    let () = match method {
        "bit_length" | "is_integer" => from_args(arguments)?,
        _ => return Ok(None),
    };
    if method == "is_integer" {
        let whole = f64::try_from(value.clone()).is_ok_and(|number| number.fract() == 0.0);
        return Ok(Some(whole.into()));
    }
    let bits = i128::try_from(value.clone()).map(|number| 128 - number.unsigned_abs().leading_zeros());
    bits.map(|bits| Some(bits.into())).map_err(|_| Error::from(ErrorKind::UnknownMethod))
}
