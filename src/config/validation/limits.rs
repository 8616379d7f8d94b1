//! Rules on numbers, images, taints and names. Pure.

use std::collections::BTreeSet;

use super::super::feature_gates::FeatureGates;
use super::super::go_duration::GoDuration;
use super::super::labels::is_valid_taint;
use super::super::types::KubeletConfiguration;
use super::Violations;

pub(super) fn check_lease_to_cfs(c: &KubeletConfiguration, gates: &FeatureGates, errors: &mut Violations) {
    errors.require(c.node_lease_duration_seconds > 0, || "nodeLeaseDurationSeconds must be greater than 0".into());
    errors.require(c.system_cgroups.is_empty() || !c.cgroup_root.is_empty(), || {
        "systemCgroups (--system-cgroups) was specified and cgroupRoot (--cgroup-root) was not specified".into()
    });
    errors.not_negative(c.event_burst.into(), "eventBurst (--event-burst)");
    errors.not_negative(c.event_record_qps.into(), "eventRecordQPS (--event-qps)");
    if c.healthz_port != 0 {
        errors.within(c.healthz_port, 1..=65535, "healthzPort (--healthz-port)");
    }
    let period = c.cpu_cfs_quota_period;
    if gates.enabled("CustomCPUCFSQuotaPeriod") {
        errors.require((GoDuration::from_millis(1)..=GoDuration::from_secs(1)).contains(&period), || {
            format!("cpuCFSQuotaPeriod (--cpu-cfs-quota-period) {{{period}}} must be between 1ms and 1sec, inclusive")
        });
    } else {
        errors.require(period == GoDuration::from_millis(100), || {
            format!(
                "cpuCFSQuotaPeriod (--cpu-cfs-quota-period) {{{period}}} requires feature gate CustomCPUCFSQuotaPeriod"
            )
        });
    }
}

pub(super) fn check_image_gc(c: &KubeletConfiguration, gates: &FeatureGates, errors: &mut Violations) {
    let (high, low) = (c.image_gc_high_threshold_percent, c.image_gc_low_threshold_percent);
    errors.within(high, 0..=100, "imageGCHighThresholdPercent (--image-gc-high-threshold)");
    errors.within(low, 0..=100, "imageGCLowThresholdPercent (--image-gc-low-threshold)");
    errors.require(low < high, || {
        format!(
            "imageGCLowThresholdPercent (--image-gc-low-threshold) {low} must be less than \
             imageGCHighThresholdPercent (--image-gc-high-threshold) {high}"
        )
    });
    check_default_sysctls(c, gates, errors);
    let (least, most) = (c.image_minimum_gc_age, c.image_maximum_gc_age);
    errors.require(!least.is_negative(), || format!("imageMinimumGCAge {least} must not be negative"));
    errors.require(!most.is_negative(), || format!("imageMaximumGCAge {most} must not be negative"));
    errors.require(most <= GoDuration::ZERO || most > least, || {
        format!("imageMaximumGCAge {most} must be greater than imageMinimumGCAge {least}")
    });
}

fn check_default_sysctls(c: &KubeletConfiguration, gates: &FeatureGates, errors: &mut Violations) {
    if c.default_pod_sysctls.is_empty() {
        return;
    }
    if !gates.enabled("DefaultPodSysctls") {
        return errors.require(false, || {
            "DefaultPodSysctls feature gate is required for Kubelet configuration option defaultPodSysctls".into()
        });
    }
    let namespaced = |name: &str| {
        name == "kernel.sem"
            || ["kernel.shm", "kernel.msg", "fs.mqueue.", "net."].iter().any(|prefix| name.starts_with(prefix))
    };
    let mut seen = BTreeSet::new();
    for name in c.default_pod_sysctls.keys() {
        let dotted = name.replace('/', ".");
        let segments = dotted.split('.').all(|segment| {
            let edge = |b: Option<u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
            edge(segment.bytes().next())
                && edge(segment.bytes().next_back())
                && segment.bytes().all(|b| edge(Some(b)) || b == b'-' || b == b'_')
        });
        errors.require(segments && name.len() <= 253, || {
            format!("{name:?} is not a valid sysctl name for defaultPodSysctls")
        });
        errors.require(namespaced(&dotted), || format!("{name:?} is not known to be namespaced for defaultPodSysctls"));
        errors
            .require(seen.insert(dotted.clone()), || format!("duplicate sysctl {dotted:?} found in defaultPodSysctls"));
    }
}

pub(super) fn check_limits(c: &KubeletConfiguration, errors: &mut Violations) {
    errors.within(c.iptables_drop_bit, 0..=31, "iptablesDropBit (--iptables-drop-bit)");
    errors.within(c.iptables_masquerade_bit, 0..=31, "iptablesMasqueradeBit (--iptables-masquerade-bit)");
    errors.not_negative(c.kube_api_burst.into(), "kubeAPIBurst (--kube-api-burst)");
    errors.not_negative(c.kube_api_qps.into(), "kubeAPIQPS (--kube-api-qps)");
    errors.require(c.node_status_max_images >= -1, || {
        format!("nodeStatusMaxImages (--node-status-max-images) {} must be -1 or greater", c.node_status_max_images)
    });
    errors.not_negative(c.max_open_files, "maxOpenFiles (--max-open-files)");
    errors.not_negative(c.max_pods.into(), "maxPods (--max-pods)");
    errors.within(c.oom_score_adj, -1000..=1000, "oomScoreAdj (--oom-score-adj)");
    errors.not_negative(c.pods_per_core.into(), "podsPerCore (--pods-per-core)");
    errors.within(c.port, 1..=65535, "port (--port)");
    errors.within(c.read_only_port, 0..=65535, "readOnlyPort (--read-only-port)");
    errors.not_negative(c.registry_burst.into(), "registryBurst (--registry-burst)");
    errors.not_negative(c.registry_pull_qps.into(), "registryPullQPS (--registry-qps)");
    if let Some(pulls) = c.max_parallel_image_pulls {
        errors.require(pulls >= 1, || format!("maxParallelImagePulls {pulls} must be a positive number"));
        errors.require(!c.serialize_image_pulls || pulls <= 1, || {
            "maxParallelImagePulls cannot be larger than 1 unless SerializeImagePulls (--serialize-image-pulls) is set \
             to false"
                .into()
        });
    }
}

pub(super) fn check_start(c: &KubeletConfiguration, gates: &FeatureGates, errors: &mut Violations) {
    errors.require(!c.server_tls_bootstrap || gates.enabled("RotateKubeletServerCertificate"), || {
        "serverTLSBootstrap true requires feature gate RotateKubeletServerCertificate".into()
    });
    errors.require(!c.run_once, || {
        "runOnce (--runOnce) true, Runonce mode has been deprecated and should not be set".into()
    });
}

pub(super) fn check_pull_policy(c: &KubeletConfiguration, gates: &FeatureGates, errors: &mut Violations) {
    let (policy, allowlist) =
        (c.image_pull_credentials_verification_policy.as_str(), &c.preloaded_images_verification_allowlist);
    const ALLOWLISTED: &str = "NeverVerifyAllowlistedImages";
    if gates.enabled("KubeletEnsureSecretPulledImages") {
        let known = ["NeverVerify", "NeverVerifyPreloadedImages", ALLOWLISTED, "AlwaysVerify"];
        errors.require(known.contains(&policy), || {
            format!(
                "option {policy:?} specified for imagePullCredentialsVerificationPolicy. Valid options are \
                 \"NeverVerify\", \"NeverVerifyPreloadedImages\", \"NeverVerifyAllowlistedImages\" or \"AlwaysVerify\""
            )
        });
        errors.require(allowlist.is_empty() || policy == ALLOWLISTED, || {
            "can't set `preloadedImagesVerificationAllowlist` if `imagePullCredentialsVertificationPolicy` is not \
             \"NeverVerifyAllowlistedImages\""
                .into()
        });
        if policy == ALLOWLISTED
            && let Some(reason) = allowlist.iter().find_map(|pattern| allowlist_pattern_error(pattern))
        {
            errors.require(false, || {
                format!("invalid image pattern in `preloadedImagesVerificationAllowlist`: {reason}")
            });
        }
    } else {
        for (unset, name) in [
            (policy.is_empty(), "imagePullCredentialsVerificationPolicy"),
            (allowlist.is_empty(), "preloadedImagesVerificationAllowlist"),
        ] {
            errors.require(unset, || {
                format!("`{name}` must not be set if KubeletEnsureSecretPulledImages feature gate is not enabled")
            });
        }
    }
}

/// A pattern is an image without tag or digest, or a registry or path that ends with `/*`.
fn allowlist_pattern_error(pattern: &str) -> Option<String> {
    if pattern != pattern.trim() {
        return Some(format!("leading/trailing spaces are not allowed: {pattern}"));
    }
    let (name, wildcard) = match pattern.strip_suffix("/*") {
        Some(name) => (name, true),
        None => (pattern, false),
    };
    if name.is_empty() {
        return Some(if wildcard {
            "at least registry hostname is required".to_owned()
        } else {
            format!("the supplied pattern is too short: {pattern}")
        });
    }
    if name.contains('*') {
        return Some(format!("not a valid wildcard pattern, only patterns ending with '/*' are allowed: {pattern}"));
    }
    let last = name.rsplit('/').next().unwrap_or(name);
    (!wildcard && (name.contains('@') || last.contains(':')))
        .then(|| format!("neither tag nor digest is accepted in an image reference: {pattern}"))
}

pub(super) fn check_taints(c: &KubeletConfiguration, errors: &mut Violations) {
    for taint in &c.register_with_taints {
        if !is_valid_taint(taint) {
            let value = taint.value.as_deref().unwrap_or_default();
            errors.0.push(format!("invalid taint: {{{} {value} {} <nil>}}", taint.key, taint.effect));
        }
        errors.require(taint.time_added.is_none(), || "taint.TimeAdded is not nil".into());
    }
}

pub(super) fn check_topology(c: &KubeletConfiguration, errors: &mut Violations) {
    let (policy, scope) = (c.topology_manager_policy.as_str(), c.topology_manager_scope.as_str());
    errors.require(matches!(policy, "none" | "best-effort" | "restricted" | "single-numa-node"), || {
        format!(
            "topologyManagerPolicy (--topology-manager-policy) {policy:?} must be one of: [\"none\" \"best-effort\" \
             \"restricted\" \"single-numa-node\"]"
        )
    });
    errors.require(matches!(scope, "container" | "pod"), || {
        format!("topologyManagerScope (--topology-manager-scope) {scope:?} must be one of: \"container\", or \"pod\"")
    });
}
