"""Makes plans from a seed: the same seed, the same pods. Pure.

What a pod's stages ask follows from a small model of the pod lifecycle (who is started again, what comes after what); the
runs are chosen so that each pod comes to rest in a state that lasts, or waits in a back-off long enough to be seen. So a
deletion "at a random moment" is one at a random place of the life, never one that depends on how fast an agent is.
"""

import random
from dataclasses import replace

from e2e.differential.plan import (
    EXIT, HOLD, HOOK_FAILS, INIT, LIVENESS, LOSES_READINESS, MAIN, NEVER_READY, NEVER_UP, POST_START, PRE_STOP, READINESS,
    RUNNING, SIDECAR, STARTUP, TERMINATED, UNWELL, WAITING, Container, Expected, Hook, Plan, Probe, Run, Stage)

ALWAYS, ON_FAILURE, NEVER = "Always", "OnFailure", "Never"
POLICIES = (ALWAYS, ON_FAILURE, NEVER)
FAILURES = (1, 2, 3, 42, 127, 137, 143, 255)
TERM_CODES = (0, 0, 0, 3, 143)
PROBE_KINDS = ("exec", "httpGet", "tcpSocket")
HOOK_KINDS = ("exec", "httpGet", "sleep")

# Kind of life -> its share. Where it ends is in the builder of the same name.
KINDS = {
    "completes": 26,  # all main containers end
    "stays": 30,  # comes to rest with a main container running
    "init holds": 9,  # deleted while an init container runs
    "sidecar not up": 5,  # deleted while a sidecar's startup probe holds the others back
    "crash loop": 12,  # deleted while a container waits in CrashLoopBackOff
    "unready": 6,  # a readiness probe fails
    "deadline": 3,  # activeDeadlineSeconds
    "cannot start": 7,  # image, configuration or command are not there
    "deleted at once": 4,  # right after its creation
    "rejected": 2,  # the node does not take it
    "hook hangs": 3,  # deleted while a postStart hook runs
}
GRACE_POLITE, GRACE_DEAF, DEADLINE = 20, 3, 20


def plans(seed: int, count: int) -> list[Plan]:
    """Every kind comes, in about its share; pod n of a seed is the same whatever the count."""
    return [plan(seed, number) for number in range(count)]


def plan(seed: int, number: int) -> Plan:
    rng = random.Random(f"{seed}/{number}")
    kinds = list(KINDS)
    # The first pods are one of each kind, so that small runs have all of them too.
    kind = kinds[number] if number < len(kinds) else rng.choices(kinds, KINDS.values())[0]
    made = _BUILDERS[kind](rng, number)
    deaf = any(container.on_term is None or any(hook.hangs for hook in container.hooks.values()) for container in made.containers)
    grace = GRACE_DEAF if deaf else GRACE_POLITE
    return replace(made, kind=kind, grace=grace, delete_grace=rng.choice((None, None, None, GRACE_DEAF + 1)) if deaf else None)


# Lives


def _completes(rng: random.Random, number: int) -> Plan:
    policy = rng.choice((NEVER, ON_FAILURE, NEVER, ON_FAILURE, ALWAYS))
    before = _starters(rng, policy, sidecars_restart=False)
    if policy == NEVER and before and rng.random() < 0.25:
        return _init_fails(rng, number, before)
    mains = []
    for index in range(_few(rng)):
        # In a pod that restarts always, containers complete only by a policy of their own.
        own = rng.choice((NEVER, ON_FAILURE)) if policy == ALWAYS else _own_policy(rng, (NEVER, ON_FAILURE))
        mains.append(_main(rng, index, policy, own, ends=True))
    return _plan(number, policy, before + mains, _terminal(before + mains, policy))


def _init_fails(rng: random.Random, number: int, before: list[Container]) -> Plan:
    """An init container fails for good: what follows it never runs."""
    failing = Container("failing", INIT, (Run(EXIT, rng.choice(FAILURES), _message(rng)),), log_fallback=rng.random() < 0.3)
    mains = [Container(f"main-{index}", MAIN, (Run(HOLD),)) for index in range(_few(rng))]
    expected = {**_after_start(before), "failing": Expected(TERMINATED, 0),
                **{main.name: Expected(WAITING, 0) for main in mains}}
    for container in before:
        if container.role == SIDECAR:
            expected[container.name] = Expected(TERMINATED)
    return _plan(number, NEVER, before + [failing] + mains, [Stage(expected, phase="Failed", sandbox_gone=True)])


def _stays(rng: random.Random, number: int) -> Plan:
    policy = rng.choice(POLICIES)
    before = _starters(rng, policy)
    mains = [_main(rng, index, policy, own := _own_policy(rng, POLICIES),
                   ends=index > 0 and (own or policy) != ALWAYS and rng.random() < 0.3) for index in range(_few(rng))]
    rng.shuffle(mains)
    containers = before + mains
    return _plan(number, policy, containers, [Stage(_at_rest(containers, policy), phase="Running")])


def _init_holds(rng: random.Random, number: int) -> Plan:
    policy = rng.choice(POLICIES)
    before = _starters(rng, policy)
    failures = tuple(_failing(rng) for _ in range(rng.choice((0, 0, 1, 2)) if policy != NEVER else 0))
    holding = Container("holding", INIT, (*failures, Run(HOLD)), on_term=_on_term(rng))
    later = _starters(rng, policy, prefix="later-", at_most=1)
    mains = [_main(rng, 0, policy, None, ends=False)]
    expected = {**_after_start(before), "holding": Expected(RUNNING, len(failures)),
                **{container.name: Expected(WAITING, 0) for container in later + mains}}
    return _plan(number, policy, before + [holding] + later + mains, [Stage(expected, phase="Pending")])


def _sidecar_not_up(rng: random.Random, number: int) -> Plan:
    policy = rng.choice(POLICIES)
    before = _starters(rng, policy, at_most=1)
    slow = Container("slow", SIDECAR, (Run(NEVER_UP),), on_term=_on_term(rng), hooks=_hooks(rng),
                     probes={STARTUP: Probe(rng.choice(PROBE_KINDS), threshold=100)})
    later = _starters(rng, policy, prefix="later-", at_most=1)
    mains = [_main(rng, 0, policy, None, ends=False)]
    expected = {**_after_start(before), "slow": Expected(RUNNING, 0, started=False),
                **{container.name: Expected(WAITING, 0) for container in later + mains}}
    stage = Stage(expected, phase="Pending", events=(("Unhealthy", "slow"),))
    return _plan(number, policy, before + [slow] + later + mains, [stage])


def _crash_loop(rng: random.Random, number: int) -> Plan:
    policy = rng.choice((ALWAYS, ALWAYS, ON_FAILURE))
    role = rng.choice((MAIN, MAIN, MAIN, INIT, SIDECAR))
    restarts = rng.choice((1, 2))
    hooks, on_term, runs = {}, 0, (_failing(rng),)
    if role == MAIN and rng.random() < 0.3:
        hooks, on_term, runs = {POST_START: Hook(rng.choice(("exec", "httpGet")), works=False)}, None, (Run(HOOK_FAILS),)
    crashing = Container("crashing", role, runs, on_term=on_term, hooks=hooks, log_fallback=rng.random() < 0.4)
    # The others are quick to be up: the back-off is seen while it lasts.
    others = [Container(f"main-{index}", MAIN, (Run(HOLD),), on_term=_on_term(rng)) for index in range(rng.choice((1, 2)))]
    if role == MAIN:
        others = others[1:]
    waits = Expected(WAITING, restarts, reason="CrashLoopBackOff")
    expected = {"crashing": waits, **{other.name: Expected(WAITING, 0) if role == INIT else Expected(RUNNING, 0) for other in others}}
    containers = [crashing, *others]
    if role == MAIN:
        rng.shuffle(containers)
    return _plan(number, policy, containers, [Stage(expected, events=(("BackOff", "crashing"),))])


def _unready(rng: random.Random, number: int) -> Plan:
    policy = rng.choice(POLICIES)
    before = _starters(rng, policy, at_most=1)
    kind = rng.choice((LOSES_READINESS, NEVER_READY))
    probe = Probe(rng.choice(PROBE_KINDS), threshold=rng.choice((1, 2)))
    unready = Container("unready", rng.choice((MAIN, MAIN, SIDECAR)), (Run(kind),), on_term=_on_term(rng), hooks=_hooks(rng),
                        probes={READINESS: probe})
    mains = [_main(rng, index, policy, None, ends=False) for index in range(_few(rng))]
    containers = before + [unready] + mains
    rest = _at_rest(containers, policy)
    lost = Stage({**rest, "unready": Expected(RUNNING, 0, ready=False)}, phase="Running", events=(("Unhealthy", "unready"),))
    had = Stage({"unready": Expected(RUNNING, 0, ready=True)})
    return _plan(number, policy, containers, [had, lost] if kind == LOSES_READINESS else [lost])


def _deadline(rng: random.Random, number: int) -> Plan:
    policy = rng.choice(POLICIES)
    sidecars = [Container("sidecar", SIDECAR, (Run(HOLD),), on_term=_on_term(rng))] if rng.random() < 0.5 else []
    mains = [Container(f"main-{index}", MAIN, (Run(HOLD),), on_term=_on_term(rng), hooks=_hooks(rng)) for index in range(_few(rng))]
    containers = sidecars + mains
    ended = Stage({container.name: Expected(TERMINATED) for container in containers}, phase="Failed", reason="DeadlineExceeded",
                  sandbox_gone=True)
    ran = Stage({container.name: Expected(RUNNING, 0) for container in containers})
    return replace(_plan(number, policy, containers, [ran, ended]), deadline=DEADLINE)


def _cannot_start(rng: random.Random, number: int) -> Plan:
    trouble, waits = rng.choice((
        ("image never", "ErrImageNeverPull"), ("no such image", "ImagePullBackOff"), ("no config map", "CreateContainerConfigError"),
        ("no secret key", "CreateContainerConfigError"), ("bad image name", "InvalidImageName"), ("no such command", "")))
    policy = rng.choice(POLICIES)
    role = rng.choice((MAIN, MAIN, INIT))
    stuck = Container("stuck", role, (Run(HOLD),), cannot_start=trouble)
    others = [Container("main-0", MAIN, (Run(HOLD),), on_term=_on_term(rng))] if role == INIT or rng.random() < 0.5 else []
    containers = [stuck, *others]
    if role == MAIN:
        rng.shuffle(containers)
    runs = WAITING if role == INIT else RUNNING
    expected = {other.name: Expected(runs, 0) for other in others}
    if waits:
        events = (("BackOff", "stuck"),) if waits == "ImagePullBackOff" else ()
        stages = [Stage({**expected, "stuck": Expected(WAITING, 0, reason=waits)}, events=events)]
    elif policy != NEVER:
        waits_again = Expected(WAITING, 1, reason="CrashLoopBackOff")
        stages = [Stage({**expected, "stuck": waits_again}, events=(("BackOff", "stuck"),))]
    elif role == MAIN and others:
        stages = [Stage({**expected, "stuck": Expected(TERMINATED, 0)}, phase="Running")]
    else:
        stages = [Stage({"stuck": Expected(TERMINATED, 0)}, phase="Failed", sandbox_gone=True)]
    return _plan(number, policy, containers, stages)


def _deleted_at_once(rng: random.Random, number: int) -> Plan:
    policy = rng.choice(POLICIES)
    containers = _starters(rng, policy) + [_main(rng, 0, policy, None, ends=False)]
    return replace(_plan(number, policy, containers, [Stage(phase="Pending")]), loose=True)


def _rejected(rng: random.Random, number: int) -> Plan:
    policy = rng.choice(POLICIES)
    containers = _starters(rng, policy) + [_main(rng, 0, policy, None, ends=False)]
    return replace(_plan(number, policy, containers, [Stage(phase="Failed")]), wrong_node=True)


def _hook_hangs(rng: random.Random, number: int) -> Plan:
    policy = rng.choice(POLICIES)
    before = _starters(rng, policy, at_most=1, sidecars_restart=False)
    hanging = Container("hanging", MAIN, (Run(HOLD),), hooks={POST_START: Hook("exec", hangs=True)})  # for some seconds
    later = [Container("main-0", MAIN, (Run(HOLD),))] if rng.random() < 0.5 else []
    return _plan(number, policy, before + [hanging] + later, [Stage(phase="Pending", mark=f"hanging.{POST_START}.hangs")])


_BUILDERS = {
    "completes": _completes, "stays": _stays, "init holds": _init_holds, "sidecar not up": _sidecar_not_up,
    "crash loop": _crash_loop, "unready": _unready, "deadline": _deadline, "cannot start": _cannot_start,
    "deleted at once": _deleted_at_once, "rejected": _rejected, "hook hangs": _hook_hangs,
}


def _plan(number: int, policy: str, containers: list[Container], stages: list[Stage]) -> Plan:
    return Plan(number, "", policy, tuple(containers), tuple(stages), grace=0)


# Containers


def _starters(rng: random.Random, policy: str, prefix: str = "", at_most: int = 3, sidecars_restart: bool = True) -> list[Container]:
    """Init containers that complete and sidecars that come up, in any order."""
    made = []
    for index in range(rng.choice((0, 0, 1, 1, 2, 3)[: 2 + 2 * at_most])):
        if rng.random() < 0.5:
            failures = tuple(_failing(rng) for _ in range(rng.choice((0, 0, 0, 1)) if policy != NEVER else 0))
            made.append(Container(f"{prefix}init-{index}", INIT, (*failures, Run(EXIT, 0, _message(rng)))))
        else:
            made.append(_sidecar(rng, f"{prefix}sidecar-{index}", sidecars_restart))
    return made[:at_most]


def _sidecar(rng: random.Random, name: str, may_restart: bool) -> Container:
    on_term, roll = _on_term(rng), rng.random()
    if may_restart and roll < 0.15:
        return Container(name, SIDECAR, (Run(EXIT, rng.choice((0, *FAILURES))), Run(HOLD)), on_term=on_term)
    if may_restart and roll < 0.25:
        return Container(name, SIDECAR, (Run(UNWELL), Run(HOLD)), on_term=on_term, hooks=_hooks(rng),
                         probes={LIVENESS: Probe(rng.choice(PROBE_KINDS), rng.choice((1, 2)))})
    return Container(name, SIDECAR, (Run(HOLD),), on_term=on_term, hooks=_hooks(rng), probes=_passing_probes(rng))


def _main(rng: random.Random, index: int, policy: str, own: str | None, ends: bool) -> Container:
    """A main container that is started again some times, then ends or holds."""
    name, effective = f"main-{index}", own or policy
    on_term = _on_term(rng)
    rules = (42, 43) if own and rng.random() < 0.5 else ()
    if index and not ends and effective == NEVER and not own and rng.random() < 0.3:  # its liveness probe is its end
        return Container(name, MAIN, (Run(UNWELL),), on_term=on_term, hooks=_hooks(rng),
                         probes={LIVENESS: Probe(rng.choice(PROBE_KINDS), rng.choice((1, 2)))})
    if not ends and not own and effective != NEVER and rng.random() < 0.25:
        return _restarted_by_probe_or_hook(rng, name, effective)
    if not ends and rng.random() < 0.6:
        return Container(name, MAIN, (Run(HOLD),), on_term=on_term, hooks=_hooks(rng), probes=_passing_probes(rng), policy=own,
                         restart_on=rules)
    again = tuple(run for run in (_restarting(rng, effective, rules) for _ in range(rng.choice((0, 1, 1, 2)))) if run)
    last = Run(HOLD)
    if ends:
        code = 0 if effective == ON_FAILURE else rng.choice((0, 0, *(code for code in FAILURES if code not in rules)))
        last = Run(EXIT, code, _message(rng))
    return Container(name, MAIN, (*again, last), on_term=on_term, hooks=_hooks(rng), policy=own, restart_on=rules,
                     log_fallback=rng.random() < 0.3)


def _restarted_by_probe_or_hook(rng: random.Random, name: str, policy: str) -> Container:
    how = rng.choice((UNWELL, UNWELL, NEVER_UP, HOOK_FAILS))
    # A container that a failed hook ends is judged by its exit code.
    on_term = rng.choice((3, None)) if how == HOOK_FAILS and policy == ON_FAILURE else _on_term(rng)
    hooks, probes = _hooks(rng), {}
    if how == HOOK_FAILS:
        hooks[POST_START] = Hook("exec", works=False)
    else:
        kind = LIVENESS if how == UNWELL else STARTUP
        probes[kind] = Probe(rng.choice(PROBE_KINDS), rng.choice((1, 2, 3)))
    return Container(name, MAIN, (Run(how), Run(HOLD)), on_term=on_term, hooks=hooks, probes=probes)


def _restarting(rng: random.Random, policy: str, rules: tuple[int, ...]) -> Run | None:
    """A run after which the container is started again."""
    if rules and rng.random() < 0.7:
        return Run(EXIT, rng.choice(rules), _message(rng))
    if policy == NEVER:
        return None
    return Run(EXIT, 0, _message(rng)) if policy == ALWAYS and rng.random() < 0.4 else _failing(rng)


def _failing(rng: random.Random) -> Run:
    return Run(EXIT, rng.choice(FAILURES), _message(rng))


def _message(rng: random.Random) -> str:
    return rng.choice(("", "", "out of luck", "two\nlines\n"))


def _on_term(rng: random.Random) -> int | None:
    return None if rng.random() < 0.08 else rng.choice(TERM_CODES)


def _own_policy(rng: random.Random, among: tuple[str, ...]) -> str | None:
    return rng.choice(among) if rng.random() < 0.12 else None


def _hooks(rng: random.Random) -> dict[str, Hook]:
    hooks = {}
    if rng.random() < 0.2:
        hooks[POST_START] = Hook(rng.choice(HOOK_KINDS))
    if rng.random() < 0.3:
        kind = rng.choice(HOOK_KINDS)
        hooks[PRE_STOP] = Hook(kind, works=kind == "sleep" or rng.random() < 0.7, hangs=kind == "exec" and rng.random() < 0.15)
    return hooks


def _passing_probes(rng: random.Random) -> dict[str, Probe]:
    shares = {READINESS: 0.35, LIVENESS: 0.15, STARTUP: 0.15}
    return {which: Probe(rng.choice(PROBE_KINDS), threshold=30 if which == STARTUP else 3, late=which == STARTUP and rng.random() < 0.6)
            for which, share in shares.items() if rng.random() < share}


def _few(rng: random.Random) -> int:
    return rng.choice((1, 1, 1, 2, 2, 3))


# The model


def _after_start(before: list[Container]) -> dict[str, Expected]:
    """Init and sidecar containers once the next one has begun and all is quiet."""
    expected = {}
    for container in before:
        restarts = len(container.runs) - 1
        expected[container.name] = (Expected(TERMINATED, restarts) if container.role == INIT
                                    else Expected(RUNNING, restarts, ready=True, started=True))
    return expected


def _at_rest(containers: list[Container], policy: str) -> dict[str, Expected]:
    expected = _after_start([container for container in containers if container.role != MAIN])
    for container in containers:
        if container.role == MAIN:
            last = container.runs[-1].kind
            ended = last == EXIT or (last == UNWELL and policy == NEVER)
            restarts = len(container.runs) - 1
            expected[container.name] = Expected(TERMINATED, restarts) if ended else Expected(RUNNING, restarts, ready=True, started=True)
    return expected


def _terminal(containers: list[Container], policy: str) -> list[Stage]:
    expected = {name: replace(rest, state=TERMINATED, ready=None, started=None) for name, rest in _at_rest(containers, policy).items()}
    return [Stage(expected, phase="Succeeded|Failed", sandbox_gone=True)]
