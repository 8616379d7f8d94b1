//! The pod's view of the network: DNS config, host name, hosts file, host ports (contract P-54, P-55, P-56, P-57); and the node's iptables
//! chains (S-23).
//!
//! In: the pod, its addresses, the node's settings. Out: CRI's `DnsConfig`, names, port mappings, and the mount of the hosts
//! file. Pure, but for reading `resolv.conf`, writing `pods/<uid>/etc-hosts` and running `iptables`.

mod dns;
mod host_ports;
mod hostname;
mod hosts_file;
mod iptables;

pub use dns::{DnsSettings, DnsWarning, PodDns, ResolvConf, ResolvConfError};
pub use host_ports::port_mappings;
pub use hostname::{PodHostname, pod_hostname};
pub use hosts_file::{ETC_HOSTS, HostsFile, hosts_file_path, hosts_mount};
pub use iptables::{HostIptables, Iptables, keep_chains};

/// A pod's network cannot be described. Fails the sandbox: event `FailedCreatePodSandBox`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct NetworkError {
    pub message: String,
}

impl NetworkError {
    fn new(message: impl Into<String>) -> Self {
        Self { message: message.into() }
    }
}

impl From<NetworkError> for crate::containers::ConfigError {
    fn from(error: NetworkError) -> Self {
        Self::container(error.message)
    }
}
