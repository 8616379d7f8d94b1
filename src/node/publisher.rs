//! Registers the node, then keeps its status at the apiserver true (contract N-01, N-18, N-19).
//!
//! In: readings, the runtime's state, the CSINode's state, the Node as last seen. Out: strategic merge PATCHes of `nodes/<n>/status`, at
//! once when something changed, else when a report is due. Events go out only after the write that they are about.

use std::{sync::Arc, time::Duration};

use k8s_openapi::api::core::v1::Node;
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{
    call_error::CallError,
    patch::node_patch,
    registration::{Registered, RegistrationError, initial_node, register},
    runtime_state::RuntimeState,
    settings::NodeSettings,
    status::{BuiltNode, NodeEvent, Readings, StatusInputs, build, changed},
    watch_node::NodeObject,
};
use crate::{api::ApiClients, events::EventSink, time::Clock};

const TRIES: u32 = 5;
const JITTER: f64 = 0.04;
/// At start, until the node is ready: how often it is looked whether it is, and for how long.
const FAST: Duration = Duration::from_millis(100);
const FAST_LIMIT: Duration = Duration::from_secs(120);
const FIRST_FAILURE_PAUSE: Duration = Duration::from_secs(1);
/// A node that an earlier process left Ready stays so for this long while this one gathers its first answers.
const TAKEOVER: Duration = Duration::from_secs(5);

/// Reasons why the node is not healthy that no other input shows: `PLEG is not healthy: …`. Must not block.
pub type HealthCheck = Arc<dyn Fn() -> Vec<String> + Send + Sync>;

pub(super) struct Publisher {
    pub settings: Arc<NodeSettings>,
    pub clients: ApiClients,
    pub object: NodeObject,
    pub readings: watch::Receiver<Option<Readings>>,
    pub runtime: watch::Receiver<RuntimeState>,
    /// Why the CSINode is not there yet.
    pub storage: watch::Receiver<Option<String>>,
    pub health: HealthCheck,
    pub events: Arc<dyn EventSink>,
    pub clock: Arc<dyn Clock>,
    /// Computes the status at once when notified.
    pub refresh: Arc<Notify>,
}

/// When the next report is due though nothing changed.
struct Reports {
    last: Option<Instant>,
    /// Added to the report frequency, negative or positive: spreads the nodes of a cluster.
    delay: f64,
}

impl Publisher {
    pub(super) async fn run(mut self, cancel: CancellationToken) {
        tokio::select! {
            biased;
            () = cancel.cancelled() => {}
            () = self.publish(cancel.clone()) => {}
        }
    }

    async fn publish(&mut self, cancel: CancellationToken) {
        if self.readings.wait_for(Option::is_some).await.is_err() {
            return;
        }
        let mut heartbeat = self.clients.heartbeat();
        if self.settings.register_node {
            self.register(&cancel).await;
        }
        self.take_over().await;
        let mut node = self.object.subscribe();
        let started = self.clock.now().mono;
        let mut reports = Reports { last: None, delay: 0.0 };
        let mut fast = true;
        let mut failure_pause = FIRST_FAILURE_PAUSE;
        let mut unschedulable = false;
        loop {
            node.borrow_and_update();
            match self.sync(&heartbeat, &mut reports).await {
                Ok(ready) => {
                    failure_pause = FIRST_FAILURE_PAUSE;
                    fast &= !ready && self.clock.now().mono.saturating_duration_since(started) < FAST_LIMIT;
                }
                Err(error) => {
                    tracing::error!(%error, retry_in = ?failure_pause, "unable to update node status");
                    heartbeat = self.clients.heartbeat();
                    tokio::time::sleep(failure_pause).await;
                    failure_pause = (failure_pause * 2).min(self.settings.update_frequency);
                    continue;
                }
            }
            self.tell_schedulable(&mut unschedulable);
            let jitter = 1.0 + JITTER * rand::random::<f64>();
            let tick = if fast { FAST } else { self.settings.update_frequency.mul_f64(jitter) };
            tokio::select! {
                biased;
                changed = self.runtime.changed() => if changed.is_err() { return },
                changed = self.readings.changed() => if changed.is_err() { return },
                _ = self.storage.changed() => {}
                changed = node.changed() => if changed.is_err() { return },
                () = self.refresh.notified() => {}
                () = tokio::time::sleep(tick) => {}
            }
        }
    }

    async fn register(&mut self, cancel: &CancellationToken) {
        let initial = initial_node(&self.settings);
        let built = self.build(&initial);
        let api = Api::all(self.clients.general.clone());
        match register(&api, &built.node, cancel).await {
            Some(Registered::Created(node)) => {
                tracing::info!(node = self.settings.node_name, "successfully registered node");
                self.object.offer(node);
                self.tell(built.events);
            }
            Some(Registered::Existed(node)) => self.object.offer(node),
            None => {}
        }
    }

    /// A restart of the agent is no reason to call a Ready node not ready: says nothing until all that readiness hangs on was asked.
    async fn take_over(&mut self) {
        let was_ready = |node: &Node| {
            let conditions = node.status.iter().flat_map(|s| s.conditions.iter().flatten());
            conditions.into_iter().any(|c| c.type_ == "Ready" && c.status == "True")
        };
        let Some(left) = self.object.newest().filter(|node| was_ready(node)) else { return };
        let until = self.clock.now().mono + TAKEOVER;
        while !self.build(&left).ready && self.clock.now().mono < until {
            tokio::time::sleep(FAST).await;
        }
    }

    fn build(&mut self, current: &Node) -> BuiltNode {
        let readings = self.readings.borrow_and_update().clone().unwrap_or_default();
        let runtime = self.runtime.borrow_and_update().clone();
        let storage = self.storage.borrow_and_update().clone();
        let inputs = StatusInputs {
            settings: &self.settings,
            readings: &readings,
            runtime: &runtime,
            unhealthy: &(self.health)(),
            storage_error: storage.as_deref(),
            now: self.clock.now(),
        };
        build(current, &inputs)
    }

    /// Brings the Node up to date; whether the node is ready. The first try is from the Node last seen, the others read it afresh.
    async fn sync(&mut self, client: &Client, reports: &mut Reports) -> Result<bool, RegistrationError> {
        let api: Api<Node> = Api::all(client.clone());
        let mut attempt = 1;
        loop {
            match self.try_sync(&api, reports, attempt > 1).await {
                Err(error) if attempt < TRIES => {
                    tracing::warn!(%error, attempt, "error updating node status, will retry");
                    attempt += 1;
                }
                result => return result,
            }
        }
    }

    async fn try_sync(
        &mut self,
        api: &Api<Node>,
        reports: &mut Reports,
        afresh: bool,
    ) -> Result<bool, RegistrationError> {
        let name = self.settings.node_name.clone();
        let known = self.object.newest().filter(|_| !afresh);
        let current = match known {
            Some(node) => node,
            None => Arc::new(api.get(&name).await.map_err(CallError::from)?),
        };
        let built = self.build(&current);
        let changed = changed(&current, &built.node);
        let now = self.clock.now().mono;
        if !changed && !reports.due(self.settings.report_frequency, now) {
            return Ok(built.ready);
        }
        reports.delay = match changed || reports.last.is_none() {
            true => rand::random::<f64>() - 0.5,
            false => 0.0,
        };
        if let Some(patch) = node_patch(&current, &built.node)? {
            let updated = api.patch_status(&name, &PatchParams::default(), &Patch::Strategic(patch)).await;
            self.object.offer(updated.map_err(CallError::from)?);
        }
        reports.last = Some(now);
        self.tell(built.events);
        Ok(built.ready)
    }

    fn tell(&self, events: Vec<NodeEvent>) {
        events.into_iter().for_each(|event| event.send(self.events.as_ref()));
    }

    fn tell_schedulable(&self, last: &mut bool) {
        let node = self.object.newest();
        let now = node.as_ref().and_then(|n| n.spec.as_ref()).and_then(|s| s.unschedulable).unwrap_or(false);
        if std::mem::replace(last, now) != now {
            let reason = if now { "NodeNotSchedulable" } else { "NodeSchedulable" };
            self.tell(vec![NodeEvent::status(&self.settings.node_name, reason)]);
        }
    }
}

impl Reports {
    fn due(&self, frequency: Duration, now: Instant) -> bool {
        let wait = frequency.mul_f64(1.0 + self.delay);
        self.last.is_none_or(|last| now.saturating_duration_since(last) >= wait)
    }
}

#[cfg(test)]
#[path = "publisher_tests.rs"]
mod tests;
