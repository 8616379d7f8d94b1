//! The shell: the line, places that are left, preemption and its wait, the Node read again, a restart of the agent.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use serde_json::json;
use tokio::sync::watch;

use super::{
    AdmissionMetrics, AdmissionParts, KillOrders, NodeAdmission, PodAdmission, Policy, Standing,
    fixtures::{CRITICAL, asking, full, named, node},
};
use crate::{
    cri::{
        RuntimeStore,
        fake::{FakeRuntime, ImageScript},
        v1,
    },
    events::MemoryEvents,
    node::{NodeFacts, ReadNode},
    pod_worker::view::KillOrder,
    pods::{Pod, PodSource, PodStore, PodUid},
    resources::{LedgerParts, PodLedger, ResizeMetrics, allocation::ResizePolicy},
    time::{Clock, SimulatedClock},
    wake::{Cause, NoWakes, WakeSink},
};

#[derive(Default)]
struct Told {
    orders: Mutex<Vec<(String, KillOrder)>>,
    wakes: Mutex<Vec<String>>,
}

impl KillOrders for Told {
    fn order(&self, uid: &PodUid, order: KillOrder) {
        self.orders.lock().unwrap().push((uid.to_string(), order));
    }
}

impl WakeSink for Told {
    fn wake(&self, uid: &PodUid, cause: Cause) {
        assert_eq!(cause, Cause::Admission);
        self.wakes.lock().unwrap().push(uid.to_string());
    }
    fn wake_all(&self, _: Cause) {}
}

/// The apiserver's Node, which the watch has not brought yet.
struct Newer {
    node: watch::Sender<Arc<NodeFacts>>,
    labels: Vec<(&'static str, &'static str)>,
}

#[async_trait]
impl ReadNode for Newer {
    async fn read_again(&self) {
        self.node.send_modify(|facts| {
            let labels = self.labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
            Arc::make_mut(facts).labels.extend(labels);
        });
    }
}

struct House {
    runtime: FakeRuntime,
    store: Arc<PodStore>,
    runtime_store: Arc<RuntimeStore>,
    node: watch::Sender<Arc<NodeFacts>>,
    told: Arc<Told>,
    events: Arc<MemoryEvents>,
    allocations: PodLedger,
    registry: prometheus::Registry,
    clock: Arc<dyn Clock>,
}

impl House {
    fn new() -> Self {
        let clock: Arc<dyn Clock> =
            Arc::new(SimulatedClock::starting_at(jiff::Timestamp::from_second(2_000_000_000).unwrap()));
        let runtime = FakeRuntime::new(Arc::clone(&clock));
        runtime.image("i", ImageScript::Present);
        let runtime_store =
            Arc::new(RuntimeStore::with_clock(Arc::new(runtime.clone()), Arc::new(NoWakes), Arc::clone(&clock)));
        let store = Arc::new(PodStore::new(&[PodSource::Api], Arc::new(NoWakes)));
        let node = watch::Sender::new(Arc::new(node()));
        let events = Arc::new(MemoryEvents::default());
        let allocations = PodLedger::new(LedgerParts {
            policy: ResizePolicy::default(),
            directory: None,
            store: Arc::clone(&store),
            node: node.subscribe(),
            wakes: Arc::new(NoWakes),
            events: Arc::clone(&events) as _,
            clock: Arc::clone(&clock),
            metrics: ResizeMetrics::new(&prometheus::Registry::new()).unwrap(),
        });
        Self {
            runtime,
            store,
            runtime_store,
            node,
            told: Arc::default(),
            events,
            allocations,
            registry: prometheus::Registry::new(),
            clock,
        }
    }

    /// The runtime has been listed.
    async fn ready() -> Self {
        let house = Self::new();
        house.runtime_store.relist().await.unwrap();
        house
    }

    fn open(&self) -> NodeAdmission {
        self.open_with(None)
    }

    fn open_with(&self, reread: Option<Arc<dyn ReadNode>>) -> NodeAdmission {
        NodeAdmission::new(AdmissionParts {
            policy: Policy { pod_level_resources: true, ..Policy::default() },
            store: Arc::clone(&self.store),
            runtime: Arc::clone(&self.runtime_store),
            allocations: self.allocations.clone(),
            node: self.node.subscribe(),
            reread,
            orders: Arc::clone(&self.told) as Arc<dyn KillOrders>,
            events: Arc::clone(&self.events) as _,
            wakes: Arc::clone(&self.told) as Arc<dyn WakeSink>,
            metrics: AdmissionMetrics::new(&self.registry).unwrap(),
            clock: Arc::clone(&self.clock),
        })
    }

    fn bind<const N: usize>(&self, pods: [&Pod; N]) {
        pods.into_iter().for_each(|pod| self.store.upsert(pod.clone()));
    }

    fn counted(&self, name: &str) -> Vec<(String, u64)> {
        let families = self.registry.gather();
        let metrics = families.iter().filter(|f| f.name() == name).flat_map(|f| f.get_metric());
        metrics.map(|m| (m.get_label()[0].value().to_owned(), m.get_counter().get_value() as u64)).collect()
    }

    fn said(&self) -> Vec<String> {
        self.events.all().into_iter().map(|e| format!("{}: {}", e.reason, e.message)).collect()
    }
}

fn admitted(admission: &NodeAdmission, pod: &Pod) -> bool {
    admission.standing(pod) == Standing::Admitted
}

fn rejected(admission: &NodeAdmission, pod: &Pod) -> String {
    match admission.standing(pod) {
        Standing::Rejected(rejection) => rejection.reason,
        other => panic!("{other:?}"),
    }
}

const WAITS: Standing = Standing::NotYet { until: None };

#[tokio::test(start_paused = true)]
async fn a01_a_rejected_pod_takes_no_place_and_is_told_once() {
    let house = House::ready().await;
    let admission = house.open();
    let (a, b, c) = (asking("a", 600, 0), asking("b", 600, 0), asking("c", 400, 0));
    house.bind([&a, &b, &c]);
    assert!(admitted(&admission, &a) && admitted(&admission, &c));
    for _ in 0..2 {
        assert_eq!(rejected(&admission, &b), "OutOfcpu");
    }
    let message = "Node didn't have enough resource: cpu, requested: 600, used: 600, capacity: 1000";
    assert_eq!(house.said(), [format!("OutOfcpu: {message}")]);
    let Standing::Rejected(rejection) = admission.standing(&b) else { panic!() };
    assert_eq!(rejection.status_message(), format!("Pod was rejected: {message}"));
    assert_eq!(house.counted("kubelet_admission_rejections_total"), [("OutOfcpu".to_owned(), 1)]);
    // a's containers are gone; the rejected pod stays rejected, another gets the place.
    admission.release(a.uid());
    assert_eq!(rejected(&admission, &b), "OutOfcpu");
    let d = asking("d", 600, 0);
    house.store.upsert(d.clone());
    assert!(admitted(&admission, &d));
}

#[tokio::test(start_paused = true)]
async fn a01_the_line_is_by_criticality_then_age_whoever_asks_first() {
    let aged = |uid: &str, minute: u32, priority: i32| {
        let created = format!("2026-01-01T00:{minute:02}:00Z");
        full(json!({"metadata": {"name": uid, "namespace": "n", "uid": uid, "creationTimestamp": created},
            "spec": {"priority": priority, "containers": [{"name": "c", "resources": {"requests": {"cpu": "500m"}}}]}}))
    };
    let pods = [aged("young", 3, 0), aged("critical", 4, CRITICAL), aged("old", 1, 0), aged("older", 0, 0)];
    for asker in 0..pods.len() {
        let house = House::ready().await;
        let admission = house.open();
        house.store.replace(PodSource::Api, pods.to_vec());
        admission.standing(&pods[asker]);
        let places: Vec<bool> = pods.iter().map(|pod| admitted(&admission, pod)).collect();
        assert_eq!(places, [false, true, false, true], "asked first by {asker}");
        assert!(house.told.orders.lock().unwrap().is_empty(), "the critical one found its place free");
    }
}

#[tokio::test(start_paused = true)]
async fn nothing_is_decided_before_node_and_runtime_are_known() {
    let house = House::new();
    let pod = asking("a", 1, 0);
    let admission = house.open();
    assert_eq!(admission.standing(&pod), WAITS, "the runtime was not listed");
    house.runtime_store.relist().await.unwrap();
    let known = house.node.borrow().clone();
    for unknown in [
        NodeFacts { node_seen: false, ..(*known).clone() },
        NodeFacts { runtime_ready: false, ..(*known).clone() },
        NodeFacts { allocatable: Default::default(), ..(*known).clone() },
    ] {
        house.node.send_replace(Arc::new(unknown));
        assert_eq!(admission.standing(&pod), WAITS);
    }
    house.node.send_replace(known);
    assert!(admitted(&admission, &pod));
}

#[tokio::test(start_paused = true)]
async fn pods_that_ended_or_are_deleted_are_not_decided_on() {
    let house = House::ready().await;
    let admission = house.open();
    let requests = json!({"containers": [{"name": "c", "resources": {"requests": {"cpu": "1"}}}]});
    let ended =
        full(json!({"metadata": {"name": "e", "uid": "e"}, "spec": requests, "status": {"phase": "Succeeded"}}));
    let deleted = full(
        json!({"metadata": {"name": "d", "uid": "d", "deletionTimestamp": "2026-01-01T00:00:00Z"}, "spec": requests}),
    );
    house.bind([&ended, &deleted]);
    assert_eq!((admission.standing(&ended), admission.standing(&deleted)), (WAITS, WAITS));
    assert!(admitted(&admission, &asking("a", 1000, 0)));
}

#[tokio::test(start_paused = true)]
async fn a11_a_critical_pod_waits_until_its_victims_are_gone() {
    let house = House::ready().await;
    let admission = house.open();
    let (victim, critical) = (asking("victim", 800, 0), asking("critical", 500, CRITICAL));
    house.store.upsert(victim.clone());
    assert!(admitted(&admission, &victim));
    house.store.upsert(critical.clone());
    // Half as long again as the victim's grace of 30 s.
    let until = house.clock.now().mono + Duration::from_secs(45);
    assert_eq!(admission.standing(&critical), Standing::NotYet { until: Some(until) });
    assert_eq!(admission.standing(&critical), Standing::NotYet { until: Some(until) }, "ordered once");
    let orders = std::mem::take(&mut *house.told.orders.lock().unwrap());
    let order = KillOrder {
        reason: "Preempting".into(),
        message: "Preempted in order to admit critical pod".into(),
        grace: None,
        disruption: Some("Pod was preempted by Kubelet to accommodate a critical pod.".into()),
    };
    assert_eq!(orders, [("victim".to_owned(), order)]);
    assert_eq!(house.said(), ["Preempting: Preempted in order to admit critical pod"]);
    // Another one fits beside the critical pod, but only without the victim.
    let other = asking("other", 500, 0);
    house.store.upsert(other.clone());
    assert!(matches!(admission.standing(&other), Standing::NotYet { until: Some(_) }));
    assert_eq!(rejected(&admission, &asking("more", 1, 0)), "OutOfcpu");
    assert!(house.counted("kubelet_preemptions").is_empty());
    admission.release(victim.uid());
    assert_eq!(*house.told.wakes.lock().unwrap(), ["critical", "other"]);
    assert!(admitted(&admission, &critical) && admitted(&admission, &other));
    assert_eq!(house.counted("kubelet_preemptions"), [("cpu".to_owned(), 1)]);
}

#[tokio::test(start_paused = true)]
async fn a11_a_victim_that_does_not_die_holds_up_the_critical_pod_no_longer_than_upstream() {
    let house = House::ready().await;
    let admission = house.open();
    let victim = named(
        "victim",
        json!({"terminationGracePeriodSeconds": 2, "priority": 0,
            "containers": [{"name": "c", "resources": {"requests": {"cpu": "1"}}}]}),
    );
    let critical = asking("critical", 500, CRITICAL);
    house.store.upsert(victim.clone());
    assert!(admitted(&admission, &victim));
    house.store.upsert(critical.clone());
    assert!(!admitted(&admission, &critical));
    tokio::time::advance(Duration::from_secs(9)).await;
    assert!(!admitted(&admission, &critical));
    tokio::time::advance(Duration::from_secs(1)).await;
    assert!(admitted(&admission, &critical));
    assert!(
        house
            .events
            .has("ExceededGracePeriod", "Container runtime did not kill the pod within specified grace period.")
    );
}

#[tokio::test(start_paused = true)]
async fn a02_the_node_is_read_again_before_its_labels_turn_a_pod_away() {
    for (label, comes) in [("new", true), ("other", false)] {
        let house = House::ready().await;
        let newer = Newer { node: house.node.clone(), labels: vec![(label, "1")] };
        let admission = house.open_with(Some(Arc::new(newer)));
        let pod = named("a", json!({"nodeSelector": {"new": "1"}, "containers": []}));
        house.store.upsert(pod.clone());
        assert_eq!(admission.standing(&pod), WAITS);
        assert_eq!(admission.standing(&pod), WAITS, "asked once");
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert_eq!(*house.told.wakes.lock().unwrap(), ["a"]);
        assert_eq!(admitted(&admission, &pod), comes);
        assert!(comes || rejected(&admission, &pod) == "NodeAffinity");
    }
}

async fn run(house: &House, uid: &str) {
    use crate::cri::RuntimeService;
    let metadata = v1::PodSandboxMetadata { name: uid.into(), uid: uid.into(), namespace: "n".into(), attempt: 0 };
    let labels = [(crate::cri::POD_UID_LABEL, uid), (crate::cri::CONTAINER_NAME_LABEL, "c")]
        .map(|(key, value)| (key.to_owned(), value.to_owned()));
    let sandbox =
        v1::PodSandboxConfig { metadata: Some(metadata), labels: labels.clone().into(), ..Default::default() };
    let id = house.runtime.run_pod_sandbox(sandbox.clone(), "").await.unwrap();
    let container = v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata { name: "c".into(), attempt: 0 }),
        image: Some(v1::ImageSpec { image: "i".into(), ..Default::default() }),
        labels: labels.into(),
        ..Default::default()
    };
    let container = house.runtime.create_container(&id, container, sandbox).await.unwrap();
    house.runtime.start_container(&container).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn r26_what_runs_after_a_restart_keeps_its_place_before_all_others() {
    let house = House::new();
    run(&house, "z").await;
    house.runtime_store.relist().await.unwrap();
    let admission = house.open();
    // The running one asks for more than there is.
    let (running, new, critical) = (asking("z", 1500, 0), asking("a", 1, 0), asking("c", 100, CRITICAL));
    house.store.replace(PodSource::Api, vec![new.clone(), running.clone()]);
    assert_eq!(rejected(&admission, &new), "OutOfcpu", "asked first, decided last");
    assert!(admitted(&admission, &running));
    house.store.upsert(critical.clone());
    assert!(matches!(admission.standing(&critical), Standing::NotYet { until: Some(_) }));
    assert!(admitted(&admission, &running), "it ends by the order, not by a rejection");
    assert_eq!(house.told.orders.lock().unwrap()[0].0, "z");
}

#[tokio::test(start_paused = true)]
async fn a01_p70_places_grow_and_shrink_with_resizes_and_rejected_pods_hold_nothing() {
    let house = House::ready().await;
    house.store.replace(PodSource::Api, Vec::new());
    let admission = house.open();
    let (small, big) = (asking("a", 300, 0), asking("a", 800, 0));
    house.store.upsert(small.clone());
    assert!(admitted(&admission, &small));
    house.allocations.look(&small);
    house.store.upsert(big.clone());
    assert!(house.allocations.look(&big).same_object(&big), "the resize fits");
    let b = asking("b", 300, 0);
    house.store.upsert(b.clone());
    assert_eq!(rejected(&admission, &b), "OutOfcpu");
    // Nor is room promised to a pod that waits for its victims given to a resize.
    let critical = asking("c", 900, CRITICAL);
    house.store.upsert(critical.clone());
    assert!(matches!(admission.standing(&critical), Standing::NotYet { until: Some(_) }));
    let bigger = asking("a", 900, 0);
    house.store.upsert(bigger.clone());
    assert!(!house.allocations.look(&bigger).same_object(&bigger));
}

#[tokio::test(start_paused = true)]
async fn a_forgotten_pod_is_decided_on_anew() {
    let house = House::ready().await;
    let admission = house.open();
    let (a, b) = (asking("a", 1000, 0), asking("b", 1000, 0));
    house.bind([&a, &b]);
    assert!(admitted(&admission, &a));
    assert_eq!(rejected(&admission, &b), "OutOfcpu");
    admission.forget(a.uid());
    admission.forget(b.uid());
    house.store.remove(a.uid());
    assert!(admitted(&admission, &b));
}

#[tokio::test(start_paused = true)]
async fn a01_a_pod_that_its_source_let_go_does_not_count() {
    let house = House::ready().await;
    let admission = house.open();
    let (a, b) = (asking("a", 1000, 0), asking("b", 1000, 0));
    house.store.upsert(a.clone());
    assert!(admitted(&admission, &a));
    house.store.remove(a.uid());
    house.store.upsert(b.clone());
    assert!(admitted(&admission, &b), "deleted with no grace, as upstream");
}

#[tokio::test(start_paused = true)]
async fn a12_an_update_that_needs_more_than_is_declared_is_told() {
    let house = House::ready().await;
    let admission = house.open();
    let sized = |cpu: &str| named("a", json!({"resources": {"requests": {"cpu": cpu}}, "containers": []}));
    admission.updated(&sized("1"), &sized("1"));
    assert!(house.said().is_empty());
    admission.updated(&sized("1"), &sized("2"));
    assert_eq!(
        house.said(),
        ["FailedNodeDeclaredFeaturesCheck: Pod requires node features that are not available: \
          InPlacePodLevelResourcesVerticalScaling"]
    );
}
