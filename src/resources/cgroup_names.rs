//! Names of cgroups: the internal path of components, and how each driver writes it (contract R-01). Pure.

use crate::config::CgroupDriver;

/// A cgroup as a list of components from the root: `kubepods`, `burstable`, `pod<uid>`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct CgroupName(Vec<String>);

impl CgroupName {
    /// From a cgroupfs path: `/`, `/kubelet`, `a/b`.
    pub fn from_path(path: &str) -> Self {
        Self(path.split('/').filter(|part| !part.is_empty()).map(str::to_owned).collect())
    }

    #[must_use]
    pub fn child(&self, component: impl Into<String>) -> Self {
        let mut parts = self.0.clone();
        parts.push(component.into());
        Self(parts)
    }

    /// The absolute path inside each hierarchy, as the driver lays it out.
    pub fn path(&self, driver: CgroupDriver) -> String {
        match driver {
            CgroupDriver::Cgroupfs => format!("/{}", self.0.join("/")),
            CgroupDriver::Systemd => self.slice_path(),
        }
    }

    /// What goes into CRI's `cgroup_parent`: the path, for systemd the slice's own name.
    pub fn cgroup_parent(&self, driver: CgroupDriver) -> String {
        match driver {
            CgroupDriver::Cgroupfs => self.path(driver),
            CgroupDriver::Systemd => self.slice(self.0.len()),
        }
    }

    fn slice_path(&self) -> String {
        (1..=self.0.len()).fold(String::new(), |path, depth| path + "/" + &self.slice(depth)) + self.root_mark()
    }

    fn root_mark(&self) -> &'static str {
        if self.0.is_empty() { "/" } else { "" }
    }

    /// systemd nests slices by name: the slice at depth 2 of a, b, c is `a-b.slice`; a dash inside a component is escaped.
    fn slice(&self, depth: usize) -> String {
        let parts: Vec<String> = self.0.iter().take(depth).map(|part| part.replace('-', "_")).collect();
        format!("{}.slice", parts.join("-"))
    }
}

/// The UID of a pod whose cgroup directory has this name, whichever driver made it.
pub(super) fn pod_uid_of(directory: &str) -> Option<String> {
    match directory.strip_suffix(".slice") {
        Some(slice) => slice.rsplit('-').next()?.strip_prefix("pod").map(|uid| uid.replace('_', "-")),
        None => directory.strip_prefix("pod").map(str::to_owned),
    }
    .filter(|uid| !uid.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(root: &str) -> CgroupName {
        CgroupName::from_path(root).child("kubepods").child("burstable").child("pod0a-1b")
    }

    #[test]
    fn r01_cgroupfs_names() {
        assert_eq!(pod("/").path(CgroupDriver::Cgroupfs), "/kubepods/burstable/pod0a-1b");
        assert_eq!(pod("/").cgroup_parent(CgroupDriver::Cgroupfs), "/kubepods/burstable/pod0a-1b");
        assert_eq!(pod("/kubelet").path(CgroupDriver::Cgroupfs), "/kubelet/kubepods/burstable/pod0a-1b");
        assert_eq!(CgroupName::from_path("/").path(CgroupDriver::Cgroupfs), "/");
    }

    #[test]
    fn r01_systemd_names() {
        assert_eq!(
            pod("/").path(CgroupDriver::Systemd),
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod0a_1b.slice"
        );
        assert_eq!(pod("/").cgroup_parent(CgroupDriver::Systemd), "kubepods-burstable-pod0a_1b.slice");
        assert_eq!(
            pod("/kubelet").path(CgroupDriver::Systemd),
            "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod0a_1b.slice"
        );
        assert_eq!(CgroupName::from_path("").path(CgroupDriver::Systemd), "/");
    }

    #[test]
    fn pod_uids_are_read_back_from_directories() {
        assert_eq!(pod_uid_of("pod0a-1b").as_deref(), Some("0a-1b"));
        assert_eq!(pod_uid_of("kubepods-burstable-pod0a_1b.slice").as_deref(), Some("0a-1b"));
        assert_eq!(pod_uid_of("kubepods-pod0a_1b.slice").as_deref(), Some("0a-1b"));
        assert_eq!(pod_uid_of("burstable"), None);
        assert_eq!(pod_uid_of("kubepods-burstable.slice"), None);
        assert_eq!(pod_uid_of("pod"), None);
    }
}
