//! `KubeletConfiguration` of `kubelet.config.k8s.io/v1beta1`, every field of 1.37, with the defaults of Go.
//!
//! Shapes and their JSON form alone. Serialising gives what `/configz` shows: Go leaves out the fields marked
//! `is_zero` when they are empty. What an explicit zero means lives in `fields.rs`, the checks in `validation.rs`.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Taint;
use serde::{Deserialize, Serialize};

use super::go_duration::GoDuration;
use super::sections::{
    Authentication, Authorization, CrashLoopBackOff, Logging, MemoryReservation, MemorySwap, ShutdownGracePeriod,
    StaticPodHeaders, Tracing, UserNamespaces, is_zero,
};

/// The whole of a kubelet's configuration file. Contract 1.5.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct KubeletConfiguration {
    /// Serve port 10250 at all.
    pub enable_server: bool,
    /// File or directory of static pod manifests.
    #[serde(skip_serializing_if = "is_zero")]
    pub static_pod_path: String,
    /// Absolute directory of the pods' container logs.
    #[serde(skip_serializing_if = "is_zero")]
    pub pod_logs_dir: String,
    /// Longest time between two syncs of a pod.
    pub sync_frequency: GoDuration,
    /// How often the static pod directory is listed again.
    pub file_check_frequency: GoDuration,
    /// How often `staticPodURL` is asked.
    pub http_check_frequency: GoDuration,
    /// URL of a static pod manifest.
    #[serde(rename = "staticPodURL", skip_serializing_if = "is_zero")]
    pub static_pod_url: String,
    /// Headers sent to `staticPodURL`; may hold credentials.
    #[serde(rename = "staticPodURLHeader", skip_serializing_if = "is_zero")]
    pub static_pod_url_header: StaticPodHeaders,
    /// Address that ports 10250 and 10255 bind to.
    #[serde(skip_serializing_if = "is_zero")]
    pub address: String,
    /// Port of the authenticated server.
    #[serde(skip_serializing_if = "is_zero")]
    pub port: i32,
    /// Port of the unauthenticated server; 0 is off.
    #[serde(skip_serializing_if = "is_zero")]
    pub read_only_port: i32,
    /// Serving certificate; empty means self-signed.
    #[serde(skip_serializing_if = "is_zero")]
    pub tls_cert_file: String,
    /// Key of the serving certificate.
    #[serde(skip_serializing_if = "is_zero")]
    pub tls_private_key_file: String,
    /// Go names of the cipher suites served.
    #[serde(skip_serializing_if = "is_zero")]
    pub tls_cipher_suites: Vec<String>,
    /// Go ids of the key exchange curves served.
    #[serde(skip_serializing_if = "is_zero")]
    pub tls_curve_preferences: Vec<i32>,
    /// `VersionTLS12` or `VersionTLS13`.
    #[serde(skip_serializing_if = "is_zero")]
    pub tls_min_version: String,
    /// Renew the client certificate before it runs out.
    #[serde(skip_serializing_if = "is_zero")]
    pub rotate_certificates: bool,
    /// Ask the API server for the serving certificate.
    #[serde(rename = "serverTLSBootstrap", skip_serializing_if = "is_zero")]
    pub server_tls_bootstrap: bool,
    /// Who a caller may be.
    pub authentication: Authentication,
    /// What a caller may do.
    pub authorization: Authorization,
    /// Image pulls per second; 0 is unlimited.
    #[serde(rename = "registryPullQPS")]
    pub registry_pull_qps: i32,
    /// Image pulls at once above the rate.
    #[serde(skip_serializing_if = "is_zero")]
    pub registry_burst: i32,
    /// When a pod must prove that it may use an image that is already here.
    #[serde(skip_serializing_if = "is_zero")]
    pub image_pull_credentials_verification_policy: String,
    /// Images that need no proof under `NeverVerifyAllowlistedImages`.
    #[serde(skip_serializing_if = "is_zero")]
    pub preloaded_images_verification_allowlist: Vec<String>,
    /// Events per second; 0 is unlimited.
    #[serde(rename = "eventRecordQPS")]
    pub event_record_qps: i32,
    /// Events at once above the rate.
    #[serde(skip_serializing_if = "is_zero")]
    pub event_burst: i32,
    /// Serve exec, attach, logs and the like.
    pub enable_debugging_handlers: bool,
    /// Go's block profile; nothing here.
    #[serde(skip_serializing_if = "is_zero")]
    pub enable_contention_profiling: bool,
    /// Port of /healthz; 0 is off.
    pub healthz_port: i32,
    /// Address of /healthz.
    #[serde(skip_serializing_if = "is_zero")]
    pub healthz_bind_address: String,
    /// oom_score_adj of this process.
    pub oom_score_adj: i32,
    /// DNS domain searched in pods.
    #[serde(skip_serializing_if = "is_zero")]
    pub cluster_domain: String,
    /// DNS servers of pods with `ClusterFirst`.
    #[serde(rename = "clusterDNS", skip_serializing_if = "is_zero")]
    pub cluster_dns: Vec<String>,
    /// No effect since CRI streaming.
    pub streaming_connection_idle_timeout: GoDuration,
    /// How often the node status is computed.
    pub node_status_update_frequency: GoDuration,
    /// How often an unchanged node status is sent.
    pub node_status_report_frequency: GoDuration,
    /// Validity of the node lease, in seconds.
    #[serde(skip_serializing_if = "is_zero")]
    pub node_lease_duration_seconds: i32,
    /// Age below which an unused image stays.
    #[serde(rename = "imageMinimumGCAge")]
    pub image_minimum_gc_age: GoDuration,
    /// Age above which an unused image goes; 0 is off.
    #[serde(rename = "imageMaximumGCAge")]
    pub image_maximum_gc_age: GoDuration,
    /// Disk use that starts image garbage collection; 100 is off.
    #[serde(rename = "imageGCHighThresholdPercent")]
    pub image_gc_high_threshold_percent: i32,
    /// Disk use that ends image garbage collection.
    #[serde(rename = "imageGCLowThresholdPercent")]
    pub image_gc_low_threshold_percent: i32,
    /// How often volume use is measured; negative is off.
    pub volume_stats_agg_period: GoDuration,
    /// Cgroup of this process, for statistics.
    #[serde(skip_serializing_if = "is_zero")]
    pub kubelet_cgroups: String,
    /// Cgroup of the system's processes.
    #[serde(skip_serializing_if = "is_zero")]
    pub system_cgroups: String,
    /// Cgroup below which pods live.
    #[serde(skip_serializing_if = "is_zero")]
    pub cgroup_root: String,
    /// Make a cgroup for each QoS class and pod.
    #[serde(rename = "cgroupsPerQOS")]
    pub cgroups_per_qos: bool,
    /// `cgroupfs` or `systemd`, unless the runtime says.
    #[serde(skip_serializing_if = "is_zero")]
    pub cgroup_driver: String,
    /// `none` or `static`.
    #[serde(skip_serializing_if = "is_zero")]
    pub cpu_manager_policy: String,
    /// Let the kernel kill one process of a container, not all.
    #[serde(rename = "singleProcessOOMKill", skip_serializing_if = "is_zero")]
    pub single_process_oom_kill: Option<bool>,
    /// Options of the CPU manager.
    #[serde(skip_serializing_if = "is_zero")]
    pub cpu_manager_policy_options: BTreeMap<String, String>,
    /// How often the CPU manager checks.
    pub cpu_manager_reconcile_period: GoDuration,
    /// `None` or `Static`.
    #[serde(skip_serializing_if = "is_zero")]
    pub memory_manager_policy: String,
    /// `none`, `best-effort`, `restricted`, `single-numa-node`.
    #[serde(skip_serializing_if = "is_zero")]
    pub topology_manager_policy: String,
    /// `container` or `pod`.
    #[serde(skip_serializing_if = "is_zero")]
    pub topology_manager_scope: String,
    /// Options of the topology manager.
    #[serde(skip_serializing_if = "is_zero")]
    pub topology_manager_policy_options: BTreeMap<String, String>,
    /// Share of requests reserved per QoS class.
    #[serde(skip_serializing_if = "is_zero")]
    pub qos_reserved: BTreeMap<String, String>,
    /// Timeout of a CRI call other than pull, logs, exec, attach.
    pub runtime_request_timeout: GoDuration,
    /// No effect since dockershim.
    #[serde(skip_serializing_if = "is_zero")]
    pub hairpin_mode: String,
    /// Pods this node takes.
    #[serde(skip_serializing_if = "is_zero")]
    pub max_pods: i32,
    /// Pod addresses of a standalone node.
    #[serde(rename = "podCIDR", skip_serializing_if = "is_zero")]
    pub pod_cidr: String,
    /// Processes per pod; -1 is the node's limit.
    pub pod_pids_limit: i64,
    /// Resolver file pods inherit; empty is none.
    pub resolv_conf: String,
    /// Rejected when true.
    #[serde(skip_serializing_if = "is_zero")]
    pub run_once: bool,
    /// Enforce CPU limits.
    #[serde(rename = "cpuCFSQuota")]
    pub cpu_cfs_quota: bool,
    /// cpu.max period, 1 ms to 1 s.
    #[serde(rename = "cpuCFSQuotaPeriod")]
    pub cpu_cfs_quota_period: GoDuration,
    /// Images listed in the node status; -1 is all.
    pub node_status_max_images: i32,
    /// RLIMIT_NOFILE of this process.
    #[serde(skip_serializing_if = "is_zero")]
    pub max_open_files: i64,
    /// Tolerated: the API is spoken in JSON.
    #[serde(skip_serializing_if = "is_zero")]
    pub content_type: String,
    /// API requests per second.
    #[serde(rename = "kubeAPIQPS")]
    pub kube_api_qps: i32,
    /// API requests at once above the rate.
    #[serde(rename = "kubeAPIBurst", skip_serializing_if = "is_zero")]
    pub kube_api_burst: i32,
    /// Pull one image at a time.
    pub serialize_image_pulls: bool,
    /// Pulls at the same time when not serialized.
    #[serde(skip_serializing_if = "is_zero")]
    pub max_parallel_image_pulls: Option<i32>,
    /// Signal to threshold, quantity or percent.
    #[serde(skip_serializing_if = "is_zero")]
    pub eviction_hard: BTreeMap<String, String>,
    /// Signal to threshold with a grace period.
    #[serde(skip_serializing_if = "is_zero")]
    pub eviction_soft: BTreeMap<String, String>,
    /// Signal to how long a soft threshold may be exceeded.
    #[serde(skip_serializing_if = "is_zero")]
    pub eviction_soft_grace_period: BTreeMap<String, String>,
    /// How long a pressure condition outlives its cause.
    pub eviction_pressure_transition_period: GoDuration,
    /// Longest grace of a soft eviction, in seconds.
    #[serde(skip_serializing_if = "is_zero")]
    pub eviction_max_pod_grace_period: i32,
    /// Signal to the least amount an eviction frees.
    #[serde(skip_serializing_if = "is_zero")]
    pub eviction_minimum_reclaim: BTreeMap<String, String>,
    /// Keep the default thresholds that `evictionHard` does not name.
    pub merge_default_eviction_settings: bool,
    /// Pods per core; 0 is no limit.
    #[serde(skip_serializing_if = "is_zero")]
    pub pods_per_core: i32,
    /// The controller attaches volumes, not this node.
    pub enable_controller_attach_detach: bool,
    /// Fail on other kernel settings instead of changing them.
    #[serde(skip_serializing_if = "is_zero")]
    pub protect_kernel_defaults: bool,
    /// Make the kubelet's iptables chains.
    #[serde(rename = "makeIPTablesUtilChains")]
    pub make_iptables_util_chains: bool,
    /// No effect.
    pub iptables_masquerade_bit: i32,
    /// No effect.
    pub iptables_drop_bit: i32,
    /// Gate to on or off.
    #[serde(skip_serializing_if = "is_zero")]
    pub feature_gates: BTreeMap<String, bool>,
    /// Do not start with swap on.
    pub fail_swap_on: bool,
    /// How pods use swap.
    pub memory_swap: MemorySwap,
    /// Size at which a container log is rotated.
    #[serde(skip_serializing_if = "is_zero")]
    pub container_log_max_size: String,
    /// Log files kept per container.
    pub container_log_max_files: i32,
    /// Logs rotated at the same time.
    pub container_log_max_workers: i32,
    /// How often log sizes are looked at.
    pub container_log_monitor_interval: GoDuration,
    /// `Get`, `Cache` or `Watch`.
    #[serde(skip_serializing_if = "is_zero")]
    pub config_map_and_secret_change_detection_strategy: String,
    /// Resource to quantity kept for the system.
    #[serde(skip_serializing_if = "is_zero")]
    pub system_reserved: BTreeMap<String, String>,
    /// Resource to quantity kept for Kubernetes.
    #[serde(skip_serializing_if = "is_zero")]
    pub kube_reserved: BTreeMap<String, String>,
    /// CPU list kept for the system and Kubernetes.
    #[serde(rename = "reservedSystemCPUs", skip_serializing_if = "is_zero")]
    pub reserved_system_cpus: String,
    /// Show metrics hidden since this minor.
    #[serde(skip_serializing_if = "is_zero")]
    pub show_hidden_metrics_for_version: String,
    /// Cgroup that enforces `systemReserved`.
    #[serde(skip_serializing_if = "is_zero")]
    pub system_reserved_cgroup: String,
    /// Cgroup that enforces `kubeReserved`.
    #[serde(skip_serializing_if = "is_zero")]
    pub kube_reserved_cgroup: String,
    /// What the node's limits are enforced on.
    #[serde(skip_serializing_if = "is_zero")]
    pub enforce_node_allocatable: Vec<String>,
    /// Sysctls pods may set beyond the safe ones; a final `*` matches a prefix.
    #[serde(skip_serializing_if = "is_zero")]
    pub allowed_unsafe_sysctls: Vec<String>,
    /// Sysctls set in every pod (alpha).
    #[serde(skip_serializing_if = "is_zero")]
    pub default_pod_sysctls: BTreeMap<String, String>,
    /// Directory of flexvolume drivers.
    #[serde(skip_serializing_if = "is_zero")]
    pub volume_plugin_dir: String,
    /// The cloud's name of this node.
    #[serde(rename = "providerID", skip_serializing_if = "is_zero")]
    pub provider_id: String,
    /// Hear of memory pressure from the kernel.
    #[serde(skip_serializing_if = "is_zero")]
    pub kernel_memcg_notification: bool,
    /// Format and verbosity of the log.
    pub logging: Logging,
    /// Serve /logs/.
    pub enable_system_log_handler: bool,
    /// Serve queries of the journal.
    pub enable_system_log_query: bool,
    /// Grace of pods when the machine shuts down.
    pub shutdown_grace_period: GoDuration,
    /// Share of it kept for critical pods.
    pub shutdown_grace_period_critical_pods: GoDuration,
    /// Grace per pod priority.
    #[serde(skip_serializing_if = "is_zero")]
    pub shutdown_grace_period_by_pod_priority: Vec<ShutdownGracePeriod>,
    /// Restart back-off.
    #[serde(rename = "crashLoopBackOff")]
    pub crash_loop_backoff: CrashLoopBackOff,
    /// Memory kept per NUMA node.
    #[serde(skip_serializing_if = "is_zero")]
    pub reserved_memory: Vec<MemoryReservation>,
    /// Serve /debug/pprof.
    pub enable_profiling_handler: bool,
    /// Serve /debug/flags/v.
    pub enable_debug_flags_handler: bool,
    /// `RuntimeDefault` for pods without a profile.
    pub seccomp_default: bool,
    /// Share of the limit that becomes memory.high.
    #[serde(skip_serializing_if = "is_zero")]
    pub memory_throttling_factor: Option<f64>,
    /// `None` or `TieredReservation`.
    #[serde(skip_serializing_if = "is_zero")]
    pub memory_reservation_policy: String,
    /// Taints of a node that registers itself.
    #[serde(skip_serializing_if = "is_zero")]
    pub register_with_taints: Vec<Taint>,
    /// Create the Node object.
    pub register_node: bool,
    /// OTLP spans.
    #[serde(skip_serializing_if = "is_zero")]
    pub tracing: Option<Tracing>,
    /// Account ephemeral storage.
    pub local_storage_capacity_isolation: bool,
    /// Socket of the CRI runtime.
    pub container_runtime_endpoint: String,
    /// Socket of the CRI image service; empty is the runtime's.
    #[serde(skip_serializing_if = "is_zero")]
    pub image_service_endpoint: String,
    /// Do not start on cgroup v1.
    pub fail_cgroup_v1: bool,
    /// Sizes of user namespaces.
    #[serde(skip_serializing_if = "is_zero")]
    pub user_namespaces: Option<UserNamespaces>,
}

impl Default for KubeletConfiguration {
    fn default() -> Self {
        Self {
            enable_server: true,
            static_pod_path: String::new(),
            pod_logs_dir: "/var/log/pods".to_owned(),
            sync_frequency: GoDuration::from_secs(60),
            file_check_frequency: GoDuration::from_secs(20),
            http_check_frequency: GoDuration::from_secs(20),
            static_pod_url: String::new(),
            static_pod_url_header: StaticPodHeaders::default(),
            address: "0.0.0.0".to_owned(),
            port: 10250,
            read_only_port: 0,
            tls_cert_file: String::new(),
            tls_private_key_file: String::new(),
            tls_cipher_suites: Vec::new(),
            tls_curve_preferences: Vec::new(),
            tls_min_version: String::new(),
            rotate_certificates: false,
            server_tls_bootstrap: false,
            authentication: Authentication::default(),
            authorization: Authorization::default(),
            registry_pull_qps: 5,
            registry_burst: 10,
            image_pull_credentials_verification_policy: "NeverVerifyPreloadedImages".to_owned(),
            preloaded_images_verification_allowlist: Vec::new(),
            event_record_qps: 50,
            event_burst: 100,
            enable_debugging_handlers: true,
            enable_contention_profiling: false,
            healthz_port: 10248,
            healthz_bind_address: "127.0.0.1".to_owned(),
            oom_score_adj: -999,
            cluster_domain: String::new(),
            cluster_dns: Vec::new(),
            streaming_connection_idle_timeout: GoDuration::from_secs(14400),
            node_status_update_frequency: GoDuration::from_secs(10),
            node_status_report_frequency: GoDuration::from_secs(300),
            node_lease_duration_seconds: 40,
            image_minimum_gc_age: GoDuration::from_secs(120),
            image_maximum_gc_age: GoDuration::ZERO,
            image_gc_high_threshold_percent: 85,
            image_gc_low_threshold_percent: 80,
            volume_stats_agg_period: GoDuration::from_secs(60),
            kubelet_cgroups: String::new(),
            system_cgroups: String::new(),
            cgroup_root: String::new(),
            cgroups_per_qos: true,
            cgroup_driver: "cgroupfs".to_owned(),
            cpu_manager_policy: "none".to_owned(),
            single_process_oom_kill: None,
            cpu_manager_policy_options: BTreeMap::new(),
            cpu_manager_reconcile_period: GoDuration::from_secs(10),
            memory_manager_policy: "None".to_owned(),
            topology_manager_policy: "none".to_owned(),
            topology_manager_scope: "container".to_owned(),
            topology_manager_policy_options: BTreeMap::new(),
            qos_reserved: BTreeMap::new(),
            runtime_request_timeout: GoDuration::from_secs(120),
            hairpin_mode: "promiscuous-bridge".to_owned(),
            max_pods: 110,
            pod_cidr: String::new(),
            pod_pids_limit: -1,
            resolv_conf: "/etc/resolv.conf".to_owned(),
            run_once: false,
            cpu_cfs_quota: true,
            cpu_cfs_quota_period: GoDuration::from_millis(100),
            node_status_max_images: 50,
            max_open_files: 1000000,
            content_type: "application/vnd.kubernetes.protobuf".to_owned(),
            kube_api_qps: 50,
            kube_api_burst: 100,
            serialize_image_pulls: true,
            max_parallel_image_pulls: None,
            eviction_hard: BTreeMap::new(),
            eviction_soft: BTreeMap::new(),
            eviction_soft_grace_period: BTreeMap::new(),
            eviction_pressure_transition_period: GoDuration::from_secs(300),
            eviction_max_pod_grace_period: 0,
            eviction_minimum_reclaim: BTreeMap::new(),
            merge_default_eviction_settings: false,
            pods_per_core: 0,
            enable_controller_attach_detach: true,
            protect_kernel_defaults: false,
            make_iptables_util_chains: true,
            iptables_masquerade_bit: 14,
            iptables_drop_bit: 15,
            feature_gates: BTreeMap::new(),
            fail_swap_on: true,
            memory_swap: MemorySwap::default(),
            container_log_max_size: "10Mi".to_owned(),
            container_log_max_files: 5,
            container_log_max_workers: 1,
            container_log_monitor_interval: GoDuration::from_secs(10),
            config_map_and_secret_change_detection_strategy: "Watch".to_owned(),
            system_reserved: BTreeMap::new(),
            kube_reserved: BTreeMap::new(),
            reserved_system_cpus: String::new(),
            show_hidden_metrics_for_version: String::new(),
            system_reserved_cgroup: String::new(),
            kube_reserved_cgroup: String::new(),
            enforce_node_allocatable: vec!["pods".to_owned()],
            allowed_unsafe_sysctls: Vec::new(),
            default_pod_sysctls: BTreeMap::new(),
            volume_plugin_dir: "/usr/libexec/kubernetes/kubelet-plugins/volume/exec/".to_owned(),
            provider_id: String::new(),
            kernel_memcg_notification: false,
            logging: Logging::default(),
            enable_system_log_handler: true,
            enable_system_log_query: false,
            shutdown_grace_period: GoDuration::ZERO,
            shutdown_grace_period_critical_pods: GoDuration::ZERO,
            shutdown_grace_period_by_pod_priority: Vec::new(),
            crash_loop_backoff: CrashLoopBackOff::default(),
            reserved_memory: Vec::new(),
            enable_profiling_handler: true,
            enable_debug_flags_handler: true,
            seccomp_default: false,
            memory_throttling_factor: None,
            memory_reservation_policy: "None".to_owned(),
            register_with_taints: Vec::new(),
            register_node: true,
            tracing: None,
            local_storage_capacity_isolation: true,
            container_runtime_endpoint: "unix:///run/containerd/containerd.sock".to_owned(),
            image_service_endpoint: String::new(),
            fail_cgroup_v1: true,
            user_namespaces: None,
        }
    }
}
