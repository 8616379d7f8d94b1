//! Which dead containers and replaced sandboxes go (contract R-27). Pure; time is an argument.

use std::{collections::BTreeMap, time::Duration};

use jiff::Timestamp;

use crate::{
    cri::{Container, ContainerState, PodRuntime},
    pods::PodUid,
};

/// From the flags; `None`: no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// `--maximum-dead-containers-per-container`.
    pub per_container: Option<usize>,
    /// `--maximum-dead-containers`.
    pub total: Option<usize>,
    /// `--minimum-container-ttl-duration`, since the container was created.
    pub minimum_age: Duration,
}

/// What the owner of a container still wants of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    /// The pod shall run: the newest container of a name tells what has already run, so it stays whatever the limits.
    Running,
    /// The pod has ended, and the API still shows it: limits count.
    Ended,
}

/// A dead container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Dead {
    pub(super) uid: PodUid,
    pub(super) name: String,
    pub(super) id: String,
    pub(super) log_path: String,
    created_at: Timestamp,
    /// Needed by its pod.
    kept: bool,
}

/// The dead containers of one pod that are old enough to be counted.
pub(super) fn dead_of(
    uid: &PodUid,
    runtime: &PodRuntime,
    owner: Owner,
    minimum_age: Duration,
    now: Timestamp,
) -> Vec<Dead> {
    let old_enough =
        |c: &&Container| Duration::try_from(now.duration_since(c.created_at)).is_ok_and(|age| age >= minimum_age);
    let exited = runtime.containers.iter().filter(|c| c.state == ContainerState::Exited);
    exited
        .filter(old_enough)
        .map(|c| Dead {
            uid: uid.clone(),
            name: c.name.clone(),
            id: c.id.clone(),
            log_path: c.log_path.clone(),
            created_at: c.created_at,
            kept: owner == Owner::Running && runtime.latest(&c.name).is_some_and(|latest| latest.id == c.id),
        })
        .collect()
}

/// What goes, oldest first: beyond the limit of each (pod, container), then beyond the total, spread evenly as far as that goes.
pub(super) fn surplus(dead: Vec<Dead>, limits: &Limits) -> Vec<Dead> {
    let mut units: BTreeMap<(PodUid, String), Vec<Dead>> = BTreeMap::new();
    for container in dead {
        units.entry((container.uid.clone(), container.name.clone())).or_default().push(container);
    }
    for unit in units.values_mut() {
        unit.sort_by(|a, b| (b.created_at, &b.id).cmp(&(a.created_at, &a.id)));
    }
    let mut goes = Vec::new();
    if let Some(limit) = limits.per_container {
        units.values_mut().for_each(|unit| cut(unit, limit, &mut goes));
    }
    let count = |units: &BTreeMap<_, Vec<Dead>>| units.values().map(Vec::len).sum::<usize>();
    if let Some(total) = limits.total
        && count(&units) > total
    {
        let each = (total / units.values().filter(|unit| !unit.is_empty()).count().max(1)).max(1);
        units.values_mut().for_each(|unit| cut(unit, each, &mut goes));
        let mut rest: Vec<Dead> = units.into_values().flatten().collect();
        rest.sort_by(|a, b| (b.created_at, &b.id).cmp(&(a.created_at, &a.id)));
        cut(&mut rest, total, &mut goes);
    }
    goes.sort_by(|a, b| (a.created_at, &a.id).cmp(&(b.created_at, &b.id)));
    goes
}

/// Takes the oldest that are not needed until `limit` are left.
fn cut(newest_first: &mut Vec<Dead>, limit: usize, goes: &mut Vec<Dead>) {
    let mut at = newest_first.len();
    while newest_first.len() > limit && at > 0 {
        at -= 1;
        if !newest_first[at].kept {
            goes.push(newest_first.remove(at));
        }
    }
}

/// Sandboxes that are not ready, hold no container, and are not the newest: also those that an earlier agent stopped.
pub(super) fn replaced_sandboxes(runtime: &PodRuntime) -> Vec<String> {
    let latest = runtime.latest_sandbox().map(|s| s.id.as_str());
    let empty = |id: &str| runtime.containers.iter().all(|c| c.sandbox_id != id);
    let replaced = runtime.sandboxes.iter().filter(|s| !s.ready && latest != Some(s.id.as_str()) && empty(&s.id));
    replaced.map(|s| s.id.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cri::{Sandbox, v1};

    fn container(id: &str, name: &str) -> Container {
        let metadata = v1::ContainerMetadata { name: name.into(), attempt: 0 };
        let status = v1::ContainerStatus { id: id.into(), metadata: Some(metadata), ..Default::default() };
        crate::cri::container(status, "s1")
    }

    fn sandbox(id: &str, second: i64, ready: bool) -> Sandbox {
        let status = v1::PodSandboxStatus { id: id.into(), ..Default::default() };
        Sandbox { created_at: at(second), ready, ..crate::cri::sandbox(status) }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    /// `name attempt state`, created at second 10 × attempt.
    fn runtime(containers: &[(&str, u32, ContainerState)]) -> PodRuntime {
        let containers = containers.iter().map(|(name, attempt, state)| {
            let created_at = at(i64::from(*attempt) * 10);
            let id = format!("{name}{attempt}");
            Container { state: *state, attempt: *attempt, created_at, ..container(&id, name) }
        });
        PodRuntime { containers: containers.collect(), ..Default::default() }
    }

    const NONE: Limits = Limits { per_container: None, total: None, minimum_age: Duration::ZERO };
    use ContainerState::{Created, Exited, Running, Unknown};

    fn goes(pods: &[(&str, PodRuntime, Owner)], limits: Limits, now: i64) -> Vec<String> {
        let dead = pods.iter().flat_map(|(uid, runtime, owner)| {
            dead_of(&PodUid::from(*uid), runtime, *owner, limits.minimum_age, at(now))
        });
        surplus(dead.collect(), &limits).into_iter().map(|d| format!("{}/{}", d.uid, d.id)).collect()
    }

    #[test]
    fn r27_one_dead_container_of_each_name_stays() {
        let pod = runtime(&[
            ("a", 0, Exited),
            ("a", 1, Exited),
            ("a", 2, Exited),
            ("a", 3, Running),
            ("b", 1, Exited),
            ("c", 0, Unknown),
            ("c", 1, Created),
        ]);
        let limits = Limits { per_container: Some(1), ..NONE };
        assert_eq!(goes(&[("u", pod.clone(), Owner::Running)], limits, 100), ["u/a0", "u/a1"]);
        assert!(goes(&[("u", pod, Owner::Running)], NONE, 100).is_empty());
    }

    #[test]
    fn r27_what_a_running_pod_needs_to_know_stays_whatever_the_limits() {
        let limits = Limits { per_container: Some(0), total: Some(0), ..NONE };
        let pod =
            || runtime(&[("init", 0, Exited), ("a", 0, Exited), ("a", 1, Exited), ("b", 0, Exited), ("b", 1, Running)]);
        assert_eq!(goes(&[("u", pod(), Owner::Running)], limits, 100), ["u/a0", "u/b0"]);
        assert_eq!(goes(&[("u", pod(), Owner::Ended)], limits, 100), ["u/a0", "u/b0", "u/init0", "u/a1"]);
    }

    #[test]
    fn r27_young_ones_neither_go_nor_count() {
        let pod = || runtime(&[("a", 1, Exited), ("a", 2, Exited), ("a", 3, Exited)]);
        let limits = Limits { per_container: Some(1), minimum_age: Duration::from_secs(15), ..NONE };
        for (now, want) in [(24, &[][..]), (25, &[]), (35, &["u/a1"]), (45, &["u/a1", "u/a2"])] {
            assert_eq!(goes(&[("u", pod(), Owner::Running)], limits, now), want, "{now}");
        }
    }

    #[test]
    fn r27_the_total_is_spread_evenly_then_the_oldest_go() {
        let four = || runtime(&[("a", 1, Exited), ("a", 2, Exited), ("a", 3, Exited), ("a", 4, Exited)]);
        let pods = [("u", four(), Owner::Ended), ("v", runtime(&[("a", 0, Exited)]), Owner::Ended)];
        let total = |total| Limits { total: Some(total), ..NONE };
        assert!(goes(&pods, total(5), 100).is_empty());
        assert_eq!(goes(&pods, total(4), 100), ["u/a1", "u/a2"]);
        assert_eq!(goes(&pods, total(2), 100), ["u/a1", "u/a2", "u/a3"]);
        assert_eq!(goes(&pods, total(1), 100), ["v/a0", "u/a1", "u/a2", "u/a3"]);
    }

    #[test]
    fn r27_replaced_sandboxes_go_when_they_are_empty() {
        let mut pod = runtime(&[("a", 0, Exited)]);
        pod.sandboxes = vec![
            sandbox("s0", 0, false),
            sandbox("s1", 1, false),
            sandbox("ready", 2, true),
            sandbox("latest", 3, false),
        ];
        assert_eq!(replaced_sandboxes(&pod), ["s0"]);
        pod.containers.clear();
        assert_eq!(replaced_sandboxes(&pod), ["s0", "s1"]);
    }
}
