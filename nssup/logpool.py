"""One log: what waits for its file, what is staged for it, whose it is, and what of it could not be written."""

import asyncio
import errno
import os
from collections import Counter, deque
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from nssup.framing import PlainFramer
from nssup.handover import Layout, StagingError
from nssup.intake import Pipe
from nssup.lines import stamp
from nssup.logfile import LogFile, Outage, Written, first_lost
from nssup.staging import Batch, Full, Staging, finish

if TYPE_CHECKING:
    from nssup.logread import End

HIGH = 8 * 1024 * 1024  # bytes of records a pool may have waiting for its file
WRITE = 1024 * 1024  # bytes of records in one write, about
RECENT = 16 * 1024  # bytes of records of a worker that are remembered where there is no file
LAYOUT = Layout(streams=256, half=1024 * 1024)  # of one staging memory
STREAMS = ("stdout", "stderr")


class Counters:
    """What was done so far, for metrics and for tests. bytes_written: of records. bytes_dropped: of workers' output."""

    __slots__ = ("bytes_dropped", "bytes_read", "bytes_written", "reads", "writes")

    def __init__(self) -> None:
        self.reads = 0
        self.bytes_read = 0
        self.writes = 0
        self.bytes_written = 0
        self.bytes_dropped = 0


class Streams:
    """The output of one life: what `LogHub.attach` gives and `LogHub.drain` takes."""

    __slots__ = ("drained", "generation", "host_pid", "ns_pid", "pipes", "pool", "staged", "worker_id")

    def __init__(self, pool: "Pool", worker_id: str, generation: int) -> None:
        self.pool = pool
        self.pipes: list[LogPipe] = []
        self.staged: set[tuple[Staging, int]] = set()  # streams that are not in the log to their end
        self.drained: Callable[[], None] | None = None  # called when all of them are
        self.worker_id = worker_id
        self.generation = generation
        self.host_pid: int | None = None
        self.ns_pid: int | None = None

    def identify(self, host_pid: int, ns_pid: int) -> None:
        """The worker's PIDs are known: records say them from now on, null before."""
        self.host_pid = host_pid
        self.ns_pid = ns_pid
        for staging, number in self.staged:
            if not staging.streams[number].state.host_pid:
                staging.identify(number, host_pid, ns_pid)

    def tell_drained(self) -> None:
        if self.drained is not None and not self.pipes and not self.staged:
            done, self.drained = self.drained, _nothing
            done()


class LogPipe(Pipe):
    """One read end. Its bytes are framed at once by framer, or moved into staging as stream `number`.

    left: of a life that is over, how many bytes are still to be taken.
    """

    __slots__ = ("framer", "kind", "left", "life", "number", "staging")

    def __init__(
        self, fd: int, life: Streams, kind: int, framer: PlainFramer, staged: tuple[Staging | None, int]
    ) -> None:
        super().__init__(fd)
        self.life = life
        self.kind = kind
        self.framer = framer
        self.staging, self.number = staged
        self.left: int | None = None


class Chunk(NamedTuple):
    """A batch of records of one stream, and which of its bytes they stand for. life: None for what is no worker's."""

    life: Streams | None
    start: int
    end: int
    records: bytes


_Lost = tuple[Streams | None, int]  # of whose output, how many bytes


class Pool:
    """One log: of a pool of workers, or of nssup itself. wake: told that there is something to write or to see to."""

    def __init__(self, name: str, counters: Counters, wake: "Callable[[Pool], None]") -> None:
        self.name = name
        self.counters = counters
        self.file: LogFile | None = None
        self.lock = asyncio.Lock()  # held while a write is in flight
        self.waiting: deque[Chunk] = deque()
        self.in_flight: list[Chunk] = []
        self.batch_done: asyncio.Future[End] | None = None  # of the file, when the batch in flight is in it
        self.size = 0  # bytes of records in `waiting` and `in_flight`
        self.taken = 0  # bytes of records ever taken in
        self.settled = 0  # of these: written, or tried
        self.last_ts = ""
        self.lives: set[Streams] = set()
        self.crowded = False  # too much waits: pipes are left alone
        self.blocked: dict[LogPipe, None] = {}  # those that are, for this reason or because nothing more can be staged
        self.outage: Outage | None = None
        self.dropped: Counter[str] = Counter()
        self.dirty = False
        self.closing = False
        self.staged = False
        self.stagings: list[Staging] = []
        self.ending: set[tuple[Staging, int]] = set()  # streams whose end is staged and not yet in the log
        self._endless: set[tuple[Staging, int]] = set()  # streams without a writer whose end found no room yet
        self._owners: dict[tuple[Staging, int], Streams] = {}
        self._places: dict[tuple[str, int], Staging] = {}  # of lives that are launched and not attached yet
        self._reserved: Counter[Staging] = Counter()
        self._last_wall = 0.0
        self._recent: dict[str, bytes] = {}  # worker id -> its last records, where there is no file to read them from
        self._wake = wake

    # --- time ----------------------------------------------------------------------------------------------------

    def wall(self, now: float) -> float:
        """now, but never before what is staged or in the log already."""
        self._last_wall = max(self._last_wall, now)
        return self._last_wall

    def ts(self, now: float) -> str:
        """The same as a record's `ts`."""
        self.last_ts = max(self.last_ts, stamp(now))
        return self.last_ts

    # --- staging memory ------------------------------------------------------------------------------------------

    def take_over(self, fd: int, path: Path) -> tuple[int, int] | None:
        """Staging memory that an init kept; what a dead supervisor had begun to write of it is brought to its end.

        (errno, bytes that are lost): why something of it is.
        """
        try:
            if any(os.path.sameopenfile(staging.fd, fd) for staging in self.stagings):
                os.close(fd)
                return None
            staging = Staging(fd)
        except (OSError, StagingError):
            os.close(fd)
            return errno.EBADMSG, 0  # what is in there nobody can tell
        self.stagings.append(staging)
        finished = finish(staging, path)
        self.wall(staging.latest)
        if finished is None or not finished.lost:
            return None
        self.outage = self.outage or Outage(finished.errno)
        for number, lost in finished.lost.items():
            self._count_lost(self.owner(staging, number), lost)
        return finished.errno, sum(finished.lost.values())

    def place(self, worker_id: str, generation: int) -> Staging:
        """LogHub.place."""
        for staging in self.stagings:
            if len(staging.streams) + len(STREAMS) * (1 + self._reserved[staging]) <= staging.layout.streams:
                break
        else:
            staging = Staging.create(self.name, LAYOUT)
            self.stagings.append(staging)
        self._places[worker_id, generation] = staging
        self._reserved[staging] += 1
        return staging

    def give_back(self, worker_id: str, generation: int) -> None:
        """The life that a place was for has come to nothing, or to its streams."""
        staging = self._places.pop((worker_id, generation), None)
        if staging is not None:
            self._reserved[staging] -= 1

    def placed(self, fd: int) -> Staging | None:
        """The staging memory that fd, which is closed, is a copy of; None: not one of this pool's."""
        try:
            for staging in self.stagings:
                if os.path.sameopenfile(staging.fd, fd):
                    return staging
        finally:
            os.close(fd)
        return None

    def owner(self, staging: Staging, number: int) -> Streams:
        """Whose stream that is, also where its life is gone."""
        life = self._owners.get((staging, number))
        if life is None:
            state = staging.streams[number].state
            life = Streams(self, f"{self.name}/{state.worker}", state.generation)
            self.own(life, staging, number)
        return life

    def own(self, life: Streams, staging: Staging, number: int) -> None:
        life.staged.add((staging, number))
        self._owners[staging, number] = life

    def end_others(self, lives: Container[tuple[str, int]], wall: float) -> None:
        """What was staged of lives that are not among these, by worker id and generation, has no writer any more."""
        for staging in self.stagings:
            for number, stream in staging.streams.items():
                if (f"{self.name}/{stream.state.worker}", stream.state.generation) not in lives:
                    self.owner(staging, number)
                    self._endless.add((staging, number))
        self._end_endless(wall)

    def _end_endless(self, wall: float) -> None:
        """As many of them as there is room for; the others when there is more."""
        for staging, number in tuple(self._endless):
            try:
                self.end_staged(staging, number, wall)
            except Full:
                self._wake(self)
                return
            self._endless.discard((staging, number))

    def end_staged(self, staging: Staging, number: int, wall: float) -> None:
        """Raises Full."""
        staging.end(number, self.wall(wall))
        self.ending.add((staging, number))
        self._wake(self)

    def seal(self) -> tuple[Staging, Batch] | None:
        """A batch of what is staged; None: nothing is."""
        for staging in tuple(self.stagings):
            batch = staging.pending or staging.seal()
            if batch is not None:
                self.stagings.remove(staging)
                self.stagings.append(staging)  # the others come first next time
                return staging, batch
        return None

    def release(self, wall: float) -> None:
        """Streams that are in the log to their end have done their duty."""
        for staging, number in tuple(self.ending):
            if not staging.streams[number].state.ended:
                continue
            staging.release(number)
            self.ending.discard((staging, number))
            life = self._owners.pop((staging, number))
            life.staged.discard((staging, number))
            life.tell_drained()
        self._end_endless(wall)

    # --- what waits for the file ---------------------------------------------------------------------------------

    def queue(self, chunk: Chunk) -> None:
        self.waiting.append(chunk)
        self.size += len(chunk.records)
        self.taken += len(chunk.records)
        self.crowded = self.crowded or self.size > HIGH
        self._wake(self)

    def block(self, pipe: LogPipe) -> None:
        """The pipe is left alone until there is room."""
        self.blocked[pipe] = None
        self._wake(self)

    def unblock(self) -> list[LogPipe]:
        """There is room: the pipes that waited for it."""
        blocked, self.blocked = list(self.blocked), {}
        return blocked

    def next_chunks(self) -> list[Chunk]:
        """To be written, in order."""
        size = 0
        while self.waiting and size < WRITE:
            chunk = self.waiting.popleft()
            size += len(chunk.records)
            self.in_flight.append(chunk)
        return self.in_flight

    def settle(self, kept: int, error: OSError | None) -> tuple[int, int] | None:
        """The write in flight is over, and its first kept bytes are in the file. What `_fail` says."""
        chunks, self.in_flight = self.in_flight, []
        size = sum([len(chunk.records) for chunk in chunks])
        self.size -= size
        self.settled += size
        self.crowded = self.crowded and self.size > HIGH // 2
        lost: list[_Lost] = []
        for chunk in chunks:
            if kept < len(chunk.records):
                if chunk.life is None:
                    lost.append((None, len(chunk.records) - kept))
                else:
                    lost.append((chunk.life, chunk.end - first_lost(chunk.start, chunk.records, kept)))
            kept = max(kept - len(chunk.records), 0)
        return self._fail(error, lost)

    def settle_batch(self, staging: Staging, batch: Batch, written: Written) -> tuple[int, int] | None:
        """The same for a batch, which is committed."""
        lost: list[_Lost] = [(self.owner(staging, number), count) for number, count in written.lost.items()]
        batch.commit()
        return self._fail(written.error, lost)

    def _fail(self, error: OSError | None, lost: list[_Lost]) -> tuple[int, int] | None:
        """Counts what could not be written. (errno, bytes), if that is news."""
        if error is None:
            self.outage = None
            return None
        first = self.outage is None
        number = error.errno or errno.EIO
        self.outage = self.outage or Outage(number)
        for life, count in lost:
            self._count_lost(life, count)
        return (number, sum(count for _, count in lost)) if first else None

    def _count_lost(self, life: Streams | None, lost: int) -> None:
        assert self.outage is not None
        self.outage.missing[(life.worker_id, life.generation) if life else (None, None)] += lost
        self.dropped[life.worker_id if life else ""] += lost
        self.counters.bytes_dropped += lost

    def keep(self, chunk: Chunk) -> None:
        """Where there is no file to read the last records from."""
        if chunk.life is not None:
            records = self._recent.get(chunk.life.worker_id, b"") + chunk.records
            if len(records) > RECENT:
                records = records[records.find(b"\n", len(records) - RECENT) + 1 :]
            self._recent[chunk.life.worker_id] = records

    def kept(self, worker_id: str) -> Iterator[bytes]:
        """What `keep` has kept, the last first."""
        return reversed(self._recent.get(worker_id, b"").split(b"\n")[:-1])

    def unwritten(self) -> Iterator[bytes]:
        """The records that are not in the file yet, the last first; not those of a batch."""
        for chunks in (self.waiting, self.in_flight):
            for chunk in reversed(chunks):
                yield from reversed(chunk.records.split(b"\n")[:-1])


def _nothing() -> None:
    """What is done once is done."""
