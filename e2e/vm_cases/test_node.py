"""Volumes in memory, AppArmor, and a reboot of the guest."""

import json

from e2e.harness.vm import VmCluster

READY_SECONDS = 120
REBOOT_SECONDS = 300
PROFILE = "e2e-deny-write"
MIB = 1 << 20


def _exec(cluster: VmCluster, ns: str, pod: str, script: str) -> str:
    return cluster.kubectl("exec", "-n", ns, pod, "--", "sh", "-c", script).strip()


def test_memory_volume_has_its_size(cluster: VmCluster) -> None:
    """By its own limit, else by the pod's memory limit; one who writes more is told that there is no space."""
    volumes = [{"name": "own", "emptyDir": {"medium": "Memory", "sizeLimit": "8Mi"}}, {"name": "pods", "emptyDir": {"medium": "Memory"}}]
    container = {"resources": {"limits": {"memory": "64Mi", "cpu": "500m"}},
                 "volumeMounts": [{"name": volume["name"], "mountPath": f"/{volume['name']}"} for volume in volumes]}
    with cluster.namespace("vm-memory") as ns:
        cluster.create(cluster.pod("memory", ns, image=cluster.images.busybox, args=["sleep", "1d"], container=container, volumes=volumes))
        cluster.wait_ready("memory", ns, READY_SECONDS)
        found = [line.split()[:2] for line in _exec(cluster, ns, "memory", "df -k /own /pods | tail -n 2").splitlines()]
        assert found == [["tmpfs", str(8 * 1024)], ["tmpfs", str(64 * 1024)]], found
        told = _exec(cluster, ns, "memory", "dd if=/dev/zero of=/own/f bs=1M count=12 2>&1; ls -l /own/f")
        assert "No space left on device" in told and str(8 * MIB) in told, told


def test_hugepage_volume(cluster: VmCluster) -> None:
    container = {"resources": {"limits": {"cpu": "100m", "memory": "64Mi", "hugepages-2Mi": "4Mi"}},
                 "volumeMounts": [{"name": "huge", "mountPath": "/huge"}]}
    with cluster.namespace("vm-hugepages") as ns:
        cluster.create(cluster.pod("huge", ns, image=cluster.images.busybox, args=["sleep", "1d"], container=container,
                                   volumes=[{"name": "huge", "emptyDir": {"medium": "HugePages"}}]))
        cluster.wait_ready("huge", ns, READY_SECONDS)
        mount = next(line for line in _exec(cluster, ns, "huge", "cat /proc/mounts").splitlines() if " /huge " in line)
        assert mount.split()[2] == "hugetlbfs" and "pagesize=2M" in mount, mount


def test_app_armor_profiles(cluster: VmCluster) -> None:
    """The runtime's own by default, none when unconfined, a profile of the node when named: and it is enforced."""
    rules = "file, signal, network, capability, ptrace, unix, deny /tmp/** w,"  # without `signal` nothing can end it
    cluster.guest.write(f"/etc/apparmor.d/{PROFILE}", f"profile {PROFILE} flags=(attach_disconnected) {{ {rules} }}\n")
    cluster.guest.sh(f"apparmor_parser -r /etc/apparmor.d/{PROFILE}")
    profiles = {
        "default": (None, "cri-containerd.apparmor.d (enforce)"),
        "runtime": ({"type": "RuntimeDefault"}, "cri-containerd.apparmor.d (enforce)"),
        "unconfined": ({"type": "Unconfined"}, "unconfined"),
        "local": ({"type": "Localhost", "localhostProfile": PROFILE}, f"{PROFILE} (enforce)"),
    }
    with cluster.namespace("vm-apparmor") as ns:
        for name, (profile, _) in profiles.items():
            security = {"securityContext": {"appArmorProfile": profile}} if profile else {}
            cluster.create(cluster.pod(name, ns, image=cluster.images.busybox, args=["sleep", "1d"], container=security))
        for name, (_, wanted) in profiles.items():
            cluster.wait_ready(name, ns, READY_SECONDS)
            assert _exec(cluster, ns, name, "cat /proc/1/attr/current") == wanted, name
        assert "Permission denied" in _exec(cluster, ns, "local", "(echo x > /tmp/x) 2>&1 || true")
        assert _exec(cluster, ns, "default", "echo x > /tmp/x && cat /tmp/x") == "x"


def test_cgroup_version_is_reported(cluster: VmCluster) -> None:
    path = f"/api/v1/nodes/{cluster.node_name}/proxy/metrics"
    lines = cluster.kubectl("get", "--raw", path).splitlines()
    assert "kubelet_cgroup_version 2" in lines, [line for line in lines if "cgroup" in line]


def test_pods_come_back_after_a_reboot(cluster: VmCluster) -> None:
    """In new sandboxes, with their restart counted; a run-once pod that ended is not run again."""
    volumes = [{"name": "kept", "emptyDir": {}}]
    mounts = {"volumeMounts": [{"name": "kept", "mountPath": "/kept"}]}
    with cluster.namespace("vm-reboot") as ns:
        cluster.create(cluster.pod("stays", ns, image=cluster.images.busybox, container=mounts, volumes=volumes,
                                   args=["sh", "-c", "echo start >> /kept/starts; exec sleep 1d"]))
        cluster.create(cluster.pod("once", ns, image=cluster.images.busybox, args=["true"], restartPolicy="Never"))
        before = cluster.wait_ready("stays", ns, READY_SECONDS)
        ended = cluster.wait(lambda: (pod := cluster.get("pods", "once", ns))["status"]["phase"] == "Succeeded" and pod,
                             READY_SECONDS, "the run-once pod has ended")
        cluster.guest.reboot(REBOOT_SECONDS)

        def is_back() -> dict | None:
            pod = cluster.get("pods", "stays", ns)
            status = pod["status"]["containerStatuses"][0]
            ready = any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"]["conditions"])
            return pod if ready and status["containerID"] != before["status"]["containerStatuses"][0]["containerID"] else None

        after = cluster.wait(is_back, REBOOT_SECONDS, "the pod is Ready in another container", interval=1)
        cluster.wait_node_ready(60)
        status = after["status"]["containerStatuses"][0]
        assert status["restartCount"] == 1, status
        assert cluster.agent.show("NRestarts") == "0", "the agent came up at once with the guest"
        assert _exec(cluster, ns, "stays", "cat /kept/starts").split() == ["start", "start"], "an emptyDir outlives a reboot"
        assert cluster.node()["status"]["nodeInfo"]["bootID"] == cluster.guest.boot_id()
        events = [event for event in cluster.list("events", "default") if event["involvedObject"]["name"] == cluster.node_name]
        rebooted = [event["message"] for event in events if event["reason"] == "Rebooted"]
        assert f"Node {cluster.node_name} has been rebooted, boot id: {cluster.guest.boot_id()}" in rebooted, json.dumps(rebooted)
        again = cluster.get("pods", "once", ns)["status"]
        assert again["phase"] == "Succeeded", again
        assert again["containerStatuses"][0]["containerID"] == ended["status"]["containerStatuses"][0]["containerID"], again
