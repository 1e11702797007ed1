"""Records read back from a file, from its end."""

import itertools
import os
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from nssup.lines import seconds

BLOCK = 64 * 1024  # bytes of a file looked at at once, from its end
LONGEST = 256 * 1024  # bytes of a record: more is none of ours

_START = b'{"ts":"'
_TS = slice(len(_START), len(_START) + 27)
_WORKER = _TS.stop + len(b'","worker":')


def timestamp(records: bytes) -> str:
    """The `ts` of the first of records, which all begin with it."""
    return records[_TS].decode()


def open_for_reading(path: Path) -> int:
    """A descriptor of a regular file, never through a symbolic link. Raises OSError."""
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)


def first_ts(path: Path) -> str:
    """The `ts` of a file's first record; empty: it has none."""
    fd = open_for_reading(path)
    try:
        begin = os.pread(fd, _WORKER, 0)
    finally:
        os.close(fd)
    found = begin[_TS].decode("ascii", "replace")
    try:
        seconds(found)
    except ValueError:
        return ""
    return found


def read_end(path: Path, size: int) -> bytes:
    """The last bytes, BLOCK at most, of a file of that size."""
    if not size:
        return b""
    fd = open_for_reading(path)
    try:
        return os.pread(fd, BLOCK, max(size - BLOCK, 0))
    finally:
        os.close(fd)


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


class End(NamedTuple):
    """Up to where a log was written: the name of its file, which file that was then, and its size. inode 0: none."""

    path: Path
    inode: int
    size: int


def aside(path: Path, number: int) -> Path:
    """What a file of a log is called when it was set aside; 1 is the latest."""
    return path.with_name(f"{path.name}.{number}")


def last_records(end: End, n: int, workers: Container[str] | None, limit: int) -> list[bytes]:
    """The last n records up to there, also of the files before that were set aside; limit: bytes looked at, at most.

    Of a file that cannot be read there are none.
    """
    found: list[bytes] = []
    seen: set[int] = set()
    for path in itertools.chain([end.path], (aside(end.path, number) for number in itertools.count(1))):
        try:
            fd = open_for_reading(path)
        except OSError:
            break
        try:
            status = os.fstat(fd)
            if status.st_ino in seen or (not seen and status.st_ino != end.inode):
                continue  # set aside while we looked, or begun since then
            size = status.st_size if seen else min(end.size, status.st_size)
            seen.add(status.st_ino)
            found = pick_last(_lines_from_end(fd, size, limit), n - len(found), workers) + found
            limit -= size
        except OSError:
            break
        finally:
            os.close(fd)
        if len(found) >= n or limit <= 0:
            break
    return found


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
