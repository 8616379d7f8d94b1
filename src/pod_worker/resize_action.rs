//! Carrying out one resize: the pod's cgroup and its running containers, step by step in the order of
//! [`resize_plan`](crate::resources::resize_plan) (contract P-71).
//!
//! Each step that is done is put on record at once, so that a failure, or the agent's death, leaves a resize that goes on from there.

use std::sync::Arc;

use super::{actions::Outcome, execute::ActionContext};
use crate::{
    containers::{resized_resources, sandbox_resources},
    cri::v1,
    pods::Pod,
    resources::{
        CgroupError, ContainerSize, Trigger,
        resize_plan::{self, ContainerUpdate, PodCgroup, Resource, Step},
    },
};

pub(super) async fn resize(context: &ActionContext, updates: &[ContainerUpdate], whole: bool) -> Outcome {
    let Some(pod) = context.pod.clone() else { return Outcome::Abandoned };
    let in_force = updates.iter().map(|update| update.from).collect();
    let mut resize = Resize { context, pod: &pod, updates, in_force };
    let began = context.parts.clock.now().mono;
    let result = resize.run(whole).await;
    context.parts.ledger.resized(result.is_ok(), context.parts.clock.now().mono - began);
    match result {
        Ok(()) => {
            // What shrank is free for others.
            context.parts.ledger.retry(Trigger::PodResized);
            Outcome::Done
        }
        Err(message) => {
            tracing::warn!(pod.uid = %pod.uid(), %message, "Resizing the pod failed");
            context.parts.ledger.failed(&pod, &message);
            Outcome::Failed
        }
    }
}

struct Resize<'a> {
    context: &'a ActionContext,
    pod: &'a Pod,
    updates: &'a [ContainerUpdate],
    /// Of each update's container, after the steps so far.
    in_force: Vec<ContainerSize>,
}

impl Resize<'_> {
    async fn run(&mut self, whole: bool) -> Result<(), String> {
        let parts = &self.context.parts;
        if !parts.ledger.persisted().await {
            return Err("failed to save pod resource information checkpoint".into());
        }
        let now =
            parts.cgroups.in_force(self.pod).await.map_err(|error| {
                format!("unable to get pod cgroup config for pod {:?}: {error}", self.pod.described())
            })?;
        let wanted = parts.cgroups.wanted(self.pod);
        self.check_memory(now.as_ref(), wanted.as_ref()).await?;
        for step in resize_plan::steps(now.as_ref(), wanted.as_ref(), self.updates, whole) {
            self.take(step).await?;
        }
        Ok(())
    }

    /// A limit below what is in use would kill.
    async fn check_memory(&self, now: Option<&PodCgroup>, wanted: Option<&PodCgroup>) -> Result<(), String> {
        if !resize_plan::shrinks_any_memory(now, wanted, self.updates) {
            return Ok(());
        }
        let parts = &self.context.parts;
        let label = (crate::cri::POD_UID_LABEL.to_owned(), self.pod.uid().to_string());
        let filter = v1::ContainerStatsFilter { label_selector: [label].into(), ..Default::default() };
        let stats = parts
            .runtime
            .list_container_stats(Some(filter))
            .await
            .map_err(|_| format!("unable to read memory usage for pod {:?}", self.pod.described()))?;
        let of_container = |id: &str| {
            let found = stats.iter().find(|s| s.attributes.as_ref().is_some_and(|a| a.id == id))?;
            Some(found.memory.as_ref()?.usage_bytes.as_ref()?.value)
        };
        let of_pod = parts.cgroups.memory_use(self.pod).await;
        resize_plan::memory_shrinks_below_use(now, wanted, self.updates, of_pod, of_container)
    }

    async fn take(&mut self, step: Step) -> Result<(), String> {
        let cgroups = &self.context.parts.cgroups;
        match step {
            Step::PodLimit(resource) => {
                self.tell_runtime(resource).await?;
                self.updated(cgroups.set_limit(self.pod, resource)).await
            }
            Step::PodRequest(resource) => {
                self.tell_runtime(resource).await?;
                self.updated(cgroups.set_shares(self.pod)).await
            }
            Step::Container(index, resource) => self.update(index, resource).await,
            Step::PodDone(resource) => {
                self.context.parts.ledger.pod_actuated(self.pod, resource);
                Ok(())
            }
        }
    }

    async fn updated(&self, update: impl Future<Output = Result<(), CgroupError>>) -> Result<(), String> {
        let parts = &self.context.parts;
        let began = parts.clock.now().mono;
        let done = update.await;
        parts.metrics.lives.cgroup("update", parts.clock.now().mono - began);
        done.map_err(|error| error.to_string())
    }

    /// Runtimes that size a virtual machine by its pod want to know first, and may refuse.
    async fn tell_runtime(&self, resource: Resource) -> Result<(), String> {
        let Some(sandbox) = self.context.runtime.latest_sandbox() else { return Ok(()) };
        let (resources, overhead) = sandbox_resources(self.pod);
        let request = v1::UpdatePodSandboxResourcesRequest {
            pod_sandbox_id: sandbox.id.clone(),
            overhead: Some(overhead),
            resources: Some(resources),
        };
        let runtime = Arc::clone(&self.context.parts.runtime);
        let told = self.context.mutate(async move { runtime.update_pod_sandbox_resources(request).await }).await;
        let name = if resource == Resource::Cpu { "cpu" } else { "memory" };
        told.map_err(|error| {
            format!(
                "failed to notify runtime for UpdatePodSandboxResources (resource={name}); resize rejected: \
                 updatePodSandboxResources failed for sanboxID {:?}: {error}",
                sandbox.id
            )
        })
    }

    async fn update(&mut self, index: usize, resource: Resource) -> Result<(), String> {
        let (Some(update), Some(in_force)) = (self.updates.get(index), self.in_force.get_mut(index)) else {
            return Ok(());
        };
        let Some(container) = self.pod.container(&update.name) else { return Ok(()) };
        let (parts, size) = (&self.context.parts, resize_plan::size_at(update, *in_force, resource));
        let period = parts.settings.cpu_cfs_quota.then_some(parts.settings.cpu_cfs_period.as_micros() as i64);
        let policy = &parts.settings.container_policy;
        let linux = resized_resources(self.pod, container, &size, &self.context.node, period, policy);
        let request = v1::UpdateContainerResourcesRequest {
            container_id: update.id.clone(),
            linux: Some(linux),
            annotations: Default::default(),
        };
        let runtime = Arc::clone(&parts.runtime);
        let done = self.context.mutate(async move { runtime.update_container_resources(request).await }).await;
        done.map_err(|error| error.to_string())?;
        *in_force = size;
        let record = size.requirements(container.spec.resources.as_ref());
        parts.ledger.container_actuated(self.pod.uid(), &update.name, record);
        Ok(())
    }
}
