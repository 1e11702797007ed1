"""One file of records, appended to off the loop.

A regular file and nothing else, never through a symbolic link. What an error tears is mended, so that every line but
perhaps the one before a marked gap is a whole record.
"""

import asyncio
import contextlib
import errno
import io
import os
import stat
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, cast

import msgspec
from aiofiles.base import AsyncBase
from aiofiles.threadpool.utils import delegate_to_executor

from nssup.errors import errno_name
from nssup.framing import Sheet
from nssup.lines import mark, seconds, stamp
from nssup.logread import End, aside, first_ts, is_record, read_end, timestamp

if TYPE_CHECKING:
    from nssup.staging import Batch, Part

FILE_MODE = 0o640
DIRECTORY_MODE = 0o750

_HEAD = 40  # bytes of a record, with its `ts`


class _Opened(NamedTuple):
    fd: int
    size: int
    torn: bool
    first_ts: str
    last_ts: str
    inode: int


def _open_log(path: Path) -> _Opened:
    """path opened for appending, made if need be; never anything but a regular file, never through a symbolic link."""
    _make_directory(path.parent)
    flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    try:
        fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, FILE_MODE)
    except FileExistsError:
        fd = os.open(path, flags)
    else:
        os.fchmod(fd, FILE_MODE)  # whatever the umask
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        begin, end = first_ts(path), read_end(path, status.st_size)
    except BaseException:
        os.close(fd)
        raise
    records = [line for line in end.split(b"\n")[:-1] if is_record(line)]
    torn = end[-1:] not in (b"", b"\n")
    return _Opened(fd, status.st_size, torn, begin, timestamp(records[-1]) if records else "", status.st_ino)


def _make_directory(path: Path) -> None:
    """path, 0750 whatever the umask if we make it; its parents as mkdir makes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir()
    except FileExistsError:
        return
    path.chmod(DIRECTORY_MODE)


class _Offset(msgspec.Struct):
    offset: int


_decode_offset = msgspec.json.Decoder(_Offset).decode


def first_lost(start: int, records: bytes | memoryview, kept: int) -> int:
    """Where in its stream the part of records, which begin at start of it, begins that comes after their first kept
    bytes: those are whole records, and not all."""
    if not kept:
        return start
    rest = bytes(records[kept:])
    return _decode_offset(rest[: rest.index(b"\n")]).offset


class Copy(NamedTuple):
    """Records of a batch for those who follow. size: of them all; fewer bytes are here where they are too many."""

    stream: int
    records: bytes
    size: int


class Written(NamedTuple):
    """What became of a batch. marks: how many bytes of the marks before it are in the file. size: the same of its
    records. lost: bytes of each stream that are not, because of error."""

    marks: int
    size: int
    error: OSError | None
    lost: Counter[int]
    copies: list[Copy]


class Rotation(NamedTuple):
    """size: bytes of a file at which it is set aside. age: seconds from its first record to the next one, at which it
    is. None: never. keep: how many set aside stay."""

    size: int | None
    age: float | None
    keep: int


NEVER = Rotation(None, None, 0)


class RecordFile:
    """One log's file, appended to. Its methods are called one at a time, in whatever thread. size: what is in it."""

    def __init__(self, path: Path, rotation: Rotation = NEVER) -> None:
        self.path = path
        self.rotation = rotation
        self.size = 0
        self.inode = 0
        self.last_ts = ""
        self._file: io.FileIO | None = None
        self._begun = ""  # `ts` of its first record
        self._torn = False  # the file ends in the middle of a line

    def open(self) -> io.FileIO:
        """Raises OSError."""
        if self._file is None:
            opened = _open_log(self.path)
            self.size, self._torn, self.inode = opened.size, opened.torn, opened.inode
            self.last_ts = max(self.last_ts, opened.last_ts)
            self._begun = opened.first_ts
            self._file = io.FileIO(opened.fd, "ab")
        return self._file

    def renew(self, ts: str) -> None:
        """Between two batches: sets the file aside when it is large or old enough, and lets go of one that goes by
        another name now, or by none. What cannot be renamed stays, and grows. ts: of the next record; empty: none."""
        if self._file is None:
            return
        try:
            status = os.stat(self.path, follow_symlinks=False)
        except OSError:
            self.close()
            return
        if status.st_ino != self.inode:
            self.close()
        elif self._is_due(status.st_size, ts) and not self._torn:
            with contextlib.suppress(OSError):
                for number in range(self.rotation.keep - 1, 0, -1):
                    with contextlib.suppress(FileNotFoundError):
                        aside(self.path, number).rename(aside(self.path, number + 1))
                self.path.rename(aside(self.path, 1))
                self.close()

    def _is_due(self, size: int, ts: str) -> bool:
        most, age, _ = self.rotation
        if most is not None and size >= most:
            return True
        return age is not None and bool(size and self._begun and ts) and seconds(ts) - seconds(self._begun) >= age

    def append(self, data: bytes | memoryview) -> tuple[int, OSError | None]:
        """Writes data, which is whole lines. Says how much of it, again in whole lines, is in the file now, and what
        stopped it. A line torn by an error is cut off the file, or, where that fails too, ended before the next."""
        head, done = b"", 0
        try:
            file = self.open()
            if self._torn:
                head = b"\n"
                data = head + data
            with memoryview(data) as view:
                while done < len(view):
                    done += file.write(view[done:])
        except OSError as error:
            return self._mend(bytes(data[:done]), len(head)), error
        self._torn = False
        self.size += done
        self._begun = self._begun or timestamp(bytes(data[len(head) : _HEAD]))
        return done - len(head), None

    def _mend(self, written: bytes, head: int) -> int:
        """After these bytes, of which the first head are not the caller's: how many of the caller's stay."""
        done, whole = len(written), written.rfind(b"\n") + 1
        if whole:
            self._torn = False
        if done > whole:
            self._torn = not self._cut(done - whole)
        self.size += done if self._torn else whole
        return max(whole - head, 0)

    def _cut(self, count: int) -> bool:
        """Takes the last count bytes off the file."""
        assert self._file is not None
        try:
            end = self._file.seek(0, os.SEEK_END)
            if end < count:
                return False  # somebody has emptied it meanwhile
            self._file.truncate(end - count)
        except OSError:
            return False
        return True

    def append_renewed(self, data: bytes) -> tuple[int, OSError | None]:
        """`renew`, then `append`."""
        self.renew(timestamp(data))
        return self.append(data)

    def append_batch(self, batch: "Batch", sheet: Sheet, marks: bytes, most: int) -> Written:
        """Writes marks and then a batch of staged bytes, its intent noted where its own records begin, sheet by sheet.

        The batch can be committed afterwards, whatever became of it. most: bytes of its records to be copied.
        """
        size, lost, copies = 0, Counter[int](), list[Copy]()
        self.renew(stamp(batch.entries[0].wall))
        marked, error = self.append(marks) if marks else (0, None)
        if error is None:
            error = self._begin(batch)
        for parts in batch.sheets(sheet):
            kept = 0
            with memoryview(sheet.memory) as view:
                if error is None:
                    kept, error = self.append(view[: sheet.size])
                    size += kept
                if error is not None:
                    lost.update(_lost(parts, view, kept))
                if most:
                    copies += _copies(parts, view, most)
                    most = max(most - sheet.size, 1)
        return Written(marked, size, error, lost, copies)

    def _begin(self, batch: "Batch") -> OSError | None:
        """Notes where the batch goes: behind a last line that is whole. Not yet, where that cannot be had."""
        try:
            if self._torn or self._file is None:
                _, error = self.append(b"")
                if error is not None:
                    return error
            batch.begin(os.fstat(self.open().fileno()))
        except OSError as error:
            return error
        return None

    def close(self) -> None:
        """A disk that fails now has failed before."""
        if self._file is not None:
            file, self._file = self._file, None
            self._torn = False
            with contextlib.suppress(OSError):
                file.close()


def _lost(parts: "list[Part]", records: memoryview, kept: int) -> Counter[int]:
    """Bytes of each stream whose records are not among the first kept bytes of a sheet."""
    lost, begin = Counter[int](), 0
    for stream, start, stop, end in parts:
        if end > kept:
            lost[stream] += stop - first_lost(start, records[begin:end], max(kept - begin, 0))
        begin = end
    return lost


def _copies(parts: "list[Part]", records: memoryview, most: int) -> list[Copy]:
    """The records of a sheet, of which the first most bytes are copied whole, and of the rest only their times."""
    copies, begin = [], 0
    for part in parts:
        size = part.end - begin
        copies.append(Copy(part.stream, bytes(records[begin : begin + (size if part.end <= most else _HEAD)]), size))
        begin = part.end
    return copies


@delegate_to_executor("append_renewed", "append_batch", "close")
class _OffLoop(AsyncBase):  # type: ignore[type-arg]  # it is generic in its stubs only
    """A RecordFile as aiofiles has files: its methods run on the executor."""

    if TYPE_CHECKING:

        async def append_renewed(self, data: bytes) -> tuple[int, OSError | None]: ...
        async def append_batch(self, batch: Batch, sheet: Sheet, marks: bytes, most: int) -> Written: ...
        async def close(self) -> None: ...


class LogFile:
    """A RecordFile, off the loop. end and last_ts are as of the last call that has returned."""

    def __init__(
        self,
        path: Path,
        loop: asyncio.AbstractEventLoop,
        executor: Callable[[], ThreadPoolExecutor],
        rotation: Rotation = NEVER,
    ) -> None:
        """executor: makes it if need be, with a single thread."""
        self.end = End(path, 0, 0)
        self.last_ts = ""
        self._loop = loop
        self._executor = executor
        self._records = RecordFile(path, rotation)
        self._off_loop: _OffLoop | None = None

    def open(self) -> None:
        """At once. Raises OSError."""
        self._off()  # if there is no thread to be had, nothing is made
        self._records.open()
        self._note()

    def _off(self) -> _OffLoop:
        if self._off_loop is None:
            self._off_loop = _OffLoop(cast("BinaryIO", self._records), self._loop, self._executor())
        return self._off_loop

    def _note(self) -> None:
        self.end = End(self._records.path, self._records.inode, self._records.size)
        self.last_ts = self._records.last_ts

    @property
    def rotation(self) -> Rotation:
        return self._records.rotation

    @rotation.setter
    def rotation(self, rotation: Rotation) -> None:
        self._records.rotation = rotation

    async def append(self, data: bytes) -> tuple[int, OSError | None]:
        """RecordFile.append_renewed."""
        answer = await self._off().append_renewed(data)
        self._note()
        return answer

    async def append_batch(self, batch: "Batch", sheet: Sheet, marks: bytes, most: int) -> Written:
        """RecordFile.append_batch."""
        answer = await self._off().append_batch(batch, sheet, marks, most)
        self._note()
        return answer

    async def close(self) -> None:
        """RecordFile.close."""
        if self._off_loop is not None:  # otherwise it was never opened, for want of a thread
            await self._off_loop.close()


class Outage:
    """A file cannot be written, since the error with this number. missing: bytes of output lost since, per worker and
    generation, as far as the log does not say so yet."""

    def __init__(self, number: int) -> None:
        self.errno = number
        self.missing: Counter[tuple[str | None, int | None]] = Counter()

    def marks(self, ts: str) -> bytes:
        """Records that say what is missing."""
        why = errno_name(self.errno)
        return b"".join(
            mark(ts, worker_id, generation, f"{lost} bytes of log dropped: {why}")
            for (worker_id, generation), lost in self.missing.items()
        )

    def forget(self, count: int) -> None:
        """The first count marks are in the log."""
        for life in list(self.missing)[:count]:
            del self.missing[life]
