//! From a PodSpec to CRI configs: names, labels, annotations, hash, environment, security context, resources (contract 3.3, 3.5).
//!
//! In: pod, container, node facts, mounts, image. Out: `PodSandboxConfig` and `ContainerConfig`, and back: what the runtime's
//! labels and annotations say about a container. Pure, but for [`environment`], which reads referenced objects, and
//! [`termination_log`], which creates and reads one file.

mod container;
mod downward;
mod env_file;
mod environment;
mod expand;
mod hash;
mod labels;
mod log_paths;
mod ports;
mod profiles;
mod resources;
mod sandbox;
mod security;
mod service_env;
pub mod termination_log;
#[cfg(test)]
pub(crate) mod tests;

pub use container::{ContainerPolicy, container_config, container_config_with};
pub use downward::{format_map, pod_field, resource_field};
pub use environment::environment;
pub use expand::{expand, expand_sub_path};
pub use hash::container_hash;
pub(crate) use hash::go_json;
pub use labels::{
    ContainerAnnotations, ContainerLabels, DEFAULT_TERMINATION_MESSAGE_PATH, SandboxLabels, TerminationMessagePolicy,
    remembered_pod,
};
pub use log_paths::{container_log_directory, container_log_link, container_log_path, pod_log_directory};
pub use ports::{ConfigError, ContainerInputs, SandboxInputs, as_map};
pub use resources::{container_resources, resized_resources, sandbox_resources};
pub use sandbox::sandbox_config;
