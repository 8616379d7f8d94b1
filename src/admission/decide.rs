//! The decision on one pod: pure, and the same whatever order its inputs are kept in (contract A-01 … A-12).
//!
//! The checks come in upstream's order, and the first that fails gives reason and message: node pressure, sysctls, operating system,
//! supplemental groups policy, then resources, affinity, name, ports and taints together (a critical pod may make room for itself), AppArmor,
//! pod-level resources, declared features.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::Taint;

use super::{
    Rejection, app_armor, declared_features,
    demand::{Demand, Insufficient, insufficient},
    placement, preemption,
    sysctls::SysctlAllowlist,
};
use crate::{
    node::{NodeFacts, Pressure},
    pods::{Pod, PodUid},
    resources::{QosClass, is_critical, pod_level_set, qos_class},
};

const OS: &str = "linux";
const OS_LABEL: &str = "kubernetes.io/os";

/// What is the same for all pods of a node, fixed at start.
#[derive(Debug, Clone, Default)]
pub struct Policy {
    pub sysctls: SysctlAllowlist,
    /// The kernel enforces AppArmor.
    pub app_armor: bool,
    /// Gate `PodLevelResources`.
    pub pod_level_resources: bool,
    /// Gate `TaintTolerationComparisonOperators`.
    pub taint_comparison: bool,
    /// `status.declaredFeatures`.
    pub declared_features: BTreeSet<&'static str>,
}

/// The pod to decide on.
#[derive(Debug, Clone, Copy)]
pub struct Candidate<'a> {
    pub pod: &'a Pod,
    /// Containers of it run already: it holds what it needs, and is not asked for what only a start needs (contract R-26).
    pub running: bool,
}

/// A pod that holds a place.
#[derive(Debug, Clone)]
pub struct Occupant {
    pub pod: Pod,
    pub demand: Demand,
    /// It was told to go, in favour of another: its place is promised already.
    pub leaving: bool,
}

impl Occupant {
    pub fn new(pod: Pod) -> Self {
        Self { demand: Demand::of_pod(&pod), pod, leaving: false }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    Admitted,
    /// There is room for it once these have left.
    AdmittedAfter(BTreeSet<PodUid>),
    /// `labels_decide`: only the node's labels speak against it; those known here may be older than those that the scheduler saw.
    Rejected {
        rejection: Rejection,
        labels_decide: bool,
    },
    /// Critical: there is room for it once the victims, and `leaving`, have left.
    Preempt {
        victims: Vec<PodUid>,
        leaving: BTreeSet<PodUid>,
        /// The resource that was short first: a label of the metric.
        signal: String,
    },
}

impl From<Rejection> for Decision {
    fn from(rejection: Rejection) -> Self {
        Self::Rejected { rejection, labels_decide: false }
    }
}

/// Why a pod cannot be on a node.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Misfit {
    Short(Insufficient),
    NodeAffinity,
    NodeName,
    NodePorts,
    TaintToleration,
}

impl Misfit {
    fn rejection(&self) -> Rejection {
        let (predicate, what) = match self {
            Self::Short(short) => return Rejection::new(format!("OutOf{}", short.resource), short.to_string()),
            Self::NodeAffinity => ("NodeAffinity", "node(s) didn't match Pod's node affinity/selector"),
            Self::NodeName => ("NodeName", "node(s) didn't match the requested node name"),
            Self::NodePorts => ("NodePorts", "node(s) didn't have free ports for the requested pod ports"),
            Self::TaintToleration => ("TaintToleration", "node(s) had taints that the pod didn't tolerate"),
        };
        Rejection::new(predicate, format!("Predicate {predicate} failed: {what}"))
    }
}

/// See the module. `others`: all that hold a place, in the order in which they got it, the candidate not among them.
pub fn admit(candidate: &Candidate<'_>, node: &NodeFacts, others: &[&Occupant], policy: &Policy) -> Decision {
    if let Err(rejection) = before_placement(candidate, node, policy) {
        return rejection.into();
    }
    let staying: Vec<&Occupant> = others.iter().copied().filter(|o| !o.leaving).collect();
    let misfits = misfits(candidate, node, &staying, policy);
    let critical = is_critical(candidate.pod);
    // Resources are no reason to turn a critical pod away.
    let counts = |misfit: &&Misfit| !critical || !matches!(misfit, Misfit::Short(_));
    if let Some(first) = misfits.iter().find(counts) {
        let labels_decide = misfits.iter().all(|m| *m == Misfit::NodeAffinity);
        return Decision::Rejected { rejection: first.rejection(), labels_decide };
    }
    let short: Vec<Insufficient> = misfits.into_iter().filter_map(short).collect();
    let victims = match preemption::victims(candidate.pod, staying.into_iter(), &short) {
        Ok(victims) => victims,
        Err(problem) => return no_victims(&problem).into(),
    };
    if let Err(rejection) = after_placement(candidate, policy) {
        return rejection.into();
    }
    place(candidate, node, others, policy, &short, &victims)
}

fn short(misfit: Misfit) -> Option<Insufficient> {
    match misfit {
        Misfit::Short(short) => Some(short),
        _ => None,
    }
}

fn no_victims(problem: &str) -> Rejection {
    let message = format!(
        "Unexpected error while attempting to recover from admission failure: preemption: error finding a set of pods to preempt: {problem}"
    );
    Rejection::new("UnexpectedAdmissionError", message)
}

/// Nothing speaks against it: at once, or when somebody has left.
fn place(
    candidate: &Candidate<'_>,
    node: &NodeFacts,
    others: &[&Occupant],
    policy: &Policy,
    short: &[Insufficient],
    victims: &[&Occupant],
) -> Decision {
    let leaving = || others.iter().filter(|o| o.leaving).map(|o| o.pod.uid().clone()).collect::<BTreeSet<PodUid>>();
    match short.first() {
        Some(first) => Decision::Preempt {
            victims: victims.iter().map(|v| v.pod.uid().clone()).collect(),
            leaving: leaving(),
            signal: first.resource.clone(),
        },
        None if misfits(candidate, node, others, policy).is_empty() => Decision::Admitted,
        None => Decision::AdmittedAfter(leaving()),
    }
}

fn before_placement(candidate: &Candidate<'_>, node: &NodeFacts, policy: &Policy) -> Result<(), Rejection> {
    let pod = candidate.pod;
    if !candidate.running {
        pressure(pod, node, policy)?;
    }
    policy.sysctls.check(pod)?;
    if pod.labels().get(OS_LABEL).is_some_and(|os| os != OS) {
        let message = "Failed to admit pod as the `kubernetes.io/os` label doesn't match node label";
        return Err(Rejection::new("PodOSSelectorNodeLabelDoesNotMatch", message));
    }
    if pod.spec().os.as_ref().is_some_and(|os| os.name != OS) {
        let message = "Failed to admit pod as the OS field doesn't match node OS";
        return Err(Rejection::new("PodOSNotSupported", message));
    }
    let groups = pod.spec().security_context.as_ref().and_then(|c| c.supplemental_groups_policy.as_deref());
    if groups == Some("Strict") && !node.supplemental_groups_policy {
        let message = "SupplementalGroupsPolicy=Strict is not supported in this node";
        return Err(Rejection::new("SupplementalGroupsPolicyNotSupported", message));
    }
    Ok(())
}

/// A node short of memory takes no best-effort pods unless they tolerate it; one short of anything else takes critical pods only
/// (contract A-08).
fn pressure(pod: &Pod, node: &NodeFacts, policy: &Policy) -> Result<(), Rejection> {
    if node.pressures.is_empty() || is_critical(pod) {
        return Ok(());
    }
    if node.pressures == BTreeSet::from([Pressure::Memory]) {
        let taint = Taint {
            key: "node.kubernetes.io/memory-pressure".to_owned(),
            effect: "NoSchedule".to_owned(),
            ..Taint::default()
        };
        if qos_class(pod) != QosClass::BestEffort || placement::tolerates(pod, &taint, policy.taint_comparison) {
            return Ok(());
        }
    }
    let names: Vec<&str> = node.pressures.iter().map(|p| p.condition()).collect();
    Err(Rejection::new("Evicted", format!("The node had condition: [{}]. ", names.join(" "))))
}

fn misfits(candidate: &Candidate<'_>, node: &NodeFacts, others: &[&Occupant], policy: &Policy) -> Vec<Misfit> {
    let pod = candidate.pod;
    let mut found = Vec::new();
    if !candidate.running {
        let allocatable = Demand::of_texts(&node.allocatable);
        let wanted = Demand::of_pod(pod).on_this_node(pod, &allocatable);
        let held: Vec<&Demand> = others.iter().map(|o| &o.demand).collect();
        found.extend(insufficient(&wanted, &held, &allocatable).into_iter().map(Misfit::Short));
    }
    if !placement::node_affinity_matches(pod, node) {
        found.push(Misfit::NodeAffinity);
    }
    if !placement::node_name_matches(pod, node) {
        found.push(Misfit::NodeName);
    }
    if !candidate.running && others.iter().any(|o| placement::host_ports_conflict(pod, &o.pod)) {
        found.push(Misfit::NodePorts);
    }
    if !placement::taints_tolerated(pod, node, policy.taint_comparison) {
        found.push(Misfit::TaintToleration);
    }
    found
}

fn after_placement(candidate: &Candidate<'_>, policy: &Policy) -> Result<(), Rejection> {
    let pod = candidate.pod;
    let pending = matches!(pod.api_status().phase.as_deref(), None | Some("" | "Pending"));
    if pending && !candidate.running {
        app_armor::check(pod, policy.app_armor)
            .map_err(|problem| Rejection::new("AppArmor", format!("Cannot enforce AppArmor: {problem}")))?;
    }
    if pod_level_set(pod) && !policy.pod_level_resources {
        let message = "PodLevelResources feature gate is disabled";
        return Err(Rejection::new("PodLevelResourcesNotSupported", message));
    }
    let missing = declared_features::missing_for_pod(pod, &policy.declared_features);
    if !missing.is_empty() {
        return Err(Rejection::new("PodFeatureUnsupported", missing_features(&missing)));
    }
    Ok(())
}

/// The message of the rejection, and of the event about an update.
pub(super) fn missing_features(missing: &[&str]) -> String {
    format!("Pod requires node features that are not available: {}", missing.join(", "))
}
