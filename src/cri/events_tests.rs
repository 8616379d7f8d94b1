use std::collections::BTreeMap;

use prometheus::Registry;

use super::*;
use crate::cri::{
    ContainerState,
    fake::{Events, FakeRuntime},
    fixtures::{container, pod, running, runtime},
    store::tests::{Woken, store},
};

struct Followed {
    fake: FakeRuntime,
    store: Arc<RuntimeStore>,
    woken: Arc<Woken>,
    metrics: Arc<CriMetrics>,
    cancel: CancellationToken,
}

/// Begins to follow `fake`, and lets the start settle for `settle` seconds.
async fn following(fake: FakeRuntime, settle: u64) -> Followed {
    let (store, woken) = store(&fake);
    let metrics = Arc::new(CriMetrics::new(&Registry::new()).unwrap());
    let cancel = CancellationToken::new();
    tokio::spawn(follow(
        Arc::new(fake.clone()),
        store.clone(),
        FollowSettings::default(),
        metrics.clone(),
        cancel.clone(),
    ));
    tokio::time::sleep(Duration::from_secs(settle)).await;
    woken.take();
    Followed { fake, store, woken, metrics, cancel }
}

impl Followed {
    fn relists(&self) -> BTreeMap<&'static str, u64> {
        let reasons = [
            Reason::Start,
            Reason::StreamOpen,
            Reason::StreamFirstMessage,
            Reason::NoEvents,
            Reason::SafetyNet,
            Reason::Retry,
        ];
        let counted = reasons.map(|r| (r.as_str(), self.metrics.relists.with_label_values(&[r.as_str()]).get()));
        counted.into_iter().filter(|(_, n)| *n > 0).collect()
    }
}

async fn sleep_ms(ms: u64) {
    tokio::time::sleep(Duration::from_millis(ms)).await;
}

#[tokio::test(start_paused = true)]
async fn p08_an_exit_reaches_the_pod_by_event_without_a_relist() {
    let fake = runtime();
    let (_, id) = running(&fake, "a", "web").await;
    let f = following(fake, 3).await;
    // Events that had queued came with the opening: one list answers both.
    assert_eq!(f.relists(), BTreeMap::from([("start", 1), ("stream_first_message", 1)]));
    f.fake.clear_calls();
    f.fake.exit(&id, 9);
    sleep_ms(1).await;
    assert_eq!(f.woken.take(), ["a".into()]);
    let seen = f.store.pod(&"a".into()).unwrap();
    assert_eq!((seen.latest("web").unwrap().state, seen.latest("web").unwrap().exit_code), (ContainerState::Exited, 9));
    assert!(f.fake.calls().is_empty(), "{:?}", f.fake.calls());
    f.cancel.cancel();
}

#[tokio::test(start_paused = true)]
async fn a_silent_stream_counts_as_open_after_a_second() {
    let f = following(runtime(), 2).await;
    assert_eq!(f.relists(), BTreeMap::from([("start", 1), ("stream_open", 1)]));
    assert_eq!(f.metrics.streams_opened.get(), 1);
    running(&f.fake, "a", "web").await;
    sleep_ms(1).await;
    assert_eq!(f.store.pod(&"a".into()).unwrap().latest("web").unwrap().state, ContainerState::Running);
    assert_eq!(f.relists()["stream_first_message"], 1);
}

#[tokio::test(start_paused = true)]
async fn p08_without_a_stream_everything_is_listed_each_second_while_pods_exist() {
    let fake = runtime();
    fake.events(Events::Unimplemented);
    let (sandbox, id) = running(&fake, "a", "web").await;
    let f = following(fake, 2).await;
    sleep_ms(100).await;
    f.fake.exit(&id, 1);
    sleep_ms(1000).await;
    assert_eq!(f.woken.take(), ["a".into()]);
    f.fake.remove_pod_sandbox(&sandbox).await.unwrap();
    sleep_ms(2000).await;
    f.fake.clear_calls();
    sleep_ms(30_000).await;
    assert_eq!(f.fake.count("ListContainers"), 0, "no pods, nothing to poll for");
    // The agent's own new pod: its refresh brings the polling back.
    running(&f.fake, "b", "web").await;
    f.store.refresh(&"b".into()).await.unwrap();
    f.fake.clear_calls();
    sleep_ms(5500).await;
    assert_eq!(f.fake.count("ListContainers"), 5);
}

#[tokio::test(start_paused = true)]
async fn a_broken_stream_is_covered_by_polling_until_it_is_open_again() {
    let fake = runtime();
    running(&fake, "a", "web").await;
    let f = following(fake, 5).await;
    f.fake.set_down(true);
    sleep_ms(10_000).await;
    f.fake.set_down(false);
    f.fake.clear_calls();
    sleep_ms(60_000).await;
    let relists = f.relists();
    assert_eq!(relists["stream_open"], 1, "the reopened stream had no message: {relists:?}");
    assert!(relists["retry"] >= 9, "{relists:?}");
    assert!(f.store.pleg_health(f.store.clock().now().mono).is_ok());
}

#[tokio::test(start_paused = true)]
async fn lost_events_are_found_by_the_safety_net_which_then_hurries() {
    let fake = runtime();
    let (_, id) = running(&fake, "a", "web").await;
    let f = following(fake, 3).await;
    f.fake.events(Events::Lost);
    sleep_ms(61_000).await;
    assert_eq!(f.relists().get("safety_net"), Some(&1));
    f.fake.exit(&id, 1);
    // The interval has doubled to two minutes.
    sleep_ms(100_000).await;
    assert!(f.woken.take().is_empty());
    sleep_ms(25_000).await;
    assert_eq!(f.woken.take(), ["a".into()]);
    assert_eq!(f.metrics.relist_surprises.get(), 1);
    // Back to one minute; then 2, 4, 5, 5 … minutes.
    let before = f.relists()["safety_net"];
    sleep_ms(61_000).await;
    assert_eq!(f.relists()["safety_net"], before + 1);
    sleep_ms(3_600_000).await;
    assert!((10..=14).contains(&(f.relists()["safety_net"] - before)), "{:?}", f.relists());
}

#[tokio::test(start_paused = true)]
async fn stale_events_that_queued_while_nobody_listened_make_no_ghosts() {
    let fake = runtime();
    let (sandbox, _) = running(&fake, "a", "web").await;
    fake.remove_pod_sandbox(&sandbox).await.unwrap();
    sleep_ms(1000).await;
    fake.latency("GetContainerEvents", Duration::from_millis(500));
    let f = following(fake, 10).await;
    assert!(f.store.uids().is_empty());
    assert!(f.store.pod(&"a".into()).unwrap().is_empty());
}

#[tokio::test(start_paused = true)]
async fn events_lost_doubled_or_late_never_leave_a_wrong_end() {
    for events in [Events::Delivered, Events::Duplicated, Events::Delayed(Duration::from_secs(7)), Events::Lost] {
        let fake = runtime();
        let f = following(fake, 2).await;
        f.fake.events(events);
        let (sandbox, id) = running(&f.fake, "a", "web").await;
        f.store.refresh(&"a".into()).await.unwrap();
        f.fake.exit(&id, 4);
        let second = f.fake.create_container(&sandbox, container("a", "web", 1), pod("a", 0)).await.unwrap();
        f.fake.start_container(&second).await.unwrap();
        f.fake.remove_container(&id).await.unwrap();
        sleep_ms(130_000).await;
        let seen = f.store.pod(&"a".into()).unwrap();
        let containers: Vec<_> = seen.containers.iter().map(|c| (c.id.clone(), c.state)).collect();
        assert_eq!(containers, [(second, ContainerState::Running)], "{events:?}");
        f.cancel.cancel();
    }
}
