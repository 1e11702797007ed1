"""Supervisors that are killed at chosen and at random instants, and what must hold when the next one has taken over.

    python tests/takeover.py points [NAME...]            every case, or those whose names hold NAME
    python tests/takeover.py random [--kills 50] [--workers 200] [--seed N]
    python tests/takeover.py recovery [--kills 100] [--each 5] [--workers 200] [--seed N]
    python tests/takeover.py redis [--kills 5]           redis-server under redis-benchmark

Runs in a PID namespace of its own, whose PID 1 is this program: all that is in there is the supervisor's, or a leak.
The supervisor is the real `nssup up` in a process of its own; where it dies is patched in from outside, so that the
product has no code for it. Never sleeps: waits are polls of what is waited for.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import ctypes
import datetime
import errno
import fcntl
import functools
import gc
import importlib.machinery
import importlib.util
import json
import mmap
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn

import crash
import uvloop  # noqa: F401 - here once, and not in each supervisor

from nssup import (  # noqa: F401
    _clone,
    _pidfd,
    adopt,
    backlog,
    cli,
    client,
    clone,
    ctl,
    custody,
    journal,
    lives,
    logs,
    loop,
    record,
    staging,
    up,
    wire,
)
from nssup.spec import PoolSpec, SupervisorSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from nssup.events import Event

Json = dict[str, Any]
INIT_DESCRIPTORS = 10
AT_ONCE = 1.0  # seconds, on a machine under load
PATIENCE = 30.0  # seconds until what must hold after a kill has failed to
_libc = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNS, _CLONE_NEWPID, _MS_REC, _MS_PRIVATE, _PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = (
    0x20000,
    0x20000000,
    0x4000,
    0x40000,
    1,
    4,
)


# --- a namespace of our own ------------------------------------------------------------------------------------------


def _call(name: str, *args: object) -> None:
    if getattr(_libc, name)(*args) < 0:
        raise OSError(ctypes.get_errno(), name)


def in_own_namespace(body: Callable[[], int]) -> int:
    """body's result, which runs as PID 1 of a new PID namespace with its own /proc. Everything in it ends with it."""
    outer = os.fork()
    if outer == 0:
        _exit_with(lambda: _enter(body))
    return os.waitstatus_to_exitcode(os.waitpid(outer, 0)[1])


def _enter(body: Callable[[], int]) -> int:
    _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    _call("unshare", _CLONE_NEWPID | _CLONE_NEWNS)
    inner = os.fork()
    if inner == 0:
        _exit_with(lambda: _be_pid_1(body))
    return os.waitstatus_to_exitcode(os.waitpid(inner, 0)[1])


def _be_pid_1(body: Callable[[], int]) -> int:
    _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    _call("mount", b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
    _call("mount", b"proc", b"/proc", b"proc", 0, None)
    return body()


def _exit_with(body: Callable[[], int]) -> NoReturn:
    code = 99
    try:
        code = body()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# --- dying at a chosen place -----------------------------------------------------------------------------------------


class Kill(NamedTuple):
    """SIGKILL to ourselves before or after the nth call of a function (that `when` is true of)."""

    where: Callable[[], object]  # the module or class
    name: str
    after: bool = False
    nth: int = 1
    when: Callable[..., bool] = lambda *args, **options: True

    def arm(self) -> None:
        """In the process that is to die."""
        owner = self.where()
        real = owner.__dict__[self.name]
        is_classmethod = isinstance(real, classmethod)
        function = real.__func__ if is_classmethod else real
        left = self.nth

        @functools.wraps(function)
        def deadly(*args: Any, **options: Any) -> Any:  # noqa: ANN401
            nonlocal left
            mine = left > 0 and self.when(*args, **options)
            left -= mine
            if mine and left == 0 and not self.after:
                die()
            result = function(*args, **options)
            if mine and left == 0 and self.after:
                die()
            return result

        setattr(owner, self.name, classmethod(deadly) if is_classmethod else deadly)


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still here")


# --- a site: directories, config, one supervisor at a time -----------------------------------------------------------


class Site:
    """Where supervisors come and go. Its processes are all that there are beside ourselves."""

    def __init__(self, home: Path, pools: str) -> None:
        self.home = home
        self.canary = home / "canary"
        self.canary.touch()
        self.config = home / "nssup.toml"
        self.runtime = home / "s" / "run"
        self.write_config(pools)
        self.host_pid = 0
        self.pidfd = -1
        self.starts = 0
        self.slowest = 0.0  # seconds until status answered
        self.took = 0.0  # what a case measured
        self.mounts = Path("/proc/self/mountinfo").read_text()

    def write_config(self, pools: str) -> None:
        self.config.write_text(
            f'version = 1\n[supervisor]\nstate_dir = "{self.home}/s"\nlog_dir = "{self.home}/l"\n'
            f'[defaults]\nenv = {{ CANARY = "{self.canary}" }}\n{pools}'
        )

    def start(
        self, *kills: Kill, prepare: Callable[[], None] | None = None, body: Callable[[], int] | None = None
    ) -> None:
        """The next supervisor, a child of ours. prepare: run in it first of all; body: instead of `nssup up`."""
        assert self.pidfd < 0
        self.starts += 1
        self.host_pid = os.fork()
        if self.host_pid == 0:
            _exit_with(lambda: self._supervise(kills, prepare, body))
        self.pidfd = os.pidfd_open(self.host_pid)

    def _supervise(
        self, kills: Sequence[Kill], prepare: Callable[[], None] | None, body: Callable[[], int] | None
    ) -> int:
        stderr = os.open(self.home / f"stderr-{self.starts}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        null = os.open("/dev/null", os.O_RDWR)
        for fd, number in ((null, 0), (null, 1), (stderr, 2)):
            os.dup2(fd, number)
        os.closerange(3, 1024)  # what is kept for a test is above
        for kill in kills:
            kill.arm()
        adopt.PATIENCE = 0.2
        if prepare is not None:
            prepare()
        return body() if body is not None else cli.main(["up", "-c", str(self.config)])

    def alive(self) -> bool:
        return self.pidfd >= 0 and not _readable(self.pidfd)

    def kill(self) -> None:
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        self.wait_dead()

    def wait_dead(self) -> None:
        """Until the supervisor is dead, by whatever hand."""
        assert _readable(self.pidfd, PATIENCE), "the supervisor was to die, and did not"
        os.close(self.pidfd)
        self.pidfd = -1
        reap()

    def stop(self) -> None:
        """As an operator ends it: everything is stopped."""
        signal.pidfd_send_signal(self.pidfd, signal.SIGTERM)
        self.wait_dead()

    def until(self, holds: Callable[[], object], what: str, patience: float = PATIENCE) -> None:
        """Until that holds, while the supervisor lives if there is one."""
        deadline = time.monotonic() + patience
        while not holds():
            reap()
            assert time.monotonic() < deadline, f"it did not happen: {what}"
            if self.pidfd >= 0:
                assert not _readable(self.pidfd, 0.002), f"the supervisor died: {self.said()}"
            else:
                select.select([], [], [], 0.002)

    def said(self) -> str:
        return (self.home / f"stderr-{self.starts}").read_text()[-3000:]

    # Asking it.

    def ask(self, method: str, path: str, body: Json | None = None) -> Json:
        data = client.request(method, path, None if body is None else json.dumps(body))
        sock, answer = client.ask(str(self.runtime / "nssup.sock"), data, PATIENCE)
        with contextlib.closing(sock):
            document: Json = json.loads(answer.body())
        assert answer.status < 400, document
        return document

    def tell(self, verb: str, *selectors: str, **more: Any) -> None:  # noqa: ANN401
        """An operator's wish, whose outcome nobody waits for. One that is cut off by a kill was no wish."""
        with contextlib.suppress(client.ClientError, OSError, ValueError):
            self.ask("POST", f"/v1/{verb}", {"select": list(selectors), "wait": False, **more})

    def answers(self) -> bool:
        try:
            client.connect(str(self.runtime / "nssup.sock")).close()
        except (client.ClientError, OSError):
            return False
        return True

    def wait_answer(self) -> None:
        began = time.monotonic()
        self.until(self.answers, "the control socket answers")
        self.status()
        self.slowest = max(self.slowest, time.monotonic() - began)

    def status(self) -> dict[str, Json]:
        """Worker id -> what `ctl status` says of it."""
        return {worker["id"]: worker for worker in self.ask("GET", "/v1/status")["workers"]}

    def until_state(self, worker_id: str, *states: str, generation: int = 0) -> Json:
        """The worker, as soon as it is in one of the states, in that generation or a later one."""
        found: list[Json] = []

        def there() -> bool:
            worker = self.status().get(worker_id)
            found[:] = [worker] if worker else []
            return worker is not None and worker["state"] in states and worker["generation"] >= generation

        try:
            self.until(there, f"{worker_id} is {' or '.join(states)}")
        except AssertionError as error:
            raise AssertionError(f"{error}: {found} {self.said()}") from None
        return found[0]

    # What there is.

    def canaries(self) -> list[str]:
        return self.canary.read_text().splitlines()

    def until_events(self, name: str, count: int) -> list[Json]:
        """So many events of a kind: they reach the file a moment after they happened."""
        found: list[Json] = []

        def there() -> bool:
            found[:] = [event for event in self.events() if event["event"] == name]
            return len(found) >= count

        self.until(there, f"{count} times {name}")
        return found

    def lines(self, pool: str) -> list[str]:
        """What is in the pool's log by now."""
        with contextlib.suppress(OSError):
            return [json.loads(line)["msg"] for line in (self.home / "l" / f"{pool}.jsonl").read_text().splitlines()]
        return []

    def events(self) -> list[Json]:
        """Of all supervisors so far, as they were published. One line may have been torn by a kill."""
        found = []
        for line in (self.home / "l" / "nssup.jsonl").read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return found


def _readable(fd: int, seconds: float = 0) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


reaping = True


def reap() -> None:
    """Orphans come to us. What a supervisor sees of an init must not depend on whether somebody reaps it."""
    with contextlib.suppress(ChildProcessError):
        while reaping and os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG):
            pass


# --- what must hold --------------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """A process as /proc shows it. namespace: the inode of its PID namespace, 0 when it is a zombie."""

    host_pid: int
    parent: int
    name: str
    zombie: bool
    namespace: int


def processes() -> dict[int, Seen]:
    """All that there are here."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError, ValueError, IndexError):
                found[int(name)] = _seen(int(name))
    return found


def _seen(host_pid: int) -> Seen:
    head, _, rest = Path(f"/proc/{host_pid}/stat").read_text().rpartition(")")
    fields = rest.split()
    zombie = fields[0] in "ZX"
    namespace = 0 if zombie else os.stat(f"/proc/{host_pid}/ns/pid").st_ino
    return Seen(host_pid, int(fields[1]), head.partition("(")[2], zombie, namespace)


def unlisted(site: Site, status: dict[str, Json]) -> list[Seen]:
    """Processes that no state lists: neither ours nor the supervisor nor in the namespace of a listed life."""
    there = processes()
    inits = {there[w["init_host_pid"]].namespace for w in status.values() if w["init_host_pid"] in there}
    known = {os.getpid(), site.host_pid}
    return [one for one in there.values() if one.host_pid not in known and one.namespace not in inits - {0}]


def disagreements(status: dict[str, Json]) -> list[str]:
    """Where a state is not what the kernel has."""
    there = processes()
    wrong: list[str] = []
    held = collections.Counter(worker["init_host_pid"] for worker in status.values())
    wrong += [f"init {init} is of {count} workers" for init, count in held.items() if init is not None and count > 1]
    for worker_id, worker in status.items():
        init, program = worker["init_host_pid"], worker["host_pid"]
        if worker["state"] in ("running", "starting", "stopping") and init is not None:
            if init not in there or there[init].name != "nssup-init":
                wrong.append(f"{worker_id}: {worker['state']}, and its init {init} is not there")
        elif init is not None:
            wrong.append(f"{worker_id}: {worker['state']}, with an init {init}")
        if worker["state"] == "running" and (program not in there or there[program].parent != init):
            wrong.append(f"{worker_id}: running, and its program {program} is not there")
    return wrong


def strange_files(site: Site, status: dict[str, Json]) -> list[str]:
    """Files and notes without an owner."""
    allowed = {"events", "lives", "lock", "nssup.sock"}
    found = [name for name in os.listdir(site.runtime) if name not in allowed]
    found += [name for name in os.listdir(site.home / "s") if name not in ("run", "lock", "epoch", "desired.json")]
    data = (site.runtime / "lives").read_bytes()
    halves = (data[at : at + record.SLOT_SIZE] for at in range(0, len(data), record.SLOT_SIZE))
    noted = {(slot.worker, slot.generation) for slot in map(record.decode_slot, halves) if slot}
    listed = {(worker_id, worker["generation"]) for worker_id, worker in status.items()}
    return found + [f"a note of {one}" for one in sorted(noted ^ listed) if one[1]]


def descriptors(host_pid: int) -> dict[str, int]:
    """How many a process has of what custody deals in."""
    kinds: collections.Counter[str] = collections.Counter()
    for name in os.listdir(f"/proc/{host_pid}/fd"):
        with contextlib.suppress(OSError):
            kinds[os.readlink(f"/proc/{host_pid}/fd/{name}").partition(":[")[0].partition("/")[0]] += 1
    return kinds


def gaps(events: list[Json]) -> list[str]:
    """Events of a run that are missing before another, are there twice, or in another order."""
    found, last = [], dict[int, int]()
    for event in events:
        before = last.get(event["epoch"], 0)
        if event["seq"] != before + 1:
            found.append(f"after event {event['epoch']}:{before} comes {event['seq']}")
        last[event["epoch"]] = event["seq"]
    return found


def hoarders(status: dict[str, Json]) -> list[str]:
    """Inits with more than they are born with and a signalfd, whoever has come and gone."""
    found = []
    for worker_id, worker in status.items():
        with contextlib.suppress(OSError):
            count = len(os.listdir(f"/proc/{worker['init_host_pid']}/fd"))
            if count > INIT_DESCRIPTORS:
                found.append(f"the init of {worker_id} has {count} descriptors")
    return found


def check(site: Site) -> list[str]:
    """What is wrong, when it has had time to become right: empty if the invariants hold."""
    wrong: list[str] = []

    def right() -> bool:
        reap()
        status = site.status()
        wrong[:] = [f"not listed: {one}" for one in unlisted(site, status)]
        wrong.extend(disagreements(status))
        wrong.extend(strange_files(site, status))
        if Path("/proc/self/mountinfo").read_text() != site.mounts:
            wrong.append("other mounts than before")
        lives_there = sum(worker["init_host_pid"] is not None for worker in status.values())
        has = descriptors(site.host_pid)
        most = {"anon_inode": lives_there + 10, "pipe": 2 * lives_there + 6, "socket": lives_there + 8}
        if any(has[kind] > count for kind, count in most.items()):
            wrong.append(f"descriptors for {lives_there} lives: {dict(has)}")
        wrong.extend(hoarders(status))
        return not wrong

    with contextlib.suppress(AssertionError):
        site.until(right, "the invariants hold")
    wrong += gaps(site.events())
    twice = [line for line, count in collections.Counter(site.canaries()).items() if count > 1]
    return wrong + [f"launched twice: {line}" for line in twice if not line.startswith("got ")]


# --- the cases -------------------------------------------------------------------------------------------------------

# Each program leaves a canary: who it is and which life. A second line of the same life would be a life launched twice.
WHO = 'echo "$NSSUP_ID $NSSUP_GENERATION" >> $CANARY; '
LONG = WHO + "exec sleep 100000"
SAYS = "echo the first line; " + LONG
ENDS = WHO + '[ "$NSSUP_GENERATION" = 1 ] && exit 7; exec sleep 100000'  # the first life ends by itself
FORKS = WHO + '(setsid sleep 100000 &) ; [ "$NSSUP_GENERATION" = 1 ] && exit 7; exec sleep 100000'
OBEYS = "trap 'echo got $NSSUP_GENERATION >> $CANARY; exit 5' TERM; " + WHO + "while :; do sleep 100000 & wait; done"
DEAF = (
    "trap '' INT; trap 'echo got $NSSUP_GENERATION >> $CANARY' TERM; " + WHO + "while :; do sleep 100000 & wait; done"
)


def pool(name: str, script: str, **keys: object) -> str:
    """The text of a pool. keys: TOML values."""
    lines = "".join(f"{key.replace('__', '.')} = {value}\n" for key, value in keys.items())
    return f"[pool.{name}]\ncommand = [\"/bin/sh\", \"-c\", '''{script}''']\n{lines}"


QUICK = {"restart__backoff": '{ first = "10ms", max = "20ms" }'}
SHORT_STOP = '[{ signal = "TERM", wait = "60ms" }, { signal = "INT", wait = "20ms" }, "kill"]'
LONG_STOP = '[{ signal = "TERM", wait = "20s" }, "kill"]'


def arguments(kind: type, *positions: int) -> Callable[..., bool]:
    """Whether the argument at one of the positions is of that kind."""
    return lambda *args, **options: any(isinstance(args[n], kind) for n in positions if n < len(args))


def note_of(**wanted: object) -> Callable[..., bool]:
    """Custody.changed is told of a worker with these values (a callable judges it)."""

    def matches(custody: object, worker_id: str, worker: Any) -> bool:  # noqa: ANN401
        return worker is not None and all(
            value(getattr(worker, name)) if callable(value) else getattr(worker, name) == value
            for name, value in wanted.items()
        )

    return matches


def _message(kind: str) -> Callable[..., bool]:
    return lambda self, life, message, *rest: type(message).__name__ == kind


def is_set(value: object) -> bool:
    return value is not None


CUSTODY, SUPERVISOR, PROCESS = (lambda: custody.Custody), (lambda: loop.Supervisor), (lambda: clone.Process)
LIVES, CLONE, DIRECTORIES = (lambda: lives.Lives), (lambda: _clone), (lambda: custody.Directories)

LAUNCH = {
    "launch: before the intent is noted": Kill(CUSTODY, "changed", when=note_of(state="starting")),
    "launch: intent noted": Kill(CUSTODY, "changed", True, when=note_of(state="starting")),
    "launch: before clone": Kill(CLONE, "clone"),
    "launch: cloned, record not sent": Kill(CLONE, "clone", True),
    "launch: record sent": Kill(CUSTODY, "born"),
    "launch: identity known, not noted": Kill(CUSTODY, "born", True),
    "launch: half of the note": Kill(LIVES, "write", nth=2),
    "launch: noted, no GO": Kill(PROCESS, "go"),
}
RELEASED = {
    "launch: GO, not watched": Kill(PROCESS, "go", True),
    "launch: STARTED read, not fed": Kill(SUPERVISOR, "_take", when=_message("Started")),
    "launch: host PID not noted": Kill(CUSTODY, "changed", when=note_of(host_pid=is_set)),
    "launch: host PID noted": Kill(CUSTODY, "changed", True, when=note_of(host_pid=is_set)),
    "launch: running noted": Kill(CUSTODY, "changed", True, when=note_of(state="running")),
}
OVER = note_of(generation=1, alive=False)
EXIT = {
    "exit: EXITED read, not fed": Kill(SUPERVISOR, "_take", when=_message("Exited")),
    "exit: not noted": Kill(CUSTODY, "changed", when=note_of(last_exit=is_set)),
    "exit: noted": Kill(CUSTODY, "changed", True, when=note_of(last_exit=is_set)),
    "exit: end of its output staged": Kill(lambda: staging.Batch, "commit"),
    "exit: end of its output told": Kill(lambda: staging.Batch, "commit", True),
    "exit: not acknowledged": Kill(PROCESS, "acknowledge"),
    "exit: acknowledged": Kill(PROCESS, "acknowledge", True),
    "exit: next life noted, not launched": Kill(CUSTODY, "changed", True, when=note_of(generation=2)),
    "exit: next life runs, the old not forgotten": Kill(LIVES, "forget"),
    "exit: reaped, not noted": Kill(CUSTODY, "reaped"),
    "exit: reaped, noted": Kill(CUSTODY, "reaped", True),
}
STOP = {
    "stop: before it is noted": Kill(CUSTODY, "changed", when=note_of(stop_step=0)),
    "stop: noted, not signalled": Kill(PROCESS, "signal"),
    "stop: signalled": Kill(PROCESS, "signal", True),
    "stop: EXITED read, not fed": Kill(SUPERVISOR, "_take", when=_message("Exited")),
    "stop: exit noted": Kill(CUSTODY, "changed", True, when=note_of(last_exit=is_set)),
    "stop: acknowledged": Kill(PROCESS, "acknowledge", True),
    "stop: reaped, not noted": Kill(CUSTODY, "reaped", True),
    "stop: stopped noted": Kill(CUSTODY, "changed", True, when=note_of(state="stopped", generation=1)),
}
LADDER = {
    "stop: noted, not signalled, deaf": Kill(PROCESS, "signal"),
    "stop: between the steps": Kill(CUSTODY, "changed", when=note_of(stop_step=1)),
    "stop: second step noted, not signalled": Kill(PROCESS, "signal", nth=2),
    "stop: second step signalled": Kill(PROCESS, "signal", True, nth=2),
    "stop: kill noted, not done": Kill(PROCESS, "kill"),
    "stop: killed": Kill(PROCESS, "kill", True),
    "stop: killed and reaped, not noted": Kill(CUSTODY, "reaped"),
}
ADOPTION = {
    "adoption: locked": Kill(DIRECTORIES, "__init__", True),
    "adoption: notes read": Kill(LIVES, "read", True),
    "adoption: one is held": Kill(PROCESS, "adopt", True),
    "adoption: some are held": Kill(PROCESS, "adopt", True, nth=4),
    "adoption: HELLO to nobody yet": Kill(PROCESS, "hello"),
    "adoption: HELLO to one": Kill(PROCESS, "hello", True),
    "adoption: HELLO to some": Kill(PROCESS, "hello", True, nth=4),
    **{f"adoption: before note {nth}": Kill(LIVES, "write", nth=nth) for nth in (1, 2, 4, 6)},
    **{f"adoption: after note {nth}": Kill(LIVES, "write", True, nth=nth) for nth in (1, 3, 7)},
    "adoption: STATE read by nobody": Kill(SUPERVISOR, "_told_state"),
    "adoption: STATE read by one": Kill(SUPERVISOR, "_told_state", True),
    "adoption: STATE read by some": Kill(SUPERVISOR, "_told_state", True, nth=3),
    "adoption: before the exit that waited is noted": Kill(CUSTODY, "changed", when=note_of(last_exit=is_set), nth=2),
    "adoption: the life that ended meanwhile acknowledged": Kill(PROCESS, "acknowledge", True),
    "adoption: the life that ended meanwhile reaped": Kill(CUSTODY, "reaped"),
}


def dies_then_starts(site: Site, kill: Kill) -> None:
    site.start(kill)
    site.wait_dead()
    site.start()
    site.wait_answer()


def case_launch(site: Site, kill: Kill, ran: bool) -> list[str]:
    """A worker is launched for the first time. ran: its program may have been begun."""
    site.write_config(pool("web", SAYS))
    site.start(kill)
    site.wait_dead()
    if not ran:
        site.until(lambda: len(processes()) == 1, "who had no GO is gone")
        if site.canaries():
            return [f"ran without GO: {site.canaries()}"]
    before = {one.host_pid for one in processes().values()}
    site.start()
    site.wait_answer()
    worker = site.until_state("web/0", "running")
    site.until(site.canaries, "it is ready")
    wrong = [] if site.canaries() == [f"web/0 {worker['generation']}"] else [f"canaries {site.canaries()}"]
    if ran and worker["init_host_pid"] not in before:
        wrong.append(f"another life than before: {worker}")
    site.until(lambda: site.lines("web") == ["the first line"], f"what it says is in the log once: {site.lines('web')}")
    return wrong + check(site)


def case_set_up(site: Site, step: wire.Step, script: str = SAYS, *, alone: bool) -> list[str]:
    """The supervisor dies after GO, while init is in this step. alone: it is through before there is another one."""
    shell = "/bin/sh" if script else "/not/there"

    def prepare() -> None:
        setattr(clone, "__file__", str(site.home / "clone.py"))  # noqa: B010 - beside which nssup-init is looked for
        real = record.options_of
        setattr(record, "options_of", lambda plan: real(plan) | (128 + step) << 24)  # noqa: B010

    site.write_config(pool("web", script, restart__policy='"never"').replace("/bin/sh", shell))
    holding_init(site.home)
    site.start(Kill(PROCESS, "go", True), prepare=prepare)
    site.wait_dead()
    (init,) = (
        one.host_pid for one in processes().values() if one.host_pid != os.getpid() and one.parent == os.getpid()
    )
    if alone and script:
        site.until(site.canaries, "it has come to its program by itself")
    site.start()
    site.wait_answer()
    if not script:
        failed = site.until_state("web/0", "failed")
        return ([] if failed["reason"] == "exec-failed:ENOENT" else [f"{failed}"]) + check(site)
    worker = site.until_state("web/0", "running")
    site.until(site.canaries, "it is ready")
    site.until(lambda: site.lines("web") == ["the first line"], "what it says is in the log once")
    wrong = [] if site.canaries() == ["web/0 1"] else [f"canaries {site.canaries()}"]
    return wrong + ([] if worker["init_host_pid"] == init else [f"another life than before: {worker}"]) + check(site)


def holding_init(directory: Path) -> None:
    """nssup-init as a test build has it."""
    source = Path(clone.__file__).parent / "native" / "init.c"
    flags = "-Os -ffreestanding -fno-builtin -fno-stack-protector -fno-pie -static -nostdlib -nostartfiles"
    words = ["cc", *flags.split(), "-DNSSUP_FAILPOINTS", "-o", str(directory / "nssup-init"), str(source)]
    subprocess.run(words, check=True)


def case_exit(site: Site, kill: Kill, script: str = ENDS) -> list[str]:
    """The first life ends by itself with code 7, another follows."""
    site.write_config(pool("web", script, **QUICK))
    dies_then_starts(site, kill)
    worker = site.until_state("web/0", "running", generation=2)
    site.until(lambda: len(site.canaries()) >= 2, "it is ready")
    wrong = [] if site.canaries() == ["web/0 1", "web/0 2"] else [f"canaries {site.canaries()}"]
    if worker["last_exit"]["code"] != 7 or worker["restarts"] != 1:
        wrong.append(f"{worker['last_exit']}, {worker['restarts']} restarts")
    return wrong + check(site)


def case_exit_for_good(site: Site, kill: Kill) -> list[str]:
    """The first life ends by itself with code 7, and no other follows."""
    site.write_config(pool("web", ENDS, restart__policy='"never"'))
    dies_then_starts(site, kill)
    worker = site.until_state("web/0", "failed")
    wrong = [] if site.canaries() == ["web/0 1"] else [f"canaries {site.canaries()}"]
    if worker["last_exit"]["code"] != 7:
        wrong.append(f"{worker['last_exit']}")
    return wrong + check(site)


def case_stop(site: Site, kill: Kill, verb: str = "stop") -> list[str]:
    """A worker that obeys is stopped, or restarted; the signal reaches it once."""
    site.write_config(pool("web", OBEYS, stop=LONG_STOP))
    site.start(kill)
    site.wait_answer()
    site.until_state("web/0", "running")
    site.until(site.canaries, "it is ready")
    site.tell(verb, "web/0")
    site.wait_dead()
    site.start()
    site.wait_answer()
    wrong: list[str] = []
    if kill is STOP["stop: before it is noted"]:  # nobody knows of the wish
        site.until_state("web/0", "running")
        return check(site)
    if verb == "restart":
        worker = site.until_state("web/0", "running", generation=2)
        wanted = ["web/0 1", "got 1", "web/0 2"]
    else:
        worker = site.until_state("web/0", "stopped")
        wanted = ["web/0 1", "got 1"]
    site.until(lambda: len(site.canaries()) >= len(wanted), f"canaries {site.canaries()}")
    if site.canaries() != wanted:
        wrong.append(f"canaries {site.canaries()}")
    if worker["last_exit"]["code"] != 5 or worker["last_exit"]["timed_out"]:
        wrong.append(f"{worker['last_exit']}")
    return wrong + check(site)


def case_ladder(site: Site, kill: Kill) -> list[str]:
    """A worker that is deaf is stopped, by all steps; each signal reaches it once."""
    site.write_config(pool("web", DEAF, stop=SHORT_STOP))
    site.start(kill)
    site.wait_answer()
    site.until_state("web/0", "running")
    site.until(site.canaries, "it is ready")
    site.tell("stop", "web/0")
    site.wait_dead()
    site.start()
    site.wait_answer()
    worker = site.until_state("web/0", "stopped")
    wrong = [] if site.canaries() == ["web/0 1", "got 1"] else [f"canaries {site.canaries()}"]
    if worker["last_exit"]["signal"] != "SIGKILL" or not worker["last_exit"]["timed_out"]:
        wrong.append(f"{worker['last_exit']}")
    return wrong + check(site)


def case_adoption(site: Site, kill: Kill) -> list[str]:
    """Workers of every kind are left by one supervisor, the next dies while it takes them over, the third is well."""
    site.write_config(
        pool("web", LONG, workers=3)
        + pool("ends", WHO + 'while [ ! -e "$CANARY.go" ]; do sleep 0.01; done; exit 9', restart__policy='"never"')
        + pool("loops", WHO + "exec sleep 0.0$NSSUP_GENERATION", restart__backoff='{ first = "10s" }')
        + pool("deaf", DEAF, stop='[{ signal = "TERM", wait = "150ms" }, "kill"]')
        + pool("off", LONG, enabled="false")
        + pool("gone", LONG)
    )
    site.start()
    site.wait_answer()
    for worker_id in ("web/0", "web/1", "web/2", "ends/0", "deaf/0", "gone/0"):
        site.until_state(worker_id, "running")
    site.until_state("loops/0", "backoff")
    site.until(lambda: len(site.canaries()) >= 7, "all are ready")
    site.tell("stop", "deaf/0")
    site.until_state("deaf/0", "stopping")
    before = site.status()
    site.kill()
    (site.home / "canary.go").touch()
    ends = before["ends/0"]["host_pid"]
    site.until(lambda: ends not in processes(), "it has ended while nobody watched")
    text = site.config.read_text()
    site.config.write_text(text[: text.index("[pool.gone]")])
    dies_then_starts(site, kill)
    wrong = []
    for worker_id in ("web/0", "web/1", "web/2"):
        worker = site.until_state(worker_id, "running")
        if worker["host_pid"] != before[worker_id]["host_pid"] or worker["generation"] != 1 or not worker["adopted"]:
            wrong.append(f"not the one it was: {worker}")
    if (code := site.until_state("ends/0", "failed")["last_exit"]["code"]) != 9:
        wrong.append(f"ends/0: {code}")
    if (stopped := site.until_state("deaf/0", "stopped")["last_exit"])["signal"] != "SIGKILL":
        wrong.append(f"deaf/0: {stopped}")
    if site.status()["loops/0"]["state"] != "backoff":
        wrong.append(f"loops/0: {site.status()['loops/0']}")
    site.until(lambda: "gone/0" not in site.status(), "who is not wanted any more is gone")
    if len(site.canaries()) != 8 or site.canaries().count("got 1") != 1:
        wrong.append(f"canaries {site.canaries()}")
    return wrong + check(site)


def publishes(name: str) -> Callable[..., bool]:
    return lambda self, event: event.event == name


OWN = {
    "events: nobody knows of the first": Kill(SUPERVISOR, "_publish", True),
    "events: one is published": Kill(SUPERVISOR, "_publish", True, when=publishes("failed")),
    "events: published, not given on": Kill(lambda: journal.Journal, "flush"),
    "events: given on, not written": Kill(
        lambda: logs.LogHub, "append", True, when=lambda hub, log, data: log == "nssup"
    ),
    "events: written, not forgotten": Kill(lambda: backlog.Backlog, "clear", when=lambda self: self.holds),
}


def case_events(site: Site, kill: Kill) -> list[str]:
    """What was published is in the log, though neither that supervisor nor the next one came to write it."""
    site.write_config(pool("once", WHO + "exit 7", restart__policy='"never"') + pool("web", LONG))
    known = site.home / "known"

    def note() -> None:
        real = loop.Supervisor._publish

        def publish(self: loop.Supervisor, event: Event) -> None:
            with known.open("a") as file:
                file.write(f"{event.epoch} {event.seq} {event.event}\n")
            real(self, event)

        setattr(loop.Supervisor, "_publish", publish)  # noqa: B010

    site.start(kill, prepare=note)
    if kill.name == "clear":
        site.wait_answer()
        site.until_events("failed", 1)
        site.tell("kill", "web/0", signal="CONT")
    site.wait_dead()
    published = [tuple(line.split()) for line in known.read_text().splitlines()]
    if kill.name == "clear":
        published.pop()  # it died before it kept that
    site.start(Kill(CUSTODY, "__init__", True))
    site.wait_dead()
    site.start()
    site.wait_answer()
    site.until_state("web/0", "running")
    site.until_state("once/0", "failed")

    def told() -> list[tuple[str, ...]]:
        return [
            (str(e["epoch"]), str(e["seq"]), e["event"]) for e in site.events() if str(e["epoch"]) == published[0][0]
        ]

    site.until(lambda: len(told()) >= len(published), f"{published} are in the log: {told()}")
    return ([] if told() == published else [f"published {published}, in the log {told()}"]) + check(site)


def case_many(site: Site, kill: Kill) -> list[str]:
    """The supervisor dies while 300 launch."""
    site.write_config(pool("web", LONG, workers=300))
    dies_then_starts(site, kill)
    site.until(lambda: all(w["state"] == "running" for w in site.status().values()), "all run", 60)
    site.until(lambda: len(site.canaries()) >= 300, "all are ready", 60)
    wrong = [] if len(site.canaries()) == 300 else [f"{len(site.canaries())} canaries"]
    return wrong + check(site)


def case_clean_end(site: Site, kill: Kill) -> list[str]:
    """The supervisor is told to end, and dies meanwhile: the next one has everything up again."""
    site.write_config(pool("web", OBEYS, stop=LONG_STOP, workers=2))
    site.start(kill)
    site.wait_answer()
    site.until(lambda: len(site.canaries()) >= 2, "they are ready")
    for worker_id in ("web/0", "web/1"):
        site.until_state(worker_id, "running")
    signal.pidfd_send_signal(site.pidfd, signal.SIGTERM)
    site.wait_dead()
    site.start()
    site.wait_answer()
    for worker_id in ("web/0", "web/1"):
        site.until_state(worker_id, "running", generation=1)
    wrong = [f"got {n}" for n in (1, 2) if site.canaries().count(f"got {n}") > 2]
    if kill.name == "forget":
        site.canary.write_text("")  # who was forgotten begins with its first life again
    return wrong + check(site)


# --- other ways to be left -------------------------------------------------------------------------------------------


def up_and_killed(site: Site, pools: str, *worker_ids: str) -> dict[str, Json]:
    """The workers as they were when their supervisor was killed."""
    site.write_config(pools)
    site.start()
    site.wait_answer()
    before = {worker_id: site.until_state(worker_id, "running") for worker_id in worker_ids}
    site.until(lambda: len(site.canaries()) >= len(worker_ids), "they are ready")
    site.kill()
    return before


def same_life(before: Json, after: Json) -> list[str]:
    kept = ("host_pid", "ns_pid", "init_host_pid", "generation", "restarts", "started_at", "namespaces")
    wrong = [f"{key} was {before[key]}, is {after[key]}" for key in kept[:5] if before[key] != after[key]]
    return wrong if after["adopted"] else [*wrong, "not adopted"]


def case_init_killed(site: Site) -> list[str]:
    """Somebody kills inits while nobody watches: no code is invented."""
    before = up_and_killed(
        site, pool("web", LONG, **QUICK) + pool("once", LONG, restart__policy='"never"'), "web/0", "once/0"
    )
    for worker in before.values():
        os.kill(worker["init_host_pid"], signal.SIGKILL)
    site.start()
    site.wait_answer()
    again, once = site.until_state("web/0", "running", generation=2), site.until_state("once/0", "failed")
    ends = [again["last_exit"], once["last_exit"]]
    wrong = [f"{end}" for end in ends if (end["reason"], end["code"], end["signal"]) != ("init-killed", None, None)]
    return wrong + check(site)


def case_init_stopped(site: Site) -> list[str]:
    """Inits are frozen when the next supervisor comes: it is not held up, and takes them as they thaw."""
    ids = ("web/0", "web/1", "web/2")
    before = up_and_killed(site, pool("web", LONG, workers=3, stop=SHORT_STOP), *ids)
    for worker_id in ids[:2]:
        os.kill(before[worker_id]["init_host_pid"], signal.SIGSTOP)
    site.start()
    site.wait_answer()
    wrong = [what for worker_id in ids for what in same_life(before[worker_id], site.status()[worker_id])]
    site.tell("stop", "web/0")
    if (end := site.until_state("web/0", "stopped")["last_exit"])["signal"] != "SIGKILL":
        wrong.append(f"a frozen one was stopped: {end}")
    os.kill(before["web/1"]["host_pid"], signal.SIGUSR1)
    os.kill(before["web/1"]["init_host_pid"], signal.SIGCONT)
    if (end := site.until_state("web/1", "running", generation=2)["last_exit"])["signal"] != "SIGUSR1":
        wrong.append(f"a thawed one ended: {end}")
    return wrong + check(site)


def case_two_at_once(site: Site) -> list[str]:
    """Two supervisors start at the same moment: one of them has everything."""
    before = up_and_killed(site, pool("web", LONG, workers=3), "web/0", "web/1", "web/2")
    wrong = []
    for _ in range(5):
        site.start()
        first, site.pidfd = (site.host_pid, site.pidfd), -1
        site.start()
        rivals = [first, (site.host_pid, site.pidfd)]
        poll = select.poll()
        for _, pidfd in rivals:
            poll.register(pidfd, select.POLLIN)
        gone = [fd for fd, _ in poll.poll(PATIENCE * 1000)]
        if len(gone) != 1:
            return [f"{len(gone)} of two gave up"]
        ((site.host_pid, site.pidfd),) = (rival for rival in rivals if rival[1] != gone[0])
        os.close(gone[0])
        reap()
        site.wait_answer()
        wrong += [what for worker_id, worker in before.items() for what in same_life(worker, site.status()[worker_id])]
        wrong += check(site)
        site.kill()
    return wrong


def rewritten(site: Site, change: Callable[[record.Slot], record.Slot | bytes]) -> bytes:
    """Changes the notes of a supervisor that is dead. Returns what they were."""
    path = site.runtime / "lives"
    before = path.read_bytes()
    data = bytearray(before)
    for at in range(0, len(data), record.SLOT_SIZE):
        slot = record.decode_slot(bytes(data[at : at + record.SLOT_SIZE]))
        if slot is not None:
            changed = change(slot)
            data[at : at + record.SLOT_SIZE] = changed if isinstance(changed, bytes) else record.encode_slot(changed)
    path.write_bytes(data)
    return before


def case_stranger(site: Site) -> list[str]:
    """Forged notes name a process that is none of ours: it is never signalled, and nothing is started in its place."""
    before = up_and_killed(site, pool("web", LONG), "web/0")
    os.kill(before["web/0"]["init_host_pid"], signal.SIGKILL)
    stranger = os.fork()
    if stranger == 0:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while True:
            signal.pause()
    pidfd = os.pidfd_open(stranger)
    who = lives.identify(pidfd, stranger)
    os.close(pidfd)
    rewritten(
        site,
        lambda slot: slot._replace(init_host_pid=stranger, handle=who.handle, pidfd_inode=who.pidfd_inode),
    )
    wrong = []
    for _ in range(2):
        site.start()
        site.wait_answer()
        worker = site.status()["web/0"]
        if worker["state"] != "lost":
            wrong.append(f"{worker}")
        site.tell("start", "web/0")
        site.tell("restart", "web/0")
        site.tell("kill", "web/0", signal="KILL", tree=True)
        if site.status()["web/0"]["state"] != "lost" or len(site.canaries()) != 1:
            wrong.append(f"then {site.status()}, {site.canaries()}")
        site.stop()
    site.start()
    site.wait_answer()
    site.tell("stop", "web/0")
    site.until_state("web/0", "stopped")
    site.tell("start", "web/0")
    site.until_state("web/0", "running", generation=2)
    reap()
    if stranger not in processes() or processes()[stranger].zombie:
        wrong.append("the stranger is gone")
    pending = Path(f"/proc/{stranger}/status").read_text().split("SigPnd:")[1].split()[0]
    if int(pending, 16):
        wrong.append(f"the stranger was signalled: {pending}")
    os.kill(stranger, signal.SIGKILL)
    return wrong + check(site)


def case_reused(site: Site, masked: int) -> list[str]:
    """Somebody else has the number of an init that ended while nobody watched. masked: ways of telling them apart that
    this kernel is made not to have."""

    def refuse(*_: object) -> NoReturn:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    def mask() -> None:
        if masked > 0:
            setattr(_pidfd, "handle", refuse)  # noqa: B010
            setattr(_pidfd, "reopen", refuse)  # noqa: B010
        if masked > 1:
            setattr(lives, "_inode", lambda pidfd: 0)  # noqa: B010

    site.write_config(pool("web", LONG, workers=2, **QUICK))
    site.start(prepare=mask)
    site.wait_answer()
    before = {worker_id: site.until_state(worker_id, "running") for worker_id in ("web/0", "web/1")}
    site.until(lambda: len(site.canaries()) >= 2, "they are ready")
    site.kill()
    number = before["web/0"]["init_host_pid"]
    os.kill(number, signal.SIGKILL)
    site.until(lambda: number not in processes(), "it is reaped")
    select.select([], [], [], 0.02)  # start times are told in ticks of 10 ms
    Path("/proc/sys/kernel/ns_last_pid").write_text(str(number - 1))
    stranger = os.fork()
    if stranger == 0:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while True:
            signal.pause()
    assert stranger == number, "the kernel gave another number"
    site.start(prepare=mask)
    site.wait_answer()
    worker = site.until_state("web/0", "running", generation=2)
    wrong = [] if worker["last_exit"]["reason"] == "init-killed" else [f"{worker}"]
    wrong += same_life(before["web/1"], site.status()["web/1"])
    if processes()[stranger].zombie:
        wrong.append("the stranger is gone")
    os.kill(stranger, signal.SIGKILL)
    return wrong + check(site)


def case_elsewhere(site: Site) -> list[str]:
    """Notes of another boot: all told as lost, no signal, and the pool begins anew."""
    before = up_and_killed(site, pool("web", LONG, workers=2), "web/0", "web/1")
    rewritten(site, lambda slot: slot._replace(boot_id=bytes(16)))
    site.start()
    site.wait_answer()
    for worker_id in before:
        site.until_state(worker_id, "running")
    there = processes()
    wrong = [f"{worker_id} was signalled" for worker_id, worker in before.items() if worker["host_pid"] not in there]
    lost = site.until_events("lost", 2)
    if sorted((event["worker"], event["reason"]) for event in lost) != [(one, "lost:reboot") for one in before]:
        wrong.append(f"lost: {lost}")
    for worker in before.values():
        os.kill(worker["init_host_pid"], signal.SIGKILL)
    site.canary.write_text("")
    return wrong + check(site)


def later_version(slot: record.Slot) -> bytes:
    data = bytearray(record.encode_slot(slot)[:-4])
    data[4] += 1
    return bytes(data) + zlib.crc32(data).to_bytes(4, "little")


def case_later_version(site: Site) -> list[str]:
    """Notes of a later version: the start is refused, the workers go on."""
    before = up_and_killed(site, pool("web", LONG, workers=2), "web/0", "web/1")
    notes = rewritten(site, later_version)
    site.start()
    site.wait_dead()
    wrong = [] if "later version" in site.said() else [site.said()]
    (site.runtime / "lives").write_bytes(notes)
    site.start()
    site.wait_answer()
    wrong += [what for worker_id, worker in before.items() for what in same_life(worker, site.status()[worker_id])]
    return wrong + check(site)


def case_no_room(site: Site) -> list[str]:
    """The limit on descriptors is too low for what there is: the start is refused, the workers go on."""
    ids = [f"web/{index}" for index in range(24)]
    before = up_and_killed(site, pool("web", LONG, workers=24), *ids)
    site.start(prepare=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)))
    site.wait_dead()
    wrong = [] if "cannot take over the workers of web" in site.said() else [site.said()]
    site.start()
    site.wait_answer()
    wrong += [what for worker_id, worker in before.items() for what in same_life(worker, site.status()[worker_id])]
    return wrong + check(site)


def case_lost_epoch(site: Site) -> list[str]:
    """The file of epochs is gone: inits listen all the same."""
    before = up_and_killed(site, pool("web", OBEYS), "web/0")
    for _ in range(3):
        site.start()
        site.wait_answer()
        site.kill()
    (site.home / "s" / "epoch").unlink()
    site.start()
    site.wait_answer()
    wrong = same_life(before["web/0"], site.status()["web/0"])
    site.tell("stop", "web/0")
    if (end := site.until_state("web/0", "stopped")["last_exit"])["code"] != 5:
        wrong.append(f"{end}")
    return wrong + check(site)


def case_unreaped(site: Site) -> list[str]:
    """Nobody reaps orphans here: an init that is a zombie is gone all the same."""
    global reaping
    reaping = False
    try:
        before = up_and_killed(
            site,
            pool("web", LONG, workers=2, **QUICK) + pool("ends", OBEYS, restart__policy='"never"'),
            "web/0",
            "web/1",
            "ends/0",
        )
        os.kill(before["web/0"]["init_host_pid"], signal.SIGKILL)
        site.start()
        site.wait_answer()
        site.until_state("web/0", "running", generation=2)
        os.kill(before["ends/0"]["host_pid"], signal.SIGTERM)
        end = site.until_state("ends/0", "failed")["last_exit"]
        site.kill()
        os.kill(site_init(before, "web/1"), signal.SIGKILL)
        site.start()
        site.wait_answer()
        site.until_state("web/1", "running", generation=2)
        site.until_state("web/0", "running", generation=2)
    finally:
        reaping = True
    return ([] if end["code"] == 5 else [f"{end}"]) + check(site)


def site_init(before: dict[str, Json], worker_id: str) -> int:
    init: int = before[worker_id]["init_host_pid"]
    return init


def case_notes_fail(site: Site) -> list[str]:
    """What cannot be noted must not be left behind."""

    def refuse() -> None:
        real = lives.Lives.write

        def write(self: lives.Lives, worker_id: str, generation: int, step: int, *more: Any) -> None:  # noqa: ANN401
            if worker_id == "web/1" and step != record.SLOT_SPAWNING:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(self, worker_id, generation, step, *more)

        setattr(lives.Lives, "write", write)  # noqa: B010

    site.write_config(pool("web", LONG, workers=2))
    site.start(prepare=refuse)
    site.wait_answer()
    before = {worker_id: site.until_state(worker_id, "running") for worker_id in ("web/0", "web/1")}
    site.until(lambda: len(site.canaries()) >= 2, "they are ready")
    site.until_events("notes_failed", 1)
    site.kill()
    site.until(lambda: before["web/1"]["host_pid"] not in processes(), "who is not noted is gone")
    site.canary.write_text("")
    site.start()
    site.wait_answer()
    wrong = same_life(before["web/0"], site.status()["web/0"])
    site.until_state("web/1", "running")
    return wrong + check(site)


def case_die(site: Site) -> list[str]:
    """Workers that are to die with their supervisor are gone with all they started, and come up again.

    Within 30 ms on a machine that has nothing else to do, which scripts/bench shows.
    """
    script = WHO + "setsid sleep 100000 & exec sleep 100000"
    site.write_config(pool("web", script, workers=4, on_supervisor_death='"die"', **QUICK))
    took = []
    for _ in range(5):
        site.start()
        site.wait_answer()
        for index in range(4):
            site.until_state(f"web/{index}", "running")
        site.until(lambda: len(processes()) >= 2 + 3 * 4, "all of them are there")
        inits = [os.pidfd_open(worker["init_host_pid"]) for worker in site.status().values()]
        began = time.monotonic()
        signal.pidfd_send_signal(site.pidfd, signal.SIGKILL)
        for pidfd in inits:
            assert _readable(pidfd, PATIENCE), "it outlived its supervisor"
        took.append(time.monotonic() - began)
        site.wait_dead()
        for pidfd in inits:
            os.close(pidfd)
    site.start()
    site.wait_answer()
    site.until(lambda: all(worker["state"] == "running" for worker in site.status().values()), "all are up again")
    site.took = min(took)
    return ([] if min(took) < AT_ONCE else [f"took {took}"]) + check(site)


def nobody() -> None:
    """Becomes somebody who is not root."""
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
    _call("prctl", _PR_SET_DUMPABLE, 1, 0, 0, 0)  # as a process that was his from its exec on


def give_to_nobody(site: Site) -> None:
    for path in (site.home, site.canary):
        os.chown(path, 65534, 65534)


def case_id_maps(site: Site, kill: Kill) -> list[str]:
    """The supervisor dies while it writes the maps of a user namespace."""
    give_to_nobody(site)
    site.write_config(pool("web", SAYS))
    site.start(kill, prepare=nobody)
    site.wait_dead()
    site.until(lambda: len(processes()) == 1, "who had no GO is gone")
    wrong = [f"ran without GO: {site.canaries()}"] if site.canaries() else []
    site.start(prepare=nobody)
    site.wait_answer()
    site.until_state("web/0", "running")
    site.until(site.canaries, "it is ready")
    return wrong + ([] if site.canaries() == ["web/0 1"] else [f"canaries {site.canaries()}"]) + check(site)


def opens(name: str) -> Callable[..., bool]:
    return lambda path, *args, **options: str(path).endswith(name)


ID_MAPS = {
    "id maps: before the first": Kill(lambda: clone, "write_id_maps"),
    "id maps: groups denied, no user mapped": Kill(lambda: os, "open", when=opens("/uid_map")),
    "id maps: user mapped, no group": Kill(lambda: os, "open", when=opens("/gid_map")),
    "id maps: written": Kill(lambda: clone, "write_id_maps", True),
}


def case_unprivileged(site: Site) -> list[str]:
    """Somebody who is not root has his workers in user namespaces of their own, and takes them over as well."""
    give_to_nobody(site)
    site.write_config(pool("web", LONG, workers=2) + pool("ends", OBEYS, restart__policy='"never"'))
    ids = ("web/0", "web/1", "ends/0")
    site.start(prepare=nobody)
    site.wait_answer()
    before = {worker_id: site.until_state(worker_id, "running") for worker_id in ids}
    site.until(lambda: len(site.canaries()) >= 3, "they are ready")
    site.kill()
    os.kill(before["ends/0"]["host_pid"], signal.SIGTERM)
    site.start(prepare=nobody)
    site.wait_answer()
    wrong = [what for worker_id in ids[:2] for what in same_life(before[worker_id], site.status()[worker_id])]
    if (end := site.until_state("ends/0", "failed")["last_exit"])["code"] != 5:
        wrong.append(f"{end}")
    return wrong + check(site)


def embedded(site: Site, durable: bool, *, then: Callable[[loop.Supervisor], None]) -> int:
    """A program with a supervisor of its own: does `then` as soon as its two workers run, and goes on."""

    async def program() -> None:
        home = site.home
        spec = SupervisorSpec(
            state_dir=f"{home}/s", runtime_dir=f"{home}/s/run", log_dir=f"{home}/l", socket=f"{home}/s/run/nssup.sock"
        )
        supervisor = await loop.Supervisor(spec if durable else None).__aenter__()
        running: asyncio.Queue[str] = asyncio.Queue()
        supervisor.subscribe(lambda event: running.put_nowait(event.event) if event.event == "started" else None)
        command = ("/bin/sh", "-c", LONG)
        supervisor.add_pool(PoolSpec(name="web", command=command, workers=2, env={"CANARY": str(site.canary)}))
        for _ in range(2):
            await running.get()
        then(supervisor)

    asyncio.run(program())
    gc.collect()
    (site.home / "ready").touch()
    while True:
        signal.pause()


def policy_case(changes: Sequence[Literal["keep", "die"]], site: Site) -> list[str]:
    """What is to become of workers is changed while they run; then their supervisor is killed."""

    def change(supervisor: loop.Supervisor) -> None:
        for what in changes:
            supervisor.set_on_supervisor_death("web", what)
        die()

    site.write_config(pool("web", LONG, workers=2))
    site.start(body=lambda: embedded(site, True, then=change))
    site.wait_dead()
    if changes[-1] == "die":
        site.until(lambda: len(processes()) == 1, "all are gone")
        site.canary.write_text("")  # a worker that died with its supervisor is launched again
    there = processes()
    site.start()
    site.wait_answer()
    for index in range(2):
        worker = site.until_state(f"web/{index}", "running")
        if (worker["init_host_pid"] in there) != (changes[-1] == "keep"):
            return [f"after {changes}: {worker}"]
    return check(site)


def case_abandoned(site: Site, durable: bool) -> list[str]:
    """A program loses its Supervisor and goes on: who was to die with it is gone."""

    def lose(supervisor: loop.Supervisor) -> None:
        if durable:
            supervisor.set_on_supervisor_death("web", "die")

    site.start(body=lambda: embedded(site, durable, then=lose))
    site.until((site.home / "ready").exists, "it has lost it")
    # It is their parent and does not know it: they are zombies.
    site.until(lambda: sum(not one.zombie for one in processes().values()) == 2, "its workers are gone")
    return [] if len(site.canaries()) <= 2 else [f"{site.canaries()}"]


def slow_clone(directory: Path) -> object:
    """The clone shim as a test build has it, loaded from a file of its own."""
    native = Path(clone.__file__).parent / "native"
    library = directory / "_clone.abi3.so"
    subprocess.run(
        [
            *("cc", "-O2", "-std=gnu11", "-shared", "-fPIC", "-DNSSUP_FAILPOINTS", "-DPy_LIMITED_API=0x030b0000"),
            *("-I", sysconfig.get_path("include"), "-o", str(library), str(native / "clone.c")),
        ],
        check=True,
    )
    loader = importlib.machinery.ExtensionFileLoader("nssup._clone", str(library))
    spec = importlib.util.spec_from_loader("nssup._clone", loader)
    assert spec is not None
    return importlib.util.module_from_spec(spec)


def case_inside_clone(site: Site) -> list[str]:
    """The supervisor dies while its clone's child is on the way to its exec: the child goes on, and runs nothing."""

    def prepare() -> None:
        os.environ["NSSUP_FAILPOINT"] = "exec"
        setattr(clone, "_clone", slow_clone(site.home))  # noqa: B010

    site.write_config(pool("web", LONG))
    site.start(prepare=prepare)
    child: list[int] = []

    def cloned() -> bool:
        child[:] = [one.host_pid for one in processes().values() if one.parent == site.host_pid and one.name != "cc"]
        return bool(child) and len(nspids(child[0])) > 1

    site.until(cloned, "it clones")
    site.kill()
    site.until(lambda: len(processes()) == 1, "who had no GO is gone")
    wrong = [f"ran without GO: {site.canaries()}"] if site.canaries() else []
    site.start()
    site.wait_answer()
    site.until_state("web/0", "running")
    site.until(site.canaries, "it is ready")
    return wrong + ([] if site.canaries() == ["web/0 1"] else [f"canaries {site.canaries()}"]) + check(site)


def nspids(host_pid: int) -> list[str]:
    """Its PID in each PID namespace from ours down; empty when it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{host_pid}/status").read_text().splitlines():
            if line.startswith("NSpid:"):
                return line.split()[1:]
    return []


def case_own_error(site: Site, again: bool) -> list[str]:
    """A bug of ours ends the supervisor, the first or (again) the next one: the workers go on."""

    def bug() -> None:
        def fail(*args: object, **options: object) -> None:
            raise ZeroDivisionError("a bug")

        setattr(ctl.ControlServer, "__init__", fail)  # noqa: B010

    site.write_config(pool("web", LONG, workers=3))
    if again:
        site.start()
        site.wait_answer()
        site.until(lambda: len(site.canaries()) >= 3, "they are ready")
        site.kill()
    site.start(prepare=bug)
    site.wait_dead()
    wrong = [] if "ZeroDivisionError" in site.said() else [site.said()]
    there = processes()
    site.start()
    site.wait_answer()
    site.until(lambda: len(site.canaries()) >= 3, "they are ready")
    for index in range(3):
        worker = site.until_state(f"web/{index}", "running")
        if worker["init_host_pid"] not in there or worker["generation"] != 1:
            wrong.append(f"{worker}")
    return wrong + check(site)


def case_late_supervisor(site: Site, frozen: bool) -> list[str]:
    """The supervisor is stopped, or busy, for longer than a stop may take: who was in time is not killed as late."""

    def busy() -> None:
        real = loop.Supervisor.is_adopted

        def slow(self: loop.Supervisor, worker_id: str) -> bool:
            if self.workers.workers[worker_id].deadline is not None:
                select.select([], [], [], 1.5)
            return real(self, worker_id)

        setattr(loop.Supervisor, "is_adopted", slow)  # noqa: B010

    script = OBEYS.replace("exit 5", "sleep 0.05; exit 5")
    site.write_config(pool("web", script, stop='[{ signal = "TERM", wait = "500ms" }, "kill"]'))
    site.start(prepare=None if frozen else busy)
    site.wait_answer()
    before = site.until_state("web/0", "running")
    site.until(site.canaries, "it is ready")
    site.tell("stop", "web/0")
    if frozen:
        signal.pidfd_send_signal(site.pidfd, signal.SIGSTOP)
        late = time.monotonic() + 0.6
        site.until(lambda: time.monotonic() > late and before["host_pid"] not in processes(), "it is gone")
        signal.pidfd_send_signal(site.pidfd, signal.SIGCONT)
    end = site.until_state("web/0", "stopped")["last_exit"]
    return ([] if (end["code"], end["timed_out"]) == (5, False) else [f"{end}"]) + check(site)


def case_die_with_a_thread(site: Site) -> list[str]:
    """Whichever thread launched them, and though that is gone: they die with the process, and not before."""
    durable = SupervisorSpec(
        state_dir=f"{site.home}/s",
        runtime_dir=f"{site.home}/s/run",
        log_dir=f"{site.home}/l",
        socket=f"{site.home}/s/run/nssup.sock",
    )

    async def launch(ready: threading.Event, end: threading.Event) -> None:
        async with loop.Supervisor(durable) as supervisor:
            running: asyncio.Queue[str] = asyncio.Queue()
            supervisor.subscribe(lambda event: running.put_nowait(event.event) if event.event == "started" else None)
            command = ("/bin/sh", "-c", WHO + "setsid sleep 100000 & exec sleep 100000")
            spec = PoolSpec(name="web", command=command, env={"CANARY": str(site.canary)}, on_supervisor_death="die")
            launcher = threading.Thread(target=supervisor.add_pool, args=[spec])
            launcher.start()
            launcher.join()
            await running.get()
            ready.set()
            await asyncio.get_running_loop().run_in_executor(None, end.wait)

    def program() -> int:
        ready, end = threading.Event(), threading.Event()
        threading.Thread(target=asyncio.run, args=[launch(ready, end)], daemon=True).start()
        ready.wait()
        (site.home / "ready").touch()
        while True:
            signal.pause()

    site.start(body=program)
    site.until((site.home / "ready").exists, "it runs")
    site.until(lambda: len(processes()) >= 5, "all of it is there")
    (init,) = (one.host_pid for one in processes().values() if one.name == "nssup-init")
    pidfd = os.pidfd_open(init)
    began = time.monotonic()
    site.kill()
    assert _readable(pidfd, PATIENCE)
    os.close(pidfd)
    site.took = time.monotonic() - began
    site.until(lambda: len(processes()) == 1, "nothing is left")
    return [] if site.took < AT_ONCE else [f"took {site.took}"]


OTHER: dict[str, Callable[[Site], list[str]]] = {
    **{
        f"set-up: {step.name.lower()}": functools.partial(case_set_up, step=step, alone=False)
        for step in (wire.Step.PID_ONE, wire.Step.MOUNT_PROC, wire.Step.DUMPABLE, wire.Step.SESSION)
    },
    "set-up: descriptors, alone": functools.partial(case_set_up, step=wire.Step.DESCRIPTORS, alone=True),
    "set-up: hostname, alone": functools.partial(case_set_up, step=wire.Step.HOSTNAME, alone=True),
    "set-up: exec fails": functools.partial(case_set_up, step=wire.Step.SESSION, script="", alone=True),
    "launch: inside clone": case_inside_clone,
    "a bug of ours": functools.partial(case_own_error, again=False),
    "a bug of ours, then": functools.partial(case_own_error, again=True),
    "late: frozen": functools.partial(case_late_supervisor, frozen=True),
    "late: busy": functools.partial(case_late_supervisor, frozen=False),
    "die, by a thread that is gone": case_die_with_a_thread,
    "policy: die": functools.partial(policy_case, ("die",)),
    "policy: die, keep": functools.partial(policy_case, ("die", "keep")),
    "policy: die, keep, die": functools.partial(policy_case, ("die", "keep", "die")),
    "abandoned": functools.partial(case_abandoned, durable=False),
    "abandoned, durable": functools.partial(case_abandoned, durable=True),
    "init killed": case_init_killed,
    "init frozen": case_init_stopped,
    "two at once": case_two_at_once,
    "a stranger in the notes": case_stranger,
    "PID reused": functools.partial(case_reused, masked=0),
    "PID reused, no handles": functools.partial(case_reused, masked=1),
    "PID reused, no inodes": functools.partial(case_reused, masked=2),
    "another boot": case_elsewhere,
    "a later version": case_later_version,
    "no descriptors": case_no_room,
    "the epoch is lost": case_lost_epoch,
    "nobody reaps": case_unreaped,
    "notes fail": case_notes_fail,
    "die": case_die,
    "not root": case_unprivileged,
}


def cases() -> dict[str, Callable[[Site], list[str]]]:
    """Name -> what is to be done at a site; its result is what was wrong."""
    found: dict[str, Callable[[Site], list[str]]] = {}

    def add(kills: dict[str, Kill], suffix: str, do: Callable[..., list[str]], *more: object) -> None:
        for name, kill in kills.items():
            found[name + suffix] = functools.partial(_with, do, kill, more)

    add(LAUNCH, "", case_launch, False)
    add(RELEASED, "", case_launch, True)
    add(ID_MAPS, "", case_id_maps)
    add(EXIT, "", case_exit)
    add({name: EXIT[name] for name in list(EXIT)[:7]}, ", a tree left", case_exit, FORKS)
    add({name: kill for name, kill in EXIT.items() if "next life" not in name}, ", for good", case_exit_for_good)
    add(STOP, "", case_stop, "stop")
    restart = {name.replace("stop:", "restart:"): kill for name, kill in STOP.items() if "stopped" not in name}
    add(restart, "", case_stop, "restart")
    add(LADDER, "", case_ladder)
    add(OWN, "", case_events)
    add(ADOPTION, "", case_adoption)
    add({f"300 launch: at note {nth}": Kill(LIVES, "write", nth=nth) for nth in (40, 400, 900)}, "", case_many)
    ends = {"noted": STOP["stop: noted, not signalled"], "exit noted": STOP["stop: exit noted"]}
    ends["one has stopped"] = Kill(CUSTODY, "reaped", True)
    ends["notes forgotten"] = Kill(LIVES, "forget", nth=2)
    add({f"clean end: {name}": kill for name, kill in ends.items()}, "", case_clean_end)
    return found | OTHER


def _with(do: Callable[..., list[str]], kill: Kill, more: tuple[object, ...], site: Site) -> list[str]:
    return do(site, kill, *more)


@contextlib.contextmanager
def a_site(pools: str = "") -> Iterator[Site]:
    """A site that is gone on the way out, with all its processes."""
    home = Path(tempfile.mkdtemp(prefix="nssup-takeover-"))
    site = Site(home, pools)
    try:
        yield site
    finally:
        while others := [host_pid for host_pid in processes() if host_pid != os.getpid()]:
            for host_pid in others:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(host_pid, signal.SIGKILL)  # in a namespace of our own: nobody else can be meant
            reap()
        if site.pidfd >= 0:
            os.close(site.pidfd)
        shutil.rmtree(home, ignore_errors=True)


def run_case(name: str) -> Json:
    began = time.monotonic()
    with a_site() as site:
        try:
            wrong = cases()[name](site)
        except Exception as error:
            wrong = [f"{type(error).__name__}: {error}", *traceback.format_exc().splitlines()[-6:], site.said()]
        return {
            "name": name,
            "wrong": wrong,
            "seconds": time.monotonic() - began,
            "answer": site.slowest,
            "took": site.took,
        }


def points(names: list[str], part: str) -> int:
    """One line of JSON a case. part: K/N, every Nth case from the Kth on."""
    first, step = map(int, part.split("/"))
    chosen = [name for name in cases() if not names or any(part in name for part in names)][first::step]
    wrong = 0
    for name in chosen:
        result = run_case(name)
        wrong += bool(result["wrong"])
        print(json.dumps(result), flush=True)
    return min(wrong, 1)


# --- at random -------------------------------------------------------------------------------------------------------


def code_of(index: int, generation: int) -> int:
    """With what a life of the pool `codes` or `forks` ends."""
    return (generation * 7 + index * 3) % 250 + 1


CODE = "exit $(( (NSSUP_GENERATION * 7 + NSSUP_INDEX * 3) % 250 + 1 ))"


class Crowd:
    """Workers of all kinds, and operators who want something of them all the time."""

    def __init__(self, site: Site, workers: int, chance: random.Random) -> None:
        self.site, self.chance = site, chance
        crash.prepare(site.home)
        sizes = {"codes": workers // 5, "forks": workers // 10, "loops": workers // 10, "deaf": workers // 10}
        sizes["says"] = workers // 10
        sizes = {name: max(size, 1) for name, size in sizes.items()} | {"off": 1}
        self.sizes = sizes | {"long": max(workers - sum(sizes.values()), 1)}
        rest = f"sleep 0.{chance.randrange(1, 5)}$(( (NSSUP_INDEX + NSSUP_GENERATION) % 10 ))"
        backoff = {"restart__backoff": '{ first = "20ms", max = "100ms" }'}
        scripts = {
            "long": (LONG, {}),
            "codes": (WHO + f"{rest}; {CODE}", backoff),
            "forks": (WHO + f"(setsid sh -c 'trap \"\" TERM; sleep 100000' &); {rest}; {CODE}", backoff),
            "loops": (WHO + "exit 1", {"restart__backoff": '{ first = "200ms", max = "1s" }'}),
            "deaf": (DEAF, {"stop": '[{ signal = "TERM", wait = "150ms" }, "kill"]'} | backoff),
            "off": (LONG, {"enabled": "false"}),
        }
        says = f"[pool.says]\ncommand = {crash.program(site.home, 0, 20)}\nworkers = {self.sizes['says']}\n"
        site.write_config(
            says
            + "".join(pool(name, *scripts[name][:1], workers=self.sizes[name], **scripts[name][1]) for name in scripts)
        )
        self.before: dict[str, Json] = {}

    def long_ones(self) -> dict[str, Json]:
        """Those that run on."""
        found = self.site.status()
        return {worker_id: one for worker_id, one in found.items() if one["pool"] in ("long", "says")}

    def settle(self) -> None:
        """Until those that run on do, for the first time."""
        self.site.until(
            lambda: all(worker["state"] == "running" for worker in self.long_ones().values()), "all run", 60
        )
        self.before = self.long_ones()

    def disturb(self) -> None:
        """An operator's whim."""
        index = self.chance.randrange(self.sizes["deaf"])
        self.site.tell(self.chance.choice(("stop", "start", "restart")), f"deaf/{index}")

    def changed(self) -> list[str]:
        """Of those that run on: who is not the one he was."""
        now = self.long_ones()
        return [f"{i}: {what}" for i, worker in self.before.items() for what in same_life(worker, now[i])]

    def rest(self) -> None:
        """Everything that comes and goes is stopped, so that one moment is like the next."""
        pools = [name for name in self.sizes if name != "long"]
        self.site.tell("stop", *pools)
        down = ("stopped", "failed", "done")
        self.site.until(
            lambda: all(w["state"] in down for w in self.site.status().values() if w["pool"] != "long"),
            "all others are down",
            30,
        )

    def output(self) -> crash.Outcome:
        """Whether what was written is in the log, once all have ended."""
        found = crash.Outcome(0, self.sizes["says"])
        crash.compare(self.site.home, [self.site.home / "l" / "says.jsonl"], found)
        return found

    def adopted_twice(self) -> list[str]:
        """Workers that one and the same supervisor says to have taken over more than once."""
        told = collections.Counter(
            (event["epoch"], event["worker"]) for event in self.site.events() if event["event"] == "adopted"
        )
        return [f"adopted {count} times in epoch {key[0]}: {key[1]}" for key, count in told.items() if count > 1]

    def wrong_exits(self, until: float) -> tuple[int, list[str]]:
        """(ends of lives told before that time, those that are not what the program did)."""
        wrong, told = [], set()
        for event in self.site.events():
            name, _, index = event.get("worker", "").partition("/")
            if "exit" not in event or name not in ("codes", "forks", "loops") or seconds_of(event["ts"]) > until:
                continue
            generation = event.get("detail", {}).get("ended", event)["generation"]
            told.add((event["worker"], generation))
            if event["exit"]["code"] != (1 if name == "loops" else code_of(int(index), generation)):
                wrong.append(f"{event['worker']} life {generation}: {event['exit']['reason']}")
        return len(told), wrong


def seconds_of(stamp: str) -> float:
    return datetime.datetime.fromisoformat(stamp).timestamp()


def random_kills(kills: int, workers: int, seed: int) -> int:
    """The supervisor is killed at random instants, and started again at once or a while later."""
    chance = random.Random(seed)
    adoption = [0.0]
    wrong: list[str] = []
    with a_site() as site:
        crowd = Crowd(site, workers, chance)
        site.start()
        site.wait_answer()
        crowd.settle()
        for number in range(kills):
            moment = time.monotonic() + chance.choice((0.02, 0.1, 0.4)) * chance.random()
            while time.monotonic() < moment:
                if site.answers() and chance.random() < 0.3:
                    crowd.disturb()
                select.select([], [], [], 0.005)
            site.kill()
            away = time.monotonic() + chance.choice((0.0, 0.0, 0.05, 0.3)) * chance.random()
            while time.monotonic() < away:
                reap()
            began = time.monotonic()
            site.start()
            if number % 5 == 4 or chance.random() < 0.5:
                site.wait_answer()
                adoption.append(time.monotonic() - began)
                wrong += crowd.changed()
            if wrong:
                break
        site.until(site.answers, "it answers", 30)
        wrong += crowd.changed()
        until = time.time()
        crowd.rest()
        site.until(lambda: len(site.events()) > 0, "events are there")
        wrong += check(site)
        ends, wrong_exits = crowd.wrong_exits(until)
        lives_seen = len(site.canaries())
        of_these = sum(line.partition("/")[0] in ("codes", "forks", "loops") for line in site.canaries())
        site.stop()
        output = crowd.output()
        wrong += crowd.adopted_twice() + output.wrong
        print(f"seed {seed}: {kills} kills, {sum(crowd.sizes.values())} workers, {lives_seen} lives")
        print(f"  lines {output.lines}, missing {output.missing}, twice {output.twice}")
        print(f"  of {of_these} ends {ends} told, exits wrong {len(wrong_exits)}, other faults {len(wrong)}")
        print(f"  seconds to adopt: median {sorted(adoption)[len(adoption) // 2]:.3f}, most {max(adoption):.3f}")
        for what in [*wrong, *wrong_exits][:20]:
            print("  ", what)
        return int(bool(wrong or wrong_exits))


class Phase(NamedTuple):
    """A part of recovery, which begins when a function returns. each: once for each life, not once."""

    begins: Kill
    each: bool = False


PHASES = {
    "locked": Phase(Kill(DIRECTORIES, "__init__", True)),
    "notes read": Phase(Kill(LIVES, "read", True)),
    "lives held": Phase(Kill(PROCESS, "adopt", True), each=True),
    "logs opened": Phase(Kill(lambda: logs.LogHub, "open_pool", True)),
    "HELLO": Phase(Kill(PROCESS, "hello", True), each=True),
    "noted again": Phase(Kill(LIVES, "write", True), each=True),
    "STATE": Phase(Kill(SUPERVISOR, "_told_state", True), each=True),
    "serving": Phase(Kill(lambda: ctl.ControlServer, "__init__", True)),
}


def watch_phases(shared: mmap.mmap, locked: int) -> None:
    """In a supervisor to be: the number of the phase that it reached last is in shared, locked is told of the first."""
    for number, (where, _) in enumerate(PHASES.values(), 1):
        owner = where.where()
        real = owner.__dict__[where.name]
        is_classmethod = isinstance(real, classmethod)
        function = real.__func__ if is_classmethod else real

        def marking(*args: Any, number: int = number, function: Callable[..., Any] = function, **options: Any) -> Any:  # noqa: ANN401
            result = function(*args, **options)
            shared[0] = number
            if number == 1:
                os.write(locked, b"!")
            return result

        setattr(owner, where.name, classmethod(marking) if is_classmethod else marking)


class Recovery:
    """A crowd whose supervisor was killed, and the next ones, which are killed while they take it over."""

    def __init__(self, site: Site, crowd: Crowd, chance: random.Random) -> None:
        self._site, self._crowd, self._chance = site, crowd, chance
        self._shared = mmap.mmap(-1, 4096)
        self.at_random: collections.Counter[str] = collections.Counter()
        self.aimed: collections.Counter[str] = collections.Counter()
        self.adopted: list[float] = []
        self.wrong: list[str] = []

    def kill_at_random(self, longest: float) -> None:
        """At an instant from 0 to longest seconds after the lock was taken."""
        self._shared[0] = 0
        read, write = os.pipe()
        os.set_inheritable(write, True)
        keep = fcntl.fcntl(write, fcntl.F_DUPFD, 1500)
        os.close(write)
        self._site.start(prepare=functools.partial(watch_phases, self._shared, keep))
        os.close(keep)
        assert os.read(read, 1), f"it did not take the lock: {self._site.said()}"
        moment = time.monotonic() + longest * self._chance.random()
        while time.monotonic() < moment:
            pass
        self._site.kill()
        os.close(read)
        self.at_random[list(PHASES)[self._shared[0] - 1]] += 1

    def kill_in(self, name: str) -> None:
        """In that phase, wherever in it."""
        phase = PHASES[name]
        nth = self._chance.randrange(1, self._crowd.sizes["long"] + 1) if phase.each else 1
        self._site.start(phase.begins._replace(nth=nth))
        self._site.wait_dead()
        self.aimed[name] += 1

    def complete(self) -> None:
        """One that is let live has everything as it was."""
        began = time.monotonic()
        self._site.start()
        self._site.wait_answer()
        self.adopted.append(time.monotonic() - began)
        self.wrong += self._crowd.changed()

    def hits(self, name: str) -> int:
        return self.at_random[name] + self.aimed[name]

    def table(self) -> str:
        rows = [f"  {name:12} {self.at_random[name]:9} {self.aimed[name]:6} {self.hits(name):6}" for name in PHASES]
        return "\n".join([f"  {'phase':12} {'at random':>9} {'aimed':>6} {'hits':>6}", *rows])


def recovery_kills(kills: int, workers: int, seed: int, each: int, longest: float = 0.05) -> int:
    """The supervisor is killed again and again, a moment after it took the lock.

    First at random instants; then in each phase that was not hit `each` times, until it was.
    """
    chance = random.Random(seed)
    with a_site() as site:
        crowd = Crowd(site, workers, chance)
        site.start()
        site.wait_answer()
        crowd.settle()
        site.kill()
        recovery = Recovery(site, crowd, chance)
        for number in range(kills):
            recovery.kill_at_random(longest)
            if number % 25 == 24:
                recovery.complete()
                site.kill()
        aims = [name for name in PHASES for _ in range(each - recovery.hits(name))]
        chance.shuffle(aims)
        for name in aims:
            recovery.kill_in(name)
        recovery.complete()
        until = time.time()
        crowd.rest()
        wrong = recovery.wrong + check(site) + crowd.adopted_twice()
        ends, wrong_exits = crowd.wrong_exits(until)
        site.stop()
        output = crowd.output()
        wrong += output.wrong
        print(
            f"seed {seed}: {kills} kills 0-{longest * 1000:.0f} ms after the lock and {len(aims)} aimed, "
            f"{sum(crowd.sizes.values())} workers"
        )
        print(recovery.table())
        print(f"  lines {output.lines}, missing {output.missing}, twice {output.twice}; lives {len(site.canaries())}")
        print(f"  seconds to adopt: median {sorted(recovery.adopted)[len(recovery.adopted) // 2]:.3f}")
        print(f"  of {ends} ends told wrong {len(wrong_exits)}, other faults {len(wrong)}")
        for what in [*wrong, *wrong_exits][:20]:
            print("  ", what)
        return int(bool(wrong or wrong_exits))


# --- a real one ------------------------------------------------------------------------------------------------------


def redis(kills: int, requests: int) -> int:
    """A redis-server under load, whose supervisor is killed and started again: its clients see no error."""
    with a_site() as site:
        socket = site.home / "redis.sock"
        server = f"exec redis-server --port 0 --unixsocket {socket} --save '' --dir {site.home} > {site.home}/redis.log"
        site.write_config(pool("redis", server))
        site.start()
        site.wait_answer()
        before = site.until_state("redis/0", "running")
        site.until(socket.exists, "it listens")
        site.until(lambda: _redis(socket, "ping").strip() == "PONG", "it answers")
        run_id = _field(_redis(socket, "info", "server"), "run_id")
        load = subprocess.Popen(
            ["redis-benchmark", "-s", str(socket), "-t", "set,get", "-c", "20", "-n", str(requests), "-q", "-l"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        wrong = []

        def commands() -> int:
            return int(_field(_redis(socket, "info", "stats"), "total_commands_processed"))

        def serves(more: int, what: str) -> None:
            goal = commands() + more
            site.until(lambda: commands() > goal, what)

        for _ in range(kills):
            serves(10_000, "it serves")
            site.kill()
            serves(10_000, "it serves without a supervisor")
            site.start()
            site.wait_answer()
            wrong += same_life(before, site.until_state("redis/0", "running"))
        wrong += [f"the load ended with {load.returncode}"] if load.poll() is not None else []
        load.terminate()
        said = load.communicate()[0]
        wrong += [line for line in said.replace("\r", "\n").splitlines() if "rror" in line or "closed" in line][:5]
        after = site.status()["redis/0"]
        uptime = int(_field(_redis(socket, "info", "server"), "uptime_in_seconds"))
        wrong += [] if _field(_redis(socket, "info", "server"), "run_id") == run_id else ["another redis"]
        print(f"{kills} kills under load, {commands()} commands, faults {len(wrong)}")
        print(
            f"  host PID {before['host_pid']} -> {after['host_pid']}, up {uptime} s, for us {after['uptime_seconds']} s"
        )
        for what in wrong:
            print("  ", what)
        return int(bool(wrong))


def _redis(socket: Path, *words: str) -> str:
    return subprocess.run(["redis-cli", "-s", str(socket), *words], capture_output=True, text=True, check=False).stdout


def _field(text: str, name: str) -> str:
    return next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith(f"{name}:")), "0")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    parsed = verbs.add_parser("points")
    parsed.add_argument("names", nargs="*")
    parsed.add_argument("--part", default="0/1")
    for verb, kills in (("random", 50), ("recovery", 100)):
        parsed = verbs.add_parser(verb)
        parsed.add_argument("--kills", type=int, default=kills)
        parsed.add_argument("--workers", type=int, default=200)
        parsed.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(2), "little"))
        if verb == "recovery":
            parsed.add_argument("--each", type=int, default=5, help="times that each phase is hit at least")
    parsed = verbs.add_parser("redis")
    parsed.add_argument("--kills", type=int, default=5)
    options = parser.parse_args(argv)
    if options.verb == "points":
        return in_own_namespace(lambda: points(options.names, options.part))
    if options.verb == "redis":
        return in_own_namespace(lambda: redis(options.kills, 100_000_000))
    if options.verb == "recovery":
        return in_own_namespace(lambda: recovery_kills(options.kills, options.workers, options.seed, options.each))
    return in_own_namespace(lambda: random_kills(options.kills, options.workers, options.seed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
