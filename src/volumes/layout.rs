//! Where things of a pod are below the root directory (contract 5.1): the same places as upstream, for a swap in place.

use std::path::{Path, PathBuf};

use super::directory::is_single_component;
use crate::pods::PodUid;

/// Which kind's directory a volume lives in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Plugin {
    EmptyDir,
    ConfigMap,
    Secret,
    Projected,
    DownwardApi,
}

impl Plugin {
    fn directory(self) -> &'static str {
        match self {
            Self::EmptyDir => "kubernetes.io~empty-dir",
            Self::ConfigMap => "kubernetes.io~configmap",
            Self::Secret => "kubernetes.io~secret",
            Self::Projected => "kubernetes.io~projected",
            Self::DownwardApi => "kubernetes.io~downward-api",
        }
    }
}

pub(super) const PODS: &str = "pods";
pub(super) const SUB_PATHS: &str = "volume-subpaths";

/// `<root>/pods/<uid>` and what is below. Volume and container names are single path components, checked by the callers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PodPaths(PathBuf);

impl PodPaths {
    /// `None` for a UID that is no plain file name: it could lead elsewhere.
    pub(super) fn new(root: &Path, uid: &PodUid) -> Option<Self> {
        is_single_component(uid.as_str()).then(|| Self(root.join(PODS).join(uid.as_str())))
    }

    pub(super) fn pod(&self) -> &Path {
        &self.0
    }
    pub(super) fn volumes(&self) -> PathBuf {
        self.0.join("volumes")
    }
    pub(super) fn plugins(&self) -> PathBuf {
        self.0.join("plugins")
    }
    pub(super) fn sub_paths(&self) -> PathBuf {
        self.0.join(SUB_PATHS)
    }
    pub(super) fn volume(&self, plugin: Plugin, volume: &str) -> PathBuf {
        self.volumes().join(plugin.directory()).join(volume)
    }
    /// The marker that says: this volume's directory was set up completely. API-backed kinds wrap an emptyDir.
    pub(super) fn ready(&self, plugin: Plugin, volume: &str) -> PathBuf {
        let wrapped = if plugin == Plugin::EmptyDir { "" } else { "wrapped_" };
        self.plugins().join(Plugin::EmptyDir.directory()).join(format!("{wrapped}{volume}")).join("ready")
    }
    /// Where a subPath is bound for the `index`-th volumeMount of a container.
    pub(super) fn sub_path(&self, volume: &str, container: &str, index: usize) -> PathBuf {
        self.sub_paths().join(volume).join(container).join(index.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p13_paths_are_upstreams() {
        let paths = PodPaths::new(Path::new("/var/lib/kubelet"), &"u-1".into()).unwrap();
        let shown = |p: PathBuf| p.strip_prefix("/var/lib/kubelet/pods/u-1").unwrap().to_str().unwrap().to_owned();
        assert_eq!(shown(paths.volume(Plugin::Secret, "s")), "volumes/kubernetes.io~secret/s");
        assert_eq!(shown(paths.volume(Plugin::DownwardApi, "d")), "volumes/kubernetes.io~downward-api/d");
        assert_eq!(shown(paths.ready(Plugin::EmptyDir, "e")), "plugins/kubernetes.io~empty-dir/e/ready");
        assert_eq!(shown(paths.ready(Plugin::Secret, "s")), "plugins/kubernetes.io~empty-dir/wrapped_s/ready");
        assert_eq!(shown(paths.sub_path("v", "c", 3)), "volume-subpaths/v/c/3");
        for uid in ["", "..", "a/b", "/etc"] {
            assert!(PodPaths::new(Path::new("/r"), &uid.into()).is_none(), "{uid:?}");
        }
    }
}
