//! The configuration: built once at start from defaults, `--config`, `--config-dir` and flags, and never changed.
//!
//! Files and the parsed command line go in; a validated [`Config`] comes out, which each room reads. What a start may
//! ask of the machine is in [`HostFacts`]. Contract 1.1 (S-05 to S-10, S-18 to S-20), 1.4, 1.5, Appendix A and F.

mod decode;
mod eviction;
mod feature_gate_table;
mod feature_gates;
mod fields;
mod flags;
mod go_duration;
mod labels;
mod sections;
mod types;
mod validation;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

pub use decode::DecodeError;
pub use eviction::{Amount, Reservation, Signal, Threshold, ThresholdError, parse_thresholds};
pub use feature_gates::{FeatureGateError, FeatureGates, Gate, Stage};
pub use fields::{ineffective_fields, no_effect};
pub use flags::{CloudProvider, Flags};
pub use go_duration::{GoDuration, GoDurationError};
pub use labels::{label_key_errors, label_value_errors, parse_taint, validate_node_labels};
pub use sections::*;
pub use types::KubeletConfiguration;
pub use validation::parse_cpu_set;

/// A configuration field that a flag sets.
#[derive(Debug, Clone, PartialEq)]
pub struct Override {
    /// JSON path of the field.
    pub path: &'static str,
    pub value: Value,
}

/// The hierarchy that /sys/fs/cgroup is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CgroupVersion {
    V1,
    V2,
}

/// What the machine says at start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostFacts {
    pub hostname: String,
    pub cgroup: CgroupVersion,
}

impl HostFacts {
    /// Asks the machine. Without a host name the name is empty and only `--hostname-override` helps.
    pub fn read() -> Self {
        let hostname = nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let unified = nix::sys::statfs::statfs("/sys/fs/cgroup")
            .is_ok_and(|stat| stat.filesystem_type() == nix::sys::statfs::CGROUP2_SUPER_MAGIC);
        Self { hostname, cgroup: if unified { CgroupVersion::V2 } else { CgroupVersion::V1 } }
    }
}

/// `cgroupDriver`, until the runtime names its own (contract S-12).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CgroupDriver {
    Cgroupfs,
    Systemd,
}

/// Everything the node was told, checked. Cheap to share behind an `Arc`.
#[derive(Debug, Clone)]
pub struct Config {
    /// The effective `KubeletConfiguration`, as `/configz` shows it.
    pub kubelet: KubeletConfiguration,
    /// What only flags say.
    pub flags: Flags,
    pub feature_gates: FeatureGates,
    /// Name of the Node object.
    pub node_name: String,
    /// `--node-ip`: none, one, or one of each family. May be unspecified (`0.0.0.0`, `::`) to prefer a family.
    pub node_ips: Vec<IpAddr>,
    pub system_reserved: Reservation,
    pub kube_reserved: Reservation,
    /// Hard and soft thresholds.
    pub eviction_thresholds: Vec<Threshold>,
    /// What to log once logging works: lenient decoding, ignored addresses.
    pub warnings: Vec<String>,
}

/// Why no configuration came about; the start ends with exit 1. Messages are upstream's.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("failed to load kubelet config file, path: {path}, error: failed to load Kubelet config file {path}, error {source}", path = .path.display())]
    File { path: PathBuf, source: DecodeError },
    #[error("failed to merge kubelet configs: {0}")]
    DropIns(DecodeError),
    #[error("failed to precedence kubeletConfigFlag: {0}")]
    Flags(DecodeError),
    #[error("failed to set feature gates from initial flags-based config: {}", aggregate(.0))]
    FeatureGates(Vec<FeatureGateError>),
    #[error("initialize logging: {}", aggregate(.0))]
    Logging(Vec<String>),
    #[error("failed to validate kubelet configuration, error: {}, path: {path}", aggregate(.errors), path = .path.display())]
    Invalid { errors: Vec<String>, path: PathBuf },
    #[error("failed to validate kubelet flags: {0}")]
    NodeLabels(String),
    #[error("--{flag} value failed to parse: {source}")]
    Reservation { flag: &'static str, source: ThresholdError },
    #[error("{0}")]
    Eviction(ThresholdError),
    #[error("bad --node-ip {0:?}: {1}")]
    NodeIp(String, &'static str),
    #[error("{0}")]
    NodeName(&'static str),
}

/// One message as it is, more in brackets: how Go prints an aggregate.
fn aggregate<E: ToString>(errors: &[E]) -> String {
    let mut texts: Vec<String> = errors.iter().map(ToString::to_string).collect();
    texts.dedup();
    match &texts[..] {
        [one] => one.clone(),
        many => format!("[{}]", many.join(", ")),
    }
}

impl Config {
    /// Defaults, then `--config`, then the drop-ins, then `overrides` from flags; checked as a whole.
    pub fn load(flags: Flags, overrides: &[Override], host: &HostFacts) -> Result<Self, ConfigError> {
        let flag_gates = feature_gates_of(overrides);
        FeatureGates::from_map(&flag_gates).map_err(ConfigError::FeatureGates)?;
        validate_node_labels(&flags.node_labels).map_err(ConfigError::NodeLabels)?;

        let (kubelet, mut warnings) = layer(&flags, overrides, &flag_gates)?;
        let feature_gates = FeatureGates::from_map(&kubelet.feature_gates).map_err(ConfigError::FeatureGates)?;
        let errors = validation::validate_logging(&kubelet.logging, &feature_gates);
        if !errors.is_empty() {
            return Err(ConfigError::Logging(errors));
        }
        let errors = validation::validate(&kubelet, &feature_gates, host.cgroup);
        if !errors.is_empty() {
            return Err(ConfigError::Invalid { errors, path: flags.config_file.unwrap_or_default() });
        }

        let node_name = flags::node_name(&flags.hostname_override, &host.hostname).map_err(ConfigError::NodeName)?;
        let (node_ips, ignored) = flags::parse_node_ips(&flags.node_ip)
            .map_err(|reason| ConfigError::NodeIp(flags.node_ip.clone(), reason))?;
        if !ignored.is_empty() {
            warnings.push(format!("Could not parse some node IP(s), ignoring them: {}", ignored.join(", ")));
        }
        let reservation = |flag, texts| {
            eviction::parse_reservation(texts).map_err(|source| ConfigError::Reservation { flag, source })
        };
        Ok(Self {
            system_reserved: reservation("system-reserved", &kubelet.system_reserved)?,
            kube_reserved: reservation("kube-reserved", &kubelet.kube_reserved)?,
            eviction_thresholds: parse_thresholds(
                &kubelet.eviction_hard,
                &kubelet.eviction_soft,
                &kubelet.eviction_soft_grace_period,
                &kubelet.eviction_minimum_reclaim,
            )
            .map_err(ConfigError::Eviction)?,
            kubelet,
            flags,
            feature_gates,
            node_name,
            node_ips,
            warnings,
        })
    }

    /// No API server: `--kubeconfig` and `--bootstrap-kubeconfig` are both absent.
    pub fn is_standalone(&self) -> bool {
        self.flags.kubeconfig.is_none() && self.flags.bootstrap_kubeconfig.is_none()
    }

    pub fn cgroup_driver(&self) -> CgroupDriver {
        if self.kubelet.cgroup_driver == "systemd" { CgroupDriver::Systemd } else { CgroupDriver::Cgroupfs }
    }

    /// The socket of the image service: its own, else the runtime's.
    pub fn image_service_endpoint(&self) -> &str {
        match self.kubelet.image_service_endpoint.as_str() {
            "" => &self.kubelet.container_runtime_endpoint,
            own => own,
        }
    }

    /// Whether pods without a seccomp profile get `RuntimeDefault`.
    pub fn seccomp_default(&self) -> bool {
        self.flags.seccomp_default || self.kubelet.seccomp_default
    }

    pub fn root_directory(&self) -> &Path {
        &self.flags.root_directory
    }

    /// The body of `/configz`.
    pub fn configz(&self) -> Value {
        let mut kubelet = serde_json::to_value(&self.kubelet).unwrap_or_default();
        if let Value::Object(map) = &mut kubelet {
            map.insert("kind".to_owned(), json!(decode::KIND));
            map.insert("apiVersion".to_owned(), json!(decode::API_VERSION));
        }
        json!({ "kubeletconfig": kubelet })
    }
}

fn feature_gates_of(overrides: &[Override]) -> BTreeMap<String, bool> {
    let gates = overrides.iter().rev().find(|over| over.path == "featureGates");
    gates.and_then(|over| serde_json::from_value(over.value.clone()).ok()).unwrap_or_default()
}

/// The four layers, lowest first (contract S-05).
fn layer(
    flags: &Flags,
    overrides: &[Override],
    flag_gates: &BTreeMap<String, bool>,
) -> Result<(KubeletConfiguration, Vec<String>), ConfigError> {
    let mut decoded = match &flags.config_file {
        Some(path) => {
            let absolute = std::path::absolute(path).unwrap_or_else(|_| path.clone());
            decode::load_file(&absolute).map_err(|source| ConfigError::File { path: path.clone(), source })?
        }
        None => decode::Decoded { object: legacy_defaults(), warnings: Vec::new() },
    };
    if let Some(directory) = &flags.config_directory {
        let base = decode::typed(&decoded.object).map_err(ConfigError::DropIns)?;
        decoded.object = serde_json::to_value(&base).unwrap_or_default();
        decode::merge_drop_ins(&mut decoded, directory).map_err(ConfigError::DropIns)?;
    }
    for over in overrides.iter().filter(|over| over.path != "featureGates") {
        fields::set(&mut decoded.object, over.path, over.value.clone());
    }
    for (gate, on) in flag_gates {
        fields::set(&mut decoded.object, &format!("featureGates.{gate}"), json!(on));
    }
    Ok((decode::typed(&decoded.object).map_err(ConfigError::Flags)?, decoded.warnings))
}

/// Without `--config` the flags' old defaults count (contract S-05).
fn legacy_defaults() -> Value {
    json!({
        "authentication": { "anonymous": { "enabled": true }, "webhook": { "enabled": false } },
        "authorization": { "mode": "AlwaysAllow" },
        "readOnlyPort": 10255,
    })
}

#[cfg(test)]
mod tests;
