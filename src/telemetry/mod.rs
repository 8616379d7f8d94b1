//! Telemetry: what the node says about itself, as metrics and as log lines.
//!
//! Rooms register their metrics in [`Metrics`] and write `tracing` events; `/metrics` renders the first, the log room
//! writes the second to stderr as the Go kubelet does. Contract S-24, Appendix D. Touches /proc/self and stderr.

mod logging;
mod metrics;
mod pod_lives;
mod process;

pub use logging::{Verbosity, init_logging, report_failed_start};
pub use metrics::{Metrics, WorkerMetrics};
pub use pod_lives::PodLives;
