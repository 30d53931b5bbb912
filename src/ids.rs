//! The identities that cross module borders, each a type of its own.

use std::fmt;
use std::sync::Arc;

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Arc<str>);

        impl $name {
            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl From<&str> for $name {
            fn from(name: &str) -> Self {
                Self(name.into())
            }
        }

        impl From<String> for $name {
            fn from(name: String) -> Self {
                Self(name.into())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name_type! {
    /// A model, by the name clients ask for it: a repo id or a folder's name.
    ModelName
}
name_type! {
    /// A session's name, unique for its owner.
    SessionName
}
name_type! {
    /// One RPC, in logs and answers: `x-request-id`, or drawn by the daemon.
    RequestId
}
name_type! {
    /// Who owns sessions and KV caches: `uid:<number>` or `token:<hash>`.
    Principal
}
name_type! {
    /// Who is treated fairly: a connection, or `x-mlxd-client` within the principal.
    ClientId
}

/// A session, for everybody: names are unique only within a principal.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionKey {
    /// The owner.
    pub owner: Principal,
    /// Its name.
    pub name: SessionName,
}

impl fmt::Display for SessionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.owner, self.name)
    }
}
