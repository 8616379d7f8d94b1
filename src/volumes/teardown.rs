//! Taking down what a pod has on this node, from the disk and the mount table alone (contract V-46, P-13).
//!
//! In: a pod UID. Out: nothing left of it below `<root>/pods`. Can be stopped and started again at any step. Never removes a
//! file on another mount, never follows a link.

use std::{
    cmp::Reverse,
    ffi::{OsStr, OsString},
    io,
    path::{Path, PathBuf},
};

use nix::errno::Errno;

use super::{
    directory::{Directory, EntryKind},
    layout::{PODS, PodPaths},
    mounter::{self, MountPoint, Mounter, Unmount},
};
use crate::pods::PodUid;

/// Levels that a removal goes down before it moves what is deeper up to the top: bounds stack and open files.
const MAX_DEPTH: usize = 64;
/// Entries that a removal keeps in memory at once.
const BATCH: usize = 4096;

/// What could not be taken down; the rest was.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {source}")]
pub(super) struct TeardownError {
    pub(super) path: PathBuf,
    pub(super) source: io::Error,
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> TeardownError + '_ {
    |source| TeardownError { path: path.to_owned(), source }
}

/// Unmounts everything below the pod's directory, then removes it. The first failure is returned after all was tried.
pub(super) fn tear_down_pod(root: &Path, uid: &PodUid, mounter: &dyn Mounter) -> Result<(), TeardownError> {
    // The mount table has resolved paths.
    let root = match root.canonicalize() {
        Ok(root) => root,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(failed(root)(e)),
    };
    let Some(paths) = PodPaths::new(&root, uid) else {
        return Err(failed(Path::new(uid.as_str()))(io::ErrorKind::InvalidInput.into()));
    };
    unmount_all(&paths, mounter)?;
    remove_directories(&root.join(PODS), &paths)
}

fn unmount_all(paths: &PodPaths, mounter: &dyn Mounter) -> Result<(), TeardownError> {
    let mounts = mounter.list().map_err(failed(paths.pod()))?;
    let mut first_failure = None;
    for path in unmount_order(&mounts, paths) {
        let sub_path = path.starts_with(paths.sub_paths());
        // A subPath is a second view of a volume: nothing is lost when it goes while in use.
        let how = if sub_path { Unmount::Lazy } else { Unmount::Now };
        match mounter.unmount(path, how) {
            Ok(()) => {}
            // Gone meanwhile, or hidden below another mount.
            Err(e) if is_any(&e, &[Errno::EINVAL, Errno::ENOENT]) && !mounter.is_mount_point(path).unwrap_or(true) => {}
            Err(e) => {
                first_failure.get_or_insert_with(|| failed(path)(e));
            }
        }
    }
    first_failure.map_or(Ok(()), Err)
}

/// subPaths before the volumes that they show; then the deepest first; of stacked mounts the newest first.
fn unmount_order<'a>(mounts: &'a [MountPoint], paths: &PodPaths) -> Vec<&'a Path> {
    let mut order: Vec<&Path> =
        mounts.iter().rev().map(|m| m.path.as_path()).filter(|p| mounter::is_within(p, paths.pod())).collect();
    order.sort_by_key(|path| (!path.starts_with(paths.sub_paths()), Reverse(path.components().count())));
    order
}

/// Readiness markers first: a half-removed volume must not be taken for a complete one.
fn remove_directories(pods: &Path, paths: &PodPaths) -> Result<(), TeardownError> {
    let (pods, name) = match (Directory::open(pods), paths.pod().file_name()) {
        (Ok(directory), Some(name)) => (directory, name),
        (Err(e), _) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        (Err(e), _) => return Err(failed(pods)(e)),
        (_, None) => return Ok(()),
    };
    if let Ok(pod) = pods.child_same_mount(name) {
        for first in ["plugins", "volume-subpaths", "volumes"] {
            remove_tree_one_filesystem(&pod, OsStr::new(first)).map_err(failed(&paths.pod().join(first)))?;
        }
    }
    remove_tree_one_filesystem(&pods, name).map_err(failed(paths.pod()))
}

/// Removes an entry and all below it. A mount point anywhere inside, bind mounts included, is an error (`EXDEV` or `EBUSY`) and
/// nothing on it is touched; symlinks are removed, never followed. A missing entry is fine.
pub(super) fn remove_tree_one_filesystem(parent: &Directory, name: &OsStr) -> io::Result<()> {
    let Some(stat) = parent.stat_entry(name)? else { return Ok(()) };
    if super::directory::kind_of(&stat) != EntryKind::Directory {
        return parent.remove_file(name);
    }
    let top = parent.child_same_mount(name)?;
    // Each round removes the moved-up trees of the one before.
    while empty(&top, &top, 0)? {}
    parent.remove_empty_directory(name)
}

/// Empties a directory. True when something deep was moved up to `top` and is still to be removed.
fn empty(directory: &Directory, top: &Directory, depth: usize) -> io::Result<bool> {
    let mut moved = false;
    loop {
        let mut entries = directory.entries_up_to(BATCH)?;
        if depth == 0 {
            // Left for the next round: it would be found again and again.
            entries.retain(|(name, _)| !moved || !is_moved_up(name));
        }
        if entries.is_empty() {
            return Ok(moved);
        }
        for (name, kind) in entries {
            if kind != EntryKind::Directory {
                directory.remove_file(&name)?;
            } else if depth == MAX_DEPTH {
                directory.move_entry(&name, top, &moved_up_name())?;
                moved = true;
            } else {
                let child = directory.child_same_mount(&name)?;
                moved |= empty(&child, top, depth + 1)?;
                directory.remove_empty_directory(&name)?;
            }
        }
    }
}

const MOVED_UP: &str = "..removing.";

fn moved_up_name() -> OsString {
    OsString::from(format!("{MOVED_UP}{:016x}", rand::random::<u64>()))
}

fn is_moved_up(name: &OsStr) -> bool {
    name.to_str().is_some_and(|n| n.starts_with(MOVED_UP))
}

fn is_any(error: &io::Error, errnos: &[Errno]) -> bool {
    errnos.iter().any(|e| error.raw_os_error() == Some(*e as i32))
}

/// UIDs with a directory below `<root>/pods`.
pub(super) fn pods_on_disk(root: &Path) -> io::Result<Vec<PodUid>> {
    let entries = match std::fs::read_dir(root.join(PODS)) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    let mut uids = Vec::new();
    for entry in entries {
        let entry = entry?;
        if let (true, Ok(name)) = (entry.file_type()?.is_dir(), entry.file_name().into_string()) {
            uids.push(PodUid::new(name));
        }
    }
    uids.sort();
    Ok(uids)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::volumes::mounter::{LinuxMounter, RecordingMounter};

    fn uid() -> PodUid {
        "u1".into()
    }

    /// A root with `pods/u1`, resolved as the mount table shows it.
    fn root() -> (tempfile::TempDir, PathBuf) {
        let temp = tempfile::tempdir().unwrap();
        let root = temp.path().canonicalize().unwrap();
        fs::create_dir_all(root.join("pods/u1/volumes/kubernetes.io~secret/s")).unwrap();
        fs::create_dir_all(root.join("pods/u1/volume-subpaths/s/c/0")).unwrap();
        fs::create_dir_all(root.join("pods/u2")).unwrap();
        (temp, root)
    }

    #[test]
    fn v46_mounts_go_subpaths_first_then_deepest_and_the_pod_is_gone() {
        let (_temp, root) = root();
        let pod = root.join("pods/u1");
        let mounter = RecordingMounter::default();
        for path in ["volumes/kubernetes.io~secret/s", "volumes/kubernetes.io~secret/s/deep", "volume-subpaths/s/c/0"] {
            mounter.add(&pod.join(path), "tmpfs");
        }
        mounter.add(&root.join("pods/u10/volumes/x"), "tmpfs");
        mounter.add(&root.join("pods/u2"), "tmpfs");
        tear_down_pod(&root, &uid(), &mounter).unwrap();
        let calls: Vec<String> =
            mounter.calls().into_iter().map(|c| c.replace(&format!("{}/", pod.display()), "")).collect();
        assert_eq!(
            calls,
            [
                "unmount Lazy volume-subpaths/s/c/0",
                "unmount Now volumes/kubernetes.io~secret/s/deep",
                "unmount Now volumes/kubernetes.io~secret/s"
            ]
        );
        assert!(!pod.exists());
        assert!(root.join("pods/u2").exists());
        tear_down_pod(&root, &uid(), &mounter).unwrap();
    }

    #[test]
    fn v46_a_busy_mount_stops_the_removal_and_a_second_try_ends_it() {
        let (_temp, root) = root();
        let mounter = RecordingMounter::default();
        let volume = root.join("pods/u1/volumes/kubernetes.io~secret/s");
        mounter.add(&volume, "tmpfs");
        mounter.fail(OsStr::new("s"), Errno::EBUSY as i32);
        let error = tear_down_pod(&root, &uid(), &mounter).unwrap_err();
        assert_eq!(error.path, volume);
        assert!(volume.exists(), "nothing is removed below a mount that could not be taken down");
        mounter.fail_nothing();
        tear_down_pod(&root, &uid(), &mounter).unwrap();
        assert!(!root.join("pods/u1").exists());
    }

    #[test]
    fn v46_removal_never_crosses_a_bind_mount_of_the_same_file_system() {
        let (_temp, root) = root();
        let kept = tempfile::tempdir().unwrap();
        fs::write(kept.path().join("precious"), "x").unwrap();
        let target = root.join("pods/u1/volumes/kubernetes.io~secret/s");
        let linux = LinuxMounter::default();
        linux.bind(kept.path(), &target).unwrap();
        let pods = Directory::open(&root.join("pods")).unwrap();
        let removal = remove_tree_one_filesystem(&pods, OsStr::new("u1"));
        let survived = kept.path().join("precious").exists();
        // The whole way, with the real table, unmounts first.
        let whole = tear_down_pod(&root, &uid(), &linux);
        let left = linux.is_mount_point(&target).unwrap();
        if left {
            linux.unmount(&target, Unmount::Lazy).unwrap();
        }
        assert_eq!(removal.unwrap_err().raw_os_error(), Some(Errno::EXDEV as i32));
        assert!(survived && kept.path().join("precious").exists());
        whole.unwrap();
        assert!(!left && !root.join("pods/u1").exists());
    }

    #[test]
    fn v46_links_are_removed_not_followed() {
        let (_temp, root) = root();
        let kept = tempfile::tempdir().unwrap();
        fs::write(kept.path().join("precious"), "x").unwrap();
        std::os::unix::fs::symlink(kept.path(), root.join("pods/u1/link")).unwrap();
        std::os::unix::fs::symlink(kept.path(), root.join("pods/u3")).unwrap();
        tear_down_pod(&root, &uid(), &LinuxMounter::default()).unwrap();
        tear_down_pod(&root, &"u3".into(), &LinuxMounter::default()).unwrap();
        assert!(!root.join("pods/u3").is_symlink());
        assert!(kept.path().join("precious").exists());
    }

    #[test]
    fn v46_a_very_deep_and_wide_tree_is_removed() {
        let (_temp, root) = root();
        let mut directory = Directory::open(&root.join("pods/u1")).unwrap();
        for level in 0..700 {
            directory.create_file(OsStr::new("f")).unwrap();
            directory.create_child(OsStr::new("side"), 0o700).unwrap();
            let name = OsString::from(format!("d{level}"));
            directory = directory.create_child(&name, 0o700).unwrap();
        }
        for file in 0..(BATCH + 10) {
            fs::write(root.join(format!("pods/u1/f{file}")), "").unwrap();
        }
        tear_down_pod(&root, &uid(), &LinuxMounter::default()).unwrap();
        assert!(!root.join("pods/u1").exists());
    }

    #[test]
    fn uids_that_lead_elsewhere_are_refused() {
        let (_temp, root) = root();
        for uid in ["..", "u1/volumes", ""] {
            assert!(tear_down_pod(&root, &uid.into(), &RecordingMounter::default()).is_err(), "{uid:?}");
        }
        assert!(root.join("pods/u1").exists());
    }

    #[test]
    fn v21_pods_on_disk() {
        let (_temp, root) = root();
        fs::write(root.join("pods/file"), "").unwrap();
        assert_eq!(pods_on_disk(&root).unwrap(), [PodUid::from("u1"), PodUid::from("u2")]);
        assert!(pods_on_disk(Path::new("/nowhere")).unwrap().is_empty());
    }
}
