"""The row `logs` of scripts/bench: workers' lines into a file, beside cat, s6-log and a loop in C with our record."""

import contextlib
import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("bench_lines.c")
TICKS = os.sysconf("SC_CLK_TCK")
DECIMAL = r"""
static const char middle[] = ",\"msg\":\""; static unsigned long offset;
static char *decimal(char *o, unsigned long v) {
    char d[20]; int i = 20;
    do d[--i] = (char)('0' + v % 10); while (v /= 10);
    memcpy(o, d + i, (size_t)(20 - i)); return o + 20 - i;
}
int main(void) {"""
# What turns the peers' jsonlog.c, which writes a short record, into one that writes ours.
CHANGES = (
    (
        r'\"worker\":\"w0001\",\"stream\":\"stdout\",\"msg\":\""',
        r'\"worker\":\"w/0\",\"generation\":1,\"stream\":\"stdout\",\"host_pid\":123456,\"ns_pid\":2,\"offset\":"',
    ),
    (
        "memcpy(o, pre, np); o += np;",
        "unsigned char *line = p; memcpy(o, pre, np); o = decimal(o + np, offset); memcpy(o, middle, 8); o += 8;",
    ),
    (r"if (c == '\n') break;", r"if (c == '\n') { offset += (unsigned long)(p - line); break; }"),
    ("int main(void) {", DECIMAL),
    ("out[CAP * 8]", "out[CAP * 24]"),
)


KINDS = {"100 bytes": ("100",), "100 bytes, dirty": ("100", "dirty"), "2000 bytes": ("2000",), "10 bytes": ("10",)}
BOUNDS = {
    ("100 bytes", "loop in C"): 1 / 0.85,
    ("100 bytes, dirty", "loop in C"): 1 / 0.7,
    ("100 bytes", "s6-log"): 1 / 2.5,
    ("2000 bytes", "cat"): 1 / 0.6,
}


@dataclass(frozen=True)
class Amount:
    """blast: bytes of one worker's lines. drip: workers, lines a second of each, seconds. endless: bytes without a
    newline."""

    blast: int
    rounds: int
    drip: tuple[int, int, int]
    endless: int


@dataclass(frozen=True)
class Blast:
    """What one logger made of one worker's lines: MB/s of the worker's output, CPU seconds per GB of it."""

    rate: float
    cpu: float


class Ground:
    """Programs, a directory in memory, and a way to run `nssup up` with one pool there."""

    def __init__(self, directory: Path, nssup: str, peers: str | None) -> None:
        shm = Path("/dev/shm")
        self.place = shm / f"nssup-bench-{os.getpid()}" if os.access(shm, os.W_OK) else directory / "logs"
        self.nssup = nssup
        self.lines = str(directory / "lines")
        compiler = os.environ.get("CC", "cc")
        subprocess.run([compiler, "-O2", "-o", self.lines, str(SOURCE)], check=True)
        self.loop = None
        if peers is not None and (Path(peers) / "jsonlog.c").is_file():
            text = (Path(peers) / "jsonlog.c").read_text()
            for old, new in CHANGES:
                if text.count(old) != 1:
                    raise ValueError(f"jsonlog.c is not as it was: {old!r}")
                text = text.replace(old, new)
            changed = directory / "jsonlog.c"
            changed.write_text(text)
            self.loop = str(directory / "jsonlog")
            subprocess.run([compiler, "-O2", "-mavx2", "-o", self.loop, str(changed)], check=True)

    def close(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)

    def clean(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir(parents=True)

    @contextlib.contextmanager
    def up(self, command: list[str], workers: int) -> Iterator[subprocess.Popen[bytes]]:
        self.clean()
        config = self.place / "nssup.toml"
        config.write_text(
            f"version = 1\n[supervisor]\nstate_dir = '{self.place}/state'\nlog_dir = '{self.place}/log'\n"
            f"socket = '{self.place}/s'\n[pool.w]\ncommand = {json.dumps(command)}\nworkers = {workers}\n"
        )
        with (self.place / "said").open("wb") as said:
            up = subprocess.Popen(
                [self.nssup, "up", "-c", str(config)], stdin=subprocess.DEVNULL, stdout=said, stderr=said
            )
        try:
            yield up
        finally:
            up.send_signal(signal.SIGTERM)
            try:
                up.wait(60)
            finally:
                up.kill()
                up.wait()
                self.clean()

    @property
    def log(self) -> Path:
        return self.place / "log" / "w.jsonl"


def cpu(host_pid: int) -> float:
    """CPU seconds of a process so far."""
    fields = Path(f"/proc/{host_pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def resident(host_pid: int) -> int:
    """Bytes."""
    return int(Path(f"/proc/{host_pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def piped(ground: Ground, logger: list[str], source: list[str], total: int) -> Blast:
    """A logger that reads its standard input, and writes its standard output or to a directory it is told."""
    ground.clean()
    read, write = os.pipe()
    with (ground.place / "out").open("wb") as out:
        start = time.monotonic()
        sink = subprocess.Popen(logger, stdin=read, stdout=out)
    os.close(read)
    worker = subprocess.Popen([*source, "end"], stdout=write)
    os.close(write)
    _, status, used = os.wait4(sink.pid, 0)
    took = time.monotonic() - start
    sink.returncode = os.waitstatus_to_exitcode(status)
    if worker.wait() != 0 or sink.returncode != 0:
        raise ValueError(f"{logger[0]} failed with {sink.returncode}")
    ground.clean()
    return Blast(total / took / 1e6, (used.ru_utime + used.ru_stime) / total * 1e9)


def supervised(ground: Ground, source: list[str], total: int) -> Blast:
    """The same by nssup, from the first records that are in the file to the last; the start is not counted."""
    with ground.up(source, 1) as up:
        deadline = time.monotonic() + 60
        first: tuple[int, float, float] | None = None
        last = (0, 0.0)
        while time.monotonic() < deadline:
            now, bytes_now = time.monotonic(), size(ground.log)
            if bytes_now and first is None:
                first = bytes_now, now, cpu(up.pid)
            if bytes_now > last[0]:
                last = bytes_now, now
            if first and now - last[1] > 0.5:
                break
            time.sleep(0.002)
        if first is None:
            raise ValueError("no record came")
        used = cpu(up.pid) - first[2]
        written = total * (last[0] - first[0]) / last[0]
        whole = _count(ground.log)
        if whole != total:
            raise ValueError(f"{whole} of {total} bytes are in the log")
    return Blast(written / (last[1] - first[1]) / 1e6, used / written * 1e9)


def _count(log: Path) -> int:
    """The bytes of the one stream that are in a log whose last record is a whole line of plain text."""
    with log.open("rb") as file:
        file.seek(-min(size(log), 65536), os.SEEK_END)
        record = json.loads(file.read().splitlines()[-1])
    return int(record["offset"]) + len(record["msg"].encode()) + 1


def blasts(ground: Ground, total: int, rounds: int) -> dict[str, dict[str, list[Blast]]]:
    """Of each kind of lines, of each logger, in turns."""
    found: dict[str, dict[str, list[Blast]]] = {}
    for _ in range(rounds):
        for kind, (length, *dirty) in KINDS.items():
            block = 65536 // int(length) * int(length)
            share = (total if length != "10" else total // 5) // block * block
            source = [ground.lines, "blast", length, str(share), *dirty]
            loggers = {"cat": ["cat"]}
            if ground.loop is not None:
                loggers["loop in C"] = [ground.loop]
            if shutil.which("s6-log") and length == "100":
                loggers["s6-log"] = ["s6-log", "t", "n60", "s16777216", str(ground.place / "s6")]
            of_kind = found.setdefault(kind, {})
            for name, logger in loggers.items():
                of_kind.setdefault(name, []).append(piped(ground, logger, source, share))
            of_kind.setdefault("nssup", []).append(supervised(ground, source, share))
    return found


@dataclass(frozen=True)
class Drip:
    """cpu: percent of a core. lost: lines. p99: ms from the worker's write to the file."""

    cpu: float
    lost: int
    p99: float


def drip(ground: Ground, workers: int, rate: int, seconds: int) -> Drip:
    """Many workers with few lines each."""
    waits: list[float] = []
    with ground.up([ground.lines, "drip", str(rate), str(seconds)], workers) as up:
        while not size(ground.log):
            time.sleep(0.01)
        time.sleep(seconds * 0.2)  # all of them run
        start, used, seen = time.monotonic(), cpu(up.pid), size(ground.log)
        with ground.log.open("rb") as file:
            while time.monotonic() < start + seconds * 0.6:
                time.sleep(0.005)
                now = size(ground.log)
                waits += _waits(file.fileno(), seen, now)
                seen = now
        share = (cpu(up.pid) - used) / (time.monotonic() - start) * 100
        before = -1
        while before != (before := size(ground.log)):
            time.sleep(seconds * 0.3)
        with ground.log.open("rb") as file:
            lines = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    p99 = sorted(waits)[int(len(waits) * 0.99)] * 1e3 if waits else math.nan  # nobody saw a line in so short a time
    return Drip(share, workers * rate * seconds - lines, p99)


def _waits(log: int, start: int, stop: int) -> list[float]:
    """Seconds from a worker's write to now, of a few of the lines in that part of a log."""
    now, found = time.time(), list[bytes]()
    for _ in range(5 if stop - start > 4096 else 0):
        found += os.pread(log, 2048, random.randrange(start, stop - 2048)).splitlines()[1:-1]
    return [now - int(line.partition(b'"msg":"')[2][:19]) / 1e9 for line in found]


def growth(ground: Ground, total: int) -> float:
    """MiB that the supervisor grows by while a worker prints so many bytes without a newline and a follower is stopped.

    The log is emptied by somebody else all the time.
    """
    with ground.up([ground.lines, "endless", str(total)], 1) as up, contextlib.ExitStack() as stack:
        while not size(ground.log):
            time.sleep(0.01)
        follow = [ground.nssup, "ctl", "logs", "-f", "w", "--socket", str(ground.place / "s")]
        follower = subprocess.Popen(follow, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        stack.callback(follower.wait)
        stack.callback(follower.kill)
        time.sleep(0.5)
        follower.send_signal(signal.SIGSTOP)
        least = most = resident(up.pid)
        idle = 0
        done = 0
        while idle < 20:
            time.sleep(0.05)
            most, least = max(most, resident(up.pid)), min(least, resident(up.pid))
            now = size(ground.log)
            idle = idle + 1 if now == done else 0
            done = now
            if now > 256 << 20:
                os.truncate(ground.log, 0)
                done = 0
        return (most - least) / (1 << 20)


def rows(ground: Ground, amount: Amount) -> Iterator[tuple[Any, ...]]:
    """The fields of scripts/bench's results."""
    for kind, loggers in blasts(ground, amount.blast, amount.rounds).items():
        ours = loggers.pop("nssup")
        for name, theirs in loggers.items():
            rates = [statistics.median(blast.rate for blast in blasts) for blasts in (ours, theirs)]
            yield (
                *("logs", f"lines of {kind}", "s per GB"),
                *([1000 / blast.rate for blast in ours], [1000 / blast.rate for blast in theirs]),
                *(name, BOUNDS.get((kind, name)), f"{rates[0]:.0f} MB/s, {rates[1]:.0f} beside it"),
            )
            cpus = [blast.cpu for blast in ours], [blast.cpu for blast in theirs]
            yield "logs", f"lines of {kind}", "CPU s per GB", *cpus, name
    drips = [drip(ground, *amount.drip) for _ in range(amount.rounds)]
    what = f"{amount.drip[0]} workers x {amount.drip[1]} lines/s"
    yield "logs", what, "% of a core", [d.cpu for d in drips], [], "", 10
    yield "logs", f"{what}, lines lost", "", [float(d.lost) for d in drips], [], "", 0
    yield "logs", f"{what}, line to file, p99", "ms", [d.p99 for d in drips], [], "", 100
    what = f"{amount.endless / 1e9:g} GB without a newline, a follower stopped: grows by"
    yield "logs", what, "MiB", [growth(ground, amount.endless)], [], "", 64
