//! The apiserver source against the in-memory apiserver.

use std::{sync::Arc, time::Duration};

use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::apiserver;
use crate::{
    api::fake::{CountingWakes, FakeApi, eventually},
    pods::{PodSource, PodStore, PodUid},
    time::SystemClock,
    wake::Cause,
};

fn pod(name: &str, uid: &str) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "n", "uid": uid, "managedFields": [{"manager": "kubectl"}]},
        "spec": {"nodeName": "node", "containers": [{"name": "c"}]}
    })
}

struct House {
    api: FakeApi,
    store: Arc<PodStore>,
    wakes: Arc<CountingWakes>,
    cancel: CancellationToken,
}

fn house() -> House {
    let api = FakeApi::default();
    let wakes = Arc::new(CountingWakes::default());
    let store = Arc::new(PodStore::new(&[PodSource::Api], Arc::clone(&wakes) as _));
    House { api, store, wakes, cancel: CancellationToken::new() }
}

impl House {
    fn start(&self) {
        let (store, cancel) = (Arc::clone(&self.store), self.cancel.clone());
        tokio::spawn(apiserver::follow(self.api.clients(), "node".to_owned(), store, Arc::new(SystemClock), cancel));
    }

    async fn watching(&self) {
        eventually("the pods are watched", || self.api.watchers("pods") == 1).await;
    }

    fn has(&self, uid: &str) -> bool {
        self.store.get(&PodUid::from(uid)).is_some()
    }
}

#[tokio::test(start_paused = true)]
async fn p01_list_then_watch_of_this_nodes_pods() {
    let house = house();
    house.api.put("pods", pod("a", "ua"));
    house.start();
    eventually("complete", || house.store.complete()).await;
    let a = house.store.get(&PodUid::from("ua")).unwrap();
    assert_eq!(a.source(), PodSource::Api);
    assert!(a.metadata().managed_fields.is_none());
    house.watching().await;
    house.api.put("pods", pod("b", "ub"));
    eventually("b came", || house.has("ub")).await;
    assert!(house.wakes.count("ub", Cause::Desired) >= 1);
    let seen = a.seen();
    house.api.put("pods", pod("a", "ua"));
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(house.store.get(&PodUid::from("ua")).unwrap().seen(), seen, "first seen is first seen");
    house.api.remove("pods", "n", "a", true);
    eventually("a went", || !house.has("ua")).await;
    assert!(house.api.requests("GET /api/v1/pods").iter().all(|r| r.contains("fieldSelector=spec.nodeName%3Dnode")));
    house.cancel.cancel();
    eventually("the watch ends", || house.api.watchers("pods") == 0).await;
}

#[tokio::test(start_paused = true)]
async fn p01_an_unreachable_apiserver_means_not_complete() {
    let house = house();
    house.api.put("pods", pod("a", "ua"));
    house.api.set_down(true);
    house.start();
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert!(!house.store.complete());
    house.api.set_down(false);
    eventually("complete", || house.store.complete() && house.has("ua")).await;
}

#[tokio::test(start_paused = true)]
async fn p01_a_lost_deletion_is_found_by_relist_and_confirmed_by_a_read() {
    let house = house();
    house.api.put("pods", pod("a", "ua"));
    house.api.put("pods", pod("b", "ub"));
    house.start();
    house.watching().await;
    house.api.remove("pods", "n", "a", false);
    house.api.put_silently("pods", pod("b", "ub-recreated"));
    house.api.compact();
    house.api.break_watches();
    eventually("both old ones went", || !house.has("ua") && !house.has("ub")).await;
    assert!(house.has("ub-recreated"));
    assert_eq!(house.api.requests("GET /api/v1/namespaces/n/pods/a").len(), 1);
}

#[tokio::test(start_paused = true)]
async fn p01_a_list_that_forgets_a_pod_removes_nothing() {
    let house = house();
    house.api.put("pods", pod("a", "ua"));
    house.start();
    house.watching().await;
    house.api.hide_from_lists("pods", "n", "a");
    house.api.compact();
    house.api.break_watches();
    eventually("asked", || house.api.requests("GET /api/v1/namespaces/n/pods/a").len() == 1).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(house.has("ua"));
}

#[tokio::test(start_paused = true)]
async fn p01_absence_is_not_believed_while_the_confirming_read_fails() {
    let house = house();
    house.api.put("pods", pod("a", "ua"));
    house.start();
    house.watching().await;
    house.api.remove("pods", "n", "a", false);
    house.api.refuse("GET /api/v1/namespaces/n/pods/a", 5, 500, "InternalError");
    house.api.break_watches();
    eventually("asked", || house.api.requests("GET /api/v1/namespaces/n/pods/a").len() >= 3).await;
    assert!(house.has("ua"));
    eventually("a went", || !house.has("ua")).await;
}

#[tokio::test(start_paused = true)]
async fn n23_a_read_forbidden_by_the_node_authorizer_is_decided_by_a_list_of_this_node() {
    let house = house();
    house.api.put("pods", pod("a", "ua"));
    house.start();
    house.watching().await;
    house.api.remove("pods", "n", "a", false);
    house.api.refuse("GET /api/v1/namespaces/n/pods/a", 9, 403, "Forbidden");
    house.api.break_watches();
    eventually("a went", || !house.has("ua")).await;
    let asked = house.api.requests("GET /api/v1/namespaces/n/pods?");
    assert!(asked[0].contains("spec.nodeName%3Dnode%2Cmetadata.name%3Da"), "{asked:?}");
}

#[tokio::test(start_paused = true)]
async fn p01_an_etcd_restore_is_accepted_by_a_quorum_list() {
    let house = house();
    for n in 0..20 {
        house.api.put("pods", pod("a", &format!("u{n}")));
    }
    house.start();
    house.watching().await;
    house.api.restore_to(3);
    house.api.put_silently("pods", pod("b", "ub"));
    eventually("the restored state is followed", || house.has("ub")).await;
    house.watching().await;
    house.api.put("pods", pod("c", "uc"));
    eventually("and watched", || house.has("uc")).await;
}

#[tokio::test(start_paused = true)]
async fn p01_a_pod_that_cannot_be_decoded_harms_no_other() {
    let house = house();
    let mut bad = pod("bad", "ubad");
    bad["spec"]["containers"] = json!("none");
    house.api.put("pods", bad.clone());
    house.api.put("pods", pod("a", "ua"));
    house.start();
    house.watching().await;
    assert!(house.has("ua") && !house.has("ubad") && house.store.complete());

    // A known pod that becomes unreadable stays as it was.
    let mut broken = pod("a", "ua");
    broken["spec"]["containers"] = json!("none");
    house.api.put("pods", broken);
    house.api.put("pods", pod("b", "ub"));
    eventually("b came", || house.has("ub")).await;
    house.api.compact();
    house.api.break_watches();
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(house.has("ua"));
}

#[tokio::test(start_paused = true)]
async fn p01_mirror_pods_never_enter() {
    let house = house();
    let mut mirror = pod("etcd-node", "um");
    mirror["metadata"]["annotations"] = json!({"kubernetes.io/config.mirror": "hash"});
    house.api.put("pods", mirror);
    house.start();
    house.watching().await;
    assert!(house.store.complete() && house.store.list().is_empty());
}
