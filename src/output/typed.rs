//! Gives arguments that stand as bare text between tags the type that the tool's schema says.
//!
//! The rules are those of vLLM's, SGLang's and mlx-lm's parsers where they agree: `null` is null, and a
//! number without a fraction an integer. A text that fits no type is what it is as JSON or Python, or else a
//! string.

use serde_json::{Number, Value};

use super::python;

/// Levels of `anyOf`, `oneOf`, `allOf` and `$ref` that are looked into.
const NESTING_MAX: usize = 8;
/// Schemas that are looked into for one argument.
const SCHEMAS_MAX: usize = 1000;

/// The types that an argument's schema allows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Types {
    integer: bool,
    number: bool,
    boolean: bool,
    structure: bool,
    string: bool,
    null: bool,
}

impl Types {
    /// Returns the types of a schema within `root`, to which its references lead.
    pub(super) fn of(schema: &Value, root: &Value) -> Self {
        let mut types = Self::default();
        for schema in reached(schema, root) {
            types.add(schema);
        }
        types
    }

    fn add(&mut self, schema: &Value) {
        match &schema["type"] {
            Value::String(name) => self.add_name(name),
            Value::Array(names) => {
                names.iter().filter_map(Value::as_str).for_each(|name| self.add_name(name));
            }
            _ => {}
        }
        for value in listed(schema) {
            match value {
                Value::Null => self.null = true,
                Value::Bool(_) => self.boolean = true,
                Value::Number(number) if number.is_f64() => self.number = true,
                Value::Number(_) => self.integer = true,
                Value::String(_) => self.string = true,
                Value::Array(_) | Value::Object(_) => self.structure = true,
            }
        }
        self.structure |= schema.get("properties").is_some() || schema.get("items").is_some();
    }

    fn add_name(&mut self, name: &str) {
        match name.to_ascii_lowercase().as_str() {
            "integer" | "int" => self.integer = true,
            "number" | "float" | "double" => self.number = true,
            "boolean" | "bool" => self.boolean = true,
            "object" | "array" | "dict" | "list" => self.structure = true,
            "string" | "str" | "text" => self.string = true,
            "null" | "none" => self.null = true,
            _ => {}
        }
    }

    /// Whether the schema says nothing about the type.
    fn silent(self) -> bool {
        self == Self::default()
    }

    /// Whether only a string fits.
    pub(super) fn only_string(self) -> bool {
        self.string && self == Self { string: true, ..Self::default() }
    }

    /// Whether only numbers, booleans and null fit.
    pub(super) fn only_scalars(self) -> bool {
        !self.takes_text() && !self.structure
    }

    /// Whether only strings and null fit, or what they are is open.
    pub(super) fn string_or_null(self) -> bool {
        self.silent() || self.string && self == Self { string: true, null: self.null, ..Self::default() }
    }

    /// Whether null fits.
    pub(super) fn nullable(self) -> bool {
        self.null
    }

    /// Whether any text fits, as a string if as nothing else.
    pub(super) fn takes_text(self) -> bool {
        self.string || self.silent()
    }
}

/// Returns the values that a schema lists.
pub(super) fn listed(schema: &Value) -> impl Iterator<Item = &Value> {
    schema["enum"].as_array().into_iter().flatten().chain(schema.get("const"))
}

/// Returns the schemas that say what a value is: the schema, those that it combines, and those that it refers
/// to within `root`. Both are bounded.
pub(super) fn reached<'a>(schema: &'a Value, root: &'a Value) -> Vec<&'a Value> {
    let mut reached = vec![(schema, 0)];
    let mut at = 0;
    while let Some((schema, level)) = reached.get(at).copied() {
        at += 1;
        if level == NESTING_MAX {
            continue;
        }
        let choices = ["anyOf", "oneOf", "allOf"].iter().filter_map(|key| schema[*key].as_array()).flatten();
        let pointer = schema["$ref"].as_str().and_then(|reference| reference.strip_prefix('#'));
        let room = SCHEMAS_MAX.saturating_sub(reached.len());
        let target = pointer.and_then(|pointer| root.pointer(pointer));
        reached.extend(choices.chain(target).take(room).map(|schema| (schema, level + 1)));
    }
    reached.into_iter().map(|(schema, _)| schema).collect()
}

/// Returns the value that a text is, by the schema of the argument within `root`, if the tool has one for it.
/// Where the schema says nothing, a text that is JSON is that if `guess`; otherwise only an object or a list
/// is.
pub(super) fn value(text: &str, schema: Option<&Value>, root: &Value, guess: bool) -> Value {
    let types = schema.map(|schema| Types::of(schema, root)).unwrap_or_default();
    let word = text.trim();
    if guess && types.only_string() {
        return text.into();
    }
    if word.eq_ignore_ascii_case("null") || types.null && word.eq_ignore_ascii_case("none") {
        return Value::Null;
    }
    if types.only_string() {
        return text.into();
    }
    if types.silent() && !guess {
        let json = schema.and_then(|_| serde_json::from_str::<Value>(word).ok());
        return json.filter(|json| json.is_object() || json.is_array()).unwrap_or_else(|| text.into());
    }
    let fits = fitting(word, types);
    fits.or_else(|| (!types.string).then(|| literal(word)).flatten()).unwrap_or_else(|| text.into())
}

/// Returns the value if the text is of one of the types; of several, the narrowest.
fn fitting(word: &str, types: Types) -> Option<Value> {
    let number = || number(word).filter(|number| types.number || !number.is_f64());
    let number = (types.integer || types.number).then(number).flatten();
    let boolean = || boolean(word).filter(|_| types.boolean).map(Value::Bool);
    let structure =
        || literal(word).filter(|value| types.structure && (value.is_object() || value.is_array()));
    number.map(Value::Number).or_else(boolean).or_else(structure)
}

/// Returns a number; one without a fraction as an integer.
fn number(word: &str) -> Option<Number> {
    if let Ok(number) = word.parse::<i64>() {
        return Some(number.into());
    }
    if let Ok(number) = word.parse::<u64>() {
        return Some(number.into());
    }
    let number = word.parse::<f64>().ok().filter(|number| number.is_finite())?;
    // Every integer below 2^53 is a float and prints as itself.
    let whole = number.fract() == 0.0 && number.abs() < 9_007_199_254_740_992.0;
    let integer = whole.then(|| format!("{number:.0}").parse::<i64>().ok()).flatten();
    integer.map(Number::from).or_else(|| Number::from_f64(number))
}

fn boolean(word: &str) -> Option<bool> {
    match word.to_ascii_lowercase().as_str() {
        "true" | "1" | "yes" | "on" => Some(true),
        "false" | "0" | "no" | "off" => Some(false),
        _ => None,
    }
}

/// Returns what a text is as JSON, or else as a Python literal.
fn literal(word: &str) -> Option<Value> {
    serde_json::from_str(word).ok().or_else(|| python::literal(word))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_text_has_the_type_of_the_schema() {
        let cases = [
            ("5", json!({ "type": "integer" }), json!(5)),
            ("5.0", json!({ "type": "integer" }), json!(5)),
            ("5.5", json!({ "type": "integer" }), json!(5.5)),
            ("five", json!({ "type": "integer" }), json!("five")),
            ("5.0", json!({ "type": "number" }), json!(5)),
            ("1e400", json!({ "type": "number" }), json!("1e400")),
            ("18446744073709551615", json!({ "type": "integer" }), json!(u64::MAX)),
            ("True", json!({ "type": "boolean" }), json!(true)),
            ("007", json!({ "type": "string" }), json!("007")),
            (" a \n", json!({ "type": "string" }), json!(" a \n")),
            ("[1, 2]", json!({ "type": "array" }), json!([1, 2])),
            ("{'a': True}", json!({ "type": "object" }), json!({ "a": true })),
            ("{broken", json!({ "type": "object" }), json!("{broken")),
            ("null", json!({ "type": "integer" }), json!(null)),
            ("7", json!({ "type": ["string", "integer"] }), json!(7)),
            ("x", json!({ "anyOf": [{ "type": "null" }, { "type": "string" }] }), json!("x")),
            ("none", json!({ "anyOf": [{ "type": "null" }, { "type": "integer" }] }), json!(null)),
            ("2", json!({ "enum": [1, 2] }), json!(2)),
            ("2", json!({}), json!("2")),
        ];
        for (text, schema, wanted) in cases {
            assert_eq!(value(text, Some(&schema), &json!(null), false), wanted, "{text} {schema}");
        }
        assert_eq!(value("2", None, &json!(null), false), json!("2"));
        assert_eq!(value("2", None, &json!(null), true), json!(2));
        assert_eq!(value("two", None, &json!(null), true), json!("two"));
        assert_eq!(value("null", Some(&json!({ "type": "string" })), &json!(null), true), json!("null"));
        assert_eq!(value("{\"a\": 1}", Some(&json!({})), &json!(null), false), json!({ "a": 1 }));
    }

    #[test]
    fn references_lead_to_the_type() {
        let root = json!({ "$defs": {
            "place": { "type": "object", "properties": {} },
            "count": { "allOf": [{ "$ref": "#/$defs/integer" }] },
            "integer": { "type": "integer" },
            "loop": { "anyOf": [{ "$ref": "#/$defs/loop" }, { "$ref": "#/$defs/loop" }] },
        } });
        let read = |text: &str, name: &str| {
            value(text, Some(&json!({ "$ref": format!("#/$defs/{name}") })), &root, false)
        };
        assert_eq!(read("{\"city\": \"Paris\"}", "place"), json!({ "city": "Paris" }));
        assert_eq!(read("5", "count"), json!(5));
        assert_eq!(read("5", "loop"), json!("5"));
        assert_eq!(read("5", "nowhere"), json!("5"));
    }
}
