"""nssup's own events, as they are written: nssup.jsonl beside the workers' logs, and stderr.

They go through structlog, in one fused processor and without its global configuration, which belongs to the program we
may be embedded in. structlog takes long to import, so the first events wait: workers are launched before it is.
"""

import asyncio
import contextlib
import os
import queue
import select
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import msgspec

from nssup import render
from nssup.backlog import Backlog
from nssup.errors import no_thread
from nssup.events import Event
from nssup.logs import LogHub
from nssup.snapshot import event_document
from nssup.spec import OWN_LOG

if TYPE_CHECKING:
    from collections.abc import Mapping

Mode: TypeAlias = Literal["json", "text", "none"]

FIRST_AFTER = 0.2  # seconds that the first events wait, so that structlog is not imported before workers are launched
FIRST_WAITS = 5  # so often at most, while there are still workers to launch
BEHIND = 256 * 1024  # bytes that stderr may be behind before events are left out there
LAST_WAIT = 1.0  # seconds that `close` waits for a stderr that nobody reads

_DIM, _RED, _YELLOW, _RESET = "\x1b[2m", "\x1b[31m", "\x1b[33m", "\x1b[0m"
_HUES = {"failed": _RED, "lost": _RED, "log_failed": _RED, "events_lost": _RED, "backoff": _YELLOW}


class Journal:
    """Writes each event once: to hub's log `nssup` if hub has files, and to stderr as JSON or as text for people.

    record only takes it down; it is written in the next turn of the loop, with all others of this one. stderr is
    written by a thread of its own: it may be a pipe that nobody reads, and must not stop anything.
    """

    def __init__(
        self,
        hub: LogHub,
        stderr: Mode = "none",
        *,
        stderr_fd: int = 2,
        busy: Callable[[], bool] = lambda: False,
        backlog: Backlog | None = None,
    ) -> None:
        """stderr_fd: what is written to as stderr; not taken over. busy: whether there are workers to launch. backlog:
        where events wait that are not written yet, not taken over.

        Raises OSError where the log cannot be opened, or no thread be had for stderr.
        """
        self._hub = hub
        self._loop = asyncio.get_running_loop()
        self._events: list[Event] = []
        self._due: asyncio.Handle | None = None
        self._log: Any = None  # structlog's, from the first event on
        self._busy = busy
        self._waits = FIRST_WAITS
        if hub.has_files:
            hub.open_pool(OWN_LOG)
        self._output = _Output(hub, stderr, stderr_fd)
        if hub.has_files:
            self._output.last_ts = hub.last_ts(OWN_LOG)
        self._wanted = hub.has_files or stderr != "none"
        self._backlog = backlog

    def record(self, event: Event) -> None:
        if not self._wanted:
            return
        if self._backlog is not None:
            if not self._events and self._hub.is_written(OWN_LOG):
                self._backlog.clear()
            self._backlog.add(event)
        self._events.append(event)
        if self._due is None:
            self._due = self._loop.call_soon(self.flush) if self._log is not None else self._wait_first()

    def _wait_first(self) -> asyncio.Handle:
        self._waits -= 1
        return self._loop.call_later(FIRST_AFTER, self._first)

    def _first(self) -> None:
        if self._busy() and self._waits > 0:
            self._due = self._wait_first()
        else:
            self.flush()

    def flush(self) -> None:
        """Hands on what was recorded: to the hub, and to the thread that writes stderr."""
        if self._due is not None:
            self._due.cancel()
            self._due = None
        if not self._events:
            return
        if self._log is None:
            self._log = _structlog_over(self._output)
        events, self._events = self._events, []
        for event in events:
            self._log.info(event.event, record=event)
        self._output.flush()

    def close(self) -> None:
        """Flushes, and waits until stderr has it all, but not for ever. To be called before `LogHub.close`."""
        self.flush()
        self._wanted = False
        self._output.close()


def _structlog_over(output: "_Output") -> Any:  # noqa: ANN401 - structlog types its loggers so
    structlog = _import_structlog()
    return structlog.wrap_logger(
        output,
        processors=[_prepare],
        wrapper_class=structlog.make_filtering_bound_logger(0),
        context_class=dict,
    ).bind()


def _import_structlog() -> Any:  # noqa: ANN401
    """structlog, without rich, which it would import where it is there: 100 ms and 5 MB for nothing."""
    without_rich = "rich" not in sys.modules
    if without_rich:
        sys.modules["rich"] = None  # type: ignore[assignment] # imports of it fail
    try:
        import structlog
    finally:
        if without_rich:
            sys.modules.pop("rich", None)
    return structlog


def _prepare(logger: Any, method: str, fields: dict[str, Any]) -> tuple[tuple[dict[str, Any]], dict[str, Any]]:  # noqa: ANN401
    """The one processor: the arguments for _Output.info."""
    return (event_document(fields["record"]),), {}


class _Output:
    """What structlog calls: both places an event goes to."""

    def __init__(self, hub: LogHub, mode: Mode, fd: int) -> None:
        self.last_ts = ""
        self._hub = hub
        self._mode = mode
        self._color = mode == "text" and wants_color(fd, os.environ)
        self._stderr = None if mode == "none" else _Stderr(fd)
        self._file_lines: list[bytes] = []
        self._stderr_lines: list[bytes] = []

    def info(self, document: dict[str, Any]) -> None:
        document["ts"] = self.last_ts = max(document["ts"], self.last_ts)
        line = msgspec.json.encode(document) + b"\n"
        self._file_lines.append(line)
        if self._mode == "json":
            self._stderr_lines.append(line)
        elif self._mode == "text":
            self._stderr_lines.append(text_line(document, self._color).encode())

    def flush(self) -> None:
        if self._hub.has_files:
            with contextlib.suppress(KeyError):  # the log is closed: stderr still hears of it
                self._hub.append(OWN_LOG, b"".join(self._file_lines))
        if self._stderr is not None:
            if missed := self._stderr.take_missed():
                self._stderr.write([self._missed_line(missed)])
            self._stderr.write(self._stderr_lines)
        self._file_lines, self._stderr_lines = [], []

    def _missed_line(self, count: int) -> bytes:
        document = {"ts": self.last_ts, "event": "events_lost", "detail": {"count": count}}
        if self._mode == "json":
            return msgspec.json.encode(document) + b"\n"
        return text_line(document, self._color).encode()

    def close(self) -> None:
        if self._stderr is not None:
            self._stderr.close()


def wants_color(fd: int, environ: "Mapping[str, str]") -> bool:
    """Whether text for people on fd may be coloured (no-color.org)."""
    return os.isatty(fd) and not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"


def text_line(document: "Mapping[str, Any]", color: bool) -> str:
    """An event as a line for people: the time of day (UTC), then as `ctl events` says it."""
    ts = document["ts"]
    time, words = ts[11:23], render.event(document)[len(ts) + 1 :]
    if not color:
        return f"{time} {words}\n"
    hue = _HUES.get(document.get("to", "")) or _HUES.get(document["event"], "")
    return f"{_DIM}{time}{_RESET} {hue}{words}{_RESET if hue else ''}\n"


class _Stderr:
    """Writes lines to a descriptor that may block, from a thread that nothing waits for."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._behind = 0  # bytes in the queue or being written
        self._missed = 0  # lines that had no room
        # From the start: later there may be no process left for it. A daemon, or a stderr that nobody reads would hold
        # the interpreter at its exit.
        self._thread = threading.Thread(target=self._work, name="nssup-stderr", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:
            raise no_thread("stderr") from None

    def write(self, lines: list[bytes]) -> None:
        """Takes those of lines that there is room for."""
        taken = []
        with self._lock:
            for line in lines:
                if self._missed or self._behind + len(line) > BEHIND:
                    self._missed += 1
                else:
                    self._behind += len(line)
                    taken.append(line)
        if taken:
            self._lines.put(b"".join(taken))

    def take_missed(self) -> int:
        """How many lines were left out, if there is room again to say so; then it is forgotten."""
        with self._lock:
            if not self._missed or self._behind > BEHIND // 2:
                return 0
            missed, self._missed = self._missed, 0
            return missed

    def close(self) -> None:
        self._lines.put(None)
        self._thread.join(LAST_WAIT)

    def _work(self) -> None:
        while (data := self._lines.get()) is not None:
            self._write_out(data)
            with self._lock:
                self._behind -= len(data)

    def _write_out(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:  # somebody who shares it made it so
                poll = select.poll()
                poll.register(self._fd, select.POLLOUT)
                poll.poll()
            except OSError:  # the terminal or the reader is gone
                return
