"""Lives for tests: by the Launcher and driven to their end; or by hand, for what no supervisor of ours would say."""

from __future__ import annotations

import array
import contextlib
import ctypes
import fcntl
import os
import pickle
import select
import signal
import socket
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import pytest

from nssup import _clone, clone, wire
from nssup.clone import CLONE_NEW, Launcher, Process
from nssup.facts import Host
from nssup.record import Identity, Plan, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from nssup.events import Exit

PATIENCE = 20.0  # seconds until something that should happen has failed to
TOKEN = bytes(range(16))
ENV = (b"PATH=/usr/bin:/bin",)
ISOLATED = frozenset({"pid", "mount", "uts", "ipc"})
PACKAGE = Path(clone.__file__).parent
SO_PASSCRED = 16

privileged = Host().capable("SYS_ADMIN")
needs_namespaces = pytest.mark.skipif(not privileged, reason="needs CAP_SYS_ADMIN")
needs_root = pytest.mark.skipif(not privileged or os.geteuid() != 0, reason="needs root with CAP_SYS_ADMIN")

M = TypeVar("M", bound=wire.Message)
R = TypeVar("R")
PR_SET_DUMPABLE = 4


def plan_of(
    *argv: str, init: bool = True, proc: bool | None = None, namespaces: Iterable[str] = ISOLATED, die: bool = True
) -> Plan:
    """A plan for argv, with its first word as the only path to try and /proc private where it can be."""
    namespaces = frozenset(namespaces)
    return Plan(
        generation=1,
        argv=tuple(map(os.fsencode, argv)),
        env=ENV,
        candidates=(os.fsencode(argv[0]),),
        namespaces=namespaces,
        proc="mount" in namespaces if proc is None else proc,
        init=init,
        die=die,
    )


def shell(script: str, *args: str) -> tuple[str, ...]:
    return ("/bin/sh", "-c", script, *args)


def wait_readable(fd: int) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(PATIENCE * 1000), "nothing happened"


def end_of(pidfd: int) -> tuple[int, int]:
    """(CLD_*, status) of a child, when it has ended."""
    wait_readable(pidfd)
    end = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    assert end
    return end.si_code, end.si_status


def read_all(fd: int) -> bytes:
    """Everything up to the end of a pipe."""
    parts: list[bytes] = []
    while True:
        wait_readable(fd)
        data = os.read(fd, 65536)
        if not data:
            return b"".join(parts)
        parts.append(data)


# --- by the launcher -------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """How a life went. messages: all that init said; ended: of init itself (reap)."""

    messages: list[wire.Message]
    out: bytes
    err: bytes
    ended: Exit

    def only(self, kind: type[M]) -> M:
        found = [message for message in self.messages if isinstance(message, kind)]
        assert len(found) == 1, self.messages
        return found[0]

    @property
    def failed(self) -> tuple[wire.Step, int]:
        failed = self.only(wire.Failed)
        return wire.Step(failed.step), failed.errno

    @property
    def exit(self) -> tuple[int, int]:
        """(CLD_*, status) of the program."""
        return self.only(wire.Exited).exit[:2]


class Driver:
    """Waits for what a Process says, without a loop."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.heard: list[wire.Message] = []

    def hear(self, kind: type[M]) -> M:
        """The first message of that kind, heard already or yet to come."""
        while True:
            for message in self.heard:
                if isinstance(message, kind):
                    return message
            assert not self.process.line_ended, f"the line ended with {self.heard}"
            wait_readable(self.process.line)
            self.heard += self.process.receive()

    def end(self) -> Exit:
        """Waits until init has ended, reaps it and hears what is left."""
        wait_readable(self.process.pidfd)
        while not self.process.line_ended:
            found = self.process.receive()
            if not found:
                break
            self.heard += found
        ended = self.process.reap()
        assert ended
        return ended


@contextlib.contextmanager
def launched(
    plan: Plan,
    launcher: Launcher | None = None,
    stdio: tuple[int, int, int] | None = None,
    go: bool = True,
    sockets: Sequence[int] = (),
) -> Iterator[Driver]:
    """A life that is told to go, unless it is not; destroyed on the way out."""
    own = Launcher() if launcher is None else launcher
    try:
        process = own.launch(plan, stdio=stdio, sockets=sockets)
    finally:
        if launcher is None:
            own.close()
    try:
        if go:
            process.go()
        yield Driver(process)
    finally:
        process.destroy()


def run(plan: Plan, launcher: Launcher | None = None) -> Outcome:
    """A life from launch to its end; its output has to fit into a pipe."""
    with launched(plan, launcher) as life:
        ended = life.end()
        stdout, stderr = life.process.stdout, life.process.stderr
        assert stdout is not None
        assert stderr is not None
        return Outcome(life.heard, read_all(stdout), read_all(stderr), ended)


def output(plan: Plan) -> str:
    outcome = run(plan)
    assert outcome.err == b""
    return outcome.out.decode()


# --- by hand ---------------------------------------------------------------------------------------------------------


class ByHand:
    """nssup-init in namespaces of its own, and this end of its line. Nothing has been said to it yet.

    supervisor: the pidfd that init watches; ours when None. Its program's output is `out`, a pipe.
    """

    def __init__(self, *namespaces: str, supervisor: int | None = None, init: Path | None = None) -> None:
        self._closes = contextlib.ExitStack()
        with contextlib.ExitStack() as lent:

            def opened(fd: int, keep: bool = False) -> int:
                (self._closes if keep else lent).callback(os.close, fd)
                return fd

            self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
            self._closes.callback(self.socket.close)
            lent.callback(theirs.close)
            self.socket.setsockopt(socket.SOL_SOCKET, SO_PASSCRED, 1)
            null = opened(os.open("/dev/null", os.O_RDWR))
            program = opened(os.open(init or PACKAGE / "nssup-init", os.O_RDONLY | os.O_CLOEXEC))
            watched = opened(os.pidfd_open(os.getpid())) if supervisor is None else supervisor
            read, write = os.pipe()
            self.out = opened(read, keep=True)
            opened(write)
            fds = (
                null,
                null,
                null,
                theirs.fileno(),
                self.socket.fileno(),
                watched,
                read,
                -1,
                null,
                write,
                write,
                -1,
                program,
            )
            window = (*sorted(opened(os.dup(null)) for _ in fds), null)
            flags = sum(CLONE_NEW[name] for name in {"pid", *namespaces})
            self.pidfd, self.host_pid, step, number = _clone.clone(flags, fds, window, -1)
            assert (step, number) == (0, 0)
            opened(self.pidfd, keep=True)
        self.heard: list[tuple[wire.Message, int]] = []  # with the sender's host PID
        self.ended: tuple[int, int] | None = None

    def __enter__(self) -> ByHand:
        return self

    def __exit__(self, *_: object) -> None:
        if self.ended is None:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            self.end()
        self._closes.close()

    def say(self, *messages: bytes, fds: Iterable[int] = ()) -> None:
        """In one datagram."""
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
        self.socket.sendmsg([b"".join(messages)], [rights] if fds else [])

    def say_record(self, plan: Plan, token: bytes = TOKEN) -> None:
        self.say(wire.record_inline(encode(plan, token, clone.root_mount_id())))

    def say_go(self, policy: wire.Policy = wire.Policy.DIE, token: bytes = TOKEN, epoch: int = 1) -> None:
        self.say(wire.go(epoch, policy, token))

    def _listen(self) -> bool:
        """Takes one datagram; False at the line's end."""
        wait_readable(self.socket.fileno())
        try:
            data, ancillary, _, _ = self.socket.recvmsg(4096, socket.CMSG_SPACE(12))
        except ConnectionResetError:
            return True
        found, unknown = wire.decode(data, clone._sender(ancillary))
        assert unknown == 0
        self.heard += [(message, clone._sender(ancillary)) for message in found]
        return bool(data)

    def hear(self, kind: type[M]) -> M:
        """The next message of that kind that was not heard before."""
        while True:
            for at, (message, _) in enumerate(self.heard):
                if isinstance(message, kind):
                    del self.heard[at]
                    return message
            assert self._listen(), f"the line ended with {self.heard}"

    def state(self, epoch: int = 0xFFFFFFFF) -> wire.State:
        """What init answers to a PING now."""
        self.heard = [heard for heard in self.heard if not isinstance(heard[0], wire.State)]
        self.say(wire.ping(epoch))
        return self.hear(wire.State)

    def last_words(self) -> list[wire.Message]:
        """What init said and was not heard, up to the line's end, which its own end is (policy die, or before GO)."""
        while self._listen():
            pass
        return [message for message, _ in self.heard]

    def end(self) -> tuple[int, int]:
        """(CLD_*, status) of init, when it has ended."""
        if self.ended is None:
            self.ended = end_of(self.pidfd)
        return self.ended

    def output(self) -> bytes:
        """All that the program wrote; when nobody can write any more."""
        return read_all(self.out)

    def stop(self) -> None:
        """Freezes init, so that what comes meanwhile is there when it looks again."""
        signal.pidfd_send_signal(self.pidfd, signal.SIGSTOP)
        os.waitid(os.P_PIDFD, self.pidfd, os.WSTOPPED)

    def go_on(self) -> None:
        signal.pidfd_send_signal(self.pidfd, signal.SIGCONT)

    def kill(self) -> None:
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)


# --- children of the test ---------------------------------------------------------------------------------------------


def prctl(option: int, value: int) -> None:
    assert ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) == 0


@contextlib.contextmanager
def forked(function: Callable[[int], object]) -> Iterator[tuple[int, int]]:
    """(pidfd of a child that runs function, read end of the pipe whose write end function gets).

    Killed on the way out. A fork, not a new Python: cheaper by far, and other users need not be able to read ours.
    """
    read, write = os.pipe()
    host_pid = os.fork()
    if host_pid == 0:
        code = 1
        try:
            os.close(read)
            function(write)
            code = 0
        finally:
            if code:
                traceback.print_exc()
            os._exit(code)
    os.close(write)
    pidfd = os.pidfd_open(host_pid)
    try:
        yield pidfd, read
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
        os.close(pidfd)
        os.close(read)


def in_child(function: Callable[[], R], identity: Identity | None = None) -> R:
    """What function returns in a child, as another user if one is named."""

    def body(write: int) -> None:
        keep = fcntl.fcntl(write, fcntl.F_DUPFD_CLOEXEC, 900)  # out of the way of tests about low numbers
        os.close(write)
        if identity is not None:
            os.setgroups(identity.groups)
            os.setresgid(identity.gid, identity.gid, identity.gid)
            os.setresuid(identity.uid, identity.uid, identity.uid)
            prctl(PR_SET_DUMPABLE, 1)  # as a process that was this user's from its exec on
        try:
            said: tuple[R | None, str] = function(), ""
        except BaseException:  # stderr may be closed
            said = None, traceback.format_exc()
        os.write(keep, pickle.dumps(said))

    with forked(body) as (child, read):
        data = read_all(read)
        assert end_of(child) == (os.CLD_EXITED, 0)
        found, error = pickle.loads(data)
        assert not error, error
        returned: R = found
        return returned


# --- processes of the host -------------------------------------------------------------------------------------------


def status_of(host_pid: int | str) -> dict[str, str]:
    lines = Path(f"/proc/{host_pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def tree_of(host_pid: int) -> list[int]:
    """Host PIDs of all descendants that have not ended while we look."""
    found: list[int] = []
    for children in Path(f"/proc/{host_pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for child in map(int, children.read_text().split()):
                found += [child, *tree_of(child)]
    return found


def is_there(host_pid: int) -> bool:
    return Path(f"/proc/{host_pid}").exists()


def wait_executed(host_pid: int) -> None:
    """Until a process that was started shows the program's arguments, name and credentials: init is told of the exec
    when it cannot fail any more, some microseconds before it is complete."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # so short was its life
        proc = Path(f"/proc/{host_pid}")
        eventually(lambda: (proc / "cmdline").read_bytes() != b"" or status_of(host_pid)["State"].startswith("Z"))


def eventually(condition: Callable[[], bool]) -> None:
    """Until condition() holds: for what the kernel does on its own and tells nobody. Yields, does not sleep."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        os.sched_yield()
