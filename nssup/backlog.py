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
from nssup.logfile import FILE_MODE
from nssup.logread import aside
from nssup.snapshot import event_document

VERSION = 1
SIZE = 1024 * 1024
_HEAD = struct.Struct("=8sI4x16s")
_MAGIC = b"NSSEVENT"
_LENGTH_WORD = 8  # bytes that count, behind _FIRST
_FIRST = 128
_FRAME = struct.Struct("=I")
_END = 256 * 1024  # bytes of a log that are searched for its last event

NOBODY = (0, 0)  # epoch and seq of no event

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
        self._overflows = False

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

    def hand_over(self, log: Path) -> None:
        """What was left is appended to the log, which nobody has open, as far as it is not in there; and forgotten.

        Raises OSError; then it stays.
        """
        if self.left:
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
            fd = os.open(log, flags, FILE_MODE)
            try:
                _append(fd, self.left, aside(log, 1))
            finally:
                os.close(fd)
        self.clear()

    def add(self, event: Event) -> None:
        """The event is published. One that has no room, and those behind it, are told by this process or not at all."""
        data = _encode(event)
        at, start = self._at, self._at + _FRAME.size
        end = start + len(data)
        if end > SIZE or self._overflows:
            self._overflows = True
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
        self._overflows = False
        if self.holds:
            self._words[_LENGTH_WORD] = 0
            self._at = _FIRST


class _Record(msgspec.Struct):
    ts: str
    epoch: int = 0
    seq: int = 0


def _last(records: bytes) -> tuple[tuple[int, int], str]:
    """(what names the last event of a log, the `ts` of its last record)."""
    lines = records.splitlines()
    last_ts = ""
    for line in reversed(lines):
        with contextlib.suppress(msgspec.MsgspecError, ValueError):
            found = msgspec.json.decode(line, type=_Record)
            last_ts = last_ts or found.ts
            if found.seq:
                return (found.epoch, found.seq), last_ts
    return NOBODY, last_ts


def _append(fd: int, events: Iterable[Event], before: Path) -> None:
    """Those that are not in the log yet, behind its last whole line: what a kill tore is among them. before: the part
    of the log that was set aside last. Raises OSError."""
    size = os.fstat(fd).st_size
    end = os.pread(fd, _END, max(size - _END, 0))
    torn = len(end) - (end.rfind(b"\n") + 1)
    if 0 < torn < len(end):
        os.truncate(fd, size - torn)
    name, last_ts = _last(end[: len(end) - torn])
    if name == NOBODY:
        with contextlib.suppress(OSError):
            name, last_ts = _last(before.read_bytes()[-_END:])
    lines = []
    for event in events:
        if (event.epoch, event.seq) > name:
            document = event_document(event)
            document["ts"] = last_ts = max(document["ts"], last_ts)
            lines.append(msgspec.json.encode(document) + b"\n")
    if lines and torn == len(end) > 0:  # no line of it is whole
        lines.insert(0, b"\n")
    view = memoryview(b"".join(lines))
    while view:
        view = view[os.write(fd, view) :]
