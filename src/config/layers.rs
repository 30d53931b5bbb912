//! Values by key, each with its source; a later layer replaces an earlier one's.

use std::collections::BTreeMap;
use std::path::Path;

use toml::{Table, Value};

use super::keys::{Key, keys};
use super::models::{MODEL, Sections};
use super::{Config, ConfigError, Overrides, models};
use crate::engine::KeepAlive;

pub(super) struct Layers {
    keys: Vec<Key>,
    values: BTreeMap<&'static str, (Value, String)>,
    /// Settings of single models; they come from the file only.
    pub(super) models: Sections,
    sections: Option<Value>,
}

impl Layers {
    pub(super) fn defaults() -> Self {
        let keys = keys();
        let values = keys.iter().map(|key| (key.name, (key.default.clone(), "default".into()))).collect();
        Self { keys, values, models: Sections::default(), sections: None }
    }

    pub(super) fn add_file(&mut self, path: &Path) -> Result<(), ConfigError> {
        let fault = |why: String| ConfigError::File { path: path.to_owned(), why };
        let text = std::fs::read_to_string(path).map_err(|error| fault(error.to_string()))?;
        let table: Table = text.parse().map_err(|error: toml::de::Error| fault(error.to_string()))?;
        let origin = path.display().to_string();
        for (key, value) in table {
            if key == MODEL {
                self.models = models::read(&value, &origin)?;
                self.sections = Some(value);
                continue;
            }
            let Some(known) = self.keys.iter().find(|known| known.name == key).cloned() else {
                return Err(ConfigError::UnknownKey { origin, key });
            };
            self.set(&known, value, origin.clone())?;
        }
        Ok(())
    }

    pub(super) fn add_environment(
        &mut self,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<(), ConfigError> {
        for key in self.keys.clone() {
            let variable = format!("MLXD_{}", key.name.to_uppercase());
            if let Some(text) = env(&variable) {
                self.set(&key, key.kind.read(&text), variable)?;
            }
        }
        Ok(())
    }

    pub(super) fn add_flags(&mut self, overrides: &Overrides) -> Result<(), ConfigError> {
        // The file was read already.
        let Overrides { config_file: _, socket, model_roots, models, listen, token_file, log_format } =
            overrides;
        let path = |path: &Path| path.to_str().map(|text| Value::String(text.to_owned()));
        let text = |text: String| Some(Value::String(text));
        let roots: Option<Vec<Value>> = model_roots.iter().map(|root| path(root)).collect();
        let models = models.iter().cloned().filter_map(text).collect::<Vec<_>>();
        let given = [
            ("socket", socket.as_deref().map(path)),
            ("token_file", token_file.as_deref().map(path)),
            ("listen", listen.map(|address| text(address.to_string()))),
            ("log_format", log_format.map(|format| text(format.as_str().to_owned()))),
            ("model_roots", (!model_roots.is_empty()).then(|| roots.map(Value::Array))),
            ("models", (!models.is_empty()).then_some(Some(Value::Array(models)))),
        ];
        for (name, value) in given {
            let Some(value) = value else { continue };
            let origin = format!("--{}", name.replace('_', "-"));
            let Some(key) = self.keys.iter().find(|key| key.name == name).cloned() else { continue };
            let Some(value) = value else {
                return Err(ConfigError::Value { origin, key: key.name, why: "is not UTF-8".into() });
            };
            self.set(&key, value, origin)?;
        }
        Ok(())
    }

    fn set(&mut self, key: &Key, value: Value, origin: String) -> Result<(), ConfigError> {
        if let Some(why) = key.kind.refuses(&value) {
            return Err(ConfigError::Value { origin, key: key.name, why });
        }
        self.values.insert(key.name, (value, origin));
        Ok(())
    }

    /// Returns an error that names the source of the key's value.
    pub(super) fn refuse(&self, key: &'static str, why: &str) -> ConfigError {
        let origin = self.values.get(key).map_or_else(String::new, |(_, origin)| origin.clone());
        ConfigError::Value { origin, key, why: why.to_owned() }
    }

    /// Returns the values in force, by key, and the sections of single models.
    pub(super) fn values(&self) -> BTreeMap<&'static str, Value> {
        let keys = self.values.iter().map(|(key, (value, _))| (*key, value.clone()));
        keys.chain(self.sections.clone().map(|sections| (MODEL, sections))).collect()
    }

    /// Returns a key's text; `None` if it is empty.
    pub(super) fn text(&self, key: &str) -> Option<&str> {
        self.value(key).and_then(Value::as_str).filter(|text| !text.is_empty())
    }

    /// Returns a key's stay; `None` if it is empty.
    pub(super) fn stay(&self, key: &str) -> Option<KeepAlive> {
        // One that cannot be read was refused.
        self.value(key).and_then(|value| models::keep_alive(value).ok())
    }

    /// Sets the field of every key.
    pub(super) fn apply(&self, config: &mut Config) {
        for key in &self.keys {
            if let Some(value) = self.value(key.name) {
                key.kind.set(config, value);
            }
        }
    }

    pub(super) fn list(&self, key: &str) -> Vec<String> {
        let items = self.value(key).and_then(Value::as_array);
        items.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
    }

    fn value(&self, key: &str) -> Option<&Value> {
        debug_assert!(self.values.contains_key(key), "no key {key}");
        self.values.get(key).map(|(value, _)| value)
    }
}
