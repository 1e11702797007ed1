"""The workers' output: pipes -> records -> one file per pool, and whoever follows.

All pipes sit in an epoll of our own, edge-triggered, and the loop watches only that: what is left in a pipe wakes
nobody twice. A pass reads each ready pipe once; after a pass that found data we rest for a moment, so that many small
writers cost one wake-up for many lines, and then look again at the pipes that had some. When all are dry there is no
timer and nothing to do until the kernel sees the next byte.

Files are written through aiofiles on a thread of our own, one write in flight per file, in order. A disk that fails
never stops the reading: what cannot be written is counted (bytes of the workers' output, not of records) and said in
the log itself once there is room. A disk that is slow does stop it: when HIGH bytes of a pool wait, its pipes are left
alone until half of them are written, and its workers wait in their writes.
"""

import asyncio
import errno
import fcntl
import os
import select
import struct
import termios
from collections import Counter, deque
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import msgspec

from nssup.lines import Framer, mark, stamp
from nssup.logfile import LogFile, Outage, last_records, pick_last, timestamp

READ = 64 * 1024  # bytes per read, and so per pipe and pass: a pipe of the usual size, and what O_DIRECT packets need
REST = 0.010  # seconds between two passes, as a rule
SHORT_REST = 0.001  # the shortest that a loop's timers can do; for pipes that would fill up in REST
HIGH = 8 * 1024 * 1024  # bytes of records a pool may have waiting for its file
WRITE = 1024 * 1024  # bytes of records in one write, about
SCAN = 64 * 1024 * 1024  # bytes of a file searched for its last records
LAST = 256 * 1024  # the same, where the loop waits for it


class _Offset(msgspec.Struct):
    offset: int


_decode_offset = msgspec.json.Decoder(_Offset).decode


class Counters:
    """What was done so far, for metrics and for tests."""

    __slots__ = ("bytes_dropped", "bytes_read", "bytes_written", "passes", "reads", "writes")

    def __init__(self) -> None:
        self.passes = 0
        self.reads = 0
        self.bytes_read = 0
        self.writes = 0
        self.bytes_written = 0
        self.bytes_dropped = 0


class _Chunk(NamedTuple):
    """A batch of records of one stream, and which of its bytes they stand for. life: None for what is no worker's."""

    life: "Streams | None"
    start: int
    end: int
    records: bytes


class _Pipe:
    __slots__ = ("fd", "framer", "life")

    def __init__(self, fd: int, framer: Framer, life: "Streams") -> None:
        self.fd = fd
        self.framer = framer
        self.life = life


class Streams:
    """The output of one life: what `LogHub.attach` gives and `LogHub.drain` takes."""

    __slots__ = ("_pipes", "_pool", "generation", "host_pid", "ns_pid", "worker_id")

    def __init__(self, pool: "_Pool", worker_id: str, generation: int) -> None:
        self._pool = pool
        self._pipes: list[_Pipe] = []
        self.worker_id = worker_id
        self.generation = generation
        self.host_pid: int | None = None
        self.ns_pid: int | None = None

    def identify(self, host_pid: int, ns_pid: int) -> None:
        """The worker's PIDs are known: records say them from now on, null before."""
        self.host_pid = host_pid
        self.ns_pid = ns_pid


class _Pool:
    """One log: of a pool of workers, or of nssup itself."""

    def __init__(self, name: str, file: "LogFile | None") -> None:
        self.name = name
        self.file = file
        self.lock = asyncio.Lock()  # held while a write is in flight
        self.waiting: deque[_Chunk] = deque()
        self.in_flight: list[_Chunk] = []
        self.size = 0  # bytes of records in both
        self.taken = 0  # bytes of records ever taken in
        self.settled = 0  # of these: written, or tried
        self.last_ts = ""
        self.lives: set[Streams] = set()
        self.blocked: dict[_Pipe, None] | None = None  # pipes left alone because too much waits
        self.outage: Outage | None = None
        self.dropped: Counter[str] = Counter()
        self.dirty = False
        self.closing = False

    def take(self) -> list[_Chunk]:
        """The next chunks to write, in order."""
        size = 0
        while self.waiting and size < WRITE:
            chunk = self.waiting.popleft()
            size += len(chunk.records)
            self.in_flight.append(chunk)
        return self.in_flight


class Follower:
    """Records as they come: iterate over it for chunks of whole records, and close it.

    Who does not read is cut: beyond max_bytes nothing is kept for him; when he reads again, a mark of nssup's (stream
    `nssup`) stands where the records are missing. Iteration ends when either side closes.
    """

    def __init__(self, hub: "LogHub", pools: frozenset[str] | None, workers: Container[str] | None, limit: int) -> None:
        self._hub = hub
        self._pools = pools
        self._workers = workers
        self._limit = limit
        self._chunks: deque[bytes] = deque()
        self._size = 0
        self._cut = 0  # bytes of records that could not be kept after _chunks
        self._cut_ts = ""
        self._closed = False
        self._reader: asyncio.Future[None] | None = None
        self.missed = 0  # bytes of records cut so far

    def _offer(self, pool: str, life: Streams | None, records: bytes) -> None:
        if (life is None) if self._pools is None else (pool not in self._pools):
            return
        if self._workers is not None and (life is None or life.worker_id not in self._workers):
            return
        if self._chunks and self._size + len(records) > self._limit:
            self._cut += len(records)
            self.missed += len(records)
            self._cut_ts = timestamp(records)
            return
        self._mark_cut()
        self._chunks.append(records)
        self._size += len(records)
        self._wake()

    def _mark_cut(self) -> None:
        if self._cut:
            self._chunks.append(
                mark(self._cut_ts, None, None, f"{self._cut} bytes of log skipped: the reader is too slow")
            )
            self._size += len(self._chunks[-1])
            self._cut = 0

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def close(self) -> None:
        """Ends the iteration once what is here was read. May be called more than once."""
        self._closed = True
        self._hub._followers.discard(self)
        self._wake()

    def __aiter__(self) -> "Follower":
        return self

    async def __anext__(self) -> bytes:
        while True:
            if not self._chunks:
                self._mark_cut()
            if self._chunks:
                records = self._chunks.popleft()
                self._size -= len(records)
                return records
            if self._closed:
                raise StopAsyncIteration
            self._reader = self._hub._loop.create_future()
            await self._reader


class LogHub:
    """All logs of one supervisor. Lives on its loop's thread.

    `run` must be running (in a task group) for anything to be written by itself; `flush` and `close` write in any case.
    log_dir None: no files, records go to followers only. wall: wall clock seconds since 1970. on_error(log, errno,
    bytes): a file cannot be written, and so many bytes of output are lost already; said once until writing works again.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        log_dir: Path | None,
        wall: Callable[[], float],
        on_error: Callable[[str, int, int], None] = lambda log, number, lost: None,
    ) -> None:
        self.counters = Counters()
        self._loop = loop
        self._log_dir = log_dir
        self._wall = wall
        self._on_error = on_error
        self._pools: dict[str, _Pool] = {}
        self._pipes: dict[int, _Pipe] = {}
        self._followers: set[Follower] = set()
        self._ready: dict[_Pipe, None] = {}  # pipes that had data, or may have, in the order they will be read
        self._epoll = select.epoll()
        self._timer: asyncio.Handle | None = None
        self._pause = REST
        self._dirty: deque[_Pool] = deque()
        self._work = asyncio.Event()
        self._writing: ThreadPoolExecutor | None = None
        self._reading: ThreadPoolExecutor | None = None
        self._closed = False
        loop.add_reader(self._epoll.fileno(), self._on_readable)

    # --- logs and streams ----------------------------------------------------------------------------------------

    def open_pool(self, name: str) -> None:
        """Opens the log of a pool, LOG_DIR/NAME.jsonl. Opening it again does nothing.

        Raises OSError where the file cannot be opened. The log is open all the same: until the file can be, its records
        go to followers only and are counted as dropped.
        """
        pool = self._pools.get(name)
        if pool is not None:
            pool.closing = False
            return
        pool = self._pools[name] = _Pool(name, None)
        if self._log_dir is None:
            return
        pool.file = LogFile(self._log_dir / f"{name}.jsonl", self._loop, self._writer)
        pool.file.open()
        pool.last_ts = pool.file.last_ts

    def close_pool(self, name: str) -> None:
        """Drains what is still attached, and closes the file when all is written. Raises KeyError."""
        pool = self._pools[name]
        for life in list(pool.lives):
            self.drain(life)
        if pool.file is None:
            del self._pools[name]
            return
        pool.closing = True
        self._mark_dirty(pool)

    def attach(
        self, pool: str, worker_id: str, generation: int, stdout_fd: int, stderr_fd: int | None = None
    ) -> Streams:
        """Takes the read ends of a life's pipes, and closes them when their time comes. Raises KeyError: no such log.

        stderr_fd None: stderr goes into the same pipe, and all records say `stdout`.
        """
        life = Streams(self._pools[pool], worker_id, generation)
        self._attach(life, stdout_fd, "stdout")
        if stderr_fd is not None:
            self._attach(life, stderr_fd, "stderr")
        life._pool.lives.add(life)
        return life

    def _attach(self, life: Streams, fd: int, stream: str) -> None:
        os.set_blocking(fd, False)
        pipe = _Pipe(fd, Framer(life.worker_id, life.generation, stream), life)
        self._epoll.register(fd, select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET)
        self._pipes[fd] = pipe
        life._pipes.append(pipe)

    def drain(self, life: Streams) -> None:
        """Reads what is in the pipes of a life that is over, ends its streams and closes its fds.

        Not more than is in them now: an end held by somebody outside must not hold us. May be called more than once.
        """
        now = stamp(self._wall())
        for pipe in list(life._pipes):
            left = _bytes_in(pipe.fd)
            while left > 0 and (got := self._read(pipe, now)):
                left -= got
            self._end(pipe, now)
        life._pool.lives.discard(life)

    def append(self, log: str, records: bytes) -> None:
        """Takes ready-made records, whole lines that begin with their `ts`, into an open log. Raises KeyError."""
        self._take(self._pools[log], _Chunk(None, 0, len(records), records))

    @property
    def has_files(self) -> bool:
        """Whether logs are written, and can be read back."""
        return self._log_dir is not None

    def last_ts(self, log: str) -> str:
        """The `ts` that no later record of an open log may be before; empty if there is none. Raises KeyError."""
        return self._pools[log].last_ts

    def dropped_bytes(self, log: str, worker_id: str | None = None) -> int:
        """How much of a pool's or a worker's output could not be written so far. Raises KeyError."""
        dropped = self._pools[log].dropped
        return dropped.total() if worker_id is None else dropped[worker_id]

    # --- reading the pipes ---------------------------------------------------------------------------------------

    def _on_readable(self) -> None:
        self._loop.remove_reader(self._epoll.fileno())
        self._pass()

    def _pass(self) -> None:
        """Reads each pipe that has data, or may have, once."""
        self._timer = None
        self.counters.passes += 1
        for fd, _ in self._epoll.poll(0, max(len(self._pipes), 1)):
            self._ready[self._pipes[fd]] = None
        now = stamp(self._wall())
        ready, self._ready = self._ready, {}
        most = 0
        busy = False
        for pipe in ready:
            blocked = pipe.life._pool.blocked
            if blocked is not None:
                blocked[pipe] = None
                busy = True
            elif got := self._read(pipe, now):
                # Not read until it is dry, which would be a second call each time: the next pass will see.
                self._ready[pipe] = None
                busy = True
                most = max(most, got)
        self._rest(busy, most)

    def _rest(self, busy: bool, most: int) -> None:
        """Sets when to look again, by the fullest pipe found: it should be half full when we come back."""
        if not busy:
            self._loop.add_reader(self._epoll.fileno(), self._on_readable)
            return
        if most < READ // 3:
            self._pause = min(max(self._pause * 2, SHORT_REST), REST)
        elif most > READ * 2 // 3:
            self._pause = self._pause / 2 if self._pause > SHORT_REST else 0.0
        if self._pause:
            self._timer = self._loop.call_later(self._pause, self._pass)
        else:
            self._timer = self._loop.call_soon(self._pass)

    def _look_again(self) -> None:
        """Pipes were put back into the ready list: see to it that a pass comes."""
        if self._timer is None and not self._closed:
            self._loop.remove_reader(self._epoll.fileno())
            self._timer = self._loop.call_soon(self._pass)

    def _read(self, pipe: _Pipe, now: str) -> int:
        """One read. How many bytes; 0 where there are none now, or no more will come (then the pipe is closed)."""
        self.counters.reads += 1
        try:
            data = os.read(pipe.fd, READ)
        except BlockingIOError:
            return 0
        except OSError:  # EIO: the other side of a pty is gone
            data = b""
        if not data:
            self._end(pipe, now)
            return 0
        self.counters.bytes_read += len(data)
        life = pipe.life
        start = pipe.framer.offset
        records = pipe.framer.feed(data, self._ts(life._pool, now), life.host_pid, life.ns_pid)
        if records:
            self._take(life._pool, _Chunk(life, start, pipe.framer.offset, records))
        return len(data)

    def _end(self, pipe: _Pipe, now: str) -> None:
        if pipe not in pipe.life._pipes:
            return
        life = pipe.life
        life._pipes.remove(pipe)
        self._ready.pop(pipe, None)
        if life._pool.blocked is not None:
            life._pool.blocked.pop(pipe, None)
        # init holds the same pipe, so closing alone would leave it in the epoll.
        self._epoll.unregister(pipe.fd)
        del self._pipes[pipe.fd]
        os.close(pipe.fd)
        start = pipe.framer.offset
        records = pipe.framer.end(self._ts(life._pool, now), life.host_pid, life.ns_pid)
        if records:
            self._take(life._pool, _Chunk(life, start, pipe.framer.offset, records))

    def _ts(self, pool: _Pool, now: str) -> str:
        """now, but never before what the log says already."""
        if now > pool.last_ts:
            pool.last_ts = now
        return pool.last_ts

    def _take(self, pool: _Pool, chunk: _Chunk) -> None:
        for follower in tuple(self._followers):
            follower._offer(pool.name, chunk.life, chunk.records)
        if pool.file is None:
            return
        pool.waiting.append(chunk)
        pool.size += len(chunk.records)
        pool.taken += len(chunk.records)
        if pool.size > HIGH and pool.blocked is None:
            pool.blocked = {}
        self._mark_dirty(pool)

    # --- writing -------------------------------------------------------------------------------------------------

    def _writer(self) -> ThreadPoolExecutor:
        if self._writing is None:
            self._writing = ThreadPoolExecutor(1, "nssup-log-writer")
        return self._writing

    def _mark_dirty(self, pool: _Pool) -> None:
        if not pool.dirty:
            pool.dirty = True
            self._dirty.append(pool)
            self._work.set()

    async def run(self) -> None:
        """Writes what comes in, until `close`. Cancelling it loses nothing that `close` does not write later."""
        while not self._closed:
            await self._work.wait()
            self._work.clear()
            while self._dirty:
                pool = self._dirty.popleft()
                pool.dirty = False
                await asyncio.shield(self._write(pool))
                if pool.waiting:
                    self._mark_dirty(pool)

    async def _write(self, pool: _Pool) -> None:
        """Writes a batch of pool's log, after the one in flight if there is one. Run it shielded: it must not be
        cancelled half-way, when nobody knows what is in the file."""
        async with pool.lock:
            file = pool.file
            if file is None:
                return
            last = pool.closing and not pool.waiting
            if pool.waiting or (last and pool.outage):
                await self._write_batch(pool, file)
            if last and pool.closing and not pool.waiting:
                del self._pools[pool.name]
                pool.file = None
                await file.close()

    async def _write_batch(self, pool: _Pool, file: LogFile) -> None:
        batch = pool.take()
        data = b"".join([chunk.records for chunk in batch])
        marks = pool.outage.marks(timestamp(data) if data else pool.last_ts) if pool.outage else b""
        kept, error = await file.append(marks + data)
        pool.last_ts = max(pool.last_ts, file.last_ts)  # of a file that could be opened only now
        self.counters.writes += 1
        self.counters.bytes_written += kept
        if pool.outage:
            pool.outage.forget(marks[:kept].count(b"\n"))
        self._settle(pool, max(kept - len(marks), 0), error)

    def _settle(self, pool: _Pool, kept: int, error: OSError | None) -> None:
        """The write in flight is over, and its first kept bytes are in the file."""
        batch, pool.in_flight = pool.in_flight, []
        size = sum([len(chunk.records) for chunk in batch])
        pool.size -= size
        pool.settled += size
        if error is None:
            pool.outage = None
        else:
            self._drop(pool, batch, kept, error.errno or errno.EIO)
        if pool.blocked is not None and pool.size <= HIGH // 2:
            self._ready.update(pool.blocked)
            pool.blocked = None
            self._look_again()

    def _drop(self, pool: _Pool, batch: list[_Chunk], kept: int, number: int) -> None:
        """Counts what of batch is not among its first kept bytes."""
        first = pool.outage is None
        outage = pool.outage = pool.outage or Outage(number)
        dropped = 0
        for chunk in batch:
            if kept < len(chunk.records):
                lost = chunk.end - _start(chunk, kept)
                dropped += lost
                life = chunk.life
                outage.missing[(life.worker_id, life.generation) if life else (None, None)] += lost
                pool.dropped[life.worker_id if life else ""] += lost
            kept = max(kept - len(chunk.records), 0)
        self.counters.bytes_dropped += dropped
        if first:
            self._on_error(pool.name, number, dropped)

    async def flush(self) -> None:
        """Returns when everything taken in before was written, or tried."""
        for pool in list(self._pools.values()):
            target = pool.taken
            while pool.settled < target:
                await asyncio.shield(self._write(pool))

    async def close(self) -> None:
        """Drains what is still attached, writes everything, closes files and followers, ends the threads."""
        if self._closed:
            return
        for name in list(self._pools):
            self.close_pool(name)
        self._closed = True
        self._work.set()
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()
        while self._pools:
            await asyncio.shield(self._write(next(iter(self._pools.values()))))
        for follower in list(self._followers):
            follower.close()
        for executor in (self._writing, self._reading):
            if executor is not None:
                executor.shutdown()

    # --- giving out ----------------------------------------------------------------------------------------------

    def follow(
        self, pools: Iterable[str] | None = None, *, workers: Container[str] | None = None, max_bytes: int = 1 << 20
    ) -> Follower:
        """Records from now on: of these logs (None: of all pools of workers), of these worker ids (None: of all).

        With `await tail(...)` called right after, without an await in between, no record is in both and none is in
        neither.
        """
        follower = Follower(self, None if pools is None else frozenset(pools), workers, max_bytes)
        if self._closed:
            follower.close()
        else:
            self._followers.add(follower)
        return follower

    async def tail(self, log: str, n: int, workers: Container[str] | None = None) -> list[bytes]:
        """The last n records (newlines included) of a log as it is at the call, of these worker ids (None: of all).

        Records still to be written are among them. Looks at the last SCAN bytes of the file at most. A log that is not
        open has none.
        """
        pool = self._pools.get(log)
        if pool is None or pool.file is None:
            return []
        recent = pick_last(_unwritten(pool), n, workers)
        if len(recent) == n:
            return recent
        if self._reading is None:
            self._reading = ThreadPoolExecutor(1, "nssup-log-reader")
        file = pool.file
        older = await self._loop.run_in_executor(
            self._reading, last_records, file.path, file.size, n - len(recent), workers, SCAN
        )
        return older + recent

    def last_records(self, worker_id: str, n: int) -> list[bytes]:
        """The last n records of one worker, at once: the loop waits, so only the last LAST bytes of its file count."""
        pool = self._pools.get(worker_id.partition("/")[0])
        if pool is None or pool.file is None:
            return []
        workers = (worker_id,)
        recent = pick_last(_unwritten(pool), n, workers)
        return last_records(pool.file.path, pool.file.size, n - len(recent), workers, LAST) + recent


def _bytes_in(fd: int) -> int:
    """How many bytes wait in a pipe."""
    answer = fcntl.ioctl(fd, termios.FIONREAD, bytes(4))
    waiting: int = struct.unpack("i", answer)[0]
    return waiting


def _start(chunk: _Chunk, kept: int) -> int:
    """Where in its stream the part of chunk begins that comes after its first kept bytes, which are whole records."""
    if not kept:
        return chunk.start
    if chunk.life is None:
        return kept
    return _decode_offset(chunk.records[kept : chunk.records.index(b"\n", kept)]).offset


def _unwritten(pool: _Pool) -> Iterator[bytes]:
    """The records that are not in the file yet, the last first."""
    for chunks in (pool.waiting, pool.in_flight):
        for chunk in reversed(chunks):
            yield from reversed(chunk.records.split(b"\n")[:-1])
