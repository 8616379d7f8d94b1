//! The node's CSINode: made, or brought in line, before the node may say Ready (contract N-21).
//!
//! In: the Node's UID. Out: a CSINode owned by the Node, with the list of in-tree plugins that have moved to CSI, and a watch channel that
//! holds why it is not there yet. Drivers add themselves later, when they register.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use k8s_openapi::{
    api::{
        core::v1::Node,
        storage::v1::{CSINode, CSINodeSpec},
    },
    apimachinery::pkg::apis::meta::v1::OwnerReference,
};
use kube::{
    Api, Client,
    api::{DeleteParams, ObjectMeta, PostParams},
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::call_error::CallError;

const ANNOTATION: &str = "storage.alpha.kubernetes.io/migrated-plugins";
const MIGRATED: [&str; 7] = [
    "kubernetes.io/aws-ebs",
    "kubernetes.io/azure-disk",
    "kubernetes.io/azure-file",
    "kubernetes.io/cinder",
    "kubernetes.io/gce-pd",
    "kubernetes.io/portworx-volume",
    "kubernetes.io/vsphere-volume",
];
const FIRST_PAUSE: Duration = Duration::from_millis(30);
const LONGEST_PAUSE: Duration = Duration::from_secs(7);
/// Until the first attempt has ended.
pub const NOT_INITIALIZED: &str = "CSINode is not yet initialized";

/// The CSINode cannot be made or brought in line.
#[derive(Debug, thiserror::Error)]
enum CsiNodeError {
    #[error(transparent)]
    Api(#[from] CallError),
    #[error("node {0:?} has no UID")]
    NoUid(String),
    #[error("CSINode {0:?} was owned by different node, deleted it")]
    Foreign(String),
}

/// Waits for the Node, then tries until it is done or cancelled. `state` ends as `None`.
pub(super) async fn initialize(
    client: Client,
    node_name: String,
    state: watch::Sender<Option<String>>,
    mut node: watch::Receiver<Option<Arc<Node>>>,
    cancel: CancellationToken,
) {
    tokio::select! {
        biased;
        () = cancel.cancelled() => return,
        seen = node.wait_for(Option::is_some) => if seen.is_err() { return },
    }
    let mut pause = FIRST_PAUSE;
    loop {
        match try_initialize(&client, &node_name).await {
            Ok(()) => {
                state.send_replace(None);
                return;
            }
            Err(error) => {
                tracing::error!(%error, "failed to initialize CSINode");
                state.send_replace(Some(format!("failed to initialize CSINode: {error}")));
            }
        }
        tokio::select! {
            biased;
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

async fn try_initialize(client: &Client, node_name: &str) -> Result<(), CsiNodeError> {
    let node = Api::<Node>::all(client.clone()).get(node_name).await.map_err(CallError::from)?;
    let uid = node.metadata.uid.ok_or_else(|| CsiNodeError::NoUid(node_name.to_owned()))?;
    let api: Api<CSINode> = Api::all(client.clone());
    let Some(existing) = api.get_opt(node_name).await.map_err(CallError::from)? else {
        api.create(&PostParams::default(), &new_csi_node(node_name, &uid)).await.map_err(CallError::from)?;
        return Ok(());
    };
    if !owned_by(&existing, node_name, &uid) {
        api.delete(node_name, &DeleteParams::default()).await.map_err(CallError::from)?;
        return Err(CsiNodeError::Foreign(node_name.to_owned()));
    }
    if let Some(annotated) = with_annotation(&existing) {
        api.replace(node_name, &PostParams::default(), &annotated).await.map_err(CallError::from)?;
    }
    Ok(())
}

fn new_csi_node(node_name: &str, uid: &str) -> CSINode {
    let owner = OwnerReference {
        api_version: "v1".to_owned(),
        kind: "Node".to_owned(),
        name: node_name.to_owned(),
        uid: uid.to_owned(),
        ..OwnerReference::default()
    };
    CSINode {
        metadata: ObjectMeta {
            name: Some(node_name.to_owned()),
            owner_references: Some(vec![owner]),
            annotations: Some([(ANNOTATION.to_owned(), MIGRATED.join(","))].into()),
            ..ObjectMeta::default()
        },
        spec: CSINodeSpec { drivers: Vec::new() },
        status: None,
    }
}

fn owned_by(csi_node: &CSINode, node_name: &str, uid: &str) -> bool {
    let owners = csi_node.metadata.owner_references.iter().flatten();
    owners.into_iter().any(|o| o.kind == "Node" && o.name == node_name && o.uid == uid)
}

/// The CSINode with the annotation set right; `None` when it is.
fn with_annotation(csi_node: &CSINode) -> Option<CSINode> {
    let present = csi_node.metadata.annotations.as_ref().and_then(|a| a.get(ANNOTATION));
    let present: BTreeSet<&str> = present.map(|list| list.split(',').collect()).unwrap_or_default();
    if present == BTreeSet::from(MIGRATED) {
        return None;
    }
    let mut annotated = csi_node.clone();
    let annotations = annotated.metadata.annotations.get_or_insert_default();
    annotations.insert(ANNOTATION.to_owned(), MIGRATED.join(","));
    Some(annotated)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::fake_api::FakeApi;
    use super::*;

    async fn run(api: &FakeApi) -> Option<String> {
        let state = watch::Sender::new(Some(NOT_INITIALIZED.to_owned()));
        let node = watch::Sender::new(Some(Arc::new(Node::default())));
        initialize(api.client(), "n1".to_owned(), state.clone(), node.subscribe(), CancellationToken::new()).await;
        state.borrow().clone()
    }

    const NODE: &str = "/api/v1/nodes/n1";
    const CSI: &str = "/apis/storage.k8s.io/v1/csinodes/n1";

    fn with_node() -> FakeApi {
        let api = FakeApi::default();
        api.put(NODE, json!({"metadata": {"name": "n1", "uid": "u1"}}));
        api
    }

    #[tokio::test(start_paused = true)]
    async fn n21_created_with_owner_and_annotation() {
        let api = with_node();
        assert_eq!(run(&api).await, None);
        let made = api.get(CSI).unwrap();
        assert_eq!(made["metadata"]["ownerReferences"][0]["uid"], "u1");
        assert_eq!(made["metadata"]["ownerReferences"][0]["kind"], "Node");
        assert_eq!(
            made["metadata"]["annotations"][ANNOTATION],
            "kubernetes.io/aws-ebs,kubernetes.io/azure-disk,kubernetes.io/azure-file,kubernetes.io/cinder,kubernetes.io/gce-pd,kubernetes.io/portworx-volume,kubernetes.io/vsphere-volume"
        );
        assert_eq!(made["spec"]["drivers"], json!([]));
    }

    #[tokio::test(start_paused = true)]
    async fn n21_an_existing_one_keeps_its_drivers() {
        let api = with_node();
        let owner = json!([{"apiVersion": "v1", "kind": "Node", "name": "n1", "uid": "u1"}]);
        let drivers = json!([{"name": "d", "nodeID": "x"}]);
        api.put(CSI, json!({"metadata": {"name": "n1", "ownerReferences": owner}, "spec": {"drivers": drivers}}));
        assert_eq!(run(&api).await, None);
        let kept = api.get(CSI).unwrap();
        assert_eq!(kept["spec"]["drivers"][0]["name"], "d");
        assert!(kept["metadata"]["annotations"][ANNOTATION].as_str().unwrap().contains("gce-pd"));
    }

    #[tokio::test(start_paused = true)]
    async fn n21_one_of_another_node_is_replaced() {
        let api = with_node();
        let owner = json!([{"apiVersion": "v1", "kind": "Node", "name": "n1", "uid": "old"}]);
        api.put(CSI, json!({"metadata": {"name": "n1", "ownerReferences": owner}, "spec": {"drivers": []}}));
        assert_eq!(run(&api).await, None);
        assert_eq!(api.get(CSI).unwrap()["metadata"]["ownerReferences"][0]["uid"], "u1");
        assert!(api.requests().iter().any(|r| r.starts_with("DELETE")));
    }

    #[tokio::test(start_paused = true)]
    async fn n21_a_failure_is_shown_and_tried_again() {
        let api = FakeApi::default();
        let state = watch::Sender::new(Some(NOT_INITIALIZED.to_owned()));
        let node = watch::Sender::new(None);
        let cancel = CancellationToken::new();
        let task = tokio::spawn(initialize(api.client(), "n1".to_owned(), state.clone(), node.subscribe(), cancel));
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert!(api.requests().is_empty(), "nothing is asked before there is a Node");
        node.send_replace(Some(Arc::new(Node::default())));
        let mut seen = state.subscribe();
        seen.changed().await.unwrap();
        assert_eq!(seen.borrow().as_deref(), Some("failed to initialize CSINode: Not Found"));
        api.put(NODE, json!({"metadata": {"name": "n1", "uid": "u1"}}));
        task.await.unwrap();
        assert_eq!(*state.borrow(), None);
    }
}
