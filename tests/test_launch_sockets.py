"""Listening sockets on their way into a life: what the program has, what init keeps, what is refused."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
from typing import TYPE_CHECKING

import pytest
from launching import ISOLATED, TOKEN, ByHand, Driver, launched, needs_namespaces, plan_of, read_all

from nssup import wire
from nssup.record import Notify, encode
from nssup.wire import Step

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nssup.record import Plan

pytestmark = needs_namespaces

# What each descriptor from 3 on is, but for the one that lists them; and who asks.
LOOK = """
import os, stat
print(os.getpid())
for name in sorted(os.listdir("/proc/self/fd"), key=int):
    try:
        found = os.fstat(int(name))
    except OSError:
        continue
    kind = "socket" if stat.S_ISSOCK(found.st_mode) else "pipe" if stat.S_ISFIFO(found.st_mode) else "other"
    if int(name) > 2:
        print(name, kind, found.st_ino, int(os.get_inheritable(int(name))))
"""
ANSWER = """
import socket, sys
with socket.socket(fileno=3) as listener:
    connection, _ = listener.accept()
    connection.sendall(b"from inside")
    connection.close()
"""


@pytest.fixture
def listening() -> Iterator[list[socket.socket]]:
    """Three sockets."""
    with contextlib.ExitStack() as closes:
        yield [closes.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]


def python(script: str, *, init: bool = True, **changes: object) -> Plan:
    plan = plan_of(sys.executable, "-I", "-c", script, init=init)
    return plan._replace(**changes)  # type: ignore[arg-type]


def said_by(life: Driver) -> str:
    assert life.process.stdout is not None
    assert life.process.stderr is not None
    text = read_all(life.process.stdout).decode()
    assert read_all(life.process.stderr) == b""
    return text


def numbers(sockets: list[socket.socket]) -> list[int]:
    return [each.fileno() for each in sockets]


def inodes(sockets: list[socket.socket]) -> list[int]:
    return [os.fstat(each.fileno()).st_ino for each in sockets]


@pytest.mark.parametrize("init", [True, False])
def test_the_program_has_them_from_3_on_in_order_and_nothing_else(init: bool, listening: list[socket.socket]) -> None:
    with launched(python(LOOK, init=init, sockets=3), sockets=numbers(listening)) as life:
        pid, *found = said_by(life).splitlines()
    assert pid == ("2" if init else "1")
    assert found == [f"{3 + i} socket {inode} 1" for i, inode in enumerate(inodes(listening))]


@pytest.mark.parametrize("count", [1, wire.SOCKETS_MAX])
@pytest.mark.parametrize("init", [True, False])
def test_as_many_as_there_may_be(init: bool, count: int, listening: list[socket.socket]) -> None:
    with launched(python(LOOK, init=init, sockets=count), sockets=numbers(listening[:1]) * count) as life:
        _, *found = said_by(life).splitlines()
    assert found == [f"{3 + i} socket {inodes(listening)[0]} 1" for i in range(count)]


def test_init_keeps_them_while_the_program_lives(listening: list[socket.socket]) -> None:
    with launched(plan_of("/bin/sleep", "1000")._replace(sockets=2), sockets=numbers(listening[:2])) as life:
        life.hear(wire.Started)
        kept = life.process.sockets()
        try:
            assert [os.fstat(fd).st_ino for fd in kept] == inodes(listening[:2])
            assert not any(map(os.get_inheritable, kept))
        finally:
            for fd in kept:
                os.close(fd)


def test_a_queue_outlasts_everybody_but_init(listening: list[socket.socket]) -> None:
    """Nobody accepts, and whoever bound it has closed it: who connects waits all the same."""
    with launched(plan_of("/bin/sleep", "1000")._replace(sockets=1), sockets=numbers(listening[:1])) as life:
        life.hear(wire.Started)
        address = listening[0].getsockname()
        listening[0].close()
        with socket.create_connection(address, 20):
            pass
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, 20)


@pytest.mark.parametrize("init", [True, False])
def test_a_network_of_its_own_does_not_matter(init: bool, listening: list[socket.socket]) -> None:
    plan = python(ANSWER, init=init, sockets=1, namespaces=ISOLATED | {"net"})
    with launched(plan, sockets=numbers(listening[:1])) as life:
        with socket.create_connection(listening[0].getsockname(), 20) as connection:
            assert connection.recv(100) == b"from inside"
        life.end()


@pytest.mark.parametrize(("sockets", "ready_fd"), [(0, 3), (2, 5), (2, 20), (2, 60)])
def test_a_ready_pipe_comes_behind_them(sockets: int, ready_fd: int, listening: list[socket.socket]) -> None:
    plan = python(LOOK, sockets=sockets, notify=Notify(ready_fd=ready_fd))
    with launched(plan, sockets=numbers(listening[:sockets])) as life:
        _, *found = said_by(life).splitlines()
    wanted = [f"{3 + i} socket {inode} 1" for i, inode in enumerate(inodes(listening[:sockets]))]
    assert found[:-1] == wanted
    assert found[-1].startswith(f"{ready_fd} pipe ")


@pytest.mark.parametrize("ready_fd", [3, 4])
def test_a_ready_pipe_in_their_place_is_refused(ready_fd: int, listening: list[socket.socket]) -> None:
    plan = python(LOOK, sockets=2, notify=Notify(ready_fd=ready_fd))
    with launched(plan, sockets=numbers(listening[:2])) as life:
        failed = life.hear(wire.Failed)
    assert (failed.step, failed.errno) == (Step.RECORD, errno.EINVAL)


@pytest.mark.parametrize("promised", [0, 1, 3])
def test_more_or_fewer_than_promised_are_refused(promised: int, listening: list[socket.socket]) -> None:
    with launched(python(LOOK, sockets=promised), sockets=numbers(listening[:2])) as life:
        failed = life.hear(wire.Failed)
    assert (failed.step, failed.errno) == (Step.RECORD, errno.EBADF)


@pytest.mark.parametrize("init", [True, False])
def test_a_failed_exec_is_told_although_the_number_of_the_line_is_theirs(
    init: bool, listening: list[socket.socket]
) -> None:
    plan = plan_of("/no/such/program", init=init)._replace(sockets=3)
    with launched(plan, sockets=numbers(listening)) as life:
        failed = life.hear(wire.Failed)
    assert (failed.step, failed.errno) == (Step.EXEC, errno.ENOENT)


def test_without_init_the_line_ends_at_exec(listening: list[socket.socket]) -> None:
    plan = plan_of("/bin/sleep", "1000", init=False)._replace(sockets=1)
    with launched(plan, sockets=numbers(listening[:1])) as life:
        life.hear(wire.Started)
        while not life.process.line_ended:
            assert life.process.receive() == []


def test_another_pid_than_promised_is_refused(listening: list[socket.socket]) -> None:
    """What its LISTEN_PID says would be wrong, and it would not listen."""
    plan = plan_of("/bin/true", proc=False, namespaces={"pid"})._replace(sockets=1)
    encoded = encode(plan, TOKEN, 0)
    said = (1).to_bytes(4, "little") + (2).to_bytes(4, "little")
    assert encoded.endswith(said)
    with ByHand() as life:
        life.say(wire.socket(), fds=numbers(listening[:1]))
        life.say(wire.record_inline(encoded[:-4] + (7).to_bytes(4, "little")))
        life.say_go()
        failed = life.hear(wire.Failed)
    assert (failed.step, failed.errno) == (Step.DESCRIPTORS, errno.ESRCH)


def test_what_comes_after_the_record_is_not_kept(listening: list[socket.socket]) -> None:
    with ByHand() as life:
        life.say(wire.socket())
        life.say_record(plan_of("/bin/sleep", "1000", proc=False, namespaces={"pid"}))
        life.say(wire.socket(), fds=numbers(listening[:1]))
        life.say_go()
        life.hear(wire.Started)
        assert life.state().unknown == 2
        address = listening[0].getsockname()
        listening[0].close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address, 20)
