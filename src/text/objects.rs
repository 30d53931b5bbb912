//! Python's objects that minijinja has as lists: ranges, views (what `items`, `keys` and `values` return) and
//! generators (what most filters of lists return); and the characters of a text, whose number minijinja does
//! not know.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use super::refusal::refuse;
use minijinja::Error;
use minijinja::value::{Enumerator, Object, ObjectExt as _, ObjectRepr, Value as Jinja, ValueIter};

/// Limit of a range's items, as in Jinja2's sandbox.
const RANGE_MAX: i64 = 100_000;

/// A range of integers.
#[derive(Debug)]
pub(super) struct Range {
    start: i64,
    stop: i64,
    step: i64,
    length: i64,
}

/// A view of a mapping.
#[derive(Debug)]
pub(super) struct View {
    /// Its name in Python.
    pub(super) name: &'static str,
    pub(super) items: Vec<Jinja>,
}

/// Items that can be iterated over once; true even if there are none, and of unknown number.
pub(super) struct Generator(Mutex<Option<ValueIter>>);

impl Generator {
    /// Returns the items that are left, and leaves them.
    pub(super) fn rest(&self) -> Vec<Jinja> {
        let mut left = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let items: Vec<Jinja> = left.take().into_iter().flatten().collect();
        *left = Jinja::from(items.clone()).try_iter().ok();
        items
    }

    /// Takes the items of a list.
    pub(super) fn of(items: &Jinja) -> Result<Jinja, Error> {
        Ok(Jinja::from_object(Self(Mutex::new(Some(items.try_iter()?)))))
    }
}

/// A text as a list of its characters, for loops.
#[derive(Debug)]
pub(super) struct Characters {
    text: Jinja,
    count: usize,
}

impl Characters {
    pub(super) fn of(text: &Jinja) -> Jinja {
        let count = text.as_str().map_or(0, |text| text.chars().count());
        Jinja::from_object(Self { text: text.clone(), count })
    }
}

/// What is left of such a text.
struct Rest {
    text: Jinja,
    at: usize,
    count: usize,
}

impl Iterator for Rest {
    type Item = Jinja;

    fn next(&mut self) -> Option<Jinja> {
        let next = self.text.as_str()?.get(self.at..)?.chars().next()?;
        self.at += next.len_utf8();
        self.count -= 1;
        Some(next.into())
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.count, Some(self.count))
    }
}

/// Returns whether a value is one of these, which are not JSON.
pub(super) fn is_one(value: &Jinja) -> bool {
    let is_range = value.downcast_object_ref::<Range>().is_some();
    is_range || is_unindexed(value)
}

/// Returns whether a value has items without an index.
pub(super) fn is_unindexed(value: &Jinja) -> bool {
    value.downcast_object_ref::<View>().is_some() || is_generator(value)
}

/// Returns whether a value is a generator.
pub(super) fn is_generator(value: &Jinja) -> bool {
    value.downcast_object_ref::<Generator>().is_some()
}

/// Returns a range, with Python's arguments.
pub(super) fn range(start: i64, stop: Option<i64>, step: Option<i64>) -> Result<Jinja, Error> {
    let (start, stop) = stop.map_or((0, start), |stop| (start, stop));
    let step = step.unwrap_or(1);
    let span = if step < 0 { start.saturating_sub(stop) } else { stop.saturating_sub(start) };
    let size = step.checked_abs().filter(|size| *size > 0).ok_or_else(|| refuse("a range of step 0"))?;
    let length = span.max(0) / size + i64::from(span.max(0) % size > 0);
    if length > RANGE_MAX {
        return Err(refuse(&format!("a range of more than {RANGE_MAX} items")));
    }
    Ok(Jinja::from_object(Range { start, stop, step, length }))
}

impl Range {
    fn at(&self, index: i64) -> Jinja {
        (self.start + index * self.step).into()
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { start, stop, step, .. } = self;
        write!(f, "range({start}, {stop}")?;
        if *step == 1 { f.write_str(")") } else { write!(f, ", {step})") }
    }
}

impl Object for Range {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Seq
    }

    fn get_value(self: &Arc<Self>, key: &Jinja) -> Option<Jinja> {
        let index = i64::try_from(key.clone()).ok()?;
        (0..self.length).contains(&index).then(|| self.at(index))
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Seq(usize::try_from(self.length).unwrap_or(0))
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Object for View {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Iterable
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        self.mapped_enumerator(|view| Box::new(view.items.iter().cloned()))
    }

    fn enumerator_len(self: &Arc<Self>) -> Option<usize> {
        Some(self.items.len())
    }
}

impl fmt::Debug for Generator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<generator>")
    }
}

impl Object for Generator {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Iterable
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        let items = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        Enumerator::Iter(Box::new(items.into_iter().flatten()))
    }

    fn enumerator_len(self: &Arc<Self>) -> Option<usize> {
        None
    }

    fn is_true(self: &Arc<Self>) -> bool {
        true
    }
}

impl Object for Characters {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Iterable
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        let Self { text, count } = &**self;
        Enumerator::Iter(Box::new(Rest { text: text.clone(), at: 0, count: *count }))
    }

    fn enumerator_len(self: &Arc<Self>) -> Option<usize> {
        Some(self.count)
    }
}
