//! Delivers Kubernetes events (contract P-45, S-11): [`EventSink`] for the rest of the agent, core/v1 Events for the apiserver.
//!
//! In: reasons and messages from any thread. Out: POST or PATCH on the events client, in order, by one task. The queue is bounded and
//! a full one drops (counted); while the apiserver is away the task holds the event in hand and tries it again, up to twelve times.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use http::Method;
use k8s_openapi::{
    api::core::v1::{Event, EventSource, ObjectReference},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use serde_json::json;
use tokio::{sync::mpsc, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{
    client::ApiClients,
    correlator::{Correlator, Decision},
    metrics::ApiMetrics,
    rest::{self, RestError},
};
use crate::{
    events::{EventSink, EventType, Regarding},
    pods::Pod,
    rush::Rush,
    time::{Clock, api_time},
};

const QUEUE: usize = 1000;
/// An event is written this long after it was made, and after a rush: people read events, pods wait for what else the node does then.
const YIELDS_FOR: Duration = Duration::from_millis(500);
/// But not later than this.
const YIELDS_TO_RUSH_FOR: Duration = Duration::from_secs(5);
const TRIES: u32 = 12;
const PAUSE: Duration = Duration::from_secs(10);
const COMPONENT: &str = "kubelet";
/// Longest DNS subdomain: what an object's name may be.
const LONGEST_NAME: usize = 253;

/// The node's event recorder. Cheap to share by `Arc`.
pub struct EventRecorder {
    queue: mpsc::Sender<(Event, Instant)>,
    node_name: String,
    node_uid: OnceLock<String>,
    clock: Arc<dyn Clock>,
    dropped: AtomicU64,
    metrics: Arc<ApiMetrics>,
}

impl EventRecorder {
    /// Starts the delivering task, which ends with `cancel` or with this value.
    pub fn start(
        clients: &ApiClients,
        node_name: &str,
        clock: Arc<dyn Clock>,
        rush: Rush,
        cancel: CancellationToken,
    ) -> Arc<Self> {
        let (queue, events) = mpsc::channel(QUEUE);
        let (client, correlator) = (clients.events.clone(), Correlator::new());
        let delivery = Delivery { client, clock: Arc::clone(&clock), rush, correlator };
        tokio::spawn(async move {
            tokio::select! {
                () = cancel.cancelled() => {}
                () = delivery.run(events) => {}
            }
        });
        Arc::new(Self {
            queue,
            node_name: node_name.to_owned(),
            node_uid: OnceLock::new(),
            clock,
            dropped: AtomicU64::new(0),
            metrics: Arc::clone(&clients.metrics),
        })
    }

    /// The Node object's UID, for events about the node. Before it is known they carry none, as upstream's since 1.37. The first
    /// value stays.
    pub fn set_node_uid(&self, uid: &str) {
        // A second call has nothing to add.
        self.node_uid.set(uid.to_owned()).ok();
    }

    /// Events dropped because the queue was full.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    fn make(&self, regarding: &Regarding, kind: EventType, reason: &str, message: String) -> Event {
        let involved = match regarding {
            Regarding::Pod(pod) => pod_reference(pod, None),
            Regarding::Container { pod, field_path } => pod_reference(pod, Some(field_path.clone())),
            Regarding::Node => ObjectReference {
                api_version: Some("v1".to_owned()),
                kind: Some("Node".to_owned()),
                name: Some(self.node_name.clone()),
                uid: self.node_uid.get().cloned(),
                ..ObjectReference::default()
            },
        };
        let now = self.clock.now().wall;
        let at = api_time(now);
        let metadata = ObjectMeta {
            name: Some(event_name(involved.name.as_deref().unwrap_or_default(), now.as_nanosecond())),
            namespace: Some(involved.namespace.clone().unwrap_or_else(|| "default".to_owned())),
            ..ObjectMeta::default()
        };
        Event {
            metadata,
            involved_object: involved,
            type_: Some(kind.as_str().to_owned()),
            reason: Some(reason.to_owned()),
            message: Some(message),
            count: Some(1),
            first_timestamp: Some(at.clone()),
            last_timestamp: Some(at),
            source: Some(EventSource { component: Some(COMPONENT.to_owned()), host: Some(self.node_name.clone()) }),
            reporting_component: Some(COMPONENT.to_owned()),
            reporting_instance: Some(self.node_name.clone()),
            ..Event::default()
        }
    }
}

impl EventSink for EventRecorder {
    fn event(&self, regarding: Regarding, kind: EventType, reason: &str, message: String) {
        let event = self.make(&regarding, kind, reason, message);
        let made = self.clock.now().mono;
        if self.queue.try_send((event, made)).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
            self.metrics.event_dropped();
            tracing::debug!(reason, "event dropped: the queue is full");
        }
    }
}

fn pod_reference(pod: &Pod, field_path: Option<String>) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Pod".to_owned()),
        namespace: Some(pod.namespace().to_owned()),
        name: Some(pod.name().to_owned()),
        uid: Some(pod.uid().as_str().to_owned()),
        resource_version: pod.metadata().resource_version.clone(),
        field_path,
    }
}

/// `<object>.<hexadecimal nanoseconds>`, or a UUID where that would be too long.
fn event_name(object: &str, nanos: i128) -> String {
    let name = format!("{object}.{nanos:x}");
    if name.len() <= LONGEST_NAME { name } else { uuid::Uuid::new_v4().to_string() }
}

struct Delivery {
    client: kube::Client,
    clock: Arc<dyn Clock>,
    rush: Rush,
    correlator: Correlator,
}

impl Delivery {
    async fn run(mut self, mut events: mpsc::Receiver<(Event, Instant)>) {
        while let Some((event, made)) = events.recv().await {
            tokio::time::sleep_until(made + YIELDS_FOR).await;
            // What is late is not later than it may be.
            tokio::time::timeout_at(made + YIELDS_TO_RUSH_FOR, self.rush.over()).await.ok();
            match self.correlator.decide(event, self.clock.now()) {
                Decision::Drop => {}
                Decision::Create(event) => self.deliver(&event, false).await,
                Decision::Count(event) => self.deliver(&event, true).await,
            }
        }
    }

    async fn deliver(&self, event: &Event, known: bool) {
        for attempt in 1..=TRIES {
            match self.send(event, known).await {
                Ok(()) => return,
                Err(error @ RestError::Transport(_)) => {
                    tracing::debug!(%error, attempt, "event cannot be written yet");
                }
                Err(error) if matches!(error.code(), Some(429 | 500..)) => {
                    tracing::debug!(%error, attempt, "event cannot be written yet");
                }
                Err(error) => {
                    // Its namespace is going, or the event is malformed: the same words would be refused again.
                    tracing::debug!(%error, reason = ?event.reason, "event was refused");
                    return;
                }
            }
            // The first pause is random, so that the nodes of a cluster do not return all at once.
            let pause = if attempt == 1 { PAUSE.mul_f64(rand::random_range(0.0..1.0)) } else { PAUSE };
            tokio::time::sleep(pause).await;
        }
        tracing::warn!(reason = ?event.reason, "event was given up after {TRIES} tries");
    }

    async fn send(&self, event: &Event, known: bool) -> Result<(), RestError> {
        let namespace = event.metadata.namespace.as_deref().unwrap_or("default");
        let path = format!("/api/v1/namespaces/{namespace}/events");
        if known {
            let name = event.metadata.name.as_deref().unwrap_or_default();
            let patch = json!({
                "count": event.count,
                "lastTimestamp": event.last_timestamp,
                "message": event.message,
            });
            let body = patch.to_string().into_bytes();
            let answer =
                rest::call(&self.client, Method::PATCH, &format!("{path}/{name}"), rest::STRATEGIC_MERGE, body).await;
            match answer {
                // The apiserver forgets events after an hour.
                Err(error) if error.is_not_found() => {}
                other => return other.map(drop),
            }
        }
        let body =
            serde_json::to_vec(event).map_err(|e| RestError::Decode { what: "event", problem: e.to_string() })?;
        rest::call(&self.client, Method::POST, &path, rest::JSON, body).await.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p45_event_names_are_hexadecimal_nanoseconds() {
        assert_eq!(event_name("web", 0x18_2b3c), "web.182b3c");
        assert_eq!(event_name(&"x".repeat(250), 0x1234_5678).len(), 36);
    }
}
