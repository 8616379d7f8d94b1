//! The mount table: the one place of this room that changes or reads it.
//!
//! In: paths below the agent's root directory. Out: mounts of this mount namespace. A port, so that teardown and set-up can be
//! tested over a recording fake.

use std::{
    ffi::{OsStr, OsString},
    io,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use nix::{
    errno::Errno,
    fcntl::{self, OFlag, OpenHow, ResolveFlag},
    mount::{MntFlags, MsFlags},
    sys::stat::Mode,
};

/// One line of `/proc/self/mountinfo`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountPoint {
    /// Absolute, resolved.
    pub path: PathBuf,
    /// `tmpfs`, `ext4`, …
    pub fs_type: String,
    /// What is mounted: a device, a server path, or a name such as `tmpfs`.
    pub source: OsString,
    /// In a peer group: mounts propagate to and from it.
    pub shared: bool,
}

/// How to unmount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unmount {
    /// Fails with `EBUSY` while in use.
    Now,
    /// Detached at once, freed with its last user.
    Lazy,
}

/// Changes and reads the mount table. Calls may block.
pub trait Mounter: Send + Sync + 'static {
    /// Mounts a tmpfs; `size` in bytes, the kernel's default (half of memory) when `None`. Never swapped where the kernel can.
    fn mount_tmpfs(&self, target: &Path, size: Option<u64>) -> io::Result<()>;
    /// Binds `source` alone, without the mounts below it. `source` may be a `/proc/self/fd` path.
    fn bind(&self, source: &Path, target: &Path) -> io::Result<()>;
    /// Makes an existing bind mount read-only.
    fn remount_read_only(&self, target: &Path) -> io::Result<()>;
    /// Binds a directory, with all below it, onto itself and shares mounts made inside it.
    fn bind_shared_onto_itself(&self, target: &Path) -> io::Result<()>;
    /// Does not follow a symlink at `target`.
    fn unmount(&self, target: &Path, how: Unmount) -> io::Result<()>;
    /// Whether something is mounted right at `path`, bind mounts of files included. A missing path is not a mount point.
    fn is_mount_point(&self, path: &Path) -> io::Result<bool>;
    /// Every mount, in the table's order.
    fn list(&self) -> io::Result<Vec<MountPoint>>;
}

/// The kernel's mount table.
#[derive(Debug, Default)]
pub struct LinuxMounter {
    /// The kernel turned `noswap` down once (before 6.4, or in a user namespace).
    no_noswap: AtomicBool,
}

const NONE: Option<&str> = None;

impl Mounter for LinuxMounter {
    fn mount_tmpfs(&self, target: &Path, size: Option<u64>) -> io::Result<()> {
        let mount = |noswap: bool| {
            let size = size.filter(|s| *s > 0).map(|s| format!("size={s}"));
            let options: Vec<String> = size.into_iter().chain(noswap.then(|| "noswap".to_owned())).collect();
            nix::mount::mount(Some("tmpfs"), target, Some("tmpfs"), MsFlags::empty(), Some(options.join(",").as_str()))
        };
        if !self.no_noswap.load(Ordering::Relaxed) {
            match mount(true) {
                Err(Errno::EINVAL) => self.no_noswap.store(true, Ordering::Relaxed),
                done => return Ok(done?),
            }
        }
        Ok(mount(false)?)
    }

    fn bind(&self, source: &Path, target: &Path) -> io::Result<()> {
        Ok(nix::mount::mount(Some(source), target, NONE, MsFlags::MS_BIND, NONE)?)
    }

    fn remount_read_only(&self, target: &Path) -> io::Result<()> {
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        Ok(nix::mount::mount(NONE, target, NONE, flags, NONE)?)
    }

    fn bind_shared_onto_itself(&self, target: &Path) -> io::Result<()> {
        nix::mount::mount(Some(target), target, NONE, MsFlags::MS_BIND | MsFlags::MS_REC, NONE)?;
        Ok(nix::mount::mount(NONE, target, NONE, MsFlags::MS_SHARED | MsFlags::MS_REC, NONE)?)
    }

    fn unmount(&self, target: &Path, how: Unmount) -> io::Result<()> {
        let lazy = if how == Unmount::Lazy { MntFlags::MNT_DETACH } else { MntFlags::empty() };
        Ok(nix::mount::umount2(target, MntFlags::UMOUNT_NOFOLLOW | lazy)?)
    }

    fn is_mount_point(&self, path: &Path) -> io::Result<bool> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(true) };
        let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
        let parent = match fcntl::open(parent, flags | OFlag::O_DIRECTORY, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::ENOENT) => return Ok(false),
            Err(e) => return Err(e.into()),
        };
        let how = OpenHow::new().flags(flags | OFlag::O_NOFOLLOW).resolve(ResolveFlag::RESOLVE_NO_XDEV);
        match fcntl::openat2(parent, name, how) {
            Ok(_) | Err(Errno::ENOENT) => Ok(false),
            Err(Errno::EXDEV) => Ok(true),
            Err(e) => Err(e.into()),
        }
    }

    fn list(&self) -> io::Result<Vec<MountPoint>> {
        Ok(parse_mountinfo(&std::fs::read("/proc/self/mountinfo")?))
    }
}

/// Parses `/proc/<pid>/mountinfo` (proc(5)); a line that is too short is left out.
fn parse_mountinfo(table: &[u8]) -> Vec<MountPoint> {
    table.split(|b| *b == b'\n').filter_map(parse_mountinfo_line).collect()
}

fn parse_mountinfo_line(line: &[u8]) -> Option<MountPoint> {
    let fields: Vec<&[u8]> = line.split(|b| *b == b' ').collect();
    let path = PathBuf::from(unescape(fields.get(4)?));
    let separator = fields.iter().skip(6).position(|f| *f == b"-")? + 6;
    Some(MountPoint {
        path,
        fs_type: String::from_utf8_lossy(fields.get(separator + 1)?).into_owned(),
        source: unescape(fields.get(separator + 2)?),
        shared: fields[6..separator].iter().any(|f| f.starts_with(b"shared:")),
    })
}

/// Undoes the kernel's `\ooo` for space, tab, newline, backslash and `#`.
fn unescape(field: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let octal = (byte == b'\\').then(|| tail.get(..3)).flatten().and_then(|digits| {
            digits.iter().try_fold(0u32, |n, d| matches!(d, b'0'..=b'7').then(|| n * 8 + u32::from(d - b'0')))
        });
        match octal.and_then(|n| u8::try_from(n).ok()) {
            Some(decoded) => {
                out.push(decoded);
                rest = &tail[3..];
            }
            None => {
                out.push(byte);
                rest = tail;
            }
        }
    }
    OsString::from_vec(out)
}

/// Whether `path` is `base` or lies below it, by components.
pub(super) fn is_within(path: &Path, base: &Path) -> bool {
    path.as_os_str().as_bytes().starts_with(base.as_os_str().as_bytes()) && path.starts_with(base)
}

/// The mount that `path` lies on: the longest mount point above it, the last one made when they are stacked.
pub(super) fn mount_of<'a>(mounts: &'a [MountPoint], path: &Path) -> Option<&'a MountPoint> {
    mounts.iter().filter(|m| is_within(path, &m.path)).max_by_key(|m| m.path.as_os_str().len())
}

/// Keeps mounts in memory and records what was asked: for tests.
#[derive(Debug, Default)]
pub struct RecordingMounter(std::sync::Mutex<Recorded>);

#[derive(Debug, Default)]
struct Recorded {
    calls: Vec<String>,
    mounts: Vec<MountPoint>,
    failing: Option<(OsString, i32)>,
}

impl RecordingMounter {
    /// What was asked so far, one line a call.
    pub fn calls(&self) -> Vec<String> {
        self.locked().calls.clone()
    }
    /// Calls on paths that end in `name` fail with this errno from now on.
    pub fn fail(&self, name: &OsStr, errno: i32) {
        self.locked().failing = Some((name.to_owned(), errno));
    }
    pub fn fail_nothing(&self) {
        self.locked().failing = None;
    }
    /// As if something else had mounted there.
    pub fn add(&self, path: &Path, fs_type: &str) {
        let point = MountPoint { path: path.to_owned(), fs_type: fs_type.into(), source: "x".into(), shared: false };
        self.locked().mounts.push(point);
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, Recorded> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn record(&self, call: String, target: &Path) -> io::Result<()> {
        let mut recorded = self.locked();
        recorded.calls.push(call);
        match &recorded.failing {
            Some((name, errno)) if target.file_name() == Some(name) => Err(io::Error::from_raw_os_error(*errno)),
            _ => Ok(()),
        }
    }
}

impl Mounter for RecordingMounter {
    fn mount_tmpfs(&self, target: &Path, size: Option<u64>) -> io::Result<()> {
        self.record(format!("tmpfs {} size={size:?}", target.display()), target)?;
        self.add(target, "tmpfs");
        Ok(())
    }
    fn bind(&self, source: &Path, target: &Path) -> io::Result<()> {
        self.record(format!("bind {} {}", source.display(), target.display()), target)?;
        self.add(target, "ext4");
        Ok(())
    }
    fn remount_read_only(&self, target: &Path) -> io::Result<()> {
        self.record(format!("read-only {}", target.display()), target)
    }
    fn bind_shared_onto_itself(&self, target: &Path) -> io::Result<()> {
        self.record(format!("share {}", target.display()), target)?;
        let point = MountPoint { path: target.to_owned(), fs_type: "ext4".into(), source: "x".into(), shared: true };
        self.locked().mounts.push(point);
        Ok(())
    }
    fn unmount(&self, target: &Path, how: Unmount) -> io::Result<()> {
        self.record(format!("unmount {how:?} {}", target.display()), target)?;
        let mut recorded = self.locked();
        match recorded.mounts.iter().rposition(|m| m.path == target) {
            Some(at) => {
                recorded.mounts.remove(at);
                Ok(())
            }
            None => Err(io::Error::from_raw_os_error(nix::libc::EINVAL)),
        }
    }
    fn is_mount_point(&self, path: &Path) -> io::Result<bool> {
        Ok(self.locked().mounts.iter().any(|m| m.path == path))
    }
    fn list(&self) -> io::Result<Vec<MountPoint>> {
        Ok(self.locked().mounts.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_with_escapes_and_peer_groups() {
        let table = b"22 27 0:21 / /proc rw,relatime - proc proc rw\n\
            36 35 98:0 /mnt1 /mnt\\0402\\134x rw,noatime shared:7 master:1 - tmpfs my\\011fs rw,size=4k\n\
            short line\n\
            40 1 0:1 / /a\\9b\\01 rw - ext4 /dev/vda rw\n";
        let mounts = parse_mountinfo(table);
        assert_eq!(mounts.len(), 3);
        assert_eq!(mounts[0].path, Path::new("/proc"));
        assert!(!mounts[0].shared);
        assert_eq!(mounts[1].path, Path::new("/mnt 2\\x"));
        assert_eq!((mounts[1].fs_type.as_str(), mounts[1].source.as_os_str()), ("tmpfs", OsStr::new("my\tfs")));
        assert!(mounts[1].shared);
        assert_eq!(mounts[2].path, Path::new("/a\\9b\\01"), "no octal number: kept as it is");
    }

    #[test]
    fn the_mount_of_a_path_is_the_longest_above_it() {
        let point = |p: &str, shared| MountPoint { path: p.into(), fs_type: String::new(), source: "".into(), shared };
        let mounts = [point("/", false), point("/var", false), point("/var/lib", true), point("/var/libx", false)];
        assert_eq!(mount_of(&mounts, Path::new("/var/lib/kubelet")).unwrap().path, Path::new("/var/lib"));
        assert_eq!(mount_of(&mounts, Path::new("/home")).unwrap().path, Path::new("/"));
    }

    #[test]
    fn the_real_table_has_a_root() {
        assert!(LinuxMounter::default().list().unwrap().iter().any(|m| m.path == Path::new("/")));
    }

    #[test]
    fn v22_a_tmpfs_has_its_size_and_a_bind_can_be_read_only() {
        let temp = tempfile::tempdir().unwrap();
        let (memory, view) = (temp.path().join("memory"), temp.path().join("view"));
        std::fs::create_dir(&memory).unwrap();
        std::fs::create_dir(&view).unwrap();
        let mounter = LinuxMounter::default();
        let before = mounter.is_mount_point(&memory).unwrap();
        mounter.mount_tmpfs(&memory, Some(1 << 20)).unwrap();
        mounter.bind(&memory, &view).unwrap();
        mounter.remount_read_only(&view).unwrap();
        let size = nix::sys::statfs::statfs(&memory).map(|s| s.block_size() * i64::try_from(s.blocks()).unwrap());
        let written = (std::fs::write(memory.join("f"), "x"), std::fs::write(view.join("g"), "x"));
        let mounted = mounter.is_mount_point(&view).unwrap();
        for path in [&view, &memory] {
            mounter.unmount(path, Unmount::Now).unwrap();
        }
        assert!(!before && mounted && !mounter.is_mount_point(&view).unwrap());
        assert_eq!(size.unwrap(), 1 << 20);
        assert!(written.0.is_ok() && written.1.is_err());
        assert!(!mounter.is_mount_point(&temp.path().join("absent")).unwrap());
    }
}
