//! JSON in the wire's messages: `google.protobuf.Struct`, and texts that must be JSON objects.

use prost_types::{Struct, value::Kind};
use serde_json::{Map, Number, Value};

use crate::error::Error;

/// Largest whole number that f64 holds exactly; those up to here are written without a fraction.
const WHOLE_MAX: f64 = 9_007_199_254_740_992.0;

/// Parses a text that must be a JSON object; an empty text and `null` are an empty object.
pub(super) fn object(path: &str, text: &str) -> Result<Map<String, Value>, Error> {
    if text.trim().is_empty() {
        return Ok(Map::new());
    }
    match serde_json::from_str(text) {
        Ok(Value::Null) => Ok(Map::new()),
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(Error::field(path, "must be a JSON object")),
        Err(error) => Err(Error::field(path, format!("is not JSON: {error}"))),
    }
}

/// Converts a Struct to a JSON object. prost bounds its depth.
pub(super) fn from_struct(path: &str, value: Struct) -> Result<Map<String, Value>, Error> {
    value.fields.into_iter().map(|(key, value)| Ok((key, from_value(path, value.kind)?))).collect()
}

fn from_value(path: &str, kind: Option<Kind>) -> Result<Value, Error> {
    Ok(match kind {
        None | Some(Kind::NullValue(_)) => Value::Null,
        Some(Kind::BoolValue(value)) => Value::Bool(value),
        Some(Kind::StringValue(text)) => Value::String(text),
        Some(Kind::NumberValue(number)) => Value::Number(from_number(path, number)?),
        Some(Kind::StructValue(fields)) => Value::Object(from_struct(path, fields)?),
        Some(Kind::ListValue(list)) => {
            let items = list.values.into_iter().map(|value| from_value(path, value.kind));
            Value::Array(items.collect::<Result<_, _>>()?)
        }
    })
}

fn from_number(path: &str, number: f64) -> Result<Number, Error> {
    if number.fract() == 0.0 && number.abs() <= WHOLE_MAX {
        #[allow(clippy::cast_possible_truncation, reason = "whole and within i64")]
        return Ok(Number::from(number as i64));
    }
    Number::from_f64(number).ok_or_else(|| Error::field(path, "numbers must be finite"))
}
