//! Whether the pod's AppArmor profiles can be enforced here (contract A-07). Pure, but for [`enabled`].

use std::path::Path;

use k8s_openapi::api::core::v1::{AppArmorProfile, SecurityContext};

use crate::pods::Pod;

const ANNOTATION: &str = "container.apparmor.security.beta.kubernetes.io/";
const LOCALHOST: &str = "localhost/";

/// The kernel enforces AppArmor profiles. Looked up once, at start.
pub fn enabled(sys: &Path) -> bool {
    let switched_on = std::fs::read(sys.join("module/apparmor/parameters/enabled"));
    sys.join("kernel/security/apparmor").exists() && switched_on.is_ok_and(|text| text.len() > 1 && text[0] == b'Y')
}

/// Why not, in upstream's words.
pub(super) fn check(pod: &Pod, enabled: bool) -> Result<(), String> {
    if !required(pod) {
        return Ok(());
    }
    if !enabled {
        return Err("AppArmor is not enabled on the host".to_owned());
    }
    let empty = contexts(pod).any(|(name, context)| {
        let own = context.and_then(|c| c.app_armor_profile.as_ref());
        let annotated = pod.annotations().get(&format!("{ANNOTATION}{name}")).map(String::as_str);
        let local = match (own, annotated, pod_profile(pod)) {
            (Some(own), _, _) => localhost(own),
            (None, Some(annotated), _) if known(annotated) => annotated.strip_prefix(LOCALHOST),
            (None, _, Some(of_pod)) => localhost(of_pod),
            (None, _, None) => None,
        };
        local.is_some_and(|profile| profile.trim().is_empty())
    });
    if empty { Err("invalid empty AppArmor profile name: \"\"".to_owned()) } else { Ok(()) }
}

fn localhost(profile: &AppArmorProfile) -> Option<&str> {
    (profile.type_ == "Localhost").then(|| profile.localhost_profile.as_deref().unwrap_or_default())
}

fn known(annotation: &str) -> bool {
    matches!(annotation, "runtime/default" | "unconfined") || annotation.starts_with(LOCALHOST)
}

fn pod_profile(pod: &Pod) -> Option<&AppArmorProfile> {
    pod.spec().security_context.as_ref()?.app_armor_profile.as_ref()
}

fn contexts(pod: &Pod) -> impl Iterator<Item = (&str, Option<&SecurityContext>)> {
    let spec = pod.spec();
    let containers = spec.init_containers.iter().flatten().chain(&spec.containers);
    let ephemeral = spec.ephemeral_containers.iter().flatten();
    containers
        .map(|c| (c.name.as_str(), c.security_context.as_ref()))
        .chain(ephemeral.map(|c| (c.name.as_str(), c.security_context.as_ref())))
}

fn required(pod: &Pod) -> bool {
    let confines = |profile: &AppArmorProfile| profile.type_ != "Unconfined";
    pod_profile(pod).is_some_and(confines)
        || contexts(pod).any(|(_, c)| c.and_then(|c| c.app_armor_profile.as_ref()).is_some_and(confines))
        || pod.annotations().iter().any(|(key, value)| key.starts_with(ANNOTATION) && value != "unconfined")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::admission::fixtures::pod;

    #[test]
    fn a07_a_profile_needs_a_kernel_that_enforces_it() {
        let off = Err("AppArmor is not enabled on the host".to_owned());
        for (spec, without) in [
            (json!({"containers": [{"name": "c"}]}), Ok(())),
            (json!({"securityContext": {"appArmorProfile": {"type": "Unconfined"}}, "containers": []}), Ok(())),
            (
                json!({"securityContext": {"appArmorProfile": {"type": "RuntimeDefault"}}, "containers": []}),
                off.clone(),
            ),
            (
                json!({"containers": [{"name": "c", "securityContext": {"appArmorProfile": {"type": "RuntimeDefault"}}}]}),
                off,
            ),
        ] {
            assert_eq!(check(&pod(spec.clone()), false), without, "{spec}");
            assert_eq!(check(&pod(spec), true), Ok(()));
        }
        let empty = json!({"type": "Localhost", "localhostProfile": " "});
        let spec = json!({"containers": [{"name": "c", "securityContext": {"appArmorProfile": empty}}]});
        assert_eq!(check(&pod(spec), true), Err("invalid empty AppArmor profile name: \"\"".to_owned()));
    }

    #[test]
    fn a07_the_kernel_says_whether() {
        let sys = tempfile::tempdir().unwrap();
        assert!(!enabled(sys.path()));
        let parameters = sys.path().join("module/apparmor/parameters");
        std::fs::create_dir_all(&parameters).unwrap();
        std::fs::create_dir_all(sys.path().join("kernel/security/apparmor")).unwrap();
        for (text, expected) in [("Y\n", true), ("N\n", false)] {
            std::fs::write(parameters.join("enabled"), text).unwrap();
            assert_eq!(enabled(sys.path()), expected);
        }
    }
}
