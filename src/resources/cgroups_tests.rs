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
        qos_reserved_memory_percent: None,
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
    pod(json!({"containers": [{"name": "c", "resources": {"requests": {"cpu": "250m"}, "limits": {"cpu": "500m"}}}]}))
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
    assert_eq!((limits.memory_min, limits.memory_low, limits.memory_high), (None, Some(1 << 30), Some(2_040_107_008)));
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
