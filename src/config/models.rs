//! The sections `[model."name"]` of the file: settings of single models.

use std::collections::BTreeMap;

use toml::Value;

use super::ConfigError;
use crate::engine::{KeepAlive, ModelSettings};
use crate::ids::ModelName;

/// The table of settings of single models, which is not a key.
pub(super) const MODEL: &str = "model";

/// Reads the table of all sections.
pub(super) fn read(value: &Value, origin: &str) -> Result<BTreeMap<ModelName, ModelSettings>, ConfigError> {
    let refuse = |why: String| ConfigError::Value { origin: origin.to_owned(), key: MODEL, why };
    let sections = value.as_table().ok_or_else(|| refuse("must be sections [model.\"name\"]".into()))?;
    let mut models = BTreeMap::new();
    for (name, section) in sections {
        let section = section.as_table().ok_or_else(|| refuse(format!("{name:?} must be a section")))?;
        let mut settings = ModelSettings::default();
        for (key, value) in section {
            match (key.as_str(), value) {
                ("keep_alive", value) => {
                    let read = keep_alive(value).map_err(|why| refuse(format!("{name:?}: keep_alive {why}")));
                    settings.keep_alive = Some(read?);
                }
                ("pin", Value::Boolean(pin)) => settings.pin = *pin,
                ("pin", _) => return Err(refuse(format!("{name:?}: pin must be true or false"))),
                _ => {
                    let key = format!("{MODEL}.{name:?}.{key}");
                    return Err(ConfigError::UnknownKey { origin: origin.to_owned(), key });
                }
            }
        }
        models.insert(name.as_str().into(), settings);
    }
    Ok(models)
}

/// Reads a stay, which is text or a number of seconds.
pub(super) fn keep_alive(value: &Value) -> Result<KeepAlive, String> {
    let text = match value {
        Value::Integer(seconds) => seconds.to_string(),
        Value::String(text) => text.clone(),
        _ => return Err("must be text or a number of seconds".into()),
    };
    text.parse().map_err(|error: crate::engine::NotAKeepAlive| error.to_string())
}
