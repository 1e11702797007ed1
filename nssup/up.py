"""`nssup up`: a supervisor with its control socket in the foreground, until it is told to end.

SIGTERM and SIGINT stop everything in reverse order, a second SIGINT skips the grace. SIGHUP is reserved for `apply`.
`ctl reexec` ends this supervisor without ending a worker, and execs the code that is installed now in the same process;
should that fail, this code goes on in its place.
"""

import asyncio
import contextlib
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator

import msgspec
from msgspec.structs import replace

from nssup import __version__, clone, facts, handover, record, reexec, systemd, wire
from nssup import config as configs
from nssup.access import Role
from nssup.config import Config
from nssup.dependencies import longest_stop
from nssup.errors import ControlError, ExitCode
from nssup.events import Event, Exit, State
from nssup.listener import Listener, listen, resume
from nssup.loop import Supervisor, monotonic_usec, now
from nssup.restart import TOO_MANY
from nssup.sockets import Spare
from nssup.spec import SupervisorSpec, validate

REHEARSE = "--rehearse"  # of `nssup up`: say whether it could take over, and do nothing
REHEARSAL = 30.0  # seconds that a rehearsal may take
CONTROL_AFTER = 1.0  # seconds at most that the control side, which takes long to import, waits for launches
STATUS_AFTER = 0.5  # seconds after a change until the service manager hears of it, and of all others since
_GRACE = 10.0  # seconds beyond the longest stop sequence that the service manager is asked for
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def serve(config: Config, for_seconds: float | None = None) -> int:
    """Run the pools of config. Returns the exit code: an essential pool's own; 1 if a pool failed for good, naming it.

    for_seconds: end by itself after so long. Raises ControlError (directories, socket), SpecError (accounts).
    """
    _keep_standard_streams()
    manager, given = systemd.take(os.environ, os.getpid())
    inheritance = _take_inheritance()
    ends_at = None if for_seconds is None else now() + for_seconds
    descriptors = _take_descriptors(inheritance)
    try:
        while True:
            ends_at = inheritance.ends_at if inheritance else ends_at
            session = _Session(config, manager, given, inheritance, ends_at, descriptors)
            with asyncio.Runner(loop_factory=_loop_factory()) as runner:
                code = runner.run(session.run())
            if session.legacy is None:
                return code
            environ = {**os.environ, **manager.environment}
            error = reexec.execute([*session.words, *session.arguments], environ, session.legacy)
            given, inheritance = [], replace(session.legacy, failed=f"cannot exec {session.words[0]}: {error.strerror}")
    finally:
        manager.close()


def _take_inheritance() -> reexec.Inheritance | None:
    try:
        return reexec.take(os.environ)
    except ValueError as error:
        print(f"nssup: {error}", file=sys.stderr)
        return None


def _take_descriptors(inheritance: reexec.Inheritance | None) -> tuple[int, int]:
    """We may have as many as the hard limit allows: each worker takes four. The limits before, which workers get."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return (inheritance and inheritance.soft_limit) or soft, hard


def _keep_standard_streams() -> None:
    """0, 1 and 2 are open, if only to nothing: else what is opened later would be taken for stderr."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)


def _nothing() -> None:
    """What a signal does that comes too late."""


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:
        print("nssup: uvloop is not installed: running on asyncio", file=sys.stderr)
        return asyncio.new_event_loop
    return uvloop.new_event_loop


# --- what it ends with -----------------------------------------------------------------------------------------------


class _Verdict:
    """What the exit code will be, gathered from events."""

    def __init__(self, config: Config, supervisor: Supervisor) -> None:
        self._essential = {name for name, spec in config.pools.items() if spec.essential}
        self._supervisor = supervisor
        self.asked = False
        self.failed: dict[str, str] = {}
        self.essential_code: int | None = None

    def end(self) -> None:
        """The end was asked for: what ends from now on is not the workers' doing."""
        self.asked = True
        self._supervisor.shutdown()

    def note(self, event: Event) -> None:
        halted = event.event == "stopped" and event.exit is not None and event.reason == event.exit.reason  # by a rule
        if event.worker is not None and (halted or event.event in ("failed", "finished")):
            self._ended(event.worker, event.event == "failed", event.reason, event.exit)
        elif event.worker is not None and event.event in ("launched", "blocked"):
            self.failed.pop(event.worker, None)
        elif event.worker is not None and event.event == "intensity_exceeded":
            self.failed[event.worker] = TOO_MANY  # said before its init is reaped, which a stop may be faster than

    def take_stock(self) -> None:
        """Those that had ended before a supervisor took them over."""
        workers = self._supervisor.workers
        for worker in workers.workers.values():
            if worker.state in (State.FAILED, State.DONE):
                self._ended(worker.id, worker.state is State.FAILED, worker.reason, worker.last_exit)
            intensity = workers.pools[worker.pool].restart.intensity
            if worker.reason == TOO_MANY and intensity is not None and intensity.then == "shutdown":
                self.failed[worker.id] = TOO_MANY
                self._supervisor.shutdown()

    def _ended(self, worker_id: str, failed: bool, reason: str | None, ended: Exit | None) -> None:
        if failed:
            self.failed[worker_id] = reason or "failed"
        if worker_id.partition("/")[0] in self._essential and not self.asked:
            self.essential_code = _code_of(ended)
            self.end()

    def exit_code(self) -> int:
        if self._supervisor.leaving:
            return ExitCode.OK
        if self.essential_code is not None:
            return self.essential_code
        for worker, reason in self.failed.items():
            print(f"nssup: {worker} failed for good: {reason}", file=sys.stderr)
        return ExitCode.FAILED if self.failed else ExitCode.OK


def _code_of(ended: Exit | None) -> int:
    """An essential worker's code as a shell would tell it."""
    if ended is not None and ended.code is not None:
        return ended.code
    if ended is not None and ended.signal is not None:
        return 128 + ended.signal
    return ExitCode.FAILED


# --- the service manager ---------------------------------------------------------------------------------------------


class _Service:
    """What the service manager hears of us. Without one, nothing is done; only with its watchdog there is a timer."""

    def __init__(self, manager: systemd.Manager, supervisor: Supervisor) -> None:
        self._manager = manager
        self._supervisor = supervisor
        self._loop = asyncio.get_running_loop()
        self._beat_due: asyncio.TimerHandle | None = None
        self._status_due: asyncio.TimerHandle | None = None

    def ready(self) -> None:
        self._manager.tell("READY=1", self._status())
        if self._manager.listens:
            self._supervisor.subscribe(self._note)
        if self._manager.listens and self._manager.watchdog_seconds is not None:
            self._beat(self._manager.watchdog_seconds / 2)

    def reloading(self) -> None:
        self._manager.tell(
            "RELOADING=1", f"MONOTONIC_USEC={monotonic_usec()}", "STATUS=becoming the code installed now"
        )

    def stopping(self) -> None:
        longest = longest_stop(self._supervisor.workers.pools)
        what = "leaving its workers running" if self._supervisor.leaving else "stopping its workers"
        patience = int((longest + _GRACE) * 1e6)
        self._manager.tell("STOPPING=1", f"EXTEND_TIMEOUT_USEC={patience}", f"STATUS={what}")

    def close(self) -> None:
        for timer in (self._beat_due, self._status_due):
            if timer is not None:
                timer.cancel()

    def _beat(self, every: float) -> None:
        self._manager.tell("WATCHDOG=1", patient=False)
        self._beat_due = self._loop.call_later(every, self._beat, every)

    def _note(self, event: Event) -> None:
        if event.to is not None and self._status_due is None:
            self._status_due = self._loop.call_later(STATUS_AFTER, self._tell_status)

    def _tell_status(self) -> None:
        self._status_due = None
        self._manager.tell(self._status(), patient=False)

    def _status(self) -> str:
        workers = self._supervisor.workers
        wanted = sum(spec.workers for spec in workers.pools.values())
        running = sum(worker.state is State.RUNNING for worker in workers.workers.values())
        failed = sum(worker.state is State.FAILED for worker in workers.workers.values())
        return f"STATUS={running} of {wanted} workers running" + (f", {failed} failed" if failed else "")


# --- reexec ----------------------------------------------------------------------------------------------------------


class _Rehearsed(msgspec.Struct, frozen=True):
    """What the code that is installed now says of itself. formats: the version of each thing that it takes over."""

    version: str
    formats: dict[str, int]
    supervisor: SupervisorSpec


# What a supervisor leaves: whoever comes next understands its own version of each, and the one before.
_FORMATS = {
    "inheritance": reexec.VERSION,
    "lives": record.SLOT_VERSION,
    "line": wire.VERSION,
    "staging": handover.VERSION,
}


def rehearsal(config: Config) -> str:
    """What a supervisor that wants to become this code must know. Raises what `serve` would raise before it starts."""
    import nssup.ctl  # noqa: F401 - all that will be needed can be imported

    _loop_factory()
    host = facts.Host()
    for spec in config.pools.values():
        configs.account(validate(spec), host)
    clone.Launcher().close()
    return msgspec.json.encode(_Rehearsed(__version__, _FORMATS, config.supervisor)).decode()


class _Upgrade:
    """`ctl reexec`, as the control side sees it. failed: why the last one did not come to an exec."""

    def __init__(self, session: "_Session", failed: str | None) -> None:
        self._session = session
        self._under_way = False
        self.failed = failed

    async def rehearse(self) -> str:
        """The version of the code that is installed now, once it has shown that it could take over from us.

        Raises ControlError; nothing has changed then.
        """
        if self._under_way or self._session.verdict.asked:
            raise ControlError("ending", "this supervisor is on its way out already", http_status=409)
        if not self._session.words:
            raise _refusal("it is not known how this supervisor was started")
        self._under_way = True
        try:
            found = await _rehearse([*self._session.words, *self._session.arguments, REHEARSE])
        finally:
            self._under_way = False
        for name, version in _FORMATS.items():
            if not found.formats.get(name, 0) - 1 <= version <= found.formats.get(name, 0):
                raise _refusal(f"nssup {found.version} does not understand the {name} of this one")
        there, wanted = (msgspec.to_builtins(spec) for spec in (self._session.config.supervisor, found.supervisor))
        moved = [name for name, place in there.items() if name != "control" and wanted.get(name) != place]
        if moved:
            hint = "shut it down with --leave-running only if they are moved with it"
            raise _refusal(f"the config has another {', '.join(moved)} now: that takes a restart", hint)
        return found.version

    def begin(self) -> None:
        """Raises ControlError when we have begun to end meanwhile."""
        if self._session.verdict.asked:
            raise ControlError("ending", "this supervisor is on its way out already", http_status=409)
        self._session.become_what_is_installed()


def _refusal(message: str, hint: str = "nothing has changed", exit_code: ExitCode = ExitCode.FAILED) -> ControlError:
    return ControlError("refused", message, hint=hint, http_status=409, exit_code=exit_code)


async def _rehearse(words: list[str]) -> _Rehearsed:
    pipe = asyncio.subprocess.PIPE
    try:
        child = await asyncio.create_subprocess_exec(
            *words, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe, close_fds=True
        )
    except OSError as error:
        raise _refusal(f"cannot run {words[0]}: {error.strerror}") from None
    try:
        async with asyncio.timeout(REHEARSAL):
            out, err = await child.communicate()
    except TimeoutError:
        raise _refusal(f"the code installed now said nothing for {REHEARSAL:.0f} s") from None
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    if child.returncode != 0:
        lines = err.decode(errors="replace").strip().splitlines()
        config = child.returncode == ExitCode.CONFIG
        why = "\n".join(lines if config else lines[-1:]) or f"exit code {child.returncode}"
        raise _refusal(
            f"the code installed now would not start: {why}", exit_code=ExitCode.CONFIG if config else ExitCode.FAILED
        )
    try:
        return msgspec.json.decode(out, type=_Rehearsed)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise _refusal(f"the code installed now is not understood: {error}") from None


# --- one supervisor --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _left_by_an_error(supervisor: Supervisor) -> Iterator[None]:
    """An error of ours is as if we were killed: the workers go on, and the next supervisor takes them over."""
    try:
        yield
    except BaseException:
        supervisor.leave_running()
        raise


class _Session:
    """One supervisor of this process. legacy: what it leaves to a next one in its place; None: it is the last.

    words, arguments: how this program was started; no words when that is not known.
    """

    def __init__(
        self,
        config: Config,
        manager: systemd.Manager,
        given: list[systemd.Given],
        inheritance: reexec.Inheritance | None,
        ends_at: float | None,
        descriptors: tuple[int, int],
    ) -> None:
        self.config = config
        self.legacy: reexec.Inheritance | None = None
        self.verdict: _Verdict
        self.words, self.arguments = reexec.command() or ([], [])
        self._manager = manager
        self._given = given
        self._inheritance = inheritance
        self._ends_at = ends_at
        self._soft_limit = descriptors[0]
        self._becoming = False
        self._supervisor = Supervisor(
            config.supervisor,
            stderr="text" if os.isatty(2) else "json",
            inheritance=inheritance,
            descriptors=descriptors,
            spares=[systemd.spare_of(each) for each in given if each.name != systemd.CONTROL],
        )
        self._service: _Service

    async def run(self) -> int:
        listener_fd = -1
        async with self._supervisor as supervisor:
            self.verdict = _Verdict(self.config, supervisor)
            supervisor.subscribe(self.verdict.note)
            with self._signals(), contextlib.ExitStack() as ended, _left_by_an_error(supervisor):
                listener = self._listener()  # if it is not to be had, nothing is started
                ended.callback(listener.close)
                self._open_to_group(listener)
                self._start(ended)
                await supervisor.wait_launched(CONTROL_AFTER)  # who asks meanwhile waits in the listener's queue
                from nssup.ctl import ControlServer

                upgrade = _Upgrade(self, self._inheritance.failed if self._inheritance else None)
                origins = self.config.origins
                async with ControlServer(supervisor, listener, upgrade=upgrade, roles=self._roles(), origins=origins):
                    self._service.ready()
                    await supervisor.wait_shutdown()
                    self.verdict.end()
                    if self._becoming:
                        listener_fd = listener.keep()
                    else:
                        await self._end()
        if supervisor.legacy is not None:
            self.legacy = replace(
                supervisor.legacy, listener=listener_fd, ends_at=self._ends_at, soft_limit=self._soft_limit
            )
        return self.verdict.exit_code()

    def _listener(self) -> Listener:
        """The one that was left to us, or a new one, which the service manager is asked to keep."""
        path = self.config.supervisor.socket
        left = [self._inheritance.listener] if self._inheritance else []
        left += [fd for name, fd in self._given if name == systemd.CONTROL]
        found = [listener for listener in (resume(path, fd) for fd in left) if listener is not None]
        for spare in found[1:]:
            spare.socket.close()
        if found:
            return found[0]
        if left:
            self._manager.forget(systemd.CONTROL)
        listener = listen(path, lock_held=True)
        self._manager.keep(systemd.CONTROL, listener.socket.fileno())
        return listener

    def _open_to_group(self, listener: Listener) -> None:
        """The group may reach the socket: also through the run-time directory, if it lies there."""
        spec = self.config.supervisor
        gid = None if spec.control.group is None else configs.gid(spec.control.group, facts.Host())
        if gid is None:
            return
        try:
            listener.open_to(gid)
            if os.path.dirname(spec.socket) == spec.runtime_dir:
                os.chown(spec.runtime_dir, -1, gid)
                os.chmod(spec.runtime_dir, 0o710)
        except OSError as error:
            hint = "be root, or a member of it"
            why = f"cannot give {spec.socket} to group {spec.control.group}: {error.strerror}"
            raise ControlError("socket-group", why, hint=hint) from None

    def _roles(self) -> dict[int, Role]:
        """gid -> what its members are; of one that is named twice, the higher."""
        host, control = facts.Host(), self.config.supervisor.control
        named: dict[Role, tuple[str, ...]] = {
            "viewer": control.viewer,
            "operator": control.operator,
            "admin": control.admin,
        }
        found = [(configs.gid(name, host), role) for role, names in named.items() for name in names]
        return {gid: role for gid, role in found if gid is not None}

    def _start(self, ended: contextlib.ExitStack) -> None:
        supervisor = self._supervisor
        if self._inheritance is not None and self._inheritance.failed is not None:
            supervisor.workers.note("reexec_failed", now(), reason=self._inheritance.failed)
        supervisor.add_pools(self.config.pools.values())
        for each in self._stored():
            self._manager.keep(systemd.stored_name(each), each.fd)
        self.verdict.take_stock()
        self._service = _Service(self._manager, supervisor)
        ended.callback(self._service.close)
        if self._ends_at is not None:
            left = max(self._ends_at - now(), 0.0)
            ended.callback(asyncio.get_running_loop().call_later(left, self.verdict.end).cancel)

    def _stored(self) -> list[Spare]:
        """What workers listen at, but for what the service manager has made itself: it gives that every time."""
        return [each for each in self._supervisor.sockets.left() if each.made]

    async def _end(self) -> None:
        self._service.stopping()
        self._manager.forget(systemd.CONTROL)
        if not self._supervisor.leaving:
            for name in {systemd.stored_name(each) for each in self._stored()}:
                self._manager.forget(name)
        if self._supervisor.leaving:
            await self._supervisor.stop_bound()
        else:
            await self._supervisor.stop_all()

    def become_what_is_installed(self) -> None:
        """End without ending anybody, and exec. Signals wait until somebody is there again who can handle them."""
        self._becoming = True
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        self._service.reloading()
        self._supervisor.pass_on()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        interrupts = 0

        def interrupted() -> None:
            nonlocal interrupts
            interrupts += 1
            self.verdict.end()
            if interrupts > 1:
                self._supervisor.kill_all()

        def reload() -> None:
            self._supervisor.workers.note("reload_refused", now(), reason="apply is not in this version")

        loop.add_signal_handler(signal.SIGTERM, self.verdict.end)
        loop.add_signal_handler(signal.SIGINT, interrupted)
        loop.add_signal_handler(signal.SIGHUP, reload)
        if self._inheritance is not None:  # who left it to us blocked them
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        try:
            yield
        finally:
            # The end is on its way, and what comes now could only cut it off. Our other threads still take signals, so
            # handlers stay until the loop is closed; the mask is for the time after that.
            signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
            for signo in _SIGNALS:
                loop.add_signal_handler(signo, _nothing)
