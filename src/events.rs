//! Kubernetes events as the rest of the agent sees them: a sink that never blocks and never fails its caller.
//!
//! The wording of an event belongs to the room that raises it (contract appendix C); delivery, aggregation and rate limits
//! belong to `api::recorder`.

use crate::pods::{ContainerRef, Pod};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventType {
    Normal,
    Warning,
}

impl EventType {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Normal => "Normal",
            Self::Warning => "Warning",
        }
    }
}

/// What the event is about.
#[derive(Debug, Clone)]
pub enum Regarding {
    Pod(Pod),
    /// A container of a pod, with its fieldPath `spec.containers{name}` (contract P-45).
    Container {
        pod: Pod,
        field_path: String,
    },
    /// This node. The involved object's UID is the node's *name*, as upstream does it (contract N-18).
    Node,
}

impl Regarding {
    pub fn container(pod: &Pod, container: ContainerRef<'_>) -> Self {
        Self::Container { pod: pod.clone(), field_path: container.field_path() }
    }
}

/// Takes events. Never blocks; drops (and counts) when the queue is full.
pub trait EventSink: Send + Sync + 'static {
    fn event(&self, regarding: Regarding, kind: EventType, reason: &str, message: String);
}

/// One event as recorded by [`MemoryEvents`].
#[derive(Debug, Clone)]
pub struct RecordedEvent {
    pub regarding: Regarding,
    pub kind: EventType,
    pub reason: String,
    pub message: String,
}

/// Keeps events in memory: for tests.
#[derive(Debug, Default)]
pub struct MemoryEvents(std::sync::Mutex<Vec<RecordedEvent>>);

impl MemoryEvents {
    pub fn all(&self) -> Vec<RecordedEvent> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }
    pub fn has(&self, reason: &str, message: &str) -> bool {
        self.all().iter().any(|e| e.reason == reason && e.message.contains(message))
    }
}

impl EventSink for MemoryEvents {
    fn event(&self, regarding: Regarding, kind: EventType, reason: &str, message: String) {
        let event = RecordedEvent { regarding, kind, reason: reason.to_owned(), message };
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(event);
    }
}
