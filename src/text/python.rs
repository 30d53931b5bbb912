//! Values as Python prints them: what templates written for Jinja2 rely on.

use minijinja::value::Value as Jinja;
use serde_json::Value;

/// A JSON value as a template sees it.
pub(super) fn from_json(value: &Value) -> Jinja {
    match value {
        Value::Null => Jinja::from(()),
        Value::Bool(value) => Jinja::from(*value),
        Value::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
            (Some(number), _, _) => Jinja::from(number),
            (_, Some(number), _) => Jinja::from(number),
            (_, _, number) => Jinja::from(number.unwrap_or(f64::NAN)),
        },
        Value::String(text) => Jinja::from(text.as_str()),
        Value::Array(values) => values.iter().map(from_json).collect(),
        Value::Object(map) => map.iter().map(|(key, value)| (key.as_str(), from_json(value))).collect(),
    }
}

pub(super) fn str(value: &Jinja) -> String {
    value.to_string()
}

pub(super) fn tojson(value: &Jinja) -> String {
    value.to_string()
}
