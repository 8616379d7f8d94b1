//! Both ports over the fake's world.

use std::{collections::HashMap, time::Duration};

use async_trait::async_trait;
use futures::{StreamExt, stream};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Code;

use super::{
    FakeRuntime, lock,
    script::{ImageScript, OnTerm},
    world::{FakeContainer, FakeSandbox, image_id, state_name},
};
use crate::cri::{ContainerEventStream, ContainerState, CriError, ImageService, RuntimeService, v1};

/// A reserved name; given back when the call ends without having used it, also when it is dropped half-way.
struct Reservation<'a> {
    runtime: &'a FakeRuntime,
    name: String,
    id: Result<String, String>,
    used: bool,
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        if self.id.is_ok() && !self.used {
            lock(&self.runtime.shared.world).unreserve(&self.name);
        }
    }
}

impl FakeRuntime {
    fn reserve(&self, name: String, prefix: &str) -> Reservation<'_> {
        let id = lock(&self.shared.world).reserve(&name, prefix);
        Reservation { runtime: self, name, id, used: false }
    }

    /// What a fault or a log entry about this container can be named by.
    fn about_container(&self, id: &str) -> Vec<String> {
        let world = lock(&self.shared.world);
        let known = world.containers.get(id);
        let names = known.map(|c| [c.name.clone(), c.pod_uid.clone(), c.pod_name.clone(), c.sandbox_id.clone()]);
        std::iter::once(id.to_owned()).chain(names.into_iter().flatten()).collect()
    }

    /// SIGTERM now, SIGKILL after the grace, until the process has ended.
    async fn stop(self, id: String, on_term: OnTerm, exited: CancellationToken, grace: Duration) {
        let by_itself = match on_term {
            OnTerm::Exits { after, code } if !grace.is_zero() => Some((after, code)).filter(|_| after <= grace),
            _ => None,
        };
        let (wait, code) = by_itself.unwrap_or((grace, 137));
        tokio::select! {
            biased;
            () = exited.cancelled() => {}
            () = tokio::time::sleep(wait) => self.end(&id, code, None),
        }
    }

    fn about_sandbox(&self, id: &str) -> Vec<String> {
        let world = lock(&self.shared.world);
        let names = world.sandboxes.get(id).map(|s| [s.uid().to_owned(), s.pod_name().to_owned()]);
        std::iter::once(id.to_owned()).chain(names.into_iter().flatten()).collect()
    }
}

fn about_pod(metadata: &v1::PodSandboxMetadata) -> Vec<String> {
    vec![metadata.uid.clone(), metadata.name.clone()]
}

fn selected(selector: &HashMap<String, String>, labels: &HashMap<String, String>) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

fn done<T>(answer: Result<T, CriError>) -> Result<(), CriError> {
    match answer {
        Err(error) if !error.is_not_found() => Err(error),
        _ => Ok(()),
    }
}

#[async_trait]
impl RuntimeService for FakeRuntime {
    async fn version(&self) -> Result<v1::VersionResponse, CriError> {
        let version = v1::VersionResponse {
            version: "0.1.0".into(),
            runtime_name: "containerd".into(),
            runtime_version: "v2.3.7".into(),
            runtime_api_version: "v1".into(),
        };
        self.call("Version", Vec::new(), |_, _| Ok(version)).await
    }

    async fn status(&self, _verbose: bool) -> Result<v1::StatusResponse, CriError> {
        let condition = |kind: &str, status, reason: &str| v1::RuntimeCondition {
            r#type: kind.into(),
            status,
            reason: if status { String::new() } else { reason.into() },
            message: String::new(),
        };
        self.call("Status", Vec::new(), |world, _| {
            let (runtime, network) = world.conditions;
            let conditions = vec![
                condition("RuntimeReady", runtime, "RuntimeNotReady"),
                condition("NetworkReady", network, "NetworkPluginNotReady"),
            ];
            let handlers = vec![v1::RuntimeHandler::default()];
            let status = Some(v1::RuntimeStatus { conditions });
            Ok(v1::StatusResponse {
                status,
                runtime_handlers: handlers,
                features: world.features,
                ..Default::default()
            })
        })
        .await
    }

    async fn runtime_config(&self) -> Result<v1::RuntimeConfigResponse, CriError> {
        let linux = v1::LinuxRuntimeConfiguration { cgroup_driver: v1::CgroupDriver::Systemd as i32 };
        self.call("RuntimeConfig", Vec::new(), |_, _| Ok(v1::RuntimeConfigResponse { linux: Some(linux) })).await
    }

    async fn update_runtime_config(&self, config: v1::RuntimeConfig) -> Result<(), CriError> {
        let cidr = config.network_config.map(|n| n.pod_cidr).unwrap_or_default();
        self.call("UpdateRuntimeConfig", vec![cidr], |_, _| Ok(())).await
    }

    async fn run_pod_sandbox(&self, config: v1::PodSandboxConfig, handler: &str) -> Result<String, CriError> {
        const RPC: &str = "RunPodSandbox";
        let m = config.metadata.clone().unwrap_or_default();
        let about = about_pod(&m);
        let name = format!("{}_{}_{}_{}", m.name, m.namespace, m.uid, m.attempt);
        let mut reservation = self.reserve(name.clone(), "sandbox-");
        let reserved = reservation.id.clone();
        let used = &mut reservation.used;
        let handler = handler.to_owned();
        self.call(RPC, about, move |world, now| {
            let failed =
                |why| CriError::new(RPC, Code::Unknown, format!("failed to reserve sandbox name {name:?}: {why}"));
            let id = reserved.map_err(failed)?;
            *used = true;
            world.run_sandbox(id.clone(), name, config, handler, now);
            Ok(id)
        })
        .await
    }

    async fn stop_pod_sandbox(&self, sandbox_id: &str) -> Result<(), CriError> {
        self.call("StopPodSandbox", self.about_sandbox(sandbox_id), |world, now| {
            world.stop_sandbox(sandbox_id, now);
            Ok(())
        })
        .await
    }

    async fn remove_pod_sandbox(&self, sandbox_id: &str) -> Result<(), CriError> {
        self.call("RemovePodSandbox", self.about_sandbox(sandbox_id), |world, now| {
            world.remove_sandbox(sandbox_id, now);
            Ok(())
        })
        .await
    }

    async fn update_pod_sandbox_resources(
        &self,
        request: v1::UpdatePodSandboxResourcesRequest,
    ) -> Result<(), CriError> {
        const RPC: &str = "UpdatePodSandboxResources";
        let id = request.pod_sandbox_id;
        self.call(RPC, self.about_sandbox(&id), |world, _| world.sandbox(RPC, &id).map(|_| ())).await
    }

    async fn pod_sandbox_status(&self, sandbox_id: &str) -> Result<v1::PodSandboxStatus, CriError> {
        const RPC: &str = "PodSandboxStatus";
        self.call(RPC, self.about_sandbox(sandbox_id), |world, _| Ok(world.sandbox(RPC, sandbox_id)?.status())).await
    }

    async fn list_pod_sandbox(&self, filter: Option<v1::PodSandboxFilter>) -> Result<Vec<v1::PodSandbox>, CriError> {
        let about = filter.iter().flat_map(|f| f.label_selector.values().cloned()).collect();
        let filter = filter.unwrap_or_default();
        self.call("ListPodSandbox", about, move |world, _| {
            let wanted = |s: &&FakeSandbox| {
                (filter.id.is_empty() || filter.id == s.id)
                    && filter.state.is_none_or(|state| state.state == s.state())
                    && selected(&filter.label_selector, &s.config.labels)
            };
            Ok(world.sandboxes.values().filter(wanted).map(FakeSandbox::listed).collect())
        })
        .await
    }

    async fn create_container(
        &self,
        sandbox_id: &str,
        config: v1::ContainerConfig,
        sandbox: v1::PodSandboxConfig,
    ) -> Result<String, CriError> {
        const RPC: &str = "CreateContainer";
        let (m, pod) = (config.metadata.clone().unwrap_or_default(), sandbox.metadata.unwrap_or_default());
        let about = [about_pod(&pod), vec![m.name.clone(), sandbox_id.to_owned()]].concat();
        let name = format!("{}_{}_{}_{}_{}", m.name, pod.name, pod.namespace, pod.uid, m.attempt);
        let mut reservation = self.reserve(name.clone(), "container-");
        let reserved = reservation.id.clone();
        let used = &mut reservation.used;
        self.call(RPC, about, move |world, now| {
            let failed = |why| {
                let hint = "check if another CreateContainer request is in progress";
                CriError::new(RPC, Code::Unknown, format!("failed to reserve container name {name:?}; {hint}: {why}"))
            };
            let id = reserved.map_err(failed)?;
            world.create_container(id.clone(), name, sandbox_id, config, now)?;
            *used = true;
            Ok(id)
        })
        .await
    }

    async fn start_container(&self, container_id: &str) -> Result<(), CriError> {
        let runtime = self.clone();
        self.call("StartContainer", self.about_container(container_id), move |world, now| {
            let (exited, script) = world.start_container(container_id, now)?;
            runtime.animate(container_id.to_owned(), exited, script.run);
            Ok(())
        })
        .await
    }

    async fn stop_container(&self, container_id: &str, grace: Duration) -> Result<(), CriError> {
        const RPC: &str = "StopContainer";
        // The signals are sent by a task: an answer that gets lost does not take them back, a dropped call does.
        let dropped = CancellationToken::new();
        let guard = dropped.clone().drop_guard();
        let runtime = self.clone();
        let begun = self.call(RPC, self.about_container(container_id), |world, _| {
            let running = world.containers.get(container_id).filter(|c| c.state == ContainerState::Running);
            Ok(running.map(|container| {
                let stopping =
                    runtime.stop(container.id.clone(), container.script.on_term, container.exited.clone(), grace);
                tokio::spawn(async move { dropped.run_until_cancelled(stopping).await });
                container.exited.clone()
            }))
        });
        match begun.await {
            Ok(Some(exited)) => exited.cancelled().await,
            Ok(None) => {}
            Err(error) => {
                guard.disarm();
                return Err(error);
            }
        }
        Ok(())
    }

    async fn remove_container(&self, container_id: &str) -> Result<(), CriError> {
        self.call("RemoveContainer", self.about_container(container_id), |world, now| {
            world.remove_container(container_id, now);
            Ok(())
        })
        .await
    }

    async fn list_containers(&self, filter: Option<v1::ContainerFilter>) -> Result<Vec<v1::Container>, CriError> {
        let about = filter.iter().flat_map(|f| f.label_selector.values().cloned()).collect();
        let filter = filter.unwrap_or_default();
        self.call("ListContainers", about, move |world, _| {
            let wanted = |c: &&FakeContainer| {
                (filter.id.is_empty() || filter.id == c.id)
                    && (filter.pod_sandbox_id.is_empty() || filter.pod_sandbox_id == c.sandbox_id)
                    && filter.state.is_none_or(|state| state.state == c.state())
                    && selected(&filter.label_selector, &c.config.labels)
            };
            Ok(world.containers.values().filter(wanted).map(FakeContainer::listed).collect())
        })
        .await
    }

    async fn container_status(&self, container_id: &str) -> Result<v1::ContainerStatus, CriError> {
        const RPC: &str = "ContainerStatus";
        self.call(RPC, self.about_container(container_id), |world, _| Ok(world.container(RPC, container_id)?.status()))
            .await
    }

    async fn update_container_resources(&self, request: v1::UpdateContainerResourcesRequest) -> Result<(), CriError> {
        const RPC: &str = "UpdateContainerResources";
        let id = request.container_id.clone();
        self.call(RPC, self.about_container(&id), |world, _| {
            world.container(RPC, &request.container_id)?;
            if let Some(container) = world.containers.get_mut(&request.container_id) {
                container.config.linux.get_or_insert_default().resources = request.linux;
            }
            Ok(())
        })
        .await
    }

    async fn reopen_container_log(&self, container_id: &str) -> Result<(), CriError> {
        const RPC: &str = "ReopenContainerLog";
        self.call(RPC, self.about_container(container_id), |world, _| match world.container(RPC, container_id)?.state {
            ContainerState::Running => Ok(()),
            _ => Err(CriError::new(RPC, Code::Unknown, "container is not running")),
        })
        .await
    }

    async fn exec_sync(
        &self,
        container_id: &str,
        _command: Vec<String>,
        timeout: Duration,
    ) -> Result<v1::ExecSyncResponse, CriError> {
        const RPC: &str = "ExecSync";
        let script = self.call(RPC, self.about_container(container_id), |world, _| {
            let container = world.container(RPC, container_id)?;
            match container.state {
                ContainerState::Running => Ok(world.exec_scripts.get(&container.name).cloned().unwrap_or_default()),
                state => Err(CriError::new(RPC, Code::Unknown, format!("container is in {} state", state_name(state)))),
            }
        });
        let script = script.await?;
        if !timeout.is_zero() && script.after > timeout {
            tokio::time::sleep(timeout).await;
            let message =
                format!("failed to exec in container: timeout {timeout:?} exceeded: context deadline exceeded");
            return Err(CriError::new(RPC, Code::DeadlineExceeded, message));
        }
        tokio::time::sleep(script.after).await;
        Ok(v1::ExecSyncResponse { stdout: script.stdout, stderr: script.stderr, exit_code: script.exit_code })
    }

    async fn exec(&self, request: v1::ExecRequest) -> Result<String, CriError> {
        const RPC: &str = "Exec";
        let id = request.container_id;
        self.call(RPC, self.about_container(&id), |world, _| {
            world.container(RPC, &id).map(|c| format!("{}/exec/{}", world.streaming_url, c.id))
        })
        .await
    }

    async fn attach(&self, request: v1::AttachRequest) -> Result<String, CriError> {
        const RPC: &str = "Attach";
        let id = request.container_id;
        self.call(RPC, self.about_container(&id), |world, _| {
            world.container(RPC, &id).map(|c| format!("http://127.0.0.1:1/attach/{}", c.id))
        })
        .await
    }

    async fn port_forward(&self, request: v1::PortForwardRequest) -> Result<String, CriError> {
        const RPC: &str = "PortForward";
        let id = request.pod_sandbox_id;
        self.call(RPC, self.about_sandbox(&id), |world, _| {
            world.sandbox(RPC, &id).map(|s| format!("http://127.0.0.1:1/portforward/{}", s.id))
        })
        .await
    }

    async fn list_container_stats(
        &self,
        filter: Option<v1::ContainerStatsFilter>,
    ) -> Result<Vec<v1::ContainerStats>, CriError> {
        let filter = filter.unwrap_or_default();
        self.call("ListContainerStats", Vec::new(), move |world, _| {
            let all = world.containers.values().filter(|c| c.state == ContainerState::Running);
            let wanted = all.filter(|c| {
                (filter.id.is_empty() || filter.id == c.id)
                    && (filter.pod_sandbox_id.is_empty() || filter.pod_sandbox_id == c.sandbox_id)
                    && selected(&filter.label_selector, &c.config.labels)
            });
            let stats = wanted.map(|c| {
                let attributes = v1::ContainerAttributes {
                    id: c.id.clone(),
                    metadata: c.config.metadata.clone(),
                    labels: c.config.labels.clone(),
                    annotations: c.config.annotations.clone(),
                };
                let used = world.memory_use.get(&c.name).copied().unwrap_or(1 << 20);
                let usage_bytes = Some(v1::UInt64Value { value: used });
                let memory = Some(v1::MemoryUsage { usage_bytes, ..Default::default() });
                v1::ContainerStats { attributes: Some(attributes), memory, ..Default::default() }
            });
            Ok(stats.collect())
        })
        .await
    }

    /// As a Go server: no answer before the first event.
    async fn container_events(&self) -> Result<ContainerEventStream, CriError> {
        const RPC: &str = "GetContainerEvents";
        let mut receive = self.call(RPC, Vec::new(), |_, _| Ok(())).await.and_then(|()| self.subscribe())?;
        let closed = || CriError::new(RPC, Code::Unavailable, "error reading from server: EOF");
        let first = receive.recv().await.unwrap_or_else(|| Err(closed()))?;
        Ok(stream::iter([Ok(first)]).chain(UnboundedReceiverStream::new(receive)).boxed())
    }
}

#[async_trait]
impl ImageService for FakeRuntime {
    async fn list_images(&self) -> Result<Vec<v1::Image>, CriError> {
        self.call("ListImages", Vec::new(), |world, _| Ok(world.images.iter().map(|name| world.image(name)).collect()))
            .await
    }

    async fn image_status(&self, image: v1::ImageSpec) -> Result<Option<v1::Image>, CriError> {
        let name = image.image;
        self.call("ImageStatus", vec![name.clone()], |world, _| {
            let held = world.images.iter().find(|held| **held == name || image_id(held) == name);
            Ok(held.map(|held| world.image(held)))
        })
        .await
    }

    async fn pull_image(
        &self,
        image: v1::ImageSpec,
        _auth: Option<v1::AuthConfig>,
        _sandbox: Option<v1::PodSandboxConfig>,
    ) -> Result<String, CriError> {
        const RPC: &str = "PullImage";
        let name = image.image;
        let script = lock(&self.shared.world).image_scripts.get(&name).cloned().unwrap_or(ImageScript::Present);
        let work = if let ImageScript::Pullable { after } = script { after } else { Duration::ZERO };
        self.call_taking(RPC, vec![name.clone()], work, |world, _| {
            if let ImageScript::Fails { code, message } = script {
                let error = CriError::new(RPC, code, message);
                return Err(if code == Code::Unknown { error.bare() } else { error });
            }
            world.images.insert(name.clone());
            Ok(image_id(&name))
        })
        .await
    }

    async fn remove_image(&self, image: v1::ImageSpec) -> Result<(), CriError> {
        let name = image.image;
        done(
            self.call("RemoveImage", vec![name.clone()], |world, _| {
                world.images.retain(|held| *held != name && image_id(held) != name);
                Ok(())
            })
            .await,
        )
    }

    async fn image_fs_info(&self) -> Result<v1::ImageFsInfoResponse, CriError> {
        self.call("ImageFsInfo", Vec::new(), |world, now| {
            let usage = v1::FilesystemUsage {
                timestamp: i64::try_from(now.as_nanosecond()).unwrap_or_default(),
                fs_id: Some(v1::FilesystemIdentifier { mountpoint: "/var/lib/containerd".into() }),
                used_bytes: Some(v1::UInt64Value { value: (world.images.len() as u64) << 20 }),
                inodes_used: Some(v1::UInt64Value { value: world.images.len() as u64 }),
            };
            Ok(v1::ImageFsInfoResponse { image_filesystems: vec![usage], container_filesystems: Vec::new() })
        })
        .await
    }
}
