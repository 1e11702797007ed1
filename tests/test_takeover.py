"""Supervisors killed at every step and at random, with real processes; what is done and what must hold: takeover.py."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import takeover
from launching import needs_root

from nssup import clone, machine, wire
from nssup.events import Kill, Restart, Start, State, Stop
from nssup.loop import Supervisor
from nssup.spec import Backoff, PoolSpec, RestartPolicy, StopStep

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from nssup import record

# Whole histories of supervisors, on a machine that may have much else to do.
LONGEST = 300
pytestmark = [needs_root, pytest.mark.timeout(LONGEST)]

PROGRAM = Path(takeover.__file__)
PARTS = 2


class Outcomes:
    """What came of the cases, as they come: some run at a time."""

    def __init__(self) -> None:
        self._found: dict[str, dict[str, Any]] = {}
        self._running = [
            subprocess.Popen([sys.executable, PROGRAM, "points", "--part", f"{part}/{PARTS}"], stdout=subprocess.PIPE)
            for part in range(PARTS)
        ]
        self._turns = {name: self._running[at % PARTS] for at, name in enumerate(takeover.cases())}

    def of(self, name: str) -> dict[str, Any]:
        """Waits for that one."""
        stdout = self._turns[name].stdout
        assert stdout is not None
        while name not in self._found:
            line = stdout.readline()
            assert line, "it was not come to"
            outcome = json.loads(line)
            self._found[outcome["name"]] = outcome
        return self._found[name]

    def close(self) -> None:
        for process in self._running:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def outcomes() -> Iterator[Outcomes]:
    """All are run at the first that is asked for."""
    running = Outcomes()
    yield running
    running.close()


@pytest.mark.parametrize("name", takeover.cases())
def test_the_next_one_takes_everything_over(name: str, outcomes: Outcomes) -> None:
    assert outcomes.of(name)["wrong"] == []


def run(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, PROGRAM, *words], capture_output=True, text=True, timeout=LONGEST - 10, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_killed_at_random_instants() -> None:
    print(run("random", "--kills", "12", "--workers", "40", "--seed", "5"))


@pytest.mark.slow
def test_killed_in_each_phase_of_its_recovery() -> None:
    """Each is hit for certain; what the kill at a random instant adds is that nobody chose it."""
    print(run("recovery", "--kills", "8", "--each", "2", "--workers", "20", "--seed", "5"))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("redis-server") or not shutil.which("redis-benchmark"), reason="needs redis")
def test_redis_under_load_does_not_notice() -> None:
    print(run("redis"))


# --- an init that lies -----------------------------------------------------------------------------------------------


class Liar:
    """A process that pretends to be the init of lives: says anything, and does nothing that it is told."""

    def __init__(self) -> None:
        self.lines: list[socket.socket] = []
        self._processes: list[subprocess.Popen[bytes]] = []

    def launch(
        self, plan: record.Plan, *, merge: bool = False, staging: int = -1, sockets: Sequence[int] = ()
    ) -> clone.Process:
        """As Launcher.launch."""
        lent: list[int] = []
        line, theirs = clone._line(lent)
        self.lines.append(socket.socket(fileno=theirs))
        logs = []
        for _ in range(2):
            read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            os.close(write)
            logs.append(read)
        process = subprocess.Popen(["/bin/sleep", "1000"])
        self._processes.append(process)
        pidfd = os.pidfd_open(process.pid)
        return clone.Process(pidfd, process.pid, line, (logs[0], logs[1]), plan, 1, bytes(16))

    def close(self) -> None:
        for line in self.lines:
            line.close()
        for process in self._processes:
            process.kill()
            process.wait()


def lie(chance: random.Random, generation: int) -> bytes:
    """A datagram of messages such as an init may say, in any order and with any numbers."""
    number = chance.choice((generation, generation, generation, generation + 1, 0, 2**32 - 1))
    step, error = chance.choice((0, 20, 43, 2**32 - 1)), chance.choice((0, 2, -(2**31)))
    ended = struct.pack(
        "<iiQQQQ", chance.choice((0, 1, 2, 3, -9)), chance.choice((0, 3, 9, -(2**31))), 1, 2**64 - 1, 3, 4
    )
    phase = chance.choice((*wire.Phase, 77))
    made = (
        wire.message(wire.Type.STARTED, struct.pack("<Ii", number, chance.choice((2, 0, -5)))),
        wire.message(wire.Type.FAILED, struct.pack("<IIiI", number, step, error, 0)),
        wire.message(wire.Type.EXITED, struct.pack("<II", number, 0) + ended),
        wire.message(wire.Type.EMPTY, struct.pack("<II", number, 0)),
        wire.message(wire.Type.STATE, struct.pack("<IIIIiIiI", number, 1, phase, 9, -7, step, error, 3) + ended),
        wire.message(wire.Type.NOTIFY, chance.randbytes(chance.randrange(300))),
        wire.message(chance.randrange(256), chance.randbytes(chance.randrange(40))),
        chance.randbytes(chance.randrange(1, 60)),
    )
    return b"".join(chance.choices(made, k=chance.randrange(1, 4)))


@pytest.mark.parametrize("seed", range(20))
async def test_an_init_that_lies_harms_nobody_but_itself(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it says, and whatever operators want meanwhile: no error, and everything comes to rest."""
    chance, liar = random.Random(seed), Liar()
    troubles: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: troubles.append(context))
    monkeypatch.setattr(machine, "REST", 0.01)
    with contextlib.closing(liar):
        async with Supervisor() as supervisor:
            monkeypatch.setattr(supervisor._launcher, "launch", liar.launch)
            at_once = RestartPolicy(
                policy=chance.choice(("always", "on-failure", "never")), backoff=Backoff(first=0.001)
            )
            stop = (StopStep(15, 0.005), StopStep(None))
            supervisor.add_pool(PoolSpec(name="web", command=("x",), workers=3, restart=at_once, stop=stop))
            for _ in range(400):
                for life in supervisor._lives.values():
                    life.adopted = seed % 2 == 1
                line = chance.choice(liar.lines[-6:])
                with contextlib.suppress(OSError):
                    line.send(lie(chance, chance.randrange(1, 4)))
                if chance.random() < 0.15:
                    wish = chance.choice((Stop(), Start(), Restart(), Kill(15), Kill(9, tree=True)))
                    supervisor.feed(f"web/{chance.randrange(3)}", wish)
                await asyncio.sleep(0)
            async with asyncio.timeout(10):
                await supervisor.stop_all()
            assert {worker.state for worker in supervisor.workers.workers.values()} == {State.STOPPED}
            assert supervisor._lives == {}
    assert troubles == []


async def test_an_init_that_says_it_is_empty_and_stays_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    liar = Liar()
    ended: asyncio.Queue[str] = asyncio.Queue()
    with contextlib.closing(liar):
        async with Supervisor() as supervisor:
            supervisor.subscribe(lambda event: ended.put_nowait(event.event) if event.event == "finished" else None)
            monkeypatch.setattr(supervisor._launcher, "launch", liar.launch)
            supervisor.add_pool(
                PoolSpec(name="web", command=("x",), type="oneshot", restart=RestartPolicy(policy="never"))
            )
            record = struct.pack("<II", 1, 0) + struct.pack("<iiQQQQ", 1, 0, 0, 0, 0, 0)
            empty = wire.message(wire.Type.EMPTY, struct.pack("<II", 1, 0))
            liar.lines[0].send(wire.message(wire.Type.EXITED, record) + empty)
            async with asyncio.timeout(10):
                assert await ended.get() == "finished"
