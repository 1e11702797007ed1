"""The control side: who may ask, which route it is, and what a request holds; then its handler translates.

No operation lives in a request: a handler feeds what was asked for and then listens to published events until each
worker is settled, the time is up or its client is gone; the workers go on either way. Nothing here polls.
"""

import os
import urllib.parse
from collections.abc import Coroutine
from typing import Any

import msgspec

from nssup import http, lives, procfs
from nssup.api import Answer, Call, Reply, Supervisor, Upgrade, bad, failure_reply, forbidden
from nssup.desk import Desk
from nssup.errors import ControlError
from nssup.listener import Listener
from nssup.routes import ROUTES, Route


class Control:
    """The application that http.Server serves."""

    def __init__(self, supervisor: Supervisor, upgrade: Upgrade | None = None) -> None:
        self._desk = Desk(supervisor, upgrade)
        self._owner_uid = os.geteuid()
        self._pid_namespace = procfs.pid_namespace("self")

    def close(self) -> None:
        """Every wait ends with what is so now, every stream at its end; what begins later ends at once."""
        self._desk.close()

    def __call__(self, request: http.Request) -> Answer:
        text = "text/plain" in request.headers.get("accept", "")
        try:
            answer = self._dispatch(request, text)
        except ControlError as e:
            return failure_reply(e, text)
        return self._guarded(answer, text) if isinstance(answer, Coroutine) else answer

    async def _guarded(self, answer: Coroutine[Any, Any, Reply], text: bool) -> Reply:
        try:
            return await answer
        except ControlError as e:
            return failure_reply(e, text)

    def _dispatch(self, request: http.Request, text: bool) -> Answer:
        self._admit(request.peer)
        method = "GET" if request.method == "HEAD" else request.method
        there = [(route, found) for route in ROUTES if (found := _arguments(route, request.path)) is not None]
        for route, arguments in there:
            if route.method == method:
                query = _query(request.query, route.query)
                command = _command(request.body, route.body) if route.body is not None else None
                return route.handler(self._desk, Call(arguments, query, command, text))
        if not there:
            raise ControlError("no-such-path", f"there is nothing at {request.path}", http_status=404)
        reply = failure_reply(
            ControlError("method-not-allowed", f"{request.path} takes no {request.method}", http_status=405), text
        )
        allowed = ", ".join(sorted({route.method for route, _ in there}))
        return reply._replace(headers=[*reply.headers, ("Allow", allowed)])

    def _admit(self, peer: http.Peer) -> None:
        if peer.uid not in (0, self._owner_uid):
            raise forbidden(f"user {peer.uid} may not steer this supervisor", f"be root or user {self._owner_uid}")
        if peer.host_pid and self._may_be_inside(peer):
            raise forbidden(
                "processes inside a worker's namespaces may not steer their supervisor",
                "ask from outside; and stay until it has answered",
            )

    def _may_be_inside(self, peer: http.Peer) -> bool:
        """Whether the peer is a process of our workers'. Who has ended by now may have been one."""
        if peer.ended:
            return True
        ours = procfs.pid_namespace(peer.host_pid) == self._pid_namespace
        inside = not ours and self._desk.supervisor.host_pid_owner(peer.host_pid) is not None
        # Only now, so that all of this was about the process that connected, and not about one with its number.
        gone = lives.ended(peer.pidfd) if peer.pidfd >= 0 else procfs.stat(peer.host_pid) is None
        return inside or gone


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
        raise bad(f"query: {e}") from None


def _command(body: bytes, kind: type[msgspec.Struct]) -> Any:  # noqa: ANN401 - of the kind
    try:
        return msgspec.json.decode(body or b"{}", type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise bad(f"body: {e}") from None


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
