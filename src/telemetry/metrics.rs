//! The metrics registry of the process, its text form, and the metrics of a pod's start.
//!
//! Rooms keep their own metrics and register them in [`Metrics::registry`]. Names, labels and buckets are upstream's
//! where upstream has the metric; what only exists here starts with `rkubelet_`. Appendix D.1.

use std::time::Duration;

use prometheus::core::Collector;
use prometheus::{
    DEFAULT_BUCKETS, Error, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
    Opts, Registry, TextEncoder, exponential_buckets,
};

use super::pod_lives::PodLives;
use super::process::ProcessCollector;
use crate::cli::version_info;
use crate::config::{FeatureGates, Stage};
use crate::wake::Cause;

/// Upstream's buckets of a pod's start, in seconds.
const POD_START_BUCKETS: [f64; 25] = [
    0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 20.0, 30.0, 45.0, 60.0, 120.0, 180.0, 240.0, 300.0, 360.0, 480.0,
    600.0, 900.0, 1200.0, 1800.0, 2700.0, 3600.0,
];

/// The registry behind `/metrics`.
#[derive(Debug, Clone)]
pub struct Metrics {
    registry: Registry,
}

impl Metrics {
    /// A registry with the process and the build in it. Fails only if a name is taken.
    pub fn new() -> Result<Self, Error> {
        let registry = Registry::new();
        registry.register(Box::new(ProcessCollector::new()?))?;
        register_build_info(&registry)?;
        Ok(Self { registry })
    }

    /// Where rooms register.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// One `kubernetes_feature_enabled` per gate.
    pub fn register_feature_gates(&self, gates: &FeatureGates) -> Result<(), Error> {
        let opts = Opts::new(
            "kubernetes_feature_enabled",
            "[BETA] This metric records the data about the stage and enablement of a k8s feature.",
        );
        let enabled = register(&self.registry, IntGaugeVec::new(opts, &["name", "stage"]))?;
        for (gate, on) in gates.all() {
            let stage = match gate.stage {
                Stage::Alpha => "ALPHA",
                Stage::Beta => "BETA",
                Stage::Ga => "",
                Stage::Deprecated => "DEPRECATED",
            };
            enabled.with_label_values(&[gate.name, stage]).set(i64::from(on));
        }
        Ok(())
    }

    /// The node's name and the version of its cgroup hierarchy, 1 or 2.
    pub fn register_node(&self, name: &str, cgroup_v2: bool) -> Result<(), Error> {
        let opts = Opts::new("kubelet_node_name", "[ALPHA] The node's name. The count is always 1.");
        register(&self.registry, IntGaugeVec::new(opts, &["node"]))?.with_label_values(&[name]).set(1);
        let help = "[ALPHA] cgroup version on the hosts.";
        register(&self.registry, IntGauge::new("kubelet_cgroup_version", help))?.set(if cgroup_v2 { 2 } else { 1 });
        Ok(())
    }

    /// Everything in the Prometheus text format.
    pub fn render(&self) -> String {
        TextEncoder::new().encode_to_string(&self.registry.gather()).unwrap_or_else(|error| {
            tracing::error!(%error, "Writing the metrics failed");
            String::new()
        })
    }
}

pub(super) fn register<C: Collector + Clone + 'static>(
    registry: &Registry,
    made: Result<C, Error>,
) -> Result<C, Error> {
    let collector = made?;
    registry.register(Box::new(collector.clone()))?;
    Ok(collector)
}

fn register_build_info(registry: &Registry) -> Result<(), Error> {
    const LABELS: [(&str, &str); 9] = [
        ("build_date", "buildDate"),
        ("compiler", "compiler"),
        ("git_commit", "gitCommit"),
        ("git_tree_state", "gitTreeState"),
        ("git_version", "gitVersion"),
        ("go_version", "goVersion"),
        ("major", "major"),
        ("minor", "minor"),
        ("platform", "platform"),
    ];
    let opts = Opts::new(
        "kubernetes_build_info",
        "[ALPHA] A metric with a constant '1' value labeled by major, minor, git version, git commit, git tree state, \
         build date, Go version, and compiler from which Kubernetes was built, and platform on which it is running.",
    );
    let info = version_info();
    let gauge = register(registry, IntGaugeVec::new(opts, &LABELS.map(|(label, _)| label)))?;
    gauge.with_label_values(&LABELS.map(|(_, field)| info[field].as_str().unwrap_or_default())).set(1);
    Ok(())
}

/// What pod workers count. Make it once and share it.
#[derive(Debug, Clone)]
pub struct WorkerMetrics {
    wakes: IntCounterVec,
    actions: HistogramVec,
    phases: HistogramVec,
    turns: HistogramVec,
    worker_start: Histogram,
    pod_start: Histogram,
    pod_start_sli: Histogram,
    pod_start_total: Histogram,
    http_fallbacks: IntCounter,
    sleeps_cut_short: IntCounter,
    pub lives: PodLives,
}

impl WorkerMetrics {
    /// Registers everything; fails only if a name is taken.
    pub fn new(registry: &Registry) -> Result<Self, Error> {
        let fine = exponential_buckets(0.001, 2.0, 17)?;
        let pod_start = |name: &str, help: &str| {
            register(registry, Histogram::with_opts(HistogramOpts::new(name, help).buckets(POD_START_BUCKETS.to_vec())))
        };
        let by_label = |name: &str, help: &str, buckets: Vec<f64>, label: &str| {
            register(registry, HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets), &[label]))
        };
        Ok(Self {
            lives: PodLives::new(registry)?,
            wakes: register(
                registry,
                IntCounterVec::new(Opts::new("rkubelet_pod_wakes_total", "Pod workers woken, by cause."), &["cause"]),
            )?,
            actions: by_label(
                "rkubelet_pod_action_seconds",
                "How long an action of a pod worker took, by action.",
                fine.clone(),
                "action",
            )?,
            phases: by_label(
                "rkubelet_pod_start_phase_seconds",
                "How long each phase of a pod's start took.",
                fine,
                "phase",
            )?,
            turns: by_label(
                "kubelet_pod_worker_duration_seconds",
                "[ALPHA] Duration in seconds to sync a single pod. Broken down by operation type: create, update, or sync",
                DEFAULT_BUCKETS.to_vec(),
                "operation_type",
            )?,
            worker_start: register(
                registry,
                Histogram::with_opts(HistogramOpts::new(
                    "kubelet_pod_worker_start_duration_seconds",
                    "[ALPHA] Duration in seconds from kubelet seeing a pod to starting a worker.",
                )),
            )?,
            pod_start: pod_start(
                "kubelet_pod_start_duration_seconds",
                "[ALPHA] Duration in seconds from kubelet seeing a pod for the first time to the pod starting to run",
            )?,
            pod_start_sli: pod_start(
                "kubelet_pod_start_sli_duration_seconds",
                "[ALPHA] Duration in seconds to start a pod, excluding time to pull images and run init containers, \
                 measured from pod creation timestamp to when all its containers are reported as started and observed \
                 via watch",
            )?,
            pod_start_total: pod_start(
                "kubelet_pod_start_total_duration_seconds",
                "[ALPHA] Duration in seconds to start a pod since creation, including time to pull images and run init \
                 containers, measured from pod creation timestamp to when all its containers are reported as started \
                 and observed via watch",
            )?,
            http_fallbacks: register(
                registry,
                IntCounter::new(
                    "kubelet_lifecycle_handler_http_fallbacks_total",
                    "[ALPHA] The number of times lifecycle handlers successfully fell back to http from https.",
                ),
            )?,
            sleeps_cut_short: register(
                registry,
                IntCounter::new(
                    "kubelet_sleep_action_terminated_early_total",
                    "[ALPHA] The number of times lifecycle sleep handler got terminated before it finishes",
                ),
            )?,
        })
    }

    /// An https hook was answered over plain HTTP (contract P-29).
    pub fn hook_fell_back(&self) {
        self.http_fallbacks.inc();
    }

    /// The grace period ended before a sleep hook did (contract P-30).
    pub fn sleep_cut_short(&self) {
        self.sleeps_cut_short.inc();
    }

    /// A worker woke for this cause.
    pub fn wake(&self, cause: Cause) {
        self.wakes.with_label_values(&[cause.as_str()]).inc();
    }

    /// An action ended.
    pub fn action(&self, action: &str, took: Duration) {
        self.actions.with_label_values(&[action]).observe(took.as_secs_f64());
    }

    /// A phase of a start ended: volumes, image, sandbox, create, start.
    pub fn start_phase(&self, phase: &str, took: Duration) {
        self.phases.with_label_values(&[phase]).observe(took.as_secs_f64());
    }

    /// A worker's turn ended; `operation` is `create`, `update` or `sync`.
    pub fn turn(&self, operation: &str, took: Duration) {
        self.turns.with_label_values(&[operation]).observe(took.as_secs_f64());
    }

    /// From seeing a pod to its worker's first turn.
    pub fn worker_started(&self, took: Duration) {
        self.worker_start.observe(took.as_secs_f64());
    }

    /// From seeing a pod to its running.
    pub fn pod_started(&self, took: Duration) {
        self.pod_start.observe(took.as_secs_f64());
    }

    /// From the pod's creation to all containers started and seen: without pulls and init containers, and with them.
    pub fn pod_start_observed(&self, without_pulls: Duration, total: Duration) {
        self.pod_start_sli.observe(without_pulls.as_secs_f64());
        self.pod_start_total.observe(total.as_secs_f64());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn worker_metrics_have_upstream_names_and_buckets() {
        let metrics = Metrics::new().unwrap();
        let worker = WorkerMetrics::new(metrics.registry()).unwrap();
        worker.wake(Cause::Runtime);
        worker.action("create_sandbox", Duration::from_millis(30));
        worker.start_phase("image", Duration::from_millis(3));
        worker.turn("create", Duration::from_millis(7));
        worker.worker_started(Duration::from_millis(1));
        worker.pod_started(Duration::from_secs(1));
        worker.pod_start_observed(Duration::from_secs(1), Duration::from_secs(7));
        let text = metrics.render();
        for line in [
            "rkubelet_pod_wakes_total{cause=\"runtime\"} 1",
            "rkubelet_pod_action_seconds_count{action=\"create_sandbox\"} 1",
            "rkubelet_pod_start_phase_seconds_bucket{phase=\"image\",le=\"0.004\"} 1",
            "kubelet_pod_worker_duration_seconds_bucket{operation_type=\"create\",le=\"0.01\"} 1",
            "kubelet_pod_worker_start_duration_seconds_bucket{le=\"0.005\"} 1",
            "kubelet_pod_start_duration_seconds_bucket{le=\"0.5\"} 0",
            "kubelet_pod_start_duration_seconds_bucket{le=\"1\"} 1",
            "kubelet_pod_start_sli_duration_seconds_bucket{le=\"3600\"} 1",
            "kubelet_pod_start_total_duration_seconds_bucket{le=\"6\"} 0",
        ] {
            assert!(text.lines().any(|have| have == line), "no line {line}");
        }
    }

    #[test]
    fn the_node_is_a_metric() {
        for (v2, version) in [(false, 1), (true, 2)] {
            let metrics = Metrics::new().unwrap();
            metrics.register_node("node-1", v2).unwrap();
            let text = metrics.render();
            assert!(text.contains(&format!("\nkubelet_cgroup_version {version}\n")));
            assert!(text.contains("\nkubelet_node_name{node=\"node-1\"} 1\n"));
        }
    }

    #[test]
    fn gates_and_build_are_metrics() {
        let metrics = Metrics::new().unwrap();
        metrics.register_feature_gates(&FeatureGates::default()).unwrap();
        let text = metrics.render();
        assert!(text.contains("kubernetes_feature_enabled{name=\"EventedPLEG\",stage=\"ALPHA\"} 0"));
        assert!(text.contains("kubernetes_feature_enabled{name=\"NodeSwap\",stage=\"\"} 1"));
        assert!(text.lines().any(|line| line.starts_with("kubernetes_build_info{") && line.ends_with(" 1")));
    }
}
