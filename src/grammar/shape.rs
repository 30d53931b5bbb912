//! What llguidance makes of a schema before it compiles it, as far as that tells what it costs.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

/// What is made of a schema: what llguidance copies is shared here.
pub(super) type Shape<'a> = Rc<Node<'a>>;

/// A form, and what follows from it.
#[derive(Clone, Debug)]
pub(super) struct Node<'a> {
    pub(super) form: Form<'a>,
    /// Units of a copy, with all in it.
    pub(super) units: u64,
    /// Schemas in it that are compared with another, to see whether the two exclude each other.
    pub(super) compared: u64,
}

#[derive(Clone, Debug)]
pub(super) enum Form<'a> {
    Any,
    /// Nothing obeys it.
    Nothing,
    Null,
    Boolean,
    Number(Option<Multiple>),
    Text(Text),
    List(List<'a>),
    Object(Object<'a>),
    AnyOf(Vec<Shape<'a>>),
    OneOf(Vec<Shape<'a>>),
    Reference(&'a str),
}

/// A `multipleOf`: `digits` times ten to the power of minus `places`.
#[derive(Clone, Debug)]
pub(super) struct Multiple {
    pub(super) digits: u64,
    pub(super) places: u32,
    /// Where it stands.
    pub(super) place: Rc<str>,
}

/// A text: how many expressions it matches, whether its length is bounded, and whether one is a constant.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Text {
    pub(super) expressions: u64,
    pub(super) is_bounded: bool,
    pub(super) is_literal: bool,
}

#[derive(Clone, Debug, Default)]
pub(super) struct List<'a> {
    pub(super) first: Vec<Shape<'a>>,
    pub(super) others: Option<Shape<'a>>,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Object<'a> {
    pub(super) properties: BTreeMap<&'a str, Shape<'a>>,
    pub(super) patterns: BTreeMap<&'a str, Shape<'a>>,
    pub(super) additional: Option<Shape<'a>>,
    pub(super) required: BTreeSet<&'a str>,
    pub(super) counted: Option<Counted>,
}

/// `minProperties` or `maxProperties`.
#[derive(Clone, Debug)]
pub(super) struct Counted {
    pub(super) min: u64,
    pub(super) max: Option<u64>,
    /// Where it stands.
    pub(super) place: Rc<str>,
}

impl<'a> Form<'a> {
    /// Returns a shape of its own that takes these units to compile.
    pub(super) fn of(self, own: u64) -> Shape<'a> {
        let sum = |shapes: &mut dyn Iterator<Item = &Shape<'a>>, value: fn(&Node<'a>) -> u64| {
            shapes.fold(0u64, |sum, shape| sum.saturating_add(value(shape)))
        };
        let (within, compared) = match &self {
            Form::AnyOf(shapes) | Form::OneOf(shapes) => (
                sum(&mut shapes.iter(), |shape| shape.units),
                sum(&mut shapes.iter(), |shape| shape.compared),
            ),
            Form::List(list) => (sum(&mut list.first.iter().chain(&list.others), |shape| shape.units), 1),
            Form::Object(object) => {
                let named = object.properties.values().chain(object.patterns.values());
                let names = (object.properties.len() + object.patterns.len() + object.required.len()) as u64;
                let units = sum(&mut named.chain(&object.additional), |shape| shape.units);
                (units.saturating_add(names), object.compared())
            }
            _ => (0, 1),
        };
        Rc::new(Node { form: self, units: own.saturating_add(within), compared })
    }
}

impl<'a> Object<'a> {
    /// Returns the names that have a place in it.
    pub(super) fn names(&self) -> u64 {
        let others = self.required.iter().filter(|name| !self.properties.contains_key(*name));
        (self.properties.len() + others.count()) as u64
    }

    /// Returns what a property of a name may have to obey where it is not named.
    pub(super) fn unnamed(&self) -> impl Iterator<Item = &Shape<'a>> {
        self.patterns.values().chain(&self.additional)
    }

    fn compared(&self) -> u64 {
        let unnamed = self.unnamed().fold(1u64, |sum, shape| sum.saturating_add(shape.compared));
        self.required.iter().fold(unnamed, |sum, name| {
            let own = self.properties.get(name).map_or(unnamed, |shape| shape.compared);
            sum.saturating_add(own)
        })
    }
}

/// Returns what obeys one of the shapes at least.
pub(super) fn any_of<'a>(shapes: Vec<Shape<'a>>) -> Shape<'a> {
    if let Some(any) = shapes.iter().find(|shape| matches!(shape.form, Form::Any)) {
        return Rc::clone(any);
    }
    let flat = shapes.into_iter().flat_map(|shape| match &shape.form {
        Form::AnyOf(within) => within.clone(),
        Form::Nothing => Vec::new(),
        _ => vec![shape],
    });
    let mut shapes: Vec<Shape<'a>> = flat.collect();
    match shapes.len() {
        0 => Form::Nothing.of(1),
        1 => shapes.remove(0),
        _ => Form::AnyOf(shapes).of(1),
    }
}
