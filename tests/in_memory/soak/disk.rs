//! The disk and the cgroup tree of the soak: one real directory per pod, as the agent's own files need it, and a set of cgroups.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{Arc, Mutex},
};

use async_trait::async_trait;
use rkubelet::{
    cri::v1,
    pods::{ContainerRef, Pod, PodUid},
    resources::{CgroupError, PodCgroups},
    volumes::{MountedVolumes, PodVolumes, VolumeError},
};

/// Directories below `<root>/pods`.
pub struct DiskVolumes {
    pub pods: PathBuf,
    /// Each mount keeps so many bytes for ever: the leak that the memory invariant must find.
    pub leaks: usize,
    pub leaked: Mutex<Vec<Vec<u8>>>,
}

pub fn names_in(directory: &std::path::Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

#[async_trait]
impl PodVolumes for DiskVolumes {
    async fn mount(&self, pod: &Pod) -> Result<Arc<MountedVolumes>, Vec<VolumeError>> {
        std::fs::create_dir_all(self.pods.join(pod.uid().as_str()).join("volumes")).unwrap();
        if self.leaks > 0 {
            // Written to, or the kernel gives no memory for it.
            self.leaked.lock().unwrap().push(vec![1; self.leaks]);
        }
        Ok(Arc::default())
    }
    async fn refresh(&self, _: &Pod) -> Result<Option<std::time::Duration>, Vec<VolumeError>> {
        Ok(None)
    }
    async fn container_mounts(
        &self,
        _: &Pod,
        _: ContainerRef<'_>,
        _: &MountedVolumes,
        _: &BTreeMap<String, String>,
    ) -> Result<Vec<v1::Mount>, VolumeError> {
        Ok(Vec::new())
    }
    async fn unmount(&self, uid: &PodUid) -> Result<(), VolumeError> {
        match std::fs::remove_dir_all(self.pods.join(uid.as_str())) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => panic!("{error}"),
            _ => Ok(()),
        }
    }
    async fn on_disk(&self) -> Vec<PodUid> {
        names_in(&self.pods).iter().map(|name| PodUid::from(name.as_str())).collect()
    }
}

#[derive(Default)]
pub struct CgroupSet(pub Mutex<BTreeSet<PodUid>>);

#[async_trait]
impl PodCgroups for CgroupSet {
    fn cgroup_parent(&self, pod: &Pod) -> String {
        format!("/kubepods/pod{}", pod.uid())
    }
    async fn create(&self, pod: &Pod) -> Result<(), CgroupError> {
        self.0.lock().unwrap().insert(pod.uid().clone());
        Ok(())
    }
    async fn remove(&self, uid: &PodUid) -> Result<(), CgroupError> {
        self.0.lock().unwrap().remove(uid);
        Ok(())
    }
    async fn list(&self) -> Vec<PodUid> {
        self.0.lock().unwrap().iter().cloned().collect()
    }
}
