"""The last lives of a worker, as people look at them when they ask what happened. Pure.

Kept in memory, a bounded number for each worker. A worker that was taken over brings the last one along: the notes of
lives hold when that was and how it ended, and no more (docs/contracts.md, part c).
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypedDict

from nssup import render
from nssup.events import Exit, State
from nssup.machine import Worker
from nssup.render import ExitDocument

LIVES_KEPT = 10  # of each worker


class Past(NamedTuple):
    """A life that is over. began, ended: CLOCK_BOOTTIME seconds, from when it was asked for. host_pid, ns_pid: the
    program's, None when it never ran or when a supervisor before this one saw it. followed: what came of it, a state.
    wait: seconds until the next launch, as decided then; None when none was."""

    generation: int
    began: float
    ended: float
    exit: Exit
    host_pid: int | None
    ns_pid: int | None
    followed: str
    wait: float | None


def past(old: Worker, new: Worker) -> Past | None:
    """The life that was over with this change of a worker, if one was."""
    span, ended = new.last_life, new.last_exit
    if span is None or ended is None or span == old.last_life:
        return None
    followed = new.outcome or new.state
    wait = None if new.deadline is None or followed is not State.BACKOFF else max(new.deadline - span.ended, 0.0)
    if new.generation > span.generation:
        followed, wait = State.STARTING, 0.0
    pids = (old.last_host_pid, old.last_ns_pid) if old.generation == span.generation else (None, None)
    return Past(*span, ended, *pids, followed.value, wait)


def remembered(worker: Worker) -> Past | None:
    """The last life of a worker that was taken over, if there was one."""
    span, ended = worker.last_life, worker.last_exit
    if span is None or ended is None:
        return None
    followed, next_at = worker.outcome or worker.state, None
    if worker.generation > span.generation:
        followed, next_at = State.STARTING, worker.launched_at
    elif followed is State.BACKOFF:
        next_at = worker.deadline
    wait = None if next_at is None else max(next_at - span.ended, 0.0)
    return Past(*span, ended, None, None, followed.value, wait)


# --- documents and texts -------------------------------------------------------------------------------------------


class LifeDocument(TypedDict):
    """One life that is over. Times are RFC 3339. followed: the state that came of it, `starting` for another life at
    once. wait_seconds: until the next launch, as decided then; null when none was. last_lines: of its output."""

    generation: int
    started_at: str
    ended_at: str
    seconds: float
    reason: str
    exit: ExitDocument
    host_pid: int | None
    ns_pid: int | None
    followed: str
    wait_seconds: float | None
    last_lines: list[str]


class HistoryDocument(TypedDict):
    """The last lives of one worker that are over, oldest first."""

    id: str
    lives: list[LifeDocument]


def document(
    past: Past,
    stamp: Callable[[float], str],
    exit: ExitDocument,  # noqa: A002 - the field's name
    last_lines: list[str],
) -> LifeDocument:
    """stamp: RFC 3339 of a moment. exit: the document of past.exit."""
    return {
        "generation": past.generation,
        "started_at": stamp(past.began),
        "ended_at": stamp(past.ended),
        "seconds": round(past.ended - past.began, 6),
        "reason": past.exit.reason,
        "exit": exit,
        "host_pid": past.host_pid,
        "ns_pid": past.ns_pid,
        "followed": past.followed,
        "wait_seconds": None if past.wait is None else round(past.wait, 6),
        "last_lines": last_lines,
    }


def text(found: Iterable[HistoryDocument]) -> str:
    """A line a life, and what it wrote last if it failed."""
    return "".join(line + "\n" for each in found for line in _lines(each))


def _lines(found: HistoryDocument) -> Iterator[str]:
    if not found["lives"]:
        yield f"{found['id']}: no life of it is over"
    for life in found["lives"]:
        then = life["followed"]
        if life["wait_seconds"] is not None:
            wait = life["wait_seconds"]
            then = f"again after {wait * 1000:.0f} ms" if wait < 1 else f"again after {render.duration(wait)}"
            then = then if wait else "again at once"
        ran = f"{life['started_at']} +{render.duration(life['seconds'])}"
        yield f"{found['id']} generation {life['generation']}: {ran}: {life['reason']}, {then}"
        for line in life["last_lines"]:
            yield f"  | {render.visible(line)}"
