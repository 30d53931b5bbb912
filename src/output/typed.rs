//! Gives arguments that stand as bare text between tags the type that the tool's schema says.
//!
//! The rules are those of vLLM's, SGLang's and mlx-lm's parsers where they agree: `null` is null, and a
//! number without a fraction an integer. A text that fits no type is what it is as JSON or Python, or else a
//! string.

use serde_json::{Number, Value};

use super::python;

/// Levels of `anyOf`, `oneOf` and `allOf` that are looked into.
const NESTING_MAX: usize = 8;

/// The types that a schema allows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Types {
    integer: bool,
    number: bool,
    boolean: bool,
    structure: bool,
    string: bool,
    null: bool,
}

impl Types {
    fn of(schema: &Value) -> Self {
        let mut types = Self::default();
        types.add(schema, NESTING_MAX);
        types
    }

    fn add(&mut self, schema: &Value, levels: usize) {
        match &schema["type"] {
            Value::String(name) => self.add_name(name),
            Value::Array(names) => {
                names.iter().filter_map(Value::as_str).for_each(|name| self.add_name(name));
            }
            _ => {}
        }
        for value in schema["enum"].as_array().into_iter().flatten().chain(schema.get("const")) {
            match value {
                Value::Null => self.null = true,
                Value::Bool(_) => self.boolean = true,
                Value::Number(number) if number.is_f64() => self.number = true,
                Value::Number(_) => self.integer = true,
                Value::String(_) => self.string = true,
                Value::Array(_) | Value::Object(_) => self.structure = true,
            }
        }
        for key in ["anyOf", "oneOf", "allOf"] {
            let choices = schema[key].as_array().filter(|_| levels > 0);
            choices.into_iter().flatten().for_each(|choice| self.add(choice, levels - 1));
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
}

/// Returns the value that a text is, by the schema of the argument if the tool has one for it. Where the
/// schema says nothing, a text that is JSON is that if `guess`, and a string otherwise.
pub(super) fn value(text: &str, schema: Option<&Value>, guess: bool) -> Value {
    let types = schema.map(Types::of).unwrap_or_default();
    let word = text.trim();
    let only_string = types.string && types == Types { string: true, ..Types::default() };
    if guess && only_string {
        return text.into();
    }
    if word.eq_ignore_ascii_case("null") || types.null && word.eq_ignore_ascii_case("none") {
        return Value::Null;
    }
    if only_string || types.silent() && !guess {
        return text.into();
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
            assert_eq!(value(text, Some(&schema), false), wanted, "{text} {schema}");
        }
        assert_eq!(value("2", None, false), json!("2"));
        assert_eq!(value("2", None, true), json!(2));
        assert_eq!(value("two", None, true), json!("two"));
        assert_eq!(value("null", Some(&json!({ "type": "string" })), true), json!("null"));
    }
}
