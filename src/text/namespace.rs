//! Jinja2's `namespace`: an object whose attributes a template sets, and which is equal only to itself.
//!
//! minijinja's own is a mapping. In one that contains itself (`{% set ns.a = ns %}`) comparisons and texts
//! would recurse without end. `statements` writes `set` as a call of [`SET`].

use std::cmp::Ordering;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::refusal::refuse;
use minijinja::value::{DynObject, Kwargs, Object, ObjectRepr, Value as Jinja};
use minijinja::{Environment, Error, State};

/// The function that stands for `{% set ns.name = value %}`.
pub(super) const SET: &str = "set_attribute__";

/// Attributes in the order in which they were set first.
#[derive(Default)]
pub(super) struct Namespace(Mutex<Vec<(String, Jinja)>>);

/// All namespaces of a render.
#[derive(Default)]
struct Namespaces(Vec<Arc<Namespace>>);

/// Adds the functions.
pub(super) fn add(environment: &mut Environment<'static>) {
    environment.add_function("namespace", namespace);
    environment.add_function(SET, set);
}

#[expect(clippy::needless_pass_by_value, reason = "minijinja passes arguments by value")]
fn namespace(state: &mut State, given: Option<&Jinja>, named: Kwargs) -> Result<Jinja, Error> {
    let namespace = Arc::new(Namespace::default());
    if let Some(given) = given {
        for key in given.try_iter()? {
            let name = key.as_str().ok_or_else(|| refuse("the names in a namespace are texts"))?;
            namespace.put(name, given.get_item(&key)?);
        }
    }
    for name in named.args() {
        namespace.put(name, named.get(name)?);
    }
    state.get_or_insert_extension(Namespaces::default()).0.push(Arc::clone(&namespace));
    Ok(Jinja::from_dyn_object(namespace))
}

fn set(target: &Jinja, name: &str, value: &Jinja) -> Result<(), Error> {
    let namespace = target.downcast_object_ref::<Namespace>();
    let namespace = namespace.ok_or_else(|| refuse("only a namespace's attributes can be set"))?;
    namespace.put(name, value.clone());
    Ok(())
}

impl Namespace {
    fn attributes(&self) -> MutexGuard<'_, Vec<(String, Jinja)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, name: &str, value: Jinja) {
        let mut attributes = self.attributes();
        let old = match attributes.iter_mut().find(|(known, _)| known == name) {
            Some((_, known)) => std::mem::replace(known, value),
            None => {
                attributes.push((name.to_owned(), value));
                return;
            }
        };
        drop(attributes);
        // Its end may be that of other namespaces.
        drop(old);
    }

    /// Returns the attributes for printing.
    pub(super) fn pairs(&self) -> Vec<(String, Jinja)> {
        self.attributes().clone()
    }
}

impl Object for Namespace {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn get_value(self: &Arc<Self>, key: &Jinja) -> Option<Jinja> {
        let name = key.as_str()?;
        self.attributes().iter().find(|(known, _)| known == name).map(|(_, value)| value.clone())
    }

    fn custom_cmp(self: &Arc<Self>, other: &DynObject) -> Option<Ordering> {
        Some(Arc::as_ptr(self).cmp(&std::ptr::from_ref(other.downcast_ref::<Self>()?)))
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

impl fmt::Debug for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<Namespace>")
    }
}

impl Drop for Namespaces {
    /// Empties them: one that contains itself would never be freed, and a long chain by recursion.
    fn drop(&mut self) {
        for namespace in &self.0 {
            let attributes = std::mem::take(&mut *namespace.attributes());
            drop(attributes);
        }
    }
}
