//! The strategic merge patch that turns one Node into another (contract N-19). Pure.
//!
//! Labels, annotations and status only: the spec is not this agent's. `status.conditions` merges by type, so that the conditions of
//! others survive; `status.addresses` is declared mergeable too, but its key is not unique, so a change replaces it whole.

use k8s_openapi::api::core::v1::Node;
use serde_json::{Map, Value, json};

/// The patch, or `None` when nothing differs.
pub fn node_patch(old: &Node, new: &Node) -> Result<Option<Value>, serde_json::Error> {
    let mut patch = Map::new();
    let (old_meta, new_meta) = (serde_json::to_value(&old.metadata)?, serde_json::to_value(&new.metadata)?);
    let mut metadata = Map::new();
    for field in ["labels", "annotations"] {
        if let Some(change) = difference(old_meta.get(field), new_meta.get(field)) {
            metadata.insert(field.to_owned(), change);
        }
    }
    if !metadata.is_empty() {
        patch.insert("metadata".to_owned(), Value::Object(metadata));
    }
    let old_status = serde_json::to_value(old.status.clone().unwrap_or_default())?;
    let new_status = serde_json::to_value(new.status.clone().unwrap_or_default())?;
    let status = status_difference(&old_status, &new_status);
    if !status.is_empty() {
        patch.insert("status".to_owned(), Value::Object(status));
    }
    Ok((!patch.is_empty()).then_some(Value::Object(patch)))
}

fn status_difference(old: &Value, new: &Value) -> Map<String, Value> {
    let mut change = match difference(Some(old), Some(new)) {
        Some(Value::Object(change)) => change,
        _ => return Map::new(),
    };
    if change.contains_key("conditions") {
        change.remove("conditions");
        merge_conditions(&mut change, old.get("conditions"), new.get("conditions"));
    }
    let had_addresses = old.get("addresses").and_then(Value::as_array).is_some_and(|list| !list.is_empty());
    if let Some(Value::Array(addresses)) = change.get_mut("addresses").filter(|_| had_addresses) {
        addresses.push(json!({"$patch": "replace"}));
    }
    change
}

/// Only what changed in each condition, plus the order of all.
fn merge_conditions(change: &mut Map<String, Value>, old: Option<&Value>, new: Option<&Value>) {
    let list = |value: Option<&Value>| value.and_then(Value::as_array).cloned().unwrap_or_default();
    let (old, new) = (list(old), list(new));
    let mut changed = Vec::new();
    for condition in &new {
        let before = old.iter().find(|c| c.get("type") == condition.get("type"));
        if let Some(Value::Object(mut fields)) = difference(before, Some(condition)) {
            fields.insert("type".to_owned(), condition.get("type").cloned().unwrap_or_default());
            changed.push(Value::Object(fields));
        }
    }
    let order: Vec<Value> = new.iter().map(|c| json!({"type": c.get("type")})).collect();
    change.insert("$setElementOrder/conditions".to_owned(), Value::Array(order));
    if !changed.is_empty() {
        change.insert("conditions".to_owned(), Value::Array(changed));
    }
}

/// JSON merge patch: objects field by field, what is gone as null, everything else whole.
fn difference(old: Option<&Value>, new: Option<&Value>) -> Option<Value> {
    match (old, new) {
        (None | Some(Value::Null), None | Some(Value::Null)) => None,
        (Some(_), None) => Some(Value::Null),
        (Some(Value::Object(old)), Some(Value::Object(new))) => {
            let mut change = Map::new();
            for name in old.keys().chain(new.keys().filter(|name| !old.contains_key(*name))) {
                if let Some(value) = difference(old.get(name), new.get(name)) {
                    change.insert(name.clone(), value);
                }
            }
            (!change.is_empty()).then_some(Value::Object(change))
        }
        (old, Some(new)) => (old != Some(new)).then(|| new.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(value: Value) -> Node {
        serde_json::from_value(value).unwrap()
    }

    fn patch(old: Value, new: Value) -> Option<Value> {
        node_patch(&node(old), &node(new)).unwrap()
    }

    fn condition(type_: &str, status: &str, beat: &str) -> Value {
        json!({"type": type_, "status": status, "lastHeartbeatTime": beat, "reason": "R"})
    }

    #[test]
    fn n19_conditions_merge_by_type_with_their_order() {
        let (t1, t2) = ("2026-01-01T00:00:01Z", "2026-01-01T00:00:02Z");
        let old =
            json!({"status": {"conditions": [condition("Foreign", "True", t1), condition("Ready", "False", t1)]}});
        let new = json!({"status": {"conditions": [condition("Foreign", "True", t1), condition("Ready", "True", t2)]}});
        let expected = json!({"status": {
            "$setElementOrder/conditions": [{"type": "Foreign"}, {"type": "Ready"}],
            "conditions": [{"type": "Ready", "status": "True", "lastHeartbeatTime": t2}],
        }});
        assert_eq!(patch(old, new), Some(expected));
    }

    #[test]
    fn n19_changed_addresses_are_replaced_whole() {
        let with = |address: &str| json!({"status": {"addresses": [{"type": "InternalIP", "address": address}]}});
        let replaced = json!({"status": {"addresses": [
            {"type": "InternalIP", "address": "b"}, {"$patch": "replace"},
        ]}});
        assert_eq!(patch(with("a"), with("b")), Some(replaced));
        assert_eq!(patch(json!({}), with("b")), Some(with("b")));
    }

    #[test]
    fn n19_maps_are_patched_by_key_and_other_lists_whole() {
        let old = json!({"metadata": {"labels": {"a": "1", "b": "2"}},
            "status": {"capacity": {"cpu": "1", "x": "3"}, "declaredFeatures": ["A"], "nodeInfo": info("1")}});
        let new = json!({"metadata": {"labels": {"a": "1", "b": "3"}},
            "status": {"capacity": {"cpu": "2"}, "declaredFeatures": ["A", "B"], "nodeInfo": info("2")}});
        let expected = json!({"metadata": {"labels": {"b": "3"}}, "status": {
            "capacity": {"cpu": "2", "x": null}, "declaredFeatures": ["A", "B"], "nodeInfo": {"bootID": "2"}}});
        assert_eq!(patch(old, new), Some(expected));
    }

    fn info(boot: &str) -> Value {
        json!({"bootID": boot, "architecture": "", "containerRuntimeVersion": "", "kernelVersion": "",
            "kubeProxyVersion": "", "kubeletVersion": "", "machineID": "", "operatingSystem": "", "osImage": "", "systemUUID": ""})
    }

    #[test]
    fn nothing_changed_is_no_patch_and_the_spec_is_never_in_it() {
        let old = json!({"spec": {"podCIDR": "a"}, "metadata": {"name": "n"}});
        assert_eq!(patch(old.clone(), old.clone()), None);
        assert_eq!(patch(old, json!({"spec": {"podCIDR": "b"}, "metadata": {"name": "n"}})), None);
    }
}
