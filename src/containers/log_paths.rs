//! Where containers log (contract L-01): `<pod logs>/<ns>_<name>_<uid>/<container>/<n>.log`, linked from `/var/log/containers`.

use std::path::{Path, PathBuf};

use crate::pods::Pod;

/// ext4's limit for a file name, in bytes.
const MAX_FILE_NAME: usize = 255;

/// The sandbox's `log_directory`.
pub fn pod_log_directory(pod_logs_dir: &Path, pod: &Pod) -> PathBuf {
    pod_logs_dir.join(format!("{}_{}_{}", pod.namespace(), pod.name(), pod.uid()))
}

/// Where one container's logs are. The runtime wants it to exist, with mode 0755.
pub fn container_log_directory(pod_logs_dir: &Path, pod: &Pod, container: &str) -> PathBuf {
    pod_log_directory(pod_logs_dir, pod).join(container)
}

/// `<container>/<restart count>.log`: the container's `log_path`, relative to the sandbox's directory.
pub fn container_log_path(container: &str, restart_count: u32) -> String {
    format!("{container}/{restart_count}.log")
}

/// `<pod>_<ns>_<container>-<id>.log`: the link's name in `/var/log/containers`, cut to what ext4 takes.
pub fn container_log_link(pod: &Pod, container: &str, container_id: &str) -> String {
    const SUFFIX: &str = ".log";
    let mut name = format!("{}_{}_{container}-{container_id}", pod.name(), pod.namespace());
    let room = MAX_FILE_NAME - SUFFIX.len();
    if name.len() > room {
        let end = (0..=room).rev().find(|at| name.is_char_boundary(*at)).unwrap_or(0);
        name.truncate(end);
    }
    name + SUFFIX
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::containers::tests::{named_pod, pod};

    #[test]
    fn l01_paths() {
        let root = Path::new("/var/log/pods");
        assert_eq!(pod_log_directory(root, &pod("{}")), Path::new("/var/log/pods/ns_p_uid-1"));
        assert_eq!(container_log_directory(root, &pod("{}"), "c"), Path::new("/var/log/pods/ns_p_uid-1/c"));
        assert_eq!(container_log_path("c", 3), "c/3.log");
        assert_eq!(container_log_link(&pod("{}"), "c", "abc"), "p_ns_c-abc.log");
    }

    #[test]
    fn l01_link_fits_ext4() {
        let pod = named_pod(&"p".repeat(253), "{}");
        let link = container_log_link(&pod, "c", &"0".repeat(64));
        assert_eq!(link.len(), 255);
        assert!(link.ends_with(".log"));
    }
}
