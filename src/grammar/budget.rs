//! What may be spent on a grammar before llguidance gets it. A unit is about what a microsecond's work or 200
//! bytes are, whichever is more; what llguidance counts itself is spent beside it.

use std::collections::HashSet;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};

use super::expression::Expression;
use super::{GrammarLimits, Refusal};

/// Lexemes that are compared with a new one for a unit.
const LEXEMES_PER_UNIT: u64 = 512;

/// Nodes of an expression's tree for a unit of work; each is 200 bytes while the tree is there.
const NODES_PER_UNIT: u64 = 8;

/// Units of an alternative of a lexeme that does not begin with a character.
const ALTERNATIVE: u64 = 200;

/// What is left of the work that one grammar may cost.
pub(super) struct Budget {
    left: u64,
    work_max: u64,
    /// What told lexemes apart.
    lexemes: HashSet<u64>,
    compared: u64,
}

impl Budget {
    pub(super) fn new(limits: &GrammarLimits) -> Self {
        Self { left: limits.work_max, work_max: limits.work_max, lexemes: HashSet::new(), compared: 0 }
    }

    /// Spends units.
    ///
    /// # Errors
    /// Fewer are left.
    pub(super) fn spend(&mut self, units: u64) -> Result<(), Refusal> {
        self.left = self.left.checked_sub(units).ok_or_else(|| self.exceeded())?;
        Ok(())
    }

    /// Spends what it takes to find out whether a lexeme is new: it is compared with each.
    ///
    /// # Errors
    /// Less is left.
    pub(super) fn lexeme(&mut self, content: impl Hash) -> Result<(), Refusal> {
        let mut hasher = DefaultHasher::new();
        content.hash(&mut hasher);
        self.lexemes.insert(hasher.finish());
        self.compared += self.lexemes.len() as u64;
        let units = self.compared / LEXEMES_PER_UNIT;
        self.compared %= LEXEMES_PER_UNIT;
        self.spend(units)
    }

    /// Returns the units of an expression of which a tree is made, and then thrown away.
    ///
    /// # Errors
    /// The tree is too large, or cannot be told.
    pub(super) fn tree(&self, expression: Expression) -> Result<u64, Refusal> {
        if expression.is_spaced {
            let why = "in an expression, by which white space and comments do not count";
            return Err(Refusal::unsupported("", "the flag x", why));
        }
        if expression.units > self.work_max {
            return Err(self.exceeded());
        }
        Ok(1 + expression.units / NODES_PER_UNIT)
    }

    /// Spends what an expression costs that a lexeme may begin with.
    ///
    /// # Errors
    /// Less is left.
    pub(super) fn first(&mut self, expression: Expression) -> Result<(), Refusal> {
        let units = self.tree(expression)?;
        self.spend(units.saturating_add(expression.alternatives.saturating_mul(ALTERNATIVE)))
    }

    /// Returns that there is not enough.
    pub(super) fn exceeded(&self) -> Refusal {
        Refusal::TooLarge { limit: "grammar_work_max", value: self.work_max }
    }
}
