"""Listening sockets that outlive workers and supervisors: whoever connects is never refused."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import stat
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from live import PATIENCE, Up, Witness, needs_namespaces, needs_root, opened, wait_readable

from nssup import PoolSpec, SpecError, held, sockets
from nssup.address import Address
from nssup.errors import ControlError
from nssup.loop import Supervisor
from nssup.spec import SocketSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

# A server as sd_listen_fds(3) has it: looks whether it is meant, takes what it was given, tells who it is to each who
# connects. SIGTERM ends it between two of them.
SERVER = """
import json, os, selectors, signal, socket
assert os.environ["LISTEN_PID"] == str(os.getpid())
names = os.environ["LISTEN_FDNAMES"].split(":")
assert len(names) == int(os.environ["LISTEN_FDS"])
ends = socket.socketpair()
ends[1].setblocking(False)
signal.set_wakeup_fd(ends[1].fileno())
stopping = []
signal.signal(signal.SIGTERM, lambda *_: stopping.append(1))
listeners = [socket.socket(fileno=3 + number) for number in range(len(names))]
waiting = selectors.DefaultSelector()
for listener in [*listeners, ends[0]]:
    listener.setblocking(False)
    waiting.register(listener, selectors.EVENT_READ)
print("ready", flush=True)
while not stopping:
    for key, _ in waiting.select():
        try:
            connection, _ = key.fileobj.accept() if key.fileobj is not ends[0] else (None, None)
        except BlockingIOError:  # a neighbour was quicker
            continue
        if connection:
            said = {"name": names[listeners.index(key.fileobj)], "worker": os.environ["NSSUP_ID"]}
            connection.sendall(json.dumps({**said, "generation": os.environ["NSSUP_GENERATION"]}).encode())
            connection.close()
"""
TELL = """
import json, os
fds = [name for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")]
told = {name: value for name, value in os.environ.items() if name.startswith("LISTEN_")}
print(json.dumps({"fds": sorted(map(int, fds)), "pid": os.getpid(), **told}), flush=True)
"""


def script(directory: Path, text: str = SERVER) -> str:
    """A command for it."""
    path = directory / ("server.py" if text == SERVER else "tell.py")
    path.write_text(text)
    return json.dumps([sys.executable, "-I", str(path)])


def config(directory: Path, listen: str, pool: str = "", more: str = "", sockets: str = '["http"]') -> str:
    return (
        f"[socket.http]\nlisten = {listen}\n{more}\n"
        f'[pool.web]\ncommand = {script(directory)}\nsockets = {sockets}\non_supervisor_death = "keep"\n{pool}\n'
    )


TCP = '"tcp://127.0.0.1:0"'


def addresses(up: Up, pool: str = "web") -> list[str]:
    """Where the pool's sockets are bound, as the API says it."""
    return [each["address"] for each in up.api("GET", f"/v1/pools/{pool}")[1]["sockets"]]


def connect(address: str) -> socket.socket:
    kind, _, place = address.partition("://")
    if kind == "unix":
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(PATIENCE)
        try:
            sock.connect(place)
        except BaseException:
            sock.close()
            raise
        return sock
    host, _, port = place.rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)), PATIENCE)


def answer(sock: socket.socket) -> dict[str, Any]:
    parts = []
    while part := sock.recv(4096):
        parts.append(part)
    found: dict[str, Any] = json.loads(b"".join(parts))
    return found


def asked(address: str) -> dict[str, Any]:
    with connect(address) as sock:
        return answer(sock)


class Client:
    """Connects again and again, from its making until it is left."""

    def __init__(self, address: str) -> None:
        self.answers: list[dict[str, Any]] = []
        self.errors: list[OSError | ValueError] = []
        self._address = address
        self._more = threading.Condition()
        self._end = False
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Client:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end = True
        self._thread.join()

    def _run(self) -> None:
        while not self._end and not self.errors:
            try:
                found = asked(self._address)
            except (OSError, ValueError) as error:
                with self._more:
                    self.errors.append(error)
                    self._more.notify_all()
                return
            with self._more:
                self.answers.append(found)
                self._more.notify_all()

    def hears(self, count: int) -> None:
        """Waits until so many more have been answered."""
        with self._more:
            until = len(self.answers) + count
            assert self._more.wait_for(lambda: self.errors or len(self.answers) >= until, PATIENCE)
        assert self.errors == []


# --- what a program is given -----------------------------------------------------------------------------------------


@needs_namespaces
@pytest.mark.parametrize(("init", "ns_pid"), [(True, 2), (False, 1)])
def test_what_a_program_is_told(tmp_path: Path, init: bool, ns_pid: int) -> None:
    pools = f"""
[socket.http]
listen = ["tcp://127.0.0.1:0", "tcp://[::1]:0"]
[socket.admin]
listen = "unix://{tmp_path}/admin"
[pool.web]
command = {script(tmp_path, TELL)}
sockets = ["admin", "http"]
env = {{ LISTEN_FDS = "7", LISTEN_PID = "{{index}}" }}
type = "oneshot"
init = {json.dumps(init)}
[pool.none]
command = {script(tmp_path, TELL)}
env = {{ LISTEN_FDS = "7" }}
type = "oneshot"
"""
    with Up(tmp_path, pools) as up:
        told = json.loads(json.dumps(up.wait_record("web", lambda _: True)["data"]))
        assert told == {
            "fds": [0, 1, 2, 3, 4, 5],
            "pid": ns_pid,
            "LISTEN_FDS": "3",
            "LISTEN_FDNAMES": "admin:http:http",
            "LISTEN_PID": str(ns_pid),
        }
        assert up.wait_record("none", lambda _: True)["data"]["fds"] == [0, 1, 2]
        assert [each.partition("://")[0] for each in addresses(up)] == ["unix", "tcp", "tcp"]
        assert addresses(up, "none") == []


@needs_namespaces
@pytest.mark.parametrize("init", ["true", "false"])
def test_a_real_client_is_served(tmp_path: Path, init: str) -> None:
    with Up(tmp_path, config(tmp_path, TCP, f"workers = 2\ninit = {init}")) as up:
        (address,) = addresses(up)
        assert asked(address)["name"] == "http"


@needs_namespaces
@pytest.mark.skipif(shutil.which("gunicorn") is None, reason="needs gunicorn")
def test_gunicorn(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(
        "def app(environ, start):\n    start('200 OK', [('Content-Length', '5')])\n    return [b'hello']\n"
    )
    command = json.dumps([shutil.which("gunicorn"), "--chdir", str(tmp_path), "app:app"])
    pools = f'[socket.http]\nlisten = {TCP}\n[pool.web]\ncommand = {command}\nsockets = ["http"]\n'
    with Up(tmp_path, pools) as up:
        (address,) = addresses(up)
        with connect(address) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            said = b""
            while part := sock.recv(4096):
                said += part
        assert said.endswith(b"\r\n\r\nhello")


# --- nobody is refused -----------------------------------------------------------------------------------------------


@needs_namespaces
@pytest.mark.parametrize("listen", ["tcp", "unix"])
def test_nobody_is_refused(tmp_path: Path, listen: str) -> None:
    """While workers are restarted, and supervisors are killed, replaced in place, and leave."""
    pools = config(tmp_path, TCP if listen == "tcp" else f'"unix://{tmp_path}/http"', "workers = 2")
    with contextlib.ExitStack() as closes:
        up = closes.enter_context(Up(tmp_path, pools))
        (address,) = addresses(up)
        client = closes.enter_context(Client(address))
        client.hears(5)
        for _ in range(2):
            assert up.ctl("restart", "web").code == 0
            client.hears(5)
        up.leaves = True
        up.process.kill()
        up.wait_end()
        client.hears(20)

        up = closes.enter_context(Up(tmp_path, pools))
        assert addresses(up) == [address]
        assert all(worker["adopted"] for worker in up.status()["workers"])
        assert up.ctl("restart", "web").code == 0
        client.hears(5)
        assert up.ctl("reexec").code == 0
        client.hears(5)
        assert addresses(up) == [address]
        assert up.ctl("restart", "web").code == 0
        client.hears(5)
        up.leaves = True
        assert up.ctl("shutdown", "--leave-running").code == 0
        assert up.wait_end() == 0
        client.hears(20)

        up = closes.enter_context(Up(tmp_path, pools))
        assert addresses(up) == [address]
        assert up.ctl("restart", "web").code == 0
        client.hears(5)
        client.__exit__()
        assert client.errors == []
        assert {found["worker"] for found in client.answers} <= {"web/0", "web/1"}
        assert len({found["generation"] for found in client.answers}) >= 5
    with pytest.raises((ConnectionRefusedError, FileNotFoundError)):
        connect(address)


@needs_namespaces
def test_who_comes_while_no_worker_runs_waits(tmp_path: Path) -> None:
    with Up(tmp_path, config(tmp_path, TCP)) as up:
        (address,) = addresses(up)
        up.wait_running("web/0")
        assert up.ctl("stop", "web").code == 0
        with connect(address) as waiting:
            assert up.ctl("reexec").code == 0  # passed on by number: no init holds it
            assert addresses(up) == [address]
            with connect(address) as another:
                assert up.ctl("start", "web").code == 0
                assert answer(waiting)["name"] == answer(another)["name"] == "http"


@needs_namespaces
def test_the_queue_outlasts_a_worker_that_was_killed(tmp_path: Path) -> None:
    """Frozen, so that it accepts nobody, and then killed: its next life serves who waited."""
    with Up(tmp_path, config(tmp_path, TCP)) as up:
        (address,) = addresses(up)
        assert asked(address)["generation"] == "1"
        with opened(up.worker("web/0")["host_pid"]) as pidfd:
            signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
            with contextlib.ExitStack() as closes:
                waiting = [closes.enter_context(connect(address)) for _ in range(10)]
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                assert [answer(each)["generation"] for each in waiting] == ["2"] * 10


@needs_namespaces
@pytest.mark.parametrize("who", ["supervisor first", "all at once"])
def test_when_nobody_lives_they_are_bound_afresh(tmp_path: Path, who: str) -> None:
    path = tmp_path / "http"
    pools = config(tmp_path, f'"unix://{path}"')
    with Up(tmp_path, pools) as up:
        up.leaves = True
        (address,) = addresses(up)
        assert asked(address)["generation"] == "1"
        init = up.worker("web/0")["init_host_pid"]
        with opened(init) as pidfd:
            up.process.kill()
            if who == "supervisor first":
                up.wait_end()
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            wait_readable(pidfd, "init is still there")
        up.wait_end()
        with pytest.raises(ConnectionRefusedError):
            connect(address)
    with Up(tmp_path, pools) as up:
        assert addresses(up) == [address]
        assert asked(address)["name"] == "http"
    assert not path.exists()


@needs_namespaces
def test_one_of_two_lives_is_enough_for_the_next(tmp_path: Path) -> None:
    """Two pools share it, and only the init of the second is left."""
    pools = (
        config(tmp_path, TCP)
        + f'[pool.more]\ncommand = {script(tmp_path)}\nsockets = ["http"]\non_supervisor_death = "keep"\n'
    )
    with Up(tmp_path, pools) as up:
        up.leaves = True
        (address,) = addresses(up)
        assert addresses(up, "more") == [address]
        up.wait_running("web/0", "more/0")
        init = up.worker("web/0")["init_host_pid"]
        up.process.kill()
        up.wait_end()
        with opened(init) as pidfd:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            wait_readable(pidfd, "init is still there")
        assert asked(address)["worker"] == "more/0"
    with Up(tmp_path, pools) as up:
        assert addresses(up) == addresses(up, "more") == [address]
        up.wait_running("web/0")


@needs_namespaces
def test_a_pool_of_another_name_has_it_next(tmp_path: Path) -> None:
    """What is left of the old pool is stopped, and its socket goes on."""
    pools = config(tmp_path, f'"unix://{tmp_path}/http"')
    with contextlib.ExitStack() as closes:
        up = closes.enter_context(Up(tmp_path, pools))
        up.leaves = True
        (address,) = addresses(up)
        client = closes.enter_context(Client(address))
        client.hears(5)
        up.process.kill()
        up.wait_end()
        with Up(tmp_path, pools.replace("[pool.web]", "[pool.site]")) as after:
            assert addresses(after, "site") == [address]
            after.wait("pool_removed", "web")
            client.hears(5)
            client.__exit__()
            assert client.errors == []
            assert client.answers[-1]["worker"] == "site/0"


# --- each worker its own ---------------------------------------------------------------------------------------------


@needs_namespaces
def test_a_socket_for_each_worker_comes_and_goes_with_it(tmp_path: Path) -> None:
    pools = config(tmp_path, f'"unix://{tmp_path}/http-{{index}}"', "workers = 2")
    path = [tmp_path / f"http-{index}" for index in range(4)]
    with Up(tmp_path, pools) as up:
        up.leaves = True
        up.wait_running("web/0", "web/1")
        assert [asked(f"unix://{each}")["worker"] for each in path[:2]] == ["web/0", "web/1"]
        assert up.ctl("scale", "web", "3").code == 0
        assert asked(f"unix://{path[2]}")["worker"] == "web/2"
        path[3].write_text("in the way")
        refused = up.ctl("scale", "web", "4")
        assert refused.code == 1
        assert f"socket http: cannot listen at unix://{path[3]}: there is something that is no socket" in refused.err
        assert up.api("GET", "/v1/pools/web")[1]["wanted"] == 3
        up.process.kill()
        up.wait_end()
        assert asked(f"unix://{path[2]}")["worker"] == "web/2"
    with Up(tmp_path, pools) as up:
        assert addresses(up) == [f"unix://{each}" for each in path[:3]]
        assert [asked(f"unix://{each}")["worker"] for each in path[:3]] == ["web/0", "web/1", "web/2"]
        assert up.ctl("scale", "web", "1").code == 0
        up.wait("removed", "web/2")
        up.wait("removed", "web/1")
        assert [each.exists() for each in path[:3]] == [True, False, False]
        assert addresses(up) == [f"unix://{path[0]}"]
    assert not path[0].exists()


@needs_namespaces
@pytest.mark.parametrize(
    ("change", "left"), [(("workers = 2", "workers = 1"), [True, False]), (("pool.web", "pool.x"), [True, False])]
)
def test_what_nobody_wants_any_more_leaves_no_file(tmp_path: Path, change: tuple[str, str], left: list[bool]) -> None:
    """Of workers that the config of a later supervisor has no more, or of its pools."""
    path = [tmp_path / "http-0", tmp_path / "http-1"]
    pools = config(tmp_path, f'"unix://{tmp_path}/http-{{index}}"', "workers = 2")
    with Up(tmp_path, pools) as up:
        up.leaves = True
        up.wait_running("web/0", "web/1")
        up.process.kill()
        up.wait_end()
    pools = pools.replace(*change)
    if "pool.x" in pools:
        pools = pools.replace("workers = 2", "workers = 1")
    with Up(tmp_path, pools) as up:
        up.wait("pool_removed" if "pool.x" in pools else "removed", "web" if "pool.x" in pools else "web/1")
        assert [each.exists() for each in path] == left
        assert asked(f"unix://{path[0]}")["worker"] in ("web/0", "x/0")
    assert not any(each.exists() for each in path)


@needs_namespaces
def test_one_port_for_all_workers(tmp_path: Path) -> None:
    """The kernel shares connections out, and each socket goes to its own worker's next life, whoever is supervisor."""
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{reserved.getsockname()[1]}"
        pools = config(tmp_path, json.dumps(address), "workers = 3", "reuse_port = true")
        with Up(tmp_path, pools) as up:
            up.leaves = True
            up.wait_running("web/0")
            ids = {f"web/{index}" for index in range(3)}
            assert {each["worker"] for each in up.api("GET", "/v1/pools/web")[1]["sockets"]} == ids
            assert addresses(up) == [address] * 3
            seen: set[str] = set()
            while seen != ids:
                seen.add(asked(address)["worker"])
            before = {each: inode_of_socket(up, each) for each in ids}
            up.process.kill()
            up.wait_end()
        with Up(tmp_path, pools) as up:
            assert up.ctl("restart", "web").code == 0
            assert {each: inode_of_socket(up, each) for each in ids} == before


def inode_of_socket(up: Up, worker_id: str) -> str:
    return os.readlink(f"/proc/{up.worker(worker_id)['host_pid']}/fd/3")


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(directory: Path, pools: str) -> list[str]:
    """What `nssup up` says that does not start."""
    up = Up(directory, pools)
    try:
        assert up.wait_end() == 1
        assert [event["event"] for event in up.events if event.get("worker")] == []
        return up.said
    finally:
        up.close()


def test_a_port_that_somebody_has(tmp_path: Path) -> None:
    """It is named, nothing is started, and what was bound before it is no more."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        pools = config(tmp_path, f'["unix://{tmp_path}/http", "tcp://127.0.0.1:{port}"]')
        pools = (
            f'[socket.a]\nlisten = "unix://{tmp_path}/a"\n[pool.a]\ncommand = ["sleep", "1"]\nsockets = ["a"]\n' + pools
        )
        said = refused(tmp_path, pools)
    assert said == [
        f"nssup: socket http: cannot listen at tcp://127.0.0.1:{port}: Address already in use "
        "(another program listens there: `ss -lntup` shows which)",
    ]
    assert not (tmp_path / "http").exists()
    assert not (tmp_path / "a").exists()


def test_a_path_where_somebody_listens(tmp_path: Path) -> None:
    path = tmp_path / "http"
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(str(path))
        taken.listen()
        assert (
            f"cannot listen at unix://{path}: Address already in use"
            in refused(tmp_path, config(tmp_path, f'"unix://{path}"'))[0]
        )
        with connect(f"unix://{path}"):  # still
            pass


def test_a_path_where_something_else_is(tmp_path: Path) -> None:
    path = tmp_path / "http"
    path.write_text("mine")
    assert refused(tmp_path, config(tmp_path, f'"unix://{path}"')) == [
        f"nssup: socket http: cannot listen at unix://{path}: there is something that is no socket "
        "(move it away, or choose another path)",
    ]
    assert path.read_text() == "mine"


# --- descriptors -----------------------------------------------------------------------------------------------------


@needs_namespaces
def test_one_descriptor_a_socket_whatever_the_number_of_workers(tmp_path: Path) -> None:
    pools = '[socket.http]\nlisten = ["tcp://127.0.0.1:0", "tcp://[::1]:0"]\n'
    pools += '[pool.web]\ncommand = ["sleep", "1000"]\nsockets = ["http"]\nworkers = 9\n'
    with Up(tmp_path, pools) as up:
        up.wait_running(*(f"web/{index}" for index in range(9)))
        both = [os.readlink(f"/proc/{up.worker('web/0')['host_pid']}/fd/{fd}") for fd in (3, 4)]
        held_there = links(up.host_pid)
        assert [held_there.count(each) for each in both] == [1, 1]
        init = up.worker("web/8")["init_host_pid"]
        assert [links(init).count(each) for each in both] == [1, 1]


def links(host_pid: int) -> list[str]:
    found = []
    for fd in Path(f"/proc/{host_pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(fd))
    return found


# --- one socket ------------------------------------------------------------------------------------------------------


def wanted(listen: str, name: str = "http", worker: str = "", **keys: Any) -> sockets.Wanted:  # noqa: ANN401
    spec = SocketSpec(name=name, listen=(listen,), **keys)
    (found,) = sockets.of_worker(PoolSpec(name="web", command=("x",), sockets=(spec,)), 0)
    return found._replace(key=found.key._replace(worker=worker))


def as_it_is(_: sockets.Wanted) -> tuple[int, int]:
    return -1, -1


@pytest.fixture
def holding() -> Iterator[held.Sockets]:
    made = held.Sockets()
    yield made
    made.close(keep_files=False)


def have(holding: held.Sockets, *each: sockets.Wanted) -> list[socket.socket]:
    """Copies of them."""
    holding.open("web", each, as_it_is)
    return [socket.socket(fileno=os.dup(fd)) for fd in holding.descriptors(each)]


@pytest.mark.parametrize(
    ("listen", "family", "kind"),
    [
        ("tcp://127.0.0.1:0", socket.AF_INET, socket.SOCK_STREAM),
        ("tcp://[::]:0", socket.AF_INET6, socket.SOCK_STREAM),
        ("udp://127.0.0.1:0", socket.AF_INET, socket.SOCK_DGRAM),
        ("udp://[::1]:0", socket.AF_INET6, socket.SOCK_DGRAM),
    ],
)
def test_what_is_bound(holding: held.Sockets, listen: str, family: int, kind: int) -> None:
    (sock,) = have(holding, wanted(listen, backlog=7))
    with sock:
        assert (sock.family, sock.type) == (family, kind)
        assert os.get_blocking(sock.fileno())
        assert not any(map(os.get_inheritable, holding.descriptors([wanted(listen)])))
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == (kind == socket.SOCK_STREAM)
        (listed,) = holding.listed("web")
        assert listed.address == f"{listen[:-1]}{sock.getsockname()[1]}"
        if family == socket.AF_INET6:
            assert sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 1


def test_the_same_port_for_both_families(holding: held.Sockets) -> None:
    (first,) = have(holding, wanted("tcp://0.0.0.0:0"))
    with first:
        (second,) = have(holding, wanted(f"tcp://[::]:{first.getsockname()[1]}"))
        second.close()


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666, 0o200])
def test_the_file_of_a_socket(holding: held.Sockets, tmp_path: Path, mode: int) -> None:
    path = tmp_path / "not" / "yet" / "http"
    (sock,) = have(holding, wanted(f"unix://{path}", mode=mode))
    with sock:
        assert stat.S_IMODE(path.lstat().st_mode) == mode
        assert stat.S_ISSOCK(path.lstat().st_mode)
        holding.close_pool("web")
        assert not path.exists()


@needs_root
def test_whose_the_file_is(tmp_path: Path) -> None:
    path = tmp_path / "http"
    holding = held.Sockets()
    holding.open("web", [wanted(f"unix://{path}")], lambda _: (1, 2))
    assert (path.stat().st_uid, path.stat().st_gid) == (1, 2)
    holding.close(keep_files=False)


def test_somebody_elses_file_is_not_removed(holding: held.Sockets, tmp_path: Path) -> None:
    path = tmp_path / "http"
    have(holding, wanted(f"unix://{path}"))[0].close()
    path.rename(tmp_path / "ours")
    path.write_text("another's")
    holding.close(keep_files=False)
    assert path.read_text() == "another's"


def test_a_dead_sockets_file_is_replaced(holding: held.Sockets, tmp_path: Path) -> None:
    path = tmp_path / "http"
    with socket.socket(socket.AF_UNIX) as before:
        before.bind(str(path))
    have(holding, wanted(f"unix://{path}"))[0].close()
    with connect(f"unix://{path}"):
        pass


def test_all_or_nothing(holding: held.Sockets, tmp_path: Path) -> None:
    path = tmp_path / "http"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        last = wanted(f"tcp://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(ControlError, match="Address already in use"):
            holding.open("web", [wanted(f"unix://{path}"), last], as_it_is)
    assert not path.exists()
    assert holding.listed("web") == []


@pytest.mark.parametrize(
    ("left", "listen", "is_taken"),
    [
        ("tcp://127.0.0.1:0", "tcp://127.0.0.1:0", True),
        ("tcp://127.0.0.1:0", "tcp://127.0.0.1:1", False),
        ("tcp://127.0.0.1:0", "tcp://127.0.0.2:0", False),
        ("tcp://127.0.0.1:0", "tcp://[::1]:0", False),
        ("udp://127.0.0.1:0", "tcp://127.0.0.1:0", False),
        ("udp://127.0.0.1:0", "udp://127.0.0.1:0", True),
        ("tcp://[::ffff:127.0.0.1]:0", "tcp://[::ffff:7f00:1]:0", True),
    ],
)  # fmt: skip
def test_what_an_init_kept_is_taken_if_it_is_what_is_wanted(left: str, listen: str, is_taken: bool) -> None:
    found = Address(*left.partition("://")[::2])
    kind, host = found.kind, found.place.rpartition(":")[0].strip("[]")
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, 1 if kind == "tcp" else 2)
    if ":" in host:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind((host, 0))
    if kind == "tcp":
        sock.listen()
    inode = os.fstat(sock.fileno()).st_ino
    fd = sock.detach()
    holding = held.Sockets()

    def kept() -> Any:  # noqa: ANN401 - a generator
        yield "web/5", fd

    want = wanted(listen)
    try:
        holding.open("web", [want], as_it_is, kept)
    except ControlError:
        assert not is_taken
    else:
        assert (os.fstat(holding.descriptors([want])[0]).st_ino == inode) is is_taken
    holding.close(keep_files=False)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


@pytest.mark.parametrize("renamed", [False, True])
def test_each_worker_has_its_own_again(tmp_path: Path, renamed: bool) -> None:
    """Or who has its place, when the pool has another name."""
    spec = SocketSpec(name="http", listen=(f"unix://{tmp_path}/{{index}}",))
    before, after = held.Sockets(), held.Sockets()
    pool = PoolSpec(name="web", command=("x",), sockets=(spec,))
    wants = sockets.of_workers(pool, range(300)).values()
    before.open("web", wants, as_it_is)
    inodes = [os.fstat(fd).st_ino for fd in before.descriptors(wants)]

    def kept() -> Any:  # noqa: ANN401 - a generator
        for want in reversed(wants):
            yield want.key.worker, os.dup(before.descriptors([want])[0])

    pool = PoolSpec(name="site" if renamed else "web", command=("x",), sockets=(spec,))
    wants_after = sockets.of_workers(pool, range(300)).values()
    after.open("web", wants_after, as_it_is, kept)
    assert [os.fstat(fd).st_ino for fd in after.descriptors(wants_after)] == inodes
    before.close(keep_files=True)
    after.close(keep_files=False)
    assert list(tmp_path.iterdir()) == []


def test_what_belongs_to_another_worker_is_not_taken() -> None:
    own = socket.create_server(("127.0.0.1", 0))
    want = wanted("tcp://127.0.0.1:0", worker="web/0")
    holding = held.Sockets()
    inode = os.fstat(own.fileno()).st_ino
    holding.open("web", [want], as_it_is, lambda: (each for each in [("web/1", own.detach())]))
    assert os.fstat(holding.descriptors([want])[0]).st_ino != inode
    holding.close(keep_files=False)


def test_what_was_passed_on_is_the_same(tmp_path: Path) -> None:
    both = [wanted("tcp://127.0.0.1:0"), wanted(f"unix://{tmp_path}/x", "x")]
    holding = held.Sockets()
    holding.open("web", both, as_it_is)
    before = [os.fstat(fd).st_ino for fd in holding.descriptors(both)]
    spares = holding.pass_on()
    holding.close(keep_files=False)
    following = held.Sockets([*reversed(spares), sockets.Spare(os.open("/dev/null", os.O_RDONLY), "nobody")])
    following.open("web", both, as_it_is)
    following.close_spares()
    assert [os.fstat(fd).st_ino for fd in following.descriptors(both)] == before
    following.close(keep_files=False)
    assert not (tmp_path / "x").exists()


def test_what_was_passed_on_and_nobody_wants_is_closed_with_its_file(tmp_path: Path) -> None:
    holding = held.Sockets()
    holding.open("web", [wanted(f"unix://{tmp_path}/x", "x")], as_it_is)
    following = held.Sockets(holding.pass_on())
    following.close_spares()
    assert not (tmp_path / "x").exists()


# --- embedded --------------------------------------------------------------------------------------------------------

HTTP = SocketSpec(name="http", listen=("tcp://127.0.0.1:0",))


@needs_namespaces
@pytest.mark.asyncio
async def test_embedded(tmp_path: Path) -> None:
    path = tmp_path / "server.py"
    path.write_text(SERVER)
    async with Supervisor() as supervisor:
        witness = Witness(supervisor)
        spec = PoolSpec(name="web", command=(sys.executable, "-I", str(path)), sockets=(HTTP,))
        supervisor.add_pool(spec)
        await witness.wait("started", "web/0")
        (listed,) = supervisor.sockets.listed("web")
        found = await asyncio.to_thread(asked, listed.address)
        assert found["worker"] == "web/0"
    with pytest.raises(ConnectionRefusedError):
        connect(listed.address)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (SocketSpec(name="http", listen=("8080",)), "pool.web.sockets.0.listen.0: is no address"),
        (SocketSpec(name="A", listen=("tcp://127.0.0.1:0",)), "pool.web.sockets.0.name: 'A' is no name"),
    ],
)
async def test_embedded_and_wrong(spec: SocketSpec, why: str) -> None:
    async with Supervisor() as supervisor:
        with pytest.raises(SpecError) as caught:
            supervisor.add_pool(PoolSpec(name="web", command=("x",), sockets=(spec,)))
        assert why in str(caught.value)


@pytest.mark.asyncio
async def test_a_pool_that_was_refused_for_its_socket_can_be_added_later(tmp_path: Path) -> None:
    async with Supervisor() as supervisor:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            listen = (f"tcp://127.0.0.1:{taken.getsockname()[1]}",)
            spec = PoolSpec(
                name="web", command=("x",), enabled=False, sockets=(SocketSpec(name="http", listen=listen),)
            )
            with pytest.raises(ControlError, match="Address already in use"):
                supervisor.add_pool(spec)
        supervisor.add_pool(spec)
