//! Puts a payload into the volume of an API-backed kind: configMap, secret, projected, downwardAPI (contract V-23).
//!
//! Blocking. Idempotent: used for the first set-up and for every refresh.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use jiff::Timestamp;

use super::{
    atomic_writer,
    directory::Directory,
    empty_dir::{self, Medium},
    fs_group::GroupOwnership,
    layout::{Plugin, PodPaths},
    mounter::Mounter,
    payload::Payload,
    set_up_error::SetUpError,
};

/// Everything that the disk work needs, owned: it runs on a blocking thread.
#[derive(Debug)]
pub(super) struct ApiVolume {
    pub(super) paths: PodPaths,
    pub(super) plugin: Plugin,
    pub(super) volume: String,
    pub(super) medium: Medium,
    pub(super) payload: Payload,
    pub(super) group: Option<u32>,
    /// Directories for volumes that containers mount inside this one.
    pub(super) nested: BTreeSet<String>,
    pub(super) now: Timestamp,
}

impl ApiVolume {
    /// Returns the volume's path.
    pub(super) fn write(self, mounter: &dyn Mounter) -> Result<PathBuf, SetUpError> {
        let path = empty_dir::set_up(&self.paths, self.plugin, &self.volume, self.medium, self.group, mounter)?;
        let directory = Directory::open(&path).map_err(|e| SetUpError::io("open", &path, &e))?;
        for nested in &self.nested {
            directory.create_all_within(Path::new(nested), 0o755).map_err(|e| {
                SetUpError::io("unable to create nested volume mountpoints: mkdir", &path.join(nested), &e)
            })?;
        }
        let ownership = self.group.map(|group| GroupOwnership { group, read_only: true });
        atomic_writer::write(&directory, &self.payload, ownership, self.now)
            .map_err(|e| SetUpError::io("cannot write the files of", &path, &e))?;
        Ok(path)
    }
}
