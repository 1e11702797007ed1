"""Where an answer of a Tasks worker ends in what it writes: lines, or MessagePack values one after the other.

Pure and incremental: bytes come as they come, and none is looked at twice.
Source: https://github.com/msgpack/msgpack/blob/master/spec.md
"""

from collections.abc import Iterator
from typing import Protocol

# First byte -> (bytes of the length that follows, bytes of content beside that, values for each unit of the length).
# Values: 0: the length counts bytes; 1: elements; 2: pairs.
_SIZED = {
    0xC4: (1, 0, 0), 0xC5: (2, 0, 0), 0xC6: (4, 0, 0),  # bin
    0xC7: (1, 1, 0), 0xC8: (2, 1, 0), 0xC9: (4, 1, 0),  # ext: its type is one byte more
    0xD9: (1, 0, 0), 0xDA: (2, 0, 0), 0xDB: (4, 0, 0),  # str
    0xDC: (2, 0, 1), 0xDD: (4, 0, 1),  # array
    0xDE: (2, 0, 2), 0xDF: (4, 0, 2),  # map
}  # fmt: skip
_FIXED = {
    0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8,  # numbers
    0xD4: 2, 0xD5: 3, 0xD6: 5, 0xD7: 9, 0xD8: 17,  # fixext
}  # fmt: skip
_NEVER_USED = 0xC1


class BadFrame(ValueError):
    """What came is no answer: too long, or not of the protocol."""


class Frames(Protocol):
    """Takes bytes, gives whole answers. Raises BadFrame, after which it is of no use."""

    def feed(self, data: bytes) -> Iterator[bytes]: ...


class Lines:
    """Answers that end with a newline, which is not part of them."""

    def __init__(self, limit: int) -> None:
        """limit: bytes of an answer."""
        self._limit = limit
        self._held: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> Iterator[bytes]:
        while data:
            line, newline, data = data.partition(b"\n")
            self._size += len(line)
            if self._size > self._limit:
                raise BadFrame(f"an answer is longer than {self._limit} bytes")
            self._held.append(line)
            if newline:
                whole = b"".join(self._held)
                self._held, self._size = [], 0
                yield whole


class Values:
    """Answers that are MessagePack values."""

    def __init__(self, limit: int) -> None:
        """limit: bytes of an answer."""
        self._limit = limit
        self._buffer = bytearray()
        self._at = 0  # bytes of the value that are understood
        self._open = 1  # values that are still to come until it is whole

    def feed(self, data: bytes) -> Iterator[bytes]:
        self._buffer += data
        while self._advance():
            whole = bytes(memoryview(self._buffer)[: self._at])
            del self._buffer[: self._at]
            self._at, self._open = 0, 1
            yield whole

    def _advance(self) -> bool:
        """Understands what is there. Whether a value is whole."""
        while self._open:
            head = self._head()
            if head is None or len(self._buffer) < self._at:
                break
            size, values = head
            if self._at + size > self._limit:
                raise BadFrame(f"an answer is longer than {self._limit} bytes")
            self._at += size
            self._open += values - 1
        return not self._open and self._at <= len(self._buffer)

    def _head(self) -> tuple[int, int] | None:
        """Bytes of the next value without those in it, and how many are in it; None: it is not there yet."""
        if self._at >= len(self._buffer):
            return None
        first = self._buffer[self._at]
        if first <= 0x7F or first >= 0xE0 or first in (0xC0, 0xC2, 0xC3):
            return 1, 0
        if first <= 0x8F:
            return 1, 2 * (first & 0x0F)
        if first <= 0x9F:
            return 1, first & 0x0F
        if first <= 0xBF:
            return 1 + (first & 0x1F), 0
        if first == _NEVER_USED:
            raise BadFrame("what came is no MessagePack")
        if first in _FIXED:
            return 1 + _FIXED[first], 0
        return self._sized(*_SIZED[first])

    def _sized(self, width: int, more: int, values: int) -> tuple[int, int] | None:
        begin = self._at + 1
        if begin + width > len(self._buffer):
            return None
        length = int.from_bytes(self._buffer[begin : begin + width])
        return (1 + width, length * values) if values else (1 + width + more + length, 0)
