//! Comparisons in a tag: what they walk through is paid for (`work`). The left operand of `==`, `<` and the
//! like goes through a call, and `in` becomes one. What a value is indexed by, the keys of a mapping and the
//! arguments of `loop.changed` are hashed or compared, so they go through a call too. Literals stay.

use std::ops::Range;

use super::tokens::{Kind, Token, parted, tokens};
use super::work::{PAID, WITHIN};

/// Returns a tag whose comparisons are paid for.
pub(super) fn rewrite(tag: &str) -> String {
    let (open, inner, close) = parted(tag);
    let tokens = tokens(inner);
    let mut reader =
        Reader { inner, tokens: &tokens, levels: vec![Level::of(Bracket::None, 0)], edits: vec![] };
    reader.read(open.starts_with("{%"));
    [open, &edited(inner, reader.edits), close].concat()
}

/// What a bracket opens.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Bracket {
    /// The tag itself.
    None,
    /// A group, a call or a list.
    Group,
    /// An index, or a list that looks like one.
    Index,
    /// A mapping.
    Map,
    /// The arguments of `loop.changed`.
    Changed,
}

/// An operator that compares.
enum Operator {
    Compare,
    In(Range<usize>),
    NotIn(Range<usize>),
}

/// What is known of a bracket that is open. Operands are ranges of tokens.
struct Level {
    bracket: Bracket,
    /// The first token in it.
    from: usize,
    has_colon: bool,
    has_comma: bool,
    /// The operand that is being read.
    operand: Option<Range<usize>>,
    /// The operands before it, and the operators between them: a chain of comparisons.
    before: Vec<Range<usize>>,
    operators: Vec<Operator>,
}

impl Level {
    fn of(bracket: Bracket, from: usize) -> Self {
        let (before, operators) = (Vec::new(), Vec::new());
        Self { bracket, from, has_colon: false, has_comma: false, operand: None, before, operators }
    }

    fn extend(&mut self, token: usize) {
        self.operand = Some(self.operand.as_ref().map_or(token, |operand| operand.start)..token + 1);
    }
}

/// A change of a tag's text; at one place what closes comes before what opens.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Edit {
    /// Inserted text; of several the one that was found first.
    Close(usize, usize, &'static str),
    Replace(usize, usize),
    /// Inserted text; of several the one that was found last, which is outside.
    Open(usize, std::cmp::Reverse<usize>, &'static str),
}

impl Edit {
    fn place(&self) -> usize {
        let (Self::Close(at, ..) | Self::Replace(at, _) | Self::Open(at, ..)) = self;
        *at
    }
}

/// Reads the tokens of a tag from left to right.
struct Reader<'a> {
    inner: &'a str,
    tokens: &'a [Token],
    levels: Vec<Level>,
    edits: Vec<Edit>,
}

impl<'a> Reader<'a> {
    fn read(&mut self, is_statement: bool) {
        let name = self.text(0);
        let mut at = usize::from(is_statement && !self.tokens.is_empty());
        // The first `in` of a loop stands before its items.
        let mut is_loop = is_statement && name == "for";
        while let Some(token) = self.tokens.get(at) {
            let mut length = 1;
            match token.kind {
                Kind::Open => self.open(at),
                Kind::Close => self.close(at),
                Kind::Border if is_loop && self.levels.len() == 1 && self.text(at) == "in" => {
                    is_loop = false;
                    self.end();
                }
                Kind::Border => length = self.border(at),
                Kind::Operand | Kind::Inner | Kind::Factor | Kind::Percent | Kind::Tilde | Kind::Sign => {
                    self.level().extend(at);
                }
            }
            at += length;
        }
        self.end();
    }

    fn text(&self, token: usize) -> &'a str {
        self.tokens.get(token).map_or("", |token| &self.inner[token.at.clone()])
    }

    /// Returns the innermost level; that of the tag is never closed.
    fn level(&mut self) -> &mut Level {
        let last = self.levels.len() - 1;
        &mut self.levels[last]
    }

    fn open(&mut self, at: usize) {
        let follows = self.level().operand.as_ref().is_some_and(|operand| operand.end == at)
            && matches!(self.tokens[at - 1].kind, Kind::Operand | Kind::Close);
        let bracket = match self.text(at) {
            "{" => Bracket::Map,
            "[" if follows => Bracket::Index,
            "(" if follows && at > 1 && self.text(at - 1) == "changed" && self.text(at - 2) == "." => {
                Bracket::Changed
            }
            _ => Bracket::Group,
        };
        self.level().extend(at);
        self.levels.push(Level::of(bracket, at + 1));
    }

    fn close(&mut self, at: usize) {
        self.end();
        if self.levels.len() > 1
            && let Some(level) = self.levels.pop()
        {
            let is_index = level.bracket == Bracket::Index && !level.has_colon && !level.has_comma;
            if is_index || level.bracket == Bracket::Changed {
                self.pay(&(level.from..at));
            }
        }
        self.level().extend(at);
    }

    /// Reads what separates operands; returns the number of its tokens.
    fn border(&mut self, at: usize) -> usize {
        let place = self.tokens[at].at.clone();
        let next = self.tokens.get(at + 1).map(|next| next.at.clone()).unwrap_or_default();
        let is_two = self.text(at + 1) == "=" && next.start == place.end;
        match self.text(at) {
            "in" => self.compare(Operator::In(place)),
            "not" if self.text(at + 1) == "in" && self.level().operand.is_some() => {
                self.compare(Operator::NotIn(place.start..next.end));
                return 2;
            }
            "=" | "!" | "<" | ">" if is_two => {
                self.compare(Operator::Compare);
                return 2;
            }
            "<" | ">" => self.compare(Operator::Compare),
            ":" => {
                self.end();
                if self.level().bracket == Bracket::Map && !self.level().has_colon {
                    let key = self.level().from..at;
                    self.pay(&key);
                }
                self.level().has_colon = true;
            }
            "," => {
                self.end();
                let level = self.level();
                level.has_comma = true;
                if level.bracket == Bracket::Map {
                    (level.from, level.has_colon) = (at + 1, false);
                }
            }
            _ => self.end(),
        }
        1
    }

    fn compare(&mut self, operator: Operator) {
        let level = self.level();
        match level.operand.take() {
            Some(operand) => {
                level.before.push(operand);
                level.operators.push(operator);
            }
            None => self.end(),
        }
    }

    /// Ends a chain of comparisons, and pays for its operands.
    fn end(&mut self) {
        let level = self.level();
        let (mut operands, operators) =
            (std::mem::take(&mut level.before), std::mem::take(&mut level.operators));
        let Some(last) = level.operand.take() else { return };
        operands.push(last);
        let is_literal: Vec<bool> = operands.iter().map(|operand| self.is_literal(operand)).collect();
        if let ([left, right], [Operator::In(at) | Operator::NotIn(at)]) =
            (operands.as_slice(), operators.as_slice())
        {
            if !is_literal[0] {
                let is_in = matches!(operators[0], Operator::In(_));
                self.call(left.start, if is_in { "" } else { "(not " }, WITHIN);
                self.edits.push(Edit::Replace(at.start, at.end));
                self.end_call(right.end - 1, if is_in { ")" } else { "))" });
            }
            return;
        }
        let mut is_paid = vec![false; operands.len()];
        for (at, operator) in operators.iter().enumerate() {
            match operator {
                Operator::Compare => is_paid[at] |= !is_literal[at] && !is_literal[at + 1],
                Operator::In(_) | Operator::NotIn(_) if is_literal[at] => {}
                Operator::In(_) | Operator::NotIn(_) => (is_paid[at], is_paid[at + 1]) = (true, true),
            }
        }
        for (operand, _) in operands.iter().zip(is_paid).filter(|(_, is_paid)| *is_paid) {
            self.pay(operand);
        }
    }

    /// Lets tokens go through a call.
    fn pay(&mut self, tokens: &Range<usize>) {
        if !tokens.is_empty() && !self.is_literal(tokens) {
            self.call(tokens.start, "", PAID);
            self.end_call(tokens.end - 1, ")");
        }
    }

    fn call(&mut self, first: usize, before: &'static str, function: &'static str) {
        let (at, order) = (self.tokens[first].at.start, self.edits.len());
        self.edits.push(Edit::Open(at, std::cmp::Reverse(order), "("));
        self.edits.push(Edit::Open(at, std::cmp::Reverse(order + 1), function));
        self.edits.push(Edit::Open(at, std::cmp::Reverse(order + 2), before));
    }

    fn end_call(&mut self, last: usize, close: &'static str) {
        self.edits.push(Edit::Close(self.tokens[last].at.end, self.edits.len(), close));
    }

    /// Returns whether tokens are a text, a number, `true`, `false` or `none`.
    fn is_literal(&self, tokens: &Range<usize>) -> bool {
        let number = tokens.clone().skip_while(|token| self.tokens[*token].kind == Kind::Sign);
        let mut rest = number.map(|token| self.text(token));
        let (Some(first), None) = (rest.next(), rest.next()) else { return false };
        first.starts_with(|c: char| c == '"' || c == '\'' || c.is_ascii_digit())
            || ["true", "false", "none"].contains(&first.to_ascii_lowercase().as_str())
    }
}

/// Returns a text with changes.
fn edited(inner: &str, mut edits: Vec<Edit>) -> String {
    edits.sort_by(|one, other| one.place().cmp(&other.place()).then_with(|| one.cmp(other)));
    let mut out = String::with_capacity(inner.len() + edits.len() * PAID.len());
    let mut done = 0;
    for edit in edits {
        out.push_str(&inner[done..edit.place()]);
        done = edit.place();
        match edit {
            Edit::Close(_, _, text) | Edit::Open(_, _, text) => out.push_str(text),
            Edit::Replace(_, end) => {
                out.push(',');
                done = end;
            }
        }
    }
    out + &inner[done..]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rewritten(source: &str) -> String {
        rewrite(source).replace(PAID, "p").replace(WITHIN, "w")
    }

    #[test]
    fn what_is_compared_hashed_or_printed_is_paid_for() {
        for (source, expected) in [
            ("{{ a == b }}", "{{ p(a) == b }}"),
            ("{{ a.b[0] | c(d) != e + f }}", "{{ p(a.b[0] | c(d)) != e + f }}"),
            ("{% if not a<=b and c is d(e>f) -%}", "{% if not p(a)<=b and c is d(p(e)>f) -%}"),
            ("{%- set a = b == c if d < e else f -%}", "{%- set a = p(b) == c if p(d) < e else f -%}"),
            ("{{ a(b=c == d, e=(f == g) == h) }}", "{{ a(b=p(c) == d, e=p((p(f) == g)) == h) }}"),
            ("{{ a < b < c }}", "{{ p(a) < p(b) < c }}"),
            ("{{ a in b }}", "{{ w(a , b) }}"),
            ("{{ a not in b.c or not d in e }}", "{{ (not w(a , b.c)) or not w(d , e) }}"),
            ("{{ 'a' in b == c not in d }}", "{{ 'a' in p(b) == p(c) not in p(d) }}"),
            ("{% for a, b in c if a in b %}", "{% for a, b in c if w(a , b) %}"),
            ("{% for a in (b in c) %}", "{% for a in (w(b , c)) %}"),
            ("{{ a[b][c - 1][d == e] }}", "{{ a[p(b)][p(c - 1)][p(p(d) == e)] }}"),
            (
                "{{ {a: b, 'c': d == e, (f, g): {h: i}} }}",
                "{{ {p(a): b, 'c': p(d) == e, p((f, g)): {p(h): i}} }}",
            ),
            ("{{ loop.changed(a, b) }}", "{{ loop.changed(p(a, b)) }}"),
            ("{{ a is eq [b] }}", "{{ a is eq [p(b)] }}"),
            ("{{ x==y }}", "{{ p(x)==y }}"),
        ] {
            assert_eq!(rewritten(source), expected);
        }
    }

    #[test]
    fn literals_slices_and_what_compares_nothing_stay() {
        for source in [
            "{{ a == 'b' }}",
            "{{ -1 < a }}",
            "{{ a != none }}",
            "{{ 'a' not in b }}",
            "{{ a[1:b] + c[-1] + d['e'] + [f] + [g, h] }}",
            "{{ a is eq [b, c] }}",
            "{{ a is not in b }}",
            "{{ a(b=c) }}",
            "{{ loop.changed() }}",
            "{% for a in b %}",
            "{% set a = b %}",
            "{{ == }}",
            "{{ a == }}",
            "{{ in",
            "{{ ) == ( }}",
            "{% }}",
            "{%",
        ] {
            assert_eq!(rewritten(source), source);
        }
    }

    #[test]
    fn a_long_tag_is_read_once() {
        let (nested, row) = ("(".repeat(100_000), " == a".repeat(100_000));
        assert!(rewrite(&format!("{{{{ {nested}a{row} }}}}")).len() > 1_000_000);
    }
}
