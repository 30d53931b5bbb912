//! Filters, tests and functions of Jinja2 that minijinja lacks.

use minijinja::value::{Kwargs, Rest, Value as Jinja, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State};

use super::arguments::Arguments;
use super::refusal::refuse;
use super::{objects, python, words, work};

/// Adds them.
pub(super) fn add(environment: &mut Environment<'static>) {
    texts(environment);
    lists(environment);
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
    environment.add_filter("round", round);
    environment
        .add_filter("striptags", |text: &Jinja| python::str(text).map(minijinja_contrib::filters::striptags));
    environment.add_filter("filesizeformat", filesizeformat);
    for (name, is_case) in [("lower", char::is_lowercase as fn(char) -> bool), ("upper", char::is_uppercase)]
    {
        environment.add_test(name, move |value: &Jinja| {
            Ok::<_, Error>(words::is_case(&python::str(value)?, is_case))
        });
    }
    environment.add_function("cycler", |items: Rest<Jinja>| minijinja_contrib::globals::cycler(items.0));
    environment.add_function("joiner", minijinja_contrib::globals::joiner);
}

/// Those that change what Python prints of a value.
fn texts(environment: &mut Environment<'static>) {
    environment.add_filter("upper", |value: &Jinja| changed(value, str::to_uppercase));
    environment.add_filter("lower", |value: &Jinja| changed(value, str::to_lowercase));
    environment.add_filter("capitalize", |value: &Jinja| changed(value, words::capitalize));
    environment
        .add_filter("title", |value: &Jinja| changed(value, |text| minijinja::filters::title(text.into())));
    environment.add_filter("trim", |value: &Jinja, given: Rest<Jinja>, kwargs: Kwargs| {
        let characters = Arguments::of(given.0, kwargs, &["chars"])?.text(0)?;
        changed(value, |text| words::trim(text, characters.as_deref()).to_owned())
    });
    environment.add_filter("safe", |value: &Jinja| python::str(value).map(Jinja::from_safe_string));
    environment.add_filter("replace", |value: &Jinja, given: Rest<Jinja>, kwargs: Kwargs| {
        let arguments = Arguments::of(given.0, kwargs, &["old", "new", "count"])?;
        let text = |index| python::str(&arguments.raw(index).ok_or(ErrorKind::MissingArgument)?);
        words::replace(&python::str(value)?, &text(0)?, &text(1)?, arguments.integer(2)?)
    });
}

fn changed(value: &Jinja, change: impl Fn(&str) -> String) -> Result<Jinja, Error> {
    let changed = change(&python::str(value)?);
    Ok(if value.is_safe() { Jinja::from_safe_string(changed) } else { changed.into() })
}

/// A filter of minijinja that takes its arguments only by name.
type Named = fn(&mut State, Jinja, Kwargs) -> Result<Jinja, Error>;

/// Those whose arguments Jinja2 takes in their order, too.
fn lists(environment: &mut Environment<'static>) {
    let filters: [(_, Named, &[&str]); 3] = [
        (
            "sort",
            |state, value, named| minijinja::filters::sort(state, value, named),
            &["reverse", "case_sensitive", "attribute"],
        ),
        (
            "min",
            |state, value, named| minijinja::filters::min(state, value, named),
            &["case_sensitive", "attribute"],
        ),
        (
            "max",
            |state, value, named| minijinja::filters::max(state, value, named),
            &["case_sensitive", "attribute"],
        ),
    ];
    for (name, filter, names) in filters {
        environment.add_filter(
            name,
            move |state: &mut State, value: Jinja, given: Rest<Jinja>, kwargs: Kwargs| {
                let arguments = Arguments::of(given.0, kwargs, names)?;
                work::pay_for_sorting(state, &value)?;
                filter(state, value, arguments.named())
            },
        );
    }
    environment.add_filter("join", join);
    generators(environment);
}

/// Those whose results Python generates.
fn generators(environment: &mut Environment<'static>) {
    use minijinja::filters;
    environment.add_filter("batch__", filters::batch);
    environment.add_filter("items__", filters::items);
    environment.add_filter("map__", filters::map);
    environment.add_filter("reject__", filters::reject);
    environment.add_filter("rejectattr__", filters::rejectattr);
    environment.add_filter("reverse__", filters::reverse);
    environment.add_filter("select__", filters::select);
    environment.add_filter("selectattr__", filters::selectattr);
    environment.add_filter("slice__", filters::slice);
    environment.add_filter("unique__", unique);
    let names = [
        "batch",
        "items",
        "map",
        "reject",
        "rejectattr",
        "reverse",
        "select",
        "selectattr",
        "slice",
        "unique",
    ];
    for name in names {
        environment.add_filter(name, move |state: &mut State, given: Rest<Jinja>, kwargs: Kwargs| {
            let mut arguments = given.0;
            if kwargs.args().next().is_some() {
                arguments.push(kwargs.into());
            }
            arguments.iter().skip(1).try_for_each(|argument| work::pay(state, argument))?;
            let items = state.apply_filter(&format!("{name}__"), &arguments)?;
            if items.as_str().is_some() { Ok(items) } else { objects::Generator::of(&items) }
        });
    }
}

fn unique(state: &mut State, value: Jinja, given: Rest<Jinja>, kwargs: Kwargs) -> Result<Jinja, Error> {
    let arguments = Arguments::of(given.0, kwargs, &["case_sensitive", "attribute"])?;
    work::pay_for_sorting(state, &value)?;
    minijinja::filters::unique(state, value, arguments.named())
}

fn join(state: &mut State, value: &Jinja, given: Rest<Jinja>, kwargs: Kwargs) -> Result<String, Error> {
    let arguments = Arguments::of(given.0, kwargs, &["d", "attribute"])?;
    let items = match arguments.get(1) {
        Some(attribute) => {
            let attribute = Kwargs::from_iter([("attribute", attribute)]);
            state.apply_filter("map", &[value.clone(), attribute.into()])?
        }
        None => value.clone(),
    };
    let between = arguments.raw(0).map_or(Ok(String::new()), |between| python::str(&between))?;
    let mut out = String::new();
    for (index, item) in items.try_iter()?.enumerate() {
        if index > 0 {
            out.push_str(&between);
        }
        out.push_str(&python::str(&item)?);
        python::check_length(out.len())?;
    }
    Ok(out)
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

fn dictsort(state: &mut State, map: &Jinja, given: Rest<Jinja>, kwargs: Kwargs) -> Result<Jinja, Error> {
    let names = ["case_sensitive", "by", "reverse"];
    let arguments = Arguments::of(given.0, kwargs, &names)?;
    work::pay_for_sorting(state, map)?;
    minijinja::filters::dictsort(map, arguments.named())
}

fn wordcount(text: &str) -> usize {
    let words = text.split(|c: char| !c.is_alphanumeric() && c != '_');
    words.filter(|word| !word.is_empty()).count()
}

fn truncate(value: &Jinja, given: Rest<Jinja>, kwargs: Kwargs) -> Result<Jinja, Error> {
    let arguments = Arguments::of(given.0, kwargs, &["length", "killwords", "end", "leeway"])?;
    let count = |index, default| {
        let given = arguments.integer(index)?;
        Ok::<_, Error>(given.map_or(default, |given| usize::try_from(given).unwrap_or(0)))
    };
    let (length, leeway) = (count(0, 255)?, count(3, 5)?);
    let end = arguments.text(2)?.unwrap_or_else(|| "...".to_owned());
    let text = value.as_str().unwrap_or_default();
    let size = if value.as_str().is_some() { Some(text.chars().count()) } else { value.len() };
    if value.is_undefined() || size.is_some_and(|size| size <= length.saturating_add(leeway)) {
        return Ok(value.clone());
    }
    if value.as_str().is_none() {
        return Err(refuse("truncate takes a text"));
    }
    let room = length.checked_sub(end.chars().count());
    let room = room.ok_or_else(|| refuse("truncate: the length is less than that of the end"))?;
    let kept: String = text.chars().take(room).collect();
    let kept = if arguments.flag(1) {
        kept.as_str()
    } else {
        kept.rsplit_once(' ').map_or(kept.as_str(), |(words, _)| words)
    };
    Ok(format!("{kept}{end}").into())
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
    // Jinja2 adds the end of a line, so that the last one may be empty.
    let text = text + "\n";
    let count = words::lines(&text, false).count();
    python::check_length(space.len().saturating_mul(count).saturating_add(text.len()))?;
    let mut out = String::with_capacity(text.len());
    for (index, line) in words::lines(&text, false).enumerate() {
        if index > 0 {
            out.push('\n');
        }
        let is_indented = if index == 0 { first } else { blank || !line.is_empty() };
        if is_indented {
            out.push_str(&space);
        }
        out.push_str(line);
    }
    Ok(out)
}

/// Breaks lines between words, and words that are longer than a line.
fn wordwrap(text: &Jinja, given: Rest<Jinja>, kwargs: Kwargs) -> Result<String, Error> {
    let arguments = Arguments::of(given.0, kwargs, &["width", "break_long_words", "wrapstring"])?;
    let width = if arguments.get(0).is_some() { arguments.width()?.max(1) } else { 79 };
    let breaks = arguments.get(1).is_none_or(|breaks| breaks.is_true());
    let end = arguments.text(2)?.unwrap_or_else(|| "\n".to_owned());
    let text = python::str(text)?;
    let mut out = String::with_capacity(text.len());
    let mut between = "";
    let mut add = |piece: &str| {
        out.extend([between, piece]);
        between = &end;
        python::check_length(out.len())
    };
    for line in words::lines(&text, false) {
        words::wrap(line, width, breaks, &mut add)?;
    }
    Ok(out)
}

fn int(value: &Jinja, given: Rest<Jinja>, kwargs: Kwargs) -> Result<Jinja, Error> {
    let arguments = Arguments::of(given.0, kwargs, &["default", "base"])?;
    let base = arguments.integer(1)?.unwrap_or(10);
    let parsed = match value.as_str() {
        Some(text) => {
            words::integer(text, base).map(Jinja::from).or_else(|| python::whole(words::number(text)?))
        }
        None if value.is_integer() => Some(value.clone()),
        None => python::number_of(value).and_then(python::whole),
    };
    Ok(parsed.or_else(|| arguments.get(0)).unwrap_or_else(|| 0.into()))
}

fn float(value: &Jinja, given: Rest<Jinja>, kwargs: Kwargs) -> Result<Jinja, Error> {
    let arguments = Arguments::of(given.0, kwargs, &["default"])?;
    let parsed = match value.as_str() {
        Some(text) => words::number(text),
        None => python::number_of(value),
    };
    Ok(parsed.map(Jinja::from).or_else(|| arguments.get(0)).unwrap_or_else(|| 0.0.into()))
}

fn round(value: &Jinja, given: Rest<Jinja>, kwargs: Kwargs) -> Result<Jinja, Error> {
    let arguments = Arguments::of(given.0, kwargs, &["precision", "method"])?;
    let refuse = || refuse("round takes a number, a precision, and common, ceil or floor");
    let precision = arguments.integer(0)?.unwrap_or(0);
    let precision = i32::try_from(precision).ok().filter(|digits| digits.abs() <= 300).ok_or_else(refuse)?;
    let number = python::number_of(value).ok_or_else(refuse)?;
    let scale = 10_f64.powi(precision);
    let rounded = match arguments.text(1)?.as_deref().unwrap_or("common") {
        "common" if value.is_integer() || value.kind() == ValueKind::Bool => {
            let same = if value.is_integer() { value.clone() } else { i64::from(value.is_true()).into() };
            return if precision < 0 { Err(refuse()) } else { Ok(same) };
        }
        // Both round the exact value, and halves to the even digit.
        "common" if precision >= 0 => {
            let digits = usize::try_from(precision).unwrap_or(0);
            format!("{number:.digits$}").parse().unwrap_or(number)
        }
        "common" => (number * scale).round_ties_even() / scale,
        // Python's are integers: there is no negative zero.
        "ceil" => ((number * scale).ceil() + 0.0) / scale,
        "floor" => ((number * scale).floor() + 0.0) / scale,
        _ => return Err(refuse()),
    };
    Ok(rounded.into())
}

fn filesizeformat(value: &Jinja, given: Rest<Jinja>, kwargs: Kwargs) -> Result<String, Error> {
    let binary = Arguments::of(given.0, kwargs, &["binary"])?.flag(0);
    let (base, unit) = if binary { (1024.0, "iB") } else { (1000.0, "B") };
    let number = value.as_str().map_or_else(|| python::number_of(value), words::number);
    let number = number.filter(|number| number.is_finite());
    let number = number.ok_or_else(|| refuse("filesizeformat takes a number"))?;
    if number == 1.0 {
        return Ok("1 Byte".to_owned());
    }
    if number < base {
        return Ok(format!("{:.0} Bytes", number.trunc() + 0.0));
    }
    let mut size = number / base;
    for prefix in ["k", "M", "G", "T", "P", "E", "Z"] {
        if size < base {
            let prefix = if binary { prefix.to_uppercase() } else { prefix.to_owned() };
            return Ok(format!("{size:.1} {prefix}{unit}"));
        }
        size /= base;
    }
    Ok(format!("{size:.1} Y{unit}"))
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
