"""The supervisor: the one shell round the pure core. Reads the clock, feeds events, performs actions, publishes.

One way through it: a descriptor is readable -> messages of init -> events -> WorkerSet.feed -> actions -> done here.
Nothing here decides. One timer is armed, for the earliest deadline; at rest nothing wakes up.
"""

import asyncio
import collections
import contextlib
import errno
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType

import msgspec

from nssup import __version__, adopt, clone, config, machine, plan, procfs, wire
from nssup.custody import Claim, Custody, Directories, refused
from nssup.errors import ControlError, LaunchError, errno_name
from nssup.events import (
    Empty,
    Event,
    Exited,
    Gone,
    Input,
    Kill,
    Launched,
    LaunchFailed,
    Restart,
    Running,
    SetupFailed,
    Start,
    Started,
    State,
    Stop,
)
from nssup.facts import Host
from nssup.journal import Journal, Mode
from nssup.logs import LogHub, Passed, Streams
from nssup.selection import pool_of
from nssup.spec import PoolSpec, SupervisorSpec, validate
from nssup.staging import Staging
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

    __slots__ = (
        "adopted",
        "exited",
        "failed",
        "notified",
        "over",
        "pool",
        "process",
        "running",
        "staging",
        "streams",
        "worker_id",
    )

    def __init__(self, worker_id: str, pool: str, process: clone.Process) -> None:
        self.worker_id = worker_id
        self.pool = pool
        self.process = process
        self.streams: Streams | None = None
        self.staging: Staging | None = None
        self.notified = wire.Notified()
        self.adopted = self.running = self.failed = self.exited = self.over = False


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
        self._custody: Custody | None = None
        self._claims: dict[str, list[Claim]] = {}  # of pools that are prepared and not added yet
        self.leaving = False
        self._ending = False
        self._closes = contextlib.AsyncExitStack()

    # --- opening and closing -------------------------------------------------------------------------------------

    async def __aenter__(self) -> "Supervisor":
        """Raises ControlError when the directories are not to be had, OSError when nssup-init is not."""
        self._loop = asyncio.get_running_loop()
        async with contextlib.AsyncExitStack() as opened:
            log_dir = None
            if self.spec is not None:
                directories = Directories(self.spec)
                opened.callback(directories.close)
                self.epoch, log_dir = directories.epoch, Path(self.spec.log_dir)
            self._launcher = clone.Launcher(self.epoch)
            opened.callback(self._launcher.close)
            if self.spec is not None:
                notes = Path(self.spec.runtime_dir, "lives")
                self._custody = Custody(notes, self.epoch, self._launcher.own_pidfd)
                opened.callback(self._custody.close)
            self.logs = LogHub(self._loop, log_dir, time.time, on_error=self._log_failed)
            opened.push_async_callback(self.logs.close)
            self._watch = Watch(self._loop)
            opened.callback(self._watch.close)
            self._journal = self._open_journal()
            self.workers = WorkerSet(
                self._publish, epoch=self.epoch, seed=str(self.epoch), wall=self.wall, changed=self._changed
            )
            self._shutdown = self._loop.create_future()
            self._tasks = await asyncio.TaskGroup().__aenter__()
            self._tasks.create_task(self.logs.run(), name="nssup-logs")
            self._closes = opened.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and not self.leaving:
                await self.stop_all()
        finally:
            self._end_lives()
            try:
                self._journal.close()
                await self.logs.close()
                # Of our own tasks alone: what the caller's block raised stays as it is, and is no ExceptionGroup.
                await self._tasks.__aexit__(None, None, None)
            finally:
                await self._closes.aclose()

    def _end_lives(self) -> None:
        """Whatever still lives: let go if we leave and it may stay, else killed, waited for, closed."""
        self._launches.clear()
        if self._alarm is not None:
            self._alarm.cancel()
        lives, self._lives = list(self._lives.values()), {}
        staying = [life for life in lives if self.leaving and life.process.policy is wire.Policy.KEEP]
        for life in staying:
            life.over = True
            if life.streams is not None:
                self.logs.detach(life.streams)
            self._forget_descriptors(life)
            life.process.close()
        for claim in [claim for claims in self._claims.values() for claim in claims]:
            for process in claim.processes:  # refused before they were taken over: the next supervisor finds them
                process.close()
        ending = [life for life in lives if life not in staying]
        for life in ending:
            life.process.kill()
        for life in ending:
            self._forget_descriptors(life)
            life.process.destroy()

    def leave_running(self) -> None:
        """From now on ending means to let go: who may outlive us goes on, and the next supervisor adopts it."""
        self.leaving = True
        self.shutdown()

    async def stop_all(self) -> None:
        """Stop every worker by its stop sequence, pools in reverse order, and wait until each is proven gone.

        For good: nobody can start anything from now on.
        """
        self._ending = True
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
        """callback gets every event from now on, on the loop's thread. Returns the function that ends it.

        It is called in the middle of a change: what it wants done, it does by loop.call_soon.
        """
        self._subscribers.append(callback)

        def unsubscribe() -> None:
            if callback in self._subscribers:
                self._subscribers.remove(callback)

        return unsubscribe

    def add_pool(self, spec: PoolSpec) -> None:
        """Add a pool and start its workers if it is enabled.

        Those that a dead supervisor left are taken over as they are. Raises SpecError (the spec is wrong, unknown
        user), ControlError (there is a pool of this name, its log cannot be opened).
        """
        self._prepare(spec)
        claims = self._claims.pop(spec.name, [])
        for claim in claims:
            for process in claim.processes:
                self._adopt(claim.adopted.worker, process)
        self.logs.settle(spec.name)
        self._do(self.workers.add_pool(spec, now(), [claim.adopted.worker for claim in claims]))
        for claim in claims:
            for event in claim.adopted.events:
                self.feed(claim.adopted.worker.id, event)

    def add_pools(self, specs: Iterable[PoolSpec]) -> None:
        """Add all pools there are to be. Workers of other pools, left by a dead supervisor, are stopped.

        Raises what add_pool does, and then nothing was started and nothing taken over.
        """
        specs = list(specs)
        for spec in specs:
            self._prepare(spec)
        for spec in specs:
            self.add_pool(spec)
        for pool in sorted(self._custody.unclaimed()) if self._custody else ():
            self.add_pool(PoolSpec(name=pool, command=("-",), workers=0, enabled=False))
            self.remove_pool(pool)
        for what in self._custody.strange if self._custody else ():
            self.workers.note("slot_set_aside", now(), reason=what)

    def _prepare(self, spec: PoolSpec) -> None:
        """What can be refused about a pool, before anything of it is done. Again: changes nothing."""
        self._check_open()
        if spec.name in self.workers.pools or spec.name in self._prepared:
            return  # done; or the workers refuse it, and those of that name go on as they are
        account = plan.Account(*config.account(validate(spec), self._host))
        prepared = plan.prepare(spec, account, self._environ, self._privileged)
        if self._custody and spec.name not in self._claims:
            self._claims[spec.name] = self._custody.claim(spec.name)
        staged = self._custody is not None and spec.init and spec.on_supervisor_death == "keep"
        processes = [process for claim in self._claims.get(spec.name, ()) for process in claim.processes]
        found = [fd for fd in (process.staging() for process in processes) if fd is not None]
        try:
            self.logs.open_pool(spec.name, staged=staged, found=found)
        except OSError as error:
            self.logs.close_pool(spec.name)
            raise refused(error, "open") from None
        self._prepared[spec.name] = prepared

    def _open_journal(self) -> Journal:
        try:
            return Journal(self.logs, self._stderr)
        except OSError as error:
            raise refused(error, "open") from None

    def _adopt(self, worker: machine.Worker, process: clone.Process) -> None:
        life = _Life(worker.id, worker.pool, process)
        life.adopted = True
        self._lives[worker.id, process.generation] = life
        kept = process.staging()
        life.staging = None if kept is None else self.logs.placed(life.pool, kept)
        # Otherwise its program is not known to run: then its output waits in the pipes, as at every launch.
        if self.logs.is_staged(life.staging, worker.id, process.generation):
            self._attach(life)
        elif worker.generation == process.generation and worker.last_host_pid is not None:
            self._attach(life).identify(worker.last_host_pid, worker.last_ns_pid or 0)
        self._watch_life(life)
        process.hello(self._launcher.own_pidfd)

    def _watch_life(self, life: _Life) -> None:
        self._watch.add(life.process.line, lambda: self._on_line(life))
        self._watch.add(life.process.pidfd, lambda: self._on_gone(life))

    def is_adopted(self, worker_id: str) -> bool:
        """Whether the worker's present life was launched by a supervisor before this one."""
        worker = self.workers.workers[worker_id]
        life = self._lives.get((worker_id, worker.generation))
        return life is not None and life.adopted

    def remove_pool(self, name: str) -> None:
        """Stop and forget a pool; `pool_removed` tells when it is gone."""
        self._do(self.workers.remove_pool(name, now()))

    def scale(self, pool: str, workers: int) -> None:
        """Raises ControlError: there is no such pool, it is on its way out, so are we."""
        self._check_open()
        self._do(self.workers.scale(pool, workers, now()))

    def feed(self, worker_id: str, event: Input) -> None:
        """An operator's event, or the world's. Raises ControlError when there is no such worker."""
        if self._ending and isinstance(event, Start | Restart):
            event = Stop()
        self._do(self.workers.feed(worker_id, event, now()))

    def _check_open(self) -> None:
        if self._ending:
            raise ControlError("ending", "this supervisor is ending", http_status=409)

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
            staging = self._place(worker.pool)
            process = self._launcher.launch(
                prepared.plan(worker.index, generation),
                merge=prepared.spec.log.merge,
                staging=-1 if staging is None else staging.fd,
            )
        except LaunchError as error:
            self.feed(worker_id, LaunchFailed(generation, f"setup-failed:{error.step}:{errno_name(error.errno)}"))
            return
        life = _Life(worker_id, worker.pool, process)
        life.staging = staging
        self._lives[worker_id, generation] = life
        if self._custody:
            self._custody.born(worker_id, process)
        self.feed(worker_id, Launched(generation, process.init_host_pid))
        if self._custody is None or self._custody.failed:
            process.policy = wire.Policy.DIE  # who is in no notes must not be left behind
        process.go()  # the life is in the notes: now it may run
        self._watch_life(life)

    def _place(self, pool: str) -> Staging | None:
        """Where a new life's output is to be staged. Raises LaunchError."""
        try:
            return self.logs.place(pool)
        except OSError as error:
            raise LaunchError("staging", error.errno or errno.EIO) from None

    # --- what a life says ------------------------------------------------------------------------------------------

    def _on_line(self, life: _Life) -> None:
        process = life.process
        messages = process.receive()
        for number, message in enumerate(messages):
            if message.generation != process.generation:
                continue
            if isinstance(message, wire.Notify | wire.State):
                life.notified = message.notified
            empty = number + 1 < len(messages) and isinstance(messages[number + 1], wire.Empty)
            self._take(life, message, empty)
        if process.line_ended:
            self._line_ended(life)

    def _take(self, life: _Life, message: wire.Message, empty: bool) -> None:
        generation = life.process.generation
        if isinstance(message, wire.State):
            self._told_state(life, message)
        elif isinstance(message, wire.Started):
            if not life.running:
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

    def _told_state(self, life: _Life, state: wire.State) -> None:
        """What the init of an adopted life says of it."""
        if not life.adopted or life.over or life.exited:
            return
        worker = self.workers.workers.get(life.worker_id)
        if worker is not None and worker.generation == state.generation and worker.alive:
            ended = clone.exit_of_message(state.exit) if state.exit.code else None
            for event in adopt.said(worker, state, ended):
                self.feed(life.worker_id, event)
        life.exited = state.phase >= wire.Phase.EXITED
        if state.phase in (wire.Phase.EMPTY, wire.Phase.FAILED):
            self._over(life)

    def _started(self, life: _Life, message: wire.Started) -> None:
        """Its output is read from here on and not before, so that every record has both PIDs."""
        generation = life.process.generation
        streams = self._attach(life)
        streams.identify(message.host_pid, message.ns_pid)
        if life.adopted:
            life.running = True
            worker = self.workers.workers.get(life.worker_id)
            if worker is not None and worker.generation == generation and worker.alive:
                for event in adopt.known(worker, message.host_pid, message.ns_pid):
                    self.feed(life.worker_id, event)
            return
        self.feed(life.worker_id, Started(generation, message.host_pid, message.ns_pid))
        if life.process.has_init:
            life.running = True
            self.feed(life.worker_id, Running(generation))

    def _attach(self, life: _Life) -> Streams:
        process = life.process
        if life.streams is None:
            stdout, stderr = process.take_logs()
            assert stdout is not None
            life.streams = self.logs.attach(life.pool, life.worker_id, process.generation, stdout, stderr, life.staging)
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
        """Nothing but init is left: take what the pipes still hold, and when that is safe let init go."""
        life.over = True
        self.logs.drain(self._attach(life), life.process.acknowledge)

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
        if self._custody:
            self._custody.reaped(life.worker_id, generation)
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

    # --- keeping -----------------------------------------------------------------------------------------------------

    def _changed(self, worker_id: str, worker: machine.Worker | None) -> None:
        """The notes come before the deed: whoever comes after us must know what we were about to do."""
        if self._custody:
            self._custody.changed(worker_id, worker)

    # --- publishing --------------------------------------------------------------------------------------------------

    def _publish(self, event: Event) -> None:
        self._journal.record(event)
        if event.event == "pool_removed" and event.pool is not None:
            self._prepared.pop(event.pool, None)
            self.logs.close_pool(event.pool)
        for callback in tuple(self._subscribers):
            try:
                callback(event)
            except Exception as error:  # his trouble, not ours: we are in the middle of a change
                self._loop.call_exception_handler(
                    {"message": "an observer of nssup's events failed", "exception": error}
                )

    def _log_failed(self, pool: str, errno: int, dropped_bytes: int) -> None:
        self.workers.note(
            "log_failed", now(), pool=pool, reason=errno_name(errno), detail={"dropped_bytes": dropped_bytes}
        )


def _text(record: bytes) -> str:
    fields = msgspec.json.decode(record)
    return fields["msg"] if "msg" in fields else msgspec.json.encode(fields.get("data")).decode()
