"""What a new supervisor makes of what the last one noted: (records, facts of the kernel) -> workers and events. Pure.

A worker is kept as the values of its fields in the order of KEPT; fields are only appended, so the record of the
version before reads as if the new ones had their defaults. Every torn state is a row of a table in the tests.
Decisions: docs/adr/0004-taking-over.md.
"""

import math
from operator import attrgetter
from typing import Any, NamedTuple

import msgspec
from msgspec.structs import replace

from nssup import restart, wire
from nssup.events import Empty, Exit, Exited, Gone, Input, LaunchFailed, Running, SetupFailed, Start, Started, State
from nssup.machine import Action, KillTree, Launch, Worker, stop_deed
from nssup.record import BODY_MAX, SLOT_OVER, SLOT_STOPPING, Slot
from nssup.spec import OWN_LOG, POOL_NAME, StopStep

KEPT = (
    "state",
    "reason",
    "want_up",
    "removing",
    "again",
    "generation",
    "restarts",
    "history",
    "launched_at",
    "running_since",
    "uptime",
    "deadline",
    "init_host_pid",
    "host_pid",
    "ns_pid",
    "last_host_pid",
    "last_ns_pid",
    "alive",
    "killed",
    "stop_step",
    "outcome",
    "exit",
    "last_exit",
    "up_since",
    "ready",
    "passed",
    "extended",
    "fault",
    "last_life",
    "condemned",
    "held",
)
_EXIT, _LAST_EXIT, _HISTORY = KEPT.index("exit"), KEPT.index("last_exit"), KEPT.index("history")
_KEPT_EXIT = ("reason", "code", "signal", "core", "oom", "timed_out", "cpu_seconds", "max_rss_bytes", "at")
_FIRST = KEPT.index("last_exit") + 1  # fields of the first version
_EXIT, _LAST_EXIT = KEPT.index("exit"), KEPT.index("last_exit")
_kept = attrgetter(*KEPT)
_kept_exit = attrgetter(*_KEPT_EXIT)
_encode = msgspec.msgpack.Encoder().encode
_LIVING = frozenset({State.STARTING, State.RUNNING, State.STOPPING})
_AT_REST = frozenset({State.STOPPED, State.FAILED, State.DONE})

# Seconds that an init gets to say what happened while nobody watched, before a deadline that passed meanwhile is held
# against its worker.
PATIENCE = 1.0
# The same for one that has a watchdog, whose last heartbeats nobody has noted.
HEARTBEAT = 10.0
UNREADABLE = "lost:unreadable"


# --- the worker in a slot ------------------------------------------------------------------------------------------


def keep(worker: Worker) -> bytes:
    """The worker as a slot holds it. Its id is the slot's, and lives that linger have slots of their own.

    What would not fit goes without how the life before ended, and then without the oldest of its deaths.
    """
    values: list[Any] = list(_kept(worker))
    for number in (_EXIT, _LAST_EXIT):
        found: Exit | None = values[number]
        values[number] = None if found is None else _kept_exit(found)
    deaths = worker.history.deaths
    values[_HISTORY] = _kept_history(worker, deaths)
    while len(values) > _FIRST and not values[-1]:
        values.pop()  # reads as its default, which these all have in common
    body = _encode(values)
    if len(body) > BODY_MAX:
        values[_LAST_EXIT] = None
        body = _encode(values)
    while len(body) > BODY_MAX and deaths:
        deaths = deaths[1 + len(deaths) // 4 :]
        values[_HISTORY] = _kept_history(worker, deaths)
        body = _encode(values)
    return body


def _kept_history(worker: Worker, deaths: tuple[float, ...]) -> list[Any]:
    """Deaths are written as the newest one, and how many milliseconds before it the others were, newest first: that
    takes a few bytes each."""
    if not deaths:
        return list(worker.history)
    before = [round((deaths[-1] - at) * 1000) for at in reversed(deaths[:-1])]
    return [*worker.history[:-1], [deaths[-1], *before]]


def _history(kept: list[Any]) -> list[Any]:
    """What `_kept_history` wrote, with the deaths as they were; a longer one is cut. Raises TypeError, IndexError."""
    size = len(restart.History._fields)
    if len(kept) < size:
        return kept
    *counts, deaths = kept[:size]
    return [*counts, [*(deaths[0] - ago / 1000 for ago in reversed(deaths[1:])), *deaths[:1]]]


def place_of(worker_id: str) -> tuple[str, int] | None:
    """(pool, index) of an id as we write it; None for anything else."""
    pool, _, index = worker_id.partition("/")
    if not POOL_NAME.fullmatch(pool) or pool == OWN_LOG or not index.isdecimal():
        return None
    return (pool, int(index)) if str(int(index)) == index else None


def restore(worker_id: str, body: bytes) -> Worker | None:
    """The worker that `keep` wrote, or None when the bytes are not one that can be. Never raises."""
    place = place_of(worker_id)
    if place is None:
        return None
    try:
        values = msgspec.msgpack.decode(body, type=list[Any])
        fields = dict(zip(KEPT, values, strict=False)) | {"pool": place[0], "index": place[1]}
        if "history" in fields:
            fields["history"] = _history(fields["history"])
        for name in ("exit", "last_exit"):
            if fields.get(name) is not None:
                fields[name] = dict(zip(_KEPT_EXIT, fields[name], strict=False))
        if "up_since" not in fields and fields.get("state") == State.RUNNING:  # noted before there was readiness
            fields |= {"ready": True, "up_since": fields.get("running_since")}
        worker = msgspec.convert(fields, Worker)
    except (msgspec.MsgspecError, TypeError, ValueError, IndexError):
        return None
    return worker if _coherent(worker) else None


def _coherent(w: Worker) -> bool:
    """Whether the machine can have made it: another would be an impossible event later on."""
    spans = [*w.history.deaths, *(w.last_life or ())[1:]]
    times = (w.launched_at, w.running_since, w.up_since, w.uptime, w.deadline, w.extended, *spans)
    if not all(at is None or math.isfinite(at) for at in times):
        return False
    if w.generation < 0 or (w.stop_step or 0) < 0 or w.outcome not in (None, *_AT_REST):
        return False
    if w.held and (w.state is not State.STOPPING or w.stop_step is not None or not w.alive):
        return False
    if w.state in (State.STARTING, State.RUNNING):
        return w.alive and w.want_up and not w.again and w.uptime is None
    if w.state is State.STOPPING:
        return w.alive or w.outcome is not None
    if w.state is State.BACKOFF:
        return not w.alive and w.deadline is not None
    if w.state is State.WAITING:
        return not w.alive and w.want_up and w.deadline is None
    return not w.alive


# --- taking over ---------------------------------------------------------------------------------------------------


class Fact(NamedTuple):
    """What the kernel says of a slot's life. holds: its descriptors are ours. gone: it has ended. Neither: it cannot be
    proven either way, and why."""

    holds: bool = False
    gone: bool = False
    why: str = ""


class Adopted(NamedTuple):
    """One worker to go on with, what to feed it first, and what is to be done then."""

    worker: Worker
    events: tuple[Input, ...] = ()
    actions: tuple[Action, ...] = ()


def adopt(slot: Slot, fact: Fact, lingering: tuple[int, ...], now: float) -> Adopted:
    """What becomes of the worker whose newest life slot tells of; its id is one that `place_of` knows.

    lingering: generations of older lives that are still there.
    """
    worker = restore(slot.worker, slot.body)
    if worker is None or worker.generation != slot.generation:
        worker = _unreadable(slot)
    worker = replace(worker, lingering=lingering)
    if worker.state is State.LOST:
        if not slot.init_host_pid or not (fact.holds or fact.gone):
            return Adopted(replace(worker, reason=f"lost:{fact.why or 'unproven'}"))
        worker = _found(worker, slot)
    if not worker.alive:
        return _adopt_over(worker, fact)
    if fact.holds:
        if worker.deadline is not None:
            patience = HEARTBEAT if worker.state is State.RUNNING else PATIENCE
            worker = replace(worker, deadline=max(worker.deadline, now + patience))
        return Adopted(worker)
    if not fact.gone:
        lost = replace(worker, state=State.LOST, reason=f"lost:{fact.why}", deadline=None, alive=False, held=False)
        return Adopted(lost)
    if slot.init_host_pid:
        return Adopted(worker, (Gone(slot.generation, Exit(reason="init-killed")),))
    # GO comes after the note of init: it never ran.
    if worker.state is State.STARTING:
        return Adopted(worker, (), (Launch(slot.generation),))
    return Adopted(worker, (LaunchFailed(slot.generation, "operator"),))


def _adopt_over(worker: Worker, fact: Fact) -> Adopted:
    """Its life was over; what may be left of it is an init that waits for our word."""
    if fact.holds:
        worker = replace(worker, lingering=(*worker.lingering, worker.generation))
        if worker.state in _AT_REST:  # said too early
            worker = replace(worker, state=State.STOPPING, outcome=worker.state)
    # Stopped, and wanted up: only because its supervisor ended.
    returns = worker.want_up and State.STOPPED in (worker.state, worker.outcome)
    again: tuple[Input, ...] = (Start(),) if returns else ()
    if worker.state is State.STOPPING and not fact.holds:
        return Adopted(worker, (Gone(worker.generation), *again))
    return Adopted(worker, again)


def _unreadable(slot: Slot) -> Worker:
    """A worker of whom only the slot's own fields are known. init will say how far its life is; a life that is over is
    not followed by another before somebody says so."""
    place = place_of(slot.worker)
    assert place is not None
    worker = Worker(pool=place[0], index=place[1], generation=slot.generation, reason=UNREADABLE)
    if slot.step == SLOT_OVER:
        return replace(worker, state=State.STOPPING, outcome=State.FAILED)
    return _found(replace(worker, want_up=slot.step != SLOT_STOPPING), slot)


def _found(worker: Worker, slot: Slot) -> Worker:
    """A worker with a life again, of which init will say how far it is. One that was not to be up is stopped on."""
    worker = replace(
        worker,
        state=State.STARTING,
        alive=True,
        again=False,
        held=False,
        init_host_pid=slot.init_host_pid or None,
        host_pid=None,
        ns_pid=None,
        running_since=None,
        up_since=None,
        ready=False,
        passed=False,
        uptime=None,
        exit=None,
        deadline=None,
    )
    if worker.want_up and not worker.condemned:
        return worker
    return replace(worker, state=State.STOPPING, stop_step=worker.stop_step or 0, deadline=0.0)


# --- what its init says ----------------------------------------------------------------------------------------------


def said(worker: Worker, state: wire.State, ended: Exit | None, at: float | None = None) -> tuple[Input, ...]:
    """What init's STATE means for a worker that we have as it was recorded. ended: the exit in it, if there is one, at:
    when (CLOCK_BOOTTIME)."""
    number = worker.generation
    if not worker.alive or state.generation != number:
        return ()
    if state.phase == wire.Phase.FAILED:
        return (SetupFailed(number, wire.failure_reason(state.step, state.errno)), Empty(number))
    if state.phase not in (wire.Phase.EXITED, wire.Phase.EMPTY) or ended is None:
        return ()
    empty = state.phase == wire.Phase.EMPTY
    if worker.exit is not None:
        return (Empty(number),) if empty else ()
    return (Exited(number, ended, empty, at),)


def owed(
    worker: Worker | None, stop: tuple[StopStep, ...], generation: int, told: wire.State | None
) -> tuple[Action, ...]:
    """What was noted about a life, and died with its supervisor before it was done. told None: init does not answer.

    A step of the stop sequence is not taken twice: init knows the last step that reached it. A life that is over for
    us and not for its init is ended.
    """
    if worker is None or worker.generation != generation or not worker.alive:
        over = told is None or told.phase in (wire.Phase.EMPTY, wire.Phase.FAILED)
        return () if over else (KillTree(generation),)
    if worker.killed:
        return (KillTree(generation),)
    step = worker.stop_step
    if told is None or told.phase != wire.Phase.RUNNING or step is None or step >= len(stop) or told.step > step:
        return ()
    deed = stop_deed(stop[step], generation, step)
    return () if isinstance(deed, KillTree) else (deed,)


def known(worker: Worker, host_pid: int, ns_pid: int) -> tuple[Input, ...]:
    """What STARTED, said again to a new supervisor, adds to what is recorded."""
    number = worker.generation
    told: tuple[Input, ...] = ()
    if worker.host_pid != host_pid:
        told = (Started(number, host_pid, ns_pid),)
    return (*told, Running(number)) if worker.state is State.STARTING else told
