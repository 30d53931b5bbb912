//! What a schema costs to compile beyond its own size: llguidance goes down along its references by
//! recursion, copies one part of a schema for each alternative of another, and compares each property of an
//! object with each. None of it is within its own limits.

use std::collections::{BTreeSet, HashMap};

use serde_json::Value;

use super::keywords::{ANNOTATIONS, OF_LIST, OF_NAMES, OF_SCHEMA};
use super::{GrammarLimits, Refusal};

/// Nested schemas that references may lead through, as a multiple of the brackets within each other.
pub(super) const LEVELS_PER_DEPTH: usize = 40;

/// Bytes of schemas that may be copied while a schema is compiled, as a multiple of the work.
const COPIED_BYTES_PER_WORK: u64 = 64;

/// Bytes that comparing two properties of an object counts as: each is compared with each other one.
const BYTES_PER_COMPARISON: u64 = 16;

/// Refuses a schema whose references lead through too many nested schemas, or whose parts would be copied too
/// often. Its references lead to schemas in it.
pub(super) fn check(
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
    let mut copies = Copies { root, known: HashMap::new(), bytes: 0 };
    copies.of(root);
    if copies.bytes > limits.work_max.saturating_mul(COPIED_BYTES_PER_WORK) {
        return Err(Refusal::TooLarge { limit: "grammar_work_max", value: limits.work_max });
    }
    Ok(())
}

/// Returns what tells a value of a schema apart from all others.
fn address(value: &Value) -> usize {
    std::ptr::from_ref(value).addr()
}

/// Returns the schemas right within a schema.
fn within(schema: &Value) -> impl Iterator<Item = &Value> {
    let keywords = schema.as_object().into_iter().flatten();
    keywords.flat_map(|(keyword, value)| {
        let keyword = keyword.as_str();
        let one = OF_SCHEMA.contains(&keyword).then_some(value);
        let list = value.as_array().filter(|_| OF_LIST.contains(&keyword));
        let names = value.as_object().filter(|_| OF_NAMES.contains(&keyword));
        let list = list.into_iter().flatten();
        one.into_iter().chain(list).chain(names.into_iter().flat_map(|names| names.values()))
    })
}

/// How many schemas stand within each other.
struct Levels(HashMap<usize, usize>);

impl Levels {
    fn of(&mut self, schema: &Value) -> usize {
        if let Some(known) = self.0.get(&address(schema)) {
            return *known;
        }
        let levels = 1 + within(schema).map(|inner| self.of(inner)).max().unwrap_or(0);
        self.0.insert(address(schema), levels);
        levels
    }
}

/// What would be copied.
struct Copies<'a> {
    root: &'a Value,
    known: HashMap<usize, Size>,
    /// Bytes, roughly.
    bytes: u64,
}

/// The size of a schema: its alternatives, and their bytes together.
#[derive(Clone, Copy)]
struct Size {
    options: u64,
    bytes: u64,
}

impl Copies<'_> {
    fn of(&mut self, schema: &Value) -> Size {
        if let Some(known) = self.known.get(&address(schema)) {
            return *known;
        }
        // What refers to itself is one alternative there.
        self.known.insert(address(schema), Size { options: 1, bytes: 1 });
        let mut parts = Vec::new();
        let mut rest = Size { options: 1, bytes: 1 };
        for (keyword, value) in schema.as_object().into_iter().flatten() {
            match (keyword.as_str(), value) {
                ("allOf", Value::Array(schemas)) => parts.extend(schemas.iter().map(|each| self.of(each))),
                ("anyOf", Value::Array(schemas)) => parts.push(self.any(schemas)),
                ("oneOf", Value::Array(schemas)) => {
                    let any = self.any(schemas);
                    // Each alternative is compared with each.
                    self.add((schemas.len() as u64).saturating_mul(any.bytes));
                    parts.push(any);
                }
                ("enum", Value::Array(values)) => {
                    parts.push(Size { options: values.len() as u64, bytes: bytes(value) });
                }
                ("$ref", Value::String(reference)) => {
                    let target = self.root.pointer(reference.trim_start_matches('#'));
                    parts.extend(target.map(|target| self.of(target)));
                }
                (keyword, _) if ANNOTATIONS.contains(&keyword) || keyword.starts_with("x-") => {}
                (keyword, value) => {
                    if let ("properties", Some(all)) = (keyword, value.as_object()) {
                        let all = all.len() as u64;
                        self.add(all.saturating_mul(all).saturating_mul(BYTES_PER_COMPARISON));
                    }
                    rest.bytes = rest.bytes.saturating_add(bytes(value));
                }
            }
        }
        // The others are gone through for their own sake.
        for inner in within(schema) {
            self.of(inner);
        }
        if rest.bytes > 1 {
            parts.push(rest);
        }
        let size = combined(&parts);
        if parts.len() > 1 {
            self.add(size.bytes);
        }
        self.known.insert(address(schema), size);
        size
    }

    fn any(&mut self, schemas: &[Value]) -> Size {
        schemas.iter().map(|each| self.of(each)).fold(Size { options: 0, bytes: 0 }, |sum, each| Size {
            options: sum.options.saturating_add(each.options),
            bytes: sum.bytes.saturating_add(each.bytes),
        })
    }

    fn add(&mut self, bytes: u64) {
        self.bytes = self.bytes.saturating_add(bytes);
    }
}

/// Returns the size of a schema that obeys all parts: each alternative of one with each of the others.
fn combined(parts: &[Size]) -> Size {
    let options = parts.iter().fold(1u64, |product, part| product.saturating_mul(part.options.max(1)));
    let each = parts.iter().map(|part| part.bytes / part.options.max(1) + 1).sum();
    Size { options, bytes: options.saturating_mul(each) }
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
