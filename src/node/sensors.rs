//! Reads everything that a status is made of, every update period and on demand, and publishes it as one [`Readings`].
//!
//! In: the machine, the interfaces, DNS, the runtime's images. Out: readings in a watch channel, receivers notified when they differ. What
//! may block is read off the runtime with a deadline; a reading that hangs is named in the log and not started twice, and the
//! last one stays in force.

use std::{net::IpAddr, path::PathBuf, sync::Arc, time::Duration};

use k8s_openapi::api::core::v1::ContainerImage;
use tokio::{
    sync::{Notify, watch},
    task::JoinHandle,
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{
    addresses::{self, AddressInputs, DefaultRoute, Interfaces},
    images::node_images,
    machine::{Machine, MachineError},
    pressure::{PressureState, with_kubepods},
    settings::NodeSettings,
    signals::{SignalReading, SignalSources},
    status::{NodeEvent, Readings},
};
use crate::{
    config::Threshold,
    cri::{CriError, ImageService},
    events::{EventSink, EventType, Regarding},
    time::Clock,
};

const READ_DEADLINE: Duration = Duration::from_secs(5);
const DNS_DEADLINE: Duration = Duration::from_secs(2);
const IMAGES_PERIOD: Duration = Duration::from_secs(30);
const IMAGE_FS_PERIOD: Duration = Duration::from_secs(300);

/// What is read off the runtime in one go.
struct HostReading {
    machine: Result<Machine, MachineError>,
    signals: SignalReading,
    interfaces: Interfaces,
    routes: Vec<DefaultRoute>,
}

pub(super) struct Sensors {
    settings: Arc<NodeSettings>,
    images: Arc<dyn ImageService>,
    events: Arc<dyn EventSink>,
    clock: Arc<dyn Clock>,
    /// Memory directory of the kubepods cgroup.
    kubepods: Option<PathBuf>,
    thresholds: Vec<Threshold>,
    pressure: PressureState,
    hanging: Option<JoinHandle<HostReading>>,
    last: Readings,
    image_fs: Option<PathBuf>,
    images_read: Option<Instant>,
    image_fs_read: Option<Instant>,
    invalid_disk_told: bool,
}

impl Sensors {
    pub(super) fn new(
        settings: Arc<NodeSettings>,
        images: Arc<dyn ImageService>,
        events: Arc<dyn EventSink>,
        clock: Arc<dyn Clock>,
        kubepods: Option<PathBuf>,
    ) -> Self {
        let all = &settings.thresholds;
        let thresholds = if settings.enforce_pods { with_kubepods(all) } else { all.clone() };
        Self {
            settings,
            images,
            events,
            clock,
            kubepods,
            thresholds,
            pressure: PressureState::default(),
            hanging: None,
            last: Readings::default(),
            image_fs: None,
            images_read: None,
            image_fs_read: None,
            invalid_disk_told: false,
        }
    }

    /// Reads until cancelled. `out` holds `None` until the machine was read once.
    pub(super) async fn run(
        mut self,
        out: watch::Sender<Option<Readings>>,
        refresh: Arc<Notify>,
        cancel: CancellationToken,
    ) {
        loop {
            let round = tokio::select! {
                biased;
                () = cancel.cancelled() => return,
                readings = self.round() => readings,
            };
            if let Some(readings) = round {
                out.send_if_modified(|current| {
                    let changed = current.as_ref() != Some(&readings);
                    *current = Some(readings);
                    changed
                });
            }
            tokio::select! {
                biased;
                () = cancel.cancelled() => return,
                () = refresh.notified() => {}
                () = tokio::time::sleep(self.settings.update_frequency) => {}
            }
        }
    }

    /// One reading; `None` when the machine cannot be read.
    async fn round(&mut self) -> Option<Readings> {
        let now = self.clock.now().mono;
        self.read_image_fs(now).await;
        let resolved = resolve(&self.settings);
        let listed = self.list_images(now);
        let (resolved, listed) = tokio::join!(resolved, listed);
        if let Some(images) = listed {
            self.last.images = Some(images);
            self.images_read = Some(now);
        }
        let host = self.read_host().await?;
        match host.machine {
            Ok(machine) => self.last.machine = machine,
            Err(error) => tracing::error!(%error, "cannot read what machine this is"),
        }
        self.take_signals(&host.signals, now);
        self.last.addresses = choose_addresses(&self.settings, &host.interfaces, &host.routes, &resolved);
        (self.last.machine.cores > 0).then(|| self.last.clone())
    }

    async fn read_host(&mut self) -> Option<HostReading> {
        let mut reading = match self.hanging.take() {
            Some(hanging) => hanging,
            None => {
                let sources = self.signal_sources();
                let host = self.settings.host.clone();
                tokio::task::spawn_blocking(move || HostReading {
                    machine: Machine::read(&host),
                    signals: sources.read(),
                    interfaces: Interfaces::read().unwrap_or_default(),
                    routes: addresses::default_routes(&host.proc),
                })
            }
        };
        match tokio::time::timeout(READ_DEADLINE, &mut reading).await {
            Ok(done) => done.inspect_err(|error| tracing::error!(%error, "reading the machine failed")).ok(),
            Err(_) => {
                let root = self.settings.root_dir.display();
                tracing::error!(%root, "reading the machine's state hangs; the last reading stays in force");
                self.hanging = Some(reading);
                None
            }
        }
    }

    fn signal_sources(&self) -> SignalSources {
        let host = &self.settings.host;
        SignalSources {
            host: host.clone(),
            kubepods: self.kubepods.clone(),
            root_dir: self.settings.root_dir.clone(),
            image_fs: self.image_fs.clone(),
        }
    }

    fn take_signals(&mut self, signals: &SignalReading, now: Instant) {
        let transition = self.settings.pressure_transition;
        self.last.pressures = self.pressure.observe(&self.thresholds, &signals.observations, transition, now);
        if let Some(fs) = signals.node_fs {
            self.last.node_fs_capacity = Some(fs.capacity);
        }
        let invalid = signals.image_fs.is_some_and(|fs| fs.capacity == 0);
        if invalid && !self.invalid_disk_told {
            let message = "invalid capacity 0 on image filesystem".to_owned();
            self.events.event(Regarding::Node, EventType::Warning, "InvalidDiskCapacity", message);
        }
        self.invalid_disk_told = invalid;
    }

    async fn list_images(&self, now: Instant) -> Option<Vec<ContainerImage>> {
        if !due(self.images_read, IMAGES_PERIOD, now) {
            return None;
        }
        let listed = in_time("ListImages", self.images.list_images()).await;
        let images = listed.inspect_err(|error| tracing::warn!(%error, "error getting image list")).ok()?;
        Some(node_images(&images, self.settings.max_images))
    }

    async fn read_image_fs(&mut self, now: Instant) {
        if !due(self.image_fs_read, IMAGE_FS_PERIOD, now) {
            return;
        }
        match in_time("ImageFsInfo", self.images.image_fs_info()).await {
            Ok(info) => {
                let first = info.image_filesystems.into_iter().find_map(|fs| fs.fs_id);
                self.image_fs = first.map(|id| PathBuf::from(id.mountpoint));
                self.image_fs_read = Some(now);
            }
            Err(error) => tracing::warn!(%error, "cannot tell where the runtime keeps images"),
        }
    }
}

fn due(last: Option<Instant>, period: Duration, now: Instant) -> bool {
    last.is_none_or(|at| now.saturating_duration_since(at) >= period)
}

async fn in_time<T>(rpc: &'static str, call: impl Future<Output = Result<T, CriError>>) -> Result<T, CriError> {
    let answer = tokio::time::timeout(READ_DEADLINE, call).await;
    answer.unwrap_or_else(|_| Err(CriError::new(rpc, tonic::Code::DeadlineExceeded, "no answer")))
}

/// What the node's name resolves to; not asked when `--node-ip` settles it.
async fn resolve(settings: &NodeSettings) -> Vec<IpAddr> {
    if settings.node_ips.first().is_some_and(|ip| !ip.is_unspecified()) || settings.node_name.parse::<IpAddr>().is_ok()
    {
        return Vec::new();
    }
    let lookup = tokio::net::lookup_host((settings.node_name.as_str(), 0));
    match tokio::time::timeout(DNS_DEADLINE, lookup).await {
        Ok(Ok(found)) => found.map(|address| address.ip()).collect(),
        Ok(Err(_)) | Err(_) => Vec::new(),
    }
}

fn choose_addresses(
    settings: &NodeSettings,
    interfaces: &Interfaces,
    routes: &[DefaultRoute],
    resolved: &[IpAddr],
) -> Option<Vec<k8s_openapi::api::core::v1::NodeAddress>> {
    let chosen = addresses::select(&AddressInputs {
        node_name: &settings.node_name,
        node_ips: &settings.node_ips,
        external_cloud: settings.external_cloud,
        interfaces,
        routes,
        resolved,
        current: &[],
    });
    chosen.inspect_err(|error| tracing::error!(%error, "failed to set some node status fields")).ok()
}

impl NodeEvent {
    pub(super) fn send(self, events: &dyn EventSink) {
        events.event(Regarding::Node, self.kind, &self.reason, self.message);
    }
}
