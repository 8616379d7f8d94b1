//! Mount points for volumes that a container mounts inside another volume.
//!
//! API-backed volumes are read-only to the runtime too, so the directory for a mount below one must exist before. Pure.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::VolumeMount;

use super::set_up_error::SetUpError;
use crate::pods::Pod;

/// Directories, relative to the volume, in which containers mount other volumes: the outermost ones only.
pub(super) fn nested_mount_points(pod: &Pod, volume: &str) -> Result<BTreeSet<String>, SetUpError> {
    let mut nested = BTreeSet::new();
    for mounts in mounts_of_containers(pod) {
        nested.extend(nested_in_container(mounts, volume)?);
    }
    Ok(nested)
}

/// The volumeMounts of each container, ephemeral ones included.
pub(super) fn mounts_of_containers(pod: &Pod) -> impl Iterator<Item = &[VolumeMount]> {
    let spec = pod.spec();
    let inits = spec.init_containers.iter().flatten();
    let containers = inits.chain(&spec.containers).map(|c| c.volume_mounts.as_deref());
    let ephemeral = spec.ephemeral_containers.iter().flatten().map(|c| c.volume_mounts.as_deref());
    containers.chain(ephemeral).flatten()
}

fn nested_in_container(mounts: &[VolumeMount], volume: &str) -> Result<Vec<String>, SetUpError> {
    let all: BTreeSet<String> = mounts.iter().map(|m| clean(&m.mount_path)).collect();
    let mut nested = Vec::new();
    for mount in mounts.iter().filter(|m| m.name == volume) {
        let own = clean(&mount.mount_path);
        if own == ".." || own.starts_with("../") {
            return Err(SetUpError::terminal(format!("invalid container mount point {own}")));
        }
        let below = format!("{}/", own.trim_end_matches('/'));
        let mut outermost: Vec<&str> = Vec::new();
        for path in all.iter().filter_map(|p| p.strip_prefix(&below)).filter(|p| !p.is_empty()) {
            let inside = |outer: &&str| path.strip_prefix(*outer).is_some_and(|rest| rest.starts_with('/'));
            if !outermost.iter().any(inside) {
                outermost.push(path);
            }
        }
        nested.extend(outermost.into_iter().map(str::to_owned));
    }
    Ok(nested)
}

/// The path without `.`, empty and inner `..` components, as Go's `filepath.Clean`.
fn clean(path: &str) -> String {
    let absolute = path.starts_with('/');
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." if parts.last().is_some_and(|p| *p != "..") => drop(parts.pop()),
            ".." if absolute => {}
            part => parts.push(part),
        }
    }
    let joined = parts.join("/");
    match (absolute, joined.is_empty()) {
        (true, _) => format!("/{joined}"),
        (false, true) => ".".to_owned(),
        (false, false) => joined,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::volumes::fixtures;

    #[test]
    fn outermost_nested_mounts_are_found() {
        let mounts = |pairs: &[(&str, &str)]| -> Vec<_> {
            pairs.iter().map(|(name, path)| json!({"name": name, "mountPath": path})).collect()
        };
        for (pairs, expected) in [
            (vec![("v", "/dir"), ("o", "/other")], vec![]),
            (vec![("v", "/dir/"), ("o", "/dir//nested/"), ("p", "/dir/nested/double")], vec!["nested"]),
            (
                vec![("v", "/dir"), ("a", "/dir/nested"), ("b", "/dir/nested-vol"), ("c", "/dir/nested/x")],
                vec!["nested", "nested-vol"],
            ),
            (vec![("v", "/dir"), ("o", "/directory")], vec![]),
            (vec![("v", "/dir"), ("o", "/dir/a/../b/c")], vec!["b/c"]),
        ] {
            let pod = fixtures::pod(json!({"spec": {"containers": [{"name": "c", "volumeMounts": mounts(&pairs)}]}}));
            let found = nested_mount_points(&pod, "v").unwrap();
            assert_eq!(found.iter().map(String::as_str).collect::<Vec<_>>(), expected, "{pairs:?}");
        }
    }

    #[test]
    fn a_mount_path_that_leaves_the_root_is_refused() {
        let pod = fixtures::pod(json!({"spec": {"containers": [
            {"name": "c", "volumeMounts": [{"name": "v", "mountPath": "../x"}]}
        ]}}));
        assert_eq!(nested_mount_points(&pod, "v").unwrap_err().message, "invalid container mount point ../x");
    }

    #[test]
    fn cleaning_is_gos() {
        for (path, cleaned) in
            [("/a/./b//c/", "/a/b/c"), ("/..", "/"), ("a/..", "."), ("../../x", "../../x"), ("", "."), ("/", "/")]
        {
            assert_eq!(clean(path), cleaned, "{path:?}");
        }
    }
}
