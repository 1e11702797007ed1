"""One epoll for many descriptors, on both loops."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from functools import partial
from typing import TYPE_CHECKING

import pytest

from nssup.watch import Watch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

pytestmark = pytest.mark.both_loops


@pytest.fixture
async def watch() -> AsyncIterator[Watch]:
    made = Watch(asyncio.get_running_loop())
    yield made
    made.close()


@pytest.fixture
def sleeper() -> Iterator[int]:
    """A pidfd of some process."""
    with subprocess.Popen(["sleep", "1000"]) as process:
        pidfd = os.pidfd_open(process.pid)
        yield pidfd
        os.close(pidfd)
        process.kill()


class Pipe:
    def __init__(self) -> None:
        self.read, self.write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def say(self, data: bytes = b"x") -> None:
        os.write(self.write, data)

    def close(self) -> None:
        os.close(self.read)
        os.close(self.write)


@pytest.fixture
def pipes() -> Iterator[list[Pipe]]:
    made = [Pipe() for _ in range(3)]
    yield made
    for pipe in made:
        pipe.close()


async def turns(count: int = 5) -> None:
    """Enough for the loop to look at its descriptors."""
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_readable_descriptor_calls_back(watch: Watch, pipes: list[Pipe]) -> None:
    heard: asyncio.Queue[int] = asyncio.Queue()

    def take(pipe: Pipe) -> None:
        os.read(pipe.read, 100)
        heard.put_nowait(pipe.read)

    for pipe in pipes:
        watch.add(pipe.read, partial(take, pipe))
    for pipe in (pipes[1], pipes[0], pipes[1]):
        pipe.say()
        assert await heard.get() == pipe.read
    assert heard.empty()


async def test_what_is_not_taken_calls_back_again(watch: Watch, pipes: list[Pipe]) -> None:
    calls = 0
    thrice = asyncio.Event()

    def count() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            thrice.set()

    watch.add(pipes[0].read, count)
    pipes[0].say()
    await thrice.wait()


async def test_a_removed_descriptor_is_silent(watch: Watch, pipes: list[Pipe]) -> None:
    calls: list[str] = []
    seen = asyncio.Event()
    watch.add(pipes[0].read, lambda: calls.append("removed"))
    watch.add(pipes[1].read, seen.set)
    watch.remove(pipes[0].read)
    watch.remove(pipes[0].read)  # again, and of one never added
    watch.remove(pipes[2].read)
    pipes[0].say()
    pipes[1].say()
    await seen.wait()
    assert calls == []


async def test_a_callback_may_remove_others_of_its_batch(watch: Watch, pipes: list[Pipe]) -> None:
    calls: list[int] = []
    done = asyncio.Event()

    def first(pipe: Pipe) -> None:
        calls.append(pipe.read)
        for other in pipes:
            watch.remove(other.read)
        done.set()

    for pipe in pipes:
        watch.add(pipe.read, partial(first, pipe))
    for pipe in pipes:
        pipe.say()
    await done.wait()
    await turns()
    assert len(calls) == 1


async def test_a_number_may_be_used_again(watch: Watch) -> None:
    old = Pipe()
    watch.add(old.read, lambda: pytest.fail("the old one"))
    watch.remove(old.read)
    old.close()
    new = Pipe()
    assert new.read == old.read
    heard = asyncio.Event()
    watch.add(new.read, heard.set)
    new.say()
    await heard.wait()
    watch.remove(new.read)
    new.close()


async def test_a_copy_elsewhere_does_not_keep_a_removed_descriptor_alive(watch: Watch, pipes: list[Pipe]) -> None:
    """As a clone's child has one for a moment: an epoll reports a file that is open somewhere, closed here or not."""
    read = os.dup(pipes[0].read)
    watch.add(read, lambda: pytest.fail("closed"))
    watch.remove(read)
    os.close(read)
    heard = asyncio.Event()
    watch.add(pipes[1].read, heard.set)
    pipes[0].say()
    pipes[1].say()
    await heard.wait()


async def test_a_pidfd_stays_as_it_is(watch: Watch, sleeper: int) -> None:
    """uvloop's own add_reader makes it non-blocking, and then waitid(2) says EAGAIN where it should wait."""
    gone = asyncio.Event()
    watch.add(sleeper, gone.set)
    await turns()
    assert os.get_blocking(sleeper)
    signal.pidfd_send_signal(sleeper, signal.SIGKILL)
    await gone.wait()
    watch.remove(sleeper)


async def test_a_failing_callback_harms_nobody_else(watch: Watch, pipes: list[Pipe]) -> None:
    loop = asyncio.get_running_loop()
    said: list[str] = []
    loop.set_exception_handler(lambda _, context: said.append(str(context.get("exception"))))
    heard = asyncio.Event()

    def fail() -> None:
        watch.remove(pipes[0].read)
        raise RuntimeError("one of ours")

    watch.add(pipes[0].read, fail)
    watch.add(pipes[1].read, heard.set)
    pipes[0].say()
    pipes[1].say()
    await heard.wait()
    assert said == ["one of ours"]


async def test_more_than_a_batch(watch: Watch) -> None:
    many = [Pipe() for _ in range(300)]
    left = set(range(300))
    done = asyncio.Event()

    def take(number: int) -> None:
        os.read(many[number].read, 1)
        left.discard(number)
        if not left:
            done.set()

    for number, pipe in enumerate(many):
        watch.add(pipe.read, partial(take, number))
        pipe.say()
    await done.wait()
    for pipe in many:
        watch.remove(pipe.read)
        pipe.close()


async def test_close_leaves_nothing_at_the_loop(pipes: list[Pipe]) -> None:
    watch = Watch(asyncio.get_running_loop())
    watch.add(pipes[0].read, lambda: pytest.fail("closed"))
    pipes[0].say()
    watch.close()
    await turns()


async def test_at_rest_nothing_happens(watch: Watch, pipes: list[Pipe]) -> None:
    calls: list[int] = []
    watch.add(pipes[0].read, lambda: calls.append(1))
    await turns(100)
    assert calls == []
