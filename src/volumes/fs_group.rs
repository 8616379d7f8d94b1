//! `fsGroup`: the volume's files get the pod's group and its permissions (contract V-40).
//!
//! In: an open directory tree, group and policy. Out: ownership and modes changed on disk. Symlinks get the group, never a mode;
//! nothing is followed, other mounts inside the tree included in the walk as upstream does for the volume itself only.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::atomic::{AtomicU64, Ordering},
};

use nix::sys::stat::{self, FileStat};

use super::directory::{self, Directory, EntryKind};

const READ_WRITE: u32 = 0o660;
const READ_ONLY: u32 = 0o440;
const TRAVERSE: u32 = 0o110;
const SETGID: u32 = 0o2000;

/// The group that shall own a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct GroupOwnership {
    pub(super) group: u32,
    /// The volume is read-only to containers: the group gets no write permission.
    pub(super) read_only: bool,
}

/// `spec.securityContext.fsGroupChangePolicy`. Upstream heeds it for persistent volumes only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ChangePolicy {
    Always,
    OnRootMismatch,
}

impl GroupOwnership {
    /// Permission bits that are added to an entry.
    fn added_mode(self, kind: EntryKind) -> u32 {
        let mask = if self.read_only { READ_ONLY } else { READ_WRITE };
        if kind == EntryKind::Directory { mask | SETGID | TRAVERSE } else { mask }
    }

    /// Whether the root of the volume already looks as it shall.
    fn fits_root(self, root: &FileStat) -> bool {
        let wanted = self.added_mode(EntryKind::Directory);
        root.st_gid == self.group && root.st_mode & wanted == wanted
    }
}

/// Changes the whole tree, children before their directory, so that a root that fits means that all below it was done.
/// `files` counts up while it runs. The first entry that cannot be changed ends the walk.
pub(super) fn apply(
    root: &Directory,
    ownership: GroupOwnership,
    policy: ChangePolicy,
    files: &AtomicU64,
) -> io::Result<()> {
    if policy == ChangePolicy::OnRootMismatch && ownership.fits_root(&root.stat()?) {
        return Ok(());
    }
    // An explicit stack: the depth of the tree is the container's choice.
    let mut stack = vec![(root.child(".".as_ref())?, root.entries()?)];
    while let Some((directory, pending)) = stack.last_mut() {
        let Some((name, kind)) = pending.pop() else {
            change(directory.as_fd(), &directory.stat()?, ownership)?;
            files.fetch_add(1, Ordering::Relaxed);
            stack.pop();
            continue;
        };
        if kind == EntryKind::Directory {
            match directory.child(&name) {
                Ok(child) => {
                    let entries = child.entries()?;
                    stack.push((child, entries));
                    continue;
                }
                // Replaced meanwhile by something else: taken for what it is now.
                Err(e) if e.raw_os_error() == Some(nix::libc::ENOTDIR) => {}
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(e),
            }
        }
        match directory.locate(&name) {
            Ok(entry) => change(entry.as_fd(), &stat::fstat(&entry)?, ownership)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(e),
        }
        files.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

/// Changes the volume's root alone.
pub(super) fn apply_to_root(root: &Directory, ownership: GroupOwnership) -> io::Result<()> {
    change(root.as_fd(), &root.stat()?, ownership)
}

fn change(fd: BorrowedFd<'_>, stat: &FileStat, ownership: GroupOwnership) -> io::Result<()> {
    if stat.st_gid != ownership.group {
        directory::set_group(fd, ownership.group)?;
    }
    let kind = directory::kind_of(stat);
    if kind == EntryKind::Symlink {
        return Ok(());
    }
    // Set even when the bits are there: chown above clears setgid.
    directory::set_mode_of(fd, (stat.st_mode & 0o7777) | ownership.added_mode(kind))
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::fs::{MetadataExt, PermissionsExt, symlink},
        path::Path,
    };

    use super::*;

    fn mode(path: &Path) -> u32 {
        std::fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
    }
    fn group(path: &Path) -> u32 {
        std::fs::symlink_metadata(path).unwrap().gid()
    }
    fn write(path: &Path, mode: u32) {
        std::fs::write(path, "x").unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn v40_group_and_modes_of_a_tree() {
        let temp = tempfile::tempdir().unwrap();
        let outside = tempfile::NamedTempFile::new().unwrap();
        let root = temp.path();
        std::fs::create_dir_all(root.join("d/e")).unwrap();
        std::fs::set_permissions(root.join("d"), std::fs::Permissions::from_mode(0o700)).unwrap();
        write(&root.join("f"), 0o600);
        write(&root.join("d/e/g"), 0o400);
        symlink(outside.path(), root.join("link")).unwrap();
        let outside_mode = mode(outside.path());
        let files = AtomicU64::new(0);
        let ownership = GroupOwnership { group: 4321, read_only: false };
        apply(&Directory::open(root).unwrap(), ownership, ChangePolicy::Always, &files).unwrap();
        assert_eq!(mode(&root.join("f")), 0o660);
        assert_eq!(mode(&root.join("d/e/g")), 0o660);
        assert_eq!(mode(&root.join("d")), 0o2770);
        assert_eq!(mode(root) & 0o2770, 0o2770);
        for path in ["", "f", "d", "d/e", "d/e/g", "link"] {
            assert_eq!(group(&root.join(path)), 4321, "{path}");
        }
        assert_eq!(files.into_inner(), 6);
        assert_eq!(
            (group(outside.path()), mode(outside.path())),
            (0, outside_mode),
            "what a link points to is not ours"
        );
    }

    #[test]
    fn v40_read_only_volumes_get_no_write_bit() {
        let temp = tempfile::tempdir().unwrap();
        write(&temp.path().join("f"), 0o600);
        std::fs::set_permissions(temp.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
        let ownership = GroupOwnership { group: 77, read_only: true };
        apply(&Directory::open(temp.path()).unwrap(), ownership, ChangePolicy::Always, &AtomicU64::new(0)).unwrap();
        assert_eq!(mode(&temp.path().join("f")), 0o640);
        assert_eq!(mode(temp.path()), 0o2750);
    }

    #[test]
    fn v40_on_root_mismatch_leaves_a_fitting_root_alone() {
        for (root_mode, root_group, walks) in
            [(0o2770, 5, false), (0o2775, 5, false), (0o770, 5, true), (0o2750, 5, true), (0o2770, 6, true)]
        {
            let temp = tempfile::tempdir().unwrap();
            write(&temp.path().join("f"), 0o600);
            std::os::unix::fs::chown(temp.path(), None, Some(root_group)).unwrap();
            std::fs::set_permissions(temp.path(), std::fs::Permissions::from_mode(root_mode)).unwrap();
            let ownership = GroupOwnership { group: 5, read_only: false };
            let files = AtomicU64::new(0);
            apply(&Directory::open(temp.path()).unwrap(), ownership, ChangePolicy::OnRootMismatch, &files).unwrap();
            assert_eq!(group(&temp.path().join("f")) == 5, walks, "{root_mode:o} {root_group}");
            assert_eq!(files.into_inner() > 0, walks);
        }
    }
}
