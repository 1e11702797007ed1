"""nssup.Tasks: workers of other languages, on both event loops; and where an answer ends in what they write."""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live import PATIENCE, PidNamespaces, needs_namespaces

from nssup import BadAnswer, LaunchError, SpecError, TaskDied, Tasks, TasksClosed, TaskTimeout
from nssup.frames import BadFrame, Lines, Values

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path

# One answer a line; a few words mean something else.
SHELL = (
    "sh",
    "-c",
    "n=0; while read -r word rest; do n=$((n+1)); case $word in "
    "count) echo $n;; die) exit 3;; kill) kill -9 $$;; sleep) sleep $rest; echo slept;; twice) printf 'a\\nb\\n';; "
    "mute) exec >&-; sleep 1000;; long) head -c 100000 /dev/zero | tr '\\0' x; echo;; none) printf '\\377\\n';; "
    "once) test -e $rest && echo again || { touch $rest; exit 1; };; begun) echo > $rest; setsid sleep 1000 & wait;; "
    '*) echo "$word $rest";; esac; done',
)
PYTHON = (
    sys.executable,
    "-c",
    "import msgspec, sys\n"
    "read = sys.stdin.buffer.raw.read\n"
    "while data := read(1 << 16):\n"
    "    value = msgspec.msgpack.decode(data)\n"
    "    sys.stdout.buffer.write(msgspec.msgpack.encode([value, len(data)])); sys.stdout.flush()\n",
)


async def patient(waiting: Coroutine[Any, Any, Any]) -> Any:  # noqa: ANN401
    async with asyncio.timeout(PATIENCE):
        return await waiting


pytestmark = [needs_namespaces, pytest.mark.both_loops]


async def test_one_after_the_other() -> None:
    async with Tasks(SHELL) as tasks:
        assert await patient(tasks.call("hello you")) == "hello you"
        assert [await patient(tasks.call("count")) for _ in range(3)] == ["2", "3", "4"]
        with pytest.raises(ValueError, match="newline"):
            await tasks.call("two\nlines")
        with pytest.raises(ValueError, match="text"):
            await tasks.call(7)


async def test_values() -> None:
    async with Tasks(["cat"], protocol="json") as tasks:
        assert await patient(tasks.call({"a": [1, None, "ü"]})) == {"a": [1, None, "ü"]}
    async with Tasks(PYTHON, protocol="msgpack") as tasks:
        for value in (None, 7, "x" * 1000, {"a": [1.5, b"\0"]}):
            assert (await patient(tasks.call(value)))[0] == value


async def test_many_by_several_in_order_and_as_they_come() -> None:
    async with Tasks(SHELL, workers=3) as tasks:
        words = [f"w{number} " for number in range(40)]
        assert [answer async for answer in tasks.map(words)] == words
        assert sorted([answer async for answer in tasks.map(words, in_order=False)]) == sorted(words)
        slow_first = ["sleep 2", "w "]
        assert [answer async for answer in tasks.map(["sleep 0.1", "w "])] == ["slept", "w "]
        assert [answer async for answer in tasks.map(slow_first, in_order=False)] == ["w ", "slept"]


async def test_tasks_may_be_endless() -> None:
    taken = 0

    def endless() -> Any:  # noqa: ANN401
        nonlocal taken
        while True:
            taken += 1
            yield "w"

    async with Tasks(SHELL, workers=2) as tasks:
        answers = tasks.map(endless())
        assert [await patient(anext(answers)) for _ in range(10)] == ["w "] * 10
        await answers.aclose()
        assert taken <= 10 + 2 * 2 + 1
        assert await patient(tasks.call("after")) == "after "


async def test_who_dies_is_told_and_replaced() -> None:
    async with Tasks(SHELL) as tasks:
        with pytest.raises(TaskDied, match="exit:3") as died:
            await patient(tasks.call("die"))
        assert died.value.exit.code == 3
        with pytest.raises(TaskDied, match="signal:SIGKILL"):
            await patient(tasks.call("kill"))
        assert await patient(tasks.call("count")) == "1"


async def test_a_late_one_is_gone_with_all_it_started(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "begun")
    held = PidNamespaces()

    def hold() -> None:
        (tmp_path / "begun").read_text()
        for life in tasks._hub.lives:
            held.hold(life.init_host_pid)

    async with Tasks(SHELL, timeout=4) as tasks:
        async with asyncio.TaskGroup() as group:
            late = group.create_task(patient(_error_of(tasks, f"begun {tmp_path}/begun")))
            await asyncio.to_thread(hold)
        assert isinstance(late.result(), TaskTimeout)
        assert isinstance(late.result(), TimeoutError)
        assert held.processes() == []
        held.close()
        assert await patient(tasks.call("count")) == "1"


async def _error_of(tasks: Tasks, task: str) -> BaseException | None:
    try:
        await tasks.call(task)
    except Exception as error:
        return error
    return None


async def test_at_most_once_unless_retries_are_asked_for(tmp_path: Path) -> None:
    async with Tasks(SHELL) as tasks:
        with pytest.raises(TaskDied):
            await patient(tasks.call(f"once {tmp_path}/a"))
    async with Tasks(SHELL, retries=1) as tasks:
        assert await patient(tasks.call(f"once {tmp_path}/b")) == "again"
        with pytest.raises(TaskDied):
            await patient(tasks.call("die"))


@pytest.mark.parametrize(("task", "why"), [("long", "longer"), ("none", "cannot be read")])
async def test_what_is_no_answer(task: str, why: str) -> None:
    async with Tasks(SHELL, max_answer=1000) as tasks:
        with pytest.raises(BadAnswer, match=why):
            await patient(tasks.call(task))
        assert await patient(tasks.call("count")) in ("1", "2")


async def test_who_writes_more_than_his_answer_gets_no_other_task() -> None:
    async with Tasks(SHELL) as tasks:
        assert await patient(tasks.call("twice")) == "a"
        assert await patient(tasks.call("count")) == "1"


async def test_a_worker_that_closes_its_stdout_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nssup.tasks.GRACE", 0.1)
    async with Tasks(SHELL) as tasks:
        with pytest.raises(TaskDied, match="SIGKILL"):
            await patient(tasks.call("mute"))


async def test_a_worker_is_replaced_after_so_many() -> None:
    async with Tasks(SHELL, max_tasks=2) as tasks:
        assert [await patient(tasks.call("count")) for _ in range(5)] == ["1", "2", "1", "2", "1"]


async def test_cancelled_the_one_that_has_it_is_killed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "begun")
    held = PidNamespaces()

    def hold() -> None:
        (tmp_path / "begun").read_text()
        for life in tasks._hub.lives:
            held.hold(life.init_host_pid)

    async with Tasks(SHELL) as tasks, asyncio.TaskGroup() as group:
        task = group.create_task(tasks.call(f"begun {tmp_path}/begun"))
        waiting = group.create_task(tasks.call("waiting"))
        await asyncio.to_thread(hold)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert held.processes() == []
        held.close()
        async with asyncio.timeout(PATIENCE):
            assert await waiting == "waiting "


async def test_the_queue_is_bounded() -> None:
    async with Tasks(SHELL, max_waiting=1) as tasks, asyncio.TaskGroup() as group:
        asked = [group.create_task(tasks.call("sleep 0.05")) for _ in range(5)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert tasks._queue.qsize() <= 1
    assert [task.result() for task in asked] == ["slept"] * 5


@pytest.mark.parametrize("how", [LookupError, asyncio.CancelledError])
async def test_left_by_an_exception_nothing_is_left(how: type[BaseException]) -> None:
    async def leave() -> None:
        async with Tasks(SHELL, workers=2) as tasks:
            await patient(tasks.call("w"))
            asked.append(group.create_task(_error_of(tasks, "sleep 1000")))
            await asyncio.sleep(0)
            raise how

    asked: list[asyncio.Task[BaseException | None]] = []
    async with asyncio.TaskGroup() as group:
        with pytest.raises(how):
            await patient(leave())
    assert isinstance(asked[0].result(), TasksClosed)


async def test_what_was_asked_is_answered_before_the_end() -> None:
    async with asyncio.TaskGroup() as group:
        async with Tasks(SHELL) as tasks:
            asked = [group.create_task(tasks.call("w")) for _ in range(3)]
            await asyncio.sleep(0)
        assert [await task for task in asked] == ["w "] * 3
        with pytest.raises(TasksClosed):
            await tasks.call("w")


async def test_what_is_wrong_is_said() -> None:
    with pytest.raises(ValueError, match="workers"):
        Tasks(["cat"], workers=0)
    with pytest.raises(SpecError):
        async with Tasks([]):
            pass
    async with Tasks(["/no/such/program"]) as tasks:
        with pytest.raises(LaunchError, match="not found"):
            await patient(tasks.call("x"))


# --- frames ----------------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(), inner, max_size=20),
    max_leaves=20,
)
LONG = st.sampled_from(
    [b"x" * 300, b"x" * 70000, "x" * 300, "x" * 70000, [1] * 70000, {str(n): n for n in range(70000)}, -33, 2**31, 1.5]
) | st.builds(
    msgspec.msgpack.Ext,
    st.integers(-128, 127),
    st.binary() | st.sampled_from([b"x" * n for n in (1, 2, 4, 8, 16, 300)]),
)


def cut(data: bytes, at: list[int]) -> list[bytes]:
    places = sorted({min(place, len(data)) for place in at} | {0, len(data)})
    return [data[begin:end] for begin, end in itertools.pairwise(places)]


@settings(deadline=None)
@given(st.lists(VALUES, max_size=5), st.lists(st.integers(0, 400), max_size=8))
def test_values_are_cut_as_they_were_made(values: list[Any], at: list[int]) -> None:
    frames, found = Values(1 << 20), []
    for piece in cut(b"".join(map(msgspec.msgpack.encode, values)), at):
        found += list(frames.feed(piece))
    assert found == [msgspec.msgpack.encode(value) for value in values]


@settings(deadline=None, max_examples=30)
@given(LONG, st.lists(st.integers(0, 70_010), max_size=3))
def test_long_values(value: Any, at: list[int]) -> None:  # noqa: ANN401
    encoded, frames, found = msgspec.msgpack.encode(value), Values(1 << 21), []
    for piece in cut(encoded * 2, at):
        found += list(frames.feed(piece))
    assert found == [encoded, encoded]


@settings(deadline=None)
@given(st.lists(st.binary().filter(lambda line: b"\n" not in line), max_size=8), st.lists(st.integers(0, 100)))
def test_lines_are_cut_as_they_were_made(lines: list[bytes], at: list[int]) -> None:
    frames, found = Lines(1 << 20), []
    for piece in cut(b"".join(line + b"\n" for line in lines), at):
        found += list(frames.feed(piece))
    assert found == lines


@pytest.mark.parametrize(
    ("make", "data"),
    [(Lines, b"x" * 11), (Lines, b"x" * 11 + b"\n"), (Values, b"\xc1"), (Values, b"\xc6\xff\xff\xff\xff")],
)
def test_what_can_be_no_answer_is_refused_at_once(make: Callable[[int], Lines | Values], data: bytes) -> None:
    with pytest.raises(BadFrame):
        list(make(10).feed(data))
