"""The client's side of the control socket: raw HTTP, and what the supervisor rendered is copied out as it is.

`nssup ctl status` must cost little more than starting Python, so this file imports `_socket`, `os`, `sys` and the table
of verbs (a test keeps that); it knows no types of the rest of the package, and its exit codes are errors.ExitCode's.
"""

import _socket
import os
import sys

from nssup.verbs import Verb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

OK, FAILED, USAGE, UNAVAILABLE, NOT_PERMITTED, TIMED_OUT = 0, 1, 2, 69, 77, 124
INTERRUPTED, BROKEN_PIPE = 130, 141
PATIENCE = 30.0  # seconds for an answer that does not have to be waited for
LAST_STEPS = 5000  # milliseconds for a supervisor's process to end after it hung up

_VERSION = "HTTP/1.1"
_SAFE = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~/:@*")


class ClientError(Exception):
    """What a command ends with: one line, and the exit code."""

    def __init__(self, exit_code: int, text: str) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class Unanswered(ClientError):
    """The other side hung up without a word."""


class Options:
    """What was asked on the command line. What only some verbs have is in here when it was said."""

    json = False
    quiet = False
    socket: "str | None" = None
    wait = True
    timeout: "float | None" = None
    n: "str | None" = None

    def __init__(self) -> None:
        self.selectors: list[str] = []

    def get(self, field: str) -> object:
        return getattr(self, field, None)


# --- where ---------------------------------------------------------------------------------------------------------


def default_socket() -> str:
    """$NSSUP_SOCKET; else where a supervisor of this user listens when its config says nothing else."""
    named = os.environ.get("NSSUP_SOCKET")
    if named:
        return named
    if os.geteuid() == 0:
        return "/run/nssup/nssup.sock"
    runtime = _absolute("XDG_RUNTIME_DIR")
    if runtime:
        return f"{runtime}/nssup/nssup.sock"
    state = _absolute("XDG_STATE_HOME") or f"{_absolute('HOME') or os.path.expanduser('~')}/.local/state"
    return f"{state}/nssup/run/nssup.sock"


def _absolute(name: str) -> str:
    value = os.environ.get(name, "")
    return value.rstrip("/") if value.startswith("/") else ""


def connect(path: str) -> "_socket.socket":
    """Raises ClientError: nobody there (69), not permitted (77)."""
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        sock.connect(path)
    except PermissionError:
        sock.close()
        raise ClientError(NOT_PERMITTED, f"not permitted to connect to {path}") from None
    except OSError as e:
        sock.close()
        hint = "is one running? name its socket with --socket or $NSSUP_SOCKET"
        raise ClientError(UNAVAILABLE, f"no supervisor at {path}: {e.strerror or e} ({hint})") from None
    return sock


# --- writing requests ----------------------------------------------------------------------------------------------


def quote(text: str) -> str:
    """text as a value in a query."""
    return "".join(chr(b) if b in _SAFE else f"%{b:02X}" for b in os.fsencode(text))


def json_string(text: str) -> str:
    """text as a JSON string; what was no UTF-8 on the command line becomes a question mark."""
    plain = text.encode("utf-8", "replace").decode()
    escaped = plain.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c >= " " else f"\\u{ord(c):04x}" for c in escaped) + '"'


def query(pairs: "list[tuple[str, str]]") -> str:
    return "?" + "&".join([f"{name}={quote(value)}" for name, value in pairs]) if pairs else ""


def request(method: str, target: str, body: "str | None" = None, accept: str = "application/json") -> bytes:
    head = f"{method} {target} {_VERSION}\r\nHost: nssup\r\nAccept: {accept}\r\n"
    if body is None:
        return f"{head}\r\n".encode()
    data = body.encode()
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


def _pairs(verb: Verb, o: Options) -> "list[tuple[str, str]]":
    """What a verb that looks has to say in its query."""
    pairs = [("select", each) for each in o.selectors] if verb.operands.startswith("SEL") else []
    for option in verb.options:
        value = o.get(option.field)
        if option.sent and value is not None:
            pairs.append((option.sent, "1" if value is True else str(value)))
    if verb.name == "pid" and not o.json:
        pairs.append(("format", "ns_pid" if o.get("ns") else "host_pid"))
    if verb.wide and not o.json and is_terminal(1):
        pairs.append(("width", str(os.get_terminal_size(1).columns)))
        if may_color():
            pairs.append(("color", "1"))
    return pairs


def _body(verb: Verb, o: Options) -> str:
    """The body of a verb that changes something."""
    fields = []
    if verb.operands:
        fields.append(f'"select": [{", ".join([json_string(each) for each in o.selectors])}]')
    for option in verb.options:
        value = o.get(option.field)
        if option.sent and value is not None:
            fields.append(f'"{option.sent}": {_json(value)}')
    if verb.operands.endswith("N"):
        fields.append(f'"n": {json_string(o.n or "")}')
    return "{" + ", ".join(fields) + "}"


def _json(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value) if isinstance(value, int | float) else json_string(str(value))


def request_for(verb: Verb, o: Options) -> bytes:
    """The request that a verb makes."""
    accept = "application/json" if o.json else "text/plain"
    path = verb.path
    if "{" in path:
        path = path[: path.index("{")] + quote(o.selectors[0]).replace("/", "%2F")
    if verb.method == "GET":
        return request("GET", path + query(_pairs(verb, o)), None, accept)
    return request(verb.method, path, _body(verb, o), accept)


# --- reading answers -----------------------------------------------------------------------------------------------


class Answer:
    """The head of an answer, and the body as it comes."""

    def __init__(self, sock: "_socket.socket", path: str) -> None:
        self._sock = sock
        self._path = path
        self._buffer = b""
        self.status = 0  # of none yet
        while b"\r\n\r\n" not in self._buffer:
            self._buffer += self._more()
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        self.status = int(first[9:12])
        self.headers = {}
        for line in lines:
            name, _, value = line.partition(":")
            self.headers[name.lower()] = value.strip()

    def _more(self) -> bytes:
        try:
            data = self._sock.recv(1 << 18)
        except TimeoutError:
            raise ClientError(TIMED_OUT, f"the supervisor at {self._path} does not answer") from None
        except OSError as e:
            raise ClientError(UNAVAILABLE, f"the supervisor at {self._path} went away: {e.strerror}") from None
        if not data:
            kind = ClientError if self._buffer or self.status else Unanswered
            raise kind(UNAVAILABLE, f"the supervisor at {self._path} went away before it had answered")
        return data

    def exit_code(self) -> int:
        return int(self.headers.get("nssup-exit", OK if self.status < 400 else FAILED))

    def body(self) -> bytes:
        """The whole of it."""
        if "content-length" not in self.headers:
            return b"".join(self.chunks())
        size = int(self.headers["content-length"])
        parts = [self._buffer]
        have = len(self._buffer)
        while have < size:
            parts.append(self._more())
            have += len(parts[-1])
        return b"".join(parts)

    def chunks(self) -> "Iterator[bytes]":
        """The parts of a stream, until its end; ClientError when it breaks off."""
        while True:
            while b"\r\n" not in self._buffer:
                self._buffer += self._more()
            line, _, self._buffer = self._buffer.partition(b"\r\n")
            size = int(line.partition(b";")[0], 16)
            while len(self._buffer) < size + 2:
                self._buffer += self._more()
            if not size:
                return
            yield self._buffer[:size]
            self._buffer = self._buffer[size + 2 :]


def ask(path: str, data: bytes, timeout: "float | None") -> "tuple[_socket.socket, Answer]":
    """timeout: seconds without a byte; None for ever. The caller closes the socket.

    A supervisor that execs (`reexec`) hangs up on who has not asked yet: a question that changes nothing is put again.
    """
    try:
        return _ask(path, data, timeout)
    except Unanswered:
        if not data.startswith(b"GET "):
            raise
    return _ask(path, data, timeout)


def _ask(path: str, data: bytes, timeout: "float | None") -> "tuple[_socket.socket, Answer]":
    sock = connect(path)
    try:
        sock.settimeout(timeout)
        try:  # noqa: SIM105 - contextlib is dear
            sock.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            pass  # refused before it was all said; the answer says why
        return sock, Answer(sock, path)
    except BaseException:
        sock.close()
        raise


# --- writing out ---------------------------------------------------------------------------------------------------


def is_terminal(fd: int) -> bool:
    """Also false when it is closed, and by now something else could have its number."""
    return (sys.stdout, sys.stderr)[fd - 1] is not None and os.isatty(fd)


def may_color() -> bool:
    """no-color.org, and terminals that cannot."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def write(fd: int, data: bytes) -> None:
    """All of data to stdout or stderr; nothing if that was closed when we were started."""
    if (sys.stdout, sys.stderr)[fd - 1] is None:
        return
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            import select  # somebody else made our stdout non-blocking

            select.select([], [fd], [])
        except BrokenPipeError:
            raise
        except OSError as e:
            raise ClientError(FAILED, f"cannot write: {e.strerror}") from None


def complain(text: str) -> None:
    write(2, f"nssup: {text}\n".encode("utf-8", "surrogateescape"))


# --- the hot verbs -------------------------------------------------------------------------------------------------


def guarded(action: "Callable[[], int]") -> int:
    """The exit code of action, or that of the error it ends with."""
    try:
        return action()
    except ClientError as e:
        complain(str(e))
        return e.exit_code
    except BrokenPipeError:
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return INTERRUPTED


def perform(verb: Verb, o: Options) -> int:
    """Asks, writes what the answer says, and returns the exit code it says."""
    return guarded(lambda: _perform(verb, o))


def _perform(verb: Verb, o: Options) -> int:
    path = o.socket or default_socket()
    sock, answer = ask(path, request_for(verb, o), _patience(verb, o))
    try:
        body = answer.body()
        code = answer.exit_code()
        errors = int(answer.headers.get("nssup-stderr", 0))
        if answer.status >= 400 and not o.json and "nssup-stderr" not in answer.headers:
            errors = len(body)  # refused by HTTP itself
        out, err = body[: len(body) - errors], body[len(body) - errors :]
        if not o.quiet or o.json:
            write(1, out)
        write(2, err)
        if verb.name == "shutdown" and o.wait and code == OK:
            _wait_end(sock)
        return code
    finally:
        sock.close()


def wait_hung_up(sock: "_socket.socket") -> None:
    """Until the other side closed the connection."""
    try:
        while sock.recv(4096):
            pass
    except OSError:
        pass


def _patience(verb: Verb, o: Options) -> "float | None":
    if not (verb.waits and o.wait):
        return PATIENCE
    return None if o.timeout is None else o.timeout + PATIENCE


def _wait_end(sock: "_socket.socket") -> None:
    """Until the supervisor hung up, and for its process to end: then its locks are free."""
    import select

    host_pid = int.from_bytes(sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)[:4], sys.byteorder)
    try:
        pidfd = os.pidfd_open(host_pid) if host_pid > 0 else -1
    except OSError:
        pidfd = -1
    wait_hung_up(sock)
    if pidfd >= 0:
        process = select.poll()
        process.register(pidfd, select.POLLIN)
        process.poll(LAST_STEPS)
        os.close(pidfd)
