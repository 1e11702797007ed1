"""nssup.Supervisor, its pools and workers as a program uses them, on both event loops, with real workers."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from live import PATIENCE, PidNamespaces, needs_namespaces, wait_readable

import nssup
from nssup import ControlError, Event, EventsLost, Exit, Pool, PoolFailed, PoolSpec, SpecError, State, Supervisor
from nssup.pools import EVENTS_BEHIND
from nssup.spec import Backoff, RestartPolicy, StopStep

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine
    from pathlib import Path

pytestmark = [needs_namespaces, pytest.mark.both_loops]

AT_ONCE = (StopStep(None),)
NEVER = RestartPolicy(policy="never")


async def patient(waiting: Coroutine[Any, Any, Any]) -> Any:  # noqa: ANN401
    async with asyncio.timeout(PATIENCE):
        return await waiting


def sleeping(name: str = "web", **keys: Any) -> PoolSpec:  # noqa: ANN401
    return PoolSpec(**{"name": name, "command": ("sleep", "1000"), "stop": AT_ONCE, **keys})


def script(text: str, name: str = "web", **keys: Any) -> PoolSpec:  # noqa: ANN401
    return PoolSpec(**{"name": name, "command": ("sh", "-c", text), "stop": AT_ONCE, **keys})


@pytest.fixture
async def supervisor() -> AsyncIterator[Supervisor]:
    async with Supervisor() as running:
        yield running


def held(pool: Pool) -> PidNamespaces:
    namespaces = PidNamespaces()
    for worker in pool.workers:
        assert worker.host_pid is not None
        namespaces.hold(worker.host_pid)
    return namespaces


# --- pools and workers -----------------------------------------------------------------------------------------------


async def test_a_pool_from_its_start_to_its_end() -> None:
    async with Supervisor() as supervisor:
        pool = await patient(supervisor.add_pool(sleeping(workers=3), wait="ready"))
        assert [worker.id for worker in pool.workers] == ["web/0", "web/1", "web/2"]
        for worker in pool.workers:
            assert (worker.state, worker.ready, worker.ns_pid, worker.generation) == (State.RUNNING, True, 2, 1)
            assert (worker.reason, worker.last_exit, worker.restarts) == (None, None, 0)
        namespaces = held(pool)
        assert list(supervisor.pools) == ["web"]
    assert namespaces.processes() == []
    namespaces.close()


@pytest.mark.parametrize("how", [LookupError, asyncio.CancelledError])
async def test_left_by_an_exception_nothing_is_left(how: type[BaseException]) -> None:
    namespaces: list[PidNamespaces] = []

    async def fail() -> None:
        async with Supervisor() as supervisor:
            pool = await patient(supervisor.add_pool(script("trap '' TERM; sleep 1000 & sleep 1000"), wait="running"))
            namespaces.append(held(pool))
            raise how

    with pytest.raises(how):
        await fail()
    assert namespaces[0].processes() == []
    namespaces[0].close()


async def test_cancelled_in_the_middle_of_its_stops_it_kills() -> None:
    deaf = script("trap '' TERM; echo deaf; while :; do sleep 1000; done", stop=(StopStep(15, 1000.0), StopStep(None)))
    up, namespaces = asyncio.Event(), PidNamespaces()

    async def supervise() -> None:
        async with Supervisor() as supervisor:
            async with supervisor.events() as events:
                pool = await supervisor.add_pool(deaf)
                logs = pool.logs()
                await pool.wait_ready()
                async for record in logs:
                    assert record.msg == "deaf"
                    break
            for worker in pool.workers:
                namespaces.hold(worker.host_pid or 0)
            up.set()
            del events

    async with asyncio.TaskGroup() as group:
        task = group.create_task(supervise())
        await patient(up.wait())
        task.cancel()
    assert task.cancelled()
    assert namespaces.processes() == []
    namespaces.close()


async def test_stop_start_restart(supervisor: Supervisor) -> None:
    pool = await patient(supervisor.add_pool(sleeping(workers=2), wait="running"))
    namespaces = held(pool)
    await patient(pool.stop())
    assert namespaces.processes() == []
    namespaces.close()
    assert {worker.state for worker in pool.workers} == {State.STOPPED}
    await patient(pool.start())
    assert [worker.generation for worker in pool.workers] == [2, 2]
    await patient(pool.restart())
    assert [worker.generation for worker in pool.workers] == [3, 3]
    first = pool.workers[0]
    await patient(first.restart())
    await patient(first.stop())
    await patient(first.start())
    assert [worker.generation for worker in pool.workers] == [5, 3]
    assert first.last_exit
    assert first.last_exit.signal == signal.SIGKILL


async def test_a_rolling_restart_takes_one_after_the_other(supervisor: Supervisor) -> None:
    pool = await patient(supervisor.add_pool(sleeping(workers=3), wait="running"))
    async with supervisor.events(since=f"0:{await last_seq(supervisor)}") as events:
        await patient(pool.restart(rolling=True))
        events.close()
        told = [(event.event, event.worker) async for event in events if isinstance(event, Event)]
    ups = [worker for name, worker in told if name == "started"]
    assert ups == ["web/0", "web/1", "web/2"]
    for before, after in (("web/0", "web/1"), ("web/1", "web/2")):
        assert told.index(("started", before)) < told.index(("stop_begun", after))


async def last_seq(supervisor: Supervisor) -> int:
    async with supervisor.events() as events:
        event = await anext(events)
        assert isinstance(event, Event)
        return event.seq


async def test_a_rolling_restart_ends_at_the_first_that_fails(supervisor: Supervisor, tmp_path: Path) -> None:
    program = tmp_path / "program"
    shutil.copy("/bin/sleep", program)  # no script: a shell would open that again after the exec
    spec = sleeping(command=(str(program), "1000"), workers=3, restart=NEVER)
    pool = await patient(supervisor.add_pool(spec, wait="running"))
    program.unlink()
    with pytest.raises(PoolFailed, match="web/0 is not up: exec-failed:ENOENT"):
        await patient(pool.restart(rolling=True))
    assert [(worker.state, worker.generation) for worker in pool.workers] == [
        (State.FAILED, 2),
        (State.RUNNING, 1),
        (State.RUNNING, 1),
    ]


async def test_scale(supervisor: Supervisor) -> None:
    pool = await patient(supervisor.add_pool(sleeping(workers=1), wait="running"))
    await patient(pool.scale(3))
    assert [worker.state for worker in pool.workers] == [State.RUNNING] * 3
    assert pool.spec.workers == 3
    gone = pool.workers[2]
    await patient(pool.scale(1))
    assert [worker.id for worker in pool.workers] == ["web/0"]
    assert (gone.state, gone.host_pid, gone.ready, gone.generation) == (State.STOPPED, None, False, 0)
    await patient(pool.scale(0))
    assert pool.workers == []
    with pytest.raises(ControlError, match="-1"):
        await pool.scale(-1)
    with pytest.raises(ControlError, match="no worker"):
        gone.signal(signal.SIGTERM)


async def test_a_pool_is_removed(supervisor: Supervisor) -> None:
    pool = await patient(supervisor.add_pool(sleeping(), wait="running"))
    namespaces = held(pool)
    await patient(supervisor.remove_pool("web"))
    assert namespaces.processes() == []
    namespaces.close()
    assert (dict(supervisor.pools), pool.workers) == ({}, [])
    for ask in (supervisor.pool, lambda name: pool.spec):
        with pytest.raises(ControlError, match="no pool web"):
            ask("web")
    with pytest.raises(ControlError, match="no pool"):
        await supervisor.remove_pool("web")
    assert await patient(supervisor.add_pool(sleeping(), wait="running"))


async def test_who_gives_up_says_why(supervisor: Supervisor) -> None:
    pool = await supervisor.add_pool(script("echo one; echo two >&2; exit 3", restart=NEVER))
    with pytest.raises(PoolFailed, match="web/0 is not up: exit:3") as failed:
        await patient(pool.wait("done"))
    assert failed.value.exit
    assert (failed.value.pool, failed.value.worker, failed.value.exit.code) == ("web", "web/0", 3)
    assert sorted(failed.value.last_lines) == ["one", "two"]


async def test_who_cannot_be_launched_says_why(supervisor: Supervisor) -> None:
    with pytest.raises(PoolFailed, match="exec-failed:ENOENT"):
        await patient(supervisor.add_pool(sleeping(command=("/no/such/program",), restart=NEVER), wait="ready"))
    assert supervisor.pool("web").workers[0].state is State.FAILED


async def test_waiting_goes_on_through_a_backoff(supervisor: Supervisor, tmp_path: Path) -> None:
    text = f"test -e {tmp_path}/x && exit 0; touch {tmp_path}/x; exit 1"
    restart = RestartPolicy(policy="on-failure", backoff=Backoff(first=0.01, jitter=0.0))
    await patient(supervisor.add_pool(script(text, type="oneshot", restart=restart), wait="done"))
    assert supervisor.pool("web").workers[0].restarts == 1


async def test_how_a_life_ends(supervisor: Supervisor) -> None:
    pool = await patient(supervisor.add_pool(sleeping(), wait="running"))
    worker = pool.workers[0]
    async with asyncio.TaskGroup() as group:
        ended = group.create_task(patient(worker.wait()))
        await asyncio.sleep(0)
        worker.signal(signal.SIGUSR1)
    assert isinstance(ended.result(), Exit)
    assert ended.result().signal == signal.SIGUSR1
    await patient(pool.wait("running"))
    assert worker.generation == 2
    await patient(worker.stop())
    assert (await patient(worker.wait())).signal == signal.SIGKILL
    with pytest.raises(ValueError, match="no signal"):
        worker.signal(1000)


async def test_a_worker_that_never_ran_has_no_end(supervisor: Supervisor) -> None:
    pool = await supervisor.add_pool(sleeping(enabled=False))
    with pytest.raises(PoolFailed, match="stopped"):
        await patient(pool.workers[0].wait())


async def test_a_signal_to_the_tree(supervisor: Supervisor) -> None:
    pool = await patient(supervisor.add_pool(script("sleep 1000 & wait", restart=NEVER), wait="running"))
    worker = pool.workers[0]
    worker.signal(signal.SIGTERM, tree=True)
    assert (await patient(worker.wait())).signal == signal.SIGTERM


async def test_what_is_wrong_with_a_spec(supervisor: Supervisor) -> None:
    with pytest.raises(SpecError, match="command"):
        await supervisor.add_pool(PoolSpec(name="web", command="sleep 1000"))  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="no user"):
        await supervisor.add_pool(sleeping(user="nobody-of-that-name"))
    listed = PoolSpec(name="web", command=["sleep", "1000"], stop=list(AT_ONCE))  # type: ignore[arg-type]
    await patient(supervisor.add_pool(listed, wait="running"))
    with pytest.raises(ControlError, match="there already"):
        await supervisor.add_pool(sleeping())


# --- logs ------------------------------------------------------------------------------------------------------------


async def test_what_workers_write(supervisor: Supervisor) -> None:
    text = "echo out; echo err >&2; printf last"
    pool = await supervisor.add_pool(script(text, type="oneshot", restart=NEVER, enabled=False, workers=2))
    async with pool.logs() as all_of_them, pool.workers[1].logs() as of_one:
        await patient(pool.start())
        await patient(pool.wait("done"))
        found = [await patient(anext(all_of_them)) for _ in range(6)]
        assert sorted(str(record.msg) for record in found) == ["err", "err", "last", "last", "out", "out"]
        one = [await patient(anext(of_one)) for _ in range(3)]
    assert {record.worker for record in one} == {"web/1"}
    assert all(record.ns_pid == 2 and record.host_pid for record in one)
    assert {record.stream for record in one} == {"stdout", "stderr"}


# --- events ----------------------------------------------------------------------------------------------------------


async def test_events_from_before_the_first_start() -> None:
    async with Supervisor() as supervisor, supervisor.events() as events:
        await patient(supervisor.add_pool(sleeping(), wait="running"))
        names = [(await patient(anext(events))).event for _ in range(3)]
        assert names == ["pool_added", "launched", "started"]
    rest = [event.event async for event in events if isinstance(event, Event)]
    assert rest == []


async def test_the_last_events_come_before_the_end_of_the_iteration() -> None:
    async with Supervisor() as supervisor:
        events = supervisor.events(select="web/*")
        await patient(supervisor.add_pool(sleeping(), wait="running"))
    names = [event.event async for event in events if isinstance(event, Event)]
    assert names[:2] == ["launched", "started"]
    assert names[-1] == "stopped"


async def test_a_snapshot_comes_first(supervisor: Supervisor) -> None:
    pool = await patient(supervisor.add_pool(sleeping(workers=2), wait="running"))
    await patient(supervisor.add_pool(sleeping("other"), wait="running"))
    async with supervisor.events(select="web") as events:
        first = [await patient(anext(events)) for _ in range(2)]
        assert [(event.event, event.worker, event.to, event.ns_pid) for event in first] == [
            ("snapshot", "web/0", "running", 2),
            ("snapshot", "web/1", "running", 2),
        ]
        await patient(supervisor.pool("other").stop())
        await patient(pool.workers[1].stop())
        event = await patient(anext(events))
        assert (event.event, event.worker) == ("stop_begun", "web/1")


async def test_events_since_one(supervisor: Supervisor) -> None:
    await patient(supervisor.add_pool(sleeping(), wait="running"))
    async with supervisor.events(since="0:1") as events:
        assert [(await patient(anext(events))).event for _ in range(2)] == ["launched", "started"]
    for gone in ("1:1", "0:100"):
        with pytest.raises(ControlError, match="not here"):
            supervisor.events(since=gone)
    with pytest.raises(ControlError, match="epoch:seq"):
        supervisor.events(since="x")


async def test_who_is_too_slow_is_told_what_he_missed(supervisor: Supervisor) -> None:
    pool = await patient(supervisor.add_pool(sleeping(workers=0)))
    async with supervisor.events() as events:
        for n in range(EVENTS_BEHIND + 25):
            supervisor._shell.workers.note("log_failed", 0.0, pool="web", reason=str(n))
        read = [await anext(events) for _ in range(EVENTS_BEHIND)]
        assert await anext(events) == EventsLost(25)
        supervisor._shell.workers.note("log_failed", 0.0, pool="web", reason="after")
        assert (await patient(anext(events))).reason == "after"
    assert [event.reason for event in read if isinstance(event, Event)] == [str(n) for n in range(EVENTS_BEHIND)]
    assert pool.workers == []


# --- durable ---------------------------------------------------------------------------------------------------------


async def test_a_durable_one_leaves_and_takes_over(tmp_path: Path) -> None:
    async with Supervisor(state_dir=tmp_path / "s") as first:
        pool = await patient(first.add_pool(sleeping(workers=2), wait="running"))
        before = [worker.host_pid for worker in pool.workers]
        first.leave_running()
    async with Supervisor(state_dir=tmp_path / "s") as second:
        assert second.epoch == first.epoch + 1
        pool = await patient(second.add_pool(sleeping(workers=2), wait="running"))
        await patient(pool.wait_ready())
        assert [worker.host_pid for worker in pool.workers] == before
        namespaces = held(pool)
    assert namespaces.processes() == []
    namespaces.close()
    assert (tmp_path / "s" / "log" / "web.jsonl").exists()


async def test_workers_of_pools_that_are_not_added_again_end_as_well(tmp_path: Path) -> None:
    async with Supervisor(state_dir=tmp_path / "s") as first:
        pool = await patient(first.add_pool(sleeping(), wait="running"))
        pidfd = os.pidfd_open(pool.workers[0].host_pid or 0)
        first.leave_running()
    async with Supervisor(state_dir=tmp_path / "s"):
        pass
    wait_readable(pidfd, "a worker of nobody was left")
    os.close(pidfd)


async def test_where_it_keeps_what_it_keeps(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        Supervisor(nssup.spec.SupervisorSpec(state_dir="", runtime_dir="", log_dir="", socket=""), state_dir=tmp_path)
    async with Supervisor() as supervisor:
        with pytest.raises(ControlError, match="state_dir"):
            supervisor.leave_running()
        assert supervisor.epoch == 0


async def test_two_in_one_program() -> None:
    async with Supervisor() as one, Supervisor() as other:
        first = await patient(one.add_pool(sleeping(), wait="running"))
        second = await patient(other.add_pool(sleeping(), wait="running"))
        assert first.workers[0].host_pid != second.workers[0].host_pid


# --- inside any program ----------------------------------------------------------------------------------------------

HOST = """
import asyncio, json, os, signal, sys, threading, uvloop
import nssup
from nssup.spec import RestartPolicy
factory = {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}[sys.argv[1]]
def pool(code):
    never = RestartPolicy(policy="never")
    return nssup.PoolSpec(name=f"p{code}", command=("sh", "-c", f"exit {code}"), type="oneshot", restart=never)
async def codes():
    async with nssup.Supervisor() as supervisor:
        pools = [await supervisor.add_pool(pool(code)) for code in (0, 3, 77)]
        ends = [await pool.workers[0].wait() for pool in pools]
    return [end.code for end in ends]
def go():
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(codes())
"""
HOSTS = {
    "reaps everybody": """
def reap():
    while True:
        try: os.waitpid(-1, 0)
        except ChildProcessError: pass
threading.Thread(target=reap, daemon=True).start()
print(json.dumps(go()))
""",
    "ignores SIGCHLD": "signal.signal(signal.SIGCHLD, signal.SIG_IGN)\nprint(json.dumps(go()))\n",
    "runs it in a thread": """
found = []
thread = threading.Thread(target=lambda: found.extend(go())); thread.start(); thread.join()
print(json.dumps(found))
""",
    "has a child process with copies of everything": """
async def forked():
    async with nssup.Supervisor() as supervisor:
        web = await supervisor.add_pool(nssup.PoolSpec(name="web", command=("sleep", "1000")), wait="ready")
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(theirs); os.read(ours, 1); os._exit(0)
        web.workers[0].signal(signal.SIGUSR1)
        ended = await web.workers[0].wait()
    os.close(theirs); os.waitpid(child, 0)
    return [0, 3, 77] if ended.signal == signal.SIGUSR1 else ended.reason
with asyncio.Runner(loop_factory=factory) as runner:
    print(json.dumps(runner.run(forked())))
""",
}


@pytest.mark.parametrize("loop_name", ["uvloop", "asyncio"])
@pytest.mark.parametrize("host", HOSTS)
def test_in_a_host_that(host: str, loop_name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HOST + HOSTS[host], loop_name], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert json.loads(done.stdout) == [0, 3, 77]
