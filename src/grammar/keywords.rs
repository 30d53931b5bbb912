//! The keywords of JSON schema that tell where there are schemas in a schema.

use serde_json::Value;

/// Keywords that describe, and are passed over.
pub(super) const ANNOTATIONS: [&str; 17] = [
    "$schema",
    "$id",
    "$anchor",
    "$comment",
    "$defs",
    "definitions",
    "title",
    "description",
    "default",
    "examples",
    "example",
    "deprecated",
    "readOnly",
    "writeOnly",
    "contentMediaType",
    "contentEncoding",
    // OpenAPI's: which of oneOf's alternatives a property tells.
    "discriminator",
];

/// Keywords whose value is a schema.
pub(super) const OF_SCHEMA: [&str; 2] = ["items", "additionalProperties"];

/// Keywords whose value is a list of schemas.
pub(super) const OF_LIST: [&str; 4] = ["allOf", "anyOf", "oneOf", "prefixItems"];

/// Keywords whose value has a schema for each name.
pub(super) const OF_NAMES: [&str; 4] = ["properties", "patternProperties", "$defs", "definitions"];

/// Returns the schemas right within a schema.
pub(super) fn within(schema: &Value) -> impl Iterator<Item = &Value> {
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

/// Returns the schemas right within a schema, each with its keyword.
pub(super) fn within_mut(schema: &mut Value) -> impl Iterator<Item = (&str, &mut Value)> {
    let keywords = schema.as_object_mut().into_iter().flatten();
    keywords.flat_map(|(keyword, value)| {
        let keyword = keyword.as_str();
        let schemas: Vec<&mut Value> = match value {
            schema if OF_SCHEMA.contains(&keyword) => vec![schema],
            Value::Array(list) if OF_LIST.contains(&keyword) => list.iter_mut().collect(),
            Value::Object(names) if OF_NAMES.contains(&keyword) => names.values_mut().collect(),
            _ => Vec::new(),
        };
        schemas.into_iter().map(move |schema| (keyword, schema))
    })
}
