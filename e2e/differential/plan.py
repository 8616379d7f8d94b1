"""What a generated pod does, as data: each container's runs, hooks and probes, and the stages of the pod's life.

Pure. `generate` makes these, `render` makes a pod's manifest of them, `runner` waits for their stages.
"""

from dataclasses import dataclass, field

INIT, SIDECAR, MAIN = "init", "sidecar", "main"
LIVENESS, READINESS, STARTUP = "livenessProbe", "readinessProbe", "startupProbe"
POST_START, PRE_STOP = "postStart", "preStop"

# How one start of a container goes.
EXIT = "exit"  # ends by itself with `code`
HOLD = "hold"  # runs until it is told to stop
UNWELL = "unwell"  # its liveness probe passes, then fails
NEVER_UP = "never up"  # its startup probe never passes
HOOK_FAILS = "hook fails"  # its postStart hook fails
LOSES_READINESS = "loses readiness"  # its readiness probe passes, then fails
NEVER_READY = "never ready"


@dataclass(frozen=True)
class Run:
    kind: str
    code: int = 0
    message: str = ""  # to the termination message file; of runs that exit


@dataclass(frozen=True)
class Hook:
    kind: str  # exec, httpGet, sleep
    works: bool = True
    hangs: bool = False  # preStop: never ends by itself; postStart: takes long; of kind exec


@dataclass(frozen=True)
class Probe:
    kind: str  # exec, httpGet, tcpSocket
    threshold: int = 1  # failureThreshold
    late: bool = False  # of a startup probe: passes only after it failed at least once


@dataclass(frozen=True)
class Container:
    name: str
    role: str
    runs: tuple[Run, ...]  # the last one repeats if there are more starts
    on_term: int | None = 0  # exit code when it is told to stop; None: it is deaf and must be killed
    hooks: dict[str, Hook] = field(default_factory=dict)  # by POST_START, PRE_STOP
    probes: dict[str, Probe] = field(default_factory=dict)  # by LIVENESS, READINESS, STARTUP
    policy: str | None = None  # the container's own restartPolicy, main containers only
    restart_on: tuple[int, ...] = ()  # exit codes of a restartPolicyRule
    log_fallback: bool = False  # terminationMessagePolicy FallbackToLogsOnError
    cannot_start: str = ""  # one of render.CANNOT_START

    def run(self, number: int) -> Run:
        return self.runs[min(number, len(self.runs) - 1)]


# States that a stage can ask of a container.
RUNNING, TERMINATED, WAITING = "running", "terminated", "waiting"


@dataclass(frozen=True)
class Expected:
    """What a stage asks of one container's status. None: anything."""

    state: str
    restarts: int | None = None
    ready: bool | None = None
    started: bool | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Stage:
    """A state of the pod that can be observed; a pod's stages are reached one after another."""

    containers: dict[str, Expected] = field(default_factory=dict)
    phase: str | None = None  # alternatives with |
    reason: str | None = None
    sandbox_gone: bool = False  # condition PodReadyToStartContainers is False
    events: tuple[tuple[str, str], ...] = ()  # (reason, container) that were seen
    mark: str = ""  # a file that the pod has made in its folder on the host


@dataclass(frozen=True)
class Plan:
    """A pod. When the last of its stages is reached its state is kept and it is deleted."""

    number: int
    kind: str  # one of generate.KINDS
    policy: str
    containers: tuple[Container, ...]  # in the order of the spec; init and sidecar containers first
    stages: tuple[Stage, ...]
    grace: int  # terminationGracePeriodSeconds
    delete_grace: int | None = None  # of the deletion, instead
    deadline: int | None = None  # activeDeadlineSeconds
    wrong_node: bool = False  # a node selector that this node does not have
    loose: bool = False  # deleted in the middle of its start: how far it came is chance

    @property
    def name(self) -> str:
        return f"pod-{self.number:03}"

    def meant_to_fail(self) -> set[tuple[str, str]]:
        """(container, probe) of the probes that fail by intent."""
        broken = {UNWELL: LIVENESS, NEVER_UP: STARTUP, LOSES_READINESS: READINESS, NEVER_READY: READINESS}
        failing = {(container.name, broken[run.kind]) for container in self.containers for run in container.runs if run.kind in broken}
        return failing | {(c.name, which) for c in self.containers for which, probe in c.probes.items() if probe.late}

    def of(self, *roles: str) -> list[Container]:
        return [container for container in self.containers if container.role in roles]
