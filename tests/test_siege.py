"""Whatever clients do to the control socket: exits are handled, honest clients are served, nothing is left of it.

What is promised is 250 ms (99 of 100 exits) and 1 s, and printed; the limits here are for slow and busy machines.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from live import PATIENCE, Up, needs_namespaces
from siege import HOW

from nssup import client

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [needs_namespaces, pytest.mark.slow]

POOLS = """
[pool.web]
command = ["sh", "-c", "while :; do echo something to be logged; sleep 0.05; done"]
workers = 4
[pool.web.restart]
backoff = { first = "10ms", factor = 1.0, max = "10ms", jitter = 0.0 }
"""
KILLS = 25
EXIT_HANDLED = 10.0  # seconds
SERVED = 10.0


class Events:
    """An honest follower, there before the siege."""

    def __init__(self, path: str) -> None:
        data = client.request("GET", "/v1/events?select=web&n=0")
        self.socket, answer = client.ask(path, data, PATIENCE)
        self._lines = self._read(answer)

    def _read(self, answer: client.Answer) -> Iterator[dict[str, Any]]:
        for chunk in answer.chunks():
            yield from map(json.loads, chunk.splitlines())

    def until_exit(self, worker_id: str, generation: int) -> None:
        for event in self._lines:
            ended = event.get("detail", {}).get("ended", event)
            if event.get("worker") == worker_id and "exit" in event and ended["generation"] == generation:
                return


def descriptors(host_pid: int) -> int:
    return len(os.listdir(f"/proc/{host_pid}/fd"))


def settle(host_pid: int, wanted: int) -> None:
    """Until the supervisor has no more descriptors than that: what it closes, it closes at once or at a deadline."""
    until = time.monotonic() + PATIENCE
    while descriptors(host_pid) > wanted and time.monotonic() < until:
        time.sleep(0.05)
    assert descriptors(host_pid) <= wanted


@pytest.mark.timeout(240)
@pytest.mark.parametrize("how", [*[[each] for each in HOW], [*HOW]], ids="-".join)
def test_under_siege(tmp_path: Path, how: list[str]) -> None:
    with Up(tmp_path, POOLS) as up:
        up.wait_running(*(f"web/{n}" for n in range(4)))
        at_rest = descriptors(up.host_pid)
        events = Events(str(up.socket))
        script = str(Path(__file__).with_name("siege.py"))
        besiegers = [
            subprocess.Popen(
                [sys.executable, script, each, str(up.socket)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            for each in how
        ]
        handled, served = [], []
        try:
            for besieger in besiegers:
                assert besieger.stdout is not None
                assert besieger.stdout.readline() == b"under way\n"
            for number in range(KILLS):
                began = time.monotonic()
                worker_id = f"web/{number % 4}"
                worker = up.wait_running(worker_id)[0]
                served.append((time.monotonic() - began) / 2)  # two requests
                handled.append(kill_and_hear(events, worker))
        finally:
            made = [besieger.communicate()[0].decode() for besieger in besiegers]
            events.socket.close()
        assert all(line.endswith(" connections\n") for line in made), made
        print(f"{how}: exits {sorted(handled)[-1] * 1e3:.0f} ms at most, served in {max(served) * 1e3:.0f} ms at most")
        assert sorted(handled)[-1] < EXIT_HANDLED
        assert max(served) < SERVED
        settle(up.host_pid, at_rest)
        up.end()
        assert not any("task" in line.lower() or "Traceback" in line for line in up.said), up.said


def kill_and_hear(events: Events, worker: dict[str, Any]) -> float:
    """Seconds from a worker's end until its exit is told."""
    pidfd = os.pidfd_open(worker["host_pid"])
    try:
        began = time.monotonic()
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        events.until_exit(worker["id"], worker["generation"])
        return time.monotonic() - began
    finally:
        os.close(pidfd)


def test_a_socket_that_nobody_accepts_on_says_so(tmp_path: Path) -> None:
    """A supervisor that hangs is not one that is not there."""
    path = str(tmp_path / "s.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        sock = client.connect(path)
        sock.settimeout(0.05)
        with pytest.raises(client.ClientError) as error:
            client.Answer(sock, path)
        sock.close()
    assert error.value.exit_code == client.TIMED_OUT
