//! What only the command line says: the settings that `KubeletConfiguration` has no field for. Contract 1.4.
//!
//! Filled by `cli`, read by every room through [`super::Config`]. The node's name and addresses come from here.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use super::go_duration::GoDuration;

/// Flags without a configuration field, with Go's defaults.
#[derive(Debug, Clone, PartialEq)]
pub struct Flags {
    /// `--config`.
    pub config_file: Option<PathBuf>,
    /// `--config-dir`.
    pub config_directory: Option<PathBuf>,
    /// `--kubeconfig`; none means standalone mode.
    pub kubeconfig: Option<PathBuf>,
    /// `--bootstrap-kubeconfig`.
    pub bootstrap_kubeconfig: Option<PathBuf>,
    /// `--hostname-override`, as given; empty is not set.
    pub hostname_override: String,
    /// `--node-ip`, as given; empty is not set.
    pub node_ip: String,
    /// `--cert-dir`.
    pub cert_directory: PathBuf,
    /// `--root-dir`.
    pub root_directory: PathBuf,
    /// `--cloud-provider`.
    pub cloud_provider: CloudProvider,
    /// `--node-labels`.
    pub node_labels: BTreeMap<String, String>,
    /// `--runtime-cgroups`.
    pub runtime_cgroups: String,
    /// `--image-credential-provider-config`.
    pub image_credential_provider_config: Option<PathBuf>,
    /// `--image-credential-provider-bin-dir`.
    pub image_credential_provider_bin_directory: Option<PathBuf>,
    /// `--lock-file`.
    pub lock_file: Option<PathBuf>,
    /// `--exit-on-lock-contention`.
    pub exit_on_lock_contention: bool,
    /// `--seccomp-default`; the configuration's `seccompDefault` counts as well.
    pub seccomp_default: bool,
    /// `--maximum-dead-containers`; negative is no limit.
    pub maximum_dead_containers: i32,
    /// `--maximum-dead-containers-per-container`; negative is no limit.
    pub maximum_dead_containers_per_container: i32,
    /// `--minimum-container-ttl-duration`.
    pub minimum_container_ttl: GoDuration,
    /// `--experimental-allocatable-ignore-eviction`: hard eviction does not reduce allocatable.
    pub allocatable_ignores_eviction: bool,
    /// `--housekeeping-interval` of container statistics.
    pub housekeeping_interval: GoDuration,
    /// `--eager-first-readiness`, ours alone: see `probes`.
    pub eager_first_readiness: bool,
}

impl Default for Flags {
    fn default() -> Self {
        Self {
            config_file: None,
            config_directory: None,
            kubeconfig: None,
            bootstrap_kubeconfig: None,
            hostname_override: String::new(),
            node_ip: String::new(),
            cert_directory: PathBuf::from("/var/lib/kubelet/pki"),
            root_directory: PathBuf::from("/var/lib/kubelet"),
            cloud_provider: CloudProvider::None,
            node_labels: BTreeMap::new(),
            runtime_cgroups: String::new(),
            image_credential_provider_config: None,
            image_credential_provider_bin_directory: None,
            lock_file: None,
            exit_on_lock_contention: false,
            seccomp_default: false,
            maximum_dead_containers: -1,
            maximum_dead_containers_per_container: 1,
            minimum_container_ttl: GoDuration::ZERO,
            allocatable_ignores_eviction: false,
            housekeeping_interval: GoDuration::from_secs(10),
            eager_first_readiness: true,
        }
    }
}

/// Who sets the node's addresses and labels of the cloud (contract S-20).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CloudProvider {
    /// The node itself.
    #[default]
    None,
    /// A cloud controller manager.
    External,
}

/// The node's name: the override, else the host's name; trimmed, in lower case (contract S-18).
pub(super) fn node_name(hostname_override: &str, hostname: &str) -> Result<String, &'static str> {
    let name = if hostname_override.is_empty() { hostname } else { hostname_override };
    match name.trim() {
        "" => Err("empty hostname is invalid"),
        name => Ok(name.to_lowercase()),
    }
}

/// `--node-ip`: the addresses, and the parts that are none and are ignored (contract S-19).
pub(super) fn parse_node_ips(text: &str) -> Result<(Vec<IpAddr>, Vec<String>), &'static str> {
    let (mut ips, mut ignored) = (Vec::new(), Vec::new());
    for part in text.split(',').map(str::trim).filter(|_| !text.is_empty()) {
        match part.parse::<IpAddr>() {
            Ok(ip) => ips.push(ip.to_canonical()),
            Err(_) => ignored.push(part.to_owned()),
        }
    }
    match ips[..] {
        [] | [_] => Ok((ips, ignored)),
        [first, second] if first.is_ipv4() != second.is_ipv4() => {
            if first.is_unspecified() || second.is_unspecified() {
                return Err("dual-stack node IP cannot include '0.0.0.0' or '::'");
            }
            Ok((ips, ignored))
        }
        _ => Err("must contain either a single IP or a dual-stack pair of IPs"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn s18_node_name_is_trimmed_and_lower_case() {
        assert_eq!(node_name("", "Host.Example\n"), Ok("host.example".to_owned()));
        assert_eq!(node_name(" Node-A ", "host"), Ok("node-a".to_owned()));
        assert_eq!(node_name(" ", "host"), Err("empty hostname is invalid"));
    }

    #[test]
    fn s19_node_ip_is_one_address_or_a_pair_of_both_families() {
        let ips =
            |text: &str| parse_node_ips(text).map(|(ips, _)| ips.iter().map(ToString::to_string).collect::<Vec<_>>());
        assert_eq!(ips(""), Ok(vec![]));
        assert_eq!(ips("::"), Ok(vec!["::".to_owned()]));
        assert_eq!(ips("10.0.0.1, fd00::1"), Ok(vec!["10.0.0.1".to_owned(), "fd00::1".to_owned()]));
        assert!(ips("10.0.0.1,10.0.0.2").is_err());
        assert!(ips("0.0.0.0,fd00::1").is_err());
        assert_eq!(parse_node_ips("nonsense").unwrap().1, ["nonsense"]);
    }
}
