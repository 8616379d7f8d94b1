//! What the agent asks of its host before it starts (contract S-14).
//!
//! In: `/proc`, the configuration. Out: an error that ends the start, with upstream's words. Reads only.

use std::{fs, path::Path};

/// Swap is on and the configuration forbids it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("running with swap on is not supported, please disable swap or set --fail-swap-on flag to false")]
pub struct SwapError;

/// Message of the node event `CgroupV1` (contract S-13).
pub(super) const CGROUP_V1_WARNING: &str = "cgroup v1 detected. cgroup v1 support is deprecated and will be removed in a future release. Please migrate to cgroup v2. More information at https://git.k8s.io/enhancements/keps/sig-node/5573-remove-cgroup-v1";

/// Refuses to run with swap when `failSwapOn`.
pub fn check_swap(proc: &Path, fail_swap_on: bool) -> Result<(), SwapError> {
    let swaps = fs::read_to_string(proc.join("swaps")).unwrap_or_default();
    let on = swaps.lines().skip(1).any(|line| !line.trim().is_empty());
    if fail_swap_on && on { Err(SwapError) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn s14_swap_is_refused_only_when_on_and_configured() {
        let dir = tempfile::tempdir().unwrap();
        let header = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n";
        let check = |text: &str, fail| {
            fs::write(dir.path().join("swaps"), text).unwrap();
            check_swap(dir.path(), fail)
        };
        let on = format!("{header}/dev/sda2 partition 1 0 -2\n");
        assert_eq!(check(header, true), Ok(()));
        assert_eq!(check(&on, false), Ok(()));
        assert_eq!(check(&on, true), Err(SwapError));
    }
}
