"""Readiness of many descriptors through one epoll that the event loop watches: pidfds and lines.

One registration with the loop instead of thousands: cheaper, the same on asyncio and uvloop, and uvloop never touches a
pidfd (its add_reader would set O_NONBLOCK, which on a pidfd makes waitid(2) fail with EAGAIN).
Source: epoll(7), pidfd_open(2).
"""

import asyncio
import select
from collections.abc import Callable

_BATCH = 256


class Watch:
    """Calls back when a descriptor is readable (or has what else it was added for), until it is removed.

    Level-triggered, and a call can be spurious: a descriptor that a callback closed may be some other file by the time
    its turn comes in the same batch. So callbacks never block and take "nothing there" for an answer.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[], None]] = {}
        loop.add_reader(self._epoll.fileno(), self.poll)

    def add(self, fd: int, callback: Callable[[], None], events: int = select.EPOLLIN) -> None:
        self._epoll.register(fd, events)
        self._callbacks[fd] = callback

    def remove(self, fd: int) -> None:
        """Before the descriptor is closed, always: a clone's child may hold a copy for a moment, and the epoll would
        go on reporting the closed number."""
        if self._callbacks.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def poll_all(self) -> None:
        """Call back for everything that is readable now."""
        for _ in range(len(self._callbacks) // _BATCH + 1):
            self.poll()

    def poll(self) -> None:
        """Call back for what is readable now, up to a bound."""
        for fd, _ in self._epoll.poll(0, _BATCH):
            callback = self._callbacks.get(fd)
            if callback is not None:
                callback()

    def close(self) -> None:
        self._loop.remove_reader(self._epoll.fileno())
        self.abandon()

    def abandon(self) -> None:
        """As close, where the loop is closed already, or another process's: that of a forked child's parent."""
        self._callbacks.clear()
        self._epoll.close()
