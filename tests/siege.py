"""One who besieges a control socket: `siege.py HOW SOCKET`, until its stdin ends. Says in a line when it is under way,
and in another what it did."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import select
import socket
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

UNDER_WAY = 6  # connections
FOLLOW = b"GET /v1/%s?follow=1 HTTP/1.1\r\nHost: x\r\n\r\n"


class Siege:
    def __init__(self, path: str) -> None:
        self.path = path
        self.held: list[socket.socket] = []
        self.made = 0

    def over(self, seconds: float = 0.0) -> bool:
        return bool(select.select([0], [], [], seconds)[0])

    def connect(self) -> socket.socket | None:
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        try:
            sock.connect(self.path)
        except OSError:  # the queue is full
            sock.close()
            return None
        self.made += 1
        if self.made == UNDER_WAY:
            print("under way", flush=True)
        return sock

    def say(self, sock: socket.socket | None, data: bytes) -> bool:
        """Whether it is still listened to."""
        if sock is None:
            return False
        try:
            sock.send(data)
        except BlockingIOError:
            pass
        except OSError:
            return False
        return True


def garbage(siege: Siege) -> None:
    chance = random.Random(1)
    while not siege.over(0.001):
        sock = siege.connect()
        siege.say(sock, chance.randbytes(chance.randrange(1, 5000)))
        if sock is not None:
            sock.close()


def half(siege: Siege) -> None:
    """Half a request, and the other half never."""
    while not siege.over(0.005):
        sock = siege.connect()
        if siege.say(sock, b"POST /v1/stop HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"):
            assert sock is not None
            siege.held.append(sock)


def body(siege: Siege) -> None:
    """A GiB, announced or in chunks."""
    for number in range(10**9):
        if siege.over(0.001):
            return
        sock = siege.connect()
        head = b"Content-Length: 1073741824" if number % 2 else b"Transfer-Encoding: chunked"
        chunk = b"x" * 65536 if number % 2 else b"10000\r\n" + b"x" * 65536 + b"\r\n"
        going = siege.say(sock, b"POST /v1/stop HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n\r\n")
        while going and sock is not None and not siege.over():
            select.select([], [sock], [], 0.1)
            going = siege.say(sock, chunk)
        if sock is not None:
            sock.close()


def loris(siege: Siege) -> None:
    """A byte now and then, on as many connections as it gets."""
    text = b"GET /v1/status HTTP/1.1\r\nHost: x\r\nX-Padding: " + b"y" * 1000
    for place in range(10**9):
        if siege.over(0.02):
            return
        siege.held = [sock for sock in siege.held if siege.say(sock, text[place % len(text) :][:1])]
        while len(siege.held) < 60 and (sock := siege.connect()) is not None:
            siege.held.append(sock)


def crowd(siege: Siege) -> None:
    """5000 connections, one after the other as fast as they are taken, all kept."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 6000), hard))
    while not siege.over():
        sock = siege.connect() if len(siege.held) < 5000 else None
        if sock is not None:
            siege.held.append(sock)
        elif siege.over(0.001):
            return


def deaf(siege: Siege) -> None:
    """Followers that never read."""
    for number in range(10**9):
        if siege.over(0.02):
            return
        sock = siege.connect() if len(siege.held) < 50 else None
        if siege.say(sock, FOLLOW % (b"logs" if number % 2 else b"events")):
            assert sock is not None
            siege.held.append(sock)


HOW: dict[str, Callable[[Siege], None]] = {
    "garbage": garbage, "half": half, "body": body, "loris": loris, "crowd": crowd, "deaf": deaf
}  # fmt: skip


def main() -> None:
    siege = Siege(sys.argv[2])
    with contextlib.suppress(BrokenPipeError):
        HOW[sys.argv[1]](siege)
    os.write(1, f"{siege.made} connections\n".encode())


if __name__ == "__main__":
    main()
