//! The agent's root directory (`/var/lib/kubelet`): its directories and their sharing of mounts (contract S-15, 5.1).
//!
//! Runs once at start, before any pod. May touch the root directory and the mount that it lies on.

use std::{
    fs::{DirBuilder, Permissions},
    io,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
};

use super::mounter::{self, Mounter};

/// Name below the root directory, mode.
const DIRECTORIES: [(&str, u32); 6] = [
    ("pods", 0o750),
    ("plugins", 0o750),
    ("plugins_registry", 0o750),
    ("pod-resources", 0o750),
    ("checkpoints", 0o700),
    ("pki", 0o750),
];

/// The root directory cannot be used: fatal at start.
#[derive(Debug, thiserror::Error)]
pub enum RootDirError {
    #[error("rootDirectory must be an absolute path: {0}")]
    Relative(PathBuf),
    #[error("error creating directory {path}: {source}")]
    Create { path: PathBuf, source: io::Error },
    #[error("error configuring root directory: {0}")]
    Share(io::Error),
}

/// Makes the directories that are missing, and the root directory a shared mount, so that mounts made in containers with
/// Bidirectional propagation reach the host and other pods. Idempotent; modes of existing directories stay.
pub fn prepare_root_dir(root: &Path, mounter: &dyn Mounter) -> Result<(), RootDirError> {
    if !root.is_absolute() {
        return Err(RootDirError::Relative(root.to_owned()));
    }
    create(root, 0o750)?;
    share(root, mounter).map_err(RootDirError::Share)?;
    for (name, mode) in DIRECTORIES {
        create(&root.join(name), mode)?;
    }
    Ok(())
}

fn share(root: &Path, mounter: &dyn Mounter) -> io::Result<()> {
    let root = root.canonicalize()?;
    let mounts = mounter.list()?;
    if mounter::mount_of(&mounts, &root).is_some_and(|m| m.shared) {
        return Ok(());
    }
    mounter.bind_shared_onto_itself(&root)
}

/// Makes a directory, and parents, with a mode that no umask narrows.
pub(super) fn create_directory(path: &Path, mode: u32) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    DirBuilder::new().recursive(true).mode(mode).create(path)?;
    std::fs::set_permissions(path, Permissions::from_mode(mode))
}

fn create(path: &Path, mode: u32) -> Result<(), RootDirError> {
    create_directory(path, mode).map_err(|source| RootDirError::Create { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volumes::mounter::{LinuxMounter, RecordingMounter, Unmount};

    #[test]
    fn s15_directories_have_their_modes() {
        let temp = tempfile::tempdir().unwrap();
        let root = temp.path().join("a/kubelet");
        prepare_root_dir(&root, &RecordingMounter::default()).unwrap();
        for (name, mode) in DIRECTORIES {
            let found = std::fs::metadata(root.join(name)).unwrap().permissions().mode() & 0o7777;
            assert_eq!(found, mode, "{name}");
        }
        assert_eq!(std::fs::metadata(&root).unwrap().permissions().mode() & 0o7777, 0o750);
        assert!(prepare_root_dir(Path::new("kubelet"), &RecordingMounter::default()).is_err());
    }

    #[test]
    fn s15_the_root_directory_becomes_a_shared_mount_once() {
        let temp = tempfile::tempdir().unwrap();
        let mounter = LinuxMounter::default();
        let below = || {
            let mounts = mounter.list().unwrap();
            mounts.into_iter().filter(|m| m.path.starts_with(temp.path())).collect::<Vec<_>>()
        };
        prepare_root_dir(temp.path(), &mounter).unwrap();
        prepare_root_dir(temp.path(), &mounter).unwrap();
        let mounts = below();
        let host_shared = mounter::mount_of(&mounter.list().unwrap(), Path::new("/tmp")).unwrap().shared;
        for mount in &mounts {
            mounter.unmount(&mount.path, Unmount::Now).unwrap();
        }
        assert_eq!(mounts.len(), usize::from(!host_shared));
        assert!(mounts.iter().all(|m| m.shared));
        assert!(below().is_empty());
    }
}
