"""cgroup v2 with the systemd driver: the slices of node, QoS classes and pods, their limits, and who is killed first."""

import math

from e2e.harness.vm import VmCluster

READY_SECONDS = 120
MIB = 1 << 20
ROOT = "/sys/fs/cgroup/kubepods.slice"
PODS_LIMIT = 512  # podPidsLimit of the VM's configuration
BURSTABLE = {"requests": {"cpu": "250m", "memory": "64Mi"}, "limits": {"cpu": "500m", "memory": "128Mi"}}
GUARANTEED = {"limits": {"cpu": "100m", "memory": "64Mi"}}


def _slice(pod: dict) -> str:
    """The unit of the pod's slice."""
    infix = {"Guaranteed": "", "Burstable": "-burstable", "BestEffort": "-besteffort"}[pod["status"]["qosClass"]]
    return f"kubepods{infix}-pod{pod['metadata']['uid'].replace('-', '_')}.slice"


def _folder(pod: dict) -> str:
    middle = {"Guaranteed": "", "Burstable": "/kubepods-burstable.slice", "BestEffort": "/kubepods-besteffort.slice"}
    return f"{ROOT}{middle[pod['status']['qosClass']]}/{_slice(pod)}"


def _container(pod: dict) -> str:
    """The folder of the pod's first container."""
    identity = pod["status"]["containerStatuses"][0]["containerID"].removeprefix("containerd://")
    return f"{_folder(pod)}/cri-containerd-{identity}.scope"


def _values(cluster: VmCluster, folder: str, *names: str) -> dict[str, str]:
    text = cluster.guest.sh("; ".join(f"echo {name}=$(cat {folder}/{name} 2>&1)" for name in names))
    return dict(line.split("=", 1) for line in text.splitlines())


def _properties(cluster: VmCluster, unit: str, *names: str) -> dict[str, str]:
    wanted = " ".join(f"--property={name}" for name in names)
    return dict(line.split("=", 1) for line in cluster.guest.sh(f"systemctl show '{unit}' {wanted}").splitlines())


def _run(cluster: VmCluster, ns: str, **resources: dict) -> list[dict]:
    """A pod for each name, all at once; gives them as they are when Ready."""
    for name, wanted in resources.items():
        cluster.create(cluster.pod(name, ns, image=cluster.images.busybox, args=["sleep", "1d"], container={"resources": wanted}))
    return [cluster.wait_ready(name, ns, READY_SECONDS) for name in resources]


def _weight(millicores: int) -> int:
    """The agent's own map from a request to cpu.weight."""
    return 1 + (max(2, millicores * 1024 // 1000) - 2) * 9999 // 262142


def _runtime_weight(millicores: int) -> int:
    """runc's map for containers since 1.3.2."""
    shares = math.log2(max(2, millicores * 1024 // 1000))
    return math.ceil(10 ** ((shares**2 + 125 * shares) / 612 - 7 / 34))


def test_slices_of_the_node(cluster: VmCluster) -> None:
    """Made for all pods and for each class, as units of systemd, with controllers handed down and what is allocatable."""
    for unit in ("kubepods.slice", "kubepods-burstable.slice", "kubepods-besteffort.slice"):
        assert _properties(cluster, unit, "ActiveState") == {"ActiveState": "active"}, unit
    status = cluster.node()["status"]
    found = _values(cluster, ROOT, "memory.max", "cpu.weight", "cgroup.subtree_control")
    assert int(found["memory.max"]) == int(status["capacity"]["memory"].removesuffix("Ki")) * 1024, found
    assert int(found["cpu.weight"]) == _weight(1000 * int(status["capacity"]["cpu"])), found
    assert {"cpu", "memory", "pids", "hugetlb"} <= set(found["cgroup.subtree_control"].split()), found
    assert _values(cluster, f"{ROOT}/kubepods-besteffort.slice", "cpu.weight") == {"cpu.weight": "1"}


def test_pods_are_in_the_slices_of_their_class(cluster: VmCluster) -> None:
    with cluster.namespace("vm-slices") as ns:
        for pod in _run(cluster, ns, guaranteed=GUARANTEED, burstable=BURSTABLE, besteffort={}):
            name = pod["metadata"]["name"]
            assert pod["status"]["qosClass"].lower() == name
            assert _properties(cluster, _slice(pod), "ActiveState") == {"ActiveState": "active"}, name
            folders = cluster.guest.sh(f"cd {_folder(pod)} && ls -d *.scope").split()
            assert len(folders) == 2 and _container(pod).rpartition("/")[2] in folders, f"sandbox and container: {folders}"
            assert cluster.guest.read(f"{_container(pod)}/cgroup.procs"), f"no process of {name} there"
        units = [_slice(pod) for pod in cluster.list("pods", ns)]
        burstable = _values(cluster, f"{ROOT}/kubepods-burstable.slice", "cpu.weight")
        assert int(burstable["cpu.weight"]) >= _weight(250), burstable
    for unit in units:
        cluster.wait(lambda: not cluster.guest.sh(f"find {ROOT} -name '{unit}'"), 60, f"{unit} is gone with its pod", interval=1)


def test_limits_of_pod_and_container(cluster: VmCluster) -> None:
    """In the files, and in systemd's unit, which would else write over them."""
    with cluster.namespace("vm-limits") as ns:
        [pod] = _run(cluster, ns, limited=BURSTABLE)
        names = ("memory.max", "cpu.max", "cpu.weight", "pids.max")
        limits = {"memory.max": str(128 * MIB), "cpu.max": "50000 100000"}
        of_pod = _values(cluster, _folder(pod), *names)
        assert of_pod == {**limits, "cpu.weight": str(_weight(250)), "pids.max": str(PODS_LIMIT)}, of_pod
        of_container = _values(cluster, _container(pod), *names, "memory.oom.group")
        weight = int(of_container.pop("cpu.weight"))
        assert weight in (_weight(250), _runtime_weight(250)), weight
        assert {**of_container, "pids.max": ""} == {**limits, "memory.oom.group": "1", "pids.max": ""}, of_container
        unit = _properties(cluster, _slice(pod), "MemoryMax", "CPUQuotaPerSecUSec", "CPUWeight", "TasksMax")
        assert unit == {"MemoryMax": str(128 * MIB), "CPUQuotaPerSecUSec": "500ms", "CPUWeight": str(_weight(250)),
                        "TasksMax": str(PODS_LIMIT)}, unit
        cluster.guest.sh("systemctl daemon-reload")
        assert _values(cluster, _folder(pod), *names) == of_pod, "after a daemon-reload"


def test_pod_without_limits(cluster: VmCluster) -> None:
    with cluster.namespace("vm-limits") as ns:
        [pod] = _run(cluster, ns, free={})
        found = _values(cluster, _folder(pod), "memory.max", "cpu.max", "cpu.weight", "pids.max")
        assert found == {"memory.max": "max", "cpu.max": "max 100000", "cpu.weight": "1", "pids.max": str(PODS_LIMIT)}, found


def test_oom_scores_by_class(cluster: VmCluster) -> None:
    with cluster.namespace("vm-oom-score") as ns:
        capacity = int(cluster.node()["status"]["capacity"]["memory"].removesuffix("Ki")) * 1024
        scores = {"guaranteed": -997, "burstable": 1000 - 1000 * 64 * MIB // capacity, "besteffort": 1000}
        for pod in _run(cluster, ns, guaranteed=GUARANTEED, burstable=BURSTABLE, besteffort={}):
            name = pod["metadata"]["name"]
            pid = cluster.guest.read(f"{_container(pod)}/cgroup.procs").split()[0]
            assert int(cluster.guest.read(f"/proc/{pid}/oom_score_adj")) == scores[name], name
            script = f"cat {_folder(pod)}/*.scope/cgroup.procs | while read p; do echo $(cat /proc/$p/oom_score_adj) $(cat /proc/$p/comm); done"
            assert "-998 pause" in cluster.guest.sh(script).splitlines(), f"sandbox of {name}"


def test_container_over_its_memory_limit(cluster: VmCluster) -> None:
    """Exit code 137 always. The reason comes from the runtime, and it misses one now and then: when the last process of a
    scope dies, systemd may remove the cgroup before containerd has read its counters (a comment in containerd's events.go
    says so). So one of three must have it.
    """
    names = [f"greedy-{number}" for number in range(3)]
    with cluster.namespace("vm-oom") as ns:
        for name in names:
            cluster.create(cluster.pod(name, ns, image=cluster.images.busybox, restartPolicy="Never",
                                       args=["sh", "-c", "dd if=/dev/zero of=/dev/null bs=200M count=1; sleep 1d"],
                                       container={"resources": {"limits": {"memory": "32Mi"}}}))
        reasons = []
        for name in names:
            pod = cluster.wait(lambda: (pod := cluster.get("pods", name, ns))["status"]["phase"] == "Failed" and pod,
                               READY_SECONDS, f"{name} has failed")
            state = pod["status"]["containerStatuses"][0]["state"]["terminated"]
            assert state["exitCode"] == 137, state
            reasons.append(state["reason"])
        print(f"       reasons: {', '.join(reasons)}")
        assert "OOMKilled" in reasons and set(reasons) <= {"OOMKilled", "Error"}, reasons


def test_hugepage_limits(cluster: VmCluster) -> None:
    assert cluster.node()["status"]["allocatable"]["hugepages-2Mi"] == "32Mi"
    with cluster.namespace("vm-hugepages") as ns:
        huge, plain = _run(cluster, ns, plain=GUARANTEED, huge={"limits": {**GUARANTEED["limits"], "hugepages-2Mi": "4Mi"}})[::-1]
        for folder in (_folder(huge), _container(huge)):
            found = _values(cluster, folder, "hugetlb.2MB.max")
            assert found == {"hugetlb.2MB.max": str(4 * MIB)}, (folder, found)
        assert _values(cluster, _container(plain), "hugetlb.2MB.max") == {"hugetlb.2MB.max": "0"}
