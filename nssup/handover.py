"""The bytes of a staging memfd (staging.py): where each thing lies, and what its words mean. Pure.

    page 0    head, and the words that change (8 bytes each, in native order: nothing here outlives a boot)
    entries   two tables, one a half: what was staged, in order
    streams   two versions a stream: how far its bytes are in records; of those with a sequence number that is not
              NEVER and not above `committed`, the higher one counts
    tails     two a stream: the bytes of an unfinished line that belong to that version
    halves    two regions of staged bytes, with a gap behind each

A batch is what one half holds; batches are numbered (`sequence`). The position of the memfd's open file description
says which half is being filled, and how far.
"""

import struct
from typing import TYPE_CHECKING, NamedTuple

from nssup.errors import NssupError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

MAGIC = 0x454741545353534E  # "NSSSTAGE"
VERSION = 1
PAGE = 4096
TAIL = 16 * 1024  # bytes of an unfinished line, at most: lines.PART

LATEST = 2.0**37  # seconds since 1970 that can be written as a date
DATA = 0  # entry: bytes of a stream
END = 1  # entry: the stream is over

# Words, counted from the begin of the file.
COMMITTED = 128  # the last batch that is done with
INTENT = 129  # the batch whose records are being appended to the file below; NEVER: none
INTENT_DEVICE, INTENT_INODE, INTENT_SIZE = 130, 131, 132  # the log file, and its size before
HALVES = (136, 140)  # of each half, its words:
SEQUENCE, COUNT, STOP = 0, 1, 2  # the batch; its entries; where its bytes stop (once it is sealed)

NEVER = 0
FIRST = 1  # what a new memfd calls committed

HEAD = struct.Struct("=QIIQII48s")
ENTRY = struct.Struct("=IIQd")  # stream number, DATA or END, where its bytes begin, wall clock seconds
VERSION_SIZE = 64
STATE = struct.Struct("=QIIIIIIII16x")  # a version, after its sequence number
PIDS_WORD = 5  # of a version: host PID and namespace PID, written as one

_CUT = 1
_ENDED = 2


class StagingError(NssupError):
    """A descriptor that is no staging memfd, one of a strange version, or one whose content cannot be."""


class State(NamedTuple):
    """One stream of one life, as far as its bytes are in committed records.

    worker: index in the pool. stream: 0 stdout, 1 stderr. PIDs: 0 while unknown. offset: bytes in records. held: bytes
    of an unfinished line that are in no record yet. cut: parts of that line are in records. ended: nothing will come.
    """

    worker: int
    generation: int
    stream: int
    host_pid: int = 0
    ns_pid: int = 0
    offset: int = 0
    held: bytes = b""
    cut: bool = False
    ended: bool = False


def state_fields(state: State) -> tuple[int, ...]:
    """What STATE packs: all but the held bytes."""
    worker, generation, stream, host_pid, ns_pid, offset, held, cut, ended = state
    flags = (_CUT if cut else 0) | (_ENDED if ended else 0)
    return offset, len(held), flags, worker, generation, stream, 0, host_pid, ns_pid


def read_state(buffer: "Buffer", at: int) -> tuple[State, int]:
    """(all but the held bytes, how many these are) of the version that begins at at. Raises StagingError."""
    offset, held, flags, worker, generation, stream, _, host_pid, ns_pid = STATE.unpack_from(buffer, at + 8)
    if held > TAIL or stream > 1:
        raise StagingError("staging: a stream's state is damaged")
    cut, ended = bool(flags & _CUT), bool(flags & _ENDED)
    return State(worker, generation, stream, host_pid, ns_pid, offset, cut=cut, ended=ended), held


def current(sequences: tuple[int, int], committed: int) -> int | None:
    """Which of a stream's two versions counts; None: the place is free."""
    valid = [(sequence, which) for which, sequence in enumerate(sequences) if NEVER < sequence <= committed]
    return max(valid)[1] if valid else None


def is_pending(filling: int, other: int, committed: int) -> bool:
    """Whether the half that is not being filled holds a batch to be written; all three are sequence numbers."""
    return committed < other < filling


class Layout(NamedTuple):
    """The sizes that a memfd is made with: streams it has place for, bytes and entries of each half."""

    streams: int = 256
    half: int = 1024 * 1024
    entries: int = 4096

    def table(self, half: int) -> int:
        """Where the entries of a half begin."""
        return PAGE + half * _pages(self.entries * ENTRY.size)

    def version(self, stream: int, which: int) -> int:
        return self.table(2) + (stream * 2 + which) * VERSION_SIZE

    def tail(self, stream: int, which: int) -> int:
        return _pages(self.version(self.streams, 0)) + (stream * 2 + which) * TAIL

    def base(self, half: int) -> int:
        """Where the bytes of a half begin. A full one stops below the next one's begin: its position is its own."""
        return self.tail(self.streams, 0) + half * (_pages(self.half) + PAGE)

    def size(self) -> int:
        return self.base(2)

    def half_of(self, position: int) -> int:
        """The half that a position lies in. Raises StagingError: in none."""
        for half in (0, 1):
            if self.base(half) <= position <= self.base(half) + self.half:
                return half
        raise StagingError(f"staging: position {position} is outside")


def _pages(size: int) -> int:
    """size rounded up to whole pages."""
    return -(-size // PAGE) * PAGE


def encode_first_page(layout: Layout, pool: str) -> bytes:
    """Of a memfd that nothing was staged in yet. Raises ValueError when the name does not fit."""
    if len(pool.encode()) > 48:
        raise ValueError("staging: the name of the pool is too long")
    page = bytearray(PAGE)
    HEAD.pack_into(page, 0, MAGIC, VERSION, layout.streams, layout.half, layout.entries, TAIL, pool.encode())
    words = memoryview(page).cast("Q")
    words[COMMITTED] = FIRST
    words[HALVES[0] + SEQUENCE] = FIRST + 1
    return bytes(page)


def decode_head(data: bytes) -> tuple[Layout, str]:
    """(sizes, name of the pool). Raises StagingError."""
    if len(data) < HEAD.size:
        raise StagingError("staging: too short")
    magic, version, streams, half, entries, tail, pool = HEAD.unpack_from(data)
    if magic != MAGIC or not VERSION - 1 <= version <= VERSION or tail != TAIL or not (streams and half and entries):
        raise StagingError("staging: not ours, or of a version that this nssup does not know")
    return Layout(streams, half, entries), pool.rstrip(b"\0").decode("ascii", "replace")


class Entry(NamedTuple):
    """What was staged at once of one stream. Its bytes stop where those of the next entry begin.

    kind: DATA or END. wall: seconds since 1970.
    """

    stream: int
    kind: int
    start: int
    wall: float


def decode_entries(table: bytes, layout: Layout, half: int, stop: int) -> list[Entry]:
    """The entries of a half whose bytes stop at stop. Raises StagingError."""
    entries = [Entry._make(fields) for fields in ENTRY.iter_unpack(table)]
    base = at = layout.base(half)
    for stream, kind, start, wall in entries:
        if stream >= layout.streams or kind > END or start < at or not 0 <= wall < LATEST:
            raise StagingError("staging: an entry is damaged")
        at = start
    if not at <= stop <= base + layout.half or (entries[0].start if entries else stop) != base:
        raise StagingError("staging: bytes without an entry")
    return entries
