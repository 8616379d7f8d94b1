//! Whether a pod may be on this node at all: node selector and affinity, node name, host ports, taints (contract A-02). Pure.
//!
//! The rules are the scheduler's, applied again because labels and taints may have changed since, and because somebody may have
//! bound the pod by hand.

use std::{borrow::Cow, collections::BTreeMap};

use k8s_openapi::api::core::v1 as corev1;

use crate::{
    node::NodeFacts,
    pods::{ContainerKind, Pod},
};

/// `nodeSelector` and the required part of `nodeAffinity`.
pub(super) fn node_affinity_matches(pod: &Pod, node: &NodeFacts) -> bool {
    let selector = pod.spec().node_selector.iter().flatten();
    if !selector.into_iter().all(|(key, value)| node.labels.get(key) == Some(value)) {
        return false;
    }
    let affinity = pod.spec().affinity.as_ref().and_then(|a| a.node_affinity.as_ref());
    let required = affinity.and_then(|a| a.required_during_scheduling_ignored_during_execution.as_ref());
    required.is_none_or(|required| required.node_selector_terms.iter().any(|term| term_matches(term, node)))
}

/// All requirements of one term. An empty term matches nothing, one that makes no sense neither.
fn term_matches(term: &corev1::NodeSelectorTerm, node: &NodeFacts) -> bool {
    let expressions = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    if expressions.is_empty() && fields.is_empty() {
        return false;
    }
    expressions.iter().all(|e| label_matches(e, &node.labels)) && fields.iter().all(|f| field_matches(f, &node.name))
}

fn label_matches(requirement: &corev1::NodeSelectorRequirement, labels: &BTreeMap<String, String>) -> bool {
    let values = requirement.values.as_deref().unwrap_or_default();
    let label = labels.get(&requirement.key);
    match requirement.operator.as_str() {
        "In" => label.is_some_and(|label| values.contains(label)),
        "NotIn" => !values.is_empty() && label.is_none_or(|label| !values.contains(label)),
        "Exists" => values.is_empty() && label.is_some(),
        "DoesNotExist" => values.is_empty() && label.is_none(),
        operator @ ("Gt" | "Lt") => {
            let [bound] = values else { return false };
            let (Ok(bound), Some(Ok(label))) = (bound.parse::<i64>(), label.map(|l| l.parse::<i64>())) else {
                return false;
            };
            if operator == "Gt" { label > bound } else { label < bound }
        }
        _ => false,
    }
}

/// The only field that nodes are selected by is `metadata.name`; any other is empty.
fn field_matches(requirement: &corev1::NodeSelectorRequirement, node_name: &str) -> bool {
    let field = if requirement.key == "metadata.name" { node_name } else { "" };
    let [value] = requirement.values.as_deref().unwrap_or_default() else { return false };
    match requirement.operator.as_str() {
        "In" => field == value,
        "NotIn" => field != value,
        _ => false,
    }
}

/// `spec.nodeName` is empty or this node's.
pub(super) fn node_name_matches(pod: &Pod, node: &NodeFacts) -> bool {
    let name = pod.spec().node_name.as_deref().unwrap_or_default();
    name.is_empty() || name == node.name
}

/// A port on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct HostPort<'a> {
    ip: &'a str,
    protocol: Cow<'a, str>,
    port: i32,
}

const ALL_ADDRESSES: &str = "0.0.0.0";

impl HostPort<'_> {
    fn conflicts(&self, other: &Self) -> bool {
        let same_address = self.ip == other.ip || self.ip == ALL_ADDRESSES || other.ip == ALL_ADDRESSES;
        same_address && self.port == other.port && self.protocol == other.protocol
    }
}

/// The host ports that a pod holds for as long as it runs: its mains' and sidecars'.
pub(super) fn host_ports(pod: &Pod) -> impl Iterator<Item = HostPort<'_>> {
    let lasting = pod.containers().filter(|c| matches!(c.kind, ContainerKind::Main | ContainerKind::Sidecar));
    lasting.flat_map(|c| c.spec.ports.iter().flatten()).filter_map(|p| {
        Some(HostPort {
            ip: p.host_ip.as_deref().filter(|ip| !ip.is_empty()).unwrap_or(ALL_ADDRESSES),
            protocol: p.protocol.as_deref().filter(|p| !p.is_empty()).unwrap_or("TCP").into(),
            port: p.host_port.filter(|port| *port > 0)?,
        })
    })
}

pub(super) fn host_ports_conflict(pod: &Pod, other: &Pod) -> bool {
    host_ports(pod).any(|wanted| host_ports(other).any(|held| wanted.conflicts(&held)))
}

/// Every NoExecute taint is tolerated; static pods tolerate all.
pub(super) fn taints_tolerated(pod: &Pod, node: &NodeFacts, comparison: bool) -> bool {
    pod.is_static() || node.taints.iter().filter(|t| t.effect == "NoExecute").all(|t| tolerates(pod, t, comparison))
}

/// `comparison`: the gate `TaintTolerationComparisonOperators`.
pub(super) fn tolerates(pod: &Pod, taint: &corev1::Taint, comparison: bool) -> bool {
    pod.spec().tolerations.iter().flatten().any(|toleration| toleration_matches(toleration, taint, comparison))
}

fn toleration_matches(toleration: &corev1::Toleration, taint: &corev1::Taint, comparison: bool) -> bool {
    let text = |field: &Option<String>| field.clone().unwrap_or_default();
    let (effect, key, value) = (text(&toleration.effect), text(&toleration.key), text(&toleration.value));
    if (!effect.is_empty() && effect != taint.effect) || (!key.is_empty() && key != taint.key) {
        return false;
    }
    let tainted = text(&taint.value);
    match toleration.operator.as_deref().unwrap_or_default() {
        "" | "Equal" => value == tainted,
        "Exists" => true,
        operator @ ("Lt" | "Gt") if comparison => match (decimal(&value), decimal(&tainted)) {
            (Some(bound), Some(tainted)) => {
                if operator == "Lt" {
                    tainted < bound
                } else {
                    tainted > bound
                }
            }
            _ => false,
        },
        _ => false,
    }
}

/// A whole number in its one canonical form: no sign but a minus, no leading zeros.
fn decimal(text: &str) -> Option<i64> {
    text.parse::<i64>().ok().filter(|n| n.to_string() == text)
}
