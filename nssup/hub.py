"""What all lives on one event loop share that belong to no Supervisor: a launcher and a watch; and a life as a value to
be waited for.

Made when the loop first launches something, closed with the loop: by `shutdown_asyncgens`, which asyncio.run and
asyncio.Runner call, else when another loop makes one. A forked child gives up its copies of all descriptors: with one
of them open, a program would never see the end of its stdin.
"""

import asyncio
import contextlib
import os
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING

from msgspec.structs import replace

from nssup import wire
from nssup.clone import Launcher, exit_of_message
from nssup.clone import Process as Init
from nssup.errors import LaunchError
from nssup.events import Exit
from nssup.facts import Host
from nssup.record import Plan
from nssup.spec import SIGKILL
from nssup.watch import Watch

if TYPE_CHECKING:
    from nssup.pipes import ReadEnd, Writer

LAUNCHES_PER_TURN = 8  # of the loop: others have their turn in between

_hubs: dict[asyncio.AbstractEventLoop, "Hub"] = {}


def hub() -> "Hub":
    """That of the running loop. Raises RuntimeError without one, OSError when nssup-init cannot be read."""
    loop = asyncio.get_running_loop()
    found = _hubs.get(loop)
    if found is None:
        for other in [other for other in tuple(_hubs) if other.is_closed()]:
            _hubs.pop(other).close()
        found = _hubs[loop] = Hub(loop)
        found.close_with_loop()
    return found


async def insist(done: asyncio.Event, end: Callable[[], object]) -> None:
    """Until it is done. Cancelled, it calls end, and goes on waiting; then it raises CancelledError."""
    cancelled: asyncio.CancelledError | None = None
    while not done.is_set():
        try:
            await done.wait()
        except asyncio.CancelledError as error:
            end()
            cancelled = error
    if cancelled is not None:
        raise cancelled


def _in_forked_child() -> None:
    for inherited in tuple(_hubs.values()):
        inherited.abandon()
    _hubs.clear()


os.register_at_fork(after_in_child=_in_forked_child)


class Hub:
    """See the module. Use it on its loop's thread only."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.privileged = Host().capable("SYS_ADMIN")
        self.launcher = Launcher()
        self.watch = Watch(loop)
        self.lives: set[Life] = set()
        self._launched_this_turn = 0
        self._queue: deque[asyncio.Future[None]] = deque()
        self._end: AsyncGenerator[None, None] | None = None

    def close_with_loop(self) -> None:
        """The loop ends the asynchronous generators that were begun on it: ours does nothing until then."""
        self._end = self._until_the_end()
        with contextlib.suppress(StopIteration):
            self._end.__anext__().send(None)

    async def _until_the_end(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            _hubs.pop(self.loop, None)
            self.close()

    def close(self) -> None:
        """Kill what still lives, wait until it is gone, close everything."""
        lives, self.lives = self.lives, set()
        for life in lives:
            life.kill()
        for life in lives:
            life.destroy()
        if self.loop.is_closed():
            self.watch.abandon()
        else:
            self.watch.close()
        self.launcher.close()

    def abandon(self) -> None:
        for life in self.lives:
            life.abandon()
        self.watch.abandon()
        self.launcher.close()

    async def turn(self) -> None:
        """Until this turn of the loop has room for another launch."""
        if self._queue or self._launched_this_turn >= LAUNCHES_PER_TURN:
            place: asyncio.Future[None] = self.loop.create_future()
            self._queue.append(place)
            await place
            return
        if self._launched_this_turn == 0:
            self.loop.call_soon(self._next_turn)
        self._launched_this_turn += 1

    def _next_turn(self) -> None:
        self._launched_this_turn = 0
        while self._queue and self._launched_this_turn < LAUNCHES_PER_TURN:
            place = self._queue.popleft()
            if not place.done():  # cancelled
                self._launched_this_turn += 1
                place.set_result(None)
        if self._queue or self._launched_this_turn:
            self.loop.call_soon(self._next_turn)

    def launch(self, plan: Plan, stdio: tuple[int, int, int], *, heard: bool = True) -> "Life":
        """A life of this plan, running. heard: what init says is heard at once; else when it is gone, which saves two
        wake-ups where nobody waits for less. Raises LaunchError; then nothing is left behind."""
        init = self.launcher.launch(plan, stdio=stdio)
        life = Life(self, init)
        try:
            if heard:
                self.watch.add(init.line, life._on_line)
            self.watch.add(init.pidfd, life._on_gone)
        except OSError as error:
            self.watch.remove(init.line)
            init.destroy()
            raise LaunchError("pipes", error.errno or 0) from None
        self.lives.add(life)
        init.go()
        return life


class Life:
    """One life, from launch to proven empty.

    host_pid, ns_pid: the program's, 0 until it runs. exit: how it ended, None until it is proven that nothing is left
    of it. failed: the step of the launch that failed inside, with its errno; then there was no program.
    """

    __slots__ = (
        "_exited",
        "_hub",
        "_init",
        "_killed",
        "_waiters",
        "exit",
        "failed",
        "host_pid",
        "init_host_pid",
        "ns_pid",
        "outputs",
        "stdin",
        "timed_out",
    )

    def __init__(self, hub: Hub, init: Init) -> None:
        self._hub = hub
        self._init = init
        self._waiters: list[asyncio.Future[None]] = []
        self._exited: Exit | None = None
        self._killed = False
        self.init_host_pid = init.init_host_pid
        self.host_pid = self.ns_pid = 0
        self.exit: Exit | None = None
        self.failed: wire.Failed | None = None
        self.timed_out = False
        self.stdin: Writer | None = None
        self.outputs: list[ReadEnd] = []

    @property
    def program_ended(self) -> bool:
        """The program has ended; what it started may not have."""
        return self._exited is not None or self.exit is not None

    def signal(self, signo: int) -> None:
        """To the program, by its init; to nobody when it has ended."""
        if not self.program_ended:
            self._init.signal(signo)

    def kill(self) -> None:
        """SIGKILL to every process of the life. `over` tells when it is so."""
        if self.exit is None:
            self._killed = True
            self._init.kill()

    def expire(self) -> None:
        """Its time is over."""
        if self.exit is None:
            self._hear()
        if not self.program_ended:  # else it was in time, and only the rest of its tree lingers
            self.timed_out = True
        self.kill()

    async def started(self) -> None:
        """Until the program runs, or it is known why it does not."""
        while not self.host_pid and self.exit is None:
            await self._change()

    async def over(self) -> None:
        """Until nothing is left. Cancelled, it kills, and goes on waiting; then it raises CancelledError."""
        cancelled: asyncio.CancelledError | None = None
        while self.exit is None:
            try:
                await self._change()
            except asyncio.CancelledError as error:
                self.kill()
                cancelled = error
        if cancelled is not None:
            raise cancelled

    async def wait(self) -> Exit:
        """Until nothing is left. Cancelled, it only stops waiting."""
        while self.exit is None:
            await self._change()
        return self.exit

    async def _change(self) -> None:
        waiter: asyncio.Future[None] = self._hub.loop.create_future()
        self._waiters.append(waiter)
        await waiter

    def _tell(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _on_line(self) -> None:
        self._hear()
        if self._init.line_ended and self._init.line >= 0:
            self._hub.watch.remove(self._init.line)
            self._init.close_line()

    def _hear(self) -> None:
        for message in self._init.receive():
            if isinstance(message, wire.Started):
                self.host_pid, self.ns_pid = message.host_pid, message.ns_pid
                self._tell()
            elif isinstance(message, wire.Exited):
                self._exited = self._exited or exit_of_message(message.exit)
            elif isinstance(message, wire.Failed):
                self.failed = message
            elif isinstance(message, wire.Empty):
                self._init.release()
                self._hub.watch.remove(self._init.line)  # it has said all

    def _on_gone(self) -> None:
        seen = self._init.reap()
        if seen is not None:
            self._hear()
            self._over(seen)

    def _over(self, seen: Exit) -> None:
        self._hub.lives.discard(self)
        for fd in (self._init.line, self._init.pidfd):
            if fd >= 0:
                self._hub.watch.remove(fd)
        self._init.close()
        for output in self.outputs:
            output.finish()
        if self.stdin is not None:
            self.stdin.abort()
        self.exit = replace(self._ended(seen), at=time.time())
        self._tell()

    def _ended(self, seen: Exit) -> Exit:
        """seen: what the reaper of init saw, which says nothing about the program. But a tree that we killed died of
        that."""
        if self.failed is not None:
            return Exit(reason=wire.failure_reason(self.failed.step, self.failed.errno))
        if self._exited is not None:
            return replace(self._exited, timed_out=self.timed_out)
        if self._killed:
            return Exit(reason="signal:SIGKILL", signal=SIGKILL, timed_out=self.timed_out)
        return seen

    def destroy(self) -> None:
        """Kill and wait here and now: for the end of the loop."""
        for output in self.outputs:
            output.close()
        if self.stdin is not None:
            self.stdin.abort()
        for fd in (self._init.line, self._init.pidfd):
            if fd >= 0:
                self._hub.watch.remove(fd)
        self._init.destroy()
        self.exit = self._ended(Exit(reason="init-killed"))

    def abandon(self) -> None:
        """Close our copies of its descriptors, as a forked child does."""
        self._init.close()
        for output in self.outputs:
            output.abandon()
        if self.stdin is not None:
            self.stdin.abandon()
