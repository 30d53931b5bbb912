//! What a regular expression costs: to parse it and make a tree of it, and to match a text with it.

use std::str::Chars;

/// What follows a backslash that stands for a class with a name.
const NAMES: &str = "wWdDsSpP";

/// Units of a class with a name: it may have hundreds of ranges.
const NAMED: u64 = 100;

/// Units of a class in brackets, and of a character that is not itself.
const CLASS: u64 = 16;
const SPECIAL: u64 = 5;

/// How many times as much where letters of either case match: each letter is a class.
const FOLDED: u64 = 6;

/// What an expression costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Expression {
    /// Units to make a tree of it. What stands in brackets is gone through again for each of them.
    pub(super) units: u64,
    /// Characters of the longest text that it matches without going round: what is gone through for each
    /// character of a text at most.
    pub(super) positions: u64,
    /// Alternatives that do not begin with a character: each is tried for each byte, where the others are
    /// found by theirs.
    pub(super) alternatives: u64,
    /// Whether a flag makes white space and comments of what would count.
    pub(super) is_spaced: bool,
}

/// Returns what a text costs of which letters of either case match.
pub(super) fn folded(text: &str) -> Expression {
    let positions = text.len() as u64;
    Expression { units: positions * FOLDED, positions, alternatives: 1, is_spaced: false }
}

/// Goes through an expression.
pub(super) fn expression(text: &str, flags: &str) -> Expression {
    let factor = if flags.contains('i') || folds(text) { FOLDED } else { 1 };
    let mut reader = Reader { units: 0, depth: 0, optional: 0, open: vec![(0, 0)] };
    let (mut is_spaced, mut may_have_classes) = (flags.contains('x'), true);
    let (mut alternatives, mut before) = (0, '|');
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        let is_named = |chars: &Chars<'_>| chars.clone().next().is_some_and(|c| NAMES.contains(c));
        let has_no_first = matches!(c, '[' | '(' | '.') || c == '\\' && is_named(&chars);
        alternatives += u64::from(before == '|' && has_no_first);
        // What may be left out; what follows a bracket that opens says what the bracket is.
        reader.optional += u64::from(match c {
            '?' => before != '(',
            '*' => true,
            '{' => chars.as_str().starts_with(['0', ',']),
            '|' | ')' => matches!(before, '|' | '('),
            _ => false,
        });
        before = c;
        match c {
            '\\' => {
                reader.atom(if is_named(&chars) { NAMED } else { 1 });
                if chars.next().is_some_and(|c| "xuUpP".contains(c)) && chars.as_str().starts_with('{') {
                    chars.by_ref().find(|c| *c == '}');
                }
            }
            '[' if may_have_classes => match class(chars.clone()) {
                Some((units, after)) => {
                    chars = after;
                    reader.atom(units);
                }
                // It is malformed, and so is the whole.
                None => may_have_classes = false,
            },
            '{' => {
                let (range, after) = run(chars.as_str(), |c| c.is_ascii_digit() || ", ".contains(c));
                match after.strip_prefix('}') {
                    Some(after) => {
                        chars = after.chars();
                        reader.repeat(range);
                    }
                    None => reader.atom(1),
                }
            }
            '(' => {
                is_spaced |= sets_spaced(chars.as_str());
                reader.open();
            }
            ')' => reader.close(),
            '.' | '|' | '*' | '+' | '?' | '^' | '$' => reader.atom(SPECIAL),
            _ => reader.atom(1),
        }
    }
    let positions = reader.open.iter().fold(0u64, |sum, (positions, _)| sum.saturating_add(*positions));
    // What follows parts that may be left out is a part of the rest after each of them.
    let rests = reader.optional.saturating_mul(reader.optional) / 2;
    Expression {
        units: reader.units.saturating_mul(factor).saturating_add(rests),
        positions,
        alternatives: alternatives.max(1),
        is_spaced,
    }
}

struct Reader {
    units: u64,
    depth: u64,
    optional: u64,
    /// For each open bracket, the positions in it, and those of its last part.
    open: Vec<(u64, u64)>,
}

impl Reader {
    fn atom(&mut self, units: u64) {
        self.units = self.units.saturating_add(units.saturating_mul(1 + self.depth));
        self.part(1);
    }

    fn part(&mut self, positions: u64) {
        if let Some((sum, last)) = self.open.last_mut() {
            *sum = sum.saturating_add(positions);
            *last = positions;
        }
    }

    fn open(&mut self) {
        self.units = self.units.saturating_add(SPECIAL * (1 + self.depth));
        self.depth += 1;
        self.open.push((0, 0));
    }

    fn close(&mut self) {
        self.depth = self.depth.saturating_sub(1);
        if self.open.len() > 1
            && let Some((positions, _)) = self.open.pop()
        {
            self.part(positions);
        }
    }

    /// Repeats the last part as often as a range says at most.
    fn repeat(&mut self, range: &str) {
        self.units = self.units.saturating_add(SPECIAL * (1 + self.depth));
        let times = range.split(',').filter_map(|times| times.trim().parse::<u64>().ok()).max();
        if let Some((sum, last)) = self.open.last_mut() {
            *sum = sum.saturating_add(last.saturating_mul(times.unwrap_or(1).max(1) - 1));
            *last = last.saturating_mul(times.unwrap_or(1).max(1));
        }
    }
}

/// Returns the units of a class in brackets, and what follows it; None if it does not end.
fn class(mut chars: Chars<'_>) -> Option<(u64, Chars<'_>)> {
    let (mut depth, mut units) = (1, CLASS);
    skip_first(&mut chars);
    while let Some(c) = chars.next() {
        units += 1;
        match c {
            '\\' => {
                let is_named = chars.next().is_some_and(|c| NAMES.contains(c));
                units += if is_named { NAMED } else { 0 };
            }
            '[' => {
                depth += 1;
                units += CLASS;
                skip_first(&mut chars);
            }
            ']' if depth == 1 => return Some((units, chars)),
            ']' => depth -= 1,
            _ => {}
        }
    }
    None
}

/// Goes behind what does not end a class where it stands first.
fn skip_first(chars: &mut Chars<'_>) {
    for first in ['^', ']'] {
        if chars.as_str().starts_with(first) {
            chars.next();
        }
    }
}

/// Returns whether what follows a bracket sets the flag by which white space and comments do not count.
fn sets_spaced(after: &str) -> bool {
    let Some(after) = after.strip_prefix('?') else { return false };
    let (flags, after) = run(after, |c| c.is_ascii_alphabetic() || c == '-');
    after.starts_with([':', ')']) && flags.split('-').next().is_some_and(|set| set.contains('x'))
}

/// Returns what a text begins with, and the rest.
fn run(text: &str, is_of: impl Fn(char) -> bool) -> (&str, &str) {
    text.split_at(text.find(|c| !is_of(c)).unwrap_or(text.len()))
}

/// Returns whether a flag makes letters of either case match.
fn folds(text: &str) -> bool {
    text.split("(?").skip(1).any(|after| {
        let mut flags = after.bytes().take_while(u8::is_ascii_alphabetic);
        !after.starts_with(['P', '<']) && flags.any(|flag| flag == b'i')
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn positions(text: &str) -> u64 {
        expression(text, "").positions
    }

    #[test]
    fn positions_are_those_of_the_longest_text() {
        assert_eq!(positions("abc"), 3);
        assert_eq!(positions("a{3}"), 3);
        assert_eq!(positions("(ab{2,4}){5}"), 25);
        assert_eq!(positions(r"[\])]{7}\("), 8);
        assert_eq!(positions("a{1000}{1000}"), 1_000_000);
        assert_eq!(positions(&"(a{1000}){1000}".repeat(4)), 4_000_000);
    }

    #[test]
    fn what_makes_many_nodes_costs_more() {
        let units = |text: &str| expression(text, "").units;
        assert!(units("abc") < units("[abc]") && units("[abc]") < units(r"\w"));
        assert!(units("aaaa") < units("((a)a)aa") && units("abc") < units("(?i)abc"));
        assert_eq!(units("(?P<i>abc)"), units("(?P<j>abc)"));
        // Brackets in classes are none.
        assert_eq!(units("[)][)]("), units("[a][a]("));
        assert!(expression("abc", "i").units > expression("abc", "").units);
        // Parts that may be left out, each of which has all after it.
        assert!(units(&"(ab)?".repeat(2000)) > 2_000_000);
        assert!(units(&"(?:ab)".repeat(2000)) < 100_000);
    }

    #[test]
    fn alternatives_are_those_without_a_first_character() {
        let alternatives = |text| expression(text, "").alternatives;
        assert_eq!((alternatives("a|b|c"), alternatives("a|[bc]|.d|(e)")), (1, 3));
        assert_eq!((alternatives(r"\-a|\#b|\(c"), alternatives(r"a|\w|\D|\pL")), (1, 3));
    }
    #[test]
    fn what_follows_no_range_and_no_class_is_counted() {
        let units = |text: &str| expression(text, "").units;
        assert!(units(&format!("#{{\n{}", r"\w".repeat(100))) > 9000);
        assert!(units(&format!("{{,{}}}", r"\w".repeat(100))) > 9000);
        assert!(units(&format!("[a{}", r"(\w)".repeat(100))) > 9000);
        assert_eq!(positions(r"\x{41}\p{Greek}b"), 3);
        // Neither is gone through for each of many.
        for many in ["{", "[", "(?", r"\x{"] {
            expression(&many.repeat(200_000), "");
        }
    }

    #[test]
    fn the_flag_for_space_is_seen() {
        let is_spaced = |text| expression(text, "").is_spaced;
        assert!(is_spaced("(?x)a") && is_spaced("a(?is-m:b)|(?sx:c)") && expression("a", "ix").is_spaced);
        assert!(
            ["(?P<x>a)", "(?-x)a", r"\(?x)", "[(?x)]", "(?i)x", "(x)"].iter().all(|text| !is_spaced(text))
        );
    }
}
