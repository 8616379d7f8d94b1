//! The ports to the runtime. Real: `client`. In tests: `fake`.

use std::time::Duration;

use async_trait::async_trait;
use futures::stream::BoxStream;

use super::{CriError, v1};

pub type ContainerEventStream = BoxStream<'static, Result<v1::ContainerEventResponse, CriError>>;

/// `runtime.v1.RuntimeService`, as far as the agent calls it. Every call has a deadline inside the client
/// (`runtimeRequestTimeout`), except exec, attach and the event stream.
#[async_trait]
pub trait RuntimeService: Send + Sync + 'static {
    async fn version(&self) -> Result<v1::VersionResponse, CriError>;
    async fn status(&self, verbose: bool) -> Result<v1::StatusResponse, CriError>;
    async fn runtime_config(&self) -> Result<v1::RuntimeConfigResponse, CriError>;
    async fn update_runtime_config(&self, config: v1::RuntimeConfig) -> Result<(), CriError>;

    /// Returns the sandbox ID.
    async fn run_pod_sandbox(&self, config: v1::PodSandboxConfig, handler: &str) -> Result<String, CriError>;
    /// Only its return means stopped; it is idempotent, and NotFound counts as done.
    async fn stop_pod_sandbox(&self, sandbox_id: &str) -> Result<(), CriError>;
    async fn remove_pod_sandbox(&self, sandbox_id: &str) -> Result<(), CriError>;
    /// Tells the runtime of a pod's new resources. Most runtimes have not got it; what they answer then counts as done.
    async fn update_pod_sandbox_resources(&self, request: v1::UpdatePodSandboxResourcesRequest)
    -> Result<(), CriError>;
    async fn pod_sandbox_status(&self, sandbox_id: &str) -> Result<v1::PodSandboxStatus, CriError>;
    async fn list_pod_sandbox(&self, filter: Option<v1::PodSandboxFilter>) -> Result<Vec<v1::PodSandbox>, CriError>;

    /// Returns the container ID.
    async fn create_container(
        &self,
        sandbox_id: &str,
        config: v1::ContainerConfig,
        sandbox: v1::PodSandboxConfig,
    ) -> Result<String, CriError>;
    async fn start_container(&self, container_id: &str) -> Result<(), CriError>;
    /// SIGTERM (or the image's stop signal), SIGKILL after `grace`. The call's own deadline is grace + the request timeout.
    async fn stop_container(&self, container_id: &str, grace: Duration) -> Result<(), CriError>;
    async fn remove_container(&self, container_id: &str) -> Result<(), CriError>;
    async fn list_containers(&self, filter: Option<v1::ContainerFilter>) -> Result<Vec<v1::Container>, CriError>;
    async fn container_status(&self, container_id: &str) -> Result<v1::ContainerStatus, CriError>;
    async fn update_container_resources(&self, request: v1::UpdateContainerResourcesRequest) -> Result<(), CriError>;
    async fn reopen_container_log(&self, container_id: &str) -> Result<(), CriError>;

    /// `timeout` zero means none. A non-zero exit is not an error.
    async fn exec_sync(
        &self,
        container_id: &str,
        command: Vec<String>,
        timeout: Duration,
    ) -> Result<v1::ExecSyncResponse, CriError>;
    /// Each returns the URL of the runtime's streaming server.
    async fn exec(&self, request: v1::ExecRequest) -> Result<String, CriError>;
    async fn attach(&self, request: v1::AttachRequest) -> Result<String, CriError>;
    async fn port_forward(&self, request: v1::PortForwardRequest) -> Result<String, CriError>;

    async fn list_container_stats(
        &self,
        filter: Option<v1::ContainerStatsFilter>,
    ) -> Result<Vec<v1::ContainerStats>, CriError>;

    /// Opens `GetContainerEvents`. May not return before the first event (Go servers send no headers before it), so it
    /// is awaited in a task of its own and never given a short deadline.
    async fn container_events(&self) -> Result<ContainerEventStream, CriError>;
}

/// `runtime.v1.ImageService`.
#[async_trait]
pub trait ImageService: Send + Sync + 'static {
    async fn list_images(&self) -> Result<Vec<v1::Image>, CriError>;
    /// `None` when the image is not there.
    async fn image_status(&self, image: v1::ImageSpec) -> Result<Option<v1::Image>, CriError>;
    /// Has no deadline of its own. Returns the image reference (ID or digest).
    async fn pull_image(
        &self,
        image: v1::ImageSpec,
        auth: Option<v1::AuthConfig>,
        sandbox: Option<v1::PodSandboxConfig>,
    ) -> Result<String, CriError>;
    async fn remove_image(&self, image: v1::ImageSpec) -> Result<(), CriError>;
    async fn image_fs_info(&self) -> Result<v1::ImageFsInfoResponse, CriError>;
}
