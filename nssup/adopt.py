"""What a new supervisor makes of what the last one noted: (records, facts of the kernel) -> workers and events. Pure.

A worker is kept as the values of its fields in the order of KEPT; fields are only appended, so the record of the
version before reads as if the new ones had their defaults. Every torn state is a row of a table in the tests.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec
from msgspec.structs import replace

from nssup import wire
from nssup.events import (
    Empty,
    Exit,
    Exited,
    Gone,
    Input,
    LaunchFailed,
    Running,
    SetupFailed,
    Start,
    Started,
    State,
)
from nssup.machine import Worker
from nssup.record import SLOT_OVER, Slot

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
)
_KEPT_EXIT = ("reason", "code", "signal", "core", "oom", "timed_out", "cpu_seconds", "max_rss_bytes", "at")


def keep(worker: Worker) -> bytes:
    """The worker as a slot holds it. Its id is the slot's, and lives that linger have slots of their own."""
    values: list[Any] = [getattr(worker, name) for name in KEPT]
    for number in (-2, -1):
        found: Exit | None = values[number]
        values[number] = None if found is None else [getattr(found, name) for name in _KEPT_EXIT]
    return msgspec.msgpack.encode(values)


def restore(worker_id: str, body: bytes) -> Worker | None:
    """The worker that `keep` wrote, or None when the bytes are not one. Never raises."""
    pool, _, index = worker_id.partition("/")
    try:
        values = msgspec.msgpack.decode(body, type=list[Any])
        fields = dict(zip(KEPT, values, strict=False)) | {"pool": pool, "index": int(index)}
        for name in ("exit", "last_exit"):
            if fields.get(name) is not None:
                fields[name] = dict(zip(_KEPT_EXIT, fields[name], strict=False))
        return msgspec.convert(fields, Worker)
    except (msgspec.MsgspecError, TypeError, ValueError):
        return None


class Fact(NamedTuple):
    """What the kernel says of a slot's life. holds: its descriptors are ours. gone: it has ended. Neither: it cannot be
    proven either way, and why."""

    holds: bool = False
    gone: bool = False
    why: str = ""


class Adopted(NamedTuple):
    """One worker to go on with, and what to feed it first."""

    worker: Worker
    events: tuple[Input, ...] = ()


def newest(slots: Iterable[Slot]) -> dict[str, Slot]:
    """worker id -> the slot of its newest life, which holds the worker."""
    found: dict[str, Slot] = {}
    for slot in slots:
        known = found.get(slot.worker)
        if known is None or slot.generation > known.generation:
            found[slot.worker] = slot
    return found


def adopt(slot: Slot, fact: Fact, lingering: tuple[int, ...]) -> Adopted | None:
    """What becomes of the worker whose newest life slot tells of. None when the slot holds no worker.

    lingering: generations of older lives that are still there.
    """
    worker = restore(slot.worker, slot.body)
    if worker is None:
        return None
    if slot.step != SLOT_OVER and fact.holds:
        return Adopted(replace(worker, lingering=lingering))
    if fact.holds:  # over, its init waits for our word
        return Adopted(replace(worker, lingering=(*lingering, slot.generation)))
    if not fact.gone and worker.alive:
        lost = replace(worker, state=State.LOST, reason=f"lost:{fact.why}", deadline=None, alive=False)
        return Adopted(replace(lost, lingering=lingering))
    worker = replace(worker, lingering=lingering)
    if not worker.alive:
        return Adopted(worker, _rest(worker))
    if worker.init_host_pid is None:
        return Adopted(worker, (LaunchFailed(slot.generation, "supervisor-died"),))
    return Adopted(worker, (Gone(slot.generation, Exit(reason="init-killed")),))


def _rest(worker: Worker) -> tuple[Input, ...]:
    """Its life was over already; its end may still have to be said."""
    if worker.state is State.STOPPING:
        return (Gone(worker.generation),)
    if worker.state is State.STOPPED and worker.want_up:  # only because its supervisor ended
        return (Start(),)
    return ()


def said(worker: Worker, state: wire.State, ended: Exit | None) -> tuple[Input, ...]:
    """What init's STATE means for a worker that we have as it was recorded. ended: the exit in it, if there is one."""
    number = worker.generation
    if state.phase == wire.Phase.FAILED:
        return (SetupFailed(number, wire.failure_reason(state.step, state.errno)), Empty(number))
    events: tuple[Input, ...] = ()
    if state.phase == wire.Phase.EXITED and ended is not None:
        events = (Exited(number, ended),)
    if state.phase == wire.Phase.EMPTY and ended is not None:
        events = (Exited(number, ended, empty=True),)
    return events


def known(worker: Worker, host_pid: int, ns_pid: int) -> tuple[Input, ...]:
    """What STARTED, said again to a new supervisor, adds to what is recorded."""
    number = worker.generation
    told: tuple[Input, ...] = ()
    if worker.host_pid != host_pid:
        told = (Started(number, host_pid, ns_pid),)
    return (*told, Running(number)) if worker.state is State.STARTING else told
