//! Restart policy: whether an ended container is to run again (contract P-23, P-24). Pure.

use std::time::Duration;

use k8s_openapi::api::core::v1 as corev1;

use crate::pods::{ContainerKind, ContainerRef, Pod};

/// What the policy says of a container that ended with `exit_code`. Rules of the container come first, then its own policy, then
/// the pod's.
pub fn restarts_after(pod: &Pod, container: ContainerRef<'_>, exit_code: i32) -> bool {
    if container.kind == ContainerKind::Sidecar {
        return true;
    }
    if let Some(rules) = &container.spec.restart_policy_rules
        && rules.iter().any(|rule| rule.action == "Restart" && rule_matches(rule, exit_code))
    {
        return true;
    }
    match effective_policy(pod, container) {
        "Never" => false,
        "OnFailure" => exit_code != 0,
        _ => true,
    }
}

/// Whether a container that the agent itself killed (probe failed) is started again: anything but Never.
pub fn restarts_after_kill(pod: &Pod, container: ContainerRef<'_>) -> bool {
    container.kind == ContainerKind::Sidecar || effective_policy(pod, container) != "Never"
}

fn effective_policy<'a>(pod: &'a Pod, container: ContainerRef<'a>) -> &'a str {
    let policy = container.spec.restart_policy.as_deref().unwrap_or_else(|| pod.restart_policy());
    // An init container that succeeded is never run again in the same sandbox.
    if container.kind == ContainerKind::Init && policy == "Always" { "OnFailure" } else { policy }
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
            assert_eq!(restarts_after(&pod, pod.container("c").unwrap(), code), main, "{policy} {code}");
            assert_eq!(restarts_after(&pod, pod.container("i").unwrap(), code), init, "init {policy} {code}");
        }
    }

    #[test]
    fn p21_sidecars_restart_whatever_the_policy() {
        let pod = pod("Never", json!({"name": "c"}), json!({"name": "s", "restartPolicy": "Always"}));
        assert!(restarts_after(&pod, pod.container("s").unwrap(), 0));
        assert!(restarts_after_kill(&pod, pod.container("s").unwrap()));
        assert!(!restarts_after_kill(&pod, pod.container("c").unwrap()));
    }

    #[test]
    fn p24_rules_come_before_the_policy() {
        let rules = json!([{"action": "Restart", "exitCodes": {"operator": "In", "values": [42]}}]);
        let pod = pod(
            "Always",
            json!({"name": "c", "restartPolicy": "Never", "restartPolicyRules": rules}),
            json!({"name": "i"}),
        );
        assert!(restarts_after(&pod, pod.container("c").unwrap(), 42));
        assert!(!restarts_after(&pod, pod.container("c").unwrap(), 1));
    }

    #[test]
    fn durations_read_as_go_prints_them() {
        for (secs, text) in [(10, "10s"), (80, "1m20s"), (300, "5m0s"), (3600, "1h0m0s")] {
            assert_eq!(go_seconds(Duration::from_secs(secs)), text);
        }
    }
}
