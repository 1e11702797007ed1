"""The staging memory: its layout, its rules, and that a SIGKILL at any instant neither loses nor doubles a byte."""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import resource
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nssup import handover, lines
from nssup.handover import DATA, END, Entry, Layout, StagingError, State
from nssup.staging import Finished, Full, Staging, finish

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nssup.staging import Batch

    Again = Callable[[Staging], Staging]

HARNESS = Path(__file__).with_name("handover.py")
SMALL = Layout(4, 1000, 6)
WALL = 1_795_435_200.0
PIDFD_GETFD = 438


@pytest.fixture
def stage() -> Iterator[Staging]:
    made = Staging.create("web", SMALL)
    yield made
    made.close()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    yield read, write
    os.close(read)
    os.close(write)


@pytest.fixture
def again() -> Iterator[Again]:
    """What the next supervisor finds, when the one that has this memory is killed now."""
    with contextlib.ExitStack() as closes:

        def adopt(stage: Staging) -> Staging:
            fd = os.dup(stage.fd)
            try:
                found = Staging(fd)
            except StagingError:
                os.close(fd)
                raise
            closes.callback(found.close)
            return found

        yield adopt


def records(batch: Batch | None) -> bytes:
    assert batch is not None
    return b"".join([chunk.records for chunk in batch.records()])


def sealed(stage: Staging) -> Batch:
    batch = stage.seal()
    assert batch is not None
    return batch


def done(stage: Staging) -> bytes:
    """The records of what was staged, committed."""
    batch = sealed(stage)
    out = records(batch)
    batch.commit()
    return out


def framed(*reads: bytes, end: bool = False, worker: int = 0) -> bytes:
    framer = lines.Framer(f"web/{worker}", 1, "stdout")
    ts = lines.stamp(WALL)
    out = b"".join([framer.feed(read, ts, 50, 2) for read in reads])
    return out + framer.end(ts, 50, 2) if end else out


# --- layout -----------------------------------------------------------------------------------------------------------


def test_the_first_page_byte_for_byte() -> None:
    page = handover.encode_first_page(Layout(16, 70_000, 300), "web")
    assert page[:80] == (
        b"NSSSTAGE"
        + struct.pack("=IIQII", 1, 16, 70_000, 300, 16384)
        + b"web"
        + bytes(45)  # magic ... name of the pool
    )
    words = struct.unpack("=512Q", page)
    assert {at: word for at, word in enumerate(words) if word and at > 9} == {128: 1, 136: 2}
    assert handover.decode_head(page) == (Layout(16, 70_000, 300), "web")


def test_a_state_byte_for_byte() -> None:
    state = State(7, 3, 1, 5151, 2, 1 << 40, b"tail", True, False)
    packed = bytes(8) + handover.STATE.pack(*handover.state_fields(state))
    assert packed.hex() == (
        "000000000000000000000000000100000400000001000000070000000300000001000000000000001f14000002000000" + "00" * 16
    )
    assert len(packed) == handover.VERSION_SIZE
    assert handover.read_state(packed, 0) == (state._replace(held=b""), 4)
    assert struct.unpack_from("=Q", packed, handover.PIDS_WORD * 8)[0] == 5151 | 2 << 32


def test_an_entry_byte_for_byte() -> None:
    assert handover.ENTRY.pack(*Entry(3, END, 4096, 1.5)).hex() == "03000000010000000010000000000000000000000000f83f"


@pytest.mark.parametrize("layout", [Layout(), Layout(1, 1, 1), Layout(7, 4096, 171)])
def test_nothing_overlaps(layout: Layout) -> None:
    ends = [
        handover.PAGE,
        *(layout.table(half) + layout.entries * handover.ENTRY.size for half in (0, 1)),
        layout.version(layout.streams - 1, 1) + handover.VERSION_SIZE,
        layout.tail(layout.streams - 1, 1) + handover.TAIL,
        *(layout.base(half) + layout.half + 1 for half in (0, 1)),
    ]
    starts = [layout.table(0), layout.table(1), layout.version(0, 0), layout.tail(0, 0), layout.base(0), layout.base(1)]
    assert all(end <= start for end, start in zip(ends, [*starts, layout.size()], strict=True))
    assert [layout.half_of(layout.base(half) + at) for half in (0, 1) for at in (0, layout.half)] == [0, 0, 1, 1]


def test_a_tail_has_room_for_what_a_framer_holds() -> None:
    assert handover.TAIL >= lines.PART


@pytest.mark.parametrize(
    ("sequences", "committed", "which"),
    [((0, 0), 5, None), ((1, 0), 1, 0), ((3, 5), 5, 1), ((3, 6), 5, 0), ((7, 5), 6, 1), ((6, 0), 5, None)],
)
def test_the_newest_committed_version_counts(sequences: tuple[int, int], committed: int, which: int | None) -> None:
    assert handover.current(sequences, committed) == which


@pytest.mark.parametrize(
    ("entries", "stop"),
    [
        ([Entry(4, DATA, 0, WALL)], 0),  # no such stream
        ([Entry(0, 2, 0, WALL)], 0),  # no such kind
        ([Entry(0, DATA, 1, WALL)], 1),  # a gap before the first
        ([Entry(0, DATA, 0, WALL), Entry(1, DATA, 9, WALL)], 5),  # beyond the end
        ([Entry(0, DATA, 0, WALL), Entry(1, DATA, 9, WALL), Entry(0, DATA, 5, WALL)], 20),  # backwards
        ([Entry(0, DATA, 0, WALL)], 1001),  # more than a half holds
        ([Entry(0, DATA, 0, float("nan"))], 0),
        ([Entry(0, DATA, 0, 1e300)], 0),
        ([], 1),
    ],
)
def test_damaged_entries_are_refused(entries: list[Entry], stop: int) -> None:
    base = SMALL.base(1)
    table = b"".join([handover.ENTRY.pack(*entry._replace(start=base + entry.start)) for entry in entries])
    with pytest.raises(StagingError):
        handover.decode_entries(table, SMALL, 1, base + stop)


@pytest.mark.parametrize("data", [b"", bytes(4096), b"NSSSTAGE" + struct.pack("=I", 2) + bytes(100)])
def test_a_strange_memfd_is_refused_and_left_open(data: bytes) -> None:
    fd = os.memfd_create("strange")
    os.write(fd, data)
    with pytest.raises(StagingError):
        Staging(fd)
    os.close(fd)


def test_a_memfd_that_could_shrink_below_us_is_refused() -> None:
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.truncate(fd, SMALL.size())
    os.pwrite(fd, handover.encode_first_page(SMALL, "web"), 0)
    with pytest.raises(StagingError, match="sealed"):
        Staging(fd)
    os.close(fd)


def test_nobody_can_take_the_memory_away(stage: Staging) -> None:
    with pytest.raises(PermissionError):
        os.truncate(stage.fd, 0)


def test_a_position_between_the_halves_is_refused(stage: Staging, again: Again) -> None:
    os.lseek(stage.fd, SMALL.base(0) + SMALL.half + 1, os.SEEK_SET)
    with pytest.raises(StagingError):
        again(stage)
    os.lseek(stage.fd, SMALL.base(0), os.SEEK_SET)


# --- from pipe to record ----------------------------------------------------------------------------------------------


def test_records_are_what_a_framer_makes_of_the_same_reads(stage: Staging, pipe: tuple[int, int]) -> None:
    number = stage.attach(0, 1, 0, 50, 2)
    reads = [b"one\ntw", b"o\nthree", b"\xff" * 400, b'\n{"a":1}\nlast']
    out = b""
    for data in reads:
        os.write(pipe[1], data)
        assert stage.take(number, pipe[0], 65536, WALL) == len(data)
        out += done(stage)
    stage.end(number, WALL)
    stage.end(number, WALL)
    assert out + done(stage) == framed(*reads, end=True)
    assert stage.seal() is None


def test_a_batch_holds_what_was_taken_before_and_its_records_can_be_made_again(
    stage: Staging, pipe: tuple[int, int], again: Again
) -> None:
    first, second = stage.attach(0, 1, 0, 50, 2), stage.attach(1, 1, 0, 50, 2)
    for number, data in ((first, b"a\nb"), (second, b"c\n"), (first, b"b\n")):
        os.write(pipe[1], data)
        stage.take(number, pipe[0], 65536, WALL)
    batch = sealed(stage)
    os.write(pipe[1], b"later\n")
    stage.take(second, pipe[0], 65536, WALL)
    assert stage.seal() is None  # one at a time
    chunks = list(batch.records())
    assert [(chunk.stream, chunk.start, chunk.stop) for chunk in chunks] == [
        (first, 0, 2),
        (second, 0, 2),
        (first, 2, 5),
    ]
    assert records(again(stage).pending) == records(batch) == b"".join([chunk.records for chunk in chunks])
    batch.commit()
    assert done(stage) == framed(b"c\n", b"later\n", worker=1)[len(framed(b"c\n", worker=1)) :]


def test_an_empty_pipe_leaves_nothing(stage: Staging, pipe: tuple[int, int], again: Again) -> None:
    numbers = [stage.attach(0, 1, 0), stage.attach(0, 1, 1)]
    for _ in range(10):
        for number in numbers:
            with pytest.raises(BlockingIOError):
                stage.take(number, pipe[0], 65536, WALL)
    assert stage.seal() is None
    assert again(stage).seal() is None


def test_a_full_half_is_full_until_the_other_is_committed(stage: Staging, pipe: tuple[int, int]) -> None:
    number = stage.attach(0, 1, 0, 50, 2)
    data = b"x" * 999 + b"\n"
    os.write(pipe[1], data * 3)
    assert stage.take(number, pipe[0], 65536, WALL) == 1000
    with pytest.raises(Full):
        stage.take(number, pipe[0], 65536, WALL)
    batch = sealed(stage)
    assert stage.take(number, pipe[0], 65536, WALL) == 1000
    with pytest.raises(Full):
        stage.take(number, pipe[0], 65536, WALL)
    assert stage.seal() is None
    out = records(batch)
    batch.commit()
    out += done(stage)
    assert stage.take(number, pipe[0], 65536, WALL) == 1000
    assert out + done(stage) == framed(data * 3)


def test_too_many_entries_are_full_as_well(stage: Staging, pipe: tuple[int, int]) -> None:
    number = stage.attach(0, 1, 0)
    os.write(pipe[1], b"1234567")
    for turn in range(SMALL.entries):
        assert stage.take(number, pipe[0], 1, WALL + turn) == 1
    with pytest.raises(Full):
        stage.take(number, pipe[0], 1, WALL + 99)
    with pytest.raises(Full):
        stage.end(number, WALL + 99)
    records(sealed(stage))
    assert stage.take(number, pipe[0], 1, WALL + 99) == 1


def test_commit_wants_all_records_made(stage: Staging, pipe: tuple[int, int]) -> None:
    os.write(pipe[1], b"x")
    stage.take(stage.attach(0, 1, 0), pipe[0], 9, WALL)
    with pytest.raises(RuntimeError):
        sealed(stage).commit()


def test_a_place_is_free_again_once_the_stream_has_ended(stage: Staging, pipe: tuple[int, int], again: Again) -> None:
    numbers = [stage.attach(0, 1, 0) for _ in range(SMALL.streams)]
    with pytest.raises(Full):
        stage.attach(0, 1, 0)
    os.write(pipe[1], b"tail")
    stage.take(numbers[2], pipe[0], 9, WALL)
    with pytest.raises(ValueError, match="not ended"):
        stage.release(numbers[2])
    stage.end(numbers[2], WALL)
    with pytest.raises(ValueError, match="has ended"):
        stage.take(numbers[2], pipe[0], 9, WALL)
    batch = sealed(stage)
    records(batch)
    with pytest.raises(ValueError, match="not ended"):
        stage.release(numbers[2])
    batch.commit()
    stage.release(numbers[2])
    stage.release(numbers[0])  # nothing was taken of that
    assert sorted(again(stage).streams) == sorted({*numbers} - {numbers[0], numbers[2]})
    assert {stage.attach(5, 6, 1), stage.attach(5, 6, 0)} == {numbers[0], numbers[2]}
    assert {stream.state for stream in again(stage).streams.values()} >= {State(5, 6, 0), State(5, 6, 1)}


@pytest.mark.parametrize(
    ("before", "data", "records_in_it"),
    [(b"", b"", False), (b"a line\n", b"", False), (b"", b"x", True), (b"x", b"", True)],
)
def test_ends_of_streams_that_hold_nothing_have_no_records(
    before: bytes, data: bytes, records_in_it: bool, stage: Staging, pipe: tuple[int, int], again: Again
) -> None:
    number = stage.attach(0, 1, 0, 50, 2)
    if before:
        os.write(pipe[1], before)
        stage.take(number, pipe[0], 65536, WALL)
        done(stage)
    if data:
        os.write(pipe[1], data)
        stage.take(number, pipe[0], 65536, WALL)
    stage.end(number, WALL)
    batch = sealed(stage)
    assert (not batch.pass_over(), bool(records(again(stage).pending))) == (records_in_it, records_in_it)
    if not records_in_it:
        batch.commit()
        assert (
            stage.streams[number].state
            == again(stage).streams[number].state
            == State(0, 1, 0, 50, 2, len(before), ended=True)
        )
        stage.release(number)


def test_pids_said_late_are_kept(stage: Staging, pipe: tuple[int, int], again: Again) -> None:
    number = stage.attach(0, 1, 0)
    os.write(pipe[1], b"x")
    stage.take(number, pipe[0], 9, WALL)
    batch = sealed(stage)
    records(batch)
    stage.identify(number, 50, 2)
    batch.commit()
    assert stage.streams[number].state == again(stage).streams[number].state == State(0, 1, 0, 50, 2, 0, b"x")


def test_what_is_found_says_how_late_it_is(stage: Staging, pipe: tuple[int, int], again: Again) -> None:
    number = stage.attach(0, 1, 0)
    assert again(stage).latest == 0
    for turn in range(2):
        os.write(pipe[1], b"x")
        stage.take(number, pipe[0], 9, WALL + turn)
        assert again(stage).latest == WALL + turn
        stage.seal()
    assert again(stage).latest == WALL + 1


# --- what pipes do ----------------------------------------------------------------------------------------------------


def test_packets_merge_and_a_short_take_drops_nothing(stage: Staging, pipe: tuple[int, int]) -> None:
    number = stage.attach(0, 1, 0, 50, 2)
    fcntl.fcntl(pipe[1], fcntl.F_SETFL, os.O_DIRECT | os.O_NONBLOCK)
    for packet in (b"one\n", b"", b"two\n", b"three\n"):
        os.write(pipe[1], packet)
    assert stage.take(number, pipe[0], 6, WALL) == 6
    assert stage.take(number, pipe[0], 65536, WALL) == 8
    assert done(stage) == framed(b"one\ntwo\nthree\n")


def test_a_huge_pipe_is_taken_at_once() -> None:
    read, write = os.pipe2(os.O_NONBLOCK)
    size = fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 1 << 20)
    data = (b"y" * 99 + b"\n") * (size // 100)
    assert os.write(write, data) == len(data)
    stage = Staging.create("web", Layout(2, 1 << 20, 4))
    number = stage.attach(0, 1, 0, 50, 2)
    os.close(write)
    assert stage.take(number, read, 1 << 20, WALL) == len(data)
    assert stage.take(number, read, 1 << 20, WALL) == 0
    assert done(stage) == framed(data)
    os.close(read)
    stage.close()


def test_what_was_taken_does_not_change_with_the_writers_memory(stage: Staging, pipe: tuple[int, int]) -> None:
    """vmsplice(2) puts the writer's own pages into the pipe, here as a gift (flag 8)."""
    number = stage.attach(0, 1, 0, 50, 2)
    memory = mmap.mmap(-1, 4096)
    memory[:4] = b"old\n"
    view = (ctypes.c_char * 4).from_buffer(memory)
    vector = struct.pack("@NN", ctypes.addressof(view), 4)
    assert ctypes.CDLL(None).vmsplice(pipe[1], vector, 1, 8) == 4
    stage.take(number, pipe[0], 65536, WALL)
    view.raw = b"new\n"
    assert done(stage) == framed(b"old\n")


# --- who takes over ---------------------------------------------------------------------------------------------------

CHILD = """
import os, socket, array, sys, signal
from nssup.staging import Staging
stage = Staging.create("web")
number = stage.attach(0, 1, 0, 50, 2)
read, write = os.pipe2(os.O_NONBLOCK)
os.write(write, b"said before the kill\\n")
stage.take(number, read, 65536, 1795435200.0)
line = socket.socket(fileno=int(sys.argv[1]))
line.sendmsg([stage.fd.to_bytes(4, "little")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [stage.fd]))])
signal.pause()
"""


@pytest.mark.parametrize("way", ["pidfd_getfd", "SCM_RIGHTS"])
def test_bytes_and_position_are_there_when_their_process_is_not(way: str, pipe: tuple[int, int]) -> None:
    ours, theirs = socket.socketpair()
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(theirs.fileno())], pass_fds=[theirs.fileno()])
    theirs.close()
    with ours, child:
        data, rights, _, _ = ours.recvmsg(4, socket.CMSG_SPACE(4))
        sent = array.array("i", rights[0][2])[0]
        if way == "pidfd_getfd":
            os.close(sent)
            pidfd = os.pidfd_open(child.pid)
            libc = ctypes.CDLL(None, use_errno=True)
            sent = libc.syscall(PIDFD_GETFD, pidfd, int.from_bytes(data, "little"), 0)
            os.close(pidfd)
            if sent < 0:
                child.kill()
                pytest.skip(f"pidfd_getfd: {os.strerror(ctypes.get_errno())}")
        child.kill()
    stage = Staging(sent)
    os.write(pipe[1], b"said after it\n")
    stage.take(0, pipe[0], 65536, WALL)
    assert done(stage) == framed(b"said before the kill\nsaid after it\n")
    stage.close()


class Begun:
    """A batch that was begun to be appended to a log. `finish`: the next supervisor does it."""

    before = b"earlier\n"

    def __init__(self, stage: Staging, pipe: tuple[int, int], path: Path, again: Again) -> None:
        self.path = path
        path.write_bytes(self.before)
        self.number = stage.attach(0, 1, 0, 50, 2)
        for turn in range(3):
            os.write(pipe[1], b"line %d\n" % turn * 3)
            stage.take(self.number, pipe[0], 65536, WALL + turn)
        batch = sealed(stage)
        self.records = records(batch)
        batch.begin(path.stat())
        self.found = again(stage)

    def wrote(self, data: bytes) -> None:
        with self.path.open("ab") as log:
            log.write(data)

    def finish(self) -> Finished | None:
        return finish(self.found, self.path)


@pytest.fixture
def begun(stage: Staging, pipe: tuple[int, int], tmp_path: Path, again: Again) -> Begun:
    return Begun(stage, pipe, tmp_path / "web.jsonl", again)


@pytest.mark.parametrize("there", [0, 1, 9, 76, 77, 200, 600, -2, -1, None])
def test_what_is_missing_is_appended_and_nothing_else_touched(begun: Begun, there: int | None, again: Again) -> None:
    begun.wrote(begun.records[:there])
    assert begun.finish() == (0, {})
    assert begun.finish() is None
    assert begun.path.read_bytes() == begun.before + begun.records
    found = again(begun.found)
    assert found.pending is None
    assert found.streams[begun.number].state.offset == 63


def test_a_log_that_was_renamed_gets_its_rest(begun: Begun) -> None:
    begun.wrote(begun.records[:77])
    begun.path.rename(begun.path.with_name("web.jsonl.1"))
    begun.path.write_bytes(b"somebody else's\n")
    assert begun.finish() == (0, {})
    assert begun.path.read_bytes() == b"somebody else's\n"
    assert begun.path.with_name("web.jsonl.1").read_bytes() == begun.before + begun.records


@pytest.mark.parametrize(
    "left", [None, b"", b"short\n", b"quite another log\n" * 9, b'earlier\n{"ts":"x","b":1}\n', b"earlier\n\xff"]
)
def test_a_log_that_is_not_ours_any_more_is_left_alone(begun: Begun, left: bytes | None, again: Again) -> None:
    begun.wrote(begun.records[:77])
    if left is None:
        begun.path.unlink()
    else:
        begun.path.write_bytes(left)
    assert begun.finish() is None
    assert (begun.path.read_bytes() if begun.path.exists() else None) == left
    pending = again(begun.found).pending
    assert pending is not None
    assert pending.intent is None


@pytest.mark.parametrize("size", [20, 50, 181, 300])
def test_a_batch_written_by_another_version_is_written_anew(begun: Begun, size: int) -> None:
    begun.wrote(begun.records.replace(b'"worker":', b'"new":1,"worker":')[:size])
    if size == 20:
        begun.wrote(b"other")
    assert begun.finish() == (0, {})
    assert begun.path.read_bytes() == begun.before + begun.records


def test_a_full_disk_costs_the_rest_of_the_batch_only(begun: Begun, again: Again) -> None:
    begun.wrote(begun.records[:77])
    kept = b"".join(begun.records.splitlines(keepends=True)[:4])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(begun.before) + len(kept) + 60, hard))
    try:
        assert begun.finish() == (errno.EFBIG, {begun.number: 5 * 7})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert begun.path.read_bytes() == begun.before + kept
    found = again(begun.found)
    assert found.pending is None
    assert found.streams[begun.number].state.offset == 63


def test_a_batch_that_nobody_began_is_left_to_be_written(
    stage: Staging, pipe: tuple[int, int], tmp_path: Path, again: Again
) -> None:
    os.write(pipe[1], b"x\n")
    stage.take(stage.attach(0, 1, 0), pipe[0], 9, WALL)
    stage.seal()
    found = again(stage)
    assert finish(found, tmp_path / "web.jsonl") is None
    assert found.pending is not None
    assert list(tmp_path.iterdir()) == []


# --- killed -----------------------------------------------------------------------------------------------------------


def harness(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, HARNESS, *arguments], capture_output=True, text=True, check=False, timeout=50
    )


@pytest.mark.slow
def test_random_kills_lose_and_double_nothing() -> None:
    run = harness("--kills", "200", "--seed", "3")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "missing 0, twice 0" in run.stdout


@pytest.mark.slow
def test_a_kill_before_any_bytecode_changes_no_record() -> None:
    run = harness("--every", "211", "--seed", str(os.getpid()))
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["position", "intent"])
def test_doing_it_wrong_is_noticed(broken: str) -> None:
    run = harness("--kills", "160", "--seed", "3", "--broken", broken)
    assert run.returncode == 1, run.stdout + run.stderr
    assert "WRONG" in run.stdout
