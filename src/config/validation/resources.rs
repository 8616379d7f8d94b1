//! Rules on shutdown, swap, node resources, cgroups, memory and the pods' logs. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::super::CgroupVersion;
use super::super::decode::clean;
use super::super::feature_gates::FeatureGates;
use super::super::go_duration::GoDuration;
use super::super::types::KubeletConfiguration;
use super::Violations;

pub(super) const CGROUP_V1: &str = "kubelet is configured to not run on a host using cgroup v1. cgroup v1 support is unsupported \
    and will be removed in a future release";
/// Throttling factor that old files carry; let through while MemoryQoS is off.
const FORMER_THROTTLING_FACTOR: f64 = 0.9;
const IDS_PER_POD_UNIT: i64 = 65536;

pub(super) fn check_shutdown(c: &KubeletConfiguration, gates: &FeatureGates, errors: &mut Violations) {
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

pub(super) fn check_swap_and_backoff(c: &KubeletConfiguration, gates: &FeatureGates, errors: &mut Violations) {
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

pub(super) fn check_node_allocatable(c: &KubeletConfiguration, errors: &mut Violations) {
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

pub(super) fn check_hairpin(c: &KubeletConfiguration, errors: &mut Violations) {
    let mode = c.hairpin_mode.as_str();
    errors.require(matches!(mode, "none" | "hairpin-veth" | "promiscuous-bridge"), || {
        format!(
            "option {mode:?} specified for hairpinMode (--hairpin-mode). Valid options are \"none\", \"hairpin-veth\" \
             or \"promiscuous-bridge\""
        )
    });
}

pub(super) fn check_reserved(c: &KubeletConfiguration, errors: &mut Violations) {
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

pub(super) fn check_host(c: &KubeletConfiguration, cgroup: CgroupVersion, errors: &mut Violations) {
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

pub(super) fn check_memory_qos(c: &KubeletConfiguration, gates: &FeatureGates, errors: &mut Violations) {
    if let Some(factor) = c.memory_throttling_factor {
        errors.require(gates.enabled("MemoryQoS") || factor == FORMER_THROTTLING_FACTOR, || {
            "memoryThrottlingFactor must not be set when MemoryQoS feature gate is disabled".into()
        });
        errors.require(factor > 0.0 && factor <= 1.0, || {
            format!("memoryThrottlingFactor {factor} must be greater than 0 and less than or equal to 1.0")
        });
    }
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

pub(super) fn check_server_and_logs(c: &KubeletConfiguration, errors: &mut Violations) {
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
