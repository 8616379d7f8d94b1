//! What each room is told: its part of the configuration, in its own types.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use tokio::sync::watch;

use crate::{
    admission::{self, Policy, SysctlAllowlist, SysctlError},
    api::ApiSettings,
    cli,
    config::{CgroupDriver, Config, GoDuration, HostFacts},
    containers::{ContainerPolicy, container_hash},
    garbage_collection::Limits,
    images::{CollectorSettings, ImageSettings, ProviderSettings, VerificationPolicy},
    network::DnsSettings,
    node::{Handshake, HostPaths, Machine, MachineError, NodeFacts, NodeSettings},
    pod_worker::{StartGate, WorkerSettings, backoff::BackoffLimits, decide::Rules, restart::LifecycleGates},
    probes::ProbeSettings,
    resources::{CgroupSettings, allocation::ResizePolicy},
    rush::Rush,
    server::ServerSettings,
    time::Clock,
    user_namespaces::{IdRange, UserNamespaceError, UserNamespaces},
    volumes::VolumeSettings,
};

pub(super) const CONTAINER_LOGS_DIR: &str = "/var/log/containers";

/// A configured duration; negative ones count as none.
pub(super) fn duration(of: GoDuration) -> Duration {
    of.std()
}

pub(super) fn pod_logs_dir(config: &Config) -> PathBuf {
    PathBuf::from(&config.kubelet.pod_logs_dir)
}

/// As wide as there are cores, and up to four times as wide where that turns out to be faster.
pub(super) fn start_gate(clock: &Arc<dyn Clock>, rush: &Rush) -> StartGate {
    let cores = std::thread::available_parallelism().map_or(2, usize::from).max(2);
    StartGate::adaptive(cores, 4 * cores, Arc::clone(clock), rush.clone())
}

pub(super) fn api(config: &Config) -> ApiSettings {
    let kubelet = &config.kubelet;
    let lease = Duration::from_secs(kubelet.node_lease_duration_seconds.max(1) as u64);
    ApiSettings {
        qps: f64::from(kubelet.kube_api_qps),
        burst: kubelet.kube_api_burst.max(0) as u32,
        event_qps: f64::from(kubelet.event_record_qps),
        event_burst: kubelet.event_burst.max(0) as u32,
        user_agent: cli::user_agent(),
        heartbeat_timeout: duration(kubelet.node_status_update_frequency).min(lease),
    }
}

pub(super) fn cgroups(config: &Config, driver: CgroupDriver) -> Result<CgroupSettings, MachineError> {
    let page_sizes = Machine::read(&HostPaths::default())?.huge_page_sizes();
    Ok(CgroupSettings::from_config(config, driver, Path::new("/sys/fs/cgroup"), page_sizes))
}

/// What decides about resizes in place (contract P-70).
pub(super) fn resize(config: &Config, cgroup_v2: bool) -> ResizePolicy {
    let (kubelet, gates) = (&config.kubelet, &config.feature_gates);
    ResizePolicy {
        static_cpus: kubelet.cpu_manager_policy == "static" && !gates.enabled("InPlacePodVerticalScalingExclusiveCPUs"),
        static_memory: kubelet.memory_manager_policy == "Static"
            && !gates.enabled("InPlacePodVerticalScalingExclusiveMemory"),
        pod_level: gates.enabled("InPlacePodLevelResourcesVerticalScaling"),
        limited_swap: cgroup_v2 && kubelet.memory_swap.swap_behavior == "LimitedSwap",
    }
}

pub(super) fn volumes(config: &Config, node: watch::Receiver<Arc<NodeFacts>>) -> VolumeSettings {
    VolumeSettings {
        root_dir: config.root_directory().to_owned(),
        node,
        selinux: Path::new("/sys/fs/selinux/enforce").exists(),
    }
}

pub(super) fn images(config: &Config) -> ImageSettings {
    let kubelet = &config.kubelet;
    ImageSettings {
        root_dir: config.root_directory().to_owned(),
        serialize_pulls: kubelet.serialize_image_pulls,
        max_parallel_pulls: kubelet.max_parallel_image_pulls.and_then(|n| usize::try_from(n).ok()),
        registry_qps: f64::from(kubelet.registry_pull_qps),
        registry_burst: kubelet.registry_burst.max(0) as u32,
        home: std::env::var_os("HOME").map(PathBuf::from),
        verification: VerificationPolicy::from_config(
            &kubelet.image_pull_credentials_verification_policy,
            &kubelet.preloaded_images_verification_allowlist,
        ),
        providers: credential_providers(config),
        handler_in_specs: config.feature_gates.enabled("RuntimeClassInImageCriApi"),
    }
}

/// `None`: neither flag was given.
fn credential_providers(config: &Config) -> Option<ProviderSettings> {
    let (file, directory) = (
        config.flags.image_credential_provider_config.clone(),
        config.flags.image_credential_provider_bin_directory.clone(),
    );
    (file.is_some() || directory.is_some()).then(|| ProviderSettings {
        config: file.unwrap_or_default(),
        bin_dir: directory.unwrap_or_default(),
        service_account_tokens: config.feature_gates.enabled("KubeletServiceAccountTokenForCredentialProviders"),
    })
}

pub(super) fn image_collector(config: &Config) -> CollectorSettings {
    let kubelet = &config.kubelet;
    let percent = |value: i32| u64::try_from(value).unwrap_or(0);
    CollectorSettings {
        high_threshold: percent(kubelet.image_gc_high_threshold_percent),
        low_threshold: percent(kubelet.image_gc_low_threshold_percent),
        minimum_age: duration(kubelet.image_minimum_gc_age),
        maximum_age: duration(kubelet.image_maximum_gc_age),
    }
}

/// Of dead containers.
pub(super) fn dead_containers(config: &Config) -> Limits {
    Limits {
        per_container: usize::try_from(config.flags.maximum_dead_containers_per_container).ok(),
        total: usize::try_from(config.flags.maximum_dead_containers).ok(),
        minimum_age: duration(config.flags.minimum_container_ttl),
    }
}

pub(super) fn workers(config: &Config, handshake: &Handshake, process_started: Timestamp) -> WorkerSettings {
    let kubelet = &config.kubelet;
    let cap = kubelet.crash_loop_backoff.max_container_restart_period.map(duration);
    let limits = BackoffLimits::default();
    WorkerSettings {
        rules: Rules {
            backoff: BackoffLimits { cap: cap.unwrap_or(limits.cap), ..limits },
            hash: |container| format!("{:x}", container_hash(container)),
            gates: lifecycle_gates(config),
        },
        root_dir: config.root_directory().to_owned(),
        pod_logs_dir: pod_logs_dir(config),
        container_logs_dir: CONTAINER_LOGS_DIR.into(),
        dns: dns(config),
        container_policy: ContainerPolicy {
            seccomp_default: config.seccomp_default(),
            single_process_oom_kill: kubelet.single_process_oom_kill.unwrap_or(false),
            memory_qos: config.feature_gates.enabled("MemoryQoS"),
            memory_reservation: kubelet.memory_reservation_policy == "TieredReservation",
            memory_throttling_factor: kubelet.memory_throttling_factor,
            stop_signals: config.feature_gates.enabled("ContainerStopSignals"),
            ..ContainerPolicy::default()
        },
        cpu_cfs_quota: kubelet.cpu_cfs_quota,
        cpu_cfs_period: duration(kubelet.cpu_cfs_quota_period),
        runtime_name: handshake.runtime_name.clone(),
        process_started,
    }
}

/// Reads `getsubids` and what earlier agents recorded.
pub(super) fn user_namespaces(config: &Config) -> Result<UserNamespaces, UserNamespaceError> {
    let kubelet = &config.kubelet;
    let configured = kubelet.user_namespaces.as_ref().and_then(|n| n.ids_per_pod);
    let ids = configured.and_then(|ids| u32::try_from(ids).ok()).filter(|ids| *ids > 0).unwrap_or(65536);
    let max_pods = u32::try_from(kubelet.max_pods).unwrap_or(0);
    UserNamespaces::open(config.root_directory(), ids, max_pods, IdRange::of_this_host(ids)?)
}

fn lifecycle_gates(config: &Config) -> LifecycleGates {
    let gates = &config.feature_gates;
    LifecycleGates {
        restart_rules: gates.enabled("ContainerRestartRules"),
        restart_all: gates.enabled("RestartAllContainersOnContainerExits"),
        stop_signals: gates.enabled("ContainerStopSignals"),
        image_digests: gates.enabled("ImageVolumeWithDigest"),
    }
}

pub(super) fn probes(config: &Config) -> ProbeSettings {
    ProbeSettings { seed: rand::random(), eager_first_readiness: config.flags.eager_first_readiness }
}

pub(super) fn dns(config: &Config) -> DnsSettings {
    let kubelet = &config.kubelet;
    DnsSettings {
        cluster_dns: kubelet.cluster_dns.iter().filter_map(|ip| ip.parse().ok()).collect(),
        cluster_domain: kubelet.cluster_domain.clone(),
        resolv_conf: Some(PathBuf::from(&kubelet.resolv_conf)).filter(|p| !p.as_os_str().is_empty()),
    }
}

pub(super) fn node(config: &Config, runtime: &Handshake) -> NodeSettings {
    let declared = admission::declared_features(&config.feature_gates, &runtime.features);
    let declared = declared.into_iter().map(str::to_owned).collect();
    NodeSettings::from_config(config, &HostFacts::read(), HostPaths::default(), declared)
}

pub(super) fn admission(config: &Config, runtime: &Handshake) -> Result<Policy, SysctlError> {
    let host = HostPaths::default();
    let kernel = std::fs::read_to_string(host.proc.join("sys/kernel/osrelease")).unwrap_or_default();
    let gates = &config.feature_gates;
    Ok(Policy {
        sysctls: SysctlAllowlist::new(kernel.trim(), &config.kubelet.allowed_unsafe_sysctls)?,
        app_armor: admission::app_armor_enabled(&host.sys),
        pod_level_resources: gates.enabled("PodLevelResources"),
        taint_comparison: gates.enabled("TaintTolerationComparisonOperators"),
        declared_features: admission::declared_features(gates, &runtime.features),
    })
}

/// 10250.
pub(super) fn server(config: &Config, node_ips: &[IpAddr]) -> ServerSettings {
    let kubelet = &config.kubelet;
    let (cert, key) = (path(&kubelet.tls_cert_file), path(&kubelet.tls_private_key_file));
    ServerSettings {
        listen: socket(&kubelet.address, kubelet.port),
        tls_files: cert.zip(key),
        cert_dir: config.flags.cert_directory.clone(),
        hostname: config.node_name.clone(),
        node_ips: node_ips.to_vec(),
        client_ca_file: path(&kubelet.authentication.x509.client_ca_file),
        anonymous: kubelet.authentication.anonymous.enabled,
    }
}

/// 10248; `None` when it is turned off.
pub(super) fn healthz(config: &Config) -> Option<SocketAddr> {
    let kubelet = &config.kubelet;
    (kubelet.healthz_port > 0).then(|| socket(&kubelet.healthz_bind_address, kubelet.healthz_port))
}

/// Both parts are validated with the configuration.
fn socket(address: &str, port: i32) -> SocketAddr {
    let ip = address.parse().unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
    SocketAddr::new(ip, u16::try_from(port).unwrap_or_default())
}

fn path(text: &str) -> Option<PathBuf> {
    Some(PathBuf::from(text)).filter(|p| !p.as_os_str().is_empty())
}
