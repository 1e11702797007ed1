"""Handlers of streams: first what is so, or was, then what comes, a JSON object a line."""

import asyncio
import heapq
from collections.abc import AsyncGenerator, Callable

import msgspec

from nssup.api import Answer, Call, EventsQuery, Follow, LogsQuery, bad, stream_reply
from nssup.desk import Desk, Followed
from nssup.errors import ControlError
from nssup.events import Event
from nssup.selection import Meant, Selected
from nssup.snapshot import Snapshot, event_line

LOG_BYTES_BEHIND = 4 << 20  # the same for a follower of logs


def _about(chosen: Selected, everything: bool) -> Callable[[Event], bool]:
    """Whether an event is about what was chosen."""
    workers = Meant(chosen)

    def about(event: Event) -> bool:
        return everything or event.worker in workers or event.pool in chosen.whole

    return about


def events(desk: Desk, call: Call) -> Answer:
    query: EventsQuery = call.query
    chosen = desk.select(query.select)
    follower = Followed(_about(chosen, not query.select))
    since = query.since or call.form.last_id
    if since is not None:
        past = _since(desk, since)
    elif query.n is not None:
        past = list(desk.events)
    else:
        return stream_reply(_follow(desk, follower, [_snapshot_line(desk, chosen)], query.follow), call.form)
    lines = [event_line(event) for event in past if follower.wanted(event)]
    if query.n is not None:
        lines = lines[len(lines) - query.n :] if query.n < len(lines) else lines
    return stream_reply(_follow(desk, follower, lines, query.follow), call.form)


def _snapshot_line(desk: Desk, chosen: Selected) -> bytes:
    snapshot = Snapshot(desk.supervisor, stats=False)
    status = snapshot.status(chosen.pools, chosen.workers)
    head = {"event": "snapshot", "epoch": desk.supervisor.epoch, "seq": desk.supervisor.workers.seq}
    return msgspec.json.encode({**head, "status": status}) + b"\n"


def _since(desk: Desk, text: str) -> list[Event]:
    """The events after `epoch:seq`. Raises ControlError (410) when not all of them are here any more."""
    epoch, _, seq = text.partition(":")
    if not (epoch.isascii() and epoch.isdigit() and seq.isascii() and seq.isdigit()):
        raise bad(f"since={text!r}: write epoch:seq")
    oldest = desk.events[0].seq if desk.events else desk.supervisor.workers.seq + 1
    if int(epoch) != desk.supervisor.epoch or not oldest - 1 <= int(seq) <= desk.supervisor.workers.seq:
        raise ControlError("gone", f"the events after {text} are not here", http_status=410, hint="take a snapshot")
    return [event for event in desk.events if event.seq > int(seq)]


async def _follow(desk: Desk, follower: Followed, first: list[bytes], follow: bool) -> AsyncGenerator[bytes, None]:
    # Up to the first yield this runs in one turn with what `first` was taken from: nothing is missed or told twice.
    follow = follow and not desk.closed
    if follow:
        desk.followers.add(follower)
    try:
        yield b"".join(first)
        if follow:
            async for batch in follower.batches():
                yield batch
    finally:
        desk.followers.discard(follower)


def logs(desk: Desk, call: Call) -> Answer:
    query: LogsQuery = call.query
    return stream_reply(_records(desk, desk.select(query.select), query), call.form)


async def _records(desk: Desk, chosen: Selected, query: LogsQuery) -> AsyncGenerator[bytes, None]:
    """The last records, in the order of their time; then what comes."""
    hub = desk.supervisor.logs
    workers = Meant(chosen) if query.select else None
    follows: list[Follow] = []

    async def begin() -> None:
        if query.follow and not desk.closed:
            follows.append(hub.follow(chosen.pools, workers=workers, max_bytes=LOG_BYTES_BEHIND))
            desk.log_follows.update(follows)

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
            desk.log_follows.discard(follow)
