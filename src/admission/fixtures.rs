//! Pods and nodes for this room's tests.

use serde_json::{Value, json};

use crate::{
    node::NodeFacts,
    pods::{Pod, PodSource},
};

pub(crate) fn pod(spec: Value) -> Pod {
    named("u-1", spec)
}

pub(super) fn named(uid: &str, spec: Value) -> Pod {
    full(json!({"metadata": {"name": uid, "namespace": "n", "uid": uid, "generation": 1}, "spec": spec}))
}

pub(super) fn full(object: Value) -> Pod {
    Pod::new(serde_json::from_value(object).unwrap(), PodSource::Api, jiff::Timestamp::UNIX_EPOCH).unwrap()
}

/// One container that asks for these millicores, without limits; at this priority.
pub(super) fn asking(uid: &str, millis: i64, priority: i32) -> Pod {
    let resources = match millis {
        0 => json!({}),
        _ => json!({"requests": {"cpu": format!("{millis}m")}}),
    };
    named(uid, json!({"priority": priority, "containers": [{"name": "c", "resources": resources}]}))
}

pub(super) const CRITICAL: i32 = 2_000_000_000;

/// 1 CPU, 1 GiB, 4 pods.
pub(super) fn node() -> NodeFacts {
    let amounts = [("cpu", "1"), ("memory", "1Gi"), ("ephemeral-storage", "10Gi"), ("pods", "4"), ("x.com/gpu", "2")];
    NodeFacts {
        name: "node1".into(),
        labels: [("zone", "a"), ("rank", "5"), ("kubernetes.io/os", "linux")]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into(),
        allocatable: amounts.map(|(name, amount)| (name.to_owned(), amount.to_owned())).into(),
        runtime_ready: true,
        node_seen: true,
        ..NodeFacts::default()
    }
}
