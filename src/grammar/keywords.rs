//! The keywords of JSON schema that tell where there are schemas in a schema.

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
