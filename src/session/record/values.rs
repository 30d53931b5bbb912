//! JSON objects as bytes, exactly: numbers keep their bits and keys their order. A text of them would be
//! parsed to a number beside the one that was written, and a template would write the past differently.

use serde_json::{Map, Number, Value};

use crate::session::message::VALUE_BYTES;

/// Depth of a value; parsers of JSON allow no more than 128.
const DEPTH_MAX: usize = 256;

const NULL: u8 = 0;
const FALSE: u8 = 1;
const TRUE: u8 = 2;
const UNSIGNED: u8 = 3;
const SIGNED: u8 = 4;
const FLOAT: u8 = 5;
const TEXT: u8 = 6;
const LIST: u8 = 7;
const OBJECT: u8 = 8;

/// Returns the bytes of an object.
pub(super) fn to_bytes(object: &Map<String, Value>) -> Vec<u8> {
    let mut bytes = Vec::new();
    put_object(&mut bytes, object);
    bytes
}

/// Returns the object that the bytes are; none if they are anything else.
pub(super) fn from_bytes(mut bytes: &[u8]) -> Option<Map<String, Value>> {
    let object = take_object(&mut bytes, DEPTH_MAX)?;
    bytes.is_empty().then_some(object)
}

/// Returns what the object that the bytes are is charged with, as `object_bytes` counts, without making it;
/// none if they are anything else.
pub(super) fn charge(mut bytes: &[u8]) -> Option<usize> {
    let charge = skip_object(&mut bytes, DEPTH_MAX)?;
    bytes.is_empty().then_some(charge)
}

fn skip_object(bytes: &mut &[u8], depth: usize) -> Option<usize> {
    let mut charge = 0;
    for _ in 0..take_size(bytes)? {
        charge += skip_text(bytes)? + skip_value(bytes, depth)?;
    }
    Some(charge)
}

fn skip_value(bytes: &mut &[u8], depth: usize) -> Option<usize> {
    let depth = depth.checked_sub(1)?;
    let (kind, rest) = bytes.split_first()?;
    *bytes = rest;
    let content = match *kind {
        NULL | FALSE | TRUE => 0,
        UNSIGNED | SIGNED | FLOAT => take_array::<8>(bytes).map(|_| 0)?,
        TEXT => skip_text(bytes)?,
        LIST => {
            let mut charge = 0;
            for _ in 0..take_size(bytes)? {
                charge += skip_value(bytes, depth)?;
            }
            charge
        }
        OBJECT => skip_object(bytes, depth)?,
        _ => return None,
    };
    Some(VALUE_BYTES + content)
}

fn skip_text(bytes: &mut &[u8]) -> Option<usize> {
    let size = usize::try_from(take_size(bytes)?).ok()?;
    *bytes = bytes.get(size..)?;
    Some(size)
}

fn put_object(bytes: &mut Vec<u8>, object: &Map<String, Value>) {
    put_size(bytes, object.len());
    for (key, value) in object {
        put_text(bytes, key);
        put_value(bytes, value);
    }
}

fn put_value(bytes: &mut Vec<u8>, value: &Value) {
    match value {
        Value::Null => bytes.push(NULL),
        Value::Bool(value) => bytes.push(if *value { TRUE } else { FALSE }),
        Value::Number(number) => put_number(bytes, number),
        Value::String(text) => {
            bytes.push(TEXT);
            put_text(bytes, text);
        }
        Value::Array(values) => {
            bytes.push(LIST);
            put_size(bytes, values.len());
            values.iter().for_each(|value| put_value(bytes, value));
        }
        Value::Object(object) => {
            bytes.push(OBJECT);
            put_object(bytes, object);
        }
    }
}

fn put_number(bytes: &mut Vec<u8>, number: &Number) {
    let (kind, bits) = if let Some(number) = number.as_u64() {
        (UNSIGNED, number.to_le_bytes())
    } else if let Some(number) = number.as_i64() {
        (SIGNED, number.to_le_bytes())
    } else {
        (FLOAT, number.as_f64().unwrap_or_default().to_le_bytes())
    };
    bytes.push(kind);
    bytes.extend(bits);
}

fn put_text(bytes: &mut Vec<u8>, text: &str) {
    put_size(bytes, text.len());
    bytes.extend(text.as_bytes());
}

fn put_size(bytes: &mut Vec<u8>, size: usize) {
    bytes.extend((size as u64).to_le_bytes());
}

fn take_object(bytes: &mut &[u8], depth: usize) -> Option<Map<String, Value>> {
    let mut object = Map::new();
    for _ in 0..take_size(bytes)? {
        let key = take_text(bytes)?;
        object.insert(key, take_value(bytes, depth)?);
    }
    Some(object)
}

fn take_value(bytes: &mut &[u8], depth: usize) -> Option<Value> {
    let depth = depth.checked_sub(1)?;
    let (kind, rest) = bytes.split_first()?;
    *bytes = rest;
    Some(match *kind {
        NULL => Value::Null,
        FALSE => false.into(),
        TRUE => true.into(),
        UNSIGNED => u64::from_le_bytes(take_array(bytes)?).into(),
        SIGNED => i64::from_le_bytes(take_array(bytes)?).into(),
        FLOAT => Number::from_f64(f64::from_le_bytes(take_array(bytes)?))?.into(),
        TEXT => take_text(bytes)?.into(),
        // Items are at least a byte: the list cannot become longer than the bytes.
        LIST => {
            let size = take_size(bytes)?;
            let values: Option<Vec<Value>> = (0..size).map(|_| take_value(bytes, depth)).collect();
            values?.into()
        }
        OBJECT => take_object(bytes, depth)?.into(),
        _ => return None,
    })
}

fn take_text(bytes: &mut &[u8]) -> Option<String> {
    let size = usize::try_from(take_size(bytes)?).ok()?;
    let (text, rest) = bytes.split_at_checked(size)?;
    *bytes = rest;
    std::str::from_utf8(text).ok().map(str::to_owned)
}

fn take_size(bytes: &mut &[u8]) -> Option<u64> {
    take_array(bytes).map(u64::from_le_bytes)
}

fn take_array<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (array, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(*array)
}
