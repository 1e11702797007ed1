"""nssup.Supervisor: pools of workers from any asyncio program. What a program sees of the shell in loop.py.

Nothing is kept here but who listens: a Pool and a Worker are names, and every question is answered by the shell. What
waits, waits for events of it.
"""

import asyncio
import os
import signal as _signal
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from types import TracebackType

import msgspec

from nssup import loop, operation
from nssup.errors import ControlError, ExitCode, NssupError, Problem, SpecError
from nssup.events import Event, Exit, Input, Kill, Restart, Start, State, Stop
from nssup.follower import Follower
from nssup.lines import Record
from nssup.machine import Worker as Known
from nssup.operation import Goal, Judge
from nssup.selection import pool_of
from nssup.snapshot import members
from nssup.spec import PoolSpec, SupervisorSpec

EVENTS_BEHIND = 1000  # that an observer may be late by before he loses some
LAST_LINES = 10  # of a worker's output, told when it failed

_decode_record = msgspec.json.Decoder(Record).decode


class PoolFailed(NssupError):
    """A worker of the pool gave up, or was stopped, or is lost: what was waited for will not happen by itself.

    pool: its name. worker: the id of the worker. reason: why it is where it is. exit: how its last life ended, None
    where none did. last_lines: what it wrote last, at most LAST_LINES.
    """

    def __init__(self, worker: str, reason: str | None, exit: Exit | None, last_lines: list[str]) -> None:  # noqa: A002
        super().__init__(f"{worker} is not up: {reason or 'stopped'}" + (f": {last_lines[-1]}" if last_lines else ""))
        self.pool = pool_of(worker)
        self.worker = worker
        self.reason = reason
        self.exit = exit
        self.last_lines = last_lines


class EventsLost(msgspec.Struct, frozen=True):
    """So many events that came here are not told: their reader was too slow."""

    n: int


class Events:
    """What happens, as it happens: first an Event `snapshot` for each worker there is, then every change.

    Use as `async with supervisor.events() as events:` and iterate. Bounded: beyond EVENTS_BEHIND that wait to be read,
    events are counted instead, and an EventsLost stands where they are missing. The iteration ends with the supervisor.
    """

    def __init__(self, shell: loop.Supervisor, wanted: Callable[[Event], bool], first: Iterable[Event]) -> None:
        self._shell = shell
        self._wanted = wanted
        self._waiting: deque[Event | EventsLost] = deque(first)
        self._lost = 0
        self._ended = False
        self._woken: asyncio.Future[None] | None = None
        self._unsubscribe = shell.subscribe(self._note)

    def _note(self, event: Event) -> None:
        if not self._wanted(event):
            return
        if self._lost or len(self._waiting) >= EVENTS_BEHIND:
            self._lost += 1
        else:
            self._waiting.append(event)
        self._wake()

    def _wake(self) -> None:
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)

    def close(self) -> None:
        """What waits can still be read; then the iteration ends. May be called again."""
        self._ended = True
        self._unsubscribe()
        self._wake()

    async def __aenter__(self) -> "Events":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __aiter__(self) -> AsyncIterator[Event | EventsLost]:
        return self

    async def __anext__(self) -> Event | EventsLost:
        while not self._waiting:
            if self._lost:
                lost, self._lost = self._lost, 0
                return EventsLost(lost)
            if self._ended:
                raise StopAsyncIteration
            self._woken = asyncio.get_running_loop().create_future()
            await self._woken
        return self._waiting.popleft()


class Logs:
    """The records of what workers write, from now on. Iterate over it; `async with` or `close` ends it.

    Bounded: for who reads too slowly a record of stream `nssup` stands where some are missing.
    """

    def __init__(self, follower: Follower) -> None:
        self._follower = follower
        self._records: deque[bytes] = deque()

    def close(self) -> None:
        """What waits can still be read; then the iteration ends. May be called again."""
        self._follower.close()

    async def __aenter__(self) -> "Logs":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __aiter__(self) -> AsyncIterator[Record]:
        return self

    async def __anext__(self) -> Record:
        while not self._records:
            self._records.extend((await anext(self._follower)).splitlines())
        return _decode_record(self._records.popleft())


class Supervisor:
    """Pools of workers on the running event loop, asyncio's or uvloop's. Use as `async with`.

    Embedded, as a rule: no files, no socket, its workers end with it and with this process. Durable, if state_dir is
    given: its workers' output is in log files there, workers of `on_supervisor_death = "keep"` outlive a death of this
    process, and the next Supervisor on the same directory takes them over as their pools are added.

    Left by the end of the block, all workers are stopped by their stop sequences, pools in reverse order; by an
    exception or a cancellation, they are killed. Either way all are proven gone, and nothing of ours is left.
    """

    def __init__(self, spec: SupervisorSpec | None = None, *, state_dir: str | os.PathLike[str] | None = None) -> None:
        """spec: all directories of a durable one; state_dir: one for everything."""
        if spec is not None and state_dir is not None:
            raise TypeError("either spec or state_dir")
        if state_dir is not None:
            place = os.path.abspath(state_dir)
            spec = SupervisorSpec(
                state_dir=place, runtime_dir=f"{place}/run", log_dir=f"{place}/log", socket=f"{place}/run/nssup.sock"
            )
        self._shell = loop.Supervisor(spec)
        self._observers: list[Events] = []
        self._recent: deque[Event] = deque(maxlen=EVENTS_BEHIND)

    async def __aenter__(self) -> "Supervisor":
        """Raises ControlError when the directories are not to be had, OSError when nssup-init is not."""
        self._shell.subscribe(self._recent.append)
        await self._shell.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and not self._shell.leaving:
                self._shell.add_pools(())  # of pools that nobody added again, a dead supervisor's workers end as well
        finally:
            try:
                await self._shell.__aexit__(kind, error, trace)
            finally:
                for observer in self._observers:
                    observer.close()

    @property
    def epoch(self) -> int:
        """The number of this run on its state directory; 0 when embedded."""
        return self._shell.epoch

    @property
    def pools(self) -> Mapping[str, "Pool"]:
        """By name, in the order they were added; also those on their way out."""
        return {name: Pool(self._shell, name) for name in self._shell.workers.pools}

    async def add_pool(self, spec: PoolSpec, *, wait: Goal | None = None) -> "Pool":
        """Add a pool and start its workers, if it is enabled.

        wait: `ready` (running, and ready where readiness is asked), `running` or `done`: return when all of them are.
        Raises SpecError (the spec is wrong, unknown user), ControlError (there is a pool of this name, its log cannot
        be opened), and with wait PoolFailed; then the pool is there all the same.
        """
        self._shell.add_pool(_typed(spec))
        pool = Pool(self._shell, spec.name)
        if wait is not None:
            await pool.wait(wait)
        return pool

    async def remove_pool(self, name: str) -> None:
        """Stop all workers of a pool, each by its stop sequence, and forget it; returns when it is gone.

        Raises ControlError when there is no such pool.
        """
        self._shell.remove_pool(name)
        await _until(self._shell, lambda event: name not in self._shell.workers.pools)

    def pool(self, name: str) -> "Pool":
        """Raises ControlError when there is no such pool."""
        if name not in self._shell.workers.pools:
            raise ControlError("no-such-pool", f"there is no pool {name}", http_status=404, exit_code=ExitCode.NO_SUCH)
        return Pool(self._shell, name)

    def events(self, *, since: str | None = None, select: str = "*") -> Events:
        """What happens from now on, a snapshot first: see Events. To miss nothing, ask before the first pool is added.

        since: `epoch:seq` of an event: instead of a snapshot, all that came after it; ControlError when they are not
        here any more. select: a pool, a worker (`web/3`) or a pattern (`w*`, `web/*`); `*`: everything.
        """

        def wanted(event: Event) -> bool:
            return select == "*" or _is_meant(select, event.worker or event.pool)

        known = self._shell.workers.workers.values()
        first = map(self._snapshot, known) if since is None else self._after(since)
        observer = Events(self._shell, wanted, [event for event in first if wanted(event)])
        self._observers = [other for other in self._observers if not other._ended]
        self._observers.append(observer)
        return observer

    def _after(self, since: str) -> list[Event]:
        epoch, _, seq = since.partition(":")
        if not (epoch.isdecimal() and seq.isdecimal()):
            raise ControlError("bad-request", f"since={since!r}: write epoch:seq", exit_code=ExitCode.USAGE)
        oldest = self._recent[0].seq if self._recent else self._shell.workers.seq + 1
        if int(epoch) != self.epoch or not oldest - 1 <= int(seq) <= self._shell.workers.seq:
            raise ControlError("gone", f"the events after {since} are not here", http_status=410)
        return [event for event in self._recent if event.seq > int(seq)]

    def _snapshot(self, known: Known) -> Event:
        return Event(
            "snapshot",
            epoch=self.epoch,
            seq=self._shell.workers.seq,
            ts=self._shell.wall(self._shell.now()),
            worker=known.id,
            to=known.state.value,
            reason=known.reason,
            generation=known.generation,
            host_pid=known.host_pid,
            ns_pid=known.ns_pid,
            exit=known.last_exit,
        )

    def leave_running(self) -> None:
        """When this is left, let go of the workers that may outlive us: the next Supervisor on this state_dir takes
        them over. Raises ControlError without a state_dir."""
        if self._shell.spec is None:
            raise ControlError("not-kept", "an embedded supervisor leaves nothing running: give it a state_dir")
        self._shell.leave_running()


def _typed(spec: PoolSpec) -> PoolSpec:
    """spec as a config would have given it: lists are tuples, and everything is of its type. Raises SpecError."""
    try:
        return msgspec.convert(msgspec.to_builtins(spec), PoolSpec)
    except msgspec.ValidationError as error:
        raise SpecError(Problem("", 0, 0, f"pool.{spec.name}", str(error))) from None


def _is_meant(select: str, name: str | None) -> bool:
    if name is None:
        return False
    return fnmatchcase(name, select) or ("/" not in select and fnmatchcase(pool_of(name), select))


# --- waiting ---------------------------------------------------------------------------------------------------------


async def _until(shell: loop.Supervisor, judge: Callable[[Event | None], bool]) -> None:
    """Until judge says so: asked once now, without an event, and then of each."""
    if judge(None):
        return
    settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def note(event: Event) -> None:
        if not settled.done() and judge(event):
            settled.set_result(None)

    unsubscribe = shell.subscribe(note)
    try:
        await settled
    finally:
        unsubscribe()


async def _settle(shell: loop.Supervisor, work: Iterable[tuple[str, Input | None, Judge]]) -> None:
    """Feeds the inputs, and waits until each of the workers is as its judge wants. Raises PoolFailed for the first of
    which that will not be."""
    work = list(work)
    open_ = {worker_id: judge for worker_id, _, judge in work}
    failed: list[str] = []

    def judge_all(event: Event | None) -> bool:
        about = tuple(open_) if event is None else (event.worker,) if event.worker in open_ else ()
        for worker_id in about:
            ok = open_[worker_id](shell.workers.workers.get(worker_id))
            if ok is not None:
                del open_[worker_id]
                failed.extend([] if ok else [worker_id])
        return bool(failed) or not open_

    for worker_id, event, _ in work:
        if event is not None:
            shell.feed(worker_id, event)
    await _until(shell, judge_all)
    if failed:
        raise _failure(shell, failed[0])


def _failure(shell: loop.Supervisor, worker_id: str) -> PoolFailed:
    known = shell.workers.workers.get(worker_id)
    if known is None:
        return PoolFailed(worker_id, "removed", None, [])
    return PoolFailed(worker_id, known.reason, known.last_exit, shell.last_lines(worker_id, LAST_LINES))


# --- pools and workers -----------------------------------------------------------------------------------------------


class Pool:
    """A pool of a Supervisor. What waits can be cancelled: what was begun goes on."""

    def __init__(self, shell: loop.Supervisor, name: str) -> None:
        self._shell = shell
        self.name = name

    def __repr__(self) -> str:
        return f"<nssup.Pool {self.name}>"

    @property
    def spec(self) -> PoolSpec:
        """As it was added; `workers` is how many are wanted now. Raises ControlError when it is gone."""
        if self.name not in self._shell.workers.pools:
            raise ControlError("no-such-pool", f"there is no pool {self.name}", http_status=404)
        return self._shell.workers.pools[self.name]

    @property
    def workers(self) -> "list[Worker]":
        """Those it has now, also some that are being removed; empty when the pool is gone."""
        return [Worker(self._shell, worker_id) for worker_id in self._ids()]

    def _ids(self) -> tuple[str, ...]:
        return tuple(members(self._shell.workers).get(self.name, ()))

    def logs(self) -> Logs:
        """What its workers write from now on, one record a line."""
        return Logs(self._shell.logs.follow([self.name]))

    async def wait(self, goal: Goal) -> None:
        """Until all its workers are `ready`, `running`, `stopped` or `done`. A restart in between is no end.

        Raises PoolFailed once one of them has given up, or will not get there by itself.
        """
        await _settle(self._shell, [(worker_id, None, operation.reached(goal)) for worker_id in self._ids()])

    async def wait_ready(self) -> None:
        """Until all its workers run, and are ready where readiness is asked. Raises PoolFailed, as `wait`."""
        await self.wait("ready")

    async def start(self) -> None:
        """Have all its workers up. Returns when they run; raises PoolFailed when one ends instead."""
        await _settle(self._shell, [(worker_id, Start(), operation.up) for worker_id in self._ids()])

    async def stop(self) -> None:
        """Have all its workers down, by their stop sequences. Returns when nothing is left of any."""
        await _settle(self._shell, [(worker_id, Stop(), operation.down) for worker_id in self._ids()])

    async def restart(self, rolling: bool = False) -> None:
        """Stop all its workers and start them again; rolling: one after the other, the next only when one is up again.

        Raises PoolFailed when one does not come up; those that were to follow are left alone.
        """
        for group in [(worker_id,) for worker_id in self._ids()] if rolling else [self._ids()]:
            there = self._shell.workers.workers
            judges = [(each, operation.renewed(there[each].generation)) for each in group if each in there]
            await _settle(self._shell, [(worker_id, Restart(), judge) for worker_id, judge in judges])

    async def scale(self, n: int) -> None:
        """Have n workers. Returns when the new ones run and the others are gone. In a durable supervisor it lasts.

        Raises ControlError (a negative number, the pool is gone), PoolFailed.
        """
        before = self._ids()
        self._shell.scale(self.name, n)
        there = self._shell.workers.workers
        moving = [each for each in self._ids() if each not in before or there[each].removing]
        await _settle(self._shell, [(worker_id, None, operation.scaled) for worker_id in moving])


class Worker:
    """A worker of a pool, by its id (`web/3`), over restarts too. Waits can be cancelled: what was begun goes on."""

    def __init__(self, shell: loop.Supervisor, worker_id: str) -> None:
        self._shell = shell
        self.id = worker_id

    def __repr__(self) -> str:
        return f"<nssup.Worker {self.id} {self.state}>"

    @property
    def _known(self) -> Known | None:
        return self._shell.workers.workers.get(self.id)

    @property
    def host_pid(self) -> int | None:
        """Its program's PID as this process sees it, None when there is none."""
        return self._known.host_pid if self._known else None

    @property
    def ns_pid(self) -> int | None:
        """Its program's PID in its own namespace, None when there is none."""
        return self._known.ns_pid if self._known else None

    @property
    def state(self) -> State:
        """`stopped` also when it was scaled away."""
        return self._known.state if self._known else State.STOPPED

    @property
    def reason(self) -> str | None:
        """Why it is in this state, None while it runs (docs/contracts.md has them all)."""
        return self._known.reason if self._known else None

    @property
    def ready(self) -> bool:
        """It runs, and is ready where readiness is asked."""
        return self._known is not None and self._known.ready

    @property
    def generation(self) -> int:
        """The number of its newest life, 0 before the first."""
        return self._known.generation if self._known else 0

    @property
    def restarts(self) -> int:
        """Automatic ones, since somebody last started it."""
        return self._known.restarts if self._known else 0

    @property
    def last_exit(self) -> Exit | None:
        """How its last life that is over ended, None before that."""
        return self._known.last_exit if self._known else None

    async def start(self) -> None:
        """Have it up. Raises PoolFailed when it ends instead, ControlError when it was scaled away."""
        await _settle(self._shell, [(self.id, Start(), operation.up)])

    async def stop(self) -> None:
        """Have it down, by its stop sequence. Returns when nothing is left of it. Raises as start."""
        await _settle(self._shell, [(self.id, Stop(), operation.down)])

    async def restart(self) -> None:
        """Stop it and start it again. Returns when it runs. Raises as start."""
        await _settle(self._shell, [(self.id, Restart(), operation.renewed(self.generation))])

    async def wait(self) -> Exit:
        """How its present life ends, when nothing is left of it; or at once, how the last one ended, if it has none.

        Raises PoolFailed when that cannot be known: it never ran, and is not about to.
        """
        generation = self.generation
        found: list[Exit] = []

        def judge(event: Event | None) -> bool:
            known = self._known
            if event is not None and event.worker == self.id and event.exit is not None:
                found[:] = [event.exit]
            if known is None:
                return True
            if known.last_exit is not None and (known.generation > generation or not known.alive):
                found[:] = [known.last_exit]
                return True
            return known.state in (State.STOPPED, State.FAILED, State.LOST)

        await _until(self._shell, judge)
        if not found:
            raise _failure(self._shell, self.id)
        return found[0]

    def signal(self, signo: int, *, tree: bool = False) -> None:
        """To its program, or to every process of its namespace (tree). Nothing happens when there is none.

        Raises ControlError when it was scaled away, ValueError when there is no such signal.
        """
        if signo not in _signal.valid_signals():
            raise ValueError(f"{signo} is no signal")
        self._shell.feed(self.id, Kill(signo, tree))

    def logs(self) -> Logs:
        """What it writes from now on, one record a line."""
        return Logs(self._shell.logs.follow([pool_of(self.id)], workers={self.id}))
