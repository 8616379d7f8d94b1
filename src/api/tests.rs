//! The room against the in-memory apiserver: referenced objects, tokens, events, and their faults.

use std::{sync::Arc, time::Duration};

use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::{
    ApiError, EventRecorder, ObjectCache, ReferencedObjects, TokenSpec,
    fake::{CountingWakes, FakeApi, eventually},
};
use crate::{
    events::{EventSink, EventType, Regarding},
    pods::{Pod, PodSource},
    rush::Rush,
    time::{Clock, SystemClock},
    wake::{Cause, WakeSink},
};

fn pod(uid: &str) -> Pod {
    let object = serde_json::from_value(json!({
        "metadata": {"name": uid, "namespace": "n", "uid": uid, "resourceVersion": "5"},
        "spec": {"nodeName": "node", "containers": [{"name": "c"}], "volumes": [
            {"name": "a", "configMap": {"name": "conf"}}, {"name": "b", "secret": {"secretName": "key"}}]}
    }))
    .unwrap();
    Pod::new(object, PodSource::Api, jiff::Timestamp::UNIX_EPOCH).unwrap()
}

fn config_map(value: &str) -> Value {
    json!({"metadata": {"name": "conf", "namespace": "n", "uid": "x"}, "data": {"k": value}})
}

fn secret(base64: &str) -> Value {
    json!({"metadata": {"name": "key", "namespace": "n", "uid": "y"}, "type": "Opaque", "data": {"k": base64}})
}

struct House {
    api: FakeApi,
    wakes: Arc<CountingWakes>,
    objects: ObjectCache,
    clients: super::ApiClients,
}

fn house() -> House {
    let api = FakeApi::default();
    let wakes = Arc::new(CountingWakes::default());
    let clients = api.clients();
    let sink: Arc<dyn WakeSink> = Arc::clone(&wakes) as Arc<dyn WakeSink>;
    let objects = ObjectCache::start(&clients, &sink, CancellationToken::new());
    House { api, wakes, objects, clients }
}

impl House {
    async fn value(&self) -> Result<String, ApiError> {
        Ok(self.objects.config_map("n", "conf").await?.data["k"].clone())
    }

    async fn becomes(&self, expected: &str) {
        for _ in 0..60_000 {
            if self.value().await.ok().as_deref() == Some(expected) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("never became {expected}");
    }
}

#[tokio::test(start_paused = true)]
async fn v24_one_watch_per_object_shared_and_dropped_with_the_last_user() {
    let house = house();
    house.api.put("configmaps", config_map("1"));
    house.api.put("secrets", secret("czNjcmV0"));
    let (a, b) = (pod("a"), pod("b"));
    house.objects.track(&a);
    house.objects.track(&b);
    house.objects.track(&b);
    assert_eq!(house.value().await.unwrap(), "1");
    let held = house.objects.secret("n", "key").await.unwrap();
    assert_eq!(held.data["k"], b"s3cret");
    assert!(!format!("{held:?}").contains("s3cret"));
    eventually("both are watched", || house.api.watchers("configmaps") == 1 && house.api.watchers("secrets") == 1)
        .await;
    assert_eq!(house.clients.open_watches(), 3, "two objects and the services");
    assert_eq!(house.api.requests("GET /api/v1/namespaces/n/configmaps/conf").len(), 2, "one GET for each new user");

    house.objects.forget(a.uid());
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(house.api.watchers("configmaps"), 1);
    house.objects.forget(b.uid());
    eventually("watches end", || house.clients.open_watches() == 1).await;
    assert!(matches!(house.value().await, Err(ApiError::Unavailable { .. })));
}

#[tokio::test(start_paused = true)]
async fn n23_only_single_objects_are_asked_for() {
    let house = house();
    house.api.put("secrets", secret("YQ=="));
    house.objects.track(&pod("a"));
    eventually("watched", || house.api.watchers("secrets") == 1).await;
    for request in house.api.requests("GET /api/v1/namespaces/n/") {
        let single = request.contains("fieldSelector=metadata.name%3D")
            || request.ends_with("/conf")
            || request.ends_with("/key");
        assert!(single, "{request}");
    }
}

#[tokio::test(start_paused = true)]
async fn v24_changes_wake_the_users_and_equal_content_does_not() {
    let house = house();
    house.api.put("configmaps", config_map("1"));
    house.objects.track(&pod("a"));
    house.becomes("1").await;
    eventually("watched", || house.api.watchers("configmaps") == 1).await;
    let before = house.wakes.count("a", Cause::Object);
    house.api.put("configmaps", config_map("1"));
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(house.wakes.count("a", Cause::Object), before);
    house.api.put("configmaps", config_map("2"));
    eventually("woken", || house.wakes.count("a", Cause::Object) == before + 1).await;
    assert_eq!(house.value().await.unwrap(), "2");
}

#[tokio::test(start_paused = true)]
async fn v24_a_missing_object_is_an_answer_and_may_appear_and_go() {
    let house = house();
    house.objects.track(&pod("a"));
    assert_eq!(house.value().await.unwrap_err().to_string(), "configmap \"conf\" not found");
    assert_eq!(house.objects.secret("n", "key").await.unwrap_err().to_string(), "secret \"key\" not found");
    eventually("watched", || house.api.watchers("configmaps") == 1).await;
    house.api.put("configmaps", config_map("1"));
    house.becomes("1").await;
    house.api.remove("configmaps", "n", "conf", true);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(matches!(house.value().await, Err(ApiError::NotFound { .. })));
}

#[tokio::test(start_paused = true)]
async fn v24_immutable_objects_are_not_watched() {
    let house = house();
    let mut object = config_map("1");
    object["immutable"] = json!(true);
    house.api.put("configmaps", object);
    house.objects.track(&pod("a"));
    house.becomes("1").await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(house.api.watchers("configmaps"), 0);

    // Deleted and made anew under the same name: the next pod sees the new one, and it is watched.
    house.api.put("configmaps", config_map("2"));
    house.objects.track(&pod("b"));
    assert_eq!(house.value().await.unwrap(), "2");
    eventually("watched", || house.api.watchers("configmaps") == 1).await;
}

#[tokio::test(start_paused = true)]
async fn v24_one_made_immutable_ends_its_watch() {
    let house = house();
    house.api.put("configmaps", config_map("1"));
    house.objects.track(&pod("a"));
    eventually("watched", || house.api.watchers("configmaps") == 1).await;
    let mut object = config_map("1");
    object["immutable"] = json!(true);
    house.api.put("configmaps", object);
    eventually("not watched", || house.api.watchers("configmaps") == 0).await;
}

#[tokio::test(start_paused = true)]
async fn v24_a_new_user_never_reads_older_data_than_a_get_would_give() {
    let house = house();
    house.api.put("configmaps", config_map("1"));
    house.objects.track(&pod("a"));
    eventually("watched", || house.api.watchers("configmaps") == 1).await;
    house.api.put_silently("configmaps", config_map("2"));
    assert_eq!(house.value().await.unwrap(), "1", "the watch has not said so yet");
    house.objects.track(&pod("b"));
    assert_eq!(house.value().await.unwrap(), "2");
}

#[tokio::test(start_paused = true)]
async fn v24_survives_410_dropped_watches_and_an_outage() {
    let house = house();
    house.api.put("configmaps", config_map("1"));
    house.objects.track(&pod("a"));
    house.becomes("1").await;
    eventually("watched", || house.api.watchers("configmaps") == 1).await;

    house.api.break_watches();
    house.api.put("configmaps", config_map("2"));
    house.becomes("2").await;

    house.api.put_silently("configmaps", config_map("3"));
    house.api.compact();
    house.api.break_watches();
    house.becomes("3").await;

    house.api.set_down(true);
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert_eq!(house.value().await.unwrap(), "3", "what was read stays true during an outage");
    let tries = house.api.requests("GET /api/v1/namespaces/n/configmaps").len();
    house.api.put_silently("configmaps", config_map("4"));
    house.api.compact();
    house.api.set_down(false);
    house.becomes("4").await;
    assert!(house.api.requests("GET /api/v1/namespaces/n/configmaps").len() - tries <= 4, "no storm afterwards");
}

#[tokio::test(start_paused = true)]
async fn v24_an_outage_at_the_first_fetch_is_an_answer_and_heals() {
    let house = house();
    house.api.set_down(true);
    house.objects.track(&pod("a"));
    let error = house.value().await.unwrap_err().to_string();
    assert!(error.starts_with("failed to fetch configmap \"n/conf\": connection refused"), "{error}");
    house.api.put_silently("configmaps", config_map("1"));
    house.api.set_down(false);
    house.becomes("1").await;
    assert!(house.wakes.count("a", Cause::Object) >= 2);
}

#[tokio::test(start_paused = true)]
async fn n23_a_403_right_after_binding_is_not_final() {
    let house = house();
    house.api.put("configmaps", config_map("1"));
    house.api.refuse("GET /api/v1/namespaces/n/configmaps/conf", 2, 403, "Forbidden");
    house.objects.track(&pod("a"));
    assert_eq!(house.value().await.unwrap(), "1");

    let house = self::house();
    house.api.refuse("GET /api/v1/namespaces/n/secrets", 100, 403, "Forbidden");
    house.objects.track(&pod("b"));
    let error = house.objects.secret("n", "key").await.unwrap_err();
    assert!(matches!(error, ApiError::Forbidden { .. }), "{error}");
}

fn spec(seconds: i64) -> TokenSpec {
    TokenSpec { audience: "vault".to_owned(), expiration_seconds: seconds }
}

#[tokio::test]
async fn v26_tokens_are_bound_cached_and_hidden() {
    let house = house();
    let pod = pod("a");
    let first = house.objects.service_account_token(&pod, &spec(3600)).await.unwrap();
    let again = house.objects.service_account_token(&pod, &spec(3600)).await.unwrap();
    assert_eq!(first.token, again.token);
    assert!(!format!("{first:?}").contains("token-"));
    let other = house.objects.service_account_token(&pod, &spec(600)).await.unwrap();
    assert_ne!(first.token, other.token);
    let asked = house.api.bodies("POST /api/v1/namespaces/n/serviceaccounts/default/token");
    assert_eq!(asked.len(), 2);
    assert_eq!(
        asked[0]["spec"],
        json!({"audiences": ["vault"], "expirationSeconds": 3600,
            "boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": "a", "uid": "a"}})
    );
    house.objects.forget(pod.uid());
    let new = house.objects.service_account_token(&pod, &spec(3600)).await.unwrap();
    assert_ne!(new.token, first.token);
}

#[tokio::test(start_paused = true)]
async fn v26_the_pod_is_woken_when_a_token_is_due() {
    let house = house();
    let pod = pod("a");
    house.objects.service_account_token(&pod, &spec(3600)).await.unwrap();
    tokio::time::sleep(Duration::from_secs(2860)).await;
    assert_eq!(house.wakes.count("a", Cause::Object), 0);
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert_eq!(house.wakes.count("a", Cause::Object), 1);
}

#[tokio::test]
async fn v26_a_failed_first_request_says_so_and_a_failed_renewal_keeps_the_old_token() {
    let house = house();
    let pod = pod("a");
    house.api.refuse("POST /api/v1/namespaces/n/serviceaccounts", 1, 403, "Forbidden");
    let error = house.objects.service_account_token(&pod, &spec(600)).await.unwrap_err().to_string();
    assert_eq!(error, "failed to fetch token: refused by the test");
    // Valid for 1 s, so due at once.
    let old = house.objects.service_account_token(&pod, &spec(1)).await.unwrap();
    house.api.set_down(true);
    let kept = house.objects.service_account_token(&pod, &spec(1)).await.unwrap();
    assert_eq!(old.token, kept.token);
}

#[tokio::test(start_paused = true)]
async fn n24_services_are_followed_with_their_selector() {
    let house = house();
    assert!(house.objects.services("n").is_none());
    let service = json!({"metadata": {"name": "s", "namespace": "n"}, "spec": {"clusterIP": "10.0.0.9", "ports": [{"port": 80}]}});
    house.api.put("services", service);
    eventually("listed", || house.objects.services("n").is_some_and(|s| s.len() == 1)).await;
    assert!(house.api.requests("GET /api/v1/services")[0].contains("fieldSelector=spec.clusterIP%21%3DNone"));
    assert_eq!(house.wakes.count("*", Cause::Object), 1);
}

#[tokio::test(start_paused = true)]
async fn n24_p61_a_runtime_class_is_followed_by_name() {
    let house = house();
    let object = json!({"metadata": {"name": "a", "namespace": "n", "uid": "a"},
        "spec": {"runtimeClassName": "kata", "containers": [{"name": "c"}]}});
    let pod = Pod::new(serde_json::from_value(object).unwrap(), PodSource::Api, jiff::Timestamp::UNIX_EPOCH).unwrap();
    house.objects.track(&pod);
    let missing = house.objects.runtime_handler(&pod).await.unwrap_err();
    assert_eq!(missing.to_string(), "runtimeclass.node.k8s.io \"kata\" not found");
    house.api.put("runtimeclasses", json!({"metadata": {"name": "kata", "uid": "k"}, "handler": "kata-qemu"}));
    eventually("it appears", || house.wakes.count("a", Cause::Object) == 2).await;
    assert_eq!(house.objects.runtime_handler(&pod).await.unwrap(), "kata-qemu");
    assert_eq!(house.api.requests("GET /apis/node.k8s.io/v1/runtimeclasses/kata").len(), 1);
    let watches = house.api.requests("GET /apis/node.k8s.io/v1/runtimeclasses?");
    assert!(watches.iter().all(|r| r.contains("fieldSelector=metadata.name%3Dkata")), "{watches:?}");
    house.objects.forget(pod.uid());
    eventually("the watch ends", || house.api.watchers("runtimeclasses") == 0).await;
}

#[tokio::test(start_paused = true)]
async fn p61_no_class_is_the_default_handler_and_an_outage_says_so() {
    let house = house();
    let with = |class: Option<&str>| {
        let spec = json!({"runtimeClassName": class, "containers": [{"name": "c"}]});
        let object = json!({"metadata": {"name": "a", "namespace": "n", "uid": "a"}, "spec": spec});
        Pod::new(serde_json::from_value(object).unwrap(), PodSource::Api, jiff::Timestamp::UNIX_EPOCH).unwrap()
    };
    assert_eq!(house.objects.runtime_handler(&with(None)).await.unwrap(), "");
    assert_eq!(house.objects.runtime_handler(&with(Some(""))).await.unwrap(), "");
    house.api.set_down(true);
    house.objects.track(&with(Some("kata")));
    let error = house.objects.runtime_handler(&with(Some("kata"))).await.unwrap_err().to_string();
    assert!(error.starts_with("failed to lookup RuntimeClass kata: "), "{error}");
}

fn recorder(api: &FakeApi) -> Arc<EventRecorder> {
    EventRecorder::start(&api.clients(), "node", Arc::new(SystemClock), Rush::default(), CancellationToken::new())
}

#[tokio::test(start_paused = true)]
async fn p45_events_have_upstreams_shape() {
    let api = FakeApi::default();
    let recorder = recorder(&api);
    let pod = pod("a");
    let regarding = Regarding::Container { pod, field_path: "spec.containers{c}".to_owned() };
    recorder.event(regarding, EventType::Normal, "Started", "Container started".to_owned());
    recorder.set_node_uid("node-uid");
    recorder.event(Regarding::Node, EventType::Warning, "SystemOOM", "x".to_owned());
    eventually("both are sent", || api.bodies("POST").len() == 2).await;
    let (of_pod, of_node) =
        (&api.bodies("POST /api/v1/namespaces/n/events")[0], &api.bodies("POST /api/v1/namespaces/default/events")[0]);
    assert_eq!(
        of_pod["involvedObject"],
        json!({"apiVersion": "v1", "kind": "Pod", "namespace": "n", "name": "a", "uid": "a", "resourceVersion": "5",
            "fieldPath": "spec.containers{c}"})
    );
    assert_eq!(of_pod["source"], json!({"component": "kubelet", "host": "node"}));
    assert_eq!(
        (of_pod["reportingComponent"].as_str(), of_pod["reportingInstance"].as_str()),
        (Some("kubelet"), Some("node"))
    );
    assert_eq!((of_pod["type"].as_str(), of_pod["count"].as_i64()), (Some("Normal"), Some(1)));
    assert!(of_pod["metadata"]["name"].as_str().unwrap().starts_with("a."));
    assert_eq!(
        of_node["involvedObject"],
        json!({"apiVersion": "v1", "kind": "Node", "name": "node", "uid": "node-uid"})
    );
}

#[tokio::test(start_paused = true)]
async fn events_yield_to_starts_but_not_for_long() {
    let (api, rush) = (FakeApi::default(), Rush::default());
    let clock = Arc::new(SystemClock);
    let recorder = EventRecorder::start(&api.clients(), "node", clock, rush.clone(), CancellationToken::new());
    for (rush_on, millis) in [(false, 500), (true, 5000)] {
        rush.set(rush_on);
        let before = api.bodies("POST").len();
        let made = tokio::time::Instant::now();
        recorder.event(Regarding::Node, EventType::Normal, "Starting", format!("{millis}"));
        eventually("sent", || api.bodies("POST").len() > before).await;
        let took = made.elapsed().as_millis();
        assert!((millis..millis + 100).contains(&took), "{took} ms");
    }
}

#[tokio::test(start_paused = true)]
async fn p45_a_repeated_event_is_patched_and_made_anew_once_expired() {
    let api = FakeApi::default();
    let recorder = recorder(&api);
    let say = || recorder.event(Regarding::Pod(pod("a")), EventType::Warning, "BackOff", "again".to_owned());
    say();
    say();
    eventually("patched", || api.bodies("PATCH").len() == 1).await;
    let patch = &api.bodies("PATCH")[0];
    assert_eq!(patch["count"], json!(2));
    assert_eq!(patch.as_object().unwrap().keys().collect::<Vec<_>>(), ["count", "lastTimestamp", "message"]);
    let name = api.bodies("POST")[0]["metadata"]["name"].as_str().unwrap().to_owned();
    api.remove("events", "n", &name, true);
    say();
    eventually("made anew", || api.bodies("POST").len() == 2).await;
    assert_eq!(api.bodies("POST")[1]["count"], json!(3));
}

#[tokio::test(start_paused = true)]
async fn p45_events_outlive_an_outage_and_a_full_queue_blocks_nobody() {
    let api = FakeApi::default();
    api.set_down(true);
    let recorder = recorder(&api);
    let before = SystemClock.now().mono;
    for n in 0..1200 {
        recorder.event(Regarding::Pod(pod(&format!("p{n}"))), EventType::Normal, "Pulled", "m".to_owned());
    }
    assert_eq!(SystemClock.now().mono, before);
    assert!(recorder.dropped() >= 199, "{}", recorder.dropped());
    tokio::time::sleep(Duration::from_secs(30)).await;
    api.set_down(false);
    eventually("delivered", || api.bodies("POST").len() >= 1000).await;
}

#[tokio::test]
async fn s11_watches_are_spread_over_connections_of_80() {
    let made = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counting = Arc::clone(&made);
    let api = FakeApi::default();
    let client = api.clients().general;
    let pool = super::client::WatchPool::new(Arc::default(), move || {
        counting.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        client.clone()
    });
    let slots: Vec<_> = (0..200).map(|_| pool.take()).collect();
    assert_eq!(made.load(std::sync::atomic::Ordering::Relaxed), 3);
    drop(slots);
    let _one = pool.take();
    assert_eq!(made.load(std::sync::atomic::Ordering::Relaxed), 3, "a place that is free is used again");
}
