//! The clients of the agent: general, events, watches, heartbeat (contract S-11).
//!
//! Every client has its own connection, so that none can starve another. The connections share one set of credentials.
//! Nothing here waits for the apiserver: a client exists before the server answers.

use std::{
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicI64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use http::HeaderValue;
use kube::Client;

use super::{
    credentials::Credentials,
    kubeconfig::{self, ApiSetupError},
    limiter::RateLimiter,
    metrics::ApiMetrics,
    transport::{Transport, TransportSettings},
};

/// The apiserver allows 100 streams on a connection and hyper opens no second one by itself.
const WATCHES_PER_CONNECTION: usize = 80;
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);

/// Limits and names of the clients; the defaults are the contract's.
#[derive(Debug, Clone)]
pub struct ApiSettings {
    /// `kubeAPIQPS`: requests per second of the general client; 0 means no limit.
    pub qps: f64,
    /// `kubeAPIBurst`.
    pub burst: u32,
    /// `eventRecordQPS`; 0 means no limit.
    pub event_qps: f64,
    /// `eventBurst`.
    pub event_burst: u32,
    /// `kubelet/v1.37.1 (linux/amd64) kubernetes/<sha>`.
    pub user_agent: String,
    /// min(nodeStatusUpdateFrequency, lease duration).
    pub heartbeat_timeout: Duration,
}

impl Default for ApiSettings {
    fn default() -> Self {
        Self {
            qps: 50.0,
            burst: 100,
            event_qps: 50.0,
            event_burst: 100,
            user_agent: "kubelet".to_owned(),
            heartbeat_timeout: Duration::from_secs(10),
        }
    }
}

/// Cheap to clone. Make it and use it inside a tokio runtime.
#[derive(Clone)]
pub struct ApiClients {
    /// Reads and writes, with the contract's QPS and burst.
    pub general: Client,
    /// Only for the event recorder.
    pub events: Client,
    watches: Arc<WatchPool>,
    heartbeat: Arc<dyn Fn() -> Client + Send + Sync>,
    pub(super) metrics: Arc<ApiMetrics>,
}

impl ApiClients {
    /// Reads the kubeconfig and its files, opens no connection.
    pub fn connect(kubeconfig: &Path, settings: &ApiSettings) -> Result<Self, ApiSetupError> {
        let target = kubeconfig::load(kubeconfig)?;
        let credentials = Arc::new(Credentials::new(target)?);
        let user_agent = HeaderValue::from_str(&settings.user_agent)
            .map_err(|_| ApiSetupError::UserAgent(settings.user_agent.clone()))?;
        let metrics = Arc::new(ApiMetrics::default());
        let counted = Arc::clone(&metrics);
        let make = move |limiter: Option<Arc<RateLimiter>>, header_timeout: Duration| {
            let metrics = Arc::clone(&counted);
            let settings = TransportSettings { user_agent: user_agent.clone(), limiter, header_timeout, metrics };
            Client::new(Transport::new(Arc::clone(&credentials), settings), "default")
        };
        let limiter = |qps, burst| RateLimiter::new(qps, burst).map(Arc::new);
        let general = make(limiter(settings.qps, settings.burst), HEADER_TIMEOUT);
        let events = make(limiter(settings.event_qps, settings.event_burst), HEADER_TIMEOUT);
        // Watches start at the general rate, but from a bucket of their own: a mass reconnect must not delay a status.
        let watch_limiter = limiter(settings.qps, settings.burst);
        let make_watch = make.clone();
        let heartbeat_timeout = settings.heartbeat_timeout;
        Ok(Self {
            general,
            events,
            watches: Arc::new(WatchPool::new(Arc::clone(&metrics), move || {
                make_watch(watch_limiter.clone(), HEADER_TIMEOUT)
            })),
            heartbeat: Arc::new(move || make(None, heartbeat_timeout)),
            metrics,
        })
    }

    /// All roles over one client: for tests and simulations.
    pub fn over(client: Client) -> Self {
        let (lane, heartbeat) = (client.clone(), client.clone());
        let metrics = Arc::new(ApiMetrics::default());
        Self {
            general: client.clone(),
            events: client,
            watches: Arc::new(WatchPool::new(Arc::clone(&metrics), move || lane.clone())),
            heartbeat: Arc::new(move || heartbeat.clone()),
            metrics,
        }
    }

    /// A client with its own connection and no QPS limit. Call it on the runtime that will use it, which may be another
    /// one than this value was made on.
    pub fn heartbeat(&self) -> Client {
        (self.heartbeat)()
    }

    /// A place for one watch. Blocks nobody and opens nothing by itself.
    pub fn watch_slot(&self) -> WatchSlot {
        self.watches.take()
    }

    /// Registers `rest_client_*`, `rkubelet_api_watches` and `rkubelet_events_dropped_total`. Fails only if a name is taken.
    pub fn register_metrics(&self, registry: &prometheus::Registry) -> Result<(), prometheus::Error> {
        self.metrics.register(registry)
    }

    /// Watches running or starting now.
    pub fn open_watches(&self) -> i64 {
        self.watches.open.load(Ordering::Relaxed)
    }
}

/// HTTP/2 connections with a bounded number of watches each.
pub(super) struct WatchPool {
    lanes: Mutex<Vec<Lane>>,
    make: Box<dyn Fn() -> Client + Send + Sync>,
    open: Arc<AtomicI64>,
    metrics: Arc<ApiMetrics>,
}

struct Lane {
    client: Client,
    used: Arc<AtomicUsize>,
}

impl WatchPool {
    pub(super) fn new(metrics: Arc<ApiMetrics>, make: impl Fn() -> Client + Send + Sync + 'static) -> Self {
        Self { lanes: Mutex::default(), make: Box::new(make), open: Arc::default(), metrics }
    }

    pub(super) fn take(&self) -> WatchSlot {
        let mut lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        // An unused lane beyond the first is a connection to give back.
        let mut first = true;
        lanes.retain(|lane| std::mem::take(&mut first) || lane.used.load(Ordering::Relaxed) > 0);
        let free = lanes.iter().position(|lane| lane.used.load(Ordering::Relaxed) < WATCHES_PER_CONNECTION);
        let lane = match free {
            Some(at) => &lanes[at],
            None => {
                lanes.push(Lane { client: (self.make)(), used: Arc::default() });
                &lanes[lanes.len() - 1]
            }
        };
        lane.used.fetch_add(1, Ordering::Relaxed);
        self.metrics.watches(self.open.fetch_add(1, Ordering::Relaxed) + 1);
        WatchSlot {
            client: lane.client.clone(),
            used: Arc::clone(&lane.used),
            open: Arc::clone(&self.open),
            metrics: Arc::clone(&self.metrics),
        }
    }
}

/// One of the places of a connection; given back when dropped.
pub struct WatchSlot {
    pub client: Client,
    used: Arc<AtomicUsize>,
    open: Arc<AtomicI64>,
    metrics: Arc<ApiMetrics>,
}

impl Drop for WatchSlot {
    fn drop(&mut self) {
        self.used.fetch_sub(1, Ordering::Relaxed);
        self.metrics.watches(self.open.fetch_sub(1, Ordering::Relaxed) - 1);
    }
}
