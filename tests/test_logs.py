from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import random
import resource
import stat
import termios
import threading
from collections import Counter
from typing import TYPE_CHECKING, cast

import msgspec
import pytest

from nssup import intake, lines, logfile, logpool
from nssup.logs import LogHub

if TYPE_CHECKING:
    import io
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator
    from pathlib import Path

    from nssup.follower import Follower

pytestmark = pytest.mark.both_loops

decode = msgspec.json.Decoder(lines.Record).decode
NOON = 1_795_435_200.0
Key = tuple[str | None, int | None, str]


class Wall:
    """A clock that goes on by a millisecond whenever it is looked at."""

    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


class Writer:
    """The write end of a pipe, as a worker's."""

    def __init__(self, flags: int = 0) -> None:
        self.read_end, self.fd = os.pipe2(os.O_CLOEXEC | flags)

    def write(self, data: bytes) -> Writer:
        """Blocks when the pipe is full."""
        view = memoryview(data)
        while view:
            view = view[os.write(self.fd, view) :]
        return self

    def close(self) -> None:
        os.close(self.fd)

    def write_all_and_close(self, data: bytes) -> threading.Thread:
        def work() -> None:
            self.write(data)
            self.close()

        thread = threading.Thread(target=work)
        thread.start()
        return thread


@contextlib.asynccontextmanager
async def running(hub: LogHub) -> AsyncIterator[LogHub]:
    async with asyncio.TaskGroup() as group:
        group.create_task(hub.run())
        try:
            yield hub
        finally:
            await hub.close()


def silent(log: str, number: int, lost: int) -> None:
    pass


def new_hub(
    log_dir: Path | None,
    wall: Callable[[], float] | None = None,
    on_error: Callable[[str, int, int], None] = silent,
) -> LogHub:
    return LogHub(asyncio.get_running_loop(), log_dir, wall or Wall(), on_error)


@pytest.fixture
async def hub(tmp_path: Path) -> AsyncIterator[LogHub]:
    async with running(new_hub(tmp_path / "log")) as hub:
        hub.open_pool("web")
        yield hub


def records(path: Path) -> list[lines.Record]:
    return [decode(line) for line in path.read_bytes().splitlines()]


def rebuild(found: Iterable[lines.Record]) -> dict[Key, bytes]:
    streams: dict[Key, bytearray] = {}
    for record in found:
        stream = streams.setdefault((record.worker, record.generation, record.stream), bytearray())
        assert record.offset == len(stream)
        stream += lines.content(record)
    return {key: bytes(stream) for key, stream in streams.items()}


async def until(done: Callable[[], bool], hub: LogHub) -> None:
    """Lets the loop run, as long as it takes, until done."""
    while not done():
        await turns(1)


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def seen(follower: Follower, size: int) -> list[lines.Record]:
    """What follower gives, up to size bytes of the streams."""
    found: list[lines.Record] = []
    while size > 0:
        for line in (await anext(follower)).splitlines():
            found.append(decode(line))
            size -= len(lines.content(found[-1]))
    return found


# --- from the pipe to the file -----------------------------------------------------------------------------------


async def test_output_becomes_records(hub: LogHub, tmp_path: Path) -> None:
    out, err = Writer(), Writer()
    follower = hub.follow()
    life = hub.attach("web", "web/3", 4, out.read_end, err.read_end)
    out.write(b"early\n")
    await anext(follower)
    life.identify(5151, 2)
    out.write(b"hello\n")
    await anext(follower)
    err.write(b'{"level":"warn"}\n')
    await anext(follower)
    out.close()
    err.write(b"torn").close()
    hub.drain(life)
    await hub.flush()
    found = [json.loads(line) for line in (tmp_path / "log/web.jsonl").read_text().splitlines()]
    stamps = [record.pop("ts") for record in found]
    same = {"worker": "web/3", "generation": 4, "host_pid": 5151, "ns_pid": 2}
    assert found == [
        same | {"stream": "stdout", "offset": 0, "msg": "early", "host_pid": None, "ns_pid": None},
        same | {"stream": "stdout", "offset": 6, "msg": "hello"},
        same | {"stream": "stderr", "offset": 0, "data": {"level": "warn"}},
        same | {"stream": "stderr", "offset": 17, "msg": "torn", "nl": False},
    ]
    assert stamps == sorted(stamps)
    assert stamps[0].startswith("2026-11-23T12:00:00.")


async def test_merged_streams_are_stdout(hub: LogHub, tmp_path: Path) -> None:
    writer = Writer()
    life = hub.attach("web", "web/0", 1, writer.read_end)
    writer.write(b"both\n").close()
    hub.drain(life)
    await hub.flush()
    assert [record.stream for record in records(tmp_path / "log/web.jsonl")] == ["stdout"]


async def test_files_and_directories_have_their_modes(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        async with running(new_hub(tmp_path / "a" / "log")) as hub:
            hub.open_pool("web")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a/log").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "a/log/web.jsonl").stat().st_mode) == 0o640


async def test_a_file_that_is_there_keeps_its_mode_and_content(tmp_path: Path) -> None:
    path = tmp_path / "web.jsonl"
    path.write_bytes(lines.mark(lines.stamp(NOON), None, None, "old"))
    path.chmod(0o600)
    async with running(new_hub(tmp_path)) as hub:
        hub.open_pool("web")
        hub.append("web", lines.mark(lines.stamp(NOON), None, None, "new"))
    assert [record.msg for record in records(path)] == ["old", "new"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_random_bytes_can_be_rebuilt(hub: LogHub, tmp_path: Path) -> None:
    stream = random.Random(1).randbytes(300_000)
    out, err = Writer(), Writer()
    life = hub.attach("web", "web/0", 1, out.read_end, err.read_end)
    follower = hub.follow(max_bytes=1 << 30)
    threads = [out.write_all_and_close(stream), err.write_all_and_close(stream[::-1])]
    await seen(follower, 2 * len(stream))
    hub.drain(life)
    await hub.flush()
    for thread in threads:
        thread.join()
    assert rebuild(records(tmp_path / "log/web.jsonl")) == {
        ("web/0", 1, "stdout"): stream,
        ("web/0", 1, "stderr"): stream[::-1],
    }


async def test_a_noisy_worker_and_quiet_ones_all_arrive(hub: LogHub, tmp_path: Path) -> None:
    loud = b"".join(b"line %d of a worker that has %s to say\n" % (i, b"a lot " * 30) for i in range(95_000))
    assert len(loud) > 20_000_000
    quiet = {f"web/{i}": b"".join(b"%d says %d\n" % (i, j) for j in range(50)) for i in range(1, 21)}
    writers = {worker_id: Writer() for worker_id in ["web/0", *quiet]}
    follower = hub.follow(max_bytes=1 << 30)
    lives = [hub.attach("web", worker_id, 1, writer.read_end) for worker_id, writer in writers.items()]
    thread = writers["web/0"].write_all_and_close(loud)
    for worker_id, text in quiet.items():
        for line in text.splitlines(keepends=True):
            writers[worker_id].write(line)
            await asyncio.sleep(0)
        writers[worker_id].close()
    total = len(loud) + sum(map(len, quiet.values()))
    while total > 0:
        total -= sum(len(lines.content(decode(line))) for line in (await anext(follower)).splitlines())
    for life in lives:
        hub.drain(life)
    await hub.flush()
    thread.join()
    found = rebuild(records(tmp_path / "log/web.jsonl"))
    assert found.pop(("web/0", 1, "stdout")) == loud
    assert found == {(worker_id, 1, "stdout"): text for worker_id, text in quiet.items()}


async def test_packets_are_read_one_by_one(hub: LogHub, tmp_path: Path) -> None:
    writer = Writer(os.O_DIRECT)
    follower = hub.follow()
    life = hub.attach("web", "web/0", 1, writer.read_end)
    for packet in (b"one\n", b"two", b" and a half\n"):
        os.write(writer.fd, packet)
    assert [r.msg for r in await seen(follower, 19)] == ["one", "two and a half"]
    os.write(writer.fd, b"end")
    os.write(writer.fd, b"ing\n")
    hub.drain(life)
    writer.close()
    await hub.flush()
    assert [r.msg for r in records(tmp_path / "log/web.jsonl")] == ["one", "two and a half", "ending"]


# --- when it looks -----------------------------------------------------------------------------------------------


async def test_many_small_writers_cost_one_pass(hub: LogHub) -> None:
    writers = [Writer() for _ in range(50)]
    lives = [hub.attach("web", f"web/{i}", 1, writer.read_end) for i, writer in enumerate(writers)]
    follower = hub.follow()
    for writer in writers:
        writer.write(b"a line\n")
    await seen(follower, 50 * 7)
    assert hub._intake.passes == 1
    assert hub.counters.reads == 50
    for writer, life in zip(writers, lives, strict=True):
        writer.close()
        hub.drain(life)


async def test_at_rest_there_is_no_timer_and_no_pass(hub: LogHub) -> None:
    writer = Writer()
    life = hub.attach("web", "web/0", 1, writer.read_end)
    follower = hub.follow()
    writer.write(b"a line\n")
    await anext(follower)
    await until(lambda: hub._intake.at_rest, hub)
    passes = hub._intake.passes
    assert passes == 2  # the second found it dry
    await turns(100)
    assert hub._intake.passes == passes
    writer.write(b"another\n")
    await anext(follower)
    assert hub._intake.passes == passes + 1
    writer.close()
    hub.drain(life)


class Gate:
    """Holds every write to a file until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held = 0
        self._open = asyncio.Event()
        append = logfile.LogFile.append

        async def wait(file: logfile.LogFile, data: bytes) -> tuple[int, OSError | None]:
            self.held += 1
            await self._open.wait()
            return await append(file, data)

        monkeypatch.setattr(logfile.LogFile, "append", wait)

    def open(self) -> None:
        self._open.set()


async def test_a_slow_disk_holds_its_own_workers_only(
    hub: LogHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    stream = b"x" * 999 + b"\n"
    stream *= 20_000
    writer = Writer()
    life = hub.attach("web", "web/0", 1, writer.read_end)
    thread = writer.write_all_and_close(stream)
    pool = hub._pools["web"]
    await until(lambda: bool(pool.blocked), hub)
    assert logpool.HIGH < pool.size < logpool.HIGH + 3 * intake.SHARE
    # A pipe full of data is left alone, and wakes nobody.
    await until(lambda: hub._intake.at_rest, hub)
    await until(lambda: waiting(writer.read_end) == life.pipes[0].size, hub)
    await until(lambda: hub._intake.at_rest, hub)
    passes = hub._intake.passes
    await turns(200)
    assert hub._intake.passes == passes
    # Others are read meanwhile.
    hub.open_pool("db")
    other = Writer()
    follower = hub.follow(["db"])
    neighbour = hub.attach("db", "db/0", 1, other.read_end)
    other.write(b"here\n").close()
    assert [record.msg for record in await seen(follower, 5)] == ["here"]
    gate.open()
    await until(lambda: not life.pipes, hub)
    hub.drain(life)
    hub.drain(neighbour)
    await hub.flush()
    thread.join()
    assert rebuild(records(tmp_path / "log/web.jsonl")) == {("web/0", 1, "stdout"): stream}


def waiting(fd: int) -> int:
    return int.from_bytes(fcntl.ioctl(fd, termios.FIONREAD, bytes(4)), "little")


# --- the end of a life -------------------------------------------------------------------------------------------


async def test_draining_takes_all_that_is_there(hub: LogHub, tmp_path: Path) -> None:
    writer = Writer()
    fcntl.fcntl(writer.fd, fcntl.F_SETPIPE_SZ, 1 << 20)
    life = hub.attach("web", "web/0", 1, writer.read_end)
    stream = b"".join(b"%d\n" % i for i in range(120_000))
    writer.write(stream).close()
    hub.drain(life)
    hub.drain(life)
    await hub.flush()
    assert rebuild(records(tmp_path / "log/web.jsonl")) == {("web/0", 1, "stdout"): stream}


async def test_draining_is_not_held_by_an_end_outside(hub: LogHub, tmp_path: Path) -> None:
    writer = Writer()
    stop = threading.Event()

    def write_on() -> None:
        with contextlib.suppress(BrokenPipeError):
            while not stop.is_set():
                os.write(writer.fd, b"still here\n")

    life = hub.attach("web", "web/0", 1, writer.read_end)
    thread = threading.Thread(target=write_on)
    thread.start()
    try:
        hub.drain(life)
        assert hub.counters.bytes_read <= 65536 + intake.SHARE
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(writer.read_end)
    finally:
        stop.set()
        thread.join()
        writer.close()


async def test_a_worker_that_closes_its_output_lives_on(hub: LogHub, tmp_path: Path) -> None:
    out, err = Writer(), Writer()
    follower = hub.follow()
    life = hub.attach("web", "web/0", 1, out.read_end, err.read_end)
    out.write(b"last words").close()
    assert [record.nl for record in await seen(follower, 10)] == [False]
    err.write(b"not quite\n").close()
    assert [record.msg for record in await seen(follower, 10)] == ["not quite"]
    await until(lambda: not life.pipes, hub)
    assert hub._intake.pipes == {}
    hub.drain(life)


async def test_a_shared_read_end_leaves_no_registration(hub: LogHub) -> None:
    # init keeps the read ends as well: closing ours is not enough.
    writer = Writer()
    kept = os.dup(writer.read_end)
    life = hub.attach("web", "web/0", 1, writer.read_end)
    hub.drain(life)
    writer.write(b"nobody reads this\n")
    await turns(10)
    assert hub._intake.passes == 0
    os.close(kept)
    writer.close()


# --- writing -----------------------------------------------------------------------------------------------------


async def test_flush_is_exact(hub: LogHub, tmp_path: Path) -> None:
    for number in range(100):
        hub.append("web", lines.mark(lines.stamp(NOON), None, None, str(number)))
        if not number % 10:
            await hub.flush()
            assert [record.msg for record in records(tmp_path / "log/web.jsonl")] == [str(n) for n in range(number + 1)]


async def test_big_batches_stay_in_order(hub: LogHub, tmp_path: Path) -> None:
    padding = "x" * 10_000
    for number in range(500):
        hub.append("web", lines.mark(lines.stamp(NOON), None, None, f"{number} {padding}"))
    await hub.flush()
    found = [int((record.msg or "").split()[0]) for record in records(tmp_path / "log/web.jsonl")]
    assert found == list(range(500))
    assert hub.counters.writes < 50


async def test_close_writes_without_run(tmp_path: Path) -> None:
    hub = new_hub(tmp_path)
    hub.open_pool("web")
    writer = Writer()
    hub.attach("web", "web/0", 1, writer.read_end)
    writer.write(b"never drained").close()
    await hub.close()
    await hub.close()
    assert [record.msg for record in records(tmp_path / "web.jsonl")] == ["never drained"]


async def test_a_cancelled_run_loses_and_repeats_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = new_hub(tmp_path)
    hub.open_pool("web")
    gate = Gate(monkeypatch)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(hub.run())
        hub.append("web", lines.mark(lines.stamp(NOON), None, None, "in flight"))
        await until(lambda: gate.held == 1, hub)
        hub.append("web", lines.mark(lines.stamp(NOON), None, None, "waiting"))
        task.cancel()
    gate.open()
    await hub.close()
    assert [record.msg for record in records(tmp_path / "web.jsonl")] == ["in flight", "waiting"]


async def test_a_pool_can_be_closed_and_opened_again(hub: LogHub, tmp_path: Path) -> None:
    note = lines.mark(lines.stamp(NOON), None, None, "x")
    hub.append("web", note)
    hub.close_pool("web")
    hub.open_pool("web")  # before it was closed
    hub.append("web", note)
    await hub.flush()
    hub.close_pool("web")
    await until(lambda: "web" not in hub._pools, hub)
    hub.open_pool("web")
    hub.append("web", note)
    await hub.flush()
    assert len(records(tmp_path / "log/web.jsonl")) == 3
    with pytest.raises(KeyError):
        hub.append("db", note)


# --- time ----------------------------------------------------------------------------------------------------------


async def test_time_never_goes_back_within_a_file(tmp_path: Path) -> None:
    (tmp_path / "web.jsonl").write_bytes(lines.mark(lines.stamp(NOON + 10), None, None, "from the future"))
    wall = iter([NOON, NOON + 20, NOON + 5] + [NOON + 15] * 10)
    async with running(new_hub(tmp_path, lambda: next(wall))) as hub:
        hub.open_pool("web")
        follower = hub.follow()
        writer = Writer()
        life = hub.attach("web", "web/0", 1, writer.read_end)
        for _ in range(3):
            writer.write(b"line\n")
            await anext(follower)
            await until(lambda: hub._intake.at_rest or not hub._intake._ready, hub)
        writer.close()
        hub.drain(life)
    seconds = [record.ts[17:19] for record in records(tmp_path / "web.jsonl")]
    assert seconds == sorted(seconds)
    assert seconds[:2] == ["10", "10"]


# --- disks that fail ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writes beyond size fail with EFBIG, after a short write up to it: as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_full_disk_costs_only_what_did_not_fit(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    streams = {f"web/{i}": b"".join(b"%d: line %d\n" % (i, j) for j in range(300)) for i in range(2)}
    path = tmp_path / "web.jsonl"
    async with running(new_hub(tmp_path, on_error=lambda *what: told.append(what))) as hub:
        hub.open_pool("web")
        writers = {worker_id: Writer() for worker_id in streams}
        lives = {worker_id: hub.attach("web", worker_id, 1, w.read_end) for worker_id, w in writers.items()}
        follower = hub.follow()
        with file_size_limit(60_000):
            for worker_id, writer in writers.items():
                writer.write(streams[worker_id][:2000])
            await seen(follower, 3900)
            await hub.flush()
            assert not told
            for worker_id, writer in writers.items():
                writer.write(streams[worker_id][2000:3000])
                await seen(follower, 950)
                await hub.flush()
            assert path.stat().st_size <= 60_000
            assert path.read_bytes().endswith(b"}\n")
        for worker_id, writer in writers.items():
            writer.write(streams[worker_id][3000:]).close()
            hub.drain(lives[worker_id])
        await hub.flush()
        assert [(log, number) for log, number, _ in told] == [("web", errno.EFBIG)]
        dropped = {worker_id: hub.dropped_bytes("web", worker_id) for worker_id in streams}
        assert hub.dropped_bytes("web") == hub.counters.bytes_dropped == sum(dropped.values())
    found = records(path)
    marks = [record for record in found if record.stream == "nssup"]
    assert {record.worker: record.msg for record in marks} == {
        worker_id: f"{lost} bytes of log dropped: EFBIG" for worker_id, lost in dropped.items() if lost
    }
    arrived: Counter[str | None] = Counter()
    for record in found:
        if record.stream != "nssup":
            content = lines.content(record)
            assert record.worker is not None
            assert record.offset is not None
            assert streams[record.worker][record.offset :].startswith(content)
            arrived[record.worker] += len(content)
    assert dropped["web/1"] > 0
    assert {worker_id: arrived[worker_id] + dropped[worker_id] for worker_id in streams} == {
        worker_id: len(stream) for worker_id, stream in streams.items()
    }
    assert [record.ts for record in found] == sorted(record.ts for record in found)


async def test_what_is_missing_is_said_at_the_latest_when_the_log_is_closed(tmp_path: Path) -> None:
    async with running(new_hub(tmp_path)) as hub:
        hub.open_pool("web")
        with file_size_limit(0):
            hub.append("web", lines.mark(lines.stamp(NOON), None, None, "lost"))
            await hub.flush()
    (said,) = records(tmp_path / "web.jsonl")
    assert said.msg is not None
    assert said.msg.endswith("bytes of log dropped: EFBIG")


class FailingFile:
    """Takes `room` bytes, then fails; cannot be truncated if `fixed`."""

    def __init__(self, room: int, *, fixed: bool = False, most: int = 1 << 30) -> None:
        self.room, self.fixed, self.most = room, fixed, most
        self.content = b""

    def write(self, data: memoryview) -> int:
        taken = bytes(data[: min(self.room, self.most)])
        if not taken:
            raise OSError(errno.ENOSPC, "no space left")
        self.room -= len(taken)
        self.content += taken
        return len(taken)

    def seek(self, at: int, whence: int) -> int:
        return len(self.content)

    def truncate(self, size: int) -> None:
        if self.fixed:
            raise OSError(errno.EIO, "input/output error")
        self.content = self.content[:size]

    def close(self) -> None:
        raise OSError(errno.EIO, "input/output error")


def failing(tmp_path: Path, disk: FailingFile) -> logfile.RecordFile:
    file = logfile.RecordFile(tmp_path / "web.jsonl")
    file._file = cast("io.FileIO", disk)
    return file


def outcome(answer: tuple[int, OSError | None]) -> tuple[int, int | None]:
    return answer[0], answer[1].errno if answer[1] else None


def test_short_writes_are_continued(tmp_path: Path) -> None:
    disk = FailingFile(100, most=3)
    file = failing(tmp_path, disk)
    assert outcome(file.append(b"one\ntwo\n")) == (8, None)
    assert (disk.content, file.size) == (b"one\ntwo\n", 8)
    file.close()


def test_a_torn_line_is_cut_off(tmp_path: Path) -> None:
    disk = FailingFile(6)
    file = failing(tmp_path, disk)
    assert outcome(file.append(b"one\ntwo\n")) == (4, errno.ENOSPC)
    assert (disk.content, file.size) == (b"one\n", 4)
    disk.room = 100
    assert outcome(file.append(b"three\n")) == (6, None)
    assert (disk.content, file.size) == (b"one\nthree\n", 10)


def test_a_torn_line_that_cannot_be_cut_off_is_ended(tmp_path: Path) -> None:
    disk = FailingFile(6, fixed=True)
    file = failing(tmp_path, disk)
    assert outcome(file.append(b"one\ntwo\n")) == (4, errno.ENOSPC)
    assert outcome(file.append(b"three\n")) == (0, errno.ENOSPC)
    disk.room = 2
    assert outcome(file.append(b"three\n")) == (0, errno.ENOSPC)
    disk.room = 100
    assert outcome(file.append(b"four\n")) == (5, None)
    assert disk.content == b"one\ntw\nt\nfour\n"
    assert file.size == len(disk.content)


async def test_each_gap_is_said_once_though_its_mark_hardly_fits(hub: LogHub) -> None:
    pool = hub._pools["web"]
    assert pool.file is not None
    await pool.file.close()
    disk = FailingFile(0)
    pool.file._records._file = cast("io.FileIO", disk)
    writers = [Writer(), Writer()]
    lives = [hub.attach("web", f"web/{i}", 1, writer.read_end) for i, writer in enumerate(writers)]
    follower = hub.follow()
    for writer in writers:
        writer.write(b"lost\n")
        await anext(follower)
        await hub.flush()
    disk.room = 200  # for a mark and a bit
    writers[0].write(b"lost too\n")
    await anext(follower)
    await hub.flush()
    disk.room = 10_000
    writers[1].write(b"kept\n")
    await anext(follower)
    await hub.flush()
    for writer, life in zip(writers, lives, strict=True):
        writer.close()
        hub.drain(life)
    found = [decode(line) for line in disk.content.splitlines()]
    assert [(record.worker, record.msg) for record in found] == [
        ("web/0", "5 bytes of log dropped: ENOSPC"),
        ("web/1", "5 bytes of log dropped: ENOSPC"),
        ("web/0", "9 bytes of log dropped: ENOSPC"),
        ("web/1", "kept"),
    ]


async def test_a_line_torn_in_an_earlier_run_is_ended(tmp_path: Path) -> None:
    path = tmp_path / "web.jsonl"
    path.write_bytes(lines.mark(lines.stamp(NOON), None, None, "old") + b'{"ts":"2026-')
    async with running(new_hub(tmp_path)) as hub:
        hub.open_pool("web")
        hub.append("web", lines.mark(lines.stamp(NOON), None, None, "new"))
        await hub.flush()
        assert [decode(record).msg for record in await hub.tail("web", 10)] == ["old", "new"]
    assert path.read_bytes().splitlines()[1] == b'{"ts":"2026-'


@pytest.mark.parametrize("kind", ["symlink", "fifo", "directory", "dangling"])
async def test_only_a_regular_file_is_written(tmp_path: Path, kind: str) -> None:
    path, target = tmp_path / "log/web.jsonl", tmp_path / "target"
    path.parent.mkdir()
    if kind == "symlink":
        target.write_text("precious")
        path.symlink_to(target)
    elif kind == "dangling":
        path.symlink_to(target)
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    told: list[int] = []
    async with running(new_hub(tmp_path / "log", on_error=lambda log, number, lost: told.append(number))) as hub:
        with pytest.raises(OSError, match=r"web\.jsonl"):
            hub.open_pool("web")
        # It goes on all the same.
        writer = Writer()
        life = hub.attach("web", "web/0", 1, writer.read_end)
        writer.write(b"lost\n")
        follower = hub.follow()
        await anext(follower)
        await hub.flush()
        await hub.flush()
        assert len(told) == 1
        assert hub.dropped_bytes("web", "web/0") == 5
        path.rmdir() if kind == "directory" else path.unlink()
        writer.write(b"kept\n").close()
        hub.drain(life)
    assert [record.msg for record in records(path)] == [f"5 bytes of log dropped: {errno.errorcode[told[0]]}", "kept"]
    assert not target.exists() or target.read_text() == "precious"


# --- followers ---------------------------------------------------------------------------------------------------


async def test_without_a_directory_records_go_to_followers_only() -> None:
    async with running(new_hub(None)) as hub:
        hub.open_pool("web")
        follower = hub.follow()
        writer = Writer()
        life = hub.attach("web", "web/0", 1, writer.read_end)
        writer.write(b"hello\n").close()
        assert [record.msg for record in await seen(follower, 6)] == ["hello"]
        hub.drain(life)
        await hub.flush()
        assert await hub.tail("web", 5) == []
        assert [json.loads(record)["msg"] for record in hub.last_records("web/0", 5)] == ["hello"]
        hub.close_pool("web")
        assert hub.counters.writes == 0


async def test_a_follower_sees_what_it_asked_for(hub: LogHub) -> None:
    hub.open_pool("db")
    hub.open_pool("nssup")
    everything, db, one, own = (
        hub.follow(),
        hub.follow(["db"]),
        hub.follow(["web"], workers={"web/1"}),
        hub.follow(["nssup"]),
    )
    for worker_id in ("web/0", "web/1", "db/0"):
        writer = Writer()
        life = hub.attach(worker_id.partition("/")[0], worker_id, 1, writer.read_end)
        writer.write(worker_id.encode()).close()
        hub.drain(life)
    hub.append("nssup", lines.mark(lines.stamp(NOON), None, None, "own"))
    await hub.close()

    async def messages(follower: Follower) -> list[str | None]:
        return [decode(line).msg async for chunk in follower for line in chunk.splitlines()]

    assert await messages(everything) == ["web/0", "web/1", "db/0"]
    assert await messages(db) == ["db/0"]
    assert await messages(one) == ["web/1"]
    assert await messages(own) == ["own"]
    assert await messages(hub.follow()) == []


async def test_a_follower_that_does_not_read_is_cut(hub: LogHub) -> None:
    follower = hub.follow(["web"], max_bytes=1000)
    note = lines.mark(lines.stamp(NOON), None, None, "n" * 200)
    for _ in range(10):
        hub.append("web", note)
    assert follower._size <= 1000
    fitting = 1000 // len(note)
    lost = (10 - fitting) * len(note)
    for _ in range(fitting):
        assert await anext(follower) == note
    assert decode(await anext(follower)).msg == f"{lost} bytes of log skipped: the reader is too slow"
    hub.append("web", note)
    assert await anext(follower) == note
    assert follower.missed == lost


async def test_the_mark_stands_where_records_are_missing(hub: LogHub) -> None:
    follower = hub.follow(["web"], max_bytes=500)
    for message in ("a" * 200, "b" * 200):
        hub.append("web", lines.mark(lines.stamp(NOON), None, None, message))
    await anext(follower)
    hub.append("web", lines.mark(lines.stamp(NOON), None, None, "c"))
    follower.close()
    assert [(decode(chunk).msg or "")[-8:] async for chunk in follower] == ["too slow", "c"]


async def test_closing_ends_a_waiting_follower(hub: LogHub) -> None:
    follower = hub.follow()

    async def read() -> list[bytes]:
        return [chunk async for chunk in follower]

    async with asyncio.TaskGroup() as group:
        task = group.create_task(read())
        await turns(2)
        follower.close()
        follower.close()
    assert task.result() == []
    assert hub._followers == set()


# --- reading back ------------------------------------------------------------------------------------------------


def numbered(hub: LogHub, worker_ids: Iterable[str], count: int) -> None:
    for worker_id in worker_ids:
        writer = Writer()
        life = hub.attach("web", worker_id, 1, writer.read_end)
        writer.write(b"".join(b"%s %d\n" % (worker_id.encode(), i) for i in range(count))).close()
        hub.drain(life)


def messages(found: Iterable[bytes]) -> list[str | None]:
    return [decode(line).msg for line in found]


@pytest.mark.parametrize("flushed", [True, False])
async def test_the_tail_of_a_log(hub: LogHub, flushed: bool) -> None:
    numbered(hub, ["web/0", "web/1"], 1000)  # several blocks
    if flushed:
        await hub.flush()
    assert messages(await hub.tail("web", 2)) == ["web/1 998", "web/1 999"]
    assert messages(await hub.tail("web", 2, {"web/0"})) == ["web/0 998", "web/0 999"]
    assert messages(await hub.tail("web", 5000)) == [f"web/{i} {j}" for i in (0, 1) for j in range(1000)]
    assert await hub.tail("web", 0) == []
    assert await hub.tail("web", 3, {"web/2"}) == []
    assert await hub.tail("db", 3) == []
    assert messages(hub.last_records("web/1", 2)) == ["web/1 998", "web/1 999"]
    assert hub.last_records("db/0", 2) == []


async def test_the_tail_joins_what_is_written_and_what_is_not(hub: LogHub, monkeypatch: pytest.MonkeyPatch) -> None:
    numbered(hub, ["web/0"], 3)
    await hub.flush()
    gate = Gate(monkeypatch)
    numbered(hub, ["web/1"], 2)
    await until(lambda: gate.held == 1, hub)
    numbered(hub, ["web/2"], 2)
    expected = ["web/0 2", "web/1 0", "web/1 1", "web/2 0", "web/2 1"]
    assert messages(await hub.tail("web", 5)) == expected
    gate.open()
    await hub.flush()
    assert messages(await hub.tail("web", 5)) == expected


async def test_following_after_the_tail_repeats_and_misses_nothing(hub: LogHub) -> None:
    numbered(hub, ["web/0"], 3)
    follower = hub.follow()

    async def write_more() -> None:
        numbered(hub, ["web/1"], 3)
        await hub.flush()

    async with asyncio.TaskGroup() as group:
        tail = group.create_task(hub.tail("web", 100))
        group.create_task(write_more())
    assert messages(tail.result()) == ["web/0 0", "web/0 1", "web/0 2"]
    assert [r.msg for r in await seen(follower, 24)] == ["web/1 0", "web/1 1", "web/1 2"]


async def test_the_search_for_last_records_is_bounded(hub: LogHub, tmp_path: Path) -> None:
    numbered(hub, ["web/0"], 10)
    numbered(hub, ["web/1"], 3000)
    await hub.flush()
    assert hub.last_records("web/0", 1) == []
    assert messages(await hub.tail("web", 1, {"web/0"})) == ["web/0 9"]


async def test_what_is_no_record_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "web.jsonl"
    note = lines.mark(lines.stamp(NOON), None, None, "good")
    path.write_bytes(note + b"\0" * 1_000_000 + b"\n" + b"junk\n\n" + note)
    async with running(new_hub(tmp_path)) as hub:
        hub.open_pool("web")
        assert await hub.tail("web", 5) == [note, note]
        path.unlink()
        assert await hub.tail("web", 5) == []
