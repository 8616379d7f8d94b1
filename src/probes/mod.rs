//! Probes: liveness, readiness and startup, each by exec, httpGet, tcpSocket or grpc (contract section 6).
//!
//! In: which containers run, from the pod's worker. Out: verdicts, read by the worker and the status; a wake when one changes.

mod ports;

pub use ports::{ContainerVerdicts, Liveness, PodProbes, ProbeTarget, Readiness, Startup};
