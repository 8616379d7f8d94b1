"""The life of pods and containers: order, restarts, exit codes, graceful ends, events, logs, exec, and volumes that follow."""

import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from e2e.harness import tools
from e2e.harness.cluster import Cluster
from e2e.harness.steps import CommandFailed

# Seconds. The kubelet looks at volumes every minute or so; rkubelet is told of changes.
BOUNDS = {
    "kubelet": {"volume follows its object": 120, "end after the grace period": 8},
    "rkubelet": {"volume follows its object": 1.0, "end after the grace period": 3},
}

# A pod that has just become Ready is looked at again anyway; a change must be seen when nothing else happens.
SETTLE_SECONDS = 3


def _bound(cluster: Cluster, what: str) -> float:
    return BOUNDS[cluster.agent.kind][what]


def _shell(cluster: Cluster, name: str, ns: str, script: str, container: dict | None = None, **spec: object) -> dict:
    """A busybox pod that runs a script; its node is named, so only the agent decides when it runs."""
    return cluster.pod(name, ns, image=cluster.images.busybox, args=["sh", "-c", script], container=container,
                       nodeName=cluster.node_name, **spec)


def _status(cluster: Cluster, name: str, ns: str) -> dict:
    """The status of the pod's first container, with the pod's phase in it; empty while there is none."""
    status = cluster.get("pods", name, ns)["status"]
    containers = status.get("containerStatuses", [])
    return {**containers[0], "phase": status["phase"]} if containers else {}


def _events(cluster: Cluster, ns: str, pod: str) -> list[tuple[str, str]]:
    return [(event["reason"], event.get("message", "")) for event in cluster.list("events", ns)
            if event["involvedObject"]["name"] == pod]


# Restarts


def test_restart_policies_and_exit_codes(cluster: Cluster) -> None:
    ends = {("Never", 0): "Succeeded", ("Never", 3): "Failed", ("OnFailure", 0): "Succeeded"}
    again = [("OnFailure", 3), ("Always", 0), ("Always", 3)]
    with cluster.namespace("restarts") as ns:
        for policy, code in [*ends, *again]:
            cluster.create(_shell(cluster, f"{policy.lower()}-{code}", ns, f"exit {code}", restartPolicy=policy))
        for (policy, code), phase in ends.items():
            name = f"{policy.lower()}-{code}"
            status = cluster.wait(lambda: (s := _status(cluster, name, ns)) and s["phase"] == phase and s, 40, f"{name} is {phase}")
            ended = status["state"]["terminated"]
            assert (ended["exitCode"], status["restartCount"]) == (code, 0), status
            assert ended["reason"] == ("Completed" if code == 0 else "Error"), status
        for policy, code in again:
            name = f"{policy.lower()}-{code}"
            status = cluster.wait(lambda: (s := _status(cluster, name, ns)) and s["restartCount"] and s, 40, f"{name} runs again")
            assert status["lastState"]["terminated"]["exitCode"] == code, status
            assert status["phase"] == "Running", status


def test_crash_loop_backs_off(cluster: Cluster) -> None:
    with cluster.namespace("crash-loop") as ns:
        uid = cluster.create(_shell(cluster, "crash", ns, "exit 7"))["metadata"]["uid"]

        def waiting() -> dict | None:
            status = _status(cluster, "crash", ns)
            return status if status.get("state", {}).get("waiting", {}).get("reason") == "CrashLoopBackOff" else None

        first = cluster.wait(waiting, 30, "the container waits in CrashLoopBackOff")
        assert first["restartCount"] == 1, first
        where = f"pod=crash_{ns}({uid})"
        assert first["state"]["waiting"]["message"] == f"back-off 10s restarting failed container=main {where}", first
        assert first["lastState"]["terminated"]["exitCode"] == 7, first
        event = ("BackOff", f"Back-off restarting failed container main in pod crash_{ns}({uid})")
        cluster.wait(lambda: event in _events(cluster, ns, "crash"), 20, f"the event {event}")
        cluster.wait(lambda: _status(cluster, "crash", ns)["restartCount"] == 2, 30, "the next try comes")
        second = cluster.wait(waiting, 30, "it waits again")
        assert "back-off 20s " in second["state"]["waiting"]["message"], second


# Order


def test_init_containers_and_sidecar_come_in_order(cluster: Cluster) -> None:
    mount = {"volumeMounts": [{"name": "seen", "mountPath": "/seen"}]}

    def container(name: str, script: str, **more: object) -> dict:
        return {"name": name, "image": cluster.images.busybox, "imagePullPolicy": "IfNotPresent",
                "command": ["sh", "-c", f"echo {name} >> /seen/order; {script}"], **mount, **more}

    # The sidecar is slow to be up, and the next container must wait for that.
    sidecar = container("sidecar", "trap 'echo told to stop; exit 0' TERM; sleep 1.5; touch /seen/up; sleep 1d & wait",
                        restartPolicy="Always",
                        startupProbe={"exec": {"command": ["test", "-e", "/seen/up"]}, "periodSeconds": 1})
    with cluster.namespace("order") as ns:
        pod = cluster.pod("order", ns, restartPolicy="Never", terminationGracePeriodSeconds=10,
                          volumes=[{"name": "seen", "emptyDir": {}}],
                          initContainers=[container("first", "exit 0"), sidecar,
                                          container("second", "test -e /seen/up && echo up >> /seen/order")])
        pod["spec"]["containers"] = [container("main", "cat /seen/order")]
        cluster.create(pod)
        cluster.wait(lambda: cluster.get("pods", "order", ns)["status"]["phase"] == "Succeeded", 60, "the pod has succeeded")
        seen = cluster.kubectl("logs", "-n", ns, "order", "-c", "main").split()
        assert seen == ["first", "sidecar", "second", "up", "main"], seen
        assert cluster.kubectl("logs", "-n", ns, "order", "-c", "sidecar").split("\n")[0] == "told to stop"
        statuses = {s["name"]: s for s in cluster.get("pods", "order", ns)["status"]["initContainerStatuses"]}
        assert list(statuses) == ["first", "sidecar", "second"], statuses
        assert all(s["state"]["terminated"]["exitCode"] == 0 and s["restartCount"] == 0 for s in statuses.values()), statuses


def test_failing_init_container_holds_the_pod(cluster: Cluster) -> None:
    with cluster.namespace("order") as ns:
        init = {"name": "init", "image": cluster.images.busybox, "command": ["sh", "-c", "exit 5"]}
        cluster.create(_shell(cluster, "never", ns, "sleep 1d", restartPolicy="Never", initContainers=[init]))
        cluster.wait(lambda: cluster.get("pods", "never", ns)["status"]["phase"] == "Failed", 30, "the pod has failed")
        status = cluster.get("pods", "never", ns)["status"]
        assert status["initContainerStatuses"][0]["state"]["terminated"]["exitCode"] == 5, status
        assert status["containerStatuses"][0]["state"]["waiting"]["reason"] == "PodInitializing", status


# The end


def test_deletion_runs_prestop_then_sends_sigterm(cluster: Cluster) -> None:
    script = "trap 'echo SIGTERM; exit 0' TERM; echo up; while :; do sleep 0.1; done"
    prestop = {"lifecycle": {"preStop": {"exec": {"command": ["sh", "-c", "echo preStop begins > /proc/1/fd/1; sleep 1; "
                                                              "echo preStop ends > /proc/1/fd/1"]}}}}
    with cluster.namespace("grace") as ns:
        cluster.create(_shell(cluster, "polite", ns, script, prestop, terminationGracePeriodSeconds=20))
        cluster.wait_ready("polite", ns)
        with _following(cluster, ns, "polite") as follower, cluster.watch("pods", ns) as watch:
            assert follower.stdout.readline() == "up\n"
            cluster.delete("pods", "polite", ns, wait=False)
            last = watch.until(lambda event: event.type == "DELETED", 20).object
            lines = follower.stdout.read().splitlines()
        assert lines == ["preStop begins", "preStop ends", "SIGTERM"], lines
        ended = last["status"]["containerStatuses"][0]["state"]["terminated"]
        assert (ended["exitCode"], ended["reason"]) == (0, "Completed"), last["status"]


def test_deaf_container_is_killed_after_the_grace_period(cluster: Cluster) -> None:
    with cluster.namespace("grace") as ns, cluster.watch("pods", ns) as watch:
        cluster.create(_shell(cluster, "deaf", ns, "trap '' TERM; while :; do sleep 0.1; done", terminationGracePeriodSeconds=3))
        cluster.wait_ready("deaf", ns)
        begin = time.monotonic()
        cluster.delete("pods", "deaf", ns, wait=False)
        gone = watch.until(lambda event: event.type == "DELETED", 40)
        took, slack = gone.time - begin, _bound(cluster, "end after the grace period")
        assert 2.9 <= took <= 3 + slack, f"gone after {took:.2f} s"
        ended = gone.object["status"]["containerStatuses"][0]["state"]["terminated"]
        assert ended["exitCode"] == 137, ended


# What the agent says about it


def test_events_of_a_plain_life(cluster: Cluster) -> None:
    with cluster.namespace("events") as ns:
        cluster.create(cluster.pod("plain", ns, nodeName=cluster.node_name))
        cluster.wait_ready("plain", ns)
        cluster.delete("pods", "plain", ns)
        image = cluster.images.agnhost
        expected = [
            ("Pulled", f'Container image "{image}" already present on machine and can be accessed by the pod'),
            ("Created", "Container created"),
            ("Started", "Container started"),
            ("Killing", "Stopping container main"),
        ]
        cluster.wait(lambda: set(expected) <= set(_events(cluster, ns, "plain")), 20, f"the events {expected}")
        events = _events(cluster, ns, "plain")
        assert sorted(events) == sorted(expected), events


def test_image_is_pulled_with_events(cluster: Cluster) -> None:
    image = f"{cluster.registry}/pause:3.10.2"
    with cluster.namespace("events") as ns:
        cluster.create(cluster.pod("pulled", ns, image=image, args=[], container={"imagePullPolicy": "Always"}))
        cluster.wait_ready("pulled", ns)
        cluster.wait(lambda: ("Pulling", f'Pulling image "{image}"') in _events(cluster, ns, "pulled"), 10, "the event Pulling")
        pulled = cluster.wait(lambda: [text for reason, text in _events(cluster, ns, "pulled") if reason == "Pulled"], 10, "Pulled")
        assert pulled[0].startswith(f'Successfully pulled image "{image}" in ') and "Image size: " in pulled[0], pulled


# Logs and exec


def _following(cluster: Cluster, ns: str, pod: str) -> subprocess.Popen:
    environment = {**os.environ, "KUBECONFIG": str(cluster.admin_kubeconfig)}
    return subprocess.Popen([tools.path("kubectl"), "logs", "-f", "-n", ns, pod], env=environment, text=True,
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_logs_of_now_before_and_from_now_on(cluster: Cluster) -> None:
    script = ("echo first line; while [ ! -e /tmp/say ]; do sleep 0.05; done; echo second line; "
              "while [ ! -e /tmp/end ]; do sleep 0.05; done; exit 4")
    with cluster.namespace("logs") as ns:
        cluster.create(_shell(cluster, "talker", ns, script))
        cluster.wait_ready("talker", ns)
        with _following(cluster, ns, "talker") as follower:
            assert follower.stdout.readline() == "first line\n"
            cluster.kubectl("exec", "-n", ns, "talker", "--", "touch", "/tmp/say")
            assert follower.stdout.readline() == "second line\n"
            assert cluster.kubectl("logs", "-n", ns, "talker", "--tail=1") == "second line\n"
            cluster.kubectl("exec", "-n", ns, "talker", "--", "touch", "/tmp/end")
            assert follower.stdout.read() == "", "the stream ends with the container"
        cluster.wait(lambda: _status(cluster, "talker", ns)["restartCount"] == 1, 30, "it runs again")
        assert cluster.kubectl("logs", "-p", "-n", ns, "talker").splitlines() == ["first line", "second line"]
        cluster.wait(lambda: cluster.kubectl("logs", "-n", ns, "talker") == "first line\n", 10, "the new container's log")


def test_exec_gives_stdin_both_outputs_and_the_exit_code(cluster: Cluster) -> None:
    with cluster.namespace("exec") as ns:
        cluster.create(_shell(cluster, "shell", ns, "sleep 1d"))
        cluster.wait_ready("shell", ns)
        sent = "".join(f"line {number}\n" for number in range(5000))
        assert cluster.kubectl("exec", "-i", "-n", ns, "shell", "--", "cat", input=sent) == sent
        try:
            cluster.kubectl("exec", "-n", ns, "shell", "--", "sh", "-c", "echo out; echo err >&2; exit 42")
        except CommandFailed as failure:
            assert failure.code == 42, failure
            assert "out" in failure.output and "err" in failure.output, failure
        else:
            raise AssertionError("exit code 42 was lost")


# Volumes


def test_volumes_follow_configmap_and_secret(cluster: Cluster) -> None:
    with cluster.namespace("refresh") as ns:
        for kind, field in (("ConfigMap", "data"), ("Secret", "stringData")):
            cluster.create({"apiVersion": "v1", "kind": kind, "metadata": {"name": "text", "namespace": ns},
                            field: {"text": "old"}})
        volumes = [{"name": "config", "configMap": {"name": "text"}}, {"name": "secret", "secret": {"secretName": "text"}}]
        mounts = [{"name": name, "mountPath": f"/{name}"} for name in ("config", "secret")]
        pod = cluster.create(_shell(cluster, "reader", ns, "sleep 1d", {"volumeMounts": mounts}, volumes=volumes))
        cluster.wait_ready("reader", ns)
        top = cluster.root_dir / "pods" / pod["metadata"]["uid"] / "volumes"
        files = {"configmaps": top / "kubernetes.io~configmap/config/text", "secrets": top / "kubernetes.io~secret/secret/text"}
        time.sleep(SETTLE_SECONDS)
        with ThreadPoolExecutor() as pool:
            tooks = {kind: pool.submit(_seconds_until_new, cluster, ns, kind, field, files[kind])
                     for kind, field in (("configmaps", "data"), ("secrets", "stringData"))}
        for kind, took in tooks.items():
            print(f"       {kind}: {took.result():.2f} s")
            assert took.result() <= _bound(cluster, "volume follows its object"), f"{kind}: {took.result():.2f} s"
        for mount in ("config", "secret"):
            assert cluster.kubectl("exec", "-n", ns, "reader", "--", "cat", f"/{mount}/text") == "new"


def _seconds_until_new(cluster: Cluster, ns: str, kind: str, field: str, file: Path) -> float:
    """The file on the host is the one that is mounted into the container."""
    begin = time.monotonic()
    cluster.api.patch(cluster.path(kind, ns, "text"), {field: {"text": "new"}})
    cluster.wait(lambda: file.read_text() == "new", 150, f"{file} is new", interval=0.01)
    return time.monotonic() - begin
