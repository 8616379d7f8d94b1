//! The cgroup file systems on disk, version 1 (one directory tree per controller) or 2 (one for all).
//!
//! In: a path inside the hierarchies and the limits to write. Out: directories made and removed, processes found and killed. The
//! root (`/sys/fs/cgroup`) is a parameter, so a temporary directory serves as a fixture. Blocking; callers move it off the runtime.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{qos::cpu_weight, resize_plan::PodCgroup};

/// A step on the cgroup file system failed.
#[derive(Debug, thiserror::Error)]
#[error("{action} {}: {source}", path.display())]
pub struct CgroupError {
    pub action: &'static str,
    pub path: PathBuf,
    #[source]
    pub source: io::Error,
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CgroupError + use<> {
    let path = path.to_owned();
    move |source| CgroupError { action, path, source }
}

/// Limits of one cgroup. `None` leaves a file alone.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Limits {
    pub cpu_shares: Option<u64>,
    /// (quota, period) in µs; a quota of 0 or less means none.
    pub cpu_quota: Option<(i64, u64)>,
    pub memory_bytes: Option<i64>,
    pub pids: Option<i64>,
    /// Page size → bytes.
    pub hugepages: BTreeMap<i64, i64>,
    /// Version 2 only: `memory.min`, `memory.low`, `memory.high`.
    pub memory_min: Option<i64>,
    pub memory_low: Option<i64>,
    pub memory_high: Option<i64>,
}

/// What the kernel offers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Hierarchy {
    /// Mount points, each with its controllers (`cpu`, `memory`, `systemd` …). `unified` is the version 2 tree beside them in
    /// hybrid mode: nothing is created there, but leftovers are removed.
    V1 {
        mounts: Vec<(PathBuf, Vec<String>)>,
        unified: Option<PathBuf>,
    },
    V2 {
        root: PathBuf,
        controllers: Vec<String>,
    },
}

/// Controllers that the kubelet sets limits with.
const MANAGED: [&str; 5] = ["cpu", "cpuset", "memory", "hugetlb", "pids"];
/// `memory.limit_in_bytes` from here on means none.
const NO_LIMIT_V1: i64 = i64::MAX - (1 << 20);
const REMOVE_TRIES: u32 = 20;
const REMOVE_PAUSE: Duration = Duration::from_millis(25);
const KILL_TRIES: u32 = 5;

impl Hierarchy {
    /// Version 2 when the root itself is a cgroup, else version 1.
    pub(super) fn detect(root: &Path) -> Result<Self, CgroupError> {
        if let Ok(text) = fs::read_to_string(root.join("cgroup.controllers")) {
            let controllers = text.split_whitespace().filter(|c| MANAGED.contains(c)).map(str::to_owned).collect();
            return Ok(Self::V2 { root: root.to_owned(), controllers });
        }
        let mut mounts = Vec::new();
        let mut unified = None;
        for entry in fs::read_dir(root).map_err(failed("list", root))? {
            let entry = entry.map_err(failed("list", root))?;
            // `cpu` and `cpuacct` are often links to the one mount `cpu,cpuacct`.
            if !entry.file_type().is_ok_and(|t| t.is_dir()) {
                continue;
            }
            let name = entry.file_name().to_string_lossy().into_owned();
            if name == "unified" {
                unified = Some(entry.path());
            } else {
                mounts.push((entry.path(), name.split(',').map(str::to_owned).collect()));
            }
        }
        mounts.sort();
        Ok(Self::V1 { mounts, unified })
    }

    pub(super) fn is_v2(&self) -> bool {
        matches!(self, Self::V2 { .. })
    }

    /// Every tree that may hold the cgroup.
    fn trees(&self) -> Vec<&Path> {
        match self {
            Self::V1 { mounts, unified } => {
                mounts.iter().map(|(path, _)| path).chain(unified).map(PathBuf::as_path).collect()
            }
            Self::V2 { root, .. } => vec![root.as_path()],
        }
    }

    fn directories(&self, path: &str) -> Vec<PathBuf> {
        self.trees().into_iter().map(|tree| tree.join(path.trim_start_matches('/'))).collect()
    }

    /// The directory of this cgroup in the tree of one controller.
    pub(super) fn directory(&self, controller: &str, path: &str) -> Option<PathBuf> {
        let tree = match self {
            Self::V1 { mounts, .. } => &mounts.iter().find(|(_, c)| c.iter().any(|c| c == controller))?.0,
            Self::V2 { root, .. } => root,
        };
        Some(tree.join(path.trim_start_matches('/')))
    }

    /// The cgroup exists in every tree in which it has to.
    pub(super) fn exists(&self, path: &str) -> bool {
        match self {
            Self::V1 { mounts, .. } => mounts
                .iter()
                .filter(|(_, c)| c.iter().any(|c| MANAGED.contains(&c.as_str()) || c == "cpuacct" || c == "systemd"))
                .all(|(tree, _)| tree.join(path.trim_start_matches('/')).is_dir()),
            Self::V2 { root, .. } => root.join(path.trim_start_matches('/')).is_dir(),
        }
    }

    /// The cgroup exists in some tree.
    pub(super) fn exists_anywhere(&self, path: &str) -> bool {
        self.directories(path).iter().any(|directory| directory.is_dir())
    }

    /// Makes the cgroup and its ancestors, with the controllers switched on all the way down.
    pub(super) fn create(&self, path: &str) -> Result<(), CgroupError> {
        let steps: Vec<&str> = path.split('/').filter(|s| !s.is_empty()).collect();
        match self {
            Self::V1 { mounts, .. } => mounts.iter().try_for_each(|(tree, controllers)| {
                let cpuset = controllers.iter().any(|c| c == "cpuset");
                let mut parent = tree.clone();
                for step in &steps {
                    let child = parent.join(step);
                    make_directory(&child)?;
                    if cpuset {
                        inherit_cpuset(&parent, &child)?;
                    }
                    parent = child;
                }
                Ok(())
            }),
            Self::V2 { root, controllers } => {
                let mut parent = root.clone();
                for step in &steps {
                    enable_controllers(&parent, controllers);
                    parent = parent.join(step);
                    make_directory(&parent)?;
                }
                Ok(())
            }
        }
    }

    /// Writes the limits; goes on after a failure and returns the first.
    pub(super) fn set(&self, path: &str, limits: &Limits) -> Result<(), CgroupError> {
        let mut result = Ok(());
        for (controller, file, value) in self.files(limits) {
            let Some(directory) = self.directory(controller, path) else { continue };
            let file = directory.join(file);
            let optional = controller == "hugetlb";
            let written = fs::write(&file, value).map_err(failed("write", &file));
            if !optional {
                result = result.and(written);
            }
        }
        result
    }

    /// The cgroup has fewer CPU shares than these, or they cannot be read.
    pub(super) fn cpu_shares_below(&self, path: &str, shares: u64) -> bool {
        let (file, wanted) = match self {
            Self::V1 { .. } => ("cpu.shares", shares),
            Self::V2 { .. } => ("cpu.weight", cpu_weight(shares)),
        };
        let text = self.directory("cpu", path).and_then(|d| fs::read_to_string(d.join(file)).ok());
        text.and_then(|t| t.trim().parse::<u64>().ok()).is_none_or(|have| have < wanted)
    }

    /// The limits in force on a pod's cgroup.
    pub(super) fn pod_limits(&self, path: &str) -> Result<PodCgroup, CgroupError> {
        let v2 = self.is_v2();
        let memory = self.read("memory", path, if v2 { "memory.max" } else { "memory.limit_in_bytes" })?;
        let (cpu_quota, cpu_period) = if v2 {
            let text = self.read("cpu", path, "cpu.max")?;
            let (quota, period) = text.split_once(' ').unwrap_or((text.as_str(), ""));
            (quota.parse().ok(), period.parse().unwrap_or(100_000))
        } else {
            let period = self.read("cpu", path, "cpu.cfs_period_us")?;
            (self.read("cpu", path, "cpu.cfs_quota_us")?.parse().ok(), period.parse().unwrap_or(100_000))
        };
        let share = self.read("cpu", path, if v2 { "cpu.weight" } else { "cpu.shares" })?;
        Ok(PodCgroup {
            // Version 1 shows no limit as the largest whole number of pages.
            memory: memory.parse().ok().filter(|bytes| *bytes < NO_LIMIT_V1),
            cpu_quota: cpu_quota.filter(|quota| *quota > 0),
            cpu_period,
            cpu_share: share.parse().unwrap_or(0),
        })
    }

    /// Bytes of memory in use in the cgroup and below.
    pub(super) fn memory_use(&self, path: &str) -> Option<u64> {
        let file = if self.is_v2() { "memory.current" } else { "memory.usage_in_bytes" };
        self.read("memory", path, file).ok()?.parse().ok()
    }

    fn read(&self, controller: &str, path: &str, file: &str) -> Result<String, CgroupError> {
        let Some(directory) = self.directory(controller, path) else {
            let source = io::Error::new(io::ErrorKind::NotFound, format!("controller {controller} is not mounted"));
            return Err(CgroupError { action: "read", path: PathBuf::from(path).join(file), source });
        };
        let file = directory.join(file);
        Ok(fs::read_to_string(&file).map_err(failed("read", &file))?.trim().to_owned())
    }

    /// The cgroup's `memory.min` is less than this, or cannot be read.
    pub(super) fn memory_min_below(&self, path: &str, bytes: i64) -> bool {
        self.read("memory", path, "memory.min")
            .ok()
            .and_then(|text| text.parse::<i64>().ok())
            .is_none_or(|have| have < bytes)
    }

    fn files(&self, limits: &Limits) -> Vec<(&'static str, String, String)> {
        let mut files = Vec::new();
        let mut file = |controller, name: &str, value: String| files.push((controller, name.to_owned(), value));
        if let Some(shares) = limits.cpu_shares {
            match self {
                Self::V1 { .. } => file("cpu", "cpu.shares", shares.to_string()),
                Self::V2 { .. } => file("cpu", "cpu.weight", cpu_weight(shares).to_string()),
            }
        }
        if let Some((quota, period)) = limits.cpu_quota {
            match self {
                Self::V1 { .. } => {
                    file("cpu", "cpu.cfs_period_us", period.to_string());
                    file("cpu", "cpu.cfs_quota_us", if quota > 0 { quota } else { -1 }.to_string());
                }
                Self::V2 { .. } if quota > 0 => file("cpu", "cpu.max", format!("{quota} {period}")),
                Self::V2 { .. } => file("cpu", "cpu.max", format!("max {period}")),
            }
        }
        let v2 = self.is_v2();
        if let Some(bytes) = limits.memory_bytes.filter(|b| *b > 0) {
            file("memory", if v2 { "memory.max" } else { "memory.limit_in_bytes" }, bytes.to_string());
        }
        if let Some(pids) = limits.pids.filter(|p| *p > 0) {
            file("pids", "pids.max", pids.to_string());
        }
        for (size, bytes) in &limits.hugepages {
            let suffix = if v2 { "max" } else { "limit_in_bytes" };
            file("hugetlb", &format!("hugetlb.{}.{suffix}", page_size_name(*size)), bytes.to_string());
        }
        if v2 {
            let protection = [
                ("memory.min", limits.memory_min),
                ("memory.low", limits.memory_low),
                ("memory.high", limits.memory_high),
            ];
            for (name, value) in protection {
                if let Some(bytes) = value {
                    file("memory", name, bytes.to_string());
                }
            }
        }
        files
    }

    /// Names of the cgroups directly below, in any tree.
    pub(super) fn children(&self, path: &str) -> BTreeSet<String> {
        let mut names = BTreeSet::new();
        for directory in self.directories(path) {
            names.extend(subdirectories(&directory).iter().filter_map(|d| Some(d.file_name()?.to_str()?.to_owned())));
        }
        names
    }

    /// Kills every process left in the cgroup or below, then removes the directories bottom-up in all trees.
    pub(super) fn remove(&self, path: &str) -> Result<(), CgroupError> {
        let present: Vec<PathBuf> = self.directories(path).into_iter().filter(|d| d.is_dir()).collect();
        kill_all(&present)?;
        present.iter().try_for_each(|directory| remove_tree(directory))
    }
}

fn make_directory(path: &Path) -> Result<(), CgroupError> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(failed("create", path)(error)),
        _ => Ok(()),
    }
}

/// A version 1 cpuset starts empty, and an empty one takes no task: it gets what its parent has.
fn inherit_cpuset(parent: &Path, child: &Path) -> Result<(), CgroupError> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let own = fs::read_to_string(child.join(file)).unwrap_or_default();
        if !own.trim().is_empty() {
            continue;
        }
        if let Ok(theirs) = fs::read_to_string(parent.join(file)) {
            let path = child.join(file);
            fs::write(&path, theirs.trim()).map_err(failed("write", &path))?;
        }
    }
    Ok(())
}

/// One write per controller: a controller that cannot be switched on must not keep back the others. What is missing shows when
/// its limit is written.
fn enable_controllers(directory: &Path, controllers: &[String]) {
    let file = directory.join("cgroup.subtree_control");
    let enabled = fs::read_to_string(&file).unwrap_or_default();
    for controller in controllers.iter().filter(|c| !enabled.split_whitespace().any(|e| e == c.as_str())) {
        if let Err(error) = fs::write(&file, format!("+{controller}")) {
            tracing::warn!(file = %file.display(), controller, %error, "cannot switch on a cgroup controller");
        }
    }
}

/// `2MB`, `1GB`, `64KB`: as the kernel names its hugetlb files.
fn page_size_name(bytes: i64) -> String {
    match bytes {
        b if b >= 1 << 30 => format!("{}GB", b >> 30),
        b if b >= 1 << 20 => format!("{}MB", b >> 20),
        b => format!("{}KB", b >> 10),
    }
}

fn subdirectories(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()).collect()
}

fn processes(directory: &Path, into: &mut BTreeSet<i32>) {
    let listed = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
    into.extend(listed.split_whitespace().filter_map(|pid| pid.parse::<i32>().ok()).filter(|pid| *pid > 1));
    for child in subdirectories(directory) {
        processes(&child, into);
    }
}

/// Sends SIGKILL until each process has got it or is gone, five rounds at most (contract R-04).
fn kill_all(directories: &[PathBuf]) -> Result<(), CgroupError> {
    let mut left = BTreeSet::new();
    directories.iter().for_each(|d| processes(d, &mut left));
    let own = nix::unistd::getpid().as_raw();
    left.remove(&own);
    let mut last = None;
    for _ in 0..KILL_TRIES {
        left.retain(|pid| match kill(Pid::from_raw(*pid), Signal::SIGKILL) {
            Ok(()) | Err(Errno::ESRCH) => false,
            Err(errno) => {
                last = Some(errno);
                true
            }
        });
        if left.is_empty() {
            return Ok(());
        }
    }
    let errno = last.unwrap_or(Errno::EPERM);
    Err(failed("kill the processes in", directories.first().map_or(Path::new(""), PathBuf::as_path))(errno.into()))
}

/// Killed processes leave a cgroup a moment later, so a busy directory is tried again.
fn remove_tree(directory: &Path) -> Result<(), CgroupError> {
    subdirectories(directory).iter().try_for_each(|child| remove_tree(child))?;
    let mut tries = 0;
    loop {
        match fs::remove_dir(directory) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) if error.raw_os_error() == Some(Errno::EBUSY as i32) && tries < REMOVE_TRIES => {
                tries += 1;
                std::thread::sleep(REMOVE_PAUSE);
            }
            Err(error) => return Err(failed("remove", directory)(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v1(root: &Path) -> Hierarchy {
        for tree in ["cpu,cpuacct", "cpuset", "memory", "pids", "systemd", "unified"] {
            fs::create_dir_all(root.join(tree)).unwrap();
        }
        std::os::unix::fs::symlink("cpu,cpuacct", root.join("cpu")).unwrap();
        fs::write(root.join("cpuset/cpuset.cpus"), "0-1\n").unwrap();
        fs::write(root.join("cpuset/cpuset.mems"), "0\n").unwrap();
        Hierarchy::detect(root).unwrap()
    }

    fn v2(root: &Path) -> Hierarchy {
        fs::write(root.join("cgroup.controllers"), "cpuset cpu io memory hugetlb pids rdma misc\n").unwrap();
        Hierarchy::detect(root).unwrap()
    }

    fn read(root: &Path, file: &str) -> String {
        fs::read_to_string(root.join(file)).unwrap_or_else(|e| panic!("{file}: {e}"))
    }

    fn all() -> Limits {
        Limits {
            cpu_shares: Some(1024),
            cpu_quota: Some((50_000, 100_000)),
            memory_bytes: Some(1 << 20),
            pids: Some(99),
            hugepages: [(2 << 20, 4 << 20)].into(),
            memory_min: Some(0),
            memory_low: Some(0),
            memory_high: None,
        }
    }

    #[test]
    fn r02_v1_files() {
        let dir = tempfile::tempdir().unwrap();
        let tree = v1(dir.path());
        tree.create("/a/b").unwrap();
        tree.set("/a/b", &all()).unwrap();
        assert_eq!(read(dir.path(), "cpu,cpuacct/a/b/cpu.shares"), "1024");
        assert_eq!(read(dir.path(), "cpu,cpuacct/a/b/cpu.cfs_quota_us"), "50000");
        assert_eq!(read(dir.path(), "cpu,cpuacct/a/b/cpu.cfs_period_us"), "100000");
        assert_eq!(read(dir.path(), "memory/a/b/memory.limit_in_bytes"), "1048576");
        assert_eq!(read(dir.path(), "pids/a/b/pids.max"), "99");
        assert_eq!(read(dir.path(), "cpuset/a/b/cpuset.cpus"), "0-1", "an empty cpuset would take no task");
        assert_eq!(read(dir.path(), "cpuset/a/b/cpuset.mems"), "0");
        assert!(dir.path().join("systemd/a/b").is_dir());
        assert!(!dir.path().join("unified/a").exists());
        assert!(tree.exists("/a/b") && !tree.exists("/a/c"));
    }

    #[test]
    fn r02_v2_files_and_controllers_on_the_way_down() {
        let dir = tempfile::tempdir().unwrap();
        let tree = v2(dir.path());
        tree.create("/a/b").unwrap();
        tree.set("/a/b", &all()).unwrap();
        assert_eq!(read(dir.path(), "a/b/cpu.weight"), "39");
        assert_eq!(read(dir.path(), "a/b/cpu.max"), "50000 100000");
        assert_eq!(read(dir.path(), "a/b/memory.max"), "1048576");
        assert_eq!(read(dir.path(), "a/b/memory.min"), "0");
        assert_eq!(read(dir.path(), "a/b/hugetlb.2MB.max"), "4194304");
        assert!(read(dir.path(), "cgroup.subtree_control").starts_with('+'));
        assert!(read(dir.path(), "a/cgroup.subtree_control").starts_with('+'));
        let unlimited = Limits { cpu_quota: Some((-1, 100_000)), ..Limits::default() };
        tree.set("/a/b", &unlimited).unwrap();
        assert_eq!(read(dir.path(), "a/b/cpu.max"), "max 100000");
    }

    #[test]
    fn r04_remove_goes_bottom_up_through_all_trees() {
        let dir = tempfile::tempdir().unwrap();
        let tree = v1(dir.path());
        for sub in ["memory/a/b/c1", "pids/a/b/c1/deep", "unified/a/b"] {
            fs::create_dir_all(dir.path().join(sub)).unwrap();
        }
        tree.remove("/a/b").unwrap();
        for gone in ["memory/a/b", "pids/a/b", "unified/a/b"] {
            assert!(!dir.path().join(gone).exists(), "{gone}");
        }
        assert!(dir.path().join("memory/a").is_dir(), "the parent stays");
        tree.remove("/a/b").unwrap();
    }

    #[test]
    fn r04_remove_kills_what_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let tree = v2(dir.path());
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        fs::create_dir_all(dir.path().join("a/ctr")).unwrap();
        fs::write(dir.path().join("a/ctr/cgroup.procs"), format!("{}\n", child.id())).unwrap();
        // A plain directory keeps its file, so only the kill can be seen here.
        assert!(tree.remove("/a").is_err());
        assert!(!child.wait().unwrap().success());
    }

    #[test]
    fn children_are_merged_over_all_trees() {
        let dir = tempfile::tempdir().unwrap();
        let tree = v1(dir.path());
        for sub in ["memory/k/podx", "pids/k/pody"] {
            fs::create_dir_all(dir.path().join(sub)).unwrap();
        }
        assert_eq!(tree.children("/k").into_iter().collect::<Vec<_>>(), ["podx", "pody"]);
    }

    #[test]
    fn page_sizes_as_the_kernel_names_them() {
        assert_eq!([64 << 10, 2 << 20, 1 << 30].map(page_size_name), ["64KB", "2MB", "1GB"]);
    }
}
