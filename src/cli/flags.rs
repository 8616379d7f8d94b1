//! The table of flags: every flag of a Go kubelet 1.37 and our own, what its value looks like and where it goes. Contract 1.4.
//!
//! Data and the setters of [`Flags`]; `parse.rs` walks the command line with it. Pure.

use std::path::PathBuf;

use serde_json::Value;

use crate::config::{CloudProvider, Flags};

/// What a flag's value looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Bool,
    Int32,
    Int64,
    Duration,
    Text,
    Ip,
    /// `a,b,c`; repeated flags add.
    List,
    /// `a=b,c=d`; repeated flags add.
    Map,
    /// One `a=b` per flag.
    MapNoSplit,
    /// As `Map`, and a key alone has the value "".
    Labels,
    /// `signal<threshold,…`.
    Thresholds,
    /// `name:value,…`.
    Headers,
    /// `Gate=true,…`.
    Gates,
    /// `key=value:effect,…`.
    Taints,
    /// `node:type=quantity,…;…`.
    ReservedMemory,
    /// `-v`: 0 and above.
    Level,
    /// `pattern=N,…`.
    VModule,
}

impl Kind {
    /// The name `--help` shows, as Go's flag library has it.
    pub(super) const fn type_name(self) -> &'static str {
        match self {
            Self::Bool => "",
            Self::Int32 => "int32",
            Self::Int64 => "int",
            Self::Duration => "duration",
            Self::Text => "string",
            Self::Ip => "ip",
            Self::List => "strings",
            Self::Map | Self::MapNoSplit | Self::Labels | Self::Thresholds => "mapStringString",
            Self::Headers => "colonSeparatedMultimapStringString",
            Self::Gates => "mapStringBool",
            Self::Taints => "[]v1.Taint",
            Self::ReservedMemory => "reserved-memory",
            Self::Level => "Level",
            Self::VModule => "pattern=N,...",
        }
    }
}

/// Writes a parsed value into [`Flags`]. The shape of the value is the kind's.
type Setter = fn(&mut Flags, &Value) -> Result<(), String>;

/// Where the value goes.
#[derive(Clone, Copy)]
pub(super) enum Target {
    /// A configuration field, by JSON path.
    Field(&'static str),
    /// A setting without a field.
    Flag(Setter),
    /// Nowhere: accepted for old command lines.
    Nothing,
}

/// One flag.
#[derive(Clone, Copy)]
pub(super) struct FlagSpec {
    pub name: &'static str,
    pub kind: Kind,
    pub target: Target,
    /// The end of its deprecation line.
    pub deprecated: Option<&'static str>,
    /// Its line in `--help`; flags of fields have a line made from the path.
    pub help: &'static str,
}

const USE_CONFIG: &str = "This parameter should be set via the config file specified by the Kubelet's --config flag. \
    See https://kubernetes.io/docs/tasks/administer-cluster/kubelet-config-file/ for more information.";
const USE_EVICTION: &str = "Use --eviction-hard or --eviction-soft instead. Will be removed in a future version.";

const fn field(name: &'static str, kind: Kind, path: &'static str) -> FlagSpec {
    FlagSpec { name, kind, target: Target::Field(path), deprecated: None, help: "" }
}

const fn deprecated(name: &'static str, kind: Kind, path: &'static str) -> FlagSpec {
    FlagSpec { name, kind, target: Target::Field(path), deprecated: Some(USE_CONFIG), help: "" }
}

const fn flag(name: &'static str, kind: Kind, set: Setter, help: &'static str) -> FlagSpec {
    FlagSpec { name, kind, target: Target::Flag(set), deprecated: None, help }
}

const fn old(spec: FlagSpec, why: &'static str) -> FlagSpec {
    FlagSpec { deprecated: Some(why), ..spec }
}

const fn nothing(name: &'static str, kind: Kind, why: &'static str) -> FlagSpec {
    FlagSpec { name, kind, target: Target::Nothing, deprecated: Some(why), help: "No effect." }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn path(value: &Value) -> Option<PathBuf> {
    value.as_str().filter(|path| !path.is_empty()).map(PathBuf::from)
}

fn typed<T: serde::de::DeserializeOwned>(value: &Value) -> Result<T, String> {
    serde_json::from_value(value.clone()).map_err(|error| error.to_string())
}

fn set_cloud_provider(flags: &mut Flags, value: &Value) -> Result<(), String> {
    flags.cloud_provider = match value.as_str() {
        Some("") => CloudProvider::None,
        Some("external") => CloudProvider::External,
        Some(other) => {
            return Err(format!(
                "cloud provider {other:?} was specified, but built-in cloud providers are disabled. Please set --cloud-provider=external and migrate to an external cloud provider"
            ));
        }
        None => CloudProvider::None,
    };
    Ok(())
}

/// A setter of one field of [`Flags`].
macro_rules! set {
    ($field:ident, $convert:expr) => {
        |flags, value| {
            flags.$field = $convert(value);
            Ok(())
        }
    };
    ($field:ident) => {
        |flags, value| {
            flags.$field = typed(value)?;
            Ok(())
        }
    };
}

/// Settings without a configuration field, then the flags of fields, by name.
#[rustfmt::skip]
pub(super) const FLAGS: &[FlagSpec] = &[
    flag("bootstrap-kubeconfig", Kind::Text, set!(bootstrap_kubeconfig, path), "Kubeconfig that asks for a client certificate while --kubeconfig does not exist."),
    flag("cert-dir", Kind::Text, set!(cert_directory), "Directory of this node's certificates (default \"/var/lib/kubelet/pki\")."),
    flag("cloud-provider", Kind::Text, set_cloud_provider, "\"external\" when a cloud controller sets the node's addresses, else empty."),
    flag("config", Kind::Text, set!(config_file, path), "Configuration file (KubeletConfiguration). Flags override it."),
    flag("config-dir", Kind::Text, set!(config_directory, path), "Directory of *.conf files merged over --config, in lexical order."),
    flag("eager-first-readiness", Kind::Bool, set!(eager_first_readiness), "rkubelet only: until a readiness or startup probe first passes, try it again after 50, 100, 200 ms and so on, within its period (default true)."),
    flag("exit-on-lock-contention", Kind::Bool, set!(exit_on_lock_contention), "Exit when another process wants --lock-file."),
    old(flag("experimental-allocatable-ignore-eviction", Kind::Bool, set!(allocatable_ignores_eviction), "Hard eviction thresholds do not reduce allocatable."), "will be removed in 1.25 or later."),
    nothing("experimental-mounter-path", Kind::Text, "will be removed in 1.25 or later. in favor of using CSI."),
    flag("hostname-override", Kind::Text, set!(hostname_override, text), "Name of the node instead of the host's name."),
    flag("housekeeping-interval", Kind::Duration, set!(housekeeping_interval), "How often container statistics are read (default 10s)."),
    flag("image-credential-provider-bin-dir", Kind::Text, set!(image_credential_provider_bin_directory, path), "Directory of the credential provider programs."),
    flag("image-credential-provider-config", Kind::Text, set!(image_credential_provider_config, path), "Configuration of the credential providers, a file or a directory."),
    flag("kubeconfig", Kind::Text, set!(kubeconfig, path), "How to reach the API server. Without it the node is standalone."),
    flag("lock-file", Kind::Text, set!(lock_file, path), "File this process holds a lock on."),
    old(flag("maximum-dead-containers", Kind::Int32, set!(maximum_dead_containers), "Dead containers kept on the node; negative is no limit (default -1)."), USE_EVICTION),
    old(flag("maximum-dead-containers-per-container", Kind::Int32, set!(maximum_dead_containers_per_container), "Dead instances kept per container (default 1)."), USE_EVICTION),
    old(flag("minimum-container-ttl-duration", Kind::Duration, set!(minimum_container_ttl), "Age below which a dead container stays."), USE_EVICTION),
    flag("node-ip", Kind::Text, set!(node_ip, text), "Address of the node, or one of each family with a comma; '::' prefers IPv6."),
    flag("node-labels", Kind::Labels, set!(node_labels), "Labels of a node that registers itself, key=value with commas."),
    flag("root-dir", Kind::Text, set!(root_directory), "Directory of the kubelet's files (default \"/var/lib/kubelet\")."),
    flag("runtime-cgroups", Kind::Text, set!(runtime_cgroups, text), "Cgroup of the container runtime, for statistics."),
    flag("seccomp-default", Kind::Bool, set!(seccomp_default), "RuntimeDefault for pods without a seccomp profile."),
    field("log-flush-frequency", Kind::Duration, "logging.flushFrequency"),
    deprecated("log-json-info-buffer-size", Kind::Text, "logging.options.json.infoBufferSize"),
    deprecated("log-json-split-stream", Kind::Bool, "logging.options.json.splitStream"),
    deprecated("log-text-info-buffer-size", Kind::Text, "logging.options.text.infoBufferSize"),
    deprecated("log-text-split-stream", Kind::Bool, "logging.options.text.splitStream"),
    deprecated("logging-format", Kind::Text, "logging.format"),
    field("v", Kind::Level, "logging.verbosity"),
    field("vmodule", Kind::VModule, "logging.vmodule"),
    deprecated("address", Kind::Ip, "address"),
    deprecated("allowed-unsafe-sysctls", Kind::List, "allowedUnsafeSysctls"),
    deprecated("anonymous-auth", Kind::Bool, "authentication.anonymous.enabled"),
    deprecated("authentication-token-webhook", Kind::Bool, "authentication.webhook.enabled"),
    deprecated("authentication-token-webhook-cache-ttl", Kind::Duration, "authentication.webhook.cacheTTL"),
    deprecated("authorization-mode", Kind::Text, "authorization.mode"),
    deprecated("authorization-webhook-cache-authorized-ttl", Kind::Duration, "authorization.webhook.cacheAuthorizedTTL"),
    deprecated("authorization-webhook-cache-unauthorized-ttl", Kind::Duration, "authorization.webhook.cacheUnauthorizedTTL"),
    deprecated("cgroup-driver", Kind::Text, "cgroupDriver"),
    deprecated("cgroup-root", Kind::Text, "cgroupRoot"),
    deprecated("cgroups-per-qos", Kind::Bool, "cgroupsPerQOS"),
    deprecated("client-ca-file", Kind::Text, "authentication.x509.clientCAFile"),
    deprecated("cluster-dns", Kind::List, "clusterDNS"),
    deprecated("cluster-domain", Kind::Text, "clusterDomain"),
    deprecated("container-log-max-files", Kind::Int32, "containerLogMaxFiles"),
    deprecated("container-log-max-size", Kind::Text, "containerLogMaxSize"),
    deprecated("container-runtime-endpoint", Kind::Text, "containerRuntimeEndpoint"),
    deprecated("contention-profiling", Kind::Bool, "enableContentionProfiling"),
    deprecated("cpu-cfs-quota", Kind::Bool, "cpuCFSQuota"),
    deprecated("cpu-cfs-quota-period", Kind::Duration, "cpuCFSQuotaPeriod"),
    deprecated("cpu-manager-policy", Kind::Text, "cpuManagerPolicy"),
    deprecated("cpu-manager-policy-options", Kind::MapNoSplit, "cpuManagerPolicyOptions"),
    deprecated("cpu-manager-reconcile-period", Kind::Duration, "cpuManagerReconcilePeriod"),
    deprecated("enable-controller-attach-detach", Kind::Bool, "enableControllerAttachDetach"),
    deprecated("enable-debugging-handlers", Kind::Bool, "enableDebuggingHandlers"),
    deprecated("enable-server", Kind::Bool, "enableServer"),
    deprecated("enforce-node-allocatable", Kind::List, "enforceNodeAllocatable"),
    deprecated("event-burst", Kind::Int32, "eventBurst"),
    deprecated("event-qps", Kind::Int32, "eventRecordQPS"),
    deprecated("eviction-hard", Kind::Thresholds, "evictionHard"),
    deprecated("eviction-max-pod-grace-period", Kind::Int32, "evictionMaxPodGracePeriod"),
    deprecated("eviction-minimum-reclaim", Kind::Map, "evictionMinimumReclaim"),
    deprecated("eviction-pressure-transition-period", Kind::Duration, "evictionPressureTransitionPeriod"),
    deprecated("eviction-soft", Kind::Thresholds, "evictionSoft"),
    deprecated("eviction-soft-grace-period", Kind::Map, "evictionSoftGracePeriod"),
    field("fail-cgroupv1", Kind::Bool, "failCgroupV1"),
    deprecated("fail-swap-on", Kind::Bool, "failSwapOn"),
    deprecated("feature-gates", Kind::Gates, "featureGates"),
    deprecated("file-check-frequency", Kind::Duration, "fileCheckFrequency"),
    deprecated("hairpin-mode", Kind::Text, "hairpinMode"),
    deprecated("healthz-bind-address", Kind::Ip, "healthzBindAddress"),
    deprecated("healthz-port", Kind::Int32, "healthzPort"),
    deprecated("http-check-frequency", Kind::Duration, "httpCheckFrequency"),
    deprecated("image-gc-high-threshold", Kind::Int32, "imageGCHighThresholdPercent"),
    deprecated("image-gc-low-threshold", Kind::Int32, "imageGCLowThresholdPercent"),
    deprecated("image-service-endpoint", Kind::Text, "imageServiceEndpoint"),
    deprecated("kernel-memcg-notification", Kind::Bool, "kernelMemcgNotification"),
    deprecated("kube-api-burst", Kind::Int32, "kubeAPIBurst"),
    deprecated("kube-api-content-type", Kind::Text, "contentType"),
    deprecated("kube-api-qps", Kind::Int32, "kubeAPIQPS"),
    deprecated("kube-reserved", Kind::Map, "kubeReserved"),
    deprecated("kube-reserved-cgroup", Kind::Text, "kubeReservedCgroup"),
    deprecated("kubelet-cgroups", Kind::Text, "kubeletCgroups"),
    deprecated("local-storage-capacity-isolation", Kind::Bool, "localStorageCapacityIsolation"),
    deprecated("make-iptables-util-chains", Kind::Bool, "makeIPTablesUtilChains"),
    deprecated("manifest-url", Kind::Text, "staticPodURL"),
    deprecated("manifest-url-header", Kind::Headers, "staticPodURLHeader"),
    deprecated("max-open-files", Kind::Int64, "maxOpenFiles"),
    deprecated("max-pods", Kind::Int32, "maxPods"),
    deprecated("memory-manager-policy", Kind::Text, "memoryManagerPolicy"),
    deprecated("minimum-image-ttl-duration", Kind::Duration, "imageMinimumGCAge"),
    deprecated("node-status-max-images", Kind::Int32, "nodeStatusMaxImages"),
    deprecated("node-status-update-frequency", Kind::Duration, "nodeStatusUpdateFrequency"),
    deprecated("oom-score-adj", Kind::Int32, "oomScoreAdj"),
    deprecated("pod-cidr", Kind::Text, "podCIDR"),
    deprecated("pod-manifest-path", Kind::Text, "staticPodPath"),
    deprecated("pod-max-pids", Kind::Int64, "podPidsLimit"),
    deprecated("pods-per-core", Kind::Int32, "podsPerCore"),
    deprecated("port", Kind::Int32, "port"),
    deprecated("protect-kernel-defaults", Kind::Bool, "protectKernelDefaults"),
    field("provider-id", Kind::Text, "providerID"),
    deprecated("qos-reserved", Kind::Map, "qosReserved"),
    deprecated("read-only-port", Kind::Int32, "readOnlyPort"),
    deprecated("register-node", Kind::Bool, "registerNode"),
    deprecated("register-with-taints", Kind::Taints, "registerWithTaints"),
    deprecated("registry-burst", Kind::Int32, "registryBurst"),
    deprecated("registry-qps", Kind::Int32, "registryPullQPS"),
    deprecated("reserved-cpus", Kind::Text, "reservedSystemCPUs"),
    deprecated("reserved-memory", Kind::ReservedMemory, "reservedMemory"),
    deprecated("resolv-conf", Kind::Text, "resolvConf"),
    deprecated("rotate-certificates", Kind::Bool, "rotateCertificates"),
    deprecated("rotate-server-certificates", Kind::Bool, "serverTLSBootstrap"),
    deprecated("runonce", Kind::Bool, "runOnce"),
    deprecated("runtime-request-timeout", Kind::Duration, "runtimeRequestTimeout"),
    deprecated("serialize-image-pulls", Kind::Bool, "serializeImagePulls"),
    deprecated("streaming-connection-idle-timeout", Kind::Duration, "streamingConnectionIdleTimeout"),
    deprecated("sync-frequency", Kind::Duration, "syncFrequency"),
    deprecated("system-cgroups", Kind::Text, "systemCgroups"),
    deprecated("system-reserved", Kind::Map, "systemReserved"),
    deprecated("system-reserved-cgroup", Kind::Text, "systemReservedCgroup"),
    deprecated("tls-cert-file", Kind::Text, "tlsCertFile"),
    deprecated("tls-cipher-suites", Kind::List, "tlsCipherSuites"),
    deprecated("tls-min-version", Kind::Text, "tlsMinVersion"),
    deprecated("tls-private-key-file", Kind::Text, "tlsPrivateKeyFile"),
    deprecated("topology-manager-policy", Kind::Text, "topologyManagerPolicy"),
    deprecated("topology-manager-policy-options", Kind::Map, "topologyManagerPolicyOptions"),
    deprecated("topology-manager-scope", Kind::Text, "topologyManagerScope"),
    deprecated("volume-plugin-dir", Kind::Text, "volumePluginDir"),
    deprecated("volume-stats-agg-period", Kind::Duration, "volumeStatsAggPeriod"),
];

/// Flags that old unit files still carry (contract S-04): accepted with a warning, absent from `--help`.
pub(super) const REMOVED: &[FlagSpec] =
    &[nothing("pod-infra-container-image", Kind::Text, "it was removed in 1.35; the runtime's own setting counts.")];

/// The flag of this name, dashes already normalised.
pub(super) fn find(name: &str) -> Option<&'static FlagSpec> {
    FLAGS.iter().chain(REMOVED).find(|spec| spec.name == name)
}
