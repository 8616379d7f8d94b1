//! Which pods make room for a critical one (contract A-11). Pure.
//!
//! As few as possible, from the least protected class upwards: guaranteed pods only for what all others together cannot give, burstable ones
//! only for what the best-effort ones cannot. Within a class the pod that comes closest to what is missing goes first, the smaller
//! of two that come equally close.

use super::{
    decide::Occupant,
    demand::{CPU, Insufficient, MEMORY},
};
use crate::{
    pods::Pod,
    resources::{QosClass, is_critical, qos_class},
};

/// Resource name and what is still missing of it.
type Requirements = Vec<(String, i64)>;

/// The victims, or the requirements that no set of pods can meet, in upstream's words.
pub(super) fn victims<'a>(
    preemptor: &Pod,
    occupants: impl Iterator<Item = &'a Occupant>,
    short: &[Insufficient],
) -> Result<Vec<&'a Occupant>, String> {
    let required: Requirements = short.iter().map(|s| (s.resource.clone(), s.shortage())).collect();
    let (mut best_effort, mut burstable, mut guaranteed) = (Vec::new(), Vec::new(), Vec::new());
    for occupant in occupants.filter(|o| preemptable(preemptor, &o.pod)) {
        match qos_class(&occupant.pod) {
            QosClass::BestEffort => best_effort.push(occupant),
            QosClass::Burstable => burstable.push(occupant),
            QosClass::Guaranteed => guaranteed.push(occupant),
        }
    }
    let after = |required: &Requirements, gone: &[&[&'a Occupant]]| less(required, gone.iter().copied().flatten());
    let unmet = after(&required, &[&best_effort, &burstable, &guaranteed]);
    if !unmet.is_empty() {
        return Err(nobody(&unmet));
    }
    let of_guaranteed = closest(guaranteed, after(&required, &[&best_effort, &burstable]))?;
    let of_burstable = closest(burstable, after(&required, &[&best_effort, &of_guaranteed]))?;
    let of_best_effort = closest(best_effort, after(&required, &[&of_burstable, &of_guaranteed]))?;
    Ok([of_best_effort, of_burstable, of_guaranteed].concat())
}

/// A critical pod may replace any that is not; otherwise the priority tells.
fn preemptable(preemptor: &Pod, occupant: &Pod) -> bool {
    if is_critical(preemptor) && !is_critical(occupant) {
        return true;
    }
    matches!((preemptor.spec().priority, occupant.spec().priority), (Some(own), Some(other)) if own > other)
}

fn less<'a>(required: &Requirements, gone: impl Iterator<Item = &'a &'a Occupant> + Clone) -> Requirements {
    let missing = |(resource, missing): &(String, i64)| {
        let freed = gone.clone().fold(0_i64, |sum, o| sum.saturating_add(o.demand.freed(resource)));
        (resource.clone(), missing.saturating_sub(freed))
    };
    required.iter().map(missing).filter(|(_, missing)| *missing > 0).collect()
}

fn nobody(unmet: &Requirements) -> String {
    let list: String = unmet.iter().map(|(resource, missing)| format!("(res: {resource}, q: {missing}), ")).collect();
    format!("no set of running pods found to reclaim resources: [{list}]")
}

/// Takes pods until the requirements are met.
fn closest(mut pods: Vec<&Occupant>, mut required: Requirements) -> Result<Vec<&Occupant>, String> {
    let mut taken = Vec::new();
    while !required.is_empty() {
        let mut best: Option<(usize, f64)> = None;
        for (index, pod) in pods.iter().enumerate() {
            let distance = distance(&required, pod);
            let closer = best.is_none_or(|(chosen, least)| {
                distance < least || (distance.total_cmp(&least).is_eq() && smaller(pod, pods[chosen]))
            });
            if closer {
                best = Some((index, distance));
            }
        }
        let Some((index, _)) = best else { return Err(nobody(&required)) };
        let chosen = pods.remove(index);
        required = less(&required, std::iter::once(&chosen));
        taken.push(chosen);
    }
    Ok(taken)
}

/// The squared fractions that would still be missing: every resource weighs the same.
fn distance(required: &Requirements, pod: &Occupant) -> f64 {
    let part = |(resource, missing): &(String, i64)| {
        let left = missing.saturating_sub(pod.demand.freed(resource));
        if left > 0 { (left as f64 / *missing as f64).powi(2) } else { 0.0 }
    };
    required.iter().map(part).sum()
}

fn smaller(pod: &Occupant, other: &Occupant) -> bool {
    let size = |o: &Occupant| (o.demand.get(MEMORY), o.demand.get(CPU));
    size(pod) <= size(other)
}
