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

/// One probe of one container, with what it takes to run it.
pub(super) struct Probing<'a> {
    pub prober: &'a dyn Attempt,
    pub events: &'a dyn EventSink,
    pub pod: &'a Pod,
    pub container: ContainerRef<'a>,
    pub target: &'a ProbeTarget,
    pub kind: ProbeKind,
    pub probe: &'a corev1::Probe,
}

impl Probing<'_> {
    /// A run with its immediate retries and its event. `None` when nothing is known: the result is thrown away.
    pub async fn run(&self) -> Option<bool> {
        let mut result = self.attempt().await;
        for _ in 1..ATTEMPTS {
            if result.is_ok() {
                break;
            }
            result = self.attempt().await;
        }
        let (pod, container, word) = (self.pod, self.container.name(), self.kind.as_str());
        match result {
            Ok(Outcome::Success) => Some(true),
            Ok(Outcome::Warning(text)) => Some(self.pass_with_a_word(&text)),
            Ok(Outcome::Failure(text)) => {
                tracing::debug!(pod = %pod.described(), container, probe = word, output = %text, "probe failed");
                self.warn("Unhealthy", format!("{word} probe failed: {text}"));
                Some(false)
            }
            Err(e) => {
                tracing::debug!(pod = %pod.described(), container, probe = word, error = %e, "probe errored");
                self.warn("Unhealthy", format!("{word} probe errored and resulted in {} state: {e}", e.state));
                None
            }
        }
    }

    /// One try without retries that leaves no trace unless it passes.
    pub async fn try_quietly(&self) -> bool {
        match self.attempt().await {
            Ok(Outcome::Success) => true,
            Ok(Outcome::Warning(text)) => self.pass_with_a_word(&text),
            Ok(Outcome::Failure(_)) | Err(_) => false,
        }
    }

    async fn attempt(&self) -> Result<Outcome, ProbeError> {
        self.prober.attempt(self.container.spec, self.target, self.probe).await
    }

    fn pass_with_a_word(&self, text: &str) -> bool {
        self.warn("ProbeWarning", format!("{} probe warning: {text}", self.kind.as_str()));
        true
    }

    fn warn(&self, reason: &str, message: String) {
        self.events.event(Regarding::container(self.pod, self.container), EventType::Warning, reason, message);
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
