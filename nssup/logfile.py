"""One file of records: appended to off the loop, and read back from its end.

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
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from aiofiles.threadpool import wrap

from nssup.errors import errno_name
from nssup.lines import mark

BLOCK = 64 * 1024  # bytes of a file looked at at once, from its end
LONGEST = 256 * 1024  # bytes of a record: more is none of ours
FILE_MODE = 0o640
DIRECTORY_MODE = 0o750

_START = b'{"ts":"'
_TS = slice(len(_START), len(_START) + 27)
_WORKER = _TS.stop + len(b'","worker":')


def timestamp(records: bytes) -> str:
    """The `ts` of the first of records, which all begin with it."""
    return records[_TS].decode()


class _Opened(NamedTuple):
    fd: int
    size: int
    torn: bool
    last_ts: str


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
        end = _read_end(path, status.st_size)
    except BaseException:
        os.close(fd)
        raise
    records = [line for line in end.split(b"\n")[:-1] if is_record(line)]
    return _Opened(fd, status.st_size, end[-1:] not in (b"", b"\n"), timestamp(records[-1]) if records else "")


def _read_end(path: Path, size: int) -> bytes:
    if not size:
        return b""
    fd = _open_for_reading(path)
    try:
        return os.pread(fd, BLOCK, max(size - BLOCK, 0))
    finally:
        os.close(fd)


def _open_for_reading(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)


def _make_directory(path: Path) -> None:
    """path, 0750 whatever the umask if we make it; its parents as mkdir makes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir()
    except FileExistsError:
        return
    path.chmod(DIRECTORY_MODE)


class LogFile:
    """One file, appended to. Its methods are called one at a time."""

    def __init__(self, path: Path, loop: asyncio.AbstractEventLoop, executor: Callable[[], ThreadPoolExecutor]) -> None:
        self.path = path
        self.size = 0
        self.last_ts = ""
        self._loop = loop
        self._executor = executor
        self._file: Any = None
        self._torn = False  # the file ends in the middle of a line

    def open(self) -> None:
        """Raises OSError."""
        if self._file is None:
            self._executor()  # if there is none to be had, nothing is made
            self._adopt(_open_log(self.path))

    def _adopt(self, opened: _Opened) -> None:
        self.size, self._torn, self.last_ts = opened.size, opened.torn, opened.last_ts
        self._file = wrap(io.FileIO(opened.fd, "ab"), loop=self._loop, executor=self._executor())

    async def append(self, data: bytes) -> tuple[int, OSError | None]:
        """Writes data, which is whole lines. Says how much of it, again in whole lines, is in the file now, and what
        stopped it. A line torn by an error is cut off the file, or, where that fails too, ended before the next."""
        head, done = b"", 0
        try:
            if self._file is None:
                self._adopt(await self._loop.run_in_executor(self._executor(), _open_log, self.path))
            head = b"\n" if self._torn else b""
            view = memoryview(head + data)
            while done < len(view):
                done += await self._file.write(view[done:])
        except OSError as error:
            return await self._mend(head, data, done), error
        self._torn = False
        self.size += done
        return len(data), None

    async def status(self) -> os.stat_result | OSError:
        """What the file is, opened and with its last line whole; or why it cannot be had."""
        if self._file is None or self._torn:
            _, error = await self.append(b"")
            if error is not None:
                return error
        return os.fstat(self._file.fileno())

    async def _mend(self, head: bytes, data: bytes, done: int) -> int:
        """After done bytes of head and data, which is how much of data stays."""
        whole = (head + data).rfind(b"\n", 0, done) + 1
        if whole:
            self._torn = False
        if done > whole:
            self._torn = not await self._cut(done - whole)
        self.size += done if self._torn else whole
        return max(whole - len(head), 0)

    async def _cut(self, count: int) -> bool:
        """Takes the last count bytes off the file."""
        try:
            end = await self._file.seek(0, os.SEEK_END)
            if end < count:
                return False  # somebody has emptied it meanwhile
            await self._file.truncate(end - count)
        except OSError:
            return False
        return True

    async def close(self) -> None:
        """A disk that fails now has failed before."""
        if self._file is not None:
            file, self._file = self._file, None
            with contextlib.suppress(OSError):
                await file.close()


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


def is_record(line: bytes) -> bool:
    return line.startswith(_START) and line.endswith(b"}")


def _belongs(line: bytes, workers: Container[str] | None) -> bool:
    if workers is None:
        return True
    return line[_WORKER + 1 : line.find(b'"', _WORKER + 1)].decode(errors="replace") in workers


def pick_last(lines: Iterable[bytes], n: int, workers: Container[str] | None) -> list[bytes]:
    """Of lines, which come last first, the n last that are records of these workers, in the right order."""
    found: list[bytes] = []
    for line in lines:
        if len(found) >= n:
            break
        if is_record(line) and _belongs(line, workers):
            found.append(line + b"\n")
    found.reverse()
    return found


def last_records(path: Path, size: int, n: int, workers: Container[str] | None, limit: int) -> list[bytes]:
    """The last n records within the first size bytes of a file, of which the last limit are looked at; [] where it
    cannot be read."""
    try:
        fd = _open_for_reading(path)
    except OSError:
        return []
    try:
        return pick_last(_lines_from_end(fd, min(size, os.fstat(fd).st_size), limit), n, workers)
    except OSError:
        return []
    finally:
        os.close(fd)


def _lines_from_end(fd: int, end: int, limit: int) -> Iterator[bytes]:
    rest = b""
    floor = max(end - limit, 0)
    while end > floor:
        start = max(end - BLOCK, floor)
        rest, *lines = (os.pread(fd, end - start, start) + rest).split(b"\n")
        yield from reversed(lines)
        if len(rest) > LONGEST:
            rest = b""
        end = start
    if not floor:
        yield rest
