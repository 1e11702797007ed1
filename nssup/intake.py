"""When which pipe is read.

All pipes sit in an epoll of our own, edge-triggered, and the loop watches only that: what is left in a pipe wakes
nobody twice. A pass takes from each ready pipe once, a bounded share, so that a full one delays the others by no more;
those that had something come last in the next. After a pass that found data we rest for a moment, the longer the more
pipes had some, so that many small writers cost one wake-up for many lines. When all are dry there is no timer and
nothing to do until the kernel sees the next byte.
"""

import asyncio
import fcntl
import select
from collections.abc import Callable, Collection
from typing import Generic, TypeVar

REST = 0.010  # seconds between two passes, as a rule
REST_A_PIPE = 0.0003  # and for each pipe that had data, up to
LONG_REST = 0.060  # half of which a line waits, on average
SHORT_REST = 0.001  # the shortest that a loop's timers can do; for pipes that would fill up in REST
SHARE = 256 * 1024  # bytes taken from one pipe in one pass, at most
SIZE = 64 * 1024  # of a pipe, as a rule; and what is read of one: a packet of O_DIRECT that does not fit loses its end
LARGE = 1024 * 1024  # what a pipe that is found full twice may grow to
GROWN = 64 * LARGE  # bytes by which all of them may: the kernel's own limit for a user without privileges
_FULL_TWICE = 2


# What a read may say beside how many bytes it took.
DRY = 0  # there are none now, or no more will come
NOT_NOW = -1  # it has to be tried again
WAITING = -2  # there is no room for them: whoever has some again puts the pipe back


class Pipe:
    """A read end. size: bytes that fit in. share: bytes of it that a pass may take."""

    __slots__ = ("fd", "found_full", "share", "size")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.size = self.share = SIZE
        self.found_full = 0


P = TypeVar("P", bound=Pipe)


class Intake(Generic[P]):
    """Pipes that are read when they have data. passes: how many there were so far."""

    def __init__(self, loop: asyncio.AbstractEventLoop, read: Callable[[P], int], begin: Callable[[], None]) -> None:
        """read: takes from a pipe, at most its share; how many bytes, or what the constants say. begin: before each
        pass."""
        self.passes = 0
        self.pipes: dict[int, P] = {}
        self._loop = loop
        self._read = read
        self._begin = begin
        self._ready: dict[P, None] = {}  # that had data, or may have, in the order they will be read
        self._epoll = select.epoll()
        self._timer: asyncio.Handle | None = None
        self._soon = False  # that timer is for the loop's next turn
        self._pause = REST
        self._bursts: dict[P, int] = {}  # bytes taken since the last rest, from pipes that gave all they may
        self._grown = 0
        loop.add_reader(self._epoll.fileno(), self._on_readable)

    @property
    def at_rest(self) -> bool:
        """Whether nothing happens until a pipe has news."""
        return self._timer is None

    def add(self, pipe: P) -> None:
        self._epoll.register(pipe.fd, select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET)
        self.pipes[pipe.fd] = pipe

    def remove(self, pipe: P) -> None:
        """Before its fd is closed: somebody else holds the same pipe, so closing alone would leave it here."""
        self._ready.pop(pipe, None)
        if not self._epoll.closed:
            self._epoll.unregister(pipe.fd)
        del self.pipes[pipe.fd]
        self._grown -= pipe.size - SIZE

    def put_back(self, pipes: Collection[P]) -> None:
        """These may have data, and there may be room for it: they are read soon, and before others."""
        if not pipes or self._epoll.closed:
            return
        self._ready = {**dict.fromkeys(pipes), **self._ready}
        if self._soon:
            return
        if self._timer is None:
            self._loop.remove_reader(self._epoll.fileno())
        else:
            self._timer.cancel()
        self._pass_soon()

    def _pass_soon(self) -> None:
        self._soon = True
        self._timer = self._loop.call_soon(self._pass)

    def close(self) -> None:
        """Nothing is read any more."""
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()

    def _on_readable(self) -> None:
        self._loop.remove_reader(self._epoll.fileno())
        self._pass()

    def _pass(self) -> None:
        """Reads each pipe that has data, or may have, once."""
        self._timer, self._soon = None, False
        self.passes += 1
        found = [self.pipes[fd] for fd, _ in self._epoll.poll(0, max(len(self.pipes), 1))]
        self._ready = {**dict.fromkeys(pipe for pipe in found if pipe not in self._ready), **self._ready}
        self._begin()
        ready, self._ready = self._ready, {}
        fullest, fed, waiting, more = 0.0, 0, False, False
        try:
            while ready:
                pipe = next(iter(ready))
                del ready[pipe]
                got = self._read(pipe)
                waiting = waiting or got == WAITING
                if got > 0:
                    fed += 1
                    burst = self._bursts.get(pipe, 0) + got
                    fullest = max(fullest, burst / pipe.size)
                    if got >= pipe.share:
                        self._bursts[pipe] = burst
                        more = True
                    if got > pipe.size // 2:
                        self._found_full(pipe)
                if got not in (DRY, WAITING) and pipe.fd >= 0:
                    # Not read until it is dry, which would be a second call each time: the next pass will see.
                    self._ready[pipe] = None
        finally:
            self._ready.update(ready)  # whatever went wrong with one pipe, the others are seen to
            if more:
                self._pass_soon()
            else:
                self._rest(bool(fed or waiting or self._ready), fullest, fed)

    def _found_full(self, pipe: P) -> None:
        """A pipe that is full again and again holds its worker up: it becomes larger, as far as that is allowed.

        Half of its bytes are enough to be full: writes that do not fit into the rest of a page take one of their own.
        """
        pipe.found_full += 1
        if pipe.found_full != _FULL_TWICE or self._grown + LARGE - SIZE > GROWN:
            return
        try:
            size = fcntl.fcntl(pipe.fd, fcntl.F_SETPIPE_SZ, LARGE)
        except OSError:  # the user's limit on pipes is reached, or it is a pty
            return
        self._grown += size - pipe.size
        pipe.size, pipe.share = size, min(size, SHARE)

    def _rest(self, busy: bool, fullest: float, fed: int) -> None:
        """Sets when to look again, by the fullest pipe found: it should be half full when we come back."""
        self._bursts.clear()
        if not busy:
            self._loop.add_reader(self._epoll.fileno(), self._on_readable)
            return
        if not fed:  # only such as wait for room, and who has some puts them back
            self._timer = self._loop.call_later(REST, self._pass)
            return
        if fullest < 1 / 3:
            self._pause *= 2
        elif fullest > 2 / 3:
            self._pause /= 2
        self._pause = min(max(self._pause, SHORT_REST), REST + fed * REST_A_PIPE, LONG_REST)
        self._timer = self._loop.call_later(self._pause, self._pass)
