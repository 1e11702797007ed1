"""The supervisor: the one shell round the pure core. Reads the clock, feeds events, performs actions, publishes.

One way through it: a descriptor is readable -> messages of init -> events -> WorkerSet.feed -> actions -> done here.
Nothing here decides. One timer is armed, for the earliest deadline; at rest nothing wakes up.
"""

import asyncio
import collections
import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import msgspec

from nssup import __version__, clone, machine, plan, procfs, wire
from nssup.custody import Directories
from nssup.errors import LaunchError, Problem, SpecError, errno_name
from nssup.events import (
    Empty,
    Event,
    Exited,
    Gone,
    Input,
    Kill,
    Launched,
    LaunchFailed,
    Running,
    SetupFailed,
    Started,
    State,
    Stop,
)
from nssup.facts import Host
from nssup.journal import Journal, Mode
from nssup.logs import LogHub, Streams
from nssup.record import Identity
from nssup.selection import pool_of
from nssup.spec import PoolSpec, SupervisorSpec, User
from nssup.watch import Watch
from nssup.workers import Actions, WorkerSet

# Launches in one turn of the loop: enough to be quick, few enough that exits and requests are handled in between.
LAUNCHES_PER_TURN = 8
# uvloop may fire a timer up to 1 ms early; an alarm that came too early would be armed again and again until then.
_ALARM_SLACK = 0.001
_AT_REST = frozenset({State.STOPPED, State.FAILED, State.DONE})


def now() -> float:
    """CLOCK_BOOTTIME in seconds: the one clock (docs/contracts.md, part i)."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class _Life:
    """One life of a worker as the shell holds it. Flags keep what init says once from being believed twice."""

    __slots__ = ("exited", "failed", "over", "pool", "process", "running", "streams", "worker_id")

    def __init__(self, worker_id: str, pool: str, process: clone.Process) -> None:
        self.worker_id = worker_id
        self.pool = pool
        self.process = process
        self.streams: Streams | None = None
        self.running = self.failed = self.exited = self.over = False


class Supervisor:
    """Runs pools of workers on the running event loop, asyncio's or uvloop's.

    With a SupervisorSpec it has directories, logs and a number of its own (epoch); without, it is embedded: no files,
    no socket, its workers' output goes to followers only. Use as `async with`: however that is left, nothing is left
    behind. Touches no signal handler and reaps only what it launched.
    """

    def __init__(self, spec: SupervisorSpec | None = None, *, stderr: Mode = "none") -> None:
        """stderr: how own events are shown there: `json`, `text` or `none`."""
        self.spec = spec
        self.host_pid = os.getpid()
        self.version = __version__
        self.started_at = time.time()
        self.epoch = 0
        self._stderr = stderr
        self._host = Host()
        self._privileged = self._host.capable("SYS_ADMIN")
        self._environ = dict(os.environ)
        self._prepared: dict[str, plan.Prepared] = {}
        self._lives: dict[tuple[str, int], _Life] = {}
        self._launches: collections.deque[tuple[str, int]] = collections.deque()
        self._launched_this_turn = 0
        self._subscribers: list[Callable[[Event], None]] = []
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_at: float | None = None
        self._rested: asyncio.Future[None] | None = None
        self._shutdown: asyncio.Future[None] | None = None
        self._closes = contextlib.ExitStack()

    # --- opening and closing -------------------------------------------------------------------------------------

    async def __aenter__(self) -> "Supervisor":
        """Raises ControlError when the directories are not to be had, OSError when nssup-init is not."""
        self._loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as opened:
            log_dir = None
            if self.spec is not None:
                directories = Directories(self.spec)
                opened.callback(directories.close)
                self.epoch, log_dir = directories.epoch, Path(self.spec.log_dir)
            self._launcher = clone.Launcher(self.epoch)
            opened.callback(self._launcher.close)
            self.logs = LogHub(self._loop, log_dir, time.time, on_error=self._log_failed)
            self._watch = Watch(self._loop)
            opened.callback(self._watch.close)
            self._journal = Journal(self.logs, self._stderr)
            self.workers = WorkerSet(self._publish, epoch=self.epoch, seed=str(self.epoch), wall=self.wall)
            self._shutdown = self._loop.create_future()
            self._tasks = await asyncio.TaskGroup().__aenter__()
            self._tasks.create_task(self.logs.run(), name="nssup-logs")
            self._closes = opened.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                await self.stop_all()
        finally:
            self._end_lives()
            try:
                self._journal.close()
                await self.logs.close()
                await self._tasks.__aexit__(kind, error, trace)
            finally:
                self._closes.close()

    def _end_lives(self) -> None:
        """Whatever still lives when the context is left by an error: killed, waited for, closed."""
        self._launches.clear()
        if self._alarm is not None:
            self._alarm.cancel()
        lives, self._lives = list(self._lives.values()), {}
        for life in lives:
            life.process.kill()
        for life in lives:
            self._forget_descriptors(life)
            life.process.destroy()

    async def stop_all(self) -> None:
        """Stop every worker by its stop sequence, pools in reverse order, and wait until each is proven gone."""
        for pool in reversed(list(self.workers.pools)):
            for worker in [w for w in self.workers.workers.values() if w.pool == pool]:
                self.feed(worker.id, Stop())
        await self._wait_rest()

    def kill_all(self) -> None:
        """SIGKILL to every life there is; their ends are handled as ever."""
        for life in list(self._lives.values()):
            if not life.over and life.worker_id in self.workers.workers:
                self.feed(life.worker_id, Kill(signal.SIGKILL, tree=True))

    async def _wait_rest(self) -> None:
        if self._resting():
            return
        if self._rested is None or self._rested.done():
            self._rested = self._loop.create_future()
        await asyncio.shield(self._rested)

    def _resting(self) -> bool:
        return (
            not self._lives and not self._launches and all(w.state in _AT_REST for w in self.workers.workers.values())
        )

    def shutdown(self) -> None:
        """Ask whoever runs this supervisor to end it; see wait_shutdown."""
        if self._shutdown is not None and not self._shutdown.done():
            self._shutdown.set_result(None)

    async def wait_shutdown(self) -> None:
        if self._shutdown is not None:
            await asyncio.shield(self._shutdown)

    # --- what others ask -----------------------------------------------------------------------------------------

    def now(self) -> float:
        return now()

    def wall(self, at: float) -> float:
        """Wall clock seconds since 1970 at a moment of the one clock, as the wall clock is set now."""
        return time.time() - now() + at

    def subscribe(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        """callback gets every event from now on, on the loop's thread. Returns the function that ends it."""
        self._subscribers.append(callback)

        def unsubscribe() -> None:
            if callback in self._subscribers:
                self._subscribers.remove(callback)

        return unsubscribe

    def add_pool(self, spec: PoolSpec) -> None:
        """Add a pool and start its workers if it is enabled.

        Raises SpecError (unknown user or group), ControlError (there is one of this name).
        """
        self._prepared[spec.name] = plan.prepare(spec, account(spec, self._host), self._environ, self._privileged)
        self.logs.open_pool(spec.name)
        self._do(self.workers.add_pool(spec, now()))

    def remove_pool(self, name: str) -> None:
        """Stop and forget a pool; `pool_removed` tells when it is gone."""
        self._do(self.workers.remove_pool(name, now()))

    def scale(self, pool: str, workers: int) -> None:
        self._do(self.workers.scale(pool, workers, now()))

    def feed(self, worker_id: str, event: Input) -> None:
        """An operator's event, or the world's. Raises ControlError when there is no such worker."""
        self._do(self.workers.feed(worker_id, event, now()))

    def namespaces(self, worker_id: str) -> dict[str, int]:
        worker = self.workers.workers[worker_id]
        prepared = self._prepared.get(worker.pool)
        if worker.init_host_pid is None or prepared is None:
            return {}
        return procfs.namespace_ids(worker.init_host_pid, prepared.spec.namespaces)

    def stats(self, worker_id: str) -> procfs.Stat | None:
        """CPU and memory of the worker's main program; None when there is none."""
        host_pid = self.workers.workers[worker_id].host_pid
        return None if host_pid is None else procfs.stat(host_pid)

    def host_pid_owner(self, host_pid: int) -> str | None:
        """The worker in whose tree this host PID is."""
        inits = {life.process.init_host_pid: life.worker_id for life in self._lives.values()}
        return procfs.ancestor_among(host_pid, inits)

    def log_dropped_bytes(self, worker_id: str) -> int:
        """Bytes of the worker's output that no file took."""
        return self.logs.dropped_bytes(pool_of(worker_id), worker_id)

    def last_lines(self, worker_id: str, count: int) -> list[str]:
        """The last lines that the worker wrote, as text."""
        return [_text(record) for record in self.logs.last_records(worker_id, count)]

    # --- actions ---------------------------------------------------------------------------------------------------

    def _do(self, actions: Actions) -> None:
        for worker_id, action in actions:
            if isinstance(action, machine.Launch):
                self._queue_launch(worker_id, action.generation)
            elif isinstance(action, machine.Forget):
                continue
            else:
                self._act_on_life(worker_id, action)
        self._arm()
        if self._rested is not None and not self._rested.done() and self._resting():
            self._rested.set_result(None)

    def _act_on_life(self, worker_id: str, action: machine.Action) -> None:
        if not isinstance(action, machine.KillTree | machine.SignalMain | machine.SignalTree):
            raise TypeError(f"no way to perform {action}")
        life = self._lives.get((worker_id, action.generation))
        if life is None:
            return  # it ended while the event was on its way
        if isinstance(action, machine.KillTree):
            life.process.kill()
        else:
            life.process.signal(action.signo, tree=isinstance(action, machine.SignalTree))

    def _queue_launch(self, worker_id: str, generation: int) -> None:
        if self._launches or self._launched_this_turn >= LAUNCHES_PER_TURN:
            self._launches.append((worker_id, generation))
            return
        if self._launched_this_turn == 0:
            self._loop.call_soon(self._next_turn)
        self._launched_this_turn += 1
        self._launch(worker_id, generation)

    def _next_turn(self) -> None:
        self._launched_this_turn = 0
        if self._launches:
            self._loop.call_soon(self._next_turn)
        while self._launches and self._launched_this_turn < LAUNCHES_PER_TURN:
            self._launched_this_turn += 1
            self._launch(*self._launches.popleft())

    def _launch(self, worker_id: str, generation: int) -> None:
        worker = self.workers.workers[worker_id]
        if worker.state is not State.STARTING:  # stopped while it waited for its turn
            self.feed(worker_id, LaunchFailed(generation, "operator"))
            return
        prepared = self._prepared[worker.pool]
        try:
            process = self._launcher.launch(prepared.plan(worker.index, generation), merge=prepared.spec.log.merge)
        except LaunchError as error:
            self.feed(worker_id, LaunchFailed(generation, f"setup-failed:{error.step}:{errno_name(error.errno)}"))
            return
        process.go()
        life = _Life(worker_id, worker.pool, process)
        self._lives[worker_id, generation] = life
        self._watch.add(process.line, lambda: self._on_line(life))
        self._watch.add(process.pidfd, lambda: self._on_gone(life))
        self.feed(worker_id, Launched(generation, process.init_host_pid))

    # --- what a life says ------------------------------------------------------------------------------------------

    def _on_line(self, life: _Life) -> None:
        process = life.process
        messages = process.receive()
        for number, message in enumerate(messages):
            if message.generation != process.generation:
                continue
            empty = number + 1 < len(messages) and isinstance(messages[number + 1], wire.Empty)
            self._take(life, message, empty)
        if process.line_ended:
            self._line_ended(life)

    def _take(self, life: _Life, message: wire.Message, empty: bool) -> None:
        generation = life.process.generation
        if isinstance(message, wire.Started):
            if not life.running and life.streams is None:
                self._started(life, message)
        elif isinstance(message, wire.Exited):
            if not life.exited and not life.over:
                life.exited = True
                self.feed(life.worker_id, Exited(generation, clone.exit_of_message(message.exit), empty))
                if empty:
                    self._over(life)
        elif isinstance(message, wire.Empty):
            if not life.over and life.process.has_init:
                self.feed(life.worker_id, Empty(generation))
                self._over(life)
        elif isinstance(message, wire.Failed) and not life.failed and not life.exited:
            life.failed = True
            self.feed(life.worker_id, SetupFailed(generation, wire.failure_reason(message.step, message.errno)))

    def _started(self, life: _Life, message: wire.Started) -> None:
        """Its output is read from here on and not before, so that every record has both PIDs."""
        generation = life.process.generation
        streams = self._attach(life)
        streams.identify(message.host_pid, message.ns_pid)
        self.feed(life.worker_id, Started(generation, message.host_pid, message.ns_pid))
        if life.process.has_init:
            life.running = True
            self.feed(life.worker_id, Running(generation))

    def _attach(self, life: _Life) -> Streams:
        process = life.process
        if life.streams is None:
            stdout, stderr = process.take_logs()
            assert stdout is not None
            life.streams = self.logs.attach(life.pool, life.worker_id, process.generation, stdout, stderr)
        return life.streams

    def _line_ended(self, life: _Life) -> None:
        """Without init the line ends at exec: the program runs. With one, its pidfd will tell the rest."""
        if life.process.line >= 0:
            self._watch.remove(life.process.line)
            life.process.close_line()
        if not life.process.has_init and not life.failed and not life.running and life.streams is not None:
            life.running = True
            self.feed(life.worker_id, Running(life.process.generation))

    def _over(self, life: _Life) -> None:
        """Nothing but init is left: take what the pipes still hold, and let init go."""
        life.over = True
        self._drain(life)
        life.process.acknowledge()

    def _drain(self, life: _Life) -> None:
        self.logs.drain(self._attach(life))

    def _on_gone(self, life: _Life) -> None:
        seen = life.process.reap()
        if seen is None:
            return
        self._on_line(life)
        if not life.over:
            life.over = True
            self._drain(life)
        generation = life.process.generation
        self._forget_descriptors(life)
        life.process.close()
        self._lives.pop((life.worker_id, generation), None)
        if life.worker_id in self.workers.workers:
            self.feed(life.worker_id, Gone(generation, seen))

    def _forget_descriptors(self, life: _Life) -> None:
        if life.process.line >= 0:
            self._watch.remove(life.process.line)
        if life.process.pidfd >= 0:
            self._watch.remove(life.process.pidfd)
        if life.streams is not None and not life.over:
            life.over = True
            self.logs.drain(life.streams)

    # --- time --------------------------------------------------------------------------------------------------------

    def _arm(self) -> None:
        deadline = self.workers.next_deadline()
        if deadline == self._alarm_at:
            return
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm_at = deadline
        if deadline is None:
            self._alarm = None
            return
        self._alarm = self._loop.call_later(max(0.0, deadline - now()) + _ALARM_SLACK, self._on_alarm)

    def _on_alarm(self) -> None:
        self._alarm = self._alarm_at = None
        self._do(self.workers.due(now()))

    # --- publishing --------------------------------------------------------------------------------------------------

    def _publish(self, event: Event) -> None:
        self._journal.record(event)
        if event.event == "pool_removed" and event.pool is not None:
            self._prepared.pop(event.pool, None)
            self.logs.close_pool(event.pool)
        for callback in tuple(self._subscribers):
            callback(event)

    def _log_failed(self, pool: str, errno: int, dropped_bytes: int) -> None:
        self.workers.note(
            "log_failed", now(), pool=pool, reason=errno_name(errno), detail={"dropped_bytes": dropped_bytes}
        )


def _text(record: bytes) -> str:
    fields = msgspec.json.decode(record)
    return fields["msg"] if "msg" in fields else msgspec.json.encode(fields.get("data")).decode()


def account(spec: PoolSpec, host: Host) -> plan.Account:
    """Who the workers of spec run as. Raises SpecError for a user or group that is not there."""
    own = host.user(str(host.uid))
    if spec.user is None and spec.group is None and spec.groups is None:
        return plan.Account(None, own)
    user = own if spec.user is None else host.user(spec.user)
    if user is None:
        raise _unknown(spec, "user", spec.user or str(host.uid))
    gid = user.gid
    if spec.group is not None:
        found = host.group(spec.group)
        if found is None:
            raise _unknown(spec, "group", spec.group)
        gid = found
    return plan.Account(Identity(user.uid, gid, _groups(spec, host, user)), user)


def _groups(spec: PoolSpec, host: Host, user: User) -> tuple[int, ...]:
    if spec.groups is None:
        return host.groups_of(user)
    gids = []
    for name in spec.groups:
        gid = host.group(name)
        if gid is None:
            raise _unknown(spec, "groups", name)
        gids.append(gid)
    return tuple(gids)


def _unknown(spec: PoolSpec, key: str, name: str) -> SpecError:
    return SpecError(
        Problem("", 0, 0, f"pool.{spec.name}.{key}", f"there is no {key.rstrip('s')} {name!r} on this host")
    )
