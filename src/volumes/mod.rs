//! Volumes of pods: everything below `<root>/pods/<uid>/volumes`, and what containers mount from it.
//!
//! In: a pod and the objects it refers to. Out: host paths for the containers' mounts. May touch the pod's own directory, the
//! mount table through [`Mounter`](mounter::Mounter), and referenced objects through `api::objects`. Never the runtime.

mod ports;

pub use ports::{MountedVolume, MountedVolumes, PodVolumes, VolumeError, VolumeErrorClass};
