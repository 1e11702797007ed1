"""kill -9 the supervisor again and again while its workers write: nothing missing, nothing twice, exit codes right.

    python tests/crash.py [--kills 50] [--workers 200] [--seed N]

Half of the workers run on, half end by themselves with a code that tells their generation. They write numbered lines,
identical lines, bursts, long lines and ends without a newline, and count the bytes that the kernel took from them. At
the end the streams rebuilt from the records must be as long as what was counted, every record behind the one before.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from nssup.lines import Record, content

WORKER = """
import os, random, select, sys
lives = os.environ["NSSUP_ID"].replace("/", "_") + "." + os.environ["NSSUP_GENERATION"]
chance = random.Random(lives)
count = os.open(sys.argv[1] + "/" + lives, os.O_CREAT | os.O_WRONLY)
written = turn = 0
while turn < int(sys.argv[2]) or sys.argv[2] == "0":
    turn += 1
    same, lines = b"the same line\\n", []
    for number in range(chance.randrange(30)):
        lines.append(same if chance.random() < 0.4 else b"%d.%d\\n" % (turn, number))
    if chance.random() < 0.1:
        lines.append(b"x" * chance.randrange(1, 40000) + b"\\n")
    data = b"".join(lines)
    if chance.random() < 0.2:
        data = data[:-1]
    while data:
        sent = os.write(1, data)
        written += sent
        data = data[sent:]
        os.pwrite(count, b"%020d" % written, 0)
    select.select([], [], [], chance.random() * float(sys.argv[3]))
sys.exit(int(os.environ["NSSUP_GENERATION"]) % 200)
"""
ONE_WRITE = 70_000  # bytes that a worker may have written and not counted yet when it was killed
COMMAND = (sys.executable, "-m", "nssup")
_decode = msgspec.json.Decoder(Record).decode


class Outcome(NamedTuple):
    lives: int
    bytes: int
    wrong: list[str]
    restarted: list[str]  # of the workers that run on: none should be


def config(home: Path, workers: int) -> str:
    long = max(workers // 2, 1)
    rest = 0.004 * workers
    return f"""
version = 1
[supervisor]
state_dir = "{home}/state"
log_dir = "{home}/log"
[pool.long]
command = ["{sys.executable}", "-S", "{home}/worker.py", "{home}/count", "0", "{rest}"]
workers = {long}
[pool.short]
command = ["{sys.executable}", "-S", "{home}/worker.py", "{home}/count", "20", "{rest}"]
workers = {workers - long}
[pool.short.restart]
backoff = {{ first = "10ms", max = "50ms" }}
"""


class Host:
    """A supervisor in a directory of its own, killed and started again."""

    def __init__(self, home: Path, workers: int) -> None:
        self.home = home
        (home / "count").mkdir()
        (home / "worker.py").write_text(WORKER)
        (home / "nssup.toml").write_text(config(home, workers))
        self.stderr = (home / "stderr").open("ab")
        self.supervisor = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        command = [*COMMAND, "up", "-c", str(self.home / "nssup.toml")]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=self.stderr)

    def kill(self) -> None:
        self.supervisor.kill()
        self.supervisor.wait()

    def ctl(self, *words: str) -> str:
        socket = str(self.home / "state/run/nssup.sock")
        return subprocess.run(
            [*COMMAND, "ctl", *words, "--socket", socket], capture_output=True, text=True, check=False
        ).stdout

    def ready(self) -> dict[str, Any]:
        """The status, once it answers."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with contextlib.suppress(ValueError):
                document: dict[str, Any] = json.loads(self.ctl("status", "--json"))
                if "workers" in document:
                    return document
        raise TimeoutError("no answer from the supervisor")

    def end(self) -> None:
        self.ctl("shutdown")
        try:
            self.supervisor.wait(60)
        finally:
            self.stderr.close()


def rebuilt(home: Path, wrong: list[str]) -> dict[tuple[str, int], int]:
    """Bytes in the records of each life, which must follow each other without a gap."""
    sizes: dict[tuple[str, int], int] = collections.defaultdict(int)
    for pool in ("long", "short"):
        for line in (home / f"log/{pool}.jsonl").read_bytes().splitlines():
            record = _decode(line)
            if record.stream != "stdout":
                wrong.append(f"a record that no worker wrote: {line[:200]!r}")
                continue
            assert record.worker is not None
            assert record.generation is not None
            life = record.worker, record.generation
            if record.offset != sizes[life]:
                wrong.append(f"{life}: at {sizes[life]} comes {record.offset}")
                sizes[life] = record.offset or 0
            sizes[life] += len(content(record))
    return sizes


def exits(home: Path, wrong: list[str]) -> None:
    """Every exit that was told of a worker that ends by itself must be its own."""
    for line in (home / "log/nssup.jsonl").read_bytes().splitlines():
        event = json.loads(line)
        found = event.get("exit")
        if not found or event["reason"] == "operator" or not event["worker"].startswith("short/"):
            continue
        ended = (event.get("detail") or {}).get("ended", event)["generation"]
        if found["reason"] not in (f"exit:{ended % 200}", "supervisor-died"):
            wrong.append(f"{event['worker']} generation {ended}: {found['reason']}")


def crash(home: Path, kills: int, workers: int, chance: random.Random) -> Outcome:
    """Kill and start a supervisor so often, and look at what is left. Raises nothing for what is wrong: it is told."""
    host = Host(home, workers)
    try:
        host.ready()
        for number in range(kills):
            # A random instant: of its start, of taking over, of work.
            with contextlib.suppress(subprocess.TimeoutExpired):
                host.supervisor.wait(chance.random() * (1.0 if number % 3 else 0.3))
                raise RuntimeError(f"the supervisor ended by itself: {host.supervisor.returncode}")
            host.kill()
            host.supervisor = host.start()
        document = host.ready()
    finally:
        host.end()
    wrong: list[str] = []
    sizes = rebuilt(home, wrong)
    lives = sorted((home / "count").iterdir())
    for path in lives:
        worker, _, generation = path.name.replace("_", "/").rpartition(".")
        counted, logged = int(path.read_text() or 0), sizes[worker, int(generation)]
        if not counted <= logged <= counted + ONE_WRITE:
            wrong.append(f"{path.name}: wrote {counted}, logged {logged}")
    exits(home, wrong)
    restarted = [one["id"] for one in document["workers"] if one["pool"] == "long" and one["generation"] != 1]
    return Outcome(len(lives), sum(sizes.values()), wrong, restarted)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--workers", type=int, default=200)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4)))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as home:
        found = crash(Path(home), options.kills, options.workers, random.Random(options.seed))
    print(f"{options.kills} kills, {found.lives} lives, {found.bytes} bytes; restarted: {found.restarted or 'none'}")
    print(*found.wrong[:20], sep="\n")
    return bool(found.wrong or found.restarted)


if __name__ == "__main__":
    sys.exit(main())
