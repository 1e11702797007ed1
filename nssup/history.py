"""The last lives of a worker, as people look at them when they ask what happened. Pure.

Kept in memory, a bounded number for each worker. A worker that was taken over brings the last one along: the notes of
lives hold when that was and how it ended, and no more (docs/contracts.md, part c).
"""

from typing import NamedTuple

from nssup.events import Exit, State
from nssup.machine import Worker

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
