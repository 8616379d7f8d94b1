//! `prober_probe_total` and `prober_probe_duration_seconds`, in a registry of their own for `/metrics/probes` (contract B-11).

use std::time::Duration;

use prometheus::{HistogramOpts, HistogramVec, IntCounterVec, Opts, Registry, TextEncoder};

use super::ProbeKind;
use crate::pods::Pod;

const SUCCESSFUL: &str = "successful";
const FAILED: &str = "failed";
const UNKNOWN: &str = "unknown";

pub(super) struct ProbeMetrics {
    registry: Registry,
    total: IntCounterVec,
    duration: HistogramVec,
}

impl ProbeMetrics {
    pub fn new() -> Result<Self, prometheus::Error> {
        let total = IntCounterVec::new(
            Opts::new(
                "prober_probe_total",
                "[BETA] Cumulative number of a liveness, readiness or startup probe for a container by result.",
            ),
            &["probe_type", "result", "container", "pod", "namespace", "pod_uid"],
        )?;
        let duration = HistogramVec::new(
            HistogramOpts::new("prober_probe_duration_seconds", "[ALPHA] Duration in seconds for a probe response."),
            &["probe_type", "container", "pod", "namespace"],
        )?;
        let registry = Registry::new();
        registry.register(Box::new(total.clone()))?;
        registry.register(Box::new(duration.clone()))?;
        Ok(Self { registry, total, duration })
    }

    /// Counts a result that was not thrown away. Only passes have a duration, as upstream.
    pub fn observe(&self, pod: &Pod, container: &str, kind: ProbeKind, passed: bool, took: Duration) {
        let result = if passed { SUCCESSFUL } else { FAILED };
        let (name, namespace) = (pod.name(), pod.namespace());
        self.total.with_label_values(&[kind.as_str(), result, container, name, namespace, pod.uid().as_str()]).inc();
        if passed {
            self.duration.with_label_values(&[kind.as_str(), container, name, namespace]).observe(took.as_secs_f64());
        }
    }

    /// Drops the series of a pod that is gone.
    pub fn forget(&self, pod: &Pod) {
        let (name, namespace, uid) = (pod.name(), pod.namespace(), pod.uid().as_str());
        for container in pod.containers() {
            for kind in ProbeKind::ALL {
                for result in [SUCCESSFUL, FAILED, UNKNOWN] {
                    let labels = [kind.as_str(), result, container.name(), name, namespace, uid];
                    // Most of these never existed.
                    let _ = self.total.remove_label_values(&labels);
                }
                let _ = self.duration.remove_label_values(&[kind.as_str(), container.name(), name, namespace]);
            }
        }
    }

    /// Prometheus text.
    pub fn text(&self) -> String {
        TextEncoder::new().encode_to_string(&self.registry.gather()).unwrap_or_default()
    }
}
