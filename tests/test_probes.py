"""Probes of real programs: they are tried, bounded, forgotten; and commands of stop sequences."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from typing import TYPE_CHECKING

import pytest
from live import PATIENCE, Witness, needs_namespaces

from nssup.events import Reload, State, Stop
from nssup.loop import Supervisor
from nssup.probe import Failed, ask
from nssup.prober import AT_ONCE
from nssup.spec import PoolSpec, Probe, ReloadSpec, RestartPolicy, StopStep

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

PYTHON = (os.path.realpath(sys.executable), "-S", "-E", "-c")
NEVER = RestartPolicy(policy="never")
SLEEP = ("/bin/sleep", "1000")
QUICK = 0.02  # seconds from one try to the next

both = pytest.mark.both_loops


# --- one try ---------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def server(
    answer: Callable[[bytes], bytes | None], path: str | None = None
) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A server and what it was asked. answer: to what it got so far; None: it says nothing, and waits."""
    asked: list[bytes] = []
    gone = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            data = await reader.read(4096)
            asked.append(data)
            said = answer(data)
            if said is None:
                await gone.wait()
            writer.write(said or b"")
            writer.close()

    made = await (asyncio.start_unix_server(serve, path) if path else asyncio.start_server(serve, "127.0.0.1", 0))
    try:
        name = made.sockets[0].getsockname()
        yield (path or f"127.0.0.1:{name[1]}"), asked
    finally:
        gone.set()
        made.close()


async def why(probe: Probe, place: str) -> str:
    try:
        await ask(probe, place)
    except Failed as error:
        return str(error)
    return ""


@pytest.fixture
def refused() -> Iterator[str]:
    """A port where nobody listens, and nobody else will."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{sock.getsockname()[1]}"


@both
@pytest.mark.parametrize(
    ("answer", "wrong"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\nhello", ""),
        (b"HTTP/1.0 204 \r\n\r\n", ""),
        (b"HTTP/1.1 302 Found\r\nLocation: http://example.org/\r\n\r\n", ""),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "HTTP status 404"),
        (b"HTTP/1.1 503 Busy\r\n\r\n" + b"x" * 100_000, "HTTP status 503"),
        (b"HTTP/1.1 200 OK", ""),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "no HTTP answer"),
        (b"", "no HTTP answer"),
        (b"HTTP/1.1 2000\r\n\r\n", "no HTTP answer"),
        (b"x" * 1_000_000, "no HTTP answer"),
    ],
)
async def test_http(answer: bytes, wrong: str) -> None:
    async with server(lambda _: answer) as (place, asked):
        assert await why(Probe(http="x"), f"http://{place}/ready?x=1") == wrong
        host = place.encode()
        assert asked[0].startswith(b"GET /ready?x=1 HTTP/1.1\r\nHost: " + host + b"\r\n")


@both
async def test_who_says_nothing() -> None:
    async with server(lambda _: None) as (place, _):
        assert await why(Probe(http="x", timeout=0.05), f"http://{place}/") == "no answer within 0.05 s"
        assert await why(Probe(tcp="x", timeout=5.0), place) == ""


@both
async def test_nobody_there(refused: str, tmp_path: Path) -> None:
    assert await why(Probe(tcp="x"), refused) == "ECONNREFUSED"
    assert await why(Probe(http="x"), f"http://{refused}") == "ECONNREFUSED"
    assert await why(Probe(tcp="x"), refused.replace("127.0.0.1", "localhost")) == "ECONNREFUSED"
    assert await why(Probe(unix="x"), str(tmp_path / "none")) == "ENOENT"


@both
async def test_a_unix_socket(tmp_path: Path) -> None:
    async with server(lambda _: b"", str(tmp_path / "sock")) as (place, _):
        assert await why(Probe(unix="x"), place) == ""


@both
async def test_the_other_loopback() -> None:
    try:
        made = await asyncio.start_server(lambda _, writer: writer.close(), "::1", 0)
    except OSError:
        pytest.skip("needs IPv6")
    port = made.sockets[0].getsockname()[1]
    assert await why(Probe(tcp="x"), f"localhost:{port}") == ""
    assert await why(Probe(tcp="x"), f"[::1]:{port}") == ""
    made.close()


# --- workers ---------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def watched(*specs: PoolSpec) -> AsyncIterator[tuple[Supervisor, Witness]]:
    async with Supervisor() as supervisor:
        seen = Witness(supervisor)
        for spec in specs:
            supervisor.add_pool(spec)
        yield supervisor, seen


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)


def pool(*command: str, **fields: object) -> PoolSpec:
    return PoolSpec(name="web", command=command or SLEEP, **{"restart": NEVER, **fields})  # type: ignore[arg-type]


@needs_namespaces
@both
async def test_a_worker_from_its_start_to_its_end_by_probes(tmp_path: Path) -> None:
    started, ready, well = tmp_path / "started", tmp_path / "ready", tmp_path / "well"
    well.touch()
    spec = pool(
        startup=Probe(exec=("test", "-e", str(started)), every=QUICK),
        ready=Probe(exec=("test", "-e", str(ready)), every=QUICK, failures=2),
        live=Probe(exec=("test", "-e", str(well)), every=QUICK),
    )
    async with watched(spec) as (supervisor, seen):
        ready.touch()
        started.touch()
        await seen.wait("started", "web/0")
        worker = supervisor.workers.workers["web/0"]
        assert (worker.state, worker.ready, worker.passed) == (State.RUNNING, True, True)
        ready.unlink()
        lost = await seen.wait("became_unready", "web/0")
        assert lost.reason == "probe-failed"
        failed = await seen.wait("probe_failed", "web/0")
        assert failed.detail == {"probe": "ready", "why": "exit:1"}
        ready.touch()
        await seen.wait("became_ready", "web/0")
        well.unlink()
        assert (await seen.wait("stop_begun", "web/0")).reason == "probe-failed"
        ended = await seen.wait("failed", "web/0")
        assert ended.exit is not None
        assert (ended.exit.reason, ended.exit.signal) == ("probe-failed", 15)


@needs_namespaces
@both
async def test_by_http() -> None:
    """Who is busy at first is ready when it says so."""
    answers = iter([b"HTTP/1.1 503 Busy\r\n\r\n", b""])
    async with server(lambda _: next(answers, b"HTTP/1.1 200 OK\r\n\r\n")) as (place, asked):
        port = place.partition(":")[2]
        async with watched(pool(ready=Probe(http=f"http://localhost:{{index+{port}}}/x", every=QUICK))) as (
            shell,
            seen,
        ):
            await seen.wait("started", "web/0")
            assert shell.probes("web/0") == {"ready": ""}
            assert len(asked) == 3


@needs_namespaces
@both
@pytest.mark.parametrize("text", ["now listening on 80", '{"log":"listening on 80"}'])
async def test_by_a_line(text: str) -> None:
    code = f"import os, signal; os.write(2, b'x\\n'); os.write(1, {text.encode()!r} + b'\\n'); signal.pause()"
    async with watched(pool(*PYTHON, code, ready=Probe(log=r"listening on \d+"))) as (_, seen):
        await seen.wait("started", "web/0")


@needs_namespaces
async def test_a_line_may_come_before_it_is_waited_for(tmp_path: Path) -> None:
    """While another probe is awaited."""
    gate = tmp_path / "gate"
    spec = pool(
        "/bin/sh",
        "-c",
        "echo listening; exec sleep 1000",
        startup=Probe(exec=("test", "-e", str(gate)), every=QUICK),
        ready=Probe(log="listening"),
    )
    async with watched(spec) as (supervisor, seen):
        await until(lambda: supervisor._prober._probed["web/0"].seen)
        assert supervisor.workers.workers["web/0"].state is State.STARTING
        gate.touch()
        await seen.wait("started", "web/0")


@needs_namespaces
async def test_the_line_of_another_life_does_not_count() -> None:
    script = 'if [ "$NSSUP_GENERATION" = 1 ]; then echo listening; exit 1; fi; exec sleep 1000'
    spec = pool("/bin/sh", "-c", script, ready=Probe(log="listening"), start_timeout=0.5, restart=RestartPolicy())
    async with watched(spec) as (_, seen):
        begun = await seen.wait("stop_begun", "web/0", generation=2)
        assert begun.reason == "start-timeout"


@needs_namespaces
@both
async def test_a_command_that_hangs_counts_as_failed() -> None:
    spec = pool(
        startup=Probe(exec=("true",)), live=Probe(exec=("sleep", "1000"), every=QUICK, timeout=0.05, failures=2)
    )
    async with watched(spec) as (_, seen):
        assert (await seen.wait("probe_failed", "web/0")).detail == {"probe": "live", "why": "timeout"}
        assert (await seen.wait("stop_begun", "web/0")).reason == "probe-failed"


@needs_namespaces
async def test_who_could_not_be_asked_is_not_blamed() -> None:
    """So many commands run beside it that there is no room for the probe's."""
    spec = pool(startup=Probe(exec=("true",)), live=Probe(exec=("true",), every=QUICK, failures=1))
    async with watched(spec) as (supervisor, seen):
        await seen.wait("started", "web/0")
        process = supervisor._lives["web/0", 1].process
        for number in range(16):
            assert process.spawn(1 << 20 | number, (b"sleep", b"1000"), (b"/bin/sleep",), ())
        before = len(seen.events)
        await until(lambda: supervisor._commands._number > 60)
        assert supervisor.workers.workers["web/0"].state is State.RUNNING
        assert len(seen.events) == before


@needs_namespaces
async def test_a_startup_probe_that_gives_up() -> None:
    async with watched(pool(startup=Probe(exec=("false",), every=QUICK, failures=3))) as (_, seen):
        begun = await seen.wait("stop_begun", "web/0")
        assert (begun.from_, begun.reason) == ("starting", "probe-failed")


@needs_namespaces
async def test_a_command_that_is_not_there_says_so() -> None:
    async with watched(pool(startup=Probe(exec=("no-such-probe",), every=QUICK, failures=1))) as (_, seen):
        assert (await seen.wait("probe_failed", "web/0")).detail == {"probe": "startup", "why": "exec-failed:ENOENT"}


@needs_namespaces
@both
async def test_only_so_many_at_a_time_and_none_is_left_out() -> None:
    """More workers than that ask a server that answers nobody before AT_ONCE have asked."""
    there = most = 0
    full = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal there, most
        there += 1
        most = max(most, there)
        if there == AT_ONCE:
            full.set()
        await full.wait()
        await reader.read(4096)
        there -= 1
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        writer.close()

    made = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = made.sockets[0].getsockname()[1]
    spec = pool(workers=AT_ONCE + 20, ready=Probe(http=f"http://127.0.0.1:{port}/", timeout=60.0))
    async with watched(spec) as (supervisor, seen):
        for number in range(AT_ONCE + 20):
            await seen.wait("started", f"web/{number}")
        assert most <= AT_ONCE
        assert all(worker.ready for worker in supervisor.workers.workers.values())
    made.close()


@needs_namespaces
@both
async def test_who_asked_for_no_probe_costs_nothing() -> None:
    async with watched(pool(workers=3)) as (supervisor, seen):
        for number in range(3):
            await seen.wait("started", f"web/{number}")
        prober = supervisor._prober
        assert (prober._probed, prober._heap, prober._alarm, supervisor._alarm) == ({}, [], None, None)
        assert len(supervisor._tasks._tasks) == 1  # the logs' own


@needs_namespaces
async def test_probes_end_with_the_worker() -> None:
    spec = pool(startup=Probe(exec=("true",)), live=Probe(exec=("sleep", "1000"), every=QUICK, timeout=600.0))
    async with watched(spec) as (supervisor, seen):
        await seen.wait("started", "web/0")
        await until(lambda: supervisor._prober._probed["web/0"].tries)
        supervisor.feed("web/0", Stop())
        await seen.wait("stopped", "web/0")
        assert supervisor._prober._probed == {}
        assert supervisor._commands._waiting == {}
        assert supervisor._prober._running == 0


# --- commands of the stop sequence, and of a reload ------------------------------------------------------------------


@needs_namespaces
@both
async def test_a_stop_by_command() -> None:
    """It runs beside the program, as its user, with its fields filled in; what it writes is in the program's log."""
    quit_ = ("/bin/sh", "-c", "echo bye {id} from $NSSUP_POOL; kill -INT 2")
    code = "import os, signal; signal.signal(2, lambda *_: os._exit(7)); print('up', flush=True); signal.pause()"
    spec = pool(*PYTHON, code, ready=Probe(log="up"), stop=(StopStep(None, 60.0, quit_), StopStep(None)))
    async with watched(spec) as (supervisor, seen):
        await seen.wait("started", "web/0")
        records = supervisor.logs.follow(["web"])
        supervisor.feed("web/0", Stop())
        begun = await seen.wait("stop_begun", "web/0")
        assert begun.detail == {"command": list(quit_)}
        stopped = await seen.wait("stopped", "web/0")
        assert stopped.exit is not None
        assert (stopped.exit.code, stopped.exit.timed_out) == (7, False)
        records.close()
        assert b"bye web/0 from web" in b"".join([chunk async for chunk in records])


@needs_namespaces
async def test_a_stop_command_that_fails_is_not_waited_for() -> None:
    stop = (
        StopStep(None, 600.0, ("false",)),
        StopStep(None, 600.0, ("no-such-command",)),
        StopStep(15, 9.0),
        StopStep(None),
    )
    async with watched(pool(stop=stop)) as (supervisor, seen):
        await seen.wait("started", "web/0")
        supervisor.feed("web/0", Stop())
        stopped = await seen.wait("stopped", "web/0")
        assert stopped.exit is not None
        assert stopped.exit.signal == 15
        failed = [(event.reason, event.detail) for event in seen.events if event.event == "command_failed"]
        assert failed == [
            ("exit:1", {"command": ["false"]}),
            ("exec-failed:ENOENT", {"command": ["no-such-command"]}),
        ]


@needs_namespaces
async def test_a_stop_command_that_hangs_is_killed_when_its_time_is_over() -> None:
    stop = (StopStep(None, 0.2, ("sleep", "1000")), StopStep(15, 60.0), StopStep(None))
    async with watched(pool(stop=stop)) as (supervisor, seen):
        await seen.wait("started", "web/0")
        supervisor.feed("web/0", Stop())
        stopped = await seen.wait("stopped", "web/0")
        assert stopped.exit is not None
        assert stopped.exit.signal == 15


@needs_namespaces
async def test_a_reload_by_command(tmp_path: Path) -> None:
    done = tmp_path / "done-0"
    spec = pool(
        reload=ReloadSpec(command=("touch", f"{tmp_path}/done-{{index}}")), live=Probe(exec=("true",), every=QUICK)
    )
    async with watched(spec) as (supervisor, seen):
        await seen.wait("started", "web/0")
        supervisor.feed("web/0", Reload())
        await until(lambda: done.exists())
        assert supervisor.workers.workers["web/0"].state is State.RUNNING
