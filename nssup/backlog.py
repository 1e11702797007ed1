"""Own events that are published and perhaps not in nssup.jsonl yet, kept where the next supervisor finds them.

`RUNTIME_DIR/events` is mapped: what is stored there stays when this process is killed, and costs no system call. One
store makes an event count. It is emptied when all that it holds has reached the log; an event that is in both is told
once, because `epoch:seq` names it. Of use only within one boot (docs/contracts.md, part n).
"""

import contextlib
import mmap
import os
import struct
from collections.abc import Iterable
from pathlib import Path

import msgspec

from nssup.events import Event

VERSION = 1
SIZE = 512 * 1024
_HEAD = struct.Struct("=8sI4x16s")
_MAGIC = b"NSSEVENT"
_LENGTH_WORD = 8  # bytes that count, behind _FIRST
_FIRST = 128
_FRAME = struct.Struct("=I")
_END = 256 * 1024  # bytes of a log that are searched for its last event

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Event).decode


class Backlog:
    """Ours while the directory's lock is. left: what a supervisor before us published last, oldest first."""

    def __init__(self, path: Path) -> None:
        """Raises OSError when the file cannot be had."""
        boot_id = bytes.fromhex(Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", ""))
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.posix_fallocate(fd, 0, SIZE)  # a full disk is an error here, and no fault later
            self._map = mmap.mmap(fd, SIZE)
        finally:
            os.close(fd)
        self._words = memoryview(self._map).cast("Q")
        head = _HEAD.pack(_MAGIC, VERSION, boot_id)
        if self._map[: len(head)] != head:
            self._words[_LENGTH_WORD] = 0
            self._map[: len(head)] = head
        self.left, self._at = self._read()

    def close(self) -> None:
        self._words.release()
        self._map.close()

    def _read(self) -> tuple[list[Event], int]:
        """(the events there are, where the next one goes). What means nothing ends it."""
        found: list[Event] = []
        at, end = _FIRST, _FIRST + self._words[_LENGTH_WORD]
        with contextlib.suppress(struct.error, msgspec.MsgspecError, ValueError):
            while at < end <= SIZE:
                (size,) = _FRAME.unpack_from(self._map, at)
                start = at + _FRAME.size
                if start + size > end:
                    break
                found.append(_decode(self._map[start : start + size]))
                at = start + size
        return found, at

    def add(self, event: Event) -> None:
        """The event is published. What has no room is told by this process or not at all."""
        data = _encode(event)
        at, start = self._at, self._at + _FRAME.size
        end = start + len(data)
        if end > SIZE:
            return
        _FRAME.pack_into(self._map, at, len(data))
        self._map[start:end] = data
        self._words[_LENGTH_WORD] = end - _FIRST
        self._at = end

    @property
    def holds(self) -> bool:
        """Whether there is anything in it."""
        return self._at > _FIRST

    def clear(self) -> None:
        """All of it is in the log."""
        if self.holds:
            self._words[_LENGTH_WORD] = 0
            self._at = _FIRST


def missing(events: Iterable[Event], log: Path) -> list[Event]:
    """Those that are not in the log, which nobody has open. A line that a kill tore is cut off it: it is among them.

    Raises OSError.
    """
    events = list(events)
    if not events:
        return []
    try:
        fd = os.open(log, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError:
        return events
    try:
        size = os.fstat(fd).st_size
        end = os.pread(fd, _END, max(size - _END, 0))
        torn = len(end) - (end.rfind(b"\n") + 1)
        if 0 < torn < len(end):
            os.truncate(fd, size - torn)
        last = _last(end[: len(end) - torn])
    finally:
        os.close(fd)
    return [event for event in events if (event.epoch, event.seq) > last]


class _Name(msgspec.Struct):
    epoch: int
    seq: int


def _last(records: bytes) -> tuple[int, int]:
    """What names the last event of a log."""
    for line in reversed(records.splitlines()):
        with contextlib.suppress(msgspec.MsgspecError):
            name = msgspec.json.decode(line, type=_Name)
            return name.epoch, name.seq
    return 0, 0
