"""A plan as a pod's manifest, with the shell script that each container runs. Pure.

Every start of a container writes what it does as lines `uptime container start what` to the pod's `order` file, which lies on
the host so that it outlives the pod, and the same text without the time to its log. What a later start shall do differently
it learns from marks in the same folder. Waits are for marks wherever something else has to come first.
"""

from dataclasses import dataclass
from pathlib import Path

from e2e.differential.plan import (
    EXIT, HOOK_FAILS, LIVENESS, LOSES_READINESS, MAIN, NEVER_READY, NEVER_UP, POST_START, PRE_STOP, READINESS, SIDECAR, STARTUP,
    UNWELL, Container, Hook, Plan, Probe, Run)

REFUSING_PORT = 1  # nothing listens there
FIRST_PORT, PORTS_EACH = 8000, 10
WHICH = (LIVENESS, READINESS, STARTUP)
# What keeps a container from starting -> fields of the container that do it.
CANNOT_START = {
    "image never": {"image": "registry.k8s.io/not-here:1", "imagePullPolicy": "Never"},
    "no such image": {"image": "127.0.0.1:5000/not-here:1", "imagePullPolicy": "IfNotPresent"},
    "bad image name": {"image": "Not/A:Name:At/All"},
    "no config map": {"envFrom": [{"configMapRef": {"name": "not-here"}}]},
    "no secret key": {"env": [{"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "not-here", "key": "key"}}}]},
    "no such command": {"command": ["/not/here"], "args": []},
}


@dataclass(frozen=True)
class Site:
    """Where the pods run."""

    namespace: str
    node: str
    image: str  # one with sh, httpd and test
    life: Path  # on the node; each pod has a folder of its name there
    hook_host: str  # of the server that httpGet hooks ask
    hook_port: int


def manifest(plan: Plan, site: Site) -> dict:
    rendered = {container.name: _container(plan, index, container, site) for index, container in enumerate(plan.containers)}
    spec: dict = {
        "restartPolicy": plan.policy,
        "terminationGracePeriodSeconds": plan.grace,
        "nodeName": site.node,
        "automountServiceAccountToken": False,
        "initContainers": [rendered[container.name] for container in plan.containers if container.role != MAIN],
        "containers": [rendered[container.name] for container in plan.containers if container.role == MAIN],
        "volumes": [{"name": "life", "hostPath": {"path": str(site.life / plan.name), "type": "DirectoryOrCreate"}}],
    }
    if plan.deadline:
        spec["activeDeadlineSeconds"] = plan.deadline
    if plan.wrong_node:
        spec["nodeSelector"] = {"differential": "not-this-node"}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": plan.name, "namespace": site.namespace,
                                                           "labels": {"differential": plan.kind.replace(" ", "-")}}, "spec": spec}


def _container(plan: Plan, index: int, container: Container, site: Site) -> dict:
    first_port = FIRST_PORT + PORTS_EACH * index
    rendered: dict = {
        "name": container.name,
        "image": site.image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["sh", "-c", script(plan, container, first_port)],
        "volumeMounts": [{"name": "life", "mountPath": "/life"}],
    }
    if container.role == SIDECAR:
        rendered["restartPolicy"] = "Always"
    if container.policy:
        rendered["restartPolicy"] = container.policy
    if container.restart_on:
        rendered["restartPolicyRules"] = [{"action": "Restart", "exitCodes": {"operator": "In", "values": list(container.restart_on)}}]
    if container.log_fallback:
        rendered["terminationMessagePolicy"] = "FallbackToLogsOnError"
    if container.hooks:
        rendered["lifecycle"] = {which: _hook(plan, container, which, hook, site) for which, hook in container.hooks.items()}
    for which, probe in container.probes.items():
        rendered[which] = _probe(which, probe, first_port + WHICH.index(which))
    return {**rendered, **CANNOT_START.get(container.cannot_start, {})}


def _hook(plan: Plan, container: Container, which: str, hook: Hook, site: Site) -> dict:
    if hook.kind == "sleep":
        return {"sleep": {"seconds": 1}}
    if hook.kind == "httpGet":
        port = site.hook_port if hook.works else REFUSING_PORT
        return {"httpGet": {"host": site.hook_host, "port": port, "path": f"/{plan.name}/{container.name}/{which}"}}
    return {"exec": {"command": ["sh", "-c", _hook_script(container, which, hook)]}}


def _hook_script(container: Container, which: str, hook: Hook) -> str:
    name = container.name
    lines = [f"read up _ < /proc/uptime; echo $up {name} hook {which} >> /life/order"]
    if hook.hangs:
        # The Go kubelet does nothing else with a pod before its postStart hooks have ended, not even with a deleted one.
        return "; ".join([*lines, f": > /life/{name}.{which}.hangs", f"sleep {8 if which == POST_START else 600}"])
    if which == POST_START:
        # The start that this hook belongs to; the container must be able to take a signal when a failed hook ends it.
        lines.insert(0, f"n=0; while [ -e /life/{name}.$n.hook ]; do n=$((n+1)); done; : > /life/{name}.$n.hook; "
                        f"until [ -e /life/{name}.$n.up ]; do sleep 0.05; done")
        if not hook.works:
            failing = [str(number) for number in range(len(container.runs)) if container.run(number).kind == HOOK_FAILS]
            always = container.runs[-1].kind == HOOK_FAILS
            lines.append("exit 1" if always else f"case $n in {'|'.join(failing)}) echo no; exit 1;; esac")
        lines.append(f": > /life/{name}.$n.hooked")
    elif not hook.works:
        lines.append("exit 7")
    return "; ".join(lines)


def _probe(which: str, probe: Probe, port: int) -> dict:
    action = {
        "exec": {"exec": {"command": ["test", "-e", f"/tmp/{which}/ok"]}},
        "httpGet": {"httpGet": {"port": port, "path": "/ok"}},
        "tcpSocket": {"tcpSocket": {"port": port}},
    }[probe.kind]
    # A second for what the probe asks to be there; a long timeout, so that a slow machine fails no probe.
    return {**action, "periodSeconds": 1, "initialDelaySeconds": 1, "timeoutSeconds": 20, "failureThreshold": probe.threshold}


# The script


def script(plan: Plan, container: Container, first_port: int) -> str:
    name = container.name
    ports = {which: first_port + WHICH.index(which) for which in container.probes}
    trap = "trap '' TERM" if container.on_term is None else f"trap 'say told to stop; end {container.on_term}' TERM"
    lines = [
        f"n=0; while [ -e /life/{name}.$n ]; do n=$((n+1)); done; : > /life/{name}.$n",
        f'say() {{ read up _ < /proc/uptime; echo "$up {name} $n $*" >> /life/order; echo "{name} $n $*"; }}',
        'end() { say "ends $1"; exit $1; }',
        "nap() { sleep $1 & wait $!; }",
        "hold() { while :; do nap 600; done; }",
        f"after() {{ i=0; until [ -e /life/$1 ] || [ $i = {MAX_NAPS} ]; do nap 0.1; i=$((i+1)); done; }}",
        trap,
        "say starts",
    ]
    lines += [line for which, probe in container.probes.items() for line in _serve(which, probe, ports[which])]
    lines.append(f": > /life/{name}.$n.up")
    cases = [_run(plan, container, number, run, ports) for number, run in enumerate(container.runs)]
    numbers = [str(number) for number in range(len(cases) - 1)] + ["*"]
    lines += ["case $n in", *(f"{number}) {case} ;;" for number, case in zip(numbers, cases)), "esac"]
    return "\n".join(lines)


MAX_NAPS = 600  # of a tenth of a second: nothing waits for ever


def _serve(which: str, probe: Probe, port: int) -> list[str]:
    folder = f"/tmp/{which}"
    if probe.kind == "exec":
        return [f"mkdir -p {folder}"]
    return [f"mkdir -p {folder}",
            f"serve_{which}() {{ httpd -f -p {port} -h {folder} & server_{which}=$!; disown; }}"]


def _up(which: str, probe: Probe) -> str:
    """From now on this probe passes."""
    return f": > /tmp/{which}/ok" + ("" if probe.kind == "exec" else f"; serve_{which}")


def _down(which: str, probe: Probe) -> str:
    return f"kill -9 $server_{which}" if probe.kind == "tcpSocket" else f"rm /tmp/{which}/ok"


def _run(plan: Plan, container: Container, number: int, run: Run, ports: dict[str, int]) -> str:
    steps = []
    probes = container.probes
    broken = {UNWELL: LIVENESS, NEVER_UP: STARTUP, LOSES_READINESS: READINESS, NEVER_READY: READINESS}.get(run.kind)
    for which, probe in probes.items():
        if which == broken and run.kind in (NEVER_UP, NEVER_READY):
            # An HTTP probe gets an answer, a wrong one; the others find nothing.
            steps.append(f"serve_{which}" if probe.kind == "httpGet" else "true")
        elif not probe.late:
            steps.append(_up(which, probe))
    steps += [f"nap 3; {_up(which, probe)}" for which, probe in probes.items() if probe.late]
    if container.role == SIDECAR and run.kind in (EXIT, UNWELL):
        # A sidecar that is gone before the agent saw it running would hold back the next container or not, by chance.
        steps.append(f"after {_follower(plan, container)}.0.up")
    if run.kind == EXIT:
        hook = container.hooks.get(POST_START)
        if hook and hook.works:
            steps.append("nap 2.5" if hook.kind == "sleep" else f"after {container.name}.$n.hooked")
        if run.message:
            steps.append(f"printf '{run.message}' > /dev/termination-log".replace("\n", "\\n"))
        if container.log_fallback:
            # Lines of two streams that come at once have no order.
            steps.append("nap 0.4; echo last words >&2; nap 0.4")
        steps.append(f"nap 0.3; end {run.code}")
    elif broken and run.kind in (UNWELL, LOSES_READINESS):
        # Whoever watches makes the mark of stage 1 when it has seen the container ready.
        first = "nap 3.5" if run.kind == UNWELL else "after stage.1"
        steps.append(f"{first}; say goes bad; {_down(broken, probes[broken])}; hold")
    else:
        steps.append("hold")
    return "; ".join(steps)


def _follower(plan: Plan, container: Container) -> str:
    """Who starts only after this sidecar: the next init container or sidecar, or the main containers, of which the last counts."""
    names = [other.name for other in plan.containers if other.role != MAIN]
    later = names[names.index(container.name) + 1:]
    return later[0] if later else plan.of(MAIN)[-1].name
