//! Where something stands in a schema, as a chain of steps: it is written out only where it is told.

use std::fmt;

use super::Refusal;

/// A place in a schema.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place<'a> {
    parent: Option<&'a Place<'a>>,
    step: Step<'a>,
}

#[derive(Clone, Copy, Debug)]
enum Step<'a> {
    /// What all places begin with.
    Base(&'a str),
    Name(&'a str),
    Index(usize),
}

impl<'a> Place<'a> {
    pub(super) fn base(base: &'a str) -> Self {
        Self { parent: None, step: Step::Base(base) }
    }

    pub(super) fn name(&'a self, name: &'a str) -> Self {
        Self { parent: Some(self), step: Step::Name(name) }
    }

    pub(super) fn index(&'a self, index: usize) -> Self {
        Self { parent: Some(self), step: Step::Index(index) }
    }

    pub(super) fn is_base(&self) -> bool {
        self.parent.is_none()
    }

    /// Returns the bytes that it takes where it is written out, which escapes may double.
    pub(super) fn bytes(&self) -> u64 {
        let (mut bytes, mut place) = (0, Some(self));
        while let Some(Self { parent, step }) = place {
            bytes += match step {
                Step::Base(base) => base.len() as u64,
                Step::Name(name) => 1 + 2 * name.len() as u64,
                Step::Index(_) => 8,
            };
            place = *parent;
        }
        bytes
    }

    /// Returns that a keyword here is not implemented.
    pub(super) fn unsupported(&self, keyword: &str, why: &str) -> Refusal {
        let (path, keyword, why) = (self.to_string(), keyword.to_owned(), why.to_owned());
        Refusal::Unsupported { path, keyword, why }
    }

    /// Returns that what stands here is malformed.
    pub(super) fn invalid(&self, why: &str) -> Refusal {
        let place = self.to_string();
        let place = if place.is_empty() { "the schema" } else { &place };
        Refusal::Invalid(format!("{place}: {why}"))
    }
}

/// Writes it as a JSON pointer.
impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(parent) = self.parent {
            write!(f, "{parent}")?;
        }
        match self.step {
            Step::Base(base) => f.write_str(base),
            Step::Name(name) => write!(f, "/{}", name.replace('~', "~0").replace('/', "~1")),
            Step::Index(index) => write!(f, "/{index}"),
        }
    }
}
