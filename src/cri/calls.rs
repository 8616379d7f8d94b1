//! The two ports, call by call, over [`CriClient`]: request, deadline, and what counts as an unusable answer.

use std::time::Duration;

use async_trait::async_trait;
use tonic::{Code, Request};

use super::{
    ContainerEventStream, CriError, ImageService, RuntimeService,
    client::{CriClient, Rpc},
    v1,
};

/// `call!(self.runtime, start_container, "StartContainer", "start_container", deadline, message)`
macro_rules! call {
    ($self:ident.$service:ident, $method:ident, $name:literal, $operation:literal, $deadline:expr, $message:expr) => {{
        let deadline: Option<Duration> = $deadline;
        let mut request = Request::new($message);
        if let Some(limit) = deadline {
            request.set_timeout(limit);
        }
        let mut client = $self.$service.client.clone();
        let rpc = Rpc { name: $name, operation: $operation };
        $self.measured(rpc, &$self.$service.socket, deadline, client.$method(request)).await
    }};
}

/// Stopping and removing what is not there is done.
fn gone_is_done<T>(answer: Result<T, CriError>) -> Result<(), CriError> {
    match answer {
        Err(error) if !error.is_not_found() => Err(error),
        _ => Ok(()),
    }
}

fn url(rpc: &'static str, url: String) -> Result<String, CriError> {
    if url.is_empty() { Err(CriError::malformed(rpc, "URL is not set")) } else { Ok(url) }
}

/// The fields that upstream's handshake insists on.
fn checked_version(version: v1::VersionResponse) -> Result<v1::VersionResponse, CriError> {
    let fields = [
        ("Version", &version.version),
        ("RuntimeName", &version.runtime_name),
        ("RuntimeApiVersion", &version.runtime_api_version),
        ("RuntimeVersion", &version.runtime_version),
    ];
    let missing: Vec<_> = fields.iter().filter(|(_, value)| value.is_empty()).map(|(name, _)| *name).collect();
    if missing.is_empty() {
        return Ok(version);
    }
    let message = format!("not all fields are set in VersionResponse (missing {})", missing.join(", "));
    Err(CriError::malformed("Version", message))
}

#[async_trait]
impl RuntimeService for CriClient {
    async fn version(&self) -> Result<v1::VersionResponse, CriError> {
        // Upstream's constant; no runtime looks at it.
        let message = v1::VersionRequest { version: "0.1.0".to_owned() };
        checked_version(call!(self.runtime, version, "Version", "version", Some(self.timeout), message)?)
    }

    async fn status(&self, verbose: bool) -> Result<v1::StatusResponse, CriError> {
        let message = v1::StatusRequest { verbose };
        let answer = call!(self.runtime, status, "Status", "status", Some(self.timeout), message)?;
        if answer.status.as_ref().is_none_or(|s| s.conditions.len() < 2) {
            return Err(CriError::malformed("Status", "RuntimeReady or NetworkReady condition are not set"));
        }
        Ok(answer)
    }

    async fn runtime_config(&self) -> Result<v1::RuntimeConfigResponse, CriError> {
        let message = v1::RuntimeConfigRequest {};
        call!(self.runtime, runtime_config, "RuntimeConfig", "runtime_config", Some(self.timeout), message)
    }

    async fn update_runtime_config(&self, config: v1::RuntimeConfig) -> Result<(), CriError> {
        let message = v1::UpdateRuntimeConfigRequest { runtime_config: Some(config) };
        let deadline = Some(self.timeout);
        call!(self.runtime, update_runtime_config, "UpdateRuntimeConfig", "update_runtime_config", deadline, message)?;
        Ok(())
    }

    async fn run_pod_sandbox(&self, config: v1::PodSandboxConfig, handler: &str) -> Result<String, CriError> {
        let name = config.metadata.as_ref().map(|m| m.name.clone()).unwrap_or_default();
        let message = v1::RunPodSandboxRequest { config: Some(config), runtime_handler: handler.to_owned() };
        let deadline = Some(self.timeout * 2);
        let answer = call!(self.runtime, run_pod_sandbox, "RunPodSandbox", "run_podsandbox", deadline, message)?;
        if answer.pod_sandbox_id.is_empty() {
            return Err(CriError::malformed("RunPodSandbox", format!("PodSandboxId is not set for sandbox {name:?}")));
        }
        Ok(answer.pod_sandbox_id)
    }

    async fn stop_pod_sandbox(&self, sandbox_id: &str) -> Result<(), CriError> {
        let message = v1::StopPodSandboxRequest { pod_sandbox_id: sandbox_id.to_owned() };
        gone_is_done(call!(
            self.runtime,
            stop_pod_sandbox,
            "StopPodSandbox",
            "stop_podsandbox",
            Some(self.timeout),
            message
        ))
    }

    async fn remove_pod_sandbox(&self, sandbox_id: &str) -> Result<(), CriError> {
        let message = v1::RemovePodSandboxRequest { pod_sandbox_id: sandbox_id.to_owned() };
        let deadline = Some(self.timeout);
        gone_is_done(call!(
            self.runtime,
            remove_pod_sandbox,
            "RemovePodSandbox",
            "remove_podsandbox",
            deadline,
            message
        ))
    }

    async fn update_pod_sandbox_resources(
        &self,
        request: v1::UpdatePodSandboxResourcesRequest,
    ) -> Result<(), CriError> {
        let deadline = Some(self.timeout);
        let answer = call!(
            self.runtime,
            update_pod_sandbox_resources,
            "UpdatePodSandboxResources",
            "update_podsandbox_resources",
            deadline,
            request
        );
        match answer {
            // containerd before 2.3 says it with code Unknown.
            Err(error) if error.code != Code::Unimplemented && !error.message.contains("not implemented") => Err(error),
            _ => Ok(()),
        }
    }

    async fn pod_sandbox_status(&self, sandbox_id: &str) -> Result<v1::PodSandboxStatus, CriError> {
        const NAME: &str = "PodSandboxStatus";
        let message = v1::PodSandboxStatusRequest { pod_sandbox_id: sandbox_id.to_owned(), verbose: false };
        let deadline = Some(self.timeout);
        let answer =
            call!(self.runtime, pod_sandbox_status, "PodSandboxStatus", "podsandbox_status", deadline, message)?;
        let status = answer.status.ok_or_else(|| CriError::malformed(NAME, "status is not set"))?;
        if status.id.is_empty() {
            return Err(CriError::malformed(NAME, "status.Id is not set"));
        }
        if status.metadata.is_none() {
            return Err(CriError::malformed(NAME, "status.Metadata is not set"));
        }
        Ok(status)
    }

    async fn list_pod_sandbox(&self, filter: Option<v1::PodSandboxFilter>) -> Result<Vec<v1::PodSandbox>, CriError> {
        let message = v1::ListPodSandboxRequest { filter };
        let deadline = Some(self.timeout);
        Ok(call!(self.runtime, list_pod_sandbox, "ListPodSandbox", "list_podsandbox", deadline, message)?.items)
    }

    async fn create_container(
        &self,
        sandbox_id: &str,
        config: v1::ContainerConfig,
        sandbox: v1::PodSandboxConfig,
    ) -> Result<String, CriError> {
        let name = config.metadata.as_ref().map(|m| m.name.clone()).unwrap_or_default();
        let message = v1::CreateContainerRequest {
            pod_sandbox_id: sandbox_id.to_owned(),
            config: Some(config),
            sandbox_config: Some(sandbox),
        };
        let deadline = Some(self.timeout);
        let answer = call!(self.runtime, create_container, "CreateContainer", "create_container", deadline, message)?;
        if answer.container_id.is_empty() {
            return Err(CriError::malformed(
                "CreateContainer",
                format!("ContainerId is not set for container {name:?}"),
            ));
        }
        Ok(answer.container_id)
    }

    async fn start_container(&self, container_id: &str) -> Result<(), CriError> {
        let message = v1::StartContainerRequest { container_id: container_id.to_owned() };
        call!(self.runtime, start_container, "StartContainer", "start_container", Some(self.timeout), message)?;
        Ok(())
    }

    async fn stop_container(&self, container_id: &str, grace: Duration) -> Result<(), CriError> {
        // Whole seconds on the wire; rounded up, so that a pod never gets less than it was promised.
        let seconds = i64::try_from(grace.as_secs() + u64::from(grace.subsec_nanos() > 0)).unwrap_or(i64::MAX);
        let message = v1::StopContainerRequest { container_id: container_id.to_owned(), timeout: seconds };
        let deadline = Some(grace.saturating_add(self.timeout));
        gone_is_done(call!(self.runtime, stop_container, "StopContainer", "stop_container", deadline, message))
    }

    async fn remove_container(&self, container_id: &str) -> Result<(), CriError> {
        let message = v1::RemoveContainerRequest { container_id: container_id.to_owned() };
        gone_is_done(call!(
            self.runtime,
            remove_container,
            "RemoveContainer",
            "remove_container",
            Some(self.timeout),
            message
        ))
    }

    async fn list_containers(&self, filter: Option<v1::ContainerFilter>) -> Result<Vec<v1::Container>, CriError> {
        let message = v1::ListContainersRequest { filter };
        let deadline = Some(self.timeout);
        Ok(call!(self.runtime, list_containers, "ListContainers", "list_containers", deadline, message)?.containers)
    }

    async fn container_status(&self, container_id: &str) -> Result<v1::ContainerStatus, CriError> {
        const NAME: &str = "ContainerStatus";
        let message = v1::ContainerStatusRequest { container_id: container_id.to_owned(), verbose: false };
        let deadline = Some(self.timeout);
        let answer = call!(self.runtime, container_status, "ContainerStatus", "container_status", deadline, message)?;
        let status = answer.status.ok_or_else(|| CriError::malformed(NAME, "container status is nil"))?;
        let missing = [
            ("Id", status.id.is_empty()),
            ("Metadata", status.metadata.is_none()),
            ("CreatedAt", status.created_at == 0),
            ("Image", status.image.is_none()),
        ];
        match missing.iter().find(|(_, missing)| *missing) {
            Some((field, _)) => Err(CriError::malformed(NAME, format!("status.{field} is not set"))),
            None => Ok(status),
        }
    }

    async fn update_container_resources(&self, request: v1::UpdateContainerResourcesRequest) -> Result<(), CriError> {
        let deadline = Some(self.timeout);
        call!(
            self.runtime,
            update_container_resources,
            "UpdateContainerResources",
            "update_container",
            deadline,
            request
        )?;
        Ok(())
    }

    async fn reopen_container_log(&self, container_id: &str) -> Result<(), CriError> {
        let message = v1::ReopenContainerLogRequest { container_id: container_id.to_owned() };
        let deadline = Some(self.timeout);
        call!(self.runtime, reopen_container_log, "ReopenContainerLog", "reopen_container_log", deadline, message)?;
        Ok(())
    }

    async fn exec_sync(
        &self,
        container_id: &str,
        command: Vec<String>,
        timeout: Duration,
    ) -> Result<v1::ExecSyncResponse, CriError> {
        let message = v1::ExecSyncRequest {
            container_id: container_id.to_owned(),
            cmd: command,
            timeout: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
        };
        // The request timeout on top leaves the runtime time to clean up after its own timeout.
        let deadline = (!timeout.is_zero()).then(|| timeout.saturating_add(self.timeout));
        call!(self.runtime, exec_sync, "ExecSync", "exec_sync", deadline, message)
    }

    async fn exec(&self, request: v1::ExecRequest) -> Result<String, CriError> {
        url("Exec", call!(self.runtime, exec, "Exec", "exec", Some(self.timeout), request)?.url)
    }

    async fn attach(&self, request: v1::AttachRequest) -> Result<String, CriError> {
        url("Attach", call!(self.runtime, attach, "Attach", "attach", Some(self.timeout), request)?.url)
    }

    async fn port_forward(&self, request: v1::PortForwardRequest) -> Result<String, CriError> {
        let deadline = Some(self.timeout);
        url("PortForward", call!(self.runtime, port_forward, "PortForward", "port_forward", deadline, request)?.url)
    }

    async fn list_container_stats(
        &self,
        filter: Option<v1::ContainerStatsFilter>,
    ) -> Result<Vec<v1::ContainerStats>, CriError> {
        let message = v1::ListContainerStatsRequest { filter };
        let deadline = Some(self.timeout);
        Ok(call!(self.runtime, list_container_stats, "ListContainerStats", "list_container_stats", deadline, message)?
            .stats)
    }

    async fn container_events(&self) -> Result<ContainerEventStream, CriError> {
        self.open_events().await
    }
}

#[async_trait]
impl ImageService for CriClient {
    async fn list_images(&self) -> Result<Vec<v1::Image>, CriError> {
        let message = v1::ListImagesRequest { filter: None };
        Ok(call!(self.images, list_images, "ListImages", "list_images", Some(self.timeout), message)?.images)
    }

    async fn image_status(&self, image: v1::ImageSpec) -> Result<Option<v1::Image>, CriError> {
        let name = image.image.clone();
        let message = v1::ImageStatusRequest { image: Some(image), verbose: false };
        let answer = call!(self.images, image_status, "ImageStatus", "image_status", Some(self.timeout), message)?;
        match answer.image {
            Some(image) if image.id.is_empty() || image.size == 0 => {
                Err(CriError::malformed("ImageStatus", format!("Id or size of image {name:?} is not set")))
            }
            found => Ok(found),
        }
    }

    async fn pull_image(
        &self,
        image: v1::ImageSpec,
        auth: Option<v1::AuthConfig>,
        sandbox: Option<v1::PodSandboxConfig>,
    ) -> Result<String, CriError> {
        let name = image.image.clone();
        let message = v1::PullImageRequest { image: Some(image), auth, sandbox_config: sandbox };
        let answer = call!(self.images, pull_image, "PullImage", "pull_image", None, message)
            .map_err(|error| if error.code == Code::Unknown { error.bare() } else { error })?;
        if answer.image_ref.is_empty() {
            return Err(CriError::malformed("PullImage", format!("imageRef of image {name:?} is not set")));
        }
        Ok(answer.image_ref)
    }

    async fn remove_image(&self, image: v1::ImageSpec) -> Result<(), CriError> {
        let message = v1::RemoveImageRequest { image: Some(image) };
        gone_is_done(call!(self.images, remove_image, "RemoveImage", "remove_image", Some(self.timeout), message))
    }

    async fn image_fs_info(&self) -> Result<v1::ImageFsInfoResponse, CriError> {
        let message = v1::ImageFsInfoRequest {};
        call!(self.images, image_fs_info, "ImageFsInfo", "image_fs_info", Some(self.timeout), message)
    }
}
