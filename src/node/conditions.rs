//! The node's four conditions (contract N-16, N-17). Pure.
//!
//! In: the conditions that the Node has, the pressures, why the node is not ready. Out: the new conditions, in upstream's order and
//! with its wording, and which transitions are worth an event. Conditions of others are kept where they are.

use std::collections::BTreeSet;

use k8s_openapi::{api::core::v1::NodeCondition, apimachinery::pkg::apis::meta::v1::Time};

use super::pressure::Pressure;

/// What a condition says in one of its states.
struct Wording {
    reason: &'static str,
    message: &'static str,
    event: &'static str,
}

/// Type, wording under pressure, wording without.
const PRESSURES: [(Pressure, &str, Wording, Wording); 3] = [
    (
        Pressure::Memory,
        "MemoryPressure",
        Wording {
            reason: "KubeletHasInsufficientMemory",
            message: "kubelet has insufficient memory available",
            event: "NodeHasInsufficientMemory",
        },
        Wording {
            reason: "KubeletHasSufficientMemory",
            message: "kubelet has sufficient memory available",
            event: "NodeHasSufficientMemory",
        },
    ),
    (
        Pressure::Disk,
        "DiskPressure",
        Wording {
            reason: "KubeletHasDiskPressure",
            message: "kubelet has disk pressure",
            event: "NodeHasDiskPressure",
        },
        Wording {
            reason: "KubeletHasNoDiskPressure",
            message: "kubelet has no disk pressure",
            event: "NodeHasNoDiskPressure",
        },
    ),
    (
        Pressure::Pid,
        "PIDPressure",
        Wording {
            reason: "KubeletHasInsufficientPID",
            message: "kubelet has insufficient PID available",
            event: "NodeHasInsufficientPID",
        },
        Wording {
            reason: "KubeletHasSufficientPID",
            message: "kubelet has sufficient PID available",
            event: "NodeHasSufficientPID",
        },
    ),
];

/// The new conditions, and the reasons of the events that the changes are worth (`NodeReady`, `NodeHasDiskPressure`, …).
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ConditionUpdate {
    pub conditions: Vec<NodeCondition>,
    pub events: Vec<&'static str>,
}

/// `not_ready` lists the causes in upstream's order: runtime, network, storage, capacity. `now` has whole seconds.
pub fn update(
    current: &[NodeCondition],
    pressures: &BTreeSet<Pressure>,
    not_ready: &[String],
    now: &Time,
) -> ConditionUpdate {
    let mut update = ConditionUpdate { conditions: current.to_vec(), events: Vec::new() };
    for (pressure, type_, under, without) in &PRESSURES {
        let (status, wording) = if pressures.contains(pressure) { ("True", under) } else { ("False", without) };
        update.set_pressure(type_, status, wording, now);
    }
    update.set_ready(not_ready, now);
    update
}

impl ConditionUpdate {
    /// The condition of this type, made as Unknown when there is none.
    fn entry(&mut self, type_: &str) -> (&mut NodeCondition, bool) {
        let found = self.conditions.iter().position(|c| c.type_ == type_);
        let index = found.unwrap_or_else(|| {
            let new =
                NodeCondition { type_: type_.to_owned(), status: "Unknown".to_owned(), ..NodeCondition::default() };
            self.conditions.push(new);
            self.conditions.len() - 1
        });
        (&mut self.conditions[index], found.is_none())
    }

    fn set_pressure(&mut self, type_: &str, status: &str, wording: &Wording, now: &Time) {
        let (condition, _) = self.entry(type_);
        condition.last_heartbeat_time = Some(now.clone());
        if condition.status == status {
            return;
        }
        condition.status = status.to_owned();
        condition.reason = Some(wording.reason.to_owned());
        condition.message = Some(wording.message.to_owned());
        condition.last_transition_time = Some(now.clone());
        self.events.push(wording.event);
    }

    fn set_ready(&mut self, not_ready: &[String], now: &Time) {
        let (status, reason, event) = match not_ready {
            [] => ("True", "KubeletReady", "NodeReady"),
            _ => ("False", "KubeletNotReady", "NodeNotReady"),
        };
        let (condition, new) = self.entry("Ready");
        condition.last_heartbeat_time = Some(now.clone());
        condition.reason = Some(reason.to_owned());
        condition.message = Some(aggregate(not_ready).unwrap_or_else(|| "kubelet is posting ready status".to_owned()));
        if condition.status != status {
            condition.status = status.to_owned();
            condition.last_transition_time = Some(now.clone());
            if !new {
                self.events.push(event);
            }
        }
    }
}

/// Joins errors as upstream's aggregate does: one stands alone, several in brackets, the same one once.
fn aggregate(errors: &[String]) -> Option<String> {
    let mut seen = BTreeSet::new();
    let distinct: Vec<&str> = errors.iter().map(String::as_str).filter(|e| seen.insert(*e)).collect();
    match distinct.as_slice() {
        [] => None,
        [one] => Some((*one).to_owned()),
        many => Some(format!("[{}]", many.join(", "))),
    }
}

/// Whether anything but heartbeat times and order differs.
pub fn differ(old: &[NodeCondition], new: &[NodeCondition]) -> bool {
    let plain = |conditions: &[NodeCondition]| {
        let mut list: Vec<NodeCondition> = conditions.to_vec();
        list.iter_mut().for_each(|c| c.last_heartbeat_time = None);
        list.sort_by(|a, b| a.type_.cmp(&b.type_));
        list
    };
    plain(old) != plain(new)
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;

    fn at(second: i64) -> Time {
        Time(Timestamp::from_second(second).unwrap())
    }

    fn seconds(time: &Option<Time>) -> i64 {
        time.as_ref().unwrap().0.as_second()
    }

    fn none() -> BTreeSet<Pressure> {
        BTreeSet::new()
    }

    #[test]
    fn n16_order_and_wording_of_a_healthy_node() {
        let update = update(&[], &none(), &[], &at(10));
        let text: Vec<String> = update
            .conditions
            .iter()
            .map(|c| format!("{}={} {} {}", c.type_, c.status, c.reason.clone().unwrap(), c.message.clone().unwrap()))
            .collect();
        assert_eq!(
            text,
            [
                "MemoryPressure=False KubeletHasSufficientMemory kubelet has sufficient memory available",
                "DiskPressure=False KubeletHasNoDiskPressure kubelet has no disk pressure",
                "PIDPressure=False KubeletHasSufficientPID kubelet has sufficient PID available",
                "Ready=True KubeletReady kubelet is posting ready status",
            ]
        );
        assert_eq!(update.events, ["NodeHasSufficientMemory", "NodeHasNoDiskPressure", "NodeHasSufficientPID"]);
    }

    #[test]
    fn n16_wording_and_events_under_pressure() {
        let calm = update(&[], &none(), &[], &at(10)).conditions;
        let all = [Pressure::Memory, Pressure::Disk, Pressure::Pid].into();
        let pressed = update(&calm, &all, &[], &at(20));
        let text: Vec<String> = pressed
            .conditions
            .iter()
            .take(3)
            .map(|c| format!("{}={} {} {}", c.type_, c.status, c.reason.clone().unwrap(), c.message.clone().unwrap()))
            .collect();
        assert_eq!(
            text,
            [
                "MemoryPressure=True KubeletHasInsufficientMemory kubelet has insufficient memory available",
                "DiskPressure=True KubeletHasDiskPressure kubelet has disk pressure",
                "PIDPressure=True KubeletHasInsufficientPID kubelet has insufficient PID available",
            ]
        );
        assert_eq!(pressed.events, ["NodeHasInsufficientMemory", "NodeHasDiskPressure", "NodeHasInsufficientPID"]);
        let back = update(&pressed.conditions, &none(), &[], &at(30));
        assert_eq!(back.events, ["NodeHasSufficientMemory", "NodeHasNoDiskPressure", "NodeHasSufficientPID"]);
    }

    #[test]
    fn n16_heartbeat_moves_always_and_transition_only_on_change() {
        let first = update(&[], &none(), &[], &at(10)).conditions;
        let second = update(&first, &none(), &[], &at(20));
        assert!(second.events.is_empty());
        for condition in &second.conditions {
            assert_eq!(seconds(&condition.last_heartbeat_time), 20, "{}", condition.type_);
            assert_eq!(seconds(&condition.last_transition_time), 10, "{}", condition.type_);
        }
        assert!(!differ(&first, &second.conditions));
        let third = update(&second.conditions, &none(), &["x".to_owned()], &at(30));
        assert_eq!(seconds(&third.conditions[3].last_transition_time), 30);
        assert_eq!(third.events, ["NodeNotReady"]);
        assert!(differ(&second.conditions, &third.conditions));
        assert_eq!(update(&third.conditions, &none(), &[], &at(40)).events, ["NodeReady"]);
    }

    #[test]
    fn n17_causes_are_listed_and_a_new_one_changes_the_message_only() {
        let one = update(&[], &none(), &["container runtime is down".to_owned()], &at(1));
        assert_eq!(one.conditions[3].message.as_deref(), Some("container runtime is down"));
        assert!(!one.events.contains(&"NodeNotReady"), "a node that was never ready has not become unready");
        let causes = ["a", "b", "a"].map(str::to_owned);
        let two = update(&one.conditions, &none(), &causes, &at(2));
        assert_eq!(two.conditions[3].message.as_deref(), Some("[a, b]"));
        assert_eq!(two.conditions[3].reason.as_deref(), Some("KubeletNotReady"));
        assert_eq!(seconds(&two.conditions[3].last_transition_time), 1);
        assert!(differ(&one.conditions, &two.conditions));
    }

    #[test]
    fn n16_conditions_of_others_stay_in_place() {
        let foreign = NodeCondition {
            type_: "NetworkUnavailable".into(),
            status: "False".into(),
            reason: Some("CalicoIsUp".into()),
            ..NodeCondition::default()
        };
        let update = update(std::slice::from_ref(&foreign), &none(), &[], &at(1));
        assert_eq!(update.conditions[0], foreign);
        assert_eq!(update.conditions.len(), 5);
    }
}
