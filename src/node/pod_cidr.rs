//! Hands the node's pod CIDRs to the runtime when the API assigns them (contract N-06).

use std::{sync::Arc, time::Duration};

use k8s_openapi::api::core::v1::Node;
use protocols::cri::v1;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::cri::RuntimeService;

const RETRY: Duration = Duration::from_secs(5);

/// Follows `spec.podCIDRs` until cancelled.
pub(super) async fn follow(
    mut node: watch::Receiver<Option<Arc<Node>>>,
    cri: Arc<dyn RuntimeService>,
    cancel: CancellationToken,
) {
    let mut applied = String::new();
    loop {
        let wanted = node.borrow_and_update().as_deref().map(pod_cidrs).unwrap_or_default();
        let mut retry = None;
        if !wanted.is_empty() && wanted != applied {
            let network = v1::NetworkConfig { pod_cidr: wanted.clone() };
            match cri.update_runtime_config(v1::RuntimeConfig { network_config: Some(network) }).await {
                Ok(()) => {
                    tracing::info!(pod_cidr = wanted, "the runtime knows the pod CIDR");
                    applied = wanted;
                }
                Err(error) => {
                    tracing::error!(%error, pod_cidr = wanted, "error updating pod CIDR");
                    retry = Some(RETRY);
                }
            }
        }
        tokio::select! {
            biased;
            () = cancel.cancelled() => return,
            changed = node.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(retry.unwrap_or(Duration::MAX)), if retry.is_some() => {}
        }
    }
}

fn pod_cidrs(node: &Node) -> String {
    node.spec.as_ref().and_then(|s| s.pod_cidrs.as_ref()).map(|list| list.join(",")).unwrap_or_default()
}
