"""Tries probes when they are due, a bounded number at a time, and passes on what the results mean.

One timer for the earliest try of all; a worker that asked for no probe is not known here. What is decided is decided
in probing.
"""

import asyncio
import heapq
from collections import deque
from typing import NamedTuple, Protocol

from nssup import probing
from nssup.events import LifeInput, State
from nssup.follower import Follower
from nssup.machine import Worker
from nssup.probe import Failed, LineWatch, NotAsked, ask
from nssup.probing import Gauge, Name
from nssup.readiness import awaited, awaits_startup, succeeded
from nssup.spec import PoolSpec, Probe, expand

AT_ONCE = 32  # tries under way
_ALARM_SLACK = 0.001  # uvloop may fire a timer up to 1 ms early
_REMEMBERED = 1000  # lines of a life that was taken over, in which the one that is waited for may be


class Shell(Protocol):
    """What the prober needs of the supervisor."""

    def now(self) -> float: ...
    def probed(self, worker_id: str) -> tuple[PoolSpec, Worker] | None:
        """The worker as it is now, None when it is gone."""

    def probe_says(self, worker_id: str, event: LifeInput) -> None: ...
    def probe_failed(self, worker_id: str, name: Name, why: str) -> None:
        """Told of the first failure after a success, and of one that changes something."""

    async def run_probe(self, worker_id: str, generation: int, words: tuple[str, ...], seconds: float) -> str | None:
        """Runs a command beside the program; why it failed, None if it did not. Raises NotAsked."""

    def watch_lines(self, watch: LineWatch) -> None: ...
    def unwatch_lines(self, watch: Follower) -> None: ...
    def last_lines_of(self, worker_id: str, count: int) -> list[bytes]: ...


class Outcome(NamedTuple):
    """How the last try of a probe went. why: "" when it succeeded. at: CLOCK_BOOTTIME seconds."""

    why: str
    at: float


class _Probed:
    """One life. gauges: of the probes that are tried now, and whether somebody waits for each; at: when each is tried
    next. lines: waited for, and seen: the names of those that have come."""

    __slots__ = ("at", "gauges", "generation", "last", "lines", "seen", "tries")

    def __init__(self, generation: int) -> None:
        self.generation = generation
        self.gauges: dict[Name, tuple[Gauge, bool]] = {}
        self.at: dict[Name, float] = {}
        self.tries: dict[Name, asyncio.Task[None]] = {}
        self.lines: dict[Name, LineWatch] = {}
        self.seen: set[Name] = set()
        self.last: dict[Name, Outcome] = {}


def has_probes(spec: PoolSpec) -> bool:
    """Whether there is something to do here for workers of the pool."""
    return any(probe is not None and probe.notify is None for probe in (spec.startup, spec.ready, spec.live))


class Prober:
    def __init__(self, loop: asyncio.AbstractEventLoop, tasks: asyncio.TaskGroup, shell: Shell) -> None:
        self._loop = loop
        self._tasks = tasks
        self._shell = shell
        self._probed: dict[str, _Probed] = {}
        self._heap: list[tuple[float, str, int, Name]] = []
        self._due: deque[tuple[str, int, Name]] = deque()  # whose turn comes when a try ends
        self._running = 0
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_at: float | None = None
        self._closed = False

    def last(self, worker_id: str) -> dict[Name, Outcome]:
        """How the last try of each probe of the worker's present life went."""
        found = self._probed.get(worker_id)
        return {} if found is None else dict(found.last)

    def close(self) -> None:
        self._closed = True
        if self._alarm is not None:
            self._alarm.cancel()
        for worker_id in list(self._probed):
            self._drop(worker_id)

    # --- what is wanted ----------------------------------------------------------------------------------------------

    def follow(self, worker_id: str, spec: PoolSpec, worker: Worker | None) -> None:
        """The worker is so now (None: it is gone). Calls nobody back: that comes in a later turn of the loop."""
        found = self._probed.get(worker_id)
        if found is not None and (worker is None or worker.generation != found.generation or not worker.alive):
            self._drop(worker_id)
            found = None
        if worker is None or not worker.alive or self._closed:
            return
        if found is None:
            found = self._probed[worker_id] = _Probed(worker.generation)
        self._await_lines(worker_id, spec, worker, found)
        wanted = probing.wanted(spec, worker)
        for name in [name for name, (_, hurried) in found.gauges.items() if wanted.get(name) is not hurried]:
            self._end(found, name)
        for name, hurried in wanted.items():
            if name not in found.gauges:
                found.gauges[name] = (probing.begin(name, worker, hurried), hurried)
                self._schedule(worker_id, spec, found, name)

    def _drop(self, worker_id: str) -> None:
        found = self._probed.pop(worker_id)
        for name in list(found.gauges):
            self._end(found, name)
        for watch in list(found.lines.values()):
            self._shell.unwatch_lines(watch)

    def _end(self, found: _Probed, name: Name) -> None:
        del found.gauges[name]
        found.at.pop(name, None)
        task = found.tries.pop(name, None)
        if task is not None:
            task.cancel()

    # --- lines -------------------------------------------------------------------------------------------------------

    def _await_lines(self, worker_id: str, spec: PoolSpec, worker: Worker, found: _Probed) -> None:
        """From before its program runs on: a line may come while another probe is still awaited."""
        names: tuple[tuple[Name, Probe | None], ...] = (("startup", spec.startup), ("ready", spec.ready))
        for name, probe in names:
            if probe is None or probe.log is None:
                continue
            if worker.state is not State.STARTING:
                if name in found.lines:
                    self._shell.unwatch_lines(found.lines.pop(name))
            elif name not in found.lines and name not in found.seen:
                self._await_line(worker_id, worker, found, name, probe.log)
        if found.seen and worker.state is State.STARTING:
            self._loop.call_soon(self._line_counts, worker_id, found)

    def _await_line(self, worker_id: str, worker: Worker, found: _Probed, name: Name, pattern: str) -> None:
        def seen() -> None:
            found.seen.add(name)
            found.lines.pop(name, None)
            self._loop.call_soon(self._line_counts, worker_id, found)

        watch = found.lines[name] = LineWatch(worker_id, worker.generation, pattern, seen, self._shell.unwatch_lines)
        self._shell.watch_lines(watch)
        if worker.running_since is not None:  # taken over: it may have said so to somebody else
            lines = b"".join(self._shell.last_lines_of(worker_id, _REMEMBERED))
            watch.offer("", worker_id, lines, len(lines))

    def _line_counts(self, worker_id: str, found: _Probed) -> None:
        """A line that was waited for has come; it counts when its probe is the one that is awaited."""
        there = self._shell.probed(worker_id)
        if there is None or self._probed.get(worker_id) is not found:
            return
        spec, worker = there
        if worker.state is not State.STARTING or worker.running_since is None:
            return
        probe = awaited(spec, worker)
        name: Name = "startup" if awaits_startup(spec, worker) else "ready"
        if probe is not None and probe.log is not None and name in found.seen:
            self._shell.probe_says(worker_id, succeeded(spec, worker))

    # --- tries -------------------------------------------------------------------------------------------------------

    def _schedule(self, worker_id: str, spec: PoolSpec, found: _Probed, name: Name) -> None:
        gauge, hurried = found.gauges[name]
        probe: Probe = getattr(spec, name)
        key = f"{worker_id}:{found.generation}:{name}"
        at = self._shell.now() + probing.wait(probe, gauge, hurried, key)
        found.at[name] = at
        heapq.heappush(self._heap, (at, worker_id, found.generation, name))
        self._arm()

    def _arm(self) -> None:
        at = self._heap[0][0] if self._heap else None
        if at == self._alarm_at or self._closed:
            return
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm_at, self._alarm = at, None
        if at is not None:
            self._alarm = self._loop.call_later(max(0.0, at - self._shell.now()) + _ALARM_SLACK, self._on_alarm)

    def _on_alarm(self) -> None:
        self._alarm = self._alarm_at = None
        now = self._shell.now()
        while self._heap and self._heap[0][0] <= now:
            at, worker_id, generation, name = heapq.heappop(self._heap)
            found = self._probed.get(worker_id)
            if found is not None and found.generation == generation and found.at.get(name) == at:
                del found.at[name]
                self._due.append((worker_id, generation, name))
        self._try_next()
        self._arm()

    def _try_next(self) -> None:
        while self._due and self._running < AT_ONCE and not self._closed:
            worker_id, generation, name = self._due.popleft()
            found, there = self._probed.get(worker_id), self._shell.probed(worker_id)
            if found is None or there is None or found.generation != generation:
                continue
            if name not in found.gauges or name in found.tries:
                continue
            self._running += 1
            probe: Probe = getattr(there[0], name)
            task = self._tasks.create_task(self._try(worker_id, found, name, probe, there[1].index), name="nssup-probe")
            found.tries[name] = task
            task.add_done_callback(self._tried)

    def _tried(self, task: asyncio.Task[None]) -> None:
        self._running -= 1
        self._try_next()

    async def _try(self, worker_id: str, found: _Probed, name: Name, probe: Probe, index: int) -> None:
        """Cancelled when nobody wants to know any more."""
        task = found.tries[name]
        try:
            why: str | None = await self._answer(worker_id, found.generation, probe, index)
        except NotAsked:
            why = None
        if found.tries.get(name) is task:
            del found.tries[name]
            self._result(worker_id, found, name, why)

    async def _answer(self, worker_id: str, generation: int, probe: Probe, index: int) -> str:
        """Why the probe failed, "" if it did not."""
        pool = worker_id.partition("/")[0]
        if probe.exec is not None:
            words = tuple(expand(word, pool, index, generation) for word in probe.exec)
            return await self._shell.run_probe(worker_id, generation, words, probe.timeout) or ""
        place = probe.http or probe.tcp or probe.unix or ""
        try:
            await ask(probe, expand(place, pool, index, generation))
        except Failed as error:
            return str(error)
        return ""

    def _result(self, worker_id: str, found: _Probed, name: Name, why: str | None) -> None:
        """why None: there is none."""
        there = self._shell.probed(worker_id)
        if there is None or self._probed.get(worker_id) is not found or name not in found.gauges:
            return
        spec, worker = there
        before, hurried = found.gauges[name]
        if why is None:
            found.gauges[name] = (before._replace(tries=before.tries + 1), hurried)
            self._schedule(worker_id, spec, found, name)
            return
        now = probing.after(getattr(spec, name), before, not why)
        found.gauges[name] = (now, hurried)
        found.last[name] = Outcome(why, self._shell.now())
        event = probing.meaning(name, spec, worker, before, now)
        if why and (event is not None or (now.failed == 1 and not hurried)):
            self._shell.probe_failed(worker_id, name, why)
        if event is not None:
            self._shell.probe_says(worker_id, event)
        if self._probed.get(worker_id) is found and found.gauges.get(name) == (now, hurried):
            self._schedule(worker_id, spec, found, name)
