//! What the lives of pods and containers count, under upstream's names (appendix D.1).

use std::time::Duration;

use k8s_openapi::api::core::v1::{ContainerStatus, PodStatus};
use prometheus::{DEFAULT_BUCKETS, Error, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, Opts, Registry};

use super::metrics::register;
use crate::pods::{ContainerKind, Pod};

/// Made by [`WorkerMetrics`](super::WorkerMetrics).
#[derive(Debug, Clone)]
pub struct PodLives {
    pods: IntCounter,
    pods_failed: IntCounter,
    with_own_users: IntCounter,
    with_own_users_failed: IntCounter,
    containers: IntCounterVec,
    containers_failed: IntCounterVec,
    terminated: IntCounterVec,
    sandboxes: HistogramVec,
    sandboxes_failed: IntCounterVec,
    runtime_only: IntCounter,
    cgroups: HistogramVec,
}

impl PodLives {
    /// Registers everything; fails only if a name is taken.
    pub(super) fn new(registry: &Registry) -> Result<Self, Error> {
        let counter = |name: &str, help: &str| register(registry, IntCounter::new(name, help));
        let by = |name: &str, help: &str, labels: &[&str]| {
            register(registry, IntCounterVec::new(Opts::new(name, help), labels))
        };
        let timed = |name: &str, help: &str, label: &str| {
            let opts = HistogramOpts::new(name, help).buckets(DEFAULT_BUCKETS.to_vec());
            register(registry, HistogramVec::new(opts, &[label]))
        };
        // Upstream counts here pods that come back under the UID of one that was deleted. A worker takes such a pod over, so there are none.
        let restarted = by(
            "kubelet_restarted_pods_total",
            "[ALPHA] Number of pods that have been restarted because they were deleted and recreated with the same UID while the \
             kubelet was watching them (common for static pods, extremely uncommon for API pods)",
            &["static"],
        )?;
        for is_static in ["", "true"] {
            restarted.with_label_values(&[is_static]);
        }
        Ok(Self {
            pods: counter("kubelet_started_pods_total", "[ALPHA] Cumulative number of pods started")?,
            pods_failed: counter(
                "kubelet_started_pods_errors_total",
                "[ALPHA] Cumulative number of errors when starting pods",
            )?,
            with_own_users: counter(
                "kubelet_started_user_namespaced_pods_total",
                "[ALPHA] Cumulative number of pods with user namespaces started. This metric will only be collected on Linux.",
            )?,
            with_own_users_failed: counter(
                "kubelet_started_user_namespaced_pods_errors_total",
                "[ALPHA] Cumulative number of errors when starting pods with user namespaces. This metric will only be \
                 collected on Linux.",
            )?,
            containers: by(
                "kubelet_started_containers_total",
                "[ALPHA] Cumulative number of containers started",
                &["container_type"],
            )?,
            containers_failed: by(
                "kubelet_started_containers_errors_total",
                "[ALPHA] Cumulative number of errors when starting containers",
                &["container_type", "code"],
            )?,
            terminated: by(
                "kubelet_terminated_containers_total",
                "[ALPHA] Cumulative number of container terminations.",
                &["container_type", "exit_code", "reason"],
            )?,
            sandboxes: timed(
                "kubelet_run_podsandbox_duration_seconds",
                "[ALPHA] Duration in seconds of the run_podsandbox operations. Broken down by RuntimeClass.Handler.",
                "runtime_handler",
            )?,
            sandboxes_failed: by(
                "kubelet_run_podsandbox_errors_total",
                "[ALPHA] Cumulative number of the run_podsandbox operation errors by RuntimeClass.Handler.",
                &["runtime_handler"],
            )?,
            runtime_only: counter(
                "kubelet_orphaned_runtime_pods_total",
                "[ALPHA] Number of pods that have been detected in the container runtime without being already known to the pod \
                 worker. This typically indicates the kubelet was restarted while a pod was force deleted in the API or in the \
                 local configuration, which is unusual.",
            )?,
            cgroups: timed(
                "kubelet_cgroup_manager_duration_seconds",
                "[ALPHA] Duration in seconds for cgroup manager operations. Broken down by method.",
                "operation_type",
            )?,
        })
    }

    /// A pod was to get a sandbox, and got it or not.
    pub fn pod_started(&self, pod: &Pod, well: bool) {
        let own_users = pod.spec().host_users == Some(false);
        self.pods.inc();
        if own_users {
            self.with_own_users.inc();
        }
        if !well {
            self.pods_failed.inc();
            if own_users {
                self.with_own_users_failed.inc();
            }
        }
    }

    /// RunPodSandbox returned.
    pub fn sandbox_run(&self, handler: &str, took: Duration, well: bool) {
        self.sandboxes.with_label_values(&[handler]).observe(took.as_secs_f64());
        if !well {
            self.sandboxes_failed.with_label_values(&[handler]).inc();
        }
    }

    /// A container was to be started; `failed` is the reason for which it waits now.
    pub fn container_started(&self, kind: ContainerKind, failed: Option<&str>) {
        let kind = kind_label(kind);
        self.containers.with_label_values(&[kind]).inc();
        if let Some(code) = failed {
            self.containers_failed.with_label_values(&[kind, code]).inc();
        }
    }

    /// The pod's status becomes another: counts the containers that it calls terminated and the last did not.
    pub fn status_changed(&self, last: &PodStatus, next: &PodStatus) {
        for (kind, last, next) in [
            (ContainerKind::Init, &last.init_container_statuses, &next.init_container_statuses),
            (ContainerKind::Main, &last.container_statuses, &next.container_statuses),
            (ContainerKind::Ephemeral, &last.ephemeral_container_statuses, &next.ephemeral_container_statuses),
        ] {
            for status in next.iter().flatten() {
                let earlier = last.iter().flatten().find(|earlier| earlier.name == status.name);
                if let Some(ended) = terminated(status)
                    && earlier.and_then(terminated).is_none()
                {
                    let (code, reason) = (ended.exit_code.to_string(), ended.reason.as_deref().unwrap_or_default());
                    self.terminated.with_label_values(&[kind_label(kind), code.as_str(), reason]).inc();
                }
            }
        }
    }

    /// A pod that no source knows was found in the runtime.
    pub fn found_in_runtime_only(&self) {
        self.runtime_only.inc();
    }

    /// `create`, `update` or `destroy` of a pod's cgroup.
    pub fn cgroup(&self, operation: &str, took: Duration) {
        self.cgroups.with_label_values(&[operation]).observe(took.as_secs_f64());
    }
}

fn terminated(status: &ContainerStatus) -> Option<&k8s_openapi::api::core::v1::ContainerStateTerminated> {
    status.state.as_ref()?.terminated.as_ref()
}

fn kind_label(kind: ContainerKind) -> &'static str {
    match kind {
        ContainerKind::Main => "container",
        ContainerKind::Init | ContainerKind::Sidecar => "init_container",
        ContainerKind::Ephemeral => "ephemeral_container",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{containers::tests::pod, telemetry::Metrics};

    #[test]
    fn lives_are_counted_under_upstreams_names() {
        let metrics = Metrics::new().unwrap();
        let lives = PodLives::new(metrics.registry()).unwrap();
        lives.pod_started(&pod("{}"), true);
        lives.pod_started(&pod(r#"{"hostUsers": false}"#), false);
        lives.sandbox_run("kata", Duration::from_millis(20), false);
        lives.container_started(ContainerKind::Main, None);
        lives.container_started(ContainerKind::Sidecar, Some("ErrImagePull"));
        lives.cgroup("create", Duration::from_millis(1));
        let status = |value| serde_json::from_value::<PodStatus>(value).unwrap();
        let running = status(json!({"containerStatuses": [{"name": "c", "image": "i", "imageID": "", "ready": true,
            "restartCount": 0, "state": {"running": {}}}]}));
        let ended = status(json!({"containerStatuses": [{"name": "c", "image": "i", "imageID": "", "ready": false,
            "restartCount": 0, "state": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}}]}));
        lives.status_changed(&running, &ended);
        lives.status_changed(&ended, &ended);
        let text = metrics.render();
        for line in [
            "kubelet_started_pods_total 2",
            "kubelet_started_pods_errors_total 1",
            "kubelet_started_user_namespaced_pods_total 1",
            "kubelet_started_user_namespaced_pods_errors_total 1",
            r#"kubelet_run_podsandbox_duration_seconds_count{runtime_handler="kata"} 1"#,
            r#"kubelet_run_podsandbox_errors_total{runtime_handler="kata"} 1"#,
            r#"kubelet_started_containers_total{container_type="container"} 1"#,
            r#"kubelet_started_containers_total{container_type="init_container"} 1"#,
            r#"kubelet_started_containers_errors_total{code="ErrImagePull",container_type="init_container"} 1"#,
            r#"kubelet_terminated_containers_total{container_type="container",exit_code="137",reason="OOMKilled"} 1"#,
            r#"kubelet_cgroup_manager_duration_seconds_count{operation_type="create"} 1"#,
            "kubelet_orphaned_runtime_pods_total 0",
            r#"kubelet_restarted_pods_total{static="true"} 0"#,
        ] {
            assert!(text.lines().any(|have| have == line), "no line {line}");
        }
    }
}
