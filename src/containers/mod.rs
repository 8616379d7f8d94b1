//! From a PodSpec to CRI configs: names, labels, annotations, hash, environment, security context, resources (contract 3.3, 3.5).
//!
//! Pure but for [`environment`], which reads referenced objects. In: pod, container, node facts, mounts, image. Out: `PodSandboxConfig` and
//! `ContainerConfig`. Touches nothing.

mod ports;

pub use ports::{ConfigError, ContainerInputs, SandboxInputs, as_map};
