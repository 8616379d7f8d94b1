//! What the container runtime says about itself: ready or not, network ready or not, handlers, features (contract S-12, N-12, N-17).
//!
//! In: CRI `Version`, `Status`, `RuntimeConfig`. Out: a [`RuntimeState`] in a watch channel. [`RuntimeState`] is pure; [`monitor`] asks every
//! 5 s, every 200 ms while something is not ready (pods shall start within 2 s of a CNI configuration, and CRI has no event for it), and
//! at once when poked.

use std::{sync::Arc, time::Duration};

use protocols::cri::v1;
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use crate::{
    config::CgroupDriver,
    cri::{CriError, RuntimeService},
    time::Clock,
};

const POLL: Duration = Duration::from_secs(5);
const POLL_NOT_READY: Duration = Duration::from_millis(200);
const STATUS_DEADLINE: Duration = Duration::from_secs(10);
/// Without a good Status for so long the runtime counts as down.
const DOWN_AFTER: Duration = Duration::from_secs(30);
const HANDSHAKE_TRIES: u32 = 3;
const HANDSHAKE_PAUSE: Duration = Duration::from_secs(2);

/// One runtime handler and what it can do.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct RuntimeHandler {
    /// Empty for the default handler.
    pub name: String,
    pub recursive_read_only_mounts: bool,
    pub user_namespaces: bool,
}

/// Whether the runtime has been heard of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Contact {
    #[default]
    NotYet,
    Lately,
    /// No good Status for 30 s.
    Lost,
}

/// What was last learnt from the runtime.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RuntimeState {
    /// `containerd`
    pub name: String,
    /// `2.3.7`
    pub version: String,
    contact: Contact,
    /// Last Status with RuntimeReady.
    last_ready: Option<Instant>,
    runtime_error: Option<String>,
    /// `None`: the network is ready.
    network_error: Option<String>,
    /// Sorted by name.
    pub handlers: Vec<RuntimeHandler>,
    /// `None` until the runtime said so.
    pub supplemental_groups_policy: Option<bool>,
}

impl RuntimeState {
    /// Before the first Status.
    pub fn unknown() -> Self {
        Self { network_error: Some("network state unknown".to_owned()), ..Self::default() }
    }

    /// Why the runtime is not ready, in upstream's order and words; empty when it is.
    pub fn runtime_errors(&self) -> Vec<String> {
        let contact = match self.contact {
            Contact::NotYet => Some("container runtime status check may not have completed yet"),
            Contact::Lost => Some("container runtime is down"),
            Contact::Lately => None,
        };
        contact.map(str::to_owned).into_iter().chain(self.runtime_error.clone()).collect()
    }

    /// Why the pod network is not ready.
    pub fn network_error(&self) -> Option<&str> {
        self.network_error.as_deref()
    }

    /// Takes a Status into account. A status that is not runtime-ready leaves handlers and features as they were.
    pub fn take_status(&mut self, status: &v1::StatusResponse, now: Instant) {
        let conditions = status.status.as_ref().map(|s| s.conditions.as_slice()).unwrap_or_default();
        let not_ready = |type_: &str| match conditions.iter().find(|c| c.r#type == type_) {
            Some(c) if c.status => None,
            Some(c) => Some(format!("{}={} reason:{} message:{}", c.r#type, c.status, c.reason, c.message)),
            None => Some("<nil>".to_owned()),
        };
        self.network_error = not_ready("NetworkReady").map(|c| format!("container runtime network not ready: {c}"));
        self.runtime_error = not_ready("RuntimeReady").map(|c| format!("container runtime not ready: {c}"));
        if self.runtime_error.is_some() {
            return;
        }
        self.handlers = status.runtime_handlers.iter().map(handler).collect();
        self.handlers.sort();
        self.supplemental_groups_policy = status.features.as_ref().map(|f| f.supplemental_groups_policy);
        self.last_ready = Some(now);
    }

    /// Time passes: a runtime that has been silent for too long counts as down.
    pub fn take_time(&mut self, now: Instant) {
        self.contact = match self.last_ready {
            None => Contact::NotYet,
            Some(at) if now.saturating_duration_since(at) >= DOWN_AFTER => Contact::Lost,
            Some(_) => Contact::Lately,
        };
    }

    /// Equal but for when the last Status came.
    fn same_news(&self, other: &Self) -> bool {
        let plain = |state: &Self| Self { last_ready: None, ..state.clone() };
        plain(self) == plain(other)
    }
}

fn handler(handler: &v1::RuntimeHandler) -> RuntimeHandler {
    let features = handler.features.as_ref();
    RuntimeHandler {
        name: handler.name.clone(),
        recursive_read_only_mounts: features.is_some_and(|f| f.recursive_read_only_mounts),
        user_namespaces: features.is_some_and(|f| f.user_namespaces),
    }
}

/// What the first contact with the runtime settles.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Handshake {
    pub runtime_name: String,
    pub runtime_version: String,
    /// The runtime's own driver; the configured one when it does not say.
    pub cgroup_driver: CgroupDriver,
    /// What else it says it can; nothing, if it does not answer.
    pub features: v1::RuntimeFeatures,
}

/// `Version`, then `RuntimeConfig`: three tries each, 2 s apart; a runtime without `RuntimeConfig` leaves the configured driver
/// in force (contract S-12).
pub async fn handshake(cri: &dyn RuntimeService, configured: CgroupDriver) -> Result<Handshake, CriError> {
    let version = retried(async || cri.version().await).await?;
    let cgroup_driver = match retried(async || cri.runtime_config().await).await {
        Ok(config) => config.linux.map_or(configured, |linux| match linux.cgroup_driver() {
            v1::CgroupDriver::Systemd => CgroupDriver::Systemd,
            v1::CgroupDriver::Cgroupfs => CgroupDriver::Cgroupfs,
        }),
        Err(error) if error.is_unimplemented() => configured,
        Err(error) => return Err(error),
    };
    if cgroup_driver != configured {
        tracing::info!(runtime = ?cgroup_driver, config = ?configured, "using the cgroup driver of the runtime");
    }
    let runtime_version = plain_version(&version.runtime_version);
    let features = match cri.status(false).await {
        Ok(status) => status.features.unwrap_or_default(),
        Err(error) => {
            tracing::warn!(%error, "the container runtime does not tell its features");
            v1::RuntimeFeatures::default()
        }
    };
    Ok(Handshake { runtime_name: version.runtime_name, runtime_version, cgroup_driver, features })
}

/// containerd says `v2.3.7`; the Node says `2.3.7`.
fn plain_version(version: &str) -> String {
    version.strip_prefix('v').unwrap_or(version).to_owned()
}

async fn retried<T>(call: impl AsyncFn() -> Result<T, CriError>) -> Result<T, CriError> {
    let mut tries = 1;
    loop {
        match call().await {
            Err(error) if tries < HANDSHAKE_TRIES && !error.is_unimplemented() => {
                tracing::warn!(%error, "the container runtime does not answer yet");
                tries += 1;
                tokio::time::sleep(HANDSHAKE_PAUSE).await;
            }
            result => return result,
        }
    }
}

/// Follows the runtime until cancelled. `poke` asks for a Status at once.
pub(super) async fn monitor(
    cri: Arc<dyn RuntimeService>,
    state: watch::Sender<RuntimeState>,
    poke: Arc<Notify>,
    clock: Arc<dyn Clock>,
    cancel: CancellationToken,
) {
    let mut next = state.borrow().clone();
    let mut answered = false;
    loop {
        let ask = tokio::time::timeout(STATUS_DEADLINE, ask(cri.as_ref(), !answered));
        let answer = tokio::select! {
            biased;
            () = cancel.cancelled() => return,
            answer = ask => answer.unwrap_or_else(|_| Err(CriError::new("Status", tonic::Code::DeadlineExceeded, "no answer"))),
        };
        let now = clock.now().mono;
        answered = answer.is_ok();
        match answer {
            Ok((version, status)) => {
                if let Some(version) = version {
                    (next.name, next.version) = (version.runtime_name, plain_version(&version.runtime_version));
                }
                next.take_status(&status, now);
            }
            Err(error) => tracing::warn!(%error, "container runtime status check failed"),
        }
        next.take_time(now);
        state.send_if_modified(|current| {
            let news = !current.same_news(&next);
            *current = next.clone();
            news
        });
        let ready = answered && next.runtime_error.is_none() && next.network_error.is_none();
        tokio::select! {
            biased;
            () = cancel.cancelled() => return,
            () = poke.notified() => {}
            () = tokio::time::sleep(if ready { POLL } else { POLL_NOT_READY }) => {}
        }
    }
}

/// `Version` is asked again after each gap: the runtime may have been upgraded.
async fn ask(
    cri: &dyn RuntimeService,
    with_version: bool,
) -> Result<(Option<v1::VersionResponse>, v1::StatusResponse), CriError> {
    let version = if with_version { Some(cri.version().await?) } else { None };
    Ok((version, cri.status(false).await?))
}

/// A containerd that is ready, for the tests of this room.
#[cfg(test)]
pub(super) fn ready_for_test() -> RuntimeState {
    let mut state = RuntimeState { name: "containerd".into(), version: "2.3.7".into(), ..RuntimeState::unknown() };
    let condition = |type_: &str| v1::RuntimeCondition { r#type: type_.into(), status: true, ..Default::default() };
    let status = v1::StatusResponse {
        status: Some(v1::RuntimeStatus { conditions: vec![condition("RuntimeReady"), condition("NetworkReady")] }),
        runtime_handlers: vec![v1::RuntimeHandler { name: "runc".into(), features: None }],
        features: Some(v1::RuntimeFeatures { supplemental_groups_policy: true, ..Default::default() }),
        ..Default::default()
    };
    let now = Instant::now();
    state.take_status(&status, now);
    state.take_time(now);
    state
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cri::fake::{FakeRuntime, Fault},
        time::SystemClock,
    };

    fn status(runtime: Option<bool>, network: Option<bool>) -> v1::StatusResponse {
        let condition = |type_: &str, status: bool, reason: &str| v1::RuntimeCondition {
            r#type: type_.into(),
            status,
            reason: if status { String::new() } else { reason.into() },
            message: if status { String::new() } else { "m".into() },
        };
        let conditions = [
            runtime.map(|s| condition("RuntimeReady", s, "Broken")),
            network.map(|s| condition("NetworkReady", s, "NetworkPluginNotReady")),
        ];
        let handler = |name: &str, rro| v1::RuntimeHandler {
            name: name.into(),
            features: Some(v1::RuntimeHandlerFeatures { recursive_read_only_mounts: rro, user_namespaces: false }),
        };
        v1::StatusResponse {
            status: Some(v1::RuntimeStatus { conditions: conditions.into_iter().flatten().collect() }),
            runtime_handlers: vec![handler("runc", true), handler("", false)],
            features: Some(v1::RuntimeFeatures { supplemental_groups_policy: true, ..Default::default() }),
            ..Default::default()
        }
    }

    fn taken(status: &v1::StatusResponse, now: Instant) -> RuntimeState {
        let mut state = RuntimeState::unknown();
        state.take_status(status, now);
        state.take_time(now);
        state
    }

    #[tokio::test]
    async fn n17_before_the_first_status() {
        let state = RuntimeState::unknown();
        assert_eq!(state.runtime_errors(), ["container runtime status check may not have completed yet"]);
        assert_eq!(state.network_error(), Some("network state unknown"));
    }

    #[tokio::test]
    async fn n17_network_not_ready_leaves_the_runtime_ready() {
        let state = taken(&status(Some(true), Some(false)), Instant::now());
        assert!(state.runtime_errors().is_empty());
        assert_eq!(
            state.network_error(),
            Some("container runtime network not ready: NetworkReady=false reason:NetworkPluginNotReady message:m")
        );
    }

    #[tokio::test]
    async fn n17_runtime_not_ready() {
        let state = taken(&status(Some(false), Some(true)), Instant::now());
        assert_eq!(
            state.runtime_errors(),
            [
                "container runtime status check may not have completed yet",
                "container runtime not ready: RuntimeReady=false reason:Broken message:m",
            ]
        );
        assert_eq!(state.network_error(), None);
        let silent = taken(&status(None, None), Instant::now());
        assert_eq!(silent.runtime_errors()[1], "container runtime not ready: <nil>");
    }

    #[tokio::test]
    async fn n17_down_after_30_seconds_without_a_good_status() {
        let start = Instant::now();
        let mut state = taken(&status(Some(true), Some(true)), start);
        state.take_time(start + Duration::from_secs(29));
        assert!(state.runtime_errors().is_empty());
        let before = state.clone();
        state.take_time(start + DOWN_AFTER);
        assert_eq!(state.runtime_errors(), ["container runtime is down"]);
        assert!(!state.same_news(&before), "going silent is news");
        state.take_status(&status(Some(true), Some(true)), start + DOWN_AFTER);
        state.take_time(start + DOWN_AFTER);
        assert!(state.runtime_errors().is_empty());
    }

    #[tokio::test]
    async fn n12_handlers_are_sorted_and_features_kept() {
        let state = taken(&status(Some(true), Some(true)), Instant::now());
        let names: Vec<(&str, bool)> =
            state.handlers.iter().map(|h| (h.name.as_str(), h.recursive_read_only_mounts)).collect();
        assert_eq!(names, [("", false), ("runc", true)]);
        assert_eq!(state.supplemental_groups_policy, Some(true));
    }

    fn fake() -> FakeRuntime {
        FakeRuntime::new(Arc::new(SystemClock))
    }

    #[tokio::test(start_paused = true)]
    async fn s12_the_driver_of_the_runtime_wins() {
        let (runtime, features) = (fake(), v1::RuntimeFeatures { mount_options: true, ..Default::default() });
        runtime.set_features(features);
        let made = handshake(&runtime, CgroupDriver::Cgroupfs).await.unwrap();
        let expected = Handshake {
            runtime_name: "containerd".into(),
            runtime_version: "2.3.7".into(),
            cgroup_driver: CgroupDriver::Systemd,
            features,
        };
        assert_eq!(made, expected);
    }

    #[tokio::test(start_paused = true)]
    async fn s12_without_runtime_config_the_configured_driver_stays() {
        let runtime = fake();
        let fault = Fault::Error { code: tonic::Code::Unimplemented, message: "unknown method".into() };
        runtime.inject("RuntimeConfig", 1, fault);
        let made = handshake(&runtime, CgroupDriver::Cgroupfs).await.unwrap();
        assert_eq!(made.cgroup_driver, CgroupDriver::Cgroupfs);
    }

    #[tokio::test(start_paused = true)]
    async fn s12_three_tries_two_seconds_apart() {
        let runtime = fake();
        runtime.inject("RuntimeConfig", 2, Fault::error("starting"));
        let started = Instant::now();
        handshake(&runtime, CgroupDriver::Cgroupfs).await.unwrap();
        assert_eq!(started.elapsed(), 2 * HANDSHAKE_PAUSE);
        runtime.inject("Version", 3, Fault::error("broken"));
        assert!(handshake(&runtime, CgroupDriver::Cgroupfs).await.is_err());
    }

    struct Watched {
        runtime: FakeRuntime,
        state: watch::Receiver<RuntimeState>,
        poke: Arc<Notify>,
        _stop: tokio_util::sync::DropGuard,
    }

    fn watched() -> Watched {
        let (runtime, poke, cancel) = (fake(), Arc::<Notify>::default(), CancellationToken::new());
        let (sender, state) = watch::channel(RuntimeState::unknown());
        let clock = Arc::new(SystemClock);
        tokio::spawn(monitor(Arc::new(runtime.clone()), sender, Arc::clone(&poke), clock, cancel.clone()));
        Watched { runtime, state, poke, _stop: cancel.drop_guard() }
    }

    async fn millis(n: u64) {
        tokio::time::sleep(Duration::from_millis(n)).await;
    }

    #[tokio::test(start_paused = true)]
    async fn n17_a_network_that_comes_up_is_seen_within_half_a_second() {
        let mut w = watched();
        w.runtime.set_conditions(true, false);
        millis(6000).await;
        assert!(w.state.borrow_and_update().network_error().unwrap().contains("NetworkPluginNotReady"));
        w.runtime.set_conditions(true, true);
        millis(501).await;
        assert!(w.state.has_changed().unwrap());
        assert_eq!(w.state.borrow_and_update().network_error(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn s27_a_ready_runtime_is_asked_every_five_seconds_or_when_poked() {
        let mut w = watched();
        millis(1000).await;
        w.state.borrow_and_update();
        let asked = w.runtime.count("Status");
        millis(50_000).await;
        assert_eq!(w.runtime.count("Status") - asked, 10);
        assert!(!w.state.has_changed().unwrap(), "nothing new is no news");
        w.poke.notify_one();
        millis(1).await;
        assert_eq!(w.runtime.count("Status") - asked, 11);
        assert_eq!(w.runtime.count("Version"), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn n17_a_runtime_that_goes_away_is_down_after_30_seconds_and_comes_back_at_once() {
        let mut w = watched();
        millis(1000).await;
        w.runtime.set_down(true);
        millis(24_000).await;
        assert!(w.state.borrow_and_update().runtime_errors().is_empty());
        millis(10_000).await;
        assert_eq!(w.state.borrow_and_update().runtime_errors(), ["container runtime is down"]);
        w.runtime.set_down(false);
        millis(501).await;
        assert!(w.state.borrow().runtime_errors().is_empty());
        assert!(w.runtime.count("Version") > 1, "it may be another version now");
    }
}
