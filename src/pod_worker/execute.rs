//! Carries out actions. Each runs in a task of its own, reads the pod's runtime again when it touched it, and reports its end.
//!
//! Calls that change something at the runtime run on the mutation tracker: giving up an action stops the waiting, never the call, because a
//! cancelled call leaves reserved names behind in containerd.

use std::{
    future::Future,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio_util::sync::CancellationToken;

use super::{
    actions::{Action, ContainerToReset, ContainerToStop, Ended, Outcome},
    registry::{Slot, WorkerParts},
    resize_action, start_container,
    start_gate::Order,
    stop,
};
use crate::{
    containers::{
        self, ContainerAnnotations, SandboxInputs,
        termination_log::{self, Exit},
    },
    cri::{Container, ContainerState, CriError, PodRuntime, Sandbox, to_its_end, v1},
    events::{EventType, Regarding},
    logs,
    network::{self, DnsWarning},
    node::NodeFacts,
    pods::{Pod, PodUid},
    resources::resize_plan,
    user_namespaces::UserNamespaces,
    volumes::MountedVolumes,
};

const FIRST_REFRESH: Duration = Duration::from_secs(60);

/// What an action acts on and with.
#[derive(Clone)]
pub(super) struct ActionContext {
    pub parts: Arc<WorkerParts>,
    pub uid: PodUid,
    /// `None` only for a pod that is known to the runtime or the disk alone.
    pub pod: Option<Pod>,
    pub runtime: Arc<PodRuntime>,
    pub mounted: Arc<MountedVolumes>,
    pub node: Arc<NodeFacts>,
    pub slot: Arc<Slot>,
    /// Cancelled when the worker has no use for the outcome any more.
    pub cancel: CancellationToken,
}

impl ActionContext {
    pub(super) fn event(&self, kind: EventType, reason: &str, message: String) {
        if let Some(pod) = &self.pod {
            self.parts.events.event(Regarding::Pod(pod.clone()), kind, reason, message);
        }
    }

    pub(super) fn container_event(&self, name: &str, kind: EventType, reason: &str, message: String) {
        if let Some(pod) = &self.pod
            && let Some(container) = pod.container(name)
        {
            self.parts.events.event(Regarding::container(pod, container), kind, reason, message);
        }
    }

    /// A call that changes the runtime.
    pub(super) async fn mutate<T: Send + 'static>(
        &self,
        call: impl Future<Output = Result<T, CriError>> + Send + 'static,
    ) -> Result<T, CriError> {
        to_its_end(&self.parts.mutations, call).await
    }

    pub(super) fn order(&self) -> Order {
        let priority = self.pod.as_ref().and_then(|p| p.spec().priority).unwrap_or(0);
        Order::new(self.runtime.latest_sandbox().map(|s| s.created_at), priority)
    }

    /// A critical host-network pod passes the gate by: it may be what sandboxes wait for (a CNI agent).
    pub(super) fn passes_gate(&self) -> bool {
        self.pod.as_ref().is_some_and(|p| p.host_network() && p.spec().priority.unwrap_or(0) >= 2_000_000_000)
    }

    /// A mutating call under the start gate. `None`: given up before its turn came, so the call was never made.
    pub(super) async fn gated<T: Send + 'static>(
        &self,
        call: impl Future<Output = Result<T, CriError>> + Send + 'static,
    ) -> Option<Result<T, CriError>> {
        if self.passes_gate() {
            return Some(self.mutate(call).await);
        }
        let begun = AtomicBool::new(false);
        let turn = self.parts.gate.run(self.order(), async {
            begun.store(true, Ordering::Relaxed);
            self.mutate(call).await
        });
        let given_up = async {
            self.cancel.cancelled().await;
            // What the runtime was asked for is waited for: its outcome must be seen before the pod is called stopped.
            if begun.load(Ordering::Relaxed) {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            biased;
            () = given_up => None,
            made = turn => Some(made),
        }
    }
}

/// Carries out one action and reports its end.
pub(super) async fn run(context: ActionContext, action: Action) {
    let started = context.parts.clock.now().mono;
    let outcome = perform(&context, &action).await;
    let touched =
        !matches!(action, Action::CreateCgroup | Action::MountVolumes | Action::RefreshVolumes | Action::TearDown);
    let (mut seq, mut read, mut running) = (None, None, false);
    if touched {
        seq = (!matches!(action, Action::ReadRuntime)).then(|| context.parts.runtime_store.draw());
        match context.parts.runtime_store.refresh(&context.uid).await {
            Ok(runtime) => {
                read = Some(runtime.as_of);
                running = runtime.containers.iter().any(|c| c.state == ContainerState::Running);
            }
            Err(error) => tracing::warn!(pod.uid = %context.uid, %error, "Reading the pod from the runtime failed"),
        }
    }
    // The read is all there is to a read.
    let outcome = match (&action, read) {
        (Action::ReadRuntime, None) => Outcome::Failed,
        // Stopped, it says, and yet something runs: not again at once.
        (Action::StopPod { .. } | Action::StopSandbox { .. }, _) if running && matches!(outcome, Outcome::Done) => {
            Outcome::Failed
        }
        _ => outcome,
    };
    let at = context.parts.clock.now().mono;
    context.parts.metrics.action(action.name(), at - started);
    count(&context, &action, &outcome);
    context.slot.report(Ended { action, at, seq, read, outcome });
}

/// What upstream counts of this action; nothing of one that was given up.
fn count(context: &ActionContext, action: &Action, outcome: &Outcome) {
    let lives = &context.parts.metrics.lives;
    let Some(pod) = &context.pod else {
        if matches!((action, outcome), (Action::StopPod { .. }, Outcome::Done)) {
            lives.found_in_runtime_only();
        }
        return;
    };
    match (action, outcome) {
        (_, Outcome::Abandoned) => {}
        (Action::CreateSandbox { .. }, outcome) => lives.pod_started(pod, matches!(outcome, Outcome::Done)),
        (Action::StartContainer { name, .. }, outcome) => {
            let failed = match outcome {
                Outcome::StartFailed { waiting, .. } => Some(waiting.reason.as_str()),
                _ => None,
            };
            if let Some(container) = pod.container(name) {
                lives.container_started(container.kind, failed);
            }
        }
        _ => {}
    }
}

async fn perform(context: &ActionContext, action: &Action) -> Outcome {
    match action {
        Action::ReadRuntime => Outcome::Done,
        Action::CreateCgroup => create_cgroup(context).await,
        Action::MountVolumes => mount_volumes(context).await,
        Action::RefreshVolumes => refresh_volumes(context).await,
        Action::CreateSandbox { attempt } => create_sandbox(context, *attempt).await,
        Action::StopSandbox { ids, containers } => stop::stop_sandbox(context, ids, containers).await,
        Action::StartContainer { name, attempt } => start_container::start(context, name, *attempt).await,
        Action::KillContainer { container, message, .. } => stop::kill_container(context, container, message).await,
        Action::Resize { updates, pod } => resize_action::resize(context, updates, pod.is_some()).await,
        Action::ResetContainers { containers } => reset_containers(context, containers).await,
        Action::StopPod { containers, sandboxes, deadline } => {
            stop::stop_pod(context, containers, sandboxes, *deadline).await
        }
        Action::Prune { containers, sandboxes } => prune(context, containers, sandboxes).await,
        Action::TearDown => tear_down(context).await,
        Action::RemoveRuntime { containers, sandboxes } => remove_runtime(context, containers, sandboxes).await,
    }
}

async fn create_cgroup(context: &ActionContext) -> Outcome {
    let Some(pod) = &context.pod else { return Outcome::Abandoned };
    let cgroups = &context.parts.cgroups;
    let started = context.parts.clock.now().mono;
    let created = cgroups.create(pod).await;
    context.parts.metrics.lives.cgroup("create", context.parts.clock.now().mono - started);
    match created {
        Ok(()) => {
            let ledger = &context.parts.ledger;
            // One that was there before this process may have been left in the middle of a resize.
            if !context.runtime.sandboxes.is_empty()
                && resize_plan::settled(pod, &ledger.actuated(pod.uid()), ledger.pod_level())
                && let Err(error) = cgroups.reconcile(pod).await
            {
                tracing::warn!(pod.uid = %pod.uid(), %error, "Comparing the pod's cgroup with its resources failed");
            }
            Outcome::Done
        }
        Err(error) => {
            let message = format!(
                "failed to ensure that the pod: {} cgroups exist and are correctly applied: {error}",
                pod.uid()
            );
            context.event(
                EventType::Warning,
                "FailedCreatePodContainer",
                format!("unable to ensure pod container exists: {message}"),
            );
            Outcome::Failed
        }
    }
}

async fn mount_volumes(context: &ActionContext) -> Outcome {
    let Some(pod) = &context.pod else { return Outcome::Abandoned };
    let started = context.parts.clock.now().mono;
    let mounted = tokio::select! {
        mounted = context.parts.volumes.mount(pod) => mounted,
        () = context.cancel.cancelled() => return Outcome::Abandoned,
    };
    context.parts.metrics.start_phase("volumes", context.parts.clock.now().mono - started);
    match mounted {
        Ok(mounted) => Outcome::Volumes { mounted: Some(mounted), refresh_in: first_refresh(pod) },
        Err(_) => Outcome::Failed,
    }
}

/// A pod with a token is refreshed soon after its start, off the start path: that tells when the token is due.
fn first_refresh(pod: &Pod) -> Option<Duration> {
    let sources = pod
        .spec()
        .volumes
        .iter()
        .flatten()
        .filter_map(|v| v.projected.as_ref())
        .flat_map(|p| p.sources.iter().flatten());
    sources.into_iter().any(|s| s.service_account_token.is_some()).then_some(FIRST_REFRESH)
}

async fn refresh_volumes(context: &ActionContext) -> Outcome {
    let Some(pod) = &context.pod else { return Outcome::Abandoned };
    match context.parts.volumes.refresh(pod).await {
        Ok(refresh_in) => Outcome::Volumes { mounted: None, refresh_in },
        Err(_) => Outcome::Failed,
    }
}

/// Whose users the pod has. Its IDs are on the disk before the runtime hears of them (contract P-58).
pub(super) async fn user_namespace(context: &ActionContext, pod: &Pod) -> Result<v1::UserNamespace, String> {
    // Nothing is looked up, and no disk asked, for the users that all pods share.
    let handler = match pod.spec().host_users {
        Some(false) => context.parts.objects.runtime_handler(pod).await.map_err(|e| e.to_string())?,
        _ => return Ok(UserNamespaces::shared()),
    };
    let (all, pod, node) = (Arc::clone(&context.parts.user_namespaces), pod.clone(), Arc::clone(&context.node));
    let found = tokio::task::spawn_blocking(move || all.of(&pod, &handler, &node)).await;
    found.map_err(|e| e.to_string())?.map_err(|e| e.to_string())
}

/// The sandbox's config: for RunPodSandbox, and again for every CreateContainer and PullImage in it.
pub(super) fn sandbox_config(
    context: &ActionContext,
    pod: &Pod,
    attempt: u32,
    users: &v1::UserNamespace,
) -> Result<v1::PodSandboxConfig, String> {
    let settings = &context.parts.settings;
    let names = network::pod_hostname(pod, &settings.dns.cluster_domain).map_err(|e| e.to_string())?;
    let dns = settings.dns.pod_dns(pod, &context.node.ips).map_err(|e| e.to_string())?;
    for warning in dns.warnings {
        match warning {
            DnsWarning::Forming(message) => context.event(EventType::Warning, "DNSConfigForming", message),
            DnsWarning::MissingClusterDns { node, pod } => {
                context.parts.events.event(Regarding::Node, EventType::Warning, "MissingClusterDNS", node);
                context.event(EventType::Warning, "MissingClusterDNS", pod);
            }
        }
    }
    let cgroup_parent = context.parts.cgroups.cgroup_parent(pod);
    containers::sandbox_config(&SandboxInputs {
        pod,
        attempt,
        node: &context.node,
        dns: &dns.config,
        hostname: &names.kernel,
        cgroup_parent: &cgroup_parent,
        user_namespace: Some(users),
        pod_logs_dir: &settings.pod_logs_dir,
        root_dir: &settings.root_dir,
    })
    .map_err(|e| e.to_string())
}

async fn create_sandbox(context: &ActionContext, attempt: u32) -> Outcome {
    let Some(pod) = &context.pod else { return Outcome::Abandoned };
    let failed = |message: String| {
        context.event(EventType::Warning, "FailedCreatePodSandBox", format!("Failed to create pod sandbox: {message}"));
        Outcome::Failed
    };
    let users = match user_namespace(context, pod).await {
        Ok(users) => users,
        Err(message) => return failed(message),
    };
    let config = match sandbox_config(context, pod, attempt, &users) {
        Ok(config) => config,
        Err(message) => return failed(message),
    };
    if let Err(error) = tokio::fs::create_dir_all(&config.log_directory).await {
        return failed(format!("create pod log directory for pod {:?} failed: {error}", pod.name()));
    }
    let handler = match context.parts.objects.runtime_handler(pod).await {
        Ok(handler) => handler,
        Err(error) => return failed(error.to_string()),
    };
    if context.cancel.is_cancelled() {
        return Outcome::Abandoned;
    }
    let runtime = Arc::clone(&context.parts.runtime);
    let started = context.parts.clock.now().mono;
    let asked = handler.clone();
    let made = context.gated(async move { runtime.run_pod_sandbox(config, &asked).await }).await;
    let took = context.parts.clock.now().mono - started;
    context.parts.metrics.start_phase("sandbox", took);
    if let Some(made) = &made {
        context.parts.metrics.lives.sandbox_run(&handler, took, made.is_ok());
    }
    match made {
        None => Outcome::Abandoned,
        Some(Ok(_)) => Outcome::Done,
        Some(Err(error)) => failed(error.to_string()),
    }
}

async fn prune(context: &ActionContext, dead: &[String], sandboxes: &[String]) -> Outcome {
    for id in dead {
        if let Err(error) = remove_container(context, id).await {
            tracing::warn!(pod.uid = %context.uid, container = id, %error, "Removing a dead container failed");
            return Outcome::Failed;
        }
    }
    for id in sandboxes {
        if let Err(error) = remove_sandbox(context, id).await {
            tracing::warn!(pod.uid = %context.uid, sandbox = id, %error, "Removing an old sandbox failed");
            return Outcome::Failed;
        }
    }
    Outcome::Done
}

/// One after the other, without grace and without preStop hooks; logs stay until the pod goes (contract P-36).
async fn reset_containers(context: &ActionContext, containers: &[ContainerToReset]) -> Outcome {
    for reset in containers {
        if context.cancel.is_cancelled() {
            return Outcome::Abandoned;
        }
        if reset.alive {
            let (id, name) = (reset.id.clone(), reset.name.clone());
            let container = ContainerToStop { id, name, grace: Duration::ZERO, hook: true, rank: 0 };
            if let outcome @ Outcome::Failed = stop::kill_container(context, &container, "killing").await {
                return outcome;
            }
        }
        if let Err(error) = forget_container(context, &reset.id).await {
            tracing::warn!(pod.uid = %context.uid, container = reset.id, %error, "Removing a container to begin anew failed");
            return Outcome::Failed;
        }
    }
    Outcome::Done
}

/// Removes a container from the runtime, and nothing else.
pub(super) async fn forget_container(context: &ActionContext, id: &str) -> Result<(), CriError> {
    let (runtime, owned) = (Arc::clone(&context.parts.runtime), id.to_owned());
    context.mutate(async move { runtime.remove_container(&owned).await }).await
}

async fn remove_container(context: &ActionContext, id: &str) -> Result<(), CriError> {
    forget_container(context, id).await?;
    if let Some(container) = context.runtime.containers.iter().find(|c| c.id == id) {
        remove_logs(context, container).await;
    }
    Ok(())
}

async fn remove_sandbox(context: &ActionContext, id: &str) -> Result<(), CriError> {
    let (runtime, owned) = (Arc::clone(&context.parts.runtime), id.to_owned());
    context.mutate(async move { runtime.remove_pod_sandbox(&owned).await }).await
}

/// A removed container's log, its rotated files, and its link.
async fn remove_logs(context: &ActionContext, container: &Container) {
    let link = context.pod.as_ref().map(|pod| {
        let name = containers::container_log_link(pod, &container.name, &container.id);
        context.parts.settings.container_logs_dir.join(name)
    });
    logs::remove_logs_of(&container.id, container.log_path.as_str().into(), link).await;
}

async fn tear_down(context: &ActionContext) -> Outcome {
    let (users, uid) = (Arc::clone(&context.parts.user_namespaces), context.uid.clone());
    let _ = tokio::task::spawn_blocking(move || users.release(&uid)).await;
    if let Err(error) = context.parts.volumes.unmount(&context.uid).await {
        tracing::warn!(pod.uid = %context.uid, %error, "Unmounting volumes failed");
        return Outcome::Failed;
    }
    let started = context.parts.clock.now().mono;
    let removed = context.parts.cgroups.remove(&context.uid).await;
    context.parts.metrics.lives.cgroup("destroy", context.parts.clock.now().mono - started);
    if let Err(error) = removed {
        tracing::warn!(pod.uid = %context.uid, %error, "Removing the pod's cgroup failed");
        return Outcome::Failed;
    }
    Outcome::Done
}

async fn remove_runtime(context: &ActionContext, dead: &[String], sandboxes: &[String]) -> Outcome {
    if let outcome @ Outcome::Failed = prune(context, dead, sandboxes).await {
        return outcome;
    }
    let latest: Option<&Sandbox> = context.runtime.latest_sandbox();
    let named = match (&context.pod, latest) {
        (Some(pod), _) => Some((pod.namespace().to_owned(), pod.name().to_owned())),
        (None, Some(sandbox)) => Some((sandbox.namespace.clone(), sandbox.name.clone())),
        (None, None) => None,
    };
    if let Some((namespace, name)) = named {
        let dir = context.parts.settings.pod_logs_dir.join(format!("{namespace}_{name}_{}", context.uid));
        match tokio::fs::remove_dir_all(&dir).await {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                tracing::warn!(pod.uid = %context.uid, dir = %dir.display(), %error, "Removing the pod's logs failed");
            }
            _ => {}
        }
    }
    Outcome::Done
}

/// What the container left as its termination message (contract P-35).
pub(super) async fn termination_message(container: &Container) -> String {
    let owned = container.clone();
    let read = tokio::task::spawn_blocking(move || {
        let annotations = ContainerAnnotations::read(&owned.annotations);
        let exit =
            Exit { code: owned.exit_code, reason: &owned.reason, message: &owned.message, mounts: &owned.mounts };
        termination_log::message(exit, &annotations, || {
            let log = Path::new(&owned.log_path);
            tokio::runtime::Handle::current().block_on(logs::tail_for_termination(log))
        })
    });
    match tokio::time::timeout(Duration::from_secs(10), read).await {
        Ok(Ok(message)) => message,
        _ => {
            tracing::warn!(container = container.id, "Reading the termination message failed");
            String::new()
        }
    }
}
