//! What a configuration must keep to before the node starts: Appendix F of the contract, in upstream's words.
//!
//! A configuration, the gates and the cgroup version go in; every violation comes out, so that one start shows them
//! all. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;
use std::path::Path;

use super::CgroupVersion;
use super::decode::clean;
use super::feature_gates::FeatureGates;
use super::go_duration::GoDuration;
use super::labels::is_valid_taint;
use super::types::KubeletConfiguration;

const PREFIX: &str = "invalid configuration: ";
const CGROUP_V1: &str = "kubelet is configured to not run on a host using cgroup v1. cgroup v1 support is unsupported \
    and will be removed in a future release";
/// Throttling factor that old files carry; let through while MemoryQoS is off.
const FORMER_THROTTLING_FACTOR: f64 = 0.9;
const IDS_PER_POD_UNIT: i64 = 65536;

/// All violations, in upstream's order; empty when the configuration is fine.
pub(super) fn validate(
    configuration: &KubeletConfiguration,
    gates: &FeatureGates,
    cgroup: CgroupVersion,
) -> Vec<String> {
    let mut errors = Violations::default();
    check_numbers(configuration, gates, &mut errors);
    check_images(configuration, gates, &mut errors);
    check_taints(configuration, &mut errors);
    check_topology(configuration, &mut errors);
    check_shutdown(configuration, gates, &mut errors);
    check_swap_and_backoff(configuration, gates, &mut errors);
    check_node_allocatable(configuration, &mut errors);
    check_modes(configuration, gates, &mut errors);
    check_reserved(configuration, &mut errors);
    check_host(configuration, cgroup, &mut errors);
    check_logging(configuration, gates, &mut errors);
    check_memory_qos(configuration, gates, &mut errors);
    check_server_and_logs(configuration, gates, &mut errors);
    errors.0
}

#[derive(Default)]
struct Violations(Vec<String>);

impl Violations {
    /// Notes the message, with upstream's prefix, unless `fine`.
    fn require(&mut self, fine: bool, message: impl FnOnce() -> String) {
        if !fine {
            self.0.push(format!("{PREFIX}{}", message()));
        }
    }

    fn not_negative(&mut self, value: i64, name: &str) {
        self.require(value >= 0, || format!("{name} {value} must not be a negative number"));
    }

    fn within(&mut self, value: i32, range: RangeInclusive<i32>, name: &str) {
        self.require(range.contains(&value), || {
            format!("{name} {value} must be between {} and {}, inclusive", range.start(), range.end())
        });
    }
}

fn check_numbers(c: &KubeletConfiguration, gates: &FeatureGates, errors: &mut Violations) {
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
    errors.require(!c.server_tls_bootstrap || gates.enabled("RotateKubeletServerCertificate"), || {
        "serverTLSBootstrap true requires feature gate RotateKubeletServerCertificate".into()
    });
    errors.require(!c.run_once, || {
        "runOnce (--runOnce) true, Runonce mode has been deprecated and should not be set".into()
    });
    check_default_sysctls(c, gates, errors);
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

fn check_images(c: &KubeletConfiguration, gates: &FeatureGates, errors: &mut Violations) {
    let (high, low) = (c.image_gc_high_threshold_percent, c.image_gc_low_threshold_percent);
    errors.within(high, 0..=100, "imageGCHighThresholdPercent (--image-gc-high-threshold)");
    errors.within(low, 0..=100, "imageGCLowThresholdPercent (--image-gc-low-threshold)");
    errors.require(low < high, || {
        format!(
            "imageGCLowThresholdPercent (--image-gc-low-threshold) {low} must be less than \
             imageGCHighThresholdPercent (--image-gc-high-threshold) {high}"
        )
    });
    let (least, most) = (c.image_minimum_gc_age, c.image_maximum_gc_age);
    errors.require(!least.is_negative(), || format!("imageMinimumGCAge {least} must not be negative"));
    errors.require(!most.is_negative(), || format!("imageMaximumGCAge {most} must not be negative"));
    errors.require(most <= GoDuration::ZERO || most > least, || {
        format!("imageMaximumGCAge {most} must be greater than imageMinimumGCAge {least}")
    });
    if let Some(pulls) = c.max_parallel_image_pulls {
        errors.require(pulls >= 1, || format!("maxParallelImagePulls {pulls} must be a positive number"));
        errors.require(!c.serialize_image_pulls || pulls <= 1, || {
            "maxParallelImagePulls cannot be larger than 1 unless SerializeImagePulls (--serialize-image-pulls) is set \
             to false"
                .into()
        });
    }
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

fn check_taints(c: &KubeletConfiguration, errors: &mut Violations) {
    for taint in &c.register_with_taints {
        if !is_valid_taint(taint) {
            let value = taint.value.as_deref().unwrap_or_default();
            errors.0.push(format!("invalid taint: {{{} {value} {} <nil>}}", taint.key, taint.effect));
        }
        errors.require(taint.time_added.is_none(), || "taint.TimeAdded is not nil".into());
    }
}

fn check_topology(c: &KubeletConfiguration, errors: &mut Violations) {
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

fn check_shutdown(c: &KubeletConfiguration, gates: &FeatureGates, errors: &mut Violations) {
    let (all, critical) = (c.shutdown_grace_period, c.shutdown_grace_period_critical_pods);
    let any = all > GoDuration::ZERO || critical > GoDuration::ZERO;
    if gates.enabled("GracefulNodeShutdown") {
        errors.require(critical <= all, || {
            format!("shutdownGracePeriodCriticalPods {{{critical}}} must be <= shutdownGracePeriod {{{all}}}")
        });
        for (name, period) in [("shutdownGracePeriod", all), ("shutdownGracePeriodCriticalPods", critical)] {
            errors.require(period == GoDuration::ZERO || period >= GoDuration::from_secs(1), || {
                format!("{name} {{{period}}} must be either zero or otherwise >= 1 sec")
            });
        }
    } else {
        errors.require(!any, || {
            "specifying shutdownGracePeriod or shutdownGracePeriodCriticalPods requires feature gate \
             GracefulNodeShutdown"
                .into()
        });
    }
    let by_priority = !c.shutdown_grace_period_by_pod_priority.is_empty();
    if gates.enabled("GracefulNodeShutdownBasedOnPodPriority") {
        errors.require(!(by_priority && any), || {
            "Cannot specify both shutdownGracePeriodByPodPriority and shutdownGracePeriod at the same time".into()
        });
    } else {
        errors.require(!by_priority, || {
            "Specifying shutdownGracePeriodByPodPriority requires feature gate GracefulNodeShutdownBasedOnPodPriority"
                .into()
        });
    }
}

fn check_swap_and_backoff(c: &KubeletConfiguration, gates: &FeatureGates, errors: &mut Violations) {
    let behavior = c.memory_swap.swap_behavior.as_str();
    errors.require(matches!(behavior, "" | "NoSwap" | "LimitedSwap"), || {
        format!("memorySwap.swapBehavior {behavior:?} must be one of: \"\", \"LimitedSwap\" or \"NoSwap\"")
    });
    let (enabled, cap) =
        (gates.enabled("KubeletCrashLoopBackOffMax"), c.crash_loop_backoff.max_container_restart_period);
    match cap {
        None => errors.require(!enabled, || {
            "FeatureGate KubeletCrashLoopBackOffMax is enabled, CrashLoopBackOff.MaxContainerRestartPeriod must be set"
                .into()
        }),
        Some(_) if !enabled => errors.require(false, || {
            "FeatureGate KubeletCrashLoopBackOffMax not enabled, CrashLoopBackOff.MaxContainerRestartPeriod must not be set"
                .into()
        }),
        Some(cap) => errors.require((1000..=300_000).contains(&(cap.nanos() / 1_000_000)), || {
            format!(
                "CrashLoopBackOff.MaxContainerRestartPeriod (got: {} seconds) must be set between 1s and 300s",
                cap.as_secs_f64()
            )
        }),
    }
}

fn check_node_allocatable(c: &KubeletConfiguration, errors: &mut Violations) {
    const FLAG: &str = "enforceNodeAllocatable (--enforce-node-allocatable)";
    let levels: BTreeSet<&str> = c.enforce_node_allocatable.iter().map(String::as_str).collect();
    let groups = [
        (
            "system-reserved",
            "system-reserved-compressible",
            &c.system_reserved_cgroup,
            "systemReservedCgroup (--system-reserved-cgroup)",
        ),
        (
            "kube-reserved",
            "kube-reserved-compressible",
            &c.kube_reserved_cgroup,
            "kubeReservedCgroup (--kube-reserved-cgroup)",
        ),
    ];
    for (plain, compressible, ..) in groups {
        errors.require(!(levels.contains(plain) && levels.contains(compressible)), || {
            format!("both {plain:?} and {compressible:?} cannot be specified together in {FLAG}")
        });
    }
    let mut seen = BTreeSet::new();
    for level in c.enforce_node_allocatable.iter().map(String::as_str) {
        if !seen.insert(level) {
            errors.require(false, || format!("duplicated enforcements {level:?} in {FLAG}"));
            continue;
        }
        let group = groups.iter().find(|(plain, compressible, ..)| level == *plain || level == *compressible);
        match (level, group) {
            ("pods", _) => {}
            ("none", _) => {
                errors.require(c.enforce_node_allocatable.len() == 1, || {
                    format!("{FLAG} may not contain additional enforcements when \"none\" is specified")
                });
                continue;
            }
            (_, Some((plain, compressible, cgroup, name))) => errors.require(!cgroup.is_empty(), || {
                format!("{name} must be specified when {plain:?} or {compressible:?} included in {FLAG}")
            }),
            (_, None) => {
                errors.require(false, || {
                    format!(
                        "option {level:?} specified for {FLAG}. Valid options are \"pods\", \"system-reserved\", \
                         \"system-reserved-compressible\", \"kube-reserved\", \"kube-reserved-compressible\" or \"none\""
                    )
                });
                continue;
            }
        }
        errors.require(c.cgroups_per_qos, || {
            format!("cgroupsPerQOS (--cgroups-per-qos) must be set to true when {level:?} contained in {FLAG}")
        });
    }
}

fn check_modes(c: &KubeletConfiguration, gates: &FeatureGates, errors: &mut Violations) {
    let mode = c.hairpin_mode.as_str();
    errors.require(matches!(mode, "none" | "hairpin-veth" | "promiscuous-bridge"), || {
        format!(
            "option {mode:?} specified for hairpinMode (--hairpin-mode). Valid options are \"none\", \"hairpin-veth\" \
             or \"promiscuous-bridge\""
        )
    });
    let policy = c.memory_reservation_policy.as_str();
    errors.require(policy != "TieredReservation" || gates.enabled("MemoryQoS"), || {
        format!("memoryReservationPolicy {policy:?} requires MemoryQoS feature gate to be enabled")
    });
    errors.require(matches!(policy, "None" | "TieredReservation"), || {
        format!(
            "option {policy:?} specified for memoryReservationPolicy. Valid options are \"None\" or \"TieredReservation\""
        )
    });
}

fn check_reserved(c: &KubeletConfiguration, errors: &mut Violations) {
    if !c.reserved_system_cpus.is_empty() {
        errors.require(c.system_reserved_cgroup.is_empty() && c.kube_reserved_cgroup.is_empty(), || {
            "can't use reservedSystemCPUs (--reserved-cpus) with systemReservedCgroup (--system-reserved-cgroup) or \
             kubeReservedCgroup (--kube-reserved-cgroup)"
                .into()
        });
        if let Err(reason) = parse_cpu_set(&c.reserved_system_cpus) {
            errors.require(false, || {
                format!(
                    "unable to parse reservedSystemCPUs (--reserved-cpus) {}, error: {reason}",
                    c.reserved_system_cpus
                )
            });
        }
    }
    let mut seen: BTreeMap<i32, BTreeSet<&str>> = BTreeMap::new();
    for reservation in &c.reserved_memory {
        let node = reservation.numa_node;
        for (name, quantity) in &reservation.limits {
            errors.require(name == "memory" || name.starts_with("hugepages-"), || {
                format!(
                    "the limit type {name:?} for NUMA node {node} is not supported, only [memory \
                     hugepages-<HugePageSize>] is accepted"
                )
            });
            errors.require(!quantity.is_zero(), || {
                format!("reserved memory may not be zero for NUMA node {node} and resource {name:?}")
            });
            errors.require(seen.entry(node).or_default().insert(name), || {
                format!("the reserved memory has a duplicate value for NUMA node {node} and resource {name:?}")
            });
        }
    }
}

/// The CPUs of a Linux list such as `0-3,7`.
pub fn parse_cpu_set(list: &str) -> Result<BTreeSet<u32>, String> {
    let number =
        |text: &str| text.trim().parse::<u32>().map_err(|_| format!("strconv.Atoi: parsing {text:?}: invalid syntax"));
    let mut cpus = BTreeSet::new();
    for part in list.split(',').filter(|_| !list.is_empty()) {
        let (first, last) = match part.split_once('-') {
            Some((first, last)) => (number(first)?, number(last)?),
            None => (number(part)?, number(part)?),
        };
        if first > last {
            return Err(format!("invalid range {part:?} ({first} > {last})"));
        }
        cpus.extend(first..=last);
    }
    Ok(cpus)
}

fn check_host(c: &KubeletConfiguration, cgroup: CgroupVersion, errors: &mut Violations) {
    let v1 = cgroup == CgroupVersion::V1;
    if v1 && c.fail_cgroup_v1 {
        return errors.0.push(CGROUP_V1.to_owned());
    }
    if v1 && c.single_process_oom_kill == Some(false) {
        return errors
            .require(false, || "singleProcessOOMKill must not be explicitly set to false when using cgroup v1".into());
    }
    let Some(ids) = c.user_namespaces.as_ref().and_then(|namespaces| namespaces.ids_per_pod) else { return };
    let name = "userNamespaces.idsPerPod must";
    if ids < IDS_PER_POD_UNIT {
        errors.require(false, || format!("{name} not be less than {IDS_PER_POD_UNIT}"));
    } else if ids % IDS_PER_POD_UNIT != 0 {
        errors.require(false, || format!("{name} be a multiple of {IDS_PER_POD_UNIT}"));
    } else {
        errors.require(ids <= i64::from(u32::MAX), || format!("{name} not be more than {}", u32::MAX));
    }
}

/// component-base's checks of `logging` and `tracing`; these carry no prefix.
fn check_logging(c: &KubeletConfiguration, gates: &FeatureGates, errors: &mut Violations) {
    let logging = &c.logging;
    let mut invalid = |fine: bool, message: String| {
        if !fine {
            errors.0.push(message);
        }
    };
    invalid(
        logging.flush_frequency > GoDuration::ZERO,
        format!("logging.flushFrequency: Invalid value: \"{}\": Must be greater than zero", logging.flush_frequency),
    );
    invalid(
        matches!(logging.format.as_str(), "text" | "json"),
        format!("logging.format: Invalid value: {:?}: Unsupported log format", logging.format),
    );
    let most = i32::MAX.unsigned_abs();
    invalid(
        logging.verbosity <= most,
        format!("logging.verbosity: Invalid value: {}: Must be <= {most}", logging.verbosity),
    );
    invalid(
        logging.vmodule.is_empty() || matches!(logging.format.as_str(), "" | "text"),
        "logging.vmodule: Forbidden: Only supported for text log format".to_owned(),
    );
    for (index, item) in logging.vmodule.iter().enumerate() {
        invalid(
            !item.file_pattern.is_empty(),
            format!("logging.vmodule[{index}]: Required value: File pattern must not be empty"),
        );
        invalid(
            !item.file_pattern.contains(['=', ',']),
            format!(
                "logging.vmodule[{index}]: Invalid value: {:?}: File pattern must not contain equal sign or comma",
                item.file_pattern
            ),
        );
    }
    for (format, routing) in [("text", &logging.options.text), ("json", &logging.options.json)] {
        for (unset, field) in
            [(!routing.split_stream, "splitStream"), (routing.info_buffer_size == "0", "infoBufferSize")]
        {
            invalid(
                unset || gates.enabled("LoggingAlphaOptions"),
                format!("logging.options.{format}.{field}: Forbidden: Feature LoggingAlphaOptions is disabled"),
            );
        }
    }
    if let Some(rate) = c.tracing.as_ref().and_then(|tracing| tracing.sampling_rate_per_million) {
        let path = "tracing.samplingRatePerMillion: Invalid value";
        invalid(rate >= 0, format!("{path}: {rate}: sampling rate must be positive"));
        invalid(
            rate <= 1_000_000,
            format!("{path}: {rate}: sampling rate per million must be less than or equal to one million"),
        );
    }
}

fn check_memory_qos(c: &KubeletConfiguration, gates: &FeatureGates, errors: &mut Violations) {
    let Some(factor) = c.memory_throttling_factor else { return };
    errors.require(gates.enabled("MemoryQoS") || factor == FORMER_THROTTLING_FACTOR, || {
        "memoryThrottlingFactor must not be set when MemoryQoS feature gate is disabled".into()
    });
    errors.require(factor > 0.0 && factor <= 1.0, || {
        format!("memoryThrottlingFactor {factor} must be greater than 0 and less than or equal to 1.0")
    });
}

fn check_server_and_logs(c: &KubeletConfiguration, _gates: &FeatureGates, errors: &mut Violations) {
    errors.require(!c.container_runtime_endpoint.is_empty(), || {
        "the containerRuntimeEndpoint was not specified or empty".into()
    });
    errors.require(!c.enable_system_log_query || c.enable_system_log_handler, || {
        "enableSystemLogHandler is required for enableSystemLogQuery".into()
    });
    errors.require(c.container_log_max_workers >= 1, || {
        "containerLogMaxWorkers must be greater than or equal to 1".into()
    });
    errors.require(c.container_log_monitor_interval >= GoDuration::from_secs(3), || {
        "containerLogMonitorInterval must be a positive time duration greater than or equal to 3s".into()
    });
    errors.require(c.container_log_max_files > 1, || "containerLogMaxFiles must be greater than 1".into());
    let directory = c.pod_logs_dir.as_str();
    errors.require(!directory.is_empty(), || "podLogsDir was not specified".into());
    errors.require(directory.starts_with('/'), || format!("pod logs path {directory:?} must be absolute path"));
    errors.require(!directory.starts_with('/') || clean(Path::new(directory)).to_str() == Some(directory), || {
        format!("pod logs path {directory:?} must be normalized")
    });
    errors.require(directory.is_ascii(), || format!("pod logs path {directory:?} mut contains ASCII characters only"));
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::decode::{typed, with_dependent_defaults};
    use super::*;

    fn violations(object: serde_json::Value) -> Vec<String> {
        let gates = object.get("featureGates").cloned().unwrap_or_default();
        let gates: BTreeMap<String, bool> = serde_json::from_value(gates).unwrap_or_default();
        let configuration = typed(&with_dependent_defaults(object)).unwrap();
        validate(&configuration, &FeatureGates::from_map(&gates).unwrap(), CgroupVersion::V2)
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
            (
                json!({"healthzPort": 65536}),
                "healthzPort (--healthz-port) 65536 must be between 1 and 65535, inclusive",
            ),
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
            (
                json!({"oomScoreAdj": 1001}),
                "oomScoreAdj (--oom-score-adj) 1001 must be between -1000 and 1000, inclusive",
            ),
            (
                json!({"nodeStatusMaxImages": -2}),
                "nodeStatusMaxImages (--node-status-max-images) -2 must be -1 or greater",
            ),
            (json!({"maxParallelImagePulls": 0}), "maxParallelImagePulls 0 must be a positive number"),
            (
                json!({"maxParallelImagePulls": 2, "serializeImagePulls": true}),
                "maxParallelImagePulls cannot be larger than 1 unless SerializeImagePulls (--serialize-image-pulls) is set to false",
            ),
            (
                json!({"runOnce": true}),
                "runOnce (--runOnce) true, Runonce mode has been deprecated and should not be set",
            ),
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
            violations(logging),
            [
                "logging.format: Invalid value: \"xml\": Unsupported log format",
                "logging.options.text.splitStream: Forbidden: Feature LoggingAlphaOptions is disabled",
            ]
        );
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
}
