//! The kubepods cgroup tree: `<cgroupRoot>/kubepods[/burstable|/besteffort]/pod<uid>` (contract R-01…R-04).
//!
//! In: pods, node allocatable. Out: the pod's `cgroup_parent` for CRI, and its cgroup on disk with limits, made before the sandbox
//! and removed, with any process left in it, after the pod has ended. With the systemd driver each cgroup is a slice that systemd makes with the
//! limits as its properties, so that they outlive its reloads; what it has no property for is written to the slice's files.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;

pub use super::cgroup_fs::CgroupError;
use super::{
    cgroup_fs::{Hierarchy, Limits},
    cgroup_names::{CgroupName, pod_uid_of},
    class_limits::{ClassLimits, ClassPolicy, Held, class_limits},
    pod_resources::PodSize,
    qos::{QosClass, cpu_quota, cpu_shares, cpu_weight, qos_class},
    requests::{ResourceList, hugepage_size, pod_level_set, pod_requests, resource_list},
    reserved::ReservedCgroup,
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
    /// `qosReserved: {memory: n%}` with feature QOSReserved.
    pub qos_reserved_memory_percent: Option<i64>,
}

impl CgroupSettings {
    /// `driver` is what the handshake with the runtime settled, `hugepage_sizes` what the machine has.
    pub fn from_config(config: &Config, driver: CgroupDriver, mount: &Path, hugepage_sizes: Vec<i64>) -> Self {
        let kubelet = &config.kubelet;
        let memory_qos = config.feature_gates.enabled("MemoryQoS");
        // Validated with the configuration: `50%`.
        let reserved = kubelet.qos_reserved.get("memory").and_then(|text| text.strip_suffix('%')?.parse().ok());
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
            qos_reserved_memory_percent: reserved.filter(|_| config.feature_gates.enabled("QOSReserved")),
        }
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
    /// What the pods that have a cgroup add to their class.
    counted: Mutex<HashMap<PodUid, Held>>,
    /// Bytes that pods may use, once kubepods was limited to it.
    allocatable_memory: AtomicI64,
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
        Ok(Self(Arc::new(Inner {
            settings,
            hierarchy,
            systemd,
            kubepods,
            counted: Mutex::default(),
            allocatable_memory: AtomicI64::new(0),
        })))
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
        let mut limits = kubepods_limits(allocatable);
        if self.0.settings.memory_reservation {
            // These follow the pods.
            (limits.memory_min, limits.memory_low) = (None, None);
        }
        self.0.allocatable_memory.store(limits.memory_bytes.unwrap_or(0), Ordering::Relaxed);
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
            inner.set(&limits.cgroup, &limits.limits())
        })
        .await
    }

    /// Sets the classes' shares and memory from the pods that have a cgroup: every 60 s, so that what went amiss is put right
    /// (contract R-03). [`create`](PodCgroups::create) and [`remove`](PodCgroups::remove) do so for their pod at once.
    pub async fn update_qos(&self) -> Result<(), CgroupError> {
        if !self.manages() {
            return Ok(());
        }
        self.blocking("update", Inner::set_classes).await
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
                inner.raise_classes();
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
            let counted = inner.counted().remove(&uid).is_some_and(|held| inner.changes_classes(&held));
            if counted && manages { inner.set_classes() } else { Ok(()) }
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
                // On version 1 systemd makes it only in some of the trees.
                if self.hierarchy.exists_anywhere(path) {
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
                memory_low: (class == QosClass::Burstable && !self.settings.memory_reservation).then_some(0),
                hugepages: unlimited,
                ..Limits::default()
            };
            self.create(&path, &limits)?;
            self.set(&path, &limits)?;
        }
        Ok(())
    }

    fn counted(&self) -> MutexGuard<'_, HashMap<PodUid, Held>> {
        self.counted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the classes change with this pod.
    fn count(&self, pod: &Pod) -> bool {
        let Some(held) = Held::of(pod) else { return false };
        self.counted().insert(pod.uid().clone(), held) != Some(held) && self.changes_classes(&held)
    }

    fn class_policy(&self) -> ClassPolicy {
        ClassPolicy {
            tiered_memory: self.settings.memory_reservation && self.hierarchy.is_v2(),
            reserved_memory_percent: self.settings.qos_reserved_memory_percent,
            allocatable_memory: self.allocatable_memory.load(Ordering::Relaxed),
        }
    }

    /// Guaranteed pods count only where memory is kept for them.
    fn changes_classes(&self, held: &Held) -> bool {
        let policy = self.class_policy();
        held.burstable() || policy.tiered_memory || policy.reserved_memory_percent.is_some()
    }

    fn class_limits(&self) -> ClassLimits {
        class_limits(self.counted().values(), &self.class_policy())
    }

    fn set_classes(&self) -> Result<(), CgroupError> {
        let limits = self.class_limits();
        let classes = [
            (QosClass::Guaranteed, limits.root),
            (QosClass::Burstable, limits.burstable),
            (QosClass::BestEffort, limits.best_effort),
        ];
        for (class, mut limits) in classes.into_iter().filter(|(_, limits)| *limits != Limits::default()) {
            let path = self.class_cgroup(class).path(self.settings.driver);
            if let Some(limit) = &mut limits.memory_bytes {
                // No lower than what is in use, so that it grows no further.
                let used = self.hierarchy.memory_use(&path).and_then(|used| i64::try_from(used).ok());
                *limit = used.map_or(*limit, |used| used.max(*limit));
            }
            self.set(&path, &limits)?;
        }
        Ok(())
    }

    /// After a restart pods are adopted one by one: the classes keep what they have until the pods outgrow it, so that nobody's share
    /// drops in between. A pod starts also when this fails.
    fn raise_classes(&self) {
        let limits = self.class_limits();
        let burstable = self.class_cgroup(QosClass::Burstable).path(self.settings.driver);
        let kubepods = self.kubepods.path(self.settings.driver);
        let shares = limits.burstable.cpu_shares.is_some_and(|s| self.hierarchy.cpu_shares_below(&burstable, s));
        let memory = limits.root.memory_min.is_some_and(|m| self.hierarchy.memory_min_below(&kubepods, m));
        if (shares || memory || limits.burstable.memory_bytes.is_some())
            && let Err(error) = self.set_classes()
        {
            tracing::warn!(cgroup = burstable, %error, "cannot set the shares and memory of the QoS classes");
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

pub(super) fn hugepages(list: &ResourceList) -> BTreeMap<i64, i64> {
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
#[path = "cgroups_tests.rs"]
mod tests;
