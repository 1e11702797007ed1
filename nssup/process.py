"""`nssup.run` and `nssup.launch`: a program in namespaces of its own, from any asyncio program.

The twins of asyncio.create_subprocess_exec. What differs: kill means the whole tree, and an end is told only when the
kernel has proven that nothing is left; what is captured is bounded; the exit is init's own record, true whatever else
in this program reaps children or ignores SIGCHLD. The program ends when this one does, however that happens.
"""

import contextlib
import errno
import functools
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, AnyStr, Generic, Literal, Protocol, TypeAlias, TypedDict, Unpack, overload

import msgspec

from nssup import plan as plans
from nssup import wire
from nssup.config import account
from nssup.errors import LaunchError, NssupError, Problem, SpecError
from nssup.events import Exit
from nssup.facts import Host
from nssup.hub import Hub, Life, hub
from nssup.pipes import Capture, ReadEnd, Sink, Stream, Writer
from nssup.record import DEFAULT_PATH, Plan, candidates
from nssup.spec import PoolSpec, validate
from nssup.units import size

if TYPE_CHECKING:
    import asyncio

_PATH = DEFAULT_PATH.encode()
LIMIT = 64 * 1024  # of a stream: bytes that may wait to be read; twice that and the program is held back


class _File(Protocol):
    def fileno(self) -> int: ...


Word: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]
Command: TypeAlias = str | Sequence[Word]
Stdio: TypeAlias = Literal["null", "inherit"] | int | _File


class SpecKeys(TypedDict, total=False):
    """Keys of a pool's config that a single program has as well; directory: this process's own by default."""

    directory: str
    user: str | None
    group: str | None
    groups: tuple[str, ...] | None
    umask: int
    namespaces: tuple[str, ...]
    proc: bool
    hostname: str | None
    rlimits: dict[str, tuple[int | None, int | None]]


class Result(msgspec.Struct, Generic[AnyStr], frozen=True, kw_only=True):
    """What became of a run.

    stdout, stderr: what was captured of them, empty where that was not asked for. stdout_dropped, stderr_dropped: bytes
    beyond max_output that were read and thrown away. host_pid, ns_pid: what the program's PIDs were.
    """

    args: tuple[str, ...]
    exit: Exit
    stdout: AnyStr
    stderr: AnyStr
    host_pid: int
    ns_pid: int
    stdout_dropped: int = 0
    stderr_dropped: int = 0

    @property
    def returncode(self) -> int:
        """As subprocess has it: the exit code, or the negative number of the signal. -9 too when nobody can know the
        code because the PID 1 of the namespace was killed, and the program with it (`exit.reason` says so)."""
        return _returncode(self.exit)

    def check(self) -> "Result[AnyStr]":
        """This very result. Raises RunFailed if the program did not end with exit code 0."""
        if self.returncode != 0:
            raise RunFailed(self)
        return self


class RunFailed(NssupError):
    """The program ended with another code than 0, or by a signal. result: all of it, with what it wrote."""

    def __init__(self, result: "Result[bytes] | Result[str]") -> None:
        super().__init__(f"{result.args[0]}: {result.exit.reason}")
        self.result = result


class RunTimeout(NssupError, TimeoutError):
    """The time was over. The whole tree is gone when this is raised. result: with what was written until then."""

    def __init__(self, result: "Result[bytes] | Result[str]", seconds: float) -> None:
        super().__init__(f"{result.args[0]}: not done after {seconds:g} s")
        self.result = result


def _returncode(ended: Exit) -> int:
    if ended.code is not None:
        return ended.code
    return -(ended.signal or 9)


class Process:
    """A running program and all that it starts: made by `launch`.

    stdin: a Writer where stdin="pipe", stdout and stderr: asyncio.StreamReader where "pipe"; else None. Reading too
    slowly holds the program back; not reading at all may keep it from ending. As `async with`: however the block is
    left, the whole tree is killed and gone.
    """

    def __init__(self, args: tuple[str, ...], life: Life, stdout: Stream | None, stderr: Stream | None) -> None:
        self.args = args
        self._life = life
        self.stdin: Writer | None = life.stdin
        self.stdout: asyncio.StreamReader | None = stdout.reader if stdout else None
        self.stderr: asyncio.StreamReader | None = stderr.reader if stderr else None

    @property
    def host_pid(self) -> int:
        """The program's PID as this process sees it."""
        return self._life.host_pid

    @property
    def ns_pid(self) -> int:
        """The program's PID in its own namespace."""
        return self._life.ns_pid

    @property
    def init_host_pid(self) -> int:
        """The PID of its namespace's PID 1."""
        return self._life.init_host_pid

    @property
    def exit(self) -> Exit | None:
        """How the program ended; None until nothing is left of its tree."""
        return self._life.exit

    @property
    def returncode(self) -> int | None:
        """As Result.returncode; None until nothing is left of its tree."""
        return None if self._life.exit is None else _returncode(self._life.exit)

    async def wait(self) -> Exit:
        """Until the program has ended and nothing is left of its tree. Cancelled, it leaves them alone."""
        return await self._life.wait()

    def send_signal(self, signo: int) -> None:
        """To the program alone; nothing happens when it has ended."""
        self._life.signal(signo)

    def kill(self) -> None:
        """SIGKILL to the whole tree, at once and for certain; `wait` tells when it is gone."""
        self._life.kill()

    async def __aenter__(self) -> "Process":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._life.kill()
        await self._life.over()


# --- what is launched ------------------------------------------------------------------------------------------------


def _bad(key: str, why: str) -> SpecError:
    return SpecError(Problem("", 0, 0, key, why))


def _argv(command: Command) -> tuple[bytes, ...]:
    words = shlex.split(command) if isinstance(command, str) else command
    argv = tuple(map(os.fsencode, words))
    if not argv or not argv[0]:
        raise _bad("cmd", "is empty: name the program to run")
    if any(b"\0" in word for word in argv):
        raise _bad("cmd", "holds a NUL byte, which no program can receive")
    return argv


def _environment(env: Mapping[str, str] | None) -> tuple[tuple[bytes, ...], bytes]:
    """The variables as `NAME=value`, and PATH."""
    if env is None:
        # Encoded already, as os.environ keeps them: to have them decoded and encoded again costs 20 us.
        own: Mapping[bytes, bytes] = getattr(os.environ, "_data", os.environb)
        return tuple([name + b"=" + value for name, value in own.items()]), own.get(b"PATH", _PATH)
    given = {os.fsencode(name): os.fsencode(value) for name, value in env.items()}
    for name, value in given.items():
        if not name or b"=" in name or b"\0" in name + value:
            raise _bad(f"env.{os.fsdecode(name)}", 'a name must not be empty or hold "=", and neither may hold NUL')
    return tuple([name + b"=" + value for name, value in given.items()]), given.get(b"PATH", _PATH)


@functools.lru_cache(maxsize=64)
def _candidates(program: bytes, path: bytes) -> tuple[bytes, ...]:
    return tuple(map(os.fsencode, candidates(os.fsdecode(program), os.fsdecode(path))))


_size = functools.lru_cache(maxsize=64)(size)


@functools.cache
def _default(privileged: bool) -> Plan:
    return _keyed(PoolSpec(name="run", command=("-",)), privileged)


def _keyed(spec: PoolSpec, privileged: bool) -> Plan:
    """What the keys say, of a program that is still to be named. Raises SpecError."""
    prepared = plans.prepare(validate(spec), plans.Account(account(spec, Host())[0], None), {}, privileged)
    return Plan(
        generation=1,
        argv=(),
        env=(),
        candidates=(),
        namespaces=prepared.namespaces,
        directory=os.fsencode(spec.directory),
        hostname=None if spec.hostname is None else os.fsencode(spec.hostname),
        proc=spec.proc,
        identity=prepared.identity,
        rlimits=prepared.rlimits,
    )


def plan_of(command: Command, env: Mapping[str, str] | None, keys: SpecKeys, privileged: bool) -> Plan:
    """The launch of command. Raises SpecError, OSError (the current directory has been removed)."""
    if keys:
        try:
            spec = PoolSpec(name="run", command=("-",), **keys)
        except TypeError as error:
            raise TypeError(str(error).replace("PoolSpec", "run")) from None
        base = _keyed(spec, privileged)
        if "umask" in keys:
            base = base._replace(umask=spec.umask)
    else:
        base = _default(privileged)
    argv, (variables, path) = _argv(command), _environment(env)
    directory = base.directory if "directory" in keys else os.getcwdb()
    return base._replace(argv=argv, env=variables, candidates=_candidates(argv[0], path), directory=directory)


class _Ends:
    """Descriptors of a launch: the program's ends, lent until it has them, and ours, closed if it comes to nothing."""

    def __init__(self, uid: int | None, null: int) -> None:
        """uid: whose the program's ends are to be. null: /dev/null, which is not ours."""
        self._uid = uid
        self._null = null
        self._lent: list[int] = []
        self._kept: list[int] = []

    def output(self) -> tuple[int, int]:
        """(ours, the program's) of a pipe that it writes."""
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        self._keep(ours, theirs)
        return ours, theirs

    def input(self) -> tuple[int, int]:
        """(ours, the program's) of a pipe that it reads."""
        theirs, ours = os.pipe2(os.O_CLOEXEC)
        self._keep(ours, theirs)
        return ours, theirs

    def _keep(self, ours: int, theirs: int) -> None:
        self._kept.append(ours)
        self._lent.append(theirs)
        os.set_blocking(ours, False)
        if self._uid is not None:
            with contextlib.suppress(PermissionError):  # then only /dev/stdout and its like are closed to the program
                os.fchown(theirs, self._uid, -1)

    def given(self, where: Stdio, number: int) -> int:
        if where == "null":
            return self._null
        if where == "inherit":
            return number
        if isinstance(where, str):
            raise _bad(("stdin", "stdout", "stderr")[number], f"cannot be {where!r}")
        return where if isinstance(where, int) else where.fileno()

    def close(self, launched: bool) -> None:
        for fd in self._lent if launched else self._lent + self._kept:
            os.close(fd)


@contextlib.contextmanager
def _ends(uid: int | None, null: int) -> Iterator[_Ends]:
    ends = _Ends(uid, null)
    launched = False
    try:
        yield ends
        launched = True
    except OSError as error:
        raise LaunchError("pipes", error.errno or errno.EIO) from None
    finally:
        ends.close(launched)


def begin(
    own: Hub,
    plan: Plan,
    stdin: Literal["pipe"] | Stdio,
    stdout: Sink | Stdio,
    stderr: Sink | Literal["stdout"] | Stdio,
    *,
    heard: bool = True,
) -> Life:
    """Launches, with these at the other ends; heard: see Hub.launch. Raises LaunchError, and leaves nothing then."""
    with _ends(None if plan.identity is None else plan.identity.uid, own.launcher.null) as ends:
        taken: list[tuple[int, Sink]] = []

        def output(where: Sink | Stdio, number: int) -> int:
            if not isinstance(where, Sink):
                return ends.given(where, number)
            ours, theirs = ends.output()
            taken.append((ours, where))
            return theirs

        feed, zero = ends.input() if stdin == "pipe" else (-1, ends.given(stdin, 0))
        one = output(stdout, 1)
        two = one if stderr == "stdout" else output(stderr, 2)
        life = own.launch(plan, (zero, one, two), heard=heard)
    if feed >= 0:
        life.stdin = Writer(own.loop, own.watch, feed)
    for fd, sink in taken:
        end = ReadEnd(own.watch, fd, sink)
        life.outputs.append(end)
        if isinstance(sink, Stream):
            sink.connect(end)
    return life


_FAILED = {
    errno.ENOENT: "not found",
    errno.ENOTDIR: "not found",
    errno.EACCES: "no permission, or no regular file",
    errno.ENOEXEC: "neither a known format nor a #! line",
    errno.E2BIG: "arguments and environment are too long",
}


def failure(life: Life, plan: Plan) -> LaunchError:
    """What to raise for a life that failed before its program ran."""
    if life.failed is None:
        return LaunchError("go", errno.ESRCH, "the PID 1 of its namespace was killed from outside")
    try:
        step = wire.Step(life.failed.step).name.lower()
    except ValueError:
        step = str(life.failed.step)
    number = life.failed.errno
    hint = ""
    if life.failed.step == wire.Step.EXEC:
        hint = f"{os.fsdecode(plan.argv[0])}: {_FAILED.get(number, 'the kernel refuses it')}"
    elif life.failed.step == wire.Step.DIRECTORY:
        hint = os.fsdecode(plan.directory)
    return LaunchError(step, number, hint)


def _words(plan: Plan) -> tuple[str, ...]:
    return tuple(map(os.fsdecode, plan.argv))


# --- run, launch -----------------------------------------------------------------------------------------------------


async def launch(
    cmd: Command,
    *,
    stdin: Literal["pipe"] | Stdio = "null",
    stdout: Literal["pipe"] | Stdio = "pipe",
    stderr: Literal["pipe", "stdout"] | Stdio = "pipe",
    limit: int = LIMIT,
    env: Mapping[str, str] | None = None,
    **spec: Unpack[SpecKeys],
) -> Process:
    """Start cmd in namespaces of its own, and return when it runs.

    cmd: words, or one text that is split as a shell would, without one. stdin, stdout, stderr: `pipe`, `null`,
    `inherit` (this process's own), a descriptor or an open file; stderr also `stdout`. limit: bytes of each stream that
    wait to be read before the program is held back, twice over. env: all of its variables; None: this process's. spec:
    see SpecKeys.

    Raises SpecError, TypeError (what was asked for), LaunchError (this machine, or the program is not there).
    Cancelled, it leaves nothing behind.
    """
    own = hub()
    plan = plan_of(cmd, env, spec, own.privileged)
    out = Stream(own.loop, limit) if stdout == "pipe" else None
    err = Stream(own.loop, limit) if stderr == "pipe" else None
    await own.turn()
    life = begin(own, plan, stdin, out or stdout, err or stderr)  # type: ignore[arg-type] # "pipe" is a Stream here
    try:
        await life.started()
    except BaseException:
        life.kill()
        await life.over()
        raise
    if not life.host_pid:
        raise failure(life, plan)
    return Process(_words(plan), life, out, err)


@overload
async def run(
    cmd: Command,
    *,
    input: bytes | None = None,
    stdin: Stdio = "null",
    stdout: Literal["capture"] | Stdio = "capture",
    stderr: Literal["capture", "stdout"] | Stdio = "capture",
    max_output: int | str = "64M",
    encoding: None = None,
    errors: str = "strict",
    env: Mapping[str, str] | None = None,
    check: bool = False,
    timeout: float | None = None,
    **spec: Unpack[SpecKeys],
) -> Result[bytes]: ...


@overload
async def run(
    cmd: Command,
    *,
    input: str | None = None,
    stdin: Stdio = "null",
    stdout: Literal["capture"] | Stdio = "capture",
    stderr: Literal["capture", "stdout"] | Stdio = "capture",
    max_output: int | str = "64M",
    encoding: str,
    errors: str = "strict",
    env: Mapping[str, str] | None = None,
    check: bool = False,
    timeout: float | None = None,
    **spec: Unpack[SpecKeys],
) -> Result[str]: ...


async def run(
    cmd: Command,
    *,
    input: bytes | str | None = None,  # noqa: A002 - subprocess.run's name
    stdin: Stdio = "null",
    stdout: Literal["capture"] | Stdio = "capture",
    stderr: Literal["capture", "stdout"] | Stdio = "capture",
    max_output: int | str = "64M",
    encoding: str | None = None,
    errors: str = "strict",
    env: Mapping[str, str] | None = None,
    check: bool = False,
    timeout: float | None = None,
    **spec: Unpack[SpecKeys],
) -> Result[bytes] | Result[str]:
    """Run cmd in namespaces of its own to its end, and until nothing is left of its tree.

    input: for its stdin, then EOF. stdout, stderr: `capture`, else as for `launch`. max_output: of each of the two,
    bytes or a text with a unit; what comes after that is read, counted and thrown away. encoding, errors: of what was
    captured, and of input; None: bytes. check: raise RunFailed unless it ends with exit code 0. timeout: seconds from
    its launch; then the tree is killed. The other arguments are launch's.

    Raises RunTimeout, RunFailed, both with `.result`, and what launch raises. Cancelled, it kills the tree, waits until
    that is proven empty, and raises CancelledError.
    """
    own = hub()
    plan = plan_of(cmd, env, spec, own.privileged)
    bound = _size(max_output) if isinstance(max_output, str) else max_output
    out = Capture(bound) if stdout == "capture" else None
    err = Capture(bound) if stderr == "capture" else None
    fed = input.encode(encoding or "utf-8", errors) if isinstance(input, str) else input
    await own.turn()
    source = stdin if fed is None else "pipe"
    life = begin(own, plan, source, out or stdout, err or stderr, heard=False)  # type: ignore[arg-type]
    if life.stdin is not None and fed is not None:
        life.stdin.write(fed)
        life.stdin.close()
    timer = None if timeout is None else own.loop.call_later(timeout, life.expire)
    try:
        await life.over()
    finally:
        if timer is not None:
            timer.cancel()
    if life.exit is None or not (life.host_pid or life.timed_out):
        raise failure(life, plan)
    result = _result(life.exit, life, plan, out, err)
    text = result if encoding is None else _decoded(result, encoding, errors)
    if life.exit.timed_out and timeout is not None:
        raise RunTimeout(text, timeout)
    return text.check() if check else text


def _result(ended: Exit, life: Life, plan: Plan, out: Capture | None, err: Capture | None) -> Result[bytes]:
    return Result(
        args=_words(plan),
        exit=ended,
        stdout=out.data() if out else b"",
        stderr=err.data() if err else b"",
        host_pid=life.host_pid,
        ns_pid=life.ns_pid,
        stdout_dropped=out.dropped if out else 0,
        stderr_dropped=err.dropped if err else 0,
    )


def _decoded(result: Result[bytes], encoding: str, errors: str) -> Result[str]:
    return Result(
        args=result.args,
        exit=result.exit,
        stdout=result.stdout.decode(encoding, errors),
        stderr=result.stderr.decode(encoding, errors),
        host_pid=result.host_pid,
        ns_pid=result.ns_pid,
        stdout_dropped=result.stdout_dropped,
        stderr_dropped=result.stderr_dropped,
    )
