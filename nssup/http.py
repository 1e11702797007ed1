"""HTTP/1.1 on a Unix socket: bytes <-> requests and replies, and who is asking. Knows nothing of workers.

h11 decides what is HTTP; this file owns the socket file, the connections and their limits. A reply that is there is
written at once; what waits or streams is a task in the server's group and is cancelled when its client is gone (the
operation it waits for goes on: it does not live here). A connection costs a timer only while its request is arriving.
"""

import asyncio
import collections
import contextlib
import errno
import os
import socket
import struct
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, Self, cast

import h11
import msgspec

from nssup.listener import Listener, listen

_UCRED = struct.Struct("3i")
_SO_PEERGROUPS = 59  # include/uapi/asm-generic/socket.h
_SO_PEERPIDFD = 77  # Linux 6.5, the same
_MOST_GROUPS = 65536  # NGROUPS_MAX
_LAST_TURNS = 4  # of the loop: a connection is accepted, made, begins to read, and has read


class Peer(NamedTuple):
    """Who connected, as the kernel saw it then (SO_PEERCRED), in the supervisor's own namespaces.

    host_pid: 0 for a process that cannot be seen from here. pidfd: the connection's own; -1 where the kernel has none,
    or the process had ended before it was asked for (then `ended`). groups: the supplementary ones.
    """

    host_pid: int
    uid: int
    gid: int
    pidfd: int = -1
    ended: bool = False
    groups: tuple[int, ...] = ()


class Request(NamedTuple):
    """One request, whole. path and query are still percent-encoded; header names are lower case."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: bytes
    peer: Peer


class Reply(Protocol):
    """What an application answers. A generator as body is streamed in chunks and closed when the client is gone."""

    @property
    def status(self) -> int: ...
    @property
    def headers(self) -> Sequence[tuple[str, str]]: ...
    @property
    def body(self) -> bytes | AsyncGenerator[bytes, None]: ...


class App(Protocol):
    """Answers requests: at once, or by a coroutine when it has to wait. `close`: end every wait and stream now."""

    def __call__(self, request: Request) -> Reply | Coroutine[Any, Any, Reply]: ...
    def close(self) -> None: ...


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a client may cost. deadline: seconds for a request to arrive (and for a reply to be taken). grace: seconds
    for replies under way when the server closes. connections: of everybody; of_peer: of one process, or of all
    processes of another user together."""

    head_bytes: int = 16 * 1024
    body_bytes: int = 1024 * 1024
    connections: int = 256
    of_peer: int = 64
    deadline: float = 10.0
    grace: float = 1.0


class _Plain(NamedTuple):
    status: int
    headers: Sequence[tuple[str, str]]
    body: bytes


def failure(status: int, code: str, message: str, hint: str = "") -> _Plain:
    """An error that HTTP itself gives, in the form that all errors of the API have."""
    body = msgspec.json.encode({"error": {"code": code, "message": message, "hint": hint}})
    return _Plain(status, [("Content-Type", "application/json")], body + b"\n")


# --- one connection ------------------------------------------------------------------------------------------------


def peer_of(sock: socket.socket) -> Peer:
    """sock: a connected one (uvloop hands out a stand-in that has what is needed). The pidfd is the caller's."""
    host_pid, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    groups = () if uid in (0, os.geteuid()) else _groups_of(sock)
    try:
        return Peer(host_pid, uid, gid, sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD), groups=groups)
    except OSError as e:
        return Peer(host_pid, uid, gid, ended=e.errno != errno.ENOPROTOOPT, groups=groups)


def _groups_of(sock: socket.socket) -> tuple[int, ...]:
    for count in (32, _MOST_GROUPS):
        try:
            data = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4 * count)
        except OSError as e:
            if e.errno != errno.ERANGE:
                break
        else:
            return struct.unpack(f"{len(data) // 4}I", data)
    return ()


class Connection(asyncio.Protocol):
    """One client: one request at a time, in order."""

    def __init__(self, server: "Server") -> None:
        self._server = server
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=server.limits.head_bytes)
        self._transport: asyncio.Transport
        self._peer: Peer
        self._request: h11.Request | None = None  # its head, while its body arrives
        self._body = bytearray()
        self._answering = False
        self._early = 0  # bytes that came while a reply was under way
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._paused = False
        self._drained: asyncio.Future[None] | None = None
        self._gone = False

    # From the transport.

    @property
    def key(self) -> tuple[int, int]:
        """Who shares one allowance of connections."""
        uid = self._peer.uid
        return (uid, self._peer.host_pid if uid in (0, os.geteuid()) else -1)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one in all but its base class
        self._peer = peer_of(transport.get_extra_info("socket"))
        if self._server.admit(self):
            self._await_request()
        elif self._server.closing:
            self._close()
        else:
            self._refuse(failure(503, "too-many-connections", "too many connections at once", "try again"))

    def data_received(self, data: bytes) -> None:
        if self._answering:
            self._early += len(data)
            if self._early > self._server.limits.head_bytes:
                self._transport.abort()
                return
        try:
            self._http.receive_data(data)
        except h11.RemoteProtocolError:  # more after it had said that it would send no more
            self._transport.abort()
            return
        if not self._answering:
            self._advance()

    def eof_received(self) -> None:
        """The client closed: the transport closes too, once everything is written, or the deadline is over."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._server.limits.deadline, self._late)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._gone = True
        if self._peer.pidfd >= 0:
            os.close(self._peer.pidfd)
        self._stop_timer()
        self._server.forget(self)
        if self._task is not None:
            self._task.cancel()

    # Requests in.

    def _await_request(self) -> None:
        self._answering = False
        self._early = 0
        self._timer = asyncio.get_running_loop().call_later(self._server.limits.deadline, self._late)
        self._server.set_arriving(self, True)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        """The request did not arrive in time, or the last reply was not taken."""
        self._timer = None
        if self._transport.is_closing() or self._transport.get_write_buffer_size():
            self._transport.abort()
        elif self._request is None and not self._http.trailing_data[0]:
            self._transport.close()
        else:
            self._refuse(failure(408, "request-timeout", "the request did not arrive in time"))

    def evict(self) -> None:
        """Make room for somebody else."""
        self._refuse(failure(503, "too-many-connections", "too many connections, and this one asked nothing yet"))

    def _advance(self) -> None:
        """What has arrived, as far as it makes whole requests."""
        try:
            while not self._answering and not self._transport.is_closing():
                event = self._http.next_event()
                if event is h11.NEED_DATA:
                    if self._http.they_are_waiting_for_100_continue:
                        self._write(h11.InformationalResponse(status_code=100, headers=[]))
                    return
                if event is h11.PAUSED or isinstance(event, h11.ConnectionClosed):
                    self._close()
                    return
                self._take(event)
        except h11.RemoteProtocolError as e:
            self._refuse(failure(e.error_status_hint, "bad-request", f"this is no HTTP request: {e}"))

    def _take(self, event: object) -> None:
        limits = self._server.limits
        if isinstance(event, h11.Request):
            self._request = event
            self._body.clear()
            if event.http_version not in (b"1.0", b"1.1"):
                self._refuse(failure(505, "http-version", "only HTTP/1.0 and HTTP/1.1 are spoken here"))
            elif _head_size(event) > limits.head_bytes:
                self._refuse(failure(431, "head-too-large", f"request head of more than {limits.head_bytes} bytes"))
            elif _announced(event) > limits.body_bytes:
                self._refuse_body()
        elif isinstance(event, h11.Data):
            self._body += event.data
            if len(self._body) > limits.body_bytes:
                self._refuse_body()
        elif isinstance(event, h11.EndOfMessage):
            self._handle()

    def _refuse_body(self) -> None:
        size = self._server.limits.body_bytes
        self._refuse(failure(413, "body-too-large", f"request body of more than {size} bytes"))

    def _handle(self) -> None:
        assert self._request is not None
        request = _whole(self._request, bytes(self._body), self._peer)
        self._request = None
        self._body.clear()
        self._answering = True
        self._stop_timer()
        self._server.set_arriving(self, False)
        try:
            answer = self._server.app(request)
        except Exception as e:
            answer = self._server.report(e, request)
        if isinstance(answer, Coroutine):
            self._start(self._wait(answer, request))
        elif isinstance(answer.body, bytes) or request.method == "HEAD":
            self._deliver(answer, request)
        else:
            self._start(self._stream(answer, answer.body, request))

    # Replies out.

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self._task = self._server.tasks.create_task(coroutine, name="control request")

    async def _wait(self, answer: Coroutine[Any, Any, Reply], request: Request) -> None:
        try:
            reply = await answer
        except Exception as e:
            reply = self._server.report(e, request)
        if isinstance(reply.body, bytes) or request.method == "HEAD":
            self._task = None
            self._deliver(reply, request)
            self._advance()
        else:
            await self._stream(reply, reply.body, request)

    def _deliver(self, reply: Reply, request: Request) -> None:
        body = reply.body if isinstance(reply.body, bytes) else None
        headers = [*reply.headers, *([("Content-Length", str(len(body)))] if body is not None else [])]
        parts: list[h11.Event] = [self._head(reply.status, headers)]
        if body and request.method != "HEAD":
            parts.append(h11.Data(data=body))
        self._write(*parts, h11.EndOfMessage())
        self._next()

    async def _stream(self, reply: Reply, body: AsyncGenerator[bytes, None], request: Request) -> None:
        self._write(self._head(reply.status, reply.headers))
        try:
            async with contextlib.aclosing(body):
                async for chunk in body:
                    self._write(h11.Data(data=chunk))
                    await self._wait_drained()
        except Exception as e:
            self._server.report(e, request)
            self._transport.abort()  # the missing last chunk tells the client
            return
        self._task = None
        self._write(h11.EndOfMessage())
        self._next()
        self._advance()

    async def _wait_drained(self) -> None:
        while self._paused:
            self._drained = asyncio.get_running_loop().create_future()
            await self._drained

    def _head(self, status: int, headers: Sequence[tuple[str, str]]) -> h11.Response:
        closing = [("Connection", "close")] if self._server.closing else []
        return h11.Response(status_code=status, headers=[*headers, *closing])

    def _write(self, *events: h11.Event) -> None:
        if not self._gone and not self._transport.is_closing():  # uvloop's raises once it is
            self._transport.write(b"".join([self._http.send(event) or b"" for event in events]))

    def _next(self) -> None:
        """The reply is written: the next request, or the end."""
        if self._gone or self._transport.is_closing():
            return
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE and not self._server.closing:
            self._http.start_next_cycle()
            self._await_request()
        else:
            self._close()

    def _refuse(self, reply: Reply) -> None:
        """Answer and hang up: what follows in the stream cannot be trusted or is not wanted."""
        if self._http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            headers = [*reply.headers, ("Connection", "close")]
            assert isinstance(reply.body, bytes)
            head = h11.Response(status_code=reply.status, headers=[*headers, ("Content-Length", str(len(reply.body)))])
            self._write(head, h11.Data(data=reply.body), h11.EndOfMessage())
        self._close()

    def _close(self) -> None:
        """Close once everything is written; a client that does not take it has the deadline for that."""
        self._server.set_arriving(self, False)
        self._stop_timer()
        if self._transport.get_write_buffer_size():
            self._timer = asyncio.get_running_loop().call_later(self._server.limits.deadline, self._late)
        self._transport.close()

    # From the server, when it closes.

    def finish(self) -> None:
        """Close now if nothing is under way, else after this reply."""
        if not self._answering:
            self._close()

    def abort(self) -> None:
        self._transport.abort()


def _head_size(head: h11.Request) -> int:
    return len(head.target) + sum(len(name) + len(value) + 4 for name, value in head.headers)


def _announced(head: h11.Request) -> int:
    """Content-Length, or 0 (h11 let only numbers through)."""
    return next((int(value) for name, value in head.headers if name == b"content-length"), 0)


def _whole(head: h11.Request, body: bytes, peer: Peer) -> Request:
    path, _, query = head.target.decode("latin-1").partition("?")
    headers: dict[str, str] = {}
    for name, value in head.headers:
        key, text = name.decode("latin-1"), value.decode("latin-1")
        headers[key] = f"{headers[key]}, {text}" if key in headers else text
    return Request(head.method.decode("latin-1"), path, query, headers, body, peer)


# --- the server ----------------------------------------------------------------------------------------------------


class Server:
    """HTTP on a Unix socket: `async with Server(path, app, lock_held=True): ...`

    path: of the socket, or a Listener that is there already, which is taken over. Entering listens; leaving lets the
    replies under way end (app.close() ends what they wait for, limits.grace bounds it), closes every connection and
    removes the socket file if it is still the same one.
    """

    def __init__(
        self, path: str | Listener, app: App, *, lock_held: bool = False, limits: Limits | None = None
    ) -> None:
        self.path = path if isinstance(path, str) else path.path
        self.app = app
        self.limits = limits or Limits()
        self.closing = False
        self.tasks = asyncio.TaskGroup()
        self._lock_held = lock_held
        self._listener = None if isinstance(path, str) else path
        self._server: asyncio.AbstractServer
        self._connections: set[Connection] = set()
        self._arriving: dict[Connection, None] = {}  # in order of age
        self._of_peer: collections.Counter[tuple[int, int]] = collections.Counter()
        self._emptied: asyncio.Future[None] | None = None

    async def __aenter__(self) -> Self:
        """Raises ControlError when the socket is not to be had."""
        try:
            if self._listener is None:
                self._listener = listen(self.path, lock_held=self._lock_held)
            self._server = await _serve(lambda: Connection(self), self._listener.socket)
        except BaseException:
            self.app.close()
            if self._listener is not None:
                self._listener.close()
            raise
        await self.tasks.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        # The group is never told of exc: it would wrap it, and no request has a part in it.
        try:
            await self._close(self._server)
        finally:
            if self._listener is not None:
                self._listener.remove()
            self._abort()
            await self.tasks.__aexit__(None, None, None)

    async def _close(self, server: asyncio.AbstractServer) -> None:
        """No new client, and an end for those that are here."""
        server.close()
        for _ in range(_LAST_TURNS):  # who was let in at the last moment, and has asked, is answered
            await asyncio.sleep(0)
        self.closing = True
        self.app.close()
        for connection in list(self._connections):
            connection.finish()
        loop = asyncio.get_running_loop()
        alarm = loop.call_later(self.limits.grace, self._abort)
        try:
            while self._connections:
                self._emptied = loop.create_future()
                await self._emptied
            await server.wait_closed()
        finally:
            alarm.cancel()

    def _abort(self) -> None:
        for connection in list(self._connections):
            connection.abort()

    # From the connections.

    def admit(self, connection: Connection) -> bool:
        """Room is made at the cost of whoever has been asking nothing for longest."""
        self._connections.add(connection)
        self._of_peer[connection.key] += 1
        if self.closing:
            return False
        if self._of_peer[connection.key] > self.limits.of_peer:
            return self._evict(connection.key)
        return len(self._connections) <= self.limits.connections or self._evict()

    def _evict(self, key: tuple[int, int] | None = None) -> bool:
        """Whether room was made, at the cost of a connection that has asked nothing yet (key: one of that peer's)."""
        silent = next((each for each in self._arriving if key in (None, each.key)), None)
        if silent is not None:
            silent.evict()
        return silent is not None

    def forget(self, connection: Connection) -> None:
        self._arriving.pop(connection, None)
        if connection in self._connections:
            self._connections.discard(connection)
            self._of_peer[connection.key] -= 1
            if not self._of_peer[connection.key]:
                del self._of_peer[connection.key]
        if self.closing and not self._connections and self._emptied is not None and not self._emptied.done():
            self._emptied.set_result(None)

    def set_arriving(self, connection: Connection, arriving: bool) -> None:
        """Whether the connection is one whose request has not arrived yet."""
        self._arriving.pop(connection, None)
        if arriving:
            self._arriving[connection] = None

    def report(self, exc: Exception, request: Request) -> Reply:
        """Our own bug in answering a request: told to the loop's exception handler; the client gets a 500."""
        message = f"control: {request.method} {request.path} failed"
        asyncio.get_running_loop().call_exception_handler({"message": message, "exception": exc})
        return failure(500, "internal", f"{type(exc).__name__}: {exc}", "this is a bug of nssup")


async def _serve(factory: Callable[[], asyncio.Protocol], listener: socket.socket) -> asyncio.AbstractServer:
    """A server on the listener, which it owns. The socket file stays ours: 3.13 would remove it by itself."""
    keep_file: dict[str, Any] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}
    return await asyncio.get_running_loop().create_unix_server(factory, sock=listener, **keep_file)
