//! The shell over scripted probes in paused time.

use std::{collections::VecDeque, time::Duration};

use async_trait::async_trait;
use jiff::Timestamp;
use tokio::time::{Instant, sleep};

use super::{super::*, *};
use crate::{
    events::MemoryEvents,
    pods::PodSource,
    probes::prober::{Outcome, ProbeError},
    time::SimulatedClock,
};

type Scripted = Result<Outcome, ProbeError>;

/// Results by kind of handler: a probe names its script in `exec.command[0]`. An exhausted script repeats its last result.
#[derive(Default)]
struct Script {
    results: HashMap<String, VecDeque<Scripted>>,
    runs: Vec<(String, Instant, String)>,
    takes: Duration,
}

#[derive(Clone, Default)]
struct Scripts(Arc<Mutex<Script>>);

impl Scripts {
    fn set(&self, name: &str, results: impl IntoIterator<Item = Scripted>) {
        self.0.lock().unwrap().results.insert(name.into(), results.into_iter().collect());
    }
    /// Milliseconds since `start` at which that probe ran.
    fn millis(&self, name: &str, start: Instant) -> Vec<u128> {
        let script = self.0.lock().unwrap();
        script.runs.iter().filter(|(n, ..)| n == name).map(|(_, at, _)| (*at - start).as_millis()).collect()
    }
    /// Seconds since `start` at which that probe ran.
    fn runs(&self, name: &str, start: Instant) -> Vec<u64> {
        let script = self.0.lock().unwrap();
        script.runs.iter().filter(|(n, ..)| n == name).map(|(_, at, _)| (*at - start).as_secs()).collect()
    }
}

#[async_trait]
impl Attempt for Scripts {
    async fn attempt(&self, _: &corev1::Container, target: &ProbeTarget, probe: &corev1::Probe) -> Scripted {
        let name = match (&probe.exec, &probe.http_get) {
            (Some(exec), _) => exec.command.as_ref().unwrap()[0].clone(),
            (None, get) => get.as_ref().unwrap().path.clone().unwrap(),
        };
        let takes = {
            let mut script = self.0.lock().unwrap();
            script.runs.push((name.clone(), Instant::now(), target.container_id.clone()));
            script.takes
        };
        if !takes.is_zero() {
            sleep(takes).await;
        }
        let mut script = self.0.lock().unwrap();
        let queue = script.results.entry(name).or_default();
        if queue.len() > 1 {
            queue.pop_front().unwrap()
        } else {
            queue.front().cloned().unwrap_or(Ok(Outcome::Success))
        }
    }
}

#[derive(Default)]
struct Wakes(Mutex<Vec<(Instant, Cause)>>);

impl Wakes {
    fn count(&self) -> usize {
        self.0.lock().unwrap().len()
    }
}

impl WakeSink for Wakes {
    fn wake(&self, _: &PodUid, cause: Cause) {
        self.0.lock().unwrap().push((Instant::now(), cause));
    }
    fn wake_all(&self, _: Cause) {}
}

struct House {
    probes: NodeProbes,
    scripts: Scripts,
    wakes: Arc<Wakes>,
    events: Arc<MemoryEvents>,
    start: Instant,
    epoch: Timestamp,
}

impl House {
    fn new() -> Self {
        Self::with(ProbeSettings { seed: 1, eager_first_readiness: true })
    }
    fn with(settings: ProbeSettings) -> Self {
        let epoch = Timestamp::from_second(1_800_000_000).unwrap();
        let (scripts, wakes, events) =
            (Scripts::default(), Arc::new(Wakes::default()), Arc::new(MemoryEvents::default()));
        let clock = Arc::new(SimulatedClock::starting_at(epoch));
        let probes =
            NodeProbes::with_prober(Box::new(scripts.clone()), events.clone(), wakes.clone(), clock, settings).unwrap();
        Self { probes, scripts, wakes, events, start: Instant::now(), epoch }
    }
    fn verdicts(&self, pod: &Pod) -> ContainerVerdicts {
        self.probes.verdicts(pod.uid())["c"].clone()
    }
    fn target(&self) -> ProbeTarget {
        ProbeTarget {
            container: "c".into(),
            container_id: "id-1".into(),
            started_at: self.epoch,
            host: None,
            adopted: false,
            was_ready: false,
            was_started: false,
            terminating: false,
        }
    }
}

fn probe(script: &str, initial_delay: i32, period: i32, failure: i32) -> corev1::Probe {
    corev1::Probe {
        exec: Some(corev1::ExecAction { command: Some(vec![script.into()]) }),
        initial_delay_seconds: Some(initial_delay),
        period_seconds: Some(period),
        failure_threshold: Some(failure),
        termination_grace_period_seconds: (script != "ready").then_some(5),
        ..Default::default()
    }
}

/// The same by httpGet.
fn http(script: &str, period: i32, failure: i32) -> corev1::Probe {
    let get = corev1::HTTPGetAction { path: Some(script.into()), ..Default::default() };
    corev1::Probe { exec: None, http_get: Some(get), ..probe(script, 0, period, failure) }
}

fn pod(change: impl FnOnce(&mut corev1::Container)) -> Pod {
    let mut container = corev1::Container { name: "c".into(), ..Default::default() };
    change(&mut container);
    let mut object = corev1::Pod::default();
    object.metadata.uid = Some("uid-1".into());
    object.metadata.name = Some("p".into());
    object.metadata.namespace = Some("ns".into());
    object.spec = Some(corev1::PodSpec { containers: vec![container], ..Default::default() });
    Pod::new(object, PodSource::Api, Timestamp::UNIX_EPOCH).unwrap()
}

fn failing() -> Scripted {
    Ok(Outcome::Failure("boom".into()))
}

async fn at(house: &House, seconds: f64) {
    tokio::time::sleep_until(house.start + Duration::from_secs_f64(seconds)).await;
}

#[tokio::test(start_paused = true)]
async fn b01_first_readiness_probe_runs_at_started_at_plus_initial_delay() {
    let house = House::new();
    let pod = pod(|c| c.readiness_probe = Some(probe("ready", 5, 10, 3)));
    house.probes.track(&pod, &[house.target()]);
    assert_eq!(house.verdicts(&pod).readiness, Readiness::NotReady);
    at(&house, 4.9).await;
    assert_eq!((house.wakes.count(), house.scripts.runs("ready", house.start)), (0, vec![]));
    at(&house, 5.1).await;
    assert_eq!(house.verdicts(&pod).readiness, Readiness::Ready);
    assert_eq!(house.wakes.count(), 1);
    at(&house, 36.0).await;
    assert_eq!(house.scripts.runs("ready", house.start), [5, 15, 25, 35]);
    assert_eq!(house.wakes.count(), 1, "an unchanged verdict wakes nobody");
}

#[tokio::test(start_paused = true)]
async fn b02_liveness_failure_holds_until_a_new_container_id() {
    let house = House::new();
    let pod = pod(|c| c.liveness_probe = Some(probe("live", 0, 10, 3)));
    house.scripts.set("live", [failing()]);
    house.probes.track(&pod, &[house.target()]);
    at(&house, 19.0).await;
    assert_eq!(house.verdicts(&pod).liveness, Liveness::Alive);
    at(&house, 100.0).await;
    assert_eq!(house.verdicts(&pod).liveness, Liveness::Dead { grace_seconds: Some(5) });
    assert_eq!(house.scripts.runs("live", house.start), [0, 10, 20], "on hold after the threshold");
    assert_eq!(house.wakes.count(), 1);
    assert!(house.events.has("Unhealthy", "Liveness probe failed: boom"));
    let next = ProbeTarget { container_id: "id-2".into(), ..house.target() };
    house.probes.track(&pod, &[next]);
    assert_eq!(house.verdicts(&pod).liveness, Liveness::Alive);
    at(&house, 101.0).await;
    assert_eq!(house.scripts.runs("live", house.start).last(), Some(&100));
}

#[tokio::test(start_paused = true)]
async fn b02_startup_suspends_the_others_and_releases_them_at_once() {
    let house = House::new();
    let pod = pod(|c| {
        c.startup_probe = Some(probe("start", 0, 4, 30));
        c.readiness_probe = Some(probe("ready", 0, 60, 3));
        c.liveness_probe = Some(probe("live", 0, 60, 3));
    });
    house.scripts.set("start", [failing(), failing(), Ok(Outcome::Success)]);
    house.probes.track(&pod, &[house.target()]);
    at(&house, 7.9).await;
    assert_eq!(house.verdicts(&pod).startup, Startup::Pending);
    assert_eq!(house.scripts.runs("ready", house.start), Vec::<u64>::new());
    at(&house, 8.1).await;
    let verdicts = house.verdicts(&pod);
    assert_eq!((verdicts.startup, verdicts.readiness), (Startup::Started, Readiness::Ready));
    assert_eq!(house.scripts.runs("live", house.start), [8]);
    at(&house, 40.0).await;
    assert_eq!(house.scripts.runs("start", house.start), [0, 4, 8], "a passed startup probe runs no more");
}

#[tokio::test(start_paused = true)]
async fn b09_startup_failure_is_final_for_the_container() {
    let house = House::new();
    let pod = pod(|c| {
        c.startup_probe = Some(probe("start", 0, 2, 2));
        c.liveness_probe = Some(probe("live", 0, 2, 1));
    });
    house.scripts.set("start", [failing()]);
    house.probes.track(&pod, &[house.target()]);
    at(&house, 30.0).await;
    assert_eq!(house.verdicts(&pod).startup, Startup::Failed { grace_seconds: Some(5) });
    assert_eq!(house.scripts.runs("start", house.start), [0, 2]);
    assert_eq!(house.scripts.runs("live", house.start), Vec::<u64>::new());
}

#[tokio::test(start_paused = true)]
async fn b10_adopted_container_stays_ready_and_is_probed_within_a_period() {
    let house = House::new();
    let pod = pod(|c| {
        c.readiness_probe = Some(probe("ready", 0, 10, 1));
        c.startup_probe = Some(probe("start", 0, 10, 1));
    });
    house.scripts.set("ready", [failing()]);
    let target = ProbeTarget { adopted: true, was_ready: true, was_started: true, ..house.target() };
    house.probes.track(&pod, &[target]);
    assert_eq!(house.verdicts(&pod).readiness, Readiness::Ready);
    sleep(Duration::from_millis(1)).await;
    assert_eq!(house.scripts.runs("ready", house.start), Vec::<u64>::new(), "not at once");
    at(&house, 10.1).await;
    assert_eq!(house.scripts.runs("ready", house.start).len(), 1);
    assert_eq!(house.verdicts(&pod).readiness, Readiness::NotReady, "a real failure counts");
    assert_eq!(house.scripts.runs("start", house.start), Vec::<u64>::new(), "it had started");
}

#[tokio::test(start_paused = true)]
async fn b02_termination_stops_liveness_and_startup_but_not_readiness() {
    let house = House::new();
    let pod = pod(|c| {
        c.liveness_probe = Some(probe("live", 0, 10, 1));
        c.readiness_probe = Some(probe("ready", 0, 10, 1));
    });
    house.scripts.set("live", [Ok(Outcome::Success), failing()]);
    house.scripts.set("ready", [Ok(Outcome::Success), failing()]);
    house.probes.track(&pod, &[house.target()]);
    at(&house, 5.0).await;
    house.probes.track(&pod, &[ProbeTarget { terminating: true, ..house.target() }]);
    at(&house, 25.0).await;
    let verdicts = house.verdicts(&pod);
    assert_eq!((verdicts.liveness, verdicts.readiness), (Liveness::Alive, Readiness::NotReady));
    assert_eq!(house.scripts.runs("live", house.start), [0]);
}

#[tokio::test(start_paused = true)]
async fn b01_unready_container_is_probed_again_when_its_worker_looks() {
    let house = House::new();
    let pod = pod(|c| c.readiness_probe = Some(probe("ready", 0, 30, 3)));
    house.scripts.set("ready", [failing(), Ok(Outcome::Success)]);
    house.probes.track(&pod, &[house.target()]);
    at(&house, 4.0).await;
    assert_eq!(house.verdicts(&pod).readiness, Readiness::NotReady);
    house.probes.track(&pod, &[house.target()]);
    house.probes.track(&pod, &[house.target()]);
    at(&house, 4.5).await;
    assert_eq!(house.verdicts(&pod).readiness, Readiness::Ready);
    house.probes.track(&pod, &[house.target()]);
    at(&house, 35.0).await;
    assert_eq!(
        house.scripts.runs("ready", house.start),
        [0, 4, 34],
        "the period counts from the run that was asked for"
    );
}

#[tokio::test(start_paused = true)]
async fn b01_a_late_run_delays_no_other() {
    let house = House::new();
    let pod = pod(|c| c.liveness_probe = Some(probe("live", 0, 1, 3)));
    house.scripts.0.lock().unwrap().takes = Duration::from_millis(2300);
    house.probes.track(&pod, &[house.target()]);
    at(&house, 1.0).await;
    house.scripts.0.lock().unwrap().takes = Duration::from_millis(10);
    at(&house, 5.5).await;
    let runs = house.scripts.millis("live", house.start);
    assert_eq!(runs, [0, 2300, 3000, 4000, 5000], "one run for the ticks that passed, then each at its tick");
}

#[tokio::test(start_paused = true)]
async fn b08_errors_are_tried_three_times_and_count_for_nothing() {
    let house = House::new();
    let pod = pod(|c| c.liveness_probe = Some(probe("live", 0, 10, 1)));
    house.scripts.set("live", [Err(ProbeError::unknown("rpc error: code = Unknown desc = x"))]);
    house.probes.track(&pod, &[house.target()]);
    at(&house, 5.0).await;
    assert_eq!(house.scripts.runs("live", house.start), [0, 0, 0]);
    assert_eq!(house.verdicts(&pod).liveness, Liveness::Alive);
    let text = "Liveness probe errored and resulted in unknown state: rpc error: code = Unknown desc = x";
    assert!(house.events.has("Unhealthy", text));
    assert_eq!(house.events.all().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn b07_warning_passes_with_an_event() {
    let house = House::new();
    let pod = pod(|c| c.readiness_probe = Some(probe("ready", 0, 10, 1)));
    house.scripts.set("ready", [Ok(Outcome::Warning("Probe terminated redirects, Response body: x".into()))]);
    house.probes.track(&pod, &[house.target()]);
    at(&house, 1.0).await;
    assert_eq!(house.verdicts(&pod).readiness, Readiness::Ready);
    assert!(house.events.has("ProbeWarning", "Readiness probe warning: Probe terminated redirects, Response body: x"));
}

#[tokio::test(start_paused = true)]
async fn b11_metrics_count_results_and_go_with_the_pod() {
    let house = House::new();
    let pod = pod(|c| c.readiness_probe = Some(probe("ready", 0, 10, 1)));
    house.scripts.set("ready", [failing(), Ok(Outcome::Success)]);
    house.probes.track(&pod, &[house.target()]);
    at(&house, 15.0).await;
    let text = house.probes.metrics_text();
    let series = |result: &str| {
        format!(
            "prober_probe_total{{container=\"c\",namespace=\"ns\",pod=\"p\",pod_uid=\"uid-1\",probe_type=\"Readiness\",result=\"{result}\"}} 1"
        )
    };
    assert!(text.contains(&series("failed")) && text.contains(&series("successful")), "{text}");
    assert!(text.contains(
        "prober_probe_duration_seconds_count{container=\"c\",namespace=\"ns\",pod=\"p\",probe_type=\"Readiness\"} 1"
    ));
    house.probes.forget(pod.uid());
    assert!(!house.probes.metrics_text().contains("pod=\"p\""));
    at(&house, 100.0).await;
    assert_eq!(house.scripts.runs("ready", house.start).len(), 2, "a forgotten pod is not probed");
}

#[tokio::test(start_paused = true)]
async fn container_without_probes_lets_through_and_a_gone_one_has_no_verdict() {
    let house = House::new();
    let pod = pod(|_| {});
    house.probes.track(&pod, &[house.target()]);
    let verdicts = house.verdicts(&pod);
    assert_eq!((verdicts.readiness, verdicts.startup), (Readiness::Ready, Startup::Started));
    house.probes.track(&pod, &[]);
    assert!(house.probes.verdicts(pod.uid()).is_empty());
}

#[tokio::test(start_paused = true)]
async fn eager_readiness_is_found_soon_and_the_failed_tries_leave_no_trace() {
    let house = House::new();
    let pod = pod(|c| c.readiness_probe = Some(http("ready", 10, 2)));
    house.scripts.set("ready", [failing(), failing(), failing(), failing(), Ok(Outcome::Success)]);
    house.probes.track(&pod, &[house.target()]);
    at(&house, 0.7).await;
    assert_eq!(house.verdicts(&pod).readiness, Readiness::NotReady);
    at(&house, 0.8).await;
    assert_eq!(house.verdicts(&pod).readiness, Readiness::Ready);
    assert_eq!(house.wakes.count(), 1);
    assert_eq!(house.events.all().len(), 1, "only the regular run tells");
    let text = house.probes.metrics_text();
    let count = |result: &str| {
        text.lines()
            .find(|l| l.contains(&format!("result=\"{result}\"")))
            .and_then(|l| l.rsplit(' ').next().map(str::to_owned))
    };
    assert_eq!((count("failed").as_deref(), count("successful").as_deref()), (Some("1"), Some("1")));
    at(&house, 22.0).await;
    assert_eq!(
        house.scripts.millis("ready", house.start),
        [0, 50, 150, 350, 750, 10_750, 20_750],
        "from the first pass on only the period counts"
    );
}

#[tokio::test(start_paused = true)]
async fn eager_tries_that_fail_are_no_failures_of_a_startup_probe() {
    let house = House::new();
    let pod = pod(|c| c.startup_probe = Some(http("start", 2, 3)));
    house.scripts.set("start", [failing()]);
    house.probes.track(&pod, &[house.target()]);
    at(&house, 3.9).await;
    assert_eq!(house.verdicts(&pod).startup, Startup::Pending, "two regular failures so far");
    at(&house, 4.1).await;
    assert_eq!(house.verdicts(&pod).startup, Startup::Failed { grace_seconds: Some(5) });
    let runs = house.scripts.millis("start", house.start);
    assert_eq!(runs, [0, 50, 150, 350, 750, 1550, 2000, 3600, 4000]);
    assert_eq!(house.events.all().len(), 3);
}

#[tokio::test(start_paused = true)]
async fn eager_tries_give_no_credit_beyond_the_probes_own_rules() {
    let house = House::new();
    let pod = pod(|c| {
        c.readiness_probe = Some(corev1::Probe { success_threshold: Some(3), ..http("ready", 10, 1) });
    });
    house.scripts.set("ready", [failing(), Ok(Outcome::Success)]);
    house.probes.track(&pod, &[house.target()]);
    at(&house, 20.0).await;
    assert_eq!(house.verdicts(&pod).readiness, Readiness::NotReady);
    at(&house, 20.1).await;
    assert_eq!(house.verdicts(&pod).readiness, Readiness::Ready, "three passes, a period apart");
    assert_eq!(house.scripts.millis("ready", house.start), [0, 50, 10_050, 20_050]);
}

#[tokio::test(start_paused = true)]
async fn eager_tries_are_never_by_exec_nor_for_liveness_nor_when_turned_off_nor_for_what_was_ready() {
    for (name, probe, eager, adopted, runs) in [
        ("exec", probe("exec", 0, 10, 3), true, false, 2),
        ("off", http("off", 10, 3), false, false, 2),
        ("adopted", http("adopted", 10, 3), true, true, 1),
    ] {
        let house = House::with(ProbeSettings { seed: 1, eager_first_readiness: eager });
        let pod = pod(|c| c.readiness_probe = Some(probe));
        house.scripts.set(name, [failing()]);
        house.probes.track(&pod, &[ProbeTarget { adopted, was_ready: adopted, ..house.target() }]);
        at(&house, 10.1).await;
        assert_eq!(house.scripts.millis(name, house.start).len(), runs, "{name}");
    }
    let house = House::new();
    let pod = pod(|c| c.liveness_probe = Some(http("live", 10, 3)));
    house.scripts.set("live", [failing()]);
    house.probes.track(&pod, &[house.target()]);
    at(&house, 9.0).await;
    assert_eq!(house.scripts.millis("live", house.start), [0]);
}

#[tokio::test(start_paused = true)]
async fn eager_tries_wait_as_long_as_the_last_one_took_and_never_overlap() {
    let house = House::new();
    let pod = pod(|c| c.readiness_probe = Some(http("ready", 4, 3)));
    house.scripts.set("ready", [failing()]);
    house.scripts.0.lock().unwrap().takes = Duration::from_millis(600);
    house.probes.track(&pod, &[house.target()]);
    at(&house, 3.9).await;
    assert_eq!(house.scripts.millis("ready", house.start), [0, 1200, 2400, 3600]);
    at(&house, 4.3).await;
    assert_eq!(house.scripts.millis("ready", house.start).last(), Some(&4200), "the regular run waits for the try");
}
