//! How llguidance merges the schemas that one value has to obey: `allOf`, `$ref` and what stands beside them.
//! It copies a schema for each alternative of another, and for each place where another has something to say.
//! Here the same is done with shapes, which share what would be copied: each copy is spent.

use std::collections::BTreeMap;
use std::rc::Rc;

use super::Refusal;
use super::cost::{MULTIPLE_MAX, Shapes};
use super::expression::expression;
use super::shape::{Counted, Form, List, Multiple, Node, Object, Shape, Text, any_of};

/// Most merges of two schemas, and how deep within each other: llguidance gives up there too.
const MERGES_MAX: u64 = 50_000;
const LEVELS_MAX: usize = 128;

/// Comparisons of two schemas for a unit.
const COMPARED_PER_UNIT: u64 = 32;

/// Pairs of names of one object for a unit: each rest of their list is looked up.
const NAMES_PER_UNIT: u64 = 5;

/// Names of two objects that are merged, for a unit.
const WALKED_PER_UNIT: u64 = 64;

/// Units to find out whether two patterns exclude each other, and bytes of patterns for a unit.
const PATTERNS: u64 = 2000;
const BYTES_PER_UNIT: u64 = 64;

/// Most properties that may be left out beside `minProperties` or `maxProperties`: there is an alternative
/// for each, which has all of them.
const COUNTED_MAX: u64 = 64;

impl<'a> Shapes<'a, '_> {
    /// Returns a copy.
    pub(super) fn copy(&mut self, shape: &Shape<'a>) -> Result<Shape<'a>, Refusal> {
        self.budget.spend(shape.units)?;
        Ok(Rc::clone(shape))
    }

    /// Counts a merge.
    fn count(&mut self) -> Result<(), Refusal> {
        self.merges += 1;
        if self.merges > MERGES_MAX { Err(self.budget.exceeded()) } else { Ok(()) }
    }

    /// Returns what obeys both.
    pub(super) fn merged(
        &mut self,
        one: Shape<'a>,
        other: Shape<'a>,
        level: usize,
    ) -> Result<Shape<'a>, Refusal> {
        self.count()?;
        if level > LEVELS_MAX {
            let why = "schemas that refer to themselves are merged without end";
            return Err(Refusal::unsupported("", "allOf", why));
        }
        match (&one.form, &other.form) {
            (Form::Any, _) | (_, Form::Nothing) => return Ok(other),
            (_, Form::Any) | (Form::Nothing, _) => return Ok(one),
            (Form::Reference(to), _) => {
                let target = self.target(to)?;
                let target = self.copy(&target)?;
                return self.merged(target, other, level + 2);
            }
            (_, Form::Reference(to)) => {
                let target = self.target(to)?;
                let target = self.copy(&target)?;
                return self.merged(one, target, level + 2);
            }
            (Form::OneOf(shapes), _) => {
                return self.each(shapes, &other, level).and_then(|all| self.one_of(all));
            }
            (_, Form::OneOf(shapes)) => {
                return self.each(shapes, &one, level).and_then(|all| self.one_of(all));
            }
            (Form::AnyOf(shapes), _) => return Ok(any_of(self.each(shapes, &other, level)?)),
            (_, Form::AnyOf(shapes)) => return Ok(any_of(self.each(shapes, &one, level)?)),
            _ => {}
        }
        self.plain(Rc::unwrap_or_clone(one), Rc::unwrap_or_clone(other), level)
    }

    /// Returns what obeys two schemas without alternatives.
    fn plain(&mut self, one: Node<'a>, other: Node<'a>, level: usize) -> Result<Shape<'a>, Refusal> {
        let units = one.units.saturating_add(other.units);
        Ok(match (one.form, other.form) {
            (Form::Null, Form::Null) => Form::Null.of(1),
            (Form::Boolean, Form::Boolean) => Form::Boolean.of(1),
            (Form::Number(one), Form::Number(other)) => {
                Form::Number(both(one, other, |one, other| common(&one, other))?).of(units)
            }
            (Form::Text(one), Form::Text(other)) => {
                let text = one.and(other, units);
                self.budget.spend(text.units.saturating_sub(units))?;
                text
            }
            (Form::List(one), Form::List(other)) => self.lists(one, other, level)?,
            (Form::Object(one), Form::Object(other)) => self.objects(one, other, level)?,
            _ => Form::Nothing.of(1),
        })
    }

    /// Returns what obeys each of the alternatives and the other schema.
    fn each(
        &mut self,
        shapes: &[Shape<'a>],
        other: &Shape<'a>,
        level: usize,
    ) -> Result<Vec<Shape<'a>>, Refusal> {
        let each = |shape: &Shape<'a>| {
            let copy = self.copy(other)?;
            self.merged(Rc::clone(shape), copy, level + 1)
        };
        shapes.iter().map(each).collect()
    }

    /// Returns what obeys exactly one. That they exclude each other is found out for each pair.
    pub(super) fn one_of(&mut self, shapes: Vec<Shape<'a>>) -> Result<Shape<'a>, Refusal> {
        let flat = shapes.into_iter().flat_map(|shape| match &shape.form {
            Form::OneOf(within) => within.clone(),
            Form::Nothing => Vec::new(),
            _ => vec![shape],
        });
        let mut shapes: Vec<Shape<'a>> = flat.collect();
        let (mut before, mut pairs) = (0u64, 0u64);
        for shape in &shapes {
            pairs = pairs.saturating_add(before.saturating_mul(shape.compared));
            before = before.saturating_add(shape.compared);
        }
        self.budget.spend(pairs / COMPARED_PER_UNIT)?;
        Ok(match shapes.len() {
            0 => Form::Nothing.of(1),
            1 => shapes.remove(0),
            _ => Form::OneOf(shapes).of(1),
        })
    }

    fn lists(&mut self, one: List<'a>, other: List<'a>, level: usize) -> Result<Shape<'a>, Refusal> {
        let mut first = Vec::new();
        for at in 0..one.first.len().max(other.first.len()) {
            let (one, other) = (self.item(&one, at)?, self.item(&other, at)?);
            first.push(self.merged(one, other, level + 1)?);
        }
        let others = match (one.others, other.others) {
            (Some(one), Some(other)) => Some(self.merged(one, other, level + 1)?),
            (one, other) => one.or(other),
        };
        Ok(Form::List(List { first, others }).of(1))
    }

    /// Returns what an item of a list has to obey.
    fn item(&mut self, list: &List<'a>, at: usize) -> Result<Shape<'a>, Refusal> {
        match (list.first.get(at), &list.others) {
            (Some(item), _) => Ok(Rc::clone(item)),
            (None, Some(others)) => self.copy(others),
            (None, None) => Ok(Form::Any.of(1)),
        }
    }

    fn objects(&mut self, one: Object<'a>, other: Object<'a>, level: usize) -> Result<Shape<'a>, Refusal> {
        // Their names are gone through.
        self.budget.spend(1 + (one.names() + other.names()) / WALKED_PER_UNIT)?;
        let own = (one.own(), other.own());
        let mut properties = BTreeMap::new();
        for (name, shape) in &one.properties {
            properties.insert(*name, self.in_object(shape, &other, name, level)?);
        }
        for (name, shape) in &other.properties {
            if !properties.contains_key(name) {
                properties.insert(*name, self.in_object(shape, &one, name, level)?);
            }
        }
        let mut patterns = BTreeMap::new();
        for (these, those) in [(&one, &other), (&other, &one)] {
            for (pattern, shape) in &these.patterns {
                if patterns.contains_key(pattern) {
                    continue;
                }
                let merged = match those.patterns.get(pattern).or(those.additional.as_ref()) {
                    Some(with) => {
                        let copy = self.copy(with)?;
                        self.merged(Rc::clone(shape), copy, level + 1)?
                    }
                    None => Rc::clone(shape),
                };
                patterns.insert(*pattern, merged);
            }
        }
        let additional = match (one.additional, other.additional) {
            (Some(one), Some(other)) => Some(self.merged(one, other, level + 1)?),
            (one, other) => one.or(other),
        };
        let spent = own.0.saturating_add(own.1);
        let mut required = one.required;
        required.extend(other.required);
        let counted = both(one.counted, other.counted, |one, other| {
            let max = one.max.into_iter().chain(other.max).min();
            Ok(Counted { min: one.min.max(other.min), max, place: other.place })
        })?;
        self.object(Object { properties, patterns, additional, required, counted }, spent)
    }

    /// Returns what a property has to obey that another object has something to say about.
    fn in_object(
        &mut self,
        shape: &Shape<'a>,
        object: &Object<'a>,
        name: &str,
        level: usize,
    ) -> Result<Shape<'a>, Refusal> {
        match object.properties.get(name) {
            Some(other) => {
                let copy = self.copy(other)?;
                self.merged(Rc::clone(shape), copy, level + 1)
            }
            None => self.with_any(shape, object.unnamed(), level),
        }
    }

    /// Returns the largest of what becomes of a schema that may be merged with one of others.
    pub(super) fn with_any<'b>(
        &mut self,
        shape: &Shape<'a>,
        others: impl Iterator<Item = &'b Shape<'a>>,
        level: usize,
    ) -> Result<Shape<'a>, Refusal>
    where
        'a: 'b,
    {
        self.count()?;
        let mut largest = Rc::clone(shape);
        for other in others {
            let copy = self.copy(other)?;
            let merged = self.merged(Rc::clone(shape), copy, level + 1)?;
            if merged.units > largest.units {
                largest = merged;
            }
        }
        Ok(largest)
    }

    /// Returns an object, of whose own units some are spent.
    pub(super) fn object(&mut self, object: Object<'a>, spent: u64) -> Result<Shape<'a>, Refusal> {
        let names = object.names();
        if let Some(Counted { min, max, place }) = &object.counted {
            let required = object.required.len() as u64;
            if *min > 0 && !object.patterns.is_empty() {
                return Err(Refusal::unsupported(place, "minProperties", "beside patternProperties"));
            }
            if names - required > COUNTED_MAX && (*min > required || max.is_some()) {
                let keyword = if *min > required { "minProperties" } else { "maxProperties" };
                let why = format!("beside more than {COUNTED_MAX} properties that may be left out");
                return Err(Refusal::unsupported(place, keyword, &why));
            }
        }
        let own = object.own();
        self.budget.spend(own.saturating_sub(spent))?;
        if !object.patterns.is_empty() {
            self.patterns(&object, names)?;
        }
        Ok(Form::Object(object).of(own))
    }

    fn patterns(&mut self, object: &Object<'a>, names: u64) -> Result<(), Refusal> {
        let (mut bytes, mut units, mut positions, mut alternatives) = (0u64, 0u64, 0u64, 0u64);
        for pattern in object.patterns.keys() {
            let expression = expression(pattern, "");
            // It is parsed anew.
            self.budget.spend(self.budget.tree(expression)?)?;
            bytes = bytes.saturating_add(pattern.len() as u64);
            units = units.saturating_add(expression.units);
            positions = positions.saturating_add(expression.positions);
            alternatives += expression.alternatives;
        }
        // Of what obeys none, the alternatives are compared with each other.
        self.budget.spend(alternatives.saturating_mul(alternatives))?;
        let patterns = object.patterns.len() as u64;
        let pairs = patterns * (patterns - 1) / 2;
        self.budget.spend(pairs.saturating_mul(PATTERNS + units / BYTES_PER_UNIT))?;
        let named = object.properties.keys().chain(&object.required);
        let letters = named.fold(0u64, |sum, name| sum + name.len() as u64);
        let matched = letters.saturating_mul(positions).saturating_add(names.saturating_mul(bytes));
        self.budget.spend(matched / BYTES_PER_UNIT)
    }
}

impl Object<'_> {
    /// Returns the units of the object without what is in it: each of its names is compared with each, and
    /// where they are counted once more for each that may be left out.
    fn own(&self) -> u64 {
        let names = self.names();
        let times = if self.counted.is_some() { 1 + names - self.required.len() as u64 } else { 1 };
        1 + names.saturating_mul(names).saturating_mul(times) / NAMES_PER_UNIT
    }
}

impl Text {
    /// Units to find out whether any text obeys it, where that is not plain, and where it has a constant.
    const SEARCH: u64 = 400;
    const COMPARISON: u64 = 100;

    /// Returns a text that takes these units to compile.
    pub(super) fn of<'a>(self, units: u64) -> Shape<'a> {
        let is_plain = self.expressions <= u64::from(!self.is_bounded || self.is_literal);
        // What follows in one is paired with what follows in each other one.
        let pairs = |others: u64| 4u64.saturating_pow(u32::try_from(others).unwrap_or(u32::MAX));
        let search = match self.expressions {
            _ if is_plain => 0,
            many if self.is_literal => Self::COMPARISON.saturating_mul(pairs(many.saturating_sub(2))),
            many => Self::SEARCH.saturating_mul(pairs(many.saturating_sub(1))),
        };
        Form::Text(self).of(units.saturating_add(search))
    }

    fn and<'a>(self, other: Self, units: u64) -> Shape<'a> {
        let text = Self {
            expressions: self.expressions.saturating_add(other.expressions),
            is_bounded: self.is_bounded || other.is_bounded,
            is_literal: self.is_literal || other.is_literal,
        };
        text.of(units)
    }
}

/// Returns what becomes of two things that may be there.
fn both<T>(
    one: Option<T>,
    other: Option<T>,
    merge: impl FnOnce(T, T) -> Result<T, Refusal>,
) -> Result<Option<T>, Refusal> {
    match (one, other) {
        (Some(one), Some(other)) => merge(one, other).map(Some),
        (one, other) => Ok(one.or(other)),
    }
}

/// Returns the least common multiple. llguidance computes it in 32 bits.
fn common(one: &Multiple, other: Multiple) -> Result<Multiple, Refusal> {
    let places = one.places.max(other.places);
    let whole = |multiple: &Multiple| {
        10u64.checked_pow(places - multiple.places).and_then(|power| power.checked_mul(multiple.digits))
    };
    let digits = whole(one).zip(whole(&other)).and_then(|(one, other)| {
        let (mut divisor, mut rest) = (one, other);
        while rest > 0 {
            (divisor, rest) = (rest, divisor % rest);
        }
        (one / divisor.max(1)).checked_mul(other)
    });
    match digits {
        Some(digits) if digits <= MULTIPLE_MAX => Ok(Multiple { digits, places, place: other.place }),
        _ => {
            let why = format!("whose common multiples with another have more digits than {MULTIPLE_MAX}");
            Err(Refusal::unsupported(&other.place, "multipleOf", &why))
        }
    }
}
