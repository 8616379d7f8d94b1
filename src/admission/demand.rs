//! Amounts as the scheduler counts them, and whether they fit (contract A-01). Pure.
//!
//! CPU in millicores, everything else in whole units (bytes, pieces), fractions rounded up per pod. Counted are cpu, memory,
//! ephemeral-storage and what the scheduler calls scalar: huge pages, extended and attachable resources.

use std::{collections::BTreeMap, fmt};

use crate::{
    pods::Pod,
    quantity::Quantity,
    resources::{ResourceList, pod_requests},
};

pub(super) const CPU: &str = "cpu";
pub(super) const MEMORY: &str = "memory";
const EPHEMERAL_STORAGE: &str = "ephemeral-storage";
pub(super) const PODS: &str = "pods";

/// Resource name → amount.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Demand(BTreeMap<String, i64>);

impl Demand {
    /// What the pod requests, overhead included.
    pub fn of_pod(pod: &Pod) -> Self {
        Self::of(&pod_requests(pod))
    }

    pub(super) fn of(list: &ResourceList) -> Self {
        Self(list.iter().filter(|(name, _)| counted(name)).map(|(name, q)| (name.clone(), amount(name, q))).collect())
    }

    /// From quantities as text: the node's allocatable. What does not parse is not there.
    pub fn of_texts(texts: &BTreeMap<String, String>) -> Self {
        let parsed = texts.iter().filter_map(|(name, text)| Some((name.clone(), Quantity::parse(text).ok()?)));
        Self(parsed.map(|(name, q)| (name.clone(), amount(&name, &q))).collect())
    }

    pub fn get(&self, resource: &str) -> i64 {
        self.0.get(resource).copied().unwrap_or(0)
    }

    /// What a pod frees of a resource when it goes; a place among the pods for `pods`.
    pub(super) fn freed(&self, resource: &str) -> i64 {
        if resource == PODS { 1 } else { self.get(resource) }
    }

    /// Without the extended resources that the node does not have, which somebody else looks after (cluster-level resources), and those
    /// that a resource claim of the pod stands for.
    pub(super) fn on_this_node(&self, pod: &Pod, allocatable: &Self) -> Self {
        let claims = pod.api_status().extended_resource_claim_status.as_ref();
        let claimed = |name: &str| claims.is_some_and(|c| c.request_mappings.iter().any(|m| m.resource_name == name));
        let kept = |name: &str| !extended(name) || (allocatable.0.contains_key(name) && !claimed(name));
        Self(self.0.iter().filter(|(name, _)| kept(name)).map(|(name, amount)| (name.clone(), *amount)).collect())
    }
}

fn amount(name: &str, quantity: &Quantity) -> i64 {
    if name == CPU { quantity.milli_value() } else { quantity.value() }
}

fn counted(name: &str) -> bool {
    matches!(name, CPU | MEMORY | EPHEMERAL_STORAGE)
        || extended(name)
        || name.starts_with("hugepages-")
        || name.starts_with("attachable-volumes-")
        || name.contains("kubernetes.io/")
}

/// A resource of somebody else's domain: `example.com/gpu`.
fn extended(name: &str) -> bool {
    name.contains('/') && !name.contains("kubernetes.io/") && !name.starts_with("requests.")
}

/// A resource that does not suffice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Insufficient {
    pub resource: String,
    pub requested: i64,
    pub used: i64,
    pub capacity: i64,
}

impl Insufficient {
    /// What is missing.
    pub(super) fn shortage(&self) -> i64 {
        self.requested - (self.capacity - self.used)
    }
}

impl fmt::Display for Insufficient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { resource, requested, used, capacity } = self;
        write!(
            f,
            "Node didn't have enough resource: {resource}, requested: {requested}, used: {used}, capacity: {capacity}"
        )
    }
}

/// Every resource that does not suffice: pods, cpu, memory, ephemeral-storage, then the others by name.
pub(super) fn insufficient(wanted: &Demand, others: &[&Demand], allocatable: &Demand) -> Vec<Insufficient> {
    let mut short = Vec::new();
    let places = allocatable.get(PODS);
    let taken = i64::try_from(others.len()).unwrap_or(i64::MAX);
    if taken.saturating_add(1) > places {
        short.push(Insufficient { resource: PODS.to_owned(), requested: 1, used: taken, capacity: places });
    }
    let first = [CPU, MEMORY, EPHEMERAL_STORAGE];
    let rest = wanted.0.keys().map(String::as_str).filter(|name| !first.contains(name));
    for resource in first.into_iter().chain(rest) {
        let requested = wanted.get(resource);
        let used = others.iter().fold(0_i64, |sum, other| sum.saturating_add(other.get(resource)));
        let capacity = allocatable.get(resource);
        if requested > 0 && requested > capacity.saturating_sub(used) {
            short.push(Insufficient { resource: resource.to_owned(), requested, used, capacity });
        }
    }
    short
}
