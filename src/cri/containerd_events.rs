//! containerd's own event service, for the one thing CRI has no event of: out-of-memory kills.
//!
//! Other runtimes lose nothing that pods depend on: a container whose first process was killed still says `OOMKilled`.

use std::{sync::Arc, time::Duration};

use futures::StreamExt;
use prost::Message;
use protocols::containerd::{
    events::TaskOom,
    services::events::v1::{Envelope, SubscribeRequest, events_client::EventsClient},
};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Status, metadata::MetadataValue};

use super::{RuntimeService, RuntimeStore, client};

const NAMESPACE: &str = "k8s.io";
const TOPIC: &str = "/tasks/oom";
const TYPE: &str = "containerd.events.TaskOOM";
/// First and longest wait before subscribing again.
const RECONNECT: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// Follows `/tasks/oom` on containerd's socket until `cancel`; returns at once, and says so once, if the runtime is another.
pub async fn follow_oom(
    endpoint: String,
    runtime: Arc<dyn RuntimeService>,
    store: Arc<RuntimeStore>,
    cancel: CancellationToken,
) {
    tokio::select! {
        biased;
        () = cancel.cancelled() => {}
        () = subscribe(&endpoint, &*runtime, &store) => {}
    }
}

async fn subscribe(endpoint: &str, runtime: &dyn RuntimeService, store: &RuntimeStore) {
    let mut wait = RECONNECT.0;
    let name = loop {
        match runtime.version().await {
            Ok(version) => break version.runtime_name,
            Err(_) => sleep(wait).await,
        }
        wait = (wait * 2).min(RECONNECT.1);
    };
    if name != "containerd" {
        tracing::info!(runtime = name, "out-of-memory kills of single processes are not told by this runtime");
        return;
    }
    let channel = match client::events_channel(endpoint) {
        Ok(channel) => channel,
        Err(error) => return tracing::warn!(%error, "out-of-memory kills will not be told"),
    };
    wait = RECONNECT.0;
    let mut logged = false;
    loop {
        let begun = store.clock().now().mono;
        let status = read(EventsClient::new(channel.clone()), store).await;
        if matches!(status.code(), Code::Unimplemented | Code::PermissionDenied) {
            return tracing::warn!(error = status.message(), "out-of-memory kills will not be told");
        }
        if !std::mem::replace(&mut logged, true) {
            tracing::info!(error = status.message(), "containerd's event stream broke; subscribing again");
        }
        if store.clock().now().mono - begun > RECONNECT.1 {
            wait = RECONNECT.0;
            logged = false;
        }
        sleep(wait).await;
        wait = (wait * 2).min(RECONNECT.1);
    }
}

/// Reads one subscription to its end.
async fn read(mut client: EventsClient<tonic::transport::Channel>, store: &RuntimeStore) -> Status {
    // Subscriptions see every namespace; the header alone does not narrow them.
    let filters = vec![format!("namespace=={NAMESPACE},topic==\"{TOPIC}\"")];
    let mut request = Request::new(SubscribeRequest { filters });
    request.metadata_mut().insert("containerd-namespace", MetadataValue::from_static(NAMESPACE));
    let mut events = match client.subscribe(request).await {
        Ok(answer) => answer.into_inner(),
        Err(status) => return status,
    };
    while let Some(envelope) = events.next().await {
        match envelope {
            Ok(envelope) => {
                if let Some(id) = oom_container(&envelope) {
                    store.mark_oom(&id);
                }
            }
            Err(status) => return status,
        }
    }
    Status::unavailable("the stream ended")
}

/// The container an event says was hit; `None` for any other event.
fn oom_container(envelope: &Envelope) -> Option<String> {
    if envelope.namespace != NAMESPACE || envelope.topic != TOPIC {
        return None;
    }
    let event = envelope.event.as_ref().filter(|e| e.type_url.rsplit('/').next() == Some(TYPE))?;
    TaskOom::decode(event.value.as_slice()).ok().map(|oom| oom.container_id).filter(|id| !id.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn envelope(namespace: &str, type_url: &str, value: Vec<u8>) -> Envelope {
        let mut made = Envelope { namespace: namespace.into(), topic: TOPIC.into(), ..Default::default() };
        let mut event = made.event.take().unwrap_or_default();
        event.type_url = type_url.into();
        event.value = value;
        made.event = Some(event);
        made
    }

    #[test]
    fn only_an_oom_of_our_namespace_counts() {
        let value = TaskOom { container_id: "c1".into() }.encode_to_vec();
        assert_eq!(oom_container(&envelope("k8s.io", TYPE, value.clone())).as_deref(), Some("c1"));
        assert_eq!(
            oom_container(&envelope("k8s.io", &format!("type.googleapis.com/{TYPE}"), value.clone())).as_deref(),
            Some("c1")
        );
        assert_eq!(oom_container(&envelope("moby", TYPE, value.clone())), None);
        assert_eq!(oom_container(&envelope("k8s.io", "containerd.events.TaskExit", value)), None);
        assert_eq!(oom_container(&envelope("k8s.io", TYPE, vec![0xff])), None);
    }
}
