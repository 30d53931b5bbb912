//! config.json as an architecture reads it: every complaint names its key, and keys that are left out are
//! remembered, so that weights that do not fit are not blamed for what the config does not say.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;

use serde::Deserializer;
use serde::de::value::StrDeserializer;
use serde::de::{DeserializeOwned, DeserializeSeed, Error as _, IntoDeserializer, MapAccess, Visitor};
use serde_json::{Error, Value};

use super::OpenError;

/// Keys that transformers writes under the second name (its `attribute_map`).
const SYNONYMS: [(&str, &str); 2] =
    [("num_experts", "num_local_experts"), ("n_routed_experts", "num_local_experts")];

/// The text part of a config.json.
pub(super) struct Given<'a> {
    config: &'a Value,
    /// Keys that were asked for and are missing or null.
    silent: RefCell<BTreeSet<&'static str>>,
}

impl<'a> Given<'a> {
    /// Wraps a config.
    ///
    /// # Errors
    /// Two names of one key contradict each other.
    pub(super) fn new(config: &'a Value) -> Result<Self, OpenError> {
        for (name, other) in SYNONYMS {
            if let (Some(one), Some(two)) = (config.get(name), config.get(other))
                && one != two
            {
                return invalid(format!("{name} is {one} and {other} is {two}"));
            }
        }
        Ok(Self { config, silent: RefCell::default() })
    }

    /// Returns the value of a key under any of its names.
    pub(super) fn get(&self, name: &'static str) -> Option<&'a Value> {
        let mut others = SYNONYMS.iter().filter_map(|&(one, two)| match name {
            _ if name == one => Some(two),
            _ if name == two => Some(one),
            _ => None,
        });
        let value = self.config.get(name).or_else(|| others.find_map(|other| self.config.get(other)));
        if value.is_none_or(Value::is_null) {
            self.silent.borrow_mut().insert(name);
        }
        value
    }

    /// Returns all names of a key, for messages.
    pub(super) fn called(name: &str) -> String {
        let other = SYNONYMS.iter().find(|(one, two)| name == *one || name == *two);
        other.map_or_else(|| name.to_owned(), |(one, two)| format!("{one} or {two}"))
    }

    /// Reads the keys that a struct names.
    pub(super) fn parse<C: DeserializeOwned>(&self) -> Result<C, OpenError> {
        C::deserialize(Reader { given: self }).or_else(|error| {
            let why = error.to_string();
            let missing = why.strip_prefix("missing field `").and_then(|rest| rest.split('`').next());
            invalid(missing.map_or_else(|| why.clone(), |name| format!("{} is missing", Self::called(name))))
        })
    }

    /// Returns the keys that were asked for and are missing or null.
    pub(super) fn silent(self) -> Vec<&'static str> {
        self.silent.into_inner().into_iter().collect()
    }
}

/// Refuses a config that is missing something, malformed or contradictory.
pub(super) fn invalid<T>(why: impl std::fmt::Display) -> Result<T, OpenError> {
    Err(OpenError::Invalid(format!("config.json: {why}")))
}

/// Refuses an option that is not implemented.
pub(super) fn unsupported<T>(option: impl Into<String>) -> Result<T, OpenError> {
    Err(OpenError::Unsupported(format!("config.json: {}", option.into())))
}

/// Hands a struct the values of its fields.
struct Reader<'a> {
    given: &'a Given<'a>,
}

impl<'de> Deserializer<'de> for Reader<'de> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Error> {
        Err(Error::custom("only structs are read from a config"))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_map(Fields { given: self.given, fields: fields.iter(), next: Cell::new(None) })
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit
        unit_struct newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

struct Fields<'a> {
    given: &'a Given<'a>,
    fields: std::slice::Iter<'static, &'static str>,
    /// The field whose value comes next.
    next: Cell<Option<(&'static str, &'a Value)>>,
}

impl<'de> MapAccess<'de> for Fields<'de> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Error> {
        let given = self.given;
        let next = self.fields.find_map(|&name| given.get(name).map(|value| (name, value)));
        self.next.set(next);
        let key = next.map(|(name, _)| -> StrDeserializer<'static, Error> { name.into_deserializer() });
        key.map(|key| seed.deserialize(key)).transpose()
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, Error> {
        let Some((name, value)) = self.next.take() else {
            return Err(Error::custom("a value without a key"));
        };
        seed.deserialize(value).map_err(|error| match value {
            Value::Null => Error::custom(format!("{} is null", Given::called(name))),
            _ => Error::custom(format!("{name}: {error}")),
        })
    }
}
