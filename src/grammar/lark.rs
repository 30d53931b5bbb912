//! Lark grammars, gone through as llguidance's lexer goes (lark/lexer.rs): the schemas that they embed are
//! checked and rewritten like any other, and what its parser and compiler would go down along or copy is
//! counted.

use serde_json::Value;

use super::brackets::deepest;
use super::budget::Budget;
use super::cost::LEVELS_PER_DEPTH;
use super::expression::{expression, folded};
use super::schema::prepare;
use super::terminals::Terminals;
use super::{GrammarLimits, Refusal};

/// Keywords that a JSON value follows.
const SCHEMA: &str = "%json";
const OPTIONS: &str = "%llguidance";
const PARTS: &str = "%regex";

/// The keyword of a grammar in a grammar.
const NESTED: &str = "%lark";

/// What may follow an expression.
const FLAGS: [char; 6] = ['i', 'm', 's', 'l', 'u', 'x'];

/// Options that change nothing of what a text is.
const OPTIONS_KNOWN: [&str; 3] = ["no_forcing", "allow_initial_skip", "ignore_once"];

/// Units of a piece, of an alternative, of a range of characters, of a grammar of each kind in a grammar, and
/// of a byte of a text of which any part may be drawn.
const PIECE: u64 = 2;
const ALTERNATIVE: u64 = 5;
const DOT: u64 = 100;
const NESTED_SCHEMA: u64 = 500;
const NESTED_GRAMMAR: u64 = 4096;
const PART: u64 = 20;

/// Bytes of a text, tokens in a range, and bytes that an error tells in each definition, for a unit.
const BYTES_PER_UNIT: usize = 8;
const TOKENS_PER_UNIT: u64 = 64;
const TOLD_PER_UNIT: usize = 256;

/// Reads a grammar, and returns it as llguidance takes it.
///
/// # Errors
/// It is malformed, an embedded schema is refused, or it exceeds a limit.
pub(super) fn read(text: &str, limits: &GrammarLimits, budget: &mut Budget) -> Result<String, Refusal> {
    let out = String::with_capacity(text.len());
    let terminals = Terminals::default();
    let mut reader = Reader { limits, budget, out, terminals, head: "", has_attributes: false, ended: "\n" };
    let (mut rest, mut brackets, mut depth_within, mut levels) = (text, String::new(), 0, 0);
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(piece_end(rest)?);
        rest = reader.piece(piece, after)?;
        match piece.chars().next() {
            Some('/') if !piece.starts_with("//") => depth_within = deepest(piece.chars()).max(depth_within),
            Some(c @ (':' | '(' | '[' | '{' | ')' | ']' | '}')) => {
                brackets.push(c);
                levels += usize::from(!matches!(c, ')' | ']' | '}'));
            }
            _ => {}
        }
    }
    let depth = depth_within + deepest(brackets.chars());
    // Rules name rules, and what stands in brackets does.
    if depth > limits.depth_max || levels > LEVELS_PER_DEPTH * limits.depth_max {
        return Err(Refusal::TooLarge { limit: "grammar_depth_max", value: limits.depth_max as u64 });
    }
    // An error is told in each definition that leads to it, with the line.
    let line = text.lines().map(str::len).max().unwrap_or(0);
    let told = reader.terminals.definitions().saturating_mul(line) / TOLD_PER_UNIT;
    let units = reader.terminals.units();
    reader.budget.spend(units.saturating_add(told as u64))?;
    Ok(reader.out)
}

struct Reader<'a, 'b> {
    limits: &'b GrammarLimits,
    budget: &'b mut Budget,
    out: String,
    terminals: Terminals<'a>,
    /// The name that began the line, whether attributes follow it, and the piece before this one that is not
    /// a space.
    head: &'a str,
    has_attributes: bool,
    ended: &'a str,
}

impl<'a> Reader<'a, '_> {
    /// Takes a piece, and returns the rest after it and what belongs to it.
    fn piece(&mut self, piece: &'a str, rest: &'a str) -> Result<&'a str, Refusal> {
        self.out.push_str(piece);
        let first = piece.chars().next().unwrap_or_default();
        let mut after = rest;
        let mut own = PIECE;
        match first {
            '#' | ' ' | '\t' | '\r' => return Ok(rest),
            '/' if piece.starts_with("//") => return Ok(rest),
            '"' | '/' => self.literal(piece)?,
            '<' => own += tokens(piece),
            '%' => (own, after) = self.keyword(piece, rest)?,
            '@' => return Err(Refusal::unsupported("", "@", "there is no other grammar to name")),
            '|' => own += ALTERNATIVE,
            ':' => self.terminals.begin(self.head, std::mem::take(&mut self.has_attributes)),
            _ if name_end(piece).is_some() => {
                if matches!(self.ended, "\n" | "{") {
                    self.head = piece;
                } else {
                    self.terminals.name(piece);
                }
            }
            '.' => {
                own += DOT;
                self.terminals.loose();
            }
            '?' | '*' | '{' => self.terminals.optional(),
            '&' => match excluded(rest) {
                Some(name) => self.terminals.exclusion(name),
                None => self.terminals.conjunction(),
            },
            // What a number follows repeats.
            '~' if rest.trim_start().starts_with(|c: char| c.is_ascii_digit() || c == '+') => {
                self.terminals.loose();
            }
            '+' => self.terminals.loose(),
            '~' => self.terminals.complement(),
            '(' => self.terminals.open(),
            '[' => {
                self.has_attributes |= std::ptr::eq(self.ended, self.head);
                self.terminals.optional();
                self.terminals.open();
            }
            ')' | ']' => self.terminals.close(),
            _ => {}
        }
        self.ended = piece;
        self.terminals.own(own);
        Ok(after)
    }

    /// Takes a text or an expression.
    fn literal(&mut self, piece: &str) -> Result<(), Refusal> {
        self.budget.lexeme(piece)?;
        let expression = match piece.strip_prefix('/').and_then(|inner| inner.rsplit_once('/')) {
            Some((inner, flags)) => expression(inner, flags),
            None if piece.ends_with('i') => folded(piece),
            None => {
                self.terminals.elements(1 + (piece.len() / BYTES_PER_UNIT) as u64);
                return Ok(());
            }
        };
        if !is_plain(piece) {
            self.terminals.loose();
        }
        self.budget.first(expression)?;
        self.terminals.alternatives(expression.alternatives);
        self.terminals.elements(self.budget.tree(expression)?);
        Ok(())
    }

    /// Takes a keyword, and returns its units and the rest after its value.
    fn keyword(&mut self, piece: &'a str, rest: &'a str) -> Result<(u64, &'a str), Refusal> {
        match piece {
            SCHEMA => {
                let (value, after) = value(rest, piece)?;
                let value = prepare(value, SCHEMA, self.limits, self.budget)?;
                self.write(&value);
                Ok((NESTED_SCHEMA, after))
            }
            PARTS => {
                let (value, after) = value(rest, piece)?;
                self.write(&value);
                let units = PART.saturating_mul((rest.len() - after.len()) as u64);
                self.budget.lexeme(&rest[..rest.len() - after.len()])?;
                self.terminals.elements(units);
                self.terminals.loose();
                Ok((units, after))
            }
            OPTIONS => {
                let (value, after) = value(rest, piece)?;
                let mut names = value.as_object().into_iter().flatten().map(|(name, _)| name.as_str());
                if let Some(name) = names.find(|name| !OPTIONS_KNOWN.contains(name)) {
                    return Err(Refusal::unsupported(OPTIONS, name, ""));
                }
                self.write(&value);
                Ok((PIECE, after))
            }
            NESTED => Ok((NESTED_GRAMMAR, rest)),
            _ => {
                // What a statement has is as that of a terminal; a condition belongs to its rule.
                if !rest.starts_with("if") {
                    self.terminals.begin(piece, true);
                }
                Ok((PIECE, rest))
            }
        }
    }

    fn write(&mut self, value: &Value) {
        self.out.push(' ');
        self.out.push_str(&value.to_string());
    }
}

/// Returns the units of tokens that are named by their numbers.
fn tokens(piece: &str) -> u64 {
    let ranges = piece.trim_matches(|c: char| !c.is_ascii_digit()).split(',');
    let units = ranges.map(|range| {
        let (start, end) = range.split_once('-').unwrap_or((range, range));
        let number = |text: &str| text.trim().parse::<u32>().map_or(0, u64::from);
        1 + number(end).saturating_sub(number(start)) / TOKENS_PER_UNIT
    });
    units.fold(0, u64::saturating_add)
}

/// Returns where the name ends that a text begins with: that of a terminal is of capitals, that of a rule of
/// small letters.
fn name_end(rest: &str) -> Option<usize> {
    let bytes = rest.as_bytes();
    let begins_at = |at: usize, is: fn(&u8) -> bool| bytes.get(at).is_some_and(is);
    let terminal = usize::from(rest.starts_with('_'));
    let rule = usize::from(rest.starts_with('!'));
    let rule = rule + usize::from(matches!(bytes.get(rule), Some(b'_' | b'?')));
    let (at, is_letter): (usize, fn(&u8) -> bool) = if begins_at(terminal, u8::is_ascii_uppercase) {
        (terminal, u8::is_ascii_uppercase)
    } else if begins_at(rule, u8::is_ascii_lowercase) {
        (rule, u8::is_ascii_lowercase)
    } else {
        return None;
    };
    let is_of_name = |byte: &u8| is_letter(byte) || byte.is_ascii_digit() || matches!(byte, b'_' | b'-');
    Some(at + bytes[at..].iter().take_while(|byte| is_of_name(byte)).count())
}

/// Returns where the number ends that a text begins with.
fn number_end(rest: &str) -> usize {
    let run = |at: usize, is: fn(&u8) -> bool| {
        at + rest.as_bytes()[at..].iter().take_while(|byte| is(byte)).count()
    };
    if rest.starts_with("0x") || rest.starts_with("0X") {
        return run(2, u8::is_ascii_hexdigit);
    }
    let mut end = run(0, u8::is_ascii_digit);
    if rest[end..].starts_with('.') {
        end = run(end + 1, u8::is_ascii_digit);
    }
    if rest[end..].starts_with(['e', 'E']) {
        let sign = usize::from(rest[end + 1..].starts_with(['+', '-']));
        let power = run(end + 1 + sign, u8::is_ascii_digit);
        end = if power > end + 1 + sign { power } else { end };
    }
    end
}

/// Returns whether an expression or a text stands for itself.
fn is_plain(piece: &str) -> bool {
    let inner = piece.strip_prefix('/').and_then(|inner| inner.strip_suffix('/'));
    inner.map_or(piece.ends_with('"'), |inner| inner.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'_'))
}

/// Returns the terminal that alone is excluded by what follows a `&`; it is empty for a plain text.
fn excluded(rest: &str) -> Option<&str> {
    let blank = [' ', '\t'];
    let part = rest.trim_start_matches(blank).strip_prefix('~')?.trim_start_matches(blank);
    let name = name_end(part).is_some();
    if !name && !part.starts_with(['"', '/']) {
        return None;
    }
    let (part, after) = part.split_at(piece_end(part).ok()?);
    let after = after.trim_start_matches(blank);
    let is_alone = after.is_empty() || after.starts_with(['&', '|', ')', ']', '\n', '\r', '#']);
    (is_alone && (name || is_plain(part))).then_some(if name { part } else { "" })
}

/// Returns where the first piece of a text ends: a text in quotes, an expression, a comment, the name of a
/// token, a keyword, a name, a number, a run of spaces, or a character.
fn piece_end(rest: &str) -> Result<usize, Refusal> {
    let first = rest.chars().next().map_or(0, char::len_utf8);
    let run =
        |from: usize, of: &[char]| rest[from..].find(|c| !of.contains(&c)).map_or(rest.len(), |at| from + at);
    match &rest[..first] {
        "\"" => {
            let end = ends_at(rest, '"', |c| c.is_ascii_control())?;
            Ok(end + usize::from(rest[end..].starts_with('i')))
        }
        "/" if !rest.starts_with("//") => Ok(run(ends_at(rest, '/', |_| false)?, &FLAGS)),
        "#" | "/" => Ok(rest.find('\n').unwrap_or(rest.len())),
        "<" => {
            let name = rest[1..].find(|c: char| c == '<' || c == '>' || c.is_whitespace());
            let closed = name.filter(|end| *end > 0 && rest[1 + end..].starts_with('>'));
            Ok(closed.map_or(first, |end| end + 2))
        }
        "%" => {
            let all = [SCHEMA, OPTIONS, PARTS, NESTED];
            Ok(all.iter().find(|keyword| rest.starts_with(**keyword)).map_or(first, |keyword| keyword.len()))
        }
        " " | "\t" => Ok(run(0, &[' ', '\t'])),
        _ if rest.starts_with(|c: char| c.is_ascii_digit()) => Ok(number_end(rest)),
        _ => Ok(name_end(rest).unwrap_or(first)),
    }
}

/// Returns where a text ends that begins with a mark and ends with the next one that is not escaped.
fn ends_at(rest: &str, mark: char, is_barred: impl Fn(char) -> bool) -> Result<usize, Refusal> {
    let mut chars = rest.char_indices().skip(1);
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' if chars.next().is_none_or(|(_, escaped)| escaped == '\n') => break,
            '\\' => {}
            c if c == mark => return Ok(at + 1),
            c if is_barred(c) => break,
            _ => {}
        }
    }
    let shown: String = rest.chars().take(20).collect();
    Err(Refusal::Invalid(format!("what begins with {shown:?} does not end")))
}

/// Returns the JSON value that a text begins with, and the rest.
fn value<'a>(rest: &'a str, keyword: &str) -> Result<(Value, &'a str), Refusal> {
    let mut values = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
    match values.next() {
        Some(Ok(value)) => Ok((value, &rest[values.byte_offset()..])),
        Some(Err(error)) => Err(Refusal::Invalid(format!("{keyword}: {error}"))),
        None => Err(Refusal::Invalid(format!("{keyword}: a JSON value has to follow"))),
    }
}
