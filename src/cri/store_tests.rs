use std::sync::Arc;

use tonic::Code;

use super::*;
use crate::cri::{
    fake::{FakeRuntime, Fault},
    fixtures::{container, pod, running, runtime},
};

/// Remembers who was woken.
#[derive(Default)]
pub(in crate::cri) struct Woken(Mutex<Vec<PodUid>>);

impl WakeSink for Woken {
    fn wake(&self, uid: &PodUid, cause: Cause) {
        assert_eq!(cause, Cause::Runtime);
        lock(&self.0).push(uid.clone());
    }
    fn wake_all(&self, _: Cause) {}
}

impl Woken {
    pub(in crate::cri) fn take(&self) -> Vec<PodUid> {
        std::mem::take(&mut lock(&self.0))
    }
}

pub(in crate::cri) fn store(fake: &FakeRuntime) -> (Arc<RuntimeStore>, Arc<Woken>) {
    let woken = Arc::new(Woken::default());
    let store = RuntimeStore::with_clock(Arc::new(fake.clone()), woken.clone(), fake.shared_clock());
    (Arc::new(store), woken)
}

fn uid(uid: &str) -> PodUid {
    PodUid::from(uid)
}

#[tokio::test(start_paused = true)]
async fn p08_absence_means_nothing_before_the_first_full_list() {
    let fake = runtime();
    running(&fake, "a", "web").await;
    let (store, woken) = store(&fake);
    assert!(store.pod(&uid("a")).is_none() && store.pod(&uid("b")).is_none() && !store.complete());
    assert_eq!(store.pleg_health(store.clock().now().mono), Err(PlegError::NeverSeen));
    let found = store.relist().await.unwrap();
    assert_eq!(found, Relisted { surprises: 1, unread: vec![] });
    assert_eq!(woken.take(), [uid("a")]);
    assert_eq!(store.uids(), [uid("a")]);
    let a = store.pod(&uid("a")).unwrap();
    assert_eq!(a.latest("web").unwrap().state, ContainerState::Running);
    assert_eq!(a.latest_sandbox().unwrap().ips.len(), 1);
    let b = store.pod(&uid("b")).unwrap();
    assert!(b.is_empty() && b.as_of == a.as_of);
}

#[tokio::test(start_paused = true)]
async fn p08_a_relist_asks_for_details_only_of_what_changed() {
    let fake = runtime();
    let (sandbox, id) = running(&fake, "a", "web").await;
    running(&fake, "b", "web").await;
    let (store, woken) = store(&fake);
    store.relist().await.unwrap();
    fake.clear_calls();
    woken.take();
    assert_eq!(store.relist().await.unwrap().surprises, 0);
    assert_eq!((fake.count("ContainerStatus"), fake.count("PodSandboxStatus")), (0, 0));
    fake.exit(&id, 3);
    assert_eq!(store.relist().await.unwrap().surprises, 1);
    assert_eq!((fake.count("ContainerStatus"), fake.count("PodSandboxStatus")), (1, 0));
    assert_eq!(store.pod(&uid("a")).unwrap().latest("web").unwrap().exit_code, 3);
    fake.stop_pod_sandbox(&sandbox).await.unwrap();
    fake.remove_pod_sandbox(&sandbox).await.unwrap();
    woken.take();
    assert_eq!(store.relist().await.unwrap().surprises, 1);
    assert_eq!(woken.take(), [uid("a")]);
    assert!(store.pod(&uid("a")).unwrap().is_empty());
    assert_eq!(store.uids(), [uid("b")]);
}

#[tokio::test(start_paused = true)]
async fn a_refresh_carries_a_seq_drawn_before_it_was_sent() {
    let fake = runtime();
    let (_, id) = running(&fake, "a", "web").await;
    let (store, woken) = store(&fake);
    let before = store.draw();
    let seen = store.refresh(&uid("a")).await.unwrap();
    assert!(seen.as_of > before && seen.as_of < store.draw());
    assert_eq!(woken.take(), [uid("a")]);
    // Nothing changed: newer as_of, nobody woken.
    let again = store.refresh(&uid("a")).await.unwrap();
    assert!(again.as_of > seen.as_of && woken.take().is_empty());
    // What has ended is not asked for again.
    fake.exit(&id, 0);
    store.refresh(&uid("a")).await.unwrap();
    fake.clear_calls();
    store.refresh(&uid("a")).await.unwrap();
    assert_eq!((fake.count("ContainerStatus"), fake.count("PodSandboxStatus")), (0, 1));
}

#[tokio::test(start_paused = true)]
async fn refreshes_share_a_read_only_if_it_began_after_they_asked() {
    let fake = runtime();
    running(&fake, "a", "web").await;
    let (store, _) = store(&fake);
    fake.latency("ListPodSandbox", Duration::from_secs(1));
    let spawn = || {
        let store = store.clone();
        tokio::spawn(async move { store.refresh(&uid("a")).await.unwrap().as_of })
    };
    let first = spawn();
    tokio::time::sleep(Duration::from_millis(500)).await;
    let late: Vec<_> = (0..5).map(|_| spawn()).collect();
    let first = first.await.unwrap();
    for late in late {
        assert!(late.await.unwrap() > first);
    }
    assert_eq!(fake.count("ListPodSandbox"), 2, "one read for the first, one shared by the five");
}

#[tokio::test(start_paused = true)]
async fn a_failed_read_fails_all_that_waited_for_it_and_keeps_the_entry() {
    let fake = runtime();
    running(&fake, "a", "web").await;
    let (store, _) = store(&fake);
    fake.latency("ListPodSandbox", Duration::from_secs(1));
    let spawn = || {
        let store = store.clone();
        tokio::spawn(async move { store.refresh(&uid("a")).await })
    };
    let first = spawn();
    tokio::time::sleep(Duration::from_millis(500)).await;
    let late = [spawn(), spawn()];
    let held = first.await.unwrap().unwrap();
    fake.inject("ContainerStatus", 1, Fault::Error { code: Code::Unavailable, message: "down".into() });
    for late in late {
        assert_eq!(late.await.unwrap().unwrap_err().message, "down");
    }
    assert_eq!(fake.count("ListPodSandbox"), 2);
    assert_eq!(store.pod(&uid("a")).unwrap(), held);
}

#[tokio::test(start_paused = true)]
async fn a_pod_whose_details_cannot_be_read_is_not_known_rather_than_absent() {
    let fake = runtime();
    running(&fake, "a", "web").await;
    running(&fake, "b", "web").await;
    let (store, _) = store(&fake);
    fake.inject_for("ContainerStatus", "a", 1, Fault::error("busy"));
    assert_eq!(store.relist().await.unwrap(), Relisted { surprises: 1, unread: vec![uid("a")] });
    assert!(store.complete() && store.pod(&uid("a")).is_none() && store.pod(&uid("b")).is_some());
    assert!(store.uids().contains(&uid("a")));
    store.relist().await.unwrap();
    assert!(store.pod(&uid("a")).is_some());
}

#[tokio::test(start_paused = true)]
async fn a_container_that_vanishes_between_list_and_status_is_left_out() {
    let fake = runtime();
    running(&fake, "a", "web").await;
    let (store, _) = store(&fake);
    fake.inject("ContainerStatus", 1, Fault::Error { code: Code::NotFound, message: "gone".into() });
    let seen = store.refresh(&uid("a")).await.unwrap();
    assert_eq!((seen.sandboxes.len(), seen.containers.len()), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn forget_drops_only_what_is_empty() {
    let fake = runtime();
    let (sandbox, _) = running(&fake, "a", "web").await;
    let (store, _) = store(&fake);
    store.relist().await.unwrap();
    store.forget(&uid("a"));
    assert!(!store.pod(&uid("a")).unwrap().is_empty());
    fake.remove_pod_sandbox(&sandbox).await.unwrap();
    let empty = store.refresh(&uid("a")).await.unwrap();
    assert!(empty.is_empty());
    assert_eq!(store.pod(&uid("a")).unwrap().as_of, empty.as_of);
    store.forget(&uid("a"));
    assert!(lock(&store.state).pods.is_empty() && lock(&store.turns).is_empty());
}

/// A late event's read or the garbage collector's comes when nobody is left to say that the pod can be forgotten.
#[tokio::test(start_paused = true)]
async fn a_read_of_a_pod_that_is_gone_leaves_nothing_behind() {
    let fake = runtime();
    let (store, _) = store(&fake);
    store.relist().await.unwrap();
    let (a, gone) = (uid("a"), uid("gone"));
    let (first, second) = tokio::join!(store.refresh(&a), store.refresh(&a));
    assert!(first.unwrap().is_empty() && second.unwrap().is_empty());
    fake.inject("ListContainers", 1, Fault::Error { code: Code::Unknown, message: "no".into() });
    assert!(store.refresh(&gone).await.is_err());
    assert!(lock(&store.turns).is_empty());
    store.relist().await.unwrap();
    assert_eq!(store.pods(), 0);
}

#[tokio::test(start_paused = true)]
async fn an_oom_told_before_the_container_is_known_is_kept() {
    let fake = runtime();
    let (_, id) = running(&fake, "a", "web").await;
    let (store, woken) = store(&fake);
    store.mark_oom(&id);
    store.relist().await.unwrap();
    assert!(store.pod(&uid("a")).unwrap().latest("web").unwrap().oom_killed);
    let (_, id) = running(&fake, "b", "web").await;
    store.relist().await.unwrap();
    woken.take();
    store.mark_oom(&id);
    assert_eq!(woken.take(), [uid("b")]);
}

#[tokio::test(start_paused = true)]
async fn p34_an_oom_told_before_the_event_that_makes_its_container_known_is_kept() {
    let fake = runtime();
    let (store, woken) = store(&fake);
    store.relist().await.unwrap();
    let (sandbox, id) = running(&fake, "a", "web").await;
    store.mark_oom(&id);
    woken.take();
    let status = fake.container_status(&id).await.unwrap();
    let sandbox = fake.pod_sandbox_status(&sandbox).await.unwrap();
    let event = v1::ContainerEventResponse {
        container_id: id,
        container_event_type: v1::ContainerEventType::ContainerStartedEvent.into(),
        created_at: i64::MAX,
        pod_sandbox_status: Some(sandbox),
        containers_statuses: vec![status],
    };
    assert_eq!(store.apply_event(event), None);
    assert!(store.pod(&uid("a")).unwrap().latest("web").unwrap().oom_killed);
    assert_eq!(woken.take(), [uid("a")]);
}

#[tokio::test(start_paused = true)]
async fn p34_a_reason_that_comes_late_is_asked_for_again_for_ten_seconds() {
    let fake = runtime();
    let ids = [running(&fake, "a", "web").await.1, running(&fake, "b", "web").await.1];
    let (store, _) = store(&fake);
    for id in &ids {
        fake.exit(id, 137);
    }
    store.relist().await.unwrap();
    let reason = |pod: &str| store.pod(&uid(pod)).unwrap().latest("web").unwrap().reason.clone();
    assert_eq!(reason("a"), "Error");
    fake.tell_oom_late(&ids[0]);
    store.refresh(&uid("a")).await.unwrap();
    assert_eq!(reason("a"), "OOMKilled");
    let asked = fake.count("ContainerStatus");
    store.refresh(&uid("a")).await.unwrap();
    assert_eq!(fake.count("ContainerStatus"), asked, "what is known is not asked for again");
    tokio::time::advance(Duration::from_secs(11)).await;
    store.relist().await.unwrap();
    assert_eq!(fake.count("ContainerStatus"), asked, "nor what has settled");
    assert_eq!(reason("b"), "Error");
}

#[tokio::test(start_paused = true)]
async fn n17_pleg_is_unhealthy_after_three_silent_minutes() {
    let fake = runtime();
    let (store, _) = store(&fake);
    store.relist().await.unwrap();
    tokio::time::sleep(Duration::from_secs(180)).await;
    assert!(store.pleg_health(store.clock().now().mono).is_ok());
    tokio::time::sleep(Duration::from_millis(2500)).await;
    let error = store.pleg_health(store.clock().now().mono).unwrap_err();
    assert_eq!(error.to_string(), "pleg was last seen active 3m2.5s ago; threshold is 3m0s");
    store.set_with_events(true);
    assert!(store.pleg_health(store.clock().now().mono).is_ok());
    assert_eq!(go_duration(Duration::from_secs(3723)), "1h2m3s");
}

/// Heap and inline bytes of what is held for one container or sandbox, roughly.
fn bytes_of_map(map: &HashMap<String, String>) -> usize {
    map.capacity() * 8 / 7 * (48 + 1) + map.iter().map(|(k, v)| k.capacity() + v.capacity()).sum::<usize>()
}

#[tokio::test(start_paused = true)]
async fn a_usual_pod_fits_its_budget_of_6_kib() {
    let fake = runtime();
    fake.image("img", crate::cri::fake::ImageScript::Present);
    let mut sandbox = pod("8b2c9f0e-1111-2222-3333-444455556666", 0);
    for n in 0..20 {
        sandbox.labels.insert(format!("example.com/label-{n}"), "some value of a pod's own label".into());
    }
    let id = fake.run_pod_sandbox(sandbox.clone(), "").await.unwrap();
    let mut config = container("8b2c9f0e-1111-2222-3333-444455556666", "web", 0);
    for key in ["hash", "restartCount", "terminationMessagePath", "terminationMessagePolicy", "ports"] {
        config.annotations.insert(format!("io.kubernetes.container.{key}"), "/dev/termination-log".into());
    }
    for path in ["/etc/hosts", "/dev/termination-log", "/var/run/secrets/kubernetes.io/serviceaccount", "/data"] {
        let host_path = format!("/var/lib/kubelet/pods/8b2c9f0e-1111-2222-3333-444455556666/volumes{path}");
        config.mounts.push(v1::Mount { container_path: path.into(), host_path, ..Default::default() });
    }
    let made = fake.create_container(&id, config, sandbox).await.unwrap();
    fake.start_container(&made).await.unwrap();
    let (store, _) = store(&fake);
    store.relist().await.unwrap();
    let held = store.pod(&uid("8b2c9f0e-1111-2222-3333-444455556666")).unwrap();
    let (s, c) = (&held.sandboxes[0], &held.containers[0]);
    assert_eq!(s.labels.len(), 1, "the pod's own labels are not kept twice");
    let mounts: usize =
        c.mounts.iter().map(|m| size_of::<v1::Mount>() + m.container_path.capacity() + m.host_path.capacity()).sum();
    let maps =
        bytes_of_map(&s.labels) + bytes_of_map(&s.annotations) + bytes_of_map(&c.labels) + bytes_of_map(&c.annotations);
    let strings = 600;
    let total = size_of::<Sandbox>() + size_of::<Container>() + mounts + maps + strings;
    assert!(total < 6 << 10, "{total} bytes, mounts {mounts}, maps {maps}");
}
