"""Supervisors for tests, run as a user runs them: `nssup up` on a directory of its own, steered with `nssup ctl`.

Never sleeps: waits for events on stderr, for pidfds, for inotify, each until a deadline. However a test is left, the
supervisor is gone, and `Up` fails a test that leaves a process, a socket or a lock of it behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from nssup import client
from nssup.facts import Host

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from nssup import Event
    from nssup.loop import Supervisor

NSSUP = (sys.executable, "-m", "nssup")
PATIENCE = 20.0  # seconds until something that should happen has failed to
MARK = "NSSUP_TEST_DIRECTORY"  # a variable of every worker: whose it is
_IN_CREATE, _IN_ATTRIB, _IN_CLOEXEC, _IN_NONBLOCK = 0x100, 0x4, 0o2000000, 0o4000
_libc = ctypes.CDLL(None, use_errno=True)

Json = dict[str, Any]


def _may_make_namespaces() -> bool:
    """Whether workers can be launched: with CAP_SYS_ADMIN, or in a user namespace that anybody may make."""
    if Host().capable("SYS_ADMIN"):
        return True
    return subprocess.run([*NSSUP, "run", "--", "true"], capture_output=True, check=False).returncode == 0


needs_namespaces = pytest.mark.skipif(not _may_make_namespaces(), reason="needs CAP_SYS_ADMIN or user namespaces")
needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not Host().capable("SYS_ADMIN"), reason="needs root with CAP_SYS_ADMIN"
)


# --- the host's side -------------------------------------------------------------------------------------------------


def process_ids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def namespace_pids(host_pid: int) -> list[int]:
    """NSpid: the process's PID in each namespace from the host's down to its own."""
    return [int(number) for number in status_field(host_pid, "NSpid").split()]


def status_field(host_pid: int, name: str) -> str:
    """A field of proc_pid_status(5)."""
    for line in Path(f"/proc/{host_pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return line.partition(":")[2].strip()
    raise KeyError(name)


class PidNamespaces:
    """PID namespaces that are held open, so that nobody else gets their numbers."""

    def __init__(self) -> None:
        self._fds: dict[int, int] = {}

    def hold(self, host_pid: int) -> None:
        """That of the process; nothing if it is gone. Never our own: some kill all that are in these."""
        with contextlib.suppress(OSError):
            fd = os.open(f"/proc/{host_pid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
            inode = os.fstat(fd).st_ino
            if inode == os.stat("/proc/self/ns/pid").st_ino or self._fds.setdefault(inode, fd) != fd:
                os.close(fd)

    def processes(self) -> list[int]:
        """The host PIDs of all that are in them. One that is being reaped is in none any more; one that has ended and
        that its parent does not reap is no concern of nssup's when that is not its supervisor."""
        found = []
        for host_pid in process_ids() if self._fds else ():
            with contextlib.suppress(OSError):
                inside = os.stat(f"/proc/{host_pid}/ns/pid").st_ino in self._fds
                if inside and (status_field(host_pid, "State")[0] != "Z" or status_field(host_pid, "PPid") != "1"):
                    found.append(host_pid)
        return found

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])


def marked(directory: Path) -> list[int]:
    """The host PIDs of all processes that were told this directory in their environment."""
    found = []
    for host_pid in process_ids():
        with contextlib.suppress(OSError):
            if f"{MARK}={directory}" in environment(host_pid):
                found.append(host_pid)
    return found


def environment(host_pid: int) -> list[str]:
    """`NAME=value` of each variable that the process was started with."""
    return Path(f"/proc/{host_pid}/environ").read_bytes().decode(errors="replace").split("\0")


DEAD = ("Z", "X", "gone")


def described(host_pid: int) -> str:
    """For messages."""
    try:
        command = Path(f"/proc/{host_pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        state, name = status_field(host_pid, "State"), status_field(host_pid, "Name")
        return f"{state} {name} ({command}) {namespace_pids(host_pid)}"
    except OSError:
        return "gone"


def wait_readable(fd: int, why: str, patience: float = PATIENCE) -> None:
    """A pidfd is readable when its process is dead, reaped or not."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(patience * 1000), why


def wait_gone(host_pid: int) -> None:
    """Until that process, which the caller knows to be there, is dead."""
    with opened(host_pid) as pidfd:
        if pidfd is not None:
            wait_readable(pidfd, f"process {host_pid} is still there")


@contextlib.contextmanager
def opened(host_pid: int) -> Any:  # noqa: ANN401 - an iterator of int | None
    """A pidfd, None if there is no such process any more."""
    try:
        pidfd = os.pidfd_open(host_pid)
    except ProcessLookupError:
        yield None
        return
    try:
        yield pidfd
    finally:
        os.close(pidfd)


def wait_listening(host: str, port: int) -> None:
    """Until somebody accepts connections there: a program that tells in no other way that it is ready."""
    deadline = time.monotonic() + PATIENCE
    while True:
        with socket.socket() as sock:
            if sock.connect_ex((host, port)) == 0:
                return
        assert time.monotonic() < deadline, f"nobody listens at {host}:{port}"
        os.sched_yield()


def locked_by(path: Path) -> int | None:
    """The host PID of whoever holds a POSIX lock on the file, None if nobody does."""
    asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    with path.open("r+b") as file:
        kind, _, _, _, host_pid = struct.unpack("hhqqi4x", fcntl.fcntl(file, fcntl.F_GETLK, asked))
    return None if kind == fcntl.F_UNLCK else host_pid


# --- a supervisor ----------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    code: int
    out: str
    err: str


def nssup(*args: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Result:
    """`nssup ARGS...` to its end, as a user types it."""
    done = subprocess.run(
        [*NSSUP, *args],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env={**os.environ, **(env or {})},
        cwd=cwd,
        timeout=PATIENCE,
        check=False,
    )
    return Result(done.returncode, done.stdout.decode(), done.stderr.decode())


def pool_text(name: str, *command: str, **keys: object) -> str:
    """[pool.NAME] that runs command (default: one that just sleeps); keys are texts of TOML, or numbers and flags."""
    lines = [f"[pool.{name}]", f"command = {json.dumps(command or ('sleep', '1000'))}"]
    lines += [f"{key} = {json.dumps(value) if isinstance(value, bool) else value}" for key, value in keys.items()]
    return "\n".join(lines) + "\n"


def shell(script: str, *args: str) -> tuple[str, ...]:
    """A command that runs the script, with args as $1, $2 ..."""
    return ("sh", "-c", script, "sh", *args)


def config_text(directory: Path, pools: str, supervisor: str = "") -> str:
    """A whole config: its directories are in `directory`, and its workers are marked."""
    return (
        "version = 1\n"
        f'[supervisor]\nstate_dir = "{directory}/s"\nlog_dir = "{directory}/l"\n{supervisor}\n'
        f'[defaults]\nenv = {{ {MARK} = "{directory}" }}\non_supervisor_death = "die"\n'
        f"{pools}"
    )


class Up:
    """`nssup up` on a config of its own, from its start to the proof that nothing is left of it.

    `events` is what it said on stderr so far, as JSON; `said` the lines that were no events. Use as a context manager:
    entering waits until the control socket answers, leaving ends it if it has not ended. leaves: it is meant to leave
    something, of which another one on the same directory makes an end.
    """

    leaves = False

    def __init__(
        self,
        directory: Path,
        pools: str,
        *options: str,
        supervisor: str = "",
        prefix: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        asyncio_loop: bool = False,
        preexec: Callable[[], None] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        """prefix: words before `nssup up`, of a program that execs it. preexec: run in the new process, before that.
        pass_fds: descriptors that it has as well."""
        self.directory = directory
        self.config = directory / "nssup.toml"
        self.config.write_text(config_text(directory, pools, supervisor))
        self.log_dir = directory / "l"
        self.socket = directory / "s" / "run" / "nssup.sock"
        self.events: list[Json] = []
        self.said: list[str] = []
        self.pid_namespaces = PidNamespaces()
        self.code: int | None = None
        self._buffer = b""
        self._inotify = _watch_directory(self.socket.parent)
        self.process = subprocess.Popen(
            [*prefix, *NSSUP, "up", "-c", str(self.config), *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, **(env or {})},
            preexec_fn=preexec,
            pass_fds=pass_fds,
        )
        self.host_pid = self.process.pid
        self.pidfd = os.pidfd_open(self.host_pid)
        assert self.process.stderr is not None
        self._stderr = self.process.stderr.fileno()
        os.set_blocking(self._stderr, False)

    def __enter__(self) -> Up:
        try:
            self._wait_socket()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        clean = False
        try:
            if self.code is None and kind is None:
                self.end()
            if kind is None and not self.leaves and (left := self.left()):
                pytest.fail(f"left behind: {left}, code {self.code}, {self.said} {self.events}")
            clean = kind is None
        finally:
            if not clean:
                self._clean_up()
            self.close()

    def _clean_up(self) -> None:
        """A test that fails leaves nothing to others either: not even workers that may outlive their supervisor."""
        if self.process.returncode is None:
            self.process.kill()
            self.process.wait()
        for host_pid in marked(self.directory):
            self.pid_namespaces.hold(host_pid)
        for host_pid in self.pid_namespaces.processes():
            with opened(host_pid) as pidfd, contextlib.suppress(ProcessLookupError):
                if pidfd is not None:
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)

    def close(self) -> None:
        """Whatever state it is in: its process is ended and nothing of ours stays open."""
        if self.process.returncode is None:
            self.process.kill()
            self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()
        self.pid_namespaces.close()
        for fd in (self.pidfd, self._inotify):
            if fd >= 0:
                os.close(fd)
        self.pidfd = self._inotify = -1

    def _wait_socket(self) -> None:
        """Until the control socket takes connections. Its file is there a moment before it listens."""
        poll = select.poll()
        poll.register(self._inotify, select.POLLIN)
        poll.register(self.pidfd, select.POLLIN)
        deadline = time.monotonic() + PATIENCE
        while not self.answers():
            assert time.monotonic() < deadline, "no control socket"
            ready = [fd for fd, _ in poll.poll(50)]
            if self._inotify in ready:
                os.read(self._inotify, 65536)
            if self.pidfd in ready:
                code = self.wait_end()
                pytest.fail(f"nssup up ended with {code}: {self.said} {self.events}")

    def answers(self) -> bool:
        try:
            client.connect(str(self.socket)).close()
        except client.ClientError:
            return False
        return True

    # What it says.

    def _read(self, deadline: float) -> bool:
        """Takes in what is on stderr, after waiting for some. False at its end."""
        poll = select.poll()
        poll.register(self._stderr, select.POLLIN)
        assert poll.poll(max(deadline - time.monotonic(), 0.0) * 1000), f"silence after {self.events[-5:]} {self.said}"
        data = os.read(self._stderr, 1 << 20)
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            if line.startswith(b"{"):
                self.events.append(json.loads(line))
            else:
                self.said.append(line.decode())
        return bool(data)

    def wait(self, event: str, worker: str | None = None, *, after: int = 0, **fields: object) -> Json:
        """The first event of this kind (and worker, and fields) whose seq is beyond `after`."""
        deadline = time.monotonic() + PATIENCE
        looked = 0
        while True:
            for found in self.events[looked:]:
                about = worker in (None, found.get("worker", found.get("pool"))) and found["seq"] > after
                if found["event"] == event and about and all(found.get(k) == v for k, v in fields.items()):
                    return found
            looked = len(self.events)
            assert self._read(deadline), f"ended without {event} of {worker}: {self.events[-5:]} {self.said}"

    def wait_end(self) -> int:
        """Until the process has ended by itself: its exit code."""
        deadline = time.monotonic() + PATIENCE
        while self._read(deadline):
            pass
        if self._buffer:
            self.said.append(self._buffer.decode())
            self._buffer = b""
        wait_readable(self.pidfd, "it closed stderr and did not end")
        self.code = self.process.wait()
        return self.code

    # What is done to it.

    def send(self, signo: int) -> None:
        signal.pidfd_send_signal(self.pidfd, signo)

    def end(self, signo: int = signal.SIGTERM) -> int:
        """Sends the signal, and waits. Its exit code."""
        with contextlib.suppress(client.ClientError):
            self.status()
        self.send(signo)
        return self.wait_end()

    def ctl(self, *args: str) -> Result:
        return nssup("ctl", *args, env={"NSSUP_SOCKET": str(self.socket)})

    def api(self, method: str, path: str, body: Json | None = None) -> tuple[int, Any]:
        """HTTP status and document."""
        data = client.request(method, path, None if body is None else json.dumps(body))
        sock, answer = client.ask(str(self.socket), data, PATIENCE)
        with contextlib.closing(sock):
            return answer.status, json.loads(answer.body())

    def status(self) -> Json:
        """As `ctl status --json` says it."""
        document: Json = self.api("GET", "/v1/status")[1]
        for worker in document["workers"]:
            if worker["init_host_pid"] is not None:
                self.pid_namespaces.hold(worker["init_host_pid"])
        return document

    def worker(self, worker_id: str) -> Json:
        (found,) = [w for w in self.status()["workers"] if w["id"] == worker_id]
        return dict(found)

    def wait_running(self, *worker_ids: str) -> list[Json]:
        """The workers as status says them, once each of them runs."""
        code, answer = self.api("POST", "/v1/wait", {"select": list(worker_ids), "wait": "running"})
        assert code == 200, answer
        assert all(result["ok"] for result in answer["results"]), answer
        return [self.worker(worker_id) for worker_id in worker_ids]

    def tail(self, *selectors: str) -> list[Json]:
        """The records there are by now."""
        query = client.query([("select", each) for each in selectors] + [("n", "1000000")])
        sock, answer = client.ask(str(self.socket), client.request("GET", f"/v1/logs{query}"), PATIENCE)
        with contextlib.closing(sock):
            return [json.loads(line) for line in answer.body().splitlines()]

    def records(self, pool: str) -> list[Json]:
        """The pool's log, as it is in the file: complete only when the supervisor has ended."""
        return [json.loads(line) for line in (self.log_dir / f"{pool}.jsonl").read_text().splitlines()]

    def wait_record(self, pool: str, wanted: Callable[[Json], bool], *, patience: float = PATIENCE) -> Json:
        """The first record of the pool's that is as wanted; through the API, as it comes."""
        data = client.request("GET", f"/v1/logs?select={pool}&follow=1&n=1000")
        sock, answer = client.ask(str(self.socket), data, patience)
        with contextlib.closing(sock):
            for chunk in answer.chunks():
                for line in chunk.splitlines():
                    record: Json = json.loads(line)
                    if wanted(record):
                        return record
        raise AssertionError("the stream ended")

    # What it leaves.

    def left(self) -> list[str]:
        """What is still there of a supervisor that has ended, and should not be."""
        there = {*marked(self.directory), *self.pid_namespaces.processes()}
        # Who is dead is the host's to reap, if the supervisor was killed.
        there = {each for each in there if self.code != -signal.SIGKILL or not described(each).startswith(DEAD)}
        found = [f"process {host_pid}: {described(host_pid)}" for host_pid in there]
        if self.socket.exists():
            found.append("the socket")
        locks = [self.directory / "s" / "lock", self.directory / "s" / "run" / "lock"]
        return found + [f"a lock on {path}" for path in locks if path.exists() and locked_by(path) is not None]


def _watch_directory(path: Path) -> int:
    """An inotify descriptor that is readable when something is made in the directory, or changes its mode."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
    fd: int = _libc.inotify_init1(_IN_CLOEXEC | _IN_NONBLOCK)
    assert fd >= 0, os.strerror(ctypes.get_errno())
    assert _libc.inotify_add_watch(fd, os.fsencode(path), _IN_CREATE | _IN_ATTRIB) > 0
    return fd


# --- embedded --------------------------------------------------------------------------------------------------------


class Witness:
    """Everything that a supervisor of this program publishes, from the witness's making on."""

    def __init__(self, supervisor: Supervisor) -> None:
        self.events: list[Event] = []
        self.unsubscribe = supervisor.subscribe(self._note)
        self._waits: list[tuple[Callable[[Event], bool], asyncio.Future[Event]]] = []

    def _note(self, event: Event) -> None:
        self.events.append(event)
        for wanted, found in self._waits:
            if not found.done() and wanted(event):
                found.set_result(event)

    async def wait(self, event: str, worker: str | None = None, *, after: int = 0, **fields: object) -> Event:
        """The first event of this kind (and worker or pool, and fields) whose seq is beyond `after`."""

        def wanted(found: Event) -> bool:
            about = worker in (None, found.worker, found.pool)
            return (
                (found.event == event and about and found.seq > after)
                and all(getattr(found, name) == value for name, value in fields.items())
            )  # fmt: skip

        for found in self.events:
            if wanted(found):
                return found
        future: asyncio.Future[Event] = asyncio.get_running_loop().create_future()
        self._waits.append((wanted, future))
        try:
            async with asyncio.timeout(PATIENCE):
                return await future
        except TimeoutError:
            last = [f"{e.event} {e.worker or e.pool} {e.reason}" for e in self.events[-8:]]
            pytest.fail(f"no {event} of {worker} {fields}; last there were {last}")

    def names(self, worker: str) -> list[str]:
        return [event.event for event in self.events if event.worker == worker]

    def hosts(self) -> set[int]:
        """The host PIDs of all programs that were ever told of."""
        return {event.host_pid for event in self.events if event.host_pid is not None}
