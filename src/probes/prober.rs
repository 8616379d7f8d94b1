//! One run of a probe: dispatch to its kind, immediate retries on errors, the event (contract B-07, B-08).

use std::sync::Arc;

use async_trait::async_trait;
use k8s_openapi::{api::core::v1 as corev1, apimachinery::pkg::util::intstr::IntOrString};

use super::{ProbeKind, ProbeTarget, exec, grpc, http, tcp};
use crate::{
    cri::RuntimeService,
    events::{EventSink, EventType, Regarding},
    pods::{ContainerRef, Pod},
};

/// A run that errors is tried so often in all, at once (contract B-08).
const ATTEMPTS: usize = 3;

/// What a probe found out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Outcome {
    Success,
    /// A pass that deserves a word: a redirect to another host.
    Warning(String),
    Failure(String),
}

/// The probe could not be carried out: nothing is known, nothing is counted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(super) struct ProbeError {
    /// The word in the event's message: `unknown` or `failure`.
    pub state: &'static str,
    pub message: String,
}

impl ProbeError {
    pub fn unknown(message: impl Into<String>) -> Self {
        Self { state: "unknown", message: message.into() }
    }
    pub fn failure(message: impl Into<String>) -> Self {
        Self { state: "failure", message: message.into() }
    }
}

/// Tries a probe once. The seam where tests put scripted results.
#[async_trait]
pub(super) trait Attempt: Send + Sync + 'static {
    async fn attempt(
        &self,
        container: &corev1::Container,
        target: &ProbeTarget,
        probe: &corev1::Probe,
    ) -> Result<Outcome, ProbeError>;
}

/// Tries a probe on the real container.
pub(super) struct OnContainer {
    pub runtime: Arc<dyn RuntimeService>,
}

#[async_trait]
impl Attempt for OnContainer {
    async fn attempt(
        &self,
        container: &corev1::Container,
        target: &ProbeTarget,
        probe: &corev1::Probe,
    ) -> Result<Outcome, ProbeError> {
        if let Some(action) = &probe.exec {
            exec::attempt(&*self.runtime, action, container, &target.container_id, probe).await
        } else if let Some(action) = &probe.http_get {
            http::attempt(action, container, target.host, probe).await
        } else if let Some(action) = &probe.tcp_socket {
            tcp::attempt(action, container, target.host, probe).await
        } else if let Some(action) = &probe.grpc {
            grpc::attempt(action, target.host, probe).await
        } else {
            Err(ProbeError::unknown(format!("missing probe handler for {}", container.name)))
        }
    }
}

/// Runs a probe with its immediate retries and raises its event. `None` when nothing is known: the result is thrown away.
pub(super) async fn run(
    prober: &dyn Attempt,
    events: &dyn EventSink,
    pod: &Pod,
    container: ContainerRef<'_>,
    target: &ProbeTarget,
    kind: ProbeKind,
    probe: &corev1::Probe,
) -> Option<bool> {
    let mut result = prober.attempt(container.spec, target, probe).await;
    for _ in 1..ATTEMPTS {
        if result.is_ok() {
            break;
        }
        result = prober.attempt(container.spec, target, probe).await;
    }
    let warn = |reason: &str, message: String| {
        events.event(Regarding::container(pod, container), EventType::Warning, reason, message);
    };
    let word = kind.as_str();
    match result {
        Ok(Outcome::Success) => Some(true),
        Ok(Outcome::Warning(text)) => {
            warn("ProbeWarning", format!("{word} probe warning: {text}"));
            Some(true)
        }
        Ok(Outcome::Failure(text)) => {
            tracing::debug!(pod = %pod.described(), container = container.name(), probe = word, output = %text, "probe failed");
            warn("Unhealthy", format!("{word} probe failed: {text}"));
            Some(false)
        }
        Err(e) => {
            tracing::debug!(pod = %pod.described(), container = container.name(), probe = word, error = %e, "probe errored");
            warn("Unhealthy", format!("{word} probe errored and resulted in {} state: {e}", e.state));
            None
        }
    }
}

/// One try without retries that leaves no trace unless it passes.
pub(super) async fn run_quietly(
    prober: &dyn Attempt,
    events: &dyn EventSink,
    pod: &Pod,
    container: ContainerRef<'_>,
    target: &ProbeTarget,
    kind: ProbeKind,
    probe: &corev1::Probe,
) -> bool {
    match prober.attempt(container.spec, target, probe).await {
        Ok(Outcome::Success) => true,
        Ok(Outcome::Warning(text)) => {
            let message = format!("{} probe warning: {text}", kind.as_str());
            events.event(Regarding::container(pod, container), EventType::Warning, "ProbeWarning", message);
            true
        }
        Ok(Outcome::Failure(_)) | Err(_) => false,
    }
}

/// A port by number or by the name it has in `container.ports` (contract B-03).
pub(crate) fn resolve_port(port: &IntOrString, container: &corev1::Container) -> Result<u16, String> {
    let number = match port {
        IntOrString::Int(number) => *number,
        IntOrString::String(name) => container
            .ports
            .iter()
            .flatten()
            .find(|p| p.name.as_deref() == Some(name))
            .map(|p| p.container_port)
            .ok_or_else(|| format!("port {name:?} not found"))?,
    };
    u16::try_from(number).ok().filter(|p| *p > 0).ok_or_else(|| format!("invalid port number: {number}"))
}
