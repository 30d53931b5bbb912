//! What the names of a Lark grammar stand for: a terminal is written out wherever it is named, so that some
//! that name each other may become as long as one likes.

use std::collections::HashMap;

/// Pairs of parts that may be left out, for a unit.
const PAIRS_PER_UNIT: u64 = 16;

/// Units to find out whether a text obeys several terminals at once.
const SEARCH: u64 = 200;

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
}

/// The size of a definition.
#[derive(Clone, Copy, Debug, Default)]
struct Size {
    /// Parts that are copied where it is named.
    elements: u64,
    /// Parts that may be left out.
    optional: u64,
    /// Signs for what obeys all of several terminals, or does not obey one.
    conjunctions: u32,
}

impl<'a> Terminals<'a> {
    /// Begins a definition.
    pub(super) fn begin(&mut self, name: &'a str) {
        self.current = name;
        self.begun += 1;
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
    }

    pub(super) fn conjunction(&mut self) {
        self.definition().own.conjunctions += 1;
    }

    /// Adds a name to the definition. That of a rule is no more than a name.
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

    /// Returns the units of all definitions together, of which expressions have these alternatives that do
    /// not begin with a character: in what does not obey one, they are compared with each other.
    pub(super) fn units(&self, alternatives: u64) -> u64 {
        let mut known = HashMap::new();
        let mut has_conjunctions = false;
        let sum = self.definitions.keys().fold(self.pieces, |sum, name| {
            let size = self.size(name, &mut known);
            let search = match size.conjunctions {
                0 => 0,
                many => SEARCH.saturating_mul(4u64.saturating_pow(many)),
            };
            has_conjunctions |= search > 0;
            let pairs = size.optional.saturating_mul(size.optional) / PAIRS_PER_UNIT;
            [size.elements, pairs, search].into_iter().fold(sum, u64::saturating_add)
        });
        let compared = if has_conjunctions { alternatives.saturating_mul(alternatives) } else { 0 };
        sum.saturating_add(compared)
    }

    /// Returns the size of a definition with all that it names. Those that name themselves are refused later.
    fn size(&self, name: &'a str, known: &mut HashMap<&'a str, Size>) -> Size {
        if let Some(size) = known.get(name) {
            return *size;
        }
        known.insert(name, Size::default());
        let Some(definition) = self.definitions.get(name) else { return Size::default() };
        let mut size = definition.own;
        for (used, times) in &definition.uses {
            let used = self.size(used, known);
            size.elements = size.elements.saturating_add(used.elements.saturating_mul(*times));
            size.optional = size.optional.saturating_add(used.optional.saturating_mul(*times));
            // Only what is joined by such a sign is paired.
            size.conjunctions = if definition.own.conjunctions > 0 {
                size.conjunctions.saturating_add(used.conjunctions)
            } else {
                size.conjunctions.max(used.conjunctions)
            };
        }
        known.insert(name, size);
        size
    }
}
