//! Python's rules for words, lines and letter case, where they differ from Rust's.

use minijinja::Error;
use minijinja::value::Value as Jinja;

use super::python;

/// Splits at white space into at most `pieces`, from either end; pieces from the right come last first.
pub(super) fn split(text: &str, pieces: usize, right: bool) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = if right { text.trim_end() } else { text.trim_start() };
    while !rest.is_empty() {
        let cut = match parts.len() + 1 >= pieces {
            true => None,
            false if right => rest.rfind(char::is_whitespace),
            false => rest.find(char::is_whitespace),
        };
        let Some(cut) = cut else {
            // The last piece keeps the space at its far end, but is not only space.
            parts.push(if pieces == usize::MAX { rest.trim() } else { rest });
            break;
        };
        if right {
            let width = rest[cut..].chars().next().map_or(1, char::len_utf8);
            parts.push(&rest[cut + width..]);
            rest = rest[..cut].trim_end();
        } else {
            parts.push(&rest[..cut]);
            rest = rest[cut..].trim_start();
        }
    }
    parts
}

/// Splits into lines at all that Python takes for the end of one.
pub(super) fn lines(text: &str, keep_ends: bool) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let Some((at, end)) = rest.char_indices().find(|(_, c)| ends_line(*c)) else {
            return Some(std::mem::take(&mut rest)).filter(|last| !last.is_empty());
        };
        let width = if rest[at..].starts_with("\r\n") { 2 } else { end.len_utf8() };
        let line = &rest[..if keep_ends { at + width } else { at }];
        rest = &rest[at + width..];
        Some(line)
    })
}

fn ends_line(c: char) -> bool {
    matches!(c, '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}')
}

/// Replaces tabs by spaces up to the next multiple of a width.
pub(super) fn expand_tabs(text: &str, width: i64) -> String {
    let width = usize::try_from(width.clamp(0, 100)).unwrap_or(0);
    let mut out = String::with_capacity(text.len());
    let mut column = 0;
    for c in text.chars() {
        match c {
            '\t' if width > 0 => {
                let spaces = width - column % width;
                out.extend(std::iter::repeat_n(' ', spaces));
                column += spaces;
            }
            '\t' => {}
            '\n' | '\r' => {
                out.push(c);
                column = 0;
            }
            c => {
                out.push(c);
                column += 1;
            }
        }
    }
    out
}

/// Returns a text with padding on both sides; of an odd number the larger half is after it, unless text and
/// width are odd and even, as in Python.
pub(super) fn center(text: &str, width: usize, fill: char) -> String {
    let pad = width.saturating_sub(text.chars().count());
    let before = pad / 2 + (pad & width & 1);
    let side = |count| std::iter::repeat_n(fill, count);
    side(before).chain(text.chars()).chain(side(pad - before)).collect()
}

fn is_cased(c: char) -> bool {
    c.is_lowercase() || c.is_uppercase()
}

/// Returns the text with a capital at the start of each word: after anything that has no case.
pub(super) fn title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut inside = false;
    for c in text.chars() {
        if inside {
            out.extend(c.to_lowercase());
        } else {
            out.push_str(&capital(c));
        }
        inside = is_cased(c);
    }
    out
}

/// Returns the text with its first character as a capital, and the others small.
pub(super) fn capitalize(text: &str) -> String {
    let mut characters = text.chars();
    let first = characters.next().map(capital).unwrap_or_default();
    first + &characters.as_str().to_lowercase()
}

/// Returns a character as the first of a word: "ß" becomes "Ss".
fn capital(c: char) -> String {
    let mut upper = c.to_uppercase();
    let first = upper.next().unwrap_or(c);
    std::iter::once(first).chain(upper.flat_map(char::to_lowercase)).collect()
}

/// Returns the text with small letters for capitals and the reverse.
pub(super) fn swap_case(text: &str) -> String {
    let swap =
        |c: char| if c.is_uppercase() { c.to_lowercase().collect() } else { c.to_uppercase().collect() };
    text.chars().map(|c| -> String { swap(c) }).collect()
}

/// Returns the text for comparisons that ignore case.
pub(super) fn fold_case(text: &str) -> String {
    text.replace(['ß', 'ẞ'], "ss").to_lowercase().replace('ς', "σ")
}

/// Replaces a text within another; of an empty one, all places between characters.
///
/// # Errors
/// The result would be too long.
pub(super) fn replace(text: &str, old: &str, new: &str, count: Option<i64>) -> Result<Jinja, Error> {
    let count = count.and_then(|count| usize::try_from(count).ok());
    // An empty text is found between all characters: the result is bounded before it is made.
    let found = text.matches(old).take(count.unwrap_or(usize::MAX)).count();
    python::check_length(found.saturating_mul(new.len()))?;
    Ok(count.map_or_else(|| text.replace(old, new), |count| text.replacen(old, new, count)).into())
}

/// Returns whether each word begins with a capital, and only there is one.
pub(super) fn is_title(text: &str) -> bool {
    let mut inside = false;
    let mut found = false;
    for c in text.chars() {
        if (c.is_uppercase() && inside) || (c.is_lowercase() && !inside) {
            return false;
        }
        inside = is_cased(c);
        found |= inside;
    }
    found
}

/// Returns whether all letters of a text are of one case, and there are some.
pub(super) fn is_case(text: &str, is_case: fn(char) -> bool) -> bool {
    let mut cased = text.chars().filter(|c| is_cased(*c)).peekable();
    cased.peek().is_some() && cased.all(is_case)
}

/// Returns the text without these characters, or white space, at its ends.
pub(super) fn trim<'a>(text: &'a str, characters: Option<&str>) -> &'a str {
    match characters {
        Some(characters) => text.trim_matches(|c| characters.contains(c)),
        None => text.trim_matches(|c: char| c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)),
    }
}

/// Returns whether a character is a digit of a decimal system.
pub(super) fn is_decimal(c: char) -> bool {
    // Decimal digits stand in runs of ten, which Rust has no names for; these are the common ones.
    c.is_ascii_digit() || matches!(c, '٠'..='٩' | '۰'..='۹' | '०'..='९' | '০'..='৯' | '๐'..='๙' | '０'..='９')
}

/// Returns whether a character is a digit, raised and lowered ones included.
pub(super) fn is_digit(c: char) -> bool {
    is_decimal(c) || matches!(c, '²' | '³' | '¹' | '⁰' | '⁴'..='⁹' | '₀'..='₉' | '①'..='⑨')
}

/// Returns whether a text could be a variable's name.
pub(super) fn is_identifier(text: &str) -> bool {
    let mut characters = text.chars();
    characters.next().is_some_and(|first| first.is_alphabetic() || first == '_')
        && characters.all(|c| c.is_alphanumeric() || c == '_')
}

/// Returns the integer that a text stands for, as Python's `int` reads it.
pub(super) fn integer(text: &str, base: i64) -> Option<i128> {
    let text = text.trim().replace('_', "");
    let (sign, digits) = match text.strip_prefix(['+', '-']) {
        Some(digits) => (&text[..1], digits),
        None => ("", text.as_str()),
    };
    let prefix = |mark: &str| digits.to_lowercase().starts_with(mark);
    let radix = match base {
        0 | 16 if prefix("0x") => 16,
        0 | 8 if prefix("0o") => 8,
        0 | 2 if prefix("0b") => 2,
        0 => 10,
        base => u32::try_from(base).ok().filter(|base| (2..=36).contains(base))?,
    };
    let marked = ["0x", "0o", "0b"].iter().zip([16, 8, 2]).any(|(mark, of)| of == radix && prefix(mark));
    let digits = if marked { &digits[2..] } else { digits };
    i128::from_str_radix(&format!("{sign}{digits}"), radix).ok()
}

/// Returns the number that a text stands for, as Python's `float` reads it.
pub(super) fn number(text: &str) -> Option<f64> {
    text.trim().replace('_', "").parse().ok()
}

/// Breaks a line before words that do not fit, and those that never would where the line ends if `breaks`.
/// Each piece goes to `add`; the time is that of reading the line a few times.
pub(super) fn wrap(
    line: &str,
    width: usize,
    breaks: bool,
    add: &mut impl FnMut(&str) -> Result<(), Error>,
) -> Result<(), Error> {
    // The piece is `start..at`, with `used` characters.
    let (mut start, mut at, mut used) = (0, 0, 0_usize);
    for word in line.split_inclusive(' ') {
        let end = at + word.len();
        let mut rest = word.trim_end();
        while breaks && rest.chars().nth(width).is_some() {
            let room = width.saturating_sub(used).max(usize::from(used == 0));
            let cut = rest.char_indices().nth(room).map_or(rest.len(), |(cut, _)| cut);
            at += cut;
            rest = &rest[cut..];
            add(line[start..at].trim_end())?;
            (start, used) = (at, 0);
        }
        if start < at && used + rest.chars().count() > width {
            add(line[start..at].trim_end())?;
            (start, used) = (at, 0);
        }
        used += line[at..end].chars().count();
        at = end;
    }
    add(line[start..].trim_end())
}
