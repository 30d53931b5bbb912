//! A schema that is checked becomes one that llguidance reads right: the alternatives of a oneOf stand in it,
//! for only so it sees whether they exclude each other, and dates are those of the calendar.

use llguidance::JsonCompileOptions;
use serde_json::{Value, json};

use super::cost::bytes;
use super::keywords::{ANNOTATIONS, within_mut};
use super::{GrammarLimits, Refusal};

/// Dates, times and both, more exactly than llguidance has them: leap days are those of the calendar, leap
/// seconds do not occur, and years are from 1000 on. It is a part of RFC 3339.
const DATE: &str = concat!(
    "(?:[1-9][0-9]{3}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)",
    "|02-(?:0[1-9]|1[0-9]|2[0-8]))",
    "|(?:[1-9][0-9](?:0[48]|[2468][048]|[13579][26])|(?:[2468][048]|[13579][26])00)-02-29)"
);
const TIME: &str = concat!(
    r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?",
    "(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
);

/// The white space between the parts of JSON. A model that has nothing to say would go on with it forever.
const JSON_SPACE: &str = r"[\x20\x0A\x0D\x09]{1,128}";

/// Rewrites a schema.
///
/// # Errors
/// With what its oneOfs refer to it exceeds the limit of its size.
pub(super) fn rewritten(mut schema: Value, limits: &GrammarLimits) -> Result<Value, Refusal> {
    let root = schema.clone();
    let mut left = limits.bytes_max as u64;
    inline(&mut schema, &root, &mut left).map_err(|TooMany| Refusal::TooLarge {
        limit: "grammar_bytes_max",
        value: limits.bytes_max as u64,
    })?;
    sharpen(&mut schema);
    Ok(schema)
}

/// More bytes than are left.
struct TooMany;

/// Replaces the references among the alternatives of every oneOf by what they refer to, once each.
fn inline(schema: &mut Value, root: &Value, left: &mut u64) -> Result<(), TooMany> {
    for (keyword, schema) in within_mut(schema) {
        match target(schema, root).filter(|_| keyword == "oneOf") {
            Some(target) => {
                *left = left.checked_sub(bytes(target)).ok_or(TooMany)?;
                *schema = target.clone();
            }
            None => inline(schema, root, left)?,
        }
    }
    Ok(())
}

/// Returns what a schema that is only a reference refers to.
fn target<'a>(schema: &Value, root: &'a Value) -> Option<&'a Value> {
    let keywords = schema.as_object()?;
    let only = keywords.keys().all(|keyword| keyword == "$ref" || ANNOTATIONS.contains(&keyword.as_str()));
    let pointer = keywords.get("$ref")?.as_str()?.strip_prefix('#').filter(|_| only)?;
    root.pointer(pointer).filter(|target| target.get("$ref").is_none())
}

/// Writes formats as patterns where llguidance takes more than the format is.
fn sharpen(schema: &mut Value) {
    let Value::Object(keywords) = schema else { return };
    let pattern = match keywords.get("format").and_then(Value::as_str) {
        Some("date") => Some(format!("^{DATE}$")),
        Some("time") => Some(format!("^{TIME}$")),
        Some("date-time") => Some(format!("^{DATE}T{TIME}$")),
        _ => None,
    };
    if let Some(pattern) = pattern {
        keywords.remove("format");
        if keywords.contains_key("pattern") {
            let all = keywords.entry("allOf").or_insert_with(|| Value::Array(Vec::new()));
            all.as_array_mut().into_iter().for_each(|all| all.push(json!({ "pattern": pattern })));
        } else {
            keywords.insert("pattern".to_owned(), pattern.into());
        }
    }
    within_mut(schema).for_each(|(_, schema)| sharpen(schema));
}

/// Returns a schema that is checked, with the white space that there may be.
pub(super) fn spaced(mut schema: Value) -> Value {
    let options = JsonCompileOptions {
        whitespace_pattern: Some(JSON_SPACE.to_owned()),
        ..JsonCompileOptions::default()
    };
    if schema.is_object() {
        options.apply_to(&mut schema);
    }
    schema
}
