//! What the API clients say about themselves: upstream's `rest_client_*` and this room's own gauges (contract appendix D).
//!
//! Registered once, when there is a registry; until then nothing is counted and nothing fails.

use std::{sync::OnceLock, time::Duration};

use prometheus::{
    Error, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, Opts, Registry, core::Collector,
};

const SECONDS: [f64; 12] = [0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0];

/// Shared by all clients of one agent.
#[derive(Default)]
pub(super) struct ApiMetrics(OnceLock<Registered>);

struct Registered {
    requests: IntCounterVec,
    request_seconds: HistogramVec,
    limiter_seconds: HistogramVec,
    watches: IntGauge,
    events_dropped: IntCounter,
}

fn register<C: Collector + Clone + 'static>(registry: &Registry, made: Result<C, Error>) -> Result<C, Error> {
    let collector = made?;
    registry.register(Box::new(collector.clone()))?;
    Ok(collector)
}

impl ApiMetrics {
    pub(super) fn register(&self, registry: &Registry) -> Result<(), Error> {
        let seconds = |name: &str, help: &str| {
            HistogramVec::new(HistogramOpts::new(name, help).buckets(SECONDS.to_vec()), &["host", "verb"])
        };
        let requests = Opts::new(
            "rest_client_requests_total",
            "[ALPHA] Number of HTTP requests, partitioned by status code, method, and host.",
        );
        let registered = Registered {
            requests: register(registry, IntCounterVec::new(requests, &["code", "host", "method"]))?,
            request_seconds: register(
                registry,
                seconds(
                    "rest_client_request_duration_seconds",
                    "[ALPHA] Request latency in seconds. Broken down by verb, and host.",
                ),
            )?,
            limiter_seconds: register(
                registry,
                seconds(
                    "rest_client_rate_limiter_duration_seconds",
                    "[ALPHA] Client side rate limiter latency in seconds. Broken down by verb, and host.",
                ),
            )?,
            watches: register(registry, IntGauge::new("rkubelet_api_watches", "Watches on the apiserver."))?,
            events_dropped: register(
                registry,
                IntCounter::new("rkubelet_events_dropped_total", "Events dropped because their queue was full."),
            )?,
        };
        // A second registration would have failed above, for its names.
        self.0.set(registered).ok();
        Ok(())
    }

    /// One exchange; `code` is `None` when no answer came.
    pub(super) fn exchanged(&self, host: &str, method: &str, code: Option<u16>, took: Duration) {
        if let Some(metrics) = self.0.get() {
            let code = code.map_or_else(|| "<error>".to_owned(), |code| code.to_string());
            metrics.requests.with_label_values(&[code.as_str(), host, method]).inc();
            metrics.request_seconds.with_label_values(&[host, method]).observe(took.as_secs_f64());
        }
    }

    pub(super) fn limited(&self, host: &str, method: &str, waited: Duration) {
        if let Some(metrics) = self.0.get() {
            metrics.limiter_seconds.with_label_values(&[host, method]).observe(waited.as_secs_f64());
        }
    }

    pub(super) fn watches(&self, open: i64) {
        if let Some(metrics) = self.0.get() {
            metrics.watches.set(open);
        }
    }

    pub(super) fn event_dropped(&self) {
        if let Some(metrics) = self.0.get() {
            metrics.events_dropped.inc();
        }
    }
}
