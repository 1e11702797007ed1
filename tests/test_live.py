"""A Supervisor inside a program, on both event loops, with real workers; and what is left of it: nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest
from live import PATIENCE, PidNamespaces, Witness, namespace_pids, needs_namespaces, wait_readable

from nssup import ControlError, PoolSpec, Supervisor
from nssup.events import Kill, State
from nssup.loop import LAUNCHES_PER_TURN
from nssup.spec import Backoff, RestartPolicy, StopStep, SupervisorSpec

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from nssup import Event

pytestmark = [needs_namespaces, pytest.mark.both_loops]

SLEEP = ("sleep", "1000")
AT_ONCE = (StopStep(None),)
# Ignores TERM; says so, so that nobody stops it before.
STUBBORN = ("sh", "-c", "trap '' TERM; echo deaf; while :; do sleep 1000; done")


def pool(name: str, *command: str, **changes: object) -> PoolSpec:
    return PoolSpec(name=name, command=command or SLEEP, **changes)  # type: ignore[arg-type]


def policy(first: float = 0.02, **changes: object) -> RestartPolicy:
    """Restarts after a time that a test can wait for, exactly."""
    backoff = Backoff(first=first, max=10.0, jitter=0.0)
    return RestartPolicy(backoff=backoff, **changes)  # type: ignore[arg-type]


def directories(path: Path) -> SupervisorSpec:
    return SupervisorSpec(
        state_dir=f"{path}/s", runtime_dir=f"{path}/s/run", log_dir=f"{path}/l", socket=f"{path}/s/run/nssup.sock"
    )


@pytest.fixture(params=["embedded", "directories"])
def spec(request: pytest.FixtureRequest, tmp_path: Path) -> SupervisorSpec | None:
    return directories(tmp_path) if request.param == "directories" else None


@pytest.fixture
async def live() -> AsyncIterator[tuple[Supervisor, Witness]]:
    """A supervisor without directories, and who hears all of it."""
    async with Supervisor() as supervisor:
        yield supervisor, Witness(supervisor)


def init_pids(supervisor: Supervisor) -> list[int]:
    return [w.init_host_pid for w in supervisor.workers.workers.values() if w.init_host_pid is not None]


async def wait_output(supervisor: Supervisor, spec: PoolSpec, wanted: str) -> list[dict[str, object]]:
    """Adds the pool, and waits until one of its workers has written that line. All records up to then."""
    supervisor.add_pool(spec)
    records: list[dict[str, object]] = []
    with contextlib.closing(supervisor.logs.follow([spec.name])) as follower:
        async with asyncio.timeout(PATIENCE):
            async for batch in follower:
                records += [json.loads(line) for line in batch.splitlines()]
                if any(record.get("msg") == wanted for record in records):
                    return records
    raise AssertionError(f"no {wanted!r} in {records}")


@contextlib.contextmanager
def all_gone(supervisor: Supervisor) -> Iterator[None]:
    """The inits there are now are dead and reaped after this."""
    pidfds = [os.pidfd_open(init) for init in init_pids(supervisor)]
    namespaces = PidNamespaces()
    for init in init_pids(supervisor):
        namespaces.hold(init)
    assert pidfds
    try:
        yield
        for pidfd in pidfds:
            wait_readable(pidfd, "an init is still there", 0)
        assert namespaces.processes() == []
    finally:
        namespaces.close()
        for pidfd in pidfds:
            os.close(pidfd)


# --- a life, from end to end -----------------------------------------------------------------------------------------


async def test_from_nothing_to_running_and_back(spec: SupervisorSpec | None) -> None:
    async with Supervisor(spec) as supervisor:
        witness = Witness(supervisor)
        supervisor.add_pool(pool("web", workers=3))
        for index in range(3):
            await witness.wait("started", f"web/{index}")
        with all_gone(supervisor):
            for worker in supervisor.workers.workers.values():
                assert worker.state is State.RUNNING
                assert worker.host_pid is not None
                assert namespace_pids(worker.host_pid) == [worker.host_pid, worker.ns_pid] == [worker.host_pid, 2]
                assert supervisor.host_pid_owner(worker.host_pid) == worker.id
                assert set(supervisor.namespaces(worker.id)) == {"pid", "mount", "uts", "ipc"}
            assert supervisor.host_pid_owner(os.getpid()) is None
            assert supervisor.host_pid_owner(1) is None
            await supervisor.stop_all()
            assert {w.state for w in supervisor.workers.workers.values()} == {State.STOPPED}
    assert [event.seq for event in witness.events] == list(range(1, len(witness.events) + 1))
    assert witness.names("web/1") == ["launched", "started", "stop_begun", "stopped"]
    assert {event.epoch for event in witness.events} == {supervisor.epoch}
    stopped = [event for event in witness.events if event.event == "stopped"]
    assert {event.exit.reason for event in stopped if event.exit} == {"signal:SIGTERM"}
    assert {event.host_pid for event in stopped} == witness.hosts()


async def test_everything_ends_with_the_block(spec: SupervisorSpec | None) -> None:
    with contextlib.ExitStack() as after:
        async with Supervisor(spec) as supervisor:
            witness = Witness(supervisor)
            supervisor.add_pool(pool("web", workers=2))
            deaf = pool("deaf", *STUBBORN, stop=(StopStep(signal.SIGTERM, 0.05), StopStep(None)))
            await wait_output(supervisor, deaf, "deaf")
            supervisor.add_pool(pool("bare", init=False, stop=AT_ONCE))
            for worker_id in ("web/0", "web/1", "bare/0"):
                await witness.wait("started", worker_id)
            after.enter_context(all_gone(supervisor))
    assert {w.state for w in supervisor.workers.workers.values()} == {State.STOPPED}
    # In reverse order.
    begun = [event.worker for event in witness.events if event.event == "stop_begun"]
    assert begun == ["bare/0", "deaf/0", "web/0", "web/1"]


class Trouble(Exception):
    pass


async def test_left_by_an_error_nothing_is_left(spec: SupervisorSpec | None) -> None:
    """And the error is the one that was raised, not a group of it."""
    told: list[Event] = []

    async def fail(after: contextlib.ExitStack) -> None:
        async with Supervisor(spec) as supervisor:
            witness = Witness(supervisor)
            supervisor.subscribe(told.append)
            supervisor.add_pool(pool("deaf", *STUBBORN, workers=20))
            await witness.wait("started", "deaf/0")
            after.enter_context(all_gone(supervisor))
            raise Trouble

    with contextlib.ExitStack() as after, pytest.raises(Trouble):
        await fail(after)
    assert told
    assert "stop_begun" not in {event.event for event in told}


async def test_left_by_cancellation_nothing_is_left(spec: SupervisorSpec | None) -> None:
    async def be_cancelled(after: contextlib.ExitStack) -> None:
        async with asyncio.timeout(None) as patience, Supervisor(spec) as supervisor:
            witness = Witness(supervisor)
            supervisor.add_pool(pool("deaf", *STUBBORN, workers=20))
            await witness.wait("started", "deaf/0")
            after.enter_context(all_gone(supervisor))
            patience.reschedule(0)
            await asyncio.get_running_loop().create_future()

    with contextlib.ExitStack() as after, pytest.raises(TimeoutError):
        await be_cancelled(after)


async def test_cancelled_while_it_waits_for_its_workers(spec: SupervisorSpec | None) -> None:
    """Leaving takes as long as the stop sequences do; whoever has no time for that gets the kill."""
    told: list[str] = []

    async def be_cancelled(after: contextlib.ExitStack) -> None:
        async with asyncio.timeout(None) as patience, Supervisor(spec) as supervisor:
            supervisor.subscribe(lambda event: told.append(event.event))
            deaf = pool("deaf", *STUBBORN, stop=(StopStep(signal.SIGTERM, 1000.0), StopStep(None)))
            await wait_output(supervisor, deaf, "deaf")
            after.enter_context(all_gone(supervisor))
            patience.reschedule(asyncio.get_running_loop().time() + 0.05)

    with contextlib.ExitStack() as after, pytest.raises(TimeoutError):
        await be_cancelled(after)
    assert told[-1] == "stop_begun"


async def test_left_while_launches_wait_for_their_turn(spec: SupervisorSpec | None) -> None:
    async with Supervisor(spec) as supervisor:
        witness = Witness(supervisor)
        supervisor.add_pool(pool("web", workers=5 * LAUNCHES_PER_TURN))
    assert {w.state for w in supervisor.workers.workers.values()} == {State.STOPPED}
    assert not {"failed", "backed_off"} & {event.event for event in witness.events}


@pytest.mark.parametrize("many", [1, 3 * LAUNCHES_PER_TURN])
async def test_left_at_once_by_an_error(spec: SupervisorSpec | None, many: int) -> None:
    async def fail(after: contextlib.ExitStack) -> None:
        async with Supervisor(spec) as supervisor:
            supervisor.add_pool(pool("web", workers=many))
            after.enter_context(all_gone(supervisor))
            raise Trouble

    with contextlib.ExitStack() as after, pytest.raises(Trouble):
        await fail(after)


# --- several ---------------------------------------------------------------------------------------------------------


async def test_two_supervisors_in_one_program() -> None:
    async with Supervisor() as one, Supervisor() as other:
        first, second = Witness(one), Witness(other)
        one.add_pool(pool("web", workers=2))
        other.add_pool(pool("web"))
        mine = await first.wait("started", "web/0")
        theirs = await second.wait("started", "web/0")
        assert mine.host_pid is not None
        assert (one.host_pid_owner(mine.host_pid), other.host_pid_owner(mine.host_pid)) == ("web/0", None)
        other.feed("web/0", Kill(signal.SIGKILL))
        assert (await second.wait("backed_off", "web/0")).host_pid == theirs.host_pid
        await second.wait("started", "web/0", generation=2)
        assert first.names("web/0") == ["launched", "started"]
    assert {w.state for w in (*one.workers.workers.values(), *other.workers.workers.values())} == {State.STOPPED}


def holder_of(lock: Path) -> int:
    """Who holds it, as another process is told."""
    code = f"import live, pathlib; print(live.locked_by(pathlib.Path({str(lock)!r})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=os.path.dirname(__file__), capture_output=True, check=True)
    return int(done.stdout)


async def test_two_supervisors_of_one_program_cannot_share_directories(tmp_path: Path) -> None:
    spec = directories(tmp_path)
    async with Supervisor(spec) as one:
        for _ in range(2):
            with pytest.raises(ControlError, match=f"another supervisor has {tmp_path}/s: host PID {os.getpid()} "):
                await Supervisor(spec).__aenter__()
        witness = Witness(one)
        one.add_pool(pool("web"))
        await witness.wait("started")
        # The lock is as it was, for others too. One does not see one's own.
        assert await asyncio.get_running_loop().run_in_executor(None, holder_of, tmp_path / "s" / "lock") == os.getpid()
    async with Supervisor(spec) as two:
        assert two.epoch == one.epoch + 1


async def test_a_supervisor_on_a_thread_of_its_own(tmp_path: Path) -> None:
    """Its loop is not the main thread's; and its workers do not die with the thread that happened to launch them."""
    seen: list[Witness] = []

    async def supervise() -> None:
        async with Supervisor(directories(tmp_path)) as supervisor:
            seen.append(Witness(supervisor))
            supervisor.add_pool(pool("web", workers=2))
            await seen[0].wait("started", "web/0")
            await seen[0].wait("started", "web/1")

    thread = threading.Thread(target=asyncio.run, args=[supervise()])
    thread.start()
    await asyncio.get_running_loop().run_in_executor(None, thread.join)
    assert seen[0].names("web/1") == ["launched", "started", "stop_begun", "stopped"]
