"""Bytes on their way from pipes to a log, kept where they outlive the supervisor: nothing missing, nothing twice.

One memfd per pool (`handover` has its layout). The inits of the pool hold descriptors of the same open file
description, so memory and position outlive us. One pass of the log: `take` from each ready pipe, `seal` what was staged
into a batch, note where it goes (`begin`), append its `records` to the log, `commit`. Whoever adopts the descriptor
calls `finish`, and goes on as if nothing had happened. A SIGKILL ends a thread between two of its own stores, or after
a system call, never within either. So at every instant:

1. Bytes leave a pipe and the position moves on in one system call: splice(2), to the position that the kernel keeps. It
   writes no memory of ours, which could fault. Their entry is there before them; one that gets no bytes says nothing.
2. An entry's bytes stop where the next one's begin, those of the last at the position (at STOP, once it is sealed).
3. The lap from one half to the other is one lseek(2), done when all that it makes true has been written. Before it the
   one half is still being filled; after it that half is pending, and the other one is empty and being filled.
4. A half is reused only when its batch is committed. Batches are committed in their order.
5. A batch's records follow from the memfd alone: entries, staged bytes, and the streams' states as of the batch before.
   They are the same bytes whoever makes them, and however often.
6. No record of a batch is in any log before `begin` has noted the log and its size, and none of another batch gets
   there before this one is committed. So behind that size is a first part of the batch's records, perhaps torn, or all.
7. One store commits a batch: it makes the new states of its streams count, and its half free.

Not covered: a memfd that nobody holds any more (supervisor and all inits killed). At least once, not exactly once:
where somebody else truncated or removed the log between `begin` and `finish`.
"""

import contextlib
import errno
import fcntl
import itertools
import mmap
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from nssup import handover
from nssup.framing import Framer, Sheet
from nssup.handover import DATA, END, Entry, Layout, StagingError, State
from nssup.lines import Record, stamp

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_MFD_NOEXEC_SEAL = 0x0008
_STREAMS = ("stdout", "stderr")
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL  # nobody can make our mapping fault
_LONGEST = 256 * 1024  # bytes of a record: more is none of ours
_decode = msgspec.json.Decoder(Record).decode


class Full(Exception):
    """No room: for bytes until a batch is sealed or committed, for a stream until another one is released."""


class Chunk(NamedTuple):
    """Records of one stream, and which of its bytes they stand for."""

    stream: int
    start: int
    stop: int
    records: bytes


class Part(NamedTuple):
    """The same on a sheet. end: where there its records end; they begin where those of the part before end."""

    stream: int
    start: int
    stop: int
    end: int


class Intent(NamedTuple):
    """Where a batch goes. size: of the log before the batch's first record."""

    device: int
    inode: int
    size: int


class _Stream:
    __slots__ = ("ending", "framer", "state", "which")

    def __init__(self, pool: str, state: State, which: int) -> None:
        self.state = state
        self.which = which  # of its two versions, the one that counts
        self.ending = state.ended  # as far as staged; state.ended: as far as committed
        self.framer = Framer(f"{pool}/{state.worker}", state.generation, _STREAMS[state.stream])


class Batch:
    """What was staged in one half. It ends with `commit`."""

    def __init__(self, staging: "Staging", sequence: int, entries: list[Entry], stop: int) -> None:
        self.sequence = sequence
        self._staging = staging
        self.entries = entries
        self._stop = stop
        self._reached: dict[int, tuple[int, bytes, bool, bool]] | None = None

    def pass_over(self) -> bool:
        """Whether it is nothing but the ends of streams that hold no bytes. Then it has no records, and may be
        committed without having been written."""
        reached: dict[int, tuple[int, bytes, bool, bool]] = {}
        for number, kind, _, _ in self.entries:
            state = self._staging.streams[number].state
            if kind != END or state.held or state.cut:
                return False
            reached[number] = state.offset, b"", False, True
        self._reached = reached
        return True

    def sheets(self, sheet: Sheet) -> Iterator[list[Part]]:
        """Fills the sheet again and again with the batch's records, in order, and says whose they are: the same each
        time, until `commit`. May run in another thread."""
        streams, memory = self._staging.streams, self._staging.memory
        framed: dict[int, bool] = {}  # streams, and whether they have ended
        last_wall, ts = -1.0, ""
        parts: list[Part] = []
        sheet.size = 0
        stops = [*[entry.start for entry in self.entries[1:]], self._stop]
        for (number, kind, start, wall), stop in zip(self.entries, stops, strict=True):
            stream = streams[number]
            framer, state = stream.framer, stream.state
            if number not in framed:
                framer.resume(state.offset, state.held, state.cut)
            framed[number] = kind == END
            if wall != last_wall:
                last_wall, ts = wall, stamp(wall)
            who = ts, state.host_pid or None, state.ns_pid or None
            at, done = start, False
            while not done:
                offset, size = framer.offset, sheet.size
                if kind == DATA:
                    at = framer.fill(sheet, memory, at, stop, *who)
                    done = at == stop
                else:
                    done = framer.finish(sheet, *who)
                if sheet.size > size:
                    parts.append(Part(number, offset, framer.offset, sheet.size))
                if not done or sheet.is_full():
                    yield parts
                    parts, sheet.size = [], 0
        if parts:
            yield parts
        self._reached = {number: (*streams[number].framer.reached(), ended) for number, ended in framed.items()}

    def records(self) -> Iterator[Chunk]:
        """The same as bytes, in chunks."""
        sheet = Sheet()
        for parts in self.sheets(sheet):
            at = 0
            for stream, start, stop, end in parts:
                yield Chunk(stream, start, stop, bytes(sheet.memory[at:end]))
                at = end

    @property
    def intent(self) -> Intent | None:
        """Where the batch goes; None: none of it is in a log."""
        return self._staging.intent(self)

    def begin(self, log: os.stat_result) -> None:
        """Before the first of the batch's records is appended to a file: log is its status now."""
        self._staging.begin(self, log)

    def forget(self) -> None:
        """None of the batch's records are in a log, as far as anybody can tell."""
        self._staging.begin(self, None)

    def commit(self) -> None:
        """All of the records, made to their end, are in the log or given up: the half is free."""
        if self._reached is None:
            raise RuntimeError("commit before all records of the batch were made")
        streams = self._staging.streams
        states = {number: State(*streams[number].state[:5], *reached) for number, reached in self._reached.items()}
        self._staging.commit(self, states)


class Staging:
    """The staging memory of one pool, or of a part of it. For one thread; a batch's records may be made in another.

    streams: by number, all that have a place. pending: the batch that is sealed and not committed. latest: `wall` of
    the last bytes that were found here. Two descriptors: fd, and one that the mapping keeps.
    """

    def __init__(self, fd: int) -> None:
        """Takes over fd, which `create` made, here or in a process that is gone. It must be of the same open file
        description, as inheritance, SCM_RIGHTS and pidfd_getfd(2) give it, not one opened by way of /proc.

        Raises StagingError or OSError; then fd is still the caller's.
        """
        self.layout, self.pool = handover.decode_head(os.pread(fd, handover.HEAD.size, 0))
        size = self.layout.size()
        if os.fstat(fd).st_size != size or fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise StagingError("staging: of a wrong size, or not sealed")
        self.fd = fd
        self._versions = self.layout.version(0, 0)
        self._tails = self.layout.tail(0, 0)
        self._map = mmap.mmap(fd, size)
        self._words = memoryview(self._map).cast("Q")
        try:
            self._load()
        except BaseException:
            self._unmap()
            raise

    @classmethod
    def create(cls, pool: str, layout: Layout | None = None) -> "Staging":
        """Raises OSError. Memory is used as far as it is needed: a quiet pool of one costs some 50 KiB."""
        layout = layout or Layout()
        fd = _memfd()
        try:
            os.ftruncate(fd, layout.size())
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            os.pwrite(fd, handover.encode_first_page(layout, pool), 0)
            os.lseek(fd, layout.base(0), os.SEEK_SET)
            return cls(fd)
        except BaseException:
            os.close(fd)
            raise

    def close(self) -> None:
        self._unmap()
        os.close(self.fd)

    def _unmap(self) -> None:
        self._words.release()
        self._map.close()

    # --- what is there -------------------------------------------------------------------------------------------

    def _load(self) -> None:
        layout, words = self.layout, self._words
        committed = words[handover.COMMITTED]
        self.streams: dict[int, _Stream] = {}
        self._numbers: dict[tuple[int, int, int], int] = {}  # (worker, generation, stream) -> its number
        for number in range(layout.streams):
            sequences = words[self._at(number, 0) // 8], words[self._at(number, 1) // 8]
            if (which := handover.current(sequences, committed)) is not None:
                state = self._state(number, which)
                self.streams[number] = _Stream(self.pool, state, which)
                self._numbers[state[:3]] = number
        self._free = [number for number in reversed(range(layout.streams)) if number not in self.streams]
        position = os.lseek(self.fd, 0, os.SEEK_CUR)
        filling = layout.half_of(position)
        self._fill(filling, position)
        self._staged = self._entries(filling, position)
        self.pending: Batch | None = None
        other = handover.HALVES[1 - filling]
        sequence, stop = words[other + handover.SEQUENCE], words[other + handover.STOP]
        if handover.is_pending(self._sequence, sequence, committed):
            self.pending = Batch(self, sequence, self._entries(1 - filling, stop), stop)
        self.latest = max([entry.wall for entry in self._all_entries()], default=0.0)

    def _all_entries(self) -> list[Entry]:
        """Of all that is not committed."""
        return self._staged + (self.pending.entries if self.pending else [])

    def _fill(self, half: int, position: int) -> None:
        """half is the one that is being filled, and nothing is in it yet."""
        self._half = half
        self._position = position
        self._stop = self.layout.base(half) + self.layout.half
        self._table = self.layout.table(half)
        self._count_word = handover.HALVES[half] + handover.COUNT
        self._sequence = self._words[handover.HALVES[half] + handover.SEQUENCE]
        self._staged = []
        self._last: tuple[int, float] | None = None  # stream and time of the entry that more bytes can be added to

    def _at(self, number: int, which: int) -> int:
        """Where a version of a stream's state begins: with its sequence number."""
        return self._versions + (number * 2 + which) * handover.VERSION_SIZE

    def _tail(self, number: int, which: int) -> int:
        return self._tails + (number * 2 + which) * handover.TAIL

    def _state(self, number: int, which: int) -> State:
        state, held = handover.read_state(self._map, self._at(number, which))
        tail = self._tail(number, which)
        return state._replace(held=self._map[tail : tail + held])

    def _store(self, number: int, which: int, state: State, sequence: int) -> None:
        if state.held:
            tail = self._tail(number, which)
            self._map[tail : tail + len(state.held)] = state.held
        at = self._at(number, which)
        handover.STATE.pack_into(self._map, at + 8, *handover.state_fields(state))
        self._words[at // 8] = sequence

    def _entries(self, half: int, stop: int) -> list[Entry]:
        count = self._words[handover.HALVES[half] + handover.COUNT]
        if count > self.layout.entries:
            raise StagingError("staging: too many entries")
        at = self.layout.table(half)
        entries = handover.decode_entries(self._map[at : at + count * handover.ENTRY.size], self.layout, half, stop)
        for entry in entries:
            if entry.stream not in self.streams:
                raise StagingError("staging: bytes of no stream")
            if entry.kind == END:
                self.streams[entry.stream].ending = True
        return entries

    @property
    def memory(self) -> "ReadableBuffer":
        """All of it."""
        return self._map

    # --- streams -------------------------------------------------------------------------------------------------

    def attach(self, worker: int, generation: int, stream: int, host_pid: int = 0, ns_pid: int = 0) -> int:
        """A place for a stream (0 stdout, 1 stderr) of which nothing was read so far; its number. Raises Full."""
        if not self._free:
            raise Full
        number = self._free.pop()
        state = State(worker, generation, stream, host_pid, ns_pid)
        self._store(number, 0, state, self._words[handover.COMMITTED])
        self.streams[number] = _Stream(self.pool, state, 0)
        self._numbers[state[:3]] = number
        return number

    def find(self, worker: int, generation: int, stream: int) -> int:
        """The number of a stream that is there already; -1: it is not."""
        return self._numbers.get((worker, generation, stream), -1)

    def identify(self, number: int, host_pid: int, ns_pid: int) -> None:
        """Says a stream's PIDs, before anything of it is taken: records that are made again must say the same.

        An adopted stream without them was attached just before the kill, and nothing of it has been taken.
        """
        stream = self.streams[number]
        self._words[self._at(number, stream.which) // 8 + handover.PIDS_WORD] = host_pid | ns_pid << 32
        stream.state = stream.state._replace(host_pid=host_pid, ns_pid=ns_pid)

    def release(self, number: int) -> None:
        """The stream has ended, and that is committed, or nothing was ever taken from it. Its place is free.

        Raises ValueError.
        """
        stream = self.streams[number]
        new = stream.state == State(*stream.state[:5]) and all(entry.stream != number for entry in self._all_entries())
        if not (stream.state.ended or new):
            raise ValueError(f"stream {number} has not ended")
        for which in (1 - stream.which, stream.which):  # the older version first: it does not know of the end
            self._words[self._at(number, which) // 8] = handover.NEVER
        del self.streams[number]
        self._numbers.pop(stream.state[:3], None)
        self._free.append(number)

    # --- from the pipes ------------------------------------------------------------------------------------------

    def take(self, number: int, pipe: int, count: int, wall: float) -> int:
        """Moves up to count bytes from a pipe into the staging memory. How many; 0: the pipe is at its end.

        wall: seconds since 1970, for `ts`, never less than before. Raises BlockingIOError: nothing there now; Full;
        OSError.
        """
        room = self._stop - self._position
        if not room:
            raise Full
        if (number, wall) != self._last:
            if self.streams[number].ending:
                raise ValueError(f"stream {number} has ended")
            self._enter(number, DATA, wall)
        try:
            moved = os.splice(pipe, self.fd, min(count, room), flags=os.SPLICE_F_NONBLOCK)
            self._position += moved
        except OSError:
            raise
        except BaseException:  # of a signal handler: bytes may have moved
            self._position = os.lseek(self.fd, 0, os.SEEK_CUR)
            raise
        return moved

    def end(self, number: int, wall: float) -> None:
        """Nothing more will come from a stream: its last line is whole now. May be said again. Raises Full."""
        stream = self.streams[number]
        if not stream.ending:
            self._enter(number, END, wall)
            stream.ending = True

    def _enter(self, number: int, kind: int, wall: float) -> None:
        staged, words = self._staged, self._words
        if self._last is not None and staged[-1].start == self._position:  # that entry got no bytes
            staged.pop()
            words[self._count_word] = len(staged)
            self._last = None
        if len(staged) == self.layout.entries:
            raise Full
        entry = Entry(number, kind, self._position, wall)
        handover.ENTRY.pack_into(self._map, self._table + len(staged) * handover.ENTRY.size, *entry)
        staged.append(entry)
        words[self._count_word] = len(staged)
        self._last = (number, wall) if kind == DATA else None

    # --- to the log ----------------------------------------------------------------------------------------------

    def seal(self) -> Batch | None:
        """What was staged so far, as a batch; the other half takes what comes next.

        None: there is nothing, or the batch before is not committed yet.
        """
        words, staged, position, other = self._words, self._staged, self._position, 1 - self._half
        nothing = position == self.layout.base(self._half) and all(entry.kind == DATA for entry in staged)
        if nothing or self.pending is not None:
            return None
        batch = Batch(self, self._sequence, staged, position)
        words[handover.HALVES[self._half] + handover.STOP] = position
        words[handover.HALVES[other] + handover.COUNT] = 0
        words[handover.HALVES[other] + handover.SEQUENCE] = batch.sequence + 1
        self._fill(other, os.lseek(self.fd, self.layout.base(other), os.SEEK_SET))
        self.pending = batch
        return batch

    def intent(self, batch: Batch) -> Intent | None:
        """Batch.intent."""
        words = self._words
        if words[handover.INTENT] != batch.sequence:
            return None
        return Intent(words[handover.INTENT_DEVICE], words[handover.INTENT_INODE], words[handover.INTENT_SIZE])

    def begin(self, batch: Batch, log: os.stat_result | None) -> None:
        """Batch.begin, or Batch.forget."""
        words = self._words
        words[handover.INTENT] = handover.NEVER
        if log is not None:
            words[handover.INTENT_DEVICE] = log.st_dev
            words[handover.INTENT_INODE] = log.st_ino
            words[handover.INTENT_SIZE] = log.st_size
            words[handover.INTENT] = batch.sequence

    def commit(self, batch: Batch, states: dict[int, State]) -> None:
        """Batch.commit."""
        streams = self.streams
        for number, state in states.items():
            self._store(number, 1 - streams[number].which, state, batch.sequence)
        self._words[handover.COMMITTED] = batch.sequence
        for number, state in states.items():
            stream = streams[number]
            stream.which, stream.state = 1 - stream.which, state
        self.pending = None


def _memfd() -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create("nssup-staging", flags | _MFD_NOEXEC_SEAL)
    except OSError:
        return os.memfd_create("nssup-staging", flags)  # before 6.3 the flag is unknown


# --- after a supervisor's death ------------------------------------------------------------------------------------


class Finished(NamedTuple):
    """errno: what kept the rest of a batch out of the log; 0: nothing. lost: bytes of each stream in that rest."""

    errno: int
    lost: dict[int, int]


def finish(staging: Staging, path: Path) -> Finished | None:
    """Brings a batch that a dead supervisor had begun to append to path to its end; None: there was none.

    Before path is opened by anybody who would mend its end, and after the dead one's last thread is gone. If a batch is
    pending afterwards, none of its records are in a log that can be read: write it like any other. May be killed and
    called again.
    """
    batch = staging.pending
    if batch is None or (intent := batch.intent) is None:
        return None
    finished = None
    with contextlib.suppress(OSError):
        fd = _open_again(path, intent)
        if fd is not None:
            try:
                finished = _complete(fd, intent.size, batch)
            finally:
                os.close(fd)
    if finished is None:
        batch.forget()
    else:
        batch.commit()
    return finished


def _open_again(path: Path, intent: Intent) -> int | None:
    """The file that was appended to, by whatever name in its directory it goes now; None: it is not there any more."""
    with contextlib.suppress(FileNotFoundError):
        for candidate in itertools.chain([path], path.parent.iterdir()):
            with contextlib.suppress(FileNotFoundError):
                found = os.lstat(candidate)
                if stat.S_ISREG(found.st_mode) and (found.st_dev, found.st_ino) == intent[:2]:
                    return os.open(candidate, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
    return None


def _complete(fd: int, size: int, batch: Batch) -> Finished | None:
    """Appends what of the batch is missing behind the first size bytes of a file. None: what is there is not ours.

    Raises OSError where it cannot be read.
    """
    there = _ours(fd, size, batch)
    if there is None:
        return None
    at, error, lost = size, 0, dict[int, int]()
    for chunk in batch.records():
        stop = at + len(chunk.records)
        if not error and stop > size + there:
            error = _append(fd, chunk.records[max(size + there - at, 0) :])
            if error:
                lost[chunk.stream] = chunk.stop - _mend(fd, at, chunk)
        elif error:
            lost[chunk.stream] = lost.get(chunk.stream, 0) + chunk.stop - chunk.start
        at = stop
    return Finished(error, lost)


def _ours(fd: int, size: int, batch: Batch) -> int | None:
    """How many bytes of the batch's records are behind the first size bytes of a file; None: something else is there.

    Where another version of nssup has written the same batch in another way, what it wrote is taken back.
    """
    at = size
    if os.fstat(fd).st_size < at:
        return None
    for chunk in batch.records():
        found = os.pread(fd, len(chunk.records), at)
        if not chunk.records.startswith(found):
            first = next(batch.records()).records.partition(b"\n")[0]
            if not _is_same(os.pread(fd, _LONGEST, size).partition(b"\n"), first):
                return None
            os.ftruncate(fd, size)
            return 0
        at += len(found)
        if len(found) < len(chunk.records):
            break
    return at - size


def _is_same(found: tuple[bytes, bytes, bytes], expected: bytes) -> bool:
    """Whether a line of a log, which may be torn, stands for the same bytes of a stream as the expected record."""
    line, newline, _ = found
    if not newline:
        return line.startswith(expected[:7])
    try:
        theirs = _decode(line)
    except msgspec.MsgspecError:
        return False
    ours = _decode(expected)
    return all(getattr(theirs, name) == getattr(ours, name) for name in ("worker", "generation", "stream", "offset"))


def _append(fd: int, records: bytes) -> int:
    """0, or the number of the error that came."""
    view = memoryview(records)
    try:
        while view:
            view = view[os.write(fd, view) :]
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def _mend(fd: int, at: int, chunk: Chunk) -> int:
    """Cuts off the torn end of a chunk that begins at at. The first byte of its stream that is not in the log."""
    there = os.fstat(fd).st_size - at
    whole = chunk.records.rfind(b"\n", 0, max(there, 0)) + 1
    if there > whole:
        with contextlib.suppress(OSError):
            os.ftruncate(fd, at + whole)
    if not whole:
        return chunk.start
    rest = chunk.records[whole:]
    return _decode(rest.partition(b"\n")[0]).offset or 0 if rest else chunk.stop
