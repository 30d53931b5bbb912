//! What it costs to compare and to print a template's values. minijinja walks them without counting: a list
//! that has another one twice, which has another one twice, and so on forty times, has 2^40 items. So what
//! may be walked is paid for before, from the budget of the render.
//!
//! Operators of a template are calls of [`PAID`] and [`WITHIN`] (`comparisons`); here are the filters and
//! tests of minijinja that compare or print, and `methods` pays for its own.

use minijinja::tests::is_sameas;
use minijinja::value::{Kwargs, Rest, Value as Jinja, ValueKind};
use minijinja::{Environment, Error, State};

use super::namespace::Namespace;
use super::objects::Generator;
use super::refusal::refuse;

/// The function that an operand goes through, or the arguments of a method.
pub(super) const PAID: &str = "paid__";
/// The function that stands for `in`.
pub(super) const WITHIN: &str = "within__";

/// Units of a fuel, as in minijinja: one for a byte of text.
const UNITS_PER_FUEL: u64 = 64;
/// Units of an item, as in minijinja.
const UNITS_PER_ITEM: u64 = 32;
/// Fuel that is consumed at once: a walk ends soon after there is none left.
const FUEL_PER_PAYMENT: u64 = 256;
/// Values before an item among which the same is looked for: lists that share much have it side by side.
const NEIGHBOURS: usize = 8;

/// Adds the functions, filters and tests.
pub(super) fn add(environment: &mut Environment<'static>) {
    environment.add_function(PAID, paid);
    environment.add_function(WITHIN, within);
    tests(environment);
    filters(environment);
}

/// What a walk has cost and not paid.
struct Walk<'a, 'b, 'c> {
    state: &'a State<'b, 'c>,
    units: u64,
}

impl Walk<'_, '_, '_> {
    fn add(&mut self, units: u64, times: u64) -> Result<(), Error> {
        self.units = self.units.saturating_add(units.saturating_mul(times));
        if self.units < FUEL_PER_PAYMENT * UNITS_PER_FUEL {
            return Ok(());
        }
        let units = std::mem::take(&mut self.units);
        self.state.consume_fuel(units / UNITS_PER_FUEL)
    }

    /// Pays `times` times for all items of a value, level by level, so that one that is there often is looked
    /// at once and paid for as often; through namespaces where `attributes` of theirs count.
    fn through(&mut self, value: &Jinja, times: u64, attributes: bool) -> Result<(), Error> {
        let mut level = vec![(value.clone(), times)];
        while !level.is_empty() {
            let mut next: Vec<(Jinja, u64)> = Vec::new();
            for (value, times) in level {
                let items = items(&value, attributes)?;
                self.add(items.len() as u64 * UNITS_PER_ITEM, times)?;
                for item in items {
                    if let Some(text) = item.as_str() {
                        self.add(text.len() as u64, times)?;
                    } else if item.as_object().is_some() {
                        let mut near = next.iter_mut().rev().take(NEIGHBOURS);
                        match near.find(|(other, _)| is_sameas(other, &item)) {
                            Some((_, known)) => *known = known.saturating_add(times),
                            None => next.push((item, times)),
                        }
                    }
                }
            }
            level = next;
        }
        self.state.consume_fuel(self.units / UNITS_PER_FUEL)
    }
}

/// Returns what a list or a mapping has; of a namespace, only if `attributes` count.
fn items(value: &Jinja, attributes: bool) -> Result<Vec<Jinja>, Error> {
    if let Some(generator) = value.downcast_object_ref::<Generator>() {
        return Ok(generator.rest());
    }
    if let Some(namespace) = value.downcast_object_ref::<Namespace>() {
        let values = namespace.pairs().into_iter().map(|(_, value)| value);
        return Ok(if attributes { values.collect() } else { Vec::new() });
    }
    match value.kind() {
        ValueKind::Map => {
            let keys = value.try_iter()?;
            let pairs: Result<Vec<_>, Error> = keys.map(|key| Ok([value.get_item(&key)?, key])).collect();
            Ok(pairs?.into_iter().flatten().collect())
        }
        ValueKind::Seq | ValueKind::Iterable => Ok(value.try_iter()?.collect()),
        _ => Ok(Vec::new()),
    }
}

/// Pays for going once through all that a value has; a text or a number costs nothing.
///
/// # Errors
/// The render's budget is used up.
pub(super) fn pay(state: &State<'_, '_>, value: &Jinja) -> Result<(), Error> {
    if value.as_object().is_none() {
        return Ok(());
    }
    Walk { state, units: 0 }.through(value, 1, false)
}

/// Pays for sorting the items of a value, or attributes of them.
///
/// # Errors
/// The render's budget is used up.
pub(super) fn pay_for_sorting(state: &State<'_, '_>, value: &Jinja) -> Result<(), Error> {
    let passes = usize::BITS - value.len().unwrap_or(0).leading_zeros();
    Walk { state, units: 0 }.through(value, u64::from(passes).max(1), true)
}

#[expect(clippy::needless_pass_by_value, reason = "minijinja passes arguments by value")]
fn paid(state: &mut State, values: Rest<Jinja>) -> Result<Jinja, Error> {
    values.0.iter().try_for_each(|value| pay(state, value))?;
    Ok(match values.0.as_slice() {
        [value] => value.clone(),
        values => values.iter().cloned().collect(),
    })
}

fn within(state: &mut State, value: &Jinja, container: &Jinja) -> Result<bool, Error> {
    use ValueKind::{Iterable, Map, Plain, Seq, String, Undefined};
    match container.kind() {
        // Printing it would be minijinja's way, and Python refuses it.
        String if value.as_str().is_none() => return Err(refuse("only a text can be in a text")),
        String | Plain | Undefined => {}
        Map => pay(state, value)?,
        // Among others a text or a number costs what minijinja counts.
        Seq | Iterable if value.as_object().is_none() => {}
        Seq | Iterable => {
            pay(state, value)?;
            pay(state, container)?;
        }
        kind => return Err(refuse(&format!("nothing can be in a value of type {kind}"))),
    }
    minijinja::tests::is_in(state, value, container)
}

/// A test of two values.
type Compares = fn(&Jinja, &Jinja) -> bool;

/// The tests that stand for operators.
fn tests(environment: &mut Environment<'static>) {
    use minijinja::tests::{is_eq, is_ge, is_gt, is_le, is_lt, is_ne};
    let operators: [(&[&str], Compares); 6] = [
        (&["eq", "equalto", "=="], is_eq),
        (&["ne", "!="], is_ne),
        (&["lt", "lessthan", "<"], is_lt),
        (&["le", "<="], is_le),
        (&["gt", "greaterthan", ">"], is_gt),
        (&["ge", ">="], is_ge),
    ];
    for (names, compares) in operators {
        for name in names {
            environment.add_test(*name, move |state: &mut State, value: &Jinja, other: &Jinja| {
                pay(state, value).map(|()| compares(value, other))
            });
        }
    }
    environment.add_test("in", |state: &mut State, value: &Jinja, other: &Jinja| within(state, value, other));
    // Jinja2 has neither.
    environment.remove_test("startingwith");
    environment.remove_test("endingwith");
}

/// The filters that `filters` does not have.
fn filters(environment: &mut Environment<'static>) {
    let groupby = |state: &mut State, value: Jinja, attribute: Option<&str>, named: Kwargs| {
        pay_for_sorting(state, &value)?;
        minijinja::filters::groupby(value, attribute, named)
    };
    environment.add_filter("groupby", groupby);
    environment.add_filter("attr", |state: &mut State, value: &Jinja, name: &Jinja| {
        pay(state, name)?;
        minijinja::filters::attr(value, name)
    });
    // They print what is not a text, and Jinja2 has neither.
    environment.remove_filter("split");
    environment.remove_filter("lines");
}
