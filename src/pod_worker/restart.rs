//! Restart policy: whether an ended container is to run again (contract P-23, P-24). Pure.

use std::time::Duration;

use k8s_openapi::api::core::v1 as corev1;

use crate::pods::{ContainerKind, ContainerRef, Pod};

/// The feature gates that a pod's life depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LifecycleGates {
    /// `ContainerRestartRules`: a container may have a restart policy and rules of its own.
    pub restart_rules: bool,
    /// `RestartAllContainersOnContainerExits`: a rule may restart the whole pod in place.
    pub restart_all: bool,
    /// `ContainerStopSignals`: `lifecycle.stopSignal` is handed on and reported.
    pub stop_signals: bool,
    /// `ImageVolumeWithDigest`: the status of a mounted image volume names the image that was mounted.
    pub image_digests: bool,
}

/// As Kubernetes 1.37 has them.
impl Default for LifecycleGates {
    fn default() -> Self {
        Self { restart_rules: true, restart_all: true, stop_signals: false, image_digests: false }
    }
}

/// What the policy says of a container that ended with `exit_code`. The first matching rule of the container comes first, then its own
/// policy, then the pod's.
pub fn restarts_after(pod: &Pod, container: ContainerRef<'_>, exit_code: i32, gates: LifecycleGates) -> bool {
    match container.kind {
        ContainerKind::Sidecar => return true,
        // Whatever the rules say: it has done its work, or it is looked at and not run again (contract P-22).
        ContainerKind::Init if exit_code == 0 => return false,
        ContainerKind::Ephemeral => return false,
        ContainerKind::Init | ContainerKind::Main => {}
    }
    if gates.restart_rules && container.spec.restart_policy.is_some() {
        match matching_action(container.spec, exit_code) {
            Some("Restart") => return true,
            Some("RestartAllContainers") if gates.restart_all => return true,
            _ => {}
        }
    }
    match effective_policy(pod, container, gates) {
        "Never" => false,
        "OnFailure" => exit_code != 0,
        _ => true,
    }
}

/// The action of the first rule that the exit code matches.
pub fn matching_action(container: &corev1::Container, exit_code: i32) -> Option<&str> {
    let rules = container.restart_policy_rules.iter().flatten();
    rules.filter(|rule| rule_matches(rule, exit_code)).map(|rule| rule.action.as_str()).next()
}

/// Whether a container that the agent itself killed (probe failed) is started again: anything but Never.
pub fn restarts_after_kill(pod: &Pod, container: ContainerRef<'_>, gates: LifecycleGates) -> bool {
    container.kind == ContainerKind::Sidecar || effective_policy(pod, container, gates) != "Never"
}

fn effective_policy<'a>(pod: &'a Pod, container: ContainerRef<'a>, gates: LifecycleGates) -> &'a str {
    let own = container.spec.restart_policy.as_deref().filter(|_| gates.restart_rules);
    own.unwrap_or_else(|| pod.restart_policy())
}

fn rule_matches(rule: &corev1::ContainerRestartRule, exit_code: i32) -> bool {
    let Some(codes) = &rule.exit_codes else { return false };
    let listed = codes.values.iter().flatten().any(|v| *v == exit_code);
    match codes.operator.as_str() {
        "In" => listed,
        "NotIn" => !listed,
        _ => false,
    }
}

/// Whole seconds as Go prints a duration: `10s`, `1m20s`, `5m0s`, `1h0m0s`.
pub fn go_seconds(duration: Duration) -> String {
    let total = duration.as_secs();
    let (hours, minutes, seconds) = (total / 3600, total / 60 % 60, total % 60);
    match (hours, minutes) {
        (0, 0) => format!("{seconds}s"),
        (0, _) => format!("{minutes}m{seconds}s"),
        _ => format!("{hours}h{minutes}m{seconds}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::PodSource;
    use serde_json::json;

    fn pod(policy: &str, container: serde_json::Value, init: serde_json::Value) -> Pod {
        let object = serde_json::from_value(json!({
            "metadata": {"uid": "u", "name": "p", "namespace": "n"},
            "spec": {"restartPolicy": policy, "containers": [container], "initContainers": [init]},
        }))
        .unwrap();
        Pod::new(object, PodSource::Api, jiff::Timestamp::UNIX_EPOCH).unwrap()
    }

    const ON: LifecycleGates =
        LifecycleGates { restart_rules: true, restart_all: true, stop_signals: false, image_digests: false };

    #[test]
    fn p23_policies_by_exit_code() {
        for (policy, code, main, init) in [
            ("Always", 0, true, false),
            ("Always", 1, true, true),
            ("OnFailure", 0, false, false),
            ("OnFailure", 7, true, true),
            ("Never", 0, false, false),
            ("Never", 1, false, false),
        ] {
            let pod = pod(policy, json!({"name": "c"}), json!({"name": "i"}));
            assert_eq!(restarts_after(&pod, pod.container("c").unwrap(), code, ON), main, "{policy} {code}");
            assert_eq!(restarts_after(&pod, pod.container("i").unwrap(), code, ON), init, "init {policy} {code}");
        }
    }

    #[test]
    fn p21_sidecars_restart_whatever_the_policy() {
        let pod = pod("Never", json!({"name": "c"}), json!({"name": "s", "restartPolicy": "Always"}));
        assert!(restarts_after(&pod, pod.container("s").unwrap(), 0, ON));
        assert!(restarts_after_kill(&pod, pod.container("s").unwrap(), ON));
        assert!(!restarts_after_kill(&pod, pod.container("c").unwrap(), ON));
    }

    fn rule(action: &str, operator: &str, values: &[i32]) -> serde_json::Value {
        json!({"action": action, "exitCodes": {"operator": operator, "values": values}})
    }

    #[test]
    fn p24_the_first_matching_rule_comes_before_the_policy() {
        let container = json!({"name": "c", "restartPolicy": "Never",
            "restartPolicyRules": [rule("Restart", "In", &[42, 43]), rule("RestartAllContainers", "In", &[42, 44]),
                rule("Later", "NotIn", &[1, 2])]});
        let pod = pod(
            "Always",
            container.clone(),
            json!({"name": "i", "restartPolicy": "OnFailure",
            "restartPolicyRules": [rule("RestartAllContainers", "In", &[0])]}),
        );
        let main = pod.container("c").unwrap();
        for (code, restarts, action) in [
            (42, true, Some("Restart")),
            (43, true, Some("Restart")),
            (44, true, Some("RestartAllContainers")),
            (1, false, None),
            (3, false, Some("Later")),
        ] {
            assert_eq!(restarts_after(&pod, main, code, ON), restarts, "{code}");
            assert_eq!(matching_action(main.spec, code), action, "{code}");
        }
        let init = pod.container("i").unwrap();
        assert!(restarts_after(&pod, init, 5, ON), "its own OnFailure");
        assert!(!restarts_after(&pod, init, 0, ON), "an init container that succeeded is done");
        let no_all = LifecycleGates { restart_all: false, ..ON };
        assert!(!restarts_after(&pod, main, 44, no_all), "without the gate: the container's own policy");
        let no_rules = LifecycleGates { restart_rules: false, restart_all: false, ..ON };
        assert!(restarts_after(&pod, main, 1, no_rules), "without the gate: the pod's policy");
    }

    #[test]
    fn p22_an_ephemeral_container_is_never_restarted() {
        let object = serde_json::from_value(json!({"metadata": {"uid": "u", "name": "p", "namespace": "n"},
            "spec": {"restartPolicy": "Always", "containers": [{"name": "c"}], "ephemeralContainers": [{"name": "e"}]}}))
        .unwrap();
        let pod = Pod::new(object, PodSource::Api, jiff::Timestamp::UNIX_EPOCH).unwrap();
        assert!([0, 1].iter().all(|code| !restarts_after(&pod, pod.container("e").unwrap(), *code, ON)));
    }

    #[test]
    fn durations_read_as_go_prints_them() {
        for (secs, text) in [(10, "10s"), (80, "1m20s"), (300, "5m0s"), (3600, "1h0m0s")] {
            assert_eq!(go_seconds(Duration::from_secs(secs)), text);
        }
    }
}
