//! What the agent asks of its host before it starts, and of its own process (contract S-13, S-14, S-16).
//!
//! In: `/proc`, the configuration. Out: an error that ends the start, with upstream's words, or the process set up. Touches
//! `/proc/self/oom_score_adj` and the limit of open files.

use std::{fs, io, path::Path};

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// This host cannot run the agent as configured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HostError {
    #[error("running with swap on is not supported, please disable swap or set --fail-swap-on flag to false")]
    Swap,
    #[error(
        "kubelet is configured to not run on a host using cgroup v1. cgroup v1 support is unsupported and will be removed in a future release"
    )]
    CgroupV1,
}

/// Message of the node event `CgroupV1`.
pub const CGROUP_V1_WARNING: &str = "cgroup v1 detected. cgroup v1 support is deprecated and will be removed in a future release. Please migrate to cgroup v2. More information at https://git.k8s.io/enhancements/keps/sig-node/5573-remove-cgroup-v1";

/// Refuses to run with swap when `failSwapOn`.
pub fn check_swap(proc: &Path, fail_swap_on: bool) -> Result<(), HostError> {
    let swaps = fs::read_to_string(proc.join("swaps")).unwrap_or_default();
    let on = swaps.lines().skip(1).any(|line| !line.trim().is_empty());
    if fail_swap_on && on { Err(HostError::Swap) } else { Ok(()) }
}

/// Refuses to run on cgroup v1 when `failCgroupV1`.
pub fn check_cgroup_version(v2: bool, fail_cgroup_v1: bool) -> Result<(), HostError> {
    if fail_cgroup_v1 && !v2 { Err(HostError::CgroupV1) } else { Ok(()) }
}

/// Keeps the kernel from killing the agent for memory (−999 by default), and lets it open `max_open_files` files. Each failure is
/// logged and is no reason to stop.
pub fn set_up_process(proc: &Path, oom_score_adj: i32, max_open_files: u64) {
    let path = proc.join("self/oom_score_adj");
    if let Err(error) = fs::write(&path, oom_score_adj.to_string()) {
        tracing::warn!(path = %path.display(), oom_score_adj, %error, "cannot set the OOM score of this process");
    }
    if let Err(error) = raise_open_files(max_open_files) {
        tracing::warn!(max_open_files, %error, "cannot set the limit of open files");
    }
}

fn raise_open_files(wanted: u64) -> io::Result<()> {
    if setrlimit(Resource::RLIMIT_NOFILE, wanted, wanted).is_ok() {
        return Ok(());
    }
    // Without the right to raise the hard limit, at least all of it is used.
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, wanted.min(hard), hard)?)
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
        assert_eq!(check(&on, true), Err(HostError::Swap));
    }

    #[test]
    fn s13_cgroup_v1_is_refused_when_configured() {
        assert_eq!(check_cgroup_version(false, true), Err(HostError::CgroupV1));
        assert_eq!(check_cgroup_version(false, false), Ok(()));
        assert_eq!(check_cgroup_version(true, true), Ok(()));
    }

    #[test]
    fn s16_failures_do_not_stop_the_agent() {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        set_up_process(Path::new("/nonexistent"), -999, hard);
        let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        assert_eq!(soft, hard, "all of what is allowed is used");
    }
}
