//! What the CRI room counts: upstream's names where upstream has one, `rkubelet_` where it has not.

use std::time::Duration;

use prometheus::{
    DEFAULT_BUCKETS, Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, Opts, Registry,
    core::Collector, exponential_buckets,
};

/// All metrics of this room; make it once and share it.
#[derive(Debug, Clone)]
pub struct CriMetrics {
    operations: IntCounterVec,
    operation_seconds: HistogramVec,
    operation_errors: IntCounterVec,
    pub(super) relists: IntCounterVec,
    pub(super) relist_surprises: IntCounter,
    pub(super) relist_seconds: Histogram,
    pub(super) relist_interval_seconds: Histogram,
    pub(super) last_seen_seconds: Gauge,
    pub(super) stream_errors: IntCounter,
    pub(super) streams_opened: IntCounter,
}

impl CriMetrics {
    /// Registers everything; fails only if a name is taken.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        fn add<C: Collector + Clone + 'static>(
            registry: &Registry,
            made: Result<C, prometheus::Error>,
        ) -> Result<C, prometheus::Error> {
            let collector = made?;
            registry.register(Box::new(collector.clone()))?;
            Ok(collector)
        }
        let seconds = |name: &str, help: &str| {
            Histogram::with_opts(HistogramOpts::new(name, help).buckets(DEFAULT_BUCKETS.to_vec()))
        };
        Ok(Self {
            operations: add(
                registry,
                IntCounterVec::new(
                    Opts::new("kubelet_runtime_operations_total", "Runtime calls made, by operation."),
                    &["operation_type"],
                ),
            )?,
            operation_seconds: add(
                registry,
                HistogramVec::new(
                    HistogramOpts::new(
                        "kubelet_runtime_operations_duration_seconds",
                        "How long runtime calls took, by operation.",
                    )
                    .buckets(exponential_buckets(0.005, 2.5, 14)?),
                    &["operation_type"],
                ),
            )?,
            operation_errors: add(
                registry,
                IntCounterVec::new(
                    Opts::new("kubelet_runtime_operations_errors_total", "Runtime calls that failed, by operation."),
                    &["operation_type"],
                ),
            )?,
            relists: add(
                registry,
                IntCounterVec::new(
                    Opts::new(
                        "rkubelet_relists_total",
                        "Full lists of what the runtime runs, by what made them necessary.",
                    ),
                    &["reason"],
                ),
            )?,
            relist_surprises: add(
                registry,
                IntCounter::new(
                    "rkubelet_relist_surprises_total",
                    "Pods in which a safety-net relist found something that no event had told.",
                ),
            )?,
            relist_seconds: add(
                registry,
                seconds("kubelet_pleg_relist_duration_seconds", "How long a full list took."),
            )?,
            relist_interval_seconds: add(
                registry,
                seconds("kubelet_pleg_relist_interval_seconds", "Time from one full list to the next."),
            )?,
            last_seen_seconds: add(
                registry,
                Gauge::new("kubelet_pleg_last_seen_seconds", "Unix time at which the runtime last told what it runs."),
            )?,
            stream_errors: add(
                registry,
                IntCounter::new("kubelet_evented_pleg_connection_error_count", "Event streams that failed or broke."),
            )?,
            streams_opened: add(
                registry,
                IntCounter::new("kubelet_evented_pleg_connection_success_count", "Event streams opened."),
            )?,
        })
    }

    /// One call ended.
    pub(super) fn operation(&self, operation: &str, took: Duration, failed: bool) {
        self.operations.with_label_values(&[operation]).inc();
        self.operation_seconds.with_label_values(&[operation]).observe(took.as_secs_f64());
        if failed {
            self.operation_errors.with_label_values(&[operation]).inc();
        }
    }
}
