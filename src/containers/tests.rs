//! Pods for the tests of this room and of `network`.

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::pods::{Pod, PodSource};

/// Pod `p` in `ns` with UID `uid-1`, its spec from JSON; one container `c` when the spec names none.
pub(crate) fn pod(spec: &str) -> Pod {
    named_pod("p", spec)
}

pub(crate) fn named_pod(name: &str, spec: &str) -> Pod {
    pod_with(json!({"name": name, "namespace": "ns", "uid": "uid-1"}), spec)
}

pub(crate) fn pod_with(metadata: Value, spec: &str) -> Pod {
    let mut spec: Value = serde_json::from_str(spec).unwrap();
    if spec.get("containers").is_none() {
        spec["containers"] = json!([{"name": "c", "image": "img:1"}]);
    }
    let object = serde_json::from_value(json!({"metadata": metadata, "spec": spec})).unwrap();
    Pod::new(object, PodSource::Api, Timestamp::UNIX_EPOCH).unwrap()
}
