"""Output through staging memory, as the hub does it: to its end, let go midway, taken up again, short of room."""

import asyncio
import contextlib
import fcntl
import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from nssup import intake, logpool
from nssup.framing import Sheet
from nssup.handover import Layout
from nssup.lines import Record, content, mark, stamp
from nssup.logfile import RecordFile, Rotation, Written
from nssup.logs import LogHub, Streams
from nssup.staging import Batch, Staging

pytestmark = pytest.mark.both_loops

NOW = 1.7e9
_decode = msgspec.json.Decoder(Record).decode


@asynccontextmanager
async def hub(log_dir: Path, found: tuple[int, ...] = ()) -> AsyncIterator[LogHub]:
    """A hub with the pool `web` staged, its writer running."""
    one = LogHub(asyncio.get_running_loop(), log_dir, lambda: NOW)
    one.open_pool("web", staged=True, found=found)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(one.run())
        try:
            yield one
        finally:
            await one.close()


def attach(one: LogHub, read: int, index: int = 0, generation: int = 1) -> Streams:
    life = one.attach("web", f"web/{index}", generation, read, None, one.place("web", f"web/{index}", generation))
    life.identify(100 + index, 2)
    return life


def streams_in(log_dir: Path) -> dict[tuple[str | None, int | None], bytes]:
    """The bytes of each life's stdout, rebuilt; each record must follow the one before."""
    found: dict[tuple[str | None, int | None], bytes] = {}
    for line in (log_dir / "web.jsonl").read_bytes().splitlines():
        record = _decode(line)
        key = record.worker, record.generation
        assert record.host_pid is not None
        assert record.offset == len(found.get(key, b""))
        found[key] = found.get(key, b"") + content(record)
    return found


def memory_of(one: LogHub) -> Staging:
    staging = one.place("web", "web/99", 1)
    one.give_back("web", "web/99", 1)
    assert staging is not None
    return staging


async def have_read(one: LogHub, count: int) -> None:
    while one.counters.bytes_read < count:  # noqa: ASYNC110 - nobody is told of it, and it is a turn or two
        await asyncio.sleep(0)


def told() -> tuple[asyncio.Future[None], Callable[[], None]]:
    future = asyncio.get_running_loop().create_future()
    return future, lambda: future.set_result(None)


async def test_a_life_is_let_go_when_all_of_it_is_in_the_log(tmp_path: Path) -> None:
    async with hub(tmp_path) as one:
        read, write = os.pipe()
        life = attach(one, read)
        os.write(write, b"one\ntwo\nrest")
        os.close(write)
        drained, tell = told()
        one.drain(life, tell)
        assert not drained.done()
        await drained
        assert streams_in(tmp_path) == {("web/0", 1): b"one\ntwo\nrest"}
        staging = memory_of(one)
        assert not staging.streams


async def test_a_life_that_said_nothing_is_let_go_too(tmp_path: Path) -> None:
    async with hub(tmp_path) as one:
        read, write = os.pipe()
        os.close(write)
        drained, tell = told()
        one.drain(attach(one, read), tell)
        await drained
        assert one.counters.writes == 0  # nothing was to be written
        assert not memory_of(one).streams


async def test_what_was_taken_and_never_written_is_written_though_nothing_comes_behind_it(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.write(write, b"last words\n")
    before = Staging.create("web")
    before.take(before.attach(0, 1, 0, 100, 2), read, 65536, NOW)  # and then its supervisor was killed
    memory = os.dup(before.fd)
    before.close()
    async with hub(tmp_path, (memory,)) as one:
        one.attach("web", "web/0", 1, read, None, memory_of(one)).identify(100, 2)
        while not one.counters.bytes_written:  # noqa: ASYNC110 - nobody is told of it, and it is a turn or two
            await asyncio.sleep(0)
    assert streams_in(tmp_path) == {("web/0", 1): b"last words\n"}
    os.close(write)


async def test_the_next_hub_goes_on_in_the_middle_of_a_line(tmp_path: Path) -> None:
    read, write = os.pipe()
    kept = os.dup(read)  # as init has it
    async with hub(tmp_path) as one:
        life = attach(one, read)
        os.write(write, b"first\nhalf a ")
        staging = memory_of(one)
        memory = os.dup(staging.fd)
        await have_read(one, 13)
        await one.flush()
        one.detach(life)
    assert streams_in(tmp_path) == {("web/0", 1): b"first\n"}
    os.write(write, b"line\n")
    os.close(write)
    async with hub(tmp_path, (os.dup(memory), memory)) as one:
        found = memory_of(one)
        assert one.is_staged(found, "web/0", 1)
        life = one.attach("web", "web/0", 1, kept, None, found)
        one.settle("web", {("web/0", 1)})
        drained, tell = told()
        one.drain(life, tell)
        await drained
    assert streams_in(tmp_path) == {("web/0", 1): b"first\nhalf a line\n"}


async def test_a_stream_that_nobody_writes_any_more_is_ended(tmp_path: Path) -> None:
    read, write = os.pipe()
    async with hub(tmp_path) as one:
        life = attach(one, read)
        os.write(write, b"cut of")
        await have_read(one, 6)
        await one.flush()
        staging = memory_of(one)
        memory = os.dup(staging.fd)
        one.detach(life)
    os.close(write)
    async with hub(tmp_path, (memory,)) as one:
        one.settle("web", ())
        await one.flush()
        assert streams_in(tmp_path) == {("web/0", 1): b"cut of"}


@pytest.mark.parametrize("size", [4096, 40_000, 65_536])
async def test_no_room_delays_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """The memory is far smaller than what comes: pipes wait for the writer, also those of lives that are over."""
    monkeypatch.setattr(logpool, "LAYOUT", Layout(streams=16, half=4096, entries=8))
    lives = []
    async with hub(tmp_path) as one:
        for index in range(6):
            read, write = os.pipe()
            said = (b"%d: a line of some length\n" % index * (size // 20))[:size]
            os.write(write, said)
            os.close(write)
            drained, tell = told()
            one.drain(attach(one, read, index), tell)
            lives.append((index, said, drained))
        for _, _, drained in lives:
            await drained
    assert streams_in(tmp_path) == {(f"web/{index}", 1): said for index, said, _ in lives}


async def test_lives_that_end_at_once_are_all_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each staging memory has a batch of its own to write, and nobody says so twice."""
    monkeypatch.setattr(logpool, "LAYOUT", Layout(streams=4, half=4096, entries=8))
    async with hub(tmp_path) as one:
        lives = []
        for index in range(13):
            read, write = os.pipe()
            lives.append(attach(one, read, index))
            os.close(write)
        waiting = []
        for life in lives:
            drained, tell = told()
            one.drain(life, tell)
            waiting.append(drained)
        for drained in waiting:
            await drained


async def test_more_lives_than_one_memory_has_streams_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logpool, "LAYOUT", Layout(streams=4, half=4096, entries=8))
    async with hub(tmp_path) as one:
        waiting = []
        writers = []
        for index in range(7):
            read, write = os.pipe()
            writers.append(write)
            waiting.append(attach(one, read, index))
            os.write(write, b"x\n")
        for life, write in zip(waiting, writers, strict=True):
            os.close(write)
            drained, tell = told()
            one.drain(life, tell)
            await drained
    assert streams_in(tmp_path) == {(f"web/{index}", 1): b"x\n" for index in range(7)}


async def test_a_place_is_kept_until_its_life_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logpool, "LAYOUT", Layout(streams=4, half=4096, entries=8))
    async with hub(tmp_path) as one:
        places = [one.place("web", f"web/{index}", 1) for index in range(5)]
        assert [places.index(place) for place in places] == [0, 0, 2, 2, 4]
        one.give_back("web", "web/1", 1)
        assert one.place("web", "web/6", 1) is places[0]


async def test_writing_does_not_shorten_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REST", "SHORT_REST", "LONG_REST"):
        monkeypatch.setattr(intake, name, 3600.0)
    async with hub(tmp_path) as one:
        read, write = os.pipe()
        life = attach(one, read)
        os.write(write, b"a line\n")
        await have_read(one, 7)
        rest = one._intake._timer
        assert rest is not None
        await one.flush()
        assert one._intake._timer is rest
        os.close(write)
        one.drain(life)


async def test_a_pipe_that_is_found_full_twice_grows(tmp_path: Path) -> None:
    async with hub(tmp_path) as one:
        read, write = os.pipe()
        os.set_blocking(write, False)
        life = attach(one, read)
        taken = 0
        for _ in range(3):
            with contextlib.suppress(BlockingIOError):
                while True:
                    taken += os.write(write, b"x" * 2047 + b"\n")  # each has a page of its own
            await have_read(one, taken)
        if fcntl.fcntl(write, fcntl.F_GETPIPE_SZ) == intake.SIZE:
            pytest.skip("needs pipes that may grow (fs.pipe-user-pages-soft)")
        assert life.pipes[0].size == fcntl.fcntl(write, fcntl.F_GETPIPE_SZ) == intake.LARGE
        os.close(write)
        one.drain(life)


async def test_one_noisy_worker_does_not_keep_others_from_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the noisy one fills each time has room for the others before its next share."""
    monkeypatch.setattr(logpool, "LAYOUT", Layout(streams=16, half=intake.SIZE * 2, entries=64))
    async with hub(tmp_path) as one:
        noisy, quiet = os.pipe(), os.pipe()
        lives = [attach(one, noisy[0], 0), attach(one, quiet[0], 1)]
        stop = threading.Event()

        def write_on() -> None:
            while not stop.is_set():
                os.write(noisy[1], b"noise\n" * 5000)

        thread = threading.Thread(target=write_on)
        thread.start()
        follower = one.follow(["web"], workers={"web/1"})
        try:
            for number in range(20):
                os.write(quiet[1], b"%d\n" % number)
                assert _decode(await anext(follower)).msg == str(number)
        finally:
            stop.set()
            await asyncio.to_thread(thread.join)
            for fd, life in zip((noisy[1], quiet[1]), lives, strict=True):
                os.close(fd)
                drained, tell = told()
                one.drain(life, tell)
                await drained


async def test_who_follows_while_a_batch_is_written_has_it_from_the_tail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    append = RecordFile.append_batch

    def held(file: RecordFile, batch: Batch, sheet: Sheet, marks: bytes, most: int) -> Written:
        go.wait()
        return append(file, batch, sheet, marks, most)

    monkeypatch.setattr(RecordFile, "append_batch", held)
    async with hub(tmp_path) as one:
        read, write = os.pipe()
        life = attach(one, read)
        os.write(write, b"before\n")
        while one._pools["web"].batch_done is None:  # noqa: ASYNC110 - it is a turn or two
            await asyncio.sleep(0)
        follower = one.follow(["web"])
        async with asyncio.TaskGroup() as tasks:
            tail = tasks.create_task(one.tail("web", 10))
            await asyncio.sleep(0)
            go.set()
        os.write(write, b"after\n")
        assert [_decode(record).msg for record in tail.result()] == ["before"]
        assert _decode(await anext(follower)).msg == "after"
        os.close(write)
        one.drain(life)


# --- files that are set aside ----------------------------------------------------------------------------------------


async def write_lines(one: LogHub, write: int, first: int, count: int) -> None:
    """One batch for each line."""
    for number in range(first, first + count):
        before = one.counters.bytes_read
        os.write(write, b"%d\n" % number)
        await have_read(one, before + len(str(number)) + 1)
        await one.flush()


def messages(found: list[bytes]) -> list[str | None]:
    return [_decode(record).msg for record in found]


@asynccontextmanager
async def rotating(log_dir: Path, rotation: Rotation) -> AsyncIterator[tuple[LogHub, int]]:
    """A hub whose pool has these files, and the write end of a worker's stdout."""
    async with hub(log_dir) as one:
        one.open_pool("web", staged=True, rotation=rotation)
        read, write = os.pipe()
        life = attach(one, read)
        yield one, write
        os.close(write)
        one.drain(life)


async def test_large_files_are_set_aside_and_read_back(tmp_path: Path) -> None:
    async with rotating(tmp_path, Rotation(500, None, 3)) as (one, write):
        await write_lines(one, write, 0, 40)
        names = ["web.jsonl", "web.jsonl.1", "web.jsonl.2", "web.jsonl.3"]
        assert sorted(os.listdir(tmp_path)) == names
        kept = [path.read_bytes().splitlines(keepends=True) for path in map(tmp_path.joinpath, reversed(names))]
        joined = [record for records in kept for record in records]
        assert messages(joined) == [str(number) for number in range(40 - len(joined), 40)]
        assert await one.tail("web", 100) == joined
        assert messages(one.last_records("web/0", 9)) == [str(number) for number in range(31, 40)]


@pytest.mark.parametrize("how", [Path.unlink, lambda path: path.rename(path.with_name("elsewhere"))])
async def test_a_file_that_goes_is_begun_again(tmp_path: Path, how: Callable[[Path], object]) -> None:
    async with rotating(tmp_path, Rotation(None, None, 9)) as (one, write):
        await write_lines(one, write, 0, 2)
        how(tmp_path / "web.jsonl")
        await write_lines(one, write, 2, 2)
        assert messages((tmp_path / "web.jsonl").read_bytes().splitlines()) == ["2", "3"]


async def test_what_cannot_be_set_aside_stays_and_grows(tmp_path: Path) -> None:
    (tmp_path / "web.jsonl.1").mkdir()
    async with rotating(tmp_path, Rotation(200, None, 1)) as (one, write):
        await write_lines(one, write, 0, 10)
        assert messages((tmp_path / "web.jsonl").read_bytes().splitlines()) == [str(number) for number in range(10)]


async def test_old_files_are_set_aside_when_the_next_record_comes(tmp_path: Path) -> None:
    old, older = stamp(NOW - 30), stamp(NOW - 61)
    for ts, aside in ((old, False), (older, True)):
        place = tmp_path / ts
        place.mkdir()
        (place / "web.jsonl").write_bytes(mark(ts, None, None, "first") + mark(stamp(NOW - 1), None, None, "last"))
        async with rotating(place, Rotation(None, 60.0, 2)) as (one, write):
            await write_lines(one, write, 0, 2)
        assert (place / "web.jsonl.1").exists() == aside
        assert len((place / "web.jsonl").read_bytes().splitlines()) == (2 if aside else 4)
