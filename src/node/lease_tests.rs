use std::sync::mpsc;

use http::StatusCode;
use serde_json::{Value, json};

use super::super::fake_api::FakeApi;
use super::*;

const LEASE: &str = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/n1";
const NODE: &str = "/api/v1/nodes/n1";

fn api() -> FakeApi {
    let api = FakeApi::default();
    api.put(NODE, json!({"metadata": {"name": "n1", "uid": "u1"}}));
    api
}

fn factory(api: &FakeApi) -> ClientFactory {
    let api = api.clone();
    Arc::new(move || api.client())
}

fn settings() -> LeaseSettings {
    LeaseSettings::new("n1", 40)
}

fn renewer<'a>(api: &FakeApi, settings: &'a LeaseSettings) -> Renewer<'a> {
    Renewer { factory: factory(api), settings, api: None, latest: None }
}

fn count(api: &FakeApi, method: &str) -> usize {
    api.requests().iter().filter(|r| **r == format!("{method} {LEASE}")).count()
}

#[tokio::test]
async fn n20_created_when_missing_then_renewed() {
    let (api, settings) = (api(), settings());
    let mut renewer = renewer(&api, &settings);
    renewer.sync().await;
    let lease = api.get(LEASE).unwrap();
    assert_eq!(lease["spec"]["holderIdentity"], "n1");
    assert_eq!(lease["spec"]["leaseDurationSeconds"], 40);
    assert_eq!(
        lease["metadata"]["ownerReferences"],
        json!([{"apiVersion": "v1", "kind": "Node", "name": "n1", "uid": "u1"}])
    );
    let first = lease["spec"]["renewTime"].clone();
    renewer.sync().await;
    assert_ne!(api.get(LEASE).unwrap()["spec"]["renewTime"], first);
    assert_eq!(count(&api, "PUT"), 1);
    assert_eq!(settings.renew_interval(), Duration::from_secs(10));
}

#[tokio::test]
async fn n20_an_existing_lease_without_owner_gets_one() {
    let (api, settings) = (api(), settings());
    api.put(LEASE, json!({"metadata": {"name": "n1"}, "spec": {"holderIdentity": "n1"}}));
    renewer(&api, &settings).sync().await;
    assert_eq!(api.get(LEASE).unwrap()["metadata"]["ownerReferences"][0]["uid"], "u1");
}

#[tokio::test]
async fn n20_a_lease_of_a_node_made_anew_gets_the_new_owner() {
    let (api, settings) = (api(), settings());
    let owner = json!([{"apiVersion": "v1", "kind": "Node", "name": "n1", "uid": "old"}]);
    api.put(LEASE, json!({"metadata": {"name": "n1", "ownerReferences": owner}, "spec": {}}));
    renewer(&api, &settings).sync().await;
    assert_eq!(api.get(LEASE).unwrap()["metadata"]["ownerReferences"][0]["uid"], "u1");
}

#[tokio::test(start_paused = true)]
async fn n20_five_failures_then_the_lease_is_read_again() {
    let (api, settings) = (api(), settings());
    let mut renewer = renewer(&api, &settings);
    renewer.sync().await;
    api.fail(StatusCode::INTERNAL_SERVER_ERROR, 5);
    renewer.sync().await;
    assert_eq!(count(&api, "PUT"), 6, "five that failed, one after reading it again");
    assert_eq!(count(&api, "GET"), 2);
}

#[tokio::test(start_paused = true)]
async fn n20_a_conflict_reads_the_lease_again() {
    let (api, settings) = (api(), settings());
    let mut renewer = renewer(&api, &settings);
    renewer.sync().await;
    api.fail(StatusCode::CONFLICT, 1);
    renewer.sync().await;
    assert_eq!((count(&api, "PUT"), count(&api, "GET")), (2, 2));
}

fn renewals(api: &FakeApi) -> usize {
    count(api, "PUT")
}

/// Blocks until the count grows beyond `than`; false after two seconds.
fn grows(api: &FakeApi, than: usize) -> bool {
    (0..200).any(|_| {
        thread::sleep(Duration::from_millis(10));
        renewals(api) > than
    })
}

#[test]
fn n20_renewed_while_the_main_runtime_is_blocked_and_not_when_it_hangs() {
    let api = api();
    let main = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let heartbeat = Heartbeat::new();
    let cancel = CancellationToken::new();
    main.spawn(heartbeat_task(Arc::clone(&heartbeat), cancel.clone()));
    let (stalled, stall) = mpsc::channel();
    let limit = Duration::from_millis(2500);
    // A lease of one second is renewed every 250 ms.
    let settings = LeaseSettings { stall_limit: limit, ..LeaseSettings::new("n1", 1) };
    let lease =
        spawn_with(factory(&api), settings, heartbeat, cancel.clone(), move || stalled.send(()).unwrap()).unwrap();

    main.block_on(async { tokio::time::sleep(Duration::from_millis(100)).await });
    // From here nothing runs on the main runtime.
    let before = renewals(&api);
    assert!(grows(&api, before), "blocked for a while: still renewed");
    assert!(stall.try_recv().is_err());
    stall.recv_timeout(Duration::from_secs(10)).expect("hangs for too long: the process would abort");
    let last = renewals(&api);
    thread::sleep(Duration::from_millis(600));
    assert_eq!(renewals(&api), last, "and the lease is no longer renewed");
    lease.join().unwrap();
    cancel.cancel();
}

#[test]
fn n20_the_thread_ends_when_cancelled() {
    let api = api();
    let cancel = CancellationToken::new();
    let thread = spawn(factory(&api), settings(), Heartbeat::new(), cancel.clone()).unwrap();
    while api.get(LEASE).is_none() {
        thread::sleep(Duration::from_millis(5));
    }
    cancel.cancel();
    thread.join().unwrap();
}

#[test]
fn foreign_fields_of_the_lease_survive() {
    let base: Lease = serde_json::from_value(json!({"metadata": {"name": "n1", "labels": {"a": "b"}},
        "spec": {"holderIdentity": "n1", "leaseTransitions": 3}}))
    .unwrap();
    let now = jiff::Timestamp::from_second(5).unwrap();
    let lease: Value = serde_json::to_value(renewed(Some(&base), &settings(), None, now)).unwrap();
    assert_eq!(lease["metadata"]["labels"]["a"], "b");
    assert_eq!(lease["spec"]["leaseTransitions"], 3);
    assert_eq!(lease["spec"]["renewTime"], "1970-01-01T00:00:05.000000Z");
}
