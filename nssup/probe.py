"""One try of a probe: asks a program over a socket, or reads what it writes. Who is asked, how often and what it means
is decided elsewhere.
"""

import asyncio
import errno
import re
import socket
from collections.abc import Callable

import msgspec

from nssup.errors import errno_name
from nssup.follower import Follower
from nssup.spec import ADDRESS, URL, Probe

ANSWER = 16 * 1024  # bytes of an HTTP answer that are read: its head has to be within them
LOOPBACK = ("127.0.0.1", "::1")
_STATUS = re.compile(rb"HTTP/\d\.\d (\d{3})\b")


class Failed(Exception):  # goes no further than the prober, which counts it
    """The program did not answer as it should; says why."""


async def ask(probe: Probe, place: str) -> None:
    """One try over the network; place: the probe's text with its fields filled in. Raises Failed."""
    try:
        async with asyncio.timeout(probe.timeout):
            if probe.http is not None:
                await _ask_http(place)
            elif probe.unix is not None:
                (await _connect(socket.AF_UNIX, place)).close()
            else:
                host, port = _address(place)
                (await _connect_tcp(host, port)).close()
    except TimeoutError:
        raise Failed(f"no answer within {probe.timeout:g} s") from None
    except OSError as error:
        raise Failed(errno_name(error.errno or errno.EIO)) from None
    except ValueError as error:  # an address that is none
        raise Failed(str(error)) from None


def _address(place: str) -> tuple[str, int]:
    found = ADDRESS.fullmatch(place)
    if found is None:
        raise Failed(f"{place} is no address")
    return found[1].strip("[]"), int(found[2])


async def _connect_tcp(host: str, port: int) -> socket.socket:
    hosts = LOOPBACK if host == "localhost" else (host,)
    refused: OSError | None = None
    for each in hosts:
        try:
            return await _connect(socket.AF_INET6 if ":" in each else socket.AF_INET, (each, port))
        except OSError as error:
            refused = refused or error
    assert refused is not None
    raise refused


async def _connect(family: int, address: str | tuple[str, int]) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        await asyncio.get_running_loop().sock_connect(made, address)
    except BaseException:
        made.close()
        raise
    return made


async def _ask_http(url: str) -> None:
    found = URL.fullmatch(url)
    if found is None:
        raise Failed(f"{url} is no URL")
    host, port, path = found[1], int(found[2] or 80), found[3] or "/"
    with await _connect_tcp(host.strip("[]"), port) as connection:
        loop = asyncio.get_running_loop()
        request = f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nUser-Agent: nssup\r\nConnection: close\r\n\r\n"
        await loop.sock_sendall(connection, request.encode("ascii"))
        answer = b""
        while b"\r\n\r\n" not in answer and len(answer) < ANSWER:
            more = await loop.sock_recv(connection, ANSWER)
            if not more:
                break
            answer += more
    status = _STATUS.match(answer)
    if status is None:
        raise Failed("no HTTP answer")
    if not 200 <= int(status[1]) < 400:
        raise Failed(f"HTTP status {int(status[1])}")


class NotAsked(Exception):  # goes no further than the prober, which tries again
    """The program could not be asked, which says nothing about it."""


class _Record(msgspec.Struct):
    worker: str | None = None
    generation: int | None = None
    msg: str | None = None
    data: msgspec.Raw = msgspec.Raw(b"")


_decode = msgspec.json.Decoder(_Record).decode


def matches(pattern: "re.Pattern[str]", generation: int, records: bytes) -> bool:
    """Whether a line of that life matches; records: whole ones, but for the last."""
    for line in records.splitlines():
        try:
            record = _decode(line)
        except msgspec.DecodeError:
            continue
        text = bytes(record.data).decode(errors="replace") if record.msg is None else record.msg
        if record.generation == generation and pattern.search(text):
            return True
    return False


class LineWatch(Follower):
    """Waits for a line of one life, and calls back, at most once. To be put among the followers of the logs; the
    callback comes from the middle of their work."""

    def __init__(
        self,
        worker_id: str,
        generation: int,
        pattern: str,
        found: Callable[[], None],
        leave: Callable[[Follower], object],
    ) -> None:
        super().__init__(frozenset({worker_id.partition("/")[0]}), (worker_id,), 0, leave)
        self._worker_id = worker_id
        self._generation = generation
        self._pattern = re.compile(pattern)
        self._found = found

    def offer(self, pool: str, worker_id: str | None, records: bytes, size: int) -> None:
        if worker_id == self._worker_id and matches(self._pattern, self._generation, records):
            self.close()
            self._found()
