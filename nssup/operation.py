"""What was asked of some workers, when each is settled, and how it went.

An operation outlives the request that began it: it is fed by turns of the loop and hears of its workers by published
events. Nothing here polls or reads a clock but the time-out.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, Protocol, TypeAlias

import msgspec

from nssup import render
from nssup.events import Event, Input, State
from nssup.machine import Worker
from nssup.workers import WorkerSet

BATCH = 32  # inputs fed in one turn of the loop: each may be a launch, about half a millisecond
FAILED_LINES = 10  # last lines of output told about a worker that failed
FAILED_WORKERS = 5  # about so many of them

Goal = Literal["ready", "running", "stopped", "done"]
UP: tuple[Goal, ...] = ("ready", "running")
DOWN: tuple[Goal, ...] = ("stopped",)


class Records(Protocol):
    def last_records(self, worker_id: str, n: int) -> list[bytes]: ...


class Target(Protocol):
    """What an operation needs of a supervisor."""

    @property
    def workers(self) -> WorkerSet: ...
    @property
    def logs(self) -> Records: ...
    def feed(self, worker_id: str, event: Input) -> None: ...
    def subscribe(self, callback: Callable[[Event], None]) -> Callable[[], None]: ...


# --- when a worker is settled --------------------------------------------------------------------------------------

Judge: TypeAlias = Callable[[Worker | None], bool | None]  # None: not yet. A worker that is gone is None.

_QUIET = frozenset({"removed", State.STOPPED, State.DONE})  # what such a worker wrote explains nothing
_DOWN = frozenset({State.STOPPED, State.DONE, State.FAILED})


def at_once(w: Worker | None) -> bool | None:
    return True


def up(w: Worker | None) -> bool | None:
    """Started: it runs, or ran and ended well. Falling into backoff is a failure, though it will be tried again."""
    if w is None:
        return False
    match w.state:
        case State.RUNNING | State.DONE:
            return True
        case State.FAILED | State.LOST | State.BACKOFF:
            return False
        case State.STOPPED if not w.want_up:
            return False
    return None


def down(w: Worker | None) -> bool | None:
    """Stopped, and proven so."""
    if w is None or w.state in _DOWN:
        return True
    return False if w.state is State.LOST or w.want_up else None


def done(w: Worker | None) -> bool | None:
    if w is None or w.state in (State.FAILED, State.LOST, State.BACKOFF):
        return False
    return True if w.state is State.DONE else None


def renewed(before: int) -> Judge:
    """Up again in a later life than before."""

    def judge(w: Worker | None) -> bool | None:
        if w is not None and w.generation == before:
            return False if w.state is State.STOPPED and not w.want_up else None
        return up(w)

    return judge


def scaled(w: Worker | None) -> bool | None:
    """Gone, or there as its pool is: up, or stopped with it."""
    if w is None:
        return True
    if w.removing:
        return None
    return True if w.state is State.STOPPED and not w.want_up else up(w)


def reached(goal: Goal) -> Judge:
    """For `wait`, which also waits for what may yet happen: backoff is no end."""

    def judge(w: Worker | None) -> bool | None:
        if goal == "stopped":
            return True if w is None or w.state in _DOWN else (False if w.state is State.LOST else None)
        if w is None or w.state in (State.FAILED, State.LOST):
            return False
        if w.state is State.DONE:
            return True
        return True if w.state is State.RUNNING and goal != "done" and (w.ready or goal == "running") else None

    return judge


def aim(wait: bool | Goal, usual: Judge, means: Sequence[Goal]) -> Judge:
    """usual: what waiting is for with this verb; means: the goals that say the same."""
    if wait is False:
        return at_once
    if wait is True or wait in means:
        return usual
    return done if wait == "done" else reached(wait)


def never(w: Worker | None) -> bool | None:
    """There is nobody to be signalled."""
    return False


def down_for_good(w: Worker | None) -> bool | None:
    """Down by a shutdown, which asks for it only after the answer began."""
    if w is None or w.state in _DOWN:
        return True
    return False if w.state is State.LOST else None


class _Record(msgspec.Struct):
    msg: str | None = None
    data: msgspec.Raw = msgspec.Raw(b"")


_decode_record = msgspec.json.Decoder(_Record).decode


def line_of(record: bytes) -> str:
    """What the worker wrote, as text."""
    found = _decode_record(record)
    return bytes(found.data).decode() if found.msg is None else found.msg


class Operation:
    """What was asked of some workers, and what becomes of each. Goes on when nobody waits for it any more.

    Inputs are fed in batches, one a turn of the loop, so that a thousand launches let others have theirs.
    """

    def __init__(self, supervisor: Target, work: Iterable[tuple[str, Input | None, Judge]]) -> None:
        """work: (worker id, what to feed, when it is settled)."""
        self._supervisor = supervisor
        self._todo = deque(work)
        self._order = [worker_id for worker_id, _, _ in self._todo]
        self._open: dict[str, Judge] = {}
        self._results: dict[str, render.Result] = {}
        self._settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._unsubscribe = supervisor.subscribe(self._published)
        self._feed()

    def _feed(self) -> None:
        for _ in range(min(BATCH, len(self._todo))):
            worker_id, event, judge = self._todo.popleft()
            self._open[worker_id] = judge
            if event is not None and worker_id in self._supervisor.workers.workers:
                self._supervisor.feed(worker_id, event)
            self._judge(worker_id)
        if self._todo:
            asyncio.get_running_loop().call_soon(self._feed)
        self._check()

    def _published(self, event: Event) -> None:
        if event.worker in self._open:
            self._judge(event.worker)
            self._check()

    def _judge(self, worker_id: str) -> None:
        judge = self._open.get(worker_id)
        if judge is None:
            return
        ok = judge(self._supervisor.workers.workers.get(worker_id))
        if ok is not None:
            del self._open[worker_id]
            self._results[worker_id] = self._result(worker_id, ok)

    def _check(self) -> None:
        if not self._open and not self._todo and not self._settled.done():
            self._settled.set_result(None)

    def _result(self, worker_id: str, ok: bool, *, timed_out: bool = False) -> render.Result:
        w = self._supervisor.workers.workers.get(worker_id)
        return {
            "id": worker_id,
            "state": w.state.value if w else "removed",
            "reason": w.reason if w else None,
            "ok": ok,
            "timed_out": timed_out,
            "generation": w.generation if w else 0,
            "host_pid": w.host_pid if w else None,
            "ns_pid": w.ns_pid if w else None,
            "last_lines": [],
        }

    def end(self) -> None:
        """Wait no longer: what is not settled now is not."""
        if not self._settled.done():
            self._settled.set_result(None)

    async def wait_settled(self, timeout: float | None) -> list[render.Result]:
        """What became of each worker, in the order they were given; of some that failed, their last output too."""
        try:
            async with asyncio.timeout(timeout):
                await self._settled
        except TimeoutError:
            pass
        finally:
            self._unsubscribe()
        for worker_id in self._order:
            if worker_id not in self._results:
                self._results[worker_id] = self._result(worker_id, False, timed_out=timeout is not None)
        found = [self._results[worker_id] for worker_id in self._order]
        for result in [r for r in found if not r["ok"] and r["state"] not in _QUIET][:FAILED_WORKERS]:
            records = self._supervisor.logs.last_records(result["id"], FAILED_LINES)
            result["last_lines"] = [line_of(record) for record in records]
        return found
