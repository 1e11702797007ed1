"""The workers' output: pipes -> records -> one file per pool, and whoever follows.

`intake` says when which pipe is read, `logpool` what becomes of one log, `logfile` writes, `logread` reads back.

Files are written on a thread of our own, one write in flight, in order. Staged output is framed there too, sheet by
sheet, so that the loop only moves bytes from pipes into staging memory. A disk that fails never stops the reading: what
cannot be written is counted (bytes of the workers' output, not of records) and said in the log itself once there is
room. A disk that is slow does stop it: when logpool.HIGH bytes of a pool wait, or its staging memory is full, its pipes
are left alone until there is room again, and its workers wait in their writes.
"""

import asyncio
import contextlib
import errno
import fcntl
import os
import struct
import termios
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from nssup.errors import no_thread
from nssup.follower import Follower
from nssup.framing import Framer, Sheet
from nssup.intake import DRY, NOT_NOW, WAITING, Intake
from nssup.lines import seconds, stamp
from nssup.logfile import NEVER, LogFile, Rotation
from nssup.logpool import STREAMS, Chunk, Counters, LogPipe, Pool, Streams
from nssup.logread import End, last_records, pick_last, timestamp
from nssup.staging import Batch, Full, Staging

SCAN = 64 * 1024 * 1024  # bytes of a file searched for its last records
LAST = 256 * 1024  # the same, where the loop waits for it
FOLLOWED = 4 * 1024 * 1024  # bytes of a batch's records that followers can have

__all__ = ["LogHub", "Passed", "Streams"]


class Passed(NamedTuple):
    """A stream that somebody else reads on. fd: -1 when it is at its end. offset: bytes of it that are in records."""

    fd: int = -1
    offset: int = 0


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
        self._pools: dict[str, Pool] = {}
        self._followers: set[Follower] = set()
        self._intake = Intake[LogPipe](loop, self._read_in_pass, self._begin_pass)
        self._pass_wall = 0.0
        self._sheet = Sheet()  # for the thread that writes
        self._dirty: deque[Pool] = deque()
        self._work = asyncio.Event()
        self._writing: ThreadPoolExecutor | None = None
        self._reading: ThreadPoolExecutor | None = None
        self._closed = False

    # --- logs and streams ----------------------------------------------------------------------------------------

    def open_pool(
        self, name: str, *, staged: bool = False, found: Iterable[int] = (), rotation: Rotation = NEVER
    ) -> None:
        """Opens the log of a pool, LOG_DIR/NAME.jsonl. Opening it again changes its rotation only.

        staged: its output goes through staging memory, so that none of it is lost or doubled when this process is
        killed. found: descriptors of such memory that inits of the pool kept, taken over; what a dead supervisor had
        begun to write is brought to its end first.
        Raises OSError where the file cannot be opened. The log is open all the same: until the file can be, its records
        go to followers only and are counted as dropped.
        """
        pool = self._pools.get(name)
        if pool is not None:
            pool.closing = False
            if pool.file is not None:
                pool.file.rotation = rotation
            return
        pool = self._pools[name] = Pool(name, self.counters, self._mark_dirty)
        if self._log_dir is None:
            return
        path = self._log_dir / f"{name}.jsonl"
        pool.staged = staged
        for fd in found:
            self._tell(pool, pool.take_over(fd, path))
        pool.file = LogFile(path, self._loop, self._writer, rotation)
        pool.file.open()
        pool.last_ts = pool.file.last_ts
        pool.wall(seconds(pool.last_ts) if pool.last_ts else 0.0)
        if pool.stagings:  # what was taken and not even begun to be written: nothing else may ever come behind it
            self._mark_dirty(pool)

    def place(self, name: str, worker_id: str, generation: int) -> Staging | None:
        """Where the output of a new life of a pool is to be staged: its init keeps the descriptor. None: nowhere.

        The room is the life's until it is attached, or given back. Raises OSError.
        """
        pool = self._pools[name]
        return pool.place(worker_id, generation) if pool.staged else None

    def give_back(self, name: str, worker_id: str, generation: int) -> None:
        """The life that a place was for has come to nothing."""
        self._pools[name].give_back(worker_id, generation)

    def placed(self, name: str, fd: int) -> Staging | None:
        """The staging memory that fd, which is closed, is a copy of; None: not one of this pool's."""
        return self._pools[name].placed(fd)

    def is_staged(self, staging: Staging | None, worker_id: str, generation: int) -> bool:
        """Whether output of that life may have been taken: then its streams have its PIDs."""
        if staging is None:
            return False
        index = int(worker_id.partition("/")[2])
        numbers = [staging.find(index, generation, kind) for kind in range(len(STREAMS))]
        return any(number >= 0 and staging.streams[number].state.host_pid for number in numbers)

    def settle(self, name: str, lives: Container[tuple[str, int]]) -> None:
        """What was staged of the pool's lives that are not among these, by worker id and generation, has no writer."""
        self._pools[name].end_others(lives, self._wall())

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
        life.pool.lives.add(life)
        return life

    def _attach(self, life: Streams, fd: int, kind: int, staging: Staging | None, offset: int) -> None:
        os.set_blocking(fd, False)
        number = -1
        if staging is not None:
            index = int(life.worker_id.partition("/")[2])
            number = staging.find(index, life.generation, kind)
            if number < 0:
                number = staging.attach(index, life.generation, kind)
            life.pool.own(life, staging, number)
            if staging.streams[number].ending:
                life.pool.ending.add((staging, number))
                self._mark_dirty(life.pool)  # whoever ended it may have died before all of it was written, or after
                os.close(fd)
                return
        framer = Framer(life.worker_id, life.generation, STREAMS[kind])
        framer.offset = offset
        pipe = LogPipe(fd, life, kind, framer, (staging, number))
        self._intake.add(pipe)
        life.pipes.append(pipe)

    def drain(self, life: Streams, done: Callable[[], None] | None = None) -> None:
        """Reads what is in the pipes of a life that is over, ends its streams and closes its fds.

        Not more than is in them now: an end held by somebody outside must not hold us. done: called when all of it is
        where the death of this process cannot reach it. May be called more than once; only the first `done` counts.
        """
        if done is not None and life.drained is None:
            life.drained = done
        wall = self._wall()
        for pipe in list(life.pipes):
            pipe.left = _bytes_in(pipe.fd)
            got = 1
            while pipe.left > 0 and got > 0:
                got = self._read(pipe, wall)
            if got == NOT_NOW:
                self._intake.put_back([pipe])
            elif pipe in life.pipes and pipe not in life.pool.blocked:
                self._end(pipe, wall)
        life.pool.lives.discard(life)
        life.tell_drained()

    def detach(self, life: Streams) -> None:
        """Lets go of a life's pipes, as if this process had died: the next supervisor reads on where we stopped."""
        for pipe in list(life.pipes):
            self._forget(pipe)
        life.pool.lives.discard(life)

    def pass_on(self, life: Streams) -> tuple[Passed, Passed]:
        """Lets go of a life's pipes, and gives copies of stdout's and stderr's to the caller, for whoever reads on.

        Part of a line is a record of its own then. Raises OSError.
        """
        passed = [Passed(), Passed()]
        wall = self._wall()
        for pipe in list(life.pipes):
            fd = os.dup(pipe.fd)
            if pipe.staging is None:
                self._end(pipe, wall)
            else:
                self._forget(pipe)
            passed[pipe.kind] = Passed(fd, pipe.framer.offset)
        life.pool.lives.discard(life)
        return passed[0], passed[1]

    def append(self, log: str, records: bytes) -> None:
        """Takes ready-made records, whole lines that begin with their `ts`, into an open log. Raises KeyError."""
        self._take(self._pools[log], Chunk(None, 0, len(records), records))

    def is_written(self, log: str) -> bool:
        """Whether all that an open log took in is in its file, or lost. Raises KeyError."""
        pool = self._pools[log]
        return pool.taken == pool.settled

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

    def _begin_pass(self) -> None:
        """All that is read in one pass has one time."""
        self._pass_wall = self._wall()

    def _read_in_pass(self, pipe: LogPipe) -> int:
        pool = pipe.life.pool
        if pool.crowded:
            pool.block(pipe)
            return WAITING
        return self._read(pipe, self._pass_wall)

    def _read(self, pipe: LogPipe, wall: float) -> int:
        """One read. How many bytes; DRY where there are none now, or no more will come (then the pipe is closed)."""
        self.counters.reads += 1
        try:
            got = self._take_from(pipe, wall)
        except BlockingIOError:
            return DRY
        except Full:
            pipe.life.pool.block(pipe)
            return WAITING
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

    def _take_from(self, pipe: LogPipe, wall: float) -> int:
        """Raises BlockingIOError, Full, OSError. 0: no more will come."""
        life = pipe.life
        if pipe.staging is not None:
            moved = pipe.staging.take(pipe.number, pipe.fd, pipe.share, life.pool.wall(wall))
            self._mark_dirty(life.pool)
            return moved
        data = os.read(pipe.fd, pipe.share)
        if data:
            start, ts = pipe.framer.offset, life.pool.ts(wall)
            records = pipe.framer.feed(data, ts, life.host_pid, life.ns_pid)
            if records:
                self._take(life.pool, Chunk(life, start, pipe.framer.offset, records))
        return len(data)

    def _end(self, pipe: LogPipe, wall: float) -> None:
        life = pipe.life
        if pipe not in life.pipes:
            return
        if pipe.staging is not None:
            try:
                life.pool.end_staged(pipe.staging, pipe.number, wall)
            except Full:
                life.pool.block(pipe)  # the next read finds the end again
                return
            self._forget(pipe)
            return
        self._forget(pipe)
        start = pipe.framer.offset
        records = pipe.framer.end(life.pool.ts(wall), life.host_pid, life.ns_pid)
        if records:
            self._take(life.pool, Chunk(life, start, pipe.framer.offset, records))

    def _forget(self, pipe: LogPipe) -> None:
        pipe.life.pipes.remove(pipe)
        pipe.life.pool.blocked.pop(pipe, None)
        self._intake.remove(pipe)
        os.close(pipe.fd)
        pipe.fd = -1

    def _take(self, pool: Pool, chunk: Chunk) -> None:
        for follower in tuple(self._followers):
            follower.offer(pool.name, chunk.life.worker_id if chunk.life else None, chunk.records, len(chunk.records))
        if pool.file is None:
            pool.keep(chunk)
        else:
            pool.queue(chunk)

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

    def _mark_dirty(self, pool: Pool) -> None:
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

    async def _write(self, pool: Pool) -> bool:
        """Writes a batch of pool's log, after the one in flight if there is one; false: there was nothing.

        Run it shielded: it must not be cancelled half-way, when nobody knows what is in the file.
        """
        async with pool.lock:
            file = pool.file
            if file is None:
                return False
            queued = bool(pool.waiting)
            sealed = None if queued else pool.seal()
            last = pool.closing and not queued and sealed is None
            if sealed is not None:
                await self._write_batch(pool, file, *sealed)
            elif queued or (last and pool.outage):
                await self._write_chunks(pool, file)
            elif pool.ending:
                pool.release(self._wall())
            if last and pool.closing and not pool.waiting:
                del self._pools[pool.name]
                pool.file = None
                for staging in pool.stagings:
                    staging.close()
                await file.close()
            return queued or sealed is not None

    async def _write_chunks(self, pool: Pool, file: LogFile) -> None:
        data = b"".join([chunk.records for chunk in pool.next_chunks()])
        marks = pool.outage.marks(timestamp(data) if data else pool.last_ts) if pool.outage else b""
        kept, error = await file.append(marks + data)
        self._wrote(pool, file, marks[:kept], kept)
        self._tell(pool, pool.settle(max(kept - len(marks), 0), error))
        if not pool.crowded:
            self._intake.put_back(pool.unblock())

    async def _write_batch(self, pool: Pool, file: LogFile, staging: Staging, batch: Batch) -> None:
        self._intake.put_back(pool.unblock())  # the other half is free
        if pool.outage is None and batch.pass_over():  # the end of a life that said nothing is worth no write
            batch.commit()
            pool.release(self._wall())
            return
        marks = pool.outage.marks(stamp(batch.entries[0].wall)) if pool.outage else b""
        audience = tuple(follower for follower in self._followers if follower.follows(pool.name))
        pool.batch_done = self._loop.create_future()
        try:
            written = await file.append_batch(batch, self._sheet, marks, FOLLOWED if audience else 0)
        finally:
            done, pool.batch_done = pool.batch_done, None
            done.set_result(file.end)
        for number, records, size in written.copies:
            worker_id = pool.owner(staging, number).worker_id
            for follower in audience:
                follower.offer(pool.name, worker_id, records, size)
        self._wrote(pool, file, marks[: written.marks], written.marks + written.size)
        self._tell(pool, pool.settle_batch(staging, batch, written))
        pool.release(self._wall())

    def _wrote(self, pool: Pool, file: LogFile, marks: bytes, size: int) -> None:
        pool.last_ts = max(pool.last_ts, file.last_ts)  # of a file that could be opened only now
        self.counters.writes += 1
        self.counters.bytes_written += size
        if pool.outage:
            pool.outage.forget(marks.count(b"\n"))

    def _tell(self, pool: Pool, failed: tuple[int, int] | None) -> None:
        if failed is not None:
            self._on_error(pool.name, *failed)

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
        self._intake.close()
        while self._pools:
            await asyncio.shield(self._write(next(iter(self._pools.values()))))
        for pipe in list(self._intake.pipes.values()):  # what they still hold found no room
            self._forget(pipe)
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
        follower = Follower(named, workers, max_bytes, self.leave)
        self.join(follower)
        return follower

    def join(self, follower: Follower) -> None:
        """Records are offered to it from now on, unless all is closed."""
        if self._closed:
            follower.close()
        else:
            self._followers.add(follower)

    def leave(self, follower: Follower) -> None:
        self._followers.discard(follower)

    @contextlib.contextmanager
    def writable(self, life: Streams | None) -> Iterator[list[int]]:
        """Descriptors for 0, 1 and 2 of a command whose output is to be among that life's; none when it has no more.
        Closed on the way out."""
        opened: list[int] = []
        ends = {pipe.kind: pipe.fd for pipe in life.pipes} if life is not None else {}
        try:
            if 0 in ends:
                opened.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
                for kind in (0, 1):
                    fd = ends.get(kind, ends[0])
                    opened.append(os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC))
        except OSError:  # no descriptors left: then without
            for fd in opened:
                os.close(fd)
            opened = []
        try:
            yield opened
        finally:
            for fd in opened:
                os.close(fd)

    async def tail(self, log: str, n: int, workers: Container[str] | None = None) -> list[bytes]:
        """The last n records (newlines included) of a log as it is at the call, of these worker ids (None: of all).

        Records still to be written are among them. Looks at the last SCAN bytes of the file at most. A log that is not
        open has none.
        """
        pool = self._pools.get(log)
        if pool is None or pool.file is None:
            return []
        recent = pick_last(pool.unwritten(), n, workers)
        if len(recent) == n:
            return recent
        end = pool.file.end
        if pool.batch_done is not None:  # who follows from now on is not told of it any more
            end = await asyncio.shield(pool.batch_done)
        return await self._read_back(end, n - len(recent), workers) + recent

    async def _read_back(self, end: End, n: int, workers: Container[str] | None) -> list[bytes]:
        if self._reading is None:
            self._reading = ThreadPoolExecutor(1, "nssup-log-reader")
        wanted = end, n, workers, SCAN
        try:
            return await self._loop.run_in_executor(self._reading, last_records, *wanted)
        except RuntimeError:  # no process left for another thread: the one that writes can do it
            return await self._loop.run_in_executor(self._writer(), last_records, *wanted)

    def last_records(self, worker_id: str, n: int) -> list[bytes]:
        """The last n records of one worker, at once: the loop waits, so only the last LAST bytes of its file count, or
        logpool.RECENT bytes where there is no file."""
        pool = self._pools.get(worker_id.partition("/")[0])
        if pool is None:
            return []
        workers = (worker_id,)
        if pool.file is None:
            return pick_last(pool.kept(worker_id), n, workers)
        recent = pick_last(pool.unwritten(), n, workers)
        return last_records(pool.file.end, n - len(recent), workers, LAST) + recent


def _bytes_in(fd: int) -> int:
    """How many bytes wait in a pipe."""
    answer = fcntl.ioctl(fd, termios.FIONREAD, bytes(4))
    waiting: int = struct.unpack("i", answer)[0]
    return waiting
