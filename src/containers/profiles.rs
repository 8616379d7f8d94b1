//! seccomp and AppArmor profiles of a container (contract P-59).

use std::path::Path;

use k8s_openapi::api::core::v1::{Container, SeccompProfile};
use protocols::cri::v1::{SecurityProfile, security_profile::ProfileType};

use super::ConfigError;
use crate::pods::Pod;

const APPARMOR_ANNOTATION: &str = "container.apparmor.security.beta.kubernetes.io/";
const LOCALHOST: &str = "localhost/";
const RUNTIME_DEFAULT: &str = "runtime/default";
const UNCONFINED: &str = "unconfined";

pub(super) fn profile(kind: ProfileType, localhost_ref: impl Into<String>) -> SecurityProfile {
    SecurityProfile { profile_type: kind.into(), localhost_ref: localhost_ref.into() }
}

/// The container's own profile, else the pod's, else Unconfined, or RuntimeDefault with `seccompDefault`. Localhost profiles
/// are files below `<root>/seccomp`.
pub(super) fn seccomp(
    pod: &Pod,
    container: &Container,
    root_dir: &Path,
    default_runtime: bool,
) -> Result<SecurityProfile, ConfigError> {
    let own = container.security_context.as_ref().and_then(|c| c.seccomp_profile.as_ref());
    let pods = pod.spec().security_context.as_ref().and_then(|c| c.seccomp_profile.as_ref());
    let default = if default_runtime { ProfileType::RuntimeDefault } else { ProfileType::Unconfined };
    let Some(SeccompProfile { type_, localhost_profile }) = own.or(pods) else { return Ok(profile(default, "")) };
    match type_.as_str() {
        "RuntimeDefault" => Ok(profile(ProfileType::RuntimeDefault, "")),
        "Localhost" => match localhost_profile.as_deref() {
            Some(name) if !name.is_empty() => {
                let path = root_dir.join("seccomp").join(name.trim_start_matches('/'));
                Ok(profile(ProfileType::Localhost, path.display().to_string()))
            }
            _ => Err(ConfigError::container("localhostProfile must be set if seccompProfile type is Localhost.")),
        },
        _ => Ok(profile(ProfileType::Unconfined, "")),
    }
}

/// The profile, and the same in the field that older runtimes read. The container's field wins over the annotation (static
/// pods have only that), which wins over the pod's field.
pub(super) fn apparmor(pod: &Pod, container: &Container) -> Result<Option<(SecurityProfile, String)>, ConfigError> {
    let own = container.security_context.as_ref().and_then(|c| c.app_armor_profile.as_ref());
    let pods = pod.spec().security_context.as_ref().and_then(|c| c.app_armor_profile.as_ref());
    let field = |p: &k8s_openapi::api::core::v1::AppArmorProfile| (p.type_.clone(), p.localhost_profile.clone());
    let annotated =
        || pod.annotations().get(&format!("{APPARMOR_ANNOTATION}{}", container.name)).and_then(|v| annotation(v));
    let Some((kind, localhost)) = own.map(field).or_else(annotated).or_else(|| pods.map(field)) else {
        return Ok(None);
    };
    let found = match (kind.as_str(), localhost) {
        ("RuntimeDefault", _) => (profile(ProfileType::RuntimeDefault, ""), RUNTIME_DEFAULT.to_owned()),
        ("Unconfined", _) => (profile(ProfileType::Unconfined, ""), UNCONFINED.to_owned()),
        ("Localhost", Some(name)) => (profile(ProfileType::Localhost, &name), format!("{LOCALHOST}{name}")),
        ("Localhost", None) => return Err(ConfigError::container("missing localhost apparmor profile name")),
        (other, _) => return Err(ConfigError::container(format!("unknown apparmor profile type: {other:?}"))),
    };
    Ok(Some(found))
}

fn annotation(value: &str) -> Option<(String, Option<String>)> {
    match value {
        RUNTIME_DEFAULT => Some(("RuntimeDefault".to_owned(), None)),
        UNCONFINED => Some(("Unconfined".to_owned(), None)),
        _ => value.strip_prefix(LOCALHOST).map(|name| ("Localhost".to_owned(), Some(name.to_owned()))),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::containers::tests::{pod, pod_with};

    #[test]
    fn p59_seccomp() {
        let root = Path::new("/var/lib/kubelet");
        let spec = |pods: &str, own: &str| {
            pod(&format!(
                r#"{{"securityContext":{{{pods}}},"containers":[{{"name":"c","securityContext":{{{own}}}}}]}}"#
            ))
        };
        let default = r#""seccompProfile":{"type":"RuntimeDefault"}"#;
        let unconfined = r#""seccompProfile":{"type":"Unconfined"}"#;
        let local = r#""seccompProfile":{"type":"Localhost","localhostProfile":"a/b.json"}"#;
        for (pods, own, fallback, want) in [
            ("", "", false, profile(ProfileType::Unconfined, "")),
            ("", "", true, profile(ProfileType::RuntimeDefault, "")),
            (default, "", false, profile(ProfileType::RuntimeDefault, "")),
            (default, unconfined, true, profile(ProfileType::Unconfined, "")),
            (unconfined, local, false, profile(ProfileType::Localhost, "/var/lib/kubelet/seccomp/a/b.json")),
        ] {
            let pod = spec(pods, own);
            let container = pod.container("c").unwrap().spec.clone();
            assert_eq!(seccomp(&pod, &container, root, fallback).unwrap(), want, "{pods} {own}");
        }
        let pod = spec("", r#""seccompProfile":{"type":"Localhost"}"#);
        let error = seccomp(&pod, pod.container("c").unwrap().spec, root, false).unwrap_err();
        assert_eq!(error.message, "localhostProfile must be set if seccompProfile type is Localhost.");
    }

    #[test]
    fn p59_apparmor() {
        let annotated = |value: &str, pods: &str, own: &str| {
            let key = format!("{APPARMOR_ANNOTATION}c");
            pod_with(
                json!({"name": "p", "namespace": "ns", "uid": "u", "annotations": {key: value}}),
                &format!(
                    r#"{{"securityContext":{{{pods}}},"containers":[{{"name":"c","securityContext":{{{own}}}}}]}}"#
                ),
            )
        };
        let unconfined = r#""appArmorProfile":{"type":"Unconfined"}"#;
        let local = r#""appArmorProfile":{"type":"Localhost","localhostProfile":"x"}"#;
        for (annotation, pods, own, want) in [
            ("", "", "", None),
            ("", unconfined, "", Some((profile(ProfileType::Unconfined, ""), "unconfined"))),
            ("runtime/default", unconfined, "", Some((profile(ProfileType::RuntimeDefault, ""), "runtime/default"))),
            ("localhost/y", "", "", Some((profile(ProfileType::Localhost, "y"), "localhost/y"))),
            ("runtime/default", "", local, Some((profile(ProfileType::Localhost, "x"), "localhost/x"))),
        ] {
            let pod = annotated(annotation, pods, own);
            let got = apparmor(&pod, pod.container("c").unwrap().spec).unwrap();
            assert_eq!(got, want.map(|(p, old): (_, &str)| (p, old.to_owned())), "{annotation} {pods} {own}");
        }
        let pod = annotated("", "", r#""appArmorProfile":{"type":"Localhost"}"#);
        assert_eq!(
            apparmor(&pod, pod.container("c").unwrap().spec).unwrap_err().message,
            "missing localhost apparmor profile name"
        );
    }
}
