"""nssup.run and nssup.launch, on both event loops, with real programs; and what is left of them: nothing."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from live import PATIENCE, PidNamespaces, needs_namespaces, needs_root, wait_gone, wait_readable

import nssup
from nssup import LaunchError, Process, RunFailed, RunTimeout, SpecError
from nssup.hub import hub
from nssup.pipes import CHUNK, ReadEnd, Stream
from nssup.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Coroutine

pytestmark = [needs_namespaces, pytest.mark.both_loops]

# Says its name, and leaves a child of its own session behind that has let go of everything.
FORKER = "(setsid sleep 1000 </dev/null >/dev/null 2>&1 &) ; echo forked; "
# A program that ignores everything that can be ignored, and has a tree below it.
DEAF = "trap '' TERM INT HUP; sleep 1000 & echo deaf; while :; do sleep 1000; done"


async def patient(waiting: Coroutine[Any, Any, Any]) -> Any:  # noqa: ANN401
    async with asyncio.timeout(PATIENCE):
        return await waiting


class Tree:
    """The namespaces of a process, so that it can be seen whether anything is left in them."""

    def __init__(self, process: Process) -> None:
        self._held = PidNamespaces()
        self._held.hold(process.init_host_pid)
        assert process.host_pid in self._held.processes()

    def left(self) -> list[int]:
        found = self._held.processes()
        self._held.close()
        return found


# --- run -------------------------------------------------------------------------------------------------------------


async def test_what_it_wrote_and_how_it_ended() -> None:
    result = await nssup.run(["sh", "-c", "echo out; echo err >&2; exit 3"])
    assert (result.stdout, result.stderr, result.returncode) == (b"out\n", b"err\n", 3)
    assert (result.exit.reason, result.exit.code, result.exit.signal) == ("exit:3", 3, None)
    assert result.exit.cpu_seconds is not None
    assert (result.exit.max_rss_bytes or 0) > 100_000
    assert abs(time.time() - result.exit.at) < PATIENCE
    assert result.args == ("sh", "-c", "echo out; echo err >&2; exit 3")


async def test_it_is_in_namespaces_of_its_own_and_both_pids_are_known() -> None:
    script = "echo $$; readlink /proc/self/ns/pid /proc/self/ns/mnt /proc/self/ns/uts /proc/self/ns/ipc; ls /proc"
    result = await nssup.run(["sh", "-c", script], encoding="utf-8")
    lines = result.stdout.split()
    assert int(lines[0]) == result.ns_pid == 2
    assert result.host_pid not in (2, os.getpid())
    for name, inode in zip(("pid", "mnt", "uts", "ipc"), lines[1:5], strict=True):
        assert inode != os.readlink(f"/proc/self/ns/{name}")
    assert [word for word in lines[5:] if word.isdigit()][:2] == ["1", "2"]


@pytest.mark.parametrize("signo", [signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1])
async def test_a_signal_is_a_negative_code(signo: int) -> None:
    result = await nssup.run(["sh", "-c", f"kill -{signo} $$"])
    assert (result.returncode, result.exit.signal, result.exit.code) == (-signo, signo, None)


async def test_a_command_may_be_a_text_and_its_words_may_be_bytes_and_paths() -> None:
    assert (await nssup.run("echo 'a  b' c")).stdout == b"a  b c\n"
    assert (await nssup.run([Path("/bin/echo"), b"\xff"])).stdout == b"\xff\n"


@pytest.mark.parametrize("size", [0, 1, CHUNK, 3_000_000])
async def test_input_reaches_it_and_then_the_end(size: int) -> None:
    result = await nssup.run(["cat"], input=b"x" * size)
    assert result.stdout == b"x" * size


async def test_input_that_nobody_reads_holds_nobody() -> None:
    assert (await nssup.run(["true"], input=b"x" * 10_000_000)).returncode == 0


async def test_without_input_stdin_is_empty() -> None:
    assert (await nssup.run(["cat"])).stdout == b""


async def test_texts() -> None:
    result = await nssup.run(["cat"], input="häß", encoding="latin-1")
    assert result.stdout == "häß"
    with pytest.raises(UnicodeDecodeError):
        await nssup.run(["printf", r"\377"], encoding="utf-8")
    assert (await nssup.run(["printf", r"\377"], encoding="utf-8", errors="replace")).stdout == "\ufffd"


async def test_what_is_beyond_max_output_is_counted_and_holds_nobody() -> None:
    result = await nssup.run(["sh", "-c", "head -c 3000000 /dev/zero; echo x >&2"], max_output="1M")
    assert (len(result.stdout), result.stdout_dropped) == (1 << 20, 3_000_000 - (1 << 20))
    assert (result.stderr, result.stderr_dropped) == (b"x\n", 0)
    assert (await nssup.run(["echo", "abc"], max_output=2)).stdout == b"ab"


async def test_where_its_output_goes(tmp_path: Path) -> None:
    both = "echo out; echo err >&2"
    assert (await nssup.run(["sh", "-c", both], stderr="stdout")).stdout == b"out\nerr\n"
    assert (await nssup.run(["sh", "-c", both], stderr="null")).stderr == b""
    with (tmp_path / "out").open("wb") as file:
        result = await nssup.run(["sh", "-c", both], stdout=file, stderr=file.fileno())
    assert (result.stdout, result.stderr) == (b"", b"")
    assert (tmp_path / "out").read_text() == "out\nerr\n"
    with (tmp_path / "out").open("rb") as file:
        assert (await nssup.run(["cat"], stdin=file)).stdout == b"out\nerr\n"


async def test_its_environment_and_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NSSUP_TEST_A", "1")
    monkeypatch.chdir(tmp_path)
    ours = (await nssup.run(["sh", "-c", "echo $NSSUP_TEST_A; pwd"], encoding="utf-8")).stdout.split()
    assert ours == ["1", str(tmp_path)]
    assert (await nssup.run(["/usr/bin/env"], env={"B": "{index}"})).stdout == b"B={index}\n"
    assert (await nssup.run(["pwd"], directory="/usr")).stdout == b"/usr\n"


async def test_keys_of_a_pool() -> None:
    script = "hostname; ulimit -n; umask; ls -d /proc/net"
    rlimits: dict[str, tuple[int | None, int | None]] = {"nofile": (50, 60)}
    result = await nssup.run(["sh", "-c", script], encoding="utf-8", hostname="box", rlimits=rlimits, umask=0o27)
    assert result.stdout.split()[:3] == ["box", "50", "0027"]


@needs_root
async def test_another_user_may_open_its_own_stdout() -> None:
    result = await nssup.run(["sh", "-c", "id -u; echo x >/dev/stdout"], user="nobody")
    assert result.stdout == b"65534\nx\n"


async def test_what_is_wrong_is_said_before_anything_is_done() -> None:
    with pytest.raises(SpecError, match="empty"):
        await nssup.run([])
    with pytest.raises(SpecError, match="NUL"):
        await nssup.run(["a\0b"])
    with pytest.raises(SpecError, match="namespaces"):
        await nssup.run(["true"], namespaces=("mount",))
    with pytest.raises(SpecError, match="no user"):
        await nssup.run(["true"], user="nobody-of-that-name")
    with pytest.raises(SpecError, match="must not be empty"):
        await nssup.run(["true"], env={"": "x"})
    with pytest.raises(SpecError, match="stdout"):
        await nssup.run(["true"], stdout="nowhere")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="colour"):
        await nssup.run(["true"], colour="red")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="no unit"):
        await nssup.run(["true"], max_output="64")


@pytest.mark.parametrize(("command", "number"), [("no-such-program", 2), ("/etc/passwd", 13), ("/", 13)])
async def test_a_program_that_cannot_be_executed(command: str, number: int) -> None:
    with pytest.raises(LaunchError, match=command) as refused:
        await nssup.run([command])
    assert (refused.value.step, refused.value.errno) == ("exec", number)
    with pytest.raises(LaunchError):
        await nssup.launch([command], stdin="pipe")


async def test_a_step_that_fails_is_named() -> None:
    with pytest.raises(LaunchError, match="/no/such/directory") as refused:
        await nssup.run(["true"], directory="/no/such/directory")
    assert (refused.value.step, refused.value.errno) == ("directory", 2)


async def test_check() -> None:
    assert (await nssup.run(["true"], check=True)).check().returncode == 0
    with pytest.raises(RunFailed, match="exit:7") as failed:
        await nssup.run(["sh", "-c", "echo why >&2; exit 7"], check=True)
    assert (failed.value.result.returncode, failed.value.result.stderr) == (7, b"why\n")


async def test_a_timeout_is_raised_when_the_whole_tree_is_gone(tmp_path: Path) -> None:
    namespaces = PidNamespaces()
    os.mkfifo(tmp_path / "there")

    async def end_its_time() -> None:
        """When the fifo says that all is there, its time is over."""
        await asyncio.to_thread((tmp_path / "there").read_bytes)
        (life,) = hub().lives
        namespaces.hold(life.init_host_pid)
        assert len(namespaces.processes()) >= 3  # init, the shell, what has left its session
        life.expire()

    async with asyncio.TaskGroup() as group:
        group.create_task(end_its_time())
        with pytest.raises(RunTimeout) as late:
            await nssup.run(["sh", "-c", f"{FORKER} echo >{tmp_path}/there; {DEAF}"], timeout=1000)
        assert namespaces.processes() == []
    namespaces.close()
    assert isinstance(late.value, TimeoutError)
    result = late.value.result
    assert isinstance(result.stdout, bytes)
    assert result.stdout.startswith(b"forked\n")
    assert (result.exit.timed_out, result.exit.reason, result.returncode) == (True, "signal:SIGKILL", -9)


async def test_in_time_is_in_time() -> None:
    result = await nssup.run(["true"], timeout=1000)
    assert not result.exit.timed_out
    with pytest.raises(RunTimeout):
        await nssup.run(["sleep", "1000"], timeout=0)


async def test_what_it_leaves_behind_ends_with_it() -> None:
    result = await nssup.run(["sh", "-c", FORKER])
    assert (result.returncode, result.stdout) == (0, b"forked\n")


async def test_cancelled_it_kills_waits_and_says_so() -> None:
    started = asyncio.Event()
    held = PidNamespaces()
    read, write = os.pipe()
    loop = asyncio.get_running_loop()

    def forked() -> None:
        loop.remove_reader(read)
        for name in Path(f"/proc/{os.getpid()}/task/{threading.get_native_id()}/children").read_text().split():
            held.hold(int(name))
        started.set()

    loop.add_reader(read, forked)
    try:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(nssup.run(["sh", "-c", FORKER + DEAF], stdout=write))
            await patient(started.wait())
            assert held.processes()
            task.cancel()
            await asyncio.sleep(0)
            task.cancel()  # an impatient one changes nothing
        assert task.cancelled()
        assert held.processes() == []
    finally:
        held.close()
        os.close(read)
        os.close(write)


async def test_cancelled_before_its_turn_it_never_was() -> None:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(nssup.run(["true"])) for _ in range(20)]
        await asyncio.sleep(0)
        for task in tasks[10:]:
            task.cancel()
    assert all(task.result().returncode == 0 for task in tasks[:8])
    assert all(task.cancelled() for task in tasks[10:])


async def test_a_time_limit_of_asyncio_is_as_good() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await nssup.run(["sh", "-c", DEAF])


async def test_its_init_killed_from_outside_invents_no_code() -> None:
    async with await nssup.launch(["sleep", "1000"]) as process:
        pidfd = os.pidfd_open(process.init_host_pid)
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)
        ended = await patient(process.wait())
    assert (ended.reason, ended.code, ended.signal, process.returncode) == ("init-killed", None, None, -9)


# --- launch ----------------------------------------------------------------------------------------------------------


async def test_a_conversation() -> None:
    async with await nssup.launch(["cat"], stdin="pipe") as process:
        assert process.stdin
        assert process.stdout
        for word in (b"one\n", b"two\n"):
            process.stdin.write(word)
            assert await patient(process.stdout.readline()) == word
        process.stdin.close()
        assert process.stdin.is_closing()
        assert await patient(process.stdout.read()) == b""
        assert (await patient(process.wait())).code == 0
        assert process.returncode == 0
        with pytest.raises(RuntimeError, match="closed"):
            process.stdin.write(b"x")


async def test_much_both_ways() -> None:
    data = os.urandom(1 << 20) * 4
    async with await nssup.launch(["cat"], stdin="pipe", limit=1000) as process, asyncio.TaskGroup() as group:
        assert process.stdin
        assert process.stdout
        process.stdin.write(data)
        process.stdin.close()
        group.create_task(patient(process.stdin.drain()))
        assert await patient(process.stdout.readexactly(len(data))) == data


async def test_who_does_not_read_holds_the_program_back() -> None:
    watch = Watch(asyncio.get_running_loop())
    read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    stream = Stream(asyncio.get_running_loop(), 10_000)
    end = ReadEnd(watch, read, stream)
    stream.connect(end)
    written, quiet = 0, 0
    while quiet < 3:
        try:
            written += os.write(write, b"x" * CHUNK)
            quiet = 0
        except BlockingIOError:
            quiet += 1
            for _ in range(5):
                await asyncio.sleep(0)
    assert written <= 20_000 + 3 * CHUNK
    os.close(write)
    assert len(await patient(stream.reader.read())) == written
    watch.close()


async def test_a_program_that_closes_its_stdin() -> None:
    async with await nssup.launch(["sh", "-c", "exec <&-; echo closed; sleep 1000"], stdin="pipe") as process:
        assert process.stdin
        assert process.stdout
        await patient(process.stdout.readline())
        process.stdin.write(b"x" * (CHUNK + 1))
        with pytest.raises(BrokenPipeError):
            await patient(process.stdin.drain())
        process.stdin.write(b"nobody")


async def test_what_waits_for_room_ends_with_the_program() -> None:
    async with await nssup.launch(["sleep", "1000"], stdin="pipe") as process:
        assert process.stdin
        process.stdin.write(b"x" * 1_000_000)
        process.kill()
        with pytest.raises(BrokenPipeError):
            await patient(process.stdin.drain())


async def test_signals_reach_the_program_alone_and_kill_the_tree() -> None:
    script = "trap 'echo usr1' USR1; sleep 1000 & echo up; while :; do wait; done"
    async with await nssup.launch(["sh", "-c", script]) as process:
        tree = Tree(process)
        assert process.stdout
        assert await patient(process.stdout.readline()) == b"up\n"
        process.send_signal(signal.SIGUSR1)
        assert await patient(process.stdout.readline()) == b"usr1\n"
        assert process.exit is None
        process.kill()
        assert (await patient(process.wait())).signal == signal.SIGKILL
        assert tree.left() == []
        process.kill()
        process.send_signal(signal.SIGTERM)


async def test_all_output_is_there_after_the_end() -> None:
    async with await nssup.launch(["sh", "-c", "head -c 60000 /dev/zero; exit 4"], limit=100) as process:
        assert (await patient(process.wait())).code == 4
        assert process.stdout
        assert len(await patient(process.stdout.read())) == 60_000


async def test_a_cancelled_wait_leaves_it_alone() -> None:
    async with await nssup.launch(["sleep", "1000"]) as process:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await process.wait()
        assert process.exit is None


@pytest.mark.parametrize("how", ["end", "error"])
async def test_the_block_ends_the_whole_tree(how: str) -> None:
    tree = None
    try:
        async with await nssup.launch(["sh", "-c", FORKER + DEAF]) as process:
            assert process.stdout
            await patient(process.stdout.readline())
            tree = Tree(process)
            if how == "error":
                raise LookupError
    except LookupError:
        assert how == "error"
    assert tree is not None
    assert tree.left() == []
    assert process.returncode == -9


async def test_a_passed_on_stdout_does_not_hold_the_end() -> None:
    """An end of the pipe that went out of the namespace, to us."""
    ours, theirs = socket.socketpair()
    script = (
        "import array, os, socket; s = socket.socket(fileno=0); "
        "s.sendmsg([b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [1]))]); print('told', flush=True)"
    )
    result = await patient(nssup.run([sys.executable, "-S", "-c", script], stdin=theirs))
    assert (result.stdout, result.returncode) == (b"told\n", 0), result.stderr
    _, passed, _, _ = socket.recv_fds(ours, 1, 1)
    os.close(passed[0])
    ours.close()
    theirs.close()


# --- many ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_two_thousand_at_once_and_no_exit_is_lost() -> None:
    import resource

    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 10_000:
        pytest.skip("needs 10,000 open files (ulimit -n)")
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(nssup.run(["sh", "-c", f"echo {n}; exit {n % 256}"])) for n in range(2000)]
    ends = [(task.result().stdout, task.result().returncode) for task in tasks]
    assert ends == [(f"{n}\n".encode(), n % 256) for n in range(2000)]


# --- inside any program ----------------------------------------------------------------------------------------------


def host_program(script: str, *args: str) -> Any:  # noqa: ANN401
    """What a program that is not ours prints, as JSON."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *args], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return json.loads(done.stdout)


LOOPS = """
import asyncio, json, os, signal, subprocess, sys, threading, uvloop
import nssup
factory = {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}[sys.argv[1]]
def go(main):
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main)
async def codes(count=20):
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(nssup.run(["sh", "-c", f"exit {n}"])) for n in range(count)]
    return [task.result().returncode for task in tasks]
"""


@pytest.fixture(params=["uvloop", "asyncio"])
def loop_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_in_a_host_that_reaps_everybody(loop_name: str) -> None:
    script = LOOPS + (
        "stop = threading.Event()\n"
        "def reap():\n"
        "    while not stop.is_set():\n"
        "        try: os.waitpid(-1, 0)\n"
        "        except ChildProcessError: pass\n"
        "thread = threading.Thread(target=reap); thread.start()\n"
        "found = go(codes())\n"
        "stop.set(); thread.join(); print(json.dumps(found))"
    )
    assert host_program(script, loop_name) == list(range(20))


@pytest.mark.parametrize("when", ["before", "after"])
def test_in_a_host_that_ignores_sigchld(loop_name: str, when: str) -> None:
    script = LOOPS + (
        "async def main():\n"
        "    if sys.argv[2] == 'after': await nssup.run(['true'])\n"
        "    signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
        "    return await codes()\n"
        "print(json.dumps(go(main())))"
    )
    assert host_program(script, loop_name, when) == list(range(20))


def test_in_threads_twice_and_beside_subprocess_and_multiprocessing(loop_name: str) -> None:
    script = LOOPS + (
        "import concurrent.futures, multiprocessing\n"
        "def in_thread(_): return go(codes())\n"
        "async def beside():\n"
        "    child = await asyncio.create_subprocess_exec('sh', '-c', 'exit 5')\n"
        "    ours = await nssup.run(['sh', '-c', 'exit 6'])\n"
        "    other = subprocess.run(['sh', '-c', 'exit 7']).returncode\n"
        "    process = multiprocessing.get_context('spawn').Process(target=sys.exit, args=(8,)); process.start()\n"
        "    process.join()\n"
        "    return [await child.wait(), ours.returncode, other, process.exitcode]\n"
        "with concurrent.futures.ThreadPoolExecutor(3) as pool: found = list(pool.map(in_thread, range(3)))\n"
        "found.append(go(codes())); found.append(go(beside()))\n"
        "print(json.dumps(found))"
    )
    assert host_program(script, loop_name) == [*[list(range(20))] * 4, [5, 6, 7, 8]]


def test_nothing_is_left_in_the_host(loop_name: str) -> None:
    script = LOOPS + (
        "def open_now(): return sorted((n, os.readlink(f'/proc/self/fd/{n}')) for n in os.listdir('/proc/self/fd')\n"
        "                              if os.path.lexists(f'/proc/self/fd/{n}'))\n"
        "go(asyncio.sleep(0)); before = open_now(), threading.active_count()\n"
        "handlers = [signal.getsignal(n) for n in signal.valid_signals()]\n"
        "go(codes()); after = open_now(), threading.active_count()\n"
        "assert handlers == [signal.getsignal(n) for n in signal.valid_signals()]\n"
        "print(json.dumps([before == after, before, after]))"
    )
    same, before, after = host_program(script, loop_name)
    assert same, (before, after)


def test_a_loop_that_is_just_closed_gives_everything_back_to_the_next(loop_name: str) -> None:
    script = LOOPS + (
        "def once():\n"
        "    loop = factory(); found = loop.run_until_complete(codes(2)); loop.close(); return found\n"
        "for _ in range(3): found = once()\n"
        "before = len(os.listdir('/proc/self/fd'))\n"
        "for _ in range(20): once()\n"
        "print(json.dumps([found, len(os.listdir('/proc/self/fd')) - before]))"
    )
    assert host_program(script, loop_name) == [[0, 1], 0]


def test_under_a_host_that_forks(loop_name: str) -> None:
    """The child has copies of everything: the program must see the end of its stdin all the same, and the child may use
    nssup itself."""
    script = LOOPS + (
        "async def main():\n"
        "    async with await nssup.launch(['cat'], stdin='pipe') as process:\n"
        "        ours, theirs = os.pipe()\n"
        "        child = os.fork()\n"
        "        if child == 0:\n"
        "            os.read(ours, 1) if os.close(theirs) is None else None\n"
        "            os._exit(0)\n"
        "        process.stdin.close()\n"
        "        ended = await process.wait()\n"
        "        os.close(theirs); os.waitpid(child, 0)\n"
        "        child = os.fork()\n"
        "        if child == 0:\n"
        "            os._exit(asyncio.run(nssup.run(['sh', '-c', 'exit 9'])).returncode)\n"
        "        forked = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])\n"
        "        return [ended.code, forked, (await nssup.run(['true'])).returncode]\n"
        "print(json.dumps(go(main())))"
    )
    assert host_program(script, loop_name) == [0, 9, 0]


def test_it_dies_with_its_host(loop_name: str) -> None:
    script = LOOPS + (
        "async def main():\n"
        "    async with await nssup.launch(['sleep', '1000']) as process:\n"
        "        print(process.host_pid, flush=True); await process.wait()\n"
        "go(main())"
    )
    with subprocess.Popen([sys.executable, "-c", script, loop_name], stdout=subprocess.PIPE, text=True) as host:
        assert host.stdout
        host_pid = int(host.stdout.readline())
        pidfd = os.pidfd_open(host_pid)
        host.kill()
        wait_readable(pidfd, "the program outlived its host")
        os.close(pidfd)
    wait_gone(host_pid)
