//! What this room counts, under upstream's names (appendix D).

use std::time::Duration;

use prometheus::{
    Error, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    core::Collector,
};

const PULL_BUCKETS: [f64; 18] = [
    1.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 180.0, 240.0, 300.0, 360.0, 480.0, 600.0, 900.0, 1200.0, 1800.0, 2700.0,
    3600.0,
];
const MB: u64 = 1 << 20;
const GB: u64 = 1 << 30;
/// Label by the bytes that an image has more than.
const SIZES: [(u64, &str); 12] = [
    (0, "0-10MB"),
    (10 * MB, "10MB-100MB"),
    (100 * MB, "100MB-500MB"),
    (500 * MB, "500MB-1GB"),
    (GB, "1GB-5GB"),
    (5 * GB, "5GB-10GB"),
    (10 * GB, "10GB-20GB"),
    (20 * GB, "20GB-30GB"),
    (30 * GB, "30GB-40GB"),
    (40 * GB, "40GB-60GB"),
    (60 * GB, "60GB-100GB"),
    (100 * GB, "GT100GB"),
];

/// Cheap to clone; clones count together.
#[derive(Debug, Clone)]
pub(super) struct ImageMetrics {
    ensured: IntCounterVec,
    checks: IntCounterVec,
    intents: IntGauge,
    records: IntGauge,
    pulls: HistogramVec,
    collected: IntCounterVec,
    volumes_requested: IntCounter,
    volumes_mounted: IntCounter,
    volumes_failed: IntCounter,
    plugin_errors: IntCounterVec,
    plugin_durations: HistogramVec,
    provider_config: IntGaugeVec,
}

impl ImageMetrics {
    /// Fails only if a name is taken.
    pub(super) fn new(registry: &Registry) -> Result<Self, Error> {
        let metrics = Self::made()?;
        let collectors: [Box<dyn Collector>; 12] = [
            Box::new(metrics.ensured.clone()),
            Box::new(metrics.checks.clone()),
            Box::new(metrics.intents.clone()),
            Box::new(metrics.records.clone()),
            Box::new(metrics.pulls.clone()),
            Box::new(metrics.collected.clone()),
            Box::new(metrics.volumes_requested.clone()),
            Box::new(metrics.volumes_mounted.clone()),
            Box::new(metrics.volumes_failed.clone()),
            Box::new(metrics.plugin_errors.clone()),
            Box::new(metrics.plugin_durations.clone()),
            Box::new(metrics.provider_config.clone()),
        ];
        collectors.into_iter().try_for_each(|collector| registry.register(collector))?;
        Ok(metrics)
    }

    #[cfg(test)]
    pub(super) fn unregistered() -> Self {
        Self::made().unwrap()
    }

    fn made() -> Result<Self, Error> {
        let counter = |name: &str, help: &str, labels: &[&str]| IntCounterVec::new(Opts::new(name, help), labels);
        let histogram = |name: &str, help: &str, buckets: &[f64], label: &str| {
            HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets.to_vec()), &[label])
        };
        Ok(Self {
            ensured: counter(
                "kubelet_image_manager_ensure_image_requests_total",
                "[ALPHA] Number of ensure-image requests processed by the kubelet.",
                &["pull_policy", "present_locally", "pull_required"],
            )?,
            checks: counter(
                "kubelet_imagemanager_image_mustpull_checks_total",
                "[ALPHA] Counter for how many times kubelet checked whether credentials need to be re-verified to access an image",
                &["result"],
            )?,
            intents: IntGauge::new(
                "kubelet_imagemanager_ondisk_pullintents",
                "[ALPHA] Number of ImagePullIntents stored on disk.",
            )?,
            records: IntGauge::new(
                "kubelet_imagemanager_ondisk_pulledrecords",
                "[ALPHA] Number of ImagePulledRecords stored on disk.",
            )?,
            pulls: histogram(
                "kubelet_image_pull_duration_seconds",
                "[ALPHA] Duration in seconds to pull an image.",
                &PULL_BUCKETS,
                "image_size_in_bytes",
            )?,
            collected: counter(
                "kubelet_image_garbage_collected_total",
                "[ALPHA] Total number of images garbage collected by the kubelet, whether through disk usage or image age.",
                &["reason"],
            )?,
            volumes_requested: IntCounter::new(
                "kubelet_image_volume_requested_total",
                "[BETA] Number of requested image volumes.",
            )?,
            volumes_mounted: IntCounter::new(
                "kubelet_image_volume_mounted_succeed_total",
                "[BETA] Number of successful image volume mounts.",
            )?,
            volumes_failed: IntCounter::new(
                "kubelet_image_volume_mounted_errors_total",
                "[BETA] Number of failed image volume mounts.",
            )?,
            plugin_errors: counter(
                "kubelet_credential_provider_plugin_errors_total",
                "[ALPHA] Number of errors from credential provider plugin",
                &["plugin_name"],
            )?,
            plugin_durations: histogram(
                "kubelet_credential_provider_plugin_duration",
                "[ALPHA] Duration of execution in seconds for credential provider plugin",
                prometheus::DEFAULT_BUCKETS,
                "plugin_name",
            )?,
            provider_config: IntGaugeVec::new(
                Opts::new(
                    "kubelet_credential_provider_config_info",
                    "[ALPHA] Information about the last applied credential provider configuration with hash as label",
                ),
                &["hash"],
            )?,
        })
    }

    /// `None`: it never came to knowing.
    pub(super) fn ensured(&self, policy: &str, present: Option<bool>, pull: Option<bool>) {
        let word = |known: Option<bool>| known.map_or("unknown", |yes| if yes { "true" } else { "false" });
        self.ensured.with_label_values(&[policy, word(present), word(pull)]).inc();
    }

    pub(super) fn checked(&self, result: &str) {
        self.checks.with_label_values(&[result]).inc();
    }

    pub(super) fn records(&self, intents: usize, records: usize) {
        self.intents.set(i64::try_from(intents).unwrap_or(i64::MAX));
        self.records.set(i64::try_from(records).unwrap_or(i64::MAX));
    }

    /// With waiting. `bytes` 0: unknown.
    pub(super) fn pulled(&self, bytes: u64, took: Duration) {
        self.pulls.with_label_values(&[size_label(bytes)]).observe(took.as_secs_f64());
    }

    /// `reason` is `age` or `space`.
    pub(super) fn collected(&self, reason: &str) {
        self.collected.with_label_values(&[reason]).inc();
    }

    pub(super) fn volume_requested(&self) {
        self.volumes_requested.inc();
    }

    pub(super) fn volumes_mounted(&self, count: usize, mounted: bool) {
        let counter = if mounted { &self.volumes_mounted } else { &self.volumes_failed };
        counter.inc_by(count as u64);
    }

    pub(super) fn plugin_ran(&self, plugin: &str, took: Duration, failed: bool) {
        self.plugin_durations.with_label_values(&[plugin]).observe(took.as_secs_f64());
        if failed {
            self.plugin_errors.with_label_values(&[plugin]).inc();
        }
    }

    pub(super) fn provider_config(&self, hash: &str) {
        self.provider_config.with_label_values(&[hash]).set(1);
    }
}

fn size_label(bytes: u64) -> &'static str {
    SIZES.iter().rev().find(|(above, _)| bytes > *above).map_or("N/A", |(_, label)| label)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn i02_pulls_are_timed_by_size() {
        for (bytes, label) in
            [(0, "N/A"), (1, "0-10MB"), (10 * MB, "0-10MB"), (10 * MB + 1, "10MB-100MB"), (u64::MAX, "GT100GB")]
        {
            assert_eq!(size_label(bytes), label);
        }
    }

    #[test]
    fn i11_metrics_register_once_and_count() {
        let registry = Registry::new();
        let metrics = ImageMetrics::new(&registry).unwrap();
        assert!(ImageMetrics::new(&registry).is_err());
        metrics.collected("age");
        metrics.ensured("never", Some(false), None);
        let text = prometheus::TextEncoder::new().encode_to_string(&registry.gather()).unwrap();
        assert!(text.contains(r#"kubelet_image_garbage_collected_total{reason="age"} 1"#), "{text}");
        let ensured = r#"{present_locally="false",pull_policy="never",pull_required="unknown"} 1"#;
        assert!(text.contains(ensured), "{text}");
    }
}
