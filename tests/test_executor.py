"""nssup.Executor and its twin for asyncio, with real interpreters.

Cases of CPython's own tests of ProcessPoolExecutor are named after them (Lib/test/test_concurrent_futures).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

import calls
import pytest
from live import PATIENCE, PidNamespaces, needs_namespaces

from nssup import (
    AsyncExecutor,
    Call,
    CallTimeout,
    Executor,
    ExecutorBroken,
    LaunchError,
    MemoryLimit,
    WorkerDied,
)

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = needs_namespaces


def begun(path: Path) -> None:
    """Until the call that was given this fifo is begun."""
    with path.open() as fifo:
        fifo.read()


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "begun")
    return tmp_path / "begun"


def hold_workers(executor: Executor) -> PidNamespaces:
    held = PidNamespaces()
    for worker in executor.crew._workers.values():
        held.hold(worker.process.init_host_pid)
    return held


# --- as ProcessPoolExecutor ------------------------------------------------------------------------------------------


def test_submit() -> None:
    with Executor(1) as executor:
        assert executor.submit(pow, 2, 8).result(PATIENCE) == 256
        assert executor.submit(calls.both, 1, self=7, fn=5).result(PATIENCE) == ((1,), {"self": 7, "fn": 5})


def test_submit_keyword() -> None:
    with Executor(1) as executor, pytest.raises(TypeError):
        executor.submit(fn=pow)  # type: ignore[call-arg]


def test_map_and_map_chunksize() -> None:
    with Executor(2) as executor:
        reference = list(map(pow, range(40), range(40)))
        for chunksize in (1, 6, 40, 50):
            assert list(executor.map(pow, range(40), range(40), chunksize=chunksize)) == reference
        with pytest.raises(ValueError, match="chunksize"):
            executor.map(pow, range(40), range(40), chunksize=-1)
        assert list(executor.map(pow, [], [])) == []


def test_map_exception() -> None:
    with Executor(1) as executor:
        found = executor.map(divmod, [1, 1, 1, 1], [2, 3, 0, 5])
        assert (next(found), next(found)) == ((0, 1), (0, 1))
        with pytest.raises(ZeroDivisionError):
            next(found)


def test_map_timeout() -> None:
    results: list[None] = []
    with Executor(1) as executor:
        found = executor.map(calls.sleep, [0, 1000], timeout=2)
        with pytest.raises(TimeoutError):
            results.extend(found)
    assert results in ([None], [])  # the first too, on a slow machine


def test_shutdown_race_issue12456() -> None:
    with Executor(5) as executor:
        executor.map(str, [2] * 20)


def test_no_stale_references_and_free_reference() -> None:
    class Anything:
        def method(self) -> None: ...

    with Executor(1) as executor:
        mine = Anything()
        gone = threading.Event()
        weakref.finalize(mine, gone.set)
        call = executor.submit(mine.method)
        del mine
        assert gone.wait(PATIENCE)
        results = executor.map(calls.talk, [10, 10])
        for result in results:
            reference = len(result)
            del result
        assert reference == 10
        assert isinstance(call.exception(PATIENCE), AttributeError | pickle.PicklingError)


def test_max_workers_negative() -> None:
    for number in (0, -1):
        with pytest.raises(ValueError, match="max_workers"):
            Executor(number)
    with pytest.raises(ValueError, match="max_tasks"):
        Executor(max_tasks=0)
    with pytest.raises(ValueError, match="spares"):
        Executor(spares=-1)
    with pytest.raises(TypeError, match="initializer"):
        Executor(initializer=1)  # type: ignore[arg-type]


def test_traceback() -> None:
    with Executor(1) as executor:
        error = executor.submit(calls.fail, "why").exception(PATIENCE)
    assert isinstance(error, ValueError)
    assert error.args == ("why",)
    assert "raise ValueError(text)" in str(error.__cause__)
    assert "calls.py" in str(error.__cause__)


def test_killed_child() -> None:
    """There the whole pool is broken; here it heals."""
    with Executor(1) as executor:
        call = executor.submit(calls.die_by, signal.SIGKILL)
        with pytest.raises(WorkerDied, match="signal:SIGKILL") as died:
            call.result(PATIENCE)
        assert (died.value.signal, died.value.exit.signal) == (9, 9)
        assert isinstance(died.value, concurrent.futures.BrokenExecutor)
        assert executor.submit(pow, 2, 8).result(PATIENCE) == 256


def test_ressources_gced_in_workers() -> None:
    with Executor(1) as executor:
        executor.submit(calls.remember, 1).result(PATIENCE)
        assert executor.submit(calls.remembered).result(PATIENCE) == 1


def test_saturation_and_idle_process_reuse() -> None:
    with Executor(2) as executor:
        for _ in range(3):
            executor.submit(calls.add_one, 1).result(PATIENCE)
        assert len(executor.crew._workers) == 1
        concurrent.futures.wait([executor.submit(calls.add_one, 1) for _ in range(50)], PATIENCE)
        assert len(executor.crew._workers) <= 2


def test_max_tasks_per_child() -> None:
    with Executor(1, max_tasks=3) as executor:
        assert [executor.submit(calls.count_calls).result(PATIENCE) for _ in range(7)] == [1, 2, 3, 1, 2, 3, 1]


def test_max_tasks_early_shutdown() -> None:
    with Executor(3, max_tasks=1) as executor:
        futures = [executor.submit(calls.add_one, number) for number in range(6)]
    assert [future.result() for future in futures] == [1, 2, 3, 4, 5, 6]


def test_run_after_shutdown() -> None:
    executor = Executor(1)
    executor.shutdown()
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(pow, 2, 5)
    executor.shutdown()


def test_hang_issue12364_and_shutdown_without_waiting() -> None:
    executor = Executor(2)
    futures = [executor.submit(calls.add_one, number) for number in range(20)]
    executor.shutdown(wait=False)
    assert [future.result(PATIENCE) for future in futures] == list(range(1, 21))
    executor.shutdown()


def test_cancel_futures(fifo: Path) -> None:
    executor = Executor(1)
    first = executor.submit(calls.sleep, 1000, str(fifo))
    others = [executor.submit(calls.add_one, number) for number in range(20)]
    begun(fifo)
    executor.shutdown(wait=False, cancel_futures=True)
    assert all(other.cancelled() for other in others)
    assert first.running()
    assert first.cancel()
    executor.shutdown()


def test_del_shutdown() -> None:
    executor = Executor(2)
    crew, results = executor.crew, executor.map(abs, range(-5, 5))
    del executor
    assert list(results) == [abs(number) for number in range(-5, 5)]
    del results
    assert crew.over.wait(PATIENCE)


def test_initializer() -> None:
    with Executor(1, initializer=calls.remember, initargs=("ready",)) as executor:
        assert executor.submit(calls.remembered).result(PATIENCE) == "ready"


def test_initializer_that_fails() -> None:
    executor = Executor(2, initializer=calls.fail, initargs=("unfit",))
    with pytest.raises(ExecutorBroken, match="unfit") as broken:
        executor.submit(calls.add_one, 1).result(PATIENCE)
    assert isinstance(broken.value.__cause__, ValueError)
    with pytest.raises(ExecutorBroken, match="unfit"):
        executor.submit(calls.add_one, 1)
    executor.shutdown()


def test_error_at_task_pickle() -> None:
    with Executor(1) as executor:
        error = executor.submit(calls.count, calls.Unpicklable()).exception(PATIENCE)  # type: ignore[arg-type]
        assert isinstance(error, TypeError)
        assert executor.submit(calls.add_one, 1).result(PATIENCE) == 2


def test_error_and_exit_and_crash_at_task_unpickle() -> None:
    with Executor(1) as executor:
        assert isinstance(executor.submit(str, calls.Unreadable()).exception(PATIENCE), ValueError)
        assert isinstance(executor.submit(str, calls.DeadlyToRead()).exception(PATIENCE), WorkerDied)
        assert executor.submit(calls.add_one, 1).result(PATIENCE) == 2


def test_crash_and_exit_and_error_during_func_exec_on_worker() -> None:
    with Executor(1) as executor:
        crashed = executor.submit(calls.crash).exception(PATIENCE)
        assert isinstance(crashed, WorkerDied)
        assert (crashed.signal, crashed.exit.reason) == (signal.SIGSEGV, "signal:SIGSEGV")
        ended = executor.submit(calls.exit_with, 3).exception(PATIENCE)
        assert isinstance(ended, WorkerDied)
        assert (ended.signal, ended.exit.code) == (None, 3)
        left = executor.submit(calls.leave_with, 4).exception(PATIENCE)
        assert isinstance(left, SystemExit)
        assert left.code == 4


def test_error_during_result_pickle_and_unpickle_on_worker() -> None:
    with Executor(1) as executor:
        assert isinstance(executor.submit(calls.give_unpicklable).exception(PATIENCE), TypeError)
        assert isinstance(executor.submit(calls.give_unreadable).exception(PATIENCE), ValueError)
        assert isinstance(executor.submit(calls.raise_unpicklable).exception(PATIENCE), TypeError)
        odd = executor.submit(calls.fail_oddly).exception(PATIENCE)
        assert isinstance(odd, TypeError)
        assert "OddError: 1 and 2" in str(odd.__cause__)
        assert executor.submit(calls.add_one, 1).result(PATIENCE) == 2


def test_shutdown_deadlock_and_deadlock_big_data() -> None:
    with Executor(2) as executor:
        data = [b"x" * 5_000_000] * 4
        assert list(executor.map(calls.count, data)) == [5_000_000] * 4
        assert [len(result) for result in executor.map(calls.talk, [5_000_000] * 4)] == [5_000_000] * 4


def test_wait_and_as_completed() -> None:
    with Executor(2) as executor:
        futures = [executor.submit(calls.add_one, number) for number in range(10)]
        assert {future.result() for future in concurrent.futures.as_completed(futures, PATIENCE)} == set(range(1, 11))
        done, pending = concurrent.futures.wait(futures, PATIENCE)
        assert (len(done), pending) == (10, set())


MAIN = """
import concurrent.futures, json, os, sys, threading
import nssup
class Local:
    def __init__(self, value): self.value = value
def double(local): return Local(local.value * 2)
def slow(number):
    import time; time.sleep(0.2); return number
"""


def host_program(tmp_path: Path, text: str) -> Any:  # noqa: ANN401
    program = tmp_path / "program.py"
    program.write_text(MAIN + text)
    command: list[str | Path] = [sys.executable, "-W", "ignore::DeprecationWarning", program]  # of forks beside threads
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return json.loads(done.stdout)


def test_functions_and_classes_of_the_main_module(tmp_path: Path) -> None:
    text = (
        "if __name__ == '__main__':\n"
        "    with nssup.Executor(1) as executor: print(executor.submit(double, Local(21)).result().value)\n"
    )
    assert host_program(tmp_path, text) == 42


def test_interpreter_shutdown(tmp_path: Path) -> None:
    """What was submitted is done before the interpreter ends."""
    text = (
        "if __name__ == '__main__':\n"
        "    executor = nssup.Executor(1); future = executor.submit(slow, 1)\n"
        "    future.add_done_callback(lambda future: print(json.dumps([future.result()]), flush=True))\n"
    )
    assert host_program(tmp_path, text) == [1]


def test_under_a_host_that_forks(tmp_path: Path) -> None:
    """The child's copies hold no worker, and it may have an executor of its own."""
    text = (
        "if __name__ == '__main__':\n"
        "    executor = nssup.Executor(1); executor.submit(abs, 1).result()\n"
        "    ours, theirs = os.pipe(); child = os.fork()\n"
        "    if child == 0:\n"
        "        os.close(theirs); os.read(ours, 1)\n"
        "        with nssup.Executor(1) as own: os._exit(own.submit(abs, -7).result())\n"
        "    executor.shutdown(); os.close(theirs)\n"
        "    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    assert host_program(tmp_path, text) == 7


def test_in_a_host_that_reaps_everybody(tmp_path: Path) -> None:
    text = (
        "import signal\n"
        "def die(): os.kill(os.getpid(), signal.SIGUSR1)\n"
        "def reap():\n"
        "    while True:\n"
        "        try: os.waitpid(-1, 0)\n"
        "        except ChildProcessError: pass\n"
        "if __name__ == '__main__':\n"
        "    threading.Thread(target=reap, daemon=True).start()\n"
        "    with nssup.Executor(1) as executor:\n"
        "        found = [executor.submit(die).exception().signal for _ in range(3)]\n"
        "    print(json.dumps(found))\n"
    )
    assert host_program(tmp_path, text) == [signal.SIGUSR1] * 3


# --- what others do not ----------------------------------------------------------------------------------------------


def test_a_worker_is_in_namespaces_of_its_own() -> None:
    with Executor(1, hostname="box") as executor:
        ns_pid, namespaces = executor.submit(calls.own_namespaces).result(PATIENCE)
        assert executor.submit(os.uname).result(PATIENCE).nodename == "box"
    assert ns_pid == 2
    ours = {os.readlink(f"/proc/self/ns/{name}") for name in ("pid", "mnt", "uts", "ipc")}
    assert ours.isdisjoint(namespaces)


def test_stdin_is_empty() -> None:
    with Executor(1) as executor:
        assert executor.submit(calls.read_stdin).result(PATIENCE) == ""


def test_a_call_that_is_late_is_gone_with_all_it_started(fifo: Path) -> None:
    with Executor(1) as executor:
        call = executor.submit_within(1000.0, calls.daemonize, str(fifo))
        begun(fifo)
        held = hold_workers(executor)
        assert len(held.processes()) == 3  # init, the interpreter, its daemon
        for worker in executor.crew._workers.values():
            worker.deadline = 0.0
        executor.crew.wake()
        with pytest.raises(CallTimeout, match="1000 s") as late:
            call.result(PATIENCE)
        assert held.processes() == []
        held.close()
        assert isinstance(late.value, TimeoutError)
        assert executor.submit(calls.add_one, 1).result(PATIENCE) == 2


def test_a_time_limit_for_every_call() -> None:
    with Executor(2, timeout=0.5) as executor:
        late = [executor.submit(calls.sleep, 1000) for _ in range(4)]
        for call in late:
            assert isinstance(call.exception(PATIENCE), CallTimeout)
        assert executor.submit_within(None, calls.add_one, 1).result(PATIENCE) == 2


def test_what_a_call_leaves_behind_is_gone_before_its_result() -> None:
    with Executor(1) as executor:
        executor.submit(calls.add_one, 1).result(PATIENCE)
        held = hold_workers(executor)
        assert executor.submit(calls.daemonize).result(PATIENCE) == "left one"
        assert held.processes() == []
        held.close()
        assert executor.submit(calls.add_one, 1).result(PATIENCE) == 2


@pytest.mark.parametrize("memory", ["64M", 64 << 20])
def test_a_call_that_eats_memory(memory: str | int) -> None:
    with Executor(1, memory=memory) as executor:
        assert executor.submit(calls.eat, 16 << 20).result(PATIENCE) == 16 << 20
        for call in (executor.submit(calls.eat, 80 << 20), executor.submit(calls.eat_slowly)):
            with pytest.raises(MemoryLimit, match=str(64 << 20)) as limit:
                call.result(PATIENCE)
            assert limit.value.limit == 64 << 20
            assert isinstance(limit.value, MemoryError)
        assert executor.submit(calls.survive, 80 << 20).result(PATIENCE) == "survived"
        assert executor.submit(calls.eat, 16 << 20).result(PATIENCE) == 16 << 20


def test_without_a_limit_a_memory_error_is_the_call_s_own() -> None:
    with Executor(1) as executor:
        error = executor.submit(calls.eat, 1 << 60).exception(PATIENCE)
    assert type(error) is MemoryError


def test_a_running_call_is_cancelled_for_certain(fifo: Path) -> None:
    with Executor(1) as executor:
        call = executor.submit(calls.daemonize, str(fifo))
        begun(fifo)
        held = hold_workers(executor)
        assert call.running()
        assert call.cancel()
        done, _ = concurrent.futures.wait([call], PATIENCE)
        assert done
        assert call.cancelled()
        assert held.processes() == []
        held.close()
        assert executor.submit(calls.add_one, 1).result(PATIENCE) == 2
        finished = executor.submit(calls.add_one, 1)
        finished.result(PATIENCE)
        assert not finished.cancel()


def test_a_waiting_call_is_cancelled_as_ever(fifo: Path) -> None:
    with Executor(1) as executor:
        first = executor.submit(calls.sleep, 1000, str(fifo))
        second = executor.submit(calls.add_one, 1)
        begun(fifo)
        assert second.cancel()
        third = executor.submit(calls.add_one, 2)
        assert first.cancel()
        assert third.result(PATIENCE) == 3


def test_a_worker_that_shuts_its_door_is_no_worker_any_more() -> None:
    with Executor(1) as executor:
        assert isinstance(executor.submit(calls.close_everything).exception(PATIENCE), WorkerDied)
        assert executor.submit(calls.add_one, 1).result(PATIENCE) == 2


def test_spares_are_ready_before_they_are_needed() -> None:
    with Executor(1, spares=1) as executor:
        namespaces = {executor.submit(calls.pid_namespace).result(PATIENCE)}
        deadline = time.monotonic() + PATIENCE
        while not (len(executor.crew._workers) == 2 and all(w.ready for w in executor.crew._workers.values())):
            assert time.monotonic() < deadline, "no spare"
            os.sched_yield()
        namespaces |= {executor.submit(calls.pid_namespace).result(PATIENCE) for _ in range(5)}
        assert len(namespaces) <= 2
        together = [executor.submit(calls.sleep, 0.05) for _ in range(4)]
        concurrent.futures.wait(together, PATIENCE)
        assert len(executor.crew._workers) <= 2


def test_kill_ends_everything(fifo: Path) -> None:
    executor = Executor(1)
    running = executor.submit(calls.sleep, 1000, str(fifo))
    waiting = executor.submit(calls.add_one, 1)
    begun(fifo)
    executor.kill()
    assert running.cancelled()
    assert waiting.cancelled()


def test_an_interpreter_that_cannot_be_launched() -> None:
    with Executor(1, directory="/no/such/directory") as executor:
        with pytest.raises(ExecutorBroken) as broken:
            executor.submit(calls.add_one, 1).result(PATIENCE)
        assert isinstance(broken.value.__cause__, WorkerDied | LaunchError)
        assert "directory:ENOENT" in str(broken.value)


def test_many_threads_submit() -> None:
    with Executor(2) as executor, concurrent.futures.ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda number: executor.submit(calls.add_one, number).result(PATIENCE), range(400)))
    assert found == list(range(1, 401))


# --- asyncio ---------------------------------------------------------------------------------------------------------


@pytest.mark.both_loops
async def test_awaited_calls() -> None:
    async with AsyncExecutor(2) as executor:
        assert await executor.call(calls.add_one, 1) == 2
        with pytest.raises(ValueError, match="why"):
            await executor.call(calls.fail, "why")
        with pytest.raises(CallTimeout):
            await executor.call_within(0.2, calls.sleep, 1000)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(executor.call(calls.add_one, number)) for number in range(50)]
        assert [task.result() for task in tasks] == list(range(1, 51))


@pytest.mark.both_loops
async def test_an_awaited_call_that_is_cancelled_is_gone(fifo: Path) -> None:
    async with AsyncExecutor(1) as executor, asyncio.TaskGroup() as group:
        task = group.create_task(executor.call(calls.daemonize, str(fifo)))
        await asyncio.to_thread(begun, fifo)
        held = hold_workers(executor._executor)
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert held.processes() == []
        held.close()
        assert await executor.call(calls.add_one, 1) == 2


@pytest.mark.both_loops
async def test_mapping() -> None:
    async with AsyncExecutor(2) as executor:
        assert [found async for found in executor.map(calls.add_one, range(20))] == list(range(1, 21))
        unordered = [found async for found in executor.map(calls.add_one, range(20), in_order=False)]
        assert sorted(unordered) == list(range(1, 21))
        endless = executor.map(calls.add_one, iter(int, 1))
        assert await anext(endless) == 1
        await endless.aclose()
        with pytest.raises(ZeroDivisionError):
            _ = [found async for found in executor.map(divmod, [1, 1], [1, 0])]


@pytest.mark.both_loops
@pytest.mark.parametrize("how", [LookupError, asyncio.CancelledError])
async def test_left_by_an_exception_it_ends_the_calls(fifo: Path, how: type[BaseException]) -> None:
    running: list[Call[None]] = []

    async def leave() -> None:
        async with AsyncExecutor(1) as executor:
            running.append(executor._executor.submit(calls.sleep, 1000, str(fifo)))
            await asyncio.to_thread(begun, fifo)
            raise how

    with pytest.raises(how):
        await leave()
    assert running[0].cancelled()


@pytest.mark.both_loops
async def test_as_the_executor_of_a_loop(fifo: Path) -> None:
    loop = asyncio.get_running_loop()
    with Executor(1) as executor:
        assert await loop.run_in_executor(executor, calls.add_one, 1) == 2
        waiting = loop.run_in_executor(executor, calls.sleep, 1000, str(fifo))
        await asyncio.to_thread(begun, fifo)
        waiting.cancel()
        assert await loop.run_in_executor(executor, calls.add_one, 1) == 2
