//! Each rule, by the message it gives.

use std::collections::BTreeMap;

use serde_json::json;

use super::super::decode::{typed, with_dependent_defaults};
use super::resources::CGROUP_V1;
use super::*;

fn violations(object: serde_json::Value) -> Vec<String> {
    let gates = object.get("featureGates").cloned().unwrap_or_default();
    let gates: BTreeMap<String, bool> = serde_json::from_value(gates).unwrap_or_default();
    let configuration = typed(&with_dependent_defaults(object)).unwrap();
    validate(&configuration, &FeatureGates::from_map(&gates).unwrap(), CgroupVersion::V2)
}

fn logging_violations(object: serde_json::Value) -> Vec<String> {
    validate_logging(&typed(&object).unwrap().logging, &FeatureGates::default())
}

#[test]
fn s09_defaults_are_valid() {
    assert_eq!(violations(json!({})), Vec::<String>::new());
}

#[test]
fn s09_each_rule_speaks() {
    let table = [
        (json!({"nodeLeaseDurationSeconds": -1}), "nodeLeaseDurationSeconds must be greater than 0"),
        (
            json!({"systemCgroups": "/s"}),
            "systemCgroups (--system-cgroups) was specified and cgroupRoot (--cgroup-root) was not specified",
        ),
        (json!({"eventBurst": -1}), "eventBurst (--event-burst) -1 must not be a negative number"),
        (json!({"healthzPort": 65536}), "healthzPort (--healthz-port) 65536 must be between 1 and 65535, inclusive"),
        (
            json!({"cpuCFSQuotaPeriod": "2s"}),
            "cpuCFSQuotaPeriod (--cpu-cfs-quota-period) {2s} must be between 1ms and 1sec, inclusive",
        ),
        (
            json!({"imageGCHighThresholdPercent": 101}),
            "imageGCHighThresholdPercent (--image-gc-high-threshold) 101 must be between 0 and 100, inclusive",
        ),
        (
            json!({"imageGCLowThresholdPercent": 85}),
            "imageGCLowThresholdPercent (--image-gc-low-threshold) 85 must be less than imageGCHighThresholdPercent (--image-gc-high-threshold) 85",
        ),
        (json!({"imageMaximumGCAge": "1s"}), "imageMaximumGCAge 1s must be greater than imageMinimumGCAge 2m0s"),
        (json!({"port": -1}), "port (--port) -1 must be between 1 and 65535, inclusive"),
        (
            json!({"readOnlyPort": 70000}),
            "readOnlyPort (--read-only-port) 70000 must be between 0 and 65535, inclusive",
        ),
        (json!({"oomScoreAdj": 1001}), "oomScoreAdj (--oom-score-adj) 1001 must be between -1000 and 1000, inclusive"),
        (json!({"nodeStatusMaxImages": -2}), "nodeStatusMaxImages (--node-status-max-images) -2 must be -1 or greater"),
        (json!({"maxParallelImagePulls": 0}), "maxParallelImagePulls 0 must be a positive number"),
        (
            json!({"maxParallelImagePulls": 2, "serializeImagePulls": true}),
            "maxParallelImagePulls cannot be larger than 1 unless SerializeImagePulls (--serialize-image-pulls) is set to false",
        ),
        (json!({"runOnce": true}), "runOnce (--runOnce) true, Runonce mode has been deprecated and should not be set"),
        (
            json!({"topologyManagerScope": "node"}),
            "topologyManagerScope (--topology-manager-scope) \"node\" must be one of: \"container\", or \"pod\"",
        ),
        (
            json!({"shutdownGracePeriod": "500ms"}),
            "shutdownGracePeriod {500ms} must be either zero or otherwise >= 1 sec",
        ),
        (
            json!({"shutdownGracePeriodCriticalPods": "5s"}),
            "shutdownGracePeriodCriticalPods {5s} must be <= shutdownGracePeriod {0s}",
        ),
        (
            json!({"memorySwap": {"swapBehavior": "Full"}}),
            "memorySwap.swapBehavior \"Full\" must be one of: \"\", \"LimitedSwap\" or \"NoSwap\"",
        ),
        (
            json!({"crashLoopBackOff": {"maxContainerRestartPeriod": "301s"}}),
            "CrashLoopBackOff.MaxContainerRestartPeriod (got: 301 seconds) must be set between 1s and 300s",
        ),
        (
            json!({"enforceNodeAllocatable": ["pods", "none"]}),
            "enforceNodeAllocatable (--enforce-node-allocatable) may not contain additional enforcements when \"none\" is specified",
        ),
        (
            json!({"enforceNodeAllocatable": ["kube-reserved"]}),
            "kubeReservedCgroup (--kube-reserved-cgroup) must be specified when \"kube-reserved\" or \"kube-reserved-compressible\" included in enforceNodeAllocatable (--enforce-node-allocatable)",
        ),
        (
            json!({"cgroupsPerQOS": false}),
            "cgroupsPerQOS (--cgroups-per-qos) must be set to true when \"pods\" contained in enforceNodeAllocatable (--enforce-node-allocatable)",
        ),
        (
            json!({"hairpinMode": "x"}),
            "option \"x\" specified for hairpinMode (--hairpin-mode). Valid options are \"none\", \"hairpin-veth\" or \"promiscuous-bridge\"",
        ),
        (
            json!({"reservedSystemCPUs": "3-1"}),
            "unable to parse reservedSystemCPUs (--reserved-cpus) 3-1, error: invalid range \"3-1\" (3 > 1)",
        ),
        (
            json!({"reservedMemory": [{"numaNode": 0, "limits": {"cpu": "1"}}]}),
            "the limit type \"cpu\" for NUMA node 0 is not supported, only [memory hugepages-<HugePageSize>] is accepted",
        ),
        (json!({"userNamespaces": {"idsPerPod": 65537}}), "userNamespaces.idsPerPod must be a multiple of 65536"),
        (
            json!({"memoryThrottlingFactor": 1.5}),
            "memoryThrottlingFactor 1.5 must be greater than 0 and less than or equal to 1.0",
        ),
        (
            json!({"enableSystemLogQuery": true, "enableSystemLogHandler": false}),
            "enableSystemLogHandler is required for enableSystemLogQuery",
        ),
        (json!({"containerLogMaxFiles": 1}), "containerLogMaxFiles must be greater than 1"),
        (
            json!({"containerLogMonitorInterval": "2s"}),
            "containerLogMonitorInterval must be a positive time duration greater than or equal to 3s",
        ),
        (json!({"podLogsDir": "/var//log/"}), "pod logs path \"/var//log/\" must be normalized"),
        (
            json!({"defaultPodSysctls": {"net.core.somaxconn": "1"}}),
            "DefaultPodSysctls feature gate is required for Kubelet configuration option defaultPodSysctls",
        ),
        (
            json!({"featureGates": {"DefaultPodSysctls": true}, "defaultPodSysctls": {"vm.swappiness": "1"}}),
            "\"vm.swappiness\" is not known to be namespaced for defaultPodSysctls",
        ),
    ];
    for (object, message) in table {
        assert_eq!(violations(object), [format!("{PREFIX}{message}")]);
    }
}

#[test]
fn s09_logging_and_taints() {
    let taint = json!({"registerWithTaints": [{"key": "-", "effect": "NoSchedule"}]});
    assert_eq!(violations(taint), ["invalid taint: {-  NoSchedule <nil>}"]);
    let logging = json!({"logging": {"format": "xml", "options": {"text": {"splitStream": true}}}});
    assert_eq!(
        logging_violations(logging),
        [
            "logging.format: Invalid value: \"xml\": Unsupported log format",
            "logging.options.text.splitStream: Forbidden: Feature LoggingAlphaOptions is disabled",
        ]
    );
}

#[test]
fn s09_tracing_and_hidden_metrics_come_without_prefix() {
    assert_eq!(violations(json!({"showHiddenMetricsForVersion": "1.36"})), [""; 0]);
    let two = violations(json!({"showHiddenMetricsForVersion": "1.2", "tracing": {"samplingRatePerMillion": -1}}));
    assert_eq!(
        two,
        [
            "invalid showHiddenMetricsForVersion: showHiddenMetricsForVersion: Invalid value: \"1.2\": must be omitted or \
             have the value '1.36'; only the previous minor version is allowed",
            "tracing.samplingRatePerMillion: Invalid value: -1: sampling rate must be positive",
        ]
    );
}

#[test]
fn s09_allowlist_patterns() {
    let of = |pattern: &str| {
        violations(json!({
            "imagePullCredentialsVerificationPolicy": "NeverVerifyAllowlistedImages",
            "preloadedImagesVerificationAllowlist": [pattern],
        }))
    };
    for fine in ["registry.k8s.io/*", "registry:5000/a/b", "busybox"] {
        assert_eq!(of(fine), [""; 0], "{fine}");
    }
    for (pattern, reason) in [
        ("*", "not a valid wildcard pattern, only patterns ending with '/*' are allowed: *"),
        ("/*", "at least registry hostname is required"),
        ("a/b:1", "neither tag nor digest is accepted in an image reference: a/b:1"),
        (" a", "leading/trailing spaces are not allowed:  a"),
    ] {
        let message = format!("{PREFIX}invalid image pattern in `preloadedImagesVerificationAllowlist`: {reason}");
        assert_eq!(of(pattern), [message]);
    }
}

#[test]
fn s09_tracing_endpoint_has_a_known_scheme() {
    assert_eq!(violations(json!({"tracing": {"endpoint": "localhost:4317"}})), [""; 0]);
    assert!(violations(json!({"tracing": {"endpoint": "http://a"}}))[0].contains("unsupported scheme: http."));
}

#[test]
fn s13_cgroup_v1_is_refused_unless_allowed() {
    let mut configuration = KubeletConfiguration::default();
    let gates = FeatureGates::default();
    assert_eq!(validate(&configuration, &gates, CgroupVersion::V1), [CGROUP_V1]);
    configuration.fail_cgroup_v1 = false;
    assert!(validate(&configuration, &gates, CgroupVersion::V1).is_empty());
}

#[test]
fn cpu_lists() {
    assert_eq!(parse_cpu_set("0-2,7").unwrap().into_iter().collect::<Vec<_>>(), [0, 1, 2, 7]);
    assert!(parse_cpu_set("").unwrap().is_empty());
    assert!(parse_cpu_set("a").is_err());
}
