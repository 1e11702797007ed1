"""kill -9 the supervisor again and again while its workers write: nothing missing, nothing twice, exit codes right.

    python tests/crash.py [--kills 50] [--workers 200] [--seed N] [--json]

Half of the workers run on, half end by themselves with a code that tells their generation. They write numbered lines,
identical lines, bursts, long lines and ends without a newline, and note how many bytes and lines the kernel took from
them, with a checksum. At the end the streams rebuilt from the records must be just these bytes.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import select
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from nssup import client
from nssup.lines import Record, content

# In its first argument's directory it notes: bytes, lines, checksum. It ends at a SIGTERM between two turns, so that
# what it noted is what it wrote.
WORKER = """
import os, random, select, signal, sys, zlib
lives = os.environ["NSSUP_ID"].replace("/", "_") + "." + os.environ["NSSUP_GENERATION"]
chance = random.Random(lives)
going = [True]
signal.signal(signal.SIGTERM, lambda *_: going.clear())
count = os.open(sys.argv[1] + "/" + lives, os.O_CREAT | os.O_WRONLY)
written = lines = checksum = turn = 0
while going and (turn < int(sys.argv[2]) or sys.argv[2] == "0"):
    turn += 1
    same, parts = b"the same line\\n", []
    for number in range(chance.randrange(30)):
        parts.append(same if chance.random() < 0.4 else b"%d.%d\\n" % (turn, number))
    if chance.random() < 0.1:
        parts.append(b"x" * chance.randrange(1, 40000) + b"\\n")
    data = b"".join(parts)
    if chance.random() < 0.2:
        data = data[:-1]
    while data:
        sent = os.write(1, data)
        written += sent
        lines += data.count(b"\\n", 0, sent)
        checksum = zlib.crc32(data[:sent], checksum)
        data = data[sent:]
        os.pwrite(count, b"%020d %020d %010d" % (written, lines, checksum), 0)
    select.select([], [], [], chance.random() * float(sys.argv[3]) if going else 0)
sys.exit(int(os.environ["NSSUP_GENERATION"]) % 200)
"""
COMMAND = (sys.executable, "-m", "nssup")
_decode = msgspec.json.Decoder(Record).decode


@dataclass
class Written:
    """Of one life: what its program noted, or what is in the records. content: a checksum."""

    bytes: int = 0
    lines: int = 0
    content: int = 0


@dataclass
class Outcome:
    """What came of it. missing, twice: lines. exits: of lives that ended by themselves, as they were told.

    restarted: of the workers that run on: none should be. adopted: seconds until the status answered, of each start.
    """

    kills: int
    workers: int
    lives: int = 0
    bytes: int = 0
    lines: int = 0
    missing: int = 0
    twice: int = 0
    exits: int = 0
    exits_wrong: int = 0
    restarted: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    adopted: list[float] = field(default_factory=list)


def program(home: Path, turns: int, workers: int) -> str:
    """The TOML list of a command that writes into the directory `count` of home. turns: 0 until it is told to end."""
    return f'["{sys.executable}", "-S", "{home}/worker.py", "{home}/count", "{turns}", "{0.004 * workers}"]'


def prepare(home: Path) -> None:
    """What `program` needs."""
    (home / "count").mkdir()
    (home / "worker.py").write_text(WORKER)


def config(home: Path, workers: int) -> str:
    long = max(workers // 2, 1)
    return f"""
version = 1
[supervisor]
state_dir = "{home}/state"
log_dir = "{home}/log"
[pool.long]
command = {program(home, 0, workers)}
workers = {long}
[pool.short]
command = {program(home, 20, workers)}
workers = {workers - long}
[pool.short.restart]
backoff = {{ first = "10ms", max = "50ms" }}
"""


class Host:
    """A supervisor in a directory of its own, killed and started again."""

    def __init__(self, home: Path, workers: int) -> None:
        self.home = home
        prepare(home)
        (home / "nssup.toml").write_text(config(home, workers))
        self.stderr = (home / "stderr").open("ab")
        self.answered = 0.0  # seconds from its start until it did
        self.supervisor = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        command = [*COMMAND, "up", "-c", str(self.home / "nssup.toml")]
        self.began = time.monotonic()
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
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(client.ClientError, OSError, ValueError):
                socket = str(self.home / "state/run/nssup.sock")
                line, answer = client.ask(socket, client.request("GET", "/v1/status", None), 60)
                with contextlib.closing(line):
                    document: dict[str, Any] = json.loads(answer.body())
                self.answered = time.monotonic() - self.began
                return document
            select.select([], [], [], 0.005)
        raise TimeoutError("no answer from the supervisor")

    def end(self) -> None:
        self.ctl("shutdown")
        try:
            self.supervisor.wait(60)
        finally:
            self.stderr.close()


def rebuilt(paths: list[Path], wrong: list[str]) -> dict[tuple[str, int], Written]:
    """What the records of each life stand for, which must follow each other without a gap."""
    found: dict[tuple[str, int], Written] = collections.defaultdict(Written)
    for path in paths:
        for line in path.read_bytes().splitlines():
            record = _decode(line)
            if record.stream != "stdout":
                wrong.append(f"a record that no worker wrote: {line[:200]!r}")
                continue
            assert record.worker is not None
            assert record.generation is not None
            life = found[record.worker, record.generation]
            if record.offset != life.bytes:
                wrong.append(f"{record.worker} life {record.generation}: at {life.bytes} comes {record.offset}")
            data = content(record)
            life.bytes += len(data)
            life.lines += data.count(b"\n")
            life.content = zlib.crc32(data, life.content)
    return found


def compare(home: Path, paths: list[Path], into: Outcome) -> None:
    """What was noted in the directory `count` of home with what is in these logs."""
    logged = rebuilt(paths, into.wrong)
    for path in sorted((home / "count").iterdir()):
        worker, _, generation = path.name.replace("_", "/").rpartition(".")
        counted = Written(*map(int, path.read_text().split()))
        there = logged.pop((worker, int(generation)), Written())
        into.lives += 1
        into.bytes += counted.bytes
        into.lines += counted.lines
        into.missing += max(counted.lines - there.lines, 0)
        into.twice += max(there.lines - counted.lines, 0)
        if there != counted:
            into.wrong.append(f"{path.name}: wrote {counted}, logged {there}")
    into.wrong += [f"{life}: logged {there}, and it never was" for life, there in logged.items()]


def exits(home: Path, into: Outcome) -> None:
    """Every exit that was told of a worker that ends by itself must be its own; and no event is missing or told twice,
    up to the last that there is of each run."""
    seen: dict[int, int] = {}
    for line in (home / "log/nssup.jsonl").read_bytes().splitlines():
        event = json.loads(line)
        before = seen.get(event["epoch"], 0)
        if event["seq"] != before + 1:
            into.wrong.append(f"after event {event['epoch']}:{before} comes {event['seq']}")
        seen[event["epoch"]] = event["seq"]
        found = event.get("exit")
        if not found or event["reason"] == "operator" or not event["worker"].startswith("short/"):
            continue
        ended = (event.get("detail") or {}).get("ended", event)["generation"]
        into.exits += 1
        if found["reason"] != f"exit:{ended % 200}":
            into.exits_wrong += 1
            into.wrong.append(f"{event['worker']} generation {ended}: {found['reason']}")


def crash(home: Path, kills: int, workers: int, chance: random.Random) -> Outcome:
    """Kill and start a supervisor so often, and look at what is left. Raises nothing for what is wrong: it is told."""
    found = Outcome(kills, workers)
    host = Host(home, workers)
    try:
        host.ready()
        for number in range(kills):
            # A random instant: of its start, of taking over, of work; now and then once it has answered.
            if number % 5 == 4:
                host.ready()
                found.adopted.append(host.answered)
            with contextlib.suppress(subprocess.TimeoutExpired):
                host.supervisor.wait(chance.random() * (1.0 if number % 3 else 0.3))
                raise RuntimeError(f"the supervisor ended by itself: {host.supervisor.returncode}")
            host.kill()
            host.supervisor = host.start()
        document = host.ready()
        found.restarted = [one["id"] for one in document["workers"] if one["pool"] == "long" and one["generation"] != 1]
    finally:
        host.end()
    compare(home, [home / f"log/{pool}.jsonl" for pool in ("long", "short")], found)
    exits(home, found)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--workers", type=int, default=200)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4)))
    parser.add_argument("--json", action="store_true", help="print the outcome as one line of JSON, last")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as home:
        found = crash(Path(home), options.kills, options.workers, random.Random(options.seed))
    print(f"{found.kills} kills, {found.lives} lives, {found.lines} lines, {found.bytes} bytes")
    print(f"  lines missing {found.missing}, twice {found.twice}; of {found.exits} exits wrong {found.exits_wrong}")
    print(f"  restarted: {found.restarted or 'none'}; other faults {len(found.wrong)}")
    print(*found.wrong[:20], sep="\n")
    if options.json:
        print(json.dumps(asdict(found)))
    return bool(found.wrong or found.restarted)


if __name__ == "__main__":
    sys.exit(main())
