//! The memory that this process may use, as Linux says it, and the budget that follows from it. Control
//! groups of both versions count: a container's limit is seldom the machine's. Read again at each load.

use std::fs;
use std::path::Path;

use crate::backend::WiredLimit;

/// Share of the memory that MLX may use, where the device does not recommend a working set.
const MEMORY_SHARE: (u64, u64) = (3, 4);

/// Share of what is free on a device with memory of its own: its driver and libraries take some.
const FREE_SHARE: (u64, u64) = (9, 10);

/// Weights are wired only above this part of the working set: smaller ones stay in memory anyway.
const WIRED_WORKING_SET_PERCENT: u128 = 70;

/// Least part of the memory that stays free of wired weights.
const WIRED_FREE_PERCENT: u128 = 35;

/// Part of the working set for activations, and its bounds. A prefill of 512 tokens takes some 100 MB in an
/// 8B; where attention is composed of small operations, its scores over 8,192 positions half a GB.
const ACTIVATIONS_PART: u64 = 16;
const ACTIVATIONS_MIN: u64 = 256 << 20;
const ACTIVATIONS_MAX: u64 = 1 << 30;

/// The budget where the size of the memory is unknown.
const BUDGET_DEFAULT: u64 = 8 << 30;

/// Where the root of control groups is mounted, and the files that limit the memory of one: of version 2,
/// then 1.
const GROUPS: [(&str, &[&str]); 3] = [
    ("sys/fs/cgroup", &["memory.max", "memory.high"]),
    ("sys/fs/cgroup/unified", &["memory.max", "memory.high"]),
    ("sys/fs/cgroup/memory", &["memory.limit_in_bytes"]),
];

/// What a device says about its memory, in bytes; None is unknown.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Share {
    /// The working set that it recommends.
    pub(super) recommended: Option<u64>,
    /// Memory of its own that is free, or that this process has.
    pub(super) free: Option<u64>,
    /// All memory.
    pub(super) memory: Option<u64>,
}

/// Returns the byte budget for weights and KV caches: the working set that the device recommends, else most
/// of what is free on it, else a share of the memory; less what MLX keeps of freed buffers and what
/// activations take.
pub(super) fn budget(share: Share, cache_limit: u64) -> u64 {
    let part = |(part, of): (u64, u64)| move |bytes: u64| bytes / of * part;
    let working_set = share.recommended.or(share.free.map(part(FREE_SHARE)));
    let Some(working_set) = working_set.or(share.memory.map(part(MEMORY_SHARE))) else {
        return BUDGET_DEFAULT;
    };
    let activations = (working_set / ACTIVATIONS_PART).clamp(ACTIVATIONS_MIN, ACTIVATIONS_MAX);
    working_set.saturating_sub(cache_limit + activations).max(working_set / 2)
}

/// Returns the limit of wired memory for `weights` bytes of all models; None leaves it alone.
pub(super) fn wired_bytes(setting: WiredLimit, weights: u64, working_set: u64, memory: u64) -> Option<u64> {
    let percent = |percent: u128, of: u64| u128::from(of) * percent / 100;
    let pays = u128::from(weights) > percent(WIRED_WORKING_SET_PERCENT, working_set);
    let left = memory.saturating_sub(weights);
    let is_safe = weights <= working_set && u128::from(left) >= percent(WIRED_FREE_PERCENT, memory);
    (setting == WiredLimit::Auto && pays && is_safe).then_some(weights)
}

/// Returns the bytes of memory that this process may use: the machine's, or the least that a control group
/// allows. `root` is where `proc` and `sys` are. None if nothing is known.
pub(super) fn memory_bytes(root: &Path) -> Option<u64> {
    let total = fs::read_to_string(root.join("proc/meminfo")).ok().and_then(|text| total_bytes(&text));
    total.into_iter().chain(group_limits(root)).min()
}

fn total_bytes(meminfo: &str) -> Option<u64> {
    let total = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    total.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
}

/// Returns the limits of the groups that the process is in, and of those above them.
fn group_limits(root: &Path) -> Vec<u64> {
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let mut limits = Vec::new();
    for line in groups.lines() {
        // Number, controllers (none in version 2), path.
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        if !controllers.is_empty() && controllers.split(',').all(|controller| controller != "memory") {
            continue;
        }
        // In a container the own group may be mounted as the root, whatever its path.
        for folder in Path::new(path.trim_start_matches('/')).ancestors() {
            for (mount, files) in GROUPS {
                let limit = |file: &&str| {
                    let text = fs::read_to_string(root.join(mount).join(folder).join(file)).ok()?;
                    // "max" stands for none.
                    text.trim().parse::<u64>().ok()
                };
                limits.extend(files.iter().filter_map(limit));
            }
        }
    }
    limits
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    /// Writes files below a root; returns what they say of the memory.
    fn memory(files: &[(&str, &str)]) -> Option<u64> {
        let root = tempfile::tempdir().unwrap();
        for (file, text) in files {
            let path = root.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        memory_bytes(root.path())
    }

    const MEMINFO: (&str, &str) = ("proc/meminfo", "MemTotal:       16777216 kB\nMemFree:  1 kB\n");

    #[test]
    fn the_memory_is_the_machines_or_what_a_control_group_allows() {
        assert_eq!(memory(&[]), None);
        assert_eq!(memory(&[MEMINFO]), Some(16 * GIB));
        let second = ("proc/self/cgroup", "0::/user.slice/mlxd.service\n");
        let of = |folder: &'static str, limit| memory(&[MEMINFO, second, (folder, limit)]);
        assert_eq!(of("sys/fs/cgroup/user.slice/mlxd.service/memory.max", "2147483648\n"), Some(2 * GIB));
        assert_eq!(of("sys/fs/cgroup/user.slice/memory.max", "1073741824\n"), Some(GIB), "the group above");
        assert_eq!(of("sys/fs/cgroup/user.slice/mlxd.service/memory.high", "1073741824\n"), Some(GIB));
        assert_eq!(of("sys/fs/cgroup/user.slice/memory.max", "max\n"), Some(16 * GIB));
        assert_eq!(of("sys/fs/cgroup/memory.max", "1073741824\n"), Some(GIB), "mounted in a container");
        assert_eq!(of("sys/fs/cgroup/other/memory.max", "1\n"), Some(16 * GIB));
        assert_eq!(of("sys/fs/cgroup/memory.max", "34359738368\n"), Some(16 * GIB), "more than there is");
    }

    #[test]
    fn control_groups_of_version_1_limit_it_too() {
        let first = ("proc/self/cgroup", "4:memory:/docker/a\n3:cpu,cpuacct:/b\n0::/\n");
        let of = |folder: &'static str, limit| memory(&[MEMINFO, first, (folder, limit)]);
        assert_eq!(of("sys/fs/cgroup/memory/docker/a/memory.limit_in_bytes", "1073741824\n"), Some(GIB));
        assert_eq!(of("sys/fs/cgroup/memory/memory.limit_in_bytes", "1073741824\n"), Some(GIB));
        assert_eq!(
            of("sys/fs/cgroup/memory/docker/memory.limit_in_bytes", "9223372036854771712\n"),
            Some(16 * GIB),
            "no limit"
        );
    }

    #[test]
    fn the_budget_leaves_room_for_activations_and_freed_buffers() {
        let budget = |recommended, memory, cache| budget(Share { recommended, memory, free: None }, cache);
        assert_eq!(budget(None, None, GIB), BUDGET_DEFAULT);
        // A Mac of 16 GiB, and a machine of 64 GiB.
        assert_eq!(budget(Some(12 * GIB), Some(16 * GIB), GIB), 12 * GIB - GIB - 12 * GIB / 16);
        assert_eq!(budget(None, Some(64 * GIB), GIB / 8), 48 * GIB - GIB / 8 - GIB);
        // A container of 2 GiB, and one of 256 MiB.
        assert_eq!(budget(None, Some(2 * GIB), GIB / 8), 3 * GIB / 2 - GIB / 8 - GIB / 4);
        assert_eq!(budget(None, Some(GIB / 4), GIB / 8), GIB / 4 / 4 * 3 / 2);
    }
    #[test]
    fn of_a_device_with_memory_of_its_own_what_is_free_counts() {
        let share = Share { free: Some(70 * GIB), memory: Some(80 * GIB), ..Share::default() };
        assert_eq!(budget(share, GIB), 70 * GIB / 10 * 9 - 2 * GIB);
    }

    #[test]
    fn weights_are_wired_only_where_asked_and_where_it_pays_and_is_safe() {
        let wired = |setting, weights| wired_bytes(setting, weights * GIB, 96 * GIB, 128 * GIB);
        assert_eq!(wired(WiredLimit::Never, 80), None);
        assert_eq!(wired(WiredLimit::Auto, 67), None, "70 % of the working set or less");
        assert_eq!(wired(WiredLimit::Auto, 68), Some(68 * GIB));
        assert_eq!(wired(WiredLimit::Auto, 83), Some(83 * GIB));
        assert_eq!(wired(WiredLimit::Auto, 84), None, "less than 35 % stay free");
        assert_eq!(wired_bytes(WiredLimit::Auto, 0, 0, 0), None);
    }
}
