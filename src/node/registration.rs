//! Registers the node: creates the Node, or brings an existing one in line (contract N-01…N-05).
//!
//! The objects are made by pure functions; [`register`] talks to the apiserver, 100 ms doubling to 7 s between tries, for ever. A
//! Node is never deleted, and the taints and the spec of an existing one are never touched.

use std::{collections::BTreeMap, time::Duration};

use k8s_openapi::api::core::v1::{Node, NodeSpec, Taint};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as ApiQuantity;
use kube::{
    Api,
    api::{ObjectMeta, Patch, PatchParams, PostParams},
};
use tokio_util::sync::CancellationToken;

use super::{
    call_error::CallError,
    patch::node_patch,
    settings::{NodeSettings, OPERATING_SYSTEM},
    status::{attach_detach_annotation, attach_detach_key, is_extended},
};
use crate::cli::architecture;

const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(7);
const HOSTNAME: &str = "kubernetes.io/hostname";

/// Labels that an existing node is brought in line with, when this agent has a value for them.
const DEFAULT_LABELS: [&str; 11] = [
    "beta.kubernetes.io/arch",
    "beta.kubernetes.io/instance-type",
    "beta.kubernetes.io/os",
    "failure-domain.beta.kubernetes.io/region",
    "failure-domain.beta.kubernetes.io/zone",
    "kubernetes.io/arch",
    HOSTNAME,
    "kubernetes.io/os",
    "node.kubernetes.io/instance-type",
    "topology.kubernetes.io/region",
    "topology.kubernetes.io/zone",
];

/// The labels a new node gets (contract N-02).
pub fn initial_labels(settings: &NodeSettings) -> BTreeMap<String, String> {
    let mut labels: BTreeMap<String, String> = [
        (HOSTNAME, settings.node_name.as_str()),
        ("kubernetes.io/os", OPERATING_SYSTEM),
        ("kubernetes.io/arch", architecture()),
        ("beta.kubernetes.io/os", OPERATING_SYSTEM),
        ("beta.kubernetes.io/arch", architecture()),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .into();
    labels.extend(settings.node_labels.clone());
    labels
}

/// The Node as it is created, still without its status.
pub fn initial_node(settings: &NodeSettings) -> Node {
    let mut taints = settings.taints.clone();
    if settings.external_cloud {
        taints.push(Taint {
            key: "node.cloudprovider.kubernetes.io/uninitialized".to_owned(),
            value: Some("true".to_owned()),
            effect: "NoSchedule".to_owned(),
            time_added: None,
        });
    }
    let annotations: BTreeMap<String, String> = attach_detach_annotation(settings).into_iter().collect();
    Node {
        metadata: ObjectMeta {
            name: Some(settings.node_name.clone()),
            labels: Some(initial_labels(settings)),
            annotations: (!annotations.is_empty()).then_some(annotations),
            ..ObjectMeta::default()
        },
        spec: Some(NodeSpec {
            taints: (!taints.is_empty()).then_some(taints),
            provider_id: Some(settings.provider_id.clone()).filter(|id| !id.is_empty()),
            ..NodeSpec::default()
        }),
        status: None,
    }
}

/// An existing node brought in line with the one that would be created: the attach-detach annotation, the default labels, huge
/// pages, and, on another machine than the one that registered it, extended resources reset to zero: their device plugins have yet
/// to register here.
pub fn reconcile(initial: &Node, existing: &Node) -> Node {
    let mut node = existing.clone();
    reconcile_annotation(initial, &mut node);
    let labels = node.metadata.labels.get_or_insert_default();
    for key in DEFAULT_LABELS {
        match initial.metadata.labels.as_ref().and_then(|l| l.get(key)) {
            Some(value) if value.is_empty() => {
                labels.remove(key);
            }
            Some(value) => {
                labels.insert(key.to_owned(), value.clone());
            }
            None => {}
        }
    }
    let other_machine = machine_id(initial) != machine_id(existing) && !machine_id(existing).is_empty();
    let ours = initial.status.clone().unwrap_or_default();
    let status = node.status.get_or_insert_default();
    let lists = [(&mut status.capacity, ours.capacity), (&mut status.allocatable, ours.allocatable)];
    for (theirs, ours) in lists {
        reconcile_resources(theirs.get_or_insert_default(), &ours.unwrap_or_default(), other_machine);
    }
    node
}

fn reconcile_annotation(initial: &Node, node: &mut Node) {
    let key = attach_detach_key();
    let wanted = initial.metadata.annotations.as_ref().and_then(|a| a.get(key));
    match wanted {
        Some(value) => {
            node.metadata.annotations.get_or_insert_default().insert(key.to_owned(), value.clone());
        }
        None => {
            if let Some(annotations) = &mut node.metadata.annotations {
                annotations.remove(key);
            }
        }
    }
}

fn reconcile_resources(
    theirs: &mut BTreeMap<String, ApiQuantity>,
    ours: &BTreeMap<String, ApiQuantity>,
    reset_extended: bool,
) {
    if theirs.is_empty() {
        theirs.extend(ours.clone());
    }
    let huge = |name: &str| name.starts_with("hugepages-");
    theirs.retain(|name, _| !huge(name) || ours.contains_key(name));
    theirs.extend(ours.iter().filter(|(name, _)| huge(name)).map(|(name, amount)| (name.clone(), amount.clone())));
    if reset_extended {
        for (_, amount) in theirs.iter_mut().filter(|(name, _)| is_extended(name)) {
            *amount = ApiQuantity("0".to_owned());
        }
    }
}

fn machine_id(node: &Node) -> &str {
    let info = node.status.as_ref().and_then(|s| s.node_info.as_ref());
    info.map(|i| i.machine_id.as_str()).unwrap_or_default()
}

/// What registering came to.
#[derive(Debug, Clone)]
pub enum Registered {
    Created(Node),
    /// Existed; the Node as it is after it was brought in line.
    Existed(Node),
}

/// Registers `initial` (with its status). `None` when cancelled.
pub async fn register(api: &Api<Node>, initial: &Node, cancel: &CancellationToken) -> Option<Registered> {
    let mut pause = FIRST_PAUSE;
    loop {
        tokio::select! {
            biased;
            () = cancel.cancelled() => return None,
            () = tokio::time::sleep(pause) => {}
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
        match try_register(api, initial).await {
            Ok(registered) => return Some(registered),
            Err(error) => tracing::error!(%error, "unable to register node with API server"),
        }
    }
}

/// The Node cannot be created or brought in line.
#[derive(Debug, thiserror::Error)]
pub(super) enum RegistrationError {
    #[error(transparent)]
    Api(#[from] CallError),
    #[error("cannot serialize the node: {0}")]
    Json(#[from] serde_json::Error),
}

async fn try_register(api: &Api<Node>, initial: &Node) -> Result<Registered, RegistrationError> {
    match api.create(&PostParams::default(), initial).await {
        Ok(node) => return Ok(Registered::Created(node)),
        // A create may be forbidden where the node exists already (NodeRestriction answers so for some versions).
        Err(error) => match CallError::from(error) {
            refused if matches!(refused.code(), 409 | 403) => {}
            failed => return Err(failed.into()),
        },
    }
    let name = initial.metadata.name.clone().unwrap_or_default();
    let existing = api.get(&name).await.map_err(CallError::from)?;
    tracing::info!(node = name, "node was previously registered");
    let wanted = reconcile(initial, &existing);
    let Some(patch) = node_patch(&existing, &wanted)? else { return Ok(Registered::Existed(existing)) };
    let patched = api.patch_status(&name, &PatchParams::default(), &Patch::Strategic(patch)).await;
    Ok(Registered::Existed(patched.map_err(CallError::from)?))
}

#[cfg(test)]
mod tests {
    use http::StatusCode;
    use serde_json::{Value, json};

    use super::super::{fake_api::FakeApi, settings::test_settings};
    use super::*;

    const NODE: &str = "/api/v1/nodes/node1";

    fn initial() -> Node {
        let mut node = initial_node(&test_settings());
        let resources = json!({"cpu": "2", "memory": "1Gi", "hugepages-2Mi": "4Mi"});
        let info = json!({"bootID": "", "architecture": "", "containerRuntimeVersion": "", "kernelVersion": "",
            "kubeProxyVersion": "", "kubeletVersion": "", "machineID": "here", "operatingSystem": "", "osImage": "", "systemUUID": ""});
        let status = json!({"capacity": resources, "allocatable": resources, "nodeInfo": info});
        node.status = Some(serde_json::from_value(status).unwrap());
        node
    }

    async fn run(api: &FakeApi) -> Registered {
        register(&Api::all(api.client()), &initial(), &CancellationToken::new()).await.unwrap()
    }

    #[test]
    fn n02_labels_at_creation() {
        let mut settings = test_settings();
        settings.node_labels = [("a".to_owned(), "b".to_owned()), (HOSTNAME.to_owned(), "other".to_owned())].into();
        let labels = initial_labels(&settings);
        let text: Vec<String> = labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
        let arch = architecture();
        assert_eq!(
            text,
            [
                "a=b".to_owned(),
                format!("beta.kubernetes.io/arch={arch}"),
                "beta.kubernetes.io/os=linux".to_owned(),
                format!("kubernetes.io/arch={arch}"),
                "kubernetes.io/hostname=other".to_owned(),
                "kubernetes.io/os=linux".to_owned(),
            ]
        );
    }

    #[test]
    fn n04_n05_n06_annotation_taints_and_provider_at_creation() {
        let mut settings = test_settings();
        settings.external_cloud = true;
        settings.provider_id = "kind://x".to_owned();
        settings.taints = vec![Taint { key: "k".into(), effect: "NoSchedule".into(), value: None, time_added: None }];
        let node = serde_json::to_value(initial_node(&settings)).unwrap();
        assert_eq!(node["spec"]["providerID"], "kind://x");
        assert_eq!(
            node["spec"]["taints"],
            json!([
                {"key": "k", "effect": "NoSchedule"},
                {"key": "node.cloudprovider.kubernetes.io/uninitialized", "value": "true", "effect": "NoSchedule"},
            ])
        );
        assert_eq!(
            node["metadata"]["annotations"],
            json!({"volumes.kubernetes.io/controller-managed-attach-detach": "true"})
        );
        settings.controller_attach_detach = false;
        assert_eq!(initial_node(&settings).metadata.annotations, None);
    }

    #[tokio::test(start_paused = true)]
    async fn n01_created() {
        let api = FakeApi::default();
        assert!(matches!(run(&api).await, Registered::Created(_)));
        assert_eq!(api.get(NODE).unwrap()["metadata"]["name"], "node1");
        assert_eq!(api.requests(), ["POST /api/v1/nodes"]);
    }

    #[tokio::test(start_paused = true)]
    async fn n01_retried_for_ever_with_growing_pauses() {
        let api = FakeApi::default();
        api.fail(StatusCode::SERVICE_UNAVAILABLE, 10);
        let started = tokio::time::Instant::now();
        run(&api).await;
        // 0.1 + 0.2 + … + 6.4 s, then 7 s each: eleven tries
        assert_eq!(started.elapsed().as_millis() / 100, 127 + 4 * 70);
        assert_eq!(api.requests().len(), 11);
    }

    #[tokio::test(start_paused = true)]
    async fn n01_an_existing_node_is_brought_in_line_and_nothing_else_touched() {
        let api = FakeApi::default();
        let existing = json!({
            "metadata": {"name": "node1", "uid": "u", "labels": {"mine": "1", "kubernetes.io/os": "beos"}},
            "spec": {"unschedulable": true, "taints": [{"key": "t", "effect": "NoExecute"}]},
            "status": {
                "capacity": {"cpu": "1", "hugepages-1Gi": "0", "example.com/gpu": "2"},
                "allocatable": {"cpu": "1", "hugepages-1Gi": "0", "example.com/gpu": "2"},
            },
        });
        api.put(NODE, existing.clone());
        assert!(matches!(run(&api).await, Registered::Existed(_)));
        let node = api.get(NODE).unwrap();
        assert_eq!(node["metadata"]["labels"]["mine"], "1");
        assert_eq!(node["metadata"]["labels"]["kubernetes.io/os"], "linux");
        assert_eq!(
            node["metadata"]["annotations"],
            json!({"volumes.kubernetes.io/controller-managed-attach-detach": "true"})
        );
        assert_eq!(node["spec"], existing["spec"]);
        assert_eq!(node["status"]["capacity"], json!({"cpu": "1", "hugepages-2Mi": "4Mi", "example.com/gpu": "2"}));
        let writes: Vec<String> = api.requests().into_iter().filter(|r| !r.starts_with("GET")).collect();
        assert_eq!(writes, ["POST /api/v1/nodes", "PATCH /api/v1/nodes/node1/status"]);
    }

    #[test]
    fn n01_extended_resources_are_reset_on_another_machine_only() {
        let existing = |machine: &str| -> Node {
            let mut info = serde_json::to_value(initial()).unwrap()["status"]["nodeInfo"].clone();
            info["machineID"] = json!(machine);
            let resources = json!({"cpu": "1", "example.com/gpu": "2"});
            let status = json!({"capacity": resources, "allocatable": resources, "nodeInfo": info});
            serde_json::from_value(json!({"metadata": {"name": "node1"}, "status": status})).unwrap()
        };
        let gpus = |machine: &str| {
            let node: Value = serde_json::to_value(reconcile(&initial(), &existing(machine))).unwrap();
            (
                node["status"]["capacity"]["example.com/gpu"].clone(),
                node["status"]["allocatable"]["example.com/gpu"].clone(),
            )
        };
        assert_eq!(gpus("here"), (json!("2"), json!("2")));
        assert_eq!(gpus("there"), (json!("0"), json!("0")));
    }
}
