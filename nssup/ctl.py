"""The control side: who may ask, which route it is, and what a request holds; then its handler translates.

No operation lives in a request: a handler feeds what was asked for and then listens to published events until each
worker is settled, the time is up or its client is gone; the workers go on either way. Nothing here polls.
"""

import asyncio
import os
import urllib.parse
from collections.abc import Coroutine, Iterable, Mapping
from typing import Any

import msgspec

from nssup import audit, http, lives, procfs
from nssup.access import TAKES, Access, Role, may
from nssup.api import Answer, Call, Form, Reply, Supervisor, Upgrade, bad, failure_reply, forbidden
from nssup.desk import Desk
from nssup.errors import ControlError
from nssup.listener import Listener
from nssup.locate import Path
from nssup.routes import ROUTES, Route


class _Asked:
    """A request on its way, for whoever notes what was asked. after: number of the last event before it."""

    def __init__(self, request: http.Request, after: int) -> None:
        self.request = request
        self.after = after
        self.route: Route | None = None
        self.role: Role | None = None
        self.said: Mapping[str, object] = {}


class Control:
    """The application that http.Server serves."""

    def __init__(
        self,
        supervisor: Supervisor,
        upgrade: Upgrade | None = None,
        roles: Mapping[int, Role] | None = None,
        origins: Mapping[Path, str] | None = None,
    ) -> None:
        self._desk = Desk(supervisor, upgrade, origins)
        self._access = Access(os.geteuid(), roles or {})
        self._pid_namespace = procfs.pid_namespace("self")

    def close(self) -> None:
        """Every wait ends with what is so now, every stream at its end; what begins later ends at once."""
        self._desk.close()

    def __call__(self, request: http.Request) -> Answer:
        form = _form(request.headers)
        asked = _Asked(request, self._desk.supervisor.workers.seq)
        try:
            answer = self._dispatch(asked, form)
        except ControlError as e:
            return self._refused(asked, e, form)
        if isinstance(answer, Coroutine):
            return self._guarded(answer, asked, form)
        return self._answered(asked, answer)

    async def _guarded(self, answer: Coroutine[Any, Any, Reply], asked: _Asked, form: Form) -> Reply:
        try:
            return self._answered(asked, await answer)
        except ControlError as e:
            return self._refused(asked, e, form)
        except asyncio.CancelledError:
            self._note(asked, audit.CLIENT_GONE)
            raise

    def _answered(self, asked: _Asked, reply: Reply) -> Reply:
        if asked.route is not None and asked.route.access != "see":
            self._note(asked, audit.result_of(None, int(dict(reply.headers)["Nssup-Exit"])))
        return reply

    def _refused(self, asked: _Asked, error: ControlError, form: Form) -> Reply:
        self._note(asked, audit.result_of(error))
        return failure_reply(error, form.text)

    def _note(self, asked: _Asked, result: str) -> None:
        """Who asked for a change, and what became of it."""
        if asked.route is None or asked.route.access == "see":
            return
        supervisor, what = self._desk.supervisor, asked.route.path.rpartition("/")[2]
        peer = asked.request.peer
        audit.note(supervisor.workers, supervisor.now(), what, peer, asked.said, result, asked.after, asked.role)

    def _dispatch(self, asked: _Asked, form: Form) -> Answer:
        request = asked.request
        method = "GET" if request.method == "HEAD" else request.method
        there = [(route, found) for route in ROUTES if (found := _arguments(route, request.path)) is not None]
        asked.route, arguments = next(((route, found) for route, found in there if route.method == method), (None, []))
        self._admit(asked)
        if asked.route is None:
            methods = [route.method for route, _ in there]
            return _nothing_there(request, methods, form, self._desk.supervisor.version)
        query = _query(request.query, asked.route.query)
        command = None
        if asked.route.body is not None:
            command = _command(request.body, asked.route.body)
            asked.said = msgspec.structs.asdict(command)
        return asked.route.handler(self._desk, Call(arguments, query, command, form, request.peer))

    def _admit(self, asked: _Asked) -> None:
        peer = asked.request.peer
        asked.role = self._access.role(peer.uid, (peer.gid, *peer.groups))
        if asked.role is None:
            raise forbidden(
                f"user {peer.uid} may not steer this supervisor",
                f"be root or user {self._access.owner_uid}, or in a group of supervisor.control.roles",
            )
        if asked.route is not None and not may(asked.role, asked.route.access):
            needed = TAKES[asked.route.access]
            raise forbidden(
                f"user {peer.uid} is {asked.role} here, and this takes {needed}", "supervisor.control.roles"
            )
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


def _form(headers: Mapping[str, str]) -> Form:
    accept = headers.get("accept", "")
    return Form("text/plain" in accept, "text/event-stream" in accept, headers.get("last-event-id"))


def _nothing_there(request: http.Request, methods: Iterable[str], form: Form, version: str) -> Reply:
    """methods: of the routes at that path."""
    if not methods:
        hint = f"this supervisor is nssup {version}: is who asks of another version?"
        error = ControlError("no-such-path", f"there is nothing at {request.path}", hint=hint, http_status=404)
        return failure_reply(error, form.text)
    error = ControlError("method-not-allowed", f"{request.path} takes no {request.method}", http_status=405)
    reply = failure_reply(error, form.text)
    return reply._replace(headers=[*reply.headers, ("Allow", ", ".join(sorted({*methods})))])


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
    try:
        for key, values in urllib.parse.parse_qs(text, keep_blank_values=True, max_num_fields=10_000).items():
            given[key] = values if key in lists else values[-1]
        return msgspec.convert(given, kind, strict=False)
    except ValueError as e:  # msgspec.ValidationError is one
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
    roles: gid -> what its members may do, beside root and our own user. origins: where the config says what.
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
        roles: Mapping[int, Role] | None = None,
        origins: Mapping[Path, str] | None = None,
    ) -> None:
        super().__init__(path, Control(supervisor, upgrade, roles, origins), lock_held=lock_held, limits=limits)
