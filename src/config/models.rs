//! The sections `[model."name"]` of the file: settings of single models.

use std::collections::BTreeMap;

use toml::Value;

use super::ConfigError;
use crate::engine::{KeepAlive, ModelSettings};
use crate::hub::{FormChoice, FormSettings};
use crate::ids::ModelName;
use crate::output::{Format, Reasoning};

/// The table of settings of single models, which is not a key.
pub(super) const MODEL: &str = "model";

/// What the sections say of each model.
#[derive(Default)]
pub(super) struct Sections {
    pub(super) settings: BTreeMap<ModelName, ModelSettings>,
    pub(super) forms: BTreeMap<ModelName, FormSettings>,
}

/// Reads the table of all sections.
pub(super) fn read(value: &Value, origin: &str) -> Result<Sections, ConfigError> {
    let refuse = |why: String| ConfigError::Value { origin: origin.to_owned(), key: MODEL, why };
    let sections = value.as_table().ok_or_else(|| refuse("must be sections [model.\"name\"]".into()))?;
    let mut models = Sections::default();
    for (name, section) in sections {
        let section = section.as_table().ok_or_else(|| refuse(format!("{name:?} must be a section")))?;
        let (mut settings, mut forms) = (ModelSettings::default(), FormSettings::default());
        for (key, value) in section {
            match (key.as_str(), value) {
                ("keep_alive", value) => {
                    let read = keep_alive(value).map_err(|why| refuse(format!("{name:?}: keep_alive {why}")));
                    settings.keep_alive = Some(read?);
                }
                ("pin", Value::Boolean(pin)) => settings.pin = *pin,
                ("tool_format", value) => {
                    let names = Format::ALL.iter().map(|format| format.name());
                    let read = form(value, Format::from_name, names);
                    let read = read.map_err(|why| refuse(format!("{name:?}: tool_format {why}")));
                    forms.tools = Some(read?);
                }
                ("reasoning_format", value) => {
                    let names = Reasoning::ALL.iter().map(|form| form.name());
                    let read = form(value, Reasoning::from_name, names);
                    let read = read.map_err(|why| refuse(format!("{name:?}: reasoning_format {why}")));
                    forms.reasoning = Some(read?);
                }
                ("pin", _) => return Err(refuse(format!("{name:?}: pin must be true or false"))),
                _ => {
                    let key = format!("{MODEL}.{name:?}.{key}");
                    return Err(ConfigError::UnknownKey { origin: origin.to_owned(), key });
                }
            }
        }
        models.settings.insert(name.as_str().into(), settings);
        models.forms.insert(name.as_str().into(), forms);
    }
    Ok(models)
}

/// Reads the name of a form, or `none`.
fn form<T>(
    value: &Value,
    from_name: fn(&str) -> Option<T>,
    names: impl Iterator<Item = &'static str>,
) -> Result<FormChoice<T>, String> {
    let name = value.as_str();
    if name == Some("none") {
        return Ok(FormChoice::Off);
    }
    name.and_then(from_name).map(FormChoice::Is).ok_or_else(|| {
        let mut names: Vec<&str> = names.collect();
        names.sort_unstable();
        format!("must be none, or one of {}", names.join(", "))
    })
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
