//! What a regular expression costs: to parse it and make a tree of it, and to match a text with it.

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
}

/// Goes through an expression.
pub(super) fn expression(text: &str, flags: &str) -> Expression {
    let factor = if flags.contains('i') || folds(text) { FOLDED } else { 1 };
    let mut reader = Reader { units: 0, depth: 0, optional: 0, open: vec![(0, 0)] };
    let (mut alternatives, mut before) = (1, '|');
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        alternatives += u64::from(before == '|' && matches!(c, '[' | '(' | '.' | '\\'));
        // What may be left out; what follows a bracket that opens says what the bracket is.
        reader.optional += u64::from(match c {
            '?' => before != '(',
            '*' => true,
            '{' => chars.peek().is_some_and(|next| matches!(next, '0' | ',')),
            '|' | ')' => matches!(before, '|' | '('),
            _ => false,
        });
        before = c;
        match c {
            '\\' => match chars.next() {
                Some('w' | 'W' | 'd' | 'D' | 's' | 'S' | 'p' | 'P') => reader.atom(NAMED),
                _ => reader.atom(1),
            },
            '[' => {
                let units = class(&mut chars);
                reader.atom(units);
            }
            '{' => {
                let range: String = chars.by_ref().take_while(|c| *c != '}').collect();
                reader.repeat(&range);
            }
            '(' => reader.open(),
            ')' => reader.close(),
            '.' | '|' | '*' | '+' | '?' | '^' | '$' => reader.atom(SPECIAL),
            _ => reader.atom(1),
        }
    }
    let positions = reader.open.iter().fold(0u64, |sum, (positions, _)| sum.saturating_add(*positions));
    // What follows parts that may be left out is a part of the rest after each of them.
    let rests = reader.optional.saturating_mul(reader.optional) / 2;
    Expression { units: reader.units.saturating_mul(factor).saturating_add(rests), positions, alternatives }
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

/// Goes to the end of a class in brackets, and returns its units.
fn class(chars: &mut std::iter::Peekable<std::str::Chars<'_>>) -> u64 {
    let (mut depth, mut units) = (1, CLASS);
    chars.next_if_eq(&'^');
    chars.next_if_eq(&']');
    while let Some(c) = chars.next() {
        units += 1;
        match c {
            '\\' => {
                let is_named = chars.next().is_some_and(|c| "wWdDsSpP".contains(c));
                units += if is_named { NAMED } else { 0 };
            }
            '[' => {
                depth += 1;
                units += CLASS;
                chars.next_if_eq(&'^');
                chars.next_if_eq(&']');
            }
            ']' if depth == 1 => break,
            ']' => depth -= 1,
            _ => {}
        }
    }
    units
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
        assert_eq!((alternatives("a|b|c"), alternatives("a|[bc]|.d|(e)")), (1, 4));
    }
}
