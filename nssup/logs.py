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
import math
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

from nssup.errors import no_thread
from nssup.follower import Follower
from nssup.handover import Layout, StagingError
from nssup.lines import Framer, seconds, stamp
from nssup.logfile import LogFile, Outage, last_records, pick_last, timestamp
from nssup.staging import Batch, Full, Staging, finish

READ = 64 * 1024  # bytes per read, and so per pipe and pass: a pipe of the usual size, and what O_DIRECT packets need
REST = 0.010  # seconds between two passes, as a rule
SHORT_REST = 0.001  # the shortest that a loop's timers can do; for pipes that would fill up in REST
HIGH = 8 * 1024 * 1024  # bytes of records a pool may have waiting for its file
WRITE = 1024 * 1024  # bytes of records in one write, about
SCAN = 64 * 1024 * 1024  # bytes of a file searched for its last records
LAST = 256 * 1024  # the same, where the loop waits for it
RECENT = 16 * 1024  # bytes of records of a worker that are remembered where there is no file
# Of one staging memory. Half as many bytes of empty lines are still no more than some 40 MB of records.
LAYOUT = Layout(streams=256, half=256 * 1024)
STREAMS = ("stdout", "stderr")
NOT_NOW = -1


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
    """One read end. Its bytes are framed at once by framer, or moved into staging as stream `number`.

    left: of a life that is over, how many bytes are still to be taken.
    """

    __slots__ = ("fd", "framer", "kind", "left", "life", "number", "staging")

    def __init__(
        self, fd: int, life: "Streams", kind: int, framer: Framer, staging: Staging | None, number: int
    ) -> None:
        self.fd = fd
        self.life = life
        self.kind = kind
        self.framer = framer
        self.staging = staging
        self.number = number
        self.left: int | None = None


class Passed(NamedTuple):
    """A stream that somebody else reads on. fd: -1 when it is at its end. offset: bytes of it that are in records."""

    fd: int = -1
    offset: int = 0


class Streams:
    """The output of one life: what `LogHub.attach` gives and `LogHub.drain` takes."""

    __slots__ = ("_drained", "_pipes", "_pool", "_staged", "generation", "host_pid", "ns_pid", "worker_id")

    def __init__(self, pool: "_Pool", worker_id: str, generation: int) -> None:
        self._pool = pool
        self._pipes: list[_Pipe] = []
        self._staged: set[tuple[Staging, int]] = set()  # streams that are not in the log to their end
        self._drained: Callable[[], None] | None = None  # called when all of them are
        self.worker_id = worker_id
        self.generation = generation
        self.host_pid: int | None = None
        self.ns_pid: int | None = None

    def identify(self, host_pid: int, ns_pid: int) -> None:
        """The worker's PIDs are known: records say them from now on, null before."""
        self.host_pid = host_pid
        self.ns_pid = ns_pid
        for staging, number in self._staged:
            if not staging.streams[number].state.host_pid:
                staging.identify(number, host_pid, ns_pid)


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
        self.staged = False
        self.stagings: list[Staging] = []
        self.owners: dict[tuple[Staging, int], Streams] = {}
        self.ending: set[tuple[Staging, int]] = set()  # streams whose end is staged and not yet in the log
        self.endless: set[tuple[Staging, int]] = set()  # streams without a writer whose end found no room yet
        self.places: dict[tuple[str, int], Staging] = {}  # of lives that are launched and not attached yet
        self.reserved: Counter[Staging] = Counter()
        self.last_wall = 0.0
        self.recent: dict[str, bytes] = {}  # worker id -> its last records, where there is no file to read them from

    def keep(self, chunk: _Chunk) -> None:
        """For last_records, where there is no file."""
        if chunk.life is not None:
            records = self.recent.get(chunk.life.worker_id, b"") + chunk.records
            if len(records) > RECENT:
                records = records[records.find(b"\n", len(records) - RECENT) + 1 :]
            self.recent[chunk.life.worker_id] = records

    def wall(self, now: float) -> float:
        """now, but never before what is staged or in the log already."""
        self.last_wall = max(self.last_wall, now)
        return self.last_wall

    def take(self, most: float = WRITE) -> list[_Chunk]:
        """The next chunks to write, in order."""
        size = 0
        while self.waiting and size < most:
            chunk = self.waiting.popleft()
            size += len(chunk.records)
            self.in_flight.append(chunk)
        return self.in_flight


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

    def open_pool(self, name: str, *, staged: bool = False, found: Iterable[int] = ()) -> None:
        """Opens the log of a pool, LOG_DIR/NAME.jsonl. Opening it again does nothing.

        staged: its output goes through staging memory, so that none of it is lost or doubled when this process is
        killed. found: descriptors of such memory that inits of the pool kept, taken over; what a dead supervisor had
        begun to write is brought to its end first.
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
        path = self._log_dir / f"{name}.jsonl"
        pool.staged = staged
        for fd in found:
            self._take_over(pool, fd, path)
        pool.file = LogFile(path, self._loop, self._writer)
        pool.file.open()
        pool.last_ts = pool.file.last_ts
        pool.wall(seconds(pool.last_ts) if pool.last_ts else 0.0)

    def _take_over(self, pool: _Pool, fd: int, path: Path) -> None:
        try:
            if any(os.path.sameopenfile(staging.fd, fd) for staging in pool.stagings):
                os.close(fd)
                return
            staging = Staging(fd)
        except (OSError, StagingError):
            os.close(fd)
            self._on_error(pool.name, errno.EBADMSG, 0)  # what is in there nobody can tell
            return
        pool.stagings.append(staging)
        finished = finish(staging, path)
        pool.wall(staging.latest)
        if finished is not None and finished.lost:
            pool.outage = pool.outage or Outage(finished.errno)
            for number, lost in finished.lost.items():
                self._count_lost(pool, self._owner(pool, staging, number), lost)
            self._on_error(pool.name, finished.errno, sum(finished.lost.values()))

    def place(self, name: str, worker_id: str, generation: int) -> Staging | None:
        """Where the output of a new life of a pool is to be staged: its init keeps the descriptor. None: nowhere.

        The room is the life's until it is attached, or given back. Raises OSError.
        """
        pool = self._pools[name]
        if not pool.staged:
            return None
        for staging in pool.stagings:
            if len(staging.streams) + len(STREAMS) * (1 + pool.reserved[staging]) <= staging.layout.streams:
                break
        else:
            staging = Staging.create(name, LAYOUT)
            pool.stagings.append(staging)
        pool.places[worker_id, generation] = staging
        pool.reserved[staging] += 1
        return staging

    def give_back(self, name: str, worker_id: str, generation: int) -> None:
        """The life that a place was for has come to nothing."""
        pool = self._pools[name]
        staging = pool.places.pop((worker_id, generation), None)
        if staging is not None:
            pool.reserved[staging] -= 1

    def placed(self, name: str, fd: int) -> Staging | None:
        """The staging memory that fd, which is closed, is a copy of; None: not one of this pool's."""
        try:
            for staging in self._pools[name].stagings:
                if os.path.sameopenfile(staging.fd, fd):
                    return staging
        finally:
            os.close(fd)
        return None

    def is_staged(self, staging: Staging | None, worker_id: str, generation: int) -> bool:
        """Whether output of that life may have been taken: then its streams have its PIDs."""
        if staging is None:
            return False
        index = int(worker_id.partition("/")[2])
        numbers = [staging.find(index, generation, kind) for kind in range(len(STREAMS))]
        return any(number >= 0 and staging.streams[number].state.host_pid for number in numbers)

    def settle(self, name: str, lives: Container[tuple[str, int]]) -> None:
        """What was staged of the pool's lives that are not among these, by worker id and generation, has no writer."""
        pool = self._pools[name]
        for staging in pool.stagings:
            for number, stream in staging.streams.items():
                if (f"{name}/{stream.state.worker}", stream.state.generation) in lives:
                    continue
                self._owner(pool, staging, number)
                pool.endless.add((staging, number))
        self._end_endless(pool)

    def _end_endless(self, pool: _Pool) -> None:
        """As many of them as there is room for; the others when there is more."""
        for staging, number in tuple(pool.endless):
            try:
                self._end_staged(pool, staging, number)
            except Full:
                self._mark_dirty(pool)
                return
            pool.endless.discard((staging, number))

    def _owner(self, pool: _Pool, staging: Staging, number: int) -> Streams:
        """Whose stream that is, also where its life is gone."""
        life = pool.owners.get((staging, number))
        if life is None:
            state = staging.streams[number].state
            life = Streams(pool, f"{pool.name}/{state.worker}", state.generation)
            self._own(life, staging, number)
        return life

    def _own(self, life: Streams, staging: Staging, number: int) -> None:
        life._staged.add((staging, number))
        life._pool.owners[staging, number] = life

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
        self,
        pool: str,
        worker_id: str,
        generation: int,
        stdout_fd: int | None,
        stderr_fd: int | None = None,
        staging: Staging | None = None,
        offsets: tuple[int, int] = (0, 0),
    ) -> Streams:
        """Takes the read ends of a life's pipes, and closes them when their time comes. Raises KeyError: no such log.

        stderr_fd None: stderr goes into the same pipe, and all records say `stdout`. staging: what `place` gave for
        this life, or what its init kept (`placed`): then its streams go on where they stood. offsets: where streams
        without staging stand, which `pass_on` told.
        """
        life = Streams(self._pools[pool], worker_id, generation)
        self.give_back(pool, worker_id, generation)
        for kind, fd in enumerate((stdout_fd, stderr_fd)):
            if fd is not None:
                self._attach(life, fd, kind, staging, offsets[kind])
        life._pool.lives.add(life)
        return life

    def _attach(self, life: Streams, fd: int, kind: int, staging: Staging | None, offset: int) -> None:
        os.set_blocking(fd, False)
        number = -1
        if staging is not None:
            index = int(life.worker_id.partition("/")[2])
            number = staging.find(index, life.generation, kind)
            if number < 0:
                number = staging.attach(index, life.generation, kind)
            self._own(life, staging, number)
            if staging.streams[number].ending:
                life._pool.ending.add((staging, number))
                self._mark_dirty(life._pool)  # whoever ended it may have died before all of it was written, or after
                os.close(fd)
                return
        framer = Framer(life.worker_id, life.generation, STREAMS[kind])
        framer.offset = offset
        pipe = _Pipe(fd, life, kind, framer, staging, number)
        self._epoll.register(fd, select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET)
        self._pipes[fd] = pipe
        life._pipes.append(pipe)

    def drain(self, life: Streams, done: Callable[[], None] | None = None) -> None:
        """Reads what is in the pipes of a life that is over, ends its streams and closes its fds.

        Not more than is in them now: an end held by somebody outside must not hold us. done: called when all of it is
        where the death of this process cannot reach it. May be called more than once; only the first `done` counts.
        """
        if done is not None and life._drained is None:
            life._drained = done
        wall = self._wall()
        for pipe in list(life._pipes):
            pipe.left = _bytes_in(pipe.fd)
            got = 1
            while pipe.left > 0 and got > 0:
                got = self._read(pipe, wall)
            if got == NOT_NOW:
                self._ready[pipe] = None
                self._look_again()
            elif pipe in life._pipes and pipe not in (life._pool.blocked or ()):
                self._end(pipe, wall)
        life._pool.lives.discard(life)
        self._tell_drained(life)

    def _tell_drained(self, life: Streams) -> None:
        if life._drained is not None and not life._pipes and not life._staged:
            done, life._drained = life._drained, _nothing
            done()

    def detach(self, life: Streams) -> None:
        """Lets go of a life's pipes, as if this process had died: the next supervisor reads on where we stopped."""
        for pipe in list(life._pipes):
            self._forget(pipe)
        life._pool.lives.discard(life)

    def pass_on(self, life: Streams) -> tuple[Passed, Passed]:
        """Lets go of a life's pipes, and gives copies of stdout's and stderr's to the caller, for whoever reads on.

        Part of a line is a record of its own then. Raises OSError.
        """
        passed = [Passed(), Passed()]
        wall = self._wall()
        for pipe in list(life._pipes):
            fd = os.dup(pipe.fd)
            if pipe.staging is None:
                self._end(pipe, wall)
            else:
                self._forget(pipe)
            passed[pipe.kind] = Passed(fd, pipe.framer.offset)
        life._pool.lives.discard(life)
        return passed[0], passed[1]

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
        wall = self._wall()
        ready, self._ready = self._ready, {}
        most = 0
        busy = False
        try:
            while ready:
                pipe = next(iter(ready))
                del ready[pipe]
                blocked = pipe.life._pool.blocked
                if blocked is not None:
                    blocked[pipe] = None
                    busy = True
                elif got := self._read(pipe, wall):
                    busy = True
                    most = max(most, got)
                    if pipe.fd >= 0:
                        # Not read until it is dry, which would be a second call each time: the next pass will see.
                        self._ready[pipe] = None
        finally:
            self._ready.update(ready)  # whatever went wrong with one pipe, the others are seen to
            self._rest(busy or bool(ready), most)

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

    def _read(self, pipe: _Pipe, wall: float) -> int:
        """One read. How many bytes; 0 where there are none now, or no more will come (then the pipe is closed); NOT_NOW
        where it has to be tried again."""
        self.counters.reads += 1
        try:
            got = self._take_from(pipe, wall)
        except BlockingIOError:
            return 0
        except Full:
            self._wait_for_room(pipe)
            return 0
        except OSError as error:
            if error.errno != errno.EIO:  # which says that the other side of a pty is gone
                return NOT_NOW  # no memory: the worker waits in its writes, and loses nothing
            got = 0
        self.counters.bytes_read += got
        if pipe.left is not None:
            pipe.left -= got
        if not got or (pipe.left is not None and pipe.left <= 0):
            self._end(pipe, wall)
        return got

    def _take_from(self, pipe: _Pipe, wall: float) -> int:
        """Raises BlockingIOError, Full, OSError. 0: no more will come."""
        life = pipe.life
        if pipe.staging is not None:
            moved = pipe.staging.take(pipe.number, pipe.fd, READ, life._pool.wall(wall))
            self._mark_dirty(life._pool)
            return moved
        data = os.read(pipe.fd, READ)
        if data:
            start = pipe.framer.offset
            records = pipe.framer.feed(data, self._ts(life._pool, stamp(wall)), life.host_pid, life.ns_pid)
            if records:
                self._take(life._pool, _Chunk(life, start, pipe.framer.offset, records))
        return len(data)

    def _wait_for_room(self, pipe: _Pipe) -> None:
        """The pipe is left alone until a batch of its pool is in the log."""
        pool = pipe.life._pool
        if pool.blocked is None:
            pool.blocked = {}
        pool.blocked[pipe] = None
        self._mark_dirty(pool)

    def _end(self, pipe: _Pipe, wall: float) -> None:
        life = pipe.life
        if pipe not in life._pipes:
            return
        if pipe.staging is not None:
            try:
                self._end_staged(life._pool, pipe.staging, pipe.number, wall)
            except Full:
                self._wait_for_room(pipe)  # the next read finds the end again
                return
            self._forget(pipe)
            return
        self._forget(pipe)
        start = pipe.framer.offset
        records = pipe.framer.end(self._ts(life._pool, stamp(wall)), life.host_pid, life.ns_pid)
        if records:
            self._take(life._pool, _Chunk(life, start, pipe.framer.offset, records))

    def _end_staged(self, pool: _Pool, staging: Staging, number: int, wall: float | None = None) -> None:
        staging.end(number, pool.wall(self._wall() if wall is None else wall))
        pool.ending.add((staging, number))
        self._mark_dirty(pool)

    def _forget(self, pipe: _Pipe) -> None:
        life = pipe.life
        life._pipes.remove(pipe)
        self._ready.pop(pipe, None)
        if life._pool.blocked is not None:
            life._pool.blocked.pop(pipe, None)
        # init holds the same pipe, so closing alone would leave it in the epoll.
        self._epoll.unregister(pipe.fd)
        del self._pipes[pipe.fd]
        os.close(pipe.fd)
        pipe.fd = -1

    def _ts(self, pool: _Pool, now: str) -> str:
        """now, but never before what the log says already."""
        if now > pool.last_ts:
            pool.last_ts = now
        return pool.last_ts

    def _take(self, pool: _Pool, chunk: _Chunk) -> None:
        for follower in tuple(self._followers):
            follower.offer(pool.name, chunk.life.worker_id if chunk.life else None, chunk.records)
        if pool.file is None:
            pool.keep(chunk)
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
            executor = ThreadPoolExecutor(1, "nssup-log-writer")
            try:
                executor.submit(int)  # its thread is there from now on: later there may be no process left for it
            except RuntimeError:
                raise no_thread("the logs") from None
            self._writing = executor
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
                wrote = await asyncio.shield(self._write(pool))  # one batch, and each staging memory has its own
                if wrote or pool.waiting or (pool.closing and pool.file is not None):
                    self._mark_dirty(pool)

    async def _write(self, pool: _Pool) -> bool:
        """Writes a batch of pool's log, after the one in flight if there is one; false: there was nothing.

        Run it shielded: it must not be cancelled half-way, when nobody knows what is in the file.
        """
        async with pool.lock:
            file = pool.file
            if file is None:
                return False
            batch = None if pool.waiting else self._seal(pool)
            something = bool(pool.waiting) or batch is not None
            last = pool.closing and not something
            if something or (last and pool.outage):
                await self._write_batch(pool, file, batch)
            elif pool.ending:
                self._release(pool)
            if last and pool.closing and not pool.waiting:
                del self._pools[pool.name]
                pool.file = None
                for staging in pool.stagings:
                    staging.close()
                await file.close()
            return something

    def _seal(self, pool: _Pool) -> Batch | None:
        """Staged bytes of the pool, as a batch whose records are in `waiting`; None: nothing is staged."""
        for staging in tuple(pool.stagings):
            batch = staging.pending or staging.seal()
            if batch is None:
                continue
            pool.stagings.remove(staging)
            pool.stagings.append(staging)  # the others come first next time
            for number, start, stop, records in batch.records():
                self._take(pool, _Chunk(self._owner(pool, staging, number), start, stop, records))
            return batch
        return None

    async def _write_batch(self, pool: _Pool, file: LogFile, batch: Batch | None) -> None:
        chunks = pool.take() if batch is None else pool.take(math.inf)
        data = b"".join([chunk.records for chunk in chunks])
        marks = pool.outage.marks(timestamp(data) if data else pool.last_ts) if pool.outage else b""
        if batch is None:
            kept, error = await file.append(marks + data)
        else:
            kept, error = await _append_staged(file, batch, marks, data)
        pool.last_ts = max(pool.last_ts, file.last_ts)  # of a file that could be opened only now
        self.counters.writes += 1
        self.counters.bytes_written += kept
        if pool.outage:
            pool.outage.forget(marks[:kept].count(b"\n"))
        if batch is not None:
            batch.commit()
            self._release(pool)
        self._settle(pool, max(kept - len(marks), 0), error)

    def _release(self, pool: _Pool) -> None:
        """Streams that are in the log to their end have done their duty."""
        for staging, number in tuple(pool.ending):
            if not staging.streams[number].state.ended:
                continue
            staging.release(number)
            pool.ending.discard((staging, number))
            life = pool.owners.pop((staging, number))
            life._staged.discard((staging, number))
            self._tell_drained(life)
        self._end_endless(pool)

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

    def _count_lost(self, pool: _Pool, life: Streams | None, lost: int) -> None:
        assert pool.outage is not None
        pool.outage.missing[(life.worker_id, life.generation) if life else (None, None)] += lost
        pool.dropped[life.worker_id if life else ""] += lost

    def _drop(self, pool: _Pool, batch: list[_Chunk], kept: int, number: int) -> None:
        """Counts what of batch is not among its first kept bytes."""
        first = pool.outage is None
        pool.outage = pool.outage or Outage(number)
        dropped = 0
        for chunk in batch:
            if kept < len(chunk.records):
                lost = chunk.end - _start(chunk, kept)
                dropped += lost
                self._count_lost(pool, chunk.life, lost)
            kept = max(kept - len(chunk.records), 0)
        self.counters.bytes_dropped += dropped
        if first:
            self._on_error(pool.name, number, dropped)

    async def flush(self) -> None:
        """Returns when everything taken in before was written, or tried."""
        for pool in list(self._pools.values()):
            target = pool.taken
            while pool.settled < target or pool.stagings:
                if not await asyncio.shield(self._write(pool)):
                    break

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
        named = None if pools is None else frozenset(pools)
        follower = Follower(named, workers, max_bytes, self._followers.discard)
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
        return await self._read_back(pool.file, n - len(recent), workers) + recent

    async def _read_back(self, file: LogFile, n: int, workers: Container[str] | None) -> list[bytes]:
        if self._reading is None:
            self._reading = ThreadPoolExecutor(1, "nssup-log-reader")
        wanted = file.path, file.size, n, workers, SCAN
        try:
            return await self._loop.run_in_executor(self._reading, last_records, *wanted)
        except RuntimeError:  # no process left for another thread: the one that writes can do it
            return await self._loop.run_in_executor(self._writer(), last_records, *wanted)

    def last_records(self, worker_id: str, n: int) -> list[bytes]:
        """The last n records of one worker, at once: the loop waits, so only the last LAST bytes of its file count, or
        RECENT bytes where there is no file."""
        pool = self._pools.get(worker_id.partition("/")[0])
        if pool is None:
            return []
        workers = (worker_id,)
        if pool.file is None:
            return pick_last(reversed(pool.recent.get(worker_id, b"").split(b"\n")[:-1]), n, workers)
        recent = pick_last(_unwritten(pool), n, workers)
        return last_records(pool.file.path, pool.file.size, n - len(recent), workers, LAST) + recent


async def _append_staged(file: LogFile, batch: Batch, marks: bytes, data: bytes) -> tuple[int, OSError | None]:
    """As LogFile.append, with the batch's intent noted where its own records begin."""
    kept, error = await file.append(marks) if marks else (0, None)
    if error is not None or not data:
        return kept, error
    status = await file.status()
    if isinstance(status, OSError):
        return kept, status
    batch.begin(status)
    more, error = await file.append(data)
    return kept + more, error


def _nothing() -> None:
    """What is done once is done."""


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
