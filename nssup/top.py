"""`nssup ctl top`: a full screen of workers, looked at anew every few seconds. On no terminal: one look."""

import contextlib
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator, Sequence

import msgspec

from nssup import client, screen
from nssup.screen import Sample, View

EVERY = 2.0  # seconds between looks
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_HOME, _END_OF_LINE, _REST = "\x1b[H", "\x1b[K", "\x1b[J"


def run(path: str, selectors: Sequence[str], every: float | None) -> int:
    if not (client.is_terminal(0) and client.is_terminal(1)):
        rows = screen.frame(_look(path, selectors), None, View(), height=1 << 30, width=1 << 30)
        client.write(1, "".join(f"{row}\n" for row in rows[:-1]).encode())
        return client.OK
    with _full_screen() as resized:
        return _Top(path, selectors, every or EVERY, resized).run()


def _look(path: str, selectors: Sequence[str]) -> Sample:
    pairs = [("select", each) for each in selectors] + [("stats", "1")]
    sock, answer = client.ask(path, client.request("GET", "/v1/status" + client.query(pairs)), client.PATIENCE)
    with contextlib.closing(sock):
        told = msgspec.json.decode(answer.body())
    if answer.status >= 400:
        error = told["error"]
        hint = f" ({error['hint']})" if error["hint"] else ""
        raise client.ClientError(answer.exit_code(), error["message"] + hint)
    return Sample(told, time.monotonic())


@contextlib.contextmanager
def _full_screen() -> Iterator[int]:
    """A descriptor that is readable when the size has changed, or a signal asks us to end (SIGTERM, SIGHUP)."""
    before = termios.tcgetattr(0)
    read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    woken = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    watched = (signal.SIGWINCH, signal.SIGTERM, signal.SIGHUP)
    handlers = {signo: signal.signal(signo, lambda signo, frame: None) for signo in watched}
    try:
        tty.setcbreak(0)
        client.write(1, _ENTER.encode())
        yield read_end
    finally:
        with contextlib.suppress(OSError, client.ClientError, termios.error):
            client.write(1, _LEAVE.encode())
            termios.tcsetattr(0, termios.TCSADRAIN, before)
        for signo, handler in handlers.items():
            signal.signal(signo, handler)
        signal.set_wakeup_fd(woken)
        os.close(read_end)
        os.close(write_end)


class _Top:
    def __init__(self, path: str, selectors: Sequence[str], every: float, resized: int) -> None:
        self._path = path
        self._selectors = selectors
        self._every = every
        self._resized = resized
        self._view: View | None = View()
        self._before: Sample | None = None
        self._sample = _look(path, selectors)

    def run(self) -> int:
        """Until `q`, a signal, or the end of the supervisor."""
        due = time.monotonic() + min(self._every, 0.5)  # what is used per second is known after a second look
        while self._view is not None:
            self._draw(self._view)
            if self._wait(max(0.0, due - time.monotonic())):
                continue
            self._before, self._sample = self._sample, _look(self._path, self._selectors)
            due = time.monotonic() + self._every
        return client.OK

    def _wait(self, seconds: float) -> bool:
        """Whether something other than time made us draw again."""
        ready, _, _ = select.select([0, self._resized], [], [], seconds)
        if self._resized in ready and {signal.SIGTERM, signal.SIGHUP} & {*os.read(self._resized, 512)}:
            self._view = None
        if 0 in ready:
            typed = os.read(0, 1024)
            for key in screen.keys_of(typed.decode("utf-8", "replace")) if typed else ["q"]:
                self._view = self._view and screen.pressed(self._view, key, max(os.get_terminal_size(1).lines - 4, 1))
        return bool(ready)

    def _draw(self, view: View) -> None:
        columns, lines = os.get_terminal_size(1)
        clock = time.strftime("%H:%M:%S")
        color = client.may_color()
        rows = screen.frame(self._sample, self._before, view, height=lines, width=columns, clock=clock, color=color)
        client.write(1, (_HOME + f"{_END_OF_LINE}\n".join(rows) + _END_OF_LINE + _REST).encode())
        sys.stdout.flush()
