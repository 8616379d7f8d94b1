//! What this machine is: cores, memory, huge pages, identity (contract N-08, N-09, S-14).
//!
//! In: `/proc`, `/sys`, `/etc` under parameter roots. Out: one [`Machine`]. The parsers are pure; only [`Machine::read`] and
//! [`file_system`] touch the disk.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// Where the kernel's and the distribution's files are. A container or a test points them elsewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPaths {
    /// `/proc`
    pub proc: PathBuf,
    /// `/sys`
    pub sys: PathBuf,
    /// `/`: for `/etc/machine-id`, `/etc/os-release`.
    pub root: PathBuf,
}

impl Default for HostPaths {
    fn default() -> Self {
        Self { proc: "/proc".into(), sys: "/sys".into(), root: "/".into() }
    }
}

/// A file that describes this machine cannot be read or makes no sense.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    #[error("cannot read {}: {source}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{}: {field} is missing or not a number", path.display())]
    Field { path: PathBuf, field: &'static str },
}

/// Huge pages of one size that the kernel has set aside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HugePages {
    /// Bytes of one page.
    pub page_size: i64,
    pub pages: i64,
}

/// The machine as it is reported to the API. Nothing here changes without a reboot, except hot-plugged CPUs and memory.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Machine {
    /// Online logical CPUs.
    pub cores: i64,
    /// MemTotal in bytes.
    pub memory: i64,
    /// SwapTotal in bytes.
    pub swap: i64,
    pub huge_pages: Vec<HugePages>,
    /// The smaller of `pid_max` and `threads-max`.
    pub max_pids: Option<i64>,
    pub machine_id: String,
    pub system_uuid: String,
    pub boot_id: String,
    /// `uname -r`
    pub kernel_version: String,
    /// PRETTY_NAME of os-release.
    pub os_image: String,
}

impl Machine {
    /// Blocking, but only on `/proc`, `/sys` and `/etc`.
    pub fn read(paths: &HostPaths) -> Result<Self, MachineError> {
        let meminfo_path = paths.proc.join("meminfo");
        let meminfo = read(&meminfo_path)?;
        let field = |name: &'static str| {
            kib_field(&meminfo, name).ok_or_else(|| MachineError::Field { path: meminfo_path.clone(), field: name })
        };
        let machine_id = first_of(&[paths.root.join("etc/machine-id"), paths.root.join("var/lib/dbus/machine-id")]);
        let system_uuid = first_of(&[
            paths.sys.join("class/dmi/id/product_uuid"),
            paths.proc.join("device-tree/system-id"),
            paths.proc.join("device-tree/vm,uuid"),
            paths.root.join("etc/machine-id"),
        ]);
        Ok(Self {
            cores: cores(paths)?,
            memory: field("MemTotal")?,
            swap: field("SwapTotal").unwrap_or(0),
            huge_pages: huge_pages(&paths.sys.join("kernel/mm/hugepages")),
            max_pids: max_pids(&paths.proc),
            machine_id,
            system_uuid,
            boot_id: first_of(&[paths.proc.join("sys/kernel/random/boot_id")]),
            kernel_version: first_of(&[paths.proc.join("sys/kernel/osrelease")]),
            os_image: os_image(&paths.root),
        })
    }

    pub fn huge_page_sizes(&self) -> Vec<i64> {
        self.huge_pages.iter().map(|h| h.page_size).collect()
    }
}

/// Size and use of the file system that holds a path. Bytes and inodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FileSystem {
    pub capacity: i64,
    /// To unprivileged users.
    pub available: i64,
    pub inodes: i64,
    pub inodes_free: i64,
}

/// Blocking: a network file system can hang, so call it off the runtime and with a deadline.
pub fn file_system(path: &Path) -> io::Result<FileSystem> {
    let stat = nix::sys::statvfs::statvfs(path)?;
    let fragment = stat.fragment_size();
    let bytes = |blocks: u64| clamp(blocks.saturating_mul(fragment));
    Ok(FileSystem {
        capacity: bytes(stat.blocks()),
        available: bytes(stat.blocks_available()),
        inodes: clamp(stat.files()),
        inodes_free: clamp(stat.files_free()),
    })
}

fn clamp(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// The smaller of the kernel's two bounds on tasks: one pid namespace, and the whole machine.
pub(super) fn max_pids(proc: &Path) -> Option<i64> {
    let bounds = ["sys/kernel/pid_max", "sys/kernel/threads-max"];
    bounds.iter().filter_map(|file| fs::read_to_string(proc.join(file)).ok()?.trim().parse().ok()).min()
}

pub(super) fn read(path: &Path) -> Result<String, MachineError> {
    fs::read_to_string(path).map_err(|source| MachineError::Read { path: path.to_owned(), source })
}

/// `Name:  123 kB` in bytes.
pub(super) fn kib_field(text: &str, name: &str) -> Option<i64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse::<i64>().ok()?.checked_mul(1024)
}

fn first_of(files: &[PathBuf]) -> String {
    let found = files.iter().find_map(|file| fs::read_to_string(file).ok());
    found.map(|text| text.trim().trim_matches('\0').to_owned()).unwrap_or_default()
}

fn cores(paths: &HostPaths) -> Result<i64, MachineError> {
    if let Some(count) =
        fs::read_to_string(paths.sys.join("devices/system/cpu/online")).ok().as_deref().and_then(count_cpu_list)
    {
        return Ok(count);
    }
    let path = paths.proc.join("cpuinfo");
    let text = read(&path)?;
    match text.lines().filter(|line| line.starts_with("processor")).count() {
        0 => Err(MachineError::Field { path, field: "processor" }),
        count => Ok(count as i64),
    }
}

/// How many CPUs the kernel's list format names: `0-3,8,10-11` is 7.
fn count_cpu_list(text: &str) -> Option<i64> {
    let mut count = 0;
    for part in text.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        count += last.parse::<i64>().ok()? - first.parse::<i64>().ok()? + 1;
    }
    (count > 0).then_some(count)
}

fn huge_pages(directory: &Path) -> Vec<HugePages> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut found: Vec<HugePages> = entries
        .filter_map(|entry| {
            let name = entry.file_name();
            let kib: i64 = name.to_str()?.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
            let pages = fs::read_to_string(entry.path().join("nr_hugepages")).ok()?.trim().parse().ok()?;
            Some(HugePages { page_size: kib.checked_mul(1024)?, pages })
        })
        .collect();
    found.sort_by_key(|h| h.page_size);
    found
}

fn os_image(root: &Path) -> String {
    let release = ["etc/os-release", "usr/lib/os-release"].iter().find_map(|f| fs::read_to_string(root.join(f)).ok());
    match release {
        Some(text) => pretty_name(&text).unwrap_or_else(|| "Linux".to_owned()),
        None => "Unknown".to_owned(),
    }
}

fn pretty_name(os_release: &str) -> Option<String> {
    let value = os_release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="))?;
    Some(value.trim().trim_matches(['"', '\'']).to_owned())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A machine of two cores, 24684096 KiB, no swap, in a temporary directory.
    pub(crate) fn fixture() -> (tempfile::TempDir, HostPaths) {
        let dir = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("proc/meminfo", "MemTotal:       24684096 kB\nMemFree:  100 kB\nSwapTotal:      1024 kB\n");
        write("proc/sys/kernel/random/boot_id", "fbca9da4-d63d-421b-b51f-6f4ed89e8fff\n");
        write("proc/sys/kernel/osrelease", "6.18.44\n");
        write("proc/sys/kernel/pid_max", "4194304\n");
        write("proc/sys/kernel/threads-max", "192000\n");
        write("proc/loadavg", "0.10 0.20 0.30 2/412 99999\n");
        write("sys/devices/system/cpu/online", "0-1\n");
        write("sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "3\n");
        write("sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages", "0\n");
        write("etc/machine-id", "3d1219c7c4c5404aaa1f6d2a48adfda4\n");
        write("etc/os-release", "NAME=\"Debian\"\nPRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\n");
        let paths = HostPaths { proc: dir.path().join("proc"), sys: dir.path().join("sys"), root: dir.path().into() };
        (dir, paths)
    }

    #[test]
    fn n09_machine_is_read_from_its_files() {
        let (_dir, paths) = fixture();
        let machine = Machine::read(&paths).unwrap();
        let expected = Machine {
            cores: 2,
            memory: 24_684_096 * 1024,
            swap: 1024 * 1024,
            huge_pages: vec![HugePages { page_size: 2 << 20, pages: 3 }, HugePages { page_size: 1 << 30, pages: 0 }],
            max_pids: Some(192_000),
            machine_id: "3d1219c7c4c5404aaa1f6d2a48adfda4".into(),
            system_uuid: "3d1219c7c4c5404aaa1f6d2a48adfda4".into(),
            boot_id: "fbca9da4-d63d-421b-b51f-6f4ed89e8fff".into(),
            kernel_version: "6.18.44".into(),
            os_image: "Debian GNU/Linux 12 (bookworm)".into(),
        };
        assert_eq!(machine, expected);
    }

    #[test]
    fn n09_product_uuid_comes_before_the_machine_id() {
        let (dir, paths) = fixture();
        fs::create_dir_all(dir.path().join("sys/class/dmi/id")).unwrap();
        fs::write(dir.path().join("sys/class/dmi/id/product_uuid"), "ABC\n").unwrap();
        assert_eq!(Machine::read(&paths).unwrap().system_uuid, "ABC");
    }

    #[test]
    fn cores_fall_back_to_cpuinfo() {
        let (dir, paths) = fixture();
        fs::remove_file(dir.path().join("sys/devices/system/cpu/online")).unwrap();
        fs::write(
            dir.path().join("proc/cpuinfo"),
            "processor\t: 0\nmodel name\t: x\n\nprocessor\t: 1\nprocessor\t: 2\n",
        )
        .unwrap();
        assert_eq!(Machine::read(&paths).unwrap().cores, 3);
    }

    #[test]
    fn a_missing_field_is_named() {
        let (dir, paths) = fixture();
        fs::write(dir.path().join("proc/meminfo"), "MemFree: 1 kB\n").unwrap();
        let error = Machine::read(&paths).unwrap_err().to_string();
        assert!(error.contains("meminfo") && error.contains("MemTotal"), "{error}");
    }

    #[test]
    fn cpu_lists() {
        assert_eq!(count_cpu_list("0-3,8,10-11\n"), Some(7));
        assert_eq!(count_cpu_list("0"), Some(1));
        assert_eq!(count_cpu_list(""), None);
        assert_eq!(count_cpu_list("x"), None);
    }

    #[test]
    fn this_machine_and_its_root_can_be_read() {
        let machine = Machine::read(&HostPaths::default()).unwrap();
        assert!(machine.cores > 0 && machine.memory > 0 && !machine.kernel_version.is_empty());
        let root = file_system(Path::new("/")).unwrap();
        assert!(root.capacity > root.available && root.available > 0);
    }
}
