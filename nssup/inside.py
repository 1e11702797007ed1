"""`nssup ctl exec`: a command in a worker's namespaces, on the caller's own descriptors.

The supervisor takes our descriptors, or those of a pseudo-terminal of ours, and the worker's init runs the command on
them: not a byte of what it says goes through the supervisor. We wait for the answer, which comes when the command has
ended; when we are gone, the connection is, and the command is killed.
"""

import contextlib
import os
import select
import signal
from collections.abc import Sequence

import msgspec

from nssup import client
from nssup.foreground import Signals
from nssup.terminal import Relay, Terminal

FAILED = 125  # we could not run it: as `run`
_ENDS = frozenset({signal.SIGHUP, signal.SIGTERM, signal.SIGQUIT})


def execute(path: str, selectors: Sequence[str], command: Sequence[str], *, tty: bool, interactive: bool) -> int:
    """The command's own exit code, 128+n for a signal; 125 when it could not be run, 126, 127 as for a shell."""
    with Signals() as signals:
        if tty:
            return _on_terminal(path, selectors, command, signals)
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            stdio = (0 if interactive and _is_open(0) else nothing, *(fd if _is_open(fd) else nothing for fd in (1, 2)))
            return _Session(path, selectors, command, stdio, signals, None).run()
        finally:
            os.close(nothing)


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _on_terminal(path: str, selectors: Sequence[str], command: Sequence[str], signals: Signals) -> int:
    terminal = Terminal(0) if os.isatty(0) else None
    try:
        if terminal:
            terminal.follow()
        relay = Relay(0, 1, terminal, size_of=next((fd for fd in range(3) if os.isatty(fd)), None))
        try:
            return _Session(path, selectors, command, (relay.slave,) * 3, signals, relay).run()
        finally:
            relay.close()
    finally:
        if terminal:
            terminal.restore()


class _Session:
    def __init__(
        self,
        path: str,
        selectors: Sequence[str],
        command: Sequence[str],
        stdio: Sequence[int],
        signals: Signals,
        relay: Relay | None,
    ) -> None:
        self._path = path
        self._signals = signals
        self._relay = relay
        self._ended_by = 0  # the signal that we were told to end by
        body = msgspec.json.encode({"select": selectors, "argv": list(map(_text, command)), "stdio": stdio})
        self._request = client.request("POST", "/v1/exec", body.decode())

    def run(self) -> int:
        sock = client.connect(self._path)
        try:
            sock.sendall(self._request)
            while not self._answered(sock.fileno()):
                if self._ended_by:
                    return 128 + self._ended_by
            answer = client.Answer(sock, self._path)
            body = answer.body()
        finally:
            sock.close()
        self._drain()
        return self._tell(answer, body)

    def _answered(self, sock: int) -> bool:
        """Waits for something to happen, and handles it. Whether the answer has begun."""
        relayed = self._relay.interest() if self._relay else {}
        poll = select.poll()
        for fd, events in {**relayed, self._signals.fd: select.POLLIN, sock: select.POLLIN}.items():
            poll.register(fd, events)
        ready = dict(poll.poll())
        if self._relay:
            for fd in relayed.keys() & ready.keys():
                self._relay.ready(fd, ready[fd])
        for signo in self._signals.take():
            self._take(signo)
        return sock in ready

    def _take(self, signo: int) -> None:
        if signo == signal.SIGWINCH and self._relay:
            self._relay.resize()
        elif signo == signal.SIGCONT and self._relay:
            self._relay.resume()
        elif signo in _ENDS or signo == signal.SIGINT:
            self._ended_by = signo

    def _drain(self) -> None:
        """The last of what it said; a signal ends the wait for whoever reads it."""
        while self._relay and not self._relay.drain() and not self._ended_by:
            poll = select.poll()
            for fd, events in self._relay.interest().items():
                poll.register(fd, events)
            poll.register(self._signals.fd, select.POLLIN)
            poll.poll()
            for signo in self._signals.take():
                self._take(signo)

    def _tell(self, answer: client.Answer, body: bytes) -> int:
        if self._relay and self._relay.terminal:
            self._relay.terminal.restore()
        told = msgspec.json.decode(body)
        if answer.status >= 400:
            error = told["error"]
            client.complain(error["message"] + (f" ({error['hint']})" if error["hint"] else ""))
        elif told["error"]:
            client.complain(f"exec: {told['error']}")
        return answer.exit_code()


def _text(word: str) -> str:
    with contextlib.suppress(UnicodeEncodeError):
        word.encode()
        return word
    raise client.ClientError(client.USAGE, f"{word!r} is no UTF-8: exec cannot pass it on")
