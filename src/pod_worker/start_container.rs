//! Starting one container: image, environment, mounts, config, create, start, postStart hook. In that order, each with its own words for
//! failure (contract P-28, P-33, I-03).

use std::{collections::BTreeSet, net::IpAddr, path::PathBuf, sync::Arc, time::Duration};

use futures::future::join_all;
use tokio::time::Instant;

use super::{
    actions::{Outcome, Progress},
    execute::{ActionContext, forget_container, sandbox_config, user_namespace},
    hooks::{self, HookContext},
    view::WaitingReason,
};
use crate::{
    containers::{self, ContainerInputs, ContainerPolicy, as_map, termination_log},
    cri::{ContainerState, Sandbox, v1},
    events::EventType,
    images::{ImageError, PresentImage},
    logs, network,
    pods::{ContainerKind, ContainerRef, Pod},
    resources::ContainerSize,
    volumes::MountedVolumes,
};

/// A failed start is tried again after this long, unless the reason has a time of its own (contract P-06).
const RETRY_AFTER: Duration = Duration::from_secs(10);
/// After a failed pull the back-off is shown soon, not at its end.
const SHOW_BACKOFF_AFTER: Duration = Duration::from_secs(2);
/// How a runtime begins its message when it cannot mount an image volume.
const IMAGE_VOLUME_MOUNT_FAILED: &str = "ImageVolumeMountFailed";

pub(super) async fn start(context: &ActionContext, name: &str, attempt: u32) -> Outcome {
    let Some(pod) = context.pod.clone() else { return Outcome::Abandoned };
    let (Some(container), Some(sandbox)) = (pod.container(name), context.runtime.latest_sandbox()) else {
        return Outcome::Abandoned;
    };
    let attempt = attempt.max(runs_logged(context, &pod, name).await);
    let start = Start { context, pod: &pod, container, sandbox, attempt };
    match start.run().await {
        Ok(()) => Outcome::Done,
        Err(Stop::Abandoned) => Outcome::Abandoned,
        Err(Stop::NotYet) => Outcome::Failed,
        Err(Stop::Failed { waiting, retry_at }) => Outcome::StartFailed { waiting, retry_at },
    }
}

/// A container that the runtime knows nothing of may have run before: its logs tell, and must not be written over (contract P-23).
async fn runs_logged(context: &ActionContext, pod: &Pod, name: &str) -> u32 {
    if context.runtime.latest(name).is_some() {
        return 0;
    }
    let dir = containers::container_log_directory(&context.parts.settings.pod_logs_dir, pod, name);
    match tokio::task::spawn_blocking(move || logs::runs_logged(&dir)).await {
        Ok(Ok(runs)) => runs,
        Ok(Err(error)) => {
            tracing::warn!(pod.uid = %pod.uid(), container = name, %error, "Reading the container's log directory failed");
            0
        }
        Err(_) => 0,
    }
}

/// The pod's address as hooks see it.
pub(super) fn pod_ip(context: &ActionContext) -> Option<IpAddr> {
    match context.pod.as_ref().is_some_and(Pod::host_network) {
        true => context.node.ips.first().copied(),
        false => context.runtime.latest_sandbox().and_then(|s| s.ips.first().copied()),
    }
}

enum Stop {
    Abandoned,
    /// What stands in the way is about to go: tried again soon, nothing to show.
    NotYet,
    Failed {
        waiting: WaitingReason,
        retry_at: Option<Instant>,
    },
}

struct Start<'a> {
    context: &'a ActionContext,
    pod: &'a Pod,
    container: ContainerRef<'a>,
    sandbox: &'a Sandbox,
    attempt: u32,
}

impl Start<'_> {
    async fn run(&self) -> Result<(), Stop> {
        let refused = |message| self.config_failed("CreateContainerConfigError", message);
        let users = user_namespace(self.context, self.pod).await.map_err(refused)?;
        let sandbox_config = sandbox_config(self.context, self.pod, self.sandbox.attempt, &users).map_err(refused)?;
        let mounted = self.timed("image_volumes", self.image_volumes(&sandbox_config)).await?;
        let image = self.timed("image", self.image(&sandbox_config)).await?;
        let (config, ()) = tokio::try_join!(self.config(&image, &mounted, &users), self.record_resources())?;
        self.remove_never_started().await?;
        let id = self.timed("create", self.create(config, sandbox_config)).await?;
        self.timed("start", self.start(&id)).await?;
        self.link_log(&id).await;
        self.post_start(&id).await
    }

    async fn timed<T>(&self, phase: &'static str, step: impl Future<Output = T>) -> T {
        let clock = &self.context.parts.clock;
        let started = clock.now().mono;
        let out = step.await;
        self.context.parts.metrics.start_phase(phase, clock.now().mono - started);
        out
    }

    async fn image(&self, sandbox_config: &v1::PodSandboxConfig) -> Result<PresentImage, Stop> {
        let ensured = tokio::select! {
            biased;
            () = self.context.cancel.cancelled() => return Err(Stop::Abandoned),
            ensured = self.context.parts.images.ensure(self.pod, self.container, sandbox_config) => ensured,
        };
        ensured.map_err(|error| self.image_failed(error))
    }

    /// The pod's volumes, with the images of those that this container mounts (contract I-13). All are tried before the first failure counts.
    async fn image_volumes(&self, sandbox_config: &v1::PodSandboxConfig) -> Result<Arc<MountedVolumes>, Stop> {
        let mounts = self.container.spec.volume_mounts.iter().flatten();
        let names: BTreeSet<&str> = mounts.map(|mount| mount.name.as_str()).collect();
        let volumes = self.pod.spec().volumes.iter().flatten().filter(|v| names.contains(v.name.as_str()));
        let wanted: Vec<_> = volumes.filter_map(|v| Some((v.name.as_str(), v.image.as_ref()?))).collect();
        if wanted.is_empty() {
            return Ok(Arc::clone(&self.context.mounted));
        }
        let images = &self.context.parts.images;
        let pulls = wanted.iter().map(|(name, source)| images.ensure_volume(self.pod, name, source, sandbox_config));
        let results = tokio::select! {
            biased;
            () = self.context.cancel.cancelled() => return Err(Stop::Abandoned),
            results = join_all(pulls) => results,
        };
        let (mut mounted, mut failed) = ((*self.context.mounted).clone(), None);
        for ((name, _), result) in wanted.into_iter().zip(results) {
            match result {
                Ok(image) => {
                    if let Some(volume) = mounted.get_mut(name) {
                        volume.image = Some(image);
                    }
                }
                Err(error) => {
                    self.event(EventType::Warning, "Failed", format!("Error: {}", error.reason));
                    failed = Some(error);
                }
            }
        }
        failed.map_or_else(|| Ok(Arc::new(mounted)), |error| Err(self.image_failed(error)))
    }

    fn image_failed(&self, error: ImageError) -> Stop {
        let now = self.context.parts.clock.now().mono;
        let pull_failed = !matches!(error.reason, "ImagePullBackOff" | "InvalidImageName" | "ErrImageNeverPull");
        let retry_at = match error.retry_at {
            Some(at) if pull_failed => Some(at.min(now + SHOW_BACKOFF_AFTER)),
            Some(at) => Some(at),
            None => Some(now + RETRY_AFTER),
        };
        Stop::Failed { waiting: waiting(error.reason, error.message), retry_at }
    }

    async fn config(
        &self,
        image: &PresentImage,
        mounted: &MountedVolumes,
        users: &v1::UserNamespace,
    ) -> Result<v1::ContainerConfig, Stop> {
        let parts = &self.context.parts;
        let settings = &parts.settings;
        let pod_ips = self.pod_ips();
        let fail = |e: containers::ConfigError| self.config_failed(e.reason, e.message);
        let env = containers::environment(
            self.pod,
            self.container,
            parts.objects.as_ref(),
            &self.context.node,
            &pod_ips,
            mounted,
        )
        .await
        .map_err(fail)?;
        let mut mounts = parts
            .volumes
            .container_mounts(self.pod, self.container, mounted, &as_map(&env))
            .await
            .map_err(|e| self.config_failed("CreateContainerConfigError", e.message))?;
        let files = OwnFiles {
            pod: self.pod.clone(),
            container: self.container.name().to_owned(),
            root_dir: settings.root_dir.clone(),
            pod_ips: pod_ips.clone(),
            cluster_domain: settings.dns.cluster_domain.clone(),
        };
        let own = tokio::task::spawn_blocking(move || files.write())
            .await
            .unwrap_or_else(|e| Err(e.to_string()))
            .map_err(|message| self.config_failed("CreateContainerConfigError", message))?;
        mounts.extend(own);
        let inputs = ContainerInputs {
            pod: self.pod,
            container: self.container,
            attempt: self.attempt,
            image,
            env: &env,
            mounts: &mounts,
            pod_ips: &pod_ips,
            node: &self.context.node,
            root_dir: &settings.root_dir,
            user_namespace: Some(users),
            cpu_cfs_quota: settings.cpu_cfs_quota,
            cpu_cfs_period_micros: settings.cpu_cfs_period.as_micros() as i64,
        };
        let policy = ContainerPolicy { target_container_id: self.target()?, ..settings.container_policy.clone() };
        containers::container_config_with(&inputs, &policy).map_err(fail)
    }

    /// The container whose processes an ephemeral container sees (contract P-22).
    fn target(&self) -> Result<Option<String>, Stop> {
        let ephemeral = self.container.kind == ContainerKind::Ephemeral;
        let Some(target) = self.pod.ephemeral_target(self.container.name()).filter(|_| ephemeral) else {
            return Ok(None);
        };
        match self.context.runtime.latest(target) {
            Some(container) => Ok(Some(container.id.clone())),
            None => {
                let message = format!("unable to find target container {target}");
                Err(self.config_failed("CreateContainerConfigError", message))
            }
        }
    }

    /// A container of this name that an earlier agent created and never started holds this attempt's name at the runtime.
    async fn remove_never_started(&self) -> Result<(), Stop> {
        let name = self.container.name();
        let left =
            self.context.runtime.containers.iter().filter(|c| c.name == name && c.state == ContainerState::Created);
        for container in left {
            if let Err(error) = forget_container(self.context, &container.id).await {
                tracing::warn!(pod.uid = %self.pod.uid(), container = container.id, %error, "Removing a container that never started failed");
                return Err(Stop::NotYet);
            }
        }
        Ok(())
    }

    /// What the container is made with is in force from here on. A change is on disk before the container is there, or the agent's death
    /// would have it restarted once more.
    async fn record_resources(&self) -> Result<(), Stop> {
        let ledger = &self.context.parts.ledger;
        let own = self.container.spec.resources.as_ref();
        let size = ContainerSize::of(own, self.pod.spec().resources.as_ref());
        let changed = ledger.container_actuated(self.pod.uid(), self.container.name(), size.requirements(own));
        if changed && !ledger.persisted().await {
            let message = "failed to save pod resource information checkpoint".to_owned();
            return Err(self.config_failed("CreateContainerConfigError", message));
        }
        Ok(())
    }

    fn pod_ips(&self) -> Vec<IpAddr> {
        let node = &self.context.node.ips;
        match self.pod.host_network() {
            true => node.clone(),
            false => crate::pod_status::sorted_ips(&self.sandbox.ips, node.first()),
        }
    }

    async fn create(&self, config: v1::ContainerConfig, sandbox: v1::PodSandboxConfig) -> Result<String, Stop> {
        let log = std::path::Path::new(&sandbox.log_directory).join(self.container.name());
        if let Err(error) = tokio::fs::create_dir_all(&log).await {
            return Err(
                self.runtime_failed("CreateContainerError", format!("create container log directory failed: {error}"))
            );
        }
        if self.context.cancel.is_cancelled() {
            return Err(Stop::Abandoned);
        }
        let (runtime, sandbox_id) = (Arc::clone(&self.context.parts.runtime), self.sandbox.id.clone());
        let image_volumes = config.mounts.iter().filter(|mount| mount.image.is_some()).count();
        let made =
            self.context.gated(async move { runtime.create_container(&sandbox_id, config, sandbox).await }).await;
        let made = made.ok_or(Stop::Abandoned)?;
        let unmounted = made.as_ref().is_err_and(|e| e.message.starts_with(IMAGE_VOLUME_MOUNT_FAILED));
        self.context.parts.images.volumes_mounted(image_volumes, !unmounted);
        let id = made.map_err(|e| self.runtime_failed("CreateContainerError", e.message))?;
        self.event(EventType::Normal, "Created", "Container created".into());
        Ok(id)
    }

    async fn start(&self, id: &str) -> Result<(), Stop> {
        if self.context.cancel.is_cancelled() {
            return Err(Stop::Abandoned);
        }
        // Before it runs, or it would be shown as running until the hook is known of.
        if self.container.spec.lifecycle.as_ref().is_some_and(|l| l.post_start.is_some()) {
            let container = self.container.name().to_owned();
            self.context.slot.progress(Progress::PostStart { container, id: id.to_owned() });
        }
        let (runtime, owned) = (Arc::clone(&self.context.parts.runtime), id.to_owned());
        let started = self.context.gated(async move { runtime.start_container(&owned).await }).await;
        started.ok_or(Stop::Abandoned)?.map_err(|e| self.runtime_failed("RunContainerError", e.message))?;
        self.event(EventType::Normal, "Started", "Container started".into());
        Ok(())
    }

    /// The link that log collectors follow: `/var/log/containers/<pod>_<ns>_<container>-<id>.log`.
    async fn link_log(&self, id: &str) {
        let settings = &self.context.parts.settings;
        let name = containers::container_log_link(self.pod, self.container.name(), id);
        let link = settings.container_logs_dir.join(name);
        let log = containers::pod_log_directory(&settings.pod_logs_dir, self.pod)
            .join(containers::container_log_path(self.container.name(), self.attempt));
        let made = tokio::task::spawn_blocking(move || logs::create_link(&link, &log)).await;
        if let Ok(Err(error)) = made {
            tracing::warn!(pod.uid = %self.pod.uid(), container = id, %error, "Linking the container's log failed");
        }
    }

    async fn post_start(&self, id: &str) -> Result<(), Stop> {
        let Some(handler) = self.container.spec.lifecycle.as_ref().and_then(|l| l.post_start.clone()) else {
            return Ok(());
        };
        let hook_context = HookContext {
            pod: self.pod.clone(),
            container: self.container.spec.clone(),
            container_id: id.to_owned(),
            pod_ip: pod_ip(self.context),
            runtime: Arc::clone(&self.context.parts.runtime),
            events: Arc::clone(&self.context.parts.events),
            metrics: Arc::clone(&self.context.parts.metrics),
        };
        let hook = hooks::spawn(handler, hook_context);
        let result = tokio::select! {
            biased;
            () = self.context.cancel.cancelled() => return Err(Stop::Abandoned),
            result = hook => result,
        };
        let message = match result {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => error.to_string(),
            Err(error) => error.to_string(),
        };
        tracing::warn!(pod.uid = %self.pod.uid(), container = id, error = message, "PostStart hook failed");
        self.event(EventType::Warning, "FailedPostStartHook", "PostStartHook failed".into());
        self.kill_after_failed_hook(id).await;
        Err(self.retry_later(waiting("PostStartHookError", message)))
    }

    async fn kill_after_failed_hook(&self, id: &str) {
        let container = super::actions::ContainerToStop {
            id: id.to_owned(),
            name: self.container.name().to_owned(),
            grace: self.pod.termination_grace(),
            hook: true,
            rank: 0,
        };
        super::stop::kill_container(self.context, &container, "FailedPostStartHook").await;
    }

    fn event(&self, kind: EventType, reason: &str, message: String) {
        self.context.container_event(self.container.name(), kind, reason, message);
    }

    fn config_failed(&self, reason: &str, message: String) -> Stop {
        self.event(EventType::Warning, "Failed", format!("Error: {message}"));
        self.retry_later(waiting(reason, message))
    }

    fn runtime_failed(&self, reason: &str, message: String) -> Stop {
        self.event(EventType::Warning, "Failed", format!("Error: {message}"));
        self.retry_later(waiting(reason, message))
    }

    fn retry_later(&self, waiting: WaitingReason) -> Stop {
        let now = self.context.parts.clock.now().mono;
        Stop::Failed { waiting, retry_at: Some(now + RETRY_AFTER) }
    }
}

fn waiting(reason: &str, message: String) -> WaitingReason {
    WaitingReason { reason: reason.to_owned(), message }
}

/// Files of the agent's own that a container mounts: the hosts file and the termination log.
struct OwnFiles {
    pod: Pod,
    container: String,
    root_dir: PathBuf,
    pod_ips: Vec<IpAddr>,
    cluster_domain: String,
}

impl OwnFiles {
    fn write(&self) -> Result<Vec<v1::Mount>, String> {
        let Some(container) = self.pod.container(&self.container) else { return Ok(Vec::new()) };
        let names = network::pod_hostname(&self.pod, &self.cluster_domain).map_err(|e| e.to_string())?;
        let hosts = network::hosts_mount(&self.root_dir, &self.pod, container.spec, &self.pod_ips, &names)
            .map_err(|e| e.to_string())?;
        let log = termination_log::create(&self.root_dir, self.pod.uid(), container.spec).map_err(|e| e.to_string())?;
        Ok(hosts.into_iter().chain(log).collect())
    }
}
