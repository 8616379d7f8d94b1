//! Volumes of pods: everything below `<root>/pods/<uid>/volumes`, and what containers mount from it.
//!
//! In: a pod and the objects it refers to. Out: host paths for the containers' mounts. May touch the pod's own directory, the
//! mount table through [`Mounter`], and referenced objects through `api::objects`. Never the runtime.

mod api_volume;
mod atomic_writer;
mod config_map;
mod directory;
mod downward_api;
mod empty_dir;
#[cfg(test)]
mod fixtures;
mod fs_group;
mod host_path;
mod key_projection;
mod layout;
mod mounter;
mod mounts;
mod nested_mounts;
mod payload;
mod pod_volumes;
mod ports;
mod projected;
mod root_dir;
mod secret;
mod set_up_error;
mod sub_path;
mod teardown;
#[cfg(test)]
mod tests;

pub use mounter::{LinuxMounter, MountPoint, Mounter, RecordingMounter, Unmount};
pub use pod_volumes::{NodeVolumes, VolumeSettings};
pub use ports::{MountedVolume, MountedVolumes, PodVolumes, VolumeError, VolumeErrorClass};
pub use root_dir::{RootDirError, prepare_root_dir};
