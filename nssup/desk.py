"""What all requests share: the supervisor, what has happened lately, who follows it, what is under way."""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence

import msgspec

from nssup import render
from nssup.api import Follow, Supervisor, Upgrade
from nssup.errors import ExitCode
from nssup.events import Event, Input
from nssup.locate import Path
from nssup.operation import Judge, Operation
from nssup.selection import Selected, pool_of, select
from nssup.snapshot import event_line, members

EVENTS_KEPT = 1000  # for `n` and `since`
EVENTS_BEHIND = 1000  # that a follower may be late by before it loses some


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


class Desk:
    """What all handlers share. closed: nothing may wait any more."""

    def __init__(
        self, supervisor: Supervisor, upgrade: Upgrade | None = None, origins: Mapping[Path, str] | None = None
    ) -> None:
        """origins: where the config says what, as config.Config has it."""
        self.supervisor = supervisor
        self.origins = {} if origins is None else origins
        self.upgrade = upgrade
        self.events: deque[Event] = deque(maxlen=EVENTS_KEPT)
        self.followers: set[Followed] = set()
        self.log_follows: set[Follow] = set()
        self.operations: set[Operation] = set()
        self.closed = False
        self.counts: Counter[str] = Counter()  # events, by name
        self.exits: Counter[tuple[str, str]] = Counter()  # by pool and reason
        self._unsubscribe = supervisor.subscribe(self._published)

    def close(self) -> None:
        """Every wait ends with what is so now, every stream at its end; what begins later ends at once."""
        self.closed = True
        self._unsubscribe()
        for each in self.operations:
            each.end()
        for follower in self.followers:
            follower.end()
        for follow in self.log_follows:
            follow.close()

    def select(self, selectors: Sequence[str]) -> Selected:
        return select(selectors, members(self.supervisor.workers), self.supervisor.host_pid_owner)

    def _published(self, event: Event) -> None:
        self.events.append(event)
        self.counts[event.event] += 1
        if event.exit is not None and event.worker is not None and event.event != "main_exited":
            self.exits[pool_of(event.worker), event.exit.reason] += 1
        if not self.followers:
            return
        line = event_line(event)
        for follower in self.followers:
            if follower.wanted(event):
                follower.put(line)

    async def settle(
        self, work: Iterable[tuple[str, Input | None, Judge]], timeout: float | None, then: Callable[[], None] | None
    ) -> tuple[list[render.Result], ExitCode]:
        """What became of each worker, and the exit code that says it. then: what else begins with it."""
        under_way = Operation(self.supervisor, work)
        self.operations.add(under_way)
        if self.closed:
            under_way.end()
        try:
            if then is not None:
                then()
            found = await under_way.wait_settled(timeout)
        finally:
            self.operations.discard(under_way)
        code = ExitCode.OK
        if not all(r["ok"] for r in found):
            code = ExitCode.TIMED_OUT if any(r["timed_out"] for r in found) else ExitCode.FAILED
        return found, code
