//! Probes: liveness, readiness and startup, each by exec, httpGet, tcpSocket or grpc (contract section 6).
//!
//! In: which containers run, from the pod's worker. Out: verdicts, read by the worker and the status; a wake when one changes.
//! `decide` and `schedule` are pure; `tracking` owns one task per (container ID, probe); `prober` tries once, through `http`,
//! `tcp`, `grpc` and `exec`. Connections live for one attempt. Nothing here kills or restarts anything.
//!
//! *Eager first readiness* (ours, `--eager-first-readiness`): until a readiness or startup probe has passed once, it is tried between its regular
//! runs too, 50, 100, 200 ms … apart. Such a try that fails leaves no trace: no failure counted, no event, no metric. The one that passes
//! is a run like any other, and the period counts from it. Never by exec, never two at once, never sooner than the last try took.

mod decide;
mod exec;
mod grpc;
pub(crate) mod http;
mod metrics;
mod net_error;
mod ports;
mod prober;
mod schedule;
mod tcp;
mod tracking;
pub(crate) mod url;

pub use decide::ProbeKind;
pub use ports::{ContainerVerdicts, Liveness, PodProbes, ProbeSettings, ProbeTarget, Readiness, Startup};
pub use tracking::NodeProbes;

/// Major and minor of the Kubernetes version, as upstream writes them in a User-Agent: `kube-probe/1.37`.
pub(crate) fn kubernetes_minor() -> &'static str {
    let version = crate::cli::KUBERNETES_VERSION.trim_start_matches('v');
    version.rsplit_once('.').map_or(version, |(minor, _)| minor)
}
