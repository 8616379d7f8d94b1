//! Reads the eviction signals from the machine: memory, node and image file systems, PIDs (contract R-20).
//!
//! In: the root memory cgroup, `/proc`, `statvfs`. Out: [`Observations`]; what cannot be read is left out and logged. Blocking: callers
//! move it off the runtime with a deadline.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::{
    machine::{FileSystem, HostPaths, file_system, kib_field, max_pids},
    pressure::{Observation, Observations},
};
use crate::config::Signal;

/// Where the signals are read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignalSources {
    pub host: HostPaths,
    /// Memory directory of the kubepods cgroup, when it exists.
    pub kubepods: Option<PathBuf>,
    /// `/var/lib/kubelet`: nodefs.
    pub root_dir: PathBuf,
    /// Mount point that the runtime names for images, if it has yet.
    pub image_fs: Option<PathBuf>,
}

/// One reading.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SignalReading {
    pub observations: Observations,
    /// The node's file system, for `ephemeral-storage`.
    pub node_fs: Option<FileSystem>,
    pub image_fs: Option<FileSystem>,
}

impl SignalSources {
    pub fn read(&self) -> SignalReading {
        let mut reading = SignalReading {
            node_fs: statvfs(&self.root_dir),
            image_fs: self.image_fs.as_deref().and_then(statvfs),
            ..SignalReading::default()
        };
        let mut observe = |signal, observation: Option<Observation>| {
            reading.observations.extend(observation.map(|o| (signal, o)));
        };
        observe(Signal::MemoryAvailable, self.memory());
        observe(Signal::AllocatableMemoryAvailable, self.kubepods.as_deref().and_then(limited_memory));
        observe(Signal::PidAvailable, pids(&self.host.proc));
        if let Some(fs) = reading.node_fs {
            observe(Signal::NodeFsAvailable, Some(space(&fs)));
            observe(Signal::NodeFsInodesFree, inodes(&fs));
        }
        if let Some(fs) = reading.image_fs {
            observe(Signal::ImageFsAvailable, Some(space(&fs)));
            observe(Signal::ImageFsInodesFree, inodes(&fs));
        }
        reading
    }

    /// MemTotal less the working set of the root cgroup: use without the file cache that could go at once.
    fn memory(&self) -> Option<Observation> {
        let cgroup = self.host.sys.join("fs/cgroup");
        let v1 = cgroup.join("memory");
        let working_set = match v1.join("memory.usage_in_bytes").exists() {
            true => working_set(number(&v1.join("memory.usage_in_bytes"))?, &v1, "total_inactive_file")?,
            // Version 2 keeps no memory.current for the root: anonymous and file memory make up the use.
            false => {
                let stat = fs::read_to_string(cgroup.join("memory.stat")).ok()?;
                let used = field(&stat, "anon")?.saturating_add(field(&stat, "file")?);
                (used - field(&stat, "inactive_file").unwrap_or(0)).max(0)
            }
        };
        let capacity = kib_field(&fs::read_to_string(self.host.proc.join("meminfo")).ok()?, "MemTotal")?;
        Some(Observation { available: (capacity - working_set).max(0), capacity })
    }
}

/// A cgroup's limit less its working set; `None` without a limit.
fn limited_memory(directory: &Path) -> Option<Observation> {
    let v2 = directory.join("memory.max").exists();
    let (limit, usage, inactive) = match v2 {
        true => ("memory.max", "memory.current", "inactive_file"),
        false => ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    };
    let capacity = number(&directory.join(limit))?;
    // Version 1 writes "no limit" as the largest multiple of the page size.
    if capacity >= i64::MAX - (1 << 20) {
        return None;
    }
    let used = working_set(number(&directory.join(usage))?, directory, inactive)?;
    Some(Observation { available: (capacity - used).max(0), capacity })
}

fn working_set(usage: i64, directory: &Path, inactive: &str) -> Option<i64> {
    let stat = fs::read_to_string(directory.join("memory.stat")).ok()?;
    Some((usage - field(&stat, inactive).unwrap_or(0)).max(0))
}

fn number(file: &Path) -> Option<i64> {
    fs::read_to_string(file).ok()?.trim().parse().ok()
}

/// `name 123`
fn field(text: &str, name: &str) -> Option<i64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?.trim().parse().ok()
}

fn pids(proc: &Path) -> Option<Observation> {
    let capacity = max_pids(proc)?;
    let running = running_tasks(&fs::read_to_string(proc.join("loadavg")).ok()?)?;
    Some(Observation { available: capacity - running, capacity })
}

/// The second half of the fourth field of `/proc/loadavg`: `0.1 0.2 0.3 2/412 9999`.
fn running_tasks(loadavg: &str) -> Option<i64> {
    loadavg.split_whitespace().nth(3)?.split_once('/')?.1.parse().ok()
}

fn statvfs(path: &Path) -> Option<FileSystem> {
    file_system(path)
        .inspect_err(|error| tracing::warn!(path = %path.display(), %error, "cannot read the file system's use"))
        .ok()
}

fn space(fs: &FileSystem) -> Observation {
    Observation { available: fs.available, capacity: fs.capacity }
}

/// File systems without fixed inodes (btrfs) report none.
fn inodes(fs: &FileSystem) -> Option<Observation> {
    (fs.inodes > 0).then_some(Observation { available: fs.inodes_free, capacity: fs.inodes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::machine::tests::fixture;

    fn sources(dir: &Path) -> SignalSources {
        SignalSources {
            host: HostPaths { proc: dir.join("proc"), sys: dir.join("sys"), root: dir.to_owned() },
            kubepods: Some(dir.join("kubepods")),
            root_dir: dir.to_owned(),
            image_fs: Some(dir.to_owned()),
        }
    }

    fn write(dir: &Path, file: &str, text: &str) {
        let path = dir.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// MemTotal of the fixture.
    const TOTAL: i64 = 24_684_096 * 1024;

    fn observation(available: i64, capacity: i64) -> Option<Observation> {
        Some(Observation { available, capacity })
    }

    #[test]
    fn r20_signals_on_cgroup_v1() {
        let (dir, _) = fixture();
        write(dir.path(), "sys/fs/cgroup/memory/memory.usage_in_bytes", "7000\n");
        write(dir.path(), "sys/fs/cgroup/memory/memory.stat", "cache 1\ninactive_file 1\ntotal_inactive_file 2000\n");
        write(dir.path(), "kubepods/memory.limit_in_bytes", "4000\n");
        write(dir.path(), "kubepods/memory.usage_in_bytes", "1500\n");
        write(dir.path(), "kubepods/memory.stat", "total_inactive_file 500\n");
        let seen = sources(dir.path()).read().observations;
        assert_eq!(seen.get(&Signal::MemoryAvailable).copied(), observation(TOTAL - 5000, TOTAL));
        assert_eq!(seen.get(&Signal::AllocatableMemoryAvailable).copied(), observation(3000, 4000));
        assert_eq!(seen.get(&Signal::PidAvailable).copied(), observation(192_000 - 412, 192_000));
        assert!(seen.contains_key(&Signal::NodeFsAvailable) && seen.contains_key(&Signal::ImageFsAvailable));
    }

    #[test]
    fn r20_signals_on_cgroup_v2() {
        let (dir, _) = fixture();
        write(dir.path(), "sys/fs/cgroup/memory.stat", "anon 3000\nfile 2500\ninactive_anon 7\ninactive_file 500\n");
        write(dir.path(), "kubepods/memory.max", "max\n");
        let seen = sources(dir.path()).read().observations;
        assert_eq!(seen.get(&Signal::MemoryAvailable).copied(), observation(TOTAL - 5000, TOTAL));
        assert!(!seen.contains_key(&Signal::AllocatableMemoryAvailable), "no limit, no signal");
        write(dir.path(), "kubepods/memory.max", "4000\n");
        write(dir.path(), "kubepods/memory.current", "1500\n");
        write(dir.path(), "kubepods/memory.stat", "inactive_file 500\n");
        let seen = sources(dir.path()).read().observations;
        assert_eq!(seen.get(&Signal::AllocatableMemoryAvailable).copied(), observation(3000, 4000));
    }

    #[test]
    fn what_cannot_be_read_is_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let missing = SignalSources { root_dir: dir.path().join("no"), image_fs: None, ..sources(dir.path()) };
        assert_eq!(missing.read(), SignalReading::default());
    }
}
