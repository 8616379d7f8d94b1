//! The status of a pod from what its worker sees (contract 3.4). Pure.
//!
//! The runtime's containers and the last published status go in; a whole `PodStatus` comes out. Times are whole seconds, conditions
//! keep their transition time while their status stays, other writers' conditions pass through untouched.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
};

use jiff::Timestamp;
use k8s_openapi::{api::core::v1 as corev1, apimachinery::pkg::apis::meta::v1::Time};

use super::{
    conditions, containers, phase,
    resources::{self, ResourceView},
};
use crate::{
    admission::Rejection,
    cri::PodRuntime,
    node::NodeFacts,
    pod_worker::{
        restart::LifecycleGates,
        view::{EndCause, Phase, WaitingReason},
    },
    pods::Pod,
    probes::ContainerVerdicts,
    resources::qos_class,
    time::Now,
};

/// Everything that a status is made from.
#[derive(Clone, Copy)]
pub struct StatusInput<'a> {
    pub now: Now,
    /// With the resources that it is allocated.
    pub pod: &'a Pod,
    pub resources: ResourceView<'a>,
    /// The last status generated here, or the API's when there is none.
    pub last: &'a corev1::PodStatus,
    /// `None`: the runtime has not been read; container states stay as they were.
    pub runtime: Option<&'a PodRuntime>,
    pub phase: Phase,
    pub end: Option<&'a EndCause>,
    pub started: Option<Timestamp>,
    pub verdicts: &'a HashMap<String, ContainerVerdicts>,
    pub waiting: &'a BTreeMap<String, WaitingReason>,
    /// IDs of containers that are, or were, killed to be started again whatever their exit code.
    pub replaced: &'a BTreeSet<String>,
    /// Container name → ID whose postStart hook has not returned.
    pub post_start: &'a HashMap<String, String>,
    /// By container ID.
    pub termination_messages: &'a HashMap<String, String>,
    pub node: &'a NodeFacts,
    /// The scheme of container IDs: `containerd`.
    pub runtime_name: &'a str,
    pub gates: LifecycleGates,
}

/// See the module.
pub fn generate(input: &StatusInput<'_>) -> corev1::PodStatus {
    if let Some(EndCause::Rejected(rejection)) = input.end
        && input.phase >= Phase::Terminated
        && input.runtime.is_none_or(|runtime| runtime.containers.is_empty())
    {
        return rejected(input, rejection);
    }
    let mut status = corev1::PodStatus {
        qos_class: input.last.qos_class.clone().or_else(|| input.pod.api_status().qos_class.clone()),
        start_time: input.started.map(crate::time::api_time).or_else(|| input.last.start_time.clone()),
        nominated_node_name: input.last.nominated_node_name.clone(),
        resource_claim_statuses: input.last.resource_claim_statuses.clone(),
        observed_generation: Some(input.pod.generation()).filter(|g| *g > 0),
        ..Default::default()
    };
    status.init_container_statuses = Some(containers::init_statuses(input)).filter(|l| !l.is_empty());
    status.container_statuses = Some(containers::main_statuses(input));
    status.ephemeral_container_statuses = Some(containers::ephemeral_statuses(input)).filter(|l| !l.is_empty());
    set_phase(input, &mut status);
    containers::share_messages(input.pod, &mut status);
    // Of the end as it was seen: what is missing is called lost only afterwards, as upstream does.
    status.conditions = Some(conditions::generate(input, &status));
    end_for_good(input, &mut status);
    set_addresses(input, &mut status);
    resources::pod(input, &mut status);
    status
}

/// A pod that never began: it has no containers, addresses or conditions to tell of (contract 3.2).
fn rejected(input: &StatusInput<'_>, rejection: &Rejection) -> corev1::PodStatus {
    corev1::PodStatus {
        qos_class: Some(qos_class(input.pod).as_str().to_owned()),
        start_time: input.started.map(crate::time::api_time).or_else(|| input.last.start_time.clone()),
        observed_generation: Some(input.pod.generation()).filter(|g| *g > 0),
        phase: Some("Failed".to_owned()),
        reason: Some(rejection.reason.clone()),
        message: Some(rejection.status_message()),
        nominated_node_name: input.last.nominated_node_name.clone(),
        resource_claim_statuses: input.last.resource_claim_statuses.clone(),
        ..Default::default()
    }
}

/// Phase, reason and message; terminal only when nothing can run any more, and then for good (contract P-40).
/// Nothing runs any more, and nothing will: containers have ended, and so has the pod (contract P-40).
fn end_for_good(input: &StatusInput<'_>, status: &mut corev1::PodStatus) {
    if input.phase < Phase::Terminated {
        return;
    }
    containers::force_terminal(input, status);
    if !input.pod.is_static() && !status.phase.as_deref().is_some_and(phase::is_terminal) {
        status.phase = Some("Failed".to_owned());
    }
}

fn set_phase(input: &StatusInput<'_>, status: &mut corev1::PodStatus) {
    let terminated = input.phase >= Phase::Terminated;
    let last = input.last.phase.as_deref().or(input.pod.api_status().phase.as_deref()).unwrap_or("Pending");
    let mut phase = phase::phase(input, status, terminated);
    if phase::is_terminal(last) {
        phase = if last == "Failed" { "Failed" } else { "Succeeded" };
    } else if terminated && !input.pod.is_static() {
        if let Some(EndCause::Ordered(_) | EndCause::Rejected(_)) = input.end {
            phase = "Failed";
        }
    } else if phase::is_terminal(phase) {
        // Something may still be stopping: the API hears of the end when it is the end.
        phase = if last == "Pending" { "Pending" } else { "Running" };
    }
    if phase == last {
        status.reason = input.last.reason.clone();
        status.message = input.last.message.clone();
    }
    if let (true, Some(EndCause::Ordered(order))) = (terminated, input.end) {
        status.reason = Some(order.reason.clone());
        status.message = Some(order.message.clone());
    }
    if let (true, Some(EndCause::Rejected(rejection))) = (terminated, input.end) {
        status.reason = Some(rejection.reason.clone());
        status.message = Some(rejection.status_message());
    }
    status.phase = Some(phase.to_owned());
}

/// Host and pod addresses (contract P-43). A pod keeps its addresses after its sandbox is gone.
fn set_addresses(input: &StatusInput<'_>, status: &mut corev1::PodStatus) {
    let hosts = &input.node.ips;
    status.host_ip = hosts.first().map(ToString::to_string).or_else(|| input.last.host_ip.clone());
    status.host_ips = match hosts.is_empty() {
        true => input.last.host_ips.clone(),
        false => Some(hosts.iter().map(|ip| corev1::HostIP { ip: ip.to_string() }).collect()),
    };
    let ips: Vec<String> = if input.pod.host_network() {
        let known = input.last.pod_ips.iter().flatten().map(|p| p.ip.clone()).collect::<Vec<_>>();
        if known.is_empty() { hosts.iter().map(ToString::to_string).collect() } else { known }
    } else {
        let sandbox = input.runtime.and_then(PodRuntime::latest_sandbox).filter(|s| !s.ips.is_empty());
        match sandbox {
            Some(sandbox) => sorted_ips(&sandbox.ips, hosts.first()).iter().map(ToString::to_string).collect(),
            None => input.last.pod_ips.iter().flatten().map(|p| p.ip.clone()).collect(),
        }
    };
    status.pod_ip = ips.first().cloned();
    status.pod_ips = Some(ips.into_iter().map(|ip| corev1::PodIP { ip }).collect::<Vec<_>>()).filter(|l| !l.is_empty());
}

/// At most one address of each family, the node's primary family first.
pub fn sorted_ips(ips: &[IpAddr], primary: Option<&IpAddr>) -> Vec<IpAddr> {
    let v6_first = primary.is_some_and(IpAddr::is_ipv6);
    let first = ips.iter().find(|ip| ip.is_ipv6() == v6_first);
    let second = ips.iter().find(|ip| ip.is_ipv6() != v6_first);
    first.into_iter().chain(second).copied().collect()
}

/// A runtime time for the API.
pub(super) fn time(at: Option<Timestamp>) -> Option<Time> {
    at.map(crate::time::api_time)
}
