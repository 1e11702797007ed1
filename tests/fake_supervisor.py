"""A supervisor without processes: the real WorkerSet and LogHub, and a world that does what a pool's command says.

good      runs until it is told to end          stubborn  ignores every signal but SIGKILL
missing   exec fails                            crash     runs, writes a line, exits 3
job       runs and exits 0                      slow      never gets as far as running
"""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING, NamedTuple

from nssup import procfs, wire
from nssup.events import Empty, Event, Exit, Exited, Gone, Input, Launched, Running, SetupFailed, Started
from nssup.held import Sockets
from nssup.logs import LogHub, Streams
from nssup.machine import Action, Forget, KillTree, Launch, SignalMain, SignalTree
from nssup.spec import PoolSpec
from nssup.wire import Notified
from nssup.workers import Actions, WorkerSet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from nssup.custody import Orphan

WALL = 1_800_000_000.0  # of boot


class Used(NamedTuple):
    cpu_seconds: float | None
    memory_bytes: int | None


class Supervisor:
    """As ctl.Supervisor wants it. `time` stands still unless a test moves it (`advance`)."""

    def __init__(self, log_dir: Path | None = None) -> None:
        self.host_pid = os.getpid()
        self.version = "0.1.0"
        self.started_at = WALL
        self.epoch = 7
        self.time = 100.0
        self.asked_to_end = asyncio.Event()
        self.fed: list[tuple[str, Input]] = []
        self.signals: list[tuple[str, int, bool]] = []
        self.inside: list[tuple[str, int, int]] = []
        self.stats_read = 0
        self.configured: dict[str, int] = {}
        self.lost: list[Orphan] = []
        self.strange: list[str] = []
        self.left = False
        self._subscribers: list[Callable[[Event], None]] = []
        self._loop = asyncio.get_running_loop()
        self._next_host_pid = 5000
        self._pipes: dict[str, tuple[int, Streams]] = {}  # worker -> end to write to
        self.workers = WorkerSet(self._publish, epoch=self.epoch, wall=self.wall)
        self.logs = LogHub(self._loop, log_dir, lambda: WALL + self.time)
        self.sockets = Sockets()

    async def close(self) -> None:
        for worker_id in list(self._pipes):
            self._close_pipe(worker_id)
        await self.logs.close()

    # As the real one.

    def now(self) -> float:
        return self.time

    def wall(self, at: float) -> float:
        return WALL + at

    def add(self, name: str, command: str = "good", workers: int = 1, **changes: object) -> None:
        spec = PoolSpec(name=name, command=(command,), workers=workers, **changes)  # type: ignore[arg-type]
        self.logs.open_pool(name)
        self._do(self.workers.add_pool(spec, self.time))

    def feed(self, worker_id: str, event: Input) -> None:
        self.fed.append((worker_id, event))
        self._feed(worker_id, event)

    def scale_pools(self, wanted: Mapping[str, int]) -> None:
        for pool, n in wanted.items():
            self._do(self.workers.scale(pool, n, self.time))

    def environment(self, worker_id: str) -> list[bytes]:
        pool, _, index = worker_id.partition("/")
        said = [f"{name}={value}".encode() for name, value in self.workers.pools[pool].env.items()]
        return [*said, b"PATH=/bin", b"HOME=/root", f"NSSUP_INDEX={index}".encode()]

    def configured_workers(self, pool: str) -> int | None:
        return self.configured.get(pool)

    def tree(self, worker_id: str) -> list[procfs.Process]:
        w = self.workers.workers[worker_id]
        if w.init_host_pid is None or w.host_pid is None:
            return []
        return [
            procfs.Process(w.init_host_pid, 1, 1, 1, "nssup-init", 0.0, 1 << 20),
            procfs.Process(w.host_pid, 2, w.init_host_pid, 3, "app", 0.5, 4 << 20),
            procfs.Process(w.host_pid + 1000, 3, w.host_pid, 1, "app \x1b[2J", 0.25, 1 << 20),
        ]

    def signal_inside(self, worker_id: str, ns_pid: int, signo: int) -> bool:
        self.inside.append((worker_id, ns_pid, signo))
        return True

    def enable_pools(self, pools: Iterable[str], enabled: bool) -> None:
        for pool in pools:
            self.workers.enable(pool, enabled, self.time)

    async def run_inside(self, worker_id: str, argv: Sequence[bytes], stdio: Sequence[int]) -> wire.Done | None:
        """Says to its stdout what it is, and exits 7; `sleep` never ends."""
        try:
            if argv[0] == b"sleep":
                await self._loop.create_future()
            if stdio:
                os.write(stdio[1], b" ".join([worker_id.encode(), *argv]))
        finally:
            for fd in stdio:
                os.close(fd)
        return wire.Done(1, self.epoch, 1, 0, 0, 0, wire.Exit(os.CLD_EXITED, 7, 0, 0, 0, 0))

    def orphans(self) -> list[Orphan]:
        return self.lost

    def set_aside(self) -> list[str]:
        return self.strange

    def outlives_us(self, worker_id: str) -> bool:
        return self.workers.pools[worker_id.partition("/")[0]].on_supervisor_death == "keep"

    def leave_running(self) -> None:
        self.left = True
        self.shutdown()

    def subscribe(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback) if callback in self._subscribers else None

    @property
    def subscribers(self) -> int:
        return len(self._subscribers)

    def host_pid_owner(self, host_pid: int) -> str | None:
        there = self.workers.workers.values()
        return next((w.id for w in there if host_pid in (w.host_pid, w.init_host_pid) and host_pid), None)

    def stats(self, worker_id: str) -> Used | None:
        self.stats_read += 1
        return Used(0.125, 3 << 20)

    def is_adopted(self, worker_id: str) -> bool:
        return False

    def notified(self, worker_id: str) -> Notified:
        return Notified()

    def probes(self, worker_id: str) -> dict[str, str]:
        return {}

    def namespaces(self, worker_id: str) -> dict[str, int]:
        return {"pid": 4026532201, "mount": 4026532200}

    def shutdown(self) -> None:
        self.asked_to_end.set()

    # The world.

    def advance(self, seconds: float) -> None:
        self.time += seconds
        self._do(self.workers.due(self.time))

    def die(self, worker_id: str, ended: Exit) -> None:
        """The worker's program ends by itself."""
        w = self.workers.workers[worker_id]
        self._end(worker_id, w.generation, ended)

    def write(self, worker_id: str, text: str) -> None:
        os.write(self._pipes[worker_id][0], text.encode())

    def _publish(self, event: Event) -> None:
        for callback in tuple(self._subscribers):
            callback(event)

    def _feed(self, worker_id: str, event: Input) -> None:
        if worker_id in self.workers.workers:
            self._do(self.workers.feed(worker_id, event, self.time))

    def _do(self, actions: Actions) -> None:
        for worker_id, action in actions:
            if not isinstance(action, Forget):
                self._loop.call_soon(self._act, worker_id, action)

    def _act(self, worker_id: str, action: Action) -> None:
        pool = worker_id.partition("/")[0]
        command = self.workers.pools[pool].command[0]
        if isinstance(action, Launch):
            self._launch(worker_id, action.generation, command)
        elif isinstance(action, SignalMain | SignalTree):
            self.signals.append((worker_id, action.signo, isinstance(action, SignalTree)))
            if command != "stubborn" and action.signo != signal.SIGUSR1:
                self._end(worker_id, action.generation, Exit(reason="signal:SIGTERM", signal=action.signo))
        elif isinstance(action, KillTree):
            self._end(worker_id, action.generation, Exit(reason="signal:SIGKILL", signal=9))

    def _launch(self, worker_id: str, generation: int, command: str) -> None:
        self._next_host_pid += 2
        init = self._next_host_pid
        self._feed(worker_id, Launched(generation, init))
        if command == "slow":
            return
        if command == "missing":
            self._feed(worker_id, SetupFailed(generation, "exec-failed:ENOENT"))
            self._feed(worker_id, Empty(generation))
            self._loop.call_soon(self._feed, worker_id, Gone(generation))
            return
        self._open_pipe(worker_id, generation).identify(init + 1, 2)
        self._feed(worker_id, Started(generation, init + 1, 2))
        self._feed(worker_id, Running(generation))
        if command == "crash":
            self.write(worker_id, "cannot go on\n")
            self._loop.call_soon(self._end, worker_id, generation, Exit(reason="exit:3", code=3))
        if command == "job":
            self._loop.call_soon(self._end, worker_id, generation, Exit(reason="exit:0", code=0))

    def _end(self, worker_id: str, generation: int, ended: Exit) -> None:
        self._close_pipe(worker_id)
        self._feed(worker_id, Exited(generation, ended, empty=True))
        self._loop.call_soon(self._feed, worker_id, Gone(generation))

    def _open_pipe(self, worker_id: str, generation: int) -> Streams:
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        streams = self.logs.attach(worker_id.partition("/")[0], worker_id, generation, read_end)
        self._pipes[worker_id] = write_end, streams
        return streams

    def _close_pipe(self, worker_id: str) -> None:
        write_end, streams = self._pipes.pop(worker_id, (-1, None))
        if streams is not None:
            os.close(write_end)
            self.logs.drain(streams)
