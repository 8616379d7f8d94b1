//! downwardAPI volumes and projected downwardAPI sources: the pod's own metadata and resources as files (contract V-25).
//!
//! In: the pod and the node's allocatable (the default of limits). Out: a payload. Pure.

use k8s_openapi::api::core::v1::{Container, DownwardAPIVolumeFile, ResourceFieldSelector};

use super::{
    key_projection::mode_bits,
    payload::{FileContent, Payload},
    set_up_error::SetUpError,
};
use crate::{containers::format_map, node::NodeFacts, pods::Pod, quantity::Quantity};

/// The files of a downwardAPI source.
pub(super) fn payload(
    items: &[DownwardAPIVolumeFile],
    pod: &Pod,
    node: &NodeFacts,
    default_mode: u32,
) -> Result<Payload, SetUpError> {
    let mut payload = Payload::default();
    let mut errors = Vec::new();
    for item in items {
        let value = match (&item.field_ref, &item.resource_field_ref) {
            (Some(field), _) => field_value(pod, &field.field_path),
            (None, Some(resource)) => resource_value(pod, node, resource),
            (None, None) => Ok(String::new()),
        };
        let written = value.map_err(SetUpError::terminal).and_then(|value| {
            let file = FileContent { data: value.into_bytes(), mode: mode_bits(item.mode, default_mode), user: None };
            Ok(payload.insert(&item.path, file)?)
        });
        errors.extend(written.err());
    }
    SetUpError::all(errors).map_or(Ok(payload), Err)
}

/// The value of a `metadata.*` fieldPath.
fn field_value(pod: &Pod, path: &str) -> Result<String, String> {
    if let Some((map, key)) =
        path.strip_suffix("']").and_then(|p| p.split_once("['")).filter(|(map, _)| !map.is_empty())
    {
        let map = match map {
            "metadata.annotations" => pod.annotations(),
            "metadata.labels" => pod.labels(),
            _ => return Err(format!("fieldPath {path:?} does not support subscript")),
        };
        return Ok(map.get(key).cloned().unwrap_or_default());
    }
    match path {
        "metadata.annotations" => Ok(format_map(pod.annotations())),
        "metadata.labels" => Ok(format_map(pod.labels())),
        "metadata.name" => Ok(pod.name().to_owned()),
        "metadata.namespace" => Ok(pod.namespace().to_owned()),
        "metadata.uid" => Ok(pod.uid().to_string()),
        _ => Err(format!("unsupported fieldPath: {path}")),
    }
}

/// The value of a resourceFieldRef in units of its divisor, rounded up; missing limits default to the node's allocatable.
fn resource_value(pod: &Pod, node: &NodeFacts, selector: &ResourceFieldSelector) -> Result<String, String> {
    let name = selector.container_name.as_deref().unwrap_or_default();
    let container = pod.container(name).ok_or_else(|| format!("container {name} not found"))?.spec;
    let unsupported = || format!("unsupported container resource : {}", selector.resource);
    let (list, resource) = selector.resource.split_once('.').ok_or_else(unsupported)?;
    let basic = matches!(resource, "cpu" | "memory" | "ephemeral-storage");
    if !basic && !resource.starts_with("hugepages-") {
        return Err(unsupported());
    }
    let parse = |text: &str| Quantity::parse(text).map_err(|e| format!("{}: {e}", selector.resource));
    let spec = match list {
        "limits" => quantity_of(container, resource, true),
        "requests" => quantity_of(container, resource, false),
        _ => return Err(unsupported()),
    };
    let mut value = spec.map_or(Ok(Quantity::ZERO), &parse)?;
    if list == "limits" && basic && value.is_zero() {
        value = node.allocatable.get(resource).map_or(Ok(Quantity::ZERO), |q| parse(q))?;
    }
    let divisor = selector.divisor.as_ref().map_or(Ok(Quantity::ZERO), |q| parse(&q.0))?;
    Ok(value.ceil_div(&divisor).to_string())
}

fn quantity_of<'a>(container: &'a Container, resource: &str, limit: bool) -> Option<&'a str> {
    let resources = container.resources.as_ref()?;
    let list = if limit { &resources.limits } else { &resources.requests };
    list.as_ref()?.get(resource).map(|q| q.0.as_str())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::volumes::fixtures;

    fn pod() -> Pod {
        fixtures::pod(json!({
            "metadata": {
                "labels": {"b": "2", "a": "x\"y"},
                "annotations": {"multi": "line1\nline2", "empty": ""},
            },
            "spec": {"containers": [
                {"name": "c", "resources": {
                    "limits": {"memory": "64Mi"},
                    "requests": {"cpu": "250m", "memory": "33Mi", "hugepages-2Mi": "4Mi"}
                }},
                {"name": "bare"}
            ]},
        }))
    }

    #[test]
    fn v25_fields() {
        for (path, value) in [
            ("metadata.name", "p"),
            ("metadata.namespace", "ns"),
            ("metadata.uid", "u1"),
            ("metadata.labels", "a=\"x\\\"y\"\nb=\"2\""),
            ("metadata.annotations", "empty=\"\"\nmulti=\"line1\\nline2\""),
            ("metadata.labels['b']", "2"),
            ("metadata.labels['absent']", ""),
            ("metadata.annotations['multi']", "line1\nline2"),
        ] {
            assert_eq!(field_value(&pod(), path).as_deref(), Ok(value), "{path}");
        }
        assert_eq!(field_value(&pod(), "spec.nodeName").unwrap_err(), "unsupported fieldPath: spec.nodeName");
        assert_eq!(
            field_value(&pod(), "metadata.name['x']").unwrap_err(),
            "fieldPath \"metadata.name['x']\" does not support subscript"
        );
    }

    #[test]
    fn v25_resources_with_divisor_and_node_defaults() {
        let node = NodeFacts {
            allocatable: [("cpu", "3920m"), ("memory", "8000Mi"), ("ephemeral-storage", "10Gi")]
                .map(|(k, v)| (k.to_owned(), v.to_owned()))
                .into(),
            ..Default::default()
        };
        for (container, resource, divisor, value) in [
            ("c", "requests.cpu", None, Ok("1")),
            ("c", "requests.cpu", Some("1m"), Ok("250")),
            ("c", "limits.cpu", None, Ok("4")),
            ("c", "limits.cpu", Some("1m"), Ok("3920")),
            ("c", "limits.memory", Some("1Mi"), Ok("64")),
            ("c", "requests.memory", Some("32Mi"), Ok("2")),
            ("c", "requests.memory", Some("0"), Ok("34603008")),
            ("bare", "limits.memory", Some("1Mi"), Ok("8000")),
            ("bare", "requests.memory", None, Ok("0")),
            ("bare", "limits.ephemeral-storage", Some("1Gi"), Ok("10")),
            ("c", "requests.hugepages-2Mi", Some("1Mi"), Ok("4")),
            ("c", "limits.hugepages-2Mi", None, Ok("0")),
            ("c", "limits.gpu", None, Err("unsupported container resource : limits.gpu")),
            ("none", "limits.cpu", None, Err("container none not found")),
        ] {
            let selector = ResourceFieldSelector {
                container_name: Some(container.into()),
                resource: resource.into(),
                divisor: divisor.map(|d| k8s_openapi::apimachinery::pkg::api::resource::Quantity(d.into())),
            };
            let got = resource_value(&pod(), &node, &selector);
            assert_eq!(got.as_deref().map_err(String::as_str), value, "{container} {resource} {divisor:?}");
        }
    }

    #[test]
    fn v25_all_failing_items_are_named() {
        let item = |path: &str, field: &str| {
            serde_json::from_value(json!({"path": path, "fieldRef": {"fieldPath": field}})).unwrap()
        };
        let items: Vec<DownwardAPIVolumeFile> =
            vec![item("a", "metadata.name"), item("b", "spec.x"), item("../c", "metadata.uid")];
        let error = payload(&items, &pod(), &NodeFacts::default(), 0o644).unwrap_err();
        assert_eq!(error.message, "[unsupported fieldPath: spec.x, invalid path: must not contain '..': ../c]");
    }
}
