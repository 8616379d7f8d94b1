use std::time::Duration;

use jiff::Timestamp;
use serde_json::{Value, json};

use super::*;
use crate::{events::MemoryEvents, pods::PodSource, time::SimulatedClock, wake::NoWakes};

struct Node {
    store: Arc<PodStore>,
    events: Arc<MemoryEvents>,
    facts: watch::Sender<Arc<NodeFacts>>,
    ledger: PodLedger,
    registry: prometheus::Registry,
}

fn facts(cpu: &str) -> Arc<NodeFacts> {
    let allocatable = [("cpu", cpu), ("memory", "8Gi"), ("pods", "10")];
    let allocatable = allocatable.map(|(name, amount)| (name.to_owned(), amount.to_owned())).into();
    Arc::new(NodeFacts { allocatable, ..NodeFacts::default() })
}

fn node(directory: Option<PathBuf>) -> Node {
    let store = Arc::new(PodStore::new(&[PodSource::Api], Arc::new(NoWakes)));
    let events = Arc::new(MemoryEvents::default());
    let (facts, node) = watch::channel(facts("4"));
    let registry = prometheus::Registry::new();
    let ledger = PodLedger::new(LedgerParts {
        metrics: ResizeMetrics::new(&registry).unwrap(),
        policy: ResizePolicy::default(),
        directory,
        store: Arc::clone(&store),
        node,
        wakes: Arc::new(NoWakes),
        events: events.clone(),
        clock: Arc::new(SimulatedClock::starting_at(Timestamp::UNIX_EPOCH)),
    });
    Node { store, events, facts, ledger, registry }
}

fn pod_with(uid: &str, generation: i64, spec: &Value, status: &Value) -> Pod {
    let object = json!({"metadata": {"uid": uid, "name": uid, "namespace": "n", "generation": generation},
        "spec": spec, "status": status});
    Pod::new(serde_json::from_value(object).unwrap(), PodSource::Api, Timestamp::UNIX_EPOCH).unwrap()
}

fn pod(uid: &str, generation: i64, cpu: &str) -> Pod {
    let spec = json!({"containers": [{"name": "c", "resources": {"requests": {"cpu": cpu, "memory": "1Gi"}}}]});
    pod_with(uid, generation, &spec, &json!({}))
}

fn cpu(pod: &Pod) -> i64 {
    super::super::pod_resources::PodSize::of(pod).cpu_request
}

impl Node {
    /// The sources know these pods, and their workers have looked.
    fn has(&self, pods: &[Pod]) {
        self.store.replace(PodSource::Api, pods.to_vec());
        for pod in pods {
            self.ledger.look(pod);
        }
    }
    fn asks(&self, pod: &Pod) -> Pod {
        self.store.upsert(pod.clone());
        self.ledger.look(pod)
    }
    fn pending(&self, uid: &str) -> Option<(String, i64)> {
        self.ledger.conditions(&PodUid::from(uid)).pending.map(|c| (c.reason, c.generation))
    }
    fn has_metric(&self, line: &str) -> bool {
        let text = prometheus::TextEncoder::new().encode_to_string(&self.registry.gather()).unwrap();
        text.lines().any(|have| have == line)
    }
    fn reasons(&self) -> Vec<String> {
        self.events.all().into_iter().map(|e| e.reason).collect()
    }
}

#[tokio::test(start_paused = true)]
async fn p70_a_new_pod_has_what_it_asks_for_and_a_resize_that_fits_at_once() {
    let node = node(None);
    node.has(&[pod("a", 1, "1")]);
    assert!(node.ledger.look(&node.store.get(&"a".into()).unwrap()).same_object(&node.store.get(&"a".into()).unwrap()));
    assert_eq!(node.ledger.conditions(&"a".into()), ResizeConditions::default());
    let shown = node.asks(&pod("a", 2, "2"));
    assert_eq!(cpu(&shown), 2000);
    let in_progress = node.ledger.conditions(&"a".into()).in_progress.unwrap();
    assert_eq!((in_progress.reason.as_str(), in_progress.generation), ("", 2));
    assert_eq!(node.reasons(), ["ResizeStarted"]);
}

#[tokio::test(start_paused = true)]
async fn p70_room_goes_to_the_next_in_line_and_events_are_not_repeated() {
    let node = node(None);
    node.has(&[pod("a", 1, "1"), pod("b", 1, "1"), pod("c", 1, "2")]);
    assert_eq!(cpu(&node.asks(&pod("a", 2, "2"))), 1000);
    tokio::time::advance(Duration::from_secs(5)).await;
    assert_eq!(cpu(&node.asks(&pod("b", 2, "2"))), 1000);
    let deferred = |generation| Some(("Deferred".to_owned(), generation));
    assert_eq!((node.pending("a"), node.pending("b")), (deferred(2), deferred(2)));
    assert_eq!(node.reasons(), ["ResizeDeferred", "ResizeDeferred"]);
    node.ledger.retry(Trigger::NodeChanged);
    assert_eq!(node.reasons().len(), 2);

    // "c" shrinks: what it still has in force is not free yet.
    let small = pod("c", 2, "1");
    assert_eq!(cpu(&node.asks(&small)), 1000);
    assert!(node.pending("a").is_some(), "c's CPU is still in use");
    let own = small.container("c").unwrap().spec.resources.clone().unwrap();
    assert!(node.ledger.container_actuated(small.uid(), "c", own));
    node.ledger.retry(Trigger::NodeChanged);
    assert_eq!((node.pending("a"), node.pending("b")), (None, deferred(2)), "the older one comes first");
    assert_eq!(cpu(&node.ledger.look(&node.store.get(&"a".into()).unwrap())), 2000);

    // "c" ends.
    node.ledger.release(small.uid());
    assert_eq!(node.pending("b"), None);
}

#[tokio::test(start_paused = true)]
async fn p70_the_condition_follows_the_generation_and_goes_with_the_wish() {
    let node = node(None);
    node.has(&[pod("a", 1, "1")]);
    node.asks(&pod("a", 2, "8"));
    let since = node.ledger.conditions(&"a".into()).pending.unwrap().since;
    tokio::time::advance(Duration::from_secs(5)).await;
    node.asks(&pod("a", 3, "9"));
    let pending = node.ledger.conditions(&"a".into()).pending.unwrap();
    assert_eq!((pending.generation, pending.since), (3, since), "since when it waits stays");
    assert!(pending.message.starts_with("Node didn't have enough resource: cpu, requested: 9000"));
    node.asks(&pod("a", 4, "1"));
    assert_eq!(node.ledger.conditions(&"a".into()), ResizeConditions::default());
    assert_eq!(node.reasons(), ["ResizeDeferred", "ResizeDeferred"]);
}

#[tokio::test(start_paused = true)]
async fn p70_nothing_is_decided_before_every_source_was_heard() {
    let node = node(None);
    let known = pod("a", 1, "1");
    node.ledger.look(&known);
    assert_eq!(cpu(&node.ledger.look(&pod("a", 2, "2"))), 1000);
    assert_eq!(node.pending("a"), None, "neither given nor refused");
    let cancel = CancellationToken::new();
    let task = tokio::spawn(node.ledger.clone().run(cancel.clone()));
    tokio::task::yield_now().await;
    let asks = pod("a", 2, "2");
    node.store.replace(PodSource::Api, vec![asks.clone()]);
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert_eq!(cpu(&node.ledger.look(&asks)), 2000);
    cancel.cancel();
    task.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn p70_more_allocatable_is_room() {
    let node = node(None);
    let cancel = CancellationToken::new();
    tokio::spawn(node.ledger.clone().run(cancel.clone()));
    node.has(&[pod("a", 1, "1")]);
    node.asks(&pod("a", 2, "5"));
    assert!(node.pending("a").is_some());
    node.facts.send_replace(facts("6"));
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert_eq!(node.pending("a"), None);
    cancel.cancel();
}

#[tokio::test(start_paused = true)]
async fn p72_progress_and_errors_are_conditions_with_the_generation_of_their_resize() {
    let node = node(None);
    node.has(&[pod("a", 1, "1")]);
    let shown = node.asks(&pod("a", 2, "2"));
    node.ledger.failed(&shown, "no");
    node.ledger.failed(&shown, "no");
    let error = node.ledger.conditions(&"a".into()).in_progress.unwrap();
    assert_eq!((error.reason.as_str(), error.message.as_str(), error.generation), ("Error", "no", 2));
    // An unrelated change of the spec does not make it another resize.
    let later = node.asks(&pod("a", 3, "2"));
    node.ledger.progress(&later, true);
    assert_eq!(node.ledger.conditions(&"a".into()).in_progress.unwrap(), error);
    node.ledger.progress(&later, false);
    node.ledger.progress(&later, false);
    assert_eq!(node.ledger.conditions(&"a".into()).in_progress, None);
    assert_eq!(node.reasons(), ["ResizeStarted", "ResizeError", "ResizeCompleted"]);
    assert!(node.events.has("ResizeError", r#""generation":2,"error":"no"}"#));
    assert!(node.events.has("ResizeCompleted", r#""generation":2}"#));
}

#[tokio::test(start_paused = true)]
async fn p73_the_allocation_outlives_the_process_and_conditions_come_back_from_the_api() {
    let dir = tempfile::tempdir().unwrap();
    let first = node(Some(dir.path().to_owned()));
    let cancel = CancellationToken::new();
    let task = tokio::spawn(first.ledger.clone().run(cancel.clone()));
    first.has(&[pod("a", 1, "1"), pod("gone", 1, "1")]);
    first.asks(&pod("a", 2, "9"));
    assert!(first.ledger.persisted().await);
    cancel.cancel();
    task.await.unwrap();

    let second = node(Some(dir.path().to_owned()));
    let spec = json!({"containers": [{"name": "c", "resources": {"requests": {"cpu": "9", "memory": "1Gi"}}}]});
    let status = json!({"conditions": [{"type": "PodResizePending", "status": "True", "reason": "Deferred",
        "message": "m", "observedGeneration": 2, "lastTransitionTime": "2026-01-01T00:00:00Z"}]});
    let asks = pod_with("a", 2, &spec, &status);
    second.store.replace(PodSource::Api, vec![asks.clone()]);
    assert_eq!(cpu(&second.ledger.frozen(&asks)), 1000);
    assert_eq!(cpu(&second.ledger.look(&asks)), 1000);
    let pending = second.ledger.conditions(&"a".into()).pending.unwrap();
    assert_eq!(pending.since.to_string(), "2026-01-01T00:00:00Z");
    assert!(second.reasons().is_empty(), "it was told before");
    second.ledger.forget_absent();
    assert_eq!(second.ledger.lock().allocated.len(), 1, "what is gone is forgotten");
}

#[tokio::test(start_paused = true)]
async fn p73_a_corrupt_checkpoint_costs_only_the_record() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join(checkpoint::ALLOCATED), "{}").unwrap();
    let node = node(Some(dir.path().to_owned()));
    node.has(&[pod("a", 1, "2")]);
    let known = node.store.get(&"a".into()).unwrap();
    assert!(node.ledger.look(&known).same_object(&known));
    assert!(super::super::resize_plan::settled(&known, &node.ledger.actuated(known.uid()), true));
}

#[tokio::test(start_paused = true)]
async fn p73_a_disk_that_refuses_is_told() {
    let node = node(Some("/proc/none".into()));
    let cancel = CancellationToken::new();
    tokio::spawn(node.ledger.clone().run(cancel.clone()));
    node.has(&[pod("a", 1, "2")]);
    assert!(!node.ledger.persisted().await);
    cancel.cancel();
}

#[tokio::test(start_paused = true)]
async fn p72_a_deferred_resize_is_counted_while_it_waits_and_when_it_is_accepted() {
    let node = node(None);
    node.has(&[pod("a", 1, "1"), pod("b", 1, "2")]);
    node.asks(&pod("a", 2, "3"));
    assert_eq!(node.pending("a"), Some(("Deferred".to_owned(), 2)));
    assert!(node.has_metric(r#"kubelet_pod_pending_resizes{priority_bucket="normal",reason="deferred"} 1"#));
    let name = "kubelet_container_requested_resizes_total";
    let labels = r#"{operation="increase",requirement="requests",resource="cpu"}"#;
    assert!(node.has_metric(&format!("{name}{labels} 1")));
    tokio::time::advance(Duration::from_secs(40)).await;
    node.ledger.release(&"b".into());
    assert_eq!(node.pending("a"), None);
    for line in [
        r#"kubelet_pod_deferred_accepted_resizes_total{retry_trigger="pod_terminated"} 1"#,
        r#"kubelet_pod_deferred_resize_duration_seconds_bucket{priority_bucket="normal",resolution="accepted",le="45"} 1"#,
        r#"kubelet_pod_deferred_resize_duration_seconds_bucket{priority_bucket="normal",resolution="accepted",le="30"} 0"#,
        "kubelet_pod_in_progress_resizes 1",
    ] {
        assert!(node.has_metric(line), "no line {line}");
    }
    node.ledger.resized(true, Duration::from_millis(70));
    assert!(node.has_metric(r#"kubelet_pod_resize_duration_milliseconds_bucket{success="true",le="100"} 1"#));
    node.ledger.progress(&pod("a", 2, "3"), false);
    assert!(node.has_metric("kubelet_pod_in_progress_resizes 0"));
}

#[tokio::test(start_paused = true)]
async fn p72_a_resize_that_is_taken_back_waits_no_longer() {
    let node = node(None);
    node.has(&[pod("a", 1, "1"), pod("b", 1, "2")]);
    node.asks(&pod("a", 2, "3"));
    node.asks(&pod("a", 3, "1"));
    let name = "kubelet_pod_deferred_resize_duration_seconds_count";
    assert!(node.has_metric(&format!(r#"{name}{{priority_bucket="normal",resolution="reverted"}} 1"#)));
    assert!(!node.has_metric(r#"kubelet_pod_pending_resizes{priority_bucket="normal",reason="deferred"} 1"#));
}
