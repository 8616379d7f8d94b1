//! A directory held open: every name below a volume is reached from its file descriptor, one component at a time.
//!
//! In: an open directory and single names. Out: files, links, entries. No call here follows a symlink that a container could
//! have put in the way, and none steps onto another mount unless its name says so.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io::{self, Read},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Component, Path, PathBuf},
};

use nix::{
    dir::Dir,
    errno::Errno,
    fcntl::{self, AtFlags, OFlag, OpenHow, ResolveFlag},
    sys::stat::{self, FileStat, Mode, SFlag},
    unistd::{self, Gid, Uid, UnlinkatFlags},
};

const DIRECTORY: OFlag = OFlag::O_RDONLY.union(OFlag::O_DIRECTORY).union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

/// What a directory entry is, as far as walks care.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EntryKind {
    Directory,
    Symlink,
    Other,
}

/// An open directory.
#[derive(Debug)]
pub(super) struct Directory(OwnedFd);

impl AsFd for Directory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Directory {
    /// Opens a path whose parents belong to the agent. The last component must not be a symlink.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        Ok(Self(fcntl::open(path, DIRECTORY, Mode::empty())?))
    }

    /// A readable descriptor of the directory that an `O_PATH` descriptor stands for.
    pub(super) fn reopen(fd: &OwnedFd) -> io::Result<Self> {
        Ok(Self(fcntl::openat(fd, ".", DIRECTORY, Mode::empty())?))
    }

    /// Opens a child directory; a symlink or anything else is an error.
    pub(super) fn child(&self, name: &OsStr) -> io::Result<Self> {
        Ok(Self(fcntl::openat(self, name, DIRECTORY, Mode::empty())?))
    }

    /// Like [`child`](Self::child), but a mount point is an error too (`EXDEV`), bind mounts of the same file system included.
    pub(super) fn child_same_mount(&self, name: &OsStr) -> io::Result<Self> {
        let how = OpenHow::new()
            .flags(DIRECTORY)
            .resolve(ResolveFlag::RESOLVE_NO_XDEV | ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
        Ok(Self(fcntl::openat2(self, name, how)?))
    }

    /// Opens the child directory, which is made with `mode` (umask does not apply) when missing.
    pub(super) fn child_or_create(&self, name: &OsStr, mode: u32) -> io::Result<Self> {
        match stat::mkdirat(self, name, Mode::from_bits_truncate(0o700)) {
            Ok(()) => {
                let child = self.child(name)?;
                child.set_mode(mode)?;
                Ok(child)
            }
            Err(Errno::EEXIST) => self.child(name),
            Err(e) => Err(e.into()),
        }
    }

    /// Makes a new child directory; an existing one is an error.
    pub(super) fn create_child(&self, name: &OsStr, mode: u32) -> io::Result<Self> {
        stat::mkdirat(self, name, Mode::from_bits_truncate(0o700))?;
        let child = self.child(name)?;
        child.set_mode(mode)?;
        Ok(child)
    }

    /// Opens a directory below, following symlinks only as long as they stay inside this directory.
    pub(super) fn descend_within(&self, path: &Path) -> io::Result<Self> {
        let how = OpenHow::new()
            .flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        Ok(Self(fcntl::openat2(self, path, how)?))
    }

    /// A descriptor (`O_PATH`) of whatever is at `path` below; a symlink anywhere on the way is an error.
    pub(super) fn locate_without_links(&self, path: &Path) -> io::Result<OwnedFd> {
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
        Ok(fcntl::openat2(self, path, how)?)
    }

    /// A descriptor (`O_PATH`) of the entry itself, a symlink included.
    pub(super) fn locate(&self, name: &OsStr) -> io::Result<OwnedFd> {
        Ok(fcntl::openat(self, name, OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())?)
    }

    pub(super) fn set_mode(&self, mode: u32) -> io::Result<()> {
        Ok(stat::fchmod(self, Mode::from_bits_truncate(mode))?)
    }

    pub(super) fn stat(&self) -> io::Result<FileStat> {
        Ok(stat::fstat(self)?)
    }

    /// `None` when there is no such entry. Does not follow a symlink.
    pub(super) fn stat_entry(&self, name: &OsStr) -> io::Result<Option<FileStat>> {
        match stat::fstatat(self, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::ENOENT) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// Entries without `.` and `..`, in no order.
    pub(super) fn entries(&self) -> io::Result<Vec<(OsString, EntryKind)>> {
        self.entries_up_to(usize::MAX)
    }

    /// The first `limit` entries without `.` and `..`, in no order.
    pub(super) fn entries_up_to(&self, limit: usize) -> io::Result<Vec<(OsString, EntryKind)>> {
        // A fresh description: reading must not depend on how far an earlier reader came.
        let mut dir = Dir::from_fd(fcntl::openat(self, ".", DIRECTORY, Mode::empty())?)?;
        let mut entries = Vec::new();
        for entry in dir.iter() {
            let entry = entry?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name == "." || name == ".." {
                continue;
            }
            let kind = match entry.file_type() {
                Some(nix::dir::Type::Directory) => EntryKind::Directory,
                Some(nix::dir::Type::Symlink) => EntryKind::Symlink,
                Some(_) => EntryKind::Other,
                // Some file systems leave the type out.
                None => match self.stat_entry(name)? {
                    Some(stat) => kind_of(&stat),
                    None => continue,
                },
            };
            entries.push((name.to_owned(), kind));
            if entries.len() == limit {
                break;
            }
        }
        Ok(entries)
    }

    /// The target of a symlink; `None` when the entry is missing or is no symlink.
    pub(super) fn read_link(&self, name: &OsStr) -> io::Result<Option<OsString>> {
        match fcntl::readlinkat(self, name) {
            Ok(target) => Ok(Some(target)),
            Err(Errno::ENOENT | Errno::EINVAL) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// The content of a regular file; `None` when it is missing or is anything else.
    pub(super) fn read_file(&self, name: &OsStr) -> io::Result<Option<Vec<u8>>> {
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let fd = match fcntl::openat(self, name, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::ENOENT | Errno::ELOOP | Errno::ENXIO) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        let mut file = File::from(fd);
        if !file.metadata()?.is_file() {
            return Ok(None);
        }
        let mut content = Vec::new();
        file.read_to_end(&mut content)?;
        Ok(Some(content))
    }

    /// Makes a new, empty file that only root can read so far; an existing entry is an error.
    pub(super) fn create_file(&self, name: &OsStr) -> io::Result<File> {
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        Ok(File::from(fcntl::openat(self, name, flags, Mode::from_bits_truncate(0o600))?))
    }

    pub(super) fn symlink(&self, target: &Path, name: &OsStr) -> io::Result<()> {
        Ok(unistd::symlinkat(target, self, name)?)
    }

    /// Renames within this directory, over an existing entry.
    pub(super) fn rename(&self, from: &OsStr, to: &OsStr) -> io::Result<()> {
        Ok(fcntl::renameat(self, from, self, to)?)
    }

    /// Moves an entry into another directory of the same mount.
    pub(super) fn move_entry(&self, from: &OsStr, into: &Self, to: &OsStr) -> io::Result<()> {
        Ok(fcntl::renameat(self, from, into, to)?)
    }

    /// Removes an entry that is not a directory; a missing one is fine.
    pub(super) fn remove_file(&self, name: &OsStr) -> io::Result<()> {
        self.unlink(name, UnlinkatFlags::NoRemoveDir)
    }

    /// Removes an empty directory; a missing one is fine.
    pub(super) fn remove_empty_directory(&self, name: &OsStr) -> io::Result<()> {
        self.unlink(name, UnlinkatFlags::RemoveDir)
    }

    fn unlink(&self, name: &OsStr, flag: UnlinkatFlags) -> io::Result<()> {
        match unistd::unlinkat(self, name, flag) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Sets the owner of an entry itself, never of what a symlink points to.
    pub(super) fn set_entry_user(&self, name: &OsStr, user: u32) -> io::Result<()> {
        Ok(unistd::fchownat(self, name, Some(Uid::from_raw(user)), None, AtFlags::AT_SYMLINK_NOFOLLOW)?)
    }

    /// Makes `path` (relative, plain names) and its parents. Existing symlinks on the way count as long as they stay inside.
    pub(super) fn create_all_within(&self, path: &Path, mode: u32) -> io::Result<()> {
        let mut prefix = PathBuf::new();
        for component in path.components() {
            let Component::Normal(name) = component else {
                return Err(io::Error::from(Errno::EINVAL));
            };
            let parent = if prefix.as_os_str().is_empty() {
                self.child(OsStr::new("."))?
            } else {
                self.descend_within(&prefix)?
            };
            prefix.push(name);
            match parent.create_child(name, mode) {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                    self.descend_within(&prefix)?;
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

/// Group and mode of whatever a descriptor (also `O_PATH`) stands for.
pub(super) fn set_group(fd: BorrowedFd<'_>, group: u32) -> io::Result<()> {
    Ok(unistd::fchownat(fd, "", None, Some(Gid::from_raw(group)), AtFlags::AT_EMPTY_PATH)?)
}

/// chmod through `/proc/self/fd`: works for `O_PATH` descriptors and cannot be redirected by a rename.
pub(super) fn set_mode_of(fd: BorrowedFd<'_>, mode: u32) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(proc_path(fd), std::fs::Permissions::from_mode(mode))
}

/// The descriptor as a path, for calls that take none.
pub(super) fn proc_path(fd: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

pub(super) fn kind_of(stat: &FileStat) -> EntryKind {
    match SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()) {
        SFlag::S_IFDIR => EntryKind::Directory,
        SFlag::S_IFLNK => EntryKind::Symlink,
        _ => EntryKind::Other,
    }
}

/// A name that is exactly one path component: not empty, no `/`, not `.` or `..`.
pub(super) fn is_single_component(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(c)), None) if c == name)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn links_are_not_followed_and_stay_inside() {
        let temp = tempfile::tempdir().unwrap();
        std::fs::create_dir(temp.path().join("real")).unwrap();
        symlink("real", temp.path().join("inside")).unwrap();
        symlink("/etc", temp.path().join("outside")).unwrap();
        let dir = Directory::open(temp.path()).unwrap();
        assert!(dir.child(OsStr::new("inside")).is_err());
        assert!(dir.descend_within(Path::new("inside")).is_ok());
        assert!(dir.descend_within(Path::new("outside")).is_err());
        assert!(dir.descend_within(Path::new("real/../..")).is_err());
        assert!(dir.locate_without_links(Path::new("inside")).is_err());
        assert!(dir.create_all_within(Path::new("outside/x"), 0o755).is_err());
        assert!(dir.create_all_within(Path::new("../x"), 0o755).is_err());
        dir.create_all_within(Path::new("inside/a/b"), 0o755).unwrap();
        let mode = std::fs::metadata(temp.path().join("real/a/b")).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o755);
    }

    #[test]
    fn single_components() {
        for (name, single) in [
            ("v", true),
            ("..", false),
            (".", false),
            ("", false),
            ("a/b", false),
            ("/a", false),
            ("a/", false),
            ("..a", true),
        ] {
            assert_eq!(is_single_component(name), single, "{name:?}");
        }
    }
}
