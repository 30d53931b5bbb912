//! Rotary embedding as a config describes it: in `rope_parameters`, as transformers 5 writes it, or in keys
//! of their own. As there, `rope_scaling` takes precedence over `rope_parameters`, and what stands in either
//! over the keys beside it.

use serde_json::{Map, Value};

use super::OpenError;
use super::given::{Given, invalid};

/// A rotation. What the config does not say is None.
#[derive(Clone, Debug)]
pub(super) struct Rotation {
    /// Base of the frequencies.
    pub(super) theta: Option<f64>,
    /// Part of a head that is rotated.
    pub(super) part: Option<f64>,
    /// Kind of scaling, with its parameters; null without one.
    pub(super) scaling: Value,
}

impl Rotation {
    /// Whether nothing is scaled.
    pub(super) fn is_plain(&self) -> bool {
        let kind = self.scaling.get("rope_type").or_else(|| self.scaling.get("type"));
        kind.is_none_or(|kind| kind == "default")
    }

    /// Reads the rotation of a model that has one.
    pub(super) fn read(given: &Given<'_>) -> Result<Self, OpenError> {
        let (name, of) = match object(given, "rope_scaling")? {
            Some(scaling) => ("rope_scaling", Some(scaling)),
            None => ("rope_parameters", object(given, "rope_parameters")?),
        };
        if let Some((kind, _)) = of.into_iter().flatten().find(|(_, value)| value.is_object()) {
            return invalid(format!("{name}.{kind}: this architecture has one rotation for all layers"));
        }
        Self::of(given, name, of)
    }

    /// Reads the rotation of a kind of layers, which `rope_parameters` names: with the keys beside it, or by
    /// itself; None if it does not name this kind.
    pub(super) fn of_kind(given: &Given<'_>, kind: &str) -> Result<Option<Self>, OpenError> {
        let Some(kinds) = object(given, "rope_parameters")? else { return Ok(None) };
        if let Some((key, _)) = kinds.iter().find(|(_, value)| !value.is_object()) {
            return invalid(format!(
                "rope_parameters.{key}: this architecture has a rotation by kind of layer"
            ));
        }
        let Some(of) = kinds.get(kind).and_then(Value::as_object) else { return Ok(None) };
        let name = format!("rope_parameters.{kind}");
        let scaling = Value::Object(of.clone());
        Ok(Some(Self { theta: number(&name, of, "rope_theta")?, part: None, scaling }))
    }

    fn of(given: &Given<'_>, name: &str, of: Option<&Map<String, Value>>) -> Result<Self, OpenError> {
        let empty = Map::new();
        let (inner, scaling) = (of.unwrap_or(&empty), of.cloned().map_or(Value::Null, Value::Object));
        let beside = |key: &'static str| match given.get(key) {
            Some(Value::Null) if key == "rope_theta" => invalid("rope_theta is null"),
            None | Some(Value::Null) => Ok(None),
            Some(value) => as_number(key, value).map(Some),
        };
        let theta = number(name, inner, "rope_theta")?;
        let part = number(name, inner, "partial_rotary_factor")?;
        Ok(Self {
            theta: theta.map_or_else(|| beside("rope_theta"), |theta| Ok(Some(theta)))?,
            part: part.map_or_else(|| beside("partial_rotary_factor"), |part| Ok(Some(part)))?,
            scaling,
        })
    }
}

/// Returns an object that has something in it.
fn object<'a>(given: &Given<'a>, name: &'static str) -> Result<Option<&'a Map<String, Value>>, OpenError> {
    match given.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Object(of)) => Ok(Some(of).filter(|of| !of.is_empty())),
        Some(other) => invalid(format!("{name} is {other}, not an object")),
    }
}

fn number(name: &str, of: &Map<String, Value>, key: &str) -> Result<Option<f64>, OpenError> {
    of.get(key).map(|value| as_number(&format!("{name}.{key}"), value)).transpose()
}

fn as_number(name: &str, value: &Value) -> Result<f64, OpenError> {
    value.as_f64().map_or_else(|| invalid(format!("{name} is {value}, not a number")), Ok)
}
