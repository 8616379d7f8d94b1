//! The room against a real apiserver: run by hand with the harness's cluster up,
//! `RKUBELET_LIVE=/var/lib/rkubelet-e2e/kubeconfig cargo test --lib live_tests -- --ignored --nocapture`.
//!
//! `kubelet.conf` there is the identity of `node-1`, under the node authorizer and NodeRestriction; `super-admin.conf` may do all.

use std::{path::PathBuf, sync::Arc, time::Duration};

use http::Method;
use k8s_openapi::api::core::v1::{Pod as ApiPod, PodStatus};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::{
    ApiClients, ApiSettings, EventRecorder, ObjectCache, ReferencedObjects, TokenSpec, fake::CountingWakes, rest,
};
use crate::{
    events::{EventSink, EventType, Regarding},
    pod_status::{ApiPublisher, StatusPublisher},
    pods::{Pod, PodSource, PodStore, sources::apiserver},
    time::SystemClock,
    wake::{Cause, WakeSink},
};

const NAMESPACE: &str = "rkubelet-live";

fn clients(name: &str) -> ApiClients {
    let dir = PathBuf::from(std::env::var_os("RKUBELET_LIVE").expect("RKUBELET_LIVE names a directory of kubeconfigs"));
    ApiClients::connect(&dir.join(name), &ApiSettings::default()).unwrap()
}

async fn until(what: &str, mut so: impl FnMut() -> bool) {
    for _ in 0..1000 {
        if so() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("never: {what}");
}

async fn post(clients: &ApiClients, path: &str, body: Value) -> Value {
    let answer = rest::call(&clients.general, Method::POST, path, rest::JSON, body.to_string().into_bytes()).await;
    match answer {
        Ok(bytes) => serde_json::from_slice(&bytes).unwrap(),
        Err(error) if error.is_conflict() => Value::Null,
        Err(error) => panic!("{path}: {error}"),
    }
}

async fn read(clients: &ApiClients, name: &str) -> Option<Pod> {
    let path = format!("/api/v1/namespaces/{NAMESPACE}/pods/{name}");
    let bytes = rest::get(&clients.general, &path).await.ok()?;
    Pod::new(serde_json::from_slice::<ApiPod>(&bytes).unwrap(), PodSource::Api, jiff::Timestamp::UNIX_EPOCH)
}

#[tokio::test]
#[ignore = "needs a cluster"]
async fn a_node_reads_its_pods_and_what_they_refer_to() {
    let clients = clients("kubelet.conf");
    let wakes = Arc::new(CountingWakes::default());
    let sink: Arc<dyn WakeSink> = Arc::clone(&wakes) as _;
    let store = Arc::new(PodStore::new(&[PodSource::Api], Arc::clone(&sink)));
    let cancel = CancellationToken::new();
    tokio::spawn(apiserver::follow(
        clients.clone(),
        "node-1".to_owned(),
        Arc::clone(&store),
        Arc::new(SystemClock),
        cancel.clone(),
    ));
    let objects = ObjectCache::start(&clients, &sink, cancel.clone());
    until("complete", || store.complete()).await;
    let pods = store.list();
    let coredns = pods.iter().find(|p| p.name().starts_with("coredns")).expect("coredns runs on node-1");
    objects.track(coredns);
    let authority = objects.config_map("kube-system", "kube-root-ca.crt").await.unwrap();
    assert!(authority.data["ca.crt"].starts_with("-----BEGIN"));
    assert!(objects.config_map("kube-system", "coredns").await.unwrap().data.contains_key("Corefile"));
    let spec = TokenSpec { audience: String::new(), expiration_seconds: 3607 };
    let token = objects.service_account_token(coredns, &spec).await.unwrap();
    assert_eq!(token.expires.as_second() - token.issued.as_second(), 3607);
    until("services", || objects.services("kube-system").is_some_and(|s| s.iter().any(|s| s.name == "kubernetes")))
        .await;
    until("watches", || clients.open_watches() >= 4).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(clients.open_watches(), 4, "pods, services, two configMaps; none fails and returns");
}

#[tokio::test]
#[ignore = "needs a cluster"]
async fn a_status_is_patched_and_the_pod_deleted() {
    let clients = clients("super-admin.conf");
    post(&clients, "/api/v1/namespaces", json!({"metadata": {"name": NAMESPACE}})).await;
    let pods = format!("/api/v1/namespaces/{NAMESPACE}/pods");
    let manifest = json!({"metadata": {"name": "p"}, "spec": {"nodeName": "no-such-node", "automountServiceAccountToken": false,
        "containers": [{"name": "c", "image": "i"}]}});
    post(
        &clients,
        &format!("/api/v1/namespaces/{NAMESPACE}/serviceaccounts"),
        json!({"metadata": {"name": "default"}}),
    )
    .await;
    post(&clients, &pods, manifest.clone()).await;
    let pod = read(&clients, "p").await.unwrap();

    let wakes = Arc::new(CountingWakes::default());
    let publisher = ApiPublisher::new(clients.clone(), Arc::clone(&wakes) as _, CancellationToken::new());
    let status = |phase: &str, ready: &str, ips: &[&str]| -> PodStatus {
        let ips: Vec<Value> = ips.iter().map(|ip| json!({"ip": ip})).collect();
        serde_json::from_value(json!({
            "phase": phase, "startTime": "2026-01-01T00:00:00Z", "qosClass": "BestEffort",
            "podIP": ips.first().map(|i| i["ip"].clone()), "podIPs": ips, "hostIP": "192.0.2.2", "hostIPs": [{"ip": "192.0.2.2"}],
            "conditions": [
                {"type": "PodReadyToStartContainers", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"},
                {"type": "Initialized", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"},
                {"type": "Ready", "status": ready, "lastTransitionTime": "2026-01-01T00:00:00Z"},
                {"type": "ContainersReady", "status": ready, "lastTransitionTime": "2026-01-01T00:00:00Z"},
                {"type": "PodScheduled", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}],
            "containerStatuses": [{"name": "c", "image": "i", "imageID": "", "ready": ready == "True", "restartCount": 0,
                "started": true, "containerID": "containerd://abc", "lastState": {},
                "state": if phase == "Running" { json!({"running": {"startedAt": "2026-01-01T00:00:00Z"}}) }
                    else { json!({"terminated": {"exitCode": 0, "containerID": "containerd://abc"}}) }}]
        }))
        .unwrap()
    };
    publisher.offer(&pod, status("Running", "False", &["10.0.0.1", "fd00::1"]));
    until("acknowledged", || publisher.acknowledged(pod.uid()) == 1).await;
    // Somebody else adds a condition.
    let gate = json!({"status": {"conditions": [{"type": "example.com/gate", "status": "True"}]}});
    let path = format!("{pods}/p/status");
    rest::call(&clients.general, Method::PATCH, &path, rest::STRATEGIC_MERGE, gate.to_string().into_bytes())
        .await
        .unwrap();

    let pod = read(&clients, "p").await.unwrap();
    assert_eq!(publisher.offer(&pod, status("Running", "True", &["10.0.0.2"])), 2);
    until("acknowledged", || publisher.acknowledged(pod.uid()) == 2).await;
    let now = read(&clients, "p").await.unwrap();
    let held = now.api_status();
    let kinds: Vec<&str> = held.conditions.iter().flatten().map(|c| c.type_.as_str()).collect();
    assert!(kinds.contains(&"example.com/gate") && kinds.len() == 6);
    assert_eq!(held.pod_ips.as_ref().map(Vec::len), Some(1));
    // What the API made of it equals what was offered: nothing more to send.
    let before = now.metadata().resource_version.clone();
    assert_eq!(publisher.offer(&now, status("Running", "True", &["10.0.0.2"])), 2);
    publisher.drained().await;
    assert_eq!(read(&clients, "p").await.unwrap().metadata().resource_version, before);

    publisher.offer(&now, status("Succeeded", "False", &["10.0.0.2"]));
    publisher.delete(&now);
    publisher.drained().await;
    assert!(read(&clients, "p").await.is_none());
    assert_eq!(publisher.acknowledged(now.uid()), 3);

    // A successor of the same name is never touched.
    post(&clients, &pods, manifest).await;
    let successor = read(&clients, "p").await.unwrap();
    let late = ApiPublisher::new(clients.clone(), Arc::clone(&wakes) as _, CancellationToken::new());
    late.offer(&now, status("Failed", "False", &[]));
    late.delete(&now);
    late.drained().await;
    assert_eq!(late.acknowledged(now.uid()), 1);
    assert_eq!(read(&clients, "p").await.unwrap().uid(), successor.uid());
    publisher.delete(&successor);
    publisher.drained().await;
    assert!(wakes.count(now.uid().as_str(), Cause::Published) >= 3);
}

#[tokio::test]
#[ignore = "needs a cluster"]
async fn events_are_written_and_counted() {
    let clients = clients("kubelet.conf");
    let recorder = EventRecorder::start(&clients, "node-1", Arc::new(SystemClock), CancellationToken::new());
    for _ in 0..3 {
        recorder.event(
            Regarding::Node,
            EventType::Normal,
            "RkubeletLiveTest",
            "a test of the event recorder".to_owned(),
        );
    }
    let admin = super::live_tests::clients("super-admin.conf");
    let path = "/api/v1/namespaces/default/events?fieldSelector=reason%3DRkubeletLiveTest";
    for _ in 0..200 {
        let list: Value = serde_json::from_slice(&rest::get(&admin.general, path).await.unwrap()).unwrap();
        let counts: Vec<i64> = list["items"].as_array().unwrap().iter().filter_map(|e| e["count"].as_i64()).collect();
        if counts.contains(&3) {
            rest::call(&admin.general, Method::DELETE, path, rest::JSON, Vec::new()).await.unwrap();
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("no event with count 3");
}
