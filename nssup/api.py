"""What a handler of the API has and gives: the supervisor it looks at and steers, requests, replies, refusals."""

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Container, Coroutine, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Protocol, TypeAlias

import msgspec

from nssup import http, procfs, render, wire
from nssup.custody import Orphan
from nssup.errors import ControlError, ExitCode
from nssup.events import Event, Input, State
from nssup.operation import Goal
from nssup.snapshot import Source

# --- what it needs from outside ------------------------------------------------------------------------------------


class Follow(Protocol):
    """Batches of whole record lines as they come, until it is closed."""

    def __aiter__(self) -> AsyncIterator[bytes]: ...
    def close(self) -> None: ...


class Logs(Protocol):
    """The records of all pools, as logs.LogHub has them."""

    def follow(
        self, pools: Iterable[str] | None = None, *, workers: Container[str] | None = None, max_bytes: int = ...
    ) -> Follow: ...
    async def tail(self, log: str, n: int, workers: Container[str] | None = None) -> list[bytes]: ...
    def last_records(self, worker_id: str, n: int) -> list[bytes]: ...
    def dropped_bytes(self, log: str, worker_id: str | None = None) -> int: ...


class Supervisor(Source, Protocol):
    """What is steered: what can be looked at, and what can be done."""

    @property
    def logs(self) -> Logs: ...
    def feed(self, worker_id: str, event: Input) -> None: ...
    def scale_pools(self, wanted: Mapping[str, int]) -> None: ...
    def enable_pools(self, pools: Iterable[str], enabled: bool) -> None: ...
    def subscribe(self, callback: Callable[[Event], None]) -> Callable[[], None]: ...
    def host_pid_owner(self, host_pid: int) -> str | None: ...
    def environment(self, worker_id: str) -> Sequence[bytes]: ...
    def configured_workers(self, pool: str) -> int | None: ...
    def tree(self, worker_id: str) -> Sequence[procfs.Process]: ...
    def signal_inside(self, worker_id: str, ns_pid: int, signo: int) -> bool: ...
    async def run_inside(self, worker_id: str, argv: Sequence[bytes], stdio: Sequence[int]) -> wire.Done | None: ...
    def orphans(self) -> Sequence[Orphan]: ...
    def set_aside(self) -> Sequence[str]: ...
    def outlives_us(self, worker_id: str) -> bool: ...
    def leave_running(self) -> None: ...
    def shutdown(self) -> None: ...


class Upgrade(Protocol):
    """A host of the supervisor that can exec the code installed now in its place. failed: why the last time it could
    not."""

    failed: str | None

    async def rehearse(self) -> str:
        """The version of that code, which could take over. Raises ControlError."""

    def begin(self) -> None:
        """Once the answer is out, do it. Raises ControlError."""


class Reply(NamedTuple):
    status: int
    headers: Sequence[tuple[str, str]]
    body: bytes | AsyncGenerator[bytes, None]


Answer: TypeAlias = Reply | Coroutine[Any, Any, Reply]

# --- what clients send ---------------------------------------------------------------------------------------------

Count = Annotated[int, msgspec.Meta(ge=0, le=1_000_000)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]


class Nothing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """No parameters."""


class StatusQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """format: json unless the client accepts text/plain; host_pid and ns_pid give bare numbers, one a line.
    unfold, color, width: of the text. stats: cpu and memory also of many workers."""

    select: list[str] = []
    stats: bool = False
    format: Literal["json", "text", "host_pid", "ns_pid"] | None = None
    unfold: bool = False
    color: bool = False
    width: Count | None = None


class MetricsQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """stats: cpu and memory also of many workers."""

    stats: bool = False


class Selection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """color, width: of the text."""

    select: list[str] = []
    color: bool = False
    width: Count | None = None


class WorkersQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    select: list[str] = []
    pool: str | None = None
    state: State | None = None
    stats: bool = False


class ExplainQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """n: how many launches to come to tell at most."""

    select: list[str] = []
    n: Annotated[int, msgspec.Meta(ge=1, le=100)] = 5


class HistoryQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """n: how many lives of each worker at most, the last ones."""

    select: list[str] = []
    n: Count = 10


class EventsQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The stream starts with a snapshot; or with the last n events; or with those after since (`epoch:seq`)."""

    select: list[str] = []
    follow: bool = True
    n: Count | None = None
    since: str | None = None


class LogsQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """n: so many of the last records of each pool."""

    select: list[str] = []
    follow: bool = False
    n: Count = 100


class Command(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """wait: for what the command is about, or for a goal of one's own. timeout: to wait at most, in seconds; none by
    default."""

    select: list[str] = []
    all: bool = False
    wait: bool | Goal = False
    timeout: Seconds | None = None


class KillCommand(Command, frozen=True, forbid_unknown_fields=True):
    """signal: name or number. tree: to every process of the worker. ns_pid: to that one, by its PID in there."""

    signal: str | int = "TERM"
    tree: bool = False
    ns_pid: Annotated[int, msgspec.Meta(ge=2, le=1 << 22)] | None = None


class ExecCommand(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One worker. argv: the command. stdio: descriptors of the process that asks, for the command's 0, 1 and 2."""

    select: list[str]
    argv: Annotated[list[str], msgspec.Meta(min_length=1)]
    stdio: Annotated[list[Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]], msgspec.Meta(max_length=3)] = []


class Executed(msgspec.Struct, frozen=True):
    """How the command ended. error: why it was not run, or cut off."""

    code: int | None
    signal: int | None
    error: str | None


class ScaleCommand(Command, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """n: how many workers, or `+2`, `-1`."""

    n: int | str


class EnableCommand(Command, frozen=True, forbid_unknown_fields=True):
    """select: pools. now: start, or stop, their workers as well; wait is about that."""

    now: bool = False


class Shutdown(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """wait: until every worker is down that has to be. leave_running: who can live without the supervisor goes on."""

    wait: bool = False
    timeout: Seconds | None = None
    leave_running: bool = False


class Accepted(msgspec.Struct, frozen=True):
    """seq: number of the last event published before the answer."""

    seq: int
    results: list[render.Result]


class Left(Accepted, frozen=True):
    """left: the workers that go on. stopped: those that cannot, and are up again with the next supervisor."""

    left: list[str]
    stopped: list[str]


class Orphans(msgspec.Struct, frozen=True):
    """orphans: lives that may be ours and cannot be proven so; they are never signalled. set_aside: a line for each
    note or file that could not be read."""

    orphans: list[dict[str, Any]]
    set_aside: list[str]


class Become(msgspec.Struct, frozen=True):
    """supervisor: the one that answers, and ends. version: of the code that takes its place."""

    supervisor: render.SupervisorDocument
    version: str


class Form(NamedTuple):
    """How the client wants it. text: to read, not to parse. sse: a stream as server-sent events; last_id: the last of
    them that it has seen."""

    text: bool = False
    sse: bool = False
    last_id: str | None = None


class Call(NamedTuple):
    """One request to one route, checked."""

    arguments: Sequence[str]
    query: Any
    command: Any
    form: Form
    peer: http.Peer

    @property
    def text(self) -> bool:
        return self.form.text


# --- replies -------------------------------------------------------------------------------------------------------


def json_reply(document: object, *, status: int = 200, code: int = 0) -> Reply:
    headers = [("Content-Type", "application/json"), ("Nssup-Exit", str(int(code)))]
    return Reply(status, headers, msgspec.json.encode(document) + b"\n")


def text_reply(out: str, err: str = "", *, status: int = 200, code: int = 0) -> Reply:
    """Nssup-Stderr: so many bytes at the end of the body are for stderr."""
    tail = err.encode("utf-8", "surrogateescape")
    headers = [("Content-Type", "text/plain; charset=utf-8"), ("Nssup-Exit", str(int(code)))]
    headers.append(("Nssup-Stderr", str(len(tail))))
    return Reply(status, headers, out.encode("utf-8", "surrogateescape") + tail)


def stream_reply(body: AsyncGenerator[bytes, None], form: Form) -> Reply:
    """body: lines, whole ones, each a JSON object."""
    kind = "text/event-stream" if form.sse else "application/x-ndjson"
    return Reply(200, [("Content-Type", kind), ("Nssup-Exit", "0")], _events(body) if form.sse else body)


class _Told(msgspec.Struct):
    event: str = "record"
    epoch: int | None = None
    seq: int | None = None


_decode_told = msgspec.json.Decoder(_Told).decode


async def _events(body: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """Lines as server-sent events (WHATWG HTML, 9.2): the id is what `since` takes."""
    async with contextlib.aclosing(body):
        async for batch in body:
            yield b"".join(map(_sse, batch.splitlines())) or b":\n\n"


def _sse(line: bytes) -> bytes:
    told = _decode_told(line)
    number = f"id: {told.epoch}:{told.seq}\n" if told.seq is not None else ""
    return f"{number}event: {told.event}\ndata: ".encode() + line + b"\n\n"


def failure_reply(e: ControlError, text: bool) -> Reply:
    if text:
        return text_reply("", f"nssup: {e}\n", status=e.http_status, code=e.exit_code)
    error = {"code": e.code, "message": e.message, "hint": e.hint}
    return json_reply({"error": error}, status=e.http_status, code=e.exit_code)


def usage(message: str, hint: str = "") -> ControlError:
    return ControlError("usage", message, hint=hint, exit_code=ExitCode.USAGE)


def forbidden(message: str, hint: str) -> ControlError:
    return ControlError("not-permitted", message, hint=hint, http_status=403, exit_code=ExitCode.NOT_PERMITTED)


def bad(message: str) -> ControlError:
    return ControlError("bad-request", message, exit_code=ExitCode.USAGE)
