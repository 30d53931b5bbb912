//! Decides what becomes of the wish to have a model in memory: it is there, it is loaded after others were
//! evicted, it shares a load, it waits, or it is refused with the rule that forbids it. Pure: the engine
//! evicts, frees and loads, and asks again when the load's turn comes.
//!
//! Memory is made in this order: empty KV slabs; then model by model, the least recently used first, its
//! cached KV and then the model itself; last the cached KV of models that stay, likewise. A model that is in
//! use or pinned is never evicted, and none that need not go.

use super::{Memory, Tenant};
use crate::backend::{ComputeDtype, Formats, KvDtype};
use crate::clock::Moment;
use crate::error::{Error, MemoryRule, Shortage};
use crate::ids::ModelName;

/// The wish to have a model in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Demand {
    /// The model.
    pub model: ModelName,
    /// The number formats that are asked for.
    pub formats: Formats,
    /// Bytes of its weights, estimated from their headers.
    pub weight_bytes: u64,
    /// Bytes of the KV cache that it must have room for, besides.
    pub kv_bytes: u64,
}

/// Who is in memory, and what else is being done.
#[derive(Clone, Copy, Debug, Default)]
pub struct State<'a> {
    /// The resident models.
    pub tenants: &'a [Tenant],
    /// The number formats in which the model that is wanted is being loaded, or waits to be; None if it is
    /// not.
    pub loading: Option<Formats>,
    /// Whether other loads come first.
    pub others_first: bool,
    /// Whether the daemon stops.
    pub draining: bool,
}

/// The answer to a demand that is not refused.
#[derive(Clone, Debug, PartialEq)]
pub enum Plan {
    /// The model is there.
    Ready,
    /// It is to be loaded, once this has been made free.
    Load(Evictions),
    /// Its load runs or waits already.
    Join,
    /// Other loads come first; ask again when they have ended.
    Wait,
}

/// What is made free, before a load begins.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Evictions {
    /// Models to evict, in this order.
    pub models: Vec<ModelName>,
    /// Bytes to free besides, of models that stay: empty slabs of any, then cached KV of `emptied`.
    pub cached_bytes: u64,
    /// Models whose cached KV may go, in this order.
    pub emptied: Vec<ModelName>,
}

impl Demand {
    /// Returns the bytes that must be free before the load begins.
    #[must_use]
    pub fn needed_bytes(&self) -> u64 {
        self.weight_bytes.saturating_add(self.kv_bytes)
    }
}

/// Decides on a demand.
///
/// # Errors
/// The daemon stops, the model has other formats, or it does not fit.
pub fn plan(state: &State<'_>, demand: &Demand, memory: &Memory, now: Moment) -> Result<Plan, Error> {
    if state.draining {
        return Err(Error::Draining);
    }
    if let Some(tenant) = state.tenants.iter().find(|tenant| tenant.model == demand.model) {
        let why = || format!("the model is resident in {}; unload it first", tenant.computes_in);
        return check_formats(demand.formats, tenant.formats, why).map(|()| Plan::Ready);
    }
    if let Some(loading) = state.loading {
        let why = || "the model is being loaded otherwise; unload it once it is loaded".into();
        return check_formats(demand.formats, loading, why).map(|()| Plan::Join);
    }
    check_fits_alone(state.tenants, demand, memory)?;
    if state.others_first {
        return Ok(Plan::Wait);
    }
    match evictions(state.tenants, memory.missing_bytes(demand.needed_bytes()), now) {
        Some(evictions) => Ok(Plan::Load(evictions)),
        None => {
            let rule = MemoryRule::InUse { held_bytes: held_bytes(state.tenants, Tenant::is_in_use) };
            Err(Error::MemoryBudget(Box::new(shortage(state.tenants, demand, memory, rule))))
        }
    }
}

/// Returns what makes `missing_bytes` free; None if nothing does.
#[must_use]
pub fn evictions(tenants: &[Tenant], missing_bytes: u64, now: Moment) -> Option<Evictions> {
    let chosen = Choice::of(tenants, missing_bytes, now);
    (chosen.freed_bytes() >= missing_bytes).then(|| chosen.evictions(missing_bytes))
}

/// Returns what makes as many of `missing_bytes` free as can be: for a budget that shrank.
#[must_use]
pub fn evictions_towards(tenants: &[Tenant], missing_bytes: u64, now: Moment) -> Evictions {
    Choice::of(tenants, missing_bytes, now).evictions(missing_bytes)
}

/// Returns the bytes that a load could have: free ones, and all that it may evict.
#[must_use]
pub fn available_bytes(tenants: &[Tenant], memory: &Memory) -> u64 {
    let evictable = |tenant: &Tenant| tenant.bytes - tenant.stay_bytes();
    let kept = memory.used_bytes.saturating_sub(tenants.iter().map(evictable).sum());
    memory.budget_bytes.saturating_sub(kept)
}

/// Refuses formats that a model does not have.
fn check_formats(wanted: Formats, has: Formats, why: impl FnOnce() -> String) -> Result<(), Error> {
    let Formats { dtype, kv, quantize } = wanted;
    let field = if dtype != ComputeDtype::Auto && dtype != has.dtype {
        "compute_dtype"
    } else if kv != KvDtype::Auto && kv != has.kv {
        "kv_dtype"
    } else if quantize.is_some() && quantize != has.quantize {
        "quantize"
    } else {
        return Ok(());
    };
    Err(Error::field(field, why()))
}

/// Refuses what no waiting changes.
fn check_fits_alone(tenants: &[Tenant], demand: &Demand, memory: &Memory) -> Result<(), Error> {
    let needed = demand.needed_bytes();
    if needed > memory.budget_bytes {
        let shortage = shortage(tenants, demand, memory, MemoryRule::WholeBudget);
        let shortage = Shortage { available_bytes: memory.budget_bytes, in_the_way: Vec::new(), ..shortage };
        return Err(Error::ModelTooLarge(Box::new(shortage)));
    }
    let held_bytes = held_bytes(tenants, |tenant| tenant.pinned);
    if needed > memory.budget_bytes.saturating_sub(held_bytes) {
        let shortage = shortage(tenants, demand, memory, MemoryRule::Pinned { held_bytes });
        return Err(Error::MemoryBudget(Box::new(shortage)));
    }
    Ok(())
}

/// Returns the bytes that stay with those models of which `is_meant` holds, whatever is cached.
fn held_bytes(tenants: &[Tenant], is_meant: impl Fn(&Tenant) -> bool) -> u64 {
    tenants.iter().filter(|tenant| is_meant(tenant)).map(Tenant::held_bytes).sum()
}

/// Describes why a demand is refused by `rule`.
fn shortage(tenants: &[Tenant], demand: &Demand, memory: &Memory, rule: MemoryRule) -> Shortage {
    let needed_bytes = demand.needed_bytes();
    let available_bytes = available_bytes(tenants, memory);
    let is_held = |tenant: &&Tenant| match rule {
        MemoryRule::Pinned { .. } => tenant.pinned,
        MemoryRule::InUse { .. } => tenant.is_in_use() && !tenant.pinned,
        MemoryRule::WholeBudget | MemoryRule::System => false,
    };
    let mut holders: Vec<&Tenant> = tenants.iter().filter(is_held).collect();
    holders.sort_by_key(|tenant| (tenant.used, &tenant.model));
    let mut freed_bytes = available_bytes;
    let mut in_the_way = Vec::new();
    for holder in holders {
        if freed_bytes >= needed_bytes {
            break;
        }
        freed_bytes += holder.held_bytes();
        in_the_way.push(holder.model.clone());
    }
    let model = demand.model.clone();
    Shortage { model, needed_bytes, available_bytes, budget_bytes: memory.budget_bytes, rule, in_the_way }
}

/// Models to evict, and models whose cached KV may go.
struct Choice<'a> {
    tenants: &'a [Tenant],
    evicted: Vec<&'a Tenant>,
    /// Models whose cached KV counts, in order; the evicted ones among them.
    emptied: Vec<&'a Tenant>,
}

impl<'a> Choice<'a> {
    fn of(tenants: &'a [Tenant], missing_bytes: u64, now: Moment) -> Self {
        let mut order: Vec<&Tenant> = tenants.iter().collect();
        order.sort_by_key(|tenant| {
            (!tenant.is_evictable(), !tenant.has_expired(now), tenant.used, &tenant.model)
        });
        let mut choice = Self { tenants, evicted: Vec::new(), emptied: Vec::new() };
        for tenant in order {
            if choice.freed_bytes() >= missing_bytes {
                break;
            }
            choice.emptied.push(tenant);
            if tenant.is_evictable() && choice.freed_bytes() < missing_bytes {
                choice.evicted.push(tenant);
            }
        }
        choice.spare(missing_bytes);
        choice
    }

    /// Spares those that need not go, the most recently used first.
    fn spare(&mut self, missing_bytes: u64) {
        for place in (0..self.evicted.len()).rev() {
            let spared = self.evicted.remove(place);
            if self.freed_bytes() < missing_bytes {
                self.evicted.insert(place, spared);
            }
        }
    }

    fn is_evicted(&self, tenant: &Tenant) -> bool {
        self.evicted.iter().any(|evicted| evicted.model == tenant.model)
    }

    /// Returns the bytes that it frees at most.
    fn freed_bytes(&self) -> u64 {
        let freed = |tenant: &Tenant| {
            if self.is_evicted(tenant) {
                return tenant.bytes;
            }
            let is_emptied = self.emptied.iter().any(|emptied| emptied.model == tenant.model);
            tenant.empty_bytes + if is_emptied { tenant.parked_bytes } else { 0 }
        };
        self.tenants.iter().map(freed).sum()
    }

    fn evictions(&self, missing_bytes: u64) -> Evictions {
        let evicted_bytes: u64 = self.evicted.iter().map(|tenant| tenant.bytes).sum();
        let cached_bytes = missing_bytes.min(self.freed_bytes()).saturating_sub(evicted_bytes);
        let stays = |tenant: &&&Tenant| !self.is_evicted(tenant);
        let empty_bytes =
            self.tenants.iter().filter(|tenant| stays(&tenant)).map(|tenant| tenant.empty_bytes);
        let mut left = cached_bytes.saturating_sub(empty_bytes.sum());
        let emptied = self.emptied.iter().filter(stays).take_while(|tenant| {
            let more = left > 0;
            left = left.saturating_sub(tenant.parked_bytes);
            more
        });
        Evictions {
            models: self.evicted.iter().map(|tenant| tenant.model.clone()).collect(),
            cached_bytes,
            emptied: emptied.map(|tenant| tenant.model.clone()).collect(),
        }
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
