//! Filters, tests and functions of Jinja2 that minijinja lacks.

use minijinja::value::{Kwargs, Rest, Value as Jinja, ValueKind};
use minijinja::{Environment, Error};

use super::arguments::Arguments;
use super::{python, words};

/// Adds them.
pub(super) fn add(environment: &mut Environment<'static>) {
    environment.add_filter("center", center);
    environment.add_filter("forceescape", escape);
    for name in ["e", "escape"] {
        environment
            .add_filter(name, |text: &Jinja| if text.is_safe() { Ok(text.clone()) } else { escape(text) });
    }
    environment.add_filter("dictsort", dictsort);
    // It breaks lines as no template could expect.
    environment.remove_filter("pprint");
    environment.add_filter("wordcount", |text: &Jinja| Ok::<_, Error>(wordcount(&python::str(text)?)));
    environment.add_filter("truncate", truncate);
    environment.add_filter("urlencode", urlencode);
    environment.add_filter("indent", indent);
    environment.add_filter("wordwrap", wordwrap);
    environment.add_filter("int", int);
    environment.add_filter("float", float);
    environment.add_filter("default", default);
    environment.add_filter("d", default);
    environment.add_filter("striptags", minijinja_contrib::filters::striptags);
    environment.add_filter("filesizeformat", minijinja_contrib::filters::filesizeformat);
    environment.add_function("cycler", |items: Rest<Jinja>| minijinja_contrib::globals::cycler(items.0));
    environment.add_function("joiner", minijinja_contrib::globals::joiner);
}

fn center(text: &Jinja, given: Rest<Jinja>, kwargs: Kwargs) -> Result<String, Error> {
    let arguments = Arguments::of(given.0, kwargs, &["width"])?;
    let width = if arguments.get(0).is_some() { arguments.width()? } else { 80 };
    Ok(words::center(&python::str(text)?, width, ' '))
}

fn escape(text: &Jinja) -> Result<Jinja, Error> {
    let text = python::str(text)?;
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&#39;"),
            '"' => out.push_str("&#34;"),
            c => out.push(c),
        }
    }
    Ok(Jinja::from_safe_string(out))
}

fn dictsort(map: &Jinja, given: Rest<Jinja>, kwargs: Kwargs) -> Result<Jinja, Error> {
    let names = ["case_sensitive", "by", "reverse"];
    let arguments = Arguments::of(given.0, kwargs, &names)?;
    let given = names.iter().enumerate().filter_map(|(index, name)| Some((*name, arguments.get(index)?)));
    minijinja::filters::dictsort(map, given.collect())
}

fn wordcount(text: &str) -> usize {
    let words = text.split(|c: char| !c.is_alphanumeric() && c != '_');
    words.filter(|word| !word.is_empty()).count()
}

fn truncate(text: &Jinja, given: Rest<Jinja>, kwargs: Kwargs) -> Result<String, Error> {
    let text = python::str(text)?;
    let arguments = Arguments::of(given.0, kwargs, &["length", "killwords", "end", "leeway"])?;
    let count = |index, default| {
        let given = arguments.integer(index)?;
        Ok::<_, Error>(given.map_or(default, |given| usize::try_from(given).unwrap_or(0)))
    };
    let (length, leeway) = (count(0, 255)?, count(3, 5)?);
    let end = arguments.text(2)?.unwrap_or_else(|| "...".to_owned());
    if text.chars().count() <= length.saturating_add(leeway) {
        return Ok(text);
    }
    let room = length.checked_sub(end.chars().count());
    let room = room.ok_or_else(|| python::refuse("truncate: the length is less than that of the end"))?;
    let kept: String = text.chars().take(room).collect();
    let kept = if arguments.flag(1) {
        kept.as_str()
    } else {
        kept.rsplit_once(' ').map_or(kept.as_str(), |(words, _)| words)
    };
    Ok(format!("{kept}{end}"))
}

fn indent(text: &Jinja, given: Rest<Jinja>, kwargs: Kwargs) -> Result<String, Error> {
    let arguments = Arguments::of(given.0, kwargs, &["width", "first", "blank"])?;
    let space = match arguments.get(0) {
        None => " ".repeat(4),
        Some(width) if width.as_str().is_some() => width.to_string(),
        Some(_) => " ".repeat(arguments.width()?),
    };
    let text = python::str(text)?;
    let (first, blank) = (arguments.flag(1), arguments.flag(2));
    let lines = words::lines(&text, false).into_iter().enumerate();
    let lines = lines.map(|(index, line)| {
        let is_indented = if index == 0 { first } else { blank || !line.is_empty() };
        if is_indented { format!("{space}{line}") } else { line.to_owned() }
    });
    let ends = if text.ends_with('\n') { "\n" } else { "" };
    Ok(lines.collect::<Vec<_>>().join("\n") + ends)
}

/// Breaks lines between words, and words that are longer than a line.
fn wordwrap(text: &Jinja, given: Rest<Jinja>, kwargs: Kwargs) -> Result<String, Error> {
    let arguments = Arguments::of(given.0, kwargs, &["width", "break_long_words", "wrapstring"])?;
    let width = if arguments.get(0).is_some() { arguments.width()?.max(1) } else { 79 };
    let breaks = arguments.get(1).is_none_or(|breaks| breaks.is_true());
    let end = arguments.text(2)?.unwrap_or_else(|| "\n".to_owned());
    let text = python::str(text)?;
    let lines =
        words::lines(&text, false).into_iter().map(|line| words::wrap(line, width, breaks).join(&end));
    Ok(lines.collect::<Vec<_>>().join(&end))
}

fn int(value: &Jinja, given: Rest<Jinja>, kwargs: Kwargs) -> Result<Jinja, Error> {
    let arguments = Arguments::of(given.0, kwargs, &["default", "base"])?;
    let base = arguments.integer(1)?.unwrap_or(10);
    let parsed = match value.as_str() {
        Some(text) => words::integer(text, base).map(Jinja::from).or_else(|| whole(words::number(text)?)),
        None if value.is_integer() => Some(value.clone()),
        None => whole(f64::try_from(value.clone()).unwrap_or(f64::NAN)),
    };
    Ok(parsed.or_else(|| arguments.get(0)).unwrap_or_else(|| 0.into()))
}

/// Returns the whole part of a number.
fn whole(number: f64) -> Option<Jinja> {
    // The limits of i64 as a double: beyond them the number would be another one.
    let within = number.is_finite() && number.abs() < 9.2e18;
    #[expect(clippy::cast_possible_truncation, reason = "checked above")]
    within.then(|| (number.trunc() as i64).into())
}

fn float(value: &Jinja, given: Rest<Jinja>, kwargs: Kwargs) -> Result<Jinja, Error> {
    let arguments = Arguments::of(given.0, kwargs, &["default"])?;
    let parsed = match value.as_str() {
        Some(text) => words::number(text),
        None => f64::try_from(value.clone()).ok(),
    };
    Ok(parsed.map(Jinja::from).or_else(|| arguments.get(0)).unwrap_or_else(|| 0.0.into()))
}

fn default(value: &Jinja, given: Rest<Jinja>, kwargs: Kwargs) -> Result<Jinja, Error> {
    let arguments = Arguments::of(given.0, kwargs, &["default_value", "boolean"])?;
    let replaced = value.is_undefined() || (arguments.flag(1) && !value.is_true());
    Ok(if replaced { arguments.raw(0).unwrap_or_else(|| "".into()) } else { value.clone() })
}

fn urlencode(value: &Jinja) -> Result<String, Error> {
    let pair = |key: &Jinja, value: &Jinja| -> Result<String, Error> {
        let quote = |part: &Jinja| Ok::<_, Error>(quote(&python::str(part)?, b"").replace("%20", "+"));
        Ok(format!("{}={}", quote(key)?, quote(value)?))
    };
    match value.kind() {
        ValueKind::Map => {
            let pairs = value.try_iter()?.map(|key| pair(&key, &value.get_item(&key)?));
            Ok(pairs.collect::<Result<Vec<_>, _>>()?.join("&"))
        }
        ValueKind::Seq | ValueKind::Iterable => {
            let item = |pair: &Jinja, index: usize| pair.get_item_by_index(index);
            let pairs = value.try_iter()?.map(|both| pair(&item(&both, 0)?, &item(&both, 1)?));
            Ok(pairs.collect::<Result<Vec<_>, _>>()?.join("&"))
        }
        _ => Ok(quote(&python::str(value)?, b"/")),
    }
}

fn quote(text: &str, safe: &[u8]) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"_.-~".contains(&byte) || safe.contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}
