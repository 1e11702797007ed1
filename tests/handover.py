"""Whether logs survive a supervisor that is killed at any instant.

    python tests/handover.py --kills 5000      random kills
    python tests/handover.py --every 1         one kill before each bytecode of a small run, and one in its recovery
    python tests/handover.py --cost            staging against plain reads

This process is what stays: it holds the read ends of the pipes and the staging memfd, as the inits do. Writers fill the
pipes and count what they wrote. A supervisor, forked from here, takes over and writes the log until it is killed, at a
random instant or before a chosen bytecode of its own; then the next one. In the end each byte of each stream must be in
the log exactly once, in order. What each kill left behind is checked against staging.py's invariants, and counted.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import mmap
import os
import random
import select
import signal
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from nssup import framing, handover, lines, logfile, staging
from nssup.framing import Sheet
from nssup.handover import Layout
from nssup.staging import Full, Staging

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

PHASES = "start adopt finish attach take seal begin append settle commit rotate idle".split()
NAME = "pool.jsonl"
ROTATE = 200_000  # bytes of a log
F_SETPIPE_SZ = 1031
LAYOUTS = (Layout(16, 500, 40), Layout(20, 6000, 12), Layout(16, 70_000, 300), Layout(32))
decode = msgspec.json.Decoder(lines.Record).decode


class Life(NamedTuple):
    worker: int
    generation: int
    pipes: tuple[int, int]
    report: int
    writer: int  # a pidfd


class Wrong(Exception):
    """A byte is missing, or there twice, or an invariant does not hold."""


# --- what is written -------------------------------------------------------------------------------------------------


def numbered(chance: random.Random, number: int) -> bytes:
    return b"".join(b"line %d of %d\n" % (number, i) for i in range(chance.choice((1, 1, 3, 200))))


def identical(chance: random.Random, number: int) -> bytes:
    return b"the same line\n" * chance.randrange(1, 50)


def endless(chance: random.Random, number: int) -> bytes:
    return b"no newline ever, part %d; " % number * chance.randrange(1, 100)


def binary(chance: random.Random, number: int) -> bytes:
    return chance.randbytes(chance.randrange(1, 5000))


def objects(chance: random.Random, number: int) -> bytes:
    return b'{"number": %d, "text": "%s"}\n' % (number, b"x" * chance.choice((0, 10, 1000, 40_000)))


def single(chance: random.Random, number: int) -> bytes:
    return chance.choice((b"a", b"\n", "ü".encode(), b"\xff"))


def packets(chance: random.Random, number: int) -> bytes:
    return b"packet %d\n" % number + b"." * chance.randrange(0, 3000)


KINDS = (numbered, identical, endless, binary, objects, single, packets)


def write(kind: int, seed: int, pipes: tuple[int, int], report: int) -> None:
    """A writer: some bytes to each pipe; then says how many, and their hashes."""
    chance = random.Random(seed)
    budget = chance.choice((0, 1, 500, 30_000, 200_000))
    if KINDS[kind] is single:
        budget = min(budget, 3000)
    hashes, counts = (hashlib.sha256(), hashlib.sha256()), [0, 0]
    number = 0
    while sum(counts) < budget:
        which = int(chance.random() < 0.3)
        data = KINDS[kind](chance, number)
        number += 1
        hashes[which].update(data)
        counts[which] += len(data)
        while data:
            data = data[os.write(pipes[which], data) :]
    for fd in pipes:
        os.close(fd)
    os.write(report, b"".join(count.to_bytes(8, "big") + h.digest() for count, h in zip(counts, hashes, strict=True)))


# --- who takes it ----------------------------------------------------------------------------------------------------


class Apart(Staging):
    """Wrong on purpose: bytes and position do not move together."""

    def take(self, number: int, pipe: int, count: int, wall: float) -> int:
        room = self._stop - self._position
        if not room:
            raise Full
        self._enter(number, handover.DATA, wall)
        os.set_blocking(pipe, False)
        data = os.read(pipe, min(count, room))
        os.pwrite(self.fd, data, self._position)
        self._position = os.lseek(self.fd, len(data), os.SEEK_CUR)
        return len(data)


class Supervisor:
    """A supervisor as far as logs go. note: called with where it is now."""

    def __init__(self, path: Path, lives: list[Life], chance: random.Random, note: Callable[[str], None]) -> None:
        self.path = path
        self.lives = lives
        self.chance = chance
        self.note = note
        self.wall = time.time
        self.writer: ThreadPoolExecutor | None = None  # writes in a thread of its own
        self.make: type[Staging] = Staging
        self.no_intent = False  # wrong on purpose

    def adopt(self, fd: int) -> None:
        self.note("adopt")
        self.staging = self.make(fd)
        self.note("finish")
        if self.no_intent and self.staging.pending:
            self.staging.pending.forget()
        staging.finish(self.staging, self.path)
        self.open_log()
        self.note("attach")
        self.pipes: dict[int, int] = {}
        known = {(s.state.worker, s.state.generation, s.state.stream): n for n, s in self.staging.streams.items()}
        living = {(life.worker, life.generation) for life in self.lives}
        for key in [key for key in known if key[:2] not in living]:  # over and acknowledged
            self.staging.release(known.pop(key))
        for life in self.lives:
            for which, pipe in enumerate(life.pipes):
                number = known.get((life.worker, life.generation, which))
                if number is None:
                    number = self.staging.attach(life.worker, life.generation, which)
                stream = self.staging.streams[number]
                if not stream.state.host_pid:  # also of one that was attached just before the kill
                    self.staging.identify(number, 1000 + life.worker, 2)
                if not stream.ending:
                    self.pipes[number] = pipe

    def open_log(self) -> None:
        self.log = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def take(self) -> bool:
        """Takes once from each pipe. Whether there was anything, or no room for it."""
        self.note("take")
        busy = False
        wall = self.wall()
        for number in self.chance.sample(list(self.pipes), len(self.pipes)):
            try:
                if not self.staging.take(number, self.pipes[number], self.chance.choice((1, 700, 65536)), wall):
                    self.staging.end(number, wall)
                    del self.pipes[number]
                busy = True
            except BlockingIOError:
                continue
            except Full:
                return True
        return busy

    def append(self, piece: memoryview) -> int:
        """Writes a piece of the batch in flight, and may take more from the pipes meanwhile."""
        self.note("append")
        if self.writer is None:
            written = os.write(self.log, piece)
            if self.chance.random() < 0.2:
                self.take()
            return written
        writing = self.writer.submit(os.write, self.log, piece)
        if self.chance.random() < 0.5:
            self.take()
        return writing.result()

    def append_as_the_hub(self, batch: staging.Batch) -> None:
        """Sheet by sheet, in the file's own code; more may be taken from the pipes meanwhile."""
        self.note("append")
        file = logfile.RecordFile(self.path)
        job = (batch, Sheet(self.chance.choice((1, 5000, 1 << 20))), b"", 0)
        if self.writer is None:
            written = file.append_batch(*job)
        else:
            writing = self.writer.submit(file.append_batch, *job)
            self.take()
            written = writing.result()
        file.close()
        if written.error is not None:
            raise Wrong(f"the log cannot be written: {written.error}")

    def one_pass(self) -> bool:
        """Whether there may be more to do."""
        busy = self.take()
        self.note("seal")
        batch = self.staging.pending or self.staging.seal()
        if batch is None:
            return busy
        self.note("begin")
        batch.begin(os.fstat(self.log))
        if self.chance.random() < 0.5:
            self.append_as_the_hub(batch)
        else:
            for chunk in batch.records():
                left = memoryview(chunk.records)
                while left:
                    left = left[self.append(left[: self.chance.randrange(1, 6000)]) :]
        self.note("settle")
        if self.chance.random() < 0.3:
            self.take()
        self.note("commit")
        batch.commit()
        self.note("rotate")
        if os.fstat(self.log).st_size > ROTATE:
            rotate(self.path)
            os.close(self.log)
            self.open_log()
        return True

    def run(self, keeper: int, *, until_ended: bool) -> None:
        """For ever, or until all streams have ended. keeper: readable when it is gone."""
        while True:
            if self.one_pass():
                continue
            if until_ended and not self.pipes:
                return
            self.note("idle")
            ready, _, _ = select.select([keeper, *self.pipes.values()], [], [])
            if keeper in ready:
                os._exit(1)


def rotate(path: Path) -> None:
    """The log gets the next number: the supervisor does it between two batches, somebody else at any time."""
    with contextlib.suppress(FileNotFoundError):
        path.rename(path.with_name(f"{NAME}.{len(list(path.parent.glob(NAME + '.*'))) + 1:06}"))


def kill_before(instant: int, ran: Callable[[int], None]) -> Callable[[FrameType, str, object], object]:
    """A trace function that kills the process before so many bytecodes of the code under test have run."""
    ours = {handover.__file__, staging.__file__, logfile.__file__, framing.__file__, __file__}
    me = os.pidfd_open(os.getpid())
    left = instant

    def trace(frame: FrameType, event: str, arg: object) -> object:
        nonlocal left
        if frame.f_code.co_filename not in ours:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            if not left:
                signal.pidfd_send_signal(me, signal.SIGKILL)
            left -= 1
            ran(instant - left)
        return trace

    return trace


# --- who stays -------------------------------------------------------------------------------------------------------


def fork(keep: set[int], child: Callable[[], None]) -> int:
    """A pidfd of a new process that does this, with these descriptors and the standard ones."""
    number = os.fork()
    if number:
        return os.pidfd_open(number)
    code = 1
    try:
        for name in os.listdir("/proc/self/fd"):
            if int(name) > 2 and int(name) not in keep:
                with contextlib.suppress(OSError):
                    os.close(int(name))
        child()
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def reap(pidfd: int, expected: int) -> None:
    """expected: exit code, or signal."""
    ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    os.close(pidfd)
    if ended is None or ended.si_status != expected:
        raise Wrong(f"a process ended in another way: {ended}")


def kill(pidfd: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def staging_memfd(layout: Layout) -> int:
    made = Staging.create("pool", layout)
    fd = os.dup(made.fd)
    made.close()
    return fd


class Checker:
    """Reads logs and puts the streams together again."""

    def __init__(self) -> None:
        self.streams: dict[tuple[str | None, int | None, str], tuple[int, hashlib._Hash]] = {}
        self.records = 0
        self._ts = ""

    def read(self, path: Path) -> None:
        for line in path.read_bytes().split(b"\n")[:-1]:
            try:
                record = decode(line)
            except msgspec.MsgspecError as error:
                raise Wrong(f"no record: {line[:100]!r}: {error}") from None
            key = (record.worker, record.generation, record.stream)
            count, sha = self.streams.get(key, (0, hashlib.sha256()))
            if record.offset != count:
                raise Wrong(f"{key}: a record for byte {record.offset} where byte {count} should come")
            if record.ts < self._ts:
                raise Wrong(f"{key}: {record.ts} comes after {self._ts}")
            data = lines.content(record)
            sha.update(data)
            self.streams[key] = count + len(data), sha
            self.records += 1
            self._ts = record.ts

    def compare(self, life: Life, report: bytes) -> None:
        for which, stream in enumerate(("stdout", "stderr")):
            said = report[which * 40 : which * 40 + 40]
            count, digest = int.from_bytes(said[:8], "big"), said[8:]
            key = (f"pool/{life.worker}", life.generation, stream)
            found, sha = self.streams.pop(key, (0, hashlib.sha256()))
            if (found, sha.digest()) != (count, digest):
                raise Wrong(f"{key}: {count} bytes written, {found} in the log")


class Keeper:
    def __init__(self, seed: int, layout: Layout, directory: Path, broken: str | None = None) -> None:
        self.broken = broken
        self.chance = random.Random(seed)
        self.path = directory / NAME
        self.staging_fd = staging_memfd(layout)
        self.alive, self.alive_write = os.pipe()
        self.shared = mmap.mmap(-1, 4096)  # byte 0: where the supervisor is
        self.lives: list[Life] = []
        self.over: list[tuple[Life, bytes]] = []
        self.generations: Counter[int] = Counter()
        self.checker = Checker()
        self.checked = 0
        self.found: Counter[tuple[str, str]] = Counter()  # where a kill hit, and what it left behind
        self.renamed = 0

    def launch(self, worker: int) -> None:
        """A life: pipes and a writer."""
        self.generations[worker] += 1
        kind = self.chance.randrange(len(KINDS))
        flags = os.O_DIRECT if KINDS[kind] is packets else 0
        (out, out_write), (err, err_write), (report, report_write) = os.pipe2(flags), os.pipe2(flags), os.pipe()
        if self.chance.random() < 0.2:
            fcntl.fcntl(out, F_SETPIPE_SZ, 1 << 20)
        seed = self.chance.randrange(1 << 30)
        keep = {out_write, err_write, report_write}
        writer = fork(keep, lambda: write(kind, seed, (out_write, err_write), report_write))
        for fd in keep:
            os.close(fd)
        self.lives.append(Life(worker, self.generations[worker], (out, err), report, writer))

    def note(self, phase: str) -> None:
        self.shared[0] = PHASES.index(phase)

    def supervise(self, *, instant: int | None, until_ended: bool = False) -> int:
        """A pidfd of a supervisor. instant: the bytecode before which it dies."""
        seed = self.chance.randrange(1 << 30)

        def child() -> None:
            supervisor = Supervisor(self.path, self.lives, random.Random(seed), self.note)
            supervisor.no_intent = self.broken == "intent"
            supervisor.make = Apart if self.broken == "position" else Staging
            if seed % 2:
                supervisor.writer = ThreadPoolExecutor(1)
            if instant is not None:
                sys.settrace(kill_before(instant, lambda ran: None))  # type: ignore[arg-type]
            supervisor.adopt(self.staging_fd)
            supervisor.run(self.alive, until_ended=until_ended)

        self.note("start")
        return fork({self.staging_fd, self.alive, *(pipe for life in self.lives for pipe in life.pipes)}, child)

    def one_kill(self, number: int) -> None:
        """A supervisor from its start to its death, and what is left."""
        if number % 2:
            instant, limit = int(10 ** (2.5 + 2 * self.chance.random())), 0.2
        else:
            instant, limit = None, self.chance.choice((0.003, 0.006, 0.02)) * self.chance.random()
        supervisor = self.supervise(instant=instant)
        select.select([supervisor], [], [], limit)  # until it is dead, or its time has come
        kill(supervisor)
        reap(supervisor, signal.SIGKILL)
        self.inspect()

    def inspect(self) -> None:
        """What a kill left behind: counted, and checked against the invariants."""
        found = Staging(os.dup(self.staging_fd))
        try:
            self.found[PHASES[self.shared[0]], self.left_in(found)] += 1
            states = [stream.state for stream in found.streams.values()]
        finally:
            found.close()
        ended = Counter((state.worker, state.generation) for state in states if state.ended)
        for life in list(self.lives):
            if ended[life.worker, life.generation] == 2:
                self.bury(life)

    def left_in(self, found: Staging) -> str:
        batch = found.pending
        if batch is None:
            return "bytes, no batch" if found._position > found.layout.base(found._half) else "nothing"
        intent = batch.intent
        if intent is None:
            return "batch, no intent"
        fd = staging._open_again(self.path, intent)
        if fd is None:
            raise Wrong("the log of an intent is gone")
        try:
            size = os.fstat(fd).st_size - intent.size
            written = os.pread(fd, size, intent.size)
        finally:
            os.close(fd)
        expected = b"".join([chunk.records for chunk in batch.records()])
        if not expected.startswith(written) and not self.broken:
            raise Wrong("behind the size of an intent there is something else than a first part of its batch")
        if len(written) == len(expected):
            return "batch, all in the log"
        if not written:
            return "batch, nothing in the log"
        return "batch, part in the log" if written.endswith(b"\n") else "batch, torn in the log"

    def bury(self, life: Life) -> None:
        """A life is over, and all that it wrote committed: its init may go."""
        self.over.append((life, os.read(life.report, 80)))
        self.lives.remove(life)
        for fd in (*life.pipes, life.report):
            os.close(fd)
        reap(life.writer, 0)

    def check(self, *, last: bool) -> None:
        """Reads the logs that nothing will be added to; in the end all."""
        done = sorted(self.path.parent.glob(NAME + ".*"))
        for path in [*done[self.checked :], self.path] if last else done[self.checked : -1]:
            self.checker.read(path)
            path.write_bytes(b"")  # its name stays: names are counted
            self.checked += 1
        if last:
            for life, report in self.over:
                self.checker.compare(life, report)
            if self.checker.streams:
                raise Wrong(f"streams that nobody wrote: {list(self.checker.streams)}")

    def run(self, kills: int, workers: int) -> None:
        for number in range(kills):
            living = {life.worker for life in self.lives}
            for worker in range(workers):
                if worker not in living:
                    self.launch(worker)
            self.one_kill(number)
            if self.chance.random() < 0.02:
                rotate(self.path)
                self.renamed += 1
            self.check(last=False)
        reap(self.supervise(instant=None, until_ended=True), 0)
        self.inspect()
        if self.lives:
            raise Wrong("the end of a life is missing")
        self.check(last=True)

    def close(self) -> None:
        for life in self.lives:
            kill(life.writer)
            with contextlib.suppress(Wrong):
                reap(life.writer, 0)
            for fd in (*life.pipes, life.report):
                os.close(fd)
        for fd in (self.staging_fd, self.alive, self.alive_write):
            os.close(fd)


def random_kills(kills: int, workers: int, seed: int, broken: str | None) -> None:
    """Raises Wrong."""
    started = time.monotonic()
    found: Counter[tuple[str, str]] = Counter()
    lives = records = written = logs = renamed = 0
    for number, layout in enumerate(LAYOUTS):
        with tempfile.TemporaryDirectory() as directory:
            keeper = Keeper(seed + number, layout, Path(directory), broken)
            try:
                keeper.run(kills // len(LAYOUTS), workers)
            except Wrong as wrong:
                raise Wrong(f"seed {seed}, {layout}, after {keeper.found.total()} kills: {wrong}") from None
            finally:
                keeper.close()
        found += keeper.found
        lives += len(keeper.over)
        records += keeper.checker.records
        written += sum(int.from_bytes(said[:8], "big") + int.from_bytes(said[40:48], "big") for _, said in keeper.over)
        logs += keeper.checked
        renamed += keeper.renamed
    seconds = time.monotonic() - started
    print(f"seed {seed}: {found.total()} kills in {seconds:.1f} s; {lives} lives wrote {written} bytes")
    print(f"found in {records} records of {logs} logs ({renamed} renamed by somebody else): missing 0, twice 0")
    table(found)


def table(found: Counter[tuple[str, str]]) -> None:
    """Where the kills hit, and what they left behind."""
    for phase in PHASES:
        left = {left: count for (at, left), count in sorted(found.items()) if at == phase}
        kinds = "; ".join(f"{kind} {count}" for kind, count in left.items())
        print(f"  killed in {phase:7} {sum(left.values()):6}   left behind: {kinds or '-'}")


# --- each instant of a small run -------------------------------------------------------------------------------------

CONTENTS = (b"one\ntwo\n" * 9 + b"three", b"x" * 70 + b"\n\xff\n" + b'{"a":1}\n' * 12, b"", b"same\n" * 30)


class Small:
    """A run whose input is all there from the start. Its records are the same whatever happens to it."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / NAME
        self.path.unlink(missing_ok=True)
        self.fd = staging_memfd(Layout(4, 90, 6))
        self.alive, self.alive_write = os.pipe()
        self.shared = mmap.mmap(-1, 4096)
        pipes = []
        for content in CONTENTS:
            read, end = os.pipe()
            os.write(end, content)
            os.close(end)
            pipes.append(read)
        self.lives = [Life(0, 1, (pipes[0], pipes[1]), -1, -1), Life(1, 1, (pipes[2], pipes[3]), -1, -1)]

    def note(self, phase: str) -> None:
        self.shared[0] = PHASES.index(phase)

    def supervise(self, instant: int) -> int | None:
        """Kills it before this bytecode. How many bytecodes it ran, if it came to its end."""

        def ran(count: int) -> None:
            self.shared[8:16] = count.to_bytes(8, "big")

        def child() -> None:
            supervisor = Supervisor(self.path, self.lives, random.Random(1), self.note)
            supervisor.wall = lambda: 1.0
            sys.settrace(kill_before(instant, ran))  # type: ignore[arg-type]
            supervisor.adopt(self.fd)
            supervisor.run(self.alive, until_ended=True)

        supervisor = fork({self.fd, self.alive, *(pipe for life in self.lives for pipe in life.pipes)}, child)
        ended = os.waitid(os.P_PIDFD, supervisor, os.WEXITED)
        os.close(supervisor)
        if ended is None or ended.si_status not in (0, signal.SIGKILL):
            raise Wrong(f"the supervisor failed: {ended}")
        return None if ended.si_status else int.from_bytes(self.shared[8:16], "big")

    def result(self) -> list[list[bytes]]:
        """The records of each stream, byte for byte."""
        records = self.path.read_bytes().split(b"\n")
        if records.pop():
            raise Wrong("the log is torn")
        return [
            [record for record in records if b'"worker":"pool/%d"' % worker in record and stream in record]
            for worker in (0, 1)
            for stream in (b'"stream":"stdout"', b'"stream":"stderr"')
        ]

    def close(self) -> None:
        for fd in (self.fd, self.alive, self.alive_write, *(pipe for life in self.lives for pipe in life.pipes)):
            os.close(fd)


def every_instant(step: int, first: int = 0) -> None:
    """Kills a small run before each step-th bytecode, and those that recover again, before others. Raises Wrong."""
    never = 1 << 60
    phases: Counter[str] = Counter()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        small = Small(Path(directory))
        length = small.supervise(never)
        expected = small.result()
        small.close()
        if length is None or list(map(bool, expected)) != list(map(bool, CONTENTS)):
            raise Wrong("the run without a kill failed")
        for instant in range(first, length, step):
            small = Small(Path(directory))
            try:
                small.supervise(instant)
                phases[PHASES[small.shared[0]]] += 1
                small.supervise(instant * 7919 % 4001)  # most of them in their recovery
                phases["again: " + PHASES[small.shared[0]]] += 1
                small.supervise(never)
                if small.result() != expected:
                    raise Wrong(f"killed before bytecode {instant}: records are missing, twice, or others")
            finally:
                small.close()
    seconds = time.monotonic() - started
    print(f"{phases.total()} kills before bytecodes of {length} in {seconds:.1f} s: all records as without")
    print(", ".join(f"{phase} {count}" for phase, count in phases.most_common()))


# --- what it costs ---------------------------------------------------------------------------------------------------


def cost() -> None:
    """Time of one pass from pipe to log, plain and staged by turns: the best of many rounds."""
    with tempfile.TemporaryDirectory() as directory:
        for size in (100, 4096, 65536):
            for count in (1, 8, 100 if size < 65536 else 14):
                plain, staged = _cost(Path(directory), size, count)
                more = (staged - plain) / count
                print(
                    f"{size:6} bytes from each of {count:3} pipes: plain {plain:8.1f} us, staged {staged:8.1f} us "
                    f"(x{staged / plain:.2f}, {more:+.1f} us a pipe)"
                )


def _cost(directory: Path, size: int, count: int) -> tuple[float, float]:
    """Microseconds, plain and staged."""
    data = (b"x" * 99 + b"\n") * (size // 100) + b"y" * (size % 100 - 1) + b"\n" * (size % 100 > 0)
    pipes = [os.pipe2(os.O_NONBLOCK) for _ in range(count)]
    logs = [os.open(directory / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT) for name in ("plain", "staged")]
    stage = Staging.create("pool")
    numbers = [stage.attach(index, 1, 0, 5000, 2) for index in range(count)]
    framers = [lines.Framer(f"pool/{index}", 1, "stdout") for index in range(count)]

    def plain(wall: float) -> None:
        ts = lines.stamp(wall)
        reads = zip(pipes, framers, strict=True)
        os.write(logs[0], b"".join([framer.feed(os.read(pipe, 65536), ts, 5000, 2) for (pipe, _), framer in reads]))

    def staged(wall: float) -> None:
        for (pipe, _), number in zip(pipes, numbers, strict=True):
            stage.take(number, pipe, 65536, wall)
        batch = stage.seal()
        assert batch is not None
        batch.begin(os.fstat(logs[1]))
        os.write(logs[1], b"".join([chunk.records for chunk in batch.records()]))
        batch.commit()

    best = [1 << 60, 1 << 60]
    for turn in range(max(60, 4_000_000 // (size * count))):
        for index, way in enumerate((plain, staged)):
            for _, end in pipes:
                os.write(end, data)
            began = time.perf_counter_ns()
            way(1e9 + turn)
            best[index] = min(best[index], time.perf_counter_ns() - began)
            os.ftruncate(logs[index], 0)
    stage.close()
    for fd in (*logs, *(end for pipe in pipes for end in pipe)):
        os.close(fd)
    return best[0] / 1e3, best[1] / 1e3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--kills", type=int, default=400)
    what.add_argument("--every", type=int)
    what.add_argument("--cost", action="store_true")
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--broken", choices=("position", "intent"), help="do it wrong: this must be noticed")
    options = parser.parse_args()
    seed = int.from_bytes(os.urandom(4), "big") if options.seed is None else options.seed
    try:
        if options.cost:
            cost()
        elif options.every:
            every_instant(options.every, seed % options.every)
        else:
            random_kills(options.kills, options.workers, seed, options.broken)
    except Wrong as wrong:
        print(f"WRONG: {wrong}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
