"""`nssup run`: one command in fresh namespaces, in the foreground.

Synchronous on purpose: no event loop and no import that a plain run does not need, for start-up time is what users of
such a command feel. One poll without a period waits for the line, init's pidfd, signals and a terminal's bytes.
"""

import contextlib
import errno
import os
import select
import signal
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from nssup import wire
from nssup.clone import CLONE_NEW, Launcher, Process
from nssup.errors import ExitCode, LaunchError, NssupError, errno_name
from nssup.record import DEFAULT_PATH, Identity, Plan, candidates

if TYPE_CHECKING:
    from types import FrameType

    from nssup.terminal import Relay

DEFAULT_NAMESPACES = ("pid", "mount", "uts", "ipc")
HOSTNAME_MAX = 64  # bytes (sethostname(2))
CAP_SYS_ADMIN = 21
GENERATION = 1
POLL_MAX_MS = 2**31 - 1  # a C int; the deadline is looked at again anyway

# Faults of our own code keep their default action; SIGPIPE and SIGXFSZ are ignored by Python; SIGCHLD says nothing a
# pidfd does not; the terminal's SIGTTIN and SIGTTOU must stop us.
LEFT_ALONE = frozenset(
    {
        signal.SIGKILL,
        signal.SIGSTOP,
        signal.SIGSEGV,
        signal.SIGBUS,
        signal.SIGFPE,
        signal.SIGILL,
        signal.SIGTRAP,
        signal.SIGSYS,
        signal.SIGABRT,
        signal.SIGPIPE,
        signal.SIGXFSZ,
        signal.SIGCHLD,
        signal.SIGURG,
        signal.SIGTTIN,
        signal.SIGTTOU,
    }
)
# Those that end no process by default: a PID 1 that does not catch them loses nothing.
HARMLESS = frozenset({signal.SIGCONT, signal.SIGWINCH, signal.SIGTSTP})

_HINTS = {
    ("directory", errno.ENOENT): "no such directory inside: choose another with -w",
    ("directory", errno.ENOTDIR): "not a directory: choose another with -w",
    ("directory", errno.EACCES): "the program's user may not enter it: choose another with -w",
    ("mount_proc", errno.EPERM): "parts of /proc are covered here, as in a container: try --no-proc",
    ("mount_proc", errno.EBUSY): "/proc is in use in a way that forbids another: try --no-proc",
    ("propagation", errno.EPERM): "the mount namespace is not a private one",
    ("groups", errno.EPERM): "only root may run as another user",
    ("group", errno.EPERM): "only root may run as another user",
    ("user", errno.EPERM): "only root may run as another user",
    ("group", errno.EINVAL): "not mapped in the new user namespace, which knows the caller alone",
    ("user", errno.EINVAL): "not mapped in the new user namespace, which knows the caller alone",
    ("user", errno.EAGAIN): "this user's limit on processes (RLIMIT_NPROC) is reached",
    ("clone_worker", errno.EAGAIN): "a limit on processes was reached (pids.max or RLIMIT_NPROC)",
}
_EXEC_HINTS = {
    errno.EACCES: "no permission, or no regular file",
    errno.ENOEXEC: "neither a known format nor a #! line",
    errno.E2BIG: "arguments and environment are too long",
}


class Options(NamedTuple):
    """What was asked for. None leaves a choice to the machine: tty when stdin and stdout are terminals, workdir the
    caller's, proc whenever it can be private. env: "NAME=VALUE" on top of the caller's. user: "name", "name:group" or
    numbers. timeout: seconds."""

    command: tuple[str, ...]
    tty: bool | None = None
    env: tuple[str, ...] = ()
    workdir: str | None = None
    namespaces: tuple[str, ...] = DEFAULT_NAMESPACES
    hostname: str | None = None
    user: str | None = None
    init: bool = True
    proc: bool | None = None
    timeout: float | None = None
    verbose: bool = False


class RunError(NssupError):
    """nssup could not run the command; the text says why."""

    def __init__(self, message: str, exit_code: ExitCode = ExitCode.RUN_FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run(options: Options) -> int:
    """Runs the command to its end and returns the exit code of `nssup run` (interface.md, Commands).

    Nothing of it is left when this returns or raises. Takes the process over for that time: signals, the terminal, and
    descriptors 0 and 1 for good (see `_let_go_of_stdio`). Errors are said on stderr, not raised.
    """
    try:
        _fill_stdio()
        deadline = None if options.timeout is None else _now() + options.timeout
        with Signals() as signals:
            return _run(options, signals, deadline)
    except LaunchError as error:
        _say(f"setup {error.step}: {errno_name(error.errno)}" + (f": {error.hint}" if error.hint else ""))
        return ExitCode.RUN_FAILED
    except NssupError as error:
        _say(str(error))
        return error.exit_code
    except OSError as error:
        _say(f"{error.strerror}" + (f": {error.filename}" if error.filename else ""))
        return ExitCode.RUN_FAILED


def _run(options: Options, signals: "Signals", deadline: float | None) -> int:
    tty = options.tty if options.tty is not None else os.isatty(0) and os.isatty(1)
    plan = plan_of(options, os.environ, tty)
    if not tty:
        return Life(plan, signals, deadline, options.verbose, None).run((0, 1, 2))
    return _run_on_terminal(plan, signals, deadline, options.verbose)


def _run_on_terminal(plan: Plan, signals: "Signals", deadline: float | None, verbose: bool) -> int:
    from nssup.terminal import Relay, Terminal

    terminal = Terminal(0) if os.isatty(0) else None
    try:
        if terminal:
            terminal.follow()
        relay = Relay(0, 1, terminal, size_of=next((fd for fd in range(3) if os.isatty(fd)), None))
        try:
            if plan.identity:  # or its own /dev/stdout would be closed to it
                with contextlib.suppress(OSError):
                    os.fchown(relay.slave, plan.identity.uid, -1)
            return Life(plan, signals, deadline, verbose, relay).run((relay.slave,) * 3)
        finally:
            relay.close()
    finally:
        if terminal:
            terminal.restore()


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _say(text: str, end: str = "\n") -> None:
    """One line on stderr, whole, or nothing where nobody can hear it."""
    with contextlib.suppress(OSError):
        os.write(2, f"nssup run: {text}{end}".encode(errors="surrogateescape"))


def _fill_stdio() -> None:
    """A closed 0, 1 or 2 would be taken by the next descriptor that we open: /dev/null instead."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: fd


def _let_go_of_stdio() -> None:
    """The program has stdin and stdout now. With our copies open nobody would learn that it closed its own: a reader
    would not see the end, a writer would not get SIGPIPE. stderr stays: we may have to speak."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)


# --- from options to a plan -----------------------------------------------------------------------------------------


def plan_of(options: Options, environ: Mapping[str, str], tty: bool) -> Plan:
    """The launch that options ask for. Raises RunError."""
    namespaces = _namespaces(options)
    env = environment(environ, options.env)
    directory = _directory(options.workdir)
    command = options.command
    if not command or not command[0]:
        raise RunError("no command: say which after --")
    return Plan(
        generation=GENERATION,
        argv=tuple(map(os.fsencode, command)),
        env=tuple(os.fsencode(f"{name}={value}") for name, value in env.items()),
        candidates=tuple(map(os.fsencode, candidates(command[0], env.get("PATH", DEFAULT_PATH)))),
        namespaces=frozenset(namespaces),
        directory=os.fsencode(directory),
        hostname=None if options.hostname is None else os.fsencode(options.hostname),
        proc="mount" in namespaces if options.proc is None else options.proc,
        init=options.init,
        tty=tty,
        die=True,
        identity=None if options.user is None else identity_of(options.user),
    )


def _namespaces(options: Options) -> frozenset[str]:
    """The namespaces to make. Raises RunError for a mix that cannot hold what nssup promises."""
    asked = frozenset(options.namespaces)
    for name in sorted(asked - CLONE_NEW.keys()):
        raise RunError(f"--ns {name}: unknown namespace: use {', '.join(CLONE_NEW)}")
    for broken, why in (
        ("pid" not in asked, "--ns: must hold pid: without it the end of the command could leave processes behind"),
        (
            bool(options.proc) and "mount" not in asked,
            "--proc: needs a private mount namespace, or it would replace the host's /proc: add mount to --ns",
        ),
        (
            options.hostname is not None and "uts" not in asked,
            "--hostname: needs the uts namespace, or it would rename the host: add uts to --ns",
        ),
        (
            len(os.fsencode(options.hostname or "")) > HOSTNAME_MAX,
            f"--hostname: longer than the {HOSTNAME_MAX} bytes Linux takes",
        ),
    ):
        if broken:
            raise RunError(why)
    return asked if may_make_namespaces() else asked | {"user"}


def may_make_namespaces() -> bool:
    """Whether we hold CAP_SYS_ADMIN, without which every other namespace needs one of users as well. Not the same as
    being uid 0: a container's root mostly lacks it."""
    try:
        with open("/proc/self/status", "rb") as status:
            for line in status:
                if line.startswith(b"CapEff:"):
                    return bool(int(line[7:], 16) >> CAP_SYS_ADMIN & 1)
    except OSError:
        pass
    return os.geteuid() == 0


def environment(inherited: Mapping[str, str], changes: Iterable[str]) -> dict[str, str]:
    """inherited with changes ("NAME=VALUE") made. Raises RunError."""
    env = dict(inherited)
    for change in changes:
        name, equals, value = change.partition("=")
        if not name or not equals:
            raise RunError(f"-e {change}: not NAME=VALUE")
        env[name] = value
    return env


def _directory(workdir: str | None) -> str:
    """The directory to start in, absolute: init's own is another. Raises RunError."""
    if workdir is not None and workdir.startswith("/"):
        return workdir
    try:
        return os.path.join(os.getcwd(), workdir) if workdir else os.getcwd()
    except FileNotFoundError:
        raise RunError("the current directory has been removed: choose another with -w") from None


def identity_of(user: str) -> Identity:
    """uid, gid and groups of "name", "name:group" or the same in numbers. Groups are those of the user database; a
    number that it does not know needs its group and has no others. Raises RunError."""
    import grp
    import pwd

    name, colon, group = user.partition(":")
    try:
        entry = pwd.getpwuid(_number(name)) if name.isdecimal() else pwd.getpwnam(name)
    except KeyError:
        if not name.isdecimal():
            raise RunError(f"--user {user}: no such user {name!r}") from None
        if not colon:
            raise RunError(f"--user {user}: has no entry, so name its group as well: --user {name}:GROUP") from None
        entry = None
    gid = entry.pw_gid if entry else 0
    if colon:
        try:
            gid = _number(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
        except KeyError:
            raise RunError(f"--user {user}: no such group {group!r}") from None
    groups = os.getgrouplist(entry.pw_name, gid) if entry else [gid]
    return Identity(entry.pw_uid if entry else _number(name), gid, tuple(groups))


def _number(text: str) -> int:
    """A uid or gid. The last one means "leave as it is" to setresuid(2), which here would be root."""
    number = int(text)
    if number >= 0xFFFFFFFF:
        raise RunError(f"--user: {text} is no id")
    return number


# --- signals --------------------------------------------------------------------------------------------------------


class Signals:
    """While entered, signals are readable bytes at `fd` instead of deaths. What was ignored stays so (nohup)."""

    def __enter__(self) -> "Signals":
        self.fd, self._write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._wakeup_before = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        # Ignored, as some parents leave it, it would have the kernel reap our child before we could ask how it ended.
        self._before = {signal.SIGCHLD: signal.signal(signal.SIGCHLD, signal.SIG_DFL)}
        self._before |= {
            signo: signal.signal(signo, _noted)
            for signo in sorted(signal.valid_signals() - LEFT_ALONE)
            if signal.getsignal(signo) is not signal.SIG_IGN
        }
        return self

    def __exit__(self, *_: object) -> None:
        for signo, handler in self._before.items():
            signal.signal(signo, handler if handler is not None else signal.SIG_DFL)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self.fd)
        os.close(self._write_fd)

    def take(self) -> bytes:
        """The signals that came since the last call, in order. Never blocks."""
        try:
            return os.read(self.fd, 4096)
        except BlockingIOError:
            return b""

    def stop(self) -> None:
        """Stops this process as an uncaught SIGTSTP would; returns when it goes on. At once where nobody could make it
        go on (an orphaned process group): the kernel drops the signal there."""
        handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, handler)


def _noted(signo: int, frame: "FrameType | None") -> None:
    """The byte in the wake-up pipe is all."""


# --- the life -------------------------------------------------------------------------------------------------------


class Life:
    """The one life of a run, from launch to proven empty."""

    def __init__(
        self, plan: Plan, signals: Signals, deadline: float | None, verbose: bool, relay: "Relay | None"
    ) -> None:
        self._plan = plan
        self._signals = signals
        self._deadline = deadline  # CLOCK_BOOTTIME seconds
        self._verbose = verbose
        self._relay = relay
        self._host_pid = 0
        self._running = False  # the exec has succeeded
        self._held: list[int] = []  # signals for a program that is not there yet
        self._failed: wire.Failed | None = None
        self._code: int | None = None  # what the program's end means for us
        self._gone = False  # init is reaped: the namespace is no more
        self._expired = False  # the deadline has passed,
        self._timed_out = False  # and the program was not over
        self._impatient = False  # a signal came after the program's end: meant for us

    def run(self, stdio: tuple[int, int, int]) -> int:
        """The exit code. Raises LaunchError, RunError; also then nothing is left."""
        launcher = Launcher()
        try:
            self._process: Process = launcher.launch(self._plan, stdio=stdio)
        finally:
            launcher.close()
        try:
            self._process.go()
            while not self._gone:
                self._wait()
            if self._relay:
                self._drain(self._relay)
        finally:
            if self._gone:
                self._process.close()
            else:
                self._process.destroy()
        return self._exit_code()

    def _exit_code(self) -> int:
        if self._failed:
            raise self._failure(self._failed)
        if self._timed_out:
            return ExitCode.TIMED_OUT
        if self._code is None:
            # No exit record: somebody killed init, and the kernel the program with it.
            _say("init-killed: PID 1 of the namespace was killed from outside, and all in it by the kernel")
            return 128 + signal.SIGKILL
        return self._code

    def _wait(self) -> None:
        """Waits for something to happen and handles it."""
        relayed = self._relay.interest() if self._relay and self._running else {}
        poll = select.poll()
        for fd, events in relayed.items():
            poll.register(fd, events)
        poll.register(self._signals.fd, select.POLLIN)
        poll.register(self._process.pidfd, select.POLLIN)
        if not self._process.line_ended:
            poll.register(self._process.line, select.POLLIN)
        ready = dict(poll.poll(self._poll_ms()))
        if self._relay:
            for fd in relayed.keys() & ready.keys():
                self._relay.ready(fd, ready[fd])
        self._take_messages()
        self._take_signals()
        if self._process.pidfd in ready:
            self._take_end()
        if not self._expired and self._past_deadline() and not self._gone:
            self._expired = True
            self._timed_out = self._code is None  # else it ended in time, and only the rest of the tree lingers
            self._process.kill()

    def _past_deadline(self) -> bool:
        return self._deadline is not None and _now() >= self._deadline

    def _poll_ms(self) -> int | None:
        """How long to wait: until the deadline, once."""
        if self._deadline is None or self._expired:
            return None
        return min(max(0, int((self._deadline - _now()) * 1000) + 1), POLL_MAX_MS)

    def _take_messages(self) -> None:
        while messages := self._process.receive():
            for message in messages:
                self._take_message(message)
        # With init, Started means that the exec has happened; without, the line ends with it.
        started = self._host_pid if self._process.has_init else self._process.line_ended and not self._failed
        if started and not self._running:
            self._take_running()

    def _take_message(self, message: wire.Message) -> None:
        match message:
            case wire.Started():
                self._take_start(message)
            case wire.Failed():
                self._failed = message
            case wire.Exited(exit=exit):
                self._code = _code_of(exit.code, exit.status)
            case wire.Empty():
                self._process.acknowledge()

    def _take_start(self, started: wire.Started) -> None:
        self._host_pid = started.host_pid
        if self._verbose:
            raw = self._relay and self._relay.terminal and self._relay.terminal.raw and os.isatty(2)
            _say(f"host PID {started.host_pid}, namespace PID {started.ns_pid}", "\r\n" if raw else "\n")

    def _take_running(self) -> None:
        self._running = True
        if not self._relay:
            _let_go_of_stdio()
        held, self._held = self._held, []
        for signo in held:
            self._forward(signo)

    def _take_end(self) -> None:
        """init is dead: the kernel's proof that nothing is left."""
        self._take_messages()  # what it said last
        # Not Process.reap: its Exit would import msgspec, as long as everything else here together.
        end = os.waitid(os.P_PIDFD, self._process.pidfd, os.WEXITED | os.WNOHANG)
        if end is None:
            return
        self._gone = True
        if self._running and self._code is None and not self._process.has_init:
            self._code = _code_of(end.si_code, end.si_status)

    def _take_signals(self) -> None:
        for signo in self._signals.take():
            if signo == signal.SIGTSTP:
                self._stop()
            elif signo == signal.SIGWINCH and self._relay:
                self._relay.resize()
            else:
                if signo == signal.SIGCONT and self._relay:
                    self._relay.resume()
                self._send(signo)

    def _send(self, signo: int) -> None:
        if self._code is not None:
            self._impatient = self._impatient or signo not in HARMLESS
        elif self._running:
            self._forward(signo)
        else:
            self._held.append(signo)

    def _forward(self, signo: int) -> None:
        if self._process.has_init or signo in HARMLESS or not self._would_drop(signo):
            self._process.signal(signo)
        else:
            # The program is PID 1, and what a PID 1 does not catch the kernel drops. Sent to us, the signal was to end
            # the program, as it would any other.
            self._code = 128 + signo
            self._process.kill()

    def _would_drop(self, signo: int) -> bool:
        """Whether the program, as PID 1, leaves signo at its default."""
        try:
            with open(f"/proc/{self._host_pid}/status", "rb") as status:
                fields = dict(line.split(b":", 1) for line in status)
            handled = int(fields[b"SigCgt"], 16) | int(fields[b"SigIgn"], 16) | int(fields[b"SigBlk"], 16)
        except (OSError, KeyError, ValueError):
            return False
        return not handled >> (signo - 1) & 1

    def _stop(self) -> None:
        """Ctrl-Z at the caller's shell. The program's session has nobody who could stop or continue it, so we do."""
        if self._relay and self._relay.terminal:
            self._relay.terminal.restore()
        self._process.signal(signal.SIGSTOP, tree=True)
        self._signals.stop()
        self._process.signal(signal.SIGCONT, tree=True)
        if self._relay:
            self._relay.resume()

    def _drain(self, relay: "Relay") -> None:
        """The last output. Whoever reads it may have stopped doing so: a signal or the deadline ends the wait."""
        while not relay.drain() and not self._impatient and not self._past_deadline():
            poll = select.poll()
            for fd, events in relay.interest().items():
                poll.register(fd, events)
            poll.register(self._signals.fd, select.POLLIN)
            poll.poll(self._poll_ms())
            self._take_signals()

    def _failure(self, failed: wire.Failed) -> NssupError:
        if failed.step == wire.Step.EXEC:
            return _exec_failure(self._plan, failed.errno)
        try:
            step = wire.Step(failed.step).name.lower()
        except ValueError:
            step = str(failed.step)
        hint = _HINTS.get((step, failed.errno), "")
        if step == "directory":
            hint = f"{os.fsdecode(self._plan.directory)}: {hint}"
        return LaunchError(step, failed.errno, hint)


def _code_of(code: int, status: int) -> int:
    """The exit code for what waitid(2) says: code is CLD_*, status an exit code or a signal."""
    return status if code == os.CLD_EXITED else 128 + status


def _exec_failure(plan: Plan, number: int) -> RunError:
    """Not found is 127; found and not executable 126: shells and `env` agree on that."""
    program = os.fsdecode(plan.argv[0])
    paths = [os.path.join(plan.directory, candidate) for candidate in plan.candidates]
    if number not in (errno.ENOENT, errno.ENOTDIR):
        why = _EXEC_HINTS.get(number, "the kernel refuses it")
        return RunError(f"{program}: cannot be executed: {errno_name(number)}: {why}", ExitCode.NOT_EXECUTABLE)
    if any(map(os.path.isfile, paths)):
        return RunError(
            f"{program}: cannot be executed: its interpreter (#! line or loader) is missing", ExitCode.NOT_EXECUTABLE
        )
    where = "" if b"/" in plan.argv[0] else " in PATH"
    return RunError(f"{program}: not found{where}", ExitCode.NOT_FOUND)
