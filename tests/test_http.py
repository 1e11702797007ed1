"""The HTTP server on its Unix socket: honest clients, hostile ones, and what it leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from nssup import http
from nssup.errors import ControlError, ExitCode
from nssup.listener import listen

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
    from pathlib import Path

pytestmark = pytest.mark.both_loops

GET = b"GET %s HTTP/1.1\r\nHost: nssup\r\n\r\n"


class Reply(NamedTuple):
    status: int
    headers: Sequence[tuple[str, str]]
    body: bytes | AsyncGenerator[bytes, None]


class App:
    """Answers by path; `/wait` waits for `release`, `/stream` streams what `feed` gives."""

    def __init__(self) -> None:
        self.requests: list[http.Request] = []
        self.release = asyncio.Event()
        self.waiting = asyncio.Event()
        self.feed: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.told_gone = asyncio.Event()
        self.produced = 0
        self.closed = False

    def close(self) -> None:
        self.closed = True
        self.release.set()
        self.feed.put_nowait(None)

    def __call__(self, request: http.Request) -> Reply | Coroutine[Any, Any, Reply]:
        self.requests.append(request)
        answers: dict[str, Callable[[], Reply | Coroutine[Any, Any, Reply]]] = {
            "/wait": self._wait,
            "/stream": lambda: Reply(200, [], self._stream()),
            "/flood": lambda: Reply(200, [], self._flood()),
            "/later": self._later,
            "/boom": self._boom,
            "/big": lambda: Reply(200, [], b"x" * (4 << 20)),
        }
        return answers.get(request.path, lambda: Reply(200, [("Content-Type", "text/plain")], b"hello\n"))()

    async def _wait(self) -> Reply:
        self.waiting.set()
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.told_gone.set()
            raise
        return Reply(200, [], b"waited\n")

    async def _later(self) -> Reply:
        await asyncio.sleep(0)
        return Reply(200, [], self._stream())

    async def _stream(self) -> AsyncGenerator[bytes, None]:
        self.waiting.set()
        try:
            while (item := await self.feed.get()) is not None:
                yield item
        finally:
            self.told_gone.set()

    async def _flood(self) -> AsyncGenerator[bytes, None]:
        self.waiting.set()
        try:
            while True:
                self.produced += 1
                yield b"y" * 65536
                await asyncio.sleep(0)
        finally:
            self.told_gone.set()

    def _boom(self) -> Reply:
        raise RuntimeError("a bug")


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def ask(self, data: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
        self.writer.write(data)
        return await self.answer()

    async def answer(self, *, head: bool = False) -> tuple[int, dict[bytes, bytes], bytes]:
        status, headers = await self.head()
        if b"content-length" in headers and not head:
            return status, headers, await self.reader.readexactly(int(headers[b"content-length"]))
        return status, headers, b""

    async def head(self) -> tuple[int, dict[bytes, bytes]]:
        lines = (await self.reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
        pairs = (line.partition(b": ") for line in lines[1:-2])
        return int(lines[0].split()[1]), {name.lower(): value for name, _, value in pairs}

    async def chunk(self) -> bytes:
        size = int(await self.reader.readline(), 16)
        data = await self.reader.readexactly(size + 2)
        return data[:-2]

    async def at_end(self) -> bool:
        try:
            return await self.reader.read(1) == b""
        except ConnectionError:
            return True

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


class Server(http.Server):
    """Says which connections came and went."""

    def __init__(self, path: str, app: App, limits: http.Limits) -> None:
        super().__init__(path, app, limits=limits)
        self.admitted: asyncio.Queue[http.Connection] = asyncio.Queue()
        self.lost: asyncio.Queue[http.Connection] = asyncio.Queue()

    def admit(self, connection: http.Connection) -> bool:
        self.admitted.put_nowait(connection)
        return super().admit(connection)

    def forget(self, connection: http.Connection) -> None:
        super().forget(connection)
        self.lost.put_nowait(connection)


class Site:
    """A running server with its app, and the clients of a test."""

    def __init__(self, server: Server, app: App) -> None:
        self.server = server
        self.app = app
        self.clients: list[Client] = []

    async def connect(self, limit: int = 1 << 16) -> Client:
        client = Client(*await asyncio.open_unix_connection(self.server.path, limit=limit))
        self.clients.append(client)
        return client


@pytest.fixture
async def site(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Site]:
    limits = getattr(request, "param", http.Limits())
    app = App()
    async with Server(str(tmp_path / "s.sock"), app, limits) as server:
        site = Site(server, app)
        yield site
        for client in site.clients:
            await client.close()
    assert app.closed
    assert not (tmp_path / "s.sock").exists()


def limits(**changes: Any) -> pytest.MarkDecorator:  # noqa: ANN401 - the fields of Limits
    return pytest.mark.parametrize("site", [http.Limits(**changes)], indirect=True)


async def test_answers_and_keeps_the_connection(site: Site) -> None:
    client = await site.connect()
    for _ in range(3):
        status, headers, body = await client.ask(GET % b"/x?a=1")
        assert (status, headers[b"content-type"], body) == (200, b"text/plain", b"hello\n")
    request = site.app.requests[0]
    assert (request.method, request.path, request.query) == ("GET", "/x", "a=1")
    assert request.peer[:3] == (os.getpid(), os.getuid(), os.getgid())


async def test_pipelined_requests_are_answered_in_order(site: Site) -> None:
    client = await site.connect()
    client.writer.write(GET % b"/wait" + GET % b"/second")
    await site.app.waiting.wait()
    assert len(site.app.requests) == 1, "one at a time"
    site.app.release.set()
    assert [(await client.answer())[2], (await client.answer())[2]] == [b"waited\n", b"hello\n"]


async def test_a_request_may_come_byte_by_byte(site: Site) -> None:
    client = await site.connect()
    for byte in b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbody":
        client.writer.write(bytes([byte]))
        await asyncio.sleep(0)
    assert (await client.answer())[0] == 200
    assert site.app.requests[0].body == b"body"


async def test_a_chunked_body_is_put_together(site: Site) -> None:
    client = await site.connect()
    head = b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert (await client.ask(head + b"2\r\nab\r\n1\r\nc\r\n0\r\n\r\n"))[0] == 200
    assert site.app.requests[0].body == b"abc"


async def test_head_has_no_body(site: Site) -> None:
    client = await site.connect()
    client.writer.write(b"HEAD /x HTTP/1.1\r\nHost: a\r\n\r\n")
    status, headers, _ = await client.answer(head=True)
    assert (status, headers[b"content-length"]) == (200, b"6")
    client.writer.write(b"HEAD /stream HTTP/1.1\r\nHost: a\r\n\r\n")
    assert (await client.answer(head=True))[0] == 200
    assert (await client.ask(GET % b"/x"))[2] == b"hello\n", "the connection is still in step"


async def test_connection_close_is_honoured(site: Site) -> None:
    client = await site.connect()
    assert (await client.ask(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"))[2] == b"hello\n"
    assert await client.at_end()


async def test_http_1_0_gets_its_stream_unframed(site: Site) -> None:
    client = await site.connect()
    client.writer.write(b"GET /stream HTTP/1.0\r\n\r\n")
    site.app.feed.put_nowait(b"one\n")
    site.app.feed.put_nowait(None)
    await client.head()
    assert await client.reader.read() == b"one\n"


@pytest.mark.parametrize("path", [b"/stream", b"/later"])
async def test_a_stream_comes_in_chunks_and_ends(site: Site, path: bytes) -> None:
    client = await site.connect()
    client.writer.write(GET % path)
    status, headers = await client.head()
    assert (status, headers[b"transfer-encoding"]) == (200, b"chunked")
    site.app.feed.put_nowait(b"one\n")
    assert await client.chunk() == b"one\n"
    site.app.feed.put_nowait(None)
    assert await client.chunk() == b""
    assert (await client.ask(GET % b"/x"))[2] == b"hello\n"


@pytest.mark.parametrize("path", [b"/stream", b"/wait"])
async def test_a_handler_is_told_that_its_client_is_gone(site: Site, path: bytes) -> None:
    client = await site.connect()
    client.writer.write(GET % path)
    await site.app.waiting.wait()
    await client.close()
    await site.app.told_gone.wait()
    assert (await (await site.connect()).ask(GET % b"/x"))[0] == 200


async def test_a_stream_waits_for_a_client_that_does_not_read(site: Site) -> None:
    client = await site.connect(limit=1)
    client.writer.write(GET % b"/flood")
    await site.app.waiting.wait()
    produced = -1
    while produced != site.app.produced:
        produced = site.app.produced
        assert (await (await site.connect()).ask(GET % b"/x"))[0] == 200
        for _ in range(10):
            await asyncio.sleep(0)
    assert produced * 65536 < 4 << 20
    client.writer.transport.abort()
    await site.app.told_gone.wait()


@limits(deadline=0.02)
async def test_a_client_that_half_closes_and_does_not_read_is_cut_off(site: Site) -> None:
    client = await site.connect(limit=1)
    client.writer.write(GET % b"/flood")
    await site.app.waiting.wait()
    client.writer.write_eof()
    await site.app.told_gone.wait()


async def test_a_bug_in_the_app_is_a_500_and_is_told(site: Site) -> None:
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context))
    client = await site.connect()
    status, _, body = await client.ask(GET % b"/boom")
    assert (status, b'"internal"' in body) == (500, True)
    assert str(told[0]["exception"]) == "a bug"
    assert (await client.ask(GET % b"/x"))[0] == 200


GARBAGE = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    b"hello there\r\n\r\n",
    b"GET / HTTP/9.9\r\nHost: a\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",  # no Host
    b"GET / HTTP/1.1\r\nHost: a\r\nHost : b\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n",
    b"\r\n\r\n\r\n\0\0\0\r\n\r\n",
]


@pytest.mark.parametrize("data", GARBAGE)
async def test_garbage_is_answered_and_cut_off(site: Site, data: bytes) -> None:
    client = await site.connect()
    status, headers, body = await client.ask(data)
    assert 400 <= status < 600
    assert headers[b"connection"] == b"close"
    assert b'"error"' in body
    assert await client.at_end()
    assert site.app.requests == []


async def test_a_head_too_large_is_refused_in_one_piece_and_without_end(site: Site) -> None:
    whole = await site.connect()
    assert (await whole.ask(b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 20000 + b"\r\n\r\n"))[0] == 431
    endless = await site.connect()
    assert (await endless.ask(b"GET /" + b"x" * 40000))[0] == 431
    assert site.app.requests == []


async def test_a_body_too_large_is_refused_before_it_is_sent(site: Site) -> None:
    client = await site.connect()
    status, _, body = await client.ask(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1073741824\r\n\r\n")
    assert (status, b"body-too-large" in body) == (413, True)
    assert await client.at_end()


async def test_a_chunked_body_too_large_is_refused_on_the_way(site: Site) -> None:
    client = await site.connect()
    client.writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
    client.writer.write((b"10000\r\n" + b"x" * 65536 + b"\r\n") * 17)
    assert (await client.answer())[0] == 413


async def test_expect_100_continue(site: Site) -> None:
    client = await site.connect()
    client.writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n")
    assert (await client.head())[0] == 100
    assert (await client.ask(b"ok"))[0] == 200


async def test_what_is_sent_too_early_is_bounded(site: Site) -> None:
    client = await site.connect()
    client.writer.write(GET % b"/wait")
    await site.app.waiting.wait()
    client.writer.write(b"x" * 200_000)
    await site.app.told_gone.wait()
    assert await client.at_end()


@limits(deadline=0.02)
async def test_a_silent_client_is_closed(site: Site) -> None:
    assert await (await site.connect()).at_end()


@limits(deadline=0.02)
async def test_half_a_request_times_out(site: Site) -> None:
    for half in (b"GET / HT", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nab"):
        client = await site.connect()
        assert (await client.ask(half))[0] == 408
        assert await client.at_end()


@limits(deadline=0.02)
async def test_a_reply_that_is_not_taken_is_cut_off(site: Site) -> None:
    client = await site.connect(limit=1)
    client.writer.write(GET % b"/big")
    assert await site.server.lost.get() is await site.server.admitted.get()


@limits(deadline=0.02)
async def test_a_request_under_way_has_no_deadline(site: Site) -> None:
    client = await site.connect()
    client.writer.write(GET % b"/wait")
    await site.app.waiting.wait()
    idle = await site.connect()
    assert await idle.at_end(), "its deadline has passed, and so has that time for the other"
    site.app.release.set()
    assert (await client.answer())[2] == b"waited\n"


@limits(connections=4)
async def test_silent_connections_make_room_for_an_honest_client(site: Site) -> None:
    silent = [await site.connect() for _ in range(20)]
    honest = await site.connect()
    assert (await honest.ask(GET % b"/x"))[2] == b"hello\n"
    status, _, body = await silent[0].answer()
    assert (status, b"too-many-connections" in body) == (503, True)
    assert len(site.server._connections) <= 4


@limits(of_peer=2)
async def test_one_peer_has_not_all_connections(site: Site) -> None:
    """It makes room for itself by what it left silent, and is refused when all that it has are busy."""
    silent = await site.connect()
    for _ in range(2):
        site.app.waiting.clear()
        (await site.connect()).writer.write(GET % b"/wait")
        await site.app.waiting.wait()
    assert (await silent.answer())[0] == 503
    assert (await (await site.connect()).answer())[0] == 503
    site.app.release.set()
    assert (await site.clients[1].answer())[0] == 200


@limits(connections=2)
async def test_beyond_the_limit_of_busy_connections_is_refused(site: Site) -> None:
    for _ in range(2):
        site.app.waiting.clear()
        (await site.connect()).writer.write(GET % b"/wait")
        await site.app.waiting.wait()
    client = await site.connect()
    assert (await client.answer())[0] == 503
    assert await client.at_end()
    site.app.release.set()
    assert (await site.clients[0].answer())[0] == 200


async def test_closing_ends_waits_and_streams_and_cuts_off_the_rest(tmp_path: Path) -> None:
    app = App()
    async with Server(str(tmp_path / "c.sock"), app, http.Limits(grace=0.02)) as server:
        site = Site(server, app)
        waiter, flooded, idle = await site.connect(), await site.connect(limit=1), await site.connect()
        assert (await idle.ask(GET % b"/x"))[0] == 200
        waiter.writer.write(GET % b"/wait")
        await app.waiting.wait()
        app.waiting.clear()
        flooded.writer.write(GET % b"/flood")
        await app.waiting.wait()
    status, headers, body = await waiter.answer()
    assert (status, headers[b"connection"], body) == (200, b"close", b"waited\n")
    assert await idle.at_end()
    assert app.told_gone.is_set()
    for client in site.clients:
        await client.close()


async def test_an_exception_goes_through_the_server_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"):
        async with http.Server(str(tmp_path / "s.sock"), App()):
            raise ValueError("mine")
    assert not (tmp_path / "s.sock").exists()


# The socket file.


async def test_the_socket_is_for_owner_and_group_only(site: Site) -> None:
    found = os.stat(site.server.path)
    assert stat.S_ISSOCK(found.st_mode)
    assert stat.S_IMODE(found.st_mode) == 0o660


async def test_the_umask_is_left_alone(site: Site) -> None:
    umask = os.umask(0)
    os.umask(umask)
    assert umask != 0o117


def test_the_directory_is_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "s.sock"
    listener = listen(str(path), lock_held=True)
    assert path.is_socket()
    listener.close()
    listener.close()
    assert not path.exists()


def test_a_path_too_long_is_said(tmp_path: Path) -> None:
    with pytest.raises(ControlError, match="Linux takes 107") as caught:
        listen(str(tmp_path / ("x" * 108)), lock_held=True)
    assert caught.value.exit_code is ExitCode.CONFIG
    assert list(tmp_path.iterdir()) == []


def test_a_stale_socket_is_replaced_by_who_holds_the_lock(tmp_path: Path) -> None:
    path = str(tmp_path / "s.sock")
    listen(path, lock_held=False).socket.close()
    with pytest.raises(ControlError, match="nobody listens"):
        listen(path, lock_held=False)
    listen(path, lock_held=True).close()


def test_a_live_socket_is_never_replaced(tmp_path: Path) -> None:
    path = str(tmp_path / "s.sock")
    with socket.socket(socket.AF_UNIX) as live:
        live.bind(path)
        live.listen(0)
        with pytest.raises(ControlError, match="another program listens"):
            listen(path, lock_held=True)
    assert os.path.exists(path)


def test_a_file_in_the_way_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    path.write_text("precious")
    with pytest.raises(ControlError, match="is no socket"):
        listen(str(path), lock_held=True)
    assert path.read_text() == "precious"


def test_no_directory_to_be_had_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ControlError, match="cannot listen"):
        listen(str(tmp_path / "file" / "s.sock"), lock_held=True)


async def test_a_listener_made_before_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    async with http.Server(listen(str(path), lock_held=True), App()) as server:
        client = Client(*await asyncio.open_unix_connection(server.path))
        assert (await client.ask(GET % b"/x"))[0] == 200
        await client.close()
    assert not path.exists()


async def test_a_socket_that_somebody_else_made_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    async with http.Server(str(path), App()):
        path.unlink()
        path.write_text("theirs")
    assert path.read_text() == "theirs"
