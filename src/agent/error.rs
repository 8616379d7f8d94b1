//! Everything that ends the agent, each with its cause.

use std::io;

use super::watchdog::WatchdogError;
use crate::{
    admission::SysctlError,
    api::ApiSetupError,
    images::ImagesSetupError,
    node::{self, tunables},
    server,
    user_namespaces::UserNamespaceError,
    volumes,
};

/// Why the agent cannot start or had to end.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    #[error("failed to build the async runtime: {0}")]
    Runtime(#[source] io::Error),
    #[error("no --kubeconfig was given: running without an apiserver is not supported yet")]
    Standalone,
    #[error("failed to construct kubelet dependencies: {0}")]
    Api(#[from] ApiSetupError),
    #[error(transparent)]
    Host(#[from] node::host::SwapError),
    #[error(transparent)]
    Tunables(#[from] tunables::TunablesError),
    #[error("failed to prepare the root directory: {0}")]
    RootDir(#[from] volumes::RootDirError),
    #[error("failed to create {path}: {source}")]
    Directory { path: String, source: io::Error },
    #[error("invalid runtime endpoint: {0}")]
    Endpoint(#[from] crate::cri::EndpointError),
    #[error("failed to read the machine: {0}")]
    Machine(#[from] node::MachineError),
    #[error(transparent)]
    Images(#[from] ImagesSetupError),
    #[error("failed to set up cgroups: {0}")]
    Cgroups(#[from] crate::resources::CgroupError),
    #[error("allowedUnsafeSysctls: {0}")]
    Sysctls(#[from] SysctlError),
    #[error("create user namespace manager: {0}")]
    UserNamespaces(#[from] UserNamespaceError),
    #[error("failed to register metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    #[error("failed to start the lease thread: {0}")]
    Lease(#[source] io::Error),
    #[error("failed to run Kubelet server: {0}")]
    Server(#[from] server::ServerError),
    #[error("failed to listen for signals: {0}")]
    Signals(#[source] io::Error),
    #[error("create health checker: {0}")]
    Watchdog(#[from] WatchdogError),
}
