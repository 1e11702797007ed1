"""Why a worker is in its state, what it waits for, and when it will be launched again. Pure: of worker and spec.

Times are CLOCK_BOOTTIME seconds, until they are stamped for the API's document.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, TypedDict

from nssup import render, restart
from nssup.dependencies import Unmet
from nssup.events import Exit, State
from nssup.machine import DEPENDENCY, POOL_FAILED, Worker, asks_readiness
from nssup.render import ExitDocument
from nssup.spec import PoolSpec

# An end of which no rule and no list of good codes says anything.
_FAILURE = Exit(reason="failure")
_ENDS = {"fail": "failed", "fail-pool": "failed, and its pool with it", "shutdown": "failed, and the supervisor ends"}


class Attempt(NamedTuple):
    """A launch to come: after `wait` seconds in backoff, at that moment."""

    wait: float
    at: float


class Schedule(NamedTuple):
    """attempts: the next launches, should each life but the present one end at once. then: what comes after them, ""
    for more of them."""

    attempts: tuple[Attempt, ...] = ()
    then: str = ""


class Deaths(NamedTuple):
    """Ends of the program by itself that count at this moment, and how many are too many."""

    there: int
    most: int
    within: float
    then: str


class Explanation(NamedTuple):
    """why: in a sentence. waits_for: in another, None when for nothing. until: when that wait ends by itself. missing:
    what it requires and is not so, in WAITING. deaths: None where they are not counted."""

    worker: Worker
    why: str
    waits_for: str | None
    until: float | None
    missing: tuple[Unmet, ...]
    schedule: Schedule
    deaths: Deaths | None


def explain(
    worker: Worker, spec: PoolSpec, now: float, seed: str, count: int, lacks: Sequence[Unmet] = ()
) -> Explanation:
    """count: how many attempts to tell at most. lacks: what its pool requires and is not there. Never raises."""
    why, waits_for = _WHY[worker.state](worker, spec)
    missing = tuple(lacks) if worker.state is State.WAITING else ()
    if missing:
        waits_for = "; ".join(map(_lack, missing))
    intensity = spec.restart.intensity
    deaths = None
    if intensity is not None:
        there = len(restart.counted(intensity, worker.history.deaths, now))
        deaths = Deaths(there, intensity.deaths, intensity.within, intensity.then)
    plan = schedule(worker, spec, now, seed, count)
    return Explanation(worker, why, waits_for, worker.deadline, missing, plan, deaths)


# --- the schedule --------------------------------------------------------------------------------------------------


def schedule(worker: Worker, spec: PoolSpec, now: float, seed: str, count: int) -> Schedule:
    """What the restart policy does next: for a life that is there, should it fail now and all that follow at once."""
    if not worker.want_up or worker.condemned or worker.again:
        return Schedule()
    attempts: list[Attempt] = []
    generation, history, uptime, ended = worker.generation, worker.history, 0.0, _FAILURE
    if worker.state is State.BACKOFF and worker.deadline is not None:
        began = worker.last_life.ended if worker.last_life else now
        attempts.append(Attempt(max(worker.deadline - began, 0.0), worker.deadline))
        now = worker.deadline
        generation += 1
        if worker.last_exit is not None and worker.last_exit.reason.startswith(restart.NEVER_RAN):
            ended = worker.last_exit  # as long as that is not mended, it goes on so
    elif worker.alive:
        uptime = _uptime(worker, now)
        ended = worker.exit or ended
    else:
        return Schedule()
    while len(attempts) < count:
        verdict = restart.decide(
            spec.restart,
            spec.type,
            history,
            ended,
            uptime,
            now=now,
            seed=seed,
            worker_id=worker.id,
            generation=generation,
        )
        if not isinstance(verdict, restart.Again):
            return Schedule(tuple(attempts), _end(verdict))
        now += verdict.delay
        attempts.append(Attempt(verdict.delay, now))
        history, uptime, generation = verdict.history, 0.0, generation + 1
        if not ended.reason.startswith(restart.NEVER_RAN):
            ended = _FAILURE
    return Schedule(tuple(attempts))


def _uptime(worker: Worker, now: float) -> float:
    if worker.uptime is not None:
        return worker.uptime
    return 0.0 if worker.up_since is None else now - worker.up_since


def _end(verdict: restart.Finished | restart.Halted | restart.GaveUp) -> str:
    if isinstance(verdict, restart.GaveUp):
        return _ENDS[verdict.then]
    return "done" if isinstance(verdict, restart.Finished) else "stopped"


# --- why -----------------------------------------------------------------------------------------------------------

_Said = tuple[str, str | None]
_OPERATOR = "somebody to start it (nssup ctl start)"


def _stopped(w: Worker, spec: PoolSpec) -> _Said:
    if w.reason is None:
        return "nobody has started it" + ("" if spec.enabled else "; its pool is disabled"), _OPERATOR
    if w.reason == "operator":
        return "an operator wants it down", _OPERATOR
    if w.reason.startswith(DEPENDENCY):
        return f"pool {w.reason.removeprefix(DEPENDENCY)}, which it requires, was lost", _OPERATOR
    return f"its last life ended with {w.reason}, after which its rules want no other", _OPERATOR


def _waiting(w: Worker, spec: PoolSpec) -> _Said:
    return "it is to be up, and what its pool requires is not there", "other pools"


def _lack(lack: Unmet) -> str:
    said = f"pool {lack.needed} to be {lack.when}"
    if not lack.wanted:
        return f"{said}: it has no workers (nssup ctl scale {lack.needed})"
    said = f"{said}: {lack.so} of its {lack.wanted} workers are"
    return f"{said}, and nobody else is on the way (nssup ctl start {lack.needed})" if lack.stuck else said


def _starting(w: Worker, spec: PoolSpec) -> _Said:
    why = f"generation {w.generation} was launched" + (
        f" because the one before ended with {w.reason}" * bool(w.reason)
    )
    if w.running_since is None:
        return why, "its program to be running"
    return why + "; its program runs", "its program to be ready" if asks_readiness(spec) else None


def _running(w: Worker, spec: PoolSpec) -> _Said:
    return "its program runs" + ("" if w.ready or not asks_readiness(spec) else ", and is not ready any more"), None


def _stopping(w: Worker, spec: PoolSpec) -> _Said:
    why = _why_down(w)
    if not w.alive:
        return why, "its init to be reaped"
    if w.exit is not None:
        return why, "what its program left behind to be gone"
    if w.killed:
        return why, "its processes to be gone: they were sent SIGKILL"
    if w.held:
        return why, "those to be down that require its pool, before its stop sequence begins"
    if w.stop_step is None:
        return why, "an init that can be killed"
    return why, f"its program to end: step {w.stop_step + 1} of {len(spec.stop)} of its stop sequence"


def _why_down(w: Worker) -> str:
    if w.condemned:
        return "another worker of its pool died too often"
    if w.reason == "operator":
        return "an operator wants " + ("it started again" if w.again else "it down")
    if (w.reason or "").startswith(DEPENDENCY):
        what = "it waits for it" if w.again else "it stays down"
        return f"pool {(w.reason or '').removeprefix(DEPENDENCY)}, which it requires, was lost, and {what}"
    return f"its life is ending: {w.reason}"


def _backoff(w: Worker, spec: PoolSpec) -> _Said:
    never_ran = w.reason is not None and w.reason.startswith(restart.NEVER_RAN)
    what = "its last launch failed" if never_ran else "its last life ended"
    return f"{what} ({w.reason}), and it is to be launched again", "the backoff to be over"


def _failed(w: Worker, spec: PoolSpec) -> _Said:
    if w.reason == POOL_FAILED:
        why = "another worker of its pool died too often"
    elif w.reason == restart.TOO_MANY:
        intensity = spec.restart.intensity
        often = f": {intensity.deaths} times within {intensity.within:g} s" if intensity else ""
        why = f"it died too often{often}, the last time of {w.last_exit.reason if w.last_exit else 'something'}"
    else:
        why = f"its last life ended with {w.reason}, and its policy wants no other"
    return why, "somebody to start or reset it (nssup ctl start, nssup ctl reset)"


def _done(w: Worker, spec: PoolSpec) -> _Said:
    return f"it has ended well ({w.reason})", None


def _lost(w: Worker, spec: PoolSpec) -> _Said:
    why = f"a life that an earlier supervisor left cannot be proven its own ({w.reason}), so nobody touches it"
    return why, "somebody to deal with it, and to say so (nssup ctl orphans, nssup ctl stop)"


_WHY: dict[State, Callable[[Worker, PoolSpec], _Said]] = {
    State.STOPPED: _stopped,
    State.WAITING: _waiting,
    State.STARTING: _starting,
    State.RUNNING: _running,
    State.STOPPING: _stopping,
    State.BACKOFF: _backoff,
    State.FAILED: _failed,
    State.DONE: _done,
    State.LOST: _lost,
}


# --- documents and texts -------------------------------------------------------------------------------------------


class AttemptDocument(TypedDict):
    """at: RFC 3339. wait_seconds: of backoff before it."""

    at: str
    wait_seconds: float


class MissingDocument(TypedDict):
    """What a pool has to be, and so many of its workers are, of how many."""

    pool: str
    when: str
    so: int
    wanted: int


class DeathsDocument(TypedDict):
    count: int
    most: int
    within_seconds: float
    then: str


class ExplanationDocument(TypedDict):
    """One worker in `explain`. attempts: the next launches, should the life that is there fail now, and all after it at
    once; next_at: the first of them, where it is waited for. after_attempts: what follows them, null for more. probes:
    why the last try of each failed, "" if it did not."""

    id: str
    state: str
    reason: str | None
    desired: str
    enabled: bool
    why: str
    waits_for: str | None
    probes: dict[str, str]
    until: str | None
    missing: list[MissingDocument]
    next_at: str | None
    attempts: list[AttemptDocument]
    after_attempts: str | None
    restarts: int
    deaths: DeathsDocument | None
    last_exit: ExitDocument | None


def document(
    found: Explanation,
    spec: PoolSpec,
    stamp: Callable[[float], str],
    last_exit: ExitDocument | None,
    probes: Mapping[str, str] = MappingProxyType({}),
) -> ExplanationDocument:
    """stamp: RFC 3339 of a moment. last_exit, probes: the worker's."""
    w, plan, deaths = found.worker, found.schedule, found.deaths
    return {
        "id": w.id,
        "state": w.state.value,
        "reason": w.reason,
        "desired": "up" if w.want_up else "down",
        "enabled": spec.enabled,
        "why": found.why,
        "waits_for": found.waits_for,
        "probes": dict(probes),
        "until": None if found.until is None else stamp(found.until),
        "missing": [{"pool": m.needed, "when": m.when, "so": m.so, "wanted": m.wanted} for m in found.missing],
        "next_at": stamp(plan.attempts[0].at) if w.state is State.BACKOFF and plan.attempts else None,
        "attempts": [{"at": stamp(each.at), "wait_seconds": round(each.wait, 6)} for each in plan.attempts],
        "after_attempts": plan.then or None,
        "restarts": w.restarts,
        "deaths": None
        if deaths is None
        else {
            "count": deaths.there,
            "most": deaths.most,
            "within_seconds": deaths.within,
            "then": deaths.then,
        },
        "last_exit": last_exit,
    }


def text(d: ExplanationDocument) -> str:
    """A few lines for people."""
    lines = [f"{d['id']}: {d['state']}: {d['why']}"]
    if d["waits_for"]:
        lines.append(f"  waits for: {d['waits_for']}" + (f", until {d['until']}" if d["until"] else ""))
    lines += [f"  {name} probe: {why}" for name, why in d["probes"].items() if why]
    lines += _schedule_lines(d)
    if (deaths := d["deaths"]) is not None:
        within = render.duration(deaths["within_seconds"])
        lines.append(f"  deaths: {deaths['count']} within {within}; {deaths['most']} are too many: {deaths['then']}")
    if not d["enabled"] and d["state"] != "stopped":
        lines.append("  disabled: not started with the next supervisor")
    return "\n".join(lines) + "\n"


def _schedule_lines(d: ExplanationDocument) -> list[str]:
    waits = [render.duration(each["wait_seconds"]) if each["wait_seconds"] else "at once" for each in d["attempts"]]
    lines = []
    if d["next_at"] is not None:
        lines.append(f"  next attempt: {d['next_at']}, after a wait of {waits.pop(0)}")
    if not waits and d["after_attempts"] is None:
        return lines
    then = [*waits, d["after_attempts"] or "..."]
    what = "if that life ends at once, and so on" if d["next_at"] is not None else "if it failed now, and so on"
    return [*lines, f"  {what}: {', '.join(then)}"]
