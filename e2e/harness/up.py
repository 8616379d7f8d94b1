"""`up`, `down`, `status`, and swapping the agent: the order in which things happen."""

import shutil
from pathlib import Path

from e2e.harness import addons, agent, cleanup, controlplane, images, layout, preflight, processes, runtime, snapshot, tools, vm
from e2e.harness.cluster import Cluster
from e2e.harness.controlplane import API_SERVER, CONTROLLER_MANAGER, ETCD, KUBE_PROXY, SCHEDULER
from e2e.harness.runtime import CONTAINERD, REGISTRY
from e2e.harness.steps import say, step
from e2e.harness.versions import PROGRAMS_FOR_UP

SERVICES = [CONTAINERD, REGISTRY, ETCD, API_SERVER, CONTROLLER_MANAGER, SCHEDULER, KUBE_PROXY]
# While these live the cluster is adopted as it is; without one of them its pods and data are not worth keeping.
HEART = [CONTAINERD, ETCD, API_SERVER]


def up() -> None:
    kind = agent.wanted_kind()
    running = all(service.alive() for service in HEART)
    cold = any(not tools.location(name).exists() for name in _programs(kind))
    preflight.check(kind, cold)
    traces = layout.STATE.exists() or layout.RUN.exists() or bool(snapshot.our_pids())
    if traces and not running:
        say("an earlier run has left things behind without a running cluster: removing them")
        down(proving=False)
    if not running:
        preflight.check_room()
    preflight.install_packages()
    tools.build(PROGRAMS_FOR_UP)
    agent.build(kind)
    images.build()
    if not running:
        processes.rotate_logs()
        snapshot.write(snapshot.take())
    _start()
    _start_agent(kind)
    KUBE_PROXY.start()  # only now: it gives up if its node does not exist 30 s after its start
    cluster = Cluster.load()
    with step("CoreDNS and the demo pod"):
        addons.install_dns(cluster)
        addons.run_demo(cluster)
        addons.wait_dns(cluster)
    addons.show(cluster)


def _programs(kind: str) -> list[str]:
    return PROGRAMS_FOR_UP + (["kubelet"] if kind == "kubelet" else [])


def _start() -> None:
    with step("starting containerd and the registry"):
        runtime.configure()
        for name in ("net/ipv4/ip_forward", "net/bridge/bridge-nf-call-iptables"):
            path = Path("/proc/sys") / name
            if path.exists():
                path.write_text("1")
        CONTAINERD.start()
        REGISTRY.start()
    with step("making certificates and kubeconfigs"):
        controlplane.make_certificates()
    with step("starting etcd and kube-apiserver"):
        ETCD.start()
        API_SERVER.start()
        controlplane.grant_what_kubeadm_grants()
    with step("starting kube-controller-manager and kube-scheduler"):
        CONTROLLER_MANAGER.start()
        SCHEDULER.start()
    runtime.load_images()


def _start_agent(kind: str) -> None:
    current = agent.Agent()
    if current.is_current(kind):
        say(f"{kind} runs already (pid {current.pid()})")
    else:
        with step(f"starting {kind}"):
            current.switch(kind)
    with step("the node becomes Ready"):
        Cluster.load().wait_node_ready(90)


def swap_agent() -> None:
    """Only the agent, on a running cluster."""
    kind = agent.wanted_kind()
    Cluster.load()
    agent.build(kind)
    _start_agent(kind)


def down(proving: bool = True) -> bool:
    before = snapshot.read()
    if before is None and not (layout.STATE.exists() or layout.RUN.exists() or snapshot.our_pids()):
        say("nothing of ours is here")
        return True
    vm.stop()
    with step("stopping the agent and the control plane"):
        current = agent.Agent()
        if current.alive():
            current.stop()
        for service in reversed(SERVICES):
            service.stop(timeout=5)
    cleanup.stop_everything()
    if not proving:
        return True
    if before is None:
        say("there was no snapshot of this machine from before up, so nothing to compare with")
        return True
    return cleanup.prove(before)


def status() -> bool:
    current = agent.Agent()
    rows = [(service.name, service) for service in SERVICES]
    if layout.AGENT.exists() and (layout.AGENT / "kind").exists():
        rows.append((f"agent: {current.kind}", current))
    healthy = True
    for name, service in rows:
        alive = service.alive()
        healthy &= alive
        detail = f"pid {service.pid()}, {service.rss_kib() // 1024} MiB, {service.cpu_seconds():.1f} s CPU" if alive else ""
        print(f"{name:26} {'running' if alive else 'STOPPED':8} {detail}")
    if API_SERVER.alive():
        print(Cluster.load().kubectl("get", "nodes,pods", "--all-namespaces", "-o", "wide"))
    print(f"logs: {layout.LOGS}   free on {layout.STATE.parent}: {shutil.disk_usage(layout.STATE.parent).free / 2**30:.1f} GiB")
    return healthy
