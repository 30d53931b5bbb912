//! What of JSON schema (draft 2020-12) can be obeyed, checked before llguidance gets it: it passes over
//! keywords that it does not know, and its errors do not say where.
//!
//! What only describes is passed over. Everything else is computed or refused by its name and place.

use std::collections::BTreeSet;

use serde_json::Value;

use super::budget::Budget;
use super::cost::{self, MULTIPLE_MAX};
use super::keywords::{ANNOTATIONS, OF_LIST, OF_NAMES, OF_SCHEMA};
use super::place::Place;
use super::rewrite::{rewritten, spaced};
use super::{GrammarLimits, Refusal};

/// Keywords of a whole number that is not negative.
const COUNTS: [&str; 6] =
    ["minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties"];

/// Keywords of a number.
const NUMBERS: [&str; 4] = ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"];

const TYPES: [&str; 7] = ["null", "boolean", "object", "array", "number", "integer", "string"];

/// Values of `format` that are obeyed.
const FORMATS: [&str; 10] =
    ["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"];

/// Numbers above are not exact as floats of 64 bits.
const EXACT_MAX: u64 = 1 << 53;

/// Checks a JSON schema that stands at `base`, and returns it as llguidance takes it.
///
/// # Errors
/// It is malformed, has something that is not supported, of which the place is named, or exceeds a limit.
pub(super) fn prepare(
    schema: Value,
    base: &str,
    limits: &GrammarLimits,
    budget: &mut Budget,
) -> Result<Value, Refusal> {
    let mut check = Check { root: &schema, references: BTreeSet::new() };
    check.schema(&schema, &Place::base(base))?;
    cost::check_levels(&schema, &check.references, limits)?;
    let schema = rewritten(schema, limits)?;
    cost::spend(&schema, base, budget)?;
    Ok(spaced(schema))
}

/// A schema that is checked, and the pointers of its references.
struct Check<'a> {
    root: &'a Value,
    references: BTreeSet<&'a str>,
}

impl<'a> Check<'a> {
    fn schema(&mut self, schema: &'a Value, place: &Place<'_>) -> Result<(), Refusal> {
        match schema {
            Value::Bool(_) => Ok(()),
            Value::Object(keywords) => {
                keywords.iter().try_for_each(|(keyword, value)| self.keyword(keyword, value, place))
            }
            Value::Null | Value::Number(_) | Value::String(_) | Value::Array(_) => {
                Err(place.invalid("a schema is an object, true or false"))
            }
        }
    }

    fn keyword(&mut self, keyword: &'a str, value: &'a Value, place: &Place<'_>) -> Result<(), Refusal> {
        let own = place.name(keyword);
        let must = |is: bool, what: &str| if is { Ok(()) } else { Err(own.invalid(what)) };
        let unsupported = |why: &str| Err(place.unsupported(keyword, why));
        match keyword {
            "$id" if !place.is_base() => unsupported("it is allowed at the root only"),
            "$ref" => self.reference(value, place),
            "type" => types(value, &own),
            "format" => format(value, place),
            "pattern" => must(value.is_string(), "must be a text"),
            "const" => exact(value, place, keyword),
            "enum" => {
                must(value.as_array().is_some_and(|values| !values.is_empty()), "must be a list of values")?;
                exact(value, place, keyword)
            }
            "required" => {
                let names = value.as_array().is_some_and(|names| names.iter().all(Value::is_string));
                must(names, "must be a list of names")
            }
            "multipleOf" => multiple(value, place),
            "uniqueItems" if value == &Value::Bool(false) => Ok(()),
            "items" if value.is_array() => unsupported("a list of schemas; draft 2020-12 writes prefixItems"),
            "additionalItems" => unsupported("draft 2020-12 writes items beside prefixItems"),
            "prefixItems" if is_old(self.root) => {
                unsupported("the draft that $schema names does not have it")
            }
            "nullable" => unsupported("write null into the list of types"),
            _ if COUNTS.contains(&keyword) => must(value.is_u64(), "must be a whole number from 0"),
            _ if NUMBERS.contains(&keyword) => must(value.is_number(), "must be a number"),
            _ if OF_SCHEMA.contains(&keyword) => self.schema(value, &own),
            _ if OF_LIST.contains(&keyword) || OF_NAMES.contains(&keyword) => {
                self.schemas(keyword, value, &own)
            }
            "x-guidance" => unsupported(""),
            _ if ANNOTATIONS.contains(&keyword) || keyword.starts_with("x-") => Ok(()),
            _ => unsupported(""),
        }
    }

    /// Checks the schemas of a keyword that has several.
    fn schemas(&mut self, keyword: &str, value: &'a Value, place: &Place<'_>) -> Result<(), Refusal> {
        if OF_LIST.contains(&keyword) {
            let schemas = value.as_array().filter(|schemas| !schemas.is_empty());
            let schemas = schemas.ok_or_else(|| place.invalid("must be a list of schemas"))?;
            return schemas
                .iter()
                .enumerate()
                .try_for_each(|(at, schema)| self.schema(schema, &place.index(at)));
        }
        let schemas = value.as_object().ok_or_else(|| place.invalid("must be an object"))?;
        schemas.iter().try_for_each(|(name, schema)| self.schema(schema, &place.name(name)))
    }

    /// Checks a reference: to a schema of this document that is checked where it stands, and never to
    /// elsewhere.
    fn reference(&mut self, value: &'a Value, place: &Place<'_>) -> Result<(), Refusal> {
        let unsupported = |why: &str| Err(place.unsupported("$ref", why));
        let Some(reference) = value.as_str() else {
            return Err(place.name("$ref").invalid("must be a text"));
        };
        let Some(pointer) = reference.strip_prefix('#') else {
            return unsupported(&format!("{reference:?} is not in this schema, and others are not fetched"));
        };
        if !pointer.is_empty() && !pointer.starts_with('/') {
            return unsupported(&format!("{reference:?} does not begin with a slash"));
        }
        if pointer.contains(['~', '%']) {
            return unsupported(&format!("{reference:?} has an escaped character"));
        }
        match leads_to_schema(self.root, pointer) {
            Some(true) => {
                self.references.insert(pointer);
                Ok(())
            }
            Some(false) => unsupported(&format!("{reference:?} leads to what is not a schema")),
            None => Err(place.name("$ref").invalid(&format!("{reference:?} is not there"))),
        }
    }
}

/// Returns whether a pointer leads through schemas to a schema; None if there is nothing.
fn leads_to_schema(root: &Value, pointer: &str) -> Option<bool> {
    root.pointer(pointer)?;
    let mut steps = pointer.split('/').skip(1);
    while let Some(keyword) = steps.next() {
        if OF_SCHEMA.contains(&keyword) {
            continue;
        }
        let has_more = OF_LIST.contains(&keyword) || OF_NAMES.contains(&keyword);
        if !has_more || steps.next().is_none() {
            return Some(false);
        }
    }
    Some(true)
}

fn types(value: &Value, place: &Place<'_>) -> Result<(), Refusal> {
    let known = |value: &Value| value.as_str().is_some_and(|word| TYPES.contains(&word));
    let fits = match value {
        Value::Array(types) => {
            // llguidance makes a schema for each, however often it is named.
            let is_once = |(at, one)| !types[..at].contains(one);
            !types.is_empty() && types.iter().all(known) && types.iter().enumerate().all(is_once)
        }
        one => known(one),
    };
    if fits { Ok(()) } else { Err(place.invalid(&format!("must be of {}, each once", TYPES.join(", ")))) }
}

fn format(value: &Value, place: &Place<'_>) -> Result<(), Refusal> {
    match value.as_str() {
        Some(format) if FORMATS.contains(&format) => Ok(()),
        Some(format) => Err(place.unsupported("format", &format!("{format:?} is not known"))),
        None => Err(place.name("format").invalid("must be a text")),
    }
}

fn multiple(value: &Value, place: &Place<'_>) -> Result<(), Refusal> {
    if value.as_f64().is_none_or(|value| value <= 0.0) {
        return Err(place.name("multipleOf").invalid("must be a number above 0"));
    }
    let digits = value.to_string().replace('.', "");
    if digits.parse::<u64>().is_ok_and(|digits| digits <= MULTIPLE_MAX) {
        return Ok(());
    }
    Err(place.unsupported("multipleOf", &format!("of more digits than those of {MULTIPLE_MAX}")))
}

/// Refuses constants that are written differently than they are given.
fn exact(value: &Value, place: &Place<'_>, keyword: &str) -> Result<(), Refusal> {
    match value {
        Value::Number(number) => {
            let whole = number.as_u64().or(number.as_i64().map(i64::unsigned_abs));
            if whole.is_some_and(|whole| whole > EXACT_MAX) {
                return Err(place.unsupported(keyword, &format!("{number} is beyond 2^53")));
            }
            Ok(())
        }
        Value::Array(values) => values.iter().try_for_each(|value| exact(value, place, keyword)),
        Value::Object(values) => values.values().try_for_each(|value| exact(value, place, keyword)),
        Value::Null | Value::Bool(_) | Value::String(_) => Ok(()),
    }
}

/// Returns whether `$schema` names a draft before 2020-12.
fn is_old(root: &Value) -> bool {
    let named = root.get("$schema").and_then(Value::as_str);
    named.is_some_and(|named| !named.contains("2020-12"))
}
