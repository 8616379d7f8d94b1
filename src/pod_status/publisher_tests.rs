//! The publisher against the in-memory apiserver.

use super::*;
use crate::api::fake::{CountingWakes, FakeApi, eventually};
use crate::pods::PodSource;

struct House {
    api: FakeApi,
    wakes: Arc<CountingWakes>,
    rush: Rush,
    publisher: ApiPublisher,
}

fn house() -> House {
    let api = FakeApi::default();
    let (wakes, rush) = (Arc::new(CountingWakes::default()), Rush::default());
    let publisher = ApiPublisher::new(api.clients(), Arc::clone(&wakes) as _, rush.clone(), CancellationToken::new());
    House { api, wakes, rush, publisher }
}

impl House {
    fn create(&self, uid: &str, status: serde_json::Value) -> Pod {
        let object = json!({
            "metadata": {"name": "p", "namespace": "n", "uid": uid},
            "spec": {"nodeName": "node", "containers": [{"name": "c"}]}, "status": status
        });
        self.api.put("pods", object);
        self.read()
    }

    fn read(&self) -> Pod {
        let object = serde_json::from_value(self.api.get("pods", "n", "p").unwrap()).unwrap();
        Pod::new(object, PodSource::Api, jiff::Timestamp::UNIX_EPOCH).unwrap()
    }

    async fn acknowledged(&self, uid: &str, version: u64) {
        let uid = PodUid::from(uid);
        eventually("acknowledged", || self.publisher.acknowledged(&uid) == version).await;
    }

    fn patches(&self) -> Vec<serde_json::Value> {
        self.api.bodies("PATCH /api/v1/namespaces/n/pods/p/status")
    }
}

fn status(value: serde_json::Value) -> PodStatus {
    serde_json::from_value(value).unwrap()
}

fn phase(phase: &str) -> PodStatus {
    status(json!({ "phase": phase }))
}

#[tokio::test(start_paused = true)]
async fn p44_versions_acknowledgements_and_equal_statuses() {
    let house = house();
    let pod = house.create("u", json!({"phase": "Pending"}));
    assert_eq!(house.publisher.offer(&pod, phase("Running")), 1);
    assert_eq!(house.publisher.offer(&pod, phase("Running")), 1);
    house.acknowledged("u", 1).await;
    assert!(house.wakes.count("u", Cause::Published) >= 1);
    assert_eq!(house.publisher.offer(&pod, phase("Running")), 1);
    assert_eq!(house.publisher.offer(&pod, phase("Failed")), 2);
    house.acknowledged("u", 2).await;
    house.publisher.drained().await;
    assert_eq!(house.patches().len(), 2);
    assert_eq!(house.patches()[0], json!({"metadata": {"uid": "u"}, "status": {"phase": "Running"}}));
}

#[tokio::test(start_paused = true)]
async fn p44_what_the_api_holds_already_is_acknowledged_without_a_request() {
    let house = house();
    let pod = house.create("u", json!({"phase": "Running"}));
    assert_eq!(house.publisher.offer(&pod, phase("Running")), 1);
    assert_eq!(house.publisher.acknowledged(pod.uid()), 1);
    assert_eq!(house.wakes.count("u", Cause::Published), 1);
    assert!(house.api.requests("").is_empty());
}

#[tokio::test(start_paused = true)]
async fn p44_one_request_at_a_time_and_the_newest_wins() {
    let house = house();
    let pod = house.create("u", json!({}));
    let gate = house.api.hold("PATCH");
    house.publisher.offer(&pod, phase("Unknown"));
    eventually("the first is under way", || house.patches().len() == 1).await;
    for reason in ["a", "b", "c"] {
        house.publisher.offer(&pod, status(json!({"phase": "Running", "reason": reason})));
    }
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(house.patches().len(), 1);
    gate.add_permits(10);
    house.acknowledged("u", 4).await;
    assert_eq!(house.patches().len(), 2);
    assert_eq!(house.patches()[1]["status"], json!({"phase": "Running", "reason": "c"}));
}

fn starting(reason: &str) -> PodStatus {
    let container = json!({"name": "c", "state": {"waiting": {"reason": reason}}, "image": "i", "imageID": "",
        "ready": false, "restartCount": 0});
    status(json!({"phase": "Pending", "containerStatuses": [container]}))
}

#[tokio::test(start_paused = true)]
async fn p44_a_status_that_only_starts_waits_for_a_better_one_but_not_long() {
    let house = house();
    let pod = house.create("u", json!({"phase": "Pending"}));
    house.publisher.offer(&pod, starting("ContainerCreating"));
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(house.patches().is_empty());
    house.publisher.offer(&pod, phase("Running"));
    house.acknowledged("u", 2).await;
    assert_eq!(house.patches().len(), 1);

    // Nothing better comes, or a reason why it does not go on, or the pod's end.
    for (second, wait) in [(None, 500), (Some(starting("ErrImagePull")), 0)] {
        let begun = tokio::time::Instant::now();
        house.publisher.forget(pod.uid());
        let pod = house.create("u", json!({"phase": "Pending"}));
        house.publisher.offer(&pod, starting("PodInitializing"));
        let version = second.map_or(1, |better| house.publisher.offer(&pod, better));
        house.acknowledged("u", version).await;
        let took = begun.elapsed().as_millis();
        assert!((wait..wait + 100).contains(&took), "{took} ms");
    }
    // In a rush longer, but not for ever, and not much beyond its end.
    for (rush_ends, wait) in [(60_000, 5000), (2000, 2500)] {
        let begun = tokio::time::Instant::now();
        house.publisher.forget(pod.uid());
        let pod = house.create("u", json!({"phase": "Pending"}));
        house.rush.set(true);
        house.publisher.offer(&pod, starting("ContainerCreating"));
        tokio::time::timeout(Duration::from_millis(rush_ends), house.acknowledged("u", 1)).await.ok();
        house.rush.set(false);
        house.acknowledged("u", 1).await;
        let took = begun.elapsed().as_millis();
        assert!((wait..wait + 100).contains(&took), "{took} ms");
    }
    house.publisher.forget(pod.uid());
    let pod = house.create("u", json!({"phase": "Pending"}));
    let begun = tokio::time::Instant::now();
    house.publisher.offer(&pod, starting("ContainerCreating"));
    house.publisher.delete(&pod);
    house.publisher.drained().await;
    assert!(begun.elapsed().as_millis() < 100);
    assert!(house.api.get("pods", "n", "p").is_none());
}

#[tokio::test(start_paused = true)]
async fn p44_nothing_is_lost_in_an_outage() {
    let house = house();
    let pod = house.create("u", json!({}));
    house.api.set_down(true);
    house.publisher.offer(&pod, phase("Running"));
    tokio::time::sleep(Duration::from_secs(1800)).await;
    assert_eq!(house.publisher.acknowledged(pod.uid()), 0);
    assert_eq!(house.publisher.pending(), 1);
    house.api.set_down(false);
    house.acknowledged("u", 1).await;
    house.publisher.drained().await;
}

#[tokio::test(start_paused = true)]
async fn p44_many_pods_share_a_bounded_number_of_requests() {
    let house = house();
    let gate = house.api.hold("PATCH");
    let mut pods = Vec::new();
    for n in 0..50 {
        let object = json!({"metadata": {"name": format!("p{n}"), "namespace": "n", "uid": format!("u{n}")},
            "spec": {"containers": [{"name": "c"}]}});
        house.api.put("pods", object.clone());
        let pod =
            Pod::new(serde_json::from_value(object).unwrap(), PodSource::Api, jiff::Timestamp::UNIX_EPOCH).unwrap();
        house.publisher.offer(&pod, phase("Running"));
        pods.push(pod);
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(house.api.requests("PATCH").len(), IN_FLIGHT);
    gate.add_permits(100);
    eventually("all", || pods.iter().all(|p| house.publisher.acknowledged(p.uid()) == 1)).await;
}

#[tokio::test(start_paused = true)]
async fn p44_others_writes_survive_and_drift_is_repaired() {
    let house = house();
    let pod = house.create("u", json!({"phase": "Pending"}));
    let wanted = || status(json!({"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}));
    house.publisher.offer(&pod, wanted());
    house.acknowledged("u", 1).await;
    let mut object = house.api.get("pods", "n", "p").unwrap();
    object["status"]["conditions"].as_array_mut().unwrap().push(json!({"type": "gate", "status": "True"}));
    object["status"]["phase"] = json!("Unknown");
    house.api.put("pods", object);
    assert_eq!(house.publisher.offer(&house.read(), wanted()), 1);
    house.publisher.drained().await;
    let now = house.api.get("pods", "n", "p").unwrap();
    assert_eq!(now["status"]["phase"], json!("Running"));
    assert_eq!(now["status"]["conditions"].as_array().unwrap().len(), 2);
    assert_eq!(house.patches()[1]["status"], json!({"phase": "Running"}));
}

#[tokio::test(start_paused = true)]
async fn p44_a_pod_that_is_gone_or_replaced_counts_as_acknowledged() {
    for replaced in [false, true] {
        let house = house();
        let pod = house.create("u", json!({}));
        if replaced {
            house.create("u-new", json!({}));
        } else {
            house.api.remove("pods", "n", "p", true);
        }
        house.publisher.offer(&pod, phase("Running"));
        house.acknowledged("u", 1).await;
        assert_eq!(house.publisher.offer(&pod, phase("Failed")), 2);
        assert_eq!(house.publisher.acknowledged(pod.uid()), 2);
        if replaced {
            assert_eq!(house.read().api_status().phase, None);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn p44_a_conflict_is_tried_again_while_the_pod_exists() {
    let house = house();
    let pod = house.create("u", json!({}));
    house.api.refuse("PATCH", 3, 409, "Conflict");
    house.publisher.offer(&pod, phase("Running"));
    house.acknowledged("u", 1).await;
    assert_eq!(house.patches().len(), 4);
}

#[tokio::test(start_paused = true)]
async fn p44_a_rejected_status_waits_for_a_newer_one() {
    let house = house();
    let pod = house.create("u", json!({}));
    house.api.refuse("PATCH", 1, 422, "Invalid");
    house.publisher.offer(&pod, phase("Wrong"));
    eventually("rejected", || house.patches().len() == 1).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(house.publisher.offer(&pod, phase("Running")), 2);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(house.publisher.acknowledged(pod.uid()), 2);
}

#[tokio::test(start_paused = true)]
async fn p10_delete_has_grace_zero_and_the_uid_and_comes_after_the_status() {
    let house = house();
    let pod = house.create("u", json!({}));
    house.api.refuse("DELETE", 2, 500, "InternalError");
    house.publisher.offer(&pod, phase("Succeeded"));
    house.publisher.delete(&pod);
    house.publisher.delete(&pod);
    eventually("gone", || house.api.get("pods", "n", "p").is_none()).await;
    let sent = house.api.bodies("DELETE");
    assert_eq!(sent.len(), 3);
    assert_eq!(sent[0]["gracePeriodSeconds"], json!(0));
    assert_eq!(sent[0]["preconditions"], json!({"uid": "u"}));
    let order: Vec<String> = house.api.requests("").iter().map(|r| r[..5].to_owned()).collect();
    assert_eq!(order, ["PATCH", "DELET", "DELET", "DELET"]);
    house.publisher.drained().await;
}

#[tokio::test(start_paused = true)]
async fn p10_delete_never_touches_a_successor_of_the_same_name() {
    let house = house();
    let pod = house.create("u", json!({}));
    house.create("u-new", json!({}));
    house.publisher.delete(&pod);
    house.publisher.drained().await;
    assert_eq!(house.read().uid(), &PodUid::from("u-new"));
    assert_eq!(house.api.bodies("DELETE").len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_forgotten_pod_sends_no_more() {
    let house = house();
    let pod = house.create("u", json!({}));
    house.api.set_down(true);
    house.publisher.offer(&pod, phase("Running"));
    house.publisher.forget(pod.uid());
    house.publisher.drained().await;
    house.api.set_down(false);
    assert_eq!(house.publisher.offer(&pod, phase("Running")), 1);
    house.acknowledged("u", 1).await;
}
