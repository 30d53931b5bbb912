//! What a schema costs to compile: llguidance goes down along its references by recursion, copies one part of
//! a schema for each place of another, and compares names, patterns and alternatives with each other. None of
//! it is within its own limits.

use std::collections::{BTreeSet, HashMap};
use std::rc::Rc;

use serde_json::{Map, Value};

use super::budget::Budget;
use super::expression::expression;
use super::keywords::{ANNOTATIONS, within};
use super::place::Place;
use super::shape::{Counted, Form, List, Multiple, Object, Shape, Text, any_of};
use super::{GrammarLimits, Refusal};

/// Nested schemas that references may lead through, as a multiple of the brackets within each other.
pub(super) const LEVELS_PER_DEPTH: usize = 40;

/// Largest `multipleOf`, as its digits without the point: what computes remainders has a state for each.
pub(super) const MULTIPLE_MAX: u64 = 10_000;

/// What a schema without `type` may be. An integer is a number.
const TYPES: [&str; 6] = ["null", "boolean", "number", "string", "array", "object"];

/// Bounds of a number, which becomes an expression of as many brackets as they have digits.
const BOUNDS: [&str; 4] = ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"];

/// Units of a constant list or object, of a number and of a bound, and squared digits of a bound for a unit.
const COMPOUND: u64 = 12;
const NUMBER: u64 = 4;
const BOUND: u64 = 30;
const SQUARED_PER_UNIT: u64 = 5;

/// Most digits before the point of a bound that becomes an expression: llguidance refuses one with more.
const DIGITS_MAX: usize = 19;

/// Units of each format, and of another: they are written as patterns.
const FORMATS: [(&str, u64); 7] = [
    ("uuid", 300),
    ("ipv4", 250),
    ("ipv6", 1000),
    ("hostname", 300),
    ("email", 300),
    ("uri", 1500),
    ("duration", 600),
];
const FORMAT: u64 = 1000;

/// Bytes of a constant text for a unit, and of a place that is kept.
const BYTES_PER_UNIT: u64 = 32;
const KEPT_PER_UNIT: u64 = 200;

/// Refuses a schema whose references lead through too many nested schemas.
pub(super) fn check_levels(
    root: &Value,
    references: &BTreeSet<&str>,
    limits: &GrammarLimits,
) -> Result<(), Refusal> {
    let mut levels = Levels(HashMap::new());
    let targets = references.iter().filter_map(|pointer| root.pointer(pointer));
    let through: usize = std::iter::once(root).chain(targets).map(|schema| levels.of(schema)).sum();
    if through > LEVELS_PER_DEPTH * limits.depth_max {
        return Err(Refusal::TooLarge { limit: "grammar_depth_max", value: limits.depth_max as u64 });
    }
    Ok(())
}

/// Spends what a schema costs that is checked.
///
/// # Errors
/// Less is left, or something in it is merged into what is not supported.
pub(super) fn spend(root: &Value, base: &str, budget: &mut Budget) -> Result<(), Refusal> {
    let mut shapes = Shapes { root, base, budget, targets: HashMap::new(), merges: 0 };
    shapes.schema(root, &Place::base(base)).map(drop)
}

/// How many schemas stand within each other, by what tells a schema apart from all others.
struct Levels(HashMap<usize, usize>);

impl Levels {
    fn of(&mut self, schema: &Value) -> usize {
        let address = std::ptr::from_ref(schema).addr();
        if let Some(known) = self.0.get(&address) {
            return *known;
        }
        let levels = 1 + within(schema).map(|inner| self.of(inner)).max().unwrap_or(0);
        self.0.insert(address, levels);
        levels
    }
}

/// The shapes of a schema.
pub(super) struct Shapes<'a, 'b> {
    root: &'a Value,
    base: &'a str,
    pub(super) budget: &'b mut Budget,
    /// What references lead to; None while it is looked at.
    targets: HashMap<&'a str, Option<Shape<'a>>>,
    pub(super) merges: u64,
}

impl<'a> Shapes<'a, '_> {
    /// Returns what a reference leads to. What refers to itself without end is not compiled.
    pub(super) fn target(&mut self, reference: &'a str) -> Result<Shape<'a>, Refusal> {
        let pointer = reference.trim_start_matches('#');
        if let Some(known) = self.targets.get(pointer) {
            return Ok(known.clone().unwrap_or_else(|| Form::Any.of(1)));
        }
        let Some(target) = self.root.pointer(pointer) else { return Ok(Form::Any.of(1)) };
        self.targets.insert(pointer, None);
        let base = format!("{}{pointer}", self.base);
        let shape = self.schema(target, &Place::base(&base))?;
        self.targets.insert(pointer, Some(Rc::clone(&shape)));
        Ok(shape)
    }

    fn schema(&mut self, schema: &'a Value, place: &Place<'_>) -> Result<Shape<'a>, Refusal> {
        self.budget.spend(1)?;
        let Some(keywords) = schema.as_object() else {
            let form = if schema == &Value::Bool(false) { Form::Nothing } else { Form::Any };
            return Ok(form.of(1));
        };
        let mut shape = Form::Any.of(1);
        let mut has_own = false;
        for (keyword, value) in keywords {
            let keyword = keyword.as_str();
            match (keyword, value) {
                ("allOf", Value::Array(schemas)) => {
                    for schema in self.each_schema(keyword, schemas, place)? {
                        shape = self.merged(shape, schema, 0)?;
                    }
                }
                ("anyOf", Value::Array(schemas)) => {
                    let any = any_of(self.each_schema(keyword, schemas, place)?);
                    shape = self.merged(shape, any, 0)?;
                }
                ("oneOf", Value::Array(schemas)) => {
                    let schemas = self.each_schema(keyword, schemas, place)?;
                    let one = self.one_of(schemas)?;
                    shape = self.merged(shape, one, 0)?;
                }
                ("enum", Value::Array(values)) => {
                    self.budget.lexeme(std::ptr::from_ref(value).addr())?;
                    let any = values.iter().map(|value| self.constant(value));
                    let any = any_of(any.collect::<Result<_, _>>()?);
                    shape = self.merged(shape, any, 0)?;
                }
                ("const", value) => {
                    let constant = self.constant(value)?;
                    shape = self.merged(shape, constant, 0)?;
                }
                ("$ref", Value::String(reference)) => {
                    self.target(reference)?;
                    shape = self.merged(shape, Form::Reference(reference).of(1), 0)?;
                }
                _ => has_own |= !ANNOTATIONS.contains(&keyword) && !keyword.starts_with("x-"),
            }
        }
        if has_own {
            let own = self.own(keywords, place)?;
            shape = self.merged(shape, own, 0)?;
        }
        Ok(shape)
    }

    fn each_schema(
        &mut self,
        keyword: &str,
        schemas: &'a [Value],
        place: &Place<'_>,
    ) -> Result<Vec<Shape<'a>>, Refusal> {
        let place = place.name(keyword);
        schemas.iter().enumerate().map(|(at, schema)| self.schema(schema, &place.index(at))).collect()
    }

    /// Returns what the keywords of a schema say that are not about other schemas as a whole.
    fn own(&mut self, keywords: &'a Map<String, Value>, place: &Place<'_>) -> Result<Shape<'a>, Refusal> {
        let types: Vec<&str> = match keywords.get("type") {
            Some(Value::String(one)) => vec![one],
            Some(Value::Array(types)) => types.iter().filter_map(Value::as_str).collect(),
            _ => TYPES.to_vec(),
        };
        let shapes = types.into_iter().map(|name| {
            self.budget.spend(1)?;
            match name {
                "null" => Ok(Form::Null.of(1)),
                "boolean" => Ok(Form::Boolean.of(1)),
                "number" | "integer" => self.number(keywords, place),
                "string" => self.text(keywords),
                "array" => self.list(keywords, place),
                _ => self.object_of(keywords, place),
            }
        });
        Ok(any_of(shapes.collect::<Result<_, _>>()?))
    }

    fn number(&mut self, keywords: &Map<String, Value>, place: &Place<'_>) -> Result<Shape<'a>, Refusal> {
        let mut units = NUMBER;
        for bound in BOUNDS.iter().filter_map(|keyword| keywords.get(*keyword)) {
            let digits = bound.as_f64().map_or(0, digits);
            units += BOUND + digits * digits / SQUARED_PER_UNIT;
            self.budget.lexeme(bound.to_string())?;
        }
        self.budget.spend(units)?;
        let multiple = keywords.get("multipleOf").map(|multiple| {
            let place = self.kept(place)?;
            let text = multiple.as_f64().unwrap_or_default().to_string();
            let (whole, part) = text.split_once('.').unwrap_or((&text, ""));
            let digits = format!("{whole}{part}").parse().unwrap_or(u64::MAX);
            Ok(Multiple { digits, places: part.len().try_into().unwrap_or(u32::MAX), place })
        });
        Ok(Form::Number(multiple.transpose()?).of(units))
    }

    /// Returns a place to tell it later.
    fn kept(&mut self, place: &Place<'_>) -> Result<Rc<str>, Refusal> {
        self.budget.spend(place.bytes() / KEPT_PER_UNIT)?;
        Ok(place.to_string().into())
    }

    fn text(&mut self, keywords: &Map<String, Value>) -> Result<Shape<'a>, Refusal> {
        let mut units = 1;
        if let Some(Value::String(pattern)) = keywords.get("pattern") {
            self.budget.lexeme(pattern)?;
            units += self.budget.tree(expression(pattern, ""))?;
        }
        if let Some(Value::String(format)) = keywords.get("format") {
            let known = FORMATS.iter().find(|(name, _)| name == format);
            units += known.map_or(FORMAT, |(_, units)| *units);
        }
        let expressions =
            ["pattern", "format"].iter().filter(|keyword| keywords.contains_key(**keyword)).count();
        let mut bounds = ["minLength", "maxLength"].iter().filter_map(|keyword| keywords.get(*keyword));
        let bounds = (bounds.next().map(Value::to_string), bounds.next().map(Value::to_string));
        self.budget.lexeme(&bounds)?;
        let is_bounded = bounds.0.is_some();
        let text = Text { expressions: expressions as u64, is_bounded, is_literal: false }.of(units);
        self.budget.spend(text.units)?;
        Ok(text)
    }

    fn list(&mut self, keywords: &'a Map<String, Value>, place: &Place<'_>) -> Result<Shape<'a>, Refusal> {
        let first = match keywords.get("prefixItems") {
            Some(Value::Array(schemas)) => self.each_schema("prefixItems", schemas, place)?,
            _ => Vec::new(),
        };
        let others = keywords.get("items").map(|schema| self.schema(schema, &place.name("items")));
        Ok(Form::List(List { first, others: others.transpose()? }).of(1))
    }

    fn object_of(
        &mut self,
        keywords: &'a Map<String, Value>,
        place: &Place<'_>,
    ) -> Result<Shape<'a>, Refusal> {
        let mut object = Object::default();
        for (keyword, into) in
            [("patternProperties", &mut object.patterns), ("properties", &mut object.properties)]
        {
            let own = place.name(keyword);
            for (name, schema) in keywords.get(keyword).and_then(Value::as_object).into_iter().flatten() {
                self.budget.lexeme(name)?;
                into.insert(name, self.schema(schema, &own.name(name))?);
            }
        }
        for pattern in object.patterns.keys() {
            let units = self.budget.tree(expression(pattern, ""))?;
            self.budget.spend(units)?;
        }
        if !object.patterns.is_empty() {
            for shape in object.properties.values_mut() {
                *shape = self.with_any(shape, object.patterns.values(), 0)?;
            }
        }
        let additional = keywords.get("additionalProperties");
        let additional = additional.map(|schema| self.schema(schema, &place.name("additionalProperties")));
        object.additional = additional.transpose()?;
        for name in keywords.get("required").and_then(Value::as_array).into_iter().flatten() {
            let name = name.as_str().unwrap_or_default();
            if object.required.insert(name) {
                self.budget.lexeme(name)?;
                self.budget.spend(1)?;
            }
        }
        let count = |keyword: &str| keywords.get(keyword).and_then(Value::as_u64);
        let (min, max) = (count("minProperties").unwrap_or(0), count("maxProperties"));
        if min > 0 || max.is_some() {
            object.counted = Some(Counted { min, max, place: self.kept(place)? });
        }
        self.object(object, 0)
    }

    /// Returns the shape of a value that is written as it is.
    fn constant(&mut self, value: &'a Value) -> Result<Shape<'a>, Refusal> {
        let units = match value {
            Value::Number(_) => NUMBER,
            Value::String(text) => 1 + text.len() as u64 / BYTES_PER_UNIT,
            Value::Array(_) | Value::Object(_) => COMPOUND,
            _ => 1,
        };
        self.budget.spend(units)?;
        Ok(match value {
            Value::Null => Form::Null.of(units),
            Value::Bool(_) => Form::Boolean.of(units),
            Value::Number(_) => Form::Number(None).of(units),
            Value::String(_) => Text { expressions: 1, is_bounded: false, is_literal: true }.of(units),
            Value::Array(values) => {
                let first = values.iter().map(|value| self.constant(value)).collect::<Result<_, _>>()?;
                Form::List(List { first, others: Some(Form::Nothing.of(1)) }).of(units)
            }
            Value::Object(values) => {
                let mut object = Object { additional: Some(Form::Nothing.of(1)), ..Object::default() };
                for (name, value) in values {
                    self.budget.lexeme(name)?;
                    object.properties.insert(name, self.constant(value)?);
                    object.required.insert(name);
                }
                self.object(object, 0)?
            }
        })
    }
}

/// Returns the digits of a bound of which an expression is made.
fn digits(bound: f64) -> u64 {
    let text = bound.to_string();
    let (whole, part) = text.split_once('.').unwrap_or((&text, ""));
    (whole.len().min(DIGITS_MAX) + part.len()) as u64
}

/// Returns the bytes of a value as JSON, roughly.
pub(super) fn bytes(value: &Value) -> u64 {
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => 8,
        Value::String(text) => 8 + text.len() as u64,
        Value::Array(values) => 8 + values.iter().map(bytes).sum::<u64>(),
        Value::Object(values) => {
            8 + values.iter().map(|(name, value)| 8 + name.len() as u64 + bytes(value)).sum::<u64>()
        }
    }
}
