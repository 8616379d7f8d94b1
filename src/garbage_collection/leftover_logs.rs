//! Logs of pods and containers that are gone (contract R-27): directories under `/var/log/pods`, and links under `/var/log/containers` that
//! lead nowhere. Blocking.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::pods::PodUid;

/// A pod's log directory, `<namespace>_<name>_<uid>`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct PodLogs {
    pub(super) uid: PodUid,
    pub(super) path: PathBuf,
}

/// Every directory that is named like a pod's.
pub(super) fn pod_logs(pod_logs_dir: &Path) -> io::Result<Vec<PodLogs>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(pod_logs_dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let parts: Vec<&str> = name.to_str().unwrap_or_default().split('_').collect();
        if let [_, _, .., uid] = parts[..]
            && !uid.is_empty()
            && entry.file_type()?.is_dir()
        {
            found.push(PodLogs { uid: PodUid::from(uid), path: entry.path() });
        }
    }
    Ok(found)
}

/// A link to a log file that is not there.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct DeadLink {
    pub(super) path: PathBuf,
    /// Without `.log`; cut short when it was too long for the file system.
    stem: String,
}

impl DeadLink {
    /// What stands where the container's ID should.
    pub(super) fn container_id(&self) -> &str {
        self.stem.rsplit('-').next().unwrap_or_default()
    }

    pub(super) fn is_of(&self, container_id: &str) -> bool {
        self.stem.strip_suffix(container_id).is_some_and(|rest| rest.ends_with('-'))
    }
}

pub(super) fn dead_links(container_logs_dir: &Path) -> Vec<DeadLink> {
    let entries = fs::read_dir(container_logs_dir).into_iter().flatten().flatten();
    let dead = |path: &Path| {
        let link = fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_symlink());
        link && matches!(fs::metadata(path), Err(error) if error.kind() == io::ErrorKind::NotFound)
    };
    let links = entries.map(|entry| entry.path()).filter_map(|path| {
        let stem = path.file_name()?.to_str()?.strip_suffix(".log")?.to_owned();
        Some(DeadLink { stem, path })
    });
    links.filter(|link| dead(&link.path)).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn r27_directories_are_known_by_their_uid() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["ns_pod_uid-1", "lost+found", "a_b", "ns_pod_"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        fs::write(dir.path().join("ns_pod_file"), "").unwrap();
        let want = PodLogs { uid: PodUid::from("uid-1"), path: dir.path().join("ns_pod_uid-1") };
        assert_eq!(pod_logs(dir.path()).unwrap(), [want]);
        assert!(pod_logs(&dir.path().join("none")).is_err());
    }

    #[test]
    fn r27_only_links_that_lead_nowhere() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("0.log"), "").unwrap();
        symlink(at("0.log"), at("p_ns_c-alive.log")).unwrap();
        symlink(at("1.log"), at("p_ns_c-dead.log")).unwrap();
        symlink(at("1.log"), at("p_ns_c-other.txt")).unwrap();
        fs::write(at("p_ns_c-file.log"), "").unwrap();
        let links = dead_links(dir.path());
        assert_eq!(links.iter().map(|link| link.path.clone()).collect::<Vec<_>>(), [at("p_ns_c-dead.log")]);
        assert_eq!(links[0].container_id(), "dead");
        assert!(links[0].is_of("dead") && !links[0].is_of("ead") && !links[0].is_of("alive"));
        assert!(dead_links(&at("none")).is_empty());
    }
}
