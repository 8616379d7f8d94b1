//! The kubepods cgroup tree: `<cgroupRoot>/kubepods[/burstable|/besteffort]/pod<uid>` (contract R-01…R-04).
//!
//! In: pods, node allocatable. Out: the pod's `cgroup_parent` for CRI, and its cgroup on disk with limits, made before the sandbox
//! and removed, with any process left in it, after the pod has ended. With the systemd driver each cgroup is a slice that systemd makes with the
//! limits as its properties, so that they outlive its reloads; what it has no property for is written to the slice's files.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;

pub use super::cgroup_fs::CgroupError;
use super::{
    cgroup_fs::{Hierarchy, Limits},
    cgroup_names::{CgroupName, pod_uid_of},
    pod_resources::PodSize,
    qos::{QosClass, cpu_quota, cpu_shares, cpu_weight, qos_class},
    requests::{ResourceList, hugepage_size, pod_level_set, pod_requests, resource_list},
    resize_plan::{PodCgroup, Resource},
    systemd::{self, Systemd},
};
use crate::{
    config::{CgroupDriver, Config},
    pods::{Pod, PodUid},
    quantity::Quantity,
};

const QOS_UNLIMITED_HUGEPAGES: i64 = 1 << 62;
const MIN_CPU_SHARES: u64 = 2;
/// How long a slice's directory is waited for: 1 s.
const SLICE_TRIES: u32 = 500;
const SLICE_PAUSE: Duration = Duration::from_millis(2);

/// The cgroups of pods as the pod worker and the containers room see them.
#[async_trait]
pub trait PodCgroups: Send + Sync + 'static {
    /// What CRI's `linux.cgroup_parent` gets; empty when pods have no cgroups of their own (`cgroupsPerQOS: false`).
    fn cgroup_parent(&self, pod: &Pod) -> String;
    /// Makes the pod's cgroup with its limits unless it exists, and counts the pod in its class. Before the sandbox, and once for each
    /// pod that was adopted.
    async fn create(&self, pod: &Pod) -> Result<(), CgroupError>;
    /// Kills what runs in the pod's cgroup, in whichever class it stands, and removes it. Fine when there is none.
    async fn remove(&self, uid: &PodUid) -> Result<(), CgroupError>;
    /// UIDs of the pods that have a cgroup.
    async fn list(&self) -> Vec<PodUid>;

    /// The limits in force on the pod's cgroup; `None` when its limits are not ours to set.
    async fn in_force(&self, _pod: &Pod) -> Result<Option<PodCgroup>, CgroupError> {
        Ok(None)
    }
    /// The limits that the pod's resources ask for; what they do not name is to stay as it is.
    fn wanted(&self, _pod: &Pod) -> Option<PodCgroup> {
        None
    }
    /// Bytes of memory that the whole pod uses.
    async fn memory_use(&self, _pod: &Pod) -> Option<u64> {
        None
    }
    /// Sets the pod's memory limit or CPU quota as wanted, and for memory what MemoryQoS makes of it.
    async fn set_limit(&self, _pod: &Pod, _resource: Resource) -> Result<(), CgroupError> {
        Ok(())
    }
    /// Sets the pod's CPU shares as wanted, and with them its class's.
    async fn set_shares(&self, _pod: &Pod) -> Result<(), CgroupError> {
        Ok(())
    }
    /// Puts right what a resize left that the agent's death cut off. Only while nothing of the pod waits to be resized.
    async fn reconcile(&self, pod: &Pod) -> Result<(), CgroupError> {
        let (Some(now), Some(wanted)) = (self.in_force(pod).await?, self.wanted(pod)) else { return Ok(()) };
        if wanted.memory.is_some_and(|limit| now.memory != Some(limit)) {
            let limit = wanted.memory.and_then(|limit| u64::try_from(limit).ok());
            // Not below what is in use: that would kill.
            if self.memory_use(pod).await.zip(limit).is_some_and(|(used, limit)| used < limit) {
                self.set_limit(pod, Resource::Memory).await?;
            }
        }
        if wanted.cpu_quota.is_some_and(|quota| (Some(quota), wanted.cpu_period) != (now.cpu_quota, now.cpu_period)) {
            self.set_limit(pod, Resource::Cpu).await?;
        }
        if wanted.cpu_share != now.cpu_share {
            self.set_shares(pod).await?;
        }
        Ok(())
    }
}

/// The part of the configuration that concerns cgroups.
#[derive(Debug, Clone)]
pub struct CgroupSettings {
    /// `/sys/fs/cgroup`.
    pub mount: PathBuf,
    /// `cgroupRoot`, a cgroupfs path.
    pub root: String,
    /// `cgroupsPerQOS`.
    pub per_qos: bool,
    pub driver: CgroupDriver,
    /// `podPidsLimit`; 0 or less means none.
    pub pod_pids_limit: i64,
    /// `cpuCFSQuota`.
    pub cpu_cfs_quota: bool,
    /// `cpuCFSQuotaPeriod` in µs.
    pub cpu_cfs_period_micros: u64,
    /// Page sizes of this machine in bytes: what a pod does not ask for is limited to 0.
    pub hugepage_sizes: Vec<i64>,
    /// systemd's private socket, for its driver.
    pub systemd_socket: PathBuf,
    /// Feature MemoryQoS with `memoryReservationPolicy: TieredReservation` (contract R-12).
    pub memory_reservation: bool,
    /// Feature MemoryQoS with `memoryThrottlingFactor`.
    pub memory_throttling_factor: Option<f64>,
}

impl CgroupSettings {
    /// `driver` is what the handshake with the runtime settled, `hugepage_sizes` what the machine has.
    pub fn from_config(config: &Config, driver: CgroupDriver, mount: &Path, hugepage_sizes: Vec<i64>) -> Self {
        let kubelet = &config.kubelet;
        let memory_qos = config.feature_gates.enabled("MemoryQoS");
        Self {
            mount: mount.to_owned(),
            root: kubelet.cgroup_root.clone(),
            per_qos: kubelet.cgroups_per_qos,
            driver,
            pod_pids_limit: kubelet.pod_pids_limit,
            cpu_cfs_quota: kubelet.cpu_cfs_quota,
            cpu_cfs_period_micros: kubelet.cpu_cfs_quota_period.std().as_micros().try_into().unwrap_or(100_000),
            hugepage_sizes,
            systemd_socket: systemd::SOCKET.into(),
            memory_reservation: memory_qos && kubelet.memory_reservation_policy == "TieredReservation",
            memory_throttling_factor: kubelet.memory_throttling_factor.filter(|_| memory_qos),
        }
    }
}

/// A cgroup of the system's or of Kubernetes' daemons, and what is reserved for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReservedCgroup {
    /// `System Reserved`, `Kube Reserved Compressible` …: as events say it.
    pub title: &'static str,
    /// A path inside the hierarchies.
    pub cgroup: String,
    pub reserved: ResourceList,
    /// CPU alone.
    pub compressible: bool,
    /// Feature MemoryQoS: what is reserved is also protected.
    pub memory_qos: bool,
}

impl ReservedCgroup {
    /// What `enforceNodeAllocatable` asks for besides `pods`, in upstream's order.
    pub fn from_config(config: &Config) -> Vec<Self> {
        let kubelet = &config.kubelet;
        let kinds = [
            ("system-reserved", "System Reserved", false),
            ("kube-reserved", "Kube Reserved", false),
            ("system-reserved-compressible", "System Reserved Compressible", true),
            ("kube-reserved-compressible", "Kube Reserved Compressible", true),
        ];
        let asked = |key: &str| kubelet.enforce_node_allocatable.iter().any(|k| k == key);
        let made = |(key, title, compressible): (&str, &'static str, bool)| {
            let (cgroup, reserved) = match key.starts_with("system") {
                true => (&kubelet.system_reserved_cgroup, &config.system_reserved),
                false => (&kubelet.kube_reserved_cgroup, &config.kube_reserved),
            };
            let memory_qos = config.feature_gates.enabled("MemoryQoS");
            Self { title, cgroup: cgroup.clone(), reserved: reserved.clone(), compressible, memory_qos }
        };
        kinds.into_iter().filter(|(key, ..)| asked(key)).map(made).collect()
    }
}

fn reserved_limits(of: &ReservedCgroup) -> Limits {
    let cpu_shares = of.reserved.get("cpu").map(|cpu| cpu_shares(cpu.milli_value()));
    if of.compressible {
        return Limits { cpu_shares, ..Limits::default() };
    }
    let memory_bytes = of.reserved.get("memory").map(Quantity::value);
    Limits {
        cpu_shares,
        memory_bytes,
        pids: of.reserved.get("pid").map(Quantity::value),
        hugepages: hugepages(&of.reserved),
        memory_min: memory_bytes.filter(|_| of.memory_qos),
        ..Limits::default()
    }
}

/// [`PodCgroups`] on the cgroup file system.
#[derive(Clone)]
pub struct KubepodsCgroups(Arc<Inner>);

struct Inner {
    settings: CgroupSettings,
    hierarchy: Hierarchy,
    /// With the systemd driver, where systemd runs.
    systemd: Option<Systemd>,
    kubepods: CgroupName,
    /// CPU requests in millicores of the burstable pods that have a cgroup.
    burstable: Mutex<HashMap<PodUid, i64>>,
}

impl KubepodsCgroups {
    /// Looks at which cgroup version the machine has. Fails when there is none at `settings.mount`.
    pub fn new(settings: CgroupSettings) -> Result<Self, CgroupError> {
        let hierarchy = Hierarchy::detect(&settings.mount)?;
        let kubepods = CgroupName::from_path(&settings.root).child("kubepods");
        let wanted = settings.per_qos && settings.driver == CgroupDriver::Systemd;
        let there = wanted && settings.systemd_socket.exists();
        if wanted && !there {
            let socket = settings.systemd_socket.display();
            tracing::warn!(%socket, "The cgroup driver is systemd, and there is none: pods' slices get no limits");
        }
        let systemd = there.then(|| Systemd { socket: settings.systemd_socket.clone() });
        Ok(Self(Arc::new(Inner { settings, hierarchy, systemd, kubepods, burstable: Mutex::default() })))
    }

    /// This host runs cgroup v2 alone.
    pub fn is_v2(&self) -> bool {
        self.0.hierarchy.is_v2()
    }

    /// The kubepods cgroup's directory in the memory hierarchy: for `allocatableMemory.available`.
    pub fn kubepods_memory_directory(&self) -> Option<PathBuf> {
        self.0.hierarchy.directory("memory", &self.0.kubepods.path(self.0.settings.driver))
    }

    /// Makes kubepods and the QoS classes, and limits kubepods to what pods may use: cpu, memory, `pid` and hugepages of
    /// `allocatable` (node capacity less reservations, eviction thresholds not subtracted). Idempotent.
    pub async fn ensure_root(&self, allocatable: &ResourceList) -> Result<(), CgroupError> {
        if !self.manages() {
            return Ok(());
        }
        let limits = kubepods_limits(allocatable);
        self.blocking("create", move |inner| inner.ensure_root(&limits)).await
    }

    /// Limits a cgroup that somebody else made to what is reserved for it (`systemReservedCgroup`, `kubeReservedCgroup`, contract R-08): CPU
    /// shares, and unless `compressible` alone memory, `pid` and huge pages too. Fails when there is no such cgroup.
    pub async fn enforce_reserved(&self, limits: ReservedCgroup) -> Result<(), CgroupError> {
        self.blocking("update", move |inner| {
            if !inner.hierarchy.exists(&limits.cgroup) {
                let source = std::io::Error::new(std::io::ErrorKind::NotFound, "cgroup does not exist");
                return Err(CgroupError { action: "validate", path: limits.cgroup.into(), source });
            }
            inner.set(&limits.cgroup, &reserved_limits(&limits))
        })
        .await
    }

    /// Sets the shares of the burstable class from the pods that have a cgroup: every 60 s, so that what went amiss is put right
    /// (contract R-03). [`create`](PodCgroups::create) and [`remove`](PodCgroups::remove) do so for their pod at once.
    pub async fn update_qos(&self) -> Result<(), CgroupError> {
        if !self.manages() {
            return Ok(());
        }
        self.blocking("update", Inner::set_burstable_shares).await
    }

    fn path_of(&self, pod: &Pod) -> String {
        self.0.pod_cgroup(qos_class(pod), pod.uid()).path(self.0.settings.driver)
    }

    async fn set(&self, pod: &Pod, limits: Limits) -> Result<(), CgroupError> {
        if !self.manages() {
            return Ok(());
        }
        let path = self.path_of(pod);
        self.blocking("write", move |inner| inner.set(&path, &limits)).await
    }

    fn manages(&self) -> bool {
        self.0.settings.per_qos && (self.0.settings.driver == CgroupDriver::Cgroupfs || self.0.systemd.is_some())
    }

    async fn blocking<T: Send + 'static>(
        &self,
        action: &'static str,
        work: impl FnOnce(&Inner) -> Result<T, CgroupError> + Send + 'static,
    ) -> Result<T, CgroupError> {
        let inner = Arc::clone(&self.0);
        let path = inner.settings.mount.clone();
        let done = tokio::task::spawn_blocking(move || work(&inner)).await;
        done.unwrap_or_else(|join| Err(CgroupError { action, path, source: std::io::Error::other(join) }))
    }
}

#[async_trait]
impl PodCgroups for KubepodsCgroups {
    fn cgroup_parent(&self, pod: &Pod) -> String {
        if !self.0.settings.per_qos {
            return String::new();
        }
        self.0.pod_cgroup(qos_class(pod), pod.uid()).cgroup_parent(self.0.settings.driver)
    }

    async fn create(&self, pod: &Pod) -> Result<(), CgroupError> {
        if !self.manages() {
            return Ok(());
        }
        let path = self.0.pod_cgroup(qos_class(pod), pod.uid()).path(self.0.settings.driver);
        let limits = limits_of_pod(pod, &self.0.settings);
        let counted = self.0.count(pod);
        self.blocking("create", move |inner| {
            if !inner.hierarchy.exists(&path) {
                inner.create(&path, &limits)?;
                if let Err(error) = inner.hierarchy.set(&path, &limits) {
                    tracing::error!(cgroup = path, %error, "pod cgroup has not got all its limits");
                }
            }
            if counted {
                inner.raise_burstable_shares();
            }
            Ok(())
        })
        .await
    }

    async fn remove(&self, uid: &PodUid) -> Result<(), CgroupError> {
        if !self.0.settings.per_qos {
            return Ok(());
        }
        let uid = uid.clone();
        let manages = self.manages();
        self.blocking("remove", move |inner| {
            QosClass::ALL
                .into_iter()
                .map(|class| inner.pod_cgroup(class, &uid).path(inner.settings.driver))
                .try_for_each(|path| inner.remove(&path))?;
            // The lock is let go before the shares are summed up.
            let counted = inner.burstable().remove(&uid).is_some();
            if counted && manages { inner.set_burstable_shares() } else { Ok(()) }
        })
        .await
    }

    async fn list(&self) -> Vec<PodUid> {
        if !self.0.settings.per_qos {
            return Vec::new();
        }
        self.blocking("list", |inner| Ok(inner.list())).await.unwrap_or_default()
    }

    async fn in_force(&self, pod: &Pod) -> Result<Option<PodCgroup>, CgroupError> {
        if !self.manages() {
            return Ok(None);
        }
        let path = self.path_of(pod);
        self.blocking("read", move |inner| inner.hierarchy.pod_limits(&path)).await.map(Some)
    }

    fn wanted(&self, pod: &Pod) -> Option<PodCgroup> {
        let limits = limits_of_pod(pod, &self.0.settings);
        let shares = limits.cpu_shares.unwrap_or(MIN_CPU_SHARES);
        self.manages().then(|| PodCgroup {
            memory: limits.memory_bytes,
            cpu_quota: limits.cpu_quota.map(|(quota, _)| quota).filter(|quota| *quota > 0),
            cpu_period: self.0.settings.cpu_cfs_period_micros,
            cpu_share: if self.is_v2() { cpu_weight(shares) } else { shares },
        })
    }

    async fn memory_use(&self, pod: &Pod) -> Option<u64> {
        let path = self.path_of(pod);
        self.blocking("read", move |inner| Ok(inner.hierarchy.memory_use(&path))).await.ok().flatten()
    }

    async fn set_limit(&self, pod: &Pod, resource: Resource) -> Result<(), CgroupError> {
        let all = limits_of_pod(pod, &self.0.settings);
        let limits = match resource {
            Resource::Cpu => Limits { cpu_quota: all.cpu_quota, ..Limits::default() },
            Resource::Memory => Limits {
                memory_bytes: all.memory_bytes,
                memory_min: all.memory_min,
                memory_low: all.memory_low,
                memory_high: all.memory_high,
                ..Limits::default()
            },
        };
        self.set(pod, limits).await
    }

    async fn set_shares(&self, pod: &Pod) -> Result<(), CgroupError> {
        let cpu_shares = limits_of_pod(pod, &self.0.settings).cpu_shares;
        self.set(pod, Limits { cpu_shares, ..Limits::default() }).await?;
        if self.0.count(pod) { self.update_qos().await } else { Ok(()) }
    }
}

/// CPU request in millicores of a burstable pod.
fn burstable_milli(pod: &Pod) -> Option<i64> {
    let burstable = qos_class(pod) == QosClass::Burstable;
    burstable.then(|| pod_requests(pod).get("cpu").map_or(0, Quantity::milli_value))
}

impl QosClass {
    const ALL: [Self; 3] = [Self::Guaranteed, Self::Burstable, Self::BestEffort];
}

impl Inner {
    fn class_cgroup(&self, class: QosClass) -> CgroupName {
        match class {
            QosClass::Guaranteed => self.kubepods.clone(),
            QosClass::Burstable => self.kubepods.child("burstable"),
            QosClass::BestEffort => self.kubepods.child("besteffort"),
        }
    }

    fn pod_cgroup(&self, class: QosClass, uid: &PodUid) -> CgroupName {
        self.class_cgroup(class).child(format!("pod{uid}"))
    }

    /// Makes a cgroup; as a slice it has its limits from the start.
    fn create(&self, path: &str, limits: &Limits) -> Result<(), CgroupError> {
        if let Some(systemd) = &self.systemd {
            let (parent, unit) = slice_of(path);
            let properties = systemd::properties(limits, self.hierarchy.is_v2());
            let failed = |source| CgroupError { action: "start slice", path: path.into(), source };
            systemd.start_slice(unit, parent, properties).map_err(failed)?;
            // The reply comes when the job is queued.
            for _ in 0..SLICE_TRIES {
                if self.hierarchy.exists(path) {
                    break;
                }
                std::thread::sleep(SLICE_PAUSE);
            }
        }
        self.hierarchy.create(path)
    }

    fn set(&self, path: &str, limits: &Limits) -> Result<(), CgroupError> {
        if let Some(systemd) = &self.systemd {
            let properties = systemd::properties(limits, self.hierarchy.is_v2());
            let failed = |source| CgroupError { action: "set properties of slice", path: path.into(), source };
            systemd.set(slice_of(path).1, properties).map_err(failed)?;
        }
        self.hierarchy.set(path, limits)
    }

    fn remove(&self, path: &str) -> Result<(), CgroupError> {
        let there = self.hierarchy.exists_anywhere(path);
        self.hierarchy.remove(path)?;
        if let Some(systemd) = self.systemd.as_ref().filter(|_| there)
            && let Err(error) = systemd.stop(slice_of(path).1)
        {
            tracing::warn!(cgroup = path, %error, "Stopping the pod's slice failed");
        }
        Ok(())
    }

    fn ensure_root(&self, limits: &Limits) -> Result<(), CgroupError> {
        let driver = self.settings.driver;
        let kubepods = self.kubepods.path(driver);
        self.create(&kubepods, limits)?;
        self.set(&kubepods, limits)?;
        for class in [QosClass::Burstable, QosClass::BestEffort] {
            let path = self.class_cgroup(class).path(driver);
            let unlimited = self.settings.hugepage_sizes.iter().map(|size| (*size, QOS_UNLIMITED_HUGEPAGES)).collect();
            let limits = Limits {
                cpu_shares: (class == QosClass::BestEffort).then_some(MIN_CPU_SHARES),
                memory_low: (class == QosClass::Burstable).then_some(0),
                hugepages: unlimited,
                ..Limits::default()
            };
            self.create(&path, &limits)?;
            self.set(&path, &limits)?;
        }
        Ok(())
    }

    fn burstable(&self) -> MutexGuard<'_, HashMap<PodUid, i64>> {
        self.burstable.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the class's shares change with this pod.
    fn count(&self, pod: &Pod) -> bool {
        let Some(milli) = burstable_milli(pod) else { return false };
        self.burstable().insert(pod.uid().clone(), milli) != Some(milli)
    }

    fn burstable_cgroup(&self) -> String {
        self.class_cgroup(QosClass::Burstable).path(self.settings.driver)
    }

    fn burstable_shares(&self) -> u64 {
        cpu_shares(self.burstable().values().fold(0, |sum: i64, milli| sum.saturating_add(*milli)))
    }

    fn set_burstable_shares(&self) -> Result<(), CgroupError> {
        let limits = Limits { cpu_shares: Some(self.burstable_shares()), ..Limits::default() };
        self.set(&self.burstable_cgroup(), &limits)
    }

    /// After a restart pods are adopted one by one: the class keeps what it has until they outgrow it, so that nobody's share
    /// drops in between. A pod starts also when this fails.
    fn raise_burstable_shares(&self) {
        let path = self.burstable_cgroup();
        if self.hierarchy.cpu_shares_below(&path, self.burstable_shares())
            && let Err(error) = self.set_burstable_shares()
        {
            tracing::warn!(cgroup = path, %error, "cannot set the CPU shares of the burstable class");
        }
    }

    fn list(&self) -> Vec<PodUid> {
        let paths = QosClass::ALL.map(|class| self.class_cgroup(class).path(self.settings.driver));
        let names = paths.iter().flat_map(|path| self.hierarchy.children(path));
        let mut uids: Vec<PodUid> = names.filter_map(|name| pod_uid_of(&name)).map(PodUid::new).collect();
        uids.sort();
        uids.dedup();
        uids
    }
}

/// A slice's parent and its own name, from its path.
fn slice_of(path: &str) -> (&str, &str) {
    let (above, unit) = path.rsplit_once('/').unwrap_or(("", path));
    let parent = above.rsplit('/').next().filter(|parent| !parent.is_empty());
    (parent.unwrap_or("-.slice"), unit)
}

/// Limits of kubepods itself (contract R-03).
fn kubepods_limits(allocatable: &ResourceList) -> Limits {
    Limits {
        cpu_shares: allocatable.get("cpu").map(|cpu| cpu_shares(cpu.milli_value())),
        memory_bytes: allocatable.get("memory").map(Quantity::value),
        pids: allocatable.get("pid").map(Quantity::value),
        hugepages: hugepages(allocatable),
        memory_min: Some(0),
        memory_low: Some(0),
        ..Limits::default()
    }
}

fn hugepages(list: &ResourceList) -> BTreeMap<i64, i64> {
    list.iter().filter_map(|(name, amount)| Some((hugepage_size(name)?, amount.value()))).collect()
}

/// Limits of a pod's cgroup (contract R-04): shares from the requests, quota and memory only when every container is limited.
fn limits_of_pod(pod: &Pod, settings: &CgroupSettings) -> Limits {
    let (size, class) = (PodSize::of(pod), qos_class(pod));
    let period = settings.cpu_cfs_period_micros;
    let quota = |milli| match (settings.cpu_cfs_quota, settings.driver) {
        (false, _) => -1,
        (true, CgroupDriver::Cgroupfs) => cpu_quota(milli, period as i64),
        // systemd keeps whole per cents of a CPU.
        (true, CgroupDriver::Systemd) => cpu_quota((milli + 9) / 10 * 10, period as i64),
    };
    let mut pages: BTreeMap<i64, i64> = settings.hugepage_sizes.iter().map(|size| (*size, 0)).collect();
    pages.extend(hugepages(&pod_requests(pod)));
    let base = Limits { pids: Some(settings.pod_pids_limit).filter(|p| *p > 0), hugepages: pages, ..Limits::default() };
    if class == QosClass::BestEffort {
        return Limits { cpu_shares: Some(MIN_CPU_SHARES), ..base };
    }
    let reserved = Some(size.memory_request).filter(|bytes| settings.memory_reservation && *bytes > 0);
    Limits {
        cpu_shares: Some(cpu_shares(size.cpu_request)),
        cpu_quota: size.cpu_limit.map(|milli| (quota(milli), period)),
        memory_bytes: size.memory_limit,
        memory_min: reserved.filter(|_| class == QosClass::Guaranteed),
        memory_low: reserved.filter(|_| class == QosClass::Burstable),
        memory_high: settings
            .memory_throttling_factor
            .filter(|_| pod_level_set(pod))
            .and_then(|f| memory_high(&size, f)),
        ..base
    }
}

/// MemoryQoS' throttling point of a pod with pod-level resources, in whole pages; `None` where throttling makes no sense.
fn memory_high(size: &PodSize, factor: f64) -> Option<i64> {
    const PAGE: f64 = 4096.0;
    let (request, limit) =
        (size.memory_request, size.memory_limit.filter(|limit| *limit != 0 && *limit != size.memory_request)?);
    let high = ((request as f64 + (limit - request) as f64 * factor) / PAGE).floor() * PAGE;
    Some(high as i64).filter(|high| *high > request)
}

/// Every container has a limit of this resource, or the pod as a whole has.
pub(super) fn limited(pod: &Pod, resource: &str) -> bool {
    let has = |resources: Option<&k8s_openapi::api::core::v1::ResourceRequirements>| {
        resource_list(resources.and_then(|r| r.limits.as_ref())).get(resource).is_some_and(|q| !q.is_zero())
    };
    (pod_level_set(pod) && has(pod.spec().resources.as_ref()))
        || pod.containers().all(|c| has(c.spec.resources.as_ref()))
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use serde_json::json;

    use super::super::requests::tests::pod;
    use super::*;

    fn settings(mount: &Path) -> CgroupSettings {
        CgroupSettings {
            mount: mount.to_owned(),
            root: "/".to_owned(),
            per_qos: true,
            driver: CgroupDriver::Cgroupfs,
            pod_pids_limit: 77,
            cpu_cfs_quota: true,
            cpu_cfs_period_micros: 100_000,
            hugepage_sizes: vec![2 << 20],
            systemd_socket: "/none".into(),
            memory_reservation: false,
            memory_throttling_factor: None,
        }
    }

    fn v2_tree() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("cgroup.controllers"), "cpuset cpu memory hugetlb pids\n").unwrap();
        dir
    }

    fn best_effort() -> Pod {
        pod(json!({"containers": [{"name": "c"}]}))
    }

    fn burstable() -> Pod {
        pod(
            json!({"containers": [{"name": "c", "resources": {"requests": {"cpu": "250m"}, "limits": {"cpu": "500m"}}}]}),
        )
    }

    fn guaranteed() -> Pod {
        let all = json!({"cpu": "1", "memory": "64Mi"});
        pod(json!({"containers": [{"name": "c", "resources": {"requests": all, "limits": all}}]}))
    }

    #[test]
    fn r01_cgroup_parent_by_class_and_driver() {
        let dir = v2_tree();
        let parent = |driver, pod: &Pod| {
            KubepodsCgroups::new(CgroupSettings { driver, ..settings(dir.path()) }).unwrap().cgroup_parent(pod)
        };
        assert_eq!(parent(CgroupDriver::Cgroupfs, &best_effort()), "/kubepods/besteffort/podu-1");
        assert_eq!(parent(CgroupDriver::Cgroupfs, &burstable()), "/kubepods/burstable/podu-1");
        assert_eq!(parent(CgroupDriver::Cgroupfs, &guaranteed()), "/kubepods/podu-1");
        assert_eq!(parent(CgroupDriver::Systemd, &best_effort()), "kubepods-besteffort-podu_1.slice");
        assert_eq!(parent(CgroupDriver::Systemd, &guaranteed()), "kubepods-podu_1.slice");
        let off = KubepodsCgroups::new(CgroupSettings { per_qos: false, ..settings(dir.path()) }).unwrap();
        assert_eq!(off.cgroup_parent(&burstable()), "");
    }

    #[tokio::test]
    async fn r08_reserved_cgroups_must_exist_and_get_what_is_reserved() {
        let dir = v2_tree();
        let cgroups = KubepodsCgroups::new(settings(dir.path())).unwrap();
        let amount = |text: &str| Quantity::parse(text).unwrap();
        let reserved = ReservedCgroup {
            title: "System Reserved",
            cgroup: "/system".into(),
            reserved: [("cpu".into(), amount("500m")), ("memory".into(), amount("1Gi")), ("pid".into(), amount("99"))]
                .into(),
            compressible: true,
            memory_qos: true,
        };
        let missing = cgroups.enforce_reserved(reserved.clone()).await.unwrap_err().to_string();
        assert_eq!(missing, "validate /system: cgroup does not exist");
        let system = dir.path().join("system");
        fs::create_dir(&system).unwrap();
        let read = |file: &str| fs::read_to_string(system.join(file)).ok();
        cgroups.enforce_reserved(reserved.clone()).await.unwrap();
        assert_eq!((read("cpu.weight").as_deref(), read("memory.max")), (Some("20"), None));
        cgroups.enforce_reserved(ReservedCgroup { compressible: false, ..reserved }).await.unwrap();
        assert_eq!((read("memory.max").as_deref(), read("pids.max").as_deref()), (Some("1073741824"), Some("99")));
        assert_eq!(read("memory.min").as_deref(), Some("1073741824"));
    }

    #[tokio::test]
    async fn p71_a_pods_cgroup_is_read_resized_and_put_right() {
        let dir = v2_tree();
        let cgroups = KubepodsCgroups::new(settings(dir.path())).unwrap();
        let sized = |cpu: &str, memory: &str| {
            let all = json!({"cpu": cpu, "memory": memory});
            pod(json!({"containers": [{"name": "c", "resources": {"requests": all, "limits": all}}]}))
        };
        let (old, new) = (sized("1", "64Mi"), sized("2", "128Mi"));
        cgroups.create(&old).await.unwrap();
        assert_eq!(cgroups.in_force(&old).await.unwrap(), cgroups.wanted(&old));
        cgroups.set_limit(&new, Resource::Memory).await.unwrap();
        let half = cgroups.in_force(&new).await.unwrap().unwrap();
        assert_eq!((half.memory, half.cpu_quota), (Some(128 << 20), Some(100_000)));
        cgroups.set_limit(&new, Resource::Cpu).await.unwrap();
        cgroups.set_shares(&new).await.unwrap();
        assert_eq!(cgroups.in_force(&new).await.unwrap(), cgroups.wanted(&new));
        // After a crash: smaller only when less is in use.
        let usage = dir.path().join("kubepods/podu-1/memory.current");
        fs::write(&usage, "100000000").unwrap();
        cgroups.reconcile(&old).await.unwrap();
        let now = cgroups.in_force(&old).await.unwrap().unwrap();
        assert_eq!((now.memory, now.cpu_quota), (Some(128 << 20), Some(100_000)));
        fs::write(&usage, "1000").unwrap();
        cgroups.reconcile(&old).await.unwrap();
        assert_eq!(cgroups.in_force(&old).await.unwrap(), cgroups.wanted(&old));
    }

    #[test]
    fn r12_memory_qos_of_a_pod() {
        let tiered = CgroupSettings {
            memory_reservation: true,
            memory_throttling_factor: Some(0.9),
            ..settings(Path::new("/none"))
        };
        let limits = limits_of_pod(&guaranteed(), &tiered);
        assert_eq!((limits.memory_min, limits.memory_low, limits.memory_high), (Some(64 << 20), None, None));
        let whole = pod(json!({"resources": {"requests": {"memory": "1Gi"}, "limits": {"memory": "2Gi"}},
            "containers": [{"name": "c"}]}));
        let limits = limits_of_pod(&whole, &tiered);
        assert_eq!(
            (limits.memory_min, limits.memory_low, limits.memory_high),
            (None, Some(1 << 30), Some(2_040_107_008))
        );
        let off = limits_of_pod(&whole, &settings(Path::new("/none")));
        assert_eq!((off.memory_min, off.memory_low, off.memory_high), (None, None, None));
    }

    #[test]
    fn r04_limits_by_class() {
        let settings = settings(Path::new("/none"));
        let g = limits_of_pod(&guaranteed(), &settings);
        assert_eq!((g.cpu_shares, g.cpu_quota, g.memory_bytes), (Some(1024), Some((100_000, 100_000)), Some(64 << 20)));
        let b = limits_of_pod(&burstable(), &settings);
        assert_eq!((b.cpu_shares, b.cpu_quota, b.memory_bytes), (Some(256), Some((50_000, 100_000)), None));
        let e = limits_of_pod(&best_effort(), &settings);
        assert_eq!((e.cpu_shares, e.cpu_quota, e.memory_bytes), (Some(2), None, None));
        assert_eq!(e.pids, Some(77));
        assert_eq!(e.hugepages, [(2 << 20, 0)].into(), "pages that nobody asked for are refused");
        let off = limits_of_pod(&guaranteed(), &CgroupSettings { cpu_cfs_quota: false, ..settings });
        assert_eq!(off.cpu_quota, Some((-1, 100_000)));
    }

    #[test]
    fn r04_one_container_without_a_limit_leaves_the_pod_unlimited() {
        let limited = json!({"requests": {"cpu": "100m"}, "limits": {"cpu": "200m", "memory": "1Mi"}});
        let open = pod(json!({"containers": [{"name": "c", "resources": limited}, {"name": "d"}]}));
        let limits = limits_of_pod(&open, &settings(Path::new("/none")));
        assert_eq!((limits.cpu_quota, limits.memory_bytes), (None, None));
    }

    #[tokio::test]
    async fn r03_root_and_classes_are_made_from_allocatable() {
        let dir = v2_tree();
        let cgroups = KubepodsCgroups::new(settings(dir.path())).unwrap();
        let allocatable = [
            ("cpu".to_owned(), Quantity::parse("2").unwrap()),
            ("memory".to_owned(), Quantity::parse("1Gi").unwrap()),
            ("pid".to_owned(), Quantity::parse("1000").unwrap()),
            ("hugepages-2Mi".to_owned(), Quantity::parse("4Mi").unwrap()),
        ];
        cgroups.ensure_root(&allocatable.into()).await.unwrap();
        let read = |file: &str| fs::read_to_string(dir.path().join("kubepods").join(file)).unwrap();
        assert_eq!(read("memory.max"), (1 << 30).to_string());
        assert_eq!(read("pids.max"), "1000");
        assert_eq!(read("cpu.weight"), cpu_weight_of_two_cpus());
        assert_eq!(read("hugetlb.2MB.max"), (4 << 20).to_string());
        assert_eq!(read("besteffort/cpu.weight"), "1");
        assert_eq!(read("burstable/hugetlb.2MB.max"), (1_i64 << 62).to_string());

        let weight = |milli| super::super::cpu_weight(super::super::cpu_shares(milli)).to_string();
        fs::write(dir.path().join("kubepods/burstable/cpu.weight"), "9000").unwrap();
        cgroups.create(&burstable()).await.unwrap();
        assert_eq!(read("burstable/cpu.weight"), "9000", "not lowered while pods are adopted");
        cgroups.update_qos().await.unwrap();
        assert_eq!(read("burstable/cpu.weight"), weight(250));
    }

    fn cpu_weight_of_two_cpus() -> String {
        super::super::cpu_weight(2048).to_string()
    }

    #[tokio::test]
    async fn r04_pods_are_made_listed_and_removed_in_any_class() {
        let dir = v2_tree();
        let cgroups = KubepodsCgroups::new(settings(dir.path())).unwrap();
        cgroups.create(&burstable()).await.unwrap();
        let made = dir.path().join("kubepods/burstable/podu-1");
        let class = || fs::read_to_string(dir.path().join("kubepods/burstable/cpu.weight")).unwrap();
        assert_eq!(class(), super::super::cpu_weight(256).to_string(), "its class has its shares at once");
        assert_eq!(fs::read_to_string(made.join("cpu.max")).unwrap(), "50000 100000");
        fs::create_dir_all(dir.path().join("kubepods/besteffort/podother")).unwrap();
        let uids: Vec<String> = cgroups.list().await.iter().map(ToString::to_string).collect();
        assert_eq!(uids, ["other", "u-1"]);
        cgroups.remove(&PodUid::from("other")).await.unwrap();
        assert_eq!(cgroups.list().await, [PodUid::from("u-1")]);
        fs::remove_dir_all(&made).unwrap();
        cgroups.remove(&PodUid::from("u-1")).await.unwrap();
        assert_eq!(class(), super::super::cpu_weight(2).to_string(), "its class gives its shares back");
    }

    #[tokio::test]
    async fn an_existing_pod_cgroup_is_left_as_it_is() {
        let dir = v2_tree();
        let cgroups = KubepodsCgroups::new(settings(dir.path())).unwrap();
        let made = dir.path().join("kubepods/podu-1");
        fs::create_dir_all(&made).unwrap();
        cgroups.create(&guaranteed()).await.unwrap();
        assert!(!made.join("cpu.max").exists());
    }

    /// On this machine's real cgroups, below a root of our own; passes without looking where that is not permitted.
    #[tokio::test]
    async fn r04_on_the_real_cgroup_file_system() {
        let root = format!("/rkubelet-test-{}", std::process::id());
        let real = CgroupSettings { root: root.clone(), ..settings(Path::new("/sys/fs/cgroup")) };
        let Ok(cgroups) = KubepodsCgroups::new(real) else { return };
        let allocatable = [("memory".to_owned(), Quantity::parse("1Gi").unwrap())];
        if cgroups.ensure_root(&allocatable.into()).await.is_err() {
            return;
        }
        cgroups.create(&guaranteed()).await.unwrap();
        let uid = PodUid::from("u-1");
        assert_eq!(cgroups.list().await, std::slice::from_ref(&uid));
        let path = format!("{root}/kubepods/podu-1");
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let directory = cgroups.0.hierarchy.directory("memory", &path).unwrap();
        fs::write(directory.join("cgroup.procs"), child.id().to_string()).unwrap();
        cgroups.remove(&uid).await.unwrap();
        assert!(!child.wait().unwrap().success(), "the process left in it was killed");
        assert!(cgroups.list().await.is_empty());
        cgroups.0.hierarchy.remove(&root).unwrap();
        assert!(!directory.exists());
    }
}
