//! The kubepods cgroup tree: `<cgroupRoot>/kubepods[/burstable|/besteffort]/pod<uid>` (contract R-01…R-04).
//!
//! In: pods, node allocatable. Out: the pod's `cgroup_parent` for CRI, and its cgroup on disk with limits, made before the sandbox
//! and removed, with any process left in it, after the pod has ended. With the systemd driver the slices belong to systemd: only
//! names are handed out and the runtime has systemd make the slice; limits on kubepods, QoS and pod level are then not set.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use async_trait::async_trait;

pub use super::cgroup_fs::CgroupError;
use super::{
    cgroup_fs::{Hierarchy, Limits},
    cgroup_names::{CgroupName, pod_uid_of},
    qos::{QosClass, cpu_quota, cpu_shares, qos_class},
    requests::{ResourceList, hugepage_size, pod_level_set, pod_limits, pod_requests, resource_list},
};
use crate::{
    config::{CgroupDriver, Config},
    pods::{Pod, PodUid},
    quantity::Quantity,
};

const QOS_UNLIMITED_HUGEPAGES: i64 = 1 << 62;
const MIN_CPU_SHARES: u64 = 2;

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
}

impl CgroupSettings {
    /// `driver` is what the handshake with the runtime settled, `hugepage_sizes` what the machine has.
    pub fn from_config(config: &Config, driver: CgroupDriver, mount: &Path, hugepage_sizes: Vec<i64>) -> Self {
        let kubelet = &config.kubelet;
        Self {
            mount: mount.to_owned(),
            root: kubelet.cgroup_root.clone(),
            per_qos: kubelet.cgroups_per_qos,
            driver,
            pod_pids_limit: kubelet.pod_pids_limit,
            cpu_cfs_quota: kubelet.cpu_cfs_quota,
            cpu_cfs_period_micros: kubelet.cpu_cfs_quota_period.std().as_micros().try_into().unwrap_or(100_000),
            hugepage_sizes,
        }
    }
}

/// [`PodCgroups`] on the cgroup file system.
#[derive(Clone)]
pub struct KubepodsCgroups(Arc<Inner>);

struct Inner {
    settings: CgroupSettings,
    hierarchy: Hierarchy,
    kubepods: CgroupName,
    /// CPU requests in millicores of the burstable pods that have a cgroup.
    burstable: Mutex<HashMap<PodUid, i64>>,
}

impl KubepodsCgroups {
    /// Looks at which cgroup version the machine has. Fails when there is none at `settings.mount`.
    pub fn new(settings: CgroupSettings) -> Result<Self, CgroupError> {
        let hierarchy = Hierarchy::detect(&settings.mount)?;
        let kubepods = CgroupName::from_path(&settings.root).child("kubepods");
        Ok(Self(Arc::new(Inner { settings, hierarchy, kubepods, burstable: Mutex::default() })))
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

    /// Sets the shares of the burstable class from the pods that have a cgroup: every 60 s, so that what went amiss is put right
    /// (contract R-03). [`create`](PodCgroups::create) and [`remove`](PodCgroups::remove) do so for their pod at once.
    pub async fn update_qos(&self) -> Result<(), CgroupError> {
        if !self.manages() {
            return Ok(());
        }
        self.blocking("update", Inner::set_burstable_shares).await
    }

    fn manages(&self) -> bool {
        self.0.settings.per_qos && self.0.settings.driver == CgroupDriver::Cgroupfs
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
                inner.hierarchy.create(&path)?;
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
                .try_for_each(|path| inner.hierarchy.remove(&path))?;
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

    fn ensure_root(&self, limits: &Limits) -> Result<(), CgroupError> {
        let driver = self.settings.driver;
        let kubepods = self.kubepods.path(driver);
        self.hierarchy.create(&kubepods)?;
        self.hierarchy.set(&kubepods, limits)?;
        for class in [QosClass::Burstable, QosClass::BestEffort] {
            let path = self.class_cgroup(class).path(driver);
            self.hierarchy.create(&path)?;
            let unlimited = self.settings.hugepage_sizes.iter().map(|size| (*size, QOS_UNLIMITED_HUGEPAGES)).collect();
            let limits = Limits {
                cpu_shares: (class == QosClass::BestEffort).then_some(MIN_CPU_SHARES),
                memory_low: (class == QosClass::Burstable).then_some(0),
                hugepages: unlimited,
                ..Limits::default()
            };
            self.hierarchy.set(&path, &limits)?;
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
        self.hierarchy.set(&self.burstable_cgroup(), &limits)
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

/// Limits of kubepods itself (contract R-03).
fn kubepods_limits(allocatable: &ResourceList) -> Limits {
    Limits {
        cpu_shares: allocatable.get("cpu").map(|cpu| cpu_shares(cpu.milli_value())),
        memory_bytes: allocatable.get("memory").map(Quantity::value),
        pids: allocatable.get("pid").map(Quantity::value),
        hugepages: hugepages(allocatable),
        memory_min: Some(0),
        memory_low: Some(0),
        cpu_quota: None,
    }
}

fn hugepages(list: &ResourceList) -> BTreeMap<i64, i64> {
    list.iter().filter_map(|(name, amount)| Some((hugepage_size(name)?, amount.value()))).collect()
}

/// Limits of a pod's cgroup (contract R-04): shares from the requests, quota and memory only when every container is limited.
fn limits_of_pod(pod: &Pod, settings: &CgroupSettings) -> Limits {
    let (requests, limits) = (pod_requests(pod), pod_limits(pod));
    let period = settings.cpu_cfs_period_micros;
    let quota = match settings.cpu_cfs_quota {
        true => cpu_quota(limits.get("cpu").map_or(0, Quantity::milli_value), period as i64),
        false => -1,
    };
    let memory = limits.get("memory").map_or(0, Quantity::value);
    let mut pages: BTreeMap<i64, i64> = settings.hugepage_sizes.iter().map(|size| (*size, 0)).collect();
    pages.extend(hugepages(&requests));
    let base = Limits { pids: Some(settings.pod_pids_limit).filter(|p| *p > 0), hugepages: pages, ..Limits::default() };
    let shares = cpu_shares(requests.get("cpu").map_or(0, Quantity::milli_value));
    match qos_class(pod) {
        QosClass::Guaranteed => {
            Limits { cpu_shares: Some(shares), cpu_quota: Some((quota, period)), memory_bytes: Some(memory), ..base }
        }
        QosClass::Burstable => Limits {
            cpu_shares: Some(shares),
            cpu_quota: limited(pod, "cpu").then_some((quota, period)),
            memory_bytes: limited(pod, "memory").then_some(memory),
            ..base
        },
        QosClass::BestEffort => Limits { cpu_shares: Some(MIN_CPU_SHARES), ..base },
    }
}

/// Every container has a limit of this resource, or the pod as a whole has.
fn limited(pod: &Pod, resource: &str) -> bool {
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
