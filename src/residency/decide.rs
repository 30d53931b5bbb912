//! What becomes of the wish to have a model in memory.

use crate::backend::{ComputeDtype, KvDtype};
use crate::error::Error;

/// The wish to have a model in memory, in these number formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Demand {
    /// Float type to compute with; `Auto` takes any.
    pub dtype: ComputeDtype,
    /// Element type of its KV cache; `Auto` takes any.
    pub kv: KvDtype,
}

/// The standing of the model that is wanted.
#[derive(Clone, Copy, Debug)]
pub enum Standing<'a> {
    /// Not in memory.
    Absent,
    /// Being loaded, or waiting to be.
    Loading,
    /// In memory.
    Resident {
        /// As it was loaded.
        loaded: Demand,
        /// The description of how it computes.
        computes_in: &'a str,
    },
}

/// The answer to a demand.
#[derive(Clone, Debug, PartialEq)]
pub enum Decision {
    /// The model is there.
    Ready,
    /// It must be loaded; whether it fits is decided when the load begins.
    Load,
    /// A load runs or waits already; its end is the answer.
    Wait,
    /// It cannot be.
    Refuse(Error),
}

/// Decides on a demand.
#[must_use]
pub fn decide(standing: Standing<'_>, demand: Demand, draining: bool) -> Decision {
    if draining {
        return Decision::Refuse(Error::Draining);
    }
    let (loaded, computes_in) = match standing {
        Standing::Absent => return Decision::Load,
        Standing::Loading => return Decision::Wait,
        Standing::Resident { loaded, computes_in } => (loaded, computes_in),
    };
    if demand.dtype != loaded.dtype && demand.dtype != ComputeDtype::Auto {
        let why = format!("the model is resident in {computes_in}; unload it first");
        return Decision::Refuse(Error::field("compute_dtype", why));
    }
    if demand.kv != loaded.kv && demand.kv != KvDtype::Auto {
        let why = "the model is resident with another KV cache; unload it first";
        return Decision::Refuse(Error::field("kv_dtype", why));
    }
    Decision::Ready
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANY: Demand = Demand { dtype: ComputeDtype::Auto, kv: KvDtype::Auto };
    const LOADED: Demand = Demand { dtype: ComputeDtype::Auto, kv: KvDtype::Compute };
    const RESIDENT: Standing<'static> = Standing::Resident { loaded: LOADED, computes_in: "float32" };

    #[test]
    fn a_model_is_loaded_once() {
        let decisions = [Standing::Absent, Standing::Loading, RESIDENT].map(|at| decide(at, ANY, false));
        assert_eq!(decisions, [Decision::Load, Decision::Wait, Decision::Ready]);
    }

    #[test]
    fn a_resident_model_in_another_format_is_refused() {
        let refused = |demand| match decide(RESIDENT, demand, false) {
            Decision::Refuse(error) => error.to_string(),
            other => panic!("{other:?}"),
        };
        let half = Demand { dtype: ComputeDtype::Float16, ..ANY };
        assert_eq!(refused(half), "compute_dtype: the model is resident in float32; unload it first");
        assert!(refused(Demand { kv: KvDtype::Int8, ..ANY }).starts_with("kv_dtype: "));
        assert_eq!(decide(RESIDENT, LOADED, false), Decision::Ready);
    }

    #[test]
    fn a_draining_daemon_loads_nothing() {
        assert_eq!(decide(Standing::Absent, ANY, true), Decision::Refuse(Error::Draining));
    }
}
