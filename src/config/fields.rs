//! The table of configuration fields: what an explicit zero means, and whether the field has an effect yet.
//!
//! One line per field, for strict decoding, for the defaults and for the list of fields without effect. When a room
//! lands that reads a field, its `NoEffect` becomes `Works` here. Pure.

use serde_json::{Map, Value};

use super::types::KubeletConfiguration;

use Effect::{NoEffect, Works};
use Unset::{Null, Zero, ZeroDuration};

/// When a field counts as not set, so that its default applies (contract 1.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unset {
    /// Absent or null: Go keeps these as pointers or has no default for them.
    Null,
    /// Also `0` and `""`.
    Zero,
    /// Also a duration of zero.
    ZeroDuration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Effect {
    /// Acted on, or without effect in the Go kubelet too.
    Works,
    /// Parsed and checked, not acted on in this version.
    NoEffect,
}

pub(super) struct Field {
    /// JSON path; `[]` stands for the items of a list.
    pub path: &'static str,
    pub unset: Unset,
    pub effect: Effect,
}

const fn field(path: &'static str, unset: Unset, effect: Effect) -> Field {
    Field { path, unset, effect }
}

/// Every field of `KubeletConfiguration` v1beta1, 1.37, in its order.
#[rustfmt::skip]
pub(super) const FIELDS: &[Field] = &[
    field("enableServer", Null, Works),
    field("staticPodPath", Null, NoEffect),
    field("podLogsDir", Zero, Works),
    field("syncFrequency", ZeroDuration, NoEffect),
    field("fileCheckFrequency", ZeroDuration, NoEffect),
    field("httpCheckFrequency", ZeroDuration, NoEffect),
    field("staticPodURL", Null, NoEffect),
    field("staticPodURLHeader", Null, NoEffect),
    field("address", Zero, Works),
    field("port", Zero, Works),
    field("readOnlyPort", Null, NoEffect),
    field("tlsCertFile", Null, Works),
    field("tlsPrivateKeyFile", Null, Works),
    field("tlsCipherSuites", Null, NoEffect),
    field("tlsCurvePreferences", Null, NoEffect),
    field("tlsMinVersion", Null, NoEffect),
    field("rotateCertificates", Null, NoEffect),
    field("serverTLSBootstrap", Null, NoEffect),
    field("authentication.x509.clientCAFile", Null, Works),
    field("authentication.webhook.enabled", Null, NoEffect),
    field("authentication.webhook.cacheTTL", ZeroDuration, NoEffect),
    field("authentication.anonymous.enabled", Null, NoEffect),
    field("authorization.mode", Zero, NoEffect),
    field("authorization.webhook.cacheAuthorizedTTL", ZeroDuration, NoEffect),
    field("authorization.webhook.cacheUnauthorizedTTL", ZeroDuration, NoEffect),
    field("registryPullQPS", Null, Works),
    field("registryBurst", Zero, Works),
    field("imagePullCredentialsVerificationPolicy", Null, Works),
    field("preloadedImagesVerificationAllowlist", Null, Works),
    field("eventRecordQPS", Null, Works),
    field("eventBurst", Zero, Works),
    field("enableDebuggingHandlers", Null, NoEffect),
    field("enableContentionProfiling", Null, NoEffect),
    field("healthzPort", Null, Works),
    field("healthzBindAddress", Zero, Works),
    field("oomScoreAdj", Null, Works),
    field("clusterDomain", Null, Works),
    field("clusterDNS", Null, Works),
    field("streamingConnectionIdleTimeout", ZeroDuration, NoEffect),
    field("nodeStatusUpdateFrequency", ZeroDuration, Works),
    field("nodeStatusReportFrequency", ZeroDuration, Works),
    field("nodeLeaseDurationSeconds", Zero, Works),
    field("imageMinimumGCAge", ZeroDuration, Works),
    field("imageMaximumGCAge", Null, Works),
    field("imageGCHighThresholdPercent", Null, Works),
    field("imageGCLowThresholdPercent", Null, Works),
    field("volumeStatsAggPeriod", ZeroDuration, NoEffect),
    field("kubeletCgroups", Null, NoEffect),
    field("systemCgroups", Null, NoEffect),
    field("cgroupRoot", Null, Works),
    field("cgroupsPerQOS", Null, Works),
    field("cgroupDriver", Zero, Works),
    field("cpuManagerPolicy", Zero, NoEffect),
    field("singleProcessOOMKill", Null, Works),
    field("cpuManagerPolicyOptions", Null, NoEffect),
    field("cpuManagerReconcilePeriod", ZeroDuration, NoEffect),
    field("memoryManagerPolicy", Zero, NoEffect),
    field("topologyManagerPolicy", Zero, NoEffect),
    field("topologyManagerScope", Zero, NoEffect),
    field("topologyManagerPolicyOptions", Null, NoEffect),
    field("qosReserved", Null, Works),
    field("runtimeRequestTimeout", ZeroDuration, Works),
    field("hairpinMode", Zero, NoEffect),
    field("maxPods", Zero, Works),
    field("podCIDR", Null, NoEffect),
    field("podPidsLimit", Null, Works),
    field("resolvConf", Null, Works),
    field("runOnce", Null, Works),
    field("cpuCFSQuota", Null, Works),
    field("cpuCFSQuotaPeriod", Null, Works),
    field("nodeStatusMaxImages", Null, Works),
    field("maxOpenFiles", Zero, Works),
    field("contentType", Zero, Works),
    field("kubeAPIQPS", Null, Works),
    field("kubeAPIBurst", Zero, Works),
    field("serializeImagePulls", Null, Works),
    field("maxParallelImagePulls", Null, Works),
    field("evictionHard", Null, Works),
    field("evictionSoft", Null, NoEffect),
    field("evictionSoftGracePeriod", Null, NoEffect),
    field("evictionPressureTransitionPeriod", ZeroDuration, Works),
    field("evictionMaxPodGracePeriod", Null, NoEffect),
    field("evictionMinimumReclaim", Null, NoEffect),
    field("mergeDefaultEvictionSettings", Null, Works),
    field("podsPerCore", Null, NoEffect),
    field("enableControllerAttachDetach", Null, Works),
    field("protectKernelDefaults", Null, NoEffect),
    field("makeIPTablesUtilChains", Null, Works),
    field("iptablesMasqueradeBit", Null, Works),
    field("iptablesDropBit", Null, Works),
    field("featureGates", Null, Works),
    field("failSwapOn", Null, Works),
    field("memorySwap.swapBehavior", Null, NoEffect),
    field("containerLogMaxSize", Zero, NoEffect),
    field("containerLogMaxFiles", Null, NoEffect),
    field("containerLogMaxWorkers", Null, NoEffect),
    field("containerLogMonitorInterval", Null, NoEffect),
    field("configMapAndSecretChangeDetectionStrategy", Zero, Works),
    field("systemReserved", Null, Works),
    field("kubeReserved", Null, Works),
    field("reservedSystemCPUs", Null, NoEffect),
    field("showHiddenMetricsForVersion", Null, NoEffect),
    field("systemReservedCgroup", Null, Works),
    field("kubeReservedCgroup", Null, Works),
    field("enforceNodeAllocatable", Null, Works),
    field("allowedUnsafeSysctls", Null, Works),
    field("defaultPodSysctls", Null, NoEffect),
    field("volumePluginDir", Zero, NoEffect),
    field("providerID", Null, Works),
    field("kernelMemcgNotification", Null, NoEffect),
    field("logging.format", Zero, Works),
    field("logging.flushFrequency", ZeroDuration, NoEffect),
    field("logging.verbosity", Null, Works),
    field("logging.vmodule[].filePattern", Null, NoEffect),
    field("logging.vmodule[].verbosity", Null, NoEffect),
    field("logging.options.text.splitStream", Null, NoEffect),
    field("logging.options.text.infoBufferSize", Null, NoEffect),
    field("logging.options.json.splitStream", Null, NoEffect),
    field("logging.options.json.infoBufferSize", Null, NoEffect),
    field("enableSystemLogHandler", Null, NoEffect),
    field("enableSystemLogQuery", Null, NoEffect),
    field("shutdownGracePeriod", Null, NoEffect),
    field("shutdownGracePeriodCriticalPods", Null, NoEffect),
    field("shutdownGracePeriodByPodPriority[].priority", Null, NoEffect),
    field("shutdownGracePeriodByPodPriority[].shutdownGracePeriodSeconds", Null, NoEffect),
    field("crashLoopBackOff.maxContainerRestartPeriod", Null, Works),
    field("reservedMemory[].numaNode", Null, NoEffect),
    field("reservedMemory[].limits", Null, NoEffect),
    field("enableProfilingHandler", Null, NoEffect),
    field("enableDebugFlagsHandler", Null, NoEffect),
    field("seccompDefault", Null, NoEffect),
    field("memoryThrottlingFactor", Null, Works),
    field("memoryReservationPolicy", Zero, Works),
    field("registerWithTaints[].key", Null, Works),
    field("registerWithTaints[].value", Null, Works),
    field("registerWithTaints[].effect", Null, Works),
    field("registerWithTaints[].timeAdded", Null, Works),
    field("registerNode", Null, Works),
    field("tracing.endpoint", Null, NoEffect),
    field("tracing.samplingRatePerMillion", Null, NoEffect),
    field("localStorageCapacityIsolation", Null, NoEffect),
    field("containerRuntimeEndpoint", Zero, Works),
    field("imageServiceEndpoint", Null, Works),
    field("failCgroupV1", Null, Works),
    field("userNamespaces.idsPerPod", Null, Works),
];

/// The paths in `object` that no field has, in order; they are removed from it.
pub(super) fn take_unknown(object: &mut Value) -> Vec<String> {
    let mut unknown = Vec::new();
    take_unknown_below(object, "", &mut unknown);
    unknown
}

fn take_unknown_below(value: &mut Value, path: &str, unknown: &mut Vec<String>) {
    match value {
        Value::Object(map) => map.retain(|name, child| {
            let child_path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
            match known(&child_path) {
                Known::No => unknown.push(child_path),
                Known::Leaf => return true,
                Known::Inner => {
                    take_unknown_below(child, &child_path, unknown);
                    return true;
                }
            }
            false
        }),
        Value::Array(items) => {
            let item_path = format!("{path}[]");
            for item in items {
                take_unknown_below(item, &item_path, unknown);
            }
        }
        _ => {}
    }
}

enum Known {
    No,
    Inner,
    Leaf,
}

fn known(path: &str) -> Known {
    let mut inner = false;
    for field in FIELDS {
        match field.path.strip_prefix(path) {
            Some("") => return Known::Leaf,
            Some(rest) if rest.starts_with(['.', '[']) => inner = true,
            _ => {}
        }
    }
    if inner { Known::Inner } else { Known::No }
}

/// Fields that differ from their default but are not acted on yet, by path.
pub fn ineffective_fields(configuration: &KubeletConfiguration) -> Vec<&'static str> {
    let json = |of: &KubeletConfiguration| serde_json::to_value(of).unwrap_or_default();
    let (set, default) = (json(configuration), json(&KubeletConfiguration::default()));
    let mut paths: Vec<&'static str> = FIELDS
        .iter()
        .filter(|f| f.effect == NoEffect)
        .map(|f| f.path.split_once('[').map_or(f.path, |(list, _)| list))
        .filter(|path| get(&set, path) != get(&default, path))
        .collect();
    paths.dedup();
    paths
}

/// Every field that is parsed and checked but not acted on in this version, by path: for the README's table.
pub fn no_effect() -> impl Iterator<Item = &'static str> {
    FIELDS.iter().filter(|f| f.effect == NoEffect).map(|f| f.path)
}

/// The value at a dotted path.
pub(super) fn get<'a>(object: &'a Value, path: &str) -> Option<&'a Value> {
    path.split('.').try_fold(object, |value, name| value.get(name))
}

/// Sets the value at a dotted path, making the objects on the way.
pub(super) fn set(object: &mut Value, path: &str, value: Value) {
    let mut at = object;
    for name in path.split('.') {
        if !at.is_object() {
            *at = Value::Object(Map::new());
        }
        let Value::Object(map) = at else { return };
        at = map.entry(name).or_insert(Value::Null);
    }
    *at = value;
}

/// Removes the value at a dotted path.
pub(super) fn remove(object: &mut Value, path: &str) {
    let (parents, name) = path.rsplit_once('.').map_or((None, path), |(parents, name)| (Some(parents), name));
    let mut names = parents.into_iter().flat_map(|p| p.split('.'));
    if let Some(Value::Object(map)) = names.try_fold(object, |value, name| value.get_mut(name)) {
        map.remove(name);
    }
}
