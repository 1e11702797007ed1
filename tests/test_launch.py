"""Launches with real processes: the facts that nssup rests on, what goes wrong and what is left then (nothing)."""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import random
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from launching import (
    ISOLATED,
    PACKAGE,
    Driver,
    end_of,
    eventually,
    forked,
    in_child,
    is_there,
    launched,
    needs_namespaces,
    needs_root,
    output,
    plan_of,
    prctl,
    read_all,
    run,
    shell,
    status_of,
    tree_of,
    wait_executed,
    wait_readable,
)

from nssup import _clone, clone, wire
from nssup.clone import Launcher, Process
from nssup.errors import LaunchError
from nssup.record import UNLIMITED, Identity, Plan
from nssup.wire import Step

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = needs_namespaces

SLEEPER = plan_of("/bin/sleep", "1000")
PYTHON = (os.path.realpath(sys.executable), "-S", "-E", "-c")
NOBODY = Identity(65534, 65534, (65534,))
NEW_MOUNTS = 0x00020000
SUBREAPER = 36


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    made = Launcher()
    yield made
    made.close()


@pytest.fixture
def subreaper() -> Iterator[None]:
    """Orphans of our children become ours, to be waited for."""
    prctl(SUBREAPER, 1)
    yield
    prctl(SUBREAPER, 0)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def leaving(canary: Path, init: bool = True) -> Plan:
    """A program whose first act is to leave a canary."""
    return plan_of(*shell(': > "$0"', str(canary)), init=init)


@contextlib.contextmanager
def running(plan: Plan, launcher: Launcher | None = None) -> Iterator[tuple[Driver, int]]:
    """(a life whose program runs, the program's host PID)."""
    with launched(plan, launcher) as life:
        host_pid = life.hear(wire.Started).host_pid
        if not life.process.has_init:
            while not life.process.line_ended:  # that is the exec
                wait_readable(life.process.line)
                life.heard += life.process.receive()
        wait_executed(host_pid)
        yield life, host_pid


# --- who the program is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("init", "ns_pid"), [(True, 2), (False, 1)])
def test_both_pids(init: bool, ns_pid: int, launcher: Launcher) -> None:
    with running(plan_of("/bin/sleep", "1000", init=init), launcher) as (life, host_pid):
        started = life.hear(wire.Started)
        assert (started.ns_pid, started.generation) == (ns_pid, 1)
        status = status_of(host_pid)
        assert status["NSpid"].split() == [str(host_pid), str(ns_pid)]
        assert status["Name"] == "sleep"
        assert status_of(life.process.init_host_pid)["NSpid"].split() == [str(life.process.init_host_pid), "1"]
        assert (host_pid == life.process.init_host_pid) == (not init)
        assert status_of(life.process.init_host_pid)["PPid"] == str(os.getpid())
    assert output(plan_of(*shell("echo $$ $PPID"), init=init)) == f"{ns_pid} {int(init)}\n"


@pytest.fixture
def odd_signals() -> Iterator[None]:
    """Python ignores SIGPIPE and SIGXFSZ already."""
    handler = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGHUP, signal.SIGRTMAX})
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    signal.signal(signal.SIGUSR1, handler)


@pytest.mark.usefixtures("odd_signals")
@pytest.mark.parametrize("init", [True, False])
def test_signals_are_as_new(init: bool) -> None:
    assert {status_of("self")[name] for name in ("SigIgn", "SigBlk")}.isdisjoint({"0" * 16})
    with running(plan_of("/bin/cat", "/proc/self/status", init=init)) as (life, _):
        assert life.process.stdout is not None
        found = dict(line.split(":\t", 1) for line in read_all(life.process.stdout).decode().splitlines())
    assert {name: found[name] for name in ("SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt")} == dict.fromkeys(
        ("SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt"), "0" * 16
    )


@pytest.mark.usefixtures("odd_signals")
def test_our_own_signals_are_as_before(launcher: Launcher) -> None:
    names = ("SigBlk", "SigIgn", "SigCgt")
    before = status_of("self")
    run(plan_of("/bin/true"), launcher)
    after = status_of("self")
    assert [after[name] for name in names] == [before[name] for name in names]


@pytest.mark.parametrize("init", [True, False])
def test_only_stdio_is_open(init: bool) -> None:
    """Whatever else we have open and inheritable."""
    strays = [os.open(path, os.O_RDONLY) for path in ("/", "/etc/passwd", "/dev/null") for _ in range(10)]
    for fd in strays:
        os.set_inheritable(fd, True)
    with running(plan_of("/bin/sleep", "1000", init=init)) as (life, host_pid):
        eventually(lambda: sorted(os.listdir(f"/proc/{host_pid}/fd")) == ["0", "1", "2"])  # its loader is through
        links = [os.readlink(f"/proc/{host_pid}/fd/{fd}") for fd in range(3)]
        assert links[0] == "/dev/null"
        ours = [os.readlink(f"/proc/self/fd/{log}") for log in (life.process.stdout, life.process.stderr)]
        assert [links[1], links[2]] == ours
    for fd in strays:
        os.close(fd)


@pytest.mark.parametrize("init", [True, False])
def test_its_session_is_its_own(init: bool, launcher: Launcher) -> None:
    with running(plan_of("/bin/sleep", "1000", init=init), launcher) as (life, host_pid):
        assert (os.getsid(host_pid), os.getpgid(host_pid)) == (host_pid, host_pid)
        init_host_pid = life.process.init_host_pid
        assert os.getsid(init_host_pid) == init_host_pid != os.getsid(0)


@pytest.mark.parametrize("init", [True, False])
@needs_root
def test_what_was_asked_for_is_what_it_gets(init: bool, launcher: Launcher) -> None:
    plan = plan_of("/bin/sleep", "1000", init=init)._replace(
        argv=(b"another name", b"1000"),
        env=(b"A=1", b"B=", b"C=\xff\xfe"),
        directory=b"/usr/bin",
        identity=Identity(1234, 2345, (7, 8, 9)),
        umask=0o027,
        rlimits=((7, 100, 200), (4, 0, UNLIMITED), (1, 5000, 5000)),
    )
    with running(plan, launcher) as (_, host_pid):
        proc = Path(f"/proc/{host_pid}")
        assert (proc / "cmdline").read_bytes() == b"another name\x001000\0"
        assert (proc / "environ").read_bytes() == b"A=1\0B=\0C=\xff\xfe\0"
        assert os.readlink(proc / "cwd") == "/usr/bin"
        status = status_of(host_pid)
        assert (status["Umask"], status["Uid"].split(), status["Gid"].split(), status["Groups"].split()) == (
            "0027",
            ["1234"] * 4,
            ["2345"] * 4,
            ["7", "8", "9"],
        )
        assert [status[name] for name in ("CapPrm", "CapEff", "CapInh", "CapAmb")] == ["0" * 16] * 4
        limits = {line[:25].strip(): line[25:].split()[:2] for line in (proc / "limits").read_text().splitlines()}
        assert limits["Max open files"] == ["100", "200"]
        assert limits["Max core file size"] == ["0", "unlimited"]
        assert limits["Max file size"] == ["5000", "5000"]


@needs_root
def test_what_was_not_asked_for_is_as_ours(launcher: Launcher) -> None:
    with running(SLEEPER, launcher) as (_, host_pid):
        ours, its = status_of("self"), status_of(host_pid)
        for name in ("Umask", "Uid", "Gid", "Groups", "CapPrm", "CapEff", "CapBnd", "CapInh", "CapAmb", "NoNewPrivs"):
            assert its[name] == ours[name], name
        limits = Path(f"/proc/{host_pid}/limits").read_text()
        assert limits == Path("/proc/self/limits").read_text()
        assert os.readlink(f"/proc/{host_pid}/cwd") == "/"


@pytest.mark.parametrize("init", [True, False])
def test_no_capability_is_left_over_from_the_user_namespace(init: bool) -> None:
    found = output(plan_of("/bin/cat", "/proc/self/status", init=init, namespaces=ISOLATED | {"user"}))
    status = dict(line.split(":\t", 1) for line in found.splitlines())
    assert (status["CapInh"], status["CapAmb"]) == ("0" * 16, "0" * 16)
    assert status["Uid"].split() == [str(os.geteuid())] * 4


def test_its_limits_are_not_inits(launcher: Launcher) -> None:
    plan = plan_of("/bin/sleep", "1000")._replace(rlimits=((7, 5, 5),), umask=0o77, directory=b"/usr")
    with running(plan, launcher) as (life, _):
        proc = Path(f"/proc/{life.process.init_host_pid}")
        assert (proc / "limits").read_text() == Path("/proc/self/limits").read_text()
        assert os.readlink(proc / "cwd") == "/"


# --- what is private -------------------------------------------------------------------------------------------------


def test_a_hostname_is_not_seen_outside(launcher: Launcher) -> None:
    before = os.uname().nodename
    plan = plan_of("/bin/cat", "/proc/sys/kernel/hostname")._replace(hostname=b"inside")
    assert run(plan, launcher).out == b"inside\n"
    assert os.uname().nodename == before


def test_an_ipc_object_is_not_seen_on_the_other_side(launcher: Launcher) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    ours = libc.shmget(0, 4096, 0o600)
    assert ours >= 0
    try:
        assert str(ours) in Path("/proc/sysvipc/shm").read_text()
        before = Path("/proc/sysvipc/shm").read_text()
        code = "import ctypes, signal; ctypes.CDLL(None).shmget(0, 8192, 0o600)"
        code += "; print(open('/proc/sysvipc/shm').read(), end='', flush=True); signal.pause()"
        with running(plan_of(*PYTHON, code), launcher) as (life, _):
            assert life.process.stdout is not None
            wait_readable(life.process.stdout)
            heading, own = os.read(life.process.stdout, 4096).decode().splitlines()
            assert heading.split()[:2] == ["key", "shmid"]
            assert own.split()[3] == "8192"
            assert Path("/proc/sysvipc/shm").read_text() == before
    finally:
        libc.shmctl(ours, 0, None)


def mountinfo() -> bytes:
    return Path("/proc/self/mountinfo").read_bytes()


def test_proc_shows_its_own_processes_and_the_hosts_is_as_before(launcher: Launcher) -> None:
    before = mountinfo()
    found = run(plan_of("/bin/ls", "/proc"), launcher).out.decode().split()
    assert {name for name in found if name.isdecimal()} == {"1", "2"}
    assert mountinfo() == before
    assert os.readlink("/proc/self") == str(os.getpid())


def test_without_a_private_proc_it_shows_the_hosts(launcher: Launcher) -> None:
    found = run(plan_of("/bin/ls", "/proc", proc=False), launcher).out.decode().split()
    assert str(os.getpid()) in found


def shared_root(launches: int) -> list[bool]:
    """In a child: whether the mount table stays byte-identical where every mount is shared."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(NEW_MOUNTS) == 0
    subprocess.run(["mount", "--make-rshared", "/"], check=True)
    before = mountinfo()
    assert b" shared:" in before
    launcher = Launcher()
    found = []
    for _ in range(launches):
        outcome = run(plan_of("/bin/ls", "/proc"), launcher)
        assert b"\n3\n" not in outcome.out
        found.append(mountinfo() == before and os.readlink("/proc/self") == str(os.getpid()))
    return found


@needs_root
def test_the_hosts_proc_is_safe_where_its_mounts_are_shared() -> None:
    assert in_child(lambda: shared_root(100)) == [True] * 100


@pytest.mark.parametrize("init", [True, False])
@pytest.mark.parametrize("namespaces", [{"pid"}, {"pid", "uts", "ipc"}])
def test_proc_without_a_mount_namespace_is_refused(namespaces: set[str], init: bool, launcher: Launcher) -> None:
    before = mountinfo()
    outcome = run(plan_of("/bin/true", proc=True, namespaces=namespaces, init=init), launcher)
    assert outcome.failed == (Step.PROPAGATION, errno.EPERM)
    assert mountinfo() == before


@pytest.mark.parametrize("init", [True, False])
def test_no_host_pid_can_be_signalled_from_inside(init: bool, launcher: Launcher) -> None:
    with running(SLEEPER, launcher) as (life, other):
        wanted = [os.getpid(), other, life.process.init_host_pid]
        code = "import os, sys\nfor n in sys.argv[1:]:\n try: os.kill(int(n), 9)\n except OSError as e: print(e.errno)"
        plan = plan_of(*PYTHON, code, *map(str, wanted), init=init)
        assert run(plan, launcher).out == b"%d\n" % errno.ESRCH * 3
        assert is_there(other)


NAMESPACES = {"mount": "mnt", "uts": "uts", "ipc": "ipc", "net": "net", "cgroup": "cgroup", "user": "user"}


@pytest.mark.parametrize(
    "asked",
    [set(), {"mount"}, {"uts"}, {"ipc"}, {"net"}, {"cgroup"}, {"user"}, {"mount", "net", "user"}, set(NAMESPACES)],
    ids=lambda asked: "+".join(["pid", *sorted(asked)]),
)
@pytest.mark.parametrize("init", [True, False])
def test_any_mix_of_namespaces(asked: set[str], init: bool, launcher: Launcher) -> None:
    with running(plan_of("/bin/sleep", "1000", namespaces={"pid", *asked}, init=init), launcher) as (_, host_pid):
        differ = {
            name
            for name, file in NAMESPACES.items()
            if os.stat(f"/proc/{host_pid}/ns/{file}").st_ino != os.stat(f"/proc/self/ns/{file}").st_ino
        }
    assert differ == asked


# --- how a life ends -------------------------------------------------------------------------------------------------

DAEMONS = """
import os, signal, sys
read, write = os.pipe()
for _ in range(200):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.setsid()
            for n in (1, 2, 3, 15): signal.signal(n, signal.SIG_IGN)
            os.write(write, b'x')
            while True: signal.pause()
        os._exit(0)
for _ in range(200): os.wait()
count = 0
while count < 200: count += len(os.read(read, 200))
print('ready', flush=True)
sys.stdin.read()
os._exit(9)
"""


@contextlib.contextmanager
def daemons(launcher: Launcher) -> Iterator[tuple[Driver, list[int], int]]:
    """(a life with 200 daemons that ignore TERM, the host PIDs of all, what ends its program when it is closed)."""
    stdin, holds = os.pipe()
    stdout, out = os.pipe()
    with launched(plan_of(*PYTHON, DAEMONS), launcher, stdio=(stdin, out, out)) as life:
        os.close(stdin)
        os.close(out)
        wait_readable(stdout)
        assert os.read(stdout, 6) == b"ready\n"
        tree = tree_of(life.process.init_host_pid)
        assert len(tree) == 201
        yield life, tree, holds
    with contextlib.suppress(OSError):
        os.close(holds)
    assert os.read(stdout, 1) == b""
    os.close(stdout)


def test_a_kill_takes_two_hundred_daemons(launcher: Launcher) -> None:
    with daemons(launcher) as (life, tree, _):
        life.process.kill()
        assert life.end().reason == "init-killed"
        assert not any(map(is_there, tree))


def test_the_programs_end_takes_two_hundred_daemons(launcher: Launcher) -> None:
    """By the time that init says so."""
    with daemons(launcher) as (life, tree, holds):
        os.close(holds)
        assert life.hear(wire.Exited).exit[:2] == (os.CLD_EXITED, 9)
        life.hear(wire.Empty)
        assert not any(map(is_there, tree))


def test_a_term_to_the_tree_reaches_all_and_is_ignored(launcher: Launcher) -> None:
    with daemons(launcher) as (life, tree, _):
        life.process.signal(signal.SIGTERM, tree=True)
        life.process.signal(0)
        assert life.hear(wire.Exited).exit[:2] == (os.CLD_KILLED, signal.SIGTERM)  # only the program did not ignore it
        life.hear(wire.Empty)
        assert not any(map(is_there, tree))


BOMB = "while (1) { fork() }"


@needs_root
def test_a_fork_bomb_is_defused() -> None:
    """Bounded by its user's limit; nobody else has this uid."""
    plan = plan_of("/usr/bin/perl", "-e", BOMB)._replace(
        identity=Identity(543210, 543210, ()), rlimits=((6, 150, 150),), directory=b"/"
    )
    with running(plan) as (life, _):
        eventually(lambda: len(tree_of(life.process.init_host_pid)) >= 100)
        tree = tree_of(life.process.init_host_pid)
        life.process.kill()
        life.end()
        assert not any(map(is_there, tree))


def test_a_stopped_tree_is_killed(launcher: Launcher) -> None:
    with running(plan_of(*shell("sleep 1000 & sleep 1000")), launcher) as (life, host_pid):
        eventually(lambda: len(tree_of(host_pid)) == 2)
        life.process.signal(signal.SIGSTOP, tree=True)
        eventually(lambda: all(status_of(each)["State"].startswith("T") for each in tree_of(host_pid)))
        signal.pidfd_send_signal(life.process.pidfd, signal.SIGSTOP)
        tree = tree_of(life.process.init_host_pid)
        life.process.kill()
        life.end()
        assert not any(map(is_there, tree))


@pytest.mark.parametrize(("init", "reason"), [(True, "init-killed"), (False, "signal:SIGKILL")])
def test_init_killed_from_outside(init: bool, reason: str, launcher: Launcher) -> None:
    with running(plan_of("/bin/sleep", "1000", init=init), launcher) as (life, host_pid):
        os.kill(life.process.init_host_pid, signal.SIGKILL)
        assert life.end().reason == reason
        assert not is_there(host_pid)


@pytest.mark.parametrize("code", [0, 3, 255])
def test_without_init_the_exit_is_the_programs(code: int, launcher: Launcher) -> None:
    outcome = run(plan_of(*shell(f"exit {code}"), init=False), launcher)
    assert (outcome.ended.code, outcome.ended.reason) == (code, f"exit:{code}")
    assert [type(message) for message in outcome.messages] == [wire.Started]


def test_messages_come_in_order_however_short_the_life(launcher: Launcher) -> None:
    for _ in range(50):
        outcome = run(plan_of("/bin/true"), launcher)
        assert [type(message) for message in outcome.messages] == [wire.Started, wire.Exited, wire.Empty]


def test_an_exit_is_told_although_a_word_of_ours_was_not_read(launcher: Launcher) -> None:
    """init goes while signals are on their way to it; the kernel resets the line then, and says so first."""
    for _ in range(100):
        with launched(plan_of("/bin/true"), launcher) as life:
            poll = select.poll()
            poll.register(life.process.pidfd, select.POLLIN)
            while not poll.poll(0):
                life.process.signal(signal.SIGCONT)
            life.end()
            assert [type(message) for message in life.heard] == [wire.Started, wire.Exited, wire.Empty]


def test_a_storm_of_launches_and_kills(launcher: Launcher) -> None:
    moments = random.Random(20_26)
    for number in range(500):
        init = number % 5 != 0
        plan = plan_of("/bin/true" if number % 2 else "/bin/cat", init=init, die=bool(number % 3))
        process = launcher.launch(plan)
        if number % 7:
            process.go()
        for _ in range(moments.randrange(0, 3000)):
            pass
        if number % 11 == 0:
            process.signal(signal.SIGTERM)
        process.kill()
        for message in process.receive():
            assert message.generation == 1
        process.destroy()


def test_launches_from_many_threads() -> None:
    """They share the stack of the clone."""
    launcher, codes = Launcher(), []

    def launch(number: int) -> None:
        for _ in range(20):
            outcome = run(plan_of(*shell(f"exit {number}")), launcher)
            codes.append((number, outcome.exit))

    threads = [threading.Thread(target=launch, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    launcher.close()
    assert sorted(codes) == [(number, (os.CLD_EXITED, number)) for number in range(1, 5) for _ in range(20)]


def test_launches_in_a_hail_of_signals(launcher: Launcher) -> None:
    """Their handler never runs in the child of the clone, whose memory is ours, and no call gives up for them."""
    seen: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda signo, _: seen.append(os.getpid()))
    signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
    try:
        for _ in range(60):
            assert run(plan_of("/bin/true"), launcher).exit == (os.CLD_EXITED, 0)
            assert run(plan_of("/no/such/program", init=False), launcher).failed == (Step.EXEC, errno.ENOENT)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert set(seen) == {os.getpid()}


# --- launches that fail ----------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Path:
    tmp_path.chmod(0o755)
    (tmp_path / "text").write_text("no program\n")
    (tmp_path / "text").chmod(0o755)
    (tmp_path / "script").write_text("#!/no/such/interpreter\n")
    (tmp_path / "script").chmod(0o755)
    (tmp_path / "private").write_text("#!/bin/sh\n")
    (tmp_path / "private").chmod(0o644)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "deep").mkdir(mode=0o700)
    return tmp_path


EXEC_FAILURES = [
    (("no-such",), errno.ENOENT),
    (("script",), errno.ENOENT),
    (("text/program",), errno.ENOENT),
    (("deep",), errno.EACCES),
    (("private",), errno.EACCES),
    (("text",), errno.ENOEXEC),
    (("loop",), errno.ELOOP),
    (("x" * 300,), errno.ENAMETOOLONG),
    (("no-such", "private", "no-such-either"), errno.EACCES),
    (("no-such", "text", "loop"), errno.ENOEXEC),
]


@pytest.mark.parametrize(("names", "number"), EXEC_FAILURES)
@pytest.mark.parametrize("init", [True, False])
def test_an_exec_that_fails(names: tuple[str, ...], number: int, init: bool, files: Path, launcher: Launcher) -> None:
    paths = tuple(os.fsencode(files / name) for name in names)
    outcome = run(plan_of("x", init=init)._replace(candidates=paths), launcher)
    assert outcome.failed == (Step.EXEC, number)
    # Without init, the process has announced itself by then.
    kinds = [wire.Failed, wire.Empty] if init else [wire.Started, wire.Failed, wire.Empty]
    assert [type(message) for message in outcome.messages] == kinds


def test_a_later_path_is_tried(files: Path, launcher: Launcher) -> None:
    paths = tuple(os.fsencode(files / name) for name in ("no-such", "private", "text/program"))
    outcome = run(plan_of("x")._replace(candidates=(*paths, b"/bin/true", b"/bin/false")), launcher)
    assert outcome.exit == (os.CLD_EXITED, 0)


def test_relative_paths_start_in_the_directory(files: Path, launcher: Launcher) -> None:
    plan = plan_of("x")._replace(candidates=(b"text/../deep", b"./true"), directory=b"/bin")
    assert run(plan, launcher).exit == (os.CLD_EXITED, 0)


@pytest.mark.parametrize("init", [True, False])
@pytest.mark.parametrize(
    ("directory", "number"),
    [("no-such", errno.ENOENT), ("text", errno.ENOTDIR), ("loop", errno.ELOOP), ("deep", errno.EACCES)],
)
@needs_root
def test_a_directory_that_cannot_be_entered(
    directory: str, number: int, init: bool, files: Path, launcher: Launcher
) -> None:
    """With the program's own rights, not with init's."""
    for parent in files.parents:
        if not parent.stat().st_mode & 1:
            parent.chmod(0o711)
    plan = plan_of("/bin/true", init=init)._replace(directory=os.fsencode(files / directory), identity=NOBODY)
    assert run(plan, launcher).failed == (Step.DIRECTORY, number)


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({"rlimits": ((99, 1, 1),)}, (Step.RLIMITS, errno.EINVAL)),
        ({"rlimits": ((7, 2, 1),)}, (Step.RLIMITS, errno.EINVAL)),
        ({"hostname": b"x" * 65}, (Step.HOSTNAME, errno.EINVAL)),
        ({"tty": True}, (Step.TTY, errno.ENOTTY)),
        ({"identity": Identity(0, 0, tuple(range(70_000)))}, (Step.GROUPS, errno.EINVAL)),
        ({"identity": Identity(0xFFFFFFFF, 0, ()), "namespaces": ISOLATED | {"user"}}, (Step.GROUPS, errno.EPERM)),
    ],
)
@pytest.mark.parametrize("init", [True, False])
@needs_root
def test_a_step_that_fails_is_named(
    changes: dict[str, Any], failed: tuple[Step, int], init: bool, launcher: Launcher, canary: Path
) -> None:
    outcome = run(leaving(canary, init=init)._replace(**changes), launcher)
    assert outcome.failed == failed
    assert not canary.exists()


def test_arguments_of_a_hundred_kilobytes_travel_in_a_memfd(launcher: Launcher) -> None:
    words = [os.urandom(500).hex() for _ in range(100)]
    script = 'printf "%s" "$@" | sha256sum'
    found = run(plan_of(*shell(script, "sh", *words)), launcher).out
    assert found.split()[0].decode() == hashlib.sha256("".join(words).encode()).hexdigest()


@pytest.mark.parametrize("size", [32_000, 32_768, 33_000, 131_071])
def test_records_about_as_long_as_a_datagram(size: int, launcher: Launcher) -> None:
    outcome = run(plan_of(*shell('echo "${#X}"'))._replace(env=(b"X=" + b"x" * (size - 3),)), launcher)
    assert outcome.out == b"%d\n" % (size - 3)


def test_an_environment_too_large_for_exec(launcher: Launcher) -> None:
    env = tuple(b"X%d=" % number + b"x" * 100_000 for number in range(100))
    assert run(plan_of("/bin/true")._replace(env=env), launcher).failed == (Step.EXEC, errno.E2BIG)


def test_a_record_too_large_for_init(launcher: Launcher) -> None:
    env = tuple(b"X%d=" % number + b"x" * 100_000 for number in range(170))
    with pytest.raises(LaunchError, match="record: E2BIG"):
        launcher.launch(plan_of("/bin/true")._replace(env=env))


def test_what_cannot_be_encoded_leaves_nothing_behind(launcher: Launcher) -> None:
    with pytest.raises(Exception, match="format requires"):
        launcher.launch(plan_of("/bin/true")._replace(generation=2**32))
    with pytest.raises(KeyError):
        launcher.launch(plan_of("/bin/true", namespaces={"pid", "mars"}))
    with pytest.raises(ValueError, match="CLONE_NEWPID"):
        launcher.launch(plan_of("/bin/true", namespaces={"mount"}))


def test_stdio_that_is_not_open(launcher: Launcher) -> None:
    with pytest.raises(LaunchError) as caught:
        launcher.launch(SLEEPER, stdio=(99_999, 1, 2))
    assert (caught.value.step, caught.value.errno) == ("pipes", errno.EBADF)


def stepping(plan: Plan) -> list[tuple[str, int] | None]:
    """In a child: the error of a launch with one more descriptor to spare each time, None at the first that works."""
    os.closerange(3, 900)
    launcher = Launcher()
    while os.open("/dev/null", os.O_RDONLY) < 20:  # no gaps, so that the limit is what is free
        continue
    fds = 21
    found: list[tuple[str, int] | None] = []
    while None not in found:
        resource.setrlimit(resource.RLIMIT_NOFILE, (fds + len(found), 4096))
        try:
            process = launcher.launch(plan)
            found.append(None)
            process.destroy()
        except LaunchError as error:
            found.append((error.step, error.errno))
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
        assert set(map(int, os.listdir("/proc/self/fd"))) - {fds} == {*range(fds), 900}
        assert tree_of(os.getpid()) == []
    return found


@pytest.mark.parametrize("args", [1, 10_000])
@pytest.mark.parametrize("namespaces", [ISOLATED, ISOLATED | {"user"}])
def test_no_free_descriptor_at_any_point_of_a_launch(args: int, namespaces: frozenset[str]) -> None:
    plan = plan_of("/bin/true", *["x" * 4] * args, namespaces=namespaces)
    found = in_child(lambda: stepping(plan))
    assert found[:4] == [("line", errno.EMFILE)] * 2 + [("pipes", errno.EMFILE)] * 2
    assert found[-1] is None
    # What comes after the clone finds room where the ends of the pipes were that init has now.
    assert set(found[4:-1]) == {("pipes", errno.EMFILE), ("clone", errno.EMFILE)}


def inodes(host_pid: int | str) -> dict[int, int]:
    """What its descriptors are."""
    directory = f"/proc/{host_pid}/fd"
    found = {}
    for fd in os.listdir(directory):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            found[int(fd)] = os.stat(f"{directory}/{fd}").st_ino
    return found


OUR_END = 300


def scattered(numbers: random.Random) -> list[int]:
    """Sources for the descriptors of an init, at any low numbers; some are the same, some are missing."""
    high = [os.memfd_create(f"source {fd}") for fd in range(wire.Fd.COUNT)]
    line, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    os.dup2(far.fileno(), OUR_END)
    given: dict[int, int] = {
        wire.Fd.LINE: line.detach(),
        wire.Fd.FAR: far.detach(),
        wire.Fd.SUPERVISOR: os.pidfd_open(os.getpid()),
        wire.Fd.INIT_EXE: os.open(PACKAGE / "nssup-init", os.O_RDONLY),
    }
    for fd, made in given.items():
        os.close(high[fd])
        high[fd] = made
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in high]
    os.closerange(0, 100)
    sources = numbers.sample(range(2 * wire.Fd.COUNT), wire.Fd.COUNT)
    for fd, place in zip(high, sources, strict=True):
        os.dup2(fd, place)
    os.closerange(100, 200)
    for fd in set(wire.Fd) - {wire.Fd.LINE, wire.Fd.SUPERVISOR, wire.Fd.INIT_EXE, wire.Fd.COUNT}:
        if numbers.random() < 0.3:
            sources[fd] = numbers.choice([-1, numbers.choice(sources)])
    return sources


def low_descriptors(seed: int) -> None:
    """In a child: every descriptor of init is the one it was meant to be, wherever it came from."""
    numbers = random.Random(seed)
    for _ in range(60):
        sources = scattered(numbers)
        free = set(range(4 * wire.Fd.COUNT)) - set(inodes("self"))
        filler, *window = sorted(numbers.sample(sorted(free), wire.Fd.COUNT + 1))
        for fd in (filler, *window):
            os.dup2(OUR_END, fd)
        mine = inodes("self")
        pidfd, host_pid, step, number = _clone.clone(clone.CLONE_NEW["pid"], tuple(sources), (*window, filler), -1)
        assert (step, number) == (0, 0)
        os.write(OUR_END, wire.ping(1))
        os.read(OUR_END, 4096)  # it is as it will be
        found = inodes(host_pid)
        wanted = {fd: mine[source] for fd, source in enumerate(sources) if source >= 0 and fd != wire.Fd.INIT_EXE}
        assert {fd: inode for fd, inode in found.items() if fd < wire.Fd.INIT_EXE} == wanted, sources
        assert len(found) - len(wanted) <= 1  # its signals
        assert {fd: inode for fd, inode in inodes("self").items() if fd != pidfd} == mine
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED)


@pytest.mark.parametrize("seed", range(3))
def test_descriptors_may_have_any_numbers(seed: int) -> None:
    in_child(lambda: low_descriptors(seed))


def closed_stdio() -> tuple[bytes, bytes, tuple[int, int]]:
    os.closerange(0, 256)
    outcome = run(plan_of(*shell("echo out; echo err >&2; read x; exit 3")))
    return outcome.out, outcome.err, outcome.exit


def test_a_supervisor_whose_own_stdio_is_closed() -> None:
    assert in_child(closed_stdio) == (b"out\n", b"err\n", (os.CLD_EXITED, 3))


def without_rights(namespaces: set[str]) -> tuple[str, int]:
    with pytest.raises(LaunchError) as caught:
        run(plan_of("/bin/true", namespaces=namespaces))
    assert tree_of(os.getpid()) == []
    return caught.value.step, caught.value.errno


@needs_root
def test_without_the_right_to_make_namespaces() -> None:
    assert in_child(lambda: without_rights({"pid"}), identity=NOBODY) == ("clone", errno.EPERM)


def at_the_limit_of_processes() -> tuple[str, int]:
    resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
    return without_rights({"pid", "user"})


def has_user_namespaces() -> bool:
    return bool(ctypes.CDLL(None).unshare(0x10000000) == 0)


@pytest.fixture(scope="module")
def unprivileged() -> None:
    if os.geteuid() != 0 or not in_child(has_user_namespaces, identity=NOBODY):
        pytest.skip("needs root, and user namespaces for others")


@pytest.mark.usefixtures("unprivileged")
def test_at_the_limit_of_processes() -> None:
    own = Identity(543211, 543211, ())
    assert in_child(at_the_limit_of_processes, identity=own) == ("clone", errno.EAGAIN)


SWEEP = {
    "clone3:EAGAIN:1": "LaunchError clone EAGAIN",
    "execveat:EACCES:1": "LaunchError exec_init EACCES",
    "sendto:EAGAIN:2": "init-killed",  # GO
    "sendmsg:ENOBUFS:1": "worked",  # STARTED, said again
    "recvmsg:ECONNRESET:1": "worked",
    "signalfd4:ENFILE:1": "failed setup-failed:pid_one:ENFILE",
    "mount:EBUSY:2": "failed setup-failed:mount_proc:EBUSY",
    "setresuid:EAGAIN:1": "failed setup-failed:user:EAGAIN",
    "waitid:EINTR:1": "worked",
}


@needs_root
@pytest.mark.slow
def test_a_system_call_that_fails_ends_in_a_name() -> None:
    """A sample of scripts/inject, which lets any call of supervisor and init fail."""
    if not shutil.which("strace"):
        pytest.skip("needs strace")
    inject = PACKAGE.parent / "scripts" / "inject"
    done = subprocess.run([sys.executable, inject, *SWEEP], capture_output=True, text=True, check=False)
    found = {line.split()[0]: line for line in done.stdout.splitlines() if " no init " not in line}
    assert done.returncode == 0, done.stdout + done.stderr
    assert {
        case: found[case].split(" init ")[1].strip().startswith(said) for case, said in SWEEP.items()
    } == dict.fromkeys(SWEEP, True), done.stdout


# --- an unprivileged supervisor --------------------------------------------------------------------------------------


def rootless() -> tuple[bytes, dict[str, str], list[str]]:
    plan = plan_of(*shell("echo $$ $(id -u); hostname 2>&1 || cat /proc/sys/kernel/hostname; ls /proc"))
    outcome = run(plan._replace(namespaces=ISOLATED | {"user"}, hostname=b"rootless"))
    with running(SLEEPER._replace(namespaces=ISOLATED | {"user"})) as (life, host_pid):
        assert life.hear(wire.Started).ns_pid == 2
        return outcome.out, status_of(host_pid), status_of(life.process.init_host_pid)["NSpid"].split()


@pytest.mark.usefixtures("unprivileged")
def test_a_supervisor_without_rights_makes_a_user_namespace() -> None:
    out, status, _ = in_child(rootless, identity=NOBODY)
    first, hostname, *names = out.decode().split("\n")
    assert (first, hostname) == ("2 65534", "rootless")
    assert {"1", "2"} <= set(names)
    assert all(int(name) < 10 for name in names if name.isdecimal())
    assert [status[name] for name in ("CapInh", "CapAmb")] == ["0" * 16] * 2
    assert status["Uid"].split() == ["65534"] * 4


@pytest.mark.usefixtures("unprivileged")
@pytest.mark.parametrize("init", [True, False])
def test_without_rights_lives_end_as_with_them(init: bool) -> None:
    def life() -> tuple[int, int]:
        outcome = run(plan_of(*shell("exit 5"), init=init, namespaces=ISOLATED | {"user"}))
        return (outcome.exit[1] if init else outcome.ended.code or 0), len(tree_of(os.getpid()))

    assert in_child(life, identity=NOBODY) == (5, 0)


# --- secrets and attacks ---------------------------------------------------------------------------------------------

REWRITE = """
import errno, os, sys
answers = set()
for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC):
    path = os.open('/proc/1/exe', os.O_PATH)
    for name in ('/proc/1/exe', '/proc/self/fd/%d' % path, '/proc/1/root/proc/1/exe'):
        for _ in range(100):
            try:
                os.write(os.open(name, flags), b'#!/bin/evil')
                answers.add('written')
            except OSError as error:
                answers.add(errno.errorcode[error.errno])
print(*sorted(answers))
"""


@needs_root
def test_inits_program_cannot_be_overwritten(launcher: Launcher) -> None:
    """SEC-01, CVE-2019-5736: not even by a worker that is the host's root."""
    program = PACKAGE / "nssup-init"
    before = program.read_bytes(), program.stat().st_mtime_ns
    assert run(plan_of(*PYTHON, REWRITE), launcher).out == b"ETXTBSY\n"
    # Nor when nobody runs it.
    seals = fcntl.fcntl(launcher._init, fcntl.F_GET_SEALS)
    assert seals & 0x0F == 0x0F
    fd = os.open(f"/proc/self/fd/{launcher._init}", os.O_RDWR)
    for change in (lambda: os.pwrite(fd, b"x", 0), lambda: os.ftruncate(fd, 0), lambda: os.ftruncate(fd, 1 << 20)):
        with pytest.raises(PermissionError):
            change()
    os.close(fd)
    assert os.pread(launcher._init, 1 << 20, 0) == before[0]
    assert (program.read_bytes(), program.stat().st_mtime_ns) == before


@pytest.mark.parametrize("init", [True, False])
def test_no_descriptor_leads_out_through_the_directory(init: bool, launcher: Launcher) -> None:
    """SEC-02, CVE-2024-21626."""
    stray = os.open("/", os.O_RDONLY)
    os.set_inheritable(stray, True)
    for path in [f"/proc/self/fd/{number}" for number in range(41)] + [f"/proc/1/fd/{number}" for number in range(12)]:
        outcome = run(plan_of("/bin/true", init=init)._replace(directory=path.encode()), launcher)
        step, number = outcome.failed
        assert step == Step.DIRECTORY, path
        assert number in (errno.ENOTDIR, errno.ENOENT, errno.EACCES), path
    os.close(stray)


@pytest.mark.parametrize("init", [True, False])
def test_no_descriptor_leads_out_through_the_program(init: bool, launcher: Launcher) -> None:
    """They are closed before the exec, not by it."""
    for path in [f"/proc/{whose}/fd/{number}" for whose in ("self", 1) for number in range(20)]:
        step, number = run(plan_of(path, init=init), launcher).failed
        assert step == Step.EXEC, path
        assert number in (errno.ENOENT, errno.EACCES), path


NUMBERS = {
    "x86_64": {"ptrace": 101, "process_vm_readv": 310},
    "aarch64": {"ptrace": 117, "process_vm_readv": 270},
}
PRY = """
for path in environ maps mem auxv syscall stack fdinfo/3 fd/3 fd/4 exe cwd/etc/passwd root/etc/passwd; do
    head -c 1 /proc/1/$path > /dev/null 2>&1 && echo "read $path"
done
ls /proc/1/map_files > /dev/null 2>&1 && echo "listed map_files"
readlink /proc/1/exe /proc/1/cwd /proc/1/root /proc/1/fd/3 /proc/1/ns/pid
exec perl -e '
    use Errno;
    my %number = @ARGV;
    my $pidfd = syscall(434, 1, 0);
    for my $fd (0 .. 12) { print "took $fd\\n" if syscall(438, $pidfd, $fd, 0) >= 0; }
    for my $request (16, 0x4206) { print "traced\\n" if syscall($number{ptrace}, $request, 1, 0, 0) >= 0; }
    my $buffer = "x" x 64;
    my $iov = pack("PQ", $buffer, 64);
    my $remote = pack("QQ", 0x400000, 64);
    print "read\\n" if syscall($number{process_vm_readv}, 1, $iov, 1, $remote, 1, 0) >= 0;
    print "signalled\\n" if kill(0, 1);
' "$@"
"""


@pytest.mark.parametrize("same_user", [False, True], ids=["another user", "the same user, no capabilities"])
@needs_root
def test_a_worker_without_capabilities_cannot_pry_into_init(same_user: bool, launcher: Launcher) -> None:
    """SEC-05, trust level A. The kernel's own answers: init is not dumpable."""
    numbers = NUMBERS.get(os.uname().machine)
    if numbers is None or not Path("/usr/bin/perl").exists():
        pytest.skip("needs perl and the numbers of this machine's system calls")
    words = [str(word) for pair in numbers.items() for word in pair]
    if same_user:
        drop = ("/usr/bin/setpriv", "--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all")
        plan = plan_of(*drop, *shell(PRY, "sh", *words))
    else:
        plan = plan_of(*shell(PRY, "sh", *words))._replace(identity=NOBODY)
    outcome = run(plan, launcher)
    found = outcome.out.decode().splitlines()
    if same_user:
        found.remove("signalled")  # of the same user, it may; init does not listen
    assert found == []


@needs_root
def test_nothing_of_ours_is_in_inits_arguments_and_environment(launcher: Launcher) -> None:
    """SEC-08."""
    os.environ["NSSUP_SECRET"] = "do not tell"
    try:
        files = ("/proc/1/environ", "/proc/self/environ", "/proc/1/cmdline")
        plan = plan_of("/bin/cat", *files)._replace(env=(b"ONLY=this",))
        out = run(plan, launcher).out
    finally:
        del os.environ["NSSUP_SECRET"]
    assert out == b"ONLY=this\0nssup-init\0"


# --- descriptors -----------------------------------------------------------------------------------------------------


def open_fds() -> set[str]:
    return {fd for fd in os.listdir("/proc/self/fd") if Path(f"/proc/self/fd/{fd}").is_symlink()}


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("init", [False, True])
def test_four_descriptors_a_worker_at_rest(merge: bool, init: bool, launcher: Launcher) -> None:
    """init's pidfd, the line, stdout and stderr; three with one pipe; without init the line goes at the exec."""
    before = open_fds()
    lives = [launcher.launch(plan_of("/bin/sleep", "1000", init=init), merge=merge) for _ in range(10)]
    for process in lives:
        process.go()
        Driver(process).hear(wire.Started)
    assert len(open_fds() - before) == 10 * (3 if merge else 4)
    for process in lives:
        process.destroy()
    assert open_fds() == before


def test_stdio_that_is_given_stays_the_givers(launcher: Launcher) -> None:
    stdin, say = os.pipe()
    hear, stdout = os.pipe()
    plan = plan_of("/bin/cat")
    before = open_fds()
    with launched(plan, launcher, stdio=(stdin, stdout, stdout)) as life:
        assert (life.process.stdout, life.process.stderr) == (None, None)
        assert len(open_fds() - before) == 2
        os.write(say, b"through")
        os.close(say)
        assert life.hear(wire.Exited).exit[:2] == (os.CLD_EXITED, 0)
        life.end()
    for fd in (stdin, stdout):
        os.close(fd)
    assert read_all(hear) == b"through"
    os.close(hear)


def test_one_pipe_for_both(launcher: Launcher) -> None:
    process = launcher.launch(plan_of(*shell("echo a; echo b >&2; echo c")), merge=True)
    process.go()
    Driver(process).end()
    stdout, stderr = process.take_logs()
    assert stdout is not None
    assert stderr is None
    assert read_all(stdout) == b"a\nb\nc\n"
    os.close(stdout)
    process.close()


# --- the supervisor's death ------------------------------------------------------------------------------------------


def opened(host_pid: int) -> int:
    return os.pidfd_open(host_pid)


@pytest.mark.usefixtures("subreaper")
@pytest.mark.parametrize("init", [True, False])
def test_killed_between_clone_and_go_nothing_ever_runs(init: bool, canary: Path) -> None:
    launcher = Launcher()
    plan = leaving(canary, init=init)

    def supervisor(say: int) -> None:
        own = Launcher()  # with a pidfd of its own
        process = own.launch(plan)
        os.write(say, process.init_host_pid.to_bytes(4, "little"))
        signal.pause()

    for _ in range(50):
        with forked(supervisor) as (child, heard):
            wait_readable(heard)
            pidfd = opened(int.from_bytes(os.read(heard, 4), "little"))
            signal.pidfd_send_signal(child, signal.SIGKILL)
            assert end_of(child) == (os.CLD_KILLED, signal.SIGKILL)
            assert end_of(pidfd) == (os.CLD_EXITED, 1)
            os.close(pidfd)
    assert not canary.exists()
    launcher.close()


@pytest.mark.usefixtures("subreaper")
def test_killed_anywhere_in_a_launch_nothing_ever_runs(canary: Path) -> None:
    """Also between the clone and init's exec: whoever is left is our child then, and goes by itself."""
    plan = leaving(canary)

    def supervisor(say: int) -> None:
        own = Launcher()
        while True:
            process = own.launch(plan)
            os.write(say, b"x")
            process.destroy()

    moments = random.Random(1)
    for _ in range(60):
        with forked(supervisor) as (child, heard):
            wait_readable(heard)
            for _ in range(moments.randrange(4000)):
                pass
            signal.pidfd_send_signal(child, signal.SIGKILL)
            end_of(child)
        with contextlib.suppress(ChildProcessError):
            while os.waitid(os.P_ALL, 0, os.WEXITED):
                continue
    assert not canary.exists()


@pytest.mark.usefixtures("subreaper")
@pytest.mark.parametrize("init", [True, False])
@pytest.mark.parametrize("thread", [False, True], ids=["main thread", "another thread"])
def test_under_die_the_tree_goes_with_its_supervisor(init: bool, thread: bool) -> None:
    script = "trap '' TERM HUP; setsid sleep 1000 & setsid sh -c 'trap \"\" TERM HUP; sleep 1000' & wait"

    def launch(say: int) -> None:
        own = Launcher()
        process = own.launch(plan_of(*shell(script), init=init))
        process.go()
        life = Driver(process)
        life.hear(wire.Started)
        eventually(lambda: len(tree_of(process.init_host_pid)) == 3 + init)
        os.write(say, process.init_host_pid.to_bytes(4, "little"))
        signal.pause()

    def in_thread(say: int) -> None:
        threading.Thread(target=launch, args=(say,)).start()
        signal.pause()

    with forked(in_thread if thread else launch) as (child, heard):
        wait_readable(heard)
        host_pid = int.from_bytes(os.read(heard, 4), "little")
        tree = tree_of(host_pid)
        pidfd = opened(host_pid)
        signal.pidfd_send_signal(child, signal.SIGKILL)
        end_of(child)
        assert end_of(pidfd) in ((os.CLD_EXITED, 1), (os.CLD_KILLED, signal.SIGKILL))
        assert not any(map(is_there, tree))
        os.close(pidfd)


@pytest.mark.usefixtures("subreaper")
def test_under_keep_it_lives_on() -> None:
    def supervisor(say: int) -> None:
        process = Launcher().launch(plan_of("/bin/sleep", "1000", die=False))
        process.go()
        os.write(say, Driver(process).hear(wire.Started).host_pid.to_bytes(4, "little"))
        os.write(say, process.init_host_pid.to_bytes(4, "little"))
        signal.pause()

    with forked(supervisor) as (child, heard):
        wait_readable(heard)
        host_pid = int.from_bytes(os.read(heard, 4), "little")
        wait_readable(heard)
        pidfd = opened(int.from_bytes(os.read(heard, 4), "little"))
        signal.pidfd_send_signal(child, signal.SIGKILL)
        end_of(child)
        os.kill(host_pid, signal.SIGTERM)  # and init keeps the record of its end
        eventually(lambda: not is_there(host_pid))
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        assert poll.poll(0) == []
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        assert end_of(pidfd) == (os.CLD_KILLED, signal.SIGKILL)
        os.close(pidfd)


def test_under_die_an_abandoned_life_ends(launcher: Launcher) -> None:
    """Its supervisor lives, and has let go of the line."""
    with running(SLEEPER, launcher) as (life, host_pid):
        life.process.close_line()
        wait_readable(life.process.pidfd)
        assert not is_there(host_pid)


# --- what a hostile init can do to us --------------------------------------------------------------------------------


@pytest.fixture
def line() -> Iterator[tuple[Process, socket.socket]]:
    """A Process, and the other end of its line: as an init that was taken over by a worker that may trace it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    ours.setsockopt(socket.SOL_SOCKET, clone.SO_PASSCRED, 1)
    with subprocess.Popen(["sleep", "1000"]) as other:
        process = Process(os.pidfd_open(other.pid), other.pid, ours, (-1, -1), SLEEPER, 1, bytes(16))
        with theirs:
            yield process, theirs
            process.close()
        other.kill()


EXITED = wire.message(wire.Type.EXITED, bytes(48))


def test_what_was_said_before_a_reset_is_heard(line: tuple[Process, socket.socket]) -> None:
    process, init = line
    process.ping()
    init.send(EXITED)
    init.close()
    assert process.receive() == [wire.Exited(0, wire.Exit())]
    assert process.line_ended
    assert process.receive() == []


def test_a_flood_is_taken_in_parts(line: tuple[Process, socket.socket]) -> None:
    process, init = line
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            init.send(EXITED)
            sent += 1
    parts = [len(process.receive())]
    while parts[-1]:
        parts.append(len(process.receive()))
    assert sum(parts) == sent > max(parts)
    assert not process.line_ended


def test_descriptors_that_init_sends_do_not_become_ours(line: tuple[Process, socket.socket]) -> None:
    process, init = line
    before = open_fds()
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [init.fileno()] * 50))
    init.sendmsg([EXITED], [rights])
    assert len(process.receive()) == 1
    assert open_fds() == before


def test_garbage_is_counted(line: tuple[Process, socket.socket]) -> None:
    process, init = line
    noise = random.Random(4)
    for _ in range(20):
        init.send(noise.randbytes(noise.randrange(1, 6000)))
    assert process.receive() == []
    assert process.unknown == 20
    init.send(b"")
    assert process.receive() == []
    assert process.line_ended


def test_numbers_out_of_all_bounds_become_some_exit() -> None:
    worst = wire.decode(wire.message(wire.Type.EXITED, b"\xff" * 48), 0)[0][0]
    assert isinstance(worst, wire.Exited)
    assert clone.exit_of_message(worst.exit).reason == "signal:SIG-1"
    for code in (-1, 0, 1, 2, 3, 4, 2**31 - 1):
        for status in (-(2**31), -1, 0, 64, 65, 256, 2**31 - 1):
            assert clone.exit_of_message(wire.Exit(code, status)).reason


def test_words_to_a_dead_init_are_lost_in_silence(line: tuple[Process, socket.socket]) -> None:
    process, init = line
    init.close()
    process.go()
    process.signal(signal.SIGTERM)
    process.acknowledge()
    process.ping()
    assert process.receive() == []
    assert process.line_ended


def test_a_go_that_is_lost_ends_the_life(launcher: Launcher, canary: Path) -> None:
    """At once, not when init has lost its patience."""
    with launched(leaving(canary), launcher, go=False) as life:
        signal.pidfd_send_signal(life.process.pidfd, signal.SIGSTOP)
        os.waitid(os.P_PIDFD, life.process.pidfd, os.WSTOPPED)
        for _ in range(1000):
            life.process.ping()
        life.process.go()
        assert life.end().reason == "init-killed"
    assert not canary.exists()


def test_words_to_a_deaf_init_do_not_block(line: tuple[Process, socket.socket]) -> None:
    process, _ = line
    for _ in range(1000):
        process.signal(signal.SIGTERM)
