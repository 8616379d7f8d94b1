use jiff::Timestamp;

use super::*;
use v1::ContainerEventType as Kind;

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(seconds).unwrap()
}

fn status(id: &str, state: v1::ContainerState) -> v1::ContainerStatus {
    v1::ContainerStatus { id: id.into(), state: state as i32, created_at: 1, ..Default::default() }
}

fn sandbox_status(ready: bool, ip: &str) -> v1::PodSandboxStatus {
    let state = if ready { v1::PodSandboxState::SandboxReady } else { v1::PodSandboxState::SandboxNotready };
    let network = v1::PodSandboxNetworkStatus { ip: ip.into(), additional_ips: vec![] };
    v1::PodSandboxStatus { id: "s".into(), state: state as i32, network: Some(network), ..Default::default() }
}

fn event(kind: Kind, id: &str, made: i64, statuses: Vec<v1::ContainerStatus>) -> v1::ContainerEventResponse {
    v1::ContainerEventResponse {
        container_id: id.into(),
        container_event_type: kind as i32,
        created_at: made * 1_000_000_000,
        pod_sandbox_status: Some(sandbox_status(true, "10.0.0.1")),
        containers_statuses: statuses,
    }
}

fn read(as_of: u64, sent: i64, containers: &[(&str, v1::ContainerState)]) -> PodRead {
    PodRead {
        as_of: Seq(as_of),
        sent_at: at(sent),
        sandboxes: vec![translate::sandbox(sandbox_status(true, "10.0.0.1"))],
        containers: containers.iter().map(|(id, state)| translate::container(status(id, *state), "s")).collect(),
    }
}

fn states(entry: &PodEntry) -> Vec<(String, ContainerState)> {
    let mut all: Vec<_> = entry.runtime().containers.iter().map(|c| (c.id.clone(), c.state)).collect();
    all.sort();
    all
}

use v1::ContainerState::{ContainerCreated as C, ContainerExited as X, ContainerRunning as R, ContainerUnknown as U};

#[test]
fn p08_events_move_a_container_only_forwards_and_never_raise_as_of() {
    let cases = [
        (C, R, ContainerState::Running),
        (C, X, ContainerState::Exited),
        (R, C, ContainerState::Running),
        (R, X, ContainerState::Exited),
        (X, R, ContainerState::Exited),
        (X, C, ContainerState::Exited),
        (R, U, ContainerState::Running),
    ];
    for (held, told, expected) in cases {
        let mut entry = PodEntry::empty(Seq(0), at(0));
        entry.install(read(5, 10, &[("c", held)]));
        let applied = entry.apply(event(Kind::ContainerStartedEvent, "c", 11, vec![status("c", told)]), Seq(6));
        assert_eq!(states(&entry), [("c".to_owned(), expected)], "{held:?} told {told:?}");
        assert_eq!(applied.changed, translate::state(held as i32) != expected);
        assert_eq!(applied.needs_read, told == U, "unknown is confirmed by a read");
        assert_eq!(entry.runtime().as_of, Seq(5));
    }
}

#[test]
fn what_an_event_told_during_a_read_outlives_that_read() {
    let mut entry = PodEntry::empty(Seq(0), at(0));
    entry.install(read(1, 10, &[("old", R), ("gone", X)]));
    // A read draws 2 and lists; then come events 3 to 5; then the read's answer is put in place.
    entry.apply(event(Kind::ContainerStoppedEvent, "old", 12, vec![status("old", X)]), Seq(3));
    entry.apply(event(Kind::ContainerDeletedEvent, "gone", 12, vec![]), Seq(4));
    entry.apply(event(Kind::ContainerCreatedEvent, "new", 13, vec![status("new", C)]), Seq(5));
    entry.install(read(2, 11, &[("old", R), ("gone", X)]));
    let expected = [("new".to_owned(), ContainerState::Created), ("old".to_owned(), ContainerState::Exited)];
    assert_eq!(states(&entry), expected);
    assert_eq!(entry.runtime().as_of, Seq(2));
    // A read sent after them is believed in everything.
    entry.install(read(6, 14, &[("old", X)]));
    assert_eq!(states(&entry), [("old".to_owned(), ContainerState::Exited)]);
}

#[test]
fn an_older_read_changes_nothing() {
    let mut entry = PodEntry::empty(Seq(0), at(0));
    entry.install(read(9, 10, &[("c", X)]));
    assert!(!entry.install(read(8, 10, &[("c", R)])));
    assert_eq!(states(&entry), [("c".to_owned(), ContainerState::Exited)]);
}

#[test]
fn a_stale_event_adds_nothing_but_asks_for_a_read() {
    let mut entry = PodEntry::empty(Seq(0), at(0));
    entry.install(read(1, 10, &[]));
    let applied = entry.apply(event(Kind::ContainerStartedEvent, "ghost", 9, vec![status("ghost", R)]), Seq(2));
    assert_eq!(applied, Applied { changed: false, needs_read: true });
    assert!(states(&entry).is_empty());
}

#[test]
fn an_event_without_statuses_asks_for_a_read() {
    let mut entry = PodEntry::empty(Seq(0), at(0));
    entry.install(read(1, 10, &[("c", R)]));
    assert!(entry.apply(event(Kind::ContainerStoppedEvent, "c", 11, vec![]), Seq(2)).needs_read);
}

#[test]
fn a_deleted_container_does_not_come_back_by_a_late_event() {
    let mut entry = PodEntry::empty(Seq(0), at(0));
    entry.install(read(1, 10, &[("c", X)]));
    entry.apply(event(Kind::ContainerDeletedEvent, "c", 12, vec![]), Seq(2));
    entry.apply(event(Kind::ContainerStoppedEvent, "c", 11, vec![status("c", X)]), Seq(3));
    assert!(states(&entry).is_empty());
}

#[test]
fn a_stopped_sandbox_keeps_its_addresses() {
    let mut entry = PodEntry::empty(Seq(0), at(0));
    entry.install(read(1, 10, &[]));
    let stopped = PodRead {
        as_of: Seq(2),
        sent_at: at(11),
        sandboxes: vec![translate::sandbox(sandbox_status(false, ""))],
        containers: vec![],
    };
    assert!(entry.install(stopped));
    let sandbox = &entry.runtime().sandboxes[0];
    assert!(!sandbox.ready);
    assert_eq!(sandbox.ips.len(), 1);
}

#[test]
fn an_oom_mark_outlives_reads_and_state_changes() {
    let mut entry = PodEntry::empty(Seq(0), at(0));
    entry.install(read(1, 10, &[("c", R)]));
    assert_eq!(entry.mark_oom("c"), Some(true));
    assert_eq!(entry.mark_oom("c"), Some(false));
    assert_eq!(entry.mark_oom("other"), None);
    entry.apply(event(Kind::ContainerStoppedEvent, "c", 11, vec![status("c", X)]), Seq(2));
    entry.install(read(3, 12, &[("c", X)]));
    assert!(entry.runtime().containers[0].oom_killed);
}

#[test]
fn p34_a_corrected_reason_is_taken_and_kept() {
    let reason = |entry: &PodEntry| entry.runtime().containers[0].reason.clone();
    let ended = |reason: &str| v1::ContainerStatus { reason: reason.into(), ..status("c", X) };
    let mut entry = PodEntry::empty(Seq(0), at(0));
    entry.install(read(1, 10, &[("c", R)]));
    entry.apply(event(Kind::ContainerStoppedEvent, "c", 11, vec![ended("Error")]), Seq(2));
    assert_eq!(reason(&entry), "Error");
    // A read draws 3; the correction comes while it is under way.
    assert!(entry.apply(event(Kind::ContainerStoppedEvent, "s", 12, vec![ended("OOMKilled")]), Seq(4)).changed);
    assert_eq!(reason(&entry), "OOMKilled");
    entry.install(read(3, 11, &[("c", X)]));
    assert_eq!(reason(&entry), "OOMKilled");
    entry.apply(event(Kind::ContainerStoppedEvent, "s", 13, vec![ended("Error")]), Seq(5));
    assert_eq!(reason(&entry), "OOMKilled");
}

proptest::proptest! {
    /// Whatever order events arrive in, and however often: per container the state never goes back, and `as_of` stays.
    #[test]
    fn events_in_any_order_never_go_back(told in proptest::collection::vec((0u8..3, 0i32..4, 5i64..20), 1..40)) {
        let mut entry = PodEntry::empty(Seq(0), at(0));
        entry.install(read(1, 10, &[("c0", C), ("c1", R), ("c2", X)]));
        let mut highest = HashMap::new();
        for (n, (which, state, made)) in told.into_iter().enumerate() {
            let id = format!("c{which}");
            let state = v1::ContainerState::try_from(state).unwrap();
            entry.apply(event(Kind::ContainerStartedEvent, &id, made, vec![status(&id, state)]), Seq(n as u64 + 2));
            for container in &entry.runtime().containers {
                let best = highest.entry(container.id.clone()).or_insert(0);
                proptest::prop_assert!(rank(container.state) >= *best);
                *best = rank(container.state);
            }
            proptest::prop_assert_eq!(entry.runtime().as_of, Seq(1));
            proptest::prop_assert_eq!(entry.runtime().containers.len(), 3);
        }
    }
}
