//! Follows the runtime's event stream, and lists everything when the stream cannot be trusted.
//!
//! Two tasks. The reader opens `GetContainerEvents` and puts every event into the store at once; it never waits for anything
//! else, because a subscriber that does not read blocks the runtime. The lister decides when a full list is due:
//! at start, after the stream opened, at its first message (events queued meanwhile may be stale, or lost), every second while
//! there is no stream and pods exist, and else as a safety net whose interval grows while it finds nothing new.
//!
//! Go servers send no headers before the first event, so "opening" counts as open when no error came within a moment.

use std::{sync::Arc, time::Duration};

use futures::StreamExt;
use tokio::{
    sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
    task::JoinSet,
    time::{Instant, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::{CriError, CriMetrics, RuntimeService, RuntimeStore};
use crate::pods::PodUid;

/// The intervals of [`follow`]. The defaults are those of the contract (P-08) where it has one.
#[derive(Debug, Clone, Copy)]
pub struct FollowSettings {
    /// Between full lists without a stream, while pods exist; also between tries of a list that failed.
    pub relist_period: Duration,
    /// An opening stream that returned no error for this long counts as open.
    pub open_grace: Duration,
    /// First and longest interval of the safety net.
    pub safety_net: (Duration, Duration),
    /// First and longest wait before the stream is opened again.
    pub reconnect: (Duration, Duration),
    /// Wait before asking a runtime again that has no event stream: it may have been upgraded.
    pub unsupported_retry: Duration,
}

impl Default for FollowSettings {
    fn default() -> Self {
        Self {
            relist_period: Duration::from_secs(1),
            open_grace: Duration::from_secs(1),
            safety_net: (Duration::from_secs(60), Duration::from_secs(300)),
            reconnect: (Duration::from_millis(500), Duration::from_secs(30)),
            unsupported_retry: Duration::from_secs(300),
        }
    }
}

/// Why a full list is made: the label of `rkubelet_relists_total`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reason {
    Start,
    StreamOpen,
    StreamFirstMessage,
    NoEvents,
    SafetyNet,
    /// The last list failed, or left pods whose details it could not read.
    Retry,
}

impl Reason {
    fn as_str(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::StreamOpen => "stream_open",
            Self::StreamFirstMessage => "stream_first_message",
            Self::NoEvents => "no_events",
            Self::SafetyNet => "safety_net",
            Self::Retry => "retry",
        }
    }
}

/// What the reader tells the lister.
#[derive(Debug)]
enum Signal {
    /// A (re)connection attempt begins.
    Opening,
    Opened,
    FirstMessage,
    Broken(CriError),
    /// An event left a doubt about this pod.
    Doubt(PodUid),
}

/// The stream as the lister sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stream {
    Opening { counts_from: Instant },
    Open,
    Down,
}

/// Runs until `cancel`. See the module.
pub async fn follow(
    runtime: Arc<dyn RuntimeService>,
    store: Arc<RuntimeStore>,
    settings: FollowSettings,
    metrics: Arc<CriMetrics>,
    cancel: CancellationToken,
) {
    let (signals, receive) = unbounded_channel();
    let mut tasks = JoinSet::new();
    tasks.spawn(read_events(runtime, store.clone(), settings, signals));
    let lister = Lister {
        next: store.clock().now().mono,
        interval: settings.safety_net.0,
        reason: Reason::Start,
        stream: Stream::Down,
        store,
        settings,
        metrics,
        last_list: None,
        failing: false,
        down_logged: false,
    };
    tokio::select! {
        biased;
        () = cancel.cancelled() => {}
        () = lister.run(receive) => {}
    }
}

/// The reader. Ends when the lister is gone.
async fn read_events(
    runtime: Arc<dyn RuntimeService>,
    store: Arc<RuntimeStore>,
    settings: FollowSettings,
    signals: UnboundedSender<Signal>,
) {
    let mut wait = settings.reconnect.0;
    while signals.send(Signal::Opening).is_ok() {
        let begun = store.clock().now().mono;
        let error = read_stream(&*runtime, &store, &signals).await;
        // A stream that held for a while was a good one: begin anew with the short wait.
        if store.clock().now().mono - begun > settings.reconnect.1 {
            wait = settings.reconnect.0;
        }
        let pause = if error.is_unimplemented() { settings.unsupported_retry } else { wait };
        if signals.send(Signal::Broken(error)).is_err() {
            return;
        }
        sleep(pause).await;
        wait = (wait * 2).min(settings.reconnect.1);
    }
}

/// Reads one stream to its end, and says why it ended.
async fn read_stream(
    runtime: &dyn RuntimeService,
    store: &RuntimeStore,
    signals: &UnboundedSender<Signal>,
) -> CriError {
    let mut events = match runtime.container_events().await {
        Ok(events) => events,
        Err(error) => return error,
    };
    let mut first = Some(Signal::FirstMessage);
    if signals.send(Signal::Opened).is_err() {
        return ended();
    }
    while let Some(event) = events.next().await {
        let event = match event {
            Ok(event) => event,
            Err(error) => return error,
        };
        let doubt = store.apply_event(event).map(Signal::Doubt);
        for signal in first.take().into_iter().chain(doubt) {
            if signals.send(signal).is_err() {
                return ended();
            }
        }
    }
    ended()
}

fn ended() -> CriError {
    CriError::new("GetContainerEvents", tonic::Code::Unavailable, "the stream ended")
}

/// When the next full list is due, and why.
struct Lister {
    store: Arc<RuntimeStore>,
    settings: FollowSettings,
    metrics: Arc<CriMetrics>,
    stream: Stream,
    next: Instant,
    reason: Reason,
    /// Of the safety net.
    interval: Duration,
    last_list: Option<Instant>,
    failing: bool,
    down_logged: bool,
}

impl Lister {
    async fn run(mut self, mut signals: UnboundedReceiver<Signal>) {
        let mut reads: JoinSet<()> = JoinSet::new();
        loop {
            let counts_as_open = match self.stream {
                Stream::Opening { counts_from } => counts_from,
                Stream::Open | Stream::Down => self.next,
            };
            let idle = self.idle();
            tokio::select! {
                biased;
                signal = signals.recv() => match signal {
                    Some(Signal::Doubt(uid)) => {
                        let store = self.store.clone();
                        reads.spawn(async move {
                            if let Err(error) = store.refresh(&uid).await {
                                tracing::warn!(pod_uid = %uid, %error, "reading a pod after an event failed");
                            }
                        });
                    }
                    Some(signal) => self.on_signal(signal),
                    None => return,
                },
                Some(_) = reads.join_next() => {}
                () = sleep_until(counts_as_open), if matches!(self.stream, Stream::Opening { .. }) => self.opened(),
                () = sleep_until(self.next) => self.list().await,
                () = self.store.occupied.notified(), if idle => self.due_in(self.settings.relist_period, Reason::NoEvents),
            }
        }
    }

    /// Without a stream and without pods there is nothing to poll for, until one appears.
    fn idle(&self) -> bool {
        self.stream != Stream::Open && self.reason == Reason::NoEvents && self.store.is_empty()
    }

    fn due_in(&mut self, wait: Duration, reason: Reason) {
        self.next = self.store.clock().now().mono + wait;
        self.reason = reason;
    }

    fn on_signal(&mut self, signal: Signal) {
        match signal {
            Signal::Opening => {
                self.stream = Stream::Opening { counts_from: self.store.clock().now().mono + self.settings.open_grace };
            }
            Signal::Opened if self.stream != Stream::Open => self.opened(),
            Signal::FirstMessage => self.due_in(Duration::ZERO, Reason::StreamFirstMessage),
            Signal::Broken(error) => self.broken(&error),
            Signal::Opened | Signal::Doubt(_) => {}
        }
    }

    fn opened(&mut self) {
        self.stream = Stream::Open;
        self.store.set_with_events(true);
        self.metrics.streams_opened.inc();
        self.interval = self.settings.safety_net.0;
        if self.down_logged {
            tracing::info!("the runtime's event stream is open again");
        }
        self.down_logged = false;
        self.due_in(Duration::ZERO, Reason::StreamOpen);
    }

    fn broken(&mut self, error: &CriError) {
        self.metrics.stream_errors.inc();
        let was_open = self.stream == Stream::Open;
        self.stream = Stream::Down;
        self.store.set_with_events(false);
        if !self.down_logged {
            self.down_logged = true;
            let period = self.settings.relist_period;
            if error.is_unimplemented() {
                tracing::info!(?period, "the runtime has no event stream: listing periodically");
            } else {
                tracing::warn!(%error, ?period, "the runtime's event stream broke: listing periodically");
            }
        }
        if was_open {
            // Events may already be lost: look now, then every period.
            self.due_in(Duration::ZERO, Reason::NoEvents);
        }
    }

    async fn list(&mut self) {
        let begun = self.store.clock().now().mono;
        self.metrics.relists.with_label_values(&[self.reason.as_str()]).inc();
        if let Some(last) = self.last_list.replace(begun) {
            self.metrics.relist_interval_seconds.observe((begun - last).as_secs_f64());
        }
        let result = self.store.relist().await;
        let now = self.store.clock().now();
        self.metrics.relist_seconds.observe((now.mono - begun).as_secs_f64());
        match result {
            Ok(found) => {
                self.metrics.last_seen_seconds.set(now.wall.as_second() as f64);
                self.failing = false;
                self.store.set_with_events(self.stream == Stream::Open);
                if self.reason == Reason::SafetyNet {
                    self.adapt(found.surprises);
                }
                if found.unread.is_empty() {
                    self.plan();
                } else {
                    self.due_in(self.settings.relist_period, Reason::Retry);
                }
            }
            Err(error) => {
                if !self.failing {
                    tracing::warn!(%error, "listing what the runtime runs failed; trying on");
                }
                self.failing = true;
                // An open stream proves nothing while lists fail.
                self.store.set_with_events(false);
                let reason = if self.reason == Reason::Start { Reason::Start } else { Reason::Retry };
                self.due_in(self.settings.relist_period, reason);
            }
        }
    }

    /// The safety net's interval doubles while it finds nothing, and falls back when it does.
    fn adapt(&mut self, surprises: usize) {
        if surprises == 0 {
            self.interval = (self.interval * 2).min(self.settings.safety_net.1);
            return;
        }
        self.metrics.relist_surprises.inc_by(surprises as u64);
        self.interval = self.settings.safety_net.0;
    }

    /// When to list next, all being well.
    fn plan(&mut self) {
        match self.stream {
            Stream::Open => self.due_in(self.interval, Reason::SafetyNet),
            _ if self.store.is_empty() => self.due_in(self.settings.safety_net.0, Reason::NoEvents),
            _ => self.due_in(self.settings.relist_period, Reason::NoEvents),
        }
    }
}

#[cfg(test)]
#[path = "events_tests.rs"]
mod tests;
