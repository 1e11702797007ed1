"""The ends of a program's stdin, stdout and stderr that are ours: bounded, with back-pressure, on a Watch.

A pipe is read when it is readable and written when it has room; nothing here waits, polls or owns a task. Source:
pipe(7).
"""

import asyncio
import os
import select
from abc import ABC, abstractmethod
from collections import deque

from nssup.watch import Watch

CHUNK = 64 * 1024  # what a pipe holds, unless its program made it larger
LARGEST_PIPE = 1 << 20  # fs.pipe-max-size, which only root may go beyond


class Sink(ABC):
    """Where a ReadEnd puts what it reads."""

    __slots__ = ()

    @abstractmethod
    def take(self, data: bytes) -> None:
        """The next bytes."""

    @abstractmethod
    def end(self) -> None:
        """There will be no more."""


class Capture(Sink):
    """Keeps the first `limit` bytes and counts the others."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._chunks: list[bytes] = []
        self._room = limit
        self.dropped = 0

    def take(self, data: bytes) -> None:
        kept = data if len(data) <= self._room else data[: self._room]
        if kept:
            self._chunks.append(kept)
            self._room -= len(kept)
        self.dropped += len(data) - len(kept)

    def end(self) -> None:
        """There is nothing to be told: whoever asks for the bytes knows that all are here."""

    def data(self) -> bytes:
        return b"".join(self._chunks)


class _Reading(asyncio.ReadTransport):
    """What a StreamReader needs to hold its pipe back."""

    def __init__(self, pipe: "ReadEnd") -> None:
        super().__init__()
        self._pipe = pipe

    def pause_reading(self) -> None:
        self._pipe.pause()

    def resume_reading(self) -> None:
        self._pipe.resume()


class Stream(Sink):
    """Passes on to an asyncio.StreamReader, which holds the pipe back while twice its limit waits to be read."""

    def __init__(self, loop: asyncio.AbstractEventLoop, limit: int) -> None:
        self.reader = asyncio.StreamReader(limit, loop)

    def connect(self, pipe: "ReadEnd") -> None:
        self.reader.set_transport(_Reading(pipe))

    def take(self, data: bytes) -> None:
        self.reader.feed_data(data)

    def end(self) -> None:
        self.reader.feed_eof()


class ReadEnd:
    """Our end of the program's stdout or stderr. Owns fd, which must be non-blocking."""

    def __init__(self, watch: Watch, fd: int, sink: Sink) -> None:
        self._watch = watch
        self._fd = fd
        self._sink = sink
        self._watched = False
        self.resume()

    def pause(self) -> None:
        if self._watched:
            self._watched = False
            self._watch.remove(self._fd)

    def resume(self) -> None:
        if self._fd >= 0 and not self._watched:
            self._watched = True
            self._watch.add(self._fd, self._on_readable)

    def _on_readable(self) -> None:
        self._read()

    def _read(self) -> bool:
        """Whether there may be more."""
        if self._fd < 0:
            return False
        try:
            data = os.read(self._fd, CHUNK)
        except BlockingIOError:
            return False
        if not data:
            self.close()
            return False
        self._sink.take(data)
        return True

    def finish(self) -> None:
        """Nobody writes any more: take what the pipe holds, however slow the reader is, and end.

        Not until EOF: who is outside may have been given the other end, and go on writing.
        """
        for _ in range(LARGEST_PIPE // CHUNK):
            if not self._read():
                break
        self.close()

    def close(self) -> None:
        """The end, as the reader sees it. May be called again."""
        if self._fd >= 0:
            self.pause()
            self.abandon()
            self._sink.end()

    def abandon(self) -> None:
        """Close the descriptor and nothing else: in a forked child, whose epoll is its parent's."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class Writer:
    """Our end of the program's stdin. What the pipe does not take at once is kept until it does: `drain` waits for it.

    When the program has closed its stdin, or is gone, what is written goes nowhere and `drain` raises BrokenPipeError.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, watch: Watch, fd: int) -> None:
        """fd: ours from here on, non-blocking."""
        self._loop = loop
        self._watch = watch
        self._fd = fd
        self._waiting: deque[memoryview] = deque()
        self._watched = False
        self._closing = False
        self._broken = False
        self._drained: list[asyncio.Future[None]] = []

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Never blocks. Raises RuntimeError after `close`."""
        if self._broken:
            return
        if self._closing:
            raise RuntimeError("stdin is closed")
        view = memoryview(bytes(data) if isinstance(data, bytearray) else data).cast("B")
        if not view:
            return
        self._waiting.append(view)
        if not self._watched:
            self._on_writable()

    async def drain(self) -> None:
        """Until the pipe has taken all that was written. Raises BrokenPipeError: nobody will read it."""
        while self._waiting and not self._broken:
            waiter: asyncio.Future[None] = self._loop.create_future()
            self._drained.append(waiter)
            await waiter
        if self._broken:
            raise BrokenPipeError("the program has closed its stdin")

    def close(self) -> None:
        """EOF for the program, behind all that was written. May be called again."""
        self._closing = True
        if not self._waiting:
            self.abort()

    def is_closing(self) -> bool:
        return self._closing

    def _on_writable(self) -> None:
        try:
            while self._waiting and self._fd >= 0:
                view = self._waiting[0]
                written = os.write(self._fd, view)
                if written < len(view):
                    self._waiting[0] = view[written:]
                else:
                    self._waiting.popleft()
        except BlockingIOError:
            if not self._watched:
                self._watched = True
                self._watch.add(self._fd, self._on_writable, select.EPOLLOUT)
            return
        except BrokenPipeError:
            self._broken = True
            self.abort()
            return
        self._rest()
        if self._closing:
            self.abort()

    def _rest(self) -> None:
        if self._watched:
            self._watched = False
            self._watch.remove(self._fd)
        waiters, self._drained = self._drained, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def abort(self) -> None:
        """Close at once; what the pipe has not taken is dropped. May be called again."""
        self._closing = True
        self._broken = self._broken or bool(self._waiting)
        self._waiting.clear()
        self._rest()
        self.abandon()

    def abandon(self) -> None:
        """As ReadEnd's."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
