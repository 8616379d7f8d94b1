//! Stopping: one container, a sandbox, or the whole pod (contract P-29, P-31).
//!
//! All preStop hooks start at once; only SIGTERM is ordered: mains together, then sidecars from last to first, one shared deadline.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures::future::join_all;
use tokio::{sync::watch, time::Instant};

use super::{
    actions::{ContainerToStop, Outcome},
    execute::ActionContext,
    hooks::{self, HookContext},
};
use crate::{
    containers::remembered_pod,
    cri::CriError,
    events::{EventType, Regarding},
    pods::Pod,
};

/// The runtime is always given this long between SIGTERM and SIGKILL.
const MINIMUM_GRACE: Duration = Duration::from_secs(2);

pub(super) async fn kill_container(context: &ActionContext, container: &ContainerToStop, message: &str) -> Outcome {
    let deadline = context.parts.clock.now().mono + container.grace;
    match stop_container(context, container, deadline, message, None).await {
        Ok(()) => Outcome::Done,
        Err(error) => {
            context.event(
                EventType::Warning,
                "FailedKillPod",
                format!(
                    "error killing pod: failed to \"KillContainer\" for \"{}\" with KillContainerError: \"{error}\"",
                    container.name
                ),
            );
            Outcome::Failed
        }
    }
}

pub(super) async fn stop_sandbox(context: &ActionContext, ids: &[String], containers: &[ContainerToStop]) -> Outcome {
    let deadline = context.parts.clock.now().mono + containers.iter().map(|c| c.grace).max().unwrap_or(Duration::ZERO);
    stop_all(context, containers, ids, deadline).await
}

pub(super) async fn stop_pod(
    context: &ActionContext,
    containers: &[ContainerToStop],
    sandboxes: &[String],
    deadline: Instant,
) -> Outcome {
    tokio::select! {
        biased;
        // A stop with a shorter grace has taken over; what was asked of the runtime goes on.
        () = context.cancel.cancelled() => Outcome::Abandoned,
        outcome = stop_all(context, containers, sandboxes, deadline) => outcome,
    }
}

async fn stop_all(
    context: &ActionContext,
    containers: &[ContainerToStop],
    sandboxes: &[String],
    deadline: Instant,
) -> Outcome {
    let (ranks_done, _) = watch::channel(0u32);
    let mut left: BTreeMap<u32, usize> = BTreeMap::new();
    for container in containers {
        *left.entry(container.rank).or_default() += 1;
    }
    let left = std::sync::Mutex::new(left);
    let stops = containers.iter().map(|container| {
        let (ranks_done, left) = (&ranks_done, &left);
        async move {
            let message = format!("Stopping container {}", container.name);
            let turn = Some(Turn { rank: container.rank, done: ranks_done.subscribe() });
            let result = stop_container(context, container, deadline, &message, turn).await;
            let mut left = left.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if let Some(count) = left.get_mut(&container.rank) {
                *count -= 1;
            }
            left.retain(|_, count| *count > 0);
            ranks_done.send_replace(left.keys().next().copied().unwrap_or(u32::MAX));
            result
        }
    });
    // The lowest rank present may go at once.
    let first = containers.iter().map(|c| c.rank).min().unwrap_or(u32::MAX);
    ranks_done.send_replace(first);
    let mut errors: Vec<String> =
        join_all(stops).await.into_iter().filter_map(Result::err).map(|e| e.to_string()).collect();
    if errors.is_empty() {
        for id in sandboxes {
            let (runtime, owned) = (Arc::clone(&context.parts.runtime), id.clone());
            if let Err(error) = context.mutate(async move { runtime.stop_pod_sandbox(&owned).await }).await {
                errors.push(format!(
                    "failed to \"KillPodSandbox\" for \"{}\" with KillPodSandboxError: \"{error}\"",
                    context.uid
                ));
            }
        }
    }
    if errors.is_empty() {
        return Outcome::Done;
    }
    context.event(EventType::Warning, "FailedKillPod", format!("error killing pod: {}", errors.join(", ")));
    Outcome::Failed
}

/// When a container may get its SIGTERM: once no container of a lower rank is left.
struct Turn {
    rank: u32,
    done: watch::Receiver<u32>,
}

async fn stop_container(
    context: &ActionContext,
    container: &ContainerToStop,
    deadline: Instant,
    message: &str,
    turn: Option<Turn>,
) -> Result<(), CriError> {
    if container.hook
        && let Some(pod) = pod_of(context, container)
    {
        if let Some(container) = pod.container(&container.name) {
            let regarding = Regarding::container(&pod, container);
            context.parts.events.event(regarding, EventType::Normal, "Killing", message.to_owned());
        }
        pre_stop(context, pod, container, deadline).await;
    }
    if let Some(mut turn) = turn {
        let now = context.parts.clock.now().mono;
        let mine = turn.done.wait_for(|lowest| *lowest >= turn.rank);
        let _ = tokio::time::timeout(deadline.saturating_duration_since(now), mine).await;
    }
    let left = deadline.saturating_duration_since(context.parts.clock.now().mono);
    let grace = Duration::from_secs(left.as_secs_f64().round() as u64).max(MINIMUM_GRACE);
    let (runtime, id) = (Arc::clone(&context.parts.runtime), container.id.clone());
    context.mutate(async move { runtime.stop_container(&id, grace).await }).await
}

/// The container's pod; for one that no source knows any more what the container itself remembers of it.
fn pod_of(context: &ActionContext, container: &ContainerToStop) -> Option<Pod> {
    let remembered = || context.runtime.containers.iter().find(|c| c.id == container.id).and_then(remembered_pod);
    context.pod.clone().or_else(remembered)
}

/// Runs the container's preStop hook inside the grace period; a hook that is still running then is left to itself, and its failure (its
/// container is killed) is told when it comes.
async fn pre_stop(context: &ActionContext, pod: Pod, container: &ContainerToStop, deadline: Instant) {
    let Some(spec) = pod.container(&container.name).map(|c| c.spec.clone()) else { return };
    let Some(handler) = spec.lifecycle.as_ref().and_then(|l| l.pre_stop.clone()) else { return };
    let left = deadline.saturating_duration_since(context.parts.clock.now().mono);
    if left.is_zero() {
        return;
    }
    let regarding = pod.container(&container.name).map(|c| Regarding::container(&pod, c));
    let hook_context = HookContext {
        pod,
        container: spec,
        container_id: container.id.clone(),
        pod_ip: super::start_container::pod_ip(context),
        runtime: Arc::clone(&context.parts.runtime),
        events: Arc::clone(&context.parts.events),
        metrics: Arc::clone(&context.parts.metrics),
    };
    let hook = hooks::spawn(handler, hook_context);
    let (uid, name, events) = (context.uid.clone(), container.name.clone(), Arc::clone(&context.parts.events));
    let told = tokio::spawn(async move {
        let Ok(Err(error)) = hook.await else { return };
        tracing::warn!(pod.uid = %uid, container = name, %error, "PreStop hook failed");
        if let Some(regarding) = regarding {
            let message = "PreStopHook failed".to_owned();
            events.event(regarding, EventType::Warning, "FailedPreStopHook", message);
        }
    });
    if tokio::time::timeout(left, told).await.is_err() {
        tracing::info!(pod.uid = %context.uid, container = container.name, "PreStop hook did not end within the grace period");
    }
}
