use std::collections::BTreeSet;

use http::StatusCode;
use k8s_openapi::api::core::v1::NodeAddress;
use serde_json::{Value, json};

use super::super::{
    NodeFacts,
    facts::FactsPublisher,
    fake_api::FakeApi,
    machine::Machine,
    pressure::Pressure,
    runtime_state::{RuntimeState, ready_for_test},
    settings::test_settings,
};
use super::*;
use crate::{
    events::MemoryEvents,
    time::{Clock, Now},
    wake::NoWakes,
};

const NODE: &str = "/api/v1/nodes/node1";

/// Both clocks follow tokio's paused time.
struct PausedClock(Instant);

impl Clock for PausedClock {
    fn now(&self) -> Now {
        let second = 1_000_000 + self.0.elapsed().as_secs() as i64;
        Now { mono: Instant::now(), wall: jiff::Timestamp::from_second(second).unwrap() }
    }
}

struct World {
    api: FakeApi,
    readings: watch::Sender<Option<Readings>>,
    runtime: watch::Sender<RuntimeState>,
    storage: watch::Sender<Option<String>>,
    events: Arc<MemoryEvents>,
    object: NodeObject,
    cancel: CancellationToken,
}

fn readings(pressures: BTreeSet<Pressure>) -> Readings {
    Readings {
        machine: Machine { cores: 2, memory: 1 << 30, boot_id: "b".into(), ..Machine::default() },
        addresses: Some(vec![NodeAddress { type_: "InternalIP".into(), address: "192.0.2.2".into() }]),
        node_fs_capacity: Some(1000),
        pressures,
        images: None,
    }
}

fn start(api: FakeApi) -> World {
    let facts = FactsPublisher::new(NodeFacts::default(), Arc::new(NoWakes));
    let world = World {
        api,
        readings: watch::Sender::new(Some(readings(BTreeSet::new()))),
        runtime: watch::Sender::new(RuntimeState::unknown()),
        storage: watch::Sender::new(Some("CSINode is not yet initialized".to_owned())),
        events: Arc::default(),
        object: NodeObject::new(facts),
        cancel: CancellationToken::new(),
    };
    let publisher = Publisher {
        settings: Arc::new(test_settings()),
        clients: ApiClients::over(world.api.client()),
        object: world.object.clone(),
        readings: world.readings.subscribe(),
        runtime: world.runtime.subscribe(),
        storage: world.storage.subscribe(),
        health: Arc::new(Vec::new),
        events: world.events.clone(),
        clock: Arc::new(PausedClock(Instant::now())),
        refresh: Arc::default(),
    };
    tokio::spawn(publisher.run(world.cancel.clone()));
    world
}

impl World {
    fn node(&self) -> Value {
        self.api.get(NODE).unwrap_or_default()
    }
    fn condition(&self, type_: &str) -> Value {
        let node = self.node();
        node["status"]["conditions"].as_array().unwrap().iter().find(|c| c["type"] == type_).unwrap().clone()
    }
    fn patches(&self) -> usize {
        self.api.requests().iter().filter(|r| r.starts_with("PATCH")).count()
    }
    fn told(&self, reason: &str) -> usize {
        self.events.all().iter().filter(|e| e.reason == reason).count()
    }
    async fn become_ready(&self) {
        seconds(1).await;
        self.runtime.send_replace(ready_for_test());
        self.storage.send_replace(None);
        seconds(1).await;
        assert_eq!(self.condition("Ready")["status"], "True");
    }
}

async fn seconds(n: u64) {
    tokio::time::sleep(Duration::from_secs(n)).await;
}

#[tokio::test(start_paused = true)]
async fn n19_registered_not_ready_then_ready_at_once() {
    let world = start(FakeApi::default());
    seconds(1).await;
    assert_eq!(world.condition("Ready")["status"], "False");
    world.runtime.send_replace(ready_for_test());
    seconds(1).await;
    assert_eq!(world.condition("Ready")["message"], "CSINode is not yet initialized");
    world.storage.send_replace(None);
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert_eq!(world.condition("Ready")["status"], "True", "no tick was waited for");
    assert_eq!(world.told("NodeReady"), 1);
    assert_eq!(world.told("NodeHasSufficientMemory"), 1);
    world.cancel.cancel();
}

#[tokio::test(start_paused = true)]
async fn n19_a_restarted_agent_keeps_a_ready_node_ready_while_it_looks_around() {
    for answers in [true, false] {
        let first = start(FakeApi::default());
        first.become_ready().await;
        first.cancel.cancel();
        let world = start(first.api.clone());
        seconds(2).await;
        assert_eq!(world.condition("Ready")["status"], "True", "not asked yet is not the same as not ready");
        if answers {
            world.runtime.send_replace(ready_for_test());
            world.storage.send_replace(None);
        }
        seconds(4).await;
        assert_eq!(world.condition("Ready")["status"], if answers { "True" } else { "False" });
        assert_eq!(world.told("NodeNotReady"), usize::from(!answers));
        world.cancel.cancel();
    }
}

#[tokio::test(start_paused = true)]
async fn n19_nothing_new_is_not_sent_until_a_report_is_due() {
    let world = start(FakeApi::default());
    world.become_ready().await;
    let before = world.patches();
    seconds(145).await;
    assert_eq!(world.patches(), before, "the first report waits for half the period at least");
    seconds(310).await;
    assert!(world.patches() > before, "and for one and a half at most");
    let later = world.patches();
    seconds(3000).await;
    let reports = world.patches() - later;
    assert!((9..=11).contains(&reports), "then one each 5 min: {reports}");
    world.cancel.cancel();
}

#[tokio::test(start_paused = true)]
async fn n16_pressure_is_sent_at_once_with_its_event() {
    let world = start(FakeApi::default());
    world.become_ready().await;
    world.readings.send_replace(Some(readings([Pressure::Disk].into())));
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert_eq!(world.condition("DiskPressure")["status"], "True");
    assert_eq!(world.told("NodeHasDiskPressure"), 1);
    world.cancel.cancel();
}

#[tokio::test(start_paused = true)]
async fn n19_five_tries_then_again_later_and_events_only_once() {
    let world = start(FakeApi::default());
    world.become_ready().await;
    let before = world.api.requests().len();
    world.api.fail(StatusCode::INTERNAL_SERVER_ERROR, 7);
    world.runtime.send_replace(RuntimeState::unknown());
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert_eq!(world.api.requests().len() - before, 5);
    assert_eq!(world.told("NodeNotReady"), 0, "what was not written is not told");
    seconds(5).await;
    assert_eq!(world.condition("Ready")["status"], "False");
    assert_eq!(world.told("NodeNotReady"), 1);
    world.cancel.cancel();
}

#[tokio::test(start_paused = true)]
async fn n02_a_label_taken_away_is_put_back_at_once() {
    let world = start(FakeApi::default());
    world.become_ready().await;
    let mut node = world.node();
    node["metadata"]["labels"].as_object_mut().unwrap().remove("kubernetes.io/os");
    world.api.put(NODE, node);
    world.object.offer(serde_json::from_value(world.node()).unwrap());
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert_eq!(world.node()["metadata"]["labels"]["kubernetes.io/os"], "linux");
    world.cancel.cancel();
}

#[tokio::test(start_paused = true)]
async fn n16_conditions_of_others_survive_our_patches() {
    let world = start(FakeApi::default());
    world.become_ready().await;
    let mut node = world.node();
    let foreign = json!({"type": "NetworkUnavailable", "status": "False", "reason": "CalicoIsUp"});
    node["status"]["conditions"].as_array_mut().unwrap().push(foreign.clone());
    world.api.put(NODE, node);
    world.readings.send_replace(Some(readings([Pressure::Pid].into())));
    seconds(1).await;
    assert_eq!(world.condition("NetworkUnavailable"), foreign);
    assert_eq!(world.condition("PIDPressure")["status"], "True");
    world.cancel.cancel();
}

#[tokio::test(start_paused = true)]
async fn n18_cordoning_is_told() {
    let world = start(FakeApi::default());
    world.become_ready().await;
    let mut node = world.node();
    node["spec"]["unschedulable"] = json!(true);
    world.api.put(NODE, node);
    world.object.offer(serde_json::from_value(world.node()).unwrap());
    seconds(1).await;
    assert_eq!(world.told("NodeNotSchedulable"), 1);
    world.cancel.cancel();
}
