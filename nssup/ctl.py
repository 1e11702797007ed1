"""The API: one table of routes, and handlers that translate: request -> inputs to the workers -> document or stream.

No operation lives in a request: a handler feeds what was asked for and then listens to published events until each
worker is settled, the time is up or its client is gone; the workers go on either way. Nothing here polls.
"""

import asyncio
import heapq
import os
import urllib.parse
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Container, Coroutine, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Protocol, TypeAlias

import msgspec

from nssup import http, lives, operation, procfs, render, units
from nssup.custody import Orphan
from nssup.errors import ControlError, ExitCode
from nssup.events import Event, Input, Kill, Restart, Start, State, Stop
from nssup.listener import Listener
from nssup.operation import UP, Goal, Judge, Operation
from nssup.selection import Meant, Selected, select, select_pools
from nssup.snapshot import STATS_ROWS, Snapshot, Source, event_line, members

EVENTS_KEPT = 1000  # for `n` and `since`
EVENTS_BEHIND = 1000  # that a follower may be late by before it loses some
LOG_BYTES_BEHIND = 4 << 20  # the same for a follower of logs
MOST_WORKERS = 100_000

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
    def subscribe(self, callback: Callable[[Event], None]) -> Callable[[], None]: ...
    def host_pid_owner(self, host_pid: int) -> str | None: ...
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


class WorkersQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    select: list[str] = []
    pool: str | None = None
    state: State | None = None
    stats: bool = False


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
    """signal: name or number. tree: to every process of the worker."""

    signal: str | int = "TERM"
    tree: bool = False


class ScaleCommand(Command, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """n: how many workers, or `+2`, `-1`."""

    n: int | str


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


class Call(NamedTuple):
    """One request to one route, checked. text: the client wants to read it, not to parse it."""

    arguments: Sequence[str]
    query: Any
    command: Any
    text: bool


# --- replies -------------------------------------------------------------------------------------------------------


def _json(document: object, *, status: int = 200, code: int = 0) -> Reply:
    headers = [("Content-Type", "application/json"), ("Nssup-Exit", str(int(code)))]
    return Reply(status, headers, msgspec.json.encode(document) + b"\n")


def _text(out: str, err: str = "", *, status: int = 200, code: int = 0) -> Reply:
    """Nssup-Stderr: so many bytes at the end of the body are for stderr."""
    tail = err.encode("utf-8", "surrogateescape")
    headers = [("Content-Type", "text/plain; charset=utf-8"), ("Nssup-Exit", str(int(code)))]
    headers.append(("Nssup-Stderr", str(len(tail))))
    return Reply(status, headers, out.encode("utf-8", "surrogateescape") + tail)


def _stream(body: AsyncGenerator[bytes, None]) -> Reply:
    return Reply(200, [("Content-Type", "application/x-ndjson"), ("Nssup-Exit", "0")], body)


def _failure(e: ControlError, text: bool) -> Reply:
    if text:
        return _text("", f"nssup: {e}\n", status=e.http_status, code=e.exit_code)
    error = {"code": e.code, "message": e.message, "hint": e.hint}
    return _json({"error": error}, status=e.http_status, code=e.exit_code)


def _usage(message: str, hint: str = "") -> ControlError:
    return ControlError("usage", message, hint=hint, exit_code=ExitCode.USAGE)


def _forbidden(message: str, hint: str) -> ControlError:
    return ControlError("not-permitted", message, hint=hint, http_status=403, exit_code=ExitCode.NOT_PERMITTED)


def _bad(message: str) -> ControlError:
    return ControlError("bad-request", message, exit_code=ExitCode.USAGE)


# --- followers of events -------------------------------------------------------------------------------------------


class Followed:
    """Lines for one follower, a bounded number; what it is too slow for is counted and told to it."""

    def __init__(self, wanted: Callable[[Event], bool]) -> None:
        self.wanted = wanted
        self._lines: deque[bytes] = deque()
        self._lost = 0
        self._ended = False
        self._woken: asyncio.Future[None] | None = None

    def put(self, line: bytes) -> None:
        if len(self._lines) >= EVENTS_BEHIND:
            self._lost += 1
        else:
            self._lines.append(line)
        self._wake()

    def end(self) -> None:
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)

    async def batches(self) -> AsyncGenerator[bytes, None]:
        while self._lines or not self._ended:
            if not self._lines:
                self._woken = asyncio.get_running_loop().create_future()
                await self._woken
                continue
            batch = b"".join(self._lines)
            self._lines.clear()
            if self._lost:
                batch += msgspec.json.encode({"event": "events_lost", "detail": {"lost": self._lost}}) + b"\n"
                self._lost = 0
            yield batch


def _about(chosen: Selected, everything: bool) -> Callable[[Event], bool]:
    """Whether an event is about what was chosen."""
    workers = Meant(chosen)

    def about(event: Event) -> bool:
        return everything or event.worker in workers or event.pool in chosen.whole

    return about


# --- the handlers --------------------------------------------------------------------------------------------------


class Control:
    """The application that http.Server serves."""

    def __init__(self, supervisor: Supervisor, upgrade: Upgrade | None = None) -> None:
        self._supervisor = supervisor
        self._upgrade = upgrade
        self._owner_uid = os.geteuid()
        self._pid_namespace = procfs.pid_namespace("self")
        self._events: deque[Event] = deque(maxlen=EVENTS_KEPT)
        self._followers: set[Followed] = set()
        self._log_follows: set[Follow] = set()
        self._operations: set[Operation] = set()
        self._closed = False
        self._unsubscribe = supervisor.subscribe(self._published)

    def close(self) -> None:
        """Every wait ends with what is so now, every stream at its end; what begins later ends at once."""
        self._closed = True
        self._unsubscribe()
        for each in self._operations:
            each.end()
        for follower in self._followers:
            follower.end()
        for follow in self._log_follows:
            follow.close()

    def __call__(self, request: http.Request) -> Answer:
        text = "text/plain" in request.headers.get("accept", "")
        try:
            answer = self._dispatch(request, text)
        except ControlError as e:
            return _failure(e, text)
        return self._guarded(answer, text) if isinstance(answer, Coroutine) else answer

    async def _guarded(self, answer: Coroutine[Any, Any, Reply], text: bool) -> Reply:
        try:
            return await answer
        except ControlError as e:
            return _failure(e, text)

    def _dispatch(self, request: http.Request, text: bool) -> Answer:
        self._admit(request.peer)
        method = "GET" if request.method == "HEAD" else request.method
        there = [(route, found) for route in ROUTES if (found := _arguments(route, request.path)) is not None]
        for route, arguments in there:
            if route.method == method:
                query = _query(request.query, route.query)
                command = _command(request.body, route.body) if route.body is not None else None
                return route.handler(self, Call(arguments, query, command, text))
        if not there:
            raise ControlError("no-such-path", f"there is nothing at {request.path}", http_status=404)
        reply = _failure(
            ControlError("method-not-allowed", f"{request.path} takes no {request.method}", http_status=405), text
        )
        allowed = ", ".join(sorted({route.method for route, _ in there}))
        return reply._replace(headers=[*reply.headers, ("Allow", allowed)])

    def _admit(self, peer: http.Peer) -> None:
        if peer.uid not in (0, self._owner_uid):
            raise _forbidden(f"user {peer.uid} may not steer this supervisor", f"be root or user {self._owner_uid}")
        if peer.host_pid and self._may_be_inside(peer):
            raise _forbidden(
                "processes inside a worker's namespaces may not steer their supervisor",
                "ask from outside; and stay until it has answered",
            )

    def _may_be_inside(self, peer: http.Peer) -> bool:
        """Whether the peer is a process of our workers'. Who has ended by now may have been one."""
        if peer.ended:
            return True
        ours = procfs.pid_namespace(peer.host_pid) == self._pid_namespace
        inside = not ours and self._supervisor.host_pid_owner(peer.host_pid) is not None
        # Only now, so that all of this was about the process that connected, and not about one with its number.
        gone = lives.ended(peer.pidfd) if peer.pidfd >= 0 else procfs.stat(peer.host_pid) is None
        return inside or gone

    # Seeing.

    def _select(self, selectors: Sequence[str]) -> Selected:
        return select(selectors, members(self._supervisor.workers), self._supervisor.host_pid_owner)

    def status(self, call: Call) -> Answer:
        query: StatusQuery = call.query
        chosen = self._select(query.select)
        wanted = query.format or ("text" if call.text else "json")
        stats = wanted in ("json", "text") and (query.stats or len(chosen.workers) <= STATS_ROWS)
        snapshot = Snapshot(self._supervisor, stats=stats, detailed=wanted == "json")
        document = snapshot.status(chosen.pools, chosen.workers)
        specs = self._supervisor.workers.pools
        code = render.exit_code(document["workers"], {name for name in chosen.pools if specs[name].type == "oneshot"})
        if wanted == "json":
            return _json(document, code=code)
        if wanted == "text":
            unfold = query.unfold or bool(query.select)
            return _text(render.table(document, unfold=unfold, color=query.color, width=query.width), code=code)
        numbers = [w["host_pid"] if wanted == "host_pid" else w["ns_pid"] for w in document["workers"]]
        there = [f"{number}\n" for number in numbers if number is not None]
        return _text("".join(there), code=0 if len(there) == len(numbers) else ExitCode.NOT_RUNNING)

    def pools(self, call: Call) -> Answer:
        snapshot = Snapshot(self._supervisor, stats=False)
        return _json({"pools": snapshot.pools(self._supervisor.workers.pools)})

    def pool(self, call: Call) -> Answer:
        (name,) = call.arguments
        there = members(self._supervisor.workers)
        (pool,) = select_pools([name], {name: there[name]} if name in there else there)
        snapshot = Snapshot(self._supervisor, stats=len(there[pool]) <= STATS_ROWS)
        return _json({**snapshot.pools([pool])[0], "workers": [snapshot.worker(each) for each in there[pool]]})

    def workers(self, call: Call) -> Answer:
        query: WorkersQuery = call.query
        found = [
            w
            for w in map(self._supervisor.workers.workers.__getitem__, self._select(query.select).workers)
            if query.pool in (None, w.pool) and query.state in (None, w.state)
        ]
        snapshot = Snapshot(self._supervisor, stats=query.stats or len(found) <= STATS_ROWS)
        return _json({"workers": [snapshot.worker(w.id) for w in found]})

    def worker(self, call: Call) -> Answer:
        worker_id = "/".join(call.arguments)
        if worker_id not in self._supervisor.workers.workers:
            self._select([worker_id])  # says what there is instead
            raise _bad(f"{worker_id!r} means more than one worker")
        return _json(Snapshot(self._supervisor, stats=True).worker(worker_id))

    def which(self, call: Call) -> Answer:
        (text,) = call.arguments
        if not (text.isascii() and text.isdigit() and len(text) < 10):
            raise _usage(f"{text!r} is no host PID")
        chosen = self._select([f"host:{text}"])
        if call.text:
            return _text(f"{chosen.workers[0]}\n")
        return _json({"host_pid": int(text), "id": chosen.workers[0]})

    def healthz(self, call: Call) -> Answer:
        source = Snapshot(self._supervisor, stats=False).supervisor()
        if call.text:
            return _text(f"pong: nssup {source['version']}, host PID {source['host_pid']}\n")
        failed = {"reexec_failed": self._upgrade.failed} if self._upgrade and self._upgrade.failed else {}
        return _json({"status": "ok", "supervisor": source, **failed})

    def orphans(self, call: Call) -> Answer:
        found = Orphans([orphan._asdict() for orphan in self._supervisor.orphans()], [*self._supervisor.set_aside()])
        if not call.text:
            return _json(found)
        lines = [
            f"{o.worker} generation {o.generation}: init's host PID {o.init_host_pid or '-'}, "
            f"its program's {o.host_pid or '-'}: {o.reason}"
            for o in self._supervisor.orphans()
        ]
        return _text("".join([f"{line}\n" for line in [*lines, *found.set_aside]]))

    def openapi(self, call: Call) -> Answer:
        from nssup.openapi import document  # built when it is asked for

        return _json(document(ROUTES, self._supervisor.version))

    # Streams.

    def _published(self, event: Event) -> None:
        self._events.append(event)
        if not self._followers:
            return
        line = event_line(event)
        for follower in self._followers:
            if follower.wanted(event):
                follower.put(line)

    def events(self, call: Call) -> Answer:
        query: EventsQuery = call.query
        chosen = self._select(query.select)
        follower = Followed(_about(chosen, not query.select))
        if query.since is not None:
            past = self._since(query.since)
        elif query.n is not None:
            past = list(self._events)
        else:
            return _stream(self._follow(follower, [self._snapshot_line(chosen)], query.follow))
        lines = [event_line(event) for event in past if follower.wanted(event)]
        if query.n is not None:
            lines = lines[len(lines) - query.n :] if query.n < len(lines) else lines
        return _stream(self._follow(follower, lines, query.follow))

    def _snapshot_line(self, chosen: Selected) -> bytes:
        snapshot = Snapshot(self._supervisor, stats=False)
        status = snapshot.status(chosen.pools, chosen.workers)
        head = {"event": "snapshot", "epoch": self._supervisor.epoch, "seq": self._supervisor.workers.seq}
        return msgspec.json.encode({**head, "status": status}) + b"\n"

    def _since(self, text: str) -> list[Event]:
        """The events after `epoch:seq`. Raises ControlError (410) when not all of them are here any more."""
        epoch, _, seq = text.partition(":")
        if not (epoch.isascii() and epoch.isdigit() and seq.isascii() and seq.isdigit()):
            raise _bad(f"since={text!r}: write epoch:seq")
        oldest = self._events[0].seq if self._events else self._supervisor.workers.seq + 1
        if int(epoch) != self._supervisor.epoch or not oldest - 1 <= int(seq) <= self._supervisor.workers.seq:
            raise ControlError("gone", f"the events after {text} are not here", http_status=410, hint="take a snapshot")
        return [event for event in self._events if event.seq > int(seq)]

    async def _follow(self, follower: Followed, first: list[bytes], follow: bool) -> AsyncGenerator[bytes, None]:
        # Up to the first yield this runs in one turn with what `first` was taken from: nothing is missed or told twice.
        follow = follow and not self._closed
        if follow:
            self._followers.add(follower)
        try:
            yield b"".join(first)
            if follow:
                async for batch in follower.batches():
                    yield batch
        finally:
            self._followers.discard(follower)

    # Doing.

    def _meant(self, command: Command, verb: str, *, by_default: bool = False) -> tuple[str, ...]:
        """The workers that a changing verb is about."""
        if command.all and command.select:
            raise _usage(f"{verb}: all, or only {' '.join(command.select)}?", "leave one of them out")
        if not command.select and not command.all and not by_default:
            raise _usage(f"{verb}: of what?", f"name pools or workers, or say --all: nssup ctl {verb} --all")
        return self._select(command.select).workers

    async def _run(
        self,
        verb: str,
        work: Iterable[tuple[str, Input | None, Judge]],
        timeout: float | None,
        text: bool,
        then: Callable[[], None] | None = None,
    ) -> Reply:
        found, code = await self._settle(work, timeout, then)
        if text:
            out, err = render.results(verb, found)
            return _text(out, err, code=code)
        return _json(Accepted(self._supervisor.workers.seq, found), code=code)

    async def _settle(
        self, work: Iterable[tuple[str, Input | None, Judge]], timeout: float | None, then: Callable[[], None] | None
    ) -> tuple[list[render.Result], ExitCode]:
        under_way = Operation(self._supervisor, work)
        self._operations.add(under_way)
        if self._closed:
            under_way.end()
        try:
            if then is not None:
                then()
            found = await under_way.wait_settled(timeout)
        finally:
            self._operations.discard(under_way)
        code = ExitCode.OK
        if not all(r["ok"] for r in found):
            code = ExitCode.TIMED_OUT if any(r["timed_out"] for r in found) else ExitCode.FAILED
        return found, code

    def start(self, call: Call) -> Answer:
        command: Command = call.command
        judge = operation.aim(command.wait, operation.up, UP)
        work = [(each, Start(), judge) for each in self._meant(command, "start", by_default=True)]
        return self._run("start", work, command.timeout, call.text)

    def stop(self, call: Call) -> Answer:
        command: Command = call.command
        judge = operation.aim(command.wait, operation.down, ("stopped",))
        work = [(each, Stop(), judge) for each in self._meant(command, "stop")]
        return self._run("stop", work, command.timeout, call.text)

    def restart(self, call: Call) -> Answer:
        command: Command = call.command
        there = self._supervisor.workers.workers
        work = [
            (each, Restart(), operation.aim(command.wait, operation.renewed(there[each].generation), UP))
            for each in self._meant(command, "restart")
        ]
        return self._run("restart", work, command.timeout, call.text)

    def kill(self, call: Call) -> Answer:
        command: KillCommand = call.command
        try:
            signo = units.signal_number(str(command.signal))
        except ValueError as e:
            raise _usage(f"{command.signal}: {e}") from None
        there = self._supervisor.workers.workers
        judge = operation.aim(command.wait, operation.at_once, ())
        work: list[tuple[str, Input | None, Judge]] = []
        for each in self._meant(command, "kill"):
            w = there[each]
            reachable = w.alive and (w.init_host_pid if command.tree else w.host_pid) is not None
            work.append((each, Kill(signo, command.tree), judge) if reachable else (each, None, operation.never))
        return self._run("kill", work, command.timeout, call.text)

    def scale(self, call: Call) -> Answer:
        command: ScaleCommand = call.command
        if not command.select and not command.all:
            raise _usage("scale: of what?", "name a pool and a number: nssup ctl scale web 3")
        there = members(self._supervisor.workers)
        pools = select_pools(command.select, there) if command.select else tuple(there)
        wanted = {name: _number(command.n, self._supervisor.workers.pools[name].workers, name) for name in pools}
        self._supervisor.scale_pools(wanted)
        judge = operation.aim(command.wait, operation.scaled, UP)
        work = [(each, None, judge) for name in pools for each in self._changed(name, there[name])]
        return self._run("scale", work, command.timeout, call.text)

    def _changed(self, pool: str, before: Sequence[str]) -> list[str]:
        """The workers of a pool that came or are going by a scale."""
        now, workers = members(self._supervisor.workers)[pool], self._supervisor.workers.workers
        gone = [each for each in before if each not in workers]
        return [each for each in now if each not in before or workers[each].removing] + gone

    def wait(self, call: Call) -> Answer:
        command: Command = call.command
        goal: Goal = command.wait if isinstance(command.wait, str) else "ready"
        judge = operation.reached(goal)
        work = [(each, None, judge) for each in self._meant(command, "wait", by_default=True)]
        return self._run("wait", work, command.timeout, call.text)

    def shutdown(self, call: Call) -> Answer:
        command: Shutdown = call.command
        if command.leave_running:
            return self._leave_running(command, call.text)
        judge = operation.down_for_good if command.wait else operation.at_once
        work = [(each, None, judge) for each in self._select([]).workers]
        return self._run("shutdown", work, command.timeout, call.text, self._supervisor.shutdown)

    async def _leave_running(self, command: Shutdown, text: bool) -> Reply:
        there = self._supervisor.workers.workers
        alive = [w.id for w in there.values() if w.alive]
        left = [worker_id for worker_id in alive if self._supervisor.outlives_us(worker_id)]
        bound = [worker_id for worker_id in alive if worker_id not in left]
        judge = operation.down_for_good if command.wait else operation.at_once
        work = [(each, None, judge if each in bound else operation.at_once) for each in alive]
        found, code = await self._settle(work, command.timeout, self._supervisor.leave_running)
        if not text:
            return _json(Left(self._supervisor.workers.seq, found, left, bound), code=code)
        for result in found:
            if result["id"] in left:
                result["state"] = "left running"
        out, err = render.results("shutdown", found)
        return _text(out, err, code=code)

    async def reexec(self, call: Call) -> Reply:
        if self._upgrade is None:
            raise ControlError("not-possible", "this supervisor is part of another program", http_status=409)
        version = await self._upgrade.rehearse()
        self._upgrade.begin()
        return _json(Become(Snapshot(self._supervisor, stats=False).supervisor(), version))

    def logs(self, call: Call) -> Answer:
        query: LogsQuery = call.query
        return _stream(self._records(self._select(query.select), query))

    async def _records(self, chosen: Selected, query: LogsQuery) -> AsyncGenerator[bytes, None]:
        """The last records, in the order of their time; then what comes."""
        hub = self._supervisor.logs
        workers = Meant(chosen) if query.select else None
        follows: list[Follow] = []

        async def begin() -> None:
            if query.follow and not self._closed:
                follows.append(hub.follow(chosen.pools, workers=workers, max_bytes=LOG_BYTES_BEHIND))
                self._log_follows.update(follows)

        try:
            # Tasks begin in the order they are made, in one turn of the loop: so follow and tails begin at one moment,
            # and no record is in both or in neither.
            async with asyncio.TaskGroup() as group:
                group.create_task(begin())
                tails = [group.create_task(hub.tail(pool, query.n, workers)) for pool in chosen.pools]
            records = list(heapq.merge(*(tail.result() for tail in tails)))  # each begins with its `ts`
            yield b"".join(records[max(len(records) - query.n, 0) :])
            for follow in follows:
                async for batch in follow:
                    yield batch
        finally:
            for follow in follows:
                follow.close()
                self._log_follows.discard(follow)


def _number(n: int | str, now: int, pool: str) -> int:
    """How many workers `n` means: a number, or a step from how many are wanted now."""
    try:
        wanted = int(n) + (now if isinstance(n, str) and n[:1] in ("+", "-") else 0)
    except ValueError:
        raise _usage(f"scale: {n!r} is no number", "write N, +N or -N") from None
    if not 0 <= wanted <= MOST_WORKERS:
        raise _usage(f"scale: {pool} cannot have {wanted} workers")
    return wanted


# --- the routes ----------------------------------------------------------------------------------------------------


class Route(NamedTuple):
    """One thing that can be asked. access: see (nothing changes), operate, admin (amounts to root). verb: of the CLI.
    query, body: what the request may carry. answer: type of the document, or what a stream's lines are."""

    method: str
    path: str
    access: Literal["see", "operate", "admin"]
    summary: str
    handler: Callable[[Control, Call], Answer]
    verb: str | None = None
    query: type[msgspec.Struct] = Nothing
    body: type[msgspec.Struct] | None = None
    answer: Any = None


# fmt: off
ROUTES = (
    Route("GET", "/v1/status", "see", "pools and workers, and how they are",
          Control.status, "status", StatusQuery, answer=render.StatusDocument),
    Route("GET", "/v1/pools", "see", "all pools", Control.pools),
    Route("GET", "/v1/pools/{pool}", "see", "one pool and its workers", Control.pool),
    Route("GET", "/v1/workers", "see", "workers, chosen by selector, pool or state",
          Control.workers, None, WorkersQuery),
    Route("GET", "/v1/workers/{pool}/{index}", "see", "one worker",
          Control.worker, answer=render.WorkerDocument),
    Route("GET", "/v1/which/{host_pid}", "see", "the worker whose tree holds a host PID", Control.which, "which"),
    Route("GET", "/v1/events", "see", "what happens, a JSON object a line: first a snapshot, then each change",
          Control.events, "events", EventsQuery, answer="stream"),
    Route("GET", "/v1/logs", "see", "what workers write, a record a line",
          Control.logs, "logs", LogsQuery, answer="stream"),
    Route("GET", "/v1/orphans", "see", "what may be ours and cannot be proven so, and what was set aside",
          Control.orphans, "orphans", answer=Orphans),
    Route("GET", "/v1/openapi.json", "see", "this document", Control.openapi),
    Route("GET", "/healthz", "see", "whether the supervisor answers", Control.healthz, "ping"),
    Route("POST", "/v1/start", "operate", "start workers",
          Control.start, "start", body=Command, answer=Accepted),
    Route("POST", "/v1/stop", "operate", "stop workers by their stop sequence",
          Control.stop, "stop", body=Command, answer=Accepted),
    Route("POST", "/v1/restart", "operate", "stop workers and start them again",
          Control.restart, "restart", body=Command, answer=Accepted),
    Route("POST", "/v1/kill", "operate", "send a signal to workers",
          Control.kill, "kill", body=KillCommand, answer=Accepted),
    Route("POST", "/v1/scale", "operate", "have another number of workers",
          Control.scale, "scale", body=ScaleCommand, answer=Accepted),
    Route("POST", "/v1/wait", "see", "wait until workers are as wanted",
          Control.wait, "wait", body=Command, answer=Accepted),
    Route("POST", "/v1/shutdown", "admin", "stop everything, or only what cannot go on, and end the supervisor",
          Control.shutdown, "shutdown", body=Shutdown, answer=Accepted),
    Route("POST", "/v1/reexec", "admin", "become the code that is installed now, without ending a worker",
          Control.reexec, "reexec", body=Nothing, answer=Become),
)
# fmt: on


def _arguments(route: Route, path: str) -> list[str] | None:
    """The arguments in path if it is the route's."""
    wanted, given = route.path.split("/"), path.split("/")
    if len(wanted) != len(given):
        return None
    found = []
    for w, g in zip(wanted, given, strict=True):
        if w.startswith("{") and g:
            found.append(urllib.parse.unquote(g))
        elif w != g:
            return None
    return found


def _query(text: str, kind: type[msgspec.Struct]) -> Any:  # noqa: ANN401 - of the kind
    lists = {field.name for field in msgspec.structs.fields(kind) if field.type == list[str]}
    given: dict[str, Any] = {}
    for key, values in urllib.parse.parse_qs(text, keep_blank_values=True, max_num_fields=10_000).items():
        given[key] = values if key in lists else values[-1]
    try:
        return msgspec.convert(given, kind, strict=False)
    except msgspec.ValidationError as e:
        raise _bad(f"query: {e}") from None


def _command(body: bytes, kind: type[msgspec.Struct]) -> Any:  # noqa: ANN401 - of the kind
    try:
        return msgspec.json.decode(body or b"{}", type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise _bad(f"body: {e}") from None


class ControlServer(http.Server):
    """The control socket of a supervisor: `async with ControlServer(supervisor, path): ...`

    path: of the socket, or a Listener made earlier. lock_held: the caller holds the lock of the supervisor's
    directories, so a stale socket file may be replaced. upgrade: who can do `reexec`; None: nobody.
    Raises ControlError on entering when the socket is not to be had.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        path: str | Listener,
        *,
        lock_held: bool = True,
        limits: http.Limits | None = None,
        upgrade: Upgrade | None = None,
    ) -> None:
        super().__init__(path, Control(supervisor, upgrade), lock_held=lock_held, limits=limits)
