"""Commands that init runs beside the program: in its namespaces, as its user, and no longer than it lives."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import struct
import termios
from typing import TYPE_CHECKING

import pytest
from launching import (
    ByHand,
    Driver,
    eventually,
    launched,
    needs_namespaces,
    needs_root,
    plan_of,
    read_all,
    shell,
    tree_of,
    wait_readable,
)

from nssup import wire
from nssup.clone import Launcher, Process
from nssup.record import Identity, words
from nssup.wire import Done, Step

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nssup.record import Plan

pytestmark = needs_namespaces

EXITED, KILLED = os.CLD_EXITED, os.CLD_KILLED
SLEEP = plan_of("/bin/sleep", "1000")
NOBODY = Identity(65534, 65534, (65534,))


class Beside(Driver):
    """A life whose program runs, and what its commands say."""

    def __init__(self, process: Process) -> None:
        super().__init__(process)
        self.hear(wire.Started)

    def spawn(self, number: int, script: str, stdio: tuple[int, ...] = (), timeout: float = 0.0) -> None:
        words_ = tuple(map(os.fsencode, shell(script)))
        assert self.process.spawn(number, words_, (b"/no/such/sh", b"/bin/sh"), stdio, timeout=timeout)

    def done(self, number: int) -> Done:
        while True:
            for message in self.heard:
                if isinstance(message, Done) and message.number == number:
                    return message
            self.listen()

    def listen(self) -> None:
        wait_readable(self.process.line)
        self.heard += self.process.receive()

    def output(self, script: str) -> str:
        """What a command writes, up to its end."""
        with pipe() as (read, write):
            self.spawn(1000, script, (write, write, write))
            os.close(write)
            return read_all(read).decode()


@contextlib.contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    read, write = os.pipe()
    try:
        yield read, write
    finally:
        os.close(read)
        with contextlib.suppress(OSError):
            os.close(write)


@contextlib.contextmanager
def beside(plan: Plan = SLEEP) -> Iterator[Beside]:
    with launched(plan) as life:
        yield Beside(life.process)


def test_how_it_ended() -> None:
    with beside() as life:
        life.spawn(1, "exit 7")
        life.spawn(2, "kill -SEGV $$")
        life.spawn(3, "true")
        assert life.done(1).exit[:2] == (EXITED, 7)
        assert life.done(2).exit.status == signal.SIGSEGV
        done = life.done(3)
        assert (done.exit[:2], done.step, done.errno, done.timed_out, done.epoch) == ((EXITED, 0), 0, 0, 0, 1)
        assert done.exit.boottime_ns > 0
        assert not [message for message in life.heard if isinstance(message, wire.Exited)]


def test_it_has_the_stdio_that_it_is_given() -> None:
    with beside() as life, pipe() as (out, out_end), pipe() as (err, err_end), pipe() as (its, strings):
        os.write(strings, b"in\n")
        life.spawn(1, "read x; echo $x; echo err >&2; ls /proc/self/fd", (its, out_end, err_end))
        os.close(out_end)
        os.close(err_end)
        assert read_all(out).split() == [b"in", b"0", b"1", b"2", b"3"]
        assert read_all(err) == b"err\n"
        assert life.done(1).exit[:2] == (EXITED, 0)


def test_without_any_it_has_none() -> None:
    with beside() as life:
        life.spawn(
            1, "for n in 0 1 2; do [ $(readlink /proc/$$/fd/$n) = /dev/null ] || exit 1; done; [ ! -e /proc/$$/fd/3 ]"
        )
        assert life.done(1).exit[:2] == (EXITED, 0)


@needs_root
def test_it_is_as_the_program_is() -> None:
    plan = SLEEP._replace(
        env=(b"A=b", b"PATH=/usr/bin:/bin"),
        directory=b"/usr",
        umask=0o027,
        rlimits=((7, 77, 77),),
        identity=NOBODY,
        hostname=b"beside",
    )
    with beside(plan) as life:
        said = life.output("echo $A; pwd; umask; ulimit -n; id -u; id -g; hostname; tr '\\0' ' ' </proc/2/cmdline")
        assert said.split("\n") == ["b", "/usr", "0027", "77", "65534", "65534", "beside", "/bin/sleep 1000 "]
        status = life.output("grep -E 'Sig(Blk|Ign)|NSpid|NSsid' /proc/self/status").split("\n")
        assert [line.split()[1].strip("0") for line in status if line.startswith("Sig")] == ["", ""]


def test_what_cannot_be_run() -> None:
    with beside() as life:
        assert life.process.spawn(1, (b"x",), (b"/no/such/program",), ())
        assert (life.done(1).step, life.done(1).errno) == (Step.EXEC, errno.ENOENT)
        assert life.process.spawn(2, (b"x",), (b"/etc/passwd",), ())
        assert (life.done(2).step, life.done(2).errno) == (Step.EXEC, errno.EACCES)
        life.spawn(3, "true")
        assert life.done(3).exit[:2] == (EXITED, 0)


def test_too_long_for_the_line() -> None:
    with beside() as life:
        assert not life.process.spawn(1, (b"x" * 40_000,), (b"/bin/true",), ())
        assert life.process.spawn(2, (b"x" * 20_000,), (b"/bin/true",), ())
        assert life.done(2).exit[:2] == (EXITED, 0)


def test_a_time_limit_holds_for_its_whole_group() -> None:
    with beside() as life, pipe() as (read, write):
        life.spawn(1, "sleep 1000 & sleep 1000", (write,), timeout=0.05)
        life.spawn(2, "sleep 0.2", timeout=600.0)
        os.close(write)
        done = life.done(1)
        assert (done.exit[:2], done.timed_out) == ((KILLED, signal.SIGKILL), 1)
        assert read_all(read) == b"", "nobody holds it any more"
        assert (life.done(2).exit[:2], life.done(2).timed_out) == ((EXITED, 0), 0)


def test_it_can_be_cancelled() -> None:
    with beside() as life:
        life.spawn(1, "sleep 1000")
        life.spawn(2, "sleep 1000")
        life.process.cancel(3)
        life.process.cancel(2)
        assert life.done(2).exit[:2] == (KILLED, signal.SIGKILL)
        assert life.done(2).timed_out == 0
        assert not [message for message in life.heard if isinstance(message, Done) and message.number == 1]


def test_only_so_many_at_a_time() -> None:
    with beside() as life:
        for number in range(16):
            life.spawn(number, "sleep 1000")
        life.spawn(16, "true")
        assert (life.done(16).errno, life.done(16).exit.code) == (errno.EAGAIN, 0)
        life.process.cancel(5)
        life.done(5)
        life.spawn(17, "exit 3")
        assert life.done(17).exit[:2] == (EXITED, 3)


def test_it_ends_with_the_program() -> None:
    """And holds up nothing: the life is over when the program is."""
    with beside() as life:
        for number in range(4):
            life.spawn(number, "trap '' TERM; sleep 1000 & wait")
        life.process.signal(signal.SIGTERM)
        assert life.hear(wire.Exited).exit[:2] == (KILLED, signal.SIGTERM)
        life.hear(wire.Empty)
        life.end()
        assert not [message for message in life.heard if isinstance(message, Done)]


def test_after_the_program_nothing_is_run() -> None:
    with launched(plan_of("/bin/true", die=False)) as life:
        life.hear(wire.Empty)
        assert life.process.spawn(1, (b"true",), (b"/bin/true",), ())
        assert life.hear(Done).errno == errno.ESRCH
        life.process.acknowledge()
        life.end()


def test_orphans_of_a_command_are_the_namespaces() -> None:
    with beside() as life:
        life.spawn(1, "setsid sleep 1000 & exit 0")
        assert life.done(1).exit[:2] == (EXITED, 0)
        eventually(lambda: len(tree_of(life.process.init_host_pid)) == 2)
        life.process.signal(signal.SIGKILL)
        life.hear(wire.Empty)


def test_its_stop_step_is_remembered() -> None:
    with beside() as life:
        words_ = (b"true",)
        assert life.process.spawn(1, words_, (b"/bin/true",), (), stop_steps=2)
        life.done(1)
        life.process.ping()
        assert life.hear(wire.State).step == 2


def test_results_wait_for_room_on_the_line() -> None:
    """What the line has no room for is told when it has, and nothing else is lost by it."""
    with beside() as life:
        for number in range(16):
            life.spawn(number, "read x < /dev/null")
        for _ in range(400):
            life.process.ping()
        for number in range(16):
            assert life.done(number).exit.code == EXITED
        life.process.ping()
        life.hear(wire.State)


def test_a_new_supervisor_has_numbers_of_its_own() -> None:
    """Commands of the one before go on; their results say whose they were."""
    keep = SLEEP._replace(die=False)
    with contextlib.closing(Launcher(epoch=2)) as new, beside(keep) as life, pipe() as (read, write):
        life.spawn(1, "read x; exit 5", (read,))
        life.process.close_line()
        adopted = Process.adopt(os.dup(life.process.pidfd), life.process.init_host_pid, 1, epoch=2)
        try:
            after = Driver(adopted)
            adopted.hello(new.own_pidfd)
            after.hear(wire.State)
            assert adopted.spawn(1, (b"true",), (b"/bin/true",), ())
            done = after.hear(Done)
            assert (done.epoch, done.number, done.exit[:2]) == (2, 1, (EXITED, 0))
            after.heard.clear()
            adopted.cancel(1)  # the old one's number: not ours to kill
            os.write(write, b"x\n")
            done = after.hear(Done)
            assert (done.epoch, done.number, done.exit[:2]) == (1, 1, (EXITED, 5))
        finally:
            adopted.close()


GARBAGE = {
    "nothing": b"",
    "an epoch": struct.pack("<I", 1),
    "no lists": struct.pack("<IIIIII", 1, 7, 0, 0, 0, 0),
    "a list longer than all": struct.pack("<IIIIII", 1, 7, 0, 0, 0xFFFFFFF0, 8) + words((b"x",)),
    "a second list longer than all": struct.pack("<IIIIII", 1, 7, 0, 0, 32, 0xFFFFFFF0) + words((b"x",)),
    "no words": struct.pack("<IIIIII", 1, 7, 0, 0, 16, 16) + struct.pack("<IIQ", 0, 0, 0) * 2,
    "offsets to anywhere": struct.pack("<IIIIII", 1, 7, 0, 0, 32, 32)
    + (struct.pack("<IIQQ", 1, 0, 1 << 40, 0) + bytes(8)) * 2,
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_runs_nothing_and_harms_nothing(name: str) -> None:
    with ByHand() as life:
        life.say_record(plan_of("/bin/sleep", "1000", namespaces=("pid",)))
        life.say_go()
        life.hear(wire.Started)
        life.say(wire.message(wire.Type.SPAWN, GARBAGE[name]))
        if len(GARBAGE[name]) > 4:
            assert life.hear(Done)[2:6] == (7, 0, Step.RECORD, errno.EBADMSG)
        assert life.state().phase == wire.Phase.RUNNING


def test_descriptors_that_nobody_asked_for_are_closed() -> None:
    with beside() as life:
        before = sorted(os.listdir(f"/proc/{life.process.init_host_pid}/fd"))
        with pipe() as (read, write):
            for number in range(40):
                life.spawn(number, "true", (write, write, write))
                life.done(number)
            os.close(write)
            assert fcntl.ioctl(read, termios.FIONREAD, b"\0\0\0\0") == b"\0\0\0\0"
            assert read_all(read) == b""
        assert sorted(os.listdir(f"/proc/{life.process.init_host_pid}/fd")) == before
