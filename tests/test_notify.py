"""What a program says of itself: the socket of sd_notify and the ready pipe, made and read by the real nssup-init."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from launching import (
    ISOLATED,
    PATIENCE,
    ByHand,
    Driver,
    eventually,
    is_there,
    launched,
    needs_namespaces,
    needs_root,
    plan_of,
    run,
    shell,
    status_of,
    tree_of,
    wait_readable,
)

from nssup import plan, record, wire
from nssup.clone import Launcher, Process
from nssup.events import Start, State
from nssup.loop import Supervisor
from nssup.record import Identity, Notify, Plan
from nssup.spec import PoolSpec, RestartPolicy
from nssup.wire import Flag, Notified, Step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nssup.events import Event
    from nssup.loop import _Life

pytestmark = needs_namespaces

PYTHON = (os.path.realpath(sys.executable), "-S", "-E", "-c")
NOBODY = Identity(65534, 65534, (65534,))
NEVER = RestartPolicy(policy="never")

has_systemd_notify = pytest.mark.skipif(not shutil.which("systemd-notify"), reason="needs systemd-notify (systemd)")

SENDER = """
import os, sys, _socket, array
def send(data, *fds):
    with_them = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, array.array('i', fds))] if fds else []
    with socket() as to:
        to.sendmsg([data], with_them)
class socket(_socket.socket):
    __enter__ = lambda self: self
    __exit__ = lambda self, *_: self.close()
    def __init__(self):
        super().__init__(_socket.AF_UNIX, _socket.SOCK_DGRAM)
        self.connect(os.environ['NOTIFY_SOCKET'])
def barrier():
    read, write = os.pipe()
    send(b'BARRIER=1', write)
    os.close(write)
    assert os.read(read, 1) == b''
    os.close(read)
"""
HELPERS = """
def errno_of(call, *args):
    try:
        call(*args)
    except OSError as error:
        return error.errno
def in_child(then):
    child = os.fork()
    if not child:
        then()
        os._exit(0)
    os.waitpid(child, 0)
"""
PUPPET = SENDER + HELPERS + "for line in sys.stdin.buffer:\n    exec(line); os.write(1, b'.')\n"


@pytest.fixture
def directory() -> Iterator[Path]:
    """Stands for the runtime directory; short, and everybody may pass it."""
    made = Path(tempfile.mkdtemp())
    made.chmod(0o755)
    (made / "control").touch()
    yield made
    shutil.rmtree(made)


def told_how(plan: Plan, directory: Path | None, ready_fd: int | None = None) -> Plan:
    notify = Notify(None if directory is None else os.fsencode(directory), ready_fd)
    env = plan.env if notify.socket is None else (*plan.env, b"NOTIFY_SOCKET=" + notify.socket)
    return plan._replace(notify=notify, env=env)


class Puppet(Driver):
    """A life whose program does as told, line by line."""

    def __init__(self, process: Process, strings: int, answers: int) -> None:
        super().__init__(process)
        self.host_pid = self.hear(wire.Started).host_pid
        self._strings, self._answers = strings, answers

    def say(self, *lines: str) -> None:
        """Without waiting for it to be done."""
        os.write(self._strings, "".join(line + "\n" for line in lines).encode())

    def do(self, *lines: str) -> None:
        self.say(*lines)
        for _ in lines:
            wait_readable(self._answers)
            assert os.read(self._answers, 1) == b".", "it failed"

    def listen(self) -> None:
        wait_readable(self.process.line)
        self.heard += self.process.receive()

    @property
    def news(self) -> list[Notified]:
        return [message.notified for message in self.heard if isinstance(message, wire.Notify)]

    def until(self, condition: Callable[[Notified], object]) -> Notified:
        """What it says of itself, as soon as it is that."""
        while not self.news or not condition(self.news[-1]):
            self.listen()
        return self.news[-1]

    def state(self) -> Notified:
        """What init has kept of what was said so far; all of it: also what was sent when nobody waited for it."""
        self.do("barrier()")
        return self.pinged().notified

    def pinged(self) -> wire.State:
        self.process.ping()
        before = len(self.heard)
        while True:
            for message in self.heard[before:]:
                if isinstance(message, wire.State):
                    return message
            self.listen()


@contextlib.contextmanager
def puppet(
    directory: Path | None,
    ready_fd: int | None = None,
    *,
    die: bool = True,
    python: tuple[str, ...] = PYTHON,
    identity: Identity | None = None,
    launcher: Launcher | None = None,
) -> Iterator[Puppet]:
    its, strings = os.pipe()
    answers, out = os.pipe()
    try:
        wanted = told_how(plan_of(*python, PUPPET, die=die), directory, ready_fd)._replace(identity=identity)
        with launched(wanted, launcher, (its, out, 2)) as life:
            os.close(out)
            out = -1
            yield Puppet(life.process, strings, answers)
    finally:
        for fd in (its, strings, answers, out):
            if fd >= 0:
                os.close(fd)


def descriptors_of(host_pid: int) -> dict[int, str]:
    return {int(fd): os.readlink(f"/proc/{host_pid}/fd/{fd}") for fd in os.listdir(f"/proc/{host_pid}/fd")}


def now_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


# --- what can be said ------------------------------------------------------------------------------------------------


SAID: dict[str, tuple[bytes, Notified]] = {
    "ready": (b"READY=1", Notified(flags=Flag.READY, readies=1)),
    "ready, with a newline": (b"READY=1\n", Notified(flags=Flag.READY, readies=1)),
    "ready, with the NUL of its string": (b"READY=1\0", Notified(flags=Flag.READY, readies=1)),
    "stopping": (b"STOPPING=1", Notified(flags=Flag.STOPPING)),
    "reloading": (
        b"RELOADING=1\nMONOTONIC_USEC=1234567890123",
        Notified(flags=Flag.RELOADING, reloads=1, monotonic_us=1234567890123),
    ),
    "a reload and its end": (b"RELOADING=1\nREADY=1", Notified(flags=Flag.READY, readies=1, reloads=1)),
    "status": (b"STATUS=hello world", Notified(status=b"hello world")),
    "the last status": (b"STATUS=first\nSTATUS=", Notified()),
    "status that is no text": (b"STATUS=\xff\x1b[31m\x7f=", Notified(status=b"\xff\x1b[31m\x7f=")),
    "status of its full length": (b"STATUS=" + b"x" * 120, Notified(status=b"x" * 120)),
    "long status": (b"STATUS=" + b"x" * 3000, Notified(status=b"x" * 120)),
    "long status, cut between characters of 2": (
        b"STATUS=x" + "ä".encode() * 99,
        Notified(status=b"x" + b"\xc3\xa4" * 59),
    ),
    "long status, cut between characters of 4": (
        b"STATUS=x" + "𝄞".encode() * 99,
        Notified(status=b"x" + "𝄞".encode() * 29),
    ),
    "long status of no characters": (b"STATUS=" + b"\x80" * 200, Notified(status=b"\x80" * 117)),
    "watchdog": (b"WATCHDOG=1\nWATCHDOG=1", Notified(watchdogs=2)),
    "watchdog trigger": (b"WATCHDOG=trigger", Notified(triggers=1)),
    "another interval": (b"WATCHDOG_USEC=5000000", Notified(watchdog_us=5_000_000)),
    "more time": (b"EXTEND_TIMEOUT_USEC=30000000", Notified(extend_us=30_000_000)),
    "the longest time": (b"EXTEND_TIMEOUT_USEC=18446744073709551615", Notified(extend_us=2**64 - 1)),
    "main PID": (b"MAINPID=17", Notified(main_ns_pid=17)),
    "errno": (b"ERRNO=2147483647", Notified(error=2**31 - 1)),
    "all at once": (
        b"READY=1\nSTOPPING=1\nSTATUS=s\nMAINPID=2\nERRNO=3",
        Notified(flags=Flag.READY | Flag.STOPPING, readies=1, main_ns_pid=2, error=3, status=b"s"),
    ),
}
NOTHING: dict[str, bytes] = {
    "no bytes": b"",
    "a newline": b"\n",
    "newlines": b"\n" * 4096,
    "what nobody knows": b"X_MINE=1\nBUSERROR=org.x\nREADY",
    "almost ready": b"READY=\nREADY=0\nREADY=11\n READY=1\nready=1\nREADY=1 \nREADY=1\r\nXREADY=1\nREADY=1=",
    "almost a status": b"STATUS\nTATUS=x\n=x\nsTATUS=x",
    "almost flags": b"STOPPING=2\nRELOADING=\nWATCHDOG=0\nWATCHDOG=2\nWATCHDOG=triggers",
    "numbers that are none": b"MAINPID=\nMAINPID=x\nMAINPID=-1\nMAINPID=1x\nMAINPID= 1\nERRNO=0x5\nERRNO=+1",
    "numbers too large": b"MAINPID=2147483648\nERRNO=9999999999999999999999\nEXTEND_TIMEOUT_USEC=18446744073709551616",
    "garbage": bytes(range(1, 256)) * 16,
    "equals": b"=" * 4000,
    "descriptors to keep": b"FDSTORE=1\nFDNAME=x",
}


def timeless(said: Notified) -> Notified:
    return said._replace(ready_ns=0, watchdog_ns=0, extend_ns=0)


@pytest.mark.parametrize("name", SAID)
def test_what_is_said_is_kept(name: str, directory: Path) -> None:
    data, meant = SAID[name]
    with puppet(directory) as life:
        before = now_ns()
        life.do(f"send({data!r})")
        state = life.state()
        after = now_ns()
        assert timeless(state) == meant._replace(taken=2)
        for at, said in (
            (state.ready_ns, state.readies),
            (state.watchdog_ns, state.watchdogs),
            (state.extend_ns, state.extend_us),
        ):
            assert before < at < after if said else at == 0


@pytest.mark.parametrize("name", NOTHING)
def test_what_says_nothing(name: str, directory: Path) -> None:
    with puppet(directory) as life:
        life.do(f"send({NOTHING[name]!r})")
        assert life.state() == Notified(taken=2)
        assert life.news == []


BROKEN = {
    "longer than any": b"READY=1\n" + b"x" * 4089,
    "giant": b"READY=1\n" * 20_000,  # the kernel takes it
    "a NUL inside": b"READY=1\0\nSTATUS=x",
    "NULs": bytes(4096),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_not_read(name: str, directory: Path) -> None:
    with puppet(directory) as life:
        life.do(f"send({BROKEN[name]!r})")
        assert life.state() == Notified(taken=2, broken=1)
        assert life.news == []
        life.do("send(b'READY=1\\n'.ljust(4096))")
        assert life.state().readies == 1


def test_a_reload(directory: Path) -> None:
    with puppet(directory) as life:
        life.do("send(b'READY=1')", "send(b'RELOADING=1')")
        said = life.until(lambda said: said.reloads)
        assert said.flags == Flag.READY | Flag.RELOADING
        life.do("send(b'READY=1')")
        said = life.until(lambda said: said.readies == 2)
        assert said.flags == Flag.READY


# --- who may say it --------------------------------------------------------------------------------------------------


def test_ready_from_a_grandchild_that_nobody_knows_any_more(directory: Path) -> None:
    """It is reaped before init reads what it said."""
    with puppet(directory) as life:
        signal.pidfd_send_signal(life.process.pidfd, signal.SIGSTOP)
        life.do("in_child(lambda: in_child(lambda: send(b'READY=1')))")
        signal.pidfd_send_signal(life.process.pidfd, signal.SIGCONT)
        assert life.until(lambda said: said.readies).strangers == 0


def outside(life: Puppet, directory: Path) -> socket.socket:
    """A socket of ours, not of the worker's namespaces, connected to init's."""
    ours = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    ours.connect(f"/proc/{life.host_pid}/root{directory}/notify")
    return ours


def test_a_stranger_is_refused(directory: Path) -> None:
    with puppet(directory) as life, outside(life, directory) as stranger:
        stranger.send(b"READY=1\nSTATUS=from outside")
        assert life.state() == Notified(taken=2, strangers=1)
        life.do("send(b'STATUS=from inside')")
        assert life.until(lambda said: said.status) == Notified(taken=3, strangers=1, status=b"from inside")


def test_a_strangers_descriptors_are_closed_too(directory: Path) -> None:
    read, write = os.pipe()
    with puppet(directory) as life, outside(life, directory) as stranger:
        socket.send_fds(stranger, [b"BARRIER=1"], [write])
        os.close(write)
        wait_readable(read)
        assert os.read(read, 1) == b""
    os.close(read)


def python_of_all() -> tuple[str, ...]:
    found = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    if found is None:
        pytest.skip("needs a python3 that everybody may run")
    return (found, *PYTHON[1:])


@needs_root
def test_another_user_may_say_it(directory: Path) -> None:
    with puppet(directory, 5, identity=NOBODY, python=python_of_all()) as life:
        life.do("assert os.getuid() == 65534", "send(b'READY=1\\nSTATUS=nobody')", "os.write(5, b'\\n')")
        assert life.until(lambda said: said.readies == 2).status == b"nobody"


def test_in_a_user_namespace(directory: Path) -> None:
    code = SENDER + "send(b'READY=1'); print(os.listdir(sys.argv[1]))"
    wanted = plan_of(*PYTHON, code, str(directory), namespaces=ISOLATED | {"user"})
    outcome = run(told_how(wanted, directory))
    assert (outcome.out, outcome.err) == (b"['notify']\n", b"")
    assert outcome.only(wire.Notify).notified.readies == 1


@has_systemd_notify
@pytest.mark.parametrize("identity", [None, NOBODY])
def test_systemd_notify(identity: Identity | None, directory: Path) -> None:
    """It waits until init has read what it said: its BARRIER=1 is the second datagram."""
    script = 'sh -c "systemd-notify --ready --status=hello --pid=17 X_MINE=1; exit $?"; exit $?'
    wanted = plan_of(*shell(script))._replace(identity=identity)
    outcome = run(told_how(wanted, directory))
    assert (outcome.exit, outcome.err) == ((os.CLD_EXITED, 0), b"")
    last = [message.notified for message in outcome.messages if isinstance(message, wire.Notify)][-1]
    assert timeless(last) == Notified(Flag.READY, taken=2, readies=1, main_ns_pid=17, status=b"hello")


# --- how it is told --------------------------------------------------------------------------------------------------


def sleeps(host_pid: int) -> bool:
    """One that polls in a spin never does."""
    return status_of(host_pid)["State"].startswith("S")


def test_the_line_holds_one_notify_whatever_comes(directory: Path) -> None:
    """What comes meanwhile is told together, when the first was read; and init does not wait for that in a spin."""
    with puppet(directory) as life:
        life.do("send(b'READY=1')")
        wait_readable(life.process.line)
        life.do("for i in range(1000): send(b'WATCHDOG=1\\nSTATUS=%d' % i)", "barrier()")
        eventually(lambda: sleeps(life.process.init_host_pid))
        said = life.until(lambda said: said.status == b"999")
        assert [one.readies for one in life.news] == [1, 1]
        assert (said.watchdogs, said.taken) == (1000, 1002)
        assert life.pinged().notified == said
        assert len(life.news) == 2


def test_the_last_news_are_told_however_they_meet_the_reading_of_others(directory: Path) -> None:
    """The kernel wakes a sender while it still counts what was read; init must not take that for something unread."""
    with puppet(directory) as life:
        life.do("one = socket()")
        for number in range(300):
            life.say(f"for i in range(40): one.send(b'STATUS={number} %d' % i)")
            life.until(lambda said: said.status == b"%d 39" % number)  # noqa: B023 - called before the next one


def test_each_heartbeat_is_told_and_nothing_twice(directory: Path) -> None:
    with puppet(directory) as life:
        for number in range(1, 20):
            life.do("send(b'WATCHDOG=1')")
            life.until(lambda said: said.watchdogs == number)  # noqa: B023 - called before the next one
            life.do("send(b'STATUS=same\\nSTOPPING=1\\nMAINPID=5\\nERRNO=1\\nMONOTONIC_USEC=7')")
        assert life.state().taken == 39
        assert len(life.news) in (19, 20)  # the first status alone, if it was not in time for the second heartbeat
        times = [one.watchdog_ns for one in life.news]
        assert times == sorted(times)


def test_a_program_that_floods_keeps_init_from_nothing(directory: Path) -> None:
    """Its own end included; and the supervisor hears of it once for each time that it listens."""
    flood = "os.fork() or [send(b'WATCHDOG=1\\nSTATUS=x') for _ in iter(int, 1)]"
    with puppet(directory) as life:
        life.do(*[flood] * 3)
        flooders = tree_of(life.host_pid)
        assert len(flooders) == 3
        for _ in range(50):
            assert life.pinged().ns_pid == 2
        life.process.signal(signal.SIGTERM)
        assert life.hear(wire.Exited).exit[:2] == (os.CLD_KILLED, signal.SIGTERM)
        life.hear(wire.Empty)
        assert not any(map(is_there, flooders))


def test_a_hundred_thousand(directory: Path) -> None:
    with puppet(directory) as life:
        life.say(
            "one = socket()",
            "for i in range(100000): one.send(b'STATUS=%d' % i)",
            "one.send(b'READY=1'); os._exit(3)",
        )
        assert life.hear(wire.Exited).exit[:2] == (os.CLD_EXITED, 3)
        assert life.news[-1].taken == 100_001
        assert (life.news[-1].status, life.news[-1].readies) == (b"99999", 1)


def test_descriptors_that_come_along_are_never_inits(directory: Path) -> None:
    """Nor do they stay open; with a receiver who made room for them it would run out of numbers."""
    with puppet(directory) as life:
        before = descriptors_of(life.process.init_host_pid)
        life.do(
            "ends = os.pipe()",
            "for i in range(50): send(b'FDSTORE=1', *[ends[1]] * 253)",
            "os.close(ends[1])",
            "assert os.read(ends[0], 1) == b''",
        )
        assert descriptors_of(life.process.init_host_pid) == before
        assert life.state().taken == 51


def test_last_words_come_before_the_end(directory: Path) -> None:
    code = SENDER + "send(b'READY=1'); send(b'STOPPING=1\\nSTATUS=bye'); os.write(5, b'\\n'); os._exit(0)"
    with contextlib.closing(Launcher()) as launcher:
        for _ in range(10):
            outcome = run(told_how(plan_of(*PYTHON, code), directory, 5), launcher)
            *_, last, exited, empty = outcome.messages
            assert isinstance(last, wire.Notify)
            assert last.notified[:5] == (Flag.READY | Flag.STOPPING, 2, 0, 0, 2)
            assert last.notified.status == b"bye"
            assert [type(exited), type(empty)] == [wire.Exited, wire.Empty]


def test_a_new_supervisor_hears_everything(directory: Path) -> None:
    """Also what was said while nobody lived to hear it."""
    code = SENDER + (
        "import _signal as s\n"
        "s.pthread_sigmask(s.SIG_BLOCK, [s.SIGUSR1]); send(b'RELOADING=1\\nMAINPID=3'); s.sigwait([s.SIGUSR1])\n"
        "for i in range(5000): send(b'WATCHDOG=1')\n"
        "send(b'READY=1\\nSTATUS=alone'); barrier(); print(flush=True); s.sigwait([s.SIGUSR1]); send(b'STATUS=heard')\n"
        "s.sigwait([s.SIGUSR1])"
    )
    wanted = told_how(plan_of(*PYTHON, code, die=False), directory)
    with contextlib.closing(Launcher(epoch=2)) as new, launched(wanted) as life:
        life.hear(wire.Notify)
        assert life.process.stdout
        life.process.signal(signal.SIGUSR1)
        wait_readable(life.process.stdout)
        life.process.close_line()
        adopted = Process.adopt(os.dup(life.process.pidfd), life.process.init_host_pid, 1, epoch=2)
        try:
            after = Driver(adopted)
            adopted.hello(new.own_pidfd)
            state = after.hear(wire.State)
            assert (state.epoch, state.notified.flags, state.notified.status) == (2, Flag.READY, b"alone")
            assert (state.notified.watchdogs, state.notified.main_ns_pid) == (5000, 3)
            assert [message for message in after.heard if isinstance(message, wire.Notify)] == []
            adopted.signal(signal.SIGUSR1)
            assert after.hear(wire.Notify).notified.status == b"heard"
        finally:
            adopted.close()


# --- the ready pipe --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "flag"),
    [
        (["os.write(4, b'\\n')"], Flag.READY),
        (["os.write(4, b'garbage\\x00\\xff' * 5000)", "os.write(4, b' more\\nmore')"], Flag.READY),
        (["os.write(4, b'\\n\\n\\n')"], Flag.READY),
        (["os.close(4)"], Flag.ENDED),
        (["os.write(4, b'ready')", "os.close(4)"], Flag.ENDED),
        (["os.fork() or os.read(0, 0) or os._exit(os.write(4, b'\\n') - 1)", "os.wait()"], Flag.READY),
    ],
)
def test_the_ready_pipe(lines: list[str], flag: Flag) -> None:
    with puppet(None, 4) as life:
        before = now_ns()
        life.do(*lines)
        said = life.until(lambda said: said.flags)
        ready = flag == Flag.READY
        assert said._replace(ready_ns=0) == Notified(flag, readies=int(ready))
        assert (before < said.ready_ns < now_ns()) is ready
        assert len(life.news) == 1


def test_init_is_done_with_the_pipe_after_the_newline() -> None:
    with puppet(None, 4) as life:
        before = len(descriptors_of(life.process.init_host_pid))
        life.do("os.write(4, b'\\n')")
        life.until(lambda said: said.readies)
        assert len(descriptors_of(life.process.init_host_pid)) == before - 1
        life.do(
            "import _signal; _signal.signal(13, _signal.SIG_IGN)",
            f"assert errno_of(os.write, 4, b'x') == {errno.EPIPE}",
        )
        assert life.pinged().notified.readies == 1


def test_a_long_silence_costs_nothing() -> None:
    with puppet(None, 4) as life:
        life.do("os.write(4, b'not yet')")
        eventually(lambda: sleeps(life.process.init_host_pid))
        assert life.pinged().notified == Notified()
        life.do("os.write(4, b'\\n')")
        life.until(lambda said: said.readies)


def test_both_ways_at_once(directory: Path) -> None:
    with puppet(directory, 3) as life:
        life.do("send(b'READY=1')", "os.write(3, b'\\n')")
        assert life.until(lambda said: said.readies == 2).flags == Flag.READY


def test_a_flood_of_garbage_on_the_ready_pipe() -> None:
    with puppet(None, 4) as life:
        life.do("os.fork() or [os.write(4, bytes(65536)) for _ in iter(int, 1)]")
        for _ in range(20):
            assert life.pinged().notified == Notified()
        life.process.signal(signal.SIGTERM)
        assert life.hear(wire.Exited).exit[:2] == (os.CLD_KILLED, signal.SIGTERM)
        life.hear(wire.Empty)


# --- what the program and others see ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [3, 4, 5, 6, 8, 10, 11, 12, 13, 14, 15, 16, 17, 63, 255])
def test_the_program_has_the_pipe_where_it_wants_it_and_nothing_else(number: int, directory: Path) -> None:
    for where in (directory, None):
        with puppet(where, number) as life:
            life.do("1")
            found = descriptors_of(life.host_pid)
            assert sorted(found) == [0, 1, 2, number]
            assert found[number].startswith("pipe:")
            assert found[number] not in (found[0], found[1], found[2])
            life.do(f"assert os.get_inheritable({number}) and os.get_blocking({number})", f"os.write({number}, b'\\n')")
            life.until(lambda said: said.readies)


def test_the_program_has_no_descriptor_of_the_socket(directory: Path) -> None:
    with puppet(directory) as life:
        life.do("1")
        assert sorted(descriptors_of(life.host_pid)) == [0, 1, 2]


def mounts_of(host_pid: int | str) -> list[str]:
    return Path(f"/proc/{host_pid}/mountinfo").read_text().splitlines()


def test_the_socket_is_all_that_is_there_and_only_inside(directory: Path) -> None:
    before = mounts_of("self")
    with puppet(directory) as life:
        (found,) = [line for line in mounts_of(life.host_pid) if f" {directory} " in line]
        assert {"nosuid", "nodev", "noexec"} <= set(found.split()[5].split(","))
        assert re.search(r" - tmpfs \S+ rw,size=4k,nr_inodes=2,mode=755", found)
        inside = Path(f"/proc/{life.host_pid}/root{directory}")
        assert os.listdir(inside) == ["notify"]
        assert (inside / "notify").stat().st_mode & 0o7777 == 0o666
        life.do(f"assert errno_of(open, os.environ['NOTIFY_SOCKET'] + '2', 'w') == {errno.ENOSPC}")
        assert os.listdir(directory) == ["control"]
        assert mounts_of("self") == before
    assert mounts_of("self") == before
    assert os.listdir(directory) == ["control"]


def test_the_supervisor_may_remove_the_directory(directory: Path) -> None:
    """A mount that only others see does not keep it."""
    with puppet(directory) as life:
        (directory / "control").unlink()
        directory.rmdir()
        directory.mkdir()
        life.pinged()


def anonymous_kb(host_pid: int) -> int:
    found = re.search(r"Anonymous: +(\d+) kB", Path(f"/proc/{host_pid}/smaps_rollup").read_text())
    assert found
    return int(found[1])


def test_who_does_not_ask_pays_nothing() -> None:
    """Neither memory nor a descriptor, a mount or a longer message."""
    with ByHand("mount", "uts", "ipc") as init:
        init.say_record(plan_of("/bin/sleep", "1000"))
        init.say_go()
        init.hear(wire.Started)
        init.say(wire.ping(1))
        wait_readable(init.socket.fileno())
        assert len(init.socket.recv(4096)) == 8 + 72
        kinds = [target.partition(":")[0] for _, target in sorted(descriptors_of(init.host_pid).items())]
        assert kinds == ["/dev/null"] * 3 + ["socket", "anon_inode", "pipe", "anon_inode"]
        # Its own propagation apart, it has the mounts that we have, and /proc.
        assert len(mounts_of(init.host_pid)) == len(mounts_of("self")) + 1
        assert anonymous_kb(init.host_pid) <= 32
    with ByHand("mount", "uts", "ipc") as init:
        init.say_record(plan_of("/bin/sleep", "1000")._replace(notify=Notify()))
        init.say_go()
        init.hear(wire.Started)
        init.say(wire.ping(1))
        wait_readable(init.socket.fileno())
        assert len(init.socket.recv(4096)) == 8 + 72


def test_what_init_keeps_open_for_it(directory: Path) -> None:
    """Socket, pipe, and the epoll that tells when the line was read; all out of the way of descriptors that come."""
    with puppet(directory, 4, die=True) as life:
        found = descriptors_of(life.process.init_host_pid)
        kinds = sorted(target.rstrip("0123456789[]") for fd, target in found.items() if fd >= wire.Fd.COUNT)
        assert kinds == ["anon_inode:[eventpoll", "anon_inode:[signalfd", "pipe:", "socket:"]


def test_a_supervisor_that_keeps_again_does_not_take_its_place(directory: Path) -> None:
    """Under `die` init has given up its far end, whose number a new descriptor must not get."""
    with puppet(directory, 4, die=True) as life:
        life.process._socket.sendmsg(
            [wire.policy_change(1, wire.Policy.KEEP)],
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", life.process.line))],
        )
        assert life.pinged().policy == wire.Policy.KEEP
        life.do("send(b'READY=1')", "os.write(4, b'\\n')")
        life.until(lambda said: said.readies == 2)


# --- where it cannot be ----------------------------------------------------------------------------------------------


def failed(plan: Plan, canary: Path) -> tuple[Step, int]:
    command = shell(': > "$0"', str(canary))
    outcome = run(plan._replace(argv=tuple(map(os.fsencode, command)), candidates=(b"/bin/sh",)))
    assert not canary.exists()
    assert outcome.only(wire.Empty)
    return outcome.failed


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


PLAN = plan_of("/bin/sh")


def test_without_init_it_is_refused(directory: Path, canary: Path) -> None:
    """Who would read it? The record says no before anything is done."""
    for notify in (Notify(os.fsencode(directory)), Notify(ready_fd=3)):
        assert failed(PLAN._replace(init=False, notify=notify), canary) == (Step.RECORD, errno.EINVAL)


def test_without_a_mount_namespace_there_is_no_socket(directory: Path, canary: Path) -> None:
    before = mounts_of("self")
    wanted = plan_of("/bin/sh", namespaces={"pid"})._replace(notify=Notify(os.fsencode(directory)))
    assert failed(wanted, canary) == (Step.NOTIFY, errno.EPERM)
    assert mounts_of("self") == before
    assert os.listdir(directory) == ["control"]


def test_without_a_mount_namespace_there_is_a_pipe() -> None:
    wanted = plan_of(*shell("echo >&7"), namespaces={"pid"})
    outcome = run(wanted._replace(notify=Notify(ready_fd=7)))
    assert outcome.only(wire.Notify).notified.flags & Flag.READY


@pytest.mark.parametrize(
    ("where", "number"),
    [
        ("/", errno.ESTALE),
        ("relative", errno.EINVAL),
        ("{}/not/there", errno.ENOENT),
        ("{}/control", errno.EINVAL),
        ("/" + "x" * 101, errno.ENAMETOOLONG),
        ("", errno.EINVAL),
    ],
)
def test_a_directory_that_cannot_be_it(where: str, number: int, directory: Path, canary: Path) -> None:
    """Nothing of it is left anywhere on the host: the socket is bound before it is shown."""
    notify = Notify(os.fsencode(where.format(directory)))
    assert failed(PLAN._replace(notify=notify), canary) == (Step.NOTIFY, number)
    assert not Path("/notify").exists()
    assert not Path("notify").exists()
    assert os.listdir(directory) == ["control"]


def test_the_longest_directory(directory: Path) -> None:
    long = directory / ("x" * (100 - len(str(directory)) - 1))
    long.mkdir()
    with puppet(long) as life:
        life.do("send(b'READY=1')")
        life.until(lambda said: said.readies)


def test_a_directory_by_another_name(directory: Path) -> None:
    (directory / "run").mkdir()
    (directory / "link").symlink_to("run")
    with puppet(directory / "link") as life:
        life.do("send(b'READY=1')")
        life.until(lambda said: said.readies)
    assert os.listdir(directory / "run") == []


def test_a_number_that_the_program_may_not_have(canary: Path) -> None:
    wanted = PLAN._replace(notify=Notify(ready_fd=9), rlimits=((7, 9, 9),))
    assert failed(wanted, canary) == (Step.DESCRIPTORS, errno.EBADF)


@pytest.mark.parametrize(
    ("data", "number"),
    [
        (b"", errno.EBADMSG),
        (struct.pack("<II", 1, 0)[:7], errno.EBADMSG),
        (struct.pack("<II", 1, 0), errno.EBADMSG),
        (struct.pack("<II", 1, 0) + b"/run", errno.EBADMSG),
        (struct.pack("<II", 2, 2) + b"\0", errno.EBADMSG),
        (struct.pack("<II", 2, 2**31) + b"\0", errno.EBADMSG),
        (struct.pack("<II", 4, 0) + b"\0", errno.EOPNOTSUPP),
    ],
)
def test_a_broken_wish(data: bytes, number: int, canary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "_notify", lambda notify: data)
    monkeypatch.setattr(record, "_how", record._how.__wrapped__)  # what was encoded before is not what is meant
    assert failed(PLAN._replace(notify=Notify()), canary) == (Step.RECORD, number)


# --- the supervisor --------------------------------------------------------------------------------------------------


async def test_the_supervisor_knows_what_was_said_last(directory: Path) -> None:
    """And its plan is what puts NOTIFY_SOCKET into the environment."""
    code = SENDER + "send(b'READY=1\\nSTATUS=hello'); os._exit(0)"
    spec = PoolSpec(name="web", command=(*PYTHON, code), type="oneshot", enabled=False, restart=NEVER)
    lives: list[_Life] = []
    async with Supervisor() as supervisor:
        done = asyncio.Event()

        def heard(event: Event) -> None:
            lives.extend(supervisor._lives.values())
            if event.to == State.DONE:
                done.set()

        supervisor.subscribe(heard)
        supervisor.add_pool(spec)
        assert b"NOTIFY_SOCKET" not in b"".join(supervisor._prepared["web"].plan(0, 1).env)
        notify = Notify(os.fsencode(directory))
        supervisor._prepared["web"] = plan.prepare(spec, plan.Account(None, None), {}, True, notify)
        supervisor.feed("web/0", Start())
        async with asyncio.timeout(PATIENCE):
            await done.wait()
    assert timeless(lives[0].notified) == Notified(Flag.READY, taken=1, readies=1, status=b"hello")


def test_the_plan_of_a_pool_that_is_told_how(directory: Path) -> None:
    spec = PoolSpec(name="web", command=("/bin/true",))
    notify = Notify(os.fsencode(directory), 3)
    made = plan.prepare(spec, plan.Account(None, None), {}, True, notify).plan(0, 1)
    assert made.notify == notify
    assert b"NOTIFY_SOCKET=" + os.fsencode(directory) + b"/notify" in made.env
    made = plan.prepare(spec, plan.Account(None, None), {}, True, Notify(ready_fd=3)).plan(0, 1)
    assert not [name for name in made.env if name.startswith(b"NOTIFY_SOCKET")]
