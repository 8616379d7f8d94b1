//! The difference of two pod statuses as a strategic merge patch (contract P-44): pure.
//!
//! In: what the API holds and what this agent wants. Out: the smallest patch, with the pod's UID in it so that a pod of the same
//! name is never written to; `None` when nothing differs. Conditions and fields that others own are left alone: they are
//! neither compared nor mentioned, except in the element order.

use k8s_openapi::api::core::v1::PodStatus;
use serde_json::{Map, Value, json};

use crate::pods::PodUid;

/// Conditions that the kubelet writes. All others belong to somebody else.
const OWN_CONDITIONS: [&str; 8] = [
    "PodScheduled",
    "Ready",
    "Initialized",
    "ContainersReady",
    "PodReadyToStartContainers",
    "PodResizePending",
    "PodResizeInProgress",
    "AllContainersRestarting",
];
/// Written by the kubelet together with the terminal phase, and by others at any time.
const SHARED_CONDITION: &str = "DisruptionTarget";
/// The scheduler's statement too: never taken back.
const NEVER_REMOVED_CONDITION: &str = "PodScheduled";
/// Fields of the status that other components write.
const OTHERS_FIELDS: [&str; 4] = [
    "nominatedNodeName",
    "resourceClaimStatuses",
    "extendedResourceClaimStatus",
    "nodeAllocatableResourceClaimStatuses",
];
/// Fields that, once set, stay: a status without them is one that does not know them yet.
const KEPT_FIELDS: [&str; 3] = ["qosClass", "startTime", "conditions"];
/// Lists that the API merges, with their merge keys. All other lists are replaced whole.
const MERGED_LISTS: [(&str, &str); 3] = [("conditions", "type"), ("podIPs", "ip"), ("hostIPs", "ip")];

/// The patch that turns `old` into `new`, or `None`.
pub fn patch_for(old: &PodStatus, new: &PodStatus, uid: &PodUid) -> Option<Value> {
    let old = normal(serde_json::to_value(old).unwrap_or_default());
    let mut new = normal(serde_json::to_value(new).unwrap_or_default());
    merge_conditions(&old, &mut new);
    let status = diff_status(&old, &new);
    (!status.is_empty()).then(|| json!({ "metadata": { "uid": uid.as_str() }, "status": status }))
}

/// Whether two statuses mean the same, empty and absent being equal.
pub(super) fn same(a: &PodStatus, b: &PodStatus) -> bool {
    normal(serde_json::to_value(a).unwrap_or_default()) == normal(serde_json::to_value(b).unwrap_or_default())
}

/// Maps that mean something when they are empty: a container's state, and resources without any request or limit.
const TELLING_MAPS: [&str; 4] = ["running", "waiting", "terminated", "resources"];

/// Drops null, empty strings, empty lists and empty maps from a map's fields, at every depth. A map that stands in a list, or that
/// is one of [`TELLING_MAPS`], may itself be empty.
fn normal(value: Value) -> Map<String, Value> {
    let Value::Object(map) = value else { return Map::new() };
    map.into_iter().filter_map(normal_inner).collect()
}

fn normal_field(value: Value) -> Option<Value> {
    match value {
        Value::Null => None,
        Value::String(s) if s.is_empty() => None,
        Value::Array(items) if items.is_empty() => None,
        Value::Array(items) => Some(Value::Array(items.into_iter().map(normal_item).collect())),
        // `state: {running: {}}` differs from `state: {}`: only maps that were empty to begin with go.
        Value::Object(map) if map.is_empty() => None,
        Value::Object(map) => Some(Value::Object(map.into_iter().filter_map(normal_inner).collect())),
        scalar => Some(scalar),
    }
}

fn normal_inner((key, value): (String, Value)) -> Option<(String, Value)> {
    match value {
        Value::Object(map) if map.is_empty() && TELLING_MAPS.contains(&key.as_str()) => Some((key, Value::Object(map))),
        other => Some((key, normal_field(other)?)),
    }
}

fn normal_item(value: Value) -> Value {
    match value {
        Value::Object(map) => Value::Object(map.into_iter().filter_map(normal_inner).collect()),
        other => other,
    }
}

fn conditions(status: &Map<String, Value>) -> impl Iterator<Item = &Value> {
    status.get("conditions").and_then(Value::as_array).into_iter().flatten()
}

fn condition_type(condition: &Value) -> &str {
    condition.get("type").and_then(Value::as_str).unwrap_or_default()
}

fn is_terminal(status: &Map<String, Value>) -> bool {
    matches!(status.get("phase").and_then(Value::as_str), Some("Succeeded" | "Failed"))
}

/// Others' conditions as the API has them, then the kubelet's own as wanted.
fn merge_conditions(old: &Map<String, Value>, new: &mut Map<String, Value>) {
    let mut merged: Vec<Value> =
        conditions(old).filter(|c| !OWN_CONDITIONS.contains(&condition_type(c))).cloned().collect();
    let ends = is_terminal(new) && !is_terminal(old);
    for condition in conditions(new) {
        let kind = condition_type(condition);
        if OWN_CONDITIONS.contains(&kind) {
            merged.push(condition.clone());
        } else if kind == SHARED_CONDITION && ends {
            match merged.iter_mut().find(|c| condition_type(c) == kind) {
                Some(existing) => *existing = condition.clone(),
                None => merged.push(condition.clone()),
            }
        }
    }
    let kept = conditions(old).find(|c| condition_type(c) == NEVER_REMOVED_CONDITION);
    if let Some(kept) = kept
        && !merged.iter().any(|c| condition_type(c) == NEVER_REMOVED_CONDITION)
    {
        merged.push(kept.clone());
    }
    if merged.is_empty() {
        new.remove("conditions");
    } else {
        new.insert("conditions".to_owned(), Value::Array(merged));
    }
}

fn diff_status(old: &Map<String, Value>, new: &Map<String, Value>) -> Map<String, Value> {
    let mut patch = Map::new();
    for (field, wanted) in new {
        if OTHERS_FIELDS.contains(&field.as_str()) || old.get(field) == Some(wanted) {
            continue;
        }
        match MERGED_LISTS.iter().find(|(list, _)| list == field) {
            Some((_, key)) => diff_merged_list(&mut patch, field, key, old.get(field), wanted),
            None => {
                patch.insert(field.clone(), diff_value(old.get(field), wanted));
            }
        }
    }
    for (field, had) in old {
        let foreign = OTHERS_FIELDS.contains(&field.as_str()) || KEPT_FIELDS.contains(&field.as_str());
        if foreign || new.contains_key(field) {
            continue;
        }
        match MERGED_LISTS.iter().find(|(list, _)| list == field) {
            Some((_, key)) => diff_merged_list(&mut patch, field, key, Some(had), &Value::Array(Vec::new())),
            None => {
                patch.insert(field.clone(), Value::Null);
            }
        }
    }
    patch
}

/// Maps differ field by field, everything else as a whole.
fn diff_value(old: Option<&Value>, new: &Value) -> Value {
    match (old, new) {
        (Some(Value::Object(old)), Value::Object(new)) => Value::Object(diff_map(old, new)),
        _ => new.clone(),
    }
}

fn diff_map(old: &Map<String, Value>, new: &Map<String, Value>) -> Map<String, Value> {
    let mut patch = Map::new();
    for (key, wanted) in new {
        if old.get(key) != Some(wanted) {
            patch.insert(key.clone(), diff_value(old.get(key), wanted));
        }
    }
    for key in old.keys().filter(|k| !new.contains_key(*k)) {
        patch.insert(key.clone(), Value::Null);
    }
    patch
}

fn items(list: Option<&Value>) -> impl Iterator<Item = &Map<String, Value>> + Clone {
    list.and_then(Value::as_array).map_or(&[][..], Vec::as_slice).iter().filter_map(Value::as_object)
}

/// Changed items with their merge key, removals as `$patch: delete`, and the order of all items that are to be there.
fn diff_merged_list(patch: &mut Map<String, Value>, field: &str, key: &str, old: Option<&Value>, new: &Value) {
    let mut changes: Vec<Value> = Vec::new();
    let old_items = items(old);
    let new_items = items(Some(new));
    for item in new_items.clone() {
        match old_items.clone().find(|o| o.get(key) == item.get(key)) {
            Some(same) if same == item => {}
            Some(before) => {
                let mut change = diff_map(before, item);
                change.insert(key.to_owned(), item.get(key).cloned().unwrap_or_default());
                changes.push(Value::Object(change));
            }
            None => changes.push(Value::Object(item.clone())),
        }
    }
    for gone in old_items.clone().filter(|o| !new_items.clone().any(|n| n.get(key) == o.get(key))) {
        changes.push(json!({ "$patch": "delete", key: gone.get(key).cloned().unwrap_or_default() }));
    }
    let order: Vec<Value> =
        new_items.clone().map(|item| json!({ key: item.get(key).cloned().unwrap_or_default() })).collect();
    // Another order alone is no change: conditions are a map to their readers. For addresses the first one is the primary.
    let reordered = field != "conditions" && {
        let old_keys: Vec<_> = old_items.clone().map(|o| o.get(key)).collect();
        let new_keys: Vec<_> = new_items.clone().map(|n| n.get(key)).collect();
        old_keys != new_keys
    };
    if changes.is_empty() && !reordered {
        return;
    }
    if !order.is_empty() {
        patch.insert(format!("$setElementOrder/{field}"), Value::Array(order));
    }
    if !changes.is_empty() {
        patch.insert(field.to_owned(), Value::Array(changes));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(value: Value) -> PodStatus {
        serde_json::from_value(value).unwrap()
    }

    fn patch(old: Value, new: Value) -> Option<Value> {
        patch_for(&status(old), &status(new), &PodUid::from("u1")).map(|p| {
            assert_eq!(p["metadata"], json!({ "uid": "u1" }));
            p["status"].clone()
        })
    }

    #[test]
    fn p44_equal_statuses_send_nothing() {
        let same = json!({"phase": "Running", "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}]});
        assert_eq!(patch(same.clone(), same), None);
        let a = json!({"phase": "Pending", "containerStatuses": [], "message": "", "conditions": []});
        assert_eq!(patch(a, json!({"phase": "Pending"})), None);
        let api = json!({"containerStatuses": [{"name": "a", "image": "", "imageID": "", "ready": false, "restartCount": 0, "lastState": {}, "state": {"waiting": {}}}]});
        let own = json!({"containerStatuses": [{"name": "a", "image": "", "imageID": "", "ready": false, "restartCount": 0, "state": {"waiting": {}}}]});
        assert_eq!(patch(api, own), None);
    }

    #[test]
    fn p44_only_what_changed_is_sent() {
        let old = json!({"phase": "Pending", "podIP": "10.0.0.1", "reason": "Evicted", "hostIP": "1.1.1.1"});
        let new = json!({"phase": "Running", "podIP": "10.0.0.1", "hostIP": "1.1.1.1"});
        assert_eq!(patch(old, new), Some(json!({"phase": "Running", "reason": null})));
    }

    #[test]
    fn p44_others_conditions_are_kept_and_own_ones_merged_by_type() {
        let old = json!({"conditions": [
            {"type": "example.com/gate", "status": "True"},
            {"type": "PodScheduled", "status": "True"},
            {"type": "PodResizePending", "status": "True"},
            {"type": "Ready", "status": "False", "reason": "ContainersNotReady", "message": "x"}]});
        let new = json!({"conditions": [
            {"type": "Ready", "status": "True"},
            {"type": "Initialized", "status": "True"},
            {"type": "somebody.else/stale", "status": "True"}]});
        let expected = json!({
            "$setElementOrder/conditions": [
                {"type": "example.com/gate"}, {"type": "Ready"}, {"type": "Initialized"}, {"type": "PodScheduled"}],
            "conditions": [
                {"type": "Ready", "status": "True", "reason": null, "message": null},
                {"type": "Initialized", "status": "True"},
                {"type": "PodResizePending", "$patch": "delete"}]});
        assert_eq!(patch(old, new), Some(expected));
    }

    #[test]
    fn p44_disruption_target_comes_with_the_terminal_phase_only() {
        let target = json!([{"type": "DisruptionTarget", "status": "True", "reason": "TerminationByKubelet"}]);
        assert_eq!(patch(json!({"phase": "Running"}), json!({"phase": "Running", "conditions": target})), None);
        let ended = patch(json!({"phase": "Running"}), json!({"phase": "Failed", "conditions": target})).unwrap();
        assert_eq!(ended["conditions"], target);
    }

    #[test]
    fn p44_empty_resources_are_told() {
        let of = |resources: Value| {
            json!({"phase": "Running", "containerStatuses": [{"name": "c", "image": "", "imageID": "", "ready": true,
                "restartCount": 0, "resources": resources}], "resources": resources})
        };
        let sent = patch(of(Value::Null), of(json!({}))).unwrap();
        assert_eq!(sent["containerStatuses"][0]["resources"], json!({}));
        assert_eq!(sent["resources"], json!({}));
        assert_eq!(patch(of(json!({})), of(json!({}))), None);
    }

    #[test]
    fn p44_container_statuses_are_replaced_whole() {
        let container =
            |ready: bool| json!({"name": "a", "image": "i", "imageID": "d", "ready": ready, "restartCount": 0});
        let old = json!({"containerStatuses": [container(false), {"name": "b", "image": "i", "imageID": "d", "ready": true, "restartCount": 0}]});
        let new = json!({"containerStatuses": [container(true), {"name": "b", "image": "i", "imageID": "d", "ready": true, "restartCount": 0}]});
        let sent = patch(old, new).unwrap();
        assert_eq!(sent["containerStatuses"].as_array().unwrap().len(), 2);
        assert_eq!(sent["containerStatuses"][0]["ready"], json!(true));
    }

    #[test]
    fn p44_addresses_merge_by_ip() {
        let old = json!({"podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]});
        let new = json!({"podIPs": [{"ip": "10.0.0.2"}, {"ip": "fd00::1"}]});
        let expected = json!({
            "$setElementOrder/podIPs": [{"ip": "10.0.0.2"}, {"ip": "fd00::1"}],
            "podIPs": [{"ip": "10.0.0.2"}, {"ip": "10.0.0.1", "$patch": "delete"}]});
        assert_eq!(patch(old, new), Some(expected));
        let cleared = patch(json!({"podIPs": [{"ip": "10.0.0.1"}]}), json!({}));
        assert_eq!(cleared, Some(json!({"podIPs": [{"ip": "10.0.0.1", "$patch": "delete"}]})));
    }

    #[test]
    fn p44_fields_of_others_are_neither_sent_nor_removed() {
        let old =
            json!({"nominatedNodeName": "n", "qosClass": "Burstable", "resourceClaimStatuses": [{"name": "gpu"}]});
        assert_eq!(patch(old, json!({})), None);
        assert_eq!(patch(json!({}), json!({"resourceClaimStatuses": [{"name": "gpu"}]})), None);
    }

    #[test]
    fn p44_resources_differ_field_by_field() {
        let old = json!({"resources": {"limits": {"cpu": "1", "memory": "1Gi"}}});
        let new = json!({"resources": {"limits": {"cpu": "2"}}});
        assert_eq!(patch(old, new), Some(json!({"resources": {"limits": {"cpu": "2", "memory": null}}})));
    }

    #[test]
    fn p44_times_are_whole_seconds_on_the_wire() {
        let at = crate::time::api_time("2026-01-01T10:00:00.987654321Z".parse().unwrap());
        let new = PodStatus { start_time: Some(at), ..PodStatus::default() };
        let sent = patch_for(&PodStatus::default(), &new, &PodUid::from("u")).unwrap();
        assert_eq!(sent["status"]["startTime"], json!("2026-01-01T10:00:00Z"));
    }
}
