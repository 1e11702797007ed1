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
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import msgspec
from msgspec.structs import replace

from nssup import (
    __version__,
    adopt,
    clone,
    commands,
    config,
    held,
    machine,
    notify,
    plan,
    prober,
    procfs,
    readiness,
    record,
    reexec,
    sockets,
    wire,
)
from nssup.backlog import Backlog
from nssup.custody import Claim, Custody, Directories, Orphan, no_room, refused
from nssup.dependencies import problems as problems_between
from nssup.desired import Desired
from nssup.errors import ControlError, ExitCode, LaunchError, Problem, SpecError, errno_name
from nssup.events import (
    Alive,
    CommandFailed,
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
from nssup.follower import Follower
from nssup.journal import Journal, Mode
from nssup.logfile import Rotation
from nssup.logs import LogHub, Passed, Streams
from nssup.probe import LineWatch, NotAsked
from nssup.selection import pool_of
from nssup.spec import OWN_LOG, PoolSpec, SupervisorSpec, validate
from nssup.staging import Staging
from nssup.watch import Watch
from nssup.workers import Actions, WorkerSet

# Launches in one turn of the loop: enough to be quick, few enough that exits and requests are handled in between.
LAUNCHES_PER_TURN = 8
# uvloop may fire a timer up to 1 ms early; an alarm that came too early would be armed again and again until then.
_ALARM_SLACK = 0.001
# Seconds that init gets to say that it has killed a command whose time was over.
_COMMAND_GRACE = 5.0
_AT_REST = frozenset({State.STOPPED, State.FAILED, State.DONE, State.LOST})


def now() -> float:
    """CLOCK_BOOTTIME in seconds: the one clock (docs/contracts.md, part i)."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def monotonic_usec() -> int:
    """CLOCK_MONOTONIC in microseconds, which sd_notify(3) asks for; nothing else does."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


async def _to_the_end(tasks: asyncio.TaskGroup, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Does work; cancellations wait until it is done, however many there are."""
    try:
        task = tasks.create_task(work(), name="nssup-end")
    except RuntimeError:  # the group is failing: by a bug
        await work()
        return
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled


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

    def __init__(
        self,
        spec: SupervisorSpec | None = None,
        *,
        stderr: Mode = "none",
        inheritance: reexec.Inheritance | None = None,
        descriptors: tuple[int, int] | None = None,
        spares: Iterable[sockets.Spare] = (),
    ) -> None:
        """stderr: how own events are shown there: `json`, `text` or `none`. descriptors: soft and hard limit on them
        for workers whose pool says nothing; None: our own.

        inheritance: what the supervisor that this process was before left; its locks and lives are ours from here on.
        spares: descriptors, ours from here on, that may be sockets which pools want.
        """
        self.spec = spec
        self.host_pid = os.getpid()
        self.version = __version__
        self.started_at = time.time()
        self.epoch = 0
        self._stderr = stderr
        self._host = Host()
        self._privileged = self._host.capable("SYS_ADMIN")
        self._environ = dict(os.environ)
        self._descriptors = descriptors
        self._prepared: dict[str, plan.Prepared] = {}
        self._lives: dict[tuple[str, int], _Life] = {}
        self._launches: collections.deque[tuple[str, int]] = collections.deque()
        self._launched_this_turn = 0
        self._subscribers: list[Callable[[Event], None]] = []
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_at: float | None = None
        self._launched: asyncio.Future[None] | None = None
        self._rested: asyncio.Future[None] | None = None
        self._shutdown: asyncio.Future[None] | None = None
        self._notify = notify.Place(None if spec is None else spec.runtime_dir)
        self._commands = commands.Commands()
        self._probing: set[str] = set()  # pools that have probes
        self._custody: Custody | None = None
        self._backlog: Backlog | None = None
        self._unnoted: str | None = None  # a worker whose next change is noted with the one after it
        self._claims: dict[str, list[Claim]] = {}  # of pools that are prepared and not added yet
        self._desired: Desired | None = None
        self._configured: dict[str, PoolSpec] = {}  # as the config has them
        self._orphans: list[Orphan] = []  # of pools that are no more, and older lives
        self._returning: set[str] = set()  # workers that are stopped because we end, and are to come up again
        self._awaited: frozenset[tuple[str, int]] | None = None
        self._inheritance = inheritance
        self._inherited: dict[tuple[str, int], reexec.Life] = {}
        self.sockets = held.Sockets([*(inheritance.sockets if inheritance else ()), *spares])
        self._passing_on = False
        self._passed: list[reexec.Life] = []
        self.legacy: reexec.Inheritance | None = None
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
                self._directories = Directories(self.spec, self._inheritance.locks if self._inheritance else ())
                opened.callback(self._directories.close)
                self.epoch, log_dir = self._directories.epoch, Path(self.spec.log_dir)
            self._launcher = clone.Launcher(self.epoch)
            opened.callback(self._launcher.close)
            if self.spec is not None:
                self._custody = self._take_custody(self.spec)
                opened.callback(self._custody.close)
                self._desired = Desired(Path(self.spec.state_dir, "desired.json"), self.epoch)
                self._backlog = self._open_backlog(Path(self.spec.runtime_dir, "events"))
                if self._backlog is not None:
                    opened.callback(self._backlog.close)
            self.logs = LogHub(self._loop, log_dir, time.time, on_error=self._log_failed)
            opened.push_async_callback(self.logs.close)
            self._watch = Watch(self._loop)
            opened.callback(self._watch.close)
            opened.callback(self._notify.close)
            opened.callback(lambda: self.sockets.close(keep_files=self.leaving))
            self._journal = self._open_journal()
            self.workers = WorkerSet(
                self._publish, epoch=self.epoch, seed=str(self.epoch), wall=self.wall, changed=self._changed
            )
            self._shutdown = self._loop.create_future()
            self._tasks = await asyncio.TaskGroup().__aenter__()
            self._tasks.create_task(self.logs.run(), name="nssup-logs")
            self._prober = prober.Prober(self._loop, self._tasks, self)
            self._closes = opened.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self.leaving:
                self._note_leaving()
            elif kind is None:
                await self.stop_all()
        finally:
            self._end_lives()
            if kind is None and self._custody:
                self._settle(self._custody)
            async with contextlib.AsyncExitStack() as last:
                last.push_async_callback(self._closes.aclose)
                # Of our own tasks alone: what the caller's block raised stays as it is, and is no ExceptionGroup.
                last.push_async_callback(self._tasks.__aexit__, None, None, None)
                self._journal.close()
                await _to_the_end(self._tasks, self.logs.close)
                if self._backlog:
                    self._backlog.clear()

    def _take_custody(self, spec: SupervisorSpec) -> Custody:
        inherited = []
        for life in self._inheritance.lives if self._inheritance else ():
            fds = life.pidfd, life.line, life.stdout, life.stderr
            process = clone.Process.inherit(fds, life.init_host_pid, life.generation, self.epoch, life.has_init)
            inherited.append((life.worker, process))
            self._inherited[life.worker, life.generation] = life
        return Custody(Path(spec.runtime_dir, "lives"), self.epoch, self._launcher.own_pidfd, inherited)

    def _end_lives(self) -> None:
        """Whatever still lives: let go if we leave and it may stay, else killed, waited for, closed."""
        self._prober.close()
        self._launches.clear()
        if self._alarm is not None:
            self._alarm.cancel()
        lives, self._lives = list(self._lives.values()), {}
        ending = [life for life in lives if not self._stays(life) or not self._let_go(life)]
        for claim in [claim for claims in self._claims.values() for claim in claims]:
            for process in claim.processes:  # refused before they were taken over: the next supervisor finds them
                process.close()
        for life in ending:
            life.process.kill()
        for life in ending:
            self._forget_descriptors(life)
            life.process.destroy()

    def _stays(self, life: _Life) -> bool:
        """Whether a life goes on when we end now."""
        return self._passing_on or (self.leaving and life.process.policy is wire.Policy.KEEP)

    def _let_go(self, life: _Life) -> bool:
        """As if we had died; a life that would end with us is passed on. False when it cannot be."""
        try:
            if life.process.policy is wire.Policy.DIE:
                self._passed.append(self._pass_on(life))
            elif life.streams is not None:
                self.logs.detach(life.streams)
        except OSError:  # no descriptors left
            return False
        life.over = True
        self._forget_descriptors(life)
        life.process.close()
        return True

    def _pass_on(self, life: _Life) -> reexec.Life:
        process = life.process
        if life.streams is not None:
            stdout, stderr = self.logs.pass_on(life.streams)
        else:
            stdout, stderr = (Passed(-1 if fd is None else fd) for fd in process.take_logs())
        return reexec.Life(
            life.worker_id,
            process.generation,
            process.init_host_pid,
            process.has_init,
            os.dup(process.pidfd),
            os.dup(process.line) if process.line >= 0 else -1,
            stdout.fd,
            stderr.fd,
            (stdout.offset, stderr.offset),
        )

    def _settle(self, custody: Custody) -> None:
        """The end is as it should be. What the next supervisor is to find: all, or nothing but what was lost."""
        if not self.leaving:
            custody.forget_all({orphan.worker for orphan in self.orphans()})
        if self._passing_on:
            self.legacy = reexec.Inheritance(
                host_pid=self.host_pid,
                from_version=self.version,
                epoch=self.epoch,
                listener=-1,
                locks=self._directories.pass_on(),
                lives=tuple(self._passed),
                sockets=tuple(self.sockets.pass_on()),
            )

    def outlives_us(self, worker_id: str) -> bool:
        """Whether the worker goes on by itself when we leave; true when there is nothing of it that could not."""
        worker = self.workers.workers[worker_id]
        life = self._lives.get((worker_id, worker.generation))
        if life is not None:
            return life.process.policy is wire.Policy.KEEP
        spec = self._prepared[worker.pool].spec
        return not worker.alive or (self._custody is not None and spec.init and spec.on_supervisor_death == "keep")

    def leave_running(self) -> None:
        """From now on ending means to let go: who may outlive us goes on, and the next supervisor adopts it."""
        self.leaving = True
        self.shutdown()

    def pass_on(self) -> None:
        """As leave_running, for a next supervisor in this very process: nobody ends, and `legacy` is what it needs."""
        self._passing_on = True
        self.leave_running()

    async def stop_bound(self) -> None:
        """Before leaving: stop by their stop sequences all that cannot go on without us, and wait until they are gone.

        The next supervisor starts them again.
        """
        self._launch_all()
        order = {pool: number for number, pool in enumerate(self.workers.stop_order(self.workers.pools))}
        bound = [life for life in self._lives.values() if not self._stays(life)]
        bound.sort(key=lambda life: order.get(life.pool, -1))
        self._awaited = frozenset((life.worker_id, life.process.generation) for life in bound)
        for life in bound:
            worker = self.workers.workers.get(life.worker_id)
            if worker is not None and worker.generation == life.process.generation:
                self._stop(worker)
        await self._wait_rest()

    def _note_leaving(self) -> None:
        self._launch_all()
        staying = sum(self._stays(life) and not life.over for life in self._lives.values())
        reason = "reexec" if self._passing_on else "operator"
        self.workers.note("left_running", now(), reason=reason, detail={"workers": staying})

    async def stop_all(self) -> None:
        """Stop every worker by its stop sequence, and wait until each is proven gone. A pool that others require waits
        for them; otherwise all at once, the last pool first.

        For good: nobody can start anything from now on. Who is lost stays so.
        """
        self._ending = True
        for pool in self.workers.stop_order(self.workers.pools):
            for worker in [w for w in self.workers.workers.values() if w.pool == pool and w.state is not State.LOST]:
                self._stop(worker)
        await self._wait_rest()

    def _stop(self, worker: machine.Worker) -> None:
        """Because we end, not because somebody does not want it any more: whoever comes next must know."""
        if worker.want_up:
            self._returning.add(worker.id)
        self.feed(worker.id, Stop())

    def kill_all(self) -> None:
        """SIGKILL to every life that is to end with us; their ends are handled as ever."""
        for life in list(self._lives.values()):
            if not self._stays(life) and not life.over and life.worker_id in self.workers.workers:
                self.feed(life.worker_id, Kill(signal.SIGKILL, tree=True))

    async def _wait_rest(self) -> None:
        if self._resting():
            return
        if self._rested is None or self._rested.done():
            self._rested = self._loop.create_future()
        await asyncio.shield(self._rested)

    def _resting(self) -> bool:
        if self._awaited is not None:
            return self._awaited.isdisjoint(self._lives)
        return (
            not self._lives and not self._launches and all(w.state in _AT_REST for w in self.workers.workers.values())
        )

    def shutdown(self) -> None:
        """Ask whoever runs this supervisor to end it; see wait_shutdown."""
        if self._shutdown is not None and not self._shutdown.done():
            self._shutdown.set_result(None)
        self._all_launched()

    async def wait_launched(self, seconds: float) -> None:
        """Until no launch waits for its turn, or we are to end; but not longer than that."""
        await asyncio.sleep(0)
        if self._launches and self._shutdown is not None and not self._shutdown.done():
            self._launched = self._loop.create_future()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._launched

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
        user), ControlError (there is a pool of this name, its log cannot be opened, a socket is not to be had).
        """
        self._prepare(spec)
        desired = spec
        try:
            if spec.name not in self.workers.pools:
                desired = self._open_sockets(spec)
        except ControlError:
            del self._prepared[spec.name]
            self._probing.discard(spec.name)
            self.logs.close_pool(spec.name)
            raise
        self._configured.setdefault(spec.name, spec)
        claims = self._claims.pop(spec.name, [])
        for claim in claims:
            for process in claim.processes:
                self._adopt(claim.adopted.worker, process)
        self.logs.settle(spec.name, self._lives.keys())
        self._do(self.workers.add_pool(desired, now(), [claim.adopted.worker for claim in claims]))
        for claim in claims:
            self._go_on(claim)
        if claims:
            self._loop.call_later(adopt.PATIENCE, self._without_answer, spec.name)

    def _go_on(self, claim: Claim) -> None:
        """What is left to do about a worker that was taken over, but for what its init will tell."""
        worker = claim.adopted.worker
        if self._custody and (worker.id, worker.generation) not in self._lives and worker.state is not State.LOST:
            self._custody.reaped(worker.id, worker.generation)
        for event in claim.adopted.events:
            if worker.id in self.workers.workers:
                self.feed(worker.id, event)
        self._do([(worker.id, action) for action in claim.adopted.actions])

    def _without_answer(self, pool: str) -> None:
        """Inits that were taken over and have not said how they are: what was begun is done all the same."""
        for life in [life for life in self._lives.values() if life.pool == pool and life.process.awaits_state]:
            self._owe(life, None)

    def _owe(self, life: _Life, told: wire.State | None) -> None:
        worker, pool = self.workers.workers.get(life.worker_id), self.workers.pools.get(life.pool)
        stop = pool.stop if pool else ()
        for action in adopt.owed(worker, stop, life.process.generation, told):
            self._act_on_life(life.worker_id, action)

    def add_pools(self, specs: Iterable[PoolSpec]) -> None:
        """Add all pools there are to be. Workers of other pools, left by a dead supervisor, are stopped.

        Raises what add_pool does, and then nothing was started and nothing taken over.
        """
        specs = list(specs)
        if found := problems_between({spec.name: spec for spec in specs}):
            raise SpecError(*(Problem("", 0, 0, f"pool.{pool}.requires.{name}", why) for pool, name, why in found))
        for spec in specs:
            self._prepare(spec)
        unwanted = sorted(self._custody.unclaimed()) if self._custody else []
        for pool in unwanted:
            self._claim(pool)
        for spec in specs:
            self._open_sockets(spec)
        self.sockets.close_spares()
        for spec in specs:
            self.add_pool(spec)
        for pool in unwanted:
            self._add_unwanted(pool)
        if self._custody and self._desired:
            self._orphans += self._custody.unproven
            self._tell_strange(self._custody)
            self._tidy(self._desired)

    def _tell_strange(self, custody: Custody) -> None:
        for what in custody.strange:
            self.workers.note("slot_set_aside", now(), reason=what)
        for worker_id, generation, where in custody.elsewhere:
            self.workers.note("lost", now(), worker=worker_id, generation=generation, reason=f"lost:{where}")
            if where != "reboot":  # which nothing survives
                self._orphans.append(Orphan(worker_id, generation, None, None, f"lost:{where}"))
        custody.forget_elsewhere()

    def _claim(self, pool: str) -> None:
        """Hold what there is of a pool. Raises ControlError."""
        if self._custody and pool not in self._claims:
            self._claims[pool] = self._custody.claim(pool, now())

    def _add_unwanted(self, pool: str) -> None:
        """What is left of a pool that is no more is stopped, as far as it is ours."""
        claims = self._claims[pool]
        lost = [claim.adopted.worker for claim in claims if claim.adopted.worker.state is State.LOST]
        for worker in lost:
            self._orphans.append(Orphan.of(worker))
            self.workers.note("lost", now(), pool=pool, reason=worker.reason, detail={"worker": worker.id})
        self._claims[pool] = [claim for claim in claims if claim.adopted.worker not in lost]
        if self._claims[pool]:
            with contextlib.suppress(OSError):
                self.sockets.hold_rest(pool, self._kept_sockets([pool]))
            self.add_pool(PoolSpec(name=pool, command=("-",), workers=0, enabled=False))
            del self._configured[pool]
            self.remove_pool(pool)

    def _tidy(self, desired: Desired) -> None:
        for what in desired.strange:
            self.workers.note("desired_set_aside", now(), reason=what)
        try:
            desired.keep_only(self._configured)
        except OSError as error:
            self.workers.note("desired_failed", now(), reason=errno_name(error.errno or errno.EIO))

    def orphans(self) -> list[Orphan]:
        """What may be ours and cannot be proven so. Nobody signals it, and nothing is started in its place."""
        lost = [Orphan.of(w) for w in self.workers.workers.values() if w.state is State.LOST]
        return lost + self._orphans

    def set_aside(self) -> list[str]:
        """A line for each note or file of ours that could not be read, at our start or earlier."""
        if self.spec is None or self._custody is None or self._desired is None:
            return []
        lines = [*self._custody.strange, *self._desired.strange]
        for directory in dict.fromkeys((self.spec.runtime_dir, self.spec.state_dir)):
            for path in sorted(Path(directory).glob("*.bad-*")):
                if not any(path.name in line for line in lines):
                    lines.append(f"{path}: set aside by an earlier supervisor")
        return lines

    def _prepare(self, spec: PoolSpec) -> None:
        """What can be refused about a pool, before anything of it is done. Again: changes nothing."""
        self._check_open()
        if spec.name in self.workers.pools or spec.name in self._prepared:
            return  # done; or the workers refuse it, and those of that name go on as they are
        account = plan.Account(*config.account(validate(spec), self._host))
        sockets.validate(spec)
        told = self._told_how(spec)
        prepared = plan.prepare(
            spec, account, self._environ, self._privileged, notify=told, descriptors=self._descriptors
        )
        self._claim(spec.name)
        staged = self._custody is not None and spec.init and spec.on_supervisor_death == "keep"
        processes = [process for claim in self._claims.get(spec.name, ()) for process in claim.processes]
        try:
            found = [fd for fd in (process.staging() for process in processes) if fd is not None]
        except OSError as error:
            raise no_room(spec.name, error) from None
        try:
            rotation = Rotation(spec.log.size, spec.log.age, spec.log.keep)
            self.logs.open_pool(spec.name, staged=staged, found=found, rotation=rotation)
        except OSError as error:
            self.logs.close_pool(spec.name)
            raise refused(error, "open") from None
        self._prepared[spec.name] = prepared
        if prober.has_probes(spec):
            self._probing.add(spec.name)

    def _open_sockets(self, spec: PoolSpec) -> PoolSpec:
        """Have what all the workers that the pool is to have listen at; as many of them are in the spec returned.

        Raises ControlError.
        """
        desired = spec if self._desired is None else self._desired.applied_to(spec)
        left = [claim.adopted.worker.index for claim in self._claims.get(spec.name, ()) if claim.processes]
        self._have_sockets(desired, sorted({*range(desired.workers), *left}))  # who goes leaves no file behind
        return desired

    def _have_sockets(self, spec: PoolSpec, indexes: Iterable[int]) -> None:
        wanted = sockets.of_workers(spec, indexes)
        if not wanted:
            return
        try:
            self.sockets.open(spec.name, wanted.values(), self._socket_owner, self._kept_sockets)
        except OSError as error:
            raise no_room(spec.name, error) from None

    def _socket_owner(self, wanted: sockets.Wanted) -> tuple[int, int]:
        return config.socket_owner(wanted.spec, self._host)[0]

    def _kept_sockets(self, pools: Iterable[str] | None = None) -> Generator[tuple[str, int], None, None]:
        """(worker id, copy of a socket that its init keeps), the caller's, of all that was found. Raises OSError."""
        for claim in [claim for pool in pools or self._claims for claim in self._claims[pool]]:
            for process in claim.processes:
                copies = process.sockets()
                try:
                    while copies:
                        yield claim.adopted.worker.id, copies.pop(0)
                finally:
                    for fd in copies:
                        os.close(fd)

    def _told_how(self, spec: PoolSpec) -> record.Notify | None:
        """How the pool's programs say how they are. Raises ControlError."""
        ready_fd = readiness.ready_fd(spec)
        if not readiness.wants_socket(spec):
            return None if ready_fd is None else record.Notify(None, ready_fd)
        try:
            return record.Notify(os.fsencode(self._notify.directory()), ready_fd)
        except OSError as error:
            raise refused(error, "make a place for notify sockets") from None

    def _open_backlog(self, path: Path) -> Backlog | None:
        """None where there is no room for it: who is killed then may leave its last events untold."""
        try:
            return Backlog(path)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                return None
            raise refused(error, "use", path) from None

    def _open_journal(self) -> Journal:
        if self._backlog and self.spec:
            with contextlib.suppress(OSError):  # they stay, for whoever can open it
                self._backlog.hand_over(Path(self.spec.log_dir, f"{OWN_LOG}.jsonl"))
        try:
            return Journal(self.logs, self._stderr, busy=lambda: bool(self._launches), backlog=self._backlog)
        except OSError as error:
            raise refused(error, "open") from None

    def _adopt(self, worker: machine.Worker, process: clone.Process) -> None:
        life = _Life(worker.id, worker.pool, process)
        life.adopted = True
        life.exited = worker.generation == process.generation and worker.exit is not None
        self._lives[worker.id, process.generation] = life
        kept = process.staging()
        life.staging = None if kept is None else self.logs.placed(life.pool, kept)
        # Otherwise its program is not known to run: then its output waits in the pipes, as at every launch.
        if self.logs.is_staged(life.staging, worker.id, process.generation):
            self._attach(life)
        elif worker.generation == process.generation and worker.last_host_pid is not None:
            self._attach(life).identify(worker.last_host_pid, worker.last_ns_pid or 0)
        self._watch_life(life)
        if process.has_init:
            process.hello(self._launcher.own_pidfd)
            self._fit_policy(life)
        else:
            life.running = worker.running_since is not None

    def _fit_policy(self, life: _Life) -> None:
        """What our death means to an adopted life is what the config says now."""
        spec = self._prepared[life.pool].spec
        wanted = wire.Policy.DIE if spec.on_supervisor_death == "die" else wire.Policy.KEEP
        if life.pool in self._configured and life.process.policy is not wanted:
            life.process.change_policy(wanted)

    def set_on_supervisor_death(self, pool: str, what: Literal["keep", "die"]) -> None:
        """From now on this becomes of the pool's workers when we die, of those that run as of those to come.

        Raises ControlError: there is no such pool, or who would be kept cannot be found again: nobody keeps notes, they
        cannot be written, or the workers have no init.
        """
        if pool not in self.workers.pools:
            raise ControlError("no-such-pool", f"there is no pool {pool}", http_status=404, exit_code=ExitCode.NO_SUCH)
        spec = self._prepared[pool].spec
        if what == "keep" and (self._custody is None or self._custody.failed or not spec.init):
            raise ControlError("not-kept", f"nobody could take over the workers of {pool} when we are gone")
        changed = replace(spec, on_supervisor_death=what)
        self._prepared[pool] = self._prepared[pool]._replace(spec=changed)
        self.workers.pools[pool] = replace(self.workers.pools[pool], on_supervisor_death=what)
        for life in self._lives.values():
            if life.pool == pool and life.process.has_init:
                self._fit_policy(life)

    def _watch_life(self, life: _Life) -> None:
        if life.process.line >= 0:
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
        """Have so many workers, for good. Raises ControlError, as scale_pools does."""
        self.scale_pools({pool: workers})

    def scale_pools(self, wanted: Mapping[str, int]) -> None:
        """Pool -> how many workers to have, for good: later supervisors have as many, until it is what the config says.

        Raises ControlError: there is no such pool, it is on its way out, so are we, or it cannot be remembered. Then
        nothing is done.
        """
        self._check_open()
        for pool, n in wanted.items():
            if pool in self.workers.pools:
                self._have_sockets(self.workers.pools[pool], range(n))
        scales = {pool: None if n == self.configured_workers(pool) else n for pool, n in wanted.items()}
        with self._remembered(lambda desired: desired.set_scales(scales), "scaled, since it would be forgotten"):
            for pool, n in wanted.items():
                self._do(self.workers.scale(pool, n, now()))

    def enable_pools(self, pools: Iterable[str], enabled: bool) -> None:
        """Whether later supervisors start these pools, for good, until it is what the config says. Nothing is started
        or stopped now. Raises ControlError, as scale_pools does."""
        self._check_open()
        words: dict[str, bool | None] = dict.fromkeys(pools, enabled)
        for pool in words:
            if (spec := self._configured.get(pool)) is not None and spec.enabled is enabled:
                words[pool] = None
        with self._remembered(lambda desired: desired.set_enabled(words), "changed, since it would be forgotten"):
            for pool in words:
                self.workers.enable(pool, enabled, now())

    @contextlib.contextmanager
    def _remembered(self, change: Callable[[Desired], None], deed: str) -> Iterator[None]:
        """What is desired for good changes before it is done; not at all, if that is refused. Raises ControlError."""
        if self._desired is None:
            yield
            return
        before = self._desired.all()
        self._remember(change, deed)
        try:
            yield
        except ControlError:
            self._remember(lambda desired: desired.set_all(before), deed)
            raise

    def _remember(self, change: Callable[[Desired], None], deed: str) -> None:
        assert self._desired is not None
        try:
            change(self._desired)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise ControlError(
                "not-remembered",
                f"cannot write {self._desired.path}: {error.strerror}",
                hint=f"nothing was {deed}",
                http_status=507 if full else 500,
            ) from None

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

    def environment(self, worker_id: str) -> tuple[bytes, ...]:
        """`NAME=value`, what the worker's present or next life has; fields filled in."""
        worker = self.workers.workers[worker_id]
        return self._prepared[worker.pool].plan(worker.index, max(worker.generation, 1)).env

    def configured_workers(self, pool: str) -> int | None:
        """How many workers the config gives the pool, whatever `scale` said since."""
        spec = self._configured.get(pool)
        return None if spec is None else spec.workers

    def signal_inside(self, worker_id: str, ns_pid: int, signo: int) -> bool:
        """A signal to one process of the worker, by its PID in there. False when nobody can pass it on: the worker is
        down, or has no init. Whether there is such a process, init alone knows."""
        worker = self.workers.workers[worker_id]
        life = self._lives.get((worker_id, worker.generation))
        if life is None or life.over or not life.process.has_init:
            return False
        life.process.signal(signo, ns_pid=ns_pid)
        return True

    def tree(self, worker_id: str) -> list[procfs.Process]:
        """The processes of the worker, its init first; none when it is down."""
        init_host_pid = self.workers.workers[worker_id].init_host_pid
        return [] if init_host_pid is None else procfs.tree(init_host_pid)

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
            elif isinstance(action, machine.EndSupervisor):
                self.shutdown()
            else:
                self._act_on_life(worker_id, action)
        self._arm()
        if self._rested is not None and not self._rested.done() and self._resting():
            self._rested.set_result(None)

    def _act_on_life(self, worker_id: str, action: machine.Action) -> None:
        kinds = machine.KillTree | machine.SignalMain | machine.SignalTree | machine.RunCommand
        if not isinstance(action, kinds):
            raise TypeError(f"no way to perform {action}")
        life = self._lives.get((worker_id, action.generation))
        if life is None:
            return  # it ended while the event was on its way
        if isinstance(action, machine.KillTree):
            life.process.kill()
        elif isinstance(action, machine.RunCommand):
            self._run_command(life, action)
        else:
            begun = self.workers.workers[worker_id].stop_step
            tree = isinstance(action, machine.SignalTree)
            steps = 0 if tree or begun is None else begun + 1
            life.process.signal(action.signo, tree=tree, stop_steps=steps)
            if steps and not life.process.has_init and procfs.drops(life.process.init_host_pid, action.signo):
                self._loop.call_soon(self._unheard, worker_id, action.generation, action.signo, steps - 1)

    def _unheard(self, worker_id: str, generation: int, signo: int, stop_step: int) -> None:
        """The kernel has dropped the signal of a stop step: there is nothing to wait for."""
        if worker_id in self.workers.workers:
            detail = {"signal": signo}
            self.workers.note("signal_ignored", now(), worker=worker_id, generation=generation, detail=detail)
            self.feed(worker_id, CommandFailed(generation, stop_step))

    def _run_command(self, life: _Life, action: machine.RunCommand) -> None:
        """A command of the spec, beside the program; what it writes is among the program's output."""
        prepared, step = self._prepared[life.pool], action.stop_step
        spec = prepared.spec
        seconds = spec.start_timeout if step is None else spec.stop[step].wait or machine.REST

        def ended(done: wire.Done | None) -> None:
            why = "not-run:EAGAIN" if done is None else commands.failure(done)
            if why is not None:
                self._command_failed(life, action, why)

        index = self.workers.workers[life.worker_id].index
        argv, candidates = prepared.command(action.command, index, action.generation)
        with self.logs.writable(life.streams) as stdio:
            number = self._commands.run(
                life.process,
                argv,
                candidates,
                ended,
                timeout=seconds,
                stdio=stdio,
                stop_steps=0 if step is None else step + 1,
            )
        if number is None:
            self._loop.call_soon(ended, None)

    def _command_failed(self, life: _Life, action: machine.RunCommand, why: str) -> None:
        worker = self.workers.workers.get(life.worker_id)
        if worker is None or worker.generation != action.generation or not worker.alive:
            return
        detail = {"command": list(action.command)}
        self.workers.note(
            "command_failed",
            now(),
            worker=worker.id,
            generation=action.generation,
            reason=why,
            detail=detail,
        )
        if action.stop_step is not None:
            self.feed(worker.id, CommandFailed(action.generation, action.stop_step))

    # --- probes ----------------------------------------------------------------------------------------------------

    def probed(self, worker_id: str) -> tuple[PoolSpec, machine.Worker] | None:
        worker = self.workers.workers.get(worker_id)
        return None if worker is None else (self.workers.pools[worker.pool], worker)

    def probe_says(self, worker_id: str, event: Input) -> None:
        if worker_id in self.workers.workers:
            self.feed(worker_id, event)

    def probe_failed(self, worker_id: str, name: str, why: str) -> None:
        worker = self.workers.workers[worker_id]
        detail = {"probe": name, "why": why}
        self.workers.note(
            "probe_failed", now(), worker=worker_id, generation=worker.generation, reason="probe-failed", detail=detail
        )

    async def run_probe(self, worker_id: str, generation: int, words: tuple[str, ...], seconds: float) -> str | None:
        life = self._lives.get((worker_id, generation))
        if life is None:
            raise NotAsked
        answer: asyncio.Future[wire.Done] = self._loop.create_future()

        def ended(done: wire.Done) -> None:
            if not answer.done():
                answer.set_result(done)

        index = self.workers.workers[worker_id].index
        argv, candidates = self._prepared[life.pool].command(words, index, generation)
        number = self._commands.run(life.process, argv, candidates, ended, timeout=seconds)
        if number is None:
            raise NotAsked
        try:
            async with asyncio.timeout(seconds + _COMMAND_GRACE):
                done = await answer
        except TimeoutError:
            return "timeout"
        finally:
            self._commands.abandon(life.process, number)
        if commands.hindered(done):
            raise NotAsked
        return commands.failure(done)

    async def run_inside(self, worker_id: str, argv: Sequence[bytes], stdio: Sequence[int]) -> wire.Done | None:
        """A command beside the worker's program, as its user, until it has ended. None: the worker ended, and it with
        it. Cancelled: it is killed. stdio: descriptors, ours from here on. Raises ControlError when there is nobody to
        run it."""
        worker = self.workers.workers[worker_id]
        life = self._lives.get((worker_id, worker.generation))
        answer: asyncio.Future[wire.Done | None] = self._loop.create_future()

        def ended(done: wire.Done | None) -> None:
            if not answer.done():
                answer.set_result(done)

        def look(event: Event) -> None:
            if event.worker == worker_id and self._lives.get((worker_id, worker.generation)) is not life:
                ended(None)

        try:
            number = self._ask_inside(life, tuple(argv), stdio, ended)
        finally:
            for fd in dict.fromkeys(stdio):
                os.close(fd)
        if life is None or number is None:
            raise ControlError("not-running", f"{worker_id} does not run", http_status=409)
        unsubscribe = self.subscribe(look)
        try:
            return await answer
        finally:
            unsubscribe()
            self._commands.abandon(life.process, number)

    def _ask_inside(
        self, life: _Life | None, argv: tuple[bytes, ...], stdio: Sequence[int], ended: Callable[[wire.Done], None]
    ) -> int | None:
        if life is None or life.over or not life.process.has_init:
            return None
        path = self._prepared[life.pool].path
        candidates = [os.fsencode(each) for each in record.candidates(os.fsdecode(argv[0]), path)]
        return self._commands.run(life.process, argv, tuple(candidates), ended, timeout=0.0, stdio=stdio)

    def watch_lines(self, watch: LineWatch) -> None:
        self.logs.join(watch)

    def unwatch_lines(self, watch: Follower) -> None:
        self.logs.leave(watch)

    def last_lines_of(self, worker_id: str, count: int) -> list[bytes]:
        return self.logs.last_records(worker_id, count)

    def probes(self, worker_id: str) -> dict[str, str]:
        """How the last try of each probe of the worker went: why it failed, "" when it did not."""
        return {str(name): outcome.why for name, outcome in self._prober.last(worker_id).items()}

    def notified(self, worker_id: str) -> wire.Notified:
        """What the worker last said of itself by sd_notify."""
        life = self._lives.get((worker_id, self.workers.workers[worker_id].generation))
        return wire.Notified() if life is None else life.notified

    def _launch_all(self) -> None:
        """Whatever waits for its turn: it is promised in the notes, and nobody else would do it."""
        while self._launches:
            self._launch(*self._launches.popleft())

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
        if not self._launches:
            self._all_launched()

    def _all_launched(self) -> None:
        if self._launched is not None and not self._launched.done():
            self._launched.set_result(None)

    def _launch(self, worker_id: str, generation: int) -> None:
        worker = self.workers.workers[worker_id]
        if worker.state is not State.STARTING:  # stopped while it waited for its turn
            self.feed(worker_id, LaunchFailed(generation, "operator"))
            return
        prepared = self._prepared[worker.pool]
        try:
            staging = self._place(worker_id, generation)
            process = self._launcher.launch(
                prepared.plan(worker.index, generation),
                merge=prepared.spec.log.merge,
                staging=-1 if staging is None else staging.fd,
                sockets=self._lend_sockets(prepared.spec, worker.index),
            )
        except LaunchError as error:
            self.logs.give_back(worker.pool, worker_id, generation)
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

    def _lend_sockets(self, spec: PoolSpec, index: int) -> tuple[int, ...]:
        """What the worker is to listen at. Raises LaunchError."""
        wanted = sockets.of_worker(spec, index) if spec.sockets else []
        if not self.sockets.has(wanted):
            try:
                self._have_sockets(spec, [index])
            except held.Unusable as error:
                raise LaunchError("sockets", error.errno) from None
            except ControlError:
                raise LaunchError("sockets", errno.EMFILE) from None
        return self.sockets.descriptors(wanted)

    def _place(self, worker_id: str, generation: int) -> Staging | None:
        """Where a new life's output is to be staged. Raises LaunchError."""
        try:
            return self.logs.place(pool_of(worker_id), worker_id, generation)
        except OSError as error:
            raise LaunchError("staging", error.errno or errno.EIO) from None

    # --- what a life says ------------------------------------------------------------------------------------------

    def _on_line(self, life: _Life) -> None:
        process = life.process
        self._hear(life, process.receive())
        if process.line_ended:
            self._line_ended(life)

    def _hear(self, life: _Life, messages: list[wire.Message]) -> None:
        for number, message in enumerate(messages):
            if message.generation != life.process.generation:
                continue
            if isinstance(message, wire.Done):
                self._commands.done(life.process, message, self.epoch)
            if isinstance(message, wire.Notify | wire.State):
                life.notified = message.notified
            empty = number + 1 < len(messages) and isinstance(messages[number + 1], wire.Empty)
            self._take(life, message, empty)
            if life.notified.taken or life.notified.flags:
                self._heed(life)

    def _heed(self, life: _Life) -> None:
        """Whatever follows from what the program has said of itself."""
        while (worker := self.workers.workers.get(life.worker_id)) is not None:
            if worker.generation != life.process.generation:
                return
            event = readiness.follows(self.workers.pools[life.pool], worker, life.notified)
            if event is None:
                return
            if isinstance(event, Alive):  # which whoever comes after us hears from init
                self._unnoted = life.worker_id
            try:
                self.feed(life.worker_id, event)
            finally:
                self._unnoted = None

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
        """What the init of an adopted life says of it, and what that life is owed."""
        if not life.adopted or life.over:
            return
        worker = self.workers.workers.get(life.worker_id)
        at = min(state.exit.boottime_ns / 1e9, now())
        ended = replace(clone.exit_of_message(state.exit), at=self.wall(at)) if state.exit.code else None
        for event in adopt.said(worker, state, ended, at) if worker is not None else ():
            self.feed(life.worker_id, event)
        life.exited = life.exited or state.phase in (wire.Phase.EXITED, wire.Phase.EMPTY)
        if state.phase in (wire.Phase.EMPTY, wire.Phase.FAILED):
            self._over(life)
        self._owe(life, state)

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
        started = Started(generation, message.host_pid, message.ns_pid)
        if life.process.has_init:
            life.running = True
            self._feed_both(life.worker_id, started, Running(generation))
        else:
            self.feed(life.worker_id, started)

    def _feed_both(self, worker_id: str, first: Input, second: Input) -> None:
        """Two events at once, noted as one. The first must be one that nothing is done about."""
        self._unnoted = worker_id
        try:
            self.feed(worker_id, first)
        finally:
            self._unnoted = None
        worker = self.workers.workers[worker_id]
        self.feed(worker_id, second)
        if self.workers.workers.get(worker_id) is worker:  # the second changed nothing
            self._changed(worker_id, worker)

    def _attach(self, life: _Life) -> Streams:
        process = life.process
        if life.streams is None:
            stdout, stderr = process.take_logs()
            inherited = self._inherited.pop((life.worker_id, process.generation), None)
            life.streams = self.logs.attach(
                life.pool,
                life.worker_id,
                process.generation,
                stdout,
                stderr,
                life.staging,
                inherited.offsets if inherited else (0, 0),
            )
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
        self.logs.drain(self._attach(life), life.process.release)

    def _drain(self, life: _Life) -> None:
        self.logs.drain(self._attach(life))

    def _on_gone(self, life: _Life) -> None:
        seen = life.process.reap()
        if seen is None:
            return
        self._on_line(life)
        self._hear(life, life.process.last_words())
        if not life.over:
            life.over = True
            self._drain(life)
        generation = life.process.generation
        self._commands.forget(life.process)
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
        self._watch.poll_all()  # who was in time is not held to a deadline because we are late
        self._do(self.workers.due(now()))

    # --- keeping -----------------------------------------------------------------------------------------------------

    def _changed(self, worker_id: str, worker: machine.Worker | None) -> None:
        """The notes come before the deed: whoever comes after us must know what we were about to do."""
        pool = pool_of(worker_id)
        if pool in self._probing:
            self._prober.follow(worker_id, self.workers.pools[pool], worker)
        if self._custody is None or worker_id == self._unnoted:
            return
        if worker is not None and worker_id in self._returning:
            worker = replace(worker, want_up=True, again=worker.alive)
        well = self._custody.failed is None
        self._custody.changed(worker_id, worker)
        if well and self._custody.failed is not None:
            self._loop.call_soon(self._tell_failed, self._custody.failed)

    def _tell_failed(self, error: OSError) -> None:
        self.workers.note("notes_failed", now(), reason=errno_name(error.errno or errno.EIO))

    # --- publishing --------------------------------------------------------------------------------------------------

    def _publish(self, event: Event) -> None:
        self._journal.record(event)
        if event.event == "pool_removed" and event.pool is not None:
            self._prepared.pop(event.pool, None)
            self._probing.discard(event.pool)
            self._configured.pop(event.pool, None)
            self.sockets.close_pool(event.pool)
            self.logs.close_pool(event.pool)
        if event.event == "removed" and event.worker is not None:
            self.sockets.close_worker(event.worker)
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
