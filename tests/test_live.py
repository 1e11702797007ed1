"""A Supervisor inside a program, on both event loops, with real workers; and what is left of it: nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
from live import PATIENCE, PidNamespaces, Witness, namespace_pids, needs_namespaces, status_field, wait_readable

from nssup import ControlError, PoolSpec, SpecError
from nssup.events import Kill, Restart, Start, State, Stop
from nssup.loop import LAUNCHES_PER_TURN, Supervisor
from nssup.spec import Backoff, LogSpec, RestartPolicy, StopStep, SupervisorSpec

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


@pytest.mark.parametrize("times", [1, 2, 5])
async def test_cancelled_again_and_again(spec: SupervisorSpec | None, tmp_path: Path, times: int) -> None:
    """While it closes its logs too: what workers have said is written, and every file closed."""
    inside = asyncio.Event()

    async def be_cancelled(after: contextlib.ExitStack) -> None:
        async with Supervisor(spec) as supervisor:
            await wait_output(supervisor, pool("deaf", *STUBBORN), "deaf")
            after.enter_context(all_gone(supervisor))
            inside.set()
            await asyncio.get_running_loop().create_future()

    with contextlib.ExitStack() as after:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(be_cancelled(after))
            await inside.wait()
            for _ in range(times):
                task.cancel()
                await asyncio.sleep(0)
        assert task.cancelled()
    if spec is not None:
        assert (tmp_path / "l" / "deaf.jsonl").read_bytes().endswith(b'"msg":"deaf"}\n')


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


# --- pools ------------------------------------------------------------------------------------------------------------


async def test_a_pool_that_is_there_is_not_touched_by_another_of_its_name(
    live: tuple[Supervisor, Witness],
) -> None:
    supervisor, _ = live
    says = ("sh", "-c", 'echo "$WHO $NSSUP_GENERATION"; exec sleep 1000')
    await wait_output(supervisor, pool("web", *says, env={"WHO": "first"}, restart=policy(0.0)), "first 1")
    with pytest.raises(ControlError, match="pool web is there already"):
        supervisor.add_pool(pool("web", "false", env={"WHO": "second"}))
    with contextlib.closing(supervisor.logs.follow(["web"])) as follower:
        supervisor.feed("web/0", Kill(signal.SIGKILL))
        async with asyncio.timeout(PATIENCE):
            assert json.loads(await anext(follower))["msg"] == "first 2"


async def test_a_pool_that_cannot_be(live: tuple[Supervisor, Witness]) -> None:
    supervisor, witness = live
    for bad, why in (
        (pool("../web"), "'../web' is no pool name"),
        (pool("nssup"), "nssup is the name of the supervisor's own log"),
        (pool("web", user="no-such-user"), "no-such-user"),
        (pool("web", group="no-such-group"), "no-such-group"),
        (pool("web", "a\0b"), "holds a NUL byte"),
        (pool("web", namespaces=("mount",)), "must hold pid"),
    ):
        with pytest.raises(SpecError, match=why):
            supervisor.add_pool(bad)
    assert (witness.events, supervisor.workers.pools) == ([], {})
    supervisor.add_pool(pool("web"))
    await witness.wait("started", "web/0")


async def test_a_pool_whose_log_cannot_be_opened(tmp_path: Path) -> None:
    async with Supervisor(directories(tmp_path)) as supervisor:
        witness = Witness(supervisor)
        (tmp_path / "l" / "web.jsonl").mkdir()
        with pytest.raises(ControlError, match=f"cannot open {tmp_path}/l/web.jsonl: Is a directory"):
            supervisor.add_pools([pool("first"), pool("web")])
        assert (witness.events, supervisor.workers.pools) == ([], {})
        (tmp_path / "l" / "web.jsonl").rmdir()
        supervisor.add_pools([pool("first"), pool("web")])
        await witness.wait("started", "web/0")


async def test_a_pool_that_is_removed_and_added_again(live: tuple[Supervisor, Witness]) -> None:
    """Numbers of lives of one id never repeat in a run of the supervisor."""
    supervisor, witness = live
    supervisor.add_pool(pool("web", workers=2))
    await witness.wait("started", "web/1")
    supervisor.remove_pool("web")
    with pytest.raises(ControlError, match="pool web is there already"):
        supervisor.add_pool(pool("web"))
    gone = await witness.wait("pool_removed", "web")
    assert supervisor.workers.workers == {}
    supervisor.add_pool(pool("web", "sh", "-c", "exit 3"))
    assert (await witness.wait("backed_off", "web/0", after=gone.seq)).generation == 2


async def test_one_observer_that_fails_harms_nobody(live: tuple[Supervisor, Witness]) -> None:
    supervisor, _ = live
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context["exception"]))

    def fail(event: Event) -> None:
        raise Trouble(event.event)

    supervisor.subscribe(fail)
    witness = Witness(supervisor)
    supervisor.add_pool(pool("web", workers=2))
    await witness.wait("started", "web/0")
    await witness.wait("started", "web/1")
    assert [str(each) for each in complaints] == [event.event for event in witness.events]


# --- restarts ---------------------------------------------------------------------------------------------------------


async def test_a_crash_loop_waits_as_configured(live: tuple[Supervisor, Witness]) -> None:
    supervisor, witness = live
    backoff = Backoff(first=0.03, factor=2.0, max=0.1, jitter=0.2)
    supervisor.add_pool(pool("web", "sh", "-c", "exit 3", restart=RestartPolicy(backoff=backoff)))
    for generation, wait in enumerate([0.03, 0.06, 0.1, 0.1], 1):
        backed_off = await witness.wait("backed_off", "web/0", generation=generation)
        relaunched = await witness.wait("relaunched", "web/0", generation=generation + 1)
        assert (backed_off.reason, backed_off.from_, relaunched.reason) == ("exit:3", "running", "exit:3")
        assert backed_off.exit is not None
        assert backed_off.exit.code == 3
        # By the one clock, to the jitter; late by no more than a busy machine makes it.
        assert 0.8 * wait <= relaunched.ts - backed_off.ts <= 1.2 * wait + 0.1
    assert supervisor.workers.workers["web/0"].restarts == 4


async def test_the_first_restart_of_a_settled_life_is_immediate(live: tuple[Supervisor, Witness]) -> None:
    supervisor, witness = live
    restart = policy(0.02, settle=0.05)
    supervisor.add_pool(pool("web", "sh", "-c", "sleep 0.06; exit 3", restart=restart))
    await witness.wait("backed_off", "web/0")
    assert witness.names("web/0") == ["launched", "started", "relaunched", "started", "backed_off"]
    relaunched = await witness.wait("relaunched", "web/0")
    first = await witness.wait("started", "web/0")
    assert (relaunched.from_, relaunched.to, relaunched.generation) == ("running", "starting", 2)
    assert relaunched.exit is not None
    assert relaunched.exit.reason == "exit:3"
    assert relaunched.detail == {"ended": {"generation": 1, "host_pid": first.host_pid, "ns_pid": 2}}


async def test_stopped_and_started_while_it_waits(live: tuple[Supervisor, Witness]) -> None:
    supervisor, witness = live
    supervisor.add_pool(pool("web", "sh", "-c", "exit 3", restart=policy(5.0)))
    waiting = await witness.wait("backed_off", "web/0")
    supervisor.feed("web/0", Stop())
    stopped = await witness.wait("stopped", "web/0")
    assert stopped.reason == "operator"
    assert stopped.ts - waiting.ts < 5.0
    supervisor.feed("web/0", Start())
    await witness.wait("backed_off", "web/0", after=stopped.seq)
    supervisor.feed("web/0", Restart())
    third = await witness.wait("backed_off", "web/0", generation=3)
    assert third.ts - stopped.ts < 5.0
    assert supervisor.workers.workers["web/0"].restarts == 0


@pytest.mark.parametrize("init", [True, False])
async def test_one_that_is_frozen_is_woken_by_its_stop(live: tuple[Supervisor, Witness], init: bool) -> None:
    """SIGTERM alone would wait until somebody says SIGCONT."""
    supervisor, witness = live
    script = "trap 'echo bye; exit 7' TERM; echo up; while :; do sleep 1000 & wait; done"
    patient = (StopStep(signal.SIGTERM, 1000.0), StopStep(None))
    await wait_output(supervisor, pool("web", "sh", "-c", script, init=init, stop=patient), "up")
    worker = supervisor.workers.workers["web/0"]
    assert worker.host_pid is not None
    supervisor.feed("web/0", Kill(signal.SIGSTOP))
    while status_field(worker.host_pid, "State")[0] != "T":
        os.sched_yield()
    supervisor.feed("web/0", Stop())
    stopped = await witness.wait("stopped", "web/0")
    assert stopped.exit is not None
    assert stopped.exit.code == 7


async def test_a_signal_that_a_pid_1_does_not_handle_is_not_waited_for(live: tuple[Supervisor, Witness]) -> None:
    supervisor, witness = live
    steps = (StopStep(signal.SIGUSR1, 1000.0), StopStep(signal.SIGTERM, 1000.0), StopStep(None))
    script = "trap 'exit 7' TERM; echo up; while :; do sleep 1000 & wait; done"
    await wait_output(supervisor, pool("polite", "sh", "-c", script, init=False, stop=steps), "up")
    supervisor.add_pool(pool("deaf", init=False, stop=(StopStep(signal.SIGTERM, 1000.0), StopStep(None))))
    await witness.wait("started", "deaf/0")
    for worker_id, ignored, code in (("polite/0", signal.SIGUSR1, 7), ("deaf/0", signal.SIGTERM, None)):
        supervisor.feed(worker_id, Stop())
        stopped = await witness.wait("stopped", worker_id)
        assert stopped.exit is not None
        assert stopped.exit.code == code
        (told,) = [e for e in witness.events if e.event == "signal_ignored" and e.worker == worker_id]
        assert told.detail == {"signal": ignored}


async def test_stopped_before_it_runs(live: tuple[Supervisor, Witness]) -> None:
    """Those with an init, and those that are not even launched yet."""
    supervisor, witness = live
    supervisor.add_pool(pool("web", workers=2 * LAUNCHES_PER_TURN))
    ids = list(supervisor.workers.workers)
    for worker_id in ids:
        supervisor.feed(worker_id, Stop())
    for worker_id in ids:
        await witness.wait("stopped", worker_id)
        assert witness.names(worker_id) == ["launched", "stop_begun", "stopped"]
    # And once more, with a change of mind in between.
    supervisor.feed("web/0", Start())
    supervisor.feed("web/0", Stop())
    supervisor.feed("web/0", Start())
    await witness.wait("started", "web/0")


async def test_restarted_by_an_operator(live: tuple[Supervisor, Witness]) -> None:
    supervisor, witness = live
    supervisor.add_pool(pool("web"))
    first = await witness.wait("started", "web/0")
    supervisor.feed("web/0", Restart())
    second = await witness.wait("started", "web/0", generation=2)
    assert second.host_pid != first.host_pid
    assert witness.names("web/0") == ["launched", "started", "stop_begun", "launched", "started"]
    assert supervisor.workers.workers["web/0"].restarts == 0


async def test_scaled_up_and_down(live: tuple[Supervisor, Witness]) -> None:
    supervisor, witness = live
    supervisor.add_pool(pool("web", workers=2))
    await witness.wait("started", "web/1")
    supervisor.scale("web", 5)
    for index in range(5):
        await witness.wait("started", f"web/{index}")
    supervisor.scale("web", 1)
    removed = [await witness.wait("removed", f"web/{index}") for index in range(4, 0, -1)]
    assert list(supervisor.workers.workers) == ["web/0"]
    supervisor.scale("web", 2)
    again = await witness.wait("started", "web/1", after=removed[-1].seq)
    assert again.generation == 2
    supervisor.scale("web", 0)
    await witness.wait("removed", "web/0")
    await witness.wait("removed", "web/1", after=again.seq)
    assert supervisor.workers.workers == {}


async def test_oneshots(live: tuple[Supervisor, Witness]) -> None:
    supervisor, witness = live
    never, failures = RestartPolicy(policy="never"), policy(0.01, policy="on-failure")
    supervisor.add_pool(pool("good", "true", type="oneshot", restart=never))
    supervisor.add_pool(pool("bad", "sh", "-c", "exit 3", type="oneshot", restart=never))
    supervisor.add_pool(pool("gone", "/not/here", type="oneshot", restart=never))
    # Fails until its third life.
    stubborn = ("sh", "-c", 'exit "$((NSSUP_GENERATION < 3))"')
    supervisor.add_pool(pool("again", *stubborn, type="oneshot", restart=failures))
    good = await witness.wait("finished", "good/0")
    assert (good.to, good.reason, good.exit and good.exit.code) == ("done", "exit:0", 0)
    bad = await witness.wait("failed", "bad/0")
    assert (bad.to, bad.reason, bad.exit and bad.exit.code) == ("failed", "exit:3", 3)
    assert (await witness.wait("failed", "gone/0")).reason == "exec-failed:ENOENT"
    assert (await witness.wait("finished", "again/0")).generation == 3
    supervisor.feed("good/0", Start())
    assert (await witness.wait("finished", "good/0", generation=2)).reason == "exit:0"


async def test_the_end_is_the_end(live: tuple[Supervisor, Witness]) -> None:
    """Who stops everything for good is not held up by somebody who goes on starting things."""
    supervisor, witness = live
    deaf = pool("deaf", *STUBBORN, stop=(StopStep(signal.SIGTERM, 0.1), StopStep(None)))
    await wait_output(supervisor, deaf, "deaf")
    supervisor.add_pool(pool("idle", enabled=False))

    def meddle(event: Event) -> None:
        if event.event in ("stop_begun", "stopped") and event.worker == "deaf/0":
            loop.call_soon(supervisor.feed, "deaf/0", Start())
            loop.call_soon(supervisor.feed, "deaf/0", Restart())
            loop.call_soon(supervisor.feed, "idle/0", Start())
            loop.call_soon(scale)

    def scale() -> None:
        with pytest.raises(ControlError, match="is ending"):
            supervisor.scale("idle", 3)
        with pytest.raises(ControlError, match="is ending"):
            supervisor.add_pool(pool("more"))
        refused.append(True)

    refused: list[bool] = []
    loop = asyncio.get_running_loop()
    supervisor.subscribe(meddle)
    async with asyncio.timeout(PATIENCE):
        await supervisor.stop_all()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert refused
    assert {w.state for w in supervisor.workers.workers.values()} == {State.STOPPED}
    assert "started" not in witness.names("deaf/0")[2:]
    assert "launched" not in witness.names("idle/0")


# --- descriptors, output, and who else is in the program --------------------------------------------------------------


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(("merge", "each"), [(False, 4), (True, 3)])
async def test_descriptors_at_rest(live: tuple[Supervisor, Witness], merge: bool, each: int) -> None:
    """docs/contracts.md, part g."""
    supervisor, witness = live
    before = open_descriptors()
    supervisor.add_pool(pool("web", workers=20, log=LogSpec(merge=merge)))
    for index in range(20):
        await witness.wait("started", f"web/{index}")
    assert open_descriptors() - before == 20 * each
    supervisor.remove_pool("web")
    await witness.wait("pool_removed")
    assert open_descriptors() == before


async def test_output_has_both_pids_and_is_whole(tmp_path: Path) -> None:
    """Also of a program that ends right after it, and of the next life of the worker."""
    script = 'echo "hello from $NSSUP_GENERATION"; echo trouble >&2; printf "no newline"; exit 3'
    async with Supervisor(directories(tmp_path)) as supervisor:
        witness = Witness(supervisor)
        supervisor.add_pool(pool("web", "sh", "-c", script, restart=policy(0.01)))
        ends = [await witness.wait("backed_off", "web/0", generation=n) for n in (1, 2)]
    records = [json.loads(line) for line in (tmp_path / "l" / "web.jsonl").read_text().splitlines()]
    for end in ends:
        mine = [record for record in records if record["generation"] == end.generation]
        assert {(r["worker"], r["host_pid"], r["ns_pid"]) for r in mine} == {("web/0", end.host_pid, 2)}
        assert sorted((r["stream"], r["offset"], r["msg"], r.get("nl", True)) for r in mine) == [
            ("stderr", 0, "trouble", True),
            ("stdout", 0, f"hello from {end.generation}", True),
            ("stdout", 13, "no newline", False),
        ]
    assert supervisor.last_lines("web/0", 1) == []  # the log is closed
    own = [json.loads(line) for line in (tmp_path / "l" / "nssup.jsonl").read_text().splitlines()]
    assert [record["seq"] for record in own] == [event.seq for event in witness.events]


async def test_output_held_open_outside_holds_up_nobody(live: tuple[Supervisor, Witness], tmp_path: Path) -> None:
    """Somebody outside has an end of the worker's stdout. Its end is its end all the same."""
    supervisor, witness = live
    await wait_output(supervisor, pool("web", "sh", "-c", "echo here; exec sleep 1000", restart=policy(9.0)), "here")
    host_pid = supervisor.workers.workers["web/0"].host_pid
    held = os.open(f"/proc/{host_pid}/fd/1", os.O_WRONLY)
    try:
        supervisor.feed("web/0", Kill(signal.SIGKILL))
        assert (await witness.wait("backed_off", "web/0")).reason == "signal:SIGKILL"
        supervisor.feed("web/0", Stop())
        await witness.wait("stopped", "web/0")
    finally:
        os.close(held)


def plain_child(code: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sh", "-c", f"exit {code}"])


async def test_children_of_the_program_are_its_own(live: tuple[Supervisor, Witness]) -> None:
    supervisor, witness = live
    supervisor.add_pool(pool("web", "true", workers=10, restart=policy(0.01)))
    mine = [await asyncio.create_subprocess_exec("sh", "-c", f"exit {code}") for code in range(5)]
    for generation in (1, 2, 3):
        for index in range(10):
            await witness.wait("backed_off", f"web/{index}", generation=generation)
    assert [await each.wait() for each in mine] == list(range(5))
    plain = plain_child(7)
    await witness.wait("backed_off", "web/0", generation=4)
    assert plain.wait() == 7


async def test_a_program_that_reaps_all_its_children(live: tuple[Supervisor, Witness]) -> None:
    """As some do on SIGCHLD. How the worker ended is known all the same, from init; and it is still proven gone."""
    supervisor, witness = live
    supervisor.add_pool(pool("web", "sh", "-c", "exit 3", restart=RestartPolicy(policy="never")))
    await witness.wait("started", "web/0")

    def reap_all(signo: int, frame: object) -> None:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass

    before = signal.signal(signal.SIGCHLD, reap_all)
    try:
        failed = await witness.wait("failed", "web/0")
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert failed.reason == "exit:3"


async def test_a_program_that_ignores_sigchld(live: tuple[Supervisor, Witness]) -> None:
    """Then the kernel keeps no zombies, and there is nothing to wait for."""
    supervisor, witness = live
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        supervisor.add_pool(pool("web", "sh", "-c", "exit 3", workers=3, restart=RestartPolicy(policy="never")))
        for index in range(3):
            assert (await witness.wait("failed", f"web/{index}")).reason == "exit:3"
    finally:
        signal.signal(signal.SIGCHLD, before)


# --- everything at once -----------------------------------------------------------------------------------------------

CHAOS = int(os.environ.get("NSSUP_CHAOS", "400"))  # things that happen


class Chaos:
    """Random wishes of operators and random deaths; holds every program that ran by a pidfd."""

    def __init__(self, supervisor: Supervisor, seed: str) -> None:
        self.rng = random.Random(seed)
        self.supervisor = supervisor
        self.programs: dict[str, int] = {}
        self.two_at_once: list[Event] = []
        self.complaints: list[dict[str, Any]] = []
        self.events = 0
        supervisor.subscribe(self.note)
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: self.complaints.append(context))

    def note(self, event: Event) -> None:
        self.events += 1
        if event.event != "started" or event.worker is None or event.host_pid is None:
            return
        before = self.programs.pop(event.worker, None)
        if before is not None:
            if not select.select([before], [], [], 0)[0]:
                self.two_at_once.append(event)
            os.close(before)
        with contextlib.suppress(ProcessLookupError):  # gone already
            self.programs[event.worker] = os.pidfd_open(event.host_pid)

    def step(self) -> None:
        rng, workers = self.rng, list(self.supervisor.workers.workers.values())
        worker = rng.choice(workers) if workers else None
        if worker is None or rng.random() < 0.1:
            self.supervisor.scale(rng.choice(list(self.supervisor.workers.pools)), rng.randrange(7))
        elif rng.random() < 0.6:
            signo, tree = (
                rng.choice([signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT]),
                rng.random() < 0.5,
            )
            self.supervisor.feed(worker.id, rng.choice([Start(), Stop(), Restart(), Kill(signo, tree=tree)]))
        elif rng.random() < 0.5:
            if worker.id in self.programs:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self.programs[worker.id], rng.choice([signal.SIGKILL, signal.SIGTERM]))
        elif worker.init_host_pid is not None:
            os.kill(worker.init_host_pid, signal.SIGKILL)  # not reaped yet, so it is still that one

    def close(self) -> None:
        for pidfd in self.programs.values():
            os.close(pidfd)


@pytest.mark.parametrize("seed", range(2))
async def test_everything_at_once(tmp_path: Path, seed: int) -> None:
    """Whatever is asked and whoever dies: never two lives of a worker, and in the end nothing is left."""
    hiding = 'trap "" TERM; (setsid sleep 1000 &); (setsid sh -c "trap : TERM; sleep 1000" &); echo up; sleep 1000'
    stop = (StopStep(signal.SIGTERM, 0.02), StopStep(None))
    pools = [
        pool("web", workers=4, stop=stop, restart=policy(0.001)),
        pool("hiding", "sh", "-c", hiding, workers=3, stop=stop, restart=policy(0.001, settle=0.01)),
        pool(
            "crasher",
            "sh",
            "-c",
            "echo no; exit $((NSSUP_GENERATION % 3))",
            workers=3,
            stop=stop,
            restart=policy(0.001),
        ),
        pool("gone", "/not/here", restart=policy(0.005)),
        pool("bare", workers=2, init=False, stop=AT_ONCE, restart=policy(0.001)),
        pool("job", "true", workers=2, type="oneshot", restart=RestartPolicy(policy="never")),
    ]
    async with Supervisor(directories(tmp_path)) as supervisor:
        chaos = Chaos(supervisor, f"chaos {seed}")
        try:
            supervisor.add_pools(pools)
            for _ in range(CHAOS):
                chaos.step()
                for _ in range(chaos.rng.randrange(40)):
                    await asyncio.sleep(0)
            async with asyncio.timeout(PATIENCE):
                await supervisor.stop_all()
            assert {worker.state for worker in supervisor.workers.workers.values()} <= {State.STOPPED}
            assert chaos.two_at_once == []
            assert chaos.complaints == []
        finally:
            chaos.close()
    records = [json.loads(line) for line in (tmp_path / "l" / "nssup.jsonl").read_text().splitlines()]
    assert [record["seq"] for record in records] == list(range(1, len(records) + 1))
    assert len(records) == chaos.events
