"""Records onto sheets: native where nssup._frame is built, by lines.Framer where it is not; the same bytes either way.

A sheet is a piece of memory that is filled with the records of many streams, written, and used again: however much
output there is, no more than a sheet of it is in memory as records.
"""

from typing import TYPE_CHECKING

from nssup import lines

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

try:
    from nssup import _frame
except ImportError:  # built without it: `nssup version` says so
    NATIVE = False
else:
    NATIVE = True

FILL = 1024 * 1024  # bytes of records on a sheet, about
_ROOM = 160 * 1024  # what a single record may need: lines.PART bytes of it, each escaped, and once more as base64


class Sheet:
    """size: how much of its memory is filled."""

    __slots__ = ("_fill", "memory", "size")

    def __init__(self, fill: int = FILL) -> None:
        self._fill = fill
        self.memory = bytearray(fill + _ROOM)
        self.size = 0

    def is_full(self) -> bool:
        """Whether it is time to write it."""
        return self.size >= self._fill


class PlainFramer(lines.Framer):
    """A framer that can be set to where another one stood, and fills sheets."""

    __slots__ = ()

    def resume(self, offset: int, held: bytes, cut: bool) -> None:
        self.offset, self._held, self._cut = offset, held, cut

    def reached(self) -> tuple[int, bytes, bool]:
        """What `resume` takes."""
        return self.offset, self._held, self._cut

    def fill(self, sheet: Sheet, data: "Buffer", start: int, stop: int, ts: str, *pids: int | None) -> int:
        """As `feed` of data[start:stop], as far as there is room on the sheet: where the rest begins."""
        with memoryview(data) as view:
            records = self.feed(bytes(view[start:stop]), ts, *pids)
        self._put(sheet, records)
        return stop

    def finish(self, sheet: Sheet, ts: str, *pids: int | None) -> bool:
        """As `end`; false: there is no room on the sheet."""
        self._put(sheet, self.end(ts, *pids))
        return True

    def _put(self, sheet: Sheet, records: bytes) -> None:
        sheet.memory[sheet.size : sheet.size + len(records)] = records  # which may make it longer
        sheet.size += len(records)


class NativeFramer(PlainFramer):
    """The same with nssup._frame."""

    __slots__ = ()

    def feed(self, data: bytes, ts: str, host_pid: int | None, ns_pid: int | None) -> bytes:
        return self._all(data, ts, host_pid, ns_pid, ending=False)

    def end(self, ts: str, host_pid: int | None, ns_pid: int | None) -> bytes:
        return self._all(b"", ts, host_pid, ns_pid, ending=True)

    def _all(self, data: bytes, ts: str, host_pid: int | None, ns_pid: int | None, *, ending: bool) -> bytes:
        head = self._head(ts, host_pid, ns_pid).encode()
        memory, out, at = bytearray(_ROOM + 2 * len(data)), b"", 0
        while True:
            size, at, self.offset, self._held, self._cut = _frame.frame(
                memory, 0, data, at, len(data), head, self.offset, self._held, self._cut, ending
            )
            out += memory[:size]
            if at == len(data) and not (ending and self._held):
                return out

    def fill(self, sheet: Sheet, data: "Buffer", start: int, stop: int, ts: str, *pids: int | None) -> int:
        head = self._head(ts, *pids).encode()
        sheet.size, start, self.offset, self._held, self._cut = _frame.frame(
            sheet.memory, sheet.size, data, start, stop, head, self.offset, self._held, self._cut, False
        )
        return start

    def finish(self, sheet: Sheet, ts: str, *pids: int | None) -> bool:
        head = self._head(ts, *pids).encode()
        sheet.size, _, self.offset, self._held, self._cut = _frame.frame(
            sheet.memory, sheet.size, b"", 0, 0, head, self.offset, self._held, self._cut, True
        )
        return not self._held


Framer: type[PlainFramer] = NativeFramer if NATIVE else PlainFramer
