//! The arguments of methods and filters, which Python takes in their order or by name.

use minijinja::value::{Kwargs, Rest, Value as Jinja, from_args};
use minijinja::{Error, ErrorKind};

use super::refusal::refuse;

/// Limit of a width, in characters: wider ones are a mistake, and cost memory.
pub(super) const WIDTH_MAX: usize = 10_000;

/// Positional arguments, or those of these names.
pub(super) struct Arguments<'a> {
    given: Vec<Jinja>,
    kwargs: Kwargs,
    names: &'a [&'static str],
}

impl<'a> Arguments<'a> {
    /// Sorts the arguments of a method.
    pub(super) fn new(arguments: &[Jinja], names: &'a [&'static str]) -> Result<Self, Error> {
        let (Rest(given), kwargs): (Rest<Jinja>, Kwargs) = from_args(arguments)?;
        Self::of(given, kwargs, names)
    }

    /// Takes those of a filter. An argument of another name is an error.
    pub(super) fn of(given: Vec<Jinja>, kwargs: Kwargs, names: &'a [&'static str]) -> Result<Self, Error> {
        if given.len() > names.len() {
            return Err(Error::from(ErrorKind::TooManyArguments));
        }
        for name in names {
            let _: Option<Jinja> = kwargs.get(name)?;
        }
        kwargs.assert_all_used()?;
        Ok(Self { given, kwargs, names })
    }

    /// Returns an argument as it was given.
    pub(super) fn raw(&self, index: usize) -> Option<Jinja> {
        let named = || self.kwargs.peek::<Jinja>(self.names[index]).ok();
        self.given.get(index).cloned().or_else(named)
    }

    /// Returns those that are given by their names.
    pub(super) fn named(&self) -> Kwargs {
        let given = self.names.iter().enumerate();
        given.filter_map(|(index, name)| Some((*name, self.get(index)?))).collect()
    }

    /// Returns an argument; none is the same as not given.
    pub(super) fn get(&self, index: usize) -> Option<Jinja> {
        self.raw(index).filter(|value| !value.is_none() && !value.is_undefined())
    }

    /// Returns a text; none if it is not given.
    pub(super) fn text(&self, index: usize) -> Result<Option<String>, Error> {
        let Some(value) = self.get(index) else { return Ok(None) };
        match value.as_str() {
            Some(text) => Ok(Some(text.to_owned())),
            None => Err(refuse(&format!("{} must be a text", self.names[index]))),
        }
    }

    /// Returns a text that must be given.
    pub(super) fn required(&self, index: usize) -> Result<String, Error> {
        self.text(index)?.ok_or_else(|| Error::from(ErrorKind::MissingArgument))
    }

    /// Returns an integer; none if it is not given.
    pub(super) fn integer(&self, index: usize) -> Result<Option<i64>, Error> {
        self.get(index).map(i64::try_from).transpose()
    }

    /// Returns whether an argument is given and true.
    pub(super) fn flag(&self, index: usize) -> bool {
        self.get(index).is_some_and(|value| value.is_true())
    }

    /// Returns the first argument, a width in characters.
    pub(super) fn width(&self) -> Result<usize, Error> {
        let width = self.integer(0)?.ok_or_else(|| Error::from(ErrorKind::MissingArgument))?;
        Ok(usize::try_from(width.max(0)).unwrap_or(usize::MAX).min(WIDTH_MAX))
    }
}
