//! The two conditions of a resize in place: it waits, it is going on (contract P-41, P-72). Pure.
//!
//! In: what the ledger decided, the clock's time, the condition before; after a restart of the agent what the API says. Out: the conditions
//! that the pod's status shows.

use jiff::Timestamp;

use crate::pods::Pod;

pub(super) const DEFERRED: &str = "Deferred";
pub(super) const INFEASIBLE: &str = "Infeasible";
pub(super) const ERROR: &str = "Error";

/// One of the two conditions; its status is always True.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResizeCondition {
    pub reason: String,
    pub message: String,
    /// The generation of the spec that it is about: older than the pod's while an older resize is going on.
    pub generation: i64,
    /// When its reason became this.
    pub since: Timestamp,
    /// When it was last written.
    pub at: Timestamp,
}

impl ResizeCondition {
    /// The condition that now holds: it keeps its times as far as it says what `earlier` said.
    pub(super) fn after(earlier: Option<&Self>, reason: &str, message: &str, generation: i64, now: Timestamp) -> Self {
        let same = earlier.filter(|c| c.reason == reason);
        let unchanged = same.filter(|c| c.message == message && c.generation == generation);
        Self {
            reason: reason.to_owned(),
            message: message.to_owned(),
            generation,
            since: same.map_or(now, |c| c.since),
            at: unchanged.map_or(now, |c| c.at),
        }
    }
}

/// `PodResizePending` and `PodResizeInProgress`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ResizeConditions {
    pub pending: Option<ResizeCondition>,
    pub in_progress: Option<ResizeCondition>,
}

impl ResizeConditions {
    /// After a restart: what the API says, so that a resize in progress ends with its event, and none begins twice.
    pub(super) fn at_api(pod: &Pod) -> Self {
        let find = |kind: &str| {
            let at_api = pod.api_status().conditions.iter().flatten().find(|c| c.type_ == kind)?;
            let time = |t: &Option<k8s_openapi::apimachinery::pkg::apis::meta::v1::Time>| t.as_ref().map(|t| t.0);
            let since = time(&at_api.last_transition_time).unwrap_or(Timestamp::UNIX_EPOCH);
            Some(ResizeCondition {
                reason: at_api.reason.clone().unwrap_or_default(),
                message: at_api.message.clone().unwrap_or_default(),
                generation: at_api.observed_generation.unwrap_or(0),
                since,
                at: time(&at_api.last_probe_time).unwrap_or(since),
            })
        };
        Self { pending: find("PodResizePending"), in_progress: find("PodResizeInProgress") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p72_a_condition_keeps_its_times_while_it_says_the_same() {
        let at = |second| Timestamp::from_second(second).unwrap_or_default();
        let first = ResizeCondition::after(None, DEFERRED, "cpu", 2, at(1));
        assert_eq!((first.since, first.at), (at(1), at(1)));
        let same = ResizeCondition::after(Some(&first), DEFERRED, "cpu", 2, at(5));
        assert_eq!(same, first);
        let reworded = ResizeCondition::after(Some(&first), DEFERRED, "memory", 2, at(5));
        assert_eq!((reworded.since, reworded.at), (at(1), at(5)));
        let other = ResizeCondition::after(Some(&first), INFEASIBLE, "cpu", 2, at(5));
        assert_eq!((other.since, other.at), (at(5), at(5)));
    }
}
