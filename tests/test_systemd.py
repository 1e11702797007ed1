"""The service manager above `nssup up`, played: what it hears, what it keeps, and what it passes on."""

from __future__ import annotations

import configparser
import contextlib
import os
import secrets
import select
import socket
import stat
import struct
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
from live import PATIENCE, Up, needs_namespaces, opened, wait_readable

from nssup import systemd, wire

if TYPE_CHECKING:
    from collections.abc import Iterator

POOL = '[pool.web]\ncommand = ["sleep", "1000"]\nworkers = 2\n'
_UCRED = struct.Struct("3i")


class Told(NamedTuple):
    """One message: its lines, who sent it, and the descriptors with it."""

    lines: dict[str, str]
    host_pid: int
    fds: list[int]


class Manager:
    """As systemd listens: datagrams with the sender's credentials."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.told: list[Told] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)

    def __enter__(self) -> Manager:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        for told in self.told:
            for fd in told.fds:
                os.close(fd)

    def hear(self) -> Told:
        """The next message."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        assert poll.poll(PATIENCE * 1000), f"silence after {self.told[-3:]}"
        space = socket.CMSG_SPACE(_UCRED.size) + socket.CMSG_SPACE(64)
        data, ancillary, _, _ = self._socket.recvmsg(65536, space)
        host_pid, fds = 0, []
        for level, kind, content in ancillary:
            assert level == socket.SOL_SOCKET
            if kind == socket.SCM_CREDENTIALS:
                host_pid = _UCRED.unpack(content)[0]
            elif kind == socket.SCM_RIGHTS:
                fds += [number for (number,) in struct.iter_unpack("i", content)]
        lines = dict(line.split("=", 1) for line in data.decode().splitlines())
        self.told.append(Told(lines, host_pid, fds))
        return self.told[-1]

    def wait(self, name: str, value: str | None = None) -> Told:
        """The next message with this line."""
        while True:
            told = self.hear()
            if name in told.lines and value in (None, told.lines[name]):
                return told

    def wait_status(self, text: str) -> None:
        """Until what it heard last of a status is this."""
        while [told.lines["STATUS"] for told in self.told if "STATUS" in told.lines][-1:] != [text]:
            self.hear()

    def names(self) -> list[str]:
        return [name for told in self.told for name in told.lines if name != "STATUS"]


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    name = f"@nssup-test-{secrets.token_hex(8)}" if request.param == "abstract" else str(tmp_path / "notify")
    with Manager(name) as manager:
        yield manager


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[Manager]:
    with Manager(str(tmp_path / "notify")) as manager:
        yield manager


def monotonic_usec() -> int:
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


# --- what it hears ----------------------------------------------------------------------------------------------------


@needs_namespaces
def test_from_the_start_to_the_end(manager: Manager, tmp_path: Path) -> None:
    with Up(tmp_path, POOL, env={"NOTIFY_SOCKET": manager.address}) as up:
        ready = manager.hear()
        assert (ready.lines["READY"], ready.host_pid, ready.fds) == ("1", up.host_pid, [])
        assert ready.lines["STATUS"].endswith(" of 2 workers running")
        assert up.answers()
        assert {w["desired"] for w in up.status()["workers"]} == {"up"}
        manager.wait_status("2 of 2 workers running")
        before = monotonic_usec()
        assert up.ctl("reexec").code == 0
        reloading = manager.wait("RELOADING", "1")
        assert before < int(reloading.lines["MONOTONIC_USEC"]) < monotonic_usec()
        assert manager.wait("READY", "1").host_pid == up.host_pid
        assert up.end() == 0
        stopping = manager.wait("STOPPING", "1")
        assert int(stopping.lines["EXTEND_TIMEOUT_USEC"]) == 20_000_000  # TERM, 10 s, KILL; and some
        assert stopping.lines["STATUS"] == "stopping its workers"
    said = ["READY", "RELOADING", "MONOTONIC_USEC", "READY", "STOPPING", "EXTEND_TIMEOUT_USEC"]
    assert manager.names() == said  # no watchdog and no store that nobody asked for


@needs_namespaces
def test_the_status_follows(listening: Manager, tmp_path: Path) -> None:
    pool = '[pool.job]\ncommand = ["false"]\ntype = "oneshot"\n'
    with Up(tmp_path, POOL + pool, env={"NOTIFY_SOCKET": listening.address}) as up:
        listening.wait_status("2 of 3 workers running, 1 failed")
        assert up.ctl("stop", "web/0").code == 0
        listening.wait_status("1 of 3 workers running, 1 failed")
        assert up.ctl("shutdown", "--leave-running").code == 0
        assert listening.wait("STOPPING").lines["STATUS"] == "leaving its workers running"
        assert up.wait_end() == 0


@needs_namespaces
def test_the_watchdog_is_fed_when_it_asks(listening: Manager, tmp_path: Path) -> None:
    env = {"NOTIFY_SOCKET": listening.address, "WATCHDOG_USEC": "40000"}
    prefix = ("sh", "-c", 'WATCHDOG_PID=$$ exec "$@"', "sh")
    with Up(tmp_path, POOL, env=env, prefix=prefix) as up:
        for _ in range(3):
            assert listening.wait("WATCHDOG", "1").host_pid == up.host_pid
        assert up.ctl("reexec", "--no-wait").code == 0
        listening.wait("READY")
        listening.wait("WATCHDOG", "1")


@needs_namespaces
def test_a_watchdog_for_somebody_else_is_not_fed(listening: Manager, tmp_path: Path) -> None:
    env = {"NOTIFY_SOCKET": listening.address, "WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}
    with Up(tmp_path, POOL, env=env) as up:
        listening.wait_status("2 of 2 workers running")
        assert up.end() == 0
        listening.wait("STOPPING")
    assert "WATCHDOG" not in listening.names()


@needs_namespaces
@pytest.mark.parametrize("what", ["gone", "deaf", "of another kind"])
def test_a_manager_that_does_not_listen(tmp_path: Path, what: str) -> None:
    with contextlib.ExitStack() as there:
        address = "vsock:2:1234" if what == "of another kind" else str(tmp_path / "notify")
        if what == "deaf":  # its queue is full before we come
            there.enter_context(Manager(address))
            filler = there.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK))
            with contextlib.suppress(BlockingIOError):
                while True:
                    filler.sendto(b"X=1", address)
        with Up(tmp_path, POOL, env={"NOTIFY_SOCKET": address}) as up:
            up.wait_running("web/0", "web/1")


@needs_namespaces
def test_no_worker_inherits_what_it_told_us(listening: Manager, tmp_path: Path) -> None:
    env = {
        "NOTIFY_SOCKET": listening.address,
        "WATCHDOG_USEC": "60000000",
        "FDSTORE": "4",
        "LISTEN_FDS": "1",
        "LISTEN_PID": "1",
        "LISTEN_FDNAMES": "x",
        "PASSED_ON": "yes",
    }
    pool = """command = ["sh", "-c", "env; echo end; exec sleep 1000"]\nenv_inherit = ["*"]\n"""
    with Up(tmp_path, f"[pool.web]\n{pool}", env=env) as up:
        for generation in (1, 2):
            up.wait_record("web", lambda r, g=generation: (r["msg"], r["generation"]) == ("end", g))  # type: ignore[misc]
            if generation == 1:
                assert up.ctl("reexec").code == 0
                assert up.ctl("restart", "web").code == 0
        assert up.end() == 0  # then all is in the file
    names = [record["msg"].partition("=")[0] for record in up.records("web")]
    assert names.count("PASSED_ON") == 2
    assert not {*systemd.VARIABLES, "NSSUP_INHERITANCE"}.intersection(names)


# --- what it keeps ----------------------------------------------------------------------------------------------------

# Passes descriptors as systemd does: from 3 on, and said to be for whoever this process becomes.
GIVE = """
import os, sys
fds, names, words = sys.argv[1].split(","), sys.argv[2], sys.argv[3:]
for number, fd in enumerate(fds, 100):
    os.dup2(int(fd), number)
for number in range(len(fds)):
    os.dup2(100 + number, 3 + number)
    os.close(100 + number)
os.closerange(3 + len(fds), 100)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(fds)), LISTEN_FDNAMES=names)
os.execvp(words[0], words)
"""


def given(fds: list[int], names: str) -> tuple[str, ...]:
    return (sys.executable, "-c", GIVE, ",".join(map(str, fds)), names)


def stored(manager: Manager) -> int:
    told = manager.wait("FDSTORE", "1")
    assert told.lines["FDNAME"] == "nssup-control"
    (fd,) = told.fds
    return fd


@needs_namespaces
def test_the_control_socket_is_kept_over_a_kill(listening: Manager, tmp_path: Path) -> None:
    """Who asks while nobody is there is answered by the next supervisor."""
    env = {"NOTIFY_SOCKET": listening.address, "FDSTORE": "16"}
    keep = POOL + 'on_supervisor_death = "keep"\n'
    answers: list[int] = []
    with Up(tmp_path, keep, env=env) as up:
        up.leaves = True
        up.wait_running("web/0", "web/1")
        kept = stored(listening)
        up.process.kill()
        up.wait_end()

        def ask() -> None:
            answers.append(up.api("GET", "/healthz")[1]["supervisor"]["epoch"])

        asking = threading.Thread(target=ask)
        asking.start()
        null = os.open("/dev/null", os.O_RDONLY)
        try:
            prefix = given([null, kept], "something:nssup-control")
            with Up(tmp_path, keep, env=env, prefix=prefix, pass_fds=[null, kept]) as after:
                asking.join(PATIENCE)
                assert answers == [2]
                listening.wait("READY")
                assert after.ctl("reexec").code == 0
                links = [os.readlink(fd) for fd in Path(f"/proc/{after.host_pid}/fd").iterdir()]
                own = 3 + 1 + wire.Fd.COUNT  # its own three, the launcher's and its window: what has no use is closed
                assert links.count("/dev/null") == own
                assert after.end() == 0
                listening.wait("STOPPING")
                assert listening.wait("FDSTOREREMOVE", "1").lines["FDNAME"] == "nssup-control"
        finally:
            os.close(null)
    assert listening.names().count("FDSTORE") == 1
    assert not up.socket.exists()


@needs_namespaces
@pytest.mark.parametrize("what", ["elsewhere", "without its file", "no socket", "not listening"])
def test_a_socket_that_is_of_no_use_is_replaced(listening: Manager, tmp_path: Path, what: str) -> None:
    with contextlib.ExitStack() as there:
        path = tmp_path / "s" / "run" / "nssup.sock"
        path.parent.mkdir(parents=True, mode=0o700)
        path.parent.parent.chmod(0o700)
        kept = there.enter_context(socket.socket(socket.AF_UNIX))
        if what == "elsewhere":
            kept.bind(str(tmp_path / "other.sock"))
        elif what != "no socket":
            kept.bind(str(path))
        if what == "without its file":
            path.unlink()
        fd = there.enter_context(open("/dev/null")).fileno() if what == "no socket" else kept.fileno()
        if what != "not listening" and what != "no socket":
            kept.listen()
        env = {"NOTIFY_SOCKET": listening.address, "FDSTORE": "16"}
        with Up(tmp_path, POOL, env=env, prefix=given([fd], "nssup-control"), pass_fds=[fd]) as up:
            assert listening.wait("FDSTOREREMOVE").lines["FDNAME"] == "nssup-control"
            assert stat.S_ISSOCK(os.fstat(stored(listening)).st_mode)
            assert up.ctl("ping").code == 0


SERVED = """
[socket.http]
listen = "tcp://127.0.0.1:0"
[pool.web]
command = ["sleep", "1000"]
sockets = ["http"]
"""


def bound(up: Up) -> list[str]:
    return [each["address"] for each in up.api("GET", "/v1/pools/web")[1]["sockets"]]


@needs_namespaces
def test_a_socket_that_it_made_is_used(listening: Manager, tmp_path: Path) -> None:
    """By its name, wherever it listens; it is not put into its store, and its file is not ours to remove."""
    path = tmp_path / "http"
    with socket.socket(socket.AF_UNIX) as made, socket.create_server(("127.0.0.1", 0)) as other:
        made.bind(str(path))
        made.listen()
        fds = [other.fileno(), made.fileno()]
        env = {"NOTIFY_SOCKET": listening.address, "FDSTORE": "16"}
        with Up(tmp_path, SERVED, env=env, prefix=given(fds, "nobody:http"), pass_fds=fds) as up:
            assert bound(up) == [f"unix://{path}"]
            (worker,) = up.wait_running("web/0")
            inode = os.fstat(made.fileno()).st_ino
            assert os.readlink(f"/proc/{worker['host_pid']}/fd/3") == f"socket:[{inode}]"
            links = [os.readlink(fd) for fd in Path(f"/proc/{up.host_pid}/fd").iterdir()]
            assert f"socket:[{os.fstat(other.fileno()).st_ino}]" not in links  # nobody wants it
            assert up.ctl("reexec").code == 0
            assert bound(up) == [f"unix://{path}"]
            assert up.end() == 0
        listening.wait("STOPPING")
        assert path.exists()
    assert [told.lines["FDNAME"] for told in listening.told if "FDSTORE" in told.lines] == ["nssup-control"]


@needs_namespaces
def test_workers_sockets_are_kept_over_a_kill_of_everybody(listening: Manager, tmp_path: Path) -> None:
    """Nobody has it but the service manager; who connects waits."""
    env = {"NOTIFY_SOCKET": listening.address, "FDSTORE": "16"}
    with Up(tmp_path, SERVED, env=env) as up:
        up.leaves = True
        (address,) = bound(up)
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        (init,) = [worker["init_host_pid"] for worker in up.wait_running("web/0")]
        control = stored(listening)
        told = listening.wait("FDSTORE", "1")
        assert told.lines["FDNAME"] == "nssup-socket.http"
        fds = [control, *told.fds]
        with opened(init) as pidfd:
            up.process.kill()
            up.wait_end()
            wait_readable(pidfd, "its workers die with it")
        with socket.create_connection((host, int(port)), PATIENCE):
            names = "nssup-control:nssup-socket.http"
            with Up(tmp_path, SERVED, env=env, prefix=given(fds, names), pass_fds=fds) as after:
                assert bound(after) == [address]
                assert after.end() == 0
                while listening.wait("FDSTOREREMOVE", "1").lines["FDNAME"] != "nssup-socket.http":
                    pass


# --- the words --------------------------------------------------------------------------------------------------------


def test_nobody_is_there() -> None:
    manager, given = systemd.take({}, 1)
    assert (manager.listens, manager.keeps_fds, manager.watchdog_seconds, given) == (False, False, None, [])
    manager.tell("READY=1")
    manager.keep("x", 0)
    manager.close()


@pytest.mark.parametrize(
    ("variables", "seconds"),
    [
        ({"WATCHDOG_USEC": "3000000"}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "77"}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "78"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "-1"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_how_often_it_wants_to_hear_of_us(variables: dict[str, str], seconds: float | None) -> None:
    assert systemd.take(variables, 77)[0].watchdog_seconds == seconds


@pytest.mark.parametrize(
    "variables",
    [
        {"LISTEN_FDS": "1"},
        {"LISTEN_FDS": "1", "LISTEN_PID": "78"},
        {"LISTEN_FDS": "x", "LISTEN_PID": "77"},
        {"LISTEN_FDS": "0", "LISTEN_PID": "77"},
    ],
)
def test_descriptors_that_are_not_for_us(variables: dict[str, str]) -> None:
    environ = {**variables, "OTHER": "1"}
    assert systemd.take(environ, 77)[1] == []
    assert environ == {"OTHER": "1"}


def test_what_it_told_is_there_for_whoever_comes_next() -> None:
    environ = {"NOTIFY_SOCKET": "/x", "FDSTORE": "3", "WATCHDOG_USEC": "5", "LISTEN_FDS": "0", "LISTEN_PID": "1"}
    manager, _ = systemd.take(environ, 1)
    assert manager.environment == {"NOTIFY_SOCKET": "/x", "FDSTORE": "3", "WATCHDOG_USEC": "5"}
    assert (manager.keeps_fds, environ) == (True, {})


# --- the unit ---------------------------------------------------------------------------------------------------------


def test_the_unit() -> None:
    """What custody rests on."""
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(Path(__file__).parent.parent / "config" / "nssup.service")
    service = unit["Service"]
    assert {
        name: service[name] for name in ("Type", "NotifyAccess", "KillMode", "Restart", "Delegate", "OOMPolicy")
    } == {
        "Type": "notify",
        "NotifyAccess": "main",
        "KillMode": "process",
        "Restart": "always",
        "Delegate": "yes",
        "OOMPolicy": "continue",
    }
    assert service["RuntimeDirectoryPreserve"] == "yes"
    assert service["RestartPreventExitStatus"] == "78"
    assert int(service["FileDescriptorStoreMax"]) > 0
    assert "WatchdogSec" in service
