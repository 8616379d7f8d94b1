//! How many pods and containers there are: gauges that are read from the two stores at each scrape (appendix D.1).

use std::{collections::BTreeMap, sync::Arc};

use prometheus::{
    Error, IntGauge, IntGaugeVec, Opts, Registry,
    core::{Collector, Desc},
    proto::MetricFamily,
};

use crate::{
    cri::{ContainerState, RuntimeStore},
    pods::{Pod, PodSource, PodStore},
};

/// See the module.
pub struct PodCounts {
    store: Arc<PodStore>,
    runtime: Arc<RuntimeStore>,
    running_pods: IntGauge,
    running_containers: IntGaugeVec,
    desired: IntGaugeVec,
    active: IntGaugeVec,
    mirrors: IntGauge,
    ephemeral: IntGauge,
}

impl PodCounts {
    /// Registers itself; fails only if a name is taken.
    pub fn register(store: Arc<PodStore>, runtime: Arc<RuntimeStore>, registry: &Registry) -> Result<(), Error> {
        registry.register(Box::new(Self::new(store, runtime)?))
    }

    fn new(store: Arc<PodStore>, runtime: Arc<RuntimeStore>) -> Result<Self, Error> {
        let by = |name: &str, help: &str, label: &str| IntGaugeVec::new(Opts::new(name, help), &[label]);
        Ok(Self {
            store,
            runtime,
            running_pods: IntGauge::new(
                "kubelet_running_pods",
                "[ALPHA] Number of pods that have a running pod sandbox",
            )?,
            running_containers: by(
                "kubelet_running_containers",
                "[ALPHA] Number of containers currently running",
                "container_state",
            )?,
            desired: by(
                "kubelet_desired_pods",
                "[ALPHA] The number of pods the kubelet is being instructed to run. static is true if the pod is not from the \
                 apiserver.",
                "static",
            )?,
            active: by(
                "kubelet_active_pods",
                "[ALPHA] The number of pods the kubelet considers active and which are being considered when admitting new pods. \
                 static is true if the pod is not from the apiserver.",
                "static",
            )?,
            mirrors: IntGauge::new(
                "kubelet_mirror_pods",
                "[ALPHA] The number of mirror pods the kubelet will try to create (one per admitted static pod)",
            )?,
            ephemeral: IntGauge::new(
                "kubelet_managed_ephemeral_containers",
                "[ALPHA] Current number of ephemeral containers in pods managed by this kubelet.",
            )?,
        })
    }

    fn read(&self) {
        let pods = self.store.list();
        let active = |pod: &&Pod| !matches!(pod.api_status().phase.as_deref(), Some("Succeeded" | "Failed"));
        let of_api = |pod: &&Pod| pod.source() == PodSource::Api;
        for (gauge, list) in
            [(&self.desired, pods.iter().collect::<Vec<_>>()), (&self.active, pods.iter().filter(active).collect())]
        {
            let api = list.iter().filter(|pod| of_api(pod)).count();
            gauge.with_label_values(&[""]).set(whole(api));
            gauge.with_label_values(&["true"]).set(whole(list.len() - api));
        }
        self.ephemeral.set(whole(pods.iter().map(|pod| pod.ephemeral_containers().count()).sum()));
        let (mut sandboxes, mut states) =
            (0, BTreeMap::from([("created", 0), ("exited", 0), ("running", 0), ("unknown", 0)]));
        for runtime in self.runtime.uids().iter().filter_map(|uid| self.runtime.pod(uid)) {
            sandboxes += i64::from(runtime.sandboxes.iter().any(|sandbox| sandbox.ready));
            for container in &runtime.containers {
                *states.entry(state(container.state)).or_default() += 1;
            }
        }
        self.running_pods.set(sandboxes);
        for (state, count) in states {
            self.running_containers.with_label_values(&[state]).set(count);
        }
    }

    fn parts(&self) -> [&dyn Collector; 6] {
        [&self.running_pods, &self.running_containers, &self.desired, &self.active, &self.mirrors, &self.ephemeral]
    }
}

fn whole(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

fn state(state: ContainerState) -> &'static str {
    match state {
        ContainerState::Created => "created",
        ContainerState::Running => "running",
        ContainerState::Exited => "exited",
        ContainerState::Unknown => "unknown",
    }
}

impl Collector for PodCounts {
    fn desc(&self) -> Vec<&Desc> {
        self.parts().into_iter().flat_map(Collector::desc).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.read();
        self.parts().into_iter().flat_map(Collector::collect).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        containers::tests::named_pod,
        cri::fixtures::{running, runtime},
        time::SystemClock,
        wake::NoWakes,
    };

    #[tokio::test(start_paused = true)]
    async fn pods_and_containers_are_counted_at_each_scrape() {
        let fake = runtime();
        let store = Arc::new(PodStore::new(&[PodSource::Api], Arc::new(NoWakes)));
        let seen = RuntimeStore::with_clock(Arc::new(fake.clone()), Arc::new(NoWakes), Arc::new(SystemClock));
        let seen = Arc::new(seen);
        let registry = Registry::new();
        PodCounts::register(Arc::clone(&store), Arc::clone(&seen), &registry).unwrap();
        let has = |line: &str| {
            let text = prometheus::TextEncoder::new().encode_to_string(&registry.gather()).unwrap();
            text.lines().any(|have| have == line)
        };
        assert!(has("kubelet_running_pods 0") && has(r#"kubelet_desired_pods{static=""} 0"#));
        running(&fake, "a", "web").await;
        let (_, dead) = running(&fake, "b", "web").await;
        fake.exit(&dead, 1);
        seen.relist().await.unwrap();
        store.replace(PodSource::Api, vec![named_pod("p", r#"{"ephemeralContainers": [{"name": "debug"}]}"#)]);
        for line in [
            "kubelet_running_pods 2",
            r#"kubelet_running_containers{container_state="running"} 1"#,
            r#"kubelet_running_containers{container_state="exited"} 1"#,
            r#"kubelet_desired_pods{static=""} 1"#,
            r#"kubelet_active_pods{static=""} 1"#,
            r#"kubelet_desired_pods{static="true"} 0"#,
            "kubelet_managed_ephemeral_containers 1",
            "kubelet_mirror_pods 0",
        ] {
            assert!(has(line), "no line {line}");
        }
    }
}
