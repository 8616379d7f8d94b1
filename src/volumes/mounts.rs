//! From a container's volumeMounts to CRI mounts (contract P-62, V-43, V-50). Pure, but for the subPath that
//! [`sub_path`](super::sub_path) prepares.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::VolumeMount;
use protocols::cri::v1;

use super::{MountedVolume, MountedVolumes};
use crate::containers::expand_sub_path;

/// Where the files of one volumeMount come from.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Source<'a> {
    pub(super) volume: &'a MountedVolume,
    /// Expanded and checked; `None` for the whole volume.
    pub(super) sub_path: Option<String>,
}

/// The volume and subPath of a volumeMount, or the message that upstream gives.
pub(super) fn source<'a>(
    mount: &VolumeMount,
    container: &str,
    mounted: &'a MountedVolumes,
    env: &BTreeMap<String, String>,
) -> Result<Source<'a>, String> {
    let volume = mounted
        .get(&mount.name)
        .ok_or_else(|| format!("cannot find volume {:?} to mount into container {container:?}", mount.name))?;
    let sub_path = match mount.sub_path_expr.as_deref() {
        Some(expr) if !expr.is_empty() => expand_sub_path(expr, env)?,
        _ => mount.sub_path.clone().unwrap_or_default(),
    };
    if sub_path.is_empty() {
        return Ok(Source { volume, sub_path: None });
    }
    if sub_path.starts_with('/') {
        return Err(format!("error SubPath `{sub_path}` must not be an absolute path"));
    }
    if sub_path.split('/').any(|part| part == "..") {
        return Err(format!("unable to provision SubPath `{sub_path}`: must not contain '..'"));
    }
    Ok(Source { volume, sub_path: Some(sub_path) })
}

/// Everything of the CRI mount but its host path.
pub(super) fn mount(
    mount: &VolumeMount,
    volume: &MountedVolume,
    runtime_does_recursive_read_only: bool,
    selinux: bool,
) -> Result<v1::Mount, String> {
    let container_path =
        if mount.mount_path.starts_with('/') { mount.mount_path.clone() } else { format!("/{}", mount.mount_path) };
    let recursive_read_only = recursive_read_only(mount, runtime_does_recursive_read_only)
        .map_err(|e| format!("failed to resolve recursive read-only mode: {e}"))?;
    Ok(v1::Mount {
        container_path,
        readonly: mount.read_only == Some(true) || volume.read_only,
        recursive_read_only,
        selinux_relabel: volume.selinux_relabel && selinux,
        propagation: propagation(mount)?.into(),
        mount_options: mount.bind_mount_options.clone().unwrap_or_default(),
        ..Default::default()
    })
}

fn propagation(mount: &VolumeMount) -> Result<v1::MountPropagation, String> {
    match mount.mount_propagation.as_deref() {
        None | Some("None") => Ok(v1::MountPropagation::PropagationPrivate),
        Some("HostToContainer") => Ok(v1::MountPropagation::PropagationHostToContainer),
        Some("Bidirectional") => Ok(v1::MountPropagation::PropagationBidirectional),
        Some(other) => Err(format!("invalid MountPropagation mode: {other:?}")),
    }
}

fn recursive_read_only(mount: &VolumeMount, runtime_can: bool) -> Result<bool, String> {
    let mode = match mount.recursive_read_only.as_deref() {
        None | Some("Disabled") => return Ok(false),
        Some(mode) => mode,
    };
    let requested = format!("volume {:?} requested recursive read-only mode, but it is not", mount.name);
    if mount.read_only != Some(true) {
        return Err(format!("{requested} read-only"));
    }
    if let Some(propagation) = mount.mount_propagation.as_deref().filter(|p| *p != "None") {
        return Err(format!("{requested} compatible with propagation {propagation:?}"));
    }
    match mode {
        "IfPossible" => Ok(runtime_can),
        "Enabled" if runtime_can => Ok(true),
        "Enabled" => Err(format!("{requested} supported by the runtime")),
        other => Err(format!("unknown recursive read-only mode {other:?}")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn volume_mount(fields: Value) -> VolumeMount {
        let mut object = json!({"name": "v", "mountPath": "/m"});
        object.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        serde_json::from_value(object).unwrap()
    }
    fn volume(read_only: bool) -> MountedVolume {
        MountedVolume { host_path: "/h".into(), image: None, read_only, selinux_relabel: true }
    }
    fn sub_path(fields: Value) -> Result<Option<String>, String> {
        let mounted = MountedVolumes::from([("v".to_owned(), volume(false))]);
        let env = [("POD", "p-1"), ("EMPTY", ""), ("UP", "../x"), ("ABS", "/etc")];
        let env = env.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        source(&volume_mount(fields), "c", &mounted, &env).map(|s| s.sub_path)
    }

    #[test]
    fn v42_sub_paths_and_expressions() {
        for (fields, expected) in [
            (json!({}), Ok(None)),
            (json!({"subPath": "a/b"}), Ok(Some("a/b"))),
            (json!({"subPathExpr": "logs/$(POD)"}), Ok(Some("logs/p-1"))),
            (json!({"subPathExpr": "$$(POD)-$x-$"}), Ok(Some("$(POD)-$x-$"))),
            (json!({"subPathExpr": "$(POD"}), Ok(Some("$(POD"))),
            (json!({"subPathExpr": "$(EMPTY)$(B)$(A)"}), Err("missing value for A, B, EMPTY")),
            (json!({"subPathExpr": "$(UP)"}), Err("unable to provision SubPath `../x`: must not contain '..'")),
            (json!({"subPathExpr": "$(ABS)"}), Err("error SubPath `/etc` must not be an absolute path")),
            (json!({"subPath": "a/../b"}), Err("unable to provision SubPath `a/../b`: must not contain '..'")),
            (json!({"subPath": "/a"}), Err("error SubPath `/a` must not be an absolute path")),
            (json!({"name": "w"}), Err("cannot find volume \"w\" to mount into container \"c\"")),
        ] {
            let got = sub_path(fields.clone());
            assert_eq!(got.as_ref().map(Option::as_deref).map_err(String::as_str), expected, "{fields}");
        }
    }

    #[test]
    fn v43_propagation() {
        for (mode, expected) in [
            (Value::Null, Ok(v1::MountPropagation::PropagationPrivate)),
            (json!("None"), Ok(v1::MountPropagation::PropagationPrivate)),
            (json!("HostToContainer"), Ok(v1::MountPropagation::PropagationHostToContainer)),
            (json!("Bidirectional"), Ok(v1::MountPropagation::PropagationBidirectional)),
            (json!("Odd"), Err("invalid MountPropagation mode: \"Odd\"".to_owned())),
        ] {
            let got = mount(&volume_mount(json!({"mountPropagation": mode})), &volume(false), false, false);
            assert_eq!(got.map(|m| m.propagation()), expected);
        }
    }

    #[test]
    fn p62_read_only_paths_and_labels() {
        let made =
            |fields, read_only, selinux| mount(&volume_mount(fields), &volume(read_only), false, selinux).unwrap();
        assert!(!made(json!({}), false, false).readonly);
        assert!(made(json!({"readOnly": true}), false, false).readonly);
        assert!(made(json!({"readOnly": false}), true, false).readonly, "configMaps and the like are always read-only");
        assert_eq!(made(json!({"mountPath": "rel"}), false, false).container_path, "/rel");
        assert!(made(json!({}), false, true).selinux_relabel);
        assert!(!made(json!({}), false, false).selinux_relabel);
    }

    #[test]
    fn n13_options_of_the_bind_mount_go_to_the_runtime() {
        let made = |fields| mount(&volume_mount(fields), &volume(false), true, false).unwrap().mount_options;
        assert_eq!(made(json!({"bindMountOptions": ["noexec", "nodev"]})), ["noexec", "nodev"]);
        assert!(made(json!({})).is_empty());
    }

    #[test]
    fn v50_recursive_read_only() {
        let requested =
            "failed to resolve recursive read-only mode: volume \"v\" requested recursive read-only mode, but";
        for (fields, runtime, expected) in [
            (json!({}), true, Ok(false)),
            (json!({"recursiveReadOnly": "Disabled"}), true, Ok(false)),
            (json!({"recursiveReadOnly": "IfPossible", "readOnly": true}), true, Ok(true)),
            (json!({"recursiveReadOnly": "IfPossible", "readOnly": true}), false, Ok(false)),
            (json!({"recursiveReadOnly": "Enabled", "readOnly": true}), true, Ok(true)),
            (
                json!({"recursiveReadOnly": "Enabled", "readOnly": true}),
                false,
                Err(format!("{requested} it is not supported by the runtime")),
            ),
            (json!({"recursiveReadOnly": "Enabled"}), true, Err(format!("{requested} it is not read-only"))),
            (
                json!({"recursiveReadOnly": "Enabled", "readOnly": true, "mountPropagation": "HostToContainer"}),
                true,
                Err(format!("{requested} it is not compatible with propagation \"HostToContainer\"")),
            ),
            (
                json!({"recursiveReadOnly": "X", "readOnly": true}),
                true,
                Err("failed to resolve recursive read-only mode: unknown recursive read-only mode \"X\"".to_owned()),
            ),
        ] {
            let got = mount(&volume_mount(fields.clone()), &volume(false), runtime, false);
            assert_eq!(got.map(|m| m.recursive_read_only), expected, "{fields}");
        }
    }
}
