"""What of a record is compared: everything that both agents must show alike. Pure.

IDs, addresses, times and durations become placeholders; then nothing is left out but what the tables here name.
"""

import re

from e2e.differential.plan import INIT, MAIN, SIDECAR, Plan

_TIMES = {"startTime", "startedAt", "finishedAt", "lastTransitionTime", "lastProbeTime"}
_DROPPED = {"containerID", "resourceVersion"}  # random, and the runtime's
# Reasons whose events come as often as chance has it: how often a probe ran, a back-off was met.
_COUNTLESS = {"Unhealthy", "BackOff", "Failed", "Pulling", "ErrImageNeverPull", "InspectFailed", "ProbeWarning", "DeadlineExceeded"}


def view(record: dict, plan: Plan) -> dict:
    scrub = _scrubber(record)
    events = [{**event, "message": scrub(event["message"])} for event in record["events"]]
    if plan.loose:
        return {"kinds of events": sorted({event["type"] for event in events} - {"Normal"})}
    return {
        "at stage": _status(record["at_stage"], record, scrub),
        "final": _status(record["final"], record, scrub),
        "events": _events(events),
        "event order": _event_order(events),
        "life": _life(record["order"]),
        "order": order_facts(plan, record["order"]),
        "hooks asked": sorted(record["hooks_asked"]),
        "logs": record["logs"],
        "log files at stage": record["logs_at_stage"],
    }


def _scrubber(record: dict):
    addresses = {entry["ip"] for status in (record["at_stage"], record["final"]) for entry in (status or {}).get("podIPs", [])}
    exact = [(record["uid"], "<uid>"), (record["namespace"], "<namespace>"), (f":{record['hook_port']}", ":<hook port>"),
             (record["node_ip"], "<node ip>")]
    patterns = [*((re.compile(rf"(?<![\d.]){re.escape(address)}(?!\d)"), "<pod ip>") for address in addresses),
                (re.compile(r"\b[0-9a-f]{64}\b"), "<id>"), (re.compile(r"(<(?:pod|node) ip>:)\d+->"), r"\1<port>->"),
                (re.compile(r"\bin [0-9.]+m?s( \([0-9.]+m?s including waiting\))?"), "in <duration>")]

    def scrub(text: str) -> str:
        for old, new in exact:
            text = text.replace(old, new)
        for pattern, new in patterns:
            text = pattern.sub(new, text)
        return text

    return scrub


def _status(status: dict | None, record: dict, scrub) -> dict:
    def clean(value: object, key: str = "") -> object:
        if isinstance(value, dict):
            return {name: clean(inner, name) for name, inner in value.items() if name not in _DROPPED}
        if isinstance(value, list):
            return [clean(inner) for inner in value]
        if key in _TIMES:
            return "<time>" if value else value
        return scrub(value) if isinstance(value, str) else value

    cleaned = clean(status or {})
    generations = [cleaned.pop("observedGeneration", None), *(c.pop("observedGeneration", None) for c in cleaned.get("conditions", []))]
    cleaned["observedGeneration"] = "known" if all(generations) else f"not everywhere: {generations}"
    # Lists that have a key are compared by it: a difference then names what it is about.
    cleaned["conditions"] = {entry.pop("type"): entry for entry in cleaned.get("conditions", [])}
    for field in ("initContainerStatuses", "containerStatuses"):
        if field in cleaned:
            cleaned[f"{field}, order"] = [entry["name"] for entry in cleaned[field]]
            cleaned[field] = {entry.pop("name"): entry for entry in cleaned[field]}
    return cleaned


def _events(events: list[dict]) -> dict[str, object]:
    """Each different event, and how often it came where that is not chance."""
    counts: dict[str, int] = {}
    for event in events:
        key = f"{event['type']} {event['reason']} {event['fieldPath']} by {event['component']}: {event['message']}"
        counts[key] = counts.get(key, 0) + event["count"]
    return {key: "some" if key.split()[1] in _COUNTLESS else count for key, count in counts.items()}


def _event_order(events: list[dict]) -> dict[str, list[str]]:
    """Of each container the reasons in the order of their first event, without those that come by chance in between."""
    orders: dict[str, list[str]] = {}
    for event in events:
        reasons = orders.setdefault(event["fieldPath"] or "pod", [])
        if event["reason"] not in reasons and event["reason"] not in _COUNTLESS:
            reasons.append(event["reason"])
    return orders


# The order in which containers did things


def _life(lines: list[str]) -> dict[str, list[str]]:
    """What each container wrote, in its order."""
    lives: dict[str, list[str]] = {}
    for line in lines:
        _, name, *words = line.split()
        lives.setdefault(name, []).append(" ".join(words))
    # A hook runs beside its container; only its own lines have an order.
    return {name: [text for text in texts if not text.startswith("hook")] + [text for text in texts if text.startswith("hook")]
            for name, texts in lives.items()}


def order_facts(plan: Plan, lines: list[str]) -> dict[str, bool]:
    """Every order between two containers that the pod lifecycle promises, and whether it was kept; only of what happened."""
    first_start, last_line, told = {}, {}, {}
    for index, line in enumerate(lines):
        _, name, *words = line.split()
        if words[0] == "hook":
            continue
        last_line[name] = index
        if words[1] == "starts":
            first_start.setdefault(name, index)
        if words[1] == "told":
            told[name] = index
    facts = {}

    def promise(text: str, earlier: int | None, later: int | None) -> None:
        if earlier is not None and later is not None:
            facts[text] = earlier < later

    starters = plan.of(INIT, SIDECAR)
    for position, one in enumerate(starters):
        for other in [*starters[position + 1:], *plan.of(MAIN)]:
            if one.role == INIT:
                promise(f"{one.name} has ended when {other.name} starts", last_line.get(one.name), first_start.get(other.name))
            else:
                promise(f"{one.name} starts before {other.name}", first_start.get(one.name), first_start.get(other.name))
    # Once the grace is used up all that still run are told at once.
    deaf = any(c.on_term is None or any(hook.hangs for hook in c.hooks.values()) for c in plan.containers)
    sidecars = [] if deaf else plan.of(SIDECAR)
    for position, sidecar in enumerate(sidecars):
        for main in plan.of(MAIN):
            promise(f"{main.name} has ended when {sidecar.name} is told to stop", last_line.get(main.name), told.get(sidecar.name))
        for later in sidecars[position + 1:]:
            promise(f"{later.name} is told to stop before {sidecar.name}", told.get(later.name), told.get(sidecar.name))
    return facts
