//! What the names of a Lark grammar stand for: a terminal is written out wherever it is named, so that some
//! that name each other may become as long as one likes.

use std::collections::HashMap;

/// Pairs of parts that may be left out, for a unit.
const PAIRS_PER_UNIT: u64 = 16;

/// Terminals that are compared with one that a rule names, for a unit.
const LEXEMES_PER_UNIT: u64 = 512;

/// Units to find out whether a text obeys several terminals at once, and for each pair of terminals that it
/// must not obey: what is left of all of them is held for each part of them.
const SEARCH: u64 = 200;
const EXCLUDED: u64 = 2;

/// The definitions of a grammar.
#[derive(Debug, Default)]
pub(super) struct Terminals<'a> {
    definitions: HashMap<&'a str, Definition<'a>>,
    /// The one that is read.
    current: &'a str,
    depth: u64,
    pieces: u64,
    begun: usize,
}

#[derive(Debug, Default)]
struct Definition<'a> {
    own: Size,
    /// The terminals that it names, and how often: what stands in brackets is gone through for each of them.
    uses: HashMap<&'a str, u64>,
    /// The terminals that alone are excluded.
    excluded: Vec<&'a str>,
    /// Whether terminals become a part of it: in a rule they stay by themselves.
    is_terminal: bool,
}

/// The size of a definition.
#[derive(Clone, Copy, Debug, Default)]
struct Size {
    /// Parts that are copied where it is named.
    elements: u64,
    /// Parts that may be left out.
    optional: u64,
    /// Alternatives of expressions that do not begin with a character.
    alternatives: u64,
    /// Signs for what obeys all of several terminals, and for what does not obey one.
    conjunctions: u32,
    complements: u32,
    /// Plain texts that are not to be obeyed: what is left of all of them is one path.
    exclusions: u64,
    /// Whether it is more than plain texts.
    is_loose: bool,
}

impl Size {
    /// That of what names itself.
    const ENDLESS: Self = Self {
        elements: u64::MAX,
        optional: u64::MAX,
        alternatives: u64::MAX,
        conjunctions: u32::MAX,
        complements: u32::MAX,
        exclusions: u64::MAX,
        is_loose: true,
    };
}

impl<'a> Terminals<'a> {
    /// Begins a definition. A rule that has attributes may be compiled as a terminal is.
    pub(super) fn begin(&mut self, name: &'a str, has_attributes: bool) {
        self.current = name;
        self.begun += 1;
        let is_rule = name.trim_start_matches(['!', '?', '_']).starts_with(|c: char| c.is_ascii_lowercase());
        self.definition().is_terminal |= has_attributes || !is_rule;
    }

    /// Enters and leaves brackets.
    pub(super) fn open(&mut self) {
        self.depth += 1;
    }

    pub(super) fn close(&mut self) {
        self.depth = self.depth.saturating_sub(1);
    }

    /// Adds units that are not copied.
    pub(super) fn own(&mut self, units: u64) {
        self.pieces = self.pieces.saturating_add(units);
    }

    /// Adds parts to the definition.
    pub(super) fn elements(&mut self, elements: u64) {
        let elements = elements.saturating_mul(1 + self.depth);
        let own = &mut self.definition().own.elements;
        *own = own.saturating_add(elements);
    }

    pub(super) fn optional(&mut self) {
        self.definition().own.optional += 1;
        self.loose();
    }

    /// Notes that the definition is more than plain texts.
    pub(super) fn loose(&mut self) {
        self.definition().own.is_loose = true;
    }

    /// Adds alternatives that do not begin with a character.
    pub(super) fn alternatives(&mut self, alternatives: u64) {
        let own = &mut self.definition().own.alternatives;
        *own = own.saturating_add(alternatives);
    }

    pub(super) fn conjunction(&mut self) {
        self.definition().own.conjunctions += 1;
        self.loose();
    }

    /// Adds that something is not to be obeyed: a terminal, or a plain text, which has no name.
    pub(super) fn exclusion(&mut self, name: &'a str) {
        self.definition().excluded.push(name);
    }

    /// Adds the sign for what does not obey something, which makes a terminal of it in a rule too.
    pub(super) fn complement(&mut self) {
        let definition = self.definition();
        definition.own.complements += 1;
        definition.own.is_loose = true;
        definition.is_terminal = true;
    }

    /// Adds a name to the definition. A rule's is not followed.
    pub(super) fn name(&mut self, name: &'a str) {
        if name.trim_start_matches('_').starts_with(|c: char| c.is_ascii_uppercase()) {
            let times = 1 + self.depth;
            *self.definition().uses.entry(name).or_default() += times;
        }
    }

    fn definition(&mut self) -> &mut Definition<'a> {
        self.definitions.entry(self.current).or_default()
    }

    /// Returns the number of definitions.
    pub(super) fn definitions(&self) -> usize {
        self.begun
    }

    /// Returns the units of all definitions together.
    pub(super) fn units(&self) -> u64 {
        let mut known = HashMap::new();
        self.definitions.iter().fold(self.pieces, |sum, (name, definition)| {
            let size = self.size(name, &mut known);
            let own = definition.own;
            let is_joined = own.conjunctions > 0 || !definition.excluded.is_empty();
            let search = if is_joined {
                let pairs = size.exclusions.saturating_mul(size.exclusions).saturating_mul(EXCLUDED);
                SEARCH.saturating_mul(4u64.saturating_pow(size.conjunctions)).saturating_add(pairs)
            } else {
                0
            };
            // In what does not obey one, the alternatives are compared with each other.
            let is_compared = is_joined || own.complements > 0;
            let compared = if is_compared { size.alternatives.saturating_mul(size.alternatives) } else { 0 };
            let pairs = size.optional.saturating_mul(size.optional) / PAIRS_PER_UNIT;
            // What a rule names is compared with each that there is.
            let named = definition.uses.values().fold(0, |sum: u64, times| sum.saturating_add(*times));
            let named = named.saturating_mul(self.definitions.len() as u64) / LEXEMES_PER_UNIT;
            let named = if definition.is_terminal { 0 } else { named };
            [size.elements, pairs, search, compared, named].into_iter().fold(sum, u64::saturating_add)
        })
    }

    /// Returns the size of a definition with all that it names.
    fn size(&self, name: &'a str, known: &mut HashMap<&'a str, Size>) -> Size {
        if let Some(size) = known.get(name) {
            return *size;
        }
        let Some(definition) = self.definitions.get(name) else {
            return Size { is_loose: !name.is_empty(), ..Size::default() };
        };
        known.insert(name, Size::ENDLESS);
        let mut size = definition.own;
        let is_joined = size.conjunctions > 0 || !definition.excluded.is_empty();
        let uses = definition.uses.iter().filter(|_| definition.is_terminal);
        for (used, times) in uses {
            let used = self.size(used, known);
            size.elements = size.elements.saturating_add(used.elements.saturating_mul(*times));
            size.optional = size.optional.saturating_add(used.optional.saturating_mul(*times));
            size.alternatives = size.alternatives.saturating_add(used.alternatives.saturating_mul(*times));
            size.complements = size.complements.saturating_add(used.complements);
            size.exclusions = size.exclusions.saturating_add(used.exclusions);
            size.is_loose |= used.is_loose;
            // Only what is joined by such a sign is paired.
            size.conjunctions = if is_joined {
                size.conjunctions.saturating_add(used.conjunctions)
            } else {
                size.conjunctions.max(used.conjunctions)
            };
        }
        if is_joined {
            let excluded = u32::try_from(definition.excluded.len()).unwrap_or(u32::MAX);
            let others = definition.own.complements.saturating_sub(excluded);
            size.conjunctions = size.conjunctions.saturating_add(others);
        }
        for excluded in &definition.excluded {
            // What is left of others may be any of them together.
            if !excluded.is_empty() && self.size(excluded, known).is_loose {
                size.conjunctions = size.conjunctions.saturating_add(2);
            } else {
                size.exclusions = size.exclusions.saturating_add(1);
            }
        }
        known.insert(name, size);
        size
    }
}
